/* test_core_runs.c - the coordinator's core: whole runs, with a coordinator that dies at every point. */
#include "tests/test_core.h"

/* ---- whole runs ----------------------------------------------------------------------------- */

/* Its parts in the fragment's plan, once. True if there was something to say. */
static bool act_on_plan(struct rig *r, struct fake *f, uint32_t fragment) {
    struct side *s = &f->of[fragment];
    bool has_part = false;
    for (uint32_t i = 0; i < s->shard_count; i++)
        has_part |= s->shards[i].aggregator == f->id || s->shards[i].holder == f->id;
    if (!s->has_plan || !has_part || s->reported == (r->term << 32 | s->plan)) return false;
    s->reported = r->term << 32 | s->plan;
    report_all(r, f, fragment);
    return true;
}

/* One thing that a member does now, if there is something to do. */
static void act(struct rig *r, struct fake *f) {
    if (f->said_goodbye_to) return;
    if (!f->conn) {
        dial(r, f);
        if (f->conn && !f->id) enrol(r, f);
        if (f->conn) hello(r, f);
        for (uint32_t i = 0; i < r->outer.fragments; i++)
            if (f->conn && f->of[i].ready) say_ready_in(r, f, i);
        return;
    }
    for (uint32_t i = 0; i < r->outer.fragments; i++)
        if (act_on_plan(r, f, i)) return;
    if (f->state && f->told != f->state) { /* new since it last told its root */
        f->told = f->state;
        say_root(r, f);
        return;
    }
    for (uint32_t i = 0; i < r->outer.fragments && !f->aggregate_only; i++) {
        uint32_t next = (uint32_t)(r->steps + i) % r->outer.fragments;
        if (f->of[next].ready) continue;
        if (!f->lease_count) ask(r, f, 12);
        if (!f->lease_count || !f->conn) return;
        claim_in(f, next, 5 + f->id);
        say_ready_in(r, f, next);
        return;
    }
}

struct outcome {
    uint64_t steps, commits, tokens;
};

static void everything_the_same_after_reload(struct rig *r) {
    struct core_view a = look(r), b;
    struct core_member_view ma[MEMBERS], mb;
    uint32_t members = core_member_count(r->core);
    for (uint32_t i = 0; i < members; i++) core_member_look(r->core, i, r->now, &ma[i]);
    load(r);
    b = look(r);
    assert_int_equal(a.head_index, b.head_index);
    assert_true(digest_equal(&a.head_digest, &b.head_digest));
    assert_int_equal(a.round, b.round);
    assert_int_equal(a.tokens_committed, b.tokens_committed);
    assert_int_equal(a.samples_free, b.samples_free);
    assert_int_equal(a.samples_spent, b.samples_spent);
    assert_int_equal(core_member_count(r->core), members);
    for (uint32_t i = 0; i < members; i++) {
        core_member_look(r->core, i, r->now, &mb);
        assert_memory_equal(&ma[i].key, &mb.key, sizeof mb.key);
        assert_int_equal(ma[i].tokens_committed, mb.tokens_committed);
        assert_int_equal(ma[i].aggregate_only, mb.aggregate_only);
    }
}

/* Four members work until the run is complete. The coordinator dies in step `die_in` after
 * `actions` of its actions (UINT32_MAX: all of them), and is restarted from its rows. */
static struct outcome whole_run(struct rig *r, uint64_t die_in, uint32_t actions) {
    bool all = false;
    r->corpus.samples = 60;
    r->die_in = die_in;
    r->die_after = actions;
    rig_start(r);
    for (int turns = 0; turns < 1000 && !all; turns++) {
        all = true;
        for (uint32_t i = 1; i <= 4; i++) {
            act(r, &r->fake[i]);
            all &= r->fake[i].said_goodbye_to || i == 1;
        }
        pass(r, 100);
        if (r->dead && actions == UINT32_MAX)
            everything_the_same_after_reload(r);
        else if (r->dead)
            load(r);
    }
    return (struct outcome){r->steps, look(r).round, look(r).tokens_committed};
}

