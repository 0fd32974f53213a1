/* test_ckpt_share.c - parts of a checkpoint that others send and look at. */
#include "tests/ckpt_rig.h"

/* ---- a part's bytes ------------------------------------------------------------------------------ */

/* A member puts a part together by itself, wherever it begins: it must be what the writer has put there, or
 * the store would not take it. */
static void a_part_has_the_bytes_that_the_writer_writes(void **state) {
    (void)state;
    char path[300];
    struct err err = {0};
    struct ckpt_piece p;
    struct ckpt_store *s = open_store("image");
    struct ckpt_writer *w = create_bf16(s, &run);
    if (finish(w, &run, &err)) fail_msg("%s", err.msg);
    ckpt_writer_destroy(w);
    s->ops->close(s);
    struct ckpt_image *im = ckpt_image_create(&run.model, CKPT_BF16, SHARD_BYTES, &err);
    assert_true(im->files >= 6);
    for (uint32_t f = 0; f < im->files; f++) {
        snprintf(path, sizeof path, "%s/image/step-000000000005/%s", root, im->file[f].name);
        struct ckpt_blob file = slurp(path);
        assert_int_equal(file.length, im->file[f].bytes);
        uint8_t *mine = malloc(file.length);
        size_t header = im->file[f].header.length;
        const size_t sizes[] = {file.length, 4096, header, header + 4, 512};
        for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++)
            for (size_t at = 0, n; at < file.length; at += n) {
                n = file.length - at < sizes[k] ? file.length - at : sizes[k];
                if (at + n <= header) { /* a header alone is no part */
                    assert_int_equal(ckpt_image_find(im, im->file[f].name, at, n, &p, &err), -1);
                    continue;
                }
                if (ckpt_image_find(im, im->file[f].name, at, n, &p, &err)) fail_msg("%s", err.msg);
                const float *from = p.momentum ? run.momentum : run.anchor;
                uint64_t half = p.first + p.count / 2; /* in two pieces, the latter first */
                memset(mine, 0xee, n);
                if (half > p.first) {
                    ckpt_image_fill(im, &p, half, (size_t)(p.first + p.count - half), from + half, mine);
                    ckpt_image_fill(im, &p, p.first, (size_t)(half - p.first), from + p.first, mine);
                } else {
                    ckpt_image_fill(im, &p, p.first, (size_t)p.count, from + p.first, mine);
                }
                assert_memory_equal(mine, file.data + at, n);
            }
        assert_int_equal(ckpt_image_find(im, im->file[f].name, 0, file.length + 4, &p, &err), -1);
        assert_int_equal(ckpt_image_find(im, im->file[f].name, file.length, 4, &p, &err), -1);
        assert_int_equal(ckpt_image_find(im, im->file[f].name, UINT64_MAX - 3, 8, &p, &err), -1);
        assert_int_equal(ckpt_image_find(im, im->file[f].name, header, 1, &p, &err), -1);
        free(file.data);
        free(mine);
    }
    assert_int_equal(ckpt_image_find(im, "../genesis.bin", 0, 8, &p, &err), -1);
    assert_int_equal(err.code, ERR_REFUSED);
    ckpt_image_destroy(im);
}

/* A folder whose uploads can be shared, in parts of a page. What others have sent lies beside what was
 * put. */
#define SHARED_PART 4096u
struct shared_store;
struct shared_upload {
    struct shared_store *store;
    struct ckpt_store *inner;
    struct ckpt_upload *to;
    char name[CKPT_NAME_BYTES_MAX + 1];
    uint8_t *mine, *there;
    size_t bytes;
    uint32_t filled[64];
    bool sent[64], released;
    uint8_t sha256[64][32];
    struct shared_upload *next;
};
struct shared_store {
    struct ckpt_store base;
    struct ckpt_store *inner;
    struct shared_upload *uploads;
    _Atomic bool away, cancelled;
    pthread_t caller;
    _Atomic uint32_t waits; /* of the caller's thread, for a store that is away */
};
static pthread_mutex_t shared_mutex = PTHREAD_MUTEX_INITIALIZER;

/* Each call that asks the network goes through here. */
static int ask(struct ckpt_store *s, struct err *err) {
    struct shared_store *store = (struct shared_store *)s;
    if (store->cancelled) return err_set(err, ERR_REFUSED, "given up");
    if (!store->away) return 0;
    if (pthread_equal(pthread_self(), store->caller)) store->waits++;
    return err_set(err, ERR_TIMEOUT, "the store is away");
}
static void shared_cancel(struct ckpt_store *s) { ((struct shared_store *)s)->cancelled = true; }

