#!/bin/bash
# tests/s3/ceph.sh start|stop DIR - a real S3 server for tests: a Ceph cluster of one machine (monitor, one
# OSD, RADOS gateway) from Debian's packages (docker/setup-debian.sh --s3), on 127.0.0.1 only, as root.
#
# start prints KEY=value lines: S3_ENDPOINT, S3_ACCESS_KEY, S3_SECRET_KEY, S3_REGION. A running server is left
# as it is; a stopped one is started with its data. Exit code 77: it cannot run here, and why. stop keeps DIR.
#   S3_PORT        HTTP port (default 7480)       S3_CEPH_PORT  first of 20 others (default 13300)
#   S3_BUCKET      a bucket to make               S3_STORE_GB   capacity in GiB, a sparse file (default 8)
#   S3_TIMEOUT     seconds to wait for each part (default 120)
set -euo pipefail
umask 022

COMMAND=${1:?start or stop} DIR=${2:?a folder}
PORT=${S3_PORT:-7480}
CPORT=${S3_CEPH_PORT:-13300}
ACCESS=${S3_ACCESS_KEY:-checkpoint-test}
SECRET=${S3_SECRET_KEY:-checkpoint-test-secret-key}
BUCKET=${S3_BUCKET:-}
STORE_GB=${S3_STORE_GB:-8}
TIMEOUT=${S3_TIMEOUT:-120}
REGION=us-east-1
ENDPOINT=http://127.0.0.1:$PORT

say() { echo "ceph: $*" >&2; }
die() { say "$*"; exit 1; }

# Ours: the pid file names a live process that was started with our own ceph.conf.
alive() {
    local p; p=$(cat "$DIR/run/$1.pid" 2>/dev/null) || return 1
    [ -n "$p" ] && { tr '\0' '\n' <"/proc/$p/cmdline"; } 2>/dev/null | grep -qxF -- "$DIR/ceph.conf"
}

if [ "$COMMAND" = stop ]; then
    [ -d "$DIR" ] || exit 0
    DIR=$(cd "$DIR" && pwd -P)
    for name in rgw osd mon; do
        alive $name || continue
        p=$(cat "$DIR/run/$name.pid")
        kill -TERM "$p"
        for _ in $(seq 100); do alive $name || break; sleep 0.1; done
        alive $name && kill -KILL "$p"
        rm -f "$DIR/run/$name.pid"
    done
    exit 0
fi

[ "$(id -u)" = 0 ] || { say "needs root"; exit 77; }
for program in ceph-mon ceph-osd radosgw radosgw-admin ceph curl flock; do
    command -v $program >/dev/null || { say "no $program here: docker/setup-debian.sh --s3 installs it"; exit 77; }
done

mkdir -p "$DIR"
DIR=$(cd "$DIR" && pwd -P)
[ "$DIR" != / ] || die "DIR must not be /"
mkdir -p "$DIR"/{log,run,mon,osd,rgw,crash}
exec 9>"$DIR/lock"
flock -w "$TIMEOUT" 9 || die "another start or stop holds $DIR/lock"

CONF=$DIR/ceph.conf
export CEPH_ARGS=

# --- helpers ------------------------------------------------------------------
launch() {            # launch NAME COMMAND...
    local name=$1; shift
    setsid "$@" </dev/null >>"$DIR/log/$name.out" 2>&1 9>&- &
    echo $! >"$DIR/run/$name.pid"
}
wait_for() {            # wait_for DAEMON WHAT COMMAND...
    local name=$1 what=$2 end=$((SECONDS + TIMEOUT)); shift 2
    until "$@" >/dev/null 2>&1; do
        alive "$name" || { tail -5 "$DIR/log/$name".* >&2; die "$name ended, see $DIR/log"; }
        [ $SECONDS -lt $end ] || die "timed out waiting for $what, see $DIR/log"
        sleep 0.2
    done
}
ceph_() { timeout 30 ceph -c "$CONF" --connect-timeout 10 "$@" 9>&-; }
gateway_up() { curl -sf --noproxy '*' -m 2 -o /dev/null "$ENDPOINT/"; }
signed() {            # curl 7.88 signs, but does not send, the payload hash
    curl -s --noproxy '*' -m 20 --aws-sigv4 "aws:amz:$REGION:s3" --user "$ACCESS:$SECRET" \
        -H 'x-amz-content-sha256: UNSIGNED-PAYLOAD' "$@"
}
port_free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# --- configuration, written once ----------------------------------------------
if [ ! -s "$DIR/fsid" ]; then cat /proc/sys/kernel/random/uuid >"$DIR/fsid"; fi
if [ ! -s "$DIR/osd.uuid" ]; then cat /proc/sys/kernel/random/uuid >"$DIR/osd.uuid"; fi
FSID=$(cat "$DIR/fsid")

if ! alive mon && ! alive osd && ! alive rgw; then
    cat >"$CONF" <<END
