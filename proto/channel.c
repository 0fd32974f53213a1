/* channel.c - one TLS connection that carries frames, on the thread of its event_base: contexts,
 * birth and death, and what the event loop says. See channel.h for the rest. */
#include "proto/channel.h"

#include <assert.h>
#include <errno.h>
#include <event2/util.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "proto/tls.h"

#define LINGER_MS 1000
#define UNHEARD_MS 60000           /* the peer's kernel acknowledges nothing for so long: it is gone */
#define KERNEL_UNSENT_BYTES (256 << 10) /* encrypted, in the kernel: nothing overtakes it any more */

/* ---- contexts ---------------------------------------------------------------------------------- */

struct channel_context *channel_context_create(const struct identity *id, struct err *err) {
    struct channel_context *ctx = calloc(1, sizeof *ctx);
    if (!ctx) {
        err_set(err, ERR_MEMORY, "no memory for a TLS context");
        return NULL;
    }
    ctx->ssl = tls_context_create(id, err);
    if (!ctx->ssl) {
        free(ctx);
        return NULL;
    }
    proto_buffer_init(&ctx->head, PROTO_FRAME_HEADER_BYTES + PROTO_FRAME_BYTES_MAX);
    channel_context_set_timeouts(ctx, CHANNEL_HANDSHAKE_MS_MAX, CHANNEL_STRANGER_MS_MAX);
    channel_context_set_frame_time(ctx, CHANNEL_FRAME_MS_MAX, CHANNEL_FRAME_BYTES_PER_S);
    return ctx;
}

void channel_context_set_timeouts(struct channel_context *ctx, int handshake_ms, int stranger_ms) {
    ctx->handshake_ms = handshake_ms;
    ctx->stranger_ms = stranger_ms;
}

void channel_context_set_frame_time(struct channel_context *ctx, int ms, uint32_t bytes_per_s) {
    ctx->frame_ms = ms;
    ctx->frame_bytes_per_s = bytes_per_s;
}

void channel_context_destroy(struct channel_context *ctx) {
    if (!ctx) return;
    SSL_CTX_free(ctx->ssl);
    proto_buffer_release(&ctx->head);
    while (ctx->spare) {
        struct block *b = ctx->spare;
        ctx->spare = b->next;
        free(b);
    }
    free(ctx);
}

struct block *channel_block_take(struct channel_context *ctx, size_t length) {
    struct block *b;
    for (struct block **at = &ctx->spare; length >= BLOCK_BYTES_KEPT_MIN && (b = *at);
         at = &b->next) {
        if (b->capacity < length) continue;
        *at = b->next;
        ctx->spare_bytes -= b->capacity;
        *b = (struct block){.capacity = b->capacity, .length = length};
        return b;
    }
    if (!(b = malloc(sizeof *b + length))) return NULL;
    *b = (struct block){.capacity = length, .length = length};
    return b;
}

void channel_block_give(struct channel_context *ctx, struct block *b) {
    if (!b) return;
    if (b->capacity < BLOCK_BYTES_KEPT_MIN || ctx->spare_bytes + b->capacity > SPARE_BYTES_MAX) {
        free(b);
        return;
    }
    ctx->spare_bytes += b->capacity;
    b->next = ctx->spare;
    ctx->spare = b;
}

/* ---- birth and death --------------------------------------------------------------------------- */

static void on_deadline(evutil_socket_t fd, short what, void *arg);
static void on_again(evutil_socket_t fd, short what, void *arg);

void channel_arm(struct event *timer, int ms) {
    struct timeval in = {.tv_sec = ms / 1000, .tv_usec = ms % 1000 * 1000};
    evtimer_add(timer, &in);
}

void channel_go_on(struct channel *ch) {
    if (!evtimer_pending(ch->again, NULL)) channel_arm(ch->again, 0);
}

