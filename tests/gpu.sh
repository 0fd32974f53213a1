#!/bin/bash
# tests/gpu.sh - prove the CUDA backend on this machine's GPU: from a build (`make gpu`), or as libexec/gpu.sh of the
# bundle on a machine that has a driver and cuBLASLt and nothing else of ours.
#   PART=parity    every kernel against the CPU's, the outer step's to the bit, attention with cuDNN and without; twice the same bits; a network's loss, steps of training against the CPU; ranks
#   PART=sanitize  the kernels, of bf16 too, under compute-sanitizer's memcheck and racecheck, where that is
#   PART=run       a coordinator and two nodes on the one GPU: rounds are committed, all members agree
#   PART=bench     training steps of 150m, 1b and as many layers of 8b and 10b as fit
#   PART=all       (default) parity, bench, run, sanitize. Each under 8 minutes.
#   DEVICE=cuda:N  which GPU (default cuda:0)    OUT=DIR  where results go (default docs/gpu, or ./gpu-results)
#   LIMIT=SECONDS  for all of it: what has no time left is skipped, and says so. Whoever has the GPU for ten minutes takes 570.
# What is found is kept there as it is found, row by row, with the end of what a failing program said, so that nothing is lost
# when the machine is. Closes with a table; exit status 0: all parts passed or, where the machine refuses a tool, were skipped with a reason.
set -u
here=$(cd "$(dirname "$0")" && pwd)
if [ -x "$here/../bin/intellect-node" ]; then
    bin=$(cd "$here/../bin" && pwd) tests=$here bench=$here/bench-train data=$here out=${OUT:-$PWD/gpu-results}
else
    data=$(cd "$here/.." && pwd)
    bin=$(cd "$data" && cd "${BUILD:-build}" && pwd) tests=$bin/tests bench=$bin/bench-train out=${OUT:-$data/docs/gpu}
    export INTELLECT_CUDA_PLUGIN=${INTELLECT_CUDA_PLUGIN:-$bin/libintellect-cuda.so} # for the programs in tests/
fi
node=$bin/intellect-node coordinator=$bin/intellect-coordinator device=${DEVICE:-cuda:0} part=${PART:-all}
case $part in parity | sanitize | run | bench | all) ;; *) echo "gpu: PART is '$part'; one of parity, sanitize, run, bench, all" >&2; exit 2 ;; esac
work=$(mktemp -d "${TMPDIR:-/tmp}/gpu.XXXXXX")
declare -A pid
clean() {
    local p
    for p in "${pid[@]}"; do kill -TERM "$p" 2>/dev/null; done
    for p in "${pid[@]}"; do wait "$p" 2>/dev/null; done
    rm -rf "$work"
}
trap clean EXIT
trap 'exit 130' INT TERM

timeout -k 5 60 "$node" doctor --device "$device" --precision bf16 --no-listen --home "$work/home" --json >"$work/doctor.json" 2>"$work/doctor.err"
if ! grep -q '"backend": "cuda"' "$work/doctor.json"; then
    echo "gpu: no GPU: $(sed -n '/"device"/,/}/s/.*"text": "\(.*\)".*/\1/p' "$work/doctor.json" | head -n 1)$(cat "$work/doctor.err")"
    exit 1
