/* test_core_members.c - the coordinator's core: who is a member, in which order things are said, and who is lost. */
#include "tests/test_core.h"

/* ---- enrolment ------------------------------------------------------------------------------ */

/* The invite's use is durable together with the entry, before anybody is told: a crash between them
 * must neither waste the invite nor let two keys in by one use. */
static void an_enrolment_is_one_transaction_before_its_answer(void **state) {
    struct rig *r = *state;
    rig_start(r);
    dial(r, &r->fake[2]);
    enrol(r, &r->fake[2]);
    const struct core_action *p = action(r, CORE_ACT_PERSIST);
    assert_non_null(p);
    assert_int_equal(p->write_count, 2);
    assert_int_equal(p->writes[0].table, CORE_LEDGER);
    assert_int_equal(p->writes[1].table, CORE_INVITE);
    struct msg_invite_record record = {0};
    assert_int_equal(proto_decode(p->writes[1].value, p->writes[1].value_length,
                                  RECORD_invite_record, &record, NULL),
                     0);
    assert_int_equal(record.uses_left, 99);
    assert_true(place(r, CORE_ACT_PERSIST, -1) < place(r, CORE_ACT_SEND, MSG_ENROLLED));
    assert_int_equal(r->fake[2].id, 1);
}

static void the_same_key_enrols_again_and_another_is_refused(void **state) {
    struct rig *r = *state;
    rig_start(r);
    r->invite.record.uses_left = 1;
    dial(r, &r->fake[2]);
    enrol(r, &r->fake[2]);
    r->invite.record.uses_left = 0;
    dial(r, &r->fake[2]); /* the answer was lost on the way */
    enrol(r, &r->fake[2]);
    assert_int_equal(r->fake[2].id, 1);
    assert_null(action(r, CORE_ACT_PERSIST));
    dial(r, &r->fake[3]);
    enrol(r, &r->fake[3]);
    const struct core_action *bye = action(r, CORE_ACT_CLOSE);
    assert_non_null(bye);
    assert_int_equal(bye->code, ERR_REFUSED);
    assert_true(bye->final);
    assert_non_null(strstr(bye->text, "used up"));
    assert_int_equal(core_member_count(r->core), 1);
}

static void unknown_and_expired_invites_are_refused(void **state) {
    struct rig *r = *state;
    rig_start(r);
    r->invite.expired = true;
    dial(r, &r->fake[2]);
    enrol(r, &r->fake[2]);
    assert_non_null(strstr(action(r, CORE_ACT_CLOSE)->text, "expired"));
    r->invite = (struct core_invite){.found = false};
    dial(r, &r->fake[2]);
    enrol(r, &r->fake[2]);
    assert_non_null(strstr(action(r, CORE_ACT_CLOSE)->text, "unknown"));
    dial(r, &r->fake[2]);
    hello(r, &r->fake[2]);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_REFUSED);
}

/* Peers accept links from keys of the roster only: they must have it before the newcomer dials. */
static void others_learn_of_a_new_member_at_once(void **state) {
    struct rig *r = *state;
    start_with(r, 1);
    dial(r, &r->fake[3]);
    enrol(r, &r->fake[3]);
    const struct core_action *a = sent(r, &r->fake[2], MSG_ROSTER);
    assert_non_null(a);
    struct msg_roster_body body = {0};
    const struct msg_roster *roster = a->msg;
    assert_int_equal(
        proto_decode(roster->body.data, roster->body.length, RECORD_roster_body, &body, NULL), 0);
    assert_int_equal(body.members_count, 3);
    assert_int_equal(body.version, look(r).head_index);
    proto_decoded_release(RECORD_roster_body, &body);
}

/* ---- order and form ------------------------------------------------------------------------- */

static void messages_out_of_place_end_the_connection(void **state) {
    struct rig *r = *state;
    start_with(r, 1);
    struct fake *f = &r->fake[2];
    dial(r, f);
    say_ready(r, f);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_PROTOCOL);
    dial(r, f);
    hello(r, f);
    uint64_t conn = f->conn;
    hello(r, f);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_PROTOCOL);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->conn, conn);
    dial(r, f);
    hello(r, f);
    struct msg_plan plan = {0};
    say(r, f, MSG_PLAN, 0, &plan);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_PROTOCOL);
    say(r, f, MSG_HEARTBEAT, 0, &(struct msg_heartbeat){0}); /* of a connection that is gone */
    assert_int_equal(r->out.count, 0);
}

