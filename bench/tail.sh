#!/usr/bin/env bash
# How long the slowest queries take: optcache beside cache, with many answers cached.
#
#     bench/tail.sh [-d SECONDS] [-r ROUNDS] [-q RATE] [-n NAMES] [-b BINARY] [-c CSV]
#
# Two CoreDNS, with Corefiles that differ in one word, are asked by dnsperf for NAMES names (default
# 1000000). Then they are asked again, in turns, ROUNDS times (default 3), SECONDS each (default 60),
# at a fixed RATE (default 30000 per second) by bench/tail, for names drawn by chance; whoever is not
# asked is stopped. The servers are pinned to core 0, the client to core 1. What is printed are
# medians of the rounds, in milliseconds; the file CSV gets every round. Everything is on loopback.
source "$(dirname "$0")/lib.sh"

seconds=60 rounds=3 rate=30000 names=1000000 binary=
while getopts d:r:q:n:b:c:h option; do
    case $option in
        d) seconds=$OPTARG ;;
        r) rounds=$OPTARG ;;
        q) rate=$OPTARG ;;
        n) names=$OPTARG ;;
        b) binary=$(realpath -- "$OPTARG") ;;
        c) keep "$OPTARG" ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
whole "$seconds" "$rounds" "$rate" "$names"

cd "$(dirname "$0")/.."

need dnsperf dnsperf
two_cores
build

readonly server_core=0 client_core=1
declare -A server_pid server_port

client=(taskset -c $client_core)
build_tail
queries "$names" >"$work/queries"
upstream taskset -c $server_core,$client_core

# With a tenth more than is asked for no shard is full, so that all of the names stay.
for cache in optcache cache; do
    coredns ".:@dns@ {
    bind 127.0.0.1
    errors
    $cache {
        success $((names + names / 10))
        $([[ $cache != optcache ]] || echo fastpath off)
    }
    forward . 127.0.0.1:$upstream_port
}" taskset -c $server_core
    server_pid[$cache]=$pid server_port[$cache]=${port[dns]}
    printf '\rfilling: %-10s' "$cache" >&2
    # Once more for what got lost.
    for _ in 1 2; do
        dnsperf -s 127.0.0.1 -p "${port[dns]}" -d "$work/queries" -n 1 -q 200 -c 4 >"$work/fill"
    done
    kill -STOP "$pid"
done
stop "$upstream_pid"

# shellcheck disable=SC2086 # one field each
record plugin round $latency_columns
for ((round = 1; round <= rounds; round++)); do
    for cache in optcache cache; do
        printf '\rround %d of %d: %-9s' "$round" "$rounds" "$cache" >&2
        kill -CONT "${server_pid[$cache]}"
        sleep 1
        figures=$(latencies "${server_port[$cache]}" "$rate" "$seconds")
        kill -STOP "${server_pid[$cache]}"
        # shellcheck disable=SC2086 # one field each
        record "$cache" "$round" $figures
    done
done
printf '\r%-30s\r' '' >&2

printf '%d names, %d queries/s, %d rounds of %d s, medians; milliseconds\n\n' "$names" "$rate" "$rounds" "$seconds"
format='%-9s %9s %9s %9s %9s %9s %6s\n'
row plugin p50 p99 p99.9 max lost bad
for cache in optcache cache; do
    line=("$cache")
    for name in p50 p99 p99.9 max lost bad; do
        line+=("$(column "$cache" "$name" | median)")
    done
    row "${line[@]}"
done
printf '\nratios by rounds: median (lowest to highest)\n'
for name in p50 p99 p99.9 max; do
    printf '%-9s %s\n' "$name" "$(spread "$name" optcache cache)"
done
printf '\n'
for cache in optcache cache; do
    printf 'p99.9 by rounds, %s: %s; sent late by: %s\n' "$cache" \
        "$(column "$cache" p99.9 | xargs)" "$(column "$cache" late_p99.9 | xargs)"
done
