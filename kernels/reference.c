/* reference.c - the specification of every kernel: plain loops, double accumulators, one thread.
 * Nothing here is fast on purpose; faster backends are tested against it. */
#include "kernels/kernels.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The reference keeps no state, so no entry looks at its table. */
#define SELF const struct kernels *k __attribute__((unused))

static void *host_alloc(SELF, size_t bytes, struct err *err) {
    size_t rounded = (bytes + 63) / 64 * 64;
    void *p = rounded < bytes ? NULL : aligned_alloc(64, rounded ? rounded : 64);
    if (!p) {
        err_set(err, ERR_MEMORY, "no memory for a tensor of %zu bytes", bytes);
        return NULL;
    }
    return memset(p, 0, rounded);
}

static void host_free(SELF, void *p) {
    free(p);
}

static void host_copy(SELF, void *to, const void *from, size_t bytes) {
    memcpy(to, from, bytes);
}

static void host_zero(SELF, void *p, size_t bytes) {
    memset(p, 0, bytes);
}

static void host_weights_in(SELF, void *w, uint16_t *rest, const float *host, size_t n) {
    assert(!rest);
    memcpy(w, host, n * sizeof *host);
}

static void host_weights_out(SELF, float *host, const void *w, const uint16_t *rest, size_t n) {
    assert(!rest);
    memcpy(host, w, n * sizeof *host);
}

static int host_check(SELF, struct err *err) {
    (void)err;
    return 0;
}

static void nothing_to_destroy(struct kernels *k) {
    (void)k;
}

static void store(float *out, double value, enum kernels_write write) {
    *out = (float)(write == KERNELS_ADD ? *out + value : value);
}

static void matmul_forward(SELF, float *out, const float *x, const void *weights, int rows, int C,
                           int OC) {
    const float *w = weights;
    for (size_t r = 0; r < (size_t)rows; r++)
        for (size_t o = 0; o < (size_t)OC; o++) {
            double sum = 0.0;
            for (int c = 0; c < C; c++) sum += (double)x[r * C + c] * w[o * C + c];
            out[r * OC + o] = (float)sum;
        }
}

static void matmul_backward_input(SELF, float *dx, const float *dout, const void *weights, int rows,
                                  int C, int OC, enum kernels_write write) {
    const float *w = weights;
    for (size_t r = 0; r < (size_t)rows; r++)
        for (size_t c = 0; c < (size_t)C; c++) {
            double sum = 0.0;
            for (size_t o = 0; o < (size_t)OC; o++) sum += (double)dout[r * OC + o] * w[o * C + c];
            store(&dx[r * C + c], sum, write);
        }
}

static void matmul_backward_weight(SELF, float *dw, const float *dout, const float *x, int rows,
                                   int C, int OC, enum kernels_write write) {
    for (size_t o = 0; o < (size_t)OC; o++)
        for (size_t c = 0; c < (size_t)C; c++) {
            double sum = 0.0;
            for (size_t r = 0; r < (size_t)rows; r++)
                sum += (double)dout[r * OC + o] * x[r * C + c];
            store(&dw[o * C + c], sum, write);
        }
}

static void embedding_forward(SELF, float *out, const int32_t *tokens, const void *weights, int rows,
                              int C, int V) {
    const float *w = weights;
    for (int r = 0; r < rows; r++) {
        assert(tokens[r] >= 0 && tokens[r] < V);
        memcpy(out + (size_t)r * C, w + (size_t)tokens[r] * C, (size_t)C * sizeof *out);
    }
}

static void embedding_backward(SELF, float *dw, const float *dout, const int32_t *tokens, int rows,
                               int C, int V) {
    for (int r = 0; r < rows; r++) {
        assert(tokens[r] >= 0 && tokens[r] < V);
        for (int c = 0; c < C; c++) dw[(size_t)tokens[r] * C + c] += dout[(size_t)r * C + c];
    }
}

