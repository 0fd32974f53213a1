/* test_ckpt.c - checkpoints: bits survive, half a checkpoint never looks whole, and nothing that
 * was changed on the way is believed. */
#define _GNU_SOURCE /* umount2 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <openssl/evp.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ckpt/internal.h"

#define SHARD_BYTES 60000 /* the small model then has three files each */
#define WAIT_MS_MAX 20000

/* ---- a run, a model, a folder ------------------------------------------------------------------ */

static char root[64]; /* of this program's folders; in memory where that is possible: fsync is free */

static const char *folder(const char *name) {
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", root, name);
    return path;
}

static struct ckpt_store *open_store(const char *name) {
    struct err err = {0};
    struct ckpt_store *s = ckpt_store_open(folder(name), true, &err);
    if (!s) {
        fail_msg("%s", err.msg);
        abort(); /* cmocka does not tell the compiler that fail_msg ends here */
    }
    return s;
}

#define LEDGER_ENTRIES 12
struct run {
    struct identity root_key, online;
    struct proto_buffer genesis, delegation, entry[LEDGER_ENTRIES];
    struct proto_sig delegation_sig;
    struct msg_signed_entry ledger[LEDGER_ENTRIES];
    struct digest id;
    struct msg_model model;
    float *anchor, *momentum;
    size_t elements;
    struct digest root; /* of the state */
};

static struct run run; /* what every test writes; fresh bits, same names */

static struct proto_bytes bytes_of(const struct proto_buffer *b) {
    return (struct proto_bytes){b->data, (uint32_t)b->length};
}

static void encode(struct proto_buffer *b, enum proto_record which, const void *record) {
    struct err err = {0};
    proto_buffer_init(b, PROTO_BLOB_BYTES_MAX);
    if (proto_encode(b, which, record, &err)) fail_msg("%s", err.msg);
}

