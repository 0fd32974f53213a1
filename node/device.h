/* device.h - what a process computes on: the option --device, and the backend for it. */
#ifndef INTELLECT_NODE_DEVICE_H
#define INTELLECT_NODE_DEVICE_H

#include "proto/err.h"

struct kernels;

enum device_kind {
    DEVICE_CPU = 0,
    DEVICE_CUDA,
    DEVICE_AUTO
}; /* auto: a GPU where there is one, else the CPU */
struct device {
    int kind, index; /* index: of CUDA's devices, as CUDA_VISIBLE_DEVICES leaves and orders them; DEVICE_EACH:
                      * each rank's own, by its number */
};
#define DEVICE_EACH (-1)

/* Of a command that has no other lines to say about it. */
#define DEVICE_HELP \
    "  --device D         cpu, cuda, cuda:N (the N-th GPU, from 0), or auto (default): a GPU where\n" \
    "                     libintellect-cuda.so, a driver and a device are there, else the CPU\n"

/* "auto", "cpu", "cuda" (the first, for all ranks), "cuda:N", "cuda:each". ERR_CONFIG names the allowed. */
int device_parse(const char *text, struct device *out, struct err *err);

/* "cpu", "cuda:0", "a GPU, else cpu". */
#define DEVICE_NAME_BYTES 24
void device_name(struct device d, char out[DEVICE_NAME_BYTES]);

/* What rank `rank` of a trainer computes on. */
struct device device_of_rank(struct device d, int rank);

/* Make the backend, of enum trainer_precision. Only in the process that uses it: neither a GPU nor OpenMP
 * survives a fork.
 *
 * threads     of a CPU backend, kernels.h
 * ranks       of the trainer this process is one of
 * why_no_gpu  filled where auto takes the CPU, else its code is ERR_NONE; may be NULL
 *
 * auto takes the CPU where there is no GPU that this program can use, and for a trainer of several ranks: on
 * one GPU they would do in turn what one process does faster. A GPU without room is an error: the CPU in its
 * place would only look like a very slow node. NULL with what kernels_cuda_create() or kernels_cpu_create()
 * say; ERR_MEMORY of a GPU names who holds it. */
struct kernels *device_create(struct device d, int precision, int threads, int ranks, struct err *why_no_gpu,
                              struct err *err);

/* Memory of the machine that programs could have now; 0: not known. */
double device_host_bytes(void);

/* To an ERR_MEMORY of a GPU add which processes hold its memory, where the driver tells. */
void device_name_holders(const struct kernels *k, struct err *err);

#endif
