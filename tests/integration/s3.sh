#!/bin/bash
# The S3 store against a real server, Ceph's radosgw on loopback: directly, and through a proxy that does to it what
# networks do. Skipped where Ceph is not installed: `make test-s3` installs it.
cd "$(dirname "$0")/../.." || exit 1
. tests/lib.sh
. tests/s3/lib.sh
failures=0
check() { if "${@:2}"; then echo "ok      $1"; else echo "NOT OK  $1"; failures=$((failures + 1)); fi; }

# ---- the server, with a bucket and one that is full; in memory where there is room
start_ceph test 4
signed() { curl -s --noproxy '*' --aws-sigv4 "aws:amz:us-east-1:s3" --user "$S3_ACCESS_KEY:$S3_SECRET_KEY" -H 'x-amz-content-sha256: UNSIGNED-PAYLOAD' "$@"; }
admin() { radosgw-admin -c "$CEPH/ceph.conf" -n client.rgw "$@" >>"$W/admin.log" 2>&1; }
signed -f -X PUT "$S3_ENDPOINT/full" && admin quota set --quota-scope=bucket --bucket=full --max-size=1 &&
    admin quota enable --quota-scope=bucket --bucket=full || fail "no full bucket: $(tail -n 3 "$W/admin.log")"

# ---- what the store promises
live() { "$BUILD/s3_live" "$@" >"$W/live.log" 2>&1 || { grep -av ' RUN \|   OK ' "$W/live.log"; false; }; }
check "the store keeps its promises" live "$S3_ENDPOINT" test full

tests/s3/proxy.py "$W/proxy.port" "$port" >"$W/proxy.log" 2>&1 & PID[proxy]=$!
for _ in $(seq 100); do [ -s "$W/proxy.port" ] && break; sleep 0.1; done
PROXY=http://127.0.0.1:$(cat "$W/proxy.port")
order() { curl -sf --noproxy '*' "$PROXY/__$1"; }
export INTELLECT_STORE_STALL_S=1
order random/15/1 >/dev/null
check "and keeps them when one request in six fails" live "$PROXY" test
order random/0/0 >/dev/null
check "of every kind of fault there were some: $(order seen)" test "$(order seen | python3 -c 'import json, sys; print(len(json.load(sys.stdin)))')" -ge 5

# ---- a run whose checkpoints go there. The key is where `serve` is, and nowhere else.
R=$W/run P=$(free_port)
export INTELLECT_STORE_PART_MIB=5 INTELLECT_STORE_SPOOL=$W INTELLECT_STORE_TRIES=6
URL="s3://test/run?endpoint=$PROXY"
corpus "$W/corpus" --sequence 128 >"$W/data.log" 2>&1 || fail "data: $(tail -n 1 "$W/data.log")"
"$COORDINATOR" init "$R" --corpus "$W/corpus/corpus.json" --preset debug --set outer.inner_steps=10 --set outer.round_seconds=2 \
    --set outer.grace_seconds=0.5 --set outer.silence_seconds=5 --set outer.checkpoint_rounds=3 --set inner.batch=4 \
    --set model.width=192 --set model.heads=6 --set model.kv_heads=6 --set model.layers=6 --set model.ffn=768 \
    --set checkpoint.url="$URL" --set checkpoint.weights=bf16 >"$W/init.log" 2>&1 || fail "init: $(tail -n 1 "$W/init.log")"
