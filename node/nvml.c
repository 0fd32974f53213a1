/* nvml.c - NVIDIA's management library, loaded at run time; see nvml.h. Prototypes and numbers are those of its
 * documented C interface, so that no header of it is needed. */
#include "node/nvml.h"

#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct nvml_handle *handle; /* nvmlDevice_t */
struct memory_info {
    unsigned long long total, free, used;
};
struct process_info { /* nvmlProcessInfo_t, of the third version of the call */
    unsigned pid;
    unsigned long long bytes;
    unsigned gpu_instance, compute_instance;
};
#define NOT_TOLD 0xffffffffffffffffull
#define NVLINKS_MAX 18

/* Functions that may be missing in an old driver are asked for before each use. */
struct library {
    void *dl;
    int (*init)(void);
    int (*shutdown)(void);
    const char *(*error)(int);
    int (*driver)(char *, unsigned);
    int (*cuda)(int *);
    int (*count)(unsigned *);
    int (*by_index)(unsigned, handle *);
    int (*name)(handle, char *, unsigned);
    int (*memory)(handle, struct memory_info *);
    int (*pcie[4])(handle, unsigned *);
    int (*nvlink)(handle, unsigned, unsigned *);
    int (*processes)(handle, unsigned *, struct process_info *);
    int (*ancestor)(handle, handle, int *);
};

static void find(const struct library *l, void *to, const char *name) { *(void **)to = dlsym(l->dl, name); }

static int load(struct library *l, struct err *err) {
    *l = (struct library){ .dl = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL) };
    if (!l->dl) return err_set(err, ERR_NOT_FOUND, "no NVIDIA driver is installed (%.150s)", dlerror());
    find(l, &l->init, "nvmlInit_v2");
    find(l, &l->shutdown, "nvmlShutdown");
    find(l, &l->error, "nvmlErrorString");
    find(l, &l->driver, "nvmlSystemGetDriverVersion");
    find(l, &l->cuda, "nvmlSystemGetCudaDriverVersion_v2");
    find(l, &l->count, "nvmlDeviceGetCount_v2");
    find(l, &l->by_index, "nvmlDeviceGetHandleByIndex_v2");
    find(l, &l->name, "nvmlDeviceGetName");
    find(l, &l->memory, "nvmlDeviceGetMemoryInfo");
    find(l, &l->pcie[0], "nvmlDeviceGetCurrPcieLinkGeneration");
    find(l, &l->pcie[1], "nvmlDeviceGetCurrPcieLinkWidth");
    find(l, &l->pcie[2], "nvmlDeviceGetMaxPcieLinkGeneration");
    find(l, &l->pcie[3], "nvmlDeviceGetMaxPcieLinkWidth");
    find(l, &l->nvlink, "nvmlDeviceGetNvLinkState");
    find(l, &l->processes, "nvmlDeviceGetComputeRunningProcesses_v3");
    find(l, &l->ancestor, "nvmlDeviceGetTopologyCommonAncestor");
    if (l->init && l->shutdown && l->error && l->driver && l->count && l->by_index && l->name && l->memory) return 0;
    dlclose(l->dl);
    return err_set(err, ERR_UNSUPPORTED, "the NVIDIA driver's libnvidia-ml.so.1 is too old: update the driver");
}

static bool NVML_FAILED(const struct library *l, int result, const char *what, struct err *err) {
    if (result == 0) return false;
    err_set(err, ERR_UNSUPPORTED, "NVML, %s: %.150s", what, l->error(result));
    return true;
}

static int take_pcie(const struct library *l, handle h, int which) {
    unsigned n = 0;
    return l->pcie[which] && !l->pcie[which](h, &n) ? (int)n : 0;
}

static void take_processes(const struct library *l, handle h, struct nvml_device *d) {
    struct process_info info[NVML_PROCESSES_MAX];
    unsigned n = NVML_PROCESSES_MAX;
    if (!l->processes || l->processes(h, &n, info) || n > NVML_PROCESSES_MAX) return;
    for (unsigned i = 0; i < n; i++)
        d->process[i] = (struct nvml_process){ info[i].pid, info[i].bytes == NOT_TOLD ? 0 : info[i].bytes };
    d->processes = n;
}

