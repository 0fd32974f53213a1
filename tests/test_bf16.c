/* Weights in bf16: the two planes and the one, products on rounded operands, AdamW, and an engine that trains
 * with them. Both ways to multiply are tested: oneDNN's, where this processor has it, and the fallback. The
 * CUDA kernels too, on the emulator of tests/cuda, or on a GPU. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/bf16.h"
#include "kernels/cpu.h"
#include "kernels/plugin.h"
#include "node/engine.h"
#include "node/model.h"
#include "proto/model.h"
#include "tests/cuda/staged.h"

/* native: 0 takes the fallback. NULL where it is asked for what this processor lacks. */
static struct kernels *create(int threads, int stochastic, int native) {
    struct err err;
    struct kernels *k = kernels_cpu_bf16_create(threads, stochastic, &err);
    if (!k) fail_msg("%s", err.msg);
    if (native && !cpu_of(k)->native_bf16) {
        print_message("skipped: this processor multiplies no bf16 (%s)\n", k->description);
        k->destroy(k);
        return NULL;
    }
    cpu_of(k)->native_bf16 = native;
    return k;
}

/* How weights are kept. */
enum kept { FP32, PLANES, STOCHASTIC };

static struct kernels *on_device(enum kept kept) {
    struct err err;
    size_t weight = kept == FP32 ? sizeof(float) : sizeof(uint16_t), rest = kept == PLANES ? sizeof(uint16_t) : 0;
    struct kernels *k = getenv("INTELLECT_TEST_GPU") ? kernels_cuda_create(0, weight, rest, &err)
                                                     : intellect_cuda_create(KERNELS_PLUGIN_ABI, 0, weight, rest, &err);
    if (!k) fail_msg("%s", err.msg);
    return k;
}

static struct kernels *cuda(enum kept kept) {
    return staged_create(on_device(kept));
}

static void finish(struct kernels *k) {
    struct err err;
    if (k->check(k, &err)) fail_msg("%s", err.msg);
    k->destroy(k);
}

static float *draw(size_t n, float std) {
    static uint64_t seed = 1;
    float *x = malloc(n * sizeof *x);
    outer_init_normal(x, seed++, 0, n, std);
    return x;
}

/* ---- one value --------------------------------------------------------------------------------- */

static const uint16_t lowers[] = { 0, 1, 0x7fff, 0x8000, 0x8001, 0xffff };

/* The master must come back whole: each upper half, and each kind of lower half around the rounding. */
static void two_planes_hold_every_bit(void **state) {
    (void)state;
    for (uint32_t upper = 0; upper <= 0xffff; upper++)
        for (size_t i = 0; i < 6; i++) {
            float x = bf16_value(upper << 16 | lowers[i]), back = bf16_join(bf16_upper(x), bf16_lower(x));
            assert_int_equal(bf16_bits(back), bf16_bits(x));
            float read = bf16_widen(bf16_upper(x));
            if (!isfinite(x) || !isfinite(read)) continue;
            double below = (double)bf16_value(upper << 16);
            double step = fabs((double)bf16_widen((uint16_t)(upper + 1)) - below);
            if (isfinite(step)) assert_true(fabs((double)read - (double)x) <= step / 2);
        }
}

static void nearest_rounds_ties_to_even_and_keeps_what_is_not_finite(void **state) {
    (void)state;
    assert_int_equal(bf16_nearest(bf16_value(0x3f808000)), 0x3f80);
    assert_int_equal(bf16_nearest(bf16_value(0x3f818000)), 0x3f82);
    assert_int_equal(bf16_nearest(bf16_value(0x3f808001)), 0x3f81);
    assert_int_equal(bf16_nearest(-INFINITY), 0xff80);
    assert_int_equal(bf16_nearest(bf16_value(0x7f7fffff)), 0x7f80); /* over the largest bf16 */
    assert_true(isnan(bf16_widen(bf16_nearest(bf16_value(0x7fffffff)))));
    assert_true(isnan(bf16_widen(bf16_nearest(bf16_value(0xff800001)))));
}

/* Five standard deviations of a share of N draws. */
static void assert_share(double found, double expected, double draws) {
    if (fabs(found - expected) > 5 * sqrt(0.25 / draws)) fail_msg("share %g, expected %g", found, expected);
}

static void stochastic_rounding_is_right_on_average(void **state) {
    (void)state;
    enum { N = 100000 };
    for (uint32_t lower = 0; lower <= 0xffff; lower += 0x1555)
        for (uint64_t seed = 1; seed <= 3; seed++) {
            float x = bf16_value(0xbe170000 | lower); /* negative: away from zero is up here too */
            size_t up = 0;
            for (uint64_t i = 0; i < N; i++) {
                uint16_t r = bf16_stochastic(x, bf16_random(seed, i + seed * N));
                assert_true(r == 0xbe17 || r == 0xbe18);
                up += r == 0xbe18;
            }
            assert_share((double)up / N, lower / 65536.0, N);
        }
    size_t same = 0; /* neither neighbours nor steps round alike */
    for (uint64_t i = 0; i < N; i++) same += (bf16_random(7, i) & 0x8000) == (bf16_random(8, i) & 0x8000);
    assert_share((double)same / N, 0.5, N);
    same = 0;
    for (uint64_t i = 0; i < N; i++) same += (bf16_random(7, i) & 1) == (bf16_random(7, i + 1) & 1);
    assert_share((double)same / N, 0.5, N);
    assert_int_not_equal(bf16_random(7, 5), bf16_random(7, 5 + (UINT64_C(1) << 32)));
    assert_int_equal(bf16_stochastic(INFINITY, 0xffff), 0x7f80);
    assert_true(isnan(bf16_widen(bf16_stochastic(NAN, 0xffff))));
}

