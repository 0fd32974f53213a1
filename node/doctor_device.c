/* doctor_device.c - what this machine computes on, how fast that is, and whether the run's model fits; see
 * doctor.h. */
#include "node/doctor.h"

#include "kernels/kernels.h"
#include "node/engine.h"
#include "node/trainer.h"
#include "proto/model.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Data sheets; the first whose name stands in the device's, as whole words. */
static const struct doctor_card cards[] = {
    { "B200", 2250, 75, 8000 },         { "GH200", 990, 67, 4000 },    { "H200", 989, 67, 4800 },
    { "H100 PCIe", 756, 51, 2000 },     { "H100 NVL", 835, 60, 3900 }, { "H100", 989, 67, 3350 },
    { "H800", 989, 67, 3350 },          { "A100-PCIE-40GB", 312, 19.5, 1555 },
    { "A100-SXM4-40GB", 312, 19.5, 1555 }, { "A100", 312, 19.5, 1935 }, { "A800", 312, 19.5, 1935 },
    { "A40", 150, 37, 696 },            { "A30", 165, 10.3, 933 },     { "A10G", 70, 35, 600 },
    { "A10", 125, 31, 600 },            { "L40S", 362, 91.6, 864 },    { "L40", 181, 90.5, 864 },
    { "L4", 121, 30.3, 300 },           { "RTX 6000 Ada", 364, 91, 960 }, { "RTX A6000", 155, 38.7, 768 },
    { "RTX 5090", 209, 105, 1792 },     { "RTX 4090", 165, 82.6, 1008 }, { "RTX 4080", 97, 48.7, 717 },
    { "RTX 3090", 71, 35.6, 936 },      { "RTX 3080", 60, 29.8, 760 },
};
#define PRODUCTS_GOOD 0.5 /* of the data sheet; large products reach 60 to 80 % */
#define MEMORY_GOOD 0.6

#define MEASURE_S 1.0
#define PRODUCT_MAX 8192           /* rows, and columns */
#define STREAM_MAX ((size_t)1 << 27) /* elements */
#define ENGINE_SHARE 0.8           /* of the rate of large products that a training step reaches, about */
#define UPDATE_BYTES 28.0          /* that AdamW moves for a parameter */

const struct doctor_card *doctor_card(const char *name) {
    for (size_t i = 0; i < sizeof cards / sizeof *cards; i++) {
        const char *at = strstr(name, cards[i].name);
        if (at && (at == name || at[-1] == ' ') && !isalnum((unsigned char)at[strlen(cards[i].name)]))
            return &cards[i];
    }
    return NULL;
}

/* ---- the GPUs there are ------------------------------------------------------------------------- */

static void say_gpu(struct doctor *d, const struct nvml *n, unsigned i) {
    const struct nvml_device *g = &n->device[i];
    bool narrow = g->pcie_lanes && g->pcie_lanes_max && g->pcie_lanes < g->pcie_lanes_max;
    char link[96] = "";
    if (g->pcie_generation)
        snprintf(link, sizeof link, ", PCIe %d.0 x%d%s", g->pcie_generation, g->pcie_lanes,
                 narrow ? " (the card can more: look at its slot)" : "");
    json_t *o = doctor_say(d, "gpu", narrow ? DOCTOR_WARN : DOCTOR_OK,
                           "%u: %s, %.1f GB, %.1f free%s, %d NVLinks", i, g->name, (double)g->bytes / 1e9,
                           (double)(g->bytes - g->used) / 1e9, link, g->nvlinks);
    json_object_set_new(o, "index", json_integer(i));
    json_object_set_new(o, "device", json_string(g->name));
    json_object_set_new(o, "bytes", json_integer((json_int_t)g->bytes));
    json_object_set_new(o, "free_bytes", json_integer((json_int_t)(g->bytes - g->used)));
    json_object_set_new(o, "pcie_generation", json_integer(g->pcie_generation));
    json_object_set_new(o, "pcie_lanes", json_integer(g->pcie_lanes));
    json_object_set_new(o, "nvlinks", json_integer(g->nvlinks));
    for (unsigned j = 0; j < i; j++)
        if (n->path[i][j]) doctor_say(d, "topology", DOCTOR_OK, "GPU %u and %u: through %s", j, i, n->path[i][j]);
}

static bool say_gpus(struct doctor *d, struct nvml *n) {
    char holders[160];
    struct err err;
    if (nvml_read(n, &err)) {
        enum doctor_verdict v = err.code == ERR_NOT_FOUND ? DOCTOR_SKIP : DOCTOR_WARN;
        doctor_say(d, "driver", v, "%s", err.msg);
        return false;
    }
    json_t *o = doctor_say(d, "driver", DOCTOR_OK, "NVIDIA driver %s, for CUDA up to %d.%d, %u GPUs", n->driver,
                           n->cuda / 1000, n->cuda % 1000 / 10, n->count);
    json_object_set_new(o, "driver", json_string(n->driver));
    for (unsigned i = 0; i < n->count; i++) say_gpu(d, n, i);
    if (nvml_holders(n, holders, sizeof holders))
        doctor_say(d, "gpu users", DOCTOR_WARN, "memory of GPUs is held by %s", holders);
    return true;
}

