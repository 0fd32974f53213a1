/* coordinator.c - the coordinators' shell: their store, which fences by term and can be an older
 * image, and up to two processes at once, a stopped one and its successor. */
#include "tests/sim/sim.h"

#include <stdlib.h>
#include <string.h>

/* ---- the store --------------------------------------------------------------------------------- */

struct sim_row *sim_row_find(struct sim_table *t, uint64_t key) {
    if (key < t->count && t->rows[key].key == key) return &t->rows[key];
    for (uint32_t i = 0; i < t->count; i++)
        if (t->rows[i].key == key) return &t->rows[i];
    return NULL;
}

static struct sim_row *add_row(struct sim_table *t, uint64_t key) {
    if (t->count == t->capacity) {
        t->capacity = t->capacity ? 2 * t->capacity : 64;
        t->rows = realloc(t->rows, t->capacity * sizeof *t->rows);
    }
    t->rows[t->count] = (struct sim_row){.key = key};
    return &t->rows[t->count++];
}

void sim_store_write(struct sim_world *w, uint64_t term, const struct core_write *write) {
    struct sim_table *t = &w->store.table[write->table];
    struct sim_row *r = sim_row_find(t, write->key);
    if (!write->value) {
        if (!r) return;
        free(r->value);
        *r = t->rows[--t->count];
        return;
    }
    if (r && write->table == CORE_LEDGER)
        sim_violation(w, "ledger entry %llu is written a second time", LLU(write->key));
    if (!r) r = add_row(t, write->key);
    free(r->value);
    r->value = malloc(write->value_length);
    memcpy(r->value, write->value, write->value_length);
    r->length = write->value_length;
    if (write->is_signed) r->signature = write->signature;
    else if (write->table == CORE_LEDGER)
        proto_sign(write->key < 2 ? &w->root : &w->online, "ledger", &w->run,
                   write->key < 2 ? 0 : term, r->value, r->length, &r->signature);
}

void sim_store_release(struct sim_store *s) {
    for (int t = 0; t < CORE_TABLES; t++) {
        for (uint32_t i = 0; i < s->table[t].count; i++) free(s->table[t].rows[i].value);
        free(s->table[t].rows);
        s->table[t] = (struct sim_table){0};
    }
}

void sim_store_copy(struct sim_store *to, const struct sim_store *from) {
    sim_store_release(to);
    to->term = from->term;
    for (int t = 0; t < CORE_TABLES; t++)
        for (uint32_t i = 0; i < from->table[t].count; i++) {
            const struct sim_row *r = &from->table[t].rows[i];
            struct sim_row *copy = add_row(&to->table[t], r->key);
            *copy = *r;
            copy->value = malloc(r->length ? r->length : 1);
            memcpy(copy->value, r->value, r->length);
        }
}

/* ---- life and death ---------------------------------------------------------------------------- */

struct sim_core *sim_core_of(struct sim_world *w, uint32_t number) {
    for (int i = 0; i < SIM_CORES; i++)
        if (number && w->cores[i].number == number) return &w->cores[i];
    return NULL;
}

struct sim_core *sim_core_active(struct sim_world *w) {
    return w->cores[w->active].core ? &w->cores[w->active] : NULL;
}

/* restart: somebody starts another one in a while. */
void sim_core_kill(struct sim_world *w, struct sim_core *c, bool restart) {
    if (!c || !c->core) return;
    sim_trace(w, "the coordinator of term %llu dies", LLU(c->term));
    struct sim_table *ledger = &w->store.table[CORE_LEDGER];
    if (ledger->count >= w->truth_count && w->announced_head + 1 > ledger->count)
        sim_violation(w,
                      "ledger entry %llu was announced and died with the coordinator, which had "
                      "not made it durable",
                      LLU(w->announced_head));
    core_destroy(c->core);
    c->core = NULL;
    for (uint32_t i = 0; i < SIM_CONNS; i++) {
        struct sim_conn *k = &w->conns[i];
        if (!k->number || k->core != c->number || w->member[k->member].conn != k->number) continue;
        k->broken = true;
        sim_schedule(w, 1 + sim_random(w, w->delay_ms_max), SIM_MEMBER_CLOSED, k->member)->conn =
            k->number;
    }
    c->number = 0;
    c->dies_after = 0;
    c->paused_until = c->input_until = 0;
    if (restart) sim_schedule(w, 200 + sim_random(w, 8000), SIM_CORE_START, SIM_COORDINATOR);
}

static void core_event(struct sim_world *w, struct sim_core *c, const struct core_event *ev);

