/* core_round.c - from a plan to a commit: shards are reported by two members each, the round
 * commits in one transaction, or is planned again under a higher number. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

#ifdef SIM_FAULTS
enum core_fault core_fault = CORE_FAULT_NONE;
#endif

/* ---- deadlines and losses ------------------------------------------------------------------- */

/* Twice the time for every plan of a round that came to nothing: links may just be slow. */
void core_set_deadline(struct core *c, uint64_t now_ms) {
    uint32_t shift = c->attempts < CORE_BACKOFF_SHIFT_MAX ? c->attempts : CORE_BACKOFF_SHIFT_MAX;
    c->deadline_ms = now_ms + ((uint64_t)CORE_REPORT_SILENCES * c->outer->silence_ms_max << shift);
}

void core_forget_reports(struct core *c) {
    for (uint32_t i = 0; i < c->shard_count; i++) {
        for (int r = 0; r < REPORT_ROLES; r++)
            if (c->shards[i].reported[r])
                proto_copy_release(RECORD_shard_report, &c->shards[i].reports[r]);
        memset(&c->shards[i], 0, sizeof c->shards[i]);
    }
    c->shard_count = 0;
}

/* Each aggregator once, whatever the number of its shards. */
void core_drop_contributor(struct core *c, struct member *m, struct core_actions *out) {
    struct msg_drop msg = {.round = core_round(c), .member = m->id};
    m->ready.dropped = true;
    for (uint32_t i = 0; i < c->member_count; i++) {
        bool aggregates = false;
        for (uint32_t j = 0; j < c->shard_count; j++)
            aggregates |= c->shards[j].where.aggregator == i + 1;
        if (aggregates) core_send(out, &c->members[i], MSG_DROP, c->plan, &msg);
    }
}

static bool is_unable(const struct core *c, uint32_t id) {
    const struct member *m = core_member(c, id);
    return !m->here || m->catching_up;
}

void core_check_round(struct core *c, uint64_t now_ms, struct core_actions *out) {
    if (c->phase != CORE_REDUCE) return;
    for (uint32_t i = 0; i < c->shard_count; i++) {
        const struct msg_shard *s = &c->shards[i].where;
        if (!is_unable(c, s->aggregator) && !is_unable(c, s->holder)) continue;
        c->handovers++;
        core_log(
            out, CORE_WARNING, "plan %llu: member %u, who %s, is lost; the shard goes to others",
            (unsigned long long)c->plan, is_unable(c, s->aggregator) ? s->aggregator : s->holder,
            is_unable(c, s->aggregator) ? "aggregates" : "holds");
        core_replan(c, now_ms, out);
        return;
    }
    if (now_ms < c->deadline_ms) return;
    for (uint32_t i = 0; i < c->shard_count; i++) {
        const struct shard *s = &c->shards[i];
        uint32_t late = s->reported[BY_AGGREGATOR] ? s->where.holder : s->where.aggregator;
        core_member(c, late)->avoid = true;
        core_log(out, CORE_WARNING,
                 "plan %llu: no report of shard %u from " WHO " in time; others get it",
                 (unsigned long long)c->plan, i, WHO_OF(core_member(c, late)));
    }
    core_replan(c, now_ms, out);
}

/* Contributions of the plan whose members are still here; the others' go for good. */
static uint32_t keep_live_contributors(struct core *c) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < c->member_count; i++) {
        struct member *m = &c->members[i];
        if (!m->ready.planned) continue;
        if (m->here)
            n++;
        else
            core_forget_ready(m);
    }
    return n;
}

static void collect_again(struct core *c, struct core_actions *out) {
    c->phase = CORE_TRAIN;
    core_forget_reports(c);
    c->contributor_count = 0;
    for (uint32_t i = 0; i < c->member_count; i++)
        c->members[i].ready.planned = c->members[i].ready.dropped = false;
    core_log(out, CORE_INFO, "round %llu collects contributions again",
             (unsigned long long)core_round(c));
}

void core_replan(struct core *c, uint64_t now_ms, struct core_actions *out) {
    struct batch b = {0};
    uint32_t ready, waited, left = keep_live_contributors(c);
    c->attempts++;
    core_return_leases(c,
                       &b); /* of contributors that were lost: nothing can spend their claims now */
    core_emit_persist(out, &b);
    bool enough = left && left >= core_quorum_needed(c, &ready, &waited);
    if (!enough || !core_make_plan(c, true, now_ms, out)) collect_again(c, out);
}

/* ---- reports -------------------------------------------------------------------------------- */

void core_summed_union(const struct msg_summed *summed, uint32_t count,
                       uint8_t set[PROTO_SET_BYTES_MAX]) {
    memset(set, 0, PROTO_SET_BYTES_MAX);
    for (uint32_t i = 0; i < count; i++)
        for (uint32_t j = 0; j < summed[i].set.length; j++) set[j] |= summed[i].set.data[j];
}

