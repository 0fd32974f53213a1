#!/bin/bash
# The S3 store against a real server, Ceph's radosgw on loopback: directly, and through a proxy that does to it what
# networks do. Skipped where Ceph is not installed: `make test-s3` installs it.
cd "$(dirname "$0")/../.." || exit 1
. tests/lib.sh
failures=0
check() { if "${@:2}"; then echo "ok      $1"; else echo "NOT OK  $1"; failures=$((failures + 1)); fi; }

# ---- the server, with a bucket and one that is full; in memory where there is room
CEPH=$W/ceph
[ "$(df --output=avail -k /dev/shm 2>/dev/null | tail -n 1)" -gt 6000000 ] 2>/dev/null && CEPH=$(mktemp -d /dev/shm/intellect-ceph.XXXXXX)
stop_all() { tests/s3/ceph.sh stop "$CEPH" >/dev/null 2>&1; [ -n "${KEEP:-}" ] || rm -rf "$CEPH"; end_all; }
trap stop_all EXIT
port=$(free_port)
S3_PORT=$port S3_CEPH_PORT=$((20000 + port % 10000 / 20 * 20)) S3_BUCKET=test S3_STORE_GB=4 tests/s3/ceph.sh start "$CEPH" >"$W/s3.env" 2>"$W/ceph.log"
rc=$?
[ $rc != 77 ] || { tail -n 1 "$W/ceph.log"; exit 77; }
[ $rc = 0 ] || fail "ceph does not start: $(cat "$W/ceph.log")"
. "$W/s3.env"
export AWS_ACCESS_KEY_ID=$S3_ACCESS_KEY AWS_SECRET_ACCESS_KEY=$S3_SECRET_KEY AWS_CONFIG_FILE=/dev/null
unset AWS_ENDPOINT_URL AWS_ENDPOINT_URL_S3 AWS_REGION AWS_DEFAULT_REGION AWS_SESSION_TOKEN AWS_PROFILE INTELLECT_S3_KEY_FILE
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
export INTELLECT_STORE_STALL_S=2
for seed in 1 2; do
    order random/15/$seed >/dev/null
    check "and keeps them when one request in six fails, seed $seed" live "$PROXY" test
done
order random/0/0 >/dev/null
check "of every kind of fault there were some: $(order seen)" test "$(order seen | python3 -c 'import json, sys; print(len(json.load(sys.stdin)))')" -ge 6

[ $failures = 0 ] || { echo "$failures failures"; fail "s3"; }
echo "all as expected"
