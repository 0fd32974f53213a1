/* The corpus: preparing, checking, sample order. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <jansson.h>
#include <limits.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include "node/data.h"
#include "node/tokenizer.h"
#include "proto/proto.h"

#define SEQUENCE 10

static char folder[] = "/tmp/intellect-test-data-XXXXXX";

static const char *in_folder(const char *name) {
    static char path[4][256];
    static int next;
    char *p = path[next++ % 4];
    snprintf(p, sizeof path[0], "%s/%s", folder, name);
    return p;
}

static void write_file(const char *path, const void *bytes, size_t n) {
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    fclose(f);
}

/* Text whose byte at i names its place: 26 letters would repeat, so any byte value may come. */
static void write_text(const char *path, size_t n, unsigned start) {
    unsigned char *text = malloc(n);
    for (size_t i = 0; i < n; i++) text[i] = (unsigned char)(start + i + i / 251);
    write_file(path, text, n);
    free(text);
}

static int make_folder(void **state) {
    (void)state;
    if (!mkdtemp(folder)) return -1;
    write_text(in_folder("a.txt"), 1000, 0);
    write_text(in_folder("b.txt"), 437, 100);
    return 0;
}

static int remove_folder(void **state) {
    (void)state;
    char command[300];
    snprintf(command, sizeof command, "rm -r '%s'", folder);
    return system(command) != 0;
}

static int made(const char *out, const char *const *files, uint32_t n, double heldout,
                const char *document_end, struct data_info *info, struct err *err) {
    struct data_recipe r = { .tokenizer = "bytes", .sequence = SEQUENCE, .heldout_fraction = heldout,
                             .document_end = document_end };
    return data_prepare(in_folder(out), files, n, &r, info, err);
}

static void prepare(struct data_info *info) {
    const char *files[] = { in_folder("a.txt"), in_folder("b.txt") };
    struct err err = { 0 };
    if (made("corpus", files, 2, 0.1, NULL, info, &err)) fail_msg("%s", err.msg);
}

/* ---- order ------------------------------------------------------------------------------------- */

/* A sample that came twice, or never, would break the promise that every sample is spent once. */
static void the_order_is_a_permutation(void **state) {
    (void)state;
    const uint64_t sizes[] = { 1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 5000 };
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        uint64_t n = sizes[s];
        unsigned char *seen = calloc(n, 1);
        for (uint64_t i = 0; i < n; i++) {
            uint64_t j = data_permute(42, n, i);
            assert_true(j < n);
            assert_int_equal(seen[j]++, 0);
        }
        free(seen);
    }
}

/* Known answers: members of different builds must draw the same samples for the same leases. */
static void the_order_never_changes(void **state) {
    (void)state;
    assert_int_equal(data_permute(1, 1000000, 0), 351241u);
    assert_int_equal(data_permute(1, 1000000, 999999), 782596u);
    assert_int_equal(data_permute(0xfeedfacecafebeefu, (uint64_t)1 << 40, 123456789), 975515424731u);
}

static void another_seed_is_another_order(void **state) {
    (void)state;
    unsigned same = 0, near = 0;
    for (uint64_t i = 0; i < 1000; i++) {
        uint64_t a = data_permute(1, 1000, i), b = data_permute(2, 1000, i);
        same += a == b;
        near += i > 0 && a == data_permute(1, 1000, i - 1) + 1;
    }
    assert_true(same < 10 && near < 10);
}

/* ---- samples ----------------------------------------------------------------------------------- */

static void corpus_has_what_the_texts_have(void **state) {
    (void)state;
    struct data_info info;
    prepare(&info);
    assert_int_equal(info.files, 2);
    assert_int_equal(info.heldout_tokens, 100 + 43);
    assert_int_equal(info.tokens, 900 + 394);
    assert_int_equal(info.samples, 899 / SEQUENCE + 393 / SEQUENCE);
    assert_int_equal(info.vocabulary, 256);
    assert_string_equal(info.tokenizer, "bytes");
}

/* Each token is a target at most once, targets follow inputs, and a file's last window fits. */
static void samples_cover_the_text_without_overlap(void **state) {
    (void)state;
    struct data *d = data_open(in_folder("corpus"), NULL, 5, NULL);
    assert_non_null(d);
    unsigned char text[900], target[900] = { 0 };
    unsigned from_a = 0;
    for (size_t i = 0; i < sizeof text; i++) text[i] = (unsigned char)(i + i / 251);
    for (uint64_t s = 0; s < data_info(d)->samples; s++) {
        int32_t tokens[SEQUENCE + 1];
        assert_int_equal(data_sample(d, s, tokens, NULL), 0);
        for (size_t at = 0; at + SEQUENCE < sizeof text; at += SEQUENCE) {
            size_t t = 0;
            while (t <= SEQUENCE && tokens[t] == text[at + t]) t++;
            if (t <= SEQUENCE || target[at + 1]) continue;
            for (t = 1; t <= SEQUENCE; t++) assert_int_equal(target[at + t]++, 0);
            from_a++;
            break;
        }
    }
    assert_int_equal(from_a, 89);
    data_close(d);
}

