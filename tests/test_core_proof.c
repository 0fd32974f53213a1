/* test_core_proof.c - the coordinator's core: whoever reads the ledger can check for himself why a member was put
 * aside. */
#include "tests/test_core.h"

/* Own node and three trainers; member 2 sums. Its report is not what the own node finds for any chunk. */
static void a_wrong_report(struct rig *r) {
    r->outer.audits = 1;
    start_with(r, 3);
    for (int i = 2; i <= 4; i++)
        r->fake[1].rates[r->fake[1].rate_count++] = (struct msg_rate){r->fake[i].id, i == 2 ? 9000 : 1000, 1000};
    pass(r, 200);
    for (int i = 2; i <= 4; i++) be_ready(r, &r->fake[i], 8);
    assert_int_equal(r->fake[2].shard.aggregator, r->fake[2].id);
    report(r, &r->fake[2]);
    report(r, holder(r));
}

/* The last entry of the ledger, as a reader meets it. */
static struct msg_quarantine quarantine_of(const struct rig *r, struct msg_entry *e) {
    struct msg_quarantine q = {0};
    const struct row *last = NULL;
    for (uint32_t i = 0; i < r->row_count; i++)
        if (r->rows[i].table == CORE_LEDGER && (!last || r->rows[i].key > last->key)) last = &r->rows[i];
    assert_int_equal(proto_decode(last->value, last->length, RECORD_entry, e, NULL), 0);
    assert_int_equal(e->kind, LEDGER_QUARANTINE);
    assert_int_equal(proto_decode(e->body.data, e->body.length, RECORD_quarantine, &q, NULL), 0);
    return q;
}

/* The term that the proof was signed under is not always the entry's: it stands beside the proof, and without it
 * every ledger with a quarantine was refused by its readers. */
static void a_quarantine_says_under_which_term_its_proof_was_signed(void **state) {
    struct rig *r = *state;
    a_wrong_report(r);
    const struct core_action *sends = sent(r, &r->fake[1], MSG_AUDIT);
    assert_non_null(sends);
    struct msg_audit a = *(const struct msg_audit *)sends->msg;
    struct digest found = digest_of_number("found", a.chunk, 0);
    struct msg_audit_report msg = {.fragment = a.fragment, .round = a.round, .chunk = a.chunk, .complete = 1, .leaf = found};
    say(r, &r->fake[1], MSG_AUDIT_REPORT, r->fake[2].plan, &msg);
    assert_true(member(r, &r->fake[2]).quarantined);
    struct msg_entry e = {0};
    struct msg_quarantine q = quarantine_of(r, &e);
    assert_int_equal(q.kind, MSG_SHARD_REPORT);
    assert_true(proto_record_verify(&r->fake[2].key, "shard_report", &r->run, q.proof_term, q.proof.data, q.proof.length));
    proto_decoded_release(RECORD_quarantine, &q);
    proto_decoded_release(RECORD_entry, &e);
}

int main(void) {
    const struct CMUnitTest tests[] = {T(a_quarantine_says_under_which_term_its_proof_was_signed)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
