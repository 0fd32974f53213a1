/* writer.c - writes one checkpoint beside an event loop. The caller's thread copies ranges into
 * files; a thread of our own does everything that waits for a disk, in one straight story
 * (worker_main): small objects, syncing as bytes come, completing, hashing, and after the
 * signature came, publishing.
 *
 * Two attempts at one index may meet, when a member that was told to write one is slow and another
 * was asked instead. No object is ever replaced, and `claim` holds the number of the attempt that
 * owns the folder: it is read before objects appear and before the manifest does. */
#define _GNU_SOURCE /* gettid */
#include "ckpt/internal.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define SYNC_BYTES (16u << 20) /* put into one file before it is worth a sync */
#define WORKER_NICE 10
#define LATEST_TRIES_MAX 8
#define SMALL_MAX 16
#define NOTES_MAX 32 /* parts that are with others at a time, and what the caller has not taken yet */
#define CLAIM_BYTES 16

/* A tensor file on its way. */
struct file {
    char name[CKPT_NAME_BYTES_MAX + 1]; /* with the prefix */
    const struct image_file *of;
    struct ckpt_upload *upload;
    uint64_t dirty_bytes; /* put and not synced; under the mutex */
    bool completed;
    uint32_t first_part, parts; /* of the writer's; 0: too small to be shared */
};

/* A part that others may send and look at. */
/* OURS: nobody else will; SENDING: we do; OVER: it is done, by others or sent by us. */
enum turn { TURN_OPEN, TURN_THEIRS, TURN_OURS, TURN_SENDING, TURN_OVER };
struct shared {
    struct file *file;
    uint32_t number; /* in the file */
    enum turn turn;  /* first of sending, then of looking; under the mutex */
};

struct small {
    const char *name;
    struct ckpt_blob blob;
    bool put;
};

struct range {
    uint64_t first, end;
};

struct ckpt_writer {
    struct ckpt_store *store;
    char prefix[CKPT_PREFIX_BYTES_MAX + 1];
    uint8_t claim[CLAIM_BYTES];
    struct msg_genesis genesis;
    uint64_t elements;
    struct manifest manifest; /* objects in the order they were added; digests come in the end */

    enum ckpt_weights weights;
    struct ckpt_image *image;
    struct file *file; /* of the image's */
    uint32_t files;
    uint16_t *narrow; /* room for as many elements as ever came at once */
    size_t narrow_room;
    struct small small[SMALL_MAX];
    uint32_t small_count;

    struct shared *part; /* NULL: nothing is shared */
    uint32_t parts;

    struct range *taken; /* ascending, disjoint, not touching; the caller's thread only */
    size_t taken_count, taken_capacity;

    struct ckpt_blob manifest_bytes;
    struct manifest_sig sig;
    bool manifest_tried; /* from here on it may be there, and we remove nothing */
    bool settled;        /* what was put stays, or is removed again */

    int event;
    pthread_t thread;
    bool thread_runs;
    pthread_mutex_t mutex; /* guards all from `state` on and every dirty_bytes */
    pthread_cond_t changed;
    enum ckpt_state state;
    bool alone; /* nobody answers for parts any more */
    uint32_t with_others, room; /* parts; and how many others seem to have room for */
    struct ckpt_note note[NOTES_MAX]; /* a ring */
    uint32_t note_first, note_count;
    bool abort, putting, ended; /* the caller's thread is in put_part; the worker waits for nothing more */
    struct err failure;
};

/* ---- state ------------------------------------------------------------------------------------- */

static void notify(struct ckpt_writer *w) {
    uint64_t one = 1;
    ssize_t n = write(w->event, &one, sizeof one); /* full only if nobody reads: readable anyway */
    (void)n;
}

static enum ckpt_state state_of(const struct ckpt_writer *w) {
    pthread_mutex_t *mutex = (pthread_mutex_t *)(uintptr_t)&w->mutex;
    pthread_mutex_lock(mutex);
    enum ckpt_state state = w->state;
    pthread_mutex_unlock(mutex);
    return state;
}

/* The first failure is the one that counts. */
static void enter(struct ckpt_writer *w, enum ckpt_state state, const struct err *why) {
    pthread_mutex_lock(&w->mutex);
    if (w->state != CKPT_FAILED) {
        w->state = state;
        if (why) w->failure = *why;
    }
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->mutex);
    notify(w);
}

static bool aborted(struct ckpt_writer *w, struct err *err) {
    pthread_mutex_lock(&w->mutex);
    bool abort = w->abort || w->state == CKPT_FAILED;
    pthread_mutex_unlock(&w->mutex);
    if (abort) err_set(err, ERR_REFUSED, "%s: given up", w->prefix);
    return abort;
}

