/* The tokenizers: Hugging Face's `tokenizers` says what is right; tests/reference/make_tokenizer_vectors.py
 * asked it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <glob.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "node/text.h"
#include "node/tokenizer.h"
#include "proto/proto.h"

/* REFERENCE names another folder of vectors, as `make test-reference` does. */
static const char *reference_folder(void) {
    const char *folder = getenv("REFERENCE");
    return folder ? folder : "tests/reference";
}

static uint8_t *read_all(const char *path, size_t *n) {
    FILE *f = fopen(path, "rbe");
    if (!f) fail_msg("%s is missing", path);
    fseek(f, 0, SEEK_END);
    *n = (size_t)ftell(f);
    rewind(f);
    uint8_t *bytes = malloc(*n + 1);
    assert_non_null(bytes);
    assert_int_equal(fread(bytes, 1, *n, f), *n);
    bytes[*n] = '\0';
    fclose(f);
    return bytes;
}

static uint8_t *reference(const char *name, size_t *n) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", reference_folder(), name);
    return read_all(path, n);
}

static struct tokenizer *opened(const char *path) {
    struct err err = { 0 };
    struct tokenizer *t = tokenizer_open(path, &err);
    if (!t) fail_msg("%s", err.msg);
    return t;
}

static double cpu_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- against `tokenizers` ---------------------------------------------------------------------- */

#define ANSWER_BYTES 12 /* of a text: how many ids, and the start of their digest */

static void check_ids(const char *name, size_t text, const int32_t *ids, size_t n, const uint8_t *expected) {
    uint32_t count;
    memcpy(&count, expected, 4);
    if (n != count) fail_msg("%s: text %zu has %zu ids, tokenizers has %u", name, text, n, count);
    struct digest d = digest_of(ids, n * sizeof *ids);
    if (memcmp(d.b, expected + 4, 8) != 0) fail_msg("%s: text %zu has other ids than tokenizers", name, text);
}

/* All texts; returns the seconds it took. `skip`: of the answers, the first or the second per text. */
static double encode_texts(const char *json, struct encoder *e, const uint8_t *texts, size_t n,
                           const uint8_t *answers, size_t answers_n, size_t skip) {
    size_t text = 0;
    double seconds = 0;
    for (size_t at = 0; at < n; text++) {
        const int32_t *ids;
        uint32_t length;
        size_t count;
        memcpy(&length, texts + at, 4);
        assert_true(length <= n - at - 4 && (2 * text + skip + 1) * ANSWER_BYTES <= answers_n);
        double begin = cpu_s();
        assert_int_equal(encoder_encode(e, (const char *)texts + at + 4, length, &ids, &count, NULL), 0);
        seconds += cpu_s() - begin;
        check_ids(json, text, ids, count, answers + (2 * text + skip) * ANSWER_BYTES);
        at += 4 + length;
    }
    assert_int_equal(2 * text * ANSWER_BYTES, answers_n);
    return seconds;
}

static void compare_rates(const char *json, size_t bytes, double seconds) {
    char path[512];
    double theirs = 0;
    snprintf(path, sizeof path, "%.*s.s", (int)(strlen(json) - 5), json);
    FILE *f = fopen(path, "re");
    if (!f) return;
    if (fscanf(f, "%lf", &theirs) == 1)
        print_message("%s: %.1f MB, %.1f MB/s of one core, tokenizers %.1f MB/s\n", json, (double)bytes / 1e6,
                      (double)bytes / 1e6 / seconds, (double)bytes / 1e6 / theirs);
    fclose(f);
}

static void check_tokenizer(const char *json, const uint8_t *texts, size_t n) {
    char path[512];
    size_t answers_n;
    snprintf(path, sizeof path, "%.*s.bin", (int)(strlen(json) - 5), json);
    uint8_t *answers = read_all(path, &answers_n);
    struct tokenizer *t = opened(json);
    for (size_t as_text = 0; as_text < 2; as_text++) {
        struct encoder *e = encoder_create(t, as_text, NULL);
        double seconds = encode_texts(json, e, texts, n, answers, answers_n, as_text);
        if (!as_text) compare_rates(json, n, seconds);
        encoder_destroy(e);
    }
    tokenizer_close(t);
    free(answers);
}

