/* member.c - a member's shell in the simulator: carries out what sync asks for, as the agent does. */
#include "tests/sim/sim.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

static void perform(struct sim_world *w, struct sim_member *m);

void sim_member_step(struct sim_world *w, struct sim_member *m, struct sync_event *ev) {
    struct err err = {0};
    if (!m->sync) return;
    m->disk.dead = false;
    sync_actions_clear(&w->sync_out);
    sync_fault = m->lie ? m->lie : w->sync_fault;
    int rc = sync_step(m->sync, ev, w->now, &w->sync_out, &err);
    sync_fault = w->sync_fault;
    if (rc && !m->disk.dead)
        sim_violation(w, "slot %u: sync failed although the disk did not: %s", m->slot, err.msg);
    if (rc) { /* what it emitted before it died may or may not have left: nothing of it has */
        w->injected[SIM_DISK]++;
        sim_member_kill(w, m, sim_chance(w, 500), 0);
        return;
    }
    uint32_t life = m->life;
    perform(w, m);
    if (m->life != life || !m->sync) return;
    oracle_member(w, m);
    if (sync_has_work(m->sync) && !m->work_queued) {
        m->work_queued = true;
        sim_schedule(w, 1, SIM_MEMBER_WORK, m->slot);
    }
}

/* ---- actions ----------------------------------------------------------------------------------- */

static void send_to_core(struct sim_world *w, struct sim_member *m, const struct sync_action *a) {
    struct sim_conn *c = sim_conn_find(w, m->conn);
    struct frame f = {.type = a->message, .term = a->term, .session = a->session, .plan = a->plan};
    oracle_to_core(w, m, a->message, &f, a->msg);
    if (c) sim_conn_send(w, c, true, a->message, f, a->msg);
}

static void take_roster(struct sim_world *w, struct sim_member *m, const struct msg_roster_body *r) {
    memset(m->roster, 0, sizeof m->roster);
    for (uint32_t i = 0; i < r->members_count; i++)
        if (r->members[i].member <= SIM_MEMBERS_MAX) m->roster[r->members[i].member] = true;
    for (uint32_t i = 0; i < SIM_MEMBERS_MAX; i++) { /* links of keys that left the roster end */
        uint64_t number = i == m->slot ? 0 : sim_link(w, m->slot, i)->number;
        if (!number || m->roster[w->member[i].id]) continue;
        sim_link_close(w, m->slot, i);
        struct sim_event *ev = sim_schedule(w, 1, SIM_PEER_CLOSED, m->slot);
        ev->peer = i, ev->conn = number;
    }
}

static void dial(struct sim_world *w, struct sim_member *m, const struct sync_action *a) {
    uint32_t to = a->port - 7000u;
    if (to >= SIM_MEMBERS_MAX)
        sim_violation(w, "slot %u dials port %u, where nobody listens", m->slot, a->port);
    if (to == m->slot) return; /* a copy of a home directory finds itself */
    struct sim_event *ev = sim_schedule(w, 1 + sim_random(w, w->delay_ms_max), SIM_PEER_DIAL,
                                        m->slot);
    ev->peer = to;
}

static void on_bye(struct sim_world *w, struct sim_member *m, const struct sync_action *a) {
    sim_trace(w, "slot %u: BYE %s%s", m->slot, a->text, a->final ? " (final)" : "");
    if (a->final && a->code == ERR_STALE && w->outer.fixed_membership) {
        oracle_ended(w, a->text); /* its coordinator died before it ended by itself */
        return;
    }
    if (a->final && a->code != ERR_NONE && !m->revoked && !m->copy)
        sim_violation(w, "slot %u was turned away for ever: %s", m->slot, a->text);
    if (!a->final) return;
    m->gone = m->complete = true;
    m->behind = strcmp(a->text, "run complete"); /* let go without the last state */
}

