/* emulator.cpp - a block's threads take turns on one CPU thread, each on a stack of its own once it waits at
 * a barrier. */
#include "kernels/cuda/mma.h"
#include "tests/cuda/head.h"

#include <fcntl.h>
#include <limits.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <map>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

#define THREADS_MAX 1024
#define STACK_BYTES ((size_t)128 << 10)
#define EXCHANGE_BYTES 24
#define SHARED_BYTES ((size_t)227 << 10)

enum wait { RUNS, AT_BLOCK, AT_WARP, ENDED };

static struct thread {
    jmp_buf at; /* where it gave way */
    enum wait wait;
    int flag;
    unsigned char value[EXCHANGE_BYTES];
} threads[THREADS_MAX];
static char *stacks;
static jmp_buf scheduler;
static const std::function<void(void)> *body;
static unsigned char *shared; /* allocated for each launch, so that a sanitizer sees its end */
static unsigned now;          /* the thread that runs */
static int launches;
static unsigned begun, ended, threads_count; /* of the block's threads */

struct copy {
    void *to;
    const void *from;
    size_t bytes;
};
static std::vector<struct copy> copies[THREADS_MAX]; /* that threads have not waited for */

static void die(const char *why) {
    fprintf(stderr, "CUDA emulator: block %u,%u,%u, thread %u: %s\n", blockIdx.x, blockIdx.y, blockIdx.z, now,
            why);
    abort();
}

/* On a stack of its own: one thread after the other, until one gives way; another stack then goes on with the
 * next. */
static void run_threads(void) {
    while (begun < threads_count) {
        now = begun++;
        threadIdx = dim3(now);
        threads[now].wait = RUNS;
        (*body)();
        if (!copies[now].empty()) die("ends before its copies are there");
        threads[now].wait = ENDED;
        ended++;
    }
    _longjmp(scheduler, 1);
}

static void begin_threads(void) {
    ucontext_t fresh;
    getcontext(&fresh);
    fresh.uc_stack.ss_sp = stacks + begun * STACK_BYTES;
    fresh.uc_stack.ss_size = STACK_BYTES;
    fresh.uc_link = NULL;
    makecontext(&fresh, run_threads, 0);
    if (!_setjmp(scheduler)) setcontext(&fresh);
}

static void give_way(enum wait wait) {
    unsigned me = now;
    threads[me].wait = wait;
    if (!_setjmp(threads[me].at)) _longjmp(scheduler, 1);
    now = me;
    threadIdx = dim3(me);
}

static void go_on(unsigned i) {
    if (!_setjmp(scheduler)) _longjmp(threads[i].at, 1);
}

void emulator_sync_block(void) { give_way(AT_BLOCK); }
void emulator_sync_warp(void) { give_way(AT_WARP); }
unsigned char *emulator_shared(void) { return shared; }

void emulator_exchange(void *mine, size_t bytes, unsigned from) {
    unsigned warp = now / CUDA_WARP * CUDA_WARP;
    if (bytes > EXCHANGE_BYTES || from >= CUDA_WARP || warp + from >= blockDim.x)
        die("a shuffle out of the warp");
    memcpy(threads[now].value, mine, bytes);
    emulator_sync_warp();
    memcpy(mine, threads[warp + from].value, bytes);
    emulator_sync_warp();
}

static float half_of(uint32_t pair, int which) { return bf16_widen((uint16_t)(pair >> 16 * which)); }

unsigned emulator_mma_count;

/* Sums in the order of k; a device's is its own. */
void emulator_mma(float c[4], const uint32_t mine[6]) {
    unsigned warp = now / CUDA_WARP * CUDA_WARP;
    int lane = (int)(now % CUDA_WARP);
    float a[16][16], b[16][8];
    emulator_mma_count++;
    memcpy(threads[now].value, mine, 6 * sizeof *mine);
    emulator_sync_warp();
    for (int l = 0; l < CUDA_WARP; l++) {
        uint32_t r[6];
        memcpy(r, threads[warp + (unsigned)l].value, sizeof r);
        for (int i = 0; i < 8; i++) a[mma_a_row(l, i)][mma_a_column(l, i)] = half_of(r[i / 2], i % 2);
        for (int i = 0; i < 4; i++) b[mma_b_row(l, i)][mma_b_column(l)] = half_of(r[4 + i / 2], i % 2);
    }
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) c[i] += a[mma_c_row(lane, i)][k] * b[k][mma_c_column(lane, i)];
    emulator_sync_warp();
}