/* The held-out text must never be leased: no sample index reaches it. */
static void heldout_is_the_end_of_each_text(void **state) {
    (void)state;
    struct data *d = data_open(in_folder("corpus/corpus.json"), NULL, 5, NULL);
    int32_t tokens[200];
    size_t got;
    assert_int_equal(data_heldout(d, 0, 200, tokens, &got, NULL), 0);
    assert_int_equal(got, 143);
    assert_int_equal(tokens[0], (900 + 900 / 251) & 255);
    assert_int_equal(tokens[100], (100 + 394 + 394 / 251) & 255);
    assert_int_equal(data_heldout(d, 143, 200, tokens, &got, NULL), 0);
    assert_int_equal(got, 0);
    assert_int_equal(data_text(d, 1, 390, 100, tokens, &got, NULL), 0);
    assert_int_equal(got, 4);
    assert_int_equal(tokens[0], (100 + 390 + 390 / 251) & 255);
    data_close(d);
}

static void members_draw_the_same_samples_by_url_and_digest(void **state) {
    (void)state;
    char url[300];
    int32_t a[SEQUENCE + 1], b[SEQUENCE + 1];
    snprintf(url, sizeof url, "file://%s", in_folder("corpus"));
    struct data *d = data_open(in_folder("corpus"), NULL, 9, NULL);
    struct data *e = data_open(url, &data_info(d)->manifest_digest, 9, NULL);
    assert_non_null(e);
    for (uint64_t s = 0; s < data_info(d)->samples; s++) {
        assert_int_equal(data_sample(d, s, a, NULL), 0);
        assert_int_equal(data_sample(e, s, b, NULL), 0);
        assert_memory_equal(a, b, sizeof a);
    }
    data_close(d);
    data_close(e);
}

static void a_sample_outside_the_corpus_is_refused(void **state) {
    (void)state;
    struct data *d = data_open(in_folder("corpus"), NULL, 9, NULL);
    int32_t tokens[SEQUENCE + 1];
    struct err err = { 0 };
    assert_int_equal(data_sample(d, data_info(d)->samples, tokens, &err), -1);
    assert_int_equal(err.code, ERR_CONFIG);
    data_close(d);
}

/* What keeps documents apart is the run's, so it is under the manifest's digest; the tokens stay as they are.
 */
static void the_end_of_documents_stands_in_the_manifest(void **state) {
    (void)state;
    const char *files[] = { in_folder("documents.txt") };
    struct data_info with, without;
    struct err err = { 0 };
    write_text(files[0], 50, 0);
    assert_int_equal(made("none", files, 1, 0, NULL, &without, &err), 0);
    assert_int_equal(made("ends", files, 1, 0, "10", &with, &err), 0);
    assert_int_equal(without.document_end, -1);
    assert_int_equal(with.document_end, 10);
    assert_int_equal(with.tokens, without.tokens + 1);
    assert_false(digest_equal(&with.manifest_digest, &without.manifest_digest));
    assert_int_equal(made("ends", files, 1, 0, "256", &with, &err), -1);
    assert_non_null(strstr(err.msg, "256"));
}

/* ---- documents --------------------------------------------------------------------------------- */

#define DOCUMENTS 400
#define LLAMA "tests/reference/tokenizer-llama3.json"

/* Document i: some have a special token's text, some are empty. */
static size_t document(char out[4096], int i) {
    static const char *const words[] = { "the",         " quick",          "\n\nIt's",
                                         " 12345",      "<|end_of_text|>", " \u00e9\u0301t\u00e9",
                                         "    if x:\n", "\u4e2d\u6587",    "\u0391\u03b2",
                                         " \U0001f600" };
    size_t n = 0;
    for (int k = 0; k < i * 7 % 90; k++)
        n += (size_t)sprintf(out + n, "%s", words[(i * 31 + k * k * 7 + k) % 10]);
    return n;
}

/* As one JSON line; every third is written with escapes. */
static size_t as_line(char *out, const char *text, size_t n, int i) {
    json_t *o = json_pack("{s:s%, s:i}", "text", text, n, "n", i);
    char *line = json_dumps(o, i % 3 ? 0 : JSON_ENSURE_ASCII);
    size_t length = (size_t)sprintf(out, "%s%s", line, i % 5 ? "\n" : "\r\n\n");
    free(line);
    json_decref(o);
    return length;
}

/* Two streams in one file, as `cat` leaves them. */
static void write_gzip(const char *path, const void *bytes, size_t n) {
    for (int i = 0; i < 2; i++) {
        unsigned part = (unsigned)(i ? n - n / 3 : n / 3);
        gzFile f = gzopen(path, i ? "ab" : "wb");
        assert_int_equal(gzwrite(f, (const char *)bytes + (i ? n / 3 : 0), part), part);
        assert_int_equal(gzclose(f), Z_OK);
    }
}

static void write_zstd(const char *path, const void *bytes, size_t n) {
    size_t room = ZSTD_compressBound(n);
    void *packed = malloc(room);
    size_t length = ZSTD_compress(packed, room, bytes, n, 1);
    assert_false(ZSTD_isError(length));
    write_file(path, packed, length);
    free(packed);
}

static int tokenised(const char *out, const char *path, unsigned threads, const char *end,
                     uint64_t file_tokens, struct data_info *info, struct err *err) {
    struct data_recipe r = { .tokenizer = LLAMA,
                             .sequence = SEQUENCE,
                             .document_end = end,
                             .threads = threads,
                             .file_tokens = file_tokens };
    return data_prepare(in_folder(out), &path, 1, &r, info, err);
}

/* The tokens of a corpus, in order. */
static size_t all_tokens(const char *corpus, int32_t *out, size_t room) {
    struct err err = { 0 };
    struct data *d = data_open(in_folder(corpus), NULL, 0, &err);
    if (!d) fail_msg("%s", err.msg);
    size_t n = 0, got;
    for (uint32_t f = 0; f < data_info(d)->files; f++, n += got)
        assert_int_equal(data_text(d, f, 0, room - n, out + n, &got, &err), 0);
    data_close(d);
    return n;
}

