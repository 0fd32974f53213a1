/* decode.c - msgpack to structs, for bytes from anywhere.
 *
 * The schema says what must come next; nothing else is accepted. msgpack-c's own state machine
 * (its unpack_template.h) reads one token at a time; no object tree is built and nothing is
 * allocated but the lists that the schema names, each after its count was checked against its
 * limit and against the bytes that are really there. */
#include <assert.h>
#include <math.h>
#include <msgpack.h>
#include <stdlib.h>
#include <string.h>

#include "proto/schema.h"

/* ---- tokens -------------------------------------------------------------------------------------
 */

enum token_kind {
    TOKEN_UINT,
    TOKEN_INT,
    TOKEN_F32,
    TOKEN_F64,
    TOKEN_STR,
    TOKEN_BIN,
    TOKEN_ARRAY,
    TOKEN_OTHER
};

struct token {
    enum token_kind kind;
    uint64_t value;       /* TOKEN_UINT; count of TOKEN_ARRAY; byte length of STR and BIN */
    int64_t negative;     /* TOKEN_INT */
    double number;        /* TOKEN_F32, TOKEN_F64 */
    const uint8_t *bytes; /* STR, BIN */
    const char *name;     /* what to call it when it is refused */
};

#define MSGPACK_EMBED_STACK_SIZE 1 /* a token never nests */
#include <msgpack/unpack_define.h>

#define msgpack_unpack_struct(name) struct token_reader##name
#define msgpack_unpack_func(ret, name) static inline ret token_reader##name
#define msgpack_unpack_callback(name) on##name
#define msgpack_unpack_object int /* the objects of the template are not used */
#define msgpack_unpack_user struct token

/* The template stops at once when a callback is negative: so an array ends after its header. */
#define STOP_AFTER_HEADER (-10)

static inline int token_set(struct token *t, struct token value, int *object) {
    *t = value;
    *object = 0;
    return 0;
}
static inline int on_root(struct token *t) {
    (void)t;
    return 0;
}
static inline int on_uint64(struct token *t, uint64_t v, int *o) {
    return token_set(t, (struct token){.kind = TOKEN_UINT, .value = v, .name = "an integer"}, o);
}
static inline int on_uint8(struct token *t, uint8_t v, int *o) { return on_uint64(t, v, o); }
static inline int on_uint16(struct token *t, uint16_t v, int *o) { return on_uint64(t, v, o); }
static inline int on_uint32(struct token *t, uint32_t v, int *o) { return on_uint64(t, v, o); }
/* Integers in a signed form; a value that is not negative has no business there. */
static inline int on_int64(struct token *t, int64_t v, int *o) {
    return token_set(
        t, (struct token){.kind = TOKEN_INT, .negative = v, .name = "a negative integer"}, o);
}
static inline int on_int8(struct token *t, int8_t v, int *o) { return on_int64(t, v, o); }
static inline int on_int16(struct token *t, int16_t v, int *o) { return on_int64(t, v, o); }
static inline int on_int32(struct token *t, int32_t v, int *o) { return on_int64(t, v, o); }
static inline int on_float(struct token *t, float v, int *o) {
    return token_set(t, (struct token){.kind = TOKEN_F32, .number = (double)v, .name = "a float32"},
                     o);
}
static inline int on_double(struct token *t, double v, int *o) {
    return token_set(t, (struct token){.kind = TOKEN_F64, .number = v, .name = "a float64"}, o);
}
static inline int on_other(struct token *t, const char *name, int *o) {
    return token_set(t, (struct token){.kind = TOKEN_OTHER, .name = name}, o);
}
static inline int on_nil(struct token *t, int *o) { return on_other(t, "nil", o); }
static inline int on_true(struct token *t, int *o) { return on_other(t, "a boolean", o); }
static inline int on_false(struct token *t, int *o) { return on_other(t, "a boolean", o); }
static inline int on_str(struct token *t, const char *all, const char *at, unsigned length,
                         int *o) {
    (void)all;
    return token_set(
        t,
        (struct token){
            .kind = TOKEN_STR, .value = length, .name = "a string", .bytes = (const uint8_t *)at},
        o);
}
static inline int on_bin(struct token *t, const char *all, const char *at, unsigned length,
                         int *o) {
    (void)all;
    return token_set(t,
                     (struct token){.kind = TOKEN_BIN,
                                    .value = length,
                                    .name = "a byte string",
                                    .bytes = (const uint8_t *)at},
                     o);
}
static inline int on_ext(struct token *t, const char *all, const char *at, unsigned length,
                         int *o) {
    (void)all, (void)at, (void)length;
    return on_other(t, "an extension", o);
}
static inline int on_array(struct token *t, unsigned count, int *o) {
    token_set(t, (struct token){.kind = TOKEN_ARRAY, .value = count, .name = "an array"}, o);
    return STOP_AFTER_HEADER;
}
static inline int on_map(struct token *t, unsigned count, int *o) {
    (void)count;
    on_other(t, "a map", o);
    return STOP_AFTER_HEADER;
}
/* Never reached, as no container is ever entered. */
static inline int on_array_item(struct token *t, int *c, int o) {
    (void)t, (void)c, (void)o;
    return -1;
}
static inline int on_map_item(struct token *t, int *c, int k, int v) {
    (void)t, (void)c, (void)k, (void)v;
    return -1;
}

