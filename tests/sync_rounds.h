/* sync_rounds.h - whole rounds on sync_rig.h: plans, commits, announcements, and what they should come to, computed
 * another way. Included once by each test. */
#ifndef INTELLECT_TESTS_SYNC_ROUNDS_H
#define INTELLECT_TESTS_SYNC_ROUNDS_H

#include "tests/sync_rig.h"

/* ---- plans and commits ------------------------------------------------------------------ */

/* A plan over the contributors' last READYs; addresses are known to all. */
struct plan_spec {
    uint32_t contributor[MEMBERS], count, aggregator, holder, fragment;
};

static inline void make_contributors(struct rig *r, const struct plan_spec *spec,
                              struct msg_contributor *out) {
    for (uint32_t i = 0; i < spec->count; i++) {
        const struct msg_ready *ready = ready_in(r, spec->contributor[i], spec->fragment);
        out[i] = (struct msg_contributor){.member = spec->contributor[i],
                                          .weight = 12 + 5 * i,
                                          .clip = i ? 0.75f : 1,
                                          .tokens = ready->samples * SEQUENCE,
                                          .root = ready->root,
                                          .norm = ready->norm};
    }
}

#define GRID 30

static inline void say_plan(struct rig *r, const struct plan_spec *spec) {
    struct msg_contributor contributors[MEMBERS];
    struct msg_shard shard = {0, chunks_of(r, spec->fragment), spec->aggregator, spec->holder};
    struct msg_address address = {spec->aggregator, proto_str("10.0.0.1"), 7000 + spec->aggregator};
    make_contributors(r, spec, contributors);
    struct msg_plan plan = {.fragment = spec->fragment,
                            .round = r->round_of[spec->fragment],
                            .base_index = r->base_of[spec->fragment],
                            .grid_exponent = GRID,
                            .codec = r->outer.result_codec,
                            .contributors = contributors,
                            .contributors_count = spec->count,
                            .shards = &shard,
                            .shards_count = 1,
                            .addresses = &address,
                            .addresses_count = 1};
    r->plan++;
    for (uint32_t id = 1; id < MEMBERS; id++) {
        bool in = id == spec->aggregator || id == spec->holder;
        for (uint32_t i = 0; i < spec->count; i++) in |= spec->contributor[i] == id;
        if (in && r->node[id].connected) say(r, id, MSG_PLAN, r->plan, &plan);
    }
    settle(r);
}

static inline const struct msg_shard_report *report_of(const struct rig *r, uint32_t id) {
    const struct sent *s = last_sent(r, id, MSG_SHARD_REPORT);
    assert_non_null(s);
    assert_int_equal(s->frame.plan, r->plan);
    return s->msg;
}

/* What the commit spends of one claim: what no commit before did. */
static inline uint32_t spend_claim(struct rig *r, uint32_t id, const struct msg_lease *claim,
                                   struct msg_spend *out) {
    uint64_t start = claim->start, end = claim->start + claim->count;
    if (claim->lease == id && r->spent_to[id] > start) start = r->spent_to[id];
    if (start >= end) return 0;
    if (claim->lease == id) r->spent_to[id] = end;
    *out = (struct msg_spend){id, claim->lease, claim->generation, start, end - start};
    return 1;
}

/* Both reports are there and equal: append the commit. Nobody is told. base_root: of the aggregator's
 * state. */
static inline void commit(struct rig *r, const struct plan_spec *spec,
                          const struct digest *base_root) {
    const struct msg_shard_report *a = report_of(r, spec->aggregator),
                                  *b = report_of(r, spec->holder);
    uint32_t f = spec->fragment, n = chunks_of(r, f);
    struct sync_view v;
    sync_look(r->node[spec->aggregator].sync, &v);
    assert_true(a->fragment == f && b->fragment == f && a->plan == r->plan && b->plan == r->plan);
    assert_int_equal(a->results_count, n);
    assert_int_equal(b->results_count, n);
    assert_memory_equal(a->results, b->results, n * sizeof *a->results);
    assert_int_equal(a->summed_count, b->summed_count);
    struct msg_contributor contributors[MEMBERS];
    struct msg_shard shard = {0, n, spec->aggregator, spec->holder};
    struct msg_spend spent[MEMBERS * 4];
    make_contributors(r, spec, contributors);
    struct msg_commit body = {.fragment = f,
                              .round = r->round_of[f],
                              .plan = r->plan,
                              .base_index = r->base_of[f],
                              .state_index = v.state_index,
                              .state_root = *base_root,
                              .lr = 0.7f,
                              .momentum = 0.9f,
                              .codec = r->outer.result_codec,
                              .grid_exponent = GRID,
                              .tokens_committed = 1000 * (r->rounds + 1),
                              .result_root = digest_tree_root(a->results, n),
                              .contributors = contributors,
                              .contributors_count = spec->count,
                              .shards = &shard,
                              .shards_count = 1,
                              .summed = a->summed,
                              .summed_count = a->summed_count,
                              .spent = spent};
    for (uint32_t i = 0; i < spec->count; i++) {
        bool summed = false;
        for (uint32_t j = 0; j < a->summed_count; j++)
            summed |= proto_set_has(a->summed[j].set.data, i);
        const struct msg_ready *ready = ready_in(r, spec->contributor[i], f);
        for (uint32_t j = 0; summed && j < ready->ranges_count; j++)
            body.spent_count += spend_claim(r, spec->contributor[i], &ready->ranges[j],
                                            &spent[body.spent_count]);
    }
    r->base_index = r->base_of[f] = r->entries;
    r->rounds++;
    r->round_of[f]++;
    entry_add(r, LEDGER_COMMIT, encoded(RECORD_commit, &body));
}

