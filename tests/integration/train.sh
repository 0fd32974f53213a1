#!/bin/bash
# `intellect-node train`: cut after any step, stopped by Ctrl-C, killed, or with a rank killed, a run goes on and
# ends with the bits of one that never stopped; whatever the mesh, its losses are the same.
set -u
cd "$(dirname "$0")/../.."
node=$PWD/${BUILD:-build}/intellect-node
dir=$(mktemp -d /tmp/train-XXXXXX)
cd "$dir" || exit 1
failed=0
trap 'rm -rf "$dir"' EXIT

ok() { printf 'ok: %s\n' "$1"; }
bad() { failed=$((failed + 1)); printf 'FAILED: %s\n' "$1"; }
check() { local what=$1; shift; if "$@"; then ok "$what"; else bad "$what"; fi; }
train() { timeout 100 "$node" train run.yaml --threads 1 --quiet "$@"; }
# The curve without what no rerun repeats.
curve() { cut -d, -f1-5 "$1/loss.csv"; }
same() { cmp "$1/state" "$2/state" && cmp <(curve "$1") <(curve "$2"); }
# expect STATUS "PATTERN" COMMAND...
expect() {
    local status=$1 pattern=$2 out rc
    shift 2
    out=$("$@" 2>&1 </dev/null)
    rc=$?
    if [ $rc -eq "$status" ] && grep -qE -- "$pattern" <<<"$out"; then ok "$* says $pattern"
    else bad "$*: exit status $rc, wanted $status and \"$pattern\": $out"; fi
}

for i in $(seq 3000); do echo "line $((i * i % 7919)) of a text to train on, $((i % 13)) or more"; done > text
"$node" data --out corpus --sequence 32 --heldout 0.05 text > data.log || exit 1
cat > run.yaml <<Y
model: {layers: 2, width: 32, heads: 8, kv_heads: 8, ffn: 64, vocabulary: 256, sequence: 32}
corpus: {manifest: corpus}
inner: {batch: 6, total_tokens: 5760}
Y

# 30 steps in one go, then one by one: every place to be cut at.
train --out whole > whole.log || bad "a run to its end: $(cat whole.log)"
for k in $(seq 30); do train --out cut --stop-after "$k" > cut.log || bad "step $k: $(cat cut.log)"; done
check "30 runs of one step are one of 30" same whole cut
train --out host --offload optimizer > host.log || bad "moments in the host's memory: $(cat host.log)"
check "moments in the host's memory change no bit" same whole host
check "the curve has a row a step" test "$(wc -l < whole/loss.csv)" -eq 31
expect 0 'ended after 30 of 30 steps, 5760 tokens; no step was left to do, held-out' train --out whole
cp -r cut again && rm again/state
expect 0 'ended after 30' train --out again
check "a run begun anew drops the rows it had" same whole again

# Enough of them to be stopped in the middle.
long() { train --set inner.total_tokens=960000 --save-steps 50 --stop-after 1000 "$@"; }
rows() { [ -f "$1/loss.csv" ] && wc -l < "$1/loss.csv" || echo 0; }
await_rows() { for _ in $(seq 1000); do [ "$(rows "$1")" -gt "$2" ] && return 0; sleep 0.02; done; return 1; }
background() { env --default-signal=HUP "$node" train run.yaml --threads 1 --quiet --set inner.total_tokens=960000 --save-steps 50 --stop-after 1000 "$@" & pid=$!; }

long --out one > one.log || bad "$(cat one.log)"
background --out killed > killed.log 2>&1
await_rows killed 120 || bad "no steps came"
{ kill -KILL $pid; wait $pid; } 2>/dev/null
check "it was killed on the way" test "$(rows killed)" -lt 1001
expect 0 'ended after 1000' long --out killed
check "killed and gone on: the same bits" same one killed

background --out stopped > stopped.log 2>&1
await_rows stopped 75
expect 1 'another process trains in' long --out stopped
kill -INT $pid; wait $pid
check "Ctrl-C ends it in order" grep -q '^stopped after' stopped.log
background --out stopped > stopped.log 2>&1
await_rows stopped 150
kill -HUP $pid; wait $pid
check "so does a terminal that goes" grep -q '^stopped after' stopped.log
expect 0 'ended after 1000' long --out stopped
check "stopped and gone on: the same bits" same one stopped

