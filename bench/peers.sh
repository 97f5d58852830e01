#!/usr/bin/env bash
# CPU per cached query, and latency at a rate: optcache with its fast path and without, cache, other servers, and a program that
# only echoes, which is the kernel's part of it.
#
#     bench/peers.sh [-m udp|tcp|dot|pair] [-d SECONDS] [-r ROUNDS] [-q RATE|half] [-t SECONDS] [-b BINARY] [-c CSV] [SERVER...]
#
# Each server is pinned to core 0, dnsperf to core 1. They take turns, ROUNDS times (default 5), SECONDS each
# (-d, default 5), each time in a fresh process that was asked for all of 1000 names before. The CPU
# time is the process's own (/proc/PID/stat), divided by the queries that dnsperf got an answer to.
#
# With -m tcp and -m dot, that is taken with 10 connections and queries 10 deep (pipelined), and with 200 connections that ask
# one at a time (single). With -m tcp, it is also taken behind a CoreDNS whose forward has force_tcp, on core 1 (forward).
# echo-c (tcp only) and echo-go send back what a read has brought. SDNS=PATH names the program of sdns, which is skipped without
# it. The servers named -kubeadm have that Corefile, and those named -rules have log with class error and acl in front.
#
# With -m pair, a SERVER (default: fastpath cache) is two processes on core 0, as in a cluster: one with NodeLocal DNSCache's
# Corefile, asked over UDP, which forwards by TCP to one with kubeadm's Corefile. There are 5000 names, and the first process has
# room for 1024, so most queries miss there and hit in the second. The CPU time is that of both, for each query that the second has
# got. Nothing else is taken then.
#
# Then the highest rate is searched at which nothing is lost in two seconds; and each server, but -kubeadm and -rules, gets
# queries at a RATE (default: 65000 per second with udp; half is half of that highest rate, the default with tcp and dot) from
# 100 sockets or connections for SECONDS (-t, default 30), and each query's latency is taken (bench/tail).
#
# Figures are medians. A ratio is taken in each round, of servers that were measured minutes apart; its median is printed with
# the lowest and the highest. The file CSV gets every round. A SERVER that is not installed is skipped. Everything is on loopback.
source "$(dirname "$0")/lib.sh"

