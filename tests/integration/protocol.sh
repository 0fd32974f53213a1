#!/bin/bash
# docs/protocol.md is enough to write a member from: tests/protocol/reader.py, which takes its tables from the page, enrols in a
# run of real processes, verifies the ledger, follows three commits, fetches their results and computes the next states itself.
# Then the same ledger damaged and forged in every way that the page names: each must be refused.
cd "$(dirname "$0")/../.." || exit 1
. tests/lib.sh
PYTHON=/usr/bin/python3
$PYTHON -c 'import msgpack, numpy, cryptography' 2>/dev/null ||
    { echo "python3-msgpack, python3-numpy or python3-cryptography is not installed"; exit 77; }
R=$W/run P=$(free_port) READ="$PYTHON tests/protocol/reader.py"
export PYTHONDONTWRITEBYTECODE=1

$PYTHON tests/protocol/offline.py || exit 1

corpus "$W/corpus" --sequence 64 >"$W/data.log" 2>&1 || fail "data: $(tail -n 1 "$W/data.log")"
init() { # init DIR [settings]
    local dir=$1; shift
    "$COORDINATOR" init "$dir" --corpus "$W/corpus/corpus.json" --preset debug --set model.sequence=64 \
        --set outer.chunk_elements=65536 --set inner.batch=4 --set outer.inner_steps=10 --set outer.round_seconds=1 --set outer.shard_chunks=3 \
        --set outer.heartbeat_seconds=0.3 --set outer.silence_seconds=5 "$@" >"$W/init.log" 2>&1 || fail "init: $(tail -n 1 "$W/init.log")"
}
invite() { "$COORDINATOR" invite "$R" --uses 1 2>/dev/null; }
# follows NAME INVITE [options]: in the background, its verdict in $W/NAME.json
follows() { $READ "${@:2}" --commits 3 --seconds 60 --save "$W/$1.ledger" --json >"$W/$1.json" 2>"$W/$1.log" & PID[$1]=$!; }
ended_well() { wait "${PID[$1]}" || fail "$1: $(cat "$W/$1.json")"; unset "PID[$1]"; echo "$1: $(cat "$W/$1.json")"; }
# refused PATTERN COMMAND...: exit status 1 and says it
refused() {
    local pattern=$1 rc; shift
    "$@" >"$W/refused.out" 2>&1; rc=$?
    [ $rc = 1 ] && grep -qE "$pattern" "$W/refused.out" || fail "not refused with \"$pattern\" but $rc: $(tail -n 1 "$W/refused.out")"
    echo "refused: $(tail -n 1 "$W/refused.out")"
}

# ---- from the first moment, and later on; with fragments, and aggregators on both sides
init "$R" --set outer.fragments="${FRAGMENTS:-2}"
start_coordinator "$R" "$P"
follows first "$(invite)"
start_node alice "$R"
start_node bob "$R"
used=$(invite)
wait_for 30 "$R" "round >= 2" || fail "no rounds"
follows later "$used" --reconnect
ended_well first
ended_well later
check() { $PYTHON -c 'import json, sys; s = json.load(open(sys.argv[1])); sys.exit(not (eval(sys.argv[2], {}, s)))' "$W/$1.json" "$2" ||
    fail "$1: not $2: $(cat "$W/$1.json")"; }
check first "followed >= 3 and initial_state and state_chunks == 0 and roots_by_ledger >= 1 and result_chunks > 0"
check later "followed >= 3 and initial_state and state_chunks > 0 and result_chunks > 0 and bulk_frames > 0 and connections == 2 and entries_again == 0"

# ---- the page is what is tested: with two fields of `commit` exchanged in it, the states come out wrong
sed '/^| commit |/s/`lr` f32, `momentum` f32/`momentum` f32, `lr` f32/' docs/protocol.md >"$W/altered.md"
cmp -s docs/protocol.md "$W/altered.md" && fail "the page was not altered"
refused 'another root than the run' $READ "$(invite)" --commits 2 --document "$W/altered.md"

# ---- what a reader must not believe
refused 'BYE\(REFUSED, final\)' $READ "$used" --commits 1
init "$W/other"
Q=$(free_port)
"$COORDINATOR" serve "$W/other" --listen 127.0.0.1:"$Q" --no-aggregator >"$W/other.log" 2>&1 & PID[other]=$!
wait_for 10 "$W/other" serving || fail "the other run is not served"
refused 'serves another run' $READ "$(invite | sed "s/:$P/:$Q/")" --commits 1
run=$(cut -d/ -f4 <<<"$used" | cut -d'#' -f1)
$READ --ledger "$W/later.ledger" --run "$run" || fail "the saved ledger"
refused 'is the genesis of another run|not signed' $READ --ledger "$W/later.ledger" --run "$(tr 0-9a-f 1-9a-f0 <<<"$run")"
$PYTHON tests/protocol/forge.py "$W/later.ledger" "$run" "$R/online.key" || fail "forgeries were accepted"
"$COORDINATOR" ledger verify "$R" >/dev/null || fail "ledger verify"
