/* swarm.c - whole outer steps between the state machines of several members, all in one thread: no
 * sockets, no TLS, no disk. What is left is what sync itself costs, so the seconds are those of all members
 * together. Beside each part stands its floor: the digests, decodings and sums that the same bytes take. */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "kernels/kernels.h"
#include "node/sync.h"
#include "proto/model.h"
#include "tests/bench/bench.h"

#define MEMBERS_MAX 4
#define FILES_MAX 64
#define ROUNDS 3 /* measured ones; the first is not */
#define GRID 38
#define LEASE 100000u
#define SPARES_MAX 256
#define BULK_BYTES (CHUNK * 2)
#define LAYERS 1 /* of 12.9 M parameters: with the embedding 52 MB of fp32; rates do not depend on it */

/* ---- a disk that is all page cache ----------------------------------------------------------- */

struct bench_file {
    char name[64];
    uint8_t *bytes;
    size_t length;
    bool mapped;
};

struct bench_disk {
    struct bench_file file[FILES_MAX];
};

static struct bench_file *find(struct bench_disk *d, const char *name) {
    for (int i = 0; i < FILES_MAX; i++)
        if (!strcmp(d->file[i].name, name)) return &d->file[i];
    return NULL;
}

static void drop(struct bench_file *f) {
    if (f->mapped) munmap(f->bytes, f->length);
    else free(f->bytes);
    *f = (struct bench_file){0};
}

static void *disk_map(void *arg, const char *name, size_t bytes, bool *created, struct err *err) {
    struct bench_file *f = find(arg, name);
    *created = !f;
    if (f) return f->bytes;
    if (!(f = find(arg, ""))) {
        err_set(err, ERR_FULL, "too many files for a benchmark");
        return NULL;
    }
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
        err_set_errno(err, "%zu bytes", bytes);
        return NULL;
    }
    *f = (struct bench_file){.bytes = p, .length = bytes, .mapped = true};
    snprintf(f->name, sizeof f->name, "%s", name);
    return p;
}

static int disk_flush(void *arg, const char *name, size_t offset, size_t bytes, struct err *err) {
    (void)arg, (void)name, (void)offset, (void)bytes, (void)err;
    return 0;
}

static int disk_put(void *arg, const char *name, const void *bytes, size_t length,
                    struct err *err) {
    struct bench_file *old = find(arg, name), *f = old ? old : find(arg, "");
    if (!f) return err_set(err, ERR_FULL, "too many files for a benchmark");
    uint8_t *copy = malloc(length ? length : 1);
    if (!copy) return err_set(err, ERR_MEMORY, "%zu bytes", length);
    memcpy(copy, bytes, length);
    if (old) drop(old);
    *f = (struct bench_file){.bytes = copy, .length = length};
    snprintf(f->name, sizeof f->name, "%s", name);
    return 0;
}

static int disk_get(void *arg, const char *name, uint8_t **out, size_t *length, struct err *err) {
    struct bench_file *f = find(arg, name);
    if (!f) return err_set(err, ERR_NOT_FOUND, "%s", name);
    *out = malloc(f->length ? f->length : 1);
    if (!*out) return err_set(err, ERR_MEMORY, "%zu bytes", f->length);
    memcpy(*out, f->bytes, f->length);
    *length = f->length;
    return 0;
}

static void disk_remove(void *arg, const char *name) {
    struct bench_file *f = find(arg, name);
    if (f) drop(f);
}

/* ---- a swarm --------------------------------------------------------------------------------- */

struct parcel {
    uint32_t from, to; /* 0: the coordinator */
    struct frame frame;
    enum proto_record record;
    void *msg;
};

struct machine {
    struct sync *sync;
    struct bench_disk disk;
    struct sync_actions out;
    bool applied_due, freeze_due;
    uint32_t fragment;
    uint64_t samples, steps, used;
};

