/* test_core_audit.c - the coordinator's core: chunks are summed again, accusations looked into, and who was wrong put aside. */
#include "tests/test_core.h"

/* The one audit under way, as who is to sum was told. */
static struct fake *auditor(struct rig *r, struct msg_audit *out) {
    for (uint32_t i = 1; i <= MEMBERS; i++) {
        const struct core_action *a = sent(r, &r->fake[i], MSG_AUDIT);
        if (!a) continue;
        *out = *(const struct msg_audit *)a->msg; /* its set goes with the next step */
        return fake_by_id(r, out->auditor);
    }
    return NULL;
}

static void say_audited(struct rig *r, struct fake *f, const struct msg_audit *a, uint64_t plan,
                        const struct digest *leaf, uint32_t culprit) {
    struct msg_audit_report msg = {.fragment = a->fragment,
                                   .round = a->round,
                                   .chunk = a->chunk,
                                   .complete = 1,
                                   .leaf = *leaf,
                                   .culprit = culprit};
    say(r, f, MSG_AUDIT_REPORT, plan, &msg);
}

/* Own node, five trainers, `sums` has the largest uplink; everybody was ready, a plan is out. */
static void start_audited(struct rig *r, uint32_t audits, uint32_t sums) {
    r->outer.audits = audits;
    start_with(r, 5);
    for (int i = 2; i <= 6; i++) {
        r->fake[1].rates[r->fake[1].rate_count++] =
            (struct msg_rate){r->fake[i].id, i == (int)sums ? 9000 : 1000, 1000};
    }
    if (sums == 1) r->fake[2].rates[r->fake[2].rate_count++] = (struct msg_rate){r->fake[1].id, 9000, 1000};
    pass(r, 200);
    for (int i = 2; i <= 6; i++) be_ready(r, &r->fake[i], 8);
    assert_int_equal(r->fake[2].shard.aggregator, r->fake[sums].id);
}

/* Both reports, equal, with the leaf of `bad` (CHUNKS: none) not what it should be. */
static void report_with(struct rig *r, uint32_t bad) {
    struct fake *by[] = {fake_by_id(r, r->fake[2].shard.aggregator), holder(r)};
    for (int i = 0; i < 2; i++) {
        struct report rep;
        report_of(by[i], &rep);
        if (bad < CHUNKS) rep.results[bad].digest = digest_of_number("forged", bad, 0);
        say(r, by[i], MSG_SHARD_REPORT, by[i]->plan, &rep.msg);
    }
}

static struct digest right_leaf(struct rig *r, uint32_t chunk) {
    return result_leaf(&r->fake[2], 0, chunk);
}

/* ---- audits --------------------------------------------------------------------------------- */

static void a_round_commits_when_the_audit_finds_the_same(void **state) {
    struct rig *r = *state;
    start_audited(r, 1, 3);
    report_with(r, CHUNKS);
    assert_int_equal(look(r).commits, 0);
    assert_string_equal(fragment(r, 0).phase, "audit");
    struct msg_audit a;
    struct fake *f = auditor(r, &a);
    assert_ptr_equal(f, &r->fake[1]); /* our own node sums nothing here */
    assert_int_equal(a.set.data[0], 0x1f);
    for (int i = 2; i <= 6; i++) { /* contributors know where to send their chunk */
        const struct msg_audit *m = sent(r, &r->fake[i], MSG_AUDIT)->msg;
        assert_int_equal(m->address_count, 1);
        assert_int_equal(m->address[0].port, r->fake[1].port);
    }
    struct digest leaf = right_leaf(r, a.chunk);
    say_audited(r, f, &a, r->fake[2].plan, &leaf, 0);
    assert_int_equal(look(r).commits, 1);
    assert_int_equal(look(r).audits, 1);
    assert_int_equal(look(r).audits_failed, 0);
}

