/* fuzz_messages.c - every record of messages.h. The first byte picks the record, the rest is its
 * encoding. What decodes must have been in the one canonical form: it encodes to the same bytes. */
#include <stdio.h>

#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/records.h"

#define ID_OF_RECORD(record) RECORD_##record,
static const enum proto_record inner[] = {PROTO_RECORDS(ID_OF_RECORD)};
#define INNER (sizeof inner / sizeof *inner)
#define INNER_FROM 128 /* messages keep their type byte, which never changes its meaning */

static enum proto_record pick(uint8_t byte) {
    int message = proto_record_of_type(byte);
    return message >= 0 ? (enum proto_record)message : inner[(byte - INNER_FROM) % INNER];
}

static void init(void) {
    struct err err;
    int failed = proto_init(&err);
    assert(!failed);
}

static void check_same(enum proto_record which, const void *record, const uint8_t *bytes,
                       size_t length) {
    struct proto_buffer b = record_encoded(which, record);
    assert(b.length == length && !memcmp(b.data, bytes, length));
    assert(length <= proto_record_bytes_max(which));
    proto_buffer_release(&b);
}

static bool take(const uint8_t *bytes, size_t length) {
    union any_record record, copy;
    struct err err = {0};
    if (!length) return false;
    enum proto_record which = pick(*bytes++);
    length--;
    assert(proto_record_size(which) <= sizeof record);
    if (proto_decode(bytes, length, which, &record, &err)) {
        assert(err.code == ERR_PROTOCOL && *err.msg);
        return false;
    }
    check_same(which, &record, bytes, length);
    int failed = proto_copy(which, &record, &copy, &err);
    assert(!failed);
    proto_decoded_release(which, &record);
    check_same(which, &copy, bytes, length);
    proto_copy_release(which, &copy);
    return true;
}

static void put(const struct fuzz_sink *out, uint8_t first, enum proto_record which,
                uint64_t seed) {
    char name[80];
    struct proto_buffer b, body = record_sample(which, seed);
    proto_buffer_init(&b, body.length + 1);
    proto_buffer_append(&b, &first, 1);
    proto_buffer_append(&b, body.data, body.length);
    snprintf(name, sizeof name, "%s-%u", proto_record_name(which), (unsigned)seed);
    out->sample(out->arg, name, b.data, b.length);
    proto_buffer_release(&b);
    proto_buffer_release(&body);
}

static void samples(const struct fuzz_sink *out) {
    static const char *const words[] = {"\xdc\xff\xff", "\xdc\x10\x10", "\xc5\xff\xff", "\xda\xff\xff",
                                        "\xcf\xff\xff\xff\xff\xff\xff\xff\xff", "\xcb\x7f\xf0", "\xc0", "\x80", "\xc1"};
    for (unsigned first = 0; first < INNER_FROM + INNER; first++)
        for (uint64_t seed = 0; seed < 3; seed++)
            if (first >= INNER_FROM || proto_record_of_type((uint8_t)first) >= 0)
                put(out, (uint8_t)first, pick((uint8_t)first), seed);
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) out->word(out->arg, words[i]);
}

const struct fuzz_target fuzz_messages = {"messages", init, take, samples};
