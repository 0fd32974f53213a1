/* bpe.c - byte pair encoding of one word; see bpe.h. */
#include "node/bpe.h"

#include <assert.h>
#include <sodium.h>
#include <stdlib.h>
#include <string.h>

#define NO_RANK UINT32_MAX
#define NO_PAIR UINT64_MAX
#define SHORT_WORD 64 /* of up to so many bytes: the best pair is looked for anew after each merge */

struct token {
    uint32_t at, n; /* in b->bytes */
};

struct merge {
    uint64_t pair; /* left << 32 | right, or NO_PAIR */
    uint32_t rank, merged;
};

struct bpe {
    uint64_t seed; /* of the tables: a file made to collide would collide with one seed only */
    uint32_t vocabulary;
    bool whole_words;
    struct token *token; /* [vocabulary] */
    char *bytes;
    size_t bytes_used;
    size_t longest; /* bytes of the longest token */
    int32_t byte[256]; /* token of a single byte */
    struct merge *merge;
    size_t merge_mask;
    int32_t *by_bytes; /* token by its bytes, -1 */
    size_t by_bytes_mask;
};

static uint64_t mix(uint64_t x) { /* splitmix64's finaliser */
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static uint64_t hash_bytes(uint64_t seed, const char *bytes, size_t n) {
    uint64_t h = mix(seed ^ n), eight;
    for (; n >= 8; bytes += 8, n -= 8) {
        memcpy(&eight, bytes, 8);
        h = mix(h ^ eight);
    }
    eight = 0;
    memcpy(&eight, bytes, n);
    return mix(h ^ eight);
}

static size_t table_size(size_t entries) {
    size_t size = 16;
    while (size < 2 * entries) size *= 2;
    return size;
}

struct bpe *bpe_create(uint32_t vocabulary, uint32_t merges, size_t token_bytes, bool whole_words,
                       struct err *err) {
    struct bpe *b = calloc(1, sizeof *b);
    size_t merge_slots = table_size(merges), byte_slots = table_size(vocabulary);
    if (b) {
        b->token = calloc(vocabulary, sizeof *b->token);
        b->bytes = malloc(token_bytes + 1);
        b->merge = malloc(merge_slots * sizeof *b->merge);
        b->by_bytes = malloc(byte_slots * sizeof *b->by_bytes);
    }
    if (!b || !b->token || !b->bytes || !b->merge || !b->by_bytes) {
        err_set(err, ERR_MEMORY, "no memory for a vocabulary of %u with %u merges", vocabulary, merges);
        bpe_destroy(b);
        return NULL;
    }
    randombytes_buf(&b->seed, sizeof b->seed);
    b->vocabulary = vocabulary;
    b->whole_words = whole_words;
    b->merge_mask = merge_slots - 1;
    b->by_bytes_mask = byte_slots - 1;
    for (size_t i = 0; i < merge_slots; i++) b->merge[i].pair = NO_PAIR;
    memset(b->by_bytes, 0xff, byte_slots * sizeof *b->by_bytes);
    memset(b->byte, 0xff, sizeof b->byte);
    return b;
}

void bpe_destroy(struct bpe *b) {
    if (!b) return;
    free(b->token);
    free(b->bytes);
    free(b->merge);
    free(b->by_bytes);
    free(b);
}

/* The slot of these bytes: theirs, or the free one where they belong. */
static size_t slot_of(const struct bpe *b, const char *bytes, size_t n) {
    size_t i = hash_bytes(b->seed, bytes, n) & b->by_bytes_mask;
    for (;; i = (i + 1) & b->by_bytes_mask) {
        if (b->by_bytes[i] < 0) return i;
        const struct token *t = &b->token[b->by_bytes[i]];
        if (t->n == n && !memcmp(b->bytes + t->at, bytes, n)) return i;
    }
}

void bpe_add_token(struct bpe *b, uint32_t id, const char *bytes, size_t n) {
    size_t slot = slot_of(b, bytes, n);
    assert(id < b->vocabulary && n && !b->token[id].n && b->by_bytes[slot] < 0);
    b->token[id] = (struct token){ (uint32_t)b->bytes_used, (uint32_t)n };
    memcpy(b->bytes + b->bytes_used, bytes, n);
    b->bytes_used += n;
    b->by_bytes[slot] = (int32_t)id;
    if (n > b->longest) b->longest = n;
    if (n == 1) b->byte[(unsigned char)bytes[0]] = (int32_t)id;
}

int32_t bpe_find(const struct bpe *b, const char *bytes, size_t n) {
    return n && n <= b->longest ? b->by_bytes[slot_of(b, bytes, n)] : -1;
}

const char *bpe_token(const struct bpe *b, uint32_t id, size_t *n) {
    *n = id < b->vocabulary ? b->token[id].n : 0;
    return *n ? b->bytes + b->token[id].at : NULL;
}

static struct merge *merge_slot(const struct bpe *b, uint32_t left, uint32_t right) {
    uint64_t pair = (uint64_t)left << 32 | right;
    size_t i = mix(pair ^ b->seed) & b->merge_mask;
    while (b->merge[i].pair != pair && b->merge[i].pair != NO_PAIR) i = (i + 1) & b->merge_mask;
    return &b->merge[i];
}

void bpe_add_merge(struct bpe *b, uint32_t rank, uint32_t left, uint32_t right, uint32_t merged) {
    struct merge *m = merge_slot(b, left, right);
    *m = (struct merge){ (uint64_t)left << 32 | right, rank, merged };
}

static uint32_t rank_of(const struct bpe *b, int32_t left, int32_t right) {
    const struct merge *m = merge_slot(b, (uint32_t)left, (uint32_t)right);
    return m->pair == NO_PAIR ? NO_RANK : m->rank;
}

static int32_t merged_of(const struct bpe *b, int32_t left, int32_t right) {
    return (int32_t)merge_slot(b, (uint32_t)left, (uint32_t)right)->merged;
}

/* ---- short words ------------------------------------------------------------------------------- */

static size_t encode_short(const struct bpe *b, const char *word, size_t n, int32_t *id) {
    uint32_t rank[SHORT_WORD]; /* of the pair at i and i + 1 */
    for (size_t i = 0; i < n; i++) id[i] = b->byte[(unsigned char)word[i]];
    for (size_t i = 0; i + 1 < n; i++) rank[i] = rank_of(b, id[i], id[i + 1]);
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (rank[i] < rank[best]) best = i;
        if (rank[best] == NO_RANK) break;
        id[best] = merged_of(b, id[best], id[best + 1]);
        n--;
        memmove(id + best + 1, id + best + 2, (n - best - 1) * sizeof *id);
        memmove(rank + best, rank + best + 1, (n - best) * sizeof *rank);
        if (best) rank[best - 1] = rank_of(b, id[best - 1], id[best]);
        if (best + 1 < n) rank[best] = rank_of(b, id[best], id[best + 1]);
    }
    return n;
}

