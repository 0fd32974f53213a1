/* engine.c - one device's inner steps: gradient, clipping, AdamW, saved state; see engine.h. */
#include "node/engine.h"

#include "kernels/bf16.h"
#include "kernels/comm.h"
#include "kernels/kernels.h"
#include "node/fault.h"
#include "node/file.h"
#include "node/model.h"
#include "node/optimizer.h"
#include "node/schedule.h"
#include "node/shard.h"
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
    struct shard s;
    struct optimizer optimizer;
    struct msg_model config;
    struct msg_inner inner;
    struct model *model;
    uint32_t micro_batch; /* samples at once */
    size_t n;             /* elements of the whole network */
    uint64_t steps;
};

/* ---- life -------------------------------------------------------------------------------------- */

const char *engine_shard_name(int shard) {
    static const char *const names[] = { "none", "optimizer", "gradients", "full" };
    return shard >= 0 && shard < (int)(sizeof names / sizeof *names) ? names[shard] : NULL;
}

const char *engine_offload_name(int offload) {
    static const char *const names[] = { "none", "optimizer" };
    return offload >= 0 && offload < (int)(sizeof names / sizeof *names) ? names[offload] : NULL;
}

static size_t activation_bytes(const struct layout *l, const struct kernels *k, uint32_t samples, int training) {
    return model_arena_bytes(l, k, (int)samples, (int)l->model.sequence, (enum model_training)training);
}

/* As many of `samples` at once as fit; only where not even one does, some of it is computed twice. */
static void plan_activations(const struct layout *l, const struct kernels *k, uint32_t samples, size_t bytes,
                             struct engine_memory *out) {
    out->micro_batch = samples;
    out->training = MODEL_TRAINS;
    while (out->micro_batch > 1 && activation_bytes(l, k, out->micro_batch, out->training) > bytes)
        out->micro_batch = (out->micro_batch + 1) / 2;
    while (out->training < MODEL_AGAIN_LAYER &&
           activation_bytes(l, k, out->micro_batch, out->training) > bytes)
        out->training++;
    out->activations = activation_bytes(l, k, out->micro_batch, out->training);
}

static uint32_t largest_share(const struct layout *l, uint32_t batch) {
    return (batch + (uint32_t)l->dp - 1) / (uint32_t)l->dp;
}

/* Of a group. On a device the own ones; what ranks say on the host besides is little. */
static size_t windows(const struct kernels *k, int ranks) {
    if (ranks == 1) return 0;
    return (k->shared ? COMM_DEVICE_WINDOWS : COMM_WINDOWS(ranks)) * COMM_WINDOW_BYTES;
}

static void add_up(const struct layout *l, const struct kernels *k, struct engine_memory *out) {
    out->scratch = model_scratch_bytes(l, k, (int)out->micro_batch, (int)l->model.sequence);
    out->all = out->weights + out->gradients + out->optimizer;
    out->all += out->activations + out->scratch + out->buffers;
}

/* All but activations and scratch. */
static struct layout plan_vectors(const struct msg_model *m, const struct msg_inner *inner,
                                  const struct kernels *k, const struct engine_shape *shape,
                                  struct engine_memory *out) {
    const struct engine_shape alone = { .tp = 1, .dp = 1 };
    if (!shape) shape = &alone;
    enum engine_shard shard = shape->dp > 1 ? shape->shard : ENGINE_SHARD_NONE;
    struct layout l;
    layout_init(&l, m, shape->tp, 0, shape->dp, 0);
    *out = (struct engine_memory){ .buffers = windows(k, shape->tp) + windows(k, shape->dp) };
    optimizer_bytes(&l, shard, inner, k, shape->offload, &out->optimizer, &out->host);
    shard_bytes(&l, shard, k, &out->weights, &out->gradients);
    return l;
}

