/* test_ckpt_write.c - writing a checkpoint: bits survive, and half a checkpoint never looks whole, whatever
 * happens to the writer. */
#define _GNU_SOURCE /* umount2 */
#include "tests/ckpt_rig.h"

/* ---- round trip -------------------------------------------------------------------------------- */

/* The file of a tokenizer that is not ours lies with the corpus; the checkpoint says which one. */
static void a_checkpoint_names_a_tokenizer_of_others(void **state) {
    (void)state;
    struct run other;
    make_run_of(&other, 9, 0, "bpe-0123456789abcdef0123456789abcdef");
    struct ckpt_store *s = open_store("bpe");
    must_write(s, &other, 5);
    s->ops->close(s);
    struct ckpt *c = must_open(folder("bpe"));
    assert_string_equal(ckpt_tokenizer(c), "bpe-0123456789abcdef0123456789abcdef");
    struct err err = {0};
    if (ckpt_export(c, folder("bpe-export"), &err)) fail_msg("%s", err.msg);
    ckpt_close(c);
    assert_int_equal(count_in(folder("bpe-export")), 7); /* without tokenizer.json */
    c = must_open(folder("bpe-export"));
    assert_string_equal(ckpt_tokenizer(c), "bpe-0123456789abcdef0123456789abcdef");
    ckpt_close(c);
    release_run(&other);
}

/* The state of a run is what it was, bit by bit, and with it all that is needed to go on. */
static void a_checkpoint_gives_back_the_state(void **state) {
    (void)state;
    struct err err = {0};
    char path[160];
    fresh("round-trip", path);
    struct ckpt *c = ckpt_open(folder("round-trip"), &run.id, &err); /* by `latest` */
    if (!c) fail_msg("%s", err.msg);
    assert_false(ckpt_is_plain(c));
    assert_non_null(strstr(ckpt_where(c), "/step-000000000005"));
    assert_same_tensors(c, &run);
    assert_string_equal(ckpt_tokenizer(c), "bytes");
    assert_int_equal(ckpt_model(c)->ffn, 48);
    assert_true(ckpt_model(c)->norm_eps == 1e-5);

    const struct ckpt_facts *f = ckpt_facts(c);
    assert_true(digest_equal(&f->run, &run.id));
    assert_int_equal(f->index, 5);
    assert_int_equal(f->tokens_committed, 5000);
    assert_int_equal(f->term, 7);
    struct digest head = LEDGER_DIGEST(&run.ledger[5]);
    assert_true(digest_equal(&f->ledger_head, &head));

    uint32_t n;
    const struct msg_range *spent = ckpt_spent(c, &n); /* sorted, and the neighbours joined */
    assert_int_equal(n, 2);
    assert_int_equal(spent[0].count, 40);
    assert_int_equal(spent[1].start, 64);

    const struct msg_signed_entry *entries;
    assert_int_equal(ckpt_ledger(c, &entries, &n, &err), 0);
    assert_int_equal(n, 6);
    struct ledger_chain chain;
    struct msg_entry e = {0};
    ledger_chain_init(&chain, &run.id);
    assert_int_equal(ledger_chain_take(&chain, &entries[0], &e, &err), 0);
    proto_decoded_release(RECORD_entry, &e);
    assert_int_equal(ckpt_verify(c, NULL, NULL, &err), 0);
    ckpt_close(c);
}

/* Chunks arrive as commits overwrite them, so in no order, and cross tensors and files anyhow. */
static void ranges_come_in_any_order(void **state) {
    (void)state;
    struct err err = {0};
    enum { PIECE = 777 };
    struct ckpt_store *s = open_store("any-order");
    struct ckpt_writer *w = create(s, &run, 3, &err);
    assert_non_null(w);
    size_t pieces = (run.elements + PIECE - 1) / PIECE;
    for (size_t i = 0; i < pieces; i++) {
        uint64_t first = i * 31 % pieces * PIECE; /* 31 is coprime to the number: checked below */
        size_t n = run.elements - first < PIECE ? run.elements - first : PIECE;
        assert_true(ckpt_writer_wants(w, first, n));
        if (put(w, &run, first, n, &err)) fail_msg("%s", err.msg);
        assert_false(ckpt_writer_wants(w, first, n));
    }
    if (finish(w, &run, &err)) fail_msg("%s", err.msg);
    ckpt_writer_destroy(w);
    s->ops->close(s);

    struct ckpt *c = must_open(folder("any-order"));
    assert_same_tensors(c, &run);
    float got[5000];
    uint64_t random = 1;
    for (int i = 0; i < 200; i++) { /* and can be read in any pieces */
        size_t n = next_random(&random) % 5000;
        uint64_t first = next_random(&random) % (run.elements - n + 1);
        assert_int_equal(ckpt_read(c, CKPT_ANCHOR, first, n, got, &err), 0);
        assert_memory_equal(got, run.anchor + first, n * 4);
    }
    ckpt_close(c);
}

