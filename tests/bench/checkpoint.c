/* checkpoint.c - checkpoints and a trainer's own state, beside plain files and BLAKE2b. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ckpt/ckpt.h"
#include "kernels/kernels.h"
#include "node/engine.h"
#include "proto/model.h"
#include "proto/proto.h"
#include "tests/bench/bench.h"

#define WAIT_MS_MAX 60000

/* A run of its own: keys, genesis, a ledger with nothing but the genesis. */
struct saving {
    struct identity root, online;
    struct proto_buffer genesis, delegation, entry;
    struct proto_sig delegation_sig;
    struct msg_signed_entry ledger;
    struct digest run, state_root;
    struct msg_model model;
    size_t n;
    float *anchor, *momentum, *got;
    struct ckpt_store *store;
    struct engine *engine;
    struct series longest_call, longest_other, longest_write; /* seconds, one for each run */
    double call, other, write; /* the longest of the present run */
    char store_path[300], plain_path[300], state_path[300];
};

static struct proto_bytes bytes_of(const struct proto_buffer *b) {
    return (struct proto_bytes){b->data, (uint32_t)b->length};
}

static int encode(struct proto_buffer *b, enum proto_record which, const void *r, struct err *err) {
    proto_buffer_init(b, PROTO_BLOB_BYTES_MAX);
    return proto_encode(b, which, r, err);
}

static int make_run(struct saving *s, struct err *err) {
    struct msg_inner inner;
    float std;
    struct msg_outer outer = {.inner_steps = 1, .chunk_elements = CHUNK, .fragments = 1};
    struct msg_corpus corpus = {.tokenizer = proto_str("bytes"), .samples = 1000};
    if (proto_model_preset("10m", &s->model, err) ||
        proto_inner_preset("10m", 1000000000, &inner, &std, err))
        return -1;
    identity_create(&s->root);
    identity_create(&s->online);
    struct msg_genesis g = {.version = 1, .name = proto_str("bench"), .root_key = s->root.key,
                            .model = &s->model, .model_count = 1, .inner = &inner, .inner_count = 1,
                            .outer = &outer, .outer_count = 1, .corpus = &corpus, .corpus_count = 1,
                            .init_std = std};
    if (encode(&s->genesis, RECORD_genesis, &g, err)) return -1;
    s->run = digest_of(s->genesis.data, s->genesis.length);
    struct msg_delegation d = {.run = s->run, .key = s->online.key, .number = 1};
    struct msg_entry e = {.kind = LEDGER_GENESIS, .body = bytes_of(&s->genesis)};
    if (encode(&s->delegation, RECORD_delegation, &d, err) ||
        encode(&s->entry, RECORD_entry, &e, err))
        return -1;
    proto_sign(&s->root, "delegation", &s->run, 0, s->delegation.data, s->delegation.length,
               &s->delegation_sig);
    s->ledger.bytes = bytes_of(&s->entry);
    proto_sign(&s->root, "ledger", &s->run, 0, s->entry.data, s->entry.length,
               &s->ledger.signature);
    return 0;
}

static void note_longest(double *longest, double begin) {
    double took = now_s() - begin;
    if (took > *longest) *longest = took;
}

/* Wait until the state is not `before` any more. */
static enum ckpt_state wait_past(struct saving *s, struct ckpt_writer *w, enum ckpt_state before,
                                 struct err *err) {
    for (;;) {
        struct pollfd p = {.fd = ckpt_writer_fd(w), .events = POLLIN};
        double begin = now_s();
        enum ckpt_state now = ckpt_writer_poll(w, err);
        note_longest(&s->call, begin);
        if (now != before) return now;
        if (poll(&p, 1, WAIT_MS_MAX) != 1) {
            err_set(err, ERR_TIMEOUT, "the checkpoint writer does nothing for %d ms", WAIT_MS_MAX);
            return CKPT_FAILED;
        }
    }
}

static int put_all(struct saving *s, struct ckpt_writer *w, struct err *err) {
    for (size_t first = 0; first < s->n; first += CHUNK) {
        size_t n = s->n - first < CHUNK ? s->n - first : CHUNK;
        while (ckpt_writer_backlog_bytes(w) >= CKPT_BACKLOG_BYTES) usleep(1000);
        double begin = now_s();
        int r = ckpt_writer_put(w, first, n, s->anchor + first, s->momentum + first, err);
        note_longest(&s->call, begin);
        if (r) return -1;
    }
    return 0;
}

static int sign_and_publish(struct saving *s, struct ckpt_writer *w, struct err *err) {
    size_t n;
    struct proto_sig sig;
    const void *manifest = ckpt_writer_manifest(w, &n);
    proto_sign(&s->online, "manifest", &s->run, 7, manifest, n, &sig);
    return ckpt_writer_publish(w, 7, &sig, &s->online.key, bytes_of(&s->delegation),
                               &s->delegation_sig, err);
}

