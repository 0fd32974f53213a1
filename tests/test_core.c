/* test_core.c - the coordinator's core: what it promises, to whom, and that nothing it promised is
 * lost when it dies. The rig plays the shell: it carries actions out in order, keeps the rows of
 * every PERSIST, and plays members that know only what they were sent. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core.h"
#include "proto/model.h"

#define MEMBERS  6
#define ROWS_MAX 4096
#define SEQUENCE 8
#define CHUNKS   3

/* ---- the rig -------------------------------------------------------------------------------- */

struct row {
    enum core_table table;
    uint64_t key;
    uint8_t *value;
    uint32_t length;
};

struct fake {
    struct proto_key key;
    bool aggregate_only, muted; /* muted: sends no heartbeat */
    uint32_t id, port;
    uint64_t conn, session, progress;
    uint8_t phase;
    bool said_goodbye_to; /* BYE, final */
    struct msg_lease leases[PROTO_LEASES_MAX], claims[PROTO_LEASES_MAX];
    uint32_t lease_count, claim_count;
    /* what it knows of the run */
    uint64_t base, round, plan, reported, told;
    bool ready, has_plan, reset, resync;
    struct msg_shard shard;
    uint32_t weights, contributors, donors;
};

struct rig {
    struct msg_genesis genesis;
    struct msg_model model;
    struct msg_inner inner;
    struct msg_outer outer;
    struct msg_corpus corpus;
    struct digest run;
    struct core *core;
    struct core_actions out;
    uint64_t now, term, next_conn;
    struct row rows[ROWS_MAX];
    uint32_t row_count;
    struct fake fake[MEMBERS + 1]; /* [1] is the own aggregate-only node */
    struct core_invite invite;
    /* The coordinator dies in its step number die_in (0: never) after so many actions. */
    uint64_t steps, die_in;
    uint32_t die_after;
    bool dead; /* what is said to it now is lost */
};

static struct digest digest_of_number(const char *what, uint64_t a, uint64_t b) {
    char text[96];
    int n = snprintf(text, sizeof text, "%s %llu %llu", what, (unsigned long long)a,
                     (unsigned long long)b);
    return digest_of(text, (size_t)n);
}

/* Every honest member has this root at this ledger index. */
static struct digest root_at(uint64_t index) { return digest_of_number("state", index, 0); }

static void put_row(struct rig *r, enum core_table table, uint64_t key, const uint8_t *value,
                    uint32_t length) {
    uint32_t i = 0;
    while (i < r->row_count && (r->rows[i].table != table || r->rows[i].key != key)) i++;
    assert_true(i < ROWS_MAX);
    if (i == r->row_count)
        r->row_count++;
    else
        free(r->rows[i].value);
    if (!value) {
        r->rows[i] = r->rows[--r->row_count];
        return;
    }
    assert_false(table == CORE_LEDGER && i + 1 < r->row_count); /* an entry is never replaced */
    r->rows[i] = (struct row){table, key, malloc(length), length};
    memcpy(r->rows[i].value, value, length);
}

static int by_key(const void *a, const void *b) {
    const struct row *x = a, *y = b;
    if (x->table != y->table) return x->table < y->table ? -1 : 1;
    return (x->key > y->key) - (x->key < y->key);
}

static struct fake *fake_of(struct rig *r, uint64_t conn) {
    for (uint32_t i = 1; i <= MEMBERS; i++)
        if (r->fake[i].conn == conn) return &r->fake[i];
    return NULL;
}

static void hear_leases(struct fake *f, const struct msg_leases *m) {
    f->lease_count = m->leases_count;
    if (m->leases_count) memcpy(f->leases, m->leases, m->leases_count * sizeof *m->leases);
}

static void hear_plan(struct fake *f, const struct core_action *a) {
    const struct msg_plan *m = a->msg;
    f->has_plan = true;
    f->plan = a->plan;
    f->round = m->round;
    f->shard = m->shards[0];
    f->contributors = m->contributors_count;
    f->weights = 0;
    for (uint32_t i = 0; i < m->contributors_count; i++) f->weights += m->contributors[i].weight;
}

static void hear(struct rig *r, const struct core_action *a) {
    struct fake *f = fake_of(r, a->conn);
    if (!f) return;
    switch (a->message) {
    case MSG_ENROLLED: f->id = ((const struct msg_enrolled *)a->msg)->member; break;
    case MSG_HELLO_ACK: f->session = ((const struct msg_hello_ack *)a->msg)->session; break;
    case MSG_LEASES: hear_leases(f, a->msg); break;
    case MSG_PLAN: hear_plan(f, a); break;
    case MSG_RESET:
        f->reset = true;
        f->ready = false;
        break;
    case MSG_RESYNC:
        f->resync = true;
        f->donors = ((const struct msg_resync *)a->msg)->donors_count;
        break;
    case MSG_HOLDERS:
        if (((const struct msg_holders *)a->msg)->index <= f->base) break;
        f->base = ((const struct msg_holders *)a->msg)->index;
        f->round++;
        f->ready = f->has_plan = false;
        break;
    }
}

static void carry_out(struct rig *r, const struct core_action *a) {
    if (a->type == CORE_ACT_PERSIST)
        for (uint32_t i = 0; i < a->write_count; i++)
            put_row(r, a->writes[i].table, a->writes[i].key, a->writes[i].value,
                    a->writes[i].value_length);
    else if (a->type == CORE_ACT_SEND)
        hear(r, a);
    else if (a->type == CORE_ACT_CLOSE && fake_of(r, a->conn)) {
        fake_of(r, a->conn)->said_goodbye_to = a->final;
        fake_of(r, a->conn)->conn = 0;
    } else if (a->type == CORE_ACT_LOG && getenv("TEST_CORE_LOG"))
        printf("%8llu %s\n", (unsigned long long)r->now, a->text);
}

static void step(struct rig *r, const struct core_event *ev) {
    core_actions_clear(&r->out);
    if (r->dead) return;
    core_step(r->core, ev, r->now, &r->out);
    r->dead = ++r->steps == r->die_in;
    uint32_t limit = r->dead && r->die_after < r->out.count ? r->die_after : r->out.count;
    for (uint32_t i = 0; i < limit; i++) carry_out(r, &r->out.list[i]);
}

static bool logged(const struct rig *r, enum core_level level, const char *part) {
    for (uint32_t i = 0; i < r->out.count; i++) {
        const struct core_action *a = &r->out.list[i];
        if (a->type == CORE_ACT_LOG && a->level == level && strstr(a->text, part)) return true;
    }
    return false;
}

