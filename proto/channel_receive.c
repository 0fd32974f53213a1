/* channel_receive.c - messages in. What a peer can make us hold is bounded: a frame's length is
 * checked against the channel's limit before memory is taken for it, and no more is read from the
 * socket than the frame in work needs and one read of the kernel's. What it can make us do in one
 * turn of the event loop is bounded too, and so is the time a frame may take once it has begun. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "proto/channel.h"

#define TURN_MESSAGES 64 /* then other channels have their turn */
#define TURN_BYTES (1u << 20)

#define MEMBER_OF_MESSAGE(NAME, record, number) struct msg_##record record;
union any_message {
    PROTO_MESSAGES(MEMBER_OF_MESSAGE)
};

void channel_receive_release(struct channel *ch) { channel_block_give(ch->ctx, ch->payload); }

/* ---- how long a frame may take ------------------------------------------------------------------- */

static void untime(struct channel *ch) {
    if (ch->timed != UNTIMED) evtimer_del(ch->deadline);
    ch->timed = UNTIMED;
}

/* A stranger has one deadline for everything; a member one for each frame that does not come at once,
 * so that a byte a second is not a way to stay. */
static void time_frame(struct channel *ch) {
    if (ch->frame_bytes_max <= PROTO_STRANGER_BYTES_MAX) return;
    if (ch->have == 0 && !ch->payload) {
        untime(ch);
    } else if (ch->payload && ch->timed != TIMED_PAYLOAD) {
        uint64_t ms = (uint64_t)ch->frame.length * 1000 / ch->ctx->frame_bytes_per_s;
        channel_arm(ch->deadline, ch->ctx->frame_ms + (int)ms);
        ch->timed = TIMED_PAYLOAD;
    } else if (!ch->payload && ch->timed == UNTIMED) {
        channel_arm(ch->deadline, ch->ctx->frame_ms);
        ch->timed = TIMED_HEADER;
    }
}

/* ---- frames -------------------------------------------------------------------------------------- */

static int end_with(struct channel *ch, const struct err *why) {
    channel_end(ch, why);
    return -1;
}

static int take_header(struct channel *ch) {
    struct err err;
    ch->have = 0;
    if (frame_read(ch->header, ch->frame_bytes_max, &ch->frame, &err)) {
        err_prefix(&err, "protocol");
        return end_with(ch, &err);
    }
    if ((ch->payload = channel_block_take(ch->ctx, ch->frame.length))) return 0;
    err_set(&err, ERR_MEMORY, "no memory for a frame of %u bytes", ch->frame.length);
    return end_with(ch, &err);
}

/* Hand over one message: 1, or -1 when the channel ended. */
static int take_message(struct channel *ch) {
    union any_message msg;
    struct err err;
    struct block *b = ch->payload;
    enum proto_record which = (enum proto_record)proto_record_of_type(ch->frame.type);
    if (proto_decode(b->bytes, b->length, which, &msg, &err)) {
        if (err.code == ERR_PROTOCOL) err_prefix(&err, "protocol");
        return end_with(ch, &err);
    }
    ch->payload = NULL;
    untime(ch);
    ch->ops.on_message(ch->arg, ch, &ch->frame, &msg);
    proto_decoded_release(which, &msg);
    channel_block_give(ch->ctx, b);
    return ch->state == OPEN ? 1 : -1;
}

/* The peer sends no more, and every whole message has been handed over. */
static void end_of_input(struct channel *ch, enum stream_status status) {
    struct err why;
    if (status == STREAM_ENDED) err_set(&why, ERR_IO, "closed by peer");
    else stream_explain(&ch->stream, false, NULL, &why);
    if (ch->payload)
        err_set(&why, ERR_TRUNCATED, "closed in the middle of a %s frame: %zu of %u bytes came",
                proto_type_name(ch->frame.type), ch->payload->at, ch->frame.length);
    else if (ch->have)
        err_set(&why, ERR_TRUNCATED,
                "closed in the middle of a frame header: %zu of %u bytes came", ch->have,
                PROTO_FRAME_HEADER_BYTES);
    ch->deaf = true; /* so nobody would hear a good-bye */
    channel_end(ch, &why);
}

/* Nothing to read now. Whoever cannot write either has nothing to wait for. */
static void input_waits(struct channel *ch) {
    struct err why;
    if (ch->deaf) {
        stream_explain(&ch->stream, false, NULL, &why);
        channel_end(ch, &why);
    } else {
        time_frame(ch);
    }
}

/* Read on into the header or the payload. *whole: all of it has come. */
static enum stream_status read_some(struct channel *ch, size_t *got, bool *whole) {
    struct block *b = ch->payload;
    uint8_t *into = b ? b->bytes : ch->header;
    size_t *have = b ? &b->at : &ch->have, want = b ? b->length : sizeof ch->header;
    enum stream_status status = stream_read(&ch->stream, into + *have, want - *have, got);
    if (status != STREAM_DONE) return status;
    *have += *got;
    *whole = *have == want;
    ch->received += *got;
    return STREAM_DONE;
}

void channel_receive(struct channel *ch) {
    size_t bytes = 0, got;
    int messages = 0;
    bool whole;
    while (ch->state == OPEN && !ch->broken && !ch->held) {
        if (messages == TURN_MESSAGES || bytes >= TURN_BYTES) {
            channel_go_on(ch);
            return;
        }
        enum stream_status status = read_some(ch, &got, &whole);
        if (status == STREAM_WAITS) {
            input_waits(ch);
            return;
        }
        if (status != STREAM_DONE) {
            end_of_input(ch, status);
            return;
        }
        bytes += got;
        if (!whole) continue;
        int taken = ch->payload ? take_message(ch) : take_header(ch);
        if (taken < 0) return;
        messages += taken;
    }
}

/* ---- for the owner --------------------------------------------------------------------------------- */

void channel_hold(struct channel *ch, bool held) {
    if (ch->state != OPEN || ch->held == held) return;
    ch->held = held;
    if (held) {
        event_del(ch->readable);
        untime(ch); /* the peer is not to blame for our pause */
    } else {
        event_add(ch->readable, NULL);
        channel_go_on(ch);
    }
}

void channel_set_frame_bytes_max(struct channel *ch, uint32_t bytes) {
    bool known = ch->frame_bytes_max > PROTO_STRANGER_BYTES_MAX;
    ch->frame_bytes_max = bytes;
    if (ch->state == OPEN && !known && bytes > PROTO_STRANGER_BYTES_MAX) evtimer_del(ch->deadline);
}

uint64_t channel_received_bytes(const struct channel *ch) { return ch->received; }
