/* origin.c - the state of a seed or of a checkpoint; see origin.h. A thread opens, fetches and checks
 * checkpoints, and removes what was fetched: all that takes longer than an event loop may stand. */
#include "node/origin.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ckpt/ckpt.h"
#include "node/model.h"
#include "node/timer.h"
#include "proto/model.h"

#define PATH_BYTES 1024

struct origin {
    const struct msg_genesis *genesis;
    char folder[PATH_BYTES]; /* "": stores behind a network are not read */
    /* The checkpoint that was asked for last: being read, open, or failed. */
    bool asked;
    struct msg_checkpoint from; /* but its url */
    struct ckpt_store *store;   /* where it is; NULL while the thread removes the folder */
    struct ckpt *ckpt;
    struct err failed;
    uint64_t failed_at_ms;
    bool littered; /* there may be something in the folder */

    bool busy; /* the thread is at work, on what is above but `ckpt` and `failed`, and on: */
    pthread_t thread;
    struct ckpt *result;
    struct err why; /* where there is none */
    pthread_mutex_t mutex; /* guards what follows */
    bool stop, ended;
    uint64_t done, total;
};

/* ---- the thread ------------------------------------------------------------------------------------ */

static bool same_chunks(const struct origin *o, const struct ckpt *c) {
    const struct msg_genesis *g = ckpt_genesis(c);
    return g && g->outer_count && g->outer->chunk_elements == o->genesis->outer->chunk_elements;
}

/* Is it the one that the ledger or genesis names? Its own signatures were checked when it was opened,
 * but any run's root key could have made those. A plain folder has but its state to be known by. */
static int check(const struct origin *o, const struct ckpt *c, struct err *err) {
    static const struct digest none;
    const struct ckpt_facts *f = ckpt_is_plain(c) ? NULL : ckpt_facts(c);
    if (!f && !digest_equal(&o->from.manifest, &none)) return err_set(err, ERR_CORRUPT, "it has no manifest");
    if (f && (!digest_equal(&f->manifest, &o->from.manifest) || f->index != o->from.at_index ||
              (same_chunks(o, c) && !digest_equal(&f->state_root, &o->from.state_root))))
        return err_set(err, ERR_CORRUPT, "it is another checkpoint than the one that is meant");
    if (proto_model_same_shapes(ckpt_model(c), o->genesis->model)) return 0;
    return err_set(err, ERR_CONFIG, "it is of another model");
}

static bool on_progress(void *arg, const struct ckpt_progress *now) {
    struct origin *o = arg;
    pthread_mutex_lock(&o->mutex);
    o->done = now->done;
    o->total = now->total;
    bool stop = o->stop;
    pthread_mutex_unlock(&o->mutex);
    return !stop;
}

/* Every byte. What is fetched of a checkpoint is checked on the way; of a plain folder it is not. */
static int verify(struct origin *o, const struct ckpt *c, bool fetched, struct err *err) {
    struct digest root;
    if (!ckpt_is_plain(c)) return fetched ? 0 : ckpt_verify(c, on_progress, o, err);
    if (ckpt_root(c, o->genesis->outer->chunk_elements, &root, err)) return -1;
    if (digest_equal(&root, &o->from.state_root)) return 0;
    return err_set(err, ERR_CORRUPT, "its tensors are other ones than when the run was made");
}

/* Close c, which is not the one or could not be read. */
static struct ckpt *give_up(struct ckpt *c) {
    ckpt_close(c);
    return NULL;
}

static bool stopped(struct origin *o) {
    pthread_mutex_lock(&o->mutex);
    bool is = o->stop;
    pthread_mutex_unlock(&o->mutex);
    return is;
}

/* Fetched whole, every digest checked on the way. What an earlier life had of it is taken up; what that had
 * of another goes. */
static struct ckpt *fetch(struct origin *o, const struct ckpt *from, struct err *err) {
    int r = ckpt_fetch(from, o->folder, on_progress, o, err);
    if (r && err->code == ERR_REFUSED && !stopped(o)) {
        ckpt_folder_remove(o->folder, NULL);
        r = ckpt_fetch(from, o->folder, on_progress, o, err);
    }
    if (r) return NULL;
    struct ckpt *c = ckpt_open(o->folder, NULL, err);
    /* Whoever was at the folder. */
    return c && (check(o, c, err) || verify(o, c, true, err)) ? give_up(c) : c;
}

static struct ckpt *read_checkpoint(struct origin *o, struct err *err) {
    struct ckpt *c = ckpt_open_at(o->store, NULL, err);
    if (!c) return NULL;
    if (check(o, c, err)) return give_up(c);
    if (!o->store->remote) return verify(o, c, false, err) ? give_up(c) : c;
    struct ckpt *here = fetch(o, c, err);
    ckpt_close(c);
    return here;
}

static void *origin_main(void *arg) {
    struct origin *o = arg;
    if (o->store) o->result = read_checkpoint(o, &o->why);
    else ckpt_folder_remove(o->folder, NULL);
    pthread_mutex_lock(&o->mutex);
    o->ended = true;
    pthread_mutex_unlock(&o->mutex);
    return NULL;
}

/* ---- the loop's side ------------------------------------------------------------------------------- */

static int start(struct origin *o, struct err *err) {
    sigset_t all, before; /* signals are the loop's business */
    o->result = NULL;
    o->stop = o->ended = false;
    o->done = o->total = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    o->busy = !pthread_create(&o->thread, NULL, origin_main, o);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return o->busy ? 0 : err_set(err, ERR_MEMORY, "no thread to read it");
}

