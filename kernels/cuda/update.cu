/* update.cu - AdamW, sums of squares, the residual stream, and weights between the device and fp32 in host
 * memory. All of it is bound by memory. */
#include "kernels/cuda/cuda.h"

/* ---- weights ------------------------------------------------------------------------------------ */

__global__ void split(uint16_t *upper, uint16_t *lower, const float *x, size_t n) {
    by_groups<8>(n, aligned(upper, lower, x), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        float from[N];
        uint16_t up[N], low[N];
        take(from, x + i);
        UNROLL
        for (int j = 0; j < N; j++) {
            up[j] = lower ? bf16_upper(from[j]) : bf16_nearest(from[j]);
            low[j] = bf16_lower(from[j]);
        }
        give(upper + i, up);
        if (lower) give(lower + i, low);
    });
}

__global__ void join(float *x, const uint16_t *upper, const uint16_t *lower, size_t n) {
    by_groups<8>(n, aligned(x, upper, lower), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        float to[N];
        uint16_t up[N], low[N];
        take(up, upper + i);
        if (lower) take(low, lower + i);
        UNROLL
        for (int j = 0; j < N; j++) to[j] = lower ? bf16_join(up[j], low[j]) : bf16_widen(up[j]);
        give(x + i, to);
    });
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
        RUN(c, split, cuda_group_blocks(here, 8), CUDA_THREADS, 0, upper + at, rest ? rest + at : NULL, x,
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
        RUN(c, join, cuda_group_blocks(here, 8), CUDA_THREADS, 0, x, upper + at, rest ? rest + at : NULL,
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

/* p becomes what N parameters are afterwards. */
template <int N>
__device__ static void adamw_all(float (&p)[N], const float *grad, float *m, float *v,
                                 const struct adamw_terms &a) {
    float g[N], first[N], second[N];
    take(g, grad), take(first, m), take(second, v);
    UNROLL
    for (int j = 0; j < N; j++) p[j] = adamw_of(p[j], g[j], &first[j], &second[j], a);
    give(m, first), give(v, second);
}

__global__ void adamw_fp32(float *param, const float *grad, float *m, float *v, size_t n,
                           struct adamw_terms a) {
    by_groups<4>(n, aligned(param, grad, m, v), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        float p[N];
        take(p, param + i);
        adamw_all(p, grad + i, m + i, v + i, a);
        give(param + i, p);
    });
}

__global__ void adamw_planes(uint16_t *upper, uint16_t *lower, const float *grad, float *m, float *v,
                             size_t n, struct adamw_terms a) {
    by_groups<8>(n, aligned(upper, lower, grad, m, v), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        uint16_t up[N], low[N];
        float p[N];
        take(up, upper + i), take(low, lower + i);
        UNROLL
        for (int j = 0; j < N; j++) p[j] = bf16_join(up[j], low[j]);
        adamw_all(p, grad + i, m + i, v + i, a);
        UNROLL
        for (int j = 0; j < N; j++) up[j] = bf16_upper(p[j]), low[j] = bf16_lower(p[j]);
        give(upper + i, up), give(lower + i, low);
    });
}

__global__ void adamw_stochastic(uint16_t *w, const float *grad, float *m, float *v, size_t n,
                                 struct adamw_terms a) {
    by_groups<8>(n, aligned(w, grad, m, v), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        uint16_t narrow[N];
        float p[N];
        take_wide(p, w + i);
        adamw_all(p, grad + i, m + i, v + i, a);
        UNROLL
        for (int j = 0; j < N; j++)
            narrow[j] = bf16_stochastic(p[j], bf16_random(a.seed, a.first + i + (size_t)j));
        give(w + i, narrow);
    });
}

static void adamw(const struct kernels *k, void *param, uint16_t *rest, const float *grad, float *m, float *v,
                  size_t n, const struct kernels_adamw *a) {
    struct cuda *c = cuda_of(k);
    struct adamw_terms t = { a->lr, a->beta1, a->beta2, (float)(1.0 - (double)a->beta1),
                             (float)(1.0 - (double)a->beta2), 1.0f / a->m_correction, 1.0f / a->v_correction,
                             a->eps, 1.0f - a->lr * a->weight_decay, a->grad_scale, a->seed, a->first };
    unsigned blocks = cuda_group_blocks(n, k->weight_bytes == sizeof(float) ? 4 : 8);
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
    by_groups<GROUP(E)>(n, aligned(out, a, b), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        float sum[N], more[N];
        take(sum, a + i), take_wide(more, b + i);
        UNROLL
        for (int j = 0; j < N; j++) sum[j] += more[j];
        give(out + i, sum);
    });
}

static void add(const struct kernels *k, float *out, const float *a, const void *b, size_t n) {
    if (!n) return;
    WITH_TYPE(k, RUN(cuda_of(k), add_branch<E>, cuda_group_blocks(n, GROUP(E)), CUDA_THREADS, 0, out, a,
                     (const E *)b, n));
}

static void accumulate(const struct kernels *k, float *x, const float *more, size_t n) {
    if (n) RUN(cuda_of(k), add_branch<float>, cuda_group_blocks(n, 4), CUDA_THREADS, 0, x, x, more, n);
}

template <class E> __global__ void round_tensor(E *out, const float *x, size_t n) {
    by_groups<GROUP(E)>(n, aligned(out, x), [&](size_t i, auto group) {
        float from[decltype(group)::n];
        take(from, x + i);
        put_all(out + i, from);
    });
}

static void round(const struct kernels *k, void *out, const float *x, size_t n) {
    if (!n || out == (const void *)x) return;
    WITH_TYPE(
        k, RUN(cuda_of(k), round_tensor<E>, cuda_group_blocks(n, GROUP(E)), CUDA_THREADS, 0, (E *)out, x, n));
}

#define SUM_BLOCKS 512u

/* A thread's groups are as far apart as the grid is wide, whatever the device. */
__global__ void squares(double *part, const float *x, size_t n) {
    __shared__ double parts[CUDA_WARP];
    double sum = 0.0;
    for (size_t at = grid_index() * 4; at < n; at += (size_t)SUM_BLOCKS * CUDA_THREADS * 4)
        by_groups_at<4>(at, n, aligned(x), [&](size_t i, auto group) {
            const int N = decltype(group)::n;
            float from[N];
            take(from, x + i);
            UNROLL
            for (int j = 0; j < N; j++) sum += (double)from[j] * (double)from[j];
        });
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
