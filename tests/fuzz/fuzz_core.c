/* fuzz_core.c - what members and strangers can say to the coordinator's core, in any order, with
 * crashes of the coordinator in between. No message may make it fail an assert, keep rows it cannot
 * load again, send what cannot be encoded, or write a ledger that does not pass the audit.
 *
 * Input: a byte for the settings, then steps; see step(). */
#include <stdio.h>
#include <stdlib.h>

#include "coordinator/audit.h"
#include "coordinator/core.h"
#include "proto/model.h"
#include "tests/fuzz/form.h"

#define MEMBERS 4   /* enrolled at first; member 1 is the coordinator's own node */
#define CONNS 7     /* 1 to MEMBERS by their keys, a second one of member 2, two strangers */
#define STEPS_MAX 300
#define ROWS_MAX 4096
#define SEQUENCE 8
#define CHUNKS 4
#define ACTIONS_MAX 100000

#define ID_OF_MESSAGE(NAME, record, number) number,
static const uint8_t types[] = {PROTO_MESSAGES(ID_OF_MESSAGE)};

struct row {
    enum core_table table;
    uint64_t key;
    uint8_t *value;
    uint32_t length;
};

struct peer {
    struct identity id;
    uint64_t conn, session; /* conn 0: not connected */
};

struct world {
    struct msg_genesis genesis;
    struct msg_model model;
    struct msg_inner inner;
    struct msg_outer outer;
    struct msg_corpus corpus;
    struct digest run;
    struct identity root, online;
    struct core *core;
    struct core_actions out;
    struct core_invite invite;
    struct row rows[ROWS_MAX];
    uint32_t row_count;
    struct audit audit;
    struct peer peer[CONNS];
    struct form_memory memory;
    uint64_t now, term, last_conn, plan;
    bool restart, failed;
};

static void init(void) {
    struct err err;
    int failed = proto_init(&err);
    assert(!failed);
}

/* ---- the store ---------------------------------------------------------------------------------- */

/* The shell signs an entry; the audit, which shares no code with the core, must pass it. */
static void audit_entry(struct world *w, const struct core_write *r, const struct identity *signer) {
    struct msg_signed_entry e = {.bytes = {r->value, r->value_length}, .signature = r->signature};
    struct msg_entry decoded;
    struct err err = {0};
    int failed = proto_decode(r->value, r->value_length, RECORD_entry, &decoded, &err);
    assert(!failed && decoded.index == r->key);
    if (!r->is_signed)
        proto_sign(signer, "ledger", &w->run, decoded.term, r->value, r->value_length, &e.signature);
    failed = audit_take(&w->audit, &e, &err);
    if (failed) fprintf(stderr, "audit: %s\n", err.msg);
    assert(!failed);
    struct msg_ledger ledger = {.entries = &e, .entries_count = 1};
    form_learn(&w->memory, RECORD_ledger, &ledger);
}

static void put_row(struct world *w, const struct core_write *r) {
    uint32_t i = 0;
    while (i < w->row_count && (w->rows[i].table != r->table || w->rows[i].key != r->key)) i++;
    assert(r->table < CORE_TABLES && i < ROWS_MAX);
    assert(r->table != CORE_LEDGER || (i == w->row_count && r->value)); /* entries stay */
    if (i < w->row_count) free(w->rows[i].value);
    if (!r->value) {
        if (i < w->row_count) w->rows[i] = w->rows[--w->row_count];
        return;
    }
    if (i == w->row_count) w->row_count++;
    w->rows[i] = (struct row){r->table, r->key, malloc(r->value_length), r->value_length};
    memcpy(w->rows[i].value, r->value, r->value_length);
}

static void persist(struct world *w, const struct core_write *r, const struct identity *signer) {
    if (r->table == CORE_LEDGER) audit_entry(w, r, signer);
    put_row(w, r);
}

static int by_key(const void *a, const void *b) {
    const struct row *x = a, *y = b;
    if (x->table != y->table) return x->table < y->table ? -1 : 1;
    return (x->key > y->key) - (x->key < y->key);
}

/* ---- carrying out ------------------------------------------------------------------------------- */

static struct peer *peer_of(struct world *w, uint64_t conn) {
    for (int i = 0; i < CONNS; i++)
        if (conn && w->peer[i].conn == conn) return &w->peer[i];
    return NULL;
}

