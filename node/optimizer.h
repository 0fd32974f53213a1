/* optimizer.h - what turns a gradient into a step, and what it remembers for that: the moments of what a
 * rank holds (shard.h), tensor by tensor.
 *
 * AdamW (arXiv:1711.05101), bias-corrected; matrices decay, embedding and norm weights do not.
 *
 * Muon (inner.optimizer), arXiv:2502.16982, for the matrices of layers, muon.h; embedding, head and norms
 * stay with AdamW. A matrix has momentum, in the place of the first moment, and no second moment.
 *
 * inner.states says how the moments of the layers' matrices are kept (kernels.h); others are fp32. Each is
 * computed in fp32 from what is kept and rounded stochastically from the step's number and the element's:
 * same steps, same bits, whatever the threads. 8 bits go in blocks, which begin with a rank's part of a
 * tensor: sharding changes their bits, and none of the others'. */
#ifndef INTELLECT_NODE_OPTIMIZER_H
#define INTELLECT_NODE_OPTIMIZER_H

#include "kernels/kernels.h"
#include "node/muon.h"
#include "node/shard.h"
#include "proto/err.h"
#include "proto/messages.h"

#include <stddef.h>
#include <stdint.h>

enum optimizer_moment { OPTIMIZER_FIRST, OPTIMIZER_SECOND, OPTIMIZER_MOMENTS };

/* A moment of the rank's own part of a tensor. */
struct optimizer_state {
    void *at; /* NULL: there is none */
    enum kernels_state how;
};

struct optimizer_tensor {
    size_t local, count; /* the rank's part, in the local vector (layout.h) */
    struct optimizer_state moment[OPTIMIZER_MOMENTS];
};

struct optimizer {
    struct shard *s;
    struct msg_inner inner;
    uint64_t steps[OPTIMIZER_MOMENTS]; /* that went into each moment */
    struct optimizer_tensor *of;       /* [tensors] */
    void *arena;                       /* all moments; in the host's memory where they are offloaded */
    size_t bytes;
    /* [OPTIMIZER_CHUNK] elements on their way, where something is not fp32 */
    float *chunk[OPTIMIZER_MOMENTS], *host;
    struct muon muon;
};
#define OPTIMIZER_CHUNK ((size_t)1 << 18)

/* Take all memory, zeroes. s, inner: the first is borrowed until release. -1 with ERR_MEMORY; release what
 * there is. */
int optimizer_init(struct optimizer *o, struct shard *s, const struct msg_inner *inner, struct err *err);
void optimizer_release(struct optimizer *o);

/* What that takes of a rank of this layout: of the device, and of the host's memory for what is offloaded. */
void optimizer_bytes(const struct layout *l, enum engine_shard shard, const struct msg_inner *inner,
                     const struct kernels *k, enum engine_offload offload, size_t *device, size_t *host);

/* Step number `step`, from 1: parameters -= what the gradient times grad_scale asks for. All ranks at
 * once. */
void optimizer_step(struct optimizer *o, uint64_t step, double lr, double grad_scale);

/* Moments of the canonical range [first, first + n): out of what the rank alone answers for, zeroes where
 * there are none; into all that it has. Where a block of 8 bits lies in the range in part, all of it is
 * rounded again. */
void optimizer_read(const struct optimizer *o, enum optimizer_moment which, size_t first, size_t n,
                    float *out);
void optimizer_write(struct optimizer *o, enum optimizer_moment which, size_t first, size_t n,
                     const float *in);

/* All moments and counts to zero. */
void optimizer_reset(struct optimizer *o);

#endif
