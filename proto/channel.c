/* channel.c - one TLS connection that carries frames, on the thread of its event_base.
 *
 * What a peer can make us hold is bounded: a frame's length is checked against the channel's limit
 * before its payload is let in, the read watermark stops the socket at one frame and one read, and
 * what we have not sent is limited by PROTO_SEND_MAX. What a peer can make us do in one turn of the
 * event loop is bounded too, by MESSAGES_PER_TURN.
 *
 * Life: DIALLING -> SHAKING -> OPEN -> (LINGERING ->) DEAD. Callbacks may close the channel, so it
 * is freed only when none of its own functions is on the stack (`depth`). */
#include <assert.h>
#include <errno.h>
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/bufferevent_ssl.h>
#include <event2/event.h>
#include <event2/util.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "proto/tls.h"

#define MESSAGES_PER_TURN 64
#define READ_BYTES (64u << 10)    /* let in beyond what the next message needs */
#define READ_SLACK 4              /* see pause_or_resume() */
#define COPY_BYTES_MAX (4u << 10) /* frames up to this are copied into libevent's own blocks */
#define PIECE_BYTES (64u << 10)   /* larger ones are lent in pieces, to see how far sending got */
#define LINGER_MS 1000
#define ADDRESSES_MAX 4 /* of one host name, tried one after the other */

enum channel_state { DIALLING, SHAKING, OPEN, LINGERING, DEAD };

struct channel_context {
    SSL_CTX *ssl;
    int handshake_ms, stranger_ms;
};

struct channel {
    struct event_base *base;
    struct channel_context *ctx;
    struct channel_ops ops;
    void *arg;
    enum channel_state state;
    int depth;
    struct event *deadline; /* of the present state */
    struct event *again;    /* goes on in the next turn of the loop */

    struct addrinfo *addresses, *address_next;
    uint32_t addresses_tried;
    int dial_fd;
    struct event *dial_done;

    struct bufferevent *bev;
    struct sockaddr_storage peer;
    struct proto_key key;
    bool has_frame; /* `frame` is read and its payload is what comes next */
    struct frame frame;
    uint32_t frame_bytes_max;
    uint64_t received; /* without what still waits in the input buffer */
    size_t wanted;     /* input that the next header or payload needs */
    bool paused;       /* reading, because enough waits */
    bool drain_due;    /* something was queued since the last on_drained */
    bool ended;        /* nothing more comes; tell the owner `why` after the last message */
    bool broken;       /* end with `why` in the next turn, whatever still waits */
    struct err why;
};

/* ---- contexts ---------------------------------------------------------------------------------
 */

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
    channel_context_set_timeouts(ctx, CHANNEL_HANDSHAKE_MS_MAX, CHANNEL_STRANGER_MS_MAX);
    return ctx;
}

void channel_context_set_timeouts(struct channel_context *ctx, int handshake_ms, int stranger_ms) {
    ctx->handshake_ms = handshake_ms;
    ctx->stranger_ms = stranger_ms;
}

void channel_context_destroy(struct channel_context *ctx) {
    if (!ctx) return;
    SSL_CTX_free(ctx->ssl);
    free(ctx);
}

/* ---- birth and death ----------------------------------------------------------------------------
 */

static void on_deadline(evutil_socket_t fd, short what, void *arg);
static void on_again(evutil_socket_t fd, short what, void *arg);
static void end(struct channel *ch, const struct err *why);

static struct timeval timeval_of(int ms) {
    return (struct timeval){.tv_sec = ms / 1000, .tv_usec = ms % 1000 * 1000};
}

static void arm(struct event *timer, int ms) {
    struct timeval in = timeval_of(ms);
    evtimer_add(timer, &in);
}

static void channel_free(struct channel *ch) {
    if (ch->deadline) event_free(ch->deadline);
    if (ch->again) event_free(ch->again);
    if (ch->dial_done) event_free(ch->dial_done);
    if (ch->dial_fd >= 0) close(ch->dial_fd);
    if (ch->addresses) freeaddrinfo(ch->addresses);
    if (ch->bev) bufferevent_free(ch->bev);
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
                               .dial_fd = -1,
                               .frame_bytes_max = PROTO_STRANGER_BYTES_MAX};
        ch->deadline = evtimer_new(base, on_deadline, ch);
        ch->again = evtimer_new(base, on_again, ch);
        if (ch->deadline && ch->again) return ch;
        channel_free(ch);
    }
    err_set(err, ERR_MEMORY, "no memory for a connection");
    return NULL;
}

