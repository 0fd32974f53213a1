/* test_core_round.c - the coordinator's core: from a plan to a commit: reports, losses, delays. */
#include "tests/test_core.h"

/* ---- reduce: losses ------------------------------------------------------------------------- */

/* The aggregator dies when only the holder's report is missing. Old sums must not commit. */
static void a_lost_aggregator_makes_a_new_plan_and_late_reports_are_void(void **state) {
    struct rig *r = *state;
    start_reducing(r, 3);
    struct fake *own = &r->fake[1], *second = holder(r);
    struct fake before = *second;
    report(r, own);
    own->muted = true;
    pass(r, 2500);
    struct core_view v = look(r);
    assert_string_equal(v.phase, "reduce");
    assert_int_equal(v.handovers, 1);
    assert_true(r->fake[2].plan > before.plan);
    assert_int_not_equal(r->fake[2].shard.aggregator, own->id);
    assert_int_equal(r->fake[2].contributors, 3);             /* the same contributors */
    assert_int_equal(before.id, r->fake[2].shard.aggregator); /* it has a part again */
    uint64_t plan = r->fake[2].plan;
    report(r, &before); /* its result of the old plan arrives now */
    assert_true(logged(r, CORE_INFO, "void"));
    report(r, holder(r));
    assert_int_equal(look(r).commits, 0);
    assert_int_equal(look(r).plan, plan);
    report(r, fake_by_id(r, r->fake[2].shard.aggregator));
    assert_int_equal(look(r).commits, 1);
}

/* Who lacks the state that the round builds on is busy, and leaves if it finds no donor: it is tried once at most. */
static void after_a_plan_that_failed_the_shards_go_to_who_has_the_state(void **state) {
    struct rig *r = *state;
    start_reducing(r, 3);
    commit_once(r);
    struct fake *own = &r->fake[1], *behind = &r->fake[2];
    say_root(r, own);
    for (int i = 3; i <= 4; i++) {
        say_root(r, &r->fake[i]);
        be_ready(r, &r->fake[i], 8);
    }
    pass(r, 2500);
    assert_string_equal(look(r).phase, "reduce");
    assert_int_equal(behind->shard.aggregator, own->id);
    own->muted = true;
    pass(r, 2500);
    assert_int_equal(look(r).handovers, 1);
    assert_int_not_equal(r->fake[3].shard.aggregator, own->id);
    assert_int_not_equal(r->fake[3].shard.aggregator, behind->id);
    assert_int_not_equal(r->fake[3].shard.holder, behind->id);
}

static void a_lost_contributor_is_dropped_and_the_round_goes_on(void **state) {
    struct rig *r = *state;
    start_reducing(r, 3);
    struct fake *own = &r->fake[1], *lost = holder(r) == &r->fake[2] ? &r->fake[3] : &r->fake[2];
    uint64_t plan = own->plan;
    struct msg_leave leave = {.reason = proto_str("power is dear tonight")};
    struct msg_lease claimed = lost->claims[0];
    say(r, lost, MSG_LEAVE, 0, &leave);
    const struct core_action *drop = sent(r, own, MSG_DROP);
    assert_non_null(drop);
    assert_int_equal(((const struct msg_drop *)drop->msg)->member, lost->id);
    assert_int_equal(own->plan, plan);
    /* It may be in some chunks already, so nobody else may get its samples yet. */
    ask(r, own, 0);
    struct fake *other = holder(r);
    ask(r, other, 8);
    for (uint32_t i = 0; i < other->lease_count; i++)
        assert_int_not_equal(other->leases[i].start, claimed.start);
    /* It is in the first chunk only: summed somewhere is spent. */
    struct report rep;
    report_of(own, &rep);
    uint8_t fewer[1] = {rep.set[0]};
    uint32_t bit = lost->id - 2;
    proto_set_del(fewer, bit);
    rep.summed[0].chunks = 1;
    rep.summed[1] = (struct msg_summed){CHUNKS - 1, {fewer, 1}, own->weights - 8};
    rep.msg.summed_count = 2;
    say(r, own, MSG_SHARD_REPORT, own->plan, &rep.msg);
    say(r, other, MSG_SHARD_REPORT, own->plan, &rep.msg);
    assert_int_equal(look(r).commits, 1);
    assert_int_equal(look(r).samples_spent, 24);
}

