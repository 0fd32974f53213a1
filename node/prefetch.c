/* prefetch.c - samples read ahead; see prefetch.h. */
#include "node/prefetch.h"

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum slot_state { SLOT_EMPTY, SLOT_READING, SLOT_READY };

struct slot {
    enum slot_state state;
    uint64_t index;
};

struct prefetch {
    int (*read)(void *arg, uint64_t index, void *out, struct err *err);
    void *arg;
    size_t bytes;
    uint64_t end;
    unsigned ahead, threads;
    pthread_t *thread;
    pthread_mutex_t lock; /* of all below */
    pthread_cond_t room, ready;
    struct slot *slot; /* [ahead]; index i has i % ahead */
    char *samples;     /* [ahead][bytes] */
    uint64_t wanted;   /* the next that will be asked for */
    uint64_t next;     /* the next to be read: in [wanted, wanted + ahead] */
    bool stop;
};

/* The slot of the next one to be read; NULL: nothing to do now. */
static struct slot *next_slot(struct prefetch *p) {
    if (p->next >= p->end || p->next - p->wanted >= p->ahead) return NULL;
    struct slot *s = &p->slot[p->next % p->ahead];
    return s->state == SLOT_READING ? NULL : s; /* one from before a jump is still at it */
}

static void *work(void *arg) {
    struct prefetch *p = arg;
    pthread_mutex_lock(&p->lock);
    while (!p->stop) {
        struct slot *s = next_slot(p);
        if (!s) {
            pthread_cond_wait(&p->room, &p->lock);
            continue;
        }
        uint64_t index = p->next++;
        *s = (struct slot){ SLOT_READING, index };
        pthread_mutex_unlock(&p->lock);
        int rc = p->read(p->arg, index, p->samples + index % p->ahead * p->bytes, NULL);
        pthread_mutex_lock(&p->lock);
        s->state = rc ? SLOT_EMPTY : SLOT_READY;
        pthread_cond_broadcast(&p->ready);
        pthread_cond_broadcast(&p->room);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

/* Signals are for the thread that asked for them. */
static void start(struct prefetch *p, unsigned threads) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (p->threads < threads && !pthread_create(&p->thread[p->threads], NULL, work, p)) p->threads++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

struct prefetch *prefetch_create(int (*read)(void *arg, uint64_t index, void *out, struct err *err),
                                 void *arg, size_t bytes, uint64_t end, unsigned ahead, unsigned threads,
                                 struct err *err) {
    struct prefetch *p = calloc(1, sizeof *p);
    if (p) {
        p->slot = calloc(ahead, sizeof *p->slot);
        p->samples = malloc(ahead * bytes);
        p->thread = calloc(threads, sizeof *p->thread);
    }
    if (!p || !p->slot || !p->samples || !p->thread) {
        prefetch_destroy(p);
        err_set(err, ERR_MEMORY, "no memory to read %u samples ahead", ahead);
        return NULL;
    }
    p->read = read;
    p->arg = arg;
    p->bytes = bytes;
    p->end = end;
    p->ahead = ahead;
    p->wanted = p->next = end;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->room, NULL);
    pthread_cond_init(&p->ready, NULL);
    start(p, threads);
    return p;
}

void prefetch_destroy(struct prefetch *p) {
    if (!p) return;
    if (p->threads) {
        pthread_mutex_lock(&p->lock);
        p->stop = true;
        pthread_cond_broadcast(&p->room);
        pthread_mutex_unlock(&p->lock);
        for (unsigned i = 0; i < p->threads; i++) pthread_join(p->thread[i], NULL);
    }
    free(p->slot);
    free(p->samples);
    free(p->thread);
    free(p);
}

/* Wait for what is being read ahead; true: it is in out now. */
static bool taken(struct prefetch *p, uint64_t index, void *out) {
    struct slot *s = &p->slot[index % p->ahead];
    while (s->state == SLOT_READING && s->index == index) pthread_cond_wait(&p->ready, &p->lock);
    if (s->state != SLOT_READY || s->index != index) return false;
    memcpy(out, p->samples + index % p->ahead * p->bytes, p->bytes);
    s->state = SLOT_EMPTY;
    return true;
}

int prefetch_take(struct prefetch *p, uint64_t index, void *out, struct err *err) {
    pthread_mutex_lock(&p->lock);
    bool have = taken(p, index, out);
    if (!have && (index < p->wanted || index >= p->next)) p->next = index + 1; /* a jump */
    p->wanted = index + 1;
    if (p->next < p->wanted) p->next = p->wanted;
    /* Threads are woken when half of what was ahead is used up, not for each sample. */
    if (p->next - p->wanted <= p->ahead / 2) pthread_cond_broadcast(&p->room);
    pthread_mutex_unlock(&p->lock);
    return have ? 0 : p->read(p->arg, index, out, err);
}