/* Total weight of the members of a set, or UINT64_MAX for a bit that is nobody's. */
static uint64_t weight_of(const struct core *c, struct proto_bytes set) {
    uint64_t weight = 0;
    for (uint32_t bit = 0; bit < set.length * 8; bit++) {
        if (!proto_set_has(set.data, bit)) continue;
        if (bit >= c->contributor_count) return UINT64_MAX;
        weight += c->contributors[bit].weight;
    }
    return weight;
}

static int check_run(const struct core *c, const struct msg_summed *run, struct err *err) {
    uint32_t need = (c->contributor_count + 7) / 8;
    if (run->chunks == 0) return err_set(err, ERR_PROTOCOL, "a run of no chunks");
    if (run->set.length != need && !(run->set.length == 0 && run->weight == 0))
        return err_set(err, ERR_PROTOCOL, "a set of %u bytes for %u contributors", run->set.length,
                       c->contributor_count);
    if (weight_of(c, run->set) != run->weight)
        return err_set(err, ERR_PROTOCOL, "weight %llu is not that of its contributors",
                       (unsigned long long)run->weight);
    return 0;
}

static int check_report(const struct core *c, const struct msg_shard_report *msg, struct err *err) {
    const struct msg_shard *where = &c->shards[msg->shard].where;
    uint64_t chunks = 0;
    if (msg->results_count != where->count)
        return err_set(err, ERR_PROTOCOL, "%u digests for %u chunks", msg->results_count,
                       where->count);
    for (uint32_t i = 0; i < msg->summed_count; i++) {
        if (check_run(c, &msg->summed[i], err)) return -1;
        chunks += msg->summed[i].chunks;
    }
    if (chunks != where->count)
        return err_set(err, ERR_PROTOCOL, "runs over %llu of %u chunks", (unsigned long long)chunks,
                       where->count);
    return 0;
}

static bool same_set(const struct msg_summed *a, const struct msg_summed *b) {
    if (a->weight != b->weight) return false;
    if (a->weight == 0) return true;
    return a->set.length == b->set.length && !memcmp(a->set.data, b->set.data, a->set.length);
}

/* Equal chunk by chunk, however each cut its runs. Both cover the same number of chunks. */
static bool same_summed(const struct msg_shard_report *a, const struct msg_shard_report *b) {
    uint32_t i = 0, j = 0, used_a = 0, used_b = 0;
    while (i < a->summed_count && j < b->summed_count) {
        if (!same_set(&a->summed[i], &b->summed[j])) return false;
        uint32_t left_a = a->summed[i].chunks - used_a, left_b = b->summed[j].chunks - used_b;
        uint32_t step = left_a < left_b ? left_a : left_b;
        used_a += step;
        used_b += step;
        if (step == left_a) i++, used_a = 0;
        if (step == left_b) j++, used_b = 0;
    }
    return i == a->summed_count && j == b->summed_count;
}

static bool same_report(const struct msg_shard_report *a, const struct msg_shard_report *b) {
    for (uint32_t i = 0; i < a->results_count; i++)
        if (!digest_equal(&a->results[i].digest, &b->results[i].digest)) return false;
    return same_summed(a, b);
}

static bool held_twice(const struct core *c) {
    for (uint32_t i = 0; i < c->shard_count; i++)
        if (!c->shards[i].reported[BY_AGGREGATOR] || !c->shards[i].reported[BY_HOLDER])
            return false;
    return true;
}

static bool has_empty_chunk(const struct core *c) {
    for (uint32_t i = 0; i < c->shard_count; i++)
        for (uint32_t j = 0; j < c->shards[i].reports[BY_AGGREGATOR].summed_count; j++)
            if (c->shards[i].reports[BY_AGGREGATOR].summed[j].weight == 0) return true;
    return false;
}

/* ---- the commit ----------------------------------------------------------------------------- */

struct draft {
    struct msg_commit body;
    struct msg_shard shards[CORE_SHARDS_MAX];
    struct msg_summed *summed; /* borrow from the reports */
    struct msg_spend *spent;
    uint8_t set[PROTO_SET_BYTES_MAX];
};

static struct digest result_root(const struct core *c) {
    struct msg_digest_item *leaves = calloc(c->chunks, sizeof *leaves);
    assert(leaves);
    for (uint32_t i = 0; i < c->shard_count; i++)
        memcpy(leaves + c->shards[i].where.first, c->shards[i].reports[BY_AGGREGATOR].results,
               c->shards[i].where.count * sizeof *leaves);
    struct digest root = digest_tree_root(leaves, c->chunks);
    free(leaves);
    return root;
}