/* ---- products ---------------------------------------------------------------------------------- */

static void whole_numbers(float *x, size_t n, unsigned seed) {
    for (size_t i = 0; i < n; i++) x[i] = (float)((int)((i * 2654435761u + seed * 40503u) >> 7) % 31 - 15);
}

/* Sums of whole numbers under 2^24 are exact in any order, so a slip of layout is a hard mismatch. */
static void assert_near(const char *what, const float *got, const float *want, size_t n, int exact) {
    float largest = outer_absmax(want, n);
    for (size_t i = 0; i < n; i++)
        if (!(fabsf(got[i] - want[i]) <= (exact ? 0 : 4e-6f * largest)))
            fail_msg("%s[%zu] is %.9g, should be %.9g", what, i, (double)got[i], (double)want[i]);
}

static uint16_t *rounded(const float *x, size_t n) {
    uint16_t *out = malloc(n * sizeof *out);
    for (size_t i = 0; i < n; i++) out[i] = bf16_nearest(x[i]);
    return out;
}

/* The same result but for what fp32 sums in another order give: at most the next bf16, or what is nothing beside
 * the largest. */
static void assert_near_act(const char *what, const uint16_t *got, const uint16_t *want, size_t n, float loose) {
    float largest = 0;
    for (size_t i = 0; i < n; i++) largest = fmaxf(largest, fabsf(bf16_widen(want[i])));
    for (size_t i = 0; i < n; i++) {
        float g = bf16_widen(got[i]), w = bf16_widen(want[i]);
        if (!(fabsf(g - w) <= fabsf(w) / 128 + loose * largest))
            fail_msg("%s[%zu] is %.9g, should be %.9g", what, i, (double)g, (double)w);
    }
}

static void assert_act(const char *what, const uint16_t *got, const uint16_t *want, size_t n, int exact) {
    for (size_t i = 0; exact && i < n; i++) /* 0 and -0 are equal */
        if (bf16_widen(got[i]) != bf16_widen(want[i]))
            fail_msg("%s[%zu] is %.9g, should be %.9g", what, i, (double)bf16_widen(got[i]),
                     (double)bf16_widen(want[i]));
    assert_near_act(what, got, want, n, 4e-6f);
}

static void compare_products(const struct kernels *k, int rows, int C, int OC, int exact) {
    const struct kernels *ref = kernels_reference_bf16();
    size_t nx = (size_t)rows * (size_t)C, nw = (size_t)OC * (size_t)C, no = (size_t)rows * (size_t)OC;
    float *draws[] = { draw(nx, 1), draw(nw, 1), draw(no, 1) }, *logits[] = { draw(no, 1), draw(no, 1) };
    if (exact) whole_numbers(draws[0], nx, 1), whole_numbers(draws[1], nw, 2), whole_numbers(draws[2], no, 3);
    uint16_t *x = rounded(draws[0], nx), *w = rounded(draws[1], nw), *dout = rounded(draws[2], no);
    uint16_t *out[] = { rounded(draws[2], no), rounded(draws[2], no) };
    uint16_t *dx[] = { rounded(draws[0], nx), rounded(draws[0], nx) };
    const struct kernels *backend[] = { k, ref };
    for (int i = 0; i < 2; i++) {
        backend[i]->matmul_forward(backend[i], out[i], x, w, rows, C, OC);
        backend[i]->matmul_logits(backend[i], logits[i], x, w, rows, C, OC);
        backend[i]->matmul_backward_input(backend[i], dx[i], dout, w, rows, C, OC);
    }
    assert_act("out", out[0], out[1], no, exact);
    assert_near("logits", logits[0], logits[1], no, exact);
    assert_act("dx", dx[0], dx[1], nx, exact);
    for (int add = 0; add <= 1; add++) {
        float *dw[2] = { draw(nw, 1), malloc(nw * sizeof(float)) };
        if (exact) whole_numbers(dw[0], nw, 5);
        memcpy(dw[1], dw[0], nw * sizeof(float));
        for (int i = 0; i < 2; i++)
            backend[i]->matmul_backward_weight(backend[i], dw[i], dout, x, rows, C, OC,
                                               add ? KERNELS_ADD : KERNELS_SET);
        assert_near("dw", dw[0], dw[1], nw, exact);
        free(dw[0]), free(dw[1]);
    }
    for (int i = 0; i < 2; i++) free(out[i]), free(dx[i]), free(logits[i]);
    for (int i = 0; i < 3; i++) free(draws[i]);
    free(x), free(w), free(dout);
}

