/* states.h - private to kernels/: what the moments of an optimizer become when they are kept in 16 or 8
 * bits.
 *
 * 16 bits: bf16, relative error up to 2^-8.
 *
 * 8 bits: blocks of KERNELS_STATE_BLOCK elements, each with a unit, a power of two, that its largest
 * element fits; an element is a small float in that unit: code c is worth state_value(c), exact up to 16
 * and with 4 bits after the leading one above, so neighbours are up to 1/16 apart. First moments have a
 * sign and 7 bits, 1 to 1984 units; second moments are kept as their root, 8 bits, 1 to 507904 units, so
 * that what is divided by does not become zero beside a neighbour 10^11 times as large. (arXiv:2110.02861
 * has the idea: blocks, and codes closer together where values are small. A table of its own has twice the
 * precision for the largest elements and takes a search; units that are powers of two make rounding
 * idempotent: what was saved and loaded is what it was.)
 *
 * Updates are much smaller than these steps (beta2 0.999 takes 0.1 % off), so to nearest they would be
 * lost. Rounding is stochastic: the expected value is the value, of a second moment itself, not of its
 * root. */
#ifndef INTELLECT_KERNELS_STATES_H
#define INTELLECT_KERNELS_STATES_H

#include "kernels/bf16.h"
#include "kernels/kernels.h"

#include <math.h>

/* Of a block: the unit, then the codes. */
#define STATE_BLOCK_BYTES ((size_t)KERNELS_STATE_BLOCK + sizeof(float))

/* a where which is 1, b where it is 0: no branch that a compiler could put between the lanes of a vector. */
BF16_INLINE uint32_t state_select(uint32_t which, uint32_t a, uint32_t b) {
    return (a & (0u - which)) | (b & (which - 1u));
}

/* What code c is worth, c < 256: the sequence goes on as a float's bits do. */
BF16_INLINE float state_value(uint32_t c) {
    return bf16_value(state_select(c < 16, bf16_bits((float)(int32_t)c), (c + 2080) << 19));
}

/* The largest code that is worth no more than y units, y >= 0. */
BF16_INLINE uint32_t state_floor(float y) {
    uint32_t bits = bf16_bits(y), small = bits < 0x41800000; /* 16 */
    return state_select(small, (uint32_t)(int32_t)bf16_value(bits & (0u - small)), (bits >> 19) - 2080);
}

/* The unit of a block whose largest element, or its root, is `most`; its highest code is worth 1.9375 * 2^top.
 * 0: all elements are. */
BF16_INLINE float state_unit(float most, uint32_t top) {
    uint32_t exponent = (bf16_bits(most) + 0x7ffff) >> 23; /* one more where 1.9375 is not enough */
    return exponent <= top ? 0.0f : bf16_value((exponent - top) << 23);
}
#define STATE_TOP_SIGNED 10
#define STATE_TOP_ROOT 18

BF16_INLINE float state_magnitude(float x) { return bf16_value(bf16_bits(x) & 0x7fffffff); }

/* random in (0,1); 0.5 rounds to nearest. There is one zero. */
BF16_INLINE uint32_t state_signed(float x, float per_unit, float random) {
    float y = state_magnitude(x) * per_unit;
    uint32_t c = state_floor(y);
    float low = state_value(c), high = state_value(c + 1);
    c += random * (high - low) < y - low;
    return c | ((bf16_bits(x) >> 31) & (uint32_t)(c > 0)) << 7;
}

BF16_INLINE uint32_t state_root(float x, float per_unit, float random) {
    float y = sqrtf(x) * per_unit;
    uint32_t c = state_floor(y);
    float low = state_value(c), high = state_value(c + 1);
    c += random * (high * high - low * low) < y * y - low * low;
    return c;
}

BF16_INLINE float state_signed_value(uint32_t code, float unit) {
    float x = state_value(code & 127u) * unit;
    return bf16_value(bf16_bits(x) ^ (code >> 7) << 31);
}

BF16_INLINE float state_root_value(uint32_t code, float unit) {
    float root = state_value(code) * unit;
    return root * root;
}

/* Where rounding goes. */
BF16_INLINE float state_random(uint64_t seed, uint64_t element) {
    return ((float)(int32_t)(bf16_random(seed, element) & 0xffff) + 0.5f) * (1.0f / 65536);
}

BF16_INLINE uint16_t state_bf16(float x, uint64_t seed, uint64_t element) {
    return seed ? bf16_stochastic(x, bf16_random(seed, element)) : bf16_nearest(x);
}

#endif
