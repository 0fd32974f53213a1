/* cpu_bf16.c - the CPU backend with weights in bf16: matrix products that round their operands to bf16
 * and add in fp32, and the kernels that read or write weights. All else is cpu.c's: activations,
 * gradients, moments, norms and attention stay fp32.
 *
 * oneDNN's bf16 product needs AVX512-BF16 or AMX; elsewhere the operands are rounded all the same and
 * multiplied as fp32, which gives the same result but for the order of additions. */
#include "kernels/bf16.h"
#include "kernels/cpu.h"

#include <assert.h>
#include <oneapi/dnnl/dnnl.h>
#include <stdlib.h>

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

/* Buffer `which` of at least `bytes`, or NULL with the failure kept for check(). */
static void *buffer(struct cpu *cpu, int which, size_t bytes) {
    if (bytes <= cpu->buffer_bytes[which]) return cpu->buffer[which];
    void *grown = cpu->table.alloc(&cpu->table, bytes, cpu->failure.code == ERR_NONE ? &cpu->failure : NULL);
    if (!grown) return NULL;
    cpu->table.free(&cpu->table, cpu->buffer[which]);
    cpu->buffer_bytes[which] = bytes;
    return cpu->buffer[which] = grown;
}

/* oneDNN packs B for itself in each block of rows, so that with many rows it is cheaper to hand it over
 * packed: on AVX512-BF16 the backward product gains 6 to 12 % of its time and the forward one 4 %, and
 * packing takes 1 % of 2048 rows. A copy kept from one optimizer step to the next would save that one
 * percent for two bytes a weight. */
#define PACK_ROWS_MIN 128

#if DNNL_VERSION_MAJOR >= 3
typedef const_dnnl_memory_desc_t desc_pointer;
#define DESC(d) (d)
#define DESC_DESTROY(d) dnnl_memory_desc_destroy(d)
#else
typedef const dnnl_memory_desc_t *desc_pointer;
#define DESC(d) (&(d))
#define DESC_DESTROY(d) ((void)0)
#endif

/* B in whatever layout suits the product. */
static int describe_any(dnnl_memory_desc_t *d, int rows, int columns) {
    dnnl_dims_t dims = { rows, columns };
#if DNNL_VERSION_MAJOR >= 3
    return dnnl_memory_desc_create_with_tag(d, 2, dims, dnnl_bf16, dnnl_format_tag_any) != dnnl_success;
#else
    return dnnl_memory_desc_init_by_tag(d, 2, dims, dnnl_bf16, dnnl_format_tag_any) != dnnl_success;
#endif
}

static int describe_operand(dnnl_memory_desc_t *d, dnnl_data_type_t type, int rows, int columns,
                            int transposed) {
    dnnl_dims_t dims = { rows, columns }, strides = { transposed ? 1 : columns, transposed ? rows : 1 };
#if DNNL_VERSION_MAJOR >= 3
    return dnnl_memory_desc_create_with_strides(d, 2, dims, type, strides) != dnnl_success;
#else
    return dnnl_memory_desc_init_by_strides(d, 2, dims, type, strides) != dnnl_success;
#endif
}

/* C += is a sum after the product. */
static int describe_sum(dnnl_primitive_attr_t *attr, int add) {
    dnnl_post_ops_t ops;
    if (dnnl_primitive_attr_create(attr)) return -1;
    if (!add) return 0;
    if (dnnl_post_ops_create(&ops)) return -1;
#if DNNL_VERSION_MAJOR >= 3
    int failed = dnnl_post_ops_append_sum(ops, 1.0f, 0, dnnl_data_type_undef) ||
#else
    int failed = dnnl_post_ops_append_sum(ops, 1.0f) ||
#endif
                 dnnl_primitive_attr_set_post_ops(*attr, ops);
    dnnl_post_ops_destroy(ops);
    return failed ? -1 : 0;
}

static int describe_product(dnnl_primitive_desc_t *out, dnnl_engine_t engine, const dnnl_memory_desc_t d[3],
                            dnnl_primitive_attr_t attr) {
#if DNNL_VERSION_MAJOR >= 3
    return dnnl_matmul_primitive_desc_create(out, engine, d[0], d[1], NULL, d[2], attr) != dnnl_success;
#else
    dnnl_matmul_desc_t matmul;
    return dnnl_matmul_desc_init(&matmul, &d[0], &d[1], NULL, &d[2]) ||
           dnnl_primitive_desc_create(out, &matmul, attr, engine, NULL);
#endif
}

