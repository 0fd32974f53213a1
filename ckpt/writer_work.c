/* writer_work.c - the writer's own thread; see writer.h. */
#define _GNU_SOURCE /* gettid */
#include "ckpt/writer.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#define WORKER_NICE 10
#define LATEST_TRIES_MAX 8

/* ---- objects and bytes --------------------------------------------------------------------------- */

static int check_claim(struct ckpt_writer *w, struct err *err) {
    char name[CKPT_NAME_BYTES_MAX + 1];
    uint8_t now[CLAIM_BYTES];
    struct err e = {0};
    object_name(w->prefix, "claim", name);
    int r = w->store->ops->get(w->store, name, 0, now, sizeof now, &e);
    if (!r && !memcmp(now, w->claim, sizeof now)) return 0;
    if (r && e.code != ERR_NOT_FOUND) { /* nobody's claim, as far as we know */
        if (err) *err = e;
        return -1;
    }
    return err_set(err, ERR_STALE, "%s: another writer has taken it over", w->prefix);
}

/* The genesis is first: with it in the folder, no reader takes an unfinished one for a plain
 * Hugging Face folder. */
static int put_small_objects(struct ckpt_writer *w, struct err *err) {
    char name[CKPT_NAME_BYTES_MAX + 1];
    object_name(w->prefix, "claim", name);
    if (w->store->ops->put(w->store, name, w->claim, sizeof w->claim, NULL, err)) return -1;
    for (uint32_t i = 0; i < w->small_count; i++) {
        struct small *s = &w->small[i];
        if (writer_aborted(w, err)) return -1;
        object_name(w->prefix, s->name, name);
        if (w->store->ops->put(w->store, name, s->blob.data, s->blob.length, CKPT_ABSENT, err)) return -1;
        s->put = true;
        w->manifest.object[w->files + i].digest = digest_of(s->blob.data, s->blob.length);
    }
    return 0;
}

/* While ranges come: keep few bytes in memory that are not on disk, so that the last sync is
 * short and the caller's writes never wait for the disk. Returns when nothing more will come. */
static int sync_while_taking(struct ckpt_writer *w, struct err *err) {
    int r = 0;
    for (uint32_t i = 0; !r && w->store->ops->upload_behind && i < w->files; i++)
        r = w->store->ops->upload_sync(w->file[i].upload, err);
    pthread_mutex_lock(&w->mutex);
    while (!r && w->state == CKPT_TAKING && !w->abort) {
        struct file *f = writer_most_dirty(w);
        if (!f) {
            pthread_cond_wait(&w->changed, &w->mutex);
            continue;
        }
        uint64_t bytes = f->dirty_bytes;
        pthread_mutex_unlock(&w->mutex);
        r = w->store->ops->upload_sync(f->upload, err);
        pthread_mutex_lock(&w->mutex);
        f->dirty_bytes -= bytes;
    }
    pthread_mutex_unlock(&w->mutex);
    return r || writer_aborted(w, err) ? -1 : 0;
}

struct hashing {
    struct ckpt_writer *writer;
    const struct file *file;
    struct digest_stream stream;
    struct rooting *root;
};

static int hash_block(void *arg, uint64_t offset, const void *data, size_t n, struct err *err) {
    struct hashing *h = arg;
    const struct ckpt_blob *header = &h->file->of->header;
    uint64_t left = offset < header->length ? header->length - offset : 0;
    size_t of_header = n < left ? n : (size_t)left;
    if (of_header && memcmp(data, header->data + offset, of_header))
        return err_set(err, ERR_CORRUPT, "%.120s: the store gives back another header", h->file->name);
    digest_stream_update(&h->stream, data, n);
    return writer_aborted(h->writer, err) ? -1 : rooting_block(h->root, offset, data, n, err);
}

/* Of a shared file others and we ourselves look at what the store has; so what we put can be hashed. */
static int hash_own(struct hashing *h, uint64_t bytes, struct err *err) {
    uint8_t *block = malloc(CKPT_BLOCK_BYTES);
    int r = block ? 0 : err_set(err, ERR_MEMORY, "%.120s: out of memory", h->file->name);
    for (uint64_t at = 0; !r && at < bytes;) {
        size_t n = bytes - at < CKPT_BLOCK_BYTES ? (size_t)(bytes - at) : CKPT_BLOCK_BYTES;
        r = h->writer->store->ops->upload_read(h->file->upload, at, block, n, err) ||
            hash_block(h, at, block, n, err)
                ? -1 : 0;
        at += n;
    }
    free(block);
    return r ? r : h->writer->store->ops->upload_release(h->file->upload, err);
}

