/* test_core_resum.c - the coordinator's core: committed results that nobody holds any more. */
#include "tests/test_core.h"

/* An aggregate-only pair held it, so that all contributors are still here. */
static void start_with_lost_pair(struct rig *r, uint64_t *index) {
    r->outer.shard_chunks = 100;
    r->fake[1].aggregate_only = false;
    rig_start(r);
    for (int i = 2; i <= 5; i++) join(r, &r->fake[i]);
    r->fake[7].aggregate_only = r->fake[8].aggregate_only = true;
    for (int i = 7; i <= 8; i++) join(r, &r->fake[i]);
    for (int i = 2; i <= 5; i++) { /* behind NAT, so that 7 sums; 8 is the one to hold */
        r->fake[i].port = 0;
        dial(r, &r->fake[i]);
        hello(r, &r->fake[i]);
    }
    for (int i = 2; i <= 5; i++) be_ready(r, &r->fake[i], 8);
    assert_int_equal(r->fake[2].shard.aggregator, r->fake[7].id);
    assert_int_equal(r->fake[2].shard.holder, r->fake[8].id);
    commit_in(r, 0);
    *index = look(r).head_index;
    for (int i = 2; i <= 3; i++) { /* reachable now, to sum in their place */
        r->fake[i].port = 7000;
        dial(r, &r->fake[i]);
        struct msg_hello msg = hello_of(&r->fake[i]);
        msg.state_index = 0;
        msg.state_root = root_at(0);
        say(r, &r->fake[i], MSG_HELLO, 0, &msg);
    }
    r->fake[7].muted = r->fake[8].muted = true;
}

static const struct core_action *wait_for_resum(struct rig *r, struct fake *f) {
    for (int i = 0; i < 60; i++) {
        for (int j = 1; j <= MEMBERS; j++)
            if (r->fake[j].conn && r->fake[j].session && !r->fake[j].muted) beat(r, &r->fake[j]);
        tick(r, 100);
        const struct core_action *a = sent(r, f, MSG_PLAN);
        if (a && ((const struct msg_plan *)a->msg)->resum) return a;
    }
    return NULL;
}

static void report_resum(struct rig *r, struct fake *f, const struct msg_shard *s, uint64_t plan,
                         uint8_t set) {
    struct msg_digest_item results[CHUNKS];
    struct msg_summed run = {s->count, {&set, 1}, 0};
    for (int bit = 0; bit < 4; bit++) run.weight += set >> bit & 1 ? 8 : 0;
    for (uint32_t i = 0; i < s->count; i++)
        results[i].digest = digest_of_number("result", 0, s->first + i);
    struct msg_shard_report msg = {.results = results,
                                   .results_count = s->count,
                                   .summed = &run,
                                   .summed_count = 1};
    say(r, f, MSG_SHARD_REPORT, plan, &msg);
}

static void the_lost_shards_go_to_others_under_a_plan_of_their_own(void **state) {
    struct rig *r = *state;
    uint64_t index;
    start_with_lost_pair(r, &index);
    const struct core_action *a = wait_for_resum(r, &r->fake[2]);
    assert_non_null(a);
    const struct msg_plan *p = a->msg;
    uint64_t plan = a->plan;
    assert_int_equal(p->resum, index);
    assert_int_equal(p->round, 0);
    assert_int_equal(p->contributors_count, 4);
    assert_int_equal(p->shards_count, 1);
    assert_int_equal(p->shards[0].count, CHUNKS);
    struct msg_shard s = p->shards[0];
    struct fake *first = fake_by_id(r, s.aggregator), *second = fake_by_id(r, s.holder);
    assert_int_not_equal(first->port, 0);
    for (int i = 2; i <= 5; i++) assert_non_null(sent(r, &r->fake[i], MSG_PLAN));
    report_resum(r, first, &s, plan, 0xf);
    assert_null(sent(r, NULL, MSG_HOLDERS));
    report_resum(r, second, &s, plan, 0xf);
    const struct core_action *h = sent(r, &r->fake[5], MSG_HOLDERS);
    assert_non_null(h);
    const struct msg_holders *holders = h->msg;
    assert_int_equal(holders->index, index);
    assert_true(holders->addresses_count >= 1);
    assert_int_equal(look(r).commits, 1); /* it was committed already */
    assert_null(wait_for_resum(r, &r->fake[2]));
}

