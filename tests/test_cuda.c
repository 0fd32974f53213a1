/* test_cuda.c - kernels that read 16 bytes at once do so only where all their tensors are aligned for it, and
 * have the same bits where not; attention on tensor cores. On a GPU where `make gpu` runs this, else on the
 * emulator, which ends at a misaligned access. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/bf16.h"
#include "kernels/cuda/mma_layout.h"
#include "kernels/plugin.h"
#include "tests/cuda/memory.h"

static struct kernels *k;

static void open_with(size_t weight_bytes, size_t rest_bytes) {
    struct err err;
    setenv("EMULATOR_LATE", "1", 1); /* nothing is done before it is waited for */
    k = getenv("INTELLECT_TEST_GPU")
            ? kernels_cuda_create(0, weight_bytes, rest_bytes, &err)
            : intellect_cuda_create(KERNELS_PLUGIN_ABI, 0, weight_bytes, rest_bytes, &err);
    if (!k) fail_msg("%s", err.msg);
}

static void finish(void) {
    struct err err;
    if (k->check(k, &err)) fail_msg("%s", err.msg);
    k->destroy(k);
}

/* ---- operands ------------------------------------------------------------------------------------------ */

/* Those of one call, each in memory of its own; that of number `off`, or all where it is ALL, begin an
 * element after an aligned address. */
enum { OPERANDS = 8, ALL = -1, NONE = -2, BYTES_MAX = 1 << 20 };
static struct {
    int count, off;
    struct {
        char *memory;
        void *at;
        size_t bytes;
    } of[OPERANDS];
    float sum; /* what the call returned */
} call;

static void *operand(const void *from, size_t bytes, size_t element) {
    struct err err;
    int i = call.count++, shift = call.off == ALL || call.off == i;
    assert_true(i < OPERANDS);
    char *p = k->alloc(k, bytes + 64, &err);
    if (!p) fail_msg("%s", err.msg);
    call.of[i].memory = p;
    call.of[i].at = p + (shift ? element : 0);
    call.of[i].bytes = bytes;
    k->copy_in(k, call.of[i].at, from, bytes);
    return call.of[i].at;
}

/* The same for each call of a kernel: a function of the operand's number. */
static float *floats(size_t n) {
    float *x = malloc(n * sizeof *x);
    outer_init_normal(x, (uint64_t)call.count + 1, 0, n, 1);
    void *p = operand(x, n * sizeof *x, sizeof *x);
    free(x);
    return p;
}

static uint16_t *halves(size_t n) {
    float *x = malloc(n * sizeof *x);
    uint16_t *narrow = malloc(n * sizeof *narrow);
    outer_init_normal(x, (uint64_t)call.count + 1, 0, n, 1);
    for (size_t i = 0; i < n; i++) narrow[i] = bf16_nearest(x[i]);
    void *p = operand(narrow, n * sizeof *narrow, sizeof *narrow);
    free(x), free(narrow);
    return p;
}

static void *acts(size_t n) { return k->act_bytes == sizeof(float) ? (void *)floats(n) : halves(n); }
static void *weights(size_t n) { return k->weight_bytes == sizeof(float) ? (void *)floats(n) : halves(n); }
static uint16_t *rests(size_t n) { return k->rest_bytes ? halves(n) : NULL; }

static int32_t *ints(size_t n, int below) {
    int32_t *x = malloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = (int32_t)(i * 7 % (size_t)below);
    void *p = operand(x, n * sizeof *x, sizeof *x);
    free(x);
    return p;
}

/* ---- calls: each of `rows` rows of C, or of their product ---------------------------------------------- */

static void embedding(int rows, int C) {
    float *out = floats((size_t)(rows * C));
    int32_t *tokens = ints((size_t)rows, 5);
    k->embedding_forward(k, out, tokens, weights((size_t)(5 * C)), rows, C, 5);
    k->embedding_backward(k, floats((size_t)(5 * C)), out, tokens, rows, C, 5);
}

static void norm(int rows, int C) {
    size_t n = (size_t)(rows * C);
    void *out = acts(n);
    float *rstd = floats((size_t)rows), *x = floats(n), *w = floats((size_t)C), *dx = floats(n);
    k->rmsnorm_forward(k, out, rstd, x, w, 1e-5f, rows, C);
    k->rmsnorm_backward(k, dx, floats((size_t)C), out, x, w, rstd, rows, C);
}

static void rope(int rows, int C) {
    int D = 2 * C;
    float *cosine = floats((size_t)(rows * C)), *sine = floats((size_t)(rows * C));
    k->rope_forward(k, acts((size_t)(rows * 4 * D)), cosine, sine, NULL, 1, rows, 2, 1, D);
}

