/* engine.c - one device's inner steps: gradient, clipping, AdamW, saved state; see engine.h. */
#include "node/engine.h"

#include "kernels/comm.h"
#include "kernels/kernels.h"
#include "node/file.h"
#include "node/layout.h"
#include "node/model.h"
#include "node/schedule.h"
#include "proto/model.h"
#include "proto/proto.h"

#include <assert.h>
#include <fcntl.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "saved states and wire are little-endian");

struct engine {
    const struct kernels *k;
    struct engine_mesh mesh; /* of NULLs where the engine is alone */
    struct msg_model config;
    struct msg_inner inner;
    struct layout layout;
    struct model *model;
    uint32_t micro_batch; /* samples at once */
    size_t n;             /* elements of the whole network; arrays below hold layout.n or state_n */
    size_t state_n;
    void *params;         /* as the backend keeps weights ... */
    uint16_t *rest;       /* ... and what it keeps apart of them, or NULL */
    float *grads, *m, *v;
    uint64_t steps, m_count, v_count;
};

/* ---- life -------------------------------------------------------------------------------------- */

const char *engine_shard_name(int shard) {
    static const char *const names[] = { "none", "optimizer" };
    return shard >= 0 && shard < (int)(sizeof names / sizeof *names) ? names[shard] : NULL;
}

static int is_sharded(const struct engine *e) {
    return e->mesh.shard != ENGINE_SHARD_NONE && e->layout.dp > 1;
}

static uint32_t pick_micro_batch(const struct layout *l, const struct kernels *k, uint32_t batch) {
    uint32_t micro = batch;
    while (micro > 1 &&
           model_arena_bytes(l, k, (int)micro, (int)l->model.sequence, 1) > ENGINE_ACTIVATION_BYTES_MAX)
        micro = (micro + 1) / 2;
    return micro;
}

static int take_memory(struct engine *e, struct err *err) {
    const struct { void **to; size_t n, bytes; } part[] = {
        { &e->params, e->layout.n, e->k->weight_bytes }, { (void **)&e->rest, e->layout.n, e->k->rest_bytes },
        { (void **)&e->grads, e->layout.n, sizeof(float) }, { (void **)&e->m, e->state_n, sizeof(float) },
        { (void **)&e->v, e->state_n, sizeof(float) },
    };
    size_t all = 0;
    for (size_t i = 0; i < 5; i++) all += part[i].n * part[i].bytes;
    for (size_t i = 0; i < 5; i++)
        if (part[i].bytes && !(*part[i].to = e->k->alloc(e->k, part[i].n * part[i].bytes, err))) {
            err_prefix(err, "training %zu parameters takes %zu bytes and activations", e->n, all);
            return -1;
        }
    uint32_t dp = (uint32_t)e->layout.dp;
    e->micro_batch = pick_micro_batch(&e->layout, e->k, (e->inner.batch + dp - 1) / dp);
    e->model = model_create_piece(&e->layout, e->mesh.tensor, e->k, (int)e->micro_batch,
                                  (int)e->config.sequence, 1, err);
    return e->model ? 0 : -1;
}

static void place(struct engine *e, const struct engine_mesh *mesh) {
    const struct comm *tensor = mesh ? mesh->tensor : NULL, *data = mesh ? mesh->data : NULL;
    if (mesh) e->mesh = *mesh;
    layout_init(&e->layout, &e->config, tensor ? tensor->size : 1, tensor ? tensor->rank : 0,
                data ? data->size : 1, data ? data->rank : 0);
    e->n = (size_t)proto_model_elements(&e->config);
    e->state_n = is_sharded(e) ? e->layout.n / (size_t)e->layout.dp : e->layout.n;
}

struct engine *engine_create_rank(const struct msg_model *model, const struct msg_inner *inner,
                                  const struct kernels *kernels, const struct engine_mesh *mesh,
                                  struct err *err) {
    if (proto_model_check(model, err) || proto_inner_check(inner, err)) return NULL;
    if (mesh && layout_check(model, mesh->tensor->size, err)) return NULL;
    struct engine *e = calloc(1, sizeof *e);
    if (!e) {
        err_set(err, ERR_MEMORY, "no memory for an engine");
        return NULL;
    }
    e->k = kernels;
    e->config = *model;
    e->inner = *inner;
    place(e, mesh);
    if (take_memory(e, err)) {
        engine_destroy(e);
        return NULL;
    }
    engine_set_document_end(e, -1);
    return e;
}

