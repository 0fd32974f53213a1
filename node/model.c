/* model.c - the Llama network as a sequence of kernel calls on one arena; see model.h.
 *
 * Tensor parallelism as in Megatron-LM (arXiv:1909.08053) with sequence-parallel norms (arXiv:2205.05198): a
 * rank has some of the heads, of the feed-forward columns and of the vocabulary, and, of the residual stream,
 * some of the rows ("own" below: rows / tp of them). What goes into a product is gathered from all
 * ranks' rows; what comes out of a branch are partial sums of all rows, which are added up into the own
 * ones. Both happen in place. One rank alone has all rows and nothing to gather. */
#include "node/model.h"

#include "kernels/comm.h"
#include "node/layout.h"
#include "proto/model.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Logits are the largest tensor of a model with a large vocabulary, so the head works on so many
 * rows at a time that they stay under this many elements; loss and gradient are done before the
 * next rows. */
#define HEAD_ELEMENTS_MAX ((size_t)32 << 20)

/* What one layer keeps for its backward pass; rows = B*T; H, KV, F: the rank's. `void *` are activations as
 * the backend keeps them. */
struct activations {
    float *in;         /* [own,C] residual stream before the layer */
    void *norm_att;    /* [rows,C] */
    float *rstd_att;   /* [own] */
    void *qkv;         /* [rows,(H+2KV)D], queries and keys rotated */
    void *att;         /* [rows,HD] heads side by side */
    float *lse;        /* [B,H,T] */
    float *middle;     /* [own,C] residual stream between attention and feed-forward */
    void *norm_ffn;    /* [rows,C] */
    float *rstd_ffn;   /* [own] */
    void *gate_up;     /* [rows,2F]; the backward pass writes its gradient over it */
    void *swiglu;      /* [rows,F] */
};

/* Element offsets of the weights in their unit, layout.h. q, k, v and gate, up are neighbours in the
 * canonical order, so each group is one matrix product. */
struct offsets {
    size_t norm_att, qkv, o, norm_ffn, gate_up, down; /* of a layer */
    size_t head;                                      /* 0, the embedding's, where tied */
};

struct model {
    const struct kernels *k;
    const struct comm *tensor; /* NULL: alone */
    struct msg_model config;
    struct layout layout;
    struct model_units units; /* of this pass ... */
    int rows;                 /* B*T */
    const void *params;       /* ... whose callers have whole vectors: these */
    float *grads;
    int tp, tp_rank;
    int B, T, C, H, KV, D, F, V; /* H, KV, F, V: the rank's */
    int QKV, A;                  /* (H + 2 KV) D, H D */
    enum model_training training;
    struct model_objective objective;
    size_t head_rows;
    struct offsets at;
    void *arena;
    struct activations *layer; /* [layers]; all the same storage unless training */
    struct activations again;  /* storage of what is computed again, one layer at a time */
    float *cos, *sin;          /* [T,D/2] */
    float *norms;              /* of whole vectors: as in struct model_units */
    int32_t *tokens, *targets; /* [rows] */
    int32_t *start;            /* [rows] where in its sequence the document of a token begins */
    float *out;                /* [own,C] residual stream after the last layer */
    void *norm;                /* [rows,C] final norm */
    float *rstd;               /* [own] */
    float *logits;             /* [head_rows,V] */
    void *dlogits;             /* [head_rows,V]; the same storage where activations are fp32 */
    struct kernels_part *part; /* [tp,head_rows] of the vocabulary's parts; NULL where there is one */
    float *all;                /* [rows,C] of the embedding: all rows of partial sums or gradients; or NULL */
    float *loss, *penalty;     /* [rows], neighbours, so that one copy fetches both */
    void *branch;              /* [rows,C] what a branch adds to the residual stream */
    float *dx;                 /* [own,C] gradient of the residual stream ... */
    void *dstream;             /* [rows,C] ... of all rows, as activations; of one rank in fp32: the same */
    void *dbranch;             /* [rows,C]; where branch is, which only the forward pass has */
    void *dqkv;                /* [rows,QKV]; where dswiglu is, for each is dead when the other lives */
    void *dswiglu;             /* [rows,F] */
    float *host_loss;          /* [2,rows] */
    int32_t *host_tokens;      /* [3,rows] inputs, targets, starts: a copy may still be on its way */
};

/* ---- storage ----------------------------------------------------------------------------------- */

/* With base NULL it only counts, so that size and layout cannot disagree. */
struct arena {
    char *base;
    size_t used;
};

static void *carve(struct arena *a, size_t bytes) {
    void *p = a->base ? a->base + a->used : NULL;
    a->used += (bytes + 63) / 64 * 64;
    return p;
}

