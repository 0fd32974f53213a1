/* fuzz_channel.c - what a peer sends over a real TLS connection, in pieces of any size. A channel
 * must hand over just the messages that frames_next() finds in the same stream, end with the same
 * verdict, say so once, and leave nothing behind.
 *
 * Input: a byte of flags, the number of cuts, two bytes for each piece before a cut, the stream. */
#include <errno.h>
#include <event2/event.h>
#include <openssl/err.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

#include "proto/tls.h"
#include "tests/fuzz/frames.h"

#define CUTS_MAX 15
#define TURNS_MAX 2000 /* of the loop; a stream of 64 KiB takes about 40 */

enum { KNOWN = 1, ABRUPT = 2, OWNER_CLOSES = 4, FLUSH = 8, IN_MESSAGE = 16, REFUSE = 32, NO_TLS = 64, HOLD = 128 };

static struct event_base *base;
static struct channel_context *context;
static SSL_CTX *client;
static struct identity client_id;

static struct seen {
    struct channel *ch; /* NULL when it is gone */
    uint8_t flags;
    bool held;
    uint32_t messages, closes;
    struct digest_stream digest; /* of all messages, encoded again */
    struct err why;
} seen;

static void note_message(struct digest_stream *s, const struct frame *f, const void *msg) {
    uint8_t header[PROTO_FRAME_HEADER_BYTES];
    struct proto_buffer b = record_encoded((enum proto_record)proto_record_of_type(f->type), msg);
    frame_write(f, header);
    digest_stream_update(s, header, sizeof header);
    digest_stream_update(s, b.data, b.length);
    proto_buffer_release(&b);
}

static bool on_open(void *arg, struct channel *ch, const struct proto_key *key) {
    (void)arg;
    assert(!memcmp(key, &client_id.key, sizeof *key));
    if (seen.flags & KNOWN) channel_set_frame_bytes_max(ch, PROTO_CONTROL_BYTES_MAX);
    return !(seen.flags & REFUSE);
}

static void close_channel(void) {
    struct channel *ch = seen.ch;
    seen.ch = NULL;
    if (ch) channel_close(ch, seen.flags & FLUSH);
}

static void on_message(void *arg, struct channel *ch, const struct frame *f, const void *msg) {
    (void)arg;
    assert(ch == seen.ch);
    seen.messages++;
    note_message(&seen.digest, f, msg);
    seen.held = seen.flags & HOLD;
    if (seen.held) channel_hold(ch, true);
    if (seen.flags & IN_MESSAGE) close_channel();
}

static void on_close(void *arg, struct channel *ch, const struct err *why) {
    (void)arg;
    assert(ch == seen.ch && *why->msg);
    seen.ch = NULL;
    seen.closes++;
    seen.why = *why;
}

static const struct channel_ops ops = {.on_open = on_open, .on_message = on_message, .on_close = on_close};

/* An owner that holds the channel lets one more message come in each turn. */
static void turn(void) {
    if (seen.held && seen.ch) channel_hold(seen.ch, false);
    seen.held = false;
    event_base_loop(base, EVLOOP_NONBLOCK);
}

/* What the stream holds by the plain reading of it. */
struct expected {
    uint32_t messages;
    struct digest digest;
    enum frames_end end;
};

static struct expected read_plainly(struct fuzz_input in, uint32_t limit) {
    struct expected e = {0};
    struct digest_stream s;
    struct frame frame;
    union any_record msg;
    struct err err;
    digest_stream_init(&s);
    while ((e.end = frames_next(&in, limit, &frame, &msg, &err)) == FRAMES_MORE) {
        e.messages++;
        note_message(&s, &frame, &msg);
        proto_decoded_release((enum proto_record)proto_record_of_type(frame.type), &msg);
    }
    e.digest = digest_stream_final(&s);
    return e;
}

/* The other end of the connection. */
struct peer {
    int fd;
    SSL *ssl; /* NULL: it does not even speak TLS */
};

static bool shake_hands(struct peer *p) {
    for (int i = 0; i < TURNS_MAX; i++) {
        int r = SSL_do_handshake(p->ssl);
        if (r == 1) return true;
        if (SSL_get_error(p->ssl, r) != SSL_ERROR_WANT_READ) return false;
        turn();
    }
    return false;
}

static void send_piece(struct peer *p, const uint8_t *bytes, size_t length) {
    for (int i = 0; length && i < TURNS_MAX && seen.ch; i++) {
        ssize_t n = p->ssl ? SSL_write(p->ssl, bytes, (int)length)
                           : send(p->fd, bytes, length, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n > 0) {
            bytes += n;
            length -= (size_t)n;
        }
        turn();
    }
    turn();
}

