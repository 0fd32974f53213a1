/* member.c - a member's shell in the simulator: carries out what sync asks for, with a simulated
 * trainer. A sample moves the simulated parameters by a fixed small vector, so that what is in the
 * parameters can be compared with what the member claims. */
#include "tests/sim/sim.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

static void perform(struct sim_world *w, struct sim_member *m);

static void step(struct sim_world *w, struct sim_member *m, struct sync_event *ev) {
    struct err err = {0};
    if (!m->sync) return;
    m->disk.dead = false;
    sync_actions_clear(&w->sync_out);
    int rc = sync_step(m->sync, ev, w->now, &w->sync_out, &err);
    if (rc && !m->disk.dead)
        sim_violation(w, "slot %u: sync failed although the disk did not: %s", m->slot, err.msg);
    if (rc) { /* what it emitted before it died may or may not have left: nothing of it has */
        sim_member_kill(w, m, sim_chance(w, 500));
        return;
    }
    m->disk.dies_after = 0;
    uint32_t life = m->life;
    perform(w, m);
    if (m->life != life || !m->sync) return;
    oracle_member(w, m);
    if (sync_has_work(m->sync) && !m->work_queued) {
        m->work_queued = true;
        sim_schedule(w, 1, SIM_MEMBER_WORK, m->slot);
    }
}

/* ---- the trainer ----------------------------------------------------------------------------- */

static void train_on(struct sim_world *w, struct sim_member *m, uint64_t sample) {
    struct sim_trainer *t = &m->trainer;
    if (proto_set_has(t->effect, (uint32_t)sample))
        sim_violation(w, "slot %u trains sample %llu twice without a reset between", m->slot,
                      (unsigned long long)sample);
    proto_set_add(t->effect, (uint32_t)sample);
    for (uint32_t i = 0; i < w->elements; i++) {
        uint64_t h = (sample * 0x9e3779b97f4a7c15ull + i) * 0xbf58476d1ce4e5b9ull;
        t->local[i] += (float)((int)(h >> 40 & 1023) - 512) * 1e-5f;
    }
}

static void trainer_plan_step(struct sim_world *w, struct sim_member *m) {
    struct sim_trainer *t = &m->trainer;
    if (!t->alive || !t->has_parameters || t->stepping || t->frozen) return;
    if (t->freeze_asked) {
        t->freeze_asked = false;
        t->frozen = true;
        sim_schedule(w, 1, SIM_TRAINER_REPLY, m->slot)->value = SYNC_EV_TRAINER_FROZEN;
    } else if (t->queued) {
        t->stepping = true;
        sim_schedule(w, 1 + sim_random(w, 2 * m->step_ms), SIM_TRAINER_STEP, m->slot);
    }
}

static void trainer_step(struct sim_world *w, struct sim_member *m) {
    struct sim_trainer *t = &m->trainer;
    t->stepping = false;
    for (uint32_t b = 0; b < w->inner.batch && t->queued; b++) {
        train_on(w, m, t->queue[0].start++);
        t->samples++;
        if (--t->queue[0].count == 0)
            memmove(t->queue, t->queue + 1, --t->queued * sizeof *t->queue);
    }
    t->steps++;
    struct sync_event ev = {.type = SYNC_EV_TRAINER_STEP,
                            .samples = t->samples,
                            .steps = t->steps,
                            .loss = 5.0,
                            .tokens_per_s = 1000};
    uint32_t life = t->generation;
    step(w, m, &ev);
    if (t->generation == life) trainer_plan_step(w, m);
}

static void trainer_reply(struct sim_world *w, struct sim_member *m, uint64_t what) {
    struct sim_trainer *t = &m->trainer;
    struct sync_event ev = {.type = (enum sync_event_type)what,
                            .samples = t->samples,
                            .steps = t->steps,
                            .local = what == SYNC_EV_TRAINER_MOMENTS ? t->moments : t->local,
                            .loss = 5.0};
    uint32_t life = t->generation;
    if (what == SYNC_EV_TRAINER_FROZEN) memcpy(m->frozen_effect, t->effect, sizeof t->effect);
    step(w, m, &ev);
    if (t->generation == life) trainer_plan_step(w, m);
}

