/* message.c - what is left around encoder and decoder: deep copies, strings, the UTF-8 check. */
#include <stdlib.h>
#include <string.h>

#include "proto/schema.h"

/* ---- deep copies --------------------------------------------------------------------------------
 */

static int copy_bytes(const struct field *f, const void *from, void *to) {
    struct proto_bytes b;
    memcpy(&b, (const uint8_t *)from + f->offset, sizeof b);
    uint8_t *own = malloc(b.length ? b.length : 1);
    if (!own) return -1;
    if (b.length) memcpy(own, b.data, b.length);
    b.data = own;
    memcpy((uint8_t *)to + f->offset, &b, sizeof b);
    return 0;
}

static int copy_record(enum proto_record which, const void *from, void *to);

static int copy_list(const struct field *f, const void *from, void *to) {
    struct list list = list_of(f, from), own = {0};
    size_t size = proto_record_size(f->record);
    if (list.count == 0) return 0;
    own.items = calloc(list.count, size);
    if (!own.items) return -1;
    own.count = list.count;
    list_store(f, to, own);
    for (uint32_t i = 0; i < list.count; i++)
        if (copy_record(f->record, list.items + i * size, own.items + i * size)) return -1;
    return 0;
}

/* `to` is zero at first and can be released however far this gets. */
static int copy_record(enum proto_record which, const void *from, void *to) {
    const struct schema *s = schema_of(which);
    memcpy(to, from, s->size);
    for (uint32_t i = 0; i < s->field_count; i++) {
        const struct field *f = &s->fields[i];
        if (f->kind == KIND_LIST) list_store(f, to, (struct list){0});
        if (f->kind == KIND_BYTES || f->kind == KIND_STR)
            memset((uint8_t *)to + f->offset, 0, sizeof(struct proto_bytes));
    }
    for (uint32_t i = 0; i < s->field_count; i++) {
        const struct field *f = &s->fields[i];
        if (f->kind == KIND_LIST && copy_list(f, from, to)) return -1;
        if ((f->kind == KIND_BYTES || f->kind == KIND_STR) && copy_bytes(f, from, to)) return -1;
    }
    return 0;
}

int proto_copy(enum proto_record which, const void *from, void *to, struct err *err) {
    if (copy_record(which, from, to) == 0) return 0;
    proto_copy_release(which, to);
    return err_set(err, ERR_MEMORY, "no memory to copy a %s", proto_record_name(which));
}

void proto_copy_release(enum proto_record which, void *record) {
    const struct schema *s = schema_of(which);
    for (uint32_t i = 0; i < s->field_count; i++) {
        const struct field *f = &s->fields[i];
        struct proto_bytes b;
        if (f->kind == KIND_BYTES || f->kind == KIND_STR) {
            memcpy(&b, (uint8_t *)record + f->offset, sizeof b);
            free((void *)(uintptr_t)b.data);
        } else if (f->kind == KIND_LIST) {
            struct list list = list_of(f, record);
            size_t size = proto_record_size(f->record);
            for (uint32_t k = 0; k < list.count; k++)
                proto_copy_release(f->record, list.items + k * size);
            free(list.items);
        }
    }
    memset(record, 0, s->size);
}

/* ---- what may overtake what -----------------------------------------------------------------------
 */

int proto_urgency(uint8_t type) {
    switch (type) {
    case MSG_HEARTBEAT:
    case MSG_HEARTBEAT_ACK: return 0;
    case MSG_AFTER: /* in the order of the data it is about */
    case MSG_CHUNK:
    case MSG_RESULT:
    case MSG_STATE:
    case MSG_MOMENTS: return 2;
    default: return 1;
    }
}

/* ---- strings ------------------------------------------------------------------------------------
 */

struct proto_bytes proto_str(const char *text) {
    return (struct proto_bytes){(const uint8_t *)text, (uint32_t)strlen(text)};
}

void proto_str_copy(struct proto_bytes s, char *out, size_t size) {
    if (size == 0) return;
    size_t length = s.length < size - 1 ? s.length : size - 1;
    /* Do not cut a character of several bytes in two. */
    while (length < s.length && length > 0 && (s.data[length] & 0xc0) == 0x80) length--;
    if (length) memcpy(out, s.data, length);
    out[length] = '\0';
}

/* Length of the well-formed sequence at `p` (Unicode, table 3-7), or 0; its code point in *code. */
static size_t utf8_sequence(const uint8_t *p, size_t left, uint32_t *code) {
    static const uint32_t smallest[5] = {0, 0, 0x80, 0x800, 0x10000};
    size_t length = p[0] < 0x80       ? 1
                    : p[0] >> 5 == 6  ? 2
                    : p[0] >> 4 == 14 ? 3
                    : p[0] >> 3 == 30 ? 4
                                      : 0;
    if (length == 0 || length > left) return 0;
    *code = length == 1 ? p[0] : p[0] & (0x7fu >> length);
    for (size_t i = 1; i < length; i++) {
        if ((p[i] & 0xc0) != 0x80) return 0;
        *code = *code << 6 | (p[i] & 0x3f);
    }
    bool surrogate = *code >= 0xd800 && *code <= 0xdfff;
    return *code < smallest[length] || *code > 0x10ffff || surrogate ? 0 : length;
}

bool proto_text_is_clean(const uint8_t *text, size_t length) {
    while (length) {
        uint32_t code = 0;
        size_t n = utf8_sequence(text, length, &code);
        if (n == 0 || code < 0x20 || (code >= 0x7f && code <= 0x9f)) return false;
        text += n;
        length -= n;
    }
    return true;
}