fi
what=$(sed -n 's/.*"text": "computes on \(.*\)",*$/\1/p' "$work/doctor.json" | head -n 1)
driver=$(sed -n 's/.*"driver": "\(.*\)",*$/\1/p' "$work/doctor.json" | head -n 1)
echo "$what; driver ${driver:-unknown}; $("$node" --version)"
mkdir -p "$out" || exit 1
name=$out/$(date -u +%Y-%m-%d)-$(sed -n 's/, cuDNN [0-9.]*//; s/^[^,]*, \([^(]*[^ (]\) *(.*/\1/p' <<<"$what" | tr ' /' '--' | tr -cd 'A-Za-z0-9-')-$part
rm -f "$name.log"
table=() failed=0 began=$SECONDS deadline=$((SECONDS + ${LIMIT:-1000000}))
keep() { # all that is known so far
    {
        echo "# $what"; echo; echo "$(date -u +%Y-%m-%d), driver ${driver:-unknown}, $("$node" --version), $((SECONDS - began)) s."; echo; echo '```'
        printf '%s\n' "${table[@]}"
        [ ! -s "$work/bench.log" ] || { echo; cat "$work/bench.log"; }
        echo '```'
    } >"$name.md"
    cat "$work"/*.fp32.json "$work"/*.bf16.json "$work"/*:own-attention.json 2>/dev/null | tr -d '\n' | sed 's/\]\[/,/g' >"$work/bench.json"
    {
        echo "{ \"doctor\": $(cat "$work/doctor.json"),"
        [ ! -s "$work/bench.json" ] || echo "  \"bench\": $(cat "$work/bench.json"),"
        echo "  \"failed\": $failed }"
    } >"$name.json"
}
row() { # row PART WHAT VERDICT TEXT [LOG: of what failed, whose end is kept]
    table+=("$(printf '%-9s %-34s %-7s %s' "${@:1:4}")")
    printf '%-9s %-34s %-7s %s\n' "${@:1:4}"
    if [ "$3" = FAILED ]; then
        failed=$((failed + 1))
        [ $# -lt 5 ] || { echo "==== $1, $2"; tail -c 20000 "$work/$5"; } >>"$name.log" 2>&1
    fi
    keep
}
left() { local l=$((deadline - SECONDS)); [ $l -lt "$1" ] && echo $l || echo "$1"; }
has_time() { # has_time PART WHAT SECONDS: a row where not
    [ "$(left "$3")" = "$3" ] || { row "$1" "$2" skipped "no time left"; return 1; }
}
logged() { # logged LOG LIMIT COMMAND...
    local log=$work/$1 limit; limit=$(left "$2"); shift 2
    [ "$limit" -gt 0 ] || { echo "no time left" >"$log"; return 124; }
    timeout -k 5 "$limit" "$@" >"$log" 2>&1
    local rc=$?
    case $rc in 124 | 137) echo "not done in $limit s" >>"$log" ;; esac
    return $rc
}
worst() { grep -aE 'is .*should be|FAILED|rror|not done in|failed to run' "$work/$1" | head -n 2 | tr '\n' ' ' | cut -c1-200; }

# ---- parity ------------------------------------------------------------------------------------------------------
settings() { # the corpus of this machine's own making, and a network of about a million parameters
    local i
    [ -f "$work/run.yaml" ] && return
    for i in $(seq 20000); do echo "line $((i * i % 7919)) of a text to train on, $((i % 13)) or more, $((i * 7 % 101)) times"; done >"$work/text"
    "$node" data --out "$work/corpus" --sequence 128 --heldout 0.02 "$work/text" >"$work/data.log" || return 1
    cat >"$work/run.yaml" <<Y
model: {layers: 4, width: 128, heads: 4, kv_heads: 2, ffn: 384, vocabulary: 256, sequence: 128}
corpus: {manifest: $work/corpus}
inner: {batch: 8, total_tokens: 204800}
Y
}
train() { # train NAME [options]
    local name=$1; shift
    logged "$name.log" 200 "$node" train "$work/run.yaml" --out "$work/$name" --quiet "$@"
}
# farthest A B BOUND: of two curves of 200 steps; prints it, fails over BOUND or where a step is missing
farthest() {
    awk -F, -v bound="$3" 'NR == FNR { a[$1] = $3; next }
        FNR > 1 { d = $3 / a[$1] - 1; if (d < 0) d = -d; if (!(d <= most)) most = d; n++ }
        END { printf "%.2g of the loss at most, %d steps", most, n; exit !(n == 200 && most <= bound) }' "$1" "$2"
}
run_parity() {
    local t text cudnn
    # The second with cuDNN's attention, where it is, and without.
    for t in test_kernels:1 test_outer_cuda:1 test_cuda:1 test_bf16:1 test_bf16:0; do
        cudnn=${t#*:} t=${t%:*} text=
        [ "$cudnn" = 1 ] || text=", own attention"
        has_time parity "$t$text" 20 || continue
        if (cd "$data" && INTELLECT_TEST_GPU=1 INTELLECT_CUDNN=$cudnn CMOCKA_MESSAGE_OUTPUT=STDOUT logged $t.log 120 "$tests/$t"); then
            row parity "$t$text" ok "$(grep -ac '^\[       OK \]' "$work/$t.log") tests"
        else row parity "$t$text" FAILED "$(worst $t.log)" $t.log; fi
    done
    settings || { row parity corpus FAILED "$(cat "$work/data.log")"; return; }
    for p in fp32 bf16; do
        has_time parity "200 steps of training, $p" 30 || continue
        if train cpu-$p --device cpu --precision $p && train gpu-$p --device "$device" --precision $p; then
            text=$(farthest "$work/cpu-$p/loss.csv" "$work/gpu-$p/loss.csv" 0.01)
            row parity "200 steps of training, $p" "$([ $? = 0 ] && echo ok || echo FAILED)" "$text"
        else row parity "200 steps of training, $p" FAILED "$(tail -n 1 "$work/cpu-$p.log" "$work/gpu-$p.log" | tr '\n' ' ')" gpu-$p.log; fi
    done
    train again --device "$device" --precision bf16
    if cmp -s "$work/again/state" "$work/gpu-bf16/state"; then row parity "twice, bf16" ok "the same bits"
    else row parity "twice, bf16" FAILED "states differ" again.log; fi
    # Ranks: two on this device, which open each other's memory; and where there are two, one on each, with and without NCCL.
    local nccl
    has_time parity ranks 60 || return
    if train tp2 --device "$device" --precision bf16 --tp 2; then
        text=$(farthest "$work/gpu-bf16/loss.csv" "$work/tp2/loss.csv" 0.01)
        row parity "two ranks on one GPU" "$([ $? = 0 ] && echo ok || echo FAILED)" "$text"
    else row parity "two ranks on one GPU" FAILED "$(tail -n 1 "$work/tp2.log")" tp2.log; fi
    # ZeRO-3, whose ranks talk beside what they compute, and its bits beside those of ranks that share nothing out.
    if train dp2 --device "$device" --precision bf16 --dp 2 && train full --device "$device" --precision bf16 --dp 2 --shard full; then
        if cmp -s "$work/dp2/state" "$work/full/state"; then row parity "ZeRO-3 on one GPU" ok "the bits of no sharding"
        else row parity "ZeRO-3 on one GPU" FAILED "other bits than without sharding"; fi
    else row parity "ZeRO-3 on one GPU" FAILED "$(tail -n 1 "$work/dp2.log" "$work/full.log" 2>/dev/null | tr '\n' ' ')" full.log; fi
    for nccl in 0 1; do
        if INTELLECT_NCCL=$nccl train each$nccl --device cuda:each --precision bf16 --tp 2; then
            text=$(farthest "$work/gpu-bf16/loss.csv" "$work/each$nccl/loss.csv" 0.01)
            row parity "two GPUs, NCCL $nccl" "$([ $? = 0 ] && echo ok || echo FAILED)" "$text"
        elif grep -q 'no CUDA device 1' "$work/each$nccl.log"; then row parity "two GPUs, NCCL $nccl" skipped "there is one"
        else row parity "two GPUs, NCCL $nccl" FAILED "$(tail -n 1 "$work/each$nccl.log")" each$nccl.log; fi
    done
}

# ---- sanitize ------------------------------------------------------------------------------------------------------
run_sanitize() {
    local tool test sanitizer log each
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer /usr/local/cuda/compute-sanitizer/compute-sanitizer 2>/dev/null | head -n 1)
    [ -n "$sanitizer" ] || { row sanitize compute-sanitizer skipped "is not on this machine"; return; }
    # What is bf16's alone, attention on tensor cores among it, is in test_cuda.
    for each in memcheck:test_kernels racecheck:test_kernels memcheck:test_cuda racecheck:test_cuda; do
        tool=${each%:*} test=${each#*:} log=${each/:/-}.log
        has_time sanitize "$tool, $test" 20 || continue
        (cd "$data" && INTELLECT_TEST_GPU=1 logged $log 115 "$sanitizer" --tool $tool --target-processes all --error-exitcode 9 "$tests/$test")
        case $? in
            0) row sanitize "$tool, $test" ok "$(grep -a 'ERROR SUMMARY\|RACECHECK SUMMARY' "$work/$log" | tail -n 1 | sed 's/=* *//')" ;;
            124 | 137) row sanitize "$tool, $test" skipped "not done in time; no finding so far: $(grep -ac '^\[       OK \]' "$work/$log") tests" ;;
            *) if grep -qaiE 'not supported|permission|unable to|profiler|debugger is not' "$work/$log"; then row sanitize "$tool, $test" skipped "$(grep -aiE 'not supported|permission|unable to|debugger' "$work/$log" | head -n 1)"
               else row sanitize "$tool, $test" FAILED "$(grep -a '=========' "$work/$log" | head -n 3 | tr '\n' ' ' | cut -c1-200)" $log; fi ;;
        esac
    done
}

