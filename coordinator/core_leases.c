/* core_leases.c - who may train on which samples. A sample is in exactly one place: not given out
 * yet (from next_sample on), in one lease, or spent by one commit. While it is in a lease it may be
 * in several contributions of the lease's member, one per fragment: the first that commits spends it. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

#define LLU(x) ((unsigned long long)(x))

/* ---- the table ------------------------------------------------------------------------------ */

/* Where the lease with this id is, or would be. */
static uint32_t lease_place(const struct core *c, uint64_t id) {
    uint32_t low = 0, high = c->lease_count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (c->leases[middle].id < id)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static struct lease *find_lease(const struct core *c, uint64_t id) {
    uint32_t i = lease_place(c, id);
    return i < c->lease_count && c->leases[i].id == id ? &c->leases[i] : NULL;
}

/* Sums that would otherwise be walks over the table. */
static void count_lease(struct core *c, const struct lease *l, bool add) {
    struct member *m = core_member(c, l->member);
    if (m) {
        m->lease_count += add ? 1 : -1;
        m->lease_samples += add ? l->count : -l->count;
    } else {
        c->returned_samples += add ? l->count : -l->count;
    }
}

void core_add_lease(struct core *c, const struct lease *lease) {
    uint32_t i = lease_place(c, lease->id);
    c->leases = core_grow32(c->leases, c->lease_count, &c->lease_capacity, sizeof *c->leases);
    memmove(&c->leases[i + 1], &c->leases[i], (c->lease_count - i) * sizeof *c->leases);
    c->leases[i] = *lease;
    c->lease_count++;
    count_lease(c, lease, true);
}

static void remove_lease(struct core *c, struct lease *l) {
    count_lease(c, l, false);
    uint32_t i = (uint32_t)(l - c->leases);
    memmove(l, l + 1, (c->lease_count - i - 1) * sizeof *l);
    c->lease_count--;
}

/* What its member may come back for stays its own on disk: after a restart we judge its silence anew. */
static void put_lease(struct batch *b, const struct lease *l) {
    struct msg_spend row = {.member = l->member ? l->member : l->former,
                            .lease = l->id,
                            .generation = l->generation,
                            .start = l->start,
                            .count = l->count};
    batch_put(b, CORE_LEASE, l->id, RECORD_spend, &row);
}

void core_rewrite_lease(const struct core *c, uint64_t id, struct batch *b) {
    const struct lease *l = find_lease(c, id);
    if (l)
        put_lease(b, l);
    else
        batch_delete(b, CORE_LEASE, id);
}

void core_add_returned(struct core *c, uint64_t start, uint64_t count, struct batch *b) {
    struct lease l = {.id = c->next_lease++, .start = start, .count = count};
    core_add_lease(c, &l);
    put_lease(b, &l);
}

/* ---- how much is left ----------------------------------------------------------------------- */

bool core_tokens_reached(const struct core *c) {
    return c->tokens_total && core_state_now(c)->tokens_committed >= c->tokens_total;
}

bool core_data_exhausted(const struct core *c) { return c->spent.total == c->samples_total; }

uint64_t core_samples_free(const struct core *c) {
    return c->samples_total - c->next_sample + c->returned_samples;
}

/* ---- granting ------------------------------------------------------------------------------- */

/* Samples of m's leases that a READY of it claims, each counted once however many claim it. */
static uint64_t claimed_samples(const struct core *c, const struct member *m) {
    uint64_t sum = 0;
    for (int pass = 0; pass < 2; pass++) /* clear the scratch ends, then take the furthest */
        for (uint32_t f = 0; f < c->fragments; f++) {
            const struct msg_ready *r = &m->parts[f].msg;
            for (uint32_t i = 0; m->parts[f].present && i < r->ranges_count; i++) {
                struct lease *l = find_lease(c, r->ranges[i].lease);
                struct msg_range left = core_unspent(c, m, &r->ranges[i]);
                if (!left.count) continue;
                if (pass == 0) {
                    l->claimed = 0;
                } else if (left.count > l->claimed) {
                    sum += left.count - l->claimed;
                    l->claimed = left.count;
                }
            }
        }
    return sum;
}

/* What may still be leased to m: two leases' worth beyond what its READYs claim. */
static uint64_t allowance(const struct core *c, const struct member *m) {
    uint64_t limit = 2 * (uint64_t)c->outer->lease_samples;
    uint64_t held = m->lease_samples - claimed_samples(c, m);
    return held < limit ? limit - held : 0;
}

static uint64_t grant_returned(struct core *c, struct member *m, struct lease *l, uint64_t wanted,
                               struct batch *b) {
    struct lease rest = {.id = c->next_lease};
    count_lease(c, l, false);
    if (l->count > wanted) {
        rest.start = l->start + wanted;
        rest.count = l->count - wanted;
        l->count = wanted;
    }
    l->member = m->id;
    l->former = 0;
    l->generation++;
    count_lease(c, l, true);
    put_lease(b, l);
    uint64_t granted = l->count;
    if (rest.count) { /* l is not valid after this */
        c->next_lease++;
        core_add_lease(c, &rest);
        put_lease(b, &rest);
    }
    return granted;
}

static uint64_t grant_new(struct core *c, struct member *m, uint64_t wanted, struct batch *b) {
    uint64_t left = c->samples_total - c->next_sample;
    struct lease l = {.id = c->next_lease++,
                      .start = c->next_sample,
                      .count = wanted < left ? wanted : left,
                      .generation = 1,
                      .member = m->id};
    c->next_sample += l.count;
    core_add_lease(c, &l);
    put_lease(b, &l);
    return l.count;
}

/* Is its member away since a short while only? It may come back with work on these samples. */
static bool is_kept(const struct core *c, const struct lease *l, uint64_t now_ms) {
    return l->former &&
           now_ms < l->returned_ms + (uint64_t)CORE_AWAY_SILENCES * c->outer->silence_ms_max;
}

static void grant_all_returned(struct core *c, struct member *m, bool kept_too, uint64_t now_ms,
                               uint64_t *wanted, struct batch *b) {
    for (uint32_t i = 0; i < c->lease_count && c->returned_samples; i++) {
        if (!*wanted || m->lease_count >= PROTO_LEASES_MAX) break;
        if (c->leases[i].member || (!kept_too && is_kept(c, &c->leases[i], now_ms))) continue;
        *wanted -= grant_returned(c, m, &c->leases[i], *wanted, b);
    }
}

/* Returned leases first: those samples are oldest, and the run must not end with a tail of them. But those
 * that a member may come back for last of all. */
static void grant(struct core *c, struct member *m, uint64_t wanted, uint64_t now_ms,
                  struct batch *b) {
    uint64_t sample_before = c->next_sample, lease_before = c->next_lease;
    grant_all_returned(c, m, false, now_ms, &wanted, b);
    if (wanted && m->lease_count < PROTO_LEASES_MAX && c->next_sample < c->samples_total)
        wanted -= grant_new(c, m, wanted, b);
    if (c->next_sample == c->samples_total) grant_all_returned(c, m, true, now_ms, &wanted, b);
    if (c->next_sample != sample_before) batch_put_meta(b, CORE_META_NEXT_SAMPLE, c->next_sample);
    if (c->next_lease != lease_before) batch_put_meta(b, CORE_META_NEXT_LEASE, c->next_lease);
}

void core_on_lease_ask(struct core *c, struct member *m, uint32_t samples, uint64_t now_ms,
                       struct core_actions *out) {
    if (m->asks++ >= CORE_ASKS_PER_TICK_MAX) {
        core_complain(c, out, CORE_WARNING,
                      WHO " asks for leases more than %u times a tick; not answered", WHO_OF(m),
                      CORE_ASKS_PER_TICK_MAX);
        return;
    }
    uint64_t allowed = allowance(c, m), wanted = samples < allowed ? samples : allowed;
    bool open = m->trains && core_may_train(m) && !c->paused && !c->closing &&
                now_ms >= c->hold_until_ms && !core_tokens_reached(c);
    struct batch b = {0};
    if (open) grant(c, m, wanted, now_ms, &b);
    core_emit_persist(out, &b);
    core_send_leases(c, m, out);
}

void core_send_leases(struct core *c, struct member *m, struct core_actions *out) {
    struct msg_lease list[PROTO_LEASES_MAX];
    struct msg_leases msg = {.leases = list};
    for (uint32_t i = 0; i < c->lease_count && msg.leases_count < PROTO_LEASES_MAX; i++) {
        const struct lease *l = &c->leases[i];
        if (l->member == m->id)
            list[msg.leases_count++] = (struct msg_lease){l->id, l->generation, l->start, l->count};
    }
    core_send(out, m, MSG_LEASES, 0, &msg);
}

/* ---- claims --------------------------------------------------------------------------------- */

static const struct lease *held_lease(const struct core *c, const struct member *m,
                                      const struct msg_lease *r) {
    const struct lease *l = find_lease(c, r->lease);
    return l && l->member == m->id && l->generation == r->generation ? l : NULL;
}

/* Were samples [start, end) of the claimed lease all spent by commits that summed m? Those of one
 * lease are spent in order. */
static bool were_spent_by(const struct member *m, const struct msg_lease *r, uint64_t start,
                          uint64_t end) {
    for (uint32_t i = 0; i < m->recent_count && start < end; i++) {
        const struct recent *s = &m->recent[i];
        if (s->lease == r->lease && s->generation == r->generation && s->start <= start &&
            start < s->start + s->count)
            start = s->start + s->count;
    }
    return start >= end;
}

struct msg_range core_unspent(const struct core *c, const struct member *m,
                              const struct msg_lease *claim) {
    const struct lease *l = held_lease(c, m, claim);
    uint64_t end = claim->start + claim->count;
    if (!l || end <= l->start) return (struct msg_range){0};
    return (struct msg_range){l->start, end - l->start};
}

static int check_claim(const struct core *c, const struct member *m, const struct msg_lease *r,
                       struct err *err) {
    const struct lease *l = held_lease(c, m, r);
    if (r->count == 0 || r->start >= c->samples_total || r->count > c->samples_total - r->start)
        return err_set(err, ERR_REFUSED, "lease %llu: samples %llu+%llu do not exist",
                       LLU(r->lease), LLU(r->start), LLU(r->count));
    uint64_t end = r->start + r->count, spent_end = l && l->start < end ? l->start : end;
    if (!were_spent_by(m, r, r->start, spent_end))
        return l ? err_set(err, ERR_REFUSED,
                           "lease %llu has samples %llu+%llu, claimed were %llu+%llu",
                           LLU(r->lease), LLU(l->start), LLU(l->count), LLU(r->start),
                           LLU(r->count))
                 : err_set(err, ERR_REFUSED, "lease %llu generation %u is not yours (any more)",
                           LLU(r->lease), r->generation);
    if (l && (r->start > l->start || end > l->start + l->count))
        return err_set(err, ERR_REFUSED, "lease %llu has samples %llu+%llu, claimed were %llu+%llu",
                       LLU(r->lease), LLU(l->start), LLU(l->count), LLU(r->start), LLU(r->count));
    return 0;
}

/* A few hundred at most, so two loops will do. */
int core_check_claims(const struct core *c, const struct member *m, const struct msg_lease *ranges,
                      uint32_t count, uint64_t *unspent, struct err *err) {
    uint64_t sum = 0;
    for (uint32_t i = 0; i < count; i++) {
        for (uint32_t j = 0; j < i; j++)
            if (ranges[j].lease == ranges[i].lease)
                return err_set(err, ERR_REFUSED, "lease %llu is claimed twice",
                               LLU(ranges[i].lease));
        if (check_claim(c, m, &ranges[i], err)) return -1;
        sum += core_unspent(c, m, &ranges[i]).count;
    }
    *unspent = sum;
    return 0;
}

void core_spend(struct core *c, const struct msg_spend *spent, uint32_t count, struct batch *b) {
    for (uint32_t i = 0; i < count; i++) {
        struct lease *l = find_lease(c, spent[i].lease);
#ifdef SIM_FAULTS
        if (core_fault == CORE_FAULT_SPENDS_OTHER_FRAGMENT_AGAIN &&
            (!l || l->start != spent[i].start || l->count < spent[i].count))
            continue;
#endif
        assert(l && l->count >= spent[i].count);
        if (l->count == spent[i].count) {
            batch_delete(b, CORE_LEASE, l->id);
            remove_lease(c, l);
            continue;
        }
        count_lease(c, l, false);
        l->start += spent[i].count;
        l->count -= spent[i].count;
        count_lease(c, l, true);
        put_lease(b, l);
    }
}

static bool in_any_plan(const struct core *c, const struct member *m) {
    for (uint32_t f = 0; f < c->fragments; f++)
        if (m->parts[f].present && m->parts[f].planned) return true;
    return false;
}

uint64_t core_return_leases(struct core *c, struct batch *b) {
    uint64_t samples = 0;
    for (uint32_t i = 0; i < c->lease_count; i++) {
        struct lease *l = &c->leases[i];
        struct member *m = core_member(c, l->member);
        if (!m || (m->here && core_may_train(m)) || in_any_plan(c, m)) continue;
        count_lease(c, l, false);
        l->member = 0;
        l->former = core_may_train(m) && !m->left ? m->id : 0;
        l->returned_ms = c->tick_ms;
        count_lease(c, l, true);
        if (!l->former) put_lease(b, l);
        samples += l->count;
#ifdef SIM_FAULTS
        if (core_fault == CORE_FAULT_LEASE_RETURNED_TWICE) {
            core_add_returned(c, l->start, l->count, b);
            batch_put_meta(b, CORE_META_NEXT_LEASE, c->next_lease);
        }
#endif
    }
    return samples;
}

uint64_t core_take_back_leases(struct core *c, struct member *m) {
    uint64_t samples = 0;
    for (uint32_t i = 0; i < c->lease_count && c->returned_samples; i++) {
        struct lease *l = &c->leases[i];
        if (l->member || l->former != m->id || m->lease_count >= PROTO_LEASES_MAX) continue;
        count_lease(c, l, false);
        l->member = m->id;
        l->former = 0;
        count_lease(c, l, true);
        samples += l->count;
    }
    return samples;
}
