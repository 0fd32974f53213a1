/* reference.c - the specification of every kernel: plain loops, double accumulators, one thread.
 * Nothing here is fast on purpose; faster backends are tested against it. reference_bf16.c compiles it
 * once more, with activations and weights in bf16. */
#include "kernels/bf16.h"
#include "kernels/kernels.h"
#include "kernels/states.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifdef REFERENCE_BF16
#define REFERENCE kernels_reference_bf16
#define REST_BYTES sizeof(uint16_t)
typedef uint16_t ACT; /* an activation, or a weight as products see it */
#define GET(x) ((double)bf16_widen(x))
#define PUT(x) bf16_nearest((float)(x))
#else
#define REFERENCE kernels_reference
#define REST_BYTES 0
typedef float ACT;
#define GET(x) ((double)(x))
#define PUT(x) ((float)(x))
#endif

/* The reference keeps no state, so no entry looks at its table. */
#define SELF const struct kernels *k __attribute__((unused))

/* A weight, both planes of it where the second is there. */
static float weight(const void *w, const uint16_t *rest, size_t i) {
#ifdef REFERENCE_BF16
    uint16_t upper = ((const uint16_t *)w)[i];
    return rest ? bf16_join(upper, rest[i]) : bf16_widen(upper);
#else
    assert(!rest);
    return ((const float *)w)[i];
#endif
}

static void weight_set(void *w, uint16_t *rest, size_t i, float x) {
#ifdef REFERENCE_BF16
    ((uint16_t *)w)[i] = bf16_upper(x);
    rest[i] = bf16_lower(x);
#else
    assert(!rest);
    ((float *)w)[i] = x;
#endif
}

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
    for (size_t i = 0; i < n; i++) weight_set(w, rest, i, host[i]);
}

static void host_weights_out(SELF, float *host, const void *w, const uint16_t *rest, size_t n) {
    for (size_t i = 0; i < n; i++) host[i] = weight(w, rest, i);
}

static int host_check(SELF, struct err *err) {
    (void)err;
    return 0;
}

static size_t no_scratch(SELF, const struct kernels_shape *s) {
    (void)s;
    return 0;
}

static void nothing_to_destroy(struct kernels *k) {
    (void)k;
}

static double product_row(const ACT *x, const ACT *w, int C) {
    double sum = 0.0;
    for (int c = 0; c < C; c++) sum += GET(x[c]) * GET(w[c]);
    return sum;
}

static void matmul_forward(SELF, void *to, const void *from, const void *weights, int rows, int C,
                           int OC) {
    ACT *out = to;
    const ACT *x = from, *w = weights;
    for (size_t r = 0; r < (size_t)rows; r++)
        for (size_t o = 0; o < (size_t)OC; o++) out[r * OC + o] = PUT(product_row(x + r * C, w + o * C, C));
}

static void matmul_logits(SELF, float *out, const void *from, const void *weights, int rows, int C,
                          int OC) {
    const ACT *x = from, *w = weights;
    for (size_t r = 0; r < (size_t)rows; r++)
        for (size_t o = 0; o < (size_t)OC; o++) out[r * OC + o] = (float)product_row(x + r * C, w + o * C, C);
}

static void matmul_backward_input(SELF, void *to, const void *from, const void *weights, int rows,
                                  int C, int OC) {
    ACT *dx = to;
    const ACT *dout = from, *w = weights;
    for (size_t r = 0; r < (size_t)rows; r++)
        for (size_t c = 0; c < (size_t)C; c++) {
            double sum = 0.0;
            for (size_t o = 0; o < (size_t)OC; o++) sum += GET(dout[r * OC + o]) * GET(w[o * C + c]);
            dx[r * C + c] = PUT(sum);
        }
}

static void matmul_backward_weight(SELF, float *dw, const void *from, const void *other, int rows,
                                   int C, int OC, enum kernels_write write) {
    const ACT *dout = from, *x = other;
    for (size_t o = 0; o < (size_t)OC; o++)
        for (size_t c = 0; c < (size_t)C; c++) {
            double sum = 0.0;
            for (size_t r = 0; r < (size_t)rows; r++) sum += GET(dout[r * OC + o]) * GET(x[r * C + c]);
            dw[o * C + c] = (float)(write == KERNELS_ADD ? dw[o * C + c] + sum : sum);
        }
}

