/* cpu_rows.c - the CPU backend's kernels that work row by row: embedding, RMSNorm, rotary
 * embedding, SwiGLU, cross-entropy. Rows are shared out over threads; sums over rows are shared out
 * by columns, each thread adding its columns in row order, so the thread count changes no bit of a
 * result. */
#include "kernels/cpu.h"

#include <assert.h>
#include <math.h>

#define STRIP 64 /* columns one thread takes at a time in sums over rows */

static int strip_at(int c, int C) {
    return C - c < STRIP ? C - c : STRIP;
}

/* ---- embedding ---- */

void cpu_embedding_forward(const struct kernels *k, float *out, const int32_t *tokens,
                           const void *w, int rows, int C, int V) {
    const float *table = w;
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT((size_t)rows * C))
    for (int r = 0; r < rows; r++) {
        assert(tokens[r] >= 0 && tokens[r] < V);
        memcpy(out + (size_t)r * C, table + (size_t)tokens[r] * C, (size_t)C * sizeof *out);
    }
}

void cpu_embedding_backward(const struct kernels *k, float *dw, const float *dout,
                            const int32_t *tokens, int rows, int C, int V) {
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT((size_t)rows * C))
    for (int c = 0; c < C; c += STRIP)
        for (int r = 0; r < rows; r++) {
            assert(tokens[r] >= 0 && tokens[r] < V);
            float *to = dw + (size_t)tokens[r] * C + c;
            const float *from = dout + (size_t)r * C + c;
            for (int i = 0; i < strip_at(c, C); i++) to[i] += from[i];
        }
}

/* ---- RMSNorm ---- */

WIDE static float rmsnorm_row(float *out, const float *x, const float *w, float eps, int C) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int c = 0; c < C; c++) sum += x[c] * x[c];
    float rstd = 1.0f / sqrtf(sum / (float)C + eps);
#pragma omp simd
    for (int c = 0; c < C; c++) out[c] = x[c] * rstd * w[c];
    return rstd;
}

void cpu_rmsnorm_forward(const struct kernels *k, float *out, float *rstd, const float *x,
                         const void *w, float eps, int rows, int C) {
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT((size_t)rows * C))
    for (int r = 0; r < rows; r++)
        rstd[r] = rmsnorm_row(out + (size_t)r * C, x + (size_t)r * C, w, eps, C);
}

WIDE static void rmsnorm_backward_row(float *dx, const float *dout, const float *x, const float *w,
                                      float rstd, int C) {
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int c = 0; c < C; c++) dot += w[c] * dout[c] * x[c];
    float pull = dot * rstd * rstd / (float)C; /* times x: the part along the normalised row */
#pragma omp simd
    for (int c = 0; c < C; c++) dx[c] += rstd * (w[c] * dout[c] - x[c] * pull);
}

/* dw of `width` <= STRIP columns over all rows; C is the distance between rows. */
WIDE static void rmsnorm_backward_strip(float *dw, const float *dout, const float *x,
                                        const float *rstd, int rows, int C, int width) {
    float sum[STRIP] = { 0 };
    for (int r = 0; r < rows; r++, dout += C, x += C) {
        float s = rstd[r];
#pragma omp simd
        for (int c = 0; c < width; c++) sum[c] += dout[c] * x[c] * s;
    }
    for (int c = 0; c < width; c++) dw[c] += sum[c];
}

void cpu_rmsnorm_backward(const struct kernels *k, float *dx, float *dw, const float *dout,
                          const float *x, const void *w, const float *rstd, int rows, int C) {
#pragma omp parallel num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT((size_t)rows * C))
    {
#pragma omp for nowait
        for (int r = 0; r < rows; r++) {
            size_t at = (size_t)r * C;
            rmsnorm_backward_row(dx + at, dout + at, x + at, w, rstd[r], C);
        }
#pragma omp for
        for (int c = 0; c < C; c += STRIP)
            rmsnorm_backward_strip(dw + c, dout + c, x + c, rstd, rows, C, strip_at(c, C));
    }
}

/* ---- rotary embedding ---- */

/* Rotate `heads` heads of one row. direction is 1 or -1. */
WIDE static void rotate_row(float *x, const float *cosine, const float *sine, float direction,
                            int heads, int half) {
    for (int h = 0; h < heads; h++, x += 2 * half) {
#pragma omp simd
        for (int i = 0; i < half; i++) {
            float a = x[i], b = x[i + half], s = direction * sine[i];
            x[i] = a * cosine[i] - b * s;
            x[i + half] = b * cosine[i] + a * s;
        }
    }
}

