/* sync_rig.h - what the tests of sync play a run with: a disk in memory that can lose what was not
 * flushed, a trainer that counts, links without delay, and a coordinator that only writes entries
 * and hands over what a test tells it to. Plans and whole rounds on it: sync_rounds.h. Included once by each. */
#ifndef INTELLECT_TESTS_SYNC_RIG_H
#define INTELLECT_TESTS_SYNC_RIG_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"
#include "node/sync.h"
#include "proto/model.h"

#ifndef ELEMENTS /* 472, and 16 for each entry of the vocabulary */
#define ELEMENTS  1000
#endif
#ifndef CHUNK
#define CHUNK     256
#endif
#define CHUNKS    ((ELEMENTS + CHUNK - 1) / CHUNK)
#define BATCH     4
#define STEPS     3 /* inner steps of a round */
#define SEQUENCE  8
#define MEMBERS   5
#define FRAGMENTS 4 /* at most; chunk c is in fragment c mod P */
#define FILES_MAX 32
#define SENT_MAX  4096

static inline void *xcalloc(size_t n, size_t size) {
    void *p = calloc(n ? n : 1, size);
    assert_non_null(p);
    return p;
}

/* ---- the disk --------------------------------------------------------------------------- */

struct file {
    char name[64];
    bool mapped;
    uint8_t *live, *durable; /* one and the same for a blob */
    size_t bytes;
};

struct memory_disk {
    struct file file[FILES_MAX];
    uint32_t ops;     /* flush, put, remove so far */
    uint32_t fail_at; /* this one and all later ones fail; 0 = none */
};

static inline struct file *file_find(struct memory_disk *d, const char *name) {
    for (int i = 0; i < FILES_MAX; i++)
        if (!strcmp(d->file[i].name, name)) return &d->file[i];
    return NULL;
}

static inline struct file *file_make(struct memory_disk *d, const char *name) {
    struct file *f = file_find(d, "");
    if (!f) fail_msg("more than %d files", FILES_MAX);
    if (f) snprintf(f->name, sizeof f->name, "%s", name);
    return f;
}

static inline void file_free(struct file *f) {
    if (f->durable != f->live) free(f->durable);
    free(f->live);
    memset(f, 0, sizeof *f);
}

static inline bool disk_is_dead(struct memory_disk *d) { return ++d->ops >= d->fail_at && d->fail_at; }

static inline void *rig_map(void *arg, const char *name, size_t bytes, bool *created, struct err *err) {
    struct memory_disk *d = arg;
    struct file *f = file_find(d, name);
    (void)err;
    *created = !f;
    if (f) {
        assert_int_equal(f->bytes, bytes);
        return f->live;
    }
    f = file_make(d, name);
    f->mapped = true;
    f->bytes = bytes;
    f->live = xcalloc(bytes, 1);
    f->durable = xcalloc(bytes, 1);
    return f->live;
}

static inline int rig_flush(void *arg, const char *name, size_t offset, size_t bytes, struct err *err) {
    struct memory_disk *d = arg;
    struct file *f = file_find(d, name);
    assert_true(f && f->mapped && offset <= f->bytes && bytes <= f->bytes - offset);
    if (disk_is_dead(d)) return err_set(err, ERR_IO, "the disk of this test is gone");
    memcpy(f->durable + offset, f->live + offset, bytes);
    return 0;
}

static inline int rig_put(void *arg, const char *name, const void *bytes, size_t length, struct err *err) {
    struct memory_disk *d = arg;
    if (disk_is_dead(d)) return err_set(err, ERR_IO, "the disk of this test is gone");
    struct file *f = file_find(d, name);
    if (f) file_free(f);
    f = file_make(d, name);
    f->bytes = length;
    f->live = f->durable = xcalloc(length, 1);
    memcpy(f->live, bytes, length);
    return 0;
}

