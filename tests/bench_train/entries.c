/* entries.c - a kernel table whose entries are timed. The original is kept aside; what is handed to it is
 * the table itself, which to a backend is its own. */
#include <string.h>

#include "tests/bench_train/bench_train.h"

static struct kernels original;
static struct entries taken;
static int waits; /* for what a GPU does after the call has returned */

static double *seconds_of(const char *name) {
    for (int i = 0; i < taken.count; i++)
        if (!strcmp(taken.entry[i].name, name)) return &taken.entry[i].seconds;
    taken.entry[taken.count].name = name;
    return &taken.entry[taken.count++].seconds;
}

static void add_time(const struct kernels *k, const char *name, double begin) {
    struct err err;
    if (waits && original.check(k, &err) && taken.failure.code == ERR_NONE) taken.failure = err;
    *seconds_of(name) += now_s() - begin;
}

static void count_product(int m, int n, int k) {
    for (int i = 0; i < taken.products; i++) {
        struct product *p = &taken.product[i];
        if (p->m == m && p->n == n && p->k == k) {
            p->count++;
            return;
        }
    }
    if (taken.products < PRODUCTS_MAX) taken.product[taken.products++] = (struct product){ m, n, k, 1 };
}

/* An entry's parameters, and its arguments once more. */
#define TIMED(entry, parameters, arguments) \
    static void timed_##entry parameters { \
        double begin = now_s(); \
        original.entry arguments; \
        add_time(k, #entry, begin); \
    }
#define K const struct kernels *k

TIMED(copy_in, (K, void *to, const void *host, size_t bytes), (k, to, host, bytes))
TIMED(copy_out, (K, void *host, const void *from, size_t bytes), (k, host, from, bytes))
TIMED(zero, (K, void *p, size_t bytes), (k, p, bytes))
TIMED(embedding_forward, (K, float *out, const int32_t *tokens, const void *w, int rows, int C, int V),
      (k, out, tokens, w, rows, C, V))
TIMED(embedding_backward, (K, float *dw, const float *dout, const int32_t *tokens, int rows, int C, int V),
      (k, dw, dout, tokens, rows, C, V))
TIMED(rmsnorm_forward,
      (K, void *out, float *rstd, const float *x, const float *w, float eps, int rows, int C),
      (k, out, rstd, x, w, eps, rows, C))
TIMED(rmsnorm_backward,
      (K, float *dx, float *dw, const void *dout, const float *x, const float *w, const float *rstd, int rows,
       int C),
      (k, dx, dw, dout, x, w, rstd, rows, C))
TIMED(rope_forward,
      (K, void *qkv, const float *cos, const float *sin, const int32_t *start, int B, int T, int H, int KV,
       int D),
      (k, qkv, cos, sin, start, B, T, H, KV, D))
TIMED(rope_backward,
      (K, void *dqkv, const float *cos, const float *sin, const int32_t *start, int B, int T, int H, int KV,
       int D),
      (k, dqkv, cos, sin, start, B, T, H, KV, D))
TIMED(attention_forward,
      (K, void *out, float *lse, const void *qkv, const int32_t *start, int B, int T, int H, int KV, int D),
      (k, out, lse, qkv, start, B, T, H, KV, D))
TIMED(attention_backward,
      (K, void *dqkv, const void *dout, const void *qkv, const void *out, const float *lse,
       const int32_t *start, int B, int T, int H, int KV, int D),
      (k, dqkv, dout, qkv, out, lse, start, B, T, H, KV, D))
TIMED(swiglu_forward, (K, void *out, const void *gate_up, int rows, int F), (k, out, gate_up, rows, F))
TIMED(swiglu_backward, (K, void *dgate_up, const void *dout, const void *gate_up, int rows, int F),
      (k, dgate_up, dout, gate_up, rows, F))
TIMED(add, (K, float *out, const float *a, const void *b, size_t n), (k, out, a, b, n))
TIMED(round, (K, void *out, const float *x, size_t n), (k, out, x, n))
TIMED(cross_entropy,
      (K, float *loss, float *penalty, void *dlogits, float *logits, const int32_t *targets,
       const struct kernels_loss *how, int rows, int V),
      (k, loss, penalty, dlogits, logits, targets, how, rows, V))
TIMED(adamw,
      (K, void *param, uint16_t *rest, const float *grad, float *m, float *v, size_t n,
       const struct kernels_adamw *a),
      (k, param, rest, grad, m, v, n, a))
TIMED(matmul_forward, (K, void *out, const void *x, const void *w, int rows, int C, int OC),
      (k, out, x, w, rows, C, OC);
      count_product(rows, OC, C))
TIMED(matmul_logits, (K, float *out, const void *x, const void *w, int rows, int C, int OC),
      (k, out, x, w, rows, C, OC);
      count_product(rows, OC, C))
TIMED(matmul_backward_input, (K, void *dx, const void *dout, const void *w, int rows, int C, int OC),
      (k, dx, dout, w, rows, C, OC);
      count_product(rows, C, OC))
TIMED(matmul_backward_weight,
      (K, float *dw, const void *dout, const void *x, int rows, int C, int OC, enum kernels_write write),
      (k, dw, dout, x, rows, C, OC, write);
      count_product(OC, C, rows))

static double timed_sum_squares(K, const float *x, size_t n) {
    double begin = now_s(), sum = original.sum_squares(k, x, n);
    add_time(k, "sum_squares", begin);
    return sum;
}

void entries_time(struct kernels *k) {
    original = *k;
    waits = !strcmp(k->name, "cuda");
    k->copy_in = timed_copy_in;
    k->copy_out = timed_copy_out;
    k->zero = timed_zero;
    k->embedding_forward = timed_embedding_forward;
    k->embedding_backward = timed_embedding_backward;
    k->rmsnorm_forward = timed_rmsnorm_forward;
    k->rmsnorm_backward = timed_rmsnorm_backward;
    k->rope_forward = timed_rope_forward;
    k->rope_backward = timed_rope_backward;
    k->attention_forward = timed_attention_forward;
    k->attention_backward = timed_attention_backward;
    k->swiglu_forward = timed_swiglu_forward;
    k->swiglu_backward = timed_swiglu_backward;
    k->add = timed_add;
    k->round = timed_round;
    k->cross_entropy = timed_cross_entropy;
    k->adamw = timed_adamw;
    k->matmul_forward = timed_matmul_forward;
    k->matmul_logits = timed_matmul_logits;
    k->matmul_backward_input = timed_matmul_backward_input;
    k->matmul_backward_weight = timed_matmul_backward_weight;
    k->sum_squares = timed_sum_squares;
}

void entries_reset(void) { taken = (struct entries){ 0 }; }

const struct entries *entries_taken(void) { return &taken; }

int entries_is_product(const char *name) { return !strncmp(name, "matmul_", 7); }
