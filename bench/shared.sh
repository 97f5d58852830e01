#!/usr/bin/env bash
# Many replicas with one second level, beside as many that are alone.
#
#     bench/shared.sh [-p PARTS] [-t TRACE] [-n REQUESTS] [-r REPLICAS] [-q RATE] [-d SECONDS] [-w TIMEOUT] [-m MISSES] [-b BINARY]
#
# Needs redis-server, dnsperf and curl. Everything is on loopback, and shares all cores: so TIMEOUT, which is shared_timeout, is
# 5ms by default, and may have to be longer on a machine that has too much to do.
#
# 1. The first REQUESTS (default 200000) of a TRACE of bench/hitratio (lines: time, key, TTL) are dealt out at random to
#    REPLICAS (default 10) with 9984 entries each, RATE (default 5000) a second in all. Printed is how often the upstream
#    was asked: by replicas that are alone, with `shared`, and by one replica that gets all requests. Then what Redis
#    needs: bytes for each answer, and CPU for each question to it.
# 2. The same replicas are restarted one after the other, SECONDS (default 60) in all, under load. Printed is the
#    upstream's largest second over its mean.
# 3. Times of MISSES (default 5000) that the second level answers, beside those of an upstream that takes 1, 10 and 50 ms, and
#    the replica's CPU for each.
# 4. Times of misses while the second level is killed, hangs (SIGSTOP) or becomes slow (20 ms in each direction, by a proxy,
#    bench/delay), beside those of a server without it. The upstream takes 1, 10 and 50 ms. Each fault begins in the midst.
# 5. The same with a Cluster of six, of which a node that writes is killed in the midst.
#
# PARTS is which of these are run (default 12345). 2 needs 1; the others need no TRACE.
source "$(dirname "$0")/lib.sh"

parts=12345 trace=/dev/null requests=200000 replicas=10 rate=5000 seconds=60 timeout=5ms misses=5000 binary=
while getopts p:t:n:r:q:d:w:m:b:h option; do
    case $option in
        p) parts=$OPTARG ;;
        m) misses=$OPTARG ;;
        t) trace=$(realpath -- "$OPTARG") ;;
        n) requests=$OPTARG ;;
        r) replicas=$OPTARG ;;
        q) rate=$OPTARG ;;
        d) seconds=$OPTARG ;;
        w) timeout=$OPTARG ;;
        b) binary=$(realpath -- "$OPTARG") ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
whole "$requests" "$replicas" "$rate" "$seconds" "$misses"
part() { [[ $parts == *$1* ]]; }
[[ $trace != /dev/null ]] || ! part 1 || die "-t TRACE is needed"
part 1 || ! part 2 || die "part 2 needs part 1"
cd "$(dirname "$0")/.."
need dnsperf dnsperf
need redis-server redis-server
need curl curl
build

redis_port=$((next_port++))
redis() { # starts an empty Redis
    redis-server --port "$redis_port" --bind 127.0.0.1 --dir "$work" --save "" --maxmemory 1gb --maxmemory-policy allkeys-lru >"$work/redis.log" 2>&1 &
    redis_pid=$!
    running[$redis_pid]=
    until redis-cli -p "$redis_port" ping >/dev/null 2>&1; do sleep 0.05; done
}
head -c 32 /dev/urandom | base64 >"$work/secret"

# replica shared|alone starts one, as $pid, with the ports ${port[dns]} and ${port[metrics]}.
replica() {
    local shared=
    [[ $1 == alone ]] || shared="shared ${urls:-valkey://127.0.0.1:$redis_port}
        shared_secret $work/secret
        shared_timeout ${2:-$timeout}"
    coredns ".:@dns@ {
    bind 127.0.0.1
    prometheus 127.0.0.1:@metrics@
    optcache {
        success 9984 3600 600
        $shared
    }
    forward . 127.0.0.1:$upstream_port
}"
}
asked() { # how often the upstream was asked
    curl -s "127.0.0.1:$upstream_metrics/metrics" | awk '/^coredns_dns_requests_total/ {n += $2} END {printf "%d", n}'
}
away() { # METRICS says whether a replica does not use the second level
    curl -s "127.0.0.1:$1/metrics" | awk '/^coredns_optcache_shared_away/ {print $2}'
}
group() { # shared|alone N starts N replicas: ${pids[@]}, ${ports[@]}
    pids=() ports=()
    local i
    for ((i = 0; i < $2; i++)); do
        replica "$1"
        pids+=("$pid") ports+=("${port[dns]}")
        [[ $1 == alone ]] || until [[ $(away "${port[metrics]}") == 0 ]]; do sleep 0.05; done
    done
}
end() { local pid; for pid in "${pids[@]}"; do stop "$pid"; done; }
load() { # has a dnsperf for each replica ask what was dealt out to it
    local i loads=()
    for i in "${!ports[@]}"; do
        dnsperf -s 127.0.0.1 -p "${ports[i]}" -d "$work/part.$i" -Q "$((rate / ${#ports[@]}))" -q 200 -c 2 -n 1 >"$work/perf.$i" 2>&1 &
        loads+=("$!")
    done
    wait "${loads[@]}"
}
deal() { # N FROM TO deals the requests of the trace from one number to another out to N
    rm -f "$work"/part.*
    awk -v n="$1" -v from="$2" -v to="$3" -v work="$work" 'BEGIN {srand(7)} NR > from && NR <= to {print > (work "/part." int(rand() * n))}' "$work/all"
}
ticks() { awk '{print ($14 + $15) * 10}' "/proc/$1/stat"; } # ms of CPU, at 100 ticks a second

