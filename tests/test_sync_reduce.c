/* test_sync_reduce.c - shards of several aggregators, links that break in them, commits whose results
 * were lost and are summed again, audits and accusations, results passed from member to member,
 * members that nobody can dial. */
#include "tests/sync_rounds.h"

/* ---- plans of several shards -------------------------------------------------------------- */

struct cut {
    uint32_t contributor[MEMBERS], count;
    struct msg_shard shard[MEMBERS];
    uint32_t shards;
};

static uint32_t addresses_of(struct rig *r, struct msg_address *out) {
    uint32_t n = 0;
    for (uint32_t id = 1; id < MEMBERS; id++)
        if (!r->nat[id]) out[n++] = (struct msg_address){id, proto_str("10.0.0.1"), 7000 + id};
    return n;
}

static bool is_in(const struct cut *c, uint32_t id) {
    for (uint32_t i = 0; i < c->count; i++)
        if (c->contributor[i] == id) return true;
    for (uint32_t i = 0; i < c->shards; i++)
        if (c->shard[i].aggregator == id || c->shard[i].holder == id) return true;
    return false;
}

static uint32_t cut_contributors(struct rig *r, const struct cut *c, struct msg_contributor *out) {
    struct plan_spec spec = {.count = c->count};
    memcpy(spec.contributor, c->contributor, sizeof spec.contributor);
    make_contributors(r, &spec, out);
    return c->count;
}

/* extra: a member that is in no shard and gets the plan all the same; 0 = none. */
static void say_cut_to(struct rig *r, const struct cut *c, uint64_t resum, uint64_t round,
                       uint64_t base, uint32_t extra) {
    struct msg_contributor contributors[MEMBERS];
    struct msg_address addresses[MEMBERS];
    struct msg_plan plan = {.round = round, .base_index = base, .resum = resum,
                            .grid_exponent = GRID, .codec = r->outer.result_codec,
                            .contributors = contributors,
                            .shards = (struct msg_shard *)(uintptr_t)c->shard,
                            .shards_count = c->shards, .addresses = addresses};
    plan.contributors_count = cut_contributors(r, c, contributors);
    plan.addresses_count = addresses_of(r, addresses);
    r->plan++;
    for (uint32_t id = 1; id < MEMBERS; id++)
        if ((is_in(c, id) || id == extra) && r->node[id].connected)
            say(r, id, MSG_PLAN, r->plan, &plan);
    settle(r);
}

static void say_cut(struct rig *r, const struct cut *c) {
    say_cut_to(r, c, 0, r->rounds, r->base_index, 0);
}

/* The newest report of this member on this shard, under the newest plan; NULL = none. */
static const struct msg_shard_report *report_on(const struct rig *r, uint32_t id, uint32_t shard) {
    for (uint32_t i = r->sent_count; i-- > 0;) {
        const struct sent *s = &r->sent[i];
        const struct msg_shard_report *m = s->msg;
        if (s->from == id && s->frame.type == MSG_SHARD_REPORT && s->frame.plan == r->plan &&
            m->shard == shard)
            return m;
    }
    return NULL;
}

static void assert_reports_agree(const struct rig *r, const struct cut *c) {
    for (uint32_t i = 0; i < c->shards; i++) {
        const struct msg_shard_report *a = report_on(r, c->shard[i].aggregator, i),
                                      *b = report_on(r, c->shard[i].holder, i);
        if (!a || !b) fail_msg("shard %u: the %s did not report", i, a ? "holder" : "aggregator");
        assert_int_equal(a->results_count, c->shard[i].count);
        assert_int_equal(b->results_count, c->shard[i].count);
        assert_memory_equal(a->results, b->results, a->results_count * sizeof *a->results);
        assert_int_equal(a->summed_count, b->summed_count);
    }
}

