/* nccl.c - in NCCL's place, for tests: as many of its functions as kernels/cuda/nccl.c calls, over a file in
 * /dev/shm that the group's ranks share. Calls go on when their stream comes to them. As NCCL's non-blocking
 * communicators do, one that cannot go on, because another rank is gone, or does not come for FAKE_NCCL_MS,
 * leaves the device busy (EMULATOR_BUSY=1) until the group is aborted.
 *
 * FAKE_NCCL_LOG=FILE: a line a call. FAKE_NCCL_FAILS=CALL: that one is refused; "hang": none ends;
 * "async": and NCCL says so. FAKE_NCCL_VERSION. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "kernels/bf16.h"
#include "tests/cuda/head.h"

#define RANKS 8
#define ROOM ((size_t)1 << 22)
enum { SUCCESS = 0, INVALID = 4, IN_PROGRESS = 7 };

struct unique {
    char internal[128];
};
struct shared {
    _Atomic uint32_t arrived[RANKS];
    _Atomic int32_t pid[RANKS];
    _Atomic uint32_t left[RANKS];
    char sent[2][RANKS][ROOM];
};
struct comm {
    struct shared *s;
    char path[64];
    int rank, size;
    uint32_t calls;
};

int ncclGetVersion(int *version);
int ncclGetUniqueId(struct unique *id);
int ncclCommInitRankConfig(struct comm **out, int size, struct unique id, int rank, const void *config);
int ncclCommGetAsyncError(struct comm *c, int *result);
int ncclCommAbort(struct comm *c);
int ncclCommDestroy(struct comm *c);
const char *ncclGetErrorString(int result);
const char *ncclGetLastError(struct comm *c);
int ncclAllReduce(const void *in, void *out, size_t n, int type, int op, struct comm *c, void *stream);
int ncclAllGather(const void *in, void *out, size_t n, int type, struct comm *c, void *stream);
int ncclReduceScatter(const void *in, void *out, size_t n, int type, int op, struct comm *c, void *stream);
int ncclBroadcast(const void *in, void *out, size_t n, int type, int root, struct comm *c, void *stream);

static void note(const struct comm *c, const char *call, size_t n, int type) {
    const char *path = getenv("FAKE_NCCL_LOG");
    char line[120];
    int length = snprintf(line, sizeof line, "%d/%d %s %zu %d\n", c->rank, c->size, call, n, type);
    int fd = path ? open(path, O_WRONLY | O_CREAT | O_APPEND, 0600) : -1;
    if (fd >= 0 && write(fd, line, (size_t)length) != length) abort();
    if (fd >= 0) close(fd);
}

static int refused(const char *call) {
    const char *fails = getenv("FAKE_NCCL_FAILS");
    return fails && !strcmp(fails, call);
}

int ncclGetVersion(int *version) {
    const char *v = getenv("FAKE_NCCL_VERSION");
    *version = v ? atoi(v) : 22809;
    return SUCCESS;
}

int ncclGetUniqueId(struct unique *id) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "/dev/shm/fake-nccl-%d-%lld", (int)getpid(),
             (long long)t.tv_sec * 1000000000 + t.tv_nsec);
    return refused("unique") ? INVALID : SUCCESS;
}

static int is_gone(const struct comm *c, int rank) {
    int pid = atomic_load(&c->s->pid[rank]);
    if (pid == 0) return 0;
    if (atomic_load(&c->s->left[rank])) return 1;
    struct pollfd p = { .fd = (int)syscall(SYS_pidfd_open, (pid_t)pid, 0), .events = POLLIN };
    int gone = p.fd < 0 || poll(&p, 1, 0) == 1;
    if (p.fd >= 0) close(p.fd);
    return gone;
}

/* Until all have come as often; 0, or -1: somebody will not. */
static int meet(struct comm *c) {
    const char *ms = getenv("FAKE_NCCL_MS");
    int looks = ms ? atoi(ms) * 5 : -1;
    atomic_store(&c->s->arrived[c->rank], ++c->calls);
    for (int r = 0; r < c->size; r++)
        while ((int32_t)(atomic_load(&c->s->arrived[r]) - c->calls) < 0) {
            usleep(200);
            if (looks >= 0 && looks-- == 0) return -1;
            if (is_gone(c, r) && (int32_t)(atomic_load(&c->s->arrived[r]) - c->calls) < 0) return -1;
        }
    return 0;
}