static void embedding_forward(SELF, float *out, const int32_t *tokens, const void *weights, int rows,
                              int C, int V) {
    const ACT *w = weights;
    for (size_t r = 0; r < (size_t)rows; r++) {
        assert((tokens[r] >= 0 && tokens[r] < V) || tokens[r] == KERNELS_ELSEWHERE);
        for (size_t c = 0; c < (size_t)C; c++)
            out[r * C + c] = tokens[r] < 0 ? 0.0f : (float)GET(w[(size_t)tokens[r] * C + c]);
    }
}

static void embedding_backward(SELF, float *dw, const float *dout, const int32_t *tokens, int rows,
                               int C, int V) {
    for (int r = 0; r < rows; r++) {
        assert((tokens[r] >= 0 && tokens[r] < V) || tokens[r] == KERNELS_ELSEWHERE);
        for (int c = 0; tokens[r] >= 0 && c < C; c++)
            dw[(size_t)tokens[r] * C + c] += dout[(size_t)r * C + c];
    }
}

static void rmsnorm_forward(SELF, void *to, float *rstd, const float *x, const float *w, float eps, int rows,
                            int C) {
    ACT *out = to;
    for (int r = 0; r < rows; r++, x += C, out += C) {
        double sum_sq = 0.0;
        for (int c = 0; c < C; c++) sum_sq += (double)x[c] * x[c];
        rstd[r] = (float)(1.0 / sqrt(sum_sq / C + eps));
        for (int c = 0; c < C; c++) out[c] = PUT((double)x[c] * rstd[r] * w[c]);
    }
}

/* With n = x * rstd: d loss / dx = rstd * (w*dout - n * mean(w*dout*n)). */
static void rmsnorm_backward(SELF, float *dx, float *dw, const void *from, const float *x, const float *w,
                             const float *rstd, int rows, int C) {
    const ACT *dout = from;
    for (int r = 0; r < rows; r++, x += C, dx += C, dout += C) {
        double mean = 0.0;
        for (int c = 0; c < C; c++) mean += w[c] * GET(dout[c]) * x[c] * rstd[r];
        mean /= C;
        for (int c = 0; c < C; c++) {
            double n = (double)x[c] * rstd[r];
            dx[c] = (float)(dx[c] + rstd[r] * (w[c] * GET(dout[c]) - n * mean));
            dw[c] = (float)(dw[c] + GET(dout[c]) * n);
        }
    }
}

#ifndef REFERENCE_BF16
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
#endif

/* Rotate the query and key heads by the tables' angles times `direction` (1 or -1). */
static void rotate(ACT *qkv, const float *cosine, const float *sine, const int32_t *start, int B,
                   int T, int H, int KV, int D, double direction) {
    int half = D / 2;
    for (size_t row = 0; row < (size_t)B * T; row++) {
        size_t position = row % T - (start ? start[row] : 0);
        const float *cos_t = cosine + position * half, *sin_t = sine + position * half;
        for (int h = 0; h < H + KV; h++) {
            ACT *x = qkv + (row * (H + 2 * KV) + h) * D;
            for (int i = 0; i < half; i++) {
                double a = GET(x[i]), b = GET(x[i + half]), s = direction * sin_t[i];
                x[i] = PUT(a * cos_t[i] - b * s);
                x[i + half] = PUT(b * cos_t[i] + a * s);
            }
        }
    }
}

static void rope_forward(SELF, void *qkv, const float *cosine, const float *sine,
                         const int32_t *start, int B, int T, int H, int KV, int D) {
    rotate(qkv, cosine, sine, start, B, T, H, KV, D, 1.0);
}

static void rope_backward(SELF, void *dqkv, const float *cosine, const float *sine,
                          const int32_t *start, int B, int T, int H, int KV, int D) {
    rotate(dqkv, cosine, sine, start, B, T, H, KV, D, -1.0);
}

/* Rows of qkv of one batch element are `stride` elements apart; heads are q, then k, then v. */
struct heads {
    size_t stride, q, k, v; /* offsets within a row */
};

static struct heads heads_of(int h, int H, int KV, int D) {
    int kv = h / (H / KV);
    return (struct heads){ (size_t)(H + 2 * KV) * D, (size_t)h * D, (size_t)(H + kv) * D,
                           (size_t)(H + KV + kv) * D };
}

