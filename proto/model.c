/* model.c - presets, checks and the canonical order of parameters; see model.h. */
#include "proto/model.h"

#include <assert.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

struct preset {
    const char *name;
    struct msg_model model;
    uint32_t batch; /* samples per inner step of one member */
    double lr;
    float init_std;
    float outer_lr, outer_momentum;
};

/* 1b, 8b: the shapes of Llama 3.2 and 3 (arXiv:2407.21783); 10b: INTELLECT-1 (arXiv:2412.01152),
 * whose inner rate it also has. The small ones have a vocabulary of bytes, the tokenizer there is.
 * debug was tuned for the least loss after 25 to 60 CPU seconds on text from the first byte: wide and
 * two layers deep beat narrow and deep, a small batch a large one, six heads four or three; its
 * initial values of 0.05 instead of 0.02 were worth as much as twice the time.
 * Outer rate and momentum are INTELLECT-1's, but for debug, whose runs have tens of outer steps: a
 * momentum of 0.9 has not come up to speed then. Held-out loss of four nodes after 2 M tokens (49 outer
 * steps): rate 1 without momentum 1.757, with 0.3 1.766, 0.9 with 0.5 1.773, 0.7 with 0.9 2.024. */
static const struct preset presets[] = {
    { "debug", { 2, 192, 6, 2, 704, 256, 128, 1e4, 1e-5, 1 }, 4, 1.5e-3, 0.05f, 1, 0 },
    { "10m", { 12, 256, 8, 4, 832, 256, 256, 1e4, 1e-5, 1 }, 16, 1e-3, 0.04f, 0.7f, 0.9f },
    { "150m", { 13, 1024, 16, 4, 2816, 256, 1024, 1e5, 1e-5, 1 }, 16, 6e-4, 0.02f, 0.7f, 0.9f },
    { "1b", { 16, 2048, 32, 8, 8192, 128256, 8192, 5e5, 1e-5, 1 }, 32, 4e-4, 0.02f, 0.7f, 0.9f },
    { "8b", { 32, 4096, 32, 8, 14336, 128256, 8192, 5e5, 1e-5, 0 }, 128, 3e-4, 0.02f, 0.7f, 0.9f },
    { "10b", { 42, 4096, 32, 8, 14336, 128256, 8192, 5e5, 1e-5, 0 }, 128, 7.5e-5, 0.02f, 0.7f, 0.9f },
};
#define PRESETS (sizeof presets / sizeof *presets)

const char *proto_model_preset_names(void) {
    return "debug, 10m, 150m, 1b, 8b, 10b";
}

static const struct preset *preset_find(const char *name, struct err *err) {
    for (size_t i = 0; i < PRESETS; i++)
        if (!strcmp(presets[i].name, name)) return &presets[i];
    err_set(err, ERR_CONFIG, "model preset '%s' is none of: %s", name, proto_model_preset_names());
    return NULL;
}

int proto_model_preset(const char *name, struct msg_model *m, struct err *err) {
    const struct preset *p = preset_find(name, err);
    if (!p) return -1;
    *m = p->model;
    return 0;
}

int proto_inner_preset(const char *name, uint64_t total_tokens, struct msg_inner *inner,
                       float *init_std, struct err *err) {
    const struct preset *p = preset_find(name, err);
    if (!p) return -1;
    if (!total_tokens) return err_set(err, ERR_CONFIG, "total_tokens is 0: there is no corpus");
    *inner = (struct msg_inner){
        .batch = p->batch, .lr = p->lr, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
        .weight_decay = 0.1, .clip = 1.0, .warmup_tokens = total_tokens / 100,
        .decay_tokens = total_tokens / 5, .total_tokens = total_tokens,
    };
    *init_std = p->init_std;
    return 0;
}

int proto_outer_preset(const char *name, float *lr, float *momentum, struct err *err) {
    const struct preset *p = preset_find(name, err);
    if (!p) return -1;
    *lr = p->outer_lr;
    *momentum = p->outer_momentum;
    return 0;
}

static int check_size(const char *key, uint32_t value, uint32_t max, struct err *err) {
    if (value >= 1 && value <= max) return 0;
    return err_set(err, ERR_CONFIG, "model.%s is %u; allowed are 1 to %u", key, value, max);
}

const char *proto_rope_type_name(unsigned type) {
    static const char *const names[] = { "default", "linear", "llama3" };
    return type < 3 ? names[type] : NULL;
}