static void close_checkpoint(struct origin *o) {
    ckpt_close(o->ckpt);
    if (o->store) o->store->ops->close(o->store);
    o->ckpt = NULL;
    o->store = NULL;
}

/* What the thread found, where it has ended. */
static void collect(struct origin *o) {
    pthread_mutex_lock(&o->mutex);
    bool ended = o->ended;
    pthread_mutex_unlock(&o->mutex);
    if (!o->busy || !ended) return;
    pthread_join(o->thread, NULL);
    o->busy = false;
    o->ckpt = o->result;
    if (o->ckpt || !o->store) return;
    close_checkpoint(o);
    o->failed = o->why;
    o->failed_at_ms = timer_now_ms();
}

/* To be collected soon. */
static void stop(struct origin *o) {
    pthread_mutex_lock(&o->mutex);
    o->stop = true;
    pthread_mutex_unlock(&o->mutex);
    if (o->store && o->store->ops->cancel) o->store->ops->cancel(o->store);
}

static int begin(struct origin *o, const struct msg_checkpoint *from, struct err *err) {
    char url[PROTO_URL_BYTES_MAX + 1];
    proto_str_copy(from->url, url, sizeof url);
    o->asked = true;
    o->from = *from;
    o->from.url = (struct proto_bytes){0};
    if (ckpt_store_remote(url) && !o->folder[0]) err_set(err, ERR_NOT_FOUND, "is not on this machine");
    else o->store = ckpt_store_open(url, false, err);
    if (o->store && !start(o, err)) {
        o->littered |= o->store->remote;
        return 0;
    }
    close_checkpoint(o);
    o->failed = *err;
    o->failed_at_ms = timer_now_ms();
    return -1;
}

/* In tens of percent, so that a message stays the same for a while. */
static unsigned tens_done(struct origin *o) {
    pthread_mutex_lock(&o->mutex);
    unsigned tens = o->total ? (unsigned)((double)o->done / (double)o->total * 10) : 0;
    pthread_mutex_unlock(&o->mutex);
    return tens * 10;
}

/* 0: it is open. */
static int have_checkpoint(struct origin *o, const struct msg_checkpoint *from, struct err *err) {
    bool same = o->asked && digest_equal(&o->from.manifest, &from->manifest) &&
                digest_equal(&o->from.state_root, &from->state_root) && o->from.at_index == from->at_index;
    collect(o);
    if (!o->busy && same && o->ckpt) return 0;
    if (!o->busy && same && o->failed.code && timer_now_ms() - o->failed_at_ms < ORIGIN_RETRY_MS) {
        *err = o->failed;
        return -1;
    }
    if (o->busy && !same) stop(o);
    if (!o->busy) {
        close_checkpoint(o);
        o->failed.code = ERR_NONE;
        if (begin(o, from, err)) return -1;
    }
    return err_set(err, ERR_TIMEOUT, "is being read, %u %% so far", tens_done(o));
}

static int read_state(const struct ckpt *c, uint64_t first, size_t n, float *anchor, float *momentum,
                      struct err *err) {
    if (ckpt_read(c, CKPT_ANCHOR, first, n, anchor, err)) return -1;
    if (!ckpt_is_plain(c)) return ckpt_read(c, CKPT_MOMENTUM, first, n, momentum, err);
    memset(momentum, 0, n * sizeof *momentum);
    return 0;
}

int origin_load(void *origin, const struct msg_checkpoint *from, uint64_t first, size_t n, float *anchor,
                float *momentum, struct err *err) {
    struct origin *o = origin;
    const struct msg_genesis *g = o->genesis;
    char url[PROTO_URL_BYTES_MAX + 1];
    if (!from && g->init_from_count) from = g->init_from;
    if (!from) {
        model_init_elements(g->model, g->init_std, g->init_seed, first, n, anchor);
        memset(momentum, 0, n * sizeof *momentum);
        return 0;
    }
    if (!have_checkpoint(o, from, err) && !read_state(o->ckpt, first, n, anchor, momentum, err)) return 0;
    proto_str_copy(from->url, url, sizeof url);
    err_prefix(err, "checkpoint %.100s", url);
    if (!o->busy) err->code = ERR_NOT_FOUND;
    return -1;
}

void origin_rest(struct origin *o) {
    struct err ignored;
    collect(o);
    if (o->busy) {
        if (o->store) stop(o);
        return;
    }
    close_checkpoint(o);
    o->asked = false;
    if (!o->littered) return;
    o->littered = false;
    start(o, &ignored); /* without a store: remove what lies there */
}

struct origin *origin_create(const struct msg_genesis *genesis, const char *folder) {
    struct origin *o = calloc(1, sizeof *o);
    if (!o) return NULL;
    o->genesis = genesis;
    snprintf(o->folder, sizeof o->folder, "%s", folder ? folder : "");
    o->littered = folder && !access(folder, F_OK);
    pthread_mutex_init(&o->mutex, NULL);
    return o;
}

void origin_destroy(struct origin *o) {
    if (!o) return;
    if (o->busy) {
        stop(o);
        pthread_join(o->thread, NULL);
        ckpt_close(o->result);
    }
    close_checkpoint(o);
    pthread_mutex_destroy(&o->mutex);
    free(o);
}
