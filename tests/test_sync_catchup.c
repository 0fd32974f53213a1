/* test_sync_catchup.c - a member that lacks the state, or has a wrong one, and where it gets the right one. */
#include "tests/sync_rounds.h"

static uint32_t states_allowed;
static bool only_some_states(struct rig *r, struct sent *m) {
    (void)r;
    return m->frame.type != MSG_STATE || (states_allowed && states_allowed--);
}

/* Member 4 comes, with a trainer that has made no step. */
static void joins(struct rig *r, const uint32_t *donors, uint32_t count) {
    struct digest root = root_of(r, 1);
    r->node[4] = (struct node){.exists = true, .id = 4, .trains = true};
    node_start(r, 4);
    dial_coordinator(r, 4);
    trainer_up(r, 4, 0);
    welcome(r, 4, donors, count);
    say(r, 4, MSG_ROOT, 0, &(struct msg_root){r->base_index, root});
}

/* Whoever waits for it reads where the state came from. */
static void a_joiner_says_where_its_state_came_from(void **state) {
    struct rig *r = *state;
    two_rounds(r);
    r->node[4] = (struct node){.exists = true, .id = 4};
    node_start(r, 4);
    dial_coordinator(r, 4);
    welcome(r, 4, (uint32_t[]){1, 2}, 2);
    say(r, 4, MSG_ROOT, 0, &(struct msg_root){r->base_index, root_of(r, 1)});
    pass(r, 900);
    assert_same_state(r, 1, 4);
    assert_non_null(strstr(r->node[4].logged, "caught up to ledger index"));
    assert_non_null(strstr(r->node[4].logged, ": 4 chunks from members, 0 from the seed"));
}

/* A joiner fetches the state while a commit lands: what it has is brought forward with the results,
 * the rest comes newer, and it ends with the same bits. Then it trains, with a member's moments. */
static void joiner_catches_up_while_a_commit_lands(void **state) {
    struct rig *r = *state;
    two_rounds(r);
    for (int i = 0; i < ELEMENTS; i++) r->node[2].moments[i] = 0.5f + (float)i;
    r->spoil = only_some_states;
    states_allowed = 2;
    joins(r, (uint32_t[]){1, 2}, 2);
    settle(r);
    assert_int_equal(look(r, 4).chunks_missing, 4); /* stored as one batch */
    train_round(r, 2);
    train_round(r, 3);
    whole_round(r, &THREE);
    for (uint32_t id = 1; id <= 4; id++)
        announce(r, id, &THREE, id == 2 || id == 3 ? 3 * STEPS * BATCH : 0);
    r->spoil = NULL;
    struct digest root = root_of(r, 1);
    say(r, 4, MSG_ROOT, 0, &(struct msg_root){r->base_index, root});
    pass(r, 900);
    assert_same_state(r, 1, 4);
    assert_int_equal(r->node[4].resets, 1);
    assert_local_is_anchor(r, 4);
    assert_true(count_sent(r, 1, MSG_RESULT) + count_sent(r, 2, MSG_RESULT) > 2 * CHUNKS);
    struct msg_lease lease = lease_of(4, 0);
    say_leases(r, 4, &lease, 1);
    pass(r, 900);
    assert_true(r->node[4].moments_in);
    assert_memory_equal(r->node[4].moments, r->node[2].moments, sizeof r->node[4].moments);
    assert_int_equal(r->node[4].moments_steps, r->node[2].steps);
    train_round(r, 4);
    assert_int_equal(ready_of(r, 4)->base_index, r->base_index);
}

static bool all_is_here;
static bool a_result_and_moments_are_missing(struct rig *r, struct sent *m) {
    (void)r;
    const struct msg_result *result = m->msg;
    static struct msg_none none = {.what = MSG_RESULT_GET};
    if (all_is_here || m->to != 4) return true;
    if (m->frame.type == MSG_MOMENTS) return false; /* on their way */
    if (m->frame.type != MSG_RESULT || result->chunk != CHUNKS - 1) return true;
    none.round = result->round;
    m->frame.type = MSG_NONE;
    m->msg = &none;
    return true;
}

static void moments_arrive(struct rig *r) {
    for (uint32_t i = 0; i < r->sent_count; i++) {
        struct sent m = r->sent[i];
        if (m.to != 4 || m.frame.type != MSG_MOMENTS) continue;
        step(r, 4,
             &(struct sync_event){
                 .type = SYNC_EV_PEER_MESSAGE, .peer = m.from, .frame = m.frame, .msg = m.msg});
    }
}

/* Half of a commit stands in the trainer's slot and waits for the other half when the second moments
 * come, which go through the same slot: they must not wipe it out, or the trainer would be a commit
 * behind for good. */