static void swiglu(int rows, int C) {
    size_t n = (size_t)(rows * C);
    void *out = acts(n), *gate_up = acts(2 * n);
    k->swiglu_forward(k, out, gate_up, rows, C);
    k->swiglu_backward(k, acts(2 * n), out, gate_up, rows, C);
}

static void loss(int rows, int C) {
    size_t n = (size_t)(rows * C);
    struct kernels_loss how = { 0.5f, 1e-3f, 1e-3f };
    float *logits = floats(n), *each = floats((size_t)rows), *penalty = floats((size_t)rows);
    k->cross_entropy(k, each, penalty, acts(n), logits, ints((size_t)rows, C), &how, rows, C);
}

static void residual_stream(int rows, int C) {
    size_t n = (size_t)(rows * C);
    float *out = floats(n), *a = floats(n);
    void *b = acts(n);
    k->add(k, out, a, b, n);
    k->accumulate(k, a, out, n);
    k->round(k, b, a, n);
    if (C == 131) call.sum = (float)k->sum_squares(k, a, n); /* the emulator takes its time */
}

static void optimizer(int rows, int C) {
    size_t n = (size_t)(rows * C);
    void *w = weights(n);
    uint16_t *rest = rests(n);
    float *grad = floats(n), *m = floats(n), *v = floats(n);
    const struct kernels_adamw step = { .lr = 0.01f,
                                        .beta1 = 0.9f,
                                        .beta2 = 0.95f,
                                        .eps = 1e-8f,
                                        .m_correction = 0.1f,
                                        .v_correction = 0.05f,
                                        .grad_scale = 0.5f,
                                        .seed = 3,
                                        .first = 5 };
    const struct kernels_descent d = { .step = 0.3f, .keep = 0.9f, .seed = 4, .first = 6 };
    k->combine(k, v, 1, v, 2, grad, n);
    k->adamw(k, w, rest, grad, m, v, n, &step);
    k->descend(k, w, rest, m, n, &d);
    k->weights_widen(k, grad, w, rest, n);
}

/* Blocks are aligned to 4 by what they are. */
static void states(int rows, int C) {
    size_t n = (size_t)(rows * C);
    float *x = floats(n);
    for (enum kernels_state how = KERNELS_STATE_BF16; how <= KERNELS_STATE_SIGNED8; how++) {
        void *state = how == KERNELS_STATE_BF16 ? (void *)halves(n) : floats(n + 1);
        k->state_in(k, state, how, x, n, 5, 6);
        k->state_out(k, floats(n), state, how, n);
    }
}

static void outer_step(int rows, int C) {
    size_t n = (size_t)(rows * C);
    float *anchor = floats(n), *momentum = floats(n), *mean = floats(n), *local = floats(n), *out = floats(n);
    k->outer->nesterov(k, anchor, momentum, mean, n, 0.7f, 0.9f);
    k->outer->mix(k, local, anchor, n, 0.3f);
    k->outer->pseudo_gradient(k, out, anchor, local, momentum, n);
    k->outer->add_delta(k, local, anchor, out, n);
}

static void codecs(int rows, int C) {
    size_t n = (size_t)(rows * C);
    struct err err;
    float *x = floats(n), *out = floats(n);
    for (enum outer_codec codec = 0; codec < 3; codec++) {
        uint8_t *bytes = (uint8_t *)floats(n + 1);
        if (k->outer->encode(k, bytes, x, n, codec, &err)) fail_msg("%s", err.msg);
        k->outer->decode(k, out, bytes, n, codec);
        k->outer->residual(k, x, out, bytes, n, codec);
    }
}

static void sums_of_ranks(int rows, int C) {
    size_t n = (size_t)(rows * C);
    void *out = acts(n);
    const void *from[] = { acts(n), acts(n), acts(n) };
    k->shared->sum(k, out, from, 3, n, k->act_bytes == sizeof(uint16_t));
}

/* ---- the test ------------------------------------------------------------------------------------------ */

typedef void kernel(int rows, int C);

/* All that its operands hold afterwards. */
static size_t run(kernel *f, int rows, int C, int off, char *found) {
    size_t bytes = 0;
    memset(&call, 0, sizeof call);
    call.off = off;
    f(rows, C);
    for (int i = 0; i < call.count; i++) {
        assert_true(bytes + call.of[i].bytes <= BYTES_MAX);
        k->copy_out(k, found + bytes, call.of[i].at, call.of[i].bytes);
        k->free(k, call.of[i].memory);
        bytes += call.of[i].bytes;
    }
    memcpy(found + bytes, &call.sum, sizeof call.sum);
    return bytes + sizeof call.sum;
}

