#!/usr/bin/env bash
# CPU per cached query, optcache beside cache: the whole of CoreDNS, real sockets, real clients.
#
#     bench/end_to_end.sh [-d SECONDS] [-r ROUNDS] [-b BINARY] [-- DNSPERF-OPTIONS...]
#
# The server is pinned to core 0, dnsperf to core 1. For each Corefile the two caches take turns,
# ROUNDS times (default 3), SECONDS each (default 5), each time with a fresh process that was
# asked for all names before. The CPU time is the server's own (/proc/PID/stat), divided by the
# queries that dnsperf got an answer to. What is printed are medians. Everything is on loopback.
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

seconds=5 rounds=3 binary=
while getopts d:r:b:h option; do
    case $option in
        d) seconds=$OPTARG ;;
        r) rounds=$OPTARG ;;
        b) binary=$(realpath -- "$OPTARG") ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
dnsperf_options=("$@")
[[ $seconds =~ ^[1-9][0-9]*$ && $rounds =~ ^[1-9][0-9]*$ ]] || die "-d and -r take a whole number from 1"

cd "$(dirname "$0")/.."

command -v dnsperf >/dev/null || die "needs dnsperf: apt-get install dnsperf"
command -v taskset >/dev/null || die "needs taskset: apt-get install util-linux"
[[ -r /proc/self/stat ]] || die "needs Linux: CPU times come from /proc"
taskset -c 0,1 true 2>/dev/null || die "needs cores 0 and 1"
if [[ -z $binary ]]; then
    make --no-print-directory build >&2
    binary=$PWD/bin/coredns
fi

