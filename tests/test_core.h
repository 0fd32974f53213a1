/* test_core.h - the rig of the tests of the coordinator's core (test_core_*.c). It plays the shell: it
 * carries actions out in order, keeps the rows of every PERSIST, and plays members that know only
 * what they were sent. */
#ifndef INTELLECT_TEST_CORE_H
#define INTELLECT_TEST_CORE_H

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

#define MEMBERS       8
#define ROWS_MAX      4096
#define SEQUENCE      8
#define CHUNKS        12 /* of the whole vector; chunk i is in fragment i mod fragments */
#define FRAGMENTS_MAX 4
#define SHARDS_MAX    8

/* ---- the rig -------------------------------------------------------------------------------- */

struct row {
    enum core_table table;
    uint64_t key;
    uint8_t *value;
    uint32_t length;
};

/* What a member knows of a fragment. */
#define SIDE                                                                                       \
    uint64_t base, round, plan, reported;                                                          \
    bool ready, has_plan, due;                                                                     \
    struct msg_shard shard; /* the plan's first */                                                 \
    struct msg_shard shards[SHARDS_MAX];                                                           \
    uint32_t shard_count, weights, contributors;                                                   \
    struct msg_contributor contributor[MEMBERS];                                                   \
    struct msg_lease claims[PROTO_LEASES_MAX];                                                     \
    uint32_t claim_count;                                                                          \
    uint64_t samples; /* that its READY says; 0: what it claims */
struct side {
    SIDE
};

struct fake {
    struct identity identity;
    struct proto_key key;
    char host[32];
    bool aggregate_only, muted; /* muted: sends no heartbeat */
    bool unsigned_;             /* its READYs and reports bear a wrong signature */
    uint32_t id, port;
    uint64_t conn, session, progress, instance;
    uint8_t phase;
    bool said_goodbye_to; /* BYE, final */
    struct msg_lease leases[PROTO_LEASES_MAX];
    uint32_t lease_count;
    uint64_t state, told; /* newest commit it has heard of, and told its root of */
    bool reset, resync;
    uint32_t donors;
    double tokens_per_s;
    struct msg_rate rates[MEMBERS];
    uint32_t rate_count;
    union { /* the first fragment, for tests that have one only */
        struct {
            SIDE
        };
        struct side of[FRAGMENTS_MAX];
    };
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
    bool restart, failed; /* CORE_ACT_RESTART, CORE_ACT_FAIL came */
    uint64_t restart_term, hold_ms;
};

static inline struct digest digest_of_number(const char *what, uint64_t a, uint64_t b) {
    char text[96];
    int n = snprintf(text, sizeof text, "%s %llu %llu", what, (unsigned long long)a,
                     (unsigned long long)b);
    return digest_of(text, (size_t)n);
}

/* Every honest member has these leaves and this root at this ledger index. */
static inline void leaves_at(uint64_t index, struct msg_digest_item out[CHUNKS]) {
    for (uint32_t i = 0; i < CHUNKS; i++) out[i].digest = digest_of_number("state", index, i);
}
static inline struct digest root_at(uint64_t index) {
    struct msg_digest_item leaves[CHUNKS];
    leaves_at(index, leaves);
    return digest_tree_root(leaves, CHUNKS);
}
/* Chunks of a fragment. */
static inline uint32_t chunks_of(const struct rig *r, uint32_t fragment) {
    uint32_t p = r->outer.fragments;
    return CHUNKS / p + (fragment < CHUNKS % p);
}

