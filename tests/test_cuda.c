/* test_cuda.c - kernels that read 16 bytes at once do so only where all their tensors are aligned for it, and have the
 * same bits where not: on a GPU where `make gpu` runs this, else on the emulator, which ends at a misaligned access. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/bf16.h"
#include "kernels/plugin.h"

static struct kernels *k;

static void open_with(size_t weight_bytes, size_t rest_bytes) {
    struct err err;
    k = getenv("INTELLECT_TEST_GPU") ? kernels_cuda_create(0, weight_bytes, rest_bytes, &err)
                                     : intellect_cuda_create(KERNELS_PLUGIN_ABI, 0, weight_bytes, rest_bytes, &err);
    if (!k) fail_msg("%s", err.msg);
}

static void finish(void) {
    struct err err;
    if (k->check(k, &err)) fail_msg("%s", err.msg);
    k->destroy(k);
}

/* ---- operands -------------------------------------------------------------------------------------------- */

/* Those of one call, each in memory of its own; that of number `off`, or all where it is ALL, begin an element after an
 * aligned address. */
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

/* ---- calls: each of `rows` rows of C, or of their product --------------------------------------------------- */

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
    const struct kernels_adamw step = { .lr = 0.01f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .m_correction = 0.1f,
                                        .v_correction = 0.05f, .grad_scale = 0.5f, .seed = 3, .first = 5 };
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

/* ---- the test -------------------------------------------------------------------------------------------- */

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
        if (memcmp(got, want, bytes)) fail_msg("%s: %d x %d: other bits with operand %d misaligned", name, rows, C, off);
    }
}

static void what_is_not_aligned_has_the_same_bits(void **state) {
    (void)state;
    static const struct {
        const char *name;
        kernel *f;
    } kernels[] = { { "embedding", embedding }, { "norm", norm }, { "rope", rope }, { "swiglu", swiglu }, { "loss", loss },
                    { "residual stream", residual_stream }, { "optimizer", optimizer }, { "states", states },
                    { "outer step", outer_step }, { "codecs", codecs }, { "sums of ranks", sums_of_ranks } };
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

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_not_aligned_has_the_same_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