static void load_store(struct sim_world *w, struct sim_core *c) {
    struct err err = {0};
    for (int t = 0; t < CORE_TABLES; t++)
        for (uint64_t i = 0; i < w->store.table[t].count; i++) {
            struct sim_row *r = t == CORE_LEDGER ? sim_row_find(&w->store.table[t], i)
                                                 : &w->store.table[t].rows[i];
            if (!r) sim_violation(w, "the ledger has a hole at %llu", LLU(i));
            if (core_load(c->core, (enum core_table)t, r->key, r->value, r->length, &err))
                sim_violation(w, "the coordinator does not load its own store: %s", err.msg);
        }
}

static void start(struct sim_world *w, struct sim_core *c) {
    struct err err = {0};
    if (oracle_has_ended(w)) return; /* the process before it died before it said so */
    struct core_event ev = {.type = CORE_EV_START, .hold_ms = w->hold_ms};
    w->store.term += 1 + (w->store.term ? sim_random(w, 1000) : 0); /* as store_raise_term() */
    c->term = ev.term = w->store.term;
    sim_trace(w, "a coordinator starts, term %llu", LLU(c->term));
    for (uint32_t i = 0; i < sizeof ev.seed.b; i++) ev.seed.b[i] = (uint8_t)sim_random(w, 256);
    c->core = core_create(&w->genesis, &w->run, &w->member[0].identity.key, &err);
    if (!c->core) sim_violation(w, "core_create: %s", err.msg);
    w->hold_ms = 0;
    w->taking_over = false;
    load_store(w, c);
    core_event(w, c, &ev);
}

/* A process starts, beside another one where that still runs. */
void sim_core_start(struct sim_world *w) {
    if (w->cores[w->active].core) w->active ^= 1;
    struct sim_core *c = &w->cores[w->active];
    if (c->core) return; /* two run already */
    c->number = ++w->core_number;
    c->dies_after = 0;
    c->paused_until = c->input_until = 0;
    start(w, c);
    if (c->core) sim_schedule(w, CORE_TICK_MS, SIM_CORE_TICK, SIM_COORDINATOR)->life = c->number;
}

/* ---- actions ----------------------------------------------------------------------------------- */

/* The entry as the shell would have it: from the store, or, for the first one of a core that announces
 * too early, from the transaction that is still to come. */
static bool entry_at(struct sim_world *w, const struct sim_core *core, uint64_t index, bool first,
                     struct msg_signed_entry *out) {
    struct sim_row *r = sim_row_find(&w->store.table[CORE_LEDGER], index);
    if (r) {
        *out = (struct msg_signed_entry){.bytes = {r->value, r->length}, .signature = r->signature};
        return true;
    }
    for (uint32_t i = 0; first && i < core->out.count; i++) {
        struct core_action *a = &core->out.list[i];
        for (uint32_t k = 0; a->type == CORE_ACT_PERSIST && k < a->write_count; k++) {
            struct core_write *x = &a->writes[k];
            if (x->table != CORE_LEDGER || x->key != index) continue;
            out->bytes = (struct proto_bytes){x->value, x->value_length};
            proto_sign(&w->online, "ledger", &w->run, core->term, x->value, x->value_length,
                       &out->signature);
            return true;
        }
    }
    return false;
}

static void send_ledger(struct sim_world *w, const struct sim_core *core, struct sim_conn *c,
                        const struct core_action *a) {
    struct msg_signed_entry entries[PROTO_LEDGER_BATCH_MAX];
    struct msg_ledger ledger = {.entries = entries};
    for (uint64_t i = a->from; ledger.entries_count < PROTO_LEDGER_BATCH_MAX &&
                               entry_at(w, core, i, i == a->from, &entries[ledger.entries_count]);
         i++) {
        struct digest d = LEDGER_DIGEST(&entries[ledger.entries_count]);
        if (i < SIM_ENTRIES_MAX && w->entry_known[i] && !digest_equal(&d, &w->entry_seen[i]))
            sim_violation(w, "two ledger entries with index %llu were announced", LLU(i));
        if (i < SIM_ENTRIES_MAX) w->entry_known[i] = true, w->entry_seen[i] = d;
        if (i > w->announced_head) w->announced_head = i;
        ledger.entries_count++;
    }
    if (ledger.entries_count)
        sim_conn_send(w, c, false, MSG_LEDGER,
                      (struct frame){.term = core->term, .session = a->session, .plan = a->plan},
                      &ledger);
}

static void count_plan(struct sim_world *w, uint64_t number, const struct msg_plan *p) {
    uint64_t *last = w->planned[p->fragment < w->fragments ? p->fragment : 0];
    bool other = number != last[0], same_round = p->round == last[1];
    last[0] = number;
    last[1] = p->round;
    if (!other) return;
    w->injected[p->resum ? SIM_RESUM : SIM_HANDOVER] += p->resum || same_round;
    sim_fault_at_plan(w, p);
}