/* Dropped from every chunk: its samples were in no sum and go to others, the others' do not. */
static void a_contributor_summed_nowhere_gets_its_samples_back_to_the_run(void **state) {
    struct rig *r = *state;
    start_reducing(r, 3);
    struct fake *own = &r->fake[1], *lost = holder(r) == &r->fake[2] ? &r->fake[3] : &r->fake[2];
    struct msg_lease claimed = lost->claims[0];
    say(r, lost, MSG_LEAVE, 0, &(struct msg_leave){0});
    struct report rep;
    report_of(own, &rep);
    proto_set_del(rep.set, lost->id - 2);
    rep.summed[0].weight -= 8;
    say(r, own, MSG_SHARD_REPORT, own->plan, &rep.msg);
    say(r, holder(r), MSG_SHARD_REPORT, own->plan, &rep.msg);
    assert_int_equal(look(r).commits, 1);
    assert_int_equal(look(r).samples_spent, 16);
    struct fake *other = holder(r);
    ask(r, other, 8);
    assert_int_equal(other->leases[0].start, claimed.start);
    assert_int_equal(other->leases[0].generation, claimed.generation + 1);
}

static void a_chunk_summed_from_nobody_makes_a_new_plan(void **state) {
    struct rig *r = *state;
    start_reducing(r, 2);
    struct fake *own = &r->fake[1], *second = holder(r);
    struct report rep;
    report_of(own, &rep);
    rep.summed[0].chunks = CHUNKS - 1;
    rep.summed[1] = (struct msg_summed){1, {NULL, 0}, 0};
    rep.msg.summed_count = 2;
    uint64_t plan = own->plan;
    say(r, own, MSG_SHARD_REPORT, plan, &rep.msg);
    say(r, second, MSG_SHARD_REPORT, plan, &rep.msg);
    assert_int_equal(look(r).commits, 0);
    assert_true(look(r).plan > plan);
    assert_string_equal(look(r).phase, "reduce");
}

/* It lives, and its contribution is nowhere: planned for ever, the round would never end. */
static void a_contribution_that_never_arrives_is_given_up(void **state) {
    struct rig *r = *state;
    start_reducing(r, 2);
    for (int plans = 1; plans <= 3; plans++) {
        assert_int_equal(look(r).plan, plans);
        assert_false(r->fake[2].reset);
        struct fake *by[] = {fake_by_id(r, r->fake[2].shard.aggregator), holder(r)};
        for (int i = 0; i < 2; i++) {
            struct report rep;
            report_of(by[i], &rep);
            rep.summed[0].set.length = rep.summed[0].weight = 0;
            say(r, by[i], MSG_SHARD_REPORT, by[i]->plan, &rep.msg);
        }
    }
    assert_true(r->fake[2].reset && r->fake[3].reset);
    assert_string_equal(look(r).phase, "train");
    assert_int_equal(fragment(r, 0).ready, 0);
    for (int i = 2; i <= 3; i++) be_ready(r, &r->fake[i], 8);
    commit_in(r, 0);
}

/* A member whose disk went back to an older day announces other bytes: those of the plan are gone, and
 * must not be waited for plan after plan. */
static void a_contribution_that_its_member_replaced_is_in_no_further_plan(void **state) {
    struct rig *r = *state;
    start_reducing(r, 3);
    struct fake *own = &r->fake[1], *second = holder(r),
                *f = second == &r->fake[2] ? &r->fake[3] : &r->fake[2];
    struct msg_ready other = ready_of(r, f);
    other.root = root_at(97);
    say(r, f, MSG_READY, 0, &other);
    assert_true(f->reset);
    assert_int_equal(((const struct msg_drop *)sent(r, own, MSG_DROP)->msg)->member, f->id);
    struct report rep;
    report_of(own, &rep);
    rep.summed[0].chunks = CHUNKS - 1;
    rep.summed[1] = (struct msg_summed){1, {NULL, 0}, 0};
    rep.msg.summed_count = 2;
    uint64_t plan = own->plan;
    say(r, own, MSG_SHARD_REPORT, plan, &rep.msg);
    say(r, second, MSG_SHARD_REPORT, plan, &rep.msg);
    const struct msg_plan *next = sent(r, second, MSG_PLAN)->msg;
    assert_int_equal(next->contributors_count, 2);
    for (uint32_t i = 0; i < next->contributors_count; i++)
        assert_int_not_equal(next->contributors[i].member, f->id);
}

