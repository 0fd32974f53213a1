/* backend.cu - the CUDA backend's memory, errors and table. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cuda.h"
#include "kernels/plugin.h"

int cuda_note(struct cuda *c, cudaError_t result, const char *what) {
    if (result == cudaSuccess) return 0;
    if (c->failure.code == ERR_NONE)
        err_set(&c->failure, result == cudaErrorMemoryAllocation ? ERR_MEMORY : ERR_UNSUPPORTED,
                "CUDA device %d: %s: %s", c->device, what, cudaGetErrorString(result));
    return -1;
}

/* ---- memory ------------------------------------------------------------------------------------ */

static void *cuda_alloc(const struct kernels *k, size_t bytes, struct err *err) {
    struct cuda *c = cuda_of(k);
    void *p = NULL;
    size_t free_bytes = 0, all_bytes = 0;
    cudaError_t result = cudaMalloc(&p, bytes ? bytes : 1);
    if (result == cudaSuccess) result = cudaMemsetAsync(p, 0, bytes, c->stream);
    if (result == cudaSuccess) return p;
    cudaGetLastError(); /* it is reported here */
    cudaFree(p);
    cudaMemGetInfo(&free_bytes, &all_bytes);
    err_set(err, ERR_MEMORY, "CUDA device %d: no memory for a tensor of %zu bytes, %zu of %zu are free: %s",
            c->device, bytes, free_bytes, all_bytes, cudaGetErrorString(result));
    return NULL;
}

static void cuda_free(const struct kernels *k, void *p) {
    if (p) cuda_note(cuda_of(k), cudaFree(p), "free");
}

/* Pinned: under unified addressing the device has it at the same address. */
static void *cuda_alloc_host(const struct kernels *k, size_t bytes, struct err *err) {
    void *p = NULL;
    cudaError_t result = cudaMallocHost(&p, bytes ? bytes : 1);
    if (result == cudaSuccess) return memset(p, 0, bytes);
    cudaGetLastError(); /* it is reported here */
    err_set(err, ERR_MEMORY, "CUDA device %d: the system gives no %zu bytes of the host's memory that cannot be "
            "paged: %s", cuda_of(k)->device, bytes, cudaGetErrorString(result));
    return NULL;
}

static void cuda_free_host(const struct kernels *k, void *p) {
    if (p) cuda_note(cuda_of(k), cudaFreeHost(p), "free of the host's memory");
}

/* ---- to and from the host ------------------------------------------------------------------------------ */

/* Two pieces of memory that the device reads and writes by itself: while it has one, the other is filled or
 * emptied. For large copies alone; without them, when the system gives none, the driver does the same with
 * one piece of its own. */
static bool take_staging(struct cuda *c) {
    for (int i = 0; i < 2; i++) {
        if (!c->staging[i] && cudaMallocHost(&c->staging[i], CUDA_STAGING_BYTES) != cudaSuccess) {
            cudaGetLastError();
            c->staging[i] = NULL;
            return false;
        }
        if (!c->staged[i] && cuda_note(c, cudaEventCreate(&c->staged[i]), "copy")) return false;
    }
    return true;
}

static void release_staging(struct cuda *c) {
    for (int i = 0; i < 2; i++) {
        if (c->staged[i]) cudaEventDestroy(c->staged[i]);
        cudaFreeHost(c->staging[i]);
    }
}

static size_t piece_at(size_t at, size_t bytes) {
    return bytes - at < CUDA_STAGING_BYTES ? bytes - at : CUDA_STAGING_BYTES;
}

/* Between them `host` may change: what was asked for is in our own memory. */
static void copy_in_pieces(struct cuda *c, char *to, const char *host, size_t bytes) {
    int i = 0;
    for (size_t at = 0, here; at < bytes; at += here, i ^= 1) {
        here = piece_at(at, bytes);
        cuda_wait_for(c, c->staged[i], "copy in");
        memcpy(c->staging[i], host + at, here);
        cuda_note(c, cudaMemcpyAsync(to + at, c->staging[i], here, cudaMemcpyHostToDevice, c->stream),
                  "copy in");
        cuda_note(c, cudaEventRecord(c->staged[i], c->stream), "copy in");
    }
}

