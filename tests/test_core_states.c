/* test_core_states.c - the coordinator's core: who has which state; checkpoints; damaged stores. */
#include "tests/test_core.h"

/* ---- roots, settling, checkpoints ----------------------------------------------------------- */

static void a_joiner_gets_donors_the_root_and_others_when_they_are_gone(void **state) {
    struct rig *r = *state;
    start_reducing(r, 2);
    commit_once(r);
    for (int i = 1; i <= 3; i++) say_root(r, &r->fake[i]);
    struct fake *f = &r->fake[4];
    dial(r, f);
    enrol(r, f);
    struct msg_hello msg = {.trains = 1, .port = f->port};
    say(r, f, MSG_HELLO, 0, &msg);
    uint64_t settled = look(r).settled_index;
    assert_int_equal(((const struct msg_hello_ack *)sent(r, f, MSG_HELLO_ACK)->msg)->donors_count,
                     3);
    assert_non_null(sent(r, f, MSG_ROOT));
    assert_non_null(action(r, CORE_ACT_SEND_LEDGER));
    /* Nobody waits for it: the two others are everybody. */
    be_ready(r, &r->fake[2], 8);
    be_ready(r, &r->fake[3], 8);
    assert_string_equal(look(r).phase, "reduce");
    commit_once(r);
    for (int i = 1; i <= 3; i++) say_root(r, &r->fake[i]);
    assert_int_equal(look(r).settled_index, settled); /* it may need the round's bytes */
    for (int i = 1; i <= 3; i++) {
        step(r, &(struct core_event){.type = CORE_EV_CLOSED, .conn = r->fake[i].conn});
        r->fake[i].conn = 0;
    }
    dial(r, &r->fake[2]);
    hello(r, &r->fake[2]);
    say(r, f, MSG_HEARTBEAT, 0, &(struct msg_heartbeat){.phase = PHASE_CATCHING_UP});
    assert_false(f->resync); /* one of those it knows is back */
    step(r, &(struct core_event){.type = CORE_EV_CLOSED, .conn = r->fake[2].conn});
    r->fake[2].conn = 0;
    tick(r, 100);
    assert_false(f->resync); /* nobody to name */
    dial(r, &r->fake[3]);
    hello(r, &r->fake[3]);
    tick(r, 100);
    assert_true(f->resync);
    assert_int_equal(f->donors, 1);
}

/* Who is left alone with a state may be the next to go, and who is behind NAT gives it to nobody: what the others
 * will need when they come back is kept until then. */
static void what_one_member_has_is_not_settled(void **state) {
    struct rig *r = *state;
    start_reducing(r, 2);
    commit_once(r);
    uint64_t index = r->fake[2].state;
    r->fake[1].muted = r->fake[3].muted = true;
    pass(r, 3500);
    assert_int_equal(look(r).members_live, 1);
    say_root(r, &r->fake[2]);
    assert_true(look(r).settled_index < index);
    r->fake[1].muted = false;
    dial(r, &r->fake[1]);
    hello(r, &r->fake[1]);
    say_root(r, &r->fake[1]);
    assert_int_equal(look(r).settled_index, index);
}

/* Nobody can dial the only member that has the newest state: it is told who needs it, again and again, until
 * somebody who can be dialled has it too. */
static void who_is_behind_nat_is_told_who_needs_its_state(void **state) {
    struct rig *r = *state;
    r->fake[3].port = 0;
    start_reducing(r, 2);
    commit_once(r);
    const struct msg_heartbeat behind = {.phase = PHASE_CATCHING_UP};
    for (int i = 1; i <= 2; i++) say(r, &r->fake[i], MSG_HEARTBEAT, 0, &behind);
    tick(r, 100);
    assert_null(sent(r, &r->fake[3], MSG_RESYNC)); /* it has not shown the state yet */
    say_root(r, &r->fake[3]);
    tick(r, 100);
    const struct core_action *a = sent(r, &r->fake[3], MSG_RESYNC);
    assert_non_null(a);
    const struct msg_resync *msg = a->msg;
    assert_int_equal(msg->index, r->fake[3].state);
    assert_int_equal(msg->donors_count, 2);
    assert_int_equal(msg->donors[0].member, r->fake[1].id);
    tick(r, 100);
    assert_null(sent(r, &r->fake[3], MSG_RESYNC)); /* not at once again */
    say_root(r, &r->fake[1]);
    pass(r, 3500);
    assert_null(sent(r, &r->fake[3], MSG_RESYNC));
}

