#!/bin/bash
# Real processes under fire: every 10 seconds a random one (a trainer, an agent, the aggregator, the coordinator) gets
# SIGKILL, or SIGSTOP for 8 seconds, or a link is cut for 8 seconds. Then: enough rounds committed, all anchors equal, the
# ledger verifies, no sample spent twice, every reported root equal. At the end an account says where the tokens went:
# committed, of what trainers did train while they were up plus what they would have trained at their own rate in the time
# that they were up and idle (tests/account.py).
#
# Settings are for faults of this kind: a silence of 4 s, so that every stop and cut is a loss; short inner steps, so that
# six trainers on two busy cores still do one well within that silence; leases that last while a member is cut off.
#
#   MINUTES=3 NODES=4   how long, how many nodes train
#   MODE=diloco         outer.mode: diloco, streaming, decoupled, intellect1
#   NET=                1: every node, and the coordinator, in a network namespace of its own, and links between them
#                       are cut (root)
#   PERCENT=0           fails if less of what could have been trained was committed
#   SEED=N              repeats the choices
cd "$(dirname "$0")/.." || exit 1
. tests/lib.sh
RANDOM=${SEED:=$(date +%s)}
MINUTES=${MINUTES:-3} NODES=${NODES:-4} MODE=${MODE:-diloco} NET=${NET:-} ROUNDS=${ROUNDS:-10} PERCENT=${PERCENT:-0}
say() { printf '%4d s  %s\n' $SECONDS "$*"; }
R=$W/run P=7400
NAMES=($(for i in $(seq "$NODES"); do echo "node$i"; done)) LOGS=()
for n in "${NAMES[@]}"; do LOGS+=("$W/$n.log"); done

# ---- network namespaces: a bridge in one of its own, a cable to each of the others ------------------------------------
NS=in$$ CABLES=()
net_up() {
    [ "$(id -u)" = 0 ] || { echo "NET=1 needs root"; exit 77; }
    ip netns add $NS-hub || { echo "no network namespaces here"; exit 77; }
    ip -n $NS-hub link add br0 type bridge && ip -n $NS-hub link set br0 up
    local i=0 n
    for n in coordinator "${NAMES[@]}"; do
        i=$((i + 1))
        ip netns add $NS-$n
        ip -n $NS-hub link add c$i type veth peer name eth0 netns $NS-$n
        ip -n $NS-hub link set c$i master br0 up
        ip -n $NS-$n addr add 10.88.0.$i/24 dev eth0
        ip -n $NS-$n link set lo up; ip -n $NS-$n link set eth0 up
        ADDRESS[$n]=10.88.0.$i CABLE[$n]=c$i
    done
}
net_down() { local n; for n in hub coordinator "${NAMES[@]}"; do ip netns del $NS-$n 2>/dev/null; done; }
declare -A ADDRESS CABLE
HOST=127.0.0.1
if [ -n "$NET" ]; then
    trap 'end_all; net_down' EXIT
    net_up; HOST=${ADDRESS[coordinator]}
else P=$(free_port); fi
in_net() { if [ -n "$NET" ]; then echo "ip netns exec $NS-$1"; fi; }
launch_coordinator() { WRAP=$(in_net coordinator) start_coordinator "$R" "$P" "$HOST"; }
launch() { WRAP=$(in_net "$1") start_node "$1" "$R" --log-json ${NODE_OPTIONS:-}; }

REPEAT=$((MINUTES / 4 + 1)) corpus "$W/corpus" --sequence 128 >"$W/data.log" 2>&1 || fail "data: $(tail -n 1 "$W/data.log")"
"$COORDINATOR" init "$R" --corpus "$W/corpus/corpus.json" --preset debug --set inner.batch=4 --set outer.mode="$MODE" --set outer.inner_steps=32 \
    --set outer.lease_samples=512 --set outer.round_seconds=8 --set outer.grace_seconds=1 --set outer.silence_seconds=4 --set outer.checkpoint_rounds=20 \
    --set outer.chunk_elements=65536 --set outer.shard_chunks=2 ${SETTINGS:-} >"$W/init.log" 2>&1 || fail "init: $(tail -n 1 "$W/init.log")"
