/* optimizer.c - AdamW, Muon, and their moments; see optimizer.h. */
#include "node/optimizer.h"

#include <assert.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "proto/model.h"

_Static_assert(OPTIMIZER_CHUNK % KERNELS_STATE_BLOCK == 0, "chunks are whole blocks");

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* ---- memory ------------------------------------------------------------------------------------ */

static bool is_matrix(enum proto_model_role role) {
    return role != MODEL_EMBED && role != MODEL_HEAD && role != MODEL_INPUT_NORM && role != MODEL_POST_NORM &&
           role != MODEL_FINAL_NORM;
}

static bool has_moment(const struct msg_inner *in, enum proto_model_role role, int which) {
    return which == OPTIMIZER_FIRST || in->optimizer != OPTIMIZER_MUON || !is_matrix(role);
}

static enum kernels_state how_kept(const struct msg_inner *in, enum proto_model_role role, int which) {
    if (!is_matrix(role) || in->states == STATES_FP32) return KERNELS_STATE_FP32;
    if (in->states == STATES_BF16) return KERNELS_STATE_BF16;
    return which == OPTIMIZER_FIRST ? KERNELS_STATE_SIGNED8 : KERNELS_STATE_ROOT8;
}

static size_t aligned_bytes(enum kernels_state how, size_t n) {
    return (kernels_state_bytes(how, n) + 63) / 64 * 64;
}

static bool uses_chunks(const struct msg_inner *in) { return in->states != STATES_FP32; }

/* The rank's part of tensor i, and its moments one behind the other from `at` on. Returns where they end. */
static size_t place_tensor(const struct layout *l, enum engine_shard shard, const struct msg_inner *in,
                           uint32_t i, char *arena, size_t at, struct optimizer_tensor *t) {
    struct layout_piece p;
    layout_piece(l, i, &p);
    struct layout_run r = { .local = p.at, .count = p.rows * p.columns, .unit = p.unit };
    if (shard >= ENGINE_SHARD_OPTIMIZER && !layout_own(l, &r)) r.count = 0;
    *t = (struct optimizer_tensor){ .local = r.local, .count = r.count };
    for (int which = 0; which < OPTIMIZER_MOMENTS; which++) {
        if (!has_moment(in, p.role, which)) continue;
        t->moment[which].how = how_kept(in, p.role, which);
        t->moment[which].at = arena ? arena + at : NULL;
        at += aligned_bytes(t->moment[which].how, r.count);
    }
    return at;
}

static size_t moment_bytes(const struct layout *l, enum engine_shard shard, const struct msg_inner *in) {
    struct optimizer_tensor t;
    size_t at = 0;
    for (uint32_t i = 0; i < proto_model_tensor_count(&l->model); i++)
        at = place_tensor(l, shard, in, i, NULL, at, &t);
    return at;
}

void optimizer_bytes(const struct layout *l, enum engine_shard shard, const struct msg_inner *in,
                     const struct kernels *k, enum engine_offload offload, size_t *device, size_t *host) {
    size_t moments = moment_bytes(l, shard, in);
    *host = offload == ENGINE_OFFLOAD_OPTIMIZER ? moments : 0;
    *device = moments - *host + (in->optimizer == OPTIMIZER_MUON ? muon_bytes(l, k) : 0);
    if (uses_chunks(in)) *device += OPTIMIZER_MOMENTS * OPTIMIZER_CHUNK * sizeof(float);
}

static bool is_offloaded(const struct shard *s) { return s->mesh.offload == ENGINE_OFFLOAD_OPTIMIZER; }

