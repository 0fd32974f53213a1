/* bf16.h - private to kernels/: what a weight becomes when it is kept in 16 bits. bf16 is the upper
 * half of an fp32: sign, 8 bits of exponent, 7 of fraction.
 *
 * Two planes: the upper halves, rounded to nearest, are what matrix products read; beside each lies
 * the lower half of the fp32 value, from which both halves give it back bit for bit. Halfway cases
 * round away from zero, not to even: then bit 15 of the lower half alone says whether the upper half
 * was rounded up. (To even, the same two halves could come from two values.)
 *
 * One plane: rounded stochastically, so that updates far below a bf16's last digit are not all lost:
 * x goes up with the probability of its distance from below. The random bits are a function of a seed
 * and of the element's number in the model, so neither threads nor sharding change them.
 *
 * Everything is written to be vectorised: no branch, no table. */
#ifndef INTELLECT_KERNELS_BF16_H
#define INTELLECT_KERNELS_BF16_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define BF16_INLINE __host__ __device__ static inline
#else
#define BF16_INLINE __attribute__((always_inline)) static inline
#endif

BF16_INLINE uint32_t bf16_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

BF16_INLINE float bf16_value(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

BF16_INLINE float bf16_widen(uint16_t x) {
    return bf16_value((uint32_t)x << 16);
}

/* To nearest, ties to even; a NaN stays one. */
BF16_INLINE uint16_t bf16_nearest(float x) {
    uint32_t bits = bf16_bits(x), rounded = bits + 0x7fff + (bits >> 16 & 1);
    uint32_t nan = bits >> 16 | 0x40;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded >> 16);
}

BF16_INLINE uint16_t bf16_upper(float x) {
    return (uint16_t)((bf16_bits(x) + 0x8000) >> 16);
}

BF16_INLINE uint16_t bf16_lower(float x) {
    return (uint16_t)bf16_bits(x);
}

BF16_INLINE float bf16_join(uint16_t upper, uint16_t lower) {
    return bf16_value((uint32_t)(uint16_t)(upper - (lower >> 15)) << 16 | lower);
}

/* random: only its lower 16 bits count. What is not finite is not rounded. */
BF16_INLINE uint16_t bf16_stochastic(float x, uint32_t random) {
    uint32_t bits = bf16_bits(x), finite = (bits & 0x7f800000) != 0x7f800000;
    return (uint16_t)(finite ? (bits + (random & 0xffff)) >> 16 : bf16_nearest(x));
}

BF16_INLINE uint32_t bf16_mix(uint32_t h) { /* MurmurHash3's finaliser */
    h = (h ^ h >> 16) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    return h ^ h >> 16;
}

BF16_INLINE uint32_t bf16_random(uint64_t seed, uint64_t element) {
    uint32_t h = bf16_mix((uint32_t)element + (uint32_t)seed * 0x9e3779b9u);
    return bf16_mix(h ^ (uint32_t)(element >> 32) * 0x85ebca77u ^ (uint32_t)(seed >> 32) ^ (uint32_t)seed);
}

#endif
