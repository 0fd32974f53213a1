/* test_outer.c - the arithmetic of the outer step. Members compare digests of their anchors, so one
 * bit that depends on compiler, vector width, rounding mode or order of arrival stops a run: the
 * outputs are pinned here, and gcc and clang builds of any vector width must give these digests. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <fenv.h>
#include <float.h>
#include <math.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"

enum { N = 5 * OUTER_BLOCK + 37, ENCODED_MAX = 4 * N + 4 * 8 };

static struct err err;

static void assert_ok(int rc) {
    if (rc != 0) fail_msg("%s", err.msg);
}

static void assert_refused(int rc, const char *why) {
    assert_int_equal(rc, -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    if (!strstr(err.msg, why)) fail_msg("message \"%s\" does not say \"%s\"", err.msg, why);
    err = (struct err){ 0 };
}

static void assert_digest(const char *what, const void *p, size_t bytes, const char *want) {
    unsigned char digest[16];
    char hex[33];
    crypto_generichash(digest, sizeof digest, p, bytes, NULL, 0);
    sodium_bin2hex(hex, sizeof hex, digest, sizeof digest);
    if (strcmp(hex, want) != 0) fail_msg("%s: digest %s, pinned %s", what, hex, want);
}

/* Block magnitudes differ by powers of ten, as layers' do; the last block is subnormal. */
static void draw(float *x, uint64_t seed) {
    static const float size[] = { 1e-3f, 0.02f, 5.0f, 3e4f, 1e-12f, 1e-41f };
    for (size_t i = 0; i < N; i += OUTER_BLOCK)
        outer_init_normal(x + i, seed, i, N - i < OUTER_BLOCK ? N - i : OUTER_BLOCK,
                          size[i / OUTER_BLOCK]);
}

/* ---- the bits ---- */

/* Every function once, chained as in a round: contributions, exact sum, mean, step, mixing. */
static void run_and_compare_with_pins(void) {
    static float anchor[N], local[N], residual[N], gradient[N], mean[N], momentum[N], old[N];
    static uint8_t bytes[ENCODED_MAX];
    static int64_t sum[N];
    size_t length = outer_encoded_bytes(OUTER_INT8, N);
    memset(sum, 0, sizeof sum);
    draw(anchor, 1);
    draw(local, 2);
    draw(residual, 3);
    draw(momentum, 4);
    assert_digest("init_normal", anchor, sizeof anchor, "6873258d88b8fb2f07b6ba8a7e8a58db");
    outer_pseudo_gradient(gradient, anchor, local, residual, N);
    assert_digest("pseudo_gradient", gradient, sizeof gradient, "7edaa324571c063761005fefba1dab6b");
    assert_ok(outer_encode(bytes, gradient, N, OUTER_INT8, &err));
    assert_digest("encode", bytes, length, "f3cbbb2dcf51e1088319f50652d226e2");
    assert_ok(outer_residual(residual, gradient, bytes, length, N, OUTER_INT8, &err));
    assert_digest("residual", residual, sizeof residual, "a66f4a5fecd7747d9171ca3fa88ad24f");
    assert_ok(outer_accumulate(sum, bytes, length, N, OUTER_INT8, 1000003, 0.7f, 20, &err));
    assert_ok(outer_encode(bytes, residual, N, OUTER_FP32, &err));
    assert_ok(outer_accumulate(sum, bytes, 4 * N, N, OUTER_FP32, 77, 1.0f, 20, &err));
    assert_digest("accumulate", sum, sizeof sum, "e62bc99b5a2f3c3a7da6ea87d66f5f97");
    outer_mean(mean, sum, N, 1000080, 20);
    assert_digest("mean", mean, sizeof mean, "43cb67675dd50aa91948eeb21db5cd94");
    memcpy(old, anchor, sizeof old);
    outer_nesterov(anchor, momentum, mean, N, 0.7f, 0.9f);
    assert_digest("nesterov anchor", anchor, sizeof anchor, "9cf28c89d4e38b1379f4a3307c1357e7");
    assert_digest("nesterov momentum", momentum, sizeof momentum,
                  "6a5db5c31e25879b2f7f82552116b2dd");
    outer_mix(local, anchor, N, 0.3f);
    assert_digest("mix", local, sizeof local, "847086941047b568788038283aa81b09");
    outer_add_delta(local, anchor, old, N);
    assert_digest("add_delta", local, sizeof local, "caaa08a96d6dc39c3519008024f583b3");
    double norm2 = outer_norm2(gradient, N);
    assert_digest("norm2", &norm2, sizeof norm2, "fb59ca68eea0280f2bd6936615e8d0a2");
}

static int restore_floating_point_mode(void **state) {
    (void)state;
    return fesetenv(FE_DFL_ENV);
}

static void bits_are_the_pinned_ones(void **state) {
    (void)state;
    run_and_compare_with_pins();
}

/* A library or a GPU runtime may have left the thread in another rounding or flush mode. Ours must
 * neither be changed by it nor change it. */