/* All shards were reported twice: append the commit. Nobody is told. */
static void commit_cut(struct rig *r, const struct cut *c) {
    struct msg_contributor contributors[MEMBERS];
    struct msg_digest_item leaves[CHUNKS];
    struct msg_summed summed[CHUNKS];
    struct msg_spend spent[MEMBERS * 4];
    struct sync_view v = look(r, c->shard[0].aggregator);
    struct msg_commit body = {.round = r->rounds, .plan = r->plan, .base_index = r->base_index,
                              .state_index = v.state_index, .state_root = v.state_root,
                              .lr = 0.7f, .momentum = 0.9f, .codec = r->outer.result_codec,
                              .grid_exponent = GRID, .tokens_committed = 1000 * (r->rounds + 1),
                              .contributors = contributors,
                              .shards = (struct msg_shard *)(uintptr_t)c->shard,
                              .shards_count = c->shards, .summed = summed, .spent = spent};
    assert_reports_agree(r, c);
    body.contributors_count = cut_contributors(r, c, contributors);
    for (uint32_t i = 0; i < c->shards; i++) {
        const struct msg_shard_report *a = report_on(r, c->shard[i].aggregator, i);
        memcpy(leaves + c->shard[i].first, a->results, a->results_count * sizeof *leaves);
        for (uint32_t j = 0; j < a->summed_count; j++) summed[body.summed_count++] = a->summed[j];
    }
    for (uint32_t i = 0; i < c->count; i++)
        body.spent_count += spend_claim(r, c->contributor[i],
                                        &ready_of(r, c->contributor[i])->ranges[0],
                                        &spent[body.spent_count]);
    body.result_root = digest_tree_root(leaves, CHUNKS);
    r->base_index = r->base_of[0] = r->entries;
    r->rounds++;
    r->round_of[0]++;
    entry_add(r, LEDGER_COMMIT, encoded(RECORD_commit, &body));
}

static void announce_cut(struct rig *r, uint32_t id, uint64_t spent) {
    struct msg_address addresses[MEMBERS];
    struct msg_lease lease = lease_of(id, spent);
    struct msg_holders holders = {.index = r->base_index, .addresses = addresses};
    holders.addresses_count = addresses_of(r, addresses);
    say_ledger(r, id, r->entries - 1);
    if (spent) say(r, id, MSG_LEASES, 0, &(struct msg_leases){.leases = &lease, .leases_count = 1});
    say(r, id, MSG_HOLDERS, 0, &holders);
    settle(r);
}

/* Time in which the coordinator is heard. */
static void pass_awake(struct rig *r, uint64_t ms) {
    for (uint64_t end = r->now + ms; r->now < end;) {
        for (uint32_t id = 1; id < MEMBERS; id++)
            say(r, id, MSG_HEARTBEAT_ACK, 0, &(struct msg_heartbeat_ack){0});
        pass(r, 100);
    }
}

/* Member 1 aggregates only, 2, 3 and 4 train. */
static void four_ready(struct rig *r) {
    node_new(r, 1, false);
    for (uint32_t id = 2; id <= 4; id++) node_with_work(r, id);
    for (uint32_t id = 2; id <= 4; id++) train_round(r, id);
}

static const struct cut WHOLE = {{2, 3, 4}, 3, {{0, CHUNKS, 1, 2}}, 1};
/* Member 3 aggregates one shard, holds another, and contributes to all. */
static const struct cut SPREAD = {{2, 3, 4}, 3, {{0, 1, 2, 3}, {1, 2, 3, 4}, {3, 1, 4, 1}}, 3};

/* ---- several aggregators ------------------------------------------------------------------ */

/* The sum is exact, so who aggregates which part changes no bit of it. */
static void shards_of_many_give_the_bits_of_one(void **state) {
    struct rig *r = *state;
    struct expectation e;
    four_ready(r);
    say_cut(r, &WHOLE);
    commit_cut(r, &WHOLE);
    for (uint32_t id = 1; id <= 4; id++) announce_cut(r, id, id > 1 ? STEPS * BATCH : 0);
    state_now(r, 1, &e);
    void *other;
    assert_int_equal(rig_setup(&other), 0);
    struct rig *q = other;
    four_ready(q);
    say_cut(q, &SPREAD);
    assert_int_equal(count_sent(q, 3, MSG_CHUNK), 2); /* its own two chunks never travel */
    commit_cut(q, &SPREAD);
    for (uint32_t id = 1; id <= 4; id++) {
        announce_cut(q, id, id > 1 ? STEPS * BATCH : 0);
        assert_state(q, id, &e);
    }
    rig_teardown(&other);
}

/* One aggregator's link breaks in the middle: what it has stays, the rest comes, and to the other
 * aggregators nothing twice. */
