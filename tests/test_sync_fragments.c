/* test_sync_fragments.c - fragments whose rounds run side by side while training goes on: contributions
 * that claim the same samples, commits that cross, and what remains of them when a trainer, a process
 * or a disk dies between the freeze and the commit. */
#include "tests/sync_rounds.h"

/* Member 1 sums and 2 copies what 2 and 3 contribute. */
static const struct plan_spec BOTH[2] = {{{2, 3}, 2, 1, 2, 0}, {{2, 3}, 2, 1, 2, 1}};
static const struct plan_spec ONLY_2[2] = {{{2}, 1, 1, 2, 0}, {{2}, 1, 1, 2, 1}};

/* With three steps to a round and two fragments, fragment 0 is first due after two steps, 1 after three. */
#define FIRST  (2 * BATCH)
#define SECOND (3 * BATCH)

static void two_in_flight(struct rig *r) {
    set_fragments(r, 2, 1, 0.5f);
    three_members(r);
    for (int i = 0; i < STEPS; i++)
        for (uint32_t id = 2; id <= 3; id++) train(r, id);
    for (uint32_t id = 2; id <= 3; id++) {
        assert_int_equal(ready_in(r, id, 0)->samples, FIRST);
        assert_int_equal(ready_in(r, id, 1)->samples, SECOND);
    }
}

static void announce_to_all(struct rig *r, const struct plan_spec *spec) {
    for (uint32_t id = 1; id <= 3; id++)
        announce(r, id, spec, id > 1 ? r->spent_to[id] - id * 1000 : 0);
}

static bool stands_in_the_mix(const struct rig *r, uint32_t id, uint32_t fragment, const float *before,
                              float alpha) {
    for (uint32_t k = 0; k < chunks_of(r, fragment); k++) {
        size_t n, first = chunk_at(r, fragment, k, &n);
        for (size_t i = first; i < first + n; i++) {
            float want = alpha * before[i] + (1 - alpha) * sync_anchor(r->node[id].sync)[i];
            if (fabsf(r->node[id].local[i] - want) > 1e-6f) return false;
        }
    }
    return true;
}

/* ---- the schedule ----------------------------------------------------------------------- */

/* The fragments take turns, the trainer never stands still, and each says what is in it. */
static void fragments_take_turns(void **state) {
    struct rig *r = *state;
    set_fragments(r, 2, 1, 0.5f);
    three_members(r);
    train(r, 2);
    assert_null(last_sent(r, 2, MSG_READY));
    train(r, 2);
    assert_int_equal(ready_of(r, 2)->fragment, 0);
    assert_int_equal(ready_of(r, 2)->chunks, 2);
    assert_false(r->node[2].frozen);
    train(r, 2);
    assert_int_equal(ready_of(r, 2)->fragment, 1);
    assert_int_equal(ready_of(r, 2)->ranges[0].count, SECOND);
    assert_int_equal(count_sent(r, 2, MSG_READY), 2);
    for (int i = 0; i < 2 * STEPS; i++) train(r, 2);
    assert_int_equal(count_sent(r, 2, MSG_READY), 2); /* neither round is over: nothing is due */
    assert_int_equal(r->node[2].applies, 0);
}

/* With a quorum waiting, whoever did a step is asked to show it now; the same for no other round. */
static void due_freezes_what_there_is(void **state) {
    struct rig *r = *state;
    set_fragments(r, 2, 1, 0.5f);
    three_members(r);
    say(r, 2, MSG_DUE, 0, &(struct msg_due){.fragment = 1, .round = 7});
    train(r, 2);
    pass(r, 50);
    assert_null(last_sent(r, 2, MSG_READY));
    say(r, 2, MSG_DUE, 0, &(struct msg_due){.fragment = 1, .round = 0});
    say(r, 3, MSG_DUE, 0, &(struct msg_due){.fragment = 1, .round = 0});
    say(r, 3, MSG_DUE, 0, &(struct msg_due){.fragment = 9, .round = 0});
    pass(r, 50);
    assert_int_equal(ready_in(r, 2, 1)->samples, BATCH);
    assert_null(last_sent(r, 3, MSG_READY)); /* it has nothing to show yet */
    train(r, 3);
    assert_int_equal(ready_in(r, 3, 1)->samples, BATCH);
}

/* Without overlap the trainer stands still until everything it froze is decided. */
static void without_overlap_it_stands_still(void **state) {
    struct rig *r = *state;
    set_fragments(r, 2, 0, 0);
    three_members(r);
    for (uint32_t id = 2; id <= 3; id++) {
        train(r, id);
        train(r, id);
        assert_true(r->node[id].frozen);
    }
    say(r, 2, MSG_DUE, 0, &(struct msg_due){.fragment = 1, .round = 0});
    pass(r, 50);
    assert_int_equal(count_sent(r, 2, MSG_READY), 2);
    whole_round(r, &BOTH[0]);
    announce_to_all(r, &BOTH[0]);
    assert_true(r->node[2].frozen); /* fragment 1 is under way */
    assert_false(r->node[3].frozen);
    assert_int_equal(r->node[3].mixes, 2);
    say(r, 3, MSG_DUE, 0, &(struct msg_due){.fragment = 1, .round = 0});
    train(r, 3);
    whole_round(r, &BOTH[1]);
    announce_to_all(r, &BOTH[1]);
    assert_false(r->node[2].frozen);
    assert_int_equal(r->node[2].applies, 1);
    assert_local_is_anchor(r, 2); /* alpha is 0 */
}

