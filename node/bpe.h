/* bpe.h - byte pair encoding of one word: its bytes are tokens, and the pair of neighbours that stands
 * first in the list of merges, the leftmost of its kind, becomes one token, until no pair is in the list
 * (Sennrich et al. 2016, arXiv:1508.07909). What a word is, is not known here. */
#ifndef INTELLECT_NODE_BPE_H
#define INTELLECT_NODE_BPE_H

#include "proto/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct bpe;

/* Room for ids in [0, vocabulary), for so many merges, and for token_bytes of tokens in all.
 * whole_words  a word that is a token is that token, whatever the merges say ("ignore_merges").
 * ERR_MEMORY. */
struct bpe *bpe_create(uint32_t vocabulary, uint32_t merges, size_t token_bytes, bool whole_words,
                       struct err *err);
void bpe_destroy(struct bpe *b); /* NULL is fine */

/* Token `id` is bytes[n]; each id and each string of bytes once, n > 0. All tokens before the first merge. */
void bpe_add_token(struct bpe *b, uint32_t id, const char *bytes, size_t n);
/* left and right become `merged`; of two merges of the same pair the later one counts. */
void bpe_add_merge(struct bpe *b, uint32_t rank, uint32_t left, uint32_t right, uint32_t merged);

/* The token that is bytes[n]; -1: there is none. */
int32_t bpe_find(const struct bpe *b, const char *bytes, size_t n);
/* The bytes of a token; NULL and 0 where there is none of this id. */
const char *bpe_token(const struct bpe *b, uint32_t id, size_t *n);

/* What one thread needs besides: words it has met, and room for long ones. */
struct bpe_worker;
struct bpe_worker *bpe_worker_create(struct err *err);
void bpe_worker_destroy(struct bpe_worker *w); /* NULL is fine */

/* word[n] into out, which has room for n ids; returns how many, or 0 with ERR_MEMORY. n > 0, and each byte
 * is a token. `readable` bytes at `word` may be read, n or more; so many as BPE_READABLE are faster. Takes
 * O(n log n) for a long word; no memory but for one longer than all before it. */
#define BPE_READABLE 24
size_t bpe_encode(const struct bpe *b, struct bpe_worker *w, const char *word, size_t n, size_t readable,
                  int32_t *out, struct err *err);

#endif
