#!/bin/bash
# What the CUDA plugin's kernels became, where nvcc built them: no registers spilled; nothing of the outer step
# fused into one rounding; 16 bytes at once in what is bound by memory; attention of bf16 on tensor cores; cuBLASLt, cuDNN and NCCL not needed to load but for the first; one symbol shown.
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
for f in rows update states attention_mma; do "$nvcc" -std=c++17 -O3 -I. -arch=compute_90 -ptx -o "$work/$f.ptx" kernels/cuda/$f.cu || exit 1; done
# Loads and stores of 16 bytes by kernel.
awk '/\.entry/ { name = $0; sub(/.*\.entry _Z[0-9]+/, "", name); sub(/\(.*/, "", name); loads[name] += 0 }
    /ld\.global[a-z.]*\.v4\.[fbu]32/ { loads[name]++ } /st\.global[a-z.]*\.v4\.[fbu]32/ { stores[name]++ }
    END { for (name in loads) print name, loads[name], stores[name] + 0 }' "$work"/{outer,rows,update,states,attention_mma}.ptx >"$work/wide"
# of KERNEL LOADS STORES: at least, in each of its instances
wide() { awk -v k="$1" -v l="$2" -v s="$3" 'index($1, k) == 1 { n++; few += $2 < l || $3 < s } END { exit !(n && !few) }' "$work/wide"; }
for k in adamw_fp32:4:3 adamw_planes:8:6 adamw_stochastic:7:5 swigluI:2:1 swiglu_gradient:3:2 rmsnormI:3:1 rmsnorm_gradient:7:1 \
    norm_weight_parts:2:1 add_branch:2:1 round_tensor:1:1 widen:1:1 split:2:2 join:2:2 rotate:4:2 entropy:2:1 embedI:1:1 \
    combine_vectors:2:1 descend_fp32:2:1 descend_bf16:4:2 bf16_in:2:1 bf16_out:1:2 codes_in:2:0 codes_out:0:1 int8_in:2:0 fp4_in:2:0 \
    gradients:3:1 steps:3:2 mixtures:2:1 moves:3:1 values_out:1:1 \
    attend_mma:0:1 query_gradient_mma:0:1 key_gradient_mma:0:2; do
    IFS=: read -r name loads stores <<<"$k"
    check "$name loads and stores 16 bytes at once" wide "$name" "$loads" "$stores"
done
# Products of attention by kernel: of tensor cores, and none of its own; tiles come past the registers.
for k in attend_mma:4 query_gradient_mma:6 key_gradient_mma:4; do
    IFS=: read -r k tiles <<<"$k"
    awk -v k="$k" -v tiles="$tiles" '/\.entry/ { here = index($0, k) > 0; n += here } here && /cp\.async\.cg\.shared\.global/ { cp++ }
        END { exit !(n == 2 && cp == tiles * n) }' "$work/attention_mma.ptx"
    check "$k loads its tiles by cp.async" test $? = 0
    awk -v k="$k" '/\.entry/ { here = index($0, k) > 0; n += here } here && /mma\.sync\.aligned\.m16n8k16.*bf16/ { mma++ }
        here && /ldmatrix\.sync/ { ld++ } END { exit !(n == 2 && mma >= 48 * n && ld >= 32 * n) }' "$work/attention_mma.ptx"
    check "$k multiplies on tensor cores" test $? = 0
done
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