static void channel_free(struct channel *ch) {
    struct event *events[] = {ch->deadline, ch->again, ch->readable, ch->writable};
    for (size_t i = 0; i < sizeof events / sizeof *events; i++)
        if (events[i]) event_free(events[i]);
    channel_dial_release(ch);
    channel_send_release(ch);
    channel_receive_release(ch);
    stream_release(&ch->stream);
    if (ch->fd >= 0) close(ch->fd);
    free(ch);
}

static struct channel *channel_new(struct event_base *base, struct channel_context *ctx,
                                   const struct channel_ops *ops, void *arg, struct err *err) {
    struct channel *ch = calloc(1, sizeof *ch);
    if (ch) {
        *ch = (struct channel){.base = base,
                               .ctx = ctx,
                               .ops = *ops,
                               .arg = arg,
                               .fd = -1,
                               .frame_bytes_max = PROTO_STRANGER_BYTES_MAX};
        channel_send_init(ch);
        ch->deadline = evtimer_new(base, on_deadline, ch);
        ch->again = evtimer_new(base, on_again, ch);
        if (ch->deadline && ch->again) return ch;
        channel_free(ch);
    }
    err_set(err, ERR_MEMORY, "no memory for a connection");
    return NULL;
}

void channel_enter(struct channel *ch) { ch->depth++; }

void channel_leave(struct channel *ch) {
    if (--ch->depth == 0 && ch->state == DEAD) channel_free(ch);
}

/* All was sent. Closing now, with unread bytes in the kernel, would send a reset that may overtake
 * them; so say that no more comes, and read on until the peer closes too or LINGER_MS are over. */
static void finish_writing(struct channel *ch) {
    if (channel_unsent_bytes(ch)) return;
    stream_end(&ch->stream);
    shutdown(ch->fd, SHUT_WR);
}

static void start_lingering(struct channel *ch) {
    ch->state = LINGERING;
    channel_arm(ch->deadline, LINGER_MS);
    event_add(ch->readable, NULL); /* it may have been held */
    channel_send_queued(ch);
    finish_writing(ch);
}

void channel_close(struct channel *ch, bool flush) {
    if (ch->state == LINGERING || ch->state == DEAD) return;
    bool usable = ch->state == OPEN && !ch->deaf;
    channel_enter(ch);
    ch->ops = (struct channel_ops){0};
    if (usable && flush) {
        start_lingering(ch);
    } else {
        if (usable && channel_unsent_bytes(ch) == 0) stream_end(&ch->stream);
        ch->state = DEAD;
    }
    channel_leave(ch);
}

void channel_end(struct channel *ch, const struct err *why) {
    struct channel_ops ops = ch->ops;
    struct err copy = *why;
    assert(ch->depth > 0); /* the caller still uses the channel */
    if (ch->state == OPEN && !ch->deaf) {
        struct msg_bye bye = {.code = (uint8_t)copy.code, .reason = proto_str(copy.msg)};
        if (bye.reason.length > PROTO_TEXT_BYTES_MAX) bye.reason.length = PROTO_TEXT_BYTES_MAX;
        if (copy.code == ERR_PROTOCOL) channel_queue(ch, MSG_BYE, 0, 0, 0, &bye, NULL);
        start_lingering(ch);
    } else {
        ch->state = DEAD;
    }
    ch->ops = (struct channel_ops){0};
    ops.on_close(ch->arg, ch, &copy);
}

void channel_end_later(struct channel *ch, enum err_code code, const char *text) {
    if (ch->broken) return;
    ch->broken = true;
    err_set(&ch->why, code, "%s", text);
    channel_go_on(ch);
}

static void out_of_time(struct channel *ch) {
    struct err err;
    if (ch->timed == TIMED_PAYLOAD)
        err_set(&err, ERR_TIMEOUT, "a %s frame comes too slowly: %zu of %u bytes",
                proto_type_name(ch->frame.type), ch->payload->at, ch->frame.length);
    else if (ch->timed == TIMED_HEADER)
        err_set(&err, ERR_TIMEOUT, "a frame's header comes too slowly: %zu of %u bytes", ch->have,
                PROTO_FRAME_HEADER_BYTES);
    else
        err_set(&err, ERR_TIMEOUT, "still a stranger after %d ms", ch->ctx->stranger_ms);
    channel_end(ch, &err);
}

