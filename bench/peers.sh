#!/usr/bin/env bash
# CPU per cached query over UDP, and latency at a fixed rate: optcache with its fast path and without, cache,
# other servers, and a program that only echoes, which is the kernel's part of it.
#
#     bench/peers.sh [-d SECONDS] [-r ROUNDS] [-q RATE] [-t SECONDS] [-b BINARY] [-c CSV] [SERVER...]
#
# Each server is pinned to core 0, dnsperf to core 1. They take turns, ROUNDS times (default 3), SECONDS each
# (-d, default 5), each time in a fresh process that was asked for all of 1000 names before. The CPU
# time is the process's own (/proc/PID/stat), divided by the queries that dnsperf got an answer to. Then each,
# but those with the kubeadm Corefile, gets queries at a RATE (default 65000 per second) from 100 sockets for
# SECONDS (-t, default 30), and each query's latency is taken (bench/tail); and the highest rate is searched at
# which nothing is lost in two seconds. What is printed are medians; the file CSV gets every round. A SERVER
# that is not installed is skipped. Everything is on loopback.
source "$(dirname "$0")/lib.sh"

seconds=5 rounds=3 rate=65000 tail_seconds=30 binary=
while getopts d:r:q:t:b:c:h option; do
    case $option in
        d) seconds=$OPTARG ;;
        r) rounds=$OPTARG ;;
        q) rate=$OPTARG ;;
        t) tail_seconds=$OPTARG ;;
        b) binary=$(realpath -- "$OPTARG") ;;
        c) keep "$OPTARG" ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
