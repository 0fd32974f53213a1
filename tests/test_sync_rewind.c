/* test_sync_rewind.c - a run that goes back to a checkpoint, or begins with one: who has the bytes takes
 * the new version, the others get them from the checkpoint or from members; work and claims of what never
 * was are gone. */
#include "tests/sync_rounds.h"

static const struct plan_spec BOTH[2] = {{{2, 3}, 2, 1, 2, 0}, {{2, 3}, 2, 1, 2, 1}};

static void announce_to_all(struct rig *r, const struct plan_spec *spec) {
    for (uint32_t id = 1; id <= 3; id++)
        announce(r, id, spec, id > 1 ? r->spent_to[id] - id * 1000 : 0);
}

/* Fragment 0 is committed once; its state is what the checkpoint holds. */
static uint64_t one_commit(struct rig *r) {
    set_fragments(r, 2, 1, 0.5f);
    three_members(r);
    for (int i = 0; i < STEPS; i++)
        for (uint32_t id = 2; id <= 3; id++) train(r, id);
    whole_round(r, &BOTH[0]);
    announce_to_all(r, &BOTH[0]);
    state_now(r, 1, &r->checkpoint);
    return r->base_index;
}

/* The operator's entry; the coordinator begins again with a new term. Returns its index. */
static uint64_t rewind_to(struct rig *r, uint64_t at_index, const struct digest *root) {
    struct msg_checkpoint to = {.at_index = at_index,
                                .state_root = *root,
                                .url = proto_str("file:///c"),
                                .tokens_committed = 77};
    struct msg_rewind body = {.to = &to, .to_count = 1, .reason = proto_str("it diverged")};
    r->term++;
    uint64_t index = r->entries;
    entry_add(r, LEDGER_REWIND, encoded(RECORD_rewind, &body));
    r->base_index = index;
    for (uint32_t f = 0; f < r->outer.fragments; f++) r->base_of[f] = index;
    for (uint32_t id = 0; id < MEMBERS; id++) r->spent_to[id] = id * 1000;
    return index;
}

static void come_again(struct rig *r, uint32_t id, const uint32_t *donors, uint32_t count) {
    r->node[id].connected = false;
    step(r, id, &(struct sync_event){.type = SYNC_EV_DISCONNECTED});
    dial_coordinator(r, id);
    welcome(r, id, donors, count);
}

static void assert_version(const struct rig *r, uint32_t id, uint64_t version) {
    for (uint32_t c = 0; c < CHUNKS; c++)
        assert_int_equal(sync_chunk_version(r->node[id].sync, c), version);
}

/* Nothing came after the checkpoint: every chunk has its bytes already, whatever its own version was. The
 * contribution that was in flight, the claims and the trainer's work are void. */
static void member_at_the_checkpoint_relabels(void **state) {
    struct rig *r = *state;
    uint64_t at = one_commit(r);
    struct digest root = root_of(r, 1);
    uint64_t index = rewind_to(r, at, &root);
    come_again(r, 3, NULL, 0);
    assert_version(r, 3, index);
    assert_int_equal(look(r, 3).state_index, index);
    struct digest now = root_of(r, 3);
    assert_true(digest_equal(&now, &root)); /* a version is not in a leaf */
    const struct msg_root *shown = last_sent(r, 3, MSG_ROOT)->msg;
    assert_int_equal(shown->index, index);
    assert_null(file_find(&r->node[3].disk, "ready-1"));
    assert_int_equal(r->node[3].resets, 2);
    assert_local_is_anchor(r, 3);
    assert_int_equal(r->node[3].tokens, 77);
    assert_int_equal(r->node[3].queued, 0);
    struct msg_lease again = {9, 1, 3000, 40};
    say_leases(r, 3, &again, 1);
    assert_int_equal(r->node[3].queue[0].start, 3000);
}

/* Commits came after it: what they changed is read from the checkpoint where that can be had, and the next
 * rounds build on it, numbered as if nothing had been undone. */
