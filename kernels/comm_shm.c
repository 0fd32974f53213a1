/* comm_shm.c - the communicator over shared memory, the host's or a device's; see comm.h.
 *
 * Each member of a group has a slot in the area: a counter of the times it has arrived somewhere, and two
 * windows. A piece of a collective is: copy what is to be sent into the own window, arrive, wait until all
 * have arrived at least as often, read the others' windows. Pieces use the two windows in turn, so no
 * second meeting is needed before the next piece: whoever begins piece p knows that all have arrived at
 * piece p - 1, hence are done with p - 2. A large all_reduce meets once more, between everybody summing a
 * share and everybody copying all shares.
 *
 * On a device the windows are device memory that ranks have opened in each other, and each sums all of a
 * piece itself. (Where each rank has a device of its own and their library is there, tensors go through that,
 * and only barriers and sums of doubles through here.) Copies and sums there are asked for, not done, when a
 * call returns: before a rank arrives it waits for its device, so what stands above about arrivals holds for
 * them too.
 *
 * What a member calls stands in its slot before it arrives; all compare before they read anything. */
#define _GNU_SOURCE /* memfd_create */
#include "kernels/comm.h"

#include "kernels/bf16.h"
#include "kernels/wide.h"

#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAGIC 0x314d4d4f43544e49ull /* "INTCOMM1" in memory */
#define WINDOW_BYTES_MAX ((size_t)64 << 20)
#define LINE 64u
#define PAGE 4096u
#define SPINS 2000 /* some microseconds, where every rank has a core of its own */
#define SMALL_BYTES 4096u /* an all_reduce up to this meets once: each rank sums all of it */

_Static_assert(ATOMIC_INT_LOCK_FREE == 2, "atomics in shared memory must not use hidden locks");

enum kind { ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST, BARRIER, SUM };
static const char *const kind_names[] = { "all_reduce", "all_gather", "reduce_scatter",
                                          "broadcast", "barrier", "sum" };
static const char *const type_names[] = { "fp32", "bf16", "bytes" };
static const size_t type_bytes[] = { 4, 2, 1 };

/* What a member calls, for the others to compare. */
struct call {
    uint32_t kind, type, root, padding;
    uint64_t n, number;
};

struct slot {
    _Alignas(LINE) _Atomic uint32_t arrived;
    _Alignas(LINE) struct call call[2];
};

/* A group in shared memory; its windows are elsewhere. */
struct group {
    _Alignas(LINE) _Atomic uint32_t sleepers;
    struct slot slot[COMM_RANKS_MAX];
};

enum presence { ABSENT = 0, HERE, LEFT };

struct member {
    _Alignas(LINE) _Atomic uint32_t presence;
    _Atomic int32_t pid;
    _Atomic uint32_t moves, looks, excused; /* calls and steps it came to; looks while it waited */
    _Atomic uint64_t step;
    /* What it has of a device: its windows there; which it is, 0 where there is no library for ranks; and of
     * the first of a group what the library's group is named by. */
    uint8_t handle[COMM_GROUPS][KERNELS_HANDLE_BYTES], unique[COMM_GROUPS][KERNELS_UNIQUE_BYTES];
    uint64_t device;
};

struct shared {
    uint64_t magic, bytes;
    struct comm_shape shape;
    _Alignas(LINE) _Atomic uint32_t failed; /* 0, 1: being written, 2: `failure` can be read */
    struct err failure;
    struct member member[COMM_RANKS_MAX];
    struct group group[]; /* [1 + dp + tp]: the world, each replica's tp ranks, each piece's dp ranks */
};

/* A group as this rank sees it; comm is first, so that one is the other. */
struct view {
    struct comm comm;
    struct comm_area *area;
    struct group *group;
    int first, stride;   /* member i is rank first + i * stride */
    char *windows;       /* [2][size + 1][window_bytes]; the last is for shares of an all_reduce */
    const struct kernels *device; /* NULL: tensors are in host memory */
    char *on_device[COMM_RANKS_MAX]; /* [2][window_bytes] of each member */
    void *library;                   /* not NULL: its group, and no windows */
    bool beside;                     /* between begin() and end() */
    uint32_t ended;                  /* what end() said last, 0: finished */
    uint64_t calls;
    uint32_t meetings;   /* how often the own counter has been raised */
    uint32_t piece;      /* whose lowest bit says which windows */
};

/* What this rank has seen of another one. */
struct sight {
    uint32_t moves, looks;
    int64_t silent_ms;
};

struct comm_area {
    struct shared *shared;
    int silence_ms;              /* 0: nobody is too long silent */
    int64_t looked_ms, still_ms; /* the last look at the others; how long nobody has moved since */
    struct sight sight[COMM_RANKS_MAX];
    size_t bytes;
    int fd, rank; /* -1: not joined */
    int spins;
    struct view view[COMM_GROUPS];
    struct pollfd life[COMM_RANKS_MAX]; /* pidfds, readable once a process has ended; fd -1: none yet, or the
                                           * system has none: ask kill() */
};

