/* attention.cu - causal grouped-query attention in tiles that stay on the chip, FlashAttention
 * (arXiv:2205.14135), computed in fp32 without tensor cores: the fallback and the check of faster ones.
 *
 * Forward: a block has TILE queries of one head and walks over the keys that they see. Backward: one kernel
 * for dq, block by block as forward, and one for dk and dv, whose blocks have TILE keys of one key/value head
 * and walk over the queries of all heads that read it. Scores are computed twice; nothing is added by two
 * blocks, so there are no atomics.
 *
 * Where cuDNN is, bf16 and one document a sequence, it computes instead: sdpa.h. Documents are these kernels'
 * still.
 *
 * A tile's rows are shared by PARTS neighbouring threads of one warp: each has every PARTS-th key of a row's
 * scores and every PARTS-th column of a row's output, COLUMNS of them, in registers: 4 threads up to heads of
 * 128, 8 above, so that nothing spills. */
#include "kernels/cuda/attention.h"

#define TILE 32
#define HEAD_MAX 256

/* TILE rows of D floats from the row `first` of `x` on, rows of which are `apart` floats apart, into shared
 * memory with rows D + 1 apart (so that a column lies in different banks); zeroes after row `rows`. */
template <class E>
__device__ static void load_tile(float *tile, const E *x, size_t apart, int first, int rows, int D) {
    for (int i = (int)threadIdx.x; i < TILE * D; i += (int)blockDim.x) {
        int r = i / D, d = i % D;
        tile[r * (D + 1) + d] = first + r < rows ? wide(x[(size_t)(first + r) * apart + d]) : 0.0f;
    }
}

__device__ static float dot(const float *a, const float *b, int D) {
    float sum = 0.0f;
    for (int d = 0; d < D; d++) sum += a[d] * b[d];
    return sum;
}

/* A thread's columns of a row: every PARTS-th of D, from `part` on. */
template <int COLUMNS> __device__ static void clear(float (&acc)[COLUMNS]) {
    UNROLL
    for (int i = 0; i < COLUMNS; i++) acc[i] = 0.0f;
}

template <int PARTS, int COLUMNS>
__device__ static void add_row(float (&acc)[COLUMNS], float factor, const float *row, int part, int D) {
    UNROLL
    for (int i = 0; i < COLUMNS; i++)
        if (i * PARTS + part < D) acc[i] += factor * row[i * PARTS + part];
}

template <int PARTS, class E, int COLUMNS>
__device__ static void store_row(E *to, const float (&acc)[COLUMNS], float factor, int part, int D) {
    UNROLL
    for (int i = 0; i < COLUMNS; i++)
        if (i * PARTS + part < D) put(&to[i * PARTS + part], acc[i] * factor);
}

/* ---- forward ---------------------------------------------------------------------------------------- */