static inline void put_row(struct rig *r, enum core_table table, uint64_t key, const uint8_t *value,
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

static inline int by_key(const void *a, const void *b) {
    const struct row *x = a, *y = b;
    if (x->table != y->table) return x->table < y->table ? -1 : 1;
    return (x->key > y->key) - (x->key < y->key);
}

static inline struct fake *fake_of(struct rig *r, uint64_t conn) {
    for (uint32_t i = 1; i <= MEMBERS; i++)
        if (r->fake[i].conn == conn) return &r->fake[i];
    return NULL;
}

static inline void hear_leases(struct fake *f, const struct msg_leases *m) {
    f->lease_count = m->leases_count;
    if (m->leases_count) memcpy(f->leases, m->leases, m->leases_count * sizeof *m->leases);
}

static inline void hear_plan(struct fake *f, const struct core_action *a) {
    const struct msg_plan *m = a->msg;
    struct side *s = &f->of[m->fragment];
    if (m->resum) return; /* tests of it look for themselves */
    s->has_plan = true;
    s->plan = a->plan;
    s->round = m->round;
    s->shard = m->shards[0];
    s->shard_count = m->shards_count;
    assert_true(m->shards_count <= SHARDS_MAX);
    memcpy(s->shards, m->shards, m->shards_count * sizeof *m->shards);
    s->contributors = m->contributors_count;
    memcpy(s->contributor, m->contributors, m->contributors_count * sizeof *m->contributors);
    s->weights = 0;
    for (uint32_t i = 0; i < m->contributors_count; i++) s->weights += m->contributors[i].weight;
}

/* A commit is heard of by its HOLDERS; the ledger says which fragment it is of. */
static inline void hear_commit(struct rig *r, struct fake *f, uint64_t index) {
    if (index <= f->state) return;
    f->state = index;
    for (uint32_t i = 0; i < r->row_count; i++) {
        struct msg_entry e = {0};
        struct msg_commit k = {0};
        if (r->rows[i].table != CORE_LEDGER || r->rows[i].key != index) continue;
        assert_int_equal(proto_decode(r->rows[i].value, r->rows[i].length, RECORD_entry, &e, NULL),
                         0);
        assert_int_equal(proto_decode(e.body.data, e.body.length, RECORD_commit, &k, NULL), 0);
        struct side *s = &f->of[k.fragment];
        s->base = index;
        s->round = k.round + 1;
        s->ready = s->has_plan = s->due = false;
        proto_decoded_release(RECORD_commit, &k);
        proto_decoded_release(RECORD_entry, &e);
    }
}

static inline void hear(struct rig *r, const struct core_action *a) {
    struct fake *f = fake_of(r, a->conn);
    if (!f) return;
    switch (a->message) {
    case MSG_ENROLLED: f->id = ((const struct msg_enrolled *)a->msg)->member; break;
    case MSG_HELLO_ACK: f->session = ((const struct msg_hello_ack *)a->msg)->session; break;
    case MSG_LEASES: hear_leases(f, a->msg); break;
    case MSG_PLAN: hear_plan(f, a); break;
    case MSG_RESET:
        f->reset = true;
        f->of[((const struct msg_reset *)a->msg)->fragment].ready = false;
        break;
    case MSG_DUE: f->of[((const struct msg_due *)a->msg)->fragment].due = true; break;
    case MSG_RESYNC:
        f->resync = true;
        f->donors = ((const struct msg_resync *)a->msg)->donors_count;
        break;
    case MSG_HOLDERS: hear_commit(r, f, ((const struct msg_holders *)a->msg)->index); break;
    }
}

static inline void carry_out(struct rig *r, const struct core_action *a) {
    if (a->type == CORE_ACT_PERSIST)
        for (uint32_t i = 0; i < a->write_count; i++)
            put_row(r, a->writes[i].table, a->writes[i].key, a->writes[i].value,
                    a->writes[i].value_length);
    else if (a->type == CORE_ACT_SEND)
        hear(r, a);
    else if (a->type == CORE_ACT_CLOSE && fake_of(r, a->conn)) {
        fake_of(r, a->conn)->said_goodbye_to = a->final;
        fake_of(r, a->conn)->conn = 0;
    } else if (a->type == CORE_ACT_RESTART) {
        r->restart = true;
        r->restart_term = a->term;
    } else if (a->type == CORE_ACT_FAIL) {
        r->failed = true;
    } else if (a->type == CORE_ACT_LOG && getenv("TEST_CORE_LOG"))
        printf("%8llu %s\n", (unsigned long long)r->now, a->text);
}

static inline void step(struct rig *r, const struct core_event *ev) {
    core_actions_clear(&r->out);
    if (r->dead) return;
    core_step(r->core, ev, r->now, &r->out);
    r->dead = ++r->steps == r->die_in;
    uint32_t limit = r->dead && r->die_after < r->out.count ? r->die_after : r->out.count;
    for (uint32_t i = 0; i < limit; i++) carry_out(r, &r->out.list[i]);
}

static inline bool logged(const struct rig *r, enum core_level level, const char *part) {
    for (uint32_t i = 0; i < r->out.count; i++) {
        const struct core_action *a = &r->out.list[i];
        if (a->type == CORE_ACT_LOG && a->level == level && strstr(a->text, part)) return true;
    }
    return false;
}

/* From the rows alone, as after a kill -9. */
static inline void load(struct rig *r) {
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
    r->dead = r->restart = false;
    step(r, &(struct core_event){.type = CORE_EV_START, .term = ++r->term, .hold_ms = r->hold_ms});
    assert_false(logged(r, CORE_ERROR, "")); /* rows that had to be put right */
}

static inline void write_genesis(struct rig *r) {
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

static inline struct rig *rig_create(void) {
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
                                  .overlap = 1,
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
        uint8_t seed[32];
        memset(seed, (int)i, sizeof seed);
        identity_from_seed(&r->fake[i].identity, seed);
        r->fake[i].key = r->fake[i].identity.key;
        r->fake[i].port = 7000 + i;
        strcpy(r->fake[i].host, "10.0.0.1");
    }
    r->fake[1].aggregate_only = true;
    r->invite = (struct core_invite){.found = true, .id = 77, .record = {.uses_left = 100}};
    r->now = 1000;
    return r;
}

/* Genesis as the fields say now; nobody is enrolled. */
static inline void rig_start(struct rig *r) {
    write_genesis(r);
    load(r);
}

static inline int setup(void **state) {
    int result = proto_init(NULL);
    *state = rig_create();
    return result;
}

static inline int teardown(void **state) {
    struct rig *r = *state;
    core_destroy(r->core);
    core_actions_release(&r->out);
    for (uint32_t i = 0; i < r->row_count; i++) free(r->rows[i].value);
    free(r);
    return 0;
}

/* ---- looking at what came out --------------------------------------------------------------- */

/* The n-th (from 0) message of a type to a member in the last step's actions, or NULL. */
static inline const struct core_action *sent(const struct rig *r, const struct fake *f,
                                      enum proto_type type) {
    for (uint32_t i = 0; i < r->out.count; i++) {
        const struct core_action *a = &r->out.list[i];
        if (a->type == CORE_ACT_SEND && a->message == type && (!f || a->conn == f->conn)) return a;
    }
    return NULL;
}

static inline const struct core_action *action(const struct rig *r, enum core_action_type type) {
    for (uint32_t i = 0; i < r->out.count; i++)
        if (r->out.list[i].type == type) return &r->out.list[i];
    return NULL;
}

static inline struct core_view look(const struct rig *r) {
    struct core_view v;
    core_look(r->core, r->now, &v);
    return v;
}

/* ---- playing members ------------------------------------------------------------------------ */

static inline void say_as_it_is(struct rig *r, struct fake *f, enum proto_type type, uint64_t plan,
                         const void *msg) {
    bool opening = type == MSG_HELLO || type == MSG_ENROL || type == MSG_LEDGER;
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

static inline void sign(struct rig *r, struct fake *f, const char *purpose, enum proto_record which,
                 const void *record, struct proto_sig *out) {
    assert_int_equal(
        proto_record_sign(&f->identity, purpose, &r->run, r->term, which, record, out, NULL), 0);
    if (f->unsigned_) out->b[7] ^= 1;
}

/* READY and SHARD_REPORT are signed on their way. */
static inline void say(struct rig *r, struct fake *f, enum proto_type type, uint64_t plan,
                const void *msg) {
    struct msg_ready ready;
    struct msg_shard_report report;
    if (type == MSG_READY) {
        ready = *(const struct msg_ready *)msg;
        sign(r, f, "ready", RECORD_ready, &ready, &ready.signature);
        msg = &ready;
    } else if (type == MSG_SHARD_REPORT) {
        report = *(const struct msg_shard_report *)msg;
        report.plan = plan;
        sign(r, f, "shard_report", RECORD_shard_report, &report, &report.signature);
        msg = &report;
    }
    say_as_it_is(r, f, type, plan, msg);
}

static inline void dial(struct rig *r, struct fake *f) {
    struct core_event ev = {
        .type = CORE_EV_OPENED, .conn = ++r->next_conn, .key = f->key};
    strcpy(ev.host, f->host);
    f->conn = r->next_conn;
    f->session = 0;
    step(r, &ev);
}

static inline void enrol(struct rig *r, struct fake *f) {
    struct msg_enrol msg = {.name = proto_str("someone"), .aggregate_only = f->aggregate_only};
    say(r, f, MSG_ENROL, 0, &msg);
}

static inline struct msg_hello hello_of(const struct fake *f) {
    return (struct msg_hello){.software = proto_str("test"),
                              .instance = f->instance,
                              .trains = !f->aggregate_only,
                              .port = f->port,
                              .has_state = 1,
                              .state_index = f->state,
                              .state_root = root_at(f->state)};
}

static inline void hello(struct rig *r, struct fake *f) {
    struct msg_hello msg = hello_of(f);
    for (uint32_t i = 0; i < FRAGMENTS_MAX; i++) f->of[i].has_plan = false;
    say(r, f, MSG_HELLO, 0, &msg);
}

static inline void beat(struct rig *r, struct fake *f) {
    struct msg_heartbeat msg = {.progress = ++f->progress,
                                .phase = PHASE_TRAINING,
                                .state_index = f->state,
                                .tokens_per_s = f->tokens_per_s,
                                .rates = f->rates,
                                .rates_count = f->rate_count};
    say(r, f, MSG_HEARTBEAT, 0, &msg);
}

static inline void ask(struct rig *r, struct fake *f, uint32_t samples) {
    struct msg_lease_ask msg = {.samples = samples};
    say(r, f, MSG_LEASE_ASK, 0, &msg);
}

static inline struct msg_ready ready_in(const struct rig *r, struct fake *f, uint32_t fragment) {
    struct side *s = &f->of[fragment];
    uint64_t samples = s->samples;
    for (uint32_t i = 0; i < s->claim_count && !s->samples; i++) samples += s->claims[i].count;
    return (struct msg_ready){.fragment = fragment,
                              .round = s->round,
                              .base_index = s->base,
                              .state_index = f->state,
                              .state_root = root_at(f->state),
                              .codec = 1,
                              .chunks = chunks_of(r, fragment),
                              .samples = samples,
                              .norm = 1,
                              .absmax = 0.5,
                              .root = digest_of_number("contribution", f->id,
                                                       s->round << 8 | fragment),
                              .ranges = s->claims,
                              .ranges_count = s->claim_count};
}
static inline struct msg_ready ready_of(const struct rig *r, struct fake *f) { return ready_in(r, f, 0); }

/* Claim up to `samples` from the front of the leases. */
static inline void claim_in(struct fake *f, uint32_t fragment, uint64_t samples) {
    struct side *s = &f->of[fragment];
    s->claim_count = 0;
    for (uint32_t i = 0; i < f->lease_count && samples; i++) {
        struct msg_lease *c = &s->claims[s->claim_count++];
        *c = f->leases[i];
        if (c->count > samples) c->count = samples;
        samples -= c->count;
    }
}
static inline void claim(struct fake *f, uint64_t samples) { claim_in(f, 0, samples); }

static inline void say_ready_in(struct rig *r, struct fake *f, uint32_t fragment) {
    struct msg_ready msg = ready_in(r, f, fragment);
    f->of[fragment].ready = true;
    say(r, f, MSG_READY, 0, &msg);
}
static inline void say_ready(struct rig *r, struct fake *f) { say_ready_in(r, f, 0); }

static inline void be_ready_in(struct rig *r, struct fake *f, uint32_t fragment, uint64_t samples) {
    if (!f->lease_count) ask(r, f, (uint32_t)samples);
    claim_in(f, fragment, samples);
    say_ready_in(r, f, fragment);
}
static inline void be_ready(struct rig *r, struct fake *f, uint64_t samples) {
    be_ready_in(r, f, 0, samples);
}

/* Results as both roles of a plan compute them; all contributors in all chunks. */
struct report {
    struct msg_shard_report msg;
    struct msg_digest_item results[CHUNKS];
    struct msg_summed summed[CHUNKS];
    uint8_t set[PROTO_SET_BYTES_MAX];
};
static inline struct digest result_leaf(const struct fake *f, uint32_t fragment, uint32_t chunk) {
    return digest_of_number("result", f->of[fragment].round << 8 | fragment, chunk);
}
static inline void report_in(const struct fake *f, uint32_t fragment, uint32_t shard, struct report *out) {
    const struct side *s = &f->of[fragment];
    const struct msg_shard *where = &s->shards[shard];
    memset(out, 0, sizeof *out);
    for (uint32_t i = 0; i < s->contributors; i++) proto_set_add(out->set, i);
    for (uint32_t i = 0; i < where->count; i++)
        out->results[i].digest = result_leaf(f, fragment, where->first + i);
    out->summed[0] =
        (struct msg_summed){where->count, {out->set, (s->contributors + 7) / 8}, s->weights};
    out->msg = (struct msg_shard_report){.fragment = fragment,
                                         .round = s->round,
                                         .shard = shard,
                                         .results = out->results,
                                         .results_count = where->count,
                                         .summed = out->summed,
                                         .summed_count = 1};
}
static inline void report_of(const struct fake *f, struct report *out) { report_in(f, 0, 0, out); }

/* Whatever of the fragment's plan it sums or holds. */
static inline void report_all(struct rig *r, struct fake *f, uint32_t fragment) {
    struct report rep;
    uint64_t plan = f->of[fragment].plan;
    for (uint32_t i = 0; i < f->of[fragment].shard_count && f->of[fragment].plan == plan; i++) {
        const struct msg_shard *s = &f->of[fragment].shards[i];
        if (s->aggregator != f->id && s->holder != f->id) continue;
        report_in(f, fragment, i, &rep);
        say(r, f, MSG_SHARD_REPORT, plan, &rep.msg);
    }
}

/* Of the first shard, whether it is its or not. */
static inline void report(struct rig *r, struct fake *f) {
    struct report rep;
    report_of(f, &rep);
    say(r, f, MSG_SHARD_REPORT, f->plan, &rep.msg);
}

static inline void say_root(struct rig *r, struct fake *f) {
    struct msg_root msg = {f->state, root_at(f->state)};
    say(r, f, MSG_ROOT, 0, &msg);
}

static inline struct fake *fake_by_id(struct rig *r, uint32_t id) {
    for (uint32_t i = 1; i <= MEMBERS; i++)
        if (r->fake[i].id == id) return &r->fake[i];
    fail_msg("no member %u", id);
    return NULL;
}

static inline void tick(struct rig *r, uint64_t ms) {
    r->now += ms;
    step(r, &(struct core_event){.type = CORE_EV_TICK});
}

/* Time passes; whoever is not muted sends heartbeats. Stops early when `stop` says so. */
static inline void pass(struct rig *r, uint64_t ms) {
    for (uint64_t end = r->now + ms; r->now < end;) {
        for (uint32_t i = 1; i <= MEMBERS; i++)
            if (r->fake[i].conn && r->fake[i].session && !r->fake[i].muted) beat(r, &r->fake[i]);
        tick(r, 100);
    }
}

static inline void join(struct rig *r, struct fake *f) {
    dial(r, f);
    enrol(r, f);
    hello(r, f);
}

/* The own node (1) and `trainers` trainers (2..) are connected. */
static inline void start_with(struct rig *r, uint32_t trainers) {
    rig_start(r);
    for (uint32_t i = 1; i <= trainers + 1; i++) join(r, &r->fake[i]);
}

/* Trainers 2 and 3 were ready, and a plan is out. */
static inline void start_reducing(struct rig *r, uint32_t trainers) {
    start_with(r, trainers);
    for (uint32_t i = 2; i <= trainers + 1; i++) be_ready(r, &r->fake[i], 8);
    assert_string_equal(look(r).phase, "reduce");
}

static inline struct fake *holder(struct rig *r) { return fake_by_id(r, r->fake[2].shard.holder); }

static inline void commit_once(struct rig *r) {
    report(r, &r->fake[1]);
    report(r, holder(r));
    assert_int_equal(r->fake[1].state, look(r).head_index);
}

/* Everybody with a part in the fragment's plan reports. */
static inline void commit_in(struct rig *r, uint32_t fragment) {
    uint64_t commits = look(r).commits;
    for (uint32_t i = 1; i <= MEMBERS && look(r).commits == commits; i++)
        if (r->fake[i].of[fragment].has_plan) report_all(r, &r->fake[i], fragment);
    assert_int_equal(look(r).commits, commits + 1);
}

static inline struct core_fragment_view fragment(const struct rig *r, uint32_t f) {
    struct core_fragment_view v;
    core_fragment_look(r->core, f, &v);
    return v;
}

static inline struct core_member_view member(const struct rig *r, const struct fake *f) {
    struct core_member_view v;
    core_member_look(r->core, f->id - 1, r->now, &v);
    return v;
}

/* Index of the first action of a type (and message), or the number of actions. */
static inline uint32_t place(const struct rig *r, enum core_action_type type, int message) {
    uint32_t i = 0;
    while (i < r->out.count &&
           (r->out.list[i].type != type || (message >= 0 && r->out.list[i].message != message)))
        i++;
    return i;
}
/* Scalars of the newest commit in the ledger; its lists are gone. */
static inline struct msg_commit last_commit(const struct rig *r) {
    struct msg_commit last = {0};
    uint64_t newest = 0;
    for (uint32_t i = 0; i < r->row_count; i++) {
        struct msg_entry e = {0};
        if (r->rows[i].table != CORE_LEDGER || r->rows[i].key < newest) continue;
        assert_int_equal(proto_decode(r->rows[i].value, r->rows[i].length, RECORD_entry, &e, NULL),
                         0);
        if (e.kind == LEDGER_COMMIT) {
            struct msg_commit k = {0};
            assert_int_equal(proto_decode(e.body.data, e.body.length, RECORD_commit, &k, NULL), 0);
            newest = r->rows[i].key;
            last = k;
            proto_decoded_release(RECORD_commit, &k);
        }
        proto_decoded_release(RECORD_entry, &e);
    }
    return last;
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

#endif