static void a_frame_of_an_old_term_or_session_does_nothing(void **state) {
    struct rig *r = *state;
    start_with(r, 1);
    struct fake *f = &r->fake[2];
    f->session--;
    ask(r, f, 8);
    assert_null(sent(r, f, MSG_LEASES));
    assert_null(action(r, CORE_ACT_PERSIST));
    f->session++;
    r->term--;
    ask(r, f, 8);
    assert_null(action(r, CORE_ACT_PERSIST));
    assert_true(logged(r, CORE_WARNING, "dropped"));
    r->term++;
    ask(r, f, 8);
    assert_int_equal(f->lease_count, 1);
}

static void a_second_connection_replaces_the_first(void **state) {
    struct rig *r = *state;
    start_with(r, 1);
    struct fake *f = &r->fake[2];
    uint64_t old = f->conn, session = f->session;
    dial(r, f);
    hello(r, f);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->conn, old);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_STALE);
    assert_true(f->session > session);
    assert_int_equal(f->session >> 24, r->term);
    step(r, &(struct core_event){.type = CORE_EV_CLOSED, .conn = old});
    ask(r, f, 8);
    assert_int_equal(f->lease_count, 1);
}

/* ---- silence -------------------------------------------------------------------------------- */

/* SIGSTOP of the coordinator: heartbeats lie unread. To judge first would lose everybody. */
static void a_stopped_coordinator_does_not_judge_silence(void **state) {
    struct rig *r = *state;
    start_with(r, 2);
    pass(r, 1000);
    tick(r, 60000);
    assert_int_equal(look(r).members_live, 3);
    assert_null(action(r, CORE_ACT_CLOSE));
    pass(r, 1900);
    assert_int_equal(look(r).members_live, 3);
    r->fake[2].muted = true;
    pass(r, 2500);
    assert_int_equal(look(r).members_live, 2);
}

/* Nor does a shorter sleep, after a silence that had ended before it: what ended it lies unread. */
static void a_short_stop_does_not_add_to_a_silence(void **state) {
    struct rig *r = *state;
    start_with(r, 2);
    pass(r, 1000);
    r->fake[2].muted = true;
    pass(r, 1500);
    tick(r, 900);
    assert_int_equal(look(r).members_live, 3);
    r->fake[2].muted = false;
    pass(r, 1900);
    assert_int_equal(look(r).members_live, 3);
}

/* Nor does its sleep count against those who were to report. */
static void a_stopped_coordinator_does_not_take_shards_away(void **state) {
    struct rig *r = *state;
    start_reducing(r, 2);
    tick(r, 60000);
    pass(r, 1000);
    assert_int_equal(look(r).plan, 1);
}

/* What they train on now must not be given to others because we died. */
static void after_a_restart_leases_stay_until_silence_has_judged(void **state) {
    struct rig *r = *state;
    start_with(r, 2);
    ask(r, &r->fake[2], 8);
    struct msg_lease old = r->fake[2].leases[0];
    load(r);
    assert_int_equal(look(r).members_live, 1);
    dial(r, &r->fake[1]);
    hello(r, &r->fake[1]);
    dial(r, &r->fake[3]);
    hello(r, &r->fake[3]);
    be_ready(r, &r->fake[3], 8);
    assert_int_not_equal(r->fake[3].leases[0].start, old.start);
    pass(r, 1900);
    assert_string_equal(look(r).phase, "train"); /* two are the quorum, and one is on its way */
    pass(r, 200);
    assert_string_equal(look(r).phase, "reduce");
    assert_int_equal(look(r).members_live, 2);
    pass(r, 16000); /* it does not come for them */
    ask(r, &r->fake[3], 8);
    assert_int_equal(r->fake[3].leases[0].start, old.start);
    assert_int_equal(r->fake[3].leases[0].generation, old.generation + 1);
}

static void no_progress_is_silence_too(void **state) {
    struct rig *r = *state;
    start_with(r, 2);
    struct fake *stuck = &r->fake[2];
    stuck->muted = true;
    for (int i = 0; i < 25; i++) {
        struct msg_heartbeat msg = {.progress = 7, .phase = PHASE_TRAINING};
        if (stuck->conn) say(r, stuck, MSG_HEARTBEAT, 0, &msg);
        pass(r, 100);
    }
    assert_int_equal(stuck->conn, 0);
    dial(r, stuck);
    hello(r, stuck);
    for (int i = 0; i < 25; i++) { /* who waits has nothing to do and is not stuck */
        struct msg_heartbeat msg = {.progress = 7, .phase = PHASE_WAITING};
        say(r, stuck, MSG_HEARTBEAT, 0, &msg);
        pass(r, 100);
    }
    assert_int_not_equal(stuck->conn, 0);
}

