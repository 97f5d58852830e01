#!/usr/bin/env bash
# Where the time of the fast path goes.
#
#     bench/split.sh [-d SECONDS]
#
# CoreDNS with fastpath is pinned to core 0 and asked by dnsperf on core 1 for 1000 names that it has, for SECONDS
# (default 10), while perf takes samples of the process's threads. What is printed is the part of the samples, in per cent,
# by what the thread was doing: the first line whose function is on the sample's stack counts. Everything is on
# loopback, so that sending has the receiver's work in it.
source "$(dirname "$0")/lib.sh"

seconds=10
while getopts d:h option; do
    case $option in
        d) seconds=$OPTARG ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
whole "$seconds"

cd "$(dirname "$0")/.."
need dnsperf dnsperf
need perf linux-perf
two_cores
binary=$work/coredns # with its symbols
CGO_ENABLED=0 go build -buildvcs=false -o "$binary" ./cmd/coredns
queries 1000 >"$work/queries"
upstream taskset -c 1
coredns ".:@dns@ {
    bind 127.0.0.1
    errors
    optcache {
        fastpath
    }
    forward . 127.0.0.1:$upstream_port
}" taskset -c 0
ask() { taskset -c 1 dnsperf -s 127.0.0.1 -p "${port[dns]}" -d "$work/queries" -q 100 -c 8 "$@" >"$work/result"; }
ask -n 20
ask -l $((seconds + 2)) &
sleep 1
perf record -q -F 2999 -g -p "$pid" -o "$work/perf" -- sleep "$seconds"
wait $!

perf script -i "$work/perf" -F ip,sym 2>"$work/err" | awk -v queries="$(result 'Queries per second' "$work/result")" '
    BEGIN {
        n = split("kernel, sendmmsg:sys_sendmmsg|kernel, recvmmsg:sys_recvmmsg|kernel, poll:sys_epoll|sys_ppoll|sys_poll" \
            "|kernel, other calls:do_syscall_64|kernel, interrupts:asm_sysvec|asm_common_interrupt" \
            "|parse, hash and touch:\\(\\*fastQuery\\)\\.prepare|look up:\\(\\*store\\)\\.find|make the reply:\\(\\*fastQuery\\)\\.answer" \
            "|batch:udp\\.\\(|count:\\(\\*worker\\)\\.account|rest of the worker:\\(\\*worker\\)|Go runtime:runtime\\.", part, "|")
        # An alternative without a name of its own belongs to the last one.
        for (i = 1; i <= n; i++) {
            if (split(part[i], p, ":") == 2) name[++m] = p[1]
            pattern[m] = pattern[m] (pattern[m] ? "|" : "") (p[2] ? p[2] : p[1])
            p[2] = ""
        }
        name[++m] = "other"; pattern[m] = "."
    }
    function flush(  i) {
        if (stack == "") return
        for (i = 1; stack !~ pattern[i]; i++);
        count[i]++; all++; stack = ""
    }
    /^[ \t]*$/ { flush(); next }
    { stack = stack " " $0 }
    END {
        flush()
        printf "%d samples, %.0f queries/s\n\n", all, queries
        for (i = 1; i <= m; i++) if (count[i]) printf "%-24s %5.1f\n", name[i], 100 * count[i] / all
    }'
