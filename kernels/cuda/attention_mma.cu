/* attention_mma.cu - attention of bf16 on tensor cores, for heads of 64 and 128: what attention.cu computes,
 * in the same three kernels, FlashAttention-2 (arXiv:2307.08691) by mma.sync. For packed documents, which
 * cuDNN does not take, and where it is not.
 *
 * A block has ROWS queries of a head (in key_gradient: keys), a warp 16 of them, as rows of its products; it
 * walks over tiles of the others. They come while it multiplies: for gradients of queries the next ones, into
 * room of their own; forward, where that room would cost a multiprocessor a block, the values while scores are
 * computed, and the next keys while values are added; gradients of keys have no register left for it. Products
 * are of bf16 and summed in fp32; probabilities and the gradients of scores are rounded before they are
 * multiplied, the sum of probabilities is of those not rounded. No atomics: sums have the order of tiles. */
#include "kernels/cuda/attention.h"
#include "kernels/cuda/mma.h"

#define ROWS 64
#define WARP_ROWS 16
#define BLOCK (ROWS / WARP_ROWS * CUDA_WARP)
#define FORWARD_TILE 64
#define BACKWARD_TILE 32 /* there are twice as many sums, or scores */
#define LOG2_E 1.44269504088896341f

/* Between rows of a tile: 16 bytes more than they have, so that eight rows lie in different banks. */
#define APART(D) ((D) + 8)

#define TILE_ELEMENTS(D, rows) ((rows) * APART(D))

/* Begin to load `rows` rows of D from `first` on, zeroes after the sequence. x is aligned to 16, and so are rows. */
template <int D>
__device__ static void load_rows(uint16_t *to, const uint16_t *x, size_t apart, int first, int rows, int T) {
    const int N = GROUP(uint16_t);
    ONE_BY_ONE /* nobody waits for them here, and registers are few */
    for (int i = (int)threadIdx.x; i < rows * (D / N); i += BLOCK) {
        int r = i / (D / N), d = i % (D / N) * N;
        tile_begin(to + r * APART(D) + d, x + (size_t)(first + r) * apart + d, first + r < T);
    }
}

/* What was begun is there for all, and what was there before is done with by all. */
__device__ static void await_rows(void) {
    tiles_wait();
    __syncthreads();
}

/* A warp's 16 rows of sums times `factor` of each half of a lane's, to rows of global memory, by way of the
 * warp's rows of a tile that nobody reads any more. */
template <int D>
__device__ static void store_rows(uint16_t *to, size_t apart, int first, int T, uint16_t *tile,
                                  const float (&sums)[D / 8][4], const float (&factor)[2]) {
    const int N = GROUP(uint16_t);
    int lane = (int)threadIdx.x % CUDA_WARP;
    __syncwarp();
    UNROLL
    for (int n = 0; n < D / 8; n++)
        UNROLL
        for (int half = 0; half < 2; half++) {
            float pair[2] = { sums[n][2 * half] * factor[half], sums[n][2 * half + 1] * factor[half] };
            put_all(tile + mma_c_row(lane, 2 * half) * APART(D) + n * 8 + mma_c_column(lane, 0), pair);
        }
    __syncwarp();
    for (int i = lane; i < WARP_ROWS * (D / N); i += CUDA_WARP) {
        int r = i / (D / N), d = i % (D / N) * N;
        uint16_t some[N];
        if (first + r >= T) continue;
        take(some, tile + r * APART(D) + d);
        give(to + (size_t)(first + r) * apart + d, some);
    }
}

template <int N> __device__ static void clear(float (&sums)[N][4]) {
    UNROLL
    for (int n = 0; n < N; n++) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
}

/* sums[16, 8N] = rows[16, D] * others[8N, D]^T */
template <int D, int N>
__device__ static void scores(float (&sums)[N][4], const uint16_t *rows, const uint16_t *others) {
    clear(sums);
    UNROLL
    for (int d = 0; d < D; d += 16) {
        uint32_t a[4], b[4];
        mma_take_a(a, rows + d, APART(D));
        UNROLL
        for (int n = 0; n < N; n += 2) {
            mma_take_b_of_rows(b, others + n * 8 * APART(D) + d, APART(D));
            mma(sums[n], a, b[0], b[1]);
            mma(sums[n + 1], a, b[2], b[3]);
        }
    }
}