static float *carve_floats(struct arena *a, size_t rows, size_t width) {
    return carve(a, rows * width * sizeof(float));
}

static void *carve_act(const struct model *m, struct arena *a, size_t rows, size_t width) {
    return carve(a, rows * width * m->k->act_bytes);
}

/* Is what the step `from` computes again of each layer its own? */
static int keeps(const struct model *m, enum model_training from) {
    return m->training < from;
}

/* With `again` NULL all of it; else what is kept, the rest is the same for all layers. */
static void carve_layer(const struct model *m, struct arena *a, struct activations *l,
                        const struct activations *again) {
    size_t rows = (size_t)m->B * (size_t)m->T, own = rows / (size_t)m->tp, C = (size_t)m->C;
    int norms = !again || keeps(m, MODEL_AGAIN_NORMS), whole = !again || keeps(m, MODEL_AGAIN_LAYER);
    int gate_up = !again || keeps(m, MODEL_AGAIN_GATE_UP), swiglu = !again || keeps(m, MODEL_AGAIN_SWIGLU);
    l->att = carve_act(m, a, rows, (size_t)m->A);
    l->lse = carve_floats(a, rows, (size_t)m->H);
    l->rstd_att = carve_floats(a, own, 1);
    l->rstd_ffn = carve_floats(a, own, 1);
    l->norm_att = norms ? carve_act(m, a, rows, C) : again->norm_att;
    l->norm_ffn = norms ? carve_act(m, a, rows, C) : again->norm_ffn;
    l->qkv = whole ? carve_act(m, a, rows, (size_t)m->QKV) : again->qkv;
    l->middle = whole ? carve_floats(a, own, C) : again->middle;
    l->gate_up = gate_up ? carve_act(m, a, rows, 2 * (size_t)m->F) : again->gate_up;
    l->swiglu = swiglu ? carve_act(m, a, rows, (size_t)m->F) : again->swiglu;
}

/* What carve_layer leaves out. */
static void carve_again(const struct model *m, struct arena *a, struct activations *l) {
    size_t rows = (size_t)m->B * (size_t)m->T, own = rows / (size_t)m->tp, C = (size_t)m->C;
    if (!keeps(m, MODEL_AGAIN_NORMS)) {
        l->norm_att = carve_act(m, a, rows, C);
        l->norm_ffn = carve_act(m, a, rows, C);
    }
    if (!keeps(m, MODEL_AGAIN_SWIGLU)) l->swiglu = carve_act(m, a, rows, (size_t)m->F);
    if (!keeps(m, MODEL_AGAIN_GATE_UP)) l->gate_up = carve_act(m, a, rows, 2 * (size_t)m->F);
    if (!keeps(m, MODEL_AGAIN_LAYER)) {
        l->qkv = carve_act(m, a, rows, (size_t)m->QKV);
        l->middle = carve_floats(a, own, C);
    }
}

/* Inference walks through one layer's storage again and again; the residual stream then lives in
 * `out` from end to end. */
static size_t carve_all(struct model *m, struct activations *layer, void *base) {
    struct arena a = { base, 0 };
    size_t rows = (size_t)m->B * (size_t)m->T, own = rows / (size_t)m->tp;
    size_t C = (size_t)m->C, half = (size_t)m->D / 2;
    int is_alone = m->tp == 1;
    m->cos = carve_floats(&a, (size_t)m->T, half);
    m->sin = carve_floats(&a, (size_t)m->T, half);
    m->norms = carve_floats(&a, layout_norms(&m->layout), 1);
    m->tokens = carve(&a, rows * sizeof(int32_t));
    m->targets = carve(&a, rows * sizeof(int32_t));
    m->start = carve(&a, rows * sizeof(int32_t));
    m->out = carve_floats(&a, own, C);
    m->norm = carve_act(m, &a, rows, C);
    m->rstd = carve_floats(&a, own, 1);
    m->logits = carve_floats(&a, m->head_rows, (size_t)m->V);
    m->part = is_alone ? NULL : carve(&a, (size_t)m->tp * m->head_rows * sizeof *m->part);
    m->all = is_alone ? NULL : carve_floats(&a, rows, C);
    m->loss = carve_floats(&a, 2 * rows, 1);
    m->penalty = m->loss + rows;
    m->branch = m->dbranch = carve_act(m, &a, rows, C);
    if (m->training) carve_again(m, &a, &m->again);
    for (uint32_t i = 0; i < m->config.layers; i++) {
        struct activations unused = { 0 }, *l = layer ? &layer[i] : &unused;
        if (m->training || i == 0) carve_layer(m, &a, l, m->training ? &m->again : NULL);
        if (!m->training && i > 0 && layer) *l = layer[0];
        float *in = m->training ? carve_floats(&a, own, C) : m->out;
        l->in = in;
    }
    if (m->training) {
        m->dx = carve_floats(&a, own, C);
        m->dqkv = m->dswiglu = carve_act(m, &a, rows, (size_t)(m->QKV > m->F ? m->QKV : m->F));
        int same = m->k->act_bytes == sizeof(float);
        m->dstream = same && is_alone ? m->dx : carve_act(m, &a, rows, C);
        m->dlogits = same ? m->logits : carve_act(m, &a, m->head_rows, (size_t)m->V);
    }
    return a.used;
}

