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
for command in join run doctor train data bigram plan eval generate inspect verify fetch export import; do
    expect 0 "^intellect-node $command " "$node" $command --help
    expect 0 "^example: intellect-node $command( |$)" "$node" $command --help
    "$node" $command --help | grep '.\{101\}' && { failed=$((failed + 1)); echo "FAILED: $command --help is wider than 100 columns"; }
    expect 2 "intellect-node $command: .*--no-such-option.*; see intellect-node $command --help" "$node" $command --no-such-option
done
expect 2 'plan: --model is no option here, or wants a value' "$node" plan --model
expect 2 'plan: -q is no option here' "$node" plan -q
expect 0 'join .*invite' "$node" --help
expect 0 '^intellect-node .' "$node" --version
expect 2 'unknown command "jion"' "$node" jion
expect 2 'COMMAND' "$node"

# Wrong use of join and run.
expect 2 'invite is missing' "$node" join
expect 2 'too many: two' "$node" join "$invite" two
expect 2 'invite' "$node" join hello
expect 2 'invite' "$node" join "intellect://127.0.0.1:1/abc#$secret"
expect 2 'threads.*1 to' "$node" join "$invite" --threads many
expect 2 'precision: fp32, bf16 or bf16-stochastic' "$node" join "$invite" --precision fp8
expect 2 'tp: a number from 1 to 64' "$node" join "$invite" --tp 0
expect 2 'shard: none, optimizer, gradients or full' "$node" join "$invite" --shard some
expect 2 'activations: gigabytes' "$node" join "$invite" --activations none
expect 2 'offload: none or optimizer' "$node" join "$invite" --offload all
expect 2 'listen.*port' "$node" join "$invite" --listen 70000
expect 2 'missing after.*--home' "$node" run --home
expect 2 'name: UTF-8 without control' "$node" join "$invite" --name $'a\xffb'
expect 2 'name: UTF-8 without control' "$node" join "$invite" --name $'a\nb'
expect 2 'auto, cpu, cuda' "$node" join "$invite" --device gpu
expect 1 'no-such-file' "$node" join "@$dir/no-such-file"
expect 2 'standard input' "$node" join -
expect 2 'settled by join' "$node" run --aggregate-only
expect 1 'joined no run' "$node" run
[ ! -e "$dir/home" ] || { failed=$((failed + 1)); echo 'FAILED: run made a home'; }
expect 2 'started by the node' "$node" trainer
expect 2 '' "$node" trainer --fd 0
expect 1 'folder|directory' "$node" join "$invite" --home /dev/null/home

# A coordinator that is not there is waited for, and Ctrl-C ends that in order.
expect 0 'trying again' timeout --foreground --preserve-status -s INT 2 "$node" join "$invite" --log-json
"$node" join "$invite" >"$dir/log" 2>&1 &
pid=$!
for _ in $(seq 100); do grep -q 'trying again' "$dir/log" && break; sleep 0.1; done
expect 1 "in use by a running node .process $pid" "$node" join "$invite"
kill -TERM $pid
wait $pid
rc=$?
[ $rc -eq 0 ] || { failed=$((failed + 1)); echo "FAILED: SIGTERM ended with $rc"; cat "$dir/log"; }
for how in --default-signal=HUP --ignore-signal=HUP; do # a terminal that goes: to us, and under nohup
    env $how "$node" join "$invite" >"$dir/log" 2>&1 &
    pid=$!
    for _ in $(seq 100); do grep -q 'trying again' "$dir/log" && break; sleep 0.1; done
    kill -HUP $pid
    if [ $how = --ignore-signal=HUP ]; then
        sleep 0.5
        grep -q 'leaving' "$dir/log" && { failed=$((failed + 1)); echo "FAILED: SIGHUP ends a node under nohup"; }
        kill -TERM $pid
    fi
    wait $pid
    rc=$?
    [ $rc -eq 0 ] || { failed=$((failed + 1)); echo "FAILED: $how ended with $rc"; cat "$dir/log"; }
done