static int take_device(const struct library *l, unsigned i, handle *h, struct nvml_device *d, struct err *err) {
    struct memory_info memory;
    if (NVML_FAILED(l, l->by_index(i, h), "device", err) ||
        NVML_FAILED(l, l->name(*h, d->name, sizeof d->name), "name of a device", err) ||
        NVML_FAILED(l, l->memory(*h, &memory), "memory of a device", err))
        return -1;
    d->bytes = memory.total;
    d->used = memory.used;
    d->pcie_generation = take_pcie(l, *h, 0);
    d->pcie_lanes = take_pcie(l, *h, 1);
    d->pcie_generation_max = take_pcie(l, *h, 2);
    d->pcie_lanes_max = take_pcie(l, *h, 3);
    for (unsigned link = 0, up = 0; l->nvlink && link < NVLINKS_MAX; link++)
        if (!l->nvlink(*h, link, &up)) d->nvlinks += up != 0;
    take_processes(l, *h, d);
    return 0;
}

/* nvmlGpuTopologyLevel_t */
static const char *path_name(int level) {
    switch (level) {
    case 0: return "one board";
    case 10: return "one PCIe switch";
    case 20: return "PCIe switches";
    case 30: return "one CPU's bridge";
    case 40: return "one NUMA node";
    case 50: return "two CPUs";
    default: return NULL;
    }
}

static int read_all(const struct library *l, struct nvml *out, struct err *err) {
    handle h[NVML_DEVICES_MAX];
    int level;
    if (NVML_FAILED(l, l->driver(out->driver, sizeof out->driver), "driver version", err) ||
        NVML_FAILED(l, l->count(&out->count), "number of devices", err))
        return -1;
    if (l->cuda) l->cuda(&out->cuda);
    if (out->count > NVML_DEVICES_MAX) out->count = NVML_DEVICES_MAX;
    for (unsigned i = 0; i < out->count; i++)
        if (take_device(l, i, &h[i], &out->device[i], err)) return -1;
    for (unsigned i = 0; i < out->count; i++)
        for (unsigned j = 0; j < out->count; j++)
            if (i != j && l->ancestor && !l->ancestor(h[i], h[j], &level)) out->path[i][j] = path_name(level);
    return 0;
}

int nvml_read(struct nvml *out, struct err *err) {
    struct library l;
    memset(out, 0, sizeof *out);
    if (load(&l, err)) return -1;
    int rc = NVML_FAILED(&l, l.init(), "start", err) ? -1 : 0;
    if (rc == 0) {
        rc = read_all(&l, out, err);
        l.shutdown();
    }
    dlclose(l.dl);
    return rc;
}

/* ---- who holds memory --------------------------------------------------------------------------- */

static int by_bytes(const void *a, const void *b) {
    const struct nvml_process *x = a, *y = b;
    return x->bytes < y->bytes ? 1 : x->bytes > y->bytes ? -1 : x->pid < y->pid ? -1 : x->pid > y->pid;
}

/* Of another user, or in another container, a process has no name here. */
static void process_name(unsigned pid, char out[32]) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%u/comm", pid);
    FILE *f = fopen(path, "re");
    if (!f || !fgets(out, 32, f)) snprintf(out, 32, "not visible from here");
    out[strcspn(out, "\n")] = '\0';
    if (f) fclose(f);
}

int nvml_holders(const struct nvml *n, char *out, size_t size) {
    struct nvml_process all[NVML_DEVICES_MAX * NVML_PROCESSES_MAX];
    size_t count = 0, used = 0;
    for (unsigned i = 0; i < n->count; i++)
        for (unsigned j = 0; j < n->device[i].processes; j++) all[count++] = n->device[i].process[j];
    *out = '\0';
    if (count == 0) return 0;
    qsort(all, count, sizeof *all, by_bytes);
    for (size_t i = 0; i < count; i++) {
        char name[32], one[120];
        process_name(all[i].pid, name);
        int length = snprintf(one, sizeof one, "%sprocess %u (%s, %llu MB)", i ? ", " : "", all[i].pid, name,
                              (unsigned long long)all[i].bytes >> 20);
        if (used + (size_t)length >= size) break;
        memcpy(out + used, one, (size_t)length + 1);
        used += (size_t)length;
    }
    return used > 0;
}
