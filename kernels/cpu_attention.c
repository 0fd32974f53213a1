/* cpu_attention.c - causal grouped-query attention of the CPU backend, where there is no AVX-512
 * (cpu_attention_512.c). Queries are taken in blocks
 * of BLOCK rows against the keys from where the first row's document begins to the block's end, so a
 * thread holds BLOCK x T scores at most (two of them backward), never [T,T] for every head. The
 * products are oneDNN's, one thread each; threads share out the heads. */
#include "kernels/cpu.h"

#include <math.h>
#include <omp.h>

#define BLOCK 64

/* One head of one batch element: rows of q, k, v are `stride` floats apart, rows of out
 * `out_stride`. */
struct head {
    size_t stride, out_stride, q, k, v, out, lse; /* offsets into qkv, out and lse */
};

static struct head head_at(int b, int h, int T, int H, int KV, int D) {
    int kv = h / (H / KV);
    struct head at = { .stride = (size_t)(H + 2 * KV) * D, .out_stride = (size_t)H * D };
    size_t row = (size_t)b * T;
    at.q = row * at.stride + (size_t)h * D;
    at.k = row * at.stride + (size_t)(H + kv) * D;
    at.v = row * at.stride + (size_t)(H + KV + kv) * D;
    at.out = row * at.out_stride + (size_t)h * D;
    at.lse = ((size_t)b * H + h) * T;
    return at;
}

/* One thread where the products take less than waking others would, as with a short prompt. */
static int threads_for(const struct cpu *cpu, int B, int T, int H, int D) {
    return CPU_WORTH_IT((size_t)B * H * T * T * D / 8) ? cpu->threads : 1;
}

static int block_at(int t, int T) {
    return T - t < BLOCK ? T - t : BLOCK;
}

/* The part of a row that is not masked, [first, end) of n scores, is rarely a whole number of
 * vectors, and the rest of a loop runs element by element. So the rows below work on whole vectors,
 * as far as the row goes, and clear the masked elements in the end. */
struct span {
    int first, end; /* what counts */
    int from, to;   /* what is worked on */
    int n;
};

/* Row t of a block whose scores begin at key `low` and end before key low + n. */
static struct span span_of(const int32_t *start, int t, int low, int n) {
    struct span s = { .first = start ? start[t] - low : 0, .end = t + 1 - low, .n = n };
    s.from = s.first / 16 * 16;
    s.to = (s.end + 15) / 16 * 16 < n ? (s.end + 15) / 16 * 16 : n;
    return s;
}

__attribute__((always_inline)) static inline void clear_masked(float *row, struct span s) {
    memset(row, 0, (size_t)s.first * sizeof *row);
    memset(row + s.end, 0, (size_t)(s.n - s.end) * sizeof *row);
}

/* Turn the scores that count into probabilities, the rest into 0. Returns their log-sum-exp. */
WIDE static float softmax_row(float *score, struct span s) {
    for (int u = s.from; u < s.first; u++) score[u] = -INFINITY;
    for (int u = s.end; u < s.to; u++) score[u] = -INFINITY;
    float max = cpu_max(score + s.from, s.to - s.from), sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int u = s.from; u < s.to; u++) {
        score[u] = cpu_exp(score[u] - max);
        sum += score[u];
    }
    float inverse = 1.0f / sum;
#pragma omp simd
    for (int u = s.from; u < s.to; u++) score[u] *= inverse;
    clear_masked(score, s);
    return max + logf(sum); /* cppcheck-suppress invalidFunctionArg ; a score counts, so sum >= 1 */
}

/* The first key that a block's queries see: that of its first row. */
static int lowest_key(const int32_t *start, int t) {
    return start ? start[t] : 0;
}

/* start: [T] of this batch element, or NULL. */
static void forward_block(struct cpu *cpu, float *out, float *lse, const float *qkv,
                          const int32_t *start, float *score, struct head at, int t, int len,
                          int D) {
    int low = lowest_key(start, t), keys = t + len - low;
    size_t skip = low * at.stride;
    cpu_gemm(cpu, 'N', 'T', len, keys, D, 1.0f / sqrtf((float)D), qkv + at.q + t * at.stride,
             at.stride, qkv + at.k + skip, at.stride, 0.0f, score, keys);
    for (int i = 0; i < len; i++)
        lse[at.lse + t + i] = softmax_row(score + (size_t)i * keys, span_of(start, t + i, low, keys));
    cpu_gemm(cpu, 'N', 'N', len, D, keys, 1.0f, score, keys, qkv + at.v + skip, at.stride, 0.0f,
             out + at.out + t * at.out_stride, at.out_stride);
}

