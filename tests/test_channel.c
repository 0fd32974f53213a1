/* test_channel.c - channels over real TLS on the loopback, with right and wrong peers. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <arpa/inet.h>
#include <cmocka.h>
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/bufferevent_ssl.h>
#include <event2/event.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "proto/proto.h"
#include "proto/tls.h"

#define PATIENCE_MS                                                                                \
    20000 /* nothing here takes a tenth of it; a test that waits so long has failed */

/* One end of a connection, and what it saw. A test sets what it should do. */
struct end {
    struct channel *ch;
    bool opened, closed, drained;
    struct proto_key peer;
    struct err why;
    unsigned messages, hear_max;
    struct frame last;
    uint64_t last_number;    /* of the last HEARTBEAT_ACK or CHUNK */
    uint64_t chunks, chunks_before_beat, chunks_before_root; /* how many came before those */
    struct digest last_data; /* of the last CHUNK */
    char bye[PROTO_TEXT_BYTES_MAX + 1];
    /* behaviour */
    uint64_t last_chunk;
    bool hold_after_first;
    bool refuse, echo, stay_stranger, close_in_open, close_in_message, close_in_drained, flush;
    unsigned out_of_order;
};

static struct {
    struct event_base *base;
    struct channel_context *server_ctx, *client_ctx;
    struct identity server_id, client_id;
    struct listener *listener;
    uint16_t port;
    struct end server, client, *next_server;
} t;

/* ---- callbacks
 * -------------------------------------------------------------------------------------- */

static void close_end(struct end *e, bool flush) {
    struct channel *ch = e->ch;
    e->ch = NULL;
    channel_close(ch, flush);
}

static bool on_open(void *arg, struct channel *ch, const struct proto_key *key) {
    struct end *e = arg;
    assert_ptr_equal(e, channel_arg(ch));
    e->ch = ch;
    e->opened = true;
    e->peer = *key;
    if (!e->stay_stranger) channel_set_frame_bytes_max(ch, PROTO_FRAME_BYTES_MAX);
    if (e->close_in_open) close_end(e, e->flush);
    return !e->refuse;
}

static void on_message(void *arg, struct channel *ch, const struct frame *f, const void *msg) {
    struct end *e = arg;
    e->messages++;
    e->last = *f;
    if (f->type == MSG_BYE) {
        proto_str_copy(((const struct msg_bye *)msg)->reason, e->bye, sizeof e->bye);
    } else if (f->type == MSG_ROOT) {
        e->chunks_before_root = e->chunks;
    } else if (f->type == MSG_HEARTBEAT_ACK) {
        e->chunks_before_beat = e->chunks;
        uint64_t number = ((const struct msg_heartbeat_ack *)msg)->settled_index;
        if (number != e->last_number + 1) e->out_of_order++;
        e->last_number = number;
    } else if (f->type == MSG_CHUNK) {
        const struct msg_chunk *chunk = msg;
        if (chunk->weight <= e->last_chunk) e->out_of_order++;
        e->last_chunk = chunk->weight;
        e->chunks++;
        e->last_number = chunk->weight;
        e->last_data = digest_of(chunk->data.data, chunk->data.length);
    }
    if (e->echo)
        assert_int_equal(channel_send(ch, f->type, f->term, f->session, f->plan, msg, NULL), 0);
    if (e->hold_after_first && e->messages == 1) channel_hold(ch, true);
    if (e->close_in_message) close_end(e, e->flush);
}

static void on_close(void *arg, struct channel *ch, const struct err *why) {
    struct end *e = arg;
    (void)ch;
    assert_false(e->closed);
    e->closed = true;
    e->why = *why;
    e->ch = NULL;
}

static void on_drained(void *arg, struct channel *ch) {
    struct end *e = arg;
    assert_true(channel_unsent_bytes(ch) < PROTO_SEND_LOW);
    e->drained = true;
    if (e->close_in_drained) close_end(e, e->flush);
}

static const struct channel_ops ops = {on_open, on_message, on_close, on_drained};

static void on_accept(void *arg, int fd) {
    struct err err = {0};
    (void)arg;
    struct end *e = t.next_server ? t.next_server : &t.server;
    e->ch = channel_accept(t.base, t.server_ctx, fd, &ops, e, &err);
    assert_non_null(e->ch);
}

/* ---- set-up
 * ------------------------------------------------------------------------------------------ */

static int start(void **state) {
    (void)state;
    struct err err = {0};
    memset(&t, 0, sizeof t);
    if (proto_init(&err)) return -1;
    t.base = event_base_new();
    identity_create(&t.server_id);
    identity_create(&t.client_id);
    t.server_ctx = channel_context_create(&t.server_id, &err);
    t.client_ctx = channel_context_create(&t.client_id, &err);
    t.listener = listener_create(t.base, "127.0.0.1", &t.port, on_accept, NULL, &err);
    return t.server_ctx && t.client_ctx && t.listener ? 0 : -1;
}

static void turn(int ms) {
    struct timeval tv = {.tv_sec = ms / 1000, .tv_usec = ms % 1000 * 1000};
    event_base_loopexit(t.base, &tv);
    event_base_loop(t.base, 0);
}

