/* test_sync_round.c - a whole round between members: everybody has the right bits, and what becomes of a contribution
 * that was summed, summed in part, or not. */
#include "tests/sync_rounds.h"

/* ---- a whole round ----------------------------------------------------------------------- */

/* Contribution, sum, copy, commit, apply: all have the same bits, and they are the right ones. Two
 * rounds, so that momentum and error feedback take part. */
static void round_gives_everybody_the_right_bits(void **state) {
    struct rig *r = *state;
    struct expectation e;
    uint64_t used = 0;
    three_members(r);
    for (int round = 0; round < 2; round++) {
        train_round(r, 2);
        train_round(r, 3);
        state_now(r, 1, &e);
        whole_round(r, &THREE);
        expect_step(r, &THREE, report_of(r, 1), &e);
        used += STEPS * BATCH;
        for (uint32_t id = 1; id <= 3; id++) announce(r, id, &THREE, id > 1 ? used : 0);
        for (uint32_t id = 1; id <= 3; id++) {
            assert_state(r, id, &e);
            const struct msg_root *root = last_sent(r, id, MSG_ROOT)->msg;
            assert_int_equal(root->index, r->base_index);
        }
        assert_same_state(r, 1, 2);
        assert_same_state(r, 1, 3);
        assert_local_is_anchor(r, 2); /* alpha is 0 */
        assert_int_equal(look(r, 3).samples_uncommitted, 0);
        assert_int_equal(r->node[3].tokens, 1000 * (round + 1));
    }
    assert_int_equal(r->node[2].resets, 1); /* nothing was lost on the way */
    assert_int_equal(ready_of(r, 2)->ranges[0].start, 2000 + STEPS * BATCH);
}

/* The own node lost its connection while it wrote one for long, and the run was complete meanwhile: the last
 * one must not be refused until the coordinator gives it up. What a lost connection asked for is forgotten. */
static void a_checkpoint_begins_when_the_one_before_has_ended(void **state) {
    struct rig *r = *state;
    struct node *own = &r->node[1];
    struct msg_checkpoint_write w = {.url = proto_str("file:///x")};
    struct sync_event ends = {.type = SYNC_EV_CHECKPOINT, .done = true, .ok = true, .text = ""};
    three_members(r);
    w.root = root_of(r, 1);
    say(r, 1, MSG_CHECKPOINT_WRITE, 0, &w);
    train_round(r, 2);
    train_round(r, 3);
    whole_round(r, &THREE);
    announce(r, 1, &THREE, 0);
    w.index = r->base_index;
    w.root = root_of(r, 1);
    say(r, 1, MSG_CHECKPOINT_WRITE, 0, &w);
    assert_int_equal(own->checkpoint_begins, 1);
    assert_int_equal(count_sent(r, 1, MSG_CHECKPOINT_DONE), 0);
    step(r, 1, &ends);
    assert_int_equal(count_sent(r, 1, MSG_CHECKPOINT_DONE), 1);
    assert_int_equal(((const struct msg_checkpoint_done *)last_sent(r, 1, MSG_CHECKPOINT_DONE)->msg)->index, 0);
    assert_int_equal(own->checkpoint_begins, 2);
    w.index++;
    say(r, 1, MSG_CHECKPOINT_WRITE, 0, &w);
    own->connected = false;
    step(r, 1, &(struct sync_event){.type = SYNC_EV_DISCONNECTED});
    step(r, 1, &ends);
    assert_int_equal(own->checkpoint_begins, 2);
    assert_int_equal(count_sent(r, 1, MSG_CHECKPOINT_DONE), 1);
}

/* It hears of a checkpoint before it has applied the commit: the state is kept when it is there, and only if
 * it is that one; of one that is past there is nothing to keep. */