static size_t in_unit(const struct layout *l, uint32_t tensor) {
    struct layout_piece p;
    layout_piece(l, tensor, &p);
    return p.at - layout_unit_at(l, p.unit);
}

static struct offsets offsets_of(const struct layout *l) {
    uint32_t last = l->model.layers * PROTO_MODEL_TENSORS_PER_LAYER;
    return (struct offsets){
        .norm_att = in_unit(l, 1 + MODEL_INPUT_NORM), .qkv = in_unit(l, 1 + MODEL_Q),
        .o = in_unit(l, 1 + MODEL_O), .norm_ffn = in_unit(l, 1 + MODEL_POST_NORM),
        .gate_up = in_unit(l, 1 + MODEL_GATE), .down = in_unit(l, 1 + MODEL_DOWN),
        .head = l->model.tied ? 0 : in_unit(l, last + 2),
    };
}

static void set_shape(struct model *m, const struct layout *l, int B, int T,
                      enum model_training training) {
    const struct msg_model *c = &l->model;
    m->config = *c;
    m->layout = *l;
    m->B = B;
    m->T = T;
    m->training = training;
    m->objective = (struct model_objective){ .document_end = -1 };
    m->tp = l->tp;
    m->tp_rank = l->tp_rank;
    m->C = (int)c->width;
    m->D = m->C / (int)c->heads;
    m->H = (int)c->heads / m->tp;
    m->KV = (int)c->kv_heads / m->tp;
    m->F = (int)c->ffn / m->tp;
    m->V = (int)c->vocabulary / m->tp;
    m->QKV = (m->H + 2 * m->KV) * m->D;
    m->A = m->H * m->D;
    size_t rows = (size_t)B * (size_t)T, head_rows = HEAD_ELEMENTS_MAX / (size_t)m->V;
    m->head_rows = head_rows < rows ? head_rows : rows;
    m->at = offsets_of(l);
}

size_t model_arena_bytes(const struct layout *l, const struct kernels *kernels, int B, int T,
                         enum model_training training) {
    struct model m = { .k = kernels };
    set_shape(&m, l, B, T, training);
    return carve_all(&m, NULL, NULL);
}

size_t model_scratch_bytes(const struct layout *l, const struct kernels *kernels, int B, int T) {
    struct model m = { .k = kernels };
    set_shape(&m, l, B, T, MODEL_TRAINS);
    struct kernels_shape s = { .rows = B * T, .T = T, .width = m.C, .heads = m.H, .kv_heads = m.KV,
                               .ffn = m.F, .head_rows = (int)m.head_rows, .vocabulary = m.V };
    return kernels->scratch_bytes(kernels, &s);
}

/* The tables go to the device once; the arena's logits have nothing to hold yet, but may be too
 * small, so the host copy is separate. */
static int fill_rope(struct model *m, struct err *err) {
    size_t n = (size_t)m->T * (size_t)m->D / 2;
    float *table = malloc(2 * n * sizeof *table);
    if (!table) return err_set(err, ERR_MEMORY, "no memory for a rotary table of %d positions", m->T);
    struct kernels_rope rope = { .type = (enum kernels_rope_type)m->config.rope_type,
                                 .theta = m->config.rope_theta, .factor = m->config.rope_factor,
                                 .low_factor = m->config.rope_low_factor,
                                 .high_factor = m->config.rope_high_factor,
                                 .original = (int)m->config.rope_original };
    kernels_rope_tables(table, table + n, m->T, m->D, &rope);
    m->k->copy_in(m->k, m->cos, table, n * sizeof *table);
    m->k->copy_in(m->k, m->sin, table + n, n * sizeof *table);
    int rc = m->k->check(m->k, err);
    free(table);
    return rc;
}

struct model *model_create(const struct msg_model *config, const struct kernels *kernels, int B,
                           int T, enum model_training training, struct err *err) {
    struct layout alone;
    layout_init(&alone, config, 1, 0, 1, 0);
    return model_create_piece(&alone, NULL, kernels, B, T, training, err);
}