static void a_closed_connection_is_no_loss_yet(void **state) {
    struct rig *r = *state;
    start_reducing(r, 2);
    struct fake *f = &r->fake[2];
    step(r, &(struct core_event){.type = CORE_EV_CLOSED, .conn = f->conn});
    f->conn = 0;
    pass(r, 500);
    assert_int_equal(look(r).members_live, 3);
    dial(r, f);
    hello(r, f);
    assert_true(f->has_plan); /* the same plan again */
    assert_int_equal(f->plan, 1);
    assert_int_equal(look(r).plan, 1);
}

static void cut(struct rig *r, struct fake *f) {
    step(r, &(struct core_event){.type = CORE_EV_CLOSED, .conn = f->conn});
    f->conn = 0;
}

/* A process that died closes its connection: whom it left waiting need not wait for the silence. */
static void a_plan_goes_on_without_who_closed_its_connection(void **state) {
    struct rig *r = *state;
    start_reducing(r, 3);
    struct fake *f = fake_by_id(r, r->fake[2].shard.holder);
    cut(r, f);
    pass(r, 500);
    assert_int_equal(look(r).plan, 1);
    pass(r, 300);
    assert_int_equal(look(r).plan, 2); /* it was to hold the result */
    assert_int_equal(look(r).members_live, 4);
    assert_int_not_equal(r->fake[1].shard.holder, f->id);
    assert_int_equal(r->fake[1].contributors, 2);
    uint64_t start = f->leases[0].start;
    commit_in(r, 0);
    assert_int_equal(look(r).samples_spent, 16);
    dial(r, f);
    hello(r, f);
    assert_int_equal(f->leases[0].start, start); /* its samples are its own as before */
    be_ready(r, f, 8);
    assert_false(f->reset);
}

/* Alone in the plan: nothing is made of nobody, and it is not held against it. */
static void the_only_contributor_may_close_its_connection(void **state) {
    struct rig *r = *state;
    r->outer.quorum = 1;
    start_with(r, 1);
    be_ready(r, &r->fake[2], 8);
    pass(r, 100);
    assert_string_equal(look(r).phase, "reduce");
    cut(r, &r->fake[2]);
    pass(r, 1000);
    assert_string_equal(look(r).phase, "train");
    assert_true(look(r).plan <= 2);
    dial(r, &r->fake[2]);
    hello(r, &r->fake[2]);
    say_ready(r, &r->fake[2]);
    pass(r, 100);
    assert_false(r->fake[2].reset);
    assert_string_equal(look(r).phase, "reduce");
}

/* ---- revocation ----------------------------------------------------------------------------- */

static void revoke(struct rig *r, struct fake *f) {
    step(r, &(struct core_event){.type = CORE_EV_REVOKE, .member = f->id, .text = "stolen"});
}

static void a_revoked_member_is_turned_away_and_leaves_the_roster(void **state) {
    struct rig *r = *state;
    start_with(r, 2);
    struct fake *f = &r->fake[2];
    ask(r, f, 8);
    uint64_t free_before = look(r).samples_free;
    revoke(r, f);
    assert_true(place(r, CORE_ACT_PERSIST, -1) < place(r, CORE_ACT_CLOSE, -1));
    const struct core_action *bye = action(r, CORE_ACT_CLOSE);
    assert_int_equal(bye->code, ERR_REFUSED);
    assert_true(bye->final);
    assert_int_equal(look(r).samples_free, free_before + 8);
    const struct core_action *a = sent(r, &r->fake[3], MSG_ROSTER);
    struct msg_roster_body body = {0};
    const struct msg_roster *roster = a->msg;
    assert_int_equal(
        proto_decode(roster->body.data, roster->body.length, RECORD_roster_body, &body, NULL), 0);
    assert_int_equal(body.members_count, 2);
    proto_decoded_release(RECORD_roster_body, &body);
    load(r);
    dial(r, f);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_REFUSED);
    assert_true(action(r, CORE_ACT_CLOSE)->final);
    revoke(r, f); /* twice is once */
    assert_null(action(r, CORE_ACT_PERSIST));
    step(r, &(struct core_event){.type = CORE_EV_REVOKE, .member = 99});
    assert_null(action(r, CORE_ACT_PERSIST));
}