# Corpus and checkpoints.
echo "too short" >"$dir/short.txt"
expect 1 'short.txt' "$node" data --out "$dir/corpus" --sequence 128 "$dir/short.txt"
expect 1 'no-such' "$node" data --out "$dir/corpus" --sequence 128 "$dir/no-such.txt"
expect 1 '' "$node" inspect "$dir/no-such-checkpoint"
expect 1 '' "$node" verify "$dir"
expect 1 'Could not resolve host: no-such.invalid .tried 2 times' env INTELLECT_STORE_TRIES=2 "$node" inspect https://no-such.invalid/x
expect 2 'argument' "$node" export "$dir"


# ---- the life of one node -----------------------------------------------------------------------------
# What is refused while a run goes on is in bad_input.sh; here: start, trainer, leaving.

coordinator=${node%-node}-coordinator
check() { # check "WHAT" CONDITION...
    local what=$1
    shift
    if "$@"; then echo "ok: $what"; else failed=$((failed + 1)) && echo "FAILED: $what"; fi
}
await() { # await COUNT PATTERN: until the node's log has it so often
    for _ in $(seq 200); do [ "$(grep -c -- "$2" "$dir/node.log")" -ge "$1" ] && return 0; sleep 0.1; done
    return 1
}
for _ in $(seq 400); do echo "Some text that is long enough for a corpus, line after line."; done >"$dir/text"
"$node" data --out "$dir/corpus" --sequence 128 "$dir/text" >/dev/null || exit 1
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$coordinator" init "$dir/run" --corpus "$dir/corpus/corpus.json" >/dev/null 2>&1 || exit 1
"$coordinator" serve "$dir/run" --no-aggregator --listen "127.0.0.1:$port" >"$dir/coordinator.log" 2>&1 &
served=$!
node_pid=
trap 'kill $served $node_pid 2>/dev/null; wait 2>/dev/null; rm -rf "$dir"' EXIT
"$coordinator" invite "$dir/run" --address "127.0.0.1:$port" >"$dir/invite" 2>/dev/null || exit 1

"$node" join "@$dir/invite" --name first --threads 1 --no-listen >"$dir/node.log" 2>&1 &
node_pid=$!
check "it enrols, and its trainer starts" await 1 'trainer is ready'
check "it says what it will do" grep -q 'trains on a GPU, else cpu, 1 thread, nice 10, corpus file://' "$dir/node.log"
check "it says where its things are" grep -q "identity and state in $dir/home" "$dir/node.log"
trainer=$(pgrep -P $node_pid)
check "the trainer stands back behind other programs" [ "$(ps -o ni= -p "$trainer" | tr -d ' ')" = 10 ]
kill -KILL "$trainer"
check "a killed trainer is started again" await 2 'trainer is ready'
trainer=$(pgrep -P $node_pid)
kill -INT "$trainer"
kill -INT $node_pid
wait $node_pid
check "Ctrl-C leaves in order, also when the terminal sends it to both" [ $? -eq 0 ]
check "it says so" grep -q 'left in order' "$dir/node.log"
check "the moments are saved" [ -s "$dir/home/inner.state" ]
check "the trainer is gone" [ ! -e "/proc/$trainer" ]

# The same key may show its invite again: a person who is not sure whether it worked tries again.
"$node" join "@$dir/invite" --threads 1 --log-json >"$dir/node.log" 2>&1 &
node_pid=$!
check "the same node may use its invite again, with its moments" await 1 'with the moments of its last life'
check "JSON lines are JSON" python3 -c 'import json, sys; [json.loads(l) for l in open(sys.argv[1])]' "$dir/node.log"
trainer=$(pgrep -P $node_pid)
kill -KILL $node_pid
wait $node_pid 2>/dev/null
for _ in $(seq 50); do [ -e "/proc/$trainer" ] || break; sleep 0.1; done
check "the trainer of a killed agent dies with it" [ ! -e "/proc/$trainer" ]
"$node" run --threads 1 >"$dir/node.log" 2>&1 &
node_pid=$!
check "run goes on after that" await 1 'trainer is ready'
trainer=$(pgrep -P $node_pid)
kill -STOP "$trainer" # so that it cannot end in order
kill -TERM $node_pid
await 1 'leaving in order'
kill -TERM $node_pid
wait $node_pid
check "a second signal quits at once" [ $? -ne 0 ]

[ $failed -eq 0 ] && echo "all as expected"
exit $((failed > 0))
