/* links.c - a link's life: its lanes, which of two links is used, and what goes where in which
 * order; see links.h. */
#include "node/links.h"

#include <event2/event.h>
#include <stdlib.h>
#include <string.h>

#define REDIAL_MS 250u
#define REDIAL_MS_MAX 60000u
/* Two members dial each other "at the same moment" when neither dial can have seen the other's end. */
#define SAME_MOMENT_MS (2 * CHANNEL_HANDSHAKE_MS_MAX)

/* ---- which link -------------------------------------------------------------------------------- */

/* Of two open links to a member that is one process, the one that the lower id dialled. */
static bool is_preferred(const struct link *l, const struct link *other) {
    return !other || l->outbound == (l->peers->own < l->member);
}

struct link *links_current(const struct peers *p, uint32_t member) {
    struct link *best = NULL;
    for (struct link *l = p->links; l; l = l->next)
        if (l->member == member && l->open && is_preferred(l, best)) best = l;
    return best;
}

uint64_t links_serial(const struct peers *p, uint32_t member) {
    const struct link *l = links_current(p, member);
    return l ? l->serial : 0;
}

bool links_any(const struct peers *p, uint32_t member) {
    for (const struct link *l = p->links; l; l = l->next)
        if (l->member == member) return true;
    return false;
}

void links_settle(struct peers *p, uint32_t member, uint64_t before, const char *why) {
    uint64_t after = links_serial(p, member);
    if (after == before) return;
    if (before) p->ops->on_close(p->arg, member, why);
    if (after && after == links_serial(p, member)) p->ops->on_open(p->arg, member);
}

/* ---- birth and death --------------------------------------------------------------------------- */

static void on_redial(evutil_socket_t fd, short what, void *arg);

static struct link *link_create(struct peers *p, uint32_t member, bool outbound) {
    struct link *l = calloc(1, sizeof *l);
    if (!l || !(l->redial = evtimer_new(p->base, on_redial, l))) {
        free(l);
        return NULL;
    }
    l->peers = p;
    l->member = member;
    l->outbound = outbound;
    l->serial = ++p->links_ever;
    l->next = p->links;
    p->links = l;
    return l;
}

static struct lane *lane_create(struct link *l, uint8_t number) {
    struct lane *lane = calloc(1, sizeof *lane);
    if (!lane) return NULL;
    *lane = (struct lane){ .peers = l->peers, .link = l, .number = number, .outbound = true,
                           .member = l->member };
    l->lane[number] = lane;
    return lane;
}

static void lane_free(struct lane *lane) {
    if (lane->link) lane->link->lane[lane->number] = NULL;
    free(lane);
}

/* Channels that still live are closed. */
static void link_free(struct link *l, bool flush) {
    struct link **at = &l->peers->links;
    while (*at != l) at = &(*at)->next;
    *at = l->next;
    for (int i = 0; i <= PEERS_LANES_MAX; i++) {
        if (!l->lane[i]) continue;
        if (l->lane[i]->channel) channel_close(l->lane[i]->channel, flush);
        lane_free(l->lane[i]);
    }
    event_free(l->redial);
    free(l);
}

void links_close(struct link *l, bool flush) { link_free(l, flush); }

/* A link has just opened: what becomes of the others to the same member? Whoever dials again has lost
 * what it had. Only two that are dialled in both directions at the same moment can both be right; then
 * the higher id closes its own. True: `l` itself is that one. */
static bool replace_others(struct link *l) {
    struct peers *p = l->peers;
    struct link *next;
    bool surplus = false;
    for (struct link *o = p->links; o; o = next) {
        next = o->next;
        if (o == l || o->member != l->member || !o->open) continue;
        bool same_moment = l->opened_ms - o->opened_ms <= SAME_MOMENT_MS;
        if (o->outbound == l->outbound || o->process != l->process || (o->outbound && !same_moment))
            link_free(o, false);
        else if (p->own > l->member && o->outbound)
            link_free(o, true);
        else
            surplus = p->own > l->member;
    }
    return surplus;
}

