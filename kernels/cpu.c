/* cpu.c - the CPU backend: its state, matrix products (oneDNN), elementwise kernels and the
 * optimizer. cpu_rows.c has the kernels that work row by row, cpu_attention.c attention. Memory and
 * copies are the reference's. */
#include "kernels/cpu.h"

#include <assert.h>
#include <math.h>
#include <oneapi/dnnl/dnnl.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

/* ---- state ---- */

float *cpu_scratch(struct cpu *cpu, size_t floats) {
    floats = (floats + 15) / 16 * 16; /* no two threads in one cache line */
    if (floats <= cpu->scratch_floats) return cpu->scratch;
    float *grown = cpu->table.alloc(&cpu->table, floats * cpu->threads * sizeof *grown,
                                    cpu->failure.code == ERR_NONE ? &cpu->failure : NULL);
    if (!grown) return NULL;
    cpu->table.free(&cpu->table, cpu->scratch);
    cpu->scratch = grown;
    cpu->scratch_floats = floats;
    return grown;
}

static int check(const struct kernels *k, struct err *err) {
    struct cpu *cpu = cpu_of(k);
    if (cpu->failure.code == ERR_NONE) return 0;
    if (err) *err = cpu->failure;
    cpu->failure.code = ERR_NONE;
    return -1;
}

static void destroy(struct kernels *k) {
    struct cpu *cpu = cpu_of(k);
    cpu_products_release(cpu);
    for (int i = 0; i < CPU_BUFFERS; i++) k->free(k, cpu->buffer[i]);
    k->free(k, cpu->scratch);
    free(k);
}