static void what_is_to_be_kept_is_kept_when_it_is_there(void **state) {
    struct rig *r = *state;
    struct msg_range all = {0, CHUNKS};
    struct msg_checkpoint_keep keep = {.chunks = &all, .chunks_count = 1};
    three_members(r);
    keep.root = root_of(r, 2);
    say(r, 2, MSG_CHECKPOINT_KEEP, 0, &keep);
    assert_int_equal(r->node[2].keeps, 1);
    train_round(r, 2);
    train_round(r, 3);
    whole_round(r, &THREE);
    announce(r, 1, &THREE, 0);
    keep.index = r->base_index;
    keep.root = root_of(r, 1);
    say(r, 2, MSG_CHECKPOINT_KEEP, 0, &keep);
    assert_int_equal(r->node[2].keeps, 1);
    announce(r, 2, &THREE, STEPS * BATCH);
    assert_int_equal(r->node[2].keeps, 2);
    keep.root.b[0] ^= 1;
    say(r, 3, MSG_CHECKPOINT_KEEP, 0, &keep);
    announce(r, 3, &THREE, STEPS * BATCH);
    assert_int_equal(r->node[3].keeps, 0);
    keep.index = 0;
    say(r, 2, MSG_CHECKPOINT_KEEP, 0, &keep);
    assert_int_equal(r->node[2].keeps, 2);
    keep.chunks_count = 0;
    say(r, 2, MSG_CHECKPOINT_KEEP, 0, &keep);
    assert_int_equal(r->node[2].keeps, 3); /* the end is passed on */
}

/* A contributor may aggregate, too: its own bytes never travel. */
static void contributor_aggregates(void **state) {
    struct rig *r = *state;
    struct plan_spec spec = {{2, 3}, 2, 2, 3};
    three_ready(r);
    struct digest base = root_of(r, 2);
    say_plan(r, &spec);
    assert_int_equal(count_sent(r, 2, MSG_CHUNK), 0);
    assert_int_equal(count_sent(r, 3, MSG_CHUNK), CHUNKS);
    assert_int_equal(report_of(r, 2)->summed[0].weight, 12 + 17);
    commit(r, &spec, &base);
    for (uint32_t id = 1; id <= 3; id++) announce(r, id, &spec, id > 1 ? STEPS * BATCH : 0);
    assert_same_state(r, 2, 1);
    assert_same_state(r, 2, 3);
}

/* What was not finished goes on without the lost one, divided by what really arrived. */
static void dropped_contributor_does_not_count_in_the_divisor(void **state) {
    struct rig *r = *state;
    struct expectation e;
    three_ready(r);
    state_now(r, 1, &e);
    struct digest base = root_of(r, 1);
    r->spoil = member_3_breaks_off;
    chunks_allowed = 2;
    say_plan(r, &THREE);
    assert_null(last_sent(r, 1, MSG_SHARD_REPORT));
    r->node[3].connected = false;
    say(r, 1, MSG_DROP, r->plan, &(struct msg_drop){.member = 3});
    settle(r);
    pass(r, 200);
    const struct msg_shard_report *report = report_of(r, 1);
    assert_int_equal(report->summed_count, 2);
    assert_int_equal(report->summed[0].chunks, 2);
    assert_int_equal(report->summed[0].weight, 12 + 17);
    assert_int_equal(report->summed[1].weight, 12);
    assert_int_equal(report->summed[1].set.data[0], 1);
    expect_step(r, &THREE, report, &e);
    commit(r, &THREE, &base);
    announce(r, 1, &THREE, 0);
    announce(r, 2, &THREE, STEPS * BATCH);
    assert_state(r, 1, &e);
    assert_state(r, 2, &e);
}

/* Nobody need tell an aggregator that a contributor went silent. */
static void silent_contributor_is_dropped_by_the_aggregator(void **state) {
    struct rig *r = *state;
    three_ready(r);
    r->spoil = member_3_breaks_off;
    chunks_allowed = 1;
    say_plan(r, &THREE);
    for (int i = 0; i < 13; i++) {
        pass(r, 100);
        say(r, 1, MSG_HEARTBEAT_ACK, 0, &(struct msg_heartbeat_ack){0});
        say(r, 2, MSG_HEARTBEAT_ACK, 0, &(struct msg_heartbeat_ack){0});
    }
    assert_int_equal(report_of(r, 1)->summed[1].weight, 12);
    assert_int_equal(report_of(r, 2)->summed[1].weight, 12);
}