static void rmsnorm_forward(SELF, float *out, float *rstd, const float *x, const void *weights,
                            float eps, int rows, int C) {
    const float *w = weights;
    for (int r = 0; r < rows; r++, x += C, out += C) {
        double sum_sq = 0.0;
        for (int c = 0; c < C; c++) sum_sq += (double)x[c] * x[c];
        rstd[r] = (float)(1.0 / sqrt(sum_sq / C + eps));
        for (int c = 0; c < C; c++) out[c] = (float)((double)x[c] * rstd[r] * w[c]);
    }
}

/* With n = x * rstd: d loss / dx = rstd * (w*dout - n * mean(w*dout*n)). */
static void rmsnorm_backward(SELF, float *dx, float *dw, const float *dout, const float *x,
                             const void *weights, const float *rstd, int rows, int C) {
    const float *w = weights;
    for (int r = 0; r < rows; r++, x += C, dx += C, dout += C) {
        double mean = 0.0;
        for (int c = 0; c < C; c++) mean += (double)w[c] * dout[c] * x[c] * rstd[r];
        mean /= C;
        for (int c = 0; c < C; c++) {
            double n = (double)x[c] * rstd[r];
            dx[c] = (float)(dx[c] + rstd[r] * ((double)w[c] * dout[c] - n * mean));
            dw[c] = (float)(dw[c] + dout[c] * n);
        }
    }
}

/* Angle per position of pair i. */
static double rope_frequency(const struct kernels_rope *rope, int i, int D) {
    double frequency = pow(rope->theta, -2.0 * i / D);
    if (rope->type == KERNELS_ROPE_DEFAULT) return frequency;
    if (rope->type == KERNELS_ROPE_LINEAR) return frequency / rope->factor;
    double turns = rope->original * frequency / (2.0 * M_PI);
    double keep = (turns - rope->low_factor) / (rope->high_factor - rope->low_factor);
    keep = fmin(fmax(keep, 0.0), 1.0);
    return keep * frequency + (1.0 - keep) * frequency / rope->factor;
}

void kernels_rope_tables(float *cos_out, float *sin_out, int T, int D,
                         const struct kernels_rope *rope) {
    for (int i = 0; i < D / 2; i++) {
        double frequency = rope_frequency(rope, i, D);
        for (int t = 0; t < T; t++) {
            cos_out[(size_t)t * (D / 2) + i] = (float)cos(t * frequency);
            sin_out[(size_t)t * (D / 2) + i] = (float)sin(t * frequency);
        }
    }
}

/* Rotate the query and key heads by the tables' angles times `direction` (1 or -1). */
static void rotate(float *qkv, const float *cosine, const float *sine, const int32_t *start, int B,
                   int T, int H, int KV, int D, double direction) {
    int half = D / 2;
    for (size_t row = 0; row < (size_t)B * T; row++) {
        size_t position = row % T - (start ? start[row] : 0);
        const float *cos_t = cosine + position * half, *sin_t = sine + position * half;
        for (int h = 0; h < H + KV; h++) {
            float *x = qkv + (row * (H + 2 * KV) + h) * D;
            for (int i = 0; i < half; i++) {
                double a = x[i], b = x[i + half], s = direction * sin_t[i];
                x[i] = (float)(a * cos_t[i] - b * s);
                x[i + half] = (float)(b * cos_t[i] + a * s);
            }
        }
    }
}

static void rope_forward(SELF, float *qkv, const float *cosine, const float *sine,
                         const int32_t *start, int B, int T, int H, int KV, int D) {
    rotate(qkv, cosine, sine, start, B, T, H, KV, D, 1.0);
}

static void rope_backward(SELF, float *dqkv, const float *cosine, const float *sine,
                          const int32_t *start, int B, int T, int H, int KV, int D) {
    rotate(dqkv, cosine, sine, start, B, T, H, KV, D, -1.0);
}

static double dot(const float *a, const float *b, int n) {
    double sum = 0.0;
    for (int i = 0; i < n; i++) sum += (double)a[i] * b[i];
    return sum;
}

/* Rows of qkv of one batch element are `stride` floats apart; heads are q, then k, then v. */
struct heads {
    size_t stride, q, k, v; /* offsets within a row */
};

