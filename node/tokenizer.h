/* tokenizer.h - text to token ids and back. `bytes` is the one there is: vocabulary 256, the id is
 * the byte. A BPE tokenizer joins as another row of the table in tokenizer.c. */
#ifndef INTELLECT_NODE_TOKENIZER_H
#define INTELLECT_NODE_TOKENIZER_H

#include "proto/err.h"

#include <stddef.h>
#include <stdint.h>

struct tokenizer {
    const char *name;
    uint32_t vocabulary;
    /* Most ids that `bytes` bytes of text can become: what a caller must have room for. */
    size_t (*encode_max)(size_t bytes);
    /* Encode text[bytes] into out; returns the number of ids. Text may be cut anywhere that the
     * caller does not mind a token boundary. */
    size_t (*encode)(const char *text, size_t bytes, int32_t *out);
    /* The bytes of one id into out (room for TOKENIZER_TOKEN_BYTES_MAX); returns how many. An id
     * outside the vocabulary gives 0. */
    size_t (*decode)(int32_t id, char *out);
};
#define TOKENIZER_TOKEN_BYTES_MAX 256

/* The tokenizer called `name`, static storage. NULL with ERR_CONFIG naming those there are. */
const struct tokenizer *tokenizer_find(const char *name, struct err *err);

#endif