# ---- run -----------------------------------------------------------------------------------------------------------
number() { "$coordinator" status "$work/run" --json 2>/dev/null | tr ',{' '\n\n' | sed -n "s/^ *\"$1\": \([0-9]*\).*/\1/p" | head -n 1; }
wait_for() { # wait_for SECONDS KEY AT_LEAST
    local end=$((SECONDS + $1)) n
    while [ $SECONDS -lt $end ]; do
        n=$(number "$2")
        [ "${n:-0}" -ge "$3" ] && return 0
        sleep 0.3
    done
    return 1
}
run_run() {
    local port n try
    has_time run "coordinator and two nodes" 90 || return
    settings || { row run corpus FAILED "$(cat "$work/data.log")"; return; }
    for try in 1 2 3 4 5 6 7 8 9; do
        port=$((20000 + RANDOM % 20000))
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    done
    "$coordinator" init "$work/run" --corpus "$work/corpus/corpus.json" --preset debug --set inner.total_tokens=100000000 \
        --set outer.inner_steps=20 --set outer.round_seconds=10 --set outer.silence_seconds=5 >"$work/init.log" 2>&1 ||
        { row run init FAILED "$(tail -n 1 "$work/init.log")"; return; }
    "$coordinator" serve "$work/run" --listen "127.0.0.1:$port" >"$work/coordinator.log" 2>&1 & pid[coordinator]=$!
    wait_for 30 term 1 || { row run serve FAILED "$(tail -n 1 "$work/coordinator.log")"; return; }
    for n in alice bob; do
        "$coordinator" invite "$work/run" --uses 1 2>/dev/null >"$work/$n.invite"
        "$node" join "@$work/$n.invite" --home "$work/$n" --name $n --device "$device" --precision bf16 >"$work/$n.log" 2>&1 & pid[$n]=$!
    done
    if wait_for "$(left 200)" commits 8; then row run "8 rounds of two nodes" ok "$(number tokens_committed) tokens committed"
    else row run "8 rounds of two nodes" FAILED "$(number commits) committed; $(tail -n 1 "$work/alice.log")" alice.log; fi
    grep -q 'trainer is ready.*CUDA' "$work/alice.log" && grep -q 'trainer is ready.*CUDA' "$work/bob.log" &&
        row run "both on the GPU" ok "" || row run "both on the GPU" FAILED "$(grep 'trainer' "$work/alice.log" | tail -n 1)"
    if [ "$(number root_mismatches)" = 0 ]; then row run "members agree" ok ""; else row run "members agree" FAILED "$(number root_mismatches) roots differ"; fi
    for n in alice bob coordinator; do kill -TERM "${pid[$n]}"; wait "${pid[$n]}" || row run "$n leaves in order" FAILED "exit status $?"; unset "pid[$n]"; done
}

