/* oracle_state.c - what must hold of the state: same version, same bits; the bits are the weighted
 * mean of what the contributors froze; what was lost in encoding is not lost. And at the end. */
#include "tests/sim/sim.h"

#include <stdlib.h>
#include <string.h>

const struct sim_state *oracle_state(struct sim_world *w, uint32_t chunk, uint64_t version) {
    for (uint32_t i = w->state_count; i--;)
        if (w->states[i].chunk == chunk && w->states[i].version == version) return &w->states[i];
    return NULL;
}

static bool aggregated_by_liar(struct sim_world *w, const struct msg_commit *c, uint32_t k) {
    for (uint32_t i = 0; i < c->shards_count; i++) {
        const struct msg_shard *s = &c->shards[i];
        if (k < s->first || k >= s->first + s->count) continue;
        for (uint32_t n = 0; n < w->members; n++)
            if (w->member[n].id == s->aggregator && w->member[n].lie) return true;
    }
    return false;
}

/* The chunk after the commit, from the contributors' bytes and the state before. False where a
 * contributor lied about its bytes, so that only it has them. */
static bool expected(struct sim_world *w, const struct msg_commit *c, uint32_t chunk,
                     float *values) {
    int64_t sum[SIM_ELEMENTS_MAX] = {0};
    uint8_t bytes[8 * SIM_ELEMENTS_MAX];
    float mean[SIM_ELEMENTS_MAX];
    struct err err;
    uint32_t k = w->place_of[chunk], n = sim_chunk_elements(w, chunk);
    const struct msg_summed *s = oracle_summed(c, k);
    const struct sim_state *old = oracle_state(w, chunk, c->base_index);
    size_t offset, length = sim_encoded(w, c->fragment, k, w->outer.contribution_codec, &offset);
    if (!old) return false;
    for (uint32_t i = 0; i < c->contributors_count; i++) {
        if (i / 8 >= s->set.length || !proto_set_has(s->set.data, i)) continue;
        const struct msg_contributor *m = &c->contributors[i];
        const struct sim_contribution *x = 
            oracle_contribution(w, m->member, c->fragment, c->round, &m->root);
        if (!x || x->lies) return false;
        if (outer_accumulate(sum, x->bytes + offset, length, n,
                             (enum outer_codec)w->outer.contribution_codec, m->weight, m->clip,
                             c->grid_exponent, &err))
            sim_violation(w, "a committed contribution does not add up: %s", err.msg);
    }
    outer_mean(mean, sum, n, s->weight, c->grid_exponent);
    length = outer_encoded_bytes((enum outer_codec)c->codec, n);
    if (outer_encode(bytes, mean, n, (enum outer_codec)c->codec, &err) ||
        outer_decode(mean, bytes, length, n, (enum outer_codec)c->codec, &err))
        sim_violation(w, "the mean does not encode: %s", err.msg);
    memcpy(values, old->values, 2 * n * sizeof *values);
    outer_nesterov(values, values + n, mean, n, c->lr, c->momentum);
    return true;
}

static void check_sum(struct sim_world *w, uint32_t slot, uint32_t chunk, uint64_t version,
                      const float *values) {
    struct msg_entry e;
    struct msg_commit c;
    float want[2 * SIM_ELEMENTS_MAX];
    uint32_t n = sim_chunk_elements(w, chunk);
    if (!oracle_commit(w, version, &e, &c))
        sim_violation(w, "slot %u has chunk %u at version %llu, which is no commit", slot, chunk,
                      LLU(version));
    if (c.fragment != w->fragment_of[chunk])
        sim_violation(w, "slot %u has chunk %u at version %llu, a commit of fragment %u", slot,
                      chunk, LLU(version), c.fragment);
    bool known = !aggregated_by_liar(w, &c, w->place_of[chunk]) && expected(w, &c, chunk, want);
    known ? w->checked_sums++ : w->unchecked_sums++;
    if (known && memcmp(want, values, 2 * n * sizeof *want))
        sim_violation(w,
                      "slot %u, fragment %u round %llu, chunk %u: not the weighted mean of what its "
                      "contributors froze",
                      slot, c.fragment, LLU(c.round), chunk);
    proto_decoded_release(RECORD_commit, &c);
}

/* The first one that has it, so others are compared with it. */
void oracle_keep_state(struct sim_world *w, uint32_t slot, uint32_t chunk, uint64_t version,
                       const float *values) {
    size_t bytes = 2 * sim_chunk_elements(w, chunk) * sizeof *values;
    if (w->state_count == w->state_capacity) {
        w->state_capacity = w->state_capacity ? 2 * w->state_capacity : 256;
        w->states = realloc(w->states, w->state_capacity * sizeof *w->states);
    }
    struct sim_state *s = &w->states[w->state_count++];
    *s = (struct sim_state){
        .chunk = chunk, .version = version, .slot = slot, .values = malloc(bytes)};
    memcpy(s->values, values, bytes);
}

