/* test_audit.c - a ledger whose chain and signatures hold can still lie; `ledger verify` must see it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/audit.h"
#include "coordinator/core.h"

#define SEQUENCE 10u
#define SAMPLES 100u

struct ledger {
    struct identity root, online, third;
    struct digest run, head;
    uint64_t next;
    struct audit audit;
};

/* Write the next entry as a coordinator would, and give it to the audit. */
static int append(struct ledger *l, enum ledger_kind kind, enum proto_record record, const void *body,
                  struct err *err) {
    const struct identity *signer = kind <= LEDGER_DELEGATION ? &l->root : &l->online;
    struct proto_buffer b;
    proto_buffer_init(&b, PROTO_BLOB_BYTES_MAX);
    if (core_entry_encode(&b, l->next, &l->head, 0, kind, record, body, err)) fail_msg("%s", err->msg);
    struct msg_signed_entry e = { .bytes = { b.data, (uint32_t)b.length } };
    proto_sign(signer, "ledger", &l->run, 0, b.data, b.length, &e.signature);
    l->head = digest_of(b.data, b.length);
    l->next++;
    int result = audit_take(&l->audit, &e, err);
    proto_buffer_release(&b);
    return result;
}

/* spent: what the genesis says is spent before the run begins; count 0: nothing. */
static void begin_after(struct ledger *l, struct msg_range spent) {
    struct msg_model model = { .layers = 1, .sequence = SEQUENCE };
    struct msg_inner inner = { .batch = 1 };
    struct msg_outer outer = { .inner_steps = 1, .fragments = 2 };
    struct msg_corpus corpus = { .samples = SAMPLES };
    struct msg_genesis g = { .version = 1, .model = &model, .model_count = 1, .inner = &inner,
                             .inner_count = 1, .outer = &outer, .outer_count = 1, .corpus = &corpus,
                             .corpus_count = 1, .init_spent = &spent,
                             .init_spent_count = spent.count > 0 };
    struct msg_delegation d;
    struct proto_buffer b;
    struct err err;
    memset(l, 0, sizeof *l);
    identity_create(&l->root);
    identity_create(&l->online);
    identity_create(&l->third);
    g.root_key = l->root.key;
    proto_buffer_init(&b, PROTO_BLOB_BYTES_MAX);
    assert_int_equal(proto_encode(&b, RECORD_genesis, &g, &err), 0);
    l->run = digest_of(b.data, b.length);
    proto_buffer_release(&b);
    audit_init(&l->audit, &l->run);
    d = (struct msg_delegation){ .run = l->run, .key = l->online.key, .number = 1 };
    if (append(l, LEDGER_GENESIS, RECORD_genesis, &g, &err) ||
        append(l, LEDGER_DELEGATION, RECORD_delegation, &d, &err))
        fail_msg("%s", err.msg);
    for (uint32_t m = 1; m <= 3; m++) {
        struct msg_enrolment e = { .member = m, .key = {{(uint8_t)m}}, .name = proto_str("m") };
        if (m == 3) e.key = l->third.key;
        if (append(l, LEDGER_ENROLMENT, RECORD_enrolment, &e, &err)) fail_msg("%s", err.msg);
    }
}

static void begin(struct ledger *l) { begin_after(l, (struct msg_range){0}); }

/* A commit of members 1 and 2, which spend samples 0-3 and 4-9; 3 chunks have both, 1 has only 1. */
struct commit {
    struct msg_commit m;
    struct msg_contributor contributors[2];
    struct msg_shard shard;
    struct msg_summed summed[2];
    struct msg_spend spent[2];
};
static const uint8_t both[] = { 3 }, first[] = { 1 };

static void honest(struct commit *c) {
    memset(c, 0, sizeof *c);
    c->contributors[0] = (struct msg_contributor){ .member = 1, .weight = 4, .tokens = 40 };
    c->contributors[1] = (struct msg_contributor){ .member = 2, .weight = 6, .tokens = 60 };
    c->shard = (struct msg_shard){ .count = 4, .aggregator = 3, .holder = 1 };
    c->summed[0] = (struct msg_summed){ .chunks = 3, .set = { both, 1 }, .weight = 10 };
    c->summed[1] = (struct msg_summed){ .chunks = 1, .set = { first, 1 }, .weight = 4 };
    c->spent[0] = (struct msg_spend){ .member = 1, .lease = 1, .start = 0, .count = 4 };
    c->spent[1] = (struct msg_spend){ .member = 2, .lease = 2, .start = 4, .count = 6 };
    c->m = (struct msg_commit){
        .tokens = 100, .tokens_committed = 100, .contributors = c->contributors,
        .contributors_count = 2, .shards = &c->shard, .shards_count = 1, .summed = c->summed,
        .summed_count = 2, .spent = c->spent, .spent_count = 2,
    };
}

