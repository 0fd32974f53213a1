/* products.cpp - in the emulator's place of cuBLASLt: the products of matmul.cu, one sum after the other. */
#include "kernels/cuda/cuda.h"

int cuda_products_create(struct cuda *c, struct err *err) {
    (void)c, (void)err;
    return 0;
}

void cuda_products_destroy(struct cuda *c) { (void)c; }

static float operand(const struct kernels *k, float x) {
    return k->weight_bytes == sizeof(float) ? x : bf16_widen(bf16_nearest(x));
}

static float weight(const struct kernels *k, const void *w, size_t i) {
    return k->weight_bytes == sizeof(float) ? ((const float *)w)[i] : bf16_widen(((const uint16_t *)w)[i]);
}

static void store(float *out, double value, enum kernels_write write) {
    *out = (float)(write == KERNELS_ADD ? *out + value : value);
}

static void matmul_forward(const struct kernels *k, float *out, const float *x, const void *w, int rows, int C,
                           int OC) {
    for (size_t r = 0; r < (size_t)rows; r++)
        for (size_t o = 0; o < (size_t)OC; o++) {
            double sum = 0;
            for (size_t c = 0; c < (size_t)C; c++) sum += (double)operand(k, x[r * C + c]) * weight(k, w, o * C + c);
            out[r * OC + o] = (float)sum;
        }
}

static void matmul_backward_input(const struct kernels *k, float *dx, const float *dout, const void *w, int rows,
                                  int C, int OC, enum kernels_write write) {
    for (size_t r = 0; r < (size_t)rows; r++)
        for (size_t c = 0; c < (size_t)C; c++) {
            double sum = 0;
            for (size_t o = 0; o < (size_t)OC; o++)
                sum += (double)operand(k, dout[r * OC + o]) * weight(k, w, o * C + c);
            store(&dx[r * C + c], sum, write);
        }
}

static void matmul_backward_weight(const struct kernels *k, float *dw, const float *dout, const float *x, int rows,
                                   int C, int OC, enum kernels_write write) {
    for (size_t o = 0; o < (size_t)OC; o++)
        for (size_t c = 0; c < (size_t)C; c++) {
            double sum = 0;
            for (size_t r = 0; r < (size_t)rows; r++)
                sum += (double)operand(k, dout[r * OC + o]) * operand(k, x[r * C + c]);
            store(&dw[o * C + c], sum, write);
        }
}

void cuda_fill_products(struct kernels *k) {
    k->matmul_forward = matmul_forward;
    k->matmul_backward_input = matmul_backward_input;
    k->matmul_backward_weight = matmul_backward_weight;
}
