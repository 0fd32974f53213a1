/* schema.h - messages.h as tables, for the encoder and the decoder; internal to proto/. */
#ifndef INTELLECT_SCHEMA_H
#define INTELLECT_SCHEMA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/proto.h"

enum field_kind {
    KIND_U8,
    KIND_U32,
    KIND_U64,
    KIND_I32,
    KIND_F32,
    KIND_F64,
    KIND_DIGEST,
    KIND_KEY,
    KIND_SIG,
    KIND_BYTES,
    KIND_STR,
    KIND_LIST
};

struct field {
    const char *name;
    enum field_kind kind;
    size_t offset;            /* in the C struct */
    uint64_t max;             /* largest integer, exact or largest byte length, largest count */
    enum proto_record record; /* of a list: what it consists of ... */
    size_t count_offset;      /* ... and where its count stands */
};

struct schema {
    const char *name; /* "READY" for a message, "lease" for a record inside one */
    size_t size;      /* sizeof(struct msg_...) */
    uint32_t field_count;
    const struct field *fields;
};

const struct schema *schema_of(enum proto_record which);

/* Bytes of the shortest encoding, which has every number 0 and every string and list empty. */
size_t record_bytes_min(enum proto_record which);

/* Bytes of a number, or of what precedes the contents, in msgpack's shortest form. */
static inline size_t integer_bytes(uint64_t v) {
    return v < 128 ? 1 : v <= UINT8_MAX ? 2 : v <= UINT16_MAX ? 3 : v <= UINT32_MAX ? 5 : 9;
}
static inline size_t array_header_bytes(uint64_t count) {
    return count < 16 ? 1 : count <= UINT16_MAX ? 3 : 5;
}
static inline size_t bytes_header_bytes(uint64_t length) {
    return length <= UINT8_MAX ? 2 : length <= UINT16_MAX ? 3 : 5;
}
static inline size_t str_header_bytes(uint64_t length) {
    return length < 32 ? 1 : bytes_header_bytes(length);
}

/* A list as it stands in a decoded struct. */
struct list {
    uint8_t *items;
    uint32_t count;
};
struct list list_of(const struct field *f, const void *record);
void list_store(const struct field *f, void *record, struct list list);

/* Where in a message the encoder or decoder is; lives on the C stack, one per level of nesting. */
struct place {
    const struct place *up; /* NULL: the message itself */
    const struct schema *schema;
    const struct field *field;
    uint32_t item; /* of the list that `field` is, while inside it */
};
/* err_set() with ERR_PROTOCOL and "READY.ranges[3].count: " in front. */
int place_refuse(const struct place *at, struct err *err, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#endif
