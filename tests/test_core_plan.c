/* test_core_plan.c - the coordinator's core: contributions are announced, and frozen into a plan. */
#include "tests/test_core.h"

/* ---- READY ---------------------------------------------------------------------------------- */

static void a_contribution_that_cannot_be_is_refused(void **state) {
    struct rig *r = *state;
    start_with(r, 3);
    struct fake *f = &r->fake[2];
    ask(r, f, 8);
    claim(f, 8);
    const struct msg_ready good = ready_of(r, f);
    struct msg_ready bad[] = {good, good, good, good, good, good, good};
    bad[0].chunks++;
    bad[1].codec++;
    bad[2].norm = 0.1; /* less than its largest value */
    bad[3].norm = 1e6; /* more than that value in every element */
    bad[4].absmax = -0.5;
    bad[5].absmax = bad[5].norm = 1e200;
    memset(&bad[6].root, 0, sizeof bad[6].root);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        f->reset = false;
        say(r, f, MSG_READY, 0, &bad[i]);
        assert_true(f->reset);
    }
    struct msg_ready early = good;
    early.round++;
    say(r, f, MSG_READY, 0, &early);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_PROTOCOL);
    struct fake *own = &r->fake[1];
    dial(r, own);
    say(r, own, MSG_HELLO, 0, &(struct msg_hello){.trains = 1});
    say(r, own, MSG_READY, 0, &good); /* it says so, but it was enrolled to aggregate only */
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_PROTOCOL);
}

static void a_ready_replaces_another_until_it_is_planned(void **state) {
    struct rig *r = *state;
    start_with(r, 2);
    struct fake *f = &r->fake[2];
    be_ready(r, f, 8);
    claim(f, 4);
    struct msg_ready second = ready_of(r, f);
    second.root = root_at(99);
    say(r, f, MSG_READY, 0, &second);
    assert_false(f->reset);
    be_ready(r, &r->fake[3], 8);
    const struct msg_plan *plan = sent(r, f, MSG_PLAN)->msg;
    assert_true(digest_equal(&plan->contributors[0].root, &second.root));
    assert_int_equal(plan->contributors[0].weight, 4);
    say(r, f, MSG_READY, 0, &second); /* again the same: the plan again */
    assert_non_null(sent(r, f, MSG_PLAN));
    second.root = root_at(98);
    say(r, f, MSG_READY, 0, &second);
    assert_true(f->reset);
}

/* ---- plans ---------------------------------------------------------------------------------- */

static void everybody_ready_plans_at_once(void **state) {
    struct rig *r = *state;
    start_with(r, 3);
    be_ready(r, &r->fake[2], 8);
    be_ready(r, &r->fake[3], 8);
    assert_string_equal(look(r).phase, "train");
    be_ready(r, &r->fake[4], 8);
    assert_string_equal(look(r).phase, "reduce");
    for (int i = 1; i <= 4; i++) assert_non_null(sent(r, &r->fake[i], MSG_PLAN)); /* 1 aggregates */
    const struct msg_plan *plan = sent(r, &r->fake[2], MSG_PLAN)->msg;
    assert_int_equal(plan->shards[0].aggregator, r->fake[1].id);
    assert_int_not_equal(plan->shards[0].holder, r->fake[1].id);
    assert_int_equal(plan->addresses[0].port, r->fake[1].port);
    assert_int_equal(plan->contributors_count, 3);
}

static void a_quorum_waits_for_the_grace_window_and_no_longer(void **state) {
    struct rig *r = *state;
    start_with(r, 3);
    be_ready(r, &r->fake[2], 8);
    pass(r, 1500); /* one is no quorum, however long it waits */
    assert_string_equal(look(r).phase, "train");
    be_ready(r, &r->fake[3], 8);
    pass(r, 900);
    assert_string_equal(look(r).phase, "train");
    pass(r, 200);
    assert_string_equal(look(r).phase, "reduce");
}

/* A run that lost members goes on with the rest; one trainer alone is enough. */
static void the_quorum_shrinks_with_the_live_trainers(void **state) {
    struct rig *r = *state;
    r->outer.quorum = 3;
    start_with(r, 2);
    be_ready(r, &r->fake[2], 8);
    assert_string_equal(look(r).phase, "train");
    r->fake[3].muted = true;
    pass(r, 2500);
    assert_string_equal(look(r).phase, "reduce");
}

