/* outer.c - the arithmetic of the outer step. The same bits come out on every machine because
 *  - each operation is one IEEE fp32 or double operation (no x87, no fused multiply-add, no
 *    fast-math), in an order that the source fixes; where a sum could go in any order, its lanes
 *    are written out;
 *  - the floating-point environment is set around each public function. What computes with
 *    floating-point numbers, or compares them, is a noinline function that reads or writes arrays,
 *    so no compiler moves it out of that bracket;
 *  - a NaN is stored as one and the same NaN, for processors make different ones;
 *  - contributions are added as integers.
 * tests/bitexact/ builds this file with many compilers and flags and compares what they compute. */
#include "kernels/kernels.h"
#include "kernels/outer_elements.h"
#include "kernels/wide.h"

#include <assert.h>
#include <endian.h>
#include <fenv.h>
#include <float.h>
#include <string.h>

#ifdef __FAST_MATH__
#error "the outer step must not be compiled with -ffast-math"
#endif
#if (defined(__GCC_IEC_559) && __GCC_IEC_559 == 0) || __FINITE_MATH_ONLY__
#error "the outer step must not be compiled with any part of -ffast-math"
#endif
#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16 /* 16: narrower types are widened to fp16 */
#error "fp32 and double operations must round once (on 32-bit x86: -mfpmath=sse)"
#endif

/* ---- floating-point environment ---- */

#if defined(__x86_64__)
#define MXCSR_DEFAULT 0x1f80u /* round to nearest even, subnormals kept, every exception masked */
static uint64_t fp_get(void) {
    uint32_t mxcsr;
    __asm__ volatile("stmxcsr %0" : "=m"(mxcsr) : : "memory");
    return mxcsr;
}
static void fp_set(uint64_t value) {
    uint32_t mxcsr = (uint32_t)value;
    __asm__ volatile("ldmxcsr %0" : : "m"(mxcsr) : "memory");
}
#define FP_STRICT MXCSR_DEFAULT
#elif defined(__aarch64__)
static uint64_t fp_get(void) {
    uint64_t fpcr;
    __asm__ volatile("mrs %0, fpcr" : "=r"(fpcr) : : "memory");
    return fpcr;
}
static void fp_set(uint64_t value) {
    __asm__ volatile("msr fpcr, %0" : : "r"(value) : "memory");
}
#define FP_STRICT 0u
#else
static uint64_t fp_get(void) {
    return (uint64_t)fegetround();
}
static void fp_set(uint64_t value) {
    fesetround((int)value);
}
#define FP_STRICT FE_TONEAREST
#endif

void outer_fp_begin(struct outer_fp *fp) {
    fp->saved = fp_get();
    fp_set(FP_STRICT);
}

void outer_fp_end(const struct outer_fp *fp) {
    fp_set(fp->saved);
}

/* ---- bits ---- */

