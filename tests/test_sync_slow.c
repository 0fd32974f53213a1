/* test_sync_slow.c - contributors that send, but so slowly that a round would never end. Small chunks, so that
 * there are many of them. */
#define CHUNK 16
#include "tests/sync_rounds.h"

/* What member 3 sends is lost but for `chunks_allowed`; it asks what is missing and sends again. */
static void drip(struct rig *r, uint64_t for_ms, uint64_t every_ms, uint32_t chunks) {
    r->spoil = member_3_breaks_off;
    for (uint64_t end = r->now + for_ms, next = 0; r->now < end;) {
        if (r->now >= next) {
            chunks_allowed += chunks;
            next = r->now + every_ms;
        }
        for (uint32_t id = 1; id <= 3; id++)
            say(r, id, MSG_HEARTBEAT_ACK, 0, &(struct msg_heartbeat_ack){0});
        pass(r, 100);
    }
}

static uint32_t summed_with(const struct rig *r, uint32_t weight) {
    const struct sent *s = last_sent(r, 1, MSG_SHARD_REPORT);
    const struct msg_shard_report *m = s && s->frame.plan == r->plan ? s->msg : NULL;
    uint32_t n = 0;
    for (uint32_t i = 0; m && i < m->summed_count; i++)
        if (m->summed[i].weight == weight) n += m->summed[i].chunks;
    return n;
}

/* One chunk in every silence is a sign of life, and would hold the round for a minute: it is left out of
 * what it has not sent, in no more than the time that a slow but honest one may take. */
static void a_dripping_contributor_does_not_hold_the_round(void **state) {
    struct rig *r = *state;
    three_ready(r);
    chunks_allowed = 2;
    r->spoil = member_3_breaks_off;
    say_plan(r, &THREE);
    drip(r, 4000, 900, 1);
    assert_true(summed_with(r, 12 + 17) >= 2); /* what it did send counts */
    assert_true(summed_with(r, 12) >= CHUNKS - 8);
    assert_int_equal(summed_with(r, 12 + 17) + summed_with(r, 12), CHUNKS);
}

/* First fast, so that it looks well on the whole, then one at a time. */
static void a_contributor_that_slows_down_is_seen(void **state) {
    struct rig *r = *state;
    three_ready(r);
    chunks_allowed = CHUNKS / 2;
    r->spoil = member_3_breaks_off;
    say_plan(r, &THREE);
    drip(r, 4000, 900, 1);
    assert_true(summed_with(r, 12 + 17) >= CHUNKS / 2);
    assert_true(summed_with(r, 12) >= CHUNKS / 2 - 8);
}

/* The same chunk again and again is no sign of life at all. */
static bool repeats(struct rig *r, struct sent *m) {
    static struct msg_chunk first;
    (void)r;
    if (m->from != 3 || m->frame.type != MSG_CHUNK) return true;
    if (!first.data.length && ((struct msg_chunk *)m->msg)->chunk == 0) first = *(struct msg_chunk *)m->msg;
    m->msg = &first;
    return first.data.length > 0;
}

static void a_chunk_sent_again_is_no_sign_of_life(void **state) {
    struct rig *r = *state;
    three_ready(r);
    r->spoil = repeats;
    say_plan(r, &THREE);
    for (int i = 0; i < 14; i++) {
        for (uint32_t id = 1; id <= 3; id++)
            say(r, id, MSG_HEARTBEAT_ACK, 0, &(struct msg_heartbeat_ack){0});
        pass(r, 100);
    }
    assert_int_equal(summed_with(r, 12 + 17), 1);
    assert_int_equal(summed_with(r, 12), CHUNKS - 1);
}

/* Where the whole network is slow, a round must not lose everybody for ever: what came to nothing may take
 * twice the time at the next plan, as the coordinator also waits. */
static void every_plan_of_a_round_has_more_patience(void **state) {
    struct rig *r = *state;
    three_ready(r);
    for (int plan = 0; plan < 3; plan++) {
        chunks_allowed = 0;
        r->spoil = member_3_breaks_off;
        say_plan(r, &THREE);
        drip(r, 9000, 500, 5); /* seven seconds for all */
        assert_int_equal(summed_with(r, 12 + 17) == CHUNKS, plan == 2);
    }
}

int main(void) {
#define T(name) cmocka_unit_test_setup_teardown(name, rig_setup, rig_teardown)
    const struct CMUnitTest tests[] = {
        T(a_dripping_contributor_does_not_hold_the_round),
        T(a_contributor_that_slows_down_is_seen),
        T(a_chunk_sent_again_is_no_sign_of_life),
        T(every_plan_of_a_round_has_more_patience),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
