/* update.cu - AdamW, sums of squares, the residual stream, and weights between the device and fp32 in host
 * memory. All of it is bound by memory. */
#include "kernels/cuda/cuda.h"

/* ---- weights ------------------------------------------------------------------------------------ */


__global__ void split(uint16_t *upper, uint16_t *lower, const float *x, size_t n) {
    size_t i = grid_index();
    if (i >= n) return;
    upper[i] = lower ? bf16_upper(x[i]) : bf16_nearest(x[i]);
    if (lower) lower[i] = bf16_lower(x[i]);
}

__global__ void join(float *x, const uint16_t *upper, const uint16_t *lower, size_t n) {
    size_t i = grid_index();
    if (i < n) x[i] = lower ? bf16_join(upper[i], lower[i]) : bf16_widen(upper[i]);
}

static void weights_in(const struct kernels *k, void *w, uint16_t *rest, const float *host, size_t n) {
    struct cuda *c = cuda_of(k);
    uint16_t *upper = (uint16_t *)w;
    if (k->weight_bytes == sizeof(float)) {
        k->copy_in(k, w, host, n * sizeof *host);
        return;
    }
    for (size_t at = 0, here; at < n; at += here) {
        here = n - at < CUDA_SLICE ? n - at : CUDA_SLICE;
        float *x = (float *)cuda_scratch(c, here * sizeof *x);
        if (!x) return;
        k->copy_in(k, x, host + at, here * sizeof *x);
        RUN(c, split, cuda_blocks(here, CUDA_THREADS), CUDA_THREADS, 0, upper + at, rest ? rest + at : NULL, x,
            here);
    }
}

static void weights_out(const struct kernels *k, float *host, const void *w, const uint16_t *rest, size_t n) {
    struct cuda *c = cuda_of(k);
    const uint16_t *upper = (const uint16_t *)w;
    if (k->weight_bytes == sizeof(float)) {
        k->copy_out(k, host, w, n * sizeof *host);
        return;
    }
    for (size_t at = 0, here; at < n; at += here) {
        here = n - at < CUDA_SLICE ? n - at : CUDA_SLICE;
        float *x = (float *)cuda_scratch(c, here * sizeof *x);
        if (!x) return;
        RUN(c, join, cuda_blocks(here, CUDA_THREADS), CUDA_THREADS, 0, x, upper + at, rest ? rest + at : NULL,
            here);
        k->copy_out(k, host + at, x, here * sizeof *x);
    }
}

/* ---- AdamW -------------------------------------------------------------------------------------- */

struct adamw_terms {
    float lr, beta1, beta2, m_rest, v_rest, m_unbias, v_unbias, eps, keep, grad_scale;
    uint64_t seed, first;
};

__device__ static float adamw_of(float param, float grad, float *m, float *v, const struct adamw_terms &a) {
    float g = grad * a.grad_scale;
    *m = a.beta1 * *m + a.m_rest * g;
    *v = a.beta2 * *v + a.v_rest * g * g;
    return a.keep * param - a.lr * (*m * a.m_unbias / (sqrtf(*v * a.v_unbias) + a.eps));
}

__global__ void adamw_fp32(float *param, const float *grad, float *m, float *v, size_t n, struct adamw_terms a) {
    size_t i = grid_index();
    if (i < n) param[i] = adamw_of(param[i], grad[i], &m[i], &v[i], a);
}

__global__ void adamw_planes(uint16_t *upper, uint16_t *lower, const float *grad, float *m, float *v, size_t n,
                             struct adamw_terms a) {
    size_t i = grid_index();
    if (i >= n) return;
    float param = adamw_of(bf16_join(upper[i], lower[i]), grad[i], &m[i], &v[i], a);
    upper[i] = bf16_upper(param);
    lower[i] = bf16_lower(param);
}

__global__ void adamw_stochastic(uint16_t *w, const float *grad, float *m, float *v, size_t n,
                                 struct adamw_terms a) {
    size_t i = grid_index();
    if (i >= n) return;
    float param = adamw_of(bf16_widen(w[i]), grad[i], &m[i], &v[i], a);
    w[i] = bf16_stochastic(param, bf16_random(a.seed, a.first + i));
}

