/* cpu_512.h - private to kernels/cpu_*_512.c: vectors of 512 bits of fp32 or, where CPU_512_BF16 is defined, as
 * cpu_*_bf16.c do and then include the former, of bf16. A word is one fp32 or a pair of bf16, of which
 * AVX512-BF16 multiplies two and adds both products in fp32. */
#ifndef INTELLECT_KERNELS_CPU_512_H
#define INTELLECT_KERNELS_CPU_512_H

#include "kernels/cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#ifdef CPU_512_BF16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define WORD 2 /* elements of a word */
typedef uint16_t element;
#else
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define WORD 1
typedef float element;
#endif
#define INLINE __attribute__((always_inline)) static inline

static inline int processor_can(void) {
#ifdef CPU_512_BF16
    if (!__builtin_cpu_supports("avx512bf16")) return 0;
#endif
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

/* The first n lanes, n > 0; all from 16 on. */
static inline __mmask16 lanes(int n) { return (__mmask16)(n < 16 ? (1 << n) - 1 : 0xffff); }

INLINE TARGET __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
#ifdef CPU_512_BF16
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
#endif
}

/* Up to 16 elements, as fp32. */
INLINE TARGET void put_elements(element *to, __mmask16 these, __m512 x) {
#ifdef CPU_512_BF16
    _mm256_mask_storeu_epi16(to, these, (__m256i)_mm512_cvtneps_pbh(x));
#else
    _mm512_mask_storeu_ps(to, these, x);
#endif
}

/* Rows of 16 words become columns. */
INLINE TARGET void transpose(__m512i x[16]) {
    __m512i y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* lane l of x[4 r + i]: column 4 l + i of rows 4 r ... */
        __m512i a = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88),
                b = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd),
                c = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88),
                d = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
        y[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        y[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
        y[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
        y[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) x[i] = y[i];
}

#endif
#endif
