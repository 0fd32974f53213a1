/* test_outer_cuda.c - the outer step's kernels give the bits of outer.c, and what goes to the device comes
 * back: on a GPU where `make gpu` runs this, else on the emulator. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/plugin.h"

static const size_t sizes[] = { 0, 1, 255, 256, 257, 4099 };
#define SIZES (sizeof sizes / sizeof *sizes)
#define MOST 4099

static struct kernels *k;

static int start(void **state) {
    (void)state;
    struct err err;
    setenv("EMULATOR_LATE", "1", 1); /* nothing is done before it is waited for */
    k = getenv("INTELLECT_TEST_GPU") ? kernels_cuda_create(0, sizeof(float), 0, &err)
                                     : intellect_cuda_create(KERNELS_PLUGIN_ABI, 0, sizeof(float), 0, &err);
    if (!k) fail_msg("%s", err.msg);
    return 0;
}

static int finish(void **state) {
    (void)state;
    struct err err;
    if (k->check(k, &err)) fail_msg("%s", err.msg);
    k->destroy(k);
    return 0;
}

static uint32_t random_bits(void) {
    static uint64_t seed = 1;
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 32);
}

/* Of every kind: about 1, tiny, subnormal, zeroes of both signs, halfway between two codes, and where `wild`
 * also huge ones, infinities and NaNs with payloads. */
static float draw(int wild) {
    uint32_t bits = random_bits(), kind = random_bits() % (wild ? 10 : 7);
    float x = (float)(int32_t)bits * 0x1p-31f;
    if (kind == 1) x *= 1e-30f;
    if (kind == 2) x = x < 0 ? -0.0f : 0.0f;
    if (kind == 3) bits &= 0x807fffff, memcpy(&x, &bits, sizeof x);
    if (kind == 4) x = (float)(int32_t)(bits % 255) - 127 + 0.5f;
    if (kind == 7) memcpy(&x, &bits, sizeof x);
    if (kind == 8) x = x < 0 ? -INFINITY : INFINITY;
    if (kind == 9) bits |= 0x7f800001, memcpy(&x, &bits, sizeof x);
    return x;
}

static void fill(float *x, size_t n, int wild) {
    for (size_t i = 0; i < n; i++) x[i] = draw(wild);
}

static void *on_device(const void *x, size_t bytes) {
    struct err err;
    void *p = k->alloc(k, bytes, &err);
    if (!p) fail_msg("%s", err.msg);
    k->copy_in(k, p, x, bytes);
    return p;
}

/* Is what lies at `p` on the device, which is freed, what the host has? */
static void same(const void *host, void *p, size_t bytes) {
    uint8_t *got = malloc(bytes + 1);
    k->copy_out(k, got, p, bytes);
    k->free(k, p);
    for (size_t i = 0; i < bytes; i++)
        if (got[i] != ((const uint8_t *)host)[i])
            fail_msg("byte %zu of %zu is %02x, not %02x", i, bytes, got[i], ((const uint8_t *)host)[i]);
    free(got);
}

static float a[MOST], b[MOST], c[MOST], d[MOST];
static uint8_t bytes[4 * MOST + 4];

static void pseudo_gradients(void **state) {
    (void)state;
    for (size_t s = 0; s < 2 * SIZES; s++) {
        size_t n = sizes[s / 2], size = n * sizeof *a;
        fill(a, n, 1), fill(b, n, 1), fill(c, n, 1);
        float *d_a = on_device(a, size), *d_b = on_device(b, size), *d_c = on_device(c, size);
        k->outer->pseudo_gradient(k, d_a, d_a, d_b, s % 2 ? d_c : NULL, n);
        outer_pseudo_gradient(a, a, b, s % 2 ? c : NULL, n);
        same(a, d_a, size);
        same(b, d_b, size);
        same(c, d_c, size);
    }
}

static void steps(void **state) {
    (void)state;
    for (size_t s = 0; s < SIZES; s++) {
        size_t n = sizes[s], size = n * sizeof *a;
        fill(a, n, 1), fill(b, n, 1), fill(c, n, 1);
        float *d_a = on_device(a, size), *d_b = on_device(b, size), *d_c = on_device(c, size);
        for (int i = 0; i < 3; i++) {
            k->outer->nesterov(k, d_a, d_b, d_c, n, 0.7f, 0.9f);
            outer_nesterov(a, b, c, n, 0.7f, 0.9f);
        }
        same(a, d_a, size);
        same(b, d_b, size);
        same(c, d_c, size);
    }
}

