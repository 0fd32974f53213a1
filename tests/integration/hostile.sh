#!/bin/bash
# Strangers and hostile members against one real run: two nodes train, and every attack of tests/hostile goes
# against the coordinator, a node or the aggregator. After each group: what the victim's log says about it, and
# that rounds go on committing. At the end the ledger must verify, the honest members' anchors must be equal, and
# nothing of what was refused may be in the sum.
cd "$(dirname "$0")/../.." || exit 1
. tests/lib.sh
HOSTILE=$BUILD/hostile
R=$W/run P=$(free_port)
failed=0
bad() { failed=$((failed + 1)); echo "  NOT OK  $*"; }

# ---- the run -----------------------------------------------------------------------------------------
corpus "$W/corpus" --sequence 64 >"$W/data.log" 2>&1 || fail "data: $(tail -n 1 "$W/data.log")"
"$COORDINATOR" init "$R" --corpus "$W/corpus/corpus.json" --preset debug --set model.sequence=64 \
    --set outer.chunk_elements=65536 --set inner.batch=4 --set outer.inner_steps=30 --set outer.round_seconds=1 \
    --set outer.grace_seconds=0.5 --set outer.heartbeat_seconds=0.3 --set outer.silence_seconds=3 \
    --set outer.fragments=1 --set outer.shard_chunks=65536 --set outer.checkpoint_rounds=20 --set serve.stranger_seconds=3 >"$W/init.log" 2>&1 || fail "init: $(tail -n 1 "$W/init.log")"
start_coordinator "$R" "$P"
start_node alice "$R"
start_node bob "$R"
wait_for 30 "$R" "round >= 1 and members_live == 3" || fail "no first round"
ALICE=$(sed -n 's/.*other members may connect to port \([0-9]*\).*/\1/p' "$W/alice.log" | tail -n 1)
[ -n "$ALICE" ] || fail "alice listens on no port"
COORDINATOR_PID=${PID[coordinator]} ALICE_PID=${PID[alice]}

# ---- tools -------------------------------------------------------------------------------------------
# Whoever sums the round says what was wrong with a contribution: "sums" means any of these logs.
declare -A mark
logs() { [ "$1" = sums ] && echo coordinator alice bob || echo "$1"; }
mark_logs() { local l; for l in coordinator alice bob; do mark[$l]=$(wc -l <"$W/$l.log"); done; }
new_lines() { local l; for l in $(logs "$1"); do tail -n +$((${mark[$l]:-0} + 1)) "$W/$l.log"; done; }
# said LOG PATTERN [SECONDS]: a line that came since the last mark; shows it
said() {
    local line end=$((SECONDS + ${3:-5}))
    while :; do
        line=$(new_lines "$1" | grep -E -m 1 -- "$2") && break
        [ $SECONDS -lt $end ] || { bad "$1 does not say \"$2\""; new_lines "$1" | tail -n 5; return 1; }
        sleep 0.1
    done
    printf '      %-11s %s\n' "$1:" "$(cut -c1-170 <<<"$line")"
}
# attack LOG PATTERN PORT NAME [ARGUMENT]: run it; the log must say PATTERN
attack() {
    local log=$1 pattern=$2 port=$3 out
    shift 3
    mark_logs
    out=$("$HOSTILE" "${WHO[@]}" 127.0.0.1 "$port" "$@" 2>&1) || bad "$* (port $port)"
    printf '    %s\n' "$out"
    said "$log" "$pattern"
}
round() { status "$R" round; }
goes_on() { # goes_on WHAT: two more rounds, and nobody was replaced
    local from=$(round)
    wait_for 20 "$R" "round >= ${from:-0} + 2" || fail "no rounds after: $1"
    kill -0 "$COORDINATOR_PID" && kill -0 "$ALICE_PID" && kill -0 "${PID[bob]}" || fail "a process ended after: $1"
    printf '  ok      %s: the run goes on, round %s, %d s\n' "$1" "$(round)" $SECONDS
}
WHO=() # a new key each time
"$COORDINATOR" invite "$R" --uses 1 2>/dev/null >"$W/mallory.invite" || fail "no invite"

