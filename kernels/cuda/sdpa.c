/* sdpa.c - attention as cuDNN's operation graphs; see sdpa.h. The engines know these graphs by their form:
 * the order of operations, which tensors are virtual, and their strides are those of NVIDIA's cudnn-frontend
 * (scaled_dot_product_flash_attention.h, its composite nodes). For cuDNN 9.19 they were compared, operation
 * by operation, in cuDNN's own log (CUDNN_LOGLEVEL_DBG=3): nothing differs. */
#include "kernels/cuda/sdpa.h"

#include <dlfcn.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- cuDNN's interface -------------------------------------------------------------------------- */

typedef void *descriptor;
enum kind { /* cudnnBackendDescriptorType_t */
            POINTWISE = 0,
            ENGINE = 2,
            ENGINE_CONFIG = 3,
            HEURISTIC = 4,
            PLAN = 5,
            OP_POINTWISE = 13,
            GRAPH = 15,
            PACK = 16,
            TENSOR = 17,
            MATMUL = 18,
            OP_MATMUL = 19,
            REDUCTION = 21,
            OP_REDUCTION = 22,
            OP_RESHAPE = 31
};
enum type { /* cudnnBackendAttributeType_t */
    T_HANDLE = 0, T_DATA_TYPE = 1, T_BOOLEAN = 2, T_INT64 = 3, T_POINTER = 6, T_HEURISTIC = 8, T_NOTE = 11,
    T_POINTWISE = 14, T_DESCRIPTOR = 15, T_REDUCTION = 18
};
enum data { FLOAT = 0, INT32 = 4, BFLOAT16 = 9, BOOLEAN = 11 }; /* cudnnDataType_t */
enum mode { ADD = 0, MUL = 1, DIV = 6, SUB = 9, EXP = 13, LOG = 15, GE = 303, INDEX = 501, SELECT = 601 };
enum attribute { /* cudnnBackendAttributeName_t */
                 POINTWISE_MODE = 0,
                 POINTWISE_PRECISION = 1,
                 POINTWISE_AXIS = 9,
                 HEURISTIC_MODE = 200,
                 HEURISTIC_GRAPH = 201,
                 HEURISTIC_RESULTS = 202,
                 CONFIG_ENGINE = 300,
                 PLAN_HANDLE = 400,
                 PLAN_CONFIG = 401,
                 PLAN_WORKSPACE = 402,
                 OP_POINTWISE_HOW = 750,
                 OP_POINTWISE_X = 751,
                 OP_POINTWISE_B = 752,
                 OP_POINTWISE_Y = 753,
                 OP_POINTWISE_T = 758,
                 GRAPH_HANDLE = 800,
                 GRAPH_OPS = 801,
                 TENSOR_ALIGNMENT = 900,
                 TENSOR_TYPE = 901,
                 TENSOR_DIMENSIONS = 902,
                 TENSOR_STRIDES = 903,
                 TENSOR_ID = 906,
                 TENSOR_VIRTUAL = 907,
                 TENSOR_BY_VALUE = 908,
                 PACK_IDS = 1000,
                 PACK_POINTERS = 1001,
                 PACK_WORKSPACE = 1003,
                 ENGINE_NOTE = 1303,
                 MATMUL_PRECISION = 1500,
                 OP_MATMUL_A = 1520,
                 OP_MATMUL_B = 1521,
                 OP_MATMUL_C = 1522,
                 OP_MATMUL_HOW = 1523,
                 REDUCTION_OPERATOR = 1600,
                 REDUCTION_PRECISION = 1601,
                 OP_REDUCTION_X = 1610,
                 OP_REDUCTION_Y = 1611,
                 OP_REDUCTION_HOW = 1612,
                 OP_RESHAPE_X = 2200,
                 OP_RESHAPE_Y = 2201
};
enum { SUM = 0, MAX = 3 };          /* cudnnReduceTensorOp_t */
enum { HEURISTIC_A = 3 };           /* cudnnBackendHeurMode_t */
enum { NOTE_NOT_DETERMINISTIC = 4 }; /* cudnnBackendNumericalNote_t */

