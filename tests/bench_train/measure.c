/* measure.c - one case: a network of a preset's shape at random weights, stepped on random tokens. */
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "node/engine.h"
#include "node/model.h"
#include "node/nvml.h"
#include "node/trainer.h"
#include "proto/model.h"
#include "tests/bench_train/bench_train.h"

#define STEPS_MAX 100

static int on_one_core;

void use_one_core(void) {
    on_one_core = 1;
    omp_set_num_threads(1);
}

double now_s(void) {
    struct timespec t;
    clock_gettime(on_one_core ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The most this process ever held, in bytes. */
static double peak_bytes(void) {
    char line[256];
    double kb = 0;
    FILE *f = fopen("/proc/self/status", "re");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "VmHWM: %lf", &kb) == 1) break;
    if (f) fclose(f);
    return 1024 * kb;
}

static uint64_t next_random(uint64_t *state) { /* xorshift64 */
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

/* Block by block, so that the peak is the engine's. same: each block the first, for billions of them. */
static void fill_params(struct engine *e, const struct msg_model *m, float std, int same) {
    enum { BLOCK = 1 << 18 };
    static float block[BLOCK];
    size_t n = engine_elements(e);
    for (size_t at = 0; at < n; at += BLOCK) {
        size_t here = n - at < BLOCK ? n - at : BLOCK;
        if (!same || at == 0) model_init_elements(m, std, 1, at, here, block);
        engine_params_write(e, at, here, block);
    }
}

/* Layers of the preset until the memory that is free is full, but for what is not planned: CUDA's own. */
static int fit_layers(struct run *r, const struct msg_inner *inner, struct device device, struct err *err) {
    static struct nvml n;
    struct engine_memory plan;
    if (nvml_read(&n, err)) return -1;
    if (device.index >= (int)n.count) return err_set(err, ERR_CONFIG, "there is no device %d", device.index);
    double room = 0.97 * (double)(n.device[device.index].bytes - n.device[device.index].used) - 5e8;
    for (;; r->m.layers--) {
        engine_plan(&r->m, inner, r->k, NULL, &plan);
        if ((double)plan.all <= room) return 0;
        if (r->m.layers == 1) return err_set(err, ERR_MEMORY, "not one layer fits into %.1f GB", room / 1e9);
    }
}

int case_init(struct run *r, const struct bench_case *c, struct device device, struct err *err) {
    struct msg_inner inner;
    float std;
    uint64_t random = 1;
    if (proto_model_preset(c->preset, &r->m, err) ||
        proto_inner_preset(c->preset, 1000000000, &inner, &std, err))
        return -1;
    r->m.sequence = SEQUENCE;
    if (c->layers > 0) r->m.layers = (uint32_t)c->layers;
    inner.batch = (uint32_t)c->samples;
    r->samples = c->samples;
    if (!(r->k = device_create(device, c->precision ? TRAINER_BF16 : TRAINER_FP32, 0, 1, NULL, err))) return -1;
    if (device.kind == DEVICE_CPU) entries_time(r->k);
    if (c->layers < 0 && fit_layers(r, &inner, device, err)) return -1;
    if (!(r->e = engine_create(&r->m, &inner, r->k, err))) return -1;
    fill_params(r->e, &r->m, std, device.kind != DEVICE_CPU);
    size_t ids = (size_t)c->samples * (SEQUENCE + 1);
    if (!(r->tokens = malloc(ids * sizeof *r->tokens)))
        return err_set(err, ERR_MEMORY, "no memory for tokens");
    for (size_t i = 0; i < ids; i++) r->tokens[i] = (int32_t)(next_random(&random) % r->m.vocabulary);
    return 0;
}

void case_release(struct run *r) {
    free(r->tokens);
    engine_destroy(r->e);
    if (r->k) r->k->destroy(r->k);
}

int case_step(struct run *r, double *seconds, struct err *err) {
    struct engine_result result;
    double begin = now_s();
    if (engine_step(r->e, r->tokens, (uint32_t)r->samples, 1000000000 / 2, &result, err)) return -1;
    *seconds = now_s() - begin;
    return 0;
}

double product_flop(const struct product *p) { return 2.0 * p->m * p->n * p->k * p->count; }

/* Causal, forward and backward: a token sees (T + 1) / 2 keys on average. */
double case_attention_flop(const struct run *r) {
    return 12.0 * r->m.width * r->m.layers * (SEQUENCE + 1) / 2 * SEQUENCE * r->samples;
}

/* What AdamW must move: weights and both moments in and out, gradients in. */
static double optimizer_bytes(const struct run *r) { return 28.0 * (double)engine_elements(r->e); }

json_t *entries_json(const struct entries *t, int steps) {
    json_t *o = json_object();
    for (int i = 0; i < t->count; i++)
        json_object_set_new(o, t->entry[i].name, json_real(t->entry[i].seconds / steps));
    return o;
}

static json_t *report(const struct run *r, const struct bench_case *c, const double *seconds, int steps,
                      double peak, const struct floors *f) {
    const struct entries *t = entries_taken();
    double best = seconds[0], sum = 0, in_products = 0, flop = 0, floor = 0,
           tokens = (double)c->samples * SEQUENCE;
    json_t *list = json_array();
    for (int i = 0; i < steps; i++) {
        if (seconds[i] < best) best = seconds[i];
        sum += seconds[i];
        json_array_append_new(list, json_real(seconds[i]));
    }
    for (int i = 0; i < t->count; i++)
        if (entries_is_product(t->entry[i].name)) in_products += t->entry[i].seconds;
    for (int i = 0; i < t->products; i++) {
        flop += product_flop(&t->product[i]) / steps;
        floor += floors_seconds(f, i) * t->product[i].count / steps;
    }
    double memory = floors_memory(), rate = flop / floor, all = flop + case_attention_flop(r);
    return json_pack("{ss ss si sI si si sf sf sf sf sf sf sf sf sf sf sf so so ss}", "name", c->name,
                     "precision", c->precision ? "bf16" : "fp32", "layers", (int)r->m.layers, "parameters",
                     (json_int_t)engine_elements(r->e), "samples", c->samples, "sequence", SEQUENCE,
                     "tokens_per_s", tokens / best, "tokens_per_s_mean", tokens * steps / sum,
                     "product_share_of_time", in_products / sum, "gflop_products", flop / 1e9,
                     "gflop_attention", case_attention_flop(r) / 1e9, "onednn_gflop_per_s", rate / 1e9,
                     "share_of_onednn", all / best / rate, "share_of_onednn_products_only", floor / best,
                     "memory_gb_per_s", memory / 1e9, "floor_seconds",
                     all / rate + optimizer_bytes(r) / memory, "peak_bytes", peak, "seconds", list,
                     "entries", entries_json(t, steps), "kernels", r->k->description);
}

json_t *measure(const struct bench_case *c, int steps, struct err *err) {
    struct run r = { 0 };
    struct floors *f = NULL;
    double seconds[STEPS_MAX] = { 0 }, warm, peak = 0;
    json_t *out = NULL;
    steps = steps < 1 ? 1 : steps > STEPS_MAX ? STEPS_MAX : steps;
    int rc = case_init(&r, c, (struct device){ DEVICE_CPU, 0 }, err) || case_step(&r, &warm, err);
    entries_reset();
    for (int i = 0; !rc && i < steps; i++) {
        rc = case_step(&r, &seconds[i], err);
        if (i == 0) peak = peak_bytes();
        const struct entries *t = entries_taken();
        if (!rc && !f) rc = !(f = floors_create(t->product, t->products, c->precision, err));
        if (!rc) rc = floors_run(f, err);
    }
    if (!rc) out = report(&r, c, seconds, steps, peak, f);
    if (f) floors_destroy(f);
    case_release(&r);
    return out;
}
