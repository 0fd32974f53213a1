/* layout.h - which elements of the canonical parameter vector (proto/model.h) a rank of a mesh holds, and
 * where. Tensor-parallel ranks hold pieces of every matrix: rows of q, k, v (whole heads), gate, up,
 * embedding and head, columns of o and down; norm weights whole. Pieces lie one behind the other in
 * canonical order, in units: the embedding, each layer, and the final norm with the head. A unit is cut into
 * equal slices, one for each data-parallel rank (shard.h); so a unit is padded with zeroes to a multiple of
 * the ranks. One rank alone holds the canonical vector as it is. */
#ifndef INTELLECT_NODE_LAYOUT_H
#define INTELLECT_NODE_LAYOUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/err.h"
#include "proto/messages.h"
#include "proto/model.h"

struct layout {
    struct msg_model model;
    int tp, tp_rank, dp, dp_rank;
    size_t embed, layer, last; /* elements of a unit's pieces, without padding */
    size_t n;                  /* elements of the whole local vector, with it */
};

/* A rank's piece of a tensor. */
struct layout_piece {
    enum proto_model_role role;
    uint32_t unit;
    size_t canonical, width; /* the whole tensor: its first element, its columns */
    size_t row, column;      /* where in it the piece begins */
    size_t rows, columns;    /* of the piece */
    size_t at;               /* its first element in the local vector */
    bool shared;             /* all tensor-parallel ranks hold the same */
};

/* Can the network be cut into tp pieces? ERR_CONFIG names what does not divide, and what would. */
int layout_check(const struct msg_model *m, int tp, struct err *err);

/* m passed proto_model_check() and layout_check(). Constant time, no memory. */
void layout_init(struct layout *l, const struct msg_model *m, int tp, int tp_rank, int dp, int dp_rank);

/* Piece i of proto_model_tensor_count(). */
void layout_piece(const struct layout *l, uint32_t i, struct layout_piece *out);

/* Units are [0, layers + 2). A unit begins at local element layout_unit_at(l, unit), consists of dp slices of
 * layout_slice(l, unit) elements, and holds layout_unit_elements(l, unit) that are no padding. */
#define LAYOUT_UNITS(l) ((l)->model.layers + 2)
size_t layout_unit_at(const struct layout *l, uint32_t unit);
size_t layout_unit_elements(const struct layout *l, uint32_t unit);
size_t layout_slice(const struct layout *l, uint32_t unit);

/* Elements that lie side by side in both vectors. */
struct layout_run {
    size_t canonical, local, count;
    uint32_t unit;
    bool shared; /* as in layout_piece */
};

/* Call fn for all that this rank holds of the canonical range [first, first + n), in canonical order. */
void layout_each(const struct layout *l, size_t first, size_t n,
                 void (*fn)(void *arg, const struct layout_run *run), void *arg);

/* The norms' weights as a vector of their own, of layout_norms() elements in canonical order, whole on every
 * rank; and where in it a shared run begins. */
size_t layout_norms(const struct layout *l);
size_t layout_norm_at(const struct layout *l, const struct layout_run *run);

/* Cut a run down to what lies in the caller's own slice; false where nothing does. */
bool layout_own(const struct layout *l, struct layout_run *run);

#endif
