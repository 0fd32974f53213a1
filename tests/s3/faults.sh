#!/bin/bash
# tests/s3/faults.sh: a run that writes a checkpoint every second round into a bucket of Ceph, while what stands between
# them, and the processes, meet faults drawn at random. Rounds must be committed during each of them. In the end every
# checkpoint that is complete verifies, and `prune` leaves nothing in the bucket but one of them.
#
#   MINUTES=3            how long
#   FAULTS="..."         which, of those below; SEED=N repeats their order
#   AWAY=20              seconds that the store is away, when it is
cd "$(dirname "$0")/../.." || exit 1
. tests/lib.sh
. tests/s3/lib.sh
RANDOM=${SEED:=$(date +%s)}
MINUTES=${MINUTES:-3} AWAY=${AWAY:-20}
FAULTS=${FAULTS:-mixed 500 503 429 reset stall truncate lost flip skew full away member writer coordinator}
say() { printf '%4d s  %s\n' $SECONDS "$*"; }

# ---- Ceph and the proxy before it
start_ceph test 4
tests/s3/proxy.py "$W/proxy.port" "$port" >"$W/proxy.log" 2>&1 & PID[proxy]=$!
for _ in $(seq 100); do [ -s "$W/proxy.port" ] && break; sleep 0.1; done
PROXY=http://127.0.0.1:$(cat "$W/proxy.port")
order() { curl -sf --noproxy '*' "$PROXY/__$1"; }
seen() { order seen | python3 -c 'import json, sys; print(json.load(sys.stdin).get(sys.argv[1], 0))' "$1"; }

# ---- the run. Its store gives up soon, so that a fault ends some checkpoints and not only delays them.
R=$W/run P=$(free_port)
export INTELLECT_STORE_PART_MIB=5 INTELLECT_STORE_SPOOL=$W INTELLECT_STORE_TRIES=4 INTELLECT_STORE_STALL_S=2
corpus "$W/corpus" --sequence 128 >"$W/data.log" 2>&1 || fail "data: $(tail -n 1 "$W/data.log")"
"$COORDINATOR" init "$R" --corpus "$W/corpus/corpus.json" --preset debug --set outer.inner_steps=4 --set outer.round_seconds=2 \
    --set outer.grace_seconds=0.5 --set outer.silence_seconds=20 --set outer.checkpoint_rounds=2 --set outer.quorum=1 --set inner.batch=4 \
    --set model.width=192 --set model.heads=6 --set model.kv_heads=6 --set model.layers=6 --set model.ffn=768 \
    --set checkpoint.url="s3://test/run?endpoint=$PROXY" --set checkpoint.weights=bf16 >"$W/init.log" 2>&1 || fail "init: $(tail -n 1 "$W/init.log")"
start_coordinator "$R" "$P"
# A member has no key, and takes seconds for a part.
helper() { WRAP="env -u AWS_ACCESS_KEY_ID -u AWS_SECRET_ACCESS_KEY INTELLECT_STORE_UP_MBIT=40" start_node "$1" "$R"; }
for n in alice bob; do helper $n; done
logged() { grep -c "$1" "$W/coordinator.log"; }
await() { local end=$((SECONDS + $3)); while [ "$(logged "$1")" -lt "$2" ]; do [ $SECONDS -lt $end ] || return 1; sleep 0.2; done; }
await 'is published' 1 120 || fail "no first checkpoint"

