/* cpu_swiglu_512.c - rows of SwiGLU with vectors of 512 bits, in fp32; cpu_swiglu_bf16.c compiles it once more
 * for activations in bf16. What a compiler makes of the loops of cpu_rows.c is bound by arithmetic: it may not
 * fuse a multiplication with an addition, has no 2^n, and rounds a bf16 in eight instructions. */
#include "kernels/cpu_512.h"

#if defined(__x86_64__) && defined(__GNUC__)

#ifdef CPU_512_BF16
#define ENTRY(name) cpu_swiglu_bf16_##name
#else
#define ENTRY(name) cpu_swiglu_512_##name
#endif

int ENTRY(can)(void) { return processor_can(); }

INLINE TARGET __m512 get(const element *x, __mmask16 m) {
#ifdef CPU_512_BF16
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, x)), 16));
#else
    return _mm512_maskz_loadu_ps(m, x);
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

TARGET void ENTRY(row)(void *to, const void *from_gate, const void *from_up, int F) {
    element *out = to;
    const element *gate = from_gate, *up = from_up;
    for (int f = 0; f < F; f += 16) {
        __mmask16 m = lanes(F - f);
        __m512 g = get(gate + f, m);
        put_elements(out + f, m, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), get(up + f, m)));
    }
}

/* dgate, dup may be gate, up. */
TARGET void ENTRY(backward_row)(void *to_gate, void *to_up, const void *from, const void *from_gate,
                                const void *from_up, int F) {
    element *dgate = to_gate, *dup = to_up;
    const element *dout = from, *gate = from_gate, *up = from_up;
    const __m512 one = _mm512_set1_ps(1.0f);
    for (int f = 0; f < F; f += 16) {
        __mmask16 m = lanes(F - f);
        __m512 g = get(gate + f, m), u = get(up + f, m), s = sigmoid(g);
        __m512 d = _mm512_mul_ps(get(dout + f, m), s);
        __m512 slope = _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one);
        put_elements(dgate + f, m, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
        put_elements(dup + f, m, _mm512_mul_ps(d, g));
    }
}

#endif