struct model *model_create_piece(const struct layout *layout, const struct comm *tensor,
                                 const struct kernels *kernels, int B, int T, enum model_training training,
                                 struct err *err) {
    const struct msg_model *config = &layout->model;
    assert(B > 0 && T > 0 && (uint32_t)T <= config->sequence);
    assert(layout->tp == 1 || (tensor && tensor->size == layout->tp && T % layout->tp == 0));
    struct model *m = calloc(1, sizeof *m);
    size_t rows = (size_t)B * (size_t)T;
    if (!m) goto no_memory;
    m->k = kernels;
    m->tensor = tensor;
    set_shape(m, layout, B, T, training);
    m->layer = calloc(config->layers, sizeof *m->layer);
    m->host_loss = malloc(2 * rows * sizeof *m->host_loss);
    m->host_tokens = malloc(3 * rows * sizeof *m->host_tokens);
    if (!m->layer || !m->host_loss || !m->host_tokens) goto no_memory;
    size_t bytes = model_arena_bytes(layout, kernels, B, T, training);
    if (!(m->arena = kernels->alloc(kernels, bytes, err))) {
        err_prefix(err, "activations of %d x %d tokens, %zu bytes", B, T, bytes);
        goto fail;
    }
    carve_all(m, m->layer, m->arena);
    if (fill_rope(m, err)) goto fail;
    return m;
no_memory:
    err_set(err, ERR_MEMORY, "no memory for a model of %u layers", config->layers);
fail:
    model_destroy(m);
    return NULL;
}

void model_set_objective(struct model *m, const struct model_objective *objective) {
    m->objective = *objective;
}

void model_destroy(struct model *m) {
    if (!m) return;
    m->k->free(m->k, m->arena);
    free(m->layer);
    free(m->host_loss);
    free(m->host_tokens);
    free(m);
}

/* The weight at an element offset of a unit. */
static const void *at(const struct model *m, const void *unit, size_t offset) {
    return (const char *)unit + offset * m->k->weight_bytes;
}

/* ---- units ------------------------------------------------------------------------------------- */

static const void *weights_of(const struct model *m, uint32_t unit) {
    return m->units.weights(m->units.arg, unit);
}

static uint32_t last_unit(const struct model *m) { return m->config.layers + 1; }
/* Weights of a norm: 2 i and 2 i + 1 are layer i's, the last one is final. */
static const float *norm_at(const struct model *m, uint32_t norm) {
    return m->units.norms + (size_t)norm * (size_t)m->C;
}
static uint32_t final_norm(const struct model *m) { return 2 * m->config.layers; }

static uint32_t head_unit(const struct model *m) { return m->config.tied ? 0 : last_unit(m); }

/* Whole vectors, for whoever has them. */
static const void *vector_weights(void *arg, uint32_t unit) {
    const struct model *m = arg;
    return at(m, m->params, layout_unit_at(&m->layout, unit));
}

static float *vector_grads(void *arg, uint32_t unit) {
    const struct model *m = arg;
    return m->grads + layout_unit_at(&m->layout, unit);
}

static void vector_done(void *arg, uint32_t unit) {
    (void)arg, (void)unit;
}

static void widen_norms(struct model *m) {
    for (uint32_t i = 0; i < proto_model_tensor_count(&m->config); i++) {
        struct layout_piece p;
        layout_piece(&m->layout, i, &p);
        if (!p.shared) continue;
        struct layout_run r = { .canonical = p.canonical, .unit = p.unit };
        m->k->weights_widen(m->k, m->norms + layout_norm_at(&m->layout, &r), at(m, m->params, p.at), NULL,
                            p.rows * p.columns);
    }
}

static struct model_units vectors(struct model *m, const void *params, float *grads) {
    m->params = params;
    m->grads = grads;
    widen_norms(m);
    return (struct model_units){ .arg = m, .norms = m->norms, .weights = vector_weights, .grads = vector_grads,
                                 .grads_done = vector_done };
}

/* Row r of an activation [rows,C]. */
static void *row_at(const struct model *m, void *activation, size_t r) {
    return (char *)activation + r * (size_t)m->C * m->k->act_bytes;
}

/* ---- ranks ------------------------------------------------------------------------------------- */

static int own_rows(const struct model *m, int rows) {
    return rows / m->tp;
}

/* The rank's own of an activation [rows,C]. */
static void *own_of(const struct model *m, void *x, int rows) {
    return row_at(m, x, (size_t)m->tp_rank * (size_t)own_rows(m, rows));
}