static void a_broken_link_resumes_in_its_shard_alone(void **state) {
    struct rig *r = *state;
    four_ready(r);
    r->spoil = member_3_breaks_off;
    chunks_allowed = 1;
    say_cut(r, &SPREAD);
    r->spoil = NULL;
    uint32_t before = count_sent(r, 4, MSG_CHUNK);
    hang_up(r, 3, 2);
    hang_up(r, 3, 4);
    pass_awake(r, 600);
    assert_reports_agree(r, &SPREAD);
    assert_int_equal(count_sent(r, 3, MSG_CHUNK), 3); /* two, of which one was lost */
    assert_int_equal(count_sent(r, 4, MSG_CHUNK), before);
    for (uint32_t i = 0; i < 3; i++)
        assert_int_equal(report_on(r, SPREAD.shard[i].aggregator, i)->summed[0].weight, 12 + 17 + 22);
}

static bool chunks_from_2_to_3_are_lost(struct rig *r, struct sent *m) {
    (void)r;
    return m->from != 2 || m->to != 3 || m->frame.type != MSG_CHUNK;
}

/* An aggregator that holds another shard too may have that one first: its holder, who asked before, is shown the
 * leaves of both, or it could not take the results. */
static void a_holder_gets_the_leaves_of_a_shard_that_is_done_last(void **state) {
    struct rig *r = *state;
    four_ready(r);
    r->spoil = chunks_from_2_to_3_are_lost;
    say_cut(r, &SPREAD);
    r->spoil = NULL;
    assert_non_null(report_on(r, 3, 0));
    assert_null(report_on(r, 3, 1));
    uint32_t asked = count_sent(r, 4, MSG_RESULT_GET);
    say(r, 3, MSG_DROP, r->plan, &(struct msg_drop){.member = 2});
    settle(r);
    assert_non_null(report_on(r, 3, 1));
    assert_non_null(report_on(r, 4, 1));
    assert_int_equal(count_sent(r, 4, MSG_RESULT_GET), asked);
}

/* Its shard goes to another under a new number; what the dead one had summed is void. */
static void a_dead_aggregators_shard_is_summed_by_another(void **state) {
    struct rig *r = *state;
    struct cut moved = SPREAD;
    four_ready(r);
    r->spoil = member_3_chunks_wait;
    say_cut(r, &SPREAD);
    node_kill(r, 4);
    r->spoil = NULL;
    moved.count = 2; /* 4 contributed, too, and is gone with its bytes */
    moved.shard[1].holder = moved.shard[2].aggregator = 2;
    say_cut(r, &moved);
    pass_awake(r, 500);
    commit_cut(r, &moved);
    for (uint32_t id = 1; id <= 3; id++) announce_cut(r, id, id > 1 ? STEPS * BATCH : 0);
    assert_same_state(r, 1, 2);
    assert_same_state(r, 1, 3);
}

/* ---- commits summed again ----------------------------------------------------------------- */

/* Sum and copy are lost with their machines before anybody has applied the commit: contributors 3
 * and 4 sum it again from what they froze, to the same leaves, and everybody who comes back agrees. */
static void lost_results_are_summed_again_to_the_same_bits(void **state) {
    struct rig *r = *state;
    struct cut first = {{3, 4}, 2, {{0, 3, 1, 2}, {3, 1, 2, 1}}, 2},
               again = {{3, 4}, 2, {{0, 2, 3, 4}, {2, 2, 4, 3}}, 2};
    struct msg_digest_item leaves[CHUNKS];
    four_ready(r);
    uint64_t round = r->rounds, base = r->base_index;
    say_cut(r, &first);
    memcpy(leaves, report_on(r, 1, 0)->results, 3 * sizeof *leaves);
    memcpy(leaves + 3, report_on(r, 2, 1)->results, sizeof *leaves);
    commit_cut(r, &first);
    node_kill(r, 1);
    node_kill(r, 2);
    for (uint32_t id = 3; id <= 4; id++) announce_cut(r, id, STEPS * BATCH);
    assert_int_equal(look(r, 3).state_index, 0);
    say_cut_to(r, &again, r->base_index, round, base, 0);
    assert_reports_agree(r, &again);
    assert_memory_equal(report_on(r, 3, 0)->results, leaves, 2 * sizeof *leaves);
    assert_memory_equal(report_on(r, 4, 1)->results, leaves + 2, 2 * sizeof *leaves);
    pass_awake(r, 1000); /* nobody needs to be told where they are: the two have it between them */
    assert_int_equal(look(r, 3).state_index, r->base_index);
    assert_same_state(r, 3, 4);
    node_start(r, 1);
    dial_coordinator(r, 1);
    welcome(r, 1, NULL, 0);
    announce_cut(r, 1, 0);
    pass_awake(r, 500);
    assert_same_state(r, 1, 3);
}