static void a_broken_report_costs_its_sender_the_shard(void **state) {
    struct rig *r = *state;
    uint8_t stranger[1] = {0xff};
    for (int kind = 0; kind < 6; kind++) {
        start_reducing(r, 3);
        struct fake *own = &r->fake[1];
        struct report rep;
        report_of(own, &rep);
        if (kind == 0) rep.msg.results_count--;
        if (kind == 1) rep.summed[0].chunks++;
        if (kind == 2) rep.summed[0].set.length = 0;
        if (kind == 3) rep.summed[0].set.data = stranger;
        if (kind == 4) rep.summed[0].weight++;
        if (kind == 5) rep.summed[0].chunks = 0;
        uint64_t plan = own->plan;
        say(r, own, MSG_SHARD_REPORT, plan, &rep.msg);
        assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_PROTOCOL);
        assert_true(r->fake[2].plan > plan);
        assert_int_not_equal(r->fake[2].shard.aggregator, own->id);
        void *again = r;
        teardown(&again);
        setup(state);
        r = *state;
    }
}

static void overdue_reports_move_the_shard_with_more_time_each_time(void **state) {
    struct rig *r = *state;
    start_reducing(r, 3);
    pass(r, 7900); /* 4 * silence_ms_max */
    assert_int_equal(look(r).plan, 1);
    pass(r, 200);
    assert_int_equal(look(r).plan, 2);
    assert_int_not_equal(r->fake[2].shard.aggregator, r->fake[1].id);
    pass(r, 15800);
    assert_int_equal(look(r).plan, 2);
    pass(r, 300);
    assert_int_equal(look(r).plan, 3);
}

/* Else a holder that hangs with its heart beating is never replaced. */
static void a_repeated_report_does_not_buy_time(void **state) {
    struct rig *r = *state;
    start_reducing(r, 3);
    struct fake before = r->fake[1];
    for (int i = 0; i < 9 && look(r).plan == 1; i++) {
        before.conn = r->fake[1].conn;
        report(r, &before);
        pass(r, 1000);
    }
    assert_int_equal(look(r).plan, 2);
    assert_int_equal(r->fake[2].shard.aggregator, r->fake[1].id);
    assert_int_not_equal(holder(r)->id, before.shard.holder);
}

/* Who was ready after the plan was frozen waits for the next round: the aggregators that are left
 * must be able to add up what contributors announced before they knew who would sum. */
static void a_handover_keeps_the_contributors(void **state) {
    struct rig *r = *state;
    start_with(r, 3);
    be_ready(r, &r->fake[2], 8);
    be_ready(r, &r->fake[3], 8);
    pass(r, 1100);
    assert_string_equal(look(r).phase, "reduce");
    be_ready(r, &r->fake[4], 8);
    r->fake[1].muted = true;
    pass(r, 2500);
    assert_int_equal(look(r).plan, 2);
    assert_int_equal(r->fake[2].contributors, 2);
}

/* ---- the commit ----------------------------------------------------------------------------- */

/* Ledger and leases change together or not at all, and nobody hears of it before. */
static void a_commit_spends_leases_in_its_own_transaction_before_any_word(void **state) {
    struct rig *r = *state;
    start_reducing(r, 2);
    for (int i = 2; i <= 3; i++) ask(r, &r->fake[i], 4);
    report(r, &r->fake[1]);
    assert_null(action(r, CORE_ACT_PERSIST)); /* one report is one disk */
    report(r, holder(r));
    const struct core_action *p = action(r, CORE_ACT_PERSIST);
    assert_non_null(p);
    assert_int_equal(p->writes[0].table, CORE_LEDGER);
    assert_int_equal(p->write_count, 3);
    for (uint32_t i = 1; i < 3; i++) {
        assert_int_equal(p->writes[i].table, CORE_LEASE);
        assert_null(p->writes[i].value); /* wholly spent */
    }
    uint32_t persist = place(r, CORE_ACT_PERSIST, -1);
    assert_true(persist < place(r, CORE_ACT_SEND, -1));
    assert_true(persist < place(r, CORE_ACT_SEND_LEDGER, -1));
    assert_true(place(r, CORE_ACT_SEND, MSG_LEASES) < r->out.count);
    for (int i = 1; i <= 3; i++) assert_non_null(sent(r, &r->fake[i], MSG_HOLDERS));
    assert_int_equal(look(r).round, 1);
    assert_int_equal(look(r).tokens_committed, 16 * SEQUENCE);
    assert_int_equal(r->fake[2].lease_count, 1); /* what it asked for later is still its own */
}