static void empty_piece(struct cuda *c, int i, char *host, size_t bytes) {
    cuda_wait_for(c, c->staged[i], "copy out");
    memcpy(host, c->staging[i], bytes);
}

static void copy_out_pieces(struct cuda *c, char *host, const char *from, size_t bytes) {
    size_t at = 0, here = 0, before = 0;
    int i = 0;
    for (; at < bytes; at += here, i ^= 1) {
        here = piece_at(at, bytes);
        cuda_wait_for(c, c->staged[i], "copy out"); /* a copy in may still read it */
        cuda_note(c, cudaMemcpyAsync(c->staging[i], from + at, here, cudaMemcpyDeviceToHost, c->stream),
                  "copy out");
        cuda_note(c, cudaEventRecord(c->staged[i], c->stream), "copy out");
        if (at) empty_piece(c, i ^ 1, host + at - before, before);
        before = here;
    }
    empty_piece(c, i ^ 1, host + at - before, before);
}

static void copy_in(const struct kernels *k, void *to, const void *host, size_t bytes) {
    struct cuda *c = cuda_of(k);
    if (bytes >= CUDA_STAGED_LEAST && take_staging(c)) {
        copy_in_pieces(c, (char *)to, (const char *)host, bytes);
        return;
    }
    cuda_note(c, cudaMemcpyAsync(to, host, bytes, cudaMemcpyHostToDevice, c->stream), "copy in");
    cuda_wait(c, "copy in"); /* host may change now */
}

static void copy_out(const struct kernels *k, void *host, const void *from, size_t bytes) {
    struct cuda *c = cuda_of(k);
    if (bytes >= CUDA_STAGED_LEAST && take_staging(c)) {
        copy_out_pieces(c, (char *)host, (const char *)from, bytes);
        return;
    }
    cuda_note(c, cudaMemcpyAsync(host, from, bytes, cudaMemcpyDeviceToHost, c->stream), "copy out");
    cuda_wait(c, "copy out");
}

static void zero(const struct kernels *k, void *p, size_t bytes) {
    struct cuda *c = cuda_of(k);
    cuda_note(c, cudaMemsetAsync(p, 0, bytes, c->stream), "zero");
}

void *cuda_scratch(struct cuda *c, size_t bytes) {
    if (bytes <= c->scratch_bytes) return c->scratch;
    /* cudaFree waits for what uses it. */
    if (cuda_note(c, cudaFree(c->scratch), "free scratch")) return NULL;
    c->scratch = NULL;
    c->scratch_bytes = 0;
    if (cuda_note(c, cudaMalloc(&c->scratch, bytes), "scratch")) return NULL;
    c->scratch_bytes = bytes;
    return c->scratch;
}

/* ---- streams ------------------------------------------------------------------------------------------- */

/* What goes beside is served first: it is little for the multiprocessors, and others wait for it. */
static int open_streams(struct cuda *c) {
    int least = 0, most = 0;
    if (cuda_note(c, cudaStreamCreateWithFlags(&c->computing, cudaStreamNonBlocking), "a stream") ||
        cuda_note(c, cudaDeviceGetStreamPriorityRange(&least, &most), "a stream") ||
        cuda_note(c, cudaStreamCreateWithPriority(&c->beside, cudaStreamNonBlocking, most), "a stream") ||
        cuda_note(c, cudaEventCreateWithFlags(&c->begun, cudaEventDisableTiming), "an event"))
        return -1;
    for (cudaEvent_t &event : c->ended)
        if (cuda_note(c, cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "an event")) return -1;
    c->stream = c->computing;
    return 0;
}

static void close_streams(struct cuda *c) {
    if (c->beside) cudaStreamDestroy(c->beside);
    if (c->computing) cudaStreamDestroy(c->computing);
    if (c->begun) cudaEventDestroy(c->begun);
    for (cudaEvent_t event : c->ended)
        if (event) cudaEventDestroy(event);
}

