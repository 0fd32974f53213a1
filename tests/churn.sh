#!/bin/bash
# Four nodes for MINUTES (3): every 10 seconds a random process (a trainer, an agent, the aggregator, the
# coordinator) gets SIGKILL, or SIGSTOP for 8 seconds. Then: at least 10 rounds committed, all anchors equal, the
# ledger verifies, no sample spent twice, every reported root equal. SEED=N repeats the choices.
cd "$(dirname "$0")/.." || exit 1
. tests/lib.sh
RANDOM=${SEED:=$(date +%s)}
MINUTES=${MINUTES:-3} ROUNDS=${ROUNDS:-10}
say() { printf '%4d s  %s\n' $SECONDS "$*"; }
R=$W/run P=$(free_port) NODES="alice bob carol dave"
corpus "$W/corpus" --sequence 128 >"$W/data.log" 2>&1 || fail "data: $(tail -n 1 "$W/data.log")"
"$COORDINATOR" init "$R" --corpus "$W/corpus/corpus.json" --preset debug --set outer.inner_steps=8 --set outer.round_seconds=4 \
    --set outer.grace_seconds=1 --set outer.silence_seconds=4 --set outer.checkpoint_rounds=10 \
    >"$W/init.log" 2>&1 || fail "init: $(tail -n 1 "$W/init.log")"
start_coordinator "$R" "$P"
for n in $NODES; do start_node $n "$R"; done
wait_for 60 "$R" "round >= 1" || fail "no first round"
say "churn for $MINUTES minutes, SEED=$SEED"
SECONDS=0
alive() { [ -n "${PID[$1]:-}" ] && kill -0 "${PID[$1]}" 2>/dev/null; }

revive() { # what was killed is started again, as its owner's service manager would
    for n in $NODES; do alive $n || start_node $n "$R"; done
    alive coordinator || start_coordinator "$R" "$P"
}
victim() { # sets what, pid, and name for a child of ours
    local n=$(set -- $NODES; eval echo \${$((RANDOM % 4 + 1))})
    name=
    case $((RANDOM % 4)) in
        0) what="$n's trainer" pid=$(pgrep -P "${PID[$n]}" | head -n 1) ;;
        1) what="$n's agent" pid=${PID[$n]} name=$n ;;
        2) what="the aggregator" pid=$(pgrep -P "${PID[coordinator]}" | head -n 1) ;;
        3) what="the coordinator" pid=${PID[coordinator]} name=coordinator ;;
    esac
}
faults=0
while [ $SECONDS -lt $((60 * MINUTES)) ]; do
    victim
    if [ -n "$pid" ]; then
        if [ $((RANDOM % 2)) = 0 ]; then
            say "$(printf '%-18s SIGKILL' "$what") $(status "$R" '"(round %d, %d live)" % (round, members_live)')"
            if [ -n "$name" ]; then kill_now $name; else kill -KILL "$pid"; fi
            sleep 2; revive; sleep 8
        else
            say "$(printf '%-18s SIGSTOP' "$what") $(status "$R" '"(round %d, %d live)" % (round, members_live)')"
            kill -STOP "$pid" 2>/dev/null; sleep 8; kill -CONT "$pid" 2>/dev/null; sleep 2; revive
        fi
        faults=$((faults + 1))
    else sleep 1; revive; fi
done
say "$faults faults; now quiet"
settled='members_live >= 5 and len(set(m["state_index"] for m in members if m["live"])) == 1'
wait_for 60 "$R" "$settled" || fail "the members do not come together again: $("$COORDINATOR" status "$R")"
for _ in $(seq 20); do # nobody can commit once the coordinator stands still
    kill -STOP "${PID[coordinator]}"; sleep 2
    digests=$(for n in $NODES; do anchor_digest "$W/$n/state/anchor"; done; anchor_digest "$R/aggregator/state/anchor")
    kill -CONT "${PID[coordinator]}"
    [ "$(echo "$digests" | sort -u | wc -l)" = 1 ] && break
    sleep 1
done
rounds=$(status "$R" round) mismatches=$(status "$R" root_mismatches)
"$COORDINATOR" ledger verify "$R" || fail "the ledger does not verify"
[ "$(echo "$digests" | sort -u | wc -l)" = 1 ] || fail "anchors differ: $digests"
[ "${mismatches:-1}" = 0 ] || fail "$mismatches roots differed"
[ "${rounds:-0}" -ge "$ROUNDS" ] || fail "$rounds rounds committed, wanted $ROUNDS"
echo "churn: $faults faults, $rounds rounds committed, anchors equal $(echo "$digests" | head -n 1), no root differed, SEED=$SEED"