#define ROOM 2000000
static int32_t found[ROOM], wanted[ROOM];

/* Every document becomes its own tokens and the one that ends it, whatever it is packed in and whoever did
 * it. */
static void documents_become_their_tokens(void **state) {
    (void)state;
    char text[4096], *lines = malloc(DOCUMENTS * 16384);
    struct err err = { 0 };
    struct data_info info, other;
    struct tokenizer *t = tokenizer_open(LLAMA, &err);
    struct encoder *e = encoder_create(t, true, &err);
    size_t n = 0, tokens = 0, count, documents = 0;
    const int32_t *ids;
    for (int i = 0; i < DOCUMENTS; i++) {
        size_t length = document(text, i);
        n += as_line(lines + n, text, length, i);
        if (!length) continue;
        assert_int_equal(encoder_encode(e, text, length, &ids, &count, &err), 0);
        memcpy(wanted + tokens, ids, count * sizeof *ids);
        tokens += count;
        wanted[tokens++] = tokenizer_added(t, "<|end_of_text|>");
        documents++;
    }
    assert_true(documents > 300 && tokens > 10000);
    write_file(in_folder("lines.jsonl"), lines, n);
    write_gzip(in_folder("lines.jsonl.gz"), lines, n);
    write_zstd(in_folder("lines.jsonl.zst"), lines, n);
    if (tokenised("lines", in_folder("lines.jsonl"), 1, NULL, 0, &info, &err)) fail_msg("%s", err.msg);
    assert_int_equal(info.document_end, tokenizer_added(t, "<|end_of_text|>"));
    assert_string_equal(info.tokenizer, tokenizer_name(t));
    assert_int_equal(all_tokens("lines", found, ROOM), tokens);
    assert_memory_equal(found, wanted, tokens * sizeof *found);
    for (int i = 0; i < 2; i++) {
        if (tokenised("packed", in_folder(i ? "lines.jsonl.gz" : "lines.jsonl.zst"), 3, NULL, 0, &other,
                      &err))
            fail_msg("%s", err.msg);
        assert_true(digest_equal(&info.manifest_digest, &other.manifest_digest));
    }
    struct tokenizer *copy = tokenizer_open(in_folder("packed"), &err); /* the corpus holds its tokenizer */
    assert_string_equal(tokenizer_name(copy), tokenizer_name(t));
    tokenizer_close(copy);
    encoder_destroy(e);
    tokenizer_close(t);
    free(lines);
}

/* Many megabytes in one document are cut for the workers; the tokens are those of the whole. */
static void a_long_text_is_one_document(void **state) {
    (void)state;
    static const char line[] =
        "It's the 12345th line of a text, with \u00e9t\u00e9 and   more.\n\n  And  so on!\n";
    size_t n = 0, room = 2500000, count;
    char *text = malloc(room + sizeof line);
    struct err err = { 0 };
    struct data_info info;
    const int32_t *ids;
    while (n < room) n += (size_t)sprintf(text + n, "%s", line + n % 9);
    mkdir(in_folder("texts"), 0755);
    mkdir(in_folder("texts/b"), 0755);
    write_file(in_folder("texts/b/long.txt"), text, n);
    write_file(in_folder("texts/.hidden"), "x", 1);
    write_file(in_folder("texts/a.txt"), "", 0);
    if (tokenised("long", in_folder("texts"), 3, NULL, 500000, &info, &err)) fail_msg("%s", err.msg);
    struct tokenizer *t = tokenizer_open(LLAMA, &err);
    struct encoder *e = encoder_create(t, true, &err);
    assert_int_equal(encoder_encode(e, text, n, &ids, &count, &err), 0);
    size_t got = all_tokens("long", found, ROOM);
    assert_true(info.files > 1);
    assert_int_equal(got, count + 1);
    assert_memory_equal(found, ids, count * sizeof *ids);
    assert_int_equal(found[count], info.document_end);
    encoder_destroy(e);
    tokenizer_close(t);
    free(text);
}

/* What is wrong with a text names the text, and the place; nothing of the corpus is left. */
static void broken_sources_are_named(void **state) {
    (void)state;
    static const struct {
        const char *name, *text, *message;
    } lines[] = {
        { "bad1.jsonl", "{\"text\": \"a\"}\n\n{\"text\": \n", "bad1.jsonl, line 3: no JSON" },
        { "bad2.jsonl", "{\"text\": \"a\"}\n{\"body\": \"b\"}\n",
          "bad2.jsonl, line 2: no object with a string \"text\"" },
        { "bad3.jsonl", "[1]", "bad3.jsonl, line 1" },
        { "bad4.jsonl", "{\"text\": 1}", "bad4.jsonl, line 1" },
        { "bad5.jsonl.gz", "{\"text\": \"a\"}\n", "bad5.jsonl.gz, unpacked as gzip" },
        { "bad6.txt.zst", "some text", "bad6.txt.zst, unpacked as zstd" },
    };
    struct err err = { 0 };
    struct stat st;
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        write_file(in_folder(lines[i].name), lines[i].text, strlen(lines[i].text));
        assert_int_equal(tokenised("bad", in_folder(lines[i].name), 2, NULL, 0, NULL, &err), -1);
        assert_int_equal(err.code, ERR_CORRUPT);
        if (!strstr(err.msg, lines[i].message)) fail_msg("'%s' is not in '%s'", lines[i].message, err.msg);
    }
    assert_int_equal(tokenised("bad", in_folder("lines.jsonl"), 2, "none", 0, NULL, &err), -1);
    assert_non_null(strstr(err.msg, "--document-end"));
    assert_int_equal(tokenised("bad", in_folder("lines.jsonl"), 2, "<|nothing|>", 0, NULL, &err), -1);
    for (int i = 0; i < 2; i++) {
        const char *path = in_folder(i ? "lines.jsonl.gz" : "lines.jsonl.zst");
        assert_int_equal(stat(path, &st), 0);
        assert_int_equal(truncate(path, st.st_size / 2), 0);
        assert_int_equal(tokenised("bad", path, 2, NULL, 0, NULL, &err), -1);
        assert_int_equal(err.code, ERR_TRUNCATED);
        assert_non_null(strstr(err.msg, "cut off"));
    }
    DIR *dir = opendir(in_folder("bad"));
    for (struct dirent *e; (e = readdir(dir));) assert_int_equal(e->d_name[0], '.');
    closedir(dir);
}