static void bits_do_not_depend_on_the_callers_floating_point_mode(void **state) {
    (void)state;
    static const int mode[] = { FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO };
    for (int i = 0; i < 3; i++) {
        assert_int_equal(fesetround(mode[i]), 0);
#if defined(__x86_64__)
        unsigned flush = __builtin_ia32_stmxcsr() |
                         0x8040u; /* flush to zero, subnormals are zero */
        __builtin_ia32_ldmxcsr(flush);
#endif
        run_and_compare_with_pins();
        assert_int_equal(fegetround(), mode[i]);
#if defined(__x86_64__)
        assert_int_equal(__builtin_ia32_stmxcsr() & 0xffc0u, flush & 0xffc0u);
        __builtin_ia32_ldmxcsr(0x1f80u);
#endif
        fesetround(FE_TONEAREST);
    }
}

/* A comparison or conversion of a parameter can depend on the mode too: where subnormals are zero, a
 * tiny alpha would be 0, which is a copy, and a negative clip factor would pass as one. */
static void tiny_parameters_are_not_zero_where_subnormals_are_flushed(void **state) {
    (void)state;
#if defined(__x86_64__)
    float local[] = { 0x1p127f }, anchor[] = { -0.0f };
    uint8_t bytes[4] = { 0 };
    int64_t sum[1] = { 0 };
    __builtin_ia32_ldmxcsr(0x1f80u | 0x8040u);
    outer_mix(local, anchor, 1, 0x1p-149f);
    int rc = outer_accumulate(sum, bytes, 4, 1, OUTER_FP32, 1, -0x1p-149f, 0, &err);
    __builtin_ia32_ldmxcsr(0x1f80u);
    assert_true(local[0] == 0x1p-22f);
    assert_refused(rc, "clip");
#else
    skip(); /* tests/bitexact/ has this for aarch64 */
#endif
}

/* A library may even have asked for a signal at each inexact result, and want it back afterwards. */
static void nothing_traps_where_the_caller_wants_signals(void **state) {
    (void)state;
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(0x0000u);
    run_and_compare_with_pins();
    assert_int_equal(__builtin_ia32_stmxcsr(), 0);
    __builtin_ia32_ldmxcsr(0x1f80u);
#else
    skip();
#endif
}

/* inf - inf is a negative NaN on x86-64 and a positive one on aarch64, and 1 * NaN keeps its payload
 * on both. A model that diverged must do so alike everywhere, else members accuse each other. */
static void every_nan_has_the_same_bits(void **state) {
    (void)state;
    static const uint32_t canonical = 0x7fc00000u;
    float odd, local[1], anchor[1], momentum[1];
    memcpy(&odd, &(uint32_t){ 0xffc12345u }, sizeof odd);
    for (int i = 0; i < 2; i++) {
        float minuend = i ? odd : INFINITY;
        outer_pseudo_gradient(local, &minuend, (float[]){ INFINITY }, NULL, 1);
        assert_memory_equal(local, &canonical, 4);
        outer_pseudo_gradient(local, &minuend, (float[]){ 1.0f }, (float[]){ -INFINITY }, 1);
        assert_memory_equal(local, &canonical, 4);
        anchor[0] = momentum[0] = minuend;
        outer_nesterov(anchor, momentum, (float[]){ -INFINITY }, 1, 0.7f, 0.9f);
        assert_memory_equal(anchor, &canonical, 4);
        assert_memory_equal(momentum, &canonical, 4);
        local[0] = minuend;
        outer_mix(local, (float[]){ -INFINITY }, 1, 0.5f);
        assert_memory_equal(local, &canonical, 4);
        local[0] = minuend;
        outer_add_delta(local, (float[]){ -INFINITY }, (float[]){ 1.0f }, 1);
        assert_memory_equal(local, &canonical, 4);
    }
    double norm2 = outer_norm2(&odd, 1);
    assert_memory_equal(&norm2, &(uint64_t){ 0x7ff8000000000000u }, 8);
}

/* volatile: each operation is stored, so no compiler can fuse or keep excess precision here. */
static void nesterov_rounds_after_every_operation(void **state) {
    (void)state;
    static float anchor[N], momentum[N], mean[N], anchor_was[N], momentum_was[N];
    draw(anchor, 1);
    draw(momentum, 2);
    draw(mean, 3);
    memcpy(anchor_was, anchor, sizeof anchor);
    memcpy(momentum_was, momentum, sizeof momentum);
    outer_nesterov(anchor, momentum, mean, N, 0.7f, 0.9f);
    for (int i = 0; i < N; i++) {
        volatile float t = 0.9f * momentum_was[i];
        volatile float m = t + mean[i];
        volatile float u = 0.9f * m;
        volatile float v = mean[i] + u;
        volatile float w = 0.7f * v;
        volatile float a = anchor_was[i] - w;
        assert_true(m == momentum[i] && a == anchor[i]);
    }
}

/* ---- codec ---- */

static const size_t odd_lengths[] = { 0, 1, 2, 3, 255, 256, 257, 511, 512, 1000 };