/* Two holders on two machines or none: what only one disk has is not held. */
static void a_plan_needs_a_second_holder(void **state) {
    struct rig *r = *state;
    r->fake[1].aggregate_only = false; /* no own node in this run */
    r->outer.quorum = 1;
    rig_start(r);
    join(r, &r->fake[2]);
    be_ready(r, &r->fake[2], 8);
    pass(r, 3000);
    assert_string_equal(look(r).phase, "train");
    r->fake[3].port = 0; /* behind NAT: it can hold, not aggregate */
    join(r, &r->fake[3]);
    pass(r, 2000);
    assert_string_equal(look(r).phase, "reduce");
    assert_int_equal(r->fake[2].shard.aggregator, r->fake[2].id);
    assert_int_equal(r->fake[2].shard.holder, r->fake[3].id);
}

static void weights_ramp_norms_are_clipped_and_the_grid_fits(void **state) {
    struct rig *r = *state;
    r->outer.ramp_rounds = 4;
    start_with(r, 3);
    struct fake *large = &r->fake[4];
    be_ready(r, &r->fake[2], 8);
    be_ready(r, &r->fake[3], 8);
    ask(r, large, 16);
    claim(large, 16);
    struct msg_ready msg = ready_of(r, large);
    msg.norm = 30;
    msg.absmax = 20;
    say(r, large, MSG_READY, 0, &msg);
    const struct msg_plan *plan = sent(r, large, MSG_PLAN)->msg;
    assert_int_equal(plan->contributors[0].weight, 2); /* 8 samples, a quarter in the first round */
    assert_int_equal(plan->contributors[2].weight, 4);
    assert_float_equal(plan->contributors[0].clip, 1, 0);
    assert_float_equal(plan->contributors[2].clip, 0.1, 1e-6); /* 3 * median 1 / 30 */
    assert_true(ldexp(20 * 0.1, plan->grid_exponent) < ldexp(1, 37));
    assert_true(ldexp(20 * 0.1, plan->grid_exponent + 1) >= ldexp(1, 37));
}

static void a_joiners_weight_grows_and_holders_take_turns(void **state) {
    struct rig *r = *state;
    r->outer.ramp_rounds = 4;
    uint32_t holders[2];
    start_reducing(r, 2);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(r->fake[2].weights, 2 * 8 * (i + 1) / 4);
        holders[i] = holder(r)->id;
        commit_once(r);
        if (i == 0) load(r); /* rounds are counted in the ledger */
        for (int j = 1; i == 0 && j <= 3; j++) dial(r, &r->fake[j]), hello(r, &r->fake[j]);
        for (int j = 2; j <= 3; j++) be_ready(r, &r->fake[j], 8);
    }
    assert_int_not_equal(holders[0], holders[1]);
}

static void the_grace_window_starts_anew_when_the_quorum_was_lost(void **state) {
    struct rig *r = *state;
    start_with(r, 4);
    be_ready(r, &r->fake[2], 8);
    be_ready(r, &r->fake[3], 8);
    pass(r, 800);
    say(r, &r->fake[3], MSG_LEAVE, 0, &(struct msg_leave){0});
    pass(r, 800);
    be_ready(r, &r->fake[4], 8);
    pass(r, 800);
    assert_string_equal(look(r).phase, "train");
    pass(r, 300);
    assert_string_equal(look(r).phase, "reduce");
}

/* A member that started again may have lost its frozen bytes; a plan that counts on them stalls. */
static void hello_takes_an_unplanned_ready_back(void **state) {
    struct rig *r = *state;
    start_with(r, 2);
    be_ready(r, &r->fake[2], 8);
    dial(r, &r->fake[2]);
    hello(r, &r->fake[2]);
    be_ready(r, &r->fake[3], 8);
    assert_string_equal(look(r).phase, "train");
    say_ready(r, &r->fake[2]);
    assert_string_equal(look(r).phase, "reduce");
}

/* ---- who says it ---------------------------------------------------------------------------- */

static void a_ready_needs_its_senders_signature(void **state) {
    struct rig *r = *state;
    start_with(r, 2);
    struct fake *f = &r->fake[2];
    f->unsigned_ = true;
    be_ready(r, f, 8);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_PROTOCOL);
    assert_int_equal(fragment(r, 0).ready, 0);
    f->unsigned_ = false;
    dial(r, f);
    hello(r, f);
    ask(r, f, 8);
    claim(f, 8);
    struct msg_ready stolen = ready_of(r, f); /* signed by another member */
    sign(r, &r->fake[3], "ready", RECORD_ready, &stolen, &stolen.signature);
    say_as_it_is(r, f, MSG_READY, 0, &stolen);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_PROTOCOL);
}