struct swarm {
    uint32_t members;
    struct msg_model model;
    struct msg_inner inner;
    struct msg_outer outer;
    struct msg_corpus corpus;
    struct msg_genesis genesis;
    struct identity root, online;
    struct digest run, head;
    struct msg_signed_entry ledger[16];
    uint32_t entries;
    size_t elements;
    float *slot, *local; /* of all members: nobody looks at what is in them */
    uint8_t *ops;
    uint64_t now, plan, rounds, base_index;
    uint32_t chunks;
    struct machine machine[MEMBERS_MAX + 1]; /* from 1 */
    struct msg_ready *ready[MEMBERS_MAX + 1];
    struct msg_shard_report *report[MEMBERS_MAX + 1]; /* of the shard that it aggregates */
    uint32_t reports, roots, readies;
    struct parcel *queue;
    uint32_t queued, taken, capacity;
    uint8_t *spare[SPARES_MAX]; /* buffers for bulk that is under way, as a socket has them */
    uint32_t spares;
};

static _Noreturn void fail_now(const char *what) {
    fprintf(stderr, "bench: swarm: %s\n", what);
    exit(1);
}

static struct proto_bytes encoded(enum proto_record which, const void *record) {
    struct proto_buffer b;
    struct err err = {0};
    proto_buffer_init(&b, proto_record_bytes_max(which));
    if (proto_encode(&b, which, record, &err)) fail_now(err.msg);
    return (struct proto_bytes){b.data, (uint32_t)b.length}; /* kept */
}

static void entry_add(struct swarm *w, enum ledger_kind kind, struct proto_bytes body) {
    bool by_root = kind == LEDGER_GENESIS || kind == LEDGER_DELEGATION;
    struct msg_entry e = {.index = w->entries, .previous = w->head, .kind = (uint8_t)kind,
                          .body = body, .term = by_root ? 0 : 1};
    struct msg_signed_entry *s = &w->ledger[w->entries++];
    s->bytes = encoded(RECORD_entry, &e);
    proto_sign(by_root ? &w->root : &w->online, "ledger", &w->run, e.term, s->bytes.data,
               s->bytes.length, &s->signature);
    w->head = LEDGER_DIGEST(s);
}

static void set_up_run(struct swarm *w) {
    w->model = (struct msg_model){.layers = LAYERS, .width = 1024, .heads = 8, .kv_heads = 8,
                                  .ffn = 2816, .vocabulary = 256, .sequence = 16,
                                  .rope_theta = 1e4, .norm_eps = 1e-5, .tied = 1};
    w->inner = (struct msg_inner){.batch = 1, .lr = 1e-3, .beta1 = .9, .beta2 = .95, .eps = 1e-8,
                                  .total_tokens = UINT64_MAX / 2};
    w->outer = (struct msg_outer){.inner_steps = 1, .round_ms = 1u << 30, .quorum = 1,
                                  .lr = 0.7f, .momentum = 0.9f, .contribution_codec = OUTER_INT8,
                                  .result_codec = OUTER_INT8, .chunk_elements = CHUNK,
                                  .fragments = 1, .shard_chunks = 1, .ramp_rounds = 1,
                                  .heartbeat_ms = 1u << 20, .silence_ms_max = 1u << 24,
                                  .lease_samples = LEASE};
    w->corpus = (struct msg_corpus){.manifest_url = proto_str("file:///none"),
                                    .tokenizer = proto_str("bytes"), .samples = 1u << 30};
    w->genesis = (struct msg_genesis){.version = 1, .name = proto_str("swarm"),
                                      .model = &w->model, .model_count = 1, .inner = &w->inner,
                                      .inner_count = 1, .outer = &w->outer, .outer_count = 1,
                                      .corpus = &w->corpus, .corpus_count = 1};
    identity_from_seed(&w->root, (const uint8_t[32]){1});
    identity_from_seed(&w->online, (const uint8_t[32]){2});
    w->genesis.root_key = w->root.key;
    struct proto_bytes genesis = encoded(RECORD_genesis, &w->genesis);
    w->run = digest_of(genesis.data, genesis.length);
    entry_add(w, LEDGER_GENESIS, genesis);
    struct msg_delegation d = {.run = w->run, .key = w->online.key, .number = 1};
    entry_add(w, LEDGER_DELEGATION, encoded(RECORD_delegation, &d));
    w->elements = (size_t)proto_model_elements(&w->model);
    w->chunks = (uint32_t)((w->elements - 1) / CHUNK + 1);
    w->slot = take_memory(w->elements * sizeof *w->slot);
    w->ops = take_memory(w->chunks);
    w->local = take_floats(w->elements, 0.02f, 7);
}