static void attention_forward(SELF, void *to, float *lse, const void *from, const int32_t *start,
                              int B, int T, int H, int KV, int D) {
    ACT *out = to;
    const ACT *qkv = from;
    double score[T], scale = 1.0 / sqrt(D);
    for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++)
            for (int t = 0; t < T; t++) {
                struct heads at = heads_of(h, H, KV, D);
                const ACT *rows = qkv + (size_t)b * T * at.stride;
                double max = -INFINITY, sum = 0.0;
                int first = start ? start[(size_t)b * T + t] : 0;
                for (int u = first; u <= t; u++) {
                    score[u] = scale * product_row(rows + t * at.stride + at.q,
                                                   rows + u * at.stride + at.k, D);
                    max = fmax(max, score[u]);
                }
                for (int u = first; u <= t; u++) sum += exp(score[u] - max);
                /* cppcheck-suppress invalidFunctionArg ; the largest score alone makes the sum 1 */
                lse[((size_t)b * H + h) * T + t] = (float)(max + log(sum));
                for (int d = 0; d < D; d++) {
                    double o = 0.0;
                    for (int u = first; u <= t; u++)
                        o += exp(score[u] - max) / sum * GET(rows[u * at.stride + at.v + d]);
                    out[(((size_t)b * T + t) * H + h) * D + d] = PUT(o);
                }
            }
}

/* One query of one head. With p = exp(score - lse): dv += p * dout, dscore = p * (dout.v -
 * dout.out), dq = scale * sum dscore * k, dk += scale * dscore * q. acc has the shape of one batch
 * element. */
static void attention_backward_query(double *acc, const ACT *rows, const ACT *dout,
                                     const ACT *out, float lse, int first, int t,
                                     struct heads at, int D) {
    double scale = 1.0 / sqrt(D), delta = product_row(dout, out, D);
    const ACT *q = rows + t * at.stride + at.q;
    double *dq = acc + t * at.stride + at.q;
    for (int u = first; u <= t; u++) {
        const ACT *key = rows + u * at.stride + at.k, *value = rows + u * at.stride + at.v;
        double *dk = acc + u * at.stride + at.k, *dv = acc + u * at.stride + at.v;
        double p = exp(scale * product_row(q, key, D) - lse);
        double dscore = p * (product_row(dout, value, D) - delta) * scale;
        for (int d = 0; d < D; d++) {
            dv[d] += p * GET(dout[d]);
            dq[d] += dscore * GET(key[d]);
            dk[d] += dscore * GET(q[d]);
        }
    }
}

static void attention_backward(SELF, void *to, const void *dfrom, const void *from, const void *result,
                               const float *lse, const int32_t *start, int B, int T, int H, int KV,
                               int D) {
    ACT *dqkv = to;
    const ACT *dout = dfrom, *qkv = from, *out = result;
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
        for (size_t i = 0; i < per_batch; i++) dqkv[b * per_batch + i] = PUT(acc[i]);
    }
    free(acc);
}

static void swiglu_forward(SELF, void *to, const void *from, int rows, int F) {
    ACT *out = to;
    const ACT *gate_up = from;
    for (int r = 0; r < rows; r++, gate_up += 2 * (size_t)F, out += F)
        for (int f = 0; f < F; f++) {
            double gate = GET(gate_up[f]), up = GET(gate_up[F + f]);
            out[f] = PUT(gate / (1.0 + exp(-gate)) * up);
        }
}

static void swiglu_backward(SELF, void *to, const void *dfrom, const void *from, int rows, int F) {
    ACT *dgate_up = to;
    const ACT *dout = dfrom, *gate_up = from;
    for (int r = 0; r < rows; r++, gate_up += 2 * (size_t)F, dgate_up += 2 * (size_t)F, dout += F)
        for (int f = 0; f < F; f++) {
            double gate = GET(gate_up[f]), up = GET(gate_up[F + f]), sigmoid = 1.0 / (1.0 + exp(-gate));
            dgate_up[f] = PUT(GET(dout[f]) * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)));
            dgate_up[F + f] = PUT(GET(dout[f]) * gate * sigmoid);
        }
}

static void add(SELF, float *out, const float *a, const void *branch, size_t n) {
    const ACT *b = branch;
    for (size_t i = 0; i < n; i++) out[i] = a[i] + (float)GET(b[i]);
}

static void accumulate(SELF, float *x, const float *more, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] += more[i];
}

static void round_all(SELF, void *to, const float *x, size_t n) {
    ACT *out = to;
    if (to == x) return;
    for (size_t i = 0; i < n; i++) out[i] = PUT(x[i]);
}