static void a_fragment_that_is_not_there_ends_the_connection(void **state) {
    struct rig *r = *state;
    r->outer.fragments = 2;
    start_with(r, 2);
    struct fake *f = &r->fake[2];
    ask(r, f, 8);
    claim(f, 8);
    struct msg_ready msg = ready_of(r, f);
    msg.fragment = 2;
    say(r, f, MSG_READY, 0, &msg);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_PROTOCOL);
}

/* ---- due, grace ----------------------------------------------------------------------------- */

static void those_who_are_not_ready_are_told_when_the_quorum_is(void **state) {
    struct rig *r = *state;
    r->outer.fragments = 2;
    start_with(r, 4);
    for (int i = 2; i <= 3; i++) be_ready_in(r, &r->fake[i], 1, 8);
    assert_false(r->fake[2].of[1].due);
    assert_true(r->fake[4].of[1].due && r->fake[5].of[1].due);
    assert_false(r->fake[4].of[0].due);
    tick(r, 100);
    assert_null(sent(r, NULL, MSG_DUE)); /* once */
    dial(r, &r->fake[4]);
    hello(r, &r->fake[4]); /* it may not have heard it */
    assert_non_null(sent(r, &r->fake[4], MSG_DUE));
    assert_null(sent(r, &r->fake[5], MSG_DUE));
}

/* A result that comes after the overlap is over comes too late to be mixed in time. */
static void grace_is_at_most_the_slack_of_the_overlap(void **state) {
    struct rig *r = *state;
    r->outer.overlap = 3;
    start_with(r, 3);
    for (int i = 2; i <= 4; i++) r->fake[i].tokens_per_s = 4 * SEQUENCE * 10; /* 100 ms a step */
    pass(r, 300);
    be_ready(r, &r->fake[2], 8);
    be_ready(r, &r->fake[3], 8);
    pass(r, 200);
    assert_string_equal(look(r).phase, "train");
    pass(r, 200); /* not a second */
    assert_string_equal(look(r).phase, "reduce");
}

/* Else two fragments wait for each other's trainers, which all stand still. */
static void without_overlap_a_trainer_frozen_elsewhere_is_not_awaited(void **state) {
    struct rig *r = *state;
    r->outer.overlap = 0;
    r->outer.fragments = 2;
    r->outer.quorum = 100;
    start_with(r, 2);
    be_ready_in(r, &r->fake[2], 0, 8);
    be_ready_in(r, &r->fake[3], 1, 8);
    assert_string_equal(fragment(r, 0).phase, "reduce");
    assert_string_equal(fragment(r, 1).phase, "reduce");
}

static void who_was_summed_nowhere_three_rounds_running_is_no_part_of_the_quorum(void **state) {
    struct rig *r = *state;
    r->outer.quorum = 100;
    start_with(r, 2);
    struct fake *mute = &r->fake[3];
    for (int round = 0; round < 3; round++) {
        be_ready(r, &r->fake[2], 8);
        assert_string_equal(look(r).phase, "train"); /* it is waited for */
        be_ready(r, mute, 8);
        struct fake *by[] = {&r->fake[1], holder(r)};
        for (int i = 0; i < 2; i++) {
            struct report rep;
            report_of(by[i], &rep);
            proto_set_del(rep.set, 1);
            rep.summed[0].weight -= 8;
            say(r, by[i], MSG_SHARD_REPORT, by[i]->plan, &rep.msg);
        }
        assert_int_equal(look(r).commits, (unsigned)round + 1);
        mute->ready = false;
    }
    be_ready(r, &r->fake[2], 8);
    pass(r, 1100); /* the grace window, and no longer */
    assert_string_equal(look(r).phase, "reduce");
    commit_in(r, 0);
    be_ready(r, mute, 8);
    be_ready(r, &r->fake[2], 8);
    commit_in(r, 0); /* summed again, so trusted again */
    be_ready(r, &r->fake[2], 8);
    pass(r, 3000);
    assert_string_equal(look(r).phase, "train");
}

/* ---- shards --------------------------------------------------------------------------------- */

static void measured(struct fake *by, const struct fake *of, uint64_t bytes_per_s) {
    by->rates[by->rate_count++] = (struct msg_rate){of->id, bytes_per_s, 1000};
}

/* Trainers 2.. on hosts of their own, all ready; the plan is out. Uplinks were measured by 1. */
static void plan_with_uplinks(struct rig *r, uint32_t trainers, const uint64_t *uplinks) {
    start_with(r, trainers);
    for (uint32_t i = 0; i < trainers; i++)
        if (uplinks[i]) measured(&r->fake[1], &r->fake[i + 2], uplinks[i]);
    pass(r, 200);
    r->fake[1].rate_count = 0;
    for (uint32_t i = 2; i <= trainers + 1; i++) be_ready(r, &r->fake[i], 8);
    assert_string_equal(look(r).phase, "reduce");
}