static void as_many_chunks_are_drawn_as_the_run_says(void **state) {
    struct rig *r = *state;
    start_audited(r, 4, 3);
    report_with(r, CHUNKS);
    uint32_t drawn = 0;
    uint8_t seen[CHUNKS] = {0};
    for (uint32_t i = 0; i < r->out.count; i++) {
        const struct core_action *a = &r->out.list[i];
        if (a->type != CORE_ACT_SEND || a->message != MSG_AUDIT || a->conn != r->fake[1].conn)
            continue;
        const struct msg_audit *m = a->msg;
        assert_false(seen[m->chunk]);
        seen[m->chunk] = 1;
        drawn++;
    }
    assert_int_equal(drawn, 4);
    assert_int_equal(look(r).commits, 0);
    for (uint32_t i = 0; i < CHUNKS; i++) {
        struct msg_audit a = {.chunk = i};
        struct digest leaf = right_leaf(r, i);
        if (seen[i]) say_audited(r, &r->fake[1], &a, r->fake[2].plan, &leaf, 0);
    }
    assert_int_equal(look(r).commits, 1);
}

/* Its own signed report proves it; the round goes on without it, and its samples go to others. */
static void our_own_nodes_finding_puts_a_wrong_aggregator_into_quarantine(void **state) {
    struct rig *r = *state;
    start_audited(r, CHUNKS, 3);
    struct fake *wrong = &r->fake[3];
    report_with(r, 5);
    struct msg_audit a = {.chunk = 5};
    struct digest leaf = right_leaf(r, 5);
    uint64_t plan = wrong->plan;
    say_audited(r, &r->fake[1], &a, plan, &leaf, 0);
    assert_int_equal(look(r).quarantines, 1);
    assert_true(member(r, wrong).quarantined);
    assert_int_equal(look(r).commits, 0);
    assert_true(r->fake[2].plan > plan);
    assert_int_equal(r->fake[2].contributors, 4);
    for (uint32_t i = 0; i < r->fake[2].shard_count; i++) {
        assert_int_not_equal(r->fake[2].shards[i].aggregator, wrong->id);
        assert_int_not_equal(r->fake[2].shards[i].holder, wrong->id);
    }
    assert_true(place(r, CORE_ACT_PERSIST, -1) < place(r, CORE_ACT_SEND_LEDGER, -1));
    assert_int_equal(wrong->lease_count, 0);
    be_ready(r, wrong, 8); /* it gets no leases, and is no contributor */
    assert_int_equal(wrong->lease_count, 0);
    assert_true(wrong->reset);
}

/* A reader of the ledger can check the proof without us. */
static void the_quarantine_entry_holds_the_signed_report(void **state) {
    struct rig *r = *state;
    start_audited(r, CHUNKS, 3);
    report_with(r, 5);
    struct msg_audit a = {.chunk = 5};
    struct digest leaf = right_leaf(r, 5);
    say_audited(r, &r->fake[1], &a, r->fake[3].plan, &leaf, 0);
    const struct core_action *p = action(r, CORE_ACT_PERSIST);
    struct msg_entry e = {0};
    struct msg_quarantine q = {0};
    assert_int_equal(
        proto_decode(p->writes[0].value, p->writes[0].value_length, RECORD_entry, &e, NULL), 0);
    assert_int_equal(e.kind, LEDGER_QUARANTINE);
    assert_int_equal(proto_decode(e.body.data, e.body.length, RECORD_quarantine, &q, NULL), 0);
    assert_int_equal(q.member, r->fake[3].id);
    assert_int_equal(q.kind, MSG_SHARD_REPORT);
    assert_true(proto_record_verify(&r->fake[3].key, "shard_report", &r->run, e.term, q.proof.data,
                                    q.proof.length));
    proto_decoded_release(RECORD_quarantine, &q);
    proto_decoded_release(RECORD_entry, &e);
}

/* Where our own node sums, an auditor is a member, whose word alone condemns nobody. */
static void two_auditors_that_agree_are_enough(void **state) {
    struct rig *r = *state;
    start_audited(r, 1, 1);
    report_with(r, CHUNKS);
    struct msg_audit a, b;
    uint64_t plan = r->fake[2].plan;
    struct fake *first = auditor(r, &a);
    assert_ptr_not_equal(first, &r->fake[1]);
    assert_ptr_not_equal(first, holder(r));
    struct digest other = root_at(77);
    say_audited(r, first, &a, plan, &other, 0);
    assert_int_equal(look(r).quarantines, 0);
    struct fake *second = auditor(r, &b);
    assert_non_null(second);
    assert_ptr_not_equal(second, first);
    assert_int_equal(b.chunk, a.chunk);
    say_audited(r, second, &b, plan, &other, 0);
    assert_int_equal(look(r).quarantines, 1);
    assert_true(member(r, &r->fake[1]).quarantined);
}

