/* Memory known before the start: what engine_plan says, against the most that a process really held. Each
 * rank lives in a child, because a peak never goes down again; the parent starts no thread. */
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

#include "kernels/kernels.h"
#include "node/engine.h"
#include "node/mesh.h"
#include "node/model.h"
#include "proto/model.h"

struct shape {
    const char *name;
    struct msg_model m;
    uint32_t batch;
    int precision; /* 0: fp32, 1: bf16, 2: bf16-stochastic */
    uint8_t optimizer, states;
    struct engine_shape mesh; /* zeroes: one rank */
};

/* Large beside what any process takes for its libraries: parameters, activations or logits rule in turn. */
#define LLAMA .rope_theta = 1e4, .norm_eps = 1e-5
static const struct shape shapes[] = {
    { "fp32", { 3, 512, 8, 2, 1408, 256, 256, LLAMA, .tied = 1 }, 4, 0 },
    { "bf16", { 3, 512, 8, 2, 1408, 256, 256, LLAMA, .tied = 1 }, 4, 1 },
    { "bf16-stochastic", { 3, 512, 8, 2, 1408, 256, 256, LLAMA, .tied = 1 }, 4, 2 },
    { "activations", { 4, 256, 4, 1, 1024, 256, 512, LLAMA, .tied = 1 }, 6, 0 },
    { "activations, bf16", { 6, 256, 4, 1, 1024, 256, 512, LLAMA, .tied = 1 }, 8, 1 },
    { "vocabulary", { 1, 128, 4, 2, 256, 65536, 128, LLAMA, .tied = 0 }, 2, 1 },
    { "vocabulary, fp32", { 1, 128, 4, 2, 256, 65536, 128, LLAMA, .tied = 1 }, 4, 0 },
    { "8 bits", { 5, 640, 8, 2, 1792, 256, 64, LLAMA, .tied = 1 }, 2, 2, .states = STATES_8BIT },
    { "muon", { 3, 512, 8, 2, 1408, 256, 256, LLAMA, .tied = 1 }, 4, 0, .optimizer = OPTIMIZER_MUON },
    { "muon, bf16", { 3, 768, 8, 2, 2048, 256, 64, LLAMA, .tied = 1 }, 2, 1, .optimizer = OPTIMIZER_MUON,
      .states = STATES_BF16 },
    { "dp 2", { 4, 512, 8, 2, 1408, 256, 256, LLAMA, .tied = 1 }, 4, 0, .mesh = { 1, 2, ENGINE_SHARD_NONE } },
    { "dp 2, optimizer", { 4, 512, 8, 2, 1408, 256, 256, LLAMA, .tied = 1 }, 4, 1,
      .mesh = { 1, 2, ENGINE_SHARD_OPTIMIZER } },
    { "dp 2, gradients", { 6, 512, 8, 2, 1408, 256, 128, LLAMA, .tied = 1 }, 2, 0,
      .mesh = { 1, 2, ENGINE_SHARD_GRADIENTS } },
    { "dp 2, full", { 6, 512, 8, 2, 1408, 256, 128, LLAMA, .tied = 1 }, 2, 0,
      .mesh = { 1, 2, ENGINE_SHARD_FULL } },
    { "tp 2", { 5, 512, 8, 2, 1408, 256, 256, LLAMA, .tied = 1 }, 4, 1, .mesh = { 2, 1, ENGINE_SHARD_NONE } },
    { "tp 2, dp 2, muon", { 6, 512, 8, 2, 1408, 256, 256, LLAMA, .tied = 1 }, 4, 0,
      .optimizer = OPTIMIZER_MUON, .mesh = { 2, 2, ENGINE_SHARD_OPTIMIZER } },
};

static double held(const char *what) {
    char line[256], format[32];
    double kb = 0;
    FILE *f = fopen("/proc/self/status", "re");
    snprintf(format, sizeof format, "%s: %%lf", what);
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, format, &kb) == 1) break;
    if (f) fclose(f);
    return 1024 * kb;
}

static struct msg_inner settings(const struct shape *s) {
    return (struct msg_inner){ .batch = s->batch, .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
                               .clip = 1, .total_tokens = 100000, .optimizer = s->optimizer,
                               .states = s->states };
}

/* In the child. */
static int step_of(const struct kernels *k, const struct msg_model *m, const struct shape *s,
                   const struct mesh *mesh,
                   struct err *err) {
    struct msg_inner in = settings(s);
    struct engine_result r;
    const struct engine_mesh where = { .world = mesh->world, .tensor = mesh->tensor, .data = mesh->data,
                                       .shard = s->mesh.shard };
    struct engine *e = engine_create_rank(m, &in, k, &where, err);
    if (!e) return -1;
    uint32_t batch = in.batch, first, share;
    static float ones[1 << 12];
    for (size_t i = 0; i < 1 << 12; i++) ones[i] = i % 7 ? 0.01f : -0.02f;
    for (size_t at = 0, n = engine_elements(e); at < n; at += 1 << 12)
        engine_params_write(e, at, n - at < 1 << 12 ? n - at : 1 << 12, ones);
    size_t ids = batch * (m->sequence + 1);
    int32_t *tokens = calloc(ids, sizeof *tokens);
    for (size_t i = 0; i < ids; i++) tokens[i] = (int32_t)(i * 31 % m->vocabulary);
    engine_share(e, batch, &first, &share);
    int rc = engine_step(e, tokens + first * (m->sequence + 1), batch, 1000, &r, err);
    free(tokens);
    engine_destroy(e);
    return rc;
}

struct found {
    double peak, planned;
};

/* A small step first: code and threads are not what is asked for. */
static int rank_main(const struct shape *s, const struct mesh *mesh, int to, struct err *err) {
    const struct msg_model small = { 1, 32, 2, 2, 32, 32, 16, LLAMA };
    struct msg_inner in = settings(s);
    struct engine_memory plan;
    int threads = mesh->ranks > 1 ? 1 : 2;
    struct kernels *k = s->precision ? kernels_cpu_bf16_create(threads, s->precision == 2, err)
                                     : kernels_cpu_create(threads, err);
    if (!k || step_of(k, &small, s, mesh, err)) return -1;
    double before = held("VmRSS");
    engine_plan(&s->m, &in, k, s->mesh.tp ? &s->mesh : NULL, &plan);
    if (step_of(k, &s->m, s, mesh, err)) return -1;
    struct found found = { held("VmHWM") - before, (double)plan.all };
    mesh->world->barrier(mesh->world); /* what a rank that ends unmaps is not what the others held */
    return write(to, &found, sizeof found) == sizeof found ? 0 : -1;
}

/* The rank that is furthest off. */
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
        if (i == 0 || fabs(one.peak / one.planned - 1) > fabs(worst.peak / worst.planned - 1)) worst = one;
    }
    close(ends[0]);
    assert_true(waitpid(pid, &status, 0) == pid && status == 0);
    return worst;
}

static void the_plan_is_within_a_tenth_of_what_is_held(void **state) {
    (void)state;
#ifdef __SANITIZE_ADDRESS__
    print_message("skipped: a sanitizer holds memory of its own\n");
    skip();
#endif
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct found f = measure(&shapes[i]);
        print_message("%-20s planned %6.1f MB, held %6.1f MB\n", shapes[i].name, f.planned / 1e6,
                      f.peak / 1e6);
        if (fabs(f.planned - f.peak) > 0.1 * f.peak)
            fail_msg("%s: planned %g bytes, held %g", shapes[i].name, f.planned, f.peak);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = { cmocka_unit_test(the_plan_is_within_a_tenth_of_what_is_held) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