/* A partly received contribution goes on where it broke off. */
static void a_holder_whose_link_is_replaced_asks_again(void **state) {
    struct rig *r = *state;
    three_ready(r);
    r->spoil = member_3_chunks_wait;
    say_plan(r, &THREE);
    uint32_t asked = count_sent(r, 2, MSG_RESULT_GET);
    assert_int_equal(asked, 1);
    step(r, 2, &(struct sync_event){.type = SYNC_EV_PEER_OPEN, .peer = 1});
    settle(r);
    assert_int_equal(count_sent(r, 2, MSG_RESULT_GET), asked + 1);
    r->spoil = NULL;
}

static void broken_link_resumes(void **state) {
    struct rig *r = *state;
    three_ready(r);
    r->spoil = member_3_breaks_off;
    chunks_allowed = 2;
    say_plan(r, &THREE);
    r->spoil = NULL;
    hang_up(r, 3, 1);
    for (int i = 0; i < 3; i++) pass(r, 100);
    assert_int_equal(report_of(r, 1)->summed[0].weight, 12 + 17);
    assert_int_equal(report_of(r, 1)->summed[0].chunks, CHUNKS);
    assert_int_equal(count_sent(r, 3, MSG_CHUNK),
                     CHUNKS + 2); /* only what was missing came again */
}

/* Under a new plan number the old sums are void, and what comes late for them as well. */
static void new_plan_makes_the_old_one_void(void **state) {
    struct rig *r = *state;
    struct plan_spec two = {{2}, 1, 1, 2};
    three_ready(r);
    r->spoil = member_3_chunks_wait;
    say_plan(r, &THREE);
    struct sent late = *last_sent(r, 3, MSG_CHUNK);
    say_plan(r, &two);
    const struct msg_shard_report *report = report_of(r, 1);
    assert_int_equal(report->summed_count, 1);
    assert_int_equal(report->summed[0].weight, 12);
    uint32_t reports = count_sent(r, 1, MSG_SHARD_REPORT);
    step(r, 1,
         &(struct sync_event){
             .type = SYNC_EV_PEER_MESSAGE, .peer = 3, .frame = late.frame, .msg = late.msg});
    settle(r);
    assert_int_equal(count_sent(r, 1, MSG_SHARD_REPORT), reports);
    /* and an older plan that comes late changes nothing */
    r->plan -= 2;
    say_plan(r, &THREE);
    assert_int_equal(look(r, 1).plan, 2);
    r->plan = 2;
}

/* The contributor may hear of the plan first; its LEAVES is then asked for again. */
static void leaves_before_the_plan(void **state) {
    struct rig *r = *state;
    three_ready(r);
    r->node[1].connected = false;
    say_plan(r, &THREE);
    assert_int_equal(count_sent(r, 3, MSG_CHUNK), 0);
    r->node[1].connected = true;
    r->plan--;
    say_plan(r, &THREE);
    assert_int_equal(count_sent(r, 3, MSG_CHUNK), CHUNKS);
    assert_int_equal(report_of(r, 1)->summed[0].weight, 12 + 17);
}

/* A term ends all plans of the one before: their numbers may come again. */
static void new_term_voids_the_plan(void **state) {
    struct rig *r = *state;
    three_ready(r);
    r->spoil = member_3_chunks_wait;
    say_plan(r, &THREE);
    r->term = 2;
    dial_coordinator(r, 1);
    welcome(r, 1, NULL, 0);
    assert_int_equal(look(r, 1).plan, 0);
    pass(r, 1500);
    assert_null(last_sent(r, 1, MSG_SHARD_REPORT));
}

/* ---- summed or not ----------------------------------------------------------------------- */

/* Member 3 comes too late for the round: it keeps its work on top of the new anchor, and its claims
 * go into the next contribution. */
