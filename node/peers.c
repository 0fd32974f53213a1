/* peers.c - the door of the links to other members: who may connect, first words, the roster, what the
 * agent calls; see peers.h and links.h. */
#include "node/peers.h"

#include <event2/event.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "node/links.h"

#define COMPLAINT_BYTES 400
#define REFUSED_TELL_MS 10000
/* Connections of one member at once: a link in each direction, and as many that are being replaced. */
#define GUESTS_OF_MEMBER_MAX (2 * (PEERS_LANES_MAX + 1))

uint64_t peers_now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* ---- the roster -------------------------------------------------------------------------------- */

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

/* ---- told from the loop ------------------------------------------------------------------------ */

void peers_notify(struct peers *p, uint32_t member, const char *why) {
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
        if (links_current(p, n->member)) p->ops->on_open(p->arg, n->member);
        free(n);
        n = next;
    }
}

/* ---- complaints -------------------------------------------------------------------------------- */

/* Who merely goes away is no news; who was refused, broke the rules or took too long is. */
static bool is_news(const struct lane *l, enum err_code code) {
    if (l->outbound && !l->open) return false; /* on_close says why */
    return code == ERR_PROTOCOL || code == ERR_TRUNCATED || code == ERR_REFUSED ||
           code == ERR_TIMEOUT;
}

void peers_complain(const struct lane *l, const char *why) {
    struct peers *p = l->peers;
    char host[PROTO_ADDRESS_BYTES_MAX + 1], text[COMPLAINT_BYTES], more[64] = "";
    uint16_t port;
    uint32_t untold;
    if (!gate_may_tell(p->gate, l->member != 0, peers_now_ms(), &untold)) return;
    if (untold)
        snprintf(more, sizeof more, " (and %u others since the last such line)", untold);
    channel_peer_address(l->channel, host, &port);
    if (l->member)
        snprintf(text, sizeof text, "link to member %u: %.200s%s", l->member, why, more);
    else
        snprintf(text, sizeof text, "connection from %.64s port %u: %.200s%s", host, (unsigned)port,
                 why, more);
    p->ops->on_complaint(p->arg, text);
}

static void complain_of_refused(struct peers *p) {
    char text[COMPLAINT_BYTES];
    uint64_t now = peers_now_ms();
    if (now - p->refused_told_ms < REFUSED_TELL_MS) return;
    uint32_t refused = gate_take_refused(p->gate);
    if (!refused) return;
    p->refused_told_ms = now;
    snprintf(text, sizeof text, "%u new connections refused: at most %u strangers at once, %u "
             "connections a minute of one address", refused, PEERS_STRANGERS_MAX,
             PEERS_CONNECTS_PER_MINUTE);
    p->ops->on_complaint(p->arg, text);
}

/* ---- guests: accepted, and of no link yet ------------------------------------------------------ */

static void forget_guest(struct lane *l) {
    struct lane **at = &l->peers->guests;
    while (*at != l) at = &(*at)->next;
    *at = l->next;
    if (l->place) gate_leave(l->place);
    l->place = NULL;
}

/* Others want its place, and it had time enough to say who it is. */
static void on_evict(void *arg) {
    struct lane *l = arg;
    l->place = NULL;
    forget_guest(l);
    channel_close(l->channel, false);
    free(l);
}

void peers_accept(struct peers *p, int fd) {
    struct sockaddr_storage peer = {0};
    socklen_t length = sizeof peer;
    struct lane *l = calloc(1, sizeof *l);
    complain_of_refused(p);
    if (l && !getpeername(fd, (struct sockaddr *)&peer, &length))
        l->place = gate_enter(p->gate, &peer, peers_now_ms(), on_evict, l);
    if (!l || !l->place) {
        close(fd);
        free(l);
        return;
    }
    l->peers = p;
    l->next = p->guests;
    p->guests = l;
    l->channel = channel_accept(p->base, p->ctx, fd, &peers_channel_ops, l, NULL);
    if (l->channel) return;
    forget_guest(l);
    free(l);
}

