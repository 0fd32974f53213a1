/* products.c - floors: a step's products by oneDNN alone, and memory. B is laid out as oneDNN likes it
 * before the time begins, nothing is transposed or rounded: it can do no better. */
#include <oneapi/dnnl/dnnl.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "tests/bench_train/bench_train.h"

struct one {
    dnnl_primitive_t primitive;
    dnnl_memory_t memory[3];
    double best;
};

struct floors {
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    struct one one[PRODUCTS_MAX];
    int count;
    void *bytes[3]; /* the operands of the largest; all products work on them */
    size_t size[3];
};

#define FAILED(call) ((call) != dnnl_success)

#if DNNL_VERSION_MAJOR >= 3
typedef const_dnnl_memory_desc_t desc_pointer;
#define DESC(d) (d)
#else
typedef const dnnl_memory_desc_t *desc_pointer;
#define DESC(d) (&(d))
#endif

static int describe(dnnl_memory_desc_t *d, dnnl_data_type_t type, int rows, int columns,
                    dnnl_format_tag_t tag) {
    dnnl_dims_t dims = { rows, columns };
#if DNNL_VERSION_MAJOR >= 3
    return FAILED(dnnl_memory_desc_create_with_tag(d, 2, dims, type, tag));
#else
    return FAILED(dnnl_memory_desc_init_by_tag(d, 2, dims, type, tag));
#endif
}

static int describe_product(dnnl_primitive_desc_t *out, dnnl_engine_t engine, dnnl_memory_desc_t d[3]) {
#if DNNL_VERSION_MAJOR >= 3
    return FAILED(dnnl_matmul_primitive_desc_create(out, engine, d[0], d[1], NULL, d[2], NULL));
#else
    dnnl_matmul_desc_t matmul;
    return FAILED(dnnl_matmul_desc_init(&matmul, &d[0], &d[1], NULL, &d[2])) ||
           FAILED(dnnl_primitive_desc_create(out, &matmul, NULL, engine, NULL));
#endif
}

static int prepare(struct floors *f, struct one *o, const struct product *p, dnnl_data_type_t type) {
    dnnl_memory_desc_t d[3];
    dnnl_primitive_desc_t description;
    if (describe(&d[0], type, p->m, p->k, dnnl_ab) ||
        describe(&d[1], type, p->k, p->n, dnnl_format_tag_any) ||
        describe(&d[2], type, p->m, p->n, dnnl_ab) || describe_product(&description, f->engine, d) ||
        FAILED(dnnl_primitive_create(&o->primitive, description)))
        return -1;
    desc_pointer at[3] = { DESC(d[0]), dnnl_primitive_desc_query_md(description, dnnl_query_weights_md, 0),
                           DESC(d[2]) };
    for (int i = 0; i < 3; i++) {
        size_t size = dnnl_memory_desc_get_size(at[i]);
        if (size > f->size[i]) f->size[i] = size;
        if (FAILED(dnnl_memory_create(&o->memory[i], at[i], f->engine, DNNL_MEMORY_NONE))) return -1;
    }
    dnnl_primitive_desc_destroy(description);
    o->best = 1e30;
    return 0;
}

static int take_operands(struct floors *f, struct err *err) {
    for (int i = 0; i < 3; i++) {
        if (!(f->bytes[i] = aligned_alloc(64, (f->size[i] + 63) / 64 * 64)))
            return err_set(err, ERR_MEMORY, "no memory for a product's operand of %zu bytes", f->size[i]);
        memset(f->bytes[i], 0x3d, f->size[i]); /* some number */
        for (int p = 0; p < f->count; p++)
            if (FAILED(dnnl_memory_set_data_handle(f->one[p].memory[i], f->bytes[i])))
                return err_set(err, ERR_UNSUPPORTED, "oneDNN takes no memory");
    }
    return 0;
}

struct floors *floors_create(const struct product *product, int count, int bf16, struct err *err) {
    struct floors *f = calloc(1, sizeof *f);
    if (!f || FAILED(dnnl_engine_create(&f->engine, dnnl_cpu, 0)) ||
        FAILED(dnnl_stream_create(&f->stream, f->engine, dnnl_stream_default_flags))) {
        err_set(err, ERR_UNSUPPORTED, "oneDNN gives no engine");
        return NULL;
    }
    f->count = count;
    for (int i = 0; i < count; i++)
        if ((!bf16 || prepare(f, &f->one[i], &product[i], dnnl_bf16)) &&
            prepare(f, &f->one[i], &product[i], dnnl_f32)) {
            err_set(err, ERR_UNSUPPORTED, "oneDNN has no product [%d,%d] x [%d,%d]", product[i].m,
                    product[i].k, product[i].k, product[i].n);
            return NULL;
        }
    return take_operands(f, err) ? NULL : f;
}

void floors_destroy(struct floors *f) {
    for (int i = 0; i < f->count; i++) {
        dnnl_primitive_destroy(f->one[i].primitive);
        for (int j = 0; j < 3; j++) dnnl_memory_destroy(f->one[i].memory[j]);
    }
    for (int i = 0; i < 3; i++) free(f->bytes[i]);
    dnnl_stream_destroy(f->stream);
    dnnl_engine_destroy(f->engine);
    free(f);
}

int floors_run(struct floors *f, struct err *err) {
    for (int i = 0; i < f->count; i++) {
        struct one *o = &f->one[i];
        dnnl_exec_arg_t args[] = { { DNNL_ARG_SRC, o->memory[0] },
                                   { DNNL_ARG_WEIGHTS, o->memory[1] },
                                   { DNNL_ARG_DST, o->memory[2] } };
        for (int again = 0; again < 2; again++) {
            double begin = now_s();
            if (FAILED(dnnl_primitive_execute(o->primitive, f->stream, 3, args)) ||
                FAILED(dnnl_stream_wait(f->stream)))
                return err_set(err, ERR_UNSUPPORTED, "oneDNN's product failed");
            double seconds = now_s() - begin;
            if (seconds < o->best) o->best = seconds;
        }
    }
    return 0;
}

double floors_seconds(const struct floors *f, int product) { return f->one[product].best; }

double floors_memory(void) {
    size_t bytes = (size_t)64 << 20;
    int threads = omp_get_max_threads();
    char *from = aligned_alloc(64, bytes), *to = aligned_alloc(64, bytes);
    double best = 1e30;
    for (int again = 0; from && to && again < 5; again++) {
        double begin = now_s();
#pragma omp parallel for num_threads(threads)
        for (int i = 0; i < threads; i++) {
            size_t at = bytes / (size_t)threads * (size_t)i;
            if (again == 0) memset(from + at, 1, bytes / (size_t)threads);
            memcpy(to + at, from + at, bytes / (size_t)threads);
        }
        double seconds = now_s() - begin;
        if (again && seconds < best) best = seconds;
    }
    free(from);
    free(to);
    return 2 * (double)bytes / best;
}