static inline double double_of_bits(uint64_t u) {
    double x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static inline int64_t bits_of_double(double x) {
    int64_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static inline float load_float(const uint8_t *p) {
    uint32_t u;
    memcpy(&u, p, sizeof u);
    return float_of(le32toh(u));
}

static inline void store_float(uint8_t *p, float x) {
    uint32_t u = htole32(bits_of(x));
    memcpy(p, &u, sizeof u);
}

#define NAN_BITS_DOUBLE 0x7ff8000000000000u

/* As ROUND_FLOAT, with 1.5 * 2^52: exact for |x| < 2^51, and unlike a conversion to int64 every vector unit can do it. */
#define ROUND_DOUBLE 6755399441055744.0

/* (double)x, rounded once to nearest even, from operations that every vector unit has (a conversion
 * of int64 needs AVX-512DQ). The halves of x become mantissa bits: high is 2^84 + 2^63 + x without
 * its low half, low is 2^52 + that half; the difference is exact, so only the last addition rounds. */
static inline double double_of_int64(int64_t x) {
    uint64_t u = (uint64_t)x;
    double high = double_of_bits((u >> 32) ^ 0x4530000080000000u);
    double low = double_of_bits((u & 0xffffffffu) | 0x4330000000000000u);
    return (high - 0x1.00000801p84) + low;
}

static inline int64_t round_to_int64(double x) {
    return bits_of_double(x + ROUND_DOUBLE) - bits_of_double(ROUND_DOUBLE);
}

/* 2^exponent, |exponent| <= 1022. */
static double power_of_two(int exponent) {
    return double_of_bits((uint64_t)(exponent + 1023) << 52);
}

/* ---- codecs ---- */

static size_t smaller(size_t a, size_t b) {
    return a < b ? a : b;
}

size_t outer_encoded_bytes(enum outer_codec codec, size_t n) {
    switch (codec) {
    case OUTER_FP32:
        return 4 * n;
    case OUTER_INT8:
        return n + 4 * ((n + OUTER_BLOCK - 1) / OUTER_BLOCK);
    case OUTER_FP4:
        return (n + 1) / 2 + 4 * ((n + OUTER_BLOCK - 1) / OUTER_BLOCK); /* only the last block may be odd */
    }
    return 0;
}

/* 0: not in blocks. */
static float top_of(enum outer_codec codec) {
    return codec == OUTER_INT8 ? INT8_TOP : codec == OUTER_FP4 ? FP4_TOP : 0.0f;
}

WIDE static uint32_t largest_magnitude(const float *x, size_t n) {
    int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (size_t i = 0; i < n; i++) {
        int32_t magnitude = (int32_t)(bits_of(x[i]) & ~SIGN_BIT);
        largest = magnitude > largest ? magnitude : largest;
    }
    return (uint32_t)largest;
}

WIDE static void quantise_block_int8(uint8_t *out, const float *x, float scale, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) out[i] = (uint8_t)quantise_int8(x[i], scale);
}

WIDE static void quantise_block_fp4(uint8_t *out, const float *x, float scale, size_t n) {
    size_t half = (n + 1) / 2, pairs = n / 2;
#pragma omp simd
    for (size_t i = 0; i < pairs; i++)
        out[i] = (uint8_t)(quantise_fp4(x[i], scale) | quantise_fp4(x[half + i], scale) << 4);
    if (pairs < half) out[pairs] = (uint8_t)quantise_fp4(x[pairs], scale);
}

/* Encode block by block. Returns how many elements were done before one that cannot be encoded. */
__attribute__((noinline)) static size_t encode_blocks(uint8_t *out, const float *x, size_t n,
                                                      enum outer_codec codec) {
    float top = top_of(codec);
    for (size_t i = 0; i < n; i += OUTER_BLOCK) {
        size_t len = smaller(n - i, OUTER_BLOCK), bytes = outer_encoded_bytes(codec, len);
        uint32_t magnitude = largest_magnitude(x + i, len);
        float scale = scale_for(magnitude, top);
        if (magnitude >= INFINITY_BITS || !scale_is_valid(scale, top)) return i;
        store_float(out, scale);
        if (scale == 0.0f) memset(out + 4, 0, bytes - 4);
        else if (codec == OUTER_INT8) quantise_block_int8(out + 4, x + i, scale, len);
        else quantise_block_fp4(out + 4, x + i, scale, len);
        out += bytes;
    }
    return n;
}

WIDE static void store_floats(uint8_t *out, const float *x, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) store_float(out + 4 * i, x[i]);
}

__attribute__((noinline)) static size_t first_not_encodable(const float *x, size_t n, float top) {
    size_t i = 0;
    while (i < n && is_encodable(bits_of(x[i]) & ~SIGN_BIT, top)) i++;
    return i;
}