static void on_deadline(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct channel *ch = arg;
    struct err err;
    channel_enter(ch);
    switch (ch->state) {
    case DIALLING: channel_dial_deadline(ch); break;
    case SHAKING:
        err_set(&err, ERR_TIMEOUT, "no TLS handshake within %d ms", ch->ctx->handshake_ms);
        channel_end(ch, &err);
        break;
    case OPEN: out_of_time(ch); break;
    case LINGERING: ch->state = DEAD; break;
    case DEAD: break;
    }
    channel_leave(ch);
}

/* ---- opening ----------------------------------------------------------------------------------- */

static void opened(struct channel *ch) {
    struct err err;
    if (tls_peer_key(ch->stream.ssl, &ch->key, &err)) {
        channel_end(ch, &err);
        return;
    }
    ch->state = OPEN;
    evtimer_del(ch->deadline);
    bool welcome = ch->ops.on_open(ch->arg, ch, &ch->key);
    if (ch->state != OPEN) return; /* the owner closed it */
    if (!welcome) {
        err_set(&err, ERR_REFUSED, "the peer's key was refused");
        channel_end(ch, &err);
        return;
    }
    if (ch->frame_bytes_max <= PROTO_STRANGER_BYTES_MAX)
        channel_arm(ch->deadline, ch->ctx->stranger_ms);
    channel_receive(ch); /* what came together with the end of the handshake */
}

/* One line for whoever opened the port in a browser. Only what already came is read, so that
 * closing does not turn into a reset that eats the answer. */
static void answer_http(int fd) {
    static const char answer[] = "HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain\r\n"
                                 "Connection: close\r\n\r\nThis port speaks TLS, not plain HTTP.\n";
    char discard[4096];
    send(fd, answer, sizeof answer - 1, MSG_NOSIGNAL | MSG_DONTWAIT);
    shutdown(fd, SHUT_WR);
    while (recv(fd, discard, sizeof discard, MSG_DONTWAIT) == (ssize_t)sizeof discard) continue;
}

static void shake(struct channel *ch) {
    bool is_http;
    enum stream_status status = stream_shake(&ch->stream);
    if (stream_unsent(&ch->stream)) event_add(ch->writable, NULL);
    if (status == STREAM_WAITS) return;
    if (status == STREAM_DONE) {
        opened(ch);
        return;
    }
    stream_explain(&ch->stream, true, &is_http, &ch->why);
    if (is_http) answer_http(ch->fd);
    channel_end(ch, &ch->why);
}

static void set_socket_options(int fd) {
    const struct {
        int level, name, value;
    } options[] = {
        {IPPROTO_TCP, TCP_NODELAY, 1},
        {SOL_SOCKET, SO_KEEPALIVE, 1},
        {IPPROTO_TCP, TCP_KEEPIDLE, 30},
        {IPPROTO_TCP, TCP_KEEPINTVL, 10},
        {IPPROTO_TCP, TCP_KEEPCNT, 3},
        {IPPROTO_TCP, TCP_USER_TIMEOUT, UNHEARD_MS},
        {IPPROTO_TCP, TCP_NOTSENT_LOWAT, KERNEL_UNSENT_BYTES},
    };
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        setsockopt(fd, options[i].level, options[i].name, &options[i].value, sizeof(int));
}

/* ---- the loop ---------------------------------------------------------------------------------- */

/* The peer's last words interest nobody any more, but they must be read; see finish_writing(). */
static void discard_input(struct channel *ch) {
    ssize_t n = recv(ch->fd, ch->ctx->record, sizeof ch->ctx->record, MSG_DONTWAIT);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) ch->state = DEAD;
}

static void on_readable(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct channel *ch = arg;
    channel_enter(ch);
    if (ch->state == SHAKING) shake(ch);
    else if (ch->state == OPEN) channel_receive(ch);
    else if (ch->state == LINGERING) discard_input(ch);
    channel_leave(ch);
}

