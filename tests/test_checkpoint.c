/* test_checkpoint.c - a checkpoint written beside an event loop, in pieces, while the state goes on. */
#define CHUNK 150000 /* three pieces, and a last chunk of one */
#define ELEMENTS 160472
#include "tests/sync_rounds.h"

#include <event2/event.h>
#include <limits.h>
#include <unistd.h>

#include "ckpt/ckpt.h"
#include "node/checkpoint.h"

struct test {
    struct rig *rig;
    struct event_base *base;
    struct checkpoint *checkpoint;
    char folder[64];
    float *anchor, *momentum; /* when it began */
    uint64_t index;
    int turns, dones;
    bool ok;
    struct proto_sig signature;
    bool to_sign;
    char text[300];
};

static void on_manifest(void *arg, const void *manifest, size_t length) {
    struct test *t = arg;
    proto_sign(&t->rig->online_id, "manifest", &t->rig->run, t->rig->term, manifest, length, &t->signature);
    t->to_sign = true;
}

static void on_note(void *arg, uint64_t index, const struct ckpt_note *note, uint32_t chunk) {
    (void)arg, (void)index, (void)note, (void)chunk; /* a folder is not shared */
}

static void on_turn(void *arg, const struct timer_turn *turn) {
    (void)turn;
    ((struct test *)arg)->turns++;
}

static void on_done(void *arg, bool ok, const struct digest *manifest, const char *text) {
    struct test *t = arg;
    t->dones++;
    t->ok = ok;
    assert_int_equal(digest_is_zero(manifest), !ok);
    snprintf(t->text, sizeof t->text, "%s", text);
}

static const struct checkpoint_ops ops = {on_manifest, on_note, on_turn, on_done};

static void begin(struct test *t, struct rig *r, const struct digest *root) {
    struct proto_bytes genesis = encoded(RECORD_genesis, &r->genesis);
    struct sync *s = r->node[2].sync;
    char url[PROTO_URL_BYTES_MAX + 1];
    *t = (struct test){.rig = r, .base = event_base_new(), .folder = "/tmp/test-checkpoint-XXXXXX",
                       .anchor = malloc(ELEMENTS * sizeof(float)),
                       .momentum = malloc(ELEMENTS * sizeof(float)),
                       .index = look(r, 2).state_index};
    assert_non_null(mkdtemp(t->folder));
    t->checkpoint = checkpoint_create(t->base, ELEMENTS, CHUNK, NULL, &ops, t);
    sync_set_before_change(s, checkpoint_before_change, t->checkpoint);
    memcpy(t->anchor, sync_anchor(s), ELEMENTS * sizeof(float));
    memcpy(t->momentum, sync_momentum(s), ELEMENTS * sizeof(float));
    assert_int_equal(ckpt_url(t->folder, t->index, url, NULL), 0);
    struct msg_checkpoint_write msg = {.index = t->index, .root = *root, .url = proto_str(url)};
    checkpoint_begin(t->checkpoint, s, genesis, &msg);
    free((void *)(uintptr_t)genesis.data);
    assert_int_equal(t->dones, 0); /* never from within the call */
}

static void sign(struct test *t) {
    struct rig *r = t->rig;
    struct msg_delegation d = {.run = r->run, .key = r->online_id.key, .number = 1};
    struct uplink_welcome w = {.delegation = encoded(RECORD_delegation, &d), .key = r->online_id.key};
    proto_sign(&r->root_id, "delegation", &r->run, 0, w.delegation.data, w.delegation.length,
               &w.delegation_signature);
    checkpoint_signed(t->checkpoint, t->index, r->term, &t->signature, &w);
    free((void *)(uintptr_t)w.delegation.data);
    t->to_sign = false;
}

static void go_on_until(struct test *t, int turns) {
    while (!t->dones && t->turns < turns) {
        event_base_loop(t->base, EVLOOP_ONCE);
        if (t->to_sign) sign(t);
    }
}

static void a_commit_changes_it(struct test *t) {
    struct rig *r = t->rig;
    round_of_three(r, STEPS * BATCH);
    for (uint64_t at = 0; at < ELEMENTS; at += CHUNK) {
        assert_memory_not_equal(sync_anchor(r->node[2].sync) + at, t->anchor + at, 4096);
        assert_memory_not_equal(sync_momentum(r->node[2].sync) + at, t->momentum + at, 4096);
    }
}

static void end(struct test *t) {
    char command[96];
    sync_set_before_change(t->rig->node[2].sync, NULL, NULL);
    checkpoint_destroy(t->checkpoint);
    event_base_free(t->base);
    free(t->anchor);
    free(t->momentum);
    snprintf(command, sizeof command, "rm -rf %s", t->folder);
    assert_int_equal(system(command), 0);
}

static void assert_it_is_what_it_was(const struct test *t) {
    struct err err = {0};
    float *now = malloc(ELEMENTS * sizeof *now);
    struct ckpt *c = ckpt_open(t->folder, &t->rig->run, &err);
    if (!c) fail_msg("%s", err.msg);
    assert_int_equal(ckpt_facts(c)->index, t->index);
    assert_int_equal(ckpt_read(c, CKPT_ANCHOR, 0, ELEMENTS, now, &err), 0);
    assert_memory_equal(now, t->anchor, ELEMENTS * sizeof *now);
    assert_int_equal(ckpt_read(c, CKPT_MOMENTUM, 0, ELEMENTS, now, &err), 0);
    assert_memory_equal(now, t->momentum, ELEMENTS * sizeof *now);
    if (ckpt_verify(c, NULL, NULL, &err)) fail_msg("%s", err.msg);
    ckpt_close(c);
    free(now);
}

/* A commit changes every chunk after none, some or all pieces were put: of a chunk in the middle the rest is
 * saved, of others all, and nothing twice. */
static void pieces_are_of_the_state_that_it_began_with(void **state) {
    for (int turns = 1; turns < 9; turns++) {
        struct test t;
        if (turns > 1) rig_teardown(state), rig_setup(state);
        three_members(*state);
        struct digest root = root_of(*state, 2);
        begin(&t, *state, &root);
        go_on_until(&t, turns); /* the first is that of the beginning */
        a_commit_changes_it(&t);
        go_on_until(&t, INT_MAX);
        if (!t.ok) fail_msg("after %d turns: %s", turns, t.text);
        assert_non_null(strstr(t.text, t.folder));
        assert_it_is_what_it_was(&t);
        end(&t);
    }
}

/* What is not the state is not signed for; the loop is told why, once, when nothing of it is left. */
static void a_failure_is_told_when_all_is_taken_away(void **state) {
    struct test t;
    struct err err = {0};
    struct ckpt_entry *e;
    uint32_t count = 9;
    struct digest root = {{1}};
    three_members(*state);
    begin(&t, *state, &root);
    go_on_until(&t, INT_MAX);
    assert_false(t.ok);
    assert_non_null(strstr(t.text, "root"));
    struct ckpt_store *store = ckpt_store_open(t.folder, false, &err);
    assert_int_equal(ckpt_list(store, &e, &count, &err), 0);
    assert_int_equal(count, 0);
    free(e);
    store->ops->close(store);
    for (int i = 0; i < 3; i++) event_base_loop(t.base, EVLOOP_NONBLOCK);
    assert_int_equal(t.dones, 1);
    end(&t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(pieces_are_of_the_state_that_it_began_with, rig_setup, rig_teardown),
        cmocka_unit_test_setup_teardown(a_failure_is_told_when_all_is_taken_away, rig_setup, rig_teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