static void products_are_the_references_on_rounded_operands(void **state) {
    (void)state;
    static const int shape[][3] = { { 1, 1, 1 }, { 3, 5, 7 }, { 64, 64, 64 }, { 65, 33, 129 }, { 1, 300, 17 },
                                    { 200, 2, 31 }, { 130, 100, 200 }, { 150, 77, 45 }, { 513, 30, 21 },
                                    { 1030, 34, 50 }, { 70, 1100, 90 } };
    struct kernels *backend[] = { cuda(PLANES),    create(1, 0, 0), create(3, 0, 0),
                                  create(1, 0, 1), create(3, 0, 1), create(2, 0, 1) };
    if (backend[5]) cpu_of(backend[5])->plain = 1; /* by oneDNN */
    for (size_t b = 0; b < sizeof backend / sizeof *backend; b++) {
        if (!backend[b]) continue;
        for (size_t i = 0; i < sizeof shape / sizeof *shape; i++)
            for (int exact = 0; exact <= 1; exact++)
                compare_products(backend[b], shape[i][0], shape[i][1], shape[i][2], exact);
        finish(backend[b]);
    }
}

/* Our own: columns and k in several parts, none of them whole tiles. */
static void large_products_are_the_references_on_rounded_operands(void **state) {
    (void)state;
    struct kernels *k = create(3, 0, 1);
    if (!k) return;
    for (int exact = 0; exact <= 1; exact++) {
        compare_products(k, 70, 1042, 3230, exact);
        compare_products(k, 3110, 1030, 66, exact);
    }
    finish(k);
}

/* What ranks or micro-batches share out differently must not differ by it: where the products are our own. */
static void products_have_the_same_bits_for_every_thread_count_and_number_of_rows(void **state) {
    (void)state;
    enum { ROWS = 1100, FEW = 200, C = 1030, OC = 1040 };
    struct cpu_product_key few = { .m = FEW, .n = OC, .k = C, .transposed_b = 1, .bf16 = 1, .bf16_out = 1 };
    struct kernels *one = create(1, 0, 1), *three = create(3, 0, 1);
    if (!one) return;
    float *draws[] = { draw(ROWS * C, 1), draw(OC * C, 1) }, *dw[] = { draw(OC * C, 1), draw(OC * C, 1) };
    uint16_t *x = rounded(draws[0], ROWS * C), *w = rounded(draws[1], OC * C);
    uint16_t *out[] = { calloc(ROWS * OC, 2), calloc(FEW * OC, 2) };
    one->matmul_forward(one, out[0], x, w, ROWS, C, OC);
    one->matmul_backward_weight(one, dw[0], out[0], x, ROWS, C, OC, KERNELS_SET);
    three->matmul_forward(three, out[1], x, w, FEW, C, OC);
    three->matmul_backward_weight(three, dw[1], out[0], x, ROWS, C, OC, KERNELS_SET);
    if (cpu_is_own(cpu_of(one), few)) {
        assert_memory_equal(out[0], out[1], FEW * OC * sizeof **out);
        assert_memory_equal(dw[0], dw[1], OC * C * sizeof **dw);
    } else {
        print_message("skipped: oneDNN makes the products of this processor\n");
    }
    for (int i = 0; i < 2; i++) free(draws[i]), free(dw[i]), free(out[i]);
    free(x), free(w);
    finish(one), finish(three);
}

/* More shapes than the backend remembers, twice: what was forgotten is prepared again. */
static void many_shapes_do_not_mix(void **state) {
    (void)state;
    struct kernels *k = create(1, 1, 1);
    if (!k) return;
    cpu_of(k)->plain = 1; /* by oneDNN */
    for (int again = 0; again <= 1; again++)
        for (int rows = 1; rows <= CPU_PRODUCTS_MAX / 2; rows++) compare_products(k, rows, 9, 5, 1);
    finish(k);
}

/* ---- attention ---------------------------------------------------------------------------------- */

/* Documents of 1, 2, 3, ... tokens. */
static void draw_starts(int32_t *start, int B, int T) {
    for (int b = 0; b < B; b++)
        for (int t = 0, first = 0, length = 1 + b; t < T; t++) {
            if (t - first == length) first = t, length += 1 + length / 3;
            start[b * T + t] = first;
        }
}

struct attention {
    int B, T, H, KV, D;
    size_t n, rows;                       /* of qkv; of out */
    uint16_t *qkv, *dout, *out[2], *dqkv[2];
    float *lse[2];
};