static void perform_one(struct sim_world *w, struct sim_member *m, struct sync_action *a) {
    struct sim_conn *c = sim_conn_find(w, m->conn);
    uint32_t to;
    switch (a->type) {
    case SYNC_ACT_SEND: send_to_core(w, m, a); break;
    case SYNC_ACT_DISCONNECT:
        if (c) sim_conn_close(w, c, false);
        break;
    case SYNC_ACT_PEER_DIAL: dial(w, m, a); break;
    case SYNC_ACT_PEER_SEND: sim_link_send(w, m, a); break;
    case SYNC_ACT_PEER_CLOSE:
        if ((to = sim_link_slot(w, m, a->peer)) < SIM_MEMBERS_MAX) sim_link_close(w, m->slot, to);
        break;
    case SYNC_ACT_ROSTER: take_roster(w, m, a->msg); break;
    case SYNC_ACT_TRAINER_SAMPLES:
    case SYNC_ACT_TRAINER_FREEZE:
    case SYNC_ACT_TRAINER_CONTINUE:
    case SYNC_ACT_TRAINER_APPLY:
    case SYNC_ACT_TRAINER_RESET:
    case SYNC_ACT_TRAINER_MOMENTS_EXPORT:
    case SYNC_ACT_TRAINER_MOMENTS_IMPORT: sim_trainer_action(w, m, a); break;
    case SYNC_ACT_CHECKPOINT_BEGIN:
        sim_checkpoint_keep(w, m, ((const struct msg_checkpoint_write *)a->msg)->index);
        sim_share_begin(w, m, a->msg);
        break;
    case SYNC_ACT_CHECKPOINT_PART_DONE: sim_share_answer(w, m, a->msg); break;
    case SYNC_ACT_CHECKPOINT_ALONE: sim_share_alone(w, m); break;
    case SYNC_ACT_CHECKPOINT_KEEP: break;
    case SYNC_ACT_CHECKPOINT_PART: sim_share_asked(w, m, a->msg); break;
    case SYNC_ACT_CHECKPOINT_SIGNED: sim_share_publish(w, m); break;
    case SYNC_ACT_BYE: on_bye(w, m, a); break;
    case SYNC_ACT_LOG: sim_trace(w, "slot %u: %s", m->slot, a->text); break;
    }
}

static void perform(struct sim_world *w, struct sim_member *m) {
    /* An action may make the member take another step later, never now: the list is ours to walk. */
    for (uint32_t i = 0; i < w->sync_out.count; i++) perform_one(w, m, &w->sync_out.list[i]);
    if (m->trains) sim_trainer_go(w, m);
}

/* ---- life and death ---------------------------------------------------------------------------- */

static int initial_values(void *arg, const struct msg_checkpoint *from, uint64_t first, size_t n,
                          float *anchor, float *momentum, struct err *err) {
    const struct sim_member *m = arg;
    struct sim_world *w = m->disk.world;
    if (from) return sim_checkpoint_load(w, m, from, first, n, anchor, momentum, err);
    outer_init_normal(anchor, w->genesis.init_seed, first, n, 0.02f);
    memset(momentum, 0, n * sizeof *momentum);
    return 0;
}

static void create_sync(struct sim_world *w, struct sim_member *m) {
    struct err err = {0};
    struct sync_config config = {.genesis = &w->genesis,
                                 .run = w->run,
                                 .identity = &m->identity,
                                 .instance = (w->order << 20 | m->slot) + 1,
                                 .member = m->id,
                                 .trains = m->trains,
                                 .port = m->reachable ? 7000 + m->slot : 0,
                                 .elements = w->elements,
                                 .load = initial_values,
                                 .load_arg = m};
    config.disk = sim_disk_ops(&m->disk);
    m->disk.dead = false;
    m->sync = sync_create(&config, w->now, &err);
    if (!m->sync && !m->disk.dead)
        sim_violation(w, "slot %u cannot start from its disk: %s", m->slot, err.msg);
    if (!m->sync) {
        sim_member_kill(w, m, false, 0);
        return;
    }
    sync_set_slot(m->sync, m->slot_values, m->slot_ops);
    oracle_start(w, m);
    oracle_member(w, m);
    sim_schedule(w, SYNC_TICK_MS, SIM_MEMBER_TICK, m->slot);
    if (m->trains) sim_schedule(w, 1 + sim_random(w, 200), SIM_TRAINER_UP, m->slot);
}

