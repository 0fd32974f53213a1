/* staged.c - see staged.h. */
#include "tests/cuda/staged.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define OPERANDS 12

struct staged {
    struct kernels table; /* first */
    struct kernels *device;
};

/* The operands of one call. */
struct call {
    const struct kernels *k;
    struct {
        void *device, *host; /* host: where it goes back to, or NULL */
        size_t bytes;
    } operand[OPERANDS];
    int count;
};

static struct call begin(const struct kernels *k) {
    return (struct call){ .k = ((const struct staged *)(const void *)k)->device };
}

static void *add_operand(struct call *c, const void *from, void *back, size_t bytes) {
    struct err err;
    assert(c->count < OPERANDS);
    if (!from) return NULL;
    void *p = c->k->alloc(c->k, bytes, &err);
    assert(p);
    c->k->copy_in(c->k, p, from, bytes);
    c->operand[c->count].device = p;
    c->operand[c->count].host = back;
    c->operand[c->count++].bytes = bytes;
    return p;
}

static void *reads(struct call *c, const void *x, size_t bytes) { return add_operand(c, x, NULL, bytes); }
static void *writes(struct call *c, void *x, size_t bytes) { return add_operand(c, x, x, bytes); }
static float *reads_floats(struct call *c, const float *x, size_t n) { return reads(c, x, n * sizeof *x); }
static float *writes_floats(struct call *c, float *x, size_t n) { return writes(c, x, n * sizeof *x); }
/* Activations. */
static void *reads_acts(struct call *c, const void *x, size_t n) { return reads(c, x, n * c->k->act_bytes); }
static void *writes_acts(struct call *c, void *x, size_t n) { return writes(c, x, n * c->k->act_bytes); }
static int32_t *reads_ints(struct call *c, const int32_t *x, size_t n) { return reads(c, x, n * sizeof *x); }

static void end(struct call *c) {
    for (int i = 0; i < c->count; i++) {
        if (c->operand[i].host)
            c->k->copy_out(c->k, c->operand[i].host, c->operand[i].device, c->operand[i].bytes);
        c->k->free(c->k, c->operand[i].device);
    }
}

static void weights_in(const struct kernels *k, void *w, uint16_t *rest, const float *host, size_t n) {
    struct call c = begin(k);
    void *d_w = writes(&c, w, n * k->weight_bytes);
    c.k->weights_in(c.k, d_w, writes(&c, rest, n * sizeof *rest), host, n);
    end(&c);
}

static void weights_out(const struct kernels *k, float *host, const void *w, const uint16_t *rest, size_t n) {
    struct call c = begin(k);
    const void *d_w = reads(&c, w, n * k->weight_bytes);
    c.k->weights_out(c.k, host, d_w, reads(&c, rest, n * sizeof *rest), n);
    end(&c);
}

static void weights_widen(const struct kernels *k, float *out, const void *w, const uint16_t *rest,
                          size_t n) {
    struct call c = begin(k);
    const void *d_w = reads(&c, w, n * k->weight_bytes);
    float *d_out = writes_floats(&c, out, n);
    c.k->weights_widen(c.k, d_out, d_w, reads(&c, rest, n * sizeof *rest), n);
    end(&c);
}

static void matmul_forward(const struct kernels *k, void *out, const void *x, const void *w, int rows, int C,
                           int OC) {
    struct call c = begin(k);
    size_t r = (size_t)rows;
    void *d_out = writes_acts(&c, out, r * OC), *d_x = reads_acts(&c, x, r * C);
    c.k->matmul_forward(c.k, d_out, d_x, reads(&c, w, (size_t)OC * C * k->weight_bytes), rows, C, OC);
    end(&c);
}

static void matmul_logits(const struct kernels *k, float *out, const void *x, const void *w, int rows, int C,
                          int OC) {
    struct call c = begin(k);
    size_t r = (size_t)rows;
    float *d_out = writes_floats(&c, out, r * OC);
    const void *d_x = reads_acts(&c, x, r * C);
    c.k->matmul_logits(c.k, d_out, d_x, reads(&c, w, (size_t)OC * C * k->weight_bytes), rows, C, OC);
    end(&c);
}

static void matmul_backward_input(const struct kernels *k, void *dx, const void *dout, const void *w,
                                  int rows, int C, int OC) {
    struct call c = begin(k);
    size_t r = (size_t)rows;
    void *d_dx = writes_acts(&c, dx, r * C), *d_dout = reads_acts(&c, dout, r * OC);
    c.k->matmul_backward_input(c.k, d_dx, d_dout, reads(&c, w, (size_t)OC * C * k->weight_bytes), rows, C,
                               OC);
    end(&c);
}