/* From the rows alone, as after a kill -9. */
static void load(struct rig *r) {
    static const struct proto_key none;
    struct err err = {0};
    core_destroy(r->core);
    qsort(r->rows, r->row_count, sizeof *r->rows, by_key);
    r->core = core_create(&r->genesis, &r->run, r->fake[1].aggregate_only ? &r->fake[1].key : &none,
                          &err);
    if (!r->core) fail_msg("%s", err.msg);
    for (uint32_t i = 0; i < r->row_count; i++)
        if (core_load(r->core, r->rows[i].table, r->rows[i].key, r->rows[i].value,
                      r->rows[i].length, &err))
            fail_msg("%s", err.msg);
    for (uint32_t i = 1; i <= MEMBERS; i++) r->fake[i].conn = 0;
    r->dead = false;
    step(r, &(struct core_event){.type = CORE_EV_START, .term = ++r->term});
    assert_false(logged(r, CORE_ERROR, "")); /* rows that had to be put right */
}

static void write_genesis(struct rig *r) {
    struct proto_buffer body, entry;
    struct digest none = {{0}};
    proto_buffer_init(&body, PROTO_BLOB_BYTES_MAX);
    proto_buffer_init(&entry, PROTO_BLOB_BYTES_MAX);
    assert_int_equal(proto_encode(&body, RECORD_genesis, &r->genesis, NULL), 0);
    r->run = digest_of(body.data, body.length);
    assert_int_equal(
        core_entry_encode(&entry, 0, &none, 0, LEDGER_GENESIS, RECORD_genesis, &r->genesis, NULL),
        0);
    put_row(r, CORE_LEDGER, 0, entry.data, (uint32_t)entry.length);
    proto_buffer_release(&body);
    proto_buffer_release(&entry);
}

static struct rig *rig_create(void) {
    struct rig *r = calloc(1, sizeof *r);
    r->model = (struct msg_model){.layers = 1,
                                  .width = 4,
                                  .heads = 1,
                                  .kv_heads = 1,
                                  .ffn = 4,
                                  .vocabulary = 16,
                                  .sequence = SEQUENCE,
                                  .rope_theta = 1e4,
                                  .norm_eps = 1e-5,
                                  .tied = 1};
    uint64_t elements = proto_model_elements(&r->model);
    r->inner = (struct msg_inner){.batch = 4, .lr = 1e-3, .total_tokens = 1u << 30};
    r->outer = (struct msg_outer){.inner_steps = 2,
                                  .round_ms = 60000,
                                  .quorum = 2,
                                  .grace_ms = 1000,
                                  .lr = 0.5f,
                                  .momentum = 0.9f,
                                  .alpha = 1,
                                  .contribution_codec = 1,
                                  .result_codec = 2,
                                  .chunk_elements = (uint32_t)(elements + CHUNKS - 1) / CHUNKS,
                                  .fragments = 1,
                                  .clip_factor = 3,
                                  .ramp_rounds = 1,
                                  .heartbeat_ms = 200,
                                  .silence_ms_max = 2000,
                                  .lease_samples = 16,
                                  .checkpoint_rounds = 100};
    r->corpus = (struct msg_corpus){.samples = 240, .tokenizer = proto_str("bytes")};
    r->genesis = (struct msg_genesis){.version = 1,
                                      .name = proto_str("test"),
                                      .model = &r->model,
                                      .model_count = 1,
                                      .inner = &r->inner,
                                      .inner_count = 1,
                                      .outer = &r->outer,
                                      .outer_count = 1,
                                      .corpus = &r->corpus,
                                      .corpus_count = 1,
                                      .init_std = 0.02f,
                                      .checkpoint_url = proto_str("file:///checkpoints")};
    for (uint32_t i = 1; i <= MEMBERS; i++) {
        memset(r->fake[i].key.b, (int)i, sizeof r->fake[i].key.b);
        r->fake[i].port = 7000 + i;
    }
    r->fake[1].aggregate_only = true;
    r->invite = (struct core_invite){.found = true, .id = 77, .record = {.uses_left = 100}};
    r->now = 1000;
    return r;
}

/* Genesis as the fields say now; nobody is enrolled. */
static void rig_start(struct rig *r) {
    write_genesis(r);
    load(r);
}

static int setup(void **state) {
    *state = rig_create();
    return proto_init(NULL);
}

static int teardown(void **state) {
    struct rig *r = *state;
    core_destroy(r->core);
    core_actions_release(&r->out);
    for (uint32_t i = 0; i < r->row_count; i++) free(r->rows[i].value);
    free(r);
    return 0;
}

/* ---- looking at what came out --------------------------------------------------------------- */

/* The n-th (from 0) message of a type to a member in the last step's actions, or NULL. */
static const struct core_action *sent(const struct rig *r, const struct fake *f,
                                      enum proto_type type) {
    for (uint32_t i = 0; i < r->out.count; i++) {
        const struct core_action *a = &r->out.list[i];
        if (a->type == CORE_ACT_SEND && a->message == type && (!f || a->conn == f->conn)) return a;
    }
    return NULL;
}

static const struct core_action *action(const struct rig *r, enum core_action_type type) {
    for (uint32_t i = 0; i < r->out.count; i++)
        if (r->out.list[i].type == type) return &r->out.list[i];
    return NULL;
}

static struct core_view look(const struct rig *r) {
    struct core_view v;
    core_look(r->core, r->now, &v);
    return v;
}

/* ---- playing members ------------------------------------------------------------------------ */

static void say(struct rig *r, struct fake *f, enum proto_type type, uint64_t plan,
                const void *msg) {
    bool opening = type == MSG_HELLO || type == MSG_ENROL;
    struct core_event ev = {.type = CORE_EV_MESSAGE,
                            .conn = f->conn,
                            .msg = msg,
                            .invite = &r->invite,
                            .frame = {.type = (uint8_t)type,
                                      .term = r->term,
                                      .session = opening ? 0 : f->session,
                                      .plan = plan}};
    step(r, &ev);
}

static void dial(struct rig *r, struct fake *f) {
    struct core_event ev = {
        .type = CORE_EV_OPENED, .conn = ++r->next_conn, .key = f->key, .host = "10.0.0.1"};
    f->conn = r->next_conn;
    f->session = 0;
    step(r, &ev);
}

static void enrol(struct rig *r, struct fake *f) {
    struct msg_enrol msg = {.name = proto_str("someone"), .aggregate_only = f->aggregate_only};
    say(r, f, MSG_ENROL, 0, &msg);
}

static void hello(struct rig *r, struct fake *f) {
    struct msg_hello msg = {.software = proto_str("test"),
                            .trains = !f->aggregate_only,
                            .port = f->port,
                            .has_state = 1,
                            .state_index = f->base,
                            .state_root = root_at(f->base)};
    f->has_plan = false;
    say(r, f, MSG_HELLO, 0, &msg);
}

static void beat(struct rig *r, struct fake *f) {
    struct msg_heartbeat msg = {
        .progress = ++f->progress, .phase = PHASE_TRAINING, .state_index = f->base};
    say(r, f, MSG_HEARTBEAT, 0, &msg);
}

static void ask(struct rig *r, struct fake *f, uint32_t samples) {
    struct msg_lease_ask msg = {.samples = samples};
    say(r, f, MSG_LEASE_ASK, 0, &msg);
}

