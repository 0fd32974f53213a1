/* split.h - a text cut into the words that byte pair encoding sees one by one, by the patterns that
 * tokenizers of Llama 3, GPT-2 and Qwen name. A pattern out of a file is looked up here, never compiled: it
 * could be made to take for ever. */
#ifndef INTELLECT_NODE_SPLIT_H
#define INTELLECT_NODE_SPLIT_H

#include "proto/err.h"

#include <stddef.h>

enum split_pattern { SPLIT_GPT2, SPLIT_LLAMA3, SPLIT_QWEN2, SPLIT_PATTERNS };

/* The pattern as Hugging Face files write it; -1: none of those above. */
int split_find(const char *regex);

/* Letters and numbers are those of Unicode 16, or of PCRE2's version where that is later. ERR_UNSUPPORTED: it was
 * built without Unicode. */
struct split;
struct split *split_create(enum split_pattern pattern, struct err *err);
void split_destroy(struct split *s); /* NULL is fine */

/* What one thread needs besides. */
struct split_worker;
struct split_worker *split_worker_create(const struct split *s, struct err *err);
void split_worker_destroy(struct split_worker *w); /* NULL is fine */

/* Bytes of the word at the beginning of text[n], valid UTF-8, n > 0. 0 with ERR_MEMORY. All of a text, word
 * by word, takes time linear in its length. */
size_t split_next(const struct split *s, struct split_worker *w, const char *text, size_t n, struct err *err);

/* The most bytes of text[n], n or fewer, whose words are the same whatever follows, as are those of what
 * follows: up to the space in "x y", with x a letter or a digit and y a letter of ASCII, or with the newline in
 * "x\ny", with x printable ASCII or a character from U+3001 to U+9FFF, and y a letter of ASCII or a Chinese
 * character. 0 where there is no such place. */
size_t split_cut(const char *text, size_t n);

#endif