int outer_encode(uint8_t *bytes, const float *x, size_t n, enum outer_codec codec,
                 struct err *err) {
    struct outer_fp fp;
    size_t done = n;
    assert(codec == OUTER_FP32 || top_of(codec) > 0);
    outer_fp_begin(&fp);
    if (codec != OUTER_FP32) done = encode_blocks(bytes, x, n, codec);
    else if (largest_magnitude(x, n) >= INFINITY_BITS) done = 0;
    else store_floats(bytes, x, n);
    if (done < n) done += first_not_encodable(x + done, n - done, top_of(codec));
    if (done < n)
        err_set(err, ERR_CORRUPT, "element %zu of %zu is %g, which codec %d cannot carry", done, n,
                (double)x[done], (int)codec);
    outer_fp_end(&fp);
    return done == n ? 0 : -1;
}

/* ---- blocks as integers ---- */

WIDE static void widen_fp4(int8_t *q, const uint8_t *codes, size_t n) {
    size_t half = (n + 1) / 2, pairs = n / 2;
#pragma omp simd
    for (size_t i = 0; i < half; i++) q[i] = (int8_t)integer_of_fp4(codes[i] & 15);
#pragma omp simd
    for (size_t i = 0; i < pairs; i++) q[half + i] = (int8_t)integer_of_fp4(codes[i] >> 4);
    if (pairs < half && codes[pairs] >> 4) q[pairs] = NO_CODE; /* nobody's half must be 0 */
}

/* The integers of the block at `bytes`, there or in `room`. */
static const int8_t *integers_of(const uint8_t *bytes, size_t len, enum outer_codec codec,
                                 int8_t room[OUTER_BLOCK]) {
    if (codec == OUTER_INT8) return (const int8_t *)bytes + 4;
    widen_fp4(room, bytes + 4, len);
    return room;
}

/* Smallest and largest int8 of a block, for its largest magnitude and to find a -128. */
WIDE static void extremes(const int8_t *q, size_t n, int *min, int *max) {
    int8_t low = 0, high = 0;
#pragma omp simd reduction(min : low) reduction(max : high)
    for (size_t i = 0; i < n; i++) {
        low = q[i] < low ? q[i] : low;
        high = q[i] > high ? q[i] : high;
    }
    *min = (int)low; /* NOLINT(bugprone-signed-char-misuse): signed on purpose */
    *max = (int)high; /* NOLINT(bugprone-signed-char-misuse) */
}

/* Element i goes to lane i % 16; the lanes are then added in halves: 8 + 8, 4 + 4, 2 + 2, 1 + 1. */
#define LANES 16

static inline double float_at(const uint8_t *p, int encoded) {
    float x;
    memcpy(&x, p, sizeof x);
    return (double)(encoded ? load_float(p) : x);
}

/* Of n floats in memory, or encoded as OUTER_FP32. */
WIDE static double sum_of_squares(const uint8_t *p, size_t n, int encoded) {
    double lane[LANES] = { 0 };
    size_t whole = n / LANES * LANES;
    for (size_t i = 0; i < whole; i += LANES)
#pragma omp simd
        for (int j = 0; j < LANES; j++) {
            double x = float_at(p + 4 * (i + (size_t)j), encoded);
            lane[j] += x * x;
        }
    for (size_t i = whole; i < n; i++) {
        double x = float_at(p + 4 * i, encoded);
        lane[i % LANES] += x * x;
    }
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++) lane[j] += lane[j + half];
    return lane[0] == lane[0] ? lane[0] : double_of_bits(NAN_BITS_DOUBLE);
}

/* At most OUTER_BLOCK * 128^2, which an int32 holds. The lanes are for the vector unit: integers add
 * up to the same in any order. */
WIDE static int32_t squares(const int8_t *q, size_t n) {
    int32_t lane[LANES] = { 0 };
    size_t whole = n / LANES * LANES;
    for (size_t i = 0; i < whole; i += LANES)
#pragma omp simd
        for (int j = 0; j < LANES; j++) lane[j] += (int32_t)q[i + j] * q[i + j];
    for (size_t i = whole; i < n; i++) lane[0] += (int32_t)q[i] * q[i];
    for (int j = 1; j < LANES; j++) lane[0] += lane[j];
    return lane[0];
}