static int stop(void **state) {
    (void)state;
    if (t.client.ch) close_end(&t.client, false);
    if (t.server.ch) close_end(&t.server, false);
    listener_destroy(t.listener);
    turn(1);
    channel_context_destroy(t.server_ctx);
    channel_context_destroy(t.client_ctx);
    event_base_free(t.base);
    return 0;
}

static void on_patience(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    *(bool *)arg = true;
}

/* Run the loop until `condition`. */
#define RUN_UNTIL(condition)                                                                       \
    do {                                                                                           \
        bool late_ = false;                                                                        \
        struct timeval patience_ = {.tv_sec = PATIENCE_MS / 1000};                                 \
        struct event *timer_ = evtimer_new(t.base, on_patience, &late_);                           \
        evtimer_add(timer_, &patience_);                                                           \
        while (!(condition) && !late_) event_base_loop(t.base, EVLOOP_ONCE);                       \
        event_free(timer_);                                                                        \
        if (late_)                                                                                 \
            fail_msg("waited in vain for: %s (client \"%s\", server \"%s\")", #condition,          \
                     t.client.why.msg, t.server.why.msg);                                          \
    } while (0)

static void dial(void) {
    struct err err = {0};
    t.client.ch = channel_dial(t.base, t.client_ctx, "127.0.0.1", t.port, &ops, &t.client, &err);
    assert_non_null(t.client.ch);
}

static void connect_both(void) {
    dial();
    RUN_UNTIL(t.client.opened && t.server.opened);
}

#define assert_why(e, want_code, text)                                                             \
    do {                                                                                           \
        if ((e).why.code != (want_code) || !strstr((e).why.msg, text))                             \
            fail_msg("code %d, \"%s\"; wanted %d, \"%s\"", (int)(e).why.code, (e).why.msg,         \
                     want_code, text);                                                             \
    } while (0)

static int send_number(struct channel *ch, uint64_t number, struct err *err) {
    struct msg_heartbeat_ack ack = {.settled_index = number};
    return channel_send(ch, MSG_HEARTBEAT_ACK, 1, 2, 3, &ack, err);
}

static void send_chunk(struct channel *ch, const uint8_t *data, uint32_t length, uint64_t weight) {
    struct msg_chunk chunk = {.data = {data, length}, .weight = weight};
    struct err err = {0};
    if (channel_send(ch, MSG_CHUNK, 7, 8, 9, &chunk, &err)) fail_msg("%s", err.msg);
}

/* A plain TCP connection to the listener. */
static int plain_socket(void) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(t.port)};
    inet_pton(AF_INET, "127.0.0.1", &to.sin_addr);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&to, sizeof to), 0);
    evutil_make_socket_nonblocking(fd);
    return fd;
}

/* A TLS client that can send any bytes. */
static bool raw_open, raw_gone;
static unsigned long raw_error;
static void on_raw(struct bufferevent *bev, short what, void *arg) {
    (void)arg;
    if (what & BEV_EVENT_CONNECTED) {
        raw_open = true;
        return;
    }
    unsigned long code;
    while ((code = bufferevent_get_openssl_error(bev))) raw_error = code;
    raw_gone = true;
}
static struct bufferevent *raw_tls(SSL_CTX *ctx) {
    raw_open = raw_gone = false;
    raw_error = 0;
    struct bufferevent *bev = bufferevent_openssl_socket_new(
        t.base, plain_socket(), SSL_new(ctx), BUFFEREVENT_SSL_CONNECTING, BEV_OPT_CLOSE_ON_FREE);
    bufferevent_setcb(bev, NULL, NULL, on_raw, NULL);
    bufferevent_enable(bev, EV_READ | EV_WRITE);
    return bev;
}

/* Open a right TLS connection, send `bytes`, and wait for what the server makes of it. */
static void send_raw(const void *bytes, size_t length) {
    struct err err = {0};
    SSL_CTX *ctx = tls_context_create(&t.client_id, &err);
    assert_non_null(ctx);
    struct bufferevent *bev = raw_tls(ctx);
    RUN_UNTIL(raw_open && t.server.opened);
    bufferevent_write(bev, bytes, length);
    RUN_UNTIL(t.server.closed && raw_gone);
    bufferevent_free(bev);
    SSL_CTX_free(ctx);
}

/* ---- what works
 * --------------------------------------------------------------------------------------- */

static void message_comes_back_with_its_header(void **state) {
    (void)state;
    t.server.echo = true;
    connect_both();
    assert_memory_equal(&t.client.peer, &t.server_id.key, sizeof t.client.peer);
    assert_memory_equal(&t.server.peer, &t.client_id.key, sizeof t.server.peer);
    assert_memory_equal(channel_peer_key(t.server.ch), &t.client_id.key, sizeof t.server.peer);
    assert_int_equal(send_number(t.client.ch, 1, NULL), 0);
    RUN_UNTIL(t.client.messages == 1);
    assert_int_equal(t.client.last.type, MSG_HEARTBEAT_ACK);
    assert_int_equal(t.client.last.term, 1);
    assert_int_equal(t.client.last.session, 2);
    assert_int_equal(t.client.last.plan, 3);
    assert_int_equal(channel_received_bytes(t.client.ch),
                     PROTO_FRAME_HEADER_BYTES + t.client.last.length);
    char host[PROTO_ADDRESS_BYTES_MAX + 1];
    uint16_t port;
    channel_peer_address(t.client.ch, host, &port);
    assert_string_equal(host, "127.0.0.1");
    assert_int_equal(port, t.port);
    close_end(&t.client, false);
    RUN_UNTIL(t.server.closed);
    assert_why(t.server, ERR_IO, "closed by peer");
}

