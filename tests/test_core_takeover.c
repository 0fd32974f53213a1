/* test_core_takeover.c - the coordinator's core: the store is older than what a member has seen. */
#include "tests/test_core.h"

/* The rig's rows at one moment, as a copy of the store is. */
struct copy {
    struct row rows[ROWS_MAX];
    uint32_t count;
};

static void free_rows(struct row *rows, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) free(rows[i].value);
}

static struct copy *copy_store(const struct rig *r) {
    struct copy *k = calloc(1, sizeof *k);
    k->count = r->row_count;
    for (uint32_t i = 0; i < r->row_count; i++) {
        k->rows[i] = r->rows[i];
        k->rows[i].value = malloc(r->rows[i].length);
        memcpy(k->rows[i].value, r->rows[i].value, r->rows[i].length);
    }
    return k;
}

/* The newer store stays with its members: what they show is taken from it. */
static struct copy *put_back(struct rig *r, struct copy *older) {
    struct copy *newer = calloc(1, sizeof *newer);
    newer->count = r->row_count;
    memcpy(newer->rows, r->rows, sizeof r->rows);
    memcpy(r->rows, older->rows, sizeof r->rows);
    r->row_count = older->count;
    free(older);
    return newer;
}

static void release(struct copy *k) {
    free_rows(k->rows, k->count);
    free(k);
}

static const struct row *entry_row(const struct copy *k, uint64_t index) {
    for (uint32_t i = 0; i < k->count; i++)
        if (k->rows[i].table == CORE_LEDGER && k->rows[i].key == index) return &k->rows[i];
    fail_msg("no entry %llu", (unsigned long long)index);
    return NULL;
}

/* The run's keys: a root key that delegated one online key, with which all entries are signed. */
struct keys {
    struct identity root, online;
};

static void start_signed(struct rig *r, struct keys *k, uint32_t trainers) {
    uint8_t seed[32] = {9};
    identity_from_seed(&k->root, seed);
    seed[0] = 10;
    identity_from_seed(&k->online, seed);
    r->genesis.root_key = k->root.key;
    write_genesis(r);
    struct msg_delegation d = {.run = r->run, .key = k->online.key, .number = 1};
    struct proto_buffer entry;
    proto_buffer_init(&entry, PROTO_BLOB_BYTES_MAX);
    struct digest genesis = digest_of(r->rows[0].value, r->rows[0].length);
    assert_int_equal(core_entry_encode(&entry, 1, &genesis, 0, LEDGER_DELEGATION,
                                       RECORD_delegation, &d, NULL),
                     0);
    put_row(r, CORE_LEDGER, 1, entry.data, (uint32_t)entry.length);
    proto_buffer_release(&entry);
    load(r);
    for (uint32_t i = 1; i <= trainers + 1; i++) join(r, &r->fake[i]);
}

static struct msg_signed_entry shown(const struct rig *r, const struct copy *k,
                                     const struct identity *by, uint64_t index) {
    const struct row *row = entry_row(k, index);
    struct msg_signed_entry e = {.bytes = {row->value, row->length}};
    struct msg_entry entry = {0};
    assert_int_equal(proto_decode(row->value, row->length, RECORD_entry, &entry, NULL), 0);
    proto_sign(by, "ledger", &r->run, entry.term, row->value, row->length, &e.signature);
    proto_decoded_release(RECORD_entry, &entry);
    return e;
}

static void hello_with_head(struct rig *r, struct fake *f, const struct copy *k, uint64_t head,
                            uint64_t term) {
    const struct row *row = entry_row(k, head);
    struct msg_hello msg = hello_of(f);
    msg.head_index = head;
    msg.head_digest = digest_of(row->value, row->length);
    msg.term_max = term;
    dial(r, f);
    say(r, f, MSG_HELLO, 0, &msg);
}

static void show(struct rig *r, struct fake *f, const struct copy *k, const struct identity *by,
                 uint64_t from, uint64_t to) {
    struct msg_signed_entry list[64];
    struct msg_ledger msg = {.entries = list};
    for (uint64_t i = from; i <= to; i++) list[msg.entries_count++] = shown(r, k, by, i);
    say(r, f, MSG_LEDGER, 0, &msg);
}