/* Which of the driver's devices is CUDA's device `index`; -1: its order is not known. */
static int physical(const struct nvml *n, int index) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    char *end;
    for (int i = 0; visible && *visible; i++, visible = *end ? end + 1 : end) {
        long at = strtol(visible, &end, 10);
        if (end == visible || (*end && *end != ',')) return -1;
        if (i == index) return at >= 0 && at < (long)n->count ? (int)at : -1;
    }
    return !visible && index < (int)n->count ? index : -1;
}

/* ---- rates -------------------------------------------------------------------------------------- */

typedef void measured(const struct kernels *k, void *const x[3], size_t n);

/* Seconds of the fastest of as many calls as fit into `seconds`, three at least: what else runs here makes others
 * slow. < 0 on failure. */
static double time_of(const struct kernels *k, measured *call, void *const x[3], size_t n, double seconds,
                      struct err *err) {
    double began = doctor_now_s(), last = began, best = -1;
    for (int calls = 0; calls < 3 || last - began < seconds; calls++) {
        call(k, x, n);
        if (k->check(k, err)) return -1;
        double now = doctor_now_s();
        if (best < 0 || now - last < best) best = now - last;
        last = now;
    }
    return best;
}

static void product(const struct kernels *k, void *const x[3], size_t n) {
    k->matmul_forward(k, x[0], x[1], x[2], (int)n, (int)n, (int)n);
}

static void stream(const struct kernels *k, void *const x[3], size_t n) { k->add(k, x[0], x[0], x[1], n); }

/* The smallest size, of `least` times powers of two up to `most`, whose call takes 20 ms and longer than that of half
 * the size, which waiting for a busy core does not; so any backend is measured in about a second. Buffers for it in x. 0: no memory, or a failure. */
static size_t fit(const struct kernels *k, measured *call, size_t least, size_t most, bool square, void *x[3],
                  struct err *err) {
    double before = 0;
    for (size_t n = least;; n *= 2) {
        size_t elements = square ? n * n : n;
        for (int i = 0; i < 3; i++) {
            k->free(k, x[i]);
            if (!(x[i] = k->alloc(k, elements * sizeof(float), err))) return 0;
        }
        call(k, x, n); /* the first of a shape prepares it */
        if (k->check(k, err)) return 0;
        double took = time_of(k, call, x, n, 0.1, err);
        if (took < 0) return 0;
        if ((took > 0.02 && before > 0 && took > 1.5 * before) || 2 * n > most) return n;
        before = took;
    }
}

int doctor_measure(const struct kernels *k, struct doctor_rates *out, struct err *err) {
    void *x[3] = { NULL };
    double seconds = -1;
    size_t n = fit(k, product, 64, PRODUCT_MAX, true, x, err);
    if (n && (seconds = time_of(k, product, x, n, MEASURE_S, err)) > 0)
        out->flops = 2.0 * (double)n * (double)n * (double)n / seconds;
    if (seconds > 0 && (n = fit(k, stream, (size_t)1 << 16, STREAM_MAX, false, x, err)) &&
        (seconds = time_of(k, stream, x, n, MEASURE_S, err)) > 0)
        out->bytes_per_s = (double)n * (2 * sizeof(float) + (double)k->act_bytes) / seconds;
    for (int i = 0; i < 3; i++) k->free(k, x[i]);
    return n && seconds > 0 ? 0 : -1;
}

/* unit: "FLOP/s", behind G or T; sheet: 0 where it is not known. */
static void say_rate(struct doctor *d, const char *name, const char *unit, double rate, double sheet,
                     double good) {
    json_t *o;
    bool low = sheet > 0 && rate < good * sheet;
    double shown = rate < 1e12 ? rate / 1e9 : rate / 1e12;
    const char *size = rate < 1e12 ? "G" : "T";
    if (sheet > 0)
        o = doctor_say(d, name, low ? DOCTOR_WARN : DOCTOR_OK, "%.4g %s%s, %.0f %% of the card's data sheet%s",
                       shown, size, unit, 100 * rate / sheet,
                       low ? ": look at its power limit and temperature, and at what else uses it" : "");
    else
        o = doctor_say(d, name, DOCTOR_OK, "%.4g %s%s", shown, size, unit);
    json_object_set_new(o, "rate", json_real(rate));
    if (sheet > 0) json_object_set_new(o, "data_sheet", json_real(sheet));
}