static void product_release(struct cpu_product *p) {
    for (int i = 0; i < 3; i++)
        if (p->memory[i]) dnnl_memory_destroy(p->memory[i]);
    if (p->plain) dnnl_memory_destroy(p->plain);
    if (p->pack) dnnl_primitive_destroy(p->pack);
    if (p->primitive) dnnl_primitive_destroy(p->primitive);
    *p = (struct cpu_product){ 0 };
}

/* Where the product wants B otherwise than it lies: how to get it there. */
static int pack_prepare(struct cpu *cpu, struct cpu_product *p, desc_pointer plain, desc_pointer packed) {
    dnnl_primitive_desc_t description = NULL;
    if (dnnl_memory_desc_equal(plain, packed)) return 0;
    p->packed_bytes = dnnl_memory_desc_get_size(packed);
    int failed = dnnl_reorder_primitive_desc_create(&description, plain, cpu->engine, packed, cpu->engine,
                                                    NULL) ||
                 dnnl_primitive_create(&p->pack, description) ||
                 dnnl_memory_create(&p->plain, plain, cpu->engine, DNNL_MEMORY_NONE);
    if (description) dnnl_primitive_desc_destroy(description);
    return failed ? -1 : 0;
}

/* [m,k] x [k,n], each stored as it is or transposed. */
static int product_prepare(struct cpu *cpu, struct cpu_product *p, struct cpu_product_key key) {
    dnnl_memory_desc_t d[3] = { 0 }, plain = { 0 };
    dnnl_primitive_attr_t attr = NULL;
    dnnl_primitive_desc_t description = NULL;
    int failed = describe_operand(&d[0], dnnl_bf16, key.m, key.k, key.transposed_a) ||
                 describe_operand(&plain, dnnl_bf16, key.k, key.n, key.transposed_b) ||
                 (key.m < PACK_ROWS_MIN ? describe_operand(&d[1], dnnl_bf16, key.k, key.n, key.transposed_b)
                                        : describe_any(&d[1], key.k, key.n)) ||
                 describe_operand(&d[2], dnnl_f32, key.m, key.n, 0) || describe_sum(&attr, key.add) ||
                 describe_product(&description, cpu->engine, d, attr) ||
                 dnnl_primitive_create(&p->primitive, description);
    desc_pointer B = failed ? NULL : dnnl_primitive_desc_query_md(description, dnnl_query_weights_md, 0);
    failed = !B || pack_prepare(cpu, p, DESC(plain), B) ||
             dnnl_memory_create(&p->memory[0], DESC(d[0]), cpu->engine, DNNL_MEMORY_NONE) ||
             dnnl_memory_create(&p->memory[1], B, cpu->engine, DNNL_MEMORY_NONE) ||
             dnnl_memory_create(&p->memory[2], DESC(d[2]), cpu->engine, DNNL_MEMORY_NONE);
    if (description) dnnl_primitive_desc_destroy(description);
    if (attr) dnnl_primitive_attr_destroy(attr);
    for (int i = 0; i < 3; i++) DESC_DESTROY(d[i]);
    DESC_DESTROY(plain);
    if (failed) product_release(p);
    else p->key = key;
    return failed ? -1 : 0;
}

/* Kept from the last time, or made in the place of the oldest. */
static struct cpu_product *product_of(struct cpu *cpu, struct cpu_product_key key) {
    for (int i = 0; i < CPU_PRODUCTS_MAX; i++)
        if (!memcmp(&cpu->product[i].key, &key, sizeof key)) return &cpu->product[i];
    struct cpu_product *p = &cpu->product[cpu->product_next++ % CPU_PRODUCTS_MAX];
    product_release(p);
    return product_prepare(cpu, p, key) ? NULL : p;
}

/* B as the product wants it; NULL where that failed. */
static const void *packed(struct cpu *cpu, const struct cpu_product *p, const uint16_t *B) {
    if (!p->pack) return B;
    void *to = buffer(cpu, CPU_PACKED, p->packed_bytes);
    dnnl_exec_arg_t args[] = { { DNNL_ARG_FROM, p->plain }, { DNNL_ARG_TO, p->memory[1] } };
    if (!to || dnnl_memory_set_data_handle(p->plain, (void *)(uintptr_t)B) ||
        dnnl_memory_set_data_handle(p->memory[1], to) ||
        dnnl_primitive_execute(p->pack, cpu->stream, 2, args))
        return NULL;
    return to;
}

