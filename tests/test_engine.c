/* Inner training: schedule, steps, moments, saved state. Runs on the plain reference except where
 * the fast backend's own promise (same bits again) is at stake. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/kernels.h"
#include "node/engine.h"
#include "node/model.h"
#include "node/saver.h"
#include "node/schedule.h"
#include "proto/model.h"

#define SEQUENCE 12
#define BATCH 4

static char folder[] = "/tmp/intellect-test-engine-XXXXXX";
static char saved[sizeof folder + 16];

static struct msg_model tiny(void) {
    return (struct msg_model){ .layers = 2, .width = 16, .heads = 4, .kv_heads = 2, .ffn = 24, .vocabulary = 20,
                               .sequence = SEQUENCE, .rope_theta = 1e4, .norm_eps = 1e-5, .tied = 1 };
}

static struct msg_inner settings(void) {
    return (struct msg_inner){ .batch = BATCH, .lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
                               .weight_decay = 0.1, .clip = 1, .warmup_tokens = 100, .decay_tokens = 2000,
                               .total_tokens = 10000 };
}

static struct engine *create_with(const struct kernels *k, const struct msg_inner *in) {
    struct msg_model m = tiny();
    struct err err = { 0 };
    struct engine *e = engine_create(&m, in, k, &err);
    if (!e) fail_msg("%s", err.msg);
    size_t n = engine_elements(e);
    float *init = malloc(n * sizeof *init);
    model_init_elements(&m, 0.05f, 1, 0, n, init);
    engine_params_write(e, 0, n, init);
    free(init);
    return e;
}

static struct engine *create(const struct kernels *k) {
    struct msg_inner in = settings();
    return create_with(k, &in);
}

/* A language with something to learn: after token a comes (3a + 1) mod 20, most of the time. */
static void fill_batch(int32_t *tokens, uint32_t samples, uint32_t seed) {
    for (uint32_t s = 0; s < samples; s++) {
        uint32_t a = (seed * 7 + s * 5) % 20;
        for (uint32_t t = 0; t <= SEQUENCE; t++) {
            *tokens++ = (int32_t)a;
            a = (seed + s + t) % 11 == 0 ? (a + 9) % 20 : (3 * a + 1) % 20;
        }
    }
}

static struct engine_result step(struct engine *e, uint32_t number) {
    int32_t tokens[BATCH * (SEQUENCE + 1)];
    struct engine_result r;
    struct err err = { 0 };
    fill_batch(tokens, BATCH, number);
    if (engine_step(e, tokens, BATCH, (uint64_t)number * BATCH * SEQUENCE, &r, &err)) fail_msg("%s", err.msg);
    return r;
}

static float *params_of(const struct engine *e) {
    size_t n = engine_elements(e);
    float *p = malloc(n * sizeof *p);
    engine_params_read(e, 0, n, p);
    return p;
}

static void assert_same_params(const struct engine *a, const struct engine *b) {
    float *pa = params_of(a), *pb = params_of(b);
    assert_memory_equal(pa, pb, engine_elements(a) * sizeof *pa);
    free(pa);
    free(pb);
}

/* ---- documents --------------------------------------------------------------------------------- */

/* The mean is over the targets of the whole batch: a micro-batch that has fewer must not weigh more. */
static void documents_count_by_their_targets_however_the_batch_is_cut(void **state) {
    (void)state;
    const struct kernels *k = kernels_reference();
    struct engine *e = create(k);
    int32_t tokens[2 * (SEQUENCE + 1)];
    double both, first, second;
    fill_batch(tokens, 2, 3);
    int32_t end = tokens[4];
    engine_set_document_end(e, end);
    size_t n = 0, of_first = 0;
    for (int s = 0; s < 2; s++)
        for (int t = 0; t < SEQUENCE; t++) n += tokens[s * (SEQUENCE + 1) + t] != end;
    for (int t = 0; t < SEQUENCE; t++) of_first += tokens[t] != end;
    assert_true(of_first < SEQUENCE && of_first != n - of_first);
    assert_int_equal(engine_eval_loss(e, tokens, 2, &both, NULL), 0);
    assert_int_equal(engine_eval_loss(e, tokens, 1, &first, NULL), 0);
    assert_int_equal(engine_eval_loss(e, tokens + SEQUENCE + 1, 1, &second, NULL), 0);
    assert_true(fabs(both * (double)n - first * (double)of_first - second * (double)(n - of_first)) < 1e-5);
    engine_set_document_end(e, -1);
    double plain;
    assert_int_equal(engine_eval_loss(e, tokens, 2, &plain, NULL), 0);
    assert_true(plain != both);
    engine_destroy(e);
}