start_coordinator "$R" "$P"
published() { grep -c 'is published' "$W/coordinator.log"; }
await_published() { local end=$((SECONDS + ${2:-60})); while [ $SECONDS -lt $end ]; do [ "$(published)" -ge "$1" ] && return 0; sleep 0.2; done; false; }
WRAP="env -u AWS_ACCESS_KEY_ID -u AWS_SECRET_ACCESS_KEY" start_node alice "$R"
WRAP="env -u AWS_ACCESS_KEY_ID -u AWS_SECRET_ACCESS_KEY" start_node bob "$R"
check "a checkpoint is published in the bucket" await_published 1
check "the key is in no file of the run" test -z "$(grep -rl "$S3_SECRET_KEY" "$R" "$W"/*.log 2>/dev/null)"
order random/10/3 >/dev/null
check "and more of them when one request in ten fails" await_published $(($(published) + 2)) 120
check "members sent parts of them: $(grep -o 'members sent .*' "$W/coordinator.log" | tail -n 1)" grep -q 'members sent [1-9]' "$W/coordinator.log"
order random/0/0 >/dev/null
# The store is away: training goes on, one line says so, and the checkpoint after it succeeds.
before=$(status "$R" round) done_before=$(published)
order fault/ANY/away/1000000 >/dev/null
check "rounds are committed while the store is away" wait_for 60 "$R" "round > $before + 4"
said() { for _ in $(seq "$1"); do grep -q "$2" "$W/coordinator.log" && return 0; sleep 0.5; done; false; }
check "and the operator reads why there is no checkpoint" said 120 'checkpoint of ledger [0-9]* failed: .*(tried 6 times)'
order heal >/dev/null
check "and checkpoints go on when it is back" await_published $((done_before + 2)) 200
check "latest moved" test "$("$NODE" inspect "$URL" --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["checkpoint"]["index"] > 0)')" = True
# The writer dies in the middle of an upload; it comes back, and so do checkpoints.
begun=$(grep -c 'checkpoint of ledger [0-9]* begins' "$W/coordinator.log") done_before=$(published)
for _ in $(seq 600); do [ "$(grep -c 'checkpoint of ledger [0-9]* begins' "$W/coordinator.log")" -gt "$begun" ] && break; sleep 0.05; done
kill -KILL "$(pgrep -P "${PID[coordinator]}" | head -n 1)"
check "checkpoints go on after the writer was killed" await_published $((done_before + 2)) 120
kill -TERM "${PID[alice]}" "${PID[bob]}"; wait "${PID[alice]}" "${PID[bob]}"; unset "PID[alice]" "PID[bob]"
kill -TERM "${PID[coordinator]}"; wait "${PID[coordinator]}"; unset "PID[coordinator]"

# ---- reading it
at() { "$NODE" inspect "$URL" --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["where"])'; }
LATEST=$(at)
check "verify reads it from the bucket" "$NODE" verify "$LATEST"
check "inspect lists its tensors" grep -q 'model.layers.5.mlp.down_proj.weight  *\[192,768\]' <("$NODE" inspect "$LATEST" --tensors)
check "fetch" "$NODE" fetch "$LATEST" "$W/fetched"
check "what was fetched verifies" "$NODE" verify "$W/fetched"
rm "$W/fetched/manifest.json" && order random/15/4 >/dev/null
check "fetch with one request in seven failing" "$NODE" fetch "$LATEST" "$W/faulty"
order random/0/0 >/dev/null
check "gives the same bytes" diff -r -x manifest.json "$W/fetched" "$W/faulty"

# Killed in the middle, several times, and called again.
bytes_of() { [ ! -d "$W/killed" ] && echo 0 || du -sb "$W/killed" | cut -f1; }
kills=0
for i in 1 2 3; do
    INTELLECT_STORE_STREAMS=1 INTELLECT_STORE_DOWN_MBIT=40 "$NODE" fetch "$LATEST" "$W/killed" >"$W/fetch.log" 2>&1 & PID[fetch]=$!
    want=$(($(bytes_of) + 4000000))
    while [ "$(bytes_of)" -lt $want ] && kill -0 "${PID[fetch]}" 2>/dev/null; do sleep 0.05; done
    kill -0 "${PID[fetch]}" 2>/dev/null && kills=$((kills + 1))
    kill_now fetch
done
check "a fetch was killed three times" test $kills = 3
"$NODE" fetch "$LATEST" "$W/killed" --json >"$W/fetch.json" 2>&1
check "and goes on from where it was" test "$(python3 -c 'import json, sys; j = json.load(open(sys.argv[1])); print(0 < j["fetched"] < j["bytes"] * 2 / 3)' "$W/fetch.json")" = True
check "and gives the same bytes" diff -r "$W/killed" "$W/faulty"

# One bit changed on the way: the digest finds it, and there is no manifest.
order fault/~momentum-00001-of-00001/flip/1000 >/dev/null
"$NODE" fetch "$LATEST" "$W/flipped" >"$W/flip.log" 2>&1; rc=$?
check "flipped bits are found: $(tail -n 1 "$W/flip.log" | cut -c1-100)" test $rc = 1 -a ! -e "$W/flipped/manifest.json" -a -n "$(grep momentum-00001 "$W/flip.log")"
order heal >/dev/null

