/* oracle.c - what must hold after every event, computed independently of the code under test. */
#include "tests/sim/sim.h"

#include <stdlib.h>
#include <string.h>

#define LLU(x) ((unsigned long long)(x))

/* ---- the ledger: one commit a round, every sample once, leases disjoint
 * -------------------------- */

static void check_commit(struct sim_world *w, const struct msg_commit *c) {
    if (c->round != w->next_round)
        sim_violation(w, "a commit of round %llu is written, the next one is %llu", LLU(c->round),
                      LLU(w->next_round));
    w->next_round++;
    w->commits++;
    for (uint32_t i = 0; i < c->summed_count; i++)
        if (!c->summed[i].weight)
            sim_violation(w, "round %llu commits chunks of weight 0", LLU(c->round));
    for (uint32_t i = 0; i < c->spent_count; i++)
        for (uint64_t s = c->spent[i].start; s < c->spent[i].start + c->spent[i].count; s++) {
            if (s >= w->corpus.samples)
                sim_violation(w, "sample %llu is spent, there are %llu", LLU(s),
                              LLU(w->corpus.samples));
            if (proto_set_has(w->spent, (uint32_t)s))
                sim_violation(w, "sample %llu is spent twice", LLU(s));
            proto_set_add(w->spent, (uint32_t)s);
        }
    sim_trace(w, "round %llu commits: %u contributors, %u spends", LLU(c->round),
              c->contributors_count, c->spent_count);
}

static void check_leases(struct sim_world *w) {
    uint8_t owned[SIM_SAMPLES_MAX / 8];
    struct err err;
    memcpy(owned, w->spent, sizeof owned);
    for (uint32_t i = 0; i < w->store[CORE_LEASE].count; i++) {
        struct sim_row *r = &w->store[CORE_LEASE].rows[i];
        struct msg_spend l;
        if (proto_decode(r->value, r->length, RECORD_spend, &l, &err))
            sim_violation(w, "lease row: %s", err.msg);
        for (uint64_t s = l.start; s < l.start + l.count; s++) {
            if (s >= w->corpus.samples || proto_set_has(owned, (uint32_t)s))
                sim_violation(w,
                              "sample %llu of lease %llu is leased twice, or spent, or not there",
                              LLU(s), LLU(l.lease));
            proto_set_add(owned, (uint32_t)s);
        }
    }
    struct sim_row *next = sim_row_find(&w->store[CORE_META], CORE_META_NEXT_SAMPLE);
    uint64_t end = 0;
    for (uint32_t i = 0; next && i < next->length && i < 8; i++)
        end |= (uint64_t)next->value[i] << 8 * i;
    for (uint64_t s = 0; s < end; s++)
        if (!proto_set_has(owned, (uint32_t)s))
            sim_violation(w, "sample %llu was handed out and is now nowhere", LLU(s));
    for (uint64_t s = end; s < w->corpus.samples; s++)
        if (proto_set_has(owned, (uint32_t)s))
            sim_violation(w, "sample %llu is leased beyond the cursor %llu", LLU(s), LLU(end));
}

void oracle_persist(struct sim_world *w, const struct core_action *a) {
    struct err err;
    for (uint32_t i = 0; i < a->write_count; i++) {
        const struct core_write *x = &a->writes[i];
        struct msg_entry e;
        if (x->table != CORE_LEDGER) continue;
        if (proto_decode(x->value, x->value_length, RECORD_entry, &e, &err))
            sim_violation(w, "ledger entry: %s", err.msg);
        struct digest d = digest_of(x->value, x->value_length);
        if (x->key >= SIM_ENTRIES_MAX)
            sim_violation(w, "more than %d ledger entries", SIM_ENTRIES_MAX);
        if (w->entry_known[x->key] && !digest_equal(&d, &w->entry_seen[x->key]))
            sim_violation(w, "ledger entry %llu is written, members already have another one",
                          LLU(x->key));
        w->entry_known[x->key] = true;
        w->entry_seen[x->key] = d;
        if (e.kind != LEDGER_COMMIT) continue;
        struct msg_commit c;
        if (proto_decode(e.body.data, e.body.length, RECORD_commit, &c, &err))
            sim_violation(w, "commit: %s", err.msg);
        check_commit(w, &c);
        proto_decoded_release(RECORD_commit, &c);
    }
    check_leases(w);
}

