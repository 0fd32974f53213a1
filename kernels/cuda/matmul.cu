/* matmul.cu - matrix products by cuBLASLt, accumulated in fp32. cuBLASLt is column-major: a row-major
 * [rows,C] is its C x rows, so out = x * w^T there is out^T = w * x^T.
 *
 * The first time that a shape comes, what cuBLASLt's heuristic names for it is timed on the operands at hand;
 * the fastest is used from then on, and kept on disk (choices.h). Splitting the sum over k across blocks that
 * add with atomics is not allowed, so that the same product by the same algorithm gives the same bits. */
#ifdef __CUDACC__
#include <cublasLt.h>
#else
#include "tests/cuda/cublaslt.h"
#endif
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cuda.h"

extern "C" {
#include "kernels/cuda/choices.h"
}

#define PRODUCTS_MAX 64
#define CANDIDATES 8
#define TIMES 3     /* that a candidate is timed, after once untimed; the best counts */
#define ALIGNMENT 16 /* no load or store is wider */

static_assert(sizeof(cublasLtMatmulAlgo_t) == CHOICES_WORDS * sizeof(uint64_t),
              "an algorithm is so many words");

struct product {
    struct choice_key key; /* m is 0 where there is none */
    cublasLtMatmulDesc_t how;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
};

struct cuda_products {
    cublasLtHandle_t handle;
    struct product product[PRODUCTS_MAX];
    unsigned next; /* which one to replace when all are taken */
    void *workspace;
    struct choices *choices;
    cudaEvent_t begin, end;
};

static void release(struct product *p) {
    if (p->how) cublasLtMatmulDescDestroy(p->how);
    if (p->a) cublasLtMatrixLayoutDestroy(p->a);
    if (p->b) cublasLtMatrixLayoutDestroy(p->b);
    if (p->c) cublasLtMatrixLayoutDestroy(p->c);
    memset(p, 0, sizeof *p);
}

int cuda_products_create(struct cuda *c, const char *device_name, struct err *err) {
    struct cuda_products *p = (struct cuda_products *)calloc(1, sizeof *p);
    c->products = p;
    if (!p) return err_set(err, ERR_MEMORY, "no memory for the CUDA backend");
    if (!(p->choices = choices_open(cublasLtGetVersion(), device_name, c->ignored)))
        return err_set(err, ERR_MEMORY, "no memory for the CUDA backend");
    if (cublasLtCreate(&p->handle) != CUBLAS_STATUS_SUCCESS)
        return err_set(err, ERR_UNSUPPORTED, "CUDA device %d: cuBLASLt does not start", c->device);
    cudaError_t result = cudaMalloc(&p->workspace, CUDA_WORKSPACE_BYTES);
    if (result == cudaSuccess) result = cudaEventCreate(&p->begin);
    if (result == cudaSuccess) result = cudaEventCreate(&p->end);
    if (result == cudaSuccess) return 0;
    return err_set(err, ERR_MEMORY, "CUDA device %d: %zu bytes for matrix products: %s", c->device,
                   CUDA_WORKSPACE_BYTES, cudaGetErrorString(result));
}

void cuda_products_destroy(struct cuda *c) {
    struct cuda_products *p = c->products;
    if (!p) return;
    for (int i = 0; i < PRODUCTS_MAX; i++) release(&p->product[i]);
    if (p->handle) cublasLtDestroy(p->handle);
    if (p->begin) cudaEventDestroy(p->begin);
    if (p->end) cudaEventDestroy(p->end);
    cudaFree(p->workspace);
    choices_close(p->choices);
    free(p);
}

/* ---- one shape ----------------------------------------------------------------------------------------- */