static void say_rates(struct doctor *d, const struct kernels *k, const struct doctor_rates *r) {
    const struct doctor_card *card = strcmp(k->name, "cuda") ? NULL : doctor_card(k->description);
    double peak = !card ? 0 : k->act_bytes == 2 ? card->bf16_tflops : card->fp32_tflops;
    say_rate(d, "products", "FLOP/s", r->flops, 1e12 * peak, PRODUCTS_GOOD);
    say_rate(d, "bandwidth", "B/s", r->bytes_per_s, card ? 1e9 * card->gb_per_s : 0, MEMORY_GOOD);
}

/* ---- the model ----------------------------------------------------------------------------------- */

static void say_memory(struct doctor *d, const struct kernels *k, const struct nvml *n, bool on_gpu,
                       const struct msg_model *m, const struct msg_inner *inner) {
    struct engine_memory e;
    int at = on_gpu ? physical(n, d->device.index) : -1;
    double there = !on_gpu ? device_host_bytes() : at < 0 ? 0 : (double)(n->device[at].bytes - n->device[at].used);
    engine_plan(m, inner, k, NULL, &e);
    double takes = (double)e.all;
    json_t *o;
    if (there == 0)
        o = doctor_say(d, "memory", DOCTOR_SKIP, "training takes %.2f GB; what there is is not known",
                       takes / 1e9);
    else
        o = doctor_say(d, "memory", takes > there ? DOCTOR_FAIL : DOCTOR_OK,
                       "training takes %.2f GB, %.2f are free%s", takes / 1e9, there / 1e9,
                       takes > there ? "; --precision bf16-stochastic takes less, see intellect-node plan" : "");
    json_object_set_new(o, "bytes", json_real(takes));
    json_object_set_new(o, "free_bytes", json_real(there));
}

/* Of a token: forward and backward through every matrix, and causal attention. */
static double flop_per_token(const struct msg_model *m) {
    double n = (double)proto_model_elements(m), table = m->tied ? 0 : (double)m->vocabulary * m->width;
    return 6 * (n - table) + 6.0 * m->width * m->layers * (m->sequence + 1);
}

static void say_speed(struct doctor *d, const struct doctor_rates *r, const struct msg_model *m,
                      const struct msg_inner *inner) {
    double tokens = (double)inner->batch * m->sequence;
    double seconds = tokens * flop_per_token(m) / (ENGINE_SHARE * r->flops) +
                     UPDATE_BYTES * (double)proto_model_elements(m) / r->bytes_per_s;
    json_t *o = doctor_say(d, "speed", DOCTOR_OK,
                           "about %.*f tokens/s on a model of %.2f million parameters: %.3g s an inner step",
                           tokens / seconds < 10 ? 2 : 0, tokens / seconds, (double)proto_model_elements(m) / 1e6,
                           seconds);
    json_object_set_new(o, "tokens_per_s", json_real(tokens / seconds));
}

/* Other programs on the cores: what is measured next is then not what the machine can do. */
static void say_load(struct doctor *d) {
    double load;
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    if (getloadavg(&load, 1) != 1 || load < (double)cores / 2 + 0.5) return;
    json_t *o = doctor_say(d, "load", DOCTOR_WARN,
                           "%.1f other programs want the %ld cores: the rates below are of what they leave", load,
                           cores);
    json_object_set_new(o, "load", json_real(load));
}

void doctor_device(struct doctor *d) {
    struct nvml *n = calloc(1, sizeof *n);
    struct err err = { 0 }, why;
    struct msg_model m;
    struct msg_inner inner;
    struct doctor_rates r = { 0 };
    bool known = n && say_gpus(d, n);
    struct kernels *k = device_create(d->device, d->precision, d->threads, 1, &why, &err);
    if (!k) {
        doctor_say(d, "device", DOCTOR_FAIL, "%s", err.msg);
        free(n);
        return;
    }
    bool on_gpu = !strcmp(k->name, "cuda");
    json_t *o = doctor_say(d, "device", DOCTOR_OK, "computes on %s%s%s", k->description,
                           why.code != ERR_NONE ? "; no GPU: " : "", why.code != ERR_NONE ? why.msg : "");
    json_object_set_new(o, "backend", json_string(k->name));
    if (!on_gpu) say_load(d);
    if (doctor_measure(k, &r, &err)) doctor_say(d, "products", DOCTOR_FAIL, "%s", err.msg);
    else say_rates(d, k, &r);
    if (!doctor_shape(d, &m, &inner)) {
        doctor_say(d, "speed", DOCTOR_SKIP, "no model is known: give an invite or --model");
    } else {
        say_memory(d, k, n, on_gpu && known, &m, &inner);
        if (r.bytes_per_s > 0) say_speed(d, &r, &m, &inner);
    }
    k->destroy(k);
    free(n);
}