whole "$seconds" "$rounds" "$rate" "$tail_seconds"
servers=("$@")
((${#servers[@]})) || servers=(echo fastpath fastpath-kubeadm optcache optcache-kubeadm cache cache-kubeadm unbound dnsdist recursor)

cd "$(dirname "$0")/.."

need dnsperf dnsperf
need cc gcc
two_cores
build

readonly names=1000 server_core=0 client_core=1
cc -O2 -o "$work/echo" bench/echo/echo.c
client=(taskset -c $client_core)
build_tail
queries $names >"$work/queries"
upstream taskset -c $client_core

pinned=(taskset -c "$server_core")
forwarder() { # CACHE
    coredns ".:@dns@ {
        bind 127.0.0.1
        errors
        $1
        forward . 127.0.0.1:$upstream_port
    }" "${pinned[@]}"
}
kubeadm() { # CACHE
    coredns ".:@dns@ {
        bind 127.0.0.1
        errors
        health 127.0.0.1:@health@
        ready 127.0.0.1:@ready@
        prometheus 127.0.0.1:@metrics@
        $1
        forward . 127.0.0.1:$upstream_port
        loop
        reload
        loadbalance
    }" "${pinned[@]}"
}
start_echo() { # it has no file of configuration: a port is all it needs
    start '@dns@' "${pinned[@]}" bash -c 'exec "$0" 127.0.0.1 "$(cat "$1")"' "$work/echo" "$work/conf"
}
start_fastpath() { forwarder 'optcache {
            fastpath
        }'; }
start_fastpath-kubeadm() { kubeadm 'optcache {
            fastpath
        }'; }
start_optcache() { forwarder optcache; }
start_optcache-kubeadm() { kubeadm optcache; }
start_cache() { forwarder cache; }
start_cache-kubeadm() { kubeadm cache; }
start_unbound() { unbound_server 4096 "${pinned[@]}"; }
start_dnsdist() { dnsdist_server 2000 "${pinned[@]}"; }
start_recursor() { recursor_server "${pinned[@]}"; }

perf() { # DNSPERF-OPTIONS...
    taskset -c $client_core dnsperf -s 127.0.0.1 -p "${port[dns]}" -d "$work/queries" -q 100 -c 8 "$@"
}

# measure SERVER ROUND runs one round and records its figures.
measure() {
    local before after answered figures
    "start_$1" || return 1
    perf -n 20 >/dev/null # often enough for every name to find its tier
    before=$(cpu "$pid")
    perf -l "$seconds" >"$work/result"
    after=$(cpu "$pid")
    answered=$(result 'Queries completed' "$work/result")
    [[ -n $answered && $answered -gt 0 ]] || { cat "$work/result" >&2; die "dnsperf got no answers from $1"; }
    figures=$(awk -v a="$before" -v b="$after" -v hz="$(getconf CLK_TCK)" -v q="$answered" 'BEGIN {
        split(a, x); split(b, y); us = 1e6 / hz / q; u = y[1] - x[1]; s = y[2] - x[2]
        printf "%.3f %.3f %.3f", (u + s) * us, u * us, s * us
    }')
    figures+=" $(printf %.0f "$(result 'Queries per second' "$work/result")")"
    [[ $1 = *-kubeadm ]] || figures+=" $(at_rate "$1") $(lossless)"
    stop "$pid"
    # shellcheck disable=SC2086 # one field each
    record "$1" "$2" $figures
}

# at_rate SERVER prints the latencies at the fixed rate.
at_rate() {
    local options=(-sockets 100)
    [[ $1 != echo ]] || options+=(-empty)
    latencies "${port[dns]}" "$rate" "$tail_seconds" "${options[@]}"
}

# lossless prints the highest rate, in queries per second, at which nothing is lost in two seconds.
lossless() {
    local low=0 high=200000 best=0 try got
    while ((high - low > 5000)); do
        try=$(((low + high) / 2))
        perf -Q $try -q 5000 -t 1 -l 2 >"$work/result"
        got=$(printf %.0f "$(result 'Queries per second' "$work/result")")
        # What the client cannot send is no figure of the server's.
        if [[ $(result 'Queries lost' "$work/result") = 0 ]] && ((got > try * 95 / 100)); then
            low=$try best=$got
        else
            high=$try
        fi
    done
    echo "$best"
}

# shellcheck disable=SC2086 # one field each
record server round cpu_us user_us system_us queries_per_s $latency_columns lossless
there=()
for ((round = 1; round <= rounds; round++)); do
    for server in "${servers[@]}"; do
        [[ $(type -t "start_$server") = function ]] || die "no such server: $server"
        printf '\rround %d of %d: %-20s' "$round" "$rounds" "$server" >&2
        measure "$server" "$round" || continue
        ((round > 1)) || there+=("$server")
    done
done
printf '\r%-40s\r' '' >&2

# against SERVER OTHER is the ratio of their CPU times.
against() {
    awk -v a="$(column "$1" cpu_us | median)" -v b="$(column "$2" cpu_us | median)" 'BEGIN { if (a && b) printf "%.2f", a / b }'
}

printf '%d names, %d rounds of %d s, medians; CPU per query in microseconds\n\n' $names "$rounds" "$seconds"
format='%-18s %8s %8s %8s %10s %8s %8s\n'
row server CPU user system queries/s 'to echo' 'to cache'
for server in "${there[@]}"; do
    line=("$server")
    for name in cpu_us user_us system_us queries_per_s; do
        line+=("$(column "$server" $name | median)")
    done
    chain=cache
    [[ $server != *-kubeadm ]] || chain=cache-kubeadm
    row "${line[@]}" "$(against "$server" echo)" "$(against "$server" $chain)"
done
printf '\n%d queries/s for %d s from 100 sockets, medians; milliseconds; and the highest rate without loss\n\n' "$rate" "$tail_seconds"
format='%-18s %9s %9s %9s %9s %12s %10s\n'
row server p50 p99 p99.9 lost 'late, p99.9' queries/s
for server in "${there[@]}"; do
    [[ $server != *-kubeadm ]] || continue
    line=("$server")
    for name in p50 p99 p99.9 lost late_p99.9 lossless; do
        line+=("$(column "$server" $name | median)")
    done
    row "${line[@]}"
done