/* Check every block and find the largest magnitude that it decodes to; norm2, unless NULL, receives the
 * sum of squares. */
__attribute__((noinline)) static int inspect_blocks(const uint8_t *bytes, size_t n, enum outer_codec codec,
                                                    float *absmax, double *norm2, struct err *err) {
    int8_t room[OUTER_BLOCK];
    for (size_t i = 0; i < n; i += OUTER_BLOCK) {
        size_t len = smaller(n - i, OUTER_BLOCK);
        const int8_t *q = integers_of(bytes, len, codec, room);
        float scale = load_float(bytes);
        int min, max;
        if (!scale_is_valid(scale, top_of(codec)))
            return err_set(err, ERR_CORRUPT, "scale of block %zu is %g, must be finite and >= 0",
                           i / OUTER_BLOCK, (double)scale);
        extremes(q, len, &min, &max);
        if (min == NO_CODE)
            return err_set(err, ERR_CORRUPT, "block %zu holds a %s", i / OUTER_BLOCK,
                           codec == OUTER_INT8 ? "-128" : "code that stands for nothing");
        float largest = scale * (float)(max > -min ? max : -min);
        if (largest > *absmax) *absmax = largest;
        if (norm2)
            *norm2 += (double)scale * (double)scale * (double)squares(q, len);
        bytes += outer_encoded_bytes(codec, len);
    }
    return 0;
}

WIDE static uint32_t largest_magnitude_encoded(const uint8_t *bytes, size_t n) {
    int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (size_t i = 0; i < n; i++) {
        int32_t magnitude = (int32_t)(bits_of(load_float(bytes + 4 * i)) & ~SIGN_BIT);
        largest = magnitude > largest ? magnitude : largest;
    }
    return (uint32_t)largest;
}

/* outer_check(), which also finds the largest magnitude among the decoded values, and unless norm2 is
 * NULL the sum of their squares. */
static int inspect(const uint8_t *bytes, size_t length, size_t n, enum outer_codec codec,
                   float *absmax, double *norm2, struct err *err) {
    *absmax = 0.0f;
    if (norm2) *norm2 = 0.0;
    if (codec != OUTER_FP32 && top_of(codec) == 0)
        return err_set(err, ERR_CORRUPT, "codec %d does not exist", (int)codec);
    if (n > SIZE_MAX / 8 || length != outer_encoded_bytes(codec, n))
        return err_set(err, ERR_CORRUPT, "%zu bytes for %zu elements of codec %d, must be %zu",
                       length, n, (int)codec, outer_encoded_bytes(codec, n));
    if (codec != OUTER_FP32) return inspect_blocks(bytes, n, codec, absmax, norm2, err);
    uint32_t magnitude = largest_magnitude_encoded(bytes, n);
    if (magnitude >= INFINITY_BITS)
        return err_set(err, ERR_CORRUPT, "a value among %zu is not finite", n);
    *absmax = float_of(magnitude);
    if (norm2) *norm2 = sum_of_squares(bytes, n, 1);
    return 0;
}

int outer_measure(const uint8_t *bytes, size_t length, size_t n, enum outer_codec codec,
                  float *absmax, double *norm2, struct err *err) {
    struct outer_fp fp;
    outer_fp_begin(&fp);
    int rc = inspect(bytes, length, n, codec, absmax, norm2, err);
    outer_fp_end(&fp);
    return rc;
}

int outer_check(const uint8_t *bytes, size_t length, size_t n, enum outer_codec codec,
                struct err *err) {
    struct outer_fp fp;
    float absmax;
    outer_fp_begin(&fp);
    int rc = inspect(bytes, length, n, codec, &absmax, NULL, err);
    outer_fp_end(&fp);
    return rc;
}