static void an_auditor_that_stands_alone_is_avoided_and_the_round_commits(void **state) {
    struct rig *r = *state;
    start_audited(r, 1, 1);
    report_with(r, CHUNKS);
    struct msg_audit a, b;
    uint64_t plan = r->fake[2].plan;
    struct fake *first = auditor(r, &a);
    struct digest forged = root_at(77), right = right_leaf(r, a.chunk);
    say_audited(r, first, &a, plan, &forged, 0);
    struct fake *second = auditor(r, &b);
    say_audited(r, second, &b, plan, &right, 0);
    assert_int_equal(look(r).commits, 1);
    assert_int_equal(look(r).quarantines, 0);
    for (int round = 0; round < 4; round++) { /* it judges no more */
        for (int i = 2; i <= 6; i++) be_ready(r, &r->fake[i], 8);
        report_with(r, CHUNKS);
        struct fake *next = auditor(r, &a);
        assert_ptr_not_equal(next, first);
        right = right_leaf(r, a.chunk);
        say_audited(r, next, &a, r->fake[2].plan, &right, 0);
    }
    assert_int_equal(look(r).commits, 5);
}

static void two_auditors_that_find_different_things_condemn_nobody(void **state) {
    struct rig *r = *state;
    start_audited(r, 1, 1);
    report_with(r, CHUNKS);
    struct msg_audit a, b;
    uint64_t plan = r->fake[2].plan;
    struct fake *first = auditor(r, &a);
    struct digest one = root_at(77), two = root_at(78);
    say_audited(r, first, &a, plan, &one, 0);
    say_audited(r, auditor(r, &b), &b, plan, &two, 0);
    assert_int_equal(look(r).quarantines, 0);
    assert_int_equal(look(r).commits, 0);
    assert_true(look(r).plan > plan); /* others sum it */
}

static void what_an_auditor_found_wrong_does_not_commit_when_the_second_is_silent(void **state) {
    struct rig *r = *state;
    start_audited(r, 1, 1);
    report_with(r, CHUNKS);
    struct msg_audit a, b;
    uint64_t plan = r->fake[2].plan;
    struct digest other = root_at(77);
    say_audited(r, auditor(r, &a), &a, plan, &other, 0);
    assert_non_null(auditor(r, &b));
    pass(r, 2100);
    assert_int_equal(look(r).quarantines, 0);
    assert_int_equal(look(r).commits, 0);
    assert_true(look(r).plan > plan);
    assert_string_equal(look(r).phase, "reduce");
}

/* Nobody judges himself, nor what he did not have to compute. */
static void reports_of_those_who_were_not_asked_are_void(void **state) {
    struct rig *r = *state;
    start_audited(r, 1, 3);
    report_with(r, CHUNKS);
    struct msg_audit a;
    auditor(r, &a);
    struct digest right = right_leaf(r, a.chunk), forged = root_at(77);
    say_audited(r, &r->fake[3], &a, r->fake[2].plan, &right, 0);
    assert_int_equal(look(r).commits, 0);
    say_audited(r, &r->fake[4], &a, r->fake[2].plan, &right, 0);
    say_audited(r, &r->fake[1], &a, r->fake[2].plan + 1, &forged, 0);
    struct msg_audit other = a;
    other.chunk = (a.chunk + 1) % CHUNKS;
    say_audited(r, &r->fake[1], &other, r->fake[2].plan, &forged, 0);
    assert_int_equal(look(r).commits, 0);
    assert_int_equal(look(r).quarantines, 0);
    say_audited(r, &r->fake[1], &a, r->fake[2].plan, &forged, 99); /* a culprit who is nobody */
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_PROTOCOL);
    assert_int_equal(look(r).quarantines, 0);
}