static void undone_commits_are_read_from_the_checkpoint(void **state) {
    struct rig *r = *state;
    struct expectation e;
    uint64_t at = one_commit(r);
    struct digest root = root_of(r, 1);
    whole_round(r, &BOTH[1]);
    announce_to_all(r, &BOTH[1]);
    r->checkpoint_here = true;
    uint64_t index = rewind_to(r, at, &root);
    for (uint32_t id = 1; id <= 3; id++) {
        come_again(r, id, NULL, 0);
        assert_version(r, id, index);
        assert_state(r, id, &r->checkpoint);
    }
    for (uint32_t id = 2; id <= 3; id++) {
        struct msg_lease lease = {id, 2, id * 1000, 400};
        say_leases(r, id, &lease, 1);
        for (int i = 0; i < STEPS; i++) train(r, id);
        assert_int_equal(ready_in(r, id, 1)->round, 1);
        assert_int_equal(ready_in(r, id, 1)->base_index, index);
    }
    state_now(r, 1, &e);
    whole_round(r, &BOTH[1]);
    expect_step(r, &BOTH[1], report_of(r, 1), &e);
    for (uint32_t id = 1; id <= 3; id++) announce(r, id, &BOTH[1], 0);
    for (uint32_t id = 1; id <= 3; id++) assert_state(r, id, &e);
}

/* The own node was writing what is undone now, and waits for a signature that nobody gives: the next checkpoint
 * must not wait for its end (simulator, seed 64). */
static void a_checkpoint_that_was_undone_holds_up_no_other(void **state) {
    struct rig *r = *state;
    uint64_t at = one_commit(r);
    struct digest root = root_of(r, 1);
    whole_round(r, &BOTH[1]);
    announce_to_all(r, &BOTH[1]);
    struct msg_checkpoint_write w = {.index = r->base_index, .root = root_of(r, 1), .url = proto_str("file:///x")};
    say(r, 1, MSG_CHECKPOINT_WRITE, 0, &w);
    step(r, 1, &(struct sync_event){.type = SYNC_EV_CHECKPOINT, .manifest = {(const uint8_t *)"abc", 3}});
    assert_int_equal(r->node[1].checkpoint_begins, 1);
    r->checkpoint_here = true;
    w.index = rewind_to(r, at, &root);
    w.root = root;
    come_again(r, 1, NULL, 0);
    say(r, 1, MSG_CHECKPOINT_WRITE, 0, &w);
    assert_int_equal(r->node[1].checkpoint_begins, 2);
}

/* ... and fetched from members where it cannot: of the fragment that did not change nothing is fetched. */
static void undone_commits_are_fetched_from_members(void **state) {
    struct rig *r = *state;
    uint64_t at = one_commit(r);
    struct digest root = root_of(r, 1);
    whole_round(r, &BOTH[1]);
    announce_to_all(r, &BOTH[1]);
    uint64_t index = rewind_to(r, at, &root);
    r->checkpoint_here = true;
    come_again(r, 1, NULL, 0);
    r->checkpoint_here = false;
    come_again(r, 3, (uint32_t[]){1}, 1);
    pass(r, 300);
    assert_version(r, 3, index);
    assert_state(r, 3, &r->checkpoint);
    assert_int_equal(count_sent(r, 1, MSG_STATE), 2);
}

/* A trainer that has just come up is about to be set to the anchor, half of which is already in the slot, when
 * the anchor goes back: it begins with the one that the run has, not with that. */
static void a_reset_that_was_being_prepared_begins_anew(void **state) {
    struct rig *r = *state;
    uint64_t at = one_commit(r);
    struct digest root = root_of(r, 1);
    whole_round(r, &BOTH[1]);
    announce_to_all(r, &BOTH[1]);
    uint64_t index = rewind_to(r, at, &root);
    uint32_t resets = r->node[3].resets;
    r->node[3].connected = false;
    step(r, 3, &(struct sync_event){.type = SYNC_EV_DISCONNECTED});
    dial_coordinator(r, 3);
    step(r, 3, &(struct sync_event){.type = SYNC_EV_TRAINER_UP, .steps = 1});
    assert_true(sync_has_work(r->node[3].sync)); /* filling the slot */
    welcome(r, 3, NULL, 0);
    assert_int_equal(look(r, 3).chunks_missing, 2);
    assert_int_equal(r->node[3].resets, resets);
    r->checkpoint_here = true;
    for (uint32_t id = 1; id <= 2; id++) come_again(r, id, NULL, 0);
    pass(r, 900);
    assert_version(r, 3, index);
    assert_int_equal(r->node[3].resets, resets + 1);
    assert_local_is_anchor(r, 3);
}

