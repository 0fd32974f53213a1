/* shard.c - a rank's vectors; see shard.h. */
#include "node/shard.h"

#include "proto/model.h"

#include <assert.h>
#include <string.h>

#define NO_UNIT UINT32_MAX

static bool cuts(const struct shard *s, enum engine_shard least) { return s->mesh.shard >= least; }

/* ---- memory ------------------------------------------------------------------------------------ */

static size_t padded(const struct layout *l, uint32_t unit) { return (size_t)l->dp * layout_slice(l, unit); }

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

struct room {
    void **to;
    size_t n, bytes; /* elements, of each */
};

static int weight_slot(const struct layout *l, uint32_t unit) {
    if (unit == 0) return 0;
    return unit == LAYOUT_UNITS(l) - 1 ? 1 : 2 + (int)(unit % SHARD_LAYER_WEIGHTS);
}

static int grad_slot(uint32_t unit) { return unit == 0 ? 0 : 1 + (int)(unit % SHARD_LAYER_GRADS); }

/* Elements of the slots. */
static void slots(const struct layout *l, size_t weights[SHARD_WEIGHT_SLOTS],
                  size_t grads[SHARD_GRAD_SLOTS]) {
    uint32_t last = LAYOUT_UNITS(l) - 1;
    weights[0] = grads[0] = padded(l, 0);
    weights[1] = padded(l, last);
    for (int i = 0; i < SHARD_LAYER_WEIGHTS; i++) weights[2 + i] = padded(l, 1);
    for (int i = 0; i < SHARD_LAYER_GRADS; i++) grads[1 + i] = padded(l, 1);
    grads[grad_slot(last)] = larger(padded(l, 1), padded(l, last));
}

static int take_slots(struct shard *s, struct err *err) {
    size_t weights[SHARD_WEIGHT_SLOTS], grads[SHARD_GRAD_SLOTS];
    slots(&s->layout, weights, grads);
    for (int i = 0; i < SHARD_WEIGHT_SLOTS && cuts(s, ENGINE_SHARD_FULL); i++)
        if (!(s->weights[i].at = s->k->alloc(s->k, weights[i] * s->k->weight_bytes, err))) return -1;
    for (int i = 0; i < SHARD_GRAD_SLOTS && cuts(s, ENGINE_SHARD_GRADIENTS); i++)
        if (!(s->unit_grads[i].at = s->k->alloc(s->k, grads[i] * sizeof(float), err))) return -1;
    return 0;
}

static size_t norms_rest_bytes(const struct kernels *k) {
    return k->weight_bytes == sizeof(uint16_t) && !k->rest_bytes ? sizeof(uint16_t) : 0;
}

void shard_bytes(const struct layout *l, enum engine_shard shard, const struct kernels *k, size_t *params,
                 size_t *grads) {
    size_t own = l->n / (size_t)l->dp, weight_slots[SHARD_WEIGHT_SLOTS], grad_slots[SHARD_GRAD_SLOTS];
    slots(l, weight_slots, grad_slots);
    *params = (shard >= ENGINE_SHARD_FULL ? own : l->n) * (k->weight_bytes + k->rest_bytes);
    *params += layout_norms(l) * (sizeof(float) + norms_rest_bytes(k));
    *grads = (shard >= ENGINE_SHARD_GRADIENTS ? own : l->n) * sizeof(float);
    for (int i = 0; i < SHARD_WEIGHT_SLOTS && shard >= ENGINE_SHARD_FULL; i++)
        *params += weight_slots[i] * k->weight_bytes;
    for (int i = 0; i < SHARD_GRAD_SLOTS && shard >= ENGINE_SHARD_GRADIENTS; i++)
        *grads += grad_slots[i] * sizeof(float);
}

static int take_memory(struct shard *s, struct err *err) {
    const struct room room[] = {
        { &s->params, s->params_n, s->k->weight_bytes }, { (void **)&s->rest, s->params_n, s->k->rest_bytes },
        { (void **)&s->grads, s->grads_n, sizeof(float) },
        { (void **)&s->norms, layout_norms(&s->layout), sizeof(float) },
        { (void **)&s->norms_rest, layout_norms(&s->layout), norms_rest_bytes(s->k) },
    };
    size_t all = 0;
    for (size_t i = 0; i < sizeof room / sizeof *room; i++) all += room[i].n * room[i].bytes;
    for (size_t i = 0; i < sizeof room / sizeof *room; i++)
        if (room[i].bytes && !(*room[i].to = s->k->alloc(s->k, room[i].n * room[i].bytes, err))) goto failed;
    if (take_slots(s, err) == 0) return 0;
failed:
    err_prefix(err, "parameters and gradient of %llu take %zu bytes",
               (unsigned long long)proto_model_elements(&s->layout.model), all);
    return -1;
}