launch_coordinator
for n in "${NAMES[@]}"; do launch "$n"; done
wait_for 90 "$R" "round >= 4 and members_live == $NODES + 1" || fail "no first rounds"

# ---- what was trained: the nodes' logs say it, and account.py adds it up -------------------------------------------------
stamp() { date -u +%Y-%m-%dT%H:%M:%S.%3NZ; }
committed() { local n; for _ in $(seq 100); do n=$(status "$R" tokens_committed); [ -n "$n" ] && break; sleep 0.2; done; echo "${n:-0}"; }
begin=$(stamp) committed_before=$(committed)

say "churn for $MINUTES minutes, $NODES nodes, $MODE${NET:+, links are cut too}, SEED=$SEED"
SECONDS=0
alive() { [ -n "${PID[$1]:-}" ] && kill -0 "${PID[$1]}" 2>/dev/null; }
revive() { # what was killed is started again, as its owner's service manager would
    local n
    for n in "${NAMES[@]}"; do alive "$n" || launch "$n"; done
    alive coordinator || launch_coordinator
}
pick() { any=${NAMES[RANDOM % NODES]}; } # not in a subshell: RANDOM would begin anew there
victim() { # sets what, pid, and name for a child of ours
    local n; pick; n=$any
    name=
    case $((RANDOM % 4)) in
        0) what="$n's trainer" pid=$(pgrep -P "${PID[$n]}" | head -n 1) ;;
        1) what="$n's agent" pid=${PID[$n]} name=$n ;;
        2) what="the aggregator" pid=$(pgrep -P "${PID[coordinator]}" | head -n 1) ;;
        3) what="the coordinator" pid=${PID[coordinator]} name=coordinator ;;
    esac
}
note() { say "$(printf '%-26s %s' "$1" "$(status "$R" '"(round %d, %d live)" % (round, members_live)')")"; }
cut_link() { # one member from everybody, or two from each other
    local a b; pick; a=$any; pick; b=$any
    if [ $((RANDOM % 2)) = 0 ] || [ "$a" = "$b" ]; then
        note "$a's cable is cut"
        ip -n $NS-hub link set "${CABLE[$a]}" down; sleep 8; ip -n $NS-hub link set "${CABLE[$a]}" up
    else
        note "$a and $b are cut apart"
        ip -n $NS-"$a" route add blackhole "${ADDRESS[$b]}"; sleep 8; ip -n $NS-"$a" route del blackhole "${ADDRESS[$b]}"
    fi
    sleep 2
}
faults=0
while [ $SECONDS -lt $((60 * MINUTES)) ]; do
    faults=$((faults + 1))
    if [ -n "$NET" ] && [ $((RANDOM % 3)) = 0 ]; then cut_link; revive; continue; fi
    victim
    if [ -z "$pid" ]; then faults=$((faults - 1)); sleep 1; revive
    elif [ $((RANDOM % 2)) = 0 ]; then
        note "$what: SIGKILL"
        if [ -n "$name" ]; then kill_now "$name"; else kill -KILL "$pid"; fi
        sleep 2; revive; sleep 8
    else
        note "$what: SIGSTOP"
        kill -STOP "$pid" 2>/dev/null; sleep 8; kill -CONT "$pid" 2>/dev/null; sleep 2; revive
    fi
done
say "$faults faults; now quiet"
end=$(stamp) committed_after=$(committed)

# ---- what came of it ------------------------------------------------------------------------------------------------------
settle "$R" "${NAMES[@]}"
rounds=$(status "$R" round) mismatches=$(status "$R" root_mismatches)
"$COORDINATOR" ledger verify "$R" || fail "the ledger does not verify"
[ "$(echo "$digests" | wc -l)" = 1 ] || fail "anchors differ: $digests"
[ "${mismatches:-1}" = 0 ] || fail "$mismatches roots differed"
[ "${rounds:-0}" -ge "$ROUNDS" ] || fail "$rounds rounds committed, wanted $ROUNDS"
python3 tests/account.py --percent "$PERCENT" 128 "$begin" "$end" $((committed_after - committed_before)) "${LOGS[@]}" || fail "less than $PERCENT % committed"
echo "churn: $MINUTES minutes, $NODES nodes, $MODE, $faults faults, $rounds rounds committed, anchors equal $digests, no root differed, SEED=$SEED"
