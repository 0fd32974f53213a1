/* cpu_bf16.c - the CPU backend with weights and activations in bf16: what differs from cpu.c but for the
 * kernels that go row by row (cpu_rows_bf16.c) and attention (cpu_attention_bf16.c). All are computed in
 * fp32 and rounded where they are stored; gradients of weights and moments are fp32.
 *
 * oneDNN's bf16 product needs AVX512-BF16 or AMX; elsewhere operands are widened and multiplied as fp32,
 * which gives the same result but for the order of additions. */
#include "kernels/bf16.h"
#include "kernels/cpu.h"

/* ---- conversions ------------------------------------------------------------------------------- */

WIDE static void narrow_slice(uint16_t *out, const float *x, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) out[i] = bf16_nearest(x[i]);
}

WIDE static void widen_slice(float *out, const uint16_t *x, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) out[i] = bf16_widen(x[i]);
}

WIDE static void split_slice(uint16_t *upper, uint16_t *lower, const float *x, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) {
        upper[i] = bf16_upper(x[i]);
        lower[i] = bf16_lower(x[i]);
    }
}

WIDE static void join_slice(float *out, const uint16_t *upper, const uint16_t *lower, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) out[i] = bf16_join(upper[i], lower[i]);
}

WIDE static void stochastic_slice(uint16_t *out, const float *x, uint64_t seed, uint64_t first, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) out[i] = bf16_stochastic(x[i], bf16_random(seed, first + i));
}

static size_t slice_at(size_t i, size_t n) {
    return n - i < CPU_SLICE ? n - i : CPU_SLICE;
}

static void narrow(const struct cpu *cpu, uint16_t *out, const float *x, size_t n) {
#pragma omp parallel for num_threads(cpu->threads) if (CPU_WORTH_IT(n))
    for (size_t i = 0; i < n; i += CPU_SLICE) narrow_slice(out + i, x + i, slice_at(i, n));
}

static void widen(const struct cpu *cpu, float *out, const uint16_t *x, size_t n) {
#pragma omp parallel for num_threads(cpu->threads) if (CPU_WORTH_IT(n))
    for (size_t i = 0; i < n; i += CPU_SLICE) widen_slice(out + i, x + i, slice_at(i, n));
}

static void weights_in(const struct kernels *k, void *w, uint16_t *rest, const float *host, size_t n) {
    if (!rest) narrow(cpu_of(k), w, host, n);
    else split_slice(w, rest, host, n);
}

static void weights_out(const struct kernels *k, float *host, const void *w, const uint16_t *rest,
                        size_t n) {
    if (!rest) widen(cpu_of(k), host, w, n);
    else join_slice(host, w, rest, n);
}

/* ---- matrix products ---------------------------------------------------------------------------- */

/* Where the processor cannot: as rounded fp32, and rounded again where C is bf16. */
static void multiply_wide(struct cpu *cpu, struct cpu_product_key key, const uint16_t *A, const uint16_t *B,
                          void *C) {
    size_t a = (size_t)key.m * (size_t)key.k, b = (size_t)key.k * (size_t)key.n,
           c = (size_t)key.m * (size_t)key.n;
    float *wide_a = cpu_buffer(cpu, CPU_WIDE_A, a * sizeof *wide_a);
    float *wide_b = cpu_buffer(cpu, CPU_WIDE_B, b * sizeof *wide_b);
    float *wide_c = key.bf16_out ? cpu_buffer(cpu, CPU_WIDE_C, c * sizeof *wide_c) : C;
    if (!wide_a || !wide_b || !wide_c) return;
    widen(cpu, wide_a, A, a);
    widen(cpu, wide_b, B, b);
    int before = cpu_use_threads(cpu->threads);
    cpu_gemm(cpu, key.transposed_a ? 'T' : 'N', key.transposed_b ? 'T' : 'N', key.m, key.n, key.k, 1.0f,
             wide_a, (size_t)(key.transposed_a ? key.m : key.k), wide_b,
             (size_t)(key.transposed_b ? key.k : key.n), (float)key.add, wide_c, (size_t)key.n);
    cpu_use_threads(before);
    if (key.bf16_out) narrow(cpu, C, wide_c, c);
}

static void multiply(const struct kernels *k, struct cpu_product_key key, const void *A, const void *B,
                     void *C) {
    struct cpu *cpu = cpu_of(k);
    key.bf16 = 1;
    if (cpu->native_bf16) cpu_multiply(cpu, key, A, B, C);
    else multiply_wide(cpu, key, A, B, C);
}

static void matmul_forward(const struct kernels *k, void *out, const void *x, const void *w, int rows, int C,
                           int OC) {
    struct cpu_product_key key = { .m = rows, .n = OC, .k = C, .transposed_b = 1, .bf16_out = 1 };
    multiply(k, key, x, w, out);
}

static void matmul_logits(const struct kernels *k, float *out, const void *x, const void *w, int rows, int C,
                          int OC) {
    struct cpu_product_key key = { .m = rows, .n = OC, .k = C, .transposed_b = 1 };
    multiply(k, key, x, w, out);
}

static void matmul_backward_input(const struct kernels *k, void *dx, const void *dout, const void *w,
                                  int rows, int C, int OC) {
    struct cpu_product_key key = { .m = rows, .n = C, .k = OC, .bf16_out = 1 };
    multiply(k, key, dout, w, dx);
}

static void matmul_backward_weight(const struct kernels *k, float *dw, const void *dout, const void *x,
                                   int rows, int C, int OC, enum kernels_write write) {
    struct cpu_product_key key = { .m = OC, .n = C, .k = rows, .transposed_a = 1 };
    key.add = write == KERNELS_ADD;
    multiply(k, key, dout, x, dw);
}

