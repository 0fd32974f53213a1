/* proto_rig.h - what the tests of proto/ share: random bytes that come back, and how a refusal is judged. Included once
 * by each. */
#ifndef INTELLECT_TESTS_PROTO_RIG_H
#define INTELLECT_TESTS_PROTO_RIG_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <stdio.h>
#include <string.h>

#include "proto/proto.h"

static uint64_t random_state = 1;
static inline uint64_t random_u64(void) { /* xorshift64*, so that a failure comes back */
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return random_state * UINT64_C(2685821657736338717);
}

static uint8_t junk[4096];
static inline void fill_junk(void) {
    for (size_t i = 0; i < sizeof junk; i++) junk[i] = (uint8_t)random_u64();
}

static inline void assert_hex(const uint8_t *bytes, size_t length, const char *hex) {
    char got[2049] = "";
    assert_true(length * 2 < sizeof got);
    for (size_t i = 0; i < length; i++) snprintf(got + 2 * i, 3, "%02x", bytes[i]);
    assert_string_equal(got, hex);
}

#define assert_refused(call, want_code, want_text)                                                 \
    do {                                                                                           \
        struct err e_ = {0}, *err = &e_;                                                           \
        assert_int_equal(call, -1);                                                                \
        if (e_.code != (want_code) || !strstr(e_.msg, want_text))                                  \
            fail_msg("code %d, \"%s\"; wanted %d, \"%s\"", (int)e_.code, e_.msg, want_code,        \
                     want_text);                                                                   \
    } while (0)

#endif