/* Standing for one fragment is not training of another: its time by the clock does not run meanwhile. */
static void standing_counts_for_no_round(void **state) {
    struct rig *r = *state;
    set_fragments(r, 2, 0, 0);
    r->outer.round_ms = 1000;
    three_members(r);
    train(r, 2);
    pass(r, 500);
    assert_true(r->node[2].frozen);
    pass(r, 3000);
    for (uint32_t i = 0; i < r->sent_count; i++)
        if (r->sent[i].frame.type == MSG_READY)
            assert_int_equal(((const struct msg_ready *)r->sent[i].msg)->fragment, 0);
}

/* The work of a fragment that was not summed is shown again at once, the others keep their turns. */
static void not_summed_is_due_at_once(void **state) {
    struct rig *r = *state;
    two_in_flight(r);
    train(r, 3);
    whole_round(r, &ONLY_2[0]);
    announce_to_all(r, &ONLY_2[0]);
    const struct msg_ready *again = ready_in(r, 3, 0);
    assert_int_equal(again->round, 1);
    assert_int_equal(again->base_index, r->base_index);
    assert_int_equal(again->samples, SECOND + BATCH);
    assert_int_equal(again->ranges[0].start, 3000);
    assert_int_equal(ready_in(r, 3, 1)->round, 0);
    assert_int_equal(r->node[3].resets, 1);
    assert_int_equal(r->node[3].adds, 2);
}

/* ---- claims that overlap ---------------------------------------------------------------- */

/* A sample goes into both fragments and is spent once, by the first commit; the other contribution stands.
 * Both states are shown on the way, and training went on under them. */
static void overlapping_claims_are_spent_once(void **state) {
    struct rig *r = *state;
    struct expectation e;
    float before[ELEMENTS];
    two_in_flight(r);
    state_now(r, 1, &e);
    for (int i = 1; i >= 0; i--) { /* the later one commits first */
        whole_round(r, &BOTH[i]);
        expect_step(r, &BOTH[i], report_of(r, 1), &e);
        for (uint32_t id = 2; id <= 3; id++) train(r, id);
        memcpy(before, r->node[3].local, sizeof before);
        announce_to_all(r, &BOTH[i]);
        for (uint32_t id = 1; id <= 3; id++) {
            const struct msg_root *root = last_sent(r, id, MSG_ROOT)->msg;
            assert_state(r, id, &e);
            assert_int_equal(root->index, r->base_index);
        }
        assert_true(stands_in_the_mix(r, 3, (uint32_t)i, before, 0.5f));
        assert_int_equal(r->spent_to[3], 3000 + SECOND);
    }
    assert_int_equal(r->node[3].resets, 1);
    assert_int_equal(look(r, 3).contributions_summed, 2);
    assert_int_equal(look(r, 3).samples_uncommitted, 2 * BATCH);
    train(r, 3); /* three steps after its freeze */
    const struct msg_ready *next = ready_in(r, 3, 1);
    assert_int_equal(next->round, 1);
    assert_int_equal(next->samples, 3 * BATCH); /* those since it was frozen */
    assert_int_equal(next->ranges_count, 1);
    assert_int_equal(next->ranges[0].start, 3000 + SECOND); /* what is spent is not claimed again */
    assert_int_equal(next->ranges[0].count, 3 * BATCH);
    struct digest root = root_of(r, 3); /* of the whole state, which is newer than the base */
    assert_int_equal(next->base_index, r->base_of[1]);
    assert_int_equal(next->state_index, r->base_index);
    assert_true(digest_equal(&next->state_root, &root));
}

/* One is committed, the other refused: what the first spent is spent, the rest is trained again. */
static void one_commits_and_the_other_is_refused(void **state) {
    struct rig *r = *state;
    two_in_flight(r);
    whole_round(r, &BOTH[0]);
    announce_to_all(r, &BOTH[0]);
    say(r, 3, MSG_RESET, 0, &(struct msg_reset){.fragment = 1, .reason = proto_str("no")});
    struct msg_lease rest = lease_of(3, FIRST);
    say_leases(r, 3, &rest, 1);
    assert_int_equal(r->node[3].resets, 2);
    assert_local_is_anchor(r, 3);
    assert_int_equal(r->node[3].queue[0].start, 3000 + FIRST);
    assert_null(file_find(&r->node[3].disk, "ready-1"));
    assert_int_equal(ready_in(r, 2, 1)->samples, SECOND);
}

/* A refused contribution resets the trainer; the one that is still in flight keeps its claims, and its
 * samples come back only if it is not summed. */