/* minus: NULL for out = value, else out = minus - value. */
WIDE static void decode_block(float *out, const float *minus, const int8_t *q, float scale,
                             size_t n) {
    if (minus) {
#pragma omp simd
        for (size_t i = 0; i < n; i++) out[i] = lost_of(minus[i], scale * (float)q[i]);
    } else {
#pragma omp simd
        for (size_t i = 0; i < n; i++) out[i] = scale * (float)q[i];
    }
}

WIDE static void decode_fp32(float *out, const float *minus, const uint8_t *bytes, size_t n) {
    if (minus) {
#pragma omp simd
        for (size_t i = 0; i < n; i++) out[i] = lost_of(minus[i], load_float(bytes + 4 * i));
    } else {
#pragma omp simd
        for (size_t i = 0; i < n; i++) out[i] = load_float(bytes + 4 * i);
    }
}

static int decode(float *out, const float *minus, const uint8_t *bytes, size_t length, size_t n,
                  enum outer_codec codec, struct err *err) {
    float absmax;
    if (inspect(bytes, length, n, codec, &absmax, NULL, err) != 0) return -1;
    if (codec == OUTER_FP32) {
        decode_fp32(out, minus, bytes, n);
        return 0;
    }
    int8_t room[OUTER_BLOCK];
    for (size_t i = 0; i < n; i += OUTER_BLOCK) {
        size_t len = smaller(n - i, OUTER_BLOCK);
        decode_block(out + i, minus ? minus + i : NULL, integers_of(bytes, len, codec, room), load_float(bytes),
                     len);
        bytes += outer_encoded_bytes(codec, len);
    }
    return 0;
}

int outer_decode(float *x, const uint8_t *bytes, size_t length, size_t n, enum outer_codec codec,
                 struct err *err) {
    struct outer_fp fp;
    outer_fp_begin(&fp);
    int rc = decode(x, NULL, bytes, length, n, codec, err);
    outer_fp_end(&fp);
    return rc;
}

int outer_residual(float *residual, const float *x, const uint8_t *bytes, size_t length, size_t n,
                   enum outer_codec codec, struct err *err) {
    struct outer_fp fp;
    outer_fp_begin(&fp);
    int rc = decode(residual, x, bytes, length, n, codec, err);
    outer_fp_end(&fp);
    return rc;
}

/* ---- exact sum ---- */

/* The product of value (24 bits), clip (24 bits) and a power of two is exact in double, so the only
 * rounding is the one to an integer, and every machine takes the same one. */
WIDE static void add_block(int64_t *sum, const int8_t *q, float scale, double factor, int64_t weight,
                           size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++)
        sum[i] += round_to_int64((double)(scale * (float)q[i]) * factor) * weight;
}

WIDE static void add_fp32(int64_t *sum, const uint8_t *bytes, double factor, int64_t weight,
                          size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++)
        sum[i] += round_to_int64((double)load_float(bytes + 4 * i) * factor) * weight;
}

static int check_terms(uint32_t weight, float clip, int grid_exponent, struct err *err) {
    if (weight >= OUTER_WEIGHT_LIMIT)
        return err_set(err, ERR_CORRUPT, "weight %u, must be below %u", weight, OUTER_WEIGHT_LIMIT);
    if (!(clip >= 0.0f && clip <= 1.0f))
        return err_set(err, ERR_CORRUPT, "clip factor %g, must be in [0,1]", (double)clip);
    if (grid_exponent < -OUTER_GRID_EXPONENT_MAX || grid_exponent > OUTER_GRID_EXPONENT_MAX)
        return err_set(err, ERR_CORRUPT, "grid exponent %d, must be within +-%d", grid_exponent,
                       OUTER_GRID_EXPONENT_MAX);
    return 0;
}