static void int8_error_is_at_most_half_a_step(void **state) {
    (void)state;
    static float x[N], y[N];
    static uint8_t bytes[ENCODED_MAX];
    draw(x, 5);
    for (size_t k = 0; k < sizeof odd_lengths / sizeof *odd_lengths; k++) {
        size_t n = odd_lengths[k], length = outer_encoded_bytes(OUTER_INT8, n);
        assert_int_equal(length, n + (n + 255) / 256 * 4);
        assert_ok(outer_encode(bytes, x, n, OUTER_INT8, &err));
        assert_ok(outer_check(bytes, length, n, OUTER_INT8, &err));
        assert_ok(outer_decode(y, bytes, length, n, OUTER_INT8, &err));
        for (size_t i = 0; i < n; i++) {
            size_t begin = i / OUTER_BLOCK * OUTER_BLOCK;
            size_t len = n - begin < OUTER_BLOCK ? n - begin : OUTER_BLOCK;
            double step = outer_absmax(x + begin, len) / 127.0;
            assert_true(fabs((double)x[i] - y[i]) <= 0.50002 * step);
        }
    }
}

/* absmax / 127 as one fp32 division; times the reciprocal differs in the last bit now and then. */
static void int8_scale_is_a_division(void **state) {
    (void)state;
    uint8_t bytes[5];
    float scale;
    for (int i = 1; i < 4000; i++) {
        volatile float x = 1.0f + (float)i * 0x1p-12f, want = x / 127.0f;
        assert_ok(outer_encode(bytes, (float[]){ x }, 1, OUTER_INT8, &err));
        memcpy(&scale, bytes, 4); /* tests run on little-endian machines */
        assert_true(scale == want);
    }
}

/* The layout another implementation would write, by hand. */
static void int8_layout_is_scale_then_values(void **state) {
    (void)state;
    static float x[OUTER_BLOCK + 3] = { 127.0f, -127.0f, 0.5f, 1.5f, -2.5f, 0.4999f, -0.0f };
    x[OUTER_BLOCK] = 0.0f; /* the second block is all zeroes but for one */
    x[OUTER_BLOCK + 1] = -254.0f;
    uint8_t bytes[OUTER_BLOCK + 3 + 8];
    assert_ok(outer_encode(bytes, x, OUTER_BLOCK + 3, OUTER_INT8, &err));
    static const uint8_t first[] = { 0, 0, 0x80,        0x3f, 127, (uint8_t)-127,
                                     0, 2, (uint8_t)-2, 0,    0,   0 };
    static const uint8_t second[] = { 0, 0, 0, 0x40, 0, (uint8_t)-127, 0 };
    assert_memory_equal(bytes, first, sizeof first);
    assert_memory_equal(bytes + 4 + OUTER_BLOCK, second, sizeof second);
}

/* ---- fp4 ---- */

static void fp4_takes_the_nearest_of_its_values(void **state) {
    (void)state;
    static const float level[] = { 0, 1, 2, 3, 4, 6, 8, 12 };
    static float x[N], y[N];
    static uint8_t bytes[ENCODED_MAX];
    draw(x, 5);
    for (size_t k = 0; k < sizeof odd_lengths / sizeof *odd_lengths; k++) {
        size_t n = odd_lengths[k], length = outer_encoded_bytes(OUTER_FP4, n);
        assert_int_equal(length, (n + 1) / 2 + (n + 255) / 256 * 4);
        assert_ok(outer_encode(bytes, x, n, OUTER_FP4, &err));
        assert_ok(outer_check(bytes, length, n, OUTER_FP4, &err));
        assert_ok(outer_decode(y, bytes, length, n, OUTER_FP4, &err));
        for (size_t i = 0; i < n; i++) {
            size_t begin = i / OUTER_BLOCK * OUTER_BLOCK;
            double scale = outer_absmax(x + begin, n - begin < OUTER_BLOCK ? n - begin : OUTER_BLOCK) / 12.0;
            double nearest = INFINITY, off = fabs((double)x[i] - y[i]);
            for (int l = 0; l < 8; l++) nearest = fmin(nearest, fabs(fabs((double)x[i]) - level[l] * scale));
            assert_true(off <= nearest + 1e-6 * scale && (double)x[i] * y[i] >= 0);
        }
    }
}

/* The layout another implementation would write, by hand: two elements a byte, half a block apart. */
static void fp4_layout_is_scale_then_halves(void **state) {
    (void)state;
    static float x[OUTER_BLOCK + 3] = { 12.0f, -12.0f, 0.5f, 0.51f, -1.5f, 9.99f, -0.1f };
    x[OUTER_BLOCK / 2] = -1.0f, x[OUTER_BLOCK / 2 + 1] = 5.1f; /* the high halves of the first two bytes */
    x[OUTER_BLOCK] = 3.0f, x[OUTER_BLOCK + 1] = 24.0f, x[OUTER_BLOCK + 2] = -13.0f; /* an odd block: scale 2 */
    uint8_t bytes[OUTER_BLOCK / 2 + 2 + 8];
    assert_int_equal(outer_encoded_bytes(OUTER_FP4, OUTER_BLOCK + 3), sizeof bytes);
    assert_ok(outer_encode(bytes, x, OUTER_BLOCK + 3, OUTER_FP4, &err));
    static const uint8_t first[] = { 0, 0, 0x80, 0x3f, 0x97, 0x5f, 0, 1, 9, 6, 0, 0 };
    static const uint8_t second[] = { 0, 0, 0, 0x40, 0xd1, 0x07 };
    assert_memory_equal(bytes, first, sizeof first);
    assert_memory_equal(bytes + 4 + OUTER_BLOCK / 2, second, sizeof second);
}