static inline int rig_get(void *arg, const char *name, uint8_t **out, size_t *length, struct err *err) {
    struct file *f = file_find(arg, name);
    if (!f) return err_set(err, ERR_NOT_FOUND, "%s", name);
    *out = xcalloc(f->bytes, 1);
    memcpy(*out, f->live, f->bytes);
    *length = f->bytes;
    return 0;
}

static inline void rig_remove(void *arg, const char *name) {
    struct memory_disk *d = arg;
    struct file *f = file_find(d, name);
    if (!disk_is_dead(d) && f) file_free(f);
}

/* The machine loses power: mapped arrays are as last flushed, except that every `torn`-th 64 bytes
 * of what was not had got there by itself (0: none). */
static inline void disk_crash(struct memory_disk *d, uint32_t torn) {
    d->fail_at = 0;
    for (int i = 0; i < FILES_MAX; i++) {
        struct file *f = &d->file[i];
        for (size_t at = 0; f->mapped && at < f->bytes; at += 64) {
            size_t n = f->bytes - at < 64 ? f->bytes - at : 64;
            if (torn && at / 64 % torn == 0) memcpy(f->durable + at, f->live + at, n);
            else memcpy(f->live + at, f->durable + at, n);
        }
    }
}

static inline void disk_wipe(struct memory_disk *d) {
    for (int i = 0; i < FILES_MAX; i++) file_free(&d->file[i]);
    memset(d, 0, sizeof *d);
}

/* ---- the run ---------------------------------------------------------------------------- */

struct sent {
    bool peer; /* between members, else to the coordinator */
    uint32_t from, to;
    struct frame frame;
    void *msg;
};

struct range {
    uint64_t start, count;
};

struct node {
    bool exists, connected, trains;
    uint32_t id;
    struct identity key;
    struct sync *sync;
    struct memory_disk disk;
    float slot[ELEMENTS], local[ELEMENTS], written[ELEMENTS], moments[ELEMENTS];
    uint8_t ops[CHUNKS];
    /* the trainer */
    bool trainer_up, frozen, freeze_asked, freeze_waits, moments_in, hold_applied, applied_due;
    uint32_t freeze_fragment, freezes;
    struct range queue[256];
    uint32_t queued;
    uint64_t samples, steps, moments_steps, tokens;
    uint32_t resets, applies, mixes, adds, continues;
    /* what it said otherwise */
    uint32_t disconnects, closes, checkpoint_begins, keeps;
    char logged[512];
};

struct expectation {
    float anchor[ELEMENTS], momentum[ELEMENTS];
};

struct rig {
    struct msg_genesis genesis;
    struct msg_model model;
    struct msg_inner inner;
    struct msg_outer outer;
    struct msg_corpus corpus;
    struct identity root_id, online_id;
    struct digest run;
    uint64_t now, term, plan;
    struct msg_signed_entry ledger[64];
    uint32_t entries;
    struct digest head;
    uint64_t rounds, base_index;             /* of all fragments; the newest commit */
    uint64_t round_of[FRAGMENTS], base_of[FRAGMENTS];
    uint64_t spent_to[MEMBERS];              /* of the lease of the same number */
    struct node node[MEMBERS];
    bool link[MEMBERS][MEMBERS], no_route[MEMBERS];
    bool nat[MEMBERS];                            /* listens on no port; set before it starts */
    struct sent sent[SENT_MAX];                   /* everything ever sent, in order */
    uint32_t sent_count, delivered;               /* to members: those before `delivered` arrived */
    struct expectation checkpoint;                /* bytes of one, for config.load */
    bool checkpoint_here;
    uint32_t checkpoint_late;                     /* so many times it is still being read */
    bool hold_peers;                              /* what members send each other waits */
    bool (*spoil)(struct rig *r, struct sent *m); /* may change or swallow (false) it */
};

static inline void step(struct rig *r, uint32_t id, const struct sync_event *ev);