static struct msg_ready ready_of(const struct rig *r, struct fake *f) {
    (void)r;
    return (struct msg_ready){.round = f->round,
                              .base_index = f->base,
                              .state_root = root_at(f->base),
                              .codec = 1,
                              .chunks = CHUNKS,
                              .norm = 1,
                              .absmax = 0.5,
                              .root = digest_of_number("contribution", f->id, f->round),
                              .ranges = f->claims,
                              .ranges_count = f->claim_count};
}

/* Claim up to `samples` from the front of the leases. */
static void claim(struct fake *f, uint64_t samples) {
    f->claim_count = 0;
    for (uint32_t i = 0; i < f->lease_count && samples; i++) {
        struct msg_lease *c = &f->claims[f->claim_count++];
        *c = f->leases[i];
        if (c->count > samples) c->count = samples;
        samples -= c->count;
    }
}

static void say_ready(struct rig *r, struct fake *f) {
    struct msg_ready msg = ready_of(r, f);
    f->ready = true;
    say(r, f, MSG_READY, 0, &msg);
}

static void be_ready(struct rig *r, struct fake *f, uint64_t samples) {
    if (!f->lease_count) ask(r, f, (uint32_t)samples);
    claim(f, samples);
    say_ready(r, f);
}

/* Results as both roles of a plan compute them; all contributors in all chunks. */
struct report {
    struct msg_shard_report msg;
    struct msg_digest_item results[CHUNKS];
    struct msg_summed summed[CHUNKS];
    uint8_t set[PROTO_SET_BYTES_MAX];
};
static void report_of(const struct fake *f, struct report *out) {
    memset(out, 0, sizeof *out);
    for (uint32_t i = 0; i < f->contributors; i++) proto_set_add(out->set, i);
    for (uint32_t i = 0; i < CHUNKS; i++)
        out->results[i].digest = digest_of_number("result", f->plan, i);
    out->summed[0] = (struct msg_summed){CHUNKS, {out->set, (f->contributors + 7) / 8}, f->weights};
    out->msg = (struct msg_shard_report){.round = f->round,
                                         .results = out->results,
                                         .results_count = CHUNKS,
                                         .summed = out->summed,
                                         .summed_count = 1};
}

static void report(struct rig *r, struct fake *f) {
    struct report rep;
    report_of(f, &rep);
    say(r, f, MSG_SHARD_REPORT, f->plan, &rep.msg);
}

static void say_root(struct rig *r, struct fake *f) {
    struct msg_root msg = {f->base, root_at(f->base)};
    say(r, f, MSG_ROOT, 0, &msg);
}

static struct fake *fake_by_id(struct rig *r, uint32_t id) {
    for (uint32_t i = 1; i <= MEMBERS; i++)
        if (r->fake[i].id == id) return &r->fake[i];
    fail_msg("no member %u", id);
    return NULL;
}

static void tick(struct rig *r, uint64_t ms) {
    r->now += ms;
    step(r, &(struct core_event){.type = CORE_EV_TICK});
}

/* Time passes; whoever is not muted sends heartbeats. Stops early when `stop` says so. */
static void pass(struct rig *r, uint64_t ms) {
    for (uint64_t end = r->now + ms; r->now < end;) {
        for (uint32_t i = 1; i <= MEMBERS; i++)
            if (r->fake[i].conn && r->fake[i].session && !r->fake[i].muted) beat(r, &r->fake[i]);
        tick(r, 100);
    }
}

static void join(struct rig *r, struct fake *f) {
    dial(r, f);
    enrol(r, f);
    hello(r, f);
}

/* The own node (1) and `trainers` trainers (2..) are connected. */
static void start_with(struct rig *r, uint32_t trainers) {
    rig_start(r);
    for (uint32_t i = 1; i <= trainers + 1; i++) join(r, &r->fake[i]);
}

/* Trainers 2 and 3 were ready, and a plan is out. */
static void start_reducing(struct rig *r, uint32_t trainers) {
    start_with(r, trainers);
    for (uint32_t i = 2; i <= trainers + 1; i++) be_ready(r, &r->fake[i], 8);
    assert_string_equal(look(r).phase, "reduce");
}

static struct fake *holder(struct rig *r) { return fake_by_id(r, r->fake[2].shard.holder); }

static void commit_once(struct rig *r) {
    report(r, &r->fake[1]);
    report(r, holder(r));
    assert_int_equal(r->fake[1].base, look(r).head_index);
}

/* Index of the first action of a type (and message), or the number of actions. */
static uint32_t place(const struct rig *r, enum core_action_type type, int message) {
    uint32_t i = 0;
    while (i < r->out.count &&
           (r->out.list[i].type != type || (message >= 0 && r->out.list[i].message != message)))
        i++;
    return i;
}

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

/* To serve on from an older copy of the store would make a second history. */
static void a_member_that_has_seen_more_is_not_taken(void **state) {
    struct rig *r = *state;
    start_with(r, 1);
    struct fake *f = &r->fake[2];
    step(r, &(struct core_event){.type = CORE_EV_CLOSED, .conn = f->conn});
    dial(r, f);
    struct msg_hello msg = {.trains = 1, .head_index = 50, .head_digest = root_at(1)};
    say(r, f, MSG_HELLO, 0, &msg);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_STALE);
    assert_false(action(r, CORE_ACT_CLOSE)->final);
    assert_true(logged(r, CORE_ERROR, "older copy"));
    dial(r, f);
    msg = (struct msg_hello){.trains = 1, .term_max = r->term + 1};
    say(r, f, MSG_HELLO, 0, &msg);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_STALE);
    dial(r, f);
    msg = (struct msg_hello){
        .trains = 1, .head_index = look(r).head_index, .head_digest = look(r).head_digest};
    say(r, f, MSG_HELLO, 0, &msg);
    assert_null(action(r, CORE_ACT_CLOSE));
    assert_null(action(r, CORE_ACT_SEND_LEDGER)); /* it has everything */
}

/* ---- leases --------------------------------------------------------------------------------- */

static void a_lease_is_durable_before_it_is_sent(void **state) {
    struct rig *r = *state;
    start_with(r, 1);
    ask(r, &r->fake[2], 8);
    assert_true(place(r, CORE_ACT_PERSIST, -1) < place(r, CORE_ACT_SEND, MSG_LEASES));
    assert_int_equal(r->fake[2].leases[0].count, 8);
    ask(r, &r->fake[2], 1000); /* two leases' worth at most */
    assert_int_equal(r->fake[2].leases[0].count + r->fake[2].leases[1].count, 32);
    ask(r, &r->fake[2], 1000);
    assert_null(action(r, CORE_ACT_PERSIST));
    assert_non_null(sent(r, &r->fake[2], MSG_LEASES));
}

/* A hostile member may ask as it likes: what we write, send and log is bounded. */
static void lease_ask_spam_is_bounded(void **state) {
    struct rig *r = *state;
    start_with(r, 1);
    uint32_t answers = 0, lines = 0;
    for (int i = 0; i < 5000; i++) {
        ask(r, &r->fake[2], 1);
        answers += sent(r, &r->fake[2], MSG_LEASES) != NULL;
        for (uint32_t j = 0; j < r->out.count; j++) lines += r->out.list[j].type == CORE_ACT_LOG;
    }
    assert_int_equal(answers, 16);
    assert_true(lines <= 64);
}