# Two ranks, one of which dies.
long --out two --dp 2 --shard optimizer > two.log || bad "$(cat two.log)"
background --out rank --dp 2 --shard optimizer > rank.log 2>&1
await_rows rank 75
read -r -a ranks < "/proc/$pid/task/$pid/children"
kill -KILL "${ranks[0]}"
wait $pid
check "a killed rank ends the run" test $? -eq 1
check "which names it" grep -q "rank 1 of 2 (process ${ranks[0]}) died" rank.log
expect 0 'ended after 1000' long --out rank --dp 2 --shard optimizer
check "and goes on with the same bits" same two rank

# Ranks that live and do not come: one of the children, and the first, for which another speaks.
background --out hung --dp 2 --shard full --silence 2 > hung.log 2>&1
await_rows hung 75
read -r -a ranks < "/proc/$pid/task/$pid/children"
kill -STOP "${ranks[0]}"
wait $pid
check "a rank that hangs ends the run" test $? -eq 1
check "which names it, and its step" grep -qE "rank 1 of 2 \(process ${ranks[0]}\) says nothing for 2 s, at step [0-9]+: it is stopped" hung.log
check "and is ended with it" test ! -e "/proc/${ranks[0]}"
background --out hung --dp 2 --shard full --silence 2 > hung.log 2>&1
await_rows hung 250
kill -STOP $pid
for _ in $(seq 100); do grep -q "rank 0 of 2" hung.log && break; sleep 0.1; done
check "another rank says that the first one hangs" grep -qE "rank 0 of 2 \(process $pid\) says nothing for 2 s, at step [0-9]+: it is stopped" hung.log
kill -CONT $pid
wait $pid
check "which ends when it goes on" test $? -eq 1
expect 0 'ended after 1000' long --out hung --dp 2 --shard full
check "and it all goes on with the same bits" same two hung
check "one process and two lose the same" python3 - <<'P'
import csv
a, b = ([float(r["loss"]) for r in csv.DictReader(open(d + "/loss.csv"))] for d in ("one", "two"))
worst = max(abs(x - y) for x, y in zip(a[:200], b[:200])) # later on rounding has its own way
print("worst difference of 200 losses:", worst)
raise SystemExit(not (len(a) == len(b) == 1000 and worst < 1e-4 and a[-1] < a[0] - 1))
P
check "cut four ways and two ways: to rounding" python3 - <<P
import csv, subprocess
def losses(name, *how):
    subprocess.run(["$node", "train", "run.yaml", "--threads", "1", "--quiet", "--out", name, *how], check=True)
    return [float(r["loss"]) for r in csv.DictReader(open(name + "/loss.csv"))]
a, b = losses("whole"), losses("tp", "--tp", "4", "--dp", "2", "--shard", "full")
print("worst difference:", max(abs(x - y) for x, y in zip(a, b)))
raise SystemExit(not (len(a) == len(b) == 30 and max(abs(x - y) for x, y in zip(a, b)) < 1e-5))
P
expect 0 'ended after 1000' long --out two --plot loss.svg
expect 1 '^intellect-node train: --plot no/where.svg: No such file' train --out none --plot no/where.svg
check "which is said before anything begins" test ! -e none
expect 0 'held-out' train --out drawn --stop-after 2 --plot drawn/loss.svg
check "a picture may go into the new folder" test -s drawn/loss.svg
check "the curve is drawn" python3 -c 'import xml.dom.minidom as m; assert len(m.parse("loss.svg").getElementsByTagName("polyline")) == 2'

# The model that came out, for the other tools and for another run.
of_json() { python3 -c 'import json, sys; print(json.load(sys.stdin)["'"$1"'"])'; }
near() { awk -v a="$1" -v b="$2" -v most="$3" 'BEGIN { d = a - b; exit !(a > 0 && d < most && -d < most) }'; }
heldout=$(train --out whole --heldout 1000 --json | of_json heldout)
check "the model has the held-out loss of training" near "$("$node" eval whole/model --corpus corpus --threads 1 --json | of_json loss)" "$heldout" 1e-6
heldout=$(train --out tp --tp 4 --dp 2 --shard full --heldout 1000 --json | of_json heldout)
check "that of eight ranks too" near "$("$node" eval tp/model --corpus corpus --threads 1 --json | of_json loss)" "$heldout" 1e-6
expect 0 'line' "$node" generate whole/model --prompt 'a line' --tokens 4 --seed 1
printf 'corpus: {manifest: corpus}\ninner: {batch: 6, total_tokens: 5760, lr: 1e-9}\n' > next.yaml
next() { timeout 100 "$node" train next.yaml --threads 1 --quiet "$@"; }
check "the next run begins with it, and with its network" near "$(next --from tp/model --out next --heldout 1000 --json | of_json heldout)" "$heldout" 1e-4
expect 2 'other shapes than section' train --from tp/model --out new --set model.ffn=128
expect 1 'no/model' next --from no/model --out new