static void an_audit_that_gets_no_answer_holds_nobody_up(void **state) {
    struct rig *r = *state;
    start_audited(r, 1, 3);
    report_with(r, CHUNKS);
    pass(r, 1900);
    assert_int_equal(look(r).commits, 0);
    pass(r, 200);
    assert_int_equal(look(r).commits, 1);
}

static void an_incomplete_audit_is_void(void **state) {
    struct rig *r = *state;
    start_audited(r, 1, 3);
    report_with(r, CHUNKS);
    struct msg_audit a;
    auditor(r, &a);
    say(r, &r->fake[1], MSG_AUDIT_REPORT, r->fake[2].plan,
        &(struct msg_audit_report){.chunk = a.chunk});
    assert_int_equal(look(r).commits, 1);
}

/* ---- reports that differ -------------------------------------------------------------------- */

static void report_unequal(struct rig *r, uint32_t of_aggregator, uint32_t of_holder) {
    struct fake *by[] = {fake_by_id(r, r->fake[2].shard.aggregator), holder(r)};
    uint32_t bad[] = {of_aggregator, of_holder};
    for (int i = 0; i < 2; i++) {
        struct report rep;
        report_of(by[i], &rep);
        if (bad[i] < CHUNKS) rep.results[bad[i]].digest = root_at(5);
        say(r, by[i], MSG_SHARD_REPORT, by[i]->plan, &rep.msg);
    }
}

static void unequal_reports_are_settled_by_summing_the_chunk_again(void **state) {
    struct rig *r = *state;
    start_audited(r, 0, 3);
    report_unequal(r, 7, CHUNKS);
    struct msg_audit a;
    struct fake *f = auditor(r, &a);
    assert_ptr_equal(f, &r->fake[1]);
    assert_int_equal(a.chunk, 7);
    struct digest right = right_leaf(r, 7);
    say_audited(r, f, &a, r->fake[2].plan, &right, 0);
    assert_true(member(r, &r->fake[3]).quarantined);
    assert_int_equal(look(r).commits, 0);
    assert_string_equal(fragment(r, 0).phase, "reduce");
}

/* It may have been told the wrong leaf by the aggregator, so its word proves nothing against it. */
static void a_holder_that_reports_another_leaf_is_not_condemned_for_it(void **state) {
    struct rig *r = *state;
    start_audited(r, 0, 3);
    struct fake *second = holder(r);
    uint64_t plan = second->plan;
    report_unequal(r, CHUNKS, 7);
    struct msg_audit a;
    struct fake *f = auditor(r, &a);
    struct digest right = right_leaf(r, 7);
    say_audited(r, f, &a, plan, &right, 0);
    assert_int_equal(look(r).quarantines, 0);
    assert_true(r->fake[2].plan > plan);
    assert_int_not_equal(r->fake[2].shard.aggregator, r->fake[3].id);
    assert_int_not_equal(r->fake[2].shard.holder, second->id);
}

static void unequal_reports_without_an_auditor_go_to_others(void **state) {
    struct rig *r = *state;
    start_audited(r, 0, 3);
    for (int i = 1; i <= 6; i++) /* nobody else can be dialled any more */
        if (i != 3) {
            r->fake[i].port = 0;
            dial(r, &r->fake[i]);
            hello(r, &r->fake[i]);
        }
    uint64_t plan = r->fake[3].plan;
    report_unequal(r, 7, CHUNKS);
    assert_true(r->fake[2].plan > plan);
    assert_int_equal(look(r).quarantines, 0);
}

/* ---- accusations ---------------------------------------------------------------------------- */

static void accuse(struct rig *r, struct fake *f, uint32_t chunk, uint32_t member) {
    struct msg_accuse msg = {.round = f->round,
                             .chunk = chunk,
                             .member = member,
                             .reason = proto_str("a value is not finite")};
    say(r, f, MSG_ACCUSE, f->plan, &msg);
}

