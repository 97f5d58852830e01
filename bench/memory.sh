#!/usr/bin/env bash
# Memory for each cached answer: optcache, cache, dnsdist and unbound, one after the other.
#
#     bench/memory.sh [-n NAMES] [-s SECONDS] [-b BINARY] [SERVER...]
#
# Each server is asked by dnsperf for NAMES different names (default 1000000), once. It forwards to
# a CoreDNS that knows every name, with a TTL of an hour. What is counted is the resident memory
# of the server's process (VmRSS), SECONDS (default 10) after the last answer, less what it was
# before the first query, divided by the entries that the server says it holds. Nothing is forced:
# no garbage collection, no trimming. A SERVER that is not installed is skipped. Everything is
# on loopback.
set -euo pipefail

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0"; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

names=1000000 settle=10 binary=
while getopts n:s:b:h option; do
    case $option in
        n) names=$OPTARG ;;
        s) settle=$OPTARG ;;
        b) binary=$(realpath -- "$OPTARG") ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[[ $names =~ ^[1-9][0-9]*$ && $settle =~ ^[0-9]+$ ]] || die "-n and -s take a whole number"
servers=("$@")
((${#servers[@]})) || servers=(optcache cache dnsdist unbound)

cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/usr/local/sbin # where Debian has unbound

command -v dnsperf >/dev/null || die "needs dnsperf: apt-get install dnsperf"
command -v curl >/dev/null || die "needs curl: apt-get install curl"
[[ -r /proc/self/status ]] || die "needs Linux: resident memory comes from /proc"
if [[ -z $binary ]]; then
    make --no-print-directory build >&2
    binary=$PWD/bin/coredns
fi

work=$(mktemp -d)
pid='' upstream_pid=''
stop() { # PID
    [[ -n $1 ]] || return 0
    kill -KILL "$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true
}
cleanup() {
    stop "$pid"
    stop "$upstream_pid"
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# write FILE TEXT puts a number for each @NAME@ of the text, the same one for the same name, and
# keeps it in ${port[NAME]}.
declare -A port
write() {
    local text=$2 name
    port=()
    while [[ $text =~ @([a-z]+)@ ]]; do
        name=${BASH_REMATCH[1]}
        port[$name]=$((20000 + RANDOM % 12000))
        text=${text//"@$name@"/${port[$name]}}
    done
    printf '%s\n' "$text" >"$1"
}

# start CONFIGURATION COMMAND... runs a server in the background, as $pid, and returns when it
# answers. Its ports are drawn by chance until all of them are free.
start() {
    local text=$1 try deadline
    shift
    for try in {1..20}; do
        write "$work/conf" "$text"
        "$@" >"$work/log" 2>&1 &
        pid=$!
        deadline=$((SECONDS + 20))
        while kill -0 "$pid" 2>/dev/null && ((SECONDS < deadline)); do
            if answers "${port[dns]}"; then
                return
            fi
            sleep 0.2
        done
        stop "$pid"
        pid=
        grep -qi 'address already in use' "$work/log" || break
    done
    cat "$work/log" >&2
    die "$1 does not start"
}

answers() { # PORT
    echo "first.example.org A" | dnsperf -s 127.0.0.1 -p "$1" -t 1 -n 1 2>/dev/null |
        grep -q 'Queries completed: *1 '
}

resident() { awk '/^VmRSS:/ { print $2 * 1024 }' "/proc/$1/status"; } # PID

metric() { # NAME
    curl -fsS "http://127.0.0.1:${port[metrics]}/metrics" |
        awk -v name="$1" 'index($1, name) == 1 { n += $NF } END { printf "%.0f\n", n }'
}

result() { sed -n "s/^ *$1: *\([0-9.]*\).*/\1/p" "$2"; } # LABEL FILE

awk -v n="$names" 'BEGIN { for (i = 0; i < n; i++) print "host-" i ".example.org A" }' >"$work/queries"

start '.:@dns@ {
    bind 127.0.0.1
    template IN A {
        answer "{{ .Name }} 3600 IN A 192.0.2.1"
    }
}' "$binary" -conf "$work/conf"
upstream_pid=$pid upstream_port=${port[dns]}
pid=

# coredns CACHE starts the binary with a cache.
coredns() {
    start ".:@dns@ {
        bind 127.0.0.1
        errors
        prometheus 127.0.0.1:@metrics@
        $1
        forward . 127.0.0.1:$upstream_port
    }" "$binary" -conf "$work/conf"
}

installed() { # COMMAND
    command -v "$1" >/dev/null && return
    printf 'no %s, skipped: apt-get install %s\n' "$1" "$1" >&2
    return 1
}

# For each server a function that starts it, and fails when it is not there, and one that says
# how many entries it holds. The caches of dnsdist and unbound have some room to spare: neither
# reserves what it does not use, but for dnsdist's table.
start_optcache() {
    coredns "optcache {
            success $names
        }"
}
held_optcache() { metric coredns_optcache_entries; }

start_cache() {
    coredns "cache {
            success $names
        }"
}
held_cache() { metric coredns_cache_entries; }

start_dnsdist() {
    installed dnsdist || return 1
    start "setLocal('127.0.0.1:@dns@')
setSecurityPollSuffix('')
webserver('127.0.0.1:@metrics@')
setWebserverConfig({statsRequireAuthentication=false})
newServer({address='127.0.0.1:$upstream_port', healthCheckMode='up'})
getPool(''):setCache(newPacketCache($((names + names / 5))))" \
        dnsdist --supervised --disable-syslog -C "$work/conf"
}
held_dnsdist() { metric dnsdist_pool_cache_entries; }

start_unbound() {
    installed unbound && installed unbound-control || return 1
    start "server:
    interface: 127.0.0.1@@dns@
    username: \"\"
    chroot: \"\"
    directory: \"$work\"
    pidfile: \"\"
    use-syslog: no
    do-daemonize: no
    module-config: \"iterator\"
    do-not-query-localhost: no
    outgoing-range: 4096
    num-queries-per-thread: 4096
    msg-cache-size: $((names * 1024))
    rrset-cache-size: $((names * 1024))
    extended-statistics: yes
remote-control:
    control-enable: yes
    control-interface: \"$work/control\"
    control-use-cert: no
forward-zone:
    name: \".\"
    forward-addr: 127.0.0.1@$upstream_port" \
        unbound -d -p -c "$work/conf"
}
held_unbound() {
    unbound-control -c "$work/conf" stats_noreset | awk -F= '$1 == "msg.cache.count" { print $2 }'
}

row='%-10s %10s %12s %12s %12s\n'
head=1
for server in "${servers[@]}"; do
    [[ $(type -t "start_$server") = function ]] || die "no such server: $server"
    "start_$server" || continue
    before=$(resident "$pid")
    dnsperf -s 127.0.0.1 -p "${port[dns]}" -d "$work/queries" -n 1 -q 200 -c 4 >"$work/result" ||
        { cat "$work/result" >&2; die "dnsperf failed at $server"; }
    sleep "$settle"
    after=$(resident "$pid")
    held=$("held_$server")
    stop "$pid"
    pid=
    lost=$(result 'Queries lost' "$work/result")
    ((lost == 0)) || printf 'lost: %d of %d queries (%s)\n' "$lost" "$names" "$server" >&2
    ((held > 0)) || die "$server holds nothing"
    # shellcheck disable=SC2059 # the format is ours
    ((head)) && printf "$row" server entries 'before, MiB' 'after, MiB' 'bytes each'
    head=0
    # shellcheck disable=SC2046,SC2059
    printf "$row" "$server" "$held" $(awk -v b="$before" -v a="$after" -v n="$held" \
        'BEGIN { printf "%.1f %.1f %.0f", b / 1048576, a / 1048576, (a - b) / n }')
done
