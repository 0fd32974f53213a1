/* core_commit.c - the commit: one transaction appends the round to the ledger and spends its
 * leases; only then does anybody hear of it. */
#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

#define LLU(x) ((unsigned long long)(x))

/* ---- the entry ------------------------------------------------------------------------------ */

struct draft {
    struct msg_commit body;
    struct msg_shard *shards;
    struct msg_summed *summed; /* borrow from the reports */
    struct msg_spend *spent;
    uint8_t set[PROTO_SET_BYTES_MAX];
};

static void draft_release(struct draft *d) {
    free(d->shards);
    free(d->summed);
    free(d->spent);
}

static struct digest result_root(const struct round *r) {
    struct msg_digest_item *leaves = calloc(r->chunks, sizeof *leaves);
    assert(leaves);
    for (uint32_t i = 0; i < r->plan.shard_count; i++) {
        const struct shard *s = &r->plan.shards[i];
        memcpy(leaves + s->where.first, s->reports[BY_AGGREGATOR].results,
               s->where.count * sizeof *leaves);
    }
    struct digest root = digest_tree_root(leaves, r->chunks);
    free(leaves);
    return root;
}

static void draft_summed(const struct plan *p, struct draft *d) {
    uint32_t count = 0, n = 0;
    for (uint32_t i = 0; i < p->shard_count; i++)
        count += p->shards[i].reports[BY_AGGREGATOR].summed_count;
    assert(count && p->shard_count); /* every report covers all chunks of its shard */
    struct msg_summed *summed = calloc(count, sizeof *summed);
    struct msg_shard *shards = calloc(p->shard_count, sizeof *shards);
    assert(summed && shards);
    for (uint32_t i = 0; i < p->shard_count; i++) {
        const struct msg_shard_report *r = &p->shards[i].reports[BY_AGGREGATOR];
        shards[i] = p->shards[i].where;
        for (uint32_t j = 0; j < r->summed_count; j++) summed[n++] = r->summed[j];
    }
    core_summed_union(summed, n, d->set);
    d->summed = summed;
    d->shards = shards;
    d->body.summed = d->summed;
    d->body.summed_count = n;
    d->body.shards = d->shards;
    d->body.shards_count = p->shard_count;
}

static struct msg_range to_spend(const struct core *c, const struct member *m,
                                 const struct msg_lease *claim) {
#ifdef SIM_FAULTS
    if (core_fault == CORE_FAULT_SPENDS_OTHER_FRAGMENT_AGAIN)
        return (struct msg_range){claim->start, claim->count};
#endif
    return core_unspent(c, m, claim);
}

/* Claims are spent as soon as any chunk of the contribution is in the sum: its samples have an
 * effect now, and must not get another one. What another fragment's commit spent is spent. */
static void draft_spent(const struct core *c, const struct round *r, struct draft *d) {
    d->spent = calloc(CORE_PLAN_RANGES_MAX, sizeof *d->spent);
    assert(d->spent);
    for (uint32_t i = 0; i < r->plan.contributor_count; i++) {
        if (!proto_set_has(d->set, i)) continue;
        const struct member *m = core_member(c, r->plan.contributors[i].member);
        const struct msg_ready *ready = &core_part(r, m)->msg;
        for (uint32_t j = 0; j < ready->ranges_count; j++) {
            const struct msg_lease *claim = &ready->ranges[j];
            struct msg_range left = to_spend(c, m, claim);
            if (!left.count) continue;
            d->spent[d->body.spent_count++] = (struct msg_spend){
                m->id, claim->lease, claim->generation, left.start, left.count};
            d->body.tokens += left.count * c->sequence;
        }
    }
    d->body.spent = d->spent;
}

/* Where the samples that a round stands on shrank by a third or more, the step shrinks with the
 * root of it, as noise grows; where they grew, the setting is what was tuned. */
static float learning_rate(const struct core *c, const struct round *r, const struct draft *d) {
    uint32_t n = r->samples_count < CORE_LR_ROUNDS ? r->samples_count : CORE_LR_ROUNDS;
    double samples = 0, mean = 0;
    for (uint32_t i = 0; i < r->plan.contributor_count; i++)
        if (proto_set_has(d->set, i))
            samples += (double)r->plan.contributors[i].tokens / c->sequence;
    for (uint32_t i = 0; i < n; i++) mean += r->samples[i] / n;
    if (c->outer->lr_rule != LR_SQRT || !(mean > 0)) return c->outer->lr;
    double ratio = samples / mean;
    return ratio < 2.0 / 3 ? (float)((double)c->outer->lr * sqrt(ratio)) : c->outer->lr;
}