void engine_plan(const struct msg_model *m, const struct msg_inner *inner, const struct kernels *k,
                 const struct engine_shape *shape, struct engine_memory *out) {
    struct layout l = plan_vectors(m, inner, k, shape, out);
    size_t limit = shape && shape->activation_bytes ? shape->activation_bytes : ENGINE_ACTIVATION_BYTES_MAX;
    plan_activations(&l, k, largest_share(&l, inner->batch), limit, out);
    add_up(&l, k, out);
}

static bool fits(const struct layout *l, const struct kernels *k, uint32_t samples, int training, size_t bytes,
                 struct engine_memory *out) {
    out->micro_batch = samples;
    out->training = training;
    out->activations = activation_bytes(l, k, samples, training);
    add_up(l, k, out);
    return out->all <= bytes;
}

int engine_widest(const struct msg_model *m, const struct msg_inner *inner, const struct kernels *k,
                  const struct engine_shape *shape, size_t bytes, struct engine_memory *out) {
    struct layout l = plan_vectors(m, inner, k, shape, out);
    uint32_t most = largest_share(&l, 65536), fit = 0;
    for (int training = MODEL_TRAINS; training <= MODEL_AGAIN_LAYER && !fit; training++) {
        if (!fits(&l, k, 1, training, bytes, out)) continue;
        uint32_t too_many = 2;
        for (fit = 1; too_many <= most && fits(&l, k, too_many, training, bytes, out); too_many *= 2)
            fit = too_many;
        for (uint32_t middle; too_many - fit > 1;) {
            middle = fit + (too_many - fit) / 2;
            if (middle <= most && fits(&l, k, middle, training, bytes, out)) fit = middle;
            else too_many = middle;
        }
        fits(&l, k, fit, training, bytes, out);
    }
    return fit ? 0 : -1;
}

static int create(struct engine *e, const struct kernels *kernels, const struct engine_mesh *mesh,
                  struct err *err) {
    struct engine_memory plan;
    if (shard_init(&e->s, &e->config, kernels, mesh, err) ||
        optimizer_init(&e->optimizer, &e->s, &e->inner, err)) {
        err_prefix(err, "training %llu parameters", (unsigned long long)proto_model_elements(&e->config));
        return -1;
    }
    e->n = (size_t)proto_model_elements(&e->config);
    size_t limit = mesh && mesh->activation_bytes ? mesh->activation_bytes : ENGINE_ACTIVATION_BYTES_MAX;
    plan_activations(&e->s.layout, kernels, largest_share(&e->s.layout, e->inner.batch), limit, &plan);
    e->micro_batch = plan.micro_batch;
    e->model = model_create_piece(&e->s.layout, e->s.mesh.tensor, kernels, (int)e->micro_batch,
                                  (int)e->config.sequence, (enum model_training)plan.training, err);
    return e->model ? 0 : -1;
}