/* Two rounds are committed after the copy was made; then the copy is served. */
static struct copy *two_rounds_later(struct rig *r, struct keys *keys, uint64_t *head) {
    start_signed(r, keys, 2);
    for (int i = 2; i <= 3; i++) ask(r, &r->fake[i], 8);
    struct copy *older = copy_store(r);
    for (int round = 0; round < 2; round++) {
        for (int i = 2; i <= 3; i++) be_ready(r, &r->fake[i], 8);
        commit_in(r, 0);
    }
    *head = look(r).head_index;
    struct copy *newer = put_back(r, older);
    load(r);
    assert_int_equal(look(r).commits, 0);
    return newer;
}

static void enrol_and_expect(struct rig *r, struct fake *f, bool enrolled) {
    uint64_t head = look(r).head_index;
    dial(r, f);
    enrol(r, f);
    assert_int_equal(look(r).head_index, head + enrolled);
    if (enrolled) return;
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_STALE);
    assert_false(action(r, CORE_ACT_CLOSE)->final);
}

/* ---- taking over ---------------------------------------------------------------------------- */

static void entries_that_a_member_has_are_asked_for_checked_and_kept(void **state) {
    struct rig *r = *state;
    struct keys keys;
    uint64_t head;
    struct copy *newer = two_rounds_later(r, &keys, &head);
    struct fake *f = &r->fake[2];
    hello_with_head(r, f, newer, head, r->term + 3);
    const struct core_action *a = sent(r, f, MSG_LEDGER_GET);
    assert_non_null(a);
    assert_null(sent(r, f, MSG_HELLO_ACK));
    uint64_t from = ((const struct msg_ledger_get *)a->msg)->from;
    assert_int_equal(from, head - 1);
    show(r, f, newer, &keys.online, from, from);
    assert_false(r->restart); /* one is still missing */
    show(r, f, newer, &keys.online, head, head);
    assert_true(r->restart);
    assert_int_equal(r->restart_term, r->term + 3);
    assert_true(place(r, CORE_ACT_PERSIST, -1) < place(r, CORE_ACT_RESTART, -1));
    const struct core_action *p = action(r, CORE_ACT_PERSIST);
    assert_int_equal(p->write_count, 2);
    for (uint32_t i = 0; i < 2; i++) {
        struct msg_signed_entry e = shown(r, newer, &keys.online, from + i);
        assert_true(p->writes[i].is_signed);
        assert_memory_equal(&p->writes[i].signature, &e.signature, sizeof e.signature);
    }
    r->term = r->restart_term;
    r->hold_ms = 2000;
    load(r);
    assert_int_equal(look(r).commits, 2);
    assert_int_equal(look(r).samples_spent, 32);
    for (int i = 1; i <= 3; i++) dial(r, &r->fake[i]), hello(r, &r->fake[i]);
    ask(r, f, 8); /* others may show still more */
    assert_int_equal(f->lease_count, 0);
    pass(r, 2000);
    ask(r, f, 8);
    assert_int_equal(f->leases[0].count, 8);
    assert_int_equal(f->leases[0].start, 32);
    release(newer);
}

/* While others may show still more, any entry of ours could be another history: a checkpoint that our own
 * node has just finished, a newcomer, the operator's word. They come again. */
static void nothing_is_written_while_others_may_show_more(void **state) {
    struct rig *r = *state;
    struct keys keys;
    uint64_t head;
    struct copy *newer = two_rounds_later(r, &keys, &head);
    hello_with_head(r, &r->fake[2], newer, head, r->term);
    enrol_and_expect(r, &r->fake[5], false);
    show(r, &r->fake[2], newer, &keys.online, head - 1, head);
    assert_true(r->restart);
    r->hold_ms = 2000;
    load(r);
    for (int i = 1; i <= 3; i++) dial(r, &r->fake[i]), hello(r, &r->fake[i]);
    struct msg_checkpoint_done done = {
        .index = r->fake[1].state, .written = 1, .manifest = root_at(1)};
    say(r, &r->fake[1], MSG_CHECKPOINT_DONE, 0, &done);
    assert_int_equal(look(r).head_index, head);
    step(r, &(struct core_event){.type = CORE_EV_REVOKE, .member = r->fake[3].id, .text = "early"});
    assert_int_equal(look(r).head_index, head);
    assert_true(look(r).behind);
    enrol_and_expect(r, &r->fake[5], false);
    pass(r, 2100);
    assert_false(look(r).behind);
    enrol_and_expect(r, &r->fake[5], true);
    say(r, &r->fake[1], MSG_CHECKPOINT_DONE, 0, &done);
    assert_int_equal(look(r).head_index, head + 2);
    step(r, &(struct core_event){.type = CORE_EV_REVOKE, .member = r->fake[3].id, .text = "now"});
    assert_int_equal(look(r).head_index, head + 3);
    release(newer);
}

