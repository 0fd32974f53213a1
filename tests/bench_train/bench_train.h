/* bench_train.h - what a training step takes, beside what its floor is: the program of `make bench-train`.
 *
 *   main.c      options, the cases, a process for each, the table, JSON
 *   gpu.c       the cases on a GPU, beside its own large products
 *   measure.c   one case: steps, with the time of each entry of the kernel table
 *   entries.c   a kernel table whose entries are timed, and the products they were asked for
 *   products.c  the same products by oneDNN alone, and a copy of memory: the floors
 *
 * Each case is a process of its own, because its peak of memory is asked for. It judges nothing. */
#ifndef INTELLECT_BENCH_TRAIN_H
#define INTELLECT_BENCH_TRAIN_H

#include <jansson.h>
#include <stddef.h>

#include "kernels/kernels.h"
#include "node/device.h"
#include "node/engine.h"

/* Seconds that passed, or that this process worked after use_one_core(). */
double now_s(void);
void use_one_core(void);

/* ---- measure.c ------------------------------------------------------------------------------- */

struct bench_case {
    const char *name, *preset;
    int layers;    /* 0: the preset's; -1: as many of them as fit */
    int precision; /* 0: fp32, 1: bf16 with an fp32 master */
    int samples;   /* of SEQUENCE tokens in a step */
};
#define SEQUENCE 1024

/* One warm step, `steps` that count, in turns with the products by oneDNN. NULL: err says why. */
json_t *measure(const struct bench_case *c, int steps, struct err *err);

/* ---- entries.c ------------------------------------------------------------------------------- */

/* [m,k] x [k,n], asked for `count` times. */
struct product {
    int m, n, k, count;
};
#define PRODUCTS_MAX 64

/* What entries took since entries_reset(). */
struct entries {
    struct {
        const char *name;
        double seconds;
    } entry[40];
    int count;
    struct product product[PRODUCTS_MAX];
    int products;
    struct err failure; /* of a GPU */
};

/* Change the entries of a table, in place, to timed ones; for one table at a time. */
void entries_time(struct kernels *k);
void entries_reset(void);
const struct entries *entries_taken(void);
/* Is it one of the matrix products? */
int entries_is_product(const char *name);

/* ---- measure.c, for gpu.c too ------------------------------------------------------------------ */

struct run {
    struct kernels *k;
    struct engine *e;
    struct msg_model m;
    int32_t *tokens;
    int samples;
};
/* A backend and an engine at random weights, for `c` as the device has it. case_release takes what failed too. */
int case_init(struct run *r, const struct bench_case *c, struct device device, struct err *err);
void case_release(struct run *r);
int case_step(struct run *r, double *seconds, struct err *err);
double case_attention_flop(const struct run *r);
double product_flop(const struct product *p);
json_t *entries_json(const struct entries *t, int steps);

/* ---- gpu.c ----------------------------------------------------------------------------------- */

extern const struct bench_case gpu_cases[];
extern const int gpu_case_count;
/* Steps as they are, then as many with each entry waited for, which gives its time. */
json_t *gpu_measure(const struct bench_case *c, struct device device, int steps, struct err *err);
void gpu_print_head(void);
void gpu_print_row(const json_t *row);

/* ---- products.c ------------------------------------------------------------------------------ */

/* The best time of each product by oneDNN alone, operands as it likes them; several calls keep the best. */
struct floors;
struct floors *floors_create(const struct product *product, int count, int bf16, struct err *err);
void floors_destroy(struct floors *f);
int floors_run(struct floors *f, struct err *err);
double floors_seconds(const struct floors *f, int product); /* of one such product */
/* Bytes read and written a second by all threads together. */
double floors_memory(void);

#endif
