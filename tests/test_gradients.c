/* test_gradients.c - every backward kernel of the reference against central differences.
 *
 * kernels/reference.c is compiled once more here with `float` meaning double, so what is
 * differentiated is the specification itself and not a copy of it. In double, with step 1e-5, the
 * truncation error is about 1e-11 and cancellation about 1e-10 for losses near 10: a tolerance of
 * 1e-7 has room, and a wrong or missing term is larger by orders of magnitude. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <assert.h>
#include <cmocka.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/bf16.h"

#define float double
#define kernels_reference kernels_reference_in_double
#define kernels_rope_tables kernels_rope_tables_in_double
#include "kernels/reference.c"

#define STEP 1e-5
#define TOLERANCE 1e-7

enum { B = 2, T = 5, H = 4, KV = 2, D = 4, ROWS = B * T, C = 6, OC = 5, F = 4, V = 7 };
enum { QKV = ROWS * (H + 2 * KV) * D, OUT = ROWS * H * D };

static const struct kernels *k;

/* NULL, and two documents in the first sequence, three in the second. */
static const int32_t documents[ROWS] = { 0, 0, 2, 2, 2, 0, 1, 1, 1, 4 };
static const int32_t *start;

static void fill(double *x, size_t n, unsigned seed) {
    uint64_t state = seed * UINT64_C(0x9e3779b97f4a7c15) + 1;
    for (size_t i = 0; i < n; i++) {
        state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        x[i] = (double)(int64_t)state * 0x1p-63;
    }
}

/* The scalar that is differentiated: weights times outputs. Its gradient with respect to the
 * outputs is the weights, which the backward kernels get as dout. */
static double weighted(const double *out, const double *weight, size_t n) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) sum += out[i] * weight[i];
    return sum;
}

static void assert_is_gradient(const double *analytic, double *x, size_t n, double (*loss)(void)) {
    for (size_t i = 0; i < n; i++) {
        double kept = x[i];
        x[i] = kept + STEP;
        double up = loss();
        x[i] = kept - STEP;
        double down = loss(), numeric = (up - down) / (2 * STEP);
        x[i] = kept;
        if (fabs(numeric - analytic[i]) > TOLERANCE)
            fail_msg("element %zu: backward gives %.10g, differences %.10g", i, analytic[i],
                     numeric);
    }
}

static void assert_differs_by(const double *after, const double *before, double by, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (fabs(after[i] - before[i] - by) > 1e-12) fail_msg("element %zu was not added to", i);
}

static struct { double x[ROWS * C], w[OC * C], out[ROWS * OC], dout[ROWS * OC]; } mm;

static double matmul_loss(void) {
    k->matmul_forward(k, mm.out, mm.x, mm.w, ROWS, C, OC);
    return weighted(mm.out, mm.dout, ROWS * OC);
}

static void matmul_gradients_are_right_and_can_be_added(void **state) {
    (void)state;
    double dx[ROWS * C], dw[OC * C], dw_added[OC * C];
    fill(mm.x, ROWS * C, 1);
    fill(mm.w, OC * C, 2);
    fill(mm.dout, ROWS * OC, 3);
    k->matmul_backward_input(k, dx, mm.dout, mm.w, ROWS, C, OC);
    k->matmul_backward_weight(k, dw, mm.dout, mm.x, ROWS, C, OC, KERNELS_SET);
    assert_is_gradient(dx, mm.x, ROWS * C, matmul_loss);
    assert_is_gradient(dw, mm.w, OC * C, matmul_loss);
    for (int i = 0; i < OC * C; i++) dw_added[i] = 2.0;
    k->matmul_backward_weight(k, dw_added, mm.dout, mm.x, ROWS, C, OC, KERNELS_ADD);
    assert_differs_by(dw_added, dw, 2.0, OC * C);
}

static struct {
    int32_t tokens[ROWS];
    double w[V * C], out[ROWS * C], dout[ROWS * C];
} emb;

static double embedding_loss(void) {
    k->embedding_forward(k, emb.out, emb.tokens, emb.w, ROWS, C, V);
    return weighted(emb.out, emb.dout, ROWS * C);
}

