/* channel_dial.c - from a host's name to a connected socket, trying its addresses in turn. */
#include "proto/channel.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define ADDRESSES_MAX 4 /* of one host name */

static void give_up_address(struct channel *ch) {
    if (ch->writable) event_free(ch->writable);
    if (ch->fd >= 0) close(ch->fd);
    ch->writable = NULL;
    ch->fd = -1;
}

static void describe_failure(struct channel *ch, const char *what) {
    char host[PROTO_ADDRESS_BYTES_MAX + 1];
    uint16_t port;
    channel_peer_address(ch, host, &port);
    err_set(&ch->why, ERR_IO, "connect to %s port %u: %s", host, port, what);
}

static void on_connected(evutil_socket_t fd, short what, void *arg) {
    (void)what;
    struct channel *ch = arg;
    int error = 0;
    socklen_t length = sizeof error;
    channel_enter(ch);
    getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length);
    if (error) {
        describe_failure(ch, strerror(error));
        channel_dial_next(ch);
    } else {
        event_free(ch->writable);
        ch->writable = NULL;
        if (channel_start_tls(ch, (int)fd, false, &ch->why)) channel_end(ch, &ch->why);
    }
    channel_leave(ch);
}

/* Begin a connection to one address; -1 with ch->why when that fails at once. */
static int dial_address(struct channel *ch, const struct addrinfo *a) {
    memcpy(&ch->peer, a->ai_addr, a->ai_addrlen);
    ch->fd = socket(a->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (ch->fd < 0 || (connect(ch->fd, a->ai_addr, a->ai_addrlen) && errno != EINPROGRESS)) {
        describe_failure(ch, strerror(errno));
        return -1;
    }
    ch->writable = event_new(ch->base, ch->fd, EV_WRITE, on_connected, ch);
    if (!ch->writable) return err_set(&ch->why, ERR_MEMORY, "no memory for a connection");
    event_add(ch->writable, NULL);
    channel_arm(ch->deadline, ch->ctx->handshake_ms);
    return 0;
}

/* "localhost" has two addresses and many services listen on one: so try them in turn. */
void channel_dial_next(struct channel *ch) {
    give_up_address(ch);
    while (ch->address_next && ch->addresses_tried++ < ADDRESSES_MAX) {
        const struct addrinfo *a = ch->address_next;
        ch->address_next = a->ai_next;
        if (dial_address(ch, a) == 0) return;
        give_up_address(ch);
    }
    channel_end(ch, &ch->why);
}

void channel_dial_deadline(struct channel *ch) {
    char text[64];
    snprintf(text, sizeof text, "no answer within %d ms", ch->ctx->handshake_ms);
    describe_failure(ch, text);
    ch->why.code = ERR_TIMEOUT;
    channel_dial_next(ch);
}

int channel_dial_lookup(struct channel *ch, const char *host, uint16_t port, struct err *err) {
    struct addrinfo hints = {
        .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV};
    char service[8];
    snprintf(service, sizeof service, "%u", port);
    int failed = getaddrinfo(host, service, &hints, &ch->addresses);
    if (failed) {
        ch->addresses = NULL;
        return err_set(err, ERR_IO, "host \"%s\": %s", host,
                       failed == EAI_SYSTEM ? strerror(errno) : gai_strerror(failed));
    }
    ch->address_next = ch->addresses;
    return 0;
}

void channel_dial_release(struct channel *ch) {
    if (ch->addresses) freeaddrinfo(ch->addresses);
    ch->addresses = NULL;
}