static inline void say_holders(struct rig *r, uint32_t id, const struct plan_spec *spec) {
    struct msg_address list[2] = {
        {spec->aggregator, proto_str("10.0.0.1"), 7000 + spec->aggregator},
        {spec->holder, proto_str("10.0.0.1"), 7000 + spec->holder}};
    say(r, id, MSG_HOLDERS, 0,
        &(struct msg_holders){.index = r->base_index, .addresses = list, .addresses_count = 2});
}

/* Tell one member of the newest commit, and of what is left of its lease when it was summed. */
static inline void announce(struct rig *r, uint32_t id, const struct plan_spec *spec, uint64_t spent) {
    struct msg_lease lease = lease_of(id, spent);
    say_ledger(r, id, r->entries - 1);
    if (spent) say(r, id, MSG_LEASES, 0, &(struct msg_leases){.leases = &lease, .leases_count = 1});
    say_holders(r, id, spec);
    settle(r);
}

static inline struct sync_view look(const struct rig *r, uint32_t id) {
    struct sync_view v;
    sync_look(r->node[id].sync, &v);
    return v;
}

static inline void assert_same_state(const struct rig *r, uint32_t a, uint32_t b) {
    struct sync_view x = look(r, a), y = look(r, b);
    assert_int_equal(x.state_index, y.state_index);
    assert_memory_equal(&x.state_root, &y.state_root, sizeof x.state_root);
    assert_memory_equal(sync_anchor(r->node[a].sync), sync_anchor(r->node[b].sync),
                        ELEMENTS * sizeof(float));
    assert_memory_equal(sync_momentum(r->node[a].sync), sync_momentum(r->node[b].sync),
                        ELEMENTS * sizeof(float));
}

static inline void assert_local_is_anchor(const struct rig *r, uint32_t id) {
    assert_memory_equal(r->node[id].local, sync_anchor(r->node[id].sync), sizeof r->node[id].local);
}

/* ---- whole rounds ------------------------------------------------------------------- */

/* Members 1 (aggregates only), 2 and 3 (train), all trained to READY. */
static const struct plan_spec THREE = {{2, 3}, 2, 1, 2};

static inline void three_members(struct rig *r) {
    node_new(r, 1, false);
    node_with_work(r, 2);
    node_with_work(r, 3);
    for (uint32_t id = 1; id <= 3; id++) assert_int_equal(look(r, id).chunks_missing, 0);
}

static inline void three_ready(struct rig *r) {
    three_members(r);
    train_round(r, 2);
    train_round(r, 3);
}

static inline struct digest root_of(const struct rig *r, uint32_t id) { return look(r, id).state_root; }

static inline void whole_round(struct rig *r, const struct plan_spec *spec) {
    struct digest base = root_of(r, spec->aggregator);
    say_plan(r, spec);
    commit(r, spec, &base);
}

/* The settings were changed: another run. Before any member is made. */
static inline void renew_genesis(struct rig *r) {
    assert_int_equal(r->entries, 2);
    for (uint32_t i = 0; i < r->entries; i++) free((void *)(uintptr_t)r->ledger[i].bytes.data);
    r->entries = 0;
    r->head = (struct digest){{0}};
    begin_ledger(r);
}

/* P fragments, frozen while training goes on; before any member is made. */
static inline void set_fragments(struct rig *r, uint32_t fragments, uint32_t overlap, float alpha) {
    assert_true(fragments <= FRAGMENTS);
    r->outer.fragments = fragments;
    r->outer.overlap = overlap;
    r->outer.alpha = alpha;
    renew_genesis(r);
}

/* ---- what it should come to ---------------------------------------------------------- */