void sim_member_start(struct sim_world *w, struct sim_member *m) {
    m->alive = true;
    m->life++;
    m->work_queued = false;
    for (uint32_t c = 0; c < SIM_CHUNKS_MAX; c++) m->versions[c] = UINT64_MAX;
    sim_trace(w, "slot %u starts", m->slot);
    if (m->id) create_sync(w, m);
    if (m->alive) sim_schedule(w, 1 + sim_random(w, 100), SIM_MEMBER_DIAL, m->slot);
}

void sim_member_kill(struct sim_world *w, struct sim_member *m, bool power, uint64_t away_ms) {
    if (!m->alive) return;
    sim_trace(w, "slot %u dies%s", m->slot, power ? " with its machine" : "");
    m->alive = false;
    m->life++;
    sync_destroy(m->sync);
    m->sync = NULL;
    uint32_t generation = m->trainer.generation + 1;
    memset(&m->trainer, 0, sizeof m->trainer);
    m->trainer.generation = generation;
    m->uplink_clear = 0;
    if (power) sim_disk_lose_power(&m->disk);
    struct sim_conn *c = sim_conn_find(w, m->conn);
    if (c) sim_conn_close(w, c, false);
    m->conn = 0;
    sim_links_lose(w, m);
    if (m->gone || m->copy || away_ms == UINT64_MAX) return;
    sim_schedule(w, away_ms ? away_ms : 200 + sim_random(w, 8000), SIM_MEMBER_START, m->slot);
}

/* ---- the coordinator's link -------------------------------------------------------------------- */

static uint64_t conn_term(struct sim_world *w, const struct sim_conn *c) {
    struct sim_core *core = sim_core_of(w, c->core);
    return core ? core->term : 0;
}

static void connected(struct sim_world *w, struct sim_member *m, uint64_t term) {
    sim_member_step(w, m,
                    &(struct sync_event){.type = SYNC_EV_CONNECTED,
                                         .frame = {.type = MSG_WELCOME, .term = term}});
}

static void on_welcome(struct sim_world *w, struct sim_member *m, struct sim_conn *c) {
    char name[32];
    if (m->id) {
        connected(w, m, conn_term(w, c));
        return;
    }
    snprintf(name, sizeof name, "slot-%u", m->slot);
    struct msg_enrol enrol = {.name = proto_str(name), .aggregate_only = !m->trains};
    memset(enrol.secret.b, (int)m->slot + 1, sizeof enrol.secret.b);
    sim_conn_send(w, c, true, MSG_ENROL,
                  (struct frame){.type = MSG_ENROL, .term = conn_term(w, c)}, &enrol);
}

static void from_core(struct sim_world *w, struct sim_member *m, struct sim_event *e) {
    union sim_record record;
    if (m->conn != e->conn) return;
    if (e->frame.type != MSG_HEARTBEAT_ACK)
        sim_trace(w, "    C > %u %s", m->slot, proto_type_name(e->frame.type));
    sim_decode(w, e, &record);
    w->injected[SIM_COPY_IN] += m->copy && e->frame.type == MSG_HELLO_ACK;
    if (e->frame.type == MSG_ENROLLED && !m->sync) {
        m->id = ((const struct msg_enrolled *)(const void *)&record)->member;
        sim_trace(w, "slot %u is member %u", m->slot, m->id);
        if (m->id == 0 || m->id > SIM_MEMBERS_MAX)
            sim_violation(w, "slot %u is member %u", m->slot, m->id);
        create_sync(w, m);
        connected(w, m, e->frame.term);
    } else if (e->frame.type == MSG_BYE && !m->sync) {
        sim_trace(w, "slot %u turned away", m->slot);
    } else {
        sim_member_step(w, m,
                        &(struct sync_event){
                            .type = SYNC_EV_MESSAGE, .frame = e->frame, .msg = &record});
    }
    proto_decoded_release((enum proto_record)proto_record_of_type(e->frame.type), &record);
}

/* ---- links to other members --------------------------------------------------------------------- */