static struct cudnn {
    void *dl;
    size_t (*version)(void);
    const char *(*error)(int);
    void (*last_error)(char *, size_t);
    int (*create)(void **);
    int (*destroy)(void *);
    int (*set_stream)(void *, void *);
    int (*make)(enum kind, descriptor *);
    int (*unmake)(descriptor);
    int (*set)(descriptor, enum attribute, enum type, int64_t, const void *);
    int (*get)(descriptor, enum attribute, enum type, int64_t, int64_t *, void *);
    int (*finalize)(descriptor);
    int (*execute)(void *, descriptor, descriptor);
} lib; /* loaded once, for good: it takes no unloading */

static int load(struct err *err) {
    struct cudnn l = { .dl = NULL };
    const struct {
        void *to;
        const char *name;
    } symbols[] = {
        { &l.version, "cudnnGetVersion" }, { &l.error, "cudnnGetErrorString" },
        { &l.last_error, "cudnnGetLastErrorString" }, { &l.create, "cudnnCreate" },
        { &l.destroy, "cudnnDestroy" }, { &l.set_stream, "cudnnSetStream" },
        { &l.make, "cudnnBackendCreateDescriptor" }, { &l.unmake, "cudnnBackendDestroyDescriptor" },
        { &l.set, "cudnnBackendSetAttribute" }, { &l.get, "cudnnBackendGetAttribute" },
        { &l.finalize, "cudnnBackendFinalize" }, { &l.execute, "cudnnBackendExecute" },
    };
    if (lib.dl) return 0;
    if (!(l.dl = dlopen("libcudnn.so.9", RTLD_NOW | RTLD_LOCAL)))
        return err_set(err, ERR_NOT_FOUND, "%.200s", dlerror());
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++)
        if (!(*(void **)symbols[i].to = dlsym(l.dl, symbols[i].name))) {
            dlclose(l.dl);
            return err_set(err, ERR_UNSUPPORTED, "libcudnn.so.9 has no %s", symbols[i].name);
        }
    lib = l;
    return 0;
}

static bool CUDNN_FAILED(int result, const char *what, struct err *err) {
    char last[120] = "";
    if (result == 0) return false;
    lib.last_error(last, sizeof last);
    err_set(err, ERR_UNSUPPORTED, "cuDNN, %s: %s; %s", what, lib.error(result), last);
    return true;
}

/* ---- a graph under construction ------------------------------------------------------------------- */

#define DESCRIPTORS_MAX 128
#define OPERATIONS_MAX 32

/* Tensors that the caller gives, by their ids; virtual ones count from VIRTUAL on. */
enum id { Q = 1, K, V, O, STATS, DO, DQ, DK, DV, SCALE, MINUS_INFINITY, ONE, DELTA, VIRTUAL };

struct builder {
    descriptor made[DESCRIPTORS_MAX]; /* all of them, kept until the plan goes */
    int count;
    descriptor op[OPERATIONS_MAX];
    int ops;
    int64_t next;
    int failed;
    struct sdpa_counts counts;
    struct err *err;
};

static void try(struct builder *b, int result, const char *what) {
    if (!b->failed && CUDNN_FAILED(result, what, b->err)) b->failed = 1;
}

static descriptor make(struct builder *b, enum kind kind) {
    descriptor d = NULL;
    if (b->failed || b->count == DESCRIPTORS_MAX) {
        b->failed = 1;
        return NULL;
    }
    try(b, lib.make(kind, &d), "make a descriptor");
    if (!b->failed) b->made[b->count++] = d;
    return d;
}

static void set(struct builder *b, descriptor d, enum attribute a, enum type type, int64_t n, const void *x) {
    char what[40];
    snprintf(what, sizeof what, "set attribute %d", (int)a);
    if (!b->failed) try(b, lib.set(d, a, type, n, x), what);
}

