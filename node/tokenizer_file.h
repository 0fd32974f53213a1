/* tokenizer_file.h - what tokenizer.c and tokenizer_file.c share: a tokenizer.json, read and checked. */
#ifndef INTELLECT_NODE_TOKENIZER_FILE_H
#define INTELLECT_NODE_TOKENIZER_FILE_H

#include "node/bpe.h"
#include "node/split.h"
#include "node/tokenizer.h"

struct added_token {
    char *content; /* as written */
    size_t n;
    uint32_t id;
    bool normalized; /* looked for after the text was brought into normal form */
    bool special;
};

struct tokenizer_file {
    uint32_t vocabulary;
    bool nfc;
    enum split_pattern pattern;
    struct bpe *bpe; /* the tokens that text can become */
    struct added_token *added; /* in the order of the file */
    uint32_t added_count;
    char **other; /* [vocabulary], NULL for most: tokens of the vocabulary that no text becomes */
};

/* Fill *f, all zero before, from the bytes of a tokenizer.json; what is filled is released by
 * tokenizer_file_release() whether it fails or not. Errors as tokenizer_parse(). */
int tokenizer_file_parse(struct tokenizer_file *f, const void *json, size_t n, struct err *err);
void tokenizer_file_release(struct tokenizer_file *f);

#endif