/* The largest message there is: a chunk of 8 MiB with its set. */
static void largest_frame_goes_through(void **state) {
    (void)state;
    uint32_t length = PROTO_CHUNK_ELEMENTS_MAX * 8;
    uint8_t *data = malloc(length);
    for (uint32_t i = 0; i < length; i++) data[i] = (uint8_t)(i * 2654435761u >> 24);
    struct digest sent = digest_of(data, length);
    t.server.echo = true;
    connect_both();
    for (uint64_t n = 1; n <= 3; n++) send_chunk(t.client.ch, data, length, n);
    free(data); /* the channel keeps nothing of it */
    RUN_UNTIL(t.client.messages == 3);
    assert_int_equal(t.client.last_number, 3);
    assert_true(digest_equal(&t.client.last_data, &sent));
    assert_true(t.client.drained && t.server.drained);
}

/* However little was sent: who counts what it sent starts again at this word, and would otherwise
 * take a long day of small messages for a peer that does not read. */
static void small_messages_drain_too(void **state) {
    (void)state;
    connect_both();
    for (uint64_t n = 1; n <= 3; n++) {
        t.client.drained = false;
        assert_int_equal(send_number(t.client.ch, n, NULL), 0);
        RUN_UNTIL(t.client.drained);
    }
    assert_false(t.server.drained);
}

/* In order, none lost, and on_message is not re-entered by the echo. */
static void thousands_of_small_messages(void **state) {
    (void)state;
    unsigned sent = 0, count = 20000;
    t.server.echo = true;
    connect_both();
    while (sent < count) {
        for (int n = 0; n < 1000; n++) assert_int_equal(send_number(t.client.ch, ++sent, NULL), 0);
        event_base_loop(t.base, EVLOOP_NONBLOCK);
    }
    RUN_UNTIL(t.client.messages == count);
    assert_int_equal(t.client.out_of_order + t.server.out_of_order, 0);
}

/* When a burst is over nothing more arrives that could wake the receiver: whatever waits in any
 * buffer on the way, also inside OpenSSL, must come out by itself. */
static void bursts_of_all_lengths_end(void **state) {
    (void)state;
    uint64_t sent = 0;
    connect_both();
    for (unsigned burst = 1; burst < 6000; burst += 97) {
        for (unsigned n = 0; n < burst; n++)
            assert_int_equal(send_number(t.client.ch, ++sent, NULL), 0);
        RUN_UNTIL(t.server.messages == sent);
    }
    assert_int_equal(t.server.out_of_order, 0);
}

/* A peer that floods us must not keep another one waiting until its flood is over. */
static void a_flood_leaves_others_their_turn(void **state) {
    (void)state;
    struct end quiet = {0}, quiet_server = {.echo = true};
    struct err err = {0};
    connect_both();
    t.next_server = &quiet_server;
    quiet.ch = channel_dial(t.base, t.client_ctx, "127.0.0.1", t.port, &ops, &quiet, &err);
    RUN_UNTIL(quiet.opened && quiet_server.opened);
    unsigned flood = 20000;
    for (unsigned n = 1; n <= flood; n++) send_number(t.client.ch, n, NULL);
    send_number(quiet.ch, 1, NULL);
    RUN_UNTIL(quiet.messages == 1);
    assert_true(t.server.messages < flood);
    RUN_UNTIL(t.server.messages == flood);
    assert_int_equal(t.server.out_of_order, 0);
    close_end(&quiet, false);
    RUN_UNTIL(quiet_server.closed);
}

/* A heartbeat that waits behind megabytes would make a busy member look dead. So it overtakes what
 * has not left yet, and so does all that is no tensor data; what is equally urgent keeps its order. */
static void urgent_messages_overtake_bulk(void **state) {
    (void)state;
    static uint8_t data[1 << 20];
    uint64_t count = 63; /* of the PROTO_SEND_MAX bytes that may wait */
    struct msg_root root = {.index = 1};
    connect_both();
    for (uint64_t n = 1; n <= count; n++) send_chunk(t.client.ch, data, sizeof data, n);
    assert_int_equal(channel_send(t.client.ch, MSG_ROOT, 0, 0, 0, &root, NULL), 0);
    t.server.last_number = 0;
    assert_int_equal(send_number(t.client.ch, 1, NULL), 0);
    RUN_UNTIL(t.server.chunks == count);
    assert_int_equal(t.server.messages, count + 2);
    assert_in_range(t.server.chunks_before_beat, 0, count / 4); /* the kernel's buffers */
    assert_in_range(t.server.chunks_before_root, t.server.chunks_before_beat, count / 4);
}

