/* text.c - UTF-8 repaired, and normal form C; see text.h. */
#include "node/text.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#define CODES 0x110000u

void text_buffer_release(struct text_buffer *b) {
    free(b->bytes);
    *b = (struct text_buffer){ 0 };
}

int text_buffer_reserve(struct text_buffer *b, size_t room, struct err *err) {
    if (room <= b->room) return 0;
    size_t wanted = room < b->room + b->room / 2 ? b->room + b->room / 2 : room;
    char *bytes = realloc(b->bytes, wanted);
    if (!bytes) return err_set(err, ERR_MEMORY, "no memory for %zu bytes of text", wanted);
    b->bytes = bytes;
    b->room = wanted;
    return 0;
}

/* ---- UTF-8 ------------------------------------------------------------------------------------- */

/* The character at p: its bytes where it is valid, else minus the bytes of its maximal subpart. */
static int character(const unsigned char *p, size_t left) {
    unsigned char lead = p[0], low = 0x80, high = 0xbf;
    if (lead < 0x80) return 1;
    if (lead < 0xc2 || lead > 0xf4) return -1;
    int length = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    if (lead == 0xe0) low = 0xa0;  /* no overlong forms, */
    if (lead == 0xed) high = 0x9f; /* no surrogates, */
    if (lead == 0xf0) low = 0x90;
    if (lead == 0xf4) high = 0x8f; /* nothing above U+10FFFF */
    for (int i = 1; i < length; i++, low = 0x80, high = 0xbf)
        if ((size_t)i >= left || p[i] < low || p[i] > high) return -i;
    return length;
}

size_t text_valid(const char *text, size_t n) {
    const unsigned char *p = (const unsigned char *)text;
    size_t at = 0;
    while (at < n) {
        uint64_t eight;
        for (; at + 8 <= n; at += 8) {
            memcpy(&eight, p + at, 8);
            if (eight & 0x8080808080808080u) break;
        }
        if (at == n) break;
        int length = character(p + at, n - at);
        if (length < 0) return at;
        at += (size_t)length;
    }
    return n;
}

int text_repair(const char *text, size_t n, struct text_buffer *out, struct err *err) {
    for (out->n = 0; n;) {
        size_t good = text_valid(text, n);
        if (text_buffer_reserve(out, out->n + good + 3, err)) return -1;
        memcpy(out->bytes + out->n, text, good);
        out->n += good;
        text += good;
        n -= good;
        if (!n) break;
        memcpy(out->bytes + out->n, "\xef\xbf\xbd", 3);
        out->n += 3;
        size_t bad = (size_t)-character((const unsigned char *)text, n);
        text += bad;
        n -= bad;
    }
    return 0;
}

/* ---- normal form C -----------------------------------------------------------------------------
 * Most characters are inert: alone they are their own normal form, they begin a new one whatever comes
 * before, and change only by what follows. So only the others, each run of them with the inert one
 * before it, are decomposed, ordered and composed. */

struct text_nfc {
    uint8_t active[CODES / 8]; /* a bit per code point: not inert */
    uint8_t later[CODES / 8];
};

/* What would not be inert, but came after Unicode 9, whose normal form `tokenizers` takes: it lets them stand
 * as they are, and nothing moves across them. Up to Unicode 18. */
