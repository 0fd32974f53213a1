/* test_ledger_chain.c - a ledger that anybody tampered with is not followed. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "proto/proto.h"

#define ENTRIES_MAX 80

/* A run with its keys, and the ledger a coordinator wrote so far. */
struct run {
    struct identity root, online, online2, stranger;
    struct digest name;
    struct proto_buffer genesis;
    struct msg_signed_entry entry[ENTRIES_MAX];
    struct proto_buffer bytes[ENTRIES_MAX];
    uint32_t count, delegations;
};

static struct proto_buffer encoded(enum proto_record which, const void *m) {
    struct proto_buffer b;
    struct err err = {0};
    proto_buffer_init(&b, PROTO_BLOB_BYTES_MAX);
    if (proto_encode(&b, which, m, &err)) fail_msg("%s", err.msg);
    return b;
}

static struct proto_bytes bytes_of(const struct proto_buffer *b) {
    return (struct proto_bytes){b->data, (uint32_t)b->length};
}

/* Append an entry exactly as given, whether it makes sense or not. */
static void append_raw(struct run *r, struct msg_entry e, const struct identity *signer) {
    assert_true(r->count < ENTRIES_MAX);
    struct proto_buffer b = encoded(RECORD_entry, &e);
    struct msg_signed_entry *s = &r->entry[r->count];
    s->bytes = bytes_of(&b);
    proto_sign(signer, "ledger", &r->name, e.term, b.data, b.length, &s->signature);
    r->bytes[r->count++] = b;
}

/* The entry a right-minded coordinator would append next. */
static struct msg_entry next_entry(struct run *r, uint8_t kind, uint64_t term,
                                   struct proto_bytes body) {
    struct msg_entry e = {.index = r->count, .term = term, .kind = kind, .body = body};
    if (r->count) e.previous = LEDGER_DIGEST(&r->entry[r->count - 1]);
    return e;
}

static void append_rotation(struct run *r, const struct identity *to, uint64_t term,
                            uint32_t retires) {
    struct msg_delegation d = {
        .run = r->name, .key = to->key, .number = ++r->delegations, .retires = retires};
    struct proto_buffer b = encoded(RECORD_delegation, &d);
    append_raw(r, next_entry(r, LEDGER_DELEGATION, term, bytes_of(&b)), &r->root);
    proto_buffer_release(&b);
}

static void append_delegation(struct run *r, const struct identity *to, uint64_t term) {
    append_rotation(r, to, term, 0);
}

static void append_enrolment(struct run *r, uint64_t term, const struct identity *signer) {
    struct msg_enrolment m = {.member = r->count, .key = r->stranger.key, .name = proto_str("m")};
    struct proto_buffer b = encoded(RECORD_enrolment, &m);
    append_raw(r, next_entry(r, LEDGER_ENROLMENT, term, bytes_of(&b)), signer);
    proto_buffer_release(&b);
}

static int make_run(void **state) {
    struct run *r = calloc(1, sizeof *r);
    struct err err;
    if (!r || proto_init(&err)) return -1;
    for (uint8_t i = 0; i < 4; i++) {
        struct identity *ids[] = {&r->root, &r->online, &r->online2, &r->stranger};
        uint8_t seed[32] = {i};
        identity_from_seed(ids[i], seed);
    }
    struct msg_genesis g = {.version = PROTO_VERSION,
                            .name = proto_str("test"),
                            .root_key = r->root.key,
                            .checkpoint_url = proto_str("file:///tmp")};
    r->genesis = encoded(RECORD_genesis, &g);
    r->name = digest_of(r->genesis.data, r->genesis.length);
    append_raw(r, next_entry(r, LEDGER_GENESIS, 0, bytes_of(&r->genesis)), &r->root);
    append_delegation(r, &r->online, 0);
    *state = r;
    return 0;
}

static int free_run(void **state) {
    struct run *r = *state;
    for (uint32_t i = 0; i < r->count; i++) proto_buffer_release(&r->bytes[i]);
    proto_buffer_release(&r->genesis);
    free(r);
    return 0;
}

static int take(struct ledger_chain *c, const struct msg_signed_entry *e, struct err *err) {
    struct msg_entry decoded;
    int result = ledger_chain_take(c, e, &decoded, err);
    proto_decoded_release(RECORD_entry, &decoded);
    return result;
}

