/* sdpa.h - private to kernels/cuda/: attention by cuDNN, through the C interface of its backend (its
 * operation graphs). cuDNN is loaded at run time and none of its headers is needed; where it is missing, or
 * has no kernel for a shape, attention.cu's own kernels compute, which are also its check.
 *
 * Causal, grouped queries, one document a sequence, bf16, tensors as kernels.h lays them out; the kept
 * statistics are those of the own kernels, so forward and backward may be of either. The backward pass adds
 * nothing with atomics: its dQ is one product, for which cuDNN may keep the gradients of all scores at once.
 * So that this stays below SDPA_SCRATCH_MAX it goes sample by sample, or key/value head by head, where it
 * must.
 *
 * Plain C without CUDA's headers, so that the graphs are built and finalised in tests without a GPU. */
#ifndef INTELLECT_KERNELS_CUDA_SDPA_H
#define INTELLECT_KERNELS_CUDA_SDPA_H

#include <stddef.h>

#include "proto/err.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SDPA_SCRATCH_MAX ((size_t)1 << 30)
#define SDPA_CANNOT ((size_t)-1)

struct sdpa_shape {
    int B, T, H, KV, D; /* kernels.h */
};
struct sdpa;

/* On the current device. stream: a cudaStream_t. NULL: err says what is missing; the own kernels will do. */
struct sdpa *sdpa_create(void *stream, struct err *err);
void sdpa_destroy(struct sdpa *s); /* NULL is fine */
/* CUDNN_VERSION: 91900 is 9.19.0. */
int sdpa_version(const struct sdpa *s);

/* Device memory that a call wants besides its tensors, SDPA_CANNOT where cuDNN has no kernel for the shape.
 * The first call for a shape makes its plan, some 100 ms; plans of SDPA_SHAPES_MAX shapes are kept. */
#define SDPA_SHAPES_MAX 16
size_t sdpa_forward_scratch(struct sdpa *s, const struct sdpa_shape *shape);
size_t sdpa_backward_scratch(struct sdpa *s, const struct sdpa_shape *shape);

/* Queued on the stream. The shape is one whose scratch was asked for. -1: cuDNN's reason. */
int sdpa_forward(struct sdpa *s, const struct sdpa_shape *shape, void *out, float *lse, const void *qkv,
                 void *scratch, struct err *err);
int sdpa_backward(struct sdpa *s, const struct sdpa_shape *shape, void *dqkv, const void *dout,
                  const void *qkv, const void *out, const float *lse, void *scratch, struct err *err);

/* For tests without a GPU: build and finalise a graph. ERR_NOT_FOUND: there is no cuDNN. */
struct sdpa_counts {
    int pointwise, products, reductions, reshapes, tensors;
};
int sdpa_try_graph(const struct sdpa_shape *shape, int backward, struct sdpa_counts *out, struct err *err);

#ifdef __cplusplus
}
#endif

#endif
