/* outer.cu - the outer step's arithmetic on device memory: the bits of the outer_* functions of the same
 * names, from the same lines (kernels/outer_elements.h). Compiled with -fmad=false. All of it is bound by
 * memory. */
#include "kernels/cuda/cuda.h"

extern "C" {
#include "kernels/outer_elements.h"
}

__global__ void gradients(float *out, const float *anchor, const float *local, const float *residual,
                          size_t n) {
    by_groups<4>(n, aligned(out, anchor, local, residual), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        float a[N], l[N], r[N];
        take(a, anchor + i), take(l, local + i);
        if (residual) take(r, residual + i);
        UNROLL
        for (int j = 0; j < N; j++)
            a[j] = residual ? gradient_with(a[j], l[j], r[j]) : gradient_of(a[j], l[j]);
        give(out + i, a);
    });
}

static void pseudo_gradient(const struct kernels *k, float *out, const float *anchor, const float *local,
                            const float *residual, size_t n) {
    if (n)
        RUN(cuda_of(k), gradients, cuda_group_blocks(n, 4), CUDA_THREADS, 0, out, anchor, local, residual, n);
}

__global__ void steps(float *anchor, float *momentum, const float *mean, size_t n, float lr, float mu) {
    by_groups<4>(n, aligned(anchor, momentum, mean), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        float a[N], m[N], by[N];
        take(a, anchor + i), take(m, momentum + i), take(by, mean + i);
        UNROLL
        for (int j = 0; j < N; j++) {
            m[j] = momentum_of(m[j], by[j], mu);
            a[j] = anchor_of(a[j], m[j], by[j], lr, mu);
        }
        give(momentum + i, m), give(anchor + i, a);
    });
}

static void nesterov(const struct kernels *k, float *anchor, float *momentum, const float *mean, size_t n,
                     float lr, float mu) {
    if (n)
        RUN(cuda_of(k), steps, cuda_group_blocks(n, 4), CUDA_THREADS, 0, anchor, momentum, mean, n, lr, mu);
}

__global__ void mixtures(float *local, const float *anchor_new, size_t n, float alpha, float rest) {
    by_groups<4>(n, aligned(local, anchor_new), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        float l[N], a[N];
        take(l, local + i), take(a, anchor_new + i);
        UNROLL
        for (int j = 0; j < N; j++) l[j] = mix_of(l[j], a[j], alpha, rest);
        give(local + i, l);
    });
}

static void mix(const struct kernels *k, float *local, const float *anchor_new, size_t n, float alpha) {
    struct cuda *c = cuda_of(k);
    if (n && (bits_of(alpha) & ~SIGN_BIT) == 0)
        cuda_note(c,
                  cudaMemcpyAsync(local, anchor_new, n * sizeof *local, cudaMemcpyDeviceToDevice, c->stream),
                  "mix");
    else if (n)
        RUN(c, mixtures, cuda_group_blocks(n, 4), CUDA_THREADS, 0, local, anchor_new, n, alpha, 1.0f - alpha);
}

__global__ void moves(float *local, const float *anchor_new, const float *anchor_old, size_t n) {
    by_groups<4>(n, aligned(local, anchor_new, anchor_old), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        float l[N], a[N], old[N];
        take(l, local + i), take(a, anchor_new + i), take(old, anchor_old + i);
        UNROLL
        for (int j = 0; j < N; j++) l[j] = moved_of(l[j], a[j], old[j]);
        give(local + i, l);
    });
}

static void add_delta(const struct kernels *k, float *local, const float *anchor_new, const float *anchor_old,
                      size_t n) {
    if (n) RUN(cuda_of(k), moves, cuda_group_blocks(n, 4), CUDA_THREADS, 0, local, anchor_new, anchor_old, n);
}

/* ---- codecs -------------------------------------------------------------------------------------------- */

/* Of a whole block, a multiple of 4, so that scales are aligned. */
#define INT8_BLOCK_BYTES ((size_t)OUTER_BLOCK + sizeof(float))
#define FP4_BLOCK_BYTES ((size_t)OUTER_BLOCK / 2 + sizeof(float))

