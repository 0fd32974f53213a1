/* cpu_states.c - moments of an optimizer in fewer bits, and sums of two vectors; states.h. */
#include "kernels/cpu.h"
#include "kernels/states.h"

#include <assert.h>

_Static_assert(CPU_SLICE % KERNELS_STATE_BLOCK == 0, "no block has two threads");

static size_t up_to(size_t most, size_t i, size_t n) {
    return n - i < most ? n - i : most;
}

WIDE static void combine_slice(float *out, float a, const float *x, float b, const float *y, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) out[i] = a * x[i] + b * y[i];
}

static void combine(const struct kernels *k, float *out, float a, const float *x, float b, const float *y,
                    size_t n) {
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT(n))
    for (size_t i = 0; i < n; i += CPU_SLICE)
        combine_slice(out + i, a, x + i, b, y + i, up_to(CPU_SLICE, i, n));
}

/* ---- in ---------------------------------------------------------------------------------------- */

WIDE static void bf16_nearest_in(uint16_t *out, const float *x, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) out[i] = bf16_nearest(x[i]);
}

WIDE static void bf16_stochastic_in(uint16_t *out, const float *x, size_t n, uint64_t seed, uint64_t first) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) out[i] = bf16_stochastic(x[i], bf16_random(seed, first + i));
}

WIDE static void random_numbers(float *random, size_t n, uint64_t seed, uint64_t first) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) random[i] = state_random(seed, first + i);
}

WIDE static void magnitudes(float *out, const float *x, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) out[i] = state_magnitude(x[i]);
}

WIDE static void roots(float *out, const float *x, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) out[i] = sqrtf(x[i]);
}

WIDE static void signed_codes(uint32_t *code, const float *x, const float *random, float per_unit, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) code[i] = state_signed(x[i], per_unit, random[i]);
}

WIDE static void root_codes(uint32_t *code, const float *x, const float *random, float per_unit, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) code[i] = state_root(x[i], per_unit, random[i]);
}

WIDE static void bytes_of(uint8_t *out, const uint32_t *code, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) out[i] = (uint8_t)code[i];
}

static void block_in(uint8_t *block, enum kernels_state how, const float *x, size_t n, uint64_t seed,
                     uint64_t first) {
    float some[KERNELS_STATE_BLOCK];
    uint32_t code[KERNELS_STATE_BLOCK];
    int root = how == KERNELS_STATE_ROOT8;
    if (root) roots(some, x, n);
    else magnitudes(some, x, n);
    float unit = state_unit(cpu_max(some, (int)n), root ? STATE_TOP_ROOT : STATE_TOP_SIGNED);
    float per_unit = unit > 0 ? 1 / unit : 0;
    memcpy(block, &unit, sizeof unit);
    if (seed) random_numbers(some, n, seed, first);
    for (size_t i = 0; !seed && i < n; i++) some[i] = 0.5f;
    if (root) root_codes(code, x, some, per_unit, n);
    else signed_codes(code, x, some, per_unit, n);
    bytes_of(block + sizeof unit, code, n);
}

static void slice_in(uint8_t *state, enum kernels_state how, const float *x, size_t n, uint64_t seed,
                     uint64_t first) {
    if (how == KERNELS_STATE_BF16 && seed) bf16_stochastic_in((uint16_t *)(void *)state, x, n, seed, first);
    else if (how == KERNELS_STATE_BF16) bf16_nearest_in((uint16_t *)(void *)state, x, n);
    else
        for (size_t i = 0; i < n; i += KERNELS_STATE_BLOCK)
            block_in(state + kernels_state_bytes(how, i), how, x + i, up_to(KERNELS_STATE_BLOCK, i, n), seed,
                     first + i);
}

static void state_in(const struct kernels *k, void *state, enum kernels_state how, const float *x, size_t n,
                     uint64_t seed, uint64_t first) {
    assert(how != KERNELS_STATE_FP32);
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT(n))
    for (size_t i = 0; i < n; i += CPU_SLICE)
        slice_in((uint8_t *)state + kernels_state_bytes(how, i), how, x + i, up_to(CPU_SLICE, i, n), seed,
                 first + i);
}

/* ---- out --------------------------------------------------------------------------------------- */

WIDE static void bf16_out(float *x, const uint16_t *state, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) x[i] = bf16_widen(state[i]);
}

WIDE static void signed_values(float *x, const uint8_t *code, float unit, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) x[i] = state_signed_value(code[i], unit);
}

WIDE static void root_values(float *x, const uint8_t *code, float unit, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) x[i] = state_root_value(code[i], unit);
}

static void slice_out(float *x, const uint8_t *state, enum kernels_state how, size_t n) {
    if (how == KERNELS_STATE_BF16) bf16_out(x, (const uint16_t *)(const void *)state, n);
    for (size_t i = 0; how >= KERNELS_STATE_SIGNED8 && i < n; i += KERNELS_STATE_BLOCK) {
        const uint8_t *block = state + kernels_state_bytes(how, i);
        size_t here = up_to(KERNELS_STATE_BLOCK, i, n);
        float unit;
        memcpy(&unit, block, sizeof unit);
        if (how == KERNELS_STATE_ROOT8) root_values(x + i, block + sizeof unit, unit, here);
        else signed_values(x + i, block + sizeof unit, unit, here);
    }
}

static void state_out(const struct kernels *k, float *x, const void *state, enum kernels_state how,
                      size_t n) {
    assert(how != KERNELS_STATE_FP32);
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT(n))
    for (size_t i = 0; i < n; i += CPU_SLICE)
        slice_out(x + i, (const uint8_t *)state + kernels_state_bytes(how, i), how, up_to(CPU_SLICE, i, n));
}

void cpu_states_entries(struct kernels *k) {
    k->combine = combine;
    k->state_in = state_in;
    k->state_out = state_out;
}