/* The coordinator died after the commit was durable and before anybody heard of it. The results on
 * two disks are then all there is. */
static void holders_are_named_again_after_a_restart(void **state) {
    struct rig *r = *state;
    start_reducing(r, 2);
    report(r, &r->fake[1]);
    r->die_in = r->steps + 1;
    r->die_after = 2; /* the log line and the transaction */
    struct fake *second = holder(r);
    report(r, second);
    assert_int_equal(r->out.list[1].type, CORE_ACT_PERSIST);
    load(r);
    assert_int_equal(look(r).round, 1);
    dial(r, &r->fake[2]);
    hello(r, &r->fake[2]);
    assert_non_null(sent(r, &r->fake[2], MSG_HOLDERS));
    struct fake *asking = &r->fake[2];
    dial(r, &r->fake[1]);
    hello(r, &r->fake[1]);
    const struct core_action *a = sent(r, asking, MSG_HOLDERS);
    assert_non_null(a);
    const struct msg_holders *h = a->msg;
    assert_true(h->addresses_count >= 1);
    assert_int_equal(h->addresses[0].member, r->fake[1].id);
}

static void a_checkpoint_is_written_signed_and_entered_in_the_ledger(void **state) {
    struct rig *r = *state;
    r->outer.checkpoint_rounds = 1;
    start_reducing(r, 2);
    core_set_bf16(r->core, true);
    commit_once(r);
    say_root(r, &r->fake[2]);
    assert_null(sent(r, NULL, MSG_CHECKPOINT_WRITE));
    say_root(r, &r->fake[1]);
    const struct core_action *a = sent(r, &r->fake[1], MSG_CHECKPOINT_WRITE);
    assert_non_null(a);
    const struct msg_checkpoint_write *w = a->msg;
    assert_int_equal(w->index, r->fake[1].state);
    assert_int_equal(w->round, 1);
    assert_int_equal(w->bf16, 1);
    assert_int_equal(w->spent_count, 1);
    assert_int_equal(w->spent[0].count, 16);
    struct msg_checkpoint_sign sign = {.index = w->index, .manifest = proto_str("{}")};
    struct msg_checkpoint_done done = {.index = w->index, .written = 1, .manifest = root_at(1)};
    say(r, &r->fake[2], MSG_CHECKPOINT_SIGN, 0, &sign);
    assert_null(action(r, CORE_ACT_SIGN)); /* only the own node's manifest is signed */
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_PROTOCOL);
    say(r, &r->fake[1], MSG_CHECKPOINT_SIGN, 0, &sign);
    assert_int_equal(action(r, CORE_ACT_SIGN)->conn, r->fake[1].conn);
    uint64_t head = look(r).head_index;
    say(r, &r->fake[1], MSG_CHECKPOINT_DONE, 0, &done);
    assert_int_equal(look(r).head_index, head + 1);
    assert_true(place(r, CORE_ACT_PERSIST, -1) < place(r, CORE_ACT_SEND_LEDGER, -1));
    say(r, &r->fake[1], MSG_CHECKPOINT_DONE, 0, &done);
    assert_int_equal(look(r).head_index, head + 1);
}

/* The own node lost its connection while it wrote one for long, and the run was complete meanwhile. What
 * becomes of the older one is no try of the last, which is asked for once. */
static void the_last_checkpoint_fails_by_its_own_tries_alone(void **state) {
    struct rig *r = *state;
    r->outer.checkpoint_rounds = 1;
    r->inner.total_tokens = 32 * SEQUENCE;
    start_reducing(r, 2);
    commit_once(r);
    for (int i = 1; i <= 3; i++) say_root(r, &r->fake[i]);
    struct msg_checkpoint_done older = {.index = r->fake[1].state}, last = {0};
    for (int i = 2; i <= 3; i++) be_ready(r, &r->fake[i], 8);
    commit_once(r);
    say_root(r, &r->fake[1]);
    assert_string_equal(look(r).phase, "complete");
    assert_null(sent(r, &r->fake[1], MSG_CHECKPOINT_WRITE));
    dial(r, &r->fake[1]);
    hello(r, &r->fake[1]);
    const struct core_action *a = sent(r, &r->fake[1], MSG_CHECKPOINT_WRITE);
    assert_non_null(a);
    last.index = ((const struct msg_checkpoint_write *)a->msg)->index;
    assert_int_equal(last.index, r->fake[1].state);
    say(r, &r->fake[1], MSG_CHECKPOINT_DONE, 0, &older);
    for (uint32_t tries = 1; tries <= 3; tries++) {
        say(r, &r->fake[1], MSG_CHECKPOINT_DONE, 0, &last);
        uint32_t asked = 0;
        for (int i = 0; i < 60; i++) {
            say(r, &r->fake[1], MSG_HEARTBEAT, 0, &(struct msg_heartbeat){0});
            tick(r, 100);
            asked += sent(r, &r->fake[1], MSG_CHECKPOINT_WRITE) != NULL;
        }
        assert_int_equal(asked, tries < 3);
    }
}