static uint32_t guests_of(const struct peers *p, uint32_t member) {
    uint32_t n = 0;
    for (const struct lane *l = p->guests; l; l = l->next) n += l->member == member;
    return n;
}

/* ---- the channels ------------------------------------------------------------------------------ */

static const char *why_refused(const struct lane *l, const struct msg_member *m) {
    if (!m) return "its key is not in the roster";
    if (m->member == l->peers->own) return "it is this member itself";
    if (l->outbound && m->member != l->member) return "another member answers there";
    if (!l->outbound && guests_of(l->peers, m->member) >= GUESTS_OF_MEMBER_MAX)
        return "it has too many connections";
    return NULL;
}

static bool on_open(void *arg, struct channel *ch, const struct proto_key *key) {
    struct lane *l = arg;
    const struct msg_member *m = by_key(l->peers, key);
    if ((l->refused = why_refused(l, m))) return false;
    l->member = m->member;
    if (l->place) gate_known(l->place);
    l->place = NULL;
    if (!l->outbound) return true;
    struct msg_link first = { .process = l->peers->process, .number = l->link->number,
                              .lane = l->number };
    channel_send(ch, MSG_LINK, 0, 0, 0, &first, NULL);
    return true;
}

/* It broke the rules: what it sent has no place here. */
static void cast_out(struct lane *l, const char *why) {
    struct channel *ch = l->channel;
    peers_complain(l, why);
    if (l->link) {
        links_lane_lost(l, why);
    } else {
        forget_guest(l);
        free(l);
    }
    channel_close(ch, true);
}

static void on_first_word(struct lane *l, const struct frame *f, const void *msg) {
    const char *why = "its first word is not LINK";
    if (f->type != MSG_LINK) {
        cast_out(l, why);
    } else if (l->outbound) {
        if (links_answered(l, msg, &why)) cast_out(l, why);
    } else {
        forget_guest(l);
        if (!links_greet(l, msg, &why)) return;
        l->next = l->peers->guests; /* so that it is cast out from where it was */
        l->peers->guests = l;
        cast_out(l, why);
    }
}

static void on_message(void *arg, struct channel *ch, const struct frame *f, const void *msg) {
    struct lane *l = arg;
    struct peers *p = l->peers;
    (void)ch;
    if (!l->open) {
        on_first_word(l, f, msg);
        return;
    }
    switch (links_hear(l, f, msg)) {
    case HEARD_AGENT: p->ops->on_message(p->arg, l->member, f, msg); break;
    case HEARD_OWN: break;
    case HEARD_WRONG: cast_out(l, "what it sent has no place on this connection"); break;
    }
}

static void on_drained(void *arg, struct channel *ch) {
    struct lane *l = arg;
    (void)ch;
    if (l->open && links_current(l->peers, l->member) == l->link && links_drained(l->link))
        l->peers->ops->on_drained(l->peers->arg, l->member);
}

static void on_close(void *arg, struct channel *ch, const struct err *why) {
    struct lane *l = arg;
    (void)ch;
    const char *text = l->refused ? l->refused : why->msg;
    if (is_news(l, why->code)) peers_complain(l, text);
    l->channel = NULL;
    if (l->link) {
        links_lane_lost(l, text);
        return;
    }
    forget_guest(l);
    free(l);
}

const struct channel_ops peers_channel_ops = {
    .on_open = on_open, .on_message = on_message, .on_close = on_close, .on_drained = on_drained
};

/* ---- for the agent ----------------------------------------------------------------------------- */