static void refusal_leaves_the_other_in_force(void **state) {
    struct rig *r = *state;
    two_in_flight(r);
    struct digest root = ready_in(r, 3, 1)->root;
    say(r, 3, MSG_RESET, 0, &(struct msg_reset){.fragment = 0, .reason = proto_str("no")});
    struct msg_lease all = lease_of(3, 0);
    say_leases(r, 3, &all, 1);
    assert_int_equal(r->node[3].queue[0].start, 3000 + SECOND);
    assert_non_null(file_find(&r->node[3].disk, "ready-1"));
    train(r, 3);
    float before[ELEMENTS], work[ELEMENTS];
    memcpy(before, r->node[3].local, sizeof before);
    for (int i = 0; i < ELEMENTS; i++) work[i] = before[i] - sync_anchor(r->node[3].sync)[i];
    whole_round(r, &BOTH[1]);
    assert_true(digest_equal(&ready_in(r, 3, 1)->root, &root));
    announce_to_all(r, &BOTH[1]);
    assert_int_equal(r->node[3].resets, 2);
    assert_int_equal(r->node[3].mixes, 0); /* its trainer did not hold that work any more */
    for (int i = 0; i < ELEMENTS; i++)
        assert_float_equal(r->node[3].local[i], sync_anchor(r->node[3].sync)[i] + work[i], 1e-6);
}

/* The list says that a lease is somebody else's: contributions that claim unspent samples of it are void, one
 * whose claims are all spent is not. */
static void lost_lease_voids_what_claims_it(void **state) {
    struct rig *r = *state;
    two_in_flight(r);
    whole_round(r, &BOTH[0]); /* spends the claim of fragment 0; fragment 1 claims more */
    say_ledger(r, 3, r->entries - 1);
    assert_int_equal(look(r, 3).contributions_summed, 0); /* known, not yet applied */
    struct msg_lease other = {77, 1, 9000, 40};
    say_leases(r, 3, &other, 1);
    assert_null(file_find(&r->node[3].disk, "ready-1"));
    assert_int_equal(look(r, 3).contributions_refused, 1);
    assert_int_equal(look(r, 3).contributions_summed, 1);
    assert_int_equal(r->node[3].resets, 2);
    assert_int_equal(r->node[3].queue[0].start, 9000);
}

/* The coordinator refuses what a plan in work names, and the member has frozen another by then: the old plan
 * gets none of its bytes. */
static void refused_contribution_is_in_no_plan(void **state) {
    struct rig *r = *state;
    two_in_flight(r);
    r->hold_peers = true;
    say_plan(r, &BOTH[0]);
    say(r, 3, MSG_RESET, 0, &(struct msg_reset){.fragment = 0, .reason = proto_str("no")});
    struct msg_lease other = {77, 1, 9000, 40};
    struct digest root = ready_in(r, 3, 0)->root;
    say_leases(r, 3, &other, 1);
    for (int i = 0; i < 2; i++) train(r, 3);
    assert_false(digest_equal(&ready_in(r, 3, 0)->root, &root));
    assert_int_equal(ready_in(r, 3, 0)->round, 0);
    r->hold_peers = false;
    settle(r);
    pass(r, 300);
    assert_int_equal(count_sent(r, 3, MSG_CHUNK), 0);
    assert_int_equal(r->node[1].closes, 0);
}

/* ---- what the trainer takes over -------------------------------------------------------- */

/* Two commits of one fragment reach the trainer as one change: the first summed its work, the second did
 * not. It ends where it would have with two changes. */
static void mixing_and_adding_meet(void **state) {
    struct rig *r = *state;
    struct expectation first;
    float before[ELEMENTS];
    two_in_flight(r);
    struct node *n = &r->node[3];
    whole_round(r, &BOTH[1]);
    announce_to_all(r, &BOTH[1]);
    n->trainer_up = false; /* the rig answers no FREEZE now, and until it does nothing is handed over */
    for (int i = 0; i < STEPS; i++) train(r, 3);
    assert_true(n->freeze_asked);
    memcpy(before, n->local, sizeof before);
    whole_round(r, &BOTH[0]);
    announce_to_all(r, &BOTH[0]);
    state_now(r, 1, &first);
    for (int i = 0; i < STEPS; i++) train(r, 2);
    whole_round(r, &ONLY_2[0]);
    announce_to_all(r, &ONLY_2[0]);
    assert_int_equal(n->applies, 1);
    n->trainer_up = true;
    settle(r);
    assert_int_equal(n->applies, 2);
    assert_same_state(r, 1, 3);
    for (uint32_t k = 0; k < 2; k++) {
        size_t count, at = chunk_at(r, 0, k, &count);
        for (size_t i = at; i < at + count; i++) {
            float mixed = 0.5f * before[i] + 0.5f * first.anchor[i];
            assert_float_equal(n->local[i], mixed + sync_anchor(n->sync)[i] - first.anchor[i], 1e-6);
        }
    }
}

/* ---- trainers and processes that die ---------------------------------------------------- */

/* The trainer dies with two contributions in flight. Claims are prefixes of leases, so its successor gets
 * nothing of theirs, but other samples, before they are decided; then the rest. */