static void fp32_carries_every_bit(void **state) {
    (void)state;
    static float x[N], y[N];
    static uint8_t bytes[ENCODED_MAX];
    draw(x, 6);
    x[3] = -0.0f;
    x[4] = FLT_MAX;
    assert_ok(outer_encode(bytes, x, N, OUTER_FP32, &err));
    assert_ok(outer_decode(y, bytes, 4 * N, N, OUTER_FP32, &err));
    assert_memory_equal(x, y, sizeof x);
    static const uint8_t one[] = { 0, 0, 0x80, 0x3f };
    assert_ok(outer_encode(bytes, (float[]){ 1.0f }, 1, OUTER_FP32, &err));
    assert_memory_equal(bytes, one, 4);
}

/* A block of zeroes, and blocks too small for a scale: nothing may divide by 0 or overflow an int8,
 * and sending is never worse than sending nothing. */
static void tiny_blocks_encode(void **state) {
    (void)state;
    float x[OUTER_BLOCK] = { 0 }, y[OUTER_BLOCK];
    uint8_t bytes[OUTER_BLOCK + 4];
    for (int ulps = 0; ulps < 2000; ulps++) {
        x[0] = (float)ulps * FLT_TRUE_MIN;
        x[1] = -x[0];
        assert_ok(outer_encode(bytes, x, OUTER_BLOCK, OUTER_INT8, &err));
        assert_ok(outer_decode(y, bytes, sizeof bytes, OUTER_BLOCK, OUTER_INT8, &err));
        assert_true(fabsf(x[0] - y[0]) <= x[0] && y[1] == -y[0] && y[2] == 0.0f);
        assert_ok(outer_residual(y, x, bytes, sizeof bytes, OUTER_BLOCK, OUTER_INT8, &err));
        assert_true(isfinite(y[0]));
    }
}

/* Error feedback: what was not sent is kept, to the bit, also in place. */
static void residual_is_what_the_encoding_lost(void **state) {
    (void)state;
    static float x[N], decoded[N], residual[N];
    static uint8_t bytes[ENCODED_MAX];
    draw(x, 7);
    for (int codec = OUTER_FP32; codec <= OUTER_FP4; codec++) {
        size_t length = outer_encoded_bytes(codec, N);
        assert_ok(outer_encode(bytes, x, N, codec, &err));
        assert_ok(outer_decode(decoded, bytes, length, N, codec, &err));
        assert_ok(outer_residual(residual, x, bytes, length, N, codec, &err));
        for (int i = 0; i < N; i++) {
            volatile float lost = x[i] - decoded[i];
            assert_true(residual[i] == lost);
            if (codec == OUTER_FP32) assert_true(lost == 0.0f);
        }
        memcpy(decoded, x, sizeof x);
        assert_ok(outer_residual(decoded, decoded, bytes, length, N, codec, &err));
        assert_memory_equal(decoded, residual, sizeof residual);
    }
}

static void encoding_refuses_what_is_not_finite(void **state) {
    (void)state;
    static float x[N];
    static uint8_t bytes[ENCODED_MAX];
    static const float bad[] = { NAN, -NAN, INFINITY, -INFINITY };
    static const int at[] = { 0, 255, 256, 700, N - 1 };
    draw(x, 8);
    for (int codec = OUTER_FP32; codec <= OUTER_FP4; codec++)
        for (int i = 0; i < 20; i++) {
            char name[32];
            float kept = x[at[i / 4]];
            x[at[i / 4]] = bad[i % 4];
            snprintf(name, sizeof name, "element %d of", at[i / 4]);
            assert_refused(outer_encode(bytes, x, N, codec, &err), name);
            x[at[i / 4]] = kept;
        }
    /* Finite, but 127 times its rounded scale is not. */
    x[9] = FLT_MAX;
    int rc = outer_encode(bytes, x, N, OUTER_INT8, &err);
    if (rc != 0) assert_refused(rc, "element 9 of");
    else assert_ok(outer_check(bytes, outer_encoded_bytes(OUTER_INT8, N), N, OUTER_INT8, &err));
}

/* ---- bytes from strangers ---- */

struct hostile {
    const char *why;
    size_t at;
    uint8_t bytes[4];
    size_t count;
};

/* Whatever is wrong, every reader says the same and an aggregator's sum stays what it was: a
 * refused contribution must not spoil the others'. */
static void assert_all_readers_refuse(const uint8_t *bytes, size_t length, enum outer_codec codec,
                                      const char *why) {
    static float x[N];
    static int64_t sum[N], before[N];
    for (int i = 0; i < N; i++) sum[i] = before[i] = i;
    assert_refused(outer_check(bytes, length, N, codec, &err), why);
    assert_refused(outer_decode(x, bytes, length, N, codec, &err), why);
    assert_refused(outer_residual(x, x, bytes, length, N, codec, &err), why);
    assert_refused(outer_accumulate(sum, bytes, length, N, codec, 1, 1.0f, 0, &err), why);
    assert_memory_equal(sum, before, sizeof sum);
}