static void send(struct sim_world *w, const struct sim_core *core, struct sim_conn *c,
                 struct core_action *a) {
    struct frame f = {.term = core->term, .session = a->session, .plan = a->plan};
    if (a->message == MSG_ROSTER) {
        struct msg_roster *r = a->msg;
        proto_sign(&w->online, "roster", &w->run, core->term, r->body.data, r->body.length,
                   &r->signature);
    }
    if (a->message == MSG_PLAN) count_plan(w, a->plan, a->msg);
    if (a->message == MSG_AUDIT) oracle_audit_asked(w, core->term, a->plan, a->msg);
    sim_conn_send(w, c, false, a->message, f, a->msg);
}

static void sign_checkpoint(struct sim_world *w, const struct sim_core *core, struct sim_conn *c,
                            const struct core_action *a) {
    const struct msg_checkpoint_sign *s = a->msg;
    sim_share_signed(w, core->term, s->index);
    struct msg_checkpoint_signed answer = {.index = s->index};
    proto_sign(&w->online, "manifest", &w->run, core->term, s->manifest.data, s->manifest.length,
               &answer.signature);
    sim_conn_send(w, c, false, MSG_CHECKPOINT_SIGNED,
                  (struct frame){.term = core->term, .session = a->session, .plan = a->plan},
                  &answer);
}

static void close_conn(struct sim_world *w, const struct sim_core *core, struct sim_conn *c,
                       const struct core_action *a) {
    struct msg_bye bye = {.code = (uint8_t)a->code, .final = a->final, .reason = proto_str(a->text)};
    oracle_closed(w, c, a->code);
    sim_trace(w, "coordinator closes slot %u: %s", c->member, a->text);
    sim_conn_send(w, c, false, MSG_BYE, (struct frame){.term = core->term, .session = a->session},
                  &bye);
    sim_conn_close(w, c, true);
}

/* False: the process has ended. */
static bool persist(struct sim_world *w, struct sim_core *core, const struct core_action *a) {
    if (core->term != w->store.term) {
        sim_trace(w, "the store refuses the coordinator of term %llu", LLU(core->term));
        w->injected[SIM_FENCED]++;
        sim_core_kill(w, core, !sim_core_active(w) || core == &w->cores[w->active]);
        return false;
    }
    for (uint32_t i = 0; i < a->write_count; i++) {
        sim_store_write(w, core->term, &a->writes[i]);
        w->taking_over |= a->writes[i].is_signed;
    }
    oracle_persist(w, a);
    return core->core; /* a fault may have struck at this commit */
}

/* Entries of a newer ledger were taken over: a new core over the same store. */
static void restart(struct sim_world *w, struct sim_core *core, const struct core_action *a) {
    uint64_t seen = a->term;
    w->injected[SIM_TAKE_OVER]++;
    sim_core_kill(w, core, false);
    if (seen > w->store.term) w->store.term = seen;
    w->hold_ms = w->outer.silence_ms_max;
    if (w->now + w->hold_ms < w->shown_until) w->hold_ms = w->shown_until - w->now;
    w->taking_over = false;
    sim_core_start(w);
}

/* False: nothing after it is carried out. */
static bool perform_one(struct sim_world *w, struct sim_core *core, struct core_action *a) {
    struct sim_conn *c = a->conn ? sim_conn_find(w, a->conn) : NULL;
    if (c && c->core != core->number) c = NULL;
    switch (a->type) {
    case CORE_ACT_PERSIST: return persist(w, core, a);
    case CORE_ACT_SEND:
        if (c) send(w, core, c, a);
        break;
    case CORE_ACT_SEND_LEDGER:
        if (c) send_ledger(w, core, c, a);
        break;
    case CORE_ACT_SIGN:
        if (c) sign_checkpoint(w, core, c, a);
        break;
    case CORE_ACT_KNOWN: break;
    case CORE_ACT_LISTEN: break;
    case CORE_ACT_CLOSE:
        if (c) close_conn(w, core, c, a);
        break;
    case CORE_ACT_RESTART: restart(w, core, a); return false;
    case CORE_ACT_FAIL: oracle_failed(w, core, a->text); return false;
    case CORE_ACT_LOG: sim_trace(w, "coordinator: %s", a->text); break;
    }
    return true;
}