/* What was handed out and is in no row of the old store is neither lost nor given twice. */
static void samples_of_lost_leases_are_free_again(void **state) {
    struct rig *r = *state;
    struct keys keys;
    start_signed(r, &keys, 2);
    struct copy *older = copy_store(r);
    ask(r, &r->fake[2], 8); /* 0 to 7, and never heard of again */
    ask(r, &r->fake[3], 8);
    claim(&r->fake[3], 8);
    say_ready(r, &r->fake[3]);
    pass(r, 300);
    r->fake[2].muted = true;
    pass(r, 3500);
    commit_in(r, 0); /* 8 to 15 are spent */
    uint64_t head = look(r).head_index;
    struct copy *newer = put_back(r, older);
    load(r);
    hello_with_head(r, &r->fake[3], newer, head, r->term);
    show(r, &r->fake[3], newer, &keys.online, head, head);
    assert_true(r->restart);
    load(r);
    assert_int_equal(look(r).samples_spent, 8);
    assert_int_equal(look(r).samples_free, 240 - 8);
    r->fake[2].muted = false;
    for (int i = 1; i <= 3; i++) dial(r, &r->fake[i]), hello(r, &r->fake[i]);
    ask(r, &r->fake[3], 12);
    assert_int_equal(r->fake[3].leases[0].start, 0);
    assert_int_equal(r->fake[3].leases[0].count, 8);
    assert_int_equal(r->fake[3].leases[1].start, 16);
    release(newer);
}

/* A claim under an id that only the lost rows knew: that work is done again, nothing counts twice. */
static void claims_of_leases_that_were_lost_are_refused(void **state) {
    struct rig *r = *state;
    struct keys keys;
    start_signed(r, &keys, 2);
    struct copy *older = copy_store(r);
    ask(r, &r->fake[2], 8);
    claim(&r->fake[2], 8);
    struct msg_lease lost = r->fake[2].leases[0];
    release(put_back(r, older));
    load(r);
    for (int i = 1; i <= 3; i++) dial(r, &r->fake[i]), hello(r, &r->fake[i]);
    r->fake[2].claims[0] = lost;
    say_ready(r, &r->fake[2]);
    assert_true(r->fake[2].reset);
    ask(r, &r->fake[3], 8);
    assert_int_equal(r->fake[3].leases[0].start, lost.start);
    assert_int_not_equal(r->fake[3].leases[0].lease, lost.lease);
}

/* ---- hostile shows -------------------------------------------------------------------------- */

/* Its enrolment may be in the entries that an older store lacks: it must come again, not go for good. */
static void a_key_that_a_newer_ledger_may_know_is_not_turned_away_for_ever(void **state) {
    struct rig *r = *state;
    start_with(r, 2);
    struct fake *f = &r->fake[5];
    dial(r, f);
    struct msg_hello msg = hello_of(f);
    pass(r, 2 * r->outer.silence_ms_max); /* nobody has shown more */
    msg.head_index = 0;
    msg.term_max = r->term;
    say(r, f, MSG_HELLO, 0, &msg);
    assert_true(action(r, CORE_ACT_CLOSE)->final);
    dial(r, f);
    msg.head_index = look(r).head_index + 1;
    say(r, f, MSG_HELLO, 0, &msg);
    assert_false(action(r, CORE_ACT_CLOSE)->final);
}

/* A member enrolled after the copy was made, and everybody else has gone: what it shows is taken all the
 * same. The run does not stop for its word, and a member's goes first. */
static struct copy *one_enrolled_later(struct rig *r, struct keys *keys, uint64_t *head) {
    start_signed(r, keys, 2);
    struct copy *older = copy_store(r);
    dial(r, &r->fake[5]), enrol(r, &r->fake[5]);
    dial(r, &r->fake[6]), enrol(r, &r->fake[6]);
    *head = look(r).head_index;
    struct copy *newer = put_back(r, older);
    load(r);
    return newer;
}