static void bad_int8_bytes_are_refused_and_leave_the_sum_alone(void **state) {
    (void)state;
    static float x[N];
    static uint8_t bytes[ENCODED_MAX];
    size_t length = outer_encoded_bytes(OUTER_INT8, N), last = length - 37 - 4;
    static const struct hostile cases[] = {
        { "scale of block 0", 0, { 0, 0, 0xc0, 0x7f }, 4 },   /* NaN */
        { "scale of block 0", 0, { 0, 0, 0x80, 0x7f }, 4 },   /* infinity */
        { "scale of block 1", 260, { 0, 0, 0x80, 0xbf }, 4 }, /* -1 */
        { "scale of block 1", 260, { 0, 0, 0, 0x80 }, 4 },    /* -0 */
        { "scale of block 2", 520, { 0, 0, 0, 0x7f }, 4 },    /* 1.7e38, times 127 infinite */
        { "-128", 4, { 0x80 }, 1 },
        { "-128", 259, { 0x80 }, 1 },
    };
    draw(x, 9);
    assert_ok(outer_encode(bytes, x, N, OUTER_INT8, &err));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint8_t kept[4];
        memcpy(kept, bytes + cases[i].at, 4);
        memcpy(bytes + cases[i].at, cases[i].bytes, cases[i].count);
        assert_all_readers_refuse(bytes, length, OUTER_INT8, cases[i].why);
        memcpy(bytes + cases[i].at, kept, 4);
    }
    uint8_t kept = bytes[length - 1];
    bytes[length - 1] = 0x80; /* the last element of the short block */
    assert_all_readers_refuse(bytes, length, OUTER_INT8, "block 5 holds a -128");
    bytes[length - 1] = kept;
    memset(bytes + last, 0xff, 4);
    assert_all_readers_refuse(bytes, length, OUTER_INT8, "scale of block 5");
}

/* -0 is no code, nor is there anything in the half byte that no element has. */
static void bad_fp4_bytes_are_refused(void **state) {
    (void)state;
    static float x[N];
    static uint8_t bytes[ENCODED_MAX];
    size_t length = outer_encoded_bytes(OUTER_FP4, N);
    assert_true(N % 2 == 1);
    draw(x, 9);
    assert_ok(outer_encode(bytes, x, N, OUTER_FP4, &err));
    static const struct {
        const char *why;
        size_t from_end;
        uint8_t set, clear;
    } cases[] = { { "code that stands", 1, 0x08, 0x0f }, { "code that stands", 1, 0x10, 0 },
                  { "code that stands", 2, 0x80, 0xf0 }, { "code that stands", 2, 0x08, 0x0f } };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint8_t *at = bytes + length - cases[i].from_end, kept = *at;
        *at = (uint8_t)((*at & ~cases[i].clear) | cases[i].set);
        assert_all_readers_refuse(bytes, length, OUTER_FP4, cases[i].why);
        *at = kept;
    }
    memcpy(bytes + 132, (uint8_t[]){ 0, 0, 0x80, 0xbf }, 4); /* -1 */
    assert_all_readers_refuse(bytes, length, OUTER_FP4, "scale of block 1");
}

static void bad_fp32_bytes_and_wrong_lengths_are_refused(void **state) {
    (void)state;
    static float x[N];
    static uint8_t bytes[ENCODED_MAX];
    draw(x, 10);
    assert_ok(outer_encode(bytes, x, N, OUTER_FP32, &err));
    memcpy(bytes + 4 * (N - 1), (uint8_t[]){ 1, 0, 0x80, 0xff }, 4); /* a signalling NaN, last */
    assert_all_readers_refuse(bytes, 4 * N, OUTER_FP32, "not finite");
    assert_all_readers_refuse(bytes, 4 * N - 1, OUTER_FP32, "bytes for");
    assert_all_readers_refuse(bytes, outer_encoded_bytes(OUTER_INT8, N) + 1, OUTER_INT8,
                              "bytes for");
    assert_all_readers_refuse(bytes, 0, OUTER_INT8, "bytes for");
    assert_all_readers_refuse(bytes, N, (enum outer_codec)7, "codec 7");
    assert_int_equal(outer_encoded_bytes((enum outer_codec)7, N), 0);
}

