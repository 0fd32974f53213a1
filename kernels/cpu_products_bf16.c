/* cpu_products_bf16.c - large matrix products in bf16 on processors with AVX512-BF16 and without AMX; all
 * others are oneDNN's (cpu_products.c), which takes a hundredth or two more for these.
 *
 * A tile of C, ROWS rows of up to VECTORS vectors, stays in registers while k goes by: a word of each row of A,
 * broadcast, times a row of words of B. For that both are laid out anew, A as [words of k][ROWS], of which each
 * thread takes a block of tiles at a time, and B in panels as wide as a tile, [words of k][columns]. What is
 * worked on, a block and a panel, is in the second cache; k and the columns are cut so that it is.
 *
 * An element of C is summed by one thread in the order of k, so its bits depend neither on the threads nor on
 * how many rows there are. */
#define CPU_512_BF16
#include "kernels/cpu_512.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <assert.h>
#include <omp.h>

#define ROWS 8
#define VECTORS 3
#define WORDS_MAX 1536   /* of k at a time: a panel of 288 KiB ... */
#define TILES_MAX 12     /* ... and a block of up to 576 */
#define COLUMNS_MAX 2016 /* at a time: B in up to 12 MiB; whole panels */

struct job {
    struct cpu_product_key key;
    const element *A, *B;
    void *C;
    uint32_t *panels; /* of B */
    float *sums;      /* [rows][columns at a time]: where those of a C of fewer bits wait for the rest of k */
    int words, step;  /* of k; so many of them at a time */
    int tiles, blocks, columns;
};

static int up_to(int most, int n) { return n < most ? n : most; }

static int parts_of(int n, int most) { return (n + most - 1) / most; }

/* Where part i of `parts` equal ones of n begins. */
static int begin_of(int i, int n, int parts) { return (int)((size_t)i * (size_t)n / (size_t)parts); }

/* As many blocks as keep all threads busy to the end. */
static struct job job_of(struct cpu_product_key key, int threads, const void *A, const void *B, void *C) {
    struct job j = { .key = key, .A = A, .B = B, .C = C };
    j.words = parts_of(key.k, WORD);
    j.step = parts_of(j.words, parts_of(j.words, WORDS_MAX));
    j.tiles = parts_of(key.m, ROWS);
    j.columns = up_to(COLUMNS_MAX, parts_of(key.n, 16) * 16);
    int blocks = parts_of(j.tiles, TILES_MAX);
    blocks = parts_of(blocks > 4 * threads ? blocks : 4 * threads, threads) * threads;
    j.blocks = up_to(j.tiles, blocks);
    return j;
}

static size_t sums_floats(const struct job *j) {
    int waits = j->key.bf16_out && j->step < j->words;
    return waits ? (size_t)j->tiles * ROWS * (size_t)j->columns : 0;
}

static size_t panels_words(const struct job *j) { return (size_t)j->step * (size_t)j->columns; }

static size_t block_words(const struct job *j) {
    return (size_t)parts_of(j->tiles, j->blocks) * ROWS * (size_t)j->step;
}

/* Columns [column, column + 16 * vectors) of C, words [w, w + words) of k. */
struct piece {
    int column, vectors, panels, w, words;
};

/* The vectors of a piece that panel i has. */
static int panel_begin(const struct piece *x, int i) { return begin_of(i, x->vectors, x->panels); }

/* ---- operands ---------------------------------------------------------------------------------- */

/* A vector of words of which only the first `elements` elements lie there. */
INLINE TARGET __m512i get_words(const element *x, int elements) {
    return _mm512_maskz_loadu_epi16(elements < 32 ? (1u << elements) - 1 : ~0u, x);
}

/* Words of which each is of WORD rows, `stride` elements apart; the second may not be there. */
INLINE TARGET __m512i pair_rows(const element *x, size_t stride, __mmask16 these, int rows) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(these, x));
    if (rows < WORD) return low;
    __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(these, x + stride));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* A panel of B from [n][k] ... */
TARGET static void turn_panel(const struct job *j, const struct piece *x, int panel) {
    int begin = panel_begin(x, panel), vectors = panel_begin(x, panel + 1) - begin;
    uint32_t *to = j->panels + 16 * (size_t)begin * (size_t)x->words;
    size_t k = (size_t)j->key.k, width = (size_t)vectors * 16;
    for (int v = 0; v < vectors; v++)
        for (int p = 0; p < x->words; p += 16) {
            int column = x->column + 16 * (begin + v), columns = up_to(16, j->key.n - column);
            int at = WORD * (x->w + p);
            __m512i y[16];
            for (int i = 0; i < 16; i++)
                y[i] = i < columns ? get_words(j->B + (size_t)(column + i) * k + at, j->key.k - at)
                                   : _mm512_setzero_si512();
            transpose(y);
            for (int i = 0; i < up_to(16, x->words - p); i++)
                _mm512_storeu_si512(to + (size_t)(p + i) * width + 16 * v, y[i]);
        }
}