# ---- patience costs time: those who say nothing wait beside the rest ------------------------------------
for port in $P $ALICE; do
    for name in silent-tcp half-hello; do
        "$HOSTILE" --from 127.0.0.67 127.0.0.1 "$port" $name >"$W/$name-$port.out" 2>&1 &
        PID[$name-$port]=$!
    done
done
for name in silent-stranger half-frame; do
    "$HOSTILE" --from 127.0.0.67 127.0.0.1 "$P" $name >"$W/$name-$P.out" 2>&1 &
    PID[$name-$P]=$!
done

echo "who speaks no TLS, or not ours"
for victim in "coordinator $P" "alice $ALICE"; do
    set -- $victim
    attack $1 'does not speak TLS' $2 garbage
    attack $1 'plain HTTP on the TLS port' $2 http
    attack $1 'TLS: unsupported protocol' $2 old-tls
    attack $1 'TLS: peer did not return a certificate' $2 no-certificate
    attack $1 'TLS: the peer does not speak "intellect/1"' $2 no-alpn
done
goes_on "no TLS"

echo "a key that is not in the roster"
attack coordinator 'HELLO from 127.0.0.1 with a key that is not enrolled; refused' "$P" hello-unenrolled
attack coordinator 'READY before HELLO; closed' "$P" ready-first
attack coordinator 'LEASE_ASK before HELLO; closed' "$P" leases-first
attack alice 'connection from .*127.0.0.66 .*its key is not in the roster' "$ALICE" new-key
goes_on "unknown keys"

frames() { # frames LOG PORT
    attack $1 'HEARTBEAT frame of 9437185 bytes, allowed are 1 to [0-9]+' $2 frame-oversized
    attack $1 'closed in the middle of a HEARTBEAT frame' $2 frame-truncated
    attack $1 'HEARTBEAT: byte 0xc1 is not msgpack' $2 frame-not-msgpack
    attack $1 'frame of protocol version 9, this program speaks 1' $2 frame-version
    attack $1 'frame of unknown type 200' $2 frame-type
    attack $1 'HEARTBEAT.loss: not a finite number' $2 frame-not-finite
}
echo "broken frames of a stranger, on the coordinator's port"
frames coordinator "$P"
attack coordinator 'frame starts with 47 47 47 47: ' "$P" frame-magic
attack coordinator 'HEARTBEAT frame: reserved bytes are not zero' "$P" frame-reserved
attack coordinator 'HEARTBEAT frame of 0 bytes, allowed are 1 to [0-9]+' "$P" frame-empty
attack coordinator 'HEARTBEAT: 1 bytes follow its end' "$P" frame-trailing
attack coordinator 'HEARTBEAT: 3 fields, not 8' "$P" frame-fields
goes_on "broken frames of a stranger"

WHO=(--identity "$W/mallory.key")
echo "mallory enrols, and keeps no rule"
attack coordinator '.mallory. enrolled at ledger' "$P" enrol "$(cat "$W/mallory.invite")"
sleep 0.3 # the roster reaches alice
frames coordinator "$P"
frames alice "$ALICE"
attack alice 'closing the link to member [0-9]+: it sent a message that members do not send' "$ALICE" node-hello
attack alice 'closing the link to member [0-9]+: it sent a message that members do not send' "$ALICE" node-ledger
attack alice 'closing the link to member [0-9]+: it asks for results that cannot be' "$ALICE" node-results
attack alice 'closing the link to member [0-9]+: ' "$ALICE" node-state
goes_on "broken frames of a member"