int ncclCommInitRankConfig(struct comm **out, int size, struct unique id, int rank, const void *config) {
    struct comm *c = calloc(1, sizeof *c);
    if (!c || size > RANKS || ((const unsigned *)config)[2] != 0xcafebeef || ((const int *)config)[4] != 0)
        return INVALID;
    *c = (struct comm){ .rank = rank, .size = size };
    *out = c;
    snprintf(c->path, sizeof c->path, "%.60s", id.internal);
    int fd = open(c->path, O_RDWR | O_CREAT, 0600);
    if (fd < 0 || ftruncate(fd, sizeof *c->s)) return INVALID;
    c->s = mmap(NULL, sizeof *c->s, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (refused("begin")) return INVALID;
    atomic_store(&c->s->pid[rank], (int32_t)getpid());
    note(c, "begin", 0, 0);
    return IN_PROGRESS; /* the others come while this one is asked */
}

int ncclCommGetAsyncError(struct comm *c, int *result) {
    *result = getenv("EMULATOR_BUSY") && refused("async") ? INVALID : SUCCESS;
    for (int r = 0; r < c->size; r++)
        if (!atomic_load(&c->s->pid[r])) *result = IN_PROGRESS;
    return SUCCESS;
}

static void end(struct comm *c) {
    unlink(c->path);
    atomic_store(&c->s->left[c->rank], 1);
    munmap(c->s, sizeof *c->s);
    c->s = NULL;
}

/* What streams were asked for still has the group: it does nothing now. */
int ncclCommAbort(struct comm *c) {
    note(c, "abort", 0, 0);
    unsetenv("EMULATOR_BUSY");
    end(c);
    return SUCCESS;
}

int ncclCommDestroy(struct comm *c) {
    note(c, "destroy", 0, 0);
    end(c);
    free(c);
    return SUCCESS;
}

const char *ncclGetErrorString(int result) { return result == INVALID ? "invalid argument" : "no error"; }
const char *ncclGetLastError(struct comm *c) { return (void)c, "the fake was told to"; }

/* ---- calls --------------------------------------------------------------------------------------------- */

static size_t bytes_of(int type) { return type == 1 ? 1 : type == 9 ? 2 : 4; }

struct job {
    struct comm *c;
    const void *in;
    void *out;
    size_t n, parts; /* of n elements in `in` */
    int type, root;
    void (*rest)(const struct job *j, int at);
};

/* Send, and meet. What hangs already hangs on. */
static void run(void *arg) {
    struct job *j = arg;
    struct comm *c = j->c;
    int at = (int)(c->calls & 1);
    if (c->s && !getenv("EMULATOR_BUSY")) {
        memcpy(c->s->sent[at][c->rank], j->in, j->n * j->parts * bytes_of(j->type));
        if (refused("hang") || refused("async") || meet(c)) setenv("EMULATOR_BUSY", "1", 1);
        else j->rest(j, at);
    }
    free(j);
}

static int ask(const char *call, void *stream, struct job job) {
    struct job *j = malloc(sizeof *j);
    if (!j || refused(call) || job.n * job.parts * bytes_of(job.type) > ROOM) {
        free(j);
        return INVALID;
    }
    note(job.c, call, job.n, job.type);
    *j = job;
    ((struct emulator_head *)stream)->ask(stream, run, j);
    return SUCCESS;
}

static void sum(const struct job *j, int at, size_t first) {
    for (size_t i = 0; i < j->n; i++) {
        float total = 0;
        for (int r = 0; r < j->c->size; r++) {
            const char *sent = j->c->s->sent[at][r] + (first + i) * bytes_of(j->type);
            total += j->type == 9 ? bf16_widen(*(const uint16_t *)(const void *)sent)
                                  : *(const float *)(const void *)sent;
        }
        if (j->type == 9) ((uint16_t *)j->out)[i] = bf16_nearest(total);
        else ((float *)j->out)[i] = total;
    }
}

static void sum_all(const struct job *j, int at) { sum(j, at, 0); }
static void sum_own(const struct job *j, int at) { sum(j, at, (size_t)j->c->rank * j->n); }

static void take_all(const struct job *j, int at) {
    size_t bytes = j->n * bytes_of(j->type);
    for (int r = 0; r < j->c->size; r++) memcpy((char *)j->out + (size_t)r * bytes, j->c->s->sent[at][r], bytes);
}

static void take_roots(const struct job *j, int at) {
    memcpy(j->out, j->c->s->sent[at][j->root], j->n * bytes_of(j->type));
}

int ncclAllReduce(const void *in, void *out, size_t n, int type, int op, struct comm *c, void *stream) {
    (void)op;
    return ask("all_reduce", stream, (struct job){ c, in, out, n, 1, type, 0, sum_all });
}

int ncclAllGather(const void *in, void *out, size_t n, int type, struct comm *c, void *stream) {
    return ask("all_gather", stream, (struct job){ c, in, out, n, 1, type, 0, take_all });
}

int ncclReduceScatter(const void *in, void *out, size_t n, int type, int op, struct comm *c, void *stream) {
    (void)op;
    return ask("reduce_scatter", stream, (struct job){ c, in, out, n, (size_t)c->size, type, 0, sum_own });
}

int ncclBroadcast(const void *in, void *out, size_t n, int type, int root, struct comm *c, void *stream) {
    return ask("broadcast", stream, (struct job){ c, in, out, n, 1, type, root, take_roots });
}