/* The machine dies at any write between the entry and the new labels: it comes back to the same state. */
static void crash_while_going_back(void **state) {
    struct rig *r = *state;
    struct node *n = &r->node[3];
    uint64_t at = one_commit(r);
    struct digest root = root_of(r, 1);
    whole_round(r, &BOTH[1]);
    announce_to_all(r, &BOTH[1]);
    uint64_t index = rewind_to(r, at, &root);
    r->checkpoint_here = true;
    for (uint32_t fail = 1; fail < 20; fail++) {
        n->disk.fail_at = n->disk.ops + fail;
        n->connected = false;
        step(r, 3, &(struct sync_event){.type = SYNC_EV_DISCONNECTED});
        dial_coordinator(r, 3);
        if (n->sync) welcome(r, 3, NULL, 0);
        bool died = !n->sync;
        if (!died) node_kill(r, 3);
        disk_crash(&n->disk, fail % 4);
        node_start(r, 3);
        for (uint32_t c = 0; c < CHUNKS; c++) {
            uint64_t version = sync_chunk_version(n->sync, c);
            bool undone = sync_ledger_count(n->sync) > index;
            assert_true(!undone || version == index || version == UINT64_MAX);
        }
        if (died) continue;
        dial_coordinator(r, 3);
        welcome(r, 3, NULL, 0);
        assert_version(r, 3, index);
        assert_state(r, 3, &r->checkpoint);
        return;
    }
    fail_msg("going back takes more writes than this test expects");
}

/* A donor that has not heard of it yet still shows the old state, rightly signed: that is nobody's lie, and
 * nothing of it is kept. */
static void state_from_before_is_of_no_use(void **state) {
    struct rig *r = *state;
    uint64_t at = one_commit(r);
    struct digest root = root_of(r, 1);
    whole_round(r, &BOTH[1]);
    announce_to_all(r, &BOTH[1]);
    uint64_t index = rewind_to(r, at, &root);
    come_again(r, 3, (uint32_t[]){1, 2}, 2);
    pass(r, 900);
    assert_int_equal(look(r, 3).chunks_missing, 2);
    struct msg_state old = {.chunk = 1,
                            .version = at,
                            .index = at,
                            .data = {(const uint8_t *)r->checkpoint.anchor, 2 * CHUNK * sizeof(float)}};
    struct frame f = {.type = MSG_STATE, .term = r->term};
    for (uint32_t asked = count_sent(r, 3, MSG_STATE_GET); count_sent(r, 3, MSG_STATE_GET) == asked;) {
        say(r, 3, MSG_HEARTBEAT_ACK, 0, &(struct msg_heartbeat_ack){0});
        pass(r, 50);
    }
    for (uint32_t from = 1; from <= 2; from++)
        step(r, 3,
             &(struct sync_event){
                 .type = SYNC_EV_PEER_MESSAGE, .peer = from, .frame = f, .msg = &old});
    assert_int_equal(look(r, 3).chunks_missing, 2);
    assert_int_equal(r->node[3].closes, 0);
    say(r, 3, MSG_HEARTBEAT_ACK, 0, &(struct msg_heartbeat_ack){0});
    r->checkpoint_here = true;
    come_again(r, 1, NULL, 0);
    r->checkpoint_here = false;
    say(r, 3, MSG_HEARTBEAT_ACK, 0, &(struct msg_heartbeat_ack){0});
    pass(r, 900);
    assert_version(r, 3, index);
}

/* ---- a run that begins with a checkpoint ------------------------------------------------ */

static struct msg_checkpoint origin;

