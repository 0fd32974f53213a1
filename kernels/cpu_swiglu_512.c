/* cpu_swiglu_512.c - SwiGLU with vectors of 512 bits, in fp32; cpu_swiglu_bf16.c compiles it once more for
 * activations in bf16. What a compiler makes of the loops of cpu_rows.c is bound by arithmetic: it may not fuse
 * a multiplication with an addition, has no 2^n, and rounds a bf16 in eight instructions. */
#include "kernels/cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#ifdef SWIGLU_BF16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define ENTRY(name) cpu_swiglu_bf16_##name
typedef uint16_t element;
#else
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl")))
#define ENTRY(name) cpu_swiglu_512_##name
typedef float element;
#endif
#define INLINE __attribute__((always_inline)) static inline

int ENTRY(can)(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl")
#ifdef SWIGLU_BF16
           && __builtin_cpu_supports("avx512bf16")
#endif
        ;
}

/* The first n lanes, n > 0; all from 16 on. */
static inline __mmask16 lanes(int n) { return (__mmask16)(n < 16 ? (1 << n) - 1 : 0xffff); }

INLINE TARGET __m512 get(const element *x, __mmask16 m) {
#ifdef SWIGLU_BF16
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, x)), 16));
#else
    return _mm512_maskz_loadu_ps(m, x);
#endif
}

INLINE TARGET void put(element *to, __mmask16 m, __m512 x) {
#ifdef SWIGLU_BF16
    _mm256_mask_storeu_epi16(to, m, (__m256i)_mm512_cvtneps_pbh(x));
#else
    _mm512_mask_storeu_ps(to, m, x);
#endif
}

/* e^x as cpu_exp() has it; x at most 88, below -87.3 towards zero. */
INLINE TARGET __m512 exp_of(__m512 x) {
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                    _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693359375f), x), p = _mm512_set1_ps(1.9875691500e-4f);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r);
    return _mm512_scalef_ps(_mm512_add_ps(p, _mm512_set1_ps(1.0f)), n);
}

/* 1 / (1 + e^-g) within some units in the last place. Where e^-g came to infinity, the step by Newton would
 * make no number of it; a g that is none stays so, for min takes its second operand then. */
INLINE TARGET __m512 sigmoid(__m512 g) {
    __m512 x = _mm512_min_ps(_mm512_set1_ps(87.0f), _mm512_sub_ps(_mm512_setzero_ps(), g));
    __m512 y = _mm512_add_ps(_mm512_set1_ps(1.0f), exp_of(x)), r = _mm512_rcp14_ps(y);
    return _mm512_mul_ps(r, _mm512_fnmadd_ps(y, r, _mm512_set1_ps(2.0f)));
}

TARGET static void row(element *out, const element *gate, const element *up, int F) {
    for (int f = 0; f < F; f += 16) {
        __mmask16 m = lanes(F - f);
        __m512 g = get(gate + f, m);
        put(out + f, m, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), get(up + f, m)));
    }
}

/* dgate, dup may be gate, up. */
TARGET static void backward_row(element *dgate, element *dup, const element *dout, const element *gate,
                                const element *up, int F) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (int f = 0; f < F; f += 16) {
        __mmask16 m = lanes(F - f);
        __m512 g = get(gate + f, m), u = get(up + f, m), s = sigmoid(g);
        __m512 d = _mm512_mul_ps(get(dout + f, m), s);
        __m512 slope = _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one);
        put(dgate + f, m, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
        put(dup + f, m, _mm512_mul_ps(d, g));
    }
}

void ENTRY(forward)(const struct kernels *k, void *to, const void *from, int rows, int F) {
    element *out = to;
    const element *gate_up = from;
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT_EXP((size_t)rows * F))
    for (int r = 0; r < rows; r++) {
        const element *gate = gate_up + (size_t)r * 2 * F;
        row(out + (size_t)r * F, gate, gate + F, F);
    }
}

void ENTRY(backward)(const struct kernels *k, void *to, const void *dfrom, const void *from, int rows,
                     int F) {
    element *dgate_up = to;
    const element *dout = dfrom, *gate_up = from;
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT_EXP((size_t)rows * F))
    for (int r = 0; r < rows; r++) {
        size_t at = (size_t)r * 2 * F;
        backward_row(dgate_up + at, dgate_up + at + F, dout + (size_t)r * F, gate_up + at, gate_up + at + F,
                     F);
    }
}

#endif