/* Follow the whole ledger but its last `without` entries; all of these must be good. */
static struct ledger_chain followed(struct run *r, uint32_t without) {
    struct ledger_chain c;
    struct err err = {0};
    ledger_chain_init(&c, &r->name);
    for (uint32_t i = 0; i < r->count - without; i++)
        if (take(&c, &r->entry[i], &err)) fail_msg("%s", err.msg);
    assert_int_equal(c.next_index, r->count - without);
    return c;
}

/* The last entry must be refused, and must leave no trace. */
static void assert_last_refused(struct run *r, enum err_code code, const char *text) {
    struct ledger_chain c = followed(r, 1), before = c;
    struct err err = {0};
    assert_int_equal(take(&c, &r->entry[r->count - 1], &err), -1);
    if (err.code != code || !strstr(err.msg, text))
        fail_msg("code %d, \"%s\"", (int)err.code, err.msg);
    assert_memory_equal(&c, &before, sizeof c);
}

static void a_right_ledger_is_followed(void **state) {
    struct run *r = *state;
    append_enrolment(r, 1, &r->online);
    append_enrolment(r, 1, &r->online);
    append_delegation(r, &r->online2, 1);
    append_enrolment(r, 2, &r->online2);
    append_enrolment(r, 3, &r->online);
    struct ledger_chain c = followed(r, 0);
    assert_int_equal(c.term, 3);
    assert_int_equal(c.online_count, 2);
    struct digest head = LEDGER_DIGEST(&r->entry[r->count - 1]);
    assert_true(digest_equal(&c.head, &head));
    assert_memory_equal(&c.root_key, &r->root.key, sizeof c.root_key);
    /* What arrives twice, as after a reconnect, is told apart from what is wrong. */
    struct err err = {0};
    assert_int_equal(take(&c, &r->entry[3], &err), -1);
    assert_int_equal(err.code, ERR_STALE);
}