static void set_descriptor(struct builder *b, descriptor d, enum attribute a, descriptor x) {
    set(b, d, a, T_DESCRIPTOR, 1, &x);
}

static void finish(struct builder *b, descriptor d, const char *what) {
    if (!b->failed) try(b, lib.finalize(d), what);
}

static void add_op(struct builder *b, descriptor d, const char *what) {
    finish(b, d, what);
    if (b->ops < OPERATIONS_MAX) b->op[b->ops++] = d;
    else b->failed = 1;
}

/* A tensor [B,heads,rows,columns]. */
struct shape4 {
    int64_t dim[4], stride[4];
};

static struct shape4 dense(int64_t B, int64_t heads, int64_t rows, int64_t columns) {
    return (struct shape4){ { B, heads, rows, columns },
                            { heads * rows * columns, rows * columns, columns, 1 } };
}

/* Heads in rows of [B,T,...]: `row` elements from one token to the next. */
static struct shape4 strided(int64_t B, int64_t heads, int64_t T, int64_t D, int64_t row) {
    return (struct shape4){ { B, heads, T, D }, { T * row, D, row, 1 } };
}

static struct shape4 transposed(struct shape4 s) {
    return (struct shape4){ { s.dim[0], s.dim[1], s.dim[3], s.dim[2] },
                            { s.stride[0], s.stride[1], s.stride[3], s.stride[2] } };
}

static descriptor tensor(struct builder *b, enum id id, enum data type, struct shape4 s) {
    int64_t alignment = 16, own = id == VIRTUAL ? b->next++ : (int64_t)id;
    int data = type;
    bool is_virtual = id == VIRTUAL, by_value = id >= SCALE && id <= ONE;
    descriptor d = make(b, TENSOR);
    set(b, d, TENSOR_ALIGNMENT, T_INT64, 1, &alignment);
    set(b, d, TENSOR_TYPE, T_DATA_TYPE, 1, &data);
    set(b, d, TENSOR_DIMENSIONS, T_INT64, 4, s.dim);
    set(b, d, TENSOR_STRIDES, T_INT64, 4, s.stride);
    set(b, d, TENSOR_ID, T_INT64, 1, &own);
    set(b, d, TENSOR_VIRTUAL, T_BOOLEAN, 1, &is_virtual);
    set(b, d, TENSOR_BY_VALUE, T_BOOLEAN, 1, &by_value);
    finish(b, d, "tensor");
    b->counts.tensors++;
    return d;
}

static descriptor scalar(struct builder *b, enum id id) { return tensor(b, id, FLOAT, dense(1, 1, 1, 1)); }

/* y = mode(x, second, third); axis: of INDEX. */
static void pointwise(struct builder *b, enum mode mode, enum data precision, int64_t axis, descriptor x,
                      descriptor second, descriptor third, descriptor y) {
    descriptor how = make(b, POINTWISE), op;
    int mode_value = mode, data = precision;
    set(b, how, POINTWISE_MODE, T_POINTWISE, 1, &mode_value);
    set(b, how, POINTWISE_PRECISION, T_DATA_TYPE, 1, &data);
    if (mode == INDEX) set(b, how, POINTWISE_AXIS, T_INT64, 1, &axis);
    finish(b, how, "pointwise mode");
    op = make(b, OP_POINTWISE);
    set_descriptor(b, op, OP_POINTWISE_HOW, how);
    set_descriptor(b, op, OP_POINTWISE_X, x);
    if (second) set_descriptor(b, op, OP_POINTWISE_B, second);
    if (third) set_descriptor(b, op, OP_POINTWISE_T, third);
    set_descriptor(b, op, OP_POINTWISE_Y, y);
    add_op(b, op, "pointwise operation");
    b->counts.pointwise++;
}