static void mixing_and_moving(void **state) {
    (void)state;
    static const float alphas[] = { 0.0f, -0.0f, 0.5f, 0.3f, 1.0f, 1e-42f };
    for (size_t s = 0; s < SIZES; s++)
        for (size_t i = 0; i < sizeof alphas / sizeof *alphas; i++) {
            size_t n = sizes[s], size = n * sizeof *a;
            fill(a, n, 1), fill(b, n, 1), fill(c, n, 1);
            float *d_a = on_device(a, size), *d_b = on_device(b, size), *d_c = on_device(c, size);
            k->outer->mix(k, d_a, d_b, n, alphas[i]);
            k->outer->add_delta(k, d_a, d_b, d_c, n);
            outer_mix(a, b, n, alphas[i]);
            outer_add_delta(a, b, c, n);
            same(a, d_a, size);
            same(b, d_b, size);
            same(c, d_c, size);
        }
}

/* Blocks of one kind too: all zero, all subnormal, so coarse a scale that codes are clamped. */
static void fill_blocks(float *x, size_t n) {
    fill(x, n, 0);
    for (size_t i = 0; i < n; i += OUTER_BLOCK) {
        uint32_t kind = random_bits() % 4;
        for (size_t j = i; j < n && j < i + OUTER_BLOCK; j++)
            x[j] = kind == 0   ? (j % 2 ? -0.0f : 0.0f)
                   : kind == 1 ? x[j] * 1e-43f
                   : kind == 2 ? x[j] * 1e30f
                               : x[j];
    }
}

static void encoding_and_what_it_loses(void **state) {
    (void)state;
    struct err err;
    for (size_t s = 0; s < 9 * SIZES; s++) {
        size_t n = sizes[s / 9], size = n * sizeof *a;
        enum outer_codec codec = (enum outer_codec)(s % 3);
        size_t length = outer_encoded_bytes(codec, n);
        fill_blocks(a, n);
        memset(bytes, 0xaa, sizeof bytes);
        float *d_a = on_device(a, size), *d_b = on_device(b, size);
        uint8_t *d_bytes = on_device(bytes, sizeof bytes);
        if (k->outer->encode(k, d_bytes, d_a, n, codec, &err)) fail_msg("%s", err.msg);
        assert_int_equal(outer_encode(bytes, a, n, codec, &err), 0);
        k->outer->decode(k, d_b, d_bytes, n, codec);
        assert_int_equal(outer_decode(b, bytes, length, n, codec, &err), 0);
        same(b, d_b, size);
        k->outer->residual(k, d_a, d_a, d_bytes, n, codec);
        assert_int_equal(outer_residual(a, a, bytes, length, n, codec, &err), 0);
        same(a, d_a, size);
        same(bytes, d_bytes, sizeof bytes); /* nothing beyond the end either */
    }
}

/* A contribution that overflowed is found, and the first element is named. */
static void what_cannot_travel_is_named(void **state) {
    (void)state;
    static const float bad[] = { INFINITY, -INFINITY, NAN };
    struct err here, there;
    for (size_t s = 1; s < SIZES; s++)
        for (int i = 0; i < 9; i++) {
            size_t n = sizes[s], size = n * sizeof *a;
            enum outer_codec codec = (enum outer_codec)(i % 3);
            fill(a, n, 0);
            a[n - 1] = 0x1.fffffep127f; /* FLT_MAX may travel; the end of the world comes before */
            a[n * 2 / 3] = a[n / 3] = bad[i / 3];
            float *d_a = on_device(a, size);
            uint8_t *d_bytes = on_device(bytes, sizeof bytes);
            assert_int_equal(k->outer->encode(k, d_bytes, d_a, n, codec, &there), -1);
            assert_int_equal(outer_encode(bytes, a, n, codec, &here), -1);
            assert_int_equal(there.code, here.code);
            assert_string_equal(there.msg, here.msg);
            k->free(k, d_a);
            k->free(k, d_bytes);
        }
}

