/* fuzz_tokenizer.c - a tokenizer.json, and texts. Of a file that is taken all ids must lie in its vocabulary;
 * what a text was made of must spell it, and must not depend on the pieces in which it was encoded.
 *
 * Input: one byte, then, where it is 0, a tokenizer.json, else a text for one of the three samples. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>

#include "node/text.h"
#include "node/tokenizer.h"
#include "proto/proto.h"
#include "tests/fuzz/fuzz.h"

#define SAMPLES 3
#define PATTERN(digits)                                                                                             \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}" digits                                          \
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

static struct tokenizer *sample[SAMPLES];
static struct text_nfc *nfc;

/* GPT-2's alphabet: a byte as itself where it can be seen, else as the next one of U+0100 and on. */
static void byte_character(int byte, char out[3]) {
    int code = byte, next = 256;
    for (int b = 0; b <= byte; b++) {
        int seen = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        code = seen ? b : next++;
    }
    memset(out, 0, 3);
    if (code < 128)
        out[0] = (char)code;
    else
        out[0] = (char)(0xc0 | code >> 6), out[1] = (char)(0x80 | (code & 63));
}

static json_t *model(int which) {
    static const char *const merges[] = { "\u0120 t",      "h e",  "\u0120t he",    "i n",
                                          "1 2",           "12 3", "\u0120 \u0120", "\u010a \u010a",
                                          "\u00c3 \u00a9", "a a",  "aa aa",         "aa a" };
    json_t *vocab = json_object(), *list = json_array();
    char token[64];
    for (int b = 0; b < 256; b++) {
        byte_character(b, token);
        json_object_set_new(vocab, token, json_integer(255 - b));
    }
    for (size_t i = 0; i < sizeof merges / sizeof *merges; i++) {
        size_t left = strcspn(merges[i], " ");
        snprintf(token, sizeof token, "%.*s%s", (int)left, merges[i], merges[i] + left + 1);
        json_object_set_new(vocab, token, json_integer((json_int_t)(256 + i)));
        json_array_append_new(list, which == 2 ? json_pack("[s%, s]", merges[i], left, merges[i] + left + 1)
                                               : json_string(merges[i]));
    }
    json_object_set_new(vocab, "\u0394\u03b5", json_integer(300)); /* of no bytes */
    return json_pack("{s:s, s:n, s:s, s:b, s:o, s:o}", "type", "BPE", "dropout", "end_of_word_suffix", "",
                     "ignore_merges", which == 1, "vocab", vocab, "merges", list);
}

static json_t *added(const char *content, int id, int normalized) {
    return json_pack("{s:s, s:i, s:b, s:b}", "content", content, "id", id, "normalized", normalized,
                     "special", !normalized);
}

static char *file_of(int which) {
    json_t *level =
        json_pack("{s:s, s:b, s:b}", "type", "ByteLevel", "add_prefix_space", 0, "use_regex", which == 0);
    json_t *words = which == 0 ? json_incref(level)
                               : json_pack("{s:s, s:[{s:s, s:{s:s}, s:s, s:b}, O]}", "type", "Sequence",
                                           "pretokenizers", "type", "Split", "pattern", "Regex",
                                           which == 1 ? PATTERN("{1,3}") : PATTERN(""), "behavior",
                                           "Isolated", "invert", 0, level);
    json_t *root = json_pack(
        "{s:o, s:o, s:o, s:o, s:[o, o, o]}", "model", model(which), "pre_tokenizer", words, "normalizer",
        which == 2 ? json_pack("{s:s}", "type", "NFC") : json_null(), "decoder", level, "added_tokens",
        added("<|end|>", 400, 0), added("<|", 401, 0), added("\u00e9\u0301x", 402, 1));
    char *text = json_dumps(root, 0);
    assert(text);
    json_decref(root);
    return text;
}

static void init(void) {
    struct err err = { 0 };
    int failed = proto_init(&err);
    assert(!failed);
    for (int i = 0; i < SAMPLES && !sample[i]; i++) {
        char *text = file_of(i);
        sample[i] = tokenizer_parse(text, strlen(text), &err);
        if (!sample[i]) fprintf(stderr, "%s\n", err.msg);
        assert(sample[i]);
        free(text);
    }
    if (!nfc) nfc = text_nfc_create(&err);
    assert(nfc);
}

static size_t encoded(struct encoder *e, const char *text, size_t n, const int32_t **ids) {
    struct err err;
    size_t count;
    int failed = encoder_encode(e, text, n, ids, &count, &err);
    assert(!failed);
    return count;
}

