#!/usr/bin/env bash
# How long the slowest queries take: optcache beside cache, with many answers cached.
#
#     bench/tail.sh [-d SECONDS] [-r ROUNDS] [-q RATE] [-n NAMES] [-b BINARY]
#
# Two CoreDNS, with Corefiles that differ in one word, are asked by dnsperf for NAMES names (default
# 1000000). Then they are asked again, in turns, ROUNDS times (default 3), SECONDS each (default 60),
# at a fixed RATE (default 30000 per second) by bench/tail, for names drawn by chance; whoever is not
# asked is stopped. The servers are pinned to core 0, the client to core 1. What is printed are
# medians of the rounds, in milliseconds. Everything is on loopback.
set -euo pipefail

usage() { sed -n '2,10s/^# \{0,1\}//p' "$0"; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

seconds=60 rounds=3 rate=30000 names=1000000 binary=
while getopts d:r:q:n:b:h option; do
    case $option in
        d) seconds=$OPTARG ;;
        r) rounds=$OPTARG ;;
        q) rate=$OPTARG ;;
        n) names=$OPTARG ;;
        b) binary=$(realpath -- "$OPTARG") ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
for n in "$seconds" "$rounds" "$rate" "$names"; do
    [[ $n =~ ^[1-9][0-9]*$ ]] || die "options take a whole number from 1"
done

cd "$(dirname "$0")/.."

command -v dnsperf >/dev/null || die "needs dnsperf: apt-get install dnsperf"
command -v taskset >/dev/null || die "needs taskset: apt-get install util-linux"
taskset -c 0,1 true 2>/dev/null || die "needs cores 0 and 1"
if [[ -z $binary ]]; then
    make --no-print-directory build >&2
    binary=$PWD/bin/coredns
fi

readonly server_core=0 client_core=1
work=$(mktemp -d)
pid='' upstream_pid=''
declare -A server_pid server_port
stop() { # PID
    [[ -n $1 ]] || return 0
    kill -KILL "$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true
}
cleanup() {
    stop "$pid"
    stop "$upstream_pid"
    stop "${server_pid[optcache]:-}"
    stop "${server_pid[cache]:-}"
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# start CORES COREFILE sets $pid and $port. The port, @PORT@ in the Corefile, is drawn by chance
# until it is free.
start() {
    local try deadline
    for try in {1..20}; do
        port=$((20000 + RANDOM % 12000))
        printf '%s\n' "${2//@PORT@/$port}" >"$work/Corefile"
        taskset -c "$1" "$binary" -conf "$work/Corefile" >"$work/log" 2>&1 &
        pid=$!
        deadline=$((SECONDS + 20))
        while kill -0 "$pid" 2>/dev/null && ((SECONDS < deadline)); do
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

median() { sort -g | awk '{ v[NR] = $1 } END { print (v[int((NR + 1) / 2)] + v[int(NR / 2) + 1]) / 2 }'; }

figure() { awk -F'\t' -v name="$2" '$1 == name { print $2 + 0 }' "$work/result-$1"-*; } # CACHE NAME

CGO_ENABLED=0 go build -buildvcs=false -o "$work/tail" ./bench/tail
awk -v n="$names" 'BEGIN { for (i = 0; i < n; i++) print "host-" i ".example.org A" }' >"$work/queries"

start "$server_core,$client_core" '.:@PORT@ {
    bind 127.0.0.1
    template IN A {
        answer "{{ .Name }} 3600 IN A 192.0.2.1"
    }
}'
upstream_pid=$pid upstream_port=$port

# With a tenth more than is asked for no shard is full, so that all of the names stay.
for cache in optcache cache; do
    start "$server_core" ".:@PORT@ {
    bind 127.0.0.1
    errors
    $cache {
        success $((names + names / 10))
    }
    forward . 127.0.0.1:$upstream_port
}"
    server_pid[$cache]=$pid server_port[$cache]=$port
    pid=
    printf '\rfilling: %-10s' "$cache" >&2
    # Once more for what got lost.
    for _ in 1 2; do
        dnsperf -s 127.0.0.1 -p "$port" -d "$work/queries" -n 1 -q 200 -c 4 >"$work/fill"
    done
    kill -STOP "${server_pid[$cache]}"
done
stop "$upstream_pid"
upstream_pid=

for ((round = 1; round <= rounds; round++)); do
    for cache in optcache cache; do
        printf '\rround %d of %d: %-9s' "$round" "$rounds" "$cache" >&2
        kill -CONT "${server_pid[$cache]}"
        sleep 1
        taskset -c "$client_core" "$work/tail" -server "127.0.0.1:${server_port[$cache]}" \
            -d "$work/queries" -rate "$rate" -time "${seconds}s" >"$work/result-$cache-$round"
        kill -STOP "${server_pid[$cache]}"
    done
done
printf '\r%-30s\r' '' >&2

printf '%d names, %d queries/s, %d rounds of %d s, medians; milliseconds\n\n' "$names" "$rate" "$rounds" "$seconds"
row='%-9s %9s %9s %9s %9s %9s %6s\n'
# shellcheck disable=SC2059 # the format is ours
printf "$row" plugin p50 p99 p99.9 max lost bad
for cache in optcache cache; do
    line=("$cache")
    for column in p50 p99 p99.9 max lost bad; do
        line+=("$(figure "$cache" "$column" | median)")
    done
    # shellcheck disable=SC2059
    printf "$row" "${line[@]}"
done
line=(ratio)
for column in p50 p99 p99.9 max; do
    line+=("$(awk -v a="$(figure optcache "$column" | median)" -v b="$(figure cache "$column" | median)" \
        'BEGIN { printf "%.2f", a / b }')")
done
# shellcheck disable=SC2059
printf "$row" "${line[@]}" '' ''
for cache in optcache cache; do
    printf 'p99.9 by rounds, %s: %s; sent late by: %s\n' "$cache" "$(figure "$cache" p99.9 | xargs)" \
        "$(awk -F'\t' '$1 == "p99.9" { print $3 }' "$work/result-$cache"-* | sed 's/[^0-9.]//g' | xargs)"
done