/* ---- layout ------------------------------------------------------------------------------------ */

static size_t page_up(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

static size_t windows_bytes(const struct comm_shape *s, int size) {
    return COMM_WINDOWS(size) * s->window_bytes;
}

/* Where the windows of group g begin: behind the header, the world's first. */
static size_t windows_at(const struct comm_shape *s, int g) {
    int groups = 1 + s->dp + s->tp;
    size_t at = page_up(sizeof(struct shared) + (size_t)groups * sizeof(struct group));
    if (g > 0) at += windows_bytes(s, s->tp * s->dp);
    if (g > 1) at += (size_t)(g - 1 < s->dp ? g - 1 : s->dp) * windows_bytes(s, s->tp);
    if (g > 1 + s->dp) at += (size_t)(g - 1 - s->dp) * windows_bytes(s, s->dp);
    return at;
}

static int check_shape(const struct comm_shape *s, struct err *err) {
    if (s->tp < 1 || s->dp < 1 || s->tp > COMM_RANKS_MAX || s->dp > COMM_RANKS_MAX / s->tp)
        return err_set(err, ERR_CONFIG, "%d tensor-parallel by %d data-parallel ranks; each at least 1, "
                       "at most %d in all", s->tp, s->dp, COMM_RANKS_MAX);
    size_t w = s->window_bytes, least = LINE * COMM_RANKS_MAX;
    if (w % LINE || w < least || w > WINDOW_BYTES_MAX)
        return err_set(err, ERR_CONFIG, "windows of %zu bytes; a multiple of %u from %zu to %zu", w, LINE,
                       least, WINDOW_BYTES_MAX);
    return 0;
}

/* ---- failures ---------------------------------------------------------------------------------- */

static void fail_with(struct comm_area *a, const struct err *why) {
    uint32_t none = 0;
    if (!atomic_compare_exchange_strong(&a->shared->failed, &none, 1)) return; /* the first one counts */
    a->shared->failure = *why;
    atomic_store(&a->shared->failed, 2);
}

static int has_failed(const struct comm_area *a) { return atomic_load(&a->shared->failed) != 0; }

void comm_area_fail(struct comm_area *a, const struct err *why) {
    struct err said = *why;
    err_prefix(&said, "rank %d", a->rank);
    fail_with(a, &said);
}

static int check(const struct comm *c, struct err *err) {
    const struct comm_area *a = ((const struct view *)(const void *)c)->area;
    if (!has_failed(a)) return 0;
    /* Whoever writes it copies a line of text and has not died of that; if it did, say so. */
    for (int i = 0; i < 1000 && atomic_load(&a->shared->failed) != 2; i++) usleep(100);
    if (atomic_load(&a->shared->failed) != 2) return err_set(err, ERR_IO, "another rank failed");
    if (err) *err = a->shared->failure;
    return -1;
}

static int is_dead(struct comm_area *a, int rank) {
    if (a->life[rank].fd >= 0) return poll(&a->life[rank], 1, 0) == 1;
    return kill(atomic_load(&a->shared->member[rank].pid), 0) && errno == ESRCH;
}

/* A rank that ended without leaving ends the mesh. */
static void look_for_the_dead(struct comm_area *a) {
    int ranks = a->shared->shape.tp * a->shared->shape.dp;
    struct err err;
    for (int r = 0; r < ranks; r++) {
        const struct member *m = &a->shared->member[r];
        int pid = atomic_load(&m->pid);
        if (r == a->rank || pid == 0 || atomic_load(&m->presence) == LEFT) continue;
        if (a->life[r].fd < 0) a->life[r].fd = (int)syscall(SYS_pidfd_open, (pid_t)pid, 0);
        if (!is_dead(a, r) || atomic_load(&m->presence) == LEFT) continue; /* it left before it ended */
        err_set(&err, ERR_IO, "rank %d of %d (process %d) died", r, ranks, pid);
        fail_with(a, &err);
    }
}

static int64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* As /proc has it: R, S, D, T ...; 0 where it is gone. */
static char state_of(int pid) {
    char path[32], line[512], state = 0;
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *f = fopen(path, "re");
    const char *name_end = f && fgets(line, sizeof line, f) ? strrchr(line, ')') : NULL;
    if (name_end) state = name_end[2];
    if (f) fclose(f);
    return state;
}

static void fail_for_silence(struct comm_area *a, int rank) {
    const struct member *m = &a->shared->member[rank];
    int pid = atomic_load(&m->pid);
    char state = state_of(pid);
    struct err err;
    err_set(&err, ERR_TIMEOUT, "rank %d of %d (process %d) says nothing for %.3g s, at step %llu: it %s", rank,
            a->shared->shape.tp * a->shared->shape.dp, pid, a->silence_ms / 1000.0,
            (unsigned long long)atomic_load(&m->step),
            state == 'T' || state == 't' ? "is stopped, as by SIGSTOP"
            : state == 'D'               ? "hangs in the system, in a driver or on a disk"
                                         : "hangs, maybe on its device (dmesg, nvidia-smi)");
    fail_with(a, &err);
}

static void fail_for_stillness(struct comm_area *a) {
    struct err err;
    err_set(&err, ERR_TIMEOUT, "all %d ranks wait for their devices for %.3g s, at step %llu: one hangs in a "
            "kernel, or NCCL between them (NCCL_DEBUG=INFO, dmesg)", a->shared->shape.tp * a->shared->shape.dp,
            a->silence_ms / 1000.0, (unsigned long long)atomic_load(&a->shared->member[a->rank].step));
    fail_with(a, &err);
}

/* Every COMM_LOOK_MS or so while this rank waits. A longer time was spent elsewhere, or stopped. */
static void look_for_the_silent(struct comm_area *a) {
    int ranks = a->shared->shape.tp * a->shared->shape.dp, silent = -1;
    int64_t now = now_ms(), passed = now - a->looked_ms;
    if (a->silence_ms == 0) return;
    if (passed > 2 * COMM_LOOK_MS) passed = 2 * COMM_LOOK_MS;
    a->looked_ms = now;
    a->still_ms += passed;
    atomic_fetch_add(&a->shared->member[a->rank].looks, 1);
    for (int r = 0; r < ranks; r++) {
        const struct member *m = &a->shared->member[r];
        struct sight *s = &a->sight[r];
        if (atomic_load(&m->presence) != HERE) continue;
        uint32_t moves = atomic_load(&m->moves), looks = atomic_load(&m->looks);
        bool excused = atomic_load(&m->excused) && state_of(atomic_load(&m->pid)) != 'T';
        if (moves != s->moves || excused) a->still_ms = 0;
        s->silent_ms = moves != s->moves || looks != s->looks || excused ? 0 : s->silent_ms + passed;
        s->moves = moves;
        s->looks = looks;
        if (s->silent_ms > a->silence_ms && (silent < 0 || s->silent_ms > a->sight[silent].silent_ms)) silent = r;
    }
    if (silent >= 0) fail_for_silence(a, silent);
    else if (a->still_ms > a->silence_ms) fail_for_stillness(a);
}

static void moves(struct comm_area *a) { atomic_fetch_add(&a->shared->member[a->rank].moves, 1); }

void comm_area_watch(struct comm_area *a, int silence_ms) { a->silence_ms = silence_ms; }

void comm_area_goes_on(struct comm_area *a, uint64_t step) {
    moves(a);
    atomic_store(&a->shared->member[a->rank].step, step);
}

void comm_area_excuse(struct comm_area *a, int excused) {
    moves(a);
    atomic_store(&a->shared->member[a->rank].excused, excused);
}

/* ---- meeting ----------------------------------------------------------------------------------- */

static long futex(_Atomic uint32_t *word, int op, uint32_t value, const struct timespec *timeout) {
    return syscall(SYS_futex, word, op, value, timeout, NULL, 0);
}

static int rank_of(const struct view *v, int member) { return v->first + member * v->stride; }

/* Until member m has arrived `meetings` times as well: a while at full speed, then asleep. */
static int await_member(struct view *v, int m) {
    _Atomic uint32_t *arrived = &v->group->slot[m].arrived;
    const struct timespec look = { .tv_nsec = COMM_LOOK_MS * 1000000L };
    struct comm_area *a = v->area;
    for (int i = 0; i < a->spins; i++)
        if ((int32_t)(atomic_load_explicit(arrived, memory_order_acquire) - v->meetings) >= 0) return 0;
    for (;;) {
        /* Whoever arrives raises its counter, then looks for sleepers; here it is the other way round. */
        atomic_fetch_add(&v->group->sleepers, 1);
        uint32_t value = atomic_load(arrived);
        if ((int32_t)(value - v->meetings) < 0) futex(arrived, FUTEX_WAIT, value, &look);
        atomic_fetch_sub(&v->group->sleepers, 1);
        if ((int32_t)(atomic_load(arrived) - v->meetings) >= 0) return 0;
        look_for_the_dead(a);
        look_for_the_silent(a);
        if (atomic_load(&a->shared->member[rank_of(v, m)].presence) == LEFT &&
            (int32_t)(atomic_load(arrived) - v->meetings) < 0) {
            struct err err;
            err_set(&err, ERR_IO, "rank %d left while rank %d waits for it in a %s call of the %s group",
                    rank_of(v, m), a->rank, kind_names[v->group->slot[v->comm.rank].call[v->piece & 1].kind],
                    v->comm.name);
            fail_with(a, &err);
        }
        if (has_failed(a)) return -1;
    }
}

static int meet(struct view *v) {
    _Atomic uint32_t *own = &v->group->slot[v->comm.rank].arrived;
    v->meetings++;
    atomic_store(own, v->meetings);
    if (atomic_load(&v->group->sleepers)) futex(own, FUTEX_WAKE, INT_MAX, NULL);
    for (int m = 0; m < v->comm.size; m++)
        if (m != v->comm.rank && await_member(v, m)) return -1;
    return 0;
}

static void describe(const struct call *c, char *out, size_t size) {
    const char *kind = kind_names[c->kind], *type = type_names[c->type];
    unsigned long long n = c->n;
    if (c->kind == BARRIER) snprintf(out, size, "%s", kind);
    else if (c->kind == SUM) snprintf(out, size, "sum of %llu", n);
    else if (c->kind == BROADCAST) snprintf(out, size, "broadcast of %llu %s from %u", n, type, c->root);
    else snprintf(out, size, "%s of %llu %s", kind, n, type);
}

/* All members compare with the first, so all find the same. */
static int compare_calls(struct view *v) {
    const struct call *first = &v->group->slot[0].call[v->piece & 1];
    for (int m = 1; m < v->comm.size; m++) {
        const struct call *other = &v->group->slot[m].call[v->piece & 1];
        if (!memcmp(first, other, sizeof *first)) continue;
        char a[64], b[64];
        struct err err;
        describe(first, a, sizeof a);
        describe(other, b, sizeof b);
        err_set(&err, ERR_PROTOCOL, "call %llu of the %s group is %s on rank %d and %s on rank %d: a bug",
                (unsigned long long)first->number, v->comm.name, a, rank_of(v, 0), b, rank_of(v, m));
        fail_with(v->area, &err);
        return -1;
    }
    return 0;
}

static char *host_window(const struct view *v, int member) {
    size_t index = (size_t)(v->piece & 1) * (size_t)(v->comm.size + 1) + (size_t)member;
    return v->windows + index * v->area->shared->shape.window_bytes;
}

static char *window(const struct view *v, int member) {
    if (!v->device) return host_window(v, member);
    return v->on_device[member] + (size_t)(v->piece & 1) * v->area->shared->shape.window_bytes;
}

/* Where a rank leaves its share of a large sum for all. */
static char *shares(const struct view *v) { return host_window(v, v->comm.size); }

/* Of a tensor, to or from a window. */
static void move(const struct view *v, void *to, const void *from, size_t bytes) {
    if (!v->device) memcpy(to, from, bytes);
    else if (bytes) v->device->shared->copy(v->device, to, from, bytes);
}

/* What was sent with the piece before has been read by all. 0xff is a NaN in both types. */
static void poison_before(struct view *v) {
    if (!v->area->shared->shape.poison || v->piece == 0) return;
    v->piece--;
    memset(host_window(v, v->comm.rank), 0xff, v->area->shared->shape.window_bytes);
    if (v->comm.rank == 0) memset(shares(v), 0xff, v->area->shared->shape.window_bytes);
    v->piece++;
}

/* What the device was asked for is done: the own window is filled, the others' before it are read. */
static int settle(struct view *v) {
    struct err err;
    if (!v->device || !v->device->check(v->device, &err)) return 0;
    comm_area_fail(v->area, &err);
    return -1;
}

/* The own window is filled: show what is called, and meet. */
static int meet_for(struct view *v, enum kind kind, size_t n, enum comm_type type, int root) {
    if (settle(v)) return -1;
    v->group->slot[v->comm.rank].call[v->piece & 1] =
        (struct call){ .kind = kind, .type = type, .root = (uint32_t)root, .n = n, .number = v->calls };
    if (meet(v) || compare_calls(v)) return -1;
    poison_before(v);
    return 0;
}

/* ---- sums -------------------------------------------------------------------------------------- */

/* sum over members of the elements [first, first + n) of their windows */
WIDE static void add_fp32(float *out, const float *x, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) out[i] += x[i];
}

