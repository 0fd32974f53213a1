/* outer_elements.h - private to kernels/: what the outer step does to one element, for outer.c and for kernels/cuda/outer.cu.
 * Each operation is one IEEE operation of fp32 or double, in the order that stands here; both are compiled without
 * contraction (-ffp-contract=off, -fmad=false), so both have the same bits. */
#ifndef INTELLECT_KERNELS_OUTER_ELEMENTS_H
#define INTELLECT_KERNELS_OUTER_ELEMENTS_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define OUTER_INLINE __host__ __device__ static inline
#else
#define OUTER_INLINE static inline
#endif

OUTER_INLINE uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

OUTER_INLINE float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

#define SIGN_BIT 0x80000000u
#define INFINITY_BITS 0x7f800000u /* as a magnitude: this or more is an infinity or a NaN */

/* x86-64 makes negative NaNs and hands on the payloads of some, aarch64 makes positive ones, a GPU 0x7fffffff. */
#define NAN_BITS 0x7fc00000u
OUTER_INLINE float with_one_nan(float x) {
    int32_t magnitude = (int32_t)(bits_of(x) & ~SIGN_BIT);
    return magnitude > (int32_t)INFINITY_BITS ? float_of(NAN_BITS) : x;
}

/* Adding 1.5 * 2^23 leaves no bits for a fraction, so the sum is x rounded to the nearest even integer, and the integer
 * stands in its low bits. Exact for |x| < 2^22, and unlike rint() every vector unit can do it. */
#define ROUND_FLOAT 12582912.0f
OUTER_INLINE int32_t round_to_int32(float x) {
    return (int32_t)(bits_of(x + ROUND_FLOAT) - bits_of(ROUND_FLOAT));
}

/* ---- blocks: integers up to `top`, times a scale ---- */

#define INT8_TOP 127.0f
#define FP4_TOP 12.0f

/* A sign bit makes the bits larger than any infinity's, so -0 and negative scales fail too. */
OUTER_INLINE int scale_is_valid(float scale, float top) {
    return bits_of(scale * top) < INFINITY_BITS;
}

/* Of a block whose largest magnitude has these bits. */
OUTER_INLINE float scale_for(uint32_t magnitude, float top) {
    return float_of(magnitude) / top;
}

/* scale > 0. The clamp matters only where it is subnormal and so coarse that x / scale exceeds 127. */
OUTER_INLINE int32_t quantise_int8(float x, float scale) {
    int32_t q = round_to_int32(x / scale);
    q = q > 127 ? 127 : q;
    return q < -127 ? -127 : q;
}

/* The code of the nearest of 0, 1, 2, 3, 4, 6, 8, 12, of two the smaller one. Never -0. */
OUTER_INLINE int32_t quantise_fp4(float x, float scale) {
    float a = float_of(bits_of(x) & ~SIGN_BIT) / scale;
    int32_t code = (a > 0.5f) + (a > 1.5f) + (a > 2.5f) + (a > 3.5f) + (a > 5.0f) + (a > 7.0f) + (a > 10.0f);
    return code | (int32_t)(((bits_of(x) & SIGN_BIT) >> 28) & (code > 0 ? 8u : 0u));
}

#define NO_CODE (-128)
OUTER_INLINE int32_t integer_of_fp4(int32_t code) {
    int32_t c = code & 7, low = c > 2 * c - 4 ? c : 2 * c - 4, q = low > 4 * c - 16 ? low : 4 * c - 16;
    q = code & 8 ? -q : q;
    return code == 8 ? NO_CODE : q;
}

/* Can a value with this magnitude travel: finite, and in a block (top > 0) also what it decodes to. */
OUTER_INLINE int is_encodable(uint32_t magnitude, float top) {
    return magnitude < INFINITY_BITS && (top == 0.0f || scale_is_valid(scale_for(magnitude, top), top));
}

/* ---- steps ---- */

OUTER_INLINE float lost_of(float x, float value) {
    return with_one_nan(x - value);
}

OUTER_INLINE float gradient_of(float anchor, float local) {
    return with_one_nan(anchor - local);
}

OUTER_INLINE float gradient_with(float anchor, float local, float residual) {
    return with_one_nan((anchor - local) + residual);
}

OUTER_INLINE float momentum_of(float momentum, float mean, float mu) {
    return with_one_nan(mu * momentum + mean);
}

/* momentum: the new one */
OUTER_INLINE float anchor_of(float anchor, float momentum, float mean, float lr, float mu) {
    return with_one_nan(anchor - lr * (mean + mu * momentum));
}

/* rest: 1 - alpha */
OUTER_INLINE float mix_of(float local, float anchor_new, float alpha, float rest) {
    return with_one_nan(alpha * local + rest * anchor_new);
}

OUTER_INLINE float moved_of(float local, float anchor_new, float anchor_old) {
    return with_one_nan(local + (anchor_new - anchor_old));
}

#endif