static void a_key_of_the_lost_entries_shows_them(void **state) {
    struct rig *r = *state;
    struct keys keys;
    uint64_t head;
    struct copy *newer = one_enrolled_later(r, &keys, &head);
    struct fake *f = &r->fake[5];
    hello_with_head(r, f, newer, head, r->term);
    assert_non_null(sent(r, f, MSG_LEDGER_GET));
    assert_non_null(action(r, CORE_ACT_LISTEN));
    assert_false(look(r).behind);
    hello_with_head(r, &r->fake[6], newer, head, r->term); /* one at a time */
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_REFUSED);
    assert_false(action(r, CORE_ACT_CLOSE)->final);
    show(r, f, newer, &keys.online, head - 1, head - 1);
    assert_true(look(r).behind); /* it has proved that there is more */
    hello_with_head(r, &r->fake[2], newer, head, r->term);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_STALE);
    show(r, f, newer, &keys.online, head, head);
    assert_true(r->restart);
    load(r);
    dial(r, f), hello(r, f);
    assert_non_null(sent(r, f, MSG_HELLO_ACK));
    release(newer);
}

static void a_strangers_boast_stops_nobody(void **state) {
    struct rig *r = *state;
    struct keys keys;
    uint64_t head;
    struct copy *newer = one_enrolled_later(r, &keys, &head);
    struct fake *f = &r->fake[5];
    hello_with_head(r, f, newer, head, r->term);
    show(r, f, newer, &f->identity, head - 1, head - 1); /* not signed by the run */
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_PROTOCOL);
    assert_false(look(r).behind);
    hello_with_head(r, f, newer, head, r->term);
    assert_non_null(sent(r, f, MSG_LEDGER_GET));
    pass(r, r->outer.silence_ms_max + 200); /* it shows nothing and is let go */
    assert_false(look(r).behind);
    hello_with_head(r, f, newer, head, r->term);
    assert_non_null(sent(r, f, MSG_LEDGER_GET));
    hello_with_head(r, &r->fake[2], newer, head, r->term); /* a member takes its place */
    assert_non_null(sent(r, &r->fake[2], MSG_LEDGER_GET));
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_STALE);
    show(r, &r->fake[2], newer, &keys.online, head - 1, head);
    assert_true(r->restart);
    release(newer);
}

static void a_forged_ledger_changes_nothing(void **state) {
    struct rig *r = *state;
    struct keys keys;
    uint64_t head;
    struct copy *newer = two_rounds_later(r, &keys, &head);
    struct fake *f = &r->fake[2];
    hello_with_head(r, f, newer, head, r->term);
    show(r, f, newer, &f->identity, head - 1, head); /* signed by a member */
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_PROTOCOL);
    assert_null(action(r, CORE_ACT_PERSIST));
    assert_false(r->restart);
    hello_with_head(r, f, newer, head, r->term); /* not again so soon: it holds the run up */
    assert_null(sent(r, f, MSG_LEDGER_GET));
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_STALE);
    assert_false(action(r, CORE_ACT_CLOSE)->final);
    hello_with_head(r, &r->fake[3], newer, head, r->term);
    assert_non_null(sent(r, &r->fake[3], MSG_LEDGER_GET));
    show(r, &r->fake[3], newer, &keys.online, head, head); /* not the first that is missing */
    assert_false(r->restart);
    assert_int_equal(look(r).commits, 0);
    release(newer);
}

/* Whoever stole the online key that the newer ledger retires must not be able to go on with it where an old copy
 * of the store still knows it; and the key that took its place is as good there as anywhere. */
