#!/bin/bash
# The main job on one machine: a coordinator and three nodes train a small model on real text; one node is
# killed in the middle of a round, a fourth joins, the coordinator is killed and restarted. Exit 0 only if
# nothing was lost. Two to five minutes on two cores.
cd "$(dirname "$0")/.." || exit 1
. tests/lib.sh
TOKENS=${TOKENS:-1500000}
say() { printf '%4d s  %s\n' $SECONDS "$*"; }
R=$W/run P=$(free_port)
SECONDS=0

say "corpus: the .pod manual pages of Debian's perl-doc"
corpus "$W/corpus" --sequence 128 >"$W/data.log" 2>&1 || fail "data: $(tail -n 1 "$W/data.log")"
"$COORDINATOR" init "$R" --corpus "$W/corpus/corpus.json" --preset debug --set inner.total_tokens="$TOKENS" \
    --set outer.inner_steps=40 --set outer.round_seconds=10 --set outer.grace_seconds=2 --set outer.silence_seconds=5 \
    --set outer.lr=0.9 --set outer.momentum=0.5 --set outer.checkpoint_rounds=3 >"$W/init.log" 2>&1 || fail "init: $(tail -n 1 "$W/init.log")"
start_coordinator "$R" "$P"
say "coordinator on 127.0.0.1:$P, run $(status "$R" 'run[:16]')"
for n in alice bob carol; do start_node $n "$R"; done
say "alice, bob and carol join"

killed= joined= restarted= last=-1
while :; do
    line=$(status "$R" '"%d %s %d %d %d" % (round, phase, members_live, tokens_committed, tokens_total)')
    read -r round phase live done total <<<"$line"
    if [ -n "$line" ] && [ "$round" != "$last" ]; then
        say "round $round: $done of $total tokens, $live members live"; last=$round
    fi
    [ "${phase:-}" = complete ] && break
    if [ "${round:-0}" -ge 3 ] && [ -z "$killed" ] && [ "$phase" = train ]; then
        kill_now bob; killed=$round; say "bob is killed (SIGKILL) in the middle of round $round"
    elif [ -n "$killed" ] && [ "${round:-0}" -ge 5 ] && [ -z "$joined" ]; then
        start_node dave "$R"; joined=$round; say "dave joins in round $round"
    elif [ -n "$joined" ] && [ "${round:-0}" -ge 8 ] && [ -z "$restarted" ]; then
        kill_now coordinator; restarted=$round; say "the coordinator is killed (SIGKILL) in round $round"
        sleep 3; start_coordinator "$R" "$P"; say "the coordinator is back, term $(status "$R" term)"
    fi
    [ $SECONDS -lt "${LIMIT:-1200}" ] || fail "not complete after $SECONDS s: $line"
    sleep 0.2
done
say "the run is complete"
for n in alice carol dave; do
    for _ in $(seq 100); do kill -0 "${PID[$n]}" 2>/dev/null || break; sleep 0.1; done
    wait "${PID[$n]}" || fail "$n ended with $?"
    unset "PID[$n]"
done
kill -TERM "${PID[coordinator]}"; wait "${PID[coordinator]}" || fail "the coordinator ended with $?"
unset "PID[coordinator]"

# ---- what came of it -------------------------------------------------------------------------------
ok=0
check() { if [ "$2" = True ]; then echo "  ok      $1"; else echo "  NOT OK  $1"; ok=1; fi; }
[ -n "$killed" ] && [ -n "$joined" ] && [ -n "$restarted" ] || fail "a fault did not take place"

echo; echo "loss on a held-out slice that no node ever trains on (nats per byte):"
bigram=$("$NODE" bigram "$W/corpus/corpus.json" --json | python3 -c 'import json,sys; print(json.load(sys.stdin)["loss"])')
printf '  %8s  %10s\n' tokens loss
loss= first=
show() { # show TOKENS CHECKPOINT [options]
    local at=$1; shift
    loss=$("$NODE" eval "$@" --corpus "$W/corpus/corpus.json" --json | python3 -c 'import json, sys; print("%.4f" % json.load(sys.stdin)["loss"])')
    [ -n "$first" ] || first=$loss
    printf '  %8d  %10s  %s\n' "$at" "$loss" "$(python3 -c "print('#' * round(10 * $loss))")"
}
for c in $(ls -d "$R"/checkpoints/step-* | sort -V); do
    [ -f "$c/manifest.sig" ] || continue
    [ -n "$first" ] || show 0 "$c" --untrained
    show "$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["tokens_committed"])' "$c/manifest.json")" "$c"
done
echo "  ln 256 = 5.5452, order-2 byte model = $bigram"
echo; echo "a sample:"; "$NODE" generate "$c" --prompt "The " --tokens 200 --seed 1 --temperature 0.7 | fold -sw 96 | sed 's/^/  | /'
echo; echo "tokens by node, from the ledger:"
"$COORDINATOR" ledger verify "$R" --json >"$W/ledger.json"; verified=$?
python3 - "$W/ledger.json" <<'PY'
import json, sys
l = json.load(open(sys.argv[1]))
for m in l["members"]:
    if m["tokens"]: print("  %-8s %9d  %s" % (m["name"], m["tokens"], "#" * (40 * m["tokens"] // max(1, l["tokens_committed"]))))
print("  %d entries, %d commits, %d samples spent" % (l["entries"], l["commits"], l["samples_spent"]))
PY
echo
digests=$(for n in alice carol dave; do anchor_digest "$W/$n/state/anchor"; done; anchor_digest "$R/aggregator/state/anchor")
[ "$(echo "$digests" | sort -u | wc -l)" = 1 ] && equal=True || equal=False
[ $equal = True ] && echo "anchors equal $(echo "$digests" | head -n 1)"
check "the anchors of alice, carol, dave and the coordinator's node are equal, byte for byte" $equal
check "the ledger verifies, every sample spent at most once" $([ $verified = 0 ] && echo True)
check "held-out loss fell from about ln 256 ($first) to $loss, clearly under the order-2 byte model's $bigram" \
    "$(python3 -c "print(abs($first - 5.5452) < 0.5 and $loss < 0.95 * $bigram)")"
check "the model has at least 1M parameters" "$(python3 -c "
import json, os; print(os.path.getsize('$R/aggregator/state/anchor') >= 4000000)")"
check "bob killed in round $killed, dave joined in round $joined, coordinator restarted in round $restarted" True
echo "  $SECONDS seconds from the first process to here"
exit $ok
