/* records.h - valid records of every kind, made from the field lists of proto/messages.h, so that a
 * new field or record needs no work here. */
#ifndef INTELLECT_TESTS_FUZZ_RECORDS_H
#define INTELLECT_TESTS_FUZZ_RECORDS_H

#include "proto/proto.h"

/* Room for any decoded record. */
union any_record {
    uint8_t bytes[1024];
    uint64_t align;
};

/* Fill *out with record `which`. seed 0: every number 0, every string and list empty; another seed:
 * values of all widths within the limits, two or three records in each list. Release with
 * proto_decoded_release(). */
void record_make(enum proto_record which, uint64_t seed, void *out);

/* The same, encoded. */
struct proto_buffer record_sample(enum proto_record which, uint64_t seed);

/* Encode what must be encodable. */
struct proto_buffer record_encoded(enum proto_record which, const void *record);

static inline struct proto_bytes buffer_bytes(const struct proto_buffer *b) {
    return (struct proto_bytes){b->data, (uint32_t)b->length};
}

#endif
