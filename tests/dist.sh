#!/bin/bash
# tests/dist.sh BUNDLE.tar.gz - unpacked to another folder, with an empty environment, the bundle's programs run, train,
# and load nothing from outside it but glibc.
set -u
bundle=$(realpath "$1")
dir=$(mktemp -d "/tmp/a bundle.XXXXXX")
trap 'rm -rf "$dir"' EXIT
failed=0
check() { local what=$1; shift; if "$@"; then echo "ok: $what"; else failed=$((failed + 1)); echo "FAILED: $what"; fi; }
clean() { env -i PATH=/usr/bin:/bin HOME="$dir" OMP_WAIT_POLICY=passive timeout 100 "$@"; }
tar -C "$dir" -xzf "$bundle" || exit 1
[ -r /proc/self/exe ] || { echo "dist: \$ORIGIN needs /proc"; exit 1; }
cd "$dir"/intellect-* || exit 1

outside() { # outside ALLOWED FILE...: libraries of the files that are neither theirs nor glibc's nor allowed
    local list allowed=$1; shift
    list=$(clean ldd "$@") && grep -q 'libc\.so' <<<"$list" || { echo "ldd failed: $list"; return; }
    awk -v own="$PWD/" -v allowed="^($allowed|ld-linux.*|lib(c|m|pthread|dl|rt|resolv|util|anl)\\.so\\..*)$" \
        '/=>/ && index($0, own) == 0 && $1 !~ allowed' <<<"$list"
}
nothing() { local found; found=$("$@"); [ -z "$found" ] || { echo "$found"; return 1; }; }
check "nothing but glibc comes from outside" nothing outside none bin/* libexec/test_kernels libexec/bench-train
[ ! -f lib/libintellect-cuda.so ] ||
    check "nor for the plugin, but cuBLASLt" nothing outside 'libcublasLt\\.so.*' lib/libintellect-cuda.so
check "intellect-node says its version" sh -c "env -i '$PWD/bin/intellect-node' --version | grep -q '^intellect-node .'"
check "intellect-coordinator too" sh -c "env -i '$PWD/bin/intellect-coordinator' --version | grep -q '^intellect-coordinator .'"

for i in $(seq 500); do echo "line $((i * i % 7919)) of a text, $((i % 13)) or more"; done >"$dir/text"
check "a corpus is made" clean bin/intellect-node data --out "$dir/corpus" --sequence 32 "$dir/text"
cat >"$dir/run.yaml" <<Y
model: {layers: 2, width: 32, heads: 4, kv_heads: 2, ffn: 64, vocabulary: 256, sequence: 32}
corpus: {manifest: "$dir/corpus"}
inner: {batch: 4, total_tokens: 2560}
Y
check "it trains" clean bin/intellect-node train "$dir/run.yaml" --threads 1 --out "$dir/out"
check "the coordinator makes a run" clean bin/intellect-coordinator init "$dir/run" --corpus "$dir/corpus/corpus.json" --set model.sequence=32
clean bin/intellect-node doctor --device cuda --no-listen --home "$dir/home" >"$dir/doctor.log" 2>&1
check "doctor says what it computes on, or what is missing" grep -qE 'computes on CUDA|NVIDIA driver' "$dir/doctor.log"
clean libexec/gpu.sh >"$dir/gpu.log" 2>&1
gpu=$?
check "without a GPU gpu.sh says so" sh -c "[ $gpu -eq 0 ] || grep -q 'no GPU' '$dir/gpu.log'"
[ $failed -eq 0 ] && echo "the bundle runs"
exit $((failed > 0))
