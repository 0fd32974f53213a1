/* emulator.h - enough of CUDA to run the kernels of kernels/cuda/ on a CPU, one thread at a time: launches,
 * block and warp synchronisation, shuffles, shared memory, and the few calls of the runtime that the backend
 * makes. What it finds: wrong indices, tiles and reductions; with a sanitizer, accesses out of bounds; a
 * barrier that not all threads reach; with EMULATOR_LATE=1 a stream that nobody waited for; with EMULATOR_ORDER
 * one that did not wait for another. A block's warps run far ahead of each other, in one launch the first, in
 * the next the last, which shows most barriers that are missing. What it cannot find: other races between barriers (the
 * threads of a warp run in turn), and anything about speed. Device memory is host memory. */
#ifndef INTELLECT_TESTS_CUDA_EMULATOR_H
#define INTELLECT_TESTS_CUDA_EMULATOR_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>

#define __global__ static
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define UNROLL
#define ONE_BY_ONE
#define CHECK_ALIGNED(p, bytes) emulator_aligned(p, bytes)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

/* Run `kernel` in every thread of the grid, block after block. Blocks are one-dimensional. Aborts where the
 * threads of a block or warp do not come to the same barrier. */
void emulator_launch(dim3 grid, dim3 block, size_t shared_bytes, struct emulator_stream *stream,
                     const std::function<void(void)> &kernel);
/* Do it when the stream comes to it: at once; with EMULATOR_LATE=1 when somebody waits for the stream, or for an
 * event that was recorded after it; with EMULATOR_ORDER=SEED at any time until then, as the seed has it, whatever
 * other streams have done.
 *
 * EMULATOR_LOSES=N, for tests of tests: stream N (they are counted from 0) does not wait for other streams'
 * events; EMULATOR_LOSES_ONE=M: but for one of them, its M-th from 0 on, it does. */
void emulator_ask(struct emulator_stream *stream, const std::function<void(void)> &work);
unsigned char *emulator_shared(void);
void emulator_sync_block(void);
void emulator_sync_warp(void);
/* Lane `from`'s bytes; all lanes of the warp call. */
void emulator_exchange(void *mine, size_t bytes, unsigned from);
int emulator_any(int flag);
/* A warp's product and its loads of fragments, kernels/cuda/mma.h. mine: 4 registers of A, 2 of B. */
void emulator_mma(float c[4], const uint32_t mine[6]);
void emulator_ldmatrix(uint32_t to[4], const uint16_t *row, bool transposed);
/* To shared memory, zeroes where `from` is NULL: with EMULATOR_COPIES=late when the thread waits, so that who does not
 * sees what was there before; else at once, so that who still reads that sees what comes. */
void emulator_copy(void *to, const void *from, size_t bytes);
void emulator_copies_wait(void);
/* Aborts where it is not. */
void emulator_aligned(const void *p, size_t bytes);

/* A call with arguments as they are now. */
template <class T> struct as_it_is {
    typedef T type;
};
template <class... P>
std::function<void(void)> emulator_call(void (*kernel)(P...), typename as_it_is<P>::type... arguments) {
    return [=] { kernel(arguments...); };
}

#define LAUNCH(kernel, grid, block, shared, stream, ...) \
    emulator_launch(dim3(grid), dim3(block), shared, stream, emulator_call(kernel, __VA_ARGS__))
#define SHARED_MEMORY(name) unsigned char *name = emulator_shared()

static inline void __syncthreads(void) { emulator_sync_block(); }
static inline void __syncwarp(void) { emulator_sync_warp(); }
static inline int __syncthreads_or(int flag) { return emulator_any(flag); }
template <class T> static inline T __shfl_xor_sync(unsigned mask, T x, int lanes) {
    (void)mask;
    emulator_exchange(&x, sizeof x, (threadIdx.x % 32) ^ (unsigned)lanes);
    return x;
}
static inline unsigned long long atomicMin(unsigned long long *p, unsigned long long x) {
    unsigned long long old = *p;
    *p = x < old ? x : old;
    return old;
}

/* ---- the runtime ------------------------------------------------------------------------------------ */

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorNotReady = 600,
    cudaErrorLaunchFailure = 719
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2 };
typedef struct emulator_stream *cudaStream_t;
typedef struct emulator_event *cudaEvent_t;
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem;
    int major, minor, pciDomainID, pciBusID, pciDeviceID;
};

cudaError_t cudaMalloc(void **p, size_t bytes);
cudaError_t cudaFree(void *p);
cudaError_t cudaMallocHost(void **p, size_t bytes);
cudaError_t cudaFreeHost(void *p);
/* Of another process's memory: what is as large as EMULATOR_SHARED_LEAST. */
#define EMULATOR_SHARED_LEAST 8192u
struct cudaIpcMemHandle_t {
    char reserved[64];
};
enum { cudaIpcMemLazyEnablePeerAccess = 1 };
#include "tests/cuda/memory.h"
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *p);
cudaError_t cudaIpcOpenMemHandle(void **p, cudaIpcMemHandle_t handle, unsigned flags);
cudaError_t cudaIpcCloseMemHandle(void *p);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *all_bytes);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags);
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority);
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaEventCreate(cudaEvent_t *event);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end);
/* What events tell passes only so. */
void emulator_passes(double ms);
cudaError_t cudaGetLastError(void);
const char *cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device);
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaRuntimeGetVersion(int *version);
template <class K>
static inline cudaError_t cudaFuncSetAttribute(K *kernel, cudaFuncAttribute what, int value) {
    (void)kernel, (void)what;
    return value <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue; /* of an H100 */
}

#endif
