/* saver.c - an engine's state to disk while training goes on; see saver.h. */
#include "node/saver.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "node/engine.h"

struct saver {
    const struct engine *engine;
    const char *path;
    struct engine_snapshot *snapshot; /* the thread's while it runs */
    bool runs;
    _Atomic bool done;                /* the thread is about to end */
    int rc;
    struct err failed;                /* rc -1: why; both the thread's until it is joined */
    pthread_t thread;
};

struct saver *saver_create(const struct engine *engine, const char *path, float *shared,
                           struct err *err) {
    struct saver *s = calloc(1, sizeof *s);
    if (!s) {
        err_set(err, ERR_MEMORY, "no memory for a saver");
        return NULL;
    }
    s->engine = engine;
    s->path = path;
    if ((s->snapshot = engine_snapshot_create(engine, shared, err))) return s;
    free(s);
    return NULL;
}

static void *write_beside(void *arg) {
    struct saver *s = arg;
    s->rc = engine_snapshot_write(s->snapshot, s->path, &s->failed);
    atomic_store(&s->done, true);
    return NULL;
}

/* End the thread of the save before, if there was one; -1 with what it failed with. */
static int join(struct saver *s, struct err *err) {
    if (!s->runs) return 0;
    pthread_join(s->thread, NULL);
    s->runs = false;
    if (s->rc) *err = s->failed;
    return s->rc;
}

bool saver_busy(struct saver *s) {
    return s->runs && !atomic_load(&s->done);
}

int saver_begin(struct saver *s, uint64_t tag, struct err *err) {
    if (saver_busy(s)) return 0;
    int before = join(s, err);
    if (engine_snapshot_take(s->snapshot, s->engine, tag, err)) return -1;
    if (!s->path) return 0;
    atomic_store(&s->done, false);
    int rc = pthread_create(&s->thread, NULL, write_beside, s);
    if (rc) return err_set(err, ERR_MEMORY, "no thread to save with: %s", strerror(rc));
    s->runs = true;
    return before;
}

int saver_finish(struct saver *s, uint64_t tag, struct err *err) {
    struct err before = {0};
    join(s, &before); /* what is written now replaces it */
    if (engine_snapshot_take(s->snapshot, s->engine, tag, err)) return -1;
    return !s->path ? 0 : engine_snapshot_write(s->snapshot, s->path, err);
}

void saver_destroy(struct saver *s) {
    struct err ignored = {0};
    if (!s) return;
    join(s, &ignored);
    engine_snapshot_destroy(s->snapshot);
    free(s);
}