struct engine *engine_create(const struct msg_model *model, const struct msg_inner *inner,
                             const struct kernels *kernels, struct err *err) {
    return engine_create_rank(model, inner, kernels, NULL, err);
}

void engine_destroy(struct engine *e) {
    if (!e) return;
    model_destroy(e->model);
    e->k->free(e->k, e->params);
    e->k->free(e->k, e->rest);
    e->k->free(e->k, e->grads);
    e->k->free(e->k, e->m);
    e->k->free(e->k, e->v);
    free(e);
}

void engine_set_document_end(struct engine *e, int32_t token) {
    struct model_objective objective = { .document_end = token, .z = (float)e->inner.z_loss,
                                         .max_z = (float)e->inner.max_z_loss };
    model_set_objective(e->model, &objective);
}

const struct msg_model *engine_model(const struct engine *e) {
    return &e->config;
}

const struct msg_inner *engine_inner(const struct engine *e) {
    return &e->inner;
}

size_t engine_elements(const struct engine *e) {
    return e->n;
}

uint64_t engine_steps(const struct engine *e) {
    return e->steps;
}

void engine_share(const struct engine *e, uint32_t samples, uint32_t *first, uint32_t *count) {
    uint32_t dp = (uint32_t)e->layout.dp, rank = (uint32_t)e->layout.dp_rank, more = samples % dp;
    *first = samples / dp * rank + (rank < more ? rank : more);
    *count = samples / dp + (rank < more);
}

/* ---- the mesh ---------------------------------------------------------------------------------- */

static void sum_over(const struct comm *c, double *x, size_t n) {
    if (c) c->sum(c, x, n);
}

static int check_mesh(const struct engine *e, struct err *err) {
    return e->mesh.world ? e->mesh.world->check(e->mesh.world, err) : 0;
}

/* Where the moments of a local element are. */
static size_t state_at(const struct engine *e, const struct layout_run *run) {
    if (!is_sharded(e)) return run->local;
    size_t first = layout_unit_at(&e->layout, run->unit);
    size_t own = first + (size_t)e->layout.dp_rank * layout_slice(&e->layout, run->unit);
    return first / (size_t)e->layout.dp + (run->local - own);
}

/* Cut a run down to those whose moments are here. */
static bool has_state(const struct engine *e, struct layout_run *run) {
    return !is_sharded(e) || layout_own(&e->layout, run);
}

/* Cut a run down to what this rank alone answers for. */
static bool answers_for(const struct engine *e, struct layout_run *run) {
    return (!run->shared || e->layout.tp_rank == 0) && layout_own(&e->layout, run);
}

/* ---- parameters and moments -------------------------------------------------------------------- */

static void *param_at(const struct engine *e, size_t local) {
    return (char *)e->params + local * e->k->weight_bytes;
}

static uint16_t *rest_at(const struct engine *e, size_t local) {
    return e->rest ? e->rest + local : NULL;
}

/* A copy between a canonical range in host memory, whose first element is `first`, and what is here. */
struct transfer {
    const struct engine *e;
    size_t first;
    float *out;
    const float *in;
    const float *moment_from; /* m or v */
    float *moment_to;
};

static void read_params(void *arg, const struct layout_run *held) {
    const struct transfer *t = arg;
    struct layout_run r = *held;
    if (answers_for(t->e, &r))
        t->e->k->weights_out(t->e->k, t->out + (r.canonical - t->first), param_at(t->e, r.local),
                             rest_at(t->e, r.local), r.count);
}

static void write_params(void *arg, const struct layout_run *r) {
    const struct transfer *t = arg;
    t->e->k->weights_in(t->e->k, param_at(t->e, r->local), rest_at(t->e, r->local),
                        t->in + (r->canonical - t->first), r->count);
}