static void enter(struct channel *ch) { ch->depth++; }

static void leave(struct channel *ch) {
    if (--ch->depth) return;
    if (ch->state == LINGERING) {
        struct evbuffer *in = bufferevent_get_input(ch->bev);
        evbuffer_drain(in, evbuffer_get_length(in));
    }
    if (ch->state == DEAD) channel_free(ch);
}

/* All was sent. Closing now, with unread bytes in the kernel, would send a reset that may overtake
 * them; so say that no more comes, and read on until the peer closes too or LINGER_MS are over. */
static void finish_writing(struct channel *ch) {
    SSL_shutdown(bufferevent_openssl_get_ssl(ch->bev));
    shutdown(bufferevent_getfd(ch->bev), SHUT_WR);
}

static void start_lingering(struct channel *ch) {
    ch->state = LINGERING;
    arm(ch->deadline, LINGER_MS);
    evtimer_del(ch->again);
    bufferevent_setwatermark(ch->bev, EV_WRITE, 0, 0);
    bufferevent_setwatermark(ch->bev, EV_READ, 0, 0);
    bufferevent_enable(ch->bev, EV_READ);
    if (evbuffer_get_length(bufferevent_get_output(ch->bev)) == 0) finish_writing(ch);
}

/* As finish_writing(), for a connection that is not waited for. */
static void say_goodbye(struct channel *ch) {
    if (evbuffer_get_length(bufferevent_get_output(ch->bev)) == 0)
        SSL_shutdown(bufferevent_openssl_get_ssl(ch->bev));
}

void channel_close(struct channel *ch, bool flush) {
    if (ch->state == LINGERING || ch->state == DEAD) return;
    bool usable = ch->state == OPEN && !ch->ended;
    enter(ch);
    ch->ops = (struct channel_ops){0};
    if (usable && flush) {
        start_lingering(ch);
    } else {
        if (usable) say_goodbye(ch);
        ch->state = DEAD;
    }
    leave(ch);
}

static int queue_message(struct channel *ch, uint8_t type, uint64_t term, uint64_t session,
                         uint64_t plan, const void *msg, struct err *err);

/* The one way in which a channel ends by itself: tell the peer what it did wrong, tell the owner.
 */
static void end(struct channel *ch, const struct err *why) {
    struct channel_ops ops = ch->ops;
    struct err copy = *why;
    assert(ch->depth > 0); /* the caller still uses the channel */
    if (ch->state == OPEN && !ch->ended) {
        struct msg_bye bye = {.code = (uint8_t)copy.code, .reason = proto_str(copy.msg)};
        if (bye.reason.length > PROTO_TEXT_BYTES_MAX) bye.reason.length = PROTO_TEXT_BYTES_MAX;
        if (copy.code == ERR_PROTOCOL) queue_message(ch, MSG_BYE, 0, 0, 0, &bye, NULL);
        start_lingering(ch);
    } else {
        ch->state = DEAD;
    }
    ch->ops = (struct channel_ops){0};
    ops.on_close(ch->arg, ch, &copy);
}

/* From a function that the owner called and that must not call back. */
static void end_later(struct channel *ch, enum err_code code, const char *text) {
    if (ch->broken) return;
    ch->broken = true;
    err_set(&ch->why, code, "%s", text);
    arm(ch->again, 0);
}

static void on_deadline_dialling(struct channel *ch);

static void on_deadline(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct channel *ch = arg;
    struct err err;
    enter(ch);
    switch (ch->state) {
    case DIALLING: on_deadline_dialling(ch); break;
    case SHAKING:
        err_set(&err, ERR_TIMEOUT, "no TLS handshake within %d ms", ch->ctx->handshake_ms);
        end(ch, &err);
        break;
    case OPEN:
        err_set(&err, ERR_TIMEOUT, "still a stranger after %d ms", ch->ctx->stranger_ms);
        end(ch, &err);
        break;
    case LINGERING: ch->state = DEAD; break;
    case DEAD: break;
    }
    leave(ch);
}

/* ---- receiving
 * ------------------------------------------------------------------------------------ */

#define MEMBER_OF_MESSAGE(NAME, record, number) struct msg_##record record;
union any_message {
    PROTO_MESSAGES(MEMBER_OF_MESSAGE)
};