/* ---- the worker -------------------------------------------------------------------------------- */

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
        if (aborted(w, err)) return -1;
        object_name(w->prefix, s->name, name);
        if (w->store->ops->put(w->store, name, s->blob.data, s->blob.length, CKPT_ABSENT, err)) return -1;
        s->put = true;
        w->manifest.object[w->files + i].digest = digest_of(s->blob.data, s->blob.length);
    }
    return 0;
}

/* The file worth a sync: with much in it, or the fullest of many with little, once all together hold the
 * caller up. Under the mutex. */
static struct file *most_dirty(struct ckpt_writer *w) {
    struct file *most = &w->file[0];
    uint64_t sum = 0;
    for (uint32_t i = 0; i < w->files; i++) {
        sum += w->file[i].dirty_bytes;
        if (w->file[i].dirty_bytes > most->dirty_bytes) most = &w->file[i];
    }
    return most->dirty_bytes >= SYNC_BYTES || sum >= CKPT_BACKLOG_BYTES ? most : NULL;
}

/* While ranges come: keep few bytes in memory that are not on disk, so that the last sync is
 * short and the caller's writes never wait for the disk. Returns when nothing more will come. */
static int sync_while_taking(struct ckpt_writer *w, struct err *err) {
    int r = 0;
    pthread_mutex_lock(&w->mutex);
    while (!r && w->state == CKPT_TAKING && !w->abort) {
        struct file *f = most_dirty(w);
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
    return r || aborted(w, err) ? -1 : 0;
}

/* ---- parts that others send and look at -------------------------------------------------------- */

/* With the mutex. */
static void leave_note(struct ckpt_writer *w, const struct ckpt_note *n) {
    while (w->note_count == NOTES_MAX && !w->abort) pthread_cond_wait(&w->changed, &w->mutex);
    if (w->abort) return;
    w->note[(w->note_first + w->note_count++) % NOTES_MAX] = *n;
    notify(w);
}

static int make_note(struct ckpt_writer *w, uint32_t i, enum ckpt_note_kind kind, struct ckpt_note *n,
                     struct err *err) {
    const struct file *f = w->part[i].file;
    const struct ckpt_store_ops *ops = w->store->ops;
    struct ckpt_piece piece;
    *n = (struct ckpt_note){.kind = kind, .number = i, .object = f->of->name};
    if (kind == CKPT_NOTE_LOOKED) return 0;
    if (kind == CKPT_NOTE_SEND ? ops->upload_offer(f->upload, w->part[i].number, &n->part, err)
                               : ops->upload_check(f->upload, w->part[i].number, &n->part, err))
        return -1;
    if (ckpt_image_find(w->image, n->object, n->part.offset, n->part.bytes, &piece, err)) return -1;
    n->first = piece.first;
    return 0;
}

/* The next part to be given to others; parts if there is none just now. With the mutex. */
static uint32_t next_open(struct ckpt_writer *w, enum ckpt_note_kind kind, uint32_t from) {
    while (from < w->parts &&
           (w->part[from].turn != TURN_OPEN ||
            (kind == CKPT_NOTE_SEND && !w->store->ops->upload_whole(w->part[from].file->upload,
                                                                    w->part[from].number))))
        from++;
    return from;
}

/* What nobody else takes we send, some at a time. How many are on their way; -1: it failed. With the
 * mutex. */
static int send_ours(struct ckpt_writer *w, struct err *err) {
    const struct ckpt_store_ops *ops = w->store->ops;
    uint32_t under_way = 0, most = w->store->streams ? w->store->streams : 1;
    for (uint32_t i = 0; i < w->parts; i++) {
        struct shared *s = &w->part[i];
        if (s->turn == TURN_SENDING && ops->upload_sent(s->file->upload, s->number)) s->turn = TURN_OVER;
        under_way += s->turn == TURN_SENDING;
    }
    for (uint32_t i = 0; i < w->parts && under_way < most; i++) {
        struct shared *s = &w->part[i];
        bool ours = s->turn == TURN_OURS ||
                    (w->alone && s->turn == TURN_OPEN && ops->upload_whole(s->file->upload, s->number));
        if (!ours) continue;
        if (ops->upload_send(s->file->upload, s->number, err)) return -1;
        s->turn = TURN_SENDING;
        under_way++;
    }
    return (int)under_way;
}

/* Is it clear of each part what becomes of it? Of a part that we look at, not before all others are. */
static bool all_clear(const struct ckpt_writer *w, enum ckpt_note_kind kind) {
    for (uint32_t i = 0; i < w->parts; i++)
        if (w->part[i].turn != TURN_OVER && !(kind == CKPT_NOTE_CHECK &&
                                              (w->part[i].turn == TURN_OURS || w->alone)))
            return false;
    return w->state != CKPT_TAKING;
}

/* Until something changes. Our own sender tells nobody when it is done with a part. */
static void wait_for_change(struct ckpt_writer *w, bool sending) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 50000000;
    if (until.tv_nsec >= 1000000000) until.tv_nsec -= 1000000000, until.tv_sec++;
    if (sending) pthread_cond_timedwait(&w->changed, &w->mutex, &until);
    else pthread_cond_wait(&w->changed, &w->mutex);
}