static void read_moment(void *arg, const struct layout_run *held) {
    const struct transfer *t = arg;
    struct layout_run r = *held;
    if (answers_for(t->e, &r))
        t->e->k->copy_out(t->e->k, t->out + (r.canonical - t->first), t->moment_from + state_at(t->e, &r),
                          r.count * sizeof *t->out);
}

static void write_moment(void *arg, const struct layout_run *held) {
    const struct transfer *t = arg;
    struct layout_run r = *held;
    if (has_state(t->e, &r))
        t->e->k->copy_in(t->e->k, t->moment_to + state_at(t->e, &r), t->in + (r.canonical - t->first),
                         r.count * sizeof *t->in);
}

void engine_params_read(const struct engine *e, size_t first, size_t n, float *out) {
    assert(first <= e->n && n <= e->n - first);
    layout_each(&e->layout, first, n, read_params, &(struct transfer){ .e = e, .first = first, .out = out });
}

void engine_params_write(struct engine *e, size_t first, size_t n, const float *in) {
    assert(first <= e->n && n <= e->n - first);
    layout_each(&e->layout, first, n, write_params, &(struct transfer){ .e = e, .first = first, .in = in });
}

static void moment_read(const struct engine *e, const float *moment, size_t first, size_t n, float *out) {
    struct transfer t = { .e = e, .first = first, .out = out, .moment_from = moment };
    layout_each(&e->layout, first, n, read_moment, &t);
}

static void moment_write(struct engine *e, float *moment, size_t first, size_t n, const float *in) {
    struct transfer t = { .e = e, .first = first, .in = in, .moment_to = moment };
    layout_each(&e->layout, first, n, write_moment, &t);
}

void engine_second_moments_read(const struct engine *e, size_t first, size_t n, float *out,
                                uint64_t *count) {
    assert(first <= e->n && n <= e->n - first);
    moment_read(e, e->v, first, n, out);
    *count = e->v_count;
}

int engine_second_moments_write(struct engine *e, size_t first, size_t n, const float *in,
                                uint64_t count, struct err *err) {
    if (first > e->n || n > e->n - first)
        return err_set(err, ERR_CORRUPT, "second moments [%zu, %zu) of a model of %zu", first, first + n,
                       e->n);
    for (size_t i = 0; i < n; i++)
        if (!(in[i] >= 0 && isfinite(in[i])))
            return err_set(err, ERR_CORRUPT, "second moment %zu is %g", first + i, (double)in[i]);
    moment_write(e, e->v, first, n, in);
    e->v_count = count;
    return 0;
}

void engine_reset_moments(struct engine *e) {
    e->k->zero(e->k, e->m, e->state_n * sizeof *e->m);
    e->k->zero(e->k, e->v, e->state_n * sizeof *e->v);
    e->m_count = e->v_count = 0;
}

/* ---- a step ------------------------------------------------------------------------------------ */

static int check_tokens(const struct engine *e, const int32_t *tokens, uint32_t samples,
                        struct err *err) {
    size_t n = (size_t)samples * ((size_t)e->config.sequence + 1);
    for (size_t i = 0; i < n; i++)
        if (tokens[i] < 0 || (uint32_t)tokens[i] >= e->config.vocabulary)
            return err_set(err, ERR_CORRUPT, "token %zu of the batch is %d, the model's vocabulary has %u",
                           i, tokens[i], e->config.vocabulary);
    return 0;
}

/* Targets that count in the batch of all ranks, for a mean: at least 1, of which nothing is then the mean.
 * A share that cannot be trained on stops all ranks, so that they stay in step. */
static int count_targets(const struct engine *e, const int32_t *tokens, uint32_t share, double *targets,
                         struct err *err) {
    int bad = check_tokens(e, tokens, share, err) != 0;
    double sums[2] = { 0, bad };
    if (!bad) sums[0] = (double)model_targets(e->model, tokens, (int)share, (int)e->config.sequence);
    sum_over(e->mesh.data, sums, 2);
    if (check_mesh(e, err) || bad) return -1;
    if (sums[1] != 0)
        return err_set(err, ERR_CORRUPT, "a token of another rank's samples is outside the vocabulary of %u",
                       e->config.vocabulary);
    *targets = sums[0] > 0 ? sums[0] : 1;
    return 0;
}