static void from_peer(struct sim_world *w, struct sim_member *m, struct sim_event *e,
                      struct sim_link *l) {
    union sim_record record;
    if (l->number != e->conn || !m->sync) return;
    if (--l->in_flight[e->peer > m->slot] == 0) {
        struct sim_event *d = sim_schedule(w, 1, SIM_PEER_DRAINED, e->peer);
        d->peer = m->slot, d->conn = l->number;
    }
    sim_decode(w, e, &record);
    sim_trace(w, "    %u > %u %s", e->peer, m->slot, proto_type_name(e->frame.type));
    struct sync_event ev = {.type = SYNC_EV_PEER_MESSAGE,
                            .peer = w->member[e->peer].id,
                            .frame = e->frame,
                            .msg = &record};
    sim_member_step(w, m, &ev);
    proto_decoded_release((enum proto_record)proto_record_of_type(e->frame.type), &record);
}

static void peer_event(struct sim_world *w, struct sim_member *m, struct sim_event *e) {
    struct sim_link *l = sim_link(w, m->slot, e->peer);
    struct sync_event ev = {.type = SYNC_EV_PEER_OPEN, .peer = w->member[e->peer].id};
    switch (e->kind) {
    case SIM_TO_PEER: from_peer(w, m, e, l); return;
    case SIM_PEER_DIAL: sim_link_dial(w, m, e->peer); return;
    case SIM_PEER_OPENED:
        if (l->number != e->conn) return;
        break;
    case SIM_PEER_DRAINED:
        if (l->number != e->conn) return;
        ev.type = SYNC_EV_PEER_DRAINED;
        break;
    default: /* a dial that failed, or the end of a link that nothing has replaced */
        if (l->number && l->number != e->conn) return;
        if (e->conn) memset(l, 0, sizeof *l);
        if (sim_link_slot(w, m, ev.peer) < SIM_MEMBERS_MAX) return; /* its key has another one */
        ev.type = SYNC_EV_PEER_CLOSED;
    }
    sim_member_step(w, m, &ev);
}

/* ---- events ------------------------------------------------------------------------------------ */

static void on_checkpoint(struct sim_world *w, struct sim_member *m, bool done) {
    struct sync_event ev = {.type = SYNC_EV_CHECKPOINT, .done = done, .ok = true, .text = ""};
    ev.manifest = proto_str("{\"manifest\":\"of a simulated checkpoint\"}");
    ev.manifest_digest = digest_of(ev.manifest.data, ev.manifest.length);
    if (done) w->checkpoints++;
    sim_member_step(w, m, &ev);
}

static bool is_void(const struct sim_member *m, const struct sim_event *e) {
    switch (e->kind) {
    case SIM_TRAINER_STEP:
    case SIM_TRAINER_REPLY:
    case SIM_TRAINER_UP: return e->life != m->trainer.generation;
    case SIM_TO_MEMBER:
    case SIM_TO_PEER: return false;
    default: return e->life != m->life;
    }
}

void sim_member_event(struct sim_world *w, struct sim_member *m, struct sim_event *e) {
    struct sim_conn *c = sim_conn_find(w, e->conn);
    if (!m->alive || is_void(m, e)) return;
    switch (e->kind) {
    case SIM_MEMBER_TICK:
        sim_member_step(w, m, &(struct sync_event){.type = SYNC_EV_TICK});
        if (m->alive && e->life == m->life) sim_schedule(w, SYNC_TICK_MS, SIM_MEMBER_TICK, m->slot);
        break;
    case SIM_MEMBER_WORK:
        m->work_queued = false;
        sim_member_step(w, m, &(struct sync_event){.type = SYNC_EV_WORK});
        break;
    case SIM_MEMBER_WELCOME:
        if (c && m->conn == e->conn) on_welcome(w, m, c);
        break;
    case SIM_TO_MEMBER: from_core(w, m, e); break;
    case SIM_MEMBER_CLOSED:
        if (m->conn != e->conn) break;
        m->conn = 0;
        sim_member_step(w, m, &(struct sync_event){.type = SYNC_EV_DISCONNECTED});
        if (m->alive && !m->gone)
            sim_schedule(w, 100 + sim_random(w, 1500), SIM_MEMBER_DIAL, m->slot);
        break;
    case SIM_TRAINER_UP:
    case SIM_TRAINER_STEP:
    case SIM_TRAINER_REPLY: sim_trainer_event(w, m, e); break;
    case SIM_CHECKPOINT:
        if (e->frame.plan == w->share.index) on_checkpoint(w, m, e->value == 1);
        break;
    case SIM_PART: sim_share_event(w, m, e); break;
    default: peer_event(w, m, e);
    }
}
