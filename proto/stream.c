/* stream.c - TLS over one non-blocking socket; see stream.h.
 *
 * OpenSSL reads and writes through a BIO of ours. Its writing end only fills the stage, so that
 * SSL_write() never ends half way and a system call carries several records. */
#include "proto/stream.h"

#include <errno.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "proto/tls.h"

/* A peer that asks for new keys without end and reads nothing would let it grow. */
#define REST_BYTES_MAX (4 * STREAM_STAGE_BYTES)

/* ---- the BIO ----------------------------------------------------------------------------------- */

static int bio_write(BIO *bio, const char *bytes, int length) {
    struct stream *s = BIO_get_data(bio);
    BIO_clear_retry_flags(bio);
    if (length < 0 || (size_t)length > sizeof s->stage->bytes - s->stage->length) return -1;
    memcpy(s->stage->bytes + s->stage->length, bytes, (size_t)length);
    s->stage->length += (size_t)length;
    return length;
}

static int bio_read(BIO *bio, char *out, int room) {
    struct stream *s = BIO_get_data(bio);
    ssize_t n;
    BIO_clear_retry_flags(bio);
    do n = recv(s->fd, out, (size_t)room, 0);
    while (n < 0 && errno == EINTR);
    if (n == 0) s->eof = true;
    if (n < 0 && errno == EAGAIN) BIO_set_retry_read(bio);
    else if (n < 0) s->read_errno = errno;
    return (int)n;
}

static long bio_control(BIO *bio, int what, long number, void *pointer) {
    (void)number, (void)pointer;
    if (what == BIO_CTRL_EOF) return ((struct stream *)BIO_get_data(bio))->eof;
    return what == BIO_CTRL_FLUSH;
}

static BIO_METHOD *method;

static void make_method(void) {
    method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "intellect stream");
    if (method && BIO_meth_set_write(method, bio_write) && BIO_meth_set_read(method, bio_read) &&
        BIO_meth_set_ctrl(method, bio_control))
        return;
    BIO_meth_free(method);
    method = NULL;
}

static BIO *make_bio(struct stream *s) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_method);
    BIO *bio = method ? BIO_new(method) : NULL;
    if (!bio) return NULL;
    BIO_set_data(bio, s);
    BIO_set_init(bio, 1);
    return bio;
}

/* ---- birth and death ---------------------------------------------------------------------------- */

int stream_init(struct stream *s, SSL_CTX *ctx, struct stream_stage *stage, int fd, bool accepts,
                struct err *err) {
    *s = (struct stream){.fd = fd, .stage = stage, .ssl = SSL_new(ctx)};
    BIO *bio = s->ssl ? make_bio(s) : NULL;
    if (!bio) {
        stream_release(s);
        ERR_clear_error();
        return err_set(err, ERR_MEMORY, "no memory for a TLS connection");
    }
    SSL_set_bio(s->ssl, bio, bio);
    if (accepts) SSL_set_accept_state(s->ssl);
    else SSL_set_connect_state(s->ssl);
    return 0;
}

void stream_release(struct stream *s) {
    SSL_free(s->ssl);
    free(s->rest);
    *s = (struct stream){.fd = -1};
}

/* ---- out ----------------------------------------------------------------------------------------- */

size_t stream_unsent(const struct stream *s) { return s->rest_length - s->rest_sent; }

/* How much of it the kernel took; SIZE_MAX: it takes nothing any more. */
static size_t hand_over(struct stream *s, const uint8_t *bytes, size_t length) {
    size_t sent = 0;
    while (sent < length) {
        ssize_t n = send(s->fd, bytes + sent, length - sent, MSG_NOSIGNAL);
        if (n >= 0) {
            sent += (size_t)n;
        } else if (errno == EAGAIN) {
            break;
        } else if (errno != EINTR) {
            s->write_errno = errno;
            return SIZE_MAX;
        }
    }
    return sent;
}

static int push_rest(struct stream *s) {
    size_t sent = hand_over(s, s->rest + s->rest_sent, stream_unsent(s));
    if (sent == SIZE_MAX) return -1;
    s->rest_sent += sent;
    if (stream_unsent(s)) return 0;
    free(s->rest);
    s->rest = NULL;
    s->rest_length = s->rest_sent = 0;
    return 0;
}

/* What the kernel has no room for goes behind what already waits. */
static int keep(struct stream *s, const uint8_t *bytes, size_t length) {
    size_t waits = stream_unsent(s);
    uint8_t *rest = waits + length > REST_BYTES_MAX ? NULL : malloc(waits + length);
    if (!rest) {
        s->write_errno = ENOBUFS;
        return -1;
    }
    if (s->rest) memcpy(rest, s->rest + s->rest_sent, waits);
    memcpy(rest + waits, bytes, length);
    free(s->rest);
    s->rest = rest;
    s->rest_length = waits + length;
    s->rest_sent = 0;
    return 0;
}

int stream_push(struct stream *s) {
    size_t length = s->stage->length, sent = 0;
    s->stage->length = 0;
    if (s->write_errno) return -1;
    if (s->rest && push_rest(s)) return -1;
    if (length && !s->rest && (sent = hand_over(s, s->stage->bytes, length)) == SIZE_MAX) return -1;
    return sent < length ? keep(s, s->stage->bytes + sent, length - sent) : 0;
}

bool stream_has_room(const struct stream *s) {
    return !s->rest && s->stage->length + STREAM_RECORD_BYTES + 256 <= STREAM_STAGE_BYTES;
}

void stream_put(struct stream *s, const void *bytes, size_t length) {
    size_t put;
    ERR_clear_error();
    if (SSL_write_ex(s->ssl, bytes, length, &put) != 1) s->write_errno = EPROTO;
}

void stream_end(struct stream *s) {
    ERR_clear_error();
    SSL_shutdown(s->ssl);
    stream_push(s);
}

/* ---- in ------------------------------------------------------------------------------------------ */

/* Whatever OpenSSL was asked for, it may have had something to say: a part of the handshake, new
 * keys, an alert. */
static enum stream_status status_of(struct stream *s, int result) {
    int reason = result == 1 ? SSL_ERROR_NONE : SSL_get_error(s->ssl, result);
    if (s->stage->length) stream_push(s);
    if (reason == SSL_ERROR_NONE) return STREAM_DONE;
    if (reason == SSL_ERROR_WANT_READ) return STREAM_WAITS;
    return reason == SSL_ERROR_ZERO_RETURN ? STREAM_ENDED : STREAM_BROKEN;
}

enum stream_status stream_shake(struct stream *s) {
    ERR_clear_error();
    return status_of(s, SSL_do_handshake(s->ssl));
}

enum stream_status stream_read(struct stream *s, void *out, size_t room, size_t *got) {
    ERR_clear_error();
    return status_of(s, SSL_read_ex(s->ssl, out, room, got));
}

void stream_explain(const struct stream *s, bool shaking, bool *is_http, struct err *err) {
    /* OpenSSL's first error is the cause, later ones say where it was noticed. */
    unsigned long code = ERR_peek_error();
    if (is_http) *is_http = tls_code_is_http(code);
    tls_explain(code, s->read_errno ? s->read_errno : s->write_errno, shaking, err);
    ERR_clear_error();
}