/* Loss and gradient of the mean over all targets, micro-batch by micro-batch: this rank's part of them. */
static int gradient(struct engine *e, const int32_t *tokens, uint32_t share, double targets,
                    struct model_loss *sum, struct err *err) {
    uint32_t T = e->config.sequence;
    *sum = (struct model_loss){ 0 };
    if (share == 0) e->k->zero(e->k, e->grads, e->layout.n * sizeof *e->grads);
    for (uint32_t i = 0; i < share; i += e->micro_batch) {
        uint32_t B = share - i < e->micro_batch ? share - i : e->micro_batch;
        struct model_loss part;
        if (model_backward(e->model, e->params, e->grads, tokens + (size_t)i * (T + 1), (int)B, (int)T,
                           (float)(1 / targets), i ? KERNELS_ADD : KERNELS_SET, &part, err))
            return -1;
        sum->nats += part.nats;
        sum->penalty += part.penalty;
    }
    return 0;
}

/* Tensor-parallel ranks each have the norms' gradients of their own rows. */
static void reduce_shared(struct engine *e) {
    const struct comm *c = e->mesh.tensor;
    if (!c || c->size == 1) return;
    for (uint32_t i = 0; i < proto_model_tensor_count(&e->config); i++) {
        struct layout_piece p;
        layout_piece(&e->layout, i, &p);
        if (p.shared) c->all_reduce(c, e->grads + p.at, p.rows * p.columns, COMM_FP32);
    }
}

/* Add the data-parallel ranks' gradients up: all of them everywhere, or each slice where it is owned. */
static void reduce_gradients(struct engine *e) {
    const struct comm *c = e->mesh.data;
    const struct layout *l = &e->layout;
    reduce_shared(e);
    if (!c || c->size == 1) return;
    if (!is_sharded(e)) {
        c->all_reduce(c, e->grads, l->n, COMM_FP32);
        return;
    }
    for (uint32_t u = 0; u < LAYOUT_UNITS(l); u++) {
        size_t slice = layout_slice(l, u);
        float *g = e->grads + layout_unit_at(l, u);
        c->reduce_scatter(c, g + (size_t)c->rank * slice, g, slice, COMM_FP32);
    }
}

/* After an update by slices: everybody's weights to everybody. */
static void gather_params(struct engine *e) {
    const struct comm *c = e->mesh.data;
    const struct layout *l = &e->layout;
    enum comm_type type = e->k->weight_bytes == 2 ? COMM_BF16 : COMM_FP32;
    if (!is_sharded(e)) return;
    for (uint32_t u = 0; u < LAYOUT_UNITS(l); u++) {
        size_t slice = layout_slice(l, u), first = layout_unit_at(l, u);
        c->all_gather(c, param_at(e, first), param_at(e, first + (size_t)c->rank * slice), slice, type);
    }
}

/* Piece i as a run. */
static struct layout_run run_of(const struct layout_piece *p) {
    return (struct layout_run){ .canonical = p->canonical + p->row * p->width + p->column, .local = p->at,
                                .count = p->rows * p->columns, .unit = p->unit, .shared = p->shared };
}

/* Of what this rank answers for; neighbours go together, so that alone it is one sum. */
static double own_squares(const struct engine *e) {
    double sum = 0;
    size_t first = 0, end = 0;
    for (uint32_t i = 0; i < proto_model_tensor_count(&e->config); i++) {
        struct layout_piece p;
        layout_piece(&e->layout, i, &p);
        struct layout_run r = run_of(&p);
        if (!answers_for(e, &r)) continue;
        if (r.local != end) {
            if (end > first) sum += e->k->sum_squares(e->k, e->grads + first, end - first);
            first = r.local;
        }
        end = r.local + r.count;
    }
    return sum + (end > first ? e->k->sum_squares(e->k, e->grads + first, end - first) : 0);
}