static descriptor apply(struct builder *b, enum mode mode, descriptor x, descriptor second, struct shape4 s) {
    descriptor y = tensor(b, VIRTUAL, FLOAT, s);
    pointwise(b, mode, FLOAT, 0, x, second, NULL, y);
    return y;
}

static void product(struct builder *b, descriptor A, descriptor B, descriptor C) {
    descriptor how = make(b, MATMUL), op;
    int data = FLOAT;
    set(b, how, MATMUL_PRECISION, T_DATA_TYPE, 1, &data);
    finish(b, how, "product mode");
    op = make(b, OP_MATMUL);
    set_descriptor(b, op, OP_MATMUL_A, A);
    set_descriptor(b, op, OP_MATMUL_B, B);
    set_descriptor(b, op, OP_MATMUL_C, C);
    set_descriptor(b, op, OP_MATMUL_HOW, how);
    add_op(b, op, "product");
    b->counts.products++;
}

static void reduce(struct builder *b, int operator, descriptor x, descriptor y) {
    descriptor how = make(b, REDUCTION), op;
    int data = FLOAT;
    set(b, how, REDUCTION_OPERATOR, T_REDUCTION, 1, &operator);
    set(b, how, REDUCTION_PRECISION, T_DATA_TYPE, 1, &data);
    finish(b, how, "reduction mode");
    op = make(b, OP_REDUCTION);
    set_descriptor(b, op, OP_REDUCTION_X, x);
    set_descriptor(b, op, OP_REDUCTION_Y, y);
    set_descriptor(b, op, OP_REDUCTION_HOW, how);
    add_op(b, op, "reduction");
    b->counts.reductions++;
}

static descriptor reshape(struct builder *b, descriptor x, enum data type, struct shape4 s) {
    descriptor y = tensor(b, VIRTUAL, type, s), op = make(b, OP_RESHAPE);
    set_descriptor(b, op, OP_RESHAPE_X, x);
    set_descriptor(b, op, OP_RESHAPE_Y, y);
    add_op(b, op, "reshape");
    b->counts.reshapes++;
    return y;
}

/* ---- the two graphs ------------------------------------------------------------------------------- */

/* Where query t does not see key u: -infinity. */
static descriptor causal(struct builder *b, descriptor score, struct shape4 s) {
    descriptor row = tensor(b, VIRTUAL, INT32, s), column = tensor(b, VIRTUAL, INT32, s),
               sees = tensor(b, VIRTUAL, BOOLEAN, s), out = tensor(b, VIRTUAL, FLOAT, s);
    pointwise(b, INDEX, FLOAT, 2, score, NULL, NULL, row);
    pointwise(b, INDEX, FLOAT, 3, score, NULL, NULL, column);
    pointwise(b, GE, BOOLEAN, 0, row, column, NULL, sees);
    pointwise(b, SELECT, FLOAT, 0, score, scalar(b, MINUS_INFINITY), sees, out);
    return out;
}

/* `row`: elements of a token of qkv; the graph may be of some of its heads. */
static void forward_graph(struct builder *b, const struct sdpa_shape *p, int64_t row) {
    struct shape4 score = dense(p->B, p->H, p->T, p->T), column = dense(p->B, p->H, p->T, 1);
    struct shape4 keys = strided(p->B, p->KV, p->T, p->D, row);
    descriptor q = tensor(b, Q, BFLOAT16, strided(p->B, p->H, p->T, p->D, row)),
               k = tensor(b, K, BFLOAT16, transposed(keys)), v = tensor(b, V, BFLOAT16, keys);
    descriptor s = tensor(b, VIRTUAL, FLOAT, score), max = tensor(b, VIRTUAL, FLOAT, column),
               sum = tensor(b, VIRTUAL, FLOAT, column), weight = tensor(b, VIRTUAL, BFLOAT16, score);
    product(b, q, k, s);
    s = causal(b, apply(b, MUL, s, scalar(b, SCALE), score), score);
    reduce(b, MAX, s, max);
    descriptor e = apply(b, EXP, apply(b, SUB, s, max, score), NULL, score);
    reduce(b, SUM, e, sum);
    pointwise(b, ADD, FLOAT, 0, max, apply(b, LOG, sum, NULL, column), NULL, tensor(b, STATS, FLOAT, column));
    pointwise(b, DIV, FLOAT, 0, e, sum, NULL, weight);
    product(b, weight, v, tensor(b, O, BFLOAT16, strided(p->B, p->H, p->T, p->D, (int64_t)p->H * p->D)));
}

