#!/bin/bash
# tests/s3/bench.sh [NAME]: measure against Ceph on loopback: `store` (upload and download beside curl with four transfers)
# and `stall` (what a checkpoint into the bucket takes from training; BENCH_STALL=150m: of that preset), or one of them. Needs what
# `make bench` builds, and Ceph (docker/setup-debian.sh --s3). The server takes its processor time from the same cores; how much
# is said at the end.
cd "$(dirname "$0")/../.." || exit 1
. tests/lib.sh
. tests/s3/lib.sh
start_ceph bench 8
# A store is another machine's: where the kernel groups processes by session, its own come after ours.
for pid in "$CEPH"/run/*.pid; do echo 19 2>/dev/null >"/proc/$(cat "$pid")/autogroup"; done
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