static void adamw_run(struct engine *e, struct layout_run r, struct kernels_adamw *a) {
    if (!has_state(e, &r)) return;
    size_t state = state_at(e, &r);
    a->first = r.canonical;
    e->k->adamw(e->k, param_at(e, r.local), rest_at(e, r.local), e->grads + r.local, e->m + state,
                e->v + state, r.count, a);
}

/* Stochastic rounding goes by an element's number in the whole model: there, what is not side by side in it
 * goes row by row. */
static void adamw(struct engine *e, double lr, double grad_scale) {
    const struct msg_inner *in = &e->inner;
    struct kernels_adamw a = {
        .lr = (float)lr, .beta1 = (float)in->beta1, .beta2 = (float)in->beta2, .eps = (float)in->eps,
        .m_correction = (float)(1 - pow(in->beta1, (double)++e->m_count)),
        .v_correction = (float)(1 - pow(in->beta2, (double)++e->v_count)),
        .grad_scale = (float)grad_scale, .seed = e->steps + 1,
    };
    bool stochastic = e->k->weight_bytes == 2 && !e->k->rest_bytes;
    for (uint32_t i = 0; i < proto_model_tensor_count(&e->config); i++) {
        struct layout_piece p;
        layout_piece(&e->layout, i, &p);
        a.weight_decay = !p.shared && p.role != MODEL_EMBED ? (float)in->weight_decay : 0;
        struct layout_run r = run_of(&p);
        if (!stochastic || p.columns == p.width) {
            adamw_run(e, r, &a);
            continue;
        }
        r.count = p.columns;
        for (size_t row = 0; row < p.rows; row++, r.local += p.columns, r.canonical += p.width)
            adamw_run(e, r, &a);
    }
}

/* Everything up to the update; all ranks find the same. */
static int sum_step(struct engine *e, const int32_t *tokens, uint32_t share, struct model_loss *mean,
                    double *norm, struct err *err) {
    double targets;
    if (count_targets(e, tokens, share, &targets, err)) return -1;
    int failed = gradient(e, tokens, share, targets, mean, err) != 0;
    reduce_gradients(e);
    double loss[2] = { mean->nats, mean->penalty }, all[2] = { failed ? 0 : own_squares(e), failed };
    sum_over(e->mesh.data, loss, 2);
    sum_over(e->mesh.world, all, 2);
    if (failed) return -1;
    if (check_mesh(e, err)) return -1;
    if (all[1] != 0) return err_set(err, ERR_IO, "another rank's device failed");
    *mean = (struct model_loss){ .nats = loss[0] / targets, .penalty = loss[1] / targets };
    *norm = sqrt(all[0]);
    return 0;
}

int engine_step(struct engine *e, const int32_t *tokens, uint32_t samples, uint64_t position,
                struct engine_result *result, struct err *err) {
    assert(samples >= 1 && samples <= e->inner.batch);
    struct model_loss loss;
    double norm;
    uint32_t first, share;
    engine_share(e, samples, &first, &share);
    if (sum_step(e, tokens, share, &loss, &norm, err)) return -1;
    if (!isfinite(loss.nats + loss.penalty) || !isfinite(norm))
        return err_set(err, ERR_CORRUPT, "inner step %llu: loss %g, gradient norm %g",
                       (unsigned long long)e->steps + 1, loss.nats + loss.penalty, norm);
    double clip = e->inner.clip, lr = schedule_lr(&e->inner, position);
    adamw(e, lr, clip > 0 && norm > clip ? clip / norm : 1);
    gather_params(e);
    if (e->k->check(e->k, err) || check_mesh(e, err)) return -1;
    *result = (struct engine_result){ .loss = loss.nats, .penalty = loss.penalty, .grad_norm = norm,
                                      .lr = lr, .step = ++e->steps,
                                      .tokens = (uint64_t)samples * e->config.sequence };
    return 0;
}

