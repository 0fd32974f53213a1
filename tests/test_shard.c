/* What data-parallel ranks say to each other beside what they compute (node/shard.h), on the emulator of a GPU,
 * whose streams go in any order that events allow: through memory that ranks open in each other, and through NCCL's
 * stand-in. Real processes, as in training. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/plugin.h"
#include "node/engine.h"
#include "node/mesh.h"
#include "node/model.h"
#include "proto/model.h"
#include "tests/nccl_stand_in.h"

#define LAYERS 4 /* more than have room, shard.h */
#define SEQUENCE 8
#define BATCH 4
#define VOCABULARY 32
#define STEPS 2
#define ELEMENTS_MAX 20000u
#define WATCHDOG_S 120

/* Streams: as asked for; as late as can be; as a seed has it. */
struct job {
    int dp, shard, nccl, bf16, untied;
    uint32_t micro; /* samples at once; 0: all */
    int alone;      /* nothing goes beside */
    int late, order;
    int loses, loses_one; /* of the emulator, from 1 on; 0: none, all */
};

struct outcome {
    int rc;
    struct err err;
    double loss[STEPS], norm[STEPS];
    float params[ELEMENTS_MAX];
    /* How much was under way when a layer's attention was asked for, forward and back, in the last pass. */
    int forward[2 * LAYERS], backward[LAYERS], forwards, backwards;
};
static struct outcome *shared;

static void number(const char *name, int value, int unless) {
    char text[16];
    snprintf(text, sizeof text, "%d", value);
    if (value == unless) unsetenv(name);
    else setenv(name, text, 1);
}

/* The device's has many blocks whatever n is, for which the emulator takes a second. */
static double sum_squares(const struct kernels *k, const float *device_x, size_t n) {
    float x[ELEMENTS_MAX];
    double sum = 0;
    assert_true(n <= ELEMENTS_MAX);
    k->copy_out(k, x, device_x, n * sizeof *x);
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * x[i];
    return sum;
}

static struct kernels *device(const struct job *j, int rank, struct err *err) {
    number("EMULATOR_DEVICES", 8, 0);
    number("EMULATOR_LATE", j->late, 0);
    number("EMULATOR_ORDER", j->order ? j->order * 8 + rank : 0, 0);
    number("EMULATOR_LOSES", j->loses - 1, -1);
    number("EMULATOR_LOSES_ONE", j->loses_one - 1, -1);
    struct kernels *k = intellect_cuda_create(KERNELS_PLUGIN_ABI, j->nccl ? rank : 0, j->bf16 ? 2 : 4,
                                              j->bf16 ? 2 : 0, err);
    if (k) k->sum_squares = sum_squares;
    if (k && j->alone) k->aside = NULL;
    return k;
}

/* ---- what is under way ----------------------------------------------------------------------------- */

static struct kernels asked; /* entries that the ones below stand before */
static uint32_t ended, finished;

static uint32_t end(const struct kernels *k) { return ended = asked.aside->end(k); }

static void finish(const struct kernels *k, uint32_t n) {
    if (n > finished) finished = n;
    asked.aside->finish(k, n);
}

static void attention_forward(const struct kernels *k, void *out, float *lse, const void *qkv,
                              const int32_t *start, int B, int T, int H, int KV, int D) {
    if (shared->forwards < 2 * LAYERS) shared->forward[shared->forwards++] = (int)(ended - finished);
    asked.attention_forward(k, out, lse, qkv, start, B, T, H, KV, D);
}

static void attention_backward(const struct kernels *k, void *dqkv, const void *dout, const void *qkv,
                               const void *out, const float *lse, const int32_t *start, int B, int T, int H,
                               int KV, int D) {
    if (shared->backwards < LAYERS) shared->backward[shared->backwards++] = (int)(ended - finished);
    asked.attention_backward(k, dqkv, dout, qkv, out, lse, start, B, T, H, KV, D);
}

static void watch(struct kernels *k) {
    static struct kernels_aside aside;
    asked = *k;
    aside = (struct kernels_aside){ .begin = k->aside->begin, .end = end, .finish = finish };
    k->aside = &aside;
    k->attention_forward = attention_forward;
    k->attention_backward = attention_backward;
}

/* ---- a rank's life --------------------------------------------------------------------------------- */

static int train(const struct job *j, struct engine *e, int rank, struct err *err) {
    size_t n = engine_elements(e);
    float *init = malloc(n * sizeof *init);
    model_init_elements(engine_model(e), 0.05f, 1, 0, n, init);
    engine_params_write(e, 0, n, init);
    free(init);
    if (j->micro) engine_limit_micro_batch(e, j->micro);
    for (int step = 0; step < STEPS; step++) {
        struct engine_result r;
        uint32_t first, share;
        int32_t tokens[BATCH * (SEQUENCE + 1)];
        for (int i = 0; i < BATCH * (SEQUENCE + 1); i++) tokens[i] = (i * i + 5 * step) % VOCABULARY;
        engine_share(e, BATCH, &first, &share);
        if (engine_step(e, tokens + first * (SEQUENCE + 1), BATCH, 1000, &r, err)) return -1;
        if (rank == 0) shared->loss[step] = r.loss, shared->norm[step] = r.grad_norm;
    }
    engine_params_read(e, 0, n, shared->params);
    return 0;
}

