#!/bin/bash
# The aggregate-only node beside the coordinator: it is started, joins by itself, is started again when it dies, ends
# with the coordinator however that ends, and follows it to another port; always as the same member.
cd "$(dirname "$0")/../.." || exit 1
. tests/lib.sh
cd "$W" || exit 1
check() { if "${@:2}"; then echo "ok      $1"; else echo "NOT OK  $1"; fail "$1"; fi; }
child() { pgrep -P "${PID[coordinator]}" | head -n 1; }
gone() { for _ in $(seq 100); do kill -0 "$1" 2>/dev/null || return 0; sleep 0.1; done; return 1; }
one_live='members_live == 1 and len(members) == 1 and members[0]["aggregate_only"]'

mkdir corpus
cat >corpus/corpus.json <<'J'
{ "format": 1, "tokenizer": "bytes", "vocabulary": 256, "dtype": "uint16", "sequence": 128, "samples": 20000 }
J
"$COORDINATOR" init r --corpus corpus --set outer.silence_seconds=2 >init.log 2>&1 || fail init
P=$(free_port)
start_coordinator r "$P"
check "it joins by itself" wait_for 20 r "$one_live"
first=$(child)
check "the invite is in nobody's arguments" sh -c "! tr '\\0' ' ' </proc/$first/cmdline | grep -q intellect://"
check "its key is the one that init made" test "$(status r 'members[0]["key"]')" = \
    "$("$COORDINATOR" ledger show r --json | python3 -c 'import json, sys; print([e["body"]["key"] for e in map(json.loads, sys.stdin) if e["kind"] == "enrolment"][0])')"

kill -KILL "$first"
check "killed, it is started again" wait_for 20 r "$one_live"
for _ in $(seq 100); do second=$(child); [ -n "$second" ] && [ "$second" != "$first" ] && break; sleep 0.1; done
check "in a new process" test -n "$second" -a "$second" != "$first"
check "and the log says why it ended" grep -q "the aggregate-only node ended: signal 9" coordinator.log

kill -KILL "${PID[coordinator]}"; wait "${PID[coordinator]}" 2>/dev/null
check "it ends with a coordinator that was killed" gone "$second"
start_coordinator r "$P"
check "and comes back with the next one" wait_for 20 r "$one_live"

third=$(child)
kill -TERM "${PID[coordinator]}"; wait "${PID[coordinator]}"
check "an orderly stop is one" test $? = 0
check "and takes it along" gone "$third"
Q=$(free_port)
start_coordinator r "$Q"
check "it follows the coordinator to another port" wait_for 20 r "$one_live"
"$COORDINATOR" ledger verify r || fail verify
check "all as one member" test "$("$COORDINATOR" ledger show r | grep -c enrolment)" = 1
