/* muon.c - momentum made orthogonal; see muon.h. */
#include "node/muon.h"

#include <math.h>

#include "proto/model.h"

#define ITERATIONS 5
/* The quintic that brings singular values from (0, 1] to [0.7, 1.2] fastest: Keller Jordan's Muon. */
#define QUINTIC_A 3.4445f
#define QUINTIC_B (-4.7750f)
#define QUINTIC_C 2.0315f

static size_t largest_piece(const struct layout *l) {
    size_t largest = 0;
    for (uint32_t i = 1; i <= PROTO_MODEL_TENSORS_PER_LAYER; i++) {
        struct layout_piece p;
        layout_piece(l, i, &p);
        if (p.rows * p.columns > largest) largest = p.rows * p.columns;
    }
    return largest;
}

/* What muon_init takes: all of struct muon's pointers, in their order. */
static void room(const struct layout *l, const struct kernels *k, size_t bytes[6]) {
    size_t piece = largest_piece(l), square = (size_t)l->model.width * l->model.width;
    size_t rounded = k->act_bytes == sizeof(float) ? 0 : k->act_bytes;
    bytes[0] = (size_t)l->dp * layout_slice(l, 1) * sizeof(float);
    bytes[1] = piece * sizeof(float);
    bytes[2] = bytes[3] = square * sizeof(float);
    bytes[4] = piece * rounded;
    bytes[5] = square * rounded;
}

size_t muon_bytes(const struct layout *l, const struct kernels *k) {
    size_t bytes[6], all = 0;
    room(l, k, bytes);
    for (int i = 0; i < 6; i++) all += bytes[i];
    return all;
}

int muon_init(struct muon *m, const struct layout *l, const struct comm *tensor, const struct kernels *k,
              struct err *err) {
    void **to[] = { (void **)&m->direction, (void **)&m->product, (void **)&m->gram, (void **)&m->square,
                    &m->rounded[0], &m->rounded[1] };
    size_t bytes[6];
    *m = (struct muon){ .k = k, .tensor = tensor };
    room(l, k, bytes);
    for (int i = 0; i < 6; i++)
        if (bytes[i] && !(*to[i] = k->alloc(k, bytes[i], err))) return -1;
    return 0;
}

void muon_release(struct muon *m) {
    void *all[] = { m->direction, m->product, m->gram, m->square, m->rounded[0], m->rounded[1] };
    for (int i = 0; m->k && i < 6; i++) m->k->free(m->k, all[i]);
}

double muon_scale(double A, double B) { return 0.2 * sqrt(A > B ? A : B); }

static int is_cut(const struct muon *m) { return m->tensor && m->tensor->size > 1; }

/* x as products take it. */
static const void *rounded(const struct muon *m, int which, const float *x, size_t n) {
    if (!m->rounded[which]) return x;
    m->k->round(m->k, m->rounded[which], x, n);
    return m->rounded[which];
}

/* x = a x + b (x x^T) x + c (x x^T)^2 x; or with x^T x from the other side, which is the same: the side
 * that is small, or the one that is not cut. */
static void iterate(const struct muon *m, float *x, int rows, int columns, int left) {
    const struct kernels *k = m->k;
    int side = left ? rows : columns;
    size_t n = (size_t)rows * (size_t)columns, squares = (size_t)side * (size_t)side;
    const void *xr = rounded(m, 0, x, n);
    if (left) k->matmul_logits(k, m->gram, xr, xr, rows, columns, rows);
    else k->matmul_backward_weight(k, m->gram, xr, xr, rows, columns, columns, KERNELS_SET);
    if (is_cut(m)) m->tensor->all_reduce(m->tensor, m->gram, squares, COMM_FP32);
    const void *gr = rounded(m, 1, m->gram, squares);
    k->matmul_logits(k, m->square, gr, gr, side, side, side); /* it is its own transpose */
    k->combine(k, m->gram, QUINTIC_B, m->gram, QUINTIC_C, m->square, squares);
    gr = rounded(m, 1, m->gram, squares);
    if (left) k->matmul_backward_weight(k, m->product, gr, xr, rows, columns, rows, KERNELS_SET);
    else k->matmul_logits(k, m->product, xr, gr, rows, columns, columns);
    k->combine(k, x, QUINTIC_A, x, 1.0f, m->product, n);
}

void muon_orthogonalise(const struct muon *m, float *x, const struct layout_piece *p) {
    size_t n = p->rows * p->columns;
    double squares = m->k->sum_squares(m->k, x, n);
    if (is_cut(m)) m->tensor->sum(m->tensor, &squares, 1);
    float scale = squares > 0 ? (float)(1 / sqrt(squares)) : 0;
    m->k->combine(m->k, x, scale, x, 0, x, n);
    int by_columns = p->role == MODEL_O || p->role == MODEL_DOWN;
    int left = is_cut(m) ? by_columns : p->rows < p->columns;
    for (int i = 0; i < ITERATIONS; i++) iterate(m, x, (int)p->rows, (int)p->columns, left);
}
