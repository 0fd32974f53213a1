/* engine.h - inner training: one network, its gradient and its optimizer's state on one device, stepped with
 * tokens that somebody else chose. It knows no network, file server, round or lease; node/trainer
 * gives it batches and moves parameters in and out between steps.
 *
 * Parameters are one contiguous vector in canonical order (proto/model.h), in the backend's memory and
 * as it keeps weights (fp32, bf16 with the rest of an fp32 apart, bf16 alone); others read and write
 * element ranges of it between steps, as fp32. With bf16 alone what is
 * written is rounded, but for norms' weights, which are fp32 in every precision.
 *
 * AdamW, or Muon for matrices, with moments in fp32, bf16 or 8 bits: optimizer.h. The
 * learning rate is schedule_lr(inner, position), position = the run's committed tokens, because
 * the local step count means nothing to a run whose members come and go.
 *
 * The loss is a mean over the targets that count (node/model.h) of the whole batch, however it is cut
 * into micro-batches.
 *
 * An engine may be one rank of several that train one network together (struct engine_mesh). Each then makes
 * the same calls in the same order; what an entry says about parameters, moments and the saved state is
 * about those that the rank holds, and "the batch" is the batch of all. What is read is what the rank alone
 * answers for: buffers that all ranks write to hold everything once all have.
 *
 * Same parameters, same moments, same batches, same kernels, thread count and mesh: same bits. */
#ifndef INTELLECT_NODE_ENGINE_H
#define INTELLECT_NODE_ENGINE_H

#include "proto/err.h"
#include "proto/messages.h"

#include <stddef.h>
#include <stdint.h>

struct comm;
struct engine;
struct kernels;

struct engine_result {
    double loss;      /* mean nats per target of the batch, before the update */
    double penalty;   /* mean of z-loss and max-z loss, with their weights; not in `loss` */
    double grad_norm; /* global 2-norm before clipping */
    double lr;        /* what the schedule gave */
    uint64_t tokens;  /* trained in this step: samples * sequence */
    uint64_t step;    /* steps since create or load, this one included */
};

/* Build the engine and take all memory it will ever use: parameters (zero until written),
 * gradients, both moments (zero) and one arena of activations for a micro-batch.
 *
 * model, inner  checked with proto_model_check and proto_inner_check here; copied.
 * kernels       the backend, borrowed until engine_destroy; see kernels/kernels.h.
 *
 * A batch whose activations would pass ENGINE_ACTIVATION_BYTES_MAX is run as several micro-batches
 * whose gradients add up; how many depends on model, inner and how the backend keeps activations. Where
 * one sample passes it, some activations are computed twice (enum model_training).
 * Returns the engine, or NULL with ERR_CONFIG or ERR_MEMORY (msg says how many bytes). */
#define ENGINE_ACTIVATION_BYTES_MAX ((size_t)2 << 30)
struct engine *engine_create(const struct msg_model *model, const struct msg_inner *inner,
                             const struct kernels *kernels, struct err *err);
void engine_destroy(struct engine *e); /* NULL is fine */

/* What data-parallel ranks share out among them, shard.h, each with what stands before it; the result is the
 * same to rounding, and where the whole share of a rank is one micro-batch, bit for bit. */
enum engine_shard {
    ENGINE_SHARD_NONE = 0,  /* nothing: each holds all and updates all */
    ENGINE_SHARD_OPTIMIZER, /* moments, and the update */
    ENGINE_SHARD_GRADIENTS, /* gradients, once a layer's are complete */
    ENGINE_SHARD_FULL,      /* parameters, gathered when a layer needs them */
};
/* "none", "optimizer", "gradients", "full", or NULL past the last. */
const char *engine_shard_name(int shard);

/* What lies in the host's memory in the place of a device's (kernels.h: alloc_host): less is taken of that,
 * steps are slower by what goes over its link, and no bit is another. On the CPU it is the same memory. */
