/* train.c - matrix products and whole training steps, beside dnnl_sgemm. */
#include <omp.h>
#include <oneapi/dnnl/dnnl.h>
#include <stdio.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "node/engine.h"
#include "node/model.h"
#include "proto/model.h"
#include "tests/bench/bench.h"

/* ---- matrix products ------------------------------------------------------------------------- */

/* The products of one layer, [rows,in] x [out,in]. */
enum { FORWARD, INPUT, WEIGHT, PLAIN, DIRECTIONS };
#define PRODUCTS 4

struct layer {
    struct kernels *k;
    int rows, in[PRODUCTS], out[PRODUCTS];
    float *x[PRODUCTS], *w[PRODUCTS], *y[PRODUCTS];
};

static int run_forward(void *arg, struct err *err) {
    struct layer *l = arg;
    for (int i = 0; i < PRODUCTS; i++)
        l->k->matmul_forward(l->k, l->y[i], l->x[i], l->w[i], l->rows, l->in[i], l->out[i]);
    return l->k->check(l->k, err);
}

static int run_backward_input(void *arg, struct err *err) {
    struct layer *l = arg;
    for (int i = 0; i < PRODUCTS; i++)
        l->k->matmul_backward_input(l->k, l->x[i], l->y[i], l->w[i], l->rows, l->in[i], l->out[i]);
    return l->k->check(l->k, err);
}

static int run_backward_weight(void *arg, struct err *err) {
    struct layer *l = arg;
    for (int i = 0; i < PRODUCTS; i++)
        l->k->matmul_backward_weight(l->k, l->w[i], l->y[i], l->x[i], l->rows, l->in[i], l->out[i],
                                     KERNELS_SET);
    return l->k->check(l->k, err);
}

/* y = x * w, nothing transposed, straight from oneDNN. */
static int plain_product(float *y, const float *x, const float *w, int rows, int in, int out,
                         struct err *err) {
    if (dnnl_sgemm('N', 'N', rows, out, in, 1, x, in, w, out, 0, y, out) == dnnl_success) return 0;
    return err_set(err, ERR_UNSUPPORTED, "dnnl_sgemm failed");
}

static int run_plain(void *arg, struct err *err) {
    struct layer *l = arg;
    for (int i = 0; i < PRODUCTS; i++)
        if (plain_product(l->y[i], l->x[i], l->w[i], l->rows, l->in[i], l->out[i], err)) return -1;
    return 0;
}

static double layer_init(struct layer *l, const struct msg_model *m, int rows) {
    int C = (int)m->width, F = (int)m->ffn, kv = C / (int)m->heads * (int)m->kv_heads;
    int in[PRODUCTS] = {C, C, C, F}, out[PRODUCTS] = {C + 2 * kv, C, 2 * F, C};
    double flop = 0;
    l->rows = rows;
    for (int i = 0; i < PRODUCTS; i++) {
        l->in[i] = in[i];
        l->out[i] = out[i];
        l->x[i] = take_floats((size_t)rows * (size_t)in[i], 1, 1);
        l->w[i] = take_floats((size_t)in[i] * (size_t)out[i], 0.02f, 2);
        l->y[i] = take_floats((size_t)rows * (size_t)out[i], 1, 3);
        flop += 2.0 * rows * in[i] * out[i];
    }
    return flop;
}

static void layer_release(struct layer *l) {
    for (int i = 0; i < PRODUCTS; i++) {
        free(l->x[i]);
        free(l->w[i]);
        free(l->y[i]);
    }
}

int bench_matmul(struct bench *b, int preset, struct err *err) {
    static const char *const names[] = {"debug", "150m"};
    static const char *const directions[] = {"forward", "dx", "dw"};
    struct layer l;
    struct msg_model m;
    struct series s[DIRECTIONS];
    char text[64];
    if (proto_model_preset(names[preset], &m, err)) return -1;
    if (!(l.k = kernels_cpu_create(1, err))) return -1;
    omp_set_num_threads(1);
    double gigaflop = layer_init(&l, &m, 1024) / 1e9;
    struct task task[DIRECTIONS] = {{run_forward, &l, NULL}, {run_backward_input, &l, NULL},
                                    {run_backward_weight, &l, NULL}, {run_plain, &l, NULL}};
    if (time_on_core(task, s, DIRECTIONS, 2, err)) return -1;
    for (int i = FORWARD; i <= WEIGHT; i++) {
        snprintf(text, sizeof text, "matmul fp32, a layer of %s, %s, one core", names[preset],
                 directions[i]);
        row_rate(b, text, "GFLOP/s", gigaflop, &s[i], "dnnl_sgemm, not transposed", gigaflop,
                 &s[PLAIN]);
    }
    layer_release(&l);
    l.k->destroy(l.k);
    return 0;
}