static void sum_fp32(const struct view *v, float *out, size_t first, size_t n) {
    memcpy(out, (const float *)(const void *)window(v, 0) + first, n * sizeof *out);
    for (int m = 1; m < v->comm.size; m++)
        add_fp32(out, (const float *)(const void *)window(v, m) + first, n);
}

#define BLOCK 1024u

WIDE static void widen(float *out, const uint16_t *x, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) out[i] = bf16_widen(x[i]);
}

WIDE static void add_bf16(float *out, const uint16_t *x, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) out[i] += bf16_widen(x[i]);
}

WIDE static void narrow(uint16_t *out, const float *x, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) out[i] = bf16_nearest(x[i]);
}

static void sum_bf16(const struct view *v, uint16_t *out, size_t first, size_t n) {
    float sum[BLOCK];
    for (size_t at = 0, some; at < n; at += some) {
        some = n - at < BLOCK ? n - at : BLOCK;
        widen(sum, (const uint16_t *)(const void *)window(v, 0) + first + at, some);
        for (int m = 1; m < v->comm.size; m++)
            add_bf16(sum, (const uint16_t *)(const void *)window(v, m) + first + at, some);
        narrow(out + at, sum, some);
    }
}

static void sum_on_device(const struct view *v, void *out, size_t first, size_t n, enum comm_type type) {
    const void *from[COMM_RANKS_MAX];
    for (int m = 0; m < v->comm.size; m++) from[m] = window(v, m) + first * type_bytes[type];
    v->device->shared->sum(v->device, out, from, v->comm.size, n, type == COMM_BF16);
}

