/* The state that a node does not get from members: made from the run's seed, or read from a checkpoint
 * that must be the one the ledger names. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>
#include <poll.h>

#include "ckpt/ckpt.h"
#include "node/model.h"
#include "node/origin.h"
#include "proto/model.h"
#include "proto/proto.h"

#define INDEX 1
#define CHUNK 1000

static char folder[64];
static struct msg_model model = { .layers = 1, .width = 16, .heads = 2, .kv_heads = 1, .ffn = 32,
                                  .vocabulary = 256, .sequence = 16, .rope_theta = 1e4,
                                  .norm_eps = 1e-5, .tied = 1 };
static struct msg_genesis genesis;
static struct msg_checkpoint checkpoint; /* as the ledger names the one in `folder` */
static size_t elements;
static float *anchor, *momentum;

/* ---- a run with a checkpoint ----------------------------------------------------------------- */

static struct proto_buffer kept[INDEX + 8]; /* what encoded() returned, until tear_down */
static size_t kept_count;

static struct proto_bytes encoded(enum proto_record which, const void *record) {
    assert_true(kept_count < sizeof kept / sizeof *kept);
    struct proto_buffer *b = &kept[kept_count++];
    struct err err = {0};
    proto_buffer_init(b, PROTO_BLOB_BYTES_MAX);
    if (proto_encode(b, which, record, &err)) fail_msg("%s", err.msg);
    return (struct proto_bytes){ b->data, (uint32_t)b->length };
}

static void make_genesis(const struct identity *root) {
    static struct msg_inner inner = { .batch = 1, .total_tokens = 1 };
    static struct msg_outer outer = { .inner_steps = 1, .chunk_elements = CHUNK, .fragments = 1 };
    static struct msg_corpus corpus = { .samples = 100 };
    corpus.tokenizer = proto_str("bytes");
    genesis = (struct msg_genesis){ .version = 1, .name = proto_str("test"), .root_key = root->key,
                                    .model = &model, .model_count = 1, .inner = &inner,
                                    .inner_count = 1, .outer = &outer, .outer_count = 1,
                                    .corpus = &corpus, .corpus_count = 1, .init_seed = 3,
                                    .init_std = 0.02f };
}

static enum ckpt_state wait_past(struct ckpt_writer *w, enum ckpt_state before) {
    struct err err = {0};
    for (enum ckpt_state now; (now = ckpt_writer_poll(w, &err)) != before;) return now;
    struct pollfd p = { .fd = ckpt_writer_fd(w), .events = POLLIN };
    if (poll(&p, 1, 20000) != 1) fail_msg("the writer sleeps in state %d", before);
    return wait_past(w, before);
}

static struct digest root_of_state(void) {
    size_t chunks = (elements + CHUNK - 1) / CHUNK;
    struct msg_digest_item *leaf = calloc(chunks, sizeof *leaf);
    for (size_t i = 0, first = 0; i < chunks; i++, first += CHUNK) {
        size_t n = elements - first < CHUNK ? elements - first : CHUNK;
        leaf[i].digest = digest_leaf2(i, anchor + first, n * 4, momentum + first, n * 4);
    }
    struct digest root = digest_tree_root(leaf, chunks);
    free(leaf);
    return root;
}

/* Signed from the root key down, as a coordinator and its own node do it. */
static void write_checkpoint(struct ckpt_store *store, const struct identity *root,
                             const struct identity *online, struct proto_bytes genesis_bytes) {
    struct digest run = digest_of(genesis_bytes.data, genesis_bytes.length), previous = {{0}};
    struct msg_delegation d = { .run = run, .key = online->key, .number = 1 };
    struct proto_bytes delegation = encoded(RECORD_delegation, &d);
    struct msg_signed_entry ledger[INDEX + 1];
    struct proto_sig by_root, by_online;
    struct err err = {0};
    size_t length;
    proto_sign(root, "delegation", &run, 0, delegation.data, delegation.length, &by_root);
    for (uint64_t i = 0; i <= INDEX; i++) {
        struct msg_entry e = { .index = i, .previous = previous, .term = i ? 1 : 0,
                               .kind = i ? LEDGER_COMMIT : LEDGER_GENESIS };
        e.body = i ? proto_str("a commit") : genesis_bytes;
        ledger[i].bytes = encoded(RECORD_entry, &e);
        proto_sign(i ? online : root, "ledger", &run, e.term, ledger[i].bytes.data,
                   ledger[i].bytes.length, &ledger[i].signature);
        previous = digest_of(ledger[i].bytes.data, ledger[i].bytes.length);
    }
    struct ckpt_meta meta = { .index = INDEX, .state_root = root_of_state(), .round = 1,
                              .genesis = genesis_bytes, .ledger = ledger,
                              .ledger_count = INDEX + 1 };
    struct ckpt_writer *w = ckpt_writer_create(store, &meta, 0, &err);
    if (!w || ckpt_writer_put(w, 0, elements, anchor, momentum, &err) ||
        ckpt_writer_finish(w, &err))
        fail_msg("%s", err.msg);
    assert_int_equal(wait_past(w, CKPT_FINISHING), CKPT_UNSIGNED);
    const void *manifest = ckpt_writer_manifest(w, &length);
    checkpoint = (struct msg_checkpoint){ .at_index = INDEX, .state_root = meta.state_root,
                                          .manifest = digest_of(manifest, length) };
    proto_sign(online, "manifest", &run, 1, manifest, length, &by_online);
    if (ckpt_writer_publish(w, 1, &by_online, &online->key, delegation, &by_root, &err))
        fail_msg("%s", err.msg);
    assert_int_equal(wait_past(w, CKPT_PUBLISHING), CKPT_PUBLISHED);
    ckpt_writer_destroy(w);
}

