/* core_plan.c - contributions are frozen into a plan: who is summed with which weight, on which
 * grid, and by whom. */
#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

#define LLU(x) ((unsigned long long)(x))

/* ---- contributors --------------------------------------------------------------------------- */

/* As many as a ledger entry can name the claims of; the others' work goes into the next round. */
static void choose_contributors(struct core *c, struct round *r, bool only_planned) {
    uint32_t ranges = 0;
    struct plan *p = &r->plan;
    p->contributors = calloc(c->member_count, sizeof *p->contributors);
    assert(p->contributors);
    for (uint32_t i = 0; i < c->member_count; i++) {
        struct member *m = &c->members[i];
        struct part *part = core_part(r, m);
        bool fits = part->present && ranges + part->msg.ranges_count <= CORE_PLAN_RANGES_MAX;
        bool chosen = fits && m->here && !core_is_cut(c, m) && core_in_good_standing(m) &&
                      (!only_planned || part->planned);
        part->planned = chosen;
        part->dropped = false;
        if (!chosen) continue;
        ranges += part->msg.ranges_count;
        p->contributors[p->contributor_count++] =
            (struct msg_contributor){.member = m->id,
                                     .tokens = core_credit(c, r, m) * c->sequence,
                                     .root = part->msg.root,
                                     .norm = part->msg.norm,
                                     .clip = 1};
    }
}

static const struct part *part_of(const struct core *c, const struct round *r, uint32_t i) {
    return core_part(r, core_member(c, r->plan.contributors[i].member));
}

/* Samples, less for a member's first rounds, then all scaled down so that the sum of the weights
 * stays below 2^24, which keeps the sums of the aggregators inside 63 bits. */
static void set_weights(const struct core *c, struct plan *p) {
    const uint64_t limit = (1u << 24) - 1, largest = (uint64_t)1 << 39;
    uint64_t *weights = calloc(p->contributor_count, sizeof *weights), sum = 0;
    assert(weights);
    for (uint32_t i = 0; i < p->contributor_count; i++) {
        const struct member *m = core_member(c, p->contributors[i].member);
        uint64_t w = p->contributors[i].tokens / c->sequence, ramp = c->outer->ramp_rounds;
        if (w > largest) w = largest;
        if (m->rounds_summed + 1 < ramp) w = w * (m->rounds_summed + 1) / ramp;
        weights[i] = w ? w : 1;
        sum += weights[i];
    }
    for (uint32_t i = 0; i < p->contributor_count; i++) {
        uint64_t w = weights[i];
        if (sum > limit)
            w = (uint64_t)((double)w / (double)sum * (double)(limit - p->contributor_count));
        p->contributors[i].weight = (uint32_t)(w ? w : 1);
    }
    free(weights);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median_norm(const struct core *c, const struct round *r) {
    uint32_t n = r->plan.contributor_count;
    double *norms = calloc(n, sizeof *norms);
    assert(norms);
    for (uint32_t i = 0; i < n; i++) norms[i] = part_of(c, r, i)->msg.norm;
    qsort(norms, n, sizeof *norms, by_value);
    double median = (norms[(n - 1) / 2] + norms[n / 2]) / 2;
    free(norms);
    return median;
}

/* A contribution far larger than the others counts as one at the limit. */
static void set_clips(const struct core *c, struct round *r) {
    double limit = c->outer->clip_factor * median_norm(c, r);
    for (uint32_t i = 0; i < r->plan.contributor_count; i++) {
        double norm = part_of(c, r, i)->msg.norm;
        if (limit > 0 && norm > limit) r->plan.contributors[i].clip = (float)(limit / norm);
    }
}

/* The finest grid on which no contributor's largest value reaches 2^CORE_GRID_BITS. */
static void set_grid(const struct core *c, struct round *r) {
    double largest = 0;
    for (uint32_t i = 0; i < r->plan.contributor_count; i++) {
        double value = part_of(c, r, i)->msg.absmax * (double)r->plan.contributors[i].clip;
        if (value > largest) largest = value;
    }
    int exponent = CORE_GRID_EXPONENT_MAX;
    if (largest > 0) {
        int bits;
        frexp(largest, &bits); /* largest < 2^bits */
        if (CORE_GRID_BITS - bits < exponent) exponent = CORE_GRID_BITS - bits;
    }
    r->plan.grid_exponent = exponent;
}

/* ---- shards --------------------------------------------------------------------------------- */

/* A member that can sum, and how fast its results leave it. */
struct candidate {
    const struct member *m;
    double uplink;
    bool own;
};

/* Does it lack the state that the round builds on? Where the swarm's links are slow such members are busy, and leave
 * to find donors: after a plan that came to nothing the shards go to others. */
static bool lags(const struct shard_choice *choice, const struct member *m) {
    return choice->attempts && (!m->has_root || m->root_index < choice->round->base_index);
}

static bool is_avoided(const struct shard_choice *choice, const struct member *m) {
    return m->distrusted || core_part(choice->round, m)->avoid || lags(choice, m);
}

static bool can_serve(const struct shard_choice *choice, const struct member *m) {
    return choice->behind ? m->here && m->conn && core_in_good_standing(m) : core_serves(m);
}

/* Fastest first; among equals the own node, then the lowest id. */
static int by_uplink(const void *a, const void *b) {
    const struct candidate *x = a, *y = b;
    if (x->uplink != y->uplink) return x->uplink < y->uplink ? 1 : -1;
    if (x->own != y->own) return x->own ? -1 : 1;
    return (x->m->id > y->m->id) - (x->m->id < y->m->id);
}

static uint32_t find_candidates(const struct core *c, const struct shard_choice *choice,
                                bool avoided_too, struct candidate *list) {
    uint32_t n = 0;
    double middle = core_middle_uplink(c);
    for (uint32_t i = 0; i < c->member_count; i++) {
        const struct member *m = &c->members[i];
        if (!can_serve(choice, m) || !m->port || (!avoided_too && is_avoided(choice, m))) continue;
        list[n++] = (struct candidate){m, core_uplink(m, middle), core_is_own(c, m)};
    }
    qsort(list, n, sizeof *list, by_uplink);
    return n;
}

/* How many of the fastest: as long as the slowest one's share has shard_chunks. */
static uint32_t shard_number(const struct core *c, const struct candidate *list, uint32_t n,
                             uint32_t chunks) {
    uint32_t least = c->outer->shard_chunks ? c->outer->shard_chunks : chunks, shards = 0;
    double sum = 0;
    while (shards < n && shards < PROTO_SHARDS_MAX && shards < chunks) {
        sum += list[shards].uplink;
        if (shards && floor(chunks * (list[shards].uplink / sum)) < least) break;
        shards++;
    }
    return shards;
}

/* Chunks in proportion to the uplinks; what rounding leaves goes to the fastest. */
static void cut_shards(const struct candidate *list, uint32_t n, uint32_t first, uint32_t count,
                       struct plan *p) {
    double sum = 0;
    uint32_t left = count;
    struct shard *shards = p->shards + p->shard_count;
    for (uint32_t i = 0; i < n; i++) sum += list[i].uplink;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t share = n > 1 ? (uint32_t)(count * (list[i].uplink / sum)) : count;
        shards[i].where = (struct msg_shard){.count = share, .aggregator = list[i].m->id};
        left -= share;
    }
    for (uint32_t i = 0; left; i = (i + 1) % n, left--) shards[i].where.count++;
    for (uint32_t i = 0; i < n; i++) {
        shards[i].where.first = first;
        first += shards[i].where.count;
    }
    p->shard_count += n;
}

