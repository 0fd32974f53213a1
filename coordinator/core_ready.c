/* core_ready.c - contributions are announced, and frozen into a plan: who is summed with which
 * weight, on which grid, by whom. */
#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

/* ---- READY ---------------------------------------------------------------------------------- */

void core_forget_ready(struct member *m) {
    if (m->ready.present) proto_copy_release(RECORD_ready, &m->ready.msg);
    memset(&m->ready, 0, sizeof m->ready);
}

static bool same_ready(const struct msg_ready *a, const struct msg_ready *b) {
    if (!digest_equal(&a->root, &b->root) || a->round != b->round ||
        a->base_index != b->base_index || a->ranges_count != b->ranges_count ||
        a->norm != b->norm || a->absmax != b->absmax)
        return false;
    for (uint32_t i = 0; i < a->ranges_count; i++) {
        const struct msg_lease *x = &a->ranges[i], *y = &b->ranges[i];
        if (x->lease != y->lease || x->generation != y->generation || x->start != y->start ||
            x->count != y->count)
            return false;
    }
    return true;
}

/* What a member says of its bytes must be possible; the bytes are checked where they arrive. */
static int check_form(const struct core *c, const struct msg_ready *msg, struct err *err) {
    double slack = 1 + 1e-5, root_n = sqrt((double)c->elements);
    if (msg->codec != c->outer->contribution_codec)
        return err_set(err, ERR_REFUSED, "codec %u, this run's is %u", msg->codec,
                       c->outer->contribution_codec);
    if (msg->chunks != c->chunks)
        return err_set(err, ERR_REFUSED, "%u chunks, the model has %u", msg->chunks, c->chunks);
    if (digest_is_zero(&msg->root))
        return err_set(err, ERR_REFUSED, "the root of its chunks is missing");
    if (!(msg->absmax >= 0) || !(msg->absmax < CORE_ABSMAX_LIMIT) ||
        !(msg->norm >= msg->absmax / slack) || !(msg->norm <= msg->absmax * root_n * slack))
        return err_set(err, ERR_REFUSED,
                       "norm %g and largest value %g of %llu elements are impossible", msg->norm,
                       msg->absmax, (unsigned long long)c->elements);
    return 0;
}

static int check_ready(struct core *c, const struct member *m, const struct msg_ready *msg,
                       uint64_t *samples, struct core_actions *out, struct err *err) {
    if (check_form(c, msg, err) ||
        core_check_claims(c, m, msg->ranges, msg->ranges_count, samples, err))
        return -1;
    for (uint32_t i = 0; i < msg->ranges_count; i++) {
        const struct msg_lease *r = &msg->ranges[i];
        if (!interval_overlaps(&c->spent, r->start, r->count)) continue;
        core_log(out, CORE_ERROR,
                 "lease %llu of " WHO " holds samples %llu+%llu that are spent: a bug here",
                 (unsigned long long)r->lease, WHO_OF(m), (unsigned long long)r->start,
                 (unsigned long long)r->count);
        return err_set(err, ERR_REFUSED, "lease %llu holds samples that are spent",
                       (unsigned long long)r->lease);
    }
    return 0;
}

/* The member goes back to the anchor and works on what the LEASES that follow say. */
static void reset_member(struct core *c, struct member *m, const char *why,
                         struct core_actions *out) {
    struct msg_reset msg = {.fragment = 0, .reason = proto_str(why)};
    if (msg.reason.length > PROTO_TEXT_BYTES_MAX) msg.reason.length = PROTO_TEXT_BYTES_MAX;
    core_complain(c, out, CORE_WARNING,
                  "contribution of " WHO " to round %llu refused: %s; it starts again", WHO_OF(m),
                  (unsigned long long)core_round(c), why);
    core_send(out, m, MSG_RESET, 0, &msg);
    core_send_leases(c, m, out);
}