/* The name of the run is the only thing a joiner trusts at first. */
static void a_genesis_of_another_run_is_refused(void **state) {
    struct run *r = *state;
    struct ledger_chain c;
    struct err err = {0};
    struct digest other = digest_of("other", 5);
    ledger_chain_init(&c, &other);
    assert_int_equal(take(&c, &r->entry[0], &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    assert_non_null(strstr(err.msg, "genesis is of run"));
    assert_int_equal(c.next_index, 0);
    ledger_chain_init(&c, &r->name);
    assert_int_equal(take(&c, &r->entry[1], &err), -1);
    assert_non_null(strstr(err.msg, "entry 1 came, 0 is next"));
}

static void a_genesis_needs_the_root_signature(void **state) {
    struct run *r = *state;
    struct ledger_chain c;
    struct err err = {0};
    struct msg_signed_entry e = r->entry[0];
    proto_sign(&r->online, "ledger", &r->name, 0, e.bytes.data, e.bytes.length, &e.signature);
    ledger_chain_init(&c, &r->name);
    assert_int_equal(take(&c, &e, &err), -1);
    assert_non_null(strstr(err.msg, "not signed by the root key"));
}

static void a_second_genesis_is_refused(void **state) {
    struct run *r = *state;
    append_raw(r, next_entry(r, LEDGER_GENESIS, 0, bytes_of(&r->genesis)), &r->root);
    assert_last_refused(r, ERR_CORRUPT, "second genesis");
}

/* An online key can be stolen; it must not be able to make more of its kind. */
static void a_delegation_needs_the_root_key(void **state) {
    struct run *r = *state;
    struct msg_delegation d = {.run = r->name, .key = r->stranger.key, .number = 2};
    struct proto_buffer b = encoded(RECORD_delegation, &d);
    append_raw(r, next_entry(r, LEDGER_DELEGATION, 0, bytes_of(&b)), &r->online);
    proto_buffer_release(&b);
    assert_last_refused(r, ERR_CORRUPT, "not signed by the root key");
}

static void a_delegation_for_another_run_is_refused(void **state) {
    struct run *r = *state;
    struct msg_delegation d = {.run = digest_of("other", 5), .key = r->stranger.key, .number = 2};
    struct proto_buffer b = encoded(RECORD_delegation, &d);
    append_raw(r, next_entry(r, LEDGER_DELEGATION, 0, bytes_of(&b)), &r->root);
    proto_buffer_release(&b);
    assert_last_refused(r, ERR_CORRUPT, "delegates for another run");
}

static void a_body_that_is_no_delegation_is_refused(void **state) {
    struct run *r = *state;
    append_raw(r, next_entry(r, LEDGER_DELEGATION, 0, proto_str("junk")), &r->root);
    assert_last_refused(r, ERR_CORRUPT, "ledger entry 2: delegation");
}

static void an_entry_of_a_stranger_is_refused(void **state) {
    struct run *r = *state;
    append_enrolment(r, 1, &r->stranger);
    assert_last_refused(r, ERR_CORRUPT, "not signed by any of the 1 delegated keys");
}

/* Not even the root key writes ordinary entries: it is to stay offline. */
static void an_enrolment_by_the_root_key_is_refused(void **state) {
    struct run *r = *state;
    append_enrolment(r, 1, &r->root);
    assert_last_refused(r, ERR_CORRUPT, "not signed by any");
}

static void a_key_counts_from_its_delegation_on(void **state) {
    struct run *r = *state;
    append_enrolment(r, 1, &r->online2);
    assert_last_refused(r, ERR_CORRUPT, "not signed by any");
}

static void a_broken_link_is_refused(void **state) {
    struct run *r = *state;
    append_enrolment(r, 1, &r->online);
    struct msg_entry e = next_entry(r, LEDGER_ENROLMENT, 1, proto_str("x"));
    e.previous = LEDGER_DIGEST(&r->entry[r->count - 2]); /* leaves one entry out */
    append_raw(r, e, &r->online);
    assert_last_refused(r, ERR_CORRUPT, "another history");
}

static void a_gap_is_refused(void **state) {
    struct run *r = *state;
    struct msg_entry e = next_entry(r, LEDGER_ENROLMENT, 1, proto_str("x"));
    e.index++;
    append_raw(r, e, &r->online);
    assert_last_refused(r, ERR_CORRUPT, "entry 3 came, 2 is next");
}

/* A coordinator that lost its office writes with an older term. */
static void a_falling_term_is_refused(void **state) {
    struct run *r = *state;
    append_enrolment(r, 5, &r->online);
    append_enrolment(r, 4, &r->online);
    assert_last_refused(r, ERR_CORRUPT, "term 4 after term 5");
}

/* Each single bit of an entry and of its signature matters. */
static void any_changed_bit_is_refused(void **state) {
    struct run *r = *state;
    append_enrolment(r, 1, &r->online);
    struct ledger_chain c = followed(r, 1);
    struct msg_signed_entry *e = &r->entry[r->count - 1];
    struct proto_buffer *b = &r->bytes[r->count - 1];
    struct err err;
    for (size_t bit = 0; bit < 8 * b->length; bit++) {
        b->data[bit / 8] ^= (uint8_t)(1u << bit % 8);
        assert_int_equal(take(&c, e, &err), -1);
        b->data[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    for (size_t bit = 0; bit < 8 * sizeof e->signature; bit++) {
        e->signature.b[bit / 8] ^= (uint8_t)(1u << bit % 8);
        assert_int_equal(take(&c, e, &err), -1);
        e->signature.b[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    assert_int_equal(take(&c, e, &err), 0);
}

static void a_signature_for_another_purpose_is_refused(void **state) {
    struct run *r = *state;
    append_enrolment(r, 1, &r->online);
    struct msg_signed_entry *e = &r->entry[r->count - 1];
    proto_sign(&r->online, "roster", &r->name, 1, e->bytes.data, e->bytes.length, &e->signature);
    assert_last_refused(r, ERR_CORRUPT, "not signed by any");
}

/* Rotation: from its entry on, the old key signs nothing. */
static void a_retired_key_speaks_no_longer(void **state) {
    struct run *r = *state;
    struct ledger_chain c;
    struct err err = {0};
    ledger_chain_init(&c, &r->name);
    append_enrolment(r, 1, &r->online);
    append_rotation(r, &r->online2, 2, 1);
    append_enrolment(r, 2, &r->online2);
    for (uint32_t i = 0; i < r->count; i++) assert_int_equal(take(&c, &r->entry[i], &err), 0);
    assert_true(ledger_chain_speaks(&c, &r->online2.key));
    assert_false(ledger_chain_speaks(&c, &r->online.key));
    append_enrolment(r, 2, &r->online);
    assert_last_refused(r, ERR_CORRUPT, "not signed by any of the 1 delegated keys");
}

static void delegations_count_up(void **state) {
    struct run *r = *state;
    append_rotation(r, &r->online2, 1, 7);
    assert_last_refused(r, ERR_CORRUPT, "retires delegation 7, which is not in force");
    r->count--;
    proto_buffer_release(&r->bytes[r->count]);
    r->delegations = 0;
    append_rotation(r, &r->online2, 1, 0);
    assert_last_refused(r, ERR_CORRUPT, "delegation 1 after delegation 1");
}

static void delegated_keys_have_a_limit(void **state) {
    struct run *r = *state;
    for (uint8_t i = 0; i < LEDGER_ONLINE_KEYS_MAX; i++) {
        struct identity id;
        uint8_t seed[32] = {9, i};
        identity_from_seed(&id, seed);
        append_delegation(r, &id, 0);
    }
    assert_last_refused(r, ERR_FULL, "more than 64 keys");
}

/* WELCOME: who answers at the address of an invite has to show the root key's word. */
static void a_shown_delegation_is_checked(void **state) {
    struct run *r = *state;
    struct msg_genesis g = {.root_key = r->root.key};
    struct msg_delegation d = {.run = r->name, .key = r->online.key, .number = 1};
    struct proto_buffer b = encoded(RECORD_delegation, &d);
    struct digest other = digest_of("other", 5);
    struct proto_sig sig;
    struct err err = {0};
    proto_sign(&r->root, "delegation", &r->name, 0, b.data, b.length, &sig);
    assert_int_equal(
        ledger_check_delegation(&g, &r->name, bytes_of(&b), &sig, &r->online.key, &err), 0);
    assert_int_equal(
        ledger_check_delegation(&g, &r->name, bytes_of(&b), &sig, &r->stranger.key, &err), -1);
    assert_int_equal(err.code, ERR_REFUSED);
    assert_non_null(strstr(err.msg, "for another key"));
    assert_int_equal(ledger_check_delegation(&g, &other, bytes_of(&b), &sig, &r->online.key, &err),
                     -1);
    assert_int_equal(err.code, ERR_REFUSED);
    proto_sign(&r->stranger, "delegation", &r->name, 0, b.data, b.length, &sig);
    assert_int_equal(
        ledger_check_delegation(&g, &r->name, bytes_of(&b), &sig, &r->online.key, &err), -1);
    assert_non_null(strstr(err.msg, "not signed by the run's root key"));
    proto_buffer_release(&b);
}

int main(void) {
#define TEST(f) cmocka_unit_test_setup_teardown(f, make_run, free_run)
    const struct CMUnitTest tests[] = {
        TEST(a_right_ledger_is_followed),
        TEST(a_genesis_of_another_run_is_refused),
        TEST(a_genesis_needs_the_root_signature),
        TEST(a_second_genesis_is_refused),
        TEST(a_delegation_needs_the_root_key),
        TEST(a_delegation_for_another_run_is_refused),
        TEST(a_body_that_is_no_delegation_is_refused),
        TEST(an_entry_of_a_stranger_is_refused),
        TEST(an_enrolment_by_the_root_key_is_refused),
        TEST(a_key_counts_from_its_delegation_on),
        TEST(a_broken_link_is_refused),
        TEST(a_gap_is_refused),
        TEST(a_falling_term_is_refused),
        TEST(any_changed_bit_is_refused),
        TEST(a_signature_for_another_purpose_is_refused),
        TEST(a_retired_key_speaks_no_longer),
        TEST(delegations_count_up),
        TEST(delegated_keys_have_a_limit),
        TEST(a_shown_delegation_is_checked),
    };
    return cmocka_run_group_tests_name("ledger chain", tests, NULL, NULL);
}