/* Wake up when `bytes` are there. */
static int wait_for(struct channel *ch, size_t bytes) {
    ch->wanted = bytes;
    bufferevent_setwatermark(ch->bev, EV_READ, bytes, bytes + READ_SLACK * READ_BYTES);
    return 0;
}

/* Stop reading while more than one message and one read wait, go on when they do not.
 *
 * The high watermark alone would do this, but where it strikes in the middle of a TLS record the
 * rest stays inside OpenSSL, and libevent 2.1 does not look there again before the socket has
 * something new, which may be never. A callback runs between records: so we stop there, and set
 * the watermark where it never strikes; it still sets the size of a read. */
static void pause_or_resume(struct channel *ch) {
    size_t waiting = evbuffer_get_length(bufferevent_get_input(ch->bev));
    bool pause = ch->state == OPEN && waiting >= ch->wanted + READ_BYTES;
    if (pause == ch->paused) return;
    ch->paused = pause;
    if (pause)
        bufferevent_disable(ch->bev, EV_READ);
    else
        bufferevent_enable(ch->bev, EV_READ);
}

static int end_with(struct channel *ch, const struct err *why) {
    end(ch, why);
    return -1;
}

/* Returns 1 when a header is there, 0 when it has not come yet, -1 when the channel ended. */
static int take_header(struct channel *ch, struct evbuffer *in) {
    uint8_t header[PROTO_FRAME_HEADER_BYTES];
    struct err err;
    if (ch->has_frame) return 1;
    if (evbuffer_get_length(in) < sizeof header) return wait_for(ch, sizeof header);
    evbuffer_copyout(in, header, sizeof header);
    if (frame_read(header, ch->frame_bytes_max, &ch->frame, &err)) {
        err_prefix(&err, "protocol");
        return end_with(ch, &err);
    }
    evbuffer_drain(in, sizeof header);
    ch->received += sizeof header;
    ch->has_frame = true;
    return 1;
}

/* Hand over one message; returns as take_header(). */
static int take_message(struct channel *ch) {
    struct evbuffer *in = bufferevent_get_input(ch->bev);
    union any_message msg;
    struct err err;
    int ready = take_header(ch, in);
    if (ready <= 0) return ready;
    uint32_t length = ch->frame.length;
    if (evbuffer_get_length(in) < length) return wait_for(ch, length);
    const uint8_t *payload = evbuffer_pullup(in, length);
    if (!payload) {
        err_set(&err, ERR_MEMORY, "no memory for a frame of %u bytes", length);
        return end_with(ch, &err);
    }
    enum proto_record which = (enum proto_record)proto_record_of_type(ch->frame.type);
    if (proto_decode(payload, length, which, &msg, &err)) {
        if (err.code == ERR_PROTOCOL) err_prefix(&err, "protocol");
        return end_with(ch, &err);
    }
    ch->has_frame = false;
    ch->ops.on_message(ch->arg, ch, &ch->frame, &msg);
    proto_decoded_release(which, &msg);
    evbuffer_drain(in, length);
    ch->received += length;
    return ch->state == OPEN ? 1 : -1;
}

/* The connection is over and every whole message has been handed over. */
static void end_after_last(struct channel *ch) {
    size_t rest = evbuffer_get_length(bufferevent_get_input(ch->bev));
    if (ch->has_frame)
        err_set(&ch->why, ERR_TRUNCATED, "closed in the middle of a %s frame: %zu of %u bytes came",
                proto_type_name(ch->frame.type), rest, ch->frame.length);
    else if (rest)
        err_set(&ch->why, ERR_TRUNCATED,
                "closed in the middle of a frame header: %zu of %u bytes came", rest,
                PROTO_FRAME_HEADER_BYTES);
    end(ch, &ch->why);
}

/* Hand over what is there, but leave other channels their turn. */
static void take_messages(struct channel *ch) {
    int more = 1;
    for (int n = 0; n < MESSAGES_PER_TURN && more > 0 && ch->state == OPEN && !ch->broken; n++)
        more = take_message(ch);
    if (ch->state == OPEN && !ch->broken) {
        if (more > 0)
            arm(ch->again, 0);
        else if (ch->ended)
            end_after_last(ch);
    }
    if (ch->state == OPEN && !ch->ended) pause_or_resume(ch);
}