static void draft_summed(const struct core *c, struct draft *d) {
    uint32_t count = 0, n = 0;
    for (uint32_t i = 0; i < c->shard_count; i++)
        count += c->shards[i].reports[BY_AGGREGATOR].summed_count;
    assert(count); /* every report covers all chunks of its shard */
    struct msg_summed *summed = calloc(count, sizeof *summed);
    assert(summed);
    for (uint32_t i = 0; i < c->shard_count; i++) {
        const struct msg_shard_report *r = &c->shards[i].reports[BY_AGGREGATOR];
        d->shards[i] = c->shards[i].where;
        for (uint32_t j = 0; j < r->summed_count; j++) summed[n++] = r->summed[j];
    }
    core_summed_union(summed, n, d->set);
    d->summed = summed;
    d->body.summed_count = n;
}

/* Claims are spent as soon as any chunk of the contribution is in the sum: its samples have an
 * effect now, and must not get another one. */
static void draft_spent(const struct core *c, struct draft *d) {
    d->spent = calloc(CORE_PLAN_RANGES_MAX, sizeof *d->spent);
    assert(d->spent);
    for (uint32_t i = 0; i < c->contributor_count; i++) {
        if (!proto_set_has(d->set, i)) continue;
        const struct msg_ready *r = &core_member(c, c->contributors[i].member)->ready.msg;
        d->body.tokens += c->contributors[i].tokens;
        for (uint32_t j = 0; j < r->ranges_count; j++)
            d->spent[d->body.spent_count++] =
                (struct msg_spend){c->contributors[i].member, r->ranges[j].lease,
                                   r->ranges[j].generation, r->ranges[j].start, r->ranges[j].count};
    }
}

static void draft_commit(const struct core *c, struct draft *d) {
    const struct state *base = core_state_now(c);
    *d = (struct draft){.body = {.round = core_round(c),
                                 .plan = c->plan,
                                 .base_index = base->index,
                                 .state_index = base->index,
                                 .state_root = base->root,
                                 .lr = c->outer->lr,
                                 .momentum = c->outer->momentum,
                                 .codec = c->outer->result_codec,
                                 .grid_exponent = c->grid_exponent,
                                 .contributors = c->contributors,
                                 .contributors_count = c->contributor_count,
                                 .shards_count = c->shard_count}};
    draft_summed(c, d);
    draft_spent(c, d);
    d->body.result_root = result_root(c);
    d->body.tokens_committed = base->tokens_committed + d->body.tokens;
    d->body.shards = d->shards;
    d->body.summed = d->summed;
    d->body.spent = d->spent;
}

static void announce_commit(struct core *c, const bool *spent, struct core_actions *out) {
    const struct state *s = core_state_now(c);
    for (uint32_t i = 0; i < c->member_count; i++) {
        struct member *m = &c->members[i];
        if (!m->conn) continue;
        if (spent[i]) core_send_leases(c, m, out);
        core_send_ledger(out, m, s->index);
        core_send_holders(c, s, m, out);
    }
}

/* Everything the round changes goes into one transaction; nobody hears of it before. */
static void finish_commit(struct core *c, const struct draft *d, struct batch *b,
                          struct core_actions *out) {
    bool spent[PROTO_MEMBERS_MAX] = {false};
    uint32_t summed = 0;
    for (uint32_t i = 0; i < c->contributor_count; i++) {
        struct member *m = core_member(c, c->contributors[i].member);
        if (!proto_set_has(d->set, i)) continue;
        core_spend_claims(c, m, m->ready.msg.ranges, m->ready.msg.ranges_count, b);
        spent[m->id - 1] = true;
        summed++;
    }
    for (uint32_t i = 0; i < c->member_count; i++) {
        core_forget_ready(&c->members[i]);
        c->members[i].avoid = false;
    }
    core_return_leases(c, b);
    core_log(out, CORE_INFO,
             "round %llu commits at ledger %llu: %u of %u contributors, %llu tokens, %llu in all",
             (unsigned long long)d->body.round, (unsigned long long)core_state_now(c)->index,
             summed, c->contributor_count, (unsigned long long)d->body.tokens,
             (unsigned long long)d->body.tokens_committed);
#ifdef SIM_FAULTS
    if (core_fault == CORE_FAULT_COMMIT_ANNOUNCED_BEFORE_DURABLE) {
        announce_commit(c, spent, out);
        core_emit_persist(out, b);
        return;
    }
#endif
    core_emit_persist(out, b);
    announce_commit(c, spent, out);
}

static void next_round(struct core *c) {
    core_forget_reports(c);
    c->phase = CORE_TRAIN;
    c->contributor_count = c->attempts = 0;
    c->quorum_reached = c->waiting_told = false;
}

