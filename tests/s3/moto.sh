#!/bin/bash
# tests/s3/moto.sh VENV: the S3 store against a second server, moto, which shares no code with Ceph. It is put into the
# folder VENV by pip where it is not there yet; it keeps objects in memory and checks no signatures. Exit code 77: it
# cannot be had, and why.
cd "$(dirname "$0")/../.." || exit 1
. tests/lib.sh
V=${1:?a folder}
[ -x "$V/bin/moto_server" ] || { python3 -m venv "$V" && "$V/bin/pip" install -q -r tests/s3/requirements.txt; } >"$W/pip.log" 2>&1 ||
    { echo "no moto: $(tail -n 1 "$W/pip.log")"; exit 77; }
P=$(free_port)
"$V/bin/moto_server" -H 127.0.0.1 -p "$P" >"$W/moto.log" 2>&1 & PID[moto]=$!
for _ in $(seq 200); do curl -s --noproxy '*' -o /dev/null "http://127.0.0.1:$P/" && break; sleep 0.1; done
curl -sf --noproxy '*' -X PUT -o /dev/null "http://127.0.0.1:$P/test" || fail "moto does not start"
export AWS_ACCESS_KEY_ID=anybody AWS_SECRET_ACCESS_KEY=anything AWS_CONFIG_FILE=/dev/null INTELLECT_STORE_TRIES=2 S3_LIVE_NO_KEYS=1
unset AWS_ENDPOINT_URL AWS_ENDPOINT_URL_S3 AWS_REGION AWS_DEFAULT_REGION AWS_SESSION_TOKEN AWS_PROFILE INTELLECT_S3_KEY_FILE
"$BUILD/s3_live" "http://127.0.0.1:$P" test >"$W/live.log" 2>&1 || fail "the store does not keep its promises with moto"
echo "ok      the store keeps its promises with moto, too: $(grep -c '^\[       OK' "$W/live.log") tests"