/* ---- attention ----------------------------------------------------------------------------------- */

/* Without AVX512-BF16 in fp32 on widened operands, rounded in the end. */
static void attention_forward(const struct kernels *k, void *out, float *lse, const void *qkv,
                              const int32_t *start, int B, int T, int H, int KV, int D) {
    struct cpu *cpu = cpu_of(k);
    if (cpu->native_bf16 && cpu_attention_bf16_can(D)) {
        cpu_attention_bf16_forward(k, out, lse, qkv, start, B, T, H, KV, D);
        return;
    }
    size_t rows = (size_t)B * (size_t)T, in = rows * (size_t)(H + 2 * KV) * (size_t)D,
           n = rows * (size_t)H * (size_t)D;
    float *wide_in = cpu_buffer(cpu, CPU_WIDE_A, in * sizeof *wide_in);
    float *wide_out = cpu_buffer(cpu, CPU_WIDE_B, n * sizeof *wide_out);
    if (!wide_in || !wide_out) return;
    widen(cpu, wide_in, qkv, in);
    cpu_attention_forward(k, wide_out, lse, wide_in, start, B, T, H, KV, D);
    narrow(cpu, out, wide_out, n);
}

static void attention_backward(const struct kernels *k, void *dqkv, const void *dout, const void *qkv,
                               const void *out, const float *lse, const int32_t *start, int B, int T, int H,
                               int KV, int D) {
    struct cpu *cpu = cpu_of(k);
    if (cpu->native_bf16 && cpu_attention_bf16_can(D)) {
        cpu_attention_bf16_backward(k, dqkv, dout, qkv, out, lse, start, B, T, H, KV, D);
        return;
    }
    size_t rows = (size_t)B * (size_t)T, in = rows * (size_t)(H + 2 * KV) * (size_t)D,
           n = rows * (size_t)H * (size_t)D;
    float *wide_in = cpu_buffer(cpu, CPU_WIDE_A, in * sizeof *wide_in);
    float *wide_out = cpu_buffer(cpu, CPU_WIDE_B, 2 * n * sizeof *wide_out);
    float *wide_din = cpu_buffer(cpu, CPU_WIDE_C, in * sizeof *wide_din);
    if (!wide_in || !wide_out || !wide_din) return;
    widen(cpu, wide_in, qkv, in);
    widen(cpu, wide_out, out, n);
    widen(cpu, wide_out + n, dout, n);
    cpu_attention_backward(k, wide_din, wide_out + n, wide_in, wide_out, lse, start, B, T, H, KV, D);
    narrow(cpu, dqkv, wide_din, in);
}

/* ---- optimizer ----------------------------------------------------------------------------------- */

/* A slice in fp32, as cpu.c does it, and back: with the lower halves kept, bit for bit what fp32 weights
 * become. */
static void slice_out(float *wide, const uint16_t *upper, const uint16_t *rest, size_t n) {
    if (rest) join_slice(wide, upper, rest, n);
    else widen_slice(wide, upper, n);
}

static void slice_in(uint16_t *upper, uint16_t *rest, const float *wide, size_t n, uint64_t seed,
                     uint64_t first) {
    if (rest) split_slice(upper, rest, wide, n);
    else stochastic_slice(upper, wide, seed, first, n);
}

static uint16_t *rest_at(uint16_t *rest, size_t i) { return rest ? rest + i : NULL; }

/* What is widened at a time stays, with both its halves, in the first cache. */
#define WIDENED 1024

static void adamw(const struct kernels *k, void *param, uint16_t *rest, const float *grad, float *m, float *v,
                  size_t n, const struct kernels_adamw *a) {
    uint16_t *upper = param;
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT(n))
    for (size_t i = 0; i < n; i += WIDENED) {
        float wide[WIDENED];
        size_t here = n - i < WIDENED ? n - i : WIDENED;
        slice_out(wide, upper + i, rest_at(rest, i), here);
        cpu_adamw_slice(wide, grad + i, m + i, v + i, here, a);
        slice_in(upper + i, rest_at(rest, i), wide, here, a->seed, a->first + i);
    }
}

static void descend(const struct kernels *k, void *param, uint16_t *rest, const float *direction, size_t n,
                    const struct kernels_descent *d) {
    uint16_t *upper = param;
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT(n))
    for (size_t i = 0; i < n; i += WIDENED) {
        float wide[WIDENED];
        size_t here = n - i < WIDENED ? n - i : WIDENED;
        slice_out(wide, upper + i, rest_at(rest, i), here);
        cpu_descend_slice(wide, direction + i, here, d);
        slice_in(upper + i, rest_at(rest, i), wide, here, d->seed, d->first + i);
    }
}

/* ---- the table ----------------------------------------------------------------------------------- */

struct kernels *kernels_cpu_bf16_create(int threads, int stochastic, struct err *err) {
    struct kernels *k = kernels_cpu_create(threads, err);
    if (!k) return NULL;
    k->weight_bytes = k->act_bytes = sizeof(uint16_t);
    k->rest_bytes = stochastic ? 0 : sizeof(uint16_t);
    k->weights_in = weights_in;
    k->weights_out = k->weights_widen = weights_out;
    k->matmul_forward = matmul_forward;
    k->matmul_logits = matmul_logits;
    k->matmul_backward_input = matmul_backward_input;
    k->matmul_backward_weight = matmul_backward_weight;
    k->attention_forward = attention_forward;
    k->attention_backward = attention_backward;
    k->adamw = adamw;
    k->descend = descend;
    cpu_rows_bf16_entries(k);
    cpu_describe_bf16(cpu_of(k), stochastic);
    return k;
}