/* A contributor that was left out of some chunks then is left out of them now, though it could give them. */
static void a_commit_summed_again_has_the_sets_it_had(void **state) {
    struct rig *r = *state;
    struct cut first = {{3, 4}, 2, {{0, CHUNKS, 1, 2}}, 1},
               again = {{3, 4}, 2, {{0, CHUNKS, 4, 3}}, 1};
    struct msg_digest_item leaves[CHUNKS];
    four_ready(r);
    uint64_t round = r->rounds, base = r->base_index;
    r->spoil = member_3_breaks_off;
    chunks_allowed = 2;
    say_cut(r, &first);
    say(r, 1, MSG_DROP, r->plan, &(struct msg_drop){.member = 3});
    settle(r);
    pass_awake(r, 300);
    r->spoil = NULL;
    memcpy(leaves, report_on(r, 1, 0)->results, sizeof leaves);
    commit_cut(r, &first);
    node_kill(r, 1);
    node_kill(r, 2);
    for (uint32_t id = 3; id <= 4; id++) announce_cut(r, id, STEPS * BATCH);
    uint32_t sent = count_sent(r, 3, MSG_CHUNK);
    say_cut_to(r, &again, r->base_index, round, base, 0);
    const struct msg_shard_report *report = report_on(r, 4, 0);
    assert_reports_agree(r, &again);
    assert_memory_equal(report->results, leaves, sizeof leaves);
    assert_int_equal(report->summed_count, 2);
    assert_int_equal(report->summed[0].weight, 12 + 17);
    assert_int_equal(report->summed[1].weight, 17);
    assert_int_equal(count_sent(r, 3, MSG_CHUNK), sent + 2);
}

/* The aggregator of a commit that is summed again dies when it has reported: from its disk it goes on
 * to serve it. A name of its own on disk, for it may hold a shard of the commit as well. */
static void a_shard_summed_again_is_served_after_a_restart(void **state) {
    struct rig *r = *state;
    struct cut first = {{3, 4}, 2, {{0, 1, 4, 2}, {1, 3, 1, 2}}, 2},
               again = {{3, 4}, 2, {{1, 3, 4, 3}}, 1};
    four_ready(r);
    uint64_t round = r->rounds, base = r->base_index;
    say_cut(r, &first);
    commit_cut(r, &first);
    node_kill(r, 1);
    node_kill(r, 2);
    for (int i = 0; i < FILES_MAX; i++)
        if (!strncmp(r->node[1].disk.file[i].name, "result-", 7))
            file_free(&r->node[1].disk.file[i]);
    r->hold_peers = true; /* 3 and 4 know the commit and cannot act on it */
    for (uint32_t id = 3; id <= 4; id++) announce_cut(r, id, STEPS * BATCH);
    r->hold_peers = false;
    say_cut_to(r, &again, r->base_index, round, base, 0);
    pass_awake(r, 500);
    assert_reports_agree(r, &again);
    node_kill(r, 3);
    node_kill(r, 4);
    node_start(r, 4);
    dial_coordinator(r, 4);
    welcome(r, 4, NULL, 0);
    pass_awake(r, 300);
    node_start(r, 1); /* has the state from before, and lost what it had summed */
    dial_coordinator(r, 1);
    welcome(r, 1, NULL, 0);
    announce_cut(r, 1, 0);
    pass_awake(r, 1000);
    assert_int_equal(look(r, 1).state_index, r->base_index);
    assert_same_state(r, 1, 4);
    assert_int_equal(count_sent(r, 1, MSG_STATE_GET), 0);
}