static enum comm_type act_type(const struct model *m) {
    return m->k->act_bytes == 2 ? COMM_BF16 : COMM_FP32;
}

/* x[rows,C]: every rank's own rows to all. */
static void gather(const struct model *m, void *x, int rows) {
    if (m->tp == 1) return;
    size_t n = (size_t)own_rows(m, rows) * (size_t)m->C;
    m->tensor->all_gather(m->tensor, x, own_of(m, x, rows), n, act_type(m));
}

/* x[rows,C] is partial sums: the own rows become those of all ranks. */
static void add_up(const struct model *m, void *x, int rows) {
    if (m->tp == 1) return;
    size_t n = (size_t)own_rows(m, rows) * (size_t)m->C;
    m->tensor->reduce_scatter(m->tensor, own_of(m, x, rows), x, n, act_type(m));
}

/* m->dx, the gradient of the own rows, as that of all rows in m->dstream: what products take. */
static void spread(const struct model *m, int rows) {
    m->k->round(m->k, own_of(m, m->dstream, rows), m->dx, (size_t)own_rows(m, rows) * (size_t)m->C);
    gather(m, m->dstream, rows);
}

/* ---- forward ----------------------------------------------------------------------------------- */

/* A layer; or again, what of it the backward pass needs and was not kept: the same kernels on the same
 * inputs, so the same bits. */
static void layer_forward(struct model *m, uint32_t i, float *out, const int32_t *start, int B, int T,
                          int again) {
    const struct kernels *k = m->k;
    const struct activations *l = &m->layer[i];
    const void *w = weights_of(m, 1 + i);
    int rows = B * T, own = own_rows(m, rows), C = m->C, F = m->F;
    int norms = !again || !keeps(m, MODEL_AGAIN_NORMS), whole = !again || !keeps(m, MODEL_AGAIN_LAYER);
    float eps = (float)m->config.norm_eps;
    void *norm_att = own_of(m, l->norm_att, rows), *norm_ffn = own_of(m, l->norm_ffn, rows);
    void *branch = own_of(m, m->branch, rows);
    size_t stream = (size_t)own * (size_t)C;
    if (norms) {
        k->rmsnorm_forward(k, norm_att, l->rstd_att, l->in, norm_at(m, 2 * i), eps, own, C);
        gather(m, l->norm_att, rows);
    }
    if (whole) {
        k->matmul_forward(k, l->qkv, l->norm_att, at(m, w, m->at.qkv), rows, C, m->QKV);
        k->rope_forward(k, l->qkv, m->cos, m->sin, start, B, T, m->H, m->KV, m->D);
        if (!again) k->attention_forward(k, l->att, l->lse, l->qkv, start, B, T, m->H, m->KV, m->D);
        k->matmul_forward(k, m->branch, l->att, at(m, w, m->at.o), rows, m->A, C);
        add_up(m, m->branch, rows);
        k->add(k, l->middle, l->in, branch, stream);
    }
    if (norms) {
        k->rmsnorm_forward(k, norm_ffn, l->rstd_ffn, l->middle, norm_at(m, 2 * i + 1), eps, own, C);
        gather(m, l->norm_ffn, rows);
    }
    if (!again || !keeps(m, MODEL_AGAIN_GATE_UP))
        k->matmul_forward(k, l->gate_up, l->norm_ffn, at(m, w, m->at.gate_up), rows, C, 2 * F);
    if (!again || !keeps(m, MODEL_AGAIN_SWIGLU)) k->swiglu_forward(k, l->swiglu, l->gate_up, rows, F);
    if (again) return;
    k->matmul_forward(k, m->branch, l->swiglu, at(m, w, m->at.down), rows, F, C);
    add_up(m, m->branch, rows);
    k->add(k, out, l->middle, branch, stream);
}

/* The residual stream before the first layer: each rank knows some words. */
static void embed(struct model *m, int rows) {
    size_t own = (size_t)own_rows(m, rows) * (size_t)m->C;
    float *to = m->tp == 1 ? m->layer[0].in : m->all;
    m->k->embedding_forward(m->k, to, m->tokens, weights_of(m, 0), rows, m->C, m->V);
    if (m->tp > 1) m->tensor->reduce_scatter(m->tensor, m->layer[0].in, m->all, own, COMM_FP32);
}

/* Its kernel only adds; a tied head has written there first. */
static void embed_backward(struct model *m, int rows, enum kernels_write write) {
    size_t own = (size_t)own_rows(m, rows) * (size_t)m->C;
    const float *dout = m->tp == 1 ? m->dx : m->all;
    float *grads = m->units.grads(m->units.arg, 0);
    if (m->tp > 1) m->tensor->all_gather(m->tensor, m->all, m->dx, own, COMM_FP32);
    if (write == KERNELS_SET && !m->config.tied)
        m->k->zero(m->k, grads, (size_t)m->V * (size_t)m->C * sizeof *grads);
    m->k->embedding_backward(m->k, grads, dout, m->tokens, rows, m->C, m->V);
    m->units.grads_done(m->units.arg, 0);
}