static void draft_commit(const struct core *c, const struct round *r, struct draft *d) {
    const struct state *agreed = core_agreed_state(c, r);
    *d = (struct draft){.body = {.fragment = r->fragment,
                                 .round = r->number,
                                 .plan = r->plan.number,
                                 .base_index = r->base_index,
                                 .state_index = agreed->index,
                                 .state_root = agreed->root,
                                 .momentum = c->outer->momentum,
                                 .codec = r->plan.codec,
                                 .grid_exponent = r->plan.grid_exponent,
                                 .contributors = r->plan.contributors,
                                 .contributors_count = r->plan.contributor_count}};
    draft_summed(&r->plan, d);
    draft_spent(c, r, d);
    d->body.lr = learning_rate(c, r, d);
    d->body.result_root = result_root(r);
    d->body.tokens_committed = core_state_now(c)->tokens_committed + d->body.tokens;
}

/* ---- what follows --------------------------------------------------------------------------- */

/* The entry before the leases: it says which of them are shorter because they are spent. */
static void announce_commit(struct core *c, const struct draft *d, struct core_actions *out) {
    const struct state *s = core_state_now(c);
    bool spent[PROTO_MEMBERS_MAX] = {false};
    for (uint32_t i = 0; i < d->body.spent_count; i++) spent[d->spent[i].member - 1] = true;
    for (uint32_t i = 0; i < c->member_count; i++) {
        struct member *m = &c->members[i];
        if (!m->conn) continue;
        core_send_ledger(out, m, s->index);
        if (spent[i] || !core_in_good_standing(m)) core_send_leases(c, m, out);
        core_send_holders(c, s, m, out);
    }
}

/* A contributor that lives and is in no chunk was dropped by the aggregators for its silence. */
static void count_missed(struct core *c, struct round *r, const struct draft *d) {
    for (uint32_t i = 0; i < r->plan.contributor_count; i++) {
        struct member *m = core_member(c, r->plan.contributors[i].member);
        if (proto_set_has(d->set, i))
            m->missed = m->given_up = 0;
        else if (m->here && !core_part(r, m)->dropped)
            m->missed++;
    }
}

static uint32_t bits(const uint8_t *set) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < PROTO_MEMBERS_MAX; i++) n += proto_set_has(set, i);
    return n;
}

/* Everything the round changes goes into one transaction; nobody hears of it before. */
static void finish_commit(struct core *c, struct round *r, const struct draft *d, struct batch *b,
                          struct core_actions *out) {
    core_spend(c, d->spent, d->body.spent_count, b);
    count_missed(c, r, d);
    for (uint32_t i = 0; i < c->member_count; i++) {
        struct part *p = core_part(r, &c->members[i]);
        core_forget_ready(p);
        p->avoid = p->due_told = false;
        p->accusations = 0;
    }
    core_return_leases(c, b);
    core_log(out, CORE_INFO,
             "round %llu of fragment %u commits at ledger %llu: %u of %u contributors, %llu "
             "tokens, %llu in all",
             LLU(d->body.round), r->fragment, LLU(core_state_now(c)->index), bits(d->set),
             d->body.contributors_count, LLU(d->body.tokens), LLU(d->body.tokens_committed));
#ifdef SIM_FAULTS
    if (core_fault == CORE_FAULT_COMMIT_ANNOUNCED_BEFORE_DURABLE) {
        announce_commit(c, d, out);
        core_emit_persist(out, b);
        return;
    }
#endif
    core_emit_persist(out, b);
    announce_commit(c, d, out);
}

static void next_round(struct core *c, struct round *r) {
    core_forget_plan(&r->plan);
    r->phase = ROUND_COLLECT;
    r->attempts = r->audit_count = 0;
    r->quorum_reached = r->waiting_told = false;
    r->last_done = c->closing;
}

void core_commit(struct core *c, struct round *r, uint64_t now_ms, struct core_actions *out) {
    struct batch b = {0};
    struct draft d;
    struct err err;
    uint64_t index;
    draft_commit(c, r, &d);
    if (core_append(c, &b, LEDGER_COMMIT, RECORD_commit, &d.body, &index, &err)) {
        core_log(out, CORE_ERROR, "round %llu of fragment %u: %s; planned again", LLU(r->number),
                 r->fragment, err.msg);
        core_avoid(r, core_member(c, r->plan.shards[0].where.aggregator));
        core_replan(c, r, now_ms, out);
    } else {
        int failed = core_take_commit(c, index, c->term, &d.body, &err);
        assert(!failed); /* what is unspent in the lease table is in no entry before */
        finish_commit(c, r, &d, &b, out);
        next_round(c, r);
        core_settle(c);
        core_checkpoint_after_commit(c, out);
    }
    draft_release(&d);
}

void core_send_holders(const struct core *c, const struct state *s, const struct member *m,
                       struct core_actions *out) {
    struct msg_address addresses[PROTO_MEMBERS_MAX];
    struct msg_holders msg = {.index = s->index, .addresses = addresses};
    for (uint32_t i = 0; i < s->holder_count; i++) {
        const struct member *holder = core_member(c, s->holders[i]);
        if (holder && msg.addresses_count < PROTO_SHARDS_MAX &&
            core_address(m, holder, &addresses[msg.addresses_count]))
            msg.addresses_count++;
    }
    core_send(out, m, MSG_HOLDERS, 0, &msg);
}