/* Another sum under a commit's name would be served to everybody. */
static void a_resumption_unlike_its_commit_is_refused(void **state) {
    struct rig *r = *state;
    struct cut first = {{3, 4}, 2, {{0, CHUNKS, 1, 2}}, 1},
               other = {{3}, 1, {{0, CHUNKS, 4, 3}}, 1};
    four_ready(r);
    uint64_t round = r->rounds, base = r->base_index;
    say_cut(r, &first);
    commit_cut(r, &first);
    node_kill(r, 1);
    node_kill(r, 2);
    for (uint32_t id = 3; id <= 4; id++) announce_cut(r, id, STEPS * BATCH);
    say_cut_to(r, &other, r->base_index, round, base, 0);
    assert_null(report_on(r, 4, 0));
    assert_non_null(strstr(r->node[4].logged, "it resumes"));
}

/* ---- audits ------------------------------------------------------------------------------- */

static void say_audit(struct rig *r, uint32_t chunk, uint32_t auditor, uint8_t set,
                      const struct cut *c) {
    struct msg_address address = {auditor, proto_str("10.0.0.1"), 7000 + auditor};
    struct msg_audit msg = {.round = r->rounds, .chunk = chunk, .auditor = auditor,
                            .set = {&set, 1}, .address = &address};
    say(r, auditor, MSG_AUDIT, r->plan, &msg);
    msg.address_count = !r->nat[auditor];
    for (uint32_t i = 0; i < c->count; i++)
        if (set >> i & 1 && c->contributor[i] != auditor)
            say(r, c->contributor[i], MSG_AUDIT, r->plan, &msg);
    settle(r);
}

static const struct msg_audit_report *audit_report(const struct rig *r, uint32_t id) {
    const struct sent *s = last_sent(r, id, MSG_AUDIT_REPORT);
    return s && s->frame.plan == r->plan ? s->msg : NULL;
}

/* Its own sum from the contributors' own bytes: what the aggregator says is not asked for. */
static void an_auditor_finds_what_the_aggregator_found(void **state) {
    struct rig *r = *state;
    struct cut c = {{2, 3}, 2, {{0, CHUNKS, 1, 2}}, 1};
    four_ready(r);
    say_cut_to(r, &c, 0, r->rounds, r->base_index, 4);
    uint32_t sent = count_sent(r, 2, MSG_CHUNK);
    for (uint32_t chunk = 0; chunk < CHUNKS; chunk += 3) {
        say_audit(r, chunk, 4, 3, &c);
        const struct msg_audit_report *a = audit_report(r, 4);
        assert_non_null(a);
        assert_int_equal(a->chunk, chunk);
        assert_int_equal(a->complete, 1);
        assert_int_equal(a->culprit, 0);
        assert_memory_equal(&a->leaf, &report_on(r, 1, 0)->results[chunk], sizeof a->leaf);
    }
    assert_int_equal(count_sent(r, 2, MSG_CHUNK), sent + 2); /* those chunks and no others */
}

/* Auditors may be contributors and aggregators of other shards, and sum from just the set. */
static void an_auditor_may_have_a_part_in_the_round(void **state) {
    struct rig *r = *state;
    four_ready(r);
    say_cut(r, &SPREAD);
    say_audit(r, 1, 2, 7, &SPREAD);
    assert_memory_equal(&audit_report(r, 2)->leaf, &report_on(r, 3, 1)->results[0],
                        sizeof(struct digest));
    say_audit(r, 1, 2, 5, &SPREAD); /* without member 3 */
    assert_int_equal(audit_report(r, 2)->complete, 1);
    assert_memory_not_equal(&audit_report(r, 2)->leaf, &report_on(r, 3, 1)->results[0],
                            sizeof(struct digest));
}

/* Whose bytes do not come is not guilty of it: the audit is void. */
static void an_audit_without_bytes_is_given_up(void **state) {
    struct rig *r = *state;
    struct cut c = {{2, 3}, 2, {{0, CHUNKS, 1, 2}}, 1};
    four_ready(r);
    say_cut_to(r, &c, 0, r->rounds, r->base_index, 4);
    r->spoil = member_3_chunks_wait;
    say_audit(r, 0, 4, 3, &c);
    assert_null(audit_report(r, 4));
    pass_awake(r, 1200);
    assert_int_equal(audit_report(r, 4)->complete, 0);
    assert_int_equal(audit_report(r, 4)->culprit, 0);
    say_audit(r, 9999, 4, 3, &c); /* no such chunk: ignored */
    uint64_t plan = r->plan++;
    say_audit(r, 0, 4, 3, &c); /* a plan it does not know */
    assert_int_equal(audit_report(r, 4)->complete, 0);
    r->plan = plan;
}

