/* form.c - messages from fuzzed bytes. A field is a byte of control, and what that asks for. */
#include "tests/fuzz/form.h"

#include <math.h>
#include <stdlib.h>

#include "proto/schema.h"

/* Low bits of the control of an integer; the rest picks an older value, or is a small number. */
enum { SAID, SAID_PLUS_1, SAID_MINUS_1, SMALL, RAW, LIMIT, ANY_SAID, ZERO };
#define WANT(control) ((control) & 7)
#define MORE(control) ((control) >> 3)

/* ---- memory ------------------------------------------------------------------------------------- */

static void forget_changed(struct form_memory *m) {
    while (m->changed_count) free(m->changed[--m->changed_count]);
}

void form_memory_release(struct form_memory *m) {
    forget_changed(m);
    for (uint32_t i = 0; i < m->name_count; i++) free(m->name[i].bytes.data);
    free(m->any.bytes.data);
    for (int which = 0; which < RECORD_COUNT; which++) {
        size_t size = proto_record_size((enum proto_record)which);
        for (uint32_t i = 0; i < m->list[which].count; i++)
            proto_copy_release((enum proto_record)which, m->list[which].items + i * size);
        free(m->list[which].items);
    }
    memset(m, 0, sizeof *m);
}

static const struct form_name *find(const struct form_memory *m, const char *name) {
    for (uint32_t i = 0; i < m->name_count; i++)
        if (!strcmp(m->name[i].name, name)) return &m->name[i];
    return NULL;
}

static struct form_name *find_or_add(struct form_memory *m, const char *name) {
    const struct form_name *found = find(m, name);
    if (found) return &m->name[found - m->name];
    if (m->name_count == FORM_NAMES) return &m->any;
    m->name[m->name_count].name = name;
    return &m->name[m->name_count++];
}

static void learn_number(struct form_name *n, uint64_t number) {
    n->number[n->numbers++ % FORM_DEPTH] = number;
}

static void learn_digest(struct form_name *n, const void *digest) {
    memcpy(&n->digest[n->digests++ % FORM_DEPTH], digest, sizeof(struct digest));
}

static void learn_bytes(struct form_name *n, struct proto_bytes b) {
    uint8_t *copy = malloc(b.length + 1u);
    assert(copy);
    if (b.length) memcpy(copy, b.data, b.length);
    free(n->bytes.data);
    n->bytes.data = copy;
    n->bytes.length = b.length;
}

void form_learn_number(struct form_memory *m, const char *name, uint64_t number) {
    learn_number(find_or_add(m, name), number);
    learn_number(&m->any, number);
}

static void learn_list(struct form_memory *m, const struct field *f, struct list list) {
    size_t size = proto_record_size(f->record);
    uint32_t count = list.count < FORM_ITEMS_MAX ? list.count : FORM_ITEMS_MAX;
    for (uint32_t i = 0; i < m->list[f->record].count; i++)
        proto_copy_release(f->record, m->list[f->record].items + i * size);
    free(m->list[f->record].items);
    m->list[f->record].items = calloc(count + 1u, size);
    m->list[f->record].count = count;
    assert(m->list[f->record].items);
    for (uint32_t i = 0; i < count; i++) {
        int failed = proto_copy(f->record, list.items + i * size, m->list[f->record].items + i * size, NULL);
        assert(!failed);
        form_learn(m, f->record, list.items + i * size);
    }
}

static uint64_t number_of(const struct field *f, const void *value) {
    switch (f->kind) {
    case KIND_U8: return *(const uint8_t *)value;
    case KIND_U32: return *(const uint32_t *)value;
    case KIND_U64: return *(const uint64_t *)value;
    default: return 0;
    }
}

void form_learn(struct form_memory *m, enum proto_record which, const void *record) {
    const struct schema *s = schema_of(which);
    for (uint32_t i = 0; i < s->field_count; i++) {
        const struct field *f = &s->fields[i];
        const void *value = (const uint8_t *)record + f->offset;
        switch (f->kind) {
        case KIND_U8:
        case KIND_U32:
        case KIND_U64: form_learn_number(m, f->name, number_of(f, value)); break;
        case KIND_DIGEST:
        case KIND_KEY:
            learn_digest(find_or_add(m, f->name), value);
            learn_digest(&m->any, value);
            break;
        case KIND_BYTES:
        case KIND_STR: learn_bytes(find_or_add(m, f->name), *(const struct proto_bytes *)value); break;
        case KIND_LIST: learn_list(m, f, list_of(f, record)); break;
        default: break;
        }
    }
}

/* ---- filling in --------------------------------------------------------------------------------- */

/* How long ago counts from 0, the newest. */
static uint64_t said_number(const struct form_name *n, uint32_t ago) {
    return n && ago < n->numbers ? n->number[(n->numbers - 1 - ago) % FORM_DEPTH] : 0;
}