/* ---- events and actions ---------------------------------------------------------------------- */

static void push(struct swarm *w, struct parcel p) {
    if (w->queued == w->capacity) {
        w->capacity = w->capacity ? 2 * w->capacity : 1024;
        w->queue = realloc(w->queue, w->capacity * sizeof *w->queue);
        if (!w->queue) fail_now("no memory");
    }
    w->queue[w->queued++] = p;
}

static struct proto_bytes *bulk_of(uint8_t type, void *msg) {
    if (type == MSG_CHUNK) return &((struct msg_chunk *)msg)->data;
    if (type == MSG_RESULT) return &((struct msg_result *)msg)->data;
    return NULL;
}

/* The message changes hands, and bulk is copied once: what a socket would do with it is not measured. */
static void post(struct swarm *w, uint32_t from, uint32_t to, struct sync_action *a) {
    push(w, (struct parcel){.from = from, .to = to,
                            .frame = {.type = a->message, .term = a->term,
                                      .session = a->session, .plan = a->plan},
                            .record = (enum proto_record)proto_record_of_type(a->message),
                            .msg = a->msg});
    struct proto_bytes *bulk = bulk_of(a->message, a->msg);
    if (bulk) {
        uint8_t *copy = w->spares ? w->spare[--w->spares] : take_memory(BULK_BYTES);
        bulk->data = memcpy(copy, bulk->data, bulk->length);
    }
    a->msg = NULL;
}

static void step(struct swarm *w, uint32_t id, const struct sync_event *ev);

static void perform(struct swarm *w, uint32_t id, struct sync_action *a) {
    struct machine *m = &w->machine[id];
    switch (a->type) {
    case SYNC_ACT_SEND: post(w, id, 0, a); break;
    case SYNC_ACT_PEER_SEND: post(w, id, a->peer, a); break;
    case SYNC_ACT_PEER_DIAL:
        push(w, (struct parcel){.from = a->peer, .to = id});
        push(w, (struct parcel){.from = id, .to = a->peer});
        break;
    case SYNC_ACT_TRAINER_FREEZE:
        m->freeze_due = true;
        m->fragment = a->fragment;
        break;
    case SYNC_ACT_TRAINER_RESET: m->samples = 0; m->applied_due = true; break;
    case SYNC_ACT_TRAINER_APPLY: m->applied_due = true; break;
    case SYNC_ACT_PEER_CLOSE: fail_now("a link was closed");
    case SYNC_ACT_DISCONNECT: fail_now("a member left the coordinator");
    case SYNC_ACT_LOG:
        if (getenv("SYNC_LOG")) printf("[%u] %s\n", id, a->text);
        break;
    default: break;
    }
}

static void step(struct swarm *w, uint32_t id, const struct sync_event *ev) {
    struct machine *m = &w->machine[id];
    struct err err = {0};
    sync_actions_clear(&m->out);
    if (sync_step(m->sync, ev, w->now, &m->out, &err)) fail_now(err.msg);
    for (uint32_t i = 0; i < m->out.count; i++) perform(w, id, &m->out.list[i]);
}

static void *keep(void **msg, void *old, enum proto_record which) {
    if (old) proto_copy_release(which, old);
    free(old);
    void *p = *msg;
    *msg = NULL;
    return p;
}

