/* rows.cu - kernels that treat each row by itself: embedding, RMSNorm, RoPE, SwiGLU, cross-entropy. */
#include "kernels/cuda/cuda.h"

/* ---- embedding ------------------------------------------------------------------------------------ */

template <class E>
__global__ void embed(float *out, const int32_t *tokens, const E *w, size_t n, int C) {
    by_groups<GROUP(E)>(n, C % GROUP(E) == 0 && aligned(out, w), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        int token = tokens[i / C];
        float to[N] = {};
        if (token != KERNELS_ELSEWHERE) take_wide(to, w + (size_t)token * C + i % C);
        give(out + i, to);
    });
}

static void embedding_forward(const struct kernels *k, float *out, const int32_t *tokens, const void *w,
                              int rows, int C, int V) {
    size_t n = (size_t)rows * C;
    (void)V;
    WITH_TYPE(k, RUN(cuda_of(k), embed<E>, cuda_group_blocks(n, GROUP(E)), CUDA_THREADS, 0, out, tokens,
                     (const E *)w, n, C));
}

template <int N> __device__ static void add_to(float *to, const float *from, group<N>) {
    float sum[N], more[N];
    take(sum, to), take(more, from);
    UNROLL
    for (int j = 0; j < N; j++) sum[j] += more[j];
    give(to, sum);
}

/* A block for each row; that of a token's first row adds all of them, in order. Comparing every row with
 * every other is a thousandth of the products' work, and needs no sorting. */
__global__ void embed_gradient(float *dw, const float *dout, const int32_t *tokens, int rows, int C) {
    __shared__ int found[CUDA_THREADS]; /* one flag a row of the window */
    int own = (int)blockIdx.x, token = tokens[own], earlier = token == KERNELS_ELSEWHERE;
    for (int r = (int)threadIdx.x; r < own; r += CUDA_THREADS) earlier |= tokens[r] == token;
    if (__syncthreads_or(earlier)) return;
    for (int window = own; window < rows; window += CUDA_THREADS) {
        int r = window + (int)threadIdx.x;
        found[threadIdx.x] = r < rows && tokens[r] == token;
        __syncthreads();
        for (int i = 0; i < CUDA_THREADS && window + i < rows; i++) {
            if (!found[i]) continue;
            float *to = dw + (size_t)token * C;
            const float *from = dout + (size_t)(window + i) * C;
            row_by_groups<4>(C, aligned(to, from),
                             [&](size_t c, auto group) { add_to(to + c, from + c, group); });
        }
        __syncthreads();
    }
}

static void embedding_backward(const struct kernels *k, float *dw, const float *dout, const int32_t *tokens,
                               int rows, int C, int V) {
    (void)V;
    RUN(cuda_of(k), embed_gradient, (unsigned)rows, CUDA_THREADS, 0, dw, dout, tokens, rows, C);
}

/* ---- RMSNorm --------------------------------------------------------------------------------------- */

template <class E> __global__ void widen(float *out, const E *w, const uint16_t *rest, size_t n) {
    by_groups<GROUP(E)>(n, aligned(out, w, rest), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        E upper[N];
        uint16_t lower[N];
        float to[N];
        take(upper, w + i);
        if (rest) take(lower, rest + i);
        UNROLL
        for (int j = 0; j < N; j++) to[j] = rest ? bf16_join((uint16_t)upper[j], lower[j]) : wide(upper[j]);
        give(out + i, to);
    });
}

static void weights_widen(const struct kernels *k, float *out, const void *w, const uint16_t *rest,
                          size_t n) {
    WITH_TYPE(k, RUN(cuda_of(k), widen<E>, cuda_group_blocks(n, GROUP(E)), CUDA_THREADS, 0, out, (const E *)w,
                     rest, n));
}

