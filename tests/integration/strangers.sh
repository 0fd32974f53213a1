#!/bin/bash
# A stranger's hour: malformed connections, 1,000 a minute against the coordinator's port and as many against a
# node's, in every way that tests/hostile knows, half of them from one address and half from everywhere. The run
# beside it must not notice: rounds go on, nobody loses a connection, a new member gets in, and what strangers
# cost in memory, descriptors and log lines is bounded.
#   strangers.sh [--minutes M] [--rate CONNECTIONS_PER_MINUTE]   the hour: --minutes 60; default 0.5 at 4000
cd "$(dirname "$0")/../.." || exit 1
. tests/lib.sh
minutes=0.5 rate=
while [ $# -ge 2 ]; do
    case $1 in
        --minutes) minutes=$2 ;;
        --rate) rate=$2 ;;
        *) echo "strangers.sh [--minutes M] [--rate CONNECTIONS_PER_MINUTE]"; exit 2 ;;
    esac
    shift 2
done
seconds=$(python3 -c "print(int(60 * $minutes))") || exit 2
rate=${rate:-$([ "$seconds" -ge 120 ] && echo 1000 || echo 4000)}
HOSTILE=$BUILD/hostile
R=$W/run P=$(free_port)
failed=0
bad() { failed=$((failed + 1)); echo "  NOT OK  $*"; }

# ---- the run -----------------------------------------------------------------------------------------
# A quiet machine trains on all of the text in six minutes, and the run must outlast the siege.
REPEAT=$((1 + seconds / 300)) corpus "$W/corpus" --sequence 64 >"$W/data.log" 2>&1 || fail "data: $(tail -n 1 "$W/data.log")"
"$COORDINATOR" init "$R" --corpus "$W/corpus/corpus.json" --preset debug --set model.sequence=64 \
    --set outer.chunk_elements=65536 --set inner.batch=4 --set outer.inner_steps=30 --set outer.round_seconds=1 \
    --set outer.grace_seconds=0.5 --set outer.heartbeat_seconds=0.5 --set outer.silence_seconds=5 \
    --set outer.checkpoint_rounds=1000 --set inner.total_tokens=1000000000 \
    --set serve.stranger_seconds=5 >"$W/init.log" 2>&1 || fail "init: $(tail -n 1 "$W/init.log")"
start_coordinator "$R" "$P"
start_node alice "$R"
start_node bob "$R"
wait_for 30 "$R" "round >= 3 and members_live == 3" || fail "no first rounds"
ALICE=$(sed -n 's/.*other members may connect to port \([0-9]*\).*/\1/p' "$W/alice.log" | tail -n 1)
[ -n "$ALICE" ] || fail "alice listens on no port"

# ---- what is measured --------------------------------------------------------------------------------
round() { status "$R" round; }
kb() { sed -n 's/^VmRSS:[^0-9]*\([0-9]*\) kB/\1/p' "/proc/${PID[$1]}/status"; }
fds() { ls "/proc/${PID[$1]}/fd" | wc -l; }
refused() { grep -o '[0-9]* new connections refused' "$W/$1.log" | awk '{n += $1} END {print n + 0}'; }
lines() { wc -l <"$W/$1.log"; }
row() { # row SECONDS: what there is now, also kept in `now`
    now=("$(kb coordinator)" "$(fds coordinator)" "$(kb alice)" "$(fds alice)" "$(round)")
    printf '%7d %9d %5d %9d %5d %8d %9d %9d %7d %7d\n' "$1" "${now[@]}" "$(refused coordinator)" "$(refused alice)" \
        "$(lines coordinator)" "$(lines alice)"
}

fds_first=("$(fds coordinator)" "$(fds alice)") lines_first=("$(lines coordinator)" "$(lines alice)")
from=$SECONDS round_first=$(round)
sleep 6
calm=$(python3 -c "print(($(round) - $round_first) / ($SECONDS - $from))")