static void cross_entropy_row(float *loss, float *penalty, ACT *dlogits, const float *logits, int target,
                              const struct kernels_loss *how, int V) {
    int largest = 0;
    double sum = 0.0;
    for (int v = 1; v < V; v++)
        if (logits[v] > logits[largest]) largest = v;
    double max = logits[largest];
    for (int v = 0; v < V; v++) sum += exp(logits[v] - max);
    /* cppcheck-suppress invalidFunctionArg ; the largest logit alone makes the sum 1 */
    double lse = log(sum) + max;
    *loss = (float)(lse - logits[target]);
    *penalty = (float)(how->z * lse * lse + how->max_z * max * max);
    for (int v = 0; dlogits && v < V; v++) {
        double p = exp(logits[v] - max) / sum, d = p - (v == target);
        d += 2.0 * how->z * lse * p + 2.0 * how->max_z * max * (v == largest);
        dlogits[v] = PUT(d * how->grad_scale);
    }
}

static void cross_entropy(SELF, float *loss, float *penalty, void *to, float *logits,
                          const int32_t *targets, const struct kernels_loss *how, int rows, int V) {
    for (int r = 0; r < rows; r++, logits += V) {
        ACT *dlogits = to ? (ACT *)to + (size_t)r * V : NULL;
        assert(targets[r] >= -1 && targets[r] < V);
        if (targets[r] >= 0) {
            cross_entropy_row(&loss[r], &penalty[r], dlogits, logits, targets[r], how, V);
        } else {
            loss[r] = penalty[r] = 0.0f;
            if (dlogits) memset(dlogits, 0, (size_t)V * sizeof *dlogits);
        }
    }
}

static void vocabulary_part(SELF, struct kernels_part *part, const float *logits, const int32_t *targets,
                            int rows, int V) {
    for (int r = 0; r < rows; r++, logits += V) {
        assert(targets[r] >= KERNELS_ELSEWHERE && targets[r] < V);
        int largest = 0;
        double sum = 0.0;
        for (int v = 1; v < V; v++)
            if (logits[v] > logits[largest]) largest = v;
        for (int v = 0; v < V; v++) sum += exp((double)logits[v] - logits[largest]);
        part[r] = (struct kernels_part){ .max = logits[largest], .sum = (float)sum, .largest = (float)largest,
                                         .target = targets[r] >= 0 ? logits[targets[r]] : -INFINITY };
    }
}

static void vocabulary_loss(SELF, float *loss, float *penalty, void *to, float *logits,
                            const int32_t *targets, const struct kernels_part *part, int own, int parts,
                            const struct kernels_loss *how, int rows, int V) {
    for (int r = 0; r < rows; r++, logits += V) {
        ACT *dlogits = to ? (ACT *)to + (size_t)r * V : NULL;
        int first = 0; /* the part that has the largest logit */
        double sum = 0.0, target = -INFINITY;
        for (int p = 1; p < parts; p++)
            if (part[(size_t)p * rows + r].max > part[(size_t)first * rows + r].max) first = p;
        double max = part[(size_t)first * rows + r].max;
        for (int p = 0; p < parts; p++) {
            const struct kernels_part *x = &part[(size_t)p * rows + r];
            sum += x->sum * exp(x->max - max);
            if (x->target > target) target = x->target;
        }
        /* cppcheck-suppress invalidFunctionArg ; the largest logit alone makes the sum 1 */
        double lse = log(sum) + max;
        int counts = targets[r] != -1;
        int largest = own == first ? (int)part[(size_t)own * rows + r].largest : -1;
        loss[r] = counts ? (float)(lse - target) : 0.0f;
        penalty[r] = counts ? (float)(how->z * lse * lse + how->max_z * max * max) : 0.0f;
        for (int v = 0; dlogits && v < V; v++) {
            double p = exp(logits[v] - max) / sum, d = p - (v == targets[r]);
            d += 2.0 * how->z * lse * p + 2.0 * how->max_z * max * (v == largest);
            dlogits[v] = PUT(counts ? d * how->grad_scale : 0.0);
        }
    }
}

static void adamw(SELF, void *param, uint16_t *rest, const float *grad, float *m, float *v, size_t n,
                  const struct kernels_adamw *a) {
    for (size_t i = 0; i < n; i++) {
        double g = (double)grad[i] * a->grad_scale, old = weight(param, rest, i);
        double m_new = (double)a->beta1 * m[i] + (1.0 - a->beta1) * g;
        double v_new = (double)a->beta2 * v[i] + (1.0 - a->beta2) * g * g;
        double step = m_new / a->m_correction / (sqrt(v_new / a->v_correction) + a->eps);
        weight_set(param, rest, i, (float)(old - a->lr * (step + (double)a->weight_decay * old)));
        m[i] = (float)m_new;
        v[i] = (float)v_new;
    }
}