template <class E>
__global__ void rmsnorm(E *out, float *rstd, const float *x, const float *w, float eps, int C) {
    __shared__ float parts[CUDA_WARP];
    size_t row = blockIdx.x;
    float sum = 0.0f;
    x += row * C;
    out += row * C;
    row_by_groups<GROUP(E)>(C, aligned(x), [&](size_t c, auto group) {
        const int N = decltype(group)::n;
        float from[N];
        take(from, x + c);
        UNROLL
        for (int j = 0; j < N; j++) sum += from[j] * from[j];
    });
    float scale = 1.0f / sqrtf(block_sum(sum, parts) / C + eps);
    row_by_groups<GROUP(E)>(C, aligned(out, x, w), [&](size_t c, auto group) {
        const int N = decltype(group)::n;
        float from[N], by[N];
        take(from, x + c), take(by, w + c);
        UNROLL
        for (int j = 0; j < N; j++) from[j] = from[j] * scale * by[j];
        put_all(out + c, from);
    });
    if (threadIdx.x == 0) rstd[row] = scale;
}

static void rmsnorm_forward(const struct kernels *k, void *out, float *rstd, const float *x, const float *w,
                            float eps, int rows, int C) {
    WITH_TYPE(k, RUN(cuda_of(k), rmsnorm<E>, (unsigned)rows, CUDA_THREADS, 0, (E *)out, rstd, x, w, eps, C));
}

/* dx += rstd * (w*dout - n * mean(w*dout*n)), n = x*rstd */
template <class E>
__global__ void rmsnorm_gradient(float *dx, const E *dout, const float *x, const float *w, const float *rstd,
                                 int C) {
    __shared__ float parts[CUDA_WARP];
    size_t row = blockIdx.x;
    float scale = rstd[row], sum = 0.0f;
    dx += row * C;
    dout += row * C;
    x += row * C;
    row_by_groups<GROUP(E)>(C, aligned(dout, x, w), [&](size_t c, auto group) {
        const int N = decltype(group)::n;
        float d[N], from[N], by[N];
        take_wide(d, dout + c), take(from, x + c), take(by, w + c);
        UNROLL
        for (int j = 0; j < N; j++) sum += by[j] * d[j] * from[j] * scale;
    });
    float mean = block_sum(sum, parts) / C;
    row_by_groups<GROUP(E)>(C, aligned(dx, dout, x, w), [&](size_t c, auto group) {
        const int N = decltype(group)::n;
        float d[N], from[N], by[N], to[N];
        take_wide(d, dout + c), take(from, x + c), take(by, w + c), take(to, dx + c);
        UNROLL
        for (int j = 0; j < N; j++) to[j] += scale * (by[j] * d[j] - from[j] * scale * mean);
        give(dx + c, to);
    });
}

template <class E>
__global__ void norm_weight_parts(float *part, const E *dout, const float *x, const float *rstd, int rows,
                                  int each, int C) {
    int begin = (int)blockIdx.y * each, end = begin + each < rows ? begin + each : rows;
    by_groups<GROUP(E)>((size_t)C, C % GROUP(E) == 0 && aligned(part, dout, x), [&](size_t c, auto group) {
        const int N = decltype(group)::n;
        float sum[N] = {}, d[N], from[N];
        for (int r = begin; r < end; r++) {
            take_wide(d, dout + (size_t)r * C + c), take(from, x + (size_t)r * C + c);
            UNROLL
            for (int j = 0; j < N; j++) sum[j] += d[j] * from[j] * rstd[r];
        }
        give(part + (size_t)blockIdx.y * C + c, sum);
    });
}

__global__ void add_parts(float *dw, const float *part, int slices, int C) {
    int c = (int)grid_index();
    if (c >= C) return;
    float sum = 0.0f;
    for (int s = 0; s < slices; s++) sum += part[(size_t)s * C + c];
    dw[c] += sum;
}

static void rmsnorm_backward(const struct kernels *k, float *dx, float *dw, const void *dout, const float *x,
                             const float *w, const float *rstd, int rows, int C) {
    struct cuda *c = cuda_of(k);
    int each = (rows + CUDA_NORM_SLICES - 1) / CUDA_NORM_SLICES, slices = (rows + each - 1) / each;
    float *part = (float *)cuda_scratch(c, (size_t)slices * C * sizeof *part);
    unsigned columns = cuda_blocks((size_t)C, CUDA_THREADS);
    if (!part) return;
    WITH_TYPE(k, RUN(c, rmsnorm_gradient<E>, (unsigned)rows, CUDA_THREADS, 0, dx, (const E *)dout, x, w, rstd,
                     C));
    WITH_TYPE(k, RUN(c, norm_weight_parts<E>, dim3(cuda_group_blocks((size_t)C, GROUP(E)), (unsigned)slices),
                     CUDA_THREADS, 0, part, (const E *)dout, x, rstd, rows, each, C));
    RUN(c, add_parts, columns, CUDA_THREADS, 0, dw, part, slices, C);
}