void cpu_attention_forward(const struct kernels *k, void *out, float *lse, const void *qkv,
                           const int32_t *start, int B, int T, int H, int KV, int D) {
    struct cpu *cpu = cpu_of(k);
    if (!cpu->plain && cpu_attention_512_can(D)) {
        cpu_attention_512_forward(k, out, lse, qkv, start, B, T, H, KV, D);
        return;
    }
    float *scratch = cpu_scratch(cpu, (size_t)BLOCK * T);
    if (!scratch) return;
    int threads = threads_for(cpu, B, T, H, D), blocks = (T + BLOCK - 1) / BLOCK;
    int before = cpu_use_threads(threads);
    /* Late blocks have more keys: take them first, one by one, so that threads end together. */
#pragma omp parallel for num_threads(threads) collapse(3) schedule(dynamic)
    for (int i = blocks - 1; i >= 0; i--)
        for (int b = 0; b < B; b++)
            for (int h = 0; h < H; h++)
                forward_block(cpu, out, lse, qkv, start ? start + (size_t)b * T : NULL,
                              scratch + omp_get_thread_num() * cpu->scratch_floats,
                              head_at(b, h, T, H, KV, D), i * BLOCK, block_at(i * BLOCK, T), D);
    cpu_use_threads(before);
}

/* p = exp(score - lse) for what counts, 0 for the rest; dscore = p * (dp - delta), in place of dp. */
WIDE static void backward_row(float *p, float *dp, float lse, float delta, struct span s) {
#pragma omp simd
    for (int u = s.from; u < s.to; u++) {
        p[u] = cpu_exp(p[u] - lse);
        dp[u] = p[u] * (dp[u] - delta);
    }
    clear_masked(p, s);
    clear_masked(dp, s);
}

WIDE static float dot(const float *a, const float *b, int n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void backward_block(struct cpu *cpu, float *dqkv, const float *dout, const float *qkv,
                           const float *out, const float *lse, const int32_t *start, float *p,
                           float *dp, struct head at, int t, int len, int D) {
    int low = lowest_key(start, t), keys = t + len - low;
    float scale = 1.0f / sqrtf((float)D);
    size_t skip = low * at.stride;
    const float *q = qkv + at.q + t * at.stride, *key = qkv + at.k + skip, *value = qkv + at.v + skip;
    const float *o = out + at.out + t * at.out_stride, *d_o = dout + at.out + t * at.out_stride;
    cpu_gemm(cpu, 'N', 'T', len, keys, D, scale, q, at.stride, key, at.stride, 0.0f, p, keys);
    cpu_gemm(cpu, 'N', 'T', len, keys, D, 1.0f, d_o, at.out_stride, value, at.stride, 0.0f, dp,
             keys);
    for (int i = 0; i < len; i++)
        backward_row(p + (size_t)i * keys, dp + (size_t)i * keys, lse[at.lse + t + i],
                     dot(d_o + i * at.out_stride, o + i * at.out_stride, D),
                     span_of(start, t + i, low, keys));
    cpu_gemm(cpu, 'T', 'N', keys, D, len, 1.0f, p, keys, d_o, at.out_stride, 1.0f,
             dqkv + at.v + skip, at.stride);
    cpu_gemm(cpu, 'T', 'N', keys, D, len, scale, dp, keys, q, at.stride, 1.0f, dqkv + at.k + skip,
             at.stride);
    cpu_gemm(cpu, 'N', 'N', len, D, keys, scale, dp, keys, key, at.stride, 0.0f,
             dqkv + at.q + t * at.stride, at.stride);
}

/* All query heads of one key/value head, so that nobody else adds to its dk and dv. */
static void backward_group(struct cpu *cpu, float *dqkv, const float *dout, const float *qkv,
                           const float *out, const float *lse, const int32_t *start,
                           float *scratch, int b, int kv, int T, int H, int KV, int D) {
    int group = H / KV;
    struct head at = head_at(b, kv * group, T, H, KV, D);
    for (int t = 0; t < T; t++) {
        memset(dqkv + at.k + t * at.stride, 0, (size_t)D * sizeof *dqkv);
        memset(dqkv + at.v + t * at.stride, 0, (size_t)D * sizeof *dqkv);
    }
    for (int h = kv * group; h < (kv + 1) * group; h++)
        for (int t = 0; t < T; t += BLOCK)
            backward_block(cpu, dqkv, dout, qkv, out, lse, start, scratch, scratch + (size_t)BLOCK * T,
                           head_at(b, h, T, H, KV, D), t, block_at(t, T), D);
}

void cpu_attention_backward(const struct kernels *k, void *dqkv, const void *dout, const void *qkv,
                            const void *out, const float *lse, const int32_t *start, int B, int T, int H,
                            int KV, int D) {
    struct cpu *cpu = cpu_of(k);
    if (!cpu->plain && cpu_attention_512_can(D)) {
        cpu_attention_512_backward(k, dqkv, dout, qkv, out, lse, start, B, T, H, KV, D);
        return;
    }
    float *scratch = cpu_scratch(cpu, 2 * (size_t)BLOCK * T);
    if (!scratch) return;
    int threads = threads_for(cpu, B, T, H, D), before = cpu_use_threads(threads);
#pragma omp parallel for num_threads(threads) collapse(2) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int kv = 0; kv < KV; kv++)
            backward_group(cpu, dqkv, dout, qkv, out, lse, start ? start + (size_t)b * T : NULL,
                           scratch + omp_get_thread_num() * cpu->scratch_floats, b, kv, T, H, KV,
                           D);
    cpu_use_threads(before);
}
