#!/usr/bin/env bash
# What it costs to keep the answers over a restart.
#
#     bench/restart.sh [-n NAMES] [-q RATE] [-d SECONDS] [-r ROUNDS] [-p] [-b BINARY] [-c CSV]
#
# CoreDNS with cache_file_path, and with fastpath but for -p, is asked by dnsperf for NAMES names (default
# 1000000). Then bench/tail asks for names drawn by chance, ROUNDS times (default 3), SECONDS each (default 20), at
# a fixed RATE (default 10000 per second), in turns without and with snapshots being written, one after the
# other. Then the server is stopped, and started five times, and all names are asked for once more. Beside the times that
# it takes to write and to read the file stand those of zstd for the same bytes, with one thread and at the same
# level. Server and client share all cores; everything is on loopback. What is printed are medians; the file CSV gets
# every round.
source "$(dirname "$0")/lib.sh"

names=1000000 rate=10000 seconds=20 rounds=3 fastpath=fastpath binary=
readonly restarts=5
while getopts n:q:d:r:pb:c:h option; do
    case $option in
        n) names=$OPTARG ;;
        q) rate=$OPTARG ;;
        d) seconds=$OPTARG ;;
        r) rounds=$OPTARG ;;
        p) fastpath="fastpath off" ;;
        b) binary=$(realpath -- "$OPTARG") ;;
        c) keep "$OPTARG" ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
whole "$names" "$rate" "$seconds" "$rounds"

cd "$(dirname "$0")/.."
need dnsperf dnsperf
need zstd zstd
build
build_tail
queries "$names" >"$work/queries"
upstream