# ---- bench ---------------------------------------------------------------------------------------------------------
run_bench() {
    local c name cudnn end=$((SECONDS + 450)) limit
    # What says most first, and one after the other, so that what was measured stays when one does not end in time. The kernels
    # of attention on tensor cores, which packed documents have, in cuDNN's place.
    for name in 1b.bf16 150m.bf16 8b.bf16 1b.bf16:own-attention 10b.bf16 150m.fp32; do
        c=${name%:*} cudnn=1 limit=$(left $((end - SECONDS)))
        [ "$name" = "$c" ] || cudnn=0
        [ $limit -gt 5 ] || { row bench $name skipped "no time left"; continue; }
        if INTELLECT_CUDNN=$cudnn logged $c.log $limit "$bench" --device "$device" --only $c --steps 3 --kernels --json "$work/$name.json"; then
            [ "$name" = "$c" ] || echo "$name:" >>"$work/bench.log"
            cat "$work/$c.log" >>"$work/bench.log"
            row bench $name ok "$(awk 'NR == 2 { print $3, "tokens/s,", $6, "of large products" }' "$work/$c.log")"
        elif grep -q 'not done in' "$work/$c.log"; then row bench $name skipped "not done in $limit s"
        else row bench $name FAILED "$(grep -a bench-train "$work/$c.log" | tail -n 1)" $c.log; fi
    done
    cat "$work/bench.log" 2>/dev/null
}

for p in parity bench run sanitize; do
    [ "$part" = all ] || [ "$part" = $p ] || continue
    run_$p
done
echo; printf '%s\n' "${table[@]}"; echo "kept: $name.md, $name.json$([ ! -e "$name.log" ] || echo ", $name.log")"
[ $failed -eq 0 ]
