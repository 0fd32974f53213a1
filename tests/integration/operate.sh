#!/bin/bash
# What an operator does to a run that goes on: pause and resume, put a member out, rotate the online key, go back to a checkpoint,
# begin a new run with a checkpoint. Members follow by themselves, and the ledger verifies after each.
cd "$(dirname "$0")/../.." || exit 1
. tests/lib.sh
failures=0
check() { if "${@:2}"; then echo "ok      $1"; else echo "NOT OK  $1"; failures=$((failures + 1)); fi; }
R=$W/run P=$(free_port)
settings=(--preset debug --set outer.mode=streaming --set outer.inner_steps=4 --set outer.round_seconds=4 --set outer.grace_seconds=0.5
    --set outer.silence_seconds=3 --set outer.chunk_elements=65536 --set outer.shard_chunks=2 --set outer.checkpoint_rounds=6 --set inner.batch=4)
corpus "$W/corpus" --sequence 128 >"$W/data.log" 2>&1 || fail "data: $(tail -n 1 "$W/data.log")"
"$COORDINATOR" init "$R" --corpus "$W/corpus/corpus.json" "${settings[@]}" >"$W/init.log" 2>&1 || fail "init: $(tail -n 1 "$W/init.log")"
start_coordinator "$R" "$P"
start_node alice "$R"; start_node bob "$R"
check "rounds of four fragments are committed" wait_for 60 "$R" 'all(f["round"] >= 1 for f in fragments)'
stop_coordinator() { kill -TERM "${PID[coordinator]}"; wait "${PID[coordinator]}"; unset "PID[coordinator]"; }
ledger_holds() { "$COORDINATOR" ledger verify "$R" >"$W/verify.txt" 2>&1 || { cat "$W/verify.txt"; false; }; }

"$COORDINATOR" pause "$R" >/dev/null
check "pause is shown" wait_for 5 "$R" 'phase == "paused"'
sleep 4; before=$(status "$R" round); sleep 3
check "a paused run commits nothing new" test "$(status "$R" round)" = "$before"
"$COORDINATOR" resume "$R" >/dev/null
check "and goes on after resume" wait_for 30 "$R" "round > $before + 2"

"$COORDINATOR" revoke "$R" --member bob --reason "a test" >/dev/null
wait "${PID[bob]}"; rc=$?; unset "PID[bob]"
check "a revoked member ends with an error" test $rc != 0
check "that says why" grep -q "was revoked" "$W/bob.log"
"$NODE" run --home "$W/bob" --threads 1 >"$W/bob-again.log" 2>&1; rc=$?
check "and is refused when it comes back" test $rc = 1 -a -n "$(grep 'was revoked' "$W/bob-again.log")"
"$COORDINATOR" revoke "$R" --member coordinator >"$W/revoke.log" 2>&1; rc=$?
check "the coordinator's own node is not revoked" test $rc = 1 -a -n "$(grep 'own node: to do without it' "$W/revoke.log")"
start_node carol "$R"
before=$(status "$R" round)
check "the run goes on with others" wait_for 30 "$R" "round > $before + 4"

stop_coordinator
"$COORDINATOR" rotate "$R" >"$W/rotate.log" 2>&1 || fail "rotate: $(cat "$W/rotate.log")"
start_coordinator "$R" "$P"
before=$(status "$R" round)
check "members follow a rotated key" wait_for 40 "$R" "round > $before + 4 and members_live == 3"
check "the ledger holds with two keys" ledger_holds

check "there is a checkpoint" wait_for 40 "$R" "True if __import__('glob').glob('$R/checkpoints/step-*/manifest.sig') else False"
stop_coordinator
at=$("$COORDINATOR" ledger show "$R" --json | python3 -c 'import json, sys; print([e["body"]["at_index"] for e in map(json.loads, sys.stdin) if e["kind"] == "checkpoint"][-1])')
head=$("$COORDINATOR" ledger verify "$R" --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["entries"])')
folder=$(printf '%s/checkpoints/step-%012d' "$R" "$at")
mv "$folder" "$W/pruned"
"$COORDINATOR" rewind "$R" --to "$at" >"$W/rewind.log" 2>&1; rc=$?
check "no way back to a checkpoint that is gone" test $rc = 1 -a -n "$(grep "the checkpoint of the state at $at: .*$(basename "$folder")" "$W/rewind.log")"
mv "$W/pruned" "$folder"
"$COORDINATOR" rewind "$R" --to "$at" --reason "a test" >"$W/rewind.log" 2>&1 || fail "rewind: $(cat "$W/rewind.log")"
check "a rewind is one entry" test "$("$COORDINATOR" ledger verify "$R" --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["entries"])')" = $((head + 1))
start_coordinator "$R" "$P"
before=$(status "$R" round)
check "members go on from the checkpoint" wait_for 60 "$R" "round > $before + 4 and root_mismatches == 0"
check "the ledger holds over a rewind" ledger_holds

# ---- a new run with the checkpoint of this one
stop_coordinator; kill_now alice; kill_now carol
newest=$(dirname "$(ls "$R"/checkpoints/step-*/manifest.json | sort -V | tail -n 1)") # one may have been begun and not finished
R2=$W/second
"$COORDINATOR" init "$R2" --corpus "$W/corpus/corpus.json" "${settings[@]}" --from "file://$R/checkpoints" >"$W/init2.log" 2>&1 || fail "init --from: $(tail -n 1 "$W/init2.log")"
check "the checkpoint that was the newest is sealed, not the store" grep -q "from: .*$(basename "$newest")" "$R2/run.yaml"
start_coordinator "$R2" "$P"
start_node dave "$R2"
check "a run that begins with a checkpoint commits" wait_for 60 "$R2" 'round >= 4'
check "its first loss is a trained model's" test "$(grep -o 'loss [0-9.]*' "$W/dave.log" | head -n 1 | python3 -c 'print(float(input().split()[1]) < 4.8)')" = True

# ---- and one with weights that belong to no run
stop_coordinator; kill_now dave
"$NODE" export "$R/checkpoints" "$W/plain" >"$W/export.log" 2>&1 || fail "export: $(tail -n 1 "$W/export.log")"
R3=$W/third
"$COORDINATOR" init "$R3" --corpus "$W/corpus/corpus.json" "${settings[@]}" --from "$W/plain" >"$W/init3.log" 2>&1 || fail "init --from a plain folder: $(tail -n 1 "$W/init3.log")"
check "what a plain folder lacks is said" grep -q "plain Hugging Face folder.*fp32" "$W/init3.log"
check "and nothing of where its data stood" test "$(grep -c "where the checkpoint stood" "$W/init3.log")" = 0
start_coordinator "$R3" "$P"
start_node erin "$R3"
check "a run that begins with plain weights commits" wait_for 60 "$R3" 'round >= 4'
check "its first loss is that of these weights" test "$(grep -o 'loss [0-9.]*' "$W/erin.log" | head -n 1 | python3 -c 'print(float(input().split()[1]) < 4.8)')" = True

[ $failures = 0 ] || { echo "$failures failures"; LOG_LINES=30; fail "operate"; }
