/* segment.c - the shared memory of an agent and a trainer; see segment.h. Memory order: a producer
 * fills a message, then publishes it by storing `produced` with release; the consumer loads it with
 * acquire. The slots need no order of their own: they change hands through messages. */
#define _GNU_SOURCE /* memfd_create */
#include "node/segment.h"

#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define SEGMENT_MAGIC 0x31474553544e4949ull /* "IINTSEG1" in memory */
#define PAGE 4096u

_Static_assert((SEGMENT_RING_MESSAGES & (SEGMENT_RING_MESSAGES - 1)) == 0, "indices are masked");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "atomics in shared memory must not use hidden locks");

/* One producer, one consumer. The counters only grow; a message lies at its number modulo size. */
struct ring {
    _Alignas(64) _Atomic uint64_t produced;
    _Alignas(64) _Atomic uint64_t consumed;
    struct segment_message message[SEGMENT_RING_MESSAGES];
};

/* The first pages of the segment; genesis, in slot, ops and out slots follow, each on a page. */
struct shared {
    uint64_t magic;
    uint64_t shared_bytes; /* sizeof of this struct: tells builds apart */
    uint64_t total_bytes;
    struct segment_setup setup; /* its genesis.data means nothing here */
    int fd[SEGMENT_FDS]; /* memfd, commands' and results' eventfd, as the agent numbers them */
    _Alignas(64) _Atomic bool busy;
    _Atomic uint64_t beats;
    struct ring commands, results;
};

struct segment {
    struct shared *shared;
    struct segment_setup setup;
    bool is_trainer;
    int fd[SEGMENT_FDS];
    size_t bytes, genesis_at, in_at, ops_at, out_at[SEGMENT_OUTS];
    uint32_t chunks;
};