static void go_on_sending(struct channel *ch) {
    channel_send_queued(ch);
    if (ch->state == LINGERING) finish_writing(ch);
    if (ch->state != OPEN || ch->deaf || !ch->drain_due) return;
    if (channel_unsent_bytes(ch) >= PROTO_SEND_LOW) return;
    ch->drain_due = false;
    if (ch->ops.on_drained) ch->ops.on_drained(ch->arg, ch);
}

static void on_writable(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct channel *ch = arg;
    channel_enter(ch);
    go_on_sending(ch);
    channel_leave(ch);
}

static void on_again(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct channel *ch = arg;
    channel_enter(ch);
    if (ch->broken) {
        channel_end(ch, &ch->why);
    } else if (ch->state == DIALLING) {
        channel_dial_next(ch);
    } else {
        go_on_sending(ch);
        if (ch->state == OPEN) channel_receive(ch);
    }
    channel_leave(ch);
}

int channel_start_tls(struct channel *ch, int fd, bool accepts, struct err *err) {
    socklen_t length = sizeof ch->peer;
    ch->fd = fd;
    getpeername(fd, (struct sockaddr *)&ch->peer, &length);
    set_socket_options(fd);
    if (stream_init(&ch->stream, ch->ctx->ssl, &ch->ctx->stage, fd, accepts, err)) return -1;
    ch->readable = event_new(ch->base, fd, EV_READ | EV_PERSIST, on_readable, ch);
    ch->writable = event_new(ch->base, fd, EV_WRITE, on_writable, ch);
    if (!ch->readable || !ch->writable || event_add(ch->readable, NULL))
        return err_set(err, ERR_MEMORY, "no memory for a connection");
    ch->state = SHAKING;
    channel_arm(ch->deadline, ch->ctx->handshake_ms);
    if (!accepts) shake(ch); /* the one who dials speaks first */
    return 0;
}

struct channel *channel_accept(struct event_base *base, struct channel_context *ctx, int fd,
                               const struct channel_ops *ops, void *arg, struct err *err) {
    struct channel *ch = channel_new(base, ctx, ops, arg, err);
    if (!ch) {
        close(fd);
        return NULL;
    }
    evutil_make_socket_nonblocking(fd);
    evutil_make_socket_closeonexec(fd);
    if (channel_start_tls(ch, fd, true, err)) {
        channel_free(ch);
        return NULL;
    }
    return ch;
}

struct channel *channel_dial(struct event_base *base, struct channel_context *ctx, const char *host,
                             uint16_t port, const struct channel_ops *ops, void *arg,
                             struct err *err) {
    struct channel *ch = channel_new(base, ctx, ops, arg, err);
    if (!ch) return NULL;
    if (channel_dial_lookup(ch, host, port, err)) {
        channel_free(ch);
        return NULL;
    }
    channel_go_on(ch); /* failures of connect() reach on_close, never the caller */
    return ch;
}

/* ---- questions --------------------------------------------------------------------------------- */

void channel_set_arg(struct channel *ch, void *arg) { ch->arg = arg; }

void *channel_arg(struct channel *ch) { return ch->arg; }

const struct proto_key *channel_peer_key(const struct channel *ch) { return &ch->key; }

void channel_peer_address(const struct channel *ch, char out[PROTO_ADDRESS_BYTES_MAX + 1],
                          uint16_t *port) {
    char service[8] = "0";
    int failed = getnameinfo((const struct sockaddr *)&ch->peer, sizeof ch->peer, out,
                             PROTO_ADDRESS_BYTES_MAX + 1, service, sizeof service,
                             NI_NUMERICHOST | NI_NUMERICSERV);
    if (failed) snprintf(out, PROTO_ADDRESS_BYTES_MAX + 1, "unknown");
    if (port) *port = (uint16_t)strtoul(service, NULL, 10);
}
