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
    if (list) s->peers = list;
    if (list) p = calloc(1, sizeof *p);
    if (p) p->talk = calloc(s->fragment_count, sizeof *p->talk);
    if (!p || !p->talk) {
        free(p);
        err_set(&s->failure, ERR_MEMORY, "no memory for a peer");
        return NULL;
    }
    p->id = id;
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
               uint32_t fragment, uint64_t round, const char *why) {
    struct msg_none none = {.what = (uint8_t)what,
                            .fragment = fragment,
                            .round = round,
                            .reason = proto_str(why)};
    peer_send(s, p, MSG_NONE, term, plan, &none, 0);
}

/* One thing at a time from each queue, so that none of them starves. */
static bool send_next(struct sync *s, struct peer *p) {
    bool sent = false;
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        sent |= results_send_next(s, p, f);
        sent |= contribution_send_chunk(s, p, f);
    }
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

static void forget_wanted(struct talk *t) {
    free(t->wanted);
    t->wanted = NULL;
    t->leaves_sent = false;
}

static void forget_talk(struct sync *s, struct peer *p) {
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        forget_wanted(&p->talk[f]);
        free(p->talk[f].results);
        p->talk[f] = (struct talk){0};
    }
    free(p->states);
    p->states = NULL;
    p->moments = p->owing = false;
    p->unsent = 0;
}

/* A second connection beside the first: what the peer asked for stands, what we said may be
 * lost, our questions too. */
static void on_open(struct sync *s, struct peer *p) {
    for (uint32_t f = 0; p->open && f < s->fragment_count; f++) forget_wanted(&p->talk[f]);
    if (p->open) {
        reduce_ask_again(s, p);
        apply_ask_again(s, p);
        catchup_ask_again(s, p);
    } else {
        forget_talk(s, p);
    }
    p->unsent = 0;
    p->open = true;
}

static void on_closed(struct sync *s, struct peer *p) {
    forget_talk(s, p);
    p->open = false;
    if (p->dial_ms < s->now + s->outer->heartbeat_ms) p->dial_ms = s->now + s->outer->heartbeat_ms;
    reduce_ask_again(s, p);
    apply_on_peer_closed(s, p);
    catchup_on_peer_closed(s, p);
}

void peer_close(struct sync *s, struct peer *p, const char *why) {
    sync_log(s, SYNC_WARNING, "closing the link to member %u: %s", p->id, why);
    struct sync_action *a = sync_act(s, SYNC_ACT_PEER_CLOSE);
    if (a) a->peer = p->id;
    on_closed(s, p);
}

/* ---- how fast its bulk comes ------------------------------------------------------------ */

/* Counted while more was asked for, so that neither pauses between rounds nor the time a first chunk took
 * to be asked for are in it: what remains is the sender's uplink, or our downlink. */
static void note_bulk(struct sync *s, struct peer *p, uint32_t bytes) {
    if (p->owing) {
        p->bulk_bytes += bytes;
        p->bulk_busy_ms += s->now - p->bulk_ms;
    }
    p->bulk_ms = s->now;
    p->owing = plan_owes(s, p->id) || apply_owes(s, p->id) || catchup_owes(s, p->id);
}

/* Without milliseconds there is no rate: such bytes wait for the next heartbeat. */
uint32_t peer_rates(struct sync *s, struct msg_rate *out) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < s->peer_count && n < PROTO_RATES_MAX; i++) {
        struct peer *p = s->peers[i];
        if (p->bulk_busy_ms == 0) continue;
        uint64_t busy_ms = p->bulk_busy_ms < UINT32_MAX ? p->bulk_busy_ms : UINT32_MAX;
        out[n++] = (struct msg_rate){p->id, p->bulk_bytes, (uint32_t)busy_ms};
        p->bulk_bytes = p->bulk_busy_ms = 0;
    }
    return n;
}

/* ---- frames ----------------------------------------------------------------------------- */

/* LEAVES comes again when the plan is there; results may be needed by a holder or by the state. */
static void on_none(struct sync *s, struct peer *p, const struct msg_none *msg) {
    switch (msg->what) {
    case MSG_LEAVES: p->talk[msg->fragment].leaves_sent = false; break;
    case MSG_RESULT_GET: apply_on_none(s, p, msg); break;
    case MSG_STATE_GET: catchup_on_none(s, p, msg); break;
    case MSG_MOMENTS_GET: moments_on_none(s, p); break;
    default: break;
    }
}