void emulator_ldmatrix(uint32_t to[4], const uint16_t *row, bool transposed) {
    unsigned warp = now / CUDA_WARP * CUDA_WARP, lane = now % CUDA_WARP;
    memcpy(threads[now].value, &row, sizeof row);
    emulator_sync_warp();
    for (unsigned m = 0; m < 4; m++) {
        uint16_t pair[2];
        for (unsigned i = 0; i < 2; i++) {
            unsigned r = transposed ? lane % 4 * 2 + i : lane / 4,
                     c = transposed ? lane / 4 : lane % 4 * 2 + i;
            const uint16_t *from;
            memcpy(&from, threads[warp + m * 8 + r].value, sizeof from);
            pair[i] = from[c];
        }
        to[m] = pair[0] | (uint32_t)pair[1] << 16;
    }
    emulator_sync_warp();
}

int emulator_any(int flag) {
    int any = 0;
    threads[now].flag = flag;
    emulator_sync_block();
    for (unsigned i = 0; i < blockDim.x; i++) any |= threads[i].flag;
    emulator_sync_block();
    return any;
}

static void do_copy(const struct copy &c) {
    if (c.from) memcpy(c.to, c.from, c.bytes);
    else memset(c.to, 0, c.bytes);
}

void emulator_copy(void *to, const void *from, size_t bytes) {
    const char *when = getenv("EMULATOR_COPIES");
    if (when && !strcmp(when, "late")) copies[now].push_back({ to, from, bytes });
    else do_copy({ to, from, bytes });
}

void emulator_copies_wait(void) {
    for (const struct copy &c : copies[now]) do_copy(c);
    copies[now].clear();
}

void emulator_aligned(const void *p, size_t bytes) {
    if ((uintptr_t)p % bytes) die("a misaligned access");
}

/* Let go those that wait for each other. */
static void release(unsigned first, unsigned threads_there, enum wait wait) {
    unsigned there = 0;
    for (unsigned i = first; i < first + threads_there; i++) there += threads[i].wait == wait;
    for (unsigned i = first; i < first + threads_there && there == threads_there; i++) threads[i].wait = RUNS;
}

/* As far as it can without the others. */
static bool run_warp(unsigned first) {
    unsigned there = threads_count - first < CUDA_WARP ? threads_count - first : CUDA_WARP;
    bool any = false;
    for (bool moved = true; moved; any |= moved) {
        moved = false;
        release(first, there, AT_WARP);
        for (unsigned i = first; i < first + there; i++) {
            if (threads[i].wait != RUNS) continue;
            moved = true;
            go_on(i);
        }
    }
    return any;
}

/* Warps far ahead of each other: the first one is, or the last, so that a barrier that is missing shows. */
static void run_block(void) {
    unsigned warps = (threads_count + CUDA_WARP - 1) / CUDA_WARP;
    begun = ended = 0;
    while (begun < threads_count) begin_threads();
    while (ended < threads_count) {
        bool moved = false;
        release(0, threads_count, AT_BLOCK);
        for (unsigned i = 0; i < warps; i++)
            moved |= run_warp((launches & 1 ? warps - 1 - i : i) * CUDA_WARP);
        if (!moved) die("some threads wait at a barrier that others do not reach");
    }
}

static void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void(void)> &kernel) {
    if (!stacks) stacks = (char *)malloc(THREADS_MAX * STACK_BYTES);
    shared = (unsigned char *)aligned_alloc(16, (shared_bytes + 15) / 16 * 16 + 16);
    body = &kernel;
    launches++;
    gridDim = grid;
    blockDim = block;
    threads_count = block.x;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                memset(shared, 0xff, shared_bytes); /* NaN: what nobody wrote shows */
                blockIdx = dim3(x, y, z);
                run_block();
            }
    free(shared);
    shared = NULL;
}

void emulator_launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                     const std::function<void(void)> &kernel) {
    if (block.y != 1 || block.z != 1 || block.x > THREADS_MAX || !grid.x || !grid.y || !grid.z ||
        grid.y > 65535 || grid.z > 65535 || shared_bytes > SHARED_BYTES)
        die("a launch that no device takes");
    emulator_ask(stream, [=] { run_grid(grid, block, shared_bytes, kernel); });
}

/* ---- the runtime -------------------------------------------------------------------------------------- */

static cudaError_t last;

/* For tests: what this machine's driver and device are. */
static int told(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}

/* ---- streams ------------------------------------------------------------------------------------------ */

/* What a stream was asked for; or an event, which it waits for. */
struct work {
    std::function<void(void)> run;
    cudaEvent_t event;
    unsigned number;
};

struct emulator_stream {
    struct emulator_head head; /* for tests/cuda/nccl.c */
    bool late;
    int index, waits;
    std::deque<struct work> asked;
};
static std::vector<cudaStream_t> streams; /* in the order in which they were made */
static uint64_t order; /* 0: streams are as late as can be */

/* The last record of it: where, and whether the stream has come to it. */
struct emulator_event {
    double ms;
    cudaStream_t stream;
    unsigned recorded, reached;
};