static size_t page_up(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

/* Where everything lies follows from the setup alone. */
static void lay_out(struct segment *s) {
    size_t slot = page_up((size_t)s->setup.elements * sizeof(float));
    s->chunks =
        (uint32_t)((s->setup.elements + s->setup.chunk_elements - 1) / s->setup.chunk_elements);
    s->genesis_at = page_up(sizeof(struct shared));
    s->in_at = s->genesis_at + page_up(s->setup.genesis.length);
    s->ops_at = s->in_at + slot;
    s->out_at[0] = s->ops_at + page_up(s->chunks);
    s->out_at[1] = s->out_at[0] + slot;
    s->bytes = s->out_at[1] + slot;
}

static int map(struct segment *s, struct err *err) {
    void *p = mmap(NULL, s->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, s->fd[0], 0);
    if (p == MAP_FAILED) return err_set_errno(err, "shared segment of %zu bytes", s->bytes);
    s->shared = p;
    return 0;
}

/* ---- agent ----------------------------------------------------------------------------------- */

static int make(struct segment *s, struct err *err) {
    s->fd[0] = memfd_create("intellect-segment", MFD_CLOEXEC);
    s->fd[1] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    s->fd[2] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (s->fd[0] < 0 || s->fd[1] < 0 || s->fd[2] < 0 || ftruncate(s->fd[0], (off_t)s->bytes))
        return err_set_errno(err, "shared segment of %zu bytes", s->bytes);
    if (map(s, err)) return -1;
    s->shared->magic = SEGMENT_MAGIC;
    s->shared->shared_bytes = sizeof *s->shared;
    s->shared->total_bytes = s->bytes;
    s->shared->setup = s->setup;
    memcpy(s->shared->fd, s->fd, sizeof s->fd);
    uint8_t *genesis = (uint8_t *)s->shared + s->genesis_at;
    if (s->setup.genesis.length) memcpy(genesis, s->setup.genesis.data, s->setup.genesis.length);
    s->setup.genesis.data = genesis;
    return 0;
}

struct segment *segment_create(const struct segment_setup *setup, struct err *err) {
    assert(setup->elements > 0 && setup->chunk_elements > 0);
    struct segment *s = calloc(1, sizeof *s);
    if (!s) {
        err_set(err, ERR_MEMORY, "no memory for a segment");
        return NULL;
    }
    s->setup = *setup;
    s->setup.agent = getpid();
    lay_out(s);
    if (!make(s, err)) return s;
    segment_destroy(s);
    return NULL;
}

static void ring_reset(struct ring *r) {
    atomic_store(&r->produced, 0);
    atomic_store(&r->consumed, 0);
}

void segment_reset(struct segment *s) {
    assert(!s->is_trainer);
    ring_reset(&s->shared->commands);
    ring_reset(&s->shared->results);
    atomic_store(&s->shared->busy, false);
    uint64_t count;
    for (int i = 1; i < SEGMENT_FDS; i++)
        while (read(s->fd[i], &count, sizeof count) > 0) {}
}

/* ---- trainer --------------------------------------------------------------------------------- */

/* The agent is this very program, so a wrong size means a wrong descriptor, not an attack. */
static int adopt(struct segment *s, struct err *err) {
    struct stat st;
    if (fstat(s->fd[0], &st)) return err_set_errno(err, "descriptor %d", s->fd[0]);
    s->bytes = (size_t)st.st_size;
    if (s->bytes < sizeof(struct shared))
        return err_set(err, ERR_CORRUPT, "descriptor %d is no shared segment (%zu bytes)", s->fd[0],
                       s->bytes);
    if (map(s, err)) return -1;
    const struct shared *h = s->shared;
    if (h->magic != SEGMENT_MAGIC || h->shared_bytes != sizeof *h || h->total_bytes != s->bytes)
        return err_set(err, ERR_CORRUPT, "descriptor %d is no shared segment of this build",
                       s->fd[0]);
    s->setup = h->setup;
    memcpy(s->fd + 1, h->fd + 1, sizeof s->fd - sizeof s->fd[0]);
    lay_out(s);
    s->setup.genesis.data = (const uint8_t *)h + s->genesis_at;
    return 0;
}

struct segment *segment_open(int fd, struct err *err) {
    struct segment *s = calloc(1, sizeof *s);
    if (!s) {
        err_set(err, ERR_MEMORY, "no memory for a segment");
        return NULL;
    }
    s->is_trainer = true;
    s->fd[0] = fd;
    s->fd[1] = s->fd[2] = -1;
    if (!adopt(s, err)) return s;
    segment_destroy(s);
    return NULL;
}

/* ---- both ------------------------------------------------------------------------------------ */

void segment_destroy(struct segment *s) {
    if (!s) return;
    if (s->shared) munmap(s->shared, s->bytes);
    for (int i = 0; i < SEGMENT_FDS; i++)
        if (s->fd[i] >= 0) close(s->fd[i]);
    free(s);
}

void segment_fds(const struct segment *s, int out[SEGMENT_FDS]) {
    memcpy(out, s->fd, sizeof s->fd);
}
const struct segment_setup *segment_setup(const struct segment *s) { return &s->setup; }
uint32_t segment_chunks(const struct segment *s) { return s->chunks; }

static struct ring *outgoing(const struct segment *s) {
    return s->is_trainer ? &s->shared->results : &s->shared->commands;
}
static struct ring *incoming(const struct segment *s) {
    return s->is_trainer ? &s->shared->commands : &s->shared->results;
}

bool segment_send(struct segment *s, const struct segment_message *m) {
    struct ring *r = outgoing(s);
    uint64_t produced = atomic_load_explicit(&r->produced, memory_order_relaxed);
    if (produced - atomic_load_explicit(&r->consumed, memory_order_acquire) >=
        SEGMENT_RING_MESSAGES)
        return false;
    r->message[produced & (SEGMENT_RING_MESSAGES - 1)] = *m;
    atomic_store_explicit(&r->produced, produced + 1, memory_order_release);
    uint64_t one = 1;
    /* EAGAIN means that the counter is full: the other side has been woken often enough. */
    ssize_t written = write(s->fd[s->is_trainer ? 2 : 1], &one, sizeof one);
    (void)written;
    return true;
}

bool segment_receive(struct segment *s, struct segment_message *out) {
    struct ring *r = incoming(s);
    uint64_t consumed = atomic_load_explicit(&r->consumed, memory_order_relaxed);
    if (consumed == atomic_load_explicit(&r->produced, memory_order_acquire)) return false;
    *out = r->message[consumed & (SEGMENT_RING_MESSAGES - 1)];
    atomic_store_explicit(&r->consumed, consumed + 1, memory_order_release);
    return true;
}

int segment_wake_fd(const struct segment *s) { return s->fd[s->is_trainer ? 1 : 2]; }

void segment_clear(struct segment *s) {
    uint64_t count;
    ssize_t got = read(segment_wake_fd(s), &count, sizeof count);
    (void)got; /* EAGAIN: it was clear */
}

bool segment_wait(struct segment *s, int timeout_ms) {
    struct pollfd p = { .fd = segment_wake_fd(s), .events = POLLIN };
    if (poll(&p, 1, timeout_ms) <= 0) return false;
    segment_clear(s);
    return true;
}

uint64_t segment_taken(const struct segment *s) { return atomic_load(&outgoing(s)->consumed); }

uint32_t segment_untaken(const struct segment *s) {
    struct ring *r = outgoing(s);
    uint64_t consumed = atomic_load(&r->consumed);
    return (uint32_t)(atomic_load(&r->produced) - consumed);
}

void segment_set_busy(struct segment *s, bool busy) { atomic_store(&s->shared->busy, busy); }
bool segment_busy(const struct segment *s) { return atomic_load(&s->shared->busy); }

void segment_beat(struct segment *s) {
    atomic_fetch_add_explicit(&s->shared->beats, 1, memory_order_relaxed);
}
uint64_t segment_beats(const struct segment *s) {
    return atomic_load_explicit(&s->shared->beats, memory_order_relaxed);
}

float *segment_in(struct segment *s) { return (float *)(void *)((uint8_t *)s->shared + s->in_at); }
uint8_t *segment_ops(struct segment *s) { return (uint8_t *)s->shared + s->ops_at; }
float *segment_out(struct segment *s, enum segment_out which) {
    return (float *)(void *)((uint8_t *)s->shared + s->out_at[which]);
}
