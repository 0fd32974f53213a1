#!/bin/bash
# `--device`: a run on the CUDA backend loses what one on the CPU loses, alone and as a member; auto says what it
# took and why; what cannot be is refused before anything is made. The GPU is the emulator, or with GPU=1 a real one.
set -u
cd "$(dirname "$0")/../.."
. tests/lib.sh
[ -n "${GPU:-}" ] || export INTELLECT_CUDA_PLUGIN=$BUILD/emulator/libintellect-cuda.so
failed=0
ok() { printf 'ok: %s\n' "$1"; }
bad() { failed=$((failed + 1)); printf 'FAILED: %s\n' "$1"; }
check() { local what=$1; shift; if "$@"; then ok "$what"; else bad "$what"; fi; }
# expect STATUS "PATTERN" COMMAND...
expect() {
    local status=$1 pattern=$2 out rc
    shift 2
    out=$("$@" 2>&1 </dev/null)
    rc=$?
    if [ $rc -eq "$status" ] && grep -qE -- "$pattern" <<<"$out"; then ok "${*/#$BUILD\//} says $pattern"
    else bad "$*: exit status $rc, wanted $status and \"$pattern\": $out"; fi
}
with() { local -x "${1?}"; shift; "$@"; }
cd "$W" || exit 1

for i in $(seq 600); do echo "line $((i * i % 7919)) of a text to train on, $((i % 13)) or more"; done >text
"$NODE" data --out corpus --sequence 16 --heldout 0.05 text >data.log || exit 1
cat >run.yaml <<Y
model: {layers: 2, width: 16, heads: 4, kv_heads: 2, ffn: 32, vocabulary: 256, sequence: 16}
corpus: {manifest: $W/corpus/corpus.json}
inner: {batch: 2, total_tokens: 160}
Y
train() { timeout 120 "$NODE" train run.yaml --threads 1 --heldout 0 "$@"; }
for precision in fp32 bf16; do
    for device in cpu cuda; do
        train --device $device --precision $precision \
            --out $precision-$device >$precision-$device.log 2>&1 || bad "train: $(cat $precision-$device.log)"
    done
    check "5 steps in $precision: the same losses within rounding" \
        awk -F, -v bound=$([ $precision = fp32 ] && echo 1e-5 || echo 1e-2) 'NR == FNR { loss[$1] = $3; next }
        FNR > 1 { d = $3 / loss[$1] - 1; if (d < 0) d = -d; if (!(d <= bound)) { print "step", $1, loss[$1], $3; wrong = 1 }; rows++ }
        END { exit wrong || rows != 5 }' $precision-cpu/loss.csv $precision-cuda/loss.csv