static void on_readable(struct bufferevent *bev, void *arg) {
    struct channel *ch = arg;
    enter(ch);
    if (ch->state == LINGERING) evbuffer_drain(bufferevent_get_input(bev), SIZE_MAX);
    if (ch->state == OPEN && !ch->ended) {
        if (evtimer_pending(ch->again, NULL))
            pause_or_resume(ch);
        else
            take_messages(ch);
    }
    leave(ch);
}

static void on_written(struct bufferevent *bev, void *arg) {
    struct channel *ch = arg;
    size_t unsent = evbuffer_get_length(bufferevent_get_output(bev));
    enter(ch);
    if (ch->state == LINGERING && unsent == 0) finish_writing(ch);
    if (ch->state == OPEN && ch->drain_due && unsent < PROTO_SEND_LOW) {
        ch->drain_due = false;
        if (ch->ops.on_drained) ch->ops.on_drained(ch->arg, ch);
    }
    leave(ch);
}

/* ---- opening
 * ---------------------------------------------------------------------------------------- */

static void opened(struct channel *ch) {
    struct err err;
    if (tls_peer_key(bufferevent_openssl_get_ssl(ch->bev), &ch->key, &err)) {
        end(ch, &err);
        return;
    }
    ch->state = OPEN;
    evtimer_del(ch->deadline);
    bufferevent_setwatermark(ch->bev, EV_WRITE, PROTO_SEND_LOW, 0);
    wait_for(ch, PROTO_FRAME_HEADER_BYTES);
    bool welcome = ch->ops.on_open(ch->arg, ch, &ch->key);
    if (ch->state != OPEN) return; /* the owner closed it */
    if (!welcome) {
        err_set(&err, ERR_REFUSED, "the peer's key was refused");
        end(ch, &err);
        return;
    }
    if (ch->frame_bytes_max <= PROTO_STRANGER_BYTES_MAX) arm(ch->deadline, ch->ctx->stranger_ms);
}

/* One line for whoever opened the port in a browser. Only what already came is read, so that
 * closing does not turn into a reset that eats the answer. */
static void answer_http(int fd) {
    static const char answer[] = "HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain\r\n"
                                 "Connection: close\r\n\r\nThis port speaks TLS, not plain HTTP.\n";
    char discard[READ_BYTES / 4];
    send(fd, answer, sizeof answer - 1, MSG_NOSIGNAL | MSG_DONTWAIT);
    shutdown(fd, SHUT_WR);
    while (recv(fd, discard, sizeof discard, MSG_DONTWAIT) == (ssize_t)sizeof discard) continue;
}

/* The first of OpenSSL's errors is the cause. libevent hands them out last first, and mixes results
 * of SSL_get_error() in, which name no library. */
static unsigned long first_ssl_error(struct bufferevent *bev) {
    unsigned long first = 0, code;
    while ((code = bufferevent_get_openssl_error(bev)))
        if (ERR_GET_LIB(code)) first = code;
    return first;
}

static void on_event(struct bufferevent *bev, short what, void *arg) {
    struct channel *ch = arg;
    int saved_errno = what & BEV_EVENT_ERROR ? EVUTIL_SOCKET_ERROR() : 0;
    unsigned long code = first_ssl_error(bev);
    enter(ch);
    if (what & BEV_EVENT_CONNECTED) {
        opened(ch);
    } else if (ch->state == LINGERING) {
        ch->state = DEAD;
    } else if (ch->state == OPEN && !ch->ended) {
        if (what & BEV_EVENT_EOF)
            err_set(&ch->why, ERR_IO, "closed by peer");
        else
            tls_explain(code, saved_errno, false, &ch->why);
        ch->ended = true;
        /* Not now: libevent 2.1 reports the end before it has put what came last into the buffer.
         */
        arm(ch->again, 0);
    } else if (ch->state == SHAKING) {
        if (tls_code_is_http(code)) answer_http(bufferevent_getfd(bev));
        tls_explain(code, saved_errno, true, &ch->why);
        end(ch, &ch->why);
    }
    leave(ch);
}

static void set_socket_options(int fd) {
    int yes = 1, idle_s = 30, interval_s = 10, probes = 3;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &yes, sizeof yes);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof idle_s);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof interval_s);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
}