static void sum_windows(const struct view *v, void *out, size_t first, size_t n, enum comm_type type) {
    assert(type == COMM_FP32 || type == COMM_BF16);
    if (v->device) sum_on_device(v, out, first, n, type);
    else if (type == COMM_FP32) sum_fp32(v, out, first, n);
    else sum_bf16(v, out, first, n);
}

/* ---- the calls --------------------------------------------------------------------------------- */

/* The table hands out const pointers; what changes belongs to this file. */
static struct view *view_of(const struct comm *c) { return (struct view *)(void *)(uintptr_t)c; }

static const struct kernels_aside *aside_of(const struct view *v) { return v->device ? v->device->aside : NULL; }

static void finish(const struct comm *c, uint32_t number) {
    struct view *v = view_of(c);
    if (!aside_of(v)) return;
    aside_of(v)->finish(v->device, number);
    if (number == v->ended) v->ended = 0;
}

static void begin_beside(const struct comm *c) {
    struct view *v = view_of(c);
    assert(!v->beside);
    v->beside = true;
    if (aside_of(v)) aside_of(v)->begin(v->device);
}

static uint32_t end_beside(const struct comm *c) {
    struct view *v = view_of(c);
    assert(v->beside);
    v->beside = false;
    return aside_of(v) ? v->ended = aside_of(v)->end(v->device) : 0;
}

