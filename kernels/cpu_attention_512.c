/* cpu_attention_512.c - attention with vectors of 512 bits, in fp32; cpu_attention_bf16.c compiles it once
 * more for AVX512-BF16, which multiplies pairs of bf16 and adds in fp32.
 *
 * Queries are taken in blocks of 64 against blocks of 64 keys, and a query is a lane of a vector: scores
 * are held transposed, [key][query]. So maxima and sums over keys need nothing across lanes, and what comes
 * out of one product is laid out as the next one wants it. A product is C[rows,columns] += A * B of words
 * (cpu_512.h): A is [rows][words], each broadcast, B [words][columns].
 *
 *   scores  S' = K  Q'      A: keys as they lie        B: words of d by query
 *   output  O' = V' P'      A: V transposed            B: words of keys by query
 *   dP' = V dO'             A: values as they lie      B: words of d by query
 *   dV = P' dO,  dK = dS' Q A: [key] words of queries  B: words of queries by d
 *   dQ' = K' dS'            A: K transposed            B: words of keys by query
 *
 * In bf16, P and dS are rounded between the products; all else is fp32. Threads share out the key/value
 * heads, each with its group of query heads. A thread's working set is a few blocks, K, V and, backward, dK
 * and dV of a head: about T x D x 14 bytes in bf16, 24 in fp32, in the second cache. */
#include "kernels/bf16.h"
#include "kernels/cpu_512.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <math.h>
#include <omp.h>

#ifdef CPU_512_BF16
#define ENTRY(name) cpu_attention_bf16_##name
#else
#define ENTRY(name) cpu_attention_512_##name
#endif

#define BLOCK 64 /* queries, and keys: four vectors */
#define WORDS (BLOCK / WORD)
#define NOTHING (-1e30f) /* a maximum of no scores; its exponential is 0, and no NaN comes of it */

/* ---- products ---------------------------------------------------------------------------------- */