static_assert(OUTER_BLOCK == CUDA_CODED && INT8_BLOCK_BYTES % sizeof(float) == 0 &&
                  FP4_BLOCK_BYTES % sizeof(float) == 0,
              "a warp's");

/* Of a warp's block: its scale. bad: the first element that cannot travel; the order of threads does not show
 * in a least number. */
__device__ static float scale_in(uint8_t *block, const float (&mine)[2][4], size_t first, float top,
                                 unsigned long long *bad) {
    uint32_t most = 0;
    for (int i = 0; i < 8; i++) {
        uint32_t magnitude = bits_of(mine[i / 4][i % 4]) & ~SIGN_BIT;
        most = magnitude > most ? magnitude : most;
        if (!is_encodable(magnitude, top))
            atomicMin(bad, (unsigned long long)(first + (size_t)coded_at(i / 4) + (size_t)i % 4));
    }
    for (int step = CUDA_WARP / 2; step; step /= 2) {
        uint32_t other = __shfl_xor_sync(0xffffffffu, most, step);
        most = most > other ? most : other;
    }
    float scale = scale_for(most, top);
    if (threadIdx.x % CUDA_WARP == 0) *(float *)block = scale;
    return scale;
}

__global__ void int8_in(uint8_t *bytes, const float *x, size_t n, unsigned long long *bad) {
    size_t number = grid_index() / CUDA_WARP, first = number * OUTER_BLOCK;
    if (first >= n) return;
    uint8_t *block = bytes + number * INT8_BLOCK_BYTES, code[2][4];
    float mine[2][4];
    take_coded(mine, x + first, n - first);
    float scale = scale_in(block, mine, first, INT8_TOP, bad);
    for (int i = 0; i < 8; i++)
        code[i / 4][i % 4] = (uint8_t)(scale == 0.0f ? 0 : quantise_int8(mine[i / 4][i % 4], scale));
    give_coded(block + sizeof scale, code, n - first);
}

/* A byte is of an element and the one half a block on: of a whole block, a lane has both. */
__global__ void fp4_in(uint8_t *bytes, const float *x, size_t n, unsigned long long *bad) {
    size_t number = grid_index() / CUDA_WARP, first = number * OUTER_BLOCK;
    if (first >= n) return;
    size_t length = n - first < OUTER_BLOCK ? n - first : OUTER_BLOCK, half = (length + 1) / 2;
    uint8_t *block = bytes + number * FP4_BLOCK_BYTES, *to = block + sizeof(float), code[4];
    float mine[2][4];
    x += first;
    take_coded(mine, x, length);
    float scale = scale_in(block, mine, first, FP4_TOP, bad);
    if (length == OUTER_BLOCK) {
        for (int i = 0; i < 4; i++)
            code[i] = (uint8_t)(scale == 0.0f
                                    ? 0
                                    : quantise_fp4(mine[0][i], scale) | quantise_fp4(mine[1][i], scale) << 4);
        give(to + coded_at(0), code);
        return;
    }
    for (size_t i = threadIdx.x % CUDA_WARP; i < half; i += CUDA_WARP) {
        int32_t both = scale == 0.0f ? 0 : quantise_fp4(x[i], scale);
        if (half + i < length && scale != 0.0f) both |= quantise_fp4(x[half + i], scale) << 4;
        to[i] = (uint8_t)both;
    }
}

__global__ void fp32_in(float *out, const float *x, size_t n, unsigned long long *bad) {
    by_groups<4>(n, aligned(out, x), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        float from[N];
        take(from, x + i);
        UNROLL
        for (int j = 0; j < N; j++)
            if (!is_encodable(bits_of(from[j]) & ~SIGN_BIT, 0.0f))
                atomicMin(bad, (unsigned long long)(i + (size_t)j));
        give(out + i, from);
    });
}