/* What a type does not use must be 0, so that one network has one encoding. */
static int check_unused(const struct msg_model *m, const char *key, double value, struct err *err) {
    if (value == 0) return 0;
    return err_set(err, ERR_CONFIG, "model.%s is %g; rope_type \"%s\" has none: leave it 0", key, value,
                   proto_rope_type_name(m->rope_type));
}

static int check_rope(const struct msg_model *m, struct err *err) {
    if (!(m->rope_theta > 1 && m->rope_theta <= 1e12))
        return err_set(err, ERR_CONFIG, "model.rope_theta is %g; allowed are 1 (exclusive) to 1e12",
                       m->rope_theta);
    if (!proto_rope_type_name(m->rope_type))
        return err_set(err, ERR_CONFIG, "model.rope_type is %u; allowed are 0 to 2", m->rope_type);
    if (m->rope_type == ROPE_DEFAULT && check_unused(m, "rope_factor", m->rope_factor, err)) return -1;
    if (m->rope_type != ROPE_DEFAULT && !(m->rope_factor >= 1 && m->rope_factor <= 1e6))
        return err_set(err, ERR_CONFIG, "model.rope_factor is %g; allowed are 1 to 1e6", m->rope_factor);
    if (m->rope_type != ROPE_LLAMA3)
        return check_unused(m, "rope_low_factor", m->rope_low_factor, err) ||
               check_unused(m, "rope_high_factor", m->rope_high_factor, err) ||
               check_unused(m, "rope_original", m->rope_original, err) ? -1 : 0;
    if (!(m->rope_low_factor > 0 && m->rope_high_factor > m->rope_low_factor && m->rope_high_factor <= 1e6))
        return err_set(err, ERR_CONFIG, "model.rope_low_factor is %g and rope_high_factor %g; the first must "
                       "be over 0, the second over the first and at most 1e6", m->rope_low_factor,
                       m->rope_high_factor);
    return check_size("rope_original", m->rope_original, 1u << 20, err);
}

int proto_model_check(const struct msg_model *m, struct err *err) {
    if (check_size("layers", m->layers, 1024, err) || check_size("width", m->width, 65536, err) ||
        check_size("heads", m->heads, 1024, err) || check_size("kv_heads", m->kv_heads, 1024, err) ||
        check_size("ffn", m->ffn, 262144, err) ||
        check_size("vocabulary", m->vocabulary, 1u << 20, err) ||
        check_size("sequence", m->sequence, 1u << 20, err))
        return -1;
    if (m->width % m->heads)
        return err_set(err, ERR_CONFIG, "model.width %u is not a multiple of model.heads %u",
                       m->width, m->heads);
    if (m->width / m->heads % 2)
        return err_set(err, ERR_CONFIG, "model.width / model.heads is %u, which is odd: rotary "
                       "embedding turns pairs", m->width / m->heads);
    if (m->heads % m->kv_heads)
        return err_set(err, ERR_CONFIG, "model.heads %u is not a multiple of model.kv_heads %u",
                       m->heads, m->kv_heads);
    if (check_rope(m, err)) return -1;
    if (!(m->norm_eps > 0 && m->norm_eps <= 0.1))
        return err_set(err, ERR_CONFIG, "model.norm_eps is %g; allowed are 0 (exclusive) to 0.1",
                       m->norm_eps);
    if (m->tied > 1) return err_set(err, ERR_CONFIG, "model.tied is %u; allowed are 0 and 1", m->tied);
    return 0;
}

int proto_model_same_shapes(const struct msg_model *a, const struct msg_model *b) {
    return a->layers == b->layers && a->width == b->width && a->heads == b->heads &&
           a->kv_heads == b->kv_heads && a->ffn == b->ffn && a->vocabulary == b->vocabulary &&
           a->tied == b->tied;
}

int proto_model_equal(const struct msg_model *a, const struct msg_model *b) {
    return proto_model_same_shapes(a, b) && a->sequence == b->sequence && a->rope_theta == b->rope_theta &&
           a->norm_eps == b->norm_eps && a->rope_type == b->rope_type &&
           a->rope_factor == b->rope_factor && a->rope_low_factor == b->rope_low_factor &&
           a->rope_high_factor == b->rope_high_factor && a->rope_original == b->rope_original;
}

static int check_rate(const char *key, double value, bool zero_ok, double below, struct err *err) {
    if ((value > 0 || (zero_ok && value == 0)) && value < below) return 0;
    return err_set(err, ERR_CONFIG, "inner.%s is %g; allowed are 0 (%s) to %g (exclusive)", key,
                   value, zero_ok ? "inclusive" : "exclusive", below);
}

