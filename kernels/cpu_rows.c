/* cpu_rows.c - the CPU backend's kernels that work row by row: embedding, RMSNorm, rotary
 * embedding, SwiGLU, residual sums, cross-entropy. Rows are shared out over threads; sums over rows are
 * taken in an order that depends on the number of rows alone, so the thread count changes no bit
 * of a result. cpu_rows_bf16.c compiles it once more, with activations and weights in bf16. */
#include "kernels/bf16.h"
#include "kernels/cpu.h"

#include <assert.h>
#include <math.h>

#ifdef CPU_ROWS_BF16
typedef uint16_t ACT; /* an activation, or a weight */
#define GET(x) bf16_widen(x)
#define PUT(x) bf16_nearest(x)
#define SWIGLU_512(name) cpu_swiglu_bf16_##name
#else
typedef float ACT;
#define GET(x) (x)
#define PUT(x) (x)
#define SWIGLU_512(name) cpu_swiglu_512_##name
#endif

#define STRIP 64 /* columns one thread takes at a time in sums over rows */

static int strip_at(int c, int C) {
    return C - c < STRIP ? C - c : STRIP;
}

/* ---- embedding ---- */

WIDE static void widen_row(float *out, const ACT *x, int C) {
#pragma omp simd
    for (int c = 0; c < C; c++) out[c] = GET(x[c]);
}

static void embedding_forward(const struct kernels *k, float *out, const int32_t *tokens, const void *w,
                              int rows, int C, int V) {
    const ACT *table = w;
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT((size_t)rows * C))
    for (int r = 0; r < rows; r++) {
        assert((tokens[r] >= 0 && tokens[r] < V) || tokens[r] == KERNELS_ELSEWHERE);
        if (tokens[r] < 0) memset(out + (size_t)r * C, 0, (size_t)C * sizeof *out);
        else widen_row(out + (size_t)r * C, table + (size_t)tokens[r] * C, C);
    }
}

#ifndef CPU_ROWS_BF16
static void embedding_backward(const struct kernels *k, float *dw, const float *dout, const int32_t *tokens,
                               int rows, int C, int V) {
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT((size_t)rows * C))
    for (int c = 0; c < C; c += STRIP)
        for (int r = 0; r < rows; r++) {
            assert((tokens[r] >= 0 && tokens[r] < V) || tokens[r] == KERNELS_ELSEWHERE);
            if (tokens[r] < 0) continue;
            float *to = dw + (size_t)tokens[r] * C + c;
            const float *from = dout + (size_t)r * C + c;
            for (int i = 0; i < strip_at(c, C); i++) to[i] += from[i];
        }
}
#endif

/* ---- RMSNorm ---- */

WIDE static float rmsnorm_row(ACT *out, const float *x, const float *w, float eps, int C) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int c = 0; c < C; c++) sum += x[c] * x[c];
    float rstd = 1.0f / sqrtf(sum / (float)C + eps);
#pragma omp simd
    for (int c = 0; c < C; c++) out[c] = PUT(x[c] * rstd * w[c]);
    return rstd;
}

static void rmsnorm_forward(const struct kernels *k, void *to, float *rstd, const float *x, const float *w,
                            float eps, int rows, int C) {
    ACT *out = to;
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT((size_t)rows * C))
    for (int r = 0; r < rows; r++)
        rstd[r] = rmsnorm_row(out + (size_t)r * C, x + (size_t)r * C, w, eps, C);
}

/* One row; what it adds to dw goes to `sum`. */
WIDE static void rmsnorm_backward_row(float *dx, float *sum, const ACT *dout, const float *x, const float *w,
                                      float rstd, int C) {
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int c = 0; c < C; c++) dot += w[c] * GET(dout[c]) * x[c];
    float pull = dot * rstd * rstd / (float)C; /* times x: the part along the normalised row */
#pragma omp simd
    for (int c = 0; c < C; c++) {
        float d = GET(dout[c]);
        dx[c] += rstd * (w[c] * d - x[c] * pull);
        sum[c] += d * x[c] * rstd;
    }
}

/* Rows go in up to CPU_PARTS parts, whatever the threads, each with its own sum of dw in [C] of `part`. */
static void rmsnorm_backward(const struct kernels *k, float *dx, float *dw, const void *from,
                             const float *x, const float *w, const float *rstd, int rows, int C) {
    const ACT *dout = from;
    float *part = cpu_buffer(cpu_of(k), CPU_NORM_PARTS, CPU_PARTS_BYTES(C));
    int each = (rows + CPU_PARTS - 1) / CPU_PARTS, parts = (rows + each - 1) / each;
    if (!part) return;
#pragma omp parallel num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT((size_t)rows * C))
    {
#pragma omp for
        for (int p = 0; p < parts; p++) {
            float *sum = part + (size_t)p * C;
            memset(sum, 0, (size_t)C * sizeof *sum);
            for (int r = p * each; r < rows && r < (p + 1) * each; r++) {
                size_t at = (size_t)r * C;
                rmsnorm_backward_row(dx + at, sum, dout + at, x + at, w, rstd[r], C);
            }
        }
#pragma omp for
        for (int c = 0; c < C; c += STRIP)
            for (int p = 0; p < parts; p++)
                for (int i = 0; i < strip_at(c, C); i++) dw[c + i] += part[(size_t)p * C + c + i];
    }
}