/* sums[16, D] += factors[16, 8N] * others[8N, D] */
template <int D, int N>
__device__ static void add_rows(float (&sums)[D / 8][4], const float (&factors)[N][4],
                                const uint16_t *others) {
    UNROLL
    for (int k = 0; k < N; k += 2) {
        uint32_t a[4], b[4];
        mma_a_of(a, factors[k], factors[k + 1]);
        UNROLL
        for (int d = 0; d < D; d += 16) {
            mma_take_b(b, others + k * 8 * APART(D) + d, APART(D));
            mma(sums[d / 8], a, b[0], b[1]);
            mma(sums[d / 8 + 1], a, b[2], b[3]);
        }
    }
}

/* ---- forward ------------------------------------------------------------------------------------------- */

/* Scores of a lane's two rows become probabilities but for a factor, that of the largest score so far; sum
 * and most go on. */
template <int N>
__device__ static void soften(float (&score)[N][4], float (&most)[2], float (&sum)[2], float (&keep)[2],
                              float to_log2) {
    UNROLL
    for (int half = 0; half < 2; half++) {
        float top = most[half], here = 0.0f;
        UNROLL
        for (int n = 0; n < N; n++) top = fmaxf(top, fmaxf(score[n][2 * half], score[n][2 * half + 1]));
        top = lanes_max<4>(top);
        float base =
            top == -INFINITY ? 0.0f : top * to_log2; /* a row of a later document may have seen no key yet */
        keep[half] = exp2f(most[half] * to_log2 - base);
        UNROLL
        for (int n = 0; n < N; n++)
            UNROLL
            for (int i = 2 * half; i < 2 * half + 2; i++) {
                score[n][i] = exp2f(score[n][i] * to_log2 - base);
                here += score[n][i];
            }
        sum[half] = sum[half] * keep[half] + lanes_sum<4>(here);
        most[half] = top;
    }
}

template <int D>
__global__ void __launch_bounds__(BLOCK)
attend_mma(uint16_t *out, float *lse, const uint16_t *qkv, struct attention a) {
    SHARED_MEMORY(memory);
    const int N = FORWARD_TILE / 8;
    int first = (int)blockIdx.x * ROWS, h = (int)blockIdx.y, b = (int)blockIdx.z, kv = h / (a.H / a.KV);
    int lane = (int)threadIdx.x % CUDA_WARP, own = (int)threadIdx.x / CUDA_WARP * WARP_ROWS;
    uint16_t *q = (uint16_t *)memory, *key = q + TILE_ELEMENTS(D, ROWS),
             *value = key + TILE_ELEMENTS(D, FORWARD_TILE);
    const uint16_t *rows = qkv + (size_t)b * a.T * row_elements(a);
    float score[N][4], sums[D / 8][4], most[2] = { -INFINITY, -INFINITY }, sum[2] = { 0.0f, 0.0f }, keep[2];
    int t[2] = { first + own + mma_c_row(lane, 0), first + own + mma_c_row(lane, 2) };
    int begin[2] = { document_of(a, b, t[0]), document_of(a, b, t[1]) };
    clear(sums);
    load_rows<D>(q, rows + query_at(a, h), row_elements(a), first, ROWS, a.T);
    int last = first + ROWS < a.T ? first + ROWS : a.T, newest = document_of(a, b, last - 1);
    int k0 = document_of(a, b, first) / FORWARD_TILE * FORWARD_TILE;
    load_rows<D>(key, rows + key_at(a, kv), row_elements(a), k0, FORWARD_TILE, a.T);
    for (; k0 < last; k0 += FORWARD_TILE) {
        await_rows(); /* keys */
        load_rows<D>(value, rows + value_at(a, kv), row_elements(a), k0, FORWARD_TILE, a.T);
        scores<D>(score, q + own * APART(D), key);
        if (k0 < newest || k0 + FORWARD_TILE > first + 1) /* some row does not see all of the tile */
            UNROLL
            for (int n = 0; n < N; n++)
                UNROLL
                for (int i = 0; i < 4; i++) {
                    int u = k0 + n * 8 + mma_c_column(lane, i);
                    if (u < begin[i / 2] || u > t[i / 2]) score[n][i] = -INFINITY;
                }
        soften(score, most, sum, keep, a.scale * LOG2_E);
        UNROLL
        for (int n = 0; n < D / 8; n++)
            UNROLL
            for (int i = 0; i < 4; i++) sums[n][i] *= keep[i / 2];
        await_rows(); /* values */
        if (k0 + FORWARD_TILE < last)
            load_rows<D>(key, rows + key_at(a, kv), row_elements(a), k0 + FORWARD_TILE, FORWARD_TILE, a.T);
        add_rows<D>(sums, score, value);
    }
    float unit[2] = { 1.0f / sum[0], 1.0f / sum[1] };
    uint16_t *to = out + ((size_t)b * a.T * a.H + h) * D;
    store_rows<D>(to, (size_t)a.H * D, first + own, a.T, q + own * APART(D), sums, unit);
    for (int half = 0; half < 2; half++)
        if (lane % 4 == 0 && t[half] < a.T)
            lse[((size_t)b * a.H + h) * a.T + t[half]] = most[half] * a.scale + logf(sum[half]);
}