static void a_returned_lease_is_of_the_next_generation_and_the_old_claim_is_refused(void **state) {
    struct rig *r = *state;
    start_with(r, 2);
    struct fake *lost = &r->fake[2], *other = &r->fake[3];
    ask(r, lost, 8);
    struct msg_lease old = lost->leases[0];
    lost->muted = true;
    pass(r, 2500);
    assert_int_equal(lost->conn, 0);
    ask(r, other, 4); /* a part of it: the rest gets an id of its own */
    assert_int_equal(other->leases[0].lease, old.lease);
    assert_int_equal(other->leases[0].generation, old.generation + 1);
    assert_int_equal(other->leases[0].start, old.start);
    assert_int_equal(other->leases[0].count, 4);
    ask(r, other, 8);
    assert_int_equal(other->lease_count, 3);
    assert_int_equal(other->leases[1].start + other->leases[2].start, 4 + 8);
    dial(r, lost);
    hello(r, lost);
    assert_int_equal(lost->lease_count, 0);
    lost->claims[0] = old;
    lost->claim_count = 1;
    say_ready(r, lost);
    assert_true(lost->reset);
    assert_true(place(r, CORE_ACT_SEND, MSG_RESET) < place(r, CORE_ACT_SEND, MSG_LEASES));
    assert_int_equal(look(r).members_live, 3);
}

static void a_claim_must_be_a_prefix_of_a_held_lease(void **state) {
    struct rig *r = *state;
    start_with(r, 3);
    struct fake *f = &r->fake[2];
    ask(r, f, 8);
    ask(r, &r->fake[3], 8);
    const struct msg_lease good = f->leases[0];
    struct msg_lease bad[] = {good, good, good, good, good, r->fake[3].leases[0]};
    bad[0].start++, bad[0].count--;
    bad[1].count++;
    bad[2].count = 0;
    bad[3].generation++;
    bad[4].lease += 1000;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        f->reset = false;
        f->claims[0] = bad[i];
        f->claim_count = 1;
        say_ready(r, f);
        assert_true(f->reset);
    }
    f->reset = false;
    f->claims[0] = f->claims[1] = good; /* twice the same */
    f->claim_count = 2;
    say_ready(r, f);
    assert_true(f->reset);
    f->reset = false;
    f->claim_count = 0;
    say_ready(r, f);
    assert_true(f->reset);
    f->reset = false;
    claim(f, 8);
    say_ready(r, f);
    assert_false(f->reset);
}

/* ---- READY ---------------------------------------------------------------------------------- */

static void a_contribution_that_cannot_be_is_refused(void **state) {
    struct rig *r = *state;
    start_with(r, 3);
    struct fake *f = &r->fake[2];
    ask(r, f, 8);
    claim(f, 8);
    const struct msg_ready good = ready_of(r, f);
    struct msg_ready bad[] = {good, good, good, good, good, good, good};
    bad[0].chunks++;
    bad[1].codec++;
    bad[2].norm = 0.1; /* less than its largest value */
    bad[3].norm = 1e6; /* more than that value in every element */
    bad[4].absmax = -0.5;
    bad[5].absmax = bad[5].norm = 1e200;
    memset(&bad[6].root, 0, sizeof bad[6].root);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        f->reset = false;
        say(r, f, MSG_READY, 0, &bad[i]);
        assert_true(f->reset);
    }
    struct msg_ready early = good;
    early.round++;
    say(r, f, MSG_READY, 0, &early);
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_PROTOCOL);
    struct fake *own = &r->fake[1];
    dial(r, own);
    say(r, own, MSG_HELLO, 0, &(struct msg_hello){.trains = 1});
    say(r, own, MSG_READY, 0, &good); /* it says so, but it was enrolled to aggregate only */
    assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_PROTOCOL);
}

static void a_ready_replaces_another_until_it_is_planned(void **state) {
    struct rig *r = *state;
    start_with(r, 2);
    struct fake *f = &r->fake[2];
    be_ready(r, f, 8);
    claim(f, 4);
    struct msg_ready second = ready_of(r, f);
    second.root = root_at(99);
    say(r, f, MSG_READY, 0, &second);
    assert_false(f->reset);
    be_ready(r, &r->fake[3], 8);
    const struct msg_plan *plan = sent(r, f, MSG_PLAN)->msg;
    assert_true(digest_equal(&plan->contributors[0].root, &second.root));
    assert_int_equal(plan->contributors[0].weight, 4);
    say(r, f, MSG_READY, 0, &second); /* again the same: the plan again */
    assert_non_null(sent(r, f, MSG_PLAN));
    second.root = root_at(98);
    say(r, f, MSG_READY, 0, &second);
    assert_true(f->reset);
}

/* ---- plans ---------------------------------------------------------------------------------- */

static void everybody_ready_plans_at_once(void **state) {
    struct rig *r = *state;
    start_with(r, 3);
    be_ready(r, &r->fake[2], 8);
    be_ready(r, &r->fake[3], 8);
    assert_string_equal(look(r).phase, "train");
    be_ready(r, &r->fake[4], 8);
    assert_string_equal(look(r).phase, "reduce");
    for (int i = 1; i <= 4; i++) assert_non_null(sent(r, &r->fake[i], MSG_PLAN)); /* 1 aggregates */
    const struct msg_plan *plan = sent(r, &r->fake[2], MSG_PLAN)->msg;
    assert_int_equal(plan->shards[0].aggregator, r->fake[1].id);
    assert_int_not_equal(plan->shards[0].holder, r->fake[1].id);
    assert_int_equal(plan->addresses[0].port, r->fake[1].port);
    assert_int_equal(plan->contributors_count, 3);
}

static void a_quorum_waits_for_the_grace_window_and_no_longer(void **state) {
    struct rig *r = *state;
    start_with(r, 3);
    be_ready(r, &r->fake[2], 8);
    pass(r, 1500); /* one is no quorum, however long it waits */
    assert_string_equal(look(r).phase, "train");
    be_ready(r, &r->fake[3], 8);
    pass(r, 900);
    assert_string_equal(look(r).phase, "train");
    pass(r, 200);
    assert_string_equal(look(r).phase, "reduce");
}

/* A run that lost members goes on with the rest; one trainer alone is enough. */
static void the_quorum_shrinks_with_the_live_trainers(void **state) {
    struct rig *r = *state;
    r->outer.quorum = 3;
    start_with(r, 2);
    be_ready(r, &r->fake[2], 8);
    assert_string_equal(look(r).phase, "train");
    r->fake[3].muted = true;
    pass(r, 2500);
    assert_string_equal(look(r).phase, "reduce");
}