static int set_up(void **state) {
    (void)state;
    static char url[PROTO_URL_BYTES_MAX + 1];
    struct identity root, online;
    const uint8_t a[32] = { 1 }, b[32] = { 2 };
    snprintf(folder, sizeof folder, "/tmp/test-origin-XXXXXX");
    if (proto_init(NULL) || !mkdtemp(folder)) return -1;
    identity_from_seed(&root, a);
    identity_from_seed(&online, b);
    make_genesis(&root);
    elements = (size_t)proto_model_elements(&model);
    anchor = malloc(elements * sizeof *anchor);
    momentum = malloc(elements * sizeof *momentum);
    for (size_t i = 0; i < elements; i++) anchor[i] = (float)i, momentum[i] = -(float)i;
    struct ckpt_store *store = ckpt_store_open(folder, true, NULL);
    if (!store) return -1;
    write_checkpoint(store, &root, &online, encoded(RECORD_genesis, &genesis));
    if (ckpt_url(store->url, INDEX, url, NULL)) return -1;
    checkpoint.url = proto_str(url);
    store->ops->close(store);
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    while (kept_count) proto_buffer_release(&kept[--kept_count]);
    char command[128];
    free(anchor);
    free(momentum);
    snprintf(command, sizeof command, "rm -rf %s", folder);
    return system(command);
}

/* The whole vector in chunks, as sync asks for it. */
static int load(struct origin *o, const struct msg_checkpoint *from, float *a, float *m,
                struct err *err) {
    for (size_t first = 0; first < elements; first += CHUNK) {
        size_t n = elements - first < CHUNK ? elements - first : CHUNK;
        for (int waits = 0; origin_load(o, from, first, n, a + first, m + first, err); waits++) {
            if (err->code != ERR_TIMEOUT) return -1;
            if (waits == 10000) fail_msg("%s for 10 s", err->msg);
            usleep(1000);
        }
    }
    return 0;
}

static void assert_loads(const struct msg_genesis *g, const struct msg_checkpoint *from,
                         const float *a_wanted, const float *m_wanted) {
    float *a = malloc(elements * sizeof *a), *m = malloc(elements * sizeof *m);
    struct origin *o = origin_create(g, NULL);
    struct err err = {0};
    if (load(o, from, a, m, &err)) fail_msg("%s", err.msg);
    assert_memory_equal(a, a_wanted, elements * sizeof *a);
    assert_memory_equal(m, m_wanted, elements * sizeof *m);
    origin_destroy(o);
    free(a);
    free(m);
}