/* Tokens repeat, as they do in text: a backward that writes instead of adding fails here. */
static void embedding_gradient_sums_over_repeated_tokens(void **state) {
    (void)state;
    double dw[V * C] = { 0 };
    fill(emb.w, V * C, 1);
    fill(emb.dout, ROWS * C, 2);
    for (int r = 0; r < ROWS; r++) emb.tokens[r] = r * r % V;
    k->embedding_backward(k, dw, emb.dout, emb.tokens, ROWS, C, V);
    assert_is_gradient(dw, emb.w, V * C, embedding_loss);
}

static struct { double x[ROWS * C], w[C], out[ROWS * C], rstd[ROWS], dout[ROWS * C]; } norm;

static double rmsnorm_loss(void) {
    k->rmsnorm_forward(k, norm.out, norm.rstd, norm.x, norm.w, 1e-3, ROWS, C);
    return weighted(norm.out, norm.dout, ROWS * C);
}

/* dx arrives holding the residual stream's gradient and must keep it. */
static void rmsnorm_gradients_are_added(void **state) {
    (void)state;
    double dx[ROWS * C], dw[C];
    fill(norm.x, ROWS * C, 1);
    fill(norm.w, C, 2);
    fill(norm.dout, ROWS * C, 3);
    for (int i = 0; i < ROWS * C; i++) dx[i] = 3.0;
    for (int i = 0; i < C; i++) dw[i] = -1.0;
    rmsnorm_loss();
    k->rmsnorm_backward(k, dx, dw, norm.dout, norm.x, norm.w, norm.rstd, ROWS, C);
    for (int i = 0; i < ROWS * C; i++) dx[i] -= 3.0;
    for (int i = 0; i < C; i++) dw[i] += 1.0;
    assert_is_gradient(dx, norm.x, ROWS * C, rmsnorm_loss);
    assert_is_gradient(dw, norm.w, C, rmsnorm_loss);
}

static struct {
    double qkv[QKV], rotated[QKV], cosine[T * D / 2], sine[T * D / 2], dout[QKV];
} rope;

static double rope_loss(void) {
    memcpy(rope.rotated, rope.qkv, sizeof rope.qkv);
    k->rope_forward(k, rope.rotated, rope.cosine, rope.sine, start, B, T, H, KV, D);
    return weighted(rope.rotated, rope.dout, QKV);
}

static void rope_gradient_rotates_back_and_leaves_values_alone(void **state) {
    (void)state;
    double dqkv[QKV];
    fill(rope.qkv, QKV, 1);
    fill(rope.dout, QKV, 2);
    kernels_rope_tables(rope.cosine, rope.sine, T, D, &(struct kernels_rope){ .theta = 100.0 });
    for (int i = 0; i <= 1; i++) {
        start = i ? NULL : documents;
        memcpy(dqkv, rope.dout, sizeof dqkv);
        k->rope_backward(k, dqkv, rope.cosine, rope.sine, start, B, T, H, KV, D);
        assert_is_gradient(dqkv, rope.qkv, QKV, rope_loss);
    }
    rope_loss();
    for (int row = 0; row < ROWS; row++) {
        size_t value = (size_t)(row * (H + 2 * KV) + H + KV) * D;
        assert_memory_equal(rope.rotated + value, rope.qkv + value, KV * D * sizeof(double));
    }
}

static struct { double qkv[QKV], out[OUT], lse[B * H * T], dout[OUT]; } att;

static double attention_loss(void) {
    k->attention_forward(k, att.out, att.lse, att.qkv, start, B, T, H, KV, D);
    return weighted(att.out, att.dout, OUT);
}

static void attention_gradients_reach_queries_keys_and_values(void **state) {
    (void)state;
    double dqkv[QKV];
    fill(att.qkv, QKV, 1);
    fill(att.dout, OUT, 2);
    for (int i = 0; i < QKV; i++) att.qkv[i] *= 2.0;
    for (int pass = 0; pass <= 1; pass++) {
        start = pass ? NULL : documents;
        for (int i = 0; i < QKV; i++) dqkv[i] = NAN; /* it must be overwritten in full */
        attention_loss();
        k->attention_backward(k, dqkv, att.dout, att.qkv, att.out, att.lse, start, B, T, H, KV, D);
        assert_is_gradient(dqkv, att.qkv, QKV, attention_loss);
    }
}