/* ---- ledger entries --------------------------------------------------------------------- */

static inline struct proto_bytes encoded(enum proto_record which, const void *record) {
    struct proto_buffer b;
    proto_buffer_init(&b, 1u << 22);
    assert_int_equal(proto_encode(&b, which, record, NULL), 0);
    return (struct proto_bytes){b.data, (uint32_t)b.length};
}

static inline void entry_add(struct rig *r, enum ledger_kind kind, struct proto_bytes body) {
    struct msg_entry e = {.index = r->entries,
                          .previous = r->head,
                          .kind = (uint8_t)kind,
                          .body = body,
                          .term = kind == LEDGER_GENESIS || kind == LEDGER_DELEGATION ? 0
                                                                                      : r->term};
    const struct identity *by = kind == LEDGER_GENESIS || kind == LEDGER_DELEGATION ? &r->root_id
                                                                                    : &r->online_id;
    struct msg_signed_entry *s = &r->ledger[r->entries++];
    s->bytes = encoded(RECORD_entry, &e);
    proto_sign(by, "ledger", &r->run, e.term, s->bytes.data, s->bytes.length, &s->signature);
    r->head = LEDGER_DIGEST(s);
    free((void *)(uintptr_t)body.data);
}

static inline void begin_ledger(struct rig *r) {
    struct proto_bytes genesis = encoded(RECORD_genesis, &r->genesis);
    r->run = digest_of(genesis.data, genesis.length);
    entry_add(r, LEDGER_GENESIS, genesis);
    struct msg_delegation d = {.run = r->run, .key = r->online_id.key, .number = 1};
    entry_add(r, LEDGER_DELEGATION, encoded(RECORD_delegation, &d));
}

/* ---- actions ---------------------------------------------------------------------------- */

static inline void *copy_of(uint8_t type, const void *msg) {
    enum proto_record which = (enum proto_record)proto_record_of_type(type);
    void *p = xcalloc(1, proto_record_size(which));
    assert_int_equal(proto_copy(which, msg, p, NULL), 0);
    return p;
}

static inline void keep(struct rig *r, bool peer, uint32_t from, const struct sync_action *a) {
    assert_true(r->sent_count < SENT_MAX);
    if (getenv("SYNC_LOG"))
        printf("%u -> %u %s plan %llu\n", from, a->peer, proto_type_name(a->message),
               (unsigned long long)a->plan);
    r->sent[r->sent_count++] = (struct sent){
        .peer = peer,
        .from = from,
        .to = a->peer,
        .msg = copy_of(a->message, a->msg),
        .frame = {.type = a->message, .term = a->term, .session = a->session, .plan = a->plan}};
}

static inline void dial(struct rig *r, uint32_t from, uint32_t to) {
    bool ok = to < MEMBERS && r->node[to].sync && !r->no_route[from] && !r->no_route[to] &&
              !r->nat[to];
    if (r->link[from][to]) return;
    if (ok) r->link[from][to] = r->link[to][from] = true;
    step(r, from,
         &(struct sync_event){.type = ok ? SYNC_EV_PEER_OPEN : SYNC_EV_PEER_CLOSED, .peer = to});
    if (ok) step(r, to, &(struct sync_event){.type = SYNC_EV_PEER_OPEN, .peer = from});
}

static inline void hang_up(struct rig *r, uint32_t a, uint32_t b) {
    if (!r->link[a][b]) return;
    r->link[a][b] = r->link[b][a] = false;
    if (r->node[a].sync) step(r, a, &(struct sync_event){.type = SYNC_EV_PEER_CLOSED, .peer = b});
    if (r->node[b].sync) step(r, b, &(struct sync_event){.type = SYNC_EV_PEER_CLOSED, .peer = a});
}