static const int32_t later[][2] = {
    { 0x5c8, 0x5c9 }, { 0x7fd, 0x7fd }, { 0x897, 0x89f }, { 0x8ca, 0x8d3 }, { 0x9fe, 0x9fe },
    { 0xc3c, 0xc3c }, { 0xd3b, 0xd3c }, { 0xeba, 0xeba }, { 0x1715, 0x1715 }, { 0x1abf, 0x1af0 },
    { 0x1df6, 0x1dfa }, { 0xa82c, 0xa82c }, { 0x105c9, 0x105c9 }, { 0x105e4, 0x105e4 },
    { 0x10d24, 0x10d27 }, { 0x10d69, 0x10d6d }, { 0x10eab, 0x10eac }, { 0x10ecb, 0x10ecf },
    { 0x10ef0, 0x10efb }, { 0x10efd, 0x10eff }, { 0x10f46, 0x10f50 }, { 0x10f82, 0x10f85 },
    { 0x11070, 0x11070 }, { 0x1133b, 0x1133b }, { 0x11383, 0x11383 }, { 0x11385, 0x11385 },
    { 0x1138e, 0x1138e }, { 0x11391, 0x11391 }, { 0x113b8, 0x113b8 }, { 0x113bb, 0x113bb },
    { 0x113c2, 0x113c2 }, { 0x113c5, 0x113c5 }, { 0x113c7, 0x113c9 }, { 0x113ce, 0x113d0 },
    { 0x1145e, 0x1145e }, { 0x11839, 0x1183a }, { 0x11930, 0x11930 }, { 0x11938, 0x11938 },
    { 0x1193d, 0x1193e }, { 0x11943, 0x11943 }, { 0x119e0, 0x119e0 }, { 0x11a34, 0x11a34 },
    { 0x11a47, 0x11a47 }, { 0x11a99, 0x11a99 }, { 0x11d42, 0x11d42 }, { 0x11d44, 0x11d45 },
    { 0x11d97, 0x11d97 }, { 0x11f41, 0x11f42 }, { 0x1611e, 0x16129 }, { 0x1612f, 0x1612f },
    { 0x16d67, 0x16d6a }, { 0x16ff0, 0x16ff1 }, { 0x1d127, 0x1d128 }, { 0x1d250, 0x1d252 },
    { 0x1d25b, 0x1d25c }, { 0x1d25f, 0x1d25f }, { 0x1d280, 0x1d281 }, { 0x1e08f, 0x1e08f },
    { 0x1e130, 0x1e136 }, { 0x1e2ae, 0x1e2ae }, { 0x1e2ec, 0x1e2ef }, { 0x1e4ec, 0x1e4ef },
    { 0x1e5ee, 0x1e5ef }, { 0x1e6e3, 0x1e6e3 }, { 0x1e6e6, 0x1e6e6 }, { 0x1e6ee, 0x1e6ef },
    { 0x1e6f5, 0x1e6f5 },
};

static bool is_set(const uint8_t *bits, int32_t code) {
    return bits[code >> 3] >> (code & 7) & 1;
}

static void set(uint8_t *bits, int32_t code) {
    bits[code >> 3] |= (uint8_t)(1 << (code & 7));
}

static void set_active(struct text_nfc *f, int32_t code) {
    if (!is_set(f->later, code)) set(f->active, code);
}

#define DECOMPOSED_MAX 32 /* four by Unicode's stability policy */

static int decompose(int32_t code, utf8proc_int32_t out[DECOMPOSED_MAX]) {
    int last = 0;
    utf8proc_ssize_t n = utf8proc_decompose_char(code, out, DECOMPOSED_MAX, UTF8PROC_DECOMPOSE, &last);
    if (n >= 1 && n <= DECOMPOSED_MAX) return (int)n;
    out[0] = code;
    return 1;
}

static int combining_class(int32_t code) {
    return utf8proc_get_property(code)->combining_class;
}

static void classify(struct text_nfc *f, int32_t code) {
    utf8proc_int32_t part[DECOMPOSED_MAX];
    int n = is_set(f->later, code) ? 0 : decompose(code, part);
    if (!n) return;
    if (combining_class(code)) set_active(f, code);
    if (n == 1 && part[0] == code) return;
    for (int i = 1; i < n; i++) set_active(f, part[i]); /* may compose with what is before it */
    if (utf8proc_normalize_utf32(part, n, UTF8PROC_STABLE | UTF8PROC_COMPOSE) != 1 || part[0] != code)
        set_active(f, code);
}

struct text_nfc *text_nfc_create(struct err *err) {
    struct text_nfc *f = calloc(1, sizeof *f);
    if (!f) {
        err_set(err, ERR_MEMORY, "no memory for Unicode's normal form C");
        return NULL;
    }
    for (size_t i = 0; i < sizeof later / sizeof *later; i++)
        for (int32_t code = later[i][0]; code <= later[i][1]; code++) set(f->later, code);
    for (int32_t code = 0x80; code < (int32_t)CODES; code++)
        if (code < 0xd800 || code > 0xdfff) classify(f, code);
    return f;
}

void text_nfc_destroy(struct text_nfc *f) {
    free(f);
}