static int write_all(struct saving *s, struct ckpt_writer *w, struct err *err) {
    if (put_all(s, w, err)) return -1;
    double begin = now_s();
    if (ckpt_writer_finish(w, err)) return -1;
    note_longest(&s->other, begin);
    if (wait_past(s, w, CKPT_FINISHING, err) != CKPT_UNSIGNED) return -1;
    begin = now_s();
    if (sign_and_publish(s, w, err)) return -1;
    note_longest(&s->other, begin);
    return wait_past(s, w, CKPT_PUBLISHING, err) == CKPT_PUBLISHED ? 0 : -1;
}

static struct digest root_of(const struct saving *s) {
    static struct msg_digest_item leaf[PROTO_CHUNKS_MAX];
    size_t count = 0;
    for (size_t first = 0; first < s->n; first += CHUNK, count++) {
        size_t bytes = 4 * (s->n - first < CHUNK ? s->n - first : CHUNK);
        leaf[count].digest = digest_leaf2(count, s->anchor + first, bytes, s->momentum + first, bytes);
    }
    return digest_tree_root(leaf, count);
}

static int run_write(void *arg, struct err *err) {
    struct saving *s = arg;
    struct ckpt_meta meta = {.state_root = s->state_root, .genesis = bytes_of(&s->genesis),
                             .ledger = &s->ledger, .ledger_count = 1};
    s->call = s->other = 0;
    double begin = now_s();
    struct ckpt_writer *w = ckpt_writer_create(s->store, &meta, 0, err);
    if (!w) return -1;
    note_longest(&s->other, begin);
    int r = write_all(s, w, err);
    begin = now_s();
    ckpt_writer_destroy(w);
    note_longest(&s->other, begin);
    series_add(&s->longest_call, s->call);
    series_add(&s->longest_other, s->other);
    return r;
}

/* The same index again and again, so the last one has to go. */
static int reset_write(void *arg, struct err *err) {
    struct saving *s = arg;
    if (s->store) s->store->ops->close(s->store);
    remove_folder(s->store_path);
    s->store = ckpt_store_open(s->store_path, true, err);
    return s->store ? 0 : -1;
}

static int run_hash(void *arg, struct err *err) {
    struct saving *s = arg;
    (void)err;
    s->ledger.signature.b[0] ^= digest_of(s->anchor, s->n * 4).b[0] & 1;
    s->ledger.signature.b[0] ^= digest_of(s->momentum, s->n * 4).b[0] & 1;
    return 0;
}

/* A digest of each object, and leaves of the state's tree. */
static int run_hash_twice(void *arg, struct err *err) {
    struct saving *s = arg;
    s->ledger.signature.b[0] ^= root_of(s).b[0] & 1;
    return run_hash(arg, err);
}

static int reset_plain(void *arg, struct err *err) {
    struct saving *s = arg;
    return unlink(s->plain_path) && errno != ENOENT ? err_set_errno(err, "%s", s->plain_path) : 0;
}

/* Anchor and momentum into one file, then fsync. */
static int run_plain_write(void *arg, struct err *err) {
    struct saving *s = arg;
    int fd = open(s->plain_path, O_WRONLY | O_CREAT | O_TRUNC, 0600), r = 0;
    if (fd < 0) return err_set_errno(err, "%s", s->plain_path);
    s->write = 0;
    for (size_t first = 0; first < s->n && !r; first += CHUNK) {
        size_t bytes = 4 * (s->n - first < CHUNK ? s->n - first : CHUNK);
        double begin = now_s();
        if (write(fd, s->anchor + first, bytes) != (ssize_t)bytes ||
            write(fd, s->momentum + first, bytes) != (ssize_t)bytes)
            r = err_set_errno(err, "%s: write", s->plain_path);
        note_longest(&s->write, begin);
    }
    if (!r && fsync(fd)) r = err_set_errno(err, "%s: fsync", s->plain_path);
    close(fd);
    series_add(&s->longest_write, s->write);
    return r;
}

/* What a checkpoint costs without being one. */
static int run_plain_write_hash(void *arg, struct err *err) {
    return run_plain_write(arg, err) || run_hash(arg, err) ? -1 : 0;
}

static int run_plain_read(void *arg, struct err *err) {
    struct saving *s = arg;
    int fd = open(s->plain_path, O_RDONLY), r = 0;
    if (fd < 0) return err_set_errno(err, "%s", s->plain_path);
    for (size_t first = 0; first < s->n && !r; first += CHUNK) {
        size_t bytes = 4 * (s->n - first < CHUNK ? s->n - first : CHUNK);
        if (read(fd, s->got + first, bytes) != (ssize_t)bytes ||
            read(fd, s->got + first, bytes) != (ssize_t)bytes)
            r = err_set_errno(err, "%s: read", s->plain_path);
    }
    close(fd);
    return r;
}

static int run_verify(void *arg, struct err *err) {
    struct saving *s = arg;
    struct ckpt *c = ckpt_open(s->store_path, &s->run, err);
    int r = c ? ckpt_verify(c, NULL, NULL, err) : -1;
    ckpt_close(c);
    return r;
}