static void beyond_the_grid(struct rig *r) {
    node_new(r, 1, false);
    for (uint32_t id = 2; id <= 4; id++) node_with_work(r, id);
    train_round(r, 2);
    train_round(r, 4);
    train(r, 3);
    train(r, 3);
    r->node[3].local[CHUNK + 7] = 1e6f; /* times 2^30 */
    train(r, 3);
}

/* Only the signed root binds a contributor to its bytes, so an aggregator says whose could not be summed,
 * and somebody else looks at that one chunk. */
static void bytes_off_the_grid_are_accused_and_proven(void **state) {
    struct rig *r = *state;
    struct cut c = {{2, 3}, 2, {{0, CHUNKS, 1, 2}}, 1};
    beyond_the_grid(r);
    say_cut_to(r, &c, 0, r->rounds, r->base_index, 4);
    const struct msg_accuse *accuse = last_sent(r, 1, MSG_ACCUSE)->msg;
    assert_int_equal(count_sent(r, 1, MSG_ACCUSE), 1);
    assert_int_equal(accuse->member, 3);
    assert_int_equal(accuse->chunk, 1);
    assert_int_equal(accuse->round, 0);
    assert_int_equal(report_on(r, 1, 0)->summed_count, 2); /* the round went on without it */
    say_audit(r, 1, 4, 2, &c);
    assert_int_equal(audit_report(r, 4)->complete, 1);
    assert_int_equal(audit_report(r, 4)->culprit, 3);
    assert_true(digest_is_zero(&audit_report(r, 4)->leaf));
    say_audit(r, 0, 4, 2, &c); /* another chunk of it is fine */
    assert_int_equal(audit_report(r, 4)->culprit, 0);
    assert_int_equal(audit_report(r, 4)->complete, 1);
}

/* A norm that only all chunks together exceed cannot be shown by one: who accused for it would be avoided for
 * false accusations. It is left out and no more. */
static void what_one_chunk_cannot_prove_is_not_accused(void **state) {
    struct rig *r = *state;
    four_ready(r);
    ((struct msg_ready *)(uintptr_t)ready_of(r, 3))->norm *= 0.999;
    say_cut(r, &WHOLE);
    const struct msg_shard_report *report = report_on(r, 1, 0);
    assert_int_equal(report->summed[report->summed_count - 1].weight, 12 + 22);
    assert_int_equal(count_sent(r, 1, MSG_ACCUSE), 0);
}

/* A norm that a single chunk exceeds is one that the audit sees as well. */
static void a_chunk_larger_than_the_whole_is_accused(void **state) {
    struct rig *r = *state;
    four_ready(r);
    ((struct msg_ready *)(uintptr_t)ready_of(r, 3))->norm *= 0.1;
    say_cut_to(r, &WHOLE, 0, r->rounds, r->base_index, 0);
    assert_int_equal(count_sent(r, 1, MSG_ACCUSE), 1);
    const struct msg_accuse *accuse = last_sent(r, 1, MSG_ACCUSE)->msg;
    assert_int_equal(accuse->member, 3);
    say_audit(r, accuse->chunk, 4, 2, &WHOLE);
    assert_int_equal(audit_report(r, 4)->culprit, 3);
}

/* Bytes for an audit are asked for by the coordinator, not by whoever likes: a WANT of a member that
 * neither aggregates nor audits gets nothing, and an auditor gets its chunk alone. */
static void only_the_audited_chunk_is_given_to_an_auditor(void **state) {
    struct rig *r = *state;
    struct cut c = {{2, 3}, 2, {{0, CHUNKS, 1, 2}}, 1};
    uint8_t all = 15;
    four_ready(r);
    say_cut_to(r, &c, 0, r->rounds, r->base_index, 4);
    say_audit(r, 2, 4, 3, &c);
    uint32_t sent = count_sent(r, 3, MSG_CHUNK);
    struct msg_want want = {.round = r->rounds, .chunks = {&all, 1}};
    struct frame f = {.type = MSG_WANT, .term = r->term, .plan = r->plan};
    step(r, 3, &(struct sync_event){.type = SYNC_EV_PEER_MESSAGE, .peer = 4, .frame = f, .msg = &want});
    settle(r);
    assert_int_equal(count_sent(r, 3, MSG_CHUNK), sent + 1); /* chunk 2 again */
    dial(r, 2, 3);
    step(r, 3, &(struct sync_event){.type = SYNC_EV_PEER_MESSAGE, .peer = 2, .frame = f, .msg = &want});
    settle(r);
    assert_int_equal(count_sent(r, 3, MSG_CHUNK), sent + 1);
}