static void not_summed_keeps_work_and_claims(void **state) {
    struct rig *r = *state;
    struct plan_spec two = {{2}, 1, 1, 2};
    float work[ELEMENTS];
    three_members(r);
    train_round(r, 2);
    train_round(r, 3);
    for (int i = 0; i < ELEMENTS; i++)
        work[i] = r->node[3].local[i] - sync_anchor(r->node[3].sync)[i];
    struct digest first = ready_of(r, 3)->root;
    whole_round(r, &two);
    announce(r, 1, &two, 0);
    announce(r, 2, &two, STEPS * BATCH);
    announce(r, 3, &two, 0);
    struct node *n = &r->node[3];
    assert_int_equal(n->resets, 1);
    assert_int_equal(n->adds, CHUNKS);
    assert_int_equal(n->mixes, 0);
    for (int i = 0; i < ELEMENTS; i++)
        assert_float_equal(n->local[i], sync_anchor(n->sync)[i] + work[i], 1e-6);
    assert_same_state(r, 1, 3);
    train_round(r, 3);
    assert_false(digest_equal(&first, &ready_of(r, 3)->root));
    assert_int_equal(ready_of(r, 3)->base_index, r->base_index);
    assert_int_equal(ready_of(r, 3)->ranges[0].start, 3000);
    assert_int_equal(ready_of(r, 3)->ranges[0].count, 2 * STEPS * BATCH);
}

/* The same for a member that was still training when the others committed. */
static void commit_reaches_a_trainer_at_work(void **state) {
    struct rig *r = *state;
    struct plan_spec two = {{2}, 1, 1, 2};
    three_members(r);
    train_round(r, 2);
    train(r, 3);
    whole_round(r, &two);
    for (uint32_t id = 1; id <= 3; id++) announce(r, id, &two, id == 2 ? STEPS * BATCH : 0);
    assert_int_equal(r->node[3].adds, CHUNKS);
    train(r, 3);
    assert_false(r->node[3].frozen);
    train(r, 3); /* its turn is counted from its own freezes, not from the commits of others */
    assert_int_equal(ready_of(r, 3)->ranges[0].count, STEPS * BATCH);
    assert_int_equal(ready_of(r, 3)->base_index, r->base_index);
}

/* A commit that meets a freeze on its way: nothing is encoded against a base that is gone, and the
 * trainer is asked once more when it has the new one. */
static void commit_meets_a_freeze(void **state) {
    struct rig *r = *state;
    struct plan_spec two = {{2}, 1, 1, 2};
    three_members(r);
    train_round(r, 2);
    whole_round(r, &two);
    r->node[3].trainer_up = false; /* the rig answers no FREEZE now */
    for (int i = 0; i < STEPS; i++) train(r, 3);
    assert_true(r->node[3].freeze_asked);
    announce(r, 3, &two, 0);
    assert_int_equal(look(r, 3).state_index, r->base_index);
    assert_int_equal(r->node[3].applies, 0);
    r->node[3].trainer_up = true;
    settle(r);
    assert_int_equal(r->node[3].applies, 1);
    assert_true(r->node[3].frozen);
    assert_int_equal(count_sent(r, 3, MSG_READY), 1);
    assert_int_equal(ready_of(r, 3)->base_index, r->base_index);
    assert_int_equal(ready_of(r, 3)->ranges[0].count, STEPS * BATCH);
}

/* The slot is the trainer's until it answers: the next commit waits, and none is lost. */
static void busy_slot_holds_the_next_commit_back(void **state) {
    struct rig *r = *state;
    struct plan_spec two = {{2}, 1, 1, 2};
    three_members(r);
    r->node[3].hold_applied = true;
    for (int round = 0; round < 2; round++) {
        train_round(r, 2);
        whole_round(r, &two);
        for (uint32_t id = 1; id <= 3; id++)
            announce(r, id, &two, id == 2 ? (round + 1) * STEPS * BATCH : 0);
    }
    assert_int_equal(r->node[3].applies, 1);
    assert_true(look(r, 3).state_index < r->base_index);
    r->node[3].hold_applied = false;
    settle(r);
    assert_int_equal(r->node[3].applies, 2);
    assert_same_state(r, 1, 3);
    for (int i = 0; i < ELEMENTS; i++)
        assert_float_equal(r->node[3].local[i], sync_anchor(r->node[3].sync)[i], 1e-6);
}

static const float *residual(struct rig *r, uint32_t id) {
    return (const float *)(const void *)file_find(&r->node[id].disk, "residual")->live;
}

