/* products.cpp - in the emulator's place of cuBLASLt: the products of matmul.cu, one sum after the other. */
#include "kernels/cuda/cuda.h"

int cuda_products_create(struct cuda *c, struct err *err) {
    (void)c, (void)err;
    return 0;
}

void cuda_products_destroy(struct cuda *c) { (void)c; }

template <class E, class O> static void forward(O *out, const E *x, const E *w, int rows, int C, int OC) {
    for (size_t r = 0; r < (size_t)rows; r++)
        for (size_t o = 0; o < (size_t)OC; o++) {
            double sum = 0;
            for (size_t c = 0; c < (size_t)C; c++) sum += (double)wide(x[r * C + c]) * wide(w[o * C + c]);
            put(&out[r * OC + o], (float)sum);
        }
}

static void matmul_forward(const struct kernels *k, void *out, const void *x, const void *w, int rows, int C,
                           int OC) {
    WITH_TYPE(k, forward((E *)out, (const E *)x, (const E *)w, rows, C, OC));
}

static void matmul_logits(const struct kernels *k, float *out, const void *x, const void *w, int rows, int C, int OC) {
    WITH_TYPE(k, forward(out, (const E *)x, (const E *)w, rows, C, OC));
}

template <class E> static void backward_input(E *dx, const E *dout, const E *w, int rows, int C, int OC) {
    for (size_t r = 0; r < (size_t)rows; r++)
        for (size_t c = 0; c < (size_t)C; c++) {
            double sum = 0;
            for (size_t o = 0; o < (size_t)OC; o++) sum += (double)wide(dout[r * OC + o]) * wide(w[o * C + c]);
            put(&dx[r * C + c], (float)sum);
        }
}

static void matmul_backward_input(const struct kernels *k, void *dx, const void *dout, const void *w, int rows, int C,
                                  int OC) {
    WITH_TYPE(k, backward_input((E *)dx, (const E *)dout, (const E *)w, rows, C, OC));
}

template <class E>
static void backward_weight(float *dw, const E *dout, const E *x, int rows, int C, int OC, enum kernels_write write) {
    for (size_t o = 0; o < (size_t)OC; o++)
        for (size_t c = 0; c < (size_t)C; c++) {
            double sum = 0;
            for (size_t r = 0; r < (size_t)rows; r++) sum += (double)wide(dout[r * OC + o]) * wide(x[r * C + c]);
            dw[o * C + c] = (float)(write == KERNELS_ADD ? dw[o * C + c] + sum : sum);
        }
}

static void matmul_backward_weight(const struct kernels *k, float *dw, const void *dout, const void *x, int rows,
                                   int C, int OC, enum kernels_write write) {
    WITH_TYPE(k, backward_weight(dw, (const E *)dout, (const E *)x, rows, C, OC, write));
}

void cuda_fill_products(struct kernels *k) {
    k->matmul_forward = matmul_forward;
    k->matmul_logits = matmul_logits;
    k->matmul_backward_input = matmul_backward_input;
    k->matmul_backward_weight = matmul_backward_weight;
}
