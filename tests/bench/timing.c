/* timing.c - clocks, and tasks that are timed in turns. */
#include <assert.h>
#include <stdlib.h>
#include <time.h>

#include "tests/bench/bench.h"

#define SAMPLES_MIN 3
#define HURRY_AFTER_S 45 /* on a machine that is busy: one sample each, so that it ends */

static double clock_s(clockid_t which) {
    struct timespec t;
    clock_gettime(which, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

double now_s(void) { return clock_s(CLOCK_MONOTONIC); }
double cpu_s(void) { return clock_s(CLOCK_PROCESS_CPUTIME_ID); }

void pause_s(double seconds) {
    struct timespec t = {(time_t)seconds, (long)(1e9 * (seconds - (double)(time_t)seconds))};
    nanosleep(&t, NULL);
}

static double started_s;

void start_clock(void) { started_s = now_s(); }

double elapsed_s(void) { return now_s() - started_s; }

void series_add(struct series *s, double value) {
    if (s->count < SAMPLES_MAX) s->value[s->count++] = value;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double smallest(const struct series *s) {
    struct series sorted = *s;
    qsort(sorted.value, (size_t)sorted.count, sizeof *sorted.value, ascending);
    return sorted.value[0];
}

double middle(const struct series *s) {
    struct series sorted = *s;
    qsort(sorted.value, (size_t)sorted.count, sizeof *sorted.value, ascending);
    return sorted.value[sorted.count / 2];
}

int time_both(const struct task *task, struct series *wall, struct series *cpu, int count,
              double budget_s, struct err *err) {
    double end = 0;
    for (int i = 0; i < count; i++) wall[i].count = cpu[i].count = 0;
    for (int turn = 0; turn <= SAMPLES_MAX; turn++) {
        int enough = elapsed_s() > HURRY_AFTER_S ? 1 : SAMPLES_MIN;
        if (turn > enough && now_s() >= end) break;
        for (int i = 0; i < count; i++) {
            if (task[i].reset && task[i].reset(task[i].arg, err)) return -1;
            double begin = now_s(), cpu_begin = cpu_s();
            if (task[i].run(task[i].arg, err)) return -1;
            if (turn == 0) continue;
            series_add(&wall[i], now_s() - begin);
            series_add(&cpu[i], cpu_s() - cpu_begin);
        }
        if (turn == 0) end = now_s() + (enough > 1 ? budget_s : 0);
    }
    return 0;
}

int time_in_turns(const struct task *task, struct series *s, int count, double budget_s,
                  struct err *err) {
    struct series cpu[TASKS_MAX];
    assert(count <= TASKS_MAX);
    return time_both(task, s, cpu, count, budget_s, err);
}

int time_on_core(const struct task *task, struct series *s, int count, double budget_s,
                 struct err *err) {
    struct series wall[TASKS_MAX];
    assert(count <= TASKS_MAX);
    return time_both(task, wall, s, count, budget_s, err);
}
