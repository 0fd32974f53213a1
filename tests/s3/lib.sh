# lib.sh - for scripts that want Ceph on loopback; after tests/lib.sh.

# start_ceph BUCKET GB: start it with a bucket and a store of so many GB, in memory where there is room. Sets CEPH (its
# folder), port (the gateway's) and what the store's clients read. Exits with 77 where Ceph is not installed.
start_ceph() {
    local rc
    CEPH=$W/ceph
    [ "$(df --output=avail -k /dev/shm 2>/dev/null | tail -n 1)" -gt $(($2 + 2))000000 ] 2>/dev/null && CEPH=$(mktemp -d /dev/shm/intellect-ceph.XXXXXX)
    CEPH_SH=$PWD/tests/s3/ceph.sh # whoever calls may go elsewhere
    trap stop_all EXIT
    port=$(free_port)
    S3_PORT=$port S3_CEPH_PORT=$((20000 + port % 10000 / 20 * 20)) S3_BUCKET=$1 S3_STORE_GB=$2 "$CEPH_SH" start "$CEPH" >"$W/s3.env" 2>"$W/ceph.log"
    rc=$?
    [ $rc != 77 ] || { tail -n 1 "$W/ceph.log"; exit 77; }
    [ $rc = 0 ] || fail "ceph does not start: $(cat "$W/ceph.log")"
    . "$W/s3.env"
    export AWS_ACCESS_KEY_ID=$S3_ACCESS_KEY AWS_SECRET_ACCESS_KEY=$S3_SECRET_KEY AWS_CONFIG_FILE=/dev/null
    unset AWS_ENDPOINT_URL AWS_ENDPOINT_URL_S3 AWS_REGION AWS_DEFAULT_REGION AWS_SESSION_TOKEN AWS_PROFILE INTELLECT_S3_KEY_FILE
}
stop_all() { "$CEPH_SH" stop "$CEPH" >/dev/null 2>&1; [ -n "${KEEP:-}" ] || rm -rf "$CEPH"; end_all; }