static void contributions_outlive_their_trainer(void **state) {
    struct rig *r = *state;
    two_in_flight(r);
    trainer_down(r, 3);
    trainer_up(r, 3, 1);
    assert_int_equal(r->node[3].queued, 0);
    assert_true(((const struct msg_lease_ask *)last_sent(r, 3, MSG_LEASE_ASK)->msg)->samples > 0);
    assert_int_equal(count_sent(r, 3, MSG_READY), 2);
    for (int i = 0; i < 2; i++) {
        whole_round(r, &BOTH[i]);
        announce_to_all(r, &BOTH[i]);
    }
    assert_int_equal(look(r, 3).contributions_summed, 2);
    assert_int_equal(r->node[3].resets, 2); /* one for each life */
    assert_int_equal(r->node[3].mixes, 0);
    assert_int_equal(r->node[3].queue[0].start, 3000 + SECOND);
    for (int i = 0; i < STEPS; i++) train(r, 3);
    const struct msg_ready *next = ready_in(r, 3, 0);
    assert_int_equal(next->round, 1);
    assert_int_equal(next->samples, next->ranges[0].count);
    assert_int_equal(next->ranges[0].start, 3000 + SECOND);
}

/* ... and where one of them is not summed, it claims in the next round what nothing else spent. */
static void orphan_that_is_not_summed_claims_what_is_left(void **state) {
    struct rig *r = *state;
    two_in_flight(r);
    trainer_down(r, 3);
    trainer_up(r, 3, 1);
    whole_round(r, &BOTH[0]); /* spends two batches of three */
    announce_to_all(r, &BOTH[0]);
    assert_int_equal(r->node[3].resets, 2);
    whole_round(r, &ONLY_2[1]);
    announce_to_all(r, &ONLY_2[1]);
    assert_int_equal(r->node[3].resets, 2); /* it had nothing of it yet */
    assert_local_is_anchor(r, 3);
    assert_int_equal(r->node[3].queued, 0); /* the rest of the lease comes when that is known to be spent */
    const struct msg_ready *again = ready_in(r, 3, 1);
    assert_int_equal(again->round, 1);
    assert_int_equal(again->ranges_count, 1);
    assert_int_equal(again->ranges[0].start, 3000 + FIRST);
    assert_int_equal(again->ranges[0].count, SECOND - FIRST);
}

/* The machine loses power with two contributions in flight: both are announced again as they were, signed
 * under the new term, and the list that follows agrees with their claims. */
static void both_contributions_survive_a_restart(void **state) {
    struct rig *r = *state;
    struct digest root[2];
    two_in_flight(r);
    for (uint32_t f = 0; f < 2; f++) root[f] = ready_in(r, 3, f)->root;
    node_kill(r, 3);
    disk_crash(&r->node[3].disk, 3);
    node_start(r, 3);
    r->term = 2;
    forget_sent(r);
    dial_coordinator(r, 3);
    welcome(r, 3, NULL, 0);
    for (uint32_t f = 0; f < 2; f++) {
        const struct msg_ready *ready = ready_in(r, 3, f);
        struct proto_bytes b = encoded(RECORD_ready, ready);
        assert_true(digest_equal(&ready->root, &root[f]));
        assert_true(proto_record_verify(&r->node[3].key.key, "ready", &r->run, 2, b.data, b.length));
        free((void *)(uintptr_t)b.data);
    }
    struct msg_lease lease = lease_of(3, 0);
    trainer_up(r, 3, 1);
    say_leases(r, 3, &lease, 1);
    assert_int_equal(r->node[3].queue[0].start, 3000 + SECOND);
    assert_non_null(file_find(&r->node[3].disk, "ready-0"));
    assert_non_null(file_find(&r->node[3].disk, "ready-1"));
}

/* While it was away a commit spent part of their claims: the ledger comes before the list, which agrees. */
static void restart_after_a_commit_agrees_with_the_list(void **state) {
    struct rig *r = *state;
    two_in_flight(r);
    say_plan(r, &BOTH[0]);
    struct digest base = root_of(r, 1);
    commit(r, &BOTH[0], &base);
    node_kill(r, 3);
    disk_crash(&r->node[3].disk, 0);
    for (uint32_t id = 1; id <= 2; id++) announce(r, id, &BOTH[0], id == 2 ? FIRST : 0);
    node_start(r, 3);
    dial_coordinator(r, 3);
    welcome(r, 3, NULL, 0);
    struct msg_lease lease = lease_of(3, FIRST);
    say_leases(r, 3, &lease, 1);
    assert_non_null(file_find(&r->node[3].disk, "ready-1"));
    say_holders(r, 3, &BOTH[0]);
    settle(r);
    assert_int_equal(look(r, 3).contributions_summed, 1);
    assert_same_state(r, 1, 3);
    trainer_up(r, 3, 1);
    assert_int_equal(r->node[3].queue[0].start, 3000 + SECOND);
}

/* The commit of the other fragment spent the lease to its end, which the ledger on disk says and the list can
 * say no more: the contribution that claims it stands. */
