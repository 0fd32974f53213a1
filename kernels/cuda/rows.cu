/* rows.cu - kernels that treat each row by itself: embedding, RMSNorm, RoPE, SwiGLU, cross-entropy. */
#include "kernels/cuda/cuda.h"

/* ---- embedding ------------------------------------------------------------------------------------ */

template <class E>
__global__ void embed(float *out, const int32_t *tokens, const E *w, size_t n, int C) {
    size_t i = grid_index();
    if (i >= n) return;
    int token = tokens[i / C];
    out[i] = token == KERNELS_ELSEWHERE ? 0.0f : wide(w[(size_t)token * C + i % C]);
}

static void embedding_forward(const struct kernels *k, float *out, const int32_t *tokens, const void *w,
                              int rows, int C, int V) {
    size_t n = (size_t)rows * C;
    unsigned blocks = cuda_blocks(n, CUDA_THREADS);
    (void)V;
    WITH_TYPE(k, RUN(cuda_of(k), embed<E>, blocks, CUDA_THREADS, 0, out, tokens, (const E *)w, n, C));
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
            for (int c = (int)threadIdx.x; c < C; c += CUDA_THREADS)
                dw[(size_t)token * C + c] += dout[(size_t)(window + i) * C + c];
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
    size_t i = grid_index();
    if (i < n) out[i] = rest ? bf16_join((uint16_t)w[i], rest[i]) : wide(w[i]);
}

static void weights_widen(const struct kernels *k, float *out, const void *w, const uint16_t *rest, size_t n) {
    WITH_TYPE(k, RUN(cuda_of(k), widen<E>, cuda_blocks(n, CUDA_THREADS), CUDA_THREADS, 0, out, (const E *)w, rest, n));
}

template <class E>
__global__ void rmsnorm(E *out, float *rstd, const float *x, const float *w, float eps, int C) {
    __shared__ float parts[CUDA_WARP];
    size_t row = blockIdx.x;
    float sum = 0.0f;
    x += row * C;
    out += row * C;
    for (int c = (int)threadIdx.x; c < C; c += CUDA_THREADS) sum += x[c] * x[c];
    float scale = 1.0f / sqrtf(block_sum(sum, parts) / C + eps);
    for (int c = (int)threadIdx.x; c < C; c += CUDA_THREADS) put(&out[c], x[c] * scale * w[c]);
    if (threadIdx.x == 0) rstd[row] = scale;
}

static void rmsnorm_forward(const struct kernels *k, void *out, float *rstd, const float *x, const float *w,
                            float eps, int rows, int C) {
    WITH_TYPE(k, RUN(cuda_of(k), rmsnorm<E>, (unsigned)rows, CUDA_THREADS, 0, (E *)out, rstd, x, w, eps, C));
}

/* dx += rstd * (w*dout - n * mean(w*dout*n)), n = x*rstd */
template <class E>
__global__ void rmsnorm_gradient(float *dx, const E *dout, const float *x, const float *w, const float *rstd, int C) {
    __shared__ float parts[CUDA_WARP];
    size_t row = blockIdx.x;
    float scale = rstd[row], sum = 0.0f;
    dx += row * C;
    dout += row * C;
    x += row * C;
    for (int c = (int)threadIdx.x; c < C; c += CUDA_THREADS) sum += w[c] * wide(dout[c]) * x[c] * scale;
    float mean = block_sum(sum, parts) / C;
    for (int c = (int)threadIdx.x; c < C; c += CUDA_THREADS)
        dx[c] += scale * (w[c] * wide(dout[c]) - x[c] * scale * mean);
}


template <class E>
__global__ void norm_weight_parts(float *part, const E *dout, const float *x, const float *rstd, int rows, int each,
                                  int C) {
    int c = (int)grid_index(), begin = (int)blockIdx.y * each, end = begin + each < rows ? begin + each : rows;
    if (c >= C) return;
    float sum = 0.0f;
    for (int r = begin; r < end; r++) sum += wide(dout[(size_t)r * C + c]) * x[(size_t)r * C + c] * rstd[r];
    part[(size_t)blockIdx.y * C + c] = sum;
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
    WITH_TYPE(k, RUN(c, norm_weight_parts<E>, dim3(columns, (unsigned)slices), CUDA_THREADS, 0, part,
                     (const E *)dout, x, rstd, rows, each, C));
    RUN(c, add_parts, columns, CUDA_THREADS, 0, dw, part, slices, C);
}

/* ---- RoPE ------------------------------------------------------------------------------------------- */