static inline void take_slot(struct rig *r, struct node *n, bool reset) {
    for (uint32_t c = 0; c < CHUNKS; c++) {
        size_t first = c * CHUNK, end = first + CHUNK < ELEMENTS ? first + CHUNK : ELEMENTS;
        enum sync_op op = reset ? SYNC_OP_MIX : (enum sync_op)n->ops[c];
        float alpha = reset ? 0 : r->outer.alpha;
        if (op == SYNC_OP_MIX) outer_mix(n->local + first, n->slot + first, end - first, alpha);
        for (size_t i = first; op == SYNC_OP_ADD && i < end; i++) n->local[i] += n->slot[i];
        n->mixes += !reset && op == SYNC_OP_MIX;
        n->adds += op == SYNC_OP_ADD;
    }
}

static inline void on_slot(struct rig *r, struct node *n, const struct sync_action *a) {
    bool reset = a->type == SYNC_ACT_TRAINER_RESET;
    take_slot(r, n, reset);
    n->resets += reset;
    n->applies += !reset;
    n->tokens = a->tokens;
    n->frozen = n->freeze_asked = false;
    if (reset) n->queued = 0;
    if (reset) n->samples = 0;
    n->applied_due = true;
}

static inline void perform(struct rig *r, struct node *n, const struct sync_action *a) {
    switch (a->type) {
    case SYNC_ACT_SEND:
        if (n->connected) keep(r, false, n->id, a);
        break;
    case SYNC_ACT_PEER_SEND: keep(r, true, n->id, a); break;
    case SYNC_ACT_PEER_DIAL: dial(r, n->id, a->peer); break;
    case SYNC_ACT_PEER_CLOSE:
        n->closes++;
        r->link[n->id][a->peer] = r->link[a->peer][n->id] = false;
        step(r, a->peer, &(struct sync_event){.type = SYNC_EV_PEER_CLOSED, .peer = n->id});
        break;
    case SYNC_ACT_DISCONNECT:
        n->disconnects++;
        n->connected = false;
        break;
    case SYNC_ACT_TRAINER_SAMPLES:
        n->queue[n->queued++] = (struct range){a->start, a->count};
        break;
    case SYNC_ACT_TRAINER_FREEZE:
        n->freeze_asked = true;
        n->freeze_waits = a->wait;
        n->freeze_fragment = a->fragment;
        n->freezes++;
        break;
    case SYNC_ACT_TRAINER_APPLY:
    case SYNC_ACT_TRAINER_RESET: on_slot(r, n, a); break;
    case SYNC_ACT_TRAINER_CONTINUE:
        n->frozen = false;
        n->continues++;
        break;
    case SYNC_ACT_TRAINER_MOMENTS_IMPORT:
        memcpy(n->moments, n->slot, sizeof n->slot);
        n->moments_steps = a->steps;
        n->moments_in = true;
        n->applied_due = true;
        break;
    case SYNC_ACT_TRAINER_MOMENTS_EXPORT:
        step(r, n->id,
             &(struct sync_event){
                 .type = SYNC_EV_TRAINER_MOMENTS, .local = n->moments, .steps = n->steps});
        break;
    case SYNC_ACT_CHECKPOINT_BEGIN: n->checkpoint_begins++; break;
    case SYNC_ACT_CHECKPOINT_KEEP: n->keeps++; break;
    case SYNC_ACT_LOG:
        if (getenv("SYNC_LOG")) printf("[%u] %s\n", n->id, a->text);
        snprintf(n->logged, sizeof n->logged, "%s", a->text);
        break;
    default: break;
    }
}

/* One event and everything that follows from it inside the member. */
static inline void step(struct rig *r, uint32_t id, const struct sync_event *ev) {
    struct node *n = &r->node[id];
    struct sync_actions out = {0};
    struct err err = {0};
    if (!n->sync) return;
    int rc = sync_step(n->sync, ev, r->now, &out, &err);
    for (uint32_t i = 0; i < out.count; i++) perform(r, n, &out.list[i]);
    sync_actions_release(&out);
    if (rc == 0) return;
    assert_int_equal(err.code, ERR_IO); /* only the disk may fail */
    sync_destroy(n->sync);
    n->sync = NULL;
}

