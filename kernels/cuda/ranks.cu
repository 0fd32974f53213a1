/* ranks.cu - what the ranks of a node say to each other about tensors on devices: memory that one opens in
 * another (CUDA IPC), and groups of NCCL's. kernels/comm_shm.c decides which. */
#include <string.h>
#include <unistd.h>

#include "kernels/cuda/cuda.h"

extern "C" {
#include "kernels/cuda/nccl.h"
}

/* ---- memory of several ranks --------------------------------------------------------------------------- */

static_assert(sizeof(cudaIpcMemHandle_t) <= KERNELS_HANDLE_BYTES, "a handle has room");

static int refuse(struct cuda *c, cudaError_t result, const char *what, struct err *err) {
    cudaGetLastError();
    return err_set(err, ERR_UNSUPPORTED, "CUDA device %d: %s another process: %s", c->device, what,
                   cudaGetErrorString(result));
}

static void *share(const struct kernels *k, size_t bytes, uint8_t handle[KERNELS_HANDLE_BYTES],
                   struct err *err) {
    cudaIpcMemHandle_t h;
    void *p = k->alloc(k, bytes, err);
    if (!p) return NULL;
    cudaError_t result = cudaIpcGetMemHandle(&h, p);
    if (result == cudaSuccess) {
        memcpy(handle, &h, sizeof h);
        return p;
    }
    refuse(cuda_of(k), result, "memory cannot be shown to", err);
    k->free(k, p);
    return NULL;
}

static void *open_shared(const struct kernels *k, const uint8_t handle[KERNELS_HANDLE_BYTES],
                         struct err *err) {
    cudaIpcMemHandle_t h;
    void *p = NULL;
    memcpy(&h, handle, sizeof h);
    cudaError_t result = cudaIpcOpenMemHandle(&p, h, cudaIpcMemLazyEnablePeerAccess);
    if (result == cudaSuccess) return p;
    refuse(cuda_of(k), result, "cannot open memory of", err);
    return NULL;
}

static void close_shared(const struct kernels *k, void *p) {
    cuda_note(cuda_of(k), cudaIpcCloseMemHandle(p), "close another rank's memory");
}

static void copy(const struct kernels *k, void *to, const void *from, size_t bytes) {
    struct cuda *c = cuda_of(k);
    cuda_note(c, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, c->stream), "copy");
}

struct sources {
    const void *from[KERNELS_SUM_MAX];
};

template <class E> __global__ void sum_ranks(E *out, struct sources s, int count, size_t n) {
    bool together = aligned(out);
    for (int r = 0; r < count; r++) together = together && aligned(s.from[r]);
    by_groups<GROUP(E)>(n, together, [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        float sum[N], more[N];
        take_wide(sum, (const E *)s.from[0] + i);
        for (int r = 1; r < count; r++) {
            take_wide(more, (const E *)s.from[r] + i);
            UNROLL
            for (int j = 0; j < N; j++) sum[j] += more[j];
        }
        put_all(out + i, sum);
    });
}

static void sum_shared(const struct kernels *k, void *out, const void *const *from, int count, size_t n,
                       int bf16) {
    struct cuda *c = cuda_of(k);
    struct sources s = {};
    unsigned blocks = cuda_group_blocks(n, bf16 ? GROUP(uint16_t) : GROUP(float));
    for (int r = 0; r < count; r++) s.from[r] = from[r];
    if (n && bf16) RUN(c, sum_ranks<uint16_t>, blocks, CUDA_THREADS, 0, (uint16_t *)out, s, count, n);
    else if (n) RUN(c, sum_ranks<float>, blocks, CUDA_THREADS, 0, (float *)out, s, count, n);
}

/* ---- groups -------------------------------------------------------------------------------------------- */

#define LOOK_US 100 /* between two looks at a stream, once it took longer than SPINS of them */
#define SPINS 1000
#define ASK_EACH 500 /* looks, until `lost` is asked, which costs some system calls */

static bool in_groups(const struct cuda *c) {
    bool any = false;
    for (int i = 0; i < KERNELS_GROUPS_MAX; i++) any |= c->group[i] != NULL;
    return any;
}

static void abort_groups(struct cuda *c) {
    for (int i = 0; i < KERNELS_GROUPS_MAX; i++)
        if (c->group[i]) nccl_abort(c->group[i]);
}

