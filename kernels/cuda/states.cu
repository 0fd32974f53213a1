/* states.cu - moments of an optimizer in fewer bits, steps along a direction, and sums of two vectors;
 * states.h. All of it is bound by memory. */
#include "kernels/cuda/cuda.h"

#include <math.h> /* not for C alone */

extern "C" {
#include "kernels/states.h"
}

/* ---- sums and steps ----------------------------------------------------------------------------- */

__global__ void combine_vectors(float *out, float a, const float *x, float b, const float *y, size_t n) {
    size_t i = grid_index();
    if (i < n) out[i] = a * x[i] + b * y[i];
}

static void combine(const struct kernels *k, float *out, float a, const float *x, float b, const float *y,
                    size_t n) {
    unsigned blocks = cuda_blocks(n, CUDA_THREADS);
    if (n) RUN(cuda_of(k), combine_vectors, blocks, CUDA_THREADS, 0, out, a, x, b, y, n);
}

__global__ void descend_fp32(float *param, const float *direction, size_t n, struct kernels_descent d) {
    size_t i = grid_index();
    if (i < n) param[i] = d.keep * param[i] - d.step * direction[i];
}

__global__ void descend_bf16(uint16_t *upper, uint16_t *lower, const float *direction, size_t n,
                             struct kernels_descent d) {
    size_t i = grid_index();
    if (i >= n) return;
    float old = lower ? bf16_join(upper[i], lower[i]) : bf16_widen(upper[i]);
    float param = d.keep * old - d.step * direction[i];
    upper[i] = lower ? bf16_upper(param) : bf16_stochastic(param, bf16_random(d.seed, d.first + i));
    if (lower) lower[i] = bf16_lower(param);
}

static void descend(const struct kernels *k, void *param, uint16_t *rest, const float *direction, size_t n,
                    const struct kernels_descent *d) {
    unsigned blocks = cuda_blocks(n, CUDA_THREADS);
    if (!n) return;
    if (k->weight_bytes == sizeof(float))
        RUN(cuda_of(k), descend_fp32, blocks, CUDA_THREADS, 0, (float *)param, direction, n, *d);
    else RUN(cuda_of(k), descend_bf16, blocks, CUDA_THREADS, 0, (uint16_t *)param, rest, direction, n, *d);
}

/* ---- moments ------------------------------------------------------------------------------------ */

__global__ void bf16_in(uint16_t *out, const float *x, size_t n, uint64_t seed, uint64_t first) {
    size_t i = grid_index();
    if (i < n) out[i] = state_bf16(x[i], seed, first + i);
}

__global__ void bf16_out(float *x, const uint16_t *state, size_t n) {
    size_t i = grid_index();
    if (i < n) x[i] = bf16_widen(state[i]);
}

/* Of the whole block, for all of it. */
__device__ static float block_max(float x) {
    __shared__ float parts[CUDA_WARP];
    for (int step = CUDA_WARP / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    if (threadIdx.x % CUDA_WARP == 0) parts[threadIdx.x / CUDA_WARP] = x;
    __syncthreads();
    x = parts[0];
    for (unsigned i = 1; i < blockDim.x / CUDA_WARP; i++) x = fmaxf(x, parts[i]);
    return x;
}

/* A block of threads for a block of elements. */
__global__ void codes_in(uint8_t *state, int root, const float *x, size_t n, uint64_t seed, uint64_t first) {
    size_t i = grid_index();
    uint8_t *block = state + (size_t)blockIdx.x * STATE_BLOCK_BYTES;
    float mine = i < n ? x[i] : 0.0f;
    float unit = state_unit(block_max(root ? sqrtf(mine) : fabsf(mine)),
                            root ? STATE_TOP_ROOT : STATE_TOP_SIGNED);
    float per_unit = unit > 0 ? 1 / unit : 0, random = seed ? state_random(seed, first + i) : 0.5f;
    if (threadIdx.x == 0) *(float *)block = unit;
    if (i >= n) return;
    uint32_t code = root ? state_root(mine, per_unit, random) : state_signed(mine, per_unit, random);
    block[sizeof unit + threadIdx.x] = (uint8_t)code;
}

__global__ void codes_out(float *x, const uint8_t *state, int root, size_t n) {
    size_t i = grid_index();
    const uint8_t *block = state + (size_t)blockIdx.x * STATE_BLOCK_BYTES;
    if (i >= n) return;
    float unit = *(const float *)block;
    uint8_t code = block[sizeof unit + threadIdx.x];
    x[i] = root ? state_root_value(code, unit) : state_signed_value(code, unit);
}

static void state_in(const struct kernels *k, void *state, enum kernels_state how, const float *x, size_t n,
                     uint64_t seed, uint64_t first) {
    struct cuda *c = cuda_of(k);
    unsigned blocks = cuda_blocks(n, KERNELS_STATE_BLOCK);
    if (!n) return;
    if (how == KERNELS_STATE_BF16)
        RUN(c, bf16_in, blocks, KERNELS_STATE_BLOCK, 0, (uint16_t *)state, x, n, seed, first);
    else
        RUN(c, codes_in, blocks, KERNELS_STATE_BLOCK, 0, (uint8_t *)state, how == KERNELS_STATE_ROOT8, x, n,
            seed, first);
}

static void state_out(const struct kernels *k, float *x, const void *state, enum kernels_state how,
                      size_t n) {
    struct cuda *c = cuda_of(k);
    unsigned blocks = cuda_blocks(n, KERNELS_STATE_BLOCK);
    if (!n) return;
    if (how == KERNELS_STATE_BF16)
        RUN(c, bf16_out, blocks, KERNELS_STATE_BLOCK, 0, x, (const uint16_t *)state, n);
    else
        RUN(c, codes_out, blocks, KERNELS_STATE_BLOCK, 0, x, (const uint8_t *)state,
            how == KERNELS_STATE_ROOT8, n);
}

void cuda_fill_states(struct kernels *k) {
    k->descend = descend;
    k->combine = combine;
    k->state_in = state_in;
    k->state_out = state_out;
}