/* Tensor data never overtakes what was said before it: the leaves by which it is checked, say. */
static void bulk_overtakes_nothing(void **state) {
    (void)state;
    static uint8_t data[100000];
    struct msg_root root = {.index = 1};
    connect_both();
    for (uint64_t n = 1, roots = 1; roots <= 10; roots++) {
        assert_int_equal(channel_send(t.client.ch, MSG_ROOT, 0, 0, 0, &root, NULL), 0);
        uint64_t before = n - 1;
        for (int i = 0; i < 50; i++, n++) send_chunk(t.client.ch, data, n % 3 ? sizeof data : 100, n);
        RUN_UNTIL(t.server.chunks == n - 1);
        assert_int_equal(t.server.messages, n - 1 + roots);
        assert_int_equal(t.server.chunks_before_root, before);
    }
    assert_int_equal(t.server.out_of_order, 0);
}

/* Whoever holds a channel is handed nothing, and all of it in order afterwards. */
static void a_held_channel_waits(void **state) {
    (void)state;
    t.server.hold_after_first = true;
    connect_both();
    for (uint64_t n = 1; n <= 3000; n++) send_number(t.client.ch, n, NULL);
    RUN_UNTIL(t.server.messages == 1);
    turn(50);
    assert_int_equal(t.server.messages, 1);
    channel_hold(t.server.ch, false);
    RUN_UNTIL(t.server.messages == 3000);
    assert_int_equal(t.server.out_of_order, 0);
}

/* A BYE with the reason of a refusal must arrive although the connection closes right after, and
 * although the peer's own bytes were never read. */
static void flush_delivers_the_last_words(void **state) {
    (void)state;
    connect_both();
    send_number(t.client.ch, 1, NULL);
    struct msg_bye bye = {.code = ERR_REFUSED, .final = 1, .reason = proto_str("not invited")};
    assert_int_equal(channel_send(t.server.ch, MSG_BYE, 0, 0, 0, &bye, NULL), 0);
    close_end(&t.server, true);
    RUN_UNTIL(t.client.closed);
    assert_string_equal(t.client.bye, "not invited");
    assert_why(t.client, ERR_IO, "closed by peer");
    turn(20);
}

static void flush_sends_megabytes_first(void **state) {
    (void)state;
    static uint8_t data[4 << 20];
    connect_both();
    for (uint64_t n = 1; n <= 5; n++) send_chunk(t.client.ch, data, sizeof data, n);
    close_end(&t.client, true);
    RUN_UNTIL(t.server.closed);
    if (t.server.last_number != 5) fail_msg("%s", t.server.why.msg);
    assert_why(t.server, ERR_IO, "closed by peer");
}

static void callbacks_may_close(void **state) {
    (void)state;
    for (int flush = 0; flush <= 1; flush++) {
        t.server = (struct end){.close_in_open = true, .flush = flush};
        t.client = (struct end){0};
        dial();
        RUN_UNTIL(t.client.closed);
        assert_false(t.server.closed);

        t.server = (struct end){.close_in_message = true, .flush = flush};
        t.client = (struct end){0};
        connect_both();
        for (int n = 1; n < 200; n++) send_number(t.client.ch, (uint64_t)n, NULL);
        RUN_UNTIL(t.client.closed);
        assert_int_equal(t.server.messages, 1);
        assert_false(t.server.closed);

        static uint8_t data[2 << 20];
        t.server = (struct end){0};
        t.client = (struct end){.close_in_drained = true, .flush = flush};
        connect_both();
        send_chunk(t.client.ch, data, sizeof data, 1);
        RUN_UNTIL(t.server.closed);
        assert_true(t.client.drained);
        assert_false(t.client.closed);
    }
}

/* ---- what is refused
 * -------------------------------------------------------------------------------------- */

static void a_refused_key_is_told_so(void **state) {
    (void)state;
    t.server.refuse = true;
    dial();
    RUN_UNTIL(t.client.closed && t.server.closed);
    assert_why(t.server, ERR_REFUSED, "the peer's key was refused");
    assert_why(t.client, ERR_IO, "closed by peer");
}

static void a_frame_over_the_limit_is_refused_before_its_payload(void **state) {
    (void)state;
    static uint8_t data[PROTO_STRANGER_BYTES_MAX];
    t.server.stay_stranger = true;
    connect_both();
    send_chunk(t.client.ch, data, sizeof data, 1);
    RUN_UNTIL(t.client.closed && t.server.closed);
    assert_why(t.server, ERR_PROTOCOL,
               "protocol: CHUNK frame of 8203 bytes, allowed are 1 to 8192");
    assert_string_equal(t.client.bye, t.server.why.msg); /* the peer learns why */
    assert_int_equal(t.server.messages, 0);
}

static void send_header(struct frame f, size_t at, uint8_t put, const void *payload,
                        size_t length) {
    uint8_t bytes[PROTO_FRAME_HEADER_BYTES + 64];
    frame_write(&f, bytes);
    if (put) bytes[at] = put;
    if (length) memcpy(bytes + PROTO_FRAME_HEADER_BYTES, payload, length);
    send_raw(bytes, PROTO_FRAME_HEADER_BYTES + length);
}