static void a_partly_claimed_lease_keeps_its_id_and_generation(void **state) {
    struct rig *r = *state;
    start_with(r, 2);
    ask(r, &r->fake[2], 8);
    struct msg_lease before = r->fake[2].leases[0];
    be_ready(r, &r->fake[2], 5);
    be_ready(r, &r->fake[3], 8);
    report(r, &r->fake[1]);
    report(r, holder(r));
    assert_int_equal(r->fake[2].lease_count, 1);
    struct msg_lease after = r->fake[2].leases[0];
    assert_int_equal(after.lease, before.lease);
    assert_int_equal(after.generation, before.generation);
    assert_int_equal(after.start, before.start + 5);
    assert_int_equal(after.count, 3);
}

/* ---- many shards, many fragments ------------------------------------------------------------ */

static void start_sharded(struct rig *r, uint32_t trainers) {
    r->outer.shard_chunks = 3;
    start_reducing(r, trainers);
    assert_int_equal(r->fake[2].shard_count, 4);
}

static void a_round_commits_when_every_shard_is_held_twice(void **state) {
    struct rig *r = *state;
    start_sharded(r, 3);
    for (uint32_t i = 0; i < 4; i++) {
        const struct msg_shard s = r->fake[2].shards[i];
        uint32_t by[] = {s.holder, s.aggregator};
        for (int j = 0; j < 2; j++) {
            struct report rep;
            assert_int_equal(look(r).commits, 0);
            report_in(&r->fake[2], 0, i, &rep);
            say(r, fake_by_id(r, by[j]), MSG_SHARD_REPORT, r->fake[2].plan, &rep.msg);
        }
    }
    assert_int_equal(look(r).commits, 1);
}

static void reports_of_others_shards_are_void(void **state) {
    struct rig *r = *state;
    start_sharded(r, 3);
    for (uint32_t i = 0; i < 4; i++)
        for (int j = 1; j <= 4; j++) {
            const struct msg_shard *s = &r->fake[2].shards[i];
            struct report rep;
            if (s->aggregator == r->fake[j].id || s->holder == r->fake[j].id) continue;
            report_in(&r->fake[2], 0, i, &rep);
            rep.results[0].digest = root_at(1);
            say(r, &r->fake[j], MSG_SHARD_REPORT, r->fake[2].plan, &rep.msg);
            assert_true(logged(r, CORE_INFO, "void"));
        }
    struct report rep;
    report_in(&r->fake[2], 0, 0, &rep);
    rep.msg.shard = 4;
    say(r, &r->fake[1], MSG_SHARD_REPORT, r->fake[2].plan, &rep.msg);
    assert_true(logged(r, CORE_INFO, "void"));
    commit_in(r, 0);
}

static void a_report_needs_its_senders_signature(void **state) {
    struct rig *r = *state;
    start_reducing(r, 3);
    struct fake *own = &r->fake[1];
    own->unsigned_ = true;
    report(r, own);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_PROTOCOL);
    assert_int_equal(look(r).plan, 2);
    assert_int_not_equal(r->fake[2].shard.aggregator, own->id);
}

/* The signed words name their plan: those of another one cannot be shown again under this one. */
static void a_report_names_the_plan_it_is_of_twice(void **state) {
    struct rig *r = *state;
    start_reducing(r, 2);
    struct report rep;
    report_of(&r->fake[1], &rep);
    rep.msg.plan = 77;
    sign(r, &r->fake[1], "shard_report", RECORD_shard_report, &rep.msg, &rep.msg.signature);
    say_as_it_is(r, &r->fake[1], MSG_SHARD_REPORT, r->fake[1].plan, &rep.msg);
    assert_true(logged(r, CORE_INFO, "void"));
}