/* Windows, and NCCL's memory of a group, are for one call at a time: one that is not beside comes after those
 * that are; theirs come after all that was before them in any case. */
static struct view *begin(const struct comm *c) {
    struct view *v = view_of(c);
    v->calls++;
    moves(v->area);
    if (v->ended && !v->beside) finish(c, v->ended);
    return v;
}

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

/* Elements of a window of which each member has `parts`. */
static size_t piece_elements(const struct view *v, enum comm_type type, size_t parts) {
    return v->area->shared->shape.window_bytes / type_bytes[type] / parts;
}

/* Members sum a share each, leave it for all, and copy them all. */
static int all_reduce_piece(struct view *v, char *x, size_t some, enum comm_type type) {
    size_t e = type_bytes[type], size = (size_t)v->comm.size, me = (size_t)v->comm.rank;
    if (some * e <= SMALL_BYTES || v->device) {
        sum_windows(v, x, 0, some, type);
        return 0;
    }
    size_t first = some * me / size, end = some * (me + 1) / size;
    sum_windows(v, shares(v) + first * e, first, end - first, type);
    if (meet(v)) return -1;
    memcpy(x, shares(v), some * e);
    return 0;
}

static void all_reduce(const struct comm *c, void *x, size_t n, enum comm_type type) {
    struct view *v = begin(c);
    size_t e = type_bytes[type], most = piece_elements(v, type, 1);
    if (c->size == 1) return;
    if (v->library) {
        v->device->library->all_reduce(v->device, v->library, x, n, type == COMM_BF16);
        return;
    }
    for (size_t at = 0; at < n || at == 0; at += most, v->piece++) {
        char *part = (char *)x + at * e;
        size_t some = smaller(n - at, most);
        if (has_failed(v->area)) return;
        move(v, window(v, c->rank), part, some * e);
        if (meet_for(v, ALL_REDUCE, n, type, 0) || all_reduce_piece(v, part, some, type)) return;
    }
}

static void all_gather(const struct comm *c, void *out, const void *in, size_t n, enum comm_type type) {
    struct view *v = begin(c);
    size_t e = type_bytes[type], most = piece_elements(v, type, 1);
    if (v->library) {
        v->device->library->all_gather(v->device, v->library, out, in, n * e);
        return;
    }
    char *own = (char *)out + (size_t)c->rank * n * e;
    if (own != in) move(v, own, in, n * e);
    if (c->size == 1) return;
    for (size_t at = 0; at < n || at == 0; at += most, v->piece++) {
        size_t some = smaller(n - at, most);
        if (has_failed(v->area)) return;
        move(v, window(v, c->rank), own + at * e, some * e);
        if (meet_for(v, ALL_GATHER, n, type, 0)) return;
        for (int m = 0; m < c->size; m++)
            if (m != c->rank) move(v, (char *)out + ((size_t)m * n + at) * e, window(v, m), some * e);
    }
}