/* ---- inner training -------------------------------------------------------------------------- */

#define SQUARE 1024
#define STEP_TOKENS_MAX 2048 /* AdamW, once a step, is then 2 % of 10m's time, not less */

struct training {
    struct engine *engine;
    int32_t *tokens;
    uint32_t samples;
    int threads;
    float *a, *b, *c; /* [SQUARE,SQUARE] */
};

static int run_step(void *arg, struct err *err) {
    struct training *t = arg;
    struct engine_result r;
    return engine_step(t->engine, t->tokens, t->samples, 1000000, &r, err);
}

static int run_square(void *arg, struct err *err) {
    struct training *t = arg;
    omp_set_num_threads(t->threads);
    return plain_product(t->c, t->a, t->b, SQUARE, SQUARE, SQUARE, err);
}

static uint64_t next_random(uint64_t *state) { /* xorshift64 */
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

/* Causal, forward and backward, of one token: 6 for each weight of a matrix that is multiplied with
 * (an embedding is looked up, unless it is the head too), and 12 C per layer and key in attention,
 * where a token has (T + 1) / 2 keys on average. */
static double flop_per_token(const struct msg_model *m) {
    double matrices = 0;
    for (uint32_t i = 0; i < proto_model_tensor_count(m); i++) {
        struct proto_tensor t;
        proto_model_tensor(m, i, &t);
        if (t.dims == 2 && (t.role != MODEL_EMBED || m->tied)) matrices += (double)t.count;
    }
    return 6 * matrices + 12.0 * m->width * m->layers * (m->sequence + 1) / 2;
}

static int training_init(struct training *t, const char *preset, const struct kernels *k,
                         struct msg_model *m, struct err *err) {
    struct msg_inner inner;
    float std;
    uint64_t random = 1;
    if (proto_model_preset(preset, m, err) ||
        proto_inner_preset(preset, 1000000000, &inner, &std, err))
        return -1;
    if (!(t->engine = engine_create(m, &inner, k, err))) return -1;
    size_t n = engine_elements(t->engine), ids = (size_t)inner.batch * (m->sequence + 1);
    float *params = take_memory(n * sizeof *params);
    model_init_elements(m, std, 1, 0, n, params);
    engine_params_write(t->engine, 0, n, params);
    free(params);
    t->samples = inner.batch;
    while (t->samples * m->sequence > STEP_TOKENS_MAX) t->samples /= 2;
    t->tokens = take_memory(ids * sizeof *t->tokens);
    for (size_t i = 0; i < ids; i++)
        t->tokens[i] = (int32_t)(next_random(&random) % m->vocabulary);
    return 0;
}

/* threads: 1 or 2. */
static int train(struct bench *b, const char *preset, int threads, struct err *err) {
    struct training t = {.threads = threads};
    struct msg_model m;
    struct series s[2];
    char text[64];
    struct kernels *k = kernels_cpu_create(threads, err);
    if (!k || training_init(&t, preset, k, &m, err)) return -1;
    size_t square = (size_t)SQUARE * SQUARE;
    t.a = take_floats(square, 1, 1);
    t.b = take_floats(square, 1, 2);
    t.c = take_floats(square, 1, 3);
    struct task task[] = {{run_step, &t, NULL}, {run_square, &t, NULL}};
    int (*timer)(const struct task *, struct series *, int, double, struct err *) =
        threads == 1 ? time_on_core : time_in_turns;
    if (timer(task, s, 2, 2, err)) return -1;
    double tokens = (double)t.samples * m.sequence, flop = flop_per_token(&m);
    double product = 2.0 * SQUARE * SQUARE * SQUARE;
    const char *on = threads == 1 ? "one core" : "two threads";
    snprintf(text, sizeof text, "training, preset %s, %s", preset, on);
    row_rate(b, text, "tokens/s", tokens, &s[0], "as dnnl_sgemm would", product / flop, &s[1]);
    snprintf(text, sizeof text, "    causal model FLOP/s, %s, %s", preset, on);
    row_rate(b, text, "GFLOP/s", tokens * flop / 1e9, &s[0], "dnnl_sgemm, 1024 x 1024 x 1024",
             product / 1e9, &s[1]);
    free(t.a);
    free(t.b);
    free(t.c);
    free(t.tokens);
    engine_destroy(t.engine);
    k->destroy(k);
    return 0;
}

int bench_debug(struct bench *b, int threads, struct err *err) {
    return threads <= b->cores ? train(b, "debug", threads, err) : 0;
}

int bench_10m(struct bench *b, int threads, struct err *err) {
    return threads <= b->cores ? train(b, "10m", threads, err) : 0;
}
