/* tokenizer.c - the table of tokenizers; see tokenizer.h. */
#include "node/tokenizer.h"

#include <string.h>

static size_t bytes_encode_max(size_t bytes) {
    return bytes;
}

static size_t bytes_encode(const char *text, size_t bytes, int32_t *out) {
    for (size_t i = 0; i < bytes; i++) out[i] = (unsigned char)text[i];
    return bytes;
}

static size_t bytes_decode(int32_t id, char *out) {
    if (id < 0 || id > 255) return 0;
    out[0] = (char)id;
    return 1;
}

static const struct tokenizer tokenizers[] = {
    { "bytes", 256, bytes_encode_max, bytes_encode, bytes_decode },
};

const struct tokenizer *tokenizer_find(const char *name, struct err *err) {
    for (size_t i = 0; i < sizeof tokenizers / sizeof *tokenizers; i++)
        if (!strcmp(name, tokenizers[i].name)) return &tokenizers[i];
    err_set(err, ERR_CONFIG, "tokenizer '%.64s' is not known; there is: bytes", name);
    return NULL;
}