static bool sums(const struct msg_commit *c, uint32_t k, const struct sim_member *m,
                 const struct digest *root) {
    const struct msg_summed *s = oracle_summed(c, k);
    for (uint32_t i = 0; i < c->contributors_count; i++)
        if (c->contributors[i].member == m->id && digest_equal(&c->contributors[i].root, root) &&
            i / 8 < s->set.length && proto_set_has(s->set.data, i))
            return true;
    return false;
}

/* A member that was summed here keeps what its encoding lost for the next contribution, however the
 * chunk came to it. (Not of what a copy of its home announced for a later round.) */
static void follow_residual(struct sim_world *w, struct sim_member *m, uint32_t chunk,
                            uint64_t from, uint64_t to) {
    uint32_t first = chunk * w->chunk_elements, f = w->fragment_of[chunk];
    struct msg_entry e;
    struct msg_commit c;
    bool summed = false;
    if (from == UINT64_MAX || !m->freeze[f].valid) return;
    while (!summed && to > from && oracle_commit(w, to, &e, &c)) {
        summed = c.base_index == m->freeze[f].based && sums(&c, w->place_of[chunk], m, &m->freeze[f].root);
        to = c.base_index;
        proto_decoded_release(RECORD_commit, &c);
    }
    if (summed)
        memcpy(m->residual + first, m->residual_next + first,
               sim_chunk_elements(w, chunk) * sizeof(float));
}

void oracle_member(struct sim_world *w, struct sim_member *m) {
    if (w->rewind_index) oracle_hears_of_rewind(w, m, false);
    for (uint32_t c = 0; c < w->chunks; c++) {
        uint64_t version = sync_chunk_version(m->sync, c), before = m->versions[c];
        if (version == before) continue;
        m->versions[c] = version;
        if (version == UINT64_MAX) continue;
        uint32_t first = c * w->chunk_elements, n = sim_chunk_elements(w, c);
        float values[2 * SIM_ELEMENTS_MAX];
        memcpy(values, sync_anchor(m->sync) + first, n * sizeof *values);
        memcpy(values + n, sync_momentum(m->sync) + first, n * sizeof *values);
        if (m->trains) follow_residual(w, m, c, before, version);
        const struct sim_state *seen = oracle_state(w, c, version);
        if (seen && memcmp(seen->values, values, 2 * n * sizeof *values))
            sim_violation(w, "slots %u and %u have chunk %u at version %llu with different bits",
                          seen->slot, m->slot, c, LLU(version));
        if (seen) continue;
        if (version) check_sum(w, m->slot, c, version, values);
        oracle_keep_state(w, m->slot, c, version, values);
    }
}

/* ---- the end ----------------------------------------------------------------------------------- */

/* The ledger as any reader checks it. */
static void check_ledger(struct sim_world *w) {
    struct ledger_chain chain;
    struct sim_table *ledger = &w->store.table[CORE_LEDGER];
    struct err err;
    ledger_chain_init(&chain, &w->run);
    for (uint64_t i = 0; i < ledger->count; i++) {
        struct sim_row *r = sim_row_find(ledger, i);
        struct msg_entry e;
        if (!r) sim_violation(w, "the ledger has a hole at %llu", LLU(i));
        struct msg_signed_entry s = {.bytes = {r->value, r->length}, .signature = r->signature};
        if (ledger_chain_take(&chain, &s, &e, &err))
            sim_violation(w, "the ledger does not verify: %s", err.msg);
        proto_decoded_release(RECORD_entry, &e);
    }
}

static void check_states(struct sim_world *w) {
    for (uint32_t i = 0; i < w->members; i++) {
        struct sim_member *m = &w->member[i];
        if (!m->sync || m->revoked || m->left || m->behind || !m->complete) continue;
        for (uint32_t c = 0; c < w->chunks; c++)
            if (sync_chunk_version(m->sync, c) != w->base_index[w->fragment_of[c]])
                sim_violation(w, "the run is complete and slot %u has chunk %u at version %llu",
                              i, c, LLU(sync_chunk_version(m->sync, c)));
    }
}

void oracle_end(struct sim_world *w) {
    bool enough = w->tokens_committed >= w->inner.total_tokens;
    for (uint64_t s = 0; s < w->corpus.samples && !enough; s++)
        if (!proto_set_has(w->spent, (uint32_t)s))
            sim_violation(w, "the run is complete and sample %llu was never spent", LLU(s));
    if (!enough && w->store.table[CORE_LEASE].count)
        sim_violation(w, "the run is complete and %u leases are left",
                      w->store.table[CORE_LEASE].count);
    check_ledger(w);
    check_states(w);
}