static void hear(struct world *w, const struct core_action *a) {
    struct peer *p = peer_of(w, a->conn);
    enum proto_record which = (enum proto_record)proto_record_of_type(a->message);
    struct proto_buffer b = record_encoded(which, a->msg); /* asserts that it can be */
    proto_buffer_release(&b);
    form_learn(&w->memory, which, a->msg);
    if (p && a->message == MSG_HELLO_ACK) p->session = ((const struct msg_hello_ack *)a->msg)->session;
    if (a->plan) w->plan = a->plan;
}

static void carry_out(struct world *w, const struct core_action *a) {
    struct peer *p = peer_of(w, a->conn);
    switch (a->type) {
    case CORE_ACT_PERSIST:
        for (uint32_t i = 0; i < a->write_count; i++) persist(w, &a->writes[i], &w->online);
        break;
    case CORE_ACT_SEND: hear(w, a); break;
    case CORE_ACT_CLOSE:
        if (p) p->conn = 0;
        break;
    case CORE_ACT_RESTART:
        w->restart = true;
        if (a->term > w->term) w->term = a->term;
        break;
    case CORE_ACT_FAIL: w->failed = true; break;
    default: break;
    }
}

static void core_event(struct world *w, const struct core_event *ev) {
    core_actions_clear(&w->out);
    core_step(w->core, ev, w->now, &w->out);
    assert(w->out.count < ACTIONS_MAX);
    for (uint32_t i = 0; i < w->out.count; i++) {
        if (getenv("FUZZ_LOG") && w->out.list[i].type == CORE_ACT_LOG)
            fprintf(stderr, "%8llu %s\n", (unsigned long long)w->now, w->out.list[i].text);
        carry_out(w, &w->out.list[i]);
    }
}

/* The coordinator dies and comes back: what it wrote must be what it can read. */
static void start(struct world *w) {
    struct err err = {0};
    core_destroy(w->core);
    w->restart = false;
    for (int i = 0; i < CONNS; i++) w->peer[i].conn = 0;
    qsort(w->rows, w->row_count, sizeof *w->rows, by_key);
    w->core = core_create(&w->genesis, &w->run, &w->peer[0].id.key, &err);
    for (uint32_t i = 0; w->core && i < w->row_count; i++) {
        const struct row *r = &w->rows[i];
        if (r->table == CORE_INVITE) continue;
        if (core_load(w->core, r->table, r->key, r->value, r->length, &err)) fprintf(stderr, "%s\n", err.msg);
    }
    assert(w->core && !err.code);
    struct core_event ev = {.type = CORE_EV_START, .term = ++w->term, .seed = digest_of("seed", 4)};
    core_event(w, &ev);
}

/* ---- the run ------------------------------------------------------------------------------------ */

static void set_up_genesis(struct world *w, uint8_t variant) {
    w->model = (struct msg_model){.layers = 1, .width = 4, .heads = 1, .kv_heads = 1, .ffn = 4, .vocabulary = 16,
                                  .sequence = SEQUENCE, .rope_theta = 1e4, .norm_eps = 1e-5, .tied = 1};
    w->inner = (struct msg_inner){.batch = 4, .lr = 1e-3, .total_tokens = 1u << 20};
    w->outer = (struct msg_outer){
        .inner_steps = 2, .round_ms = 60000, .quorum = 1 + variant % 2, .grace_ms = 1000, .lr = 0.5f,
        .momentum = 0.9f, .contribution_codec = 1, .result_codec = 1,
        .chunk_elements = (uint32_t)(proto_model_elements(&w->model) + CHUNKS - 1) / CHUNKS,
        .fragments = variant & 2 ? 2 : 1, .overlap = variant & 4 ? 1 : 0, .shard_chunks = 1,
        .audits = variant & 8 ? 1 : 0, .fixed_membership = variant & 16 ? 1 : 0, .clip_factor = 3,
        .ramp_rounds = 1, .heartbeat_ms = 200, .silence_ms_max = 2000, .lease_samples = 16,
        .checkpoint_rounds = 2};
    w->corpus = (struct msg_corpus){.samples = 500, .tokenizer = proto_str("bytes")};
    w->genesis = (struct msg_genesis){
        .version = PROTO_VERSION, .name = proto_str("fuzz"), .root_key = w->root.key,
        .model = &w->model, .model_count = 1, .inner = &w->inner, .inner_count = 1,
        .outer = &w->outer, .outer_count = 1, .corpus = &w->corpus, .corpus_count = 1,
        .init_std = 0.02f, .checkpoint_url = proto_str("file:///checkpoints")};
    struct proto_buffer b = record_encoded(RECORD_genesis, &w->genesis);
    w->run = digest_of(b.data, b.length);
    proto_buffer_release(&b);
    audit_init(&w->audit, &w->run);
}