static void commit(struct core *c, uint64_t now_ms, struct core_actions *out) {
    struct batch b = {0};
    struct draft d;
    struct err err;
    uint64_t index;
    draft_commit(c, &d);
    if (core_append(c, &b, LEDGER_COMMIT, RECORD_commit, &d.body, &index, &err)) {
        core_log(out, CORE_ERROR, "round %llu: %s; planned again",
                 (unsigned long long)core_round(c), err.msg);
        core_member(c, c->shards[0].where.aggregator)->avoid = true;
        core_replan(c, now_ms, out);
    } else {
        int failed = core_take_commit(c, index, &d.body, &err);
        assert(
            !failed); /* claims were checked against the spent samples when they were announced */
        finish_commit(c, &d, &b, out);
        next_round(c);
        core_settle(c);
        core_checkpoint_after_commit(c, out);
    }
    free(d.summed);
    free(d.spent);
}

void core_send_holders(const struct core *c, const struct state *s, const struct member *m,
                       struct core_actions *out) {
    struct msg_address addresses[2 * CORE_SHARDS_MAX];
    struct msg_holders msg = {.index = s->index, .addresses = addresses};
    for (uint32_t i = 0; i < s->holder_count; i++) {
        const struct member *holder = core_member(c, s->holders[i]);
        if (holder && core_address(m, holder, &addresses[msg.addresses_count]))
            msg.addresses_count++;
    }
    core_send(out, m, MSG_HOLDERS, 0, &msg);
}

/* ---- SHARD_REPORT --------------------------------------------------------------------------- */

/* The sender's role in the shard, or -1: a report that came too late, which means nothing now. */
static int role_of(struct core *c, const struct member *m, const struct frame *f,
                   const struct msg_shard_report *msg, struct core_actions *out) {
    bool current = c->phase == CORE_REDUCE && f->plan == c->plan && msg->fragment == 0 &&
                   msg->round == core_round(c) && msg->shard < c->shard_count;
    if (current && c->shards[msg->shard].where.aggregator == m->id) return BY_AGGREGATOR;
    if (current && c->shards[msg->shard].where.holder == m->id) return BY_HOLDER;
    core_complain(c, out, CORE_INFO,
                  "report of shard %u, round %llu, plan %llu from " WHO " is void: plan %llu of "
                  "round %llu is the current one",
                  msg->shard, (unsigned long long)msg->round, (unsigned long long)f->plan,
                  WHO_OF(m), (unsigned long long)c->plan, (unsigned long long)core_round(c));
    return -1;
}

static void reports_are_complete(struct core *c, uint64_t now_ms, struct core_actions *out) {
    for (uint32_t i = 0; i < c->shard_count; i++) {
        const struct shard *s = &c->shards[i];
        if (same_report(&s->reports[BY_AGGREGATOR], &s->reports[BY_HOLDER])) continue;
        core_log(
            out, CORE_ERROR,
            "plan %llu, shard %u: the reports of member %u (aggregator) and member %u (holder) "
            "differ; another aggregates",
            (unsigned long long)c->plan, i, s->where.aggregator, s->where.holder);
        core_member(c, s->where.aggregator)->avoid = core_member(c, s->where.holder)->avoid = true;
        core_replan(c, now_ms, out);
        return;
    }
    if (!has_empty_chunk(c)) {
        commit(c, now_ms, out);
        return;
    }
    core_log(out, CORE_WARNING,
             "plan %llu: a chunk was summed from nobody; planned again with who is still here",
             (unsigned long long)c->plan);
    core_member(c, c->shards[0].where.aggregator)->avoid = true;
    core_replan(c, now_ms, out);
}

void core_on_shard_report(struct core *c, struct member *m, const struct frame *f,
                          const struct msg_shard_report *msg, uint64_t now_ms,
                          struct core_actions *out) {
    struct err err;
    int role = role_of(c, m, f, msg, out);
    if (role < 0) return;
    struct shard *s = &c->shards[msg->shard];
    if (check_report(c, msg, &err)) {
        core_complain(c, out, CORE_ERROR,
                      "report of shard %u from " WHO " is broken: %s; another gets the shard",
                      msg->shard, WHO_OF(m), err.msg);
        core_close(c, out, m->conn, ERR_PROTOCOL, false, "SHARD_REPORT: %s", err.msg);
        m->avoid = true;
        core_replan(c, now_ms, out);
        return;
    }
    if (s->reported[role])
        proto_copy_release(RECORD_shard_report, &s->reports[role]);
    else
        core_set_deadline(c, now_ms); /* not for a repetition: the other one may be stuck */
    int failed = proto_copy(RECORD_shard_report, msg, &s->reports[role], NULL);
    assert(!failed);
    s->reported[role] = true;
    if (held_twice(c)) reports_are_complete(c, now_ms, out);
}