/* Give all parts to others as far as they have room, send the rest, and wait for what becomes of them. While
 * ranges come, a part is given once it is whole. Where one came back, no more are offered than others have,
 * and one more whenever one of theirs is done or our own sender has room for it. */
static int let_others(struct ckpt_writer *w, enum ckpt_note_kind kind, struct err *err) {
    int r = 0;
    pthread_mutex_lock(&w->mutex);
    for (uint32_t i = 0; i < w->parts; i++) w->part[i].turn = TURN_OPEN;
    w->room = NOTES_MAX;
    while (!r && !w->abort && w->state != CKPT_FAILED && !all_clear(w, kind)) {
        int sending = kind == CKPT_NOTE_SEND ? send_ours(w, err) : 0;
        if ((r = sending < 0 ? -1 : 0)) break;
        bool more = w->with_others < w->room || (w->with_others < NOTES_MAX &&
                                                 (uint32_t)sending < w->store->streams);
        uint32_t i = w->alone || !more ? w->parts : next_open(w, kind, 0);
        if (i == w->parts) {
            if (!all_clear(w, kind)) wait_for_change(w, sending > 0);
            continue;
        }
        struct ckpt_note note;
        w->part[i].turn = TURN_THEIRS;
        w->with_others++;
        pthread_mutex_unlock(&w->mutex);
        r = make_note(w, i, kind, &note, err);
        pthread_mutex_lock(&w->mutex);
        if (!r) leave_note(w, &note);
    }
    pthread_mutex_unlock(&w->mutex);
    return r || aborted(w, err) ? -1 : 0;
}

/* What the store has must be what we put. */
static int look_at(struct ckpt_writer *w, uint32_t i, struct err *err) {
    const struct file *f = w->part[i].file;
    struct ckpt_part p;
    if (aborted(w, err) || w->store->ops->upload_check(f->upload, w->part[i].number, &p, err)) return -1;
    uint8_t *bytes = malloc((size_t)p.bytes);
    if (!bytes) return err_set(err, ERR_MEMORY, "%s: out of memory for a part", w->prefix);
    int r = object_get(w->store, f->name, p.offset, bytes, (size_t)p.bytes, err);
    if (!r && (r = ckpt_part_matches(&p, bytes, err)))
        err_prefix(err, "%.100s: the store gives back other bytes in part %u", f->name, w->part[i].number + 1);
    free(bytes);
    return r;
}

/* We look at what nobody else did, and at one part of each file, whoever did: drawn now, so nobody knew
 * which. */
static int look_ourselves(struct ckpt_writer *w, struct err *err) {
    uint32_t draw = 0;
    ssize_t got = getrandom(&draw, sizeof draw, 0);
    (void)got; /* the first part of each then */
    int r = 0;
    for (uint32_t i = 0; !r && i < w->parts; i++) {
        const struct file *f = w->part[i].file;
        bool drawn = i - f->first_part == draw % f->parts;
        if (w->part[i].turn == TURN_OVER && !drawn) continue;
        struct ckpt_note note;
        if ((r = look_at(w, i, err))) break;
        make_note(w, i, CKPT_NOTE_LOOKED, &note, NULL);
        pthread_mutex_lock(&w->mutex);
        leave_note(w, &note);
        pthread_mutex_unlock(&w->mutex);
    }
    return r;
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
    return aborted(h->writer, err) ? -1 : rooting_block(h->root, offset, data, n, err);
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
    if (aborted(w, err) || w->store->ops->upload_complete(f->upload, err)) return -1;
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
    return r || !w->parts ? r : let_others(w, CKPT_NOTE_CHECK, err) || look_ourselves(w, err) ? -1 : 0;
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
    return aborted(w, err) ? -1 : 0;
}

