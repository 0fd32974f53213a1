/* peers.c - links to other members; see peers.h. */
#include "node/peers.h"

#include <event2/event.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define STRANGERS_MAX 64 /* accepted connections that have not shown a key yet */
#define WHY_BYTES 128
#define COMPLAINT_BYTES 400
#define MINUTE_S 60

struct link {
    struct peers *peers;
    struct channel *channel;
    uint32_t member;    /* 0 = accepted, key not shown yet */
    bool outbound, open;
    const char *refused; /* why we do not want it, or NULL */
    uint64_t opened;    /* in which order links opened: the newest is used for sending */
    struct link *next;
};

/* A link that could not be made or used, to be told from the loop. */
struct notice {
    uint32_t member;
    char why[WHY_BYTES];
    struct notice *next;
};

struct peers {
    struct event_base *base;
    struct channel_context *ctx;
    uint32_t own;
    const struct peers_ops *ops;
    void *arg;
    struct link *links;
    struct notice *notices, **notices_end;
    struct event *tell;
    struct msg_roster_body roster; /* a deep copy */
    uint64_t opened;
    time_t complaints_since; /* monotonic seconds: the minute that is counted */
    uint32_t complaints, complaints_untold;
};

/* ---- finding --------------------------------------------------------------------------------- */

static const struct msg_member *by_id(const struct peers *p, uint32_t member) {
    for (uint32_t i = 0; i < p->roster.members_count; i++)
        if (p->roster.members[i].member == member) return &p->roster.members[i];
    return NULL;
}

static const struct msg_member *by_key(const struct peers *p, const struct proto_key *key) {
    for (uint32_t i = 0; i < p->roster.members_count; i++)
        if (!memcmp(&p->roster.members[i].key, key, sizeof *key)) return &p->roster.members[i];
    return NULL;
}

/* The link that is used for sending to a member, or NULL. */
static struct link *newest(const struct peers *p, uint32_t member) {
    struct link *best = NULL;
    for (struct link *l = p->links; l; l = l->next)
        if (l->member == member && l->open && (!best || l->opened > best->opened)) best = l;
    return best;
}

static bool has_any(const struct peers *p, uint32_t member) {
    for (struct link *l = p->links; l; l = l->next)
        if (l->member == member) return true;
    return false;
}

/* ---- links come and go ----------------------------------------------------------------------- */

static struct link *add_link(struct peers *p, uint32_t member, bool outbound) {
    struct link *l = calloc(1, sizeof *l);
    if (!l) return NULL;
    *l = (struct link){ .peers = p, .member = member, .outbound = outbound, .next = p->links };
    p->links = l;
    return l;
}

/* Take off the list and free; the channel is the caller's affair. */
static void drop_link(struct link *l) {
    struct link **at = &l->peers->links;
    while (*at != l) at = &(*at)->next;
    *at = l->next;
    free(l);
}

static void close_link(struct link *l) {
    channel_close(l->channel, false);
    drop_link(l);
}

static void notify(struct peers *p, uint32_t member, const char *why) {
    struct notice *n = calloc(1, sizeof *n);
    if (!n) return; /* out of memory: sync's own timers must find out */
    n->member = member;
    snprintf(n->why, sizeof n->why, "%s", why);
    *p->notices_end = n;
    p->notices_end = &n->next;
    struct timeval now = {0};
    event_add(p->tell, &now);
}

static void on_tell(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct peers *p = arg;
    struct notice *n = p->notices;
    p->notices = NULL;
    p->notices_end = &p->notices;
    while (n) {
        struct notice *next = n->next;
        p->ops->on_close(p->arg, n->member, n->why);
        if (newest(p, n->member)) p->ops->on_open(p->arg, n->member);
        free(n);
        n = next;
    }
}

/* ---- complaints ------------------------------------------------------------------------------ */