/* Two holders on two machines or none: what only one disk has is not held. */
static void a_plan_needs_a_second_holder(void **state) {
    struct rig *r = *state;
    r->fake[1].aggregate_only = false; /* no own node in this run */
    r->outer.quorum = 1;
    rig_start(r);
    join(r, &r->fake[2]);
    be_ready(r, &r->fake[2], 8);
    pass(r, 3000);
    assert_string_equal(look(r).phase, "train");
    r->fake[3].port = 0; /* behind NAT: it can hold, not aggregate */
    join(r, &r->fake[3]);
    pass(r, 2000);
    assert_string_equal(look(r).phase, "reduce");
    assert_int_equal(r->fake[2].shard.aggregator, r->fake[2].id);
    assert_int_equal(r->fake[2].shard.holder, r->fake[3].id);
}

static void weights_ramp_norms_are_clipped_and_the_grid_fits(void **state) {
    struct rig *r = *state;
    r->outer.ramp_rounds = 4;
    start_with(r, 3);
    struct fake *large = &r->fake[4];
    be_ready(r, &r->fake[2], 8);
    be_ready(r, &r->fake[3], 8);
    ask(r, large, 16);
    claim(large, 16);
    struct msg_ready msg = ready_of(r, large);
    msg.norm = 30;
    msg.absmax = 20;
    say(r, large, MSG_READY, 0, &msg);
    const struct msg_plan *plan = sent(r, large, MSG_PLAN)->msg;
    assert_int_equal(plan->contributors[0].weight, 2); /* 8 samples, a quarter in the first round */
    assert_int_equal(plan->contributors[2].weight, 4);
    assert_float_equal(plan->contributors[0].clip, 1, 0);
    assert_float_equal(plan->contributors[2].clip, 0.1, 1e-6); /* 3 * median 1 / 30 */
    assert_true(ldexp(20 * 0.1, plan->grid_exponent) < ldexp(1, 37));
    assert_true(ldexp(20 * 0.1, plan->grid_exponent + 1) >= ldexp(1, 37));
}

static void a_joiners_weight_grows_and_holders_take_turns(void **state) {
    struct rig *r = *state;
    r->outer.ramp_rounds = 4;
    uint32_t holders[2];
    start_reducing(r, 2);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(r->fake[2].weights, 2 * 8 * (i + 1) / 4);
        holders[i] = holder(r)->id;
        commit_once(r);
        if (i == 0) load(r); /* rounds are counted in the ledger */
        for (int j = 1; i == 0 && j <= 3; j++) dial(r, &r->fake[j]), hello(r, &r->fake[j]);
        for (int j = 2; j <= 3; j++) be_ready(r, &r->fake[j], 8);
    }
    assert_int_not_equal(holders[0], holders[1]);
}

static void the_grace_window_starts_anew_when_the_quorum_was_lost(void **state) {
    struct rig *r = *state;
    start_with(r, 4);
    be_ready(r, &r->fake[2], 8);
    be_ready(r, &r->fake[3], 8);
    pass(r, 800);
    say(r, &r->fake[3], MSG_LEAVE, 0, &(struct msg_leave){0});
    pass(r, 800);
    be_ready(r, &r->fake[4], 8);
    pass(r, 800);
    assert_string_equal(look(r).phase, "train");
    pass(r, 300);
    assert_string_equal(look(r).phase, "reduce");
}

/* A member that started again may have lost its frozen bytes; a plan that counts on them stalls. */
static void hello_takes_an_unplanned_ready_back(void **state) {
    struct rig *r = *state;
    start_with(r, 2);
    be_ready(r, &r->fake[2], 8);
    dial(r, &r->fake[2]);
    hello(r, &r->fake[2]);
    be_ready(r, &r->fake[3], 8);
    assert_string_equal(look(r).phase, "train");
    say_ready(r, &r->fake[2]);
    assert_string_equal(look(r).phase, "reduce");
}

/* ---- reduce: losses ------------------------------------------------------------------------- */

/* The aggregator dies when only the holder's report is missing. Old sums must not commit. */
static void a_lost_aggregator_makes_a_new_plan_and_late_reports_are_void(void **state) {
    struct rig *r = *state;
    start_reducing(r, 3);
    struct fake *own = &r->fake[1], *second = holder(r);
    struct fake before = *second;
    report(r, own);
    own->muted = true;
    pass(r, 2500);
    struct core_view v = look(r);
    assert_string_equal(v.phase, "reduce");
    assert_int_equal(v.handovers, 1);
    assert_true(r->fake[2].plan > before.plan);
    assert_int_not_equal(r->fake[2].shard.aggregator, own->id);
    assert_int_equal(r->fake[2].contributors, 3);             /* the same contributors */
    assert_int_equal(before.id, r->fake[2].shard.aggregator); /* it has a part again */
    uint64_t plan = r->fake[2].plan;
    report(r, &before); /* its result of the old plan arrives now */
    assert_true(logged(r, CORE_INFO, "void"));
    report(r, holder(r));
    assert_int_equal(look(r).commits, 0);
    assert_int_equal(look(r).plan, plan);
    report(r, fake_by_id(r, r->fake[2].shard.aggregator));
    assert_int_equal(look(r).commits, 1);
}

static void a_lost_contributor_is_dropped_and_the_round_goes_on(void **state) {
    struct rig *r = *state;
    start_reducing(r, 3);
    struct fake *own = &r->fake[1], *lost = holder(r) == &r->fake[2] ? &r->fake[3] : &r->fake[2];
    uint64_t plan = own->plan;
    struct msg_leave leave = {.reason = proto_str("power is dear tonight")};
    struct msg_lease claimed = lost->claims[0];
    say(r, lost, MSG_LEAVE, 0, &leave);
    const struct core_action *drop = sent(r, own, MSG_DROP);
    assert_non_null(drop);
    assert_int_equal(((const struct msg_drop *)drop->msg)->member, lost->id);
    assert_int_equal(own->plan, plan);
    /* It may be in some chunks already, so nobody else may get its samples yet. */
    ask(r, own, 0);
    struct fake *other = holder(r);
    ask(r, other, 8);
    for (uint32_t i = 0; i < other->lease_count; i++)
        assert_int_not_equal(other->leases[i].start, claimed.start);
    /* It is in the first chunk only: summed somewhere is spent. */
    struct report rep;
    report_of(own, &rep);
    uint8_t fewer[1] = {rep.set[0]};
    uint32_t bit = lost->id - 2;
    proto_set_del(fewer, bit);
    rep.summed[0].chunks = 1;
    rep.summed[1] = (struct msg_summed){CHUNKS - 1, {fewer, 1}, own->weights - 8};
    rep.msg.summed_count = 2;
    say(r, own, MSG_SHARD_REPORT, own->plan, &rep.msg);
    say(r, other, MSG_SHARD_REPORT, own->plan, &rep.msg);
    assert_int_equal(look(r).commits, 1);
    assert_int_equal(look(r).samples_spent, 24);
}

