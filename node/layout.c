/* layout.c - which parameters a rank holds; see layout.h. */
#include "node/layout.h"

#include <assert.h>

enum { PER_LAYER = PROTO_MODEL_TENSORS_PER_LAYER };

int layout_check(const struct msg_model *m, int tp, struct err *err) {
    const struct { const char *what; uint32_t n; } parts[] = {
        { "heads", m->heads }, { "kv_heads", m->kv_heads }, { "ffn", m->ffn },
        { "vocabulary", m->vocabulary }, { "sequence", m->sequence },
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (parts[i].n % (uint32_t)tp)
            return err_set(err, ERR_CONFIG, "%d tensor-parallel ranks cannot share the model's %u %s evenly; "
                           "take one that divides heads (%u), kv_heads (%u), ffn, vocabulary and sequence",
                           tp, parts[i].n, parts[i].what, m->heads, m->kv_heads);
    return 0;
}

static bool is_split(enum proto_model_role role) {
    return role != MODEL_INPUT_NORM && role != MODEL_POST_NORM && role != MODEL_FINAL_NORM;
}

static size_t piece_elements(const struct layout *l, uint32_t i) {
    struct proto_tensor t;
    proto_model_tensor(&l->model, i, &t);
    return (size_t)t.count / (is_split(t.role) ? (size_t)l->tp : 1);
}

/* Tensors of a unit. */
static void unit_tensors(const struct layout *l, uint32_t unit, uint32_t *first, uint32_t *end) {
    uint32_t layers = l->model.layers;
    *first = unit == 0 ? 0 : 1 + (unit - 1) * PER_LAYER;
    *end = unit == 0 ? 1 : unit <= layers ? *first + PER_LAYER : proto_model_tensor_count(&l->model);
}

static size_t count_unit(const struct layout *l, uint32_t unit) {
    uint32_t first, end;
    size_t sum = 0;
    unit_tensors(l, unit, &first, &end);
    for (uint32_t i = first; i < end; i++) sum += piece_elements(l, i);
    return sum;
}

void layout_init(struct layout *l, const struct msg_model *m, int tp, int tp_rank, int dp, int dp_rank) {
    assert(tp >= 1 && tp_rank >= 0 && tp_rank < tp && dp >= 1 && dp_rank >= 0 && dp_rank < dp);
    *l = (struct layout){ .model = *m, .tp = tp, .tp_rank = tp_rank, .dp = dp, .dp_rank = dp_rank };
    l->embed = count_unit(l, 0);
    l->layer = count_unit(l, 1);
    l->last = count_unit(l, m->layers + 1);
    l->n = layout_unit_at(l, m->layers + 2);
}

size_t layout_unit_elements(const struct layout *l, uint32_t unit) {
    return unit == 0 ? l->embed : unit <= l->model.layers ? l->layer : l->last;
}

/* Slices begin where vectors of a GPU may: at multiples of 16 elements. */
size_t layout_slice(const struct layout *l, uint32_t unit) {
    size_t dp = (size_t)l->dp, n = layout_unit_elements(l, unit);
    return dp == 1 ? n : ((n + dp - 1) / dp + 15) / 16 * 16;
}

size_t layout_unit_at(const struct layout *l, uint32_t unit) {
    size_t dp = (size_t)l->dp, layers = l->model.layers, at = 0;
    if (unit > 0) at += dp * layout_slice(l, 0);
    if (unit > 1) at += (unit - 1 < layers ? unit - 1 : layers) * dp * layout_slice(l, 1);
    if (unit > layers + 1) at += dp * layout_slice(l, l->model.layers + 1);
    return at;
}

void layout_piece(const struct layout *l, uint32_t i, struct layout_piece *out) {
    struct proto_tensor t;
    uint32_t first, end, layers = l->model.layers;
    size_t tp = (size_t)l->tp, rank = (size_t)l->tp_rank;
    proto_model_tensor(&l->model, i, &t);
    uint32_t unit = i == 0 ? 0 : i - 1 < layers * PER_LAYER ? 1 + (i - 1) / PER_LAYER : layers + 1;
    *out = (struct layout_piece){ .role = t.role, .unit = unit, .canonical = (size_t)t.offset,
                                  .width = (size_t)t.shape[1], .rows = (size_t)t.shape[0],
                                  .columns = (size_t)t.shape[1], .shared = !is_split(t.role) };
    if (t.role == MODEL_O || t.role == MODEL_DOWN) {
        out->columns /= tp;
        out->column = rank * out->columns;
    } else if (!out->shared) {
        out->rows /= tp;
        out->row = rank * out->rows;
    }
    out->at = layout_unit_at(l, unit);
    unit_tensors(l, unit, &first, &end);
    for (uint32_t j = first; j < i; j++) out->at += piece_elements(l, j);
}

/* ---- runs -------------------------------------------------------------------------------------- */

struct range {
    size_t first, end; /* canonical */
};

/* `count` neighbours, as far as they lie in the range. */
static void emit(const struct layout_piece *p, size_t canonical, size_t local, size_t count,
                 const struct range *in, void (*fn)(void *, const struct layout_run *), void *arg) {
    size_t begin = canonical > in->first ? canonical : in->first;
    size_t end = canonical + count < in->end ? canonical + count : in->end;
    if (begin >= end) return;
    struct layout_run run = { .canonical = begin, .local = local + (begin - canonical), .count = end - begin,
                              .unit = p->unit, .shared = p->shared };
    fn(arg, &run);
}

static void emit_rows(const struct layout_piece *p, const struct range *in,
                      void (*fn)(void *, const struct layout_run *), void *arg) {
    size_t first = in->first > p->canonical ? (in->first - p->canonical) / p->width : 0;
    if (first < p->row) first = p->row;
    for (size_t r = first; r < p->row + p->rows; r++) {
        size_t canonical = p->canonical + r * p->width + p->column;
        if (canonical >= in->end) return;
        emit(p, canonical, p->at + (r - p->row) * p->columns, p->columns, in, fn, arg);
    }
}

void layout_each(const struct layout *l, size_t first, size_t n,
                 void (*fn)(void *arg, const struct layout_run *run), void *arg) {
    struct range in = { first, first + n };
    uint32_t tensors = proto_model_tensor_count(&l->model);
    if (n == 0) return;
    for (uint32_t i = proto_model_tensor_at(&l->model, first); i < tensors; i++) {
        struct layout_piece p;
        layout_piece(l, i, &p);
        if (p.canonical >= in.end) return;
        if (p.columns == p.width)
            emit(&p, p.canonical + p.row * p.width, p.at, p.rows * p.width, &in, fn, arg);
        else
            emit_rows(&p, &in, fn, arg);
    }
}

size_t layout_norms(const struct layout *l) { return (2 * (size_t)l->model.layers + 1) * l->model.width; }

size_t layout_norm_at(const struct layout *l, const struct layout_run *run) {
    struct proto_tensor t;
    proto_model_tensor(&l->model, proto_model_tensor_at(&l->model, run->canonical), &t);
    assert(!is_split(t.role));
    size_t norm = 2 * ((size_t)run->unit - 1) + (t.role == MODEL_POST_NORM);
    return norm * l->model.width + (run->canonical - (size_t)t.offset);
}

bool layout_own(const struct layout *l, struct layout_run *run) {
    size_t slice = layout_slice(l, run->unit);
    size_t first = layout_unit_at(l, run->unit) + (size_t)l->dp_rank * slice;
    size_t begin = run->local > first ? run->local : first;
    size_t end = run->local + run->count < first + slice ? run->local + run->count : first + slice;
    if (begin >= end) return false;
    run->canonical += begin - run->local;
    run->local = begin;
    run->count = end - begin;
    return true;
}
