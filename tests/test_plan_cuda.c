/* What engine_plan says of a GPU's memory, against what the emulator of one was asked for; and moments in the
 * host's memory. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/plugin.h"
#include "node/engine.h"
#include "node/mesh.h"
#include "proto/model.h"
#include "tests/cuda/memory.h"

struct shape {
    const char *name;
    struct msg_model m;
    uint32_t batch;
    int precision; /* 0: fp32, 1: bf16, 2: bf16-stochastic */
    int steps;     /* the emulator is slow: only small ones take a step, with which scratch is taken */
    uint8_t optimizer, states;
    struct engine_shape mesh; /* zeroes: one rank */
};

/* Beside what is planned for parameters, moments, activations and scratch in turn the rest is small. */
#define LLAMA .rope_theta = 1e4, .norm_eps = 1e-5
static const struct shape shapes[] = {
    { "fp32", { 3, 512, 8, 2, 1408, 256, 256, LLAMA, .tied = 1 }, 4, 0 },
    { "bf16", { 3, 512, 8, 2, 1408, 256, 256, LLAMA, .tied = 1 }, 4, 1 },
    { "activations, bf16", { 4, 256, 4, 1, 1024, 256, 512, LLAMA, .tied = 1 }, 6, 1 },
    { "vocabulary", { 1, 128, 4, 2, 256, 65536, 64, LLAMA, .tied = 0 }, 2, 1 },
    { "8 bits", { 3, 512, 8, 2, 1408, 256, 64, LLAMA, .tied = 1 }, 2, 2, .states = STATES_8BIT },
    { "muon", { 2, 512, 8, 2, 1408, 256, 64, LLAMA, .tied = 1 }, 2, 0, .optimizer = OPTIMIZER_MUON },
    { "tp 2", { 3, 512, 8, 2, 1408, 256, 64, LLAMA, .tied = 1 }, 2, 1, .mesh = { 2, 1, ENGINE_SHARD_NONE } },
    { "dp 2, full", { 3, 512, 8, 2, 1408, 256, 64, LLAMA, .tied = 1 }, 2, 0, .mesh = { 1, 2, ENGINE_SHARD_FULL } },
    { "a step, fp32", { 1, 32, 4, 2, 64, 256, 32, LLAMA, .tied = 1 }, 2, 0, 1 },
    { "a step, muon", { 1, 32, 4, 2, 64, 256, 32, LLAMA, .tied = 1 }, 2, 0, 1, .optimizer = OPTIMIZER_MUON },
    { "a step, offload", { 1, 32, 4, 2, 64, 256, 32, LLAMA, .tied = 1 }, 2, 0, 1,
      .mesh = { 1, 1, .offload = ENGINE_OFFLOAD_OPTIMIZER } },
    { "offload, bf16", { 3, 512, 8, 2, 1408, 256, 64, LLAMA, .tied = 1 }, 2, 1,
      .mesh = { 1, 1, .offload = ENGINE_OFFLOAD_OPTIMIZER } },
    { "a step, tp 2", { 1, 32, 4, 2, 64, 256, 32, LLAMA, .tied = 1 }, 2, 0, 1, .mesh = { 2, 1, ENGINE_SHARD_NONE } },
};

/* Of scratch, what is taken before the first step: the workspace of products, and where weights are bf16 the slice
 * through which they come. */
#define WITHOUT_STEP (double)(32 << 20)
#define SLICE (double)(4 << 20)

struct found {
    double held, planned;
};

static int take(const struct shape *s, const struct kernels *k, const struct mesh *mesh, const struct msg_inner *in,
                struct err *err) {
    const struct engine_mesh where = { .world = mesh->world, .tensor = mesh->tensor, .data = mesh->data,
                                       .shard = s->mesh.shard, .offload = s->mesh.offload };
    struct engine *e = engine_create_rank(&s->m, in, k, &where, err);
    struct engine_result r;
    uint32_t first, share;
    int rc = e ? 0 : -1;
    size_t n = e ? engine_elements(e) : 0;
    float *params = calloc(n + 1, sizeof *params);
    if (e) engine_params_write(e, 0, n, params);
    free(params);
    int32_t *tokens = calloc((size_t)s->batch * (s->m.sequence + 1), sizeof *tokens);
    if (e) engine_share(e, s->batch, &first, &share);
    if (e && s->steps) rc = engine_step(e, tokens + first * (s->m.sequence + 1), s->batch, 1000, &r, err);
    free(tokens);
    engine_destroy(e);
    return rc;
}

static int rank_main(const struct shape *s, struct mesh *mesh, int to, struct err *err) {
    const struct msg_inner in = { .batch = s->batch, .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .clip = 1,
                                  .total_tokens = 100000, .optimizer = s->optimizer, .states = s->states };
    struct engine_memory plan;
    struct kernels *k = intellect_cuda_create(KERNELS_PLUGIN_ABI, 0, s->precision ? 2 : 4, s->precision == 1 ? 2 : 0, err);
    if (!k) return -1;
    int rc = mesh_use(mesh, k, err);
    engine_plan(&s->m, &in, k, s->mesh.tp ? &s->mesh : NULL, &plan);
    if (!rc) rc = take(s, k, mesh, &in, err);
    struct found found = { (double)emulator_memory.most, (double)plan.all };
    if (!s->steps) found.planned += WITHOUT_STEP + (s->precision ? SLICE : 0) - (double)plan.scratch;
    mesh_unuse(mesh);
    k->destroy(k);
    if (rc) return rc;
    return write(to, &found, sizeof found) == sizeof found ? 0 : -1;
}