static int multiply(struct cpu *cpu, struct cpu_product_key key, const uint16_t *A, const uint16_t *B,
                    float *C) {
    struct cpu_product *p = product_of(cpu, key);
    if (!p) return -1;
    const void *b = packed(cpu, p, B);
    if (!b) return -1;
    void *at[3] = { (void *)(uintptr_t)A, (void *)(uintptr_t)b, C };
    for (int i = 0; i < 3; i++)
        if (dnnl_memory_set_data_handle(p->memory[i], at[i])) return -1;
    dnnl_exec_arg_t args[] = { { DNNL_ARG_SRC, p->memory[0] }, { DNNL_ARG_WEIGHTS, p->memory[1] },
                               { DNNL_ARG_DST, p->memory[2] } };
    return dnnl_primitive_execute(p->primitive, cpu->stream, 3, args) || dnnl_stream_wait(cpu->stream);
}

/* C[m,n] = or += op(A) * op(B) in bf16, with oneDNN or as rounded fp32. */
static void gemm(struct cpu *cpu, int transposed_a, int transposed_b, int m, int n, int k,
                 const uint16_t *A, const uint16_t *B, enum kernels_write write, float *C) {
    int add = write == KERNELS_ADD;
    struct cpu_product_key key = { m, n, k, transposed_a, transposed_b, add };
    int before = cpu_use_threads(cpu->threads);
    if (cpu->native_bf16) {
        if (multiply(cpu, key, A, B, C) && cpu->failure.code == ERR_NONE)
            err_set(&cpu->failure, ERR_UNSUPPORTED, "oneDNN's bf16 product of [%d,%d] and [%d,%d] failed",
                    m, k, k, n);
    } else {
        size_t a = (size_t)m * (size_t)k, b = (size_t)k * (size_t)n;
        float *wide_a = buffer(cpu, CPU_WIDE_A, a * sizeof *wide_a);
        float *wide_b = buffer(cpu, CPU_WIDE_B, b * sizeof *wide_b);
        if (wide_a && wide_b) {
            widen(cpu, wide_a, A, a);
            widen(cpu, wide_b, B, b);
            cpu_gemm(cpu, transposed_a ? 'T' : 'N', transposed_b ? 'T' : 'N', m, n, k, 1.0f, wide_a,
                     (size_t)(transposed_a ? m : k), wide_b, (size_t)(transposed_b ? k : n), (float)add, C,
                     (size_t)n);
        }
    }
    cpu_use_threads(before);
}

/* x[n] rounded into buffer `which`; NULL where there is no memory for it. */
static const uint16_t *rounded(struct cpu *cpu, int which, const float *x, size_t n) {
    uint16_t *out = buffer(cpu, which, n * sizeof *out);
    if (out) narrow(cpu, out, x, n);
    return out;
}

static void matmul_forward(const struct kernels *k, float *out, const float *x, const void *w, int rows,
                           int C, int OC) {
    struct cpu *cpu = cpu_of(k);
    const uint16_t *a = rounded(cpu, CPU_NARROW_A, x, (size_t)rows * (size_t)C);
    if (a) gemm(cpu, 0, 1, rows, OC, C, a, w, KERNELS_SET, out);
}

static void matmul_backward_input(const struct kernels *k, float *dx, const float *dout, const void *w,
                                  int rows, int C, int OC, enum kernels_write write) {
    struct cpu *cpu = cpu_of(k);
    const uint16_t *a = rounded(cpu, CPU_NARROW_A, dout, (size_t)rows * (size_t)OC);
    if (a) gemm(cpu, 0, 0, rows, C, OC, a, w, write, dx);
}

static void matmul_backward_weight(const struct kernels *k, float *dw, const float *dout, const float *x,
                                   int rows, int C, int OC, enum kernels_write write) {
    struct cpu *cpu = cpu_of(k);
    const uint16_t *a = rounded(cpu, CPU_NARROW_A, dout, (size_t)rows * (size_t)OC);
    const uint16_t *b = rounded(cpu, CPU_NARROW_B, x, (size_t)rows * (size_t)C);
    if (a && b) gemm(cpu, 1, 0, OC, C, rows, a, b, write, dw);
}