static void moments_do_not_overwrite_a_commit(void **state) {
    struct rig *r = *state;
    two_rounds(r);
    all_is_here = false;
    r->spoil = a_result_and_moments_are_missing;
    joins(r, (uint32_t[]){1, 2}, 2);
    for (int i = 0; i < 20 && !r->node[4].resets; i++) pass(r, 50);
    train_round(r, 2);
    train_round(r, 3);
    whole_round(r, &THREE);
    for (uint32_t id = 1; id <= 4; id++)
        announce(r, id, &THREE, id == 2 || id == 3 ? 3 * STEPS * BATCH : 0);
    assert_true(sync_chunk_version(r->node[4].sync, 0) == r->base_index);
    assert_true(sync_chunk_version(r->node[4].sync, CHUNKS - 1) < r->base_index);
    moments_arrive(r);
    settle(r);
    all_is_here = true;
    struct digest root = root_of(r, 1);
    say(r, 4, MSG_ROOT, 0, &(struct msg_root){r->base_index, root});
    pass(r, 900);
    assert_same_state(r, 1, 4);
    assert_true(r->node[4].moments_in);
    assert_int_equal(r->node[4].resets, 1);
    assert_local_is_anchor(r, 4);
}

/* A trainer that has made steps has moments of its own by then. */
static void moments_that_come_after_a_step_are_not_taken(void **state) {
    struct rig *r = *state;
    two_rounds(r);
    all_is_here = false;
    r->spoil = a_result_and_moments_are_missing;
    joins(r, (uint32_t[]){2}, 1);
    struct msg_lease lease = lease_of(4, 0);
    say_leases(r, 4, &lease, 1);
    for (int i = 0; i < 20 && !last_sent(r, 2, MSG_MOMENTS); i++) pass(r, 50);
    r->node[4].connected = false;
    step(r, 4, &(struct sync_event){.type = SYNC_EV_DISCONNECTED}); /* it goes on with what it has */
    settle(r);
    train(r, 4);
    moments_arrive(r);
    settle(r);
    assert_int_equal(count_sent(r, 2, MSG_MOMENTS), CHUNKS);
    assert_false(r->node[4].moments_in);
}

/* A member that missed a commit keeps its work: a donor's chunk comes as a change, too. */
static void missed_commit_keeps_the_work(void **state) {
    struct rig *r = *state;
    struct plan_spec two = {{2}, 1, 1, 2};
    three_members(r);
    train_round(r, 2);
    train(r, 3);
    whole_round(r, &two);
    announce(r, 1, &two, 0);
    announce(r, 2, &two, STEPS * BATCH);
    for (uint32_t id = 1; id <= 2; id++) /* the results are gone */
        say(r, id, MSG_HEARTBEAT_ACK, 0,
            &(struct msg_heartbeat_ack){.settled_index = r->base_index});
    r->node[3].connected = false;
    step(r, 3, &(struct sync_event){.type = SYNC_EV_DISCONNECTED});
    struct digest root = root_of(r, 1);
    dial_coordinator(r, 3);
    welcome(r, 3, (uint32_t[]){1}, 1);
    say(r, 3, MSG_ROOT, 0, &(struct msg_root){r->base_index, root});
    struct msg_lease lease = lease_of(3, 0);
    say_leases(r, 3, &lease, 1);
    pass(r, 900);
    assert_same_state(r, 1, 3);
    assert_int_equal(count_sent(r, 1, MSG_STATE), CHUNKS);
    assert_int_equal(r->node[3].resets, 1);
    assert_int_equal(r->node[3].adds, CHUNKS);
    train(r, 3);
    train(r, 3);
    assert_int_equal(ready_of(r, 3)->ranges[0].count, STEPS * BATCH);
}

static bool results_never_come(struct rig *r, struct sent *m) {
    (void)r;
    return m->to != 3 || m->frame.type != MSG_RESULT;
}

static bool no_state_yet(struct rig *r, struct sent *m) {
    (void)r;
    return m->to != 4 || m->frame.type != MSG_STATE;
}

/* The only donor's uplink takes longer for a chunk than a question waits: what comes then is not thrown away,
 * or nothing would ever come. */
static void a_chunk_that_took_long_is_welcome(void **state) {
    struct rig *r = *state;
    two_rounds(r);
    r->spoil = no_state_yet;
    joins(r, (uint32_t[]){1}, 1);
    for (int i = 0; i < 20 && count_sent(r, 1, MSG_STATE) < CHUNKS; i++) pass(r, 50);
    pass(r, 450); /* over two heartbeats: it waits before it asks again */
    assert_int_equal(count_sent(r, 4, MSG_STATE_GET), 1);
    for (uint32_t i = 0; i < r->sent_count; i++) {
        struct sent m = r->sent[i];
        if (m.to != 4 || m.frame.type != MSG_STATE) continue;
        step(r, 4,
             &(struct sync_event){
                 .type = SYNC_EV_PEER_MESSAGE, .peer = m.from, .frame = m.frame, .msg = m.msg});
    }
    settle(r);
    assert_same_state(r, 1, 4);
    assert_int_equal(count_sent(r, 4, MSG_STATE_GET), 1);
}

/* Two that dial each other at one moment end with one connection, and what was asked on the other may be lost: the
 * donor is asked again at once, not when the question has waited for two heartbeats. */
