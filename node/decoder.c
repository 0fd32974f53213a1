/* decoder.c - the network token by token; see decoder.h. */
#include "node/decoder.h"

#include "proto/model.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ROWS 64 /* of a long prompt so many tokens are read at a time */

struct decoder {
    struct msg_model m;
    const struct kernels *k;
    const void *params;
    int room, count, H, KV, D, C, F, QKV;
    /* In the backend's memory. */
    float *x, *norm, *rstd, *qkv, *att, *branch, *gate_up, *swiglu, *logits;
    float *cos, *sin; /* [room,D/2] */
    int32_t *tokens;
    /* In the host's. */
    float *qkv_host, *att_host; /* [ROWS,QKV], [ROWS,H*D] */
    float *kept;                /* [layers,room,2*KV*D]: a token's keys, then its values */
};

static const void *weight(const struct decoder *d, uint32_t tensor) {
    struct proto_tensor t;
    proto_model_tensor(&d->m, tensor, &t);
    return (const char *)d->params + t.offset * d->k->weight_bytes;
}

static int fill_rope(struct decoder *d, struct err *err) {
    size_t n = (size_t)d->room * (size_t)d->D / 2;
    float *table = malloc(2 * n * sizeof *table);
    if (!table) return err_set(err, ERR_MEMORY, "no memory for rotary tables");
    struct kernels_rope rope = { .type = (enum kernels_rope_type)d->m.rope_type, .theta = d->m.rope_theta,
                                 .factor = d->m.rope_factor, .low_factor = d->m.rope_low_factor,
                                 .high_factor = d->m.rope_high_factor, .original = (int)d->m.rope_original };
    kernels_rope_tables(table, table + n, d->room, d->D, &rope);
    d->k->copy_in(d->k, d->cos, table, n * sizeof *table);
    d->k->copy_in(d->k, d->sin, table + n, n * sizeof *table);
    int rc = d->k->check(d->k, err); /* the table is read until then */
    free(table);
    return rc;
}

static int take_memory(struct decoder *d, struct err *err) {
    size_t C = (size_t)d->C, F = (size_t)d->F, QKV = (size_t)d->QKV, heads = (size_t)d->H * (size_t)d->D;
    size_t table = (size_t)d->room * (size_t)d->D / 2, row = 2 * (size_t)d->KV * (size_t)d->D;
    const struct {
        float **at;
        size_t n;
    } tensors[] = {
        { &d->x, ROWS * C }, { &d->norm, ROWS * C }, { &d->rstd, ROWS }, { &d->qkv, ROWS * QKV },
        { &d->att, ROWS * heads }, { &d->branch, ROWS * C }, { &d->gate_up, ROWS * 2 * F },
        { &d->swiglu, ROWS * F }, { &d->logits, d->m.vocabulary }, { &d->cos, table }, { &d->sin, table },
    };
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++)
        if (!(*tensors[i].at = d->k->alloc(d->k, tensors[i].n * sizeof(float), err))) return -1;
    if (!(d->tokens = d->k->alloc(d->k, ROWS * sizeof *d->tokens, err))) return -1;
    d->qkv_host = malloc(ROWS * QKV * sizeof(float));
    d->att_host = malloc(ROWS * heads * sizeof(float));
    d->kept = malloc(d->m.layers * (size_t)d->room * row * sizeof(float));
    if (d->qkv_host && d->att_host && d->kept) return fill_rope(d, err);
    return err_set(err, ERR_MEMORY, "no memory for keys and values of %d tokens, %zu bytes", d->room,
                   d->m.layers * (size_t)d->room * row * sizeof(float));
}

struct decoder *decoder_create(const struct msg_model *m, const struct kernels *k, const void *params,
                               int room, struct err *err) {
    struct decoder *d = calloc(1, sizeof *d);
    if (!d) {
        err_set(err, ERR_MEMORY, "no memory to decode");
        return NULL;
    }
    assert(room >= 1 && (uint32_t)room <= m->sequence);
    d->m = *m;
    d->k = k;
    d->params = params;
    d->room = room;
    d->H = (int)m->heads;
    d->KV = (int)m->kv_heads;
    d->C = (int)m->width;
    d->D = d->C / d->H;
    d->F = (int)m->ffn;
    d->QKV = (d->H + 2 * d->KV) * d->D;
    if (!take_memory(d, err)) return d;
    decoder_destroy(d);
    return NULL;
}

void decoder_destroy(struct decoder *d) {
    if (!d) return;
    float *const tensors[] = { d->x, d->norm, d->rstd, d->qkv, d->att, d->branch, d->gate_up, d->swiglu,
                               d->logits, d->cos, d->sin };
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) d->k->free(d->k, tensors[i]);
    d->k->free(d->k, d->tokens);
    free(d->qkv_host);
    free(d->att_host);
    free(d->kept);
    free(d);
}

/* One query head against the keys and values of `n` tokens, `stride` elements apart: the softmax is taken as
 * they come (arXiv:1805.02867). */
