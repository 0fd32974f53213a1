/* channel_send.c - messages out. They wait as plaintext in three queues, by urgency, and are
 * encrypted only when the kernel has room: so a heartbeat waits for one frame at most, never for
 * megabytes. Within a queue order is kept; no message overtakes one that is as urgent or more.
 *
 * The payload of a large frame is encrypted straight from the sender's memory as far as the kernel
 * takes it at once; only what it does not take is copied. */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "proto/channel.h"

#define DIRECT_BYTES_MIN STREAM_RECORD_BYTES /* smaller frames share records with others */
#define TURN_BYTES (1u << 20)                /* then other channels have their turn */
#define HEAD_BYTES_KEPT (256u << 10)         /* of the context's buffer */

/* ---- queues ------------------------------------------------------------------------------------ */

void channel_send_init(struct channel *ch) {
    for (int i = 0; i < PROTO_URGENCIES; i++) ch->out[i].end = &ch->out[i].first;
}

static struct block *pop(struct queue *q) {
    struct block *b = q->first;
    q->first = b->next;
    if (!q->first) q->end = &q->first;
    return b;
}

void channel_send_release(struct channel *ch) {
    channel_block_give(ch->ctx, ch->current);
    ch->current = NULL;
    for (int i = 0; i < PROTO_URGENCIES; i++)
        while (ch->out[i].first) channel_block_give(ch->ctx, pop(&ch->out[i]));
    ch->queued = 0;
}

/* Two pieces as one; NULL without memory. */
static struct block *wrap(struct channel *ch, const void *a, size_t a_length, const void *b,
                          size_t b_length) {
    struct block *both = channel_block_take(ch->ctx, a_length + b_length);
    if (!both) return NULL;
    if (a_length) memcpy(both->bytes, a, a_length);
    if (b_length) memcpy(both->bytes + a_length, b, b_length);
    return both;
}

/* The frame that is being sent, or else the next most urgent one. */
static struct block *next(struct channel *ch) {
    for (int i = 0; !ch->current && i < PROTO_URGENCIES; i++)
        if (ch->out[i].first) ch->current = pop(&ch->out[i]);
    return ch->current;
}

static void advance(struct channel *ch, size_t bytes) {
    struct block *b = ch->current;
    b->at += bytes;
    ch->queued -= bytes;
    if (b->at < b->length) return;
    channel_block_give(ch->ctx, b);
    ch->current = NULL;
}

/* ---- records ----------------------------------------------------------------------------------- */

/* Nobody takes what we write. What the peer said before it went is still to be read, so the channel
 * ends when reading does. */
static void write_failed(struct channel *ch) {
    ch->deaf = true;
    channel_send_release(ch);
    event_del(ch->writable);
    channel_go_on(ch);
}

static int push(struct channel *ch) {
    if (stream_push(&ch->stream) == 0) return 0;
    write_failed(ch);
    return -1;
}

static bool make_room(struct channel *ch) {
    return stream_has_room(&ch->stream) || (!push(ch) && stream_has_room(&ch->stream));
}

/* One record: a piece of a large frame from where it lies, or small ones side by side. */
static size_t put_record(struct channel *ch) {
    size_t n = 0;
    for (struct block *b; n < STREAM_RECORD_BYTES && (b = next(ch));) {
        size_t left = b->length - b->at, room = STREAM_RECORD_BYTES - n;
        if (n == 0 && left >= room) {
            stream_put(&ch->stream, b->bytes + b->at, room);
            advance(ch, room);
            return room;
        }
        size_t piece = left < room ? left : room;
        memcpy(ch->ctx->record + n, b->bytes + b->at, piece);
        n += piece;
        advance(ch, piece);
    }
    if (n) stream_put(&ch->stream, ch->ctx->record, n);
    return n;
}

void channel_send_queued(struct channel *ch) {
    size_t sent = 0;
    while (!ch->deaf && ch->queued && sent < TURN_BYTES && make_room(ch)) sent += put_record(ch);
    if (ch->deaf || push(ch)) return;
    if (stream_unsent(&ch->stream))
        event_add(ch->writable, NULL);
    else if (ch->queued)
        channel_go_on(ch);
}

/* As much of head and tail as the kernel takes now, when nothing else waits. */
static size_t put_direct(struct channel *ch, const struct proto_buffer *head,
                         struct proto_bytes tail) {
    size_t first = STREAM_RECORD_BYTES - head->length, at = first;
    if (!make_room(ch)) return 0;
    memcpy(ch->ctx->record, head->data, head->length);
    memcpy(ch->ctx->record + head->length, tail.data, first);
    stream_put(&ch->stream, ch->ctx->record, STREAM_RECORD_BYTES);
    while (at < tail.length && make_room(ch)) {
        size_t n = tail.length - at < STREAM_RECORD_BYTES ? tail.length - at : STREAM_RECORD_BYTES;
        stream_put(&ch->stream, tail.data + at, n);
        at += n;
    }
    push(ch);
    return head->length + at;
}