static bool no_question(struct rig *r, struct sent *m) {
    (void)r;
    return m->frame.type != MSG_STATE_GET;
}

static void a_donor_whose_connection_is_replaced_is_asked_again(void **state) {
    struct rig *r = *state;
    two_rounds(r);
    r->spoil = no_question;
    joins(r, (uint32_t[]){1}, 1);
    settle(r);
    assert_int_equal(count_sent(r, 4, MSG_STATE_GET), 1);
    r->spoil = NULL;
    step(r, 1, &(struct sync_event){.type = SYNC_EV_PEER_OPEN, .peer = 4});
    step(r, 4, &(struct sync_event){.type = SYNC_EV_PEER_OPEN, .peer = 1});
    settle(r);
    assert_int_equal(count_sent(r, 4, MSG_STATE_GET), 2);
    assert_same_state(r, 1, 4);
}

/* Told that others need the state it has, a member behind NAT dials them, and they ask over that link. */
static void state_behind_nat_dials_who_needs_it(void **state) {
    struct rig *r = *state;
    r->nat[3] = true;
    two_rounds(r);
    joins(r, NULL, 0);
    pass(r, 300);
    assert_int_equal(look(r, 4).chunks_missing, CHUNKS);
    struct digest root = root_of(r, 3);
    struct msg_address needy = {4, proto_str("10.0.0.1"), 7004};
    struct msg_resync msg = {
        .index = r->base_index, .root = root, .donors = &needy, .donors_count = 1};
    say(r, 3, MSG_RESYNC, 0, &msg);
    pass(r, 300);
    assert_same_state(r, 3, 4);
    assert_int_equal(count_sent(r, 3, MSG_STATE), CHUNKS);
}

/* Everybody who is asked shows the leaves of the results, and nobody a chunk: that is no progress, however
 * often it is repeated, and the state is fetched in their place. */
static void leaves_without_results_are_no_progress(void **state) {
    struct rig *r = *state;
    three_members(r);
    train_round(r, 2);
    train_round(r, 3);
    whole_round(r, &THREE);
    struct digest root;
    r->spoil = results_never_come;
    for (uint32_t id = 1; id <= 3; id++) announce(r, id, &THREE, id > 1 ? STEPS * BATCH : 0);
    root = root_of(r, 1);
    say(r, 3, MSG_ROOT, 0, &(struct msg_root){r->base_index, root});
    for (int i = 0; i < 40 && look(r, 3).state_index != r->base_index; i++) {
        pass(r, 100);
        say(r, 3, MSG_HEARTBEAT_ACK, 0, &(struct msg_heartbeat_ack){0});
    }
    assert_same_state(r, 1, 3);
    assert_int_equal(look(r, 3).contributions_summed, 1);
}

/* The coordinator found our root wrong: nothing of it is kept. */
static void resync_fetches_everything_anew(void **state) {
    struct rig *r = *state;
    two_rounds(r);
    struct digest root = root_of(r, 1), wrong = {{1, 2, 3}};
    struct msg_address donor = {1, proto_str("10.0.0.1"), 7001};
    struct msg_resync msg = {
        .index = r->base_index, .root = root, .donors = &donor, .donors_count = 1};
    say(r, 3, MSG_RESYNC, 0, &msg);
    settle(r);
    assert_int_equal(look(r, 3).chunks_missing,
                     0); /* ours is the right one: only donors were meant */
    msg.root = wrong;
    say(r, 3, MSG_RESYNC, 0, &msg);
    assert_int_equal(look(r, 3).chunks_missing, CHUNKS);
    settle(r);
    assert_int_equal(look(r, 3).chunks_missing, CHUNKS); /* what the donor has is not that root */
    msg.root = root;
    say(r, 3, MSG_RESYNC, 0, &msg);
    pass(r, 900);
    assert_same_state(r, 1, 3);
    assert_int_equal(r->node[3].resets, 2);
}

/* Nobody to fetch from: it asks the coordinator for donors again rather than wait for ever. */
static void stuck_catch_up_asks_again(void **state) {
    struct rig *r = *state;
    two_rounds(r);
    node_new(r, 4, true);
    for (int i = 0; i < 25; i++) {
        pass(r, 100);
        say(r, 4, MSG_HEARTBEAT_ACK, 0, &(struct msg_heartbeat_ack){0});
    }
    assert_int_equal(r->node[4].disconnects, 1);
}

#define T(name) cmocka_unit_test_setup_teardown(name, rig_setup, rig_teardown)
int main(int argc, char **argv) {
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        T(a_joiner_says_where_its_state_came_from),
        T(joiner_catches_up_while_a_commit_lands),
        T(moments_do_not_overwrite_a_commit),
        T(moments_that_come_after_a_step_are_not_taken),
        T(missed_commit_keeps_the_work),
        T(a_chunk_that_took_long_is_welcome),
        T(a_donor_whose_connection_is_replaced_is_asked_again),
        T(state_behind_nat_dials_who_needs_it),
        T(leaves_without_results_are_no_progress),
        T(resync_fetches_everything_anew),
        T(stuck_catch_up_asks_again),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