# ---- the siege ---------------------------------------------------------------------------------------
echo "$seconds s, $rate connections a minute against each of two ports"
printf '%7s %9s %5s %9s %5s %8s %9s %9s %7s %7s\n' time coordin. fds alice fds round refused by lines of
printf '%7s %9s %5s %9s %5s %8s %9s %9s %7s %7s\n' s kB '' kB '' '' coordin. alice coordin. alice
row 0
"$HOSTILE" 127.0.0.1 "$P" siege "$rate:$seconds" >"$W/siege-coordinator.out" 2>&1 &
PID[siege-coordinator]=$!
"$HOSTILE" 127.0.0.1 "$ALICE" siege "$rate:$seconds" >"$W/siege-alice.out" 2>&1 &
PID[siege-alice]=$!
start=$SECONDS round_first=$(round) first=() joined= trains= settled= most=(0 0)
carol_trains="any(m['name'] == 'carol' and m['tokens_committed'] > 0 for m in members)"
step=$((seconds / 10 < 120 ? seconds / 10 : 120))
for ((next = step; next <= seconds; next += step)); do
    while [ $((SECONDS - start)) -lt $next ]; do sleep 0.2; done
    row $next
    [ ${#first[@]} -eq 0 ] && [ $next -ge $((seconds / 5)) ] && first=("${now[@]}")
    [ -n "$trains" ] && [ -z "$settled" ] && settled=${now[2]}
    [ -n "$joined" ] && [ "$(status "$R" "$carol_trains")" = True ] && trains=1
    [ "${now[1]}" -gt "${most[0]}" ] && most[0]=${now[1]}
    [ "${now[3]}" -gt "${most[1]}" ] && most[1]=${now[3]}
    if [ -z "$joined" ] && [ $next -ge $((seconds / 4)) ]; then
        joined=1
        start_node carol "$R"
        wait_for 30 "$R" "members_live == 4" || bad "carol does not get in"
    fi
done
last=("${now[@]}")
for who in coordinator alice; do
    wait "${PID[siege-$who]}" || bad "the siege of $who: $(tail -n 1 "$W/siege-$who.out")"
    unset "PID[siege-$who]"
    sed "s/^/  $who: /" "$W/siege-$who.out"
done

# ---- what came of it ---------------------------------------------------------------------------------
storm=$(python3 -c "print((${last[4]} - $round_first) / $seconds)")
printf '  rounds a second: %.2f before, %.2f in the siege\n' "$calm" "$storm"
python3 -c "exit(not $storm > 0.3 * $calm)" || bad "the run was slowed"
for n in alice bob; do
    grep -E 'lost the coordinator|trainer ended' "$W/$n.log" && bad "$n lost its connection or trainer"
done
grep -E 'no heartbeat for silence' "$W/coordinator.log" && bad "the coordinator lost a member"
rounds=$((last[4] - first[4])) # each leaves an entry in the ledger, which both keep in memory
[ $((last[0] - first[0])) -lt $((4096 + 16 * rounds)) ] || bad "the coordinator grew by $((last[0] - first[0])) kB"
# What it takes alice to bring carol up to date and to average with her stays; what comes after that counts.
settled=${settled:-${last[2]}}
[ -n "$trains" ] || wait_for 60 "$R" "$carol_trains" || bad "carol does not train"
[ $((last[2] - settled)) -lt $((8192 + 16 * rounds)) ] || bad "alice grew by $((last[2] - settled)) kB"
[ "${most[0]}" -lt $((fds_first[0] + 300)) ] || bad "the coordinator had ${most[0]} descriptors"
[ "${most[1]}" -lt $((fds_first[1] + 300)) ] || bad "alice had ${most[1]} descriptors"
# 60 lines a minute about strangers, 6 about how many were refused, and the run's own.
for i in 0 1; do
    who=$([ $i = 0 ] && echo coordinator || echo alice)
    told=$(grep -cE '127\.[0-9]+\.[0-9]+\.[0-9]+' "$W/$who.log")
    [ "$told" -gt 20 ] || bad "$who wrote only $told lines about strangers"
    [ "$told" -le $(((seconds / 60 + 2) * 66 + lines_first[i])) ] || bad "$who wrote $told lines about strangers"
done
for _ in $(seq 100); do
    [ "$(fds coordinator)" -le $((fds_first[0] + 4)) ] && [ "$(fds alice)" -le $((fds_first[1] + 12)) ] && break
    sleep 0.1
done
echo "  descriptors: coordinator ${fds_first[0]} before, $(fds coordinator) after; alice ${fds_first[1]} before, $(fds alice) after"
[ "$(fds coordinator)" -le $((fds_first[0] + 4)) ] && [ "$(fds alice)" -le $((fds_first[1] + 12)) ] || bad "descriptors were lost"
[ $failed -eq 0 ] && echo "all as expected, $SECONDS s"
exit $((failed > 0))
