/* muon.h - Muon, arXiv:2502.16982, for the matrices of a layer: momentum with Nesterov's look ahead, made
 * orthogonal (its singular values all about 1) by five Newton-Schulz iterations, and scaled by 0.2
 * sqrt(max(A, B)) of a matrix [A,B], so that its elements are as large as AdamW's steps are and AdamW's
 * rate and decay hold.
 *
 * In a mesh: tensor-parallel ranks iterate on their pieces and add up the small square between them, so
 * the work is theirs in equal parts. Data-parallel ranks that share out moments first gather the
 * directions of a layer; each then takes some of its matrices, and all are told. */
#ifndef INTELLECT_NODE_MUON_H
#define INTELLECT_NODE_MUON_H

#include "kernels/comm.h"
#include "kernels/kernels.h"
#include "node/layout.h"
#include "proto/err.h"

#include <stddef.h>

#define MUON_MOMENTUM 0.95f /* of both papers */

struct muon {
    const struct kernels *k;
    const struct comm *tensor; /* NULL or of one where the matrix is whole */
    float *direction;          /* [a layer's pieces, padded], where they lie in the unit */
    float *product;            /* [largest piece] */
    float *gram, *square;      /* [width, width] */
    void *rounded[2];          /* of a piece, of a square, as products take them; NULL where that is fp32 */
};

/* -1 with ERR_MEMORY; release what there is. A zeroed one that was never started is fine to release. */
int muon_init(struct muon *m, const struct layout *l, const struct comm *tensor, const struct kernels *k,
              struct err *err);
void muon_release(struct muon *m);
size_t muon_bytes(const struct layout *l, const struct kernels *k);

/* x, the rank's piece of a matrix, becomes its piece of the orthogonal one. A matrix of zeroes stays. */
void muon_orthogonalise(const struct muon *m, float *x, const struct layout_piece *p);

/* Of the matrices [A,B]. */
double muon_scale(double A, double B);

#endif