/* C[4, 16 vectors] = or += A * B. */
INLINE TARGET void tile(float *c, size_t ldc, const uint32_t *a, size_t lda, const uint32_t *b, size_t ldb,
                        int words, const int vectors, int add) {
    __m512 sum[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sum[r][v] = add ? _mm512_loadu_ps(c + (size_t)r * ldc + 16 * v) : _mm512_setzero_ps();
    for (int p = 0; p < words; p++, b += ldb) {
        __m512i of_b[4];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) of_b[v] = _mm512_loadu_si512(b + 16 * v);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            __m512i of_a = _mm512_set1_epi32((int)a[(size_t)r * lda + (size_t)p]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[r][v] = multiply_add(sum[r][v], of_a, of_b[v]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) _mm512_storeu_ps(c + (size_t)r * ldc + 16 * v, sum[r][v]);
}

INLINE TARGET void tiles(float *c, size_t ldc, const uint32_t *a, size_t lda, const uint32_t *b, size_t ldb,
                         int columns, int words, int add) {
    if (columns >= 64) tile(c, ldc, a, lda, b, ldb, words, 4, add);
    else if (columns >= 48) tile(c, ldc, a, lda, b, ldb, words, 3, add);
    else if (columns >= 32) tile(c, ldc, a, lda, b, ldb, words, 2, add);
    else tile(c, ldc, a, lda, b, ldb, words, 1, add);
}

/* rows a multiple of 4, columns of 16. Strides of A and B count words. */
TARGET static void product(float *c, size_t ldc, const uint32_t *a, size_t lda, const uint32_t *b,
                           size_t ldb, int rows, int columns, int words, int add) {
    for (int j = 0; j < columns; j += BLOCK)
        for (int i = 0; i < rows; i += 4)
            tiles(c + (size_t)i * ldc + j, ldc, a + (size_t)i * lda, lda, b + j, ldb, columns - j, words,
                  add);
}

/* The same three of a block on the diagonal, where no query sees a later key, so that about a third need not
 * be computed. [key][query]: not what is before the vector of a key's own query. */
TARGET static void product_scores(float *c, const uint32_t *a, size_t lda, const uint32_t *b, int words,
                                  int diagonal) {
    for (int i = 0; i < BLOCK; i += 4) {
        int from = diagonal ? i / 16 * 16 : 0;
        tiles(c + i * BLOCK + from, BLOCK, a + (size_t)i * lda, lda, b + from, BLOCK, BLOCK - from, words, 0);
    }
}

/* [key][d] += [key] words of queries * ...: not the words before a key's own query. */
TARGET static void product_keys(float *c, size_t ldc, const element *a, const uint32_t *b, int columns,
                                int diagonal) {
    for (int j = 0; j < columns; j += BLOCK)
        for (int i = 0; i < BLOCK; i += 4) {
            int from = diagonal ? i / WORD : 0;
            tiles(c + (size_t)i * ldc + j, ldc, (const uint32_t *)(const void *)a + i * WORDS + from, WORDS,
                  b + (size_t)from * ldc + j, ldc, columns - j, WORDS - from, 1);
        }
}

/* [d][query] = or += [d] words of keys * ...: of the first half of the queries only the first half of the
 * keys. */
TARGET static void product_turned(float *c, const uint32_t *a, size_t lda, const uint32_t *b, int rows,
                                  int add, int diagonal) {
    if (!diagonal) {
        product(c, BLOCK, a, lda, b, BLOCK, rows, BLOCK, WORDS, add);
        return;
    }
    product(c, BLOCK, a, lda, b, BLOCK, rows, BLOCK / 2, WORDS / 2, add);
    product(c + BLOCK / 2, BLOCK, a, lda, b + BLOCK / 2, BLOCK, rows, BLOCK / 2, WORDS, add);
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

/* 16 elements of WORD rows, rounded: one row behind the other. */
INLINE TARGET __m512i round_rows(const __m512 row[WORD]) {
#ifdef CPU_512_BF16
    return (__m512i)_mm512_cvtne2ps_pbh(row[1], row[0]);
#else
    return _mm512_castps_si512(row[0]);
#endif
}

/* As a row of words: the first in the lower halves. */
INLINE TARGET void put_words(uint32_t *to, __m512i rows) {
#ifdef CPU_512_BF16
    const __m512i by_turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    rows = _mm512_permutexvar_epi16(by_turns, rows);
#endif
    _mm512_storeu_si512(to, rows);
}

/* As rows, BLOCK elements apart. */
INLINE TARGET void put_rows(element *to, __m512i rows) {
#ifdef CPU_512_BF16
    _mm256_storeu_si256((__m256i *)to, _mm512_castsi512_si256(rows));
    _mm256_storeu_si256((__m256i *)(to + BLOCK), _mm512_extracti64x4_epi64(rows, 1));
#else
    _mm512_storeu_si512(to, rows);
#endif
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
    uint32_t *key, *value;      /* [keys][D / WORD] */
    uint32_t *key_t, *value_t;  /* [D4][keys / WORD] */
    uint32_t *query_t, *dout_t; /* [D / WORD][BLOCK] */
    uint32_t *query_w, *dout_w; /* [WORDS][D16] */
    uint32_t *word;             /* [WORDS][BLOCK] of P or dS, words of keys */
    element *p, *ds;            /* [BLOCK][BLOCK], words of queries */
    float *score;               /* [BLOCK][BLOCK], forward */
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
        { &s->key, keys * D / WORD },      { &s->value, keys * D / WORD },
        { &s->key_t, keys / WORD * D4 },   { &s->value_t, keys / WORD * D4 },
        { &s->query_t, BLOCK * D / WORD }, { &s->dout_t, BLOCK * D / WORD },
        { &s->query_w, WORDS * D16 },      { &s->dout_w, WORDS * D16 },
        { &s->word, WORDS * BLOCK },       { &s->p, WORDS * BLOCK },
        { &s->ds, WORDS * BLOCK },         { &s->score, BLOCK * BLOCK },
        { &s->turned, BLOCK * D4 },        { &s->dkey, keys * D16 },
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

/* Rows of words, [T][D / WORD] close together; the rest up to `rows` is zero. */
static void copy_rows(uint32_t *to, const element *from, size_t stride, int T, int rows, int D) {
    size_t words = (size_t)(D / WORD), bytes = (size_t)D * sizeof *from;
    for (size_t t = 0; t < (size_t)T; t++) memcpy(to + t * words, from + t * stride, bytes);
    memset(to + (size_t)T * words, 0, (size_t)(rows - T) * bytes);
}

/* A word of the elements at d of WORD rows. */
INLINE TARGET uint32_t word_of(const element *const row[WORD], int d) {
#ifdef CPU_512_BF16
    return row[0][d] | (uint32_t)row[1][d] << 16;
#else
    uint32_t word;
    memcpy(&word, row[0] + d, sizeof word);
    return word;
#endif
}

/* to[D4][keys / WORD] from rows [keys][D] close together. */
TARGET static void transpose_words(uint32_t *to, const uint32_t *rows, int keys, int D, int D4) {
    const element *x = (const void *)rows;
    size_t words = (size_t)keys / WORD;
    for (size_t t = 0; t < words; t++, x += WORD * D)
        for (int d = 0; d < D; d++)
            to[(size_t)d * words + t] = word_of((const element *const[2]){ x, x + D }, d);
    for (int d = D; d < D4; d++) memset(to + (size_t)d * words, 0, words * sizeof *to);
}

TARGET static void words_of_rows(uint32_t *to, const element *const row[WORD], int D) {
#pragma omp simd
    for (int d = 0; d < D; d++) to[d] = word_of(row, d);
}

/* A block of rows both ways: by d, and (unless NULL) by row. Rows from `count` on are zero. */
TARGET static void turn_block(uint32_t *by_d, uint32_t *by_row, const element *from, size_t stride,
                              int count, int D, int D16) {
    static const element nothing[CPU_ATTENTION_D_MAX];
    const element *row[BLOCK];
    int words = D / WORD;
    for (int t = 0; t < BLOCK; t++) row[t] = t < count ? from + (size_t)t * stride : nothing;
    for (int t = 0; t < BLOCK; t += 16)
        for (int i = 0; i < words; i += 16) {
            __m512i x[16];
            int n = words - i < 16 ? words - i : 16;
            for (int j = 0; j < 16; j++)
                x[j] = _mm512_maskz_loadu_epi32((__mmask16)(0xffff >> (16 - n)), row[t + j] + WORD * i);
            transpose(x);
            for (int j = 0; j < n; j++) _mm512_storeu_si512(by_d + (i + j) * BLOCK + t, x[j]);
        }
    for (int t = 0; by_row && t < WORDS; t++) {
        words_of_rows(by_row + t * D16, row + WORD * t, D);
        memset(by_row + t * D16 + D, 0, (size_t)(D16 - D) * sizeof *by_row);
    }
}

/* D elements of x, which has room for whole vectors, times factor. */
TARGET static void put_row(element *to, const float *x, float factor, int D) {
    __m512 f = _mm512_set1_ps(factor);
    for (int d = 0; d < D; d += 16)
        put_elements(to + d, lanes(D - d), _mm512_mul_ps(_mm512_loadu_ps(x + d), f));
}

/* x[D][BLOCK] as `count` rows of D elements, row t times factor[t]. */
TARGET static void put_turned(element *to, size_t stride, const float *x, const float *factor, int count,
                              int D) {
    for (int t = 0; t < count; t += 16)
        for (int d = 0; d < D; d += 16) {
            __m512i column[16];
            int n = D - d < 16 ? D - d : 16;
            for (int i = 0; i < 16; i++)
                column[i] = i < n ? _mm512_loadu_si512(x + (d + i) * BLOCK + t) : _mm512_setzero_si512();
            transpose(column);
            for (int i = 0; i < 16 && t + i < count; i++)
                put_elements(to + (size_t)(t + i) * stride + d, lanes(n),
                             _mm512_mul_ps(_mm512_castsi512_ps(column[i]), _mm512_set1_ps(factor[t + i])));
        }
}

/* Rows lie far apart, so nobody else foresees them: they come to the second cache while the block before them
 * is worked on. */
INLINE TARGET void call_for(const element *rows, size_t stride, int first, int end, int D) {
    for (int t = first; t < end; t++)
        for (int d = 0; d < D; d += 64 / (int)sizeof *rows)
            __builtin_prefetch(rows + (size_t)t * stride + d, 0, 2);
}

/* The rows at t are [0, BLOCK); the next block's end here. */
static int next_end(const struct shape *a, int t) { return a->T - t < 2 * BLOCK ? a->T - t : 2 * BLOCK; }

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

INLINE TARGET __mmask16 sees(const struct sight *s, int v, int key, const int cut) {
    __m512i k = _mm512_set1_epi32(key);
    return cut ? _mm512_cmple_epi32_mask(k, s->to[v]) & _mm512_cmpge_epi32_mask(k, s->from[v])
               : (__mmask16)-1;
}

/* ---- forward ----------------------------------------------------------------------------------- */

/* Scores of one vector of queries and the first `keys` keys to probabilities as words of keys; maximum and
 * sum go on. Scores count in powers of two: by `factor`. What is taken for the maximum follows it only when
 * it is passed by more than ROOM. Returns the lanes in which it was; what they added up so far is to be
 * multiplied by *again. */
#define ROOM 8.0f
INLINE TARGET __mmask16 soften(struct scratch *s, const struct sight *sight, int v, int keys, int u,
                               const int cut, float factor, __m512 *again) {
    const float *score = s->score + 16 * v;
    const __m512 f = _mm512_set1_ps(factor);
    __m512 max = _mm512_loadu_ps(s->max + 16 * v), sum = _mm512_loadu_ps(s->sum + 16 * v), part[4];
    for (int j = 0; j < 4; j++) part[j] = _mm512_set1_ps(NOTHING);
    for (int i = 0; i < keys; i += 4)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            part[j] = _mm512_mask_max_ps(part[j], sees(sight, v, u + i + j, cut), part[j],
                                         _mm512_loadu_ps(score + (i + j) * BLOCK));
    __m512 most = _mm512_max_ps(_mm512_max_ps(part[0], part[1]), _mm512_max_ps(part[2], part[3]));
    most = _mm512_mul_ps(f, most);
    __mmask16 grown = _mm512_cmp_ps_mask(_mm512_sub_ps(most, max), _mm512_set1_ps(ROOM), _CMP_GT_OQ);
    if (grown) {
        __m512 now = _mm512_mask_mov_ps(max, grown, most);
        *again = exp2_of(_mm512_sub_ps(max, now));
        sum = _mm512_mul_ps(*again, sum);
        max = now;
    }
    for (int i = 0; i < keys; i += WORD) {
        __m512 p[WORD];
#pragma GCC unroll 2
        for (int j = 0; j < WORD; j++) {
            __m512 x = _mm512_fmsub_ps(f, _mm512_loadu_ps(score + (i + j) * BLOCK), max);
            p[j] = _mm512_maskz_mov_ps(sees(sight, v, u + i + j, cut), exp2_of(x));
            sum = _mm512_add_ps(sum, p[j]);
        }
        put_words(s->word + i / WORD * BLOCK + 16 * v, round_rows(p));
    }
    _mm512_storeu_ps(s->max + 16 * v, max);
    _mm512_storeu_ps(s->sum + 16 * v, sum);
    return grown;
}

/* Of a block on the diagonal, the keys that vector v of queries may see; the words of the others are zero. */
TARGET static int keys_of(struct scratch *s, int v, int diagonal) {
    int keys = diagonal ? 16 * (v + 1) : BLOCK;
    for (int i = keys; i < BLOCK; i += WORD)
        _mm512_storeu_si512(s->word + i / WORD * BLOCK + 16 * v, _mm512_setzero_si512());
    return keys;
}

TARGET static void forward_keys(struct scratch *s, const struct shape *a, const struct sight *sight, int u,
                                int cut, int first, int diagonal) {
    size_t width = (size_t)a->D / WORD, words = (size_t)a->keys / WORD;
    float factor = a->scale * (float)M_LOG2E;
    product_scores(s->score, s->key + (size_t)u * width, width, s->query_t, a->D / WORD, diagonal);
    for (int v = 0; v < 4; v++) {
        __m512 again = _mm512_set1_ps(1);
        int keys = keys_of(s, v, diagonal);
        __mmask16 grown = cut ? soften(s, sight, v, keys, u, 1, factor, &again)
                              : soften(s, sight, v, keys, u, 0, factor, &again);
        for (int d = 0; grown && !first && d < a->D; d++) {
            float *x = s->turned + d * BLOCK + 16 * v;
            _mm512_storeu_ps(x, _mm512_mul_ps(again, _mm512_loadu_ps(x)));
        }
    }
    product_turned(s->turned, s->value_t + u / WORD, words, s->word, a->D4, !first, diagonal);
}

/* Queries [t, t + count) of one head, whose rows of q and out begin at t. */
TARGET static void forward_block(struct scratch *s, const struct shape *a, element *out, float *lse,
                                 const element *query, int t, int count) {
    struct sight sight;
    sight_of(&sight, a, t, count);
    turn_block(s->query_t, NULL, query, a->stride, count, a->D, a->D16);
    call_for(query, a->stride, BLOCK, next_end(a, t), a->D);
    call_for(out, a->out_stride, 0, count, a->D);
    for (int i = 0; i < BLOCK; i++) s->max[i] = NOTHING, s->sum[i] = 0;
    int first = first_block(a, t);
    for (int u = first; u < t + count; u += BLOCK)
        forward_keys(s, a, &sight, u, is_cut(a, t, count, u), u == first, u == t);
    for (int i = 0; i < count; i++) {
        lse[i] = s->max[i] * (float)M_LN2 + logf(s->sum[i]); /* cppcheck-suppress invalidFunctionArg */
        s->sum[i] = 1.0f / s->sum[i];
    }
    put_turned(out, a->out_stride, s->turned, s->sum, count, a->D);
}

static void forward_group(struct scratch *s, const struct shape *a, element *out, float *lse,
                          const element *query, const element *key, const element *value) {
    copy_rows(s->key, key, a->stride, a->T, a->keys, a->D);
    copy_rows(s->value, value, a->stride, a->T, a->keys, a->D);
    transpose_words(s->value_t, s->value, a->keys, a->D, a->D4);
    for (int h = 0; h < a->group; h++)
        for (int t = 0; t < a->T; t += BLOCK)
            forward_block(s, a, out + (size_t)t * a->out_stride + h * a->D, lse + (size_t)h * a->T + t,
                          query + (size_t)t * a->stride + h * a->D, t, a->T - t < BLOCK ? a->T - t : BLOCK);
}

/* ---- backward ---------------------------------------------------------------------------------- */

/* P and dS of 4 keys from i on and 2 vectors of queries from v on, as rows, dS as words of keys too. Scores and dP
 * stay in registers until that is done. */
INLINE TARGET void harden(struct scratch *s, const struct shape *a, const struct sight *sight, int i, int v,
                          int u, const int cut, float factor) {
    size_t width = (size_t)a->D / WORD, at = (size_t)(u + i) * width;
    const uint32_t *key = s->key + at, *value = s->value + at;
    const uint32_t *query = s->query_t + 16 * v, *dout = s->dout_t + 16 * v;
    __m512 score[4][2], dp[4][2];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) score[r][j] = dp[r][j] = _mm512_setzero_ps();
    for (size_t d = 0; d < width; d++, query += BLOCK, dout += BLOCK) {
        __m512i q[2] = { _mm512_loadu_si512(query), _mm512_loadu_si512(query + 16) };
        __m512i o[2] = { _mm512_loadu_si512(dout), _mm512_loadu_si512(dout + 16) };
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            __m512i of_key = _mm512_set1_epi32((int)key[(size_t)r * width + d]),
                    of_value = _mm512_set1_epi32((int)value[(size_t)r * width + d]);
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                score[r][j] = multiply_add(score[r][j], of_key, q[j]);
                dp[r][j] = multiply_add(dp[r][j], of_value, o[j]);
            }
        }
    }
    const __m512 f = _mm512_set1_ps(factor);
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
        __m512 lse = _mm512_loadu_ps(s->lse + 16 * (v + j)), delta = _mm512_loadu_ps(s->delta + 16 * (v + j));
#pragma GCC unroll 4
        for (int r = 0; r < 4; r += WORD) {
            __m512 p[WORD], ds[WORD];
            int to = (i + r) * BLOCK + 16 * (v + j);
#pragma GCC unroll 2
            for (int w = 0; w < WORD; w++) {
                __m512 x = exp2_of(_mm512_fmsub_ps(f, score[r + w][j], lse));
                p[w] = _mm512_maskz_mov_ps(sees(sight, v + j, u + i + r + w, cut), x);
                ds[w] = _mm512_mul_ps(p[w], _mm512_sub_ps(dp[r + w][j], delta));
            }
            __m512i rounded = round_rows(ds);
            put_rows(s->p + to, round_rows(p));
            put_rows(s->ds + to, rounded);
            put_words(s->word + (i + r) / WORD * BLOCK + 16 * (v + j), rounded);
        }
    }
}