static void an_unknown_version_is_refused(void **state) {
    (void)state;
    send_header((struct frame){.type = MSG_ENROLLED, .length = 2}, 4, 9, "\x91\x05", 2);
    assert_why(t.server, ERR_PROTOCOL, "frame of protocol version 9, this program speaks 1");
}

static void an_unknown_type_is_refused(void **state) {
    (void)state;
    send_header((struct frame){.type = MSG_ENROLLED, .length = 2}, 5, 99, "\x91\x05", 2);
    assert_why(t.server, ERR_PROTOCOL, "frame of unknown type 99");
}

static void a_huge_length_is_refused(void **state) {
    (void)state;
    send_header((struct frame){.type = MSG_CHUNK, .length = UINT32_MAX}, 0, 0, NULL, 0);
    assert_why(t.server, ERR_PROTOCOL, "CHUNK frame of 4294967295 bytes, allowed are 1 to 9437184");
}

static void a_payload_that_is_not_msgpack_is_refused(void **state) {
    (void)state;
    send_header((struct frame){.type = MSG_ENROLLED, .length = 2}, 0, 0, "\x91\xc1", 2);
    assert_why(t.server, ERR_PROTOCOL, "protocol: ENROLLED.member: byte 0xc1 is not msgpack");
}

static void http_inside_tls_is_refused(void **state) {
    (void)state;
    static const char request[] = "GET / HTTP/1.1\r\nHost: example.org\r\nAccept: */*\r\n\r\n";
    send_raw(request, sizeof request - 1);
    assert_why(t.server, ERR_PROTOCOL, "this looks like HTTP");
}

static void send_and_close(const void *bytes, size_t length) {
    struct err err = {0};
    SSL_CTX *ctx = tls_context_create(&t.client_id, &err);
    struct bufferevent *bev = raw_tls(ctx);
    RUN_UNTIL(raw_open && t.server.opened);
    bufferevent_write(bev, bytes, length);
    RUN_UNTIL(evbuffer_get_length(bufferevent_get_output(bev)) == 0);
    bufferevent_free(bev); /* no TLS close: as if killed */
    RUN_UNTIL(t.server.closed);
    SSL_CTX_free(ctx);
}

/* A process killed in the middle of a frame. */
static void a_truncated_frame_is_noticed(void **state) {
    (void)state;
    uint8_t bytes[PROTO_FRAME_HEADER_BYTES + 10] = {0};
    frame_write(&(struct frame){.type = MSG_CHUNK, .length = 100}, bytes);
    send_and_close(bytes, sizeof bytes);
    assert_why(t.server, ERR_TRUNCATED,
               "closed in the middle of a CHUNK frame: 10 of 100 bytes came");
}

static void a_truncated_header_is_noticed(void **state) {
    (void)state;
    uint8_t bytes[PROTO_FRAME_HEADER_BYTES] = {0};
    frame_write(&(struct frame){.type = MSG_CHUNK, .length = 100}, bytes);
    send_and_close(bytes, 20);
    assert_why(t.server, ERR_TRUNCATED, "frame header: 20 of 36 bytes came");
}

/* What came whole before the connection broke still counts. */
static void whole_messages_before_the_end_are_delivered(void **state) {
    (void)state;
    enum { COUNT = 1000 };
    static uint8_t bytes[COUNT * (PROTO_FRAME_HEADER_BYTES + 2)];
    for (int i = 0; i < COUNT; i++) {
        uint8_t *at = bytes + i * (PROTO_FRAME_HEADER_BYTES + 2);
        frame_write(&(struct frame){.type = MSG_ENROLLED, .length = 2}, at);
        memcpy(at + PROTO_FRAME_HEADER_BYTES, "\x91\x05", 2);
    }
    send_and_close(bytes, sizeof bytes);
    assert_int_equal(t.server.messages, COUNT);
    assert_why(t.server, ERR_IO, "connection lost");
}

/* ---- peers without our TLS
 * ------------------------------------------------------------------------------ */

static void send_plain(int fd, const void *bytes, size_t length) {
    assert_int_equal(write(fd, bytes, length), length);
    RUN_UNTIL(t.server.closed);
    assert_false(t.server.opened);
}

static void http_on_the_port_is_answered_and_named(void **state) {
    (void)state;
    static const char request[] = "GET / HTTP/1.1\r\nHost: example.org\r\nUser-Agent: curl\r\n\r\n";
    char answer[512] = "";
    int fd = plain_socket();
    send_plain(fd, request, sizeof request - 1);
    assert_why(t.server, ERR_PROTOCOL, "plain HTTP on the TLS port");
    assert_true(read(fd, answer, sizeof answer - 1) > 0);
    assert_non_null(strstr(answer, "400 Bad Request"));
    assert_non_null(strstr(answer, "speaks TLS, not plain HTTP"));
    assert_int_equal(read(fd, answer, sizeof answer), 0);
    close(fd);
}