/* A damaged text may be nothing but separators. */
static void a_batch_without_a_target_changes_nothing_but_decay(void **state) {
    (void)state;
    struct engine *e = create(kernels_reference());
    int32_t tokens[SEQUENCE + 1] = { 0 };
    struct engine_result r;
    struct err err;
    engine_set_document_end(e, 0);
    if (engine_step(e, tokens, 1, 500, &r, &err)) fail_msg("%s", err.msg);
    assert_true(r.loss == 0 && r.grad_norm == 0 && r.tokens == SEQUENCE);
    engine_destroy(e);
}

/* Losses of runs with and without stay comparable. */
static void z_loss_is_trained_on_and_reported_apart(void **state) {
    (void)state;
    struct msg_model m = tiny();
    struct msg_inner in = settings();
    in.z_loss = 0.5;
    struct engine *plain = create(kernels_reference());
    struct engine *with = engine_create(&m, &in, kernels_reference(), NULL);
    float *init = params_of(plain);
    engine_params_write(with, 0, engine_elements(with), init);
    struct engine_result a = step(plain, 1), b = step(with, 1);
    assert_true(a.penalty == 0 && b.penalty > 0);
    assert_true(a.loss == b.loss);
    assert_true(a.grad_norm != b.grad_norm);
    free(init);
    engine_destroy(plain);
    engine_destroy(with);
}

/* ---- schedule ---------------------------------------------------------------------------------- */

/* Position moves only when a round commits: a rate of zero at token 0 would waste the first. */
static void schedule_warms_up_stays_and_decays(void **state) {
    (void)state;
    struct msg_inner in = settings();
    assert_true(fabs(schedule_lr(&in, 0) - 1e-3) < 1e-12);
    assert_true(fabs(schedule_lr(&in, 50) - 5.5e-3) < 1e-12);
    assert_true(schedule_lr(&in, 100) == 1e-2);
    assert_true(schedule_lr(&in, 8000) == 1e-2);
    assert_true(fabs(schedule_lr(&in, 8500) - 1e-2 * 0.5) < 1e-12); /* 1 - sqrt(1/4) */
    assert_true(fabs(schedule_lr(&in, 10000) - 1e-4) < 1e-12);
    assert_true(schedule_lr(&in, UINT64_MAX) > 0);
    in.total_tokens = 0; /* no end */
    assert_true(schedule_lr(&in, UINT64_MAX) == 1e-2);
    in.warmup_tokens = 0;
    assert_true(schedule_lr(&in, 0) == 1e-2);
}

static void schedule_can_be_a_cosine_or_constant(void **state) {
    (void)state;
    struct msg_inner in = settings();
    in.schedule = SCHEDULE_COSINE;
    assert_true(fabs(schedule_lr(&in, 50) - 5.5e-3) < 1e-12);
    assert_true(schedule_lr(&in, 100) == 1e-2);
    assert_true(fabs(schedule_lr(&in, 100 + 9900 / 2) - 5e-3) < 1e-12); /* half way */
    assert_true(fabs(schedule_lr(&in, 100 + 9900 / 3) - 7.5e-3) < 1e-12);
    assert_true(schedule_lr(&in, 9999) == 1e-4 && schedule_lr(&in, UINT64_MAX) == 1e-4);
    in.warmup_tokens = in.total_tokens;
    assert_true(schedule_lr(&in, 9999) < 1e-2 && schedule_lr(&in, 10000) == 1e-4);
    in = settings();
    in.schedule = SCHEDULE_CONSTANT;
    assert_true(fabs(schedule_lr(&in, 50) - 5.5e-3) < 1e-12);
    assert_true(schedule_lr(&in, 9999) == 1e-2 && schedule_lr(&in, UINT64_MAX) == 1e-2);
}