static void compare(const char *name, kernel *f, int rows, int C) {
    static char want[BYTES_MAX + 8], got[BYTES_MAX + 8];
    size_t bytes = run(f, rows, C, NONE, want);
    for (int off = ALL; off < call.count; off++) {
        assert_int_equal(run(f, rows, C, off, got), bytes);
        if (memcmp(got, want, bytes))
            fail_msg("%s: %d x %d: other bits with operand %d misaligned", name, rows, C, off);
    }
}

static void what_is_not_aligned_has_the_same_bits(void **state) {
    (void)state;
    static const struct {
        const char *name;
        kernel *f;
    } kernels[] = { { "embedding", embedding },
                    { "norm", norm },
                    { "rope", rope },
                    { "swiglu", swiglu },
                    { "loss", loss },
                    { "residual stream", residual_stream },
                    { "optimizer", optimizer },
                    { "states", states },
                    { "outer step", outer_step },
                    { "codecs", codecs },
                    { "sums of ranks", sums_of_ranks } };
    static const int shape[][2] = { { 1, 1 }, { 3, 5 }, { 2, 64 }, { 2, 131 }, { 1, 260 } };
    static const size_t kept[][2] = { { 4, 0 }, { 2, 2 }, { 2, 0 } };
    for (size_t how = 0; how < 3; how++) {
        open_with(kept[how][0], kept[how][1]);
        for (size_t f = 0; f < sizeof kernels / sizeof *kernels; f++)
            for (size_t s = 0; s < sizeof shape / sizeof *shape; s++)
                compare(kernels[f].name, kernels[f].f, shape[s][0], shape[s][1]);
        finish();
    }
}

/* ---- attention on tensor cores ------------------------------------------------------------------------- */

/* In the words of the PTX ISA, which names lane / 4 groupID and lane % 4 threadID_in_group; and no element is
 * anybody else's. */
static void a_lane_has_what_the_ptx_isa_says(void **state) {
    (void)state;
    int of_a[16][16] = { { 0 } }, of_b[16][8] = { { 0 } }, of_c[16][8] = { { 0 } };
    for (int lane = 0; lane < 32; lane++) {
        int group_id = lane >> 2, in_group = lane % 4;
        for (int i = 0; i < 8; i++) {
            assert_int_equal(mma_a_row(lane, i), i < 2 || (4 <= i && i < 6) ? group_id : group_id + 8);
            assert_int_equal(mma_a_column(lane, i), in_group * 2 + (i & 1) + (i < 4 ? 0 : 8));
            of_a[mma_a_row(lane, i)][mma_a_column(lane, i)]++;
        }
        for (int i = 0; i < 4; i++) {
            assert_int_equal(mma_b_row(lane, i), in_group * 2 + (i & 1) + (i < 2 ? 0 : 8));
            assert_int_equal(mma_b_column(lane), group_id);
            assert_int_equal(mma_c_row(lane, i), i < 2 ? group_id : group_id + 8);
            assert_int_equal(mma_c_column(lane, i), in_group * 2 + (i & 1));
            of_b[mma_b_row(lane, i)][mma_b_column(lane)]++;
            of_c[mma_c_row(lane, i)][mma_c_column(lane, i)]++;
        }
    }
    for (int r = 0; r < 16; r++)
        for (int c = 0; c < 16; c++)
            assert_true(of_a[r][c] == 1 && (c > 7 || (of_b[r][c] == 1 && of_c[r][c] == 1)));
}

struct attention {
    int B, T, H, KV, D;
    size_t n, rows, heads; /* elements of qkv, of out, of lse */
    int32_t start[400];
    uint16_t *qkv, *dout, *out, *dqkv;
    float *lse;
};

/* Documents of 1, 2, 4, 8, ... tokens, other ones in each sequence; all of the last sequence is one. */
static void attention_take(struct attention *a, const int shape[5]) {
    *a = (struct attention){ .B = shape[0], .T = shape[1], .H = shape[2], .KV = shape[3], .D = shape[4] };
    a->heads = (size_t)(a->B * a->T * a->H);
    a->rows = a->heads * (size_t)a->D;
    a->n = (size_t)(a->B * a->T * (a->H + 2 * a->KV) * a->D);
    for (int b = 0; b < a->B; b++)
        for (int t = 0, first = 0, length = 1 + b; t < a->T; t++) {
            if (t - first == length && b < a->B - 1 + (a->B == 1)) first = t, length *= 2;
            a->start[b * a->T + t] = first;
        }
    a->qkv = malloc(a->n * 2), a->dqkv = malloc(a->n * 2), a->dout = malloc(a->rows * 2),
    a->out = malloc(a->rows * 2);
    a->lse = malloc(a->heads * sizeof *a->lse);
}