static void ids_are_those_of_tokenizers(void **state) {
    (void)state;
    char pattern[512];
    size_t n;
    glob_t found;
    uint8_t *texts = reference("tokenizer-texts.bin", &n);
    snprintf(pattern, sizeof pattern, "%s/tokenizer-*.json", reference_folder());
    assert_int_equal(glob(pattern, 0, NULL, &found), 0);
    assert_true(found.gl_pathc >= 3);
    for (size_t i = 0; i < found.gl_pathc; i++) check_tokenizer(found.gl_pathv[i], texts, n);
    globfree(&found);
    free(texts);
}

/* ---- what must hold besides -------------------------------------------------------------------- */

static const char *const names[] = { "gpt2", "llama3", "qwen2" };

static struct tokenizer *small(const char *name) {
    char path[64];
    snprintf(path, sizeof path, "tests/reference/tokenizer-%s.json", name);
    return opened(path);
}

/* What a corpus is made of: a text that is encoded piece by piece has the ids of the whole. Returns how many
 * pieces. */
static size_t check_pieces(const char *name, const char *text, size_t n) {
    struct tokenizer *t = small(name);
    struct encoder *whole = encoder_create(t, false, NULL), *part = encoder_create(t, false, NULL);
    const int32_t *ids, *some;
    size_t count, done = 0, pieces = 0, got;
    assert_int_equal(encoder_encode(whole, text, n, &ids, &count, NULL), 0);
    for (size_t at = 0; at < n; pieces++) {
        size_t window = n - at < 100 ? n - at : 100, cut = 0;
        while (at + window < n && !(cut = tokenizer_cut(t, text + at, window))) window++;
        if (at + window >= n) cut = n - at;
        assert_int_equal(encoder_encode(part, text + at, cut, &some, &got, NULL), 0);
        assert_true(done + got <= count);
        assert_memory_equal(some, ids + done, got * sizeof *some);
        at += cut;
        done += got;
    }
    assert_int_equal(done, count);
    encoder_destroy(whole);
    encoder_destroy(part);
    tokenizer_close(t);
    return pieces;
}

static void pieces_of_a_text_have_its_ids(void **state) {
    (void)state;
    static const char *const lines[] = { "\u4e2d\u6587\u7684\u4e00\u884c\u3002\n",
                                         "\u65e5\u672c\u8a9e\n",
                                         "\n",
                                         "\u3000\n",
                                         "\u4e00'\u017f\u4e8c 12345\n",
                                         "\u9fa5\u0301\n",
                                         "\u3000\u4e09!!\n",
                                         "\u56db\u2028\n" };
    char chinese[20000];
    size_t n, chinese_n = 0;
    for (int i = 0; i < 600; i++)
        chinese_n += (size_t)sprintf(chinese + chinese_n, "%s", lines[(unsigned)(i * i * 7 + i / 3) % 8]);
    char *text = (char *)read_all("docs/flow.md", &n);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        assert_true(check_pieces(names[i], text, n) > 20);
        assert_true(check_pieces(names[i], chinese, chinese_n) > 20);
    }
    free(text);
}

static void tokens_spell_the_text(void **state) {
    (void)state;
    static const char text[] =
        "It's 12345 \xc3\xa9t\xc3\xa9<|end_of_text|>\n\n  def f(x):\t\xf0\x9f\x98\x80 \xe4\xb8\xad";
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        struct tokenizer *t = small(names[i]);
        struct encoder *e = encoder_create(t, false, NULL);
        const int32_t *ids;
        size_t count, at = 0, n;
        int32_t end = tokenizer_added(t, "<|end_of_text|>"), ends = 0;
        assert_int_equal(encoder_encode(e, text, sizeof text - 1, &ids, &count, NULL), 0);
        for (size_t k = 0; k < count; k++, at += n) {
            const char *token = tokenizer_token(t, (uint32_t)ids[k], &n);
            assert_true(token && n && at + n <= sizeof text - 1);
            assert_memory_equal(token, text + at, n);
            ends += ids[k] == end;
        }
        assert_int_equal(at, sizeof text - 1);
        assert_int_equal(ends, 1);
        assert_null(tokenizer_token(t, tokenizer_vocabulary(t), &n));
        encoder_destroy(e);
        tokenizer_close(t);
    }
}