static void attention_take(struct attention *a, const int shape[5]) {
    *a = (struct attention){ .B = shape[0], .T = shape[1], .H = shape[2], .KV = shape[3], .D = shape[4] };
    a->n = (size_t)(a->B * a->T) * (size_t)((a->H + 2 * a->KV) * a->D);
    a->rows = (size_t)(a->B * a->T) * (size_t)(a->H * a->D);
    float *qkv = draw(a->n, 1), *dout = draw(a->rows, 1);
    a->qkv = rounded(qkv, a->n), a->dout = rounded(dout, a->rows);
    for (int i = 0; i < 2; i++) {
        a->out[i] = malloc(a->rows * sizeof(uint16_t)), a->dqkv[i] = malloc(a->n * sizeof(uint16_t));
        memset(a->out[i], 0xff, a->rows * sizeof(uint16_t)); /* NaN: all of it must be written */
        memset(a->dqkv[i], 0xff, a->n * sizeof(uint16_t));
        a->lse[i] = malloc((size_t)(a->B * a->H * a->T) * sizeof(float));
    }
    free(qkv), free(dout);
}

static void attention_drop(struct attention *a) {
    free(a->qkv), free(a->dout);
    for (int i = 0; i < 2; i++) free(a->out[i]), free(a->dqkv[i]), free(a->lse[i]);
}

/* Both backward passes from the reference's outputs. */
static void attention_run(struct attention *a, const struct kernels *k, const int32_t *start) {
    const struct kernels *backend[] = { k, kernels_reference_bf16() };
    for (int i = 1; i >= 0; i--) {
        const struct kernels *b = backend[i];
        b->attention_forward(b, a->out[i], a->lse[i], a->qkv, start, a->B, a->T, a->H, a->KV, a->D);
        b->attention_backward(b, a->dqkv[i], a->dout, a->qkv, a->out[1], a->lse[1], start, a->B, a->T, a->H, a->KV,
                              a->D);
    }
}

/* The largest score grows from block to block, by little and by much: what was summed up before is scaled. */
static void grow_keys(struct attention *a) {
    size_t row = (size_t)(a->H + 2 * a->KV) * (size_t)a->D;
    for (size_t t = 0; t < (size_t)(a->B * a->T); t++) {
        float by = 1 + (float)(t % (size_t)a->T) / 20;
        uint16_t *keys = a->qkv + t * row + a->H * a->D;
        for (int i = 0; i < a->KV * a->D; i++) keys[i] = bf16_nearest(by * bf16_widen(keys[i]));
    }
}

enum { WHOLE, DOCUMENTS, GROWING };

/* Probabilities and their gradients are rounded on the way, each by 2^-9 at most: relative to the largest element,
 * for they cancel. A wrong term is off by ten times as much. */
static void compare_attention(struct kernels *k) {
    static const int shape[][5] = { { 1, 1, 1, 1, 2 },   { 2, 63, 4, 2, 6 },   { 1, 64, 2, 2, 16 },
                                    { 3, 65, 3, 1, 10 }, { 1, 130, 4, 2, 32 }, { 2, 5, 6, 3, 4 },
                                    { 2, 150, 4, 2, 64 }, { 1, 200, 2, 1, 128 } };
    if (!k) return;
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++)
        for (int kind = WHOLE; kind <= GROWING; kind++) {
            struct attention a;
            attention_take(&a, shape[i]);
            int32_t start[500];
            draw_starts(start, a.B, a.T);
            if (kind == GROWING) grow_keys(&a);
            attention_run(&a, k, kind == DOCUMENTS ? start : NULL);
            assert_near_act("out", a.out[0], a.out[1], a.rows, 4e-3f);
            assert_near("lse", a.lse[0], a.lse[1], (size_t)(a.B * a.H * a.T), 0);
            assert_near_act("dqkv", a.dqkv[0], a.dqkv[1], a.n, 8e-3f);
            attention_drop(&a);
        }
    finish(k);
}

static void attention_is_the_references_but_for_rounding(void **state) {
    (void)state;
    compare_attention(cuda(PLANES));
    for (int native = 0; native <= 1; native++)
        for (int threads = 1; threads <= 3; threads += 2) compare_attention(create(threads, 0, native));
}

static void assert_near_whole(const char *what, const uint16_t *got, const uint16_t *want, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float g = bf16_widen(got[i]), w = bf16_widen(want[i]);
        if (!(fabsf(g - w) <= fabsf(w) / 128 + 1e-3f))
            fail_msg("%s[%zu] is %.9g, should be %.9g", what, i, (double)g, (double)w);
    }
}

/* Each query finds two equal keys, with a score so far above all others that these count nothing: probabilities are
 * a half, all products are of small whole numbers, and nothing is rounded but the log-sum-exp, and each sum in the
 * end. So a slip of layout is a mismatch by at least the smallest number there is, 1/32. */
