#!/usr/bin/env bash
# Every figure of bench/README.md, one after the other, and the charts of them.
#
#     bench/figures.sh [-o FOLDER] [-q] [-n] [TRACE...]
#
# FOLDER (default: a temporary one, whose name is printed) gets what each command prints, and its results
# as CSV. -q is a short run that shows that everything works: its figures mean nothing, and the charts
# are left in FOLDER. -n takes nothing, and draws what FOLDER has. Hit ratios are taken of the TRACEs (see
# bench/README.md), and left out without any. FOLDER/versions.txt has the versions of what was measured. Takes an
# hour and more, in which the machine should have nothing else to do.
source "$(dirname "$0")/lib.sh"

folder='' quick='' drawing=
while getopts o:qnh option; do
    case $option in
        o) folder=$OPTARG ;;
        q) quick=1 ;;
        n) drawing=1 ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
traces=()
for trace; do traces+=("$(realpath -- "$trace")"); done
cd "$(dirname "$0")/.."
folder=$(realpath -- "${folder:-$(mktemp -d)}")
mkdir -p "$folder"
charts=bench/charts
[[ -z $quick ]] || charts=$folder
printf 'figures are kept in %s\n' "$folder"

# take NAME COMMAND... runs a command and keeps what it prints.
take() {
    printf '\n== %s\n' "${*:2}"
    "${@:2}" 2>"$folder/$1.err" | tee "$folder/$1.txt"
}
peers=(echo fastpath fastpath-kubeadm fastpath-rules optcache-kubeadm cache cache-kubeadm cache-rules unbound dnsdist recursor)
# take_peers OPTION... takes the peers over each transport.
take_peers() {
    take peers bench/peers.sh "$@" -c "$folder/peers.csv" "${peers[@]}"
    take peers_tcp bench/peers.sh -m tcp "$@" -c "$folder/peers_tcp.csv"
    take peers_dot bench/peers.sh -m dot "$@" -c "$folder/peers_dot.csv"
}
gobench() { # ARGUMENTS...
    go test -run '^$' "$@"
}

[[ -n $drawing ]] || build
[[ -n $drawing ]] || take versions versions
if [[ -n $drawing ]]; then
    :
elif [[ -n $quick ]]; then
    take hit gobench -bench 'Hit$|Insert' -benchmem -cpu 1 -benchtime 10x .
    take parallel gobench -bench HitParallel -cpu 1,2 -benchtime 100x .
    take scaling gobench -v -bench Scaling -cpu 2 . || true
    take collector gobench -bench Collector -cpu 2 -benchtime 1x .
    take lines gobench -bench Lines -benchtime 1x -cpu 1 .
    take end_to_end bench/end_to_end.sh -d 1 -r 1 -c "$folder/end_to_end.csv"
    take memory bench/memory.sh -n 20000 -s 1 -c "$folder/memory.csv"
    take idle bench/idle.sh -d 2 -r 1 -c "$folder/idle.csv"
    take large gobench -bench LargeFlood -benchtime 1x -cpu 1 .
    take tail bench/tail.sh -d 2 -r 1 -n 20000 -q 5000 -c "$folder/tail.csv"
    take restart bench/restart.sh -d 2 -r 1 -n 20000 -q 5000 -c "$folder/restart.csv"
    take restart_plain bench/restart.sh -p -d 2 -r 1 -n 20000 -q 5000 -c "$folder/restart_plain.csv"
    take snapshot gobench -bench Snapshot/write -benchtime 1x .
    take flush bench/flush.sh -n 20000 -r 1 -c "$folder/flush.csv"
    take_peers -d 1 -r 1 -t 2
    ! installed perf linux-perf || take split bench/split.sh -d 1