/* A window holds a part of every row. */
static void reduce_scatter(const struct comm *c, void *out, const void *in, size_t n, enum comm_type type) {
    struct view *v = begin(c);
    size_t e = type_bytes[type], size = (size_t)c->size, most = piece_elements(v, type, size);
    if (v->library) {
        v->device->library->reduce_scatter(v->device, v->library, out, in, n, type == COMM_BF16);
        return;
    }
    if (size == 1 && out != in) move(v, out, in, n * e);
    if (size == 1) return;
    for (size_t at = 0; at < n || at == 0; at += most, v->piece++) {
        size_t some = smaller(n - at, most);
        if (has_failed(v->area)) return;
        for (size_t m = 0; m < size; m++)
            move(v, window(v, c->rank) + m * some * e, (const char *)in + (m * n + at) * e, some * e);
        if (meet_for(v, REDUCE_SCATTER, n, type, 0)) return;
        sum_windows(v, (char *)out + at * e, (size_t)c->rank * some, some, type);
    }
}

static void broadcast(const struct comm *c, void *x, size_t n, enum comm_type type, int root) {
    struct view *v = begin(c);
    size_t e = type_bytes[type], most = piece_elements(v, type, 1);
    assert(root >= 0 && root < c->size);
    if (c->size == 1) return;
    if (v->library) {
        v->device->library->broadcast(v->device, v->library, x, n * e, root);
        return;
    }
    for (size_t at = 0; at < n || at == 0; at += most, v->piece++) {
        char *part = (char *)x + at * e;
        size_t some = smaller(n - at, most);
        if (has_failed(v->area)) return;
        if (root == c->rank) move(v, window(v, root), part, some * e);
        if (meet_for(v, BROADCAST, n, type, root)) return;
        if (root != c->rank) move(v, part, window(v, root), some * e);
    }
}

static void barrier(const struct comm *c) {
    struct view *v = begin(c);
    if (c->size == 1 || has_failed(v->area)) return;
    if (!meet_for(v, BARRIER, 0, COMM_BYTES, 0)) v->piece++;
}

static void sum(const struct comm *c, double *x, size_t n) {
    struct view *v = begin(c);
    assert(n <= COMM_SUM_MAX);
    if (c->size == 1 || has_failed(v->area)) return;
    memcpy(host_window(v, c->rank), x, n * sizeof *x);
    if (meet_for(v, SUM, n, COMM_BYTES, 0)) return;
    memcpy(x, host_window(v, 0), n * sizeof *x);
    for (int m = 1; m < c->size; m++)
        for (size_t i = 0; i < n; i++) x[i] += ((const double *)(const void *)host_window(v, m))[i];
    v->piece++;
}

/* ---- life -------------------------------------------------------------------------------------- */

static struct comm_area *new_area(struct err *err) {
    struct comm_area *a = calloc(1, sizeof *a);
    if (!a) {
        err_set(err, ERR_MEMORY, "no memory for a communicator");
        return NULL;
    }
    a->fd = a->rank = -1;
    for (int r = 0; r < COMM_RANKS_MAX; r++) a->life[r] = (struct pollfd){ .fd = -1, .events = POLLIN };
    return a;
}

static int map(struct comm_area *a, struct err *err) {
    void *p = mmap(NULL, a->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, a->fd, 0);
    if (p == MAP_FAILED) return err_set_errno(err, "shared memory of %zu bytes between ranks", a->bytes);
    a->shared = p;
    return 0;
}

static int make(struct comm_area *a, const struct comm_shape *shape, struct err *err) {
    struct comm_shape s = *shape;
    if (s.window_bytes == 0) s.window_bytes = COMM_WINDOW_BYTES;
    if (check_shape(&s, err)) return -1;
    a->bytes = windows_at(&s, 1 + s.dp + s.tp);
    a->fd = memfd_create("intellect-ranks", MFD_CLOEXEC);
    if (a->fd < 0 || ftruncate(a->fd, (off_t)a->bytes))
        return err_set_errno(err, "shared memory of %zu bytes between ranks", a->bytes);
    if (map(a, err)) return -1;
    a->shared->shape = s;
    a->shared->bytes = a->bytes;
    a->shared->magic = MAGIC;
    return 0;
}

struct comm_area *comm_area_create(const struct comm_shape *shape, struct err *err) {
    struct comm_area *a = new_area(err);
    if (!a || !make(a, shape, err)) return a;
    comm_area_destroy(a);
    return NULL;
}

static int adopt(struct comm_area *a, int fd, struct err *err) {
    struct stat st;
    a->fd = fd;
    if (fstat(fd, &st)) return err_set_errno(err, "descriptor %d", fd);
    a->bytes = (size_t)st.st_size;
    if (a->bytes < sizeof(struct shared))
        return err_set(err, ERR_CORRUPT, "descriptor %d is no memory of ranks (%zu bytes)", fd, a->bytes);
    if (map(a, err)) return -1;
    const struct comm_shape *s = &a->shared->shape;
    if (a->shared->magic != MAGIC || a->shared->bytes != a->bytes || check_shape(s, NULL) ||
        a->bytes != windows_at(s, 1 + s->dp + s->tp))
        return err_set(err, ERR_CORRUPT, "descriptor %d is no memory of ranks of this build", fd);
    return 0;
}