static int rank_main(const struct job *j) {
    const struct msg_model net = { .layers = LAYERS, .width = 16, .heads = 2, .kv_heads = 1, .ffn = 24,
                                   .vocabulary = VOCABULARY, .sequence = SEQUENCE, .rope_theta = 1e4,
                                   .norm_eps = 1e-5, .tied = !j->untied };
    const struct msg_inner in = { .batch = BATCH, .lr = 4e-3, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .clip = 1,
                                  .total_tokens = 100000 };
    struct mesh m;
    struct err err = { 0 };
    struct kernels *k = NULL;
    struct engine *e = NULL;
    alarm(WATCHDOG_S);
    int rc = mesh_start(&m, 1, j->dp, 0, &err);
    if (rc == 0 && (!(k = device(j, m.rank, &err)) || mesh_use(&m, k, &err))) rc = -1;
    if (rc == 0 && m.rank == 0 && !j->alone) watch(k);
    struct engine_mesh where = { .world = m.world, .tensor = m.tensor, .data = m.data,
                                 .shard = (enum engine_shard)j->shard };
    if (rc == 0 && !(e = engine_create_rank(&net, &in, k, &where, &err))) rc = -1;
    if (rc == 0) rc = train(j, e, m.rank, &err);
    if (rc) mesh_fail(&m, &err);
    engine_destroy(e);
    mesh_unuse(&m);
    if (k) k->destroy(k);
    if (m.rank == 0) shared->err = err;
    mesh_end(&m, rc ? 1 : 0);
    return rc ? 1 : 0;
}

static struct outcome *run_raw(const struct job *j) {
    int status;
    struct outcome *out = malloc(sizeof *out);
    memset(shared, 0, sizeof *shared);
    fflush(NULL);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) _exit(rank_main(j));
    assert_int_equal(waitpid(pid, &status, 0), pid);
    memcpy(out, shared, sizeof *out);
    out->rc = WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
    return out;
}

static struct outcome *run(struct job j) {
    struct outcome *out = run_raw(&j);
    if (out->rc)
        fail_msg("%d ranks, %s, %s, order %d: %d, %s", j.dp, engine_shard_name(j.shard), j.nccl ? "NCCL" : "windows",
                 j.order, out->rc, out->err.msg);
    return out;
}

static int differ(const struct outcome *a, const struct outcome *b) {
    return memcmp(a->loss, b->loss, sizeof a->loss) || memcmp(a->norm, b->norm, sizeof a->norm) ||
           memcmp(a->params, b->params, sizeof a->params);
}

static int set_up(void **state) {
    (void)state;
    if (load_nccl_stand_in()) return -1;
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return shared == MAP_FAILED ? -1 : 0;
}

/* ---- tests ----------------------------------------------------------------------------------------- */

#define ORDERS 2 /* of each case, other ones */

/* Against ranks that do one thing after the other: losses, gradients' norms and weights after two steps, whatever
 * the streams' order, with a head of its own and without, in one pass and, adding up, in two. */
static void what_goes_beside_changes_no_bit(void **state) {
    (void)state;
    for (int i = 0; i < 8; i++) {
        struct job j = { .dp = 2 + (i == 5), .shard = i & 1 ? ENGINE_SHARD_FULL : ENGINE_SHARD_GRADIENTS,
                         .nccl = i >> 1 & 1, .untied = i >> 2, .bf16 = i >> 2, .micro = (uint32_t)i >> 2 };
        struct job in_turn = j;
        in_turn.alone = 1;
        struct outcome *want = run(in_turn);
        for (int order = 0; order <= ORDERS; order++) {
            j.late = order == 0;
            j.order = order ? i * ORDERS + order : 0;
            struct outcome *got = run(j);
            if (differ(want, got)) fail_msg("case %d, order %d: other bits", i, j.order);
            free(got);
        }
        free(want);
    }
}

/* While a layer is computed the next one's weights come, where they are not there; going back, also what is beyond
 * it is reduced. */
static void something_is_under_way_while_layers_are_computed(void **state) {
    (void)state;
    struct outcome *full = run((struct job){ .dp = 2, .shard = ENGINE_SHARD_FULL, .nccl = 1 });
    struct outcome *gradients = run((struct job){ .dp = 2, .shard = ENGINE_SHARD_GRADIENTS, .nccl = 1 });
    assert_true(full->forwards == 2 * LAYERS && full->backwards == LAYERS);
    for (int i = 0; i < LAYERS; i++) {
        assert_int_equal(full->forward[i], i + 1 < LAYERS); /* behind the last one comes the embedding's matrix */
        assert_true(full->backward[i] >= 1);
        assert_int_equal(gradients->forward[i], 0);
        assert_int_equal(gradients->backward[i], 1);
    }
    free(full), free(gradients);
}

/* Neither stream may go on as if it were the only one: without the events that it waits for, some order is wrong.
 * (Through windows what is computed always comes late enough: the host has waited by then for what went beside.) */
#define SEEDS 20
static void an_event_that_is_missing_is_found(void **state) {
    (void)state;
    for (int i = 1; i < 4; i++) {
        struct job j = { .dp = 2, .shard = ENGINE_SHARD_FULL, .nccl = i >> 1, .alone = 1 };
        struct outcome *want = run(j);
        int found = 0;
        j.alone = 0;
        j.loses = 1 + (i & 1);
        for (j.order = 1; j.order <= SEEDS && !found; j.order++) {
            struct outcome *got = run_raw(&j);
            found = got->rc || differ(want, got) ? j.order : 0;
            free(got);
        }
        print_message("%s, stream %d waits for none: seed %d\n", j.nccl ? "NCCL" : "windows", j.loses - 1, found);
        assert_true(found);
        free(want);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_goes_beside_changes_no_bit),
        cmocka_unit_test(something_is_under_way_while_layers_are_computed),
        cmocka_unit_test(an_event_that_is_missing_is_found),
    };
    return cmocka_run_group_tests(tests, set_up, NULL);
}