else
    take hit gobench -bench 'Hit$|Insert' -benchmem -cpu 1 -count 5 .
    take parallel gobench -bench HitParallel -benchmem -cpu 1,2 -count 5 .
    # Where the machine does not give two cores twice the work, it skips or fails, and says so.
    take scaling gobench -v -bench Scaling -cpu 2 -count 3 . || true
    take collector gobench -bench Collector -cpu 2 -benchtime 5x .
    take lines gobench -bench Lines -benchtime 100x -count 3 -cpu 1 .
    take end_to_end bench/end_to_end.sh -c "$folder/end_to_end.csv"
    take memory bench/memory.sh -c "$folder/memory.csv"
    take idle bench/idle.sh -c "$folder/idle.csv"
    take large gobench -bench LargeFlood -benchtime 1x -cpu 1 .
    take tail bench/tail.sh -c "$folder/tail.csv"
    take restart bench/restart.sh -d 10 -c "$folder/restart.csv"
    take restart_plain bench/restart.sh -p -d 10 -n 400000 -c "$folder/restart_plain.csv"
    take snapshot gobench -bench Snapshot/write .
    take flush bench/flush.sh -c "$folder/flush.csv"
    take_peers
    ! installed perf linux-perf || take split bench/split.sh
    if ((${#traces[@]})); then
        take hitratio go run ./bench/hitratio -svg "$charts/hitratio.svg" "${traces[@]}"
        take hitratio_bound go run ./bench/hitratio -memory 2,4,8,16 "${traces[@]}"
        take hitratio_restart go run ./bench/hitratio -restart "${traces[@]}"
    fi
    take flood env OPTCACHE_FLOOD=16MB,64MB,256MB go test -v -run MaxMemory ./test
fi

# chart NAME TITLE UNIT draws the lines that it reads: group, bar and value.
chart() { awk -F'\t' -v title="$2" -v unit="$3" -f bench/bars.awk >"$charts/$1.svg"; }
# bench NAME UNIT prints benchmark and median of a unit, from what go test has printed.
bench() {
    awk -v unit="$2" '/^Benchmark/ { for (i = 3; i < NF; i++) if ($(i + 1) == unit) print $1 "\t" $i }' "$folder/$1.txt" |
        sort -k1,1 -k2,2g | awk -F'\t' '
            function flush() { if (n) print last "\t" (v[int((n + 1) / 2)] + v[int(n / 2) + 1]) / 2; n = 0 }
            $1 != last { flush(); last = $1 }
            { v[++n] = $2 }
            END { flush() }'
}

awk -F, -v OFS='\t' 'NR > 1 { print "", $1, $5 }' "$folder/memory.csv" | chart memory 'Memory for each of a million cached answers' bytes
results=$folder/end_to_end.csv
for chain in forwarder kubeadm; do
    for cache in optcache cache; do
        printf '%s\t%s\t%.1f\n' "$chain" "$cache" "$(column "$chain,$cache" cpu_us | median)"
    done
done | chart end_to_end 'CPU time for each cached query' µs
results=$folder/tail.csv
for quantile in p50 p99 p99.9 max; do
    for cache in optcache cache; do
        printf '%s\t%s\t%.2f\n' "$quantile" "$cache" "$(column "$cache" "$quantile" | median)"
    done
done | chart tail 'Latency with a million answers at a fixed rate' ms
bench parallel ns/op | sed -e 's/^BenchmarkHitParallel\///; s/-2\t/\t2\t/; s/\([a-z]\)\t\([0-9.]*\)$/\1\t1\t\2/' | awk -F'\t' -v OFS='\t' '
    { who = sub(/^cache-/, "", $1) ? "cache" : "optcache"; print $1, who ", " $2 ($2 > 1 ? " cores" : " core"), sprintf("%.0f", $3) }
' | sort -s -t$'\t' -k1,1 | chart scaling 'Time for each hit on one and on two cores' ns
bench collector more-than-empty-ms/GC | sed -e 's/^BenchmarkCollector\///; s/-[0-9]*\t/\t/' | awk -F'\t' -v OFS='\t' '{ print "", $1, $2 }' |
    chart collector 'What a million entries add to a garbage collection' ms
printf '\ncharts are in %s\n' "$charts"