int optimizer_init(struct optimizer *o, struct shard *s, const struct msg_inner *inner, struct err *err) {
    const struct kernels *k = s->k;
    uint32_t tensors = proto_model_tensor_count(&s->layout.model);
    *o = (struct optimizer){ .s = s, .inner = *inner, .of = calloc(tensors, sizeof *o->of) };
    if (!o->of) return err_set(err, ERR_MEMORY, "no memory for a table of moments");
    o->bytes = moment_bytes(&s->layout, s->mesh.shard, inner);
    o->arena = is_offloaded(s) ? k->alloc_host(k, o->bytes, err) : k->alloc(k, o->bytes, err);
    if (!o->arena) return -1;
    size_t at = 0;
    for (uint32_t i = 0; i < tensors; i++)
        at = place_tensor(&s->layout, s->mesh.shard, inner, i, o->arena, at, &o->of[i]);
    if (uses_chunks(inner)) {
        for (int i = 0; i < OPTIMIZER_MOMENTS; i++)
            if (!(o->chunk[i] = k->alloc(k, OPTIMIZER_CHUNK * sizeof(float), err))) return -1;
        if (!(o->host = malloc(OPTIMIZER_CHUNK * sizeof *o->host)))
            return err_set(err, ERR_MEMORY, "no memory for moments on their way");
    }
    return inner->optimizer == OPTIMIZER_MUON ? muon_init(&o->muon, &s->layout, s->mesh.tensor, k, err) : 0;
}

void optimizer_release(struct optimizer *o) {
    if (!o->s) return;
    const struct kernels *k = o->s->k;
    muon_release(&o->muon);
    for (int i = 0; i < OPTIMIZER_MOMENTS; i++) k->free(k, o->chunk[i]);
    (is_offloaded(o->s) ? k->free_host : k->free)(k, o->arena);
    free(o->host);
    free(o->of);
}

void optimizer_reset(struct optimizer *o) {
    o->s->k->zero(o->s->k, o->arena, o->bytes);
    for (int i = 0; i < OPTIMIZER_MOMENTS; i++) o->steps[i] = 0;
}

/* ---- places ------------------------------------------------------------------------------------ */

/* Of piece p's n elements from `local` on, how many from the first on lie side by side in the model too,
 * and where. */
static size_t side_by_side(const struct layout_piece *p, size_t local, size_t n, size_t *canonical) {
    size_t row = (local - p->at) / p->columns, column = (local - p->at) % p->columns;
    *canonical = p->canonical + (p->row + row) * p->width + p->column + column;
    return p->columns == p->width ? n : least(n, p->columns - column);
}

static void *state_at(const struct optimizer_state *m, size_t element) {
    return (char *)m->at + kernels_state_bytes(m->how, element);
}

static struct layout_run run_at(const struct layout_piece *p, size_t local) {
    struct layout_run r = { .local = local, .unit = p->unit, .shared = p->shared };
    side_by_side(p, local, 1, &r.canonical);
    return r;
}

static void *param_at(const struct shard *s, size_t at) {
    return (char *)s->params + at * s->k->weight_bytes;
}

static const float *grads_at(const struct shard *s, const struct layout_piece *p, size_t local) {
    struct layout_run r = run_at(p, local);
    return s->grads + shard_grad_at(s, &r);
}

/* Stochastic rounding of weights goes by an element's number in the whole model: what is not side by side
 * in it goes row by row. */
static size_t at_once(const struct shard *s, const struct layout_piece *p, size_t local, size_t n,
                      uint64_t *first) {
    size_t canonical, together = side_by_side(p, local, n, &canonical);
    *first = canonical;
    return s->k->weight_bytes == 2 && !s->k->rest_bytes ? together : n;
}

/* ---- AdamW ------------------------------------------------------------------------------------- */

/* Moments m, v of n elements, in fp32. */
static void adamw_some(const struct optimizer *o, const struct layout_piece *p, size_t local, size_t n,
                       float *m, float *v, struct kernels_adamw *a) {
    const struct shard *s = o->s;
    for (size_t i = 0, some; i < n; i += some) {
        some = at_once(s, p, local + i, n - i, &a->first);
        struct layout_run r = run_at(p, local + i);
        s->k->adamw(s->k, param_at(s, shard_param_at(s, &r)), shard_rest(s, &r), grads_at(s, p, local + i),
                    m + i, v + i, some, a);
    }
}

/* The bits of a moment's rounding are none of the weights': each has a stream of its own in every step. */
static uint64_t seed_of(uint64_t step, int which) { return step | (uint64_t)(which + 1) << 56; }

