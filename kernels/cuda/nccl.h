/* nccl.h - private to kernels/cuda/: collectives by NCCL, which is loaded at run time, and none of whose
 * headers is needed. For ranks that each have a device of their own: NCCL takes no two on one. Calls are
 * asked for on streams (cudaStream_t), of a group one after the other, in the order that all ranks have.
 *
 * Communicators are non-blocking: a rank that died does not hold the others in a call of NCCL's; whoever
 * waits asks `lost`, and aborts. */
#ifndef INTELLECT_KERNELS_CUDA_NCCL_H
#define INTELLECT_KERNELS_CUDA_NCCL_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/kernels.h"

struct nccl;

/* True where NCCL is, of a version that this knows; INTELLECT_NCCL=0: not. */
int nccl_found(void);
/* What all ranks of a group are to join with. -1 with ERR_UNSUPPORTED, as all below: in NCCL's own words. */
int nccl_unique(uint8_t id[KERNELS_UNIQUE_BYTES], struct err *err);
/* Returns when all ranks have, or lost(arg) is true. */
struct nccl *nccl_join(const uint8_t id[KERNELS_UNIQUE_BYTES], int rank, int size,
                       int (*lost)(void *arg), void *arg, struct err *err);
/* Once all that was asked for is done, or others are gone. */
void nccl_leave(struct nccl *g);
/* While a stream is waited for: -1 where NCCL has found since that a call fails (a link, another rank's), and the
 * group is aborted. */
int nccl_watch(struct nccl *g, struct err *err);
/* What hangs on the device ends; later calls do nothing. */
void nccl_abort(struct nccl *g);

int nccl_all_reduce(struct nccl *g, void *stream, void *x, size_t n, int bf16, struct err *err);
int nccl_all_gather(struct nccl *g, void *stream, void *out, const void *in, size_t bytes, struct err *err);
int nccl_reduce_scatter(struct nccl *g, void *stream, void *out, const void *in, size_t n, int bf16,
                        struct err *err);
int nccl_broadcast(struct nccl *g, void *stream, void *x, size_t bytes, int root, struct err *err);

#endif