static void on_coordinator(struct swarm *w, struct parcel *p) {
    if (p->frame.type == MSG_READY) {
        w->ready[p->from] = keep(&p->msg, w->ready[p->from], RECORD_ready);
        w->readies++;
    } else if (p->frame.type == MSG_SHARD_REPORT && p->frame.plan == w->plan) {
        const struct msg_shard_report *r = p->msg;
        w->reports++;
        if (r->shard + 1 == p->from)
            w->report[p->from] = keep(&p->msg, w->report[p->from], RECORD_shard_report);
    } else if (p->frame.type == MSG_ROOT) {
        w->roots += ((const struct msg_root *)p->msg)->index == w->base_index;
    }
}

static void deliver(struct swarm *w, struct parcel *p) {
    if (p->to == 0) {
        on_coordinator(w, p);
    } else if (!p->msg) {
        step(w, p->to, &(struct sync_event){.type = SYNC_EV_PEER_OPEN, .peer = p->from});
    } else {
        step(w, p->to, &(struct sync_event){.type = SYNC_EV_PEER_MESSAGE, .peer = p->from,
                                            .frame = p->frame, .msg = p->msg});
        step(w, p->from, &(struct sync_event){.type = SYNC_EV_PEER_DRAINED, .peer = p->to});
    }
    if (!p->msg) return;
    struct proto_bytes *bulk = bulk_of(p->frame.type, p->msg);
    if (bulk) {
        uint8_t *copy = (uint8_t *)(uintptr_t)bulk->data;
        if (w->spares < SPARES_MAX) w->spare[w->spares++] = copy;
        else free(copy);
        *bulk = (struct proto_bytes){0};
    }
    proto_copy_release(p->record, p->msg);
    free(p->msg);
}

static bool answer_trainer(struct swarm *w, uint32_t id) {
    struct machine *m = &w->machine[id];
    if (m->applied_due) {
        m->applied_due = false;
        step(w, id, &(struct sync_event){.type = SYNC_EV_TRAINER_APPLIED});
        return true;
    }
    return false;
}

/* Until nobody has anything to do; one parcel or piece of work each in turn. */
static void settle(struct swarm *w) {
    for (bool busy = true; busy;) {
        busy = w->taken < w->queued;
        for (uint32_t i = 0; i < w->members && w->taken < w->queued; i++) {
            struct parcel p = w->queue[w->taken++];
            if (w->taken == w->queued) w->taken = w->queued = 0;
            deliver(w, &p);
        }
        for (uint32_t id = 1; id <= w->members && w->machine[id].sync; id++) {
            if (answer_trainer(w, id)) busy = true;
            if (!sync_has_work(w->machine[id].sync)) continue;
            step(w, id, &(struct sync_event){.type = SYNC_EV_WORK});
            busy = true;
        }
    }
}

static void say(struct swarm *w, uint32_t id, enum proto_type type, uint64_t plan,
                const void *msg) {
    struct frame f = {.type = (uint8_t)type, .term = 1, .session = 1u << 24 | id, .plan = plan};
    step(w, id, &(struct sync_event){.type = SYNC_EV_MESSAGE, .frame = f, .msg = msg});
}

/* ---- members --------------------------------------------------------------------------------- */

static int load(void *arg, const struct msg_checkpoint *from, uint64_t first, size_t n,
                float *anchor, float *momentum, struct err *err) {
    (void)arg, (void)from, (void)err;
    outer_init_normal(anchor, 42, first, n, 0.02f);
    memset(momentum, 0, n * sizeof *momentum);
    return 0;
}

static void say_leases(struct swarm *w, uint32_t id) {
    uint64_t used = w->machine[id].used;
    struct msg_lease lease = {id, 1, id * LEASE + used, LEASE - used};
    say(w, id, MSG_LEASES, 0, &(struct msg_leases){.leases = &lease, .leases_count = 1});
}