int shard_init(struct shard *s, const struct msg_model *m, const struct kernels *k,
               const struct engine_mesh *mesh, struct err *err) {
    const struct comm *tensor = mesh ? mesh->tensor : NULL, *data = mesh ? mesh->data : NULL;
    *s = (struct shard){ .k = k };
    if (mesh) s->mesh = *mesh;
    if (!data || data->size == 1) s->mesh.shard = ENGINE_SHARD_NONE;
    layout_init(&s->layout, m, tensor ? tensor->size : 1, tensor ? tensor->rank : 0, data ? data->size : 1,
                data ? data->rank : 0);
    size_t whole = s->layout.n, own = whole / (size_t)s->layout.dp;
    s->params_n = cuts(s, ENGINE_SHARD_FULL) ? own : whole;
    s->grads_n = cuts(s, ENGINE_SHARD_GRADIENTS) ? own : whole;
    shard_forget_gathered(s);
    return take_memory(s, err);
}

void shard_release(struct shard *s) {
    void *all[] = { s->params, s->rest, s->grads, s->norms, s->norms_rest };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) s->k->free(s->k, all[i]);
    for (int i = 0; i < SHARD_WEIGHT_SLOTS; i++) s->k->free(s->k, s->weights[i].at);
    for (int i = 0; i < SHARD_GRAD_SLOTS; i++) s->k->free(s->k, s->unit_grads[i].at);
}

void shard_forget_gathered(struct shard *s) {
    for (int i = 0; i < SHARD_WEIGHT_SLOTS; i++) s->weights[i].unit = NO_UNIT;
}

/* ---- where elements are ------------------------------------------------------------------------ */

/* In a vector of own slices, which lie one behind the other. */
static size_t in_slices(const struct layout *l, const struct layout_run *run) {
    size_t first = layout_unit_at(l, run->unit);
    return first / (size_t)l->dp + (run->local - first - (size_t)l->dp_rank * layout_slice(l, run->unit));
}

static bool has(const struct shard *s, enum engine_shard least, struct layout_run *run) {
    return !cuts(s, least) || layout_own(&s->layout, run);
}

static size_t place(const struct shard *s, enum engine_shard least, const struct layout_run *run) {
    return cuts(s, least) ? in_slices(&s->layout, run) : run->local;
}

bool shard_has_params(const struct shard *s, struct layout_run *run) {
    return has(s, ENGINE_SHARD_FULL, run);
}
bool shard_has_grads(const struct shard *s, struct layout_run *run) {
    return has(s, ENGINE_SHARD_GRADIENTS, run);
}
bool shard_has_state(const struct shard *s, struct layout_run *run) {
    return has(s, ENGINE_SHARD_OPTIMIZER, run);
}

size_t shard_param_at(const struct shard *s, const struct layout_run *run) {
    return place(s, ENGINE_SHARD_FULL, run);
}
size_t shard_grad_at(const struct shard *s, const struct layout_run *run) {
    return place(s, ENGINE_SHARD_GRADIENTS, run);
}

uint16_t *shard_rest(const struct shard *s, const struct layout_run *run) {
    if (s->rest) return s->rest + shard_param_at(s, run);
    return s->norms_rest && run->shared ? s->norms_rest + layout_norm_at(&s->layout, run) : NULL;
}

bool shard_answers_for(const struct shard *s, struct layout_run *run) {
    return (!run->shared || s->layout.tp_rank == 0) && layout_own(&s->layout, run);
}

struct layout_run shard_piece(const struct shard *s, uint32_t i) {
    struct layout_piece p;
    layout_piece(&s->layout, i, &p);
    return (struct layout_run){ .canonical = p.canonical + p.row * p.width + p.column, .local = p.at,
                                .count = p.rows * p.columns, .unit = p.unit, .shared = p.shared };
}

/* ---- a pass ------------------------------------------------------------------------------------ */

static void *weight(const struct shard *s, size_t at) {
    return (char *)s->params + at * s->k->weight_bytes;
}

static enum comm_type weight_type(const struct shard *s) {
    return s->k->weight_bytes == 2 ? COMM_BF16 : COMM_FP32;
}

/* What is asked for from here on may use what is in the slot, or write to it. */
static void settle(const struct shard *s, struct shard_slot *slot) {
    if (slot->under_way) s->mesh.data->finish(s->mesh.data, slot->number);
    slot->under_way = false;
}

static struct shard_slot *gather(struct shard *s, uint32_t unit) {
    const struct comm *c = s->mesh.data;
    struct shard_slot *slot = &s->weights[weight_slot(&s->layout, unit)];
    if (slot->unit == unit) return slot;
    c->begin(c);
    c->all_gather(c, slot->at, weight(s, layout_unit_at(&s->layout, unit) / (size_t)c->size),
                  layout_slice(&s->layout, unit), weight_type(s));
    *slot = (struct shard_slot){ .at = slot->at, .unit = unit, .under_way = true, .number = c->end(c) };
    return slot;
}

/* Which unit the pass comes to next, struct model_units; one that is there already where it will ask for no other. */
static uint32_t unit_after(struct shard *s, uint32_t unit) {
    uint32_t layers = s->layout.model.layers, head = s->layout.model.tied ? 0 : layers + 1;
    if (unit == head && s->asked == layers) s->goes_back = true;
    s->asked = unit;
    if (s->goes_back) return unit == head ? layers : unit - 1;
    return unit < layers ? unit + 1 : head;
}

