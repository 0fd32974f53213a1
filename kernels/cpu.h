/* cpu.h - private to kernels/cpu*.c: the CPU backend's state and what its files share. */
#ifndef INTELLECT_KERNELS_CPU_H
#define INTELLECT_KERNELS_CPU_H

#include "kernels/kernels.h"
#include "kernels/wide.h"

#include <math.h>
#include <string.h>

/* Whether work is worth a parallel region. With OMP_WAIT_POLICY=passive waking a thread takes some
 * 40 microseconds, in which one core adds 400,000 numbers, or takes the exponential of 50,000. */
#define CPU_WORTH_IT(elements) ((size_t)(elements) >= 400000)
#define CPU_WORTH_IT_EXP(elements) ((size_t)(elements) >= 50000)
#define CPU_SLICE 8192 /* elements one thread takes at a time in elementwise kernels */

/* Of cpu_products.c: a matrix product that oneDNN has prepared for one shape and layout. A zeroed one is
 * none, for no product has m = 0. */
struct cpu_product_key {
    int m, n, k, transposed_a, transposed_b, add, bf16, bf16_out;
};
struct cpu_product {
    struct cpu_product_key key;
    struct dnnl_primitive *primitive;
    struct dnnl_memory *memory[3]; /* A, B, C; they borrow their bytes */
    struct dnnl_primitive *pack;   /* NULL: B is taken as it lies; else from `plain` into memory[1] ... */
    struct dnnl_memory *plain;
    size_t packed_bytes;           /* ... which is so large */
};
#define CPU_PRODUCTS_MAX 64
enum cpu_buffer { CPU_WIDE_A, CPU_WIDE_B, CPU_WIDE_C, CPU_PACKED, CPU_NORM_PARTS, CPU_BUFFERS };

/* Sums of the gradient of a norm's weights: so many parts of the rows, each [width]. */
#define CPU_PARTS 64
#define CPU_PARTS_BYTES(width) ((size_t)CPU_PARTS * (size_t)(width) * sizeof(float))

struct cpu {
    struct kernels table; /* first, so that a table is its backend */
    int threads;
    float *scratch; /* threads x scratch_floats; attention's blocks of scores */
    size_t scratch_floats;
    struct err failure; /* the first since the last check(); ERR_NONE if none */
    char description[160];
    struct dnnl_engine *engine;
    struct dnnl_stream *stream;
    struct cpu_product product[CPU_PRODUCTS_MAX];
    unsigned product_next;         /* which one to replace when all are taken */
    void *buffer[CPU_BUFFERS];     /* operands on their way; they grow */
    size_t buffer_bytes[CPU_BUFFERS];
    int native_bf16;               /* with bf16: the processor multiplies it itself ... */
    int amx;                       /* ... in tiles, which oneDNN knows how to use */
    int plain;                     /* for tests: as where there is no AVX-512 */
};

static inline struct cpu *cpu_of(const struct kernels *k) {
    return (struct cpu *)k;
}

/* Make sure every thread has `floats` of scratch. Returns the first thread's, the others' follow,
 * or NULL with the failure kept for check(). */
float *cpu_scratch(struct cpu *cpu, size_t floats);

/* Buffer `which` of at least `bytes`, or NULL with the failure kept for check(). */
void *cpu_buffer(struct cpu *cpu, enum cpu_buffer which, size_t bytes);

/* C[m,n] = or += op(A) * op(B), dense: A is [m,k], or [k,m] where transposed, B likewise. bf16 needs
 * native_bf16. */
int cpu_products_init(struct cpu *cpu, struct err *err);
void cpu_products_release(struct cpu *cpu);
void cpu_multiply(struct cpu *cpu, struct cpu_product_key key, const void *A, const void *B, void *C);
/* Is it by cpu_products_bf16.c? */
int cpu_is_own(const struct cpu *cpu, struct cpu_product_key key);
/* What that takes, about: of buffers, and of each thread's scratch. */
void cpu_product_bytes(const struct cpu *cpu, struct cpu_product_key key, size_t *shared, size_t *own);

/* C[m,n] = alpha * op(A) * op(B) + beta * C, row-major, op is 'N' or 'T'; lda, ldb, ldc: row
 * strides. Inside a parallel region it runs on the calling thread alone. */
void cpu_gemm(struct cpu *cpu, char op_a, char op_b, int m, int n, int k, float alpha,
              const float *A, size_t lda, const float *B, size_t ldb, float beta, float *C,
              size_t ldc);

/* Fill native_bf16 and the description of a backend with bf16 weights. */
void cpu_describe_bf16(struct cpu *cpu, int stochastic);

/* oneDNN takes as many threads as OpenMP would; make that the backend's number and return what it
 * was, to be put back by another call. */
int cpu_use_threads(int threads);

/* e^x within 2 units in the last place for x in [-87.3, 88], clamped outside; NaN stays NaN.
 * Written to be vectorised: Cephes expf's reduction and polynomial, no table, no branch. */
__attribute__((always_inline)) static inline float cpu_exp(float x) {
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it leaves the nearest integer */
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + round, n = shifted - round;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits, exponent;
    memcpy(&bits, &p, sizeof bits);
    memcpy(&exponent, &shifted, sizeof exponent);
    bits += exponent << 23; /* the low bits of `shifted` are n in two's complement */
    memcpy(&p, &bits, sizeof p);
    return p;
}