#include <msgpack/unpack_template.h>

/* Bytes the shortest form of a token has. Ours is the sum of shortest forms, so a longer one, or a
 * positive number in a signed form, means that the bytes were not made by proto_encode(). */
static size_t shortest_bytes(const struct token *t) {
    int64_t n = t->negative;
    switch (t->kind) {
    case TOKEN_UINT: return integer_bytes(t->value);
    case TOKEN_INT:
        return n >= 0           ? 0
               : n >= -32       ? 1
               : n >= INT8_MIN  ? 2
               : n >= INT16_MIN ? 3
               : n >= INT32_MIN ? 5
                                : 9;
    case TOKEN_F32: return 5;
    case TOKEN_F64: return 9;
    case TOKEN_STR: return str_header_bytes(t->value) + t->value;
    case TOKEN_BIN: return bytes_header_bytes(t->value) + t->value;
    case TOKEN_ARRAY: return array_header_bytes(t->value);
    case TOKEN_OTHER: return 0;
    }
    return 0;
}

/* ---- fields -------------------------------------------------------------------------------------
 */

struct reader {
    const uint8_t *bytes;
    size_t length, used;
    struct err *err;
};

/* Read one token and insist on its kind. */
static int take(struct reader *r, const struct place *at, enum token_kind want,
                const char *want_name, struct token *out) {
    struct token_reader_context ctx = {.user = {0}};
    token_reader_init(&ctx);
    size_t end = r->used;
    int result = token_reader_execute(&ctx, (const char *)r->bytes, r->length, &end);
    *out = ctx.user;
    if (result == 0)
        return place_refuse(at, r->err, "the payload of %zu bytes ends here", r->length);
    if (result == STOP_AFTER_HEADER)
        end++; /* the template stands on the header's last byte */
    else if (result < 0)
        return place_refuse(at, r->err, "byte 0x%02x is not msgpack", r->bytes[r->used]);
    if (out->kind != want) return place_refuse(at, r->err, "%s, not %s", out->name, want_name);
    if (end - r->used != shortest_bytes(out))
        return place_refuse(at, r->err, "%s that is not in its shortest form", out->name);
    r->used = end;
    return 0;
}

static int take_unsigned(struct reader *r, const struct place *at, uint64_t *out) {
    struct token t;
    if (take(r, at, TOKEN_UINT, "an unsigned integer", &t)) return -1;
    if (t.value > at->field->max)
        return place_refuse(at, r->err, "%llu, at most %llu", (unsigned long long)t.value,
                            (unsigned long long)at->field->max);
    *out = t.value;
    return 0;
}

/* Both signs; which of the two tokens it is shows in the first byte. */
static int take_i32(struct reader *r, const struct place *at, int32_t *out) {
    struct token t = {0};
    uint8_t first = r->used < r->length ? r->bytes[r->used] : 0;
    bool negative = first >= 0xe0 || (first >= 0xd0 && first <= 0xd3);
    if (take(r, at, negative ? TOKEN_INT : TOKEN_UINT, "an integer", &t)) return -1;
    if (negative ? t.negative < INT32_MIN : t.value > INT32_MAX)
        return place_refuse(at, r->err, "outside 32 bits");
    *out = negative ? (int32_t)t.negative : (int32_t)t.value;
    return 0;
}

static int take_float(struct reader *r, const struct place *at, double *out) {
    struct token t;
    bool narrow = at->field->kind == KIND_F32;
    if (take(r, at, narrow ? TOKEN_F32 : TOKEN_F64, narrow ? "a float32" : "a float64", &t))
        return -1;
    if (!isfinite(t.number)) return place_refuse(at, r->err, "not a finite number");
    *out = t.number;
    return 0;
}

static int take_exact(struct reader *r, const struct place *at, uint8_t *out) {
    struct token t;
    if (take(r, at, TOKEN_BIN, "a byte string", &t)) return -1;
    if (t.value != at->field->max)
        return place_refuse(at, r->err, "%llu bytes, not %llu", (unsigned long long)t.value,
                            (unsigned long long)at->field->max);
    memcpy(out, t.bytes, t.value);
    return 0;
}