static void attention_drop(struct attention *a) {
    free(a->qkv), free(a->dqkv), free(a->dout), free(a->out), free(a->lse);
}

static void fill(uint16_t *x, size_t n, uint64_t seed) {
    float *from = malloc(n * sizeof *from);
    outer_init_normal(from, seed, 0, n, 1);
    for (size_t i = 0; i < n; i++) x[i] = bf16_nearest(from[i]);
    free(from);
}

/* On the device; shift: elements by which qkv is not aligned, which other kernels then compute. */
static void attention_once(struct attention *a, size_t shift) {
    unsigned before = emulator_mma_count;
    memset(&call, 0, sizeof call);
    memset(a->out, 0xff, a->rows * 2), memset(a->dqkv, 0xff, a->n * 2); /* NaN: all of it must be written */
    call.off = shift ? 0 : NONE;
    void *qkv = operand(a->qkv, a->n * 2, 2), *out = operand(a->out, a->rows * 2, 2),
         *dqkv = operand(a->dqkv, a->n * 2, 2), *dout = operand(a->dout, a->rows * 2, 2),
         *start = operand(a->start, (size_t)(a->B * a->T) * sizeof *a->start, 4);
    float *lse = floats(a->heads);
    k->attention_forward(k, out, lse, qkv, start, a->B, a->T, a->H, a->KV, a->D);
    k->attention_backward(k, dqkv, dout, qkv, out, lse, start, a->B, a->T, a->H, a->KV, a->D);
    k->copy_out(k, a->out, out, a->rows * 2);
    k->copy_out(k, a->dqkv, dqkv, a->n * 2);
    k->copy_out(k, a->lse, lse, a->heads * sizeof *a->lse);
    for (int i = 0; i < call.count; i++) k->free(k, call.of[i].memory);
    if (!getenv("INTELLECT_TEST_GPU")) assert_int_equal(emulator_mma_count != before, !shift);
}

/* With tiles that come as late and as soon as can be, which changes no bit. */
static void attention_run(struct attention *a, size_t shift) {
    uint16_t *out = malloc(a->rows * 2), *dqkv = malloc(a->n * 2);
    setenv("EMULATOR_COPIES", "late", 1);
    attention_once(a, shift);
    memcpy(out, a->out, a->rows * 2), memcpy(dqkv, a->dqkv, a->n * 2);
    unsetenv("EMULATOR_COPIES");
    attention_once(a, shift);
    assert_memory_equal(out, a->out, a->rows * 2);
    assert_memory_equal(dqkv, a->dqkv, a->n * 2);
    free(out), free(dqkv);
}

/* Of the difference, over that of what it should be. */
static void assert_norm_within(const char *what, const uint16_t *got, const uint16_t *want, size_t n,
                               double most) {
    double off = 0, all = 0;
    for (size_t i = 0; i < n; i++) {
        double w = bf16_widen(want[i]), d = bf16_widen(got[i]) - w;
        off += d * d, all += w * w;
    }
    if (!(sqrt(off) <= most * sqrt(all))) fail_msg("%s is off by %g of its norm", what, sqrt(off / all));
}

/* One token; one below and above a block of queries, of a tile of keys; groups of one, two and four heads;
 * and what the kernels without tensor cores make of it. */
static void documents_are_the_references_but_for_rounding(void **state) {
    (void)state;
    static const int shape[][5] = { { 1, 1, 1, 1, 64 },  { 2, 63, 2, 1, 64 },  { 1, 65, 2, 2, 128 },
                                    { 1, 129, 2, 1, 64 }, { 2, 33, 4, 1, 128 }, { 1, 200, 1, 1, 64 } };
    const struct kernels *ref = kernels_reference_bf16();
    open_with(2, 2);
    for (size_t s = 0; s < sizeof shape / sizeof *shape; s++)
        for (size_t shift = 0; shift < (s < 3 ? 2 : 1); shift++) {
            struct attention got, want;
            attention_take(&got, shape[s]), attention_take(&want, shape[s]);
            fill(got.qkv, got.n, 1), fill(got.dout, got.rows, 2);
            attention_run(&got, shift);
            ref->attention_forward(ref, want.out, want.lse, got.qkv, got.start, got.B, got.T, got.H, got.KV,
                                   got.D);
            ref->attention_backward(ref, want.dqkv, got.dout, got.qkv, want.out, want.lse, got.start, got.B,
                                    got.T, got.H, got.KV, got.D);
            assert_norm_within("out", got.out, want.out, got.rows, 1e-2);
            assert_norm_within("dqkv", got.dqkv, want.dqkv, got.n, 1e-2);
            for (size_t i = 0; i < got.heads; i++)
                assert_true(fabsf(got.lse[i] - want.lse[i]) <= 1e-5f * (1 + fabsf(want.lse[i])));
            attention_drop(&got), attention_drop(&want);
        }
    finish();
}