/* ... or word p of all panels from [k][n]. */
TARGET static void pair_panels(const struct job *j, const struct piece *x, int p) {
    size_t n = (size_t)j->key.n;
    int at = WORD * (x->w + p);
    const element *row = j->B + (size_t)at * n + x->column;
    for (int panel = 0; panel < x->panels; panel++) {
        int begin = panel_begin(x, panel), end = panel_begin(x, panel + 1);
        uint32_t *to = j->panels + 16 * ((size_t)begin * (size_t)x->words + (size_t)p * (size_t)(end - begin));
        for (int v = begin; v < end; v++, to += 16) {
            __mmask16 these = lanes(j->key.n - x->column - 16 * v);
            _mm512_storeu_si512(to, pair_rows(row + 16 * v, n, these, j->key.k - at));
        }
    }
}

INLINE TARGET void put_block_rows(uint32_t *to, size_t next_tile, __m512i rows, int tiles) {
    _mm256_storeu_si256((__m256i *)to, _mm512_castsi512_si256(rows));
    if (tiles > 1) _mm256_storeu_si256((__m256i *)(to + next_tile), _mm512_extracti64x4_epi64(rows, 1));
}

/* Tiles [first, first + tiles) of A, from [m][k] ... */
TARGET static void turn_block(uint32_t *to, const struct job *j, const struct piece *x, int first, int tiles) {
    size_t k = (size_t)j->key.k, each = (size_t)x->words * ROWS;
    for (int t = 0; t < tiles; t += 2, to += 2 * each) /* while the rows of the next two are called for */
        for (int p = 0; p < x->words; p += 16) {
            int row = ROWS * (first + t), at = WORD * (x->w + p), rows = up_to(16, j->key.m - row);
            __m512i y[16];
            for (int i = 0; i < 16; i++)
                y[i] = i < rows ? get_words(j->A + (size_t)(row + i) * k + at, j->key.k - at)
                                : _mm512_setzero_si512();
            for (int i = 0; i < 16; i++) __builtin_prefetch(j->A + (size_t)(row + 16 + i) * k + at);
            transpose(y);
            for (int i = 0; i < up_to(16, x->words - p); i++)
                put_block_rows(to + (size_t)(p + i) * ROWS, each, y[i], tiles - t);
        }
}

/* ... or from [k][m]. */
TARGET static void pair_block(uint32_t *to, const struct job *j, const struct piece *x, int first, int tiles) {
    size_t m = (size_t)j->key.m, each = (size_t)x->words * ROWS;
    for (int p = 0; p < x->words; p++, to += ROWS) {
        int at = WORD * (x->w + p);
        for (int t = 0; t < tiles; t += 2) {
            int row = ROWS * (first + t);
            __m512i y = pair_rows(j->A + (size_t)at * m + row, m, lanes(j->key.m - row), j->key.k - at);
            put_block_rows(to + (size_t)t * each, each, y, tiles - t);
        }
    }
}

/* ---- tiles ------------------------------------------------------------------------------------- */

/* A tile of C: sums begin with what is in `from`, or with nothing. */
struct goal {
    const float *from;
    void *to;
    size_t from_stride, to_stride;
    int rows, columns, rounded;
};

INLINE TARGET void put(const struct goal *g, int row, int v, __m512 sum) {
    size_t r = (size_t)row, c = 16 * (size_t)v;
    __mmask16 these = lanes(g->columns - 16 * v);
    if (g->from) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(these, g->from + r * g->from_stride + c));
    if (g->rounded) put_elements((element *)g->to + r * g->to_stride + c, these, sum);
    else _mm512_mask_storeu_ps((float *)g->to + r * g->to_stride + c, these, sum);
}

/* While all tiles of a block go by, 4 lines of `next` for each 16 words of each call the next panel to the
 * second cache. */
INLINE TARGET void tile(const struct goal *g, const uint32_t *a, const uint32_t *b, const uint32_t *next,
                        int words, const int vectors) {
    __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sum[r][v] = _mm512_setzero_ps();
    for (int line = 0; line < words; line += 16, next += 64) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) __builtin_prefetch(next + 16 * i, 0, 2);
        for (int p = line; p < up_to(words, line + 16); p++, a += ROWS, b += 16 * vectors) {
            __m512i of_b[VECTORS];
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++) of_b[v] = _mm512_loadu_si512(b + 16 * v);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                __m512i of_a = _mm512_set1_epi32((int)a[r]);
#pragma GCC unroll 3
                for (int v = 0; v < vectors; v++) sum[r][v] = multiply_add(sum[r][v], of_a, of_b[v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++)
            if (r < g->rows) put(g, r, v, sum[r][v]);
}