static void assert_fault(struct commit *c, const char *says) {
    struct ledger l;
    struct err err;
    begin(&l);
    if (append(&l, LEDGER_COMMIT, RECORD_commit, &c->m, &err) == 0) fail_msg("taken; expected: %s", says);
    assert_int_equal(err.code, ERR_CORRUPT);
    if (strcmp(err.msg, says) != 0) fail_msg("\"%s\", expected \"%s\"", err.msg, says);
    audit_release(&l.audit);
}

static void an_honest_ledger_passes_and_is_counted(void **state) {
    struct ledger l;
    struct commit c;
    struct err err;
    (void)state;
    begin(&l);
    honest(&c);
    if (append(&l, LEDGER_COMMIT, RECORD_commit, &c.m, &err)) fail_msg("%s", err.msg);
    c.m.round = 1;
    c.m.base_index = 5;
    c.m.tokens_committed = 200;
    c.spent[0].start = 10;
    c.spent[1].start = 20;
    if (append(&l, LEDGER_COMMIT, RECORD_commit, &c.m, &err)) fail_msg("%s", err.msg);
    assert_int_equal(l.audit.entries, 7);
    assert_int_equal(l.audit.commits, 2);
    assert_int_equal(l.audit.tokens, 200);
    assert_int_equal(l.audit.samples_spent, 20);
    assert_int_equal(l.audit.member[0].tokens, 80);
    assert_int_equal(l.audit.member[1].tokens, 120);
    assert_int_equal(l.audit.member[2].tokens, 0);
    audit_release(&l.audit);
}

static void a_sample_spent_twice_is_found(void **state) {
    struct ledger l;
    struct commit c;
    struct err err;
    (void)state;
    honest(&c);
    c.spent[1].start = 3;
    assert_fault(&c, "ledger entry 5: member 2 spends sample 3 a second time");
    begin(&l); /* and across commits */
    honest(&c);
    assert_int_equal(append(&l, LEDGER_COMMIT, RECORD_commit, &c.m, &err), 0);
    c.m.round = 1;
    c.m.base_index = 5;
    c.m.tokens_committed = 200;
    c.spent[0].start = 50;
    c.spent[1].start = 9;
    assert_int_equal(append(&l, LEDGER_COMMIT, RECORD_commit, &c.m, &err), -1);
    assert_string_equal(err.msg, "ledger entry 6: member 2 spends sample 9 a second time");
    audit_release(&l.audit);
}

/* A run that goes on with another's data: what that one spent is spent, and its tokens count. */
static void a_sample_that_the_run_before_spent_is_found(void **state) {
    struct ledger l;
    struct commit c;
    struct err err;
    (void)state;
    honest(&c);
    begin_after(&l, (struct msg_range){9, 5});
    assert_int_equal(append(&l, LEDGER_COMMIT, RECORD_commit, &c.m, &err), -1);
    assert_non_null(strstr(err.msg, "member 2 spends sample 9 a second time"));
    audit_release(&l.audit);
    begin_after(&l, (struct msg_range){10, 5});
    c.m.tokens_committed = 150;
    if (append(&l, LEDGER_COMMIT, RECORD_commit, &c.m, &err)) fail_msg("%s", err.msg);
    assert_int_equal(l.audit.samples_spent, 15);
    assert_int_equal(l.audit.tokens, 150);
    audit_release(&l.audit);
}

static void samples_outside_the_corpus_are_found(void **state) {
    struct commit c;
    (void)state;
    honest(&c);
    c.spent[1].start = 95;
    assert_fault(&c, "ledger entry 5: member 2 spends samples 95 to 101 of 100");
    honest(&c);
    c.spent[1].start = UINT64_MAX - 2; /* start + count wraps around */
    assert_fault(&c, "ledger entry 5: member 2 spends samples 18446744073709551613 to 3 of 100");
}

