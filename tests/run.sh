#!/bin/bash
# tests/run.sh BUILD unit|integration|all - run the test programs and scripts one after the other and close with one line,
# "N passed, N failed, N skipped". Output of a test is shown when it fails; all of it is in BUILD/logs/.
set -u
build=$1 which=$2
passed=0 failed=0 skipped=0
mkdir -p "$build/logs"
rm -rf "$build/cache"
export INTELLECT_CACHE; INTELLECT_CACHE=$(cd "$build" && pwd)/cache # nothing of a test goes into a home

program() { # a cmocka program: counts its tests
    local name=$1 log="$build/logs/$1.log" start=$SECONDS
    CMOCKA_MESSAGE_OUTPUT=STDOUT timeout 600 "$build/tests/$name" >"$log" 2>&1
    local rc=$? p f s
    p=$(grep -ac '^\[       OK \]' "$log"); f=$(grep -ac '^\[  FAILED  \] [a-z]' "$log"); s=$(grep -ac '^\[  SKIPPED \] [a-z]' "$log")
    f=$(grep -a '^\[  FAILED  \] [A-Za-z_0-9]*$' "$log" | sort -u | wc -l)
    s=$(grep -a '^\[  SKIPPED \] [A-Za-z_0-9]*$' "$log" | sort -u | wc -l)
    [ $rc -ne 0 ] && [ "$f" -eq 0 ] && f=1
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    printf '%-34s %3d passed %3d failed %3d skipped %4d s\n' "$name" "$p" "$f" "$s" $((SECONDS - start))
    [ "$f" -eq 0 ] || { grep -avE '^\[( RUN|       OK)' "$log" | tail -n 60; echo "exit status $rc; log: $log"; }
}

script() { # an integration script: one test; exit 77 means skipped, its last line says why
    local name log start=$SECONDS
    name=$(basename "$1" .sh) log="$build/logs/$(basename "$1").log"
    BUILD="$build" timeout 900 "$1" >"$log" 2>&1
    local rc=$?
    case $rc in
        0) passed=$((passed + 1)); printf '%-34s %-31s %4d s\n' "$name" passed $((SECONDS - start)) ;;
        77) skipped=$((skipped + 1)); printf '%-34s skipped: %s\n' "$name" "$(tail -n 1 "$log")" ;;
        *) failed=$((failed + 1)); printf '%-34s FAILED (exit %d), log: %s\n' "$name" $rc "$log"; tail -n 60 "$log" ;;
    esac
}

if [ "$which" != integration ]; then
    for t in "$build"/tests/test_*; do [ -x "$t" ] && [ ! -d "$t" ] && program "$(basename "$t")"; done
fi
if [ "$which" != unit ]; then
    for t in tests/integration/*.sh; do [ -x "$t" ] && script "$t"; done
    [ -x "$build/sim" ] && { name=simulator; "$build/sim" --seeds 200 --jobs 2 >"$build/logs/sim.log" 2>&1 && passed=$((passed + 1)) && echo "simulator, 200 seeds: passed" || { failed=$((failed + 1)); tail -n 40 "$build/logs/sim.log"; }; }
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