static unsigned dice(unsigned sides) {
    order ^= order << 13, order ^= order >> 7, order ^= order << 17;
    return (unsigned)(order >> 33) % sides;
}

static bool waits(cudaStream_t s) {
    return !s->asked.empty() && s->asked.front().event && s->asked.front().event->reached < s->asked.front().number;
}

static void step(cudaStream_t stream) {
    struct work w = stream->asked.front();
    stream->asked.pop_front();
    if (w.run) w.run();
}

/* One step of a stream that can go on, if there is one. */
static bool step_any(void) {
    std::vector<cudaStream_t> can;
    for (cudaStream_t s : streams)
        if (!s->asked.empty() && !waits(s)) can.push_back(s);
    if (can.empty()) return false;
    step(can[dice((unsigned)can.size())]);
    return true;
}

/* So that in the end this stream has gone on. */
static void step_towards(cudaStream_t stream) {
    if (order) {
        if (!step_any()) die("every stream waits for another one");
        return;
    }
    if (waits(stream)) step_towards(stream->asked.front().event->stream);
    else step(stream);
}

static void ask(cudaStream_t stream, const struct work &w) {
    if (!stream || !stream->late) {
        if (w.run) w.run();
        return;
    }
    stream->asked.push_back(w);
    while (order && dice(3) && step_any()) {}
}

void emulator_ask(cudaStream_t stream, const std::function<void(void)> &run) { ask(stream, { run, NULL, 0 }); }

static void ask_from_c(void *stream, void (*run)(void *arg), void *arg) {
    emulator_ask((cudaStream_t)stream, [=] { run(arg); });
}

static void drain(cudaStream_t stream) {
    while (stream && !stream->asked.empty()) step_towards(stream);
}

static void drain_all(void) {
    for (cudaStream_t s : streams) drain(s);
}

static void drain_until(cudaEvent_t event, unsigned number) {
    while (event->reached < number) step_towards(event->stream);
}

/* ---- memory ------------------------------------------------------------------------------------------- */

struct emulator_memory emulator_memory;

static void count(size_t more, size_t less) {
    emulator_memory.live += more - less;
    if (emulator_memory.live > emulator_memory.most) emulator_memory.most = emulator_memory.live;
}

/* What is large lies in a file of its own without a name, which another process can map, before a page that
 * nobody may touch. */
struct block {
    int fd; /* -1: opened, another process's */
    char *map;
    size_t map_bytes, bytes;
};
static std::map<void *, struct block> blocks;

static const size_t page = 4096;

static void *map_block(struct block b) {
    b.map_bytes = (b.bytes + page - 1) / page * page;
    b.map =
        (char *)mmap(NULL, b.map_bytes + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (b.map == MAP_FAILED) return NULL;
    if (mmap(b.map, b.map_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, b.fd, 0) == MAP_FAILED) {
        munmap(b.map, b.map_bytes + page);
        return NULL;
    }
    void *p = b.map + (b.map_bytes - (b.bytes + 255) / 256 * 256);
    blocks[p] = b;
    return p;
}

static void *take_block(size_t bytes) {
    struct block b = { memfd_create("emulator", MFD_CLOEXEC), NULL, 0, bytes };
    void *p = NULL;
    if (b.fd >= 0 && !ftruncate(b.fd, (off_t)((bytes + page - 1) / page * page))) p = map_block(b);
    if (!p && b.fd >= 0) close(b.fd);
    return p;
}

static bool free_block(void *p) {
    auto found = blocks.find(p);
    if (found == blocks.end()) return false;
    if (found->second.fd >= 0) count(0, found->second.bytes);
    munmap(found->second.map, found->second.map_bytes + page);
    if (found->second.fd >= 0) close(found->second.fd);
    blocks.erase(found);
    return true;
}

cudaError_t cudaMalloc(void **p, size_t bytes) {
    *p = bytes > ((size_t)1 << 36)        ? NULL
         : bytes >= EMULATOR_SHARED_LEAST ? take_block(bytes)
                                          : aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (*p) memset(*p, 0xff, bytes);
    if (*p && bytes >= EMULATOR_SHARED_LEAST) count(bytes, 0);
    return *p ? cudaSuccess : last = cudaErrorMemoryAllocation;
}

cudaError_t cudaFree(void *p) {
    drain_all(); /* as the device does */
    if (!free_block(p)) free(p);
    return cudaSuccess;
}

/* EMULATOR_PINNED=0: the system lets nobody pin memory. */
cudaError_t cudaMallocHost(void **p, size_t bytes) {
    *p = told("EMULATOR_PINNED", 1) ? malloc(bytes) : NULL;
    return *p ? cudaSuccess : last = cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void *p) {
    drain_all();
    free(p);
    return cudaSuccess;
}

/* The handle says where the owner has it. EMULATOR_IPC=0: as in a container that forbids it. */
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *p) {
    auto found = blocks.find(p);
    if (found == blocks.end() || found->second.fd < 0 || !told("EMULATOR_IPC", 1))
        return last = cudaErrorInvalidValue;
    memset(handle, 0, sizeof *handle);
    snprintf(handle->reserved, sizeof handle->reserved, "/proc/%d/fd/%d %zu", (int)getpid(), found->second.fd,
             found->second.bytes);
    return cudaSuccess;
}