static void tokens_that_do_not_add_up_are_found(void **state) {
    struct commit c;
    (void)state;
    honest(&c);
    c.m.tokens = c.m.tokens_committed = 110;
    assert_fault(&c, "ledger entry 5: says 110 tokens, 110 in all; its spent samples have 100, 100 in all");
    honest(&c);
    c.m.tokens_committed = 101;
    assert_fault(&c, "ledger entry 5: says 100 tokens, 101 in all; its spent samples have 100, 100 in all");
}

/* A contributor that was dropped everywhere keeps its samples: they are not in the model. */
static void who_was_not_summed_spends_nothing(void **state) {
    struct commit c;
    (void)state;
    honest(&c);
    c.summed[0].set.data = first;
    c.summed[0].weight = 4;
    assert_fault(&c, "ledger entry 5: member 2 spends samples and was not summed");
    honest(&c);
    c.spent[1].member = 3;
    assert_fault(&c, "ledger entry 5: member 3 spends samples and was not summed");
}

static void weights_that_do_not_add_up_are_found(void **state) {
    static const uint8_t stranger[] = { 5 }, nobody[] = { 0 };
    struct commit c;
    (void)state;
    honest(&c);
    c.summed[1].weight = 10; /* the divisor was not corrected after a dropout */
    assert_fault(&c, "ledger entry 5: chunks with weight 10, their contributors have 4");
    honest(&c);
    c.summed[1] = (struct msg_summed){ .chunks = 1, .set = { nobody, 1 }, .weight = 0 };
    assert_fault(&c, "ledger entry 5: chunks with weight 0, their contributors have 0");
    honest(&c);
    c.summed[1].set.data = stranger;
    assert_fault(&c, "ledger entry 5: sums a contributor it does not name");
    honest(&c);
    c.contributors[1].member = 1;
    assert_fault(&c, "ledger entry 5: contributor 1 stands there twice");
    honest(&c);
    c.contributors[1].member = 9;
    assert_fault(&c, "ledger entry 5: contributor 9 is no member");
}

static void rounds_that_do_not_follow_are_found(void **state) {
    struct commit c;
    (void)state;
    honest(&c);
    c.m.round = 1;
    assert_fault(&c, "ledger entry 5: commits round 1 of fragment 0, round 0 is next");
    honest(&c);
    c.m.base_index = 4;
    assert_fault(&c, "ledger entry 5: is based on entry 4, the last commit of fragment 0 is entry 0");
    honest(&c);
    c.shard.holder = 3;
    assert_fault(&c, "ledger entry 5: shard 0 was held by member 3 alone");
}

/* Fragments count their rounds for themselves, on their own commits. */
static void fragments_go_side_by_side(void **state) {
    struct ledger l;
    struct commit c;
    struct err err;
    (void)state;
    begin(&l);
    honest(&c);
    assert_int_equal(append(&l, LEDGER_COMMIT, RECORD_commit, &c.m, &err), 0);
    c.m.fragment = 1;
    c.m.tokens = 40; /* member 2's samples were spent by the commit before */
    c.m.tokens_committed = 140;
    c.m.spent_count = 1;
    c.spent[0].start = 10;
    if (append(&l, LEDGER_COMMIT, RECORD_commit, &c.m, &err)) fail_msg("%s", err.msg);
    c.m.fragment = 2;
    assert_int_equal(append(&l, LEDGER_COMMIT, RECORD_commit, &c.m, &err), -1);
    assert_string_equal(err.msg, "ledger entry 7: commits fragment 2 of 2");
    audit_release(&l.audit);
}

/* What it is put out for bears its own signature; the plan in work goes on, and it takes no part from
 * then on. A ledger in which it stands as contributor of that one plan was refused once. */
