/* channel.h - what the files of the channel share; internal to proto/. What a channel is for those
 * who use it stands in proto.h.
 *
 *   channel.c          contexts, birth and death, the event loop's callbacks
 *   channel_dial.c     from a name to a connected socket
 *   channel_send.c     messages out: three queues, encryption
 *   channel_receive.c  messages in: frames, decoding, how fast they must come
 *   stream.c           TLS over a socket
 *
 * Life: DIALLING -> SHAKING -> OPEN -> (LINGERING ->) DEAD. Callbacks may close the channel, so it
 * is freed only when none of its own functions is on the stack (`depth`). */
#ifndef INTELLECT_CHANNEL_H
#define INTELLECT_CHANNEL_H

#include <event2/event.h>
#include <netdb.h>
#include <sys/socket.h>

#include "proto/stream.h"

enum channel_state { DIALLING, SHAKING, OPEN, LINGERING, DEAD };

/* Memory of a frame on its way in, or of one (or its end) that waits to be encrypted. */
struct block {
    struct block *next;
    size_t capacity, length, at; /* at: how much has come, or has been encrypted */
    uint8_t bytes[];
};
#define BLOCK_BYTES_KEPT_MIN (16u << 10) /* smaller ones come from malloc() and go back there */
#define SPARE_BYTES_MAX (12u << 20)

struct channel_context {
    SSL_CTX *ssl;
    int handshake_ms, stranger_ms, frame_ms;
    uint32_t frame_bytes_per_s;
    /* Used by one channel at a time, which is why channels of one context share a thread. */
    struct stream_stage stage;
    uint8_t record[STREAM_RECORD_BYTES]; /* small frames, to be encrypted together */
    struct proto_buffer head;            /* a message that is being encoded */
    struct block *spare; /* large frames follow each other, and fresh memory costs page faults */
    size_t spare_bytes;
};

struct queue {
    struct block *first, **end;
};

struct channel {
    struct event_base *base;
    struct channel_context *ctx;
    struct channel_ops ops;
    void *arg;
    enum channel_state state;
    int depth;
    struct event *deadline; /* of the present state; once a peer is known, of a frame */
    struct event *again;    /* goes on in the next turn of the loop */
    bool broken;            /* end with `why` in the next turn, whatever still waits */
    struct err why;

    struct addrinfo *addresses, *address_next; /* while DIALLING */
    uint32_t addresses_tried;

    int fd; /* -1: none */
    struct event *readable, *writable;
    struct stream stream;
    struct sockaddr_storage peer;
    struct proto_key key;

    /* in */
    uint8_t header[PROTO_FRAME_HEADER_BYTES];
    struct frame frame;
    size_t have;           /* of the header */
    struct block *payload; /* NULL: no header yet */
    uint32_t frame_bytes_max;
    uint64_t received;
    bool held;
    enum { UNTIMED, TIMED_HEADER, TIMED_PAYLOAD } timed; /* what `deadline` waits for */

    /* out */
    struct queue out[PROTO_URGENCIES];
    struct block *current; /* begun, so it goes first */
    size_t queued;
    bool drain_due; /* something was sent since the last on_drained */
    bool deaf;      /* nobody takes what we write any more; what came before is still read */
};

/* ---- channel.c --------------------------------------------------------------------------------- */

void channel_enter(struct channel *ch);
void channel_leave(struct channel *ch);
void channel_arm(struct event *timer, int ms);
/* In the next turn of the loop go on with sending and receiving. */
void channel_go_on(struct channel *ch);
/* The one way in which a channel ends by itself: tell the peer what it did wrong, tell the owner.
 * Between channel_enter() and channel_leave(). */
void channel_end(struct channel *ch, const struct err *why);
/* From a function that the owner called and that must not call back. */
void channel_end_later(struct channel *ch, enum err_code code, const char *text);
/* Takes over `fd`, also when it fails. */
int channel_start_tls(struct channel *ch, int fd, bool accepts, struct err *err);

/* An empty block for `length` bytes; NULL without memory. */
struct block *channel_block_take(struct channel_context *ctx, size_t length);
void channel_block_give(struct channel_context *ctx, struct block *b); /* NULL is fine */

/* ---- channel_dial.c ---------------------------------------------------------------------------- */

/* Blocks while a name is looked up; an address is not. */
int channel_dial_lookup(struct channel *ch, const char *host, uint16_t port, struct err *err);
/* Begin with the next address, or end. */
void channel_dial_next(struct channel *ch);
/* The present address does not answer. */
void channel_dial_deadline(struct channel *ch);
void channel_dial_release(struct channel *ch);

/* ---- channel_send.c ---------------------------------------------------------------------------- */

void channel_send_init(struct channel *ch);
void channel_send_release(struct channel *ch);
/* Send what waits, within the bounds of one turn. Calls nobody back. */
void channel_send_queued(struct channel *ch);
/* Queue whatever the state is. */
int channel_queue(struct channel *ch, uint8_t type, uint64_t term, uint64_t session, uint64_t plan,
                  const void *msg, struct err *err);

/* ---- channel_receive.c ------------------------------------------------------------------------- */

/* Read and hand over what has come, within the bounds of one turn. */
void channel_receive(struct channel *ch);
void channel_receive_release(struct channel *ch);

#endif