mode=udp seconds=5 rounds=5 rate= tail_seconds=30 binary=
while getopts m:d:r:q:t:b:c:h option; do
    case $option in
        m) mode=$OPTARG ;;
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
whole "$seconds" "$rounds" "$tail_seconds"
[[ $mode =~ ^(udp|tcp|dot|pair)$ ]] || die "-m takes udp, tcp, dot or pair"
[[ $rate ]] || rate=$([[ $mode = udp ]] && echo 65000 || echo half)
[[ $rate = half ]] || whole "$rate"
servers=("$@")
[[ $mode != pair ]] || ((${#servers[@]})) || servers=(fastpath cache)
[[ $mode = udp ]] || ((${#servers[@]})) || servers=(echo-c echo-go fastpath optcache cache unbound sdns)
((${#servers[@]})) || servers=(echo fastpath fastpath-kubeadm fastpath-rules optcache optcache-kubeadm cache cache-kubeadm cache-rules
    unbound dnsdist recursor)

cd "$(dirname "$0")/.."

need dnsperf dnsperf
need cc gcc
two_cores
build

readonly names=1000 server_core=0 client_core=1
cc -O2 -o "$work/echo" bench/echo/echo.c
cc -O2 -o "$work/echo-c" bench/echo/tcp.c
CGO_ENABLED=0 go build -buildvcs=false -o "$work/echo-go" ./bench/echo/stream
secure= # a second block, for -m dot
if [[ $mode = dot ]]; then
    need openssl openssl
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout "$work/key" -out "$work/cert" -days 2 \
        -subj /CN=localhost 2>/dev/null
    secure=1
fi
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
    }${secure:+
    tls://.:@tls@ {
        bind 127.0.0.1
        tls $work/cert $work/key
        errors
        $1
        forward . 127.0.0.1:$upstream_port
    \}}" "${pinned[@]}"
}
rules() { # CACHE
    forwarder "log . {
            class error
        }
        acl {
            block net 192.0.2.0/24 2001:db8::/32
            allow net 127.0.0.0/8 10.0.0.0/8
            block
        }
        $1"
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
start_echo-c() {
    [[ $mode = tcp ]] || return 1
    start '@dns@' "${pinned[@]}" bash -c 'exec "$0" 127.0.0.1 "$(cat "$1")"' "$work/echo-c" "$work/conf"
}
start_echo-go() {
    start "@dns@${secure:+ @tls@ $work/cert $work/key}" \
        "${pinned[@]}" bash -c 'exec "$0" 127.0.0.1 $(cat "$1")' "$work/echo-go" "$work/conf"
}
start_sdns() {
    [[ -n ${SDNS:-} ]] || { echo 'no SDNS=PATH, skipped: sdns' >&2; return 1; }
    start "version = \"1.6.0\"
directory = \"$work/sdns\"
bind = \"127.0.0.1:@dns@\"
${secure:+bindtls = \"127.0.0.1:@tls@\"
tlscertificate = \"$work/cert\"
tlsprivatekey = \"$work/key\"}
forwarderservers = [\"127.0.0.1:$upstream_port\"]
dnssec = \"off\"
cachesize = 256000" "${pinned[@]}" "$SDNS" -config "$work/conf"
}
start_fastpath() { forwarder 'optcache {
            fastpath
        }'; }
start_fastpath-rules() { rules optcache; }
start_cache-rules() { rules cache; }
start_fastpath-kubeadm() { kubeadm optcache; } # by itself
start_optcache() { forwarder 'optcache {
            fastpath off
        }'; }
start_optcache-kubeadm() { kubeadm 'optcache {
            fastpath off
        }'; }
start_cache() { forwarder cache; }
start_cache-kubeadm() { kubeadm cache; }
start_unbound() { unbound_server 4096 "${pinned[@]}"; }
start_dnsdist() { dnsdist_server 2000 "${pinned[@]}"; }
start_recursor() { recursor_server "${pinned[@]}"; }

at=dns # the port that is asked
[[ $mode != dot ]] || at=tls
perf() { # DNSPERF-OPTIONS...
    taskset -c $client_core dnsperf -m "$mode" -s 127.0.0.1 -p "${port[$at]}" -d "$work/queries" "$@"
}

# spend PERF-COMMAND... runs dnsperf for a while, and prints the CPU time of the server for each query in microseconds, in all, in
# user mode, and in the system. What dnsperf says is in $work/result.
spend() {
    local before after answered
    before=$(cpu "$pid")
    "$@" -l "$seconds" >"$work/result"
    after=$(cpu "$pid")
    answered=$(result 'Queries completed' "$work/result")
    [[ -n $answered && $answered -gt 0 ]] || { cat "$work/result" >&2; die "dnsperf got no answers from $server"; }
    awk -v a="$before" -v b="$after" -v hz="$(getconf CLK_TCK)" -v q="$answered" 'BEGIN {
        split(a, x); split(b, y); us = 1e6 / hz / q; u = y[1] - x[1]; s = y[2] - x[2]
        printf "%.3f %.3f %.3f\n", (u + s) * us, u * us, s * us
    }'
}

# measure SERVER ROUND runs one round and records its figures.
measure() {
    local figures
    "start_$1" || return 1
    perf -q 100 -c 8 -n 20 >/dev/null # often enough for every name to find its tier
    figures=$(spend perf -q 100 -c 8)
    figures+=" $(printf %.0f "$(result 'Queries per second' "$work/result")")"
    [[ $1 = *-kubeadm || $1 = *-rules ]] || figures+=" $(at_rate "$1")"
    stop "$pid"
    # shellcheck disable=SC2086 # one field each
    record "$1" "$2" $figures
}

# at_rate SERVER prints the highest rate without loss, the rate that was taken, and the latencies at it.
at_rate() {
    local options=(-sockets 100 -net "$mode") best rate=$rate
    [[ $1 != echo* ]] || options+=(-empty)
    best=$(lossless)
    [[ $rate != half ]] || rate=$((best > 2000 ? best / 2 : 1000))
    echo "$best $rate $(latencies "${port[$at]}" "$rate" "$tail_seconds" "${options[@]}")"
}

# lossless prints the highest rate, in queries per second, at which nothing is lost in two seconds.
lossless() {
    local low=0 high=200000 best=0 try got clients=8
    [[ $mode = udp ]] || clients=100
    while ((high - low > 5000)); do
        try=$(((low + high) / 2))
        perf -c $clients -Q $try -q 5000 -t 1 -l 2 >"$work/result" 2>"$work/err" # warnings of late replies
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

# behind_forward prints what spend does with a CoreDNS in front that forwards by TCP.
behind_forward() {
    local pid=$pid back=$pid
    local -A port=([dns]="${port[dns]}")
    coredns ".:@dns@ {
        bind 127.0.0.1
        forward . 127.0.0.1:${port[dns]} {
            force_tcp
        }
    }" taskset -c $client_core
    local front=$pid asked=${port[dns]}
    pid=$back
    plain() { taskset -c $client_core dnsperf -s 127.0.0.1 -p "$asked" -d "$work/queries" -q 100 -c 8 "$@"; }
    plain -n 2 >/dev/null
    spend plain
    stop "$front"
}

# connections SERVER ROUND is measure for -m tcp and -m dot.
connections() {
    local figures=() load
    "start_$1" || return 1
    for load in '-c 10 -q 100' '-c 200 -q 200'; do
        # shellcheck disable=SC2086 # several words
        perf $load -n 20 >/dev/null
        # shellcheck disable=SC2086
        read -ra spent < <(spend perf $load)
        figures+=("${spent[0]}")
    done
    if [[ $mode = tcp ]]; then
        read -ra spent < <(behind_forward)
        figures+=("${spent[0]}")
    else
        figures+=('')
    fi
    read -ra spent < <(at_rate "$1")
    stop "$pid"
    record "$1" "$2" "${figures[@]}" "${spent[@]}"
}

# latency_table prints the latencies of the servers that are there.
latency_table() {
    printf '\nThe highest rate without loss; milliseconds at %s, for %d s over 100 sockets or connections; medians\n\n' \
        "$([[ $rate = half ]] && echo 'half of it' || echo "$rate queries/s")" "$tail_seconds"
    format='%-18s %10s %10s %9s %9s %9s %9s %12s\n'
    row server lossless rate p50 p99 p99.9 lost 'late, p99.9'
    local server line name
    for server in "${there[@]}"; do
        [[ $server != *-kubeadm && $server != *-rules ]] || continue
        line=("$server")
        for name in lossless rate p50 p99 p99.9 lost late_p99.9; do
            line+=("$(column "$server" $name | median)")
        done
        row "${line[@]}"
    done
}

# pair SERVER ROUND is measure for -m pair.
pair() {
    local cache options='' before after asked back front ask=()
    case $1 in
        fastpath) cache=optcache ;;
        optcache) cache=optcache options='fastpath off' ;;
        cache) cache=cache ;;
        *) die "-m pair takes fastpath, optcache and cache" ;;
    esac
    kubeadm "$cache {
            success 50000
            $options
        }"
    back=$pid
    local back_port=${port[dns]} back_metrics=${port[metrics]}
    coredns ".:@dns@ {
        bind 127.0.0.1
        errors
        prometheus 127.0.0.1:@metrics@
        $cache {
            success 1024
            denial 1024
            $options
        }
        forward . 127.0.0.1:$back_port {
            force_tcp
        }
        loop
        reload
    }" "${pinned[@]}"
    front=$pid
    ask=(taskset -c $client_core dnsperf -s 127.0.0.1 -p "${port[dns]}" -d "$work/many" -q 100 -c 8)
    taskset -c $client_core dnsperf -s 127.0.0.1 -p "$back_port" -d "$work/many" -q 100 -c 8 -n 3 >/dev/null
    "${ask[@]}" -n 1 >/dev/null
    asked=$(metric "$back_metrics" 'coredns_dns_requests_total{')
    before="$(cpu "$front") $(cpu "$back")"
    "${ask[@]}" -l "$seconds" >"$work/result"
    after="$(cpu "$front") $(cpu "$back")"
    asked=$(($(metric "$back_metrics" 'coredns_dns_requests_total{') - asked))
    stop "$front"
    stop "$back"
    # shellcheck disable=SC2046 # one field each
    record "$1" "$2" $(
        awk -v a="$before" -v b="$after" -v hz="$(getconf CLK_TCK)" -v q="$asked" -v all="$(result 'Queries completed' "$work/result")" 'BEGIN {
            split(a, x); split(b, y); us = 1e6 / hz / q; front = y[1] + y[2] - x[1] - x[2]; back = y[3] + y[4] - x[3] - x[4]
            printf "%.3f %.3f %.3f %.1f\n", (front + back) * us, front * us, back * us, 100 * q / all
        }'
    )
}