static void names_tell_files_apart(void **state) {
    (void)state;
    struct tokenizer *a = small("gpt2"), *b = small("llama3"), *c = small("gpt2"), *bytes = opened("bytes");
    assert_string_equal(tokenizer_name(a), tokenizer_name(c));
    assert_string_not_equal(tokenizer_name(a), tokenizer_name(b));
    assert_int_equal(strncmp(tokenizer_name(a), "bpe-", 4), 0);
    assert_non_null(tokenizer_digest(a));
    assert_string_equal(tokenizer_name(bytes), "bytes");
    assert_null(tokenizer_digest(bytes));
    tokenizer_close(a);
    tokenizer_close(b);
    tokenizer_close(c);
    tokenizer_close(bytes);
}

static void bytes_come_back_as_they_were(void **state) {
    (void)state;
    struct tokenizer *t = opened("bytes");
    struct encoder *e = encoder_create(t, false, NULL);
    char text[256];
    const int32_t *ids;
    size_t count, n;
    for (int i = 0; i < 256; i++) text[i] = (char)i;
    assert_int_equal(encoder_encode(e, text, 256, &ids, &count, NULL), 0);
    assert_int_equal(count, 256);
    for (int i = 0; i < 256; i++) {
        assert_int_equal(ids[i], i);
        assert_int_equal(*tokenizer_token(t, (uint32_t)i, &n), text[i]);
        assert_int_equal(n, 1);
    }
    assert_null(tokenizer_token(t, 256, &n));
    encoder_destroy(e);
    tokenizer_close(t);
}

/* As Python 3.11 reads them: one U+FFFD per part of a character that could have gone on. */
static void malformed_bytes_are_replaced_as_python_does(void **state) {
    (void)state;
#define R "\xef\xbf\xbd"
    static const char *const cases[][2] = {
        { "a\xff" "b", "a" R "b" }, { "\xe2\x82", R }, { "\xe2\x82z", R "z" }, { "\xf0\x9f\x98 ", R " " },
        { "\xed\xa0\x80", R R R }, { "\xc0\xaf", R R }, { "\xf4\x90\x80\x80", R R R R }, { "\xe0\x80", R R },
        { "\xc3\xa9\xc3", "\xc3\xa9" R }, { "\x80\x80", R R }, { "\xf0\x90\x28", R "(" },
    };
    struct text_buffer out = { 0 };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t n = strlen(cases[i][1]);
        assert_true(text_valid(cases[i][0], strlen(cases[i][0])) < strlen(cases[i][0]));
        assert_int_equal(text_repair(cases[i][0], strlen(cases[i][0]), &out, NULL), 0);
        assert_int_equal(out.n, n);
        assert_memory_equal(out.bytes, cases[i][1], n);
    }
    text_buffer_release(&out);
}

/* ---- files that are refused -------------------------------------------------------------------- */

static const struct {
    const char *key[4]; /* where in the file, up to a NULL; a number is an index */
    const char *value;  /* what is put there; NULL: it is taken away */
    const char *field;  /* what the message must name */
} unsupported[] = {
    { { "model", "type" }, "\"WordPiece\"", "model.type" },
    { { "model", "dropout" }, "0.1", "model.dropout" },
    { { "model", "byte_fallback" }, "true", "model.byte_fallback" },
    { { "model", "end_of_word_suffix" }, "\"</w>\"", "model.end_of_word_suffix" },
    { { "model", "continuing_subword_prefix" }, "\"##\"", "model.continuing_subword_prefix" },
    { { "model", "vocab" }, "[]", "model.vocab" },
    { { "model", "vocab", "a" }, NULL, "model.vocab has no token for byte 97" },
    { { "model", "vocab", "a" }, "66", "model.vocab: id 66" },
    { { "model", "vocab", "a" }, "-1", "model.vocab" },
    { { "model", "vocab", "a" }, "1e3", "model.vocab" },
    { { "model", "vocab", "a" }, "1048576", "model.vocab" },
    { { "model", "merges" }, "{}", "model.merges" },
    { { "model", "merges", "3" }, "\"a b c\"", "model.merges[3]" },
    { { "model", "merges", "3" }, "[\"a\"]", "model.merges[3]" },
    { { "model", "merges", "3" }, "7", "model.merges[3]" },
    { { "model", "merges", "3" }, "[\"a\", \"nothing like it\"]", "model.merges[3]" },
    { { "normalizer" }, "{\"type\": \"NFKC\"}", "normalizer.type" },
    { { "pre_tokenizer" }, "null", "pre_tokenizer.type" },
    { { "pre_tokenizer" }, "{\"type\": \"Metaspace\"}", "pre_tokenizer.type" },
    { { "pre_tokenizer" },
      "{\"type\": \"ByteLevel\", \"add_prefix_space\": true}",
      "pre_tokenizer.add_prefix_space" },
    { { "pre_tokenizer" }, "{\"type\": \"ByteLevel\", \"use_regex\": false}", "pre_tokenizer.use_regex" },
    { { "pre_tokenizer", "pretokenizers", "0", "pattern" },
      "{\"Regex\": \"(a+)+$\"}",
      "pretokenizers[0].pattern" },
    { { "pre_tokenizer", "pretokenizers", "0", "pattern" },
      "{\"String\": \" \"}",
      "pretokenizers[0].pattern" },
    { { "pre_tokenizer", "pretokenizers", "0", "behavior" }, "\"Removed\"", "pretokenizers[0].behavior" },
    { { "pre_tokenizer", "pretokenizers", "0", "invert" }, "true", "pretokenizers[0].invert" },
    { { "pre_tokenizer", "pretokenizers", "1", "use_regex" }, "true", "pretokenizers[1].use_regex" },
    { { "decoder" }, "{\"type\": \"WordPiece\"}", "decoder.type" },
    { { "added_tokens" }, "7", "added_tokens" },
    { { "added_tokens", "1", "lstrip" }, "true", "added_tokens[1].lstrip" },
    { { "added_tokens", "1", "rstrip" }, "true", "added_tokens[1].rstrip" },
    { { "added_tokens", "1", "single_word" }, "true", "added_tokens[1].single_word" },
    { { "added_tokens", "1", "content" }, "\"\"", "added_tokens[1]" },
    { { "added_tokens", "1", "content" }, "\"a\"", "added_tokens[1]" },
    { { "added_tokens", "1", "id" }, "5", "added_tokens[1]" },
    { { "added_tokens", "1", "id" }, "9999999", "added_tokens[1]" },
};