static struct heads heads_of(int h, int H, int KV, int D) {
    int kv = h / (H / KV);
    return (struct heads){ (size_t)(H + 2 * KV) * D, (size_t)h * D, (size_t)(H + kv) * D,
                           (size_t)(H + KV + kv) * D };
}

static void attention_forward(SELF, float *out, float *lse, const float *qkv, const int32_t *start,
                              int B, int T, int H, int KV, int D) {
    double score[T], scale = 1.0 / sqrt(D);
    for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++)
            for (int t = 0; t < T; t++) {
                struct heads at = heads_of(h, H, KV, D);
                const float *rows = qkv + (size_t)b * T * at.stride;
                double max = -INFINITY, sum = 0.0;
                int first = start ? start[(size_t)b * T + t] : 0;
                for (int u = first; u <= t; u++) {
                    score[u] = scale *
                               dot(rows + t * at.stride + at.q, rows + u * at.stride + at.k, D);
                    max = fmax(max, score[u]);
                }
                for (int u = first; u <= t; u++) sum += exp(score[u] - max);
                /* cppcheck-suppress invalidFunctionArg ; the largest score alone makes the sum 1 */
                lse[((size_t)b * H + h) * T + t] = (float)(max + log(sum));
                for (int d = 0; d < D; d++) {
                    double o = 0.0;
                    for (int u = first; u <= t; u++)
                        o += exp(score[u] - max) / sum * rows[u * at.stride + at.v + d];
                    out[(((size_t)b * T + t) * H + h) * D + d] = (float)o;
                }
            }
}

/* One query of one head. With p = exp(score - lse): dv += p * dout, dscore = p * (dout.v -
 * dout.out), dq = scale * sum dscore * k, dk += scale * dscore * q. acc has the shape of one batch
 * element. */
static void attention_backward_query(double *acc, const float *rows, const float *dout,
                                     const float *out, float lse, int first, int t,
                                     struct heads at, int D) {
    double scale = 1.0 / sqrt(D), delta = dot(dout, out, D);
    const float *q = rows + t * at.stride + at.q;
    double *dq = acc + t * at.stride + at.q;
    for (int u = first; u <= t; u++) {
        const float *key = rows + u * at.stride + at.k, *value = rows + u * at.stride + at.v;
        double *dk = acc + u * at.stride + at.k, *dv = acc + u * at.stride + at.v;
        double p = exp(scale * dot(q, key, D) - lse);
        double dscore = p * (dot(dout, value, D) - delta) * scale;
        for (int d = 0; d < D; d++) {
            dv[d] += p * dout[d];
            dq[d] += dscore * key[d];
            dk[d] += dscore * q[d];
        }
    }
}

static void attention_backward(SELF, float *dqkv, const float *dout, const float *qkv,
                               const float *out, const float *lse, const int32_t *start, int B,
                               int T, int H, int KV, int D) {
    size_t per_batch = (size_t)T * (H + 2 * KV) * D;
    double *acc = malloc(per_batch * sizeof *acc);
    assert(acc);
    for (int b = 0; b < B; b++) {
        memset(acc, 0, per_batch * sizeof *acc);
        for (int h = 0; h < H; h++)
            for (int t = 0; t < T; t++) {
                size_t o = (((size_t)b * T + t) * H + h) * D;
                attention_backward_query(acc, qkv + b * per_batch, dout + o, out + o,
                                         lse[((size_t)b * H + h) * T + t],
                                         start ? start[(size_t)b * T + t] : 0, t,
                                         heads_of(h, H, KV, D), D);
            }
        for (size_t i = 0; i < per_batch; i++) dqkv[b * per_batch + i] = (float)acc[i];
    }
    free(acc);
}

static void swiglu_forward(SELF, float *out, const float *gate_up, int rows, int F) {
    for (int r = 0; r < rows; r++, gate_up += 2 * (size_t)F, out += F)
        for (int f = 0; f < F; f++) {
            double gate = gate_up[f], up = gate_up[F + f];
            out[f] = (float)(gate / (1.0 + exp(-gate)) * up);
        }
}

