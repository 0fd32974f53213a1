#!/bin/bash
# tests/fuzz/corpus.sh BUILD TARGET... - replace tests/fuzz/corpus by the fewest and smallest inputs that reach every edge
# which its samples, the old corpus and the findings of `make fuzz` reach. To be run when messages.h has changed.
set -eu
build=$1
shift
export ASAN_OPTIONS=allocator_may_return_null=1
for t in "$@"; do
    old="tests/fuzz/corpus/$t" new="$build/merged/$t" samples="$build/samples/$t"
    rm -rf "$new" "$samples"
    mkdir -p "$new" "$samples" "$old" "$build/corpus/$t"
    "$build/fuzz" samples "$t" "$samples" "$build/$t.dict"
    # Edges alone, not how often each is taken: a tenth of the files.
    nice -n 10 "$build/fuzz_$t" -set_cover_merge=1 -use_counters=0 -max_len=65536 "$new" "$samples" "$old" "$build/corpus/$t" \
        >"$build/merge_$t.log" 2>&1 || { tail "$build/merge_$t.log"; exit 1; }
    rm -rf "$old" && cp -r "$new" "$old"
    printf '%-12s %5d files %8d bytes\n' "$t" "$(find "$old" -type f | wc -l)" "$(cat "$old"/* | wc -c)"
done