static void attention_of_whole_numbers_rounds_nothing_on_the_way(void **state) {
    (void)state;
    static const int shape[][5] = { { 2, 80, 2, 1, 64 }, { 1, 200, 4, 2, 16 }, { 1, 131, 2, 2, 64 } };
    for (int native = 0; native <= 1; native++)
        for (size_t s = 0; s < sizeof shape / sizeof *shape; s++) {
            struct kernels *k = create(2, 0, native);
            if (!k) return;
            struct attention a;
            attention_take(&a, shape[s]);
            int row = (a.H + 2 * a.KV) * a.D, pairs = a.D == 16 ? 8 : 32;
            for (int t = 0; t < a.B * a.T; t++)
                for (int i = 0; i < row; i++) {
                    int head = i / a.D, d = i % a.D, at = t % a.T, value;
                    /* Key t has a one at d = t / 2 (mod pairs), and none where that was before: of its kind only the
                     * first two are found. Queries point at one that is behind them. */
                    int kind = at / 2, query = (at * 7 + head) % (kind < pairs ? kind + 1 : pairs);
                    if (head < a.H) value = at < 2 || d != query ? 0 : 1024;
                    else if (head < a.H + a.KV) value = kind < pairs && d == kind;
                    else value = (at * 5 + d * 3 + head) % 7 - 3;
                    a.qkv[t * row + i] = bf16_nearest((float)value);
                }
            for (size_t i = 0; i < a.rows; i++) a.dout[i] = bf16_nearest((float)((int)(i * 2654435761u >> 9) % 3 - 1));
            /* The first two tokens see too few keys: alone. */
            int32_t start[400];
            for (int t = 0; t < a.B * a.T; t++) start[t] = 0;
            attention_run(&a, k, start);
            assert_near_whole("out", a.out[0], a.out[1], a.rows);
            assert_near_whole("dqkv", a.dqkv[0], a.dqkv[1], a.n);
            attention_drop(&a);
            finish(k);
        }
}

/* ---- row by row ---------------------------------------------------------------------------------- */

static void compare_by_row(struct kernels *k) {
    enum { ROWS = 19, C = 70, V = 13, N = ROWS * C };
    const struct kernels *backend[] = { k, kernels_reference_bf16() };
    float *x = draw(N, 2), *other = draw(N, 1), *wide = draw(2 * N, 2), *table = draw(V * C, 1), cosine[ROWS * 5],
          sine[ROWS * 5];
    uint16_t *dout = rounded(other, N), *w = rounded(table, V * C), *gate_up = rounded(wide, 2 * N);
    float rstd[2][ROWS], dx[2][N], dw[2][C] = { { 0 } }, sum[2][N], embedded[2][N];
    uint16_t norm[2][N], glu[2][N], dglu[2][2 * N], turned[2][N], round[2][N];
    int32_t tokens[ROWS];
    for (int r = 0; r < ROWS; r++) tokens[r] = (r * 5 + 12) % V;
    kernels_rope_tables(cosine, sine, ROWS, 10, &(struct kernels_rope){ .theta = 100 });
    for (int i = 0; i < 2; i++) {
        const struct kernels *b = backend[i];
        memcpy(dx[i], other, sizeof dx[i]);
        memcpy(turned[i], dout, sizeof turned[i]);
        b->embedding_forward(b, embedded[i], tokens, w, ROWS, C, V);
        b->rmsnorm_forward(b, norm[i], rstd[i], x, table, 1e-5f, ROWS, C);
        b->rmsnorm_backward(b, dx[i], dw[i], dout, x, table, rstd[i], ROWS, C);
        b->swiglu_forward(b, glu[i], gate_up, ROWS, C);
        b->swiglu_backward(b, dglu[i], dout, gate_up, ROWS, C);
        b->rope_forward(b, turned[i], cosine, sine, NULL, 1, ROWS, 3, 2, 10);
        b->rope_backward(b, turned[i], cosine, sine, NULL, 1, ROWS, 1, 3, 10);
        b->add(b, sum[i], x, dout, N);
        b->round(b, round[i], x, N);
    }
    assert_memory_equal(embedded[0], embedded[1], sizeof embedded[0]);
    assert_memory_equal(sum[0], sum[1], sizeof sum[0]);
    assert_memory_equal(round[0], round[1], sizeof round[0]);
    assert_act("norm", norm[0], norm[1], N, 0);
    assert_near("dx", dx[0], dx[1], N, 0);
    assert_near("dw", dw[0], dw[1], C, 0);
    assert_act("swiglu", glu[0], glu[1], N, 0);
    assert_act("dgate_up", dglu[0], dglu[1], 2 * N, 0);
    assert_near_act("rotated", turned[0], turned[1], N, 8e-3f); /* twice, so off by two */
    k->swiglu_backward(k, gate_up, dout, gate_up, ROWS, C);
    assert_memory_equal(gate_up, dglu[0], sizeof dglu[0]);
    free(x), free(other), free(wide), free(table), free(dout), free(w), free(gate_up);
    finish(k);
}

static void kernels_by_row_are_the_references(void **state) {
    (void)state;
    for (int plain = 0; plain <= 1; plain++) { /* with AVX-512, where the processor has it, and without */
        struct kernels *k = create(2, 0, 0);
        cpu_of(k)->plain = plain;
        compare_by_row(k);
    }
    compare_by_row(cuda(PLANES));
}