static int take_bytes(struct reader *r, const struct place *at, struct proto_bytes *out) {
    struct token t;
    bool text = at->field->kind == KIND_STR;
    if (take(r, at, text ? TOKEN_STR : TOKEN_BIN, text ? "a string" : "a byte string", &t))
        return -1;
    if (t.value > at->field->max)
        return place_refuse(at, r->err, "%llu bytes, at most %llu", (unsigned long long)t.value,
                            (unsigned long long)at->field->max);
    if (text && !proto_text_is_clean(t.bytes, t.value))
        return place_refuse(at, r->err, "not UTF-8 without control characters");
    /* msgpack-c gives no position for an empty string. */
    *out = (struct proto_bytes){t.value ? t.bytes : r->bytes, (uint32_t)t.value};
    return 0;
}

static int take_record(struct reader *r, const struct place *up, const struct schema *s,
                       uint8_t *record);

/* Memory for a list is at most (struct size / shortest encoding) times the bytes at hand: that is
 * less than eight times the payload for every record there is. */
static int take_list(struct reader *r, struct place *at, uint8_t *record) {
    const struct field *f = at->field;
    const struct schema *s = schema_of(f->record);
    struct token t;
    if (take(r, at, TOKEN_ARRAY, "an array", &t)) return -1;
    if (t.value > f->max)
        return place_refuse(at, r->err, "%llu records, at most %llu", (unsigned long long)t.value,
                            (unsigned long long)f->max);
    if (t.value > (r->length - r->used) / record_bytes_min(f->record))
        return place_refuse(at, r->err, "%llu records do not fit into the %zu bytes left",
                            (unsigned long long)t.value, r->length - r->used);
    if (t.value == 0) return 0;
    struct list list = {.items = calloc(t.value, s->size), .count = (uint32_t)t.value};
    if (!list.items) return err_set(r->err, ERR_MEMORY, "no memory for %u records", list.count);
    list_store(f, record, list); /* zeroed records can be released at any moment */
    for (at->item = 0; at->item < list.count; at->item++)
        if (take_record(r, at, s, list.items + at->item * s->size)) return -1;
    return 0;
}

static int take_field(struct reader *r, struct place *at, uint8_t *record) {
    void *out = record + at->field->offset;
    uint64_t whole = 0;
    double number = 0;
    int result = 0;
    switch (at->field->kind) {
    case KIND_U8:
        result = take_unsigned(r, at, &whole);
        *(uint8_t *)out = (uint8_t)whole;
        break;
    case KIND_U32:
        result = take_unsigned(r, at, &whole);
        *(uint32_t *)out = (uint32_t)whole;
        break;
    case KIND_U64: result = take_unsigned(r, at, out); break;
    case KIND_I32: result = take_i32(r, at, out); break;
    case KIND_F32:
        result = take_float(r, at, &number);
        *(float *)out = (float)number;
        break;
    case KIND_F64: result = take_float(r, at, out); break;
    case KIND_DIGEST:
    case KIND_KEY:
    case KIND_SIG: result = take_exact(r, at, out); break;
    case KIND_BYTES:
    case KIND_STR: result = take_bytes(r, at, out); break;
    case KIND_LIST: result = take_list(r, at, record); break;
    }
    return result;
}

static int take_record(struct reader *r, const struct place *up, const struct schema *s,
                       uint8_t *record) {
    struct place at = {.up = up, .schema = s};
    struct token t;
    if (take(r, &at, TOKEN_ARRAY, "an array", &t)) return -1;
    if (t.value != s->field_count)
        return place_refuse(&at, r->err, "%llu fields, not %u", (unsigned long long)t.value,
                            s->field_count);
    for (uint32_t i = 0; i < s->field_count; i++) {
        at.field = &s->fields[i];
        if (take_field(r, &at, record)) return -1;
    }
    return 0;
}

int proto_decode(const uint8_t *bytes, size_t length, enum proto_record which, void *record,
                 struct err *err) {
    const struct schema *s = schema_of(which);
    struct reader r = {.bytes = bytes, .length = length, .err = err};
    memset(record, 0, s->size);
    int result = take_record(&r, NULL, s, record);
    if (result == 0 && r.used != length)
        result =
            err_set(err, ERR_PROTOCOL, "%s: %zu bytes follow its end", s->name, length - r.used);
    if (result) proto_decoded_release(which, record);
    return result;
}

void proto_decoded_release(enum proto_record which, void *record) {
    const struct schema *s = schema_of(which);
    for (uint32_t i = 0; i < s->field_count; i++) {
        const struct field *f = &s->fields[i];
        if (f->kind != KIND_LIST) continue;
        struct list list = list_of(f, record);
        size_t size = proto_record_size(f->record);
        for (uint32_t k = 0; k < list.count; k++)
            proto_decoded_release(f->record, list.items + k * size);
        free(list.items);
    }
    memset(record, 0, s->size);
}