static void rotate(const struct kernels *k, float *qkv, const float *cosine, const float *sine,
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

void cpu_rope_forward(const struct kernels *k, float *qkv, const float *cosine, const float *sine,
                      const int32_t *start, int B, int T, int H, int KV, int D) {
    rotate(k, qkv, cosine, sine, start, B, T, H, KV, D, 1.0f);
}

void cpu_rope_backward(const struct kernels *k, float *dqkv, const float *cosine, const float *sine,
                       const int32_t *start, int B, int T, int H, int KV, int D) {
    rotate(k, dqkv, cosine, sine, start, B, T, H, KV, D, -1.0f);
}

/* ---- SwiGLU ---- */

WIDE static void swiglu_row(float *out, const float *gate, const float *up, int F) {
#pragma omp simd
    for (int f = 0; f < F; f++) out[f] = gate[f] / (1.0f + cpu_exp(-gate[f])) * up[f];
}

void cpu_swiglu_forward(const struct kernels *k, float *out, const float *gate_up, int rows,
                        int F) {
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT_EXP((size_t)rows * F))
    for (int r = 0; r < rows; r++) {
        const float *gate = gate_up + (size_t)r * 2 * F;
        swiglu_row(out + (size_t)r * F, gate, gate + F, F);
    }
}

WIDE static void swiglu_backward_row(float *dgate, float *dup, const float *dout, const float *gate,
                                     const float *up, int F) {
#pragma omp simd
    for (int f = 0; f < F; f++) {
        float g = gate[f], u = up[f], sigmoid = 1.0f / (1.0f + cpu_exp(-g));
        dgate[f] = dout[f] * u * sigmoid * (1.0f + g * (1.0f - sigmoid));
        dup[f] = dout[f] * g * sigmoid;
    }
}

void cpu_swiglu_backward(const struct kernels *k, float *dgate_up, const float *dout,
                         const float *gate_up, int rows, int F) {
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT_EXP((size_t)rows * F))
    for (int r = 0; r < rows; r++) {
        size_t at = (size_t)r * 2 * F;
        swiglu_backward_row(dgate_up + at, dgate_up + at + F, dout + (size_t)r * F, gate_up + at,
                            gate_up + at + F, F);
    }
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

WIDE static void multiply(float *x, float factor, int n) {
#pragma omp simd
    for (int i = 0; i < n; i++) x[i] *= factor;
}

/* Where `max` stands first; 0 if nowhere, as in a row with a NaN. */
static int first_of(const float *x, float max, int n) {
    for (int i = 0; i < n; i++)
        if (x[i] == max) return i;
    return 0;
}

static void cross_entropy_row(float *loss, float *penalty, float *logits, int target,
                              const struct kernels_loss *how, int V) {
    enum { PART = 4096 }; /* a vocabulary of 128k: parts in float, their sum in double */
    float max = row_max(logits, V), logit = logits[target];
    int largest = how->max_z > 0 ? first_of(logits, max, V) : 0;
    double sum = 0.0;
    for (int v = 0; v < V; v += PART)
        sum += exponentials(logits + v, max, V - v < PART ? V - v : PART);
    /* cppcheck-suppress invalidFunctionArg ; the largest logit alone makes the sum 1 */
    double lse = log(sum) + max;
    *loss = (float)(lse - logit);
    *penalty = (float)(how->z * lse * lse + (double)how->max_z * max * max);
    multiply(logits, (float)(how->grad_scale / sum * (1.0 + 2.0 * how->z * lse)), V);
    logits[target] -= how->grad_scale;
    logits[largest] += 2.0f * how->grad_scale * how->max_z * max;
}

void cpu_cross_entropy(const struct kernels *k, float *loss, float *penalty, float *logits,
                       const int32_t *targets, const struct kernels_loss *how, int rows, int V) {
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT_EXP((size_t)rows * V))
    for (int r = 0; r < rows; r++) {
        float *row = logits + (size_t)r * V;
        assert(targets[r] >= -1 && targets[r] < V);
        if (targets[r] >= 0) {
            cross_entropy_row(&loss[r], &penalty[r], row, targets[r], how, V);
        } else {
            loss[r] = penalty[r] = 0.0f;
            memset(row, 0, (size_t)V * sizeof *row);
        }
    }
}