static void descend(SELF, void *param, uint16_t *rest, const float *direction, size_t n,
                    const struct kernels_descent *d) {
    for (size_t i = 0; i < n; i++) {
        double old = weight(param, rest, i);
        weight_set(param, rest, i, (float)(d->keep * old - (double)d->step * direction[i]));
    }
}

static void combine(SELF, float *out, float a, const float *x, float b, const float *y, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = (float)((double)a * x[i] + (double)b * y[i]);
}

static void block_in(uint8_t *block, enum kernels_state how, const float *x, size_t n, uint64_t seed,
                     uint64_t first) {
    int root = how == KERNELS_STATE_ROOT8;
    float most = 0.0f;
    for (size_t i = 0; i < n; i++) {
        float here = root ? sqrtf(x[i]) : x[i] < 0 ? -x[i] : x[i];
        if (here > most) most = here;
    }
    float unit = state_unit(most, root ? STATE_TOP_ROOT : STATE_TOP_SIGNED), per_unit = unit > 0 ? 1 / unit : 0;
    memcpy(block, &unit, sizeof unit);
    block += sizeof unit;
    for (size_t i = 0; i < n; i++) {
        float random = seed ? state_random(seed, first + i) : 0.5f;
        block[i] = (uint8_t)(root ? state_root(x[i], per_unit, random) : state_signed(x[i], per_unit, random));
    }
}

static void state_in(SELF, void *state, enum kernels_state how, const float *x, size_t n, uint64_t seed,
                     uint64_t first) {
    assert(how != KERNELS_STATE_FP32);
    if (how == KERNELS_STATE_BF16)
        for (size_t i = 0; i < n; i++) ((uint16_t *)state)[i] = state_bf16(x[i], seed, first + i);
    if (how < KERNELS_STATE_SIGNED8) return;
    for (size_t i = 0; i < n; i += KERNELS_STATE_BLOCK) {
        size_t here = n - i < KERNELS_STATE_BLOCK ? n - i : KERNELS_STATE_BLOCK;
        block_in((uint8_t *)state + kernels_state_bytes(how, i), how, x + i, here, seed, first + i);
    }
}

static void state_out(SELF, float *x, const void *state, enum kernels_state how, size_t n) {
    assert(how != KERNELS_STATE_FP32);
    if (how == KERNELS_STATE_BF16)
        for (size_t i = 0; i < n; i++) x[i] = bf16_widen(((const uint16_t *)state)[i]);
    for (size_t i = 0; how >= KERNELS_STATE_SIGNED8 && i < n; i++) {
        const uint8_t *block = (const uint8_t *)state + i / KERNELS_STATE_BLOCK * STATE_BLOCK_BYTES;
        uint8_t code = block[sizeof(float) + i % KERNELS_STATE_BLOCK];
        float unit;
        memcpy(&unit, block, sizeof unit);
        x[i] = how == KERNELS_STATE_ROOT8 ? state_root_value(code, unit) : state_signed_value(code, unit);
    }
}

static double sum_squares(SELF, const float *x, size_t n) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * x[i];
    return sum;
}

const struct kernels *REFERENCE(void) {
    static const struct kernels reference = {
        .name = "reference",
        .description = "plain loops with double accumulators, one thread",
        .weight_bytes = sizeof(ACT),
        .rest_bytes = REST_BYTES,
        .act_bytes = sizeof(ACT),
        .alloc = host_alloc,
        .free = host_free,
        .alloc_host = host_alloc,
        .free_host = host_free,
        .copy_in = host_copy,
        .copy_out = host_copy,
        .zero = host_zero,
        .weights_in = host_weights_in,
        .weights_out = host_weights_out,
        .weights_widen = host_weights_out,
        .check = host_check,
        .scratch_bytes = no_scratch,
        .destroy = nothing_to_destroy,
        .matmul_forward = matmul_forward,
        .matmul_logits = matmul_logits,
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
        .accumulate = accumulate,
        .round = round_all,
        .cross_entropy = cross_entropy,
        .vocabulary_part = vocabulary_part,
        .vocabulary_loss = vocabulary_loss,
        .adamw = adamw,
        .descend = descend,
        .combine = combine,
        .state_in = state_in,
        .state_out = state_out,
        .sum_squares = sum_squares,
    };
    return &reference;
}
