/* test_sync.c - a member's machine alone and with others, against a coordinator that is a script
 * (sync_rig.h): what it promises is durable, what it computes is what anybody would, and what
 * others send it is checked. The core and this machine against each other are the simulator's. */
#include "tests/sync_rig.h"

/* Members 1 (aggregates only), 2 and 3 (train), all trained to READY. */
static const struct plan_spec THREE = {{2, 3}, 2, 1, 2};

static void three_members(struct rig *r) {
    node_new(r, 1, false);
    node_with_work(r, 2);
    node_with_work(r, 3);
    for (uint32_t id = 1; id <= 3; id++) assert_int_equal(look(r, id).chunks_missing, 0);
}

static void three_ready(struct rig *r) {
    three_members(r);
    train_round(r, 2);
    train_round(r, 3);
}

static struct digest root_of(const struct rig *r, uint32_t id) { return look(r, id).state_root; }

static void whole_round(struct rig *r, const struct plan_spec *spec) {
    struct digest base = root_of(r, spec->aggregator);
    say_plan(r, spec);
    commit(r, spec, &base);
}

/* ---- alone ------------------------------------------------------------------------------ */

/* A fresh run has no donor: everybody derives the same state, and shows it. */
static void fresh_member_derives_the_initial_state(void **state) {
    struct rig *r = *state;
    float expect[ELEMENTS];
    node_new(r, 2, true);
    const struct msg_hello *hello = last_sent(r, 2, MSG_HELLO)->msg;
    assert_int_equal(hello->has_state, 0);
    assert_true(digest_is_zero(&hello->head_digest));
    const struct msg_root *root = last_sent(r, 2, MSG_ROOT)->msg;
    assert_int_equal(root->index, 0);
    float momentum[ELEMENTS];
    assert_int_equal(rig_load(NULL, NULL, 0, ELEMENTS, expect, momentum, NULL), 0);
    assert_memory_equal(sync_anchor(r->node[2].sync), expect, sizeof expect);
    struct digest shown = root_of(r, 2);
    assert_true(digest_equal(&root->root, &shown));
}

/* The state of a process that was killed is there at once the next time, and said so in HELLO. */
static void restart_shows_its_state(void **state) {
    struct rig *r = *state;
    node_new(r, 2, true);
    struct digest before = root_of(r, 2);
    node_kill(r, 2);
    disk_crash(&r->node[2].disk, 0);
    node_start(r, 2);
    dial_coordinator(r, 2);
    const struct msg_hello *hello = last_sent(r, 2, MSG_HELLO)->msg;
    assert_int_equal(hello->has_state, 1);
    assert_int_equal(hello->head_index, 1);
    assert_true(digest_equal(&hello->state_root, &before));
    welcome(r, 2, NULL, 0);
    assert_int_equal(count_sent(r, 2, MSG_ROOT), 1); /* what HELLO said is not said again */
}

/* The trainer gets the anchor, then samples in whole batches; asks go out before it starves. */
static void trainer_gets_anchor_and_samples(void **state) {
    struct rig *r = *state;
    node_new(r, 2, true);
    trainer_up(r, 2, 1);
    assert_int_equal(r->node[2].resets, 1);
    assert_local_is_anchor(r, 2);
    assert_int_equal(r->node[2].queued, 0);
    struct msg_lease lease = {7, 3, 50, 10};
    say_leases(r, 2, &lease, 1);
    assert_int_equal(r->node[2].queued, 1);
    assert_int_equal(r->node[2].queue[0].start, 50);
    assert_int_equal(r->node[2].queue[0].count, 8);
    assert_non_null(last_sent(r, 2, MSG_LEASE_ASK));
}

/* READY says what the samples were, on which state, and what the bytes are like. */
static void ready_claims_what_was_trained(void **state) {
    struct rig *r = *state;
    node_new(r, 2, true);
    struct msg_lease leases[] = {{9, 1, 100, 8}, {4, 2, 700, 200}};
    say_leases(r, 2, leases, 2);
    trainer_up(r, 2, 1);
    train_round(r, 2);
    const struct msg_ready *ready = ready_of(r, 2);
    assert_int_equal(ready->round, 0);
    assert_int_equal(ready->base_index, 0);
    assert_int_equal(ready->chunks, CHUNKS);
    assert_int_equal(ready->samples, STEPS * BATCH);
    assert_int_equal(ready->ranges_count, 2);
    assert_int_equal(ready->ranges[0].lease, 9);
    assert_int_equal(ready->ranges[0].count, 8);
    assert_int_equal(ready->ranges[1].start, 700);
    assert_int_equal(ready->ranges[1].count, STEPS * BATCH - 8);
    assert_true(ready->absmax > 0 && ready->norm >= ready->absmax &&
                ready->norm <= ready->absmax * sqrt(ELEMENTS));
    assert_true(ready->loss == 2.5);
}

/* A slow machine is not waited for: the clock freezes it too, but only with something to show. */
static void round_ends_by_the_clock_too(void **state) {
    struct rig *r = *state;
    r->outer.round_ms = 500;
    node_with_work(r, 2);
    pass(r, 1000);
    assert_null(last_sent(r, 2, MSG_READY));
    train(r, 2);
    pass(r, 500);
    assert_int_equal(ready_of(r, 2)->samples, BATCH);
}

/* Data runs out: what is left over of a batch is used, and the round ends early. */
static void end_of_data_ends_the_round(void **state) {
    struct rig *r = *state;
    struct msg_lease lease = {7, 1, 50, 6};
    node_new(r, 2, true);
    say_leases(r, 2, &lease, 1);
    trainer_up(r, 2, 1);
    train(r, 2);
    say_leases(r, 2, &lease, 1); /* the answer to its question: nothing more */
    train(r, 2);
    pass(r, 50);
    assert_int_equal(ready_of(r, 2)->samples, 6);
}

/* Work on samples that are somebody else's now must not go on. */
static void lost_lease_resets_to_the_anchor(void **state) {
    struct rig *r = *state;
    node_with_work(r, 2);
    train(r, 2);
    assert_memory_not_equal(r->node[2].local, sync_anchor(r->node[2].sync),
                            sizeof r->node[2].local);
    struct msg_lease other = {77, 1, 9000, 40};
    say_leases(r, 2, &other, 1);
    assert_int_equal(r->node[2].resets, 2);
    assert_local_is_anchor(r, 2);
    assert_int_equal(r->node[2].queue[0].start, 9000);
    train_round(r, 2);
    assert_int_equal(ready_of(r, 2)->ranges_count, 1);
    assert_int_equal(ready_of(r, 2)->ranges[0].lease, 77);
}

/* Another generation of the same lease is another lease. */
static void same_lease_of_another_generation_is_lost(void **state) {
    struct rig *r = *state;
    node_with_work(r, 2);
    train(r, 2);
    struct msg_lease again = lease_of(2, 0);
    again.generation = 2;
    say_leases(r, 2, &again, 1);
    assert_int_equal(r->node[2].resets, 2);
}

/* A list that grows changes nothing for what is being trained. */
static void more_leases_do_not_disturb(void **state) {
    struct rig *r = *state;
    node_with_work(r, 2);
    train(r, 2);
    struct msg_lease list[] = {{1, 1, 20, 40}, lease_of(2, 0)}; /* sorted before ours */
    say_leases(r, 2, list, 2);
    assert_int_equal(r->node[2].resets, 1);
    train(r, 2);
    train(r, 2);
    assert_int_equal(ready_of(r, 2)->ranges_count, 1);
    assert_int_equal(ready_of(r, 2)->ranges[0].lease, 2);
}