static void paused_means_no_leases_and_no_plans_also_after_a_restart(void **state) {
    struct rig *r = *state;
    start_with(r, 2);
    ask(r, &r->fake[2], 8);
    step(r, &(struct core_event){.type = CORE_EV_PAUSE});
    load(r);
    assert_string_equal(look(r).phase, "paused");
    for (int i = 1; i <= 3; i++) dial(r, &r->fake[i]), hello(r, &r->fake[i]);
    ask(r, &r->fake[3], 8);
    assert_int_equal(r->fake[3].lease_count, 0);
    be_ready(r, &r->fake[2], 8);
    pass(r, 3000);
    assert_int_equal(look(r).plan, 0);
    step(r, &(struct core_event){.type = CORE_EV_RESUME});
    ask(r, &r->fake[3], 8);
    assert_int_equal(r->fake[3].lease_count, 1);
}

/* ---- rows ----------------------------------------------------------------------------------- */

static int load_again(struct rig *r, struct err *err) {
    struct core *c = core_create(&r->genesis, &r->run, &r->fake[1].key, err);
    int result = 0;
    qsort(r->rows, r->row_count, sizeof *r->rows, by_key);
    for (uint32_t i = 0; i < r->row_count && !result; i++)
        result = core_load(c, r->rows[i].table, r->rows[i].key, r->rows[i].value, r->rows[i].length,
                           err);
    core_destroy(c);
    return result;
}

/* A damaged store is refused with words, never served and never asserted on. */
static void every_damaged_row_is_refused_or_harmless(void **state) {
    struct rig *r = *state;
    start_reducing(r, 2);
    ask(r, &r->fake[2], 8);
    commit_once(r);
    uint32_t refused = 0, tried = 0;
    for (uint32_t i = 0; i < r->row_count; i++)
        for (uint32_t j = 0; j < r->rows[i].length; j++) {
            struct err err = {0};
            uint8_t *byte = &r->rows[i].value[j], was = *byte;
            *byte ^= 0x41;
            if (load_again(r, &err)) {
                assert_int_equal(err.code, ERR_CORRUPT);
                refused++;
            }
            tried++;
            r->rows[i].value[j] = was; /* rows are sorted already: still the same row */
        }
    assert_true(refused > tried / 2);
    struct err err = {0};
    assert_int_equal(load_again(r, &err), 0);
}

/* ---- rewinds -------------------------------------------------------------------------------- */

static void append_entry(struct rig *r, enum ledger_kind kind, enum proto_record which,
                         const void *body) {
    struct proto_buffer entry;
    struct core_view v = look(r);
    proto_buffer_init(&entry, PROTO_BLOB_BYTES_MAX);
    assert_int_equal(core_entry_encode(&entry, v.head_index + 1, &v.head_digest, r->term, kind,
                                       which, body, NULL),
                     0);
    put_row(r, CORE_LEDGER, v.head_index + 1, entry.data, (uint32_t)entry.length);
    proto_buffer_release(&entry);
}

static void rewind_to(struct rig *r, uint64_t index) {
    struct msg_checkpoint to = {.at_index = index, .state_root = root_at(index)};
    struct msg_rewind body = {.to = &to, .to_count = 1, .reason = proto_str("no results")};
    append_entry(r, LEDGER_REWIND, RECORD_rewind, &body);
}

