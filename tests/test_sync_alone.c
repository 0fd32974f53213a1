/* test_sync_alone.c - a member's machine alone, against a coordinator that is a script: what it trains on and claims,
 * terms and sessions, checkpoints, leaving. */
#include "tests/sync_rounds.h"

/* ---- alone ------------------------------------------------------------------------------- */

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

/* A cable that is out for a while must not leave the trainer without work, however short the rounds are. */
static void a_fast_trainer_asks_for_what_it_works_off_in_some_silences(void **state) {
    struct rig *r = *state;
    r->outer.lease_samples = 1000;
    node_new(r, 2, true);
    trainer_up(r, 2, 1);
    say_leases(r, 2, &(struct msg_lease){7, 3, 50, 16}, 1);
    uint32_t two_rounds = ((const struct msg_lease_ask *)last_sent(r, 2, MSG_LEASE_ASK)->msg)->samples;
    assert_in_range(two_rounds, 1, 4 * STEPS * BATCH);
    step(r, 2, &(struct sync_event){.type = SYNC_EV_TRAINER_STEP, .samples = BATCH, .steps = 1,
                                    .loss = 1, .tokens_per_s = 100 * SEQUENCE});
    say_leases(r, 2, &(struct msg_lease){7, 3, 50, 16}, 1);
    pass(r, 1000);
    assert_in_range(((const struct msg_lease_ask *)last_sent(r, 2, MSG_LEASE_ASK)->msg)->samples,
                    300 - 16, 300);
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

/* A step that outlasts the silence is no silence, while layers of it are being computed; one that stands
 * still is. */
static uint64_t progress_after(struct rig *r, uint64_t beats_a_tick) {
    static uint64_t beats;
    for (int i = 0; i < 40; i++) {
        r->now += SYNC_TICK_MS;
        step(r, 2, &(struct sync_event){.type = SYNC_EV_TICK, .beats = beats += beats_a_tick});
        say(r, 2, MSG_HEARTBEAT_ACK, 0, &(struct msg_heartbeat_ack){0});
    }
    return ((const struct msg_heartbeat *)last_sent(r, 2, MSG_HEARTBEAT)->msg)->progress;
}

static void a_long_step_shows_that_it_goes_on(void **state) {
    struct rig *r = *state;
    node_with_work(r, 2);
    uint64_t still = progress_after(r, 0);
    assert_int_equal(progress_after(r, 0), still);
    uint64_t moving = progress_after(r, 1);
    assert_true(moving > still);
    assert_true(progress_after(r, 1) > moving);
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

/* ---- terms and sessions ------------------------------------------------------------------ */

/* The higher term is on disk before anything is done under it, so no restart forgets it. A coordinator with an
 * older store learns of it by our HELLO (simulator, seed 513: nobody told it, for ever), and gets no further. */
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
    assert_int_equal(count_sent(r, 2, MSG_HELLO), hellos + 1);
    assert_int_equal(((const struct msg_hello *)last_sent(r, 2, MSG_HELLO)->msg)->term_max, 5);
    assert_int_equal(r->node[2].disconnects, 0);
    welcome(r, 2, NULL, 0);
    assert_int_equal(r->node[2].disconnects, 1);
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

/* ---- checkpoints, leaving ---------------------------------------------------------------- */

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
    /* The coordinator cannot know that the writer lives and asks again. It is not told that this very one
     * has failed, as it will be published; another one waits for the end of this. */
    uint32_t said = count_sent(r, 1, MSG_CHECKPOINT_DONE);
    say(r, 1, MSG_CHECKPOINT_WRITE, 0, &w);
    assert_int_equal(count_sent(r, 1, MSG_CHECKPOINT_DONE), said);
    assert_int_equal(r->node[1].checkpoint_begins, 1);
    w.index = 5;
    say(r, 1, MSG_CHECKPOINT_WRITE, 0, &w);
    assert_int_equal(count_sent(r, 1, MSG_CHECKPOINT_DONE), said);
    say(r, 1, MSG_CHECKPOINT_SIGNED, 0, &(struct msg_checkpoint_signed){.index = 0});
    step(r, 1,
         &(struct sync_event){.type = SYNC_EV_CHECKPOINT, .done = true, .ok = true, .text = ""});
    assert_int_equal(count_sent(r, 1, MSG_CHECKPOINT_DONE), said + 2);
    const struct msg_checkpoint_done *other = last_sent(r, 1, MSG_CHECKPOINT_DONE)->msg;
    assert_int_equal(other->written, 0);
    assert_int_equal(other->index, 5);
    assert_memory_equal(other->text.data, "the state has moved on", 22);
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
        T(a_fast_trainer_asks_for_what_it_works_off_in_some_silences),
        T(ready_claims_what_was_trained),
        T(round_ends_by_the_clock_too),
        T(a_long_step_shows_that_it_goes_on),
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
        T(checkpoint_is_of_the_state_it_names),
        T(leaving_is_the_last_word),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
