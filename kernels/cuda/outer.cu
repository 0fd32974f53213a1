/* outer.cu - the outer step's arithmetic on device memory: the bits of the outer_* functions of the same names, from the
 * same lines (kernels/outer_elements.h). Compiled with -fmad=false. All of it is bound by memory. */
#include "kernels/cuda/cuda.h"

extern "C" {
#include "kernels/outer_elements.h"
}

__global__ void gradients(float *out, const float *anchor, const float *local, const float *residual, size_t n) {
    size_t i = grid_index();
    if (i >= n) return;
    out[i] = residual ? gradient_with(anchor[i], local[i], residual[i]) : gradient_of(anchor[i], local[i]);
}

static void pseudo_gradient(const struct kernels *k, float *out, const float *anchor, const float *local,
                            const float *residual, size_t n) {
    if (n) RUN(cuda_of(k), gradients, cuda_blocks(n, CUDA_THREADS), CUDA_THREADS, 0, out, anchor, local, residual, n);
}

__global__ void steps(float *anchor, float *momentum, const float *mean, size_t n, float lr, float mu) {
    size_t i = grid_index();
    if (i >= n) return;
    float m = momentum_of(momentum[i], mean[i], mu);
    momentum[i] = m;
    anchor[i] = anchor_of(anchor[i], m, mean[i], lr, mu);
}

static void nesterov(const struct kernels *k, float *anchor, float *momentum, const float *mean, size_t n, float lr,
                     float mu) {
    if (n) RUN(cuda_of(k), steps, cuda_blocks(n, CUDA_THREADS), CUDA_THREADS, 0, anchor, momentum, mean, n, lr, mu);
}

__global__ void mixtures(float *local, const float *anchor_new, size_t n, float alpha, float rest) {
    size_t i = grid_index();
    if (i < n) local[i] = mix_of(local[i], anchor_new[i], alpha, rest);
}

static void mix(const struct kernels *k, float *local, const float *anchor_new, size_t n, float alpha) {
    struct cuda *c = cuda_of(k);
    if (n && (bits_of(alpha) & ~SIGN_BIT) == 0)
        cuda_note(c, cudaMemcpyAsync(local, anchor_new, n * sizeof *local, cudaMemcpyDeviceToDevice, c->stream), "mix");
    else if (n)
        RUN(c, mixtures, cuda_blocks(n, CUDA_THREADS), CUDA_THREADS, 0, local, anchor_new, n, alpha, 1.0f - alpha);
}

__global__ void moves(float *local, const float *anchor_new, const float *anchor_old, size_t n) {
    size_t i = grid_index();
    if (i < n) local[i] = moved_of(local[i], anchor_new[i], anchor_old[i]);
}

static void add_delta(const struct kernels *k, float *local, const float *anchor_new, const float *anchor_old, size_t n) {
    if (n) RUN(cuda_of(k), moves, cuda_blocks(n, CUDA_THREADS), CUDA_THREADS, 0, local, anchor_new, anchor_old, n);
}

/* ---- codecs --------------------------------------------------------------------------------------------- */

/* Of a whole block, a multiple of 4, so that scales are aligned. */
#define INT8_BLOCK_BYTES ((size_t)OUTER_BLOCK + sizeof(float))
#define FP4_BLOCK_BYTES ((size_t)OUTER_BLOCK / 2 + sizeof(float))

/* Of the whole block of threads, for all of it. */
__device__ static uint32_t block_most(uint32_t x) {
    __shared__ uint32_t parts[CUDA_WARP];
    for (int step = CUDA_WARP / 2; step; step /= 2) {
        uint32_t other = __shfl_xor_sync(0xffffffffu, x, step);
        x = x > other ? x : other;
    }
    if (threadIdx.x % CUDA_WARP == 0) parts[threadIdx.x / CUDA_WARP] = x;
    __syncthreads();
    x = parts[0];
    for (unsigned i = 1; i < blockDim.x / CUDA_WARP; i++) x = x > parts[i] ? x : parts[i];
    return x;
}

/* A block of threads for a block of elements: its scale. bad: the first element that cannot travel; the order of threads
 * does not show in a least number. */
__device__ static float scale_in(uint8_t *block, float mine, size_t i, float top, unsigned long long *bad) {
    uint32_t magnitude = bits_of(mine) & ~SIGN_BIT;
    if (!is_encodable(magnitude, top)) atomicMin(bad, (unsigned long long)i);
    float scale = scale_for(block_most(magnitude), top);
    if (threadIdx.x == 0) *(float *)block = scale;
    return scale;
}