/* COLUMNS: at least D / PARTS. */
template <class E, int COLUMNS, int PARTS>
__global__ void __launch_bounds__(TILE *PARTS, 1)
attend(E *out, float *lse, const E *qkv, struct attention a) {
    SHARED_MEMORY(memory);
    int D = a.D, first = (int)blockIdx.x * TILE, h = (int)blockIdx.y, b = (int)blockIdx.z,
        kv = h / (a.H / a.KV);
    int row = (int)threadIdx.x / PARTS, part = (int)threadIdx.x % PARTS, t = first + row;
    float *q = (float *)memory, *key = q + TILE * (D + 1), *value = key + TILE * (D + 1),
          *p = value + TILE * (D + 1);
    const E *rows = qkv + (size_t)b * a.T * row_elements(a);
    float sum = 0.0f, max = -INFINITY, acc[COLUMNS];
    clear(acc);
    load_tile(q, rows + query_at(a, h), row_elements(a), first, a.T, D);
    int begin = document_of(a, b, t), last = first + TILE < a.T ? first + TILE : a.T;
    for (int k0 = document_of(a, b, first) / TILE * TILE; k0 < last; k0 += TILE) {
        __syncthreads(); /* the tile before is done with */
        load_tile(key, rows + key_at(a, kv), row_elements(a), k0, a.T, D);
        load_tile(value, rows + value_at(a, kv), row_elements(a), k0, a.T, D);
        __syncthreads();
        float score[TILE / PARTS], most = -INFINITY, here = 0.0f;
        for (int j = 0; j < TILE / PARTS; j++) {
            int u = k0 + j * PARTS + part;
            score[j] = u < begin || u > t
                           ? -INFINITY
                           : a.scale * dot(q + row * (D + 1), key + (j * PARTS + part) * (D + 1), D);
            most = fmaxf(most, score[j]);
        }
        most = fmaxf(max, lanes_max<PARTS>(most));
        /* A row of another document may have seen no key yet. */
        float keep = most == -INFINITY ? 1.0f : expf(max - most);
        for (int j = 0; j < TILE / PARTS; j++) {
            float e = score[j] == -INFINITY ? 0.0f : expf(score[j] - most);
            here += e;
            p[row * (TILE + 1) + j * PARTS + part] = e;
        }
        sum = sum * keep + lanes_sum<PARTS>(here);
        max = most;
        __syncwarp(); /* the row's p is there */
        UNROLL
        for (int i = 0; i < COLUMNS; i++) acc[i] *= keep;
        for (int u = 0; u < TILE; u++)
            add_row<PARTS>(acc, p[row * (TILE + 1) + u], value + u * (D + 1), part, D);
    }
    if (t >= a.T) return;
    store_row<PARTS>(out + (((size_t)b * a.T + t) * a.H + h) * D, acc, 1.0f / sum, part, D);
    if (part == 0) lse[((size_t)b * a.H + h) * a.T + t] = max + logf(sum);
}

/* ---- backward --------------------------------------------------------------------------------------- */

/* delta = dout . out, of each row and head. A warp each. */
template <class E>
__global__ void attention_delta(float *delta, const E *dout, const E *out, size_t heads, int T, int H,
                                int D) {
    size_t i = grid_index() / CUDA_WARP; /* [B,T,H] */
    if (i >= heads) return;
    float sum = 0.0f;
    for (int d = (int)threadIdx.x % CUDA_WARP; d < D; d += CUDA_WARP)
        sum += wide(dout[i * D + d]) * wide(out[i * D + d]);
    sum = warp_sum(sum);
    size_t b = i / H / T, t = i / H % T, h = i % H;
    if (threadIdx.x % CUDA_WARP == 0) delta[(b * H + h) * T + t] = sum;
}

/* With p = exp(score - lse): dscore = p * (dout.value - delta) * scale; dq = sum of dscore * key. */
template <class E, int COLUMNS, int PARTS>
__global__ void __launch_bounds__(TILE *PARTS, 1)
query_gradient(E *dqkv, const E *dout, const E *qkv, const float *lse, const float *delta,
               struct attention a) {
    SHARED_MEMORY(memory);
    int D = a.D, first = (int)blockIdx.x * TILE, h = (int)blockIdx.y, b = (int)blockIdx.z,
        kv = h / (a.H / a.KV);
    int row = (int)threadIdx.x / PARTS, part = (int)threadIdx.x % PARTS, t = first + row;
    float *q = (float *)memory, *key = q + TILE * (D + 1), *value = key + TILE * (D + 1),
          *grad = value + TILE * (D + 1), *ds = grad + TILE * (D + 1);
    const E *rows = qkv + (size_t)b * a.T * row_elements(a);
    size_t at = ((size_t)b * a.H + h) * a.T + t;
    float acc[COLUMNS], row_lse = t < a.T ? lse[at] : 0.0f, row_delta = t < a.T ? delta[at] : 0.0f;
    clear(acc);
    load_tile(q, rows + query_at(a, h), row_elements(a), first, a.T, D);
    load_tile(grad, dout + ((size_t)b * a.T * a.H + h) * D, (size_t)a.H * D, first, a.T, D);
    int begin = document_of(a, b, t), last = first + TILE < a.T ? first + TILE : a.T;
    for (int k0 = document_of(a, b, first) / TILE * TILE; k0 < last; k0 += TILE) {
        __syncthreads();
        load_tile(key, rows + key_at(a, kv), row_elements(a), k0, a.T, D);
        load_tile(value, rows + value_at(a, kv), row_elements(a), k0, a.T, D);
        __syncthreads();
        for (int j = 0; j < TILE / PARTS; j++) {
            int n = j * PARTS + part, u = k0 + n;
            float d = 0.0f;
            if (u >= begin && u <= t && t < a.T) {
                float p = expf(a.scale * dot(q + row * (D + 1), key + n * (D + 1), D) - row_lse);
                d = p * (dot(grad + row * (D + 1), value + n * (D + 1), D) - row_delta) * a.scale;
            }
            ds[row * (TILE + 1) + n] = d;
        }
        __syncwarp();
        for (int u = 0; u < TILE; u++)
            add_row<PARTS>(acc, ds[row * (TILE + 1) + u], key + u * (D + 1), part, D);
    }
    if (t >= a.T) return;
    store_row<PARTS>(dqkv + ((size_t)b * a.T + t) * row_elements(a) + query_at(a, h), acc, 1.0f, part, D);
}

