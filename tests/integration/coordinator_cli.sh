#!/bin/bash
# What the command line of intellect-coordinator answers to what people get wrong: the message, the exit code (2 = wrong use or
# settings, 1 = failed), and that nothing was lost by it.
cd "$(dirname "$0")/../.." || exit 1
. tests/lib.sh
cd "$W" || exit 1
failures=0

# says CODE TEXT COMMAND...: the command must end with CODE and say TEXT on stderr.
says() {
    local code=$1 text=$2 rc; shift 2
    "$COORDINATOR" "$@" >out.txt 2>err.txt </dev/null; rc=$?
    if [ $rc != "$code" ] || { [ -n "$text" ] && ! grep -qF -- "$text" err.txt; }; then
        echo "NOT OK  $*: exit $rc, expected $code and \"$text\"; it said:"; cat err.txt; failures=$((failures + 1))
    else echo "ok      $*: $(tail -n 1 err.txt)"; fi
}
check() { if "${@:2}"; then echo "ok      $1"; else echo "NOT OK  $1"; failures=$((failures + 1)); fi; }

mkdir corpus
cat >corpus/corpus.json <<'J'
{ "format": 1, "tokenizer": "bytes", "vocabulary": 256, "dtype": "uint16", "sequence": 128, "samples": 20000 }
J

# ---- the command line itself
says 2 "COMMAND --help explains"
says 2 "unknown command 'srve'" srve
for c in init serve invite status pause resume revoke release rotate rewind; do
    check "$c --help teaches with an example" sh -c "'$COORDINATOR' $c --help | grep -q '^example: intellect-coordinator $c'"
    check "and fits 100 columns" sh -c "! '$COORDINATOR' $c --help | grep '.\{101\}'"
    says 2 "the run's folder is missing" $c
    says 2 "unknown option --bogus" $c r --bogus
done
says 2 "say what to do: verify or show" ledger
check "checkpoints --help teaches with an example" sh -c "'$COORDINATOR' checkpoints --help | grep -q '^example: intellect-coordinator checkpoints'"
says 2 "the run's folder is missing" checkpoints
says 2 "say what to do: DIR list, pin, unpin or prune" checkpoints r
says 2 "say what to do: DIR list, pin, unpin or prune" checkpoints r purge
says 2 "which one: a ledger index" checkpoints r pin
says 2 "the ledger index is '-3'; allowed are whole numbers from 0" checkpoints r pin -3
says 2 "say how many of the newest stay: --last N" checkpoints r prune --every 3
says 2 "--last is '0'; allowed are whole numbers from 1" checkpoints r prune --last 0
says 2 "--set wants a value" init r --set

# ---- init
touch file; mkdir full; touch full/thing
says 2 "file is not a folder" init file
says 2 "full holds other things and no run" init full
says 1 "make the folder no/where: No such file or directory" init no/where
says 1 "--corpus missing.json: No such file or directory" init r --corpus missing.json
says 2 "--set: unknown key outer.quorums; allowed in outer: mode, inner_steps" init r --corpus corpus --set outer.quorums=2
says 2 "none of: debug, 10m, 150m, 1b, 8b, 10b" init r --corpus corpus --preset huge
says 2 "the corpus has samples of 128 tokens, model.sequence is 256" init r --corpus corpus --preset 10m
check "a refused init leaves no run.yaml" test ! -e r/run.yaml
says 0 "next: intellect-coordinator serve r" init r --corpus corpus/corpus.json
check "the folder is private" test "$(stat -c %a r)" = 700
check "keys are private" test "$(stat -c %a r/root.key r/online.key r/aggregator/identity.key | sort -u)" = 600
first=$(cut -d' ' -f10 out.txt)
says 0 "" init r
check "init again changes nothing" grep -qF "(unchanged)" out.txt
check "every setting is explained and has its default" test "$(grep -c '^  # [a-z_]*: ' r/run.yaml)" -ge 40