/* Dropped from every chunk: its samples were in no sum and go to others, the others' do not. */
static void a_contributor_summed_nowhere_gets_its_samples_back_to_the_run(void **state) {
    struct rig *r = *state;
    start_reducing(r, 3);
    struct fake *own = &r->fake[1], *lost = holder(r) == &r->fake[2] ? &r->fake[3] : &r->fake[2];
    struct msg_lease claimed = lost->claims[0];
    say(r, lost, MSG_LEAVE, 0, &(struct msg_leave){0});
    struct report rep;
    report_of(own, &rep);
    proto_set_del(rep.set, lost->id - 2);
    rep.summed[0].weight -= 8;
    say(r, own, MSG_SHARD_REPORT, own->plan, &rep.msg);
    say(r, holder(r), MSG_SHARD_REPORT, own->plan, &rep.msg);
    assert_int_equal(look(r).commits, 1);
    assert_int_equal(look(r).samples_spent, 16);
    struct fake *other = holder(r);
    ask(r, other, 8);
    assert_int_equal(other->leases[0].start, claimed.start);
    assert_int_equal(other->leases[0].generation, claimed.generation + 1);
}

static void unequal_reports_make_a_new_plan_with_another_aggregator(void **state) {
    struct rig *r = *state;
    start_reducing(r, 3);
    struct fake *own = &r->fake[1];
    uint64_t plan = own->plan;
    struct report rep;
    report(r, own);
    struct fake *second = holder(r);
    report_of(second, &rep);
    rep.results[1].digest = root_at(5);
    say(r, second, MSG_SHARD_REPORT, second->plan, &rep.msg);
    assert_int_equal(look(r).commits, 0);
    assert_true(r->fake[2].plan > plan);
    assert_int_not_equal(r->fake[2].shard.aggregator, own->id);
}

static void a_chunk_summed_from_nobody_makes_a_new_plan(void **state) {
    struct rig *r = *state;
    start_reducing(r, 2);
    struct fake *own = &r->fake[1], *second = holder(r);
    struct report rep;
    report_of(own, &rep);
    rep.summed[0].chunks = CHUNKS - 1;
    rep.summed[1] = (struct msg_summed){1, {NULL, 0}, 0};
    rep.msg.summed_count = 2;
    uint64_t plan = own->plan;
    say(r, own, MSG_SHARD_REPORT, plan, &rep.msg);
    say(r, second, MSG_SHARD_REPORT, plan, &rep.msg);
    assert_int_equal(look(r).commits, 0);
    assert_true(look(r).plan > plan);
    assert_string_equal(look(r).phase, "reduce");
}

static void a_broken_report_costs_its_sender_the_shard(void **state) {
    struct rig *r = *state;
    uint8_t stranger[1] = {0xff};
    for (int kind = 0; kind < 6; kind++) {
        start_reducing(r, 3);
        struct fake *own = &r->fake[1];
        struct report rep;
        report_of(own, &rep);
        if (kind == 0) rep.msg.results_count--;
        if (kind == 1) rep.summed[0].chunks++;
        if (kind == 2) rep.summed[0].set.length = 0;
        if (kind == 3) rep.summed[0].set.data = stranger;
        if (kind == 4) rep.summed[0].weight++;
        if (kind == 5) rep.summed[0].chunks = 0;
        uint64_t plan = own->plan;
        say(r, own, MSG_SHARD_REPORT, plan, &rep.msg);
        assert_int_equal(action(r, CORE_ACT_CLOSE)->code, ERR_PROTOCOL);
        assert_true(r->fake[2].plan > plan);
        assert_int_not_equal(r->fake[2].shard.aggregator, own->id);
        void *again = r;
        teardown(&again);
        setup(state);
        r = *state;
    }
}

static void overdue_reports_move_the_shard_with_more_time_each_time(void **state) {
    struct rig *r = *state;
    start_reducing(r, 3);
    pass(r, 7900); /* 4 * silence_ms_max */
    assert_int_equal(look(r).plan, 1);
    pass(r, 200);
    assert_int_equal(look(r).plan, 2);
    assert_int_not_equal(r->fake[2].shard.aggregator, r->fake[1].id);
    pass(r, 15800);
    assert_int_equal(look(r).plan, 2);
    pass(r, 300);
    assert_int_equal(look(r).plan, 3);
}

/* Else a holder that hangs with its heart beating is never replaced. */
static void a_repeated_report_does_not_buy_time(void **state) {
    struct rig *r = *state;
    start_reducing(r, 3);
    struct fake before = r->fake[1];
    for (int i = 0; i < 9 && look(r).plan == 1; i++) {
        before.conn = r->fake[1].conn;
        report(r, &before);
        pass(r, 1000);
    }
    assert_int_equal(look(r).plan, 2);
    assert_int_equal(r->fake[2].shard.aggregator, r->fake[1].id);
    assert_int_not_equal(holder(r)->id, before.shard.holder);
}

/* Who was ready after the plan was frozen waits for the next round: the aggregators that are left
 * must be able to add up what contributors announced before they knew who would sum. */
static void a_handover_keeps_the_contributors(void **state) {
    struct rig *r = *state;
    start_with(r, 3);
    be_ready(r, &r->fake[2], 8);
    be_ready(r, &r->fake[3], 8);
    pass(r, 1100);
    assert_string_equal(look(r).phase, "reduce");
    be_ready(r, &r->fake[4], 8);
    r->fake[1].muted = true;
    pass(r, 2500);
    assert_int_equal(look(r).plan, 2);
    assert_int_equal(r->fake[2].contributors, 2);
}

/* ---- the commit ----------------------------------------------------------------------------- */

/* Ledger and leases change together or not at all, and nobody hears of it before. */
static void a_commit_spends_leases_in_its_own_transaction_before_any_word(void **state) {
    struct rig *r = *state;
    start_reducing(r, 2);
    for (int i = 2; i <= 3; i++) ask(r, &r->fake[i], 4);
    report(r, &r->fake[1]);
    assert_null(action(r, CORE_ACT_PERSIST)); /* one report is one disk */
    report(r, holder(r));
    const struct core_action *p = action(r, CORE_ACT_PERSIST);
    assert_non_null(p);
    assert_int_equal(p->writes[0].table, CORE_LEDGER);
    assert_int_equal(p->write_count, 3);
    for (uint32_t i = 1; i < 3; i++) {
        assert_int_equal(p->writes[i].table, CORE_LEASE);
        assert_null(p->writes[i].value); /* wholly spent */
    }
    uint32_t persist = place(r, CORE_ACT_PERSIST, -1);
    assert_true(persist < place(r, CORE_ACT_SEND, -1));
    assert_true(persist < place(r, CORE_ACT_SEND_LEDGER, -1));
    assert_true(place(r, CORE_ACT_SEND, MSG_LEASES) < r->out.count);
    for (int i = 1; i <= 3; i++) assert_non_null(sent(r, &r->fake[i], MSG_HOLDERS));
    assert_int_equal(look(r).round, 1);
    assert_int_equal(look(r).tokens_committed, 16 * SEQUENCE);
    assert_int_equal(r->fake[2].lease_count, 1); /* what it asked for later is still its own */
}