static void impossible_settings_are_refused(void **state) {
    (void)state;
    struct msg_model m = tiny();
    struct err err = { 0 };
    struct msg_inner in = settings();
    in.batch = 0;
    assert_null(engine_create(&m, &in, kernels_reference(), &err));
    assert_non_null(strstr(err.msg, "batch"));
    in = settings();
    in.lr = NAN;
    assert_null(engine_create(&m, &in, kernels_reference(), &err));
    assert_non_null(strstr(err.msg, "lr"));
    in = settings();
    in.schedule = 3;
    assert_null(engine_create(&m, &in, kernels_reference(), &err));
    assert_non_null(strstr(err.msg, "schedule"));
    in = settings();
    in.decay_tokens = in.total_tokens + 1;
    assert_null(engine_create(&m, &in, kernels_reference(), &err));
    assert_non_null(strstr(err.msg, "decay_tokens"));
}

/* ---- steps ------------------------------------------------------------------------------------- */

static void training_lowers_the_loss(void **state) {
    (void)state;
    struct engine *e = create(kernels_reference());
    struct engine_result first = step(e, 0), r = first;
    for (uint32_t i = 1; i < 80; i++) r = step(e, i);
    assert_true(fabs(first.loss - log(20)) < 0.2); /* before the first update: knows nothing */
    assert_true(r.loss < 0.5 * first.loss);
    assert_int_equal(r.step, 80);
    assert_int_equal(r.tokens, BATCH * SEQUENCE);
    engine_destroy(e);
}

/* AdamW's first step moves every weight by lr * sign(gradient), and decays matrices alone: a norm
 * weight of 1 must not shrink by lr * weight_decay, an unused embedding row must not move at all. */
static void first_step_is_adamws(void **state) {
    (void)state;
    struct engine *e = create(kernels_reference());
    struct msg_model m = tiny();
    struct proto_tensor q, norm;
    float *before = params_of(e);
    struct engine_result r = step(e, 0);
    float *after = params_of(e);
    assert_true(fabs(r.lr - 1e-3) < 1e-12);
    proto_model_tensor(&m, 1 + MODEL_Q, &q);
    proto_model_tensor(&m, 1 + MODEL_INPUT_NORM, &norm);
    for (size_t i = q.offset; i < q.offset + q.count; i++) {
        double moved = (double)after[i] - (double)before[i] * (1 - r.lr * 0.1);
        assert_true(fabs(fabs(moved) - r.lr) < 2e-5);
    }
    for (size_t i = norm.offset; i < norm.offset + norm.count; i++)
        assert_true(fabs(fabs((double)after[i] - 1) - r.lr) < 2e-5);
    free(before);
    free(after);
    engine_destroy(e);
}

/* ---- Muon ------------------------------------------------------------------------------------- */

static void multiply(double *out, const double *a, const double *b, size_t n, size_t k, size_t m) {
    memset(out, 0, n * m * sizeof *out);
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < k; j++)
            for (size_t l = 0; l < m; l++) out[i * m + l] += a[i * k + j] * b[j * m + l];
}

/* As the papers write it, in double: X (X^T X) throughout. */
static void newton_schulz(double *x, size_t rows, size_t columns) {
    enum { N = 24 * 24 };
    double norm = 0, t[N], g[N], s[N], y[N];
    for (size_t i = 0; i < rows * columns; i++) norm += x[i] * x[i];
    for (size_t i = 0; i < rows * columns; i++) x[i] /= sqrt(norm);
    for (int step = 0; step < 5; step++) {
        for (size_t i = 0; i < rows; i++)
            for (size_t j = 0; j < columns; j++) t[j * rows + i] = x[i * columns + j];
        multiply(g, t, x, columns, rows, columns);
        multiply(s, g, g, columns, columns, columns);
        for (size_t i = 0; i < columns * columns; i++) g[i] = -4.7750 * g[i] + 2.0315 * s[i];
        multiply(y, x, g, rows, columns, columns);
        for (size_t i = 0; i < rows * columns; i++) x[i] = 3.4445 * x[i] + y[i];
    }
}

/* The gradient of a batch, from the network alone. */
static float *gradient_of(const struct engine *e, uint32_t number) {
    const struct kernels *k = kernels_reference();
    size_t n = engine_elements(e);
    struct model *m = model_create(engine_model(e), k, BATCH, SEQUENCE, MODEL_TRAINS, NULL);
    float *grads = calloc(n, sizeof *grads), *params = params_of(e);
    int32_t tokens[BATCH * (SEQUENCE + 1)];
    struct model_loss loss;
    fill_batch(tokens, BATCH, number);
    assert_int_equal(model_backward(m, params, grads, tokens, BATCH, SEQUENCE, 1.0f / (BATCH * SEQUENCE),
                                    KERNELS_SET, &loss, NULL), 0);
    model_destroy(m);
    free(params);
    return grads;
}