static void a_revoked_aggregator_is_replaced_and_a_revoked_contributor_dropped(void **state) {
    struct rig *r = *state;
    start_reducing(r, 4);
    struct fake *second = holder(r), *other = second == &r->fake[5] ? &r->fake[4] : &r->fake[5];
    revoke(r, other);
    assert_non_null(sent(r, &r->fake[1], MSG_DROP));
    assert_int_equal(look(r).plan, 1);
    revoke(r, second);
    assert_int_equal(look(r).plan, 2);
    assert_int_equal(r->fake[1].contributors, 2);
}

/* ---- copied homes --------------------------------------------------------------------------- */

static void a_copied_home_directory_is_refused_while_the_first_lives(void **state) {
    struct rig *r = *state;
    start_with(r, 1);
    struct fake *f = &r->fake[2];
    uint64_t conn = f->conn, session = f->session;
    f->instance = 77; /* another process with the same key */
    dial(r, f);
    hello(r, f);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_REFUSED);
    assert_false(action(r, CORE_ACT_CLOSE)->final);
    assert_non_null(strstr(action(r, CORE_ACT_CLOSE)->text, "twice"));
    assert_true(logged(r, CORE_WARNING, "twice"));
    assert_int_not_equal(action(r, CORE_ACT_CLOSE)->conn, conn);
    assert_int_equal(f->session, 0);
    f->muted = true;
    pass(r, 500); /* more than two heartbeats of silence */
    dial(r, f);
    hello(r, f);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->conn, conn);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_STALE);
    assert_true(f->session > session);
}

static void a_process_that_starts_again_is_no_copy(void **state) {
    struct rig *r = *state;
    start_with(r, 1);
    struct fake *f = &r->fake[2];
    step(r, &(struct core_event){.type = CORE_EV_CLOSED, .conn = f->conn});
    f->instance = 77;
    dial(r, f);
    hello(r, f);
    assert_null(action(r, CORE_ACT_CLOSE));
    assert_int_not_equal(f->session, 0);
}

/* ---- fixed membership ----------------------------------------------------------------------- */

static void a_run_of_fixed_members_fails_when_one_is_lost(void **state) {
    struct rig *r = *state;
    r->outer.fixed_membership = 1;
    start_with(r, 2);
    r->fake[2].muted = true;
    for (int i = 0; i < 30 && !r->failed; i++) pass(r, 100);
    assert_true(r->failed);
    for (int i = 1; i <= 3; i++) assert_int_equal(r->fake[i].conn, 0);
    assert_true(r->fake[3].said_goodbye_to);
    load(r);
    assert_string_equal(look(r).phase, "paused"); /* durably */
}

static void who_leaves_before_its_first_contribution_fails_no_run(void **state) {
    struct rig *r = *state;
    r->outer.fixed_membership = 1;
    start_with(r, 3);
    say(r, &r->fake[4], MSG_LEAVE, 0, &(struct msg_leave){0});
    assert_false(r->failed);
    for (int i = 2; i <= 3; i++) be_ready(r, &r->fake[i], 8);
    commit_in(r, 0);
    say(r, &r->fake[3], MSG_LEAVE, 0, &(struct msg_leave){0});
    assert_true(r->failed);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        T(an_enrolment_is_one_transaction_before_its_answer),
        T(the_same_key_enrols_again_and_another_is_refused),
        T(unknown_and_expired_invites_are_refused),
        T(others_learn_of_a_new_member_at_once),
        T(messages_out_of_place_end_the_connection),
        T(a_frame_of_an_old_term_or_session_does_nothing),
        T(a_second_connection_replaces_the_first),
        T(a_stopped_coordinator_does_not_judge_silence),
        T(a_short_stop_does_not_add_to_a_silence),
        T(a_stopped_coordinator_does_not_take_shards_away),
        T(after_a_restart_leases_stay_until_silence_has_judged),
        T(no_progress_is_silence_too),
        T(a_closed_connection_is_no_loss_yet),
        T(a_plan_goes_on_without_who_closed_its_connection),
        T(the_only_contributor_may_close_its_connection),
        T(a_revoked_member_is_turned_away_and_leaves_the_roster),
        T(a_revoked_aggregator_is_replaced_and_a_revoked_contributor_dropped),
        T(a_copied_home_directory_is_refused_while_the_first_lives),
        T(a_process_that_starts_again_is_no_copy),
        T(a_run_of_fixed_members_fails_when_one_is_lost),
        T(who_leaves_before_its_first_contribution_fails_no_run),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