/* ---- backward ------------------------------------------------------------------------------------------ */

/* With p = exp(score - lse): dscore = p * (dout.value - delta) * scale; dq = sum of dscore * key. */
template <int D>
__global__ void __launch_bounds__(BLOCK)
    query_gradient_mma(uint16_t *dqkv, const uint16_t *dout, const uint16_t *qkv, const float *lse,
                       const float *delta, struct attention a) {
    SHARED_MEMORY(memory);
    const int N = BACKWARD_TILE / 8;
    int first = (int)blockIdx.x * ROWS, h = (int)blockIdx.y, b = (int)blockIdx.z, kv = h / (a.H / a.KV);
    int lane = (int)threadIdx.x % CUDA_WARP, own = (int)threadIdx.x / CUDA_WARP * WARP_ROWS;
    uint16_t *q = (uint16_t *)memory, *grad = q + TILE_ELEMENTS(D, ROWS),
             *key = grad + TILE_ELEMENTS(D, ROWS), *value = key + TILE_ELEMENTS(D, BACKWARD_TILE),
             *next = value + TILE_ELEMENTS(D, BACKWARD_TILE);
    const uint16_t *rows = qkv + (size_t)b * a.T * row_elements(a);
    float score[N][4], ds[N][4], sums[D / 8][4], row_lse[2], row_delta[2], to_log2 = a.scale * LOG2_E;
    int t[2], begin[2];
    for (int half = 0; half < 2; half++) {
        t[half] = first + own + mma_c_row(lane, 2 * half);
        begin[half] = document_of(a, b, t[half]);
        size_t at = ((size_t)b * a.H + h) * a.T + t[half];
        row_lse[half] = t[half] < a.T ? lse[at] * LOG2_E : 0.0f;
        row_delta[half] = t[half] < a.T ? delta[at] : 0.0f;
    }
    clear(sums);
    load_rows<D>(q, rows + query_at(a, h), row_elements(a), first, ROWS, a.T);
    load_rows<D>(grad, dout + ((size_t)b * a.T * a.H + h) * D, (size_t)a.H * D, first, ROWS, a.T);
    int last = first + ROWS < a.T ? first + ROWS : a.T;
    int k0 = document_of(a, b, first) / BACKWARD_TILE * BACKWARD_TILE;
    load_rows<D>(key, rows + key_at(a, kv), row_elements(a), k0, BACKWARD_TILE, a.T);
    load_rows<D>(value, rows + value_at(a, kv), row_elements(a), k0, BACKWARD_TILE, a.T);
    for (; k0 < last; k0 += BACKWARD_TILE) {
        uint16_t *key_after = next, *value_after = next + TILE_ELEMENTS(D, BACKWARD_TILE);
        await_rows();
        if (k0 + BACKWARD_TILE < last) {
            int k1 = k0 + BACKWARD_TILE;
            load_rows<D>(key_after, rows + key_at(a, kv), row_elements(a), k1, BACKWARD_TILE, a.T);
            load_rows<D>(value_after, rows + value_at(a, kv), row_elements(a), k1, BACKWARD_TILE, a.T);
        }
        scores<D>(score, q + own * APART(D), key);
        scores<D>(ds, grad + own * APART(D), value);
        UNROLL
        for (int n = 0; n < N; n++)
            UNROLL
            for (int i = 0; i < 4; i++) {
                int u = k0 + n * 8 + mma_c_column(lane, i);
                bool sees = u >= begin[i / 2] && u <= t[i / 2];
                float p = exp2f(score[n][i] * to_log2 - row_lse[i / 2]);
                ds[n][i] = sees ? p * (ds[n][i] - row_delta[i / 2]) * a.scale : 0.0f;
            }
        add_rows<D>(sums, ds, key);
        next = key;
        key = key_after;
        value = value_after;
    }
    float one[2] = { 1.0f, 1.0f };
    uint16_t *to = dqkv + (size_t)b * a.T * row_elements(a) + query_at(a, h);
    store_rows<D>(to, row_elements(a), first + own, a.T, q + own * APART(D), sums, one);
}