static void core_event(struct sim_world *w, struct sim_core *c, const struct core_event *ev) {
    uint32_t number = c->number;
    core_actions_clear(&c->out);
    core_step(c->core, ev, w->now, &c->out);
    for (uint32_t i = 0; i < c->out.count; i++) {
        if (!perform_one(w, c, &c->out.list[i]) || c->number != number) return;
        if (c->dies_after && --c->dies_after == 0) {
            w->injected[SIM_CORE_DISK]++;
            sim_core_kill(w, c, c == &w->cores[w->active]);
            return;
        }
    }
    if (w->outer.fixed_membership) oracle_stepped(w, c);
}

/* ---- events ------------------------------------------------------------------------------------ */

static void on_message(struct sim_world *w, struct sim_core *core, struct sim_event *e) {
    union sim_record record;
    struct err err;
    struct core_invite invite = {
        .found = true,
        .id = e->member + 1,
        .record = {.uses_left = 1, .expires_ms = UINT64_MAX, .aggregate_only = e->member == 0}};
    struct sim_conn *c = sim_conn_find(w, e->conn);
    if (!c || !c->open) return;
    if (e->frame.type != MSG_HEARTBEAT)
        sim_trace(w, "    %u > C %s", e->member, proto_type_name(e->frame.type));
    sim_decode(w, e, &record);
    struct core_event ev = {
        .type = CORE_EV_MESSAGE, .conn = e->conn, .frame = e->frame, .msg = &record};
    if (e->frame.type == MSG_ENROL) {
        struct sim_row *row = sim_row_find(&w->store.table[CORE_INVITE], invite.id);
        if (row &&
            proto_decode(row->value, row->length, RECORD_invite_record, &invite.record, &err))
            sim_violation(w, "invite row: %s", err.msg);
        ev.invite = &invite;
    }
    oracle_received(w, &w->member[e->member], &e->frame, &record);
    core_event(w, core, &ev);
    proto_decoded_release((enum proto_record)proto_record_of_type(e->frame.type), &record);
}

/* The WELCOME leaves before the core is told, so that a BYE comes after it. */
static void on_opened(struct sim_world *w, struct sim_core *core, struct sim_conn *c) {
    struct core_event ev = {
        .type = CORE_EV_OPENED, .conn = c->number, .key = w->member[c->member].identity.key};
    uint64_t in_ms = 1 + sim_random(w, w->delay_ms_max);
    c->open = true;
    c->clear_at[0] = w->now + in_ms;
    sim_schedule(w, in_ms, SIM_MEMBER_WELCOME, c->member)->conn = c->number;
    snprintf(ev.host, sizeof ev.host, "192.0.2.%u", c->member);
    core_event(w, core, &ev);
}

static void on_operator(struct sim_world *w, struct sim_core *core, const struct sim_event *e) {
    struct sim_member *m = &w->member[e->member < SIM_MEMBERS_MAX ? e->member : 0];
    struct core_event ev = {.type = (enum core_event_type)e->value,
                            .member = m->id,
                            .text = "the operator of the simulator wants it"};
    if (ev.type == CORE_EV_REVOKE) {
        struct core_view v;
        core_look(core->core, w->now, &v);
        if (v.behind) { /* as the command says */
            sim_schedule(w, 1000, SIM_CORE_OPERATOR, e->member)->value = e->value;
            return;
        }
        if (!m->id) return;
        m->revoked = true;
    }
    core_event(w, core, &ev);
}

void sim_core_event(struct sim_world *w, struct sim_event *e) {
    struct sim_core *core = e->kind == SIM_CORE_OPERATOR ? sim_core_active(w)
                                                         : sim_core_of(w, e->life);
    struct sim_conn *c = sim_conn_find(w, e->conn);
    if (!core || !core->core) {
        /* The process that accepted this connection is gone. */
        if (e->kind == SIM_CORE_OPENED && c)
            sim_schedule(w, 1, SIM_MEMBER_CLOSED, c->member)->conn = c->number;
        return;
    }
    switch (e->kind) {
    case SIM_CORE_TICK:
        core_event(w, core, &(struct core_event){.type = CORE_EV_TICK});
        if (core->number == e->life)
            sim_schedule(w, CORE_TICK_MS, SIM_CORE_TICK, SIM_COORDINATOR)->life = core->number;
        break;
    case SIM_CORE_OPENED:
        if (c) on_opened(w, core, c);
        break;
    case SIM_TO_CORE: on_message(w, core, e); break;
    case SIM_CORE_CLOSED:
        if (!c || !c->open) break;
        c->open = false;
        core_event(w, core, &(struct core_event){.type = CORE_EV_CLOSED, .conn = c->number});
        break;
    case SIM_CORE_OPERATOR: on_operator(w, core, e); break;
    default: break;
    }
}
