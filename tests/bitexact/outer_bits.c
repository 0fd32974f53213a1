/* outer_bits.c - every function of the outer step over ordinary and adversarial inputs, in each of
 * several floating-point environments that a library could have left behind. Prints a line
 * "function environment checksum" for each pair. run.sh builds it with many compilers and flags, for
 * two processors, and wants one checksum per function.
 *
 * It needs nothing but kernels/outer.c and proto/err.c, so that it cross-compiles. While the
 * environment is disturbed it computes with integers only: all inputs are made of bits. */
#include "kernels/kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_MAX = 4 * OUTER_BLOCK + 3, BYTES_MAX = 4 * N_MAX };

/* Short of, at and past every vector width, and of blocks. */
static const size_t lengths[] = { 0,  1,  3,   7,   8,   9,   15,  16,   17,
                                  33, 63, 255, 256, 257, 300, 511, 1000, N_MAX };
#define LENGTHS (sizeof lengths / sizeof *lengths)
enum { DRAWS = 2 }; /* of each kind at each length: aligned, and one element off */

/* ---- floating-point environments ---- */

#if defined(__x86_64__)
enum { UP = 0x4000, DOWN = 0x2000, ZERO = 0x6000, FLUSH = 0x8040, MASKED = 0x1f80 };
static uint64_t environment_get(void) {
    uint32_t mxcsr;
    __asm__ volatile("stmxcsr %0" : "=m"(mxcsr) : : "memory");
    return mxcsr & ~0x3fu; /* without the exceptions that have happened */
}
static void environment_set(uint64_t value) {
    uint32_t mxcsr = (uint32_t)value;
    __asm__ volatile("ldmxcsr %0" : : "m"(mxcsr) : "memory");
}
#elif defined(__aarch64__)
enum { UP = 1 << 22, DOWN = 2 << 22, ZERO = 3 << 22, FLUSH = 1 << 24, MASKED = 0 };
static uint64_t environment_get(void) {
    uint64_t fpcr;
    __asm__ volatile("mrs %0, fpcr" : "=r"(fpcr) : : "memory");
    return fpcr;
}
static void environment_set(uint64_t value) {
    __asm__ volatile("msr fpcr, %0" : : "r"(value) : "memory");
}
#else
#error "no floating-point control register is known for this processor"
#endif

/* traps: an x86-64 that is to signal each inexact, subnormal or invalid operation. Not even one
 * conversion may then happen outside of the functions' own environment. */
static const struct environment {
    const char *name;
    uint64_t bits;
    int as_started;
} environments[] = {
    { "started", 0, 1 },
    { "up", MASKED | UP, 0 },
    { "down", MASKED | DOWN, 0 },
    { "zero", MASKED | ZERO, 0 },
    { "flush", MASKED | FLUSH, 0 },
#if defined(__x86_64__)
    { "traps", UP | FLUSH, 0 },
#else
    { "traps", UP | FLUSH | 0x9f00, 0 }, /* which most processors ignore */
#endif
};
#define ENVIRONMENTS (sizeof environments / sizeof *environments)

/* ---- numbers ---- */

static uint64_t counter;

/* splitmix64 (Steele, Lea, Flood 2014) */
static uint64_t random_bits(void) {
    uint64_t z = counter += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static uint32_t below(uint32_t limit) { return (uint32_t)(random_bits() >> 40) % limit; }

static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Any sign and mantissa, with an exponent of [low,high]; 127 is that of 1.0, 0 is subnormal. */
static uint32_t bits_between(uint32_t low, uint32_t high) {
    uint32_t exponent = low + below(high - low + 1);
    return ((uint32_t)random_bits() & 0x807fffffu) | exponent << 23;
}

static const uint32_t awkward[] = {
    0,          0x80000000, 1,          0x80000001, /* +-0, least subnormals */
    0x007fffff, 0x00800000, 0x80800000, 0x00ffffff, /* around the least normal */
    0x3f800000, 0xbf800000, 0x3f7fffff, 0x3f800001, /* around 1 */
    0x3f000000, 0x3fc00000, 0xc0200000, 0x42fe0000, /* halves: ties; 127 */
    0x4b000001, 0x5f000000, 0x7e000000, 0x7effffff, /* integers; near the largest scale * 127 */
    0x7f7fffff, 0xff7fffff,                         /* the largest */
};
static const uint32_t not_finite[] = { 0x7f800000, 0xff800000, 0x7fc00000, 0xffc00000,
                                       0x7fc12345, 0x7f800001, 0xff812345 };
#define PICK(table) ((table)[below(sizeof(table) / sizeof *(table))])

enum kind {
    ORDINARY,
    SUBNORMAL,
    TINY,  /* around the least normal number: products and differences become subnormal */
    HUGE,  /* sums and products overflow */
    ANY,
    AWKWARD,
    ZEROES, /* of both signs */
    OUTLIER, /* ordinary but for one huge element in each block */
    LAYERS, /* magnitudes change from block to block, one in four is all zero */
    KINDS,
    BROKEN = KINDS, /* here and there an infinity or a NaN */
};

static uint32_t element(enum kind kind, size_t i) {
    uint32_t block = (uint32_t)(i / OUTER_BLOCK);
    switch (kind) {
    case SUBNORMAL: return bits_between(0, 0);
    case TINY: return bits_between(0, 3);
    case HUGE: return bits_between(251, 254);
    case ANY: return bits_between(0, 254);
    case AWKWARD: return PICK(awkward);
    case ZEROES: return (uint32_t)random_bits() & 0x80000000u;
    case OUTLIER: return i % OUTER_BLOCK == 77 ? bits_between(150, 160) : bits_between(110, 118);
    case LAYERS: return block % 4 == 2 ? 0 : bits_between(20 + 50 * block, 24 + 50 * block);
    case BROKEN: return below(100) ? bits_between(100, 254) : PICK(not_finite);
    default: return bits_between(110, 125);
    }
}

static void fill(float *x, size_t n, enum kind kind) {
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = element(kind, i);
        memcpy(x + i, &bits, sizeof bits);
    }
}

