/* schema.c - turns the field lists of messages.h into tables, and answers what can be answered
 * from a table alone: names, sizes, types. */
#include "proto/schema.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* What "max = 0" means for each kind. */
#define WIDTH_U8 UINT8_MAX
#define WIDTH_U32 UINT32_MAX
#define WIDTH_U64 UINT64_MAX
#define WIDTH_I32 INT32_MAX
#define WIDTH_F32 0
#define WIDTH_F64 0
#define WIDTH_DIGEST PROTO_DIGEST_BYTES
#define WIDTH_KEY PROTO_KEY_BYTES
#define WIDTH_SIG PROTO_SIG_BYTES
#define WIDTH_BYTES 0
#define WIDTH_STR 0

#define FIELD(kind_, name_, max_)                                                                  \
    {.name = #name_,                                                                               \
     .kind = KIND_##kind_,                                                                         \
     .offset = offsetof(self, name_),                                                              \
     .max = (max_) != 0 ? (max_) : WIDTH_##kind_},
#define LIST(record_, name_, max_)                                                                 \
    {.name = #name_,                                                                               \
     .kind = KIND_LIST,                                                                            \
     .offset = offsetof(self, name_),                                                              \
     .max = (max_),                                                                                \
     .record = RECORD_##record_,                                                                   \
     .count_offset = offsetof(self, name_##_count)},

/* A function each, because only a scope of its own can give FIELD the record's struct. */
#define SCHEMA(record_, name_)                                                                     \
    static const struct schema *schema_##record_(void) {                                           \
        typedef struct msg_##record_ self;                                                         \
        static const struct field fields[] = {FIELDS_##record_(FIELD, LIST)};                      \
        static const struct schema schema = {                                                      \
            .name = name_,                                                                         \
            .size = sizeof(self),                                                                  \
            .field_count = sizeof fields / sizeof *fields,                                         \
            .fields = fields,                                                                      \
        };                                                                                         \
        return &schema;                                                                            \
    }
#define SCHEMA_OF_RECORD(record) SCHEMA(record, #record)
#define SCHEMA_OF_MESSAGE(NAME, record, number) SCHEMA(record, #NAME)
PROTO_RECORDS(SCHEMA_OF_RECORD)
PROTO_MESSAGES(SCHEMA_OF_MESSAGE)

const struct schema *schema_of(enum proto_record which) {
#define ENTRY_OF_RECORD(record) [RECORD_##record] = schema_##record,
#define ENTRY_OF_MESSAGE(NAME, record, number) [RECORD_##record] = schema_##record,
    static const struct schema *(*const table[RECORD_COUNT])(void) = {
        PROTO_RECORDS(ENTRY_OF_RECORD) PROTO_MESSAGES(ENTRY_OF_MESSAGE)};
    assert((unsigned)which < RECORD_COUNT);
    return table[which]();
}

struct list list_of(const struct field *f, const void *record) {
    struct list list;
    memcpy(&list.items, (const uint8_t *)record + f->offset, sizeof list.items);
    memcpy(&list.count, (const uint8_t *)record + f->count_offset, sizeof list.count);
    return list;
}

void list_store(const struct field *f, void *record, struct list list) {
    memcpy((uint8_t *)record + f->offset, &list.items, sizeof list.items);
    memcpy((uint8_t *)record + f->count_offset, &list.count, sizeof list.count);
}

/* ---- sizes
 * --------------------------------------------------------------------------------------- */

/* Bytes of a field whose number is `value`, or that has `value` bytes or records of `item_bytes`.
 */
static size_t field_bytes(const struct field *f, uint64_t value, size_t item_bytes) {
    switch (f->kind) {
    case KIND_U8:
    case KIND_U32:
    case KIND_U64: return integer_bytes(value);
    case KIND_I32: return value ? 5 : 1;
    case KIND_F32: return 5;
    case KIND_F64: return 9;
    case KIND_DIGEST:
    case KIND_KEY:
    case KIND_SIG: return 2 + f->max;
    case KIND_BYTES: return bytes_header_bytes(value) + value;
    case KIND_STR: return str_header_bytes(value) + value;
    case KIND_LIST: return array_header_bytes(value) + value * item_bytes;
    }
    return 0;
}

size_t record_bytes_min(enum proto_record which) {
    const struct schema *s = schema_of(which);
    size_t bytes = array_header_bytes(s->field_count);
    for (uint32_t i = 0; i < s->field_count; i++) bytes += field_bytes(&s->fields[i], 0, 0);
    return bytes;
}

size_t proto_record_bytes_max(enum proto_record which) {
    const struct schema *s = schema_of(which);
    size_t bytes = array_header_bytes(s->field_count);
    for (uint32_t i = 0; i < s->field_count; i++) {
        const struct field *f = &s->fields[i];
        size_t item_bytes = f->kind == KIND_LIST ? proto_record_bytes_max(f->record) : 0;
        bytes += field_bytes(f, f->max, item_bytes);
    }
    return bytes;
}

size_t proto_record_size(enum proto_record which) { return schema_of(which)->size; }

/* ---- names
 * ---------------------------------------------------------------------------------------- */

const char *proto_record_name(enum proto_record which) { return schema_of(which)->name; }

int proto_record_of_type(uint8_t type) {
#define CASE_RECORD(NAME, record, number)                                                          \
    case number: return RECORD_##record;
    switch (type) { PROTO_MESSAGES(CASE_RECORD) }
    return -1;
}

const char *proto_type_name(uint8_t type) {
    int which = proto_record_of_type(type);
    return which < 0 ? "unknown" : proto_record_name((enum proto_record)which);
}

static size_t place_name(const struct place *at, char *out, size_t size) {
    size_t used = 0;
    if (at->up) {
        used = place_name(at->up, out, size);
        used += (size_t)snprintf(out + used, size - used, "[%u]", at->up->item);
    } else {
        used += (size_t)snprintf(out, size, "%s", at->schema->name);
    }
    if (at->field) used += (size_t)snprintf(out + used, size - used, ".%s", at->field->name);
    assert(used < size); /* names are our own and nesting ends after three levels */
    return used;
}

int place_refuse(const struct place *at, struct err *err, const char *format, ...) {
    char name[160], what[160];
    va_list ap;
    va_start(ap, format);
    vsnprintf(what, sizeof what, format, ap);
    va_end(ap);
    place_name(at, name, sizeof name);
    return err_set(err, ERR_PROTOCOL, "%s: %s", name, what);
}
