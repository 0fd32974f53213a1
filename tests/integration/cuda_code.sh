#!/bin/bash
# What the CUDA plugin's kernels became, where nvcc built them: no registers spilled; nothing of the outer step
# fused into one rounding; cuBLASLt, cuDNN and NCCL not needed to load but for the first; one symbol shown.
set -u
cd "$(dirname "$0")/../.."
BUILD=$(cd "${BUILD:-build}" && pwd)
nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
[ -n "$nvcc" ] && [ -e "$BUILD/libintellect-cuda.so" ] || { echo "nvcc is not on this machine"; exit 77; }
failed=0
check() { local what=$1; shift; if "$@"; then echo "ok: $what"; else failed=$((failed + 1)); echo "FAILED: $what"; fi; }
work=$(mktemp -d "${TMPDIR:-/tmp}/cuda_code.XXXXXX")
trap 'rm -rf "$work"' EXIT

# ptxas' words, kept beside each object: "Compiling entry function 'NAME' for 'sm_90'", then its spills.
awk -v q="'" 'index($0, "Compiling entry function") { split($0, part, q); kernel = part[2] " " part[4]; kernels++ }
    match($0, /[0-9]+ bytes spill stores/) && substr($0, RSTART, 1) != "0" { print kernel, substr($0, RSTART, RLENGTH) }
    END { print kernels + 0 > "/dev/stderr" }' "$BUILD"/cuda/*.o.log >"$work/spills" 2>"$work/kernels"
check "ptxas told of $(cat "$work/kernels") kernels" test "$(cat "$work/kernels")" -ge 100
check "none spills" test ! -s "$work/spills"; cat "$work/spills"

"$nvcc" -std=c++17 -O3 -I. -fmad=false -arch=compute_90 -ptx -o "$work/outer.ptx" kernels/cuda/outer.cu || exit 1
"$nvcc" -std=c++17 -O3 -I. -arch=compute_90 -ptx -o "$work/fused.ptx" kernels/cuda/outer.cu || exit 1
check "the outer step has no fused multiply-add" test "$(grep -c 'fma\.' "$work/outer.ptx")" = 0
check "which nvcc would have made of it" test "$(grep -c 'fma\.' "$work/fused.ptx")" -gt 0
check "its divisions and products round as IEEE's" test "$(grep -c 'div\.rn\.f32' "$work/outer.ptx")" -gt 0 -a \
    "$(grep -cE '(div\.(approx|full)|\.ftz)' "$work/outer.ptx")" = 0
make -n -W kernels/cuda/outer.cu "$BUILD/cuda/outer.o" BUILD="$BUILD" >"$work/rule" 2>&1
check "and the plugin's is built so" grep -q -- '-fmad=false.*outer.cu' "$work/rule"

needed=$(readelf -d "$BUILD/libintellect-cuda.so" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' | grep -iE 'cuda|cublas|cudnn|nccl' | sort | tr '\n' ' ')
check "of NVIDIA's libraries it needs cuBLASLt alone: $needed" grep -qE '^libcublasLt\.so\.[0-9]+ $' <<<"$needed"
shown=$(nm -D --defined-only "$BUILD/libintellect-cuda.so" | awk '$2 == "T" { print $3 }' | grep -v '^_\(init\|fini\)$' | tr '\n' ' ')
check "it shows one function: $shown" test "$shown" = "intellect_cuda_create "
exit $((failed > 0))