/* Largest of n values. In lanes by hand: compilers may not reorder a float maximum on their own. */
__attribute__((always_inline)) static inline float cpu_max(const float *x, int n) {
    float lane[16], max;
    int whole = n / 16 * 16;
    for (int j = 0; j < 16; j++) lane[j] = -INFINITY;
    for (int i = 0; i < whole; i += 16)
#pragma omp simd
        for (int j = 0; j < 16; j++) lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
    for (int i = whole; i < n; i++) lane[i % 16] = x[i] > lane[i % 16] ? x[i] : lane[i % 16];
    max = lane[0];
    for (int j = 1; j < 16; j++) max = lane[j] > max ? lane[j] : max;
    return max;
}

/* AdamW on up to CPU_SLICE elements, one thread. */
void cpu_adamw_slice(float *param, const float *grad, float *m, float *v, size_t n,
                     const struct kernels_adamw *a);

void cpu_descend_slice(float *param, const float *direction, size_t n, const struct kernels_descent *d);

/* Entries of the table that live in other files than cpu.c. */
void cpu_attention_forward(const struct kernels *k, void *out, float *lse, const void *qkv,
                           const int32_t *start, int B, int T, int H, int KV, int D);
void cpu_attention_backward(const struct kernels *k, void *dqkv, const void *dout, const void *qkv,
                            const void *out, const float *lse, const int32_t *start, int B, int T, int H,
                            int KV, int D);
void cpu_vocabulary_part(const struct kernels *k, struct kernels_part *part, const float *logits,
                         const int32_t *targets, int rows, int V);
void cpu_vocabulary_loss(const struct kernels *k, float *loss, float *penalty, void *dlogits, float *logits,
                         const int32_t *targets, const struct kernels_part *part, int own, int parts,
                         const struct kernels_loss *how, int rows, int V);
/* The same with AVX-512, and in bf16 with AVX512-BF16; _can: this processor, for heads of this size. */
#define CPU_ATTENTION_D_MAX 1024
#if defined(__x86_64__) && defined(__GNUC__)
int cpu_attention_512_can(int D);
size_t cpu_attention_512_scratch(int T, int H, int KV, int D); /* of a thread */
void cpu_attention_512_forward(const struct kernels *k, void *out, float *lse, const void *qkv,
                               const int32_t *start, int B, int T, int H, int KV, int D);
void cpu_attention_512_backward(const struct kernels *k, void *dqkv, const void *dout, const void *qkv,
                                const void *out, const float *lse, const int32_t *start, int B, int T, int H,
                                int KV, int D);
int cpu_attention_bf16_can(int D);
size_t cpu_attention_bf16_scratch(int T, int H, int KV, int D);
void cpu_attention_bf16_forward(const struct kernels *k, void *out, float *lse, const void *qkv,
                                const int32_t *start, int B, int T, int H, int KV, int D);
void cpu_attention_bf16_backward(const struct kernels *k, void *dqkv, const void *dout, const void *qkv,
                                 const void *out, const float *lse, const int32_t *start, int B, int T,
                                 int H, int KV, int D);
/* Products in bf16: this one, if the processor multiplies no tiles? */
int cpu_products_bf16_can(struct cpu_product_key key);
void cpu_products_bf16_bytes(struct cpu_product_key key, int threads, size_t *shared, size_t *own);
void cpu_products_bf16_multiply(struct cpu *cpu, struct cpu_product_key key, const void *A, const void *B,
                                void *C);
/* Rows of SwiGLU, as attention. */
int cpu_swiglu_512_can(void);
void cpu_swiglu_512_row(void *out, const void *gate, const void *up, int F);
void cpu_swiglu_512_backward_row(void *dgate, void *dup, const void *dout, const void *gate, const void *up,
                                 int F);
int cpu_swiglu_bf16_can(void);
void cpu_swiglu_bf16_row(void *out, const void *gate, const void *up, int F);
void cpu_swiglu_bf16_backward_row(void *dgate, void *dup, const void *dout, const void *gate, const void *up,
                                  int F);
#else
#define cpu_attention_512_can(D) 0
#define cpu_attention_512_scratch(...) 0
#define cpu_attention_512_forward(...) ((void)0)
#define cpu_attention_512_backward(...) ((void)0)
#define cpu_attention_bf16_can(D) 0
#define cpu_attention_bf16_scratch(...) 0
#define cpu_attention_bf16_forward(...) ((void)0)
#define cpu_attention_bf16_backward(...) ((void)0)
#define cpu_products_bf16_can(key) 0
#define cpu_products_bf16_bytes(...) ((void)0)
#define cpu_products_bf16_multiply(...) ((void)0)
#define cpu_swiglu_512_can() 0
#define cpu_swiglu_512_row(...) ((void)0)
#define cpu_swiglu_512_backward_row(...) ((void)0)
#define cpu_swiglu_bf16_can() 0
#define cpu_swiglu_bf16_row(...) ((void)0)
#define cpu_swiglu_bf16_backward_row(...) ((void)0)
#endif
void cpu_states_entries(struct kernels *k);
void cpu_rows_entries(struct kernels *k);
void cpu_rows_bf16_entries(struct kernels *k);

#endif
