/* test_core_referee.c - the coordinator's core: two members' states differ. */
#include "tests/test_core.h"

/* The state at `index` with one chunk wrong. */
static struct digest wrong_leaves(uint64_t index, uint32_t chunk, struct msg_digest_item *leaves) {
    leaves_at(index, leaves);
    leaves[chunk].digest = digest_of_number("wrong", index, chunk);
    return digest_tree_root(leaves, CHUNKS);
}

static void say_wrong_root(struct rig *r, struct fake *f, uint32_t chunk) {
    struct msg_digest_item leaves[CHUNKS];
    struct msg_root msg = {f->state, wrong_leaves(f->state, chunk, leaves)};
    say(r, f, MSG_ROOT, 0, &msg);
}

/* chunk CHUNKS: they are all right. */
static void show_leaves(struct rig *r, struct fake *f, uint32_t chunk) {
    struct msg_digest_item leaves[CHUNKS];
    if (chunk < CHUNKS)
        wrong_leaves(f->state, chunk, leaves);
    else
        leaves_at(f->state, leaves);
    struct msg_state_leaves msg = {
        .index = f->state, .leaves = leaves, .leaves_count = CHUNKS};
    say(r, f, MSG_STATE_LEAVES, 0, &msg);
}

static const struct msg_resync *resync_to(const struct rig *r, const struct fake *f) {
    const struct core_action *a = sent(r, f, MSG_RESYNC);
    return a ? a->msg : NULL;
}

/* What one has to fetch again is the chunk it has wrong, not the whole model. */
static void a_wrong_root_leads_to_the_first_differing_chunk(void **state) {
    struct rig *r = *state;
    start_reducing(r, 3);
    commit_once(r);
    say_root(r, &r->fake[1]);
    say_root(r, &r->fake[2]);
    say_wrong_root(r, &r->fake[3], 5);
    assert_int_equal(look(r).root_mismatches, 1);
    assert_true(logged(r, CORE_ERROR, "root"));
    for (int i = 1; i <= 4; i++) /* the own node's word needs no third */
        assert_int_equal(sent(r, &r->fake[i], MSG_STATE_LEAVES_GET) != NULL, i == 1 || i == 3);
    show_leaves(r, &r->fake[3], 5);
    assert_null(sent(r, NULL, MSG_RESYNC));
    show_leaves(r, &r->fake[1], CHUNKS);
    const struct msg_resync *resync = resync_to(r, &r->fake[3]);
    assert_non_null(resync);
    assert_null(resync_to(r, &r->fake[1]));
    assert_null(resync_to(r, &r->fake[2]));
    struct digest right = root_at(r->fake[1].state);
    assert_true(digest_equal(&resync->root, &right));
    assert_int_equal(resync->wrong.length, (CHUNKS + 7) / 8);
    for (uint32_t i = 0; i < CHUNKS; i++)
        assert_int_equal(proto_set_has(resync->wrong.data, i), i == 5);
    assert_int_equal(resync->donors_count, 3);
    assert_true(logged(r, CORE_ERROR, "the first is 5"));
    say_root(r, &r->fake[4]);
    assert_int_equal(look(r).settled_index, 0);
    say_root(r, &r->fake[3]); /* it caught up */
    assert_int_equal(look(r).settled_index, r->fake[1].state);
}

static void a_root_of_no_commit_is_ignored(void **state) {
    struct rig *r = *state;
    start_with(r, 2);
    say(r, &r->fake[2], MSG_ROOT, 0, &(struct msg_root){123456, root_at(1)});
    assert_true(logged(r, CORE_WARNING, "no commit"));
    assert_int_equal(look(r).root_mismatches, 0);
}

/* Whoever is first may be wrong; the own node is believed, and the first one told to catch up. */
static void the_own_node_overrules_who_was_first(void **state) {
    struct rig *r = *state;
    start_reducing(r, 2);
    commit_once(r);
    say_wrong_root(r, &r->fake[2], 0);
    say_root(r, &r->fake[1]);
    assert_non_null(sent(r, &r->fake[2], MSG_STATE_LEAVES_GET));
    say_root(r, &r->fake[3]);
    assert_null(sent(r, &r->fake[3], MSG_STATE_LEAVES_GET));
    assert_int_equal(look(r).root_mismatches, 1);
    show_leaves(r, &r->fake[2], 0);
    show_leaves(r, &r->fake[1], CHUNKS);
    assert_non_null(resync_to(r, &r->fake[2]));
    assert_null(resync_to(r, &r->fake[3]));
}

