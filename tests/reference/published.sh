#!/bin/bash
# published.sh VENV: a run on loopback publishes a checkpoint with bf16 weights and one with fp32; transformers opens each
# folder as it is, and its logits are those of `intellect-node eval` within 1e-4. VENV is what venv.sh made.
cd "$(dirname "$0")/../.." || exit 1
. tests/lib.sh
venv=$(cd "$1" && pwd)
corpus "$W/corpus" --sequence 128 >"$W/data.log" 2>&1 || fail "data: $(tail -n 1 "$W/data.log")"
text=$(dirname "$(dpkg -L perl-doc | grep -m1 '/perlfaq1\.pod$')")/perlfaq1.pod
for weights in bf16 fp32; do
    R=$W/$weights
    "$COORDINATOR" init "$R" --corpus "$W/corpus/corpus.json" --preset debug --set outer.inner_steps=20 --set outer.quorum=1 \
        --set outer.grace_seconds=0.5 --set outer.checkpoint_rounds=5 --set checkpoint.weights=$weights >"$W/init.log" 2>&1 ||
        fail "init: $(tail -n 1 "$W/init.log")"
    start_coordinator "$R" "$(free_port)"
    start_node "$weights-node" "$R"
    for _ in $(seq 1200); do [ -f "$R/checkpoints/latest" ] && break; sleep 0.1; done
    [ -f "$R/checkpoints/latest" ] || fail "no checkpoint with $weights"
    kill -TERM "${PID[$weights-node]}" "${PID[coordinator]}"; wait "${PID[$weights-node]}" "${PID[coordinator]}"
    folder=$(ls -d "$R"/checkpoints/step-* | head -n 1)
    "$NODE" verify "$folder" && "$NODE" eval "$folder" --text "$text" --logits "$W/logits" || fail "eval"
    "$venv/bin/python" -B tests/reference/check_hf_folder.py "$folder" --text "$text" --logits "$W/logits" || fail "transformers, $weights"
done
