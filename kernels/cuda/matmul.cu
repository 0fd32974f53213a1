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
#define WORKSPACE_BYTES ((size_t)32 << 20)

struct key {
    int m, n, k, transposed_a, transposed_b, add;
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
    void *narrow[2]; /* operands rounded to bf16; they grow */
    size_t narrow_bytes[2];
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
    cudaError_t result = cudaMalloc(&p->workspace, WORKSPACE_BYTES);
    if (result == cudaSuccess) return 0;
    return err_set(err, ERR_MEMORY, "CUDA device %d: %zu bytes for matrix products: %s", c->device, WORKSPACE_BYTES,
                   cudaGetErrorString(result));
}

void cuda_products_destroy(struct cuda *c) {
    struct cuda_products *p = c->products;
    if (!p) return;
    for (int i = 0; i < PRODUCTS_MAX; i++) release(&p->product[i]);
    if (p->handle) cublasLtDestroy(p->handle);
    cudaFree(p->workspace);
    cudaFree(p->narrow[0]);
    cudaFree(p->narrow[1]);
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
    if (!rc) rc = cublasLtMatrixLayoutCreate(&p->c, CUDA_R_32F, (uint64_t)s->m, (uint64_t)s->n, s->m);
    return rc;
}

static cublasStatus_t choose(struct cuda_products *all, struct product *p) {
    cublasLtMatmulPreference_t wish = NULL;
    cublasLtMatmulHeuristicResult_t found;
    size_t workspace = WORKSPACE_BYTES;
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
    *rc = describe(p, c->table.weight_bytes == sizeof(float) ? CUDA_R_32F : CUDA_R_16BF);
    if (!*rc) *rc = choose(all, p);
    if (!*rc) return p;
    release(p);
    return NULL;
}

static void multiply(struct cuda *c, struct key key, const void *a, const void *b, float *out) {
    struct cuda_products *all = c->products;
    cublasStatus_t rc = CUBLAS_STATUS_SUCCESS;
    float one = 1.0f, beta = (float)key.add;
    struct product *p = product_for(c, key, &rc);
    if (p)
        rc = cublasLtMatmul(all->handle, p->how, &one, a, p->a, b, p->b, &beta, out, p->c, out, p->c, &p->algorithm,
                            all->workspace, WORKSPACE_BYTES, c->stream);
    if (rc && c->failure.code == ERR_NONE)
        err_set(&c->failure, ERR_UNSUPPORTED, "CUDA device %d: cuBLASLt's product of [%d,%d] and [%d,%d] failed: %s",
                c->device, key.m, key.k, key.k, key.n, cublasLtGetStatusString(rc));
}

/* ---- operands --------------------------------------------------------------------------------------------- */

__global__ void narrow_tensor(uint16_t *out, const float *x, size_t n) {
    size_t i = grid_index();
    if (i < n) out[i] = bf16_nearest(x[i]);
}

/* x as the products take it: itself, or rounded to bf16 in buffer `which`. NULL with the failure kept. */
static const void *operand(struct cuda *c, int which, const float *x, size_t n) {
    struct cuda_products *p = c->products;
    size_t bytes = n * sizeof(uint16_t);
    if (c->table.weight_bytes == sizeof(float)) return x;
    if (bytes > p->narrow_bytes[which]) {
        if (cuda_note(c, cudaFree(p->narrow[which]), "free an operand")) return NULL;
        p->narrow[which] = NULL;
        p->narrow_bytes[which] = 0;
        if (cuda_note(c, cudaMalloc(&p->narrow[which], bytes), "an operand")) return NULL;
        p->narrow_bytes[which] = bytes;
    }
    RUN(c, narrow_tensor, cuda_blocks(n, CUDA_THREADS), CUDA_THREADS, 0, (uint16_t *)p->narrow[which], x, n);
    return p->narrow[which];
}

/* ---- entries ---------------------------------------------------------------------------------------------- */

static void matmul_forward(const struct kernels *k, float *out, const float *x, const void *w, int rows, int C,
                           int OC) {
    struct cuda *c = cuda_of(k);
    struct key key = { OC, rows, C, 1, 0, 0 };
    const void *b = operand(c, 0, x, (size_t)rows * C);
    if (b) multiply(c, key, w, b, out);
}

static void matmul_backward_input(const struct kernels *k, float *dx, const float *dout, const void *w, int rows,
                                  int C, int OC, enum kernels_write write) {
    struct cuda *c = cuda_of(k);
    struct key key = { C, rows, OC, 0, 0, write == KERNELS_ADD };
    const void *b = operand(c, 0, dout, (size_t)rows * OC);
    if (b) multiply(c, key, w, b, dx);
}

static void matmul_backward_weight(const struct kernels *k, float *dw, const float *dout, const float *x, int rows,
                                   int C, int OC, enum kernels_write write) {
    struct cuda *c = cuda_of(k);
    struct key key = { C, OC, rows, 0, 1, write == KERNELS_ADD };
    const void *b = operand(c, 0, dout, (size_t)rows * OC), *a = operand(c, 1, x, (size_t)rows * C);
    if (a && b) multiply(c, key, a, b, dw);
}

void cuda_fill_products(struct kernels *k) {
    k->matmul_forward = matmul_forward;
    k->matmul_backward_input = matmul_backward_input;
    k->matmul_backward_weight = matmul_backward_weight;
}