/* A model that sees the future has a wonderful loss and is worth nothing. */
static void attention_is_causal(void **state) {
    (void)state;
    double before[OUT];
    size_t row = (H + 2 * KV) * D;
    fill(att.qkv, QKV, 3);
    attention_loss();
    memcpy(before, att.out, sizeof before);
    fill(att.qkv + (T - 1) * row, row, 4); /* the last token of the first sequence */
    attention_loss();
    assert_memory_equal(before, att.out, (T - 1) * H * D * sizeof(double));
    assert_memory_not_equal(before + (T - 1) * H * D, att.out + (T - 1) * H * D,
                            H * D * sizeof(double));
}

static struct { double gate_up[ROWS * 2 * F], out[ROWS * F], dout[ROWS * F]; } glu;

static double swiglu_loss(void) {
    k->swiglu_forward(k, glu.out, glu.gate_up, ROWS, F);
    return weighted(glu.out, glu.dout, ROWS * F);
}

static void swiglu_gradients_are_right_also_in_place(void **state) {
    (void)state;
    double dgate_up[ROWS * 2 * F];
    fill(glu.gate_up, ROWS * 2 * F, 1);
    fill(glu.dout, ROWS * F, 2);
    for (int i = 0; i < ROWS * 2 * F; i++) glu.gate_up[i] *= 3.0;
    k->swiglu_backward(k, dgate_up, glu.dout, glu.gate_up, ROWS, F);
    assert_is_gradient(dgate_up, glu.gate_up, ROWS * 2 * F, swiglu_loss);
    k->swiglu_backward(k, glu.gate_up, glu.dout, glu.gate_up, ROWS, F);
    assert_memory_equal(glu.gate_up, dgate_up, sizeof dgate_up);
}

#define GRAD_SCALE 0.125
static struct {
    double logits[ROWS * V], scratch[ROWS * V], loss[ROWS], penalty[ROWS];
    int32_t targets[ROWS];
    struct kernels_loss how;
} ce;

static double cross_entropy_loss(void) {
    double sum = 0.0;
    memcpy(ce.scratch, ce.logits, sizeof ce.scratch);
    k->cross_entropy(k, ce.loss, ce.penalty, ce.scratch, ce.scratch, ce.targets, &ce.how, ROWS, V);
    for (int r = 0; r < ROWS; r++) sum += ce.loss[r] + ce.penalty[r];
    return sum * GRAD_SCALE;
}

static void cross_entropy_gradient_ignores_target_minus_one(void **state) {
    (void)state;
    double dlogits[ROWS * V];
    fill(ce.logits, ROWS * V, 1);
    for (int r = 0; r < ROWS; r++) ce.targets[r] = r % 4 == 3 ? -1 : r % V;
    for (int i = 0; i < 4; i++) { /* z-loss and max-z loss, each with and without the other */
        ce.how = (struct kernels_loss){ .grad_scale = GRAD_SCALE, .z = i & 1 ? 0.3 : 0, .max_z = i & 2 ? 0.2 : 0 };
        cross_entropy_loss();
        memcpy(dlogits, ce.scratch, sizeof dlogits);
        assert_is_gradient(dlogits, ce.logits, ROWS * V, cross_entropy_loss);
        assert_true(ce.loss[3] == 0.0 && ce.penalty[3] == 0.0 && dlogits[3 * V] == 0.0);
        assert_true((ce.penalty[0] > 0) == (i > 0));
    }
}

int main(void) {
    k = kernels_reference();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(matmul_gradients_are_right_and_can_be_added),
        cmocka_unit_test(embedding_gradient_sums_over_repeated_tokens),
        cmocka_unit_test(rmsnorm_gradients_are_added),
        cmocka_unit_test(rope_gradient_rotates_back_and_leaves_values_alone),
        cmocka_unit_test(attention_gradients_reach_queries_keys_and_values),
        cmocka_unit_test(attention_is_causal),
        cmocka_unit_test(swiglu_gradients_are_right_also_in_place),
        cmocka_unit_test(cross_entropy_gradient_ignores_target_minus_one),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