static uint64_t next_random(uint64_t *state) { /* xorshift64 */
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

static void make_ledger(struct run *r) {
    struct digest previous = {{0}};
    for (uint64_t i = 0; i < LEDGER_ENTRIES; i++) {
        struct msg_entry e = {.index = i, .previous = previous, .term = i ? 1 : 0,
                              .kind = i ? LEDGER_COMMIT : LEDGER_GENESIS};
        e.body = i ? proto_str("a commit") : bytes_of(&r->genesis);
        encode(&r->entry[i], RECORD_entry, &e);
        r->ledger[i].bytes = bytes_of(&r->entry[i]);
        proto_sign(i ? &r->online : &r->root_key, "ledger", &r->id, e.term, r->entry[i].data,
                   r->entry[i].length, &r->ledger[i].signature);
        previous = LEDGER_DIGEST(&r->ledger[i]);
    }
}

#define CHUNK_ELEMENTS 1024u
static struct digest root_of(const struct run *r) {
    size_t chunks = (r->elements + CHUNK_ELEMENTS - 1) / CHUNK_ELEMENTS;
    struct msg_digest_item *leaf = calloc(chunks, sizeof *leaf);
    for (size_t i = 0, first = 0; i < chunks; i++, first += CHUNK_ELEMENTS) {
        size_t n = r->elements - first < CHUNK_ELEMENTS ? r->elements - first : CHUNK_ELEMENTS;
        leaf[i].digest = digest_leaf2(i, r->anchor + first, n * 4, r->momentum + first, n * 4);
    }
    struct digest top = digest_tree_root(leaf, chunks);
    free(leaf);
    return top;
}

static void make_run_of(struct run *r, uint8_t seed, int tied, const char *tokenizer) {
    uint8_t a[32] = {seed, 1}, b[32] = {seed, 2};
    identity_from_seed(&r->root_key, a);
    identity_from_seed(&r->online, b);
    r->model = (struct msg_model){.layers = 2, .width = 32, .heads = 4, .kv_heads = 2, .ffn = 48,
                                  .vocabulary = 256, .sequence = 64, .rope_theta = 500000,
                                  .norm_eps = 1e-5, .tied = (uint8_t)tied};
    struct msg_inner inner = {.batch = 1, .total_tokens = 1};
    struct msg_outer outer = {.inner_steps = 1, .chunk_elements = CHUNK_ELEMENTS, .fragments = 1};
    struct msg_corpus corpus = {.tokenizer = proto_str(tokenizer), .samples = 1000};
    struct msg_genesis g = {.version = 1, .name = proto_str("test"), .root_key = r->root_key.key,
                            .model = &r->model, .model_count = 1, .inner = &inner, .inner_count = 1,
                            .outer = &outer, .outer_count = 1, .corpus = &corpus, .corpus_count = 1,
                            .init_std = 0.02f};
    encode(&r->genesis, RECORD_genesis, &g);
    r->id = digest_of(r->genesis.data, r->genesis.length);
    struct msg_delegation d = {.run = r->id, .key = r->online.key, .number = 1};
    encode(&r->delegation, RECORD_delegation, &d);
    proto_sign(&r->root_key, "delegation", &r->id, 0, r->delegation.data, r->delegation.length,
               &r->delegation_sig);
    make_ledger(r);
    r->elements = (size_t)proto_model_elements(&r->model);
    r->anchor = malloc(r->elements * 4);
    r->momentum = malloc(r->elements * 4);
    uint64_t state = seed + 1u;
    for (size_t i = 0; i < r->elements; i++) { /* any bits: NaNs and subnormals must survive too */
        uint64_t x = next_random(&state);
        memcpy(r->anchor + i, &x, 4);
        memcpy(r->momentum + i, (uint8_t *)&x + 4, 4);
    }
    r->root = root_of(r);
}

static void make_run(struct run *r, uint8_t seed, int tied) {
    make_run_of(r, seed, tied, "bytes");
}

static void release_run(struct run *r) {
    proto_buffer_release(&r->genesis);
    proto_buffer_release(&r->delegation);
    for (int i = 0; i < LEDGER_ENTRIES; i++) proto_buffer_release(&r->entry[i]);
    free(r->anchor);
    free(r->momentum);
}

/* ---- writing, as an agent does ----------------------------------------------------------------- */

static const struct msg_range spent_samples[] = {{64, 16}, {0, 32}, {32, 8}};

static struct ckpt_meta meta_at(const struct run *r, uint64_t index) {
    return (struct ckpt_meta){.index = index, .state_root = r->root, .round = index,
                              .tokens_committed = 1000 * index, .spent = spent_samples,
                              .spent_count = 3, .genesis = bytes_of(&r->genesis),
                              .ledger = r->ledger, .ledger_count = (uint32_t)index + 1};
}

static struct ckpt_writer *create(struct ckpt_store *s, const struct run *r, uint64_t index,
                                  struct err *err) {
    struct ckpt_meta meta = meta_at(r, index);
    return ckpt_writer_create(s, &meta, SHARD_BYTES, err);
}

static int put(struct ckpt_writer *w, const struct run *r, uint64_t first, size_t n, struct err *err) {
    return ckpt_writer_put(w, first, n, r->anchor + first, r->momentum + first, err);
}

/* Wait until the state is not `before` any more. */
static enum ckpt_state wait_past(struct ckpt_writer *w, enum ckpt_state before, struct err *err) {
    for (;;) {
        enum ckpt_state now = ckpt_writer_poll(w, err);
        struct pollfd p = {.fd = ckpt_writer_fd(w), .events = POLLIN};
        if (now != before) return now;
        if (poll(&p, 1, WAIT_MS_MAX) != 1) fail_msg("the writer went to sleep in state %d", before);
    }
}

static int sign_and_publish(struct ckpt_writer *w, const struct run *r, struct err *err) {
    size_t n;
    struct proto_sig sig;
    const void *manifest = ckpt_writer_manifest(w, &n);
    proto_sign(&r->online, "manifest", &r->id, 7, manifest, n, &sig);
    return ckpt_writer_publish(w, 7, &sig, &r->online.key, bytes_of(&r->delegation),
                               &r->delegation_sig, err);
}

/* From all put to published. */
static int finish(struct ckpt_writer *w, const struct run *r, struct err *err) {
    if (ckpt_writer_finish(w, err)) return -1;
    if (wait_past(w, CKPT_FINISHING, err) != CKPT_UNSIGNED) return -1;
    if (sign_and_publish(w, r, err)) return -1;
    return wait_past(w, CKPT_PUBLISHING, err) == CKPT_PUBLISHED ? 0 : -1;
}

static int write_checkpoint(struct ckpt_store *s, const struct run *r, uint64_t index, struct err *err) {
    struct ckpt_writer *w = create(s, r, index, err);
    int failed = !w || put(w, r, 0, r->elements, err) || finish(w, r, err);
    ckpt_writer_destroy(w);
    return failed ? -1 : 0;
}

static void must_write(struct ckpt_store *s, const struct run *r, uint64_t index) {
    struct err err = {0};
    if (write_checkpoint(s, r, index, &err)) fail_msg("%s", err.msg);
}

/* A folder with checkpoint 5 in it; *path its folder. */
static void fresh(const char *name, char path[160]) {
    struct ckpt_store *s = open_store(name);
    must_write(s, &run, 5);
    s->ops->close(s);
    snprintf(path, 160, "%s/step-000000000005", folder(name));
}

static struct ckpt *must_open(const char *path) {
    struct err err = {0};
    struct ckpt *c = ckpt_open(path, NULL, &err);
    if (!c) fail_msg("%s", err.msg);
    return c;
}

static void assert_same_tensors(const struct ckpt *c, const struct run *r) {
    struct err err = {0};
    float *got = malloc(r->elements * 4);
    assert_int_equal(ckpt_read(c, CKPT_ANCHOR, 0, r->elements, got, &err), 0);
    assert_memory_equal(got, r->anchor, r->elements * 4);
    assert_int_equal(ckpt_read(c, CKPT_MOMENTUM, 0, r->elements, got, &err), 0);
    assert_memory_equal(got, r->momentum, r->elements * 4);
    free(got);
}

static void assert_refused(const char *path, enum err_code code, const char *word) {
    struct err err = {0};
    struct ckpt *c = ckpt_open(path, NULL, &err);
    if (c) fail_msg("%s opened; expected: %s", path, word);
    assert_int_equal(err.code, code);
    if (!strstr(err.msg, word)) fail_msg("\"%s\" does not say \"%s\"", err.msg, word);
}

/* ---- files ------------------------------------------------------------------------------------- */

static struct ckpt_blob slurp(const char *path) {
    struct ckpt_blob b = {0};
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    assert_int_equal(fseek(f, 0, SEEK_END), 0);
    b.length = (size_t)ftell(f);
    rewind(f);
    b.data = malloc(b.length + 1);
    assert_int_equal(fread(b.data, 1, b.length, f), b.length);
    b.data[b.length] = 0;
    fclose(f);
    return b;
}

static off_t file_bytes(const char *path) {
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    return st.st_size;
}

static void spill(const char *path, const void *data, size_t n) {
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    fclose(f);
}

static struct object_list files_in(const char *path) {
    struct err err = {0};
    struct object_list l;
    struct ckpt_store *s = ckpt_store_open(path, false, &err);
    if (!s) {
        fail_msg("%s", err.msg);
        abort();
    }
    assert_int_equal(object_list(s, "", &l, &err), 0);
    s->ops->close(s);
    return l;
}

static size_t count_in(const char *path) {
    struct object_list l = files_in(path);
    size_t n = l.count;
    object_list_release(&l);
    return n;
}

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

/* ---- changed on the way ------------------------------------------------------------------------ */

/* Open and verify; the first thing that goes wrong goes to *err. */
static int check_all(const char *path, struct err *err) {
    struct ckpt *c = ckpt_open(path, &run.id, err);
    int r = c ? ckpt_verify(c, NULL, NULL, err) : -1;
    ckpt_close(c);
    return r;
}

/* ---- weights in bf16 ------------------------------------------------------------------------------- */

static struct ckpt_writer *create_bf16(struct ckpt_store *s, const struct run *r) {
    struct err err = {0};
    struct ckpt_meta meta = meta_at(r, 5);
    meta.weights = CKPT_BF16;
    struct ckpt_writer *w = ckpt_writer_create(s, &meta, SHARD_BYTES, &err);
    if (!w || put(w, r, 0, 777, &err) || put(w, r, 777, r->elements - 777, &err)) fail_msg("%s", err.msg);
    return w;
}

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

/* Let the online key sign the manifest of `path` once more, with another root, or another digest of an object. */
static void sign_again(const char *path, const char *object, const char *hex) {
    struct err err = {0};
    char file[256];
    size_t i;
    json_t *o;
    struct manifest_sig sig;
    snprintf(file, sizeof file, "%s/manifest.json", path);
    struct ckpt_blob old = slurp(file), manifest, text;
    json_t *json = json_read(&old, file, &err);
    if (!object) json_object_set_new(json, "state_root", json_string(hex));
    json_array_foreach(json_object_get(json, "objects"), i, o)
        if (object && !strcmp(json_string_value(json_object_get(o, "name")), object))
            json_object_set_new(o, "blake2b", json_string(hex));
    if (json_write(json, 0, &manifest, &err)) fail_msg("%s", err.msg);
    spill(file, manifest.data, manifest.length);
    snprintf(file, sizeof file, "%s/manifest.sig", path);
    struct ckpt_blob was = slurp(file);
    if (manifest_sig_parse(&was, &sig, &err)) fail_msg("%s", err.msg);
    proto_sign(&run.online, "manifest", &run.id, sig.term, manifest.data, manifest.length, &sig.signature);
    if (manifest_sig_format(&sig, &text, &err)) fail_msg("%s", err.msg);
    spill(file, text.data, text.length);
    manifest_sig_release(&sig);
    free(old.data);
    free(manifest.data);
    free(was.data);
    free(text.data);
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

/* Whoever signed vouches for digests alone: what others load must be the run's. */
static void weights_that_are_not_the_anchors_are_refused(void **state) {
    (void)state;
    struct err err = {0};
    char path[160], file[256], hex[DIGEST_HEX_BYTES];
    struct ckpt_store *s = open_store("bf16-other");
    struct ckpt_writer *w = create_bf16(s, &run);
    if (finish(w, &run, &err)) fail_msg("%s", err.msg);
    ckpt_writer_destroy(w);
    s->ops->close(s);
    snprintf(path, sizeof path, "%s/step-000000000005", folder("bf16-other"));
    struct ckpt *c = must_open(path);
    uint64_t bytes;
    struct digest ignored;
    const char *first = ckpt_object(c, 0, &bytes, &ignored);
    snprintf(file, sizeof file, "%s/%s", path, first);
    struct ckpt_blob b = slurp(file);
    b.data[b.length - 1] ^= 1;
    spill(file, b.data, b.length);
    struct digest now = digest_of(b.data, b.length);
    digest_hex(&now, hex);
    sign_again(path, first, hex);
    ckpt_close(c);
    free(b.data);
    assert_int_equal(check_all(path, &err), -1);
    if (!strstr(err.msg, "the weights are not the anchor rounded to bf16")) fail_msg("%s", err.msg);
}

/* Disks and couriers flip bits. Each object is hit at its beginning, middle and end. */
static void a_changed_byte_anywhere_is_found_and_named(void **state) {
    (void)state;
    char path[160], file[512];
    fresh("flip", path);
    struct object_list l = files_in(path);
    assert_int_equal(l.count, 17);
    for (size_t i = 0; i < l.count; i++) {
        snprintf(file, sizeof file, "%s/%s", path, l.object[i].name);
        struct ckpt_blob b = slurp(file);
        const size_t where[] = {0, b.length / 2, b.length - 1};
        for (int k = 0; k < 3; k++) {
            struct err err = {0};
            b.data[where[k]] ^= 4;
            spill(file, b.data, b.length);
            b.data[where[k]] ^= 4;
            if (!check_all(path, &err)) fail_msg("%s: byte %zu changed unseen", file, where[k]);
            bool run_named = !strcmp(l.object[i].name, "genesis.bin") && err.code == ERR_REFUSED;
            if (!strstr(err.msg, l.object[i].name) && !run_named)
                fail_msg("%s changed, and the message is: %s", l.object[i].name, err.msg);
        }
        spill(file, b.data, b.length);
        free(b.data);
    }
    struct err err = {0};
    if (check_all(path, &err)) fail_msg("%s", err.msg);
    object_list_release(&l);
}

/* A copy that stopped early, and one that never began. */
static void a_short_or_missing_object_is_found_and_named(void **state) {
    (void)state;
    char path[160], file[512];
    fresh("short", path);
    struct object_list l = files_in(path);
    for (size_t i = 0; i < l.count; i++) {
        snprintf(file, sizeof file, "%s/%s", path, l.object[i].name);
        struct ckpt_blob b = slurp(file);
        for (int k = 0; k < 3; k++) { /* one byte, nearly all bytes, the file itself */
            struct err err = {0};
            if (k < 2) assert_int_equal(truncate(file, k ? 3 : (off_t)b.length - 1), 0);
            else assert_int_equal(unlink(file), 0);
            if (!check_all(path, &err)) fail_msg("%s: shortened unseen", file);
            bool run_named = !strcmp(l.object[i].name, "genesis.bin") && err.code == ERR_REFUSED;
            if (!strstr(err.msg, l.object[i].name) && !run_named)
                fail_msg("%s shortened, and the message is: %s", l.object[i].name, err.msg);
        }
        spill(file, b.data, b.length);
        free(b.data);
    }
    object_list_release(&l);
}

/* The manifest is what makes a folder a checkpoint; without it the config.json and tensors that
 * lie there must not pass for a plain model either. */
static void without_a_manifest_there_is_no_checkpoint(void **state) {
    (void)state;
    char path[160], file[256];
    fresh("headless", path);
    snprintf(file, sizeof file, "%s/manifest.json", path);
    assert_int_equal(unlink(file), 0);
    assert_refused(path, ERR_NOT_FOUND, "not finished");
    assert_refused(folder("headless"), ERR_NOT_FOUND, "no manifest.json");
    assert_refused(folder("no-such-folder"), ERR_NOT_FOUND, "no-such-folder");
    struct ckpt_store *s = open_store("empty");
    s->ops->close(s);
    assert_refused(folder("empty"), ERR_NOT_FOUND, "no checkpoint here");
    assert_refused("gopher://x", ERR_CONFIG, "gopher");
}

static void another_run_is_refused(void **state) {
    (void)state;
    struct err err = {0};
    char path[160];
    struct digest other = digest_of("another", 7);
    fresh("other-run", path);
    assert_null(ckpt_open(path, &other, &err));
    assert_int_equal(err.code, ERR_REFUSED);
    assert_non_null(strstr(err.msg, "expected run"));
}

/* A store is not trusted: whoever can write there may put files that fit together, but not sign. */
static void a_manifest_that_the_run_did_not_sign_is_refused(void **state) {
    (void)state;
    struct err err = {0};
    struct run thief = {0};
    struct ckpt_blob b;
    char path[160], file[256], stolen[256];
    make_run(&thief, 9, 0);
    struct ckpt_store *s = open_store("thief");
    must_write(s, &thief, 5);
    s->ops->close(s);
    fresh("victim", path);
    const char *const swapped[] = {"manifest.sig", "manifest.json"};
    for (int i = 0; i < 2; i++) {
        snprintf(file, sizeof file, "%s/%s", path, swapped[i]);
        snprintf(stolen, sizeof stolen, "%s/step-000000000005/%s", folder("thief"), swapped[i]);
        b = slurp(stolen);
        spill(file, b.data, b.length);
        free(b.data);
        assert_refused(path, ERR_REFUSED, "manifest.sig");
    }
    assert_non_null(strstr((assert_null(ckpt_open(path, &thief.id, &err)), err.msg), "expected run"));
    release_run(&thief);
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

/* ---- crashes, races, full disks ---------------------------------------------------------------- */

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

/* ---- parts that others send ---------------------------------------------------------------------- */

/* A folder whose uploads can be shared, in parts of a page. What others have sent lies beside what was
 * put. */
#define SHARED_PART 4096u
struct shared_upload {
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
};
static pthread_mutex_t shared_mutex = PTHREAD_MUTEX_INITIALIZER;

static size_t shared_bytes(const struct shared_upload *u, uint32_t i) {
    return u->bytes - i * SHARED_PART < SHARED_PART ? u->bytes - i * SHARED_PART : SHARED_PART;
}
static int shared_get(struct ckpt_store *s, const char *name, uint64_t at, void *out, size_t n,
                      struct err *err) {
    struct ckpt_store *inner = ((struct shared_store *)s)->inner;
    return inner->ops->get(inner, name, at, out, n, err);
}
static int shared_stat(struct ckpt_store *s, const char *name, struct ckpt_object *out, struct err *err) {
    struct ckpt_store *inner = ((struct shared_store *)s)->inner;
    return inner->ops->stat(inner, name, out, err);
}
static int shared_put(struct ckpt_store *s, const char *name, const void *b, size_t n, const char *v,
                      struct err *err) {
    struct ckpt_store *inner = ((struct shared_store *)s)->inner;
    return inner->ops->put(inner, name, b, n, v, err);
}
static int shared_list(struct ckpt_store *s, const char *prefix,
                       int (*visit)(void *, const struct ckpt_object *, struct err *), void *arg,
                           struct err *err) {
    struct ckpt_store *inner = ((struct shared_store *)s)->inner;
    return inner->ops->list(inner, prefix, visit, arg, err);
}
static int shared_remove(struct ckpt_store *s, const char *name, struct err *err) {
    struct ckpt_store *inner = ((struct shared_store *)s)->inner;
    return inner->ops->remove(inner, name, err);
}
static struct ckpt_upload *shared_begin(struct ckpt_store *s, const char *name, uint64_t bytes,
                                        struct err *err) {
    struct shared_store *store = (struct shared_store *)s;
    struct shared_upload *u = calloc(1, sizeof *u);
    assert_true(bytes <= 64 * SHARED_PART);
    *u = (struct shared_upload){.inner = store->inner, .bytes = (size_t)bytes,
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
    .upload_read = shared_read, .upload_release = shared_release};

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

static void count_removed(void *arg, const struct ckpt_entry *e) {
    assert_false(e->kept || e->latest || e->pinned);
    ++*(uint32_t *)arg;
}

/* `latest` is where a new member begins: it must not go back because an old writer was late. */
static void latest_never_goes_back_and_old_checkpoints_can_be_pruned(void **state) {
    (void)state;
    struct err err = {0};
    struct latest l;
    char version[CKPT_VERSION_BYTES_MAX + 1];
    uint32_t removed = 0;
    const struct ckpt_retention two = {.last = 2};
    struct ckpt_store *s = open_store("history");
    const uint64_t order[] = {3, 9, 4, 8};
    for (int i = 0; i < 4; i++) must_write(s, &run, order[i]);
    assert_int_equal(latest_read(s, &l, version, &err), 0);
    assert_int_equal(l.index, 9);
    assert_int_equal(ckpt_prune(s, &two, count_removed, &removed, &err), 0);
    assert_int_equal(removed, 2);
    assert_int_equal(access(folder("history/step-000000000008/manifest.json"), F_OK), 0);
    assert_int_equal(access(folder("history/step-000000000004"), F_OK), -1);
    if (check_all(folder("history"), &err)) fail_msg("%s", err.msg);
    s->ops->close(s);
}

static bool is_kept(const struct ckpt_entry *e, uint32_t count, uint64_t index) {
    for (uint32_t i = 0; i < count; i++)
        if (e[i].index == index) return e[i].kept;
    return false;
}

/* Forget what was not kept, as a prune does. */
static uint32_t drop_unkept(struct ckpt_entry *e, uint32_t count) {
    uint32_t left = 0;
    for (uint32_t i = 0; i < count; i++)
        if (e[i].kept) e[left++] = e[i];
    return left;
}

/* A history thinned out again and again keeps the same checkpoints as one thinned out once. */
static void what_stays_once_stays(void **state) {
    (void)state;
    const struct ckpt_retention how = {.last = 3, .every = 100, .stale_s = 50};
    uint64_t random = 11;
    for (int round = 0; round < 200; round++) {
        struct ckpt_entry often[64] = {0}, once[64] = {0};
        uint32_t count = 0, all = 0;
        uint64_t index = 0, pinned = 0;
        for (int i = 0; i < 40; i++) {
            index += 1 + next_random(&random) % 60;
            struct ckpt_entry e = {.index = index, .complete = next_random(&random) % 5 != 0, .modified_s = 1000 + i};
            if (e.complete && next_random(&random) % 11 == 0) e.pinned = true, pinned = index;
            memmove(&often[1], often, count++ * sizeof e);
            memmove(&once[1], once, all++ * sizeof e);
            often[0] = once[0] = e;
            ckpt_retain(&how, 1000 + i, often, count);
            count = drop_unkept(often, count);
        }
        ckpt_retain(&how, 1039, once, all);
        assert_true(!pinned || is_kept(once, all, pinned));
        uint32_t newest = 0;
        for (uint32_t i = 0; i < all; i++) {
            if (once[i].complete && newest++ < 3) assert_true(once[i].kept);
            if (once[i].kept) assert_true(is_kept(often, count, once[i].index));
        }
        assert_int_equal(drop_unkept(once, all), count);
    }
    struct ckpt_entry left = {.index = 4, .modified_s = 100};
    ckpt_retain(&how, 149, &left, 1);
    assert_true(left.kept); /* its writer may be at it */
    ckpt_retain(&how, 150, &left, 1);
    assert_false(left.kept);
}

/* What was published with a paper stays, and everything that stays is whole. */
static void a_pinned_checkpoint_survives_every_prune(void **state) {
    (void)state;
    struct err err = {0};
    struct ckpt_entry *e;
    uint32_t count, removed = 0;
    char path[256];
    const struct ckpt_retention how = {.last = 1, .every = 4};
    struct ckpt_store *s = open_store("pinned");
    for (uint64_t i = 1; i <= 10; i++) must_write(s, &run, i);
    assert_int_equal(ckpt_pin(s, 6, true, &err), 0);
    assert_int_equal(ckpt_pin(s, 6, true, &err), 0);
    assert_int_equal(ckpt_pin(s, 77, true, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
    if (ckpt_prune(s, &how, count_removed, &removed, &err)) fail_msg("%s", err.msg);
    assert_int_equal(removed, 5);
    if (ckpt_list(s, &e, &count, &err)) fail_msg("%s", err.msg);
    static const uint64_t stay[] = {10, 8, 6, 4, 1}; /* newest; of 8..11, pinned; of 4..7; of 0..3 */
    assert_int_equal(count, 5);
    for (uint32_t i = 0; i < count; i++) {
        assert_int_equal(e[i].index, stay[i]);
        assert_true(e[i].complete && e[i].bytes > run.elements * 8);
        assert_int_equal(e[i].pinned, e[i].index == 6);
        assert_int_equal(e[i].latest, e[i].index == 10);
        snprintf(path, sizeof path, "%s/%s", folder("pinned"), e[i].prefix);
        if (check_all(path, &err)) fail_msg("%s", err.msg);
    }
    free(e);
    assert_int_equal(ckpt_pin(s, 6, false, &err), 0);
    if (ckpt_prune(s, &how, count_removed, &removed, &err)) fail_msg("%s", err.msg);
    assert_int_equal(removed, 6);
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

/* ---- hostile safetensors ----------------------------------------------------------------------- */

/* Headers for a file with 16 bytes of data; each must be refused, with a word that says why. */
static const struct {
    const char *header, *word;
} hostile[] = {
    {"", "not a safetensors file"},
    {"[]", "not a safetensors file"},
    {"{", "not JSON"},
    {"{}", "tensors end at byte"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}} x", "not JSON"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
     "\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}}", "duplicate"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
     "\"b\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[4,16]}}", "overlaps"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
     "\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}}", "gap"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[8],\"data_offsets\":[0,32]}}", "bytes 0 to 32 of data of 16"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[16,0]}}", "bytes 16 to 0"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[-16,0]}}", "data_offsets"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,9223372036854775807]}}", "of data of 16"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,99999999999999999999]}}", "not JSON"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[0,16]}}", "shape and dtype make 20"},
    {"{\"a\":{\"dtype\":\"F16\",\"shape\":[4],\"data_offsets\":[0,16]}}", "shape and dtype make 8"},
    {"{\"a\":{\"dtype\":\"F99\",\"shape\":[4],\"data_offsets\":[0,16]}}", "F99"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,16]}}", "too large"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,4],\"data_offsets\":[0,16]}}", "shape"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4.0],\"data_offsets\":[0,16]}}", "shape"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":4,\"data_offsets\":[0,16]}}", "shape"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0]}}", "data_offsets"},
    {"{\"a\":{\"dtype\":4,\"shape\":[4],\"data_offsets\":[0,16]}}", "dtype"},
    {"{\"a\":[],\"b\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}", "no dtype"},
};

