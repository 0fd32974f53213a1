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

int main(void) {
    const struct CMUnitTest tests[] = {
        T(a_lease_is_durable_before_it_is_sent),
        T(lease_ask_spam_is_bounded),
        T(a_returned_lease_is_of_the_next_generation_and_the_old_claim_is_refused),
        T(a_claim_must_be_a_prefix_of_a_held_lease),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
