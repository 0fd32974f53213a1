/* carrier.c - parts of a checkpoint for another member; see carrier.h. The loop's thread keeps chunks and
 * puts a part's bytes together, a chunk a turn; the thread sends them, or reads what the store has. */
#define _GNU_SOURCE /* O_TMPFILE, gettid */
#include "node/carrier.h"

#include <assert.h>
#include <errno.h>
#include <event2/event.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

#include "ckpt/ckpt.h"
#include "node/timer.h"

#define JOBS_MAX 64 /* the coordinator has fewer with all of us */
#define CARRIER_NICE 10

struct job {
    uint64_t index;
    uint32_t part;
    bool check, done;
    char object[256];
    struct ckpt_part what;
    struct err why; /* not done */
};

struct carrier {
    struct event_base *base;
    const struct msg_model *model;
    uint64_t elements;
    uint32_t chunk_elements, chunks;
    const char *spool;
    carrier_done_fn *on_done;
    void *arg;

    /* What is kept; sync is NULL where nothing is. */
    const struct sync *sync;
    uint64_t index;
    struct ckpt_image *image;
    uint8_t *wanted, *saved; /* sets of chunks; saved: they lie in the spool, the others are as they were */
    int fd;
    float *values;           /* of one chunk */

    /* A ring of jobs, done one after the other. */
    struct job *job;
    uint32_t first, count;
    bool out;                /* the first one is with the thread */
    struct ckpt_piece piece; /* of the first one, while it is put together; count 0: it has not begun */
    uint64_t next;           /* its next element */
    uint8_t *bytes;          /* of one part: the loop's, or the thread's while `out` */
    uint64_t room;

    struct event *work, *ready;
    int event;
    char store_url[PROTO_URL_BYTES_MAX + 1];
    struct ckpt_courier *courier; /* with the first part, as the thread */
    pthread_t thread;
    bool thread_runs;
    pthread_mutex_t mutex; /* guards these: */
    pthread_cond_t changed;
    struct job *todo; /* the thread's until it writes to `event` */
    bool end;
};

static struct job *job_at(struct carrier *c, uint32_t i) { return &c->job[(c->first + i) % JOBS_MAX]; }

/* ---- keeping ---------------------------------------------------------------------------------- */

static void forget(struct carrier *c) {
    ckpt_image_destroy(c->image);
    if (c->fd >= 0) close(c->fd);
    c->image = NULL;
    c->fd = -1;
    c->sync = NULL;
    c->index = 0;
}

static size_t elements_of(const struct carrier *c, uint32_t chunk) {
    uint64_t first = (uint64_t)chunk * c->chunk_elements;
    return c->elements - first < c->chunk_elements ? (size_t)(c->elements - first) : c->chunk_elements;
}

static int move(int fd, bool out, void *bytes, size_t n, uint64_t at) {
    for (size_t done = 0; done < n;) {
        ssize_t k = out ? pwrite(fd, (uint8_t *)bytes + done, n - done, (off_t)(at + done))
                        : pread(fd, (uint8_t *)bytes + done, n - done, (off_t)(at + done));
        if (k < 0 && errno == EINTR) continue;
        if (k <= 0) return -1;
        done += (size_t)k;
    }
    return 0;
}

/* Where a chunk's anchor lies in the spool; its momentum follows. */
static uint64_t place_of(const struct carrier *c, uint32_t chunk, bool momentum) {
    return (2ull * chunk + momentum) * c->chunk_elements * sizeof(float);
}

void carrier_before_change(struct carrier *c, uint32_t chunk) {
    if (!c->sync || !proto_set_has(c->wanted, chunk) || proto_set_has(c->saved, chunk)) return;
    size_t bytes = elements_of(c, chunk) * sizeof(float);
    uint64_t first = (uint64_t)chunk * c->chunk_elements;
    if (move(c->fd, true, (float *)(uintptr_t)(sync_anchor(c->sync) + first), bytes,
             place_of(c, chunk, false)) ||
        move(c->fd, true, (float *)(uintptr_t)(sync_momentum(c->sync) + first), bytes,
             place_of(c, chunk, true)))
        forget(c); /* no space: others have it too */
    else proto_set_add(c->saved, chunk);
}

static int open_spool(const char *folder) {
    char path[4096];
    int fd = open(folder, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd >= 0) return fd;
    snprintf(path, sizeof path, "%.4000s/carrier-XXXXXX", folder);
    if ((fd = mkostemp(path, O_CLOEXEC)) >= 0) unlink(path);
    return fd;
}