/* True if the READY belongs to the current round. An old one crossed its commit on the way. */
static bool is_of_this_round(struct core *c, struct member *m, const struct msg_ready *msg,
                             struct core_actions *out) {
    const struct state *s = core_state_now(c);
    if (!m->trains || msg->fragment != 0) {
        core_close(c, out, m->conn, ERR_PROTOCOL, false,
                   "READY of fragment %u from a member that %s", msg->fragment,
                   m->trains ? "has only fragment 0" : "does not train");
        return false;
    }
    if (msg->round < core_round(c) || msg->base_index < s->index) return false;
    if (msg->round == core_round(c) && msg->base_index == s->index) return true;
    core_close(c, out, m->conn, ERR_PROTOCOL, false,
               "READY of round %llu on ledger %llu; the newest is %llu on %llu",
               (unsigned long long)msg->round, (unsigned long long)msg->base_index,
               (unsigned long long)core_round(c), (unsigned long long)s->index);
    return false;
}

void core_on_ready(struct core *c, struct member *m, const struct msg_ready *msg,
                   struct core_actions *out) {
    struct err err;
    uint64_t samples = 0;
    if (c->phase == CORE_COMPLETE || !is_of_this_round(c, m, msg, out)) return;
    if (m->ready.present && same_ready(&m->ready.msg, msg)) {
        if (m->ready.planned) core_send_plan(c, m, out);
        return;
    }
    if (core_note_root(c, m, msg->base_index, &msg->state_root, out) != ROOT_AGREES) return;
    if (m->ready.planned) {
        reset_member(c, m, "another contribution of yours is in the plan", out);
        return;
    }
    core_forget_ready(m);
    if (check_ready(c, m, msg, &samples, out, &err)) {
        reset_member(c, m, err.msg, out);
        return;
    }
    int failed = proto_copy(RECORD_ready, msg, &m->ready.msg, NULL);
    assert(!failed);
    m->ready.present = true;
    m->ready.samples = samples;
    core_log(out, CORE_INFO, WHO " is ready for round %llu: %llu samples, norm %.4g, loss %.4f",
             WHO_OF(m), (unsigned long long)core_round(c), (unsigned long long)samples, msg->norm,
             msg->loss);
}

/* ---- is it time? ---------------------------------------------------------------------------- */

/* A trainer that works on the current state, or could. */
static bool is_awaited(const struct core *c, const struct member *m) {
    bool has_data = m->lease_count || (core_samples_free(c) && !core_tokens_reached(c));
    return m->here && m->trains && !m->catching_up && !m->ready.present && has_data;
}

/* How many contributions the round needs, of how many there are and are still awaited. */
uint32_t core_quorum_needed(const struct core *c, uint32_t *ready, uint32_t *waited) {
    *ready = *waited = 0;
    for (uint32_t i = 0; i < c->member_count; i++) {
        const struct member *m = &c->members[i];
        *ready += m->here && m->ready.present;
        *waited += is_awaited(c, m);
    }
    uint32_t reachable = *ready + *waited,
             need = c->outer->quorum < reachable ? c->outer->quorum : reachable;
    return need ? need : 1;
}

void core_try_plan(struct core *c, uint64_t now_ms, struct core_actions *out) {
    uint32_t ready, waited;
    if (c->phase != CORE_TRAIN || c->paused || !c->started) return;
    if (core_quorum_needed(c, &ready, &waited) > ready) {
        c->quorum_reached = false;
        return;
    }
    if (!c->quorum_reached) {
        c->quorum_reached = true;
        c->quorum_ms = now_ms;
    }
    if (waited && now_ms - c->quorum_ms < c->outer->grace_ms) return;
    core_make_plan(c, false, now_ms, out);
}

/* ---- the plan ------------------------------------------------------------------------------- */

