/* test_sync_hostile.c - members that lie, and messages without sense: nothing of it reaches a sum or the state. */
#include "tests/sync_rounds.h"

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

static bool claim_newer_states(struct rig *r, struct sent *m) {
    struct msg_state *chunk = m->msg;
    if (m->from == liar && m->frame.type == MSG_STATE) chunk->version = r->base_index;
    return true;
}

/* A leaf does not hold its version: what is said of it must be what the ledger says. Here an old chunk is
 * shown, with the path of its own state, as if it were of the newest version. */
static void donor_that_lies_about_versions_is_passed_over(void **state) {
    struct rig *r = *state;
    set_fragments(r, 2, 1, 0.5f);
    three_members(r);
    for (int i = 0; i < STEPS; i++)
        for (uint32_t id = 2; id <= 3; id++) train(r, id);
    whole_round(r, &THREE); /* fragment 0 */
    for (uint32_t id = 1; id <= 3; id++) announce(r, id, &THREE, id > 1 ? 2 * BATCH : 0);
    r->spoil = claim_newer_states;
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
    assert_int_equal(sync_chunk_version(r->node[4].sync, 1), 0);
}

static uint32_t xorshift(uint32_t *x) {
    *x ^= *x << 13;
    *x ^= *x >> 17;
    return *x ^= *x << 5;
}

/* Well-formed messages with senseless numbers: no crash, no state touched. The sanitizers watch. */
static void babble(struct rig *r) {
    uint8_t junk[CHUNK * 8];
    struct msg_digest_item leaves[8];
    struct msg_summed runs[2] = {{3, {junk, 1}, 5}, {UINT32_MAX, {junk, 128}, UINT64_MAX}};
    uint32_t x = 7;
    struct expectation before, after;
    state_now(r, 1, &before);
    for (size_t i = 0; i < sizeof junk; i++) junk[i] = (uint8_t)xorshift(&x);
    for (size_t i = 0; i < sizeof leaves; i++) ((uint8_t *)leaves)[i] = (uint8_t)xorshift(&x);
    for (int i = 0; i < 20000; i++) {
        uint32_t to = 1 + xorshift(&x) % 3, from = 1 + xorshift(&x) % 4, small = xorshift(&x) % 6;
        uint64_t round = xorshift(&x) % 3 ? r->rounds - xorshift(&x) % 2 : xorshift(&x);
        uint32_t fragment = r->outer.fragments == 1 ? 0 : xorshift(&x) % 16 % 3;
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
            m.l = (struct msg_leaves){.fragment = fragment, .round = round, .all = leaves, .all_count = small};
            break;
        case MSG_WANT: m.w = (struct msg_want){.fragment = fragment, .round = round, .chunks = bytes}; break;
        case MSG_CHUNK:
            m.c = (struct msg_chunk){.fragment = fragment, .round = round,
                                     .chunk = chunk,
                                     .codec = (uint8_t)(small % 3),
                                     .set = {junk, 1},
                                     .weight = small,
                                     .data = bytes};
            break;
        case MSG_RESULT_GET:
            m.g = (struct msg_result_get){
                .fragment = fragment, .round = round, .plan = small % 2 ? f.plan : small, .chunks = bytes};
            break;
        case MSG_RESULT_LEAVES:
            m.rl = (struct msg_result_leaves){.fragment = fragment, .round = round,
                                              .plan = f.plan,
                                              .first = chunk,
                                              .leaves = leaves,
                                              .leaves_count = small,
                                              .summed = runs,
                                              .summed_count = small % 3};
            break;
        case MSG_RESULT:
            m.re = (struct msg_result){
                .fragment = fragment, .round = round, .plan = f.plan, .chunk = chunk, .codec = 1, .data = bytes};
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
            m.no = (struct msg_none){
                .what = (uint8_t)(MSG_LEAVES + small), .fragment = fragment, .round = round};
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

static void senseless_messages_do_no_harm(void **state) {
    struct rig *r = *state;
    two_rounds(r);
    train_round(r, 2);
    train_round(r, 3);
    r->spoil = member_3_chunks_wait;
    say_plan(r, &THREE);
    babble(r);
}

/* The same with two fragments, a plan in work for one and contributions to both. */
static void senseless_messages_about_fragments_do_no_harm(void **state) {
    struct rig *r = *state;
    set_fragments(r, 2, 1, 0.5f);
    three_members(r);
    for (int i = 0; i < STEPS; i++)
        for (uint32_t id = 2; id <= 3; id++) train(r, id);
    r->spoil = member_3_chunks_wait;
    say_plan(r, &THREE);
    babble(r);
}

#define T(name) cmocka_unit_test_setup_teardown(name, rig_setup, rig_teardown)
int main(int argc, char **argv) {
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        T(wrong_chunk_closes_the_link),
        T(wrong_leaves_close_the_link),
        T(foreign_set_closes_the_link),
        T(value_beyond_the_grid_drops_its_contributor),
        T(larger_norm_than_announced_drops_its_contributor),
        T(lying_holder_is_passed_over),
        T(lying_donor_is_passed_over),
        T(donor_that_lies_about_versions_is_passed_over),
        T(senseless_messages_do_no_harm),
        T(senseless_messages_about_fragments_do_no_harm),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