static json_t *step_into(json_t *o, const char *key) {
    return json_is_array(o) ? json_array_get(o, (size_t)atoi(key)) : json_object_get(o, key);
}

static void put(json_t *root, const char *const key[4], const char *value) {
    json_t *o = root, *v = value ? json_loads(value, JSON_DECODE_ANY, NULL) : NULL;
    size_t last = 0;
    while (last < 3 && key[last + 1]) o = step_into(o, key[last++]);
    assert_non_null(o);
    if (!value)
        assert_int_equal(json_object_del(o, key[last]), 0);
    else if (json_is_array(o))
        assert_int_equal(json_array_set_new(o, (size_t)atoi(key[last]), v), 0);
    else
        assert_int_equal(json_object_set_new(o, key[last], v), 0);
}

static void what_would_change_ids_is_refused_by_name(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof unsupported / sizeof *unsupported; i++) {
        struct err err = { 0 };
        json_t *root = json_load_file("tests/reference/tokenizer-llama3.json", 0, NULL);
        put(root, unsupported[i].key, unsupported[i].value);
        char *text = json_dumps(root, 0);
        struct tokenizer *t = tokenizer_parse(text, strlen(text), &err);
        if (t) fail_msg("taken: case %zu, %s", i, unsupported[i].field);
        assert_true(err.code == ERR_UNSUPPORTED || err.code == ERR_CORRUPT);
        if (!strstr(err.msg, unsupported[i].field))
            fail_msg("case %zu: '%s' in '%s'", i, unsupported[i].field, err.msg);
        free(text);
        json_decref(root);
    }
}

static void a_file_that_is_cut_off_is_refused(void **state) {
    (void)state;
    size_t n;
    char *text = (char *)read_all("tests/reference/tokenizer-qwen2.json", &n);
    struct err err = { 0 };
    for (size_t i = 0; i < n - 2; i += 97) {
        assert_null(tokenizer_parse(text, i, &err));
        assert_int_equal(err.code, ERR_CORRUPT);
    }
    assert_null(tokenizer_open("/nowhere/tokenizer.json", &err));
    assert_int_equal(err.code, ERR_NOT_FOUND);
    free(text);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ids_are_those_of_tokenizers),
        cmocka_unit_test(pieces_of_a_text_have_its_ids),
        cmocka_unit_test(tokens_spell_the_text),
        cmocka_unit_test(names_tell_files_apart),
        cmocka_unit_test(bytes_come_back_as_they_were),
        cmocka_unit_test(malformed_bytes_are_replaced_as_python_does),
        cmocka_unit_test(what_would_change_ids_is_refused_by_name),
        cmocka_unit_test(a_file_that_is_cut_off_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