/* A chunk put twice would be a chunk of two versions, one put never a hole: both are bugs of an
 * agent that must not end in a signed checkpoint. */
static void each_element_is_put_exactly_once(void **state) {
    (void)state;
    struct err err = {0};
    struct ckpt_store *s = open_store("once");
    struct ckpt_writer *w = create(s, &run, 1, &err);
    assert_int_equal(put(w, &run, 1000, 1000, &err), 0);
    assert_int_equal(put(w, &run, 1999, 2, &err), -1);
    assert_int_equal(err.code, ERR_REFUSED);
    assert_non_null(strstr(err.msg, "element 1999 was put before"));
    assert_int_equal(put(w, &run, 500, 501, &err), -1);
    assert_int_equal(put(w, &run, 1200, 1, &err), -1);
    assert_int_equal(put(w, &run, 0, 1000, &err), 0);
    assert_int_equal(ckpt_writer_finish(w, &err), -1);
    assert_non_null(strstr(err.msg, "element 2000"));
    assert_int_equal(ckpt_writer_put(w, run.elements - 1, 2, run.anchor, run.anchor, &err), -1);
    assert_int_equal(put(w, &run, 2000, run.elements - 2000, &err), 0);
    if (finish(w, &run, &err)) fail_msg("%s", err.msg);
    ckpt_writer_destroy(w);
    s->ops->close(s);
    struct ckpt *c = must_open(folder("once"));
    assert_same_tensors(c, &run); /* what was refused left no trace */
    ckpt_close(c);
}

/* ---- weights in bf16; the state it must be ------------------------------------------------------- */

/* Others get 2 bytes a parameter, the run all 4: what it goes on from is the same, bit by bit. */
static void bf16_weights_have_the_anchor_beside_them(void **state) {
    (void)state;
    struct err err = {0};
    struct ckpt_store *s = open_store("bf16");
    struct ckpt_writer *w = create_bf16(s, &run);
    if (finish(w, &run, &err)) fail_msg("%s", err.msg);
    ckpt_writer_destroy(w);
    s->ops->close(s);
    struct ckpt *c = must_open(folder("bf16"));
    assert_same_tensors(c, &run);
    assert_string_equal(ckpt_weights_name(c), "bf16");
    float *got = malloc(run.elements * 4);
    assert_int_equal(ckpt_read(c, CKPT_WEIGHTS, 0, run.elements, got, &err), 0);
    for (size_t i = 0; i < run.elements; i++) {
        uint32_t is, from;
        memcpy(&is, got + i, 4);
        memcpy(&from, run.anchor + i, 4);
        assert_int_equal(is & 0xffff, 0);
        if (isnan(run.anchor[i])) assert_true(isnan(got[i]));
        else if (from << 16 != 0x80000000) assert_int_equal(is, (from + 0x8000) & 0xffff0000); /* nearest */
        else assert_int_equal(is & 0x10000, 0); /* a tie, to even */
    }
    free(got);
    if (ckpt_verify(c, NULL, NULL, &err)) fail_msg("%s", err.msg);
    assert_int_equal(ckpt_export(c, folder("bf16-exported"), &err), 0);
    ckpt_close(c);
    c = must_open(folder("bf16-exported")); /* what Hugging Face's tools see */
    assert_true(ckpt_is_plain(c));
    assert_string_equal(ckpt_weights_name(c), "bf16");
    assert_null(strstr(ckpt_where(c), "anchor"));
    ckpt_close(c);
    char path[160];
    snprintf(path, sizeof path, "%s/config.json", folder("bf16-exported"));
    struct ckpt_blob config = slurp(path);
    assert_non_null(strstr((char *)config.data, "\"bfloat16\""));
    free(config.data);
}

