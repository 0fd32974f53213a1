#!/bin/bash
# tests/fuzz/run.sh BUILD SECONDS TARGET... - fuzz each target for so long, two at a time; print one table. What is
# found lies in BUILD/findings with the command that replays it; then the exit status is 1. What is learnt is kept in
# BUILD/corpus, where `make fuzz-corpus` takes it from.
set -u
build=$1 seconds=$2
shift 2
jobs=${FUZZ_JOBS:-2}
# A smaller quarantine and shorter stacks of allocations make what OpenSSL does half as dear; a replay has them whole.
export ASAN_OPTIONS=allocator_may_return_null=1:detect_leaks=1:quarantine_size_mb=16:malloc_context_size=4
rm -rf "$build/findings" && mkdir -p "$build/findings" "$build/logs"

one() { # a target: its samples and words, then libFuzzer
    local t=$1 own="$build/corpus/$1" samples="$build/samples/$1" words= values=1 one_mb=256
    [ "$t" = channel ] && values=0 # comparisons inside OpenSSL would lead it astray
    [ "$t" = messages ] && one_mb=2 # a decoder takes less than eight times what it is given
    rm -rf "$samples" && mkdir -p "$own" "$samples"
    "$build/fuzz" samples "$t" "$samples" "$build/$t.dict" || return 1
    [ -s "$build/$t.dict" ] && words="-dict=$build/$t.dict"
    nice -n 10 "$build/fuzz_$t" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=1024 -malloc_limit_mb=$one_mb \
        -max_len=65536 -use_value_profile=$values -print_final_stats=1 $words \
        -artifact_prefix="$build/findings/$t-" "$own" "tests/fuzz/corpus/$t" "$samples" >"$build/logs/fuzz_$t.log" 2>&1
}

row() { # what its log says in the end
    local t=$1 log="$build/logs/fuzz_$1.log" last found
    last=$(grep -aE '^#[0-9]+.*cov: ' "$log" | tail -n 1)
    field() { sed -nE "s/.* $1: ([0-9]+).*/\1/p" <<<"$last"; }
    stat() { sed -nE "s/^stat::$1: *//p" "$log" | tail -n 1; }
    found=$(find "$build/findings" -name "$t-*" ! -name "$t-slow-unit-*" | wc -l)
    [ "$found" -gt 0 ] || [ "$2" = 0 ] || found="exit $2"
    printf '%-12s %12s %8s %7s %7s %7s %8s  %s\n' "$t" "$(stat number_of_executed_units)" "$(stat average_exec_per_sec)" \
        "$(field cov)" "$(field ft)" "$(field corp)" "$(stat peak_rss_mb)" "$found"
    [ "$found" = 0 ]
}

declare -A rc of
failed=0 running=0
printf '%-12s %12s %8s %7s %7s %7s %8s  %s\n' target executions exec/s edges features corpus peak-MB findings
finish() { # wait for any one of them
    local pid status
    wait -n -p pid; status=$?
    row "${of[$pid]}" $status || failed=1
    running=$((running - 1))
}
for t in "$@"; do
    [ $running -lt "$jobs" ] || finish
    mkdir -p "tests/fuzz/corpus/$t"
    one "$t" & of[$!]=$t
    running=$((running + 1))
done
while [ $running -gt 0 ]; do finish; done

for f in "$build"/findings/*; do
    [ -e "$f" ] || continue
    t=$(basename "$f"); t=${t%%-*}
    echo "replay: $build/fuzz_$t $f"
    [[ $f == *slow-unit* ]] || grep -aE 'ERROR|SUMMARY|runtime error|Assertion' "$build/logs/fuzz_$t.log" | head -n 4
done
exit $failed