/* Everything but the head: m->norm holds the final norm's output. start: NULL or m->start. */
static void forward(struct model *m, const int32_t *start, int B, int T) {
    const struct kernels *k = m->k;
    uint32_t layers = m->config.layers;
    int rows = B * T;
    embed(m, rows);
    for (uint32_t i = 0; i < layers; i++)
        layer_forward(m, i, i + 1 < layers ? m->layer[i + 1].in : m->out, start, B, T, 0);
    k->rmsnorm_forward(k, own_of(m, m->norm, rows), m->rstd, m->out, norm_at(m, final_norm(m)),
                       (float)m->config.norm_eps, own_rows(m, rows), m->C);
    gather(m, m->norm, rows);
}

/* Targets, and where documents begin, of one sequence tokens [T+1]. Returns the targets that count. */
static size_t cut_documents(int32_t end, const int32_t *tokens, int T, int32_t *target, int32_t *start) {
    size_t count = 0;
    int32_t first = 0;
    for (int t = 0; t < T; t++) {
        int ends = end >= 0 && tokens[t] == end;
        count += !ends;
        if (target) {
            start[t] = first;
            target[t] = ends ? -1 : tokens[t + 1];
        }
        if (ends) first = t + 1;
    }
    return count;
}

size_t model_targets(const struct model *m, const int32_t *tokens, int B, int T) {
    size_t count = 0;
    for (int b = 0; b < B; b++)
        count += cut_documents(m->objective.document_end, tokens + (size_t)b * ((size_t)T + 1), T, NULL,
                               NULL);
    return count;
}

/* Words as the rank's part of the vocabulary numbers them. */
static void localise(const struct model *m, int32_t *token, size_t n) {
    int32_t first = m->tp_rank * m->V;
    for (size_t i = 0; m->tp > 1 && i < n; i++)
        if (token[i] >= 0)
            token[i] = token[i] >= first && token[i] - first < m->V ? token[i] - first : KERNELS_ELSEWHERE;
}

/* tokens [B,T+1] to the device as inputs, targets and starts. Returns the starts, NULL where every
 * sequence is one document. */
static const int32_t *tokens_in(struct model *m, const int32_t *tokens, int B, int T) {
    size_t rows = (size_t)B * (size_t)T, bytes = rows * sizeof *tokens;
    int32_t *input = m->host_tokens, *target = input + rows, *start = target + rows;
    if (!tokens) {
        memset(input, 0, rows * sizeof *input);
        memset(target, 0xff, rows * sizeof *target); /* -1 */
        memset(start, 0, rows * sizeof *start);
    }
    for (size_t b = 0; tokens && b < (size_t)B; b++) {
        const int32_t *from = tokens + b * ((size_t)T + 1);
        size_t at = b * (size_t)T;
        memcpy(input + at, from, (size_t)T * sizeof *from);
        cut_documents(m->objective.document_end, from, T, target + at, start + at);
    }
    localise(m, input, 2 * rows); /* inputs and targets are neighbours */
    m->k->copy_in(m->k, m->tokens, input, bytes);
    m->k->copy_in(m->k, m->targets, target, bytes);
    if (m->objective.document_end < 0) return NULL;
    m->k->copy_in(m->k, m->start, start, bytes);
    return m->start;
}

int model_logits(struct model *m, const void *params, const int32_t *tokens, int T, int position,
                 float *out, struct err *err) {
    assert(m->tp == 1 && T >= 1 && T <= m->T && position >= 0 && position < T);
    memcpy(m->host_tokens, tokens, (size_t)T * sizeof *tokens);
    m->k->copy_in(m->k, m->tokens, m->host_tokens, (size_t)T * sizeof *tokens);
    m->units = vectors(m, params, NULL);
    forward(m, NULL, 1, T);
    m->k->matmul_logits(m->k, m->logits, row_at(m, m->norm, (size_t)position),
                        at(m, weights_of(m, head_unit(m)), m->at.head), 1, m->C, m->V);
    m->k->copy_out(m->k, out, m->logits, (size_t)m->V * sizeof *out);
    return m->k->check(m->k, err);
}

/* ---- loss and backward ------------------------------------------------------------------------- */

