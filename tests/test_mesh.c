/* Training as several rank processes: the same network, batches and settings must give the same losses
 * whatever the mesh. Every mesh is real processes, started from a fresh one, as a trainer starts its. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/kernels.h"
#include "node/engine.h"
#include "node/layout.h"
#include "node/mesh.h"
#include "node/model.h"
#include "proto/model.h"
#include "proto/proto.h"

#define SEQUENCE 16
#define BATCH 6
#define VOCABULARY 48
#define STEPS_MAX 50
#define ELEMENTS_MAX 40000u
#define WATCHDOG_S 120

enum backend { FP32, BF16, STOCHASTIC };

struct job {
    int tp, dp, shard;
    enum backend backend;
    uint32_t steps;
    int untied, documents;
    uint32_t samples;                /* of a batch; 0: BATCH */
    uint32_t micro;                  /* samples at once; 0: all */
    uint32_t bad_step;               /* in this step sample 0 has a token that is none; 0: never */
    float poison;                    /* what a weight of layer 1 is; 0: as it is */
    uint8_t optimizer, states;       /* of the settings */
    const char *load, *save;         /* a saved state to begin with and to leave; NULL: neither */
};

/* What rank 0 found, and the parameters, to which all ranks write. */
struct outcome {
    int rc;
    struct err err;
    double loss[STEPS_MAX], norm[STEPS_MAX], eval;
    float params[ELEMENTS_MAX];
};
static struct outcome *shared;

static struct msg_model network(const struct job *j) {
    return (struct msg_model){ .layers = 2, .width = 32, .heads = 8, .kv_heads = 8, .ffn = 48,
                               .vocabulary = VOCABULARY, .sequence = SEQUENCE, .rope_theta = 1e4,
                               .norm_eps = 1e-5, .tied = !j->untied };
}

static struct msg_inner settings(const struct job *j) {
    return (struct msg_inner){ .batch = BATCH, .lr = 4e-3, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
                               .weight_decay = 0.1, .clip = 1, .z_loss = 1e-3, .max_z_loss = 1e-3,
                               .warmup_tokens = 200, .decay_tokens = 2000, .total_tokens = 100000,
                               .optimizer = j->optimizer, .states = j->states };
}

static struct kernels *kernels_of(enum backend b, struct err *err) {
    return b == FP32 ? kernels_cpu_create(1, err) : kernels_cpu_bf16_create(1, b == STOCHASTIC, err);
}

/* A language with something to learn. */
static void fill_batch(int32_t *tokens, uint32_t samples, uint32_t number) {
    for (uint32_t s = 0; s < samples; s++) {
        uint32_t a = (number * 7 + s * 5) % VOCABULARY;
        for (uint32_t t = 0; t <= SEQUENCE; t++) {
            *tokens++ = (int32_t)a;
            a = (number + s + t) % 11 == 0 ? (a + 9) % VOCABULARY : (3 * a + 1) % VOCABULARY;
        }
    }
}

static void begin(struct engine *e, const struct job *j) {
    size_t n = engine_elements(e);
    float *init = malloc(n * sizeof *init);
    model_init_elements(engine_model(e), 0.05f, 1, 0, n, init);
    engine_params_write(e, 0, n, init);
    free(init);
    if (j->documents) engine_set_document_end(e, 7);
    struct proto_tensor up;
    proto_model_tensor_find(engine_model(e), "model.layers.1.mlp.up_proj.weight", &up, NULL);
    if (j->poison != 0) /* the last tensor-parallel rank's */
        engine_params_write(e, (size_t)(up.offset + up.count) - 1, 1, &j->poison);
    if (j->micro) engine_limit_micro_batch(e, j->micro);
}

/* One step as a trainer takes it: each rank has its own samples alone. */
static int take_step(struct engine *e, const struct job *j, uint32_t number, struct engine_result *r,
                     struct err *err) {
    uint32_t samples = j->samples ? j->samples : BATCH, first, share;
    int32_t tokens[BATCH * (SEQUENCE + 1)];
    fill_batch(tokens, samples, number);
    if (j->bad_step == number) tokens[3] = VOCABULARY;
    engine_share(e, samples, &first, &share);
    memmove(tokens, tokens + first * (SEQUENCE + 1), share * (SEQUENCE + 1) * sizeof *tokens);
    return engine_step(e, tokens, samples, (uint64_t)number * samples * SEQUENCE, r, err);
}