/* Error feedback: what a contribution lost in encoding counts only once its bytes are in a sum. */
static void residual_is_taken_over_only_when_summed(void **state) {
    struct rig *r = *state;
    struct plan_spec two = {{2}, 1, 1, 2};
    static const float zero[ELEMENTS];
    three_ready(r);
    whole_round(r, &two);
    announce(r, 2, &two, STEPS * BATCH);
    announce(r, 3, &two, 0);
    assert_memory_equal(residual(r, 3), zero, sizeof zero);
    assert_memory_not_equal(residual(r, 2), zero, sizeof zero);
    assert_memory_equal(residual(r, 2), file_find(&r->node[2].disk, "residual-next")->live,
                        sizeof zero);
}

/* Partly summed: spent, and mixed only where it is in the sum. */
static void partly_summed_is_mixed_where_it_is_in(void **state) {
    struct rig *r = *state;
    three_ready(r);
    struct digest base = root_of(r, 1);
    r->spoil = member_3_breaks_off;
    chunks_allowed = 2;
    say_plan(r, &THREE);
    say(r, 1, MSG_DROP, r->plan, &(struct msg_drop){.member = 3});
    settle(r);
    pass(r, 200);
    commit(r, &THREE, &base);
    announce(r, 3, &THREE, STEPS * BATCH);
    assert_int_equal(r->node[3].mixes, 2);
    assert_int_equal(r->node[3].adds, 2);
    assert_memory_equal(r->node[3].local, sync_anchor(r->node[3].sync), 2 * CHUNK * sizeof(float));
    assert_int_equal(look(r, 3).samples_uncommitted, 0);
    assert_int_equal(r->node[3].resets, 1);
}

/* The coordinator says no: back to the anchor, on with what the new list holds. */
static void refused_contribution_resets(void **state) {
    struct rig *r = *state;
    node_with_work(r, 2);
    train_round(r, 2);
    say(r, 2, MSG_RESET, 0, &(struct msg_reset){.reason = proto_str("lease 2 is not yours")});
    struct msg_lease other = {77, 1, 9000, 40};
    say_leases(r, 2, &other, 1);
    assert_local_is_anchor(r, 2);
    assert_int_equal(look(r, 2).contributions_refused, 1);
    assert_null(file_find(&r->node[2].disk, "ready-0"));
    train_round(r, 2);
    assert_int_equal(ready_of(r, 2)->ranges[0].lease, 77);
}

/* A coordinator with an older store takes the lease away, and learns afterwards that its samples were committed: the
 * work counts, so what its encoding lost goes into the next contribution. */
static void residual_is_taken_over_of_a_contribution_that_was_given_up(void **state) {
    struct rig *r = *state;
    struct plan_spec two = {{2}, 1, 1, 2};
    static const float zero[ELEMENTS];
    struct msg_lease other = {77, 1, 9000, 40};
    three_ready(r);
    whole_round(r, &two);
    say_leases(r, 2, &other, 1);
    assert_null(file_find(&r->node[2].disk, "ready-0"));
    assert_memory_equal(residual(r, 2), zero, sizeof zero);
    announce(r, 2, &two, STEPS * BATCH);
    assert_memory_not_equal(residual(r, 2), zero, sizeof zero);
    assert_memory_equal(residual(r, 2), file_find(&r->node[2].disk, "residual-next")->live, sizeof zero);
    assert_local_is_anchor(r, 2);
}

#define T(name) cmocka_unit_test_setup_teardown(name, rig_setup, rig_teardown)
int main(int argc, char **argv) {
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        T(round_gives_everybody_the_right_bits),
        T(a_checkpoint_begins_when_the_one_before_has_ended),
        T(what_is_to_be_kept_is_kept_when_it_is_there),
        T(contributor_aggregates),
        T(dropped_contributor_does_not_count_in_the_divisor),
        T(silent_contributor_is_dropped_by_the_aggregator),
        T(a_holder_whose_link_is_replaced_asks_again),
        T(broken_link_resumes),
        T(new_plan_makes_the_old_one_void),
        T(leaves_before_the_plan),
        T(new_term_voids_the_plan),
        T(not_summed_keeps_work_and_claims),
        T(commit_reaches_a_trainer_at_work),
        T(commit_meets_a_freeze),
        T(busy_slot_holds_the_next_commit_back),
        T(residual_is_taken_over_only_when_summed),
        T(residual_is_taken_over_of_a_contribution_that_was_given_up),
        T(partly_summed_is_mixed_where_it_is_in),
        T(refused_contribution_resets),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
