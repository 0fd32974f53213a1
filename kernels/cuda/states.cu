/* states.cu - moments of an optimizer in fewer bits, steps along a direction, and sums of two vectors;
 * states.h. All of it is bound by memory. */
#include "kernels/cuda/cuda.h"

#include <math.h> /* not for C alone */

extern "C" {
#include "kernels/states.h"
}

/* ---- sums and steps ----------------------------------------------------------------------------- */

__global__ void combine_vectors(float *out, float a, const float *x, float b, const float *y, size_t n) {
    by_groups<4>(n, aligned(out, x, y), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        float p[N], q[N];
        take(p, x + i), take(q, y + i);
        UNROLL
        for (int j = 0; j < N; j++) p[j] = a * p[j] + b * q[j];
        give(out + i, p);
    });
}

static void combine(const struct kernels *k, float *out, float a, const float *x, float b, const float *y,
                    size_t n) {
    if (n) RUN(cuda_of(k), combine_vectors, cuda_group_blocks(n, 4), CUDA_THREADS, 0, out, a, x, b, y, n);
}

__global__ void descend_fp32(float *param, const float *direction, size_t n, struct kernels_descent d) {
    by_groups<4>(n, aligned(param, direction), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        float p[N], to[N];
        take(p, param + i), take(to, direction + i);
        UNROLL
        for (int j = 0; j < N; j++) p[j] = d.keep * p[j] - d.step * to[j];
        give(param + i, p);
    });
}

__global__ void descend_bf16(uint16_t *upper, uint16_t *lower, const float *direction, size_t n,
                             struct kernels_descent d) {
    by_groups<8>(n, aligned(upper, lower, direction), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        uint16_t up[N], low[N];
        float to[N];
        take(up, upper + i), take(to, direction + i);
        if (lower) take(low, lower + i);
        UNROLL
        for (int j = 0; j < N; j++) {
            float old = lower ? bf16_join(up[j], low[j]) : bf16_widen(up[j]),
                  param = d.keep * old - d.step * to[j];
            up[j] = lower ? bf16_upper(param)
                          : bf16_stochastic(param, bf16_random(d.seed, d.first + i + (size_t)j));
            low[j] = bf16_lower(param);
        }
        give(upper + i, up);
        if (lower) give(lower + i, low);
    });
}

static void descend(const struct kernels *k, void *param, uint16_t *rest, const float *direction, size_t n,
                    const struct kernels_descent *d) {
    if (!n) return;
    if (k->weight_bytes == sizeof(float))
        RUN(cuda_of(k), descend_fp32, cuda_group_blocks(n, 4), CUDA_THREADS, 0, (float *)param, direction, n,
            *d);
    else
        RUN(cuda_of(k), descend_bf16, cuda_group_blocks(n, 8), CUDA_THREADS, 0, (uint16_t *)param, rest,
            direction, n, *d);
}

/* ---- moments ------------------------------------------------------------------------------------ */

__global__ void bf16_in(uint16_t *out, const float *x, size_t n, uint64_t seed, uint64_t first) {
    by_groups<8>(n, aligned(out, x), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        float from[N];
        uint16_t to[N];
        take(from, x + i);
        UNROLL
        for (int j = 0; j < N; j++) to[j] = state_bf16(from[j], seed, first + i + (size_t)j);
        give(out + i, to);
    });
}

__global__ void bf16_out(float *x, const uint16_t *state, size_t n) {
    by_groups<8>(n, aligned(x, state), [&](size_t i, auto group) {
        float to[decltype(group)::n];
        take_wide(to, state + i);
        give(x + i, to);
    });
}

/* Of the warp, for all of it. */
__device__ static float warp_max(float x) {
    for (int step = CUDA_WARP / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

static_assert(KERNELS_STATE_BLOCK == CUDA_CODED && STATE_BLOCK_BYTES % sizeof(float) == 0, "a warp's");

/* A warp for a block of elements. */
__global__ void codes_in(uint8_t *state, int root, const float *x, size_t n, uint64_t seed, uint64_t first) {
    size_t number = grid_index() / CUDA_WARP, from = number * CUDA_CODED;
    if (from >= n) return;
    uint8_t *block = state + number * STATE_BLOCK_BYTES, code[2][4];
    float mine[2][4], most = 0.0f;
    take_coded(mine, x + from, n - from);
    for (int i = 0; i < 8; i++)
        most = fmaxf(most, root ? sqrtf(mine[i / 4][i % 4]) : fabsf(mine[i / 4][i % 4]));
    float unit = state_unit(warp_max(most), root ? STATE_TOP_ROOT : STATE_TOP_SIGNED),
          per_unit = unit > 0 ? 1 / unit : 0;
    for (int i = 0; i < 8; i++) {
        float value = mine[i / 4][i % 4];
        uint64_t element = first + from + (size_t)coded_at(i / 4) + (size_t)i % 4;
        float random = seed ? state_random(seed, element) : 0.5f;
        code[i / 4][i % 4] =
            (uint8_t)(root ? state_root(value, per_unit, random) : state_signed(value, per_unit, random));
    }
    if (threadIdx.x % CUDA_WARP == 0) *(float *)block = unit;
    give_coded(block + sizeof unit, code, n - from);
}

__global__ void codes_out(float *x, const uint8_t *state, int root, size_t n) {
    by_groups<4>(n, aligned(x), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        const uint8_t *block = state + i / CUDA_CODED * STATE_BLOCK_BYTES;
        float unit = *(const float *)block, to[N];
        uint8_t code[N];
        take(code, block + sizeof unit + i % CUDA_CODED);
        UNROLL
        for (int j = 0; j < N; j++)
            to[j] = root ? state_root_value(code[j], unit) : state_signed_value(code[j], unit);
        give(x + i, to);
    });
}

static void state_in(const struct kernels *k, void *state, enum kernels_state how, const float *x, size_t n,
                     uint64_t seed, uint64_t first) {
    struct cuda *c = cuda_of(k);
    if (!n) return;
    if (how == KERNELS_STATE_BF16)
        RUN(c, bf16_in, cuda_group_blocks(n, 8), CUDA_THREADS, 0, (uint16_t *)state, x, n, seed, first);
    else
        RUN(c, codes_in, cuda_coded_blocks(n), CUDA_THREADS, 0, (uint8_t *)state, how == KERNELS_STATE_ROOT8,
            x, n, seed, first);
}

static void state_out(const struct kernels *k, float *x, const void *state, enum kernels_state how,
                      size_t n) {
    struct cuda *c = cuda_of(k);
    if (!n) return;
    if (how == KERNELS_STATE_BF16)
        RUN(c, bf16_out, cuda_group_blocks(n, 8), CUDA_THREADS, 0, x, (const uint16_t *)state, n);
    else
        RUN(c, codes_out, cuda_group_blocks(n, 4), CUDA_THREADS, 0, x, (const uint8_t *)state,
            how == KERNELS_STATE_ROOT8, n);
}

void cuda_fill_states(struct kernels *k) {
    k->descend = descend;
    k->combine = combine;
    k->state_in = state_in;
    k->state_out = state_out;
}