static void start_member(struct swarm *w, uint32_t id) {
    struct machine *m = &w->machine[id];
    struct err err = {0};
    struct sync_config config = {.genesis = &w->genesis, .run = w->run, .identity = &w->online,
                                 .instance = id, .member = id, .trains = true,
                                 .port = 7000 + id, .elements = w->elements, .load = load,
                                 .disk = {&m->disk, disk_map, disk_flush, disk_put, disk_get,
                                          disk_remove}};
    if (!(m->sync = sync_create(&config, w->now, &err))) fail_now(err.msg);
    sync_set_slot(m->sync, w->slot, w->ops);
    struct frame f = {.type = MSG_WELCOME, .term = 1};
    step(w, id, &(struct sync_event){.type = SYNC_EV_CONNECTED, .frame = f});
    say(w, id, MSG_HELLO_ACK, 0,
        &(struct msg_hello_ack){.session = 1u << 24 | id, .head_index = w->entries - 1});
    say(w, id, MSG_LEDGER, 0,
        &(struct msg_ledger){.entries = w->ledger, .entries_count = w->entries});
    settle(w);
    m->steps = 1;
    step(w, id, &(struct sync_event){.type = SYNC_EV_TRAINER_UP, .steps = 1});
    say_leases(w, id);
    settle(w);
}

/* One inner step of each; then they freeze. */
static void train(struct swarm *w) {
    w->readies = 0;
    for (uint32_t id = 1; id <= w->members; id++) {
        struct machine *m = &w->machine[id];
        m->samples++;
        m->used++;
        m->steps++;
        step(w, id, &(struct sync_event){.type = SYNC_EV_TRAINER_STEP, .samples = m->samples,
                                         .steps = m->steps, .loss = 1, .tokens_per_s = 1});
        settle(w);
        if (!m->freeze_due) fail_now("a member does not freeze");
    }
}

/* ---- the parts of an outer step -------------------------------------------------------------- */

static int run_encode(struct swarm *w) {
    for (uint32_t id = 1; id <= w->members; id++) {
        struct machine *m = &w->machine[id];
        m->freeze_due = false;
        step(w, id, &(struct sync_event){.type = SYNC_EV_TRAINER_FROZEN, .fragment = m->fragment,
                                         .local = w->local, .samples = m->samples,
                                         .steps = m->steps});
    }
    settle(w);
    if (w->readies != w->members) fail_now("not all are ready");
    return 0;
}

static void make_shards(const struct swarm *w, struct msg_shard *out) {
    for (uint32_t i = 0, first = 0; i < w->members; i++) {
        uint32_t end = (i + 1) * w->chunks / w->members;
        out[i] = (struct msg_shard){first, end - first, i + 1, (i + 1) % w->members + 1};
        first = end;
    }
}

static void make_contributors(const struct swarm *w, struct msg_contributor *out) {
    for (uint32_t i = 0; i < w->members; i++) {
        const struct msg_ready *r = w->ready[i + 1];
        out[i] = (struct msg_contributor){.member = i + 1, .weight = 1, .clip = 1,
                                          .tokens = r->samples, .root = r->root, .norm = r->norm};
    }
}

static void make_addresses(const struct swarm *w, struct msg_address *out) {
    for (uint32_t i = 0; i < w->members; i++)
        out[i] = (struct msg_address){i + 1, proto_str("127.0.0.1"), 7001 + i};
}

static int run_reduce(struct swarm *w) {
    struct msg_shard shards[MEMBERS_MAX];
    struct msg_contributor contributors[MEMBERS_MAX];
    struct msg_address addresses[MEMBERS_MAX];
    make_shards(w, shards);
    make_contributors(w, contributors);
    make_addresses(w, addresses);
    struct msg_plan plan = {.round = w->rounds, .base_index = w->base_index, .grid_exponent = GRID,
                            .codec = OUTER_INT8, .contributors = contributors,
                            .contributors_count = w->members, .shards = shards,
                            .shards_count = w->members, .addresses = addresses,
                            .addresses_count = w->members};
    w->plan++;
    w->reports = 0;
    for (uint32_t id = 1; id <= w->members; id++) say(w, id, MSG_PLAN, w->plan, &plan);
    settle(w);
    for (int i = 0; i < 10 && w->reports < 2 * w->members; i++) { /* holders ask again */
        w->now += w->outer.heartbeat_ms;
        for (uint32_t id = 1; id <= w->members; id++)
            step(w, id, &(struct sync_event){.type = SYNC_EV_TICK});
        settle(w);
    }
    if (w->reports < 2 * w->members) fail_now("a shard was not reported");
    return 0;
}

