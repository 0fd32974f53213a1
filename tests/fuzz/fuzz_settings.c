/* fuzz_settings.c - run.yaml as `init` and `serve` read it, and one --set. What is taken and fits
 * together must survive being saved, and must come back unchanged from the genesis it is sealed in.
 *
 * Input: run.yaml; after a NUL, if there is one, the argument of --set. */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "proto/settings.h"
#include "proto/model.h"
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/records.h"

static char folder[64], path[96]; /* in memory, where the machine has such a file system */

static struct corpus_facts corpus = {.tokenizer = "bytes", .samples = 1u << 20}; /* fits the preset "debug" */

static void remove_folder(void) {
    unlink(path);
    rmdir(folder);
}

static void init(void) {
    struct msg_model model;
    struct err err;
    int failed = proto_init(&err) || proto_model_preset("debug", &model, &err);
    assert(!failed);
    corpus.sequence = model.sequence;
    corpus.vocabulary = model.vocabulary;
    if (*folder) return;
    strcpy(folder, "/dev/shm/fuzz-settings-XXXXXX");
    if (!mkdtemp(folder)) strcpy(folder, "/tmp/fuzz-settings-XXXXXX");
    if (!strncmp(folder, "/tmp/", 5) && !mkdtemp(folder)) abort();
    snprintf(path, sizeof path, "%s/%s", folder, SETTINGS_FILE_NAME);
    atexit(remove_folder);
}

static bool parse(struct settings *s, const uint8_t *bytes, size_t length) {
    const uint8_t *nul = memchr(bytes, '\0', length);
    size_t text = nul ? (size_t)(nul - bytes) : length;
    struct err err = {0};
    settings_init(s);
    if (settings_parse(s, path, (const char *)bytes, text, &err)) {
        assert(err.code == ERR_CONFIG && *err.msg);
        return false;
    }
    if (!nul) return true;
    size_t set = length - text - 1;
    char *assignment = malloc(set + 1);
    assert(assignment);
    memcpy(assignment, nul + 1, set);
    assignment[set] = '\0';
    int refused = settings_set(s, assignment, &err);
    free(assignment);
    assert(!refused || (err.code == ERR_CONFIG && *err.msg));
    return !refused;
}

/* run.yaml as it would be written. */
static char *saved(const struct settings *s, size_t *length) {
    struct err err;
    char *text = malloc(SETTINGS_BYTES_MAX);
    int failed = settings_save(s, path, &err);
    FILE *f = fopen(path, "re");
    assert(!failed && f && text);
    *length = fread(text, 1, SETTINGS_BYTES_MAX - 1, f);
    text[*length] = '\0';
    fclose(f);
    return text;
}

static void check_saved(const struct settings *s) {
    struct settings again;
    struct err err = {0};
    size_t length, length_again;
    char *text = saved(s, &length);
    settings_init(&again);
    int failed = settings_load(&again, path, &err) ||
                 settings_resolve(&again, folder, &corpus, &err);
    if (failed) fprintf(stderr, "%s\n", err.msg);
    assert(!failed);
    char *text_again = saved(&again, &length_again);
    assert(length == length_again && !memcmp(text, text_again, length));
    free(text);
    free(text_again);
}

static void check_sealed(const struct settings *s) {
    struct settings_genesis sealed;
    struct settings again;
    struct msg_genesis decoded;
    char what[512] = "";
    struct err err = {0};
    settings_to_genesis(s, &corpus, &sealed);
    sealed.from = (struct msg_checkpoint){.url = proto_str(s->from)}; /* as `init` does, which reads it */
    sealed.genesis.init_from = &sealed.from;
    sealed.genesis.init_from_count = *s->from != '\0';
    struct proto_buffer b = record_encoded(RECORD_genesis, &sealed.genesis);
    int failed = proto_decode(b.data, b.length, RECORD_genesis, &decoded, &err) ||
                 settings_from_genesis(&again, &decoded, &err);
    assert(!failed);
    bool same = settings_same_sealed(s, &again, what, sizeof what);
    if (!same) fprintf(stderr, "%s\n", what);
    assert(same);
    proto_decoded_release(RECORD_genesis, &decoded);
    proto_buffer_release(&b);
}

static bool take(const uint8_t *bytes, size_t length) {
    struct settings s;
    struct err err = {0};
    if (length > SETTINGS_BYTES_MAX || !parse(&s, bytes, length)) return false;
    if (settings_resolve(&s, folder, &corpus, &err)) {
        assert(err.code == ERR_CONFIG && *err.msg);
        return false;
    }
    check_saved(&s);
    check_sealed(&s);
    return true;
}

/* Every "key" that stands in the file, commented out or not, as a word with its colon. */
static void put_words(const struct fuzz_sink *out, const char *text) {
    for (const char *line = text; *line; line += strcspn(line, "\n"), line += *line == '\n') {
        char word[64];
        size_t skip = strspn(line, " #"), n = strspn(line + skip, "abcdefghijklmnopqrstuvwxyz0123456789_");
        if (!n || line[skip + n] != ':' || n + 2 >= sizeof word) continue;
        snprintf(word, sizeof word, "%.*s: ", (int)n, line + skip);
        out->word(out->arg, word);
    }
}

#define TEXT(literal) {literal, sizeof literal - 1} /* with its NULs */

static void samples(const struct fuzz_sink *out) {
    static const struct {
        const char *text;
        size_t length;
    } texts[] = {
        TEXT(""),
        TEXT("outer:\n  quorum: 3\n  grace_seconds: 0.25\n"),
        TEXT("model: {layers: 2, tied: true}\n\0outer.lr=0.5"),
        TEXT("model: {from: \"file:///x\"}\nrun: {name: \"a\\u2028b\\uFEFFc\\uffff\"}\n"),
        TEXT("run: {name: \"a \\u263a name\"}\ninner:\n  lr: 1e-3\n"),
        TEXT("outer: &a\n  result_codec: fp32\nserve:\n"),
    };
    static const char *const words[] = {"true", "false", "int8", "fp32", "&a ", "*a", "!!str ", "---\n", "- ",
                                        "? ", "|\n", ">\n", "\"\\u0085\"", "\"\\x80\"", "1e300", "0.0005", "file:///x"};
    struct settings s;
    struct err err;
    size_t length;
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        char name[] = "text-0";
        name[5] = (char)('0' + i);
        out->sample(out->arg, name, texts[i].text, texts[i].length);
    }
    settings_init(&s);
    int failed = settings_resolve(&s, "/run", &corpus, &err);
    if (failed) fprintf(stderr, "%s\n", err.msg);
    assert(!failed);
    for (int i = 0; i < SETTINGS_MAX; i++) s.given[i] = true;
    strcpy(s.corpus, "corpus");
    strcpy(s.address, "127.0.0.1");
    char *text = saved(&s, &length);
    out->sample(out->arg, "all", text, length);
    put_words(out, text);
    free(text);
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) out->word(out->arg, words[i]);
}

const struct fuzz_target fuzz_settings = {"settings", init, take, samples};