static inline void deliver_peers(struct rig *r) {
    while (!r->hold_peers && r->delivered < r->sent_count) {
        struct sent m = r->sent[r->delivered++];
        if (!m.peer || (r->spoil && !r->spoil(r, &m))) continue;
        if (m.to >= MEMBERS || !r->link[m.from][m.to]) {
            step(r, m.from, &(struct sync_event){.type = SYNC_EV_PEER_CLOSED, .peer = m.to});
            continue;
        }
        step(r, m.to,
             &(struct sync_event){
                 .type = SYNC_EV_PEER_MESSAGE, .peer = m.from, .frame = m.frame, .msg = m.msg});
        step(r, m.from, &(struct sync_event){.type = SYNC_EV_PEER_DRAINED, .peer = m.to});
    }
}

/* Where chunk k of a fragment begins, and how long it is. */
static inline size_t chunk_at(const struct rig *r, uint32_t fragment, uint32_t k, size_t *n) {
    size_t first = (size_t)(fragment + k * r->outer.fragments) * CHUNK;
    *n = ELEMENTS - first < CHUNK ? ELEMENTS - first : CHUNK;
    return first;
}

static inline uint32_t chunks_of(const struct rig *r, uint32_t fragment) {
    return (CHUNKS - fragment + r->outer.fragments - 1) / r->outer.fragments;
}

/* Its own chunks only: those of other fragments are still being encoded. */
static inline void write_fragment(const struct rig *r, struct node *n) {
    for (uint32_t k = 0; k < chunks_of(r, n->freeze_fragment); k++) {
        size_t count, first = chunk_at(r, n->freeze_fragment, k, &count);
        memcpy(n->written + first, n->local + first, count * sizeof *n->local);
    }
}

static inline void answer_trainer(struct rig *r, struct node *n) {
    if (n->applied_due && !n->hold_applied) {
        n->applied_due = false;
        step(r, n->id, &(struct sync_event){.type = SYNC_EV_TRAINER_APPLIED});
    }
    if (n->freeze_asked && n->trainer_up) {
        n->freeze_asked = false;
        n->frozen |= n->freeze_waits;
        write_fragment(r, n);
        step(r, n->id,
             &(struct sync_event){.type = SYNC_EV_TRAINER_FROZEN,
                                  .fragment = n->freeze_fragment,
                                  .local = n->written,
                                  .samples = n->samples,
                                  .steps = n->steps});
    }
}

/* Until nobody has anything to do at this moment. */
static inline void settle(struct rig *r) {
    for (int quiet = 0, turns = 0; quiet < 2; quiet++) {
        assert_true(turns++ < 2000);
        uint32_t before = r->sent_count + r->delivered;
        deliver_peers(r);
        for (uint32_t id = 1; id < MEMBERS; id++) {
            struct node *n = &r->node[id];
            while (n->sync && sync_has_work(n->sync)) {
                step(r, id, &(struct sync_event){.type = SYNC_EV_WORK});
                quiet = 0;
            }
            if (n->sync &&
                ((n->applied_due && !n->hold_applied) || (n->freeze_asked && n->trainer_up))) {
                answer_trainer(r, n);
                quiet = 0;
            }
        }
        if (before != r->sent_count + r->delivered) quiet = 0;
    }
}

/* Time passes in ticks. */
static inline void pass(struct rig *r, uint64_t ms) {
    for (uint64_t end = r->now + ms; r->now < end;) {
        r->now += SYNC_TICK_MS;
        for (uint32_t id = 1; id < MEMBERS; id++)
            step(r, id, &(struct sync_event){.type = SYNC_EV_TICK});
        settle(r);
    }
}

/* ---- the coordinator's side ------------------------------------------------------------- */

