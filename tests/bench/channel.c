/* channel.c - the channel over the loopback, beside OpenSSL alone and bare TCP. */
#include <event2/event.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/evp.h>
#include <openssl/ssl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "kernels/kernels.h"
#include "proto/proto.h"
#include "proto/stream.h"
#include "proto/tls.h"
#include "tests/bench/bench.h"

/* ---- a plain connection, the channel's reference --------------------------------------------- */

/* One end on the loopback; ssl is NULL for bare TCP. Calls block. */
struct wire {
    int fd;
    SSL *ssl;
};

static int wire_put(const struct wire *w, const void *bytes, size_t n) {
    for (const uint8_t *p = bytes; n;) {
        ssize_t put = w->ssl ? SSL_write(w->ssl, p, (int)n) : write(w->fd, p, n);
        if (put <= 0) return -1;
        p += put;
        n -= (size_t)put;
    }
    return 0;
}

static ssize_t wire_get(const struct wire *w, void *out, size_t n) {
    return w->ssl ? SSL_read(w->ssl, out, (int)n) : read(w->fd, out, n);
}

static int loopback_pair(int fd[2], struct err *err) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof a;
    int listening = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
    fd[0] = socket(AF_INET, SOCK_STREAM, 0);
    if (listening < 0 || fd[0] < 0 || bind(listening, (struct sockaddr *)&a, sizeof a) ||
        listen(listening, 1) || getsockname(listening, (struct sockaddr *)&a, &length) ||
        connect(fd[0], (struct sockaddr *)&a, sizeof a) ||
        (fd[1] = accept(listening, NULL, NULL)) < 0)
        return err_set_errno(err, "a connection over the loopback");
    close(listening);
    for (int i = 0; i < 2; i++) setsockopt(fd[i], IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    return 0;
}

/* The receiving thread: a count of bytes, so many bytes, an answer of one byte, and again. */
static void *wire_receive(void *arg) {
    static uint8_t buffer[64 << 10];
    struct wire *w = arg;
    uint64_t left;
    if (w->ssl && SSL_accept(w->ssl) != 1) return NULL; /* the other side will notice */
    while (wire_get(w, &left, sizeof left) == (ssize_t)sizeof left) {
        while (left) {
            ssize_t got = wire_get(w, buffer, left < sizeof buffer ? left : sizeof buffer);
            if (got <= 0) return NULL;
            left -= (uint64_t)got;
        }
        if (wire_put(w, "a", 1)) return NULL;
    }
    return NULL;
}

struct sending {
    struct wire near, far;
    pthread_t thread;
    uint8_t *data;
    size_t piece, pieces; /* what one call to write() or SSL_write() is given, and how many */
};

static int run_wire(void *arg, struct err *err) {
    struct sending *w = arg;
    uint64_t bytes = w->piece * w->pieces;
    char answer;
    int failed = wire_put(&w->near, &bytes, sizeof bytes);
    for (size_t i = 0; i < w->pieces && !failed; i++)
        failed = wire_put(&w->near, w->data + i * w->piece, w->piece);
    if (failed || wire_get(&w->near, &answer, 1) != 1)
        return err_set(err, ERR_IO, "the plain connection over the loopback broke");
    return 0;
}

/* ssl: NULL for TCP, else TLS as the channel configures it. */
static int wire_open(struct sending *w, SSL_CTX *ssl, struct err *err) {
    int fd[2];
    if (loopback_pair(fd, err)) return -1;
    w->near = (struct wire){fd[0], ssl ? SSL_new(ssl) : NULL};
    w->far = (struct wire){fd[1], ssl ? SSL_new(ssl) : NULL};
    if (ssl && (!SSL_set_fd(w->near.ssl, fd[0]) || !SSL_set_fd(w->far.ssl, fd[1])))
        return err_set(err, ERR_MEMORY, "no memory for a TLS connection");
    if (pthread_create(&w->thread, NULL, wire_receive, &w->far))
        return err_set(err, ERR_MEMORY, "no thread for a TLS connection");
    if (ssl && SSL_connect(w->near.ssl) != 1)
        return err_set(err, ERR_IO, "the plain TLS connection over the loopback was not made");
    return 0;
}

static void wire_close(struct sending *w) {
    shutdown(w->near.fd, SHUT_RDWR);
    pthread_join(w->thread, NULL);
    SSL_free(w->near.ssl);
    SSL_free(w->far.ssl);
    close(w->near.fd);
    close(w->far.fd);
}

/* ---- the channel ----------------------------------------------------------------------------- */

#define UNSENT_BYTES (4u << 20) /* queued at once */
#define CHUNKS 240              /* lie side by side, so that none is in a cache when its turn comes */

/* One end of the channel, with an event_base that one thread alone runs. */
struct end {
    struct identity identity;
    struct event_base *base;
    struct channel_context *context;
    struct channel *channel;
    struct err why;
    bool open, closed;
    /* the sender's */
    uint8_t type;
    const void *message, *last; /* the last one asks for an answer */
    struct msg_chunk chunk;     /* in place of both, of data that begins at `chunks` */
    const uint8_t *chunks;
    uint32_t messages, left;
    bool answered;
};

