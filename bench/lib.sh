# shellcheck shell=bash
# What the scripts of this folder share, which source it: options' helpers, servers, results. It has
# a folder for temporary files, $work, and ends what is still running when the script ends.

set -euo pipefail

# usage prints the comment at the top of the script.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

need() { # COMMAND PACKAGE
    command -v "$1" >/dev/null || die "needs $1: apt-get install $2"
}

whole() { # VALUE... must be whole numbers from 1
    local value
    for value; do
        [[ $value =~ ^[1-9][0-9]*$ ]] || die "options take a whole number from 1"
    done
}

two_cores() {
    need taskset util-linux
    taskset -c 0,1 true 2>/dev/null || die "needs cores 0 and 1"
}

# build sets $binary, unless there is one, to CoreDNS with the plugin.
build() {
    [[ -z ${binary:-} ]] || return 0
    make --no-print-directory build >&2
    binary=$PWD/bin/coredns
}

PATH=$PATH:/usr/sbin:/usr/local/sbin # where Debian has unbound
work=$(mktemp -d)
declare -A running=()
stop() { # PID
    kill -KILL "$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true
    unset "running[$1]"
}
cleanup() {
    local pid
    for pid in "${!running[@]}"; do
        stop "$pid"
    done
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# start CONFIGURATION COMMAND... runs a server in the background, as $pid, and returns when it
# answers. The configuration is in $work/conf, with a port for each @NAME@, the same one for the
# same name, which is kept in ${port[NAME]}. Ports go up from a number drawn by chance: no two of
# these servers share one, and when one is taken by something else the next ones are tried.
next_port=$((20000 + RANDOM % 12000))
declare -A port
start() {
    local text name deadline
    for _ in {1..20}; do
        text=$1
        port=()
        while [[ $text =~ @([a-z]+)@ ]]; do
            name=${BASH_REMATCH[1]}
            port[$name]=$((next_port++))
            text=${text//"@$name@"/${port[$name]}}
        done
        printf '%s\n' "$text" >"$work/conf"
        "${@:2}" >"$work/log" 2>&1 &
        pid=$!
        running[$pid]=
        deadline=$((SECONDS + 20))
        while kill -0 "$pid" 2>/dev/null && ((SECONDS < deadline)); do
            ! answers "${port[dns]}" || return 0
            sleep 0.05
        done
        stop "$pid"
        grep -qi 'address already in use' "$work/log" || break
    done
    cat "$work/log" >&2
    die "does not start: ${*:2}"
}

# A server that does not listen by TCP yet need not be asked: that would take a second.
answers() { # PORT
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null &&
        echo "first.example.org A" | dnsperf -s 127.0.0.1 -p "$1" -t 1 -n 1 2>/dev/null |
        grep -q 'Queries completed: *1 '
}

# coredns COREFILE [taskset -c CORES] starts CoreDNS.
coredns() { start "$1" "${@:2}" "$binary" -conf "$work/conf"; }

# upstream [taskset -c CORES] starts a CoreDNS that knows every name.
upstream() {
    coredns '.:@dns@ {
        bind 127.0.0.1
        prometheus 127.0.0.1:@metrics@
        template IN A {
            answer "{{ .Name }} 3600 IN A 192.0.2.1"
        }
    }' "$@"
    # shellcheck disable=SC2034 # for the scripts
    upstream_pid=$pid upstream_port=${port[dns]} upstream_metrics=${port[metrics]}
}

# versions prints what figures depend on: machine, kernel, Go, and the packages that are installed.
versions() {
    uname -srm
    sed -n 's/^model name.*: //p' /proc/cpuinfo | sort | uniq -c
    go version
    dpkg-query -W -f '${Package} ${Version}\n' dnsperf unbound dnsdist pdns-recursor linux-perf gcc 2>/dev/null || true
}

installed() { # COMMAND PACKAGE
    command -v "$1" >/dev/null && return
    printf 'no %s, skipped: apt-get install %s\n' "$1" "$2" >&2
    return 1
}
# The other servers: each fails when it is not installed. They forward to the upstream, with room for
# ENTRIES, by one thread.
dnsdist_server() { # ENTRIES [taskset -c CORES]
    installed dnsdist dnsdist || return 1
    start "setLocal('127.0.0.1:@dns@')
setSecurityPollSuffix('')
webserver('127.0.0.1:@metrics@')
setWebserverConfig({statsRequireAuthentication=false})
newServer({address='127.0.0.1:$upstream_port', healthCheckMode='up'})
getPool(''):setCache(newPacketCache($1))" \
        "${@:2}" dnsdist --supervised --disable-syslog -C "$work/conf"
}

unbound_server() { # ENTRIES [taskset -c CORES]
    installed unbound unbound && installed unbound-control unbound || return 1
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
    msg-cache-size: $(($1 * 1024))
    rrset-cache-size: $(($1 * 1024))
    extended-statistics: yes
remote-control:
    control-enable: yes
    control-interface: \"$work/control\"
    control-use-cert: no
forward-zone:
    name: \".\"
    forward-addr: 127.0.0.1@$upstream_port" \
        "${@:2}" unbound -d -p -c "$work/conf"
}

recursor_server() { # [taskset -c CORES]
    installed pdns_recursor pdns-recursor || return 1
    # It reads its configuration from a folder.
    start "local-address=127.0.0.1
local-port=@dns@
forward-zones-recurse=.=127.0.0.1:$upstream_port
dont-query=
dnssec=off
threads=1
daemon=no
socket-dir=$work
security-poll-suffix=
hint-file=no" \
        "$@" bash -c 'cp "$1" "$0/recursor.conf" && exec pdns_recursor --config-dir="$0"' "$work" "$work/conf"
}

# cpu PID prints the ticks that the process has spent in user mode and in the system.
cpu() {
    local stat
    stat=$(<"/proc/$1/stat")
    read -ra stat <<<"${stat##*) }" # the name before may hold anything
    echo "${stat[11]} ${stat[12]}"
}

# metric PORT NAME is the sum of all metrics of that name, as a whole number; exact is what it is.
metric() { printf '%.0f\n' "$(exact "$@")"; }
exact() {
    exec 3<>"/dev/tcp/127.0.0.1/$1"
    printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3
    awk -v name="$2" 'index($1, name) == 1 { n += $NF } END { printf "%.3f\n", n }' <&3
    exec 3<&- 3>&-
}

queries() { awk -v n="$1" 'BEGIN { for (i = 0; i < n; i++) print "host-" i ".example.org A" }'; } # NUMBER

# latencies PORT RATE SECONDS [OPTION...] has bench/tail, which build_tail builds, ask for the names in $work/queries at
# that rate, with what is in client before it, and prints $latency_columns, of which the times are milliseconds.
build_tail() { CGO_ENABLED=0 go build -buildvcs=false -o "$work/tail" ./bench/tail; }
client=()
# shellcheck disable=SC2034 # for the scripts
latency_columns='p50 p99 p99.9 max lost bad late_p99.9'
latencies() {
    # Lines as "p99.9  1.234 ms  sent late by 0.123 ms", and "lost  5".
    "${client[@]}" "$work/tail" -server "127.0.0.1:$1" -d "$work/queries" -rate "$2" -time "${3}s" "${@:4}" |
        awk '{ v[$1] = $2; late[$1] = $(NF - 1) }
            END { print v["p50"], v["p99"], v["p99.9"], v["max"], v["lost"], v["bad"], late["p99.9"] }'
}

# result LABEL FILE prints the number behind a label of dnsperf's summary.
result() { sed -n "s/^ *$1: *\([0-9.]*\).*/\1/p" "$2"; }

# The results are kept as CSV: record's first line has the names of the columns. The file is that of
# the option -c, or a temporary one.
results=$work/results.csv
keep() { # FILE
    results=$(realpath -- "$1")
    : >"$results"
}
record() { # FIELD...
    local IFS=,
    printf '%s\n' "$*" >>"$results"
}

# column PREFIX NAME prints a column of the results that begin with PREFIX.
column() {
    awk -F, -v prefix="$1," -v name="$2" '
        NR == 1 { for (n = 1; n <= NF && $n != name;) n++ }
        NR > 1 && index($0, prefix) == 1 { print $n }
    ' "$results"
}
median() { sort -g | awk '{ v[NR] = $1 } END { print (v[int((NR + 1) / 2)] + v[int(NR / 2) + 1]) / 2 }'; }

# spread NAME PREFIX OTHER is the ratio of a column's values for two prefixes, taken in each round: the median, and the lowest
# and the highest in brackets. It is empty if one of them was not measured.
spread() {
    paste <(column "$2" "$1") <(column "$3" "$1") | awk 'NF == 2 && $2 > 0 { print $1 / $2 }' | sort -g | awk '
        { v[NR] = $1 }
        END { if (NR) printf "%.2f (%.2f to %.2f)", (v[int((NR + 1) / 2)] + v[int(NR / 2) + 1]) / 2, v[1], v[NR] }
    '
}

# row FIELD... prints a line of a table in the script's $format.
row() {
    # shellcheck disable=SC2059,SC2154
    printf "$format" "$@"
}
