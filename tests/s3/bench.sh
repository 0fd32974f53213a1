#!/bin/bash
# tests/s3/bench.sh [NAME]: measure against Ceph on loopback: `store` (upload and download beside curl with four transfers)
# and `stall` (what a checkpoint into the bucket takes from training), or one of them. Needs what `make bench` builds, and
# Ceph (docker/setup-debian.sh --s3). The server takes its processor time from the same cores; how much is said at the end.
cd "$(dirname "$0")/../.." || exit 1
. tests/lib.sh
CEPH=$W/ceph
[ "$(df --output=avail -k /dev/shm 2>/dev/null | tail -n 1)" -gt 10000000 ] 2>/dev/null && CEPH=$(mktemp -d /dev/shm/intellect-ceph.XXXXXX)
stop_all() { tests/s3/ceph.sh stop "$CEPH" >/dev/null 2>&1; rm -rf "$CEPH"; end_all; }
trap stop_all EXIT
port=$(free_port)
S3_PORT=$port S3_CEPH_PORT=$((20000 + port % 10000 / 20 * 20)) S3_BUCKET=bench S3_STORE_GB=8 tests/s3/ceph.sh start "$CEPH" >"$W/s3.env" 2>"$W/ceph.log"
rc=$?
[ $rc != 77 ] || { tail -n 1 "$W/ceph.log"; exit 77; }
[ $rc = 0 ] || fail "ceph does not start: $(cat "$W/ceph.log")"
. "$W/s3.env"
export AWS_ACCESS_KEY_ID=$S3_ACCESS_KEY AWS_SECRET_ACCESS_KEY=$S3_SECRET_KEY AWS_CONFIG_FILE=/dev/null
export BENCH_STORE="s3://bench/x?endpoint=$S3_ENDPOINT"
server_cpu() { # seconds that Ceph's processes have worked
    local p sum=0
    for p in "$CEPH"/run/*.pid; do
        sum=$((sum + $(cut -d')' -f2 "/proc/$(cat "$p")/stat" | awk '{print $12 + $13}')))
    done
    echo $((sum / $(getconf CLK_TCK)))
}
for name in ${1:-store stall}; do
    before=$(server_cpu) began=$SECONDS
    "$BUILD/bench" --only "$name" || fail "bench $name"
    echo "the store's own processor time in $name: $(($(server_cpu) - before)) of $((SECONDS - began)) s"
done
