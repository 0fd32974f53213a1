/* gpu.c - training steps on a GPU: as fast as they go, then with each entry of the table waited for. What they are
 * held against is the same backend's large products and sums; the memory against engine_plan(). */
#include <stdio.h>
#include <string.h>

#include "node/doctor.h"
#include "node/nvml.h"
#include "node/trainer.h"
#include "proto/model.h"
#include "tests/bench_train/bench_train.h"

const struct bench_case gpu_cases[] = {
    { "150m.fp32", "150m", 0, 0, 16 }, { "150m.bf16", "150m", 0, 1, 16 }, { "1b.bf16", "1b", 0, 1, 8 },
    { "8b.bf16", "8b", -1, 1, 4 },     { "10b.bf16", "10b", -1, 1, 4 },
};
const int gpu_case_count = sizeof gpu_cases / sizeof *gpu_cases;
#define STEPS_MAX 100

/* Bytes of the device that are taken; -1 where the driver does not tell. */
static double used_bytes(struct device d) {
    static struct nvml n;
    struct err err;
    return nvml_read(&n, &err) || d.index >= (int)n.count ? -1 : (double)n.device[d.index].used;
}

static double step_flop(const struct run *r, int steps) {
    const struct entries *t = entries_taken();
    double flop = 0;
    for (int i = 0; i < t->products; i++) flop += product_flop(&t->product[i]) / steps;
    return flop + case_attention_flop(r);
}

static double product_seconds(int steps) {
    const struct entries *t = entries_taken();
    double seconds = 0;
    for (int i = 0; i < t->count; i++)
        if (entries_is_product(t->entry[i].name)) seconds += t->entry[i].seconds / steps;
    return seconds;
}

static json_t *report(const struct run *r, const struct bench_case *c, double best, int steps, double used,
                      const struct doctor_rates *large) {
    struct msg_inner inner = *engine_inner(r->e);
    struct engine_memory plan;
    double tokens = (double)c->samples * SEQUENCE, flop = step_flop(r, steps), in_products = product_seconds(steps);
    engine_plan(&r->m, &inner, r->k, NULL, &plan);
    return json_pack("{ss ss si sI si si sf sf sf sf sf sf sf sf sf so ss}", "name", c->name, "precision",
                     c->precision ? "bf16" : "fp32", "layers", (int)r->m.layers, "parameters",
                     (json_int_t)engine_elements(r->e), "samples", c->samples, "sequence", SEQUENCE, "tokens_per_s",
                     tokens / best, "step_seconds", best, "tflop", flop / 1e12, "tflop_per_s", flop / best / 1e12,
                     "product_seconds", in_products, "large_products_tflop_per_s", large->flops / 1e12,
                     "memory_gb_per_s", large->bytes_per_s / 1e9, "plan_bytes", (double)plan.all, "used_bytes", used,
                     "entries", entries_json(entries_taken(), steps), "kernels", r->k->description);
}

/* Before the engine takes the memory. */
static int measure_large(const struct bench_case *c, struct device device, struct doctor_rates *large, struct err *err) {
    struct kernels *k = device_create(device, c->precision ? TRAINER_BF16 : TRAINER_FP32, 0, 1, NULL, err);
    int rc = k ? doctor_measure(k, large, err) : -1;
    if (k) k->destroy(k);
    return rc;
}

json_t *gpu_measure(const struct bench_case *c, struct device device, int steps, struct err *err) {
    struct run r = { 0 };
    struct doctor_rates large = { 0 };
    json_t *out = NULL;
    double best = 1e9, seconds, used = 0;
    steps = steps < 1 ? 1 : steps > STEPS_MAX ? STEPS_MAX : steps;
    int rc = measure_large(c, device, &large, err);
    double before = used_bytes(device);
    if (!rc) rc = case_init(&r, c, device, err) || case_step(&r, &seconds, err);
    for (int i = 0; !rc && i < steps; i++) {
        rc = case_step(&r, &seconds, err);
        if (seconds < best) best = seconds;
    }
    used = used_bytes(device) - before;
    if (!rc) entries_time(r.k);
    entries_reset();
    for (int i = 0; !rc && i < steps; i++) rc = case_step(&r, &seconds, err);
    if (!rc && entries_taken()->failure.code != ERR_NONE) {
        *err = entries_taken()->failure;
        rc = -1;
    }
    if (!rc) out = report(&r, c, best, steps, used, &large);
    case_release(&r);
    return out;
}

static double number(const json_t *o, const char *key) { return json_number_value(json_object_get(o, key)); }

void gpu_print_head(void) {
    printf("%-10s %6s %10s %9s %8s %6s %9s %9s %9s\n", "case", "layers", "tokens/s", "TFLOP/s", "large", "share",
           "products", "plan GB", "taken GB");
}

void gpu_print_row(const json_t *o) {
    double rate = number(o, "tflop_per_s"), large = number(o, "large_products_tflop_per_s");
    printf("%-10s %6.0f %10.0f %9.1f %8.1f %5.0f%% %8.0f%% %9.2f %9.2f\n",
           json_string_value(json_object_get(o, "name")), number(o, "layers"), number(o, "tokens_per_s"), rate, large,
           100 * rate / large, 100 * number(o, "product_seconds") / number(o, "step_seconds"),
           number(o, "plan_bytes") / 1e9, number(o, "used_bytes") / 1e9);
    fflush(stdout);
}