/* A call of NCCL's that another rank never makes, or cannot finish, keeps the stream busy for ever. */
static void look_at_groups(struct cuda *c, const char *what) {
    struct err err = {};
    bool lost = c->lost(c->lost_arg);
    for (int i = 0; i < KERNELS_GROUPS_MAX && !lost; i++) lost = c->group[i] && nccl_watch(c->group[i], &err);
    if (!lost) return;
    abort_groups(c);
    if (c->failure.code != ERR_NONE) return;
    if (err.code != ERR_NONE) c->failure = err;
    else err_set(&c->failure, ERR_IO, "%s: another rank is gone", what);
}

static void wait_for_stream(struct cuda *c, cudaStream_t stream, const char *what) {
    for (unsigned i = 0; in_groups(c) && cudaStreamQuery(stream) == cudaErrorNotReady; i++) {
        if (i % ASK_EACH == ASK_EACH - 1) look_at_groups(c, what);
        if (i > SPINS) usleep(LOOK_US);
    }
    cuda_note(c, cudaStreamSynchronize(stream), what);
}

void cuda_wait(struct cuda *c, const char *what) { wait_for_stream(c, c->stream, what); }

void cuda_wait_for_all(struct cuda *c, const char *what) {
    wait_for_stream(c, c->computing, what);
    wait_for_stream(c, c->beside, what);
}

void cuda_wait_for(struct cuda *c, cudaEvent_t event, const char *what) {
    if (in_groups(c)) cuda_wait(c, what);
    else cuda_note(c, cudaEventSynchronize(event), what);
}

static int found(const struct kernels *k) { return (void)k, nccl_found(); }
static uint64_t device(const struct kernels *k) { return cuda_of(k)->place; }
static int unique(const struct kernels *k, uint8_t id[KERNELS_UNIQUE_BYTES], struct err *err) {
    return (void)k, nccl_unique(id, err);
}

static void *join(const struct kernels *k, const uint8_t id[KERNELS_UNIQUE_BYTES], int rank, int size,
                  int (*lost)(void *arg), void *arg, struct err *err) {
    struct cuda *c = cuda_of(k);
    int i = 0;
    while (i < KERNELS_GROUPS_MAX - 1 && c->group[i]) i++;
    c->lost = lost;
    c->lost_arg = arg;
    return c->group[i] = nccl_join(id, rank, size, lost, arg, err);
}

static void leave(const struct kernels *k, void *group) {
    struct cuda *c = cuda_of(k);
    for (int i = 0; i < KERNELS_GROUPS_MAX; i++)
        if (c->group[i] == group) c->group[i] = NULL;
    nccl_leave((struct nccl *)group);
}

static void keep(const struct kernels *k, int rc, const struct err *err) {
    struct cuda *c = cuda_of(k);
    if (rc && c->failure.code == ERR_NONE) c->failure = *err;
}

static void all_reduce(const struct kernels *k, void *group, void *x, size_t n, int bf16) {
    struct err err;
    keep(k, nccl_all_reduce((struct nccl *)group, cuda_of(k)->stream, x, n, bf16, &err), &err);
}

static void all_gather(const struct kernels *k, void *group, void *out, const void *in, size_t bytes) {
    struct err err;
    keep(k, nccl_all_gather((struct nccl *)group, cuda_of(k)->stream, out, in, bytes, &err), &err);
}

static void reduce_scatter(const struct kernels *k, void *group, void *out, const void *in, size_t n,
                           int bf16) {
    struct err err;
    keep(k, nccl_reduce_scatter((struct nccl *)group, cuda_of(k)->stream, out, in, n, bf16, &err), &err);
}

static void broadcast(const struct kernels *k, void *group, void *x, size_t bytes, int root) {
    struct err err;
    keep(k, nccl_broadcast((struct nccl *)group, cuda_of(k)->stream, x, bytes, root, &err), &err);
}

static const struct kernels_shared shared = { share, open_shared, close_shared, copy, sum_shared };
static const struct kernels_library library = { found, device, unique, join, leave,
                                                all_reduce, all_gather, reduce_scatter, broadcast };

void cuda_fill_ranks(struct kernels *k) {
    k->shared = &shared;
    k->library = &library;
}