void *cpu_buffer(struct cpu *cpu, enum cpu_buffer which, size_t bytes) {
    if (bytes <= cpu->buffer_bytes[which]) return cpu->buffer[which];
    void *grown = cpu->table.alloc(&cpu->table, bytes, cpu->failure.code == ERR_NONE ? &cpu->failure : NULL);
    if (!grown) return NULL;
    cpu->table.free(&cpu->table, cpu->buffer[which]);
    cpu->buffer_bytes[which] = bytes;
    return cpu->buffer[which] = grown;
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

/* What it was or, if that is more, what the three products of [rows,C] x [OC,C] take: forward, backward to
 * its input and to its weight. */
static void products_bytes(const struct cpu *cpu, int rows, int C, int OC, size_t *shared, size_t *own) {
    int bf16 = cpu->table.act_bytes == sizeof(uint16_t);
    const struct cpu_product_key key[] = {
        { .m = rows, .n = OC, .k = C, .transposed_b = 1, .bf16 = bf16, .bf16_out = bf16 },
        { .m = rows, .n = C, .k = OC, .bf16 = bf16, .bf16_out = bf16 },
        { .m = OC, .n = C, .k = rows, .transposed_a = 1, .bf16 = bf16 },
    };
    for (size_t i = 0, of_all, of_thread; i < sizeof key / sizeof *key; i++) {
        cpu_product_bytes(cpu, key[i], &of_all, &of_thread);
        *shared = larger(*shared, of_all);
        *own = larger(*own, of_thread);
    }
}

/* Operands of products and attention in fp32, where the processor multiplies no bf16. */
static size_t widened_bytes(const struct kernels_shape *s) {
    size_t rows = (size_t)s->rows, F = (size_t)s->ffn, C = (size_t)s->width;
    size_t a = larger(2 * rows * F, (size_t)s->head_rows * (size_t)s->vocabulary);
    size_t b = larger(rows * larger(F, 2 * C), larger(2 * F, (size_t)s->vocabulary) * C);
    return (a + b + 2 * rows * F) * sizeof(float);
}

static size_t scratch_bytes(const struct kernels *k, const struct kernels_shape *s) {
    const struct cpu *cpu = cpu_of(k);
    int C = s->width, F = s->ffn, D = C / s->heads, bf16 = k->act_bytes == sizeof(uint16_t);
    size_t shared = 0, own = 0;
    products_bytes(cpu, s->rows, C, C + 2 * s->kv_heads * D, &shared, &own);
    products_bytes(cpu, s->rows, F, C, &shared, &own);
    products_bytes(cpu, s->rows, C, 2 * F, &shared, &own);
    products_bytes(cpu, s->head_rows, C, s->vocabulary, &shared, &own);
    size_t attention = bf16 && cpu->native_bf16 && cpu_attention_bf16_can(D)
                           ? cpu_attention_bf16_scratch(s->T, s->heads, s->kv_heads, D)
                       : cpu_attention_512_can(D) ? cpu_attention_512_scratch(s->T, s->heads, s->kv_heads, D)
                                                  : (size_t)(2 * 64) * (size_t)s->T * sizeof(float);
    size_t wide = bf16 && !cpu->native_bf16 ? widened_bytes(s) : 0;
    return shared + CPU_PARTS_BYTES(C) + (size_t)cpu->threads * larger(attention, own) + wide;
}

/* In huge pages where the system gives them on request: what is walked through once a step is then not mapped
 * page by page. */
static void *alloc_large(const struct kernels *k, size_t bytes, struct err *err) {
    size_t page = (size_t)2 << 20, rounded = (bytes + page - 1) / page * page;
    if (bytes < 2 * page || rounded < bytes) return kernels_reference()->alloc(k, bytes, err);
    void *p = aligned_alloc(page, rounded);
    if (!p) {
        err_set(err, ERR_MEMORY, "no memory for a tensor of %zu bytes", bytes);
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    madvise(p, rounded, MADV_HUGEPAGE);
#endif
    return memset(p, 0, bytes);
}

/* ---- matrix products ---- */

int cpu_use_threads(int threads) {
    int before = omp_get_max_threads();
    if (threads != before) omp_set_num_threads(threads);
    return before;
}

void cpu_gemm(struct cpu *cpu, char op_a, char op_b, int m, int n, int k, float alpha,
              const float *A, size_t lda, const float *B, size_t ldb, float beta, float *C,
              size_t ldc) {
    dnnl_status_t status = dnnl_sgemm(op_a, op_b, m, n, k, alpha, A, (dnnl_dim_t)lda, B,
                                      (dnnl_dim_t)ldb, beta, C, (dnnl_dim_t)ldc);
    if (status == dnnl_success) return;
#pragma omp critical(cpu_gemm_failure)
    if (cpu->failure.code == ERR_NONE)
        err_set(&cpu->failure, status == dnnl_out_of_memory ? ERR_MEMORY : ERR_UNSUPPORTED,
                "dnnl_sgemm(%c, %c, m=%d, n=%d, k=%d) failed with status %d", op_a, op_b, m, n, k,
                (int)status);
}

#define PRIMITIVE_ROWS_MIN 128

/* Few rows, of as many shapes as there are prompts, go without a primitive prepared for each. */
static void multiply(const struct kernels *k, struct cpu_product_key key, const float *A, const float *B,
                     float *C) {
    struct cpu *cpu = cpu_of(k);
    if (key.m >= PRIMITIVE_ROWS_MIN) {
        cpu_multiply(cpu, key, A, B, C);
        return;
    }
    int before = cpu_use_threads(cpu->threads);
    cpu_gemm(cpu, key.transposed_a ? 'T' : 'N', key.transposed_b ? 'T' : 'N', key.m, key.n, key.k, 1.0f, A,
             (size_t)(key.transposed_a ? key.m : key.k), B, (size_t)(key.transposed_b ? key.k : key.n),
             (float)key.add, C, (size_t)key.n);
    cpu_use_threads(before);
}

static void matmul_logits(const struct kernels *k, float *out, const void *x, const void *w, int rows, int C,
                          int OC) {
    multiply(k, (struct cpu_product_key){ .m = rows, .n = OC, .k = C, .transposed_b = 1 }, x, w, out);
}

static void matmul_forward(const struct kernels *k, void *out, const void *x, const void *w, int rows, int C,
                           int OC) {
    matmul_logits(k, out, x, w, rows, C, OC);
}

static void matmul_backward_input(const struct kernels *k, void *dx, const void *dout, const void *w,
                                  int rows, int C, int OC) {
    multiply(k, (struct cpu_product_key){ .m = rows, .n = C, .k = OC }, dout, w, dx);
}

static void matmul_backward_weight(const struct kernels *k, float *dw, const void *dout, const void *x,
                                   int rows, int C, int OC, enum kernels_write write) {
    struct cpu_product_key key = { .m = OC, .n = C, .k = rows, .transposed_a = 1 };
    key.add = write == KERNELS_ADD;
    multiply(k, key, dout, x, dw);
}

/* ---- elementwise ---- */

static size_t slice_at(size_t i, size_t n) {
    return n - i < CPU_SLICE ? n - i : CPU_SLICE;
}

WIDE static void adamw_slice(float *param, const float *grad, float *m, float *v, size_t n,
                             const struct kernels_adamw *a) {
    float m_rest = (float)(1.0 - (double)a->beta1), v_rest = (float)(1.0 - (double)a->beta2);
    float m_unbias = 1.0f / a->m_correction, v_unbias = 1.0f / a->v_correction;
    float beta1 = a->beta1, beta2 = a->beta2, grad_scale = a->grad_scale, eps = a->eps, lr = a->lr;
    float keep = 1.0f - a->lr * a->weight_decay;
#pragma omp simd
    for (size_t i = 0; i < n; i++) {
        /* All is read before anything is written: m and v of a tensor are whole pages apart, and a processor
         * takes a read for one of what was just written where the addresses' last 12 bits are the same. */
        float g = grad[i] * grad_scale;
        float first = beta1 * m[i] + m_rest * g, second = beta2 * v[i] + v_rest * g * g;
        float p = keep * param[i] - lr * (first * m_unbias / (sqrtf(second * v_unbias) + eps));
        m[i] = first;
        v[i] = second;
        param[i] = p;
    }
}

void cpu_adamw_slice(float *param, const float *grad, float *m, float *v, size_t n,
                     const struct kernels_adamw *a) {
    adamw_slice(param, grad, m, v, n, a);
}

static void adamw(const struct kernels *k, void *w, uint16_t *rest, const float *grad, float *m,
                  float *v, size_t n, const struct kernels_adamw *a) {
    float *param = w;
    assert(!rest);
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT(n))
    for (size_t i = 0; i < n; i += CPU_SLICE)
        adamw_slice(param + i, grad + i, m + i, v + i, slice_at(i, n), a);
}

WIDE static void descend_slice(float *param, const float *direction, size_t n, const struct kernels_descent *d) {
    float keep = d->keep, step = d->step;
#pragma omp simd
    for (size_t i = 0; i < n; i++) param[i] = keep * param[i] - step * direction[i];
}

void cpu_descend_slice(float *param, const float *direction, size_t n, const struct kernels_descent *d) {
    descend_slice(param, direction, n, d);
}

static void descend(const struct kernels *k, void *w, uint16_t *rest, const float *direction, size_t n,
                    const struct kernels_descent *d) {
    float *param = w;
    assert(!rest);
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT(n))
    for (size_t i = 0; i < n; i += CPU_SLICE) descend_slice(param + i, direction + i, slice_at(i, n), d);
}