static void quarantine_needs_the_members_signature(void **state) {
    struct msg_shard_report report = { .round = 3 };
    struct msg_quarantine q = { .member = 3, .reason = proto_str("wrong sum"), .kind = MSG_SHARD_REPORT,
                                .proof_term = 7 };
    struct proto_buffer b;
    struct ledger l;
    struct commit c;
    struct err err;
    (void)state;
    begin(&l);
    assert_int_equal(proto_record_sign(&l.third, "shard_report", &l.run, 7, RECORD_shard_report, &report,
                                       &report.signature, &err), 0);
    proto_buffer_init(&b, 1000);
    assert_int_equal(proto_encode(&b, RECORD_shard_report, &report, &err), 0);
    q.proof = (struct proto_bytes){ b.data, (uint32_t)b.length };
    q.member = 1;
    assert_int_equal(append(&l, LEDGER_QUARANTINE, RECORD_quarantine, &q, &err), -1);
    assert_non_null(strstr(err.msg, "is not signed by it"));
    audit_release(&l.audit);
    begin(&l); /* new keys, so a new signature */
    assert_int_equal(proto_record_sign(&l.third, "shard_report", &l.run, 7, RECORD_shard_report, &report,
                                       &report.signature, &err), 0);
    b.length = 0;
    assert_int_equal(proto_encode(&b, RECORD_shard_report, &report, &err), 0);
    q.proof = (struct proto_bytes){ b.data, (uint32_t)b.length };
    q.member = 3;
    if (append(&l, LEDGER_QUARANTINE, RECORD_quarantine, &q, &err)) fail_msg("%s", err.msg);
    honest(&c);
    c.contributors[1].member = c.spent[1].member = 3;
    if (append(&l, LEDGER_COMMIT, RECORD_commit, &c.m, &err)) fail_msg("%s", err.msg);
    c.m.round = 1;
    c.m.base_index = 6;
    c.m.tokens_committed = 200;
    c.spent[0].start = 10;
    c.spent[1].start = 20;
    assert_int_equal(append(&l, LEDGER_COMMIT, RECORD_commit, &c.m, &err), -1);
    assert_string_equal(err.msg, "ledger entry 7: contributor 3 is in quarantine");
    proto_buffer_release(&b);
    audit_release(&l.audit);
}

static void a_rewind_frees_what_came_after_its_checkpoint(void **state) {
    struct msg_checkpoint k = { .at_index = 5, .tokens_committed = 100 };
    struct msg_rewind r = { .to = &k, .to_count = 1, .reason = proto_str("lost") };
    struct ledger l;
    struct commit c;
    struct err err;
    (void)state;
    begin(&l);
    honest(&c);
    assert_int_equal(append(&l, LEDGER_COMMIT, RECORD_commit, &c.m, &err), 0);
    c.m.round = 1;
    c.m.base_index = 5;
    c.m.tokens_committed = 200;
    c.spent[0].start = 10;
    c.spent[1].start = 20;
    assert_int_equal(append(&l, LEDGER_COMMIT, RECORD_commit, &c.m, &err), 0);
    if (append(&l, LEDGER_REWIND, RECORD_rewind, &r, &err)) fail_msg("%s", err.msg);
    assert_int_equal(l.audit.samples_spent, 10);
    c.m.round = 2; /* the same samples again, on the rewind */
    c.m.base_index = 7;
    if (append(&l, LEDGER_COMMIT, RECORD_commit, &c.m, &err)) fail_msg("%s", err.msg);
    assert_int_equal(l.audit.tokens, 200);
    audit_release(&l.audit);
}

static void a_key_that_enrols_twice_is_found(void **state) {
    struct msg_enrolment e = { .member = 4, .key = {{2}}, .name = proto_str("again") };
    struct ledger l;
    struct err err;
    (void)state;
    begin(&l);
    assert_int_equal(append(&l, LEDGER_ENROLMENT, RECORD_enrolment, &e, &err), -1);
    assert_string_equal(err.msg, "ledger entry 5: enrols the key of member 2 again");
    audit_release(&l.audit);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_honest_ledger_passes_and_is_counted),
        cmocka_unit_test(a_sample_spent_twice_is_found),
        cmocka_unit_test(a_sample_that_the_run_before_spent_is_found),
        cmocka_unit_test(samples_outside_the_corpus_are_found),
        cmocka_unit_test(tokens_that_do_not_add_up_are_found),
        cmocka_unit_test(who_was_not_summed_spends_nothing),
        cmocka_unit_test(weights_that_do_not_add_up_are_found),
        cmocka_unit_test(rounds_that_do_not_follow_are_found),
        cmocka_unit_test(a_key_that_enrols_twice_is_found),
        cmocka_unit_test(fragments_go_side_by_side),
        cmocka_unit_test(quarantine_needs_the_members_signature),
        cmocka_unit_test(a_rewind_frees_what_came_after_its_checkpoint),
    };
    struct err err;
    if (proto_init(&err)) return 1;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