void carrier_keep(struct carrier *c, const struct sync *s, const struct msg_checkpoint_keep *msg) {
    uint32_t bytes = (c->chunks + 7) / 8;
    if (!msg->chunks_count && msg->index != c->index) return; /* of another one that is over */
    forget(c);
    if (!msg->chunks_count) return;
    memset(c->wanted, 0, bytes);
    memset(c->saved, 0, bytes);
    for (uint32_t i = 0; i < msg->chunks_count; i++)
        for (uint64_t k = 0; k < msg->chunks[i].count && msg->chunks[i].start + k < c->chunks; k++)
            proto_set_add(c->wanted, (uint32_t)(msg->chunks[i].start + k));
    c->fd = open_spool(c->spool);
    c->image = ckpt_image_create(c->model, msg->bf16 ? CKPT_BF16 : CKPT_FP32, 0, NULL);
    if (c->fd < 0 || !c->image) {
        forget(c);
        return;
    }
    c->sync = s;
    c->index = msg->index;
}

/* ---- a part's bytes --------------------------------------------------------------------------- */

/* Elements of the chunk that is next; they are as they were when it was asked to keep them. -1: they are not
 * here. */
static int put_chunk(struct carrier *c, struct job *j) {
    const struct ckpt_piece *p = &c->piece;
    uint32_t chunk = (uint32_t)(c->next / c->chunk_elements);
    uint64_t begin = (uint64_t)chunk * c->chunk_elements, end = begin + elements_of(c, chunk);
    size_t n = (size_t)((end < p->first + p->count ? end : p->first + p->count) - c->next);
    const float *from = (p->momentum ? sync_momentum(c->sync) : sync_anchor(c->sync)) + c->next;
    if (!proto_set_has(c->wanted, chunk))
        return err_set(&j->why, ERR_NOT_FOUND, "chunk %u is not kept here", chunk);
    if (proto_set_has(c->saved, chunk)) {
        if (move(c->fd, false, c->values, n * sizeof(float),
                 place_of(c, chunk, p->momentum) + (c->next - begin) * sizeof(float)))
            return err_set(&j->why, ERR_IO, "what is kept of chunk %u cannot be read", chunk);
        from = c->values;
    }
    ckpt_image_fill(c->image, p, c->next, n, from, c->bytes);
    c->next += n;
    return 0;
}

static int reserve(struct carrier *c, struct job *j) {
    if (!j->what.bytes) return err_set(&j->why, ERR_REFUSED, "a part of no bytes");
    if (j->what.bytes <= c->room) return 0;
    uint8_t *grown = realloc(c->bytes, (size_t)j->what.bytes);
    if (!grown) return err_set(&j->why, ERR_MEMORY, "no memory for a part");
    c->bytes = grown;
    c->room = j->what.bytes;
    return 0;
}

static int begin_part(struct carrier *c, struct job *j) {
    if (!c->sync || c->index != j->index)
        return err_set(&j->why, ERR_STALE, "the state of ledger %llu is not kept here",
                       (unsigned long long)j->index);
    if (ckpt_image_find(c->image, j->object, j->what.offset, j->what.bytes, &c->piece, &j->why)) return -1;
    c->next = c->piece.first;
    return reserve(c, j);
}

/* ---- the thread ------------------------------------------------------------------------------- */

static void *run(void *arg) {
    struct carrier *c = arg;
    setpriority(PRIO_PROCESS, (id_t)gettid(), CARRIER_NICE); /* on Linux: of this thread */
    pthread_mutex_lock(&c->mutex);
    while (!c->end) {
        struct job *j = c->todo;
        if (!j) {
            pthread_cond_wait(&c->changed, &c->mutex);
            continue;
        }
        pthread_mutex_unlock(&c->mutex);
        int r = j->check ? ckpt_courier_check(c->courier, &j->what, c->bytes, &j->why)
                         : ckpt_part_matches(&j->what, c->bytes, &j->why) ||
                           ckpt_courier_send(c->courier, &j->what, c->bytes, &j->why);
        pthread_mutex_lock(&c->mutex);
        j->done = !r;
        c->todo = NULL;
        uint64_t one = 1;
        ssize_t n = write(c->event, &one, sizeof one);
        (void)n;
    }
    pthread_mutex_unlock(&c->mutex);
    return NULL;
}

static int start_thread(struct carrier *c, struct err *err) {
    sigset_t all, before; /* signals are the loop's */
    if (c->thread_runs) return 0;
    if (!c->courier && !(c->courier = ckpt_courier_create(c->store_url, err))) return -1;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int e = pthread_create(&c->thread, NULL, run, c);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (e) return err_set(err, ERR_MEMORY, "no thread to send parts with: %s", strerror(e));
    c->thread_runs = true;
    return 0;
}

/* ---- jobs, one after the other ------------------------------------------------------------------ */

