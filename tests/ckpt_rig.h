/* ckpt_rig.h - what the tests of checkpoints write and read: a run with a small model, its keys and ledger,
 * folders in memory, and a writer driven as an agent drives it. Included once by each. */
#ifndef INTELLECT_TESTS_CKPT_RIG_H
#define INTELLECT_TESTS_CKPT_RIG_H

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

static inline struct ckpt_store *open_store(const char *name) {
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

static inline struct proto_bytes bytes_of(const struct proto_buffer *b) {
    return (struct proto_bytes){b->data, (uint32_t)b->length};
}

static inline void encode(struct proto_buffer *b, enum proto_record which, const void *record) {
    struct err err = {0};
    proto_buffer_init(b, PROTO_BLOB_BYTES_MAX);
    if (proto_encode(b, which, record, &err)) fail_msg("%s", err.msg);
}

static inline uint64_t next_random(uint64_t *state) { /* xorshift64 */
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

static inline void make_ledger(struct run *r) {
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
static inline struct digest root_of(const struct run *r) {
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

static inline void make_run_of(struct run *r, uint8_t seed, int tied, const char *tokenizer) {
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

static inline void make_run(struct run *r, uint8_t seed, int tied) {
    make_run_of(r, seed, tied, "bytes");
}

static inline void release_run(struct run *r) {
    proto_buffer_release(&r->genesis);
    proto_buffer_release(&r->delegation);
    for (int i = 0; i < LEDGER_ENTRIES; i++) proto_buffer_release(&r->entry[i]);
    free(r->anchor);
    free(r->momentum);
}

/* ---- writing, as an agent does ----------------------------------------------------------------- */

static const struct msg_range spent_samples[] = {{64, 16}, {0, 32}, {32, 8}};

static inline struct ckpt_meta meta_at(const struct run *r, uint64_t index) {
    return (struct ckpt_meta){.index = index, .state_root = r->root, .round = index,
                              .tokens_committed = 1000 * index, .spent = spent_samples,
                              .spent_count = 3, .genesis = bytes_of(&r->genesis),
                              .ledger = r->ledger, .ledger_count = (uint32_t)index + 1};
}

static inline struct ckpt_writer *create(struct ckpt_store *s, const struct run *r, uint64_t index,
                                  struct err *err) {
    struct ckpt_meta meta = meta_at(r, index);
    return ckpt_writer_create(s, &meta, SHARD_BYTES, err);
}

static inline int put(struct ckpt_writer *w, const struct run *r, uint64_t first, size_t n, struct err *err) {
    return ckpt_writer_put(w, first, n, r->anchor + first, r->momentum + first, err);
}

/* Wait until the state is not `before` any more. */
static inline enum ckpt_state wait_past(struct ckpt_writer *w, enum ckpt_state before, struct err *err) {
    for (;;) {
        enum ckpt_state now = ckpt_writer_poll(w, err);
        struct pollfd p = {.fd = ckpt_writer_fd(w), .events = POLLIN};
        if (now != before) return now;
        if (poll(&p, 1, WAIT_MS_MAX) != 1) fail_msg("the writer went to sleep in state %d", before);
    }
}

static inline int sign_and_publish(struct ckpt_writer *w, const struct run *r, struct err *err) {
    size_t n;
    struct proto_sig sig;
    const void *manifest = ckpt_writer_manifest(w, &n);
    proto_sign(&r->online, "manifest", &r->id, 7, manifest, n, &sig);
    return ckpt_writer_publish(w, 7, &sig, &r->online.key, bytes_of(&r->delegation),
                               &r->delegation_sig, err);
}

/* From all put to published. */
static inline int finish(struct ckpt_writer *w, const struct run *r, struct err *err) {
    if (ckpt_writer_finish(w, err)) return -1;
    if (wait_past(w, CKPT_FINISHING, err) != CKPT_UNSIGNED) return -1;
    if (sign_and_publish(w, r, err)) return -1;
    return wait_past(w, CKPT_PUBLISHING, err) == CKPT_PUBLISHED ? 0 : -1;
}

static inline int write_checkpoint(struct ckpt_store *s, const struct run *r, uint64_t index, struct err *err) {
    struct ckpt_writer *w = create(s, r, index, err);
    int failed = !w || put(w, r, 0, r->elements, err) || finish(w, r, err);
    ckpt_writer_destroy(w);
    return failed ? -1 : 0;
}

static inline void must_write(struct ckpt_store *s, const struct run *r, uint64_t index) {
    struct err err = {0};
    if (write_checkpoint(s, r, index, &err)) fail_msg("%s", err.msg);
}

/* A folder with checkpoint 5 in it; *path its folder. */
static inline void fresh(const char *name, char path[160]) {
    struct ckpt_store *s = open_store(name);
    must_write(s, &run, 5);
    s->ops->close(s);
    snprintf(path, 160, "%s/step-000000000005", folder(name));
}

static inline struct ckpt *must_open(const char *path) {
    struct err err = {0};
    struct ckpt *c = ckpt_open(path, NULL, &err);
    if (!c) fail_msg("%s", err.msg);
    return c;
}

static inline void assert_same_tensors(const struct ckpt *c, const struct run *r) {
    struct err err = {0};
    float *got = malloc(r->elements * 4);
    assert_int_equal(ckpt_read(c, CKPT_ANCHOR, 0, r->elements, got, &err), 0);
    assert_memory_equal(got, r->anchor, r->elements * 4);
    assert_int_equal(ckpt_read(c, CKPT_MOMENTUM, 0, r->elements, got, &err), 0);
    assert_memory_equal(got, r->momentum, r->elements * 4);
    free(got);
}

static inline void assert_refused(const char *path, enum err_code code, const char *word) {
    struct err err = {0};
    struct ckpt *c = ckpt_open(path, NULL, &err);
    if (c) fail_msg("%s opened; expected: %s", path, word);
    assert_int_equal(err.code, code);
    if (!strstr(err.msg, word)) fail_msg("\"%s\" does not say \"%s\"", err.msg, word);
}

/* ---- files ------------------------------------------------------------------------------------- */

static inline struct ckpt_blob slurp(const char *path) {
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

static inline off_t file_bytes(const char *path) {
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    return st.st_size;
}

static inline void spill(const char *path, const void *data, size_t n) {
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    fclose(f);
}

static inline struct object_list files_in(const char *path) {
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

static inline size_t count_in(const char *path) {
    struct object_list l = files_in(path);
    size_t n = l.count;
    object_list_release(&l);
    return n;
}

/* Open and verify; the first thing that goes wrong goes to *err. */
static inline int check_all(const char *path, struct err *err) {
    struct ckpt *c = ckpt_open(path, &run.id, err);
    int r = c ? ckpt_verify(c, NULL, NULL, err) : -1;
    ckpt_close(c);
    return r;
}

static inline struct ckpt_writer *create_bf16(struct ckpt_store *s, const struct run *r) {
    struct err err = {0};
    struct ckpt_meta meta = meta_at(r, 5);
    meta.weights = CKPT_BF16;
    struct ckpt_writer *w = ckpt_writer_create(s, &meta, SHARD_BYTES, &err);
    if (!w || put(w, r, 0, 777, &err) || put(w, r, 777, r->elements - 777, &err)) fail_msg("%s", err.msg);
    return w;
}

/* Let the online key sign the manifest of `path` once more, with another root, or another digest of an object. */
static inline void sign_again(const char *path, const char *object, const char *hex) {
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

static inline int before_all(void **state) {
    struct err err = {0};
    (void)state;
    snprintf(root, sizeof root, "%s/test-ckpt-XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
    if (!mkdtemp(root) || proto_init(&err)) return -1;
    make_run(&run, 1, 0);
    return 0;
}

static inline int after_all(void **state) {
    char command[128];
    (void)state;
    release_run(&run);
    snprintf(command, sizeof command, "rm -rf %s", root);
    return system(command);
}

#endif
