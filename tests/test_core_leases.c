/* test_core_leases.c - the coordinator's core: who may train on which samples, and what a contribution may claim. */
#include "tests/test_core.h"

/* ---- leases --------------------------------------------------------------------------------- */

static void a_lease_is_durable_before_it_is_sent(void **state) {
    struct rig *r = *state;
    start_with(r, 1);
    ask(r, &r->fake[2], 8);
    assert_true(place(r, CORE_ACT_PERSIST, -1) < place(r, CORE_ACT_SEND, MSG_LEASES));
    assert_int_equal(r->fake[2].leases[0].count, 8);
    ask(r, &r->fake[2], 1000); /* two leases' worth at most */
    assert_int_equal(r->fake[2].leases[0].count + r->fake[2].leases[1].count, 32);
    ask(r, &r->fake[2], 1000);
    assert_null(action(r, CORE_ACT_PERSIST));
    assert_non_null(sent(r, &r->fake[2], MSG_LEASES));
}

/* A hostile member may ask as it likes: what we write, send and log is bounded. */
static void lease_ask_spam_is_bounded(void **state) {
    struct rig *r = *state;
    start_with(r, 1);
    uint32_t answers = 0, lines = 0;
    for (int i = 0; i < 5000; i++) {
        ask(r, &r->fake[2], 1);
        answers += sent(r, &r->fake[2], MSG_LEASES) != NULL;
        for (uint32_t j = 0; j < r->out.count; j++) lines += r->out.list[j].type == CORE_ACT_LOG;
    }
    assert_int_equal(answers, 16);
    assert_true(lines <= 64);
}

static void a_returned_lease_is_of_the_next_generation_and_the_old_claim_is_refused(void **state) {
    struct rig *r = *state;
    start_with(r, 2);
    struct fake *lost = &r->fake[2], *other = &r->fake[3];
    ask(r, lost, 8);
    struct msg_lease old = lost->leases[0];
    lost->muted = true;
    pass(r, 2500);
    assert_int_equal(lost->conn, 0);
    pass(r, 16000); /* it does not come back */
    ask(r, other, 4); /* a part of it: the rest gets an id of its own */
    assert_int_equal(other->leases[0].lease, old.lease);
    assert_int_equal(other->leases[0].generation, old.generation + 1);
    assert_int_equal(other->leases[0].start, old.start);
    assert_int_equal(other->leases[0].count, 4);
    ask(r, other, 8);
    assert_int_equal(other->lease_count, 3);
    assert_int_equal(other->leases[1].start + other->leases[2].start, 4 + 8);
    dial(r, lost);
    hello(r, lost);
    assert_int_equal(lost->lease_count, 0);
    lost->claims[0] = old;
    lost->claim_count = 1;
    say_ready(r, lost);
    assert_true(lost->reset);
    assert_true(place(r, CORE_ACT_SEND, MSG_RESET) < place(r, CORE_ACT_SEND, MSG_LEASES));
    assert_int_equal(look(r).members_live, 3);
}

static bool is_same(const struct msg_lease *a, const struct msg_lease *b) {
    return a->lease == b->lease && a->generation == b->generation && a->start == b->start &&
           a->count == b->count;
}

/* Stopped, or cut off for a while: what it trained on meanwhile need not be done again, for nobody else has it. */
static void who_comes_back_gets_its_samples_again(void **state) {
    struct rig *r = *state;
    start_with(r, 2);
    struct fake *lost = &r->fake[2], *other = &r->fake[3];
    ask(r, lost, 8);
    struct msg_lease old = lost->leases[0];
    lost->muted = true;
    pass(r, 2500);
    assert_int_equal(lost->conn, 0);
    ask(r, other, 8); /* there are others, which nobody may have worked on */
    assert_int_equal(other->leases[0].start, 8);
    lost->muted = false;
    dial(r, lost);
    hello(r, lost);
    assert_int_equal(lost->lease_count, 1);
    assert_true(is_same(&lost->leases[0], &old));
    lost->muted = true; /* once more, and the coordinator dies meanwhile */
    pass(r, 2500);
    load(r);
    for (int i = 1; i <= 3; i++) dial(r, &r->fake[i]), hello(r, &r->fake[i]);
    lost->muted = false;
    assert_int_equal(lost->lease_count, 1);
    assert_true(is_same(&lost->leases[0], &old));
    be_ready(r, lost, 8);
    assert_false(lost->reset);
    be_ready(r, other, 8);
    commit_in(r, 0);
    assert_int_equal(look(r).samples_spent, 16);
    load(r); /* and the rows say the same */
    assert_int_equal(look(r).samples_spent, 16);
}

