/* fuzz_frames.c - a stream of frames, headers and payloads, from a peer. The first byte picks the
 * limit that the receiver has set. */
#include "tests/fuzz/frames.h"

static const uint32_t limits[] = {PROTO_STRANGER_BYTES_MAX, PROTO_CONTROL_BYTES_MAX,
                                  PROTO_FRAME_BYTES_MAX, 64};

static void init(void) {
    struct err err;
    int failed = proto_init(&err);
    assert(!failed);
}

static bool take(const uint8_t *bytes, size_t length) {
    struct fuzz_input in = {bytes, length};
    uint32_t limit = limits[fuzz_u8(&in) % (sizeof limits / sizeof *limits)];
    for (;;) {
        uint8_t header[PROTO_FRAME_HEADER_BYTES];
        const uint8_t *start = in.at;
        struct frame frame;
        union any_record msg;
        struct err err = {0};
        enum frames_end end = frames_next(&in, limit, &frame, &msg, &err);
        if (end != FRAMES_MORE) return end == FRAMES_END;
        assert(frame.length > 0 && frame.length <= limit);
        frame_write(&frame, header);
        assert(!memcmp(header, start, sizeof header));
        proto_decoded_release((enum proto_record)proto_record_of_type(frame.type), &msg);
    }
}

static void samples(const struct fuzz_sink *out) {
    uint8_t first = 2;
    for (unsigned type = 0; type < 256; type++) {
        struct proto_buffer b;
        if (proto_record_of_type((uint8_t)type) < 0) continue;
        proto_buffer_init(&b, 1u << 16);
        proto_buffer_append(&b, &first, 1);
        frames_append(&b, (uint8_t)type, 1);
        frames_append(&b, MSG_LEAVE, 0);
        out->sample(out->arg, proto_type_name((uint8_t)type), b.data, b.length);
        proto_buffer_release(&b);
    }
    static const char *const words[] = {"ITL1", "ITL2", "GET ", "HTTP", "\x16\x03\x01"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) out->word(out->arg, words[i]);
}

const struct fuzz_target fuzz_frames = {"frames", init, take, samples};
