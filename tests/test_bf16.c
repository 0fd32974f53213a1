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

static void round_all(float *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = bf16_widen(bf16_nearest(x[i]));
}

/* Sums of whole numbers under 2^24 are exact in any order, so a slip of layout is a hard mismatch. */
static void assert_near(const char *what, const float *got, const float *want, size_t n, int exact) {
    float largest = outer_absmax(want, n);
    for (size_t i = 0; i < n; i++)
        if (!(fabsf(got[i] - want[i]) <= (exact ? 0 : 4e-6f * largest)))
            fail_msg("%s[%zu] is %.9g, should be %.9g", what, i, (double)got[i], (double)want[i]);
}

static void compare_products(const struct kernels *k, int rows, int C, int OC, int exact) {
    const struct kernels *ref = kernels_reference();
    size_t nx = (size_t)rows * (size_t)C, nw = (size_t)OC * (size_t)C, no = (size_t)rows * (size_t)OC;
    float *x = draw(nx, 1), *w = draw(nw, 1), *dout = draw(no, 1), *got = draw(no, 1), *want = draw(no, 1);
    uint16_t *upper = malloc(nw * sizeof *upper), *rest = k->rest_bytes ? malloc(nw * sizeof *rest) : NULL;
    if (exact) whole_numbers(x, nx, 1), whole_numbers(w, nw, 2), whole_numbers(dout, no, 3);
    k->weights_in(k, upper, rest, w, nw);
    for (size_t i = 0; i < nw; i++) w[i] = bf16_widen(upper[i]);
    k->matmul_forward(k, got, x, upper, rows, C, OC);
    float *dx[2] = { draw(nx, 1), draw(nx, 1) }, *dw[2] = { draw(nw, 1), draw(nw, 1) }, *dx_want[2], *dw_want[2];
    for (int add = 0; add <= 1; add++) {
        if (exact) whole_numbers(dx[add], nx, 4), whole_numbers(dw[add], nw, 5);
        dx_want[add] = memcpy(malloc(nx * sizeof(float)), dx[add], nx * sizeof(float));
        dw_want[add] = memcpy(malloc(nw * sizeof(float)), dw[add], nw * sizeof(float));
        k->matmul_backward_input(k, dx[add], dout, upper, rows, C, OC, add ? KERNELS_ADD : KERNELS_SET);
        k->matmul_backward_weight(k, dw[add], dout, x, rows, C, OC, add ? KERNELS_ADD : KERNELS_SET);
    }
    round_all(x, nx), round_all(dout, no);
    ref->matmul_forward(ref, want, x, w, rows, C, OC);
    assert_near("out", got, want, no, exact);
    for (int add = 0; add <= 1; add++) {
        ref->matmul_backward_input(ref, dx_want[add], dout, w, rows, C, OC, add ? KERNELS_ADD : KERNELS_SET);
        ref->matmul_backward_weight(ref, dw_want[add], dout, x, rows, C, OC, add ? KERNELS_ADD : KERNELS_SET);
        assert_near("dx", dx[add], dx_want[add], nx, exact);
        assert_near("dw", dw[add], dw_want[add], nw, exact);
        free(dx[add]), free(dw[add]), free(dx_want[add]), free(dw_want[add]);
    }
    free(x), free(w), free(dout), free(got), free(want), free(upper), free(rest);
}

static void products_are_the_references_on_rounded_operands(void **state) {
    (void)state;
    static const int shape[][3] = { { 1, 1, 1 }, { 3, 5, 7 }, { 64, 64, 64 }, { 65, 33, 129 }, { 1, 300, 17 },
                                    { 200, 2, 31 }, { 130, 100, 200 }, { 150, 77, 45 } };
    struct kernels *backend[] = { cuda(PLANES), create(1, 0, 0), create(3, 0, 0), create(1, 0, 1), create(3, 0, 1) };
    for (size_t b = 0; b < sizeof backend / sizeof *backend; b++) {
        if (!backend[b]) continue;
        for (size_t i = 0; i < sizeof shape / sizeof *shape; i++)
            for (int exact = 0; exact <= 1; exact++)
                compare_products(backend[b], shape[i][0], shape[i][1], shape[i][2], exact);
        finish(backend[b]);
    }
}