/* ---- long words --------------------------------------------------------------------------------
 * A linked list of the tokens so far, and a heap of the pairs that can be merged. A pair stays in the
 * heap when one of its tokens goes into another; it is then no longer what the heap says, and skipped. */

#define NOWHERE UINT32_MAX

struct symbol {
    int32_t id; /* -1: went into the one before it */
    uint32_t previous, next;
};

struct candidate {
    uint32_t rank, at;
    int32_t left, right;
};

#define KEY_WORDS 3
#define KEY_BYTES (8 * KEY_WORDS - 1)
#define CACHED_IDS 9
#define CACHE_SLOTS ((size_t)1 << 16)

/* A word and its ids; the last byte of the key is the word's length, so none is all zero. */
struct cached {
    uint64_t key[KEY_WORDS];
    uint32_t count;
    int32_t id[CACHED_IDS];
};

struct bpe_worker {
    struct cached *cache;
    struct symbol *symbol; /* [room] */
    struct candidate *heap; /* [3 * room]: n - 1 at first, two more per merge */
    size_t room, heap_n;
};

static bool before(const struct candidate *a, const struct candidate *b) {
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

static void heap_push(struct bpe_worker *w, struct candidate c) {
    size_t i = w->heap_n++;
    for (; i && before(&c, &w->heap[(i - 1) / 2]); i = (i - 1) / 2) w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = c;
}

static struct candidate heap_pop(struct bpe_worker *w) {
    struct candidate top = w->heap[0], last = w->heap[--w->heap_n];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < w->heap_n; i = child) {
        if (child + 1 < w->heap_n && before(&w->heap[child + 1], &w->heap[child])) child++;
        if (!before(&w->heap[child], &last)) break;
        w->heap[i] = w->heap[child];
    }
    w->heap[i] = last;
    return top;
}

static void consider(const struct bpe *b, struct bpe_worker *w, uint32_t at) {
    if (at == NOWHERE || w->symbol[at].next == NOWHERE) return;
    int32_t left = w->symbol[at].id, right = w->symbol[w->symbol[at].next].id;
    uint32_t rank = rank_of(b, left, right);
    if (rank != NO_RANK) heap_push(w, (struct candidate){ rank, at, left, right });
}

static bool still_there(const struct bpe_worker *w, const struct candidate *c) {
    const struct symbol *s = &w->symbol[c->at];
    return s->id == c->left && s->next != NOWHERE && w->symbol[s->next].id == c->right;
}