static void matmul_backward_weight(const struct kernels *k, float *dw, const void *dout, const void *x,
                                   int rows, int C, int OC, enum kernels_write write) {
    struct call c = begin(k);
    size_t r = (size_t)rows;
    float *d_dw = writes_floats(&c, dw, (size_t)OC * C);
    const void *d_dout = reads_acts(&c, dout, r * OC);
    c.k->matmul_backward_weight(c.k, d_dw, d_dout, reads_acts(&c, x, r * C), rows, C, OC, write);
    end(&c);
}

static void embedding_forward(const struct kernels *k, float *out, const int32_t *tokens, const void *w,
                              int rows, int C, int V) {
    struct call c = begin(k);
    float *d_out = writes_floats(&c, out, (size_t)rows * C);
    const int32_t *d_tokens = reads_ints(&c, tokens, (size_t)rows);
    c.k->embedding_forward(c.k, d_out, d_tokens, reads(&c, w, (size_t)V * C * k->weight_bytes), rows, C, V);
    end(&c);
}

static void embedding_backward(const struct kernels *k, float *dw, const float *dout, const int32_t *tokens,
                               int rows, int C, int V) {
    struct call c = begin(k);
    float *d_dw = writes_floats(&c, dw, (size_t)V * C), *d_dout = reads_floats(&c, dout, (size_t)rows * C);
    c.k->embedding_backward(c.k, d_dw, d_dout, reads_ints(&c, tokens, (size_t)rows), rows, C, V);
    end(&c);
}

static void rmsnorm_forward(const struct kernels *k, void *out, float *rstd, const float *x, const float *w,
                            float eps, int rows, int C) {
    struct call c = begin(k);
    size_t r = (size_t)rows;
    void *d_out = writes_acts(&c, out, r * C);
    float *d_rstd = writes_floats(&c, rstd, r);
    const float *d_x = reads_floats(&c, x, r * C);
    c.k->rmsnorm_forward(c.k, d_out, d_rstd, d_x, reads_floats(&c, w, (size_t)C), eps, rows, C);
    end(&c);
}

static void rmsnorm_backward(const struct kernels *k, float *dx, float *dw, const void *dout, const float *x,
                             const float *w, const float *rstd, int rows, int C) {
    struct call c = begin(k);
    size_t r = (size_t)rows;
    float *d_dx = writes_floats(&c, dx, r * C), *d_dw = writes_floats(&c, dw, (size_t)C);
    const void *d_dout = reads_acts(&c, dout, r * C);
    const float *d_x = reads_floats(&c, x, r * C);
    const float *d_w = reads_floats(&c, w, (size_t)C);
    c.k->rmsnorm_backward(c.k, d_dx, d_dw, d_dout, d_x, d_w, reads_floats(&c, rstd, r), rows, C);
    end(&c);
}

/* Both directions: the same operands. */
static void turn(const struct kernels *k, int back, void *qkv, const float *cosine, const float *sine,
                 const int32_t *start, int B, int T, int H, int KV, int D) {
    struct call c = begin(k);
    size_t rows = (size_t)B * T, angles = (size_t)T * D / 2;
    void *d_qkv = writes_acts(&c, qkv, rows * (H + 2 * KV) * D);
    const float *d_cos = reads_floats(&c, cosine, angles), *d_sin = reads_floats(&c, sine, angles);
    const int32_t *d_start = reads_ints(&c, start, rows);
    if (back) c.k->rope_backward(c.k, d_qkv, d_cos, d_sin, d_start, B, T, H, KV, D);
    else c.k->rope_forward(c.k, d_qkv, d_cos, d_sin, d_start, B, T, H, KV, D);
    end(&c);
}

static void rope_forward(const struct kernels *k, void *qkv, const float *cosine, const float *sine,
                         const int32_t *start, int B, int T, int H, int KV, int D) {
    turn(k, 0, qkv, cosine, sine, start, B, T, H, KV, D);
}

static void rope_backward(const struct kernels *k, void *dqkv, const float *cosine, const float *sine,
                          const int32_t *start, int B, int T, int H, int KV, int D) {
    turn(k, 1, dqkv, cosine, sine, start, B, T, H, KV, D);
}

static void attention_forward(const struct kernels *k, void *out, float *lse, const void *qkv,
                              const int32_t *start, int B, int T, int H, int KV, int D) {
    struct call c = begin(k);
    size_t rows = (size_t)B * T;
    void *d_out = writes_acts(&c, out, rows * H * D);
    float *d_lse = writes_floats(&c, lse, rows * H);
    const void *d_qkv = reads_acts(&c, qkv, rows * (H + 2 * KV) * D);
    c.k->attention_forward(c.k, d_out, d_lse, d_qkv, reads_ints(&c, start, rows), B, T, H, KV, D);
    end(&c);
}

