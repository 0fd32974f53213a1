/* server_connections.c - sockets in. A stranger costs little: the gate says how many there may be,
 * its frames are small, and it has a time limit (the channel's) to become a member. */
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "coordinator/server_internal.h"

struct connection *server_connection(struct server *s, uint64_t id) {
    struct connection *c = &s->conns[id % SERVER_CONNECTIONS_MAX];
    return c->id == id && id ? c : NULL;
}

static void forget(struct connection *c) {
    if (c->place) gate_leave(c->place);
    c->place = NULL;
    c->id = 0;
}

void server_connection_known(struct connection *c) {
    if (!c->place) return;
    gate_known(c->place);
    c->place = NULL;
    c->server->stranger_speaks = false;
    channel_set_frame_bytes_max(c->channel, PROTO_CONTROL_BYTES_MAX);
}

void server_connection_close(struct connection *c) {
    struct channel *channel = c->channel;
    forget(c);
    channel_close(channel, true);
}

/* ---- who may connect ------------------------------------------------------------------------------ */

/* Others want its place, and it had time enough to say who it is. */
static void on_evict(void *arg) {
    struct connection *c = arg;
    struct core_event ev = { .type = CORE_EV_CLOSED, .conn = c->id };
    bool open = c->open;
    c->place = NULL;
    c->id = 0;
    channel_close(c->channel, false);
    if (open) server_step(c->server, &ev);
}

void server_report_refused(struct server *s) {
    uint32_t refused = gate_take_refused(s->gate);
    if (refused)
        log_line(CORE_WARNING, "%u new connections refused: serve.strangers_max %u, "
                 "serve.connects_per_minute %u", refused, s->config->settings->strangers_max,
                 s->config->settings->connects_per_minute);
}

void server_tell(struct server *s, bool of_member, const char *text) {
    uint32_t untold;
    if (!gate_may_tell(s->gate, of_member, server_now_ms(), &untold)) return;
    if (untold) log_line(CORE_WARNING, "%s (and %u like it untold)", text, untold);
    else log_line(CORE_WARNING, "%s", text);
}

static struct connection *free_place(struct server *s) {
    for (uint32_t tries = 0; tries < SERVER_CONNECTIONS_MAX; tries++) {
        uint64_t id = ++s->connection_count_ever; /* not 0 before 2^64 connections */
        struct connection *c = &s->conns[id % SERVER_CONNECTIONS_MAX];
        if (c->id) continue;
        *c = (struct connection){ .id = id, .server = s };
        return c;
    }
    return NULL;
}

/* ---- what channels say ----------------------------------------------------------------------------- */

/* A peer we see on loopback is on this machine; others reach it where they reach us. */
static void address_of(const struct server *s, struct channel *ch, char *host) {
    uint16_t port;
    channel_peer_address(ch, host, &port);
    if (address_is_loopback(host)) memcpy(host, s->others.host, sizeof s->others.host);
}

static bool on_open(void *arg, struct channel *ch, const struct proto_key *key) {
    struct connection *c = arg;
    struct server *s = c->server;
    struct msg_welcome welcome = {
        .version = PROTO_VERSION,
        .genesis = { s->run->genesis_bytes, (uint32_t)s->run->genesis_length },
        .delegation = s->keys.delegation.bytes,
        .delegation_signature = s->keys.delegation.signature,
    };
    struct core_event ev = { .type = CORE_EV_OPENED, .conn = c->id, .key = *key };
    struct err err;
    if (channel_send(ch, MSG_WELCOME, s->term, 0, 0, &welcome, &err)) {
        log_line(CORE_ERROR, "cannot send a WELCOME: %s", err.msg);
        return false;
    }
    address_of(s, ch, ev.host);
    c->open = true;
    server_step(s, &ev);
    return true;
}

static void on_message(void *arg, struct channel *ch, const struct frame *f, const void *msg) {
    struct connection *c = arg;
    struct server *s = c->server;
    struct core_event ev = { .type = CORE_EV_MESSAGE, .conn = c->id, .frame = *f, .msg = msg };
    struct core_invite invite;
    struct err err;
    (void)ch;
    if (f->type == MSG_ENROL) {
        const struct msg_enrol *enrol = msg;
        if (store_invite_find(s->run->store, &enrol->secret, server_unix_ms(), &invite, &err)) {
            server_fail(s, &err);
            return;
        }
        ev.invite = &invite;
    }
    s->stranger_speaks = c->place != NULL;
    server_step(s, &ev);
    s->stranger_speaks = false;
}

/* Who merely goes away is no news; who was refused, broke the rules or took too long is. */
static bool is_news(enum err_code code) {
    return code == ERR_PROTOCOL || code == ERR_TRUNCATED || code == ERR_REFUSED || code == ERR_TIMEOUT;
}

static void tell_end(struct connection *c, struct channel *ch, const char *why) {
    char host[PROTO_ADDRESS_BYTES_MAX + 1], text[PROTO_ADDRESS_BYTES_MAX + 320];
    uint16_t port;
    channel_peer_address(ch, host, &port);
    snprintf(text, sizeof text, "%s port %u: %s", host, (unsigned)port, why);
    server_tell(c->server, c->place == NULL, text);
}

static void on_close(void *arg, struct channel *ch, const struct err *why) {
    struct connection *c = arg;
    struct server *s = c->server;
    struct core_event ev = { .type = CORE_EV_CLOSED, .conn = c->id };
    bool open = c->open;
    if (is_news(why->code)) tell_end(c, ch, why->msg);
    forget(c);
    if (open) server_step(s, &ev);
}

static bool enters(struct server *s, int fd, struct connection *c) {
    struct sockaddr_storage peer = {0};
    socklen_t length = sizeof peer;
    if (s->stopping || !c || getpeername(fd, (struct sockaddr *)&peer, &length)) return false;
    c->place = gate_enter(s->gate, &peer, server_now_ms(), on_evict, c);
    return c->place != NULL;
}

void server_on_accept(void *arg, int fd) {
    static const struct channel_ops ops = { on_open, on_message, on_close, NULL };
    struct server *s = arg;
    struct err err;
    struct connection *c = free_place(s);
    if (!enters(s, fd, c)) {
        if (c) c->id = 0;
        close(fd);
        return;
    }
    c->channel = channel_accept(s->base, s->tls, fd, &ops, c, &err);
    if (c->channel) return;
    log_line(CORE_WARNING, "cannot take a connection: %s", err.msg);
    forget(c);
}