static void hostile_headers_are_refused_with_a_reason(void **state) {
    (void)state;
    struct safetensors s;
    for (size_t i = 0; i < sizeof hostile / sizeof *hostile; i++) {
        struct err err = {0};
        size_t n = strlen(hostile[i].header);
        int r = safetensors_parse((const uint8_t *)hostile[i].header, n, 8 + n + 16, "file.st", &s, &err);
        if (!r) fail_msg("accepted: %s", hostile[i].header);
        if (!strstr(err.msg, hostile[i].word) || !strstr(err.msg, "file.st"))
            fail_msg("%s\n  gave \"%s\", which does not say \"%s\"", hostile[i].header, err.msg, hostile[i].word);
    }
    struct err err = {0};
    size_t n;
    assert_int_equal(safetensors_header_length((const uint8_t *)"\0\0\0\0\0\0\0\1", 1 << 20, "f", &n, &err), -1);
    assert_int_equal(safetensors_header_length((const uint8_t *)"\377\0\0\0\0\0\0\0", 100, "f", &n, &err), -1);
    assert_int_equal(err.code, ERR_TRUNCATED);
}

/* Whatever becomes of a header, reading it stays inside it, and what passes is consistent: every
 * tensor lies in the file. The address sanitizer watches. */
static void mutated_headers_never_lead_out_of_the_file(void **state) {
    (void)state;
    static const char tokens[] = "0123456789\"{}[],:-.eF32BF16datshp_";
    struct err err = {0};
    struct ckpt_blob good;
    struct safetensors s;
    struct proto_tensor beyond;
    uint64_t random = 42;
    int accepted = 0;
    assert_int_equal(safetensors_format(&run.model, 0, 5, SAFETENSORS_F32, &good, &err), 0);
    proto_model_tensor(&run.model, 5, &beyond);
    uint64_t file_bytes = good.length + beyond.offset * 4;
    assert_int_equal(safetensors_parse(good.data + 8, good.length - 8, file_bytes, "f", &s, &err), 0);
    assert_int_equal(s.count, 5);
    safetensors_release(&s);
    for (int i = 0; i < 20000; i++) {
        size_t n = good.length - 8;
        uint8_t *h = malloc(n); /* its own, exactly as long: reading on is caught */
        memcpy(h, good.data + 8, n);
        for (uint64_t k = next_random(&random) % 3 + 1; k > 0; k--) {
            uint64_t x = next_random(&random);
            h[(x >> 8) % n] = x & 1 ? (uint8_t)tokens[(x >> 1) % (sizeof tokens - 1)] : (uint8_t)(x >> 40);
        }
        if (!safetensors_parse(h, n, file_bytes, "f", &s, &err)) {
            accepted++;
            for (uint32_t t = 0; t < s.count; t++)
                assert_true(s.tensor[t].offset + s.tensor[t].bytes <= file_bytes);
            safetensors_release(&s);
        }
        free(h);
    }
    assert_true(accepted > 0 && accepted < 20000); /* names and padding may change, the rest not */
    free(good.data);
}