static void accumulate_refuses_terms_out_of_range(void **state) {
    (void)state;
    uint8_t bytes[4];
    int64_t sum[1] = { 5 };
    assert_ok(outer_encode(bytes, (float[]){ 1.0f }, 1, OUTER_FP32, &err));
    struct {
        uint32_t weight;
        float clip;
        int exponent;
        const char *why;
    } cases[] = {
        { OUTER_WEIGHT_LIMIT, 1.0f, 0, "weight" },
        { UINT32_MAX, 1.0f, 0, "weight" },
        { 1, 1.5f, 0, "clip" },
        { 1, -0.5f, 0, "clip" },
        { 1, NAN, 0, "clip" },
        { 1, 1.0f, OUTER_GRID_EXPONENT_MAX + 1, "exponent" },
        { 1, 1.0f, INT32_MIN, "exponent" },
        { 1, 1.0f, 38, "does not fit" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_refused(outer_accumulate(sum, bytes, 4, 1, OUTER_FP32, cases[i].weight,
                                        cases[i].clip, cases[i].exponent, &err),
                       cases[i].why);
        assert_int_equal(sum[0], 5);
    }
}

/* ---- exact sum ---- */

/* Known integers: ties go to even, the largest that fits fits, the next does not. */
static void grid_values_are_exact(void **state) {
    (void)state;
    float x[] = { 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, 0.25f, 3.0f, -7.75f };
    static const int64_t want[] = { 0, 2, 2, 0, -2, 0, 3, -8 };
    uint8_t bytes[sizeof x];
    int64_t sum[8] = { 0 };
    assert_ok(outer_encode(bytes, x, 8, OUTER_FP32, &err));
    assert_ok(outer_accumulate(sum, bytes, sizeof bytes, 8, OUTER_FP32, 3, 1.0f, 0, &err));
    for (int i = 0; i < 8; i++) assert_int_equal(sum[i], 3 * want[i]);
    float largest = 0x1.fffffep37f; /* the fp32 below 2^38 */
    int64_t one[1] = { 0 };
    assert_ok(outer_encode(bytes, &largest, 1, OUTER_FP32, &err));
    assert_ok(
        outer_accumulate(one, bytes, 4, 1, OUTER_FP32, OUTER_WEIGHT_LIMIT - 1, 1.0f, 0, &err));
    assert_int_equal(one[0], ((INT64_C(1) << 38) - (1 << 14)) * (OUTER_WEIGHT_LIMIT - 1));
    assert_ok(outer_encode(bytes, (float[]){ -0x1p38f }, 1, OUTER_FP32, &err));
    assert_refused(outer_accumulate(one, bytes, 4, 1, OUTER_FP32, 1, 1.0f, 0, &err),
                   "does not fit");
    assert_ok(
        outer_accumulate(one, bytes, 4, 1, OUTER_FP32, 1, 0.5f, 0, &err)); /* clipped, it does */
}

enum { MEMBERS = 5 };
static uint8_t contribution[MEMBERS][ENCODED_MAX];
static const uint32_t weight_of[MEMBERS] = { 1, 4096, 777, 1000000, 33 };
static const float clip_of[MEMBERS] = { 1.0f, 0.31f, 0.999f, 1.0f, 0.5f };
static const enum outer_codec codec_of[MEMBERS] = { OUTER_INT8, OUTER_INT8, OUTER_FP32, OUTER_FP4,
                                                    OUTER_FP32 };

static void draw_contributions(void) {
    static float x[N];
    for (int m = 0; m < MEMBERS; m++) {
        draw(x, 100 + (uint64_t)m);
        assert_ok(outer_encode(contribution[m], x, N, codec_of[m], &err));
    }
}

static void add_member(int64_t *sum, int m) {
    assert_ok(outer_accumulate(sum, contribution[m], outer_encoded_bytes(codec_of[m], N), N,
                               codec_of[m], weight_of[m], clip_of[m], 18, &err));
}

/* Contributions arrive in any order, and a partial sum from another aggregator is one of them. */
static void sum_depends_on_neither_order_nor_grouping(void **state) {
    (void)state;
    static int64_t forward[N], other[N], partial[N];
    static const int order[][MEMBERS] = { { 4, 3, 2, 1, 0 }, { 2, 0, 4, 1, 3 }, { 3, 4, 0, 2, 1 } };
    draw_contributions();
    for (int m = 0; m < MEMBERS; m++) add_member(forward, m);
    for (int o = 0; o < 3; o++) {
        memset(other, 0, sizeof other);
        for (int i = 0; i < MEMBERS; i++) add_member(other, order[o][i]);
        assert_memory_equal(other, forward, sizeof forward);
    }
    for (int split = 1; split < MEMBERS; split++) {
        uint32_t weight = 0;
        memset(other, 0, sizeof other);
        memset(partial, 0, sizeof partial);
        for (int m = 0; m < split; m++) add_member(other, m);
        for (int m = split; m < MEMBERS; m++) {
            add_member(partial, m);
            weight += weight_of[m];
        }
        assert_ok(outer_accumulate_partial(other, partial, N, weight, &err));
        assert_memory_equal(other, forward, sizeof forward);
    }
}

/* A sum over a chunk is the sum over its pieces, if they are cut at blocks. */
static void sum_of_a_chunk_is_the_sum_of_its_blocks(void **state) {
    (void)state;
    static int64_t whole[N], pieces[N];
    draw_contributions();
    add_member(whole, 1);
    for (size_t i = 0; i < N; i += OUTER_BLOCK) {
        size_t n = N - i < OUTER_BLOCK ? N - i : OUTER_BLOCK;
        assert_ok(outer_accumulate(pieces + i, contribution[1] + outer_encoded_bytes(OUTER_INT8, i),
                                   outer_encoded_bytes(OUTER_INT8, n), n, OUTER_INT8, weight_of[1],
                                   clip_of[1], 18, &err));
    }
    assert_memory_equal(whole, pieces, sizeof whole);
}

/* A partial sum that its weight cannot explain is a lie, and could overflow the total. */
static void impossible_partial_sums_are_refused(void **state) {
    (void)state;
    int64_t sum[3] = { 1, 2, 3 }, limit = (OUTER_GRID_LIMIT - 1) * 10;
    int64_t fits[3] = { limit, -limit, 0 }, high[3] = { 0, 0, limit + 1 },
            low[3] = { INT64_MIN, 0, 0 };
    assert_refused(outer_accumulate_partial(sum, high, 3, 10, &err), "partial sum");
    assert_refused(outer_accumulate_partial(sum, low, 3, 10, &err), "partial sum");
    assert_refused(outer_accumulate_partial(sum, fits, 3, OUTER_WEIGHT_LIMIT, &err), "weight");
    assert_true(sum[0] == 1 && sum[1] == 2 && sum[2] == 3);
    assert_ok(outer_accumulate_partial(sum, fits, 3, 10, &err));
    assert_true(sum[0] == limit + 1 && sum[1] == 2 - limit && sum[2] == 3);
}

/* Two members that sent the same and one that dropped out: the mean is theirs, not two thirds of
 * it. */
static void mean_divides_by_the_weight_that_arrived(void **state) {
    (void)state;
    float x[4] = { 1.0f, -0.25f, 3e-5f, 0.0f }, mean[4];
    uint8_t bytes[16];
    int64_t sum[4] = { 0 };
    assert_ok(outer_encode(bytes, x, 4, OUTER_FP32, &err));
    assert_ok(outer_accumulate(sum, bytes, 16, 4, OUTER_FP32, 100, 1.0f, 36, &err));
    assert_ok(outer_accumulate(sum, bytes, 16, 4, OUTER_FP32, 300, 1.0f, 36, &err));
    outer_mean(mean, sum, 4, 400, 36);
    for (int i = 0; i < 4; i++) assert_true(fabsf(mean[i] - x[i]) <= 0x1p-36f);
    assert_true(mean[0] == 1.0f && mean[1] == -0.25f);
}

/* The mean converts its sums in a way of its own, to be fast on any vector unit. It must round as
 * the plain conversion does, at every size and sign. */
static void mean_rounds_like_the_plain_conversion(void **state) {
    (void)state;
    static int64_t sum[4096];
    static float mean[4096];
    uint64_t bits = 88172645463325252u;
    for (int i = 0; i < 4096; i++) { /* xorshift64 */
        bits ^= bits << 13;
        bits ^= bits >> 7;
        bits ^= bits << 17;
        uint64_t magnitude = (bits >> 2) >> i % 62;
        sum[i] = bits & 1 ? -(int64_t)magnitude : (int64_t)magnitude;
    }
    outer_mean(mean, sum, 4096, 3, 5);
    for (int i = 0; i < 4096; i++) {
        float plain = (float)((double)sum[i] / 96.0);
        assert_memory_equal(&mean[i], &plain, sizeof plain);
    }
}

/* ---- the rest ---- */

static void mixing_with_alpha_zero_copies_the_anchor(void **state) {
    (void)state;
    float local[] = { 1.0f, NAN, INFINITY, 4.0f }, anchor[] = { 5.0f, 6.0f, 7.0f, -0.0f };
    outer_mix(local, anchor, 4, 0.0f);
    assert_memory_equal(local, anchor, sizeof anchor);
    outer_mix(local, (float[]){ 0, 0, 0, 0 }, 4, 1.0f);
    assert_true(local[0] == 5.0f && local[2] == 7.0f);
}

/* A member that was not summed moves as the anchor moved and keeps its own work. */
static void adding_the_delta_keeps_local_work(void **state) {
    (void)state;
    float local[] = { 10.5f, -2.0f }, new[] = { 3.0f, 1.0f }, old[] = { 2.0f, 1.0f };
    outer_add_delta(local, new, old, 2);
    assert_true(local[0] == 11.5f && local[1] == -2.0f);
}

static void norms_are_right_and_show_what_is_not_finite(void **state) {
    (void)state;
    static float x[N];
    for (size_t n = 0; n < 40; n++) {
        double want = 0.0;
        for (size_t i = 0; i < n; i++) {
            x[i] = (float)i - 20.0f;
            want += (double)x[i] * x[i]; /* small integers: exact in any order */
        }
        assert_true(outer_norm2(x, n) == want);
        assert_true(outer_absmax(x, n) == (n ? 20.0f : 0.0f));
    }
    for (int at = 0; at < 39; at++) {
        float kept = x[at];
        x[at] = at % 2 ? NAN : -INFINITY;
        assert_false(isfinite(outer_norm2(x, 39)) || isfinite(outer_absmax(x, 39)));
        x[at] = kept;
    }
}

/* An announced norm is checked by others chunk by chunk, so what the bytes say must be what their
 * values say, but for roundings far below the slack of that check. */
static void encoded_bytes_measure_like_their_values(void **state) {
    (void)state;
    static float x[N], decoded[N];
    static uint8_t bytes[4 * N + 4];
    static const size_t lengths[] = { 0, 1, 15, 16, 255, 256, 257, N };
    for (int codec = OUTER_FP32; codec <= OUTER_FP4; codec++)
        for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++) {
            size_t n = lengths[l], length = outer_encoded_bytes((enum outer_codec)codec, n);
            float absmax = -1;
            double norm2 = -1;
            outer_init_normal(x, 5 + l, 0, n, 3.0f);
            assert_int_equal(outer_encode(bytes, x, n, (enum outer_codec)codec, NULL), 0);
            assert_int_equal(outer_decode(decoded, bytes, length, n, (enum outer_codec)codec, NULL), 0);
            assert_int_equal(outer_measure(bytes, length, n, (enum outer_codec)codec, &absmax, &norm2, NULL), 0);
            assert_true(absmax == outer_absmax(decoded, n));
            assert_true(fabs(norm2 - outer_norm2(decoded, n)) <= 2e-7 * norm2);
        }
    err = (struct err){ 0 };
    float absmax;
    double norm2;
    bytes[4] = 0x80; /* -128 */
    assert_int_equal(outer_measure(bytes, outer_encoded_bytes(OUTER_INT8, N), N, OUTER_INT8, &absmax, &norm2, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
}

/* Members cut the parameters into chunks of their own choice and must draw the same model. */
static void initial_values_do_not_depend_on_chunks(void **state) {
    (void)state;
    static float whole[N], pieces[N], other[N];
    outer_init_normal(whole, 42, UINT64_C(5000000000), N, 0.02f);
    for (size_t i = 0, n; i < N; i += n) {
        n = 1 + i % 97 < N - i ? 1 + i % 97 : N - i;
        outer_init_normal(pieces + i, 42, UINT64_C(5000000000) + i, n, 0.02f);
    }
    assert_memory_equal(whole, pieces, sizeof whole);
    outer_init_normal(other, 43, UINT64_C(5000000000), N, 0.02f);
    int equal = 0;
    for (int i = 0; i < N; i++) equal += whole[i] == other[i];
    assert_true(equal < 5);
}

/* Over 2^18 draws mean and variance are within 5 standard errors of 0 and std^2, neighbours are
 * uncorrelated, and the tails are there: about 0.27 % beyond three sigma. */
static void initial_values_are_about_normal(void **state) {
    (void)state;
    enum { DRAWS = 1 << 18 };
    float *x = malloc(DRAWS * sizeof *x);
    double sum = 0.0, sum_sq = 0.0, neighbours = 0.0;
    int beyond = 0;
    outer_init_normal(x, 7, 0, DRAWS, 1.0f);
    for (int i = 0; i < DRAWS; i++) {
        sum += x[i];
        sum_sq += (double)x[i] * x[i];
        if (i) neighbours += (double)x[i] * x[i - 1];
        beyond += fabsf(x[i]) > 3.0f;
        assert_true(fabsf(x[i]) <= 6.0f);
    }
    double error = 1.0 / sqrt(DRAWS);
    assert_true(fabs(sum / DRAWS) < 5 * error);
    assert_true(fabs(sum_sq / DRAWS - 1.0) < 5 * sqrt(2.0) * error);
    assert_true(fabs(neighbours / DRAWS) < 5 * error);
    assert_true(beyond > DRAWS * 0.0015 && beyond < DRAWS * 0.0035);
    free(x);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bits_are_the_pinned_ones),
        cmocka_unit_test_teardown(bits_do_not_depend_on_the_callers_floating_point_mode,
                                  restore_floating_point_mode),
        cmocka_unit_test_teardown(tiny_parameters_are_not_zero_where_subnormals_are_flushed,
                                  restore_floating_point_mode),
        cmocka_unit_test_teardown(nothing_traps_where_the_caller_wants_signals,
                                  restore_floating_point_mode),
        cmocka_unit_test(every_nan_has_the_same_bits),
        cmocka_unit_test(nesterov_rounds_after_every_operation),
        cmocka_unit_test(int8_error_is_at_most_half_a_step),
        cmocka_unit_test(int8_scale_is_a_division),
        cmocka_unit_test(int8_layout_is_scale_then_values),
        cmocka_unit_test(fp4_takes_the_nearest_of_its_values),
        cmocka_unit_test(fp4_layout_is_scale_then_halves),
        cmocka_unit_test(fp32_carries_every_bit),
        cmocka_unit_test(tiny_blocks_encode),
        cmocka_unit_test(residual_is_what_the_encoding_lost),
        cmocka_unit_test(encoding_refuses_what_is_not_finite),
        cmocka_unit_test(bad_int8_bytes_are_refused_and_leave_the_sum_alone),
        cmocka_unit_test(bad_fp4_bytes_are_refused),
        cmocka_unit_test(bad_fp32_bytes_and_wrong_lengths_are_refused),
        cmocka_unit_test(accumulate_refuses_terms_out_of_range),
        cmocka_unit_test(grid_values_are_exact),
        cmocka_unit_test(sum_depends_on_neither_order_nor_grouping),
        cmocka_unit_test(sum_of_a_chunk_is_the_sum_of_its_blocks),
        cmocka_unit_test(impossible_partial_sums_are_refused),
        cmocka_unit_test(mean_divides_by_the_weight_that_arrived),
        cmocka_unit_test(mean_rounds_like_the_plain_conversion),
        cmocka_unit_test(mixing_with_alpha_zero_copies_the_anchor),
        cmocka_unit_test(adding_the_delta_keeps_local_work),
        cmocka_unit_test(encoded_bytes_measure_like_their_values),
        cmocka_unit_test(norms_are_right_and_show_what_is_not_finite),
        cmocka_unit_test(initial_values_do_not_depend_on_chunks),
        cmocka_unit_test(initial_values_are_about_normal),
    };
    if (sodium_init() < 0) return 1;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
