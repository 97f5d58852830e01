#!/usr/bin/env bash
# CPU per cached query, optcache beside cache: the whole of CoreDNS, real sockets, real clients.
#
#     bench/end_to_end.sh [-d SECONDS] [-r ROUNDS] [-b BINARY] [-c CSV] [-- DNSPERF-OPTIONS...]
#
# The server is pinned to core 0, dnsperf to core 1. For each Corefile the two caches take turns,
# ROUNDS times (default 5), SECONDS each (default 5), each time with a fresh process that was
# asked for all names before. The CPU time is the server's own (/proc/PID/stat), divided by the
# queries that dnsperf got an answer to. Figures are medians. The ratio is taken in each round; its median
# is printed with the lowest and the highest. The file CSV gets every round. Everything is on loopback.
source "$(dirname "$0")/lib.sh"

seconds=5 rounds=5 binary=
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
dnsperf_options=("$@")
whole "$seconds" "$rounds"

cd "$(dirname "$0")/.."

need dnsperf dnsperf
[[ -r /proc/self/stat ]] || die "needs Linux: CPU times come from /proc"
two_cores
build

readonly names=1000 server_core=0 client_core=1

perf() { # DNSPERF-OPTIONS...
    taskset -c "$client_core" dnsperf -s 127.0.0.1 -p "${port[dns]}" -d "$work/queries" -q 100 -c 8 \
        ${dnsperf_options[@]+"${dnsperf_options[@]}"} "$@"
}

queries $names >"$work/queries"
upstream taskset -c $client_core # which is asked before a measurement only

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
asked() { metric "$upstream_metrics" 'coredns_dns_requests_total{'; }

# measure CHAIN CACHE ROUND runs one round and records its figures.
measure() {
    local chain=$1 cache=$2 block=$2 before user system user_end system_end answered lost
    # This is about the chain; bench/peers.sh has the fast path, too.
    [[ $cache != optcache ]] || block=$'optcache {\nfastpath off\n}'
    coredns ".:@dns@ {
        bind 127.0.0.1
        ${corefile[$chain]//CACHE/$block}
    }" taskset -c $server_core
    perf -n 20 >/dev/null # often enough for every name to find its tier

    before=$(asked)
    read -r user system < <(cpu "$pid")
    perf -l "$seconds" >"$work/result"
    read -r user_end system_end < <(cpu "$pid")
    upstream_queries=$((upstream_queries + $(asked) - before))
    stop "$pid"

    answered=$(result 'Queries completed' "$work/result")
    lost=$(result 'Queries lost' "$work/result")
    [[ -n $answered && $answered -gt 0 ]] || { cat "$work/result" >&2; die "dnsperf got no answers"; }
    ((lost == 0)) || printf 'lost: %s of %s queries (%s, %s)\n' "$lost" "$answered" "$chain" "$cache" >&2
    # shellcheck disable=SC2046 # one field each
    record "$chain" "$cache" "$3" $(
        awk -v u=$((user_end - user)) -v s=$((system_end - system)) -v hz="$ticks" -v q="$answered" '
            BEGIN { us = 1e6 / hz / q; printf "%.3f %.3f %.3f", (u + s) * us, u * us, s * us }
        '
        printf ' %.0f' "$(result 'Queries per second' "$work/result")"
    )
}

record chain plugin round cpu_us user_us system_us queries_per_s
for ((round = 1; round <= rounds; round++)); do
    for chain in forwarder kubeadm; do
        for cache in optcache cache; do
            printf '\rround %d of %d: %-10s %-9s' "$round" "$rounds" "$chain" "$cache" >&2
            measure "$chain" "$cache" "$round"
        done
    done
done
printf '\r%-40s\r' '' >&2

printf '%d names, %d rounds of %d s, medians; CPU per query in microseconds\n\n' "$names" "$rounds" "$seconds"
format='%-10s %-9s %8s %8s %8s %10s %26s\n'
row chain plugin CPU user system queries/s 'ratio (lowest to highest)'
for chain in forwarder kubeadm; do
    for cache in optcache cache; do
        line=("$chain" "$cache")
        for name in cpu_us user_us system_us queries_per_s; do
            line+=("$(column "$chain,$cache" "$name" | median)")
        done
        [[ $cache != optcache ]] || line+=("$(spread cpu_us "$chain,optcache" "$chain,cache")")
        row "${line[@]}"
    done
done
printf '\nqueries that went upstream during the measurements: %d\n' "$upstream_queries"
((upstream_queries == 0)) || die "not everything was answered from the cache: the figures are not of hits alone"