/* Best somebody not avoided, whom others can dial, on another host, of another invite: so that the
 * result can be had when the aggregator, or whoever runs it, is gone. */
static uint32_t holder_rank(const struct shard_choice *choice, const struct member *aggregator,
                            const struct member *m) {
    assert(aggregator);
    return (is_avoided(choice, m) ? 8u : 0u) + (m->port ? 0u : 4u) +
           (strcmp(m->host, aggregator->host) ? 0u : 2u) + (m->invite == aggregator->invite);
}

static const struct member *pick_holder(const struct core *c, const struct shard_choice *choice,
                                        const struct member *aggregator, uint32_t turn,
                                        const uint32_t *held) {
    const struct member *ties[PROTO_MEMBERS_MAX];
    uint64_t best = UINT64_MAX;
    uint32_t count = 0;
    for (uint32_t i = 0; i < c->member_count; i++) {
        const struct member *m = &c->members[i];
        if (m == aggregator || !can_serve(choice, m)) continue;
        uint64_t rank = (uint64_t)holder_rank(choice, aggregator, m) << 32 | held[i];
        if (rank < best) count = 0, best = rank;
        if (rank == best) ties[count++] = m;
    }
    return count ? ties[turn % count] : NULL;
}

bool core_assign_shards(const struct core *c, const struct shard_choice *choice, uint32_t first,
                        uint32_t count, struct plan *p) {
    struct candidate list[PROTO_MEMBERS_MAX];
    uint32_t held[PROTO_MEMBERS_MAX] = {0}, before = p->shard_count;
    uint32_t n = find_candidates(c, choice, false, list);
    if (!n) n = find_candidates(c, choice, true, list);
    uint32_t number = shard_number(c, list, n, count);
    if (!number || before + number > PROTO_SHARDS_MAX) return false;
    p->shards = realloc(p->shards, (before + number) * sizeof *p->shards);
    assert(p->shards);
    memset(p->shards + before, 0, number * sizeof *p->shards);
    cut_shards(list, number, first, count, p);
    for (uint32_t i = before; i < p->shard_count; i++) {
        struct msg_shard *s = &p->shards[i].where;
        uint32_t turn = (uint32_t)(choice->round->number + choice->attempts + i);
        const struct member *holder =
            pick_holder(c, choice, core_member(c, s->aggregator), turn, held);
        if (!holder) return false;
        s->holder = holder->id;
        held[holder->id - 1] += s->count;
    }
    return true;
}

