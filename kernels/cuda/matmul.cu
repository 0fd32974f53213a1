/* matmul.cu - matrix products by cuBLASLt, accumulated in fp32. cuBLASLt is column-major: a row-major [rows,C]
 * is its C x rows, so out = x * w^T there is out^T = w * x^T.
 *
 * What cuBLASLt's heuristic names first for a shape is kept and used each time. Splitting the sum over k
 * across blocks that add with atomics is not allowed, so that the same product gives the same bits. */
#include <cublasLt.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cuda.h"

#define PRODUCTS_MAX 64

struct key {
    int m, n, k, transposed_a, transposed_b, add, wide; /* wide: the result is fp32, else an activation */
};

struct product {
    struct key key; /* m is 0 where there is none */
    cublasLtMatmulDesc_t how;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
};

struct cuda_products {
    cublasLtHandle_t handle;
    struct product product[PRODUCTS_MAX];
    unsigned next; /* which one to replace when all are taken */
    void *workspace;
};

static void release(struct product *p) {
    if (p->how) cublasLtMatmulDescDestroy(p->how);
    if (p->a) cublasLtMatrixLayoutDestroy(p->a);
    if (p->b) cublasLtMatrixLayoutDestroy(p->b);
    if (p->c) cublasLtMatrixLayoutDestroy(p->c);
    memset(p, 0, sizeof *p);
}

int cuda_products_create(struct cuda *c, struct err *err) {
    struct cuda_products *p = (struct cuda_products *)calloc(1, sizeof *p);
    c->products = p;
    if (!p) return err_set(err, ERR_MEMORY, "no memory for the CUDA backend");
    if (cublasLtCreate(&p->handle) != CUBLAS_STATUS_SUCCESS)
        return err_set(err, ERR_UNSUPPORTED, "CUDA device %d: cuBLASLt does not start", c->device);
    cudaError_t result = cudaMalloc(&p->workspace, CUDA_WORKSPACE_BYTES);
    if (result == cudaSuccess) return 0;
    return err_set(err, ERR_MEMORY, "CUDA device %d: %zu bytes for matrix products: %s", c->device, CUDA_WORKSPACE_BYTES,
                   cudaGetErrorString(result));
}

void cuda_products_destroy(struct cuda *c) {
    struct cuda_products *p = c->products;
    if (!p) return;
    for (int i = 0; i < PRODUCTS_MAX; i++) release(&p->product[i]);
    if (p->handle) cublasLtDestroy(p->handle);
    cudaFree(p->workspace);
    free(p);
}

/* ---- one shape ------------------------------------------------------------------------------------------ */

/* cuBLASLt's m x n = op(a) * op(b), k between; everything column-major and dense. */
static cublasStatus_t describe(struct product *p, cudaDataType_t type) {
    const struct key *s = &p->key;
    cublasOperation_t a = s->transposed_a ? CUBLAS_OP_T : CUBLAS_OP_N, b = s->transposed_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasStatus_t rc = cublasLtMatmulDescCreate(&p->how, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (!rc) rc = cublasLtMatmulDescSetAttribute(p->how, CUBLASLT_MATMUL_DESC_TRANSA, &a, sizeof a);
    if (!rc) rc = cublasLtMatmulDescSetAttribute(p->how, CUBLASLT_MATMUL_DESC_TRANSB, &b, sizeof b);
    int a_rows = s->transposed_a ? s->k : s->m, a_columns = s->transposed_a ? s->m : s->k;
    int b_rows = s->transposed_b ? s->n : s->k, b_columns = s->transposed_b ? s->k : s->n;
    if (!rc) rc = cublasLtMatrixLayoutCreate(&p->a, type, (uint64_t)a_rows, (uint64_t)a_columns, a_rows);
    if (!rc) rc = cublasLtMatrixLayoutCreate(&p->b, type, (uint64_t)b_rows, (uint64_t)b_columns, b_rows);
    if (!rc) rc = cublasLtMatrixLayoutCreate(&p->c, s->wide ? CUDA_R_32F : type, (uint64_t)s->m, (uint64_t)s->n, s->m);
    return rc;
}

static cublasStatus_t choose(struct cuda_products *all, struct product *p) {
    cublasLtMatmulPreference_t wish = NULL;
    cublasLtMatmulHeuristicResult_t found;
    size_t workspace = CUDA_WORKSPACE_BYTES;
    uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE; /* partial sums in fp32, added in order */
    int count = 0;
    cublasStatus_t rc = cublasLtMatmulPreferenceCreate(&wish);
    if (!rc)
        rc = cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                                  sizeof workspace);
    if (!rc)
        rc = cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions,
                                                  sizeof reductions);
    if (!rc)
        rc = cublasLtMatmulAlgoGetHeuristic(all->handle, p->how, p->a, p->b, p->c, p->c, wish, 1, &found, &count);
    if (!rc && !count) rc = CUBLAS_STATUS_NOT_SUPPORTED;
    if (!rc) p->algorithm = found.algo;
    if (wish) cublasLtMatmulPreferenceDestroy(wish);
    return rc;
}

