/* device.c - the option --device, and the backend for it; see device.h. */
#include "node/device.h"

#include "kernels/kernels.h"
#include "node/nvml.h"
#include "node/trainer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEVICES_MAX 256

int device_parse(const char *text, struct device *out, struct err *err) {
    *out = (struct device){ DEVICE_AUTO, 0 };
    if (!strcmp(text, "auto")) return 0;
    out->kind = strncmp(text, "cuda", 4) ? DEVICE_CPU : DEVICE_CUDA;
    if (!strcmp(text, "cuda:each")) out->index = DEVICE_EACH;
    if (!strcmp(text, "cpu") || !strcmp(text, "cuda") || out->index == DEVICE_EACH) return 0;
    if (!strncmp(text, "cuda:", 5) && text[5] >= '0' && text[5] <= '9') {
        char *end;
        unsigned long n = strtoul(text + 5, &end, 10);
        out->index = (int)n;
        if (!*end && n < DEVICES_MAX) return 0;
    }
    return err_set(err, ERR_CONFIG, "--device %.40s: one of auto, cpu, cuda, cuda:N with N from 0 to %d, cuda:each", text,
                   DEVICES_MAX - 1);
}

void device_name(struct device d, char out[DEVICE_NAME_BYTES]) {
    if (d.kind == DEVICE_CUDA && d.index == DEVICE_EACH) snprintf(out, DEVICE_NAME_BYTES, "cuda:each");
    else if (d.kind == DEVICE_CUDA) snprintf(out, DEVICE_NAME_BYTES, "cuda:%d", d.index);
    else snprintf(out, DEVICE_NAME_BYTES, "%s", d.kind == DEVICE_AUTO ? "a GPU, else cpu" : "cpu");
}

struct device device_of_rank(struct device d, int rank) {
    if (d.kind == DEVICE_CUDA && d.index == DEVICE_EACH) d.index = rank;
    return d;
}

void device_name_holders(const struct kernels *k, struct err *err) {
    char holders[160];
    struct err none;
    if (err->code != ERR_MEMORY || (k && strcmp(k->name, "cuda") != 0)) return;
    struct nvml *n = malloc(sizeof *n);
    if (n && !nvml_read(n, &none) && nvml_holders(n, holders, sizeof holders)) {
        size_t used = strlen(err->msg);
        snprintf(err->msg + used, sizeof err->msg - used, "; memory is held by %s", holders);
    }
    free(n);
}

static struct kernels *create_cpu(int precision, int threads, struct err *err) {
    if (precision == TRAINER_FP32) return kernels_cpu_create(threads, err);
    return kernels_cpu_bf16_create(threads, precision == TRAINER_BF16_STOCHASTIC, err);
}

static struct kernels *create_cuda(int index, int precision, struct err *err) {
    size_t weight = precision == TRAINER_FP32 ? sizeof(float) : 2, rest = precision == TRAINER_BF16 ? 2 : 0;
    struct kernels *k = kernels_cuda_create(index, weight, rest, err);
    if (!k) device_name_holders(NULL, err);
    return k;
}

struct kernels *device_create(struct device d, int precision, int threads, int ranks, struct err *why_no_gpu,
                              struct err *err) {
    struct err ignored = { 0 }, *why = why_no_gpu ? why_no_gpu : &ignored;
    *why = (struct err){ 0 };
    if (d.kind == DEVICE_CUDA) return create_cuda(d.index == DEVICE_EACH ? 0 : d.index, precision, err);
    if (d.kind == DEVICE_AUTO && ranks > 1)
        err_set(why, ERR_UNSUPPORTED, "a trainer of %d ranks takes one where --device cuda or cuda:each says so", ranks);
    if (d.kind == DEVICE_AUTO && ranks <= 1) {
        struct kernels *k = create_cuda(0, precision, why);
        if (k) return k;
        if (why->code != ERR_NOT_FOUND && why->code != ERR_UNSUPPORTED) {
            *err = *why;
            return NULL;
        }
    }
    return create_cpu(precision, threads, err);
}

double device_host_bytes(void) {
    char line[256];
    double kb = 0;
    FILE *f = fopen("/proc/meminfo", "re");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "MemAvailable: %lf", &kb) == 1) break;
    if (f) fclose(f);
    return 1024 * kb;
}