static int train(const struct job *j, struct engine *e, int rank, struct err *err) {
    struct engine_result r;
    uint64_t tag = 0;
    begin(e, j);
    if (j->load && engine_load(e, j->load, &tag, err)) return -1;
    for (uint32_t i = 0; i < j->steps; i++) {
        uint32_t number = (uint32_t)tag + i + 1;
        int bad = take_step(e, j, number, &r, err);
        if (bad && !(err->code == ERR_CORRUPT && j->bad_step == number)) return -1;
        if (rank == 0) shared->loss[i] = bad ? -1 : r.loss;
        if (rank == 0) shared->norm[i] = bad ? -1 : r.grad_norm;
    }
    engine_params_read(e, 0, engine_elements(e), shared->params);
    uint32_t first, share;
    int32_t tokens[BATCH * (SEQUENCE + 1)];
    double loss;
    fill_batch(tokens, BATCH - 1, 1000);
    engine_share(e, BATCH - 1, &first, &share);
    if (engine_eval_loss(e, tokens + first * (SEQUENCE + 1), BATCH - 1, &loss, err)) return -1;
    if (rank == 0) shared->eval = loss;
    return 0;
}

static int save(const struct job *j, const struct mesh *m, const struct engine *e, struct err *err) {
    struct engine_snapshot *s = engine_snapshot_create(e, m->state, err);
    int rc = !s || engine_snapshot_take(s, e, j->steps, err) ? -1 : 0;
    if (rc == 0 && m->rank == 0) rc = engine_snapshot_write(s, j->save, err);
    engine_snapshot_destroy(s);
    return rc;
}

/* A process's whole life. */
static int rank_main(const struct job *j) {
    struct mesh m;
    struct err err = { 0 };
    struct msg_model net = network(j);
    struct msg_inner in = settings(j);
    struct kernels *k = NULL;
    struct engine *e = NULL;
    alarm(WATCHDOG_S);
    int rc = mesh_start(&m, j->tp, j->dp, 3 * ELEMENTS_MAX * sizeof(float), &err);
    struct engine_mesh where = { .world = m.world, .tensor = m.tensor, .data = m.data,
                                 .shard = (enum engine_shard)j->shard };
    if (rc == 0 && !(k = kernels_of(j->backend, &err))) rc = -1;
    if (rc == 0 && !(e = engine_create_rank(&net, &in, k, &where, &err))) rc = -1;
    if (rc == 0) rc = train(j, e, m.rank, &err);
    if (rc == 0 && j->save) rc = save(j, &m, e, &err);
    if (rc) mesh_fail(&m, &err);
    engine_destroy(e);
    if (k) k->destroy(k);
    if (m.rank == 0) shared->err = err;
    mesh_end(&m, rc ? 1 : 0);
    return rc ? 1 : 0;
}