/* The other parsers of a store's bytes, the same way. */
static void mutated_objects_are_errors_and_not_crashes(void **state) {
    (void)state;
    static const char *const names[] = {"config.json", "cursor.json", "ledger.bin", "manifest.json",
                                        "manifest.sig"};
    char path[160], file[256];
    uint64_t random = 7;
    fresh("mutated", path);
    for (int i = 0; i < 5; i++) {
        snprintf(file, sizeof file, "%s/%s", path, names[i]);
        struct ckpt_blob good = slurp(file);
        for (int k = 0; k < 2000; k++) {
            struct err err = {0};
            struct ckpt_blob b = {malloc(good.length), good.length};
            memcpy(b.data, good.data, b.length);
            b.length -= k % 3 ? 0 : next_random(&random) % b.length;
            for (int hits = k % 4; hits > 0 && b.length; hits--)
                b.data[next_random(&random) % b.length] = (uint8_t)next_random(&random);
            struct msg_model model;
            struct manifest m;
            struct manifest_sig sig;
            struct msg_range *spent = NULL;
            struct msg_signed_entry *entries = NULL;
            struct ckpt_facts facts = {.index = 5, .round = 5, .tokens_committed = 5000};
            uint32_t n;
            struct digest head;
            if (i == 0) hf_config_parse(&b, "f", &model, &err);
            if (i == 1 && !cursor_parse(&b, &facts, &spent, &n, &err)) free(spent);
            if (i == 2 && !ledger_parse(&b, &entries, &n, &err)) {
                ledger_check(entries, n, 5, &head, &err);
                free(entries);
            }
            if (i == 3 && !manifest_parse(&b, &m, &err)) manifest_release(&m);
            if (i == 4 && !manifest_sig_parse(&b, &sig, &err)) manifest_sig_release(&sig);
            free(b.data);
        }
        free(good.data);
    }
}