static struct found measure(const struct shape *s) {
    struct found worst = { 0 }, one;
    int ends[2], ranks = s->mesh.tp ? s->mesh.tp * s->mesh.dp : 1, status;
    assert_int_equal(pipe(ends), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        struct mesh mesh;
        struct err err = { 0 };
        int rc = mesh_start(&mesh, s->mesh.tp ? s->mesh.tp : 1, s->mesh.dp ? s->mesh.dp : 1, 0, &err);
        if (rc == 0) rc = rank_main(s, &mesh, ends[1], &err);
        if (rc) fprintf(stderr, "%s: %s\n", s->name, err.msg);
        if (rc) mesh_fail(&mesh, &err);
        mesh_end(&mesh, rc != 0);
        _exit(rc != 0);
    }
    close(ends[1]);
    for (int i = 0; i < ranks; i++) {
        assert_true(read(ends[0], &one, sizeof one) == sizeof one);
        if (i == 0 || fabs(one.held / one.planned - 1) > fabs(worst.held / worst.planned - 1)) worst = one;
    }
    close(ends[0]);
    assert_true(waitpid(pid, &status, 0) == pid && status == 0);
    return worst;
}

static void the_plan_is_within_three_hundredths(void **state) {
    (void)state;
    int bad = 0;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct found f = measure(&shapes[i]);
        print_message("%-20s planned %9.3f MB, held %9.3f MB\n", shapes[i].name, f.planned / 1e6, f.held / 1e6);
        bad += fabs(f.planned - f.held) > 0.03 * f.held;
    }
    assert_int_equal(bad, 0);
}

/* ---- moments in the host's memory ---------------------------------------------------------------- */

static struct kernels *backend(int device) {
    struct err err = { 0 };
    struct kernels *k = device ? intellect_cuda_create(KERNELS_PLUGIN_ABI, 0, 2, 2, &err)
                               : kernels_cpu_bf16_create(1, 0, &err);
    if (!k) fail_msg("%s", err.msg);
    return k;
}

/* Parameters, then both moments, after a few steps: [3 * n], malloc'd. */
static float *train(const struct kernels *k, enum engine_offload offload, const struct msg_inner *in, size_t *n) {
    const struct msg_model m = { 1, 32, 4, 2, 64, 256, 32, LLAMA, .tied = 1 };
    const struct engine_mesh where = { .offload = offload };
    struct err err = { 0 };
    int32_t tokens[2 * 33];
    struct engine_result r;
    char path[] = "/tmp/intellect-test-offload-XXXXXX";
    struct engine *e = engine_create_rank(&m, in, k, &where, &err);
    if (!e) fail_msg("%s", err.msg);
    *n = 3 * engine_elements(e);
    float *state = malloc(*n * sizeof *state);
    for (size_t i = 0; i < *n; i++) state[i] = (float)((int)(i * 7 % 41) - 20) * 1e-3f;
    engine_params_write(e, 0, *n / 3, state);
    for (int step = 0; step < 3; step++) {
        for (int i = 0; i < 2 * 33; i++) tokens[i] = (i * 31 + step * 5) % 256;
        if (engine_step(e, tokens, 2, 1000, &r, &err)) fail_msg("%s", err.msg);
    }
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    if (engine_save(e, path, 1, &err)) fail_msg("%s", err.msg);
    close(fd);
    FILE *f = fopen(path, "rb"); /* the state's last bytes are a digest of the rest */
    assert_true(f && !fseek(f, -(long)(*n * sizeof *state + 32), SEEK_END));
    assert_int_equal(fread(state, sizeof *state, *n, f), *n);
    fclose(f);
    unlink(path);
    engine_destroy(e);
    return state;
}

/* On a device they are read and written through its link, on the CPU they are where they were: in both, and
 * however they are kept, the same bits as without. */
static void offloaded_moments_change_no_bit(void **state) {
    (void)state;
    for (int i = 0; i < 2 * 2 * 2; i++) {
        const struct msg_inner in = { .batch = 2, .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .clip = 1,
                                      .total_tokens = 100000, .optimizer = i & 2 ? OPTIMIZER_MUON : OPTIMIZER_ADAMW,
                                      .states = i & 4 ? STATES_8BIT : STATES_FP32 };
        struct kernels *k = backend(i & 1);
        size_t n, set = 0;
        float *with = train(k, ENGINE_OFFLOAD_OPTIMIZER, &in, &n), *without = train(k, ENGINE_OFFLOAD_NONE, &in, &n);
        for (size_t j = 0; j < n; j++) set += with[j] != 0;
        assert_true(set > n / 2); /* moments are among them */
        assert_memory_equal(with, without, n * sizeof *with);
        free(with), free(without);
        k->destroy(k);
    }
}

/* Where the system pins nothing, that is said, and not that the device were full. */
static void memory_that_the_host_does_not_give_is_named(void **state) {
    (void)state;
    struct kernels *k = backend(1);
    struct err err = { 0 };
    setenv("EMULATOR_PINNED", "0", 1);
    assert_null(k->alloc_host(k, 4096, &err));
    unsetenv("EMULATOR_PINNED");
    assert_int_equal(err.code, ERR_MEMORY);
    assert_non_null(strstr(err.msg, "host's memory"));
    k->destroy(k);
}

int main(void) {
    const struct CMUnitTest tests[] = { cmocka_unit_test(the_plan_is_within_three_hundredths),
                                        cmocka_unit_test(offloaded_moments_change_no_bit),
                                        cmocka_unit_test(memory_that_the_host_does_not_give_is_named) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