/* cuBLASLt's m x n = op(a) * op(b), k between; everything column-major and dense. */
static cublasStatus_t describe(struct product *p) {
    const struct choice_key *s = &p->key;
    cudaDataType_t type = s->bf16 ? CUDA_R_16BF : CUDA_R_32F;
    cublasOperation_t a = s->transposed_a ? CUBLAS_OP_T : CUBLAS_OP_N,
                      b = s->transposed_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasStatus_t rc = cublasLtMatmulDescCreate(&p->how, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (!rc) rc = cublasLtMatmulDescSetAttribute(p->how, CUBLASLT_MATMUL_DESC_TRANSA, &a, sizeof a);
    if (!rc) rc = cublasLtMatmulDescSetAttribute(p->how, CUBLASLT_MATMUL_DESC_TRANSB, &b, sizeof b);
    int a_rows = s->transposed_a ? s->k : s->m, a_columns = s->transposed_a ? s->m : s->k;
    int b_rows = s->transposed_b ? s->n : s->k, b_columns = s->transposed_b ? s->k : s->n;
    if (!rc) rc = cublasLtMatrixLayoutCreate(&p->a, type, (uint64_t)a_rows, (uint64_t)a_columns, a_rows);
    if (!rc) rc = cublasLtMatrixLayoutCreate(&p->b, type, (uint64_t)b_rows, (uint64_t)b_columns, b_rows);
    if (!rc)
        rc = cublasLtMatrixLayoutCreate(&p->c, s->wide ? CUDA_R_32F : type, (uint64_t)s->m, (uint64_t)s->n,
                                        s->m);
    return rc;
}

/* What the heuristic names, the likeliest first. */
static cublasStatus_t candidates(struct cuda_products *all, struct product *p,
                                 cublasLtMatmulHeuristicResult_t found[CANDIDATES], int *count) {
    static const cublasLtMatmulPreferenceAttributes_t alignments[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES
    };
    cublasLtMatmulPreference_t wish = NULL;
    size_t workspace = CUDA_WORKSPACE_BYTES;
    uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE; /* partial sums in fp32, added in order */
    uint32_t alignment = (uint32_t)p->key.alignment;
    cublasStatus_t rc = cublasLtMatmulPreferenceCreate(&wish);
    if (!rc)
        rc = cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                                  sizeof workspace);
    if (!rc)
        rc = cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                                  &reductions, sizeof reductions);
    for (size_t i = 0; !rc && i < sizeof alignments / sizeof *alignments; i++)
        rc = cublasLtMatmulPreferenceSetAttribute(wish, alignments[i], &alignment, sizeof alignment);
    if (!rc)
        rc = cublasLtMatmulAlgoGetHeuristic(all->handle, p->how, p->a, p->b, p->c, p->c, wish, CANDIDATES,
                                            found, count);
    if (!rc && !*count) rc = CUBLAS_STATUS_NOT_SUPPORTED;
    if (wish) cublasLtMatmulPreferenceDestroy(wish);
    return rc;
}

static cublasStatus_t run(struct cuda *c, const struct product *p, const cublasLtMatmulAlgo_t *algorithm,
                          const void *a, const void *b, void *out, float beta) {
    float one = 1.0f;
    return cublasLtMatmul(c->products->handle, p->how, &one, a, p->a, b, p->b, &beta, out, p->c, out, p->c,
                          algorithm, c->products->workspace, CUDA_WORKSPACE_BYTES, c->stream);
}

/* Milliseconds; INFINITY where it does not run. */
static float time_of(struct cuda *c, const struct product *p, const cublasLtMatmulAlgo_t *algorithm,
                     const void *a, const void *b, void *out) {
    struct cuda_products *all = c->products;
    float best = INFINITY;
    if (run(c, p, algorithm, a, b, out, 0.0f)) return INFINITY;
    for (int i = 0; i < TIMES; i++) {
        float ms = INFINITY;
        cudaError_t result = cudaEventRecord(all->begin, c->stream);
        if (run(c, p, algorithm, a, b, out, 0.0f)) return INFINITY;
        if (result == cudaSuccess) result = cudaEventRecord(all->end, c->stream);
        if (result == cudaSuccess) result = cudaEventSynchronize(all->end);
        if (result == cudaSuccess) result = cudaEventElapsedTime(&ms, all->begin, all->end);
        if (cuda_note(c, result, "time a product")) return INFINITY;
        best = ms < best ? ms : best;
    }
    return best;
}

/* Time them. out is overwritten; NULL: nowhere to write, the first is taken untimed and not kept. */
static cublasStatus_t choose(struct cuda *c, struct product *p, const void *a, const void *b, void *out,
                             const uint64_t *refused) {
    cublasLtMatmulHeuristicResult_t found[CANDIDATES];
    float best = INFINITY;
    int count = 0;
    cublasStatus_t rc = candidates(c->products, p, found, &count);
    if (rc) return rc;
    p->algorithm = found[0].algo;
    if (!out) return rc;
    for (int i = 0; i < count; i++) {
        if (found[i].state) continue;
        float ms = time_of(c, p, &found[i].algo, a, b, out);
        if (ms >= best) continue;
        best = ms;
        p->algorithm = found[i].algo;
    }
    if (best == INFINITY) return CUBLAS_STATUS_NOT_SUPPORTED;
    choices_keep(c->products->choices, &p->key, p->algorithm.data, refused, best * 1000.0f);
    return rc;
}