int engine_eval_loss(struct engine *e, const int32_t *tokens, uint32_t samples, double *loss,
                     struct err *err) {
    assert(samples >= 1);
    uint32_t T = e->config.sequence, first, share;
    double sum = 0, targets;
    struct model_loss part;
    int failed = 0;
    engine_share(e, samples, &first, &share);
    if (count_targets(e, tokens, share, &targets, err)) return -1;
    for (uint32_t i = 0; i < share && !failed; i += e->micro_batch) {
        uint32_t B = share - i < e->micro_batch ? share - i : e->micro_batch;
        const int32_t *these = tokens + (size_t)i * (T + 1);
        failed = model_loss(e->model, e->params, these, (int)B, (int)T, &part, err) != 0;
        if (!failed) sum += part.nats;
    }
    sum_over(e->mesh.data, &sum, 1);
    *loss = sum / targets;
    return failed || check_mesh(e, err) ? -1 : 0;
}

/* ---- saved state ------------------------------------------------------------------------------- */

#define STATE_MAGIC 0x31304e4947544e49u /* "INTGIN01" */
#define BLOCK_ELEMENTS ((size_t)1 << 18)

/* File: this, then parameters, first and second moments, then the digest of all before it. */
struct state_header {
    uint64_t magic;
    struct digest model; /* of the encoded msg_model */
    uint64_t elements, steps, m_count, v_count, tag;
};

static int model_digest(const struct msg_model *m, struct digest *out, struct err *err) {
    struct proto_buffer b;
    proto_buffer_init(&b, 4096);
    int rc = proto_encode(&b, RECORD_model, m, err);
    if (rc == 0) *out = digest_of(b.data, b.length);
    proto_buffer_release(&b);
    return rc;
}

struct engine_snapshot {
    struct state_header header;
    size_t n;
    float *values; /* [3 * n]: parameters, first moments, second moments */
    bool borrowed; /* values are shared memory of a mesh */
};

struct engine_snapshot *engine_snapshot_create(const struct engine *e, float *shared, struct err *err) {
    struct engine_snapshot *s = calloc(1, sizeof *s);
    if (s) s->borrowed = shared != NULL;
    if (s) s->values = shared ? shared : calloc(3 * e->n, sizeof *s->values);
    if (!s || !s->values) {
        err_set(err, ERR_MEMORY, "saving %zu parameters takes %zu bytes", e->n,
                3 * e->n * sizeof *s->values);
        free(s);
        return NULL;
    }
    s->n = e->n;
    s->header = (struct state_header){ .magic = STATE_MAGIC, .elements = e->n };
    if (!model_digest(&e->config, &s->header.model, err)) return s;
    engine_snapshot_destroy(s);
    return NULL;
}

void engine_snapshot_destroy(struct engine_snapshot *s) {
    if (!s) return;
    if (!s->borrowed) free(s->values);
    free(s);
}

int engine_snapshot_take(struct engine_snapshot *s, const struct engine *e, uint64_t tag,
                         struct err *err) {
    assert(s->n == e->n);
    s->header.steps = e->steps;
    s->header.m_count = e->m_count;
    s->header.v_count = e->v_count;
    s->header.tag = tag;
    engine_params_read(e, 0, e->n, s->values);
    moment_read(e, e->m, 0, e->n, s->values + e->n);
    moment_read(e, e->v, 0, e->n, s->values + 2 * e->n);
    int rc = e->k->check(e->k, err);
    if (e->mesh.world) e->mesh.world->barrier(e->mesh.world); /* nobody is behind: it can be written */
    return rc ? rc : check_mesh(e, err);
}

static int write_state(const struct engine_snapshot *s, int fd, const char *path, struct err *err) {
    struct digest_stream stream;
    digest_stream_init(&stream);
    digest_stream_update(&stream, &s->header, sizeof s->header);
    if (file_write(fd, &s->header, sizeof s->header, path, err)) return -1;
    for (size_t at = 0, n; at < 3 * s->n; at += n) {
        n = 3 * s->n - at < BLOCK_ELEMENTS ? 3 * s->n - at : BLOCK_ELEMENTS;
        digest_stream_update(&stream, s->values + at, n * sizeof *s->values);
        if (file_write(fd, s->values + at, n * sizeof *s->values, path, err)) return -1;
    }
    struct digest d = digest_stream_final(&stream);
    return file_write(fd, &d, sizeof d, path, err);
}