/* ---- mixtures ---------------------------------------------------------------------------------- */

#define MIXED 5
static const uint32_t weights[MIXED] = { 55, 10, 20, 10, 5 }; /* INTELLECT-1's */

/* Corpus k has only the bytes k * 40 to k * 40 + 39, so a sample tells where it is from; window w begins with
 * the digits of w. */
static void make_parts(void) {
    for (int k = 0; k < MIXED; k++) {
        char name[16];
        size_t n = (size_t)(30 + 200 * k) * SEQUENCE + 1;
        unsigned char *text = malloc(n);
        for (size_t i = 0; i < n; i++) {
            size_t w = i / SEQUENCE, digit = i % SEQUENCE;
            text[i] = (unsigned char)(k * 40 + (digit ? (digit < 4 ? w >> 5 * (digit - 1) & 31 : 32) : 33));
        }
        snprintf(name, sizeof name, "part%d.txt", k);
        write_file(in_folder(name), text, n);
        free(text);
        const char *file = in_folder(name);
        struct err err = { 0 };
        snprintf(name, sizeof name, "part%d", k);
        if (made(name, &file, 1, k == 2 ? 0.1 : 0, NULL, NULL, &err)) fail_msg("%s", err.msg);
    }
}

static int mixed(const char *out, uint64_t samples, struct data_info *info, struct err *err) {
    struct data_mix_part part[MIXED];
    char path[MIXED][256];
    for (int k = 0; k < MIXED; k++) {
        snprintf(path[k], sizeof path[k], "%s/part%d", folder, k);
        part[k] = (struct data_mix_part){ path[k], weights[k] };
    }
    return data_mix(in_folder(out), part, MIXED, samples, info, err);
}

static int part_of(const int32_t *tokens, unsigned *window) {
    int k = tokens[0] / 40;
    *window = (unsigned)(tokens[1] - k * 40) | (unsigned)(tokens[2] - k * 40) << 5 |
              (unsigned)(tokens[3] - k * 40) << 10;
    assert_int_equal(tokens[0], k * 40 + 33);
    assert_int_equal(tokens[SEQUENCE], k * 40 + 33); /* the next window's first token */
    return k;
}

/* In each hundred samples every corpus has its share; all samples of a corpus have come before they come
 * again, in another order, which is true at the end of each twenty; and it is the same at every opening. */
static void a_mixture_keeps_its_weights(void **state) {
    (void)state;
    enum { N = 2000 };
    struct err err = { 0 };
    struct data_info info;
    static unsigned seen[MIXED][1024], order[2][1024];
    unsigned passes = 0, count[MIXED] = { 0 }, block[MIXED] = { 0 };
    make_parts();
    if (mixed("mixture", 0, &info, &err)) fail_msg("%s", err.msg);
    assert_int_equal(info.samples, 30 / 11 * 20); /* the first corpus ends first */
    if (mixed("mixture", N, &info, &err)) fail_msg("%s", err.msg);
    assert_int_equal(info.samples, N);
    struct data *d = data_open(in_folder("mixture"), &info.manifest_digest, 7, &err);
    struct data *again = data_open(in_folder("mixture"), NULL, 7, &err),
                *other = data_open(in_folder("mixture"), NULL, 8, &err);
    int differ = 0;
    for (uint64_t i = 0; i < N; i++) {
        int32_t tokens[SEQUENCE + 1], same[SEQUENCE + 1], another[SEQUENCE + 1];
        unsigned window;
        assert_int_equal(data_sample(d, i, tokens, &err), 0);
        assert_int_equal(data_sample(again, i, same, &err), 0);
        assert_int_equal(data_sample(other, i, another, &err), 0);
        assert_memory_equal(tokens, same, sizeof same);
        differ += memcmp(tokens, another, sizeof another) != 0;
        int k = part_of(tokens, &window);
        unsigned n = 30 + 200 * (unsigned)k - (k == 2 ? 43 : 0),
                 pass = count[k] / n; /* a tenth of part 2 is held out */
        assert_true(window < n);
        seen[k][window]++;
        if (k == 0 && pass < 2) order[pass][count[k] % n] = window;
        if (k == 0) passes = pass;
        count[k]++;
        block[k]++;
        for (int j = 0; i % 100 == 99 && j < MIXED; j++) {
            assert_int_equal(block[j], weights[j]);
            block[j] = 0;
            n = 30 + 200 * (unsigned)j - (j == 2 ? 43 : 0);
            for (unsigned w = 0; w < n; w++) assert_true(seen[j][w] - count[j] / n <= 1);
        }
    }
    assert_true(passes > 20 && differ > N / 2);
    assert_memory_not_equal(order[0], order[1], 30 * sizeof **order);
    data_close(d);
    data_close(again);
    data_close(other);
}