/* ---- the plan ------------------------------------------------------------------------------- */

void core_forget_plan(struct plan *p) {
    for (uint32_t i = 0; i < p->shard_count; i++)
        for (int role = 0; role < REPORT_ROLES; role++)
            if (p->shards[i].reported[role])
                proto_copy_release(RECORD_shard_report, &p->shards[i].reports[role]);
    free(p->shards);
    free(p->contributors);
    *p = (struct plan){0};
}

/* Twice the time for every plan of a round that came to nothing: links may just be slow. */
uint64_t core_deadline(const struct core *c, uint32_t attempts, uint64_t now_ms) {
    uint32_t shift = attempts < CORE_BACKOFF_SHIFT_MAX ? attempts : CORE_BACKOFF_SHIFT_MAX;
    return now_ms + ((uint64_t)CORE_REPORT_SILENCES * c->outer->silence_ms_max << shift);
}

static void tell_waiting(struct round *r, struct core_actions *out) {
    if (!r->waiting_told)
        core_log(out, CORE_WARNING,
                 "round %llu of fragment %u is ready but waits for a member that others can dial "
                 "to aggregate, and for a second one to hold the result",
                 LLU(r->number), r->fragment);
    r->waiting_told = true;
}

bool core_make_plan(struct core *c, struct round *r, bool only_planned, uint64_t now_ms,
                    struct core_actions *out) {
    struct shard_choice choice = {.round = r, .attempts = r->attempts};
    core_forget_plan(&r->plan);
    r->plan = (struct plan){.fragment = r->fragment,
                            .round = r->number,
                            .base_index = r->base_index,
                            .codec = c->outer->result_codec};
    if (!core_assign_shards(c, &choice, 0, r->chunks, &r->plan)) {
        core_forget_plan(&r->plan);
        tell_waiting(r, out);
        return false;
    }
    choose_contributors(c, r, only_planned);
    assert(r->plan.contributor_count);
    set_weights(c, &r->plan);
    set_clips(c, r);
    set_grid(c, r);
    r->phase = ROUND_REDUCE;
    r->plan.number = ++c->plan;
    c->plans_made++;
    r->waiting_told = false;
    r->plan.deadline_ms = core_deadline(c, r->attempts, now_ms);
    core_log(out, CORE_INFO,
             "plan %llu for round %llu of fragment %u: %u contributors, %u shards, the first "
             "summed by member %u and held by member %u",
             LLU(c->plan), LLU(r->number), r->fragment, r->plan.contributor_count,
             r->plan.shard_count, r->plan.shards[0].where.aggregator,
             r->plan.shards[0].where.holder);
    core_send_plan_to_all(c, &r->plan, out);
    return true;
}

bool core_in_plan(const struct plan *p, const struct member *m) {
    for (uint32_t i = 0; i < p->shard_count; i++)
        if (p->shards[i].where.aggregator == m->id || p->shards[i].where.holder == m->id)
            return true;
    return core_contributor_index(p, m->id) >= 0;
}

int core_contributor_index(const struct plan *p, uint32_t member) {
    for (uint32_t i = 0; i < p->contributor_count; i++)
        if (p->contributors[i].member == member) return (int)i;
    return -1;
}

void core_send_plan(struct core *c, const struct plan *p, const struct member *m,
                    struct core_actions *out) {
    struct msg_shard shards[PROTO_SHARDS_MAX];
    struct msg_address addresses[PROTO_SHARDS_MAX];
    uint8_t seen[PROTO_SET_BYTES_MAX] = {0};
    struct msg_plan msg = {.fragment = p->fragment,
                           .round = p->round,
                           .base_index = p->base_index,
                           .resum = p->resum,
                           .grid_exponent = p->grid_exponent,
                           .codec = p->codec,
                           .contributors = p->contributors,
                           .contributors_count = p->contributor_count,
                           .shards = shards,
                           .shards_count = p->shard_count,
                           .addresses = addresses};
    for (uint32_t i = 0; i < p->shard_count; i++) {
        uint32_t aggregator = p->shards[i].where.aggregator;
        shards[i] = p->shards[i].where;
        if (proto_set_has(seen, aggregator - 1)) continue;
        proto_set_add(seen, aggregator - 1);
        if (core_address(m, core_member(c, aggregator), &addresses[msg.addresses_count]))
            msg.addresses_count++;
    }
    core_send(out, m, MSG_PLAN, p->number, &msg);
}

void core_send_plan_to_all(struct core *c, const struct plan *p, struct core_actions *out) {
    for (uint32_t i = 0; i < c->member_count; i++)
        if (core_in_plan(p, &c->members[i])) core_send_plan(c, p, &c->members[i], out);
}