/* One of dK, dV: transposed weights or gradients of scores times rows, and the sum over a group's heads. */
static void keys_gradient(struct builder *b, const struct sdpa_shape *p, descriptor of_scores,
                          descriptor rows, enum id id, struct shape4 keys) {
    struct shape4 across = transposed(dense(p->B, p->H, p->T, p->T));
    descriptor turned = reshape(b, of_scores, BFLOAT16, across), out = tensor(b, id, BFLOAT16, keys);
    if (p->H == p->KV) {
        product(b, turned, rows, out);
        return;
    }
    descriptor all = tensor(b, VIRTUAL, BFLOAT16, dense(p->B, p->H, p->T, p->D));
    product(b, turned, rows, all);
    reduce(b, SUM, all, out);
}

/* out_row: elements of a token of out and dout. */
static void backward_graph(struct builder *b, const struct sdpa_shape *p, int64_t row, int64_t out_row) {
    struct shape4 score = dense(p->B, p->H, p->T, p->T), column = dense(p->B, p->H, p->T, 1);
    struct shape4 queries = strided(p->B, p->H, p->T, p->D, row),
                  keys = strided(p->B, p->KV, p->T, p->D, row),
                  outs = strided(p->B, p->H, p->T, p->D, out_row);
    struct shape4 both = { { p->B, p->H, p->T, p->D },
                           { (int64_t)p->H * p->T * p->D, (int64_t)p->T * p->D, (int64_t)p->H * p->D, 1 } };
    descriptor q = tensor(b, Q, BFLOAT16, queries), k = tensor(b, K, BFLOAT16, transposed(keys)),
               v = tensor(b, V, BFLOAT16, transposed(keys)), o = tensor(b, O, BFLOAT16, outs),
               d_o = tensor(b, DO, BFLOAT16, outs), stats = tensor(b, STATS, FLOAT, column);
    descriptor scale = scalar(b, SCALE), delta = tensor(b, DELTA, FLOAT, column);
    descriptor sum = tensor(b, VIRTUAL, FLOAT, column), s = tensor(b, VIRTUAL, FLOAT, score),
               d_p = tensor(b, VIRTUAL, FLOAT, score);

    reduce(b, SUM, apply(b, MUL, d_o, o, both), sum);
    pointwise(b, MUL, FLOAT, 0, sum, scalar(b, ONE), NULL, delta);

    product(b, q, k, s);
    s = apply(b, SUB, apply(b, MUL, s, scale, score), stats, score);
    descriptor weight = apply(b, EXP, causal(b, s, score), NULL, score);
    keys_gradient(b, p, weight, d_o, DV, keys);

    product(b, d_o, v, d_p);
    d_p = apply(b, MUL, apply(b, SUB, d_p, delta, score), weight, score);
    descriptor d_s = apply(b, MUL, d_p, scale, score);
    keys_gradient(b, p, d_s, q, DK, keys);
    product(b, d_s, reshape(b, k, FLOAT, keys), tensor(b, DQ, BFLOAT16, queries));
}

/* ---- plans ----------------------------------------------------------------------------------------- */

/* A graph with the engine that carries it out: of all of a call, or of a part. */
struct plan {
    struct sdpa_shape whole, part; /* whole.B = 0: none */
    int backward;
    struct builder b;
    descriptor plan;
    size_t workspace, delta; /* bytes; delta: of the own tensor DELTA, which follows */
};