TARGET static void tile_of(const struct goal *g, const uint32_t *a, const uint32_t *b, const uint32_t *next,
                           int words, int vectors) {
    if (vectors == 3) tile(g, a, b, next, words, 3);
    else if (vectors == 2) tile(g, a, b, next, words, 2);
    else tile(g, a, b, next, words, 1);
}

/* Tile t from vector v of the piece on. */
static struct goal goal_of(const struct job *j, const struct piece *x, int t, int v) {
    size_t n = (size_t)j->key.n, row = (size_t)t * ROWS, wide = (size_t)j->columns;
    size_t at = row * n + (size_t)(x->column + 16 * v);
    float *sums = j->sums ? j->sums + row * wide + (size_t)(16 * v) : NULL;
    struct goal g = { .to = (float *)j->C + at, .from_stride = n, .to_stride = n };
    g.rows = up_to(ROWS, j->key.m - t * ROWS);
    g.columns = j->key.n - x->column - 16 * v;
    if (!j->key.bf16_out) {
        g.from = x->w || j->key.add ? g.to : NULL;
        return g;
    }
    g.from = x->w ? sums : NULL;
    g.from_stride = wide;
    g.rounded = x->w + x->words == j->words;
    g.to = g.rounded ? (void *)((element *)j->C + at) : sums;
    if (!g.rounded) g.to_stride = wide;
    return g;
}

static void multiply_block(const struct job *j, const struct piece *x, uint32_t *a, int block) {
    int begin = begin_of(block, j->tiles, j->blocks),
        tiles = begin_of(block + 1, j->tiles, j->blocks) - begin;
    size_t words = (size_t)x->words;
    if (j->key.transposed_a) pair_block(a, j, x, begin, tiles);
    else turn_block(a, j, x, begin, tiles);
    for (int panel = 0; panel < x->panels; panel++) {
        int v = panel_begin(x, panel), vectors = panel_begin(x, panel + 1) - v;
        const uint32_t *b = j->panels + 16 * (size_t)v * words, *next = b + 16 * (size_t)vectors * words;
        for (int t = 0; t < tiles; t++) {
            struct goal g = goal_of(j, x, begin + t, v);
            tile_of(&g, a + (size_t)t * ROWS * words, b, next + (size_t)t * 4 * words, x->words, vectors);
        }
    }
}

/* ---- entries ----------------------------------------------------------------------------------- */

/* One thread where the product takes less than waking others would. */
static int threads_for(const struct cpu *cpu, const struct job *j) {
    return CPU_WORTH_IT((size_t)j->key.m * (size_t)j->key.n * (size_t)j->key.k / 16) ? cpu->threads : 1;
}

static void multiply(const struct cpu *cpu, const struct job *j) {
#pragma omp parallel num_threads(threads_for(cpu, j))
    {
        float *own = cpu->scratch + (size_t)omp_get_thread_num() * cpu->scratch_floats;
        for (int column = 0; column < j->key.n; column += j->columns)
            for (int w = 0; w < j->words; w += j->step) {
                struct piece x = { .column = column, .w = w, .words = up_to(j->step, j->words - w) };
                x.vectors = parts_of(up_to(j->columns, j->key.n - column), 16);
                x.panels = parts_of(x.vectors, VECTORS);
#pragma omp for schedule(dynamic) nowait
                for (int panel = 0; panel < (j->key.transposed_b ? x.panels : 0); panel++)
                    turn_panel(j, &x, panel);
#pragma omp for schedule(static)
                for (int p = 0; p < (j->key.transposed_b ? 0 : x.words); p++) pair_panels(j, &x, p);
#pragma omp for schedule(dynamic)
                for (int block = 0; block < j->blocks; block++)
                    multiply_block(j, &x, (uint32_t *)(void *)own, block);
            }
    }
}

int cpu_products_bf16_can(struct cpu_product_key key) {
    return key.m >= 64 && key.n >= 1024 && key.k >= 1024 && processor_can();
}

void cpu_products_bf16_bytes(struct cpu_product_key key, int threads, size_t *shared, size_t *own) {
    struct job j = job_of(key, threads, NULL, NULL, NULL);
    *shared = (panels_words(&j) + sums_floats(&j)) * sizeof(float);
    *own = block_words(&j) * sizeof(float);
}

void cpu_products_bf16_multiply(struct cpu *cpu, struct cpu_product_key key, const void *A, const void *B,
                                void *C) {
    struct job j = job_of(key, cpu->threads, A, B, C);
    assert(!(key.bf16_out && key.add));
    j.panels = cpu_buffer(cpu, CPU_PACKED, (panels_words(&j) + sums_floats(&j)) * sizeof(float));
    if (!j.panels || !cpu_scratch(cpu, block_words(&j))) return;
    if (sums_floats(&j)) j.sums = (float *)(void *)j.panels + panels_words(&j);
    multiply(cpu, &j);
}

#endif