static uint32_t chunks_summed_by(const struct rig *r, const struct fake *f) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < r->fake[2].shard_count; i++)
        if (r->fake[2].shards[i].aggregator == f->id) n += r->fake[2].shards[i].count;
    return n;
}

static void shards_follow_the_measured_uplinks(void **state) {
    struct rig *r = *state;
    r->outer.shard_chunks = 1;
    r->fake[1].port = 0; /* it only measures */
    plan_with_uplinks(r, 3, (const uint64_t[]){6000000, 3000000, 3000000});
    assert_int_equal(r->fake[2].shard_count, 3);
    assert_int_equal(chunks_summed_by(r, &r->fake[2]), 6);
    assert_int_equal(chunks_summed_by(r, &r->fake[3]), 3);
    assert_int_equal(chunks_summed_by(r, &r->fake[4]), 3);
    uint32_t next = 0;
    for (uint32_t i = 0; i < 3; i++) { /* every chunk once, and a second member has it too */
        const struct msg_shard *s = &r->fake[2].shards[i];
        assert_int_equal(s->first, next);
        assert_int_not_equal(s->holder, s->aggregator);
        next += s->count;
    }
    assert_int_equal(next, CHUNKS);
    const struct msg_plan *plan = sent(r, &r->fake[2], MSG_PLAN)->msg;
    assert_int_equal(plan->addresses_count, 2); /* the others: it does not dial itself */
    commit_in(r, 0);
}

static void a_shard_has_at_least_so_many_chunks(void **state) {
    struct rig *r = *state;
    r->outer.shard_chunks = 4;
    r->fake[1].port = 0;
    plan_with_uplinks(r, 4, (const uint64_t[]){6000000, 6000000, 6000000, 6000000});
    assert_int_equal(r->fake[2].shard_count, 3);
    for (uint32_t i = 0; i < 3; i++) assert_int_equal(r->fake[2].shards[i].count, 4);
}

/* Nobody gets the whole fragment by having a friend say that he is fast. */
static void nobody_is_taken_for_more_than_eight_times_the_median(void **state) {
    struct rig *r = *state;
    r->outer.shard_chunks = 1;
    r->fake[1].port = 0;
    plan_with_uplinks(r, 3, (const uint64_t[]){UINT64_MAX / 2000, 3000000, 3000000});
    assert_int_equal(chunks_summed_by(r, &r->fake[3]), 1);
    assert_int_equal(chunks_summed_by(r, &r->fake[4]), 1);
    assert_int_equal(chunks_summed_by(r, &r->fake[2]), 10);
}

static void a_members_own_word_on_its_uplink_counts_for_nothing(void **state) {
    struct rig *r = *state;
    r->outer.shard_chunks = 1;
    r->fake[1].port = 0;
    start_with(r, 2);
    measured(&r->fake[2], &r->fake[2], 900000000);
    measured(&r->fake[1], &r->fake[3], 1000);
    struct msg_rate nobody = {999, 5, 5};
    r->fake[1].rates[r->fake[1].rate_count++] = nobody;
    pass(r, 200);
    assert_true(member(r, &r->fake[2]).uplink == 0);
    assert_true(member(r, &r->fake[3]).uplink > 0);
    for (int i = 2; i <= 3; i++) be_ready(r, &r->fake[i], 8);
    assert_int_equal(chunks_summed_by(r, &r->fake[2]), chunks_summed_by(r, &r->fake[3]));
}

/* Several receivers at once share an uplink; one of them that lies moves nothing. */
static void an_uplink_is_what_its_receivers_had_together(void **state) {
    struct rig *r = *state;
    start_with(r, 4);
    struct fake *m = &r->fake[2];
    measured(&r->fake[3], m, 1000000);
    measured(&r->fake[4], m, 1000000);
    measured(&r->fake[5], m, 1);
    pass(r, 5000);
    double uplink = member(r, m).uplink;
    assert_true(uplink > 2.9e6 && uplink < 3.1e6);
}

/* A neighbour on the same machine is the first to be heard of; what others had soon puts that right. */
static void a_neighbours_rate_is_soon_forgotten(void **state) {
    struct rig *r = *state;
    start_with(r, 4);
    struct fake *m = &r->fake[2];
    measured(&r->fake[3], m, 1000000000);
    pass(r, 400);
    assert_true(member(r, m).uplink > 9e8);
    r->fake[3].rate_count = 0;
    measured(&r->fake[4], m, 1000000);
    pass(r, r->outer.silence_ms_max + 3000);
    assert_true(member(r, m).uplink < 1.1e6);
}