static int run_reload(void *arg, struct err *err) {
    struct saving *s = arg;
    struct ckpt *c = ckpt_open(s->store_path, &s->run, err);
    int r = c ? 0 : -1;
    for (size_t first = 0; first < s->n && !r; first += CHUNK) {
        size_t n = s->n - first < CHUNK ? s->n - first : CHUNK;
        r = ckpt_read(c, CKPT_ANCHOR, first, n, s->got + first, err) ||
            ckpt_read(c, CKPT_MOMENTUM, first, n, s->got + first, err) ? -1 : 0;
    }
    ckpt_close(c);
    return r;
}

static int run_state_save(void *arg, struct err *err) {
    struct saving *s = arg;
    return engine_save(s->engine, s->state_path, 1, err);
}

static int run_state_load(void *arg, struct err *err) {
    struct saving *s = arg;
    uint64_t tag;
    return engine_load(s->engine, s->state_path, &tag, err);
}

/* The series of runs whose first one, unmeasured by time_in_turns(), is in it too. */
static void drop_first(struct series *s) {
    memmove(s->value, s->value + 1, (size_t)--s->count * sizeof *s->value);
}

static int time_checkpoints(struct bench *b, struct saving *s, struct err *err) {
    struct series t[2];
    struct task task[] = {{run_write, s, reset_write}, {run_plain_write_hash, s, reset_plain}};
    double megabytes = 8 * (double)s->n / MB;
    if (time_in_turns(task, t, 2, 3, err)) return -1;
    drop_first(&s->longest_call);
    drop_first(&s->longest_other);
    drop_first(&s->longest_write);
    static const char *const plain = "plain write, fsync, BLAKE2b";
    row_time(b, "checkpoint of 10m: create to published", "s", 1, &t[0], plain, &t[1]);
    row_rate(b, "    the same", "MB/s", megabytes, &t[0], plain, megabytes, &t[1]);
    row_time(b, "    longest call of put or poll, 2 MiB each", "ms", 1e3, &s->longest_call,
             "longest plain write of as much", &s->longest_write);
    row_time(b, "    longest of create, finish, publish, destroy", "ms", 1e3, &s->longest_other,
             NULL, NULL);
    struct task verify[] = {{run_verify, s, NULL}, {run_hash_twice, s, NULL}};
    if (time_in_turns(verify, t, 2, 1, err)) return -1;
    row_rate(b, "checkpoint of 10m: open, read, verify all", "MB/s", megabytes, &t[0],
             "BLAKE2b in memory, twice", megabytes, &t[1]);
    struct task reload[] = {{run_reload, s, NULL}, {run_plain_read, s, NULL}};
    if (time_in_turns(reload, t, 2, 1, err)) return -1;
    row_rate(b, "checkpoint of 10m: open, reload anchor, momentum", "MB/s", megabytes, &t[0],
             "plain read", megabytes, &t[1]);
    return 0;
}

/* What a trainer saves for itself: parameters and both moments. */
static int time_trainer_state(struct bench *b, struct saving *s, struct err *err) {
    struct series t[4];
    struct msg_inner inner;
    float std;
    struct kernels *k = kernels_cpu_create(1, err);
    if (!k || proto_inner_preset("10m", 1000000000, &inner, &std, err)) return -1;
    if (!(s->engine = engine_create(&s->model, &inner, k, err))) return -1;
    struct task task[] = {{run_state_save, s, NULL}, {run_plain_write_hash, s, reset_plain},
                          {run_state_load, s, NULL}, {run_hash, s, NULL}};
    if (time_in_turns(task, t, 4, 2, err)) return -1;
    double megabytes = 12 * (double)s->n / MB, plain = 8 * (double)s->n / MB;
    row_rate(b, "trainer's own state of 10m: save, with fsync", "MB/s", megabytes, &t[0],
             "plain write, fsync, BLAKE2b", plain, &t[1]);
    row_rate(b, "trainer's own state of 10m: load, with digest", "MB/s", megabytes, &t[2],
             "BLAKE2b in memory", plain, &t[3]);
    engine_destroy(s->engine);
    k->destroy(k);
    return 0;
}

int bench_checkpoint(struct bench *b, int unused, struct err *err) {
    struct saving s = {0};
    (void)unused;
    if (make_run(&s, err)) return -1;
    s.n = (size_t)proto_model_elements(&s.model);
    s.anchor = take_floats(s.n, 0.02f, 1);
    s.momentum = take_floats(s.n, 0.01f, 2);
    s.got = take_memory(s.n * 4);
    s.state_root = root_of(&s);
    snprintf(s.store_path, sizeof s.store_path, "%s/store", b->folder);
    snprintf(s.plain_path, sizeof s.plain_path, "%s/plain", b->folder);
    snprintf(s.state_path, sizeof s.state_path, "%s/state", b->folder);
    if (time_checkpoints(b, &s, err) || time_trainer_state(b, &s, err)) return -1;
    s.store->ops->close(s.store);
    proto_buffer_release(&s.genesis);
    proto_buffer_release(&s.delegation);
    proto_buffer_release(&s.entry);
    free(s.anchor);
    free(s.momentum);
    free(s.got);
    return 0;
}
