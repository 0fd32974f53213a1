/* engine.c - one device's inner steps: gradient, clipping, AdamW, saved state; see engine.h. */
#include "node/engine.h"

#include "kernels/kernels.h"
#include "node/file.h"
#include "node/model.h"
#include "node/schedule.h"
#include "proto/model.h"
#include "proto/proto.h"

#include <assert.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "saved states and wire are little-endian");

struct engine {
    const struct kernels *k;
    struct msg_model config;
    struct msg_inner inner;
    struct model *model;
    uint32_t micro_batch; /* samples at once */
    size_t n;             /* elements */
    void *params;         /* as the backend keeps weights ... */
    uint16_t *rest;       /* ... and what it keeps apart of them, or NULL */
    float *grads, *m, *v;
    uint64_t steps, m_count, v_count;
};

/* ---- life -------------------------------------------------------------------------------------- */

static uint32_t pick_micro_batch(const struct msg_model *m, uint32_t batch) {
    uint32_t micro = batch;
    while (micro > 1 &&
           model_arena_bytes(m, (int)micro, (int)m->sequence, 1) > ENGINE_ACTIVATION_BYTES_MAX)
        micro = (micro + 1) / 2;
    return micro;
}

static int take_memory(struct engine *e, struct err *err) {
    const struct { void **to; size_t bytes; } part[] = {
        { &e->params, e->k->weight_bytes }, { (void **)&e->rest, e->k->rest_bytes },
        { (void **)&e->grads, sizeof(float) }, { (void **)&e->m, sizeof(float) },
        { (void **)&e->v, sizeof(float) },
    };
    size_t all = 0;
    for (size_t i = 0; i < 5; i++) all += e->n * part[i].bytes;
    for (size_t i = 0; i < 5; i++)
        if (part[i].bytes && !(*part[i].to = e->k->alloc(e->k, e->n * part[i].bytes, err))) {
            err_prefix(err, "training %zu parameters takes %zu bytes and activations", e->n, all);
            return -1;
        }
    e->micro_batch = pick_micro_batch(&e->config, e->inner.batch);
    e->model = model_create(&e->config, e->k, (int)e->micro_batch, (int)e->config.sequence, 1, err);
    return e->model ? 0 : -1;
}

