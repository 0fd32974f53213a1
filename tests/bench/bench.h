/* bench.h - how fast the parts are, each beside a floor or a reference: something simpler that
 * moves the same bytes or does the same arithmetic. Both are measured in the same run and in turns,
 * because on a shared machine a rate alone says little. Prints one table and, with --json FILE,
 * writes the same. It judges nothing: no rate is ever a failure.
 *
 *   main.c        options, the list of cases, JSON
 *   table.c       the rows
 *   timing.c      clocks, and tasks in turns
 *   memory.c      warm memory, and copying it
 *   outer.c       the outer step
 *   swarm.c       outer steps between the machines of several members
 *   digest.c      BLAKE2b and the digest tree
 *   proto.c       messages
 *   channel.c     the channel, and plain connections beside it
 *   train.c       matrix products and training steps
 *   checkpoint.c  checkpoints and a trainer's own state
 *   store.c       an object store behind a network, beside curl
 *   fleet.h       a coordinator and light members, for what follows: fleet.c, member*.c, profile.c
 *   step.c        the whole outer step between members
 *   handover.c    a killed aggregator
 *   load.c        messages and connections of a coordinator
 *   join.c        a new member
 *   stall.c       what a checkpoint takes from training
 *
 * Where a call fails, the program ends with its message; so on that way only the folder of the
 * checkpoints is cleaned up, and not memory. */
#ifndef INTELLECT_BENCH_H
#define INTELLECT_BENCH_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/err.h"

#define ROWS_MAX 192
#define TASKS_MAX 8
#define SAMPLES_MAX 50
#define CHUNK ((size_t)1 << 18) /* elements; run.yaml's default of outer.chunk_elements */
#define LEAVES 65536            /* of a digest tree */
#define GB 1e9
#define MB 1e6

struct row {
    char what[64], reference[64];
    const char *unit;
    double best, median, reference_rate; /* reference_rate 0: there is none */
    double share;                        /* of the reference; over 1 is better than it */
    int samples;
    char note[256];                      /* printed below; "" as a rule */
};

struct bench {
    struct row row[ROWS_MAX];
    int rows, cores;
    char folder[256]; /* for files; removed in the end, and sooner what is large, unless `keep` */
    bool keep;
};

/* ---- main.c ---------------------------------------------------------------------------------- */

/* With all that is in it. Where there is none, nothing happens. */
void remove_folder(const char *path);

/* ---- timing.c -------------------------------------------------------------------------------- */

struct series {
    int count;
    double value[SAMPLES_MAX]; /* seconds */
};

/* Something to time. reset, which may be NULL, comes before each run and is not timed. */
struct task {
    int (*run)(void *arg, struct err *err);
    void *arg;
    int (*reset)(void *arg, struct err *err);
};

/* Monotonic. */
double now_s(void);
/* What all threads of the program have worked. */
double cpu_s(void);
void pause_s(double seconds);
/* When the program starts; elapsed_s() is the time since then. */
void start_clock(void);
double elapsed_s(void);
/* What is more than SAMPLES_MAX is left out. */
void series_add(struct series *s, double value);
/* Of one value at least. */
double smallest(const struct series *s);
double middle(const struct series *s);
/* Run the tasks in turns, once unmeasured and then until budget_s is over. Of task i, seconds go to
 * wall[i], those of all cores together to cpu[i]. In turns, so that whatever else the machine does
 * meets all of them alike. -1: a task failed. */
int time_both(const struct task *task, struct series *wall, struct series *cpu, int count,
              double budget_s, struct err *err);
/* By the clock on the wall, for what several threads do or what waits. At most TASKS_MAX tasks. */
int time_in_turns(const struct task *task, struct series *s, int count, double budget_s,
                  struct err *err);
/* By the seconds a core worked, for "one core": other programs then take less away. */
int time_on_core(const struct task *task, struct series *s, int count, double budget_s,
                 struct err *err);

/* ---- table.c --------------------------------------------------------------------------------- */

void print_head(void);
/* Add a row and print it. `work` is in the unit and per sample of s, reference_work the same of the
 * reference, which may be NULL. */
void row_rate(struct bench *b, const char *what, const char *unit, double work,
              const struct series *s, const char *name, double reference_work,
              const struct series *reference);
/* A time, so less is better; share is how much of it the reference takes. */
void row_time(struct bench *b, const char *what, const char *unit, double units_per_s,
              const struct series *s, const char *name, const struct series *reference);
/* Any other number: less is better. `limit`, if it is not 0, is what it should stay under. */
void row_value(struct bench *b, const char *what, const char *unit, const struct series *s,
               double limit);
/* A line below the last row, and in its JSON. */
void row_note(struct bench *b, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Owned by the caller. */
json_t *row_json(const struct row *r);

/* ---- memory.c -------------------------------------------------------------------------------- */

/* Aligned and touched; for free(). Where there is none, the program ends. */
void *take_memory(size_t bytes);
/* Normal, of this standard deviation. */
float *take_floats(size_t n, float std, uint64_t seed);

/* Copies `bytes` in all, through blocks far larger than a cache. */
struct copy {
    uint8_t *from, *to;
    size_t bytes;
};
struct copy copy_of(size_t bytes);
/* A task of struct copy. */
int run_copy(void *arg, struct err *err);
void copy_free(struct copy *c);

/* ---- the cases ------------------------------------------------------------------------------- */

/* Each adds its rows; -1: a call failed. */
int bench_memory(struct bench *b, int unused, struct err *err);
enum { ENCODE, ACCUMULATE, MEAN, DECODE, NESTEROV, OF_FP4 = 8 /* with one of these: not int8 */ };
int bench_outer(struct bench *b, int what, struct err *err);
/* Outer steps of that many members. */
int bench_swarm(struct bench *b, int members, struct err *err);
int bench_digest(struct bench *b, int unused, struct err *err);
int bench_proto(struct bench *b, int unused, struct err *err);
int bench_channel(struct bench *b, int unused, struct err *err);
/* preset: 0 for debug, 1 for 150m. */
int bench_matmul(struct bench *b, int preset, struct err *err);
/* Training steps of that preset; no row where the machine has fewer cores than threads. */
int bench_debug(struct bench *b, int threads, struct err *err);
int bench_10m(struct bench *b, int threads, struct err *err);
int bench_checkpoint(struct bench *b, int unused, struct err *err);
int bench_storing(struct bench *b, int unused, struct err *err);
/* The object store that BENCH_STORE names, where the case above runs and checkpoints of `stall` go; NULL: none. */
const char *bench_store(void);
/* The URL of a place below it; only where there is one. */
void bench_store_below(const char *name, char *out, size_t size);
/* members, with STEP_ON_DISK where their state is on the disk and not in memory, STEP_FP4 where contributions and
 * results are fp4, not int8. */
#define STEP_ON_DISK 0x100
#define STEP_FP4 0x200
int bench_step(struct bench *b, int members, struct err *err);
/* outer.silence_seconds. */
int bench_handover(struct bench *b, int silence_s, struct err *err);
int bench_load(struct bench *b, int unused, struct err *err);
int bench_join(struct bench *b, int unused, struct err *err);
int bench_stall(struct bench *b, int unused, struct err *err);

#endif
