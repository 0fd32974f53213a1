/* test_core_share.c - the coordinator's core: members share the work of one checkpoint. */
#include "tests/test_core.h"

/* Three trainers (2, 3, 4) stand at the newest commit, and our own node (1) is told to write it. Returns its
 * index. */
static uint64_t begin(struct rig *r, const char *url) {
    r->outer.checkpoint_rounds = 1;
    r->genesis.checkpoint_url = proto_str(url);
    start_reducing(r, 3);
    commit_once(r);
    for (int i = 2; i <= 4; i++) say_root(r, &r->fake[i]);
    say_root(r, &r->fake[1]);
    assert_non_null(sent(r, &r->fake[1], MSG_CHECKPOINT_WRITE));
    return ((const struct msg_checkpoint_write *)sent(r, &r->fake[1], MSG_CHECKPOINT_WRITE)->msg)->index;
}

static void offer(struct rig *r, uint64_t index, uint32_t part, bool check, uint32_t chunk) {
    struct msg_checkpoint_part msg = {.index = index, .part = part, .check = check, .chunk = chunk,
                                      .bytes = 8,
                                      .object = proto_str("model"), .url = proto_str("https://store/x")};
    say(r, &r->fake[1], MSG_CHECKPOINT_PART, 0, &msg);
}

static void answer(struct rig *r, int who, uint64_t index, uint32_t part, bool check, bool done) {
    struct msg_checkpoint_part_done msg = {.index = index, .part = part, .check = check, .done = done,
                                           .text = proto_str("why")};
    say(r, &r->fake[who], MSG_CHECKPOINT_PART_DONE, 0, &msg);
}

static const struct msg_checkpoint_part *asked(struct rig *r, int who) {
    const struct core_action *a = sent(r, &r->fake[who], MSG_CHECKPOINT_PART);
    return a ? a->msg : NULL;
}

/* -1: the writer was told nothing; else `done`. */
static int told(struct rig *r) {
    const struct core_action *a = sent(r, &r->fake[1], MSG_CHECKPOINT_PART_DONE);
    return a ? ((const struct msg_checkpoint_part_done *)a->msg)->done : -1;
}

static const struct msg_checkpoint_keep *kept(struct rig *r, int who) {
    const struct core_action *a = sent(r, &r->fake[who], MSG_CHECKPOINT_KEEP);
    return a ? a->msg : NULL;
}

static bool is_signed(struct rig *r, uint64_t index) {
    struct msg_checkpoint_sign sign = {.index = index, .manifest = proto_str("{}")};
    say(r, &r->fake[1], MSG_CHECKPOINT_SIGN, 0, &sign);
    return action(r, CORE_ACT_SIGN);
}

/* Who keeps a part's chunk sends it, somebody else looks at it, and only then is there a signature. */
static void a_part_is_sent_by_one_and_looked_at_by_another(void **state) {
    struct rig *r = *state;
    uint64_t index = begin(r, "s3://bucket/run");
    assert_int_equal(((const struct msg_checkpoint_write *)sent(r, &r->fake[1],
                                                                MSG_CHECKPOINT_WRITE)->msg)->shared, 1);
    assert_null(kept(r, 1));
    for (int h = 0; h < 3; h++) { /* of 12 chunks each its own four and the next one's */
        const struct msg_checkpoint_keep *k = kept(r, 2 + h);
        assert_int_equal(k->index, index);
        assert_int_equal(k->chunks_count, 2);
        assert_int_equal(k->chunks[0].start, 4 * h);
        assert_int_equal(k->chunks[1].start, 4 * ((h + 1) % 3));
        assert_int_equal(k->chunks[0].count + k->chunks[1].count, 8);
    }
    offer(r, index, 7, false, 5); /* the share of 3, which 2 keeps too */
    int who = asked(r, 2) ? 2 : 3;
    assert_int_equal(asked(r, who)->part, 7);
    answer(r, 4, index, 7, false, true); /* was not asked */
    assert_int_equal(told(r), -1);
    answer(r, who, index, 7, false, true);
    assert_int_equal(told(r), 1);
    offer(r, index, 7, true, 5);
    assert_null(asked(r, who)); /* not itself */
    int other = asked(r, 4) ? 4 : 5 - who;
    assert_non_null(asked(r, other));
    answer(r, other, index, 7, true, true);
    assert_int_equal(told(r), 1);
    assert_true(is_signed(r, index));
    struct msg_checkpoint_done done = {.index = index, .written = 1, .manifest = root_at(1)};
    say(r, &r->fake[1], MSG_CHECKPOINT_DONE, 0, &done);
    for (int i = 2; i <= 4; i++) assert_int_equal(kept(r, i)->chunks_count, 0); /* over */
    offer(r, index, 8, false, 5);
    assert_int_equal(told(r), 0);
}

static void no_manifest_is_signed_while_a_part_was_looked_at_by_nobody(void **state) {
    struct rig *r = *state;
    uint64_t index = begin(r, "s3://bucket/run");
    offer(r, index, 0, false, 0);
    answer(r, asked(r, 2) ? 2 : 4, index, 0, false, true);
    assert_int_equal(told(r), 1);
    assert_false(is_signed(r, index));
    assert_non_null(strstr(action(r, CORE_ACT_CLOSE)->text, "looked at"));
}