cudaError_t cudaIpcOpenMemHandle(void **p, cudaIpcMemHandle_t handle, unsigned flags) {
    char path[40];
    struct block b = { -1, NULL, 0, 0 };
    if (sscanf(handle.reserved, "%39s %zu", path, &b.bytes) != 2 || flags != cudaIpcMemLazyEnablePeerAccess)
        return last = cudaErrorInvalidValue;
    if ((b.fd = open(path, O_RDWR | O_CLOEXEC)) < 0) return last = cudaErrorInvalidValue;
    *p = map_block(b);
    close(b.fd);
    if (!*p) return last = cudaErrorMemoryAllocation;
    blocks[*p].fd = -1;
    return cudaSuccess;
}

cudaError_t cudaIpcCloseMemHandle(void *p) {
    return free_block(p) ? cudaSuccess : last = cudaErrorInvalidValue;
}

/* Late even from memory that is not pinned, which a device copies before it returns. */
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    (void)kind;
    emulator_ask(stream, [=] {
        if (bytes) memcpy(to, from, bytes);
    });
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream) {
    emulator_ask(stream, [=] {
        if (bytes) memset(p, value, bytes);
    });
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *all_bytes) {
    *free_bytes = *all_bytes = (size_t)1 << 36;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    (void)flags;
    *stream = new emulator_stream();
    uint64_t seed = (uint64_t)told("EMULATOR_ORDER", 0);
    (*stream)->head.ask = ask_from_c;
    (*stream)->late = seed || told("EMULATOR_LATE", 0);
    (*stream)->index = (int)streams.size();
    if (streams.empty()) order = seed * 0x9e3779b97f4a7c15u;
    streams.push_back(*stream);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most) {
    *least = 0, *most = -5;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    return priority > 0 || priority < -5 ? last = cudaErrorInvalidValue : cudaStreamCreateWithFlags(stream, flags);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    drain(stream);
    streams.erase(std::find(streams.begin(), streams.end(), stream));
    delete stream;
    return cudaSuccess;
}

/* EMULATOR_BUSY=1: something is not done, tests/cuda/nccl.c. */
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    drain(stream);
    return told("EMULATOR_BUSY", 0) ? cudaErrorNotReady : cudaSuccess;
}

/* EMULATOR_LAUNCHES=N: the device is lost after so many, as after an Xid: nothing works from then on. */
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    drain(stream);
    while (told("EMULATOR_BUSY", 0)) pause(); /* for ever, as a device does */
    return launches > told("EMULATOR_LAUNCHES", INT_MAX) ? cudaErrorLaunchFailure : cudaSuccess;
}

static double clock_ms;

void emulator_passes(double ms) { clock_ms += ms; }

cudaError_t cudaEventCreate(cudaEvent_t *event) {
    *event = new emulator_event();
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    return flags == cudaEventDisableTiming ? cudaEventCreate(event) : last = cudaErrorInvalidValue;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    drain_until(event, event->recorded);
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    unsigned number = ++event->recorded;
    event->stream = stream;
    emulator_ask(stream, [=] {
        event->ms = clock_ms;
        event->reached = number;
    });
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    drain_until(event, event->recorded);
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    int one = told("EMULATOR_LOSES_ONE", -1), number = stream->waits++;
    (void)flags;
    if (told("EMULATOR_LOSES", -1) == stream->index && (one < 0 || one == number)) return cudaSuccess;
    if (event->recorded) ask(stream, { nullptr, event, event->recorded });
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end) {
    *ms = (float)(end->ms - begin->ms);
    return cudaSuccess;
}

cudaError_t cudaGetLastError(void) {
    cudaError_t e = last;
    last = cudaSuccess;
    return e;
}

const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory"
           : error == cudaErrorLaunchFailure  ? "unspecified launch failure"
           : error == cudaSuccess             ? "no error"
                                              : "an error";
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = told("EMULATOR_DEVICES", 1);
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    return device < told("EMULATOR_DEVICES", 1) ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    p->pciBusID = device + 1;
    const char *name = getenv("EMULATOR_NAME");
    snprintf(p->name, sizeof p->name, "%s", name ? name : "emulated on a CPU");
    p->totalGlobalMem = (size_t)1 << 36;
    p->major = told("EMULATOR_CAPABILITY", 9);
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = told("EMULATOR_DRIVER", 13000);
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}