/* Known answers: members of different builds must draw the same samples from a mixture too. */
static void the_order_of_a_mixture_never_changes(void **state) {
    (void)state;
    static const int expected[][2] = { { 3, 608 }, { 3, 220 }, { 2, 89 },  { 0, 10 }, { 0, 21 },  { 0, 19 },
                                       { 1, 38 },  { 1, 53 },  { 2, 271 }, { 0, 26 }, { 3, 468 }, { 0, 0 } };
    struct err err = { 0 };
    struct data *d = data_open(in_folder("mixture"), NULL, 7, &err);
    for (uint64_t i = 0; i < 12; i++) {
        int32_t tokens[SEQUENCE + 1];
        unsigned window;
        assert_int_equal(data_sample(d, i * 151, tokens, &err), 0);
        int k = part_of(tokens, &window);
        if (k != expected[i][0] || (int)window != expected[i][1])
            fail_msg("{ %d, %u } at %d", k, window, (int)i);
    }
    data_close(d);
}

static void parts_that_do_not_fit_are_refused(void **state) {
    (void)state;
    struct err err = { 0 };
    struct data_info info;
    const char *line = in_folder("lines2.jsonl");
    write_file(line, "{\"text\": \"some text to train on, enough of it\"}\n", 48);
    if (tokenised("llama", line, 1, NULL, 0, NULL, &err)) fail_msg("%s", err.msg);
    struct data_mix_part part[] = { { in_folder("part0"), 1 },
                                    { in_folder("llama"), 1 },
                                    { in_folder("mixture"), 1 } };
    assert_int_equal(data_mix(in_folder("none"), part, 2, 0, &info, &err), -1);
    assert_non_null(strstr(err.msg, "has tokenizer"));
    part[1] = part[2];
    assert_int_equal(data_mix(in_folder("none"), part, 2, 0, &info, &err), -1);
    assert_non_null(strstr(err.msg, "no part of another"));
    part[1] = (struct data_mix_part){ in_folder("part1"), 70000 };
    assert_int_equal(data_mix(in_folder("none"), part, 2, 0, &info, &err), -1);
    assert_non_null(strstr(err.msg, "70001"));
    /* A part that is no longer what it was. */
    const char *file = in_folder("part3.txt");
    if (made("part3", &file, 1, 0.1, NULL, NULL, &err)) fail_msg("%s", err.msg);
    assert_null(data_open(in_folder("mixture"), NULL, 7, &err));
    assert_int_equal(err.code, ERR_CORRUPT);
    assert_non_null(strstr(err.msg, "part3"));
    make_parts();
}

/* ---- behind a network -------------------------------------------------------------------------- */

/* A web server for the test's folder: GET and HEAD, ranges, one request a connection. */
static struct {
    int listener, port;
    pthread_t thread;
    unsigned blocks; /* requests for token files so far */
    unsigned broken; /* of the next so many of them a byte is changed */
} web;

static void answer(int fd) {
    char request[4096] = "", name[256] = "", path[600], head[256];
    unsigned long long from = 0, to = ULLONG_MAX;
    size_t n = 0;
    while (n < sizeof request - 1 && !strstr(request, "\r\n\r\n")) {
        ssize_t got = recv(fd, request + n, sizeof request - 1 - n, 0);
        if (got <= 0) return;
        n += (size_t)got;
    }
    bool get = sscanf(request, "GET /%255s", name) == 1;
    if (!get && sscanf(request, "HEAD /%255s", name) != 1) return;
    char *range = strstr(request, "Range: bytes=");
    if (range) sscanf(range, "Range: bytes=%llu-%llu", &from, &to);
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "rb");
    if (!f) {
        static const char none[] = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        send(fd, none, sizeof none - 1, MSG_NOSIGNAL);
        return;
    }
    fseek(f, 0, SEEK_END);
    unsigned long long size = (unsigned long long)ftell(f);
    if (to >= size) to = size - 1;
    size_t length = from <= to ? (size_t)(to - from + 1) : 0;
    char *body = malloc(length + 1);
    fseek(f, (long)from, SEEK_SET);
    assert_int_equal(fread(body, 1, length, f), length);
    fclose(f);
    if (get && strstr(name, ".bin") && !strstr(name, ".blocks")) {
        web.blocks++;
        if (web.broken) web.broken--, body[length / 2] ^= 1;
    }
    snprintf(head, sizeof head,
             "HTTP/1.1 %s\r\nContent-Length: %zu\r\nContent-Range: bytes %llu-%llu/%llu\r\n"
             "Connection: close\r\n\r\n",
             range ? "206 Partial Content" : "200 OK", length, from, to, size);
    send(fd, head, strlen(head), MSG_NOSIGNAL);
    if (get) send(fd, body, length, MSG_NOSIGNAL);
    free(body);
}

static void *serve(void *arg) {
    for (int fd; (fd = accept(web.listener, NULL, NULL)) >= 0; close(fd)) answer(fd);
    return arg;
}