/* More shapes than the backend remembers, twice: what was forgotten is prepared again. */
static void many_shapes_do_not_mix(void **state) {
    (void)state;
    struct kernels *k = create(1, 1, 1);
    if (!k) return;
    for (int again = 0; again <= 1; again++)
        for (int rows = 1; rows <= CPU_PRODUCTS_MAX / 2; rows++) compare_products(k, rows, 9, 5, 1);
    finish(k);
}

/* ---- other kernels that see weights -------------------------------------------------------------- */

static void compare_norms_and_embeddings(struct kernels *k, struct kernels *plain) {
    enum { ROWS = 9, C = 70, V = 13 };
    float *w = draw(V * C, 1), *x = draw(ROWS * C, 1), *dout = draw(ROWS * C, 1);
    float out[2][ROWS * C], rstd[2][ROWS], dx[2][ROWS * C] = { { 0 } }, dw[2][C] = { { 0 } }, table[2][ROWS * C];
    uint16_t upper[V * C], rest[V * C];
    int32_t tokens[ROWS];
    for (int r = 0; r < ROWS; r++) tokens[r] = (r * 5 + 12) % V;
    k->weights_in(k, upper, rest, w, V * C);
    for (int i = 0; i < V * C; i++) w[i] = bf16_widen(upper[i]);
    const struct kernels *backend[] = { k, plain };
    const void *weights[] = { upper, w };
    for (int i = 0; i < 2; i++) {
        const struct kernels *b = backend[i];
        b->embedding_forward(b, table[i], tokens, weights[i], ROWS, C, V);
        b->rmsnorm_forward(b, out[i], rstd[i], x, weights[i], 1e-5f, ROWS, C);
        b->rmsnorm_backward(b, dx[i], dw[i], dout, x, weights[i], rstd[i], ROWS, C);
    }
    assert_memory_equal(table[0], table[1], sizeof table[0]);
    assert_memory_equal(out[0], out[1], sizeof out[0]);
    assert_memory_equal(dx[0], dx[1], sizeof dx[0]);
    assert_memory_equal(dw[0], dw[1], sizeof dw[0]);
    free(w), free(x), free(dout);
    finish(k);
    finish(plain);
}

static void norms_and_embeddings_see_the_upper_halves(void **state) {
    (void)state;
    compare_norms_and_embeddings(create(2, 0, 0), kernels_cpu_create(2, NULL));
    compare_norms_and_embeddings(cuda(PLANES), cuda(FP32));
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
        free(grad);
    }
    k->weights_out(k, back, upper, rest, N);
    assert_memory_equal(back, w, N * sizeof *w);
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
    }
    assert_memory_equal(whole, cut, N * sizeof *cut);
    double mean = 0;
    for (size_t i = 0; i < N; i++) mean += (double)bf16_widen(whole[i]) / N;
    assert_true(fabs(mean - (1 - STEPS * 4e-6)) < 2e-5 * sqrt(400001.0 / (double)N));
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
        cmocka_unit_test(many_shapes_do_not_mix),
        cmocka_unit_test(norms_and_embeddings_see_the_upper_halves),
        cmocka_unit_test(a_step_with_the_rest_is_the_step_in_fp32),
        cmocka_unit_test(without_the_rest_small_updates_add_up_and_cuts_change_nothing),
        cmocka_unit_test(an_engine_on_cuda_trains_like_one_on_the_cpu),
        cmocka_unit_test(the_plugin_loads_and_says_what_is_missing),
        cmocka_unit_test(training_learns_and_goes_on_from_a_saved_state),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