/* Frees l where it is surplus. */
static void link_opened(struct link *l, uint64_t process) {
    struct peers *p = l->peers;
    uint32_t member = l->member;
    uint64_t before = links_serial(p, member);
    l->open = true;
    l->process = process;
    l->opened_ms = peers_now_ms();
    if (replace_others(l)) link_free(l, true);
    links_settle(p, member, before, "another link takes over");
}

/* ---- lanes ------------------------------------------------------------------------------------- */

static int dial_lane(struct lane *lane, const char *host, uint16_t port, struct err *err) {
    struct peers *p = lane->peers;
    lane->channel = channel_dial(p->base, p->ctx, host, port, &peers_channel_ops, lane, err);
    return lane->channel ? 0 : -1;
}

int links_dial(struct peers *p, uint32_t member, const char *host, uint16_t port, struct err *err) {
    struct link *l = link_create(p, member, true);
    struct lane *lane = l ? lane_create(l, 0) : NULL;
    if (!lane) {
        err_set(err, ERR_MEMORY, "no memory for a link");
    } else {
        l->number = l->serial;
        if (!dial_lane(lane, host, port, err)) return 0;
    }
    if (l) link_free(l, false);
    return -1;
}

static bool is_local(const char *host) {
    return !strncmp(host, "127.", 4) || !strcmp(host, "::1") || !strncmp(host, "::ffff:127.", 11);
}

static void dial_in(struct link *l, uint32_t ms) {
    struct timeval in = { .tv_sec = ms / 1000, .tv_usec = ms % 1000 * 1000 };
    evtimer_add(l->redial, &in);
}

static void plan_redial(struct link *l) {
    uint32_t ms = REDIAL_MS << (l->redials < 8 ? l->redials : 8);
    l->redials++;
    dial_in(l, ms < REDIAL_MS_MAX ? ms : REDIAL_MS_MAX);
}

/* Where the control lane goes, without asking for the name again. */
static void dial_bulk_lanes(struct link *l) {
    char host[PROTO_ADDRESS_BYTES_MAX + 1];
    uint16_t port;
    channel_peer_address(l->lane[0]->channel, host, &port);
    uint32_t lanes = is_local(host) ? l->peers->bulk_lanes_local : l->peers->bulk_lanes;
    for (uint32_t i = 1; i <= lanes; i++) {
        struct lane *lane = l->lane[i] ? NULL : lane_create(l, (uint8_t)i);
        if (!lane || !dial_lane(lane, host, port, NULL)) continue;
        lane_free(lane);
        plan_redial(l);
    }
}

static void on_redial(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    dial_bulk_lanes(arg);
}

void links_lane_lost(struct lane *lane, const char *why) {
    struct link *l = lane->link;
    struct peers *p = l->peers;
    uint32_t member = l->member;
    uint64_t before = links_serial(p, member);
    bool open = lane->open, dial_failed = lane->number == 0 && !open;
    lane_free(lane);
    if (!open && !dial_failed) { /* a bulk lane that was never used: the link is what it was */
        plan_redial(l);
        return;
    }
    link_free(l, false);
    if (dial_failed && !links_any(p, member)) p->ops->on_close(p->arg, member, why);
    else links_settle(p, member, before, why);
}

/* ---- first words ------------------------------------------------------------------------------- */

static struct link *inbound(const struct peers *p, uint32_t member, const struct msg_link *m) {
    for (struct link *l = p->links; l; l = l->next)
        if (l->member == member && !l->outbound && l->open && l->number == m->number &&
            l->process == m->process)
            return l;
    return NULL;
}

static int refuse(const char **why, const char *text) {
    *why = text;
    return -1;
}