static void web_start(void) {
    struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t length = sizeof a;
    web.listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(web.listener, (struct sockaddr *)&a, sizeof a), 0);
    assert_int_equal(listen(web.listener, 64), 0);
    assert_int_equal(getsockname(web.listener, (struct sockaddr *)&a, &length), 0);
    web.port = ntohs(a.sin_port);
    assert_int_equal(pthread_create(&web.thread, NULL, serve, NULL), 0);
}

static void web_end(void) {
    shutdown(web.listener, SHUT_RDWR);
    pthread_join(web.thread, NULL);
    close(web.listener);
}

static struct data *over_the_web(const char *name, uint64_t seed) {
    char url[300];
    struct err err = { 0 };
    snprintf(url, sizeof url, "http://127.0.0.1:%d/%s", web.port, name);
    struct data *d = data_open(url, NULL, seed, &err);
    if (!d) fail_msg("%s", err.msg);
    return d;
}

static void assert_same_samples(const char *name, const char *url) {
    struct err err = { 0 };
    struct data *near = data_open(in_folder(name), NULL, 3, &err), *far = over_the_web(url, 3);
    int32_t a[SEQUENCE + 1], b[SEQUENCE + 1];
    assert_true(digest_equal(&data_info(near)->manifest_digest, &data_info(far)->manifest_digest));
    for (uint64_t i = 0; i < data_info(near)->samples && i < 300; i++) {
        assert_int_equal(data_sample(near, i, a, &err), 0);
        if (data_sample(far, i, b, &err)) fail_msg("%s", err.msg);
        assert_memory_equal(a, b, sizeof a);
    }
    size_t got, expected;
    assert_int_equal(data_heldout(near, 0, SEQUENCE, a, &expected, &err), 0);
    assert_int_equal(data_heldout(far, 0, SEQUENCE, b, &got, &err), 0);
    assert_int_equal(got, expected);
    assert_memory_equal(a, b, got * sizeof *a);
    data_close(near);
    data_close(far);
}

static off_t bytes_in(const char *name) {
    off_t bytes = 0;
    char path[600];
    struct stat st;
    DIR *dir = opendir(in_folder(name));
    for (struct dirent *e; dir && (e = readdir(dir));) {
        snprintf(path, sizeof path, "%s/%s/%s", folder, name, e->d_name);
        if (e->d_name[0] != '.' && !stat(path, &st)) bytes += st.st_size;
    }
    if (dir) closedir(dir);
    return bytes;
}

/* The same bits come over a network, once, and stay in a cache that has its size and no more. */
static void samples_come_over_a_network_once(void **state) {
    (void)state;
    struct err err = { 0 };
    struct data_info info;
    setenv("INTELLECT_CACHE", in_folder("cache"), 1);
    setenv("INTELLECT_CACHE_GB", "0.03", 1);
    web_start();
    assert_same_samples("long", "long"); /* several files of several blocks */
    unsigned fetched = web.blocks;
    assert_true(fetched >= 8);
    assert_same_samples("long", "long/corpus.json");
    assert_int_equal(web.blocks, fetched);
    assert_true(bytes_in("cache") > 1000000 && bytes_in("cache") <= 30000000);
    if (mixed("mixture", 500, &info, &err)) fail_msg("%s", err.msg);
    assert_same_samples("mixture", "mixture"); /* its parts lie beside it there too */
    setenv("INTELLECT_CACHE_GB", "0", 1);
    fetched = web.blocks;
    assert_same_samples("corpus", "corpus");
    assert_true(web.blocks > fetched);
    web_end();
}