/* Marks of a run by class, those of one class as they came: counting, as a run may be the whole text. */
static void order_marks(int32_t *mark, size_t n, int32_t *scratch) {
    size_t start[257] = { 0 };
    for (size_t i = 0; i < n; i++) start[combining_class(mark[i]) + 1]++;
    for (int c = 0; c < 256; c++) start[c + 1] += start[c];
    for (size_t i = 0; i < n; i++) scratch[start[combining_class(mark[i])]++] = mark[i];
    memcpy(mark, scratch, n * sizeof *mark);
}

static bool ordered(const int32_t *mark, size_t n) {
    for (size_t i = 1; i < n; i++)
        if (combining_class(mark[i - 1]) > combining_class(mark[i])) return false;
    return true;
}

static void order(int32_t *code, size_t n, int32_t *scratch) {
    for (size_t i = 0, end; i < n; i = end + 1) {
        for (end = i; end < n && combining_class(code[end]); end++);
        if (!ordered(code + i, end - i)) order_marks(code + i, end - i, scratch);
    }
}

/* text[n] into its normal form at the end of `out`. */
static int normalise_run(const char *text, size_t n, struct text_buffer *out, struct err *err) {
    size_t count = 0, room = 4 * n + DECOMPOSED_MAX;
    int32_t few[256], *code = room * 2 <= 256 ? few : malloc(room * 2 * sizeof *code);
    if (!code) return err_set(err, ERR_MEMORY, "no memory for a run of %zu bytes of marks", n);
    for (size_t at = 0; at < n;) {
        utf8proc_int32_t one = 0;
        at += (size_t)utf8proc_iterate((const utf8proc_uint8_t *)text + at, (utf8proc_ssize_t)(n - at), &one);
        count += (size_t)decompose(one, code + count);
    }
    order(code, count, code + room);
    count =
        (size_t)utf8proc_normalize_utf32(code, (utf8proc_ssize_t)count, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    int rc = text_buffer_reserve(out, out->n + 4 * count, err);
    for (size_t i = 0; rc == 0 && i < count; i++)
        out->n += (size_t)utf8proc_encode_char(code[i], (utf8proc_uint8_t *)out->bytes + out->n);
    if (code != few) free(code);
    return rc;
}

/* The next run at or after `at`: from the inert character before it, unless that came later, to the next
 * inert one. *end is n and the result too where there is none. */
static size_t next_run(const struct text_nfc *f, const char *text, size_t n, size_t at, size_t *end) {
    size_t begin = at;
    for (bool in_run = false; at < n;) {
        utf8proc_int32_t code = (unsigned char)text[at];
        size_t length = 1;
        if (code >= 0x80)
            length = (size_t)utf8proc_iterate((const utf8proc_uint8_t *)text + at, (utf8proc_ssize_t)(n - at),
                                              &code);
        if (code >= 0x80 && is_set(f->active, code)) {
            in_run = true;
        } else if (in_run) {
            *end = at;
            return begin;
        } else {
            begin = is_set(f->later, code) ? at + length : at;
        }
        at += length;
        if (at == n) {
            *end = n;
            return in_run ? begin : n;
        }
    }
    *end = n;
    return n;
}

static int append(struct text_buffer *out, const char *text, size_t n, struct err *err) {
    if (text_buffer_reserve(out, out->n + n, err)) return -1;
    if (n) memcpy(out->bytes + out->n, text, n);
    out->n += n;
    return 0;
}

int text_nfc_apply(const struct text_nfc *f, const char *text, size_t n, struct text_buffer *scratch,
                   const char **out, size_t *out_n, struct err *err) {
    size_t end, begin = next_run(f, text, n, 0, &end);
    *out = text;
    *out_n = n;
    if (begin == n) return 0;
    scratch->n = 0;
    if (append(scratch, text, begin, err)) return -1;
    while (begin < n) {
        if (normalise_run(text + begin, end - begin, scratch, err)) return -1;
        size_t next_end, next = next_run(f, text, n, end, &next_end);
        if (append(scratch, text + end, next - end, err)) return -1;
        begin = next;
        end = next_end;
    }
    *out = scratch->bytes;
    *out_n = scratch->n;
    return 0;
}