/* The fragment that a message names; 0 for those that name none. */
static uint32_t fragment_of(uint8_t type, const void *msg) {
    switch (type) {
    case MSG_LEAVES: return ((const struct msg_leaves *)msg)->fragment;
    case MSG_WANT: return ((const struct msg_want *)msg)->fragment;
    case MSG_CHUNK: return ((const struct msg_chunk *)msg)->fragment;
    case MSG_RESULT_GET: return ((const struct msg_result_get *)msg)->fragment;
    case MSG_RESULT_LEAVES: return ((const struct msg_result_leaves *)msg)->fragment;
    case MSG_RESULT: return ((const struct msg_result *)msg)->fragment;
    case MSG_NONE: return ((const struct msg_none *)msg)->fragment;
    default: return 0;
    }
}

static bool is_bulk(uint8_t type) {
    return type == MSG_CHUNK || type == MSG_RESULT || type == MSG_STATE || type == MSG_MOMENTS;
}

/* Results are for the second holder's copy, or for the state. */
static void on_result_leaves(struct sync *s, struct peer *p, const struct frame *f,
                             const struct msg_result_leaves *msg) {
    if (reduce_waits_for(s, p, f, msg->fragment, msg->first)) reduce_on_result_leaves(s, p, f, msg);
    else apply_on_result_leaves(s, p, f, msg);
}

static int on_result(struct sync *s, struct peer *p, const struct frame *f,
                     const struct msg_result *msg) {
    if (reduce_waits_for(s, p, f, msg->fragment, msg->chunk)) return reduce_on_result(s, p, f, msg);
    apply_on_result(s, p, f, msg);
    return 0;
}

static int dispatch(struct sync *s, struct peer *p, const struct frame *f, const void *msg) {
    switch (f->type) {
    case MSG_LEAVES: reduce_on_leaves(s, p, f, msg); return 0;
    case MSG_WANT: contribution_on_want(s, p, f, msg); return 0;
    case MSG_CHUNK: return reduce_on_chunk(s, p, f, msg);
    case MSG_RESULT_GET: results_on_get(s, p, f, msg); return 0;
    case MSG_RESULT_LEAVES: on_result_leaves(s, p, f, msg); return 0;
    case MSG_RESULT: return on_result(s, p, f, msg);
    case MSG_STATE_GET: catchup_on_state_get(s, p, msg); return 0;
    case MSG_STATE: catchup_on_state(s, p, msg); return 0;
    case MSG_MOMENTS_GET: moments_on_get(s, p); return 0;
    case MSG_MOMENTS: moments_on_chunk(s, p, msg); return 0;
    case MSG_NONE: on_none(s, p, msg); return 0;
    default: peer_close(s, p, "it sent a message that members do not send each other"); return 0;
    }
}

static int on_message(struct sync *s, struct peer *p, const struct frame *f, const void *msg) {
    s->bytes_from_peers += f->length + PROTO_FRAME_HEADER_BYTES;
    if (fragment_of(f->type, msg) >= s->fragment_count) {
        peer_close(s, p, "it names a fragment that does not exist");
        return 0;
    }
    int rc = dispatch(s, p, f, msg);
    if (is_bulk(f->type)) note_bulk(s, p, f->length);
    return rc;
}

int peer_on_event(struct sync *s, const struct sync_event *ev) {
    struct peer *p = peer_get(s, ev->peer);
    if (!p) return 0;
    switch (ev->type) {
    case SYNC_EV_PEER_OPEN: on_open(s, p); return 0;
    case SYNC_EV_PEER_CLOSED: on_closed(s, p); return 0;
    case SYNC_EV_PEER_DRAINED: p->unsent = 0; return 0;
    default: return p->open ? on_message(s, p, &ev->frame, ev->msg) : 0;
    }
}

void peer_release(struct sync *s) {
    for (uint32_t i = 0; i < s->peer_count; i++) {
        forget_talk(s, s->peers[i]);
        free(s->peers[i]->talk);
        free(s->peers[i]);
    }
    free(s->peers);
    s->peers = NULL;
    s->peer_count = 0;
}
