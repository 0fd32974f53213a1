/* checkpoint.c - drives ckpt_writer from the agent's loop; see checkpoint.h. */
#include "node/checkpoint.h"

#include <event2/event.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ckpt/ckpt.h"
#include "node/file.h"
#include "node/home.h"
#include "node/timer.h"

#define BACKLOG_WAIT_MS 5
#define ENDING_WAIT_MS 2
#define PIECE_ELEMENTS (1u << 16) /* put in one turn: half a megabyte */

struct checkpoint {
    struct event_base *base;
    uint64_t elements;
    uint32_t chunk_elements;
    char tokenizer[HOME_FILE_BYTES]; /* path of its file, or "" */
    const struct checkpoint_ops *ops;
    void *arg;
    struct event *work;         /* puts chunks; also tells of the end */
    /* The checkpoint in progress; store is NULL when there is none. */
    struct ckpt_store *store;
    struct ckpt_writer *writer;
    struct event *ready;        /* the writer's fd */
    const struct sync *sync;
    uint64_t index;
    uint64_t next;              /* the element to look at next; those of its chunk before it were put */
    bool finishing;
    struct digest manifest;     /* of the manifest's bytes, from CKPT_UNSIGNED on */
    bool ending, published;     /* it is over, and how; on_done comes once the writer's thread has ended */
    struct err failed;          /* why it is not published */
};

static void close_writer(struct checkpoint *c) {
    if (c->ready) event_free(c->ready);
    ckpt_writer_destroy(c->writer);
    if (c->store) c->store->ops->close(c->store);
    c->ready = NULL;
    c->writer = NULL;
    c->store = NULL;
    c->sync = NULL;
    c->finishing = c->ending = false;
    event_del(c->work);
}

/* The end; why: of one that is not published. The writer's thread is of low priority, and has files and
 * memory to give back: the loop does not wait for it. */
static void conclude(struct checkpoint *c, const struct err *why) {
    c->ending = true;
    c->published = !why;
    if (why) c->failed = *why;
    if (c->writer) ckpt_writer_stop(c->writer);
    if (c->ready) event_del(c->ready);
    timer_set(c->work, 0);
}

static void tell_end(struct checkpoint *c) {
    struct err why = c->failed;
    struct digest none = {0};
    bool ok = c->published;
    char where[PROTO_URL_BYTES_MAX + 1] = "";
    if (c->writer && !ckpt_writer_over(c->writer)) {
        timer_set(c->work, ENDING_WAIT_MS);
        return;
    }
    if (ok) ckpt_url(c->store->url, c->index, where, NULL);
    close_writer(c);
    c->ops->on_done(c->arg, ok, ok ? &c->manifest : &none, ok ? where : why.msg);
}

/* ---- putting --------------------------------------------------------------------------------- */

/* The end of the chunk that an element is in. */
static uint64_t end_of_chunk(const struct checkpoint *c, uint64_t element) {
    uint64_t end = (element / c->chunk_elements + 1) * c->chunk_elements;
    return end < c->elements ? end : c->elements;
}

/* Hand over elements of one chunk unless that was done. -1: the writer failed, and that was the end. */
static int put(struct checkpoint *c, uint64_t first, uint64_t end) {
    struct err err = {0};
    size_t n = (size_t)(end - first);
    if (!ckpt_writer_wants(c->writer, first, n)) return 0;
    if (!ckpt_writer_put(c->writer, first, n, sync_anchor(c->sync) + first,
                         sync_momentum(c->sync) + first, &err))
        return 0;
    conclude(c, &err);
    return -1;
}

void checkpoint_before_change(void *checkpoint, uint32_t chunk) {
    struct checkpoint *c = checkpoint;
    uint64_t first = (uint64_t)chunk * c->chunk_elements, end = end_of_chunk(c, first);
    if (!c->writer || c->finishing || c->ending) return;
    put(c, c->next > first && c->next < end ? c->next : first, end);
}

/* A piece of a chunk a turn, about half a millisecond: on a busy machine a turn that takes more than the
 * scheduler gives at once waits for everybody else's turn in its middle. */