/* The writer's own look is enough, for what it was told that nobody will. */
static void what_nobody_does_is_the_writers(void **state) {
    struct rig *r = *state;
    uint64_t index = begin(r, "s3://bucket/run");
    offer(r, index, 0, false, 0);
    answer(r, asked(r, 2) ? 2 : 4, index, 0, false, true);
    offer(r, index, 0, true, 0);
    for (int k = 0; k < 2; k++) {
        int who = asked(r, 2) ? 2 : asked(r, 3) ? 3 : 4;
        assert_non_null(asked(r, who));
        answer(r, who, index, 0, true, false);
    }
    assert_int_equal(told(r), 0);
    answer(r, 1, index, 0, true, true);
    assert_true(is_signed(r, index));
}

/* From who says no to the neighbour that keeps it too, from who is gone likewise, and then to the writer. */
static void a_part_goes_on_when_its_member_does_not_do_it(void **state) {
    struct rig *r = *state;
    uint64_t index = begin(r, "s3://bucket/run");
    offer(r, index, 0, false, 9); /* the share of 4, which 3 keeps too */
    int who = asked(r, 4) ? 4 : 3, other = 7 - who;
    answer(r, who, index, 0, false, false);
    assert_non_null(asked(r, other));
    step(r, &(struct core_event){.type = CORE_EV_CLOSED, .conn = r->fake[other].conn});
    r->fake[other].conn = 0;
    tick(r, 100);
    assert_int_equal(told(r), 0);
    offer(r, index, 1, false, 9); /* who is left says nothing, though it lives */
    assert_non_null(asked(r, who));
    bool given_back = false;
    for (uint32_t ms = 0; ms < 4 * r->outer.silence_ms_max + 300 && !given_back; ms += 100) {
        pass(r, 100);
        given_back = told(r) == 0;
    }
    assert_true(given_back);
}

/* Nobody is given more than it can do soon. What is over the writer sends at once; looks wait for who is
 * done first. */
static void a_member_has_two_parts_at_a_time(void **state) {
    struct rig *r = *state;
    uint64_t index = begin(r, "s3://bucket/run");
    uint32_t given[5] = {0}, looks[5] = {0};
    int with[12], back = 0, done = 0;
    for (uint32_t i = 0; i < 12; i++) {
        offer(r, index, i, false, i);
        with[i] = asked(r, 2) ? 2 : asked(r, 3) ? 3 : asked(r, 4) ? 4 : 0;
        given[with[i]]++;
        back += told(r) == 0;
    }
    for (int m = 2; m <= 4; m++) assert_int_equal(given[m], 2);
    assert_int_equal(back, 6);
    for (uint32_t i = 0; i < 12; i++)
        if (with[i]) answer(r, with[i], index, i, false, true);
    for (uint32_t i = 0; i < 12; i++) {
        offer(r, index, i, true, i);
        with[i] = asked(r, 2) ? 2 : asked(r, 3) ? 3 : asked(r, 4) ? 4 : 0;
        looks[with[i]]++;
        assert_int_equal(told(r), -1);
    }
    for (int m = 2; m <= 4; m++) assert_int_equal(looks[m], 2);
    while (done < 12) { /* each answer lets the next one go */
        int i = 0;
        while (i < 12 && with[i] <= 0) i++;
        assert_true(i < 12);
        answer(r, with[i], index, (uint32_t)i, true, true);
        assert_int_equal(told(r), 1);
        with[i] = -1;
        done++;
        for (int m = 2; m <= 4; m++)
            if (asked(r, m)) with[asked(r, m)->part] = m;
    }
    assert_true(is_signed(r, index));
}

/* A writer that comes back has lost its offers, or does them itself: nobody is asked for more. */
static void a_writer_that_was_away_goes_on_alone(void **state) {
    struct rig *r = *state;
    uint64_t index = begin(r, "s3://bucket/run");
    offer(r, index, 0, false, 0);
    step(r, &(struct core_event){.type = CORE_EV_CLOSED, .conn = r->fake[1].conn});
    r->fake[1].conn = 0;
    dial(r, &r->fake[1]);
    hello(r, &r->fake[1]);
    for (int i = 2; i <= 4; i++) assert_int_equal(kept(r, i)->chunks_count, 0);
    answer(r, 2, index, 0, false, true); /* too late */
    assert_int_equal(told(r), -1);
}

static void a_folder_is_written_by_one(void **state) {
    struct rig *r = *state;
    begin(r, "file:///checkpoints");
    assert_int_equal(((const struct msg_checkpoint_write *)sent(r, &r->fake[1],
                                                                MSG_CHECKPOINT_WRITE)->msg)->shared, 0);
    assert_null(sent(r, NULL, MSG_CHECKPOINT_KEEP));
}

/* A URL from a member would make others send bytes where it likes. */
static void only_the_writer_offers_parts(void **state) {
    struct rig *r = *state;
    uint64_t index = begin(r, "s3://bucket/run");
    struct msg_checkpoint_part msg = {.index = index, .bytes = 8, .object = proto_str("m"),
                                      .url = proto_str("https://x")};
    say(r, &r->fake[3], MSG_CHECKPOINT_PART, 0, &msg);
    assert_null(sent(r, NULL, MSG_CHECKPOINT_PART));
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_PROTOCOL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        T(a_part_is_sent_by_one_and_looked_at_by_another),
        T(no_manifest_is_signed_while_a_part_was_looked_at_by_nobody),
        T(what_nobody_does_is_the_writers),
        T(a_part_goes_on_when_its_member_does_not_do_it),
        T(a_member_has_two_parts_at_a_time),
        T(a_writer_that_was_away_goes_on_alone),
        T(a_folder_is_written_by_one),
        T(only_the_writer_offers_parts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