/* ---- messages ---------------------------------------------------------------------------------- */

/* Into the context's buffer, but for the contents of a last field of bytes. */
static int encode(struct channel *ch, struct frame *f, const void *msg, struct proto_bytes *tail,
                  struct err *err) {
    static const uint8_t later[PROTO_FRAME_HEADER_BYTES];
    struct proto_buffer *b = &ch->ctx->head;
    int which = proto_record_of_type(f->type);
    assert(which >= 0);
    b->length = 0;
    b->failed = false;
    proto_buffer_append(b, later, sizeof later);
    if (b->failed)
        return err_set(err, ERR_MEMORY, "no memory for a %s frame", proto_type_name(f->type));
    if (proto_encode_head(b, (enum proto_record)which, msg, tail, err)) return -1;
    f->length = (uint32_t)(b->length - sizeof later + tail->length);
    frame_write(f, b->data);
    return 0;
}

static int append(struct channel *ch, struct queue *q, struct block *b, struct err *err) {
    if (!b) {
        channel_end_later(ch, ERR_MEMORY, "no memory to send"); /* there is a gap now */
        return err_set(err, ERR_MEMORY, "no memory to send");
    }
    *q->end = b;
    q->end = &b->next;
    ch->queued += b->length;
    return 0;
}

/* Whatever the kernel does not take of a large frame follows as a frame that has begun. */
static int queue_large(struct channel *ch, struct queue *q, struct proto_bytes tail,
                       struct err *err) {
    const struct proto_buffer *head = &ch->ctx->head;
    size_t sent = 0;
    channel_send_queued(ch);
    if (!ch->queued && !ch->deaf && ch->state == OPEN) sent = put_direct(ch, head, tail);
    if (sent == head->length + tail.length) return 0;
    if (sent == 0)
        return append(ch, q, wrap(ch, head->data, head->length, tail.data, tail.length), err);
    size_t at = sent - head->length;
    struct queue begun = {.end = &ch->current};
    return append(ch, &begun, wrap(ch, tail.data + at, tail.length - at, NULL, 0), err);
}

static int queue_frame(struct channel *ch, uint8_t type, struct proto_bytes tail, struct err *err) {
    struct proto_buffer *head = &ch->ctx->head;
    struct queue *q = &ch->out[proto_urgency(type)];
    int result = tail.length + head->length >= DIRECT_BYTES_MIN && head->length < DIRECT_BYTES_MIN
                     ? queue_large(ch, q, tail, err)
                     : append(ch, q, wrap(ch, head->data, head->length, tail.data, tail.length), err);
    if (head->capacity > HEAD_BYTES_KEPT) {
        proto_buffer_release(head);
        proto_buffer_init(head, PROTO_FRAME_HEADER_BYTES + PROTO_FRAME_BYTES_MAX);
    }
    return result;
}

int channel_queue(struct channel *ch, uint8_t type, uint64_t term, uint64_t session, uint64_t plan,
                  const void *msg, struct err *err) {
    struct frame f = {.type = type, .term = term, .session = session, .plan = plan};
    struct proto_bytes tail;
    if (encode(ch, &f, msg, &tail, err)) return -1;
    size_t unsent = channel_unsent_bytes(ch) + PROTO_FRAME_HEADER_BYTES + f.length;
    if (unsent > PROTO_SEND_MAX) {
        channel_end_later(ch, ERR_FULL, "the peer reads too slowly");
        return err_set(err, ERR_FULL, "%zu bytes wait for a peer that reads too slowly, at most %u",
                       unsent, PROTO_SEND_MAX);
    }
    if (!ch->deaf && queue_frame(ch, type, tail, err)) return -1;
    ch->drain_due = true;
    channel_go_on(ch);
    return 0;
}

int channel_send(struct channel *ch, uint8_t type, uint64_t term, uint64_t session, uint64_t plan,
                 const void *msg, struct err *err) {
    if (ch->state != OPEN || ch->broken)
        return err_set(err, ERR_IO, "the connection is not open");
    return channel_queue(ch, type, term, session, plan, msg, err);
}

size_t channel_unsent_bytes(const struct channel *ch) {
    return ch->queued + stream_unsent(&ch->stream);
}