static void compare_cross_entropy(struct kernels *k) {
    enum { ROWS = 9, V = 700, N = ROWS * V };
    const struct kernels *backend[] = { k, kernels_reference_bf16() };
    struct kernels_loss how = { .grad_scale = 0.25f, .z = 1e-2f, .max_z = 1e-2f };
    float *x = draw(N, 3), loss[2][ROWS], penalty[2][ROWS], logits[N];
    uint16_t dlogits[2][N];
    int32_t targets[ROWS];
    for (int r = 0; r < ROWS; r++) targets[r] = r == 4 ? -1 : r * 77;
    x[3 * V + 231] = 20; /* the largest is the target */
    for (int i = 0; i < 2; i++) {
        memcpy(logits, x, sizeof logits);
        backend[i]->cross_entropy(backend[i], loss[i], penalty[i], dlogits[i], logits, targets, &how, ROWS, V);
    }
    assert_near("loss", loss[0], loss[1], ROWS, 0);
    assert_near("penalty", penalty[0], penalty[1], ROWS, 0);
    assert_act("dlogits", dlogits[0], dlogits[1], N, 0);
    free(x);
    finish(k);
}

static void cross_entropy_rounds_its_gradient_alone(void **state) {
    (void)state;
    compare_cross_entropy(create(2, 0, 0));
    compare_cross_entropy(cuda(PLANES));
}

static struct kernels_adamw settings_of(uint64_t step) {
    return (struct kernels_adamw){ .lr = 1e-3f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f,
                                   .m_correction = (float)(1 - pow(0.9, (double)step)),
                                   .v_correction = (float)(1 - pow(0.95, (double)step)), .grad_scale = 0.5f,
                                   .seed = step };
}

/* The master is what fp32 weights would be, bit for bit: nothing of an update is lost. */
static void compare_steps(struct kernels *k, struct kernels *plain, size_t N) {
    float *w = draw(N, 0.02f), *m[2], *v[2], *back = malloc(N * sizeof *back);
    uint16_t *upper = malloc(N * sizeof *upper), *rest = malloc(N * sizeof *rest);
    for (int i = 0; i < 2; i++) m[i] = calloc(N, sizeof(float)), v[i] = calloc(N, sizeof(float));
    k->weights_in(k, upper, rest, w, N);
    for (uint64_t step = 1; step <= 3; step++) {
        float *grad = draw(N, 1);
        struct kernels_adamw a = settings_of(step);
        k->adamw(k, upper, rest, grad, m[0], v[0], N, &a);
        plain->adamw(plain, w, NULL, grad, m[1], v[1], N, &a);
        const struct kernels_descent d = { .step = 1e-3f, .keep = 0.99f };
        k->descend(k, upper, rest, grad, N, &d);
        plain->descend(plain, w, NULL, grad, N, &d);
        free(grad);
    }
    k->weights_out(k, back, upper, rest, N);
    assert_memory_equal(back, w, N * sizeof *w);
    k->weights_widen(k, back, upper, rest, N);
    assert_memory_equal(back, w, N * sizeof *w);
    k->weights_widen(k, back, upper, NULL, N);
    for (size_t i = 0; i < N; i++) assert_true(back[i] == bf16_widen(upper[i]));
    assert_memory_equal(v[0], v[1], N * sizeof(float));
    for (int i = 0; i < 2; i++) free(m[i]), free(v[i]);
    free(w), free(back), free(upper), free(rest);
    finish(k);
    finish(plain);
}

static void a_step_with_the_rest_is_the_step_in_fp32(void **state) {
    (void)state;
    compare_steps(create(3, 0, 0), kernels_cpu_create(3, NULL), 500003);
    compare_steps(cuda(PLANES), cuda(FP32), 5003);
}

/* Without the rest each weight takes the random bits of its own place in the model, wherever threads or
 * tensors are cut; and updates of a thousandth of a bf16's last digit add up nevertheless. */
static void compare_cuts(struct kernels *one, struct kernels *three, size_t N) {
    enum { STEPS = 100 };
    uint16_t *whole = malloc(N * sizeof *whole), *cut = malloc(N * sizeof *cut);
    float *grad = malloc(N * sizeof *grad), *m = calloc(N, sizeof *m), *v = calloc(N, sizeof *v);
    for (size_t i = 0; i < N; i++) whole[i] = cut[i] = bf16_nearest(1), grad[i] = 1;
    for (uint64_t step = 1; step <= STEPS; step++) {
        struct kernels_adamw a = settings_of(step);
        a.weight_decay = 0;
        a.beta1 = a.beta2 = 0;
        a.m_correction = a.v_correction = 1;
        a.lr = 4e-6f; /* a bf16 below 1 has steps of 4e-3 */
        three->adamw(three, whole, NULL, grad, m, v, N, &a);
        one->adamw(one, cut, NULL, grad, m, v, 1001, &a);
        a.first = 1001;
        one->adamw(one, cut + 1001, NULL, grad + 1001, m + 1001, v + 1001, N - 1001, &a);
        struct kernels_descent d = { .step = 4e-6f, .keep = 1, .seed = STEPS + step };
        three->descend(three, whole, NULL, grad, N, &d);
        one->descend(one, cut, NULL, grad, 1001, &d);
        d.first = 1001;
        one->descend(one, cut + 1001, NULL, grad + 1001, N - 1001, &d);
    }
    assert_memory_equal(whole, cut, N * sizeof *cut);
    double mean = 0;
    for (size_t i = 0; i < N; i++) mean += (double)bf16_widen(whole[i]) / N;
    assert_true(fabs(mean - (1 - 2 * STEPS * 4e-6)) < 3e-5 * sqrt(400001.0 / (double)N));
    free(whole), free(cut), free(grad), free(m), free(v);
    finish(one);
    finish(three);
}