done
# Several ranks on the one device, which open each other's memory: the bits of a run are those of ranks on CPUs, but for
# what the kernels round, and those of the same run once more.
for mesh in "--tp 2" "--dp 2 --shard full" "--tp 2 --dp 2 --shard optimizer --precision bf16"; do
    name=mesh${mesh//[^0-9a-z]/}
    for device in cpu cuda; do
        train --device $device $mesh --out $name-$device >$name-$device.log 2>&1 || bad "train $mesh: $(cat $name-$device.log)"
    done
    check "5 steps of $mesh: the same losses within rounding" \
        awk -F, -v bound=$([[ $mesh = *bf16 ]] && echo 1e-2 || echo 1e-5) 'NR == FNR { loss[$1] = $3; next }
        FNR > 1 { d = $3 / loss[$1] - 1; if (d < 0) d = -d; if (!(d <= bound)) { print "step", $1, loss[$1], $3; wrong = 1 }; rows++ }
        END { exit wrong || rows != 5 }' $name-cpu/loss.csv $name-cuda/loss.csv
    train --device cuda $mesh --out $name-again >$name-again.log 2>&1
    check "$mesh twice: the same bits" cmp $name-again/state $name-cuda/state
done
expect 0 'a trainer of 2 ranks takes one where' train --dp 2 --out on-cpu
if [ -z "${GPU:-}" ]; then
    for nccl in 0 1; do
        EMULATOR_DEVICES=2 INTELLECT_NCCL=$nccl LD_LIBRARY_PATH=$BUILD/emulator FAKE_NCCL_LOG=$W/nccl$nccl \
            train --device cuda:each --tp 2 --out each$nccl >each$nccl.log 2>&1 || bad "cuda:each: $(cat each$nccl.log)"
        check "a rank on each of two devices, NCCL $nccl: the same bits" cmp each$nccl/state meshtp2-cuda/state
    done
    check "without NCCL it is not called" test ! -e nccl0
    check "with it, by both ranks, as often" test "$(grep -c '^0/2 reduce_scatter' nccl1)" = "$(grep -c '^1/2 reduce_scatter' nccl1)" -a \
        "$(grep -c 'reduce_scatter' nccl1)" -gt 10 -a "$(grep -c destroy nccl1)" = 2
    expect 2 'rank 1: there is no CUDA device 1; 1 are here' train --device cuda:each --tp 2 --out none
    expect 1 'CUDA device 0: memory cannot be shown to another process' with EMULATOR_IPC=0 train --device cuda --tp 2 --out none2
    expect 1 'CUDA device 0: .*launch failure' with EMULATOR_LAUNCHES=100 train --device cuda --tp 2 --out lost-ranks
fi
check "it says on what" grep -q 'CUDA 13.*fp32' fp32-cuda.log
expect 0 'CUDA 13' train --device auto --out again
check "twice the same bits" cmp again/state fp32-cuda/state
expect 0 'ended after 5' train --device cpu --threads 1 --out fp32-cuda
expect 0 'no GPU: .*/nowhere.so' with INTELLECT_CUDA_PLUGIN=/nowhere.so train --out without
expect 1 '/nowhere.so' with INTELLECT_CUDA_PLUGIN=/nowhere.so train --device cuda --out none
expect 2 'auto, cpu, cuda, cuda:N.*cuda:each' train --device gpu --out none
if [ -z "${GPU:-}" ]; then
    expect 2 'no CUDA device 3; 1 are here' train --device cuda:3 --out none
    expect 1 'driver is for CUDA 12.4, this plugin for CUDA 13.0: update' with EMULATOR_DRIVER=12040 train --device cuda --out none
fi

head -c 600 text >short
# A checkpoint, evaluated and continued on both.
checkpoint=$OLDPWD/tests/reference/llama-hf
for device in cpu cuda; do
    "$NODE" eval $checkpoint --text short --device $device --json >eval-$device.json || bad "eval on $device"
    "$NODE" generate $checkpoint --prompt once --tokens 20 --temperature 0 --device $device >text-$device || bad "generate on $device"
done
loss_of() { sed -n 's/.*"loss": \([0-9.]*\).*/\1/p' eval-$1.json; }
check "eval: the same loss" awk -v a="$(loss_of cpu)" -v b="$(loss_of cuda)" 'BEGIN { d = a - b; exit !(a > 0 && d < 1e-4 && d > -1e-4) }'
check "generate: the same text" cmp text-cpu text-cuda

# A member on a GPU beside one on the CPU: rounds are committed, and both have the same anchor.
port=$(free_port)
mkdir run
sed 's/total_tokens: 160/total_tokens: 100000000/' run.yaml >run/run.yaml
echo 'outer: {inner_steps: 5, round_seconds: 5, quorum: 2, grace_seconds: 5, silence_seconds: 4}' >>run/run.yaml
"$COORDINATOR" init run >init.log 2>&1 || fail "init: $(cat init.log)"
start_coordinator run "$port"
start_node gpu run --device cuda
start_node cpu run --device cpu
check "3 rounds are committed by both" wait_for 100 run 'commits >= 3'
check "the trainer says on what" grep -q 'trainer is ready.*CUDA' gpu.log
check "members agree" test "$(status run root_mismatches)" = 0

# A device that is lost: what it is said to have died of, other tries, the end in order; the others go on.
if [ -z "${GPU:-}" ]; then
    with EMULATOR_LAUNCHES=300 start_node lost run --device cuda
    for _ in $(seq 600); do kill -0 "${PID[lost]}" 2>/dev/null || break; sleep 0.1; done
    wait "${PID[lost]}"
    check "a node whose device is lost ends" test $? -eq 1
    check "after three tries" grep -q 'the device failed 3 times and is given up: CUDA device 0: .*launch failure' lost.log
    check "each of which said why" test "$(grep -c 'the device failed: CUDA device 0: .*launch failure' lost.log)" -eq 3
    unset "PID[lost]"
    commits=$(status run commits)
    check "the others go on" wait_for 60 run "commits > $commits"
    check "and agree" test "$(status run root_mismatches)" = 0
    expect 1 'CUDA device 0: .*launch failure' with EMULATOR_LAUNCHES=100 train --device cuda --out lost-alone
fi
[ $failed -eq 0 ] && echo "all as expected"
exit $((failed > 0))