/* What it had is the last that others get, but they get it, and then it is too late. */
static void samples_of_who_is_away_are_handed_out_last(void **state) {
    struct rig *r = *state;
    r->corpus.samples = 24;
    start_with(r, 2);
    struct fake *lost = &r->fake[2], *other = &r->fake[3];
    ask(r, lost, 8);
    struct msg_lease old = lost->leases[0];
    lost->muted = true;
    pass(r, 2500);
    ask(r, other, 16);
    assert_int_equal(other->lease_count, 1);
    assert_int_equal(other->leases[0].start, 8);
    ask(r, other, 4);
    assert_int_equal(other->lease_count, 2);
    assert_int_equal(other->leases[0].start, old.start);
    assert_int_equal(other->leases[0].generation, old.generation + 1);
    dial(r, lost);
    hello(r, lost);
    assert_int_equal(lost->lease_count, 0); /* what others did not take has another id */
    lost->claims[0] = old;
    lost->claim_count = 1;
    say_ready(r, lost);
    assert_true(lost->reset);
}

static void a_claim_must_be_a_prefix_of_a_held_lease(void **state) {
    struct rig *r = *state;
    start_with(r, 3);
    struct fake *f = &r->fake[2];
    ask(r, f, 8);
    ask(r, &r->fake[3], 8);
    const struct msg_lease good = f->leases[0];
    struct msg_lease bad[] = {good, good, good, good, good, r->fake[3].leases[0]};
    bad[0].start++, bad[0].count--;
    bad[1].count++;
    bad[2].count = 0;
    bad[3].generation++;
    bad[4].lease += 1000;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        f->reset = false;
        f->claims[0] = bad[i];
        f->claim_count = 1;
        say_ready(r, f);
        assert_true(f->reset);
    }
    f->reset = false;
    f->claims[0] = f->claims[1] = good; /* twice the same */
    f->claim_count = 2;
    say_ready(r, f);
    assert_true(f->reset);
    f->reset = false;
    f->claim_count = 0;
    say_ready(r, f);
    assert_true(f->reset);
    f->reset = false;
    claim(f, 8);
    say_ready(r, f);
    assert_false(f->reset);
}

/* ---- several fragments ---------------------------------------------------------------------- */

static void start_fragments(struct rig *r, uint32_t fragments, uint32_t trainers) {
    r->outer.fragments = fragments;
    start_with(r, trainers);
}

/* A sample has its effect in every fragment and must count once. */
static void a_sample_in_two_contributions_is_spent_by_the_first_commit(void **state) {
    struct rig *r = *state;
    start_fragments(r, 2, 2);
    for (uint32_t f = 0; f < 2; f++)
        for (int i = 2; i <= 3; i++) be_ready_in(r, &r->fake[i], f, 8);
    assert_string_equal(fragment(r, 0).phase, "reduce");
    assert_string_equal(fragment(r, 1).phase, "reduce");
    commit_in(r, 1);
    assert_int_equal(look(r).samples_spent, 16);
    assert_int_equal(look(r).tokens_committed, 16 * SEQUENCE);
    assert_int_equal(r->fake[2].lease_count, 0);
    commit_in(r, 0);
    struct msg_commit k = last_commit(r);
    assert_int_equal(k.tokens, 0);
    assert_int_equal(k.spent_count, 0);
    assert_int_equal(look(r).tokens_committed, 16 * SEQUENCE);
    assert_int_equal(look(r).samples_spent, 16);
    assert_int_equal(member(r, &r->fake[2]).tokens_committed, 8 * SEQUENCE);
}