static void attention_backward(const struct kernels *k, void *dqkv, const void *dout, const void *qkv,
                               const void *out, const float *lse, const int32_t *start, int B, int T, int H,
                               int KV, int D) {
    struct call c = begin(k);
    size_t rows = (size_t)B * T, n = rows * (H + 2 * KV) * D;
    void *d_dqkv = writes_acts(&c, dqkv, n);
    const void *d_dout = reads_acts(&c, dout, rows * H * D), *d_qkv = reads_acts(&c, qkv, n);
    const void *d_out = reads_acts(&c, out, rows * H * D);
    const float *d_lse = reads_floats(&c, lse, rows * H);
    c.k->attention_backward(c.k, d_dqkv, d_dout, d_qkv, d_out, d_lse, reads_ints(&c, start, rows), B, T, H,
                            KV, D);
    end(&c);
}

static void swiglu_forward(const struct kernels *k, void *out, const void *gate_up, int rows, int F) {
    struct call c = begin(k);
    size_t n = (size_t)rows * F;
    void *d_out = writes_acts(&c, out, n);
    c.k->swiglu_forward(c.k, d_out, reads_acts(&c, gate_up, 2 * n), rows, F);
    end(&c);
}

/* Where one is the other, it is on the device too. */
static void swiglu_backward(const struct kernels *k, void *dgate_up, const void *dout, const void *gate_up,
                            int rows, int F) {
    struct call c = begin(k);
    size_t n = (size_t)rows * F;
    void *d_dgate_up = writes_acts(&c, dgate_up, 2 * n);
    const void *d_dout = reads_acts(&c, dout, n);
    const void *d_gate_up = gate_up == dgate_up ? d_dgate_up : reads_acts(&c, gate_up, 2 * n);
    c.k->swiglu_backward(c.k, d_dgate_up, d_dout, d_gate_up, rows, F);
    end(&c);
}

static void add(const struct kernels *k, float *out, const float *a, const void *b, size_t n) {
    struct call c = begin(k);
    float *d_out = writes_floats(&c, out, n);
    const float *d_a = a == out ? d_out : reads_floats(&c, a, n);
    c.k->add(c.k, d_out, d_a, reads_acts(&c, b, n), n);
    end(&c);
}

static void round_to(const struct kernels *k, void *out, const float *x, size_t n) {
    struct call c = begin(k);
    void *d_out = writes_acts(&c, out, n);
    c.k->round(c.k, d_out, out == x ? d_out : reads_floats(&c, x, n), n);
    end(&c);
}

static void cross_entropy(const struct kernels *k, float *loss, float *penalty, void *dlogits, float *logits,
                          const int32_t *targets, const struct kernels_loss *how, int rows, int V) {
    struct call c = begin(k);
    size_t r = (size_t)rows;
    float *d_loss = writes_floats(&c, loss, r), *d_penalty = writes_floats(&c, penalty, r);
    float *d_logits = writes_floats(&c, logits, r * V);
    void *d_dlogits = dlogits == logits ? d_logits : writes_acts(&c, dlogits, r * V);
    c.k->cross_entropy(c.k, d_loss, d_penalty, d_dlogits, d_logits, reads_ints(&c, targets, r), how, rows, V);
    end(&c);
}

static void vocabulary_part(const struct kernels *k, struct kernels_part *part, const float *logits,
                            const int32_t *targets, int rows, int V) {
    struct call c = begin(k);
    size_t r = (size_t)rows;
    struct kernels_part *d_part = writes(&c, part, r * sizeof *part);
    const float *d_logits = reads_floats(&c, logits, r * V);
    c.k->vocabulary_part(c.k, d_part, d_logits, reads_ints(&c, targets, r), rows, V);
    end(&c);
}

static void vocabulary_loss(const struct kernels *k, float *loss, float *penalty, void *dlogits,
                            float *logits, const int32_t *targets, const struct kernels_part *part, int own,
                            int parts, const struct kernels_loss *how, int rows, int V) {
    struct call c = begin(k);
    size_t r = (size_t)rows;
    float *d_loss = writes_floats(&c, loss, r), *d_penalty = writes_floats(&c, penalty, r);
    float *d_logits = writes_floats(&c, logits, r * V);
    void *d_dlogits = dlogits == logits ? d_logits : writes_acts(&c, dlogits, r * V);
    const struct kernels_part *d_part = reads(&c, part, r * (size_t)parts * sizeof *part);
    c.k->vocabulary_loss(c.k, d_loss, d_penalty, d_dlogits, d_logits, reads_ints(&c, targets, r), d_part, own,
                         parts, how, rows, V);
    end(&c);
}