/* Decoded chunk k of a fragment as a contributor sent it under the newest plan. */
static inline void sent_values(const struct rig *r, uint32_t from, uint32_t fragment, uint32_t k,
                               size_t n, float *out) {
    for (uint32_t i = 0; i < r->sent_count; i++) {
        const struct msg_chunk *m = r->sent[i].msg;
        if (r->sent[i].frame.type != MSG_CHUNK || r->sent[i].frame.plan != r->plan ||
            r->sent[i].from != from || m->fragment != fragment || m->chunk != k)
            continue;
        assert_int_equal(outer_decode(out, m->data.data, m->data.length, n, OUTER_INT8, NULL), 0);
        return;
    }
    fail_msg("member %u never sent chunk %u of fragment %u", from, k, fragment);
}

/* Through the result codec, then Nesterov written out. */
static inline void expect_nesterov(struct expectation *e, size_t first, size_t n, float *mean) {
    uint8_t bytes[CHUNK + 4];
    float result[CHUNK];
    assert_int_equal(outer_encode(bytes, mean, n, OUTER_INT8, NULL), 0);
    assert_int_equal(
        outer_decode(result, bytes, outer_encoded_bytes(OUTER_INT8, n), n, OUTER_INT8, NULL), 0);
    for (size_t j = 0; j < n; j++) {
        volatile float m = 0.9f * e->momentum[first + j];
        m = m + result[j];
        volatile float look_ahead = 0.9f * m;
        look_ahead = result[j] + look_ahead;
        look_ahead = 0.7f * look_ahead;
        e->momentum[first + j] = m;
        e->anchor[first + j] -= look_ahead;
    }
}

/* The mean of the frozen bytes, computed another way: 128-bit integers over decoded values. */
static inline void expect_step(struct rig *r, const struct plan_spec *spec,
                               const struct msg_shard_report *report, struct expectation *e) {
    struct msg_contributor contributors[MEMBERS];
    uint32_t k = 0;
    make_contributors(r, spec, contributors);
    for (uint32_t run = 0; run < report->summed_count; run++) {
        for (uint32_t end = k + report->summed[run].chunks; k < end; k++) {
            size_t n, first = chunk_at(r, spec->fragment, k, &n);
            __int128 sum[CHUNK] = {0};
            float value[CHUNK], mean[CHUNK];
            uint64_t weight = 0;
            for (uint32_t i = 0; i < spec->count; i++) {
                if (!proto_set_has(report->summed[run].set.data, i)) continue;
                weight += contributors[i].weight;
                sent_values(r, spec->contributor[i], spec->fragment, k, n, value);
                for (size_t j = 0; j < n; j++)
                    sum[j] += (__int128)llrint(
                                  ldexp((double)value[j] * (double)contributors[i].clip, GRID)) *
                              contributors[i].weight;
            }
            assert_int_equal(weight, report->summed[run].weight);
            for (size_t j = 0; j < n; j++)
                mean[j] = (float)((double)sum[j] / ldexp((double)weight, GRID));
            expect_nesterov(e, first, n, mean);
        }
    }
}

static inline void state_now(const struct rig *r, uint32_t id, struct expectation *e) {
    memcpy(e->anchor, sync_anchor(r->node[id].sync), sizeof e->anchor);
    memcpy(e->momentum, sync_momentum(r->node[id].sync), sizeof e->momentum);
}

static inline void assert_state(const struct rig *r, uint32_t id, const struct expectation *e) {
    assert_memory_equal(sync_anchor(r->node[id].sync), e->anchor, sizeof e->anchor);
    assert_memory_equal(sync_momentum(r->node[id].sync), e->momentum, sizeof e->momentum);
}

/* ---- what goes wrong on the way ------------------------------------------------------ */

static uint32_t chunks_allowed;
static inline bool member_3_breaks_off(struct rig *r, struct sent *m) {
    (void)r;
    if (m->from != 3 || m->frame.type != MSG_CHUNK) return true;
    return chunks_allowed && chunks_allowed--;
}

static inline bool member_3_chunks_wait(struct rig *r, struct sent *m) {
    (void)r;
    return m->from != 3 || m->frame.type != MSG_CHUNK;
}

/* After it members 2 and 3 have spent so many of their samples. */
static inline void round_of_three(struct rig *r, uint64_t spent) {
    train_round(r, 2);
    train_round(r, 3);
    whole_round(r, &THREE);
    for (uint32_t id = 1; id <= 3; id++) announce(r, id, &THREE, id > 1 ? spent : 0);
}

static inline void two_rounds(struct rig *r) {
    three_members(r);
    for (uint64_t round = 1; round <= 2; round++) round_of_three(r, round * STEPS * BATCH);
}

#endif
