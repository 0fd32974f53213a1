/* cpu_attention_bf16.c - attention in bf16 with AVX512-BF16, which multiplies pairs of bf16 and adds in
 * fp32.
 *
 * Queries are taken in blocks of 64 against blocks of 64 keys, and a query is a lane of a vector: scores
 * are held transposed, [key][query]. So maxima and sums over keys need nothing across lanes, and what comes
 * out of one product is laid out as the next one wants it. A product is C[rows,columns] += A * B with A
 * [rows] of pairs, each broadcast, and B [pairs][columns] of pairs:
 *
 *   scores  S' = K  Q'      A: keys as they lie        B: pairs of d by query
 *   output  O' = V' P'      A: V transposed            B: pairs of keys by query
 *   dP' = V dO'             A: values as they lie      B: pairs of d by query
 *   dV = P' dO,  dK = dS' Q A: [key] pairs of queries  B: pairs of queries by d
 *   dQ' = K' dS'            A: K transposed            B: pairs of keys by query
 *
 * P and dS are rounded to bf16 between the products; all else is fp32. Threads share out the key/value
 * heads, each with its group of query heads. A thread's working set is a few blocks, K, V and, backward, dK
 * and dV of a head: about T x D x 14 bytes, in the second cache. */
#include "kernels/cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <math.h>
#include <omp.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define INLINE __attribute__((always_inline)) static inline
#define BLOCK 64 /* queries, and keys: four vectors */
#define PAIRS (BLOCK / 2)
#define NOTHING (-1e30f) /* a maximum of no scores; its exponential is 0, and no NaN comes of it */

/* ---- products ---------------------------------------------------------------------------------- */

/* C[4, 16 vectors] = or += A * B. */
INLINE TARGET void tile(float *c, size_t ldc, const uint32_t *a, size_t lda, const uint32_t *b, size_t ldb,
                        int pairs, const int vectors, int add) {
    __m512 sum[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sum[r][v] = add ? _mm512_loadu_ps(c + (size_t)r * ldc + 16 * v) : _mm512_setzero_ps();
    for (int p = 0; p < pairs; p++, b += ldb) {
        __m512bh of_b[4];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) of_b[v] = (__m512bh)_mm512_loadu_si512(b + 16 * v);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            __m512bh of_a = (__m512bh)_mm512_set1_epi32((int)a[(size_t)r * lda + (size_t)p]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], of_a, of_b[v]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) _mm512_storeu_ps(c + (size_t)r * ldc + 16 * v, sum[r][v]);
}

/* rows a multiple of 4, columns of 16. Strides of A and B count pairs. */
TARGET static void product(float *c, size_t ldc, const uint32_t *a, size_t lda, const uint32_t *b,
                           size_t ldb, int rows, int columns, int pairs, int add) {
    for (int j = 0; j < columns; j += BLOCK)
        for (int i = 0; i < rows; i += 4) {
            float *to = c + (size_t)i * ldc + j;
            const uint32_t *from = a + (size_t)i * lda, *with = b + j;
            if (columns - j >= 64) tile(to, ldc, from, lda, with, ldb, pairs, 4, add);
            else if (columns - j >= 48) tile(to, ldc, from, lda, with, ldb, pairs, 3, add);
            else if (columns - j >= 32) tile(to, ldc, from, lda, with, ldb, pairs, 2, add);
            else tile(to, ldc, from, lda, with, ldb, pairs, 1, add);
        }
}

/* ---- numbers ----------------------------------------------------------------------------------- */