static void work(struct checkpoint *c) {
    struct err err = {0};
    if (c->ending) {
        tell_end(c);
        return;
    }
    if (ckpt_writer_backlog_bytes(c->writer) >= CKPT_BACKLOG_BYTES) {
        timer_set(c->work, BACKLOG_WAIT_MS);
        return;
    }
    if (c->next < c->elements) {
        uint64_t first = c->next, end = end_of_chunk(c, first);
        c->next = end - first < PIECE_ELEMENTS ? end : first + PIECE_ELEMENTS;
        if (!put(c, first, c->next)) timer_set(c->work, 0);
        return;
    }
    c->finishing = true;
    if (ckpt_writer_finish(c->writer, &err)) conclude(c, &err);
}

static void told_of(struct checkpoint *c, const struct timer_turn *begun) {
    struct timer_turn turn = timer_turn_end(begun);
    c->ops->on_turn(c->arg, &turn);
}

static void on_work(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct timer_turn begun = timer_turn();
    work(arg);
    told_of(arg, &begun);
}

/* ---- the writer's own progress --------------------------------------------------------------- */

/* What was said before the state changed is told before it. */
static void tell_notes(struct checkpoint *c) {
    struct ckpt_note n;
    while (ckpt_writer_note(c->writer, &n))
        c->ops->on_note(c->arg, c->index, &n, (uint32_t)(n.first / c->chunk_elements));
}

static void follow(struct checkpoint *c) {
    struct err err = {0};
    size_t length;
    const void *manifest;
    enum ckpt_state state = ckpt_writer_poll(c->writer, &err);
    tell_notes(c);
    switch (state) {
    case CKPT_UNSIGNED:
        manifest = ckpt_writer_manifest(c->writer, &length);
        c->manifest = digest_of(manifest, length);
        c->ops->on_manifest(c->arg, manifest, length);
        break;
    case CKPT_PUBLISHED: conclude(c, NULL); break;
    case CKPT_FAILED: conclude(c, &err); break;
    case CKPT_TAKING: case CKPT_FINISHING: case CKPT_PUBLISHING: break;
    }
}

static void on_ready(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct timer_turn begun = timer_turn();
    follow(arg);
    told_of(arg, &begun);
}

void checkpoint_settle(struct checkpoint *c, const struct msg_checkpoint_part_done *msg) {
    if (c->writer && msg->index == c->index) ckpt_writer_settle(c->writer, msg->part, msg->done);
}

void checkpoint_alone(struct checkpoint *c) {
    if (c->writer) ckpt_writer_alone(c->writer);
}

void checkpoint_signed(struct checkpoint *c, uint64_t index, uint64_t term,
                       const struct proto_sig *signature, const struct uplink_welcome *w) {
    struct err err = {0};
    if (!c->writer || c->ending || index != c->index || ckpt_writer_poll(c->writer, &err) != CKPT_UNSIGNED)
        return;
    if (ckpt_writer_publish(c->writer, term, signature, &w->key, w->delegation,
                            &w->delegation_signature, &err))
        conclude(c, &err);
}

/* ---- beginning ------------------------------------------------------------------------------- */

/* The entries up to the one with the checkpoint's index. */
static int pick_ledger(const struct sync *s, uint64_t index, struct ckpt_meta *meta,
                       struct err *err) {
    uint32_t count = sync_ledger_count(s);
    struct msg_entry first;
    if (count == 0) return err_set(err, ERR_CORRUPT, "there is no ledger to put into a checkpoint");
    meta->ledger = sync_ledger_entry(s, 0);
    if (proto_decode(meta->ledger->bytes.data, meta->ledger->bytes.length, RECORD_entry, &first,
                     err))
        return -1;
    uint64_t begin = first.index;
    proto_decoded_release(RECORD_entry, &first);
    if (index < begin || index - begin >= count)
        return err_set(err, ERR_CORRUPT, "the ledger here has no entry %llu",
                       (unsigned long long)index);
    meta->ledger_count = (uint32_t)(index - begin + 1);
    return 0;
}

