/* encode.c - structs to msgpack. msgpack-c writes every number and length in its shortest form, so
 * equal records have equal bytes, which is what digests and signatures are taken over. */
#include <assert.h>
#include <math.h>
#include <msgpack.h>
#include <stdlib.h>
#include <string.h>

#include "proto/schema.h"

#define BUFFER_BYTES_FIRST 256u

void proto_buffer_init(struct proto_buffer *b, size_t limit) {
    *b = (struct proto_buffer){.limit = limit};
}

void proto_buffer_release(struct proto_buffer *b) {
    free(b->data);
    *b = (struct proto_buffer){0};
}

/* Doubling, but never more than the limit and never less than what is needed now. */
static bool buffer_reserve(struct proto_buffer *b, size_t more) {
    if (b->failed || more > b->limit - b->length) return false;
    size_t need = b->length + more, capacity = b->capacity ? b->capacity : BUFFER_BYTES_FIRST;
    if (need <= b->capacity) return true;
    while (capacity < need) capacity = capacity > b->limit / 2 ? b->limit : capacity * 2;
    uint8_t *data = realloc(b->data, capacity);
    if (!data) return false;
    b->data = data;
    b->capacity = capacity;
    return true;
}

void proto_buffer_append(struct proto_buffer *b, const void *bytes, size_t length) {
    if (!buffer_reserve(b, length)) {
        b->failed = true;
        return;
    }
    if (length) memcpy(b->data + b->length, bytes, length);
    b->length += length;
}

static int packer_write(void *out, const char *bytes, size_t length) {
    proto_buffer_append(out, bytes, length);
    return 0; /* the buffer remembers a failure */
}

static int pack_record(msgpack_packer *pk, const struct place *up, const struct schema *s,
                       const uint8_t *record, struct err *err);

static int pack_list(msgpack_packer *pk, struct place *at, const uint8_t *record, struct err *err) {
    struct list list = list_of(at->field, record);
    const struct schema *s = schema_of(at->field->record);
    if (list.count > at->field->max)
        return place_refuse(at, err, "%u records, at most %llu", list.count,
                            (unsigned long long)at->field->max);
    msgpack_pack_array(pk, list.count);
    for (at->item = 0; at->item < list.count; at->item++)
        if (pack_record(pk, at, s, list.items + at->item * s->size, err)) return -1;
    return 0;
}

static int pack_bytes(msgpack_packer *pk, const struct place *at, struct proto_bytes b,
                      struct err *err) {
    if (b.length > at->field->max)
        return place_refuse(at, err, "%u bytes, at most %llu", b.length,
                            (unsigned long long)at->field->max);
    if (at->field->kind == KIND_BYTES) return msgpack_pack_bin_with_body(pk, b.data, b.length);
    if (!proto_text_is_clean(b.data, b.length))
        return place_refuse(at, err, "not UTF-8 without control characters");
    return msgpack_pack_str_with_body(pk, b.data, b.length);
}

static int pack_unsigned(msgpack_packer *pk, const struct place *at, uint64_t value,
                         struct err *err) {
    if (value > at->field->max)
        return place_refuse(at, err, "%llu, at most %llu", (unsigned long long)value,
                            (unsigned long long)at->field->max);
    return msgpack_pack_uint64(pk, value);
}

static int pack_float(msgpack_packer *pk, const struct place *at, double value, struct err *err) {
    if (!isfinite(value)) return place_refuse(at, err, "not a finite number");
    return at->field->kind == KIND_F32 ? msgpack_pack_float(pk, (float)value)
                                       : msgpack_pack_double(pk, value);
}

static int pack_field(msgpack_packer *pk, struct place *at, const uint8_t *record,
                      struct err *err) {
    const struct field *f = at->field;
    const void *value = record + f->offset;
    switch (f->kind) {
    case KIND_U8: return pack_unsigned(pk, at, *(const uint8_t *)value, err);
    case KIND_U32: return pack_unsigned(pk, at, *(const uint32_t *)value, err);
    case KIND_U64: return pack_unsigned(pk, at, *(const uint64_t *)value, err);
    case KIND_I32: return msgpack_pack_int32(pk, *(const int32_t *)value);
    case KIND_F32: return pack_float(pk, at, (double)*(const float *)value, err);
    case KIND_F64: return pack_float(pk, at, *(const double *)value, err);
    case KIND_DIGEST:
    case KIND_KEY:
    case KIND_SIG: return msgpack_pack_bin_with_body(pk, value, f->max);
    case KIND_BYTES:
    case KIND_STR: return pack_bytes(pk, at, *(const struct proto_bytes *)value, err);
    case KIND_LIST: return pack_list(pk, at, record, err);
    }
    return -1;
}

static int pack_record(msgpack_packer *pk, const struct place *up, const struct schema *s,
                       const uint8_t *record, struct err *err) {
    struct place at = {.up = up, .schema = s};
    msgpack_pack_array(pk, s->field_count);
    for (uint32_t i = 0; i < s->field_count; i++) {
        at.field = &s->fields[i];
        if (pack_field(pk, &at, record, err)) return -1;
    }
    return 0;
}

/* All of a record but the contents of its last field, which is BYTES. */
static int pack_head(msgpack_packer *pk, const struct schema *s, const uint8_t *record,
                     struct proto_bytes *tail, struct err *err) {
    struct place at = {.schema = s};
    msgpack_pack_array(pk, s->field_count);
    for (uint32_t i = 0; i + 1 < s->field_count; i++) {
        at.field = &s->fields[i];
        if (pack_field(pk, &at, record, err)) return -1;
    }
    at.field = &s->fields[s->field_count - 1];
    memcpy(tail, record + at.field->offset, sizeof *tail);
    if (tail->length > at.field->max)
        return place_refuse(&at, err, "%u bytes, at most %llu", tail->length,
                            (unsigned long long)at.field->max);
    return msgpack_pack_bin(pk, tail->length);
}

int proto_encode_head(struct proto_buffer *out, enum proto_record which, const void *record,
                      struct proto_bytes *tail, struct err *err) {
    const struct schema *s = schema_of(which);
    size_t length_before = out->length;
    bool failed_before = out->failed;
    bool open = s->field_count && s->fields[s->field_count - 1].kind == KIND_BYTES;
    msgpack_packer pk;
    msgpack_packer_init(&pk, out, packer_write);
    *tail = (struct proto_bytes){0};
    int result = open ? pack_head(&pk, s, record, tail, err)
                      : pack_record(&pk, NULL, s, record, err);
    if (result == 0 && out->failed)
        result = err_set(err, ERR_FULL, "%s: does not fit into %zu bytes", s->name, out->limit);
    if (result) {
        out->length = length_before;
        out->failed = failed_before;
    }
    return result;
}

int proto_encode(struct proto_buffer *out, enum proto_record which, const void *record,
                 struct err *err) {
    struct proto_bytes tail;
    size_t length_before = out->length;
    bool failed_before = out->failed;
    if (proto_encode_head(out, which, record, &tail, err)) return -1;
    proto_buffer_append(out, tail.data, tail.length);
    if (!out->failed) return 0;
    out->length = length_before;
    out->failed = failed_before;
    return err_set(err, ERR_FULL, "%s: does not fit into %zu bytes", schema_of(which)->name,
                   out->limit);
}