static void append_commit(struct swarm *w) {
    struct msg_shard shards[MEMBERS_MAX];
    struct msg_contributor contributors[MEMBERS_MAX];
    struct msg_digest_item *leaves = take_memory(w->chunks * sizeof *leaves);
    struct msg_summed summed[MEMBERS_MAX];
    struct msg_spend spent[MEMBERS_MAX];
    uint32_t chunk = 0;
    make_shards(w, shards);
    make_contributors(w, contributors);
    for (uint32_t i = 0; i < w->members; i++) {
        const struct msg_shard_report *r = w->report[i + 1];
        const struct msg_lease *range = &w->ready[i + 1]->ranges[0];
        assert(r && r->summed_count == 1 && r->results_count == shards[i].count);
        memcpy(leaves + chunk, r->results, r->results_count * sizeof *leaves);
        chunk += r->results_count;
        summed[i] = r->summed[0];
        spent[i] = (struct msg_spend){i + 1, range->lease, range->generation, range->start,
                                      range->count};
    }
    struct msg_commit body = {.round = w->rounds, .plan = w->plan, .base_index = w->base_index,
                              .state_index = w->ready[1]->state_index,
                              .state_root = w->ready[1]->state_root, .lr = 0.7f, .momentum = 0.9f, .codec = OUTER_INT8,
                              .grid_exponent = GRID, .tokens_committed = w->rounds + 1,
                              .result_root = digest_tree_root(leaves, w->chunks),
                              .contributors = contributors, .contributors_count = w->members,
                              .shards = shards, .shards_count = w->members, .summed = summed,
                              .summed_count = w->members, .spent = spent,
                              .spent_count = w->members};
    w->base_index = w->entries;
    w->rounds++;
    entry_add(w, LEDGER_COMMIT, encoded(RECORD_commit, &body));
    free(leaves);
}

static int run_apply(struct swarm *w) {
    struct msg_address addresses[MEMBERS_MAX];
    make_addresses(w, addresses);
    w->roots = 0;
    for (uint32_t id = 1; id <= w->members; id++) {
        say(w, id, MSG_LEDGER, 0,
            &(struct msg_ledger){.entries = &w->ledger[w->entries - 1], .entries_count = 1});
        say_leases(w, id);
        say(w, id, MSG_HOLDERS, 0,
            &(struct msg_holders){.index = w->base_index, .addresses = addresses,
                                  .addresses_count = w->members});
    }
    settle(w);
    if (w->roots != w->members) fail_now("a commit was not applied");
    return 0;
}

/* ---- the floors ------------------------------------------------------------------------------ */

/* The same arithmetic without a machine around it, on as many bytes, chunk by chunk. */
struct floor {
    float *x, *y, *z;
    int64_t *sum;
    uint8_t *bytes;
    size_t chunk_bytes;
};

static double sink;

static void floor_encode(const struct floor *f, struct err *err) {
    outer_pseudo_gradient(f->x, f->y, f->z, f->z, CHUNK);
    if (outer_encode(f->bytes, f->x, CHUNK, OUTER_INT8, err)) fail_now(err->msg);
    outer_residual(f->x, f->x, f->bytes, f->chunk_bytes, CHUNK, OUTER_INT8, err);
    sink += digest_leaf(0, f->bytes, f->chunk_bytes).b[0];
}