/* A trainer that dies before the freeze takes its work with it: the samples come again. */
static void dead_trainer_gives_its_samples_back(void **state) {
    struct rig *r = *state;
    node_with_work(r, 2);
    train(r, 2);
    trainer_down(r, 2);
    trainer_up(r, 2, 1);
    assert_local_is_anchor(r, 2);
    assert_int_equal(r->node[2].queue[0].start, 2000);
    train_round(r, 2);
    assert_int_equal(ready_of(r, 2)->ranges[0].start, 2000);
    assert_int_equal(ready_of(r, 2)->ranges[0].count, STEPS * BATCH);
}

/* Without a coordinator training goes on; its return brings the READY. */
static void training_goes_on_without_the_coordinator(void **state) {
    struct rig *r = *state;
    node_with_work(r, 2);
    train(r, 2);
    r->node[2].connected = false;
    step(r, 2, &(struct sync_event){.type = SYNC_EV_DISCONNECTED});
    for (int i = 0; i < STEPS + 1; i++) train(r, 2);
    assert_false(r->node[2].frozen);
    r->term = 2;
    dial_coordinator(r, 2);
    welcome(r, 2, NULL, 0);
    pass(r, 50);
    assert_int_equal(ready_of(r, 2)->ranges[0].count, (STEPS + 2) * BATCH);
    assert_int_equal(last_sent(r, 2, MSG_READY)->frame.term, 2);
}

static void trainer_with_broken_numbers_is_reset(void **state) {
    struct rig *r = *state;
    node_with_work(r, 2);
    train(r, 2);
    train(r, 2);
    r->node[2].local[300] = NAN;
    train(r, 2);
    assert_null(last_sent(r, 2, MSG_READY));
    assert_int_equal(r->node[2].resets, 2);
    assert_local_is_anchor(r, 2);
}

/* ---- terms and sessions ----------------------------------------------------------------- */

/* The higher term is on disk before anything is done under it, so no restart forgets it. */
static void older_term_ends_the_connection(void **state) {
    struct rig *r = *state;
    r->term = 5;
    node_new(r, 2, true);
    node_kill(r, 2);
    disk_crash(&r->node[2].disk, 0);
    node_start(r, 2);
    r->term = 4;
    uint32_t hellos = count_sent(r, 2, MSG_HELLO);
    dial_coordinator(r, 2);
    assert_int_equal(r->node[2].disconnects, 1);
    assert_int_equal(count_sent(r, 2, MSG_HELLO), hellos);
}

static void frames_of_another_session_are_ignored(void **state) {
    struct rig *r = *state;
    node_with_work(r, 2);
    train_round(r, 2);
    struct frame f = {.type = MSG_RESET, .term = r->term, .session = 999};
    step(r, 2,
         &(struct sync_event){.type = SYNC_EV_MESSAGE, .frame = f, .msg = &(struct msg_reset){0}});
    f.session = r->term << 24 | 2;
    f.term = 0;
    step(r, 2,
         &(struct sync_event){.type = SYNC_EV_MESSAGE, .frame = f, .msg = &(struct msg_reset){0}});
    assert_int_equal(look(r, 2).contributions_refused, 0);
}

/* A ledger that does not continue ours is a second history. */
static void another_history_ends_the_connection(void **state) {
    struct rig *r = *state;
    node_new(r, 2, true);
    struct msg_signed_entry forged = r->ledger[1];
    struct msg_entry e = {.index = 2, .previous = {{9}}, .term = 1, .kind = LEDGER_REVOCATION};
    forged.bytes = encoded(RECORD_entry, &e);
    proto_sign(&r->online_id, "ledger", &r->run, 1, forged.bytes.data, forged.bytes.length,
               &forged.signature);
    say(r, 2, MSG_LEDGER, 0, &(struct msg_ledger){.entries = &forged, .entries_count = 1});
    assert_int_equal(r->node[2].disconnects, 1);
    assert_int_equal(sync_ledger_count(r->node[2].sync), 2);
    free((void *)(uintptr_t)forged.bytes.data);
}

static void silent_coordinator_is_left(void **state) {
    struct rig *r = *state;
    node_new(r, 2, true);
    pass(r, 800);
    assert_int_equal(r->node[2].disconnects, 0);
    assert_in_range(count_sent(r, 2, MSG_HEARTBEAT), 3, 5);
    pass(r, 400);
    assert_int_equal(r->node[2].disconnects, 1);
}

/* ---- a whole round ---------------------------------------------------------------------- */

struct expectation {
    float anchor[ELEMENTS], momentum[ELEMENTS];
};

/* The mean of the frozen bytes, computed another way: 128-bit integers over decoded values, then
 * the result codec, then Nesterov written out. */