# To a Hugging Face folder in bf16, in several files, and back; what is not finite is refused.
check "a model in bf16" "$node" export whole/model half --weights bf16 --file-gb 0.00005
check "in several files" [ -e half/model-00003-of-0000*.safetensors ]
check "it is half as large" python3 -c 'import glob, os; a, b = [sum(map(os.path.getsize, glob.glob(d + "/*.safetensors"))) for d in ("half", "whole/model")]; assert b / 2 < a < 0.7 * b'
check "back in fp32, in one" "$node" import half back
check "it is the same model, rounded" near "$("$node" eval back --corpus corpus --threads 1 --json | of_json loss)" "$("$node" eval whole/model --corpus corpus --threads 1 --json | of_json loss)" 1e-2
check "and that of bf16, exactly" [ "$("$node" eval back --corpus corpus --threads 1)" = "$("$node" eval half --corpus corpus --threads 1)" ]
expect 1 'has ".*" in it; give a new or empty folder' "$node" import half back
printf '\x00\x00\xc0\x7f' | dd of=back/model-00001-of-00001.safetensors bs=1 seek=40000 conv=notrunc 2>/dev/null
expect 1 'element [0-9]* of model.*weight is nan' "$node" import back worse
check "nothing is left of it" [ ! -e worse ]
sed -i 's/"silu"/"gelu"/' half/config.json
expect 1 'hidden_act' "$node" import half worse

# Another optimizer, states of fewer bits, less room for activations: cut anywhere all the same.
other() { train --set inner.optimizer=muon --set inner.states=8bit --dp 2 --shard optimizer --activations 0.0003 "$@"; }
other --out other-whole --stop-after 20 > other.log || bad "muon, 8 bits: $(cat other.log)"
for k in 3 11 20; do other --out other-cut --stop-after "$k" > other.log || bad "muon, 8 bits, step $k: $(cat other.log)"; done
check "Muon with moments of 8 bits goes on where it was cut" same other-whole other-cut

# Whoever doubts a step computes it again; where something else comes out, the place is named.
kept() { train --out kept --dp 2 --set inner.optimizer=muon --set inner.states=bf16 "$@"; }
kept --keep --save-steps 5 --stop-after 11 > kept.log || bad "states kept: $(cat kept.log)"
check "states are kept" [ -e kept/state-5 -a -e kept/state-10 -a -e kept/state-11 ]
cp -r kept kept-before
for step in 5 10 11; do expect 0 "step $step: the same bits again" kept --replay $step; done
check "a replay changes nothing" diff -r kept kept-before
expect 1 'what step 7 came to is not known' kept --replay 7
printf 'X' | dd of=kept/state-5 bs=1 seek=60001 conv=notrunc 2>/dev/null
expect 1 'element [0-9]*: .*, in .*state-5' kept --replay 5
expect 1 'does not have the digest' kept --replay 10

# What a person gets wrong.
expect 2 'inner.lr is 0.5 .*take another folder' train --out whole --set inner.lr=0.5
expect 2 'run.yaml|--set.*inner.batch' train --out new --set inner.batch=none
expect 2 'wsd, cosine and constant' train --out new --set inner.schedule=linear
expect 2 'adamw and muon' train --out new --set inner.optimizer=sgd
expect 2 'fp32, bf16 and 8bit' train --out new --set inner.states=int4
expect 2 'model.sequence' train --out new --set model.sequence=16
expect 2 "shard is 'some'; allowed are none, optimizer, gradients, full" train --out new --shard some
expect 2 'dp.*from 1 to 64' train --out new --dp 0
expect 2 '3 tensor-parallel ranks cannot share .* 8 heads' train --out new --tp 3
expect 1 'no/such/folder' train --out no/such/folder/new
printf 'X' | dd of=cut/state bs=1 seek=5000 conv=notrunc 2>/dev/null
expect 1 'digest' train --out cut
sed -i 's/square/circle/; s/line 1 /line X /' text && "$node" data --out corpus --sequence 32 --heldout 0.05 text > data.log
expect 2 'another corpus' train --out whole

[ $failed -eq 0 ] && echo "all as expected"
exit $((failed > 0))