static void adamw(struct optimizer *o, const struct layout_piece *p, const struct optimizer_tensor *t,
                  struct kernels_adamw *a, uint64_t step) {
    const struct kernels *k = o->s->k;
    const struct optimizer_state *m = &t->moment[OPTIMIZER_FIRST], *v = &t->moment[OPTIMIZER_SECOND];
    if (m->how == KERNELS_STATE_FP32) {
        adamw_some(o, p, t->local, t->count, m->at, v->at, a);
        return;
    }
    float *m32 = o->chunk[OPTIMIZER_FIRST], *v32 = o->chunk[OPTIMIZER_SECOND];
    for (size_t i = 0, some; i < t->count; i += some) {
        some = least(OPTIMIZER_CHUNK, t->count - i);
        k->state_out(k, m32, state_at(m, i), m->how, some);
        k->state_out(k, v32, state_at(v, i), v->how, some);
        adamw_some(o, p, t->local + i, some, m32, v32, a);
        k->state_in(k, state_at(m, i), m->how, m32, some, seed_of(step, OPTIMIZER_FIRST), t->local + i);
        k->state_in(k, state_at(v, i), v->how, v32, some, seed_of(step, OPTIMIZER_SECOND), t->local + i);
    }
}

/* ---- Muon -------------------------------------------------------------------------------------- */

/* momentum = mu * momentum + g, direction = mu * momentum + g, of some elements. */
static void look_ahead(const struct kernels *k, float *direction, float *momentum, const float *grad,
                       size_t n, float grad_scale) {
    k->combine(k, momentum, MUON_MOMENTUM, momentum, grad_scale, grad, n);
    k->combine(k, direction, MUON_MOMENTUM, momentum, grad_scale, grad, n);
}

static void momentum(struct optimizer *o, const struct layout_piece *p, const struct optimizer_tensor *t,
                     float *direction, float grad_scale, uint64_t step) {
    const struct kernels *k = o->s->k;
    const struct optimizer_state *m = &t->moment[OPTIMIZER_FIRST];
    if (m->how == KERNELS_STATE_FP32) {
        if (t->count) look_ahead(k, direction, m->at, grads_at(o->s, p, t->local), t->count, grad_scale);
        return;
    }
    float *m32 = o->chunk[OPTIMIZER_FIRST];
    for (size_t i = 0, some; i < t->count; i += some) {
        some = least(OPTIMIZER_CHUNK, t->count - i);
        k->state_out(k, m32, state_at(m, i), m->how, some);
        look_ahead(k, direction + i, m32, grads_at(o->s, p, t->local + i), some, grad_scale);
        k->state_in(k, state_at(m, i), m->how, m32, some, seed_of(step, OPTIMIZER_FIRST), t->local + i);
    }
}

static void descend(const struct optimizer *o, const struct layout_piece *p, const struct optimizer_tensor *t,
                    const float *direction, struct kernels_descent *d) {
    const struct shard *s = o->s;
    for (size_t i = 0, some; i < t->count; i += some) {
        some = at_once(s, p, t->local + i, t->count - i, &d->first);
        struct layout_run r = run_at(p, t->local + i);
        s->k->descend(s->k, param_at(s, shard_param_at(s, &r)), shard_rest(s, &r), direction + i, some, d);
    }
}

/* The largest first, so that data-parallel ranks have about as much to do. */
static const enum proto_model_role matrices[] = { MODEL_DOWN, MODEL_UP, MODEL_GATE, MODEL_O, MODEL_Q, MODEL_K,
                                                  MODEL_V };
#define MATRICES (sizeof matrices / sizeof *matrices)

static void gather_directions(struct optimizer *o) {
    const struct comm *c = o->s->mesh.data;
    if (o->s->mesh.shard < ENGINE_SHARD_OPTIMIZER) return;
    size_t slice = layout_slice(&o->s->layout, 1);
    c->all_gather(c, o->muon.direction, o->muon.direction + (size_t)c->rank * slice, slice, COMM_FP32);
}