# A published one: no key needed, over S3 or as a web page.
cat >"$W/policy" <<END
{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":{"AWS":["*"]},"Action":["s3:GetObject"],"Resource":["arn:aws:s3:::test/run/*"]}]}
END
signed -f -X PUT --data-binary @"$W/policy" "$S3_ENDPOINT/test?policy=" || fail "no policy"
anonymous() { env -u AWS_ACCESS_KEY_ID -u AWS_SECRET_ACCESS_KEY HOME="$W" "$@"; }
check "whoever has no key reads a public one" anonymous "$NODE" verify "$URL"
check "and as a web page" anonymous "$NODE" verify "$S3_ENDPOINT/test/run"
check "generate" anonymous "$NODE" generate "$S3_ENDPOINT/test/run" --prompt "The " --tokens 8 --threads 1
check "eval" anonymous "$NODE" eval "$URL" --text "$(dirname "$(dpkg -L perl-doc | grep -m1 '/perlfaq1\.pod$')")/perlfaq1.pod" --threads 1
check "export" anonymous "$NODE" export "$URL" "$W/exported"

# ---- what stays
listed() { "$COORDINATOR" checkpoints "$R" list --json | python3 -c 'import json, sys; print(eval(sys.argv[1], {"l": [json.loads(x) for x in sys.stdin]}))' "$1"; }
first=$(listed 'min(x["index"] for x in l if x["complete"])')
check "pin" "$COORDINATOR" checkpoints "$R" pin "$first"
"$COORDINATOR" checkpoints "$R" prune --last 1 --dry-run >"$W/dry.txt"
check "prune --dry-run says what would go: $(grep -c 'would go' "$W/dry.txt")" test "$(listed 'sum(x["complete"] for x in l) - 2')" = "$(grep -c 'would go' "$W/dry.txt")"
"$COORDINATOR" checkpoints "$R" prune --last 1 >"$W/prune.txt" || { failures=$((failures + 1)); cat "$W/prune.txt"; }
check "prune leaves the newest and the pinned" test "$(listed 'len([x for x in l if x["complete"]]) == 2 and all(x["pinned"] or x["latest"] for x in l if x["complete"])')" = True
check "the pinned one verifies" "$NODE" verify "s3://test/run/$(printf 'step-%012d' "$first")?endpoint=$S3_ENDPOINT"
check "and the latest" "$NODE" verify "$URL"

# The run's machines are gone: another begins with its checkpoint, from the store alone.
"$COORDINATOR" init "$W/second" --corpus "$W/corpus/corpus.json" --preset debug --set outer.inner_steps=10 --set outer.round_seconds=2 \
    --set outer.grace_seconds=0.5 --set outer.quorum=1 --set inner.batch=4 --set model.width=192 --set model.heads=6 --set model.kv_heads=6 \
    --set model.layers=6 --set model.ffn=768 --set outer.silence_seconds=2 --from "$LATEST" >"$W/init2.log" 2>&1 || fail "init --from: $(tail -n 1 "$W/init2.log")"
mv "$W/coordinator.log" "$W/first.log"
INTELLECT_STORE_DOWN_MBIT=30 start_coordinator "$W/second" "$P" # slow: a thread reads for longer than a node may be silent
WRAP="env -u AWS_ACCESS_KEY_ID -u AWS_SECRET_ACCESS_KEY" start_node carol "$W/second"
check "a run that begins with it commits" wait_for 60 "$W/second" 'round >= 1'
check "its own node was heard while it read: $(grep -o 'is being read.*' "$W/coordinator.log" | tail -n 1)" test "$(grep -c 'is being read' "$W/coordinator.log")" -ge 3 -a -z "$(grep 'member 1 (coordinator) lost: \|aggregator: leaving the connection' "$W/coordinator.log")"
check "and what it fetched is gone" test ! -e "$W/second/aggregator/origin" -a -e "$W/second/aggregator/state"

[ $failures = 0 ] || { echo "$failures failures"; fail "s3"; }
echo "all as expected"