static void restart_after_its_lease_was_spent(void **state) {
    struct rig *r = *state;
    set_fragments(r, 2, 1, 0.5f);
    three_members(r);
    struct msg_lease leases[] = {{3, 1, 3000, SECOND}, {33, 1, 9000, 40}};
    say_leases(r, 3, leases, 2);
    for (int i = 0; i < STEPS; i++)
        for (uint32_t id = 2; id <= 3; id++) train(r, id);
    assert_int_equal(ready_in(r, 3, 0)->ranges_count, 1);
    whole_round(r, &BOTH[1]);
    assert_int_equal(r->spent_to[3], 3000 + SECOND);
    for (uint32_t id = 1; id <= 3; id++) say_ledger(r, id, r->entries - 1);
    say_leases(r, 3, leases + 1, 1);
    node_kill(r, 3);
    disk_crash(&r->node[3].disk, 0);
    node_start(r, 3);
    dial_coordinator(r, 3);
    welcome(r, 3, NULL, 0);
    say_leases(r, 3, leases + 1, 1);
    assert_non_null(file_find(&r->node[3].disk, "ready-0"));
    assert_int_equal(look(r, 3).contributions_refused, 0);
    trainer_up(r, 3, 1);
    settle(r);
    assert_int_equal(r->node[3].queue[0].start, 9000);
}

/* ... and where the lease went to somebody else meanwhile, they are void. */
static void restart_without_the_lease_drops_them(void **state) {
    struct rig *r = *state;
    two_in_flight(r);
    node_kill(r, 3);
    node_start(r, 3);
    dial_coordinator(r, 3);
    welcome(r, 3, NULL, 0);
    struct msg_lease again = {3, 2, 3000, 400}; /* the next generation */
    say_leases(r, 3, &again, 1);
    assert_null(file_find(&r->node[3].disk, "ready-0"));
    assert_null(file_find(&r->node[3].disk, "ready-1"));
    trainer_up(r, 3, 1);
    assert_int_equal(r->node[3].queue[0].start, 3000);
}

/* ---- commits that cross ----------------------------------------------------------------- */

/* Two commits come at once: they are applied in the ledger's order, and the state of each is shown. */
static void crossing_commits_are_applied_in_order(void **state) {
    struct rig *r = *state;
    struct expectation e;
    struct digest shown[2];
    uint64_t index[2];
    two_in_flight(r);
    state_now(r, 1, &e);
    uint32_t roots = count_sent(r, 3, MSG_ROOT), first = r->entries;
    for (int i = 1; i >= 0; i--) {
        whole_round(r, &BOTH[i]);
        expect_step(r, &BOTH[i], report_of(r, 1), &e);
        for (uint32_t id = 1; id <= 2; id++)
            announce(r, id, &BOTH[i], id > 1 ? r->spent_to[id] - id * 1000 : 0);
        index[i] = r->base_index;
        shown[i] = root_of(r, 1);
    }
    say_ledger(r, 3, first);
    say_holders(r, 3, &BOTH[0]);
    pass(r, 200);
    assert_state(r, 3, &e);
    assert_int_equal(count_sent(r, 3, MSG_ROOT), roots + 2);
    for (uint32_t i = 0, n = 0; i < r->sent_count; i++) {
        const struct msg_root *root = r->sent[i].msg;
        if (r->sent[i].from != 3 || r->sent[i].frame.type != MSG_ROOT || n++ < roots) continue;
        int which = n == roots + 1; /* that of fragment 1 came first */
        assert_int_equal(root->index, index[which]);
        assert_true(digest_equal(&root->root, &shown[which]));
    }
    for (uint32_t c = 0; c < CHUNKS; c++)
        assert_int_equal(sync_chunk_version(r->node[3].sync, c), index[c % 2]);
}

/* A round of one fragment is summed while the commit of another is being applied. */
static void plan_survives_the_commit_of_another_fragment(void **state) {
    struct rig *r = *state;
    two_in_flight(r);
    whole_round(r, &BOTH[0]); /* committed, and nobody knows */
    r->hold_peers = true;
    say_plan(r, &BOTH[1]);
    for (uint32_t id = 1; id <= 3; id++) say_ledger(r, id, r->entries - 1);
    r->hold_peers = false;
    settle(r);
    struct digest base = root_of(r, 1);
    commit(r, &BOTH[1], &base);
    announce_to_all(r, &BOTH[0]);
    announce_to_all(r, &BOTH[1]);
    pass(r, 300);
    assert_same_state(r, 1, 2);
    assert_same_state(r, 1, 3);
    assert_int_equal(look(r, 3).state_index, r->base_index);
}

/* The machine dies between two chunks of a commit: what is there is the state of before or of after, and
 * which it is the ledger says. */
static void restart_in_the_middle_of_a_commit(void **state) {
    struct rig *r = *state;
    two_in_flight(r);
    whole_round(r, &BOTH[1]);
    announce_to_all(r, &BOTH[1]);
    node_kill(r, 3);
    node_start(r, 3);
    struct sync_view v = look(r, 3);
    assert_int_equal(v.state_index, r->base_index); /* fragment 0 has its initial version, rightly */
    assert_int_equal(v.chunks_missing, 0);
    dial_coordinator(r, 3);
    const struct msg_hello *hello = last_sent(r, 3, MSG_HELLO)->msg;
    assert_int_equal(hello->has_state, 1);
    assert_int_equal(hello->state_index, r->base_index);
    assert_int_equal(hello->instance, 7003);
}

/* ---- joining ---------------------------------------------------------------------------- */

