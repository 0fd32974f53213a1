/* core_leases.c - who may train on which samples. A sample is in exactly one place: not given out
 * yet (from next_sample on), in one lease, or spent by one commit. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

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

static void put_lease(struct batch *b, const struct lease *l) {
    struct msg_spend row = {.member = l->member,
                            .lease = l->id,
                            .generation = l->generation,
                            .start = l->start,
                            .count = l->count};
    batch_put(b, CORE_LEASE, l->id, RECORD_spend, &row);
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

/* What may still be leased to m: two leases' worth beyond what its READY claims. */
static uint64_t allowance(const struct core *c, const struct member *m) {
    uint64_t limit = 2 * (uint64_t)c->outer->lease_samples;
    uint64_t held = m->lease_samples - (m->ready.present ? m->ready.samples : 0);
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

/* Returned leases first: those samples are oldest, and the run must not end with a tail of them. */
static void grant(struct core *c, struct member *m, uint64_t wanted, struct batch *b) {
    uint64_t sample_before = c->next_sample, lease_before = c->next_lease;
    for (uint32_t i = 0; i < c->lease_count && c->returned_samples; i++) {
        if (!wanted || m->lease_count >= PROTO_LEASES_MAX) break;
        if (c->leases[i].member) continue;
        wanted -= grant_returned(c, m, &c->leases[i], wanted, b);
    }
    if (wanted && m->lease_count < PROTO_LEASES_MAX && c->next_sample < c->samples_total)
        grant_new(c, m, wanted, b);
    if (c->next_sample != sample_before) batch_put_meta(b, CORE_META_NEXT_SAMPLE, c->next_sample);
    if (c->next_lease != lease_before) batch_put_meta(b, CORE_META_NEXT_LEASE, c->next_lease);
}

void core_on_lease_ask(struct core *c, struct member *m, uint32_t samples,
                       struct core_actions *out) {
    if (m->asks++ >= CORE_ASKS_PER_TICK_MAX) {
        core_complain(c, out, CORE_WARNING,
                      WHO " asks for leases more than %u times a tick; not answered", WHO_OF(m),
                      CORE_ASKS_PER_TICK_MAX);
        return;
    }
    uint64_t allowed = allowance(c, m), wanted = samples < allowed ? samples : allowed;
    bool open = m->trains && !c->paused && c->phase != CORE_COMPLETE && !core_tokens_reached(c);
    struct batch b = {0};
    if (open) grant(c, m, wanted, &b);
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

static int check_claim(const struct core *c, const struct member *m, const struct msg_lease *r,
                       struct err *err) {
    const struct lease *l = find_lease(c, r->lease);
    if (!l || l->member != m->id || l->generation != r->generation)
        return err_set(err, ERR_REFUSED, "lease %llu generation %u is not yours (any more)",
                       (unsigned long long)r->lease, r->generation);
    if (r->start != l->start || r->count == 0 || r->count > l->count)
        return err_set(err, ERR_REFUSED, "lease %llu has samples %llu+%llu, claimed were %llu+%llu",
                       (unsigned long long)r->lease, (unsigned long long)l->start,
                       (unsigned long long)l->count, (unsigned long long)r->start,
                       (unsigned long long)r->count);
    return 0;
}

/* A few hundred at most, so two loops will do. */
int core_check_claims(const struct core *c, const struct member *m, const struct msg_lease *ranges,
                      uint32_t count, uint64_t *samples, struct err *err) {
    uint64_t sum = 0;
    if (count == 0) return err_set(err, ERR_REFUSED, "it claims no samples");
    for (uint32_t i = 0; i < count; i++) {
        for (uint32_t j = 0; j < i; j++)
            if (ranges[j].lease == ranges[i].lease)
                return err_set(err, ERR_REFUSED, "lease %llu is claimed twice",
                               (unsigned long long)ranges[i].lease);
        if (check_claim(c, m, &ranges[i], err)) return -1;
        sum += ranges[i].count;
    }
    *samples = sum;
    return 0;
}

void core_spend_claims(struct core *c, struct member *m, const struct msg_lease *ranges,
                       uint32_t count, struct batch *b) {
    for (uint32_t i = 0; i < count; i++) {
        struct lease *l = find_lease(c, ranges[i].lease);
        assert(l && l->member == m->id && l->start == ranges[i].start &&
               l->count >= ranges[i].count);
        if (l->count == ranges[i].count) {
            batch_delete(b, CORE_LEASE, l->id);
            remove_lease(c, l);
            continue;
        }
        count_lease(c, l, false);
        l->start += ranges[i].count;
        l->count -= ranges[i].count;
        count_lease(c, l, true);
        put_lease(b, l);
    }
}

uint64_t core_return_leases(struct core *c, struct batch *b) {
    uint64_t samples = 0;
    for (uint32_t i = 0; i < c->lease_count; i++) {
        struct lease *l = &c->leases[i];
        struct member *m = core_member(c, l->member);
        if (!m || m->here || (m->ready.present && m->ready.planned)) continue;
        count_lease(c, l, false);
        l->member = 0;
        count_lease(c, l, true);
        put_lease(b, l);
        samples += l->count;
    }
    return samples;
}