static void a_later_contribution_spends_only_the_rest(void **state) {
    struct rig *r = *state;
    start_fragments(r, 2, 2);
    ask(r, &r->fake[2], 16);
    struct msg_lease whole = r->fake[2].leases[0];
    be_ready_in(r, &r->fake[2], 0, 8);
    be_ready_in(r, &r->fake[2], 1, 12);
    for (uint32_t f = 0; f < 2; f++) be_ready_in(r, &r->fake[3], f, 8);
    commit_in(r, 0);
    assert_int_equal(r->fake[2].leases[0].start, whole.start + 8);
    commit_in(r, 1);
    assert_int_equal(last_commit(r).tokens, 4 * SEQUENCE);
    assert_int_equal(r->fake[2].leases[0].lease, whole.lease);
    assert_int_equal(r->fake[2].leases[0].generation, whole.generation);
    assert_int_equal(r->fake[2].leases[0].start, whole.start + 12);
    assert_int_equal(r->fake[2].leases[0].count, 4);
}

/* All that it claims lies before what is left of the lease: nothing of the rest may go with it. */
static void a_shorter_claim_that_is_all_spent_takes_nothing_of_the_rest(void **state) {
    struct rig *r = *state;
    start_fragments(r, 2, 2);
    ask(r, &r->fake[2], 16);
    be_ready_in(r, &r->fake[2], 0, 12);
    be_ready_in(r, &r->fake[2], 1, 8);
    for (uint32_t f = 0; f < 2; f++) be_ready_in(r, &r->fake[3], f, 8);
    commit_in(r, 0);
    commit_in(r, 1);
    assert_int_equal(last_commit(r).tokens, 0);
    assert_int_equal(r->fake[2].leases[0].count, 4);
    assert_int_equal(look(r).samples_spent, 20);
}

/* It froze before it heard of the other fragment's commit: no fault of its own. */
static void a_claim_that_crossed_another_fragments_commit_is_good(void **state) {
    struct rig *r = *state;
    start_fragments(r, 2, 2);
    struct fake *f = &r->fake[2];
    ask(r, f, 12);
    claim_in(f, 1, 12); /* frozen now, said later */
    be_ready_in(r, f, 0, 8);
    be_ready_in(r, &r->fake[3], 0, 8);
    commit_in(r, 0);
    say_ready_in(r, f, 1);
    assert_false(f->reset);
    be_ready_in(r, &r->fake[3], 1, 8);
    assert_int_equal(f->of[1].contributor[0].weight, 12);
    commit_in(r, 1);
    assert_int_equal(look(r).samples_spent, 8 + 8 + 4 + 8);
    load(r); /* what was spent stays known as long as it may be claimed */
    for (int i = 1; i <= 3; i++) dial(r, &r->fake[i]), hello(r, &r->fake[i]);
    be_ready_in(r, f, 0, 8);
    assert_false(f->reset);
}

/* A whole claim can be spent by others' rounds before it arrives: it weighs, and spends nothing. */
static void a_contribution_whose_claims_are_all_spent_counts(void **state) {
    struct rig *r = *state;
    start_fragments(r, 2, 2);
    struct fake *f = &r->fake[2];
    ask(r, f, 8);
    claim_in(f, 1, 8);
    be_ready_in(r, f, 0, 8);
    be_ready_in(r, &r->fake[3], 0, 8);
    commit_in(r, 0);
    say_ready_in(r, f, 1);
    assert_false(f->reset);
    r->fake[3].of[1].claim_count = 0; /* this one knows, and claims nothing */
    r->fake[3].of[1].samples = 8;
    say_ready_in(r, &r->fake[3], 1);
    assert_false(r->fake[3].reset);
    assert_int_equal(f->of[1].contributors, 2);
    assert_int_equal(f->of[1].contributor[0].weight, 8);
    assert_int_equal(f->of[1].contributor[1].weight, 8);
}

