#!/bin/bash
# What people get wrong while a run is going: invites, ports, folders, texts, settings, disks, checkpoints. Each gets
# one clear line, and the run goes on. What a command line alone can show is in coordinator_cli.sh and node_cli.sh.
cd "$(dirname "$0")/../.." || exit 1
. tests/lib.sh
R=$W/run P=$(free_port)
failed=0
bad() { failed=$((failed + 1)); echo "  NOT OK  $*"; }

# says CODE PATTERN COMMAND...: ends with CODE within 20 s and says PATTERN
says() {
    local code=$1 pattern=$2 out rc line
    shift 2
    out=$(timeout 20 "$@" 2>&1 </dev/null)
    rc=$?
    line=$(grep -E -m 1 -- "$pattern" <<<"$out")
    if [ $rc = "$code" ] && [ -n "$line" ]; then printf '    %s\n' "$(cut -c1-180 <<<"${line//$W\//}")"
    else bad "$* ended with $rc, not $code, or does not say \"$pattern\":"; tail -n 5 <<<"$out"; fi
}
said() { # said LOG PATTERN SECONDS: a line of a log that comes within this time
    local line end=$((SECONDS + $3))
    until line=$(grep -E -m 1 -- "$2" "$W/$1.log"); do
        [ $SECONDS -lt $end ] || { bad "$1 does not say \"$2\""; return 1; }
        sleep 0.2
    done
    printf '    %s: %s\n' "$1" "$(cut -c1-180 <<<"${line//$W\//}")"
}
round() { status "$R" round; }
goes_on() {
    local from=$(round)
    wait_for 20 "$R" "round >= ${from:-0} + 2" || fail "no rounds after: $1"
    kill -0 "${PID[alice]}" || fail "alice ended after: $1"
    printf '  ok      %s: the run goes on, round %s, %d s\n' "$1" "$(round)" $SECONDS
}

# ---- a disk that is too small, where we may make one ---------------------------------------------------
SMALL=$W/small
mkdir "$SMALL"
mounted=
if mount -t tmpfs -o size=64k intellect-test "$SMALL" 2>"$W/mount.err"; then
    mounted=1
    trap 'umount -l "$SMALL" 2>/dev/null; end_all' EXIT
fi

# ---- texts -----------------------------------------------------------------------------------------------
echo "texts"
corpus "$W/corpus" --sequence 64 >"$W/data.log" 2>&1 || fail "data: $(tail -n 1 "$W/data.log")"
before=$(cat "$W"/corpus/* | b2sum)
printf 'This text is too short.\n' >"$W/short.txt"
: >"$W/empty.txt"
says 1 'short.txt.*(sequence|sample|tokens)' "$NODE" data --out "$W/new" --sequence 64 "$W/short.txt"
says 1 'short.txt.*(sequence|sample|tokens)' "$NODE" data --out "$W/corpus" --sequence 64 "$W/short.txt"
says 1 'empty.txt' "$NODE" data --out "$W/corpus" --sequence 64 "$W/empty.txt"
[ "$(cat "$W"/corpus/* | b2sum)" = "$before" ] || bad "a refused text changed the corpus that was there"
[ ! -e "$W/new/corpus.json" ] || bad "a refused text left a corpus"

# ---- the run ------------------------------------------------------------------------------------------------
"$COORDINATOR" init "$R" --corpus "$W/corpus/corpus.json" --preset debug --set model.sequence=64 \
    --set outer.chunk_elements=65536 --set inner.batch=4 --set outer.inner_steps=30 --set outer.round_seconds=1 \
    --set outer.grace_seconds=0.5 --set outer.heartbeat_seconds=0.3 --set outer.silence_seconds=3 \
    --set outer.checkpoint_rounds=4 --set checkpoint.url="file://$SMALL" >"$W/init.log" 2>&1 || fail "init: $(tail -n 1 "$W/init.log")"
start_coordinator "$R" "$P"
start_node alice "$R"
wait_for 30 "$R" "round >= 1 and members_live == 2" || fail "no first round"
ALICE=$(sed -n 's/.*other members may connect to port \([0-9]*\).*/\1/p' "$W/alice.log" | tail -n 1)
goes_on "texts that are too short"

# ---- invites --------------------------------------------------------------------------------------------------
echo "invites"
used=$(cat "$W/alice.invite")
expired=$("$COORDINATOR" invite "$R" --expires 1s 2>/dev/null)
secret=${used#*#}
forged="${used%#*}#$(tr '0-9a-f' '1-9a-f0' <<<"$secret")"
run=${used%#*} run=${run##*/}
other_run="${used/$run/$(tr '0-9a-f' '1-9a-f0' <<<"$run")}"
says 1 'the coordinator says: this invite is used up; ask the operator for a new one' "$NODE" join "$used" --home "$W/carol"
says 1 'the coordinator says: this invite is unknown here; ask the operator for a new one' "$NODE" join "$forged" --home "$W/carol"
says 1 'it serves run [0-9a-f]{16}..., not [0-9a-f]{16}...' "$NODE" join "$other_run" --home "$W/dora"
sleep 1
says 1 'the coordinator says: this invite has expired; ask the operator for a new one' "$NODE" join "$expired" --home "$W/carol"
said coordinator 'enrolment from .* refused: this invite is used up' 5
said coordinator 'enrolment from .* refused: this invite is unknown here' 5
said coordinator 'enrolment from .* refused: this invite has expired' 5
[ "$(status "$R" 'len(members)')" = 2 ] || bad "somebody got in"
goes_on "bad invites"

# ---- ports and folders that are taken ----------------------------------------------------------------------------
echo "ports and folders that are taken"
"$COORDINATOR" init "$W/run2" --corpus "$W/corpus/corpus.json" --preset debug --set model.sequence=64 >/dev/null 2>&1 || bad "init of a second run"
says 1 "listen on 127.0.0.1 port $P: .*process ${PID[coordinator]}. holds it already; choose another address or port" \
    "$COORDINATOR" serve "$W/run2" --listen "127.0.0.1:$P"
says 1 "process ${PID[coordinator]} serves this run already" "$COORDINATOR" serve "$R" --listen "127.0.0.1:$(free_port)"
says 1 "alice is in use by a running node .process ${PID[alice]}.: stop it, or give another --home" "$NODE" run --home "$W/alice"
says 1 "alice is in use by a running node .process ${PID[alice]}." "$NODE" join "$used" --home "$W/alice"
says 1 "listen on .* port $ALICE: .*process ${PID[alice]}. holds it already" \
    "$NODE" join "$("$COORDINATOR" invite "$R" 2>/dev/null)" --home "$W/erin" --listen "$ALICE"
goes_on "ports and folders that are taken"

# ---- another corpus, a home that others can read ----------------------------------------------------------------------
echo "a node with something else"
mkdir "$W/texts"
head -c 300000 /dev/urandom | base64 >"$W/texts/other.txt"
"$NODE" data --out "$W/other" --sequence 64 "$W/texts/other.txt" >/dev/null 2>&1 || bad "data of another corpus"
invite=$("$COORDINATOR" invite "$R" 2>/dev/null)
says 1 '^intellect-node join: .*corpus' "$NODE" join "$invite" --home "$W/frank" --corpus "$W/other/corpus.json"
says 1 'no-such-corpus' "$NODE" run --home "$W/frank" --corpus "$W/no-such-corpus"
chmod 644 "$W/frank/identity.key"
says 1 'identity.key.*chmod 600' "$NODE" run --home "$W/frank"
chmod 600 "$W/frank/identity.key"
cp "$W/frank/run.json" "$W/run.json"
echo '{ "host": 7' >"$W/frank/run.json"
says 1 'run.json' "$NODE" run --home "$W/frank"
goes_on "a node with another corpus, an open key, a broken run.json"

# ---- settings, while the run is served and over a restart ------------------------------------------------------------------
echo "settings"
cp "$R/run.yaml" "$W/run.yaml"
sed -i 's/^  # quorum: .*/  quorums: 2/' "$R/run.yaml"
line=$(grep -n 'quorums: 2' "$R/run.yaml" | cut -d: -f1)
goes_on "run.yaml broken while it is served"
head_before=$(status "$R" head_index)
kill -TERM "${PID[coordinator]}"
wait "${PID[coordinator]}" || bad "the coordinator ended with $?"
unset "PID[coordinator]"
says 2 "run.yaml line $line: unknown key outer.quorums; allowed in outer: mode, inner_steps, round_seconds, quorum" "$COORDINATOR" serve "$R"
sed 's/^  # quorum: .*/  quorum: "2"/' "$W/run.yaml" >"$R/run.yaml"
says 2 "run.yaml line $line: outer.quorum is \"2\"; allowed are whole numbers from 1 to 1024" "$COORDINATOR" serve "$R"
sed 's/^  # quorum: .*/  quorum: [2]/' "$W/run.yaml" >"$R/run.yaml"
says 2 "run.yaml line $line: outer.quorum is a list; allowed are whole numbers from 1 to 1024" "$COORDINATOR" serve "$R"
cp "$W/run.yaml" "$R/run.yaml"
start_coordinator "$R" "$P"
wait_for 20 "$R" 'members_live == 2' || fail "alice does not come back"
[ "$(status "$R" head_index)" -ge "$head_before" ] || bad "the ledger is shorter than before"
goes_on "run.yaml wrong, then repaired"

# ---- checkpoints ----------------------------------------------------------------------------------------------------------------
echo "checkpoints"
whole() { ls -d "$SMALL"/step-*/manifest.sig 2>/dev/null | sort -V | tail -n 1; }
if [ -n "$mounted" ]; then
    said coordinator 'checkpoint of ledger [0-9]+ failed: .*(No space left on device|full)' 20
    [ -z "$(whole)" ] || bad "a checkpoint on a full disk looks whole"
    says 1 "small/home.*No space left on device" "$NODE" join "$("$COORDINATOR" invite "$R" 2>/dev/null)" --home "$SMALL/home"
    rm -rf "$SMALL/home"
    goes_on "a full disk under a checkpoint, and under a node's home"
    mount -o remount,size=64m "$SMALL" || bad "remount"
else
    echo "    skipped: a full disk while a checkpoint is written: $(tail -n 1 "$W/mount.err")"
fi
said coordinator 'checkpoint of ledger [0-9]+ is published' 20
C=$(dirname "$(whole)")
says 0 '' "$NODE" verify "$C"
head -c 4096 "$W/texts/other.txt" >"$W/eval.txt"
says 0 'loss' "$NODE" eval "$C" --text "$W/eval.txt" --sequence 64
spoil() { # spoil FILE: a copy of the checkpoint with one byte of this file changed
    rm -rf "$W/spoilt"
    cp -r "$C" "$W/spoilt"
    python3 - "$W/spoilt/$1" <<'PY'
import sys
with open(sys.argv[1], "r+b") as f:
    data = f.read()
    f.seek(len(data) * 3 // 4)
    f.write(bytes([data[len(data) * 3 // 4] ^ 1]))
PY
}
for f in $(cd "$C" && ls); do
    spoil "$f"
    case $f in # what is signed is not right: the signature's file is named, or the key
        manifest.json | manifest.sig | genesis.bin) says 1 'manifest.sig: ' "$NODE" verify "$W/spoilt" ;;
        *) says 1 "$f: digest [0-9a-f]+..., manifest says" "$NODE" verify "$W/spoilt" ;;
    esac
done
MODEL=model-00001-of-00001.safetensors
spoil $MODEL
says 1 "$MODEL" "$NODE" eval "$W/spoilt" --text "$W/eval.txt" --sequence 64
says 1 "$MODEL" "$NODE" generate "$W/spoilt" --prompt "The" --tokens 8
says 1 "$MODEL" "$NODE" export "$W/spoilt" "$W/exported"
[ ! -e "$W/exported/config.json" ] || bad "half an export looks whole"
rm -rf "$W/spoilt"; cp -r "$C" "$W/spoilt"; truncate -s -100 "$W/spoilt/$MODEL"
says 1 "$MODEL" "$NODE" verify "$W/spoilt"
says 1 "$MODEL" "$NODE" eval "$W/spoilt" --text "$W/eval.txt" --sequence 64
rm "$W/spoilt/$MODEL"
says 1 "$MODEL" "$NODE" verify "$W/spoilt"
rm -rf "$W/spoilt"; cp -r "$C" "$W/spoilt"; rm "$W/spoilt/manifest.sig"
says 1 'manifest' "$NODE" verify "$W/spoilt"
says 0 '' "$NODE" verify "$C"
goes_on "damaged checkpoints"

echo "the end"
kill -TERM "${PID[alice]}"
wait "${PID[alice]}" || bad "alice ended with $?"
unset "PID[alice]"
kill -TERM "${PID[coordinator]}"
wait "${PID[coordinator]}" || bad "the coordinator ended with $?"
unset "PID[coordinator]"
"$COORDINATOR" ledger verify "$R" >"$W/verify.log" 2>&1 || bad "the ledger does not verify: $(tail -n 1 "$W/verify.log")"
sed 's/^/    /' "$W/verify.log"
[ $failed -eq 0 ] && echo "all as expected, $SECONDS s"
exit $((failed > 0))