readonly file=$work/answers
reloads=0
corefile() { # INTERVAL
    # With a tenth more than is asked for no shard is full, so that all of the names stay.
    printf '.:@dns@ {
    bind 127.0.0.1
    errors
    prometheus 127.0.0.1:@metrics@
    optcache {
        success %d
        cache_file_path %s %s
        %s
    }
    forward . 127.0.0.1:%d
}' "$((names + names / 10))" "$file" "$1" "$fastpath" "$upstream_port"
}
interval() { # INTERVAL has the server go on with that one, and returns when it has written the file.
    local text
    text=$(corefile "$1")
    text=${text//@dns@/$dns} text=${text//@metrics@/$metrics}
    printf '%s\n' "$text" >"$work/conf"
    reloads=$((reloads + 1))
    kill -USR1 "$pid"
    until (($(grep -c 'Reloading complete' "$work/log") == reloads)); do sleep 0.1; done
    until (($(metric "$metrics" coredns_optcache_snapshot_entries) > 0)); do
        # Series come with the first query.
        dnsperf -s 127.0.0.1 -p "$dns" -d "$work/queries" -l 1 -Q 100 >"$work/fill"
    done
}
fill() { dnsperf -s 127.0.0.1 -p "$dns" -d "$work/queries" -n 1 -q 200 -c 4 >"$work/fill"; }
seconds_of() { # COMMAND... prints how long it takes.
    local TIMEFORMAT=%R
    { time "$@" >/dev/null 2>&1; } 2>&1
}

coredns "$(corefile 0)"
dns=${port[dns]} metrics=${port[metrics]}
for _ in 1 2; do # once more for what got lost
    printf '\rfilling' >&2
    fill
done

# shellcheck disable=SC2086 # one field each
record writing round $latency_columns duration
for ((round = 1; round <= rounds; round++)); do
    for writing in no yes; do
        printf '\rround %d of %d, writing: %-4s' "$round" "$rounds" "$writing" >&2
        if [[ $writing = yes ]]; then interval 1s; else interval 0; fi
        sleep 1
        figures=$(latencies "$dns" "$rate" "$seconds")
        # shellcheck disable=SC2086 # one field each
        record $writing "$round" $figures "$(exact "$metrics" coredns_optcache_snapshot_duration_seconds)"
    done
done
interval 0 # and nobody asks
duration=$(exact "$metrics" coredns_optcache_snapshot_duration_seconds)
entries=$(metric "$metrics" coredns_optcache_snapshot_entries)
printf '\r%-40s\r' '' >&2

kill -TERM "$pid"
wait "$pid" || true
unset "running[$pid]"
zstd -dcq "$file" >"$work/raw"
pack=$(seconds_of zstd -1 -T1 -c "$work/raw") unpack=$(seconds_of zstd -dc "$file")

start() { # CONF starts the server and asks it: milliseconds from the process to the answer, and from listening to it.
    local started listening answered first=
    started=$EPOCHREALTIME
    "$binary" -conf "$1" >"$work/log" 2>&1 &
    pid=$!
    running[$pid]=
    until grep -q ^CoreDNS- "$work/log"; do sleep 0.001; done
    listening=$EPOCHREALTIME
    # A query for first.example.net with the ID "ab", as the reply has it.
    exec 3<>"/dev/udp/127.0.0.1/$dns"
    printf 'ab\x01\0\0\x01\0\0\0\0\0\0\x05first\x07example\x03net\0\0\x01\0\x01' >&3
    read -r -N 1 -t 2 -u 3 first || true
    answered=$EPOCHREALTIME
    exec 3<&- 3>&-
    [[ $first = a ]] || die "no answer after the start"
    from_process=$(awk -v s="$started" -v b="$answered" 'BEGIN { print 1000 * (b - s) }')
    from_listening=$(awk -v s="$listening" -v b="$answered" 'BEGIN { print 1000 * (b - s) }')
}
# The same with *cache*, which keeps nothing.
sed "s/^    optcache {/    cache {/; /cache_file_path/d; s/^        $fastpath$//" "$work/conf" >"$work/stock"
for ((round = 1; round <= restarts; round++)); do
    start "$work/stock"
    echo "$from_process $from_listening" >>"$work/starts"
    stop "$pid"
    start "$work/conf"
    until grep -q 'Has read' "$work/log"; do sleep 0.1; done
    [[ $(<"$work/log") =~ Has\ read\ ([0-9]+)\ answers\ from\ [^\ ]+\ in\ ([0-9.]+)(m?s) ]] || die "$(grep 'Has read' "$work/log")"
    awk -v n="${BASH_REMATCH[1]}" -v t="${BASH_REMATCH[2]}" -v unit="${BASH_REMATCH[3]}" -v a="$from_listening" -v b="$from_process" \
        'BEGIN { print n, unit == "ms" ? t / 1000 : t, a, b }' >>"$work/restarts"
    ((round == restarts)) || stop "$pid"
done
restarted() { cut -d ' ' -f "$1" "$work/restarts" | median; } # FIELD
before=$(metric "$upstream_metrics" coredns_dns_requests_total)
fill
again=$(($(metric "$upstream_metrics" coredns_dns_requests_total) - before))

printf '%d names, %d queries/s, %d rounds of %d s, medians; milliseconds\n\n' "$names" "$rate" "$rounds" "$seconds"
format='%-9s %9s %9s %9s %6s\n'
row writing p50 p99 p99.9 lost
for writing in no yes; do
    line=("$writing")
    for name in p50 p99 p99.9 lost; do
        line+=("$(column "$writing" "$name" | median)")
    done
    row "${line[@]}"
done
printf '\nsnapshot: %d answers, %d bytes of %d\n' "$entries" "$(stat -c %s "$file")" "$(stat -c %s "$work/raw")"
printf 'written in %s s, %s s with queries; zstd packs the same bytes in %s s\n' "$duration" "$(column yes duration | median)" "$pack"
printf 'read in %s s, %d answers; zstd unpacks the same bytes in %s s\n' "$(restarted 2)" "$(restarted 1)" "$unpack"
printf 'first answer %.0f ms after the start of the process, %.1f ms after the server listens (medians of %d starts)\n' \
    "$(restarted 4)" "$(restarted 3)" "$restarts"
printf 'cache, without a snapshot, in turns with it: %.0f ms, and %.1f ms\n' \
    "$(cut -d ' ' -f 1 "$work/starts" | median)" "$(cut -d ' ' -f 2 "$work/starts" | median)"
printf 'asked for again, of %d names, %d went upstream\n' "$names" "$again"