static void garbage_on_the_port_is_refused(void **state) {
    (void)state;
    int fd = plain_socket();
    send_plain(fd, "hello, is anybody there? hello?\n", 32);
    assert_why(t.server, ERR_PROTOCOL, "does not speak TLS");
    close(fd);
    uint64_t random = 88172645463325252u;
    for (int n = 0; n < 50; n++) { /* random bytes, half of them behind a TLS record header */
        uint8_t bytes[300] = {0x16, 3, 1, 1, 0x27, 1, 0, 1, 0x23, 3, 3};
        for (size_t i = n % 2 ? 11 : 0; i < sizeof bytes; i++) {
            random ^= random << 13, random ^= random >> 7, random ^= random << 17;
            bytes[i] = (uint8_t)random;
        }
        t.server = (struct end){0};
        fd = plain_socket();
        assert_int_equal(write(fd, bytes, sizeof bytes), sizeof bytes);
        shutdown(fd, SHUT_WR);
        RUN_UNTIL(t.server.closed);
        assert_false(t.server.opened);
        close(fd);
    }
}

static void a_silent_peer_is_cut_off(void **state) {
    (void)state;
    channel_context_set_timeouts(t.server_ctx, 60, 60);
    int fd = plain_socket();
    RUN_UNTIL(t.server.closed);
    assert_why(t.server, ERR_TIMEOUT, "no TLS handshake within 60 ms");
    close(fd);
}

/* A byte now and then is not a handshake, however long it goes on. */
static void a_dripped_handshake_is_cut_off(void **state) {
    (void)state;
    static const uint8_t hello[] = {0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3};
    channel_context_set_timeouts(t.server_ctx, 100, 100);
    int fd = plain_socket();
    for (unsigned n = 0; !t.server.closed; n++) {
        ssize_t sent = write(fd, n < sizeof hello ? &hello[n] : hello, 1);
        if (sent == 1 || t.server.closed) turn(10);
        assert_in_range(n, 0, PATIENCE_MS / 10);
    }
    assert_why(t.server, ERR_TIMEOUT, "no TLS handshake within 100 ms");
    close(fd);
}

/* Nor is it a frame: a member that has begun one ends it, or its link. */
static void drip(const void *bytes, size_t length, const char *text) {
    struct err err = {0};
    SSL_CTX *ctx = tls_context_create(&t.client_id, &err);
    t.server = (struct end){0};
    struct bufferevent *bev = raw_tls(ctx);
    RUN_UNTIL(raw_open && t.server.opened);
    bufferevent_write(bev, bytes, length);
    for (unsigned n = 0; !t.server.closed; n++) {
        bufferevent_write(bev, "", 1);
        turn(10);
        assert_in_range(n, 0, PATIENCE_MS / 10);
    }
    assert_why(t.server, ERR_TIMEOUT, text);
    bufferevent_free(bev);
    turn(20);
    SSL_CTX_free(ctx);
}

static void a_dripped_frame_is_cut_off(void **state) {
    (void)state;
    uint8_t header[PROTO_FRAME_HEADER_BYTES];
    channel_context_set_frame_time(t.server_ctx, 100, 100000);
    frame_write(&(struct frame){.type = MSG_CHUNK, .length = 10000}, header);
    drip(header, sizeof header, "a CHUNK frame comes too slowly: ");
    drip(header, 5, "a frame's header comes too slowly: ");
}

/* Its time is for each frame alone, and a peer that says nothing between frames is no drip. */
static void a_quiet_member_is_not_cut_off(void **state) {
    (void)state;
    static uint8_t data[1 << 20];
    channel_context_set_frame_time(t.server_ctx, 60, 100u << 20);
    connect_both();
    for (uint64_t n = 1; n <= 3; n++) {
        send_chunk(t.client.ch, data, sizeof data, n);
        RUN_UNTIL(t.server.chunks == n);
        turn(100);
    }
    assert_false(t.server.closed);
}

static void a_stranger_does_not_stay_for_ever(void **state) {
    (void)state;
    channel_context_set_timeouts(t.server_ctx, 5000, 60);
    t.server.stay_stranger = true;
    dial();
    RUN_UNTIL(t.client.closed && t.server.closed);
    assert_why(t.server, ERR_TIMEOUT, "still a stranger after 60 ms");
    /* One that is known may be silent. */
    t.server = t.client = (struct end){0};
    connect_both();
    turn(150);
    assert_false(t.server.closed || t.client.closed);
}

static void a_closed_port_is_named(void **state) {
    (void)state;
    listener_destroy(t.listener);
    t.listener = NULL;
    dial();
    RUN_UNTIL(t.client.closed);
    char want[100];
    snprintf(want, sizeof want, "connect to 127.0.0.1 port %u: Connection refused", t.port);
    assert_why(t.client, ERR_IO, want);
    struct err err = {0};
    assert_null(channel_dial(t.base, t.client_ctx, "999.1.1.1.invalid", 1, &ops, &t.client, &err));
    assert_non_null(strstr(err.msg, "host \"999.1.1.1.invalid\""));
}

/* "localhost" is ::1 first, and the listener has only 127.0.0.1. */
static void a_name_with_two_addresses_is_tried_twice(void **state) {
    (void)state;
    struct err err = {0};
    t.client.ch = channel_dial(t.base, t.client_ctx, "localhost", t.port, &ops, &t.client, &err);
    assert_non_null(t.client.ch);
    RUN_UNTIL(t.client.opened && t.server.opened);
}

