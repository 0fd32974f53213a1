/* model.h - the Llama network (arXiv:2407.21783) forward and backward on a kernel table: RMSNorm,
 * rotary embedding, grouped-query attention, SwiGLU, tied or untied head: Hugging Face's
 * LlamaForCausalLM. It knows shapes and the order of kernels; parameters, gradients and optimizer
 * belong to the engine. */
#ifndef INTELLECT_NODE_MODEL_H
#define INTELLECT_NODE_MODEL_H

#include "kernels/kernels.h"
#include "proto/err.h"
#include "proto/messages.h"

#include <stddef.h>
#include <stdint.h>

struct comm;
struct layout;
struct model;

/* What is kept for the backward pass, and what is computed again there, the cheapest first: each step has
 * that of the one before it too. Attention's output and statistics are always kept. Loss and gradients are
 * the same, bit for bit. */
enum model_training {
    MODEL_EVALUATES = 0,     /* nothing is kept, there is no backward pass */
    MODEL_TRAINS = 1,        /* everything */
    MODEL_AGAIN_NORMS = 2,   /* not the norms' outputs ... */
    MODEL_AGAIN_SWIGLU = 3,  /* ... nor SwiGLU's output ... */
    MODEL_AGAIN_GATE_UP = 4, /* ... nor the product before it, half of a layer's forward FLOP ... */
    MODEL_AGAIN_LAYER = 5,   /* ... nor anything but a layer's input and attention's output */
};

/* Take the arena of activations for B sequences of T tokens, once.
 *
 * m         checked with proto_model_check; copied.
 * T         tokens per sequence in [1, m->sequence].
 * training  what is kept of every layer; MODEL_EVALUATES has one layer's worth.
 * kernels   borrowed until model_destroy.
 * Returns the model, or NULL with ERR_MEMORY (msg says how many bytes). */
struct model *model_create(const struct msg_model *m, const struct kernels *kernels, int B, int T,
                           enum model_training training, struct err *err);
void model_destroy(struct model *model); /* NULL is fine */

/* The same where parameters and gradients lie as a rank of a mesh holds them (layout.h; copied). Its
 * tensor-parallel ranks make the same calls with the same tokens and have the same losses; each has the
 * gradient of what it holds, but of a norm's weights, which all hold, its own part of the sum.
 * tensor  their group, borrowed until model_destroy; may be NULL where it is one. tp divides T. What fails in
 *         it is for whoever made it to see. */
struct model *model_create_piece(const struct layout *layout, const struct comm *tensor,
                                 const struct kernels *kernels, int B, int T, enum model_training training,
                                 struct err *err);

/* Bytes that model_create_piece takes for its arena. */
size_t model_arena_bytes(const struct layout *layout, const struct kernels *kernels, int B, int T,
                         enum model_training training);
/* Bytes of scratch that the backend will hold when it ran; struct kernels. */
size_t model_scratch_bytes(const struct layout *layout, const struct kernels *kernels, int B, int T);

/* Where the weights of a unit (layout.h: embedding, layers, final norm with head) are, for a caller that does
 * not hold them all, and where their gradient goes. A pass asks for units in order of the layers and, going
 * back, in reverse; a tied head asks for unit 0 again.
 *
 * norms       weights of all norms in fp32 (layout_norms()), in the backend's memory; whole on every rank.
 * weights     the unit's; at least the last two layers asked for, and units 0 and layers + 1, stay valid
 *             until the pass ends.
 * grads       room for the unit's gradient; asked for when the first part of it comes, and again.
 * grads_done  nothing more comes for this unit in this pass. */
struct model_units {
    void *arg;
    const float *norms;
    const void *(*weights)(void *arg, uint32_t unit);
    float *(*grads)(void *arg, uint32_t unit);
    void (*grads_done)(void *arg, uint32_t unit);
};

/* What is trained on; until it is set, all tokens and cross-entropy alone.
 *
 * document_end  the token that ends a document, -1 for none. A sequence is then several documents, the
 *               first of which may lack its beginning, the last its end. Each is computed as if it
 *               stood alone: attention stays inside it, positions count from its first token, and no
 *               token is predicted from the document before it, so the target after a document_end
 *               does not count. This is what transformers computes from position_ids that restart,
 *               with DataCollatorWithFlattening's labels, and INTELLECT-1's packing.
 * z, max_z      weights of what is added to the loss of a target; struct kernels_loss. */
struct model_objective {
    int32_t document_end;
    float z, max_z;
};
void model_set_objective(struct model *model, const struct model_objective *objective);

/* Sums over the targets that count. */
struct model_loss {
    double nats;    /* cross-entropy */
    double penalty; /* z-loss and max-z loss, with their weights */
};

/* How many of the B*T targets of tokens [B,T+1] count. */
size_t model_targets(const struct model *model, const int32_t *tokens, int B, int T);

/* Logits of the token after tokens[position]: out [vocabulary], host memory.
 * params  canonical vector in the backend's memory, as the backend keeps weights. The norms' are read in
 *         fp32 through units (model_units) alone; from a vector of bf16 they are what it has.
 * tokens  [T] host memory, each in [0, vocabulary): the caller checked. Nothing looks ahead, so
 *         those after `position` may be anything: callers that keep to a few values of T spare the
 *         backend from preparing itself for many.
 * The sequence is one document, whatever the objective; the model is alone.
 * Costs a whole forward pass over T: there is no cache of keys and values. */
int model_logits(struct model *model, const void *params, const int32_t *tokens, int T,
                 int position, float *out, struct err *err);

/* The loss of B*T targets. tokens [B,T+1]: position t predicts t+1. No gradient. Asks the backend
 * for its first failure. */
int model_loss(struct model *model, const void *params, const int32_t *tokens, int B, int T,
               struct model_loss *loss, struct err *err);

int model_loss_units(struct model *model, const struct model_units *units, const int32_t *tokens, int B,
                     int T, struct model_loss *loss, struct err *err);

/* Forward and backward: the same loss, and the gradient of (nats + penalty) * grad_scale.
 * grads  canonical vector in the backend's memory; replaced (KERNELS_SET) or added to.
 * The model must have been created for training. */
int model_backward(struct model *model, const void *params, float *grads, const int32_t *tokens,
                   int B, int T, float grad_scale, enum kernels_write write,
                   struct model_loss *loss, struct err *err);

/* The same for a caller that hands out units. tokens may be NULL here and in model_loss_units(): B sequences
 * in which no target counts, for a rank that has no samples and must keep in step with those that have. */
int model_backward_units(struct model *model, const struct model_units *units, const int32_t *tokens, int B,
                         int T, float grad_scale, enum kernels_write write, struct model_loss *loss,
                         struct err *err);

/* After a backward pass: is the residual stream finite, as far as the rank has it, behind the embedding
 * (unit 0) or behind layer unit - 1? Waits. */
int model_output_is_finite(const struct model *model, uint32_t unit);

/* Initial parameters [first, first + n) of the canonical vector, host memory: norm weights are 1,
 * matrices are N(0, std) from outer_init_normal(seed), whose stream is indexed by canonical
 * element, so every machine derives the same bits for any range.
 * The range must lie inside the vector. */
void model_init_elements(const struct msg_model *m, float std, uint64_t seed, uint64_t first,
                         size_t n, float *out);

#endif