static void a_contributor_that_sends_what_it_did_not_announce_is_proven_by_its_ready(void **state) {
    struct rig *r = *state;
    start_audited(r, 0, 3);
    struct fake *wrong = &r->fake[5];
    uint64_t plan = wrong->plan;
    accuse(r, &r->fake[3], 4, wrong->id);
    struct msg_audit a;
    struct fake *f = auditor(r, &a);
    assert_ptr_equal(f, &r->fake[1]);
    assert_int_equal(a.chunk, 4);
    assert_non_null(sent(r, wrong, MSG_AUDIT));
    assert_null(sent(r, &r->fake[2], MSG_AUDIT)); /* only its bytes are asked for */
    struct digest zero = {{0}};
    say_audited(r, f, &a, plan, &zero, wrong->id);
    assert_true(member(r, wrong).quarantined);
    assert_int_equal(r->fake[2].plan, plan); /* the round goes on without it */
    const struct core_action *p = action(r, CORE_ACT_PERSIST);
    struct msg_entry e = {0};
    struct msg_quarantine q = {0};
    assert_int_equal(
        proto_decode(p->writes[0].value, p->writes[0].value_length, RECORD_entry, &e, NULL), 0);
    assert_int_equal(proto_decode(e.body.data, e.body.length, RECORD_quarantine, &q, NULL), 0);
    assert_int_equal(q.kind, MSG_READY);
    assert_true(
        proto_record_verify(&wrong->key, "ready", &r->run, e.term, q.proof.data, q.proof.length));
    proto_decoded_release(RECORD_quarantine, &q);
    proto_decoded_release(RECORD_entry, &e);
}

static void accusations_without_ground_cost_the_accuser_its_place(void **state) {
    struct rig *r = *state;
    start_audited(r, 0, 3);
    struct fake *liar = &r->fake[3];
    for (uint32_t i = 0; i < 5; i++) {
        struct msg_audit a;
        if (i == 4) { /* so many a round; each holds it up */
            accuse(r, liar, i, r->fake[5].id);
            assert_null(sent(r, NULL, MSG_AUDIT));
            commit_in(r, 0);
            for (int j = 2; j <= 6; j++) be_ready(r, &r->fake[j], 8);
        }
        accuse(r, liar, i, r->fake[5].id);
        struct fake *f = auditor(r, &a);
        assert_non_null(f);
        accuse(r, liar, i + 1, r->fake[6].id); /* one at a time */
        assert_null(sent(r, NULL, MSG_AUDIT));
        struct digest fine = root_at(1);
        say_audited(r, f, &a, liar->plan, &fine, 0);
    }
    assert_int_equal(look(r).quarantines, 0);
    assert_true(logged(r, CORE_WARNING, "without ground"));
    accuse(r, liar, 9, r->fake[5].id);
    assert_null(sent(r, NULL, MSG_AUDIT));
    commit_in(r, 0);
    for (int i = 2; i <= 6; i++) be_ready(r, &r->fake[i], 8);
    assert_int_not_equal(r->fake[2].shard.aggregator, liar->id); /* though it is the fastest */
}

/* Only who sums the chunk has seen the bytes, and only contributors have sent any. */
static void accusations_by_those_who_do_not_sum_are_ignored(void **state) {
    struct rig *r = *state;
    start_audited(r, 0, 3);
    accuse(r, &r->fake[4], 4, r->fake[5].id);
    accuse(r, &r->fake[3], 4, r->fake[1].id); /* no contributor */
    accuse(r, &r->fake[3], 4, 1000);
    accuse(r, &r->fake[3], CHUNKS, r->fake[5].id);
    accuse(r, &r->fake[3], 4, r->fake[3].id);
    r->fake[3].plan++;
    accuse(r, &r->fake[3], 4, r->fake[5].id);
    assert_int_equal(look(r).audits, 0);
}

/* One member who audits must not be able to have another expelled. */
static void a_members_word_against_a_contributor_needs_a_second_one(void **state) {
    struct rig *r = *state;
    start_audited(r, 0, 1);
    struct fake *accused = &r->fake[5];
    uint64_t plan = accused->plan;
    accuse(r, &r->fake[1], 4, accused->id);
    struct msg_audit a, b;
    struct fake *first = auditor(r, &a);
    struct digest zero = {{0}}, fine = root_at(3);
    say_audited(r, first, &a, plan, &zero, accused->id);
    struct fake *second = auditor(r, &b);
    assert_non_null(second);
    assert_ptr_not_equal(second, first);
    assert_ptr_not_equal(second, accused);
    assert_int_equal(look(r).quarantines, 0);
    say_audited(r, second, &b, plan, &fine, 0);
    assert_int_equal(look(r).quarantines, 0);
    commit_in(r, 0);
}

