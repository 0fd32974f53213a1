/* outer.c - the parts of the outer step, beside a copy of as many bytes. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"
#include "tests/bench/bench.h"

#define OUTER_ELEMENTS (64 * CHUNK)

struct outer {
    int what;
    float *x, *y, *z;
    int64_t *sum;
    uint8_t *bytes;
    size_t chunk_bytes;
    enum outer_codec codec;
};

/* Chunk by chunk, as the agent does it. */
static int run_outer(void *arg, struct err *err) {
    struct outer *o = arg;
    for (size_t i = 0; i < OUTER_ELEMENTS / CHUNK; i++) {
        float *x = o->x + i * CHUNK, *y = o->y + i * CHUNK, *z = o->z + i * CHUNK;
        uint8_t *bytes = o->bytes + i * o->chunk_bytes;
        int64_t *sum = o->sum + i * CHUNK;
        int r = 0;
        switch (o->what) {
        case ENCODE: r = outer_encode(bytes, x, CHUNK, o->codec, err); break;
        case ACCUMULATE:
            r = outer_accumulate(sum, bytes, o->chunk_bytes, CHUNK, o->codec, 1, 1, 30, err);
            break;
        case MEAN: outer_mean(x, sum, CHUNK, 3, 30); break;
        case DECODE:
            r = outer_decode(x, bytes, o->chunk_bytes, CHUNK, o->codec, err);
            break;
        case NESTEROV: outer_nesterov(y, z, x, CHUNK, 0.01f, 0.9f); break;
        }
        if (r) return -1;
    }
    return 0;
}

int bench_outer(struct bench *b, int what, struct err *err) {
    enum outer_codec codec = what & OF_FP4 ? OUTER_FP4 : OUTER_INT8;
    size_t n = OUTER_ELEMENTS, chunk_bytes = outer_encoded_bytes(codec, CHUNK);
    double encoded = (double)chunk_bytes / CHUNK;
    what &= ~OF_FP4;
    /* Bytes of memory that each element must move: read, and written. */
    const struct {
        const char *what;
        double bytes;
    } table[] = {
        [ENCODE] = {"encode", 4 + encoded},       [ACCUMULATE] = {"accumulate", encoded + 8 + 8},
        [MEAN] = {"mean", 8 + 4},                 [DECODE] = {"decode", encoded + 4},
        [NESTEROV] = {"nesterov", 4 + 8 + 8},
    };
    struct outer o = {what, take_floats(n, 0.01f, 1), take_floats(n, 0.02f, 2),
                      take_floats(n, 0.01f, 3), take_memory(n * 8),
                      take_memory(n / CHUNK * chunk_bytes), chunk_bytes, codec};
    struct copy c = copy_of((size_t)(table[what].bytes / 2 * (double)n));
    struct series s[2];
    char text[64];
    memset(o.sum, 0, n * 8);
    for (size_t i = 0; i < n / CHUNK; i++)
        if (outer_encode(o.bytes + i * chunk_bytes, o.x + i * CHUNK, CHUNK, codec, err))
            return -1;
    if (time_on_core((struct task[]){{run_outer, &o, NULL}, {run_copy, &c, NULL}}, s, 2, 0.8, err))
        return -1;
    bool encodes = what == ENCODE || what == ACCUMULATE || what == DECODE;
    snprintf(text, sizeof text, "outer step: %s%s, one core, of fp32", table[what].what,
             !encodes ? "" : codec == OUTER_FP4 ? " fp4" : " int8");
    row_rate(b, text, "GB/s", 4 * (double)n / GB, &s[0], "copy of as many bytes as it moves",
             4 * (double)n / GB, &s[1]);
    free(o.x);
    free(o.y);
    free(o.z);
    free(o.sum);
    free(o.bytes);
    copy_free(&c);
    return 0;
}
