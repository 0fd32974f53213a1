/* sync_peer.c - links to other members: who can be dialled and when again, what may be sent now
 * without keeping control messages waiting, and which frame goes where. */
#include <stdlib.h>
#include <string.h>

#include "node/sync_internal.h"

struct peer *peer_find(struct sync *s, uint32_t id) {
    for (uint32_t i = 0; i < s->peer_count; i++)
        if (s->peers[i]->id == id) return s->peers[i];
    return NULL;
}

struct peer *peer_get(struct sync *s, uint32_t id) {
    struct peer *p = peer_find(s, id);
    if (p || id == s->config.member || s->peer_count == PROTO_MEMBERS_MAX) return p;
    struct peer **list = realloc(s->peers, (s->peer_count + 1) * sizeof *list);
    if (!list || !(p = calloc(1, sizeof *p))) {
        if (list) s->peers = list;
        err_set(&s->failure, ERR_MEMORY, "no memory for a peer");
        return NULL;
    }
    p->id = id;
    s->peers = list;
    s->peers[s->peer_count++] = p;
    return p;
}

void peer_set_addresses(struct sync *s, const struct msg_address *list, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        struct peer *p = list[i].port && list[i].host.length ? peer_get(s, list[i].member) : NULL;
        if (!p) continue;
        proto_str_copy(list[i].host, p->host, sizeof p->host);
        p->port = list[i].port;
    }
}

bool peer_reachable(struct sync *s, uint32_t id) {
    const struct peer *p = peer_find(s, id);
    return p && (p->open || p->port);
}

struct peer *peer_link(struct sync *s, uint32_t id) {
    struct peer *p = peer_find(s, id);
    if (!p || p->open) return p;
    if (!p->port || s->now < p->dial_ms) return NULL;
    struct sync_action *a = sync_act(s, SYNC_ACT_PEER_DIAL);
    if (!a) return NULL;
    a->peer = id;
    a->port = (uint16_t)p->port;
    memcpy(a->host, p->host, sizeof a->host);
    p->dial_ms = s->now + s->outer->heartbeat_ms;
    return NULL;
}

/* ---- sending ---------------------------------------------------------------------------- */

void peer_send(struct sync *s, struct peer *p, enum proto_type type, uint64_t term, uint64_t plan,
               const void *msg, size_t bulk_bytes) {
    sync_send_peer(s, p->id, type, term, plan, msg);
    p->unsent += bulk_bytes + PROTO_FRAME_HEADER_BYTES;
    s->bytes_to_peers += bulk_bytes + PROTO_FRAME_HEADER_BYTES;
}

void peer_none(struct sync *s, struct peer *p, enum proto_type what, uint64_t term, uint64_t plan,
               uint64_t round, const char *why) {
    struct msg_none none = {.what = (uint8_t)what, .round = round, .reason = proto_str(why)};
    peer_send(s, p, MSG_NONE, term, plan, &none, 0);
}

/* One thing at a time from each queue, so that none of them starves. */
static bool send_next(struct sync *s, struct peer *p) {
    bool sent = results_send_next(s, p);
    sent |= contribution_send_chunk(s, p);
    sent |= catchup_send_state(s, p);
    sent |= moments_send_next(s, p);
    return sent;
}

void peer_pump(struct sync *s) {
    for (uint32_t i = 0; i < s->peer_count; i++) {
        struct peer *p = s->peers[i];
        while (p->open && p->unsent < SYNC_PEER_UNSENT_MAX && !s->failure.code && send_next(s, p))
            continue;
    }
}

/* ---- the link comes and goes ------------------------------------------------------------ */

static void forget_talk(struct peer *p) {
    free(p->wanted);
    free(p->results);
    free(p->states);
    p->wanted = p->results = p->states = NULL;
    p->leaves_sent = p->early_leaves = p->results_leaves = p->moments = false;
    p->unsent = 0;
}

/* A second connection beside the first: what the peer asked for stands, what we said may be
 * lost. */
