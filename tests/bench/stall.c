/* stall.c - what a checkpoint takes from training: a real trainer and its agent's loop, while the agent
 * writes the state of the 10m model (BENCH_STALL=150m: of that one). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/bench/bench.h"
#include "tests/bench/fleet.h"

#define CHECKPOINTS_MAX 5
#define WARM_STEPS 20
#define REST_S 0.5
#define PATIENCE_S 300.0
#define ASKED_MS 20
#define ASKED_SLOWER 2

struct window {
    double begin_s, end_s, late_s, worked_s, cpu_s;
};

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median_gap(const struct fleet_member *m) {
    uint32_t n = m->inner_steps, count = 0;
    double *gap = take_memory(n * sizeof *gap);
    for (uint32_t i = WARM_STEPS; i < n; i++)
        gap[count++] = m->inner_step_s[i] - m->inner_step_s[i - 1];
    qsort(gap, count, sizeof *gap, ascending);
    double middle_one = gap[count / 2];
    free(gap);
    return middle_one;
}

/* Steps a second of those that ended between the two. */
static double speed(const struct fleet_member *m, const struct window *w) {
    uint32_t first = 0, last = 0;
    for (uint32_t i = 1; i < m->inner_steps && m->inner_step_s[i] <= w->end_s; i++) {
        if (m->inner_step_s[i] < w->begin_s) continue;
        if (!first) first = i;
        last = i;
    }
    return last > first ? (last - first) / (m->inner_step_s[last] - m->inner_step_s[first]) : 0;
}

/* Of the steps that were under way between the two. */
static double longest_gap(const struct fleet_member *m, double begin, double end) {
    double longest = 0;
    for (uint32_t i = 1; i < m->inner_steps; i++) {
        double gap = m->inner_step_s[i] - m->inner_step_s[i - 1];
        if (m->inner_step_s[i] > begin && m->inner_step_s[i - 1] < end && gap > longest)
            longest = gap;
    }
    return longest;
}

static int wait_steps(struct fleet *f, uint32_t steps, struct err *err) {
    for (double begin = now_s(); f->member[0].inner_steps < steps;) {
        if (now_s() - begin > PATIENCE_S)
            return err_set(err, ERR_TIMEOUT, "no inner step %u after %.0f s", steps, PATIENCE_S);
        if (fleet_wait(f, 0, 1, err)) return -1;
        pause_s(0.01);
    }
    return 0;
}

static int without(struct fleet *f, double seconds, struct window *w, struct err *err) {
    struct fleet_member *m = &f->member[0];
    m->forget_late = true;
    w->begin_s = now_s();
    pause_s(seconds);
    w->end_s = now_s();
    w->late_s = m->late_s;
    return wait_steps(f, m->inner_steps + 2, err);
}

static int with(struct fleet *f, struct window *w, struct err *err) {
    struct fleet_member *m = &f->member[0];
    m->forget_late = true;
    pause_s(REST_S);
    for (uint32_t n = ++m->checkpoints_wanted; m->checkpoints < n; pause_s(0.001)) {
        if (fleet_wait(f, 0, 1, err)) return -1;
        if (now_s() - m->checkpoint_begin_s > PATIENCE_S && m->checkpoint_begin_s > 0)
            return err_set(err, ERR_TIMEOUT, "no checkpoint after %.0f s", PATIENCE_S);
    }
    *w = (struct window){m->checkpoint_begin_s, m->checkpoint_end_s, m->late_s, m->worked_s,
                         m->checkpoint_cpu_s};
    return wait_steps(f, m->inner_steps + 2, err);
}

static const char *preset(void) {
    const char *given = getenv("BENCH_STALL");
    return given && *given ? given : "10m";
}

static int checkpoints(void) { return strcmp(preset(), "10m") ? 3 : CHECKPOINTS_MAX; }

