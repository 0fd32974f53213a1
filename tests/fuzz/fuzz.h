/* fuzz.h - what the fuzz targets share. A target feeds bytes to one parser of outside bytes and
 * checks what must hold whatever the bytes are; a broken promise is a failed assert, a sanitizer's
 * report, a timeout or too much memory. Each target also makes valid samples, from which fuzzing
 * starts and which the unit test requires to be taken as valid: so a target that no longer gets
 * past the first check of its parser is noticed.
 *
 *   tests/fuzz/run.sh           fuzzes all targets and prints one table (make fuzz)
 *   libfuzzer.c                 one target as libFuzzer wants it (clang)
 *   main.c                      replays files and writes samples, with any compiler
 *   tests/test_fuzz_corpus.c    replays the whole corpus and the samples (make unit)
 *   corpus/TARGET/              small inputs that together reach what fuzzing has reached so far */
#ifndef INTELLECT_TESTS_FUZZ_H
#define INTELLECT_TESTS_FUZZ_H

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Where a target's samples go. Both functions copy what they are given. */
struct fuzz_sink {
    void *arg;
    void (*sample)(void *arg, const char *name, const void *bytes, size_t length);
    void (*word)(void *arg, const char *text); /* for libFuzzer's dictionary */
};

struct fuzz_target {
    const char *name;
    /* Called once before the first input. */
    void (*init)(void);
    /* Feed one input. Keeps nothing. Returns whether the parser took it as valid. */
    bool (*take)(const uint8_t *bytes, size_t length);
    /* Valid inputs, without random numbers: the same at every call. */
    void (*samples)(const struct fuzz_sink *out);
};

/* X(name) for each; a target is in fuzz_NAME.c. */
#define FUZZ_TARGETS(X)                                                                            \
    X(frames) X(channel) X(messages) X(invite) X(entry) X(chain) X(settings) X(manifest)           \
    X(safetensors) X(s3) X(sync) X(core) X(tokenizer)
#define FUZZ_DECLARE(name) extern const struct fuzz_target fuzz_##name;
FUZZ_TARGETS(FUZZ_DECLARE)

/* ---- reading an input piece by piece; past its end all is zero ---------------------------------- */

struct fuzz_input {
    const uint8_t *at;
    size_t left;
};

static inline uint8_t fuzz_u8(struct fuzz_input *in) {
    if (!in->left) return 0;
    in->left--;
    return *in->at++;
}

static inline uint64_t fuzz_le(struct fuzz_input *in, int bytes) {
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++) value |= (uint64_t)fuzz_u8(in) << (8 * i);
    return value;
}

/* At most n bytes, fewer at the end; *n receives how many. */
static inline const uint8_t *fuzz_bytes(struct fuzz_input *in, size_t *n) {
    const uint8_t *at = in->at;
    if (*n > in->left) *n = in->left;
    in->at += *n;
    in->left -= *n;
    return at;
}

#endif