/* ---- a contribution claims just what was trained
 * --------------------------------------------------- */

void oracle_ready(struct sim_world *w, struct sim_member *m, const struct msg_ready *r) {
    uint8_t claimed[SIM_SAMPLES_MAX / 8] = {0};
    if (digest_equal(&r->root, &m->ready_root)) return; /* the same one, announced again */
    m->ready_root = r->root;
    for (uint32_t i = 0; i < r->ranges_count; i++)
        for (uint64_t s = r->ranges[i].start; s < r->ranges[i].start + r->ranges[i].count; s++) {
            if (s >= w->corpus.samples)
                sim_violation(w, "slot %u claims sample %llu", m->slot, LLU(s));
            if (proto_set_has(claimed, (uint32_t)s))
                sim_violation(w, "slot %u claims sample %llu twice", m->slot, LLU(s));
            proto_set_add(claimed, (uint32_t)s);
        }
    for (uint32_t s = 0; s < w->corpus.samples; s++)
        if (proto_set_has(claimed, s) != proto_set_has(m->frozen_effect, s))
            sim_violation(w, "slot %u, round %llu: sample %u is %s", m->slot, LLU(r->round), s,
                          proto_set_has(claimed, s) ? "claimed and was not trained on"
                                                    : "in the contribution and not claimed");
}

/* ---- same version, same bits; and the bits are the weighted mean
 * ------------------------------------ */

void oracle_chunk(struct sim_world *w, uint64_t term, uint64_t plan, const struct msg_chunk *c) {
    uint32_t bit = 0;
    while (bit < c->set.length * 8 && !proto_set_has(c->set.data, bit)) bit++;
    if (w->contribution_count == w->contribution_capacity) {
        w->contribution_capacity = w->contribution_capacity ? 2 * w->contribution_capacity : 256;
        w->contributions =
            realloc(w->contributions, w->contribution_capacity * sizeof *w->contributions);
    }
    struct sim_contribution *k = &w->contributions[w->contribution_count++];
    *k = (struct sim_contribution){.term = term,
                                   .plan = plan,
                                   .bit = bit,
                                   .chunk = c->chunk,
                                   .bytes = malloc(c->data.length),
                                   .length = c->data.length};
    memcpy(k->bytes, c->data.data, c->data.length);
}

static const struct sim_contribution *find_contribution(struct sim_world *w, uint64_t term,
                                                        uint64_t plan, uint32_t bit,
                                                        uint32_t chunk) {
    for (uint32_t i = w->contribution_count; i--;) {
        const struct sim_contribution *k = &w->contributions[i];
        if (k->plan == plan && k->term == term && k->bit == bit && k->chunk == chunk) return k;
    }
    return NULL;
}

static const struct sim_state *find_state(struct sim_world *w, uint32_t chunk, uint64_t version) {
    for (uint32_t i = w->state_count; i--;)
        if (w->states[i].chunk == chunk && w->states[i].version == version) return &w->states[i];
    return NULL;
}

static const struct msg_summed *summed_of(const struct msg_commit *c, uint32_t chunk) {
    uint32_t at = 0;
    for (uint32_t i = 0; i < c->summed_count; at += c->summed[i++].chunks)
        if (chunk < at + c->summed[i].chunks) return &c->summed[i];
    return NULL;
}

/* The chunk after the commit, computed from the contributors' bytes and the state before; false
 * where some bytes were never on the network (an aggregator that contributes). */