static inline void say(struct rig *r, uint32_t id, enum proto_type type, uint64_t plan, const void *msg) {
    struct frame f = {
        .type = (uint8_t)type, .term = r->term, .session = r->term << 24 | id, .plan = plan};
    if (r->node[id].connected)
        step(r, id, &(struct sync_event){.type = SYNC_EV_MESSAGE, .frame = f, .msg = msg});
}

static inline const struct sent *last_sent(const struct rig *r, uint32_t from, enum proto_type type) {
    for (uint32_t i = r->sent_count; i-- > 0;)
        if (r->sent[i].from == from && r->sent[i].frame.type == type) return &r->sent[i];
    return NULL;
}

static inline uint32_t count_sent(const struct rig *r, uint32_t from, enum proto_type type) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < r->sent_count; i++)
        n += r->sent[i].from == from && r->sent[i].frame.type == type;
    return n;
}

static inline void say_ledger(struct rig *r, uint32_t id, uint32_t from) {
    struct msg_ledger msg = {.entries = r->ledger + from, .entries_count = r->entries - from};
    if (msg.entries_count) say(r, id, MSG_LEDGER, 0, &msg);
}

static inline void say_leases(struct rig *r, uint32_t id, struct msg_lease *list, uint32_t count) {
    say(r, id, MSG_LEASES, 0, &(struct msg_leases){.leases = list, .leases_count = count});
    settle(r);
}

/* A lease of its own for every member: samples from id * 1000 on, so that nothing overlaps. */
static inline struct msg_lease lease_of(uint32_t id, uint64_t used) {
    return (struct msg_lease){
        .lease = id, .generation = 1, .start = id * 1000 + used, .count = 400 - used};
}

static inline void dial_coordinator(struct rig *r, uint32_t id) {
    struct node *n = &r->node[id];
    n->connected = true;
    step(r, id,
         &(struct sync_event){.type = SYNC_EV_CONNECTED,
                              .frame = {.type = MSG_WELCOME, .term = r->term}});
}

/* What follows a HELLO, donors as given. */
static inline void welcome(struct rig *r, uint32_t id, const uint32_t *donors, uint32_t count) {
    const struct msg_hello *hello = last_sent(r, id, MSG_HELLO)->msg;
    struct msg_address list[MEMBERS];
    for (uint32_t i = 0; i < count; i++)
        list[i] = (struct msg_address){donors[i], proto_str("10.0.0.1"), 7000 + donors[i]};
    struct msg_hello_ack ack = {.session = r->term << 24 | id,
                                .head_index = r->entries - 1,
                                .donors = list,
                                .donors_count = count};
    say(r, id, MSG_HELLO_ACK, 0, &ack);
    say_ledger(r, id, digest_is_zero(&hello->head_digest) ? 0 : (uint32_t)hello->head_index + 1);
    settle(r);
}

/* The initial state by the seed; of a checkpoint what rig.checkpoint holds, where a test says so. */
static inline int rig_load(void *arg, const struct msg_checkpoint *from, uint64_t first,
                           size_t count, float *anchor, float *momentum, struct err *err) {
    struct rig *r = arg;
    if (from || (r && r->genesis.init_from_count)) {
        if (r->checkpoint_late && r->checkpoint_late--) return err_set(err, ERR_TIMEOUT, "is being read");
        if (!r->checkpoint_here) return err_set(err, ERR_NOT_FOUND, "no checkpoint here");
        memcpy(anchor, r->checkpoint.anchor + first, count * sizeof *anchor);
        memcpy(momentum, r->checkpoint.momentum + first, count * sizeof *momentum);
        return 0;
    }
    outer_init_normal(anchor, 42, first, count, 0.02f);
    memset(momentum, 0, count * sizeof *momentum);
    return 0;
}

