/* nvml.h - what NVIDIA's management library tells of this machine's GPUs. It belongs to the driver and is loaded
 * at run time, so nothing of it is needed to build or to start. Nothing is opened on a device, so an agent may
 * ask too. Devices come in the order of the PCI bus, whatever CUDA_VISIBLE_DEVICES says. */
#ifndef INTELLECT_NODE_NVML_H
#define INTELLECT_NODE_NVML_H

#include <stddef.h>
#include <stdint.h>

#include "proto/err.h"

#define NVML_DEVICES_MAX 16
#define NVML_PROCESSES_MAX 32

struct nvml_process {
    unsigned pid;
    uint64_t bytes; /* 0: the driver does not tell */
};

struct nvml_device {
    char name[96];
    uint64_t bytes, used; /* of its memory */
    int pcie_generation, pcie_lanes, pcie_generation_max, pcie_lanes_max; /* 0: not told */
    int nvlinks;          /* that are up */
    struct nvml_process process[NVML_PROCESSES_MAX];
    unsigned processes;
};

/* How near two devices are, as the driver says it: through one switch, several, the CPU's bridge, ... */
struct nvml {
    char driver[80]; /* its version */
    int cuda;        /* the newest CUDA it can: 13000 is 13.0 */
    unsigned count;
    struct nvml_device device[NVML_DEVICES_MAX];
    const char *path[NVML_DEVICES_MAX][NVML_DEVICES_MAX]; /* NULL: not told */
};

/* Returns 0, or -1 with ERR_NOT_FOUND (no driver) or ERR_UNSUPPORTED (msg has the library's reason). */
int nvml_read(struct nvml *out, struct err *err);

/* "process 4711 (python3, 70123 MB), ..." of those with the most, as many as fit; 0 where there is none. */
int nvml_holders(const struct nvml *n, char *out, size_t size);

#endif