echo "out of order, of another term, of another session"
attack coordinator 'HELLO after HELLO; closed' "$P" second-hello
attack coordinator 'ENROL after HELLO; closed' "$P" second-enrol
attack coordinator 'LEDGER is no message to a coordinator; closed' "$P" ledger
attack coordinator 'PLAN is no message to a coordinator; closed' "$P" plan
attack coordinator 'CHUNK is no message to a coordinator; closed' "$P" chunk
attack coordinator 'mallory.*: HEARTBEAT: there is no phase 99; closed' "$P" bad-phase
attack coordinator 'mallory.*: CHECKPOINT_SIGN from a member that was not asked to write one; closed' "$P" foreign-checkpoint
attack coordinator 'LEASE_ASK of .*mallory.* is of term 0, session [0-9]+, not of 1, [0-9]+; dropped' "$P" other-term
attack coordinator 'LEASE_ASK of .*mallory.* is of term 1, session [0-9]+, not of 1, [0-9]+; dropped' "$P" other-session
attack coordinator 'has seen term 1001, .*it is an older copy' "$P" hello-newer-term
attack coordinator 'two histories: ledger entry 0 is .* at .*mallory.*; the higher term holds' "$P" hello-other-ledger
goes_on "out of order"

echo "floods and lies"
attack coordinator 'mallory.* asks for leases more than 16 times a tick; not answered' "$P" lease-flood 5000
attack coordinator 'mallory.* has root 0707070707070707, member [0-9]+ said ' "$P" wrong-root
uplink() { status "$R" '[m["uplink"] for m in members if m["name"] == "mallory"]'; }
before=$(uplink)
attack coordinator 'mallory.* connected' "$P" inflated-rates
[ "$(uplink)" = "$before" ] || bad "mallory's uplink is $(uplink) because it said so, before $before"
attack coordinator 'mallory.* says HELLO from .* while it lives at .*: its home directory runs twice' "$P" copied-home
goes_on "floods and lies"

echo "contributions that cannot be, announced to the coordinator"
attack coordinator 'contribution of .*mallory.* refused: [0-9]+ chunks, the fragment has [0-9]+' "$P" ready-chunks
attack coordinator 'contribution of .*mallory.* refused: codec [01], this run.s is [01]' "$P" ready-codec
attack coordinator 'contribution of .*mallory.* refused: norm .* of [0-9]+ elements are impossible' "$P" ready-norm-small
attack coordinator 'contribution of .*mallory.* refused: norm .* of [0-9]+ elements are impossible' "$P" ready-norm-large
attack coordinator 'contribution of .*mallory.* refused: norm .* are impossible' "$P" ready-absmax
attack coordinator 'contribution of .*mallory.* refused: the root of its chunks is missing' "$P" ready-no-root
attack coordinator 'contribution of .*mallory.* refused: it says [0-9]+ samples and claims none that count' "$P" ready-no-claims
attack coordinator 'contribution of .*mallory.* refused: lease [0-9]+ generation [0-9]+ is not yours' "$P" ready-foreign-lease
attack coordinator 'contribution of .*mallory.* refused: lease [0-9]+ generation [0-9]+ is not yours' "$P" ready-stolen-lease
attack coordinator 'contribution of .*mallory.* refused: lease [0-9]+ generation [0-9]+ is not yours' "$P" ready-old-generation
attack coordinator 'contribution of .*mallory.* refused: lease [0-9]+ has samples .*, claimed were' "$P" ready-more-than-leased
attack coordinator 'contribution of .*mallory.* refused: lease [0-9]+ is claimed twice' "$P" ready-claimed-twice
attack coordinator 'mallory.*: READY without its sender.s signature; closed' "$P" ready-signature
attack coordinator 'READY.norm: not a finite number' "$P" ready-not-finite
attack coordinator 'mallory.*: READY of round [0-9]+ on ledger [0-9]+, state [0-9]+; the newest is [0-9]+ on [0-9]+; closed' "$P" ready-round-ahead
attack coordinator 'mallory.* has root 0707070707070707' "$P" ready-other-base
goes_on "impossible contributions"

