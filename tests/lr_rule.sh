#!/bin/bash
# What should the outer learning rate do when contributors vanish or appear? Half of them leave for the middle third of the tokens, and come
# back; held-out loss in nats per byte, mean over the seeds: four outer steps after each change, and at the end of each phase, by rule.
# One process trains all replicas (build/outer-lab); the result is in docs/results.md.
#
#   tests/lr_rule.sh [SEED ...]   seeds: 1 2 3
#   PHASES="8,4,8" (several, with spaces between) RULES="constant sqrt linear" TOKENS=600000 LAB="options of outer-lab" CORPUS=folder (made where not given)
cd "$(dirname "$0")/.." || exit 1
. tests/lib.sh
[ -x "$BUILD/outer-lab" ] || fail "make $BUILD/outer-lab first"
LAB=${LAB:---width 64 --ffn 240 --heads 2 --kv-heads 1 --batch 1 --lr 1.5e-3 --outer-lr 1 --momentum 0.5}
[ -n "${CORPUS:-}" ] || { CORPUS=$W/corpus; corpus "$CORPUS" --sequence 128 >"$W/data.log" 2>&1 || fail "$(tail -n 1 "$W/data.log")"; }
for phases in ${PHASES:-8,4,8}; do
    for seed in ${@:-1 2 3}; do
        for rule in ${RULES:-constant sqrt linear}; do
            # shellcheck disable=SC2086
            line=$("$BUILD/outer-lab" --corpus "$CORPUS" $LAB --tokens "${TOKENS:-600000}" --phases "$phases" --rule "$rule" --seed "$seed") ||
                fail "outer-lab: $phases $rule $seed"
            echo "$phases $rule $seed $line" | tee -a "$W/lines" >&2
        done
    done
done
python3 - "$W/lines" <<'END'
import json, sys
rows = {}
for line in open(sys.argv[1]):
    phases, rule, seed, result = line.split(maxsplit=3)
    r = [x[k] for x in json.loads(result)["phases"] for k in ("soon", "end")][1:]
    rows.setdefault((phases, rule), []).append(r)
print("| contributors | rule | before | 4 steps after the loss | end of the loss | 4 steps after the return | end |\n|---|---|---|---|---|---|---|")
for (phases, rule), r in rows.items():
    print("| %s | %s | %s |" % (phases.replace(",", " → "), rule, " | ".join("%.4f" % (sum(c) / len(c)) for c in zip(*r))))
END