static void adamw(const struct kernels *k, void *param, uint16_t *rest, const float *grad, float *m, float *v,
                  size_t n, const struct kernels_adamw *a) {
    struct cuda *c = cuda_of(k);
    struct adamw_terms t = { a->lr, a->beta1, a->beta2, (float)(1.0 - (double)a->beta1),
                             (float)(1.0 - (double)a->beta2), 1.0f / a->m_correction, 1.0f / a->v_correction,
                             a->eps, 1.0f - a->lr * a->weight_decay, a->grad_scale, a->seed, a->first };
    unsigned blocks = cuda_blocks(n, CUDA_THREADS);
    if (!n) return;
    if (k->weight_bytes == sizeof(float))
        RUN(c, adamw_fp32, blocks, CUDA_THREADS, 0, (float *)param, grad, m, v, n, t);
    else if (rest)
        RUN(c, adamw_planes, blocks, CUDA_THREADS, 0, (uint16_t *)param, rest, grad, m, v, n, t);
    else
        RUN(c, adamw_stochastic, blocks, CUDA_THREADS, 0, (uint16_t *)param, grad, m, v, n, t);
}

/* ---- sums ---------------------------------------------------------------------------------------- */

template <class E> __global__ void add_branch(float *out, const float *a, const E *b, size_t n) {
    size_t i = grid_index();
    if (i < n) out[i] = a[i] + wide(b[i]);
}

static void add(const struct kernels *k, float *out, const float *a, const void *b, size_t n) {
    unsigned blocks = cuda_blocks(n, CUDA_THREADS);
    if (!n) return;
    WITH_TYPE(k, RUN(cuda_of(k), add_branch<E>, blocks, CUDA_THREADS, 0, out, a, (const E *)b, n));
}

static void accumulate(const struct kernels *k, float *x, const float *more, size_t n) {
    if (n) RUN(cuda_of(k), add_branch<float>, cuda_blocks(n, CUDA_THREADS), CUDA_THREADS, 0, x, x, more, n);
}

template <class E> __global__ void round_tensor(E *out, const float *x, size_t n) {
    size_t i = grid_index();
    if (i < n) put(&out[i], x[i]);
}

static void round(const struct kernels *k, void *out, const float *x, size_t n) {
    unsigned blocks = cuda_blocks(n, CUDA_THREADS);
    if (!n || out == (const void *)x) return;
    WITH_TYPE(k, RUN(cuda_of(k), round_tensor<E>, blocks, CUDA_THREADS, 0, (E *)out, x, n));
}

#define SUM_BLOCKS 512u

/* Each thread's elements are as far apart as the grid is wide, whatever the device. */
__global__ void squares(double *part, const float *x, size_t n) {
    __shared__ double parts[CUDA_WARP];
    double sum = 0.0;
    for (size_t i = grid_index(); i < n; i += (size_t)SUM_BLOCKS * CUDA_THREADS) sum += (double)x[i] * (double)x[i];
    sum = block_sum(sum, parts);
    if (threadIdx.x == 0) part[blockIdx.x] = sum;
}

static double sum_squares(const struct kernels *k, const float *x, size_t n) {
    struct cuda *c = cuda_of(k);
    double part[SUM_BLOCKS] = { 0 }, sum = 0.0;
    double *on_device = (double *)cuda_scratch(c, sizeof part);
    if (!on_device) return 0.0;
    RUN(c, squares, SUM_BLOCKS, CUDA_THREADS, 0, on_device, x, n);
    k->copy_out(k, part, on_device, sizeof part);
    for (unsigned i = 0; i < SUM_BLOCKS; i++) sum += part[i];
    return sum;
}

void cuda_fill_update(struct kernels *k) {
    k->weights_in = weights_in;
    k->weights_out = weights_out;
    k->adamw = adamw;
    k->add = add;
    k->accumulate = accumulate;
    k->round = round;
    k->sum_squares = sum_squares;
}
