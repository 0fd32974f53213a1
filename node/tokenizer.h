/* tokenizer.h - text to token ids and back.
 *
 * There are two kinds: `bytes`, whose 256 ids are the bytes, and byte-level BPE as a Hugging Face
 * tokenizer.json describes it, with the words of GPT-2, Llama 3 or Qwen2. Of such a file this much is taken:
 *
 *   model            type BPE; vocab, merges (as "a b" or ["a", "b"]), ignore_merges. Each byte is a token.
 *   pre_tokenizer    ByteLevel; or a Sequence of Split, with a pattern of split.h, and ByteLevel
 *   normalizer       null or NFC
 *   added_tokens     content, id, normalized, special
 *   decoder          ByteLevel
 *
 * Ids are those of `tokenizers` with add_special_tokens=False: post_processor, padding and truncation are for
 * others. All else that would change an id is refused (ERR_UNSUPPORTED) and the message names the field. The
 * file is taken for hostile. */
#ifndef INTELLECT_NODE_TOKENIZER_H
#define INTELLECT_NODE_TOKENIZER_H

#include "proto/err.h"
#include "proto/messages.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TOKENIZER_FILE_NAME "tokenizer.json"
#define TOKENIZER_FILE_BYTES_MAX ((size_t)32 << 20)
#define TOKENIZER_VOCABULARY_MAX (1u << 20)
#define TOKENIZER_TOKEN_BYTES_MAX 1024
#define TOKENIZER_ADDED_MAX 65536
#define TOKENIZER_NAME_BYTES_MAX 63

struct tokenizer; /* only read once it is open: threads share it */

/* what  "bytes", or the path of a tokenizer.json or of the folder that holds one.
 * Returns NULL with ERR_NOT_FOUND, ERR_IO, ERR_CORRUPT (no such JSON), ERR_UNSUPPORTED, ERR_MEMORY. */
struct tokenizer *tokenizer_open(const char *what, struct err *err);
/* The same of the bytes of a tokenizer.json. */
struct tokenizer *tokenizer_parse(const void *json, size_t n, struct err *err);
void tokenizer_close(struct tokenizer *t); /* NULL is fine */

/* "bytes", or "bpe-" and 32 hexadecimal digits of the file's digest: equal names give equal ids. */
const char *tokenizer_name(const struct tokenizer *t);
/* Of the file, BLAKE2b-256. NULL of bytes. */
const struct digest *tokenizer_digest(const struct tokenizer *t);
/* The file's bytes. NULL of bytes. */
const char *tokenizer_json(const struct tokenizer *t, size_t *n);
/* All ids are below it. */
uint32_t tokenizer_vocabulary(const struct tokenizer *t);
/* The bytes of one id: what encoding takes, special tokens as they are written. NULL and 0 where there is no
 * such id. */
const char *tokenizer_token(const struct tokenizer *t, uint32_t id, size_t *n);
/* The id of an added token ("<|end_of_text|>"), special or not; -1: there is none. */
int32_t tokenizer_added(const struct tokenizer *t, const char *content);

/* How many bytes of text[n], from the beginning, have the same ids whatever comes after them, so that a long
 * text can be encoded piece by piece; 0 where that is not known of any. */
size_t tokenizer_cut(const struct tokenizer *t, const char *text, size_t n);

/* What a thread needs to encode: a cache of words, buffers. Borrows t.
 * special_as_text  what looks like a special token in a text is text, as in `tokenizers` with
 *                  encode_special_tokens: no text can then end its own document.
 * ERR_MEMORY. */
struct encoder;
struct encoder *encoder_create(const struct tokenizer *t, bool special_as_text, struct err *err);
void encoder_destroy(struct encoder *e); /* NULL is fine */

/* Encode text[n], whatever its bytes are: what is not UTF-8 is read as text_repair() says. *ids [*count] stay
 * until the next call. Without memory of its own but for a text longer than those before it. ERR_MEMORY. */
int encoder_encode(struct encoder *e, const char *text, size_t n, const int32_t **ids, size_t *count,
                   struct err *err);

#endif
