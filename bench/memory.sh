#!/usr/bin/env bash
# Memory for each cached answer: optcache, cache, dnsdist and unbound, one after the other.
#
#     bench/memory.sh [-n NAMES] [-s SECONDS] [-b BINARY] [-c CSV] [SERVER...]
#
# Each server is asked by dnsperf for NAMES different names (default 1000000), once. It forwards to
# a CoreDNS that knows every name, with a TTL of an hour. What is counted is the resident memory
# of the server's process (VmRSS), SECONDS (default 10) after the last answer, less what it was
# before the first query, divided by the entries that the server says it holds. Nothing is forced:
# no garbage collection, no trimming. A SERVER that is not installed is skipped. The file CSV
# gets the results, too. Everything is on loopback.
source "$(dirname "$0")/lib.sh"

names=1000000 settle=10 binary=
while getopts n:s:b:c:h option; do
    case $option in
        n) names=$OPTARG ;;
        s) settle=$OPTARG ;;
        b) binary=$(realpath -- "$OPTARG") ;;
        c) keep "$OPTARG" ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[[ $names =~ ^[1-9][0-9]*$ && $settle =~ ^[0-9]+$ ]] || die "-n and -s take a whole number"
servers=("$@")
((${#servers[@]})) || servers=(optcache cache dnsdist unbound)

cd "$(dirname "$0")/.."

need dnsperf dnsperf
[[ -r /proc/self/status ]] || die "needs Linux: resident memory comes from /proc"
build

resident() { awk '/^VmRSS:/ { print $2 * 1024 }' "/proc/$1/status"; } # PID

queries "$names" >"$work/queries"
# shellcheck disable=SC2119 # the arguments are others
upstream

# forwarder CACHE starts CoreDNS with a cache.
forwarder() {
    coredns ".:@dns@ {
        bind 127.0.0.1
        errors
        prometheus 127.0.0.1:@metrics@
        $1
        forward . 127.0.0.1:$upstream_port
    }"
}

# For each server a function that starts it, and fails when it is not there, and one that says
# how many entries it holds. The caches of dnsdist and unbound have some room to spare: neither
# reserves what it does not use, but for dnsdist's table.
start_optcache() {
    forwarder "optcache {
            success $names
        }"
}
held_optcache() { metric "${port[metrics]}" coredns_optcache_entries; }

start_cache() {
    forwarder "cache {
            success $names
        }"
}
held_cache() { metric "${port[metrics]}" coredns_cache_entries; }

start_dnsdist() { dnsdist_server $((names + names / 5)); }
held_dnsdist() { metric "${port[metrics]}" dnsdist_pool_cache_entries; }

start_unbound() { unbound_server "$names"; }
held_unbound() {
    unbound-control -c "$work/conf" stats_noreset | awk -F= '$1 == "msg.cache.count" { print $2 }'
}

format='%-10s %10s %12s %12s %12s\n'
record server entries before_mib after_mib bytes_each
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
    lost=$(result 'Queries lost' "$work/result")
    ((lost == 0)) || printf 'lost: %d of %d queries (%s)\n' "$lost" "$names" "$server" >&2
    ((held > 0)) || die "$server holds nothing"
    read -ra line < <(awk -v b="$before" -v a="$after" -v n="$held" \
        'BEGIN { printf "%.1f %.1f %.0f\n", b / 1048576, a / 1048576, (a - b) / n }')
    (($(wc -l <"$results") > 1)) || row server entries 'before, MiB' 'after, MiB' 'bytes each'
    row "$server" "$held" "${line[@]}"
    record "$server" "$held" "${line[@]}"
done