static int clear_folder(struct ckpt_writer *w, struct err *err) {
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

/* All that an attempt without an end put or began, once. */
static void remove_everything(struct ckpt_writer *w) {
    for (uint32_t i = 0; w->file && i < w->files; i++) {
        w->store->ops->upload_destroy(w->file[i].upload);
        w->file[i].upload = NULL;
    }
    if (!w->settled && !manifest_there(w)) remove_objects(w);
    w->settled = true;
}

/* The end without a checkpoint. Behind a network the cleaning is done here, as it waits for that; not
 * where the network was what failed. The caller, who puts perhaps at this moment, is told then. */
static void give_up(struct ckpt_writer *w, const struct err *why) {
    pthread_mutex_lock(&w->mutex);
    if (w->state != CKPT_FAILED) {
        w->state = CKPT_FAILED;
        w->failure = *why;
    }
    while (w->putting) pthread_cond_wait(&w->changed, &w->mutex);
    pthread_mutex_unlock(&w->mutex);
    if (w->store->remote && why->code != ERR_TIMEOUT) remove_everything(w);
}

static void end_worker(struct ckpt_writer *w) {
    pthread_mutex_lock(&w->mutex);
    w->ended = true;
    pthread_mutex_unlock(&w->mutex);
    notify(w);
}

static void *worker_main(void *arg) {
    struct ckpt_writer *w = arg;
    struct err err = {0};
    setpriority(PRIO_PROCESS, (id_t)gettid(), WORKER_NICE); /* on Linux: of this thread */
    if ((w->store->remote && clear_folder(w, &err)) || put_small_objects(w, &err) ||
        (w->parts ? let_others(w, CKPT_NOTE_SEND, &err) : sync_while_taking(w, &err)) ||
        complete_files(w, &err) ||
        manifest_format(&w->manifest, &w->manifest_bytes, &err))
        goto failed;
    if (w->manifest_bytes.length > CKPT_MANIFEST_BYTES_MAX) {
        err_set(&err, ERR_FULL, "%s: manifest of %zu bytes, at most %u fit a message: use larger files",
                w->prefix, w->manifest_bytes.length, CKPT_MANIFEST_BYTES_MAX);
        goto failed;
    }
    enter(w, CKPT_UNSIGNED, NULL);
    if (wait_for_signature(w, &err) || publish(w, &err)) goto failed;
    w->settled = true;
    enter(w, CKPT_PUBLISHED, NULL);
    end_worker(w);
    return NULL;
failed:
    give_up(w, &err);
    end_worker(w);
    return NULL;
}

static int start_worker(struct ckpt_writer *w, struct err *err) {
    sigset_t all, before; /* signals are the caller's business */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int e = pthread_create(&w->thread, NULL, worker_main, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    errno = e;
    if (e) return err_set_errno(err, "%s: start a thread", w->prefix);
    w->thread_runs = true;
    return 0;
}

/* ---- create ------------------------------------------------------------------------------------ */

static int add_object(struct ckpt_writer *w, const char *name, uint64_t bytes, struct err *err) {
    struct manifest *m = &w->manifest;
    if (m->count == CKPT_OBJECTS_MAX)
        return err_set(err, ERR_FULL, "%s: more than %u files: use larger ones", w->prefix, CKPT_OBJECTS_MAX);
    m->object[m->count].bytes = bytes;
    snprintf(m->object[m->count++].name, sizeof m->object->name, "%s", name);
    return 0;
}

static int list_parts(struct ckpt_writer *w, struct err *err) {
    w->part = calloc(w->parts, sizeof *w->part);
    if (!w->part) return err_set(err, ERR_MEMORY, "%s: out of memory for %u parts", w->prefix, w->parts);
    for (uint32_t i = 0; i < w->files; i++)
        for (uint32_t k = 0; k < w->file[i].parts; k++)
            w->part[w->file[i].first_part + k] = (struct shared){&w->file[i], k, TURN_OPEN};
    return 0;
}

static int begin_files(struct ckpt_writer *w, bool shared, struct err *err) {
    shared = shared && w->store->ops->upload_share;
    for (uint32_t i = 0; i < w->files; i++) {
        struct file *f = &w->file[i];
        f->of = &w->image->file[i];
        if (add_object(w, f->of->name, f->of->bytes, err)) return -1;
        object_name(w->prefix, f->of->name, f->name);
        f->upload = w->store->ops->upload_begin(w->store, f->name, f->of->bytes, err);
        if (!f->upload) return -1;
        if (shared) f->parts = w->store->ops->upload_share(f->upload);
        f->first_part = w->parts;
        w->parts += f->parts;
        if (w->store->ops->upload_put(f->upload, 0, f->of->header.data, f->of->header.length, err)) return -1;
    }
    return w->parts ? list_parts(w, err) : 0;
}

/* Take over *blob, whose making gave `failed`. */
static int add_small(struct ckpt_writer *w, const char *name, int failed,
                     const struct ckpt_blob *blob, struct err *err) {
    if (failed) return -1;
    assert(w->small_count < SMALL_MAX);
    w->small[w->small_count++] = (struct small){.name = name, .blob = *blob};
    return add_object(w, name, blob->length, err);
}

static int add_cursor(struct ckpt_writer *w, const struct ckpt_meta *meta, struct err *err) {
    struct ckpt_blob b = {0};
    uint32_t count = meta->spent_count;
    struct msg_range *spent = calloc(count + 1u, sizeof *spent);
    if (!spent) return err_set(err, ERR_MEMORY, "out of memory for %u ranges", count);
    if (count) memcpy(spent, meta->spent, count * sizeof *spent);
    int r = ranges_normalise(spent, &count, err) ||
            cursor_format(&w->manifest.facts, spent, count, &b, err);
    free(spent);
    return add_small(w, "cursor.json", r, &b, err);
}

static int add_genesis(struct ckpt_writer *w, const struct ckpt_meta *meta, struct err *err) {
    struct ckpt_blob b = {malloc(meta->genesis.length + 1u), meta->genesis.length};
    if (!b.data) return err_set(err, ERR_MEMORY, "out of memory for the genesis");
    memcpy(b.data, meta->genesis.data, b.length);
    return add_small(w, "genesis.bin", 0, &b, err);
}

static int add_index(void *w, const char *name, int failed, const struct ckpt_blob *blob, struct err *err) {
    return add_small(w, name, failed, blob, err);
}

/* Of "bytes" it is made here; that of another one lies with the corpus, and the caller may have it. */
static int add_tokenizer(struct ckpt_writer *w, const struct ckpt_meta *meta, struct err *err) {
    const char *name = w->manifest.tokenizer;
    const struct proto_bytes *given = &meta->tokenizer_json;
    struct ckpt_blob b = {0};
    int r = 0;
    if (!strcmp(name, CKPT_TOKENIZER_BYTES)) r = hf_tokenizer_format(&b, err);
    else if (given->length && !(b.data = malloc(given->length)))
        r = err_set(err, ERR_MEMORY, "%s: out of memory", w->prefix);
    else if (given->length) memcpy(b.data, given->data, b.length = given->length);
    if ((r || b.data) && add_small(w, "tokenizer.json", r, &b, err)) return -1;
    b = (struct ckpt_blob){0};
    return add_small(w, "tokenizer_config.json",
                     hf_tokenizer_config_format(w->genesis.model, name, &b, err), &b, err);
}

static int add_small_objects(struct ckpt_writer *w, const struct ckpt_meta *meta, struct err *err) {
    const struct msg_model *m = w->genesis.model;
    struct ckpt_blob b = {0};
    return add_genesis(w, meta, err) ||
           add_small(w, "ledger.bin", ledger_format(meta->ledger, meta->ledger_count, &b, err), &b, err) ||
           add_cursor(w, meta, err) ||
           add_small(w, "config.json",
                     hf_config_format(m, w->file[0].of->dtype, w->genesis.init_std, &b, err), &b, err) ||
           add_small(w, "generation_config.json", hf_generation_config_format(&b, err), &b, err) ||
           add_tokenizer(w, meta, err) ||
           image_indices(w->image, m, w->weights, add_index, w, err)
               ? -1 : 0;
}

/* Everything about the run that the manifest says, from the caller's meta. */
static int take_meta(struct ckpt_writer *w, const struct ckpt_meta *meta, struct err *err) {
    struct ckpt_facts *f = &w->manifest.facts;
    char *tokenizer = w->manifest.tokenizer;
    if (proto_decode(meta->genesis.data, meta->genesis.length, RECORD_genesis, &w->genesis, err)) {
        if (err) err->code = ERR_CORRUPT;
        return -1;
    }
    if (w->genesis.model_count != 1 || w->genesis.corpus_count != 1 || w->genesis.outer_count != 1)
        return err_set(err, ERR_CORRUPT, "genesis: a model, a corpus and an outer step are expected");
    if (proto_model_check(w->genesis.model, err)) return -1;
    if (meta->index > INT64_MAX || meta->round > INT64_MAX || meta->tokens_committed > INT64_MAX)
        return err_set(err, ERR_CORRUPT, "checkpoint of ledger index %" PRIu64 ", round %" PRIu64
                       ", %" PRIu64 " tokens: numbers end at 2^63", meta->index, meta->round,
                       meta->tokens_committed);
    proto_str_copy(w->genesis.corpus->tokenizer, tokenizer, sizeof w->manifest.tokenizer);
    f->run = digest_of(meta->genesis.data, meta->genesis.length);
    f->state_root = meta->state_root;
    f->index = meta->index;
    f->round = meta->round;
    f->tokens_committed = meta->tokens_committed;
    w->elements = proto_model_elements(w->genesis.model);
    ckpt_prefix(meta->index, w->prefix);
    return ledger_check(meta->ledger, meta->ledger_count, meta->index, &f->ledger_head, err);
}

static int begin(struct ckpt_writer *w, const struct ckpt_meta *meta, uint64_t shard_bytes,
                 struct err *err) {
    w->weights = meta->weights;
    if (take_meta(w, meta, err) ||
        !(w->image = ckpt_image_create(w->genesis.model, w->weights, shard_bytes, err)))
        return -1;
    w->files = w->image->files;
    w->file = calloc(w->files, sizeof *w->file);
    w->manifest.object = calloc(CKPT_OBJECTS_MAX, sizeof *w->manifest.object);
    int r = -1;
    if (!w->file || !w->manifest.object) err_set(err, ERR_MEMORY, "%s: out of memory", w->prefix);
    else if (getrandom(w->claim, sizeof w->claim, 0) != CLAIM_BYTES) err_set_errno(err, "getrandom");
    else if ((w->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) < 0) err_set_errno(err, "eventfd");
    else r = (!w->store->remote && clear_folder(w, err)) || begin_files(w, meta->shared, err) ||
             add_small_objects(w, meta, err) || start_worker(w, err) ? -1 : 0;
    return r;
}

struct ckpt_writer *ckpt_writer_create(struct ckpt_store *store, const struct ckpt_meta *meta,
                                       uint64_t shard_bytes, struct err *err) {
    struct ckpt_writer *w = calloc(1, sizeof *w);
    if (!w) {
        err_set(err, ERR_MEMORY, "checkpoint: out of memory");
        return NULL;
    }
    w->store = store;
    w->event = -1;
    pthread_mutex_init(&w->mutex, NULL);
    pthread_cond_init(&w->changed, NULL);
    if (!begin(w, meta, shard_bytes, err)) return w;
    err_prefix(err, "checkpoint %" PRIu64, meta->index);
    ckpt_writer_destroy(w);
    return NULL;
}

/* ---- destroy ----------------------------------------------------------------------------------- */

void ckpt_writer_destroy(struct ckpt_writer *w) {
    if (!w) return;
    if (w->thread_runs) {
        pthread_mutex_lock(&w->mutex);
        w->abort = true;
        pthread_cond_broadcast(&w->changed);
        bool waits = !w->ended && w->state != CKPT_PUBLISHED;
        pthread_mutex_unlock(&w->mutex);
        if (waits && w->store->ops->cancel) w->store->ops->cancel(w->store);
        pthread_join(w->thread, NULL);
    }
    remove_everything(w);
    for (uint32_t i = 0; i < w->small_count; i++) free(w->small[i].blob.data);
    free(w->file);
    free(w->part);
    ckpt_image_destroy(w->image);
    free(w->taken);
    free(w->narrow);
    free(w->manifest_bytes.data);
    manifest_sig_release(&w->sig);
    manifest_release(&w->manifest);
    proto_decoded_release(RECORD_genesis, &w->genesis);
    if (w->event >= 0) close(w->event);
    pthread_mutex_destroy(&w->mutex);
    pthread_cond_destroy(&w->changed);
    free(w);
}

/* ---- put --------------------------------------------------------------------------------------- */

/* Index of the first taken range that ends after `first`. */
static size_t taken_after(const struct ckpt_writer *w, uint64_t first) {
    size_t low = 0, high = w->taken_count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (w->taken[middle].end <= first) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* Room for one more, so that nothing can fail between writing a range and noting it. */
static int reserve_taken(struct ckpt_writer *w, struct err *err) {
    if (w->taken_count < w->taken_capacity) return 0;
    size_t more = w->taken_capacity ? 2 * w->taken_capacity : 64;
    struct range *grown = realloc(w->taken, more * sizeof *grown);
    if (!grown) return err_set(err, ERR_MEMORY, "%s: out of memory for %zu ranges", w->prefix, more);
    w->taken = grown;
    w->taken_capacity = more;
    return 0;
}

static void note_taken(struct ckpt_writer *w, uint64_t first, uint64_t end) {
    size_t at = taken_after(w, first);
    bool joins_before = at > 0 && w->taken[at - 1].end == first;
    bool joins_after = at < w->taken_count && w->taken[at].first == end;
    if (joins_before && joins_after) {
        w->taken[at - 1].end = w->taken[at].end;
        memmove(&w->taken[at], &w->taken[at + 1], (--w->taken_count - at) * sizeof *w->taken);
    } else if (joins_before) {
        w->taken[at - 1].end = end;
    } else if (joins_after) {
        w->taken[at].first = first;
    } else {
        memmove(&w->taken[at + 1], &w->taken[at], (w->taken_count++ - at) * sizeof *w->taken);
        w->taken[at] = (struct range){first, end};
    }
}

bool ckpt_writer_wants(const struct ckpt_writer *w, uint64_t first, uint64_t n) {
    size_t at = taken_after(w, first);
    bool all = at < w->taken_count && w->taken[at].first <= first && w->taken[at].end >= first + n;
    return n > 0 && !all && state_of(w) == CKPT_TAKING;
}

/* The part of elements [first, first + n) that lies in f, as f's dtype. */
static int put_part(struct ckpt_writer *w, struct file *f, uint64_t first, uint64_t n, const void *values,
                    struct err *err) {
    size_t width = safetensors_width(f->of->dtype);
    uint64_t from = first > f->of->first ? first : f->of->first;
    uint64_t end = first + n < f->of->first + f->of->count ? first + n : f->of->first + f->of->count;
    if (from >= end) return 0;
    if (w->store->ops->upload_put(f->upload, f->of->header.length + (from - f->of->first) * width,
                                  (const uint8_t *)values + (from - first) * width,
                                  (size_t)(end - from) * width, err))
        return -1;
    pthread_mutex_lock(&w->mutex);
    if (!w->parts) f->dirty_bytes += (end - from) * width;
    if (w->parts || most_dirty(w)) pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->mutex);
    return 0;
}

static int put_all(struct ckpt_writer *w, uint64_t first, size_t n, const float *anchor,
                   const float *momentum, struct err *err) {
    if (w->weights == CKPT_BF16) safetensors_narrow(anchor, w->narrow, n);
    for (uint32_t i = 0; i < w->files; i++) {
        struct file *f = &w->file[i];
        const void *values = f->of->dtype == SAFETENSORS_BF16 ? w->narrow
                           : f->of->momentum                  ? (const void *)momentum : anchor;
        if (put_part(w, f, first, n, values, err)) return -1;
    }
    return 0;
}

static int reserve_narrow(struct ckpt_writer *w, size_t n, struct err *err) {
    if (w->weights != CKPT_BF16 || n <= w->narrow_room) return 0;
    uint16_t *grown = realloc(w->narrow, n * sizeof *grown);
    if (!grown) return err_set(err, ERR_MEMORY, "%s: out of memory for %zu weights", w->prefix, n);
    w->narrow = grown;
    w->narrow_room = n;
    return 0;
}

/* While this is set the worker frees no upload. -1: it has failed meanwhile, and may. */
static int set_putting(struct ckpt_writer *w, bool putting, struct err *err) {
    pthread_mutex_lock(&w->mutex);
    bool failed = putting && w->state == CKPT_FAILED;
    w->putting = putting && !failed;
    if (failed && err) *err = w->failure;
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->mutex);
    return failed ? -1 : 0;
}

int ckpt_writer_put(struct ckpt_writer *w, uint64_t first, size_t n, const float *anchor,
                    const float *momentum, struct err *err) {
    pthread_mutex_lock(&w->mutex);
    enum ckpt_state state = w->state;
    if (state == CKPT_FAILED && err) *err = w->failure;
    pthread_mutex_unlock(&w->mutex);
    if (state == CKPT_FAILED) return -1;
    if (state != CKPT_TAKING)
        return err_set(err, ERR_REFUSED, "%s: all elements were put before", w->prefix);
    if (first > w->elements || n > w->elements - first)
        return err_set(err, ERR_REFUSED, "%s: %zu elements from %" PRIu64 ", the vector has %" PRIu64,
                       w->prefix, n, first, w->elements);
    size_t at = taken_after(w, first);
    if (n > 0 && at < w->taken_count && w->taken[at].first < first + n)
        return err_set(err, ERR_REFUSED, "%s: element %" PRIu64 " was put before", w->prefix,
                       w->taken[at].first > first ? w->taken[at].first : first);
    struct err e = {0};
    int r = reserve_taken(w, &e) || reserve_narrow(w, n, &e) || set_putting(w, true, &e) ? -1 : 0;
    if (!r) r = put_all(w, first, n, anchor, momentum, &e);
    set_putting(w, false, NULL);
    if (r) {
        enter(w, CKPT_FAILED, &e);
        if (err) *err = e;
        return -1;
    }
    if (n) note_taken(w, first, first + n);
    return 0;
}

uint64_t ckpt_writer_backlog_bytes(const struct ckpt_writer *w) {
    pthread_mutex_t *mutex = (pthread_mutex_t *)(uintptr_t)&w->mutex;
    uint64_t sum = 0;
    pthread_mutex_lock(mutex);
    for (uint32_t i = 0; i < w->files; i++) sum += w->file[i].dirty_bytes;
    pthread_mutex_unlock(mutex);
    return sum;
}

/* ---- the end ----------------------------------------------------------------------------------- */

int ckpt_writer_finish(struct ckpt_writer *w, struct err *err) {
    enum ckpt_state state = ckpt_writer_poll(w, err);
    if (state == CKPT_FAILED) return -1;
    assert(state == CKPT_TAKING); /* finished twice */
    uint64_t missing = w->taken_count && w->taken[0].first == 0 ? w->taken[0].end : 0;
    if (missing != w->elements)
        return err_set(err, ERR_REFUSED, "%s: element %" PRIu64 " of %" PRIu64 " is still missing",
                       w->prefix, missing, w->elements);
    enter(w, CKPT_FINISHING, NULL);
    return 0;
}

int ckpt_writer_fd(const struct ckpt_writer *w) { return w->event; }

enum ckpt_state ckpt_writer_poll(struct ckpt_writer *w, struct err *err) {
    uint64_t count;
    ssize_t n = read(w->event, &count, sizeof count); /* before the look: no change is missed */
    (void)n;
    pthread_mutex_lock(&w->mutex);
    enum ckpt_state state = w->state;
    if (state == CKPT_FAILED && err) *err = w->failure;
    pthread_mutex_unlock(&w->mutex);
    return state;
}

bool ckpt_writer_note(struct ckpt_writer *w, struct ckpt_note *out) {
    pthread_mutex_lock(&w->mutex);
    bool any = w->note_count > 0;
    if (any) {
        *out = w->note[w->note_first];
        w->note_first = (w->note_first + 1) % NOTES_MAX;
        w->note_count--;
        pthread_cond_broadcast(&w->changed);
    }
    pthread_mutex_unlock(&w->mutex);
    return any;
}

void ckpt_writer_settle(struct ckpt_writer *w, uint32_t number, bool done) {
    pthread_mutex_lock(&w->mutex);
    if (number < w->parts && w->part[number].turn == TURN_THEIRS) {
        w->part[number].turn = done ? TURN_OVER : TURN_OURS;
        w->with_others--;
        w->room = done ? w->with_others + 1 : w->with_others;
        pthread_cond_broadcast(&w->changed);
    }
    pthread_mutex_unlock(&w->mutex);
}

void ckpt_writer_alone(struct ckpt_writer *w) {
    pthread_mutex_lock(&w->mutex);
    w->alone = true;
    w->with_others = 0;
    for (uint32_t i = 0; i < w->parts; i++)
        if (w->part[i].turn == TURN_THEIRS) w->part[i].turn = TURN_OURS;
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->mutex);
}

const void *ckpt_writer_manifest(const struct ckpt_writer *w, size_t *length) {
    assert(state_of(w) == CKPT_UNSIGNED);
    *length = w->manifest_bytes.length;
    return w->manifest_bytes.data;
}

int ckpt_writer_publish(struct ckpt_writer *w, uint64_t term, const struct proto_sig *signature,
                        const struct proto_key *key, struct proto_bytes delegation,
                        const struct proto_sig *delegation_signature, struct err *err) {
    assert(state_of(w) == CKPT_UNSIGNED);
    struct manifest_sig s = {*key, term, *signature, *delegation_signature,
                             {malloc(delegation.length + 1u), delegation.length}};
    if (!s.delegation.data) return err_set(err, ERR_MEMORY, "%s: out of memory", w->prefix);
    memcpy(s.delegation.data, delegation.data, delegation.length);
    if (term > INT64_MAX) err_set(err, ERR_REFUSED, "%s: term %" PRIu64, w->prefix, term);
    else if (!manifest_sig_check(&s, &w->genesis, &w->manifest.facts.run, &w->manifest_bytes, err)) {
        w->sig = s;
        enter(w, CKPT_PUBLISHING, NULL);
        return 0;
    }
    manifest_sig_release(&s);
    return -1;
}