readonly names=1000 server_core=0 client_core=1
work=$(mktemp -d)
pid='' upstream_pid='' server_pid=''
stop() { # PID
    [[ -n $1 ]] || return 0
    kill -KILL "$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true
}
cleanup() {
    stop "$pid"
    stop "$server_pid"
    stop "$upstream_pid"
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# start CORE COREFILE sets $pid and, for each @NAME@ in the Corefile, a port: ${port[NAME]}. The
# ports are drawn by chance until all of them are free.
declare -A port
start() {
    local core=$1 text name try deadline
    for try in {1..20}; do
        text=$2
        port=()
        while [[ $text =~ @([a-z]+)@ ]]; do
            name=${BASH_REMATCH[1]}
            port[$name]=$((20000 + RANDOM % 12000))
            text=${text//"@$name@"/${port[$name]}}
        done
        printf '%s\n' "$text" >"$work/Corefile"
        taskset -c "$core" "$binary" -conf "$work/Corefile" >"$work/log" 2>&1 &
        pid=$!
        deadline=$((SECONDS + 20))
        while kill -0 "$pid" 2>/dev/null; do
            ((SECONDS < deadline)) || { stop "$pid"; break; }
            # This line comes when all sockets are open.
            if grep -q '^CoreDNS-' "$work/log"; then
                return
            fi
            sleep 0.05
        done
        stop "$pid"
        grep -q 'address already in use' "$work/log" || break
    done
    cat "$work/log" >&2
    die "the server does not start"
}

# asked PORT is how many queries the server with /metrics there has had, by its prometheus plugin.
asked() {
    exec 3<>"/dev/tcp/127.0.0.1/$1"
    printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3
    awk '/^coredns_dns_requests_total\{/ { n += $NF } END { print n + 0 }' <&3
    exec 3<&- 3>&-
}

# cpu PID prints the ticks that the process has spent in user mode and in the system.
cpu() {
    local stat
    stat=$(<"/proc/$1/stat")
    read -ra stat <<<"${stat##*) }" # the name before may hold anything
    echo "${stat[11]} ${stat[12]}"
}

perf() { # DNSPERF-OPTIONS...
    taskset -c "$client_core" dnsperf -s 127.0.0.1 -p "$dns_port" -d "$work/queries" -q 100 -c 8 \
        ${dnsperf_options[@]+"${dnsperf_options[@]}"} "$@"
}

# result LABEL FILE prints the number behind a label of dnsperf's summary.
result() { sed -n "s/^ *$1: *\([0-9.]*\).*/\1/p" "$2"; }

median() { sort -g | awk '{ v[NR] = $1 } END { print (v[int((NR + 1) / 2)] + v[int(NR / 2) + 1]) / 2 }'; }

for ((i = 0; i < names; i++)); do
    echo "host-$i.example.org A"
done >"$work/queries"

# The upstream knows every name. It is asked before a measurement only.
start "$client_core" '.:@dns@ {
    bind 127.0.0.1
    prometheus 127.0.0.1:@metrics@
    template IN A {
        answer "{{ .Name }} 3600 IN A 192.0.2.1"
    }
}'
upstream_pid=$pid upstream_port=${port[dns]} upstream_metrics=${port[metrics]}

# ./Corefile's forwarder without its metrics; and the chain that kubeadm writes, as far as it works
# without a cluster, and without the cap of 30 s, by which names would expire in a long round.
declare -A corefile=(
    [forwarder]="errors
        CACHE
        forward . 127.0.0.1:$upstream_port {
            policy sequential
            max_concurrent 1000
        }"
    [kubeadm]="errors
        health 127.0.0.1:@health@ {
            lameduck 5s
        }
        ready 127.0.0.1:@ready@
        prometheus 127.0.0.1:@metrics@
        forward . 127.0.0.1:$upstream_port {
            max_concurrent 1000
        }
        CACHE
        loop
        reload
        loadbalance"
)

ticks=$(getconf CLK_TCK)
upstream_queries=0

# measure CHAIN CACHE runs one round and appends its figures to a file for each.
measure() {
    local chain=$1 cache=$2 before user system queries speed body
    body=${corefile[$chain]//CACHE/$cache}
    start "$server_core" ".:@dns@ {
        bind 127.0.0.1
        $body
    }"
    server_pid=$pid dns_port=${port[dns]}
    perf -n 20 >/dev/null # often enough for every name to find its tier

    before=$(asked "$upstream_metrics")
    read -r user system < <(cpu "$server_pid")
    perf -l "$seconds" >"$work/result"
    read -r user_end system_end < <(cpu "$server_pid")
    upstream_queries=$((upstream_queries + $(asked "$upstream_metrics") - before))
    stop "$server_pid"
    server_pid=

    queries=$(result 'Queries completed' "$work/result")
    speed=$(result 'Queries per second' "$work/result")
    [[ -n $queries && $queries -gt 0 ]] || { cat "$work/result" >&2; die "dnsperf got no answers"; }
    if [[ $(result 'Queries lost' "$work/result") -gt 0 ]]; then
        printf 'lost: %s of %s queries (%s, %s)\n' "$(result 'Queries lost' "$work/result")" "$queries" "$chain" "$cache" >&2
    fi
    awk -v u=$((user_end - user)) -v s=$((system_end - system)) -v hz="$ticks" -v q="$queries" -v qps="$speed" '
        BEGIN { us = 1e6 / hz / q; printf "%.3f %.3f %.3f %.0f\n", (u + s) * us, u * us, s * us, qps }
    ' >>"$work/$chain-$cache"
}

# column CHAIN CACHE N prints the median of the N-th figure.
column() { cut -d' ' -f"$3" "$work/$1-$2" | median; }

for ((round = 1; round <= rounds; round++)); do
    for chain in forwarder kubeadm; do
        for cache in optcache cache; do
            printf '\rround %d of %d: %-10s %-9s' "$round" "$rounds" "$chain" "$cache" >&2
            measure "$chain" "$cache"
        done
    done
done
printf '\r%-40s\r' '' >&2

printf '%d names, %d rounds of %d s, medians; CPU per query in microseconds\n\n' "$names" "$rounds" "$seconds"
row='%-10s %-9s %8s %8s %8s %10s %7s\n'
# shellcheck disable=SC2059 # the format is ours
printf "$row" chain plugin CPU user system queries/s ratio
for chain in forwarder kubeadm; do
    for cache in optcache cache; do
        ratio=''
        if [[ $cache = optcache ]]; then
            ratio=$(awk -v a="$(column "$chain" optcache 1)" -v b="$(column "$chain" cache 1)" 'BEGIN { printf "%.2f", a / b }')
        fi
        # shellcheck disable=SC2059
        printf "$row" "$chain" "$cache" "$(column "$chain" "$cache" 1)" "$(column "$chain" "$cache" 2)" \
            "$(column "$chain" "$cache" 3)" "$(column "$chain" "$cache" 4)" "$ratio"
    done
done
printf '\nqueries that went upstream during the measurements: %d\n' "$upstream_queries"
if ((upstream_queries > 0)); then
    die "not everything was answered from the cache: the figures are not of hits alone"
fi