/* What was spent after the checkpoint is trained on again; rounds go on counting. */
static void a_rewind_frees_samples_and_tokens_and_moves_every_base(void **state) {
    struct rig *r = *state;
    r->outer.fragments = 2;
    start_with(r, 2);
    for (uint32_t f = 0; f < 2; f++)
        for (int i = 2; i <= 3; i++) be_ready_in(r, &r->fake[i], f, 8);
    commit_in(r, 0);
    uint64_t kept = look(r).head_index;
    for (int i = 2; i <= 3; i++) be_ready_in(r, &r->fake[i], 0, 8);
    commit_in(r, 0);
    commit_in(r, 1);
    assert_int_equal(look(r).samples_spent, 32);
    rewind_to(r, kept);
    load(r);
    struct core_view v = look(r);
    assert_int_equal(v.samples_spent, 16);
    assert_int_equal(v.samples_free, 240 - 16);
    assert_int_equal(v.tokens_committed, 16 * SEQUENCE);
    assert_int_equal(v.state_root_index, v.head_index);
    struct digest root = root_at(kept);
    assert_true(digest_equal(&v.state_root, &root));
    for (uint32_t f = 0; f < 2; f++) assert_int_equal(fragment(r, f).base_index, v.head_index);
    assert_int_equal(fragment(r, 0).round, 2);
    assert_int_equal(fragment(r, 1).round, 1);
    assert_int_equal(member(r, &r->fake[2]).tokens_committed, 8 * SEQUENCE);
    dial(r, &r->fake[1]);
    hello(r, &r->fake[1]); /* it still has the state that was undone */
    for (int i = 2; i <= 3; i++) {
        struct msg_hello msg = hello_of(&r->fake[i]);
        msg.state_index = v.head_index;
        msg.state_root = root;
        dial(r, &r->fake[i]);
        say(r, &r->fake[i], MSG_HELLO, 0, &msg);
    }
    ask(r, &r->fake[2], 8);
    assert_int_equal(r->fake[2].leases[0].start, 16); /* freed samples come first */
    r->fake[2].state = v.head_index;
    r->fake[2].of[0].base = kept; /* frozen before: void */
    claim(&r->fake[2], 8);
    say_ready(r, &r->fake[2]);
    assert_int_equal(fragment(r, 0).ready, 0);
    load(r); /* and once more from the rows */
    assert_int_equal(look(r).samples_spent, 16);
}

static int load_error(struct rig *r, char *text, size_t size) {
    struct err err = {0};
    struct core *c = core_create(&r->genesis, &r->run, &r->fake[1].key, &err);
    int result = 0;
    qsort(r->rows, r->row_count, sizeof *r->rows, by_key);
    for (uint32_t i = 0; i < r->row_count && !result; i++)
        result = core_load(c, r->rows[i].table, r->rows[i].key, r->rows[i].value, r->rows[i].length,
                           &err);
    core_destroy(c);
    snprintf(text, size, "%s", err.msg);
    return result;
}

static void a_rewind_to_what_another_one_undid_is_refused(void **state) {
    struct rig *r = *state;
    char why[256];
    start_reducing(r, 2);
    commit_in(r, 0);
    uint64_t first = look(r).head_index;
    for (int i = 2; i <= 3; i++) be_ready(r, &r->fake[i], 8);
    commit_in(r, 0);
    uint64_t second = look(r).head_index;
    rewind_to(r, first);
    load(r);
    rewind_to(r, second);
    assert_int_equal(load_error(r, why, sizeof why), -1);
    assert_non_null(strstr(why, "rewinds to the state"));
}

/* ---- where the run begins ------------------------------------------------------------------- */

/* Not everybody can read the checkpoint that the run begins with; the others need donors at once. */
static void a_run_that_begins_with_a_checkpoint_has_donors_from_the_start(void **state) {
    struct rig *r = *state;
    struct msg_checkpoint from = {.url = proto_str("file:///elsewhere"), .state_root = root_at(1)};
    r->genesis.init_from = &from;
    r->genesis.init_from_count = 1;
    rig_start(r);
    join(r, &r->fake[1]);
    dial(r, &r->fake[2]);
    enrol(r, &r->fake[2]);
    say(r, &r->fake[2], MSG_HELLO, 0, &(struct msg_hello){.trains = 1, .port = 1});
    const struct msg_hello_ack *ack = sent(r, &r->fake[2], MSG_HELLO_ACK)->msg;
    assert_int_equal(ack->donors_count, 1);
    assert_non_null(sent(r, &r->fake[2], MSG_ROOT));
}