/* 2^x to some 2e-7. */
INLINE TARGET __m512 exp2_of(__m512 x) {
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
           f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.3400429e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6184370e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5503324e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

INLINE TARGET __m512i round_wide(__m512 x) { /* bf16 in the lower halves of 32 bits */
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
}

/* Two rows as pairs: the first in the lower halves. */
INLINE TARGET __m512i pair_of(__m512 first, __m512 second) {
    return _mm512_or_si512(round_wide(first), _mm512_slli_epi32(round_wide(second), 16));
}

/* ---- shapes, scratch --------------------------------------------------------------------------- */

struct shape {
    const int32_t *start; /* [T] of this batch element, or NULL */
    int T, D, group;
    int keys;                  /* T, up to a whole block */
    int D4, D16;               /* D, up to a multiple of 4, of 16 */
    size_t stride, out_stride; /* elements between rows of qkv, of out */
    float scale;
};

/* A thread's memory; what is padded stays zero or is never looked at. */
struct scratch {
    uint32_t *key, *value;      /* [keys][D/2] */
    uint32_t *key_t, *value_t;  /* [D4][keys/2] */
    uint32_t *query_t, *dout_t; /* [D/2][BLOCK] */
    uint32_t *query_p, *dout_p; /* [PAIRS][D16] */
    uint32_t *pair;             /* [PAIRS][BLOCK] of P or dS */
    uint16_t *p, *ds;           /* [BLOCK][BLOCK] */
    float *score, *dp;          /* [BLOCK][BLOCK] */
    float *turned;              /* [D4][BLOCK] O' or dQ' */
    float *dkey, *dvalue;       /* [keys][D16] */
    float max[BLOCK], sum[BLOCK], lse[BLOCK], delta[BLOCK];
};

static size_t carve(float **next, size_t floats) {
    floats = (floats + 15) / 16 * 16;
    if (*next) *next += floats;
    return floats;
}

/* Floats that a thread needs; with memory, where the parts are. */
static size_t scratch_lay_out(struct scratch *s, float *memory, const struct shape *a) {
    size_t keys = (size_t)a->keys, D = (size_t)a->D, D4 = (size_t)a->D4, D16 = (size_t)a->D16;
    const struct {
        void *to;
        size_t floats;
    } part[] = {
        { &s->key, keys * D / 2 },      { &s->value, keys * D / 2 },    { &s->key_t, keys / 2 * D4 },
        { &s->value_t, keys / 2 * D4 }, { &s->query_t, BLOCK * D / 2 }, { &s->dout_t, BLOCK * D / 2 },
        { &s->query_p, PAIRS * D16 },   { &s->dout_p, PAIRS * D16 },    { &s->pair, PAIRS * BLOCK },
        { &s->p, BLOCK * BLOCK / 2 },   { &s->ds, BLOCK * BLOCK / 2 },  { &s->score, BLOCK * BLOCK },
        { &s->dp, BLOCK * BLOCK },      { &s->turned, BLOCK * D4 },     { &s->dkey, keys * D16 },
        { &s->dvalue, keys * D16 },
    };
    size_t all = 0;
    for (size_t i = 0; i < sizeof part / sizeof *part; i++) {
        if (memory) memcpy(part[i].to, &memory, sizeof memory);
        all += carve(&memory, part[i].floats);
    }
    return all;
}

static struct shape shape_of(const int32_t *start, int T, int H, int KV, int D) {
    return (struct shape){ .start = start,
                           .T = T,
                           .D = D,
                           .group = H / KV,
                           .keys = (T + BLOCK - 1) / BLOCK * BLOCK,
                           .D4 = (D + 3) / 4 * 4,
                           .D16 = (D + 15) / 16 * 16,
                           .stride = (size_t)(H + 2 * KV) * (size_t)D,
                           .out_stride = (size_t)H * (size_t)D,
                           .scale = 1.0f / sqrtf((float)D) };
}

/* Rows of pairs, [T][D/2] close together; the rest up to `rows` is zero. */
static void copy_rows(uint32_t *to, const uint16_t *from, size_t stride, int T, int rows, int D) {
    for (int t = 0; t < T; t++)
        memcpy(to + (size_t)t * (size_t)(D / 2), from + (size_t)t * stride, (size_t)D * 2);
    memset(to + (size_t)T * (size_t)(D / 2), 0, (size_t)(rows - T) * (size_t)D * 2);
}

/* [D4] of pairs of rows: to[d][t/2] = rows t and t + 1 at d. From [rows][D] close together. */
static void transpose_pairs(uint32_t *to, const uint32_t *rows, int keys, int D, int D4) {
    const uint16_t *x = (const uint16_t *)rows;
    size_t pairs = (size_t)keys / 2;
    for (size_t t = 0; t < pairs; t++, x += 2 * D)
        for (int d = 0; d < D; d++) to[(size_t)d * pairs + t] = x[d] | (uint32_t)x[D + d] << 16;
    for (int d = D; d < D4; d++) memset(to + (size_t)d * pairs, 0, pairs * sizeof *to);
}

/* Two rows as pairs. */
TARGET static void pair_rows(uint32_t *to, const uint16_t *first, const uint16_t *second, int D) {
#pragma omp simd
    for (int d = 0; d < D; d++) to[d] = first[d] | (uint32_t)second[d] << 16;
}

/* A block of rows both ways: by d, and (unless NULL) by row. Rows from `count` on are zero. */
TARGET static void turn_block(uint32_t *by_d, uint32_t *by_row, const uint16_t *from, size_t stride, int count,
                              int D, int D16) {
    static const uint16_t nothing[CPU_ATTENTION_BF16_D_MAX];
    const uint16_t *row[BLOCK];
    for (int t = 0; t < BLOCK; t++) row[t] = t < count ? from + (size_t)t * stride : nothing;
    for (int t = 0; t < BLOCK; t += 16)
        for (int i = 0; i < D / 2; i++)
            for (int j = 0; j < 16; j++) memcpy(by_d + i * BLOCK + t + j, row[t + j] + 2 * i, 4);
    for (int t = 0; by_row && t < PAIRS; t++) {
        pair_rows(by_row + t * D16, row[2 * t], row[2 * t + 1], D);
        memset(by_row + t * D16 + D, 0, (size_t)(D16 - D) * sizeof *by_row);
    }
}

/* ---- masks ------------------------------------------------------------------------------------- */

/* The first key that a block of queries sees, down to a whole block. */
static int first_block(const struct shape *a, int t) { return a->start ? a->start[t] / BLOCK * BLOCK : 0; }

/* Must some scores of queries [t, t + BLOCK) and keys [u, u + BLOCK) be masked? */
static int is_cut(const struct shape *a, int t, int count, int u) {
    return u + BLOCK - 1 > t || count < BLOCK || (a->start && a->start[t + count - 1] > u);
}

/* Per vector of queries: the keys that its lanes see, [from, to]. */
struct sight {
    __m512i from[4], to[4];
};

TARGET static void sight_of(struct sight *s, const struct shape *a, int t, int count) {
    int32_t from[BLOCK], to[BLOCK];
    for (int i = 0; i < BLOCK; i++) {
        from[i] = i < count && a->start ? a->start[t + i] : 0;
        to[i] = i < count ? t + i : -1;
    }
    for (int v = 0; v < 4; v++) {
        s->from[v] = _mm512_loadu_si512(from + 16 * v);
        s->to[v] = _mm512_loadu_si512(to + 16 * v);
    }
}

INLINE TARGET __mmask16 sees(const struct sight *s, int v, int key, int cut) {
    __m512i k = _mm512_set1_epi32(key);
    return cut ? _mm512_cmple_epi32_mask(k, s->to[v]) & _mm512_cmpge_epi32_mask(k, s->from[v])
               : (__mmask16)-1;
}

/* ---- forward ----------------------------------------------------------------------------------- */

/* Scores to probabilities as pairs of keys, for one vector of queries; maximum and sum go on. Returns by
 * what all that was added up so far is to be multiplied. Scores count in powers of two: by `factor`. */
INLINE TARGET __m512 soften(struct scratch *s, const struct sight *sight, int v, int u, int cut,
                            float factor) {
    const float *score = s->score + 16 * v;
    __m512 f = _mm512_set1_ps(factor), before = _mm512_loadu_ps(s->max + 16 * v), max = before;
    for (int i = 0; i < BLOCK; i++)
        max = _mm512_mask_max_ps(max, sees(sight, v, u + i, cut), max,
                                 _mm512_mul_ps(f, _mm512_loadu_ps(score + i * BLOCK)));
    __m512 again = exp2_of(_mm512_sub_ps(before, max)),
           sum = _mm512_mul_ps(again, _mm512_loadu_ps(s->sum + 16 * v));
    for (int i = 0; i < BLOCK; i += 2) {
        __m512 p[2];
        for (int j = 0; j < 2; j++) {
            __m512 x = _mm512_fmsub_ps(f, _mm512_loadu_ps(score + (i + j) * BLOCK), max);
            p[j] = _mm512_maskz_mov_ps(sees(sight, v, u + i + j, cut), exp2_of(x));
            sum = _mm512_add_ps(sum, p[j]);
        }
        _mm512_storeu_si512(s->pair + i / 2 * BLOCK + 16 * v, pair_of(p[0], p[1]));
    }
    _mm512_storeu_ps(s->max + 16 * v, max);
    _mm512_storeu_ps(s->sum + 16 * v, sum);
    return again;
}

TARGET static void forward_keys(struct scratch *s, const struct shape *a, const struct sight *sight, int u,
                                int cut, int first) {
    size_t half = (size_t)a->D / 2, pairs = (size_t)a->keys / 2;
    product(s->score, BLOCK, s->key + (size_t)u * half, half, s->query_t, BLOCK, BLOCK, BLOCK, a->D / 2, 0);
    for (int v = 0; v < 4; v++) {
        __m512 again = soften(s, sight, v, u, cut, a->scale * (float)M_LOG2E);
        if (first || _mm512_cmpeq_ps_mask(again, _mm512_set1_ps(1)) == (__mmask16)-1) continue;
        for (int d = 0; d < a->D; d++) {
            float *x = s->turned + d * BLOCK + 16 * v;
            _mm512_storeu_ps(x, _mm512_mul_ps(again, _mm512_loadu_ps(x)));
        }
    }
    product(s->turned, BLOCK, s->value_t + u / 2, pairs, s->pair, BLOCK, a->D4, BLOCK, PAIRS, !first);
}

/* Queries [t, t + count) of one head, whose rows of q and out begin at t. */
TARGET static void forward_block(struct scratch *s, const struct shape *a, uint16_t *out, float *lse,
                                 const uint16_t *query, int t, int count) {
    struct sight sight;
    sight_of(&sight, a, t, count);
    turn_block(s->query_t, NULL, query, a->stride, count, a->D, a->D16);
    for (int i = 0; i < BLOCK; i++) s->max[i] = NOTHING, s->sum[i] = 0;
    int first = first_block(a, t);
    for (int u = first; u < t + count; u += BLOCK)
        forward_keys(s, a, &sight, u, is_cut(a, t, count, u), u == first);
    for (int i = 0; i < count; i++) {
        float inverse = 1.0f / s->sum[i];
        lse[i] = s->max[i] * (float)M_LN2 + logf(s->sum[i]); /* cppcheck-suppress invalidFunctionArg */
        for (int d = 0; d < a->D; d++) s->turned[d * BLOCK + i] *= inverse;
    }
    for (int i = 0; i < count; i++)
        for (int d = 0; d < a->D; d += 2) {
            __m128bh two =
                _mm_cvtneps_pbh(_mm_set_ps(0, 0, s->turned[(d + 1) * BLOCK + i], s->turned[d * BLOCK + i]));
            memcpy(out + (size_t)i * a->out_stride + d, &two, 4);
        }
}

static void forward_group(struct scratch *s, const struct shape *a, uint16_t *out, float *lse,
                          const uint16_t *query, const uint16_t *key, const uint16_t *value) {
    copy_rows(s->key, key, a->stride, a->T, a->keys, a->D);
    copy_rows(s->value, value, a->stride, a->T, a->keys, a->D);
    transpose_pairs(s->value_t, s->value, a->keys, a->D, a->D4);
    for (int h = 0; h < a->group; h++)
        for (int t = 0; t < a->T; t += BLOCK)
            forward_block(s, a, out + (size_t)t * a->out_stride + h * a->D, lse + (size_t)h * a->T + t,
                          query + (size_t)t * a->stride + h * a->D, t, a->T - t < BLOCK ? a->T - t : BLOCK);
}

/* ---- backward ---------------------------------------------------------------------------------- */

/* P and dS of one vector of queries, as rows and dS as pairs of keys. */
INLINE TARGET void harden(struct scratch *s, const struct sight *sight, int v, int u, int cut,
                          float factor) {
    __m512 f = _mm512_set1_ps(factor), lse = _mm512_loadu_ps(s->lse + 16 * v),
           delta = _mm512_loadu_ps(s->delta + 16 * v);
    for (int i = 0; i < BLOCK; i += 2) {
        __m512 ds[2];
        for (int j = 0; j < 2; j++) {
            int at = (i + j) * BLOCK + 16 * v;
            __m512 x = _mm512_fmsub_ps(f, _mm512_loadu_ps(s->score + at), lse);
            __m512 p = _mm512_maskz_mov_ps(sees(sight, v, u + i + j, cut), exp2_of(x));
            ds[j] = _mm512_mul_ps(p, _mm512_sub_ps(_mm512_loadu_ps(s->dp + at), delta));
            _mm256_storeu_si256((__m256i *)(s->p + at), (__m256i)_mm512_cvtneps_pbh(p));
            _mm256_storeu_si256((__m256i *)(s->ds + at), (__m256i)_mm512_cvtneps_pbh(ds[j]));
        }
        _mm512_storeu_si512(s->pair + i / 2 * BLOCK + 16 * v, pair_of(ds[0], ds[1]));
    }
}

TARGET static void backward_keys(struct scratch *s, const struct shape *a, const struct sight *sight, int u,
                                 int cut, int first) {
    size_t half = (size_t)a->D / 2, pairs = (size_t)a->keys / 2, wide = (size_t)a->D16,
           at = (size_t)u * half;
    product(s->score, BLOCK, s->key + at, half, s->query_t, BLOCK, BLOCK, BLOCK, a->D / 2, 0);
    product(s->dp, BLOCK, s->value + at, half, s->dout_t, BLOCK, BLOCK, BLOCK, a->D / 2, 0);
    for (int v = 0; v < 4; v++) harden(s, sight, v, u, cut, a->scale * (float)M_LOG2E);
    product(s->dvalue + (size_t)u * wide, wide, (const uint32_t *)s->p, PAIRS, s->dout_p, wide, BLOCK,
            a->D16, PAIRS, 1);
    product(s->dkey + (size_t)u * wide, wide, (const uint32_t *)s->ds, PAIRS, s->query_p, wide, BLOCK,
            a->D16, PAIRS, 1);
    product(s->turned, BLOCK, s->key_t + u / 2, pairs, s->pair, BLOCK, a->D4, BLOCK, PAIRS, !first);
}

/* x[n] * factor, rounded, from every `stride`-th element. */
TARGET static void put_row(uint16_t *to, const float *x, size_t stride, float factor, int D) {
    for (int d = 0; d < D; d += 2) {
        __m128 two = _mm_set_ps(0, 0, x[(size_t)(d + 1) * stride] * factor, x[(size_t)d * stride] * factor);
        __m128bh rounded = _mm_cvtneps_pbh(two);
        memcpy(to + d, &rounded, 4);
    }
}

static float dot(const uint16_t *x, const uint16_t *y, int n) {
    float sum = 0;
    for (int i = 0; i < n; i++) {
        uint32_t a = (uint32_t)x[i] << 16, b = (uint32_t)y[i] << 16;
        float p, q;
        memcpy(&p, &a, sizeof p);
        memcpy(&q, &b, sizeof q);
        sum += p * q;
    }
    return sum;
}

TARGET static void backward_block(struct scratch *s, const struct shape *a, uint16_t *dquery,
                                  const uint16_t *dout, const uint16_t *query, const uint16_t *out,
                                  const float *lse, int t, int count) {
    struct sight sight;
    sight_of(&sight, a, t, count);
    turn_block(s->query_t, s->query_p, query, a->stride, count, a->D, a->D16);
    turn_block(s->dout_t, s->dout_p, dout, a->out_stride, count, a->D, a->D16);
    for (int i = 0; i < BLOCK; i++) {
        s->lse[i] = i < count ? lse[i] * (float)M_LOG2E : 0;
        s->delta[i] =
            i < count ? dot(dout + (size_t)i * a->out_stride, out + (size_t)i * a->out_stride, a->D) : 0;
    }
    int first = first_block(a, t);
    for (int u = first; u < t + count; u += BLOCK)
        backward_keys(s, a, &sight, u, is_cut(a, t, count, u), u == first);
    for (int i = 0; i < count; i++)
        put_row(dquery + (size_t)i * a->stride, s->turned + i, BLOCK, a->scale, a->D);
}

/* Pointers to the group's first query head, its key and value head, in the first row. */
struct heads {
    size_t query, key, value, out, lse;
};

static struct heads heads_of(int b, int kv, int T, int H, int KV, int D) {
    size_t row = (size_t)b * (size_t)T, stride = (size_t)(H + 2 * KV) * (size_t)D;
    int first = kv * (H / KV);
    return (struct heads){ row * stride + (size_t)(first * D), row * stride + (size_t)((H + kv) * D),
                           row * stride + (size_t)((H + KV + kv) * D),
                           row * (size_t)(H * D) + (size_t)(first * D),
                           ((size_t)b * (size_t)H + (size_t)first) * (size_t)T };
}

static void backward_group(struct scratch *s, const struct shape *a, struct heads at, uint16_t *dqkv,
                           const uint16_t *dout, const uint16_t *qkv, const uint16_t *out,
                           const float *lse) {
    copy_rows(s->key, qkv + at.key, a->stride, a->T, a->keys, a->D);
    copy_rows(s->value, qkv + at.value, a->stride, a->T, a->keys, a->D);
    transpose_pairs(s->key_t, s->key, a->keys, a->D, a->D4);
    memset(s->dkey, 0, (size_t)a->keys * (size_t)a->D16 * sizeof *s->dkey);
    memset(s->dvalue, 0, (size_t)a->keys * (size_t)a->D16 * sizeof *s->dvalue);
    for (int h = 0; h < a->group; h++)
        for (int t = 0; t < a->T; t += BLOCK) {
            size_t row = at.query + (size_t)t * a->stride + (size_t)(h * a->D);
            size_t o = at.out + (size_t)t * a->out_stride + (size_t)(h * a->D);
            backward_block(s, a, dqkv + row, dout + o, qkv + row, out + o,
                           lse + at.lse + (size_t)h * a->T + t, t, a->T - t < BLOCK ? a->T - t : BLOCK);
        }
    for (size_t t = 0; t < (size_t)a->T; t++) {
        put_row(dqkv + at.key + t * a->stride, s->dkey + t * (size_t)a->D16, 1, a->scale, a->D);
        put_row(dqkv + at.value + t * a->stride, s->dvalue + t * (size_t)a->D16, 1, 1, a->D);
    }
}

/* ---- entries ----------------------------------------------------------------------------------- */

static int threads_for(const struct cpu *cpu, int B, int T, int H, int D) {
    return CPU_WORTH_IT((size_t)B * (size_t)H * (size_t)T * (size_t)T * (size_t)D / 16) ? cpu->threads : 1;
}

void cpu_attention_bf16_forward(const struct kernels *k, void *out, float *lse, const void *qkv,
                                const int32_t *start, int B, int T, int H, int KV, int D) {
    struct cpu *cpu = cpu_of(k);
    struct shape whole = shape_of(NULL, T, H, KV, D);
    float *memory = cpu_scratch(cpu, scratch_lay_out(&(struct scratch){ 0 }, NULL, &whole));
    const uint16_t *x = qkv;
    if (!memory) return;
#pragma omp parallel for num_threads(threads_for(cpu, B, T, H, D)) collapse(2) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int kv = 0; kv < KV; kv++) {
            struct scratch s;
            struct shape a = shape_of(start ? start + (size_t)b * (size_t)T : NULL, T, H, KV, D);
            struct heads at = heads_of(b, kv, T, H, KV, D);
            scratch_lay_out(&s, memory + (size_t)omp_get_thread_num() * cpu->scratch_floats, &a);
            forward_group(&s, &a, (uint16_t *)out + at.out, lse + at.lse, x + at.query, x + at.key,
                          x + at.value);
        }
}

void cpu_attention_bf16_backward(const struct kernels *k, void *dqkv, const void *dout, const void *qkv,
                                 const void *out, const float *lse, const int32_t *start, int B, int T,
                                 int H, int KV, int D) {
    struct cpu *cpu = cpu_of(k);
    struct shape whole = shape_of(NULL, T, H, KV, D);
    float *memory = cpu_scratch(cpu, scratch_lay_out(&(struct scratch){ 0 }, NULL, &whole));
    if (!memory) return;
#pragma omp parallel for num_threads(threads_for(cpu, B, T, H, D)) collapse(2) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int kv = 0; kv < KV; kv++) {
            struct scratch s;
            struct shape a = shape_of(start ? start + (size_t)b * (size_t)T : NULL, T, H, KV, D);
            scratch_lay_out(&s, memory + (size_t)omp_get_thread_num() * cpu->scratch_floats, &a);
            backward_group(&s, &a, heads_of(b, kv, T, H, KV, D), dqkv, dout, qkv, out, lse);
        }
}

int cpu_attention_bf16_can(void) {
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#endif
