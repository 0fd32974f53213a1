/* shard.h - the vectors that a rank trains: its parameters and their gradient, and what the data-parallel
 * ranks do with them and with the optimizer's moments (optimizer.h) together. Each unit (layout.h) is cut
 * into a slice for every rank; the setting says which of the vectors a rank keeps whole and which in its
 * own slices only:
 *
 *              parameters   gradients    moments
 *   none       whole        whole        whole     every rank updates everything
 *   optimizer  whole        whole        own       ZeRO-1 (arXiv:1910.02054)
 *   gradients  whole        own          own       ZeRO-2: a unit's gradient is reduced once it is complete
 *   full       own          own          own       ZeRO-3: and its weights are gathered when they are needed
 *
 * Gradients are added in the order of ranks whatever the setting.
 *
 * A pass over the network does not wait for the other ranks where its kernels can go on meanwhile (comm.h, begin()):
 * while a unit is computed, the weights of the next one are gathered and the gradient of the one before is reduced.
 * It costs one more layer's room for each. */
#ifndef INTELLECT_NODE_SHARD_H
#define INTELLECT_NODE_SHARD_H

#include "kernels/comm.h"
#include "kernels/kernels.h"
#include "node/engine.h"
#include "node/layout.h"
#include "node/model.h"

#define SHARD_LAYER_WEIGHTS 3 /* layers in turn: the last two that were asked for (model.h), and the next */
#define SHARD_LAYER_GRADS 2   /* the one that is computed, and the one before, on its way */
#define SHARD_WEIGHT_SLOTS (2 + SHARD_LAYER_WEIGHTS) /* the embedding's, the last unit's, layers' */
#define SHARD_GRAD_SLOTS (1 + SHARD_LAYER_GRADS)     /* the embedding's, other units' */

/* Room for a unit on its way. */
struct shard_slot {
    void *at;
    uint32_t unit;   /* whose weights it has, UINT32_MAX: none */
    bool under_way;  /* between ranks, beside the rest; */
    uint32_t number; /* comm->finish() */
};

/* Fields are for reading; NULLs of the mesh where the engine is alone. */
struct shard {
    const struct kernels *k;
    struct engine_mesh mesh; /* shard NONE where there is one data-parallel rank */
    struct layout layout;
    size_t params_n, grads_n;
    void *params;            /* [params_n] as the backend keeps weights ... */
    uint16_t *rest;          /* ... and what it keeps apart of them, or NULL */
    float *norms;            /* the norms' weights in fp32, all of them on every rank (layout_norms()) */
    uint16_t *norms_rest;    /* their rests where the backend keeps no other, or NULL */
    float *grads;            /* [grads_n] */
    struct shard_slot weights[SHARD_WEIGHT_SLOTS], unit_grads[SHARD_GRAD_SLOTS];
    bool adds;               /* this pass adds to the gradient ... */
    bool goes_back;          /* ... and has come to the head ... */
    uint32_t asked;          /* ... and asked last for the weights of this unit */
    void (*on_unit)(void *arg); /* a pass comes to a unit; NULL: nobody asked */
    void *on_unit_arg;
};

/* Take all memory. mesh: NULL where alone. -1 with ERR_MEMORY; release what there is. */
int shard_init(struct shard *s, const struct msg_model *m, const struct kernels *k,
               const struct engine_mesh *mesh, struct err *err);
void shard_release(struct shard *s);

/* What that takes, of parameters and of gradients. */
void shard_bytes(const struct layout *l, enum engine_shard shard, const struct kernels *k, size_t *params,
                 size_t *grads);

/* Cut a run down to what of the parameters, of the gradients and the moments is here: false where nothing
 * is. _at() says where it begins in the vector. */
bool shard_has_params(const struct shard *s, struct layout_run *run);
bool shard_has_grads(const struct shard *s, struct layout_run *run);
bool shard_has_state(const struct shard *s, struct layout_run *run);
size_t shard_param_at(const struct shard *s, const struct layout_run *run);
size_t shard_grad_at(const struct shard *s, const struct layout_run *run);

/* What is kept apart of a run's weights (struct kernels), or NULL. Norms have a rest with bf16 alone too: near
 * 1 a bf16's steps are far larger than their updates, and there are few of them. */
uint16_t *shard_rest(const struct shard *s, const struct layout_run *run);

/* Cut a run down to what this rank alone answers for, of all ranks of the mesh. */
bool shard_answers_for(const struct shard *s, struct layout_run *run);

/* Piece i of the layout as a run. */
struct layout_run shard_piece(const struct shard *s, uint32_t i);

/* A pass of the model over this rank's units. Ranks make as many passes as each other. adds: to the gradient
 * that is there, else in its place; gradients come to be complete in shard_reduce(). */
struct model_units shard_units(struct shard *s, bool adds);

/* After the last pass: add up what ranks still have apart. */
void shard_reduce(struct shard *s);

/* After an update: the slices of all to all who keep them whole, and the norms'. */
void shard_gather(struct shard *s);

/* Parameters were written: what was gathered of them is old. */
void shard_forget_gathered(struct shard *s);

#endif
