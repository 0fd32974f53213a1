/* memory.c - memory that is warm before it is timed, and copying it: the floor of most rows. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"
#include "tests/bench/bench.h"

void *take_memory(size_t bytes) {
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (p) return memset(p, 1, bytes); /* touched, so that no page is new when it is timed */
    fprintf(stderr, "bench: no memory for %zu bytes\n", bytes);
    exit(1);
}

float *take_floats(size_t n, float std, uint64_t seed) {
    float *x = take_memory(n * sizeof *x);
    outer_init_normal(x, seed, 0, n, std);
    return x;
}

#define COPY_BLOCK ((size_t)64 << 20)

int run_copy(void *arg, struct err *err) {
    struct copy *c = arg;
    (void)err;
    for (size_t at = 0; at < c->bytes; at += COPY_BLOCK)
        memcpy(c->to, c->from, c->bytes - at < COPY_BLOCK ? c->bytes - at : COPY_BLOCK);
    return 0;
}

struct copy copy_of(size_t bytes) {
    return (struct copy){take_memory(COPY_BLOCK), take_memory(COPY_BLOCK), bytes};
}

void copy_free(struct copy *c) {
    free(c->from);
    free(c->to);
}

int bench_memory(struct bench *b, int unused, struct err *err) {
    struct copy c = copy_of(4 * COPY_BLOCK);
    struct series s;
    (void)unused;
    if (time_on_core(&(struct task){run_copy, &c, NULL}, &s, 1, 0.5, err)) return -1;
    row_rate(b, "memory copy, one core, read + written", "GB/s", 2 * (double)c.bytes / GB, &s, NULL,
             0, NULL);
    copy_free(&c);
    return 0;
}
