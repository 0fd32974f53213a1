#!/bin/bash
# A run whose machines are all gone goes on from its store alone, on other machines and another mesh: four nodes of one
# process each, a checkpoint, then two nodes of two tensor-parallel ranks. Parameters are the same bits, the loss of the
# loaded model is the same on both meshes, and of the samples each is spent once, in the one part or the other.
#   STORE=s3             the store is a bucket of Ceph (make test-s3), not a folder; only who serves a run has its key
cd "$(dirname "$0")/../.." || exit 1
. tests/lib.sh
store=file://$W/store lines=2500
if [ "${STORE:-}" = s3 ]; then
    . tests/s3/lib.sh
    start_ceph resume 2
    lines=20000 # a checkpoint takes longer there, and training must outlast two of them
    store="s3://resume/run?endpoint=$S3_ENDPOINT"
fi
export WRAP="env -u AWS_ACCESS_KEY_ID -u AWS_SECRET_ACCESS_KEY"
cd "$W" || exit 1
check() { if "${@:2}"; then echo "ok      $1"; else echo "NOT OK  $1"; fail "$1"; fi; }

for i in $(seq $lines); do echo "line $((i * i % 7919)) of a text to train on, $((i % 13)) or more"; done >text
"$NODE" data --out corpus --sequence 32 text >data.log || fail data
model=(--set model.layers=2 --set model.width=32 --set model.heads=4 --set model.kv_heads=2 --set model.ffn=64 --set model.sequence=32
    --set inner.batch=4 --set outer.inner_steps=10 --set outer.silence_seconds=4 --set outer.grace_seconds=1 --set outer.chunk_elements=4096)
"$COORDINATOR" init first --corpus corpus "${model[@]}" --set outer.quorum=3 --set outer.checkpoint_rounds=3 --set outer.fragments=2 \
    --set checkpoint.url="$store" >init.log 2>&1 || fail init
WRAP= start_coordinator first "$(free_port)"
for n in one two three four; do start_node $n first; done
published() { grep -c 'is published' coordinator.log; }
for _ in $(seq 600); do [ "$(published)" -ge 2 ] && break; sleep 0.1; done
check "two checkpoints are published" test "$(published)" -ge 2
at=$(status first round)
check "and more is committed after them" wait_for 60 first "round > $at"
children=$(pgrep -P "${PID[coordinator]}")
for n in one two three four coordinator; do kill_now $n; done
kill -KILL $children 2>/dev/null
"$COORDINATOR" ledger show first --json >first.ledger || fail "ledger show"
at() { "$NODE" inspect "$store" --json | python3 -c 'import json, sys; print(json.load(sys.stdin)'"$1"')'; }
index=$(at '["checkpoint"]["index"]') where=$(at '["where"]')
rm -rf first one two three four
case $where in */store/step-* | s3://resume/run/step-*) ;; *) fail "the checkpoint lies at $where" ;; esac

# ---- the second part
mv coordinator.log first.log
"$COORDINATOR" init second --corpus corpus "${model[@]}" --set outer.quorum=2 --from "$where" >init2.log 2>&1 || fail "init --from"
check "init says where the data goes on: $(grep '^data' init2.log)" grep -q '^data  *goes on .*: [1-9][0-9]* of' init2.log
# One step alone on each mesh: its loss is that of the loaded model, on the same samples.
for tp in 1 2; do "$NODE" train second/run.yaml --out tp$tp --tp $tp --threads 1 --quiet --stop-after 1 --set inner.batch=64 >train$tp.log 2>&1 || fail "train --tp $tp"; done
check "the loaded model has the same loss at TP 1 and TP 2" python3 - <<'END'
import csv
loss = [float(next(csv.DictReader(open("tp%d/loss.csv" % tp)))["loss"]) for tp in (1, 2)]
off = abs(loss[0] - loss[1]) / loss[0]
print("loss %.9g at TP 1, %.9g at TP 2: relative difference %.1e" % (*loss, off))
raise SystemExit(not (off < 1e-6 and loss[0] < 5.0)) # trained, not from the seed: ln 256 = 5.5
END
WRAP= start_coordinator second "$(free_port)"
for n in five six; do start_node $n second --tp 2; done
check "two nodes of two ranks go on" wait_for 60 second 'round >= 1'
check "as what they were asked to be" grep -q '2 ranks, tensor-parallel 2' five.log
check "until the samples are used up" wait_for 200 second 'phase == "complete"'
"$COORDINATOR" ledger verify second >verify.log || fail verify
"$COORDINATOR" ledger show second --json >second.ledger || fail "ledger show"
check "of all samples each is spent once, in one of the parts" python3 - "$index" corpus/corpus.json <<'END'
import collections, json, sys
spent, index = collections.Counter(), int(sys.argv[1])
first, second = ([json.loads(l) for l in open(n + ".ledger")] for n in ("first", "second"))
def take(entries, last=None):
    n = 0
    for e in entries:
        if e["kind"] == "commit" and (last is None or e["index"] <= last):
            for start, count in e["body"]["spent"]:
                spent.update(range(start, start + count)); n += count
    return n
before, after = take(first, index), take(second)
carried = sum(c for _, c in second[0]["body"]["spent"])
samples = sum(f["samples"] for f in json.load(open(sys.argv[2]))["files"])
print(before, "spent up to the checkpoint,", carried, "taken over,", after, "after it, of", samples)
raise SystemExit(not (before == carried and 0 < before < samples and len(spent) == samples and set(spent.values()) == {1}))
END
echo "all as expected"
