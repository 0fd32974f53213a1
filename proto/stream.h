/* stream.h - TLS over one non-blocking socket; internal to proto/. It never waits and never calls
 * back: whoever owns an event loop asks it to go on when the socket is ready.
 *
 * What is written is encrypted into a stage, which all streams of one thread share: it stays in the
 * processor's cache and costs an idle connection nothing. From there the kernel takes what it has
 * room for; the rest, at most a stage, is kept by the stream. So no more is encrypted than can
 * leave, and whatever is more urgent can still be put in front of what is not. */
#ifndef INTELLECT_STREAM_H
#define INTELLECT_STREAM_H

#include <openssl/ssl.h>

#include "proto/proto.h"

#define STREAM_RECORD_BYTES 16384u /* of plaintext, RFC 8446 section 5.1 */
/* A few records per system call: one costs 20 % of the rate, more than this falls out of the cache. */
#define STREAM_STAGE_BYTES (4 * (STREAM_RECORD_BYTES + 256))
#define STREAM_READ_BYTES (4 * (STREAM_RECORD_BYTES + 256)) /* asked of the kernel at once */

struct stream_stage {
    size_t length;
    uint8_t bytes[STREAM_STAGE_BYTES + 4096]; /* room for an alert or a handshake's answer too */
};

struct stream {
    SSL *ssl;
    int fd;
    struct stream_stage *stage;
    uint8_t *rest; /* encrypted, and the kernel has no room for it yet */
    size_t rest_length, rest_sent;
    int read_errno, write_errno;
    bool eof;
};

enum stream_status {
    STREAM_DONE,
    STREAM_WAITS, /* for the socket to be readable */
    STREAM_ENDED, /* the peer said that no more comes */
    STREAM_BROKEN
};

/* fd stays the caller's and is closed by it, after stream_release(). ctx: from tls_context_create().
 * stage: borrowed for the stream's life. */
int stream_init(struct stream *s, SSL_CTX *ctx, struct stream_stage *stage, int fd, bool accepts,
                struct err *err);
/* Takes a zeroed stream too. */
void stream_release(struct stream *s);

enum stream_status stream_shake(struct stream *s);
/* Bytes into `out`, at most one record: *got is not 0 when STREAM_DONE. */
enum stream_status stream_read(struct stream *s, void *out, size_t room, size_t *got);
/* Is there room for one more record? If not, stream_push() makes some, or else one has to wait for
 * the socket to be writable. */
bool stream_has_room(const struct stream *s);
/* Encrypt 1 to STREAM_RECORD_BYTES bytes as one record, where stream_has_room(). After a row of puts
 * comes a push, before anything else is done with any stream of the thread. */
void stream_put(struct stream *s, const void *bytes, size_t length);
/* Hand over to the kernel. -1: the connection is broken for writing; stream_explain() says why. */
int stream_push(struct stream *s);
/* Encrypted bytes that the kernel has not taken. */
size_t stream_unsent(const struct stream *s);
/* Say that no more comes. */
void stream_end(struct stream *s);

/* Why the last call was STREAM_BROKEN or stream_push() failed. Call it before anything else is done
 * with OpenSSL. *is_http, which may be NULL: the peer speaks plain HTTP. */
void stream_explain(const struct stream *s, bool shaking, bool *is_http, struct err *err);

#endif