static void adamw(const struct kernels *k, void *param, uint16_t *rest, const float *grad, float *m, float *v,
                  size_t n, const struct kernels_adamw *a) {
    struct call c = begin(k);
    void *d_param = writes(&c, param, n * k->weight_bytes);
    uint16_t *d_rest = writes(&c, rest, n * sizeof *rest);
    float *d_m = writes_floats(&c, m, n), *d_v = writes_floats(&c, v, n);
    c.k->adamw(c.k, d_param, d_rest, reads_floats(&c, grad, n), d_m, d_v, n, a);
    end(&c);
}

static void descend(const struct kernels *k, void *param, uint16_t *rest, const float *direction, size_t n,
                    const struct kernels_descent *d) {
    struct call c = begin(k);
    void *d_param = writes(&c, param, n * k->weight_bytes);
    uint16_t *d_rest = writes(&c, rest, n * sizeof *rest);
    c.k->descend(c.k, d_param, d_rest, reads_floats(&c, direction, n), n, d);
    end(&c);
}

static void combine(const struct kernels *k, float *out, float a, const float *x, float b, const float *y,
                    size_t n) {
    struct call c = begin(k);
    float *d_x = reads_floats(&c, x, n), *d_y = reads_floats(&c, y, n);
    c.k->combine(c.k, writes_floats(&c, out, n), a, d_x, b, d_y, n);
    end(&c);
}

static void state_in(const struct kernels *k, void *state, enum kernels_state how, const float *x, size_t n,
                     uint64_t seed, uint64_t first) {
    struct call c = begin(k);
    void *d_state = writes(&c, state, kernels_state_bytes(how, n));
    c.k->state_in(c.k, d_state, how, reads_floats(&c, x, n), n, seed, first);
    end(&c);
}

static void state_out(const struct kernels *k, float *x, const void *state, enum kernels_state how,
                      size_t n) {
    struct call c = begin(k);
    void *d_state = reads(&c, state, kernels_state_bytes(how, n));
    c.k->state_out(c.k, writes_floats(&c, x, n), d_state, how, n);
    end(&c);
}

static double sum_squares(const struct kernels *k, const float *x, size_t n) {
    struct call c = begin(k);
    double sum = c.k->sum_squares(c.k, reads_floats(&c, x, n), n);
    end(&c);
    return sum;
}

static int check(const struct kernels *k, struct err *err) {
    struct call c = begin(k);
    return c.k->check(c.k, err);
}

static void destroy(struct kernels *k) {
    struct kernels *device = ((struct staged *)(void *)k)->device;
    device->destroy(device);
    free(k);
}

struct kernels *staged_create(struct kernels *device) {
    struct staged *s = malloc(sizeof *s);
    assert(s);
    s->device = device;
    struct kernels *k = &s->table;
    *k = *kernels_reference(); /* for its memory */
    k->name = device->name;
    k->description = device->description;
    k->weight_bytes = device->weight_bytes;
    k->rest_bytes = device->rest_bytes;
    k->act_bytes = device->act_bytes;
    k->weights_in = weights_in;
    k->weights_out = weights_out;
    k->weights_widen = weights_widen;
    k->check = check;
    k->destroy = destroy;
    k->matmul_forward = matmul_forward;
    k->matmul_logits = matmul_logits;
    k->matmul_backward_input = matmul_backward_input;
    k->matmul_backward_weight = matmul_backward_weight;
    k->embedding_forward = embedding_forward;
    k->embedding_backward = embedding_backward;
    k->rmsnorm_forward = rmsnorm_forward;
    k->rmsnorm_backward = rmsnorm_backward;
    k->rope_forward = rope_forward;
    k->rope_backward = rope_backward;
    k->attention_forward = attention_forward;
    k->attention_backward = attention_backward;
    k->swiglu_forward = swiglu_forward;
    k->swiglu_backward = swiglu_backward;
    k->add = add;
    k->round = round_to;
    k->cross_entropy = cross_entropy;
    k->vocabulary_part = vocabulary_part;
    k->vocabulary_loss = vocabulary_loss;
    k->adamw = adamw;
    k->descend = descend;
    k->combine = combine;
    k->state_in = state_in;
    k->state_out = state_out;
    k->sum_squares = sum_squares;
    return k;
}