__global__ void int8_in(uint8_t *bytes, const float *x, size_t n, unsigned long long *bad) {
    size_t i = grid_index();
    uint8_t *block = bytes + (size_t)blockIdx.x * INT8_BLOCK_BYTES;
    float mine = i < n ? x[i] : 0.0f, scale = scale_in(block, mine, i, INT8_TOP, bad);
    if (i < n) block[sizeof scale + threadIdx.x] = (uint8_t)(scale == 0.0f ? 0 : quantise_int8(mine, scale));
}

/* The first half of the threads writes: each its own element and the one half a block on. */
__global__ void fp4_in(uint8_t *bytes, const float *x, size_t n, unsigned long long *bad) {
    size_t i = grid_index(), first = (size_t)blockIdx.x * OUTER_BLOCK;
    size_t length = n - first < OUTER_BLOCK ? n - first : OUTER_BLOCK, half = (length + 1) / 2;
    uint8_t *block = bytes + (size_t)blockIdx.x * FP4_BLOCK_BYTES;
    float mine = i < n ? x[i] : 0.0f, scale = scale_in(block, mine, i, FP4_TOP, bad);
    if (threadIdx.x >= half) return;
    int32_t code = scale == 0.0f ? 0 : quantise_fp4(mine, scale);
    if (half + threadIdx.x < length && scale != 0.0f) code |= quantise_fp4(x[i + half], scale) << 4;
    block[sizeof scale + threadIdx.x] = (uint8_t)code;
}

__global__ void fp32_in(float *out, const float *x, size_t n, unsigned long long *bad) {
    size_t i = grid_index();
    if (i >= n) return;
    if (!is_encodable(bits_of(x[i]) & ~SIGN_BIT, 0.0f)) atomicMin(bad, (unsigned long long)i);
    out[i] = x[i];
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
        RUN(c, int8_in, cuda_blocks(n, OUTER_BLOCK), OUTER_BLOCK, 0, bytes, x, n, bad);
    else if (codec == OUTER_FP4)
        RUN(c, fp4_in, cuda_blocks(n, OUTER_BLOCK), OUTER_BLOCK, 0, bytes, x, n, bad);
    else RUN(c, fp32_in, cuda_blocks(n, CUDA_THREADS), CUDA_THREADS, 0, (float *)bytes, x, n, bad);
    k->copy_out(k, &first, bad, sizeof first);
    if (first == none) return 0;
    k->copy_out(k, &value, x + first, sizeof value);
    return err_set(err, ERR_CORRUPT, "element %llu of %zu is %g, which codec %d cannot carry", first, n, (double)value,
                   (int)codec);
}

__device__ static float value_at(const uint8_t *bytes, size_t i, size_t n, enum outer_codec codec) {
    if (codec == OUTER_FP32) return ((const float *)bytes)[i];
    size_t first = i / OUTER_BLOCK * OUTER_BLOCK, j = i - first;
    const uint8_t *block = bytes + first / OUTER_BLOCK * (codec == OUTER_INT8 ? INT8_BLOCK_BYTES : FP4_BLOCK_BYTES);
    float scale = *(const float *)block;
    if (codec == OUTER_INT8) return scale * (float)(int8_t)block[sizeof scale + j];
    size_t half = ((n - first < OUTER_BLOCK ? n - first : OUTER_BLOCK) + 1) / 2;
    int32_t both = block[sizeof scale + (j < half ? j : j - half)];
    return scale * (float)integer_of_fp4(j < half ? both & 15 : both >> 4);
}

/* minus: NULL, or what the values are taken from. */
__global__ void values_out(float *out, const float *minus, const uint8_t *bytes, size_t n, enum outer_codec codec) {
    size_t i = grid_index();
    if (i >= n) return;
    float value = value_at(bytes, i, n, codec);
    out[i] = minus ? lost_of(minus[i], value) : value;
}

static void residual(const struct kernels *k, float *out, const float *x, const uint8_t *bytes, size_t n,
                     enum outer_codec codec) {
    if (n)
        RUN(cuda_of(k), values_out, cuda_blocks(n, CUDA_THREADS), CUDA_THREADS, 0, out, x, bytes, n, codec);
}

static void decode(const struct kernels *k, float *x, const uint8_t *bytes, size_t n, enum outer_codec codec) {
    residual(k, x, NULL, bytes, n, codec);
}

static const struct kernels_outer outer = { pseudo_gradient, encode, decode, residual, nesterov, mix, add_delta };

void cuda_fill_outer(struct kernels *k) { k->outer = &outer; }