/* What a tile of queries brings beside its rows. begin: no key is that late after the last query. */
struct query_rows {
    float lse[BACKWARD_TILE], delta[BACKWARD_TILE];
    int begin[BACKWARD_TILE];
};

__device__ static void load_query_rows(struct query_rows *to, const float *lse, const float *delta,
                                       const struct attention &a, int b, int h, int first) {
    for (int r = (int)threadIdx.x; r < BACKWARD_TILE; r += BLOCK) {
        size_t at = ((size_t)b * a.H + h) * a.T + first + r;
        bool is = first + r < a.T;
        to->lse[r] = is ? lse[at] * LOG2_E : 0.0f;
        to->delta[r] = is ? delta[at] : 0.0f;
        to->begin[r] = is ? document_of(a, b, first + r) : a.T;
    }
}

/* Of a block's keys and the heads h of their group: dv = sum of p * dout, dk = sum of dscore * q, in the
 * order of heads and queries. */
template <int D>
__global__ void __launch_bounds__(BLOCK, 2) /* or ptxas spills to keep four */
    key_gradient_mma(uint16_t *dqkv, const uint16_t *dout, const uint16_t *qkv, const float *lse,
                     const float *delta, struct attention a) {
    SHARED_MEMORY(memory);
    const int N = BACKWARD_TILE / 8;
    int first = (int)blockIdx.x * ROWS, kv = (int)blockIdx.y, b = (int)blockIdx.z, group = a.H / a.KV;
    int lane = (int)threadIdx.x % CUDA_WARP, own = (int)threadIdx.x / CUDA_WARP * WARP_ROWS;
    uint16_t *key = (uint16_t *)memory, *value = key + TILE_ELEMENTS(D, ROWS),
             *q = value + TILE_ELEMENTS(D, ROWS), *grad = q + TILE_ELEMENTS(D, BACKWARD_TILE);
    struct query_rows *query = (struct query_rows *)(grad + TILE_ELEMENTS(D, BACKWARD_TILE));
    const uint16_t *rows = qkv + (size_t)b * a.T * row_elements(a);
    float p[N][4], ds[N][4], dk[D / 8][4], dv[D / 8][4], to_log2 = a.scale * LOG2_E;
    clear(dk);
    clear(dv);
    load_rows<D>(key, rows + key_at(a, kv), row_elements(a), first, ROWS, a.T);
    load_rows<D>(value, rows + value_at(a, kv), row_elements(a), first, ROWS, a.T);
    for (int h = kv * group; h < (kv + 1) * group; h++)
        for (int q0 = first; q0 < a.T;
             q0 += BACKWARD_TILE) { /* queries before the tile see none of its keys */
            if (document_of(a, b, q0) >= first + ROWS) break; /* and later documents neither */
            __syncthreads();
            load_rows<D>(q, rows + query_at(a, h), row_elements(a), q0, BACKWARD_TILE, a.T);
            load_rows<D>(grad, dout + ((size_t)b * a.T * a.H + h) * D, (size_t)a.H * D, q0, BACKWARD_TILE,
                         a.T);
            load_query_rows(query, lse, delta, a, b, h, q0);
            await_rows();
            scores<D>(p, key + own * APART(D), q);
            scores<D>(ds, value + own * APART(D), grad);
            UNROLL
            for (int n = 0; n < N; n++)
                UNROLL
                for (int i = 0; i < 4; i++) {
                    int at = n * 8 + mma_c_column(lane, i), u = first + own + mma_c_row(lane, i);
                    bool seen = u >= query->begin[at] && u <= q0 + at;
                    p[n][i] = seen ? exp2f(p[n][i] * to_log2 - query->lse[at]) : 0.0f;
                    ds[n][i] = seen ? p[n][i] * (ds[n][i] - query->delta[at]) * a.scale : 0.0f;
                }
            add_rows<D>(dv, p, grad);
            add_rows<D>(dk, ds, q);
        }
    float one[2] = { 1.0f, 1.0f };
    uint16_t *to = dqkv + (size_t)b * a.T * row_elements(a);
    store_rows<D>(to + key_at(a, kv), row_elements(a), first + own, a.T, key + own * APART(D), dk, one);
    store_rows<D>(to + value_at(a, kv), row_elements(a), first + own, a.T, value + own * APART(D), dv, one);
}