/* Strangers must not be able to fill a disk with lines about them. */
static bool may_complain(struct peers *p) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (now.tv_sec - p->complaints_since >= MINUTE_S) {
        p->complaints_since = now.tv_sec;
        p->complaints = 0;
    }
    if (p->complaints++ < PEERS_COMPLAINTS_MAX) return true;
    p->complaints_untold++;
    return false;
}

/* Who merely goes away is no news; who was refused, broke the rules or took too long is. */
static bool is_news(const struct link *l, enum err_code code) {
    if (l->outbound && !l->open) return false; /* on_close says why */
    return code == ERR_PROTOCOL || code == ERR_TRUNCATED || code == ERR_REFUSED ||
           code == ERR_TIMEOUT;
}

static void complain(const struct link *l, const char *why) {
    struct peers *p = l->peers;
    char host[PROTO_ADDRESS_BYTES_MAX + 1], text[COMPLAINT_BYTES], more[64] = "";
    uint16_t port;
    if (!may_complain(p)) return;
    if (p->complaints_untold)
        snprintf(more, sizeof more, " (and %u others since the last such line)",
                 p->complaints_untold);
    p->complaints_untold = 0;
    channel_peer_address(l->channel, host, &port);
    if (l->member)
        snprintf(text, sizeof text, "link to member %u: %.200s%s", l->member, why, more);
    else
        snprintf(text, sizeof text, "connection from %.64s port %u: %.200s%s", host, (unsigned)port,
                 why, more);
    p->ops->on_complaint(p->arg, text);
}

/* ---- the channels ---------------------------------------------------------------------------- */

static const char *why_refused(const struct link *l, const struct msg_member *m) {
    if (!m) return "its key is not in the roster";
    if (m->member == l->peers->own) return "it is this member itself";
    if (l->outbound && m->member != l->member) return "another member answers there";
    return NULL;
}

/* A member that dials again has lost what it had: an older connection from it is dead. */
static void replace_same_direction(struct link *l) {
    struct link *next;
    for (struct link *o = l->peers->links; o; o = next) {
        next = o->next;
        if (o != l && o->member == l->member && o->outbound == l->outbound && o->open)
            close_link(o);
    }
}

static bool on_open(void *arg, struct channel *ch, const struct proto_key *key) {
    struct link *l = arg;
    struct peers *p = l->peers;
    const struct msg_member *m = by_key(p, key);
    if ((l->refused = why_refused(l, m))) return false;
    bool switched = newest(p, m->member) != NULL;
    l->member = m->member;
    l->open = true;
    l->opened = ++p->opened;
    channel_set_frame_bytes_max(ch, PROTO_FRAME_BYTES_MAX);
    replace_same_direction(l);
    uint32_t member = l->member;
    /* What was queued on the other connection may be lost with it: sync starts this link anew. */
    if (switched) p->ops->on_close(p->arg, member, "another connection takes over");
    if (newest(p, member)) p->ops->on_open(p->arg, member);
    return true;
}

static void on_message(void *arg, struct channel *ch, const struct frame *f, const void *msg) {
    struct link *l = arg;
    (void)ch;
    l->peers->ops->on_message(l->peers->arg, l->member, f, msg);
}

static void on_drained(void *arg, struct channel *ch) {
    struct link *l = arg;
    (void)ch;
    if (l->open && newest(l->peers, l->member) == l)
        l->peers->ops->on_drained(l->peers->arg, l->member);
}

static void on_close(void *arg, struct channel *ch, const struct err *why) {
    struct link *l = arg;
    struct peers *p = l->peers;
    l->channel = ch; /* it may end before channel_accept() has returned */
    uint32_t member = l->member;
    bool was_used = l->open && newest(p, member) == l;
    bool failed_dial = l->outbound && !l->open;
    if (is_news(l, why->code)) complain(l, l->refused ? l->refused : why->msg);
    drop_link(l);
    if (was_used || (failed_dial && !has_any(p, member)))
        p->ops->on_close(p->arg, member, why->msg);
    if (was_used && newest(p, member)) p->ops->on_open(p->arg, member);
}

