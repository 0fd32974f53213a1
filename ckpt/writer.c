/* writer.c - writes one checkpoint beside an event loop; see ckpt_writer_create() in ckpt.h and writer.h. The
 * caller's thread copies ranges into files, here; a thread of our own (writer_work.c) does everything that waits
 * for a disk.
 *
 * Two attempts at one index may meet, when a member that was told to write one is slow and another
 * was asked instead. No object is ever replaced, and `claim` holds the number of the attempt that
 * owns the folder: it is read before objects appear and before the manifest does. */
#define _GNU_SOURCE /* pthread_tryjoin_np */
#include "ckpt/writer.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

#define SYNC_BYTES (16u << 20) /* put into one file before it is worth a sync */
#define LOOK_BYTES (2u << 20)  /* ... before it is worth a look which parts are whole now */

/* ---- state ------------------------------------------------------------------------------------- */

void writer_notify(struct ckpt_writer *w) {
    uint64_t one = 1;
    ssize_t n = write(w->event, &one, sizeof one); /* full only if nobody reads: readable anyway */
    (void)n;
}

enum ckpt_state writer_state(const struct ckpt_writer *w) {
    pthread_mutex_t *mutex = (pthread_mutex_t *)(uintptr_t)&w->mutex;
    pthread_mutex_lock(mutex);
    enum ckpt_state state = w->state;
    pthread_mutex_unlock(mutex);
    return state;
}

void writer_enter(struct ckpt_writer *w, enum ckpt_state state, const struct err *why) {
    pthread_mutex_lock(&w->mutex);
    if (w->state != CKPT_FAILED) {
        w->state = state;
        if (why) w->failure = *why;
    }
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->mutex);
    writer_notify(w);
}

bool writer_aborted(struct ckpt_writer *w, struct err *err) {
    pthread_mutex_lock(&w->mutex);
    bool abort = w->abort || w->state == CKPT_FAILED;
    pthread_mutex_unlock(&w->mutex);
    if (abort) err_set(err, ERR_REFUSED, "%s: given up", w->prefix);
    return abort;
}

struct file *writer_most_dirty(struct ckpt_writer *w) {
    struct file *most = &w->file[0];
    uint64_t sum = 0;
    for (uint32_t i = 0; i < w->files; i++) {
        sum += w->file[i].dirty_bytes;
        if (w->file[i].dirty_bytes > most->dirty_bytes) most = &w->file[i];
    }
    return most->dirty_bytes >= SYNC_BYTES || sum >= CKPT_BACKLOG_BYTES ? most : NULL;
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
    else r = (!w->store->remote && writer_clear_folder(w, err)) || begin_files(w, meta->shared, err) ||
             add_small_objects(w, meta, err) || writer_start(w, err) ? -1 : 0;
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

void ckpt_writer_stop(struct ckpt_writer *w) {
    pthread_mutex_lock(&w->mutex);
    w->abort = true;
    pthread_cond_broadcast(&w->changed);
    bool waits = !w->ended && w->state != CKPT_PUBLISHED;
    pthread_mutex_unlock(&w->mutex);
    if (waits && w->store->ops->cancel) w->store->ops->cancel(w->store);
}

bool ckpt_writer_over(struct ckpt_writer *w) {
    if (w->thread_runs && !w->joined) w->joined = !pthread_tryjoin_np(w->thread, NULL);
    return !w->thread_runs || w->joined;
}

void ckpt_writer_destroy(struct ckpt_writer *w) {
    if (!w) return;
    if (!ckpt_writer_over(w)) {
        ckpt_writer_stop(w);
        pthread_join(w->thread, NULL);
    }
    writer_remove_everything(w); /* of one whose thread never was */
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
    return n > 0 && !all && writer_state(w) == CKPT_TAKING;
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
    if (!w->parts && w->store->ops->upload_behind) return 0; /* it is sent without us */
    pthread_mutex_lock(&w->mutex);
    f->dirty_bytes += (end - from) * width;
    bool worth = w->parts ? f->dirty_bytes >= LOOK_BYTES : writer_most_dirty(w) != NULL;
    if (w->parts && worth) f->dirty_bytes = 0;
    if (worth) pthread_cond_broadcast(&w->changed);
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
        writer_enter(w, CKPT_FAILED, &e);
        if (err) *err = e;
        return -1;
    }
    if (n) note_taken(w, first, first + n);
    return 0;
}

uint64_t ckpt_writer_backlog_bytes(const struct ckpt_writer *w) {
    pthread_mutex_t *mutex = (pthread_mutex_t *)(uintptr_t)&w->mutex;
    uint64_t (*behind)(struct ckpt_upload *) = w->store->ops->upload_behind, sum = 0;
    pthread_mutex_lock(mutex);
    for (uint32_t i = 0; w->state == CKPT_TAKING && i < w->files; i++) /* later the worker may free uploads */
        sum += w->file[i].dirty_bytes + (behind ? behind(w->file[i].upload) : 0);
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
    writer_enter(w, CKPT_FINISHING, NULL);
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

const void *ckpt_writer_manifest(const struct ckpt_writer *w, size_t *length) {
    assert(writer_state(w) == CKPT_UNSIGNED);
    *length = w->manifest_bytes.length;
    return w->manifest_bytes.data;
}

int ckpt_writer_publish(struct ckpt_writer *w, uint64_t term, const struct proto_sig *signature,
                        const struct proto_key *key, struct proto_bytes delegation,
                        const struct proto_sig *delegation_signature, struct err *err) {
    assert(writer_state(w) == CKPT_UNSIGNED);
    struct manifest_sig s = {*key, term, *signature, *delegation_signature,
                             {malloc(delegation.length + 1u), delegation.length}};
    if (!s.delegation.data) return err_set(err, ERR_MEMORY, "%s: out of memory", w->prefix);
    memcpy(s.delegation.data, delegation.data, delegation.length);
    if (term > INT64_MAX) err_set(err, ERR_REFUSED, "%s: term %" PRIu64, w->prefix, term);
    else if (!manifest_sig_check(&s, &w->genesis, &w->manifest.facts.run, &w->manifest_bytes, err)) {
        w->sig = s;
        writer_enter(w, CKPT_PUBLISHING, NULL);
        return 0;
    }
    manifest_sig_release(&s);
    return -1;
}