static void orthogonalise(struct optimizer *o, uint32_t first_tensor, size_t unit_at) {
    const struct comm *c = o->s->mesh.data;
    bool several = c && c->size > 1;
    struct layout_piece p;
    for (size_t i = 0; i < MATRICES; i++) {
        layout_piece(&o->s->layout, first_tensor + matrices[i], &p);
        if (!several || (int)i % c->size == c->rank)
            muon_orthogonalise(&o->muon, o->muon.direction + (p.at - unit_at), &p);
    }
    for (size_t i = 0; several && i < MATRICES; i++) {
        layout_piece(&o->s->layout, first_tensor + matrices[i], &p);
        c->broadcast(c, o->muon.direction + (p.at - unit_at), p.rows * p.columns, COMM_FP32,
                     (int)i % c->size);
    }
}

static void muon_layer(struct optimizer *o, uint32_t layer, double lr, double grad_scale, uint64_t step) {
    uint32_t first = 1 + layer * PROTO_MODEL_TENSORS_PER_LAYER;
    size_t unit_at = layout_unit_at(&o->s->layout, 1 + layer);
    struct kernels_descent d = { .keep = (float)(1 - lr * o->inner.weight_decay), .seed = step };
    struct layout_piece p;
    for (size_t i = 0; i < MATRICES; i++) {
        const struct optimizer_tensor *t = &o->of[first + matrices[i]];
        layout_piece(&o->s->layout, first + matrices[i], &p);
        momentum(o, &p, t, o->muon.direction + (t->local - unit_at), (float)grad_scale, step);
    }
    gather_directions(o);
    orthogonalise(o, first, unit_at);
    for (size_t i = 0; i < MATRICES; i++) {
        const struct optimizer_tensor *t = &o->of[first + matrices[i]];
        struct proto_tensor whole;
        proto_model_tensor(&o->s->layout.model, first + matrices[i], &whole);
        layout_piece(&o->s->layout, first + matrices[i], &p);
        d.step = (float)(lr * muon_scale((double)whole.shape[0], (double)whole.shape[1]));
        descend(o, &p, t, o->muon.direction + (t->local - unit_at), &d);
    }
}

/* ---- a step ------------------------------------------------------------------------------------ */

void optimizer_step(struct optimizer *o, uint64_t step, double lr, double grad_scale) {
    const struct msg_inner *in = &o->inner;
    const struct msg_model *model = &o->s->layout.model;
    struct kernels_adamw a = {
        .lr = (float)lr, .beta1 = (float)in->beta1, .beta2 = (float)in->beta2, .eps = (float)in->eps,
        .m_correction = (float)(1 - pow(in->beta1, (double)++o->steps[OPTIMIZER_FIRST])),
        .v_correction = (float)(1 - pow(in->beta2, (double)++o->steps[OPTIMIZER_SECOND])),
        .grad_scale = (float)grad_scale, .seed = step,
    };
    for (uint32_t i = 0; i < proto_model_tensor_count(model); i++) {
        struct layout_piece p;
        layout_piece(&o->s->layout, i, &p);
        a.weight_decay = !p.shared && p.role != MODEL_EMBED ? (float)in->weight_decay : 0;
        if (has_moment(in, p.role, OPTIMIZER_SECOND)) adamw(o, &p, &o->of[i], &a, step);
    }
    for (uint32_t layer = 0; in->optimizer == OPTIMIZER_MUON && layer < model->layers; layer++)
        muon_layer(o, layer, lr, grad_scale, step);
}

/* ---- moments in and out ------------------------------------------------------------------------ */

/* A canonical range in host memory. */
struct range {
    size_t first, end;
    float *out; /* one of them */
    const float *in;
};

/* The elements of a part [local, local + n) that lie in the range go between host memory, where the part's
 * first one is at `part`, or, with fp32 states, the device's. */