/* Digests say that it is what was written, the root that it is the state the members agreed on. */
static void a_state_of_another_root_is_refused(void **state) {
    (void)state;
    struct err err = {0};
    char path[160], hex[DIGEST_HEX_BYTES];
    fresh("root", path);
    struct digest other = digest_of("x", 1);
    digest_hex(&other, hex);
    sign_again(path, NULL, hex);
    assert_int_equal(check_all(path, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    if (!strstr(err.msg, "anchor and momentum have root")) fail_msg("%s", err.msg);
}

/* A byte of the file that a writer is at, before it is read back. */
static void spoil(const char *store, const char *object, int at) {
    char command[300];
    snprintf(command, sizeof command,
             "printf x | dd of=$(echo %s/step-000000000005/.%s*) bs=1 seek=%d conv=notrunc 2>/dev/null", store, object, at);
    assert_int_equal(system(command), 0);
}

/* A bit that changes on the way to the store or back must not be signed for. */
static void what_the_store_gives_back_must_be_the_state(void **state) {
    (void)state;
    static const struct { const char *object; int at; const char *says; } cases[] = {
        {"model-00001", 4000, "the weights are not the anchor rounded"},
        {"anchor-00001", 4000, "anchor and momentum have root"},
        {"momentum-00002", 4000, "anchor and momentum have root"},
        {"momentum-00001", 12, "gives back another header"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct err err = {0};
        struct ckpt_store *s = open_store("given-back");
        struct ckpt_writer *w = create_bf16(s, &run);
        spoil(folder("given-back"), cases[i].object, cases[i].at);
        assert_int_equal(finish(w, &run, &err), -1);
        assert_int_equal(err.code, ERR_CORRUPT);
        if (!strstr(err.msg, cases[i].says)) fail_msg("%s", err.msg);
        ckpt_writer_destroy(w);
        s->ops->close(s);
    }
}

/* A signature that readers would refuse is refused before anything is published, and the right
 * one still counts: a coordinator may have failed over meanwhile. */
static void a_bad_signature_is_not_published(void **state) {
    (void)state;
    struct err err = {0};
    struct run thief = {0};
    struct proto_sig sig = {{1}};
    make_run(&thief, 8, 0);
    struct ckpt_store *s = open_store("unsigned");
    struct ckpt_writer *w = create(s, &run, 2, &err);
    assert_int_equal(put(w, &run, 0, run.elements, &err), 0);
    assert_int_equal(ckpt_writer_finish(w, &err), 0);
    assert_int_equal(wait_past(w, CKPT_FINISHING, &err), CKPT_UNSIGNED);
    assert_int_equal(sign_and_publish(w, &thief, &err), -1);
    assert_int_equal(err.code, ERR_REFUSED);
    assert_int_equal(ckpt_writer_publish(w, 7, &sig, &run.online.key, bytes_of(&run.delegation),
                                         &run.delegation_sig, &err), -1);
    assert_int_equal(ckpt_writer_poll(w, &err), CKPT_UNSIGNED);
    assert_refused(folder("unsigned"), ERR_NOT_FOUND, "no checkpoint here");
    assert_int_equal(sign_and_publish(w, &run, &err), 0);
    assert_int_equal(wait_past(w, CKPT_PUBLISHING, &err), CKPT_PUBLISHED);
    ckpt_writer_destroy(w);
    s->ops->close(s);
    ckpt_close(must_open(folder("unsigned")));
    release_run(&thief);
}

/* A store whose process dies right before its left-th change. */
struct mortal {
    struct ckpt_store base;
    struct ckpt_store *inner;
    int *left; /* shared by the two threads of a writer: atomic */
};
struct mortal_upload {
    struct mortal *store;
    struct ckpt_upload *inner;
};

/* ---- crashes, races, full disks ---------------------------------------------------------------- */

static void live(struct mortal *m) {
    if (__atomic_sub_fetch(m->left, 1, __ATOMIC_SEQ_CST) < 0) _exit(9);
}
static int mortal_get(struct ckpt_store *s, const char *name, uint64_t at, void *out, size_t n, struct err *err) {
    struct mortal *m = (struct mortal *)s;
    return m->inner->ops->get(m->inner, name, at, out, n, err);
}
static int mortal_stat(struct ckpt_store *s, const char *name, struct ckpt_object *out, struct err *err) {
    struct mortal *m = (struct mortal *)s;
    return m->inner->ops->stat(m->inner, name, out, err);
}
static int mortal_put(struct ckpt_store *s, const char *name, const void *b, size_t n, const char *v, struct err *err) {
    struct mortal *m = (struct mortal *)s;
    live(m);
    return m->inner->ops->put(m->inner, name, b, n, v, err);
}
static struct ckpt_upload *mortal_begin(struct ckpt_store *s, const char *name, uint64_t bytes, struct err *err) {
    struct mortal *m = (struct mortal *)s;
    struct mortal_upload *u = calloc(1, sizeof *u);
    live(m);
    u->store = m;
    u->inner = m->inner->ops->upload_begin(m->inner, name, bytes, err);
    return (struct ckpt_upload *)u;
}
static int mortal_upload_put(struct ckpt_upload *u, uint64_t at, const void *b, size_t n, struct err *err) {
    struct mortal_upload *m = (struct mortal_upload *)u;
    live(m->store);
    return m->store->inner->ops->upload_put(m->inner, at, b, n, err);
}
static int mortal_sync(struct ckpt_upload *u, struct err *err) {
    struct mortal_upload *m = (struct mortal_upload *)u;
    return m->store->inner->ops->upload_sync(m->inner, err);
}
static int mortal_complete(struct ckpt_upload *u, struct err *err) {
    struct mortal_upload *m = (struct mortal_upload *)u;
    live(m->store);
    return m->store->inner->ops->upload_complete(m->inner, err);
}
static void mortal_destroy(struct ckpt_upload *u) {
    struct mortal_upload *m = (struct mortal_upload *)u;
    if (!m) return;
    m->store->inner->ops->upload_destroy(m->inner);
    free(m);
}
static int mortal_list(struct ckpt_store *s, const char *prefix,
                       int (*visit)(void *, const struct ckpt_object *, struct err *), void *arg, struct err *err) {
    struct mortal *m = (struct mortal *)s;
    return m->inner->ops->list(m->inner, prefix, visit, arg, err);
}
static int mortal_remove(struct ckpt_store *s, const char *name, struct err *err) {
    struct mortal *m = (struct mortal *)s;
    live(m);
    return m->inner->ops->remove(m->inner, name, err);
}
static const struct ckpt_store_ops mortal_ops = {
    .get = mortal_get, .stat = mortal_stat, .put = mortal_put, .upload_begin = mortal_begin,
    .upload_put = mortal_upload_put, .upload_sync = mortal_sync, .upload_complete = mortal_complete,
    .upload_destroy = mortal_destroy, .list = mortal_list, .remove = mortal_remove};

/* In a child: write checkpoint 2 and die before change number `left`. True if it got through. */
static bool write_and_die(const char *name, int left) {
    pid_t child = fork();
    if (child == 0) {
        struct err err = {0};
        struct ckpt_store *s = ckpt_store_open(folder(name), false, &err);
        struct mortal m = {.base.ops = &mortal_ops, .inner = s, .left = &left};
        _exit(write_checkpoint(&m.base, &run, 2, &err) ? 1 : 0);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) != 1);
    return WEXITSTATUS(status) == 0;
}

/* A writer may be killed between any two changes to the store. What `latest` names is then whole,
 * old or new; a prune leaves nothing else; and the same checkpoint can be written again. */
static void a_crash_at_any_moment_leaves_whole_checkpoints_only(void **state) {
    (void)state;
    bool through = false;
    int steps = 0, old = 0;
    for (; !through && steps < 200; steps++) {
        struct err err = {0};
        char name[32], file[256];
        snprintf(name, sizeof name, "crash-%d", steps);
        struct ckpt_store *s = open_store(name);
        must_write(s, &run, 1);
        through = write_and_die(name, steps);

        struct ckpt *c = must_open(folder(name));
        uint64_t index = ckpt_facts(c)->index;
        assert_true(index == 1 || index == 2);
        assert_int_equal(ckpt_verify(c, NULL, NULL, &err), 0);
        ckpt_close(c);
        old += index == 1;

        const struct ckpt_retention young = {.stale_s = 3600}, any = {.stale_s = 0};
        assert_int_equal(ckpt_prune(s, &young, NULL, NULL, &err), 0); /* its writer may still be alive */
        snprintf(file, sizeof file, "%s/step-000000000002/manifest.json", folder(name));
        bool whole = access(file, F_OK) == 0;
        assert_int_equal(ckpt_prune(s, &any, NULL, NULL, &err), 0);
        snprintf(file, sizeof file, "%s/step-000000000002", folder(name));
        if (whole) {
            if (check_all(file, &err)) fail_msg("died before change %d: %s", steps, err.msg);
        } else {
            assert_int_equal(access(file, F_OK), -1);
            must_write(s, &run, 2);
        }
        s->ops->close(s);
    }
    assert_true(through && old > 20 && old < steps);
}

/* The same without a crash: the agent leaves, and nothing of what it began stays. */
static void destroying_an_unfinished_writer_leaves_nothing(void **state) {
    (void)state;
    for (int stage = 0; stage < 3; stage++) {
        struct err err = {0};
        struct ckpt_store *s = open_store("abandoned");
        struct ckpt_writer *w = create(s, &run, 4, &err);
        if (stage > 0) assert_int_equal(put(w, &run, 0, run.elements, &err), 0);
        if (stage > 1) {
            assert_int_equal(ckpt_writer_finish(w, &err), 0);
            assert_int_equal(wait_past(w, CKPT_FINISHING, &err), CKPT_UNSIGNED);
        }
        ckpt_writer_destroy(w);
        assert_int_equal(count_in(folder("abandoned")), 0);
        assert_int_equal(access(folder("abandoned/step-000000000004"), F_OK), -1);
        s->ops->close(s);
    }
}

/* The first member was slow, a second one was asked; both are at it. The later one wins, the
 * first finds out before it can touch anything. */
static void a_writer_that_was_overtaken_harms_nothing(void **state) {
    (void)state;
    struct err err = {0};
    struct ckpt_store *s = open_store("overtaken");
    struct ckpt_writer *slow = create(s, &run, 6, &err);
    assert_int_equal(put(slow, &run, 0, run.elements, &err), 0);
    assert_int_equal(ckpt_writer_finish(slow, &err), 0);
    assert_int_equal(wait_past(slow, CKPT_FINISHING, &err), CKPT_UNSIGNED);
    must_write(s, &run, 6);
    if (!sign_and_publish(slow, &run, &err))
        assert_int_equal(wait_past(slow, CKPT_PUBLISHING, &err), CKPT_FAILED);
    assert_int_equal(err.code, ERR_STALE);
    ckpt_writer_destroy(slow);
    if (check_all(folder("overtaken"), &err)) fail_msg("%s", err.msg);
    assert_null(create(s, &run, 6, &err)); /* and a third is not needed */
    assert_int_equal(err.code, ERR_REFUSED);
    s->ops->close(s);
}

/* Two coordinators' members may move `latest` at once; a compare is what keeps both right. */
static void a_conditional_put_loses_against_a_change(void **state) {
    (void)state;
    struct err err = {0};
    struct ckpt_object o;
    struct ckpt_store *s = open_store("conditional");
    assert_int_equal(s->ops->put(s, "latest", "one", 3, CKPT_ABSENT, &err), 0);
    assert_int_equal(s->ops->put(s, "latest", "two", 3, CKPT_ABSENT, &err), -1);
    assert_int_equal(err.code, ERR_STALE);
    assert_int_equal(s->ops->stat(s, "latest", &o, &err), 0);
    assert_int_equal(s->ops->put(s, "latest", "two", 3, o.version, &err), 0);
    assert_int_equal(s->ops->put(s, "latest", "six", 3, o.version, &err), -1);
    assert_int_equal(err.code, ERR_STALE);
    char now[3];
    assert_int_equal(s->ops->get(s, "latest", 0, now, 3, &err), 0);
    assert_memory_equal(now, "two", 3);
    assert_int_equal(s->ops->get(s, "latest", 1, now, 3, &err), -1);
    assert_int_equal(err.code, ERR_TRUNCATED);
    assert_int_equal(count_in(folder("conditional")), 1); /* no half-written ones beside it */
    s->ops->close(s);
}

/* Names come from manifests and indexes: none may lead out of the store. */
static void names_that_lead_out_of_the_store_are_refused(void **state) {
    (void)state;
    static const char *const bad[] = {"", "/etc/passwd", "../x", "a/../b", "a//b", "a/", ".hidden",
                                      "a/.b", "a b", "a\nb", "a\\b"};
    struct err err = {0};
    struct ckpt_object o;
    struct ckpt_store *s = open_store("names");
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_false(ckpt_name_valid(bad[i]));
        assert_int_equal(s->ops->stat(s, bad[i], &o, &err), -1);
        assert_int_equal(s->ops->put(s, bad[i], "", 0, NULL, &err), -1);
        assert_null(s->ops->upload_begin(s, bad[i], 1, &err));
        assert_int_equal(err.code, ERR_REFUSED);
    }
    assert_int_equal(s->ops->remove(s, "../names", &err), -1);
    assert_true(ckpt_name_valid("step-1/model-00001-of-00002.safetensors"));
    s->ops->close(s);
}

static void fill_disk(const char *path, size_t leave_bytes) {
    static const char zeros[4096];
    char filler[256];
    snprintf(filler, sizeof filler, "%s/filler", path);
    FILE *f = fopen(filler, "wb");
    while (fwrite(zeros, 1, sizeof zeros, f) == sizeof zeros && !fflush(f)) continue;
    long full = ftell(f);
    fclose(f);
    if (truncate(filler, full / 4096 * 4096 - (long)leave_bytes)) fail_msg("truncate");
}

static int unmount_small(void **state) {
    (void)state;
    umount2(folder("small-disk"), MNT_DETACH);
    return 0;
}

/* A full disk is an ordinary day: a clear error, and what was there is still whole. */
static void a_full_disk_is_an_error_and_leaves_no_half(void **state) {
    (void)state;
    struct err err = {0};
    char path[128];
    snprintf(path, sizeof path, "%s", folder("small-disk"));
    mkdir(path, 0700);
    if (mount("none", path, "tmpfs", 0, "size=500k")) { /* one checkpoint is about 340 kB */
        print_message("skipped: a small file system cannot be mounted here (needs root)\n");
        skip();
    }
    struct ckpt_store *s = ckpt_store_open(path, true, &err);
    must_write(s, &run, 1);
    assert_null(create(s, &run, 2, &err)); /* the space is asked for before anything is written */
    assert_int_equal(err.code, ERR_FULL);
    assert_non_null(strstr(err.msg, "cannot reserve"));
    assert_int_equal(count_in(path), 18);

    /* Full only when the small objects come: space for all tensors, and little beyond. */
    assert_int_equal(object_remove_all(s, "step-000000000001", &err), 0);
    fill_disk(path, run.elements * 8 + 40000);
    struct ckpt_writer *w = create(s, &run, 2, &err);
    if (!w) fail_msg("%s", err.msg);
    if (!put(w, &run, 0, run.elements, &err) && !ckpt_writer_finish(w, &err))
        assert_int_equal(wait_past(w, CKPT_FINISHING, &err), CKPT_FAILED);
    assert_int_equal(err.code, ERR_FULL);
    ckpt_writer_destroy(w);
    assert_int_equal(count_in(path), 2); /* the filler and the old `latest` */

    unlink(folder("small-disk/filler")); /* and once there is space it works again */
    must_write(s, &run, 2);
    if (check_all(path, &err)) fail_msg("%s", err.msg);
    s->ops->close(s);
}

/* Bytes scattered over many files, few in each, must reach the disk too: the agent waits for that before
 * it puts more, and at the end of a run nothing else comes that would fill them up. */
static void many_files_with_little_in_each_are_synced(void **state) {
    (void)state;
    const size_t chunk = 1 << 20;
    struct err err = {0};
    struct run big = run;
    struct proto_buffer genesis;
    struct msg_genesis g = {0};
    if (proto_decode(run.genesis.data, run.genesis.length, RECORD_genesis, &g, &err)) fail_msg("%s", err.msg);
    g.model->layers = 40; /* 12 M parameters */
    g.model->width = 128;
    g.model->ffn = 700;
    encode(&genesis, RECORD_genesis, &g);
    big.genesis = genesis;
    big.elements = (size_t)proto_model_elements(g.model);
    assert_true(2 * big.elements * 4 > CKPT_BACKLOG_BYTES);
    struct ckpt_meta m = meta_at(&big, 4);
    struct ckpt_store *s = open_store("scattered");
    struct ckpt_writer *w = ckpt_writer_create(s, &m, 8 << 20, &err);
    if (!w) fail_msg("%s", err.msg);
    float *zeros = calloc(chunk, sizeof *zeros);
    for (size_t at = 0; at < big.elements; at += chunk) {
        size_t n = big.elements - at < chunk ? big.elements - at : chunk;
        if (ckpt_writer_put(w, at, n, zeros, zeros, &err)) fail_msg("%s", err.msg);
    }
    for (int i = 0; ckpt_writer_backlog_bytes(w) >= CKPT_BACKLOG_BYTES; i++) {
        if (i == WAIT_MS_MAX) fail_msg("%" PRIu64 " bytes wait for ever", ckpt_writer_backlog_bytes(w));
        usleep(1000);
    }
    ckpt_writer_destroy(w);
    free(zeros);
    proto_decoded_release(RECORD_genesis, &g);
    proto_buffer_release(&genesis);
    s->ops->close(s);
}

/* Nonsense from a coordinator is told apart before anything is written. */
static void nonsense_to_write_is_refused(void **state) {
    (void)state;
    struct err err = {0};
    struct ckpt_store *s = open_store("nonsense");
    struct ckpt_meta m = meta_at(&run, 4);
    const struct msg_range twice[] = {{0, 10}, {9, 5}};
    m.spent = twice;
    m.spent_count = 2;
    assert_null(ckpt_writer_create(s, &m, 0, &err));
    assert_non_null(strstr(err.msg, "sample 9 was spent twice"));
    m = meta_at(&run, 4);
    m.ledger_count = 4; /* ends at 3 */
    assert_null(ckpt_writer_create(s, &m, 0, &err));
    assert_int_equal(err.code, ERR_CORRUPT);
    struct msg_signed_entry unchained[2] = {run.ledger[3], run.ledger[4]};
    uint8_t *copy = malloc(unchained[0].bytes.length);
    memcpy(copy, unchained[0].bytes.data, unchained[0].bytes.length);
    copy[unchained[0].bytes.length - 1] ^= 1;
    unchained[0].bytes.data = copy;
    m.ledger = unchained;
    m.ledger_count = 2;
    assert_null(ckpt_writer_create(s, &m, 0, &err));
    assert_non_null(strstr(err.msg, "not chained"));
    m = meta_at(&run, 4);
    m.genesis.length--;
    assert_null(ckpt_writer_create(s, &m, 0, &err));
    assert_int_equal(err.code, ERR_CORRUPT);
    assert_int_equal(count_in(folder("nonsense")), 0);
    free(copy);
    s->ops->close(s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_checkpoint_names_a_tokenizer_of_others),
        cmocka_unit_test(a_checkpoint_gives_back_the_state),
        cmocka_unit_test(ranges_come_in_any_order),
        cmocka_unit_test(each_element_is_put_exactly_once),
        cmocka_unit_test(a_state_of_another_root_is_refused),
        cmocka_unit_test(bf16_weights_have_the_anchor_beside_them),
        cmocka_unit_test(what_the_store_gives_back_must_be_the_state),
        cmocka_unit_test(a_bad_signature_is_not_published),
        cmocka_unit_test(a_crash_at_any_moment_leaves_whole_checkpoints_only),
        cmocka_unit_test(destroying_an_unfinished_writer_leaves_nothing),
        cmocka_unit_test(a_writer_that_was_overtaken_harms_nothing),
        cmocka_unit_test(a_conditional_put_loses_against_a_change),
        cmocka_unit_test(names_that_lead_out_of_the_store_are_refused),
        cmocka_unit_test_teardown(a_full_disk_is_an_error_and_leaves_no_half, unmount_small),
        cmocka_unit_test(many_files_with_little_in_each_are_synced),
        cmocka_unit_test(nonsense_to_write_is_refused),
    };
    return cmocka_run_group_tests(tests, before_all, after_all);
}