/* ---- rotary embedding ---- */

/* Rotate `heads` heads of one row. direction is 1 or -1. */
WIDE static void rotate_row(ACT *x, const float *cosine, const float *sine, float direction, int heads,
                            int half) {
    for (int h = 0; h < heads; h++, x += 2 * half) {
#pragma omp simd
        for (int i = 0; i < half; i++) {
            float a = GET(x[i]), b = GET(x[i + half]), s = direction * sine[i];
            x[i] = PUT(a * cosine[i] - b * s);
            x[i + half] = PUT(b * cosine[i] + a * s);
        }
    }
}

static void rotate(const struct kernels *k, ACT *qkv, const float *cosine, const float *sine,
                   const int32_t *start, int B, int T, int H, int KV, int D, float direction) {
    int half = D / 2, rows = B * T;
    size_t stride = (size_t)(H + 2 * KV) * D;
#pragma omp parallel for num_threads(                                                              \
    cpu_of(k)->threads) if (CPU_WORTH_IT((size_t)rows * (H + KV) * D))
    for (int r = 0; r < rows; r++) {
        size_t angle = (size_t)(r % T - (start ? start[r] : 0)) * half;
        rotate_row(qkv + r * stride, cosine + angle, sine + angle, direction, H + KV, half);
    }
}

static void rope_forward(const struct kernels *k, void *qkv, const float *cosine, const float *sine,
                         const int32_t *start, int B, int T, int H, int KV, int D) {
    rotate(k, qkv, cosine, sine, start, B, T, H, KV, D, 1.0f);
}

static void rope_backward(const struct kernels *k, void *dqkv, const float *cosine, const float *sine,
                          const int32_t *start, int B, int T, int H, int KV, int D) {
    rotate(k, dqkv, cosine, sine, start, B, T, H, KV, D, -1.0f);
}

/* ---- SwiGLU ---- */

/* Rounding in the loop of an exponential would keep gcc 12 from vectorising it: so part by part. */
#define PART 512

WIDE static void round_part(ACT *out, const float *x, int n) {
#pragma omp simd
    for (int i = 0; i < n; i++) out[i] = PUT(x[i]);
}

WIDE static void swiglu_part(float *out, const ACT *gate, const ACT *up, int n) {
#pragma omp simd
    for (int f = 0; f < n; f++) {
        float g = GET(gate[f]);
        out[f] = g / (1.0f + cpu_exp(-g)) * GET(up[f]);
    }
}

static void swiglu_row(ACT *out, const ACT *gate, const ACT *up, int F) {
    float part[PART];
    for (int f = 0; f < F; f += PART) {
        int n = F - f < PART ? F - f : PART;
        swiglu_part(part, gate + f, up + f, n);
        round_part(out + f, part, n);
    }
}

static int swiglu_is_512(const struct kernels *k) { return !cpu_of(k)->plain && SWIGLU_512(can)(); }

static void swiglu_forward(const struct kernels *k, void *to, const void *from, int rows, int F) {
    int is_512 = swiglu_is_512(k);
    ACT *out = to;
    const ACT *gate_up = from;
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT_EXP((size_t)rows * F))
    for (int r = 0; r < rows; r++) {
        const ACT *gate = gate_up + (size_t)r * 2 * F;
        if (is_512) SWIGLU_512(row)(out + (size_t)r * F, gate, gate + F, F);
        else swiglu_row(out + (size_t)r * F, gate, gate + F, F);
    }
}

WIDE static void swiglu_backward_part(float *dgate, float *dup, const ACT *dout, const ACT *gate,
                                      const ACT *up, int n) {
#pragma omp simd
    for (int f = 0; f < n; f++) {
        float g = GET(gate[f]), u = GET(up[f]), d = GET(dout[f]), sigmoid = 1.0f / (1.0f + cpu_exp(-g));
        dgate[f] = d * u * sigmoid * (1.0f + g * (1.0f - sigmoid));
        dup[f] = d * g * sigmoid;
    }
}

static void swiglu_backward_row(ACT *dgate, ACT *dup, const ACT *dout, const ACT *gate, const ACT *up,
                                int F) {
    float part[2][PART];
    for (int f = 0; f < F; f += PART) {
        int n = F - f < PART ? F - f : PART;
        swiglu_backward_part(part[0], part[1], dout + f, gate + f, up + f, n);
        round_part(dgate + f, part[0], n);
        round_part(dup + f, part[1], n);
    }
}

static void swiglu_backward(const struct kernels *k, void *to, const void *dfrom, const void *from,
                            int rows, int F) {
    int is_512 = swiglu_is_512(k);
    ACT *dgate_up = to;
    const ACT *dout = dfrom, *gate_up = from;
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT_EXP((size_t)rows * F))
    for (int r = 0; r < rows; r++) {
        ACT *dgate = dgate_up + (size_t)r * 2 * F;
        const ACT *d = dout + (size_t)r * F, *gate = gate_up + (size_t)r * 2 * F;
        if (is_512) SWIGLU_512(backward_row)(dgate, dgate + F, d, gate, gate + F, F);
        else swiglu_backward_row(dgate, dgate + F, d, gate, gate + F, F);
    }
}

