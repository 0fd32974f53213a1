/* model.h - the network as everybody outside a device sees it: presets by name, a check of what a
 * person wrote, and the canonical order of its parameters. Anchor, fragments, contributions and
 * checkpoints are element ranges of this one vector, so every program must agree on it.
 *
 * The order is that of Hugging Face's LlamaForCausalLM, layer by layer:
 *
 *   model.embed_tokens.weight                          [vocabulary, width]
 *   model.layers.N.input_layernorm.weight              [width]
 *   model.layers.N.self_attn.q_proj.weight             [width, width]
 *   model.layers.N.self_attn.k_proj.weight, v_proj     [kv_heads * head, width]
 *   model.layers.N.self_attn.o_proj.weight             [width, width]
 *   model.layers.N.post_attention_layernorm.weight     [width]
 *   model.layers.N.mlp.gate_proj.weight, up_proj       [ffn, width]
 *   model.layers.N.mlp.down_proj.weight                [width, ffn]
 *   model.norm.weight                                  [width]
 *   lm_head.weight, unless tied                        [vocabulary, width]
 *
 * with head = width / heads. Matrices are [out, in], row-major. Rotary embedding pairs dimension i
 * with i + head/2 of a head, as Hugging Face's rotate_half does, so no weight is ever permuted.
 *
 * rope_type and what goes with it are Hugging Face's rope_scaling: `factor`, `low_freq_factor`,
 * `high_freq_factor`, `original_max_position_embeddings`. */
#ifndef INTELLECT_PROTO_MODEL_H
#define INTELLECT_PROTO_MODEL_H

#include "proto/err.h"
#include "proto/messages.h"

#define PROTO_TENSOR_NAME_BYTES_MAX 64 /* with its final NUL */
#define PROTO_MODEL_TENSORS_PER_LAYER 9

/* rope_type of a model, and Hugging Face's name for it; NULL for a number that is none. */
enum proto_rope_type { ROPE_DEFAULT = 0, ROPE_LINEAR = 1, ROPE_LLAMA3 = 2 };
const char *proto_rope_type_name(unsigned type);

/* What stands where in a layer; also the index of the tensor within its layer. */
enum proto_model_role {
    MODEL_INPUT_NORM, MODEL_Q, MODEL_K, MODEL_V, MODEL_O, MODEL_POST_NORM, MODEL_GATE, MODEL_UP,
    MODEL_DOWN, MODEL_EMBED, MODEL_FINAL_NORM, MODEL_HEAD
};

struct proto_tensor {
    char name[PROTO_TENSOR_NAME_BYTES_MAX]; /* Hugging Face's */
    enum proto_model_role role;
    uint32_t layer;    /* 0 where the role has none */
    int dims;          /* 1 (norm weights) or 2 (matrices) */
    uint64_t shape[2]; /* [out, in], or [width, 1] where dims is 1 */
    uint64_t offset;   /* first element in the canonical vector */
    uint64_t count;    /* elements, shape[0] * shape[1] */
};

/* Fill *m from a preset: debug (1.1M parameters, bytes), 10m, 150m (all bytes), 1b, 8b, 10b (Llama 3
 * vocabulary of 128256). Returns 0, or -1 with ERR_CONFIG naming every preset. */
int proto_model_preset(const char *name, struct msg_model *m, struct err *err);

/* The names above in one line, for help texts and comments in run.yaml. */
const char *proto_model_preset_names(void);

/* Fill *inner and *init_std with the settings that were tuned for a preset; for all but debug
 * they come from the literature. The schedule is a proposal: 1 % of the tokens warm-up, 20 % decay.
 * total_tokens  > 0; what the run will train on in all.
 * Returns 0, or -1 with ERR_CONFIG. */
int proto_inner_preset(const char *name, uint64_t total_tokens, struct msg_inner *inner,
                       float *init_std, struct err *err);

/* Rate and momentum of the outer step that suit a preset, with the same sources. 0, or -1 with ERR_CONFIG. */
int proto_outer_preset(const char *name, float *lr, float *momentum, struct err *err);

/* Can this network be built: nothing is zero, heads divide width, kv_heads divide heads, the head
 * is even (rotation works on pairs), rope_theta > 1, norm_eps > 0, rope_scaling has what its type
 * needs and nothing else, sizes fit the wire's limits.
 * Everything below assumes that it passed. Returns 0, or -1 with ERR_CONFIG naming the key. */
int proto_model_check(const struct msg_model *m, struct err *err);

/* Tensors of equal names and shapes: one's parameters can be the other's, which may have other sequences or
 * another rope_theta. */
int proto_model_same_shapes(const struct msg_model *a, const struct msg_model *b);
/* Two networks that compute the same from the same parameters. */
int proto_model_equal(const struct msg_model *a, const struct msg_model *b);

/* Are these settings usable: batch > 0, rates and betas in range, warm-up and decay fit into the
 * total. Returns 0, or -1 with ERR_CONFIG naming the key and what is allowed. */
int proto_inner_check(const struct msg_inner *inner, struct err *err);

/* Elements of the whole vector. Constant time. */
uint64_t proto_model_elements(const struct msg_model *m);

/* Number of tensors, and the i-th of them (asserts i < count). Constant time, so a loop over all
 * tensors is linear. */
uint32_t proto_model_tensor_count(const struct msg_model *m);
void proto_model_tensor(const struct msg_model *m, uint32_t i, struct proto_tensor *out);

/* The tensor called `name`. Returns 0, or -1 with ERR_NOT_FOUND. Linear in the tensors. */
int proto_model_tensor_find(const struct msg_model *m, const char *name, struct proto_tensor *out,
                            struct err *err);

/* Index of the tensor that element `element` of the vector lies in (asserts that it lies in one). */
uint32_t proto_model_tensor_at(const struct msg_model *m, uint64_t element);

/* Which fragment each chunk of the vector belongs to, in fragments that are synchronised one after the other
 * (Streaming DiLoCo, arXiv:2501.18512, strided pattern): chunks of layer l (by their first element) in
 * fragment l mod `fragments`, the others each where the fewest elements are. With more fragments than
 * layers chunk i is in fragment i mod `fragments`.
 *   out  [chunks], chunks = elements over chunk_elements, rounded up
 * Returns 0, or -1 with ERR_CONFIG where a fragment would be empty. */
int proto_model_fragments(const struct msg_model *m, uint32_t chunk_elements, uint32_t fragments,
                          uint8_t *out, struct err *err);

#endif