static void a_taken_port_names_its_holder(void **state) {
    (void)state;
    struct err err = {0};
    uint16_t port = t.port;
    char want[64];
    assert_null(listener_create(t.base, "127.0.0.1", &port, on_accept, NULL, &err));
    assert_int_equal(err.code, ERR_IO);
    snprintf(want, sizeof want, "(process %d) holds it already", (int)getpid());
    if (!strstr(err.msg, want)) fail_msg("%s", err.msg);
}

/* ---- wrong TLS
 * ------------------------------------------------------------------------------------------- */

static X509 *certificate(EVP_PKEY *key, EVP_PKEY *signer, const EVP_MD *md) {
    X509 *x = X509_new();
    X509_set_version(x, X509_VERSION_3);
    ASN1_INTEGER_set(X509_get_serialNumber(x), 1);
    X509_gmtime_adj(X509_getm_notBefore(x), 0);
    X509_gmtime_adj(X509_getm_notAfter(x), 86400);
    X509_set_pubkey(x, key);
    X509_sign(x, signer, md);
    return x;
}

/* A client that differs from ours in one thing. */
static SSL_CTX *odd_context(void) {
    SSL_CTX *ctx = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_alpn_protos(ctx, (const unsigned char *)"\x0bintellect/1", 12);
    return ctx;
}

static void assert_odd_refused(SSL_CTX *ctx, enum err_code code, const char *text) {
    struct bufferevent *bev = raw_tls(ctx);
    RUN_UNTIL(t.server.closed && raw_gone);
    assert_false(t.server.opened);
    assert_why(t.server, code, text);
    bufferevent_free(bev);
    SSL_CTX_free(ctx);
}

static void use_key(SSL_CTX *ctx, EVP_PKEY *key, EVP_PKEY *signer, const EVP_MD *md) {
    X509 *x = certificate(key, signer, md);
    SSL_CTX_use_certificate(ctx, x);
    SSL_CTX_use_PrivateKey(ctx, key);
    X509_free(x);
}

static void a_client_without_certificate_is_refused(void **state) {
    (void)state;
    assert_odd_refused(odd_context(), ERR_PROTOCOL, "peer did not return a certificate");
}

static void another_kind_of_key_is_refused(void **state) {
    (void)state;
    SSL_CTX *ctx = odd_context();
    EVP_PKEY *key = EVP_EC_gen("P-256");
    use_key(ctx, key, key, EVP_sha256());
    EVP_PKEY_free(key);
    assert_odd_refused(ctx, ERR_PROTOCOL, "TLS: "); /* Ed25519 is the only signature on offer */
}

/* A certificate made by somebody else for this key would be a statement we did not ask for. */
static void a_certificate_of_an_authority_is_refused(void **state) {
    (void)state;
    SSL_CTX *ctx = odd_context();
    EVP_PKEY *key = EVP_PKEY_Q_keygen(NULL, NULL, "ED25519");
    EVP_PKEY *authority = EVP_PKEY_Q_keygen(NULL, NULL, "ED25519");
    use_key(ctx, key, authority, NULL);
    EVP_PKEY_free(key);
    EVP_PKEY_free(authority);
    assert_odd_refused(ctx, ERR_REFUSED, "not one self-signed Ed25519 one");
}

static void an_older_tls_is_refused(void **state) {
    (void)state;
    SSL_CTX *ctx = odd_context();
    SSL_CTX_set_max_proto_version(ctx, TLS1_2_VERSION);
    assert_odd_refused(ctx, ERR_PROTOCOL, "unsupported protocol");
}

static void another_alpn_is_refused(void **state) {
    (void)state;
    struct err err = {0};
    SSL_CTX *ctx = tls_context_create(&t.client_id, &err);
    SSL_CTX_set_alpn_protos(ctx, (const unsigned char *)"\x02h2", 3);
    assert_odd_refused(ctx, ERR_PROTOCOL, "no application protocol");
    t.server = (struct end){0};
    ctx = tls_context_create(&t.client_id, &err);
    SSL_CTX_set_alpn_protos(ctx, NULL, 0);
    assert_odd_refused(ctx, ERR_PROTOCOL, "does not speak \"intellect/1\"");
}

/* ---- slow peers
 * ------------------------------------------------------------------------------------------- */

/* Who does not read is cut off at PROTO_SEND_MAX, and channel_send never calls back. */
static void a_peer_that_does_not_read_is_cut_off(void **state) {
    (void)state;
    static uint8_t data[8 << 20];
    struct err err = {0};
    SSL_CTX *ctx = tls_context_create(&t.client_id, &err);
    struct bufferevent *bev = raw_tls(ctx);
    RUN_UNTIL(raw_open && t.server.opened);
    bufferevent_disable(bev, EV_READ);
    struct msg_chunk chunk = {.data = {data, sizeof data}};
    int sent = 0;
    while (channel_send(t.server.ch, MSG_CHUNK, 0, 0, 0, &chunk, &err) == 0) sent++;
    assert_in_range(sent, 7, 8); /* the kernel takes some */
    assert_int_equal(err.code, ERR_FULL);
    assert_false(t.server.closed);
    assert_true(channel_unsent_bytes(t.server.ch) <= PROTO_SEND_MAX);
    assert_int_equal(send_number(t.server.ch, 1, &err), -1); /* nothing after the gap */
    RUN_UNTIL(t.server.closed);
    assert_why(t.server, ERR_FULL, "reads too slowly");
    bufferevent_free(bev);
    turn(1100); /* lingers for a second at most, then lets go: asan would see a leak */
    SSL_CTX_free(ctx);
}