/* Losses of n rows from r on, and where it is asked for the gradient of their logits. */
static void losses(struct model *m, void *dlogits, size_t r, int n, const struct kernels_loss *how) {
    const struct kernels *k = m->k;
    float *loss = m->loss + r, *penalty = m->penalty + r;
    if (m->tp == 1) {
        k->cross_entropy(k, loss, penalty, dlogits, m->logits, m->targets + r, how, n, m->V);
        return;
    }
    struct kernels_part *part = m->part + (size_t)m->tp_rank * (size_t)n;
    k->vocabulary_part(k, part, m->logits, m->targets + r, n, m->V);
    m->tensor->all_gather(m->tensor, m->part, part, (size_t)n * sizeof *part, COMM_BYTES);
    k->vocabulary_loss(k, loss, penalty, dlogits, m->logits, m->targets + r, m->part, m->tp_rank, m->tp, how,
                       n, m->V);
}

/* Head, cross-entropy and, where grads is not NULL, their gradients: the head's into its unit's grads, that
 * of the final norm's output into m->dbranch. */
static void head(struct model *m, float *grads, int rows, float grad_scale, enum kernels_write write) {
    const struct kernels *k = m->k;
    const void *w = at(m, weights_of(m, head_unit(m)), m->at.head);
    struct kernels_loss how = { .grad_scale = grad_scale, .z = m->objective.z,
                                .max_z = m->objective.max_z };
    for (size_t r = 0; r < (size_t)rows; r += m->head_rows) {
        int n = (int)((size_t)rows - r < m->head_rows ? (size_t)rows - r : m->head_rows);
        const void *x = row_at(m, m->norm, r);
        k->matmul_logits(k, m->logits, x, w, n, m->C, m->V);
        losses(m, grads ? m->dlogits : NULL, r, n, &how);
        if (!grads) continue;
        k->matmul_backward_input(k, row_at(m, m->dbranch, r), m->dlogits, w, n, m->C, m->V);
        k->matmul_backward_weight(k, grads + m->at.head, m->dlogits, x, n, m->C, m->V,
                                  r ? KERNELS_ADD : write);
    }
}

static int loss_sum(struct model *m, int rows, struct model_loss *loss, struct err *err) {
    size_t all = (size_t)m->B * (size_t)m->T;
    m->k->copy_out(m->k, m->host_loss, m->loss, 2 * all * sizeof *m->host_loss);
    if (m->k->check(m->k, err)) return -1;
    *loss = (struct model_loss){ 0 };
    for (size_t i = 0; i < (size_t)rows; i++) {
        loss->nats += m->host_loss[i];
        loss->penalty += m->host_loss[all + i];
    }
    return 0;
}

int model_loss_units(struct model *m, const struct model_units *units, const int32_t *tokens, int B, int T,
                     struct model_loss *loss, struct err *err) {
    assert(B >= 1 && T >= 1 && T <= m->T && B * T <= m->B * m->T);
    m->units = *units;
    forward(m, tokens_in(m, tokens, B, T), B, T);
    head(m, NULL, B * T, 0, KERNELS_SET);
    return loss_sum(m, B * T, loss, err);
}

int model_loss(struct model *m, const void *params, const int32_t *tokens, int B, int T,
               struct model_loss *loss, struct err *err) {
    struct model_units units = vectors(m, params, NULL);
    return model_loss_units(m, &units, tokens, B, T, loss, err);
}

/* m->dx, and m->dstream with it, comes in as the gradient of the layer's output and leaves as that of its
 * input. Products want all rows of it; norms have the own ones. */
