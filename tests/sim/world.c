/* world.c - the simulated clock, network and coordinator's shell, and the faults. */
#include "tests/sim/sim.h"

#include "proto/model.h"

#include <stdlib.h>
#include <string.h>

/* ---- randomness, trace, violations -------------------------------------------------------------
 */

uint64_t sim_random(struct sim_world *w, uint64_t below) { /* splitmix64 */
    uint64_t z = (w->random += 0x9e3779b97f4a7c15ull);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return below ? (z ^ z >> 31) % below : 0;
}

bool sim_chance(struct sim_world *w, uint32_t per_mille) { return sim_random(w, 1000) < per_mille; }

void sim_trace(struct sim_world *w, const char *format, ...) {
    if (!w->trace) return;
    va_list ap;
    va_start(ap, format);
    printf("%9.3f  ", (double)w->now / 1000);
    vprintf(format, ap);
    putchar('\n');
    va_end(ap);
}

void sim_violation(struct sim_world *w, const char *format, ...) {
    va_list ap;
    va_start(ap, format);
    vsnprintf(w->violation, sizeof w->violation, format, ap);
    va_end(ap);
    longjmp(w->stop, 1);
}

/* ---- the queue of events: a binary heap by (time, order) ----------------------------------------
 */

static bool before(const struct sim_event *a, const struct sim_event *b) {
    return a->at != b->at ? a->at < b->at : a->order < b->order;
}