/* Of one key tile and the heads h of its group: dv = sum of p * dout, dk = sum of dscore * q, in the order of
 * heads and queries. A thread's row is a key here. */
template <class E, int COLUMNS, int PARTS>
__global__ void __launch_bounds__(TILE *PARTS, 1)
key_gradient(E *dqkv, const E *dout, const E *qkv, const float *lse, const float *delta,
             struct attention a) {
    SHARED_MEMORY(memory);
    int D = a.D, first = (int)blockIdx.x * TILE, kv = (int)blockIdx.y, b = (int)blockIdx.z,
        group = a.H / a.KV;
    int row = (int)threadIdx.x / PARTS, part = (int)threadIdx.x % PARTS, u = first + row;
    float *q = (float *)memory, *key = q + TILE * (D + 1), *value = key + TILE * (D + 1),
          *grad = value + TILE * (D + 1), *ds = grad + TILE * (D + 1), *ps = ds + TILE * (TILE + 1);
    const E *rows = qkv + (size_t)b * a.T * row_elements(a);
    float dk[COLUMNS], dv[COLUMNS];
    clear(dk);
    clear(dv);
    load_tile(key, rows + key_at(a, kv), row_elements(a), first, a.T, D);
    load_tile(value, rows + value_at(a, kv), row_elements(a), first, a.T, D);
    for (int step = 0; step < group; step++) {
        int h = kv * group + step;
        const float *head_lse = lse + ((size_t)b * a.H + h) * a.T,
                    *head_delta = delta + ((size_t)b * a.H + h) * a.T;
        for (int q0 = first; q0 < a.T; q0 += TILE) { /* queries before the tile see none of its keys */
            if (document_of(a, b, q0) >= first + TILE) break; /* and later documents neither */
            __syncthreads();
            load_tile(q, rows + query_at(a, h), row_elements(a), q0, a.T, D);
            load_tile(grad, dout + ((size_t)b * a.T * a.H + h) * D, (size_t)a.H * D, q0, a.T, D);
            __syncthreads();
            for (int j = 0; j < TILE / PARTS; j++) {
                int n = j * PARTS + part, t = q0 + n;
                float p = 0.0f, d = 0.0f;
                if (t < a.T && u <= t && u >= document_of(a, b, t)) {
                    p = expf(a.scale * dot(q + n * (D + 1), key + row * (D + 1), D) - head_lse[t]);
                    d = p * (dot(grad + n * (D + 1), value + row * (D + 1), D) - head_delta[t]) * a.scale;
                }
                ps[row * (TILE + 1) + n] = p;
                ds[row * (TILE + 1) + n] = d;
            }
            __syncwarp();
            for (int n = 0; n < TILE; n++) {
                add_row<PARTS>(dv, ps[row * (TILE + 1) + n], grad + n * (D + 1), part, D);
                add_row<PARTS>(dk, ds[row * (TILE + 1) + n], q + n * (D + 1), part, D);
            }
        }
    }
    if (u >= a.T) return;
    E *to = dqkv + ((size_t)b * a.T + u) * row_elements(a);
    store_row<PARTS>(to + key_at(a, kv), dk, 1.0f, part, D);
    store_row<PARTS>(to + value_at(a, kv), dv, 1.0f, part, D);
}