/* Which key of its document a query finds. */
static int sought(const struct attention *a, int b, int t, int h) {
    int first = a->start[b * a->T + t];
    return first + (t * 5 + h * 3) % (t - first + 1);
}

/* Keys are words of ones and minus ones, a query is 64 times one of them: its score is so far above all
 * others that they count nothing, so the output is one value, the log-sum-exp one score, the gradient of a
 * value a sum of outputs' gradients, all of whole numbers and without rounding. A slip of layout finds
 * another key. */
static void whole_numbers_are_exact(void **state) {
    (void)state;
    static const int shape[][5] = { { 2, 90, 4, 2, 64 }, { 1, 70, 2, 1, 128 } };
    open_with(2, 2);
    for (size_t s = 0; s < 2; s++) {
        struct attention a;
        attention_take(&a, shape[s]);
        size_t D = (size_t)a.D, row = (size_t)(a.H + 2 * a.KV) * D;
        float *dv = calloc(a.n, sizeof *dv);
        for (size_t t = 0; t < (size_t)(a.B * a.T); t++)
            for (size_t i = 0; i < (size_t)(2 * a.KV) * D; i++) {
                uint32_t random = (uint32_t)(t * row + i) * 2654435761u, value = random >> 24;
                a.qkv[t * row + (size_t)a.H * D + i] = bf16_nearest(
                    i < (size_t)a.KV * D ? (bf16_mix(random) & 1 ? 1.0f : -1.0f) : (float)value - 128);
            }
        for (size_t i = 0; i < a.rows; i++)
            a.dout[i] = bf16_nearest((float)((int)((uint32_t)i * 2654435761u >> 9) % 3 - 1));
        for (int b = 0; b < a.B; b++)
            for (int t = 0; t < a.T; t++)
                for (int h = 0; h < a.H; h++) {
                    int kv = h / (a.H / a.KV);
                    size_t to = (size_t)(b * a.T + t) * row,
                           from = (size_t)(b * a.T + sought(&a, b, t, h)) * row;
                    for (size_t d = 0; d < D; d++) {
                        float key = bf16_widen(a.qkv[from + (size_t)(a.H + kv) * D + d]);
                        a.qkv[to + (size_t)h * D + d] = bf16_nearest(64 * key);
                        dv[from + (size_t)(a.H + a.KV + kv) * D + d] +=
                            bf16_widen(a.dout[((size_t)(b * a.T + t) * (size_t)a.H + (size_t)h) * D + d]);
                    }
                }
        attention_run(&a, 0);
        float score = 64 * (float)D * (1.0f / sqrtf((float)D));
        for (size_t i = 0; i < a.heads; i++) assert_true(a.lse[i] == score);
        for (size_t i = 0; i < a.rows; i++) {
            int bt = (int)(i / D) / a.H, h = (int)(i / D) % a.H, b = bt / a.T;
            size_t from = (size_t)(b * a.T + sought(&a, b, bt % a.T, h)) * row;
            uint16_t want = a.qkv[from + (size_t)(a.H + a.KV + h / (a.H / a.KV)) * D + i % D];
            if (a.out[i] != want)
                fail_msg("out[%zu] is %g, not %g", i, (double)bf16_widen(a.out[i]), (double)bf16_widen(want));
        }
        for (size_t i = 0; i < a.n; i++) /* with p 1, queries and keys have no gradient */
            if (bf16_widen(a.dqkv[i]) != dv[i])
                fail_msg("dqkv[%zu] is %g, not %g", i, (double)bf16_widen(a.dqkv[i]), (double)dv[i]);
        free(dv);
        attention_drop(&a);
    }
    finish();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_lane_has_what_the_ptx_isa_says),
        cmocka_unit_test(documents_are_the_references_but_for_rounding),
        cmocka_unit_test(whole_numbers_are_exact),
        cmocka_unit_test(what_is_not_aligned_has_the_same_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