static inline void node_start(struct rig *r, uint32_t id) {
    struct node *n = &r->node[id];
    struct sync_config config = {
        .genesis = &r->genesis,
        .run = r->run,
        .member = id,
        .trains = n->trains,
        .port = r->nat[id] ? 0 : 7000 + id,
        .elements = ELEMENTS,
        .disk = {&n->disk, rig_map, rig_flush, rig_put, rig_get, rig_remove}};
    struct err err = {0};
    config.load = rig_load;
    config.load_arg = r;
    identity_from_seed(&n->key, (const uint8_t[32]){(uint8_t)(10 + id)});
    config.identity = &n->key;
    config.instance = 7000 + id;
    n->sync = sync_create(&config, r->now, &err);
    if (!n->sync && n->disk.fail_at) return; /* as the test wanted it */
    if (!n->sync) fail_msg("sync_create: %s", err.msg);
    sync_set_slot(n->sync, n->slot, n->ops);
}

static inline void trainer_up(struct rig *r, uint32_t id, uint64_t steps) {
    struct node *n = &r->node[id];
    n->trainer_up = true;
    n->frozen = n->freeze_asked = n->applied_due = false;
    n->queued = 0;
    n->samples = 0;
    n->steps = steps;
    step(r, id, &(struct sync_event){.type = SYNC_EV_TRAINER_UP, .steps = steps});
    settle(r);
}

static inline void trainer_down(struct rig *r, uint32_t id) {
    r->node[id].trainer_up = false;
    r->node[id].applied_due = r->node[id].freeze_asked = false;
    step(r, id, &(struct sync_event){.type = SYNC_EV_TRAINER_DOWN});
}

/* The process dies (and with it its links and trainer) and starts again from its disk. */
static inline void node_kill(struct rig *r, uint32_t id) {
    struct node *n = &r->node[id];
    sync_destroy(n->sync);
    n->sync = NULL;
    n->connected = n->trainer_up = n->applied_due = n->freeze_asked = false;
    for (uint32_t i = 1; i < MEMBERS; i++) hang_up(r, id, i);
}

static inline void node_new(struct rig *r, uint32_t id, bool trains) {
    r->node[id].exists = true;
    r->node[id].id = id;
    r->node[id].trains = trains;
    node_start(r, id);
    dial_coordinator(r, id);
    welcome(r, id, NULL, 0);
}

static inline void node_with_work(struct rig *r, uint32_t id) {
    node_new(r, id, true);
    say_leases(r, id, &(struct msg_lease){lease_of(id, 0).lease, 1, lease_of(id, 0).start, 400}, 1);
    trainer_up(r, id, 1);
}

/* One inner step: takes a batch off the queue and moves the parameters by something of its own. */
static inline void train(struct rig *r, uint32_t id) {
    struct node *n = &r->node[id];
    uint64_t left = BATCH;
    assert_false(n->frozen);
    for (uint32_t i = 0; i < n->queued && left; i++) {
        uint64_t take = n->queue[i].count < left ? n->queue[i].count : left;
        n->queue[i].start += take;
        n->queue[i].count -= take;
        left -= take;
    }
    n->samples += BATCH - left;
    n->steps++;
    for (uint32_t i = 0; i < ELEMENTS; i++)
        n->local[i] += 0.01f * (float)((i * 7 + id * 13 + n->steps * 3) % 29) / 29.0f - 0.004f;
    step(r, id,
         &(struct sync_event){.type = SYNC_EV_TRAINER_STEP,
                              .samples = n->samples,
                              .steps = n->steps,
                              .loss = 2.5,
                              .tokens_per_s = 100});
    settle(r);
}

static inline void train_round(struct rig *r, uint32_t id) {
    for (int i = 0; i < STEPS; i++) train(r, id);
    assert_true(r->node[id].frozen);
}