echo "as second holder"
attack coordinator 'the reports of member [0-9]+ .aggregator. and member [0-9]+ .holder. differ from chunk 0 on' "$P" lying-holder
said coordinator 'sums chunk 0 of fragment 0 once more .reports differ.'
attack coordinator 'report of shard 0 from .*mallory.* is broken: [0-9]+ digests for [0-9]+ chunks' "$P" broken-holder
attack coordinator 'report of shard 0 from .*mallory.* is broken: it lacks its sender.s signature' "$P" unsigned-holder
goes_on "false reports"

echo "contributions that are not what was announced, sent to the aggregator"
attack sums 'closing the link to member [0-9]+: its leaves do not give the root it announced' "$P" wrong-leaves
attack sums 'closing the link to member [0-9]+: a chunk is not what it announced' "$P" short-chunk
attack sums 'closing the link to member [0-9]+: a chunk is not what it announced' "$P" foreign-set
attack sums 'closing the link to member [0-9]+: a chunk is not what it announced' "$P" wrong-weight
attack sums 'closing the link to member [0-9]+: a chunk is not what it announced' "$P" flipped-byte
said sums 'member [0-9]+ sends nothing for fragment 0 round [0-9]+: going on without it'
attack sums 'member [0-9]+ sends nothing for fragment 0 round [0-9]+: going on without it' "$P" silent-contributor
# Bytes that its own root proves wrong: it is accused, and as it shows them to no auditor, that is all.
attack sums 'member [0-9]+ is left out of fragment 0 round [0-9]+, chunk 0: .*finite' "$P" nan-scale
said coordinator 'accuses member [0-9]+ .chunk 0 of fragment 0.: '
said coordinator 'the audit of chunk 0 by member [0-9]+ is void: '
attack sums 'member [0-9]+ is left out of fragment 0 round [0-9]+, chunk 0: its values have norm .*, announced was' "$P" huge-values
attack sums 'member [0-9]+ is left out of fragment 0 round [0-9]+, chunk 0: its values have norm .*, announced was' "$P" larger-norm
tokens() { status "$R" 'sum(m["tokens_committed"] for m in members if m["name"] == "mallory")'; }
[ "$(tokens)" = 0 ] || bad "mallory was summed: $(tokens) tokens"
goes_on "wrong contributions; nothing of mallory's was summed"

echo "an honest contribution, and lies beside it"
attack coordinator 'mallory. is ready for round [0-9]+' "$P" honest
[ "$(tokens)" -gt 0 ] || bad "the honest contribution was not summed"
attack coordinator 'mallory. is ready for round [0-9]+ of fragment 0: 1048576 samples' "$P" inflated-samples
attack coordinator 'report of shard 0 of fragment 0, round [0-9]+, plan [0-9]+ from .*mallory.* is void' "$P" foreign-report
attack coordinator 'mallory.* accuses member [0-9]+ .chunk 0 of fragment 0.: its values are not finite' "$P" unfounded-accuse
goes_on "lies beside a contribution: nobody believes them"

echo "quarantine"
before=$(tokens)
# Who takes too long to show its bytes once more is left out, but not convicted: where a machine is busy, again.
for _ in 1 2 3; do
    attack coordinator 'accuses member [0-9]+ .*scale of block 0 is nan' "$P" nan-shown
    [ "$(status "$R" "any(m['name'] == 'mallory' and m['quarantined'] for m in members)")" = True ] && break
done
grep -qE 'mallory. is in quarantine from ledger [0-9]+ on: its bytes are not what it announced' "$W/coordinator.log" ||
    bad "mallory is not in quarantine: $(grep -E 'mallory|once more' "$W/coordinator.log" | tail -n 8)"