static uint32_t fp4_code(void) {
    uint32_t code = below(15);
    return code < 8 ? code : code + 1; /* 8 is none */
}

/* What a stranger may send: scales of any size, sometimes one that must be refused. */
static void fill_bytes(uint8_t *bytes, size_t n, enum outer_codec codec, enum kind kind) {
    if (codec == OUTER_FP32) {
        for (size_t i = 0; i < n; i++) {
            uint32_t bits = element(kind, i);
            memcpy(bytes + 4 * i, &bits, sizeof bits);
        }
        return;
    }
    for (size_t i = 0; i < n; i += OUTER_BLOCK) {
        size_t length = n - i < OUTER_BLOCK ? n - i : OUTER_BLOCK;
        uint32_t scale = element(kind, i) & 0x7fffffffu;
        if (below(40) == 0) scale |= 0x80000000u;
        memcpy(bytes, &scale, sizeof scale);
        size_t codes = outer_encoded_bytes(codec, length) - 4;
        for (size_t j = 0; j < codes; j++)
            bytes[4 + j] = codec == OUTER_INT8 ? (uint8_t)(below(255) + 129)
                                               : (uint8_t)(fp4_code() | (j < length / 2 ? fp4_code() << 4 : 0));
        if (below(40) == 0) bytes[4 + below((uint32_t)codes)] = codec == OUTER_INT8 ? 0x80 : 0x08;
        bytes += 4 + codes;
    }
}

/* ---- checksums ---- */

static uint64_t checksum; /* FNV-1a, of what the function at work has given so far */

static void note(const void *p, size_t bytes) {
    const uint8_t *b = p;
    for (size_t i = 0; i < bytes; i++) checksum = (checksum ^ b[i]) * 0x100000001b3u;
}

static void note_floats(const float *x, size_t n) { note(x, n * sizeof *x); }

static int note_result(int rc, const struct err *err) {
    uint8_t both[2] = { (uint8_t)rc, rc ? (uint8_t)err->code : 0 };
    note(both, sizeof both);
    return rc;
}

/* ---- one case of each function: n elements at `shift` into their arrays ---- */

/* Aligned as little as the caller may: a chunk can begin at any element. */
static float a[N_MAX + 1], b[N_MAX + 1], c[N_MAX + 1], d[N_MAX + 1];
static int64_t sum[N_MAX + 1], partial[N_MAX + 1];
static uint8_t bytes[BYTES_MAX + 1];
static struct err err;

struct test {
    size_t n, shift;
    enum kind kind;
    enum outer_codec codec;
};

static void do_pseudo_gradient(const struct test *t) {
    fill(a, t->n, t->kind);
    fill(b, t->n, t->kind);
    fill(c, t->n, t->kind);
    outer_pseudo_gradient(d + t->shift, a, b, t->shift ? c : NULL, t->n);
    note_floats(d + t->shift, t->n);
}

static void do_encode(const struct test *t) {
    size_t length = outer_encoded_bytes(t->codec, t->n);
    fill(a + t->shift, t->n, t->kind);
    if (!note_result(outer_encode(bytes + t->shift, a + t->shift, t->n, t->codec, &err), &err))
        note(bytes + t->shift, length);
}