/* ---- entries ------------------------------------------------------------------------------------------ */

/* Shared memory of `tiles` tiles of rows and `squares` of scores. */
static size_t shared_bytes(int tiles, int squares, int D) {
    return ((size_t)tiles * TILE * (D + 1) + (size_t)squares * TILE * (TILE + 1)) * sizeof(float);
}

static int refuse_head(struct cuda *c, int D) {
    if (D <= HEAD_MAX) return 0;
    if (c->failure.code == ERR_NONE)
        err_set(&c->failure, ERR_UNSUPPORTED, "a head of %d values; the CUDA backend has %d at most", D,
                HEAD_MAX);
    return -1;
}

static struct attention shape_of(const int32_t *start, int T, int H, int KV, int D) {
    struct attention a = { T, H, KV, D, 1.0f / sqrtf((float)D), start };
    return a;
}

template <class E, int COLUMNS, int PARTS>
static void forward(struct cuda *c, E *out, float *lse, const E *qkv, struct attention a, int B) {
    size_t bytes = shared_bytes(3, 1, a.D);
    dim3 tiles(cuda_blocks((size_t)a.T, TILE), (unsigned)a.H, (unsigned)B);
    if (allow_shared(c, attend<E, COLUMNS, PARTS>, bytes)) return;
    RUN(c, (attend<E, COLUMNS, PARTS>), tiles, TILE * PARTS, bytes, out, lse, qkv, a);
}

template <class E>
static void pick_forward(struct cuda *c, E *out, float *lse, const E *qkv, struct attention a, int B) {
    if (a.D <= 64) forward<E, 16, 4>(c, out, lse, qkv, a, B);
    else if (a.D <= 128) forward<E, 32, 4>(c, out, lse, qkv, a, B);
    else forward<E, 32, 8>(c, out, lse, qkv, a, B);
}

/* 1: cuDNN computes it, or has failed. Documents of a packed sequence are for the own kernels. */
static int forward_by_cudnn(struct cuda *c, struct sdpa_shape shape, const int32_t *start, void *out,
                            float *lse, const void *qkv) {
    if (!c->sdpa || start) return 0;
    size_t bytes = sdpa_forward_scratch(c->sdpa, &shape);
    struct err err;
    if (bytes == SDPA_CANNOT) return 0;
    void *scratch = cuda_scratch(c, bytes);
    if (scratch && sdpa_forward(c->sdpa, &shape, out, lse, qkv, scratch, &err) && c->failure.code == ERR_NONE)
        c->failure = err;
    return 1;
}

static void attention_forward(const struct kernels *k, void *out, float *lse, const void *qkv,
                              const int32_t *start, int B, int T, int H, int KV, int D) {
    struct cuda *c = cuda_of(k);
    struct attention a = shape_of(start, T, H, KV, D);
    struct sdpa_shape shape = { B, T, H, KV, D };
    if (forward_by_cudnn(c, shape, start, out, lse, qkv) || refuse_head(c, D)) return;
    if (k->act_bytes == sizeof(uint16_t) &&
        cuda_attention_mma_forward(c, (uint16_t *)out, lse, (const uint16_t *)qkv, &a, B))
        return;
    WITH_TYPE(k, pick_forward(c, (E *)out, lse, (const E *)qkv, a, B));
}