enum engine_offload {
    ENGINE_OFFLOAD_NONE = 0,
    ENGINE_OFFLOAD_OPTIMIZER, /* moments: 8 bytes a parameter with AdamW, read and written once a step */
};
/* "none", "optimizer", or NULL past the last. */
const char *engine_offload_name(int offload);

/* Where a rank stands; the groups are borrowed until engine_destroy, NULL where it is alone. An engine of
 * a mesh is made by engine_create_rank() in every rank at once. ERR_CONFIG where the network cannot be cut so, as
 * well. A failure of the mesh ends a call with comm->check()'s error, and the engine is of no more use. */
struct engine_mesh {
    const struct comm *world, *tensor, *data;
    enum engine_shard shard;
    size_t activation_bytes; /* in the place of ENGINE_ACTIVATION_BYTES_MAX; 0: that */
    enum engine_offload offload;
};
struct engine *engine_create_rank(const struct msg_model *model, const struct msg_inner *inner,
                                  const struct kernels *kernels, const struct engine_mesh *mesh,
                                  struct err *err);

/* Which of a batch's samples this rank trains on: [*first, *first + *count), maybe none. Alone: all. */
void engine_share(const struct engine *e, uint32_t samples, uint32_t *first, uint32_t *count);

/* At most so many samples (>= 1) at once from here on, where more would fit: less memory is touched, and
 * gradients of more micro-batches are added up. The same on all ranks. */
void engine_limit_micro_batch(struct engine *e, uint32_t samples);

/* Call on_layer whenever a pass over the network comes to another layer, forward or back: a step of many
 * micro-batches is long, and whoever watches should see that it goes on. */
void engine_set_watch(struct engine *e, void (*on_layer)(void *arg), void *arg);

/* What a rank of a mesh will take, by part, before anything is taken. Of a mesh: that of the first rank,
 * which holds no less than another. */
struct engine_shape {
    int tp, dp; /* layout_check() passed */
    enum engine_shard shard;
    size_t activation_bytes; /* as in struct engine_mesh */
    enum engine_offload offload;
};
struct engine_memory {
    uint32_t micro_batch; /* samples at once */
    int training;         /* enum model_training */
    size_t weights, gradients, optimizer, activations, scratch, buffers; /* bytes; buffers: between ranks */
    size_t all;
    size_t host; /* what is offloaded: not in `optimizer`, nor in `all` */
};
/* shape: NULL is one rank alone. */
void engine_plan(const struct msg_model *model, const struct msg_inner *inner, const struct kernels *kernels,
                 const struct engine_shape *shape, struct engine_memory *out);

/* The same with as many samples at once as `bytes` have room for, whatever inner.batch and the limit of
 * activations; what is computed twice is as little as lets one fit. -1 where not even one does: *out is
 * then the least that it takes. */
int engine_widest(const struct msg_model *model, const struct msg_inner *inner, const struct kernels *kernels,
                  const struct engine_shape *shape, size_t bytes, struct engine_memory *out);

/* The token that ends a document, -1 (as after create) for none; struct model_objective. */
void engine_set_document_end(struct engine *e, int32_t token);

const struct msg_model *engine_model(const struct engine *e);
const struct msg_inner *engine_inner(const struct engine *e);
size_t engine_elements(const struct engine *e);
uint64_t engine_steps(const struct engine *e); /* steps since create or load */

/* Copy parameters [first, first + n) out of the device, or into it. Between steps only. */
void engine_params_read(const struct engine *e, size_t first, size_t n, float *out);
void engine_params_write(struct engine *e, size_t first, size_t n, const float *in);

/* One inner step: forward, backward, clip to inner.clip, the optimizer's step.
 *
 * tokens    [share, sequence + 1], row i is one sample; the last column is only a target. Ids are
 *           checked against the vocabulary.
 * samples   in [1, inner.batch]: the rest of a lease may be less than a batch. The rank's share of
 *           them, engine_share(), is in `tokens`: alone, all.
 * position  the run's committed tokens, for the learning rate.
 *
 * Returns 0 with *result filled. Returns -1 and leaves parameters, moments and step count as they
 * were with ERR_CORRUPT where the loss or the gradient norm is not finite (msg names step and place) or
 * a token is outside the vocabulary. */