if [[ $mode = pair ]]; then
    queries 5000 >"$work/many"
    record server round cpu_us front_us back_us missed
    for ((round = 1; round <= rounds; round++)); do
        for server in "${servers[@]}"; do
            printf '\rround %d of %d: %-20s' "$round" "$rounds" "$server" >&2
            pair "$server" "$round"
        done
    done
    printf '\r%-40s\r' '' >&2
    printf 'NodeLocal and cluster DNS, %d rounds of %d s; CPU in microseconds per query that cluster DNS gets; medians\n\n' "$rounds" "$seconds"
    format='%-10s %8s %10s %12s %10s %21s\n'
    row server both NodeLocal 'cluster DNS' 'missed, %' 'to cache'
    for server in "${servers[@]}"; do
        line=("$server")
        for name in cpu_us front_us back_us missed; do
            line+=("$(column "$server" $name | median)")
        done
        row "${line[@]}" "$(spread cpu_us "$server" cache)"
    done
    exit
fi

if [[ $mode != udp ]]; then
    # shellcheck disable=SC2086 # one field each
    record server round pipelined single forward lossless rate $latency_columns
    there=()
    for ((round = 1; round <= rounds; round++)); do
        for server in "${servers[@]}"; do
            [[ $(type -t "start_$server") = function ]] || die "no such server: $server"
            printf '\rround %d of %d: %-20s' "$round" "$rounds" "$server" >&2
            connections "$server" "$round" || continue
            ((round > 1)) || there+=("$server")
        done
    done
    printf '\r%-40s\r' '' >&2
    printf '%s, %d names, %d rounds of %d s; CPU per query in microseconds, medians; ratios: median (lowest to highest)\n' \
        "$mode" $names "$rounds" "$seconds"
    loads=(pipelined single)
    [[ $mode != tcp ]] || loads+=(forward)
    for load in "${loads[@]}"; do
        printf '\n%s\n\n' "$load"
        format='%-10s %8s %21s %21s %21s %21s\n'
        row server CPU 'fastpath to it' 'to echo-c' 'to echo-go' 'to cache'
        for server in "${there[@]}"; do
            row "$server" "$(column "$server" "$load" | median)" "$(spread "$load" fastpath "$server")" "$(spread "$load" "$server" echo-c)" \
                "$(spread "$load" "$server" echo-go)" "$(spread "$load" "$server" cache)"
        done
    done
    latency_table
    exit
fi

# shellcheck disable=SC2086 # one field each
record server round cpu_us user_us system_us queries_per_s lossless rate $latency_columns
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

printf '%d names, %d rounds of %d s; CPU per query in microseconds, medians; ratios of CPU: median (lowest to highest)\n\n' \
    $names "$rounds" "$seconds"
format='%-18s %8s %8s %8s %10s %21s %21s %21s\n'
row server CPU user system queries/s 'to echo' 'to cache' 'fastpath to it'
for server in "${there[@]}"; do
    line=("$server")
    for name in cpu_us user_us system_us queries_per_s; do
        line+=("$(column "$server" $name | median)")
    done
    cache=cache ours=fastpath
    case $server in
        *-kubeadm) cache=cache-kubeadm ours=fastpath-kubeadm ;;
        *-rules) cache=cache-rules ours=fastpath-rules ;;
    esac
    row "${line[@]}" "$(spread cpu_us "$server" echo)" "$(spread cpu_us "$server" $cache)" "$(spread cpu_us $ours "$server")"
done
latency_table