static void assert_steps_like_muon(const struct proto_tensor *t, const float *before, const float *after,
                                   const float *now, const float *last, double clip[2], double lr) {
    size_t rows = t->shape[0], columns = t->shape[1];
    double x[24 * 24], scale = 0.2 * sqrt((double)(rows > columns ? rows : columns));
    for (size_t i = 0; i < t->count; i++) { /* momentum of two steps, and Nesterov's look ahead */
        double g = now[t->offset + i] * clip[1], m = 0.95 * last[t->offset + i] * clip[0] + g;
        x[i] = 0.95 * m + g;
    }
    newton_schulz(x, rows, columns);
    for (size_t i = 0; i < t->count; i++) {
        double want = before[t->offset + i] * (1 - lr * 0.1) - lr * scale * x[i];
        if (!(fabs(after[t->offset + i] - want) < 2e-6))
            fail_msg("%s[%zu] went from %g to %g, should be %g", t->name, i, (double)before[t->offset + i],
                     (double)after[t->offset + i], want);
    }
}

/* Two steps, against plain loops; what is no layer's matrix goes AdamW's way. */
static void a_matrix_steps_along_its_orthogonal_momentum(void **state) {
    (void)state;
    struct msg_inner in = settings();
    struct msg_model m = tiny();
    in.optimizer = OPTIMIZER_MUON;
    struct engine *e = create_with(kernels_reference(), &in), *adamw = create(kernels_reference());
    float *first = gradient_of(e, 0), *start = params_of(e);
    struct engine_result r0 = step(e, 0), r1;
    step(adamw, 0);
    float *before = params_of(e), *other = params_of(adamw), *second = gradient_of(e, 1);
    r1 = step(e, 1);
    float *after = params_of(e);
    double clip[2] = { fmin(1, 1 / r0.grad_norm), fmin(1, 1 / r1.grad_norm) };
    for (uint32_t i = 0; i < proto_model_tensor_count(&m); i++) {
        struct proto_tensor t;
        proto_model_tensor(&m, i, &t);
        if (t.dims == 2 && t.role != MODEL_EMBED)
            assert_steps_like_muon(&t, before, after, second, first, clip, r1.lr);
        else assert_memory_equal(before + t.offset, other + t.offset, t.count * sizeof *before);
    }
    free(first), free(second), free(start), free(before), free(other), free(after);
    engine_destroy(e);
    engine_destroy(adamw);
}

/* ---- other optimizers, other states ------------------------------------------------------------ */

/* Each optimizer with each way to keep its moments: they learn, on any number of threads alike, and go on
 * after a restart as if nothing had been. */
static void every_optimizer_learns_and_goes_on_bit_for_bit(void **state) {
    (void)state;
    for (int i = 0; i < 6; i++) {
        struct msg_inner in = settings();
        in.optimizer = (uint8_t)(i % 2);
        in.states = (uint8_t)(i / 2);
        struct kernels *one = kernels_cpu_create(1, NULL), *three = kernels_cpu_create(3, NULL);
        struct engine *a = create_with(one, &in), *b = create_with(three, &in);
        uint64_t tag;
        struct engine_result first = step(a, 0), r = first;
        for (uint32_t s = 1; s < 40; s++) r = step(a, s);
        assert_int_equal(engine_save(a, saved, 1, NULL), 0);
        assert_int_equal(engine_load(b, saved, &tag, NULL), 0);
        for (uint32_t s = 40; s < 80; s++) {
            r = step(a, s);
            step(b, s);
        }
        assert_same_params(a, b);
        if (!(r.loss < 0.5 * first.loss)) fail_msg("optimizer %d, states %d: loss %g", i % 2, i / 2, r.loss);
        engine_destroy(a);
        engine_destroy(b);
        one->destroy(one);
        three->destroy(three);
    }
}