/* The donor is ahead in one fragment: what it shows is of a state that the joiner hears of later, entry and
 * root. Then it is judged, without being asked for again, and the other fragment's chunks have the version
 * that the ledger says. */
static void joiner_whose_donor_is_ahead_in_one_fragment(void **state) {
    struct rig *r = *state;
    two_in_flight(r);
    whole_round(r, &BOTH[0]);
    announce_to_all(r, &BOTH[0]);
    struct digest first = root_of(r, 1);
    uint64_t first_index = r->base_index;
    whole_round(r, &BOTH[1]);
    announce_to_all(r, &BOTH[1]);
    struct digest second = root_of(r, 1);
    r->node[4] = (struct node){.exists = true, .id = 4, .trains = false};
    node_start(r, 4);
    dial_coordinator(r, 4);
    r->entries--;
    welcome(r, 4, (uint32_t[]){1, 2}, 2);
    r->entries++;
    say(r, 4, MSG_ROOT, 0, &(struct msg_root){first_index, first});
    pass(r, 50);
    assert_int_equal(count_sent(r, 1, MSG_STATE), CHUNKS);
    assert_int_equal(look(r, 4).chunks_missing, CHUNKS);
    say(r, 4, MSG_ROOT, 0, &(struct msg_root){r->base_index, second});
    say_ledger(r, 4, r->entries - 1);
    settle(r);
    assert_same_state(r, 1, 4);
    assert_int_equal(count_sent(r, 1, MSG_STATE), CHUNKS);
    assert_int_equal(sync_chunk_version(r->node[4].sync, 0), first_index);
    assert_int_equal(sync_chunk_version(r->node[4].sync, 1), r->base_index);
}

/* A root that never comes is not waited for: the donor has a newer state by then. */
static void early_chunk_is_not_kept_for_ever(void **state) {
    struct rig *r = *state;
    two_in_flight(r);
    whole_round(r, &BOTH[0]);
    announce_to_all(r, &BOTH[0]);
    node_new(r, 4, false);
    struct msg_address donor = {1, proto_str("10.0.0.1"), 7001};
    say(r, 4, MSG_RESYNC, 0,
        &(struct msg_resync){.index = 0, .donors = &donor, .donors_count = 1});
    pass(r, 100);
    uint32_t states = count_sent(r, 1, MSG_STATE);
    assert_int_equal(states, CHUNKS);
    for (int i = 0; i < 12; i++) {
        pass(r, 100);
        say(r, 4, MSG_HEARTBEAT_ACK, 0, &(struct msg_heartbeat_ack){0});
    }
    assert_int_equal(count_sent(r, 1, MSG_STATE), 2 * CHUNKS);
    struct digest root = root_of(r, 1);
    say(r, 4, MSG_ROOT, 0, &(struct msg_root){r->base_index, root});
    settle(r);
    assert_same_state(r, 1, 4);
}

/* ---- members that break the rules ------------------------------------------------------- */

/* Nothing names a fragment that does not exist but what is broken or hostile. */
static void fragment_that_does_not_exist_closes_the_link(void **state) {
    struct rig *r = *state;
    union {
        struct msg_leaves leaves;
        struct msg_want want;
        struct msg_chunk chunk;
        struct msg_result_get get;
        struct msg_result_leaves result_leaves;
        struct msg_result result;
        struct msg_none none;
    } m;
    const uint8_t types[] = {MSG_LEAVES,        MSG_WANT,   MSG_CHUNK, MSG_RESULT_GET,
                             MSG_RESULT_LEAVES, MSG_RESULT, MSG_NONE};
    two_in_flight(r);
    dial(r, 3, 1);
    for (size_t i = 0; i < sizeof types; i++) {
        memset(&m, 0, sizeof m);
        switch (types[i]) {
        case MSG_LEAVES: m.leaves.fragment = 2; break;
        case MSG_WANT: m.want.fragment = 2; break;
        case MSG_CHUNK: m.chunk.fragment = UINT32_MAX; break;
        case MSG_RESULT_GET: m.get.fragment = 2; break;
        case MSG_RESULT_LEAVES: m.result_leaves.fragment = 64; break;
        case MSG_RESULT: m.result.fragment = 2; break;
        default: m.none.fragment = 2; break;
        }
        uint32_t closes = r->node[1].closes;
        step(r, 1, &(struct sync_event){.type = SYNC_EV_PEER_OPEN, .peer = 3});
        step(r, 1,
             &(struct sync_event){.type = SYNC_EV_PEER_MESSAGE,
                                  .peer = 3,
                                  .frame = {.type = types[i], .term = r->term},
                                  .msg = &m});
        assert_int_equal(r->node[1].closes, closes + 1);
    }
}

static bool as_the_other_fragment(struct rig *r, struct sent *m) {
    (void)r;
    if (m->from == 3 && m->frame.type == MSG_CHUNK) ((struct msg_chunk *)m->msg)->fragment = 0;
    return true;
}

/* A chunk that says it is of another fragment is of another plan there, and ignored; what is missing is
 * asked for again and again, and the contributor is dropped when it gives nothing. */