static bool expected(struct sim_world *w, const struct msg_entry *e, const struct msg_commit *c,
                     uint32_t chunk, uint32_t n, float *values) {
    int64_t sum[SIM_ELEMENTS_MAX] = {0};
    uint8_t bytes[8 * SIM_ELEMENTS_MAX];
    float mean[SIM_ELEMENTS_MAX];
    struct err err;
    uint64_t weight = 0;
    const struct msg_summed *s = summed_of(c, chunk);
    const struct sim_state *old = find_state(w, chunk, c->base_index);
    if (!s || !old) return false;
    for (uint32_t i = 0; i < c->contributors_count; i++) {
        if (i / 8 >= s->set.length || !proto_set_has(s->set.data, i)) continue;
        const struct sim_contribution *k = find_contribution(w, e->term, c->plan, i, chunk);
        if (!k) return false;
        if (outer_accumulate(
                sum, k->bytes, k->length, n, (enum outer_codec)w->outer.contribution_codec,
                c->contributors[i].weight, c->contributors[i].clip, c->grid_exponent, &err))
            sim_violation(w, "a committed contribution does not add up: %s", err.msg);
        weight += c->contributors[i].weight;
    }
    if (weight != s->weight)
        sim_violation(w, "round %llu chunk %u: weight %llu committed, its contributors have %llu",
                      LLU(c->round), chunk, LLU(s->weight), LLU(weight));
    outer_mean(mean, sum, n, weight, c->grid_exponent);
    size_t length = outer_encoded_bytes((enum outer_codec)c->codec, n);
    if (outer_encode(bytes, mean, n, (enum outer_codec)c->codec, &err) ||
        outer_decode(mean, bytes, length, n, (enum outer_codec)c->codec, &err))
        sim_violation(w, "the mean does not encode: %s", err.msg);
    memcpy(values, old->values, 2 * n * sizeof *values);
    outer_nesterov(values, values + n, mean, n, c->lr, c->momentum);
    return true;
}

static void check_sum(struct sim_world *w, uint32_t slot, uint32_t chunk, uint64_t version,
                      uint32_t n, const float *values) {
    struct sim_row *row = sim_row_find(&w->store[CORE_LEDGER], version);
    struct msg_entry e;
    struct msg_commit c;
    struct err err;
    float want[2 * SIM_ELEMENTS_MAX];
    if (!row || proto_decode(row->value, row->length, RECORD_entry, &e, &err)) return;
    if (e.kind != LEDGER_COMMIT)
        sim_violation(w, "slot %u has chunk %u at version %llu, which is no commit", slot, chunk,
                      LLU(version));
    if (proto_decode(e.body.data, e.body.length, RECORD_commit, &c, &err)) return;
    bool known = expected(w, &e, &c, chunk, n, want);
    known ? w->checked_sums++ : w->unchecked_sums++;
    if (known && memcmp(want, values, 2 * n * sizeof *want))
        sim_violation(
            w, "slot %u, round %llu, chunk %u: not the weighted mean of what its contributors sent",
            slot, LLU(c.round), chunk);
    proto_decoded_release(RECORD_commit, &c);
}

void oracle_member(struct sim_world *w, struct sim_member *m) {
    for (uint32_t c = 0; c < w->chunks; c++) {
        uint64_t version = sync_chunk_version(m->sync, c);
        if (version == m->versions[c]) continue;
        m->versions[c] = version;
        if (version == UINT64_MAX) continue;
        uint32_t first = c * w->chunk_elements;
        uint32_t n =
            w->elements - first < w->chunk_elements ? w->elements - first : w->chunk_elements;
        float values[2 * SIM_ELEMENTS_MAX];
        memcpy(values, sync_anchor(m->sync) + first, n * sizeof *values);
        memcpy(values + n, sync_momentum(m->sync) + first, n * sizeof *values);
        const struct sim_state *seen = find_state(w, c, version);
        if (seen && memcmp(seen->values, values, 2 * n * sizeof *values))
            sim_violation(w, "slots %u and %u have chunk %u at version %llu with different bits",
                          seen->slot, m->slot, c, LLU(version));
        if (seen) continue;
        if (version) check_sum(w, m->slot, c, version, n, values);
        if (w->state_count == w->state_capacity) {
            w->state_capacity = w->state_capacity ? 2 * w->state_capacity : 256;
            w->states = realloc(w->states, w->state_capacity * sizeof *w->states);
        }
        struct sim_state *s = &w->states[w->state_count++];
        *s = (struct sim_state){.chunk = c,
                                .version = version,
                                .slot = m->slot,
                                .values = malloc(2 * n * sizeof *values)};
        memcpy(s->values, values, 2 * n * sizeof *values);
    }
}

void oracle_end(struct sim_world *w) {
    for (uint64_t s = 0; s < w->corpus.samples; s++)
        if (!proto_set_has(w->spent, (uint32_t)s))
            sim_violation(w, "the run is complete and sample %llu was never spent", LLU(s));
}