/* The run before spent 0 to 9 and 12 to 19; 10 and 11 were leased when it ended. Nothing may be spent twice,
 * and nothing may be left out. */
static void a_run_that_goes_on_with_anothers_data_hands_out_the_rest(void **state) {
    struct rig *r = *state;
    struct msg_range spent[] = {{0, 10}, {12, 8}};
    bool mine[240] = {0};
    r->genesis.init_spent = spent;
    r->genesis.init_spent_count = 2;
    start_with(r, 2);
    assert_int_equal(look(r).samples_spent, 18);
    assert_int_equal(look(r).tokens_committed, 18 * SEQUENCE);
    for (int round = 0; round < 30 && strcmp(look(r).phase, "complete") != 0; round++) {
        load(r); /* each time from the rows alone */
        for (int i = 1; i <= 3; i++) dial(r, &r->fake[i]), hello(r, &r->fake[i]);
        for (int i = 2; i <= 3; i++) {
            be_ready(r, &r->fake[i], 8);
            for (uint32_t k = 0; k < r->fake[i].lease_count; k++)
                for (uint64_t s = 0; s < r->fake[i].leases[k].count; s++)
                    mine[r->fake[i].leases[k].start + s] = true;
        }
        commit_once(r);
        for (int i = 1; i <= 3; i++) say_root(r, &r->fake[i]);
    }
    assert_int_equal(look(r).samples_spent, 240);
    assert_int_equal(look(r).tokens_committed, 240 * SEQUENCE);
    for (int s = 0; s < 240; s++) assert_int_equal(mine[s], s >= 20 || s == 10 || s == 11);
}

static void a_genesis_that_spends_a_sample_twice_is_refused(void **state) {
    struct rig *r = *state;
    struct msg_range wrong[][2] = {{{0, 10}, {9, 2}}, {{0, 10}, {10, 2}}, {{20, 2}, {3, 2}},
                                   {{0, 1}, {238, 3}},
                                   {{0, 1}, {5, 0}}, {{0, 1}, {2, UINT64_MAX}}};
    struct digest run = {{1}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        struct err err = {0};
        r->genesis.init_spent = wrong[i];
        r->genesis.init_spent_count = 2;
        assert_null(core_create(&r->genesis, &run, &r->fake[1].key, &err));
        assert_int_equal(err.code, ERR_CONFIG);
        assert_non_null(strstr(err.msg, "count as spent"));
    }
}

/* Results are kept for who may need them, but whoever just listens must not make everybody keep them for ever. */
static void a_listener_without_a_state_holds_only_the_newest_rounds_up(void **state) {
    struct rig *r = *state;
    start_with(r, 2);
    struct fake *f = &r->fake[4];
    dial(r, f);
    enrol(r, f);
    say(r, f, MSG_HELLO, 0, &(struct msg_hello){.port = f->port});
    for (int round = 0; round < 10; round++) {
        for (int i = 2; i <= 3; i++) be_ready(r, &r->fake[i], 8);
        commit_once(r);
        for (int i = 1; i <= 3; i++) say_root(r, &r->fake[i]);
        say(r, f, MSG_HEARTBEAT, 0, &(struct msg_heartbeat){.phase = PHASE_CATCHING_UP});
        uint64_t behind = look(r).head_index - look(r).settled_index;
        assert_true(round < 8 ? !look(r).settled_index : look(r).settled_index && behind == 8);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        T(a_joiner_gets_donors_the_root_and_others_when_they_are_gone),
        T(a_listener_without_a_state_holds_only_the_newest_rounds_up),
        T(what_one_member_has_is_not_settled),
        T(who_is_behind_nat_is_told_who_needs_its_state),
        T(holders_are_named_again_after_a_restart),
        T(a_checkpoint_is_written_signed_and_entered_in_the_ledger),
        T(the_last_checkpoint_fails_by_its_own_tries_alone),
        T(paused_means_no_leases_and_no_plans_also_after_a_restart),
        T(every_damaged_row_is_refused_or_harmless),
        T(a_rewind_frees_samples_and_tokens_and_moves_every_base),
        T(a_rewind_to_what_another_one_undid_is_refused),
        T(a_run_that_begins_with_a_checkpoint_has_donors_from_the_start),
        T(a_run_that_goes_on_with_anothers_data_hands_out_the_rest),
        T(a_genesis_that_spends_a_sample_twice_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