__attribute__((noinline)) static int accumulate(int64_t *sum, const uint8_t *bytes, size_t length,
                                                size_t n, enum outer_codec codec, uint32_t weight,
                                                float clip, int grid_exponent, struct err *err) {
    float absmax;
    if (check_terms(weight, clip, grid_exponent, err) != 0) return -1;
    if (inspect(bytes, length, n, codec, &absmax, NULL, err) != 0) return -1;
    double factor = (double)clip * power_of_two(grid_exponent);
    /* From limit - 0.5 up, rounding to even gives the limit. */
    if (!((double)absmax * factor < (double)OUTER_GRID_LIMIT - 0.5))
        return err_set(err, ERR_CORRUPT, "largest value %g does not fit the round's grid of 1/%g",
                       (double)absmax, factor);
    if (codec == OUTER_FP32) {
        add_fp32(sum, bytes, factor, weight, n);
        return 0;
    }
    int8_t room[OUTER_BLOCK];
    for (size_t i = 0; i < n; i += OUTER_BLOCK) {
        size_t len = smaller(n - i, OUTER_BLOCK);
        add_block(sum + i, integers_of(bytes, len, codec, room), load_float(bytes), factor, weight, len);
        bytes += outer_encoded_bytes(codec, len);
    }
    return 0;
}

int outer_accumulate(int64_t *sum, const uint8_t *bytes, size_t length, size_t n,
                     enum outer_codec codec, uint32_t weight, float clip, int grid_exponent,
                     struct err *err) {
    struct outer_fp fp;
    outer_fp_begin(&fp);
    int rc = accumulate(sum, bytes, length, n, codec, weight, clip, grid_exponent, err);
    outer_fp_end(&fp);
    return rc;
}

WIDE static int any_beyond(const int64_t *x, size_t n, int64_t limit) {
    int64_t beyond = 0;
#pragma omp simd reduction(| : beyond)
    for (size_t i = 0; i < n; i++) beyond |= (int64_t)(x[i] > limit) | (int64_t)(x[i] < -limit);
    return beyond != 0;
}

WIDE static void add_int64(int64_t *sum, const int64_t *x, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) sum[i] += x[i];
}

int outer_accumulate_partial(int64_t *sum, const int64_t *partial, size_t n, uint32_t weight,
                             struct err *err) {
    if (weight >= OUTER_WEIGHT_LIMIT)
        return err_set(err, ERR_CORRUPT, "weight %u, must be below %u", weight, OUTER_WEIGHT_LIMIT);
    if (any_beyond(partial, n, (OUTER_GRID_LIMIT - 1) * weight))
        return err_set(err, ERR_CORRUPT, "a partial sum is larger than its weight %u allows",
                       weight);
    add_int64(sum, partial, n);
    return 0;
}

WIDE static void mean_of(float *out, const int64_t *sum, size_t n, uint64_t weight,
                         int grid_exponent) {
    double divisor = (double)weight * power_of_two(grid_exponent); /* exact: a 24-bit integer */
#pragma omp simd
    for (size_t i = 0; i < n; i++) out[i] = (float)(double_of_int64(sum[i]) / divisor);
}

void outer_mean(float *out, const int64_t *sum, size_t n, uint64_t weight, int grid_exponent) {
    struct outer_fp fp;
    assert(weight > 0 && weight < OUTER_WEIGHT_LIMIT);
    assert(grid_exponent >= -OUTER_GRID_EXPONENT_MAX && grid_exponent <= OUTER_GRID_EXPONENT_MAX);
    outer_fp_begin(&fp);
    mean_of(out, sum, n, weight, grid_exponent);
    outer_fp_end(&fp);
}

/* ---- elementwise steps ---- */

WIDE static void pseudo_gradient(float *out, const float *anchor, const float *local,
                                 const float *residual, size_t n) {
    if (residual) {
#pragma omp simd
        for (size_t i = 0; i < n; i++) out[i] = gradient_with(anchor[i], local[i], residual[i]);
    } else {
#pragma omp simd
        for (size_t i = 0; i < n; i++) out[i] = gradient_of(anchor[i], local[i]);
    }
}