static void append(struct world *w, enum ledger_kind kind, enum proto_record which, const void *body,
                   const struct identity *signer) {
    uint64_t index = w->audit.chain.next_index;
    struct core_write r = {.table = CORE_LEDGER, .key = index};
    struct proto_buffer b;
    proto_buffer_init(&b, PROTO_BLOB_BYTES_MAX);
    int failed = core_entry_encode(&b, index, &w->audit.chain.head, 0, kind, which, body, NULL);
    assert(!failed);
    r.value = b.data;
    r.value_length = (uint32_t)b.length;
    persist(w, &r, signer);
    proto_buffer_release(&b);
}

static struct world *world_create(uint8_t variant) {
    struct world *w = calloc(1, sizeof *w);
    assert(w);
    for (uint8_t i = 0; i < CONNS + 2; i++) {
        uint8_t seed[32] = {i < MEMBERS || i > MEMBERS ? i : 1};
        identity_from_seed(i < CONNS ? &w->peer[i].id : i == CONNS ? &w->root : &w->online, seed);
    }
    set_up_genesis(w, variant);
    struct msg_delegation d = {.run = w->run, .key = w->online.key, .number = 1};
    append(w, LEDGER_GENESIS, RECORD_genesis, &w->genesis, &w->root);
    append(w, LEDGER_DELEGATION, RECORD_delegation, &d, &w->root);
    for (uint32_t i = 1; i <= MEMBERS; i++) {
        struct msg_enrolment e = {.member = i, .key = w->peer[i - 1].id.key, .name = proto_str("m"),
                                  .aggregate_only = i == 1, .invite = 7};
        append(w, LEDGER_ENROLMENT, RECORD_enrolment, &e, &w->online);
    }
    w->invite = (struct core_invite){.found = true, .id = 7, .record = {.uses_left = 100}};
    w->now = 1000;
    start(w);
    return w;
}

static void world_destroy(struct world *w) {
    core_destroy(w->core);
    core_actions_release(&w->out);
    audit_release(&w->audit);
    form_memory_release(&w->memory);
    for (uint32_t i = 0; i < w->row_count; i++) free(w->rows[i].value);
    free(w);
}

/* ---- what may happen ---------------------------------------------------------------------------- */

static void dial(struct world *w, struct peer *p) {
    struct core_event ev = {.type = CORE_EV_OPENED, .conn = ++w->last_conn, .key = p->id.key, .host = "10.0.0.1"};
    p->conn = w->last_conn;
    p->session = 0;
    core_event(w, &ev);
}

static void hang_up(struct world *w, struct peer *p) {
    struct core_event ev = {.type = CORE_EV_CLOSED, .conn = p->conn};
    p->conn = 0;
    core_event(w, &ev);
}

enum { WRONG_SESSION = 1, WRONG_TERM = 2, OLDER_PLAN = 4, NO_INVITE = 8, EXPIRED = 16 };

static void sign(const struct world *w, const struct peer *p, enum proto_record which, void *msg) {
    struct proto_sig *sig = which == RECORD_ready          ? &((struct msg_ready *)msg)->signature
                            : which == RECORD_shard_report ? &((struct msg_shard_report *)msg)->signature
                                                           : NULL;
    const char *purpose = which == RECORD_ready ? "ready" : "shard_report";
    if (!sig) return;
    int failed = proto_record_sign(&p->id, purpose, &w->run, w->term, which, msg, sig, NULL);
    assert(!failed);
}