/* As many as a ledger entry can name the claims of; the others' work goes into the next round. */
static void choose_contributors(struct core *c, bool only_planned) {
    uint32_t ranges = 0;
    c->contributor_count = 0;
    for (uint32_t i = 0; i < c->member_count; i++) {
        struct member *m = &c->members[i];
        bool fits = m->ready.present && ranges + m->ready.msg.ranges_count <= CORE_PLAN_RANGES_MAX;
        bool chosen = fits && m->here && (!only_planned || m->ready.planned);
        m->ready.planned = chosen;
        m->ready.dropped = false;
        if (!chosen) continue;
        ranges += m->ready.msg.ranges_count;
        c->contributors[c->contributor_count++] =
            (struct msg_contributor){.member = m->id,
                                     .tokens = m->ready.samples * c->sequence,
                                     .root = m->ready.msg.root,
                                     .norm = m->ready.msg.norm,
                                     .clip = 1};
    }
}

/* Samples, less for a member's first rounds, then all scaled down so that the sum of the weights
 * stays below 2^24, which keeps the sums of the aggregators inside 63 bits. */
static void set_weights(struct core *c) {
    const uint64_t limit = (1u << 24) - 1, largest = (uint64_t)1 << 39;
    uint64_t *weights = calloc(c->contributor_count, sizeof *weights), sum = 0;
    assert(weights);
    for (uint32_t i = 0; i < c->contributor_count; i++) {
        const struct member *m = core_member(c, c->contributors[i].member);
        uint64_t w = m->ready.samples < largest ? m->ready.samples : largest,
                 ramp = c->outer->ramp_rounds;
        if (m->rounds_summed + 1 < ramp) w = w * (m->rounds_summed + 1) / ramp;
        weights[i] = w ? w : 1;
        sum += weights[i];
    }
    for (uint32_t i = 0; i < c->contributor_count; i++) {
        uint64_t w = weights[i];
        if (sum > limit)
            w = (uint64_t)((double)w / (double)sum * (double)(limit - c->contributor_count));
        c->contributors[i].weight = (uint32_t)(w ? w : 1);
    }
    free(weights);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median_norm(const struct core *c) {
    uint32_t n = c->contributor_count;
    double *norms = calloc(n, sizeof *norms);
    assert(norms);
    for (uint32_t i = 0; i < n; i++)
        norms[i] = core_member(c, c->contributors[i].member)->ready.msg.norm;
    qsort(norms, n, sizeof *norms, by_value);
    double median = (norms[(n - 1) / 2] + norms[n / 2]) / 2;
    free(norms);
    return median;
}

/* A contribution far larger than the others counts as one at the limit. */
static void set_clips(struct core *c) {
    double limit = c->outer->clip_factor * median_norm(c);
    for (uint32_t i = 0; i < c->contributor_count; i++) {
        double norm = core_member(c, c->contributors[i].member)->ready.msg.norm;
        if (limit > 0 && norm > limit) c->contributors[i].clip = (float)(limit / norm);
    }
}

/* The finest grid on which no contributor's largest value reaches 2^CORE_GRID_BITS. */
static void set_grid(struct core *c) {
    double largest = 0;
    for (uint32_t i = 0; i < c->contributor_count; i++) {
        const struct msg_contributor *k = &c->contributors[i];
        double value = core_member(c, k->member)->ready.msg.absmax * (double)k->clip;
        if (value > largest) largest = value;
    }
    int exponent = CORE_GRID_EXPONENT_MAX;
    if (largest > 0) {
        int bits;
        frexp(largest, &bits); /* largest < 2^bits */
        if (CORE_GRID_BITS - bits < exponent) exponent = CORE_GRID_BITS - bits;
    }
    c->grid_exponent = exponent;
}

/* The own node if it can, else the member of the lowest id that others can dial. */
static const struct member *pick_aggregator(const struct core *c, bool avoided_too) {
    const struct member *own = core_own(c);
    if (own && core_serves(own) && own->port && (avoided_too || !own->avoid)) return own;
    for (uint32_t i = 0; i < c->member_count; i++) {
        const struct member *m = &c->members[i];
        if (core_serves(m) && m->port && (avoided_too || !m->avoid)) return m;
    }
    return NULL;
}

/* Best those that can be dialled, so that the result can be had when the aggregator is gone. */
static uint32_t holder_rank(const struct member *m) {
    return (m->avoid ? 2u : 0u) + (m->port ? 0u : 1u);
}

static const struct member *pick_holder(const struct core *c, const struct member *aggregator) {
    uint32_t best = UINT32_MAX, count = 0;
    for (uint32_t i = 0; i < c->member_count; i++) {
        const struct member *m = &c->members[i];
        if (m == aggregator || !core_serves(m)) continue;
        if (holder_rank(m) < best) count = 0;
        if (holder_rank(m) <= best) count++, best = holder_rank(m);
    }
    if (!count) return NULL;
    uint64_t turn = (core_round(c) + c->attempts) % count;
    for (uint32_t i = 0; i < c->member_count; i++) {
        const struct member *m = &c->members[i];
        if (m == aggregator || !core_serves(m) || holder_rank(m) != best) continue;
        if (turn-- == 0) return m;
    }
    return NULL;
}

/* One shard for now: the whole fragment. */
static bool assign_shards(struct core *c) {
    const struct member *aggregator = pick_aggregator(c, false);
    if (!aggregator) aggregator = pick_aggregator(c, true);
    const struct member *holder = aggregator ? pick_holder(c, aggregator) : NULL;
    if (!holder) return false;
    core_forget_reports(c);
    c->shard_count = 1;
    c->shards[0].where = (struct msg_shard){0, c->chunks, aggregator->id, holder->id};
    return true;
}

static void tell_waiting(struct core *c, struct core_actions *out) {
    if (!c->waiting_told)
        core_log(out, CORE_WARNING,
                 "round %llu is ready but waits for a member that others can dial to aggregate, "
                 "and for a second one to hold the result",
                 (unsigned long long)core_round(c));
    c->waiting_told = true;
}

bool core_make_plan(struct core *c, bool only_planned, uint64_t now_ms, struct core_actions *out) {
    if (!assign_shards(c)) {
        tell_waiting(c, out);
        return false;
    }
    choose_contributors(c, only_planned);
    assert(c->contributor_count);
    set_weights(c);
    set_clips(c);
    set_grid(c);
    c->phase = CORE_REDUCE;
    c->plan++;
    c->plans_made++;
    c->waiting_told = false;
    core_set_deadline(c, now_ms);
    core_log(out, CORE_INFO,
             "plan %llu for round %llu: %u contributors, member %u aggregates, member %u holds",
             (unsigned long long)c->plan, (unsigned long long)core_round(c), c->contributor_count,
             c->shards[0].where.aggregator, c->shards[0].where.holder);
    for (uint32_t i = 0; i < c->member_count; i++)
        if (core_in_plan(c, &c->members[i])) core_send_plan(c, &c->members[i], out);
    return true;
}

bool core_in_plan(const struct core *c, const struct member *m) {
    if (m->ready.planned) return true;
    for (uint32_t i = 0; i < c->shard_count; i++)
        if (c->shards[i].where.aggregator == m->id || c->shards[i].where.holder == m->id)
            return true;
    return false;
}

int core_contributor_index(const struct core *c, uint32_t member) {
    for (uint32_t i = 0; i < c->contributor_count; i++)
        if (c->contributors[i].member == member) return (int)i;
    return -1;
}

void core_send_plan(struct core *c, const struct member *m, struct core_actions *out) {
    struct msg_shard shards[CORE_SHARDS_MAX];
    struct msg_address addresses[CORE_SHARDS_MAX];
    struct msg_plan msg = {.round = core_round(c),
                           .base_index = core_state_now(c)->index,
                           .grid_exponent = c->grid_exponent,
                           .codec = c->outer->result_codec,
                           .contributors = c->contributors,
                           .contributors_count = c->contributor_count,
                           .shards = shards,
                           .shards_count = c->shard_count,
                           .addresses = addresses};
    for (uint32_t i = 0; i < c->shard_count; i++) {
        shards[i] = c->shards[i].where;
        if (core_address(m, core_member(c, shards[i].aggregator), &addresses[msg.addresses_count]))
            msg.addresses_count++;
    }
    core_send(out, m, MSG_PLAN, c->plan, &msg);
}