# ---- run.yaml
cp r/run.yaml good.yaml
line=$(($(wc -l <good.yaml) + 2))
printf 'outer:\n  nonsense: 3\n' >>r/run.yaml
says 2 "run.yaml line $line: unknown key outer.nonsense; allowed in outer: mode, inner_steps" serve r --no-aggregator
sed 's/^  # quorum: .*/  quorum: many/' good.yaml >r/run.yaml
line=$(grep -n 'quorum: many' r/run.yaml | cut -d: -f1)
says 2 "run.yaml line $line: outer.quorum is 'many'; allowed are whole numbers from 1 to 1024" serve r --no-aggregator
sed 's/^  # quorum: .*/  quorum: 7/' good.yaml >r/run.yaml
says 2 "outer.quorum is 7 in run.yaml, but 2 in the sealed run" serve r --no-aggregator
says 0 "" init r
check "before anybody has joined, init seals anew" grep -qF "(sealed anew)" out.txt
cp good.yaml r/run.yaml; "$COORDINATOR" init r >/dev/null 2>&1
sed -i 's/20000/20001/' corpus/corpus.json
says 2 "is another one than when the run was sealed" serve r --no-aggregator
sed -i 's/20001/20000/' corpus/corpus.json

# ---- what is no run
says 1 "the run's folder nothing: No such file or directory" status nothing
says 2 "file is not a folder" status file
says 1 "full holds no run; make one: intellect-coordinator init full" invite full
says 0 "" init unsealed
check "without a corpus, init tells how to go on" grep -qF "not sealed yet" out.txt
says 1 "unsealed holds no run" serve unsealed

# ---- invites
says 2 "--uses is '0'; allowed are whole numbers from 1 to 1000000" invite r --uses 0
says 2 "--expires is '7'; allowed are times like 30m, 12h and 7d" invite r --expires 7
says 2 "'host:99999' has no port" invite r --address host:99999
says 0 "for 3 nodes, until" invite r --uses 3 --address host.example:7171
check "stdout is the invite alone" grep -qE '^intellect://host.example:7171/[0-9a-f]{64}#[0-9a-f]{64}$' out.txt
check "nothing but the invite" test "$(wc -l <out.txt)" = 1

# ---- serving
P=$(free_port)
"$COORDINATOR" serve r --listen 127.0.0.1:"$P" --no-aggregator --log-json 2>coordinator.log &
PID[coordinator]=$!
wait_for 10 r serving || fail "the coordinator does not start"
says 1 "process ${PID[coordinator]} serves this run already" serve r --no-aggregator
says 1 "process ${PID[coordinator]} serves this run already" init r
"$COORDINATOR" init r2 --corpus corpus >/dev/null 2>&1
says 1 "listen on 127.0.0.1 port $P: intellect-coord (process ${PID[coordinator]}) holds it already; choose another address or port" \
    serve r2 --listen 127.0.0.1:"$P" --no-aggregator