struct engine *engine_create(const struct msg_model *model, const struct msg_inner *inner,
                             const struct kernels *kernels, struct err *err) {
    if (proto_model_check(model, err) || proto_inner_check(inner, err)) return NULL;
    struct engine *e = calloc(1, sizeof *e);
    if (!e) {
        err_set(err, ERR_MEMORY, "no memory for an engine");
        return NULL;
    }
    e->k = kernels;
    e->config = *model;
    e->inner = *inner;
    e->n = (size_t)proto_model_elements(model);
    if (take_memory(e, err)) {
        engine_destroy(e);
        return NULL;
    }
    engine_set_document_end(e, -1);
    return e;
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

/* ---- parameters and moments -------------------------------------------------------------------- */

static void *param_at(const struct engine *e, size_t first) {
    return (char *)e->params + first * e->k->weight_bytes;
}

static uint16_t *rest_at(const struct engine *e, size_t first) {
    return e->rest ? e->rest + first : NULL;
}

void engine_params_read(const struct engine *e, size_t first, size_t n, float *out) {
    assert(first <= e->n && n <= e->n - first);
    e->k->weights_out(e->k, out, param_at(e, first), rest_at(e, first), n);
}

void engine_params_write(struct engine *e, size_t first, size_t n, const float *in) {
    assert(first <= e->n && n <= e->n - first);
    e->k->weights_in(e->k, param_at(e, first), rest_at(e, first), in, n);
}

void engine_second_moments_read(const struct engine *e, size_t first, size_t n, float *out,
                                uint64_t *count) {
    assert(first <= e->n && n <= e->n - first);
    e->k->copy_out(e->k, out, e->v + first, n * sizeof *out);
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
    e->k->copy_in(e->k, e->v + first, in, n * sizeof *in);
    e->v_count = count;
    return 0;
}

void engine_reset_moments(struct engine *e) {
    e->k->zero(e->k, e->m, e->n * sizeof *e->m);
    e->k->zero(e->k, e->v, e->n * sizeof *e->v);
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

/* Targets that count, for a mean: at least 1, of which nothing is then the mean. */
static double targets_of(const struct engine *e, const int32_t *tokens, uint32_t samples) {
    size_t targets = model_targets(e->model, tokens, (int)samples, (int)e->config.sequence);
    return targets ? (double)targets : 1;
}

/* Loss and gradient of the mean over all targets, micro-batch by micro-batch. */
static int gradient(struct engine *e, const int32_t *tokens, uint32_t samples, struct model_loss *mean,
                    struct err *err) {
    uint32_t T = e->config.sequence;
    double targets = targets_of(e, tokens, samples);
    struct model_loss sum = { 0 };
    for (uint32_t i = 0; i < samples; i += e->micro_batch) {
        uint32_t B = samples - i < e->micro_batch ? samples - i : e->micro_batch;
        struct model_loss part;
        if (model_backward(e->model, e->params, e->grads, tokens + (size_t)i * (T + 1), (int)B, (int)T,
                           (float)(1 / targets), i ? KERNELS_ADD : KERNELS_SET, &part, err))
            return -1;
        sum.nats += part.nats;
        sum.penalty += part.penalty;
    }
    *mean = (struct model_loss){ .nats = sum.nats / targets, .penalty = sum.penalty / targets };
    return 0;
}

/* Tensors that decay and tensors that do not alternate; neighbours of one kind go together. */
static void adamw(struct engine *e, double lr, double grad_scale) {
    const struct msg_inner *in = &e->inner;
    struct kernels_adamw a = {
        .lr = (float)lr, .beta1 = (float)in->beta1, .beta2 = (float)in->beta2, .eps = (float)in->eps,
        .m_correction = (float)(1 - pow(in->beta1, (double)++e->m_count)),
        .v_correction = (float)(1 - pow(in->beta2, (double)++e->v_count)),
        .grad_scale = (float)grad_scale, .seed = e->steps + 1,
    };
    uint32_t tensors = proto_model_tensor_count(&e->config);
    size_t first = 0;
    for (uint32_t i = 0; i < tensors; i++) {
        struct proto_tensor t, next = { .dims = 0 };
        proto_model_tensor(&e->config, i, &t);
        if (i + 1 < tensors) proto_model_tensor(&e->config, i + 1, &next);
        int decays = t.dims == 2 && t.role != MODEL_EMBED;
        if (next.dims && decays == (next.dims == 2)) continue;
        size_t end = (size_t)(t.offset + t.count);
        a.weight_decay = decays ? (float)in->weight_decay : 0;
        a.first = first;
        e->k->adamw(e->k, param_at(e, first), rest_at(e, first), e->grads + first, e->m + first, e->v + first,
                    end - first, &a);
        first = end;
    }
}

int engine_step(struct engine *e, const int32_t *tokens, uint32_t samples, uint64_t position,
                struct engine_result *result, struct err *err) {
    assert(samples >= 1 && samples <= e->inner.batch);
    struct model_loss loss;
    if (check_tokens(e, tokens, samples, err)) return -1;
    if (gradient(e, tokens, samples, &loss, err)) return -1;
    double norm = sqrt(e->k->sum_squares(e->k, e->grads, e->n));
    if (!isfinite(loss.nats + loss.penalty) || !isfinite(norm))
        return err_set(err, ERR_CORRUPT, "inner step %llu: loss %g, gradient norm %g",
                       (unsigned long long)e->steps + 1, loss.nats + loss.penalty, norm);
    double clip = e->inner.clip, lr = schedule_lr(&e->inner, position);
    adamw(e, lr, clip > 0 && norm > clip ? clip / norm : 1);
    if (e->k->check(e->k, err)) return -1;
    *result = (struct engine_result){ .loss = loss.nats, .penalty = loss.penalty, .grad_norm = norm,
                                      .lr = lr, .step = ++e->steps,
                                      .tokens = (uint64_t)samples * e->config.sequence };
    return 0;
}

int engine_eval_loss(struct engine *e, const int32_t *tokens, uint32_t samples, double *loss,
                     struct err *err) {
    assert(samples >= 1);
    uint32_t T = e->config.sequence;
    double sum = 0;
    struct model_loss part;
    if (check_tokens(e, tokens, samples, err)) return -1;
    for (uint32_t i = 0; i < samples; i += e->micro_batch) {
        uint32_t B = samples - i < e->micro_batch ? samples - i : e->micro_batch;
        if (model_loss(e->model, e->params, tokens + (size_t)i * (T + 1), (int)B, (int)T, &part, err))
            return -1;
        sum += part.nats;
    }
    *loss = sum / targets_of(e, tokens, samples);
    return 0;
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
};

struct engine_snapshot *engine_snapshot_create(const struct engine *e, struct err *err) {
    struct engine_snapshot *s = calloc(1, sizeof *s);
    if (s) s->values = calloc(3 * e->n, sizeof *s->values);
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
    free(s->values);
    free(s);
}

int engine_snapshot_take(struct engine_snapshot *s, const struct engine *e, uint64_t tag,
                         struct err *err) {
    const float *moments[] = { e->m, e->v };
    assert(s->n == e->n);
    s->header.steps = e->steps;
    s->header.m_count = e->m_count;
    s->header.v_count = e->v_count;
    s->header.tag = tag;
    engine_params_read(e, 0, e->n, s->values);
    for (size_t i = 0; i < 2; i++)
        e->k->copy_out(e->k, s->values + (i + 1) * e->n, moments[i], e->n * sizeof *s->values);
    return e->k->check(e->k, err);
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
    struct engine_snapshot *s = engine_snapshot_create(e, err);
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
            else e->k->copy_in(e->k, moments[i - 1] + at, block, n * sizeof *block);
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