static void trainer_apply(struct sim_world *w, struct sim_member *m, bool reset) {
    struct sim_trainer *t = &m->trainer;
    bool mixed = false;
    if (!t->alive)
        sim_violation(w, "slot %u: %s for a dead trainer", m->slot, reset ? "RESET" : "APPLY");
    for (uint32_t c = 0; c < w->chunks; c++) {
        uint32_t first = c * w->chunk_elements;
        uint32_t n =
            w->elements - first < w->chunk_elements ? w->elements - first : w->chunk_elements;
        for (uint32_t i = first; i < first + n; i++) {
            if (reset) t->local[i] = m->slot_values[i];
            else if (m->slot_ops[c] == SYNC_OP_MIX)
                t->local[i] = m->slot_values[i]; /* alpha is 0 here */
            else if (m->slot_ops[c] == SYNC_OP_ADD) t->local[i] += m->slot_values[i];
        }
        mixed |= m->slot_ops[c] == SYNC_OP_MIX;
    }
    if (reset) t->queued = 0;
    if (reset || mixed) memset(t->effect, 0, sizeof t->effect); /* into the anchor, or away */
    if (reset) t->samples = 0;
    t->has_parameters = true;
    t->frozen = t->freeze_asked = false;
    sim_schedule(w, 1, SIM_TRAINER_REPLY, m->slot)->value = SYNC_EV_TRAINER_APPLIED;
}

void sim_trainer_kill(struct sim_world *w, struct sim_member *m) {
    struct sim_trainer *t = &m->trainer;
    if (!m->trains || !t->alive) return;
    uint32_t generation = t->generation + 1;
    memset(t, 0, sizeof *t);
    t->generation = generation;
    sim_trace(w, "slot %u: trainer dies", m->slot);
    step(w, m, &(struct sync_event){.type = SYNC_EV_TRAINER_DOWN});
    sim_schedule(w, 100 + sim_random(w, 1000), SIM_TRAINER_UP, m->slot);
}

/* ---- actions ----------------------------------------------------------------------------------
 */

static void send_to_core(struct sim_world *w, struct sim_member *m, const struct sync_action *a) {
    struct sim_conn *c = sim_conn_find(w, m->conn);
    if (a->message == MSG_READY) oracle_ready(w, m, a->msg);
    if (!c) return;
    struct frame f = {.type = a->message, .term = a->term, .session = a->session, .plan = a->plan};
    sim_conn_send(w, c, true, a->message, f, a->msg);
}

static void peer_send(struct sim_world *w, struct sim_member *m, const struct sync_action *a) {
    uint32_t to = SIM_MEMBERS_MAX;
    for (uint32_t i = 0; i < w->members; i++)
        if (w->member[i].id == a->peer) to = i;
    if (to == SIM_MEMBERS_MAX || to == m->slot)
        sim_violation(w, "slot %u sends %s to member %u, which is no other member", m->slot,
                      proto_type_name(a->message), a->peer);
    struct sim_link *l = &w->links[m->slot < to ? m->slot : to][m->slot < to ? to : m->slot];
    if (!l->number) {
        struct sim_event *ev = sim_schedule(w, 1, SIM_PEER_CLOSED, m->slot);
        ev->peer = to;
        return;
    }
    if (l->broken) return; /* into the void */
    if (a->message == MSG_CHUNK) oracle_chunk(w, a->term, a->plan, a->msg);
    uint32_t copies = sim_chance(w, w->duplicate_per_mille) ? 2 : 1;
    while (copies--) {
        uint64_t *clear = &l->clear_at[m->slot > to],
                 at = w->now + 1 + sim_random(w, w->delay_ms_max);
        if (at < *clear) at = *clear;
        *clear = at;
        struct sim_event *ev = sim_schedule(w, at - w->now, SIM_TO_PEER, to);
        ev->peer = m->slot, ev->conn = l->number;
        ev->frame = (struct frame){
            .type = a->message, .term = a->term, .session = a->session, .plan = a->plan};
        sim_encode(w, a->message, a->msg, ev);
        l->in_flight[m->slot > to]++;
    }
}