static void chunk_under_another_fragment_is_ignored(void **state) {
    struct rig *r = *state;
    two_in_flight(r);
    r->spoil = as_the_other_fragment;
    say_plan(r, &BOTH[1]);
    assert_null(last_sent(r, 1, MSG_SHARD_REPORT));
    say(r, 1, MSG_DROP, r->plan, &(struct msg_drop){.fragment = 0, .member = 3}); /* not this one */
    settle(r);
    assert_null(last_sent(r, 1, MSG_SHARD_REPORT));
    say(r, 1, MSG_DROP, r->plan, &(struct msg_drop){.fragment = 1, .member = 3});
    settle(r);
    assert_int_equal(report_of(r, 1)->summed[0].weight, 12);
}

/* A chunk number beyond the fragment is none, although the state has so many chunks. */
static void chunk_beyond_the_fragment_is_ignored(void **state) {
    struct rig *r = *state;
    uint8_t data[CHUNK + 4] = {0};
    two_in_flight(r);
    r->hold_peers = true;
    say_plan(r, &BOTH[0]);
    struct msg_chunk chunk = {.chunk = 2, .codec = OUTER_INT8, .data = {data, sizeof data},
                              .set = {(const uint8_t *)"\2", 1}, .weight = 17};
    struct msg_result result = {.plan = r->plan, .chunk = 3, .codec = OUTER_INT8,
                                .data = {data, sizeof data}};
    struct frame f = {.type = MSG_CHUNK, .term = r->term, .plan = r->plan};
    step(r, 1, &(struct sync_event){.type = SYNC_EV_PEER_MESSAGE, .peer = 3, .frame = f, .msg = &chunk});
    f.type = MSG_RESULT;
    step(r, 2, &(struct sync_event){.type = SYNC_EV_PEER_MESSAGE, .peer = 1, .frame = f, .msg = &result});
    r->hold_peers = false;
    settle(r);
    assert_int_equal(report_of(r, 1)->results_count, 2);
    assert_int_equal(report_of(r, 1)->summed[0].weight, 12 + 17);
}

static bool results_of_another_plan(struct rig *r, struct sent *m) {
    (void)r;
    if (m->to != 3) return true;
    if (m->frame.type == MSG_RESULT_LEAVES) m->frame.plan = 99;
    if (m->frame.type == MSG_RESULT) m->frame.term = 99;
    return true;
}

/* Results that belong to another plan or term than the ledger names are not taken, whoever sends them. */
static void results_of_another_plan_are_ignored(void **state) {
    struct rig *r = *state;
    two_in_flight(r);
    whole_round(r, &BOTH[0]);
    r->spoil = results_of_another_plan;
    announce_to_all(r, &BOTH[0]);
    pass(r, 100);
    assert_true(look(r, 3).state_index < r->base_index);
    r->spoil = NULL;
    say_holders(r, 3, &BOTH[0]);
    pass(r, 900);
    assert_same_state(r, 1, 3);
}

/* ---- what the coordinator asks ---------------------------------------------------------- */

/* The referee compares leaves: they are given of the state it names, which we may have left by now, and of
 * none that we never were at. */
static void leaves_of_the_state_are_shown(void **state) {
    struct rig *r = *state;
    two_in_flight(r);
    whole_round(r, &BOTH[0]);
    announce_to_all(r, &BOTH[0]);
    say(r, 3, MSG_STATE_LEAVES_GET, 0, &(struct msg_state_leaves_get){.index = r->base_index});
    const struct msg_state_leaves *leaves = last_sent(r, 3, MSG_STATE_LEAVES)->msg;
    struct digest root = digest_tree_root(leaves->leaves, leaves->leaves_count),
                  want = root_of(r, 3);
    uint64_t first = r->base_index;
    assert_int_equal(leaves->index, first);
    assert_true(digest_equal(&root, &want));
    whole_round(r, &BOTH[1]);
    announce_to_all(r, &BOTH[1]);
    say(r, 3, MSG_STATE_LEAVES_GET, 0, &(struct msg_state_leaves_get){.index = first});
    leaves = last_sent(r, 3, MSG_STATE_LEAVES)->msg;
    root = digest_tree_root(leaves->leaves, leaves->leaves_count);
    assert_int_equal(leaves->index, first);
    assert_true(digest_equal(&root, &want));
    say(r, 3, MSG_STATE_LEAVES_GET, 0, &(struct msg_state_leaves_get){.index = r->base_index + 7});
    leaves = last_sent(r, 3, MSG_STATE_LEAVES)->msg;
    assert_int_equal(leaves->leaves_count, 0);
}

/* Only the chunks that the referee found wrong are fetched anew, although the state they are of is past: what
 * was built on them since is as wrong. What it says of a root that is ours changes nothing. */