static void finish_first(struct carrier *c) {
    struct job *j = job_at(c, 0);
    struct msg_checkpoint_part_done done = {.index = j->index, .part = j->part, .check = j->check,
                                            .done = j->done};
    if (!j->done) done.text = proto_str(j->why.msg);
    c->on_done(c->arg, &done);
    c->first = (c->first + 1) % JOBS_MAX;
    c->count--;
    c->piece.count = 0;
    if (c->count) timer_set(c->work, 0);
}

static void hand_over(struct carrier *c) {
    c->out = true;
    pthread_mutex_lock(&c->mutex);
    c->todo = job_at(c, 0);
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->mutex);
}

/* One chunk a turn: a part's bytes are put together while everything else goes on. */
static void on_work(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct carrier *c = arg;
    if (!c->count || c->out) return;
    struct job *j = job_at(c, 0);
    int r = 0;
    if (!c->piece.count && (r = start_thread(c, &j->why)) == 0)
        r = j->check ? reserve(c, j) : begin_part(c, j);
    else if (!r && (!c->sync || c->index != j->index)) r = err_set(&j->why, ERR_STALE, "it is kept no more");
    if (!r && !j->check) r = put_chunk(c, j);
    if (r) finish_first(c);
    else if (j->check || c->next == c->piece.first + c->piece.count) hand_over(c);
    else timer_set(c->work, 0);
}

static void on_ready(evutil_socket_t fd, short what, void *arg) {
    struct carrier *c = arg;
    uint64_t count;
    (void)what;
    if (read(fd, &count, sizeof count) < 0 || !c->out) return;
    pthread_mutex_lock(&c->mutex); /* what the thread wrote is seen after it */
    pthread_mutex_unlock(&c->mutex);
    c->out = false;
    finish_first(c);
}

void carrier_part(struct carrier *c, const struct msg_checkpoint_part *msg) {
    if (c->count == JOBS_MAX) return; /* more than anybody is asked for: it will be asked of others */
    struct job *j = job_at(c, c->count++);
    *j = (struct job){.index = msg->index, .part = msg->part, .check = msg->check,
                      .what = {.offset = msg->offset, .bytes = msg->bytes}};
    proto_str_copy(msg->object, j->object, sizeof j->object);
    proto_str_copy(msg->url, j->what.url, sizeof j->what.url);
    memcpy(j->what.sha256, msg->sha256.b, sizeof j->what.sha256);
    if (!c->out) timer_set(c->work, 0);
}

/* ---- life --------------------------------------------------------------------------------------- */

struct carrier *carrier_create(struct event_base *base, const struct msg_model *model, uint64_t elements,
                               uint32_t chunk_elements, struct proto_bytes store_url, const char *spool,
                               carrier_done_fn *done, void *arg) {
    struct carrier *c = calloc(1, sizeof *c);
    if (!c) return NULL;
    *c = (struct carrier){.base = base, .model = model, .elements = elements,
                          .chunk_elements = chunk_elements,
                          .spool = spool, .on_done = done, .arg = arg, .fd = -1, .event = -1,
                          .chunks = (uint32_t)((elements + chunk_elements - 1) / chunk_elements)};
    proto_str_copy(store_url, c->store_url, sizeof c->store_url);
    pthread_mutex_init(&c->mutex, NULL);
    pthread_cond_init(&c->changed, NULL);
    c->wanted = calloc(c->chunks / 8 + 1, 1);
    c->saved = calloc(c->chunks / 8 + 1, 1);
    c->values = malloc(chunk_elements * sizeof *c->values);
    c->job = calloc(JOBS_MAX, sizeof *c->job);
    c->work = evtimer_new(base, on_work, c);
    c->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (c->event >= 0) c->ready = event_new(base, c->event, EV_READ | EV_PERSIST, on_ready, c);
    if (c->wanted && c->saved && c->values && c->job && c->work && c->ready &&
        !event_add(c->ready, NULL)) return c;
    carrier_destroy(c);
    return NULL;
}

void carrier_destroy(struct carrier *c) {
    if (!c) return;
    if (c->thread_runs) {
        ckpt_courier_cancel(c->courier);
        pthread_mutex_lock(&c->mutex);
        c->end = true;
        pthread_cond_broadcast(&c->changed);
        pthread_mutex_unlock(&c->mutex);
        pthread_join(c->thread, NULL);
    }
    ckpt_courier_destroy(c->courier);
    forget(c);
    if (c->work) event_free(c->work);
    if (c->ready) event_free(c->ready);
    if (c->event >= 0) close(c->event);
    pthread_mutex_destroy(&c->mutex);
    pthread_cond_destroy(&c->changed);
    free(c->wanted);
    free(c->saved);
    free(c->values);
    free(c->bytes);
    free(c->job);
    free(c);
}
