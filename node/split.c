/* split.c - a text cut into words; see split.h. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "node/split.h"

#include <pcre2.h>
#include <stdint.h>
#include <string.h>

/* The classes as Oniguruma has them, which `tokenizers` asks. Its white space: PCRE2's has U+180E too, which
 * is none since Unicode 6.3. Its letters and numbers are of Unicode 16; Debian 12's PCRE2 knows 14, so those
 * that came later are named. */
#define S \
    "\\x09-\\x0d\\x20\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{" \
    "3000}"
#define L \
    "\\p{L}\\x{1c89}-\\x{1c8a}\\x{a7cb}-\\x{a7cd}\\x{a7da}-\\x{a7dc}\\x{105c0}-\\x{105f3}" \
    "\\x{10d4a}-\\x{10d65}\\x{10d6f}-\\x{10d85}\\x{10ec2}-\\x{10ec4}\\x{1123f}-\\x{11240}" \
    "\\x{11380}-\\x{11389}\\x{1138b}\\x{1138e}\\x{11390}-\\x{113b5}\\x{113b7}\\x{113d1}\\x{113d3}" \
    "\\x{11bc0}-\\x{11be0}\\x{11f02}\\x{11f04}-\\x{11f10}\\x{11f12}-\\x{11f33}\\x{1342f}" \
    "\\x{13441}-\\x{13446}\\x{13460}-\\x{143fa}\\x{16100}-\\x{1611d}\\x{16d40}-\\x{16d6c}\\x{18cff}" \
    "\\x{1b132}\\x{1b155}\\x{1df25}-\\x{1df2a}\\x{1e030}-\\x{1e06d}\\x{1e4d0}-\\x{1e4eb}" \
    "\\x{1e5d0}-\\x{1e5ed}\\x{1e5f0}\\x{2b739}\\x{2ebf0}-\\x{2ee5d}\\x{31350}-\\x{323af}"
#define N \
    "\\p{N}\\x{10d40}-\\x{10d49}\\x{116d0}-\\x{116e3}\\x{11bf0}-\\x{11bf9}\\x{11f50}-\\x{11f59}" \
    "\\x{16130}-\\x{16139}\\x{16d70}-\\x{16d79}\\x{1ccf0}-\\x{1ccf9}\\x{1d2c0}-\\x{1d2d3}" \
    "\\x{1e4f0}-\\x{1e4f9}\\x{1e5f1}-\\x{1e5fa}"

/* Words of Llama 3 and Qwen2, which differ in how many digits are one. */
#define THEIRS(digits) \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}" digits "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|" \
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define OURS(digits) \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n" L N "]?[" L "]+|[" N "]" digits "| ?[^" S L N "]+[\\r\\n]*|" \
    "[" S "]*[\\r\\n]+|[" S "]+(?![^" S "])|[" S "]+"

static const struct {
    const char *regex; /* as it stands in files */
    const char *ours;
} patterns[SPLIT_PATTERNS] = {
    [SPLIT_GPT2] = {
        "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
        "'s|'t|'re|'ve|'m|'ll|'d| ?[" L "]+| ?[" N "]+| ?[^" S L N "]+|[" S "]+(?![^" S "])|[" S "]+",
    },
    [SPLIT_LLAMA3] = { THEIRS("{1,3}"), OURS("{1,3}") },
    [SPLIT_QWEN2] = { THEIRS(""), OURS("") },
};

int split_find(const char *regex) {
    for (int i = 0; i < SPLIT_PATTERNS; i++)
        if (!strcmp(regex, patterns[i].regex)) return i;
    return -1;
}

static pcre2_code *code_of(const struct split *s) {
    return (pcre2_code *)(uintptr_t)s;
}

struct split *split_create(enum split_pattern pattern, struct err *err) {
    int code;
    size_t at;
    pcre2_code *c = pcre2_compile((PCRE2_SPTR)patterns[pattern].ours, PCRE2_ZERO_TERMINATED,
                                  PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED, &code, &at, NULL);
    if (!c) {
        unsigned char why[128] = "";
        pcre2_get_error_message(code, why, sizeof why);
        err_set(err, ERR_UNSUPPORTED, "PCRE2 refuses the pattern of words at %zu: %s", at, (const char *)why);
        return NULL;
    }
    pcre2_jit_compile(c, PCRE2_JIT_COMPLETE); /* where it can't, matching is interpreted: slower */
    return (struct split *)c;
}

void split_destroy(struct split *s) {
    pcre2_code_free((pcre2_code *)s);
}

struct split_worker *split_worker_create(const struct split *s, struct err *err) {
    pcre2_match_data *m = pcre2_match_data_create_from_pattern(code_of(s), NULL);
    if (!m) err_set(err, ERR_MEMORY, "no memory to match words");
    return (struct split_worker *)m;
}

void split_worker_destroy(struct split_worker *w) {
    pcre2_match_data_free((pcre2_match_data *)w);
}

size_t split_next(const struct split *s, struct split_worker *w, const char *text, size_t n,
                  struct err *err) {
    pcre2_match_data *m = (pcre2_match_data *)w;
    int rc = pcre2_match(code_of(s), (PCRE2_SPTR)text, n, 0, PCRE2_NO_UTF_CHECK, m, NULL);
    if (rc > 0) return pcre2_get_ovector_pointer(m)[1];
    err_set(err, ERR_MEMORY, "PCRE2 cannot find the end of a word (%d)", rc);
    return 0;
}

static int is_letter(char c) {
    return (c | 32) >= 'a' && (c | 32) <= 'z';
}

static int is_digit(char c) {
    return c >= '0' && c <= '9';
}

/* A Chinese character, U+4000 to U+9FFF, begins with such a byte; what else begins so is no space and no mark
 * either. */
static int begins_ideograph(char c) {
    return (unsigned char)c >= 0xe4 && (unsigned char)c <= 0xe9;
}

/* Is what ends before text[i] printable ASCII, or a character from U+3001 to U+9FFF: no white space. */
static int ends_visible(const char *text, size_t i) {
    const unsigned char *p = (const unsigned char *)text;
    if (p[i - 1] < 0x80) return p[i - 1] > ' ' && p[i - 1] < 0x7f;
    return i >= 3 && p[i - 3] >= 0xe3 && p[i - 3] <= 0xe9 && (p[i - 2] & 0xc0) == 0x80 &&
           (p[i - 1] & 0xc0) == 0x80 && memcmp(text + i - 3, "\xe3\x80\x80", 3) != 0;
}

size_t split_cut(const char *text, size_t n) {
    for (size_t i = n; i-- > 2;) { /* text[i] is to begin a word, or to follow the space that begins it */
        if (!is_letter(text[i]) && !begins_ideograph(text[i])) continue;
        if (text[i - 1] == '\n' && ends_visible(text, i - 1)) return i;
        if (text[i - 1] == ' ' && is_letter(text[i]) && (is_letter(text[i - 2]) || is_digit(text[i - 2])))
            return i - 1;
    }
    return 0;
}