static void perform_one(struct sim_world *w, struct sim_member *m, struct sync_action *a) {
    struct sim_trainer *t = &m->trainer;
    struct sim_event *ev;
    switch (a->type) {
    case SYNC_ACT_SEND: send_to_core(w, m, a); break;
    case SYNC_ACT_DISCONNECT:
        if (m->conn && sim_conn_find(w, m->conn))
            sim_conn_close(w, sim_conn_find(w, m->conn), false);
        break;
    case SYNC_ACT_PEER_DIAL:
        for (uint32_t i = 0; i < w->members; i++) {
            if (w->member[i].id != a->peer || i == m->slot) continue;
            ev = sim_schedule(w, 1 + sim_random(w, w->delay_ms_max), SIM_PEER_DIAL, m->slot);
            ev->peer = i;
        }
        break;
    case SYNC_ACT_PEER_SEND: peer_send(w, m, a); break;
    case SYNC_ACT_PEER_CLOSE:
        for (uint32_t i = 0; i < w->members; i++) {
            struct sim_link *l = &w->links[m->slot < i ? m->slot : i][m->slot < i ? i : m->slot];
            if (w->member[i].id != a->peer || !l->number) continue;
            ev = sim_schedule(w, w->delay_ms_max, SIM_PEER_CLOSED, i);
            ev->peer = m->slot, ev->conn = l->number;
            memset(l, 0, sizeof *l);
        }
        break;
    case SYNC_ACT_ROSTER: {
        const struct msg_roster_body *r = a->msg;
        memset(m->roster, 0, sizeof m->roster);
        for (uint32_t i = 0; i < r->members_count; i++)
            if (r->members[i].member <= SIM_MEMBERS_MAX) m->roster[r->members[i].member] = true;
        break;
    }
    case SYNC_ACT_TRAINER_SAMPLES:
        if (!t->alive) sim_violation(w, "slot %u: samples for a dead trainer", m->slot);
        if (t->queued == 64)
            sim_violation(w, "slot %u: more than 64 ranges queued for the trainer", m->slot);
        t->queue[t->queued++] = (struct sim_range){a->start, a->count};
        break;
    case SYNC_ACT_TRAINER_FREEZE: t->freeze_asked = true; break;
    case SYNC_ACT_TRAINER_CONTINUE: t->frozen = t->freeze_asked = false; break;
    case SYNC_ACT_TRAINER_APPLY: trainer_apply(w, m, false); break;
    case SYNC_ACT_TRAINER_RESET: trainer_apply(w, m, true); break;
    case SYNC_ACT_TRAINER_MOMENTS_EXPORT:
        sim_schedule(w, 1, SIM_TRAINER_REPLY, m->slot)->value = SYNC_EV_TRAINER_MOMENTS;
        break;
    case SYNC_ACT_TRAINER_MOMENTS_IMPORT:
        sim_schedule(w, 1, SIM_TRAINER_REPLY, m->slot)->value = SYNC_EV_TRAINER_APPLIED;
        break;
    case SYNC_ACT_CHECKPOINT_BEGIN:
        ev = sim_schedule(w, 50 + sim_random(w, 500), SIM_CHECKPOINT, m->slot);
        ev->value = 0;
        break;
    case SYNC_ACT_CHECKPOINT_SIGNED:
        ev = sim_schedule(w, 10, SIM_CHECKPOINT, m->slot);
        ev->value = 1;
        break;
    case SYNC_ACT_BYE:
        sim_trace(w, "slot %u: BYE %s%s", m->slot, a->text, a->final ? " (final)" : "");
        if (a->final && a->code != ERR_NONE)
            sim_violation(w, "slot %u was turned away for ever: %s", m->slot, a->text);
        if (a->final) m->gone = m->complete = true;
        break;
    case SYNC_ACT_LOG: sim_trace(w, "slot %u: %s", m->slot, a->text); break;
    }
    if (m->trains) trainer_plan_step(w, m);
}