static void a_partly_claimed_lease_keeps_its_id_and_generation(void **state) {
    struct rig *r = *state;
    start_with(r, 2);
    ask(r, &r->fake[2], 8);
    struct msg_lease before = r->fake[2].leases[0];
    be_ready(r, &r->fake[2], 5);
    be_ready(r, &r->fake[3], 8);
    report(r, &r->fake[1]);
    report(r, holder(r));
    assert_int_equal(r->fake[2].lease_count, 1);
    struct msg_lease after = r->fake[2].leases[0];
    assert_int_equal(after.lease, before.lease);
    assert_int_equal(after.generation, before.generation);
    assert_int_equal(after.start, before.start + 5);
    assert_int_equal(after.count, 3);
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
    pass(r, 1000);
    assert_int_equal(look(r).members_live, 3);
    dial(r, f);
    hello(r, f);
    assert_true(f->has_plan); /* the same plan again */
    assert_int_equal(f->plan, 1);
    assert_int_equal(look(r).plan, 1);
}

/* ---- roots, settling, checkpoints ----------------------------------------------------------- */

static void a_wrong_root_is_counted_and_answered_by_resync(void **state) {
    struct rig *r = *state;
    start_reducing(r, 2);
    commit_once(r);
    say_root(r, &r->fake[1]);
    say_root(r, &r->fake[2]);
    struct msg_root wrong = {r->fake[3].base, root_at(12345)};
    say(r, &r->fake[3], MSG_ROOT, 0, &wrong);
    const struct core_action *a = sent(r, &r->fake[3], MSG_RESYNC);
    assert_non_null(a);
    const struct msg_resync *resync = a->msg;
    struct digest right = root_at(r->fake[1].base);
    assert_true(digest_equal(&resync->root, &right));
    assert_int_equal(resync->donors_count, 2);
    assert_int_equal(look(r).root_mismatches, 1);
    assert_true(logged(r, CORE_ERROR, "root"));
    assert_int_equal(look(r).settled_index, 0);
    say_root(r, &r->fake[3]); /* it caught up */
    assert_int_equal(look(r).settled_index, r->fake[1].base);
    say(r, &r->fake[2], MSG_ROOT, 0,
        &(struct msg_root){123456, root_at(1)}); /* of no commit at all */
    assert_true(logged(r, CORE_WARNING, "no commit"));
}

/* Whoever is first may be wrong; the own node is believed, and the first one told to catch up. */
static void the_own_node_is_the_reference(void **state) {
    struct rig *r = *state;
    start_reducing(r, 2);
    commit_once(r);
    struct msg_root wrong = {r->fake[2].base, root_at(12345)};
    say(r, &r->fake[2], MSG_ROOT, 0, &wrong);
    say_root(r, &r->fake[1]);
    assert_non_null(sent(r, &r->fake[2], MSG_RESYNC));
    say_root(r, &r->fake[3]);
    assert_null(sent(r, &r->fake[3], MSG_RESYNC));
    assert_int_equal(look(r).root_mismatches, 1);
}

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
    commit_once(r);
    say_root(r, &r->fake[2]);
    assert_null(sent(r, NULL, MSG_CHECKPOINT_WRITE));
    say_root(r, &r->fake[1]);
    const struct core_action *a = sent(r, &r->fake[1], MSG_CHECKPOINT_WRITE);
    assert_non_null(a);
    const struct msg_checkpoint_write *w = a->msg;
    assert_int_equal(w->index, r->fake[1].base);
    assert_int_equal(w->round, 1);
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

/* ---- whole runs ----------------------------------------------------------------------------- */

/* One thing that a member does now, if there is something to do. */
static void act(struct rig *r, struct fake *f) {
    if (f->said_goodbye_to) return;
    if (!f->conn) {
        dial(r, f);
        if (f->conn && !f->id) enrol(r, f);
        if (f->conn) hello(r, f);
        if (f->conn && f->ready) say_ready(r, f);
        return;
    }
    if (f->has_plan && f->reported != (r->term << 32 | f->plan) &&
        (f->shard.aggregator == f->id || f->shard.holder == f->id)) {
        f->reported = r->term << 32 | f->plan;
        report(r, f);
        return;
    }
    if (f->base && f->told != f->base) { /* new since it last told its root */
        f->told = f->base;
        say_root(r, f);
        return;
    }
    if (f->aggregate_only || f->ready) return;
    if (!f->lease_count) ask(r, f, 12);
    if (!f->lease_count || !f->conn) return;
    claim(f, 5 + f->id);
    say_ready(r, f);
}

struct outcome {
    uint64_t steps, commits, tokens;
};

static void everything_the_same_after_reload(struct rig *r) {
    struct core_view a = look(r), b;
    struct core_member_view ma[MEMBERS], mb;
    uint32_t members = core_member_count(r->core);
    for (uint32_t i = 0; i < members; i++) core_member_look(r->core, i, r->now, &ma[i]);
    load(r);
    b = look(r);
    assert_int_equal(a.head_index, b.head_index);
    assert_true(digest_equal(&a.head_digest, &b.head_digest));
    assert_int_equal(a.round, b.round);
    assert_int_equal(a.tokens_committed, b.tokens_committed);
    assert_int_equal(a.samples_free, b.samples_free);
    assert_int_equal(a.samples_spent, b.samples_spent);
    assert_int_equal(core_member_count(r->core), members);
    for (uint32_t i = 0; i < members; i++) {
        core_member_look(r->core, i, r->now, &mb);
        assert_memory_equal(&ma[i].key, &mb.key, sizeof mb.key);
        assert_int_equal(ma[i].tokens_committed, mb.tokens_committed);
        assert_int_equal(ma[i].aggregate_only, mb.aggregate_only);
    }
}

/* Four members work until the run is complete. The coordinator dies in step `die_in` after
 * `actions` of its actions (UINT32_MAX: all of them), and is restarted from its rows. */
static struct outcome whole_run(struct rig *r, uint64_t die_in, uint32_t actions) {
    bool all = false;
    r->corpus.samples = 60;
    r->die_in = die_in;
    r->die_after = actions;
    rig_start(r);
    for (int turns = 0; turns < 1000 && !all; turns++) {
        all = true;
        for (uint32_t i = 1; i <= 4; i++) {
            act(r, &r->fake[i]);
            all &= r->fake[i].said_goodbye_to || i == 1;
        }
        pass(r, 100);
        if (r->dead && actions == UINT32_MAX)
            everything_the_same_after_reload(r);
        else if (r->dead)
            load(r);
    }
    return (struct outcome){r->steps, look(r).round, look(r).tokens_committed};
}