upstream
if part 1; then
zcat -f "$trace" | head -n "$((requests + rate * seconds))" | awk '{print "k" $2 ".example.org A"}' >"$work/all" || true

printf '1. upstream queries of %d requests, %d names\n' "$requests" "$(head -n "$requests" "$work/all" | sort -u | wc -l)"
for case in one alone shared; do
    n=$replicas kind=$case
    [[ $case != one ]] || n=1 kind=alone
    [[ $case != shared ]] || redis
    group $kind "$n"
    deal "$n" 0 "$requests"
    before=$(asked)
    [[ $case != shared ]] || before_cpu=$(ticks "$redis_pid")
    load
    queries=$(($(asked) - before))
    [[ $case != one ]] || one=$queries
    printf '   %-7s %7d   %.2f of one\n' "$case" "$queries" "$(awk "BEGIN {print $queries / $one}")"
    if [[ $case == shared ]]; then
        keys=$(redis-cli -p "$redis_port" dbsize) memory=$(redis-cli -p "$redis_port" info memory | awk -F: '/^used_memory_dataset:/ {print $2 + 0}')
        commands=$(redis-cli -p "$redis_port" info stats | awk -F: '/^total_commands_processed/ {print $2 + 0}')
        awk -v k="$keys" -v m="$memory" -v c="$commands" -v ms="$(($(ticks "$redis_pid") - before_cpu))" \
            'BEGIN {printf "   Redis: %d keys, %d bytes for each; %d commands, %.1f us of CPU for each\n", k, m / k, c, ms * 1000 / c}'
    fi
    [[ $case == shared ]] || end
done