/* Of a block on the diagonal, what the products below leave out is left out here too. Not inlined: the compiler
 * would keep less in registers. */
__attribute__((noinline)) TARGET static void harden_block(struct scratch *s, const struct shape *a, const struct sight *sight, int u,
                                int cut, int diagonal, float factor) {
    for (int i = 0; i < BLOCK; i += 4)
        for (int v = diagonal ? i / 32 * 2 : 0; v < 4; v += 2)
            if (cut) harden(s, a, sight, i, v, u, 1, factor);
            else harden(s, a, sight, i, v, u, 0, factor);
}

TARGET static void backward_keys(struct scratch *s, const struct shape *a, const struct sight *sight, int u,
                                 int cut, int first, int diagonal) {
    size_t words = (size_t)a->keys / WORD, wide = (size_t)a->D16, sums = (size_t)u * wide;
    harden_block(s, a, sight, u, cut, diagonal, a->scale * (float)M_LOG2E);
    product_keys(s->dvalue + sums, wide, s->p, s->dout_w, a->D16, diagonal);
    product_keys(s->dkey + sums, wide, s->ds, s->query_w, a->D16, diagonal);
    product_turned(s->turned, s->key_t + u / WORD, words, s->word, a->D4, !first, diagonal);
}

static float value_of(element x) {
#ifdef CPU_512_BF16
    return bf16_widen(x);
#else
    return x;
#endif
}

