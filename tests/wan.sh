#!/bin/bash
# A run across oceans: five nodes on the five sites of tests/wan/world.txt, which tests/wan/wan.c joins by links as long and
# as lossy as the world's, only slower. For each mode: how much of its time each node trained, by its own account.
#
# The model is 10,000 times smaller than one of 10B, a round is shorter and the links are slower, so that sending takes
# about the share of a round that it took INTELLECT-1. The distances are the world's: beside so short a round they weigh
# a hundred times what they would.
#
#   MODES="intellect1 streaming"   outer.mode of each run (of intellect1, diloco, streaming, decoupled)
#   SECONDS_EACH=120               how long each is measured, after two rounds
#   RATE=0.005 ROUND=20            scale of the rates; seconds from round to round
#   OVERLAP=60                     inner steps that a round may take in modes where nobody waits for it
#   CUT=                           1: in the middle the Pacific is cut for 15 s
#   JSON=FILE                      the table, for programs
cd "$(dirname "$0")/.." || exit 1
. tests/lib.sh
MODES=${MODES:-intellect1 diloco streaming decoupled} SECONDS_EACH=${SECONDS_EACH:-120} RATE=${RATE:-0.005} ROUND=${ROUND:-20}
OVERLAP=${OVERLAP:-60} CUT=${CUT:-} JSON=${JSON:-/dev/null}
SITES=(us-west us-east eu-west eu-north asia) HOST=10.88.2.1 PORT=7171 NS=wan$$ # the coordinator is in us-east
[ "$(id -u)" = 0 ] || { echo "network namespaces need root"; exit 77; }
[ -c /dev/net/tun ] && ip netns add $NS 2>/dev/null && ip netns del $NS || { echo "no TUN devices or network namespaces here"; exit 77; }

# ---- the links -------------------------------------------------------------------------------------------------------
coproc WAN { exec "$BUILD/wan" $NS tests/wan/world.txt "$RATE"; }
exec {to}>&"${WAN[1]}" {from}<&"${WAN[0]}"
links=$WAN_PID LOGS=()
for line in "${SITES[@]}"; do LOGS+=("$W/$line.log"); done
trap 'end_all; kill $links 2>/dev/null; wait $links 2>/dev/null' EXIT
read -r -t 20 line <&"$from" && [ "$line" = ready ] || fail "the links do not come up"
tell() { # tell COMMAND: and print what is answered
    echo "$1" >&"$to"
    while read -r -t 5 line <&"$from" && [ "$line" != end ]; do echo "$line"; done
}
sent() { tell bytes | awk '{ n += $3 } END { print n + 0 }'; }

# ---- one run ---------------------------------------------------------------------------------------------------------
stamp() { date -u +%Y-%m-%dT%H:%M:%S.%3NZ; }
begin_run() { # begin_run MODE: all nodes are there, and two rounds are over
    local overlap=() i
    case $1 in streaming | decoupled) overlap=(--set outer.overlap="$OVERLAP") ;; esac
    "$COORDINATOR" init "$R" --corpus "$W/corpus/corpus.json" --preset debug --set inner.batch=4 --set outer.mode="$1" --set outer.inner_steps=100000 \
        --set outer.round_seconds="$ROUND" --set outer.grace_seconds=2 --set outer.chunk_elements=16384 --set outer.shard_chunks=2 \
        --set outer.lease_samples=512 --set outer.heartbeat_seconds=0.5 --set outer.silence_seconds=10 --set outer.checkpoint_rounds=1000 \
        "${overlap[@]}" >"$W/init.log" 2>&1 || fail "init: $(tail -n 1 "$W/init.log")"
    WRAP="ip netns exec $NS-us-east" start_coordinator "$R" $PORT $HOST
    for i in "${SITES[@]}"; do WRAP="ip netns exec $NS-$i" start_node "$i" "$R" --log-json; done
    wait_for 240 "$R" "round >= 2 * len(fragments) and members_live == ${#SITES[@]} + 1" || fail "no first rounds"
}
cut_pacific() {
    local i
    sleep $(((SECONDS_EACH - 15) / 2))
    for i in us-west us-east eu-west eu-north; do tell "cut asia $i"; done
    sleep 15
    for i in us-west us-east eu-west eu-north; do tell "heal asia $i"; done
    sleep $(((SECONDS_EACH - 15) / 2))
}
end_run() { # what they did is on their disks; the next run begins with new homes
    local i
    for i in coordinator "${SITES[@]}"; do kill -TERM "${PID[$i]}"; done
    for i in coordinator "${SITES[@]}"; do wait "${PID[$i]}" 2>/dev/null; unset "PID[$i]"; done
    for i in coordinator "${SITES[@]}"; do rm -rf "${W:?}/$i"; mv "$W/$i.log" "$R/"; done
}

corpus "$W/corpus" --sequence 128 >"$W/data.log" 2>&1 || fail "data: $(tail -n 1 "$W/data.log")"
printf '%-11s %6s %8s %8s   %s\n' mode rounds 'MB sent' 'trained' "of its time, on ${SITES[*]}"
for mode in $MODES; do
    R=$W/$mode
    begin_run "$mode"
    begin=$(stamp) tokens=$(status "$R" tokens_committed) round=$(status "$R" round) bytes=$(sent)
    if [ -n "$CUT" ]; then cut_pacific; else sleep "$SECONDS_EACH"; fi
    end=$(stamp) tokens=$(($(status "$R" tokens_committed) - tokens)) round=$(($(status "$R" round) - round)) bytes=$(($(sent) - bytes))
    settle "$R" "${SITES[@]}"
    [ "$(echo "$digests" | wc -l)" = 1 ] || fail "anchors differ: $digests"
    [ "$(status "$R" root_mismatches)" = 0 ] || fail "roots differed"
    [ "$round" -ge 1 ] || fail "no round was committed"
    "$COORDINATOR" ledger verify "$R" >/dev/null || fail "the ledger does not verify"
    python3 tests/account.py --utilisation 128 "$begin" "$end" "$tokens" "${LOGS[@]}" >"$W/account.json" || fail "no account"
    python3 - "$mode" "$round" "$bytes" "$W/account.json" "$JSON" <<'PY'
import json, sys
mode, rounds, sent, account, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.load(open(sys.argv[4])), sys.argv[5]
of = account["utilisation"]
print("%-11s %6d %8.1f %6.1f %%   %s" % (mode, rounds, sent / 1e6, 100 * sum(of.values()) / len(of), "  ".join("%.1f" % (100 * x) for x in of.values())))
open(out, "a").write(json.dumps({"mode": mode, "rounds": rounds, "bytes_sent": sent, **account}) + "\n")
PY
    end_run
done