/* Only what this member's own commits spent may lie before its lease. */
static void spent_samples_of_others_cannot_be_claimed(void **state) {
    struct rig *r = *state;
    start_fragments(r, 2, 2);
    struct fake *f = &r->fake[2], *other = &r->fake[3];
    be_ready_in(r, f, 0, 8);
    be_ready_in(r, other, 0, 8);
    struct msg_lease of_f = f->of[0].claims[0], of_other = other->of[0].claims[0];
    commit_in(r, 0);
    f->of[1].claims[0] = of_other;
    f->of[1].claim_count = 1;
    say_ready_in(r, f, 1);
    assert_true(f->reset);
    f->reset = false;
    f->of[1].claims[0] = of_f;
    f->of[1].claims[0].generation++;
    say_ready_in(r, f, 1);
    assert_true(f->reset);
    f->reset = false;
    ask(r, f, 8);
    f->of[1].claims[0] = f->leases[0]; /* with the samples before it, which nobody leased to it */
    f->of[1].claims[0].start--;
    f->of[1].claims[0].count++;
    say_ready_in(r, f, 1);
    assert_true(f->reset);
}

/* Who says that more samples are in it than were ever given to it weighs what it was given. */
static void inflated_samples_weigh_what_the_leases_say(void **state) {
    struct rig *r = *state;
    start_fragments(r, 2, 2);
    struct fake *liar = &r->fake[2];
    liar->of[0].samples = liar->of[1].samples = 1u << 30;
    for (uint32_t f = 0; f < 2; f++)
        for (int i = 2; i <= 3; i++) be_ready_in(r, &r->fake[i], f, 8);
    assert_int_equal(liar->of[0].contributor[0].weight, 8);
    commit_in(r, 0);
    assert_int_equal(liar->of[1].contributor[0].weight, 8);
    commit_in(r, 1);
    be_ready_in(r, liar, 0, 8); /* nor does anything add up over rounds */
    be_ready_in(r, &r->fake[3], 0, 8);
    assert_int_equal(liar->of[0].contributor[0].weight, 8);
}

static void a_contribution_of_no_samples_is_refused(void **state) {
    struct rig *r = *state;
    start_fragments(r, 2, 2);
    struct fake *f = &r->fake[2];
    f->of[0].samples = 100;
    f->of[0].claim_count = 0;
    say_ready_in(r, f, 0);
    assert_true(f->reset);
    f->reset = false;
    ask(r, f, 8);
    claim_in(f, 0, 8);
    struct msg_ready msg = ready_in(r, f, 0);
    msg.samples = 0;
    say(r, f, MSG_READY, 0, &msg);
    assert_true(f->reset);
}

/* The weight of a contribution must not depend on whether we died meanwhile. */
static void weights_follow_from_the_ledger_alone(void **state) {
    struct rig *r = *state;
    start_fragments(r, 2, 2);
    for (int i = 2; i <= 3; i++) be_ready_in(r, &r->fake[i], 0, 8);
    commit_in(r, 0);
    load(r);
    for (int i = 1; i <= 3; i++) dial(r, &r->fake[i]), hello(r, &r->fake[i]);
    for (int i = 2; i <= 3; i++) {
        r->fake[i].of[1].samples = 100;
        r->fake[i].of[1].claim_count = 0;
        say_ready_in(r, &r->fake[i], 1);
        assert_false(r->fake[i].reset);
    }
    assert_int_equal(r->fake[2].of[1].contributor[0].weight, 8);
}

/* As long as one plan names it, nobody knows whether its samples are spent. */
static void leases_of_a_lost_member_go_back_when_no_plan_names_it(void **state) {
    struct rig *r = *state;
    start_fragments(r, 2, 3);
    struct fake *lost = &r->fake[4];
    for (uint32_t f = 0; f < 2; f++)
        for (int i = 2; i <= 4; i++) be_ready_in(r, &r->fake[i], f, 8);
    uint64_t start = lost->leases[0].start;
    uint64_t free_before = look(r).samples_free;
    say(r, lost, MSG_LEAVE, 0, &(struct msg_leave){0});
    pass(r, 500);
    for (uint32_t f = 0; f < 2; f++) { /* it arrived nowhere */
        assert_int_equal(look(r).samples_free, free_before);
        struct fake *by[] = {fake_by_id(r, r->fake[2].of[f].shard.aggregator),
                             fake_by_id(r, r->fake[2].of[f].shard.holder)};
        struct report rep;
        for (int i = 0; i < 2; i++) {
            report_in(by[i], f, 0, &rep);
            proto_set_del(rep.set, 2);
            rep.summed[0].weight -= 8;
            say(r, by[i], MSG_SHARD_REPORT, by[i]->of[f].plan, &rep.msg);
        }
    }
    assert_int_equal(look(r).commits, 2);
    assert_int_equal(look(r).samples_spent, 16);
    assert_int_equal(look(r).samples_free, free_before + 8);
    ask(r, &r->fake[2], 8);
    assert_int_equal(r->fake[2].leases[0].start, start);
}