/* From the ledger alone: which samples were spent, each at most once. */
static uint64_t samples_in_ledger(const struct rig *r) {
    uint8_t spent[256] = {0};
    uint64_t n = 0;
    for (uint32_t i = 0; i < r->row_count; i++) {
        struct msg_entry e = {0};
        struct msg_commit k = {0};
        if (r->rows[i].table != CORE_LEDGER) continue;
        assert_int_equal(proto_decode(r->rows[i].value, r->rows[i].length, RECORD_entry, &e, NULL),
                         0);
        if (e.kind == LEDGER_COMMIT) {
            assert_int_equal(proto_decode(e.body.data, e.body.length, RECORD_commit, &k, NULL), 0);
            for (uint32_t j = 0; j < k.spent_count; j++)
                for (uint64_t s = k.spent[j].start; s < k.spent[j].start + k.spent[j].count;
                     s++, n++) {
                    assert_int_equal(spent[s], 0);
                    spent[s] = 1;
                }
            proto_decoded_release(RECORD_commit, &k);
        }
        proto_decoded_release(RECORD_entry, &e);
    }
    return n;
}

static void check_finished(struct rig *r, const struct outcome *o) {
    assert_string_equal(look(r).phase, "complete");
    assert_int_equal(samples_in_ledger(r), 60);
    assert_int_equal(look(r).samples_spent, 60);
    assert_int_equal(o->tokens, 60 * SEQUENCE);
    uint64_t of_members = 0;
    for (uint32_t i = 0; i < core_member_count(r->core); i++) {
        struct core_member_view m;
        core_member_look(r->core, i, r->now, &m);
        of_members += m.tokens_committed;
    }
    assert_int_equal(of_members, o->tokens);
    for (uint32_t i = 2; i <= 4; i++) assert_true(r->fake[i].said_goodbye_to);
}

static void a_run_completes_with_every_sample_spent_exactly_once(void **state) {
    struct rig *r = *state;
    r->genesis.checkpoint_url = proto_str("");
    struct outcome o = whole_run(r, 0, 0);
    check_finished(r, &o);
    assert_true(o.commits >= 3);
}

/* Who was away at the end still wants the model: the own node stays and gives it. */
static void a_late_comer_gets_the_last_state_and_then_goes(void **state) {
    struct rig *r = *state;
    r->genesis.checkpoint_url = proto_str("");
    whole_run(r, 0, 0);
    struct fake *late = &r->fake[5];
    dial(r, late);
    enrol(r, late);
    say(r, late, MSG_HELLO, 0, &(struct msg_hello){.trains = 1, .port = late->port});
    const struct msg_hello_ack *ack = sent(r, late, MSG_HELLO_ACK)->msg;
    assert_int_equal(ack->donors_count, 1);
    assert_int_equal(ack->donors[0].member, r->fake[1].id);
    pass(r, 1000);
    assert_false(late->said_goodbye_to);
    late->state = r->fake[1].state;
    say_root(r, late);
    assert_true(late->said_goodbye_to);
}

static void a_run_ends_when_it_has_its_tokens(void **state) {
    struct rig *r = *state;
    r->genesis.checkpoint_url = proto_str("");
    r->inner.total_tokens = 20 * SEQUENCE;
    whole_run(r, 0, 0);
    assert_string_equal(look(r).phase, "complete");
    assert_in_range(samples_in_ledger(r), 20, 59);
    for (uint32_t i = 2; i <= 4; i++) assert_true(r->fake[i].said_goodbye_to);
}

/* kill -9 in every step, after some or all of its actions: every sample is still spent once. */
static void a_restart_at_every_point_loses_nothing(void **state) {
    struct rig *r = *state;
    r->genesis.checkpoint_url = proto_str("");
    uint64_t steps = whole_run(r, 0, 0).steps, runs = 0;
    for (uint64_t at = 2; at < steps; at++) {
        static const uint32_t after[] = {UINT32_MAX, 0, 1, 2, 3, 5};
        for (size_t i = 0; i < sizeof after / sizeof *after; i++, runs++) {
            void *again = r;
            teardown(&again);
            setup(state);
            r = *state;
            r->genesis.checkpoint_url = proto_str("");
            struct outcome o = whole_run(r, at, after[i]);
            check_finished(r, &o);
        }
    }
    assert_true(runs > 100);
}