restarts() { # shared|alone
    deal "${#pids[@]}" "$requests" "$((requests + rate * seconds))"
    load &
    local loading=$! i s before now largest=0 first begun last ms
    sleep 2
    first=$(asked) before=$first begun=$(($(date +%s%N) / 1000000))
    last=$begun
    local step=$((seconds * 8 / 10 / ${#pids[@]}))
    ((step > 0)) || step=1
    for i in "${!pids[@]}"; do
        sed "s/@dns@/${ports[i]}/" >"$work/again.$i" <<<"$(cat "$work/corefile.$1")"
        stop "${pids[i]}"
        "$binary" -conf "$work/again.$i" >"$work/again.log" 2>&1 &
        pids[i]=$! running[$!]=
        for ((s = 0; s < step; s++)); do
            sleep 1
            now=$(asked) ms=$(($(date +%s%N) / 1000000))
            (((now - before) * 1000 / (ms - last) <= largest)) || largest=$(((now - before) * 1000 / (ms - last)))
            before=$now last=$ms
        done
    done
    awk -v l=$largest -v n=$((before - first)) -v ms=$((last - begun)) -v k="$1" 'BEGIN {m = n * 1000 / ms; printf "   %-7s mean %.0f a second, largest %d, %.2f times the mean\n", k, m, l, l / m}'
    wait "$loading" || true
}
if part 2; then
printf '2. a rolling restart of %d in %d s\n' "$replicas" "$seconds"
for kind in shared alone; do
    if [[ $kind == alone ]]; then
        end
        group alone "$replicas"
        deal "$replicas" 0 "$requests"
        load
    fi
    {
        printf '.:@dns@ {\n    bind 127.0.0.1\n    optcache {\n        success 9984\n'
        [[ $kind == alone ]] || printf '        shared valkey://127.0.0.1:%d\n        shared_secret %s\n        shared_timeout %s\n' "$redis_port" "$work/secret" "$timeout"
        printf '    }\n    forward . 127.0.0.1:%d\n}\n' "$upstream_port"
    } >"$work/corefile.$kind"
    restarts $kind
done
fi
end
stop "$redis_pid"
fi

slow_upstream() { # MS starts an upstream that takes so long
    stop "$upstream_pid"
    coredns ".:@dns@ {
        bind 127.0.0.1
        prometheus 127.0.0.1:@metrics@
        erratic {
            drop 0
            truncate 0
            delay 1 ${1}ms
        }
    }"
    upstream_pid=$pid upstream_port=${port[dns]} upstream_metrics=${port[metrics]}
}
# quantiles NAME PORT PID asks for names, and prints quantiles of the times in ms, how many failed, the CPU for each, and by how
# much p99 is more than $base.
quantiles() {
    local before=$(ticks "$3")
    dnsperf -s 127.0.0.1 -p "$2" -d "$work/names" -n 1 -Q 500 -q 100 -v 2>/dev/null | awk '/^> / {print $NF * 1000, $2}' | sort -n >"$work/times"
    awk -v name="$1" -v cpu="$(($(ticks "$3") - before))" -v base="${base:-}" -v asked="$misses" -v p99="$work/p99" '
        {t[NR] = $1; if ($2 != "NOERROR") failed++}
        END {
            if (!NR) exit 1
            printf "   %-28s %8.2f %8.2f %8.2f   %d failed, %d lost, %.0f us of CPU", name, t[int(NR * .5) + 1], t[int(NR * .99) + 1], t[int(NR * .999) + 1], failed, asked - NR, cpu * 1000 / NR
            printf base != "" ? ", p99 %+.2f\n" : "\n", t[int(NR * .99) + 1] - base
            print t[int(NR * .99) + 1] >p99
        }' "$work/times"
}
seq -f 'n%g.example.org A' "$misses" >"$work/names"

if part 3; then
    printf '3. times of misses in ms                p50      p99    p99.9\n'
    for ms in 1 10 50; do
        slow_upstream $ms
        redis
        group shared 2
        quantiles "upstream of $ms ms" "${ports[0]}" "${pids[0]}"
        sleep 0.5
        quantiles "the second level" "${ports[1]}" "${pids[1]}"
        end
        stop "$redis_pid"
    done
fi

beside() { # starts a server without the second level, and notes its p99 as $base
    group alone 1
    base=
    quantiles "without shared" "${ports[0]}" "${pids[0]}"
    base=$(<"$work/p99")
    end
}
faulty() { # NAME COMMAND... has a replica ask an empty second level while a fault comes in the midst
    local at
    for at in "${node_ports[@]:-$redis_port}"; do redis-cli -p "$at" flushall >/dev/null 2>&1 || true; done
    replica shared
    pids=("$pid") ports=("${port[dns]}")
    until [[ $(away "${port[metrics]}") == 0 ]]; do sleep 0.05; done
    (
        sleep "$((misses / 1500))"
        "${@:2}"
    ) >/dev/null 2>&1 &
    local failing=$!
    running[$failing]=
    quantiles "$1" "${ports[0]}" "${pids[0]}"
    pkill -TERM -P "$failing" 2>/dev/null || true
    stop "$failing"
    end
}
become_slow() { # until the replica is at its end
    kill -KILL "$proxy_pid"
    timeout "$((misses / 500 + 20))" "$work/delay" "127.0.0.1:$proxy_port" "127.0.0.1:$redis_port" 20ms
}
if part 4; then
    go build -o "$work/delay" ./bench/delay
    printf '4. times of misses in ms                p50      p99    p99.9\n'
    for ms in 1 10 50; do
        printf '   upstream of %d ms\n' $ms
        slow_upstream $ms
        beside
        redis
        faulty "well, and empty" true
        faulty killed kill -KILL "$redis_pid"
        stop "$redis_pid"
        redis
        faulty "hangs (SIGSTOP)" kill -STOP "$redis_pid"
        kill -CONT "$redis_pid"
        proxy_port=$((next_port++))
        "$work/delay" "127.0.0.1:$proxy_port" "127.0.0.1:$redis_port" 0s &
        proxy_pid=$!
        running[$proxy_pid]=
        urls=valkey://127.0.0.1:$proxy_port
        faulty "becomes slow" become_slow
        stop "$proxy_pid"
        urls=
        stop "$redis_pid"
    done
fi

cluster() { # starts a Cluster of six: ${nodes[@]}, ${node_ports[@]}
    local i addresses=()
    nodes=() node_ports=()
    for ((i = 0; i < 6; i++)); do
        mkdir "$work/node.$i"
        redis-server --port "$next_port" --bind 127.0.0.1 --dir "$work/node.$i" --save "" --cluster-enabled yes --cluster-node-timeout 1000 \
            --cluster-require-full-coverage no --cluster-port "$((next_port + 1))" >"$work/node.$i/log" 2>&1 &
        nodes+=("$!") node_ports+=("$next_port") addresses+=("127.0.0.1:$next_port")
        running[$!]=
        until redis-cli -p "$next_port" ping >/dev/null 2>&1; do sleep 0.05; done
        next_port=$((next_port + 2))
    done
    redis-cli --cluster create "${addresses[@]}" --cluster-replicas 1 --cluster-yes >"$work/cluster.log" || die "no cluster: $(tail -n 3 "$work/cluster.log")"
    for i in "${node_ports[@]}"; do
        until redis-cli -p "$i" cluster info | grep -q cluster_state:ok; do sleep 0.1; done
    done
    sleep 2 # the copies begin
}
if part 5; then
    printf '5. times of misses in ms                p50      p99    p99.9\n'
    slow_upstream 10
    beside
    cluster
    urls="valkey+cluster://127.0.0.1:${node_ports[0]} valkey+cluster://127.0.0.1:${node_ports[1]}"
    faulty "a Cluster of six, well" true
    faulty "one that writes is killed" kill -KILL "${nodes[0]}"
fi