/* Without an own node the first one's word is worth no more than another's: a third decides. */
static void a_third_member_decides_against_who_was_first(void **state) {
    struct rig *r = *state;
    r->fake[1].aggregate_only = false; /* no own node in this run */
    rig_start(r);
    for (int i = 2; i <= 4; i++) join(r, &r->fake[i]);
    for (int i = 2; i <= 4; i++) be_ready(r, &r->fake[i], 8);
    commit_in(r, 0);
    say_wrong_root(r, &r->fake[2], 3);
    be_ready(r, &r->fake[3], 8); /* stands on another root: asked about, and not taken yet */
    assert_non_null(sent(r, &r->fake[2], MSG_STATE_LEAVES_GET));
    assert_int_equal(fragment(r, 0).ready, 0);
    show_leaves(r, &r->fake[2], 3);
    show_leaves(r, &r->fake[3], CHUNKS);
    assert_null(sent(r, NULL, MSG_RESYNC));
    say_root(r, &r->fake[4]);
    assert_true(logged(r, CORE_ERROR, "is wrong, that of"));
    const struct msg_resync *resync = resync_to(r, &r->fake[2]);
    assert_non_null(resync);
    assert_true(proto_set_has(resync->wrong.data, 3));
    assert_null(resync_to(r, &r->fake[3]));
    say_ready(r, &r->fake[3]); /* as it repeats it */
    assert_int_equal(fragment(r, 0).ready, 1);
    assert_false(r->fake[3].reset);
}

static void leaves_that_are_not_under_the_root_are_none(void **state) {
    struct rig *r = *state;
    start_reducing(r, 2);
    commit_once(r);
    say_root(r, &r->fake[1]);
    say_root(r, &r->fake[2]);
    say_wrong_root(r, &r->fake[3], 5);
    show_leaves(r, &r->fake[1], CHUNKS);
    show_leaves(r, &r->fake[2], CHUNKS);
    show_leaves(r, &r->fake[3], 6);
    const struct msg_resync *resync = resync_to(r, &r->fake[3]);
    assert_non_null(resync);
    assert_int_equal(resync->wrong.length, 0); /* it checks every chunk */
    assert_int_equal(resync->index, r->fake[3].state);
}

static void who_shows_no_leaves_is_resynced_all_the_same(void **state) {
    struct rig *r = *state;
    start_reducing(r, 2);
    commit_once(r);
    say_root(r, &r->fake[1]);
    say_wrong_root(r, &r->fake[3], 5);
    show_leaves(r, &r->fake[1], CHUNKS);
    pass(r, 900);
    assert_false(r->fake[3].resync);
    pass(r, 300);
    assert_true(r->fake[3].resync);
    assert_int_equal(look(r).root_mismatches, 1);
}

/* A liar who is first must not get his root into the ledger before anybody else has spoken. */
static void a_commit_names_a_root_that_two_have_shown(void **state) {
    struct rig *r = *state;
    r->outer.fragments = 2;
    r->fake[1].aggregate_only = false;
    rig_start(r);
    for (int i = 2; i <= 4; i++) join(r, &r->fake[i]);
    for (int i = 2; i <= 4; i++) be_ready(r, &r->fake[i], 8);
    for (int i = 2; i <= 4; i++) be_ready_in(r, &r->fake[i], 1, 8);
    commit_in(r, 0);
    uint64_t first = r->fake[2].state;
    say_wrong_root(r, &r->fake[2], 3);
    commit_in(r, 1);
    struct msg_commit k = last_commit(r);
    assert_int_equal(k.state_index, 0);
    say_root(r, &r->fake[3]); /* of the second commit: two agree on it */
    say_root(r, &r->fake[4]);
    assert_true(r->fake[3].state > first);
    for (int i = 3; i <= 4; i++) be_ready(r, &r->fake[i], 8);
    pass(r, 2000);
    commit_in(r, 0);
    k = last_commit(r);
    assert_int_equal(k.state_index, r->fake[3].of[1].base);
    struct digest right = root_at(k.state_index);
    assert_true(digest_equal(&k.state_root, &right));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        T(a_wrong_root_leads_to_the_first_differing_chunk),
        T(a_root_of_no_commit_is_ignored),
        T(the_own_node_overrules_who_was_first),
        T(a_third_member_decides_against_who_was_first),
        T(leaves_that_are_not_under_the_root_are_none),
        T(who_shows_no_leaves_is_resynced_all_the_same),
        T(a_commit_names_a_root_that_two_have_shown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