static void perform(struct sim_world *w, struct sim_member *m) {
    /* An action may make the member take another step later, never now: the list is ours to walk.
     */
    for (uint32_t i = 0; i < w->sync_out.count; i++) perform_one(w, m, &w->sync_out.list[i]);
}

/* ---- life and death -----------------------------------------------------------------------------
 */

static int initial_values(void *arg, const struct msg_checkpoint *from, uint64_t first, size_t n,
                          float *anchor, float *momentum, struct err *err) {
    struct sim_world *w = arg;
    if (from) return err_set(err, ERR_NOT_FOUND, "no checkpoints here");
    outer_init_normal(anchor, w->genesis.init_seed, first, n, 0.02f);
    memset(momentum, 0, n * sizeof *momentum);
    return 0;
}

static void create_sync(struct sim_world *w, struct sim_member *m) {
    struct err err = {0};
    struct sync_config config = {.genesis = &w->genesis,
                                 .run = w->run,
                                 .identity = &m->identity,
                                 .member = m->id,
                                 .trains = m->trains,
                                 .port = m->reachable ? 7000 + m->slot : 0,
                                 .elements = w->elements,
                                 .load = initial_values,
                                 .load_arg = w};
    config.disk = sim_disk_ops(&m->disk);
    m->disk.dead = false;
    m->sync = sync_create(&config, w->now, &err);
    if (!m->sync && !m->disk.dead)
        sim_violation(w, "slot %u cannot start from its disk: %s", m->slot, err.msg);
    if (!m->sync) {
        sim_member_kill(w, m, false);
        return;
    }
    m->disk.dies_after = 0;
    sync_set_slot(m->sync, m->slot_values, m->slot_ops);
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

void sim_member_kill(struct sim_world *w, struct sim_member *m, bool power) {
    if (!m->alive) return;
    sim_trace(w, "slot %u dies%s", m->slot, power ? " with its machine" : "");
    m->alive = false;
    m->life++;
    m->disk.dies_after = 0;
    sync_destroy(m->sync);
    m->sync = NULL;
    uint32_t generation = m->trainer.generation + 1;
    memset(&m->trainer, 0, sizeof m->trainer);
    m->trainer.generation = generation;
    if (power) sim_disk_lose_power(&m->disk);
    struct sim_conn *c = sim_conn_find(w, m->conn);
    if (c) sim_conn_close(w, c, false);
    m->conn = 0;
    for (uint32_t i = 0; i < w->members; i++) {
        struct sim_link *l = &w->links[m->slot < i ? m->slot : i][m->slot < i ? i : m->slot];
        if (i == m->slot || !l->number) continue;
        struct sim_event *ev = sim_schedule(w, 1 + sim_random(w, 200), SIM_PEER_CLOSED, i);
        ev->peer = m->slot, ev->conn = l->number;
        memset(l, 0, sizeof *l);
    }
    if (!m->gone) sim_schedule(w, 200 + sim_random(w, 8000), SIM_MEMBER_START, m->slot);
}

/* ---- the coordinator's link
 * ---------------------------------------------------------------------- */

static void connected(struct sim_world *w, struct sim_member *m) {
    step(w, m,
         &(struct sync_event){.type = SYNC_EV_CONNECTED,
                              .frame = {.type = MSG_WELCOME, .term = w->term}});
}

static void on_welcome(struct sim_world *w, struct sim_member *m, struct sim_conn *c) {
    if (m->id) {
        connected(w, m);
        return;
    }
    char name[32];
    snprintf(name, sizeof name, "slot-%u", m->slot);
    struct msg_enrol enrol = {.name = proto_str(name), .aggregate_only = !m->trains};
    memset(enrol.secret.b, (int)m->slot + 1, sizeof enrol.secret.b);
    sim_conn_send(w, c, true, MSG_ENROL, (struct frame){.type = MSG_ENROL, .term = w->term},
                  &enrol);
}

static void on_core_message(struct sim_world *w, struct sim_member *m, struct sim_event *e,
                            const void *msg) {
    if (e->frame.type == MSG_ENROLLED && !m->sync) {
        m->id = ((const struct msg_enrolled *)msg)->member;
        sim_trace(w, "slot %u is member %u", m->slot, m->id);
        create_sync(w, m);
        connected(w, m);
    } else if (e->frame.type == MSG_BYE && !m->sync) {
        sim_trace(w, "slot %u turned away", m->slot);
    } else {
        step(w, m, &(struct sync_event){.type = SYNC_EV_MESSAGE, .frame = e->frame, .msg = msg});
    }
}

static void dial_peer(struct sim_world *w, struct sim_member *m, uint32_t to) {
    struct sim_member *other = &w->member[to];
    struct sim_link *l = &w->links[m->slot < to ? m->slot : to][m->slot < to ? to : m->slot];
    if (l->number) return;
    if (!other->alive || !other->reachable || sim_is_cut(w, m->slot, to) || !other->roster[m->id] ||
        !m->roster[other->id]) {
        struct sim_event *ev = sim_schedule(w, 1 + sim_random(w, 100), SIM_PEER_CLOSED, m->slot);
        ev->peer = to;
        return;
    }
    l->number = ++w->link_next;
    l->clear_at[0] = l->clear_at[1] = w->now;
    l->in_flight[0] = l->in_flight[1] = 0;
    for (int side = 0; side < 2; side++) {
        struct sim_event *ev = sim_schedule(w, 1, SIM_PEER_OPENED, side ? to : m->slot);
        ev->peer = side ? m->slot : to, ev->conn = l->number;
    }
}

static void on_checkpoint(struct sim_world *w, struct sim_member *m, bool done) {
    struct sync_event ev = {.type = SYNC_EV_CHECKPOINT, .done = done, .ok = true, .text = ""};
    ev.manifest = proto_str("{\"manifest\":\"of a simulated checkpoint\"}");
    ev.manifest_digest = digest_of(ev.manifest.data, ev.manifest.length);
    if (done) w->checkpoints++;
    step(w, m, &ev);
}

void sim_member_event(struct sim_world *w, struct sim_member *m, struct sim_event *e) {
    struct sim_link *l = NULL;
    bool of_trainer =
        e->kind == SIM_TRAINER_STEP || e->kind == SIM_TRAINER_REPLY || e->kind == SIM_TRAINER_UP;
    if (e->kind == SIM_TO_PEER || e->kind == SIM_PEER_OPENED || e->kind == SIM_PEER_CLOSED ||
        e->kind == SIM_PEER_DRAINED)
        l = &w->links[m->slot < e->peer ? m->slot : e->peer][m->slot < e->peer ? e->peer : m->slot];
    if (!m->alive) return;
    if (of_trainer ? e->life != m->trainer.generation
                   : e->kind != SIM_TO_MEMBER && e->kind != SIM_TO_PEER && e->life != m->life)
        return;

    switch (e->kind) {
    case SIM_MEMBER_TICK:
        step(w, m, &(struct sync_event){.type = SYNC_EV_TICK});
        if (m->alive && e->life == m->life) sim_schedule(w, SYNC_TICK_MS, SIM_MEMBER_TICK, m->slot);
        break;
    case SIM_MEMBER_WORK:
        m->work_queued = false;
        step(w, m, &(struct sync_event){.type = SYNC_EV_WORK});
        break;
    case SIM_MEMBER_WELCOME: {
        struct sim_conn *c = sim_conn_find(w, e->conn);
        if (c && m->conn == e->conn) on_welcome(w, m, c);
        break;
    }
    case SIM_TO_MEMBER: {
        union {
            long double align;
            char bytes[1024];
        } record;
        struct err err;
        int which = proto_record_of_type(e->frame.type);
        if (m->conn != e->conn) break;
        if (e->frame.type != MSG_HEARTBEAT_ACK)
            sim_trace(w, "    C > %u %s", m->slot, proto_type_name(e->frame.type));
        memset(&record, 0, sizeof record);
        if (proto_decode(e->payload, e->payload_length, (enum proto_record)which, &record, &err))
            sim_violation(w, "what the coordinator sent does not decode: %s", err.msg);
        on_core_message(w, m, e, &record);
        proto_decoded_release((enum proto_record)which, &record);
        break;
    }
    case SIM_MEMBER_CLOSED:
        if (m->conn != e->conn) break;
        m->conn = 0;
        step(w, m, &(struct sync_event){.type = SYNC_EV_DISCONNECTED});
        if (m->alive && !m->gone)
            sim_schedule(w, 100 + sim_random(w, 1500), SIM_MEMBER_DIAL, m->slot);
        break;
    case SIM_TO_PEER: {
        union {
            long double align;
            char bytes[1024];
        } record;
        struct err err;
        int which = proto_record_of_type(e->frame.type);
        if (l->number != e->conn || !m->sync) break;
        if (--l->in_flight[e->peer > m->slot] == 0) {
            struct sim_event *d = sim_schedule(w, 1, SIM_PEER_DRAINED, e->peer);
            d->peer = m->slot, d->conn = l->number;
        }
        memset(&record, 0, sizeof record);
        if (proto_decode(e->payload, e->payload_length, (enum proto_record)which, &record, &err))
            sim_violation(w, "what slot %u sent does not decode: %s", e->peer, err.msg);
        sim_trace(w, "    %u > %u %s", e->peer, m->slot, proto_type_name(e->frame.type));
        struct sync_event ev = {.type = SYNC_EV_PEER_MESSAGE,
                                .peer = w->member[e->peer].id,
                                .frame = e->frame,
                                .msg = &record};
        step(w, m, &ev);
        proto_decoded_release((enum proto_record)which, &record);
        break;
    }
    case SIM_PEER_DIAL: dial_peer(w, m, e->peer); break;
    case SIM_PEER_OPENED:
        if (l->number == e->conn)
            step(w, m,
                 &(struct sync_event){.type = SYNC_EV_PEER_OPEN, .peer = w->member[e->peer].id});
        break;
    case SIM_PEER_CLOSED: /* a dial that failed, or the end of a link that nothing has replaced */
        if (e->conn && l->number && l->number != e->conn) break;
        if (e->conn) memset(l, 0, sizeof *l);
        step(w, m,
             &(struct sync_event){.type = SYNC_EV_PEER_CLOSED, .peer = w->member[e->peer].id});
        break;
    case SIM_PEER_DRAINED:
        if (l->number == e->conn)
            step(w, m,
                 &(struct sync_event){.type = SYNC_EV_PEER_DRAINED, .peer = w->member[e->peer].id});
        break;
    case SIM_TRAINER_UP:
        if (m->trainer.alive || !m->sync) break;
        m->trainer.alive = true;
        for (uint32_t i = 0; i < w->elements; i++) m->trainer.moments[i] = 1e-4f * (float)(i + 1);
        step(w, m, &(struct sync_event){.type = SYNC_EV_TRAINER_UP});
        break;
    case SIM_TRAINER_STEP: trainer_step(w, m); break;
    case SIM_TRAINER_REPLY: trainer_reply(w, m, e->value); break;
    case SIM_CHECKPOINT: on_checkpoint(w, m, e->value == 1); break;
    default: assert(!"not a member's event");
    }
}