/* One holder of four is gone: everything is summed again under a number of its own. */
static void a_lost_holder_of_one_shard_moves_the_plan(void **state) {
    struct rig *r = *state;
    start_sharded(r, 4);
    struct fake *lost = fake_by_id(r, r->fake[2].shards[2].holder);
    struct fake *left = lost == &r->fake[2] ? &r->fake[3] : &r->fake[2];
    say(r, lost, MSG_LEAVE, 0, &(struct msg_leave){0});
    assert_int_equal(left->plan, 2);
    for (uint32_t i = 0; i < left->shard_count; i++) {
        assert_int_not_equal(left->shards[i].aggregator, lost->id);
        assert_int_not_equal(left->shards[i].holder, lost->id);
    }
}

static void late_members_lose_their_shards_and_the_others_keep_theirs(void **state) {
    struct rig *r = *state;
    start_sharded(r, 4);
    struct fake *late = fake_by_id(r, r->fake[2].shards[1].aggregator);
    for (int i = 1; i <= 5; i++)
        if (&r->fake[i] != late) report_all(r, &r->fake[i], 0);
    assert_int_equal(look(r).commits, 0);
    pass(r, 8100);
    assert_int_equal(look(r).plan, 2);
    for (uint32_t i = 0; i < r->fake[2].shard_count; i++)
        assert_int_not_equal(r->fake[2].shards[i].aggregator, late->id);
    commit_in(r, 0);
}

/* What happens to one fragment's round leaves the others alone. */
static void fragments_have_rounds_of_their_own(void **state) {
    struct rig *r = *state;
    r->outer.fragments = 3;
    start_with(r, 3);
    for (uint32_t f = 0; f < 3; f++)
        for (int i = 2; i <= 4; i++) be_ready_in(r, &r->fake[i], f, 8);
    assert_int_equal(look(r).plan, 3);
    commit_in(r, 2);
    uint64_t first = r->fake[2].state;
    assert_int_equal(fragment(r, 2).round, 1);
    assert_int_equal(fragment(r, 2).base_index, first);
    assert_int_equal(fragment(r, 0).round, 0);
    assert_int_equal(fragment(r, 0).base_index, 0);
    assert_string_equal(fragment(r, 0).phase, "reduce");
    r->fake[1].of[1].plan = r->fake[1].of[0].plan; /* a report under another fragment's plan */
    struct report rep;
    report_in(&r->fake[1], 1, 0, &rep);
    say(r, &r->fake[1], MSG_SHARD_REPORT, r->fake[1].of[0].plan, &rep.msg);
    assert_true(logged(r, CORE_INFO, "void"));
    r->fake[1].of[1].plan = r->fake[2].of[1].plan;
    commit_in(r, 0);
    commit_in(r, 1);
    assert_int_equal(last_commit(r).base_index, 0);
    for (int i = 2; i <= 4; i++) be_ready_in(r, &r->fake[i], 2, 8);
    commit_in(r, 2);
    assert_int_equal(last_commit(r).base_index, first);
    assert_int_equal(last_commit(r).round, 1);
    assert_int_equal(look(r).commits, 4);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        T(a_lost_aggregator_makes_a_new_plan_and_late_reports_are_void),
        T(after_a_plan_that_failed_the_shards_go_to_who_has_the_state),
        T(a_lost_contributor_is_dropped_and_the_round_goes_on),
        T(a_contributor_summed_nowhere_gets_its_samples_back_to_the_run),
        T(a_chunk_summed_from_nobody_makes_a_new_plan),
        T(a_contribution_that_never_arrives_is_given_up),
        T(a_contribution_that_its_member_replaced_is_in_no_further_plan),
        T(a_broken_report_costs_its_sender_the_shard),
        T(overdue_reports_move_the_shard_with_more_time_each_time),
        T(a_repeated_report_does_not_buy_time),
        T(a_handover_keeps_the_contributors),
        T(a_commit_spends_leases_in_its_own_transaction_before_any_word),
        T(a_partly_claimed_lease_keeps_its_id_and_generation),
        T(a_round_commits_when_every_shard_is_held_twice),
        T(reports_of_others_shards_are_void),
        T(a_report_needs_its_senders_signature),
        T(a_report_names_the_plan_it_is_of_twice),
        T(a_lost_holder_of_one_shard_moves_the_plan),
        T(late_members_lose_their_shards_and_the_others_keep_theirs),
        T(fragments_have_rounds_of_their_own),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
