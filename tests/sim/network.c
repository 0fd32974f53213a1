/* network.c - connections to the coordinator, which keep their order, and links between members,
 * which are several streams: control frames keep their order among themselves; bulk frames may
 * overtake them and each other, wait for their sender's uplink, and arrive twice. */
#include "tests/sim/sim.h"

#include <stdlib.h>
#include <string.h>

static void encode(struct sim_world *w, uint8_t type, const void *msg, struct sim_event *ev) {
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

void sim_decode(struct sim_world *w, const struct sim_event *e, union sim_record *out) {
    struct err err;
    int which = proto_record_of_type(e->frame.type);
    memset(out, 0, sizeof *out);
    if (proto_decode(e->payload, e->payload_length, (enum proto_record)which, out, &err))
        sim_violation(w, "a %s that does not decode: %s", proto_type_name(e->frame.type), err.msg);
}

bool sim_is_cut(const struct sim_world *w, uint32_t a, uint32_t b) {
    return w->cut_until[a][b] > w->now || w->cut_until[b][a] > w->now;
}

/* ---- member and coordinator -------------------------------------------------------------------- */

struct sim_conn *sim_conn_find(struct sim_world *w, uint64_t number) {
    struct sim_conn *c = &w->conns[number % SIM_CONNS];
    return number && c->number == number ? c : NULL;
}

static struct sim_event *conn_schedule(struct sim_world *w, uint64_t in_ms, enum sim_kind kind,
                                       const struct sim_conn *c) {
    struct sim_event *ev = sim_schedule(w, in_ms, kind, c->member);
    ev->conn = c->number;
    if (sim_at_core(kind)) ev->life = c->core;
    return ev;
}

void sim_conn_send(struct sim_world *w, struct sim_conn *c, bool to_core, uint8_t type,
                   struct frame frame, const void *msg) {
    if (c->broken) return;
    uint64_t *clear = &c->clear_at[to_core], at = w->now + 1 + sim_random(w, w->delay_ms_max);
    if (at < *clear) at = *clear;
    *clear = at;
    struct sim_event *ev = conn_schedule(w, at - w->now, to_core ? SIM_TO_CORE : SIM_TO_MEMBER, c);
    ev->frame = frame;
    ev->frame.type = type;
    encode(w, type, msg, ev);
}

/* One end closed; the other notices after what is still under way has arrived. */
void sim_conn_close(struct sim_world *w, struct sim_conn *c, bool by_core) {
    uint64_t at = w->now + 1 + sim_random(w, w->delay_ms_max);
    for (int side = 0; side < 2; side++) {
        bool to_core = side == 1;
        uint64_t when = to_core == !by_core ? at : w->now + 1;
        if (when < c->clear_at[to_core]) when = c->clear_at[to_core];
        conn_schedule(w, when - w->now, to_core ? SIM_CORE_CLOSED : SIM_MEMBER_CLOSED, c);
    }
    c->broken = true;
}

void sim_dial_coordinator(struct sim_world *w, struct sim_member *m) {
    struct sim_core *core = sim_core_active(w);
    if (m->conn || m->gone) return;
    if (!core || sim_is_cut(w, m->slot, SIM_COORDINATOR)) {
        sim_schedule(w, 200 + sim_random(w, 2000), SIM_MEMBER_DIAL, m->slot);
        return;
    }
    uint64_t number = ++w->conn_next;
    struct sim_conn *c = &w->conns[number % SIM_CONNS];
    *c = (struct sim_conn){.number = number,
                           .member = m->slot,
                           .core = core->number,
                           .clear_at = {w->now, w->now}};
    m->conn = number;
    conn_schedule(w, 1 + sim_random(w, w->delay_ms_max), SIM_CORE_OPENED, c);
}

/* ---- member and member ------------------------------------------------------------------------- */

struct sim_link *sim_link(struct sim_world *w, uint32_t a, uint32_t b) {
    return &w->links[a < b ? a : b][a < b ? b : a];
}

static void tell_closed(struct sim_world *w, uint64_t in_ms, uint32_t to, uint32_t peer,
                        uint64_t number) {
    struct sim_event *ev = sim_schedule(w, in_ms, SIM_PEER_CLOSED, to);
    ev->peer = peer;
    ev->conn = number;
}

void sim_cut(struct sim_world *w, uint32_t a, uint32_t b, uint64_t for_ms) {
    sim_trace(w, "link %u-%u cut for %llu ms", a, b, LLU(for_ms));
    w->cut_until[a][b] = w->now + for_ms;
    if (b == SIM_COORDINATOR) {
        struct sim_conn *c = sim_conn_find(w, w->member[a].conn);
        if (!c) return;
        c->broken = true;
        conn_schedule(w, 200 + sim_random(w, 8000), SIM_CORE_CLOSED, c);
        conn_schedule(w, 200 + sim_random(w, 8000), SIM_MEMBER_CLOSED, c);
        return;
    }
    struct sim_link *l = sim_link(w, a, b);
    if (!l->number || l->broken) return;
    l->broken = true;
    tell_closed(w, 200 + sim_random(w, 8000), a, b, l->number);
    tell_closed(w, 200 + sim_random(w, 8000), b, a, l->number);
}

/* Closed by a: b hears of it later. */
void sim_link_close(struct sim_world *w, uint32_t a, uint32_t b) {
    struct sim_link *l = sim_link(w, a, b);
    if (!l->number) return;
    tell_closed(w, 1 + sim_random(w, w->delay_ms_max), b, a, l->number);
    memset(l, 0, sizeof *l);
}

void sim_links_lose(struct sim_world *w, struct sim_member *m) {
    for (uint32_t i = 0; i < SIM_MEMBERS_MAX; i++)
        if (i != m->slot) sim_link_close(w, m->slot, i);
}

uint32_t sim_link_slot(struct sim_world *w, struct sim_member *m, uint32_t id) {
    uint32_t best = SIM_MEMBERS_MAX;
    uint64_t number = 0;
    for (uint32_t i = 0; i < SIM_MEMBERS_MAX; i++) {
        if (i == m->slot || w->member[i].id != id) continue;
        const struct sim_link *l = sim_link(w, m->slot, i);
        if (l->number > number) number = l->number, best = i;
    }
    return best;
}

static void tell_opened(struct sim_world *w, uint32_t to, uint32_t peer, uint64_t number) {
    struct sim_event *ev = sim_schedule(w, 1, SIM_PEER_OPENED, to);
    ev->peer = peer;
    ev->conn = number;
}

void sim_link_dial(struct sim_world *w, struct sim_member *m, uint32_t to) {
    struct sim_member *other = &w->member[to];
    struct sim_link *l = sim_link(w, m->slot, to);
    if (l->number) return;
    if (!other->alive || !other->id || !other->reachable || sim_is_cut(w, m->slot, to) ||
        !other->roster[m->id] || !m->roster[other->id] || other->id == m->id) {
        tell_closed(w, 1 + sim_random(w, 100), m->slot, to, 0);
        return;
    }
    for (int side = 0; side < 2; side++) { /* the key has another link: that one goes */
        struct sim_member *a = side ? m : other, *b = side ? other : m;
        uint32_t old = sim_link_slot(w, a, b->id);
        if (old < SIM_MEMBERS_MAX) sim_link_close(w, a->slot, old);
    }
    memset(l, 0, sizeof *l);
    l->number = ++w->link_next;
    tell_opened(w, m->slot, to, l->number);
    tell_opened(w, to, m->slot, l->number);
}

static bool is_bulk(uint8_t type) {
    return type == MSG_CHUNK || type == MSG_RESULT || type == MSG_STATE || type == MSG_MOMENTS;
}

/* When the last byte of it leaves: bulk waits for the uplink, control does not. */
static uint64_t leaves_at(struct sim_world *w, struct sim_member *m, const struct sim_link *l,
                          const struct sim_event *ev) {
    uint64_t start = w->now;
    if (!is_bulk(ev->frame.type)) return start;
    if (m->uplink_clear > start) start = m->uplink_clear;
    m->uplink_clear = start + ev->payload_length / m->uplink;
    return m->uplink_clear + (uint64_t)l->slow * ev->payload_length / 16;
}

static void put_on_link(struct sim_world *w, struct sim_member *m, uint32_t to,
                        struct sim_link *l, const struct sync_action *a, bool again) {
    int side = m->slot > to;
    struct sim_event ev = {.kind = SIM_TO_PEER, .member = to, .peer = m->slot, .conn = l->number};
    ev.frame = (struct frame){
        .type = a->message, .term = a->term, .session = a->session, .plan = a->plan};
    encode(w, a->message, a->msg, &ev);
    uint32_t stream = is_bulk(a->message) ? (uint32_t)sim_random(w, w->streams) : 0;
    uint64_t at = leaves_at(w, m, l, &ev) + 1 + sim_random(w, w->delay_ms_max);
    for (uint32_t i = 0; i < w->streams; i++)
        if (i != stream && l->clear_at[side][i] > at) w->injected[SIM_REORDER]++;
    if (at < l->clear_at[side][stream]) at = l->clear_at[side][stream];
    l->clear_at[side][stream] = at;
    struct sim_event *queued = sim_schedule(w, at - w->now, SIM_TO_PEER, to);
    ev.at = queued->at, ev.order = queued->order, ev.life = queued->life;
    *queued = ev;
    l->in_flight[side]++;
    if (again) w->injected[SIM_DUPLICATE]++;
}

void sim_link_send(struct sim_world *w, struct sim_member *m, const struct sync_action *a) {
    uint32_t to = sim_link_slot(w, m, a->peer);
    if (a->peer == m->id || !a->peer)
        sim_violation(w, "slot %u sends %s to member %u, which is no other member", m->slot,
                      proto_type_name(a->message), a->peer);
    if (to == SIM_MEMBERS_MAX) { /* no link: it closes, as far as the sender knows */
        for (uint32_t i = 0; i < SIM_MEMBERS_MAX; i++)
            if (w->member[i].id == a->peer) to = i;
        if (to < SIM_MEMBERS_MAX) tell_closed(w, 1, m->slot, to, 0);
        return;
    }
    struct sim_link *l = sim_link(w, m->slot, to);
    if (l->broken) return; /* into the void */
    put_on_link(w, m, to, l, a, false);
    if (sim_chance(w, w->duplicate_per_mille)) put_on_link(w, m, to, l, a, true);
}