/* ---- the residual stream ---- */

static size_t slice_at(size_t i, size_t n) {
    return n - i < CPU_SLICE ? n - i : CPU_SLICE;
}

WIDE static void add_slice(float *out, const float *a, const ACT *b, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) out[i] = a[i] + GET(b[i]);
}

static void add(const struct kernels *k, float *out, const float *a, const void *branch, size_t n) {
    const ACT *b = branch;
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT(n))
    for (size_t i = 0; i < n; i += CPU_SLICE) add_slice(out + i, a + i, b + i, slice_at(i, n));
}

#ifndef CPU_ROWS_BF16
static void accumulate(const struct kernels *k, float *x, const float *more, size_t n) {
    add(k, x, x, more, n);
}
#endif

WIDE static void round_slice(ACT *out, const float *x, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) out[i] = PUT(x[i]);
}

static void round_all(const struct kernels *k, void *to, const float *x, size_t n) {
    ACT *out = to;
    if (to == x) return;
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT(n))
    for (size_t i = 0; i < n; i += CPU_SLICE) round_slice(out + i, x + i, slice_at(i, n));
}

/* ---- cross-entropy ---- */

WIDE static float row_max(const float *x, int n) {
    return cpu_max(x, n);
}

/* Replace x by exp(x - max); the sum. */
WIDE static float exponentials(float *x, float max, int n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) {
        x[i] = cpu_exp(x[i] - max);
        sum += x[i];
    }
    return sum;
}

WIDE static void multiply(ACT *out, const float *x, float factor, int n) {
#pragma omp simd
    for (int i = 0; i < n; i++) out[i] = PUT(x[i] * factor);
}

/* Where `max` stands first; 0 if nowhere, as in a row with a NaN. */
static int first_of(const float *x, float max, int n) {
    for (int i = 0; i < n; i++)
        if (x[i] == max) return i;
    return 0;
}

static void cross_entropy_row(float *loss, float *penalty, ACT *dlogits, float *logits, int target,
                              const struct kernels_loss *how, int V) {
    enum { ADDED = 4096 }; /* a vocabulary of 128k: so many in float, their sum in double */
    float max = row_max(logits, V), logit = logits[target];
    int largest = how->max_z > 0 ? first_of(logits, max, V) : 0;
    double sum = 0.0;
    for (int v = 0; v < V; v += ADDED)
        sum += exponentials(logits + v, max, V - v < ADDED ? V - v : ADDED);
    /* cppcheck-suppress invalidFunctionArg ; the largest logit alone makes the sum 1 */
    double lse = log(sum) + max;
    *loss = (float)(lse - logit);
    *penalty = (float)(how->z * lse * lse + (double)how->max_z * max * max);
    if (!dlogits) return;
    float factor = (float)(how->grad_scale / sum * (1.0 + 2.0 * how->z * lse));
    float of_target = logits[target] * factor - how->grad_scale, of_largest = logits[largest] * factor;
    float more = 2.0f * how->grad_scale * how->max_z * max;
    if (largest == target) of_target += more;
    multiply(dlogits, logits, factor, V);
    dlogits[largest] = PUT(of_largest + more);
    dlogits[target] = PUT(of_target);
}

static void cross_entropy(const struct kernels *k, float *loss, float *penalty, void *to, float *logits,
                          const int32_t *targets, const struct kernels_loss *how, int rows, int V) {
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT_EXP((size_t)rows * V))
    for (int r = 0; r < rows; r++) {
        ACT *dlogits = to ? (ACT *)to + (size_t)r * V : NULL;
        assert(targets[r] >= -1 && targets[r] < V);
        if (targets[r] >= 0) {
            cross_entropy_row(&loss[r], &penalty[r], dlogits, logits + (size_t)r * V, targets[r], how, V);
        } else {
            loss[r] = penalty[r] = 0.0f;
            if (dlogits) memset(dlogits, 0, (size_t)V * sizeof *dlogits);
        }
    }
}

#ifdef CPU_ROWS_BF16
void cpu_rows_bf16_entries(struct kernels *k) {
#else
void cpu_rows_entries(struct kernels *k) {
    k->embedding_backward = embedding_backward;
    k->accumulate = accumulate;
    k->vocabulary_part = cpu_vocabulary_part;
    k->vocabulary_loss = cpu_vocabulary_loss;
#endif
    k->embedding_forward = embedding_forward;
    k->rmsnorm_forward = rmsnorm_forward;
    k->rmsnorm_backward = rmsnorm_backward;
    k->rope_forward = rope_forward;
    k->rope_backward = rope_backward;
    k->swiglu_forward = swiglu_forward;
    k->swiglu_backward = swiglu_backward;
    k->add = add;
    k->round = round_all;
    k->cross_entropy = cross_entropy;
}
