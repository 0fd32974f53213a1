/* core_load.c - the state from the rows of the store, and what a start puts right: the ledger is
 * never behind, but a store that took over a newer one has lost leases, and a rewind frees samples. */
#include <assert.h>
#include <string.h>

#include "coordinator/core_internal.h"

#define LLU(x) ((unsigned long long)(x))

static bool was_granted_again(const struct core *c, const struct lease *l) {
    for (uint32_t i = 0; i < c->regrant_count; i++)
        if (c->regrants[i].lease == l->id && c->regrants[i].generation > l->generation) return true;
    return false;
}

/* The row as it is, or what of it nobody has spent: pieces, the first of which keeps the id, unless somebody else
 * had it since: what its former holder makes of it holds samples that the other one spent. The others are found as
 * gaps, and become returned leases, when the core starts. */
static void add_unspent(struct core *c, struct lease *l) {
    uint64_t start = l->start, count = 0, end = l->start + l->count;
    bool again = was_granted_again(c, l);
    if (again || interval_overlaps(&c->spent, l->start, l->count)) {
        c->stale = core_grow32(c->stale, c->stale_count, &c->stale_capacity, sizeof *c->stale);
        c->stale[c->stale_count++] = l->id;
    }
    if (again || !interval_gap(&c->spent, end, &start, &count)) return;
    interval_add(&c->leased_at_load, start, count);
    l->start = start;
    l->count = count;
    core_add_lease(c, l);
}

static int load_lease(struct core *c, uint64_t key, const uint8_t *value, size_t length,
                      struct err *err) {
    struct msg_spend s = {0};
    if (proto_decode(value, length, RECORD_spend, &s, err)) return -1;
    bool inside = s.count && s.start < c->samples_total && s.count <= c->samples_total - s.start;
    if (s.lease != key || !inside || (s.member && !core_member(c, s.member)))
        return err_set(err, ERR_CORRUPT,
                       "lease row %llu (lease %llu, member %u, samples %llu+%llu) makes no sense",
                       LLU(key), LLU(s.lease), s.member, LLU(s.start), LLU(s.count));
    if (interval_overlaps(&c->leased_at_load, s.start, s.count))
        return err_set(err, ERR_CORRUPT, "lease %llu: samples %llu+%llu are leased already",
                       LLU(key), LLU(s.start), LLU(s.count));
    if (s.lease >= c->next_lease) c->next_lease = s.lease + 1;
    add_unspent(c, &(struct lease){.id = s.lease,
                                   .start = s.start,
                                   .count = s.count,
                                   .generation = s.generation,
                                   .member = s.member});
    return 0;
}

static int load_meta(struct core *c, uint64_t key, const uint8_t *value, size_t length,
                     struct err *err) {
    uint64_t number = 0;
    if (length != 8)
        return err_set(err, ERR_CORRUPT, "meta row %llu has %zu bytes, not 8", LLU(key), length);
    for (int i = 0; i < 8; i++) number |= (uint64_t)value[i] << (8 * i);
    switch (key) {
    case CORE_META_NEXT_SAMPLE:
        if (number > c->samples_total)
            return err_set(err, ERR_CORRUPT, "next sample %llu of %llu", LLU(number),
                           LLU(c->samples_total));
        c->next_sample = number;
        return 0;
    case CORE_META_NEXT_LEASE:
        if (number > c->next_lease) c->next_lease = number;
        return 0;
    case CORE_META_PAUSED: c->paused = number != 0; return 0;
    }
    return err_set(err, ERR_CORRUPT, "unknown meta row %llu", LLU(key));
}

int core_load(struct core *c, enum core_table table, uint64_t key, const uint8_t *value,
              size_t length, struct err *err) {
    assert(!c->started);
    struct err why = {0};
    int result = table == CORE_LEDGER  ? core_take_entry(c, key, value, length, &why)
                 : table == CORE_LEASE ? load_lease(c, key, value, length, &why)
                 : table == CORE_META  ? load_meta(c, key, value, length, &why)
                                       : 0; /* invites: the shell looks them up itself */
    return result ? err_set(err, ERR_CORRUPT, "store: %s", why.msg) : 0;
}

/* ---- at the start --------------------------------------------------------------------------- */

static uint64_t end_of(const struct interval_set *s) {
    return s->count ? s->list[s->count - 1].start + s->list[s->count - 1].count : 0;
}

/* Samples below the cursor that are neither spent nor in a row. */
static uint64_t return_lost_samples(struct core *c, struct batch *b) {
    uint64_t start = 0, count = 0, samples = 0, before = c->next_lease;
    while (interval_gap(&c->spent, c->next_sample, &start, &count)) {
        uint64_t end = start + count, length = 0;
        while (interval_gap(&c->leased_at_load, end, &start, &length)) {
            core_add_returned(c, start, length, b);
            samples += length;
            start += length;
        }
        start = end;
    }
    if (c->next_lease != before) batch_put_meta(b, CORE_META_NEXT_LEASE, c->next_lease);
    return samples;
}

/* Ids of this term are above all that an older copy of the store may have given. */
void core_put_right(struct core *c, struct core_actions *out) {
    struct batch b = {0};
    uint64_t spent = end_of(&c->spent), leased = end_of(&c->leased_at_load),
             end = spent > leased ? spent : leased;
    if (c->next_lease < c->term << 24) c->next_lease = c->term << 24;
    if (end > c->next_sample) {
        core_log(out, CORE_WARNING,
                 "store: sample %llu was to be leased next, but those up to %llu have been; gone "
                 "on from there",
                 LLU(c->next_sample), LLU(end));
        c->next_sample = end;
        batch_put_meta(&b, CORE_META_NEXT_SAMPLE, end);
    }
    uint64_t samples = return_lost_samples(c, &b);
    if (samples)
        core_log(out, CORE_WARNING,
                 "%llu samples that were handed out are neither spent nor leased: they are free "
                 "again",
                 LLU(samples));
    for (uint32_t i = 0; i < c->stale_count; i++) core_rewrite_lease(c, c->stale[i], &b);
    core_return_leases(c, &b); /* of who was put aside a moment before we died */
    core_emit_persist(out, &b);
    interval_release(&c->leased_at_load);
    c->regrant_count = 0;
}