static void resync_fetches_what_is_wrong(void **state) {
    struct rig *r = *state;
    struct msg_address donor = {1, proto_str("10.0.0.1"), 7001};
    two_in_flight(r);
    whole_round(r, &BOTH[0]);
    announce_to_all(r, &BOTH[0]);
    struct digest first = root_of(r, 1);
    struct msg_resync msg = {.index = r->base_index,
                             .root = first,
                             .wrong = {(const uint8_t *)"\4", 1},
                             .donors = &donor,
                             .donors_count = 1};
    whole_round(r, &BOTH[1]);
    announce_to_all(r, &BOTH[1]);
    struct digest second = root_of(r, 1);
    say(r, 3, MSG_RESYNC, 0, &msg);
    assert_int_equal(look(r, 3).chunks_missing, 0);
    msg.root.b[0] ^= 1; /* as if ours were wrong: chunk 2 */
    say(r, 3, MSG_RESYNC, 0, &msg);
    assert_int_equal(look(r, 3).chunks_missing, 1);
    assert_int_equal(sync_chunk_version(r->node[3].sync, 2), UINT64_MAX);
    say(r, 3, MSG_ROOT, 0, &(struct msg_root){r->base_index, second});
    pass(r, 500);
    assert_same_state(r, 1, 3);
    assert_int_equal(count_sent(r, 1, MSG_STATE), 1);
    assert_int_equal(r->node[3].resets, 2);
    say(r, 3, MSG_RESYNC, 0, &msg); /* said again: it is done */
    assert_int_equal(look(r, 3).chunks_missing, 0);
}

/* A coordinator whose store is older asks for the ledger before it says anything else. */
static void ledger_is_shown_before_hello_ack(void **state) {
    struct rig *r = *state;
    two_in_flight(r);
    whole_round(r, &BOTH[0]);
    announce_to_all(r, &BOTH[0]);
    r->node[3].connected = false;
    step(r, 3, &(struct sync_event){.type = SYNC_EV_DISCONNECTED});
    dial_coordinator(r, 3);
    struct frame f = {.type = MSG_LEDGER_GET, .term = r->term};
    step(r, 3,
         &(struct sync_event){
             .type = SYNC_EV_MESSAGE, .frame = f, .msg = &(struct msg_ledger_get){.from = 1}});
    const struct msg_ledger *shown = last_sent(r, 3, MSG_LEDGER)->msg;
    assert_int_equal(shown->entries_count, r->entries - 1);
    assert_memory_equal(shown->entries[1].bytes.data, r->ledger[2].bytes.data,
                        r->ledger[2].bytes.length);
    uint32_t sent = r->sent_count;
    step(r, 3,
         &(struct sync_event){
             .type = SYNC_EV_MESSAGE, .frame = f, .msg = &(struct msg_ledger_get){.from = 99}});
    assert_int_equal(r->sent_count, sent);
}

static bool chunks_take_their_time(struct rig *r, struct sent *m) {
    if (m->frame.type != MSG_CHUNK) return true;
    m->frame.length = 1000;
    r->now += 10;
    return true;
}

/* An uplink is what its receivers measure: bytes that kept coming, and for how long. The first chunk of two
 * starts the clock, after the last nothing is owed. */
static void heartbeat_says_how_fast_bulk_came(void **state) {
    struct rig *r = *state;
    two_in_flight(r);
    r->spoil = chunks_take_their_time;
    say_plan(r, &BOTH[0]);
    r->spoil = NULL;
    pass(r, 250);
    const struct msg_heartbeat *beat = last_sent(r, 1, MSG_HEARTBEAT)->msg;
    assert_int_equal(beat->rates_count, 2);
    for (uint32_t i = 0; i < 2; i++) {
        assert_int_equal(beat->rates[i].bytes, 1000);
        assert_in_range(beat->rates[i].busy_ms, 10, 30);
    }
    pass(r, 250);
    beat = last_sent(r, 1, MSG_HEARTBEAT)->msg;
    assert_int_equal(beat->rates_count, 0);
}

#define T(name) cmocka_unit_test_setup_teardown(name, rig_setup, rig_teardown)
int main(int argc, char **argv) {
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        T(fragments_take_turns),
        T(due_freezes_what_there_is),
        T(without_overlap_it_stands_still),
        T(standing_counts_for_no_round),
        T(not_summed_is_due_at_once),
        T(overlapping_claims_are_spent_once),
        T(one_commits_and_the_other_is_refused),
        T(refusal_leaves_the_other_in_force),
        T(lost_lease_voids_what_claims_it),
        T(refused_contribution_is_in_no_plan),
        T(mixing_and_adding_meet),
        T(contributions_outlive_their_trainer),
        T(orphan_that_is_not_summed_claims_what_is_left),
        T(both_contributions_survive_a_restart),
        T(restart_after_a_commit_agrees_with_the_list),
        T(restart_after_its_lease_was_spent),
        T(restart_without_the_lease_drops_them),
        T(crossing_commits_are_applied_in_order),
        T(plan_survives_the_commit_of_another_fragment),
        T(restart_in_the_middle_of_a_commit),
        T(joiner_whose_donor_is_ahead_in_one_fragment),
        T(early_chunk_is_not_kept_for_ever),
        T(fragment_that_does_not_exist_closes_the_link),
        T(chunk_under_another_fragment_is_ignored),
        T(chunk_beyond_the_fragment_is_ignored),
        T(results_of_another_plan_are_ignored),
        T(leaves_of_the_state_are_shown),
        T(resync_fetches_what_is_wrong),
        T(ledger_is_shown_before_hello_ack),
        T(heartbeat_says_how_fast_bulk_came),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