/* Takes over `fd`, also when it fails. */
static int start_tls(struct channel *ch, int fd, enum bufferevent_ssl_state role, struct err *err) {
    SSL *ssl = SSL_new(ch->ctx->ssl);
    socklen_t length = sizeof ch->peer;
    getpeername(fd, (struct sockaddr *)&ch->peer, &length);
    set_socket_options(fd);
    if (ssl)
        ch->bev = bufferevent_openssl_socket_new(ch->base, fd, ssl, role, BEV_OPT_CLOSE_ON_FREE);
    if (!ch->bev) { /* libevent has freed `ssl` */
        close(fd);
        ERR_clear_error();
        return err_set(err, ERR_MEMORY, "no memory for a TLS connection");
    }
    ch->state = SHAKING;
    arm(ch->deadline, ch->ctx->handshake_ms);
    bufferevent_setcb(ch->bev, on_readable, on_written, on_event, ch);
    bufferevent_set_max_single_read(ch->bev, READ_BYTES);
    bufferevent_enable(ch->bev, EV_READ | EV_WRITE);
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
    if (start_tls(ch, fd, BUFFEREVENT_SSL_ACCEPTING, err)) {
        channel_free(ch);
        return NULL;
    }
    return ch;
}

/* ---- dialling
 * --------------------------------------------------------------------------------------- */

static void dial_next(struct channel *ch);

static void describe_dial_error(struct channel *ch, const char *what) {
    char host[PROTO_ADDRESS_BYTES_MAX + 1];
    uint16_t port;
    channel_peer_address(ch, host, &port);
    err_set(&ch->why, ERR_IO, "connect to %s port %u: %s", host, port, what);
}

static void on_dialled(evutil_socket_t fd, short what, void *arg) {
    (void)what;
    struct channel *ch = arg;
    int error = 0;
    socklen_t length = sizeof error;
    struct err err;
    enter(ch);
    getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length);
    if (error) {
        describe_dial_error(ch, strerror(error));
        dial_next(ch);
    } else {
        event_free(ch->dial_done);
        ch->dial_done = NULL;
        ch->dial_fd = -1;
        if (start_tls(ch, (int)fd, BUFFEREVENT_SSL_CONNECTING, &err)) end(ch, &err);
    }
    leave(ch);
}

/* Begin a connection to one address; -1 with ch->why when that fails at once. */
static int dial_address(struct channel *ch, const struct addrinfo *a) {
    memcpy(&ch->peer, a->ai_addr, a->ai_addrlen);
    int fd = socket(a->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || (connect(fd, a->ai_addr, a->ai_addrlen) && errno != EINPROGRESS)) {
        describe_dial_error(ch, strerror(errno));
        if (fd >= 0) close(fd);
        return -1;
    }
    ch->dial_done = event_new(ch->base, fd, EV_WRITE, on_dialled, ch);
    if (!ch->dial_done) {
        err_set(&ch->why, ERR_MEMORY, "no memory for a connection");
        close(fd);
        return -1;
    }
    ch->dial_fd = fd;
    event_add(ch->dial_done, NULL);
    arm(ch->deadline, ch->ctx->handshake_ms);
    return 0;
}

/* "localhost" has two addresses and many services listen on one: so try them in turn. */
static void dial_next(struct channel *ch) {
    if (ch->dial_done) event_free(ch->dial_done);
    if (ch->dial_fd >= 0) close(ch->dial_fd);
    ch->dial_done = NULL;
    ch->dial_fd = -1;
    while (ch->address_next && ch->addresses_tried++ < ADDRESSES_MAX) {
        const struct addrinfo *a = ch->address_next;
        ch->address_next = a->ai_next;
        if (dial_address(ch, a) == 0) return;
    }
    end(ch, &ch->why);
}

static void on_deadline_dialling(struct channel *ch) {
    char text[64];
    snprintf(text, sizeof text, "no answer within %d ms", ch->ctx->handshake_ms);
    describe_dial_error(ch, text);
    ch->why.code = ERR_TIMEOUT;
    dial_next(ch);
}

static void on_again(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct channel *ch = arg;
    enter(ch);
    if (ch->broken)
        end(ch, &ch->why);
    else if (ch->state == DIALLING)
        dial_next(ch);
    else if (ch->state == OPEN)
        take_messages(ch);
    leave(ch);
}

struct channel *channel_dial(struct event_base *base, struct channel_context *ctx, const char *host,
                             uint16_t port, const struct channel_ops *ops, void *arg,
                             struct err *err) {
    struct addrinfo hints = {
        .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV};
    char service[8];
    struct channel *ch = channel_new(base, ctx, ops, arg, err);
    if (!ch) return NULL;
    snprintf(service, sizeof service, "%u", port);
    int failed = getaddrinfo(host, service, &hints, &ch->addresses);
    if (failed) {
        err_set(err, ERR_IO, "host \"%s\": %s", host,
                failed == EAI_SYSTEM ? strerror(errno) : gai_strerror(failed));
        ch->addresses = NULL;
        channel_free(ch);
        return NULL;
    }
    ch->address_next = ch->addresses;
    arm(ch->again, 0); /* failures of connect() reach on_close, never the caller */
    return ch;
}