/* ---- results passed on -------------------------------------------------------------------- */

/* Aggregator and holder are gone when the last member hears of the commit: it gets the results from one
 * that fetched them, an eighth of what the state would be. */
static void fetched_results_are_passed_on(void **state) {
    struct rig *r = *state;
    four_ready(r);
    say_cut(r, &WHOLE);
    commit_cut(r, &WHOLE);
    announce_cut(r, 3, STEPS * BATCH);
    assert_int_equal(look(r, 3).state_index, r->base_index);
    node_kill(r, 1);
    node_kill(r, 2);
    announce_cut(r, 4, STEPS * BATCH);
    pass_awake(r, 1500);
    assert_same_state(r, 3, 4);
    assert_int_equal(count_sent(r, 4, MSG_STATE_GET), 0);
    assert_int_equal(count_sent(r, 3, MSG_RESULT), CHUNKS);
}

static bool flip_relayed(struct rig *r, struct sent *m) {
    (void)r;
    if (m->from == 3 && m->frame.type == MSG_RESULT)
        ((uint8_t *)(uintptr_t)((struct msg_result *)m->msg)->data.data)[9] ^= 1;
    if (m->from == 3 && m->frame.type == MSG_RESULT_LEAVES)
        ((struct msg_result_leaves *)m->msg)->leaves[1].digest.b[3] ^= 1;
    return true;
}

/* What a member passes on is checked like what an aggregator says: against the ledger. */
static void a_lying_relay_reaches_nothing(void **state) {
    struct rig *r = *state;
    four_ready(r);
    say_cut(r, &WHOLE);
    commit_cut(r, &WHOLE);
    announce_cut(r, 3, STEPS * BATCH);
    node_kill(r, 1);
    r->spoil = flip_relayed;
    node_kill(r, 2);
    announce_cut(r, 4, STEPS * BATCH);
    pass_awake(r, 1500);
    assert_int_equal(look(r, 4).state_index, 0);
    r->spoil = NULL;
    node_start(r, 2);
    dial_coordinator(r, 2);
    welcome(r, 2, NULL, 0);
    announce_cut(r, 2, STEPS * BATCH);
    announce_cut(r, 4, STEPS * BATCH);
    pass_awake(r, 1500);
    assert_same_state(r, 3, 4);
}

static bool results_are_lost(struct rig *r, struct sent *m) {
    (void)r;
    return m->frame.type != MSG_RESULT;
}

/* One that has kept the digests and forgotten the data (memory is bounded) answers every question, and must
 * not be asked for ever: the state is had from whoever has it. */
static void leaves_without_data_are_no_progress(void **state) {
    struct rig *r = *state;
    four_ready(r);
    say_cut(r, &WHOLE);
    commit_cut(r, &WHOLE);
    announce_cut(r, 3, STEPS * BATCH);
    node_kill(r, 1);
    r->spoil = results_are_lost;
    announce_cut(r, 4, STEPS * BATCH);
    say(r, 4, MSG_ROOT, 0,
        &(struct msg_root){.index = r->base_index, .root = root_of(r, 3)});
    pass_awake(r, 6000);
    assert_true(count_sent(r, 4, MSG_STATE_GET) > 0);
    assert_same_state(r, 3, 4);
}