/* A thread for each pair of the query and key heads of each row. */
template <class E>
__global__ void rotate(E *qkv, const float *cosine, const float *sine, const int32_t *start, size_t pairs, int T,
                       int H, int KV, int D, float direction) {
    size_t i = grid_index();
    int half = D / 2;
    if (i >= pairs) return;
    int d = (int)(i % half), head = (int)(i / half % (H + KV));
    size_t row = i / half / (H + KV), position = row % T - (start ? start[row] : 0);
    E *x = qkv + (row * (H + 2 * KV) + head) * D + d;
    float c = cosine[position * half + d], s = direction * sine[position * half + d], a = wide(x[0]),
          b = wide(x[half]);
    put(&x[0], a * c - b * s);
    put(&x[half], b * c + a * s);
}

static void turn(const struct kernels *k, void *qkv, const float *cosine, const float *sine, const int32_t *start,
                 int B, int T, int H, int KV, int D, float direction) {
    size_t pairs = (size_t)B * T * (H + KV) * (D / 2);
    WITH_TYPE(k, RUN(cuda_of(k), rotate<E>, cuda_blocks(pairs, CUDA_THREADS), CUDA_THREADS, 0, (E *)qkv, cosine,
                     sine, start, pairs, T, H, KV, D, direction));
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
    size_t i = grid_index();
    if (i >= n) return;
    size_t at = i / F * 2 * F + i % F;
    float gate = wide(gate_up[at]), up = wide(gate_up[at + F]);
    put(&out[i], gate / (1.0f + expf(-gate)) * up);
}

static void swiglu_forward(const struct kernels *k, void *out, const void *gate_up, int rows, int F) {
    size_t n = (size_t)rows * F;
    WITH_TYPE(k, RUN(cuda_of(k), swiglu<E>, cuda_blocks(n, CUDA_THREADS), CUDA_THREADS, 0, (E *)out,
                     (const E *)gate_up, n, F));
}

template <class E>
__global__ void swiglu_gradient(E *dgate_up, const E *dout, const E *gate_up, size_t n, int F) {
    size_t i = grid_index();
    if (i >= n) return;
    size_t at = i / F * 2 * F + i % F;
    float gate = wide(gate_up[at]), up = wide(gate_up[at + F]), sigmoid = 1.0f / (1.0f + expf(-gate)),
          d = wide(dout[i]);
    put(&dgate_up[at], d * up * sigmoid * (1.0f + gate * (1.0f - sigmoid)));
    put(&dgate_up[at + F], d * gate * sigmoid);
}

static void swiglu_backward(const struct kernels *k, void *dgate_up, const void *dout, const void *gate_up, int rows,
                            int F) {
    size_t n = (size_t)rows * F;
    WITH_TYPE(k, RUN(cuda_of(k), swiglu_gradient<E>, cuda_blocks(n, CUDA_THREADS), CUDA_THREADS, 0, (E *)dgate_up,
                     (const E *)dout, (const E *)gate_up, n, F));
}

/* ---- cross-entropy ------------------------------------------------------------------------------------ */

/* What one pass over a row finds: the largest logit, where it comes first, the sum of exponentials below it. */
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
    for (int v = (int)threadIdx.x; v < V; v += CUDA_THREADS) {
        float x = logits[v];
        if (x > p.max) {
            p.sum = p.sum * expf(p.max - x) + 1.0f;
            p.max = x;
            p.at = v;
        } else {
            p.sum += x == -INFINITY ? 0.0f : expf(x - p.max);
        }
    }
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
    for (int v = (int)threadIdx.x; dlogits && v < V; v += CUDA_THREADS) {
        float d = expf(logits[v] - p.max) * unit * pull;
        if (v == target) d -= 1.0f;
        if (v == p.at) d += peak;
        put(&dlogits[v], d * how.grad_scale);
    }
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
    WITH_TYPE(k, RUN(cuda_of(k), entropy<E>, (unsigned)rows, CUDA_THREADS, 0, loss, penalty, (E *)dlogits, logits,
                     targets, *how, V));
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
__global__ void part_entropy(float *loss, float *penalty, E *dlogits, const float *logits, const int32_t *targets,
                             const struct kernels_part *part, int own, int parts, struct kernels_loss how, int V) {
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

static void vocabulary_loss(const struct kernels *k, float *loss, float *penalty, void *dlogits, float *logits,
                            const int32_t *targets, const struct kernels_part *part, int own, int parts,
                            const struct kernels_loss *how, int rows, int V) {
    WITH_TYPE(k, RUN(cuda_of(k), part_entropy<E>, (unsigned)rows, CUDA_THREADS, 0, loss, penalty, (E *)dlogits,
                     logits, targets, part, own, parts, *how, V));
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