static int complete_file(struct ckpt_writer *w, struct file *f, struct manifest_object *o,
                         struct rooting *root, struct err *err) {
    struct hashing h = {.writer = w, .file = f, .root = root};
    enum ckpt_which which = f->of->momentum ? CKPT_MOMENTUM
                          : f->of->dtype == SAFETENSORS_BF16 ? CKPT_WEIGHTS : CKPT_ANCHOR;
    if (writer_aborted(w, err) || w->store->ops->upload_complete(f->upload, err)) return -1;
    f->completed = true;
    rooting_file(root, which, f->of->header.length, f->of->first, f->of->count);
    digest_stream_init(&h.stream);
    if (f->parts ? hash_own(&h, o->bytes, err)
                 : object_stream(w->store, f->name, 0, o->bytes, hash_block, &h, err))
        return -1;
    o->digest = digest_stream_final(&h.stream);
    return 0;
}

/* What is hashed is what the store gives back, and it must be the state: a bit that changed on the way there
 * or back would otherwise be signed for. */
static int complete_files(struct ckpt_writer *w, struct err *err) {
    struct rooting root;
    int r = rooting_begin(&root, &w->genesis, w->weights == CKPT_BF16, err) || check_claim(w, err) ? -1 : 0;
    for (uint32_t i = 0; !r && i < w->files; i++)
        r = complete_file(w, &w->file[i], &w->manifest.object[i], &root, err);
    if (!r && rooting_check(&root, &w->manifest.facts.state_root, err)) {
        err_prefix(err, "%s: what the store gives back", w->prefix);
        r = -1;
    }
    rooting_end(&root);
    return r || !w->parts ? r : writer_let_others(w, CKPT_NOTE_CHECK, err) || writer_look(w, err) ? -1 : 0;
}

/* `latest` only moves forward; who loses the race for it looks again. */
static int move_latest(struct ckpt_writer *w, struct err *err) {
    struct latest now, mine = {.index = w->manifest.facts.index};
    char version[CKPT_VERSION_BYTES_MAX + 1];
    struct ckpt_blob blob;
    memcpy(mine.prefix, w->prefix, sizeof mine.prefix);
    mine.manifest = digest_of(w->manifest_bytes.data, w->manifest_bytes.length);
    if (latest_format(&mine, &blob, err)) return -1;
    struct err e = {.code = ERR_STALE};
    int r = -1;
    for (int i = 0; r && e.code == ERR_STALE && i < LATEST_TRIES_MAX; i++) {
        bool readable = !latest_read(w->store, &now, version, &e);
        if (readable && now.index >= mine.index) r = 0;
        else if (readable || e.code == ERR_CORRUPT) /* nonsense is better replaced */
            r = w->store->ops->put(w->store, "latest", blob.data, blob.length, version, &e);
        else if (e.code == ERR_NOT_FOUND)
            r = w->store->ops->put(w->store, "latest", blob.data, blob.length, CKPT_ABSENT, &e);
    }
    free(blob.data);
    if (r && err) {
        *err = e;
        err_prefix(err, "%s is complete, but `latest` does not name it", w->prefix);
    }
    return r;
}

static int publish(struct ckpt_writer *w, struct err *err) {
    char name[CKPT_NAME_BYTES_MAX + 1];
    struct ckpt_blob sig;
    if (check_claim(w, err) || manifest_sig_format(&w->sig, &sig, err)) return -1;
    object_name(w->prefix, "manifest.sig", name);
    int r = w->store->ops->put(w->store, name, sig.data, sig.length, CKPT_ABSENT, err);
    free(sig.data);
    if (r) return -1;
    w->manifest_tried = true;
    object_name(w->prefix, "manifest.json", name);
    if (w->store->ops->put(w->store, name, w->manifest_bytes.data, w->manifest_bytes.length, CKPT_ABSENT, err))
        return -1;
    if (move_latest(w, err)) return -1;
    object_name(w->prefix, "claim", name);
    w->store->ops->remove(w->store, name, NULL); /* of no use any more, and of no harm */
    return 0;
}

static int wait_for_signature(struct ckpt_writer *w, struct err *err) {
    pthread_mutex_lock(&w->mutex);
    while (w->state == CKPT_UNSIGNED && !w->abort) pthread_cond_wait(&w->changed, &w->mutex);
    pthread_mutex_unlock(&w->mutex);
    return writer_aborted(w, err) ? -1 : 0;
}

int writer_clear_folder(struct ckpt_writer *w, struct err *err) {
    char name[CKPT_NAME_BYTES_MAX + 1];
    struct ckpt_object o;
    struct err e = {0};
    object_name(w->prefix, "manifest.json", name);
    if (!w->store->ops->stat(w->store, name, &o, &e))
        return err_set(err, ERR_REFUSED, "%s: this checkpoint is there already", name);
    if (e.code == ERR_NOT_FOUND) return object_remove_all(w->store, w->prefix, err);
    if (err) *err = e;
    return -1;
}