/* When everybody has applied a round nobody will ask again, and the memory is for the next. */
static void relayed_results_end_with_the_round(void **state) {
    struct rig *r = *state;
    uint8_t all = 15;
    four_ready(r);
    say_cut(r, &WHOLE);
    commit_cut(r, &WHOLE);
    for (uint32_t id = 1; id <= 4; id++) announce_cut(r, id, id > 1 ? STEPS * BATCH : 0);
    struct msg_result_get get = {.round = 0, .plan = r->plan, .chunks = {&all, 1}};
    struct frame f = {.type = MSG_RESULT_GET, .term = r->term, .plan = r->plan};
    for (int settled = 0; settled < 2; settled++) {
        uint32_t results = count_sent(r, 3, MSG_RESULT), nones = count_sent(r, 3, MSG_NONE);
        dial(r, 4, 3);
        step(r, 3, &(struct sync_event){
                       .type = SYNC_EV_PEER_MESSAGE, .peer = 4, .frame = f, .msg = &get});
        settle(r);
        assert_int_equal(count_sent(r, 3, MSG_RESULT) - results, settled ? 0 : CHUNKS);
        assert_int_equal(count_sent(r, 3, MSG_NONE) - nones, settled);
        say(r, 3, MSG_HEARTBEAT_ACK, 0,
            &(struct msg_heartbeat_ack){.settled_index = r->base_index});
        settle(r);
    }
}

/* ---- members that nobody can dial --------------------------------------------------------- */

/* Behind NAT a member contributes, holds, is fetched from over links that it made, and fetches. */
static void a_member_behind_nat_does_all_that_dialling_allows(void **state) {
    struct rig *r = *state;
    struct cut c = {{2, 3, 4}, 3, {{0, 2, 1, 4}, {2, 2, 2, 1}}, 2};
    r->nat[4] = true;
    four_ready(r);
    say_cut(r, &c);
    pass_awake(r, 300);
    commit_cut(r, &c);
    const struct msg_hello *hello = last_sent(r, 4, MSG_HELLO)->msg;
    assert_int_equal(hello->port, 0);
    announce_cut(r, 4, STEPS * BATCH);
    assert_int_equal(look(r, 4).state_index, r->base_index);
    node_kill(r, 1); /* the first shard is with member 4 alone, which has dialled 2 and not 3 */
    announce_cut(r, 2, STEPS * BATCH);
    pass_awake(r, 1000);
    assert_same_state(r, 4, 2);
    announce_cut(r, 3, STEPS * BATCH);
    pass_awake(r, 1500);
    assert_same_state(r, 4, 3); /* from member 2, which fetched it */
}

/* An auditor behind NAT hears nothing until it dials those it knows. */
static void an_auditor_behind_nat_dials_the_contributors(void **state) {
    struct rig *r = *state;
    struct cut c = {{2, 3}, 2, {{0, CHUNKS, 1, 2}}, 1};
    r->nat[4] = true;
    four_ready(r);
    say_cut_to(r, &c, 0, r->rounds, r->base_index, 4);
    say_audit(r, 3, 4, 3, &c);
    pass_awake(r, 500);
    assert_int_equal(audit_report(r, 4)->complete, 1);
    assert_memory_equal(&audit_report(r, 4)->leaf, &report_on(r, 1, 0)->results[3],
                        sizeof(struct digest));
}

int main(void) {
#define T(name) cmocka_unit_test_setup_teardown(name, rig_setup, rig_teardown)
    const struct CMUnitTest tests[] = {
        T(shards_of_many_give_the_bits_of_one),
        T(a_broken_link_resumes_in_its_shard_alone),
        T(a_holder_gets_the_leaves_of_a_shard_that_is_done_last),
        T(a_dead_aggregators_shard_is_summed_by_another),
        T(lost_results_are_summed_again_to_the_same_bits),
        T(a_commit_summed_again_has_the_sets_it_had),
        T(a_shard_summed_again_is_served_after_a_restart),
        T(a_resumption_unlike_its_commit_is_refused),
        T(an_auditor_finds_what_the_aggregator_found),
        T(an_auditor_may_have_a_part_in_the_round),
        T(an_audit_without_bytes_is_given_up),
        T(bytes_off_the_grid_are_accused_and_proven),
        T(what_one_chunk_cannot_prove_is_not_accused),
        T(a_chunk_larger_than_the_whole_is_accused),
        T(only_the_audited_chunk_is_given_to_an_auditor),
        T(fetched_results_are_passed_on),
        T(a_lying_relay_reaches_nothing),
        T(leaves_without_data_are_no_progress),
        T(relayed_results_end_with_the_round),
        T(a_member_behind_nat_does_all_that_dialling_allows),
        T(an_auditor_behind_nat_dials_the_contributors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