/* ---- RoPE ------------------------------------------------------------------------------------------- */

/* Pairs of the query and key heads of each row. */
template <class E>
__global__ void rotate(E *qkv, const float *cosine, const float *sine, const int32_t *start, size_t pairs,
                       int T, int H, int KV, int D, float direction) {
    int half = D / 2;
    by_groups<GROUP(E)>(pairs, half % GROUP(E) == 0 && aligned(qkv, cosine, sine), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        int d = (int)(i % half), head = (int)(i / half % (H + KV));
        size_t row = i / half / (H + KV), position = row % T - (start ? start[row] : 0);
        E *x = qkv + (row * (H + 2 * KV) + head) * D + d;
        float c[N], s[N], a[N], b[N];
        take(c, cosine + position * half + d), take(s, sine + position * half + d);
        take_wide(a, x), take_wide(b, x + half);
        UNROLL
        for (int j = 0; j < N; j++) {
            float sin = direction * s[j], first = a[j];
            a[j] = first * c[j] - b[j] * sin;
            b[j] = b[j] * c[j] + first * sin;
        }
        put_all(x, a), put_all(x + half, b);
    });
}

static void turn(const struct kernels *k, void *qkv, const float *cosine, const float *sine,
                 const int32_t *start, int B, int T, int H, int KV, int D, float direction) {
    size_t pairs = (size_t)B * T * (H + KV) * (D / 2);
    WITH_TYPE(k, RUN(cuda_of(k), rotate<E>, cuda_group_blocks(pairs, GROUP(E)), CUDA_THREADS, 0, (E *)qkv,
                     cosine, sine, start, pairs, T, H, KV, D, direction));
}

static void rope_forward(const struct kernels *k, void *qkv, const float *cosine, const float *sine,
                         const int32_t *start, int B, int T, int H, int KV, int D) {
    turn(k, qkv, cosine, sine, start, B, T, H, KV, D, 1.0f);
}

static void rope_backward(const struct kernels *k, void *dqkv, const float *cosine, const float *sine,
                          const int32_t *start, int B, int T, int H, int KV, int D) {
    turn(k, dqkv, cosine, sine, start, B, T, H, KV, D, -1.0f);
}

/* ---- SwiGLU ------------------------------------------------------------------------------------------ */

template <class E> __global__ void swiglu(E *out, const E *gate_up, size_t n, int F) {
    by_groups<GROUP(E)>(n, F % GROUP(E) == 0 && aligned(out, gate_up), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        size_t at = i / F * 2 * F + i % F;
        float gate[N], up[N];
        take_wide(gate, gate_up + at), take_wide(up, gate_up + at + F);
        UNROLL
        for (int j = 0; j < N; j++) up[j] = gate[j] / (1.0f + expf(-gate[j])) * up[j];
        put_all(out + i, up);
    });
}

static void swiglu_forward(const struct kernels *k, void *out, const void *gate_up, int rows, int F) {
    size_t n = (size_t)rows * F;
    WITH_TYPE(k, RUN(cuda_of(k), swiglu<E>, cuda_group_blocks(n, GROUP(E)), CUDA_THREADS, 0, (E *)out,
                     (const E *)gate_up, n, F));
}

template <class E>
__global__ void swiglu_gradient(E *dgate_up, const E *dout, const E *gate_up, size_t n, int F) {
    by_groups<GROUP(E)>(n, F % GROUP(E) == 0 && aligned(dgate_up, dout, gate_up), [&](size_t i, auto group) {
        const int N = decltype(group)::n;
        size_t at = i / F * 2 * F + i % F;
        float gate[N], up[N], d[N];
        take_wide(gate, gate_up + at), take_wide(up, gate_up + at + F), take_wide(d, dout + i);
        UNROLL
        for (int j = 0; j < N; j++) {
            float sigmoid = 1.0f / (1.0f + expf(-gate[j])), to_up = d[j] * gate[j] * sigmoid;
            gate[j] = d[j] * up[j] * sigmoid * (1.0f + gate[j] * (1.0f - sigmoid));
            up[j] = to_up;
        }
        put_all(dgate_up + at, gate), put_all(dgate_up + at + F, up);
    });
}