/* The last chunk is marked. */
static const void *next_chunk(struct end *e) {
    struct msg_chunk *chunk = &e->chunk;
    chunk->data.data = e->chunks + (size_t)e->left * chunk->data.length;
    chunk->round = e->left == 0;
    return chunk;
}

static void pump(struct end *e) {
    while (e->left && !e->closed && channel_unsent_bytes(e->channel) < UNSENT_BYTES) {
        const void *message = --e->left ? e->message : e->last;
        if (e->type == MSG_CHUNK) message = next_chunk(e);
        if (channel_send(e->channel, e->type, 1, 2, 3, message, &e->why)) e->closed = true;
    }
}

static bool on_open(void *arg, struct channel *ch, const struct proto_key *key) {
    struct end *e = arg;
    (void)key;
    e->channel = ch;
    e->open = true;
    channel_set_frame_bytes_max(ch, PROTO_FRAME_BYTES_MAX);
    return true;
}

/* The sender hears answers only; the receiver answers what is marked as the last. */
static void on_message(void *arg, struct channel *ch, const struct frame *f, const void *msg) {
    struct end *e = arg;
    bool last = (f->type == MSG_CHUNK && ((const struct msg_chunk *)msg)->round) ||
                (f->type == MSG_HEARTBEAT && ((const struct msg_heartbeat *)msg)->step);
    struct msg_heartbeat_ack answer = {0};
    if (f->type == MSG_HEARTBEAT_ACK) e->answered = true;
    if (last) channel_send(ch, MSG_HEARTBEAT_ACK, 1, 2, 3, &answer, NULL);
}

static void on_close(void *arg, struct channel *ch, const struct err *why) {
    struct end *e = arg;
    (void)ch;
    e->why = *why;
    e->closed = true;
    event_base_loopbreak(e->base);
}

static void on_drained(void *arg, struct channel *ch) {
    (void)ch;
    pump(arg);
}

static const struct channel_ops channel_ops = {on_open, on_message, on_close, on_drained};

static void on_accept(void *arg, int fd) {
    struct end *e = arg;
    if (!channel_accept(e->base, e->context, fd, &channel_ops, e, &e->why))
        event_base_loopbreak(e->base);
}

static void *end_main(void *arg) {
    event_base_dispatch(((struct end *)arg)->base);
    return NULL;
}

static int end_init(struct end *e, struct err *err) {
    *e = (struct end){.base = event_base_new()};
    if (!e->base) return err_set(err, ERR_MEMORY, "no event loop");
    identity_create(&e->identity);
    e->context = channel_context_create(&e->identity, err);
    return e->context ? 0 : -1;
}

static void end_release(struct end *e) {
    channel_context_destroy(e->context);
    event_base_free(e->base);
    identity_release(&e->identity);
}

static int end_failed(const struct end *e, struct err *err) {
    return err_set(err, ERR_IO, "the channel over the loopback broke: %.200s", e->why.msg);
}

static int run_channel(void *arg, struct err *err) {
    struct end *e = arg;
    e->left = e->messages;
    e->answered = false;
    pump(e);
    while (!e->answered && !e->closed) event_base_loop(e->base, EVLOOP_ONCE);
    return e->closed ? end_failed(e, err) : 0;
}

struct link {
    struct end near, far;
    struct listener *listener;
    pthread_t thread;
};

static int link_open(struct link *l, struct err *err) {
    uint16_t port = 0;
    if (end_init(&l->near, err) || end_init(&l->far, err)) return -1;
    l->listener = listener_create(l->far.base, "127.0.0.1", &port, on_accept, &l->far, err);
    if (!l->listener) return -1;
    if (pthread_create(&l->thread, NULL, end_main, &l->far))
        return err_set(err, ERR_MEMORY, "no thread for a channel");
    struct end *e = &l->near;
    if (!channel_dial(e->base, e->context, "127.0.0.1", port, &channel_ops, e, err)) return -1;
    while (!e->open && !e->closed) event_base_loop(e->base, EVLOOP_ONCE);
    return e->closed ? end_failed(e, err) : 0;
}

static void link_close(struct link *l) {
    channel_close(l->near.channel, false);
    pthread_join(l->thread, NULL); /* its channel has been closed by us */
    listener_destroy(l->listener);
    end_release(&l->near);
    end_release(&l->far);
}

#define RECORD_BYTES 16384 /* of TLS */