/* An older copy of the store must never give an id again that members still know. */
static void ids_of_a_term_are_above_those_of_all_before(void **state) {
    struct rig *r = *state;
    start_with(r, 2);
    ask(r, &r->fake[2], 8);
    assert_true(r->fake[2].leases[0].lease >= r->term << 24);
    load(r);
    for (int i = 1; i <= 3; i++) dial(r, &r->fake[i]), hello(r, &r->fake[i]);
    ask(r, &r->fake[3], 8);
    assert_true(r->fake[3].leases[0].lease >= r->term << 24);
}

/* The entry takes spent prefixes off a member's leases; the list that follows is judged by that. */
static void the_ledger_is_sent_before_the_leases(void **state) {
    struct rig *r = *state;
    start_reducing(r, 2);
    report(r, &r->fake[1]);
    report(r, holder(r));
    assert_true(place(r, CORE_ACT_SEND_LEDGER, -1) < place(r, CORE_ACT_SEND, MSG_LEASES));
    assert_true(place(r, CORE_ACT_SEND, MSG_LEASES) < r->out.count);
    dial(r, &r->fake[2]);
    struct msg_hello msg = hello_of(&r->fake[2]);
    say(r, &r->fake[2], MSG_HELLO, 0, &msg);
    assert_true(place(r, CORE_ACT_SEND_LEDGER, -1) < place(r, CORE_ACT_SEND, MSG_LEASES));
}

/* What two contributions claim is claimed once: else a member with many fragments starves. */
static void the_allowance_counts_a_claimed_sample_once(void **state) {
    struct rig *r = *state;
    start_fragments(r, 3, 2);
    struct fake *f = &r->fake[2];
    ask(r, f, 1000);
    assert_int_equal(f->leases[0].count, 32);
    for (uint32_t i = 0; i < 3; i++) {
        claim_in(f, i, 8 + 4 * i);
        say_ready_in(r, f, i);
    }
    ask(r, f, 1000);
    assert_int_equal(f->leases[1].count, 16); /* the furthest claim's */
}

int main(void) {
    const struct CMUnitTest tests[] = {
        T(a_lease_is_durable_before_it_is_sent),
        T(lease_ask_spam_is_bounded),
        T(a_returned_lease_is_of_the_next_generation_and_the_old_claim_is_refused),
        T(who_comes_back_gets_its_samples_again),
        T(samples_of_who_is_away_are_handed_out_last),
        T(a_claim_must_be_a_prefix_of_a_held_lease),
        T(a_sample_in_two_contributions_is_spent_by_the_first_commit),
        T(a_later_contribution_spends_only_the_rest),
        T(a_shorter_claim_that_is_all_spent_takes_nothing_of_the_rest),
        T(a_claim_that_crossed_another_fragments_commit_is_good),
        T(a_contribution_whose_claims_are_all_spent_counts),
        T(spent_samples_of_others_cannot_be_claimed),
        T(inflated_samples_weigh_what_the_leases_say),
        T(a_contribution_of_no_samples_is_refused),
        T(weights_follow_from_the_ledger_alone),
        T(leases_of_a_lost_member_go_back_when_no_plan_names_it),
        T(ids_of_a_term_are_above_those_of_all_before),
        T(the_ledger_is_sent_before_the_leases),
        T(the_allowance_counts_a_claimed_sample_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