template <class E, int COLUMNS, int PARTS>
static void backward(struct cuda *c, E *dqkv, const E *dout, const E *qkv, const float *lse,
                     const float *delta, struct attention a, int B) {
    size_t for_query = shared_bytes(4, 1, a.D), for_key = shared_bytes(4, 2, a.D);
    unsigned tiles = cuda_blocks((size_t)a.T, TILE);
    dim3 of_queries(tiles, (unsigned)a.H, (unsigned)B), of_keys(tiles, (unsigned)a.KV, (unsigned)B);
    if (allow_shared(c, query_gradient<E, COLUMNS, PARTS>, for_query) ||
        allow_shared(c, key_gradient<E, COLUMNS, PARTS>, for_key))
        return;
    RUN(c, (query_gradient<E, COLUMNS, PARTS>), of_queries, TILE * PARTS, for_query, dqkv, dout, qkv, lse,
        delta, a);
    RUN(c, (key_gradient<E, COLUMNS, PARTS>), of_keys, TILE * PARTS, for_key, dqkv, dout, qkv, lse, delta, a);
}

static int backward_by_mma(struct cuda *c, uint16_t *dqkv, const uint16_t *dout, const uint16_t *qkv,
                           const float *lse, const float *delta, const struct attention &a, int B) {
    return cuda_attention_mma_backward(c, dqkv, dout, qkv, lse, delta, &a, B);
}

static int backward_by_mma(struct cuda *, float *, const float *, const float *, const float *, const float *,
                           const struct attention &, int) {
    return 0;
}

template <class E>
static void pick_backward(struct cuda *c, E *dqkv, const E *dout, const E *qkv, const E *out,
                          const float *lse, float *delta, struct attention a, int B) {
    size_t heads = (size_t)B * a.T * a.H;
    RUN(c, attention_delta<E>, cuda_blocks(heads * CUDA_WARP, CUDA_THREADS), CUDA_THREADS, 0, delta, dout,
        out, heads, a.T, a.H, a.D);
    if (backward_by_mma(c, dqkv, dout, qkv, lse, delta, a, B)) return;
    if (a.D <= 64) backward<E, 16, 4>(c, dqkv, dout, qkv, lse, delta, a, B);
    else if (a.D <= 128) backward<E, 32, 4>(c, dqkv, dout, qkv, lse, delta, a, B);
    else backward<E, 32, 8>(c, dqkv, dout, qkv, lse, delta, a, B);
}

static int backward_by_cudnn(struct cuda *c, struct sdpa_shape shape, const int32_t *start, void *dqkv,
                             const void *dout, const void *qkv, const void *out, const float *lse) {
    if (!c->sdpa || start) return 0;
    size_t bytes = sdpa_backward_scratch(c->sdpa, &shape);
    struct err err;
    if (bytes == SDPA_CANNOT) return 0;
    void *scratch = cuda_scratch(c, bytes);
    if (scratch && sdpa_backward(c->sdpa, &shape, dqkv, dout, qkv, out, lse, scratch, &err) &&
        c->failure.code == ERR_NONE)
        c->failure = err;
    return 1;
}

static void attention_backward(const struct kernels *k, void *dqkv, const void *dout, const void *qkv,
                               const void *out, const float *lse, const int32_t *start, int B, int T, int H,
                               int KV, int D) {
    struct cuda *c = cuda_of(k);
    struct attention a = shape_of(start, T, H, KV, D);
    struct sdpa_shape shape = { B, T, H, KV, D };
    if (backward_by_cudnn(c, shape, start, dqkv, dout, qkv, out, lse)) return;
    float *delta = (float *)cuda_scratch(c, (size_t)B * T * H * sizeof *delta);
    if (refuse_head(c, D) || !delta) return;
    WITH_TYPE(k,
              pick_backward(c, (E *)dqkv, (const E *)dout, (const E *)qkv, (const E *)out, lse, delta, a, B));
}

void cuda_fill_attention(struct kernels *k) {
    k->attention_forward = attention_forward;
    k->attention_backward = attention_backward;
}