static void do_check(const struct test *t) {
    size_t length = outer_encoded_bytes(t->codec, t->n);
    fill_bytes(bytes, t->n, t->codec, t->kind);
    note_result(outer_check(bytes, length, t->n, t->codec, &err), &err);
}

static void do_measure(const struct test *t) {
    size_t length = outer_encoded_bytes(t->codec, t->n);
    float absmax;
    double norm2;
    fill_bytes(bytes + t->shift, t->n, t->codec, t->kind);
    int rc = outer_measure(bytes + t->shift, length, t->n, t->codec, &absmax, &norm2, &err);
    if (note_result(rc, &err)) return;
    note(&absmax, sizeof absmax);
    note(&norm2, sizeof norm2);
}

static void do_decode(const struct test *t) {
    size_t length = outer_encoded_bytes(t->codec, t->n);
    fill_bytes(bytes + t->shift, t->n, t->codec, t->kind);
    int rc = outer_decode(a + t->shift, bytes + t->shift, length, t->n, t->codec, &err);
    if (!note_result(rc, &err)) note_floats(a + t->shift, t->n);
}

static void do_residual(const struct test *t) {
    size_t length = outer_encoded_bytes(t->codec, t->n);
    fill(a + t->shift, t->n, t->kind);
    fill_bytes(bytes, t->n, t->codec, below(2) ? t->kind : AWKWARD);
    int rc = outer_residual(b, a + t->shift, bytes, length, t->n, t->codec, &err);
    if (!note_result(rc, &err)) note_floats(b, t->n);
    if (outer_encode(bytes, a + t->shift, t->n, t->codec, &err)) return;
    rc = outer_residual(a + t->shift, a + t->shift, bytes, length, t->n, t->codec, &err);
    if (!note_result(rc, &err)) note_floats(a + t->shift, t->n);
}

static void do_accumulate(const struct test *t) {
    /* 1, 1/2, 0, subnormal, largest below 1, and what must be refused: -0.0 is not, -2^-149 is. */
    static const uint32_t clips[] = { 0x3f800000, 0x3f800000, 0x3f000000, 0,          1,
                                      0x3f7fffff, 0x3f333333, 0x80000000, 0x80000001, 0x3f800001 };
    size_t length = outer_encoded_bytes(t->codec, t->n);
    for (size_t i = 0; i < t->n; i++) sum[t->shift + i] = (int64_t)(random_bits() >> 20);
    for (int repeat = 0; repeat < 4; repeat++) {
        uint32_t weight = (uint32_t)(random_bits() % (OUTER_WEIGHT_LIMIT + 100));
        int exponent = repeat ? (int)below(402) - 200 : 20;
        float clip = float_of(PICK(clips));
        fill_bytes(bytes, t->n, t->codec, t->kind);
        int rc = outer_accumulate(sum + t->shift, bytes, length, t->n, t->codec, weight / 8, clip,
                                  exponent, &err);
        note_result(rc, &err);
        note(sum + t->shift, t->n * sizeof *sum);
        if (t->n && !rc) memset(sum + t->shift, 0, t->n * sizeof *sum); /* stays below 2^63 */
    }
}

static void do_accumulate_partial(const struct test *t) {
    uint32_t weight = 1 + below(OUTER_WEIGHT_LIMIT - 1);
    for (size_t i = 0; i < t->n; i++) {
        int64_t x = (int64_t)(random_bits() % ((uint64_t)(OUTER_GRID_LIMIT - 1) * weight + 1));
        partial[i] = random_bits() & 1 ? x : -x;
        sum[i] = (int64_t)random_bits() >> 2;
    }
    if (t->kind == AWKWARD && t->n) partial[t->n - 1] = (OUTER_GRID_LIMIT - 1) * weight + 1;
    note_result(outer_accumulate_partial(sum, partial, t->n, weight, &err), &err);
    note(sum, t->n * sizeof *sum);
}

/* Sums of every size, weights and grids that make means overflow and vanish. */
static void do_mean(const struct test *t) {
    uint64_t weight = t->kind == ORDINARY ? 1 : 1 + below(OUTER_WEIGHT_LIMIT - 1);
    int exponent = t->kind == ORDINARY ? 30 : (int)below(401) - 200;
    for (size_t i = 0; i < t->n; i++) {
        int64_t x = (int64_t)(random_bits() >> 2 >> below(62));
        sum[t->shift + i] = below(2) ? x : -x;
    }
    outer_mean(a, sum + t->shift, t->n, weight, exponent);
    note_floats(a, t->n);
}