/* ---- sending
 * ------------------------------------------------------------------------------------------ */

static void free_lent(const void *piece, size_t length, void *whole) {
    (void)piece, (void)length;
    free(whole);
}

/* Append b to `out`; what it holds is taken over. Pieces are sent in order, so the last one frees.
 */
static int lend(struct evbuffer *out, struct proto_buffer *b) {
    for (size_t at = 0; at < b->length; at += PIECE_BYTES) {
        size_t n = b->length - at < PIECE_BYTES ? b->length - at : PIECE_BYTES;
        bool last = at + n == b->length;
        if (evbuffer_add_reference(out, b->data + at, n, last ? free_lent : NULL, b->data))
            return -1;
    }
    return 0;
}

static int append_frame(struct channel *ch, struct proto_buffer *b) {
    struct evbuffer *out = bufferevent_get_output(ch->bev);
    if (b->length > COPY_BYTES_MAX) return lend(out, b);
    int result = evbuffer_add(out, b->data, b->length);
    proto_buffer_release(b);
    return result;
}

static int encode_frame(struct proto_buffer *b, struct frame *f, const void *msg, struct err *err) {
    static const uint8_t later[PROTO_FRAME_HEADER_BYTES];
    int which = proto_record_of_type(f->type);
    assert(which >= 0);
    proto_buffer_init(b, PROTO_FRAME_HEADER_BYTES + PROTO_FRAME_BYTES_MAX);
    proto_buffer_append(b, later, sizeof later);
    if (b->failed)
        return err_set(err, ERR_MEMORY, "no memory for a %s frame", proto_type_name(f->type));
    if (proto_encode(b, (enum proto_record)which, msg, err)) {
        proto_buffer_release(b);
        return -1;
    }
    f->length = (uint32_t)(b->length - sizeof later);
    frame_write(f, b->data);
    return 0;
}

static int queue_message(struct channel *ch, uint8_t type, uint64_t term, uint64_t session,
                         uint64_t plan, const void *msg, struct err *err) {
    struct frame f = {.type = type, .term = term, .session = session, .plan = plan};
    struct proto_buffer b;
    if (encode_frame(&b, &f, msg, err)) return -1;
    size_t unsent = channel_unsent_bytes(ch) + b.length;
    if (unsent > PROTO_SEND_MAX) {
        proto_buffer_release(&b);
        end_later(ch, ERR_FULL, "the peer reads too slowly");
        return err_set(err, ERR_FULL, "%zu bytes wait for a peer that reads too slowly, at most %u",
                       unsent, PROTO_SEND_MAX);
    }
    if (append_frame(ch, &b)) {
        end_later(ch, ERR_MEMORY, "no memory to send"); /* half a frame may be queued */
        return err_set(err, ERR_MEMORY, "no memory to send");
    }
    ch->drain_due = true;
    return 0;
}

int channel_send(struct channel *ch, uint8_t type, uint64_t term, uint64_t session, uint64_t plan,
                 const void *msg, struct err *err) {
    if (ch->state != OPEN || ch->ended || ch->broken)
        return err_set(err, ERR_IO, "the connection is not open");
    return queue_message(ch, type, term, session, plan, msg, err);
}

/* ---- questions
 * ------------------------------------------------------------------------------------------ */

void channel_set_arg(struct channel *ch, void *arg) { ch->arg = arg; }

void *channel_arg(struct channel *ch) { return ch->arg; }

void channel_set_frame_bytes_max(struct channel *ch, uint32_t bytes) {
    ch->frame_bytes_max = bytes;
    if (ch->state == OPEN && bytes > PROTO_STRANGER_BYTES_MAX) evtimer_del(ch->deadline);
}

size_t channel_unsent_bytes(const struct channel *ch) {
    return ch->bev ? evbuffer_get_length(bufferevent_get_output(ch->bev)) : 0;
}

uint64_t channel_received_bytes(const struct channel *ch) {
    return ch->received + (ch->bev ? evbuffer_get_length(bufferevent_get_input(ch->bev)) : 0);
}

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