WIDE static double sum_squares_slice(const float *x, size_t n) {
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sum;
}

/* The parts depend on n alone and are added in order, so the thread count changes no bit. */
static double sum_squares(const struct kernels *k, const float *x, size_t n) {
    enum { PARTS = 64 };
    double part[PARTS], sum = 0.0;
    size_t each = (n + PARTS - 1) / PARTS;
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT(n))
    for (size_t p = 0; p < PARTS; p++) {
        size_t begin = p * each < n ? p * each : n, end = n - begin < each ? n : begin + each;
        part[p] = sum_squares_slice(x + begin, end - begin);
    }
    for (int p = 0; p < PARTS; p++) sum += part[p];
    return sum;
}

/* ---- the table ---- */

static const char *instruction_set(void) {
    unsigned isa = (unsigned)dnnl_get_effective_cpu_isa();
    unsigned avx512 = (unsigned)dnnl_cpu_isa_avx512_core, avx2 = (unsigned)dnnl_cpu_isa_avx2;
    if ((isa & avx512) == avx512) return "AVX-512";
    return (isa & avx2) == avx2 ? "AVX2" : "no AVX2";
}

void cpu_describe_bf16(struct cpu *cpu, int stochastic) {
    unsigned isa = (unsigned)dnnl_get_effective_cpu_isa();
    unsigned amx = (unsigned)dnnl_cpu_isa_avx512_core_amx;
    unsigned vector = (unsigned)dnnl_cpu_isa_avx512_core_bf16;
    const dnnl_version_t *version = dnnl_version();
    cpu->native_bf16 = (isa & vector) == vector;
    cpu->amx = (isa & amx) == amx;
    snprintf(cpu->description, sizeof cpu->description,
             "oneDNN %d.%d.%d, bf16%s, products by %s%s, %d thread%s",
             version->major, version->minor, version->patch,
             stochastic ? " rounded stochastically" : " with fp32 master",
             cpu->amx ? "AMX" : cpu->native_bf16 ? "AVX512-BF16" : instruction_set(),
             cpu->native_bf16 ? "" : " in fp32", cpu->threads, cpu->threads == 1 ? "" : "s");
}

static void describe(struct cpu *cpu) {
    const dnnl_version_t *version = dnnl_version();
    snprintf(cpu->description, sizeof cpu->description, "oneDNN %d.%d.%d, %s, %d thread%s",
             version->major, version->minor, version->patch, instruction_set(), cpu->threads,
             cpu->threads == 1 ? "" : "s");
}

struct kernels *kernels_cpu_create(int threads, struct err *err) {
    assert(threads >= 0);
    struct cpu *cpu = calloc(1, sizeof *cpu);
    if (!cpu) {
        err_set(err, ERR_MEMORY, "no memory for the CPU backend");
        return NULL;
    }
    cpu->threads = threads ? threads : omp_get_max_threads();
    describe(cpu);
    struct kernels *k = &cpu->table;
    *k = *kernels_reference(); /* for the memory entries; every kernel is replaced */
    if (cpu_products_init(cpu, err)) {
        destroy(k);
        return NULL;
    }
    k->name = "cpu";
    k->description = cpu->description;
    k->alloc = k->alloc_host = alloc_large;
    k->check = check;
    k->scratch_bytes = scratch_bytes;
    k->destroy = destroy;
    k->matmul_forward = matmul_forward;
    k->matmul_logits = matmul_logits;
    k->matmul_backward_input = matmul_backward_input;
    k->matmul_backward_weight = matmul_backward_weight;
    k->attention_forward = cpu_attention_forward;
    k->attention_backward = cpu_attention_backward;
    cpu_rows_entries(k);
    cpu_states_entries(k);
    k->adamw = adamw;
    k->descend = descend;
    k->sum_squares = sum_squares;
    return k;
}