/* No round comes after it, but nobody may go before it is applied (simulator, seed 56461). */
static void the_commit_that_completes_a_run_is_summed_again_too(void **state) {
    struct rig *r = *state;
    uint64_t index;
    r->inner.total_tokens = 4 * 8 * SEQUENCE;
    start_with_lost_pair(r, &index);
    assert_string_equal(look(r).phase, "complete");
    const struct core_action *a = wait_for_resum(r, &r->fake[2]);
    assert_non_null(a);
    assert_int_equal(((const struct msg_plan *)a->msg)->resum, index);
}

/* Whoever sums others than the commit names makes another result, under which nobody's leaves fit. */
static void a_resum_of_other_contributors_is_done_once_more(void **state) {
    struct rig *r = *state;
    uint64_t index;
    start_with_lost_pair(r, &index);
    const struct core_action *a = wait_for_resum(r, &r->fake[2]);
    struct msg_shard s = ((const struct msg_plan *)a->msg)->shards[0];
    uint64_t plan = a->plan;
    report_resum(r, fake_by_id(r, s.aggregator), &s, plan, 0x7);
    report_resum(r, fake_by_id(r, s.holder), &s, plan, 0x7);
    assert_null(sent(r, NULL, MSG_HOLDERS));
    a = wait_for_resum(r, &r->fake[2]);
    assert_non_null(a);
    assert_true(a->plan > plan);
}

/* They came back with older disks: as far as anybody can see they are here, and have nothing. */
static void results_that_nobody_gets_are_summed_again(void **state) {
    struct rig *r = *state;
    uint64_t index;
    start_with_lost_pair(r, &index);
    r->fake[7].muted = r->fake[8].muted = false;
    assert_null(wait_for_resum(r, &r->fake[2]));
    const struct core_action *a = NULL;
    for (int i = 0; i < 10 && !a; i++) a = wait_for_resum(r, &r->fake[2]);
    assert_non_null(a);
    assert_int_equal(((const struct msg_plan *)a->msg)->resum, index);
}

/* One live member that has applied the commit can give the whole state: nothing is lost. */
static void nothing_is_summed_again_where_a_member_has_the_state(void **state) {
    struct rig *r = *state;
    uint64_t index;
    start_with_lost_pair(r, &index);
    say_root(r, &r->fake[4]);
    assert_null(wait_for_resum(r, &r->fake[2]));
}

/* Without one contributor's bytes it cannot be done; the operator hears whose, and not ten times a
 * second. */
static void a_contributor_that_is_missed_is_named_each_minute(void **state) {
    struct rig *r = *state;
    uint64_t index;
    uint32_t told = 0, resumed = 0;
    char who[16];
    start_with_lost_pair(r, &index);
    r->fake[5].muted = true;
    snprintf(who, sizeof who, "members %u ", r->fake[5].id);
    for (int i = 0; i < 900; i++) {
        for (int j = 1; j <= MEMBERS; j++)
            if (r->fake[j].conn && r->fake[j].session && !r->fake[j].muted) beat(r, &r->fake[j]);
        tick(r, 100);
        told += logged(r, CORE_ERROR, "rewind") && logged(r, CORE_ERROR, who);
        resumed += sent(r, &r->fake[2], MSG_PLAN) != NULL;
    }
    assert_int_equal(resumed, 0);
    assert_int_equal(told, 2);
    r->fake[5].muted = false;
    dial(r, &r->fake[5]);
    struct msg_hello msg = hello_of(&r->fake[5]);
    msg.state_index = 0;
    msg.state_root = root_at(0);
    say(r, &r->fake[5], MSG_HELLO, 0, &msg);
    assert_non_null(wait_for_resum(r, &r->fake[2]));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        T(the_lost_shards_go_to_others_under_a_plan_of_their_own),
        T(the_commit_that_completes_a_run_is_summed_again_too),
        T(a_resum_of_other_contributors_is_done_once_more),
        T(results_that_nobody_gets_are_summed_again),
        T(nothing_is_summed_again_where_a_member_has_the_state),
        T(a_contributor_that_is_missed_is_named_each_minute),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