int engine_step(struct engine *e, const int32_t *tokens, uint32_t samples, uint64_t position,
                struct engine_result *result, struct err *err);

/* Mean loss in nats per target of `samples` sequences under the current parameters; changes nothing
 * but scratch memory. tokens as in engine_step (a share of them), samples > 0 may pass inner.batch. */
int engine_eval_loss(struct engine *e, const int32_t *tokens, uint32_t samples, double *loss,
                     struct err *err);

/* AdamW's second moments [first, first + n), zeroes where Muon has none, for a joiner: without them its
 * first steps are far too long (INTELLECT-1, arXiv:2412.01152, saw the loss spike). *count: how many steps
 * they average over, which the bias correction needs. First moments have a count of their own and stay
 * here. */
void engine_second_moments_read(const struct engine *e, size_t first, size_t n, float *out,
                                uint64_t *count);

/* Take over second moments [first, first + n) and the count of another engine. Ranges may come in
 * any order; call engine_reset_moments() before the first of them. The first moments then start
 * from zero with a count of zero, so the joiner's own gradients alone decide its direction.
 * Returns 0, or -1 with ERR_CORRUPT and nothing changed where a value is negative or not finite or
 * the range passes the end: it comes from another member. */
int engine_second_moments_write(struct engine *e, size_t first, size_t n, const float *in,
                                uint64_t count, struct err *err);

/* Both moments and their counts to zero: the state of a fresh start. */
void engine_reset_moments(struct engine *e);

/* Parameters, moments and counters at one moment, in memory of its own (12 bytes a parameter, taken
 * by _create), so that they are written while training goes on. The engine may go before it.
 * _create, _take return NULL, -1 with ERR_MEMORY or the device's error.
 *
 * shared  [3 * engine_elements] that all ranks of a mesh see, borrowed; each writes its part in _take(),
 *         and one rank writes the file, before any takes the next. NULL: taken here. */
struct engine_snapshot;
struct engine_snapshot *engine_snapshot_create(const struct engine *e, float *shared, struct err *err);
void engine_snapshot_destroy(struct engine_snapshot *s); /* NULL is fine */

/* Copy the state, between steps; the first time costs more (the memory is touched).
 * tag is stored with it and given back by engine_load: the caller's ledger index or the like. */
int engine_snapshot_take(struct engine_snapshot *s, const struct engine *e, uint64_t tag,
                         struct err *err);

/* Write it to `path`, so that a trainer that was killed goes on bit for bit: a temporary name beside
 * it, BLAKE2b digest at the end, fsync, rename, fsync of the folder. A crash at any moment leaves
 * the old file or the new one, never a half. From any thread; the snapshot is only read. The file is the
 * same whatever the mesh: one may go on where another ended.
 * Returns 0, or -1 with ERR_IO or ERR_FULL. */
int engine_snapshot_write(const struct engine_snapshot *s, const char *path, struct err *err);

/* All of these at once, for who can wait. */
int engine_save(const struct engine *e, const char *path, uint64_t tag, struct err *err);

/* Load what engine_snapshot_write wrote, into an engine of the same model. The file is read and its digest
 * checked before anything in the engine changes. Returns 0 with *tag filled, or -1 with
 * ERR_NOT_FOUND (no such file), ERR_TRUNCATED, ERR_CORRUPT (digest), ERR_CONFIG (another model). */
int engine_load(struct engine *e, const char *path, uint64_t *tag, struct err *err);

/* Are two states that were saved of this model the same, bit for bit? 0, or -1 with ERR_CORRUPT (msg names
 * the first tensor that differs), ERR_NOT_FOUND, ERR_TRUNCATED. Digests are not looked at. */
int engine_state_compare(const struct msg_model *model, const char *path, const char *other, struct err *err);

#endif
