/* products.cpp - in the emulator's place of cuBLASLt; see cublaslt.h. */
#include "tests/cuda/cublaslt.h"

extern "C" {
#include "kernels/bf16.h"
}

struct emulator_matmul {
    int transposed[2];
};
struct emulator_layout {
    cudaDataType_t type;
    uint64_t rows, columns;
    int64_t ld;
};
struct emulator_preference {
    uint32_t alignment;
};

struct emulator_products emulator_products = { 0, 0, -1, 0, 130100 };

size_t cublasLtGetVersion(void) { return emulator_products.version; }
cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) { return *handle = NULL, CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return (void)handle, CUBLAS_STATUS_SUCCESS; }
const char *cublasLtGetStatusString(cublasStatus_t status) {
    return status ? "the emulator refuses" : "success";
}

/* ---- descriptions -------------------------------------------------------------------------------------- */

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *how, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
    *how = new emulator_matmul();
    return compute == CUBLAS_COMPUTE_32F && scale == CUDA_R_32F ? CUBLAS_STATUS_SUCCESS
                                                                : CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t how, cublasLtMatmulDescAttributes_t what,
                                              const void *value, size_t bytes) {
    if (bytes != sizeof(cublasOperation_t)) return CUBLAS_STATUS_INVALID_VALUE;
    how->transposed[what == CUBLASLT_MATMUL_DESC_TRANSB] = *(const cublasOperation_t *)value == CUBLAS_OP_T;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t how) {
    return delete how, CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType_t type, uint64_t rows,
                                          uint64_t columns, int64_t ld) {
    *layout = new emulator_layout{ type, rows, columns, ld };
    return ld >= (int64_t)rows ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    return delete layout, CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *wish) {
    *wish = new emulator_preference{ 256 };
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t wish,
                                                    cublasLtMatmulPreferenceAttributes_t what,
                                                    const void *value, size_t bytes) {
    if (bytes != (what == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES ? sizeof(size_t) : sizeof(uint32_t)))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (what >= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES) wish->alignment = *(const uint32_t *)value;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t wish) {
    return delete wish, CUBLAS_STATUS_SUCCESS;
}

/* ---- algorithms: which, of which shape, for operands aligned how --------------------------------------- */

static uint64_t shape_of(cublasLtMatmulDesc_t how, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t d) {
    uint64_t k = how->transposed[0] ? a->rows : a->columns;
    return (d->rows << 40) ^ (d->columns << 20) ^ k ^ (uint64_t)how->transposed[0] << 62 ^
           (uint64_t)how->transposed[1] << 63;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t how,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t wish, int most,
                                              cublasLtMatmulHeuristicResult_t *found, int *count) {
    (void)handle, (void)b, (void)c;
    emulator_products.heuristics++;
    *count = most < EMULATOR_ALGORITHMS ? most : EMULATOR_ALGORITHMS;
    for (int i = 0; i < *count; i++) {
        found[i] = {};
        found[i].algo.data[0] = (uint64_t)i;
        found[i].algo.data[1] = shape_of(how, a, d);
        found[i].algo.data[7] = wish->alignment;
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t handle, cublasLtMatmulDesc_t how,
                                       cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                       cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                       const cublasLtMatmulAlgo_t *algorithm,
                                       cublasLtMatmulHeuristicResult_t *result) {
    (void)handle, (void)b, (void)c;
    *result = {};
    return algorithm->data[0] < EMULATOR_ALGORITHMS - 1 && algorithm->data[1] == shape_of(how, a, d)
               ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

/* ---- the product --------------------------------------------------------------------------------------- */

static float at(const void *x, cublasLtMatrixLayout_t l, uint64_t row, uint64_t column) {
    size_t i = row + column * (size_t)l->ld;
    return l->type == CUDA_R_32F ? ((const float *)x)[i] : bf16_widen(((const uint16_t *)x)[i]);
}

/* op(x) as [outer][k], so that what is multiplied lies side by side. */
static float *rows_of(const void *x, cublasLtMatrixLayout_t l, int k_is_row, uint64_t outer, uint64_t k) {
    float *out = new float[outer * k + 1];
    for (uint64_t o = 0; o < outer; o++)
        for (uint64_t i = 0; i < k; i++) out[o * k + i] = k_is_row ? at(x, l, i, o) : at(x, l, o, i);
    return out;
}

static void multiply(cublasLtMatmulDesc_t how, const void *a, cublasLtMatrixLayout_t a_layout, const void *b,
                     cublasLtMatrixLayout_t b_layout, float beta, void *d, cublasLtMatrixLayout_t d_layout) {
    uint64_t m = d_layout->rows, n = d_layout->columns,
             k = how->transposed[0] ? a_layout->rows : a_layout->columns;
    float *left = rows_of(a, a_layout, how->transposed[0], m, k),
          *right = rows_of(b, b_layout, !how->transposed[1], n, k);
    for (uint64_t j = 0; j < n; j++)
        for (uint64_t i = 0; i < m; i++) {
            double sum = beta != 0.0f ? (double)beta * at(d, d_layout, i, j) : 0.0;
            for (uint64_t x = 0; x < k; x++) sum += (double)left[i * k + x] * right[j * k + x];
            size_t to = i + j * (size_t)d_layout->ld;
            if (d_layout->type == CUDA_R_32F) ((float *)d)[to] = (float)sum;
            else ((uint16_t *)d)[to] = bf16_nearest((float)sum);
        }
    delete[] left;
    delete[] right;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t how, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t a_layout, const void *b,
                              cublasLtMatrixLayout_t b_layout, const void *beta, const void *c,
                              cublasLtMatrixLayout_t c_layout, void *d, cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t *algorithm, void *workspace, size_t workspace_bytes,
                              cudaStream_t stream) {
    (void)handle;
    uint64_t id = algorithm->data[0], alignment = algorithm->data[7];
    if (!workspace || !workspace_bytes || *(const float *)alpha != 1.0f || c != d || c_layout != d_layout ||
        id >= EMULATOR_ALGORITHMS - 1 || algorithm->data[1] != shape_of(how, a_layout, d_layout))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (((uintptr_t)a | (uintptr_t)b | (uintptr_t)d) % alignment) {
        emulator_products.misaligned++;
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    emulator_matmul by = *how;
    emulator_layout of_a = *a_layout, of_b = *b_layout, of_d = *d_layout;
    float factor = *(const float *)beta;
    emulator_products.last = (int)id;
    emulator_ask(stream, [=]() mutable {
        multiply(&by, a, &of_a, b, &of_b, factor, d, &of_d);
        emulator_passes((int)id == emulator_products.fastest ? 1.0 : 2.0 + (double)id);
    });
    return CUBLAS_STATUS_SUCCESS;
}
