/* cpu_products.c - matrix products of the CPU backend by oneDNN's matmul primitive, in fp32 and in bf16, made
 * once for each shape and layout; large ones in bf16 may be cpu_products_bf16.c's.
 *
 * oneDNN packs B for itself in each block of rows, so that with many rows it is cheaper to hand it over
 * packed: at 4096 rows, one core of AVX512-BF16, that is 210 to 220 GFLOP/s instead of 195 to 210 in bf16 and
 * 110 instead of 100 in fp32, and packing takes 1 % of 2048 rows. A copy kept from one optimizer step to the
 * next would save that one percent for the bytes of a weight. With few rows packing takes longer than it
 * saves: at the head of 1b, 130 rows at a time, logits took twice as long with it. */
#include "kernels/cpu.h"

#include <oneapi/dnnl/dnnl.h>

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
static int describe_any(dnnl_memory_desc_t *d, dnnl_data_type_t type, int rows, int columns) {
    dnnl_dims_t dims = { rows, columns };
#if DNNL_VERSION_MAJOR >= 3
    return dnnl_memory_desc_create_with_tag(d, 2, dims, type, dnnl_format_tag_any) != dnnl_success;
#else
    return dnnl_memory_desc_init_by_tag(d, 2, dims, type, dnnl_format_tag_any) != dnnl_success;
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

static int is_packed(struct cpu_product_key key) {
    return key.m >= (key.transposed_b ? 1024 : 512);
}

int cpu_is_own(const struct cpu *cpu, struct cpu_product_key key) {
    return key.bf16 && !cpu->plain && !cpu->amx && cpu_products_bf16_can(key);
}

void cpu_product_bytes(const struct cpu *cpu, struct cpu_product_key key, size_t *shared, size_t *own) {
    size_t all = (size_t)key.k * (size_t)key.n * (key.bf16 ? sizeof(uint16_t) : sizeof(float));
    *shared = is_packed(key) ? all : 0;
    *own = 0;
    if (cpu_is_own(cpu, key)) cpu_products_bf16_bytes(key, cpu->threads, shared, own);
}

/* [m,k] x [k,n], each stored as it is or transposed. */
static int product_prepare(struct cpu *cpu, struct cpu_product *p, struct cpu_product_key key) {
    dnnl_memory_desc_t d[3] = { 0 }, plain = { 0 };
    dnnl_primitive_attr_t attr = NULL;
    dnnl_primitive_desc_t description = NULL;
    dnnl_data_type_t in = key.bf16 ? dnnl_bf16 : dnnl_f32, out = key.bf16_out ? dnnl_bf16 : dnnl_f32;
    int failed = describe_operand(&d[0], in, key.m, key.k, key.transposed_a) ||
                 describe_operand(&plain, in, key.k, key.n, key.transposed_b) ||
                 (is_packed(key) ? describe_any(&d[1], in, key.k, key.n)
                                 : describe_operand(&d[1], in, key.k, key.n, key.transposed_b)) ||
                 describe_operand(&d[2], out, key.m, key.n, 0) || describe_sum(&attr, key.add) ||
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
static const void *packed(struct cpu *cpu, const struct cpu_product *p, const void *B) {
    if (!p->pack) return B;
    void *to = cpu_buffer(cpu, CPU_PACKED, p->packed_bytes);
    dnnl_exec_arg_t args[] = { { DNNL_ARG_FROM, p->plain }, { DNNL_ARG_TO, p->memory[1] } };
    if (!to || dnnl_memory_set_data_handle(p->plain, (void *)(uintptr_t)B) ||
        dnnl_memory_set_data_handle(p->memory[1], to) ||
        dnnl_primitive_execute(p->pack, cpu->stream, 2, args))
        return NULL;
    return to;
}

static int multiply(struct cpu *cpu, struct cpu_product_key key, const void *A, const void *B, void *C) {
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

int cpu_products_init(struct cpu *cpu, struct err *err) {
    if (dnnl_engine_create(&cpu->engine, dnnl_cpu, 0) ||
        dnnl_stream_create(&cpu->stream, cpu->engine, dnnl_stream_default_flags))
        return err_set(err, ERR_UNSUPPORTED, "oneDNN gives no engine for this processor");
    return 0;
}

void cpu_products_release(struct cpu *cpu) {
    for (int i = 0; i < CPU_PRODUCTS_MAX; i++) product_release(&cpu->product[i]);
    if (cpu->stream) dnnl_stream_destroy(cpu->stream);
    if (cpu->engine) dnnl_engine_destroy(cpu->engine);
}

void cpu_multiply(struct cpu *cpu, struct cpu_product_key key, const void *A, const void *B, void *C) {
    if (cpu_is_own(cpu, key)) {
        cpu_products_bf16_multiply(cpu, key, A, B, C);
        return;
    }
    int before = cpu_use_threads(cpu->threads);
    if (multiply(cpu, key, A, B, C) && cpu->failure.code == ERR_NONE)
        err_set(&cpu->failure, ERR_UNSUPPORTED, "oneDNN's product of [%d,%d] and [%d,%d] failed", key.m,
                key.k, key.k, key.n);
    cpu_use_threads(before);
}
