/* test_sync_deaths.c - processes, trainers, disks and machines that die at any moment: what a member promised is there
 * when it comes back. */
#include "tests/sync_rounds.h"

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

/* ... and where it is not summed the same bytes go into the next round: a round's work is not lost with a process that
 * was away when its plan was made. */
static void contribution_without_trainer_and_commit_goes_into_the_next_round(void **state) {
    struct rig *r = *state;
    struct plan_spec two = {{2}, 1, 1, 2};
    three_ready(r);
    struct digest root = ready_of(r, 3)->root;
    trainer_down(r, 3);
    trainer_up(r, 3, 1);
    whole_round(r, &two);
    for (uint32_t id = 1; id <= 3; id++) announce(r, id, &two, id == 2 ? STEPS * BATCH : 0);
    assert_local_is_anchor(r, 3);
    assert_int_equal(r->node[3].queue[0].start, 3000 + STEPS * BATCH);
    const struct msg_ready *again = ready_of(r, 3);
    assert_int_equal(again->round, 1);
    assert_int_equal(again->base_index, look(r, 3).state_index);
    assert_true(digest_equal(&again->root, &root));
    assert_int_equal(again->ranges[0].start, 3000);
    assert_int_equal(again->ranges[0].count, STEPS * BATCH);
    node_kill(r, 3); /* and it is durable */
    disk_crash(&r->node[3].disk, 3);
    node_start(r, 3);
    forget_sent(r);
    dial_coordinator(r, 3);
    welcome(r, 3, NULL, 0);
    assert_int_equal(ready_of(r, 3)->round, 1);
    assert_true(digest_equal(&ready_of(r, 3)->root, &root));
}

/* Its samples are trained again where the coordinator wants nothing of it. */
static void contribution_without_trainer_that_is_refused_is_trained_again(void **state) {
    struct rig *r = *state;
    three_ready(r);
    trainer_down(r, 3);
    trainer_up(r, 3, 1);
    say(r, 3, MSG_RESET, 0, &(struct msg_reset){.reason = proto_str("it never arrived")});
    settle(r);
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
    if (!r->node[id].sync) return;
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

#define T(name) cmocka_unit_test_setup_teardown(name, rig_setup, rig_teardown)
int main(int argc, char **argv) {
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        T(frozen_contribution_outlives_its_trainer),
        T(contribution_without_trainer_and_commit_goes_into_the_next_round),
        T(contribution_without_trainer_that_is_refused_is_trained_again),
        T(crash_while_freezing_keeps_the_promise),
        T(crash_while_applying_tears_nothing),
        T(rotten_chunk_is_fetched),
        T(results_survive_their_holders),
        T(settled_results_are_deleted),
        T(finished_shard_is_reported_after_a_restart),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