TARGET static float dot(const element *x, const element *y, int n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += value_of(x[i]) * value_of(y[i]);
    return sum;
}

TARGET static void backward_block(struct scratch *s, const struct shape *a, element *dquery,
                                  const element *dout, const element *query, const element *out,
                                  const float *lse, int t, int count) {
    struct sight sight;
    sight_of(&sight, a, t, count);
    turn_block(s->query_t, s->query_w, query, a->stride, count, a->D, a->D16);
    turn_block(s->dout_t, s->dout_w, dout, a->out_stride, count, a->D, a->D16);
    call_for(query, a->stride, BLOCK, next_end(a, t), a->D);
    call_for(dout, a->out_stride, BLOCK, next_end(a, t), a->D);
    call_for(out, a->out_stride, BLOCK, next_end(a, t), a->D);
    call_for(dquery, a->stride, 0, count, a->D);
    for (int i = 0; i < BLOCK; i++) {
        s->lse[i] = i < count ? lse[i] * (float)M_LOG2E : 0;
        s->delta[i] =
            i < count ? dot(dout + (size_t)i * a->out_stride, out + (size_t)i * a->out_stride, a->D) : 0;
    }
    int first = first_block(a, t);
    for (int u = first; u < t + count; u += BLOCK)
        backward_keys(s, a, &sight, u, is_cut(a, t, count, u), u == first, u == t);
    for (int i = 0; i < BLOCK; i++) s->sum[i] = a->scale;
    put_turned(dquery, a->stride, s->turned, s->sum, count, a->D);
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

static void backward_group(struct scratch *s, const struct shape *a, struct heads at, element *dqkv,
                           const element *dout, const element *qkv, const element *out, const float *lse) {
    copy_rows(s->key, qkv + at.key, a->stride, a->T, a->keys, a->D);
    copy_rows(s->value, qkv + at.value, a->stride, a->T, a->keys, a->D);
    transpose_words(s->key_t, s->key, a->keys, a->D, a->D4);
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
        put_row(dqkv + at.key + t * a->stride, s->dkey + t * (size_t)a->D16, a->scale, a->D);
        put_row(dqkv + at.value + t * a->stride, s->dvalue + t * (size_t)a->D16, 1, a->D);
    }
}