/* The tokenizer's file, where it is here: a name that is not "bytes" has the start of the file's digest in it. */
static uint8_t *read_tokenizer(const struct checkpoint *c, size_t *n) {
    struct stat st;
    uint8_t *bytes = NULL;
    int fd = *c->tokenizer ? open(c->tokenizer, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return NULL;
    if (!fstat(fd, &st) && st.st_size > 0 && st.st_size <= (off_t)CKPT_TOKENIZER_JSON_BYTES_MAX)
        bytes = malloc(*n = (size_t)st.st_size);
    if (bytes && file_read(fd, bytes, *n, c->tokenizer, NULL)) {
        free(bytes);
        bytes = NULL;
    }
    close(fd);
    return bytes;
}

static bool is_tokenizer_of(struct proto_bytes name, const uint8_t *bytes, size_t n) {
    char hex[DIGEST_HEX_BYTES], want[DIGEST_HEX_BYTES + 8];
    struct digest d = digest_of(bytes, n);
    digest_hex(&d, hex);
    int length = snprintf(want, sizeof want, "bpe-%.32s", hex);
    return name.length == (uint32_t)length && !memcmp(name.data, want, name.length);
}

/* *bytes stays the caller's. */
static int pick_tokenizer(const struct checkpoint *c, struct ckpt_meta *meta, uint8_t **bytes, struct err *err) {
    struct msg_genesis g;
    size_t n;
    if (!(*bytes = read_tokenizer(c, &n))) return 0;
    if (proto_decode(meta->genesis.data, meta->genesis.length, RECORD_genesis, &g, err)) return -1;
    if (g.corpus_count && is_tokenizer_of(g.corpus->tokenizer, *bytes, n))
        meta->tokenizer_json = (struct proto_bytes){*bytes, (uint32_t)n};
    proto_decoded_release(RECORD_genesis, &g);
    return 0;
}

static int begin(struct checkpoint *c, struct proto_bytes genesis,
                 const struct msg_checkpoint_write *msg, struct err *err) {
    char url[PROTO_URL_BYTES_MAX + 1], where[PROTO_URL_BYTES_MAX + 1];
    struct ckpt_meta meta = { .index = msg->index, .state_root = msg->root, .round = msg->round,
                              .tokens_committed = msg->tokens_committed, .spent = msg->spent,
                              .spent_count = msg->spent_count, .genesis = genesis, .shared = msg->shared,
                              .weights = msg->bf16 ? CKPT_BF16 : CKPT_FP32 };
    proto_str_copy(msg->url, where, sizeof where);
    ckpt_store_url(where, msg->index, url);
    if (pick_ledger(c->sync, msg->index, &meta, err)) return -1;
    if (!(c->store = ckpt_store_open(url, true, err))) return -1;
    uint8_t *tokenizer = NULL;
    if (!pick_tokenizer(c, &meta, &tokenizer, err)) c->writer = ckpt_writer_create(c->store, &meta, 0, err);
    free(tokenizer);
    if (!c->writer) return -1;
    c->ready = event_new(c->base, ckpt_writer_fd(c->writer), EV_READ | EV_PERSIST, on_ready, c);
    if (!c->ready || event_add(c->ready, NULL))
        return err_set(err, ERR_MEMORY, "no memory for a checkpoint's event");
    return 0;
}

void checkpoint_begin(struct checkpoint *c, const struct sync *s, struct proto_bytes genesis,
                      const struct msg_checkpoint_write *msg) {
    struct err err = {0};
    struct timer_turn begun = timer_turn();
    close_writer(c);
    c->sync = s;
    c->index = msg->index;
    c->next = 0;
    if (begin(c, genesis, msg, &err))
        conclude(c, &err);
    else
        timer_set(c->work, 0);
    told_of(c, &begun);
}

/* ---- life ------------------------------------------------------------------------------------ */

struct checkpoint *checkpoint_create(struct event_base *base, uint64_t elements, uint32_t chunk_elements,
                                     const char *tokenizer, const struct checkpoint_ops *ops, void *arg) {
    struct checkpoint *c = calloc(1, sizeof *c);
    if (!c || !(c->work = evtimer_new(base, on_work, c))) {
        free(c);
        return NULL;
    }
    c->base = base;
    c->elements = elements;
    c->chunk_elements = chunk_elements;
    c->ops = ops;
    c->arg = arg;
    if (tokenizer) snprintf(c->tokenizer, sizeof c->tokenizer, "%s", tokenizer);
    return c;
}

void checkpoint_destroy(struct checkpoint *c) {
    if (!c) return;
    close_writer(c);
    event_free(c->work);
    free(c);
}