static int encode(const struct kernels *k, uint8_t *bytes, const float *x, size_t n, enum outer_codec codec,
                  struct err *err) {
    struct cuda *c = cuda_of(k);
    unsigned long long none = ~0ull, first = none;
    unsigned long long *bad = (unsigned long long *)cuda_scratch(c, sizeof none);
    float value = 0.0f;
    if (!n || !bad) return 0; /* check() has why */
    k->copy_in(k, bad, &none, sizeof none);
    if (codec == OUTER_INT8)
        RUN(c, int8_in, cuda_coded_blocks(n), CUDA_THREADS, 0, bytes, x, n, bad);
    else if (codec == OUTER_FP4)
        RUN(c, fp4_in, cuda_coded_blocks(n), CUDA_THREADS, 0, bytes, x, n, bad);
    else RUN(c, fp32_in, cuda_group_blocks(n, 4), CUDA_THREADS, 0, (float *)bytes, x, n, bad);
    k->copy_out(k, &first, bad, sizeof first);
    if (first == none) return 0;
    k->copy_out(k, &value, x + first, sizeof value);
    return err_set(err, ERR_CORRUPT, "element %llu of %zu is %g, which codec %d cannot carry", first, n,
                   (double)value, (int)codec);
}

__device__ static float value_at(const uint8_t *bytes, size_t i, size_t n, enum outer_codec codec) {
    if (codec == OUTER_FP32) return ((const float *)bytes)[i];
    size_t first = i / OUTER_BLOCK * OUTER_BLOCK, j = i - first;
    const uint8_t *block =
        bytes + first / OUTER_BLOCK * (codec == OUTER_INT8 ? INT8_BLOCK_BYTES : FP4_BLOCK_BYTES);
    float scale = *(const float *)block;
    if (codec == OUTER_INT8) return scale * (float)(int8_t)block[sizeof scale + j];
    size_t half = ((n - first < OUTER_BLOCK ? n - first : OUTER_BLOCK) + 1) / 2;
    int32_t both = block[sizeof scale + (j < half ? j : j - half)];
    return scale * (float)integer_of_fp4(j < half ? both & 15 : both >> 4);
}

/* Of a whole block, four that lie side by side; or one of any. */
template <int N>
__device__ static void values_at(float (&to)[N], const uint8_t *bytes, size_t i, size_t n,
                                 enum outer_codec codec) {
    size_t number = i / OUTER_BLOCK, j = i % OUTER_BLOCK;
    if (codec == OUTER_FP32) take(to, (const float *)bytes + i);
    else if (N == 1 || n - number * OUTER_BLOCK < OUTER_BLOCK)
        for (int e = 0; e < N; e++) to[e] = value_at(bytes, i + (size_t)e, n, codec);
    else {
        bool int8 = codec == OUTER_INT8, upper = j >= OUTER_BLOCK / 2;
        const uint8_t *block = bytes + number * (int8 ? INT8_BLOCK_BYTES : FP4_BLOCK_BYTES);
        float scale = *(const float *)block;
        uint8_t code[N];
        take(code, block + sizeof scale + (int8 ? j : j % (OUTER_BLOCK / 2)));
        UNROLL
        for (int e = 0; e < N; e++)
            to[e] =
                scale * (float)(int8 ? (int8_t)code[e] : integer_of_fp4(upper ? code[e] >> 4 : code[e] & 15));
    }
}

/* minus: NULL, or what the values are taken from. */
__global__ void values_out(float *out, const float *minus, const uint8_t *bytes, size_t n,
                           enum outer_codec codec) {
    by_groups<4>(n, aligned(out, minus, codec == OUTER_FP32 ? bytes : NULL), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        float to[N], from[N];
        values_at(to, bytes, i, n, codec);
        if (minus) {
            take(from, minus + i);
            UNROLL
            for (int j = 0; j < N; j++) to[j] = lost_of(from[j], to[j]);
        }
        give(out + i, to);
    });
}

static void residual(const struct kernels *k, float *out, const float *x, const uint8_t *bytes, size_t n,
                     enum outer_codec codec) {
    if (n)
        RUN(cuda_of(k), values_out, cuda_group_blocks(n, 4), CUDA_THREADS, 0, out, x, bytes, n, codec);
}

static void decode(const struct kernels *k, float *x, const uint8_t *bytes, size_t n,
                   enum outer_codec codec) {
    residual(k, x, NULL, bytes, n, codec);
}

static const struct kernels_outer outer = { pseudo_gradient, encode, decode,   residual,
                                            nesterov,        mix,    add_delta };

void cuda_fill_outer(struct kernels *k) { k->outer = &outer; }