static struct digest said_digest(const struct form_name *n, uint32_t ago) {
    return n && ago < n->digests ? n->digest[(n->digests - 1 - ago) % FORM_DEPTH] : (struct digest){0};
}

static uint64_t fill_number(const struct form_memory *m, struct fuzz_input *in, const struct field *f) {
    uint8_t control = fuzz_u8(in);
    const struct form_name *n = find(m, f->name);
    uint64_t value = 0;
    switch (WANT(control)) {
    case SAID: value = said_number(n, MORE(control) % FORM_DEPTH); break;
    case SAID_PLUS_1: value = said_number(n, 0) + 1 + MORE(control); break;
    case SAID_MINUS_1: value = said_number(n, 0) - 1 - MORE(control); break;
    case SMALL: value = MORE(control); break;
    case RAW: value = fuzz_le(in, f->kind == KIND_U64 ? 8 : 4); break;
    case LIMIT: value = f->max - MORE(control); break;
    case ANY_SAID: value = said_number(&m->any, MORE(control) % FORM_DEPTH); break;
    case ZERO: break;
    }
    return value > f->max ? f->max : value;
}

static double fill_float(struct fuzz_input *in, bool narrow) {
    static const double usual[] = {1, 0, -1, 1e-3, 0.5, 1e30, -1e30, 1e-42};
    uint8_t control = fuzz_u8(in);
    if (control < 128) return usual[control % (sizeof usual / sizeof *usual)];
    uint64_t bits = fuzz_le(in, 8);
    double value;
    memcpy(&value, &bits, sizeof value);
    if (narrow) value = (double)(float)value;
    return isfinite(value) ? value : 1;
}

static struct digest fill_digest(const struct form_memory *m, struct fuzz_input *in, const struct field *f) {
    uint8_t control = fuzz_u8(in);
    struct digest d = {0};
    uint32_t ago = MORE(control) % FORM_DEPTH;
    size_t n = sizeof d;
    switch (WANT(control)) {
    case SAID: return said_digest(find(m, f->name), ago);
    case SMALL: d.b[0] = MORE(control); return d;
    case RAW: {
        const uint8_t *raw = fuzz_bytes(in, &n);
        memcpy(&d, raw, n);
        return d;
    }
    case ANY_SAID: return said_digest(&m->any, ago);
    default: return d;
    }
}

/* What was said, with one byte changed, or cut at a place. */
static struct proto_bytes change_bytes(struct form_memory *m, struct fuzz_input *in, struct proto_bytes said,
                                       bool cut) {
    uint32_t where = (uint32_t)fuzz_le(in, 3) % (said.length + 1);
    uint8_t by = fuzz_u8(in);
    uint8_t *copy = m->changed_count < FORM_STRINGS_MAX ? malloc(said.length + 1u) : NULL;
    if (!copy) return said;
    if (said.length) memcpy(copy, said.data, said.length);
    if (where < said.length) copy[where] ^= by ? by : 1;
    m->changed[m->changed_count++] = copy;
    return (struct proto_bytes){copy, cut ? where : said.length};
}

/* Control 0: as it was said; 1, 2: that, changed or cut; else so many bytes of the input, and 3 more. */
static struct proto_bytes fill_bytes(struct form_memory *m, struct fuzz_input *in, const struct field *f) {
    uint8_t control = fuzz_u8(in);
    const struct form_name *n = find(m, f->name);
    struct proto_bytes said = {n ? n->bytes.data : NULL, n ? n->bytes.length : 0};
    size_t length = control - 3u;
    if (said.length > f->max) said.length = (uint32_t)f->max;
    if (control == 0) return said;
    if (control < 3) return change_bytes(m, in, said, control == 2);
    if (length > f->max) length = (size_t)f->max;
    const uint8_t *at = fuzz_bytes(in, &length);
    return (struct proto_bytes){at, (uint32_t)length};
}

static struct proto_bytes fill_text(struct form_memory *m, struct fuzz_input *in, const struct field *f) {
    struct proto_bytes b = fill_bytes(m, in, f);
    if (!proto_text_is_clean(b.data, b.length)) return proto_str("?");
    return b;
}

static bool fill(struct form_memory *m, struct fuzz_input *in, const struct schema *s, uint8_t *out);

/* Control 0: the list as it was said; 64 on: that without its end; 128 on: with one item changed; else so
 * many items, less one. Items that repeat what was said share their strings with m; lists in lists they
 * would share too, but no message has any. */
