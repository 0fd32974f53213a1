/* frames.h - a stream of frames as proto.h words it, read from memory: what fuzz_frames.c
 * fuzzes, and what fuzz_channel.c compares a channel with. */
#ifndef INTELLECT_TESTS_FUZZ_FRAMES_H
#define INTELLECT_TESTS_FUZZ_FRAMES_H

#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/records.h"

enum frames_end {
    FRAMES_MORE,  /* one message was read; release it */
    FRAMES_END,   /* the stream ends after a whole message */
    FRAMES_CUT,   /* or in the middle of one */
    FRAMES_WRONG  /* err says why */
};
enum frames_end frames_next(struct fuzz_input *in, uint32_t limit, struct frame *frame,
                            union any_record *msg, struct err *err);

/* Append a frame of a message type with a sample as its payload (see record_make). */
void frames_append(struct proto_buffer *out, uint8_t type, uint64_t seed);

#endif