static void attend(float *out, const float *q, const float *keys, const float *values, int n, size_t stride,
                   int D) {
    float scale = 1.0f / sqrtf((float)D), most = -INFINITY, sum = 0;
    memset(out, 0, (size_t)D * sizeof *out);
    for (int j = 0; j < n; j++, keys += stride, values += stride) {
        float score = 0, shrink = 1;
#pragma omp simd reduction(+ : score)
        for (int i = 0; i < D; i++) score += q[i] * keys[i];
        score *= scale;
        if (score > most) {
            shrink = expf(most - score);
            most = score;
        }
        float weight = expf(score - most);
        sum = sum * shrink + weight;
        for (int i = 0; i < D; i++) out[i] = out[i] * shrink + weight * values[i];
    }
    for (int i = 0; i < D; i++) out[i] /= sum;
}

/* Keep the keys and values of `rows` new tokens, and let each query see those up to its own. */
static void attention(struct decoder *d, uint32_t layer, int rows) {
    size_t D = (size_t)d->D, row = 2 * (size_t)d->KV * D, queries = (size_t)d->H * D, QKV = (size_t)d->QKV;
    float *kept = d->kept + (size_t)layer * (size_t)d->room * row;
    d->k->copy_out(d->k, d->qkv_host, d->qkv, (size_t)rows * QKV * sizeof(float));
    for (int t = 0; t < rows; t++)
        memcpy(kept + (size_t)(d->count + t) * row, d->qkv_host + (size_t)t * QKV + queries,
               row * sizeof(float));
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < rows * d->H; i++) {
        int t = i / d->H, h = i % d->H;
        size_t head = (size_t)(h / (d->H / d->KV)) * D;
        attend(d->att_host + (size_t)t * queries + (size_t)h * D,
               d->qkv_host + (size_t)t * QKV + (size_t)h * D, kept + head, kept + (size_t)d->KV * D + head,
               d->count + t + 1, row, d->D);
    }
    d->k->copy_in(d->k, d->att, d->att_host, (size_t)rows * queries * sizeof(float));
}

static void layer_forward(struct decoder *d, uint32_t layer, int rows) {
    const struct kernels *k = d->k;
    uint32_t first = 1 + layer * PROTO_MODEL_TENSORS_PER_LAYER;
    size_t stream = (size_t)rows * (size_t)d->C, turned = (size_t)d->count * (size_t)d->D / 2;
    float eps = (float)d->m.norm_eps;
    k->rmsnorm_forward(k, d->norm, d->rstd, d->x, weight(d, first + MODEL_INPUT_NORM), eps, rows, d->C);
    k->matmul_forward(k, d->qkv, d->norm, weight(d, first + MODEL_Q), rows, d->C, d->QKV);
    k->rope_forward(k, d->qkv, d->cos + turned, d->sin + turned, NULL, 1, rows, d->H, d->KV, d->D);
    attention(d, layer, rows);
    k->matmul_forward(k, d->branch, d->att, weight(d, first + MODEL_O), rows, d->C, d->C);
    k->add(k, d->x, d->x, d->branch, stream);
    k->rmsnorm_forward(k, d->norm, d->rstd, d->x, weight(d, first + MODEL_POST_NORM), eps, rows, d->C);
    k->matmul_forward(k, d->gate_up, d->norm, weight(d, first + MODEL_GATE), rows, d->C, 2 * d->F);
    k->swiglu_forward(k, d->swiglu, d->gate_up, rows, d->F);
    k->matmul_forward(k, d->branch, d->swiglu, weight(d, first + MODEL_DOWN), rows, d->F, d->C);
    k->add(k, d->x, d->x, d->branch, stream);
}

static void read_rows(struct decoder *d, const int32_t *tokens, int rows) {
    d->k->copy_in(d->k, d->tokens, tokens, (size_t)rows * sizeof *tokens);
    d->k->embedding_forward(d->k, d->x, d->tokens, weight(d, 0), rows, d->C, (int)d->m.vocabulary);
    for (uint32_t layer = 0; layer < d->m.layers; layer++) layer_forward(d, layer, rows);
    d->count += rows;
}

int decoder_read(struct decoder *d, const int32_t *tokens, int n, float *logits, struct err *err) {
    const struct kernels *k = d->k;
    uint32_t final = 1 + d->m.layers * PROTO_MODEL_TENSORS_PER_LAYER;
    int rows = 0;
    assert(n >= 1 && n <= d->room - d->count);
    for (; n; n -= rows, tokens += rows) read_rows(d, tokens, rows = n < ROWS ? n : ROWS);
    const float *last = d->x + (size_t)(rows - 1) * (size_t)d->C;
    k->rmsnorm_forward(k, d->norm, d->rstd, last, weight(d, final), (float)d->m.norm_eps, 1, d->C);
    k->matmul_forward(k, d->logits, d->norm, weight(d, d->m.tied ? 0 : final + 1), 1, d->C,
                      (int)d->m.vocabulary);
    k->copy_out(k, logits, d->logits, d->m.vocabulary * sizeof *logits);
    return k->check(k, err);
}

int decoder_count(const struct decoder *d) {
    return d->count;
}

void decoder_forget(struct decoder *d) {
    d->count = 0;
}