/* A message that a channel would hand over: it went through encoder and decoder. */
static void say(struct world *w, struct peer *p, uint8_t type, uint8_t flags, struct fuzz_input *in) {
    enum proto_record which = (enum proto_record)proto_record_of_type(type);
    bool opening = type == MSG_HELLO || type == MSG_ENROL;
    union any_record filled, msg;
    struct err err;
    if (form_fill(&w->memory, in, which, &filled)) sign(w, p, which, &filled);
    struct proto_buffer b = record_encoded(which, &filled);
    int failed = proto_decode(b.data, b.length, which, &msg, &err);
    assert(!failed);
    struct core_invite invite = w->invite;
    invite.found = !(flags & NO_INVITE);
    invite.expired = flags & EXPIRED;
    struct core_event ev = {
        .type = CORE_EV_MESSAGE, .conn = p->conn, .msg = &msg, .invite = type == MSG_ENROL ? &invite : NULL,
        .frame = {.type = type, .length = (uint32_t)b.length, .term = w->term - !!(flags & WRONG_TERM),
                  .session = (opening ? 0 : p->session) - !!(flags & WRONG_SESSION),
                  .plan = w->plan - !!(flags & OLDER_PLAN)}};
    core_event(w, &ev);
    proto_decoded_release(which, &msg);
    proto_decoded_release(which, &filled);
    proto_buffer_release(&b);
}

static void operate(struct world *w, uint8_t what) {
    static const enum core_event_type of[] = {CORE_EV_PAUSE, CORE_EV_RESUME, CORE_EV_REVOKE, CORE_EV_RELEASE};
    struct core_event ev = {.type = of[what % 4], .member = what / 4, .text = "why"};
    core_event(w, &ev);
}

/* What a step is, in its first byte; the low bits say, the high ones who. */
enum { STEP_SAY, STEP_SAY_TOO, STEP_SAY_FLAGGED, STEP_TICK, STEP_DIAL, STEP_HANG_UP, STEP_OPERATE, STEP_CRASH };
#define STEP(what, who) (uint8_t)((what) | (who) << 3)

static void tick(struct world *w, uint32_t ms) {
    struct core_event ev = {.type = CORE_EV_TICK};
    w->now += ms;
    core_event(w, &ev);
}

static void step(struct world *w, struct fuzz_input *in) {
    uint8_t first = fuzz_u8(in);
    struct peer *p = &w->peer[(first >> 3) % CONNS];
    uint8_t what = first & 7, flags = what == STEP_SAY_FLAGGED ? fuzz_u8(in) : 0;
    switch (what) {
    case STEP_SAY:
    case STEP_SAY_TOO:
    case STEP_SAY_FLAGGED:
        if (!p->conn) dial(w, p);
        if (p->conn) say(w, p, types[fuzz_u8(in) % sizeof types], flags, in);
        break;
    case STEP_TICK: tick(w, 1u << (first >> 3) % 14); break;
    case STEP_DIAL: dial(w, p); break;
    case STEP_HANG_UP:
        if (p->conn) hang_up(w, p);
        break;
    case STEP_OPERATE: operate(w, fuzz_u8(in)); break;
    case STEP_CRASH: start(w); break;
    }
    if (w->restart) start(w);
}

static uint64_t commits(const struct world *w) {
    struct core_view v;
    core_look(w->core, w->now, &v);
    for (uint32_t i = 0; i < core_member_count(w->core); i++) {
        struct core_member_view m;
        core_member_look(w->core, i, w->now, &m);
    }
    return v.commits;
}

/* An input is valid when it makes the run commit a round. */
static bool take(const uint8_t *bytes, size_t length) {
    struct fuzz_input in = {bytes, length};
    struct world *w = world_create(fuzz_u8(&in));
    for (int n = 0; n < STEPS_MAX && in.left && !w->failed; n++) step(w, &in);
    bool committed = commits(w) > 0;
    world_destroy(w);
    return committed;
}

/* ---- samples: honest members, written down as they act ------------------------------------------- */

struct play {
    struct world *w;
    struct proto_buffer script;
};

static void play_bytes(struct play *p, const uint8_t *bytes, size_t length) {
    proto_buffer_append(&p->script, bytes, length);
    struct fuzz_input in = {bytes, length};
    step(p->w, &in);
}

static void play_say(struct play *p, int who, uint8_t type, const void *msg) {
    struct proto_buffer b;
    uint8_t head[2] = {STEP(STEP_SAY, who), 0};
    while (types[head[1]] != type) head[1]++;
    proto_buffer_init(&b, 1u << 16);
    proto_buffer_append(&b, head, 2);
    form_write(&b, (enum proto_record)proto_record_of_type(type), msg);
    play_bytes(p, b.data, b.length);
    proto_buffer_release(&b);
}

static void play_tick(struct play *p, uint8_t log2_ms) {
    uint8_t step = STEP(STEP_TICK, log2_ms);
    play_bytes(p, &step, 1);
}

static struct digest root_at(uint64_t index) { return digest_of(&index, sizeof index); }

