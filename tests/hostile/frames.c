/* frames.c - broken frames, after a TLS handshake that was in order. On a coordinator's port a
 * stranger gets as far as this; on a node's only a member does. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/hostile/hostile.h"

enum { MAGIC, VERSION, TYPE, RESERVED, OVERSIZED, EMPTY, TRUNCATED, NOT_MSGPACK, TRAILING, WRONG_FIELDS, NOT_FINITE };

/* A frame that is right but for one thing. HEARTBEAT is a message everywhere. */
static size_t make_frame(uint8_t *out, int kind) {
    struct msg_heartbeat beat = {.loss = 2.5};
    struct proto_buffer b;
    struct err err;
    proto_buffer_init(&b, PROTO_STRANGER_BYTES_MAX);
    if (proto_encode(&b, RECORD_heartbeat, &beat, &err)) abort();
    struct frame f = {.type = MSG_HEARTBEAT, .length = (uint32_t)b.length};
    uint8_t *payload = out + PROTO_FRAME_HEADER_BYTES;
    memcpy(payload, b.data, b.length);
    if (kind == OVERSIZED) f.length = PROTO_FRAME_BYTES_MAX + 1;
    if (kind == EMPTY) f.length = 0;
    if (kind == NOT_MSGPACK) memset(payload, 0xc1, b.length); /* a byte that msgpack never uses */
    if (kind == WRONG_FIELDS) payload[0] = 0x93;              /* an array of three */
    if (kind == TRAILING) payload[f.length++] = 0;
    for (uint32_t i = 0; kind == NOT_FINITE && i < b.length; i++)
        if (payload[i] == 0xcb) { /* a double follows: the loss */
            memset(payload + i + 1, 0xff, 8);
            break;
        }
    frame_write(&f, out);
    if (kind == MAGIC) memset(out, 0x47, 4);
    if (kind == VERSION) out[4] = 9;
    if (kind == TYPE) out[5] = 200;
    if (kind == RESERVED) out[7] = 1;
    size_t length = PROTO_FRAME_HEADER_BYTES + f.length;
    proto_buffer_release(&b);
    if (kind == OVERSIZED || kind == EMPTY) return PROTO_FRAME_HEADER_BYTES;
    return kind == TRUNCATED ? length - 5 : length;
}

static int broken(const struct target *t, const struct attack *a) {
    uint8_t bytes[PROTO_FRAME_HEADER_BYTES + 256];
    struct link l;
    struct err err;
    if (link_dial(&l, t, &err)) return verdict(a, false, "%s", err.msg);
    link_receive(&l, 300); /* a WELCOME, on a coordinator's port */
    link_write(&l, bytes, make_frame(bytes, a->kind));
    if (a->kind == TRUNCATED) { /* and gone */
        link_close(&l);
        return verdict(a, true, "went away in the middle");
    }
    bool ok = link_hear_out(&l) && !strncmp(l.heard, "BYE", 3);
    verdict(a, ok, "%s", l.heard);
    link_close(&l);
    return !ok;
}

const struct attack frame_attacks[] = {
    {"frame-magic", broken, MAGIC},
    {"frame-version", broken, VERSION},
    {"frame-type", broken, TYPE},
    {"frame-reserved", broken, RESERVED},
    {"frame-oversized", broken, OVERSIZED},
    {"frame-empty", broken, EMPTY},
    {"frame-truncated", broken, TRUNCATED},
    {"frame-not-msgpack", broken, NOT_MSGPACK},
    {"frame-trailing", broken, TRAILING},
    {"frame-fields", broken, WRONG_FIELDS},
    {"frame-not-finite", broken, NOT_FINITE},
    {NULL, NULL, 0},
};