static const void *unit_weights(void *arg, uint32_t unit) {
    struct shard *s = arg;
    if (s->on_unit) s->on_unit(s->on_unit_arg);
    if (!cuts(s, ENGINE_SHARD_FULL)) return weight(s, layout_unit_at(&s->layout, unit));
    struct shard_slot *slot = gather(s, unit);
    settle(s, slot);
    gather(s, unit_after(s, unit));
    return slot->at;
}

/* What is behind a unit in its slot is another one's, and is added up with it for nothing. */
static float *unit_grads(void *arg, uint32_t unit) {
    struct shard *s = arg;
    if (!cuts(s, ENGINE_SHARD_GRADIENTS)) return s->grads + layout_unit_at(&s->layout, unit);
    struct shard_slot *slot = &s->unit_grads[grad_slot(unit)];
    settle(s, slot);
    return slot->at;
}

static void unit_done(void *arg, uint32_t unit) {
    struct shard *s = arg;
    const struct comm *c = s->mesh.data;
    if (!cuts(s, ENGINE_SHARD_GRADIENTS)) return;
    struct shard_slot *slot = &s->unit_grads[grad_slot(unit)];
    size_t slice = layout_slice(&s->layout, unit);
    float *part = slot->at, *sum = s->grads + layout_unit_at(&s->layout, unit) / (size_t)c->size;
    c->begin(c);
    if (s->adds) s->k->accumulate(s->k, part + (size_t)c->rank * slice, sum, slice);
    c->reduce_scatter(c, sum, part, slice, COMM_FP32);
    slot->number = c->end(c);
    slot->under_way = true;
}

struct model_units shard_units(struct shard *s, bool adds) {
    s->adds = adds;
    s->goes_back = false;
    s->asked = NO_UNIT;
    return (struct model_units){ .arg = s, .norms = s->norms, .weights = unit_weights, .grads = unit_grads,
                                 .grads_done = unit_done };
}

/* ---- between passes ---------------------------------------------------------------------------- */

/* Tensor-parallel ranks each have the norms' gradients of their own rows. */
static void reduce_shared(struct shard *s) {
    const struct comm *c = s->mesh.tensor;
    if (!c || c->size == 1) return;
    for (uint32_t i = 0; i < proto_model_tensor_count(&s->layout.model); i++) {
        struct layout_run r = shard_piece(s, i);
        if (r.shared && shard_has_grads(s, &r))
            c->all_reduce(c, s->grads + shard_grad_at(s, &r), r.count, COMM_FP32);
    }
}

void shard_reduce(struct shard *s) {
    const struct comm *c = s->mesh.data;
    const struct layout *l = &s->layout;
    for (int i = 0; i < SHARD_GRAD_SLOTS; i++) settle(s, &s->unit_grads[i]);
    reduce_shared(s);
    if (!c || c->size == 1 || cuts(s, ENGINE_SHARD_GRADIENTS)) return;
    if (!cuts(s, ENGINE_SHARD_OPTIMIZER)) {
        c->all_reduce(c, s->grads, l->n, COMM_FP32);
        return;
    }
    for (uint32_t u = 0; u < LAYOUT_UNITS(l); u++) {
        size_t slice = layout_slice(l, u);
        float *g = s->grads + layout_unit_at(l, u);
        c->reduce_scatter(c, g + (size_t)c->rank * slice, g, slice, COMM_FP32);
    }
}

/* Slices cut through norms, so each rank puts in what it has: what the others have is 0 there. */
static void gather_norms(struct shard *s) {
    const struct comm *c = s->mesh.data;
    const struct kernels *k = s->k;
    bool in_parts = cuts(s, ENGINE_SHARD_OPTIMIZER);
    size_t n = layout_norms(&s->layout);
    if (in_parts) k->zero(k, s->norms, n * sizeof *s->norms);
    for (uint32_t i = 0; i < proto_model_tensor_count(&s->layout.model); i++) {
        struct layout_run r = shard_piece(s, i);
        if (!r.shared || !shard_has_state(s, &r)) continue;
        float *to = s->norms + layout_norm_at(&s->layout, &r);
        k->weights_widen(k, to, weight(s, shard_param_at(s, &r)), shard_rest(s, &r), r.count);
    }
    if (in_parts) c->all_reduce(c, s->norms, n, COMM_FP32);
}

void shard_gather(struct shard *s) {
    const struct comm *c = s->mesh.data;
    const struct layout *l = &s->layout;
    shard_forget_gathered(s);
    gather_norms(s);
    if (!cuts(s, ENGINE_SHARD_OPTIMIZER) || cuts(s, ENGINE_SHARD_FULL)) return;
    for (uint32_t u = 0; u < LAYOUT_UNITS(l); u++) {
        size_t slice = layout_slice(l, u), first = layout_unit_at(l, u);
        c->all_gather(c, weight(s, first), weight(s, first + (size_t)c->rank * slice), slice, weight_type(s));
    }
}
