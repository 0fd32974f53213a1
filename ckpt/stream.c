/* stream.c - large reads. From a folder block after block; from a store behind a network several
 * blocks at a time, by threads that run ahead of whoever takes the blocks in order. */
#include "ckpt/internal.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#define AHEAD 2 /* blocks beyond one for each thread that may wait to be taken */

struct slot {
    uint8_t *bytes;
    bool full;
};

struct stream {
    struct ckpt_store *store;
    const char *name;
    uint64_t offset, bytes;
    size_t block_bytes;
    uint8_t *out; /* where all goes, or NULL: into slots */
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    uint64_t blocks, next, taken, arrived;
    struct slot *slot;
    uint32_t slots;
    bool stop;
    struct err failure;
};

static size_t length_of(const struct stream *s, uint64_t block) {
    uint64_t left = s->bytes - block * s->block_bytes;
    return left < s->block_bytes ? (size_t)left : s->block_bytes;
}

static void *fetch_main(void *arg) {
    struct stream *s = arg;
    pthread_mutex_lock(&s->mutex);
    while (!s->stop && s->next < s->blocks) {
        if (!s->out && s->next >= s->taken + s->slots) {
            pthread_cond_wait(&s->changed, &s->mutex);
            continue;
        }
        uint64_t i = s->next++;
        uint8_t *to = s->out ? s->out + i * s->block_bytes : s->slot[i % s->slots].bytes;
        struct err e = {0};
        pthread_mutex_unlock(&s->mutex);
        int r = s->store->ops->get(s->store, s->name, s->offset + i * s->block_bytes, to, length_of(s, i),
                                   &e);
        pthread_mutex_lock(&s->mutex);
        if (r && !s->stop) s->failure = e;
        if (r) s->stop = true;
        else if (!s->out) s->slot[i % s->slots].full = true;
        s->arrived += !r;
        pthread_cond_broadcast(&s->changed);
    }
    pthread_mutex_unlock(&s->mutex);
    return NULL;
}

typedef int block_taker(void *arg, uint64_t offset, const void *data, size_t n, struct err *err);

/* Hand the blocks over in order; the thread that asked does. */
static int take_all(struct stream *s, block_taker *block, void *arg, struct err *err) {
    int r = 0;
    pthread_mutex_lock(&s->mutex);
    while (!r && !s->stop && s->taken < s->blocks) {
        struct slot *slot = &s->slot[s->taken % s->slots];
        if (!slot->full) {
            pthread_cond_wait(&s->changed, &s->mutex);
            continue;
        }
        pthread_mutex_unlock(&s->mutex);
        r = block(arg, s->offset + s->taken * s->block_bytes, slot->bytes, length_of(s, s->taken), err);
        pthread_mutex_lock(&s->mutex);
        slot->full = false;
        s->taken++;
        pthread_cond_broadcast(&s->changed);
    }
    bool failed = !r && s->taken < s->blocks;
    s->stop = true;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->mutex);
    if (failed && err) *err = s->failure;
    return r || failed ? -1 : 0;
}

static int make_slots(struct stream *s, uint32_t threads, struct err *err) {
    s->slots = threads + AHEAD;
    s->slot = calloc(s->slots, sizeof *s->slot);
    for (uint32_t i = 0; s->slot && i < s->slots; i++)
        if (!(s->slot[i].bytes = malloc(s->block_bytes)))
            return err_set(err, ERR_MEMORY, "%s: out of memory", s->name);
    return s->slot ? 0 : err_set(err, ERR_MEMORY, "%s: out of memory", s->name);
}

static uint32_t start(struct stream *s, pthread_t *thread, uint32_t wanted) {
    uint32_t n = 0;
    sigset_t all, before; /* signals are the caller's business */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (n < wanted && !pthread_create(&thread[n], NULL, fetch_main, s)) n++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return n;
}

/* With block NULL into s->out, else through `block`. */
static int run(struct stream *s, block_taker *block, void *arg, struct err *err) {
    pthread_t thread[64];
    uint32_t wanted = s->store->streams < 64 ? s->store->streams : 64;
    s->blocks = (s->bytes + s->block_bytes - 1) / s->block_bytes;
    if (wanted > s->blocks) wanted = (uint32_t)s->blocks;
    pthread_mutex_init(&s->mutex, NULL);
    pthread_cond_init(&s->changed, NULL);
    int r = block ? make_slots(s, wanted, err) : 0;
    uint32_t n = r ? 0 : start(s, thread, wanted);
    if (!r && !n) r = err_set(err, ERR_MEMORY, "%s: no threads to read with", s->name);
    if (!r && block) r = take_all(s, block, arg, err);
    for (uint32_t i = 0; i < n; i++) pthread_join(thread[i], NULL);
    if (!r && s->arrived < s->blocks) {
        if (err) *err = s->failure;
        r = -1;
    }
    for (uint32_t i = 0; s->slot && i < s->slots; i++) free(s->slot[i].bytes);
    free(s->slot);
    pthread_mutex_destroy(&s->mutex);
    pthread_cond_destroy(&s->changed);
    return r;
}

static bool parallel(const struct ckpt_store *s, uint64_t bytes) {
    return s->streams > 1 && s->block_bytes && bytes > s->block_bytes;
}

int object_get(struct ckpt_store *s, const char *name, uint64_t offset, void *out, size_t n,
               struct err *err) {
    struct stream stream = {.store = s, .name = name, .offset = offset, .bytes = n,
                            .block_bytes = s->block_bytes,
                            .out = out};
    return parallel(s, n) ? run(&stream, NULL, NULL, err) : s->ops->get(s, name, offset, out, n, err);
}

int object_stream(struct ckpt_store *s, const char *name, uint64_t from, uint64_t bytes, block_taker *block,
                  void *arg,
                  struct err *err) {
    struct stream stream = {.store = s, .name = name, .offset = from, .bytes = bytes - from,
                            .block_bytes = s->block_bytes};
    if (parallel(s, bytes - from)) return run(&stream, block, arg, err);
    size_t block_bytes = s->block_bytes ? s->block_bytes : CKPT_BLOCK_BYTES;
    uint8_t *buffer = malloc(block_bytes);
    if (!buffer) return err_set(err, ERR_MEMORY, "%s: out of memory", name);
    int r = 0;
    for (uint64_t at = from; !r && at < bytes;) {
        size_t n = bytes - at < block_bytes ? (size_t)(bytes - at) : block_bytes;
        r = s->ops->get(s, name, at, buffer, n, err) || block(arg, at, buffer, n, err) ? -1 : 0;
        at += n;
    }
    free(buffer);
    return r;
}