static void play_hello(struct play *p, int who) {
    struct msg_hello m = {.software = proto_str("fuzz"), .instance = (uint64_t)who + 1, .trains = who > 0,
                          .port = 7000u + (uint32_t)who, .has_state = 1, .state_root = root_at(0)};
    play_say(p, who, MSG_HELLO, &m);
}

static void play_ready(struct play *p, int who, uint32_t fragment) {
    struct core_fragment_view v;
    struct msg_lease_ask ask = {.samples = 8};
    play_say(p, who, MSG_LEASE_ASK, &ask);
    core_fragment_look(p->w->core, fragment, &v);
    struct msg_ready m = {.fragment = fragment, .round = v.round, .base_index = v.base_index,
                          .state_index = v.base_index, .state_root = root_at(v.base_index), .codec = 1,
                          .chunks = CHUNKS / p->w->outer.fragments, .norm = 1, .absmax = 0.5, .loss = 3,
                          .root = root_at(100 + (uint64_t)who),
                          .ranges = (struct msg_lease *)(void *)p->w->memory.list[RECORD_lease].items,
                          .ranges_count = p->w->memory.list[RECORD_lease].count};
    for (uint32_t i = 0; i < m.ranges_count; i++) m.samples += m.ranges[i].count;
    play_say(p, who, MSG_READY, &m);
}

/* One holder's report of shard i of the plan that was sent last. */
static void play_report(struct play *p, uint32_t member, uint32_t i, const struct msg_shard *shard,
                        uint32_t fragment, uint64_t round) {
    const struct msg_contributor *c = (void *)p->w->memory.list[RECORD_contributor].items;
    struct msg_digest_item results[CHUNKS] = {0};
    uint8_t set[PROTO_SET_BYTES_MAX] = {0};
    uint32_t contributors = p->w->memory.list[RECORD_contributor].count;
    struct msg_summed summed = {.chunks = shard->count, .set = {set, (contributors + 7) / 8}};
    for (uint32_t k = 0; k < contributors; k++) {
        proto_set_add(set, k);
        summed.weight += c[k].weight;
    }
    struct msg_shard_report m = {.fragment = fragment, .round = round, .plan = p->w->plan, .shard = i,
                                 .results = results, .results_count = shard->count,
                                 .summed = &summed, .summed_count = 1};
    play_say(p, (int)member - 1, MSG_SHARD_REPORT, &m);
}

static void play_round(struct play *p, uint32_t fragment) {
    struct core_fragment_view v;
    struct msg_shard shards[CHUNKS];
    struct core_view now;
    play_ready(p, 1, fragment);
    play_ready(p, 2, fragment);
    play_tick(p, 10);
    play_tick(p, 9);
    core_fragment_look(p->w->core, fragment, &v);
    uint32_t count = p->w->memory.list[RECORD_shard].count;
    if (count > CHUNKS) count = CHUNKS;
    memcpy(shards, p->w->memory.list[RECORD_shard].items, count * sizeof *shards);
    for (uint32_t i = 0; i < count; i++) {
        play_report(p, shards[i].aggregator, i, &shards[i], fragment, v.round);
        play_report(p, shards[i].holder, i, &shards[i], fragment, v.round);
    }
    core_look(p->w->core, p->w->now, &now);
    struct msg_root root = {.index = now.head_index, .root = root_at(now.head_index)};
    for (int who = 0; who < 3; who++) play_say(p, who, MSG_ROOT, &root);
}

static void sample(const struct fuzz_sink *out, uint8_t variant) {
    struct play p = {.w = world_create(variant)};
    char name[] = "rounds-0";
    name[7] = (char)('a' + variant);
    proto_buffer_init(&p.script, 1u << 20);
    proto_buffer_append(&p.script, &variant, 1);
    for (int who = 0; who < 3; who++) play_hello(&p, who);
    for (uint32_t round = 0; round < 3; round++) play_round(&p, round % p.w->outer.fragments);
    out->sample(out->arg, name, p.script.data, p.script.length);
    proto_buffer_release(&p.script);
    world_destroy(p.w);
}

static void samples(const struct fuzz_sink *out) {
    static const uint8_t variants[] = {0, 1, 2, 6, 16};
    for (size_t i = 0; i < sizeof variants; i++) sample(out, variants[i]);
}

const struct fuzz_target fuzz_core = {"core", init, take, samples};