/* What a server, a proxy or a disk made of a block never reaches the trainer. */
static void a_wrong_block_is_found(void **state) {
    (void)state;
    int32_t tokens[SEQUENCE + 1];
    struct err err = { 0 };
    web_start();
    struct data *d = over_the_web("corpus", 3);
    web.broken = 1;
    assert_int_equal(data_sample(d, 5, tokens, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    if (!strstr(err.msg, "block 0 of tokens-0000")) fail_msg("%s", err.msg);
    assert_int_equal(data_sample(d, 5, tokens, &err), 0); /* another try, another answer */
    data_close(d);
    d = over_the_web("corpus", 3);
    rename(in_folder("corpus/tokens-00000.bin.blocks"), in_folder("kept"));
    write_file(in_folder("corpus/tokens-00000.bin.blocks"), "0123456789abcdef0123456789abcdef", 32);
    unsigned failed = 0;
    for (uint64_t i = 0; i < data_info(d)->samples; i += 2) failed += data_sample(d, i, tokens, &err) != 0;
    assert_true(failed > 10);
    assert_int_equal(err.code, ERR_CORRUPT);
    assert_non_null(strstr(err.msg, "tokens-00000.bin.blocks"));
    rename(in_folder("kept"), in_folder("corpus/tokens-00000.bin.blocks"));
    data_close(d);
    assert_int_equal(truncate(in_folder("corpus/tokens-00000.bin"), 100), 0);
    d = over_the_web("corpus", 3);
    for (uint64_t i = 0; i < data_info(d)->samples; i += 2) data_sample(d, i, tokens, &err);
    assert_int_equal(err.code, ERR_TRUNCATED);
    data_close(d);
    prepare(NULL);
    web_end();
}

/* A cache is nobody's promise: one that was written over gives nothing wrong. */
static void a_broken_cache_costs_a_fetch(void **state) {
    (void)state;
    setenv("INTELLECT_CACHE_GB", "0.01", 1);
    web_start();
    assert_same_samples("long", "long");
    unsigned fetched = web.blocks;
    char path[600];
    DIR *dir = opendir(in_folder("cache"));
    for (struct dirent *e; (e = readdir(dir));) {
        if (e->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "%s/cache/%s", folder, e->d_name);
        FILE *f = fopen(path, "r+b");
        for (long at = 4096; at < 9000000; at += 5000) fseek(f, at, SEEK_SET), fputc('x', f);
        fclose(f);
    }
    closedir(dir);
    assert_same_samples("long", "long");
    assert_true(web.blocks > fetched);
    web_end();
    unsetenv("INTELLECT_CACHE_GB");
    unsetenv("INTELLECT_CACHE");
}

/* Samples are read ahead, and what is asked for comes whatever the order and whoever asks. */
struct reader {
    struct data *d;
    uint64_t from, step;
    const int32_t *expected;
};

static void *read_all(void *arg) {
    struct reader *r = arg;
    int32_t tokens[SEQUENCE + 1];
    uint64_t n = data_info(r->d)->samples;
    for (uint64_t i = 0, at = r->from; i < 3 * n; i++, at = (at + r->step) % n) {
        if (data_sample(r->d, at, tokens, NULL)) return arg;
        if (memcmp(tokens, r->expected + at * (SEQUENCE + 1), sizeof tokens) != 0) return arg;
    }
    return NULL;
}

static void reading_ahead_changes_no_sample(void **state) {
    (void)state;
    struct err err = { 0 };
    struct data *d = data_open(in_folder("part1"), NULL, 3, &err);
    uint64_t n = data_info(d)->samples;
    int32_t *expected = malloc(n * (SEQUENCE + 1) * sizeof *expected);
    for (uint64_t i = n; i-- > 0;) /* backwards: nothing is read ahead */
        assert_int_equal(data_sample(d, i, expected + i * (SEQUENCE + 1), &err), 0);
    struct reader reader[4] = {
        { d, 0, 1, expected }, { d, 17, 1, expected }, { d, 3, 7, expected }, { d, n - 2, n - 1, expected }
    };
    pthread_t thread[4];
    assert_null(read_all(&reader[0]));
    for (int i = 0; i < 4; i++) assert_int_equal(pthread_create(&thread[i], NULL, read_all, &reader[i]), 0);
    for (int i = 0; i < 4; i++) {
        void *failed;
        pthread_join(thread[i], &failed);
        assert_null(failed);
    }
    assert_true(data_waited_s(d) > 0);
    data_close(d);
    free(expected);
}

/* ---- what can be wrong ------------------------------------------------------------------------- */

static void a_text_smaller_than_a_sequence_names_both_numbers(void **state) {
    (void)state;
    const char *files[] = { in_folder("short.txt") };
    struct err err = { 0 };
    write_text(files[0], 10, 0);
    assert_int_equal(made("small", files, 1, 0, NULL, NULL, &err), -1);
    assert_int_equal(err.code, ERR_CONFIG);
    assert_non_null(strstr(err.msg, "short.txt"));
    assert_non_null(strstr(err.msg, "10 tokens"));
    assert_non_null(strstr(err.msg, "needs 11"));
    write_text(files[0], 11, 0);
    assert_null(data_open(in_folder("small"), NULL, 0, &err)); /* no manifest from a failed attempt */
    assert_int_equal(err.code, ERR_NOT_FOUND);
    assert_int_equal(made("small", files, 1, 0, NULL, NULL, &err), 0);
    assert_int_equal(made("small", files, 1, 0.09, NULL, NULL, &err), -1);
    struct data *d = data_open(in_folder("small"), NULL, 0, &err); /* and the corpus before it stays */
    assert_non_null(d);
    data_close(d);
}

static void wrong_arguments_are_named(void **state) {
    (void)state;
    const char *files[] = { in_folder("missing.txt") };
    struct err err = { 0 };
    struct data_recipe r = { .tokenizer = "bytes", .sequence = SEQUENCE };
    assert_int_equal(data_prepare(in_folder("x"), files, 1, &r, NULL, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
    r.tokenizer = "words";
    assert_int_equal(data_prepare(in_folder("x"), files, 1, &r, NULL, &err), -1);
    assert_non_null(strstr(err.msg, "bytes"));
    r = (struct data_recipe){ .tokenizer = "bytes" };
    assert_int_equal(data_prepare(in_folder("x"), files, 1, &r, NULL, &err), -1);
    r = (struct data_recipe){ .tokenizer = "bytes", .sequence = SEQUENCE, .heldout_fraction = 0.7 };
    assert_int_equal(data_prepare(in_folder("x"), files, 1, &r, NULL, &err), -1);
    r.heldout_fraction = 0;
    assert_int_equal(data_prepare(in_folder("x"), files, 0, &r, NULL, &err), -1);
    assert_null(data_open("ftp://host/corpus", NULL, 0, &err));
    assert_int_equal(err.code, ERR_CONFIG);
}

/* A member with other bytes would train on other text than the ledger says. */
static void changed_files_are_found(void **state) {
    (void)state;
    const char *path = in_folder("corpus/tokens-00001.bin");
    struct err err = { 0 };
    int fd = open(path, O_RDWR);
    unsigned char byte, other;
    assert_int_equal(pread(fd, &byte, 1, 20), 1);
    other = byte ^ 1;
    assert_int_equal(pwrite(fd, &other, 1, 20), 1);
    assert_null(data_open(in_folder("corpus"), NULL, 0, &err));
    assert_int_equal(err.code, ERR_CORRUPT);
    assert_non_null(strstr(err.msg, "tokens-00001.bin"));
    assert_int_equal(pwrite(fd, &byte, 1, 20), 1);
    assert_int_equal(ftruncate(fd, 394 * 2 - 2), 0);
    assert_null(data_open(in_folder("corpus"), NULL, 0, &err));
    assert_int_equal(err.code, ERR_TRUNCATED);
    close(fd);
    prepare(NULL);
}

/* A file that is cut under a running trainer is an error of that step, not a crash. */
static void a_file_that_shrinks_later_is_an_error(void **state) {
    (void)state;
    struct data *d = data_open(in_folder("corpus"), NULL, 0, NULL);
    struct err err = { 0 };
    int32_t tokens[SEQUENCE + 1];
    int failed = 0;
    assert_int_equal(truncate(in_folder("corpus/tokens-00000.bin"), 100), 0);
    for (uint64_t s = 0; s < data_info(d)->samples; s++) failed += data_sample(d, s, tokens, &err) != 0;
    assert_int_equal(err.code, ERR_TRUNCATED);
    assert_int_equal(failed, 89 - 4);
    data_close(d);
    prepare(NULL);
}

static void another_manifest_is_refused(void **state) {
    (void)state;
    struct digest other = { { 1 } };
    struct err err = { 0 };
    assert_null(data_open(in_folder("corpus"), &other, 0, &err));
    assert_int_equal(err.code, ERR_CORRUPT);
}

/* The manifest comes over the network one day: nothing in it may lead out of its folder or past
 * what is there. */
static void hostile_manifests_are_refused(void **state) {
    (void)state;
    static const char *const manifests[] = {
        "", "[]", "{}", "{\"format\": 2}", "{\"format\": \"one\"}",
#define WITH(dtype, name, tokens, samples)                                                                    \
    "{\"format\":1,\"tokenizer\":\"bytes\",\"vocabulary\":256,\"dtype\":\"" dtype "\",\"sequence\":10,"         \
    "\"files\":[{\"name\":\"" name "\",\"tokens\":" tokens ",\"samples\":" samples ",\"blake2b\":\"00\"}],"     \
    "\"samples\":" samples ",\"heldout\":{\"name\":\"heldout.bin\",\"tokens\":0,\"blake2b\":\"00\"}}"
        WITH("float", "t.bin", "11", "1"), WITH("uint16", "../t.bin", "11", "1"),
        WITH("uint16", "t.bin", "-11", "1"), WITH("uint16", "t.bin", "11", "2"),
        WITH("uint16", "t.bin", "11", "1"), WITH("uint16", "t.bin", "0", "0"),
#define DIGEST "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
#define MIXTURE(corpus, weight, samples)                                                                      \
    "{\"format\":1,\"tokenizer\":\"bytes\",\"vocabulary\":256,\"dtype\":\"uint16\",\"sequence\":10,"              \
    "\"mixture\":[{\"corpus\":\"" corpus "\",\"manifest\":\"" DIGEST "\",\"weight\":" weight "}],\"samples\":" samples "}"
        MIXTURE("../corpus", "0", "1"), MIXTURE("../corpus", "65537", "1"), MIXTURE("../corpus", "-1", "1"),
        MIXTURE("../corpus", "1", "0"), MIXTURE("../corpus", "1", "1"), MIXTURE(".", "1", "1"),
    };
    mkdir(in_folder("hostile"), 0755);
    for (size_t i = 0; i < sizeof manifests / sizeof *manifests; i++) {
        struct err err = { 0 };
        write_file(in_folder("hostile/corpus.json"), manifests[i], strlen(manifests[i]));
        if (data_open(in_folder("hostile"), NULL, 0, &err)) fail_msg("accepted %s", manifests[i]);
        assert_true(err.code == ERR_CORRUPT || err.code == ERR_UNSUPPORTED);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_order_is_a_permutation),
        cmocka_unit_test(the_order_never_changes),
        cmocka_unit_test(another_seed_is_another_order),
        cmocka_unit_test(corpus_has_what_the_texts_have),
        cmocka_unit_test(samples_cover_the_text_without_overlap),
        cmocka_unit_test(heldout_is_the_end_of_each_text),
        cmocka_unit_test(members_draw_the_same_samples_by_url_and_digest),
        cmocka_unit_test(a_sample_outside_the_corpus_is_refused),
        cmocka_unit_test(the_end_of_documents_stands_in_the_manifest),
        cmocka_unit_test(documents_become_their_tokens),
        cmocka_unit_test(a_long_text_is_one_document),
        cmocka_unit_test(broken_sources_are_named),
        cmocka_unit_test(a_mixture_keeps_its_weights),
        cmocka_unit_test(the_order_of_a_mixture_never_changes),
        cmocka_unit_test(parts_that_do_not_fit_are_refused),
        cmocka_unit_test(samples_come_over_a_network_once),
        cmocka_unit_test(a_wrong_block_is_found),
        cmocka_unit_test(a_broken_cache_costs_a_fetch),
        cmocka_unit_test(reading_ahead_changes_no_sample),
        cmocka_unit_test(a_text_smaller_than_a_sequence_names_both_numbers),
        cmocka_unit_test(wrong_arguments_are_named),
        cmocka_unit_test(changed_files_are_found),
        cmocka_unit_test(a_file_that_shrinks_later_is_an_error),
        cmocka_unit_test(another_manifest_is_refused),
        cmocka_unit_test(hostile_manifests_are_refused),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
