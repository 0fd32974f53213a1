/* proto.c - encoding and decoding messages, beside a copy and msgpack-c. */
#include <msgpack.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"
#include "proto/proto.h"
#include "tests/bench/bench.h"

#define ENCODES 100
#define DECODES 10000

struct messaging {
    enum proto_record which;
    const void *message;
    int repeats;
    struct proto_buffer encoded;
    uint8_t *copy;
};

static int run_encode(void *arg, struct err *err) {
    struct messaging *m = arg;
    for (int i = 0; i < m->repeats; i++) {
        struct proto_buffer b;
        proto_buffer_init(&b, PROTO_FRAME_BYTES_MAX);
        int r = proto_encode(&b, m->which, m->message, err);
        proto_buffer_release(&b);
        if (r) return -1;
    }
    return 0;
}

static int run_encode_copy(void *arg, struct err *err) {
    struct messaging *m = arg;
    (void)err;
    for (int i = 0; i < m->repeats; i++) {
        memcpy(m->copy, m->encoded.data, m->encoded.length);
        __asm__ volatile("" : : "r"(m->copy) : "memory"); /* or only the last one would be done */
    }
    return 0;
}

static int run_decode(void *arg, struct err *err) {
    struct messaging *m = arg;
    union {
        struct msg_chunk chunk;
        struct msg_leaves leaves;
    } out;
    for (int i = 0; i < m->repeats; i++) {
        if (proto_decode(m->encoded.data, m->encoded.length, m->which, &out, err)) return -1;
        proto_decoded_release(m->which, &out);
    }
    return 0;
}

/* msgpack-c's own way, into a tree of objects. */
static int run_unpack(void *arg, struct err *err) {
    struct messaging *m = arg;
    msgpack_unpacked u;
    msgpack_unpacked_init(&u);
    for (int i = 0; i < m->repeats; i++) {
        size_t at = 0;
        if (msgpack_unpack_next(&u, (char *)m->encoded.data, m->encoded.length, &at) !=
            MSGPACK_UNPACK_SUCCESS) {
            msgpack_unpacked_destroy(&u);
            return err_set(err, ERR_CORRUPT, "msgpack-c does not read what we encoded");
        }
    }
    msgpack_unpacked_destroy(&u);
    return 0;
}

/* Encode once to have the bytes, then time task against reference. */
static int time_messages(struct messaging *m, int (*run)(void *, struct err *),
                         int (*reference)(void *, struct err *), struct series s[2],
                         struct err *err) {
    proto_buffer_init(&m->encoded, PROTO_FRAME_BYTES_MAX);
    if (proto_encode(&m->encoded, m->which, m->message, err)) return -1;
    m->copy = take_memory(m->encoded.length);
    int r = time_on_core((struct task[]){{run, m, NULL}, {reference, m, NULL}}, s, 2, 0.4, err);
    free(m->copy);
    return r;
}

int bench_proto(struct bench *b, int unused, struct err *err) {
    struct series s[2];
    size_t chunk_bytes = outer_encoded_bytes(OUTER_INT8, CHUNK);
    uint8_t *data = take_memory(chunk_bytes), set[] = {1};
    struct msg_chunk chunk = {.round = 7, .chunk = 1000, .codec = OUTER_INT8, .weight = 65536,
                              .set = {set, 1}, .data = {data, (uint32_t)chunk_bytes}};
    struct msg_leaves leaves = {.round = 7, .all = take_memory(LEAVES / 8 * 32),
                                .all_count = LEAVES / 8};
    struct messaging m = {.which = RECORD_chunk, .message = &chunk, .repeats = ENCODES};
    (void)unused;
    if (time_messages(&m, run_encode, run_encode_copy, s, err)) return -1;
    double gigabytes = ENCODES * (double)m.encoded.length / GB;
    row_rate(b, "encode a CHUNK of 262144 elements, one core", "GB/s", gigabytes, &s[0],
             "copy into warm memory", gigabytes, &s[1]);
    proto_buffer_release(&m.encoded);
    m.repeats = DECODES;
    if (time_messages(&m, run_decode, run_unpack, s, err)) return -1;
    row_rate(b, "decode a CHUNK (borrows its data), one core", "M msg/s", DECODES / 1e6, &s[0],
             "msgpack-c into objects", DECODES / 1e6, &s[1]);
    proto_buffer_release(&m.encoded);
    m = (struct messaging){.which = RECORD_leaves, .message = &leaves, .repeats = 20};
    if (time_messages(&m, run_decode, run_unpack, s, err)) return -1;
    double digests = 20 * (double)leaves.all_count / 1e6;
    row_rate(b, "decode LEAVES of 8192 digests, one core", "M digests/s", digests, &s[0],
             "msgpack-c into objects", digests, &s[1]);
    proto_buffer_release(&m.encoded);
    free(data);
    free(leaves.all);
    return 0;
}