static void begin_aside(const struct kernels *k) {
    struct cuda *c = cuda_of(k);
    cuda_note(c, cudaEventRecord(c->begun, c->computing), "begin aside");
    cuda_note(c, cudaStreamWaitEvent(c->beside, c->begun, 0), "begin aside");
    c->stream = c->beside;
}

static uint32_t end_aside(const struct kernels *k) {
    struct cuda *c = cuda_of(k);
    c->stream = c->computing;
    if (++c->ends == 0) c->ends = CUDA_ENDED; /* 0 is none */
    cuda_note(c, cudaEventRecord(c->ended[c->ends % CUDA_ENDED], c->beside), "end aside");
    return c->ends;
}

static void finish_aside(const struct kernels *k, uint32_t number) {
    struct cuda *c = cuda_of(k);
    cuda_note(c, cudaStreamWaitEvent(c->computing, c->ended[number % CUDA_ENDED], 0), "finish aside");
}

static const struct kernels_aside aside = { begin_aside, end_aside, finish_aside };

/* ---- the table ---------------------------------------------------------------------------------- */

static int check(const struct kernels *k, struct err *err) {
    struct cuda *c = cuda_of(k);
    cuda_wait_for_all(c, "training");
    if (c->failure.code == ERR_NONE) return 0;
    if (err) *err = c->failure;
    c->failure.code = ERR_NONE;
    return -1;
}

/* Of cuDNN's attention, both ways; 0 where the own kernels are taken. */
static size_t sdpa_bytes(struct cuda *c, const struct kernels_shape *s) {
    if (!c->sdpa || s->T < 1 || s->rows < s->T || s->heads < 1) return 0;
    struct sdpa_shape shape = { s->rows / s->T, s->T, s->heads, s->kv_heads, s->width / s->heads };
    size_t forward = sdpa_forward_scratch(c->sdpa, &shape), backward = sdpa_backward_scratch(c->sdpa, &shape);
    if (forward == SDPA_CANNOT) forward = 0;
    if (backward == SDPA_CANNOT) backward = 0;
    return forward > backward ? forward : backward;
}

static size_t scratch_bytes(const struct kernels *k, const struct kernels_shape *s) {
    size_t wants[] = { (size_t)s->rows * s->heads * sizeof(float),
                       (size_t)CUDA_NORM_SLICES * s->width * sizeof(float),
                       k->weight_bytes == sizeof(float) ? 0 : CUDA_SLICE * sizeof(float),
                       sdpa_bytes(cuda_of(k), s) };
    size_t most = 0;
    for (size_t want : wants) most = want > most ? want : most;
    return CUDA_WORKSPACE_BYTES + most;
}

static void destroy(struct kernels *k) {
    struct cuda *c = cuda_of(k);
    sdpa_destroy(c->sdpa);
    cuda_products_destroy(c);
    release_staging(c);
    cudaFree(c->scratch);
    close_streams(c);
    free(c);
}