static void a_newer_ledger_is_read_with_the_keys_that_it_names(void **state) {
    struct rig *r = *state;
    struct keys keys;
    start_signed(r, &keys, 2);
    struct identity second;
    uint8_t seed[32] = {11};
    identity_from_seed(&second, seed);
    uint64_t head = look(r).head_index;
    struct copy *older = copy_store(r);
    struct msg_delegation d = {.run = r->run, .key = second.key, .number = 2, .retires = 1};
    struct proto_buffer entry;
    proto_buffer_init(&entry, PROTO_BLOB_BYTES_MAX);
    struct digest before = look(r).head_digest;
    assert_int_equal(core_entry_encode(&entry, head + 1, &before, r->term, LEDGER_DELEGATION,
                                       RECORD_delegation, &d, NULL), 0);
    put_row(r, CORE_LEDGER, head + 1, entry.data, (uint32_t)entry.length);
    proto_buffer_release(&entry);
    load(r);
    dial(r, &r->fake[6]);
    enrol(r, &r->fake[6]);
    struct copy *newer = put_back(r, older);
    load(r);
    struct fake *f = &r->fake[2];
    hello_with_head(r, f, newer, head + 2, r->term);
    show(r, f, newer, &keys.root, head + 1, head + 1);
    show(r, f, newer, &keys.online, head + 2, head + 2);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_PROTOCOL);
    f = &r->fake[3];
    hello_with_head(r, f, newer, head + 2, r->term);
    show(r, f, newer, &keys.root, head + 1, head + 1);
    show(r, f, newer, &second, head + 2, head + 2);
    assert_true(r->restart);
    release(newer);
}

/* Asked for what it boasted of and silent, a member must not stop the run for long. */
static void a_member_that_shows_nothing_holds_the_run_up_for_a_moment_only(void **state) {
    struct rig *r = *state;
    struct keys keys;
    start_signed(r, &keys, 3);
    for (int i = 2; i <= 3; i++) be_ready(r, &r->fake[i], 8);
    struct fake *liar = &r->fake[4];
    struct msg_hello msg = hello_of(liar);
    msg.head_index = 1000;
    msg.head_digest = root_at(1);
    dial(r, liar);
    say(r, liar, MSG_HELLO, 0, &msg);
    assert_non_null(sent(r, liar, MSG_LEDGER_GET));
    liar->session = 0;
    pass(r, 1500);
    assert_string_equal(look(r).phase, "train");
    for (int i = 0; i < 40 && look(r).plan == 0; i++) pass(r, 100);
    assert_string_equal(look(r).phase, "reduce");
    commit_in(r, 0);
    say(r, liar, MSG_HEARTBEAT, 0, &(struct msg_heartbeat){0}); /* it may only show */
    assert_null(sent(r, liar, MSG_HEARTBEAT_ACK));
}

static void a_fork_is_never_taken_over(void **state) {
    struct rig *r = *state;
    struct keys keys;
    uint64_t head;
    struct copy *newer = two_rounds_later(r, &keys, &head);
    struct msg_hello msg = hello_of(&r->fake[2]);
    msg.head_index = look(r).head_index;
    msg.head_digest = root_at(3);
    dial(r, &r->fake[2]);
    say(r, &r->fake[2], MSG_HELLO, 0, &msg);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_STALE);
    assert_true(logged(r, CORE_ERROR, "two histories"));
    /* Our store has gone on by itself: entries that hang on another head are another history. */
    dial(r, &r->fake[1]), hello(r, &r->fake[1]);
    dial(r, &r->fake[5]), enrol(r, &r->fake[5]);
    hello_with_head(r, &r->fake[3], newer, head, r->term);
    assert_non_null(sent(r, &r->fake[3], MSG_LEDGER_GET));
    show(r, &r->fake[3], newer, &keys.online, head, head);
    assert_true(logged(r, CORE_ERROR, "two histories"));
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_STALE);
    assert_false(r->restart);
    release(newer);
}

/* ---- a newer term --------------------------------------------------------------------------- */

static void hello_with_term(struct rig *r, struct fake *f, uint64_t term) {
    struct msg_hello msg = hello_of(f);
    msg.term_max = term;
    dial(r, f);
    say(r, f, MSG_HELLO, 0, &msg);
}

/* Nothing signed proves a term: one member's word must not restart the coordinator as it likes. */
static void a_newer_term_needs_a_second_witness(void **state) {
    struct rig *r = *state;
    start_with(r, 3);
    hello_with_term(r, &r->fake[2], r->term + 5);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_STALE);
    assert_false(action(r, CORE_ACT_CLOSE)->final);
    assert_false(r->restart);
    hello_with_term(r, &r->fake[2], r->term + 6);
    assert_false(r->restart);
    hello_with_term(r, &r->fake[3], UINT64_MAX); /* nobody's */
    assert_false(r->restart);
    hello_with_term(r, &r->fake[3], r->term + 5);
    assert_true(r->restart);
    assert_int_equal(r->restart_term, r->term + 5);
}