static void assert_cannot_be_had(const struct msg_checkpoint *from, const char *word) {
    float *a = malloc(elements * sizeof *a), *m = malloc(elements * sizeof *m);
    struct origin *o = origin_create(&genesis, NULL);
    struct err err = {0};
    assert_int_equal(load(o, from, a, m, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
    if (!strstr(err.msg, word)) fail_msg("\"%s\" does not say \"%s\"", err.msg, word);
    origin_destroy(o);
    free(a);
    free(m);
}

/* ---- tests ----------------------------------------------------------------------------------- */

/* Every member derives the same bits, in whatever pieces it asks for them. */
static void without_a_checkpoint_the_seed_decides(void **state) {
    (void)state;
    float *wanted = malloc(elements * sizeof *wanted), *zero = calloc(elements, sizeof *zero);
    model_init_elements(&model, genesis.init_std, genesis.init_seed, 0, elements, wanted);
    assert_loads(&genesis, NULL, wanted, zero);
    free(wanted);
    free(zero);
}

/* `init --from`: a run that begins where another ended takes its momentum too. */
static void a_run_may_begin_at_a_checkpoint(void **state) {
    (void)state;
    struct msg_genesis g = genesis;
    g.init_from = &checkpoint;
    g.init_from_count = 1;
    assert_loads(&g, NULL, anchor, momentum);
}

/* The same in a run with other chunks: the root that the genesis names is of those. */
static void a_run_of_other_chunks_begins_there_too(void **state) {
    (void)state;
    struct msg_genesis g = genesis;
    struct msg_outer outer = *genesis.outer;
    struct msg_checkpoint c = checkpoint;
    struct err err = {0};
    outer.chunk_elements = 700;
    g.outer = &outer;
    g.init_from = &c;
    g.init_from_count = 1;
    struct ckpt *open = ckpt_open(folder, NULL, &err);
    assert_non_null(open);
    assert_int_equal(ckpt_root(open, CHUNK, &c.state_root, &err), 0);
    assert_memory_equal(&c.state_root, &checkpoint.state_root, sizeof c.state_root);
    assert_int_equal(ckpt_root(open, outer.chunk_elements, &c.state_root, &err), 0);
    assert_memory_not_equal(&c.state_root, &checkpoint.state_root, sizeof c.state_root);
    ckpt_close(open);
    assert_loads(&g, NULL, anchor, momentum);
}

static int give_anchor(void *arg, uint64_t first, size_t n, float *out, struct err *err) {
    (void)arg, (void)err;
    memcpy(out, anchor + first, n * sizeof *out);
    return 0;
}

static void write_plain(const char *dir) {
    struct err err = {0};
    const struct ckpt_folder f = { .model = &model, .init_std = 0.02f, .tokenizer = "bytes",
                                   .read = give_anchor };
    if (ckpt_folder_write(&f, dir, &err)) fail_msg("%s", err.msg);
}

/* `init --from` weights that belong to no run: known by the state they make, their momentum is zero. */
static void a_run_may_begin_at_a_plain_folder(void **state) {
    (void)state;
    char plain[128];
    struct err err = {0};
    struct msg_genesis g = genesis;
    struct msg_checkpoint c = {0};
    float *zero = calloc(elements, sizeof *zero);
    snprintf(plain, sizeof plain, "%s/plain", folder);
    write_plain(plain);
    struct ckpt *open = ckpt_open(plain, NULL, &err);
    if (!open || ckpt_root(open, CHUNK, &c.state_root, &err)) fail_msg("%s", err.msg);
    assert_true(ckpt_is_plain(open));
    ckpt_close(open);
    c.url = proto_str(plain);
    g.init_from = &c;
    g.init_from_count = 1;
    assert_loads(&g, NULL, anchor, zero);
    anchor[elements / 2] += 1; /* somebody writes other weights there */
    write_plain(plain);
    anchor[elements / 2] -= 1;
    assert_cannot_be_had(&c, "other ones");
    c.manifest.b[0] = 1; /* it stands for no checkpoint */
    assert_cannot_be_had(&c, "no manifest");
    free(zero);
}

/* A rewind: the one place the state can come from when members have all moved on. */
static void a_rewinds_checkpoint_is_read(void **state) {
    (void)state;
    assert_loads(&genesis, &checkpoint, anchor, momentum);
}

/* Most machines cannot read the coordinator's folder; that is no failure of theirs. */
static void a_checkpoint_elsewhere_is_left_to_others(void **state) {
    (void)state;
    struct msg_checkpoint c = checkpoint;
    c.url = proto_str("file:///nonexistent/step-000000000001");
    assert_cannot_be_had(&c, "/nonexistent/");
    c.url = proto_str("s3://bucket/step-000000000001"); /* nor are they stopped by a network */
    assert_cannot_be_had(&c, "s3://bucket/step-000000000001: is not on this machine");
}

/* A good checkpoint of another moment or run at that place would be a state nobody agreed on. */
static void another_checkpoint_is_refused(void **state) {
    (void)state;
    struct msg_checkpoint c = checkpoint;
    c.manifest.b[0] ^= 1;
    assert_cannot_be_had(&c, "another checkpoint");
    c = checkpoint;
    c.at_index++;
    assert_cannot_be_had(&c, "another checkpoint");
    c = checkpoint;
    c.state_root.b[31] ^= 1;
    assert_cannot_be_had(&c, "another checkpoint");
}

/* The manifest vouches for bytes, and disks lose some. */
static void a_damaged_tensor_is_refused(void **state) {
    (void)state;
    char path[256];
    snprintf(path, sizeof path, "%s/step-%012d/momentum-00001-of-00001.safetensors", folder, INDEX);
    FILE *f = fopen(path, "r+b");
    assert_non_null(f);
    fseek(f, -1, SEEK_END);
    int c = fgetc(f);
    fseek(f, -1, SEEK_END);
    fputc(c ^ 1, f);
    fclose(f);
    assert_cannot_be_had(&checkpoint, "momentum");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(without_a_checkpoint_the_seed_decides),
        cmocka_unit_test(a_run_may_begin_at_a_checkpoint),
        cmocka_unit_test(a_run_of_other_chunks_begins_there_too),
        cmocka_unit_test(a_run_may_begin_at_a_plain_folder),
        cmocka_unit_test(a_rewinds_checkpoint_is_read),
        cmocka_unit_test(a_checkpoint_elsewhere_is_left_to_others),
        cmocka_unit_test(another_checkpoint_is_refused),
        cmocka_unit_test(a_damaged_tensor_is_refused), /* last: the others read it */
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