struct comm_area *comm_area_open(int fd, struct err *err) {
    struct comm_area *a = new_area(err);
    if (!a || !adopt(a, fd, err)) return a;
    comm_area_destroy(a);
    return NULL;
}

int comm_area_fd(const struct comm_area *a) { return a->fd; }
const struct comm_shape *comm_area_shape(const struct comm_area *a) { return &a->shared->shape; }

static void set_view(struct comm_area *a, enum comm_group which, int group, int rank, int size) {
    static const char *const names[COMM_GROUPS] = { "world", "tensor-parallel", "data-parallel" };
    const struct comm_shape *s = &a->shared->shape;
    int tp_rank = a->rank % s->tp, dp_rank = a->rank / s->tp;
    a->view[which] = (struct view){
        .comm = { .name = names[which], .rank = rank, .size = size, .all_reduce = all_reduce,
                  .all_gather = all_gather, .reduce_scatter = reduce_scatter, .broadcast = broadcast,
                  .barrier = barrier, .sum = sum, .begin = begin_beside, .end = end_beside,
                  .finish = finish, .check = check },
        .area = a, .group = &a->shared->group[group], .windows = (char *)a->shared + windows_at(s, group),
        .first = which == COMM_TP ? dp_rank * s->tp : which == COMM_DP ? tp_rank : 0,
        .stride = which == COMM_DP ? s->tp : 1,
    };
}

/* Until rank r has joined; its process is then watched. */
static int await_rank(struct comm_area *a, int r, int64_t until_ms, struct err *err) {
    struct member *m = &a->shared->member[r];
    const struct timespec look = { .tv_nsec = COMM_LOOK_MS * 1000000L };
    for (uint32_t seen; (seen = atomic_load(&m->presence)) == ABSENT;) {
        if (check(&a->view[COMM_WORLD].comm, err)) return -1;
        if (now_ms() > until_ms)
            return err_set(err, ERR_TIMEOUT, "rank %d of %d has not come up in %d s", r,
                           a->shared->shape.tp * a->shared->shape.dp, COMM_JOIN_MS / 1000);
        futex(&m->presence, FUTEX_WAIT, seen, &look);
        look_for_the_dead(a);
    }
    return 0;
}

void comm_area_expect(struct comm_area *a, int rank, int pid) {
    atomic_store(&a->shared->member[rank].pid, (int32_t)pid);
}

int comm_area_join(struct comm_area *a, int rank, struct err *err) {
    const struct comm_shape *s = &a->shared->shape;
    int ranks = s->tp * s->dp;
    uint32_t absent = ABSENT;
    if (rank < 0 || rank >= ranks) return err_set(err, ERR_CONFIG, "rank %d of %d", rank, ranks);
    a->rank = rank;
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    a->spins = ranks <= cores ? SPINS : 0;
    set_view(a, COMM_WORLD, 0, rank, ranks);
    set_view(a, COMM_TP, 1 + rank / s->tp, rank % s->tp, s->tp);
    set_view(a, COMM_DP, 1 + s->dp + rank % s->tp, rank / s->tp, s->dp);
    struct member *me = &a->shared->member[rank];
    if (atomic_load(&me->presence) != ABSENT) {
        a->rank = -1;
        return err_set(err, ERR_CONFIG, "rank %d of %d is there already", rank, ranks);
    }
    atomic_store(&me->pid, (int32_t)getpid());
    if (!atomic_compare_exchange_strong(&me->presence, &absent, HERE)) {
        a->rank = -1;
        return err_set(err, ERR_CONFIG, "rank %d of %d is there already", rank, ranks);
    }
    futex(&me->presence, FUTEX_WAKE, INT_MAX, NULL);
    int64_t until_ms = now_ms() + COMM_JOIN_MS;
    for (int r = 0; r < ranks; r++)
        if (r != rank && await_rank(a, r, until_ms, err)) return -1;
    return 0;
}

const struct comm *comm_area_group(const struct comm_area *a, enum comm_group group) {
    assert(a->rank >= 0 && group < COMM_GROUPS);
    return &a->view[group].comm;
}

/* ---- devices ------------------------------------------------------------------------------------- */

static void release_device(struct view *v) {
    const struct kernels *k = v->device;
    if (k && v->library) k->library->leave(k, v->library);
    v->device = v->library = NULL;
    for (int m = 0; k && m < v->comm.size; m++) {
        if (v->on_device[m] && m == v->comm.rank) k->free(k, v->on_device[m]);
        else if (v->on_device[m]) k->shared->close(k, v->on_device[m]);
        v->on_device[m] = NULL;
    }
}

