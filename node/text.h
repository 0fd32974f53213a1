/* text.h - what a text is made before it is tokenised: valid UTF-8, and Unicode's normal form C where
 * the tokenizer asks for it. */
#ifndef INTELLECT_NODE_TEXT_H
#define INTELLECT_NODE_TEXT_H

#include "proto/err.h"

#include <stddef.h>
#include <stdint.h>

/* Bytes that a call writes and the next one overwrites. All zero to begin with. */
struct text_buffer {
    char *bytes;
    size_t n, room;
};
void text_buffer_release(struct text_buffer *b);
/* Room for so many bytes in all; what is there stays. ERR_MEMORY. */
int text_buffer_reserve(struct text_buffer *b, size_t room, struct err *err);

/* How many bytes at the beginning of text[n] are valid UTF-8. */
size_t text_valid(const char *text, size_t n);

/* text[n] as Python's bytes.decode(errors="replace") reads it: each maximal part of a character that is
 * cut off or malformed becomes one U+FFFD (Unicode 15, section 3.9, "substitution of maximal subparts").
 * ERR_MEMORY. */
int text_repair(const char *text, size_t n, struct text_buffer *out, struct err *err);

/* Normal form C of valid UTF-8 as Unicode 9 has it, which is what `tokenizers` takes: characters that came
 * later stay as they are. In time linear in n whatever the text is. */
struct text_nfc;
struct text_nfc *text_nfc_create(struct err *err);
void text_nfc_destroy(struct text_nfc *f); /* NULL is fine */
/* *out is `text` itself where that is its own normal form, else bytes of `scratch`. Thread-safe, with a
 * scratch per thread. ERR_MEMORY. */
int text_nfc_apply(const struct text_nfc *f, const char *text, size_t n, struct text_buffer *scratch,
                   const char **out, size_t *out_n, struct err *err);

#endif
