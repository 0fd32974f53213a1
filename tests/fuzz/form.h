/* form.h - messages filled in from fuzzed bytes, with a memory of what was said before: a number or
 * digest is by default what the other side last said under the same name, and a list what it last
 * sent of that record. So an attacker that knows the protocol, and lies in some fields, is a few
 * bytes; and a new field or message needs no work here. */
#ifndef INTELLECT_TESTS_FUZZ_FORM_H
#define INTELLECT_TESTS_FUZZ_FORM_H

#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/records.h"

#define FORM_NAMES 128
#define FORM_DEPTH 4       /* values remembered of one name */
#define FORM_ITEMS_MAX 64  /* of a remembered list */
#define FORM_BYTES_MAX 250 /* of a byte string that does not repeat what was said */
#define FORM_STRINGS_MAX 16

struct form_name {
    const char *name;
    uint64_t number[FORM_DEPTH];
    struct digest digest[FORM_DEPTH];
    uint32_t numbers, digests; /* ever learned; the newest stands at (count - 1) % FORM_DEPTH */
    struct {
        uint8_t *data;
        uint32_t length;
    } bytes; /* the last byte string; a copy */
};

struct form_memory {
    struct form_name name[FORM_NAMES];
    uint32_t name_count;
    struct form_name any; /* under whatever name */
    struct {
        uint8_t *items; /* deep copies */
        uint32_t count;
    } list[RECORD_COUNT];
    uint8_t *changed[FORM_STRINGS_MAX]; /* byte strings of the last form_fill() */
    uint32_t changed_count;
};
void form_memory_release(struct form_memory *m);

/* Remember what stands in a record that the other side sent. */
void form_learn(struct form_memory *m, enum proto_record which, const void *record);
/* Remember one number, as if it had stood in a field of this name (which is kept). */
void form_learn_number(struct form_memory *m, const char *name, uint64_t number);

/* Fill *out, within all limits of messages.h. Byte strings point into the input or into m, where they
 * last until the next form_fill() or form_learn(). A field `signature` is left zero; returns whether a
 * right one is wanted there. Release with proto_decoded_release(). */
bool form_fill(struct form_memory *m, struct fuzz_input *in, enum proto_record which, void *out);

/* Append the bytes from which form_fill() makes this very record, for samples. Strings have at
 * most FORM_BYTES_MAX bytes, lists at most 14 items. */
void form_write(struct proto_buffer *out, enum proto_record which, const void *record);

#endif