static const struct channel_ops channel_callbacks = {
    .on_open = on_open, .on_message = on_message, .on_close = on_close, .on_drained = on_drained
};

/* ---- for the agent --------------------------------------------------------------------------- */

struct peers *peers_create(struct event_base *base, struct channel_context *ctx, uint32_t own,
                           const struct peers_ops *ops, void *arg, struct err *err) {
    struct peers *p = calloc(1, sizeof *p);
    if (!p || !(p->tell = evtimer_new(base, on_tell, p))) {
        free(p);
        err_set(err, ERR_MEMORY, "no memory for links to members");
        return NULL;
    }
    p->base = base;
    p->ctx = ctx;
    p->own = own;
    p->ops = ops;
    p->arg = arg;
    p->notices_end = &p->notices;
    return p;
}

void peers_destroy(struct peers *p) {
    if (!p) return;
    while (p->links) close_link(p->links);
    while (p->notices) {
        struct notice *n = p->notices;
        p->notices = n->next;
        free(n);
    }
    event_free(p->tell);
    proto_copy_release(RECORD_roster_body, &p->roster);
    free(p);
}

int peers_set_roster(struct peers *p, const struct msg_roster_body *roster, struct err *err) {
    struct msg_roster_body copy;
    if (proto_copy(RECORD_roster_body, roster, &copy, err)) return -1;
    proto_copy_release(RECORD_roster_body, &p->roster);
    p->roster = copy;
    struct link *next;
    for (struct link *l = p->links; l; l = next) {
        next = l->next;
        if (!l->open) continue;
        const struct msg_member *m = by_id(p, l->member);
        if (m && !memcmp(&m->key, channel_peer_key(l->channel), sizeof m->key)) continue;
        notify(p, l->member, "no longer in the roster");
        close_link(l);
    }
    return 0;
}

static uint32_t strangers(const struct peers *p) {
    uint32_t n = 0;
    for (const struct link *l = p->links; l; l = l->next) n += !l->open && !l->outbound;
    return n;
}

void peers_accept(struct peers *p, int fd) {
    struct link *l = strangers(p) < STRANGERS_MAX ? add_link(p, 0, false) : NULL;
    if (!l) {
        close(fd);
        return;
    }
    l->channel = channel_accept(p->base, p->ctx, fd, &channel_callbacks, l, NULL);
    if (!l->channel) drop_link(l);
}

void peers_dial(struct peers *p, uint32_t member, const char *host, uint16_t port) {
    struct err err = {0};
    if (has_any(p, member)) return;
    struct link *l = add_link(p, member, true);
    if (!l) {
        notify(p, member, "no memory for a link");
        return;
    }
    l->channel = channel_dial(p->base, p->ctx, host, port, &channel_callbacks, l, &err);
    if (l->channel) return;
    drop_link(l);
    notify(p, member, err.msg);
}

void peers_send(struct peers *p, uint32_t member, uint8_t type, uint64_t term, uint64_t session,
                uint64_t plan, const void *msg) {
    struct link *l = newest(p, member);
    if (!l) {
        if (!has_any(p, member)) notify(p, member, "no link"); /* else the dial's end will tell */
        return;
    }
    struct err err = {0};
    if (!channel_send(l->channel, type, term, session, plan, msg, &err)) return;
    notify(p, member, err.msg);
    close_link(l);
}

void peers_close(struct peers *p, uint32_t member) {
    struct link *next;
    for (struct link *l = p->links; l; l = next) {
        next = l->next;
        if (l->member == member) close_link(l);
    }
}

uint32_t peers_count(const struct peers *p) {
    uint32_t n = 0;
    for (const struct link *l = p->links; l; l = l->next) n += l->open && newest(p, l->member) == l;
    return n;
}