static void expect_step(struct rig *r, const struct plan_spec *spec,
                        const struct msg_shard_report *report, struct expectation *e) {
    struct msg_contributor contributors[MEMBERS];
    static float value[MEMBERS][ELEMENTS];
    bool got[MEMBERS][CHUNKS] = {{false}};
    make_contributors(r, spec, contributors);
    for (uint32_t i = 0; i < r->sent_count; i++) {
        const struct msg_chunk *m = r->sent[i].msg;
        if (r->sent[i].frame.type != MSG_CHUNK || r->sent[i].frame.plan != r->plan) continue;
        uint32_t n = m->chunk == CHUNKS - 1 ? ELEMENTS - (CHUNKS - 1) * CHUNK : CHUNK;
        assert_int_equal(outer_decode(value[r->sent[i].from] + m->chunk * CHUNK, m->data.data,
                                      m->data.length, n, OUTER_INT8, NULL),
                         0);
        got[r->sent[i].from][m->chunk] = true;
    }
    uint32_t chunk = 0;
    for (uint32_t run = 0; run < report->summed_count; run++) {
        for (uint32_t end = chunk + report->summed[run].chunks; chunk < end; chunk++) {
            size_t first = chunk * CHUNK, n = first + CHUNK < ELEMENTS ? CHUNK : ELEMENTS - first;
            float mean[CHUNK], result[CHUNK];
            uint8_t bytes[CHUNK + 4];
            uint64_t weight = 0;
            for (uint32_t i = 0; i < spec->count; i++)
                if (proto_set_has(report->summed[run].set.data, i))
                    weight += contributors[i].weight;
            assert_int_equal(weight, report->summed[run].weight);
            for (size_t j = 0; j < n; j++) {
                __int128 sum = 0;
                for (uint32_t i = 0; i < spec->count; i++) {
                    if (!proto_set_has(report->summed[run].set.data, i)) continue;
                    assert_true(got[spec->contributor[i]][chunk]);
                    double x = (double)value[spec->contributor[i]][first + j] *
                               (double)contributors[i].clip;
                    sum += (__int128)llrint(ldexp(x, GRID)) * contributors[i].weight;
                }
                mean[j] = (float)((double)sum / ldexp((double)weight, GRID));
            }
            assert_int_equal(outer_encode(bytes, mean, n, OUTER_INT8, NULL), 0);
            assert_int_equal(outer_decode(result, bytes, outer_encoded_bytes(OUTER_INT8, n), n,
                                          OUTER_INT8, NULL),
                             0);
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
    }
}

static void state_now(const struct rig *r, uint32_t id, struct expectation *e) {
    memcpy(e->anchor, sync_anchor(r->node[id].sync), sizeof e->anchor);
    memcpy(e->momentum, sync_momentum(r->node[id].sync), sizeof e->momentum);
}

static void assert_state(const struct rig *r, uint32_t id, const struct expectation *e) {
    assert_memory_equal(sync_anchor(r->node[id].sync), e->anchor, sizeof e->anchor);
    assert_memory_equal(sync_momentum(r->node[id].sync), e->momentum, sizeof e->momentum);
}

/* Contribution, sum, copy, commit, apply: all have the same bits, and they are the right ones. Two
 * rounds, so that momentum and error feedback take part. */
static void round_gives_everybody_the_right_bits(void **state) {
    struct rig *r = *state;
    struct expectation e;
    uint64_t used = 0;
    three_members(r);
    for (int round = 0; round < 2; round++) {
        train_round(r, 2);
        train_round(r, 3);
        state_now(r, 1, &e);
        whole_round(r, &THREE);
        expect_step(r, &THREE, report_of(r, 1), &e);
        used += STEPS * BATCH;
        for (uint32_t id = 1; id <= 3; id++) announce(r, id, &THREE, id > 1 ? used : 0);
        for (uint32_t id = 1; id <= 3; id++) {
            assert_state(r, id, &e);
            const struct msg_root *root = last_sent(r, id, MSG_ROOT)->msg;
            assert_int_equal(root->index, r->base_index);
        }
        assert_same_state(r, 1, 2);
        assert_same_state(r, 1, 3);
        assert_local_is_anchor(r, 2); /* alpha is 0 */
        assert_int_equal(look(r, 3).samples_uncommitted, 0);
        assert_int_equal(r->node[3].tokens, 1000 * (round + 1));
    }
    assert_int_equal(r->node[2].resets, 1); /* nothing was lost on the way */
    assert_int_equal(ready_of(r, 2)->ranges[0].start, 2000 + STEPS * BATCH);
}

/* A contributor may aggregate, too: its own bytes never travel. */
static void contributor_aggregates(void **state) {
    struct rig *r = *state;
    struct plan_spec spec = {{2, 3}, 2, 2, 3};
    three_ready(r);
    struct digest base = root_of(r, 2);
    say_plan(r, &spec);
    assert_int_equal(count_sent(r, 2, MSG_CHUNK), 0);
    assert_int_equal(count_sent(r, 3, MSG_CHUNK), CHUNKS);
    assert_int_equal(report_of(r, 2)->summed[0].weight, 12 + 17);
    commit(r, &spec, &base);
    for (uint32_t id = 1; id <= 3; id++) announce(r, id, &spec, id > 1 ? STEPS * BATCH : 0);
    assert_same_state(r, 2, 1);
    assert_same_state(r, 2, 3);
}

static uint32_t chunks_allowed;
static bool member_3_breaks_off(struct rig *r, struct sent *m) {
    (void)r;
    if (m->from != 3 || m->frame.type != MSG_CHUNK) return true;
    return chunks_allowed && chunks_allowed--;
}

/* What was not finished goes on without the lost one, divided by what really arrived. */
static void dropped_contributor_does_not_count_in_the_divisor(void **state) {
    struct rig *r = *state;
    struct expectation e;
    three_ready(r);
    state_now(r, 1, &e);
    struct digest base = root_of(r, 1);
    r->spoil = member_3_breaks_off;
    chunks_allowed = 2;
    say_plan(r, &THREE);
    assert_null(last_sent(r, 1, MSG_SHARD_REPORT));
    r->node[3].connected = false;
    say(r, 1, MSG_DROP, r->plan, &(struct msg_drop){.member = 3});
    settle(r);
    pass(r, 200);
    const struct msg_shard_report *report = report_of(r, 1);
    assert_int_equal(report->summed_count, 2);
    assert_int_equal(report->summed[0].chunks, 2);
    assert_int_equal(report->summed[0].weight, 12 + 17);
    assert_int_equal(report->summed[1].weight, 12);
    assert_int_equal(report->summed[1].set.data[0], 1);
    expect_step(r, &THREE, report, &e);
    commit(r, &THREE, &base);
    announce(r, 1, &THREE, 0);
    announce(r, 2, &THREE, STEPS * BATCH);
    assert_state(r, 1, &e);
    assert_state(r, 2, &e);
}

/* Nobody need tell an aggregator that a contributor went silent. */
static void silent_contributor_is_dropped_by_the_aggregator(void **state) {
    struct rig *r = *state;
    three_ready(r);
    r->spoil = member_3_breaks_off;
    chunks_allowed = 1;
    say_plan(r, &THREE);
    for (int i = 0; i < 13; i++) {
        pass(r, 100);
        say(r, 1, MSG_HEARTBEAT_ACK, 0, &(struct msg_heartbeat_ack){0});
        say(r, 2, MSG_HEARTBEAT_ACK, 0, &(struct msg_heartbeat_ack){0});
    }
    assert_int_equal(report_of(r, 1)->summed[1].weight, 12);
    assert_int_equal(report_of(r, 2)->summed[1].weight, 12);
}

/* A partly received contribution goes on where it broke off. */
static void broken_link_resumes(void **state) {
    struct rig *r = *state;
    three_ready(r);
    r->spoil = member_3_breaks_off;
    chunks_allowed = 2;
    say_plan(r, &THREE);
    r->spoil = NULL;
    hang_up(r, 3, 1);
    for (int i = 0; i < 3; i++) pass(r, 100);
    assert_int_equal(report_of(r, 1)->summed[0].weight, 12 + 17);
    assert_int_equal(report_of(r, 1)->summed[0].chunks, CHUNKS);
    assert_int_equal(count_sent(r, 3, MSG_CHUNK),
                     CHUNKS + 2); /* only what was missing came again */
}

static bool member_3_chunks_wait(struct rig *r, struct sent *m) {
    (void)r;
    return m->from != 3 || m->frame.type != MSG_CHUNK;
}

/* Under a new plan number the old sums are void, and what comes late for them as well. */
static void new_plan_makes_the_old_one_void(void **state) {
    struct rig *r = *state;
    struct plan_spec two = {{2}, 1, 1, 2};
    three_ready(r);
    r->spoil = member_3_chunks_wait;
    say_plan(r, &THREE);
    struct sent late = *last_sent(r, 3, MSG_CHUNK);
    say_plan(r, &two);
    const struct msg_shard_report *report = report_of(r, 1);
    assert_int_equal(report->summed_count, 1);
    assert_int_equal(report->summed[0].weight, 12);
    uint32_t reports = count_sent(r, 1, MSG_SHARD_REPORT);
    step(r, 1,
         &(struct sync_event){
             .type = SYNC_EV_PEER_MESSAGE, .peer = 3, .frame = late.frame, .msg = late.msg});
    settle(r);
    assert_int_equal(count_sent(r, 1, MSG_SHARD_REPORT), reports);
    /* and an older plan that comes late changes nothing */
    r->plan -= 2;
    say_plan(r, &THREE);
    assert_int_equal(look(r, 1).plan, 2);
    r->plan = 2;
}

/* The contributor may hear of the plan first; its LEAVES is then asked for again. */
static void leaves_before_the_plan(void **state) {
    struct rig *r = *state;
    three_ready(r);
    r->node[1].connected = false;
    say_plan(r, &THREE);
    assert_int_equal(count_sent(r, 3, MSG_CHUNK), 0);
    r->node[1].connected = true;
    r->plan--;
    say_plan(r, &THREE);
    assert_int_equal(count_sent(r, 3, MSG_CHUNK), CHUNKS);
    assert_int_equal(report_of(r, 1)->summed[0].weight, 12 + 17);
}

/* A term ends all plans of the one before: their numbers may come again. */
static void new_term_voids_the_plan(void **state) {
    struct rig *r = *state;
    three_ready(r);
    r->spoil = member_3_chunks_wait;
    say_plan(r, &THREE);
    r->term = 2;
    dial_coordinator(r, 1);
    welcome(r, 1, NULL, 0);
    assert_int_equal(look(r, 1).plan, 0);
    pass(r, 1500);
    assert_null(last_sent(r, 1, MSG_SHARD_REPORT));
}

/* ---- summed or not ---------------------------------------------------------------------- */

/* Member 3 comes too late for the round: it keeps its work on top of the new anchor, and its claims
 * go into the next contribution. */
static void not_summed_keeps_work_and_claims(void **state) {
    struct rig *r = *state;
    struct plan_spec two = {{2}, 1, 1, 2};
    float work[ELEMENTS];
    three_members(r);
    train_round(r, 2);
    train_round(r, 3);
    for (int i = 0; i < ELEMENTS; i++)
        work[i] = r->node[3].local[i] - sync_anchor(r->node[3].sync)[i];
    struct digest first = ready_of(r, 3)->root;
    whole_round(r, &two);
    announce(r, 1, &two, 0);
    announce(r, 2, &two, STEPS * BATCH);
    announce(r, 3, &two, 0);
    struct node *n = &r->node[3];
    assert_int_equal(n->resets, 1);
    assert_int_equal(n->adds, CHUNKS);
    assert_int_equal(n->mixes, 0);
    for (int i = 0; i < ELEMENTS; i++)
        assert_float_equal(n->local[i], sync_anchor(n->sync)[i] + work[i], 1e-6);
    assert_same_state(r, 1, 3);
    train_round(r, 3);
    assert_false(digest_equal(&first, &ready_of(r, 3)->root));
    assert_int_equal(ready_of(r, 3)->base_index, r->base_index);
    assert_int_equal(ready_of(r, 3)->ranges[0].start, 3000);
    assert_int_equal(ready_of(r, 3)->ranges[0].count, 2 * STEPS * BATCH);
}

/* The same for a member that was still training when the others committed. */
static void commit_reaches_a_trainer_at_work(void **state) {
    struct rig *r = *state;
    struct plan_spec two = {{2}, 1, 1, 2};
    three_members(r);
    train_round(r, 2);
    train(r, 3);
    whole_round(r, &two);
    for (uint32_t id = 1; id <= 3; id++) announce(r, id, &two, id == 2 ? STEPS * BATCH : 0);
    assert_int_equal(r->node[3].adds, CHUNKS);
    train(r, 3);
    assert_false(r->node[3].frozen);
    train(r, 3); /* its turn is counted from its own freezes, not from the commits of others */
    assert_int_equal(ready_of(r, 3)->ranges[0].count, STEPS * BATCH);
    assert_int_equal(ready_of(r, 3)->base_index, r->base_index);
}

/* A commit that meets a freeze on its way: nothing is encoded against a base that is gone, and the
 * trainer is asked once more when it has the new one. */
static void commit_meets_a_freeze(void **state) {
    struct rig *r = *state;
    struct plan_spec two = {{2}, 1, 1, 2};
    three_members(r);
    train_round(r, 2);
    whole_round(r, &two);
    r->node[3].trainer_up = false; /* the rig answers no FREEZE now */
    for (int i = 0; i < STEPS; i++) train(r, 3);
    assert_true(r->node[3].freeze_asked);
    announce(r, 3, &two, 0);
    assert_int_equal(look(r, 3).state_index, r->base_index);
    assert_int_equal(r->node[3].applies, 0);
    r->node[3].trainer_up = true;
    settle(r);
    assert_int_equal(r->node[3].applies, 1);
    assert_true(r->node[3].frozen);
    assert_int_equal(count_sent(r, 3, MSG_READY), 1);
    assert_int_equal(ready_of(r, 3)->base_index, r->base_index);
    assert_int_equal(ready_of(r, 3)->ranges[0].count, STEPS * BATCH);
}

/* The slot is the trainer's until it answers: the next commit waits, and none is lost. */
static void busy_slot_holds_the_next_commit_back(void **state) {
    struct rig *r = *state;
    struct plan_spec two = {{2}, 1, 1, 2};
    three_members(r);
    r->node[3].hold_applied = true;
    for (int round = 0; round < 2; round++) {
        train_round(r, 2);
        whole_round(r, &two);
        for (uint32_t id = 1; id <= 3; id++)
            announce(r, id, &two, id == 2 ? (round + 1) * STEPS * BATCH : 0);
    }
    assert_int_equal(r->node[3].applies, 1);
    assert_true(look(r, 3).state_index < r->base_index);
    r->node[3].hold_applied = false;
    settle(r);
    assert_int_equal(r->node[3].applies, 2);
    assert_same_state(r, 1, 3);
    for (int i = 0; i < ELEMENTS; i++)
        assert_float_equal(r->node[3].local[i], sync_anchor(r->node[3].sync)[i], 1e-6);
}

static const float *residual(struct rig *r, uint32_t id) {
    return (const float *)(const void *)file_find(&r->node[id].disk, "residual")->live;
}

/* Error feedback: what a contribution lost in encoding counts only once its bytes are in a sum. */
static void residual_is_taken_over_only_when_summed(void **state) {
    struct rig *r = *state;
    struct plan_spec two = {{2}, 1, 1, 2};
    static const float zero[ELEMENTS];
    three_ready(r);
    whole_round(r, &two);
    announce(r, 2, &two, STEPS * BATCH);
    announce(r, 3, &two, 0);
    assert_memory_equal(residual(r, 3), zero, sizeof zero);
    assert_memory_not_equal(residual(r, 2), zero, sizeof zero);
    assert_memory_equal(residual(r, 2), file_find(&r->node[2].disk, "residual-next")->live,
                        sizeof zero);
}

/* Partly summed: spent, and mixed only where it is in the sum. */
static void partly_summed_is_mixed_where_it_is_in(void **state) {
    struct rig *r = *state;
    three_ready(r);
    struct digest base = root_of(r, 1);
    r->spoil = member_3_breaks_off;
    chunks_allowed = 2;
    say_plan(r, &THREE);
    say(r, 1, MSG_DROP, r->plan, &(struct msg_drop){.member = 3});
    settle(r);
    pass(r, 200);
    commit(r, &THREE, &base);
    announce(r, 3, &THREE, STEPS * BATCH);
    assert_int_equal(r->node[3].mixes, 2);
    assert_int_equal(r->node[3].adds, 2);
    assert_memory_equal(r->node[3].local, sync_anchor(r->node[3].sync), 2 * CHUNK * sizeof(float));
    assert_int_equal(look(r, 3).samples_uncommitted, 0);
    assert_int_equal(r->node[3].resets, 1);
}

/* The coordinator says no: back to the anchor, on with what the new list holds. */
static void refused_contribution_resets(void **state) {
    struct rig *r = *state;
    node_with_work(r, 2);
    train_round(r, 2);
    say(r, 2, MSG_RESET, 0, &(struct msg_reset){.reason = proto_str("lease 2 is not yours")});
    struct msg_lease other = {77, 1, 9000, 40};
    say_leases(r, 2, &other, 1);
    assert_local_is_anchor(r, 2);
    assert_int_equal(look(r, 2).contributions_refused, 1);
    assert_null(file_find(&r->node[2].disk, "ready-0"));
    train_round(r, 2);
    assert_int_equal(ready_of(r, 2)->ranges[0].lease, 77);
}

/* ---- deaths ----------------------------------------------------------------------------- */

/* A contribution outlives its trainer: the next one trains on what it does not claim, and it is summed. */
static void frozen_contribution_outlives_its_trainer(void **state) {
    struct rig *r = *state;
    three_ready(r);
    struct digest root = ready_of(r, 3)->root;
    trainer_down(r, 3);
    trainer_up(r, 3, 1);
    assert_local_is_anchor(r, 3);
    assert_int_equal(r->node[3].queue[0].start, 3000 + STEPS * BATCH);
    whole_round(r, &THREE);
    assert_true(digest_equal(&ready_of(r, 3)->root, &root));
    for (uint32_t id = 1; id <= 3; id++) announce(r, id, &THREE, id > 1 ? STEPS * BATCH : 0);
    assert_local_is_anchor(r, 3);
    assert_int_equal(r->node[3].queue[0].start, 3000 + STEPS * BATCH);
    assert_int_equal(look(r, 3).contributions_summed, 1);
}

/* ... and where it is not summed its samples are trained again, by somebody who holds them. */
static void contribution_without_trainer_and_commit_is_trained_again(void **state) {
    struct rig *r = *state;
    struct plan_spec two = {{2}, 1, 1, 2};
    three_ready(r);
    trainer_down(r, 3);
    trainer_up(r, 3, 1);
    train(r, 3);
    whole_round(r, &two);
    for (uint32_t id = 1; id <= 3; id++) announce(r, id, &two, id == 2 ? STEPS * BATCH : 0);
    assert_local_is_anchor(r, 3);
    assert_int_equal(r->node[3].queue[0].start, 3000);
    train_round(r, 3);
    assert_int_equal(ready_of(r, 3)->ranges[0].count, STEPS * BATCH);
}

/* The power fails at any write between FREEZE and READY: either the member comes back with the
 * READY it may have shown, bytes intact, or with none at all, and never with another. */
static void crash_while_freezing_keeps_the_promise(void **state) {
    struct rig *r = *state;
    struct node *n = &r->node[2];
    struct digest root = {{0}};
    for (uint32_t at = 1; at < 8; at++) {
        node_with_work(r, 2);
        train(r, 2);
        train(r, 2);
        n->disk.fail_at = n->disk.ops + at;
        train(r, 2);
        bool died = !n->sync, shown = last_sent(r, 2, MSG_READY) != NULL;
        if (shown) root = ready_of(r, 2)->root;
        if (!died) node_kill(r, 2);
        disk_crash(&n->disk, at % 3);
        forget_sent(r);
        node_start(r, 2);
        dial_coordinator(r, 2);
        welcome(r, 2, NULL, 0);
        assert_int_equal(look(r, 2).chunks_missing, 0);
        const struct sent *again = last_sent(r, 2, MSG_READY);
        if (shown) assert_non_null(again);
        if (shown) assert_true(digest_equal(&((const struct msg_ready *)again->msg)->root, &root));
        node_kill(r, 2);
        disk_wipe(&n->disk);
        forget_sent(r);
        if (!died) return; /* every write was hit once */
    }
    fail_msg("freezing takes more writes than this test expects");
}

static void disk_copy(struct memory_disk *to, const struct memory_disk *from) {
    disk_wipe(to);
    for (int i = 0; i < FILES_MAX; i++) {
        struct file *f = &to->file[i];
        *f = from->file[i];
        if (!f->name[0]) continue;
        f->live = memcpy(xcalloc(f->bytes, 1), from->file[i].live, f->bytes);
        f->durable = f->mapped ? memcpy(xcalloc(f->bytes, 1), from->file[i].durable, f->bytes)
                               : f->live;
    }
}

static void come_back(struct rig *r, uint32_t id) {
    node_start(r, id);
    dial_coordinator(r, id);
    welcome(r, id, NULL, 0);
    say_holders(r, id, &THREE);
    settle(r);
}

/* Every chunk is as it was or as it should be. Returns how many are as they were. */
static uint32_t check_every_chunk(const struct rig *r, uint32_t id, const struct expectation *old,
                                  const struct expectation *new) {
    struct sync *s = r->node[id].sync;
    uint32_t n = 0;
    assert_int_equal(look(r, id).chunks_missing, 0);
    for (uint32_t c = 0; c < CHUNKS; c++) {
        const struct expectation *e = sync_chunk_version(s, c) == r->base_index ? new : old;
        size_t first = c * CHUNK,
               bytes = (c == CHUNKS - 1 ? ELEMENTS - first : CHUNK) * sizeof(float);
        assert_memory_equal(sync_anchor(s) + first, e->anchor + first, bytes);
        assert_memory_equal(sync_momentum(s) + first, e->momentum + first, bytes);
        n += e == old;
    }
    return n;
}

/* The power fails at any write while a commit is applied, and some of what was not flushed got to
 * the disk all the same: no chunk is torn, none is lost, and the rest is made up. */
static void crash_while_applying_tears_nothing(void **state) {
    struct rig *r = *state;
    struct node *n = &r->node[3];
    struct expectation old, new;
    struct memory_disk before = {0};
    uint32_t undone = 0, at = 0;
    three_ready(r);
    state_now(r, 1, &old);
    whole_round(r, &THREE);
    new = old;
    expect_step(r, &THREE, report_of(r, 1), &new);
    announce(r, 1, &THREE, 0);
    node_kill(r, 3);
    disk_copy(&before, &n->disk);
    for (bool survived = false; !survived; at++) {
        for (uint32_t torn = 0; torn < 4; torn++) {
            disk_copy(&n->disk, &before);
            n->disk.fail_at = at + 1;
            come_back(r, 3);
            survived = n->sync != NULL;
            if (survived) node_kill(r, 3);
            disk_crash(&n->disk, torn);
            node_start(r, 3);
            undone += check_every_chunk(r, 3, &old, &new);
            node_kill(r, 3);
            come_back(r, 3);
            pass(r, 500);
            assert_state(r, 3, &new);
            node_kill(r, 3);
        }
    }
    assert_in_range(at, 6, 12); /* ledger, journal, both arrays, index, and the READY goes */
    assert_true(undone > 0);
    disk_wipe(&before);
}

/* The journal is not enough where the disk itself lies: such a chunk is missing, and a donor has
 * it. */
static void rotten_chunk_is_fetched(void **state) {
    struct rig *r = *state;
    three_ready(r);
    whole_round(r, &THREE);
    for (uint32_t id = 1; id <= 3; id++) announce(r, id, &THREE, id > 1 ? STEPS * BATCH : 0);
    node_kill(r, 3);
    struct file *f = file_find(&r->node[3].disk, "anchor");
    f->live[5] ^= 1;
    f->live[CHUNK * 4 + 5] ^= 1;
    file_free(file_find(&r->node[3].disk, "journal"));
    node_start(r, 3);
    assert_int_equal(look(r, 3).chunks_missing, 2);
    dial_coordinator(r, 3);
    assert_int_equal(((const struct msg_hello *)last_sent(r, 3, MSG_HELLO)->msg)->has_state, 0);
    welcome(r, 3, (uint32_t[]){1, 2}, 2);
    assert_int_equal(look(r, 3).chunks_missing, 2); /* nobody has said which root is right */
    struct digest root = root_of(r, 1);
    say(r, 3, MSG_ROOT, 0, &(struct msg_root){r->base_index, root});
    settle(r);
    assert_same_state(r, 1, 3);
    assert_int_equal(count_sent(r, 1, MSG_STATE) + count_sent(r, 2, MSG_STATE), 2);
}

/* Aggregator and holder die right after the commit: both still have the results, and nobody
 * else. */
static void results_survive_their_holders(void **state) {
    struct rig *r = *state;
    three_ready(r);
    whole_round(r, &THREE);
    for (uint32_t id = 1; id <= 2; id++) {
        node_kill(r, id);
        disk_crash(&r->node[id].disk, 0);
        node_start(r, id);
        dial_coordinator(r, id);
        welcome(r, id, NULL, 0);
        say_holders(r, id, &THREE);
        settle(r);
    }
    announce(r, 3, &THREE, STEPS * BATCH);
    pass(r, 500);
    assert_int_equal(look(r, 1).state_index, r->base_index);
    assert_same_state(r, 1, 2);
    assert_same_state(r, 1, 3);
    assert_int_equal(look(r, 2).contributions_summed, 1);
}

/* Settled: nobody will ask any more, the bytes may go. */
static void settled_results_are_deleted(void **state) {
    struct rig *r = *state;
    three_ready(r);
    whole_round(r, &THREE);
    for (uint32_t id = 1; id <= 3; id++) announce(r, id, &THREE, id > 1 ? STEPS * BATCH : 0);
    assert_non_null(file_find(&r->node[1].disk, "result-0-0-0"));
    say(r, 1, MSG_HEARTBEAT_ACK, 0, &(struct msg_heartbeat_ack){.settled_index = r->base_index});
    assert_null(file_find(&r->node[1].disk, "result-0-0-0"));
}

/* An aggregator that restarts in the middle of a plan it had finished reports again, from disk. */
static void finished_shard_is_reported_after_a_restart(void **state) {
    struct rig *r = *state;
    three_ready(r);
    say_plan(r, &THREE);
    struct digest leaf = report_of(r, 1)->results[3].digest;
    node_kill(r, 1);
    disk_crash(&r->node[1].disk, 0);
    node_start(r, 1);
    forget_sent(r);
    dial_coordinator(r, 1);
    welcome(r, 1, NULL, 0);
    train(r, 2); /* READYs are needed to write the same plan again */
    struct msg_shard shard = {0, CHUNKS, 1, 2};
    struct msg_contributor k[2] = {{2, 12, 1, 96, {{1}}}, {3, 17, 0.75f, 96, {{2}}}};
    struct msg_plan plan = {.grid_exponent = GRID,
                            .codec = OUTER_INT8,
                            .contributors = k,
                            .contributors_count = 2,
                            .shards = &shard,
                            .shards_count = 1};
    say(r, 1, MSG_PLAN, r->plan, &plan);
    settle(r);
    assert_true(digest_equal(&report_of(r, 1)->results[3].digest, &leaf));
}

/* ---- catching up ------------------------------------------------------------------------ */

static void two_rounds(struct rig *r) {
    three_members(r);
    for (int round = 0; round < 2; round++) {
        train_round(r, 2);
        train_round(r, 3);
        whole_round(r, &THREE);
        for (uint32_t id = 1; id <= 3; id++)
            announce(r, id, &THREE, id > 1 ? (round + 1) * STEPS * BATCH : 0);
    }
}

static uint32_t states_allowed;
static bool only_some_states(struct rig *r, struct sent *m) {
    (void)r;
    return m->frame.type != MSG_STATE || (states_allowed && states_allowed--);
}

/* A joiner fetches the state while a commit lands: what it has is brought forward with the results,
 * the rest comes newer, and it ends with the same bits. Then it trains, with a member's moments. */
static void joiner_catches_up_while_a_commit_lands(void **state) {
    struct rig *r = *state;
    two_rounds(r);
    for (int i = 0; i < ELEMENTS; i++) r->node[2].moments[i] = 0.5f + (float)i;
    r->node[4] = (struct node){.exists = true, .id = 4, .trains = true};
    node_start(r, 4);
    dial_coordinator(r, 4);
    trainer_up(r, 4, 0);
    welcome(r, 4, (uint32_t[]){1, 2}, 2);
    struct digest root = root_of(r, 1);
    r->spoil = only_some_states;
    states_allowed = 2;
    say(r, 4, MSG_ROOT, 0, &(struct msg_root){r->base_index, root});
    settle(r);
    assert_int_equal(look(r, 4).chunks_missing, 4); /* stored as one batch */
    train_round(r, 2);
    train_round(r, 3);
    whole_round(r, &THREE);
    for (uint32_t id = 1; id <= 4; id++)
        announce(r, id, &THREE, id == 2 || id == 3 ? 3 * STEPS * BATCH : 0);
    r->spoil = NULL;
    root = root_of(r, 1);
    say(r, 4, MSG_ROOT, 0, &(struct msg_root){r->base_index, root});
    pass(r, 900);
    assert_same_state(r, 1, 4);
    assert_int_equal(r->node[4].resets, 1);
    assert_local_is_anchor(r, 4);
    assert_true(count_sent(r, 1, MSG_RESULT) + count_sent(r, 2, MSG_RESULT) > 2 * CHUNKS);
    struct msg_lease lease = lease_of(4, 0);
    say_leases(r, 4, &lease, 1);
    pass(r, 900);
    assert_true(r->node[4].moments_in);
    assert_memory_equal(r->node[4].moments, r->node[2].moments, sizeof r->node[4].moments);
    assert_int_equal(r->node[4].moments_steps, r->node[2].steps);
    train_round(r, 4);
    assert_int_equal(ready_of(r, 4)->base_index, r->base_index);
}

/* A member that missed a commit keeps its work: a donor's chunk comes as a change, too. */
static void missed_commit_keeps_the_work(void **state) {
    struct rig *r = *state;
    struct plan_spec two = {{2}, 1, 1, 2};
    three_members(r);
    train_round(r, 2);
    train(r, 3);
    whole_round(r, &two);
    announce(r, 1, &two, 0);
    announce(r, 2, &two, STEPS * BATCH);
    for (uint32_t id = 1; id <= 2; id++) /* the results are gone */
        say(r, id, MSG_HEARTBEAT_ACK, 0,
            &(struct msg_heartbeat_ack){.settled_index = r->base_index});
    r->node[3].connected = false;
    step(r, 3, &(struct sync_event){.type = SYNC_EV_DISCONNECTED});
    struct digest root = root_of(r, 1);
    dial_coordinator(r, 3);
    welcome(r, 3, (uint32_t[]){1}, 1);
    say(r, 3, MSG_ROOT, 0, &(struct msg_root){r->base_index, root});
    struct msg_lease lease = lease_of(3, 0);
    say_leases(r, 3, &lease, 1);
    pass(r, 900);
    assert_same_state(r, 1, 3);
    assert_int_equal(count_sent(r, 1, MSG_STATE), CHUNKS);
    assert_int_equal(r->node[3].resets, 1);
    assert_int_equal(r->node[3].adds, CHUNKS);
    train(r, 3);
    train(r, 3);
    assert_int_equal(ready_of(r, 3)->ranges[0].count, STEPS * BATCH);
}

/* The coordinator found our root wrong: nothing of it is kept. */
static void resync_fetches_everything_anew(void **state) {
    struct rig *r = *state;
    two_rounds(r);
    struct digest root = root_of(r, 1), wrong = {{1, 2, 3}};
    struct msg_address donor = {1, proto_str("10.0.0.1"), 7001};
    struct msg_resync msg = {
        .index = r->base_index, .root = root, .donors = &donor, .donors_count = 1};
    say(r, 3, MSG_RESYNC, 0, &msg);
    settle(r);
    assert_int_equal(look(r, 3).chunks_missing,
                     0); /* ours is the right one: only donors were meant */
    msg.root = wrong;
    say(r, 3, MSG_RESYNC, 0, &msg);
    assert_int_equal(look(r, 3).chunks_missing, CHUNKS);
    settle(r);
    assert_int_equal(look(r, 3).chunks_missing, CHUNKS); /* what the donor has is not that root */
    msg.root = root;
    say(r, 3, MSG_RESYNC, 0, &msg);
    pass(r, 900);
    assert_same_state(r, 1, 3);
    assert_int_equal(r->node[3].resets, 2);
}

/* Nobody to fetch from: it asks the coordinator for donors again rather than wait for ever. */
static void stuck_catch_up_asks_again(void **state) {
    struct rig *r = *state;
    two_rounds(r);
    node_new(r, 4, true);
    for (int i = 0; i < 25; i++) {
        pass(r, 100);
        say(r, 4, MSG_HEARTBEAT_ACK, 0, &(struct msg_heartbeat_ack){0});
    }
    assert_int_equal(r->node[4].disconnects, 1);
}

/* ---- hostile members -------------------------------------------------------------------- */

static bool flip_chunk(struct rig *r, struct sent *m) {
    struct msg_chunk *chunk = m->msg;
    (void)r;
    if (m->from == 3 && m->frame.type == MSG_CHUNK)
        ((uint8_t *)(uintptr_t)chunk->data.data)[9] ^= 1;
    return true;
}

/* Bytes that are not what was announced never reach the sum. */
static void wrong_chunk_closes_the_link(void **state) {
    struct rig *r = *state;
    three_ready(r);
    r->spoil = flip_chunk;
    say_plan(r, &THREE);
    assert_true(r->node[1].closes > 0);
    assert_null(last_sent(r, 1, MSG_SHARD_REPORT));
    say(r, 1, MSG_DROP, r->plan, &(struct msg_drop){.member = 3});
    settle(r);
    assert_int_equal(report_of(r, 1)->summed[0].weight, 12);
}

static bool flip_leaves(struct rig *r, struct sent *m) {
    (void)r;
    if (m->from == 3 && m->frame.type == MSG_LEAVES)
        ((struct msg_leaves *)m->msg)->all[1].digest.b[0] ^= 1;
    return true;
}

static void wrong_leaves_close_the_link(void **state) {
    struct rig *r = *state;
    three_ready(r);
    r->spoil = flip_leaves;
    say_plan(r, &THREE);
    assert_true(r->node[1].closes > 0);
    assert_int_equal(count_sent(r, 3, MSG_CHUNK), 0);
}

/* Who claims more than itself in a chunk's set would be paid for others. */
static bool claim_everybody(struct rig *r, struct sent *m) {
    struct msg_chunk *chunk = m->msg;
    (void)r;
    if (m->from == 3 && m->frame.type == MSG_CHUNK) ((uint8_t *)(uintptr_t)chunk->set.data)[0] = 3;
    return true;
}

static void foreign_set_closes_the_link(void **state) {
    struct rig *r = *state;
    three_ready(r);
    r->spoil = claim_everybody;
    say_plan(r, &THREE);
    assert_true(r->node[1].closes > 0);
    assert_null(last_sent(r, 1, MSG_SHARD_REPORT));
}

/* A value beyond the grid would overflow the exact sum: its contributor is left out, not the
 * round. */
static void value_beyond_the_grid_drops_its_contributor(void **state) {
    struct rig *r = *state;
    three_members(r);
    train_round(r, 2);
    train(r, 3);
    train(r, 3);
    r->node[3].local[0] = 1e6f; /* times 2^30 */
    train(r, 3);
    say_plan(r, &THREE);
    assert_int_equal(report_of(r, 1)->summed[0].weight, 12);
}

/* The clip factor stands on the announced norm, so who announces a smaller one than its values have
 * would get past it: left out from the chunk on in which that shows, which here is the last. */
static void larger_norm_than_announced_drops_its_contributor(void **state) {
    struct rig *r = *state;
    three_members(r);
    train_round(r, 2);
    train_round(r, 3);
    ((struct msg_ready *)(uintptr_t)ready_of(r, 3))->norm *= 0.999;
    say_plan(r, &THREE);
    const struct msg_shard_report *report = report_of(r, 1);
    assert_int_equal(report->summed[0].weight, 12 + 17);
    assert_int_equal(report->summed[report->summed_count - 1].weight, 12);
}

static uint32_t liar;
static bool flip_results(struct rig *r, struct sent *m) {
    struct msg_result *result = m->msg;
    (void)r;
    if (m->from == liar && m->frame.type == MSG_RESULT)
        ((uint8_t *)(uintptr_t)result->data.data)[9] ^= 1;
    return true;
}
static bool flip_result_leaves(struct rig *r, struct sent *m) {
    (void)r;
    if (m->from == liar && m->frame.type == MSG_RESULT_LEAVES)
        ((struct msg_result_leaves *)m->msg)->leaves[0].digest.b[0] ^= 1;
    return true;
}

/* A holder that lies costs a detour to the other one. */
static void lying_holder_is_passed_over(void **state) {
    struct rig *r = *state;
    bool (*const lies[])(struct rig *, struct sent *) = {flip_results, flip_result_leaves};
    three_members(r);
    for (int round = 0; round < 4; round++) {
        r->spoil = NULL;
        train_round(r, 2);
        train_round(r, 3);
        whole_round(r, &THREE);
        r->spoil = lies[round / 2];
        liar = 1 + round % 2;
        for (uint32_t id = 1; id <= 3; id++)
            announce(r, id, &THREE, id > 1 ? (round + 1) * STEPS * BATCH : 0);
        pass(r, 600);
        assert_same_state(r, 1, 3);
        for (uint32_t id = 1; id <= 3; id++)
            say(r, id, MSG_HEARTBEAT_ACK, 0, &(struct msg_heartbeat_ack){0});
    }
}

static bool flip_states(struct rig *r, struct sent *m) {
    struct msg_state *chunk = m->msg;
    (void)r;
    if (m->from == liar && m->frame.type == MSG_STATE)
        ((uint8_t *)(uintptr_t)chunk->data.data)[9] ^= 1;
    return true;
}

static void lying_donor_is_passed_over(void **state) {
    struct rig *r = *state;
    two_rounds(r);
    r->spoil = flip_states;
    liar = 1;
    node_new(r, 4, false);
    struct msg_address list[] = {{1, proto_str("10.0.0.1"), 7001},
                                 {2, proto_str("10.0.0.1"), 7002}};
    struct msg_resync msg = {
        .index = r->base_index, .root = root_of(r, 1), .donors = list, .donors_count = 2};
    say(r, 4, MSG_RESYNC, 0, &msg);
    pass(r, 900);
    assert_true(r->node[4].closes > 0);
    assert_same_state(r, 2, 4);
}

static uint32_t xorshift(uint32_t *x) {
    *x ^= *x << 13;
    *x ^= *x >> 17;
    return *x ^= *x << 5;
}

/* Well-formed messages with senseless numbers, from members and (after a bug) from the coordinator:
 * no crash, no state touched. The sanitizers watch. */
static void senseless_messages_do_no_harm(void **state) {
    struct rig *r = *state;
    uint8_t junk[CHUNK * 8];
    struct msg_digest_item leaves[8];
    struct msg_summed runs[2] = {{3, {junk, 1}, 5}, {UINT32_MAX, {junk, 128}, UINT64_MAX}};
    uint32_t x = 7;
    two_rounds(r);
    train_round(r, 2);
    train_round(r, 3);
    r->spoil = member_3_chunks_wait;
    say_plan(r, &THREE);
    struct expectation before, after;
    state_now(r, 1, &before);
    for (size_t i = 0; i < sizeof junk; i++) junk[i] = (uint8_t)xorshift(&x);
    for (size_t i = 0; i < sizeof leaves; i++) ((uint8_t *)leaves)[i] = (uint8_t)xorshift(&x);
    for (int i = 0; i < 20000; i++) {
        uint32_t to = 1 + xorshift(&x) % 3, from = 1 + xorshift(&x) % 4, small = xorshift(&x) % 6;
        uint64_t round = xorshift(&x) % 3 ? r->rounds - xorshift(&x) % 2 : xorshift(&x);
        uint32_t chunk = xorshift(&x) % 4 ? small : xorshift(&x) % PROTO_CHUNKS_MAX;
        struct proto_bytes bytes = {junk, xorshift(&x) % 3 ? 1 : xorshift(&x) % sizeof junk};
        struct frame f = {.term = xorshift(&x) % 4 ? r->term : xorshift(&x),
                          .plan = xorshift(&x) % 4 ? r->plan : xorshift(&x) % 4};
        union {
            struct msg_leaves l;
            struct msg_want w;
            struct msg_chunk c;
            struct msg_result_get g;
            struct msg_result_leaves rl;
            struct msg_result re;
            struct msg_state_get sg;
            struct msg_state st;
            struct msg_moments mo;
            struct msg_none no;
            struct msg_moments_get mg;
        } m = {0};
        f.type = (uint8_t)(MSG_LEAVES + xorshift(&x) % 11);
        switch (f.type) {
        case MSG_LEAVES:
            m.l = (struct msg_leaves){.round = round, .all = leaves, .all_count = small};
            break;
        case MSG_WANT: m.w = (struct msg_want){.round = round, .chunks = bytes}; break;
        case MSG_CHUNK:
            m.c = (struct msg_chunk){.round = round,
                                     .chunk = chunk,
                                     .codec = (uint8_t)(small % 3),
                                     .set = {junk, 1},
                                     .weight = small,
                                     .data = bytes};
            break;
        case MSG_RESULT_GET:
            m.g = (struct msg_result_get){
                .round = round, .plan = small % 2 ? f.plan : small, .chunks = bytes};
            break;
        case MSG_RESULT_LEAVES:
            m.rl = (struct msg_result_leaves){.round = round,
                                              .plan = f.plan,
                                              .first = chunk,
                                              .leaves = leaves,
                                              .leaves_count = small,
                                              .summed = runs,
                                              .summed_count = small % 3};
            break;
        case MSG_RESULT:
            m.re = (struct msg_result){
                .round = round, .plan = f.plan, .chunk = chunk, .codec = 1, .data = bytes};
            break;
        case MSG_STATE_GET:
            m.sg = (struct msg_state_get){.index_min = small, .chunks = bytes};
            break;
        case MSG_STATE:
            m.st = (struct msg_state){.chunk = chunk,
                                      .version = r->base_index,
                                      .index = r->base_index,
                                      .path = leaves,
                                      .path_count = small,
                                      .data = bytes};
            break;
        case MSG_MOMENTS:
            m.mo = (struct msg_moments){.chunk = chunk, .steps = small, .data = bytes};
            break;
        case MSG_NONE:
            m.no = (struct msg_none){.what = (uint8_t)(MSG_LEAVES + small), .round = round};
            break;
        default: break;
        }
        if (xorshift(&x) % 8 == 0)
            step(r, to, &(struct sync_event){.type = SYNC_EV_PEER_OPEN, .peer = from});
        step(r, to,
             &(struct sync_event){
                 .type = SYNC_EV_PEER_MESSAGE, .peer = from, .frame = f, .msg = &m});
        if (i % 50 == 0) {
            while (sync_has_work(r->node[to].sync))
                step(r, to, &(struct sync_event){.type = SYNC_EV_WORK});
            forget_sent(r);
        }
    }
    state_now(r, 1, &after);
    assert_memory_equal(&before, &after, sizeof before);
    assert_same_state(r, 1, 2);
    assert_same_state(r, 1, 3);
}

/* ---- checkpoints, leaving --------------------------------------------------------------- */

static void checkpoint_is_of_the_state_it_names(void **state) {
    struct rig *r = *state;
    node_new(r, 1, false);
    struct digest root = root_of(r, 1);
    struct msg_checkpoint_write w = {.index = 9, .root = root, .url = proto_str("file:///x")};
    say(r, 1, MSG_CHECKPOINT_WRITE, 0, &w);
    assert_int_equal(
        ((const struct msg_checkpoint_done *)last_sent(r, 1, MSG_CHECKPOINT_DONE)->msg)->written,
        0);
    w.index = 0;
    say(r, 1, MSG_CHECKPOINT_WRITE, 0, &w);
    assert_int_equal(r->node[1].checkpoint_begins, 1);
    /* the connection breaks before the signature: it is asked for again on the next one */
    struct sync_event manifest = {.type = SYNC_EV_CHECKPOINT,
                                  .manifest = {(const uint8_t *)"abc", 3}};
    step(r, 1, &manifest);
    r->node[1].connected = false;
    step(r, 1, &(struct sync_event){.type = SYNC_EV_DISCONNECTED});
    dial_coordinator(r, 1);
    welcome(r, 1, NULL, 0);
    assert_int_equal(count_sent(r, 1, MSG_CHECKPOINT_SIGN), 2);
    say(r, 1, MSG_CHECKPOINT_SIGNED, 0, &(struct msg_checkpoint_signed){.index = 0});
    step(r, 1,
         &(struct sync_event){.type = SYNC_EV_CHECKPOINT, .done = true, .ok = true, .text = ""});
    const struct msg_checkpoint_done *done = last_sent(r, 1, MSG_CHECKPOINT_DONE)->msg;
    assert_int_equal(done->written, 1);
    assert_int_equal(done->index, 0);
}

static void leaving_is_the_last_word(void **state) {
    struct rig *r = *state;
    node_with_work(r, 2);
    step(r, 2, &(struct sync_event){.type = SYNC_EV_LEAVE});
    assert_non_null(last_sent(r, 2, MSG_LEAVE));
    uint32_t sent = r->sent_count;
    pass(r, 2000);
    assert_int_equal(r->sent_count, sent);
}

#define T(name) cmocka_unit_test_setup_teardown(name, rig_setup, rig_teardown)
int main(int argc, char **argv) {
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        T(fresh_member_derives_the_initial_state),
        T(restart_shows_its_state),
        T(trainer_gets_anchor_and_samples),
        T(ready_claims_what_was_trained),
        T(round_ends_by_the_clock_too),
        T(end_of_data_ends_the_round),
        T(lost_lease_resets_to_the_anchor),
        T(same_lease_of_another_generation_is_lost),
        T(more_leases_do_not_disturb),
        T(dead_trainer_gives_its_samples_back),
        T(training_goes_on_without_the_coordinator),
        T(trainer_with_broken_numbers_is_reset),
        T(older_term_ends_the_connection),
        T(frames_of_another_session_are_ignored),
        T(another_history_ends_the_connection),
        T(silent_coordinator_is_left),
        T(round_gives_everybody_the_right_bits),
        T(contributor_aggregates),
        T(dropped_contributor_does_not_count_in_the_divisor),
        T(silent_contributor_is_dropped_by_the_aggregator),
        T(broken_link_resumes),
        T(new_plan_makes_the_old_one_void),
        T(leaves_before_the_plan),
        T(new_term_voids_the_plan),
        T(not_summed_keeps_work_and_claims),
        T(commit_reaches_a_trainer_at_work),
        T(commit_meets_a_freeze),
        T(busy_slot_holds_the_next_commit_back),
        T(residual_is_taken_over_only_when_summed),
        T(partly_summed_is_mixed_where_it_is_in),
        T(refused_contribution_resets),
        T(frozen_contribution_outlives_its_trainer),
        T(contribution_without_trainer_and_commit_is_trained_again),
        T(crash_while_freezing_keeps_the_promise),
        T(crash_while_applying_tears_nothing),
        T(rotten_chunk_is_fetched),
        T(results_survive_their_holders),
        T(settled_results_are_deleted),
        T(finished_shard_is_reported_after_a_restart),
        T(joiner_catches_up_while_a_commit_lands),
        T(missed_commit_keeps_the_work),
        T(resync_fetches_everything_anew),
        T(stuck_catch_up_asks_again),
        T(wrong_chunk_closes_the_link),
        T(wrong_leaves_close_the_link),
        T(foreign_set_closes_the_link),
        T(value_beyond_the_grid_drops_its_contributor),
        T(larger_norm_than_announced_drops_its_contributor),
        T(lying_holder_is_passed_over),
        T(lying_donor_is_passed_over),
        T(senseless_messages_do_no_harm),
        T(checkpoint_is_of_the_state_it_names),
        T(leaving_is_the_last_word),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