static void add_rows(struct bench *b, const struct fleet *f, const struct window *quiet,
                     const struct window *writing) {
    const struct fleet_member *m = &f->member[0];
    struct series stall = {0}, calm = {0}, late = {0}, calm_late = {0}, worked = {0}, took = {0};
    struct series share = {0}, cpu = {0};
    double median = median_gap(m);
    char what[80];
    for (int i = 0; i < checkpoints(); i++) {
        double calm_speed = speed(m, &quiet[i]);
        if (calm_speed > 0) series_add(&share, 100 * (1 - speed(m, &writing[i]) / calm_speed));
        series_add(&stall, 1e3 * (longest_gap(m, writing[i].begin_s, writing[i].end_s) - median));
        series_add(&calm, 1e3 * (longest_gap(m, quiet[i].begin_s, quiet[i].end_s) - median));
        series_add(&late, 1e3 * writing[i].late_s);
        series_add(&calm_late, 1e3 * quiet[i].late_s);
        series_add(&worked, 1e3 * writing[i].worked_s);
        series_add(&cpu, writing[i].cpu_s);
        series_add(&took, writing[i].end_s - writing[i].begin_s);
    }
    snprintf(what, sizeof what, "checkpoint of %.8s: training held up, longest step", preset());
    row_value(b, what, "ms", &stall, ASKED_MS);
    row_note(b, "more than the median step's %.1f ms; without a checkpoint best %.2f, median %.2f ms",
             1e3 * median, smallest(&calm), middle(&calm));
    row_value(b, "    the agent's loop held up, longest turn", "ms", &late, ASKED_MS);
    row_note(b, "without a checkpoint best %.2f, median %.2f ms; a checkpoint took %.2f s; its own processor "
                "time in one turn best %.2f, median %.2f ms",
             smallest(&calm_late), middle(&calm_late), middle(&took), smallest(&worked), middle(&worked));
    if (!share.count) return; /* too short to hold two steps */
    row_value(b, "    training slower while one is written", "%", &share, ASKED_SLOWER);
    row_note(b, "steps a second of as long without one; other processes on these cores count, a store's too; the "
                "agent's own for a checkpoint: best %.2f, median %.2f s", smallest(&cpu), middle(&cpu));
}

static int run(struct bench *b, struct fleet *f, const char *folder, const char *corpus,
               struct err *err) {
    char home[FLEET_PATH_BYTES + 16];
    struct window quiet[CHECKPOINTS_MAX] = {{0}}, writing[CHECKPOINTS_MAX] = {{0}};
    struct fleet_member *m = &f->member[0];
    snprintf(home, sizeof home, "%s/member", folder);
    snprintf(m->corpus, sizeof m->corpus, "%s", corpus);
    m->threads = b->cores > 1 ? b->cores - 1 : 1; /* a core for the agent, where there are two */
    if (fleet_add(f, home, true, err) < 0 || wait_steps(f, WARM_STEPS, err)) return -1;
    for (int i = 0; i < checkpoints(); i++) {
        if (with(f, &writing[i], err)) return -1;
        if (without(f, writing[i].end_s - writing[i].begin_s, &quiet[i], err)) return -1;
    }
    add_rows(b, f, quiet, writing);
    return 0;
}

int bench_stall(struct bench *b, int unused, struct err *err) {
    char model[64];
    const char *const settings[] = {
        model, "model.sequence=64", "inner.batch=1", "outer.inner_steps=1000000",
        "outer.round_seconds=86400", "outer.lease_samples=100000", NULL};
    char folder[FLEET_PATH_BYTES], corpus[FLEET_PATH_BYTES];
    (void)unused;
    snprintf(model, sizeof model, "model.preset=%.32s", preset());
    snprintf(folder, sizeof folder, "%.200s/stall", b->folder);
    if (fleet_make_corpus(folder, corpus, err)) return -1;
    struct fleet *f = fleet_create(&(struct fleet_config){folder, corpus, settings}, err);
    int rc = f ? run(b, f, folder, corpus, err) : -1;
    fleet_destroy(f);
    return rc;
}