struct sdpa {
    void *handle;
    struct plan plans[2 * SDPA_SHAPES_MAX];
    int next;
};

static void release(struct plan *p) {
    for (int i = p->b.count; i > 0; i--) lib.unmake(p->b.made[i - 1]);
    memset(p, 0, sizeof *p);
}

static descriptor build_graph(struct plan *p, void *handle, struct err *err) {
    struct builder *b = &p->b;
    int64_t row = (int64_t)(p->whole.H + 2 * p->whole.KV) * p->whole.D,
            out_row = (int64_t)p->whole.H * p->whole.D;
    b->next = VIRTUAL;
    b->err = err;
    if (p->backward) backward_graph(b, &p->part, row, out_row);
    else forward_graph(b, &p->part, row);
    descriptor g = make(b, GRAPH);
    if (handle) set(b, g, GRAPH_HANDLE, T_HANDLE, 1, &handle);
    set(b, g, GRAPH_OPS, T_DESCRIPTOR, b->ops, b->op);
    finish(b, g, "graph");
    return b->failed ? NULL : g;
}

/* Notes of the engine that a configuration is for. */
static bool is_deterministic(descriptor config) {
    descriptor engine = NULL;
    int notes[16];
    int64_t n = 0;
    if (lib.make(ENGINE, &engine)) return false;
    bool sure = !lib.get(config, CONFIG_ENGINE, T_DESCRIPTOR, 1, &n, &engine) &&
                !lib.get(engine, ENGINE_NOTE, T_NOTE, 16, &n, notes);
    for (int64_t i = 0; sure && i < n && i < 16; i++) sure = notes[i] != NOTE_NOT_DETERMINISTIC;
    lib.unmake(engine);
    return sure;
}

#define CONFIGS_MAX 8

/* The first configuration of the heuristic's that can be made into a plan. */
static int choose(struct plan *p, void *handle, descriptor heuristic) {
    struct builder *b = &p->b;
    descriptor config[CONFIGS_MAX] = { NULL };
    int64_t n = 0, bytes = 0, got;
    for (int i = 0; i < CONFIGS_MAX; i++) config[i] = make(b, ENGINE_CONFIG);
    if (b->failed || lib.get(heuristic, HEURISTIC_RESULTS, T_DESCRIPTOR, CONFIGS_MAX, &n, config)) return -1;
    for (int64_t i = 0; i < n && i < CONFIGS_MAX; i++) {
        if (!is_deterministic(config[i])) continue;
        descriptor plan = make(b, PLAN);
        if (!plan) return -1;
        if (lib.set(plan, PLAN_HANDLE, T_HANDLE, 1, &handle) ||
            lib.set(plan, PLAN_CONFIG, T_DESCRIPTOR, 1, &config[i]) || lib.finalize(plan) ||
            lib.get(plan, PLAN_WORKSPACE, T_INT64, 1, &got, &bytes))
            continue;
        p->plan = plan;
        p->workspace = ((size_t)bytes + 255) / 256 * 256;
        return 0;
    }
    return -1;
}

static int make_plan(struct plan *p, void *handle) {
    struct err ignored;
    int mode = HEURISTIC_A;
    descriptor g = build_graph(p, handle, &ignored), heuristic;
    if (!g) return -1;
    heuristic = make(&p->b, HEURISTIC);
    set_descriptor(&p->b, heuristic, HEURISTIC_GRAPH, g);
    set(&p->b, heuristic, HEURISTIC_MODE, T_HEURISTIC, 1, &mode);
    finish(&p->b, heuristic, "heuristic");
    if (p->b.failed || choose(p, handle, heuristic)) return -1;
    p->delta = p->backward ? (size_t)p->part.B * p->part.H * p->part.T * sizeof(float) : 0;
    return 0;
}

/* All at once, else sample by sample, else one key/value head of a sample with its queries: statistics must
 * lie dense, which those of some heads of several samples do not. */