int engine_snapshot_write(const struct engine_snapshot *s, const char *path, struct err *err) {
    char temporary[4096];
    if ((size_t)snprintf(temporary, sizeof temporary, "%s.new", path) >= sizeof temporary)
        return err_set(err, ERR_CONFIG, "path too long: %.100s...", path);
    int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0) return err_set_errno(err, "create %.150s", temporary);
    int rc = write_state(s, fd, temporary, err);
    if (rc == 0 && fsync(fd)) rc = err_set_errno(err, "fsync %.150s", temporary);
    close(fd);
    if (rc == 0 && rename(temporary, path)) rc = err_set_errno(err, "rename %.150s", temporary);
    if (rc == 0) rc = file_sync_folder_of(path, err);
    if (rc) unlink(temporary);
    return rc;
}

int engine_save(const struct engine *e, const char *path, uint64_t tag, struct err *err) {
    struct engine_snapshot *s = engine_snapshot_create(e, NULL, err);
    int rc = !s || engine_snapshot_take(s, e, tag, err) ? -1 : engine_snapshot_write(s, path, err);
    engine_snapshot_destroy(s);
    return rc;
}

/* Pass 1: header of the right model, right length, right digest. */
static int check_state(const struct engine *e, int fd, const char *path, struct state_header *h,
                       float *block, struct err *err) {
    struct digest model, found, stored;
    struct digest_stream s;
    if (model_digest(&e->config, &model, err) || file_read(fd, h, sizeof *h, path, err)) return -1;
    if (h->magic != STATE_MAGIC) return err_set(err, ERR_CORRUPT, "%.150s is not a saved state", path);
    if (!digest_equal(&h->model, &model) || h->elements != e->n)
        return err_set(err, ERR_CONFIG, "%.150s is the state of another model (%llu parameters, not %zu)",
                       path, (unsigned long long)h->elements, e->n);
    digest_stream_init(&s);
    digest_stream_update(&s, h, sizeof *h);
    for (size_t left = 3 * e->n, n; left; left -= n) {
        n = left < BLOCK_ELEMENTS ? left : BLOCK_ELEMENTS;
        if (file_read(fd, block, n * sizeof *block, path, err)) return -1;
        digest_stream_update(&s, block, n * sizeof *block);
    }
    if (file_read(fd, &stored, sizeof stored, path, err)) return -1;
    found = digest_stream_final(&s);
    if (!digest_equal(&found, &stored))
        return err_set(err, ERR_CORRUPT, "%.150s does not have the digest it was saved with", path);
    return 0;
}

/* Pass 2: into the engine. */
static int read_state(struct engine *e, int fd, const char *path, float *block, struct err *err) {
    float *moments[] = { e->m, e->v };
    if (lseek(fd, sizeof(struct state_header), SEEK_SET) < 0)
        return err_set_errno(err, "seek %.150s", path);
    for (int i = 0; i < 3; i++)
        for (size_t at = 0, n; at < e->n; at += n) {
            n = e->n - at < BLOCK_ELEMENTS ? e->n - at : BLOCK_ELEMENTS;
            if (file_read(fd, block, n * sizeof *block, path, err)) return -1;
            if (i == 0) engine_params_write(e, at, n, block);
            else moment_write(e, moments[i - 1], at, n, block);
            if (e->k->check(e->k, err)) return -1;
        }
    return 0;
}

int engine_load(struct engine *e, const char *path, uint64_t *tag, struct err *err) {
    struct state_header h;
    float *block = malloc(BLOCK_ELEMENTS * sizeof *block);
    if (!block) return err_set(err, ERR_MEMORY, "no memory to load %.150s", path);
    int rc = -1, fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        err_set_errno(err, "open %.150s", path);
        goto out;
    }
    rc = check_state(e, fd, path, &h, block, err);
    if (rc == 0) rc = read_state(e, fd, path, block, err);
    close(fd);
    if (rc) goto out;
    e->steps = h.steps;
    e->m_count = h.m_count;
    e->v_count = h.v_count;
    *tag = h.tag;
out:
    free(block);
    return rc;
}