static struct sim_event *push(struct sim_world *w, const struct sim_event *ev) {
    if (w->heap_count == w->heap_capacity) {
        w->heap_capacity = w->heap_capacity ? 2 * w->heap_capacity : 1024;
        w->heap = realloc(w->heap, w->heap_capacity * sizeof *w->heap);
    }
    uint32_t i = w->heap_count++;
    while (i && before(ev, &w->heap[(i - 1) / 2])) {
        w->heap[i] = w->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    w->heap[i] = *ev;
    return &w->heap[i];
}

static struct sim_event pop(struct sim_world *w) {
    struct sim_event first = w->heap[0], last = w->heap[--w->heap_count];
    uint32_t i = 0, child;
    while ((child = 2 * i + 1) < w->heap_count) {
        if (child + 1 < w->heap_count && before(&w->heap[child + 1], &w->heap[child])) child++;
        if (!before(&w->heap[child], &last)) break;
        w->heap[i] = w->heap[child];
        i = child;
    }
    if (w->heap_count) w->heap[i] = last;
    return first;
}

static bool at_core(enum sim_kind k) {
    return k == SIM_TO_CORE || k == SIM_CORE_CLOSED || k == SIM_CORE_OPENED || k == SIM_CORE_TICK;
}

struct sim_event *sim_schedule(struct sim_world *w, uint64_t in_ms, enum sim_kind kind,
                               uint32_t member) {
    struct sim_event ev = {
        .at = w->now + in_ms, .order = ++w->order, .kind = kind, .member = member};
    bool of_trainer =
        kind == SIM_TRAINER_STEP || kind == SIM_TRAINER_REPLY || kind == SIM_TRAINER_UP;
    if (at_core(kind)) ev.life = w->core_life;
    else if (of_trainer) ev.life = w->member[member].trainer.generation;
    else if (member < SIM_MEMBERS_MAX) ev.life = w->member[member].life;
    return push(w, &ev);
}

/* ---- the network
 * ---------------------------------------------------------------------------------- */

bool sim_is_cut(const struct sim_world *w, uint32_t a, uint32_t b) {
    return w->cut_until[a][b] > w->now || w->cut_until[b][a] > w->now;
}

void sim_encode(struct sim_world *w, uint8_t type, const void *msg, struct sim_event *ev) {
    struct proto_buffer b;
    struct err err;
    proto_buffer_init(&b, PROTO_FRAME_BYTES_MAX);
    int which = proto_record_of_type(type);
    if (which < 0 || proto_encode(&b, (enum proto_record)which, msg, &err))
        sim_violation(w, "a %s that does not encode: %s", proto_type_name(type), err.msg);
    ev->payload = b.data;
    ev->payload_length = (uint32_t)b.length;
    ev->frame.length = (uint32_t)b.length;
}

struct sim_conn *sim_conn_find(struct sim_world *w, uint64_t number) {
    struct sim_conn *c = &w->conns[number % 256];
    return number && c->number == number ? c : NULL;
}

void sim_conn_send(struct sim_world *w, struct sim_conn *c, bool to_core, uint8_t type,
                   struct frame frame, const void *msg) {
    if (c->broken) return;
    uint64_t *clear = &c->clear_at[to_core], at = w->now + 1 + sim_random(w, w->delay_ms_max);
    if (at < *clear) at = *clear;
    *clear = at;
    struct sim_event *ev =
        sim_schedule(w, at - w->now, to_core ? SIM_TO_CORE : SIM_TO_MEMBER, c->member);
    ev->conn = c->number;
    ev->frame = frame;
    ev->frame.type = type;
    sim_encode(w, type, msg, ev);
}

/* One end closed; the other notices after what is still under way has arrived. */
void sim_conn_close(struct sim_world *w, struct sim_conn *c, bool by_core) {
    uint64_t at = w->now + 1 + sim_random(w, w->delay_ms_max);
    for (int side = 0; side < 2; side++) {
        bool to_core = side == 1;
        uint64_t when = to_core == !by_core ? at : w->now + 1;
        if (when < c->clear_at[to_core]) when = c->clear_at[to_core];
        struct sim_event *ev = sim_schedule(
            w, when - w->now, to_core ? SIM_CORE_CLOSED : SIM_MEMBER_CLOSED, c->member);
        ev->conn = c->number;
    }
    c->broken = true;
}

static void dial_coordinator(struct sim_world *w, struct sim_member *m) {
    if (m->conn || m->gone) return;
    if (!w->core || sim_is_cut(w, m->slot, SIM_COORDINATOR)) {
        sim_schedule(w, 200 + sim_random(w, 2000), SIM_MEMBER_DIAL, m->slot);
        return;
    }
    uint64_t number = ++w->conn_next;
    struct sim_conn *c = &w->conns[number % 256];
    *c = (struct sim_conn){.number = number, .member = m->slot, .clear_at = {w->now, w->now}};
    m->conn = number;
    sim_schedule(w, 1 + sim_random(w, w->delay_ms_max), SIM_CORE_OPENED, m->slot)->conn = number;
}

static void cut(struct sim_world *w, uint32_t a, uint32_t b, uint64_t for_ms) {
    sim_trace(w, "link %u-%u cut for %llu ms", a, b, (unsigned long long)for_ms);
    w->cut_until[a][b] = w->now + for_ms;
    if (b == SIM_COORDINATOR) {
        struct sim_conn *c = sim_conn_find(w, w->member[a].conn);
        if (!c) return;
        c->broken = true;
        sim_schedule(w, 200 + sim_random(w, 8000), SIM_CORE_CLOSED, a)->conn = c->number;
        sim_schedule(w, 200 + sim_random(w, 8000), SIM_MEMBER_CLOSED, a)->conn = c->number;
        return;
    }
    struct sim_link *l = &w->links[a < b ? a : b][a < b ? b : a];
    if (!l->number || l->broken) return;
    l->broken = true;
    struct sim_event *ev = sim_schedule(w, 200 + sim_random(w, 8000), SIM_PEER_CLOSED, a);
    ev->peer = b, ev->conn = l->number;
    ev = sim_schedule(w, 200 + sim_random(w, 8000), SIM_PEER_CLOSED, b);
    ev->peer = a, ev->conn = l->number;
}

/* ---- the coordinator's shell
 * ------------------------------------------------------------------------ */

struct sim_row *sim_row_find(struct sim_table *t, uint64_t key) {
    for (uint32_t i = 0; i < t->count; i++)
        if (t->rows[i].key == key) return &t->rows[i];
    return NULL;
}

static void store_write(struct sim_world *w, const struct core_write *write) {
    struct sim_table *t = &w->store[write->table];
    struct sim_row *r = sim_row_find(t, write->key);
    if (!write->value) {
        if (!r) return;
        free(r->value);
        *r = t->rows[--t->count];
        return;
    }
    if (!r) {
        if (t->count == t->capacity) {
            t->capacity = t->capacity ? 2 * t->capacity : 64;
            t->rows = realloc(t->rows, t->capacity * sizeof *t->rows);
        }
        r = &t->rows[t->count++];
        *r = (struct sim_row){.key = write->key};
    }
    free(r->value);
    r->value = malloc(write->value_length);
    memcpy(r->value, write->value, write->value_length);
    r->length = write->value_length;
    if (write->table == CORE_LEDGER)
        proto_sign(write->key < 2 ? &w->root : &w->online, "ledger", &w->run,
                   write->key < 2 ? 0 : w->term, r->value, r->length, &r->signature);
}

static void core_kill(struct sim_world *w) {
    if (!w->core) return;
    sim_trace(w, "the coordinator dies");
    if (w->announced_head + 1 > w->store[CORE_LEDGER].count)
        sim_violation(w,
                      "ledger entry %llu was announced and died with the coordinator, which had "
                      "not made it durable",
                      (unsigned long long)w->announced_head);
    core_destroy(w->core);
    w->core = NULL;
    w->core_life++;
    w->core_dies_after = 0;
    for (uint32_t i = 0; i < 256; i++) {
        struct sim_conn *c = &w->conns[i];
        if (!c->number || !sim_conn_find(w, w->member[c->member].conn) ||
            w->member[c->member].conn != c->number)
            continue;
        c->broken = true;
        sim_schedule(w, 1 + sim_random(w, w->delay_ms_max), SIM_MEMBER_CLOSED, c->member)->conn =
            c->number;
    }
    sim_schedule(w, 200 + sim_random(w, 8000), SIM_CORE_START, SIM_COORDINATOR);
}

/* The entry as the shell would have it: from the store, or, for a core that announces too early,
 * from the transaction that is still to come. */
static bool entry_at(struct sim_world *w, uint64_t index, struct msg_signed_entry *out) {
    struct sim_row *r = sim_row_find(&w->store[CORE_LEDGER], index);
    if (r) {
        *out = (struct msg_signed_entry){.bytes = {r->value, r->length}, .signature = r->signature};
        return true;
    }
    for (uint32_t i = 0; i < w->core_out.count; i++) {
        struct core_action *a = &w->core_out.list[i];
        for (uint32_t k = 0; a->type == CORE_ACT_PERSIST && k < a->write_count; k++) {
            struct core_write *x = &a->writes[k];
            if (x->table != CORE_LEDGER || x->key != index) continue;
            out->bytes = (struct proto_bytes){x->value, x->value_length};
            proto_sign(&w->online, "ledger", &w->run, w->term, x->value, x->value_length,
                       &out->signature);
            return true;
        }
    }
    return false;
}

static void send_ledger(struct sim_world *w, struct sim_conn *c, const struct core_action *a) {
    struct msg_signed_entry entries[PROTO_LEDGER_BATCH_MAX];
    struct msg_ledger ledger = {.entries = entries};
    for (uint64_t i = a->from; ledger.entries_count < PROTO_LEDGER_BATCH_MAX &&
                               entry_at(w, i, &entries[ledger.entries_count]);
         i++) {
        struct digest d = LEDGER_DIGEST(&entries[ledger.entries_count]);
        if (i < SIM_ENTRIES_MAX && w->entry_known[i] && !digest_equal(&d, &w->entry_seen[i]))
            sim_violation(w, "two ledger entries with index %llu were announced",
                          (unsigned long long)i);
        if (i < SIM_ENTRIES_MAX) w->entry_known[i] = true, w->entry_seen[i] = d;
        if (i > w->announced_head) w->announced_head = i;
        ledger.entries_count++;
    }
    if (ledger.entries_count)
        sim_conn_send(w, c, false, MSG_LEDGER,
                      (struct frame){.term = w->term, .session = a->session, .plan = a->plan},
                      &ledger);
}

static void core_perform_one(struct sim_world *w, struct core_action *a) {
    struct sim_conn *c = a->conn ? sim_conn_find(w, a->conn) : NULL;
    struct frame f = {.term = w->term, .session = a->session, .plan = a->plan};
    switch (a->type) {
    case CORE_ACT_PERSIST:
        for (uint32_t i = 0; i < a->write_count; i++) store_write(w, &a->writes[i]);
        oracle_persist(w, a);
        break;
    case CORE_ACT_SEND:
        if (!c) break;
        if (a->message == MSG_ROSTER) {
            struct msg_roster *r = a->msg;
            proto_sign(&w->online, "roster", &w->run, w->term, r->body.data, r->body.length,
                       &r->signature);
        }
        sim_conn_send(w, c, false, a->message, f, a->msg);
        break;
    case CORE_ACT_SEND_LEDGER:
        if (c) send_ledger(w, c, a);
        break;
    case CORE_ACT_SIGN: {
        const struct msg_checkpoint_sign *s = a->msg;
        struct msg_checkpoint_signed answer = {.index = s->index};
        proto_sign(&w->online, "manifest", &w->run, w->term, s->manifest.data, s->manifest.length,
                   &answer.signature);
        if (c) sim_conn_send(w, c, false, MSG_CHECKPOINT_SIGNED, f, &answer);
        break;
    }
    case CORE_ACT_KNOWN: break;
    case CORE_ACT_CLOSE: {
        struct msg_bye bye = {
            .code = (uint8_t)a->code, .final = a->final, .reason = proto_str(a->text)};
        if (!c) break;
        sim_trace(w, "coordinator closes slot %u: %s", c->member, a->text);
        sim_conn_send(w, c, false, MSG_BYE, f, &bye);
        sim_conn_close(w, c, true);
        break;
    }
    case CORE_ACT_RESTART:
    case CORE_ACT_FAIL: break;
    case CORE_ACT_LOG: sim_trace(w, "coordinator: %s", a->text); break;
    }
}

static void core_event(struct sim_world *w, const struct core_event *ev) {
    core_actions_clear(&w->core_out);
    core_step(w->core, ev, w->now, &w->core_out);
    for (uint32_t i = 0; i < w->core_out.count; i++) {
        core_perform_one(w, &w->core_out.list[i]);
        if (w->core_dies_after && --w->core_dies_after == 0) {
            core_kill(w);
            return;
        }
    }
}

static void core_start(struct sim_world *w) {
    struct err err = {0};
    sim_trace(w, "the coordinator starts, term %llu", (unsigned long long)w->term + 1);
    w->term++;
    w->core = core_create(&w->genesis, &w->run, &w->member[0].identity.key, &err);
    if (!w->core) sim_violation(w, "core_create: %s", err.msg);
    for (int t = 0; t < CORE_TABLES; t++)
        for (uint64_t i = 0; i < w->store[t].count; i++) {
            struct sim_row *r =
                t == CORE_LEDGER ? sim_row_find(&w->store[t], i) : &w->store[t].rows[i];
            if (!r) sim_violation(w, "the ledger has a hole at %llu", (unsigned long long)i);
            if (core_load(w->core, (enum core_table)t, r->key, r->value, r->length, &err))
                sim_violation(w, "the coordinator does not load its own store: %s", err.msg);
        }
    core_event(w, &(struct core_event){.type = CORE_EV_START, .term = w->term});
    sim_schedule(w, CORE_TICK_MS, SIM_CORE_TICK, SIM_COORDINATOR);
}

static void core_message(struct sim_world *w, struct sim_event *e) {
    union {
        long double align;
        char bytes[1024];
    } record;
    struct err err;
    struct core_invite invite = {
        .found = true,
        .id = e->member + 1,
        .record = {.uses_left = 1, .expires_ms = UINT64_MAX, .aggregate_only = e->member == 0}};
    int which = proto_record_of_type(e->frame.type);
    struct sim_conn *c = sim_conn_find(w, e->conn);
    if (!c || !c->open) return;
    if (e->frame.type != MSG_HEARTBEAT)
        sim_trace(w, "    %u > C %s", e->member, proto_type_name(e->frame.type));
    memset(&record, 0, sizeof record);
    if (proto_decode(e->payload, e->payload_length, (enum proto_record)which, &record, &err))
        sim_violation(w, "what slot %u sent does not decode: %s", e->member, err.msg);
    struct core_event ev = {
        .type = CORE_EV_MESSAGE, .conn = e->conn, .frame = e->frame, .msg = &record};
    if (e->frame.type == MSG_ENROL) {
        struct sim_row *row = sim_row_find(&w->store[CORE_INVITE], invite.id);
        if (row &&
            proto_decode(row->value, row->length, RECORD_invite_record, &invite.record, &err))
            sim_violation(w, "invite row: %s", err.msg);
        ev.invite = &invite;
    }
    core_event(w, &ev);
    proto_decoded_release((enum proto_record)which, &record);
}

static void on_core(struct sim_world *w, struct sim_event *e) {
    struct sim_conn *c = sim_conn_find(w, e->conn);
    if (!w->core || e->life != w->core_life) {
        /* The process that accepted this connection is gone. */
        if (e->kind == SIM_CORE_OPENED && c)
            sim_schedule(w, 1, SIM_MEMBER_CLOSED, c->member)->conn = c->number;
        return;
    }
    switch (e->kind) {
    case SIM_CORE_TICK:
        core_event(w, &(struct core_event){.type = CORE_EV_TICK});
        if (w->core) sim_schedule(w, CORE_TICK_MS, SIM_CORE_TICK, SIM_COORDINATOR);
        break;
    case SIM_CORE_OPENED: {
        if (!c) break;
        c->open = true;
        struct core_event ev = {
            .type = CORE_EV_OPENED, .conn = c->number, .key = w->member[c->member].identity.key};
        snprintf(ev.host, sizeof ev.host, "192.0.2.%u", c->member);
        core_event(w, &ev);
        if (!c->broken)
            sim_schedule(w, 1 + sim_random(w, w->delay_ms_max), SIM_MEMBER_WELCOME, c->member)
                ->conn = c->number;
        break;
    }
    case SIM_TO_CORE: core_message(w, e); break;
    case SIM_CORE_CLOSED:
        if (!c || !c->open) break;
        c->open = false;
        core_event(w, &(struct core_event){.type = CORE_EV_CLOSED, .conn = c->number});
        break;
    default: break;
    }
}

/* ---- faults
 * ------------------------------------------------------------------------------------------ */

static void one_fault(struct sim_world *w) {
    struct sim_member *m = &w->member[sim_random(w, w->members)];
    uint64_t pause = 500 + sim_random(w, 2ull * w->outer.silence_ms_max);
    switch (sim_random(w, 9)) {
    case 0: sim_member_kill(w, m, false); break;
    case 1: sim_member_kill(w, m, true); break;
    case 2: m->disk.dies_after = 1 + (uint32_t)sim_random(w, 12); break;
    case 3: sim_trainer_kill(w, m); break;
    case 4:
        sim_trace(w, "slot %u is stopped for %llu ms", m->slot, (unsigned long long)pause);
        m->paused_until = w->now + pause;
        break;
    case 5:
        sim_trace(w, "the coordinator is stopped for %llu ms", (unsigned long long)pause);
        w->core_paused_until = w->now + pause;
        break;
    case 6:
        if (sim_chance(w, 500)) core_kill(w);
        else if (w->core) w->core_dies_after = 1 + (uint32_t)sim_random(w, 30);
        break;
    case 7: cut(w, m->slot, SIM_COORDINATOR, pause); break;
    case 8: {
        uint32_t other = (uint32_t)sim_random(w, w->members);
        if (other != m->slot) cut(w, m->slot, other, pause);
        break;
    }
    }
}

static void on_fault(struct sim_world *w) {
    if (w->now < w->faults_until) {
        one_fault(w);
        sim_schedule(w, 1 + sim_random(w, 2ull * w->fault_every_ms), SIM_FAULT, SIM_COORDINATOR);
        return;
    }
    sim_trace(w, "no more faults");
    memset(w->cut_until, 0, sizeof w->cut_until);
    w->core_paused_until = w->core_dies_after = 0;
    for (uint32_t i = 0; i < w->members; i++)
        w->member[i].paused_until = w->member[i].disk.dies_after = 0;
}

/* ---- a run
 * ---------------------------------------------------------------------------------------------- */

static void choose(struct sim_world *w) {
    w->members = 3 + (uint32_t)sim_random(w, 3); /* with the aggregate-only one */
    w->model = (struct msg_model){.layers = 1,
                                  .width = 4,
                                  .heads = 1,
                                  .kv_heads = 1,
                                  .ffn = 1 + (uint32_t)sim_random(w, 8),
                                  .vocabulary = 4 + (uint32_t)sim_random(w, 12),
                                  .sequence = 10,
                                  .rope_theta = 1e4,
                                  .norm_eps = 1e-5,
                                  .tied = 1};
    w->elements = (uint32_t)proto_model_elements(&w->model);
    w->chunk_elements = w->elements / (1 + (uint32_t)sim_random(w, 6)) + 1;
    w->chunks = (w->elements + w->chunk_elements - 1) / w->chunk_elements;
    w->delay_ms_max = sim_chance(w, 500) ? 20 : 150;
    w->duplicate_per_mille = sim_chance(w, 500) ? 0 : 20;
    w->fault_every_ms = 800 + (uint32_t)sim_random(w, 4000);
    w->faults_until = sim_chance(w, 100) ? 0 : 10000 + sim_random(w, 50000);
    w->inner = (struct msg_inner){.batch = 1 + (uint32_t)sim_random(w, 3),
                                  .lr = 1e-3,
                                  .beta1 = .9,
                                  .beta2 = .95,
                                  .eps = 1e-8,
                                  .total_tokens = 1u << 30};
    w->outer = (struct msg_outer){.inner_steps = 2 + (uint32_t)sim_random(w, 3),
                                  .round_ms = 3000,
                                  .quorum = 1 + (uint32_t)sim_random(w, 2),
                                  .grace_ms = 200 + (uint32_t)sim_random(w, 1000),
                                  .lr = 0.7f,
                                  .momentum = 0.9f,
                                  .alpha = 0,
                                  .contribution_codec = OUTER_INT8,
                                  .result_codec = sim_chance(w, 500) ? OUTER_INT8 : OUTER_FP32,
                                  .chunk_elements = w->chunk_elements,
                                  .fragments = 1,
                                  .clip_factor = sim_chance(w, 500) ? 0 : 2,
                                  .ramp_rounds = (uint32_t)sim_random(w, 3),
                                  .heartbeat_ms = 400,
                                  .silence_ms_max = 3000,
                                  .lease_samples = 6 + (uint32_t)sim_random(w, 20),
                                  .checkpoint_rounds = sim_chance(w, 500) ? 3 : 0};
    w->corpus = (struct msg_corpus){.manifest_url = proto_str("file:///corpus.json"),
                                    .tokenizer = proto_str("bytes"),
                                    .samples = 40 + sim_random(w, 140),
                                    .shuffle_seed = w->seed};
    w->genesis = (struct msg_genesis){.version = 1,
                                      .name = proto_str("simulated"),
                                      .root_key = w->root.key,
                                      .model = &w->model,
                                      .model_count = 1,
                                      .inner = &w->inner,
                                      .inner_count = 1,
                                      .outer = &w->outer,
                                      .outer_count = 1,
                                      .corpus = &w->corpus,
                                      .corpus_count = 1,
                                      .init_seed = w->seed,
                                      .init_std = 0.02f,
                                      .checkpoint_url = proto_str("file:///checkpoints")};
}

static void write_entry(struct sim_world *w, uint64_t index, const struct digest *previous,
                        enum ledger_kind kind, enum proto_record which, const void *body) {
    struct proto_buffer b;
    struct err err;
    proto_buffer_init(&b, PROTO_BLOB_BYTES_MAX);
    if (core_entry_encode(&b, index, previous, 0, kind, which, body, &err))
        sim_violation(w, "first entries: %s", err.msg);
    store_write(w, &(struct core_write){.table = CORE_LEDGER,
                                        .key = index,
                                        .value = b.data,
                                        .value_length = (uint32_t)b.length});
    proto_buffer_release(&b);
}

static void init_run(struct sim_world *w) {
    struct digest previous = {{0}};
    struct proto_buffer b;
    struct err err;
    proto_buffer_init(&b, PROTO_BLOB_BYTES_MAX);
    if (proto_encode(&b, RECORD_genesis, &w->genesis, &err))
        sim_violation(w, "genesis: %s", err.msg);
    w->run = digest_of(b.data, b.length);
    proto_buffer_release(&b);
    write_entry(w, 0, &previous, LEDGER_GENESIS, RECORD_genesis, &w->genesis);
    previous = digest_of(w->store[CORE_LEDGER].rows[0].value, w->store[CORE_LEDGER].rows[0].length);
    write_entry(w, 1, &previous, LEDGER_DELEGATION, RECORD_delegation,
                &(struct msg_delegation){.run = w->run, .key = w->online.key, .number = 1});
    w->announced_head = 1;
}

static void identities(struct sim_world *w) {
    uint8_t seed[32] = {1};
    identity_from_seed(&w->root, seed);
    seed[0] = 2;
    identity_from_seed(&w->online, seed);
    for (uint32_t i = 0; i < SIM_MEMBERS_MAX; i++) {
        seed[0] = (uint8_t)(10 + i);
        identity_from_seed(&w->member[i].identity, seed);
    }
}

static bool finished(const struct sim_world *w) {
    for (uint32_t i = 1; i < w->members; i++) /* the coordinator's own node stays */
        if (!w->member[i].complete) return false;
    return true;
}

static void deliver(struct sim_world *w, struct sim_event *e) {
    uint64_t paused = at_core(e->kind) ? w->core_paused_until
                      : e->member < SIM_MEMBERS_MAX && e->kind != SIM_MEMBER_START
                          ? w->member[e->member].paused_until
                          : 0;
    if (paused >
        w->now) { /* stopped: its input waits, in order; its clock catches up after the input */
        e->at = paused;
        if (e->kind == SIM_CORE_TICK || e->kind == SIM_MEMBER_TICK) e->at++, e->order = ++w->order;
        push(w, e);
        e->payload = NULL; /* went along */
        return;
    }
    if (at_core(e->kind)) on_core(w, e);
    else if (e->kind == SIM_FAULT) on_fault(w);
    else if (e->kind == SIM_CORE_START) core_start(w);
    else if (e->kind == SIM_MEMBER_START) {
        if (!w->member[e->member].alive && !w->member[e->member].gone)
            sim_member_start(w, &w->member[e->member]);
    } else if (e->kind == SIM_MEMBER_DIAL) {
        if (w->member[e->member].alive && e->life == w->member[e->member].life)
            dial_coordinator(w, &w->member[e->member]);
    } else sim_member_event(w, &w->member[e->member], e);
}

#define GRACE_MS 400000 /* the longest a run may take after the last fault */

static void loop(struct sim_world *w) {
    init_run(w);
    sim_schedule(w, 0, SIM_CORE_START, SIM_COORDINATOR);
    for (uint32_t i = 0; i < w->members; i++)
        sim_schedule(w, 10 + (i > 2 ? sim_random(w, 20000) : sim_random(w, 500)), SIM_MEMBER_START,
                     i);
    sim_schedule(w, 3000, SIM_FAULT, SIM_COORDINATOR);
    while (!finished(w)) {
        struct sim_event e = pop(w);
        w->now = e.at;
        w->events++;
        deliver(w, &e);
        free(e.payload);
        if (w->now > w->faults_until + GRACE_MS) {
            struct core_view v = {0};
            if (w->core) core_look(w->core, w->now, &v);
            sim_violation(w,
                          "the run does not end: %d s after the last fault it is in round %llu, "
                          "phase %s, %u live, %llu samples free, %llu spent of %llu",
                          GRACE_MS / 1000, (unsigned long long)v.round, v.phase, v.members_live,
                          (unsigned long long)v.samples_free, (unsigned long long)v.samples_spent,
                          (unsigned long long)w->corpus.samples);
        }
    }
    oracle_end(w);
}

int sim_run(struct sim_world *w, uint64_t seed, bool trace) {
    memset(w, 0, sizeof *w);
    w->seed = w->random = seed;
    w->trace = trace;
    for (uint32_t i = 0; i < SIM_MEMBERS_MAX; i++)
        w->member[i] = (struct sim_member){
            .slot = i, .trains = i > 0, .reachable = i < 2 || sim_chance(w, 500)};
    identities(w);
    choose(w);
    for (uint32_t i = 0; i < w->members; i++) {
        w->member[i].step_ms = 20 + (uint32_t)sim_random(w, 300);
        w->member[i].disk.world = w;
        w->member[i].disk.owner = i;
    }
    sim_trace(w,
              "seed %llu: %u members, %u elements in chunks of %u, %llu samples, H=%u, faults "
              "until %.1f s",
              (unsigned long long)seed, w->members, w->elements, w->chunk_elements,
              (unsigned long long)w->corpus.samples, w->outer.inner_steps,
              (double)w->faults_until / 1000);
    if (setjmp(w->stop)) return -1;
    loop(w);
    return 0;
}

void sim_release(struct sim_world *w) {
    while (w->heap_count) {
        struct sim_event e = pop(w);
        free(e.payload);
    }
    free(w->heap);
    core_destroy(w->core);
    core_actions_release(&w->core_out);
    sync_actions_release(&w->sync_out);
    for (int t = 0; t < CORE_TABLES; t++) {
        for (uint32_t i = 0; i < w->store[t].count; i++) free(w->store[t].rows[i].value);
        free(w->store[t].rows);
    }
    for (uint32_t i = 0; i < SIM_MEMBERS_MAX; i++) {
        sync_destroy(w->member[i].sync);
        sim_disk_release(&w->member[i].disk);
    }
    for (uint32_t i = 0; i < w->contribution_count; i++) free(w->contributions[i].bytes);
    free(w->contributions);
    for (uint32_t i = 0; i < w->state_count; i++) free(w->states[i].values);
    free(w->states);
}