/* While one side does not take messages off, the other cannot fill its memory. Here the client's
 * header promises 9 MB, and it goes on sending after them in one endless frame row. */
static void buffered_input_is_bounded(void **state) {
    (void)state;
    struct err err = {0};
    SSL_CTX *ctx = tls_context_create(&t.client_id, &err);
    struct bufferevent *bev = raw_tls(ctx);
    static uint8_t bytes[1 << 20];
    RUN_UNTIL(raw_open && t.server.opened);
    frame_write(&(struct frame){.type = MSG_ENROLLED, .length = 2 << 20}, bytes);
    for (int i = 0; i < 16; i++) bufferevent_write(bev, bytes, sizeof bytes);
    uint64_t most = 0;
    while (!t.server.closed) {
        event_base_loop(t.base, EVLOOP_ONCE);
        if (t.server.ch) {
            uint64_t now = channel_received_bytes(t.server.ch);
            most = now > most ? now : most;
        }
    }
    assert_why(t.server, ERR_PROTOCOL, "protocol: ENROLLED");
    assert_true(most <= (2 << 20) + (128 << 10) + PROTO_FRAME_HEADER_BYTES);
    bufferevent_free(bev);
    turn(20);
    SSL_CTX_free(ctx);
}

static void sending_on_a_lost_connection_fails(void **state) {
    (void)state;
    connect_both();
    struct channel *ch = t.client.ch;
    assert_int_equal(send_number(ch, 1, NULL), 0);
    struct msg_bye wrong = {.final = 7};
    struct err err = {0};
    assert_int_equal(channel_send(ch, MSG_BYE, 0, 0, 0, &wrong, &err), -1);
    assert_non_null(strstr(err.msg, "BYE.final"));
    assert_int_equal(channel_unsent_bytes(ch),
                     PROTO_FRAME_HEADER_BYTES + 4); /* none of it was queued */
    t.client.ch = NULL;
    channel_close(ch, false);
    struct end early = {0};
    early.ch = channel_dial(t.base, t.client_ctx, "127.0.0.1", t.port, &ops, &early, &err);
    assert_int_equal(send_number(early.ch, 1, &err), -1);
    assert_non_null(strstr(err.msg, "not open"));
    channel_close(early.ch, true); /* before anything happened */
    RUN_UNTIL(t.server.closed);
}

int main(void) {
#define TEST(f) cmocka_unit_test_setup_teardown(f, start, stop)
    const struct CMUnitTest tests[] = {
        TEST(message_comes_back_with_its_header),
        TEST(largest_frame_goes_through),
        TEST(small_messages_drain_too),
        TEST(thousands_of_small_messages),
        TEST(bursts_of_all_lengths_end),
        TEST(a_flood_leaves_others_their_turn),
        TEST(urgent_messages_overtake_bulk),
        TEST(bulk_overtakes_nothing),
        TEST(a_held_channel_waits),
        TEST(flush_delivers_the_last_words),
        TEST(flush_sends_megabytes_first),
        TEST(callbacks_may_close),
        TEST(a_refused_key_is_told_so),
        TEST(a_frame_over_the_limit_is_refused_before_its_payload),
        TEST(an_unknown_version_is_refused),
        TEST(an_unknown_type_is_refused),
        TEST(a_huge_length_is_refused),
        TEST(a_payload_that_is_not_msgpack_is_refused),
        TEST(http_inside_tls_is_refused),
        TEST(a_truncated_frame_is_noticed),
        TEST(a_truncated_header_is_noticed),
        TEST(whole_messages_before_the_end_are_delivered),
        TEST(http_on_the_port_is_answered_and_named),
        TEST(garbage_on_the_port_is_refused),
        TEST(a_silent_peer_is_cut_off),
        TEST(a_dripped_handshake_is_cut_off),
        TEST(a_dripped_frame_is_cut_off),
        TEST(a_quiet_member_is_not_cut_off),
        TEST(a_stranger_does_not_stay_for_ever),
        TEST(a_closed_port_is_named),
        TEST(a_name_with_two_addresses_is_tried_twice),
        TEST(a_taken_port_names_its_holder),
        TEST(a_client_without_certificate_is_refused),
        TEST(another_kind_of_key_is_refused),
        TEST(a_certificate_of_an_authority_is_refused),
        TEST(an_older_tls_is_refused),
        TEST(another_alpn_is_refused),
        TEST(a_peer_that_does_not_read_is_cut_off),
        TEST(buffered_input_is_bounded),
        TEST(sending_on_a_lost_connection_fails),
    };
    return cmocka_run_group_tests_name("channel", tests, NULL, NULL);
}