/* The newest READY of one fragment; NULL: none. */
static inline const struct sent *ready_sent(const struct rig *r, uint32_t id, uint32_t fragment) {
    for (uint32_t i = r->sent_count; i-- > 0;) {
        const struct sent *s = &r->sent[i];
        if (s->from == id && s->frame.type == MSG_READY &&
            ((const struct msg_ready *)s->msg)->fragment == fragment)
            return s;
    }
    return NULL;
}

static inline const struct msg_ready *ready_in(const struct rig *r, uint32_t id,
                                               uint32_t fragment) {
    const struct sent *s = ready_sent(r, id, fragment);
    assert_non_null(s);
    return s->msg;
}

static inline const struct msg_ready *ready_of(const struct rig *r, uint32_t id) {
    const struct sent *s = last_sent(r, id, MSG_READY);
    assert_non_null(s);
    return s->msg;
}

/* ---- set-up ----------------------------------------------------------------------------- */

static inline int rig_setup(void **state) {
    struct rig *r = xcalloc(1, sizeof *r);
    assert_int_equal(proto_init(NULL), 0);
    identity_from_seed(&r->root_id, (const uint8_t[32]){1});
    identity_from_seed(&r->online_id, (const uint8_t[32]){2});
    r->model = (struct msg_model){.layers = 1,
                                  .width = 8,
                                  .heads = 1,
                                  .kv_heads = 1,
                                  .ffn = 8,
                                  .vocabulary = (ELEMENTS - 472) / 16,
                                  .sequence = SEQUENCE,
                                  .rope_theta = 1e4,
                                  .norm_eps = 1e-5};
    r->inner = (struct msg_inner){
        .batch = BATCH, .lr = 1e-3, .beta1 = .9, .beta2 = .95, .eps = 1e-8};
    r->outer = (struct msg_outer){.inner_steps = STEPS,
                                  .round_ms = 60000,
                                  .quorum = 1,
                                  .grace_ms = 500,
                                  .lr = 0.7f,
                                  .momentum = 0.9f,
                                  .contribution_codec = OUTER_INT8,
                                  .result_codec = OUTER_INT8,
                                  .chunk_elements = CHUNK,
                                  .fragments = 1,
                                  .ramp_rounds = 1,
                                  .heartbeat_ms = 200,
                                  .silence_ms_max = 1000,
                                  .lease_samples = 200};
    r->corpus = (struct msg_corpus){
        .manifest_url = proto_str("file:///c"), .tokenizer = proto_str("bytes"), .samples = 10000};
    r->genesis = (struct msg_genesis){.version = 1,
                                      .name = proto_str("t"),
                                      .root_key = r->root_id.key,
                                      .model = &r->model,
                                      .model_count = 1,
                                      .inner = &r->inner,
                                      .inner_count = 1,
                                      .outer = &r->outer,
                                      .outer_count = 1,
                                      .corpus = &r->corpus,
                                      .corpus_count = 1};
    assert_int_equal(proto_model_elements(&r->model), ELEMENTS);
    r->term = 1;
    r->now = 100000;
    for (uint32_t id = 0; id < MEMBERS; id++) r->spent_to[id] = id * 1000;
    begin_ledger(r);
    *state = r;
    return 0;
}

static inline void forget_sent(struct rig *r) {
    for (uint32_t i = 0; i < r->sent_count; i++) {
        proto_copy_release((enum proto_record)proto_record_of_type(r->sent[i].frame.type),
                           r->sent[i].msg);
        free(r->sent[i].msg);
    }
    r->sent_count = r->delivered = 0;
}

static inline int rig_teardown(void **state) {
    struct rig *r = *state;
    for (uint32_t id = 1; id < MEMBERS; id++) {
        sync_destroy(r->node[id].sync);
        disk_wipe(&r->node[id].disk);
    }
    forget_sent(r);
    for (uint32_t i = 0; i < r->entries; i++) free((void *)(uintptr_t)r->ledger[i].bytes.data);
    free(r);
    return 0;
}

#endif
