/* Memory known before the start: what engine_plan says, against the most that a process really held. Each
 * engine lives in a child, because a peak never goes down again; the parent starts no thread. */
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
#include "node/model.h"
#include "proto/model.h"

struct shape {
    const char *name;
    struct msg_model m;
    uint32_t batch;
    int precision; /* 0: fp32, 1: bf16, 2: bf16-stochastic */
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

/* In the child. A small step first: code and threads are not what is asked for. */
static int step_of(const struct kernels *k, const struct msg_model *m, uint32_t batch) {
    struct msg_inner in = { .batch = batch,
                            .lr = 1e-3,
                            .beta1 = 0.9,
                            .beta2 = 0.95,
                            .eps = 1e-8,
                            .clip = 1,
                            .total_tokens = 100000 };
    struct engine_result r;
    struct err err;
    struct engine *e = engine_create(m, &in, k, &err);
    if (!e) return -1;
    static float ones[1 << 12];
    for (size_t i = 0; i < 1 << 12; i++) ones[i] = i % 7 ? 0.01f : -0.02f;
    for (size_t at = 0, n = engine_elements(e); at < n; at += 1 << 12)
        engine_params_write(e, at, n - at < 1 << 12 ? n - at : 1 << 12, ones);
    size_t ids = batch * (m->sequence + 1);
    int32_t *tokens = calloc(ids, sizeof *tokens);
    for (size_t i = 0; i < ids; i++) tokens[i] = (int32_t)(i * 31 % m->vocabulary);
    int rc = engine_step(e, tokens, batch, 1000, &r, &err);
    free(tokens);
    engine_destroy(e);
    return rc;
}

struct found {
    double peak, planned;
};

static struct found measure(const struct shape *s) {
    struct found found = { 0 };
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        struct msg_model small = { 1, 32, 2, 1, 32, 32, 16, LLAMA };
        struct msg_inner in = { .batch = s->batch };
        struct engine_memory plan;
        struct kernels *k = s->precision ? kernels_cpu_bf16_create(2, s->precision == 2, NULL)
                                         : kernels_cpu_create(2, NULL);
        if (!k || step_of(k, &small, 1)) _exit(1);
        double before = held("VmRSS");
        engine_plan(&s->m, &in, k, &plan);
        if (step_of(k, &s->m, s->batch)) _exit(1);
        found = (struct found){ held("VmHWM") - before, (double)plan.all };
        _exit(write(ends[1], &found, sizeof found) != sizeof found);
    }
    int status;
    close(ends[1]);
    ssize_t got = read(ends[0], &found, sizeof found);
    close(ends[0]);
    assert_true(waitpid(pid, &status, 0) == pid && status == 0 && got == sizeof found);
    return found;
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