# ---- faults
undisturbed() { # for at least $1 seconds, and two rounds
    local before end=$((SECONDS + $1)); before=$(status "$R" round)
    wait_for 150 "$R" "round >= ${before:-0} + 2" || fail "no rounds during '$fault': SEED=$SEED"
    while [ $SECONDS -lt $end ]; do sleep 0.5; done
}
writer() { pgrep -P "${PID[coordinator]}" | head -n 1; }
again() { start_coordinator "$R" "$P"; undisturbed 0; }
meet() {
    case $1 in
    mixed) order "random/20/$RANDOM" >/dev/null; undisturbed 10 ;;
    away) order fault/ANY/away/1000000 >/dev/null; undisturbed "$AWAY" ;;
    flip) order 'fault/~.safetensors/flip/6' >/dev/null; undisturbed 10 ;;
    full) order fault/PUT/full/1000000 >/dev/null; undisturbed 10 ;;
    member) # in the middle of a part, which another has to send
        await 'checkpoint of ledger [0-9]* begins' $(($(logged 'checkpoint of ledger [0-9]* begins') + 1)) 120
        sleep 0.5; kill_now alice; undisturbed 0; helper alice ;;
    writer) # in the middle of an upload
        await 'checkpoint of ledger [0-9]* begins' $(($(logged 'checkpoint of ledger [0-9]* begins') + 1)) 120
        kill -KILL "$(writer)"; undisturbed 0 ;;
    coordinator) # between verify and manifest, with its node
        local before end=$((SECONDS + 120)) child; before=$(seen hold)
        order 'fault/~manifest.sig/hold/1' >/dev/null
        while [ "$(seen hold)" = "$before" ] && [ $SECONDS -lt $end ]; do sleep 0.1; done
        child=$(writer); kill_now coordinator; kill -KILL "$child"; again ;;
    *) order "fault/ANY/$1/40" >/dev/null; undisturbed 10 ;;
    esac
    order heal >/dev/null
}
count=0
while [ $SECONDS -lt $((MINUTES * 60)) ]; do
    for fault in $(for f in $FAULTS; do echo "$RANDOM $f"; done | sort -n | cut -d' ' -f2); do
        [ $SECONDS -lt $((MINUTES * 60)) ] || break
        meet "$fault"; count=$((count + 1))
        say "$fault: round $(status "$R" round), $(logged 'is published') published, $(logged 'checkpoint of ledger [0-9]* failed') failed, $(logged 'members sent [1-9]') shared, $(logged 'its part [0-9]* goes on') handed on"
        [ $((count % 4)) != 0 ] || "$COORDINATOR" checkpoints "$R" prune --last 3 >>"$W/prune.log" 2>&1 || fail "prune beside a writer"
    done
done
await 'is published' $(($(logged 'is published') + 1)) 150 || fail "no checkpoint after the last fault: SEED=$SEED"
for n in alice bob coordinator; do kill -TERM "${PID[$n]}"; done; wait "${PID[alice]}" "${PID[bob]}" "${PID[coordinator]}"
unset "PID[alice]" "PID[bob]" "PID[coordinator]"

# ---- what is left
"$COORDINATOR" checkpoints "$R" list --json >"$W/list" || fail "list"
python3 - "$W/list" "$R" <<'END' || fail "latest is not the newest complete one"
import json, sys
l = [json.loads(x) for x in open(sys.argv[1])]
done = [x for x in l if x["complete"]]
print(len(done), "complete,", len(l) - len(done), "unfinished")
sys.exit(0 if max(done, key=lambda x: x["index"])["latest"] else 1)
END
for i in $(python3 -c 'import json, sys; [print(x["index"]) for x in map(json.loads, open(sys.argv[1])) if x["complete"]]' "$W/list"); do
    "$NODE" verify "s3://test/run/$(printf 'step-%012d' "$i")?endpoint=$S3_ENDPOINT" >>"$W/verify.log" 2>&1 || fail "checkpoint $i does not verify: $(tail -n 1 "$W/verify.log")"
done
"$COORDINATOR" checkpoints "$R" prune --last 1 --stale-hours 0 >>"$W/prune.log" 2>&1 || fail "prune: $(tail -n 1 "$W/prune.log")"
signed() { curl -s --noproxy '*' --aws-sigv4 "aws:amz:us-east-1:s3" --user "$S3_ACCESS_KEY:$S3_SECRET_KEY" -H 'x-amz-content-sha256: UNSIGNED-PAYLOAD' "$@"; }
signed "$S3_ENDPOINT/test?list-type=2&prefix=run" >"$W/objects" && signed "$S3_ENDPOINT/test?uploads=" >"$W/uploads" || fail "cannot list the bucket"
kept=$("$NODE" inspect "s3://test/run?endpoint=$S3_ENDPOINT" --tensors --json) || fail "latest does not open"
KEPT=$kept python3 - "$W/objects" "$W/uploads" <<'END' || fail "something is left that prune did not find"
import json, os, re, sys
keys = re.findall("<Key>([^<]*)</Key>", open(sys.argv[1]).read())
uploads = re.findall("<UploadId>([^<]*)</UploadId>", open(sys.argv[2]).read())
kept = json.loads(os.environ["KEPT"])
folder = "run/" + kept["where"].split("?")[0].rsplit("/", 1)[1] + "/"
named = {folder + o["name"] for o in kept["objects"]} | {folder + n for n in ("manifest.json", "manifest.sig", "claim")} | {"run/latest"}
over = [k for k in keys if k not in named]
print(len(keys), "objects left, of", len(named), "named;", len(uploads), "uploads half done", *over[:5])
sys.exit(1 if over or uploads or len(keys) < len(named) - 1 else 0)
END
say "SEED=$SEED: $count faults, $(logged 'is published') checkpoints published, $(logged 'checkpoint of ledger [0-9]* failed') failed, $(grep -o 'round [0-9]* committed' "$W/coordinator.log" | tail -n 1)"
