/* cuda.h - private to kernels/cuda/: the CUDA backend's state and what its files share. The plugin
 * exports one function, intellect_cuda_create(); kernels/plugin.c loads it.
 *
 * What is computed runs on one stream, in order; what ranks say to each other meanwhile on another (struct
 * kernels_aside). No kernel adds to floating point with atomics, and every
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
#define ONE_BY_ONE _Pragma("unroll 1")
#define CHECK_ALIGNED(p, bytes) ((void)0) /* by the device itself, which stops at what is not */
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

/* Of what went beside, so many are told apart; what is older is finished with the next. */
#define CUDA_ENDED 8

struct cuda_products; /* of matmul.cu */
struct nccl;          /* of nccl.c */

struct cuda {
    struct kernels table; /* first, so that a table is its backend */
    int device;
    cudaStream_t stream; /* what is asked for goes there: one of these */
    cudaStream_t computing, beside;
    cudaEvent_t begun, ended[CUDA_ENDED];
    uint32_t ends;
    struct err failure; /* the first since the last check(); ERR_NONE if none */
    void *scratch;
    size_t scratch_bytes;
    void *staging[2]; /* pinned host memory, CUDA_STAGING_BYTES each; taken at the first large copy */
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

/* Until the stream is done; until both are. */
void cuda_wait(struct cuda *c, const char *what);
void cuda_wait_for_all(struct cuda *c, const char *what);
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

/* ---- 16 bytes at once ------------------------------------------------------------------------------ */

/* Elements of a type in 16 bytes, the widest access. What is made of several types goes by the narrowest. */
#define GROUP(E) ((int)(16 / sizeof(E)))

/* N elements that lie side by side, in accesses of 16 bytes or, where all are less, in one. x is aligned to
 * it. */
template <class E, int N> struct piece_of {
    static const int each = N * sizeof(E) < 16 ? N : 16 / sizeof(E);
    struct alignas(each * sizeof(E)) type {
        E at[each];
    };
};

template <class E, int N> __device__ inline void take(E (&to)[N], const E *x) {
    typedef typename piece_of<E, N>::type piece;
    CHECK_ALIGNED(x, sizeof(piece));
    UNROLL
    for (int i = 0; i < N; i += piece_of<E, N>::each) {
        piece p = *(const piece *)(x + i);
        UNROLL
        for (int j = 0; j < piece_of<E, N>::each; j++) to[i + j] = p.at[j];
    }
}

template <class E, int N> __device__ inline void give(E *to, const E (&x)[N]) {
    typedef typename piece_of<E, N>::type piece;
    CHECK_ALIGNED(to, sizeof(piece));
    UNROLL
    for (int i = 0; i < N; i += piece_of<E, N>::each) {
        piece p;
        UNROLL
        for (int j = 0; j < piece_of<E, N>::each; j++) p.at[j] = x[i + j];
        *(piece *)(to + i) = p;
    }
}

/* As fp32, and rounded. */
template <class E, int N> __device__ inline void take_wide(float (&to)[N], const E *x) {
    E narrow[N];
    take(narrow, x);
    UNROLL
    for (int i = 0; i < N; i++) to[i] = wide(narrow[i]);
}

template <class E, int N> __device__ inline void put_all(E *to, const float (&x)[N]) {
    E narrow[N];
    UNROLL
    for (int i = 0; i < N; i++) put(&narrow[i], x[i]);
    give(to, narrow);
}

/* May these be read 16 bytes at once? NULL may. */
template <class... P> __device__ inline bool aligned(P... p) { return ((... | (uintptr_t)p) & 15) == 0; }

/* How many elements one call is for. */
template <int N> struct group {
    static const int n = N;
};

/* The caller's N of n elements: f(first of them, group<N>()) where all are there and `together`, which says
 * that the tensors are aligned for it; else f(i, group<1>()) for each. The order of a thread's elements is
 * the same. */
template <int N, class F> __device__ inline void by_groups_at(size_t i, size_t n, bool together, const F &f) {
    size_t end = i + N < n ? i + N : n;
    if (together && i + N <= n) f(i, group<N>());
    else
        for (; i < end; i++) f(i, group<1>());
}

template <int N, class F> __device__ inline void by_groups(size_t n, bool together, const F &f) {
    by_groups_at<N>(grid_index() * N, n, together, f);
}

/* The same for a row of n that a block of CUDA_THREADS shares. */
template <int N, class F> __device__ inline void row_by_groups(int n, bool together, const F &f) {
    for (int i = (int)threadIdx.x * N; i < n; i += CUDA_THREADS * N)
        by_groups_at<N>((size_t)i, (size_t)n, together, f);
}

/* Blocks of CUDA_THREADS for n elements by groups of N. */
static inline unsigned cuda_group_blocks(size_t n, int N) {
    return cuda_blocks(n, (size_t)CUDA_THREADS * (size_t)N);
}

/* A warp has a block of CUDA_CODED elements, which share a scale: a lane two groups of four, half a block
 * apart. */
#define CUDA_CODED 256
static inline unsigned cuda_coded_blocks(size_t n) {
    return cuda_blocks(n, CUDA_CODED * (CUDA_THREADS / CUDA_WARP));
}

/* Which of its block lane `lane` has, as group `half`. */
__device__ inline int coded_at(int half) {
    return half * (CUDA_CODED / 2) + (int)threadIdx.x % CUDA_WARP * 4;
}

/* Those of the block from x on, of which there are `length`; zeroes after it. */
__device__ inline void take_coded(float (&to)[2][4], const float *x, size_t length) {
    bool together = aligned(x);
    for (int half = 0; half < 2; half++) {
        to[half][0] = to[half][1] = to[half][2] = to[half][3] = 0.0f;
        size_t at = (size_t)coded_at(half);
        if (together && at + 4 <= length) take(to[half], x + at);
        else
            for (size_t j = 0; j < 4 && at + j < length; j++) to[half][j] = x[at + j];
    }
}

/* Their codes; `to` is aligned to 4. */
__device__ inline void give_coded(uint8_t *to, const uint8_t (&code)[2][4], size_t length) {
    for (int half = 0; half < 2; half++) {
        size_t at = (size_t)coded_at(half);
        if (at + 4 <= length) give(to + at, code[half]);
        else
            for (size_t j = 0; j < 4 && at + j < length; j++) to[at + j] = code[half][j];
    }
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