static void without_the_rest_small_updates_add_up_and_cuts_change_nothing(void **state) {
    (void)state;
    compare_cuts(create(1, 1, 0), create(3, 1, 0), 400001);
    compare_cuts(cuda(STOCHASTIC), create(1, 1, 0), 5001); /* and a device takes the same random bits */
}

/* ---- an engine ----------------------------------------------------------------------------------- */

enum { SEQUENCE = 16, BATCH = 8, STEPS = 60 };

static struct engine *engine_with(const struct kernels *k) {
    struct msg_model m = { .layers = 2, .width = 32, .heads = 4, .kv_heads = 2, .ffn = 48, .vocabulary = 20,
                           .sequence = SEQUENCE, .rope_theta = 1e4, .norm_eps = 1e-5, .tied = 1 };
    struct msg_inner in = { .batch = BATCH, .lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
                            .weight_decay = 0.1, .clip = 1, .total_tokens = 100000 };
    struct err err;
    struct engine *e = engine_create(&m, &in, k, &err);
    if (!e) fail_msg("%s", err.msg);
    size_t n = engine_elements(e);
    float *init = malloc(n * sizeof *init), *back = malloc(n * sizeof *back);
    model_init_elements(&m, 0.05f, 1, 0, n, init);
    engine_params_write(e, 0, n, init);
    engine_params_read(e, 0, n, back);
    if (k->weight_bytes + k->rest_bytes == 4) assert_memory_equal(init, back, n * sizeof *back);
    free(init), free(back);
    return e;
}

static double train(struct engine *e, uint32_t from, uint32_t to) {
    int32_t tokens[BATCH * (SEQUENCE + 1)];
    struct engine_result r = { 0 };
    struct err err;
    for (uint32_t s = from; s < to; s++) {
        for (int b = 0; b < BATCH; b++) {
            int32_t a = (int32_t)(s * 7 + (uint32_t)b * 5) % 20;
            for (int t = 0; t <= SEQUENCE; t++) {
                tokens[b * (SEQUENCE + 1) + t] = a;
                a = (s + (uint32_t)(b + t)) % 11 == 0 ? (a + 9) % 20 : (3 * a + 1) % 20;
            }
        }
        if (engine_step(e, tokens, BATCH, 1000, &r, &err)) fail_msg("%s", err.msg);
    }
    return r.loss;
}

static double loss_of(struct engine *e) {
    int32_t tokens[SEQUENCE + 1];
    double loss;
    struct err err;
    for (int t = 0; t <= SEQUENCE; t++) tokens[t] = t * 3 % 20;
    if (engine_eval_loss(e, tokens, 1, &loss, &err)) fail_msg("%s", err.msg);
    return loss;
}

/* Set all weights of norms. Returns how many were no bf16 before. */
static int set_norms(struct engine *e, float to) {
    const struct msg_model *m = engine_model(e);
    int finer = 0;
    for (uint32_t i = 0; i < proto_model_tensor_count(m); i++) {
        struct proto_tensor t;
        float w[64];
        proto_model_tensor(m, i, &t);
        if (t.dims != 1) continue;
        engine_params_read(e, (size_t)t.offset, (size_t)t.count, w);
        for (uint64_t c = 0; c < t.count; c++) {
            finer += w[c] != bf16_widen(bf16_nearest(w[c]));
            w[c] = to;
        }
        engine_params_write(e, (size_t)t.offset, (size_t)t.count, w);
    }
    return finer;
}

/* Norms' weights stand near 1, where a bf16 moves in steps of 2^-7: an update is a small part of one. It is
 * kept, and the network sees it. */
static void norms_are_fp32_in_every_precision(void **state) {
    (void)state;
    struct kernels *all[] = { create(2, 0, 0), create(2, 1, 0), on_device(PLANES), on_device(STOCHASTIC) };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        struct engine *e = engine_with(all[i]);
        train(e, 0, 2);
        assert_in_range(set_norms(e, 1), 150, 160); /* of 5 norms of 32 */
        double before = loss_of(e);
        set_norms(e, 1 + ldexpf(1, -9));
        assert_true(loss_of(e) != before);
        engine_destroy(e);
        finish(all[i]);
    }
}

/* As in fp32 to a few percent, and a run that was saved and loaded in the middle has the bits of one that was
 * not: with one plane the random bits follow the count of steps, which is saved. */