static void on_open(struct peer *p) {
    if (p->open) {
        free(p->wanted);
        p->wanted = NULL;
        p->leaves_sent = false;
        p->unsent = 0;
    } else {
        forget_talk(p);
    }
    p->open = true;
}

static void on_closed(struct sync *s, struct peer *p) {
    forget_talk(p);
    p->open = false;
    if (p->dial_ms < s->now + s->outer->heartbeat_ms) p->dial_ms = s->now + s->outer->heartbeat_ms;
    apply_on_peer_closed(s, p);
    catchup_on_peer_closed(s, p);
}

void peer_close(struct sync *s, struct peer *p, const char *why) {
    sync_log(s, SYNC_WARNING, "closing the link to member %u: %s", p->id, why);
    struct sync_action *a = sync_act(s, SYNC_ACT_PEER_CLOSE);
    if (a) a->peer = p->id;
    on_closed(s, p);
}

/* ---- frames ----------------------------------------------------------------------------- */

/* LEAVES comes again when the plan is there; results may be needed by a holder or by the state. */
static void on_none(struct sync *s, struct peer *p, const struct msg_none *msg) {
    switch (msg->what) {
    case MSG_LEAVES: p->leaves_sent = false; break;
    case MSG_RESULT_GET: apply_on_none(s, p, msg); break;
    case MSG_STATE_GET: catchup_on_none(s, p, msg); break;
    case MSG_MOMENTS_GET: moments_on_none(s, p); break;
    default: break;
    }
}

/* Is this about the plan in work, or about a round that was committed? */
static bool is_of_plan(const struct sync *s, uint64_t round) {
    return s->plan.active && round == s->plan.msg.round;
}

static int on_message(struct sync *s, struct peer *p, const struct frame *f, const void *msg) {
    s->bytes_from_peers += f->length + PROTO_FRAME_HEADER_BYTES;
    switch (f->type) {
    case MSG_LEAVES: reduce_on_leaves(s, p, f, msg); return 0;
    case MSG_WANT: contribution_on_want(s, p, f, msg); return 0;
    case MSG_CHUNK: return reduce_on_chunk(s, p, f, msg);
    case MSG_RESULT_GET: results_on_get(s, p, f, msg); return 0;
    case MSG_RESULT_LEAVES:
        if (is_of_plan(s, ((const struct msg_result_leaves *)msg)->round))
            reduce_on_result_leaves(s, p, f, msg);
        else apply_on_result_leaves(s, p, f, msg);
        return 0;
    case MSG_RESULT:
        if (is_of_plan(s, ((const struct msg_result *)msg)->round))
            return reduce_on_result(s, p, f, msg);
        apply_on_result(s, p, f, msg);
        return 0;
    case MSG_STATE_GET: catchup_on_state_get(s, p, msg); return 0;
    case MSG_STATE: catchup_on_state(s, p, msg); return 0;
    case MSG_MOMENTS_GET: moments_on_get(s, p); return 0;
    case MSG_MOMENTS: moments_on_chunk(s, p, msg); return 0;
    case MSG_NONE: on_none(s, p, msg); return 0;
    default: peer_close(s, p, "it sent a message that members do not send each other"); return 0;
    }
}

int peer_on_event(struct sync *s, const struct sync_event *ev) {
    struct peer *p = peer_get(s, ev->peer);
    if (!p) return 0;
    switch (ev->type) {
    case SYNC_EV_PEER_OPEN: on_open(p); return 0;
    case SYNC_EV_PEER_CLOSED: on_closed(s, p); return 0;
    case SYNC_EV_PEER_DRAINED: p->unsent = 0; return 0;
    default: return p->open ? on_message(s, p, &ev->frame, ev->msg) : 0;
    }
}

void peer_release(struct sync *s) {
    for (uint32_t i = 0; i < s->peer_count; i++) {
        forget_talk(s->peers[i]);
        free(s->peers[i]);
    }
    free(s->peers);
    s->peers = NULL;
    s->peer_count = 0;
}
