/* server_connections.c - sockets in. A stranger costs little: few of them at a time, few per minute
 * of one address, small frames, and a time limit (the channel's) to become a member. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "coordinator/server_internal.h"

struct connection *server_connection(struct server *s, uint64_t id) {
    struct connection *c = &s->conns[id % SERVER_CONNECTIONS_MAX];
    return c->id == id && id ? c : NULL;
}

static void forget(struct server *s, struct connection *c) {
    if (!c->known) s->stranger_count--;
    c->id = 0;
}

void server_connection_known(struct server *s, struct connection *c) {
    if (c->known) return;
    c->known = true;
    s->stranger_count--;
    channel_set_frame_bytes_max(c->channel, PROTO_CONTROL_BYTES_MAX);
}

void server_connection_close(struct server *s, struct connection *c) {
    struct channel *channel = c->channel;
    forget(s, c);
    channel_close(channel, true);
}

/* ---- who may connect ------------------------------------------------------------------------------ */

/* IPv6 hosts own a /64 each, so that is what counts as one address. */
static uint64_t address_digest(const struct server *s, const struct sockaddr_storage *peer) {
    uint8_t bytes[sizeof s->rate_seed + 8] = {0};
    memcpy(bytes, s->rate_seed, sizeof s->rate_seed);
    if (peer->ss_family == AF_INET6)
        memcpy(bytes + sizeof s->rate_seed,
               &((const struct sockaddr_in6 *)(const void *)peer)->sin6_addr, 8);
    else
        memcpy(bytes + sizeof s->rate_seed,
               &((const struct sockaddr_in *)(const void *)peer)->sin_addr, 4);
    struct digest d = digest_of(bytes, sizeof bytes);
    uint64_t short_digest;
    memcpy(&short_digest, d.b, sizeof short_digest);
    return short_digest;
}

static bool rate_allows(struct server *s, uint64_t address, uint64_t now_ms) {
    double full = s->config->settings->connects_per_minute;
    struct rate *r = &s->rates[address % SERVER_RATES];
    if (r->address != address) *r = (struct rate){ address, full, now_ms };
    r->tokens += full * (double)(now_ms - r->at_ms) / 60000;
    if (r->tokens > full) r->tokens = full;
    r->at_ms = now_ms;
    if (r->tokens < 1) return false;
    r->tokens -= 1;
    return true;
}

static bool may_connect(struct server *s, int fd) {
    struct sockaddr_storage peer = {0};
    socklen_t length = sizeof peer;
    if (s->stopping || s->stranger_count >= s->config->settings->strangers_max) return false;
    if (getpeername(fd, (struct sockaddr *)&peer, &length)) return false;
    return rate_allows(s, address_digest(s, &peer), server_now_ms());
}

void server_report_refused(struct server *s) {
    if (!s->refused) return;
    log_line(CORE_WARNING, "%u new connections refused: serve.strangers_max %u, "
             "serve.connects_per_minute %u", s->refused, s->config->settings->strangers_max,
             s->config->settings->connects_per_minute);
    s->refused = 0;
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
    server_step(s, &ev);
}

/* Who merely goes away is no news; who was refused, broke the rules or took too long is. */
static bool is_news(enum err_code code) {
    return code == ERR_PROTOCOL || code == ERR_TRUNCATED || code == ERR_REFUSED || code == ERR_TIMEOUT;
}

static void on_close(void *arg, struct channel *ch, const struct err *why) {
    struct connection *c = arg;
    struct server *s = c->server;
    struct core_event ev = { .type = CORE_EV_CLOSED, .conn = c->id };
    char host[PROTO_ADDRESS_BYTES_MAX + 1];
    uint16_t port;
    bool open = c->open;
    if (is_news(why->code)) {
        channel_peer_address(ch, host, &port);
        log_line(CORE_WARNING, "%s port %u: %s", host, (unsigned)port, why->msg);
    }
    forget(s, c);
    if (open) server_step(s, &ev);
}

void server_on_accept(void *arg, int fd) {
    static const struct channel_ops ops = { on_open, on_message, on_close, NULL };
    struct server *s = arg;
    struct err err;
    struct connection *c = may_connect(s, fd) ? free_place(s) : NULL;
    if (!c) {
        s->refused++;
        close(fd);
        return;
    }
    s->stranger_count++;
    c->channel = channel_accept(s->base, s->tls, fd, &ops, c, &err);
    if (c->channel) return;
    log_line(CORE_WARNING, "cannot take a connection: %s", err.msg);
    forget(s, c);
}
