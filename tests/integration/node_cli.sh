#!/bin/bash
# What intellect-node says to a person who gets something wrong: one line that names the thing, the
# right exit status (2 = wrong use, 1 = failed), and nothing damaged.
set -u
cd "$(dirname "$0")/../.."
node=$PWD/${BUILD:-build}/intellect-node
dir=$(mktemp -d /tmp/node-cli-XXXXXX)
failed=0
trap 'rm -rf "$dir"' EXIT
export INTELLECT_HOME=$dir/home

# expect STATUS "PATTERN" COMMAND...: runs it with a time limit and looks for the pattern in its output
expect() {
    local status=$1 pattern=$2 out rc
    shift 2
    out=$(timeout 20 "$@" 2>&1 </dev/null)
    rc=$?
    if [ $rc -ne "$status" ] || ! grep -qE -- "$pattern" <<<"$out"; then
        failed=$((failed + 1))
        printf 'FAILED: %s\n  exit status %d, wanted %d; output (wanted "%s"):\n%s\n' "$*" $rc "$status" "$pattern" "$out"
    else
        printf 'ok: %s\n    %s\n' "${*/$node/intellect-node}" "$(head -n 1 <<<"$out" | cut -c1-150)"
    fi
}

secret=$(printf '%064d' 7)
invite="intellect://127.0.0.1:1/$(printf '%064d' 1)#$secret"

# Every command explains itself.
for command in join run data bigram eval generate inspect verify export; do
    expect 0 "$command " "$node" $command --help
    expect 2 'unknown|allowed|see' "$node" $command --no-such-option
done
expect 0 'join .*invite' "$node" --help
expect 2 'unknown command "jion"' "$node" jion
expect 2 'COMMAND' "$node"

# Wrong use of join and run.
expect 2 'invite is missing' "$node" join
expect 2 'too many: two' "$node" join "$invite" two
expect 2 'invite' "$node" join hello
expect 2 'invite' "$node" join "intellect://127.0.0.1:1/abc#$secret"
expect 2 'threads.*1 to' "$node" join "$invite" --threads many
expect 2 'listen.*port' "$node" join "$invite" --listen 70000
expect 2 'missing after.*--home' "$node" run --home
expect 2 'auto, cpu, cuda' "$node" join "$invite" --device gpu
expect 1 'no CUDA backend.*--device cpu' "$node" join "$invite" --device cuda
expect 1 'no-such-file' "$node" join "@$dir/no-such-file"
expect 2 'standard input' "$node" join -
expect 2 'settled by join' "$node" run --aggregate-only
expect 1 'joined no run' "$node" run
expect 2 'started by the node' "$node" trainer
expect 2 '' "$node" trainer --fd 0
expect 1 'folder|directory' "$node" join "$invite" --home /dev/null/home

# A coordinator that is not there is waited for, and Ctrl-C ends that in order.
expect 0 'trying again' timeout --preserve-status -s INT 2 "$node" join "$invite" --log-json
"$node" join "$invite" >"$dir/log" 2>&1 &
pid=$!
for _ in $(seq 100); do grep -q 'trying again' "$dir/log" && break; sleep 0.1; done
expect 1 "in use by a running node .process $pid" "$node" join "$invite"
kill -TERM $pid
wait $pid
rc=$?
[ $rc -eq 0 ] || { failed=$((failed + 1)); echo "FAILED: SIGTERM ended with $rc"; cat "$dir/log"; }

# Corpus and checkpoints.
echo "too short" >"$dir/short.txt"
expect 1 'short.txt' "$node" data --out "$dir/corpus" --sequence 128 "$dir/short.txt"
expect 1 'no-such' "$node" data --out "$dir/corpus" --sequence 128 "$dir/no-such.txt"
expect 1 '' "$node" inspect "$dir/no-such-checkpoint"
expect 1 '' "$node" verify "$dir"
expect 2 'argument' "$node" export "$dir"

[ $failed -eq 0 ] && echo "all as expected"
exit $((failed > 0))