static struct product *product_for(struct cuda *c, struct key key, cublasStatus_t *rc) {
    struct cuda_products *all = c->products;
    for (int i = 0; i < PRODUCTS_MAX; i++)
        if (!memcmp(&all->product[i].key, &key, sizeof key)) return &all->product[i];
    struct product *p = &all->product[all->next++ % PRODUCTS_MAX];
    release(p);
    p->key = key;
    *rc = describe(p, c->table.act_bytes == sizeof(float) ? CUDA_R_32F : CUDA_R_16BF);
    if (!*rc) *rc = choose(all, p);
    if (!*rc) return p;
    release(p);
    return NULL;
}

static void multiply(struct cuda *c, struct key key, const void *a, const void *b, void *out) {
    struct cuda_products *all = c->products;
    cublasStatus_t rc = CUBLAS_STATUS_SUCCESS;
    float one = 1.0f, beta = (float)key.add;
    struct product *p = product_for(c, key, &rc);
    if (p)
        rc = cublasLtMatmul(all->handle, p->how, &one, a, p->a, b, p->b, &beta, out, p->c, out, p->c, &p->algorithm,
                            all->workspace, CUDA_WORKSPACE_BYTES, c->stream);
    if (rc && c->failure.code == ERR_NONE)
        err_set(&c->failure, ERR_UNSUPPORTED, "CUDA device %d: cuBLASLt's product of [%d,%d] and [%d,%d] failed: %s",
                c->device, key.m, key.k, key.k, key.n, cublasLtGetStatusString(rc));
}

/* ---- entries ---------------------------------------------------------------------------------------------- */

static void matmul_forward(const struct kernels *k, void *out, const void *x, const void *w, int rows, int C,
                           int OC) {
    struct key key = { OC, rows, C, 1, 0, 0, 0 };
    multiply(cuda_of(k), key, w, x, out);
}

static void matmul_logits(const struct kernels *k, float *out, const void *x, const void *w, int rows, int C, int OC) {
    struct key key = { OC, rows, C, 1, 0, 0, 1 };
    multiply(cuda_of(k), key, w, x, out);
}

static void matmul_backward_input(const struct kernels *k, void *dx, const void *dout, const void *w, int rows, int C,
                                  int OC) {
    struct key key = { C, rows, OC, 0, 0, 0, 0 };
    multiply(cuda_of(k), key, w, dout, dx);
}

static void matmul_backward_weight(const struct kernels *k, float *dw, const void *dout, const void *x, int rows,
                                   int C, int OC, enum kernels_write write) {
    struct key key = { C, OC, rows, 0, 1, write == KERNELS_ADD, 1 };
    multiply(cuda_of(k), key, x, dout, dw);
}

void cuda_fill_products(struct kernels *k) {
    k->matmul_forward = matmul_forward;
    k->matmul_logits = matmul_logits;
    k->matmul_backward_input = matmul_backward_input;
    k->matmul_backward_weight = matmul_backward_weight;
}