static int find_device(struct cuda *c, struct cudaDeviceProp *found, struct err *err) {
    int count = 0, driver = 0, runtime = 0;
    cudaError_t result = cudaGetDeviceCount(&count);
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (driver == 0)
        return err_set(err, ERR_NOT_FOUND, "there is no CUDA device: no NVIDIA driver is installed");
    if (result == cudaErrorInsufficientDriver || driver / 1000 < runtime / 1000)
        return err_set(err, ERR_UNSUPPORTED,
                       "the NVIDIA driver is for CUDA %d.%d, this plugin for CUDA %d.%d: update the driver",
                       driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    if (result != cudaSuccess || count == 0)
        return err_set(err, ERR_NOT_FOUND, "there is no CUDA device: %s", cudaGetErrorString(result));
    if (c->device < 0 || c->device >= count)
        return err_set(err, ERR_CONFIG, "there is no CUDA device %d; %d are here, from 0", c->device, count);
    if ((result = cudaSetDevice(c->device)) != cudaSuccess ||
        (result = cudaGetDeviceProperties(found, c->device)) != cudaSuccess)
        return err_set(err, ERR_UNSUPPORTED, "CUDA device %d: %s", c->device, cudaGetErrorString(result));
    if (found->major < 8)
        return err_set(err, ERR_UNSUPPORTED,
                       "CUDA device %d, %s, has compute capability %d.%d, 8.0 is the least", c->device,
                       found->name, found->major, found->minor);
    return 0;
}

/* cuDNN computes in bf16 alone. INTELLECT_CUDNN=0: without it, to compare. The emulator has none. */
static void find_sdpa(struct cuda *c) {
#ifdef __CUDACC__
    const char *wish = getenv("INTELLECT_CUDNN");
    struct err ignored;
    if (c->table.act_bytes == sizeof(uint16_t) && !(wish && *wish == '0'))
        c->sdpa = sdpa_create(c->stream, &ignored);
#else
    c->sdpa = NULL;
#endif
}

static int open_device(struct cuda *c, struct err *err) {
    struct cudaDeviceProp p;
    int runtime = 0;
    if (find_device(c, &p, err)) return -1;
    if (open_streams(c)) {
        *err = c->failure;
        return -1;
    }
    if (cuda_products_create(c, p.name, err)) return -1;
    c->place = (uint64_t)(uint32_t)p.pciDomainID << 32 | (uint64_t)(uint32_t)p.pciBusID << 8 |
               (uint32_t)p.pciDeviceID;
    c->place++; /* 0 is none */
    cudaRuntimeGetVersion(&runtime);
    char sdpa[32] = "";
    find_sdpa(c);
    if (c->sdpa)
        snprintf(sdpa, sizeof sdpa, ", cuDNN %d.%d", sdpa_version(c->sdpa) / 10000,
                 sdpa_version(c->sdpa) / 100 % 100);
    snprintf(c->description, sizeof c->description, "CUDA %d.%d%s, %.60s (%d.%d, %zu MB), %s%s%s",
             runtime / 1000, runtime % 1000 / 10, sdpa, p.name, p.major, p.minor, p.totalGlobalMem >> 20,
             c->table.weight_bytes == sizeof(float) ? "fp32"
             : c->table.rest_bytes                  ? "bf16 with fp32 master"
                                                    : "bf16 rounded stochastically",
             *c->ignored ? "; ignored: " : "", c->ignored);
    return 0;
}

extern "C" __attribute__((visibility("default"))) struct kernels *
intellect_cuda_create(uint32_t abi, int device, size_t weight_bytes, size_t rest_bytes, struct err *err) {
    if (abi != KERNELS_PLUGIN_ABI) {
        err_set(err, ERR_UNSUPPORTED,
                "the CUDA plugin is for interface %u, the program has %u: take both from "
                "one release",
                KERNELS_PLUGIN_ABI, abi);
        return NULL;
    }
    struct cuda *c = (struct cuda *)calloc(1, sizeof *c);
    if (!c) {
        err_set(err, ERR_MEMORY, "no memory for the CUDA backend");
        return NULL;
    }
    struct kernels *k = &c->table;
    c->device = device;
    k->name = "cuda";
    k->description = c->description;
    k->weight_bytes = weight_bytes;
    k->rest_bytes = rest_bytes;
    k->act_bytes = weight_bytes;
    k->alloc = cuda_alloc;
    k->free = cuda_free;
    k->alloc_host = cuda_alloc_host;
    k->free_host = cuda_free_host;
    k->copy_in = copy_in;
    k->copy_out = copy_out;
    k->zero = zero;
    k->check = check;
    k->scratch_bytes = scratch_bytes;
    k->destroy = destroy;
    k->aside = &aside;
    cuda_fill_products(k);
    cuda_fill_rows(k);
    cuda_fill_attention(k);
    cuda_fill_update(k);
    cuda_fill_states(k);
    cuda_fill_outer(k);
    cuda_fill_ranks(k);
    if (!open_device(c, err)) return k;
    destroy(k);
    return NULL;
}