/* As TLS does it: a record, a nonce and a tag at a time. */
static int run_aes(void *arg, struct err *err) {
    struct sending *w = arg;
    static uint8_t out[RECORD_BYTES], key[16], nonce[12], tag[16];
    EVP_CIPHER_CTX *c = EVP_CIPHER_CTX_new();
    int n, ok = c && EVP_EncryptInit_ex(c, EVP_aes_128_gcm(), NULL, key, nonce);
    for (size_t at = 0; ok && at < w->piece * w->pieces; at += RECORD_BYTES) {
        memcpy(nonce, &at, sizeof at);
        ok = EVP_EncryptInit_ex(c, NULL, NULL, NULL, nonce) &&
             EVP_EncryptUpdate(c, out, &n, w->data + at, RECORD_BYTES) &&
             EVP_EncryptFinal_ex(c, out, &n) &&
             EVP_CIPHER_CTX_ctrl(c, EVP_CTRL_GCM_GET_TAG, sizeof tag, tag);
    }
    EVP_CIPHER_CTX_free(c);
    return ok ? 0 : err_set(err, ERR_UNSUPPORTED, "OpenSSL has no AES-128-GCM");
}

/* What moving bytes must take of all cores together: a system's copies, and each byte encrypted and
 * decrypted. */
static struct series least(const struct series *tcp, const struct series *aes) {
    struct series sum = *tcp;
    if (aes->count < sum.count) sum.count = aes->count;
    for (int i = 0; i < sum.count; i++) sum.value[i] += 2 * aes->value[i];
    return sum;
}

static int time_chunks(struct bench *b, struct link *l, struct sending *tcp, struct sending *tls,
                       struct err *err) {
    struct series s[4], cpu[4];
    size_t chunk_bytes = outer_encoded_bytes(OUTER_INT8, CHUNK), bytes = CHUNKS * chunk_bytes;
    l->near.type = MSG_CHUNK;
    l->near.chunk = (struct msg_chunk){.data = {.length = (uint32_t)chunk_bytes}};
    l->near.chunks = tcp->data;
    l->near.messages = CHUNKS;
    tcp->piece = STREAM_STAGE_BYTES;
    tls->piece = RECORD_BYTES;
    tcp->pieces = bytes / tcp->piece;
    tls->pieces = bytes / tls->piece;
    struct task task[] = {{run_channel, &l->near, NULL}, {run_wire, tls, NULL},
                          {run_wire, tcp, NULL}, {run_aes, tls, NULL}};
    if (time_both(task, s, cpu, 4, 3, err)) return -1;
    struct series floor = least(&cpu[2], &cpu[3]);
    double sent = (double)bytes / MB;
    row_rate(b, "bare TCP, loopback, two threads", "MB/s", sent, &s[2], NULL, 0, NULL);
    row_rate(b, "AES-128-GCM, one core", "MB/s", sent, &cpu[3], NULL, 0, NULL);
    row_rate(b, "TCP, encrypted, decrypted: per core-second", "MB/s", sent, &floor, NULL, 0, NULL);
    row_rate(b, "OpenSSL alone, loopback, two threads", "MB/s", sent, &s[1], "bare TCP", sent, &s[2]);
    row_rate(b, "    per second that a core works, both ends", "MB/s", sent, &cpu[1],
             "TCP, encrypted, decrypted", sent, &floor);
    row_rate(b, "channel: CHUNKs one way, two threads", "MB/s", sent, &s[0], "OpenSSL alone", sent,
             &s[1]);
    row_rate(b, "    per second that a core works, both ends", "MB/s", sent, &cpu[0],
             "TCP, encrypted, decrypted", sent, &floor);
    return 0;
}

static int time_small(struct bench *b, struct link *l, struct sending *tls, struct err *err) {
    struct series s[2];
    struct msg_heartbeat beat = {.progress = 123456, .loss = 2.5, .tokens_per_s = 1e4}, last = beat;
    struct proto_buffer bytes;
    last.step = 1;
    proto_buffer_init(&bytes, 1024);
    if (proto_encode(&bytes, RECORD_heartbeat, &beat, err)) return -1;
    l->near.type = MSG_HEARTBEAT;
    l->near.message = &beat;
    l->near.last = &last;
    l->near.messages = 30000;
    tls->piece = PROTO_FRAME_HEADER_BYTES + bytes.length;
    tls->pieces = l->near.messages;
    proto_buffer_release(&bytes);
    if (time_in_turns((struct task[]){{run_channel, &l->near, NULL}, {run_wire, tls, NULL}}, s, 2,
                      1.5, err))
        return -1;
    double messages = (double)l->near.messages;
    row_rate(b, "channel: HEARTBEATs one way, two threads", "msg/s", messages, &s[0],
             "OpenSSL alone, one write each", messages, &s[1]);
    return 0;
}

int bench_channel(struct bench *b, int unused, struct err *err) {
    struct link l;
    uint8_t *data = take_memory(CHUNKS * outer_encoded_bytes(OUTER_INT8, CHUNK));
    struct sending tcp = {.data = data}, tls = {.data = data};
    (void)unused;
    if (link_open(&l, err)) return -1;
    SSL_CTX *ssl = tls_context_create(&l.near.identity, err);
    if (!ssl || wire_open(&tcp, NULL, err) || wire_open(&tls, ssl, err)) return -1;
    if (time_chunks(b, &l, &tcp, &tls, err) || time_small(b, &l, &tls, err)) return -1;
    wire_close(&tcp);
    wire_close(&tls);
    link_close(&l);
    SSL_CTX_free(ssl);
    free(data);
    return 0;
}