/* What n contributions of a chunk take at its aggregator, and the result at its holder. */
static void floor_reduce(const struct floor *f, uint32_t n, struct err *err) {
    memset(f->sum, 0, CHUNK * sizeof *f->sum);
    for (uint32_t i = 0; i < n; i++) {
        if (i) sink += digest_leaf(0, f->bytes, f->chunk_bytes).b[0]; /* its own is right */
        if (outer_accumulate(f->sum, f->bytes, f->chunk_bytes, CHUNK, OUTER_INT8, 1, 1, 30, err))
            fail_now(err->msg);
    }
    outer_mean(f->x, f->sum, CHUNK, n, 30);
    if (outer_encode(f->bytes, f->x, CHUNK, OUTER_INT8, err)) fail_now(err->msg);
    for (int i = 0; i < 2; i++) sink += digest_leaf(0, f->bytes, f->chunk_bytes).b[0];
}

/* Of n members, two have the result already. */
static void floor_apply(const struct floor *f, uint32_t n, struct err *err) {
    for (uint32_t i = 0; i < n; i++) {
        if (i > 1) sink += digest_leaf(0, f->bytes, f->chunk_bytes).b[0];
        outer_decode(f->x, f->bytes, f->chunk_bytes, CHUNK, OUTER_INT8, err);
        outer_nesterov(f->y, f->z, f->x, CHUNK, 0.01f, 0.9f);
        sink += digest_leaf2(0, f->y, CHUNK * 4, f->z, CHUNK * 4).b[0];
    }
}

static double time_floor(const struct swarm *w, int part, struct err *err) {
    struct floor f = {take_floats(CHUNK, 0.01f, 1), take_floats(CHUNK, 0.01f, 2),
                      take_floats(CHUNK, 0.01f, 3), take_memory(CHUNK * 8), take_memory(CHUNK * 2),
                      outer_encoded_bytes(OUTER_INT8, CHUNK)};
    if (outer_encode(f.bytes, f.x, CHUNK, OUTER_INT8, err)) fail_now(err->msg);
    double begin = cpu_s();
    for (uint32_t c = 0; c < w->chunks; c++) {
        for (uint32_t i = 0; part == 0 && i < w->members; i++) floor_encode(&f, err);
        if (part == 1) floor_reduce(&f, w->members, err);
        if (part == 2) floor_apply(&f, w->members, err);
    }
    begin = cpu_s() - begin;
    free(f.x);
    free(f.y);
    free(f.z);
    free(f.sum);
    free(f.bytes);
    return begin;
}

/* ---- the rows -------------------------------------------------------------------------------- */

static void release(struct swarm *w) {
    for (uint32_t id = 1; id <= w->members; id++) {
        struct machine *m = &w->machine[id];
        sync_destroy(m->sync);
        sync_actions_release(&m->out);
        for (int i = 0; i < FILES_MAX; i++) drop(&m->disk.file[i]);
    }
    free(w->slot);
    free(w->ops);
    free(w->local);
    free(w->queue);
    while (w->spares) free(w->spare[--w->spares]);
}

int bench_swarm(struct bench *b, int members, struct err *err) {
    static const char *const name[] = {"contributions made", "shards summed", "commit applied"};
    static int (*const run[])(struct swarm *) = {run_encode, run_reduce, run_apply};
    static struct swarm w;
    struct series cpu[3] = {{0}}, floors[3] = {{0}};
    char text[64];
    w = (struct swarm){.members = (uint32_t)members, .now = 1000000};
    set_up_run(&w);
    for (uint32_t id = 1; id <= w.members; id++) start_member(&w, id);
    for (int round = 0; round <= ROUNDS; round++) {
        train(&w);
        for (int part = 0; part < 3; part++) {
            double begin = cpu_s();
            if (part == 2) append_commit(&w);
            run[part](&w);
            if (round) series_add(&cpu[part], cpu_s() - begin);
            if (round) series_add(&floors[part], time_floor(&w, part, err));
        }
    }
    for (int part = 0; part < 3; part++) {
        double megabytes = 4 * (double)w.elements / MB;
        snprintf(text, sizeof text, "sync, %d members on one core: %s", members, name[part]);
        row_rate(b, text, "MB/s fp32", megabytes, &cpu[part], "digests and arithmetic alone",
                 megabytes, &floors[part]);
    }
    release(&w);
    return 0;
}