/* Take the algorithm of an earlier start, if it runs still, or choose one. */
static cublasStatus_t settle(struct cuda *c, struct product *p, const void *a, const void *b, void *out,
                             int add) {
    cublasLtMatmulHeuristicResult_t checked;
    const uint64_t *refused = NULL;
    cublasLtMatmulAlgo_t kept;
    cublasStatus_t rc = describe(p);
    if (rc) return rc;
    if (choices_find(c->products->choices, &p->key, kept.data)) {
        p->algorithm = kept;
        if (!cublasLtMatmulAlgoCheck(c->products->handle, p->how, p->a, p->b, p->c, p->c, &p->algorithm,
                                     &checked) &&
            checked.workspaceSize <= CUDA_WORKSPACE_BYTES)
            return rc;
        refused = kept.data;
    }
    /* Where the product is added to something, it is tried beside it, if there is room. */
    void *beside = NULL;
    size_t bytes = (size_t)p->key.m * (size_t)p->key.n * (p->key.wide || !p->key.bf16 ? sizeof(float) : 2);
    if (add && cudaMalloc(&beside, bytes) != cudaSuccess) {
        cudaGetLastError();
        beside = NULL;
    }
    rc = choose(c, p, a, b, add ? beside : out, refused);
    cudaFree(beside);
    return rc;
}

static int alignment_of(const void *a, const void *b, const void *out) {
    uintptr_t bits = (uintptr_t)a | (uintptr_t)b | (uintptr_t)out | ALIGNMENT;
    return (int)(bits & -bits);
}

static struct product *product_for(struct cuda *c, const struct choice_key *key, const void *a, const void *b,
                                   void *out, int add, cublasStatus_t *rc) {
    struct cuda_products *all = c->products;
    for (int i = 0; i < PRODUCTS_MAX; i++)
        if (!memcmp(&all->product[i].key, key, sizeof *key)) return &all->product[i];
    struct product *p = &all->product[all->next++ % PRODUCTS_MAX];
    release(p);
    p->key = *key;
    *rc = settle(c, p, a, b, out, add);
    if (!*rc) return p;
    release(p);
    return NULL;
}

static void multiply(struct cuda *c, struct choice_key key, const void *a, const void *b, void *out,
                     int add) {
    cublasStatus_t rc = CUBLAS_STATUS_SUCCESS;
    key.bf16 = c->table.act_bytes != sizeof(float);
    key.alignment = alignment_of(a, b, out);
    const struct product *p = product_for(c, &key, a, b, out, add, &rc);
    if (p) rc = run(c, p, &p->algorithm, a, b, out, (float)add);
    if (rc && c->failure.code == ERR_NONE)
        err_set(&c->failure, ERR_UNSUPPORTED,
                "CUDA device %d: cuBLASLt's product of [%d,%d] and [%d,%d] failed: %s", c->device, key.m,
                key.k, key.k, key.n, cublasLtGetStatusString(rc));
}

/* ---- entries ------------------------------------------------------------------------------------------- */

static void matmul_forward(const struct kernels *k, void *out, const void *x, const void *w, int rows, int C,
                           int OC) {
    struct choice_key key = { OC, rows, C, 1, 0, 0, 0, 0 };
    multiply(cuda_of(k), key, w, x, out, 0);
}

static void matmul_logits(const struct kernels *k, float *out, const void *x, const void *w, int rows, int C,
                          int OC) {
    struct choice_key key = { OC, rows, C, 1, 0, 0, 1, 0 };
    multiply(cuda_of(k), key, w, x, out, 0);
}

static void matmul_backward_input(const struct kernels *k, void *dx, const void *dout, const void *w,
                                  int rows, int C, int OC) {
    struct choice_key key = { C, rows, OC, 0, 0, 0, 0, 0 };
    multiply(cuda_of(k), key, w, dout, dx, 0);
}

static void matmul_backward_weight(const struct kernels *k, float *dw, const void *dout, const void *x,
                                   int rows, int C, int OC, enum kernels_write write) {
    struct choice_key key = { C, OC, rows, 0, 1, 0, 1, 0 };
    multiply(cuda_of(k), key, x, dout, dw, write == KERNELS_ADD);
}

void cuda_fill_products(struct kernels *k) {
    k->matmul_forward = matmul_forward;
    k->matmul_logits = matmul_logits;
    k->matmul_backward_input = matmul_backward_input;
    k->matmul_backward_weight = matmul_backward_weight;
}