static void second_holders_are_spread_over_other_hosts(void **state) {
    struct rig *r = *state;
    r->outer.shard_chunks = 1;
    r->fake[1].port = 0;
    for (int i = 2; i <= 5; i++) strcpy(r->fake[i].host, i < 4 ? "10.0.0.1" : "10.0.0.2");
    plan_with_uplinks(r, 4, (const uint64_t[]){1000, 1000, 1000, 1000});
    uint32_t held[MEMBERS + 1] = {0};
    assert_int_equal(r->fake[2].shard_count, 4);
    for (uint32_t i = 0; i < 4; i++) {
        const struct msg_shard *s = &r->fake[2].shards[i];
        assert_string_not_equal(fake_by_id(r, s->aggregator)->host, fake_by_id(r, s->holder)->host);
        held[s->holder]++;
    }
    for (int i = 2; i <= 5; i++) assert_int_equal(held[r->fake[i].id], 1);
}

static void a_second_holder_is_of_another_operator_where_there_is_one(void **state) {
    struct rig *r = *state;
    rig_start(r);
    for (int i = 1; i <= 4; i++) {
        r->invite.id = i == 3 ? 78 : 77;
        join(r, &r->fake[i]);
    }
    for (int i = 2; i <= 4; i++) be_ready(r, &r->fake[i], 8);
    assert_int_equal(holder(r)->id, r->fake[3].id);
}

static void members_behind_nat_hold_and_never_sum(void **state) {
    struct rig *r = *state;
    r->outer.shard_chunks = 1;
    r->fake[1].port = r->fake[3].port = r->fake[4].port = 0;
    plan_with_uplinks(r, 3, (const uint64_t[]){1000, 9000, 9000});
    assert_int_equal(r->fake[2].shard_count, 1);
    assert_int_equal(r->fake[2].shard.aggregator, r->fake[2].id);
}

/* ---- the learning rate ---------------------------------------------------------------------- */

/* Two commits of 16 samples, then one of `samples`. */
static float lr_after(struct rig *r, uint64_t samples) {
    r->outer.lr_rule = LR_SQRT;
    start_with(r, 2);
    for (int round = 0; round < 3; round++) {
        be_ready(r, &r->fake[2], round < 2 ? 8 : samples / 2);
        be_ready(r, &r->fake[3], round < 2 ? 8 : samples / 2);
        commit_in(r, 0);
    }
    return last_commit(r).lr;
}

static void the_learning_rate_shrinks_with_the_root_of_the_samples(void **state) {
    assert_float_equal(lr_after(*state, 4), 0.5 * 0.5, 1e-6);
}
static void a_small_loss_of_samples_changes_no_rate(void **state) {
    assert_float_equal(lr_after(*state, 12), 0.5, 0);
}
static void more_samples_change_no_rate(void **state) {
    assert_float_equal(lr_after(*state, 32), 0.5, 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        T(a_contribution_that_cannot_be_is_refused),
        T(a_ready_replaces_another_until_it_is_planned),
        T(everybody_ready_plans_at_once),
        T(a_quorum_waits_for_the_grace_window_and_no_longer),
        T(the_quorum_shrinks_with_the_live_trainers),
        T(a_plan_needs_a_second_holder),
        T(weights_ramp_norms_are_clipped_and_the_grid_fits),
        T(a_joiners_weight_grows_and_holders_take_turns),
        T(the_grace_window_starts_anew_when_the_quorum_was_lost),
        T(hello_takes_an_unplanned_ready_back),
        T(a_ready_needs_its_senders_signature),
        T(a_fragment_that_is_not_there_ends_the_connection),
        T(those_who_are_not_ready_are_told_when_the_quorum_is),
        T(grace_is_at_most_the_slack_of_the_overlap),
        T(without_overlap_a_trainer_frozen_elsewhere_is_not_awaited),
        T(who_was_summed_nowhere_three_rounds_running_is_no_part_of_the_quorum),
        T(shards_follow_the_measured_uplinks),
        T(a_shard_has_at_least_so_many_chunks),
        T(nobody_is_taken_for_more_than_eight_times_the_median),
        T(a_members_own_word_on_its_uplink_counts_for_nothing),
        T(an_uplink_is_what_its_receivers_had_together),
        T(a_neighbours_rate_is_soon_forgotten),
        T(second_holders_are_spread_over_other_hosts),
        T(a_second_holder_is_of_another_operator_where_there_is_one),
        T(members_behind_nat_hold_and_never_sum),
        T(the_learning_rate_shrinks_with_the_root_of_the_samples),
        T(a_small_loss_of_samples_changes_no_rate),
        T(more_samples_change_no_rate),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