attack coordinator 'contribution of .*mallory.* refused: this member is in quarantine' "$P" ready-quarantined
[ "$(tokens)" = "$before" ] || bad "mallory was summed: $(tokens) tokens, $before before"
"$COORDINATOR" release "$R" --member mallory --reason 'it says that it is sorry' >/dev/null || bad "no release"
attack coordinator 'mallory. is ready for round [0-9]+' "$P" honest
[ "$(tokens)" -gt "$before" ] || bad "nothing was summed after the release"
goes_on "quarantine and release"

echo "silence and crowds"
WHO=()
mark=()
for what in "silent-tcp $P" "half-hello $P" "silent-stranger $P" "half-frame $P" "silent-tcp $ALICE" "half-hello $ALICE"; do
    set -- $what
    wait "${PID[$1-$2]}" || bad "$1 on port $2"
    unset "PID[$1-$2]"
    sed 's/^/    /' "$W/$1-$2.out"
done
said coordinator '127.0.0.67 .*no TLS handshake within 10000 ms'
said coordinator '127.0.0.67 .*still a stranger after 3000 ms'
said alice '127.0.0.67 .*no TLS handshake within 10000 ms'

descriptors() { ls "/proc/$COORDINATOR_PID/fd" | wc -l; }
memory() { sed -n 's/^VmRSS:[^0-9]*\([0-9]*\) kB/\1/p' "/proc/$COORDINATOR_PID/status"; }
settled() { # until as many descriptors are open as at first
    for _ in $(seq 60); do [ "$(descriptors)" -le "$1" ] && return 0; sleep 0.1; done
    return 1
}
fds=$(descriptors)
"$HOSTILE" 127.0.0.1 "$P" storm 200 | sed 's/^/    /'
settled "$fds"
kb=$(memory) start=$SECONDS
out=$("$HOSTILE" 127.0.0.1 "$P" storm 1000) || bad "storm"
printf '    %s\n' "$out"
settled "$fds" || bad "descriptors: $fds before the storm, $(descriptors) after it"
grown=$(($(memory) - kb))
[ $grown -lt 4096 ] || bad "the coordinator's memory grew by $grown kB over 1000 connections"
[ $((SECONDS - start)) -lt 30 ] || bad "1000 connections took $((SECONDS - start)) s"
echo "      coordinator: $fds descriptors before, $(descriptors) after; $kb kB before, $((kb + grown)) after"
mark_logs
"$HOSTILE" --from 127.0.0.68 127.0.0.1 "$P" crowd 1000 | sed 's/^/    /'
goes_on "1000 connections, and 1000 at once"
said coordinator '[0-9]+ new connections refused: serve.strangers_max 256, serve.connects_per_minute 600' 12

# ---- what came of it -----------------------------------------------------------------------------------
echo "the end"
equal=
for _ in $(seq 10); do # nobody commits while the coordinator stands still, and what is committed is soon applied
    kill -STOP "$COORDINATOR_PID"
    sleep 0.7
    digests=$(for d in "$W/alice" "$W/bob" "$R/aggregator"; do anchor_digest "$d/state/anchor"; done | sort -u)
    kill -CONT "$COORDINATOR_PID"
    [ "$(wc -l <<<"$digests")" = 1 ] && { equal=1; break; }
    sleep 0.5
done
[ -n "$equal" ] && echo "    anchors equal $digests" || bad "the anchors of alice, bob and the coordinator's node differ"
kill -TERM "${PID[alice]}" "${PID[bob]}"
for n in alice bob; do wait "${PID[$n]}" || bad "$n ended with $?"; unset "PID[$n]"; done
kill -TERM "${PID[coordinator]}"
wait "${PID[coordinator]}" || bad "the coordinator ended with $?"
unset "PID[coordinator]"
"$COORDINATOR" ledger verify "$R" >"$W/verify.log" 2>&1 || bad "the ledger does not verify: $(tail -n 1 "$W/verify.log")"
sed 's/^/    /' "$W/verify.log"
[ $failed -eq 0 ] && echo "all as expected, $SECONDS s"
exit $((failed > 0))