static int part_of(const struct sdpa_shape *whole, int cut, struct sdpa_shape *part) {
    *part = *whole;
    if (cut > 0) part->B = 1;
    if (cut > 1) {
        part->H = whole->H / whole->KV;
        part->KV = 1;
    }
    return cut < 3;
}

static struct plan *plan_for(struct sdpa *s, const struct sdpa_shape *shape, int backward) {
    for (int i = 0; i < 2 * SDPA_SHAPES_MAX; i++)
        if (s->plans[i].backward == backward && !memcmp(&s->plans[i].whole, shape, sizeof *shape))
            return &s->plans[i];
    struct plan *p = &s->plans[s->next++ % (2 * SDPA_SHAPES_MAX)];
    struct sdpa_shape part;
    for (int cut = 0; part_of(shape, cut, &part); cut++) {
        release(p);
        p->whole = *shape;
        p->part = part;
        p->backward = backward;
        if (!make_plan(p, s->handle) && p->workspace + p->delta <= SDPA_SCRATCH_MAX) return p;
        p->plan = NULL; /* that it cannot be is kept too */
    }
    return p;
}

static size_t scratch_of(const struct plan *p) { return p->plan ? p->workspace + p->delta : SDPA_CANNOT; }

size_t sdpa_forward_scratch(struct sdpa *s, const struct sdpa_shape *shape) {
    return shape->D % 8 ? SDPA_CANNOT : scratch_of(plan_for(s, shape, 0));
}

size_t sdpa_backward_scratch(struct sdpa *s, const struct sdpa_shape *shape) {
    return shape->D % 8 ? SDPA_CANNOT : scratch_of(plan_for(s, shape, 1));
}

/* ---- calls ------------------------------------------------------------------------------------------ */

struct operands {
    int64_t id[16];
    void *at[16];
    int n;
};

static void give(struct operands *o, enum id id, const void *at) {
    o->id[o->n] = id;
    o->at[o->n++] = (void *)(uintptr_t)at;
}

static int execute(const struct sdpa *s, const struct plan *p, struct operands *o, void *workspace,
                   struct err *err) {
    descriptor pack = NULL;
    int rc = CUDNN_FAILED(lib.make(PACK, &pack), "make a pack", err) ||
             CUDNN_FAILED(lib.set(pack, PACK_IDS, T_INT64, o->n, o->id), "ids", err) ||
             CUDNN_FAILED(lib.set(pack, PACK_POINTERS, T_POINTER, o->n, o->at), "pointers", err) ||
             CUDNN_FAILED(lib.set(pack, PACK_WORKSPACE, T_POINTER, 1, &workspace), "workspace", err) ||
             CUDNN_FAILED(lib.finalize(pack), "pack", err) ||
             CUDNN_FAILED(lib.execute(s->handle, p->plan, pack), "attention", err);
    if (pack) lib.unmake(pack);
    return rc ? -1 : 0;
}

/* Scalars are read when the call is queued. */
static float minus_infinity(void) { return lib.version() < 91000 ? -3.402823466e38f : -INFINITY; }

/* Elements from the first of a tensor to that of sample b's part at key/value head kv. */
static size_t qkv_at(const struct sdpa_shape *w, int b, int head) {
    return (size_t)b * w->T * (w->H + 2 * w->KV) * w->D + (size_t)head * w->D;
}

static const char *bf16_at(const void *x, size_t element) { return (const char *)x + 2 * element; }