/* A joiner takes what a donor has, as far as both keep it. */
static void second_moments_of_fewer_bits_go_from_one_to_another(void **state) {
    (void)state;
    for (int i = 0; i < 6; i++) {
        struct msg_inner in = settings();
        in.optimizer = (uint8_t)(i % 2);
        in.states = (uint8_t)(i / 2);
        struct engine *a = create_with(kernels_reference(), &in), *b = create_with(kernels_reference(), &in);
        size_t n = engine_elements(a);
        float *v = malloc(n * sizeof *v), *w = malloc(n * sizeof *w);
        uint64_t count;
        for (uint32_t s = 0; s < 5; s++) step(a, s);
        engine_second_moments_read(a, 0, n, v, &count);
        engine_reset_moments(b);
        assert_int_equal(engine_second_moments_write(b, 0, n, v, count, NULL), 0);
        engine_second_moments_read(b, 0, n, w, &count);
        assert_memory_equal(v, w, n * sizeof *v);
        struct proto_tensor q;
        assert_int_equal(proto_model_tensor_find(engine_model(a), "model.layers.1.self_attn.q_proj.weight",
                                                 &q, NULL),
                         0);
        assert_true((v[q.offset] > 0) == (in.optimizer == OPTIMIZER_ADAMW) && v[0] >= 0 && count == 5);
        free(v), free(w);
        engine_destroy(a);
        engine_destroy(b);
    }
}

/* A twin that replays a step must arrive at the same bits; on the fast backend too. */
static void same_batches_give_the_same_bits(void **state) {
    (void)state;
    struct kernels *k = kernels_cpu_create(2, NULL);
    assert_non_null(k);
    struct engine *a = create(k), *b = create(k);
    for (uint32_t i = 0; i < 5; i++) {
        struct engine_result ra = step(a, i), rb = step(b, i);
        assert_true(ra.loss == rb.loss && ra.grad_norm == rb.grad_norm);
    }
    assert_same_params(a, b);
    engine_destroy(a);
    engine_destroy(b);
    k->destroy(k);
}