/* The same with three fragments, whose contributions share samples, and four shards each. */
static void a_restart_at_every_point_of_a_fragmented_run_loses_nothing(void **state) {
    struct rig *r = *state;
    uint64_t steps = 0, runs = 0;
    for (uint64_t at = 0; at <= steps; at += at ? 5 : 2) {
        static const uint32_t after[] = {UINT32_MAX, 0, 2, 4};
        for (size_t i = 0; i < sizeof after / sizeof *after; i++, runs++) {
            void *again = r;
            teardown(&again);
            setup(state);
            r = *state;
            r->genesis.checkpoint_url = proto_str("");
            r->outer.fragments = 3;
            r->outer.shard_chunks = 1;
            struct outcome o = whole_run(r, at, after[i]);
            check_finished(r, &o);
            if (!at) steps = o.steps;
        }
    }
    assert_true(runs > 100);
}

/* Samples that one fragment's commit spent last still have to reach the other fragments. */
static void the_last_rounds_take_what_is_ready_in_every_fragment(void **state) {
    struct rig *r = *state;
    r->genesis.checkpoint_url = proto_str("");
    r->corpus.samples = 16;
    r->outer.fragments = 3;
    start_with(r, 2);
    for (uint32_t f = 0; f < 2; f++)
        for (int i = 2; i <= 3; i++) be_ready_in(r, &r->fake[i], f, 8);
    be_ready_in(r, &r->fake[2], 2, 8); /* no quorum */
    assert_string_equal(fragment(r, 2).phase, "train");
    commit_in(r, 0);
    assert_string_equal(look(r).phase, "reduce");
    assert_int_equal(fragment(r, 2).contributors, 1); /* nobody is waited for any more */
    commit_in(r, 1);
    assert_string_not_equal(look(r).phase, "complete");
    commit_in(r, 2);
    assert_string_equal(look(r).phase, "complete");
    assert_int_equal(look(r).commits, 3);
    assert_int_equal(look(r).tokens_committed, 16 * SEQUENCE);
}

/* Each fragment has one last round at most: the run ends. */
static void no_round_begins_after_the_last_ones(void **state) {
    struct rig *r = *state;
    r->genesis.checkpoint_url = proto_str("");
    r->inner.total_tokens = 16 * SEQUENCE;
    r->outer.fragments = 2;
    start_with(r, 2);
    for (uint32_t f = 0; f < 2; f++)
        for (int i = 2; i <= 3; i++) be_ready_in(r, &r->fake[i], f, 8);
    commit_in(r, 1);
    ask(r, &r->fake[2], 8);
    assert_int_equal(r->fake[2].lease_count, 0);
    r->fake[2].of[1].claim_count = 0;
    r->fake[2].of[1].samples = 8;
    say_ready_in(r, &r->fake[2], 1);
    assert_int_equal(fragment(r, 1).ready, 0);
    commit_in(r, 0);
    assert_string_equal(look(r).phase, "complete");
}

/* The data is out, each trainer has died since it announced, and what is behind its claims waits for them: each
 * fragment would wait for the other's contributor for ever (simulator, seed 61495). */
static void claims_without_trainers_wait_for_nobody_at_the_end(void **state) {
    struct rig *r = *state;
    r->corpus.samples = 32;
    r->outer.fragments = 2;
    start_with(r, 2);
    for (uint32_t f = 0; f < 2; f++) {
        ask(r, &r->fake[2 + f], 16);
        be_ready_in(r, &r->fake[2 + f], f, 12); /* of a lease of 16 */
    }
    for (uint32_t f = 0; f < 2; f++) assert_string_equal(fragment(r, f).phase, "train");
    pass(r, 2 * r->outer.silence_ms_max);
    for (uint32_t f = 0; f < 2; f++) {
        assert_string_equal(fragment(r, f).phase, "reduce");
        assert_int_equal(fragment(r, f).contributors, 1);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        T(a_run_completes_with_every_sample_spent_exactly_once),
        T(a_late_comer_gets_the_last_state_and_then_goes),
        T(a_run_ends_when_it_has_its_tokens),
        T(a_restart_at_every_point_loses_nothing),
        T(a_restart_at_every_point_of_a_fragmented_run_loses_nothing),
        T(the_last_rounds_take_what_is_ready_in_every_fragment),
        T(no_round_begins_after_the_last_ones),
        T(claims_without_trainers_wait_for_nobody_at_the_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