/* The ids spell text[n], as it is or in its normal form. */
static void check_spelling(const struct tokenizer *t, const int32_t *ids, size_t count, const char *text,
                           size_t n) {
    size_t at = 0, length;
    for (size_t i = 0; i < count; i++, at += length) {
        const char *token = tokenizer_token(t, (uint32_t)ids[i], &length);
        assert(ids[i] >= 0 && (uint32_t)ids[i] < tokenizer_vocabulary(t) && token && length <= n - at);
        assert(!memcmp(token, text + at, length));
    }
    assert(at == n);
}

static void check_pieces(const struct tokenizer *t, const char *text, size_t n, const int32_t *ids,
                         size_t count) {
    struct encoder *e = encoder_create(t, true, NULL);
    size_t done = 0, cut;
    assert(e);
    for (size_t at = 0; at < n; at += cut) {
        const int32_t *some;
        size_t window = n - at < 16 ? n - at : 16;
        cut = tokenizer_cut(t, text + at, window);
        assert(cut <= window);
        if (!cut) cut = n - at;
        size_t got = encoded(e, text + at, cut, &some);
        assert(got <= count - done && !memcmp(some, ids + done, got * sizeof *some));
        done += got;
    }
    assert(done == count);
    encoder_destroy(e);
}

static void take_text(const struct tokenizer *t, bool has_nfc, const char *text, size_t n) {
    struct text_buffer repaired = { 0 }, normal = { 0 };
    struct encoder *e = encoder_create(t, true, NULL);
    const char *form;
    const int32_t *ids;
    assert(e);
    int failed = text_repair(text, n, &repaired, NULL);
    form = repaired.bytes ? repaired.bytes : "";
    size_t form_n = repaired.n;
    assert(!failed && text_valid(form, form_n) == form_n);
    if (has_nfc) failed = text_nfc_apply(nfc, form, form_n, &normal, &form, &form_n, NULL);
    assert(!failed && text_valid(form, form_n) == form_n);
    size_t count = encoded(e, text, n, &ids);
    check_spelling(t, ids, count, form, form_n);
    check_pieces(t, text, n, ids, count);
    encoder_destroy(e);
    text_buffer_release(&repaired);
    text_buffer_release(&normal);
}

static bool take(const uint8_t *bytes, size_t length) {
    static const char text[] = "The the \u00e9\u00e9\u0301x 1234  \n\nit's <|end|>\xff \u0394\u03b5aaaaaaa";
    struct err err = { 0 };
    if (!length) return false;
    if (bytes[0]) {
        int which = bytes[0] % SAMPLES;
        take_text(sample[which], which == 2, (const char *)bytes + 1, length - 1);
        return true;
    }
    struct tokenizer *t = tokenizer_parse(bytes + 1, length - 1, &err);
    if (!t) {
        assert((err.code == ERR_CORRUPT || err.code == ERR_UNSUPPORTED) && *err.msg);
        return false;
    }
    struct encoder *e = encoder_create(t, false, &err);
    const int32_t *ids;
    assert(e);
    size_t count = encoded(e, text, sizeof text - 1, &ids);
    for (size_t i = 0; i < count; i++) assert(ids[i] >= 0 && (uint32_t)ids[i] < tokenizer_vocabulary(t));
    encoder_destroy(e);
    tokenizer_close(t);
    return true;
}

static void put(const struct fuzz_sink *out, const char *name, char first, const char *text) {
    size_t n = strlen(text);
    char *b = malloc(n + 2);
    assert(b);
    b[0] = first;
    memcpy(b + 1, text, n + 1);
    out->sample(out->arg, name, b, n + 1);
    free(b);
}

static void samples(const struct fuzz_sink *out) {
    static const char *const words[] = {
        "\"type\":\"ByteLevel\"", "\"type\":\"Sequence\"", "\"type\":\"NFC\"", "\"use_regex\":false", "\"merges\":[]",
        "\"added_tokens\":[", "\"normalized\":true", "\"lstrip\":true", "null", "\u00e9", "e\u0301", "\u0f71\u0f72",
        "\u1100\u1161\u11a8", "\u180e", "\u3000", "\xed\xa0\x80", "\n\u4e2d", "\u3002\n", "'\u017f", "\u0344", "<|end|>" };
    for (int i = 0; i < SAMPLES; i++) {
        char name[24], *text = file_of(i);
        snprintf(name, sizeof name, "file-%d", i);
        put(out, name, 0, text);
        free(text);
        snprintf(name, sizeof name, "text-%d", i);
        put(out, name, (char)(3 + i),
            "It's the \u00e9e\u0301\u0301x 12345 <|end|>\r\n  \n\u4e2d\u6587, a\u0328\u0301aaaa\n\nend of "
            "it");
    }
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) out->word(out->arg, words[i]);
}

const struct fuzz_target fuzz_tokenizer = {"tokenizer", init, take, samples};