int sdpa_forward(struct sdpa *s, const struct sdpa_shape *shape, void *out, float *lse, const void *qkv,
                 void *scratch, struct err *err) {
    const struct plan *p = plan_for(s, shape, 0);
    float scale = 1.0f / sqrtf((float)shape->D), below = minus_infinity();
    int group = shape->H / shape->KV;
    for (int b = 0; b < shape->B; b += p->part.B)
        for (int kv = 0; kv < shape->KV; kv += p->part.KV) {
            struct operands o = { .n = 0 };
            size_t head = (size_t)b * shape->H + (size_t)kv * group;
            give(&o, Q, bf16_at(qkv, qkv_at(shape, b, kv * group)));
            give(&o, K, bf16_at(qkv, qkv_at(shape, b, shape->H + kv)));
            give(&o, V, bf16_at(qkv, qkv_at(shape, b, shape->H + shape->KV + kv)));
            give(&o, O, bf16_at(out, ((size_t)b * shape->T * shape->H + (size_t)kv * group) * shape->D));
            give(&o, STATS, lse + head * shape->T);
            give(&o, SCALE, &scale);
            give(&o, MINUS_INFINITY, &below);
            if (execute(s, p, &o, scratch, err)) return -1;
        }
    return 0;
}

int sdpa_backward(struct sdpa *s, const struct sdpa_shape *shape, void *dqkv, const void *dout,
                  const void *qkv, const void *out, const float *lse, void *scratch, struct err *err) {
    const struct plan *p = plan_for(s, shape, 1);
    float scale = 1.0f / sqrtf((float)shape->D), below = minus_infinity(), one = 1.0f;
    int group = shape->H / shape->KV;
    for (int b = 0; b < shape->B; b += p->part.B)
        for (int kv = 0; kv < shape->KV; kv += p->part.KV) {
            struct operands o = { .n = 0 };
            size_t q = qkv_at(shape, b, kv * group), k = qkv_at(shape, b, shape->H + kv),
                   v = qkv_at(shape, b, shape->H + shape->KV + kv),
                   head = (size_t)b * shape->H + (size_t)kv * group,
                   row = ((size_t)b * shape->T * shape->H + (size_t)kv * group) * shape->D;
            give(&o, Q, bf16_at(qkv, q));
            give(&o, K, bf16_at(qkv, k));
            give(&o, V, bf16_at(qkv, v));
            give(&o, O, bf16_at(out, row));
            give(&o, DO, bf16_at(dout, row));
            give(&o, STATS, lse + head * shape->T);
            give(&o, DQ, bf16_at(dqkv, q));
            give(&o, DK, bf16_at(dqkv, k));
            give(&o, DV, bf16_at(dqkv, v));
            give(&o, DELTA, (char *)scratch + p->workspace);
            give(&o, SCALE, &scale);
            give(&o, MINUS_INFINITY, &below);
            give(&o, ONE, &one);
            if (execute(s, p, &o, scratch, err)) return -1;
        }
    return 0;
}

/* ---- life ------------------------------------------------------------------------------------------- */

struct sdpa *sdpa_create(void *stream, struct err *err) {
    if (load(err)) return NULL;
    struct sdpa *s = calloc(1, sizeof *s);
    if (!s) {
        err_set(err, ERR_MEMORY, "no memory for cuDNN's plans");
        return NULL;
    }
    if (!CUDNN_FAILED(lib.create(&s->handle), "start", err) &&
        !CUDNN_FAILED(lib.set_stream(s->handle, stream), "stream", err))
        return s;
    sdpa_destroy(s);
    return NULL;
}

void sdpa_destroy(struct sdpa *s) {
    if (!s) return;
    for (int i = 0; i < 2 * SDPA_SHAPES_MAX; i++) release(&s->plans[i]);
    if (s->handle) lib.destroy(s->handle);
    free(s);
}

int sdpa_version(const struct sdpa *s) {
    (void)s;
    return (int)lib.version();
}

int sdpa_try_graph(const struct sdpa_shape *shape, int backward, struct sdpa_counts *out, struct err *err) {
    if (load(err)) return -1;
    struct plan *p = calloc(1, sizeof *p);
    if (!p) return err_set(err, ERR_MEMORY, "no memory for a graph");
    p->whole = p->part = *shape;
    p->backward = backward;
    int rc = build_graph(p, NULL, err) ? 0 : -1;
    *out = p->b.counts;
    release(p);
    free(p);
    return rc;
}
