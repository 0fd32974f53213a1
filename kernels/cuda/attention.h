/* attention.h - private to kernels/cuda/: what the own attention kernels share, without tensor cores
 * (attention.cu) and on them (attention_mma.cu). */
#ifndef INTELLECT_KERNELS_CUDA_ATTENTION_H
#define INTELLECT_KERNELS_CUDA_ATTENTION_H

#include "kernels/cuda/cuda.h"

struct attention {
    int T, H, KV, D;
    float scale;
    const int32_t *start;
};

/* Rows of qkv are `row` elements apart; offsets of head h's query, key and value in one. */
__device__ inline size_t row_elements(const struct attention &a) { return (size_t)(a.H + 2 * a.KV) * a.D; }
__device__ inline int query_at(const struct attention &a, int h) { return h * a.D; }
__device__ inline int key_at(const struct attention &a, int kv) { return (a.H + kv) * a.D; }
__device__ inline int value_at(const struct attention &a, int kv) { return (a.H + a.KV + kv) * a.D; }

/* Where the document of token t begins; 0 after the last. */
__device__ inline int document_of(const struct attention &a, int b, int t) {
    return a.start && t < a.T ? a.start[(size_t)b * a.T + t] : 0;
}

/* Of N neighbouring lanes, a power of two, for all of them. */
template <int N> __device__ inline float lanes_sum(float x) {
    UNROLL
    for (int step = 1; step < N; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

template <int N> __device__ inline float lanes_max(float x) {
    UNROLL
    for (int step = 1; step < N; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

/* Over 48 KB a kernel must be allowed its shared memory. */
template <class K> static inline int allow_shared(struct cuda *c, K *kernel, size_t bytes) {
    return cuda_note(c, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes),
                     "shared memory for attention");
}

/* attention_mma.cu: of bf16, on tensor cores. 1: done, or failed; 0: heads of another size, or tensors that
 * are not aligned to 16 bytes. delta: [B,H,T], the sums of dout * out. */
int cuda_attention_mma_forward(struct cuda *c, uint16_t *out, float *lse, const uint16_t *qkv,
                               const struct attention *a, int B);
int cuda_attention_mma_backward(struct cuda *c, uint16_t *dqkv, const uint16_t *dout, const uint16_t *qkv,
                                const float *lse, const float *delta, const struct attention *a, int B);

#endif
