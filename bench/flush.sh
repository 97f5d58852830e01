#!/usr/bin/env bash
# A flush of a subtree, optcache beside unbound: how long it takes, and what hits take meanwhile.
#
#     bench/flush.sh [-n NAMES] [-q RATE] [-r ROUNDS] [-b BINARY] [-c CSV] [SERVER...]
#
# Each server (optcache and unbound, unless some are named) is asked by dnsperf for NAMES different names below
# example.org (default 1000000), a thousand in each zone, and for a thousand of another domain. It forwards to a
# CoreDNS that knows every name, with a TTL of an hour. Then zone-0.example.org is flushed, and example.org with the
# rest: by `optcachectl flush --subtree`, and by `unbound-control flush_zone`. The time is that of the whole command.
# Meanwhile bench/tail asks for the thousand other names, RATE times a second (default 5000), for three seconds; and
# before that for three seconds without a flush. ROUNDS (default 3) are taken in turns, each with a fresh process.
# Figures are medians. A SERVER that is not installed is skipped. The file CSV gets every round. Everything is on loopback.
source "$(dirname "$0")/lib.sh"

names=1000000 rate=5000 rounds=3 binary=
while getopts n:q:r:b:c:h option; do
    case $option in
        n) names=$OPTARG ;;
        q) rate=$OPTARG ;;
        r) rounds=$OPTARG ;;
        b) binary=$(realpath -- "$OPTARG") ;;
        c) keep "$OPTARG" ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
whole "$names" "$rate" "$rounds"
servers=("$@")
((${#servers[@]})) || servers=(optcache unbound)

cd "$(dirname "$0")/.."

need dnsperf dnsperf
build
tool=$(dirname "$binary")/optcachectl
[[ -x $tool ]] || die "needs $tool: make build"
build_tail
upstream # it stays for all servers

awk -v n="$names" 'BEGIN { for (i = 0; i < n; i++) print "host-" i ".zone-" int(i / 1000) ".example.org A" }' >"$work/fill"
awk 'BEGIN { for (i = 0; i < 1000; i++) print "kept-" i ".example.net A" }' >"$work/queries"

# For each server a function that starts it, and one that flushes a subtree and prints how many answers went.
start_optcache() {
    coredns ".:@dns@ {
        bind 127.0.0.1
        errors
        optcache {
            success $((names + names / 4 + 1000))
            control unix://$work/optcache.sock
        }
        forward . 127.0.0.1:$upstream_port
    }"
}
flush_optcache() { "$tool" -s "unix://$work/optcache.sock" flush "$1" --subtree -o json | tr -dc 0-9; }

start_unbound() { unbound_server $((names + names / 4 + 1000)); }
flush_unbound() { unbound-control -c "$work/conf" flush_zone "$1" | sed -n 's/.* \([0-9]*\) messages.*/\1/p'; }

measure() { # SERVER SUBTREE
    local calm busy begun ended removed
    read -ra calm <<<"$(latencies "${port[dns]}" "$rate" 3)"
    latencies "${port[dns]}" "$rate" 3 >"$work/busy" &
    local asking=$!
    sleep 1
    begun=$EPOCHREALTIME
    removed=$("flush_$1" "$2")
    ended=$EPOCHREALTIME
    wait "$asking"
    read -ra busy <"$work/busy"
    [[ $removed =~ ^[1-9][0-9]*$ ]] || die "$1 has flushed nothing of $2"
    record "$1 $2" "$removed" "$(awk -v a="$begun" -v b="$ended" 'BEGIN { print b - a }')" "${busy[1]}" "${calm[1]}" "${busy[3]}" "${busy[4]}"
}

record server removed seconds p99_ms p99_without_ms max_ms lost
for ((round = 1; round <= rounds; round++)); do
    for server in "${servers[@]}"; do
        "start_$server" || continue
        for file in fill queries; do
            dnsperf -s 127.0.0.1 -p "${port[dns]}" -d "$work/$file" -n 1 -q 200 -c 4 >/dev/null 2>&1
        done
        for subtree in zone-0.example.org example.org; do
            measure "$server" "$subtree"
        done
        stop "$pid"
    done
done

format='%-10s %-20s %10s %10s %10s %16s %10s %10s\n'
row server subtree removed seconds p99_ms p99_without_ms max_ms lost
for server in "${servers[@]}"; do
    for subtree in zone-0.example.org example.org; do
        fields=()
        for name in removed seconds p99_ms p99_without_ms max_ms lost; do
            fields+=("$(column "$server $subtree" "$name" | median)")
        done
        [[ -z ${fields[0]} ]] || row "$server" "$subtree" "${fields[@]}"
    done
done
