/* link.c - one connection of a client that may do anything: bytes out, frames in; see hostile.h. */
#include "tests/hostile/hostile.h"

#include <arpa/inet.h>
#include <errno.h>
#include <openssl/err.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "proto/tls.h"

#define IN_BYTES (PROTO_FRAME_BYTES_MAX + PROTO_FRAME_HEADER_BYTES)

uint64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* ---- opening and closing -------------------------------------------------------------------------- */

int link_open(struct link *l, const struct target *t, const char *from, struct err *err) {
    struct sockaddr_in here = {.sin_family = AF_INET}, there = {.sin_family = AF_INET, .sin_port = htons(t->port)};
    struct timeval wait = {.tv_usec = IDLE_MS * 1000}, patience = {.tv_sec = PATIENCE_MS / 1000};
    *l = (struct link){.fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), .record = -1};
    if (l->fd < 0 || inet_pton(AF_INET, t->host, &there.sin_addr) != 1 || inet_pton(AF_INET, from, &here.sin_addr) != 1)
        return err_set(err, ERR_CONFIG, "%s and %s are not two IPv4 addresses", from, t->host);
    setsockopt(l->fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
    setsockopt(l->fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (bind(l->fd, (struct sockaddr *)&here, sizeof here)) return err_set_errno(err, "bind to %s", from);
    if (connect(l->fd, (struct sockaddr *)&there, sizeof there))
        return err_set_errno(err, "connect to %s:%u", t->host, t->port);
    return 0;
}

static void describe_end(struct link *l, int rc) {
    unsigned long code = ERR_peek_error();
    int reason = l->ssl ? SSL_get_error(l->ssl, rc) : SSL_ERROR_SYSCALL;
    l->over = true;
    if (l->heard[0]) return; /* a BYE says more */
    if (reason == SSL_ERROR_ZERO_RETURN || (reason == SSL_ERROR_SYSCALL && rc == 0))
        snprintf(l->heard, sizeof l->heard, "closed");
    else if (code)
        snprintf(l->heard, sizeof l->heard, "TLS: %s", ERR_reason_error_string(code));
    else
        snprintf(l->heard, sizeof l->heard, "%s", strerror(errno));
}

int link_start_tls(struct link *l, const struct target *t, SSL_CTX *ctx, struct err *err) {
    if (!ctx && !(ctx = tls_context_create(&t->id, err))) return -1;
    ERR_clear_error();
    l->ssl = SSL_new(ctx);
    SSL_CTX_free(ctx);
    if (!l->ssl || SSL_set_fd(l->ssl, l->fd) != 1) return err_set(err, ERR_MEMORY, "no memory for TLS");
    for (uint64_t end = now_ms() + PATIENCE_MS; now_ms() < end;) {
        int rc = SSL_connect(l->ssl);
        if (rc == 1) return 0;
        int reason = SSL_get_error(l->ssl, rc);
        if (reason == SSL_ERROR_WANT_READ || reason == SSL_ERROR_WANT_WRITE) continue;
        describe_end(l, rc);
        return err_set(err, ERR_REFUSED, "%.200s", l->heard);
    }
    return err_set(err, ERR_TIMEOUT, "no TLS handshake");
}

int link_dial(struct link *l, const struct target *t, struct err *err) {
    return link_open(l, t, t->from, err) ? -1 : link_start_tls(l, t, NULL, err);
}

int link_greet(struct link *l, struct err *err) {
    struct msg_link first = {.process = 666, .number = 1};
    if (link_send(l, MSG_LINK, 0, &first) && link_expect(l, MSG_LINK)) return 0;
    return err_set(err, ERR_REFUSED, "%.200s", l->heard);
}

static void forget_message(struct link *l) {
    if (l->record < 0) return;
    proto_decoded_release((enum proto_record)l->record, &l->msg);
    size_t used = PROTO_FRAME_HEADER_BYTES + l->frame.length;
    memmove(l->in, l->in + used, l->have - used);
    l->have -= used;
    l->record = -1;
}

void link_close(struct link *l) {
    forget_message(l);
    if (l->ssl && !l->over) SSL_shutdown(l->ssl);
    SSL_free(l->ssl);
    if (l->fd >= 0) close(l->fd);
    free(l->in);
    *l = (struct link){.fd = -1, .record = -1};
}

/* ---- out -------------------------------------------------------------------------------------------- */

bool link_write(struct link *l, const void *bytes, size_t length) {
    const uint8_t *at = bytes;
    ERR_clear_error();
    while (length && !l->over) {
        int n = l->ssl ? SSL_write(l->ssl, at, (int)length) : (int)send(l->fd, at, length, MSG_NOSIGNAL);
        if (n <= 0) {
            describe_end(l, n);
            break;
        }
        at += n;
        length -= (size_t)n;
    }
    return length == 0;
}

bool link_send(struct link *l, enum proto_type type, uint64_t plan, const void *msg) {
    uint8_t header[PROTO_FRAME_HEADER_BYTES];
    struct proto_buffer b;
    struct err err;
    proto_buffer_init(&b, PROTO_FRAME_BYTES_MAX);
    int which = proto_record_of_type((uint8_t)type);
    bool ok = proto_encode(&b, (enum proto_record)which, msg, &err) == 0;
    if (!ok) fprintf(stderr, "%s: %s\n", proto_type_name((uint8_t)type), err.msg);
    struct frame f = {(uint8_t)type, (uint32_t)b.length, l->term, l->session, plan};
    frame_write(&f, header);
    ok = ok && link_write(l, header, sizeof header) && link_write(l, b.data, b.length);
    proto_buffer_release(&b);
    return ok;
}

/* ---- in --------------------------------------------------------------------------------------------- */

static void remember_words(struct link *l) {
    char text[PROTO_TEXT_BYTES_MAX + 1];
    if (l->frame.type == MSG_BYE) {
        proto_str_copy(l->msg.bye.reason, text, sizeof text);
        snprintf(l->heard, sizeof l->heard, "BYE%s: %s", l->msg.bye.final ? " (final)" : "", text);
    } else if (l->frame.type == MSG_RESET) {
        proto_str_copy(l->msg.reset.reason, text, sizeof text);
        snprintf(l->heard, sizeof l->heard, "RESET: %s", text);
    }
}

/* Take a whole message off the front of what came. */
static bool take_message(struct link *l) {
    struct err err;
    if (!l->ssl || l->have < PROTO_FRAME_HEADER_BYTES) return false;
    if (frame_read(l->in, PROTO_FRAME_BYTES_MAX, &l->frame, &err)) {
        fprintf(stderr, "the other side broke the protocol: %s\n", err.msg);
        abort();
    }
    if (l->have < PROTO_FRAME_HEADER_BYTES + l->frame.length) return false;
    int which = proto_record_of_type(l->frame.type);
    if (proto_decode(l->in + PROTO_FRAME_HEADER_BYTES, l->frame.length, (enum proto_record)which, &l->msg, &err)) {
        fprintf(stderr, "the other side broke the protocol: %s\n", err.msg);
        abort();
    }
    l->record = which;
    remember_words(l);
    return true;
}

/* Read what is there, or wait for about IDLE_MS. */
static void read_some(struct link *l) {
    ERR_clear_error();
    if (!l->ssl) l->have = 0;
    size_t room = IN_BYTES - l->have;
    int n = l->ssl ? SSL_read(l->ssl, l->in + l->have, (int)room) : (int)recv(l->fd, l->in, room, 0);
    if (n > 0) {
        l->have += (size_t)n;
        return;
    }
    if (l->ssl ? SSL_get_error(l->ssl, n) == SSL_ERROR_WANT_READ : n < 0 && errno == EAGAIN) return;
    describe_end(l, n);
}

int link_receive(struct link *l, int ms) {
    uint64_t end = now_ms() + (uint64_t)ms;
    forget_message(l);
    if (!l->in && !(l->in = malloc(IN_BYTES))) abort();
    do {
        if (take_message(l)) return l->frame.type;
        if (l->on_idle && now_ms() >= l->idle_ms) {
            l->idle_ms = now_ms() + IDLE_MS;
            l->on_idle(l->idle_arg);
        }
        read_some(l);
    } while (!l->over && now_ms() < end);
    return take_message(l) ? l->frame.type : 0;
}

bool link_expect(struct link *l, enum proto_type type) {
    for (uint64_t end = now_ms() + PATIENCE_MS; now_ms() < end && !l->over;)
        if (link_receive(l, IDLE_MS) == (int)type) return true;
    return false;
}

bool link_hear_out(struct link *l) {
    for (uint64_t end = now_ms() + PATIENCE_MS; now_ms() < end;)
        if (link_receive(l, IDLE_MS) == 0 && l->over) return true;
    snprintf(l->heard, sizeof l->heard, "still connected after %d ms", PATIENCE_MS);
    return false;
}