/* ---- entries ----------------------------------------------------------------------------------- */

static int threads_for(const struct cpu *cpu, int B, int T, int H, int D) {
    return CPU_WORTH_IT((size_t)B * (size_t)H * (size_t)T * (size_t)T * (size_t)D / 16) ? cpu->threads : 1;
}

void ENTRY(forward)(const struct kernels *k, void *out, float *lse, const void *qkv, const int32_t *start,
                    int B, int T, int H, int KV, int D) {
    struct cpu *cpu = cpu_of(k);
    struct shape whole = shape_of(NULL, T, H, KV, D);
    float *memory = cpu_scratch(cpu, scratch_lay_out(&(struct scratch){ 0 }, NULL, &whole));
    const element *x = qkv;
    if (!memory) return;
#pragma omp parallel for num_threads(threads_for(cpu, B, T, H, D)) collapse(2) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int kv = 0; kv < KV; kv++) {
            struct scratch s;
            struct shape a = shape_of(start ? start + (size_t)b * (size_t)T : NULL, T, H, KV, D);
            struct heads at = heads_of(b, kv, T, H, KV, D);
            scratch_lay_out(&s, memory + (size_t)omp_get_thread_num() * cpu->scratch_floats, &a);
            forward_group(&s, &a, (element *)out + at.out, lse + at.lse, x + at.query, x + at.key,
                          x + at.value);
        }
}

void ENTRY(backward)(const struct kernels *k, void *dqkv, const void *dout, const void *qkv,
                     const void *out, const float *lse, const int32_t *start, int B, int T, int H, int KV,
                     int D) {
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

size_t ENTRY(scratch)(int T, int H, int KV, int D) {
    struct shape a = shape_of(NULL, T, H, KV, D);
    return scratch_lay_out(&(struct scratch){ 0 }, NULL, &a) * sizeof(float);
}

int ENTRY(can)(int D) { return D <= CPU_ATTENTION_D_MAX && processor_can(); }

#endif
