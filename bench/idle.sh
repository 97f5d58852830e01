#!/usr/bin/env bash
# What a server costs that nobody asks, or hardly anybody: cache, optcache, and optcache with fastpath.
#
#     bench/idle.sh [-d SECONDS] [-r ROUNDS] [-b BINARY] [-c CSV] [SERVER...]
#
# Each SERVER (default: cache optcache fastpath) is asked for 1,000 names by dnsperf, for two seconds, and then left
# alone for five. What is counted after that, in SECONDS (default 20), first with no query at all and then with one
# each second, is the CPU time of the process (/proc/PID/task/*/schedstat) and its context switches, of all
# threads. In turns, ROUNDS times (default 3); what is printed are medians, and the file CSV gets every round.
# Everything is on loopback.
source "$(dirname "$0")/lib.sh"

seconds=20 rounds=3 binary=
while getopts d:r:b:c:h option; do
    case $option in
        d) seconds=$OPTARG ;;
        r) rounds=$OPTARG ;;
        b) binary=$(realpath -- "$OPTARG") ;;
        c) keep "$OPTARG" ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
whole "$seconds" "$rounds"
servers=("$@")
((${#servers[@]})) || servers=(cache optcache fastpath)

cd "$(dirname "$0")/.."
need dnsperf dnsperf
[[ -r /proc/self/schedstat ]] || die "needs Linux: CPU time comes from /proc/PID/task/*/schedstat"
build
queries 1000 >"$work/queries"
# shellcheck disable=SC2119 # the arguments are others
upstream

declare -A block=([cache]=cache [optcache]='optcache {
        fastpath off
    }' [fastpath]='optcache {
        fastpath
    }')

# spent PID prints the CPU time in ns and the context switches so far.
spent() {
    cat "/proc/$1"/task/*/schedstat "/proc/$1"/task/*/status |
        awk 'NF == 3 && $1 ~ /^[0-9]+$/ { ns += $1 } /ctxt_switches:/ { n += $2 } END { printf "%d %d\n", ns, n }'
}
# during COMMAND... prints what the server spends meanwhile, in ms and switches.
during() {
    local before after
    read -ra before < <(spent "$pid")
    "$@"
    read -ra after < <(spent "$pid")
    awk -v ns=$((after[0] - before[0])) -v n=$((after[1] - before[1])) 'BEGIN { printf "%.1f %d\n", ns / 1e6, n }'
}
each_second() {
    local lost
    dnsperf -s 127.0.0.1 -p "${port[dns]}" -d "$work/queries" -Q 1 -l "$seconds" >"$work/result" ||
        { cat "$work/result" >&2; die "dnsperf failed"; }
    lost=$(result 'Queries lost' "$work/result")
    ((lost == 0)) || printf 'lost: %d queries\n' "$lost" >&2
}

record server round idle_ms idle_switches asked_ms asked_switches
for ((round = 1; round <= rounds; round++)); do
    for server in "${servers[@]}"; do
        [[ -n ${block[$server]:-} ]] || die "no such server: $server"
        printf '\rround %d of %d: %-10s' "$round" "$rounds" "$server" >&2
        coredns ".:@dns@ {
    bind 127.0.0.1
    errors
    ${block[$server]}
    forward . 127.0.0.1:$upstream_port
}"
        dnsperf -s 127.0.0.1 -p "${port[dns]}" -d "$work/queries" -l 2 >"$work/result" ||
            { cat "$work/result" >&2; die "dnsperf failed at $server"; }
        sleep 5
        read -ra idle < <(during sleep "$seconds")
        read -ra asked < <(during each_second)
        stop "$pid"
        record "$server" "$round" "${idle[@]}" "${asked[@]}"
    done
done
printf '\r%-40s\r' '' >&2

format='%-10s %14s %14s %14s %14s\n'
row server 'idle, ms' 'switches' '1 query/s, ms' 'switches'
for server in "${servers[@]}"; do
    figures=()
    for column in idle_ms idle_switches asked_ms asked_switches; do
        figures+=("$(column "$server" $column | median)")
    done
    row "$server" "${figures[@]}"
done