static void swiglu_backward(const struct kernels *k, void *dgate_up, const void *dout, const void *gate_up,
                            int rows, int F) {
    size_t n = (size_t)rows * F;
    WITH_TYPE(k, RUN(cuda_of(k), swiglu_gradient<E>, cuda_group_blocks(n, GROUP(E)), CUDA_THREADS, 0,
                     (E *)dgate_up, (const E *)dout, (const E *)gate_up, n, F));
}

/* ---- cross-entropy ------------------------------------------------------------------------------------ */

/* What one pass over a row finds: the largest logit, where it comes first, the sum of exponentials below. */
struct peak {
    float max, sum;
    int at;
};

__device__ static struct peak merge(struct peak a, struct peak b) {
    bool second = b.max > a.max || (b.max == a.max && b.at < a.at);
    struct peak p = second ? b : a, q = second ? a : b;
    /* Of a part without any logit the sum is 0, and exp(-inf - max) too. */
    p.sum += q.sum == 0.0f ? 0.0f : q.sum * expf(q.max - p.max);
    return p;
}

__device__ static struct peak shuffled(struct peak p, int step) {
    struct peak q;
    q.max = __shfl_xor_sync(0xffffffffu, p.max, step);
    q.sum = __shfl_xor_sync(0xffffffffu, p.sum, step);
    q.at = __shfl_xor_sync(0xffffffffu, p.at, step);
    return q;
}

/* Of a NaN the sum is NaN: it is larger than nothing and exp() of it is NaN. */
__device__ static struct peak peak_of(const float *logits, int V) {
    struct peak p = { -INFINITY, 0.0f, V };
    row_by_groups<4>(V, aligned(logits), [&](size_t v, auto group) {
        const int N = decltype(group)::n;
        float x[N];
        take(x, logits + v);
        UNROLL
        for (int j = 0; j < N; j++)
            if (x[j] > p.max) {
                p.sum = p.sum * expf(p.max - x[j]) + 1.0f;
                p.max = x[j];
                p.at = (int)v + j;
            } else {
                p.sum += x[j] == -INFINITY ? 0.0f : expf(x[j] - p.max);
            }
    });
    return p;
}

/* The same for all threads of the block. */
__device__ static struct peak block_peak(const float *logits, int V) {
    __shared__ struct peak parts[CUDA_THREADS / CUDA_WARP];
    struct peak p = peak_of(logits, V);
    for (int step = CUDA_WARP / 2; step; step /= 2) p = merge(p, shuffled(p, step));
    if (threadIdx.x % CUDA_WARP == 0) parts[threadIdx.x / CUDA_WARP] = p;
    __syncthreads();
    p = parts[0];
    for (int i = 1; i < CUDA_THREADS / CUDA_WARP; i++) p = merge(p, parts[i]);
    return p;
}

template <class E> __device__ static void clear_row(E *dlogits, int V) {
    for (int v = (int)threadIdx.x; dlogits && v < V; v += CUDA_THREADS) put(&dlogits[v], 0.0f);
}

/* Loss and gradient of a row: all of it, or a rank's part. p: of the whole row, `at` counted in this part (or
 * outside of it). dlogits may be logits, or NULL. */
template <class E>
__device__ static void finish_row(float *loss, float *penalty, E *dlogits, const float *logits, struct peak p,
                                  int target, float at_target, struct kernels_loss how, int V) {
    float below = logf(p.sum), lse = below + p.max;
    if (threadIdx.x == 0) {
        *loss = below + (p.max - at_target);
        *penalty = how.z * lse * lse + how.max_z * p.max * p.max;
    }
    float unit = 1.0f / p.sum, pull = 1.0f + 2.0f * how.z * lse, peak = 2.0f * how.max_z * p.max;
    if (!dlogits) return;
    row_by_groups<GROUP(E)>(V, aligned(dlogits, logits), [&](size_t v, auto group) {
        const int N = decltype(group)::n;
        float d[N];
        take(d, logits + v);
        UNROLL
        for (int j = 0; j < N; j++) {
            d[j] = expf(d[j] - p.max) * unit * pull;
            if ((int)v + j == target) d[j] -= 1.0f;
            if ((int)v + j == p.at) d[j] += peak;
            d[j] *= how.grad_scale;
        }
        put_all(dlogits + v, d);
    });
}