static int run_raw(const struct job *j, struct outcome *out) {
    int status;
    memset(shared, 0, sizeof *shared);
    fflush(NULL);
    pid_t pid = fork(); /* a process without OpenMP's threads */
    assert_true(pid >= 0);
    if (pid == 0) _exit(rank_main(j));
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (out) memcpy(out, shared, sizeof *out);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

static struct outcome *run(struct job j) {
    struct outcome *out = malloc(sizeof *out);
    int rc = run_raw(&j, out);
    if (rc) fail_msg("%d x %d, %s: %d, %s", j.tp, j.dp, engine_shard_name(j.shard), rc, out->err.msg);
    return out;
}

static int set_up(void **state) {
    (void)state;
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return shared == MAP_FAILED || proto_init(NULL) ? -1 : 0;
}

static double furthest(const struct outcome *a, const struct outcome *b, uint32_t steps) {
    double worst = 0;
    for (uint32_t i = 0; i < steps; i++) {
        double d = fabs(a->loss[i] - b->loss[i]);
        if (!(d <= worst)) worst = d;
    }
    return worst;
}

static void assert_close_losses(const struct outcome *a, const struct outcome *b, uint32_t steps) {
    double worst = furthest(a, b, steps);
    assert_true(a->loss[steps - 1] < a->loss[0] - 0.5); /* something was learnt */
    if (!(worst < 1e-5)) fail_msg("losses differ by up to %g", worst);
    assert_true(fabs(a->eval - b->eval) < 1e-4 && a->eval > 0);
}

static void assert_same_bits(const struct outcome *a, const struct outcome *b) {
    assert_memory_equal(a->loss, b->loss, sizeof a->loss);
    assert_memory_equal(a->norm, b->norm, sizeof a->norm);
    assert_memory_equal(a->params, b->params, sizeof a->params);
}

/* ---- who holds what ---------------------------------------------------------------------------- */

struct cover {
    const struct layout *l;
    uint8_t *held, *owned; /* [canonical elements] */
    size_t local;
};

static void mark(void *arg, const struct layout_run *run) {
    struct cover *c = arg;
    struct layout_run r = *run;
    for (size_t i = 0; i < r.count; i++) c->held[r.canonical + i]++;
    c->local += r.count;
    assert_true(r.local + r.count <= c->l->n);
    if ((!r.shared || c->l->tp_rank == 0) && layout_own(c->l, &r))
        for (size_t i = 0; i < r.count; i++) c->owned[r.canonical + i]++;
}

/* An element that two ranks answered for, or none, would be counted twice in a norm or lost in a file. */
static void every_element_has_one_owner(void **state) {
    (void)state;
    static const int mesh[][2] = { { 1, 1 }, { 1, 2 }, { 1, 5 }, { 2, 1 }, { 4, 3 }, { 8, 2 } };
    for (size_t i = 0; i < 2 * sizeof mesh / sizeof *mesh; i++) {
        int tp = mesh[i / 2][0], dp = mesh[i / 2][1];
        struct msg_model m = network(&(struct job){ .untied = i % 2 });
        size_t n = (size_t)proto_model_elements(&m), held = 0;
        uint8_t *count = calloc(2 * n, 1);
        for (int r = 0; r < tp * dp; r++) {
            struct layout l;
            layout_init(&l, &m, tp, r % tp, dp, r / tp);
            struct cover c = { .l = &l, .held = count, .owned = count + n };
            layout_each(&l, 0, n / 3, mark, &c); /* in two ranges, cut anywhere */
            layout_each(&l, n / 3, n - n / 3, mark, &c);
            held += c.local;
            assert_true(l.n % (size_t)dp == 0 && l.n >= c.local);
        }
        for (size_t e = 0; e < n; e++) {
            assert_int_equal(count[n + e], 1);
            assert_true(count[e] == dp || count[e] == tp * dp);
        }
        if (tp == 1) assert_true(held == n * (size_t)dp);
        free(count);
    }
}

/* ---- data parallel ----------------------------------------------------------------------------- */

/* Six samples on one, two, four (two of them with one more) and six ranks. */
static void data_parallel_ranks_lose_what_one_loses(void **state) {
    (void)state;
    static const int ranks[] = { 2, 4, 6 };
    struct outcome *alone = run((struct job){ .tp = 1, .dp = 1, .steps = STEPS_MAX });
    for (size_t i = 0; i < 3; i++) {
        struct outcome *o = run((struct job){ .tp = 1, .dp = ranks[i], .steps = STEPS_MAX });
        assert_close_losses(alone, o, STEPS_MAX);
        free(o);
    }
    free(alone);
}

/* Who updates an element has no say in its value: gradients are added in rank order everywhere. */
static void sharding_changes_no_bit(void **state) {
    (void)state;
    for (int b = FP32; b <= STOCHASTIC; b++)
        for (int dp = 2; dp <= 3; dp++) {
            struct job j = { .tp = 1, .dp = dp, .steps = 8, .backend = (enum backend)b, .documents = 1 };
            struct outcome *none = run(j);
            for (j.shard = ENGINE_SHARD_OPTIMIZER; engine_shard_name(j.shard); j.shard++) {
                struct outcome *sharded = run(j);
                assert_same_bits(none, sharded);
                free(sharded);
            }
            free(none);
        }
}

/* The rest of a lease may have fewer samples than there are ranks. */
static void a_rank_without_samples_keeps_in_step(void **state) {
    (void)state;
    struct outcome *alone = run((struct job){ .tp = 1, .dp = 1, .steps = 20, .samples = 2 });
    for (int shard = 0; engine_shard_name(shard); shard++) {
        struct outcome *o = run((struct job){ .tp = 1, .dp = 3, .steps = 20, .samples = 2, .shard = shard });
        assert_true(furthest(alone, o, 20) < 1e-5);
        free(o);
    }
    free(alone);
}

/* Gradients of several micro-batches are added up where they are kept: whole, or in slices, whose ranks with
 * fewer samples pass over none while the others work. */
static void micro_batches_add_up_whatever_is_sharded(void **state) {
    (void)state;
    struct job j = { .tp = 1, .dp = 1, .steps = 20, .samples = 5, .untied = 1, .documents = 1 };
    struct outcome *alone = run(j);
    j.micro = 1, j.dp = 3;
    for (j.shard = 0; engine_shard_name(j.shard); j.shard++)
        for (j.tp = 1; j.tp <= 2; j.tp++) {
            struct outcome *o = run(j);
            assert_true(furthest(alone, o, 20) < 1e-5);
            assert_true(fabs(alone->eval - o->eval) < 1e-4);
            free(o);
        }
    free(alone);
}

/* One rank alone sees what is wrong; none may take the step, and the next one is as if it had not been. */
static void a_token_that_is_none_stops_the_step_on_every_rank(void **state) {
    (void)state;
    struct outcome *alone = run((struct job){ .tp = 1, .dp = 1, .steps = 6, .bad_step = 3 });
    struct outcome *o = run((struct job){ .tp = 1, .dp = 2, .steps = 6, .bad_step = 3, .shard = 1 });
    assert_true(o->loss[2] == -1 && o->loss[3] > 0);
    assert_true(furthest(alone, o, 6) < 1e-5);
    free(alone);
    free(o);
}

/* ---- tensor parallel --------------------------------------------------------------------------- */

/* The same network in 2, 4 and 8 pieces: with its own head and without, whole sequences and documents. */
static void tensor_parallel_ranks_lose_what_one_loses(void **state) {
    (void)state;
    for (int kind = 0; kind < 2; kind++) {
        struct job j = { .tp = 1, .dp = 1, .steps = STEPS_MAX, .untied = kind, .documents = kind };
        struct outcome *alone = run(j);
        for (j.tp = 2; j.tp <= 8; j.tp *= 2) {
            struct outcome *o = run(j);
            assert_close_losses(alone, o, STEPS_MAX);
            print_message("tp %d: losses of %d steps, %.3f to %.3f, differ by up to %.2g\n", j.tp, STEPS_MAX,
                          o->loss[0], o->loss[STEPS_MAX - 1], furthest(alone, o, STEPS_MAX));
            free(o);
        }
        free(alone);
    }
}

/* Both at once, with the optimizer shared out: 2 x 2 and 4 x 2 ranks. */
static void a_mesh_of_both_loses_what_one_loses(void **state) {
    (void)state;
    struct outcome *alone = run((struct job){ .tp = 1, .dp = 1, .steps = STEPS_MAX, .untied = 1 });
    for (int i = 0; i < 8; i++) {
        struct job j = { .tp = i & 1 ? 4 : 2, .dp = 2, .shard = i / 2, .steps = STEPS_MAX, .untied = 1 };
        struct outcome *o = run(j), *again = run(j);
        assert_close_losses(alone, o, STEPS_MAX);
        assert_same_bits(o, again);
        free(o);
        free(again);
    }
    free(alone);
}

/* bf16 is coarse, so only about the same is asked; but sharding still changes no bit. */
static void bf16_works_in_a_mesh(void **state) {
    (void)state;
    for (int b = BF16; b <= STOCHASTIC; b++) {
        struct job j = { .tp = 1, .dp = 1, .steps = 20, .backend = (enum backend)b };
        struct outcome *alone = run(j);
        j.tp = 2, j.dp = 2;
        struct outcome *none = run(j);
        j.shard = ENGINE_SHARD_OPTIMIZER;
        struct outcome *sharded = run(j);
        assert_same_bits(none, sharded);
        j.shard = ENGINE_SHARD_FULL;
        struct outcome *full = run(j);
        assert_true(furthest(full, none, 20) < 0.05);
        free(full);
        assert_true(furthest(alone, none, 20) < 0.05 && none->loss[19] < none->loss[0] - 0.5);
        free(alone), free(none), free(sharded);
    }
}

/* A matrix is orthogonal as a whole, wherever its pieces are, and whoever takes the step. */
static void muon_works_in_a_mesh(void **state) {
    (void)state;
    static const int mesh[][3] = { { 2, 1, 0 }, { 4, 1, 0 }, { 8, 1, 0 }, { 1, 2, 0 }, { 1, 3, 1 },
                                   { 2, 2, 1 }, { 2, 2, 2 }, { 4, 2, 3 }, { 1, 2, 3 } };
    struct job j = { .tp = 1, .dp = 1, .steps = 30, .optimizer = OPTIMIZER_MUON };
    struct outcome *alone = run(j);
    for (size_t i = 0; i < sizeof mesh / sizeof *mesh; i++) {
        j.tp = mesh[i][0], j.dp = mesh[i][1], j.shard = mesh[i][2];
        struct outcome *o = run(j);
        assert_close_losses(alone, o, 30);
        free(o);
    }
    j.tp = 1, j.dp = 2, j.shard = 0;
    struct outcome *none = run(j);
    for (j.shard = 1; engine_shard_name(j.shard); j.shard++) {
        struct outcome *o = run(j);
        assert_same_bits(none, o);
        free(o);
    }
    free(alone), free(none);
}

/* Ranks that have all of it round alike; bf16 rounds an element alike wherever it is kept. */
static void moments_of_fewer_bits_work_in_a_mesh(void **state) {
    (void)state;
    for (int i = 0; i < 8; i++) {
        struct job j = { .tp = 1, .dp = 1, .steps = 20, .states = (uint8_t)(1 + i % 2),
                         .optimizer = (uint8_t)(i / 2 % 2), .backend = i / 4 ? STOCHASTIC : FP32 };
        struct outcome *alone = run(j);
        j.tp = 2, j.dp = 2;
        struct outcome *none = run(j);
        j.shard = ENGINE_SHARD_OPTIMIZER;
        struct outcome *sharded = run(j);
        if (j.states == STATES_BF16) assert_same_bits(none, sharded);
        assert_true(furthest(alone, none, 20) < 0.05 && furthest(alone, sharded, 20) < 0.05);
        assert_true(none->loss[19] < none->loss[0] - 0.5);
        free(alone), free(none), free(sharded);
    }
}

/* One of two tensor-parallel ranks, which compute again what they did not keep. */
static int again_main(const struct mesh *m, const struct kernels *k, struct err *err) {
    struct msg_model net = network(&(struct job){ 0 });
    struct layout l;
    layout_init(&l, &net, m->tp, m->rank, 1, 0);
    float *params = k->alloc(k, l.n * 4, err), *grads[2];
    for (int i = 0; i < 2; i++) grads[i] = k->alloc(k, l.n * sizeof(float), err);
    for (size_t i = 0; i < l.n; i++) params[i] = (float)((i * 37 + (size_t)m->rank) % 101) * 2e-3f - 0.1f;
    int32_t tokens[2 * (SEQUENCE + 1)];
    fill_batch(tokens, 2, 5);
    for (enum model_training t = MODEL_TRAINS; t <= MODEL_AGAIN_LAYER; t++) {
        float *g = grads[t > MODEL_TRAINS];
        struct model_loss loss;
        struct model *model = model_create_piece(&l, m->tensor, k, 2, SEQUENCE, t, err);
        int rc = !model || model_backward(model, params, g, tokens, 2, SEQUENCE, 0.1f, KERNELS_SET, &loss,
                                          err);
        model_destroy(model);
        if (rc || m->tensor->check(m->tensor, err)) return -1;
        if (!(loss.nats > 1)) return err_set(err, ERR_CORRUPT, "step %d: loss %g", t, loss.nats);
        if (memcmp(grads[0], g, l.n * sizeof *g)) return err_set(err, ERR_CORRUPT, "step %d: other bits", t);
    }
    for (int i = 0; i < 2; i++) k->free(k, grads[i]);
    k->free(k, params);
    return 0;
}

static void computing_again_changes_no_bit_in_a_mesh(void **state) {
    (void)state;
    int status;
    fflush(NULL);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        struct mesh m;
        struct err err = { 0 };
        alarm(WATCHDOG_S);
        int rc = mesh_start(&m, 2, 1, 0, &err);
        struct kernels *k = rc ? NULL : kernels_cpu_create(1, &err);
        rc = k ? again_main(&m, k, &err) : -1;
        if (rc) fprintf(stderr, "rank %d: %s\n", m.rank, err.msg);
        if (rc) mesh_fail(&m, &err);
        if (k) k->destroy(k);
        mesh_end(&m, rc != 0);
        _exit(rc != 0);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* Nothing is guessed where heads do not come out even; the number that would do is said. */
static void what_cannot_be_cut_evenly_is_refused(void **state) {
    (void)state;
    struct outcome *out = malloc(sizeof *out);
    assert_int_equal(run_raw(&(struct job){ .tp = 3, .dp = 1, .steps = 1 }, out), 1);
    assert_int_equal(out->err.code, ERR_CONFIG);
    assert_non_null(strstr(out->err.msg, "3 tensor-parallel ranks cannot share the model's 8 heads evenly"));
    struct msg_model m = network(&(struct job){ 0 });
    struct err err = { 0 };
    m.kv_heads = 2;
    assert_int_equal(layout_check(&m, 4, &err), -1);
    assert_non_null(strstr(err.msg, "2 kv_heads"));
    assert_int_equal(layout_check(&m, 2, &err), 0);
    m.vocabulary = 257;
    assert_int_equal(layout_check(&m, 2, &err), -1);
    assert_non_null(strstr(err.msg, "257 vocabulary"));
    free(out);
}

/* The rank that has the weight may be any; the one that speaks has to know. */
static void where_a_step_went_wrong_is_known_to_all(void **state) {
    (void)state;
    for (int shard = 0; engine_shard_name(shard); shard++) {
        struct job j = { .tp = 2, .dp = 2, .shard = shard, .steps = 1, .poison = NAN };
        struct outcome *out = malloc(sizeof *out);
        assert_int_equal(run_raw(&j, out), 1);
        assert_int_equal(out->err.code, ERR_CORRUPT);
        assert_non_null(strstr(out->err.msg, "the output of layer 1 is not finite"));
        free(out);
    }
}

/* ---- saved state ------------------------------------------------------------------------------- */

static char *file_bytes(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    char *bytes = malloc(1 << 20);
    *n = fread(bytes, 1, 1 << 20, f);
    fclose(f);
    return bytes;
}

/* A machine that lost a card goes on with the cards it has. */
static void a_saved_state_goes_on_in_another_mesh(void **state) {
    (void)state;
    char folder[] = "/tmp/test-mesh-XXXXXX", a[64], b[64];
    assert_non_null(mkdtemp(folder));
    snprintf(a, sizeof a, "%s/a", folder);
    snprintf(b, sizeof b, "%s/b", folder);
    struct job whole = { .tp = 1, .dp = 2, .steps = 12, .shard = ENGINE_SHARD_OPTIMIZER, .save = b };
    struct job first = whole, second = whole;
    first.steps = second.steps = 6;
    first.save = a;
    second.load = a;
    second.save = NULL;
    struct outcome *w = run(whole), *f = run(first), *s = run(second);
    assert_memory_equal(w->loss, f->loss, 6 * sizeof *w->loss);
    assert_memory_equal(w->loss + 6, s->loss, 6 * sizeof *w->loss); /* cut and whole: the same bits */
    assert_memory_equal(w->params, s->params, sizeof w->params);
    second.dp = 1;
    struct outcome *o = run(second);
    for (int i = 0; i < 6; i++) assert_true(fabs(o->loss[i] - w->loss[6 + i]) < 1e-5);
    second.tp = 4, second.dp = 2, second.shard = ENGINE_SHARD_FULL;
    struct outcome *t = run(second);
    for (int i = 0; i < 6; i++) assert_true(fabs(t->loss[i] - w->loss[6 + i]) < 1e-5);
    size_t n, m;
    char *x = file_bytes(a, &n);
    first.save = b;
    for (first.shard = 0; engine_shard_name(first.shard); first.shard++) {
        free(run(first));
        char *y = file_bytes(b, &m);
        assert_true(n == m && n > 10000 && !memcmp(x, y, n));
        free(y);
    }
    free(x), free(w), free(f), free(s), free(o), free(t);
    unlink(a), unlink(b), rmdir(folder);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_element_has_one_owner),
        cmocka_unit_test(data_parallel_ranks_lose_what_one_loses),
        cmocka_unit_test(sharding_changes_no_bit),
        cmocka_unit_test(a_rank_without_samples_keeps_in_step),
        cmocka_unit_test(micro_batches_add_up_whatever_is_sharded),
        cmocka_unit_test(a_token_that_is_none_stops_the_step_on_every_rank),
        cmocka_unit_test(tensor_parallel_ranks_lose_what_one_loses),
        cmocka_unit_test(a_mesh_of_both_loses_what_one_loses),
        cmocka_unit_test(bf16_works_in_a_mesh),
        cmocka_unit_test(muon_works_in_a_mesh),
        cmocka_unit_test(moments_of_fewer_bits_work_in_a_mesh),
        cmocka_unit_test(computing_again_changes_no_bit_in_a_mesh),
        cmocka_unit_test(what_cannot_be_cut_evenly_is_refused),
        cmocka_unit_test(where_a_step_went_wrong_is_known_to_all),
        cmocka_unit_test(a_saved_state_goes_on_in_another_mesh),
    };
    return cmocka_run_group_tests(tests, set_up, NULL);
}