/* ---- parts that others send ---------------------------------------------------------------------- */

static size_t shared_bytes(const struct shared_upload *u, uint32_t i) {
    return u->bytes - i * SHARED_PART < SHARED_PART ? u->bytes - i * SHARED_PART : SHARED_PART;
}
static int shared_get(struct ckpt_store *s, const char *name, uint64_t at, void *out, size_t n,
                      struct err *err) {
    struct ckpt_store *inner = ((struct shared_store *)s)->inner;
    if (ask(s, err)) return -1;
    return inner->ops->get(inner, name, at, out, n, err);
}
static int shared_stat(struct ckpt_store *s, const char *name, struct ckpt_object *out, struct err *err) {
    struct ckpt_store *inner = ((struct shared_store *)s)->inner;
    if (ask(s, err)) return -1;
    return inner->ops->stat(inner, name, out, err);
}
static int shared_put(struct ckpt_store *s, const char *name, const void *b, size_t n, const char *v,
                      struct err *err) {
    struct ckpt_store *inner = ((struct shared_store *)s)->inner;
    if (ask(s, err)) return -1;
    return inner->ops->put(inner, name, b, n, v, err);
}
static int shared_list(struct ckpt_store *s, const char *prefix,
                       int (*visit)(void *, const struct ckpt_object *, struct err *), void *arg,
                           struct err *err) {
    struct ckpt_store *inner = ((struct shared_store *)s)->inner;
    if (ask(s, err)) return -1;
    return inner->ops->list(inner, prefix, visit, arg, err);
}
static int shared_remove(struct ckpt_store *s, const char *name, struct err *err) {
    struct ckpt_store *inner = ((struct shared_store *)s)->inner;
    if (ask(s, err)) return -1;
    return inner->ops->remove(inner, name, err);
}
static struct ckpt_upload *shared_begin(struct ckpt_store *s, const char *name, uint64_t bytes,
                                        struct err *err) {
    struct shared_store *store = (struct shared_store *)s;
    struct shared_upload *u = calloc(1, sizeof *u);
    assert_true(bytes <= 64 * SHARED_PART);
    *u = (struct shared_upload){.store = store, .inner = store->inner, .bytes = (size_t)bytes,
                                .mine = calloc(1, (size_t)bytes),
                                .there = calloc(1, (size_t)bytes), .next = store->uploads};
    snprintf(u->name, sizeof u->name, "%s", name);
    store->uploads = u;
    (void)err;
    return (struct ckpt_upload *)u;
}
static int shared_upload_put(struct ckpt_upload *upload, uint64_t at, const void *b, size_t n,
                             struct err *err) {
    struct shared_upload *u = (struct shared_upload *)upload;
    (void)err;
    pthread_mutex_lock(&shared_mutex);
    memcpy(u->mine + at, b, n);
    for (uint64_t k = at; k < at + n; k++) u->filled[k / SHARED_PART]++;
    pthread_mutex_unlock(&shared_mutex);
    return 0;
}
static int shared_sync(struct ckpt_upload *u, struct err *err) { return (void)u, (void)err, 0; }
static uint32_t shared_share(struct ckpt_upload *u) {
    return (uint32_t)((((struct shared_upload *)u)->bytes + SHARED_PART - 1) / SHARED_PART);
}
static bool shared_whole(struct ckpt_upload *upload, uint32_t i) {
    struct shared_upload *u = (struct shared_upload *)upload;
    pthread_mutex_lock(&shared_mutex);
    bool whole = u->filled[i] == shared_bytes(u, i);
    pthread_mutex_unlock(&shared_mutex);
    return whole;
}
static int shared_offer(struct ckpt_upload *upload, uint32_t i, struct ckpt_part *out, struct err *err) {
    const struct shared_upload *u = (struct shared_upload *)upload;
    (void)err;
    *out = (struct ckpt_part){.offset = i * SHARED_PART, .bytes = shared_bytes(u, i)};
    if (u->released) memcpy(out->sha256, u->sha256[i], sizeof out->sha256);
    else EVP_Digest(u->mine + out->offset, (size_t)out->bytes, out->sha256, NULL, EVP_sha256(), NULL);
    snprintf(out->url, sizeof out->url, "%s", u->name);
    return 0;
}
static int shared_send(struct ckpt_upload *upload, uint32_t i, struct err *err) {
    struct shared_upload *u = (struct shared_upload *)upload;
    (void)err;
    pthread_mutex_lock(&shared_mutex);
    memcpy(u->there + i * SHARED_PART, u->mine + i * SHARED_PART, shared_bytes(u, i));
    u->sent[i] = true;
    pthread_mutex_unlock(&shared_mutex);
    return 0;
}
static bool shared_sent(struct ckpt_upload *upload, uint32_t i) {
    struct shared_upload *u = (struct shared_upload *)upload;
    pthread_mutex_lock(&shared_mutex);
    bool sent = u->sent[i];
    pthread_mutex_unlock(&shared_mutex);
    return sent;
}
static int shared_read(struct ckpt_upload *u, uint64_t at, void *out, size_t n, struct err *err) {
    (void)err;
    memcpy(out, ((struct shared_upload *)u)->mine + at, n);
    return 0;
}
static int shared_release(struct ckpt_upload *upload, struct err *err) {
    struct shared_upload *u = (struct shared_upload *)upload;
    struct ckpt_part p;
    for (uint32_t i = 0; i < shared_share(upload); i++) {
        shared_offer(upload, i, &p, err);
        memcpy(u->sha256[i], p.sha256, sizeof p.sha256);
    }
    u->released = true;
    memset(u->mine, 0xee, u->bytes);
    return 0;
}
static int shared_complete(struct ckpt_upload *upload, struct err *err) {
    struct shared_upload *u = (struct shared_upload *)upload;
    for (uint32_t i = 0; i < shared_share(upload); i++)
        if (!shared_sent(upload, i)) shared_send(upload, i, err);
    u->to = u->inner->ops->upload_begin(u->inner, u->name, u->bytes, err);
    return !u->to || u->inner->ops->upload_put(u->to, 0, u->there, u->bytes, err) ||
        u->inner->ops->upload_complete(u->to, err) ? -1 : 0;
}
static void shared_destroy(struct ckpt_upload *upload) {
    struct shared_upload *u = (struct shared_upload *)upload;
    if (!u) return;
    if (!u->to) ask(&u->store->base, NULL); /* to end it there, too */
    u->inner->ops->upload_destroy(u->to);
    u->to = NULL;
}
static const struct ckpt_store_ops shared_ops = {
    .get = shared_get, .stat = shared_stat, .put = shared_put, .upload_begin = shared_begin,
    .list = shared_list,
    .upload_put = shared_upload_put, .upload_sync = shared_sync, .upload_complete = shared_complete,
    .upload_destroy = shared_destroy, .remove = shared_remove, .upload_share = shared_share,
    .upload_whole = shared_whole,
    .upload_offer = shared_offer, .upload_check = shared_offer, .upload_send = shared_send,
    .upload_sent = shared_sent,
    .upload_read = shared_read, .upload_release = shared_release, .cancel = shared_cancel};