template <class E>
__global__ void entropy(float *loss, float *penalty, E *dlogits, const float *logits, const int32_t *targets,
                        struct kernels_loss how, int V) {
    size_t row = blockIdx.x;
    int target = targets[row];
    logits += row * V;
    if (dlogits) dlogits += row * V;
    if (target < 0) {
        clear_row(dlogits, V);
        if (threadIdx.x == 0) loss[row] = penalty[row] = 0.0f;
        return;
    }
    float at_target = logits[target];
    struct peak p = block_peak(logits, V); /* nobody writes before all have read */
    finish_row(&loss[row], &penalty[row], dlogits, logits, p, target, at_target, how, V);
}

static void cross_entropy(const struct kernels *k, float *loss, float *penalty, void *dlogits, float *logits,
                          const int32_t *targets, const struct kernels_loss *how, int rows, int V) {
    WITH_TYPE(k, RUN(cuda_of(k), entropy<E>, (unsigned)rows, CUDA_THREADS, 0, loss, penalty, (E *)dlogits,
                     logits, targets, *how, V));
}

__global__ void part_of_row(struct kernels_part *part, const float *logits, const int32_t *targets, int V) {
    size_t row = blockIdx.x;
    int target = targets[row];
    logits += row * V;
    struct peak p = block_peak(logits, V);
    struct kernels_part found = { p.max, p.sum, target >= 0 ? logits[target] : -INFINITY, (float)p.at };
    if (threadIdx.x == 0) part[row] = found;
}

static void vocabulary_part(const struct kernels *k, struct kernels_part *part, const float *logits,
                            const int32_t *targets, int rows, int V) {
    RUN(cuda_of(k), part_of_row, (unsigned)rows, CUDA_THREADS, 0, part, logits, targets, V);
}

template <class E>
__global__ void part_entropy(float *loss, float *penalty, E *dlogits, const float *logits,
                             const int32_t *targets, const struct kernels_part *part, int own, int parts,
                             struct kernels_loss how, int V) {
    size_t row = blockIdx.x, rows = gridDim.x;
    logits += row * V;
    if (dlogits) dlogits += row * V;
    if (targets[row] == -1) {
        clear_row(dlogits, V);
        if (threadIdx.x == 0) loss[row] = penalty[row] = 0.0f;
        return;
    }
    struct peak p = { -INFINITY, 0.0f, 0 }; /* at: the part that has the largest logit first */
    float at_target = -INFINITY;
    for (int i = 0; i < parts; i++) {
        struct kernels_part x = part[i * rows + row];
        struct peak q = { x.max, x.sum, i };
        p = i ? merge(p, q) : q;
        at_target = fmaxf(at_target, x.target);
    }
    p.at = p.at == own ? (int)part[own * rows + row].largest : -1;
    finish_row(&loss[row], &penalty[row], dlogits, logits, p, targets[row], at_target, how, V);
}

static void vocabulary_loss(const struct kernels *k, float *loss, float *penalty, void *dlogits,
                            float *logits, const int32_t *targets, const struct kernels_part *part, int own,
                            int parts, const struct kernels_loss *how, int rows, int V) {
    WITH_TYPE(k, RUN(cuda_of(k), part_entropy<E>, (unsigned)rows, CUDA_THREADS, 0, loss, penalty,
                     (E *)dlogits, logits, targets, part, own, parts, *how, V));
}

void cuda_fill_rows(struct kernels *k) {
    k->embedding_forward = embedding_forward;
    k->embedding_backward = embedding_backward;
    k->weights_widen = weights_widen;
    k->rmsnorm_forward = rmsnorm_forward;
    k->rmsnorm_backward = rmsnorm_backward;
    k->rope_forward = rope_forward;
    k->rope_backward = rope_backward;
    k->swiglu_forward = swiglu_forward;
    k->swiglu_backward = swiglu_backward;
    k->cross_entropy = cross_entropy;
    k->vocabulary_part = vocabulary_part;
    k->vocabulary_loss = vocabulary_loss;
}