/* Rounds of error feedback, and the anchor's step from the decoded mean: all on the device, and all on the
 * host. */
static void rounds_with(enum outer_codec codec) {
    struct err err;
    const size_t n = 1000, size = n * sizeof *a;
    static float momentum[1000], residual[1000];
    memset(momentum, 0, sizeof momentum), memset(residual, 0, sizeof residual);
    for (size_t i = 0; i < n; i++) a[i] = (float)(int32_t)random_bits() * 0x1p-31f;
    size_t length = outer_encoded_bytes(codec, n);
    float *d_a = on_device(a, size), *d_momentum = on_device(momentum, size),
          *d_residual = on_device(residual, size);
    float *d_x = on_device(c, size);
    uint8_t *d_bytes = on_device(bytes, length);
    for (int round = 0; round < 20; round++) {
        for (size_t i = 0; i < n; i++) b[i] = a[i] + (float)(int32_t)random_bits() * 0x1p-38f; /* local */
        float *d_b = on_device(b, size);
        k->outer->pseudo_gradient(k, d_x, d_a, d_b, d_residual, n);
        assert_int_equal(k->outer->encode(k, d_bytes, d_x, n, codec, &err), 0);
        k->outer->residual(k, d_residual, d_x, d_bytes, n, codec);
        k->outer->decode(k, d_x, d_bytes, n, codec);
        k->outer->nesterov(k, d_a, d_momentum, d_x, n, 0.7f, 0.9f);
        outer_pseudo_gradient(c, a, b, residual, n);
        assert_int_equal(outer_encode(bytes, c, n, codec, &err), 0);
        assert_int_equal(outer_residual(residual, c, bytes, length, n, codec, &err), 0);
        assert_int_equal(outer_decode(d, bytes, length, n, codec, &err), 0);
        outer_nesterov(a, momentum, d, n, 0.7f, 0.9f);
        same(b, d_b, size);
    }
    same(a, d_a, size);
    same(momentum, d_momentum, size);
    same(residual, d_residual, size);
    same(d, d_x, size);
    same(bytes, d_bytes, length);
}

static void rounds_end_in_the_same_anchor(void **state) {
    (void)state;
    rounds_with(OUTER_INT8);
    rounds_with(OUTER_FP4);
}

/* Through staging and past it, in pieces of all lengths; the host's memory may change once copy_in returned,
 * and what the device has then is still what it was given. */
static void what_goes_in_comes_out(void **state) {
    (void)state;
    static const size_t lengths[] = { 0, 1, 262143, 262144, 4194303, 4194304, 4194305, 8388608, 13000001 };
    struct err err;
    for (int pinned = 1; pinned >= 0; pinned--) {
        setenv("EMULATOR_PINNED", pinned ? "1" : "0", 1);
        if (!pinned) k->destroy(k), start(state);
        for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++) {
            size_t n = lengths[l];
            uint8_t *host = malloc(n + 1), *back = malloc(n + 1), *p = k->alloc(k, n, &err);
            if (!p) fail_msg("%s", err.msg);
            for (size_t i = 0; i < n; i++) host[i] = (uint8_t)(i * 2654435761u >> 24);
            back[n] = 0x55;
            k->copy_in(k, p, host, n);
            memset(host, 0, n);
            k->copy_out(k, back, p, n);
            for (size_t i = 0; i < n; i++)
                if (back[i] != (uint8_t)(i * 2654435761u >> 24)) fail_msg("byte %zu of %zu", i, n);
            assert_int_equal(back[n], 0x55);
            k->free(k, p);
            free(host), free(back);
        }
    }
    unsetenv("EMULATOR_PINNED");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(pseudo_gradients, start, finish),
        cmocka_unit_test_setup_teardown(steps, start, finish),
        cmocka_unit_test_setup_teardown(mixing_and_moving, start, finish),
        cmocka_unit_test_setup_teardown(encoding_and_what_it_loses, start, finish),
        cmocka_unit_test_setup_teardown(what_cannot_travel_is_named, start, finish),
        cmocka_unit_test_setup_teardown(what_goes_in_comes_out, start, finish),
        cmocka_unit_test_setup_teardown(rounds_end_in_the_same_anchor, start, finish),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