/* Until all are here; the first failure of any of them is everybody's. */
static int agree(struct comm_area *a, int rc, struct err *err) {
    const struct comm *world = &a->view[COMM_WORLD].comm;
    if (rc) comm_area_fail(a, err);
    barrier(world);
    return check(world, err);
}

static int share_window(struct view *v, enum comm_group group, struct err *err) {
    uint8_t *handle = v->area->shared->member[v->area->rank].handle[group];
    size_t bytes = COMM_DEVICE_WINDOWS * v->area->shared->shape.window_bytes;
    v->on_device[v->comm.rank] = v->device->shared->share(v->device, bytes, handle, err);
    return v->on_device[v->comm.rank] ? 0 : -1;
}

static int open_windows(struct view *v, enum comm_group group, struct err *err) {
    for (int m = 0; m < v->comm.size; m++) {
        const struct member *other = &v->area->shared->member[rank_of(v, m)];
        if (m == v->comm.rank) continue;
        if (!(v->on_device[m] = v->device->shared->open(v->device, other->handle[group], err))) {
            err_prefix(err, "memory of rank %d", rank_of(v, m));
            return -1;
        }
    }
    return 0;
}

static int use_windows(struct comm_area *a, const struct kernels *k, struct err *err) {
    int rc = 0;
    for (int g = COMM_TP; g <= COMM_DP && !rc; g++)
        if (a->view[g].comm.size > 1) rc = share_window(&a->view[g], (enum comm_group)g, err);
    if (!rc) rc = k->check(k, err); /* they are zeroed */
    rc = agree(a, rc, err);
    for (int g = COMM_TP; g <= COMM_DP && !rc; g++)
        if (a->view[g].comm.size > 1) rc = open_windows(&a->view[g], (enum comm_group)g, err);
    return agree(a, rc, err);
}

static int is_lost(void *area) {
    look_for_the_dead(area);
    look_for_the_silent(area);
    return has_failed(area);
}

static int use_library(struct comm_area *a, const struct kernels *k, struct err *err) {
    int rc = 0;
    assert(k->library);
    for (int g = COMM_TP; g <= COMM_DP && !rc; g++)
        if (a->view[g].comm.size > 1 && a->view[g].comm.rank == 0)
            rc = k->library->unique(k, a->shared->member[a->rank].unique[g], err);
    rc = agree(a, rc, err);
    for (int g = COMM_TP; g <= COMM_DP && !rc; g++) {
        struct view *v = &a->view[g];
        if (v->comm.size == 1) continue;
        v->library = k->library->join(k, a->shared->member[rank_of(v, 0)].unique[g], v->comm.rank,
                                      v->comm.size, is_lost, a, err);
        if (!v->library) rc = -1;
    }
    return agree(a, rc, err);
}

/* The same on all ranks: each has a device that no other has. */
static bool are_apart(const struct comm_area *a) {
    const struct member *m = a->shared->member;
    int ranks = a->view[COMM_WORLD].comm.size;
    bool all = ranks > 1;
    for (int r = 0; r < ranks; r++) {
        all &= m[r].device != 0;
        for (int other = 0; other < r; other++) all &= m[other].device != m[r].device;
    }
    return all;
}

int comm_area_use(struct comm_area *a, const struct kernels *k, struct err *err) {
    if (!k->shared) return 0;
    uint64_t *device = &a->shared->member[a->rank].device;
    for (int g = COMM_TP; g <= COMM_DP; g++) a->view[g].device = k;
    *device = k->library ? k->library->device(k) : 0;
    int rc = agree(a, 0, err);
    if (!rc && k->library && are_apart(a)) { /* then only it is worth loading */
        barrier(&a->view[COMM_WORLD].comm);
        if (!k->library->found(k)) *device = 0;
        rc = agree(a, 0, err);
    }
    if (!rc) rc = are_apart(a) ? use_library(a, k, err) : use_windows(a, k, err);
    if (rc) comm_area_unuse(a);
    return rc;
}

/* Whoever is here reads no more; once all are, nobody does. */
void comm_area_unuse(struct comm_area *a) {
    bool any = false;
    for (int g = COMM_TP; g <= COMM_DP; g++) {
        any |= a->view[g].device != NULL;
        settle(&a->view[g]);
    }
    if (any) barrier(&a->view[COMM_WORLD].comm);
    for (int g = COMM_TP; g <= COMM_DP; g++) release_device(&a->view[g]);
}

void comm_area_destroy(struct comm_area *a) {
    if (!a) return;
    if (a->shared && a->rank >= 0) atomic_store(&a->shared->member[a->rank].presence, LEFT);
    for (int r = 0; r < COMM_RANKS_MAX; r++)
        if (a->life[r].fd >= 0) close(a->life[r].fd);
    if (a->shared) munmap(a->shared, a->bytes);
    if (a->fd >= 0) close(a->fd);
    free(a);
}