static void our_own_nodes_word_for_a_term_is_enough(void **state) {
    struct rig *r = *state;
    start_with(r, 3);
    hello_with_term(r, &r->fake[1], r->term + 1);
    assert_true(r->restart);
}

/* Its word must have stood so long: a coordinator of any age is not restarted by a whim. */
static void one_members_word_for_a_term_is_enough_after_a_while(void **state) {
    struct rig *r = *state;
    start_with(r, 3);
    pass(r, 16100);
    hello_with_term(r, &r->fake[2], r->term + 1);
    assert_false(r->restart);
    pass(r, 15000);
    hello_with_term(r, &r->fake[2], r->term + 2);
    assert_false(r->restart);
    pass(r, 1000);
    hello_with_term(r, &r->fake[2], r->term + 1);
    assert_true(r->restart);
    core_actions_clear(&r->out);
    tick(r, 100); /* nothing comes after a restart */
    assert_int_equal(r->out.count, 0);
}

static void a_member_with_the_whole_ledger_is_sent_none(void **state) {
    struct rig *r = *state;
    start_with(r, 2);
    struct msg_hello msg = hello_of(&r->fake[2]);
    msg.head_index = look(r).head_index;
    msg.head_digest = look(r).head_digest;
    msg.term_max = r->term;
    dial(r, &r->fake[2]);
    say(r, &r->fake[2], MSG_HELLO, 0, &msg);
    assert_non_null(sent(r, &r->fake[2], MSG_HELLO_ACK));
    assert_null(action(r, CORE_ACT_SEND_LEDGER));
}

/* The older store names a holder that was lost since; the ledger says that another one was granted the lease again
 * and spent samples of it. Were the rest still the first one's, its work on those samples would count once more
 * (simulator, seed 83925). */
static void a_lease_that_was_granted_again_is_not_its_former_holders(void **state) {
    struct rig *r = *state;
    r->corpus.samples = 32;
    start_with(r, 3);
    for (int i = 2; i <= 3; i++) ask(r, &r->fake[i], 16);
    struct copy *older = copy_store(r);
    uint64_t lease = r->fake[2].leases[0].lease;
    r->fake[2].muted = true;
    pass(r, 2 * r->outer.silence_ms_max);
    ask(r, &r->fake[4], 16);
    assert_int_equal(r->fake[4].leases[0].lease, lease);
    assert_int_equal(r->fake[4].leases[0].generation, 2);
    for (int i = 3; i <= 4; i++) be_ready(r, &r->fake[i], 8);
    commit_in(r, 0);
    for (uint32_t i = 0; i < older->count; i++)
        if (older->rows[i].table == CORE_LEASE)
            put_row(r, CORE_LEASE, older->rows[i].key, older->rows[i].value, older->rows[i].length);
    release(older);
    load(r);
    r->fake[2].muted = false;
    for (int i = 1; i <= 4; i++) join(r, &r->fake[i]);
    assert_int_equal(r->fake[2].lease_count, 0);
    assert_int_equal(r->fake[3].leases[0].start + r->fake[3].leases[0].count, 32); /* it goes on */
    assert_int_equal(look(r).samples_free, 8); /* those behind what was spent */
}

int main(void) {
    const struct CMUnitTest tests[] = {
        T(entries_that_a_member_has_are_asked_for_checked_and_kept),
        T(nothing_is_written_while_others_may_show_more),
        T(samples_of_lost_leases_are_free_again),
        T(claims_of_leases_that_were_lost_are_refused),
        T(a_key_that_a_newer_ledger_may_know_is_not_turned_away_for_ever),
        T(a_key_of_the_lost_entries_shows_them),
        T(a_strangers_boast_stops_nobody),
        T(a_forged_ledger_changes_nothing),
        T(a_newer_ledger_is_read_with_the_keys_that_it_names),
        T(a_member_that_shows_nothing_holds_the_run_up_for_a_moment_only),
        T(a_fork_is_never_taken_over),
        T(a_newer_term_needs_a_second_witness),
        T(our_own_nodes_word_for_a_term_is_enough),
        T(one_members_word_for_a_term_is_enough_after_a_while),
        T(a_member_with_the_whole_ledger_is_sent_none),
        T(a_lease_that_was_granted_again_is_not_its_former_holders),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