static void begin_with_checkpoint(struct rig *r) {
    for (int i = 0; i < ELEMENTS; i++) {
        r->checkpoint.anchor[i] = 0.001f * (float)i;
        r->checkpoint.momentum[i] = -0.002f * (float)i;
    }
    struct msg_digest_item leaves[CHUNKS];
    for (uint32_t c = 0; c < CHUNKS; c++) {
        size_t first = c * CHUNK, bytes = (c == CHUNKS - 1 ? ELEMENTS - first : CHUNK) * sizeof(float);
        leaves[c].digest = digest_leaf2(c, r->checkpoint.anchor + first, bytes,
                                        r->checkpoint.momentum + first, bytes);
    }
    origin = (struct msg_checkpoint){.state_root = digest_tree_root(leaves, CHUNKS),
                                     .url = proto_str("file:///o")};
    r->genesis.init_from = &origin;
    r->genesis.init_from_count = 1;
    renew_genesis(r);
}

/* Who can read it does; the others ask members, whose chunks are checked against the genesis' root, so that
 * nobody need tell them one. */
static void first_state_from_a_checkpoint(void **state) {
    struct rig *r = *state;
    begin_with_checkpoint(r);
    r->checkpoint_here = true;
    node_new(r, 1, false);
    assert_state(r, 1, &r->checkpoint);
    r->checkpoint_here = false;
    node_new(r, 2, true);
    assert_int_equal(look(r, 2).chunks_missing, CHUNKS);
    assert_null(last_sent(r, 2, MSG_ROOT));
    struct msg_address donor = {1, proto_str("10.0.0.1"), 7001};
    say(r, 2, MSG_RESYNC, 0,
        &(struct msg_resync){
            .index = 0, .root = origin.state_root, .donors = &donor, .donors_count = 1});
    pass(r, 300);
    assert_same_state(r, 1, 2);
    assert_int_equal(look(r, 2).state_index, 0);
}

/* Reading one takes its time, in which nothing stands: it is asked for again and again. */
static void a_checkpoint_that_takes_time_is_waited_for(void **state) {
    struct rig *r = *state;
    begin_with_checkpoint(r);
    r->checkpoint_here = true;
    r->checkpoint_late = 1000;
    node_new(r, 1, false);
    assert_int_equal(look(r, 1).chunks_missing, CHUNKS);
    assert_int_equal(r->checkpoint_late, 999); /* once a tick, not in a circle */
    for (int i = 0; i < 20; i++) {
        say(r, 1, MSG_HEARTBEAT_ACK, 0, &(struct msg_heartbeat_ack){0});
        pass(r, 500);
    }
    assert_true(r->checkpoint_late > 700);
    assert_int_equal(r->node[1].disconnects, 0); /* to ask the coordinator for donors would be of no use */
    r->checkpoint_late = 1;
    pass(r, 4 * SYNC_TICK_MS);
    assert_state(r, 1, &r->checkpoint);
}

/* A store that is away at the start of a run, where nobody else has the state: it comes back. */
static void a_checkpoint_that_was_away_is_asked_for_again(void **state) {
    struct rig *r = *state;
    r->outer.silence_ms_max = 100000; /* no coordinator is played here */
    begin_with_checkpoint(r);
    node_new(r, 1, false);
    pass(r, 10000);
    assert_int_equal(look(r, 1).chunks_missing, CHUNKS);
    r->checkpoint_here = true;
    pass(r, 55000);
    assert_state(r, 1, &r->checkpoint);
}

#define T(name) cmocka_unit_test_setup_teardown(name, rig_setup, rig_teardown)
int main(int argc, char **argv) {
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        T(member_at_the_checkpoint_relabels),
        T(undone_commits_are_read_from_the_checkpoint),
        T(a_checkpoint_that_was_undone_holds_up_no_other),
        T(undone_commits_are_fetched_from_members),
        T(a_reset_that_was_being_prepared_begins_anew),
        T(crash_while_going_back),
        T(state_from_before_is_of_no_use),
        T(first_state_from_a_checkpoint),
        T(a_checkpoint_that_takes_time_is_waited_for),
        T(a_checkpoint_that_was_away_is_asked_for_again),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