/* What the others do. */
enum others { WILLING, UNWILLING, SOME, VANISH, WRONG, OTHERS };
struct counts {
    uint32_t notes, theirs, looked;
};

/* A part in the store, by whoever was asked. */
static void others_send(struct shared_store *store, const struct ckpt_note *n, bool wrong) {
    struct shared_upload *u = store->uploads;
    while (strcmp(strrchr(u->name, '/') + 1, n->object) != 0) u = u->next;
    uint32_t i = (uint32_t)(n->part.offset / SHARED_PART);
    pthread_mutex_lock(&shared_mutex);
    memcpy(u->there + n->part.offset, u->mine + n->part.offset, (size_t)n->part.bytes);
    u->there[n->part.offset] ^= wrong;
    u->sent[i] = true;
    pthread_mutex_unlock(&shared_mutex);
}

static void answer_notes(struct ckpt_writer *w, struct shared_store *store, enum others how,
                         struct counts *c) {
    struct ckpt_note n;
    while (ckpt_writer_note(w, &n)) {
        c->notes++;
        c->looked += n.kind == CKPT_NOTE_LOOKED;
        if (n.kind == CKPT_NOTE_LOOKED) continue;
        if (how == VANISH && c->notes > 3) {
            ckpt_writer_alone(w);
            continue;
        }
        bool done = how == WILLING || how == WRONG || how == VANISH || (how == SOME && n.number % 3);
        if (n.kind == CKPT_NOTE_SEND && done) others_send(store, &n, how == WRONG && n.number == 2);
        if (n.kind == CKPT_NOTE_CHECK && how == WRONG && n.number == 2) done = false; /* it has looked */
        c->theirs += n.kind == CKPT_NOTE_SEND && done;
        ckpt_writer_settle(w, n.number, done);
    }
}

