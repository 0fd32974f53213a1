#!/bin/bash
# `intellect-node doctor`: what it finds, what it refuses, and that it disturbs nobody. GPUs are the emulator, and a
# management library that tells of two.
set -u
cd "$(dirname "$0")/../.."
. tests/lib.sh
failed=0
ok() { printf 'ok: %s\n' "$1"; }
bad() { failed=$((failed + 1)); printf 'FAILED: %s\n' "$1"; }
check() { local what=$1; shift; if "$@"; then ok "$what"; else bad "$what"; fi; }
doctor() { timeout 60 "$NODE" doctor --home "$W/home" --threads 1 "$@"; }
# expect STATUS PATTERN... -- COMMAND...: each in a line of its output
expect() {
    local status=$1 patterns=() p out rc
    shift
    while [ "$1" != -- ]; do patterns+=("$1"); shift; done
    shift
    out=$("$@" 2>&1 </dev/null)
    rc=$?
    for p in "${patterns[@]}"; do
        if [ $rc -eq "$status" ] && grep -qE -- "$p" <<<"$out"; then ok "$(grep -E -m1 -- "$p" <<<"$out" | cut -c1-150)"
        else bad "$*: exit status $rc, wanted $status and \"$p\": $out"; fi
    done
}
with() { local -x "${1?}"; shift; "$@"; }
emulated() { # two GPUs by NVML, CUDA by the emulator
    local -x INTELLECT_CUDA_PLUGIN=$BUILD/emulator/libintellect-cuda.so LD_LIBRARY_PATH=$BUILD/emulator
    "$@"
}
cd "$W" || exit 1

# A machine alone.
expect 2 'auto, cpu, cuda' -- doctor --device gpu
expect 2 '150m' -- doctor --model 7b
expect 2 'invite' -- doctor nonsense
expect 1 'device +FAIL +.*/nowhere.so' 'disk +FAIL +write into /proc' 'This machine cannot join' -- \
    with INTELLECT_CUDA_PLUGIN=/nowhere.so timeout 60 "$NODE" doctor --home /proc/none --device cuda
expect 1 'memory +FAIL +training takes 1[0-9.]+ GB' -- doctor --device cpu --model 10b
check "nothing is left behind" test ! -e home -a -z "$(find . -name '.doctor*')"

# GPUs.
expect 0 'gpu +ok +0: NVIDIA H100 80GB HBM3, 85.9 GB, 75.2 free, PCIe 5.0 x16, 3 NVLinks' \
    'gpu +warn +1: .*PCIe 3.0 x4 .the card can more' 'topology +ok +GPU 0 and 1: through PCIe switches' \
    "gpu users +warn +.*process $$ .*9216 MB" 'products +warn .* of the card.s data sheet: look at its power' \
    'This machine can join' -- with FAKE_NVML_PID=$$ with EMULATOR_NAME='NVIDIA L4' emulated doctor --precision bf16
expect 1 'driver +warn +NVML, start: Driver Not Loaded' 'driver is for CUDA 12.4, this plugin for CUDA 13.0' -- \
    with FAKE_NVML=broken with EMULATOR_DRIVER=12040 emulated doctor --device cuda

# A run. The corpus is behind HTTP, whose Date the clock is compared with.
for i in $(seq 600); do echo "line $((i * i % 7919)) of a text to train on, $((i % 13)) or more"; done >text
"$NODE" data --out corpus --sequence 128 text >data.log || exit 1
web=$(free_port)
python3 -m http.server "$web" --bind 127.0.0.1 >web.log 2>&1 &
PID[web]=$!
mkdir run
echo "corpus: {manifest: corpus/corpus.json}" >run.yaml
"$COORDINATOR" init run --corpus corpus/corpus.json --preset debug >init.log 2>&1 || fail "init"
port=$(free_port)
elsewhere="intellect://127.0.0.1:$port/$(printf '%064d' 1)#$(printf '%064d' 7)"
expect 1 'coordinator +FAIL .*127.0.0.1:.*refused' -- doctor --device cpu "$elsewhere"
start_coordinator run "$port"
"$COORDINATOR" invite run >invite 2>/dev/null || fail "no invite"
expect 0 'coordinator +ok .* speaks for the run' 'corpus +ok .*samples of 128 tokens' "clock +ok +[01] s .*127.0.0.1:$web" \
    'speed +ok +about [0-9]+ tokens/s on a model of 1.06 million' 'port +ok +none is opened' -- \
    doctor --device cpu --no-listen --corpus "http://127.0.0.1:$web/corpus/corpus.json" @invite
expect 1 'coordinator +FAIL .*it serves run' 'corpus +FAIL .*; name another place with --corpus' "port +FAIL .*$port" -- \
    doctor --device cpu --listen "$port" --corpus "http://127.0.0.1:$web/none.json" "$elsewhere"
check "nobody was enrolled" test "$(status run 'len([m for m in members if not m["aggregate_only"]])')" = 0

# A member that trains meanwhile stays one, and its home needs no invite.
start_node home run --device cpu
wait_for 30 run 'len([m for m in members if m["live"]]) == 2' || fail "no member"
doctor --device cpu --json >report.json
expect 1 'home +FAIL +.*/home belongs to another run: give another --home' -- doctor --device cpu --no-listen "$elsewhere"
check "its connection was left alone" sh -c "! grep -q 'lost the coordinator' '$W/home.log'"
check "JSON" python3 -c 'import json, sys
r = json.load(open("report.json"))
names = [c["name"] for c in r["checks"]]
assert r["can_join"] is True and len(set(names)) == len(names), names
by = {c["name"]: c for c in r["checks"]}
assert by["coordinator"]["verdict"] == "ok", by["coordinator"]
assert by["products"]["rate"] > 0 and by["bandwidth"]["rate"] > 0 and by["speed"]["tokens_per_s"] > 0
assert by["disk"]["free_bytes"] > by["disk"]["needed_bytes"] > 0 and all(c["verdict"] in ("ok", "warn", "skip") for c in r["checks"])'
[ $failed -eq 0 ] && echo "all as expected"
exit $((failed > 0))