/* ---- quarantine and release ----------------------------------------------------------------- */

static void a_quarantine_outlives_us_and_is_lifted_by_the_operator(void **state) {
    struct rig *r = *state;
    start_audited(r, CHUNKS, 3);
    report_with(r, 5);
    struct msg_audit a = {.chunk = 5};
    struct digest leaf = right_leaf(r, 5);
    struct fake *f = &r->fake[3];
    say_audited(r, &r->fake[1], &a, f->plan, &leaf, 0);
    load(r);
    for (int i = 1; i <= 3; i++) dial(r, &r->fake[i]), hello(r, &r->fake[i]);
    assert_true(member(r, f).quarantined);
    assert_int_not_equal(f->conn, 0); /* it may look on */
    ask(r, f, 8);
    assert_int_equal(f->lease_count, 0);
    step(r, &(struct core_event){.type = CORE_EV_RELEASE, .member = f->id, .text = "repaired"});
    assert_true(place(r, CORE_ACT_PERSIST, -1) < place(r, CORE_ACT_SEND_LEDGER, -1));
    assert_false(member(r, f).quarantined);
    ask(r, f, 8);
    assert_int_equal(f->lease_count, 1);
    step(r, &(struct core_event){.type = CORE_EV_RELEASE, .member = f->id, .text = "again"});
    assert_null(action(r, CORE_ACT_PERSIST));
    load(r);
    assert_false(member(r, f).quarantined);
}

/* We die between the entry and the leases' rows: nobody could ever train on its samples again. */
static void leases_of_the_quarantined_go_back_at_a_restart_too(void **state) {
    struct rig *r = *state;
    start_audited(r, CHUNKS, 3);
    ask(r, &r->fake[3], 8);
    report_with(r, 5);
    struct msg_audit a = {.chunk = 5};
    struct digest leaf = right_leaf(r, 5);
    uint64_t free_before = look(r).samples_free;
    r->die_in = r->steps + 1;
    r->die_after = 1; /* as far as the entry */
    say_audited(r, &r->fake[1], &a, r->fake[3].plan, &leaf, 0);
    assert_int_equal(r->out.list[0].type, CORE_ACT_PERSIST);
    load(r);
    assert_true(member(r, &r->fake[3]).quarantined);
    assert_int_equal(look(r).samples_free, free_before + 16);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        T(a_round_commits_when_the_audit_finds_the_same),
        T(as_many_chunks_are_drawn_as_the_run_says),
        T(our_own_nodes_finding_puts_a_wrong_aggregator_into_quarantine),
        T(the_quarantine_entry_holds_the_signed_report),
        T(two_auditors_that_agree_are_enough),
        T(an_auditor_that_stands_alone_is_avoided_and_the_round_commits),
        T(two_auditors_that_find_different_things_condemn_nobody),
        T(what_an_auditor_found_wrong_does_not_commit_when_the_second_is_silent),
        T(reports_of_those_who_were_not_asked_are_void),
        T(an_audit_that_gets_no_answer_holds_nobody_up),
        T(an_incomplete_audit_is_void),
        T(unequal_reports_are_settled_by_summing_the_chunk_again),
        T(a_holder_that_reports_another_leaf_is_not_condemned_for_it),
        T(unequal_reports_without_an_auditor_go_to_others),
        T(a_contributor_that_sends_what_it_did_not_announce_is_proven_by_its_ready),
        T(accusations_without_ground_cost_the_accuser_its_place),
        T(accusations_by_those_who_do_not_sum_are_ignored),
        T(a_members_word_against_a_contributor_needs_a_second_one),
        T(a_quarantine_outlives_us_and_is_lifted_by_the_operator),
        T(leases_of_the_quarantined_go_back_at_a_restart_too),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
