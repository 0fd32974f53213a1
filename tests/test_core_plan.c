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
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