static void swiglu_backward(SELF, float *dgate_up, const float *dout, const float *gate_up,
                            int rows, int F) {
    for (int r = 0; r < rows; r++, gate_up += 2 * (size_t)F, dgate_up += 2 * (size_t)F, dout += F)
        for (int f = 0; f < F; f++) {
            double gate = gate_up[f], up = gate_up[F + f], sigmoid = 1.0 / (1.0 + exp(-gate));
            dgate_up[f] = (float)(dout[f] * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)));
            dgate_up[F + f] = (float)(dout[f] * gate * sigmoid);
        }
}

static void add(SELF, float *out, const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = a[i] + b[i];
}

static void scale_by(SELF, float *x, float factor, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] *= factor;
}

static void cross_entropy(SELF, float *loss, float *penalty, float *logits, const int32_t *targets,
                          const struct kernels_loss *how, int rows, int V) {
    for (int r = 0; r < rows; r++, logits += V) {
        assert(targets[r] >= -1 && targets[r] < V);
        if (targets[r] == -1) {
            loss[r] = penalty[r] = 0.0f;
            memset(logits, 0, (size_t)V * sizeof *logits);
            continue;
        }
        int largest = 0;
        double sum = 0.0;
        for (int v = 1; v < V; v++)
            if (logits[v] > logits[largest]) largest = v;
        double max = logits[largest];
        for (int v = 0; v < V; v++) sum += exp(logits[v] - max);
        /* cppcheck-suppress invalidFunctionArg ; the largest logit alone makes the sum 1 */
        double lse = log(sum) + max;
        loss[r] = (float)(lse - logits[targets[r]]);
        penalty[r] = (float)(how->z * lse * lse + how->max_z * max * max);
        for (int v = 0; v < V; v++) {
            double p = exp(logits[v] - max) / sum, d = p - (v == targets[r]);
            d += 2.0 * how->z * lse * p + 2.0 * how->max_z * max * (v == largest);
            logits[v] = (float)(d * how->grad_scale);
        }
    }
}

static void adamw(SELF, void *weights, uint16_t *rest, const float *grad, float *m, float *v, size_t n,
                  const struct kernels_adamw *a) {
    float *param = weights;
    assert(!rest);
    for (size_t i = 0; i < n; i++) {
        double g = (double)grad[i] * a->grad_scale;
        double m_new = (double)a->beta1 * m[i] + (1.0 - a->beta1) * g;
        double v_new = (double)a->beta2 * v[i] + (1.0 - a->beta2) * g * g;
        double step = m_new / a->m_correction / (sqrt(v_new / a->v_correction) + a->eps);
        param[i] = (float)(param[i] - a->lr * (step + (double)a->weight_decay * param[i]));
        m[i] = (float)m_new;
        v[i] = (float)v_new;
    }
}

static double sum_squares(SELF, const float *x, size_t n) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * x[i];
    return sum;
}

const struct kernels *kernels_reference(void) {
    static const struct kernels reference = {
        .name = "reference",
        .description = "plain loops with double accumulators, one thread",
        .weight_bytes = sizeof(float),
        .alloc = host_alloc,
        .free = host_free,
        .copy_in = host_copy,
        .copy_out = host_copy,
        .zero = host_zero,
        .weights_in = host_weights_in,
        .weights_out = host_weights_out,
        .check = host_check,
        .destroy = nothing_to_destroy,
        .matmul_forward = matmul_forward,
        .matmul_backward_input = matmul_backward_input,
        .matmul_backward_weight = matmul_backward_weight,
        .embedding_forward = embedding_forward,
        .embedding_backward = embedding_backward,
        .rmsnorm_forward = rmsnorm_forward,
        .rmsnorm_backward = rmsnorm_backward,
        .rope_forward = rope_forward,
        .rope_backward = rope_backward,
        .attention_forward = attention_forward,
        .attention_backward = attention_backward,
        .swiglu_forward = swiglu_forward,
        .swiglu_backward = swiglu_backward,
        .add = add,
        .scale = scale_by,
        .cross_entropy = cross_entropy,
        .adamw = adamw,
        .sum_squares = sum_squares,
    };
    return &reference;
}