struct peers *peers_create(struct event_base *base, struct channel_context *ctx, uint32_t own,
                           const struct peers_ops *ops, void *arg, struct err *err) {
    struct gate_limits limits = { PEERS_STRANGERS_MAX, PEERS_CONNECTS_PER_MINUTE };
    struct peers *p = calloc(1, sizeof *p);
    if (!p || !(p->tell = evtimer_new(base, on_tell, p)) || !(p->gate = gate_create(&limits, err))) {
        if (p && p->tell) event_free(p->tell);
        free(p);
        err_set(err, ERR_MEMORY, "no memory for links to members");
        return NULL;
    }
    p->base = base;
    p->ctx = ctx;
    p->own = own;
    p->ops = ops;
    p->arg = arg;
    p->bulk_lanes = PEERS_BULK_LANES;
    p->bulk_lanes_local = PEERS_BULK_LANES_LOCAL;
    p->notices_end = &p->notices;
    randombytes_buf(&p->process, sizeof p->process);
    return p;
}

void peers_set_bulk_lanes(struct peers *p, uint32_t lanes) {
    p->bulk_lanes = p->bulk_lanes_local = lanes < PEERS_LANES_MAX ? lanes : PEERS_LANES_MAX;
}

void peers_destroy(struct peers *p) {
    if (!p) return;
    while (p->links) links_close(p->links, false);
    for (struct lane *l = p->guests, *next; l; l = next) {
        next = l->next;
        channel_close(l->channel, false);
        free(l);
    }
    while (p->notices) {
        struct notice *n = p->notices;
        p->notices = n->next;
        free(n);
    }
    gate_destroy(p->gate);
    event_free(p->tell);
    proto_copy_release(RECORD_roster_body, &p->roster);
    free(p);
}

/* Close all links to a member and tell from the loop, if the agent knew of one. */
static void cut(struct peers *p, uint32_t member, const char *why) {
    bool told = links_current(p, member) != NULL;
    peers_close(p, member);
    if (told) peers_notify(p, member, why);
}

static struct link *find_unwelcome(const struct peers *p) {
    for (struct link *l = p->links; l; l = l->next) {
        const struct msg_member *m = l->open ? by_id(p, l->member) : NULL;
        if (l->open &&
            (!m || memcmp(&m->key, channel_peer_key(l->lane[0]->channel), sizeof m->key)))
            return l;
    }
    return NULL;
}

int peers_set_roster(struct peers *p, const struct msg_roster_body *roster, struct err *err) {
    struct msg_roster_body copy;
    if (proto_copy(RECORD_roster_body, roster, &copy, err)) return -1;
    proto_copy_release(RECORD_roster_body, &p->roster);
    p->roster = copy;
    for (struct link *l; (l = find_unwelcome(p));) cut(p, l->member, "no longer in the roster");
    struct lane *next;
    for (struct lane *l = p->guests; l; l = next) {
        next = l->next;
        if (!l->member || by_id(p, l->member)) continue;
        forget_guest(l);
        channel_close(l->channel, false);
        free(l);
    }
    return 0;
}

void peers_dial(struct peers *p, uint32_t member, const char *host, uint16_t port) {
    struct err err = {0};
    if (links_any(p, member)) return;
    if (links_dial(p, member, host, port, &err)) peers_notify(p, member, err.msg);
}

void peers_send(struct peers *p, uint32_t member, uint8_t type, uint64_t term, uint64_t session,
                uint64_t plan, const void *msg) {
    struct link *l = links_current(p, member);
    if (!l) {
        if (!links_any(p, member)) peers_notify(p, member, "no link"); /* else the dial's end tells */
        return;
    }
    struct err err = {0};
    if (!links_send(l, type, term, session, plan, msg, &err)) return;
    peers_notify(p, member, err.msg);
    links_close(l, false);
}

void peers_close(struct peers *p, uint32_t member) {
    struct link *next;
    for (struct link *l = p->links; l; l = next) {
        next = l->next;
        if (l->member == member) links_close(l, false);
    }
}

uint32_t peers_count(const struct peers *p) {
    uint32_t n = 0;
    for (struct link *l = p->links; l; l = l->next)
        n += l->open && links_current(p, l->member) == l;
    return n;
}