int links_greet(struct lane *lane, const struct msg_link *m, const char **why) {
    struct peers *p = lane->peers;
    struct msg_link answer = { .process = p->process, .number = m->number, .lane = m->lane };
    if (m->lane > PEERS_LANES_MAX) return refuse(why, "it wants too many connections");
    struct link *l = m->lane ? inbound(p, lane->member, m) : link_create(p, lane->member, false);
    if (!l) return refuse(why, m->lane ? "it belongs to no link" : "no memory for a link");
    if (l->lane[m->lane]) return refuse(why, "its link has such a connection");
    lane->link = l;
    lane->number = (uint8_t)m->lane;
    l->lane[lane->number] = lane;
    lane->open = true;
    channel_set_frame_bytes_max(lane->channel, PROTO_FRAME_BYTES_MAX);
    channel_send(lane->channel, MSG_LINK, 0, 0, 0, &answer, NULL);
    if (lane->number) return 0;
    l->number = m->number;
    link_opened(l, m->process);
    return 0;
}

int links_answered(struct lane *lane, const struct msg_link *m, const char **why) {
    struct link *l = lane->link;
    if (m->number != l->number || m->lane != lane->number ||
        (lane->number && m->process != l->process))
        return refuse(why, "it answers for another link");
    lane->open = true;
    channel_set_frame_bytes_max(lane->channel, PROTO_FRAME_BYTES_MAX);
    if (lane->number) return 0;
    dial_in(l, 0); /* from the loop: it may be one link too many */
    link_opened(l, m->process);
    return 0;
}

/* ---- sending ----------------------------------------------------------------------------------- */

static bool is_tensor(uint8_t type) { return proto_urgency(type) == PROTO_URGENCIES - 1; }

static struct lane *emptiest_bulk_lane(const struct link *l) {
    struct lane *best = NULL;
    for (int i = 1; i <= PEERS_LANES_MAX; i++) {
        struct lane *lane = l->lane[i];
        if (!lane || !lane->open) continue;
        if (!best || channel_unsent_bytes(lane->channel) < channel_unsent_bytes(best->channel))
            best = lane;
    }
    return best;
}

/* Tensor data must not arrive before what was said before it: say how much that is. */
static int tell_what_was_before(struct lane *lane, struct err *err) {
    struct msg_after after = { .control = lane->link->control_sent };
    if (lane->told == after.control) return 0;
    lane->told = after.control;
    return channel_send(lane->channel, MSG_AFTER, 0, 0, 0, &after, err);
}

int links_send(struct link *l, uint8_t type, uint64_t term, uint64_t session, uint64_t plan,
               const void *msg, struct err *err) {
    struct lane *control = l->lane[0], *bulk = NULL;
    if (!is_tensor(type)) l->control_sent++;
    else if (type != MSG_MOMENTS) bulk = emptiest_bulk_lane(l); /* whose order counts */
    if (!bulk) return channel_send(control->channel, type, term, session, plan, msg, err);
    if (tell_what_was_before(bulk, err)) return -1;
    return channel_send(bulk->channel, type, term, session, plan, msg, err);
}

bool links_drained(const struct link *l) {
    for (int i = 0; i <= PEERS_LANES_MAX; i++)
        if (l->lane[i] && channel_unsent_bytes(l->lane[i]->channel) >= PROTO_SEND_LOW) return false;
    return true;
}

/* ---- receiving --------------------------------------------------------------------------------- */

static void let_go(struct link *l) {
    for (int i = 1; i <= PEERS_LANES_MAX; i++) {
        struct lane *lane = l->lane[i];
        if (!lane || !lane->waits_for || lane->waits_for > l->control_heard) continue;
        lane->waits_for = 0;
        channel_hold(lane->channel, false);
    }
}

static enum heard hear_after(struct lane *lane, const struct msg_after *m) {
    if (lane->number == 0) return HEARD_WRONG;
    if (m->control <= lane->link->control_heard) return HEARD_OWN;
    lane->waits_for = m->control;
    channel_hold(lane->channel, true);
    return HEARD_OWN;
}

enum heard links_hear(struct lane *lane, const struct frame *f, const void *msg) {
    struct link *l = lane->link;
    if (f->type == MSG_AFTER) return hear_after(lane, msg);
    if (f->type == MSG_LINK) return HEARD_WRONG;
    if (is_tensor(f->type)) return HEARD_AGENT;
    if (lane->number) return HEARD_WRONG;
    l->control_heard++;
    let_go(l); /* their channels go on in a later turn, so after this message */
    return HEARD_AGENT;
}