static void do_nesterov(const struct test *t) {
    static const uint32_t rates[] = { 0x3f333333, 0x3f800000, 0x3ecccccd, 0x3f666666, 1, 0 };
    fill(a + t->shift, t->n, t->kind);
    fill(b + t->shift, t->n, t->kind);
    fill(c, t->n, t->kind);
    uint32_t lr = PICK(rates), mu = PICK(rates);
    outer_nesterov(a + t->shift, b + t->shift, c, t->n, float_of(lr), float_of(mu));
    note_floats(a + t->shift, t->n);
    note_floats(b + t->shift, t->n);
}

static void do_mix(const struct test *t) {
    static const uint32_t alphas[] = { 0x3f000000, 0x3e99999a, 0x3f800000, 0, 0x80000000, 1, 99 };
    fill(a + t->shift, t->n, t->kind);
    fill(b, t->n, t->kind);
    outer_mix(a + t->shift, b, t->n, float_of(PICK(alphas)));
    note_floats(a + t->shift, t->n);
}

static void do_add_delta(const struct test *t) {
    fill(a, t->n, t->kind);
    fill(b + t->shift, t->n, t->kind);
    fill(c, t->n, t->kind);
    outer_add_delta(a, b + t->shift, c, t->n);
    note_floats(a, t->n);
}

static void do_norm2(const struct test *t) {
    fill(a + t->shift, t->n, t->kind);
    double norm2 = outer_norm2(a + t->shift, t->n);
    note(&norm2, sizeof norm2);
}

static void do_absmax(const struct test *t) {
    fill(a + t->shift, t->n, t->kind);
    float absmax = outer_absmax(a + t->shift, t->n);
    note(&absmax, sizeof absmax);
}

static void do_init_normal(const struct test *t) {
    static const uint32_t sizes[] = { 0x3ca3d70a, 0x3f800000, 5, 0x7e000000 };
    uint64_t seed = random_bits(), first = random_bits();
    outer_init_normal(a + t->shift, seed, first, t->n, float_of(PICK(sizes)));
    note_floats(a + t->shift, t->n);
}

/* ---- all of it ---- */

static const struct function {
    const char *name;
    void (*run)(const struct test *t);
    int per_codec;
} functions[] = {
    { "pseudo_gradient", do_pseudo_gradient, 0 },
    { "encode", do_encode, 1 },
    { "check", do_check, 1 },
    { "measure", do_measure, 1 },
    { "decode", do_decode, 1 },
    { "residual", do_residual, 1 },
    { "accumulate", do_accumulate, 1 },
    { "accumulate_partial", do_accumulate_partial, 0 },
    { "mean", do_mean, 0 },
    { "nesterov", do_nesterov, 0 },
    { "mix", do_mix, 0 },
    { "add_delta", do_add_delta, 0 },
    { "norm2", do_norm2, 0 },
    { "absmax", do_absmax, 0 },
    { "init_normal", do_init_normal, 0 },
};
#define FUNCTIONS (sizeof functions / sizeof *functions)

static void run_codec(const struct function *f, enum outer_codec codec) {
    counter = 0;
    checksum = 0xcbf29ce484222325u;
    for (size_t l = 0; l < LENGTHS; l++)
        for (int kind = ORDINARY; kind <= BROKEN; kind++)
            for (size_t shift = 0; shift < DRAWS; shift++) {
                struct test t = { lengths[l], shift, (enum kind)kind, codec };
                f->run(&t);
            }
}

static void print(const struct function *f, int codec, const struct environment *e) {
    if (f->per_codec) printf("%s.%d %s %016llx\n", f->name, codec, e->name, (long long)checksum);
    else printf("%s %s %016llx\n", f->name, e->name, (long long)checksum);
}

/* A function must leave the environment as it was, too. */
static void run_in(const struct function *f, const struct environment *e, uint64_t calm) {
    for (int codec = 0; codec == 0 || (f->per_codec && outer_encoded_bytes(codec, 1)); codec++) {
        uint64_t before, after;
        environment_set(e->as_started ? calm : e->bits);
        before = environment_get();
        run_codec(f, (enum outer_codec)codec);
        after = environment_get();
        environment_set(calm);
        print(f, codec, e);
        if (before == after) continue;
        printf("%s %s left-the-environment-at-%llx\n", f->name, e->name, (unsigned long long)after);
        exit(1);
    }
}

int main(void) {
    uint64_t calm = environment_get();
    setvbuf(stdout, NULL, _IOLBF, BUFSIZ); /* a trap then shows where */
    for (size_t e = 0; e < ENVIRONMENTS; e++)
        for (size_t f = 0; f < FUNCTIONS; f++) run_in(&functions[f], &environments[e], calm);
    return 0;
}
