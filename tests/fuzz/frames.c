/* frames.c - a stream of frames, read and written in memory. */
#include "tests/fuzz/frames.h"

enum frames_end frames_next(struct fuzz_input *in, uint32_t limit, struct frame *frame,
                            union any_record *msg, struct err *err) {
    if (!in->left) return FRAMES_END;
    if (in->left < PROTO_FRAME_HEADER_BYTES) return FRAMES_CUT;
    if (frame_read(in->at, limit, frame, err)) return FRAMES_WRONG;
    uint32_t length = frame->length;
    if (in->left - PROTO_FRAME_HEADER_BYTES < length) return FRAMES_CUT;
    enum proto_record which = (enum proto_record)proto_record_of_type(frame->type);
    if (proto_decode(in->at + PROTO_FRAME_HEADER_BYTES, length, which, msg, err))
        return FRAMES_WRONG;
    in->at += PROTO_FRAME_HEADER_BYTES + length;
    in->left -= PROTO_FRAME_HEADER_BYTES + length;
    return FRAMES_MORE;
}

void frames_append(struct proto_buffer *out, uint8_t type, uint64_t seed) {
    struct proto_buffer payload =
        record_sample((enum proto_record)proto_record_of_type(type), seed);
    struct frame f = {.type = type, .length = (uint32_t)payload.length, .term = 3, .session = 4};
    uint8_t header[PROTO_FRAME_HEADER_BYTES];
    frame_write(&f, header);
    proto_buffer_append(out, header, sizeof header);
    proto_buffer_append(out, payload.data, payload.length);
    assert(!out->failed);
    proto_buffer_release(&payload);
}
