/* records.c - valid records from the schema tables. */
#include "tests/fuzz/records.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "proto/schema.h"

#define SAMPLE_BYTES_MAX 300u /* of a byte string: past its one-byte length */

static const char text[] = "h\xc3\xa9llo, \xe4\xb8\x96\xe7\x95\x8c \xf0\x9f\x90\xab and some more";
static const uint8_t bytes[SAMPLE_BYTES_MAX + 64] = {1, 2, 3, 4, 5, 6, 7, 8};

/* xorshift64*: the same everywhere. */
static uint64_t next(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * UINT64_C(2685821657736338717);
}

/* In [0, max], of any width. */
static uint64_t up_to(uint64_t *state, uint64_t max) {
    uint64_t r = next(state) >> (next(state) % 64);
    return r > max ? max : r;
}

static struct proto_bytes make_text(uint64_t *state, uint64_t max) {
    uint64_t length = up_to(state, max < sizeof text - 1 ? max : sizeof text - 1);
    while (length && ((uint8_t)text[length] & 0xc0) == 0x80) length--;
    return (struct proto_bytes){(const uint8_t *)text, (uint32_t)length};
}

static struct proto_bytes make_bytes(uint64_t *state, uint64_t max) {
    uint64_t length = up_to(state, max < SAMPLE_BYTES_MAX ? max : SAMPLE_BYTES_MAX);
    return (struct proto_bytes){bytes, (uint32_t)length};
}

static double make_number(uint64_t *state) {
    return ldexp((double)(int32_t)next(state), (int)(next(state) % 60) - 40);
}

static void make(const struct schema *s, uint64_t *state, uint8_t *record);

static void make_list(const struct field *f, uint64_t *state, uint8_t *record) {
    const struct schema *s = schema_of(f->record);
    uint64_t want = 2 + next(state) % 2;
    struct list list = {.count = (uint32_t)(want < f->max ? want : f->max)};
    list.items = calloc(list.count, s->size);
    assert(list.items);
    for (uint32_t i = 0; i < list.count; i++) make(s, state, list.items + i * s->size);
    list_store(f, record, list);
}

static void make_field(const struct field *f, uint64_t *state, uint8_t *record) {
    void *out = record + f->offset;
    switch (f->kind) {
    case KIND_U8: *(uint8_t *)out = (uint8_t)up_to(state, f->max); break;
    case KIND_U32: *(uint32_t *)out = (uint32_t)up_to(state, f->max); break;
    case KIND_U64: *(uint64_t *)out = up_to(state, f->max); break;
    case KIND_I32: *(int32_t *)out = (int32_t)next(state) >> (next(state) % 32); break;
    case KIND_F32: *(float *)out = (float)make_number(state); break;
    case KIND_F64: *(double *)out = make_number(state); break;
    case KIND_DIGEST:
    case KIND_KEY:
    case KIND_SIG: memset(out, (int)(next(state) & 0xff), f->max); break;
    case KIND_BYTES: *(struct proto_bytes *)out = make_bytes(state, f->max); break;
    case KIND_STR: *(struct proto_bytes *)out = make_text(state, f->max); break;
    case KIND_LIST: make_list(f, state, record); break;
    }
}

static void make(const struct schema *s, uint64_t *state, uint8_t *record) {
    for (uint32_t i = 0; i < s->field_count; i++) make_field(&s->fields[i], state, record);
}

void record_make(enum proto_record which, uint64_t seed, void *out) {
    const struct schema *s = schema_of(which);
    assert(s->size <= sizeof(union any_record));
    memset(out, 0, s->size);
    if (seed) make(s, &seed, out);
}

struct proto_buffer record_encoded(enum proto_record which, const void *record) {
    struct proto_buffer b;
    struct err err = {0};
    proto_buffer_init(&b, PROTO_FRAME_BYTES_MAX);
    int failed = proto_encode(&b, which, record, &err);
    assert(!failed);
    return b;
}

struct proto_buffer record_sample(enum proto_record which, uint64_t seed) {
    union any_record r;
    record_make(which, seed, &r);
    struct proto_buffer b = record_encoded(which, &r);
    proto_decoded_release(which, &r);
    return b;
}
