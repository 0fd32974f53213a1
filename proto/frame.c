/* frame.c - the 36 bytes in front of every message. */
#include <string.h>

#include "proto/proto.h"

static const uint8_t magic[4] = {'I', 'T', 'L', '1'};

static void put_le(uint8_t *out, uint64_t value, int bytes) {
    for (int i = 0; i < bytes; i++) out[i] = (uint8_t)(value >> (8 * i));
}

static uint64_t get_le(const uint8_t *in, int bytes) {
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++) value |= (uint64_t)in[i] << (8 * i);
    return value;
}

void frame_write(const struct frame *f, uint8_t out[PROTO_FRAME_HEADER_BYTES]) {
    memcpy(out, magic, sizeof magic);
    out[4] = PROTO_VERSION;
    out[5] = f->type;
    put_le(out + 6, 0, 2);
    put_le(out + 8, f->length, 4);
    put_le(out + 12, f->term, 8);
    put_le(out + 20, f->session, 8);
    put_le(out + 28, f->plan, 8);
}

/* What the first bytes look like, for whoever pointed the wrong program at the port. */
static const char *guess(const uint8_t *in) {
    static const char *const http[] = {"GET ", "POST", "HEAD", "PUT ",
                                       "HTTP", "OPTI", "DELE", "CONN"};
    for (size_t i = 0; i < sizeof http / sizeof *http; i++)
        if (memcmp(in, http[i], 4) == 0) return "this looks like HTTP";
    if (in[0] == 0x16 && in[1] == 3) return "this looks like TLS inside TLS";
    if (memcmp(in, "ITL", 3) == 0) return "another generation of the protocol";
    return "this is not the intellect protocol";
}

int frame_read(const uint8_t in[PROTO_FRAME_HEADER_BYTES], uint32_t length_max, struct frame *out,
               struct err *err) {
    struct frame f = {
        .type = in[5],
        .length = (uint32_t)get_le(in + 8, 4),
        .term = get_le(in + 12, 8),
        .session = get_le(in + 20, 8),
        .plan = get_le(in + 28, 8),
    };
    if (memcmp(in, magic, sizeof magic) != 0)
        return err_set(err, ERR_PROTOCOL, "frame starts with %02x %02x %02x %02x: %s", in[0], in[1],
                       in[2], in[3], guess(in));
    if (in[4] != PROTO_VERSION)
        return err_set(err, ERR_PROTOCOL, "frame of protocol version %u, this program speaks %u",
                       in[4], PROTO_VERSION);
    if (proto_record_of_type(f.type) < 0)
        return err_set(err, ERR_PROTOCOL, "frame of unknown type %u", f.type);
    if (in[6] || in[7])
        return err_set(err, ERR_PROTOCOL, "%s frame: reserved bytes are not zero",
                       proto_type_name(f.type));
    if (f.length == 0 || f.length > length_max)
        return err_set(err, ERR_PROTOCOL, "%s frame of %u bytes, allowed are 1 to %u",
                       proto_type_name(f.type), f.length, length_max);
    *out = f;
    return 0;
}