static void merge_at(const struct bpe *b, struct bpe_worker *w, const struct candidate *c) {
    struct symbol *left = &w->symbol[c->at], *right = &w->symbol[left->next];
    left->id = merged_of(b, c->left, c->right);
    right->id = -1;
    left->next = right->next;
    if (left->next != NOWHERE) w->symbol[left->next].previous = c->at;
    consider(b, w, left->previous);
    consider(b, w, c->at);
}

static int reserve(struct bpe_worker *w, size_t n, struct err *err) {
    if (n <= w->room) return 0;
    if (n >= NOWHERE / 4) return err_set(err, ERR_UNSUPPORTED, "a word of %zu bytes", n);
    free(w->symbol);
    free(w->heap);
    w->room = 2 * n;
    w->symbol = malloc(w->room * sizeof *w->symbol);
    w->heap = malloc(3 * w->room * sizeof *w->heap);
    if (w->symbol && w->heap) return 0;
    w->room = 0;
    return err_set(err, ERR_MEMORY, "no memory for a word of %zu bytes", n);
}

static size_t encode_long(const struct bpe *b, struct bpe_worker *w, const char *word, size_t n, int32_t *out,
                          struct err *err) {
    if (reserve(w, n, err)) return 0;
    for (uint32_t i = 0; i < n; i++)
        w->symbol[i] = (struct symbol){ b->byte[(unsigned char)word[i]], i ? i - 1 : NOWHERE,
                                        i + 1 < n ? i + 1 : NOWHERE };
    w->heap_n = 0;
    for (uint32_t i = 0; i + 1 < n; i++) consider(b, w, i);
    while (w->heap_n) {
        struct candidate c = heap_pop(w);
        if (still_there(w, &c)) merge_at(b, w, &c);
    }
    size_t count = 0;
    for (uint32_t i = 0; i != NOWHERE; i = w->symbol[i].next) out[count++] = w->symbol[i].id;
    return count;
}

/* ---- words ------------------------------------------------------------------------------------- */

struct bpe_worker *bpe_worker_create(struct err *err) {
    struct bpe_worker *w = calloc(1, sizeof *w);
    if (w && (w->cache = calloc(CACHE_SLOTS, sizeof *w->cache))) return w;
    free(w);
    err_set(err, ERR_MEMORY, "no memory for a cache of words");
    return NULL;
}

void bpe_worker_destroy(struct bpe_worker *w) {
    if (!w) return;
    free(w->cache);
    free(w->symbol);
    free(w->heap);
    free(w);
}

static size_t encode_new(const struct bpe *b, struct bpe_worker *w, const char *word, size_t n, int32_t *out,
                         struct err *err) {
    int32_t whole = b->whole_words ? bpe_find(b, word, n) : -1;
    if (whole >= 0) {
        out[0] = whole;
        return 1;
    }
    return n <= SHORT_WORD ? encode_short(b, word, n, out) : encode_long(b, w, word, n, out, err);
}

static struct cached *cache_slot(struct bpe_worker *w, const char *word, size_t n, size_t readable,
                                 uint64_t key[KEY_WORDS]) {
    key[0] = key[1] = key[2] = 0;
    if (readable >= 8 * KEY_WORDS) {
        static const unsigned char mask[2 * 8 * KEY_WORDS] = { /* 24 times 0xff, then zeros */
            255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255,
            255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255,
        };
        uint64_t keep[KEY_WORDS];
        memcpy(key, word, 8 * KEY_WORDS);
        memcpy(keep, mask + 8 * KEY_WORDS - n, sizeof keep);
        for (int i = 0; i < KEY_WORDS; i++) key[i] &= keep[i];
    } else {
        memcpy(key, word, n);
    }
    ((unsigned char *)key)[KEY_BYTES] = (unsigned char)n;
    uint64_t h = (key[0] ^ key[1] * 0x9e3779b97f4a7c15u ^ key[2] * 0xc2b2ae3d27d4eb4fu) * 0xbf58476d1ce4e5b9u;
    return &w->cache[(h ^ h >> 32) % CACHE_SLOTS];
}

size_t bpe_encode(const struct bpe *b, struct bpe_worker *w, const char *word, size_t n, size_t readable,
                  int32_t *out, struct err *err) {
    uint64_t key[KEY_WORDS];
    if (n > KEY_BYTES) return encode_new(b, w, word, n, out, err);
    struct cached *c = cache_slot(w, word, n, readable, key);
    if (c->key[0] == key[0] && c->key[1] == key[1] && c->key[2] == key[2]) {
        for (uint32_t i = 0; i < c->count; i++) out[i] = c->id[i];
        return c->count;
    }
    size_t count = encode_new(b, w, word, n, out, err);
    if (count && count <= CACHED_IDS) {
        memcpy(c->key, key, sizeof c->key);
        c->count = (uint32_t)count;
        memcpy(c->id, out, count * sizeof *out);
    }
    return count;
}