/* From the ledger alone: which samples were spent, each at most once. */
static uint64_t samples_in_ledger(const struct rig *r) {
    uint8_t spent[256] = {0};
    uint64_t n = 0;
    for (uint32_t i = 0; i < r->row_count; i++) {
        struct msg_entry e = {0};
        struct msg_commit k = {0};
        if (r->rows[i].table != CORE_LEDGER) continue;
        assert_int_equal(proto_decode(r->rows[i].value, r->rows[i].length, RECORD_entry, &e, NULL),
                         0);
        if (e.kind == LEDGER_COMMIT) {
            assert_int_equal(proto_decode(e.body.data, e.body.length, RECORD_commit, &k, NULL), 0);
            for (uint32_t j = 0; j < k.spent_count; j++)
                for (uint64_t s = k.spent[j].start; s < k.spent[j].start + k.spent[j].count;
                     s++, n++) {
                    assert_int_equal(spent[s], 0);
                    spent[s] = 1;
                }
            proto_decoded_release(RECORD_commit, &k);
        }
        proto_decoded_release(RECORD_entry, &e);
    }
    return n;
}

static void check_finished(struct rig *r, const struct outcome *o) {
    assert_string_equal(look(r).phase, "complete");
    assert_int_equal(samples_in_ledger(r), 60);
    assert_int_equal(look(r).samples_spent, 60);
    assert_int_equal(o->tokens, 60 * SEQUENCE);
    uint64_t of_members = 0;
    for (uint32_t i = 0; i < core_member_count(r->core); i++) {
        struct core_member_view m;
        core_member_look(r->core, i, r->now, &m);
        of_members += m.tokens_committed;
    }
    assert_int_equal(of_members, o->tokens);
    for (uint32_t i = 2; i <= 4; i++) assert_true(r->fake[i].said_goodbye_to);
}

static void a_run_completes_with_every_sample_spent_exactly_once(void **state) {
    struct rig *r = *state;
    r->genesis.checkpoint_url = proto_str("");
    struct outcome o = whole_run(r, 0, 0);
    check_finished(r, &o);
    assert_true(o.commits >= 3);
}

/* Who was away at the end still wants the model: the own node stays and gives it. */
static void a_late_comer_gets_the_last_state_and_then_goes(void **state) {
    struct rig *r = *state;
    r->genesis.checkpoint_url = proto_str("");
    whole_run(r, 0, 0);
    struct fake *late = &r->fake[5];
    dial(r, late);
    enrol(r, late);
    say(r, late, MSG_HELLO, 0, &(struct msg_hello){.trains = 1, .port = late->port});
    const struct msg_hello_ack *ack = sent(r, late, MSG_HELLO_ACK)->msg;
    assert_int_equal(ack->donors_count, 1);
    assert_int_equal(ack->donors[0].member, r->fake[1].id);
    pass(r, 1000);
    assert_false(late->said_goodbye_to);
    late->base = r->fake[1].base;
    say_root(r, late);
    assert_true(late->said_goodbye_to);
}

static void a_run_ends_when_it_has_its_tokens(void **state) {
    struct rig *r = *state;
    r->genesis.checkpoint_url = proto_str("");
    r->inner.total_tokens = 20 * SEQUENCE;
    whole_run(r, 0, 0);
    assert_string_equal(look(r).phase, "complete");
    assert_in_range(samples_in_ledger(r), 20, 59);
    for (uint32_t i = 2; i <= 4; i++) assert_true(r->fake[i].said_goodbye_to);
}

/* kill -9 in every step, after some or all of its actions: every sample is still spent once. */
static void a_restart_at_every_point_loses_nothing(void **state) {
    struct rig *r = *state;
    r->genesis.checkpoint_url = proto_str("");
    uint64_t steps = whole_run(r, 0, 0).steps, runs = 0;
    for (uint64_t at = 2; at < steps; at++) {
        static const uint32_t after[] = {UINT32_MAX, 0, 1, 2, 3, 5};
        for (size_t i = 0; i < sizeof after / sizeof *after; i++, runs++) {
            void *again = r;
            teardown(&again);
            setup(state);
            r = *state;
            r->genesis.checkpoint_url = proto_str("");
            struct outcome o = whole_run(r, at, after[i]);
            check_finished(r, &o);
        }
    }
    assert_true(runs > 100);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void) {
    const struct CMUnitTest tests[] = {
        T(an_enrolment_is_one_transaction_before_its_answer),
        T(the_same_key_enrols_again_and_another_is_refused),
        T(unknown_and_expired_invites_are_refused),
        T(others_learn_of_a_new_member_at_once),
        T(messages_out_of_place_end_the_connection),
        T(a_frame_of_an_old_term_or_session_does_nothing),
        T(a_second_connection_replaces_the_first),
        T(a_member_that_has_seen_more_is_not_taken),
        T(a_lease_is_durable_before_it_is_sent),
        T(lease_ask_spam_is_bounded),
        T(a_returned_lease_is_of_the_next_generation_and_the_old_claim_is_refused),
        T(a_claim_must_be_a_prefix_of_a_held_lease),
        T(a_contribution_that_cannot_be_is_refused),
        T(a_ready_replaces_another_until_it_is_planned),
        T(everybody_ready_plans_at_once),
        T(a_quorum_waits_for_the_grace_window_and_no_longer),
        T(the_quorum_shrinks_with_the_live_trainers),
        T(a_plan_needs_a_second_holder),
        T(weights_ramp_norms_are_clipped_and_the_grid_fits),
        T(a_joiners_weight_grows_and_holders_take_turns),
        T(the_grace_window_starts_anew_when_the_quorum_was_lost),
        T(hello_takes_an_unplanned_ready_back),
        T(a_lost_aggregator_makes_a_new_plan_and_late_reports_are_void),
        T(a_lost_contributor_is_dropped_and_the_round_goes_on),
        T(a_contributor_summed_nowhere_gets_its_samples_back_to_the_run),
        T(unequal_reports_make_a_new_plan_with_another_aggregator),
        T(a_chunk_summed_from_nobody_makes_a_new_plan),
        T(a_broken_report_costs_its_sender_the_shard),
        T(overdue_reports_move_the_shard_with_more_time_each_time),
        T(a_repeated_report_does_not_buy_time),
        T(a_handover_keeps_the_contributors),
        T(a_commit_spends_leases_in_its_own_transaction_before_any_word),
        T(a_partly_claimed_lease_keeps_its_id_and_generation),
        T(a_stopped_coordinator_does_not_judge_silence),
        T(a_stopped_coordinator_does_not_take_shards_away),
        T(after_a_restart_leases_stay_until_silence_has_judged),
        T(no_progress_is_silence_too),
        T(a_closed_connection_is_no_loss_yet),
        T(a_wrong_root_is_counted_and_answered_by_resync),
        T(the_own_node_is_the_reference),
        T(a_joiner_gets_donors_the_root_and_others_when_they_are_gone),
        T(holders_are_named_again_after_a_restart),
        T(a_checkpoint_is_written_signed_and_entered_in_the_ledger),
        T(paused_means_no_leases_and_no_plans_also_after_a_restart),
        T(every_damaged_row_is_refused_or_harmless),
        T(a_run_completes_with_every_sample_spent_exactly_once),
        T(a_late_comer_gets_the_last_state_and_then_goes),
        T(a_run_ends_when_it_has_its_tokens),
        T(a_restart_at_every_point_loses_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