[global]
fsid = $FSID
mon_host = v2:127.0.0.1:$CPORT
mon_initial_members = a
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc
ms_bind_ipv4 = true
ms_bind_ipv6 = false
ms_bind_msgr1 = false
ms_bind_port_min = $((CPORT + 1))
ms_bind_port_max = $((CPORT + 19))
run_dir = $DIR/run
admin_socket =
crash_dir = $DIR/crash
log_file = $DIR/log/\$name.log
err_to_stderr = true
debug_rgw = 1/1
debug_osd = 0/1
debug_rocksdb = 0/1
debug_bluestore = 0/1
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_allow_pool_delete = true
mon_max_pg_per_osd = 2000
mon_warn_on_pool_no_redundancy = false

[mon]
mon_data = $DIR/mon/\$id
mon_cluster_log_file = $DIR/log/cluster.log
mon_data_avail_warn = 2
mon_data_avail_crit = 1

[osd]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
osd_data = $DIR/osd/\$id
osd_objectstore = bluestore
osd_memory_target = 1073741824
bluestore_block_size = $((STORE_GB * 1024 * 1024 * 1024))
bluestore_block_db_create = false
bluestore_block_wal_create = false
osd_numa_auto_affinity = false
osd_class_update_on_start = false

[client]
rgw_data = $DIR/rgw
rgw_frontends = beast endpoint=127.0.0.1:$PORT
rgw_rados_pool_pg_num_min = 4
rgw_thread_pool_size = 64
rgw_run_sync_thread = false
rgw_enable_ops_log = false
rgw_enable_usage_log = false
rgw_exit_timeout_secs = 5
END
    port_free "$PORT" || die "port $PORT is in use"
    port_free "$CPORT" || die "port $CPORT is in use"
fi

# --- monitor ------------------------------------------------------------------
if ! alive mon; then
    if [ ! -e "$DIR/mon/done" ]; then
        say "creating the cluster in $DIR"
        rm -rf "$DIR/mon/a"; mkdir -p "$DIR/mon/a"
        ceph-mon -c "$CONF" -i a --mkfs >>"$DIR/log/mon.out" 2>&1 9>&- ||
            { tail -5 "$DIR/log/mon.out" >&2; die "ceph-mon --mkfs failed"; }
        touch "$DIR/mon/done"
    fi
    launch mon ceph-mon -f -i a -c "$CONF"
fi
wait_for mon "the monitor" ceph_ mon stat

# --- object storage daemon ----------------------------------------------------
if ! alive osd; then
    if [ ! -e "$DIR/osd/done" ]; then
        id=$(ceph_ osd new "$(cat "$DIR/osd.uuid")" 2>>"$DIR/log/osd.out")
        [ "$id" = 0 ] || die "unexpected OSD id '$id'"
        rm -rf "$DIR/osd/0"; mkdir -p "$DIR/osd/0"
        ceph-osd -c "$CONF" -i 0 --mkfs --osd-uuid "$(cat "$DIR/osd.uuid")" \
            >>"$DIR/log/osd.out" 2>&1 9>&- ||
            { tail -5 "$DIR/log/osd.out" >&2; die "ceph-osd --mkfs failed"; }
        touch "$DIR/osd/done"
    else            # after a crash the map may still call the old one up
        ceph_ osd down 0 >>"$DIR/log/osd.out" 2>&1 || true
    fi
    launch osd ceph-osd -f -i 0 -c "$CONF"
fi
osd_up() { ceph_ osd stat -f json | grep -q '"num_up_osds":1'; }
wait_for osd "the OSD" osd_up

# --- gateway ------------------------------------------------------------------
alive rgw || launch rgw radosgw -f -n client.rgw -c "$CONF"
wait_for rgw "the gateway" gateway_up

# --- user and bucket ----------------------------------------------------------
admin() { timeout 60 radosgw-admin -c "$CONF" -n client.rgw "$@" >>"$DIR/log/admin.out" 2>&1 9>&-; }
if [ "$(signed -o /dev/null -w '%{http_code}' "$ENDPOINT/")" != 200 ]; then
    admin user create --uid=test --display-name=test \
        --access-key="$ACCESS" --secret-key="$SECRET" --max-buckets=0 ||
    admin key create --uid=test --key-type=s3 --access-key="$ACCESS" --secret-key="$SECRET" ||
        { tail -5 "$DIR/log/admin.out" >&2; die "cannot create the user"; }
    wait_for rgw "the user" signed -f "$ENDPOINT/"
fi
if [ -n "$BUCKET" ]; then
    signed -f -o /dev/null -X PUT "$ENDPOINT/$BUCKET" || die "cannot create bucket $BUCKET"
fi

{
    echo "S3_ENDPOINT=$ENDPOINT"
    echo "S3_ACCESS_KEY=$ACCESS"
    echo "S3_SECRET_KEY=$SECRET"
    echo "S3_REGION=$REGION"
    [ -z "$BUCKET" ] || echo "S3_BUCKET=$BUCKET"
} >"$DIR/s3.env"
cat "$DIR/s3.env"
