/* bench.c - how fast the parts are, each beside a floor or a reference: something simpler that
 * moves the same bytes or does the same arithmetic. Both are measured in the same run and in turns,
 * because on a shared machine a rate alone says little. Prints one table and, with --json FILE,
 * writes the same. It judges nothing: no rate is ever a failure.
 *
 * Where a call fails, the program ends with its message; so on that way only the folder of the
 * checkpoints is cleaned up, and not memory. */
#define _GNU_SOURCE /* nftw */
#include <assert.h>
#include <errno.h>
#include <event2/event.h>
#include <fcntl.h>
#include <ftw.h>
#include <getopt.h>
#include <jansson.h>
#include <math.h>
#include <msgpack.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <omp.h>
#include <oneapi/dnnl/dnnl.h>
#include <openssl/evp.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "ckpt/ckpt.h"
#include "kernels/kernels.h"
#include "node/engine.h"
#include "node/model.h"
#include "proto/model.h"
#include "proto/proto.h"
#include "proto/tls.h"

#define ROWS_MAX 64
#define TASKS_MAX 8
#define SAMPLES_MIN 3
#define SAMPLES_MAX 50
#define HURRY_AFTER_S 45 /* on a machine that is busy: one sample each, so that it ends */
#define CHUNK ((size_t)1 << 18) /* elements; run.yaml's default of outer.chunk_elements */
#define GB 1e9
#define MB 1e6

/* ---- rows ------------------------------------------------------------------------------------ */

struct row {
    char what[64], reference[64];
    const char *unit;
    double best, median, reference_rate; /* reference_rate 0: there is none */
    double share;                        /* of the reference; over 1 is better than it */
    int samples;
};

struct bench {
    struct row row[ROWS_MAX];
    int rows, cores;
    char folder[256]; /* for files; removed in the end */
};

/* Few digits where they mean little. */
static const char *number(double x, char out[32]) {
    snprintf(out, 32, "%.*f", x >= 1000 ? 0 : x >= 100 ? 1 : x >= 1 ? 2 : 4, x);
    return out;
}

static void print_head(void) {
    printf("%-48s %10s %10s  %-10s %6s   %s\n", "what", "best", "median", "unit", "share",
           "of, in the same run");
}

static void print_row(const struct row *r) {
    char best[32], median[32], reference[32], share[16] = "";
    if (r->reference_rate > 0) snprintf(share, sizeof share, "%.0f %%", 100 * r->share);
    printf("%-48s %10s %10s  %-10s %6s   ", r->what, number(r->best, best),
           number(r->median, median), r->unit, share);
    if (r->reference_rate > 0)
        printf("%s: %s", r->reference, number(r->reference_rate, reference));
    printf("\n");
    fflush(stdout);
}

static json_t *row_json(const struct row *r) {
    json_t *j = json_pack("{ss sf sf ss si}", "what", r->what, "rate", r->best, "median",
                          r->median, "unit", r->unit, "samples", r->samples);
    bool has = r->reference_rate > 0;
    json_object_set_new(j, "reference", has ? json_string(r->reference) : json_null());
    json_object_set_new(j, "reference_rate", has ? json_real(r->reference_rate) : json_null());
    json_object_set_new(j, "share", has ? json_real(r->share) : json_null());
    return j;
}

/* ---- time ------------------------------------------------------------------------------------ */

struct series {
    int count;
    double value[SAMPLES_MAX];
};