/* ---- Hugging Face folders ---------------------------------------------------------------------- */

/* A published checkpoint becomes a model for everybody, without what belongs to the run. */
static void an_export_is_a_plain_folder_with_the_same_bits(void **state) {
    (void)state;
    struct err err = {0};
    char path[160];
    fresh("exported", path);
    struct ckpt *c = must_open(path);
    if (ckpt_export(c, folder("export"), &err)) fail_msg("%s", err.msg);
    assert_int_equal(ckpt_export(c, folder("export"), &err), -1); /* not over something else */
    assert_int_equal(err.code, ERR_REFUSED);
    ckpt_close(c);
    assert_int_equal(count_in(folder("export")), 8); /* config 2, tokenizer 2, index, 3 files */

    c = must_open(folder("export"));
    assert_true(ckpt_is_plain(c));
    assert_string_equal(ckpt_tokenizer(c), "bytes");
    float *got = malloc(run.elements * 4);
    assert_int_equal(ckpt_read(c, CKPT_ANCHOR, 0, run.elements, got, &err), 0);
    assert_memory_equal(got, run.anchor, run.elements * 4);
    assert_int_equal(ckpt_read(c, CKPT_MOMENTUM, 0, 1, got, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
    assert_int_equal(ckpt_verify(c, NULL, NULL, &err), -1);
    if (ckpt_export(c, folder("export-2"), &err)) fail_msg("%s", err.msg); /* a copy of a copy */
    assert_int_equal(count_in(folder("export-2")), 8);
    assert_null(ckpt_open(folder("export"), &run.id, &err));
    assert_int_equal(err.code, ERR_REFUSED);
    free(got);
    ckpt_close(c);
}

/* ---- fetch ------------------------------------------------------------------------------------- */

static bool note_progress(void *arg, const struct ckpt_progress *now) {
    struct ckpt_progress *last = arg;
    assert_true(now->done >= last->done && now->done <= now->total && now->read <= now->total);
    *last = *now;
    return true;
}

/* Fetch `path` into folder(name); *last receives the last progress. */
static int fetch(const char *path, const char *name, struct ckpt_progress *last, struct err *err) {
    struct ckpt *c = must_open(path);
    *last = (struct ckpt_progress){0};
    int r = ckpt_fetch(c, folder(name), note_progress, last, err);
    ckpt_close(c);
    return r;
}

/* Cut off anywhere, even by a crash that left nonsense, and called again: what is there is used, and
 * what comes out is the checkpoint. */
static void a_fetch_goes_on_where_it_ended(void **state) {
    (void)state;
    struct err err = {0};
    struct ckpt_progress last;
    char path[160];
    fresh("fetched-from", path);
    if (fetch(path, "fetched", &last, &err)) fail_msg("%s", err.msg);
    if (check_all(folder("fetched"), &err)) fail_msg("%s", err.msg);
    assert_int_equal(count_in(folder("fetched")), 17); /* nothing half beside them */
    assert_int_equal(last.done, last.total);
    uint64_t all = last.read;

    if (fetch(path, "fetched", &last, &err)) fail_msg("%s", err.msg); /* nothing left to do */
    assert_int_equal(last.read, 0);
    assert_int_equal(last.done, last.total);

    static const char name[] = "model-00002-of-00003.safetensors";
    char part[192], whole[192], manifest[192];
    snprintf(whole, sizeof whole, "%s/%s", folder("fetched"), name);
    snprintf(part, sizeof part, "%s/.%s.part", folder("fetched"), name);
    snprintf(manifest, sizeof manifest, "%s/manifest.json", folder("fetched"));
    struct ckpt_blob b = slurp(whole);
    for (int nonsense = 0; nonsense < 3; nonsense++) {
        assert_int_equal(unlink(whole), 0);
        assert_int_equal(unlink(manifest), 0);
        uint8_t *half = calloc(1, 2 * b.length);
        if (nonsense == 0) memcpy(half, b.data, b.length / 2);
        spill(part, half, nonsense == 2 ? 2 * b.length : b.length / 2); /* longer than it can be */
        free(half);
        if (fetch(path, "fetched", &last, &err)) fail_msg("%s", err.msg);
        if (check_all(folder("fetched"), &err)) fail_msg("%s", err.msg);
        if (nonsense == 0) assert_in_range(last.read, b.length / 2, b.length);
        assert_true(last.read < all);
        assert_int_equal(access(part, F_OK), -1);
    }
    free(b.data);
}

/* What is not ours is neither replaced nor followed, and what is wrong in the store gets no manifest. */
static void a_fetch_replaces_nothing_and_believes_nothing(void **state) {
    (void)state;
    struct err err = {0};
    struct ckpt_progress last;
    char path[160], file[256], other[160];
    fresh("fetch-source", path);
    mkdir(folder("fetch-foreign"), 0700);
    snprintf(file, sizeof file, "%s/config.json", folder("fetch-foreign"));
    spill(file, (const uint8_t *)"{}", 2);
    assert_int_equal(fetch(path, "fetch-foreign", &last, &err), -1);
    assert_int_equal(err.code, ERR_REFUSED);
    assert_non_null(strstr(err.msg, "config.json: is there"));
    assert_int_equal(file_bytes(file), 2);

    mkdir(folder("fetch-link"), 0700);
    snprintf(file, sizeof file, "%s/.genesis.bin.part", folder("fetch-link"));
    snprintf(other, sizeof other, "%s/precious", root);
    spill(other, (const uint8_t *)"precious", 8);
    assert_int_equal(symlink(other, file), 0);
    assert_int_equal(fetch(path, "fetch-link", &last, &err), -1);
    assert_int_equal(file_bytes(other), 8);

    struct ckpt_store *s = open_store("fetch-source");
    must_write(s, &run, 6);
    s->ops->close(s);
    if (fetch(path, "fetch-two", &last, &err)) fail_msg("%s", err.msg);
    snprintf(other, sizeof other, "%s/step-000000000006", folder("fetch-source"));
    assert_int_equal(fetch(other, "fetch-two", &last, &err), -1); /* two checkpoints in one folder */
    assert_int_equal(err.code, ERR_REFUSED);
    if (check_all(folder("fetch-two"), &err)) fail_msg("%s", err.msg);

    snprintf(file, sizeof file, "%s/momentum-00001-of-00003.safetensors", path);
    struct ckpt_blob b = slurp(file);
    b.data[b.length - 9] ^= 1;
    spill(file, b.data, b.length);
    free(b.data);
    assert_int_equal(fetch(path, "fetch-rotten", &last, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    assert_non_null(strstr(err.msg, "momentum-00001-of-00003"));
    snprintf(file, sizeof file, "%s/manifest.json", folder("fetch-rotten"));
    assert_int_equal(access(file, F_OK), -1);
    assert_null(ckpt_open(folder("fetch-rotten"), NULL, &err)); /* nor is it taken for a plain folder */
    assert_int_equal(err.code, ERR_NOT_FOUND);
}

/* Weights from elsewhere have no manifest; they come all the same. */
static void a_plain_folder_can_be_fetched(void **state) {
    (void)state;
    struct err err = {0};
    struct ckpt_progress last;
    char path[160];
    fresh("fetch-plain", path);
    struct ckpt *c = must_open(path);
    if (ckpt_export(c, folder("fetch-plain-hf"), &err)) fail_msg("%s", err.msg);
    ckpt_close(c);
    snprintf(path, sizeof path, "%s", folder("fetch-plain-hf"));
    if (fetch(path, "fetch-plain-copy", &last, &err)) fail_msg("%s", err.msg);
    assert_int_equal(count_in(folder("fetch-plain-copy")), 8);
    c = must_open(folder("fetch-plain-copy"));
    float *got = malloc(run.elements * 4);
    assert_int_equal(ckpt_read(c, CKPT_ANCHOR, 0, run.elements, got, &err), 0);
    assert_memory_equal(got, run.anchor, run.elements * 4);
    free(got);
    ckpt_close(c);
}

/* A corrupt checkpoint is not exported in silence, and nothing is left that looks exported. */
static void an_export_of_a_corrupt_checkpoint_fails_and_leaves_nothing(void **state) {
    (void)state;
    struct err err = {0};
    char path[160], file[256];
    fresh("rotten", path);
    snprintf(file, sizeof file, "%s/model-00003-of-00003.safetensors", path);
    struct ckpt_blob b = slurp(file);
    b.data[b.length - 5] ^= 1;
    spill(file, b.data, b.length);
    free(b.data);
    struct ckpt *c = must_open(path);
    assert_int_equal(ckpt_export(c, folder("rotten-export"), &err), -1);
    assert_non_null(strstr(err.msg, "model-00003-of-00003"));
    assert_int_equal(count_in(folder("rotten-export")), 0);
    ckpt_close(c);
}

static void replace_text(const char *path, const char *old, const char *new) {
    struct ckpt_blob b = slurp(path);
    char *at = strstr((char *)b.data, old), out[4096];
    assert_non_null(at);
    int n = snprintf(out, sizeof out, "%.*s%s%s", (int)(at - (char *)b.data), (char *)b.data, new, at + strlen(old));
    spill(path, out, (size_t)n);
    free(b.data);
}

/* A model that computes something else must not be read as if it were ours: the loss would be
 * wrong in silence. */
static void another_network_is_refused_by_the_key_that_makes_it_one(void **state) {
    (void)state;
    static const struct {
        const char *old, *new, *word;
        enum err_code code;
    } cases[] = {
        {"\"llama\"", "\"mistral\"", "model_type", ERR_UNSUPPORTED},
        {"\"silu\"", "\"gelu\"", "hidden_act", ERR_UNSUPPORTED},
        {"\"attention_bias\": false", "\"attention_bias\": true", "attention_bias", ERR_UNSUPPORTED},
        {"\"mlp_bias\": false", "\"mlp_bias\": true", "mlp_bias", ERR_UNSUPPORTED},
        {"\"rope_scaling\": null", "\"rope_scaling\": {\"rope_type\": \"yarn\"}", "rope_scaling", ERR_UNSUPPORTED},
        {"\"rope_scaling\": null", "\"rope_scaling\": {\"rope_type\": \"llama3\"}", "factor", ERR_CORRUPT},
        {"\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 0.5}", "rope_factor",
         ERR_UNSUPPORTED},
        {"\"rope_scaling\": null", "\"rope_parameters\": {\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 4, "
         "\"high_freq_factor\": 4, \"original_max_position_embeddings\": 64}", "rope_high_factor", ERR_UNSUPPORTED},
        {"\"rope_scaling\": null", "\"rope_parameters\": {\"rope_type\": \"default\", \"partial_rotary_factor\": 0.5}",
         "partial_rotary_factor", ERR_UNSUPPORTED},
        {"\"attention_dropout\": 0.0", "\"attention_dropout\": 0.1", "attention_dropout", ERR_UNSUPPORTED},
        {"\"LlamaForCausalLM\"", "\"LlamaForSequenceClassification\"", "architectures", ERR_UNSUPPORTED},
        {"\"head_dim\": 8", "\"head_dim\": 16", "head_dim", ERR_UNSUPPORTED},
        {"\"hidden_size\": 32", "\"hidden_size\": \"32\"", "hidden_size", ERR_CORRUPT},
        {"\"hidden_size\": 32", "\"hidden_size\": 0", "hidden_size", ERR_CORRUPT},
        {"\"num_attention_heads\": 4", "\"num_attention_heads\": 5", "head_dim", ERR_UNSUPPORTED},
        {"\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3", "layers.2", ERR_CORRUPT},
        {"\"intermediate_size\": 48", "\"intermediate_size\": 64", "gate_proj", ERR_CORRUPT},
        {"\"vocab_size\": 256", "\"vocab_size\": 99999999", "config.json", ERR_UNSUPPORTED},
        {"{", "", "not JSON", ERR_CORRUPT},
    };
    struct err err = {0};
    char path[160], file[256];
    fresh("config", path);
    struct ckpt *c = must_open(path);
    assert_int_equal(ckpt_export(c, folder("config-export"), &err), 0);
    ckpt_close(c);
    snprintf(file, sizeof file, "%s/config.json", folder("config-export"));
    struct ckpt_blob good = slurp(file);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        replace_text(file, cases[i].old, cases[i].new);
        assert_refused(folder("config-export"), cases[i].code, cases[i].word);
        spill(file, good.data, good.length);
    }
    free(good.data);
    ckpt_close(must_open(folder("config-export")));
}

static struct msg_model model_of(const char *config) {
    struct err err = {0};
    struct msg_model m;
    struct ckpt_blob b = {(uint8_t *)(uintptr_t)config, strlen(config)};
    if (hf_config_parse(&b, "config.json", &m, &err)) fail_msg("%s", err.msg);
    return m;
}

/* Llama 3.1 and 3.2 stretch their context; both spellings of Hugging Face, and what we write ourselves. */
static void scaled_rotary_embeddings_are_read_and_written(void **state) {
    (void)state;
    struct err err = {0};
    struct ckpt_blob b;
#define SIZES "\"model_type\": \"llama\", \"hidden_size\": 32, \"num_attention_heads\": 4, \"num_hidden_layers\": 2, " \
              "\"intermediate_size\": 48, \"vocab_size\": 256, "
#define LLAMA3 "\"factor\": 32.5, \"high_freq_factor\": 4.0, \"low_freq_factor\": 1, " \
               "\"original_max_position_embeddings\": 8192, \"rope_type\": \"llama3\""
    struct msg_model four = model_of("{" SIZES "\"rope_theta\": 500000.0, \"rope_scaling\": {" LLAMA3 "}}");
    struct msg_model five = model_of("{" SIZES "\"rope_parameters\": {\"rope_theta\": 500000.0, " LLAMA3 "}}");
    struct msg_model linear = model_of("{" SIZES "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 2}}");
    assert_true(proto_model_equal(&four, &five));
    assert_int_equal(four.rope_type, ROPE_LLAMA3);
    assert_true(four.rope_factor == 32.5 && four.rope_high_factor == 4 && four.rope_original == 8192);
    assert_int_equal(linear.rope_type, ROPE_LINEAR);
    assert_true(linear.rope_factor == 2 && linear.rope_theta == 10000);
    const struct msg_model *all[] = {&four, &linear};
    for (int i = 0; i < 2; i++) {
        assert_int_equal(hf_config_format(all[i], SAFETENSORS_F32, 0.02f, &b, &err), 0);
        struct msg_model again;
        assert_int_equal(hf_config_parse(&b, "config.json", &again, &err), 0);
        assert_true(proto_model_equal(all[i], &again));
        free(b.data);
    }
}

/* Write one file with every tensor in `dtype`, in reverse order, as other tools do. */
static void write_single_file(const char *path, const struct msg_model *m, const char *dtype, size_t width,
                              const uint8_t *data) {
    json_t *json = json_object();
    uint64_t at = 0;
    FILE *f = fopen(path, "wb");
    for (uint32_t i = proto_model_tensor_count(m); i-- > 0;) {
        struct proto_tensor t;
        proto_model_tensor(m, i, &t);
        json_t *shape = t.dims == 1 ? json_pack("[I]", (json_int_t)t.shape[0])
                                    : json_pack("[II]", (json_int_t)t.shape[0], (json_int_t)t.shape[1]);
        json_object_set_new(json, t.name, json_pack("{ss so s[II]}", "dtype", dtype, "shape", shape, "data_offsets",
                                                    (json_int_t)at, (json_int_t)(at + t.count * width)));
        at += t.count * width;
    }
    json_object_set_new(json, "model.layers.0.self_attn.rotary_emb.inv_freq", /* old exports have it */
                        json_pack("{ss s[i] s[II]}", "dtype", "F32", "shape", 1, "data_offsets",
                                  (json_int_t)at, (json_int_t)(at + 4)));
    char *text = json_dumps(json, JSON_COMPACT);
    uint64_t n = strlen(text);
    fwrite(&n, 8, 1, f);
    fwrite(text, 1, n, f);
    for (uint32_t i = proto_model_tensor_count(m); i-- > 0;) {
        struct proto_tensor t;
        proto_model_tensor(m, i, &t);
        fwrite(data + t.offset * width, width, (size_t)t.count, f);
    }
    fwrite("abcd", 4, 1, f);
    fclose(f);
    free(text);
    json_decref(json);
}

/* Most published models are bf16 or fp16, in one file without an index, in an order of their own. */
static void narrow_floats_are_widened_exactly(void **state) {
    (void)state;
    struct err err = {0};
    struct run tied = {0};
    struct ckpt_blob config;
    make_run(&tied, 3, 1);
    mkdir(folder("narrow"), 0700);
    assert_int_equal(hf_config_format(&tied.model, SAFETENSORS_F32, 0.02f, &config, &err), 0);
    spill(folder("narrow/config.json"), config.data, config.length);
    free(config.data);
    uint16_t *narrow = malloc(tied.elements * 2);
    float *got = malloc(tied.elements * 4);
    for (size_t i = 0; i < tied.elements; i++) narrow[i] = (uint16_t)(i * 40503u);
    for (int half = 0; half < 2; half++) {
        write_single_file(folder("narrow/model.safetensors"), &tied.model, half ? "F16" : "BF16", 2, (uint8_t *)narrow);
        struct ckpt *c = must_open(folder("narrow"));
        assert_true(ckpt_model(c)->tied == 1 && ckpt_model(c)->rope_theta == 500000);
        assert_string_equal(ckpt_tokenizer(c), "");
        assert_int_equal(ckpt_read(c, CKPT_ANCHOR, 0, tied.elements, got, &err), 0);
        for (size_t i = 0; i < tied.elements; i++) {
            int exponent = narrow[i] >> 10 & 31, fraction = narrow[i] & 1023;
            double magnitude = exponent ? ldexp(fraction + 1024, exponent - 25) : ldexp(fraction, -24);
            uint32_t wide;
            memcpy(&wide, &got[i], 4);
            if (!half) assert_int_equal(wide, (uint32_t)narrow[i] << 16);
            else if (exponent < 31) assert_true(got[i] == (narrow[i] & 0x8000 ? -magnitude : magnitude));
            else assert_true(fraction ? isnan(got[i]) : isinf(got[i]));
        }
        ckpt_close(c);
    }
    write_single_file(folder("narrow/model.safetensors"), &tied.model, "I16", 2, (uint8_t *)narrow);
    assert_refused(folder("narrow"), ERR_UNSUPPORTED, "only F32, F16 and BF16");
    free(narrow);
    free(got);
    release_run(&tied);
}

/* An index is hostile too: it may name files outside the folder, or tensors that are not there. */
static void a_hostile_index_is_refused(void **state) {
    (void)state;
    struct err err = {0};
    char path[160], file[256];
    fresh("index", path);
    struct ckpt *c = must_open(path);
    assert_int_equal(ckpt_export(c, folder("index-export"), &err), 0);
    ckpt_close(c);
    snprintf(file, sizeof file, "%s/model.safetensors.index.json", folder("index-export"));
    struct ckpt_blob good = slurp(file);
    static const char *const cases[][3] = {
        {"\"model-00001-of-00003.safetensors\"", "\"../../../etc/passwd\"", "cannot be a file's name"},
        {"\"model-00001-of-00003.safetensors\"", "\"model-00009-of-00003.safetensors\"", "00009"},
        {"\"model-00001-of-00003.safetensors\"", "\"model-00002-of-00003.safetensors\"", "is missing"},
        {"\"model-00001-of-00003.safetensors\"", "7", "in no file"},
        {"\"weight_map\"", "\"weights\"", "no weight_map"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        replace_text(file, cases[i][0], cases[i][1]);
        assert_null(ckpt_open(folder("index-export"), NULL, &err));
        if (!strstr(err.msg, cases[i][2])) fail_msg("\"%s\" does not say \"%s\"", err.msg, cases[i][2]);
        spill(file, good.data, good.length);
    }
    free(good.data);
}

/* ---------------------------------------------------------------------------------------------- */

static int before_all(void **state) {
    struct err err = {0};
    (void)state;
    snprintf(root, sizeof root, "%s/test-ckpt-XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
    if (!mkdtemp(root) || proto_init(&err)) return -1;
    make_run(&run, 1, 0);
    return 0;
}

static int after_all(void **state) {
    char command[128];
    (void)state;
    release_run(&run);
    snprintf(command, sizeof command, "rm -rf %s", root);
    return system(command);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_checkpoint_names_a_tokenizer_of_others),
        cmocka_unit_test(a_checkpoint_gives_back_the_state),
        cmocka_unit_test(ranges_come_in_any_order),
        cmocka_unit_test(each_element_is_put_exactly_once),
        cmocka_unit_test(a_state_of_another_root_is_refused),
        cmocka_unit_test(bf16_weights_have_the_anchor_beside_them),
        cmocka_unit_test(a_part_has_the_bytes_that_the_writer_writes),
        cmocka_unit_test(what_the_store_gives_back_must_be_the_state),
        cmocka_unit_test(weights_that_are_not_the_anchors_are_refused),
        cmocka_unit_test(a_changed_byte_anywhere_is_found_and_named),
        cmocka_unit_test(a_short_or_missing_object_is_found_and_named),
        cmocka_unit_test(without_a_manifest_there_is_no_checkpoint),
        cmocka_unit_test(another_run_is_refused),
        cmocka_unit_test(a_manifest_that_the_run_did_not_sign_is_refused),
        cmocka_unit_test(a_bad_signature_is_not_published),
        cmocka_unit_test(parts_are_sent_by_others_or_by_the_writer),
        cmocka_unit_test(a_crash_at_any_moment_leaves_whole_checkpoints_only),
        cmocka_unit_test(destroying_an_unfinished_writer_leaves_nothing),
        cmocka_unit_test(a_writer_that_was_overtaken_harms_nothing),
        cmocka_unit_test(latest_never_goes_back_and_old_checkpoints_can_be_pruned),
        cmocka_unit_test(what_stays_once_stays),
        cmocka_unit_test(a_pinned_checkpoint_survives_every_prune),
        cmocka_unit_test(a_conditional_put_loses_against_a_change),
        cmocka_unit_test(names_that_lead_out_of_the_store_are_refused),
        cmocka_unit_test_teardown(a_full_disk_is_an_error_and_leaves_no_half, unmount_small),
        cmocka_unit_test(many_files_with_little_in_each_are_synced),
        cmocka_unit_test(nonsense_to_write_is_refused),
        cmocka_unit_test(hostile_headers_are_refused_with_a_reason),
        cmocka_unit_test(mutated_headers_never_lead_out_of_the_file),
        cmocka_unit_test(mutated_objects_are_errors_and_not_crashes),
        cmocka_unit_test(an_export_is_a_plain_folder_with_the_same_bits),
        cmocka_unit_test(a_fetch_goes_on_where_it_ended),
        cmocka_unit_test(a_fetch_replaces_nothing_and_believes_nothing),
        cmocka_unit_test(a_plain_folder_can_be_fetched),
        cmocka_unit_test(an_export_of_a_corrupt_checkpoint_fails_and_leaves_nothing),
        cmocka_unit_test(another_network_is_refused_by_the_key_that_makes_it_one),
        cmocka_unit_test(scaled_rotary_embeddings_are_read_and_written),
        cmocka_unit_test(narrow_floats_are_widened_exactly),
        cmocka_unit_test(a_hostile_index_is_refused),
    };
    return cmocka_run_group_tests(tests, before_all, after_all);
}