void outer_pseudo_gradient(float *out, const float *anchor, const float *local,
                           const float *residual, size_t n) {
    struct outer_fp fp;
    outer_fp_begin(&fp);
    pseudo_gradient(out, anchor, local, residual, n);
    outer_fp_end(&fp);
}

WIDE static void nesterov(float *anchor, float *momentum, const float *mean, size_t n, float lr,
                          float mu) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) {
        momentum[i] = momentum_of(momentum[i], mean[i], mu);
        anchor[i] = anchor_of(anchor[i], momentum[i], mean[i], lr, mu);
    }
}

void outer_nesterov(float *anchor, float *momentum, const float *mean, size_t n, float lr,
                    float mu) {
    struct outer_fp fp;
    outer_fp_begin(&fp);
    nesterov(anchor, momentum, mean, n, lr, mu);
    outer_fp_end(&fp);
}

WIDE static void mix(float *local, const float *anchor_new, size_t n, float alpha) {
    float rest = 1.0f - alpha;
#pragma omp simd
    for (size_t i = 0; i < n; i++) local[i] = mix_of(local[i], anchor_new[i], alpha, rest);
}

void outer_mix(float *local, const float *anchor_new, size_t n, float alpha) {
    struct outer_fp fp;
    /* Also where local is not finite or the anchor is -0. Asked of the bits: to a caller that
     * flushes subnormals a tiny alpha would equal 0. */
    if ((bits_of(alpha) & ~SIGN_BIT) == 0) {
        memcpy(local, anchor_new, n * sizeof *local);
        return;
    }
    outer_fp_begin(&fp);
    mix(local, anchor_new, n, alpha);
    outer_fp_end(&fp);
}

WIDE static void add_delta(float *local, const float *anchor_new, const float *anchor_old,
                           size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) local[i] = moved_of(local[i], anchor_new[i], anchor_old[i]);
}

void outer_add_delta(float *local, const float *anchor_new, const float *anchor_old, size_t n) {
    struct outer_fp fp;
    outer_fp_begin(&fp);
    add_delta(local, anchor_new, anchor_old, n);
    outer_fp_end(&fp);
}

/* ---- norms ---- */

double outer_norm2(const float *x, size_t n) {
    struct outer_fp fp;
    outer_fp_begin(&fp);
    double sum = sum_of_squares((const uint8_t *)x, n, 0);
    outer_fp_end(&fp);
    return sum;
}

float outer_absmax(const float *x, size_t n) {
    return float_of(largest_magnitude(x, n));
}

/* ---- initial values ---- */

/* splitmix64 (Steele, Lea, Flood 2014) as a function of a counter. */
static inline uint64_t splitmix64(uint64_t counter) {
    uint64_t z = counter * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static inline uint32_t sum_of_16_bit_parts(uint64_t u) {
    return (uint32_t)(u & 0xffff) + (uint32_t)(u >> 16 & 0xffff) + (uint32_t)(u >> 32 & 0xffff) +
           (uint32_t)(u >> 48);
}

/* Twelve uniforms on 0..65535: mean 12 * 32767.5, variance 65536^2 - 1, so sigma is 2^16. */
WIDE static void init_normal(float *out, uint64_t base, uint64_t first, size_t n, float std) {
    for (size_t i = 0; i < n; i++) {
        uint64_t counter = base + 3 * (first + i);
        uint32_t sum = sum_of_16_bit_parts(splitmix64(counter)) +
                       sum_of_16_bit_parts(splitmix64(counter + 1)) +
                       sum_of_16_bit_parts(splitmix64(counter + 2));
        out[i] = (float)((int32_t)sum - 393210) * 0x1p-16f * std;
    }
}

void outer_init_normal(float *out, uint64_t seed, uint64_t first_element, size_t n, float std) {
    struct outer_fp fp;
    outer_fp_begin(&fp);
    /* Mixing the seed first keeps the counters of neighbouring seeds far apart. */
    init_normal(out, splitmix64(seed ^ 0x6f75746572u), first_element, n, std);
    outer_fp_end(&fp);
}