says 2 "'nowhere' has no port" serve r2 --listen nowhere --no-aggregator
check "every log line is JSON" python3 -c 'import json, sys; [json.loads(l)["text"] for l in sys.stdin]' <coordinator.log
says 0 "to join at 127.0.0.1:$P" invite r
says 0 "" pause r
check "a paused run says so" wait_for 5 r 'phase == "paused"'
says 0 "" resume r
says 1 "no member is called 'bob'; there are none" revoke r --member bob
says 1 "no member is called '7'" release r --member 7
says 1 "there is no checkpoint 7; list shows them" checkpoints r pin 7
says 0 "" checkpoints r prune --last 3
check "none are no fault" grep -qF "no checkpoints in file://$W/r/checkpoints" out.txt
says 1 "serves this run already" rotate r
says 2 "the reason must be one line of UTF-8" revoke r --member bob --reason $'two\nlines'
says 2 "the reason has 241 bytes; allowed are 240" revoke r --member bob --reason "$(printf 'x%.0s' $(seq 241))"
printf '{"do": "revoke", "member": "bob", "reason": "two\\nlines"}\n' | python3 -c '
import socket, sys
s = socket.socket(socket.AF_UNIX); s.connect("r/control.sock"); s.sendall(sys.stdin.buffer.read()); print(s.recv(4096).decode())' >out.txt
check "nor is such a reason taken on the control socket" grep -qF "must be one line" out.txt
printf '{"do": "explode"}\n{"do"' | python3 -c '
import socket, sys
s = socket.socket(socket.AF_UNIX); s.connect("r/control.sock"); s.sendall(sys.stdin.buffer.read()); print(s.recv(4096).decode())' >out.txt
check "an unknown order is refused on the control socket" grep -qF "unknown order 'explode'" out.txt
printf 'GET / HTTP/1.0\r\n\r\n' >/dev/tcp/127.0.0.1/"$P"
head -c 5000 /dev/urandom 2>/dev/null >/dev/tcp/127.0.0.1/"$P"
check "plain HTTP and noise on the port leave it serving" wait_for 5 r serving
kill -STOP "${PID[coordinator]}"
says 0 "the serving process does not answer; this is what the store says" status r
kill -CONT "${PID[coordinator]}"
kill -TERM "${PID[coordinator]}"; wait "${PID[coordinator]}"
check "SIGTERM ends it in order" test $? = 0
check "and it says so" grep -qF '"stopped"' coordinator.log
for how in --default-signal=HUP --ignore-signal=HUP; do # a terminal that goes: to us, and under nohup
    env $how "$COORDINATOR" serve r --listen 127.0.0.1:"$P" --no-aggregator 2>coordinator.log &
    PID[coordinator]=$!
    wait_for 10 r serving || fail "the coordinator does not start again"
    kill -HUP "${PID[coordinator]}"
    if [ $how = --ignore-signal=HUP ]; then
        sleep 0.5
        check "SIGHUP is nothing to one under nohup" test "$(status r serving)" = True
        kill -TERM "${PID[coordinator]}"
    fi
    wait "${PID[coordinator]}"
    check "it ends in order ($how)" test $? = 0
done
unset "PID[coordinator]"

# ---- orders while nobody serves
says 0 "" pause r
says 0 "" resume r
says 2 "say whom: --member NUMBER" revoke r
says 2 "it is about the whole run" pause r --member 1
says 2 "say to which checkpoint" rewind r
says 2 "--to is 'x'" rewind r --to x
says 1 "no checkpoint of the state at 5; there are none at all" rewind r --to 5
says 1 "is not the root key of this run" rotate r --root-key r/online.key
cp r/online.key before.key
says 0 "" rotate r
check "the online key is another one" sh -c '! cmp -s r/online.key before.key && [ $(stat -c %a r/online.key) = 600 ]'
says 0 "" ledger verify r

# ---- damage
says 0 "" ledger verify r
mv r/online.key online.key
says 1 "online.key: No such file or directory" serve r --no-aggregator
cp r2/online.key r/online.key
says 1 "the delegation is for another key" serve r --no-aggregator
mv online.key r/online.key
chmod 644 r/online.key
says 1 "others may reach it; chmod 600 it" serve r --no-aggregator
chmod 600 r/online.key
cp r/store.sqlite store.good
python3 - <<'PY'
import sqlite3
db = sqlite3.connect("r/store.sqlite")
value = bytearray(db.execute("select value from ledger where key = 1").fetchone()[0])
value[-1] ^= 1
db.execute("update ledger set value = ? where key = 1", (bytes(value),)); db.commit()
PY
says 1 "ledger entry 1 is not signed by the root key" ledger verify r
cp store.good r/store.sqlite; rm -f r/store.sqlite-wal r/store.sqlite-shm
python3 -c 'f = open("r/store.sqlite", "r+b"); f.seek(4096); f.write(b"\xee" * 600)'
says 1 "store.sqlite" serve r --no-aggregator
echo "not a database, not at all, and longer than a hundred bytes, so that nobody takes it for an empty one ......." >r/store.sqlite
says 1 "file is not a database" status r
cp store.good r/store.sqlite
says 0 "" ledger verify r --json
check "the good store is still good" grep -q '"ok": true' out.txt

[ $failures = 0 ] || { echo "$failures failures"; exit 1; }