static void fill_list(struct form_memory *m, struct fuzz_input *in, const struct field *f, uint8_t *out) {
    uint8_t control = fuzz_u8(in);
    const struct schema *s = schema_of(f->record);
    bool said = control == 0 || control >= 64;
    struct list list = {.count = said ? m->list[f->record].count : (control - 1u) % 15};
    if (control >= 64 && control < 128) list.count -= control - 63u < list.count ? control - 63u : list.count;
    if (list.count > f->max) list.count = (uint32_t)f->max;
    if (list.count == 0) return;
    uint32_t changed = control >= 128 ? (control - 128u) % list.count : list.count;
    list.items = calloc(list.count, s->size);
    assert(list.items);
    list_store(f, out, list);
    for (uint32_t i = 0; i < list.count; i++) {
        uint8_t *item = list.items + i * s->size;
        if (said && i != changed) memcpy(item, m->list[f->record].items + i * s->size, s->size);
        else fill(m, in, s, item);
    }
}

static bool fill_field(struct form_memory *m, struct fuzz_input *in, const struct field *f, uint8_t *record) {
    void *out = record + f->offset;
    struct digest d;
    switch (f->kind) {
    case KIND_U8: *(uint8_t *)out = (uint8_t)fill_number(m, in, f); break;
    case KIND_U32: *(uint32_t *)out = (uint32_t)fill_number(m, in, f); break;
    case KIND_U64: *(uint64_t *)out = fill_number(m, in, f); break;
    case KIND_I32: *(int32_t *)out = (int32_t)(int8_t)fuzz_u8(in); break;
    case KIND_F32: *(float *)out = (float)fill_float(in, true); break;
    case KIND_F64: *(double *)out = fill_float(in, false); break;
    case KIND_DIGEST:
    case KIND_KEY:
        d = fill_digest(m, in, f);
        memcpy(out, &d, sizeof d);
        break;
    case KIND_SIG: return fuzz_u8(in) == 0;
    case KIND_BYTES: *(struct proto_bytes *)out = fill_bytes(m, in, f); break;
    case KIND_STR: *(struct proto_bytes *)out = fill_text(m, in, f); break;
    case KIND_LIST: fill_list(m, in, f, record); break;
    }
    return false;
}

static bool fill(struct form_memory *m, struct fuzz_input *in, const struct schema *s, uint8_t *out) {
    bool sign = false;
    for (uint32_t i = 0; i < s->field_count; i++) sign |= fill_field(m, in, &s->fields[i], out);
    return sign;
}

bool form_fill(struct form_memory *m, struct fuzz_input *in, enum proto_record which, void *out) {
    const struct schema *s = schema_of(which);
    forget_changed(m);
    memset(out, 0, s->size);
    return fill(m, in, s, out);
}

/* ---- the way back ------------------------------------------------------------------------------- */

static void put(struct proto_buffer *out, uint64_t value, int bytes) {
    for (int i = 0; i < bytes; i++) {
        uint8_t byte = (uint8_t)(value >> (8 * i));
        proto_buffer_append(out, &byte, 1);
    }
}

static void write_record(struct proto_buffer *out, const struct schema *s, const uint8_t *record);

static void write_list(struct proto_buffer *out, const struct field *f, const uint8_t *record) {
    struct list list = list_of(f, record);
    const struct schema *s = schema_of(f->record);
    assert(list.count < 15);
    put(out, list.count + 1u, 1);
    for (uint32_t i = 0; i < list.count; i++) write_record(out, s, list.items + i * s->size);
}

static void write_float(struct proto_buffer *out, double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    put(out, 255, 1);
    put(out, bits, 8);
}

static void write_bytes(struct proto_buffer *out, struct proto_bytes b) {
    assert(b.length <= FORM_BYTES_MAX);
    put(out, b.length + 3u, 1);
    proto_buffer_append(out, b.data, b.length);
}

static void write_field(struct proto_buffer *out, const struct field *f, const uint8_t *record) {
    const void *value = record + f->offset;
    switch (f->kind) {
    case KIND_U8:
    case KIND_U32:
    case KIND_U64:
        put(out, RAW, 1);
        put(out, number_of(f, value), f->kind == KIND_U64 ? 8 : 4);
        break;
    case KIND_I32: put(out, (uint8_t)*(const int32_t *)value, 1); break;
    case KIND_F32: write_float(out, (double)*(const float *)value); break;
    case KIND_F64: write_float(out, *(const double *)value); break;
    case KIND_DIGEST:
    case KIND_KEY:
        put(out, RAW, 1);
        proto_buffer_append(out, value, sizeof(struct digest));
        break;
    case KIND_SIG: put(out, 0, 1); break;
    case KIND_BYTES:
    case KIND_STR: write_bytes(out, *(const struct proto_bytes *)value); break;
    case KIND_LIST: write_list(out, f, record); break;
    }
}

static void write_record(struct proto_buffer *out, const struct schema *s, const uint8_t *record) {
    for (uint32_t i = 0; i < s->field_count; i++) write_field(out, &s->fields[i], record);
}

void form_write(struct proto_buffer *out, enum proto_record which, const void *record) {
    write_record(out, schema_of(which), record);
}
