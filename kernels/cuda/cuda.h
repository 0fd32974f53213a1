/* cuda.h - private to kernels/cuda/: the CUDA backend's state and what its files share. The plugin
 * exports one function, intellect_cuda_create(); kernels/plugin.c loads it.
 *
 * Everything runs on one stream, in order. No kernel adds to floating point with atomics, and every
 * reduction has an order that depends on shapes alone, so the same call gives the same bits.
 *
 * These files are CUDA C. They compile with a plain C++ compiler as well, with tests/cuda/emulator.h
 * in place of the CUDA runtime: so the kernels are tested on machines without a GPU. */
#ifndef INTELLECT_KERNELS_CUDA_H
#define INTELLECT_KERNELS_CUDA_H

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
/* The launch's dynamic shared memory, as `name`. */
#define SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
/* Before a loop whose array must stay in registers. */
#define UNROLL _Pragma("unroll")
#else
#include "tests/cuda/emulator.h"
#endif

extern "C" {
#include "kernels/bf16.h"
#include "kernels/kernels.h"
}
#include "kernels/cuda/sdpa.h"

#define CUDA_WARP 32
#define CUDA_THREADS 256 /* of a block, where nothing speaks for another number */

/* What takes scratch, but for attention's delta of each row and head. */
#define CUDA_WORKSPACE_BYTES ((size_t)32 << 20) /* cuBLASLt's */
#define CUDA_SLICE ((size_t)1 << 20)            /* weights that are under way from or to fp32 at a time */
#define CUDA_NORM_SLICES 128                    /* partial sums of a norm's gradient, at most */

#define CUDA_STAGING_BYTES ((size_t)4 << 20)
#define CUDA_STAGED_LEAST ((size_t)256 << 10)

struct cuda_products; /* of matmul.cu */
struct nccl;          /* of nccl.c */

struct cuda {
    struct kernels table; /* first, so that a table is its backend */
    int device;
    cudaStream_t stream;
    struct err failure; /* the first since the last check(); ERR_NONE if none */
    void *scratch;
    size_t scratch_bytes;
    void *staging[2];    /* host memory of the device's own, CUDA_STAGING_BYTES each; taken at the first large copy */
    cudaEvent_t staged[2]; /* the last copy from or to it is done */
    struct cuda_products *products;
    struct nccl *group[KERNELS_GROUPS_MAX];
    int (*lost)(void *arg); /* asked while there are groups */
    void *lost_arg;
    uint64_t place; /* of the device among the machine's */
    struct sdpa *sdpa; /* NULL: attention.cu's own kernels for all */
    char ignored[160]; /* why what was kept of products is ignored, or "" */
    char description[400];
};

static inline struct cuda *cuda_of(const struct kernels *k) {
    return (struct cuda *)(uintptr_t)k;
}

/* Keep `result` for check() where it is the first failure; `what` was being done. 0, or -1 if it is one. */
int cuda_note(struct cuda *c, cudaError_t result, const char *what);

/* Until the stream is done. */
void cuda_wait(struct cuda *c, const char *what);
/* Until what was before the event is. */
void cuda_wait_for(struct cuda *c, cudaEvent_t event, const char *what);

/* Device memory of at least `bytes`, until the next call; not zeroed. NULL with the failure kept. Work on
 * the stream that still uses it is before what comes. */
void *cuda_scratch(struct cuda *c, size_t bytes);

/* Launch on the backend's stream. */
#define RUN(c, kernel, grid, block, shared, ...)                                 \
    do {                                                                         \
        LAUNCH(kernel, grid, block, shared, (c)->stream, __VA_ARGS__);           \
        cuda_note(c, cudaGetLastError(), #kernel);                               \
    } while (0)

static inline unsigned cuda_blocks(size_t n, size_t each) {
    return (unsigned)((n + each - 1) / each);
}

/* ---- what kernels share ----------------------------------------------------------------------- */

/* Weights and activations are fp32, or bf16 as its bits; arithmetic is fp32, rounded once. */
__device__ inline float wide(float x) { return x; }
__device__ inline float wide(uint16_t x) { return bf16_widen(x); }
__device__ inline void put(float *to, float x) { *to = x; }
__device__ inline void put(uint16_t *to, float x) { *to = bf16_nearest(x); }

/* Run a statement with E as the type of backend k's weights and activations. */
#define WITH_TYPE(k, ...)                         \
    do {                                          \
        if ((k)->act_bytes == sizeof(float)) {    \
            typedef float E;                      \
            __VA_ARGS__;                          \
        } else {                                  \
            typedef uint16_t E;                   \
            __VA_ARGS__;                          \
        }                                         \
    } while (0)

template <class T> __device__ inline T warp_sum(T x) {
    for (int step = CUDA_WARP / 2; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

/* Of the whole block, for all of it; parts: shared memory, one element a warp. */
template <class T> __device__ inline T block_sum(T x, T *parts) {
    int warps = (int)(blockDim.x / CUDA_WARP);
    x = warp_sum(x);
    __syncthreads(); /* parts may be what the sum before is read from */
    if (threadIdx.x % CUDA_WARP == 0) parts[threadIdx.x / CUDA_WARP] = x;
    __syncthreads();
    x = parts[0];
    for (int i = 1; i < warps; i++) x += parts[i];
    return x;
}

/* Where the caller's thread is in a grid over n elements. */
__device__ inline size_t grid_index(void) {
    return (size_t)blockIdx.x * blockDim.x + threadIdx.x;
}

/* ---- entries of the table, by file ------------------------------------------------------------- */

void cuda_fill_rows(struct kernels *k);      /* rows.cu: embedding, RMSNorm, RoPE, SwiGLU, cross-entropy */
void cuda_fill_attention(struct kernels *k); /* attention.cu */
void cuda_fill_update(struct kernels *k);    /* update.cu: AdamW, sums, weights in and out */
void cuda_fill_states(struct kernels *k);    /* states.cu: moments in fewer bits, steps along a direction */
void cuda_fill_outer(struct kernels *k);     /* outer.cu */
void cuda_fill_products(struct kernels *k);  /* matmul.cu */
void cuda_fill_ranks(struct kernels *k);     /* ranks.cu: what several ranks say to each other */
/* matmul.cu. 0, or -1 with the reason. */
int cuda_products_create(struct cuda *c, const char *device_name, struct err *err);
void cuda_products_destroy(struct cuda *c);

#endif