/* ---- entries ------------------------------------------------------------------------------------------- */

template <int D>
static void forward(struct cuda *c, uint16_t *out, float *lse, const uint16_t *qkv, struct attention a,
                    int B) {
    size_t bytes = (size_t)TILE_ELEMENTS(D, ROWS + 2 * FORWARD_TILE) * sizeof *out;
    dim3 blocks(cuda_blocks((size_t)a.T, ROWS), (unsigned)a.H, (unsigned)B);
    if (!allow_shared(c, attend_mma<D>, bytes)) RUN(c, attend_mma<D>, blocks, BLOCK, bytes, out, lse, qkv, a);
}

template <int D>
static void backward(struct cuda *c, uint16_t *dqkv, const uint16_t *dout, const uint16_t *qkv,
                     const float *lse, const float *delta, struct attention a, int B) {
    size_t for_query = (size_t)TILE_ELEMENTS(D, 2 * ROWS + 4 * BACKWARD_TILE) * sizeof *dqkv,
           for_key = (size_t)TILE_ELEMENTS(D, 2 * ROWS + 2 * BACKWARD_TILE) * sizeof *dqkv +
                     sizeof(struct query_rows);
    unsigned tiles = cuda_blocks((size_t)a.T, ROWS);
    dim3 of_queries(tiles, (unsigned)a.H, (unsigned)B), of_keys(tiles, (unsigned)a.KV, (unsigned)B);
    if (allow_shared(c, query_gradient_mma<D>, for_query) || allow_shared(c, key_gradient_mma<D>, for_key))
        return;
    RUN(c, query_gradient_mma<D>, of_queries, BLOCK, for_query, dqkv, dout, qkv, lse, delta, a);
    RUN(c, key_gradient_mma<D>, of_keys, BLOCK, for_key, dqkv, dout, qkv, lse, delta, a);
}

static bool fits(const struct attention *a, const void *x, const void *y, const void *z) {
    return (a->D == 64 || a->D == 128) && (((uintptr_t)x | (uintptr_t)y | (uintptr_t)z) & 15) == 0;
}

int cuda_attention_mma_forward(struct cuda *c, uint16_t *out, float *lse, const uint16_t *qkv,
                               const struct attention *a, int B) {
    if (!fits(a, out, qkv, NULL)) return 0;
    if (a->D == 64) forward<64>(c, out, lse, qkv, *a, B);
    else forward<128>(c, out, lse, qkv, *a, B);
    return 1;
}

int cuda_attention_mma_backward(struct cuda *c, uint16_t *dqkv, const uint16_t *dout, const uint16_t *qkv,
                                const float *lse, const float *delta, const struct attention *a, int B) {
    if (!fits(a, dqkv, dout, qkv)) return 0;
    if (a->D == 64) backward<64>(c, dqkv, dout, qkv, lse, delta, *a, B);
    else backward<128>(c, dqkv, dout, qkv, lse, delta, *a, B);
    return 1;
}