/* False where it is better to stop: each further call might wait as long as this one did. `prune`
 * finds the rest. */
static bool drop(struct ckpt_writer *w, const char *name) {
    char full[CKPT_NAME_BYTES_MAX + 1];
    object_name(w->prefix, name, full);
    return !w->store->ops->remove(w->store, full, NULL) || !w->store->remote;
}

/* What we put and nobody can use. Not where another attempt owns the folder by now. */
static void remove_objects(struct ckpt_writer *w) {
    if (!w->file || !w->thread_runs || check_claim(w, NULL)) return;
    for (uint32_t i = 0; i < w->files; i++)
        if (w->file[i].completed && !drop(w, w->manifest.object[i].name)) return;
    for (uint32_t i = 0; i < w->small_count; i++)
        if (w->small[i].put && !drop(w, w->small[i].name)) return;
    if (drop(w, "manifest.sig")) drop(w, "claim");
}

/* A put of the manifest that failed may have left it nevertheless. */
static bool manifest_there(struct ckpt_writer *w) {
    char name[CKPT_NAME_BYTES_MAX + 1];
    struct ckpt_object o;
    struct err e = {0};
    if (!w->manifest_tried) return false;
    object_name(w->prefix, "manifest.json", name);
    return !w->store->ops->stat(w->store, name, &o, &e) || e.code != ERR_NOT_FOUND;
}

void writer_remove_everything(struct ckpt_writer *w) {
    for (uint32_t i = 0; w->file && i < w->files; i++) {
        w->store->ops->upload_destroy(w->file[i].upload);
        w->file[i].upload = NULL;
    }
    if (!w->settled && !manifest_there(w)) remove_objects(w);
    w->settled = true;
}

/* The end without a checkpoint. The cleaning is done here, as it takes its time, and where a network was what
 * failed without asking it any more: `prune` finds what lies there. The caller, who puts perhaps at this
 * moment, is told then. */
static void give_up(struct ckpt_writer *w, const struct err *why) {
    pthread_mutex_lock(&w->mutex);
    if (w->state != CKPT_FAILED) {
        w->state = CKPT_FAILED;
        w->failure = *why;
    }
    while (w->putting) pthread_cond_wait(&w->changed, &w->mutex);
    pthread_mutex_unlock(&w->mutex);
    if (why->code == ERR_TIMEOUT && w->store->ops->cancel) w->store->ops->cancel(w->store);
    writer_remove_everything(w);
}

static void end_worker(struct ckpt_writer *w) {
    pthread_mutex_lock(&w->mutex);
    w->ended = true;
    pthread_mutex_unlock(&w->mutex);
    writer_notify(w);
}

static void *worker_main(void *arg) {
    struct ckpt_writer *w = arg;
    struct err err = {0};
    setpriority(PRIO_PROCESS, (id_t)gettid(), WORKER_NICE); /* on Linux: of this thread */
    if ((w->store->remote && writer_clear_folder(w, &err)) || put_small_objects(w, &err) ||
        (w->parts ? writer_let_others(w, CKPT_NOTE_SEND, &err) : sync_while_taking(w, &err)) ||
        complete_files(w, &err) ||
        manifest_format(&w->manifest, &w->manifest_bytes, &err))
        goto failed;
    if (w->manifest_bytes.length > CKPT_MANIFEST_BYTES_MAX) {
        err_set(&err, ERR_FULL, "%s: manifest of %zu bytes, at most %u fit a message: use larger files",
                w->prefix, w->manifest_bytes.length, CKPT_MANIFEST_BYTES_MAX);
        goto failed;
    }
    writer_enter(w, CKPT_UNSIGNED, NULL);
    if (wait_for_signature(w, &err) || publish(w, &err)) goto failed;
    w->settled = true;
    writer_remove_everything(w); /* the uploads: nobody else waits for their memory, files and threads */
    writer_enter(w, CKPT_PUBLISHED, NULL);
    end_worker(w);
    return NULL;
failed:
    give_up(w, &err);
    end_worker(w);
    return NULL;
}

int writer_start(struct ckpt_writer *w, struct err *err) {
    sigset_t all, before; /* signals are the caller's business */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    w->thread_runs = true;
    int e = pthread_create(&w->thread, NULL, worker_main, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!e) return 0;
    w->thread_runs = false;
    errno = e;
    return err_set_errno(err, "%s: start a thread", w->prefix);
}