int proto_inner_check(const struct msg_inner *in, struct err *err) {
    if (!in->batch || in->batch > 65536)
        return err_set(err, ERR_CONFIG, "inner.batch is %u; allowed are 1 to 65536", in->batch);
    if (check_rate("lr", in->lr, false, 10, err) || check_rate("beta1", in->beta1, true, 1, err) ||
        check_rate("beta2", in->beta2, true, 1, err) || check_rate("eps", in->eps, false, 1, err) ||
        check_rate("weight_decay", in->weight_decay, true, 10, err) ||
        check_rate("clip", in->clip, true, 1e9, err) ||
        check_rate("z_loss", in->z_loss, true, 1, err) ||
        check_rate("max_z_loss", in->max_z_loss, true, 1, err))
        return -1;
    if (in->schedule > SCHEDULE_CONSTANT)
        return err_set(err, ERR_CONFIG, "inner.schedule is %u; allowed are 0 to %d", in->schedule,
                       SCHEDULE_CONSTANT);
    if (in->optimizer > OPTIMIZER_MUON)
        return err_set(err, ERR_CONFIG, "inner.optimizer is %u; allowed are 0 and 1", in->optimizer);
    if (in->states > STATES_8BIT)
        return err_set(err, ERR_CONFIG, "inner.states is %u; allowed are 0 to %d", in->states, STATES_8BIT);
    if (in->total_tokens && in->decay_tokens > in->total_tokens)
        return err_set(err, ERR_CONFIG, "inner.decay_tokens %llu is more than inner.total_tokens %llu",
                       (unsigned long long)in->decay_tokens, (unsigned long long)in->total_tokens);
    if (in->total_tokens && in->warmup_tokens > in->total_tokens)
        return err_set(err, ERR_CONFIG, "inner.warmup_tokens %llu is more than inner.total_tokens %llu",
                       (unsigned long long)in->warmup_tokens, (unsigned long long)in->total_tokens);
    return 0;
}

/* ---- the canonical vector ---------------------------------------------------------------------- */

static const char *const layer_names[PROTO_MODEL_TENSORS_PER_LAYER] = {
    [MODEL_INPUT_NORM] = "input_layernorm", [MODEL_Q] = "self_attn.q_proj",
    [MODEL_K] = "self_attn.k_proj",         [MODEL_V] = "self_attn.v_proj",
    [MODEL_O] = "self_attn.o_proj",         [MODEL_POST_NORM] = "post_attention_layernorm",
    [MODEL_GATE] = "mlp.gate_proj",         [MODEL_UP] = "mlp.up_proj",
    [MODEL_DOWN] = "mlp.down_proj",
};

static void set_shape(struct proto_tensor *t, int dims, uint64_t out, uint64_t in) {
    t->dims = dims;
    t->shape[0] = out;
    t->shape[1] = in;
    t->count = out * in;
}

static void role_shape(const struct msg_model *m, enum proto_model_role role, struct proto_tensor *t) {
    uint64_t width = m->width, kv = width / m->heads * m->kv_heads;
    switch (role) {
    case MODEL_INPUT_NORM:
    case MODEL_POST_NORM:
    case MODEL_FINAL_NORM: set_shape(t, 1, width, 1); return;
    case MODEL_Q:
    case MODEL_O: set_shape(t, 2, width, width); return;
    case MODEL_K:
    case MODEL_V: set_shape(t, 2, kv, width); return;
    case MODEL_GATE:
    case MODEL_UP: set_shape(t, 2, m->ffn, width); return;
    case MODEL_DOWN: set_shape(t, 2, width, m->ffn); return;
    case MODEL_EMBED:
    case MODEL_HEAD: set_shape(t, 2, m->vocabulary, width); return;
    }
}

/* Elements of a layer before `role`; PROTO_MODEL_TENSORS_PER_LAYER gives the whole layer. */
static uint64_t layer_elements_before(const struct msg_model *m, uint32_t role) {
    uint64_t sum = 0;
    for (uint32_t r = 0; r < role; r++) {
        struct proto_tensor t;
        role_shape(m, (enum proto_model_role)r, &t);
        sum += t.count;
    }
    return sum;
}

static uint64_t embed_elements(const struct msg_model *m) {
    return (uint64_t)m->vocabulary * m->width;
}

uint64_t proto_model_elements(const struct msg_model *m) {
    return embed_elements(m) * (m->tied ? 1 : 2) + m->width +
           m->layers * layer_elements_before(m, PROTO_MODEL_TENSORS_PER_LAYER);
}

uint32_t proto_model_tensor_count(const struct msg_model *m) {
    return m->layers * PROTO_MODEL_TENSORS_PER_LAYER + (m->tied ? 2 : 3);
}