static void layer_backward(struct model *m, uint32_t i, const int32_t *start, int B, int T,
                           enum kernels_write write) {
    const struct kernels *k = m->k;
    const struct activations *l = &m->layer[i];
    const void *w = weights_of(m, 1 + i);
    float *g = m->units.grads(m->units.arg, 1 + i);
    int rows = B * T, own = own_rows(m, rows), C = m->C, F = m->F;
    const void *dbranch = own_of(m, m->dbranch, rows);
    if (write == KERNELS_SET) { /* norms' kernels only add */
        k->zero(k, g + m->at.norm_att, (size_t)C * sizeof *g);
        k->zero(k, g + m->at.norm_ffn, (size_t)C * sizeof *g);
    }
    k->matmul_backward_weight(k, g + m->at.down, m->dstream, l->swiglu, rows, F, C, write);
    k->matmul_backward_input(k, m->dswiglu, m->dstream, at(m, w, m->at.down), rows, F, C);
    k->swiglu_backward(k, l->gate_up, m->dswiglu, l->gate_up, rows, F);
    k->matmul_backward_weight(k, g + m->at.gate_up, l->gate_up, l->norm_ffn, rows, C, 2 * F, write);
    k->matmul_backward_input(k, m->dbranch, l->gate_up, at(m, w, m->at.gate_up), rows, C, 2 * F);
    add_up(m, m->dbranch, rows);
    k->rmsnorm_backward(k, m->dx, g + m->at.norm_ffn, dbranch, l->middle, norm_at(m, 2 * i + 1),
                        l->rstd_ffn, own, C);
    spread(m, rows);
    k->matmul_backward_weight(k, g + m->at.o, m->dstream, l->att, rows, m->A, C, write);
    k->matmul_backward_input(k, m->dbranch, m->dstream, at(m, w, m->at.o), rows, m->A, C);
    k->attention_backward(k, m->dqkv, m->dbranch, l->qkv, l->att, l->lse, start, B, T, m->H, m->KV, m->D);
    k->rope_backward(k, m->dqkv, m->cos, m->sin, start, B, T, m->H, m->KV, m->D);
    k->matmul_backward_weight(k, g + m->at.qkv, m->dqkv, l->norm_att, rows, C, m->QKV, write);
    k->matmul_backward_input(k, m->dbranch, m->dqkv, at(m, w, m->at.qkv), rows, C, m->QKV);
    add_up(m, m->dbranch, rows);
    k->rmsnorm_backward(k, m->dx, g + m->at.norm_att, dbranch, l->in, norm_at(m, 2 * i), l->rstd_att, own,
                        C);
    spread(m, rows);
    m->units.grads_done(m->units.arg, 1 + i);
}

/* The head, and the final norm, whose weights are the first of its unit: m->dx, m->dstream become the
 * gradient of the last layer's output. */
static void head_backward(struct model *m, int rows, float grad_scale, enum kernels_write write) {
    const struct kernels *k = m->k;
    const struct model_units *u = &m->units;
    int own = own_rows(m, rows), C = m->C;
    float *g = u->grads(u->arg, last_unit(m));
    if (write == KERNELS_SET) k->zero(k, g, (size_t)C * sizeof *g);
    head(m, u->grads(u->arg, head_unit(m)), rows, grad_scale, write);
    add_up(m, m->dbranch, rows);
    k->zero(k, m->dx, (size_t)own * (size_t)C * sizeof *m->dx);
    k->rmsnorm_backward(k, m->dx, g, own_of(m, m->dbranch, rows), m->out, norm_at(m, final_norm(m)), m->rstd,
                        own, C);
    u->grads_done(u->arg, last_unit(m));
    spread(m, rows);
}

int model_backward_units(struct model *m, const struct model_units *units, const int32_t *tokens, int B,
                         int T, float grad_scale, enum kernels_write write, struct model_loss *loss,
                         struct err *err) {
    assert(m->training && B >= 1 && T >= 1 && T <= m->T && B * T <= m->B * m->T);
    int rows = m->rows = B * T;
    m->units = *units;
    const int32_t *start = tokens_in(m, tokens, B, T);
    forward(m, start, B, T);
    head_backward(m, rows, grad_scale, write);
    for (uint32_t i = m->config.layers; i-- > 0;) {
        layer_forward(m, i, NULL, start, B, T, 1);
        layer_backward(m, i, start, B, T, write);
    }
    embed_backward(m, rows, write);
    return loss_sum(m, rows, loss, err);
}

int model_backward(struct model *m, const void *params, float *grads, const int32_t *tokens, int B,
                   int T, float grad_scale, enum kernels_write write, struct model_loss *loss,
                   struct err *err) {
    struct model_units units = vectors(m, params, grads);
    return model_backward_units(m, &units, tokens, B, T, grad_scale, write, loss, err);
}

int model_output_is_finite(const struct model *m, uint32_t unit) {
    const float *x = unit < m->config.layers ? m->layer[unit].in : m->out;
    return isfinite(m->k->sum_squares(m->k, x, (size_t)own_rows(m, m->rows) * (size_t)m->C));
}

/* ---- initial values ---------------------------------------------------------------------------- */

void model_init_elements(const struct msg_model *m, float std, uint64_t seed, uint64_t first,
                         size_t n, float *out) {
    assert(first + n <= proto_model_elements(m));
    while (n) {
        struct proto_tensor t;
        proto_model_tensor(m, proto_model_tensor_at(m, first), &t);
        uint64_t left = t.offset + t.count - first;
        size_t count = left < n ? (size_t)left : n;
        if (t.dims == 2)
            outer_init_normal(out, seed, first, count, std);
        else
            for (size_t i = 0; i < count; i++) out[i] = 1.0f;
        first += count;
        out += count;
        n -= count;
    }
}