static double clock_s(clockid_t which) {
    struct timespec t;
    clock_gettime(which, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double now_s(void) { return clock_s(CLOCK_MONOTONIC); }

static double started_s; /* when the program did */

static void series_add(struct series *s, double value) {
    if (s->count < SAMPLES_MAX) s->value[s->count++] = value;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double smallest(const struct series *s) {
    struct series sorted = *s;
    qsort(sorted.value, (size_t)sorted.count, sizeof *sorted.value, ascending);
    return sorted.value[0];
}

static double middle(const struct series *s) {
    struct series sorted = *s;
    qsort(sorted.value, (size_t)sorted.count, sizeof *sorted.value, ascending);
    return sorted.value[sorted.count / 2];
}

/* Something to time. reset, which may be NULL, comes before each run and is not timed. */
struct task {
    int (*run)(void *arg, struct err *err);
    void *arg;
    int (*reset)(void *arg, struct err *err);
};

/* Run the tasks in turns, once unmeasured and then until budget_s is over. Of task i, seconds go to
 * wall[i], those of all cores together to cpu[i]. In turns, so that whatever else the machine does
 * meets all of them alike. */
static int time_both(const struct task *task, struct series *wall, struct series *cpu, int count,
                     double budget_s, struct err *err) {
    double end = 0;
    for (int i = 0; i < count; i++) wall[i].count = cpu[i].count = 0;
    for (int turn = 0; turn <= SAMPLES_MAX; turn++) {
        int enough = now_s() > started_s + HURRY_AFTER_S ? 1 : SAMPLES_MIN;
        if (turn > enough && now_s() >= end) break;
        for (int i = 0; i < count; i++) {
            if (task[i].reset && task[i].reset(task[i].arg, err)) return -1;
            double begin = now_s(), cpu_begin = clock_s(CLOCK_PROCESS_CPUTIME_ID);
            if (task[i].run(task[i].arg, err)) return -1;
            if (turn == 0) continue;
            series_add(&wall[i], now_s() - begin);
            series_add(&cpu[i], clock_s(CLOCK_PROCESS_CPUTIME_ID) - cpu_begin);
        }
        if (turn == 0) end = now_s() + (enough > 1 ? budget_s : 0);
    }
    return 0;
}

/* By the clock on the wall, for what several threads do or what waits. */
static int time_in_turns(const struct task *task, struct series *s, int count, double budget_s,
                         struct err *err) {
    struct series cpu[TASKS_MAX];
    assert(count <= TASKS_MAX);
    return time_both(task, s, cpu, count, budget_s, err);
}

/* By the seconds a core worked, for "one core": other programs then take less away. */
static int time_on_core(const struct task *task, struct series *s, int count, double budget_s,
                        struct err *err) {
    struct series wall[TASKS_MAX];
    assert(count <= TASKS_MAX);
    return time_both(task, wall, s, count, budget_s, err);
}

static struct row *row_new(struct bench *b, const char *what, const char *unit,
                           const struct series *s) {
    assert(b->rows < ROWS_MAX);
    struct row *r = &b->row[b->rows++];
    *r = (struct row){.unit = unit, .samples = s->count};
    snprintf(r->what, sizeof r->what, "%s", what);
    return r;
}

/* `work` is in the unit and per sample of s, reference_work the same of the reference, which may be
 * NULL. */
static void row_rate(struct bench *b, const char *what, const char *unit, double work,
                     const struct series *s, const char *name, double reference_work,
                     const struct series *reference) {
    struct row *r = row_new(b, what, unit, s);
    r->best = work / smallest(s);
    r->median = work / middle(s);
    if (reference) {
        snprintf(r->reference, sizeof r->reference, "%s", name);
        r->reference_rate = reference_work / smallest(reference);
        r->share = r->best / r->reference_rate;
    }
    print_row(r);
}

/* A time, so less is better; share is how much of it the reference takes. */
static void row_time(struct bench *b, const char *what, const char *unit, double units_per_s,
                     const struct series *s, const char *name, const struct series *reference) {
    struct row *r = row_new(b, what, unit, s);
    r->best = units_per_s * smallest(s);
    r->median = units_per_s * middle(s);
    if (reference) {
        snprintf(r->reference, sizeof r->reference, "%s", name);
        r->reference_rate = units_per_s * smallest(reference);
        r->share = r->best > 0 ? r->reference_rate / r->best : 1;
    }
    print_row(r);
}

/* ---- memory ---------------------------------------------------------------------------------- */

static void *take_memory(size_t bytes) {
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (p) return memset(p, 1, bytes); /* touched, so that no page is new when it is timed */
    fprintf(stderr, "bench: no memory for %zu bytes\n", bytes);
    exit(1);
}

static uint64_t next_random(uint64_t *state) { /* xorshift64 */
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

static float *take_floats(size_t n, float std, uint64_t seed) {
    float *x = take_memory(n * sizeof *x);
    outer_init_normal(x, seed, 0, n, std);
    return x;
}

/* Copies `bytes` in all, through blocks far larger than a cache. */
struct copy {
    uint8_t *from, *to;
    size_t bytes;
};
#define COPY_BLOCK ((size_t)64 << 20)

static int run_copy(void *arg, struct err *err) {
    struct copy *c = arg;
    (void)err;
    for (size_t at = 0; at < c->bytes; at += COPY_BLOCK)
        memcpy(c->to, c->from, c->bytes - at < COPY_BLOCK ? c->bytes - at : COPY_BLOCK);
    return 0;
}

static struct copy copy_of(size_t bytes) {
    return (struct copy){take_memory(COPY_BLOCK), take_memory(COPY_BLOCK), bytes};
}

static void copy_free(struct copy *c) {
    free(c->from);
    free(c->to);
}

static int bench_memory(struct bench *b, int unused, struct err *err) {
    struct copy c = copy_of(4 * COPY_BLOCK);
    struct series s;
    (void)unused;
    if (time_on_core(&(struct task){run_copy, &c, NULL}, &s, 1, 0.5, err)) return -1;
    row_rate(b, "memory copy, one core, read + written", "GB/s", 2 * (double)c.bytes / GB, &s, NULL,
             0, NULL);
    copy_free(&c);
    return 0;
}

/* ---- outer step ------------------------------------------------------------------------------ */

#define OUTER_ELEMENTS (64 * CHUNK)
enum { ENCODE, ACCUMULATE, MEAN, DECODE, NESTEROV };

struct outer {
    int what;
    float *x, *y, *z;
    int64_t *sum;
    uint8_t *bytes;
    size_t chunk_bytes;
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
        case ENCODE: r = outer_encode(bytes, x, CHUNK, OUTER_INT8, err); break;
        case ACCUMULATE:
            r = outer_accumulate(sum, bytes, o->chunk_bytes, CHUNK, OUTER_INT8, 1, 1, 30, err);
            break;
        case MEAN: outer_mean(x, sum, CHUNK, 3, 30); break;
        case DECODE:
            r = outer_decode(x, bytes, o->chunk_bytes, CHUNK, OUTER_INT8, err);
            break;
        case NESTEROV: outer_nesterov(y, z, x, CHUNK, 0.01f, 0.9f); break;
        }
        if (r) return -1;
    }
    return 0;
}

static int bench_outer(struct bench *b, int what, struct err *err) {
    /* Bytes of memory that each element must move: read, and written. */
    static const struct {
        const char *what;
        double bytes;
    } table[] = {
        [ENCODE] = {"encode int8", 4 + 1.016},    [ACCUMULATE] = {"accumulate", 1.016 + 8 + 8},
        [MEAN] = {"mean", 8 + 4},                 [DECODE] = {"decode int8", 1.016 + 4},
        [NESTEROV] = {"nesterov", 4 + 8 + 8},
    };
    size_t n = OUTER_ELEMENTS, chunk_bytes = outer_encoded_bytes(OUTER_INT8, CHUNK);
    struct outer o = {what, take_floats(n, 0.01f, 1), take_floats(n, 0.02f, 2),
                      take_floats(n, 0.01f, 3), take_memory(n * 8),
                      take_memory(n / CHUNK * chunk_bytes), chunk_bytes};
    struct copy c = copy_of((size_t)(table[what].bytes / 2 * (double)n));
    struct series s[2];
    char text[64];
    memset(o.sum, 0, n * 8);
    for (size_t i = 0; i < n / CHUNK; i++)
        if (outer_encode(o.bytes + i * chunk_bytes, o.x + i * CHUNK, CHUNK, OUTER_INT8, err))
            return -1;
    if (time_on_core((struct task[]){{run_outer, &o, NULL}, {run_copy, &c, NULL}}, s, 2, 0.8, err))
        return -1;
    snprintf(text, sizeof text, "outer step: %s, one core, of fp32", table[what].what);
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

/* ---- digests --------------------------------------------------------------------------------- */

#define DIGEST_ELEMENTS (16 * CHUNK)
#define LEAVES 65536

struct digesting {
    float *anchor, *momentum;
    struct msg_digest_item *leaf;
};

static int run_digest(void *arg, struct err *err) {
    struct digesting *d = arg;
    (void)err;
    for (size_t i = 0; i < DIGEST_ELEMENTS; i += CHUNK) {
        d->leaf[0].digest = digest_of(d->anchor + i, CHUNK * 4);
        d->leaf[1].digest = digest_of(d->momentum + i, CHUNK * 4);
    }
    return 0;
}

static int run_openssl_blake2(void *arg, struct err *err) {
    struct digesting *d = arg;
    uint8_t out[EVP_MAX_MD_SIZE];
    for (size_t i = 0; i < DIGEST_ELEMENTS; i += CHUNK)
        if (!EVP_Digest(d->anchor + i, CHUNK * 4, out, NULL, EVP_blake2b512(), NULL) ||
            !EVP_Digest(d->momentum + i, CHUNK * 4, out, NULL, EVP_blake2b512(), NULL))
            return err_set(err, ERR_UNSUPPORTED, "OpenSSL has no BLAKE2b");
    return 0;
}

static int run_state_tree(void *arg, struct err *err) {
    struct digesting *d = arg;
    (void)err;
    for (size_t i = 0; i < DIGEST_ELEMENTS / CHUNK; i++)
        d->leaf[i].digest = digest_leaf2(i, d->anchor + i * CHUNK, CHUNK * 4,
                                         d->momentum + i * CHUNK, CHUNK * 4);
    d->leaf[0].digest = digest_tree_root(d->leaf, DIGEST_ELEMENTS / CHUNK);
    return 0;
}

static int run_root(void *arg, struct err *err) {
    struct digesting *d = arg;
    (void)err;
    d->leaf[0].digest = digest_tree_root(d->leaf, LEAVES);
    return 0;
}

/* What the tree cannot do without: one digest of two digests and a byte for each inner node. */
static int run_nodes(void *arg, struct err *err) {
    struct digesting *d = arg;
    uint8_t node[65];
    (void)err;
    for (size_t i = 0; i + 1 < LEAVES; i++) {
        memcpy(node, d->leaf[i].digest.b, sizeof node - 33);
        d->leaf[i].digest = digest_of(node, sizeof node);
    }
    return 0;
}

static int bench_digest(struct bench *b, int unused, struct err *err) {
    struct digesting d = {take_memory(DIGEST_ELEMENTS * 4), take_memory(DIGEST_ELEMENTS * 4),
                          take_memory(LEAVES * sizeof *d.leaf)};
    struct task task[] = {{run_digest, &d, NULL}, {run_openssl_blake2, &d, NULL},
                          {run_state_tree, &d, NULL}, {run_root, &d, NULL}, {run_nodes, &d, NULL}};
    double bytes = 2 * DIGEST_ELEMENTS * 4;
    struct series s[5];
    (void)unused;
    if (time_on_core(task, s, 5, 1.5, err)) return -1;
    row_rate(b, "BLAKE2b-256, one core", "GB/s", bytes / GB, &s[0], "OpenSSL's BLAKE2b", bytes / GB,
             &s[1]);
    row_rate(b, "digest tree over anchor and momentum, one core", "GB/s", bytes / GB, &s[2],
             "BLAKE2b of the same", bytes / GB, &s[0]);
    row_rate(b, "digest tree, root of 65536 leaves, one core", "M leaves/s", LEAVES / 1e6, &s[3],
             "its nodes' digests", LEAVES / 1e6, &s[4]);
    free(d.anchor);
    free(d.momentum);
    free(d.leaf);
    return 0;
}

/* ---- messages -------------------------------------------------------------------------------- */

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

static int bench_proto(struct bench *b, int unused, struct err *err) {
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

/* ---- a plain connection, the channel's reference --------------------------------------------- */

/* One end on the loopback; ssl is NULL for bare TCP. Calls block. */
struct wire {
    int fd;
    SSL *ssl;
};

static int wire_put(const struct wire *w, const void *bytes, size_t n) {
    for (const uint8_t *p = bytes; n;) {
        ssize_t put = w->ssl ? SSL_write(w->ssl, p, (int)n) : write(w->fd, p, n);
        if (put <= 0) return -1;
        p += put;
        n -= (size_t)put;
    }
    return 0;
}

static ssize_t wire_get(const struct wire *w, void *out, size_t n) {
    return w->ssl ? SSL_read(w->ssl, out, (int)n) : read(w->fd, out, n);
}

static int loopback_pair(int fd[2], struct err *err) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof a;
    int listening = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
    fd[0] = socket(AF_INET, SOCK_STREAM, 0);
    if (listening < 0 || fd[0] < 0 || bind(listening, (struct sockaddr *)&a, sizeof a) ||
        listen(listening, 1) || getsockname(listening, (struct sockaddr *)&a, &length) ||
        connect(fd[0], (struct sockaddr *)&a, sizeof a) ||
        (fd[1] = accept(listening, NULL, NULL)) < 0)
        return err_set_errno(err, "a connection over the loopback");
    close(listening);
    for (int i = 0; i < 2; i++) setsockopt(fd[i], IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    return 0;
}

/* The receiving thread: a count of bytes, so many bytes, an answer of one byte, and again. */
static void *wire_receive(void *arg) {
    static uint8_t buffer[64 << 10];
    struct wire *w = arg;
    uint64_t left;
    if (w->ssl && SSL_accept(w->ssl) != 1) return NULL; /* the other side will notice */
    while (wire_get(w, &left, sizeof left) == (ssize_t)sizeof left) {
        while (left) {
            ssize_t got = wire_get(w, buffer, left < sizeof buffer ? left : sizeof buffer);
            if (got <= 0) return NULL;
            left -= (uint64_t)got;
        }
        if (wire_put(w, "a", 1)) return NULL;
    }
    return NULL;
}

struct sending {
    struct wire near, far;
    pthread_t thread;
    uint8_t *data;
    size_t piece, pieces; /* what one call to write() or SSL_write() is given, and how many */
};

static int run_wire(void *arg, struct err *err) {
    struct sending *w = arg;
    uint64_t bytes = w->piece * w->pieces;
    char answer;
    int failed = wire_put(&w->near, &bytes, sizeof bytes);
    for (size_t i = 0; i < w->pieces && !failed; i++)
        failed = wire_put(&w->near, w->data, w->piece);
    if (failed || wire_get(&w->near, &answer, 1) != 1)
        return err_set(err, ERR_IO, "the plain connection over the loopback broke");
    return 0;
}

/* ssl: NULL for TCP, else TLS as the channel configures it. */
static int wire_open(struct sending *w, SSL_CTX *ssl, struct err *err) {
    int fd[2];
    if (loopback_pair(fd, err)) return -1;
    w->near = (struct wire){fd[0], ssl ? SSL_new(ssl) : NULL};
    w->far = (struct wire){fd[1], ssl ? SSL_new(ssl) : NULL};
    if (ssl && (!SSL_set_fd(w->near.ssl, fd[0]) || !SSL_set_fd(w->far.ssl, fd[1])))
        return err_set(err, ERR_MEMORY, "no memory for a TLS connection");
    if (pthread_create(&w->thread, NULL, wire_receive, &w->far))
        return err_set(err, ERR_MEMORY, "no thread for a TLS connection");
    if (ssl && SSL_connect(w->near.ssl) != 1)
        return err_set(err, ERR_IO, "the plain TLS connection over the loopback was not made");
    return 0;
}

static void wire_close(struct sending *w) {
    shutdown(w->near.fd, SHUT_RDWR);
    pthread_join(w->thread, NULL);
    SSL_free(w->near.ssl);
    SSL_free(w->far.ssl);
    close(w->near.fd);
    close(w->far.fd);
}

/* ---- the channel ----------------------------------------------------------------------------- */

#define UNSENT_BYTES (4u << 20) /* queued at once */

/* One end of the channel, with an event_base that one thread alone runs. */
struct end {
    struct identity identity;
    struct event_base *base;
    struct channel_context *context;
    struct channel *channel;
    struct err why;
    bool open, closed;
    /* the sender's */
    uint8_t type;
    const void *message, *last; /* the last one asks for an answer */
    uint32_t messages, left;
    bool answered;
};

static void pump(struct end *e) {
    while (e->left && !e->closed && channel_unsent_bytes(e->channel) < UNSENT_BYTES) {
        const void *message = --e->left ? e->message : e->last;
        if (channel_send(e->channel, e->type, 1, 2, 3, message, &e->why)) e->closed = true;
    }
}

static bool on_open(void *arg, struct channel *ch, const struct proto_key *key) {
    struct end *e = arg;
    (void)key;
    e->channel = ch;
    e->open = true;
    channel_set_frame_bytes_max(ch, PROTO_FRAME_BYTES_MAX);
    return true;
}

/* The sender hears answers only; the receiver answers what is marked as the last. */
static void on_message(void *arg, struct channel *ch, const struct frame *f, const void *msg) {
    struct end *e = arg;
    bool last = (f->type == MSG_CHUNK && ((const struct msg_chunk *)msg)->round) ||
                (f->type == MSG_HEARTBEAT && ((const struct msg_heartbeat *)msg)->step);
    struct msg_heartbeat_ack answer = {0};
    if (f->type == MSG_HEARTBEAT_ACK) e->answered = true;
    if (last) channel_send(ch, MSG_HEARTBEAT_ACK, 1, 2, 3, &answer, NULL);
}

static void on_close(void *arg, struct channel *ch, const struct err *why) {
    struct end *e = arg;
    (void)ch;
    e->why = *why;
    e->closed = true;
    event_base_loopbreak(e->base);
}

static void on_drained(void *arg, struct channel *ch) {
    (void)ch;
    pump(arg);
}

static const struct channel_ops channel_ops = {on_open, on_message, on_close, on_drained};

static void on_accept(void *arg, int fd) {
    struct end *e = arg;
    if (!channel_accept(e->base, e->context, fd, &channel_ops, e, &e->why))
        event_base_loopbreak(e->base);
}

static void *end_main(void *arg) {
    event_base_dispatch(((struct end *)arg)->base);
    return NULL;
}

static int end_init(struct end *e, struct err *err) {
    *e = (struct end){.base = event_base_new()};
    if (!e->base) return err_set(err, ERR_MEMORY, "no event loop");
    identity_create(&e->identity);
    e->context = channel_context_create(&e->identity, err);
    return e->context ? 0 : -1;
}

static void end_release(struct end *e) {
    channel_context_destroy(e->context);
    event_base_free(e->base);
    identity_release(&e->identity);
}

static int end_failed(const struct end *e, struct err *err) {
    return err_set(err, ERR_IO, "the channel over the loopback broke: %.200s", e->why.msg);
}

static int run_channel(void *arg, struct err *err) {
    struct end *e = arg;
    e->left = e->messages;
    e->answered = false;
    pump(e);
    while (!e->answered && !e->closed) event_base_loop(e->base, EVLOOP_ONCE);
    return e->closed ? end_failed(e, err) : 0;
}

struct link {
    struct end near, far;
    struct listener *listener;
    pthread_t thread;
};

static int link_open(struct link *l, struct err *err) {
    uint16_t port = 0;
    if (end_init(&l->near, err) || end_init(&l->far, err)) return -1;
    l->listener = listener_create(l->far.base, "127.0.0.1", &port, on_accept, &l->far, err);
    if (!l->listener) return -1;
    if (pthread_create(&l->thread, NULL, end_main, &l->far))
        return err_set(err, ERR_MEMORY, "no thread for a channel");
    struct end *e = &l->near;
    if (!channel_dial(e->base, e->context, "127.0.0.1", port, &channel_ops, e, err)) return -1;
    while (!e->open && !e->closed) event_base_loop(e->base, EVLOOP_ONCE);
    return e->closed ? end_failed(e, err) : 0;
}

static void link_close(struct link *l) {
    channel_close(l->near.channel, false);
    pthread_join(l->thread, NULL); /* its channel has been closed by us */
    listener_destroy(l->listener);
    end_release(&l->near);
    end_release(&l->far);
}

#define RECORD_BYTES 16384 /* of TLS */

/* As TLS does it: a record, a nonce and a tag at a time. */
static int run_aes(void *arg, struct err *err) {
    struct sending *w = arg;
    static uint8_t out[RECORD_BYTES], key[16], nonce[12], tag[16];
    EVP_CIPHER_CTX *c = EVP_CIPHER_CTX_new();
    int n, ok = c && EVP_EncryptInit_ex(c, EVP_aes_128_gcm(), NULL, key, nonce);
    for (size_t at = 0; ok && at < w->piece * w->pieces; at += RECORD_BYTES) {
        memcpy(nonce, &at, sizeof at);
        ok = EVP_EncryptInit_ex(c, NULL, NULL, NULL, nonce) &&
             EVP_EncryptUpdate(c, out, &n, w->data, RECORD_BYTES) &&
             EVP_EncryptFinal_ex(c, out, &n) &&
             EVP_CIPHER_CTX_ctrl(c, EVP_CTRL_GCM_GET_TAG, sizeof tag, tag);
    }
    EVP_CIPHER_CTX_free(c);
    return ok ? 0 : err_set(err, ERR_UNSUPPORTED, "OpenSSL has no AES-128-GCM");
}

static int time_chunks(struct bench *b, struct link *l, struct sending *tcp, struct sending *tls,
                       struct err *err) {
    struct series s[4], cpu[4];
    size_t chunk_bytes = outer_encoded_bytes(OUTER_INT8, CHUNK);
    struct msg_chunk chunk = {.data = {tcp->data, (uint32_t)chunk_bytes}}, last = chunk;
    last.round = 1;
    l->near.type = MSG_CHUNK;
    l->near.message = &chunk;
    l->near.last = &last;
    l->near.messages = 200;
    tcp->piece = tls->piece = RECORD_BYTES;
    tcp->pieces = tls->pieces = l->near.messages * chunk_bytes / RECORD_BYTES;
    struct task task[] = {{run_channel, &l->near, NULL}, {run_wire, tls, NULL},
                          {run_wire, tcp, NULL}, {run_aes, tls, NULL}};
    if (time_both(task, s, cpu, 4, 3, err)) return -1;
    double sent = (double)l->near.messages * (double)chunk_bytes / MB;
    double moved = (double)(tcp->piece * tcp->pieces) / MB;
    row_rate(b, "bare TCP, loopback, two threads", "MB/s", moved, &s[2], NULL, 0, NULL);
    row_rate(b, "AES-128-GCM, one core", "MB/s", moved, &cpu[3], NULL, 0, NULL);
    row_rate(b, "OpenSSL alone, loopback, two threads", "MB/s", moved, &s[1], "bare TCP", moved,
             &s[2]);
    row_rate(b, "channel: CHUNKs one way, two threads", "MB/s", sent, &s[0], "OpenSSL alone", moved,
             &s[1]);
    row_rate(b, "    per second that a core works, both ends", "MB/s", sent, &cpu[0],
             "OpenSSL alone", moved, &cpu[1]);
    return 0;
}

static int time_small(struct bench *b, struct link *l, struct sending *tls, struct err *err) {
    struct series s[2];
    struct msg_heartbeat beat = {.progress = 123456, .loss = 2.5, .tokens_per_s = 1e4}, last = beat;
    struct proto_buffer bytes;
    last.step = 1;
    proto_buffer_init(&bytes, 1024);
    if (proto_encode(&bytes, RECORD_heartbeat, &beat, err)) return -1;
    l->near.type = MSG_HEARTBEAT;
    l->near.message = &beat;
    l->near.last = &last;
    l->near.messages = 30000;
    tls->piece = PROTO_FRAME_HEADER_BYTES + bytes.length;
    tls->pieces = l->near.messages;
    proto_buffer_release(&bytes);
    if (time_in_turns((struct task[]){{run_channel, &l->near, NULL}, {run_wire, tls, NULL}}, s, 2,
                      1.5, err))
        return -1;
    double messages = (double)l->near.messages;
    row_rate(b, "channel: HEARTBEATs one way, two threads", "msg/s", messages, &s[0],
             "OpenSSL alone, one write each", messages, &s[1]);
    return 0;
}

static int bench_channel(struct bench *b, int unused, struct err *err) {
    struct link l;
    uint8_t *data = take_memory(outer_encoded_bytes(OUTER_INT8, CHUNK));
    struct sending tcp = {.data = data}, tls = {.data = data};
    (void)unused;
    if (link_open(&l, err)) return -1;
    SSL_CTX *ssl = tls_context_create(&l.near.identity, err);
    if (!ssl || wire_open(&tcp, NULL, err) || wire_open(&tls, ssl, err)) return -1;
    if (time_chunks(b, &l, &tcp, &tls, err) || time_small(b, &l, &tls, err)) return -1;
    wire_close(&tcp);
    wire_close(&tls);
    link_close(&l);
    SSL_CTX_free(ssl);
    free(data);
    return 0;
}

/* ---- matrix products ------------------------------------------------------------------------- */

/* The products of one layer, [rows,in] x [out,in]. */
enum { FORWARD, INPUT, WEIGHT, PLAIN, DIRECTIONS };
#define PRODUCTS 4

struct layer {
    struct kernels *k;
    int rows, in[PRODUCTS], out[PRODUCTS];
    float *x[PRODUCTS], *w[PRODUCTS], *y[PRODUCTS];
};

static int run_forward(void *arg, struct err *err) {
    struct layer *l = arg;
    for (int i = 0; i < PRODUCTS; i++)
        l->k->matmul_forward(l->k, l->y[i], l->x[i], l->w[i], l->rows, l->in[i], l->out[i]);
    return l->k->check(l->k, err);
}

static int run_backward_input(void *arg, struct err *err) {
    struct layer *l = arg;
    for (int i = 0; i < PRODUCTS; i++)
        l->k->matmul_backward_input(l->k, l->x[i], l->y[i], l->w[i], l->rows, l->in[i], l->out[i],
                                    KERNELS_SET);
    return l->k->check(l->k, err);
}

static int run_backward_weight(void *arg, struct err *err) {
    struct layer *l = arg;
    for (int i = 0; i < PRODUCTS; i++)
        l->k->matmul_backward_weight(l->k, l->w[i], l->y[i], l->x[i], l->rows, l->in[i], l->out[i],
                                     KERNELS_SET);
    return l->k->check(l->k, err);
}

/* y = x * w, nothing transposed, straight from oneDNN. */
static int plain_product(float *y, const float *x, const float *w, int rows, int in, int out,
                         struct err *err) {
    if (dnnl_sgemm('N', 'N', rows, out, in, 1, x, in, w, out, 0, y, out) == dnnl_success) return 0;
    return err_set(err, ERR_UNSUPPORTED, "dnnl_sgemm failed");
}

static int run_plain(void *arg, struct err *err) {
    struct layer *l = arg;
    for (int i = 0; i < PRODUCTS; i++)
        if (plain_product(l->y[i], l->x[i], l->w[i], l->rows, l->in[i], l->out[i], err)) return -1;
    return 0;
}

static double layer_init(struct layer *l, const struct msg_model *m, int rows) {
    int C = (int)m->width, F = (int)m->ffn, kv = C / (int)m->heads * (int)m->kv_heads;
    int in[PRODUCTS] = {C, C, C, F}, out[PRODUCTS] = {C + 2 * kv, C, 2 * F, C};
    double flop = 0;
    l->rows = rows;
    for (int i = 0; i < PRODUCTS; i++) {
        l->in[i] = in[i];
        l->out[i] = out[i];
        l->x[i] = take_floats((size_t)rows * (size_t)in[i], 1, 1);
        l->w[i] = take_floats((size_t)in[i] * (size_t)out[i], 0.02f, 2);
        l->y[i] = take_floats((size_t)rows * (size_t)out[i], 1, 3);
        flop += 2.0 * rows * in[i] * out[i];
    }
    return flop;
}

static void layer_release(struct layer *l) {
    for (int i = 0; i < PRODUCTS; i++) {
        free(l->x[i]);
        free(l->w[i]);
        free(l->y[i]);
    }
}

static int bench_matmul(struct bench *b, int preset, struct err *err) {
    static const char *const names[] = {"debug", "150m"};
    static const char *const directions[] = {"forward", "dx", "dw"};
    struct layer l;
    struct msg_model m;
    struct series s[DIRECTIONS];
    char text[64];
    if (proto_model_preset(names[preset], &m, err)) return -1;
    if (!(l.k = kernels_cpu_create(1, err))) return -1;
    omp_set_num_threads(1);
    double gigaflop = layer_init(&l, &m, 1024) / 1e9;
    struct task task[DIRECTIONS] = {{run_forward, &l, NULL}, {run_backward_input, &l, NULL},
                                    {run_backward_weight, &l, NULL}, {run_plain, &l, NULL}};
    if (time_on_core(task, s, DIRECTIONS, 2, err)) return -1;
    for (int i = FORWARD; i <= WEIGHT; i++) {
        snprintf(text, sizeof text, "matmul fp32, a layer of %s, %s, one core", names[preset],
                 directions[i]);
        row_rate(b, text, "GFLOP/s", gigaflop, &s[i], "dnnl_sgemm, not transposed", gigaflop,
                 &s[PLAIN]);
    }
    layer_release(&l);
    l.k->destroy(l.k);
    return 0;
}

/* ---- inner training -------------------------------------------------------------------------- */

#define SQUARE 1024
#define STEP_TOKENS_MAX 2048 /* AdamW, once a step, is then 2 % of 10m's time, not less */

struct training {
    struct engine *engine;
    int32_t *tokens;
    uint32_t samples;
    int threads;
    float *a, *b, *c; /* [SQUARE,SQUARE] */
};

static int run_step(void *arg, struct err *err) {
    struct training *t = arg;
    struct engine_result r;
    return engine_step(t->engine, t->tokens, t->samples, 1000000, &r, err);
}

static int run_square(void *arg, struct err *err) {
    struct training *t = arg;
    omp_set_num_threads(t->threads);
    return plain_product(t->c, t->a, t->b, SQUARE, SQUARE, SQUARE, err);
}

/* Causal, forward and backward, of one token: 6 for each weight of a matrix that is multiplied with
 * (an embedding is looked up, unless it is the head too), and 12 C per layer and key in attention,
 * where a token has (T + 1) / 2 keys on average. */
static double flop_per_token(const struct msg_model *m) {
    double matrices = 0;
    for (uint32_t i = 0; i < proto_model_tensor_count(m); i++) {
        struct proto_tensor t;
        proto_model_tensor(m, i, &t);
        if (t.dims == 2 && (t.role != MODEL_EMBED || m->tied)) matrices += (double)t.count;
    }
    return 6 * matrices + 12.0 * m->width * m->layers * (m->sequence + 1) / 2;
}

static int training_init(struct training *t, const char *preset, const struct kernels *k,
                         struct msg_model *m, struct err *err) {
    struct msg_inner inner;
    float std;
    uint64_t random = 1;
    if (proto_model_preset(preset, m, err) ||
        proto_inner_preset(preset, 1000000000, &inner, &std, err))
        return -1;
    if (!(t->engine = engine_create(m, &inner, k, err))) return -1;
    size_t n = engine_elements(t->engine), ids = (size_t)inner.batch * (m->sequence + 1);
    float *params = take_memory(n * sizeof *params);
    model_init_elements(m, std, 1, 0, n, params);
    engine_params_write(t->engine, 0, n, params);
    free(params);
    t->samples = inner.batch;
    while (t->samples * m->sequence > STEP_TOKENS_MAX) t->samples /= 2;
    t->tokens = take_memory(ids * sizeof *t->tokens);
    for (size_t i = 0; i < ids; i++)
        t->tokens[i] = (int32_t)(next_random(&random) % m->vocabulary);
    return 0;
}

/* threads: 1 or 2. */
static int train(struct bench *b, const char *preset, int threads, struct err *err) {
    struct training t = {.threads = threads};
    struct msg_model m;
    struct series s[2];
    char text[64];
    struct kernels *k = kernels_cpu_create(threads, err);
    if (!k || training_init(&t, preset, k, &m, err)) return -1;
    size_t square = (size_t)SQUARE * SQUARE;
    t.a = take_floats(square, 1, 1);
    t.b = take_floats(square, 1, 2);
    t.c = take_floats(square, 1, 3);
    struct task task[] = {{run_step, &t, NULL}, {run_square, &t, NULL}};
    int (*timer)(const struct task *, struct series *, int, double, struct err *) =
        threads == 1 ? time_on_core : time_in_turns;
    if (timer(task, s, 2, 2, err)) return -1;
    double tokens = (double)t.samples * m.sequence, flop = flop_per_token(&m);
    double product = 2.0 * SQUARE * SQUARE * SQUARE;
    const char *on = threads == 1 ? "one core" : "two threads";
    snprintf(text, sizeof text, "training, preset %s, %s", preset, on);
    row_rate(b, text, "tokens/s", tokens, &s[0], "as dnnl_sgemm would", product / flop, &s[1]);
    snprintf(text, sizeof text, "    causal model FLOP/s, %s, %s", preset, on);
    row_rate(b, text, "GFLOP/s", tokens * flop / 1e9, &s[0], "dnnl_sgemm, 1024 x 1024 x 1024",
             product / 1e9, &s[1]);
    free(t.a);
    free(t.b);
    free(t.c);
    free(t.tokens);
    engine_destroy(t.engine);
    k->destroy(k);
    return 0;
}

static int bench_debug(struct bench *b, int threads, struct err *err) {
    return threads <= b->cores ? train(b, "debug", threads, err) : 0;
}

static int bench_10m(struct bench *b, int threads, struct err *err) {
    return threads <= b->cores ? train(b, "10m", threads, err) : 0;
}

/* ---- checkpoints ----------------------------------------------------------------------------- */

#define WAIT_MS_MAX 60000

/* A run of its own: keys, genesis, a ledger with nothing but the genesis. */
struct saving {
    struct identity root, online;
    struct proto_buffer genesis, delegation, entry;
    struct proto_sig delegation_sig;
    struct msg_signed_entry ledger;
    struct digest run;
    struct msg_model model;
    size_t n;
    float *anchor, *momentum, *got;
    struct ckpt_store *store;
    struct engine *engine;
    struct series longest_call, longest_other, longest_write; /* seconds, one for each run */
    double call, other, write; /* the longest of the present run */
    char store_path[300], plain_path[300], state_path[300];
};

static struct proto_bytes bytes_of(const struct proto_buffer *b) {
    return (struct proto_bytes){b->data, (uint32_t)b->length};
}

static int encode(struct proto_buffer *b, enum proto_record which, const void *r, struct err *err) {
    proto_buffer_init(b, PROTO_BLOB_BYTES_MAX);
    return proto_encode(b, which, r, err);
}

static int make_run(struct saving *s, struct err *err) {
    struct msg_inner inner;
    float std;
    struct msg_outer outer = {.inner_steps = 1, .chunk_elements = CHUNK, .fragments = 1};
    struct msg_corpus corpus = {.tokenizer = proto_str("bytes"), .samples = 1000};
    if (proto_model_preset("10m", &s->model, err) ||
        proto_inner_preset("10m", 1000000000, &inner, &std, err))
        return -1;
    identity_create(&s->root);
    identity_create(&s->online);
    struct msg_genesis g = {.version = 1, .name = proto_str("bench"), .root_key = s->root.key,
                            .model = &s->model, .model_count = 1, .inner = &inner, .inner_count = 1,
                            .outer = &outer, .outer_count = 1, .corpus = &corpus, .corpus_count = 1,
                            .init_std = std};
    if (encode(&s->genesis, RECORD_genesis, &g, err)) return -1;
    s->run = digest_of(s->genesis.data, s->genesis.length);
    struct msg_delegation d = {.run = s->run, .key = s->online.key, .number = 1};
    struct msg_entry e = {.kind = LEDGER_GENESIS, .body = bytes_of(&s->genesis)};
    if (encode(&s->delegation, RECORD_delegation, &d, err) ||
        encode(&s->entry, RECORD_entry, &e, err))
        return -1;
    proto_sign(&s->root, "delegation", &s->run, 0, s->delegation.data, s->delegation.length,
               &s->delegation_sig);
    s->ledger.bytes = bytes_of(&s->entry);
    proto_sign(&s->root, "ledger", &s->run, 0, s->entry.data, s->entry.length,
               &s->ledger.signature);
    return 0;
}

static void note_longest(double *longest, double begin) {
    double took = now_s() - begin;
    if (took > *longest) *longest = took;
}

/* Wait until the state is not `before` any more. */
static enum ckpt_state wait_past(struct saving *s, struct ckpt_writer *w, enum ckpt_state before,
                                 struct err *err) {
    for (;;) {
        struct pollfd p = {.fd = ckpt_writer_fd(w), .events = POLLIN};
        double begin = now_s();
        enum ckpt_state now = ckpt_writer_poll(w, err);
        note_longest(&s->call, begin);
        if (now != before) return now;
        if (poll(&p, 1, WAIT_MS_MAX) != 1) {
            err_set(err, ERR_TIMEOUT, "the checkpoint writer does nothing for %d ms", WAIT_MS_MAX);
            return CKPT_FAILED;
        }
    }
}

static int put_all(struct saving *s, struct ckpt_writer *w, struct err *err) {
    for (size_t first = 0; first < s->n; first += CHUNK) {
        size_t n = s->n - first < CHUNK ? s->n - first : CHUNK;
        while (ckpt_writer_backlog_bytes(w) >= CKPT_BACKLOG_BYTES) usleep(1000);
        double begin = now_s();
        int r = ckpt_writer_put(w, first, n, s->anchor + first, s->momentum + first, err);
        note_longest(&s->call, begin);
        if (r) return -1;
    }
    return 0;
}

static int sign_and_publish(struct saving *s, struct ckpt_writer *w, struct err *err) {
    size_t n;
    struct proto_sig sig;
    const void *manifest = ckpt_writer_manifest(w, &n);
    proto_sign(&s->online, "manifest", &s->run, 7, manifest, n, &sig);
    return ckpt_writer_publish(w, 7, &sig, &s->online.key, bytes_of(&s->delegation),
                               &s->delegation_sig, err);
}

static int write_all(struct saving *s, struct ckpt_writer *w, struct err *err) {
    if (put_all(s, w, err)) return -1;
    double begin = now_s();
    if (ckpt_writer_finish(w, err)) return -1;
    note_longest(&s->other, begin);
    if (wait_past(s, w, CKPT_FINISHING, err) != CKPT_UNSIGNED) return -1;
    begin = now_s();
    if (sign_and_publish(s, w, err)) return -1;
    note_longest(&s->other, begin);
    return wait_past(s, w, CKPT_PUBLISHING, err) == CKPT_PUBLISHED ? 0 : -1;
}

static int run_write(void *arg, struct err *err) {
    struct saving *s = arg;
    struct ckpt_meta meta = {.state_root = digest_of("state", 5), .genesis = bytes_of(&s->genesis),
                             .ledger = &s->ledger, .ledger_count = 1};
    s->call = s->other = 0;
    double begin = now_s();
    struct ckpt_writer *w = ckpt_writer_create(s->store, &meta, 0, err);
    if (!w) return -1;
    note_longest(&s->other, begin);
    int r = write_all(s, w, err);
    begin = now_s();
    ckpt_writer_destroy(w);
    note_longest(&s->other, begin);
    series_add(&s->longest_call, s->call);
    series_add(&s->longest_other, s->other);
    return r;
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *at) {
    (void)st, (void)type, (void)at;
    return remove(path);
}

/* The same index again and again, so the last one has to go. */
static int reset_write(void *arg, struct err *err) {
    struct saving *s = arg;
    if (s->store) s->store->ops->close(s->store);
    nftw(s->store_path, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    s->store = ckpt_store_open(s->store_path, true, err);
    return s->store ? 0 : -1;
}

static int run_hash(void *arg, struct err *err) {
    struct saving *s = arg;
    (void)err;
    s->ledger.signature.b[0] ^= digest_of(s->anchor, s->n * 4).b[0] & 1;
    s->ledger.signature.b[0] ^= digest_of(s->momentum, s->n * 4).b[0] & 1;
    return 0;
}

static int reset_plain(void *arg, struct err *err) {
    struct saving *s = arg;
    return unlink(s->plain_path) && errno != ENOENT ? err_set_errno(err, "%s", s->plain_path) : 0;
}

/* Anchor and momentum into one file, then fsync. */
static int run_plain_write(void *arg, struct err *err) {
    struct saving *s = arg;
    int fd = open(s->plain_path, O_WRONLY | O_CREAT | O_TRUNC, 0600), r = 0;
    if (fd < 0) return err_set_errno(err, "%s", s->plain_path);
    s->write = 0;
    for (size_t first = 0; first < s->n && !r; first += CHUNK) {
        size_t bytes = 4 * (s->n - first < CHUNK ? s->n - first : CHUNK);
        double begin = now_s();
        if (write(fd, s->anchor + first, bytes) != (ssize_t)bytes ||
            write(fd, s->momentum + first, bytes) != (ssize_t)bytes)
            r = err_set_errno(err, "%s: write", s->plain_path);
        note_longest(&s->write, begin);
    }
    if (!r && fsync(fd)) r = err_set_errno(err, "%s: fsync", s->plain_path);
    close(fd);
    series_add(&s->longest_write, s->write);
    return r;
}

/* What a checkpoint costs without being one. */
static int run_plain_write_hash(void *arg, struct err *err) {
    return run_plain_write(arg, err) || run_hash(arg, err) ? -1 : 0;
}

static int run_plain_read(void *arg, struct err *err) {
    struct saving *s = arg;
    int fd = open(s->plain_path, O_RDONLY), r = 0;
    if (fd < 0) return err_set_errno(err, "%s", s->plain_path);
    for (size_t first = 0; first < s->n && !r; first += CHUNK) {
        size_t bytes = 4 * (s->n - first < CHUNK ? s->n - first : CHUNK);
        if (read(fd, s->got + first, bytes) != (ssize_t)bytes ||
            read(fd, s->got + first, bytes) != (ssize_t)bytes)
            r = err_set_errno(err, "%s: read", s->plain_path);
    }
    close(fd);
    return r;
}

static int run_verify(void *arg, struct err *err) {
    struct saving *s = arg;
    struct ckpt *c = ckpt_open(s->store_path, &s->run, err);
    int r = c ? ckpt_verify(c, NULL, NULL, err) : -1;
    ckpt_close(c);
    return r;
}

static int run_reload(void *arg, struct err *err) {
    struct saving *s = arg;
    struct ckpt *c = ckpt_open(s->store_path, &s->run, err);
    int r = c ? 0 : -1;
    for (size_t first = 0; first < s->n && !r; first += CHUNK) {
        size_t n = s->n - first < CHUNK ? s->n - first : CHUNK;
        r = ckpt_read(c, CKPT_ANCHOR, first, n, s->got + first, err) ||
            ckpt_read(c, CKPT_MOMENTUM, first, n, s->got + first, err) ? -1 : 0;
    }
    ckpt_close(c);
    return r;
}

static int run_state_save(void *arg, struct err *err) {
    struct saving *s = arg;
    return engine_save(s->engine, s->state_path, 1, err);
}

static int run_state_load(void *arg, struct err *err) {
    struct saving *s = arg;
    uint64_t tag;
    return engine_load(s->engine, s->state_path, &tag, err);
}

/* The series of runs whose first one, unmeasured by time_in_turns(), is in it too. */
static void drop_first(struct series *s) {
    memmove(s->value, s->value + 1, (size_t)--s->count * sizeof *s->value);
}

static int time_checkpoints(struct bench *b, struct saving *s, struct err *err) {
    struct series t[2];
    struct task task[] = {{run_write, s, reset_write}, {run_plain_write_hash, s, reset_plain}};
    double megabytes = 8 * (double)s->n / MB;
    if (time_in_turns(task, t, 2, 3, err)) return -1;
    drop_first(&s->longest_call);
    drop_first(&s->longest_other);
    drop_first(&s->longest_write);
    static const char *const plain = "plain write, fsync, BLAKE2b";
    row_time(b, "checkpoint of 10m: create to published", "s", 1, &t[0], plain, &t[1]);
    row_rate(b, "    the same", "MB/s", megabytes, &t[0], plain, megabytes, &t[1]);
    row_time(b, "    longest call of put or poll, 2 MiB each", "ms", 1e3, &s->longest_call,
             "longest plain write of as much", &s->longest_write);
    row_time(b, "    longest of create, finish, publish, destroy", "ms", 1e3, &s->longest_other,
             NULL, NULL);
    struct task verify[] = {{run_verify, s, NULL}, {run_hash, s, NULL}};
    if (time_in_turns(verify, t, 2, 1, err)) return -1;
    row_rate(b, "checkpoint of 10m: open, read, verify all", "MB/s", megabytes, &t[0],
             "BLAKE2b in memory", megabytes, &t[1]);
    struct task reload[] = {{run_reload, s, NULL}, {run_plain_read, s, NULL}};
    if (time_in_turns(reload, t, 2, 1, err)) return -1;
    row_rate(b, "checkpoint of 10m: open, reload anchor, momentum", "MB/s", megabytes, &t[0],
             "plain read", megabytes, &t[1]);
    return 0;
}

/* What a trainer saves for itself: parameters and both moments. */
static int time_trainer_state(struct bench *b, struct saving *s, struct err *err) {
    struct series t[4];
    struct msg_inner inner;
    float std;
    struct kernels *k = kernels_cpu_create(1, err);
    if (!k || proto_inner_preset("10m", 1000000000, &inner, &std, err)) return -1;
    if (!(s->engine = engine_create(&s->model, &inner, k, err))) return -1;
    struct task task[] = {{run_state_save, s, NULL}, {run_plain_write_hash, s, reset_plain},
                          {run_state_load, s, NULL}, {run_hash, s, NULL}};
    if (time_in_turns(task, t, 4, 2, err)) return -1;
    double megabytes = 12 * (double)s->n / MB, plain = 8 * (double)s->n / MB;
    row_rate(b, "trainer's own state of 10m: save, with fsync", "MB/s", megabytes, &t[0],
             "plain write, fsync, BLAKE2b", plain, &t[1]);
    row_rate(b, "trainer's own state of 10m: load, with digest", "MB/s", megabytes, &t[2],
             "BLAKE2b in memory", plain, &t[3]);
    engine_destroy(s->engine);
    k->destroy(k);
    return 0;
}

static int bench_checkpoint(struct bench *b, int unused, struct err *err) {
    struct saving s = {0};
    (void)unused;
    if (make_run(&s, err)) return -1;
    s.n = (size_t)proto_model_elements(&s.model);
    s.anchor = take_floats(s.n, 0.02f, 1);
    s.momentum = take_floats(s.n, 0.01f, 2);
    s.got = take_memory(s.n * 4);
    snprintf(s.store_path, sizeof s.store_path, "%s/store", b->folder);
    snprintf(s.plain_path, sizeof s.plain_path, "%s/plain", b->folder);
    snprintf(s.state_path, sizeof s.state_path, "%s/state", b->folder);
    if (time_checkpoints(b, &s, err) || time_trainer_state(b, &s, err)) return -1;
    s.store->ops->close(s.store);
    proto_buffer_release(&s.genesis);
    proto_buffer_release(&s.delegation);
    proto_buffer_release(&s.entry);
    free(s.anchor);
    free(s.momentum);
    free(s.got);
    return 0;
}

/* ---- main ------------------------------------------------------------------------------------ */

static const struct {
    const char *name;
    int (*run)(struct bench *b, int arg, struct err *err);
    int arg;
} cases[] = {
    {"memory", bench_memory, 0},
    {"outer.encode", bench_outer, ENCODE},
    {"outer.accumulate", bench_outer, ACCUMULATE},
    {"outer.mean", bench_outer, MEAN},
    {"outer.decode", bench_outer, DECODE},
    {"outer.nesterov", bench_outer, NESTEROV},
    {"digest", bench_digest, 0},
    {"proto", bench_proto, 0},
    {"channel", bench_channel, 0},
    {"matmul.debug", bench_matmul, 0},
    {"matmul.150m", bench_matmul, 1},
    {"train.debug.1", bench_debug, 1},
    {"train.debug.2", bench_debug, 2},
    {"train.10m.1", bench_10m, 1},
    {"train.10m.2", bench_10m, 2},
    {"checkpoint", bench_checkpoint, 0},
};
#define CASES (sizeof cases / sizeof *cases)

static const char help[] =
    "bench [options]\n"
    "\n"
    "Measure how fast the parts are, in turns with a floor or a reference, and print a table.\n"
    "best: of several samples; share: best beside the reference's best, over 100 % is better.\n"
    "Rates of \"one core\" count the seconds that it worked, all others those that passed.\n"
    "It takes about a minute and wants the machine for itself.\n"
    "\n"
    "  --only NAME   these rows only; NAME may end at a dot: \"outer\" is all of outer.*\n"
    "  --json FILE   write the table to FILE too\n"
    "  --dir DIR     where to write the checkpoints, on the disk that matters\n"
    "                (default: $TMPDIR, else /tmp)\n"
    "  --help        this text\n"
    "\n"
    "NAME is one of:";

static void print_help(void) {
    printf("%s", help);
    for (size_t i = 0; i < CASES; i++) printf("%s%s", i % 6 ? " " : "\n  ", cases[i].name);
    printf("\n");
}

static bool picked(const char *name, const char *only) {
    size_t n = only ? strlen(only) : 0;
    return !only || (!strncmp(name, only, n) && (name[n] == 0 || name[n] == '.'));
}

static bool picks_any(const char *only) {
    for (size_t i = 0; i < CASES; i++)
        if (picked(cases[i].name, only)) return true;
    return false;
}

static int fail(const char *text, const char *what) {
    fprintf(stderr, "bench: %s%s; see --help\n", text, what);
    return 2;
}

/* "model name : AMD EPYC" of the first core; its place is the same on every x86 Linux. */
static void describe_cpu(char out[128]) {
    char line[256];
    FILE *f = fopen("/proc/cpuinfo", "re");
    snprintf(out, 128, "unknown processor");
    while (f && fgets(line, sizeof line, f)) {
        const char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) != 0 || !colon) continue;
        snprintf(out, 128, "%.*s", (int)strcspn(colon + 2, "\n"), colon + 2);
        break;
    }
    if (f) fclose(f);
}

static json_t *describe_machine(const struct bench *b) {
    char cpu[128], kernels[160] = "";
    double load[1] = {0};
    struct kernels *k = kernels_cpu_create(b->cores, NULL);
    if (k) {
        snprintf(kernels, sizeof kernels, "%s", k->description);
        k->destroy(k);
    }
    describe_cpu(cpu);
    getloadavg(load, 1);
    printf("%s, %d cores, load %.1f; %s\n\n", cpu, b->cores, load[0], kernels);
    return json_pack("{ss si sf ss}", "cpu", cpu, "cores", b->cores, "load", load[0], "kernels",
                     kernels);
}

/* Takes over the file and `machine`. */
static int write_json(FILE *f, const char *path, const struct bench *b, json_t *machine) {
    json_t *rows = json_array(), *all = json_pack("{so so sf}", "machine", machine, "rows", rows,
                                                  "seconds", now_s() - started_s);
    for (int i = 0; i < b->rows; i++) json_array_append_new(rows, row_json(&b->row[i]));
    int failed = json_dumpf(all, f, JSON_INDENT(1) | JSON_REAL_PRECISION(6)) || fputc('\n', f) < 0;
    if (fclose(f)) failed = 1;
    if (failed) fprintf(stderr, "bench: --json %s: %s\n", path, strerror(errno));
    json_decref(all);
    return failed ? -1 : 0;
}

static int run_cases(struct bench *b, const char *only) {
    for (size_t i = 0; i < CASES; i++) {
        struct err err = {0};
        if (!picked(cases[i].name, only) || !cases[i].run(b, cases[i].arg, &err)) continue;
        fprintf(stderr, "bench: %s: %s\n", cases[i].name, err.msg);
        return 1;
    }
    return 0;
}

/* As in a trainer. libgomp reads this before main(), so the program has to start again. */
static void wait_passively(char **argv) {
    if (getenv("OMP_WAIT_POLICY")) return;
    setenv("OMP_WAIT_POLICY", "passive", 1);
    execv("/proc/self/exe", argv); /* where it fails, we go on as we are */
}

struct options {
    const char *only, *json, *dir;
};

/* 0 to go on, or the program's exit status + 1. */
static int take_options(int argc, char **argv, struct options *o) {
    static const struct option known[] = {{"only", required_argument, NULL, 'o'},
                                          {"json", required_argument, NULL, 'j'},
                                          {"dir", required_argument, NULL, 'd'},
                                          {"help", no_argument, NULL, 'h'},
                                          {0}};
    int c;
    opterr = 0;
    while ((c = getopt_long(argc, argv, ":h", known, NULL)) != -1) {
        if (c == 'o') o->only = optarg;
        else if (c == 'j') o->json = optarg;
        else if (c == 'd') o->dir = optarg;
        else if (c == 'h') return print_help(), 1;
        else
            return 1 + fail(c == ':' ? "a value is missing after " : "no such option: ",
                            argv[optind - 1]);
    }
    if (optind < argc) return 1 + fail("not an option: ", argv[optind]);
    if (o->only && !picks_any(o->only)) return 1 + fail("--only: there is no row ", o->only);
    return 0;
}

/* The folder first: a file for the table that stays empty would be worse than none. */
static int open_outputs(struct bench *b, const struct options *o, FILE **json) {
    int n = snprintf(b->folder, sizeof b->folder, "%s/intellect-bench-XXXXXX", o->dir);
    if (n >= (int)sizeof b->folder) return fail("--dir: too long: ", o->dir);
    if (!mkdtemp(b->folder)) {
        fprintf(stderr, "bench: --dir %s: %s\n", o->dir, strerror(errno));
        return 1;
    }
    if (o->json && !(*json = fopen(o->json, "we"))) {
        fprintf(stderr, "bench: --json %s: %s\n", o->json, strerror(errno));
        rmdir(b->folder);
        return 1;
    }
    return 0;
}

int main(int argc, char **argv) {
    static struct bench b;
    const char *tmp = getenv("TMPDIR");
    struct options o = {.dir = tmp && *tmp ? tmp : "/tmp"};
    struct err err = {0};
    FILE *json = NULL;
    int status = take_options(argc, argv, &o);
    if (status) return status - 1;
    wait_passively(argv);
    if (proto_init(&err)) return fail(err.msg, "");
    if ((status = open_outputs(&b, &o, &json))) return status;
    started_s = now_s();
    b.cores = (int)sysconf(_SC_NPROCESSORS_ONLN);
    json_t *machine = describe_machine(&b);
    print_head();
    status = run_cases(&b, o.only);
    nftw(b.folder, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    printf("\n%.0f s\n", now_s() - started_s);
    if (json && write_json(json, o.json, &b, machine)) status = 1;
    else if (!json) json_decref(machine);
    return status;
}