void proto_model_tensor(const struct msg_model *m, uint32_t i, struct proto_tensor *out) {
    assert(i < proto_model_tensor_count(m));
    uint32_t in_layers = m->layers * PROTO_MODEL_TENSORS_PER_LAYER;
    memset(out, 0, sizeof *out);
    if (i >= 1 && i <= in_layers) {
        out->role = (enum proto_model_role)((i - 1) % PROTO_MODEL_TENSORS_PER_LAYER);
        out->layer = (i - 1) / PROTO_MODEL_TENSORS_PER_LAYER;
        out->offset = embed_elements(m) + layer_elements_before(m, out->role) +
                      out->layer * layer_elements_before(m, PROTO_MODEL_TENSORS_PER_LAYER);
        snprintf(out->name, sizeof out->name, "model.layers.%u.%s.weight", out->layer,
                 layer_names[out->role]);
    } else {
        out->role = i == 0 ? MODEL_EMBED : i == in_layers + 1 ? MODEL_FINAL_NORM : MODEL_HEAD;
        out->offset = i == 0 ? 0
                    : proto_model_elements(m) - (m->tied ? 0 : embed_elements(m)) -
                          (out->role == MODEL_FINAL_NORM ? m->width : 0);
        strcpy(out->name, i == 0                            ? "model.embed_tokens.weight"
                          : out->role == MODEL_FINAL_NORM ? "model.norm.weight"
                                                            : "lm_head.weight");
    }
    role_shape(m, out->role, out);
}

int proto_model_tensor_find(const struct msg_model *m, const char *name, struct proto_tensor *out,
                            struct err *err) {
    for (uint32_t i = 0; i < proto_model_tensor_count(m); i++) {
        proto_model_tensor(m, i, out);
        if (!strcmp(out->name, name)) return 0;
    }
    return err_set(err, ERR_NOT_FOUND, "this model has no tensor called %.100s", name);
}

uint32_t proto_model_tensor_at(const struct msg_model *m, uint64_t element) {
    assert(element < proto_model_elements(m));
    uint32_t low = 0, high = proto_model_tensor_count(m) - 1; /* offsets grow: bisect */
    while (low < high) {
        struct proto_tensor t;
        uint32_t middle = low + (high - low + 1) / 2;
        proto_model_tensor(m, middle, &t);
        if (t.offset <= element)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

/* ---- fragments ------------------------------------------------------------------------------ */

static void join_lightest(uint64_t *elements, uint32_t fragments, uint64_t n, uint8_t *out) {
    uint32_t lightest = 0;
    for (uint32_t f = 1; f < fragments; f++)
        if (elements[f] < elements[lightest]) lightest = f;
    *out = (uint8_t)lightest;
    elements[lightest] += n;
}

static bool in_layer(const struct msg_model *m, uint64_t element, uint32_t *layer) {
    struct proto_tensor t;
    proto_model_tensor(m, proto_model_tensor_at(m, element), &t);
    *layer = t.layer;
    return t.role != MODEL_EMBED && t.role != MODEL_FINAL_NORM && t.role != MODEL_HEAD;
}

int proto_model_fragments(const struct msg_model *m, uint32_t chunk_elements, uint32_t fragments,
                          uint8_t *out, struct err *err) {
    uint64_t elements[PROTO_FRAGMENTS_MAX] = {0}, total = proto_model_elements(m);
    uint32_t chunks = (uint32_t)((total - 1) / chunk_elements + 1), layer;
    assert(fragments >= 1 && fragments <= PROTO_FRAGMENTS_MAX);
    bool by_layer = fragments <= m->layers;
    for (int pass = 0; pass < 2; pass++) /* the layers first, then what fills the gaps */
        for (uint32_t c = 0; c < chunks; c++) {
            uint64_t first = (uint64_t)c * chunk_elements, left = total - first,
                     n = left < chunk_elements ? left : chunk_elements;
            bool strided = !by_layer || in_layer(m, first, &layer);
            if (strided != (pass == 0)) continue;
            if (strided) elements[out[c] = (uint8_t)((by_layer ? layer : c) % fragments)] += n;
            else join_lightest(elements, fragments, n, &out[c]);
        }
    for (uint32_t f = 0; f < fragments; f++)
        if (elements[f] == 0)
            return err_set(err, ERR_CONFIG,
                           "fragment %u of %u would be empty: the model has %u chunks of %u elements "
                           "and %u layers; take fewer fragments or smaller chunks",
                           f, fragments, chunks, chunk_elements, m->layers);
    return 0;
}