/* ---- other kernels that read weights ------------------------------------------------------------- */

static void embedding_forward(const struct kernels *k, float *out, const int32_t *tokens, const void *w,
                              int rows, int C, int V) {
    const uint16_t *table = w;
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT((size_t)rows * C))
    for (int r = 0; r < rows; r++) {
        assert(tokens[r] >= 0 && tokens[r] < V);
        widen_slice(out + (size_t)r * C, table + (size_t)tokens[r] * C, (size_t)C);
    }
}

static const float *wide_norm(struct cpu *cpu, const void *w, int C) {
    float *wide = buffer(cpu, CPU_WIDE_A, (size_t)C * sizeof *wide);
    if (wide) widen_slice(wide, w, (size_t)C);
    return wide;
}

static void rmsnorm_forward(const struct kernels *k, float *out, float *rstd, const float *x, const void *w,
                            float eps, int rows, int C) {
    const float *wide = wide_norm(cpu_of(k), w, C);
    if (wide) cpu_rmsnorm_forward(k, out, rstd, x, wide, eps, rows, C);
}

static void rmsnorm_backward(const struct kernels *k, float *dx, float *dw, const float *dout,
                             const float *x, const void *w, const float *rstd, int rows, int C) {
    const float *wide = wide_norm(cpu_of(k), w, C);
    if (wide) cpu_rmsnorm_backward(k, dx, dw, dout, x, wide, rstd, rows, C);
}

/* ---- optimizer ----------------------------------------------------------------------------------- */

/* A slice in fp32, as cpu.c does it: with the lower halves kept, bit for bit what fp32 weights become. */
static void adamw(const struct kernels *k, void *param, uint16_t *rest, const float *grad, float *m, float *v,
                  size_t n, const struct kernels_adamw *a) {
    uint16_t *upper = param;
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT(n))
    for (size_t i = 0; i < n; i += CPU_SLICE) {
        float wide[CPU_SLICE];
        size_t here = slice_at(i, n);
        if (rest) join_slice(wide, upper + i, rest + i, here);
        else widen_slice(wide, upper + i, here);
        cpu_adamw_slice(wide, grad + i, m + i, v + i, here, a);
        if (rest) split_slice(upper + i, rest + i, wide, here);
        else stochastic_slice(upper + i, wide, a->seed, a->first + i, here);
    }
}

/* ---- the table ----------------------------------------------------------------------------------- */

static void destroy(struct kernels *k) {
    struct cpu *cpu = cpu_of(k);
    for (int i = 0; i < CPU_PRODUCTS_MAX; i++) product_release(&cpu->product[i]);
    for (int i = 0; i < CPU_BUFFERS; i++) k->free(k, cpu->buffer[i]);
    if (cpu->stream) dnnl_stream_destroy(cpu->stream);
    if (cpu->engine) dnnl_engine_destroy(cpu->engine);
    cpu_destroy(k);
}

struct kernels *kernels_cpu_bf16_create(int threads, int stochastic, struct err *err) {
    struct kernels *k = kernels_cpu_create(threads, err);
    if (!k) return NULL;
    struct cpu *cpu = cpu_of(k);
    if (dnnl_engine_create(&cpu->engine, dnnl_cpu, 0) ||
        dnnl_stream_create(&cpu->stream, cpu->engine, dnnl_stream_default_flags)) {
        err_set(err, ERR_UNSUPPORTED, "oneDNN gives no engine for this processor");
        destroy(k);
        return NULL;
    }
    k->weight_bytes = sizeof(uint16_t);
    k->rest_bytes = stochastic ? 0 : sizeof(uint16_t);
    k->destroy = destroy;
    k->weights_in = weights_in;
    k->weights_out = weights_out;
    k->matmul_forward = matmul_forward;
    k->matmul_backward_input = matmul_backward_input;
    k->matmul_backward_weight = matmul_backward_weight;
    k->embedding_forward = embedding_forward;
    k->rmsnorm_forward = rmsnorm_forward;
    k->rmsnorm_backward = rmsnorm_backward;
    k->adamw = adamw;
    cpu_describe_bf16(cpu, stochastic);
    return k;
}