static void training_learns_and_goes_on_from_a_saved_state(void **state) {
    (void)state;
    char path[] = "/tmp/test_bf16.XXXXXX";
    struct err err;
    uint64_t tag;
    assert_true(close(mkstemp(path)) == 0);
    struct kernels *plain = kernels_cpu_create(2, NULL);
    struct engine *fp32 = engine_with(plain);
    double expected = train(fp32, 0, STEPS);
    for (int stochastic = 0; stochastic <= 1; stochastic++)
        for (int native = 0; native <= 1; native++) {
            struct kernels *k = create(2, stochastic, native);
            if (!k) break;
            struct engine *whole = engine_with(k), *cut = engine_with(k), *later = engine_with(k);
            double loss = train(whole, 0, STEPS);
            if (fabs(loss - expected) > 0.05 * expected) fail_msg("loss %g, in fp32 %g", loss, expected);
            train(cut, 0, STEPS / 2);
            assert_int_equal(engine_save(cut, path, 0, &err), 0);
            assert_int_equal(engine_load(later, path, &tag, &err), 0);
            assert_true(train(later, STEPS / 2, STEPS) == loss);
            size_t n = engine_elements(whole);
            float *a = malloc(n * sizeof *a), *b = malloc(n * sizeof *b);
            engine_params_read(whole, 0, n, a);
            engine_params_read(later, 0, n, b);
            assert_memory_equal(a, b, n * sizeof *a);
            free(a), free(b);
            engine_destroy(whole), engine_destroy(cut), engine_destroy(later);
            finish(k);
        }
    engine_destroy(fp32);
    finish(plain);
    unlink(path);
}

/* Everything together: what the CPU makes of the same steps, within rounding. */
static void an_engine_on_cuda_trains_like_one_on_the_cpu(void **state) {
    (void)state;
    for (int kept = FP32; kept <= PLANES; kept++) {
        struct kernels *k = on_device((enum kept)kept), *plain = kernels_cpu_create(1, NULL);
        struct engine *device = engine_with(k), *cpu = engine_with(plain);
        double got = train(device, 0, 4), want = train(cpu, 0, 4), again;
        if (!(fabs(got - want) <= (kept == FP32 ? 1e-5 : 1e-2) * want)) fail_msg("loss %.9g, on the CPU %.9g", got, want);
        struct engine *second = engine_with(k);
        again = train(second, 0, 4);
        assert_memory_equal(&again, &got, sizeof got);
        engine_destroy(device), engine_destroy(second), engine_destroy(cpu);
        finish(k), finish(plain);
    }
}

/* On a machine without a GPU the plugin says so; of another interface it is refused. */
static void the_plugin_loads_and_says_what_is_missing(void **state) {
    (void)state;
    struct err err = { 0 };
    if (access("build/libintellect-cuda.so", R_OK)) {
        print_message("skipped: the CUDA plugin is not built\n");
        return;
    }
    setenv("INTELLECT_CUDA_PLUGIN", "build/libintellect-cuda.so", 0);
    struct kernels *k = kernels_cuda_create(0, sizeof(float), 0, &err);
    if (k) finish(k);
    else if (err.code != ERR_NOT_FOUND || !strstr(err.msg, "there is no CUDA device")) fail_msg("%s", err.msg);
    setenv("INTELLECT_CUDA_PLUGIN", "/nowhere/plugin.so", 1);
    assert_null(kernels_cuda_create(0, sizeof(float), 0, &err));
    assert_int_equal(err.code, ERR_UNSUPPORTED);
    assert_non_null(strstr(err.msg, "/nowhere/plugin.so"));
    unsetenv("INTELLECT_CUDA_PLUGIN");
    assert_null(intellect_cuda_create(KERNELS_PLUGIN_ABI + 1, 0, sizeof(float), 0, &err));
    assert_non_null(strstr(err.msg, "one release"));
    assert_null(intellect_cuda_create(KERNELS_PLUGIN_ABI, 99, sizeof(float), 0, &err));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(two_planes_hold_every_bit),
        cmocka_unit_test(nearest_rounds_ties_to_even_and_keeps_what_is_not_finite),
        cmocka_unit_test(stochastic_rounding_is_right_on_average),
        cmocka_unit_test(products_are_the_references_on_rounded_operands),
        cmocka_unit_test(large_products_are_the_references_on_rounded_operands),
        cmocka_unit_test(products_have_the_same_bits_for_every_thread_count_and_number_of_rows),
        cmocka_unit_test(many_shapes_do_not_mix),
        cmocka_unit_test(attention_is_the_references_but_for_rounding),
        cmocka_unit_test(attention_of_whole_numbers_rounds_nothing_on_the_way),
        cmocka_unit_test(kernels_by_row_are_the_references),
        cmocka_unit_test(cross_entropy_rounds_its_gradient_alone),
        cmocka_unit_test(a_step_with_the_rest_is_the_step_in_fp32),
        cmocka_unit_test(without_the_rest_small_updates_add_up_and_cuts_change_nothing),
        cmocka_unit_test(an_engine_on_cuda_trains_like_one_on_the_cpu),
        cmocka_unit_test(the_plugin_loads_and_says_what_is_missing),
        cmocka_unit_test(norms_are_fp32_in_every_precision),
        cmocka_unit_test(training_learns_and_goes_on_from_a_saved_state),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