struct engine *engine_create_rank(const struct msg_model *model, const struct msg_inner *inner,
                                  const struct kernels *kernels, const struct engine_mesh *mesh,
                                  struct err *err) {
    if (proto_model_check(model, err) || proto_inner_check(inner, err)) return NULL;
    if (mesh && mesh->tensor && layout_check(model, mesh->tensor->size, err)) return NULL;
    struct engine *e = calloc(1, sizeof *e);
    if (!e) {
        err_set(err, ERR_MEMORY, "no memory for an engine");
        return NULL;
    }
    e->config = *model;
    e->inner = *inner;
    if (create(e, kernels, mesh, err)) {
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
    optimizer_release(&e->optimizer);
    shard_release(&e->s);
    free(e);
}

void engine_limit_micro_batch(struct engine *e, uint32_t samples) {
    assert(samples >= 1);
    if (samples < e->micro_batch) e->micro_batch = samples;
}

void engine_set_watch(struct engine *e, void (*on_layer)(void *arg), void *arg) {
    e->s.on_unit = on_layer;
    e->s.on_unit_arg = arg;
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
    uint32_t dp = (uint32_t)e->s.layout.dp, rank = (uint32_t)e->s.layout.dp_rank, more = samples % dp;
    *first = samples / dp * rank + (rank < more ? rank : more);
    *count = samples / dp + (rank < more);
}

/* ---- the mesh ---------------------------------------------------------------------------------- */

static void sum_over(const struct comm *c, double *x, size_t n) {
    if (c) c->sum(c, x, n);
}

static int check_mesh(const struct engine *e, struct err *err) {
    return e->s.mesh.world ? e->s.mesh.world->check(e->s.mesh.world, err) : 0;
}

/* ---- parameters and moments -------------------------------------------------------------------- */

static void *param_at(const struct engine *e, size_t at) {
    return (char *)e->s.params + at * e->s.k->weight_bytes;
}

/* A copy between a canonical range in host memory, whose first element is `first`, and what is here. */
struct transfer {
    const struct engine *e;
    size_t first;
    float *out;
    const float *in;
};

static void read_params(void *arg, const struct layout_run *held) {
    const struct transfer *t = arg;
    const struct shard *s = &t->e->s;
    struct layout_run r = *held;
    if (!shard_answers_for(s, &r)) return;
    s->k->weights_out(s->k, t->out + (r.canonical - t->first), param_at(t->e, shard_param_at(s, &r)),
                      shard_rest(s, &r), r.count);
}

static void write_params(void *arg, const struct layout_run *held) {
    const struct transfer *t = arg;
    const struct shard *s = &t->e->s;
    struct layout_run r = *held;
    if (r.shared)
        s->k->copy_in(s->k, s->norms + layout_norm_at(&s->layout, &r), t->in + (r.canonical - t->first),
                      r.count * sizeof *s->norms);
    if (!shard_has_params(s, &r)) return;
    s->k->weights_in(s->k, param_at(t->e, shard_param_at(s, &r)), shard_rest(s, &r),
                     t->in + (r.canonical - t->first), r.count);
}

void engine_params_read(const struct engine *e, size_t first, size_t n, float *out) {
    assert(first <= e->n && n <= e->n - first);
    struct transfer t = { .e = e, .first = first, .out = out };
    layout_each(&e->s.layout, first, n, read_params, &t);
}

void engine_params_write(struct engine *e, size_t first, size_t n, const float *in) {
    assert(first <= e->n && n <= e->n - first);
    struct transfer t = { .e = e, .first = first, .in = in };
    layout_each(&e->s.layout, first, n, write_params, &t);
    shard_forget_gathered(&e->s);
}

void engine_second_moments_read(const struct engine *e, size_t first, size_t n, float *out,
                                uint64_t *count) {
    assert(first <= e->n && n <= e->n - first);
    optimizer_read(&e->optimizer, OPTIMIZER_SECOND, first, n, out);
    *count = e->optimizer.steps[OPTIMIZER_SECOND];
}

int engine_second_moments_write(struct engine *e, size_t first, size_t n, const float *in,
                                uint64_t count, struct err *err) {
    if (first > e->n || n > e->n - first)
        return err_set(err, ERR_CORRUPT, "second moments [%zu, %zu) of a model of %zu", first, first + n,
                       e->n);
    for (size_t i = 0; i < n; i++)
        if (!(in[i] >= 0 && isfinite(in[i])))
            return err_set(err, ERR_CORRUPT, "second moment %zu is %g", first + i, (double)in[i]);
    optimizer_write(&e->optimizer, OPTIMIZER_SECOND, first, n, in);
    e->optimizer.steps[OPTIMIZER_SECOND] = count;
    return 0;
}

void engine_reset_moments(struct engine *e) {
    optimizer_reset(&e->optimizer);
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
static int count_targets(const struct engine *e, const int32_t *tokens, uint32_t samples, double *targets,
                         struct err *err) {
    uint32_t first, share;
    engine_share(e, samples, &first, &share);
    int bad = check_tokens(e, tokens, share, err) != 0;
    double sums[2] = { 0, bad };
    if (!bad) sums[0] = (double)model_targets(e->model, tokens, (int)share, (int)e->config.sequence);
    sum_over(e->s.mesh.data, sums, 2);
    if (check_mesh(e, err) || bad) return -1;
    if (sums[1] != 0)
        return err_set(err, ERR_CORRUPT, "a token of another rank's samples is outside the vocabulary of %u",
                       e->config.vocabulary);
    *targets = sums[0] > 0 ? sums[0] : 1;
    return 0;
}

/* Ranks that share out gradients or parameters make as many passes as the one with the largest share: those
 * with fewer samples pass over none. */
static uint32_t passes(const struct engine *e, uint32_t samples, uint32_t share) {
    uint32_t dp = (uint32_t)e->s.layout.dp;
    uint32_t most = e->s.mesh.shard >= ENGINE_SHARD_GRADIENTS ? (samples + dp - 1) / dp : share;
    return (most + e->micro_batch - 1) / e->micro_batch;
}

/* Samples of pass i: *tokens moves to the first of them, or becomes NULL where none is left. */
static uint32_t samples_of(const struct engine *e, uint32_t share, uint32_t i, const int32_t **tokens) {
    uint32_t first = i * e->micro_batch, left = first < share ? share - first : 0;
    *tokens = left ? *tokens + (size_t)first * (e->config.sequence + 1) : NULL;
    return left < e->micro_batch ? left : e->micro_batch;
}

/* Loss and gradient of the mean over all targets, micro-batch by micro-batch: this rank's part of them. All
 * passes are made whatever fails: other ranks make theirs. */
static int gradient(struct engine *e, const int32_t *tokens, uint32_t samples, double targets,
                    struct model_loss *sum, struct err *err) {
    uint32_t first, share;
    int failed = 0;
    engine_share(e, samples, &first, &share);
    *sum = (struct model_loss){ 0 };
    uint32_t n = passes(e, samples, share);
    if (n == 0) e->s.k->zero(e->s.k, e->s.grads, e->s.grads_n * sizeof *e->s.grads);
    for (uint32_t i = 0; i < n; i++) {
        const int32_t *these = tokens;
        uint32_t B = samples_of(e, share, i, &these);
        bool keeps_whole = e->s.mesh.shard < ENGINE_SHARD_GRADIENTS;
        struct model_units units = shard_units(&e->s, i > 0);
        struct model_loss part;
        if (model_backward_units(e->model, &units, these, B ? (int)B : 1, (int)e->config.sequence,
                                 (float)(1 / targets), i && keeps_whole ? KERNELS_ADD : KERNELS_SET, &part,
                                 failed ? NULL : err)) {
            failed = 1;
            continue;
        }
        sum->nats += part.nats;
        sum->penalty += part.penalty;
    }
    return failed ? -1 : 0;
}

static double squares(const struct shard *s, const struct layout_run *r) {
    return r->count ? s->k->sum_squares(s->k, s->grads + shard_grad_at(s, r), r->count) : 0;
}

/* Of what this rank answers for. Neighbours go together, so that alone it is one sum; which are neighbours
 * does not depend on what is sharded, so neither does a bit of the norm. */
static double own_squares(const struct engine *e) {
    const struct shard *s = &e->s;
    struct layout_run all = { 0 };
    double sum = 0;
    for (uint32_t i = 0; i < proto_model_tensor_count(&e->config); i++) {
        struct layout_run r = shard_piece(s, i);
        if (!shard_answers_for(s, &r)) continue;
        if (all.count && r.local == all.local + all.count) {
            all.count += r.count;
            continue;
        }
        sum += squares(s, &all);
        all = r;
    }
    return sum + squares(s, &all);
}

/* Everything up to the update; all ranks find the same. */
static int sum_step(struct engine *e, const int32_t *tokens, uint32_t samples, struct model_loss *mean,
                    double *norm, struct err *err) {
    double targets;
    if (count_targets(e, tokens, samples, &targets, err)) return -1;
    int failed = gradient(e, tokens, samples, targets, mean, err) != 0;
    shard_reduce(&e->s);
    double loss[2] = { mean->nats, mean->penalty }, all[2] = { failed ? 0 : own_squares(e), failed };
    sum_over(e->s.mesh.data, loss, 2);
    sum_over(e->s.mesh.world, all, 2);
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
    if (sum_step(e, tokens, samples, &loss, &norm, err)) return -1;
    if (!isfinite(loss.nats + loss.penalty) || !isfinite(norm)) {
        char fault[FAULT_BYTES];
        fault_find(&e->s, e->model, fault);
        return err_set(err, ERR_CORRUPT, "inner step %llu: loss %g, gradient norm %g: %s",
                       (unsigned long long)e->steps + 1, loss.nats + loss.penalty, norm, fault);
    }
    double clip = e->inner.clip, lr = schedule_lr(&e->inner, position);
    optimizer_step(&e->optimizer, e->steps + 1, lr, clip > 0 && norm > clip ? clip / norm : 1);
    shard_gather(&e->s);
    if (e->s.k->check(e->s.k, err) || check_mesh(e, err)) return -1;
    *result = (struct engine_result){ .loss = loss.nats, .penalty = loss.penalty, .grad_norm = norm,
                                      .lr = lr, .step = ++e->steps,
                                      .tokens = (uint64_t)samples * e->config.sequence };
    return 0;
}

int engine_eval_loss(struct engine *e, const int32_t *tokens, uint32_t samples, double *loss,
                     struct err *err) {
    assert(samples >= 1);
    uint32_t first, share;
    double sum = 0, targets;
    struct model_loss part;
    int failed = 0;
    engine_share(e, samples, &first, &share);
    if (count_targets(e, tokens, samples, &targets, err)) return -1;
    struct model_units units = shard_units(&e->s, false);
    for (uint32_t i = 0; i < passes(e, samples, share); i++) {
        const int32_t *these = tokens;
        uint32_t B = samples_of(e, share, i, &these);
        int rc = model_loss_units(e->model, &units, these, B ? (int)B : 1, (int)e->config.sequence, &part,
                                  failed ? NULL : err);
        if (rc) failed = 1;
        else sum += part.nats;
    }
    sum_over(e->s.mesh.data, &sum, 1);
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
    s->header.m_count = e->optimizer.steps[OPTIMIZER_FIRST];
    s->header.v_count = e->optimizer.steps[OPTIMIZER_SECOND];
    s->header.tag = tag;
    engine_params_read(e, 0, e->n, s->values);
    optimizer_read(&e->optimizer, OPTIMIZER_FIRST, 0, e->n, s->values + e->n);
    optimizer_read(&e->optimizer, OPTIMIZER_SECOND, 0, e->n, s->values + 2 * e->n);
    int rc = e->s.k->check(e->s.k, err);
    if (e->s.mesh.world) e->s.mesh.world->barrier(e->s.mesh.world); /* nobody is behind: it can be written */
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

/* Pass 2: into the engine, by tensors, so that blocks of moments are rounded once. */
static int read_state(struct engine *e, int fd, const char *path, struct err *err) {
    uint32_t tensors = proto_model_tensor_count(&e->config);
    size_t largest = 1;
    struct proto_tensor t;
    for (uint32_t i = 0; i < tensors; i++) {
        proto_model_tensor(&e->config, i, &t);
        if (t.count > largest) largest = (size_t)t.count;
    }
    float *values = malloc(largest * sizeof *values);
    if (!values) return err_set(err, ERR_MEMORY, "no memory to load %.150s", path);
    int rc = 0;
    if (lseek(fd, sizeof(struct state_header), SEEK_SET) < 0) rc = err_set_errno(err, "seek %.150s", path);
    for (uint32_t i = 0; rc == 0 && i < 3 * tensors; i++) {
        proto_model_tensor(&e->config, i % tensors, &t);
        size_t first = (size_t)t.offset, n = (size_t)t.count;
        if ((rc = file_read(fd, values, n * sizeof *values, path, err)) != 0) break;
        if (i < tensors) engine_params_write(e, first, n, values);
        else optimizer_write(&e->optimizer, (enum optimizer_moment)(i / tensors - 1), first, n, values);
        rc = e->s.k->check(e->s.k, err);
    }
    free(values);
    return rc;
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
    if (rc == 0) rc = read_state(e, fd, path, err);
    close(fd);
    if (rc) goto out;
    e->steps = h.steps;
    e->optimizer.steps[OPTIMIZER_FIRST] = h.m_count;
    e->optimizer.steps[OPTIMIZER_SECOND] = h.v_count;
    *tag = h.tag;
out:
    free(block);
    return rc;
}

/* Element i of what a state holds: parameters, first moments, second moments. */
static int say_difference(const struct msg_model *m, size_t i, float is, float should_be, const char *path,
                          struct err *err) {
    static const char *const vectors[] = { "", "the first moment of ", "the second moment of " };
    size_t n = (size_t)proto_model_elements(m);
    struct proto_tensor t;
    proto_model_tensor(m, proto_model_tensor_at(m, i % n), &t);
    return err_set(err, ERR_CORRUPT, "%s%s, element %zu: %.9g, in %.100s %.9g", vectors[i / n], t.name,
                   i % n - (size_t)t.offset, (double)is, path, (double)should_be);
}

static int compare_values(const struct msg_model *m, const int fd[2], const char *const path[2],
                          float *block[2], struct err *err) {
    size_t all = 3 * (size_t)proto_model_elements(m);
    for (size_t at = 0, n; at < all; at += n) {
        n = all - at < BLOCK_ELEMENTS ? all - at : BLOCK_ELEMENTS;
        for (int i = 0; i < 2; i++)
            if (file_read(fd[i], block[i], n * sizeof **block, path[i], err)) return -1;
        for (size_t i = 0; i < n; i++)
            if (bf16_bits(block[0][i]) != bf16_bits(block[1][i]))
                return say_difference(m, at + i, block[0][i], block[1][i], path[1], err);
    }
    return 0;
}

static int compare_headers(const int fd[2], const char *const path[2], struct err *err) {
    struct state_header h[2];
    for (int i = 0; i < 2; i++)
        if (file_read(fd[i], &h[i], sizeof h[i], path[i], err)) return -1;
    if (!memcmp(&h[0], &h[1], sizeof h[0])) return 0;
    return err_set(err, ERR_CORRUPT, "%.100s is of step %llu, %.100s of %llu, or they are of two models",
                   path[0], (unsigned long long)h[0].tag, path[1], (unsigned long long)h[1].tag);
}

int engine_state_compare(const struct msg_model *m, const char *path, const char *other, struct err *err) {
    const char *const paths[2] = { path, other };
    int fd[2] = { -1, -1 }, rc = 0;
    float *block[2] = { malloc(BLOCK_ELEMENTS * sizeof(float)), malloc(BLOCK_ELEMENTS * sizeof(float)) };
    if (!block[0] || !block[1]) rc = err_set(err, ERR_MEMORY, "no memory to compare states");
    for (int i = 0; rc == 0 && i < 2; i++)
        if ((fd[i] = open(paths[i], O_RDONLY | O_CLOEXEC)) < 0)
            rc = err_set_errno(err, "open %.150s", paths[i]);
    if (rc == 0) rc = compare_headers(fd, paths, err) || compare_values(m, fd, paths, block, err) ? -1 : 0;
    for (int i = 0; i < 2; i++) {
        if (fd[i] >= 0) close(fd[i]);
        free(block[i]);
    }
    return rc;
}