static void send_stream(struct peer *p, struct fuzz_input in, const uint16_t *piece, uint32_t cuts) {
    for (uint32_t i = 0; i < cuts; i++) {
        size_t n = piece[i];
        const uint8_t *at = fuzz_bytes(&in, &n);
        send_piece(p, at, n);
    }
    send_piece(p, in.at, in.left);
}

static void close_peer(struct peer *p) {
    if (p->ssl && !(seen.flags & ABRUPT)) SSL_shutdown(p->ssl);
    SSL_free(p->ssl);
    ERR_clear_error();
    close(p->fd);
}

/* A peer that sent whole frames, a wrong one, or half of one, and hung up. */
static void check(const struct expected *e) {
    struct digest digest = digest_stream_final(&seen.digest);
    assert(seen.messages == e->messages && digest_equal(&digest, &e->digest));
    assert(seen.closes == 1);
    if (e->end == FRAMES_WRONG) assert(seen.why.code == ERR_PROTOCOL);
    if (e->end == FRAMES_CUT && !(seen.flags & ABRUPT)) assert(seen.why.code == ERR_TRUNCATED);
    if (e->end == FRAMES_END && !(seen.flags & ABRUPT)) assert(seen.why.code == ERR_IO);
}

static void start(struct peer *p, uint8_t flags) {
    int fd[2];
    struct err err;
    int failed = socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fd);
    assert(!failed);
    seen = (struct seen){.flags = flags};
    digest_stream_init(&seen.digest);
    seen.ch = channel_accept(base, context, fd[0], &ops, NULL, &err);
    p->fd = fd[1];
    p->ssl = flags & NO_TLS ? NULL : SSL_new(client);
    assert(seen.ch && (p->ssl || flags & NO_TLS));
    if (!p->ssl) return;
    SSL_set_fd(p->ssl, fd[1]);
    SSL_set_connect_state(p->ssl);
}

static bool take(const uint8_t *bytes, size_t length) {
    struct fuzz_input in = {bytes, length};
    struct peer p;
    uint16_t piece[CUTS_MAX];
    uint8_t flags = fuzz_u8(&in);
    uint32_t cuts = fuzz_u8(&in) % (CUTS_MAX + 1);
    for (uint32_t i = 0; i < cuts; i++) piece[i] = (uint16_t)fuzz_le(&in, 2);
    struct expected e = read_plainly(in, flags & KNOWN ? PROTO_CONTROL_BYTES_MAX
                                                       : PROTO_STRANGER_BYTES_MAX);
    bool plain = !(flags & (OWNER_CLOSES | IN_MESSAGE | REFUSE | NO_TLS));
    start(&p, flags);
    bool open = !p.ssl || shake_hands(&p);
    if (open) send_stream(&p, in, piece, cuts);
    for (int i = 0; i < TURNS_MAX && seen.ch && seen.messages < e.messages; i++) turn();
    if (flags & OWNER_CLOSES) close_channel();
    close_peer(&p);
    for (int i = 0; i < TURNS_MAX && event_base_get_num_events(base, EVENT_BASE_COUNT_ADDED); i++) turn();
    assert(!event_base_get_num_events(base, EVENT_BASE_COUNT_ADDED));
    assert(!seen.ch && seen.closes <= 1);
    if (plain) check(&e);
    return plain && e.end == FRAMES_END;
}

static void init(void) {
    struct err err;
    struct identity server_id;
    uint8_t seed[32] = {1};
    int failed = proto_init(&err);
    assert(!failed);
    identity_from_seed(&server_id, seed);
    seed[0] = 2;
    identity_from_seed(&client_id, seed);
    base = event_base_new();
    context = channel_context_create(&server_id, &err);
    client = tls_context_create(&client_id, &err);
    assert(base && context && client);
}

static void samples(const struct fuzz_sink *out) {
    static const uint8_t types[] = {MSG_ENROL, MSG_HELLO, MSG_HEARTBEAT, MSG_READY, MSG_CHUNK, MSG_BYE};
    static const uint8_t cut[] = {3, 7, 0, 36, 0, 100, 0};
    for (size_t i = 0; i < sizeof types; i++) {
        uint8_t flags = i & 1 ? KNOWN : 0;
        struct proto_buffer b;
        proto_buffer_init(&b, 1u << 16);
        proto_buffer_append(&b, &flags, 1);
        proto_buffer_append(&b, cut, sizeof cut);
        frames_append(&b, types[i], 1);
        frames_append(&b, types[i], 0);
        out->sample(out->arg, proto_type_name(types[i]), b.data, b.length);
        proto_buffer_release(&b);
    }
    static const char *const words[] = {"ITL1", "GET / HTTP/1.0\r\n\r\n", "\x16\x03\x01\x02"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) out->word(out->arg, words[i]);
}

const struct fuzz_target fuzz_channel = {"channel", init, take, samples};