static enum ckpt_state go_on(struct ckpt_writer *w, struct shared_store *store, enum others how,
                             struct counts *c,
                             struct err *err) {
    for (;;) {
        struct pollfd p = {.fd = ckpt_writer_fd(w), .events = POLLIN};
        enum ckpt_state now = ckpt_writer_poll(w, err);
        answer_notes(w, store, how, c);
        if (now != CKPT_TAKING && now != CKPT_FINISHING) return now;
        if (poll(&p, 1, WAIT_MS_MAX) != 1) fail_msg("the writer went to sleep");
    }
}

/* Whatever others do or leave, the checkpoint is whole and right, or there is none. */
static void parts_are_sent_by_others_or_by_the_writer(void **state) {
    (void)state;
    for (int how = 0; how < OTHERS; how++) {
        struct err err = {0};
        struct counts c = {0};
        char name[32];
        snprintf(name, sizeof name, "shared-%d", how);
        struct ckpt_store *inner = open_store(name);
        struct shared_store store = {.base = {.ops = &shared_ops, .remote = true, .streams = 2},
                                     .inner = inner};
        struct ckpt_meta meta = meta_at(&run, 5);
        meta.shared = true;
        meta.weights = how % 2 ? CKPT_BF16 : CKPT_FP32;
        struct ckpt_writer *w = ckpt_writer_create(&store.base, &meta, SHARD_BYTES, &err);
        if (!w) fail_msg("%s", err.msg);
        for (uint64_t at = 0, n; at < run.elements; at += n) {
            n = run.elements - at < 999 ? run.elements - at : 999;
            if (put(w, &run, at, (size_t)n, &err)) fail_msg("%s", err.msg);
            ckpt_writer_poll(w, &err);
            answer_notes(w, &store, how, &c);
        }
        assert_int_equal(ckpt_writer_finish(w, &err), 0);
        enum ckpt_state now = go_on(w, &store, how, &c, &err);
        if (how == WRONG) {
            assert_int_equal(now, CKPT_FAILED);
            assert_int_equal(err.code, ERR_CORRUPT);
            assert_non_null(strstr(err.msg, "other bytes in part 3"));
        } else {
            if (now != CKPT_UNSIGNED || sign_and_publish(w, &run, &err) ||
                wait_past(w, CKPT_PUBLISHING, &err) != CKPT_PUBLISHED)
                fail_msg("%d: %s", how, err.msg);
        }
        ckpt_writer_destroy(w);
        uint32_t parts = 0, files = 0;
        for (struct shared_upload *u = store.uploads, *next; u; u = next, files++) {
            next = u->next;
            parts += shared_share((struct ckpt_upload *)u);
            free(u->mine), free(u->there), free(u);
        }
        inner->ops->close(inner);
        if (how == WRONG) continue;
        assert_true(how == WILLING ? c.theirs == parts && c.looked == files
                    : how == UNWILLING ? c.theirs == 0 && c.looked == parts
                                       : c.theirs > 0 && c.theirs < parts && c.looked > files);
        snprintf(name, sizeof name, "shared-%d", how);
        if (check_all(folder(name), &err)) fail_msg("%s", err.msg);
    }
}

/* Who asked for the checkpoint has a loop to run: a store that was away when the writer failed, or is when it is
 * given up, is not waited for once more by taking away what lies there. */
static void a_store_that_is_away_does_not_hold_up_the_caller(void **state) {
    (void)state;
    for (int given_up = 0; given_up < 2; given_up++) {
        struct err err = {0};
        struct ckpt_store *inner = open_store(given_up ? "away-1" : "away-0");
        struct shared_store store = {.base = {.ops = &shared_ops, .remote = true, .streams = 2},
                                     .inner = inner, .caller = pthread_self()};
        struct ckpt_meta meta = meta_at(&run, 5);
        struct ckpt_writer *w = ckpt_writer_create(&store.base, &meta, SHARD_BYTES, &err);
        if (!w || put(w, &run, 0, (size_t)run.elements, &err)) fail_msg("%s", err.msg);
        store.away = true;
        assert_int_equal(ckpt_writer_finish(w, &err), 0);
        if (!given_up) assert_int_equal(wait_past(w, CKPT_FINISHING, &err), CKPT_FAILED);
        if (!given_up) assert_int_equal(err.code, ERR_TIMEOUT);
        ckpt_writer_destroy(w);
        assert_int_equal(store.waits, 0);
        for (struct shared_upload *u = store.uploads, *next; u; u = next) {
            next = u->next;
            free(u->mine), free(u->there), free(u);
        }
        inner->ops->close(inner);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_part_has_the_bytes_that_the_writer_writes),
        cmocka_unit_test(parts_are_sent_by_others_or_by_the_writer),
        cmocka_unit_test(a_store_that_is_away_does_not_hold_up_the_caller),
    };
    return cmocka_run_group_tests(tests, before_all, after_all);
}