static void move(const struct kernels *k, const struct layout_piece *p, const struct range *r, size_t local,
                 size_t n, float *part, bool on_device) {
    for (size_t i = 0, some; i < n; i += some) {
        size_t canonical;
        some = side_by_side(p, local + i, n - i, &canonical);
        size_t begin = canonical > r->first ? canonical : r->first, end = least(canonical + some, r->end);
        if (begin >= end) continue;
        float *here = part ? part + i + (begin - canonical) : NULL;
        size_t bytes = (end - begin) * sizeof *here, at = begin - r->first;
        if (!part && r->out) memset(r->out + at, 0, bytes);
        if (!part) continue;
        if (!on_device && r->out) memcpy(r->out + at, here, bytes);
        else if (!on_device) memcpy(here, r->in + at, bytes);
        else if (r->out) k->copy_out(k, r->out + at, here, bytes);
        else k->copy_in(k, here, r->in + at, bytes);
    }
}

static void decode(const struct optimizer *o, const struct optimizer_state *m, size_t i, size_t n) {
    const struct kernels *k = o->s->k;
    k->state_out(k, o->chunk[0], state_at(m, i), m->how, n);
    k->copy_out(k, o->host, o->chunk[0], n * sizeof *o->host);
}

static void read_tensor(const struct optimizer *o, uint32_t i, int which, const struct range *r) {
    const struct optimizer_tensor *t = &o->of[i];
    const struct optimizer_state *m = &t->moment[which];
    struct layout_run own = shard_piece(o->s, i);
    struct layout_piece p;
    layout_piece(&o->s->layout, i, &p);
    if (!shard_answers_for(o->s, &own)) return;
    size_t before = own.local - t->local;
    if (!m->at || m->how == KERNELS_STATE_FP32) {
        move(o->s->k, &p, r, own.local, own.count, m->at ? (float *)m->at + before : NULL, true);
        return;
    }
    for (size_t c = 0, n; c < t->count; c += n) {
        n = least(OPTIMIZER_CHUNK, t->count - c);
        size_t begin = c > before ? c : before, end = least(c + n, before + own.count);
        if (begin >= end) continue;
        decode(o, m, c, n);
        move(o->s->k, &p, r, t->local + begin, end - begin, o->host + (begin - c), false);
    }
}

static void write_tensor(const struct optimizer *o, uint32_t i, int which, const struct range *r) {
    const struct kernels *k = o->s->k;
    const struct optimizer_tensor *t = &o->of[i];
    const struct optimizer_state *m = &t->moment[which];
    struct layout_piece p;
    layout_piece(&o->s->layout, i, &p);
    if (!m->at) return;
    if (m->how == KERNELS_STATE_FP32) {
        move(k, &p, r, t->local, t->count, m->at, true);
        return;
    }
    for (size_t c = 0, n; c < t->count; c += n) {
        n = least(OPTIMIZER_CHUNK, t->count - c);
        decode(o, m, c, n); /* what is outside the range stays */
        move(k, &p, r, t->local + c, n, o->host, false);
        k->copy_in(k, o->chunk[0], o->host, n * sizeof *o->host);
        k->state_in(k, state_at(m, c), m->how, o->chunk[0], n, 0, 0);
    }
}

static void each_tensor(const struct optimizer *o, int which, const struct range *r,
                        void (*fn)(const struct optimizer *, uint32_t, int, const struct range *)) {
    const struct msg_model *model = &o->s->layout.model;
    if (r->first == r->end) return;
    for (uint32_t i = proto_model_tensor_at(model, r->first); i < proto_model_tensor_count(model); i++) {
        struct proto_tensor t;
        proto_model_tensor(model, i, &t);
        if (t.offset >= r->end) return;
        fn(o, i, which, r);
    }
}

void optimizer_read(const struct optimizer *o, enum optimizer_moment which, size_t first, size_t n,
                    float *out) {
    const struct range r = { .first = first, .end = first + n, .out = out };
    each_tensor(o, which, &r, read_tensor);
}

void optimizer_write(struct optimizer *o, enum optimizer_moment which, size_t first, size_t n,
                     const float *in) {
    const struct range r = { .first = first, .end = first + n, .in = in };
    each_tensor(o, which, &r, write_tensor);
}