/* A poisoned gradient must not reach the parameters, nor count as a step. */
static void a_loss_that_is_not_finite_changes_nothing(void **state) {
    (void)state;
    struct engine *e = create(kernels_reference());
    int32_t tokens[BATCH * (SEQUENCE + 1)];
    struct engine_result r;
    struct err err = { 0 };
    float bad = NAN, good;
    for (uint32_t i = 0; i < 3; i++) step(e, i);
    struct engine *twin = create(kernels_reference());
    for (uint32_t i = 0; i < 3; i++) step(twin, i);
    engine_params_read(e, 40, 1, &good);
    engine_params_write(e, 40, 1, &bad);
    fill_batch(tokens, BATCH, 3);
    assert_int_equal(engine_step(e, tokens, BATCH, 0, &r, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    assert_non_null(strstr(err.msg, "step 4"));
    assert_int_equal(engine_steps(e), 3);
    engine_params_write(e, 40, 1, &good);
    step(e, 3);
    step(twin, 3);
    assert_same_params(e, twin); /* moments were left alone too */
    engine_destroy(e);
    engine_destroy(twin);
}

static void set_tensor(struct engine *e, const char *name, float value, size_t n) {
    struct proto_tensor t;
    assert_int_equal(proto_model_tensor_find(engine_model(e), name, &t, NULL), 0);
    if (n > t.count) n = (size_t)t.count;
    for (size_t i = 0; i < n; i++) engine_params_write(e, (size_t)t.offset + i, 1, &value);
}

/* Whoever looks for a diverged layer is told which. A forward pass goes wrong at a weight; a backward pass
 * can where nothing of the forward one is large: up's output is 0, but its gradient passes a weight of
 * 3e38. */
static void a_step_that_is_not_finite_names_the_place(void **state) {
    (void)state;
    int32_t tokens[BATCH * (SEQUENCE + 1)];
    struct engine_result r;
    struct err err = { 0 };
    fill_batch(tokens, BATCH, 3);
    struct engine *e = create(kernels_reference());
    set_tensor(e, "model.layers.1.mlp.gate_proj.weight", NAN, 1);
    assert_int_equal(engine_step(e, tokens, BATCH, 0, &r, &err), -1);
    assert_non_null(strstr(err.msg, "loss nan"));
    assert_non_null(strstr(err.msg, "the output of layer 1 is not finite"));
    set_tensor(e, "model.embed_tokens.weight", INFINITY, SIZE_MAX);
    assert_int_equal(engine_step(e, tokens, BATCH, 0, &r, &err), -1);
    assert_non_null(strstr(err.msg, "the embedding is not finite"));
    engine_destroy(e);
    e = create(kernels_reference());
    set_tensor(e, "model.layers.1.mlp.up_proj.weight", 0, SIZE_MAX);
    set_tensor(e, "model.layers.1.mlp.down_proj.weight", 3e38f, SIZE_MAX);
    set_tensor(e, "model.norm.weight", 1e4f, SIZE_MAX);
    assert_int_equal(engine_step(e, tokens, BATCH, 0, &r, &err), -1);
    assert_non_null(strstr(err.msg, "the gradient of model.layers.1.mlp.up_proj.weight is not finite"));
    engine_destroy(e);
}

/* Corpus and model come from different hands. */
static void tokens_outside_the_vocabulary_are_refused(void **state) {
    (void)state;
    struct engine *e = create(kernels_reference());
    int32_t tokens[SEQUENCE + 1] = { 0 };
    struct engine_result r;
    struct err err = { 0 };
    double loss;
    tokens[5] = 20;
    assert_int_equal(engine_step(e, tokens, 1, 0, &r, &err), -1);
    assert_non_null(strstr(err.msg, "20"));
    tokens[5] = -1;
    assert_int_equal(engine_eval_loss(e, tokens, 1, &loss, &err), -1);
    engine_destroy(e);
}

/* The rest of a lease may be smaller than a batch; its loss is a mean over its own tokens. */
static void a_partial_batch_trains_on_what_there_is(void **state) {
    (void)state;
    struct engine *e = create(kernels_reference());
    int32_t tokens[BATCH * (SEQUENCE + 1)];
    struct engine_result r;
    double loss;
    fill_batch(tokens, BATCH, 1);
    assert_int_equal(engine_eval_loss(e, tokens, 3, &loss, NULL), 0);
    assert_int_equal(engine_step(e, tokens, 3, 0, &r, NULL), 0);
    assert_true(fabs(r.loss - loss) < 1e-6);
    assert_int_equal(r.tokens, 3 * SEQUENCE);
    engine_destroy(e);
}

/* Whoever watches sees every layer of every micro-batch, forward and back. */
static void count_layer(void *count) { ++*(uint32_t *)count; }

static void a_step_is_seen_layer_by_layer(void **state) {
    (void)state;
    struct engine *e = create(kernels_reference());
    uint32_t whole = 0, pieces = 0, layers = engine_model(e)->layers;
    engine_set_watch(e, count_layer, &whole);
    step(e, 0);
    assert_true(whole >= 2 * layers);
    engine_set_watch(e, count_layer, &pieces);
    engine_limit_micro_batch(e, 1);
    step(e, 1);
    assert_int_equal(pieces, BATCH * whole);
    engine_destroy(e);
}

/* Evaluation of more samples than fit at once is the mean over all of them. */
static void evaluation_runs_in_pieces(void **state) {
    (void)state;
    struct engine *e = create(kernels_reference());
    int32_t tokens[3 * BATCH * (SEQUENCE + 1)];
    double all, part, sum = 0;
    fill_batch(tokens, 10, 2);
    assert_int_equal(engine_eval_loss(e, tokens, 10, &all, NULL), 0);
    for (uint32_t i = 0; i < 10; i++) {
        assert_int_equal(engine_eval_loss(e, tokens + i * (SEQUENCE + 1), 1, &part, NULL), 0);
        sum += part;
    }
    assert_true(fabs(sum / 10 - all) < 1e-6);
    engine_destroy(e);
}

/* ---- moments ----------------------------------------------------------------------------------- */

/* A joiner takes v and its count; m stays zero with a count of its own, so that its first step is
 * neither stretched by an empty v nor pulled by another member's direction. */
static void a_joiner_takes_second_moments_in_pieces(void **state) {
    (void)state;
    struct engine *donor = create(kernels_reference()), *joiner = create(kernels_reference());
    size_t n = engine_elements(donor);
    float *v = malloc(n * sizeof *v), *back = malloc(n * sizeof *back), *params = params_of(joiner);
    uint64_t count;
    for (uint32_t i = 0; i < 20; i++) step(donor, i);
    for (uint32_t i = 0; i < 3; i++) step(joiner, i);
    engine_second_moments_read(donor, 0, n, v, &count);
    assert_int_equal(count, 20);
    engine_reset_moments(joiner);
    engine_params_write(joiner, 0, n, params);
    for (size_t first = n; first > 0;) {
        size_t take = first < 1000 ? first : 1000;
        first -= take;
        assert_int_equal(engine_second_moments_write(joiner, first, take, v + first, count, NULL), 0);
    }
    engine_second_moments_read(joiner, 0, n, back, &count);
    assert_memory_equal(v, back, n * sizeof *v);
    assert_int_equal(count, 20);
    struct engine_result r = step(joiner, 30);
    float *after = params_of(joiner);
    double longest = 0; /* m_hat = g; v_hat from the donor's gradients, which are of the same size */
    for (size_t i = 0; i < n; i++) longest = fmax(longest, fabs((double)after[i] - (double)params[i]));
    assert_true(longest > r.lr && longest < 100 * r.lr);
    free(v);
    free(back);
    free(params);
    free(after);
    engine_destroy(donor);
    engine_destroy(joiner);
}

static void second_moments_from_outside_are_checked(void **state) {
    (void)state;
    struct engine *e = create(kernels_reference());
    float v[3] = { 1, 2, 3 };
    struct err err = { 0 };
    uint64_t count;
    size_t n = engine_elements(e);
    assert_int_equal(engine_second_moments_write(e, n - 2, 3, v, 5, &err), -1);
    assert_int_equal(engine_second_moments_write(e, SIZE_MAX, 3, v, 5, &err), -1);
    v[1] = -1;
    assert_int_equal(engine_second_moments_write(e, 0, 3, v, 5, &err), -1);
    v[1] = INFINITY;
    assert_int_equal(engine_second_moments_write(e, 0, 3, v, 5, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    engine_second_moments_read(e, 0, 3, v, &count);
    assert_true(v[0] == 0 && count == 0);
    engine_destroy(e);
}

/* ---- saved state ------------------------------------------------------------------------------- */

static int make_folder(void **state) {
    (void)state;
    if (!mkdtemp(folder)) return -1;
    snprintf(saved, sizeof saved, "%s/inner.state", folder);
    return 0;
}

static int remove_folder(void **state) {
    (void)state;
    unlink(saved);
    return rmdir(folder);
}

/* A killed trainer goes on as if nothing had happened. */
static void a_loaded_state_goes_on_bit_for_bit(void **state) {
    (void)state;
    struct engine *a = create(kernels_reference()), *b = create(kernels_reference());
    uint64_t tag = 0;
    for (uint32_t i = 0; i < 4; i++) step(a, i);
    assert_int_equal(engine_save(a, saved, 77, NULL), 0);
    assert_int_equal(engine_load(b, saved, &tag, NULL), 0);
    assert_int_equal(tag, 77);
    assert_int_equal(engine_steps(b), 4);
    for (uint32_t i = 4; i < 8; i++) {
        step(a, i);
        step(b, i);
    }
    assert_same_params(a, b);
    engine_destroy(a);
    engine_destroy(b);
}

/* Training does not stop for a save: what comes to disk is the state of the moment it began at, whole,
 * however many steps follow before it is written. */
static void a_state_saved_beside_training_is_of_one_moment(void **state) {
    (void)state;
    struct engine *e = create(kernels_reference()), *twin = create(kernels_reference());
    struct saver *saver = saver_create(e, saved, NULL, NULL);
    struct err err = { 0 };
    uint64_t tag;
    assert_non_null(saver);
    step(e, 0);
    step(twin, 0);
    assert_int_equal(saver_begin(saver, 5, &err), 0);
    for (uint32_t i = 1; i < 4; i++) step(e, i);
    saver_destroy(saver); /* waits for the thread */
    assert_int_equal(engine_load(e, saved, &tag, &err), 0);
    assert_int_equal(tag, 5);
    assert_int_equal(engine_steps(e), 1);
    assert_same_params(e, twin);
    engine_destroy(e);
    engine_destroy(twin);
}

/* Nobody waits for the thread, so its failure is told by the next save, and the one at the end says its
 * own: an owner whose disk is full reads why the next start has no moments. */
static void a_save_that_failed_beside_training_is_told_later(void **state) {
    (void)state;
    struct engine *e = create(kernels_reference());
    struct saver *saver = saver_create(e, "/nonexistent/inner.state", NULL, NULL);
    struct err err = { 0 };
    assert_int_equal(saver_begin(saver, 0, &err), 0);
    for (int i = 0; i < 1000 && !saver_begin(saver, 0, &err); i++) usleep(1000);
    assert_int_equal(err.code, ERR_NOT_FOUND);
    err = (struct err){ 0 };
    assert_int_equal(saver_finish(saver, 0, &err), -1);
    assert_non_null(strstr(err.msg, "/nonexistent/"));
    saver_destroy(saver);
    engine_destroy(e);
}

static void flip_byte(const char *path, off_t at) {
    unsigned char byte;
    int fd = open(path, O_RDWR);
    assert_true(fd >= 0);
    assert_int_equal(pread(fd, &byte, 1, at), 1);
    byte ^= 1;
    assert_int_equal(pwrite(fd, &byte, 1, at), 1);
    close(fd);
}

/* What the disk gives back is hostile until checked; a refused file leaves the engine usable. */
static void damaged_states_are_refused_and_change_nothing(void **state) {
    (void)state;
    struct engine *e = create(kernels_reference()), *twin = create(kernels_reference());
    struct err err = { 0 };
    struct stat st;
    uint64_t tag;
    step(e, 0);
    assert_int_equal(engine_save(e, saved, 0, NULL), 0);
    step(e, 1);
    step(twin, 0);
    step(twin, 1);
    assert_int_equal(stat(saved, &st), 0);
    flip_byte(saved, st.st_size / 2);
    assert_int_equal(engine_load(e, saved, &tag, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    flip_byte(saved, st.st_size / 2);
    assert_int_equal(truncate(saved, st.st_size - 1), 0);
    assert_int_equal(engine_load(e, saved, &tag, &err), -1);
    assert_int_equal(err.code, ERR_TRUNCATED);
    unlink(saved);
    assert_int_equal(engine_load(e, saved, &tag, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
    assert_same_params(e, twin);
    engine_destroy(e);
    engine_destroy(twin);
}

static void the_state_of_another_model_is_refused(void **state) {
    (void)state;
    struct engine *e = create(kernels_reference());
    struct msg_model other = tiny();
    struct msg_inner in = settings();
    struct err err = { 0 };
    uint64_t tag;
    other.rope_theta = 500; /* same sizes, another network */
    struct engine *o = engine_create(&other, &in, kernels_reference(), NULL);
    assert_int_equal(engine_save(e, saved, 0, NULL), 0);
    assert_int_equal(engine_load(o, saved, &tag, &err), -1);
    assert_int_equal(err.code, ERR_CONFIG);
    engine_destroy(e);
    engine_destroy(o);
}

static void saving_where_there_is_no_folder_says_so(void **state) {
    (void)state;
    struct engine *e = create(kernels_reference());
    struct err err = { 0 };
    assert_int_equal(engine_save(e, "/nonexistent/inner.state", 0, &err), -1);
    assert_non_null(strstr(err.msg, "/nonexistent/"));
    engine_destroy(e);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(documents_count_by_their_targets_however_the_batch_is_cut),
        cmocka_unit_test(a_batch_without_a_target_changes_nothing_but_decay),
        cmocka_unit_test(z_loss_is_trained_on_and_reported_apart),
        cmocka_unit_test(schedule_warms_up_stays_and_decays),
        cmocka_unit_test(schedule_can_be_a_cosine_or_constant),
        cmocka_unit_test(impossible_settings_are_refused),
        cmocka_unit_test(training_lowers_the_loss),
        cmocka_unit_test(first_step_is_adamws),
        cmocka_unit_test(same_batches_give_the_same_bits),
        cmocka_unit_test(a_matrix_steps_along_its_orthogonal_momentum),
        cmocka_unit_test(every_optimizer_learns_and_goes_on_bit_for_bit),
        cmocka_unit_test(second_moments_of_fewer_bits_go_from_one_to_another),
        cmocka_unit_test(a_loss_that_is_not_finite_changes_nothing),
        cmocka_unit_test(a_step_that_is_not_finite_names_the_place),
        cmocka_unit_test(tokens_outside_the_vocabulary_are_refused),
        cmocka_unit_test(a_partial_batch_trains_on_what_there_is),
        cmocka_unit_test(a_step_is_seen_layer_by_layer),
        cmocka_unit_test(evaluation_runs_in_pieces),
        cmocka_unit_test(a_joiner_takes_second_moments_in_pieces),
        cmocka_unit_test(second_moments_from_outside_are_checked),
        cmocka_unit_test(a_loaded_state_goes_on_bit_for_bit),
        cmocka_unit_test(a_state_saved_beside_training_is_of_one_moment),
        cmocka_unit_test(a_save_that_failed_beside_training_is_told_later),
        cmocka_unit_test(damaged_states_are_refused_and_change_nothing),
        cmocka_unit_test(the_state_of_another_model_is_refused),
        cmocka_unit_test(saving_where_there_is_no_folder_says_so),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
