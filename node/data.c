/* data.c - opening and reading a corpus; see data.h. */
#include "ckpt/store.h"
#include "node/data_internal.h"

#include "node/prefetch.h"
#include "node/tokenizer.h"

#include <assert.h>
#include <jansson.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define AHEAD_BYTES ((size_t)8 << 20) /* samples read ahead take so much, */
#define AHEAD_MAX 256u                /* and are no more than this */

/* A corpus has files of its own, or is a mixture of parts. */
struct data {
    struct data_info info;
    uint64_t seed;
    struct data_files *where;
    unsigned token_bytes; /* 2 or 4 */
    struct token_file *file; /* [info.files] */
    struct token_file heldout;
    struct data_part {
        struct data *data;
        uint32_t weight, first; /* of the weights of those before it */
    } *part;
    uint32_t parts, weights;
    pthread_mutex_t lock;
    struct prefetch *prefetch; /* from the second sample in a row on; under lock until then */
    bool prefetch_tried;
    uint64_t last_sample;
    uint64_t waited_ns; /* by those who asked for samples */
};

/* ---- order ------------------------------------------------------------------------------------- */

static uint64_t mix(uint64_t x) { /* splitmix64's finaliser */
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

uint64_t data_permute(uint64_t seed, uint64_t n, uint64_t index) {
    assert(index < n);
    unsigned half = 1;
    while (half < 32 && (uint64_t)1 << 2 * half < n) half++;
    uint64_t mask = ((uint64_t)1 << half) - 1;
    do {
        uint64_t left = index >> half, right = index & mask;
        for (unsigned r = 1; r <= DATA_PERMUTE_ROUNDS; r++) {
            uint64_t key = mix(seed + r * 0x9e3779b97f4a7c15u);
            uint64_t next = left ^ (mix(key ^ right) & mask);
            left = right;
            right = next;
        }
        index = left << half | right;
    } while (index >= n);
    return index;
}

/* ---- open -------------------------------------------------------------------------------------- */

/* A name from a manifest stays inside its folder. */
static int name_ok(const char *name) {
    return name[0] && name[0] != '.' && strlen(name) < NAME_BYTES_MAX && !strchr(name, '/');
}

static int parse_file(json_t *o, struct token_file *f, struct err *err) {
    const char *name, *hex, *blocks = NULL;
    json_int_t tokens, samples = 0;
    json_error_t why;
    if (json_unpack_ex(o, &why, 0, "{s:s, s:I, s:s, s?:I, s?:s}", "name", &name, "tokens", &tokens, "blake2b",
                       &hex, "samples", &samples, "blocks", &blocks))
        return err_set(err, ERR_CORRUPT, "%.150s", why.text);
    if (!name_ok(name) || tokens < 0 || samples < 0 || tokens > (json_int_t)1 << 56)
        return err_set(err, ERR_CORRUPT, "file '%.64s' with %lld tokens", name, (long long)tokens);
    strcpy(f->name, name);
    f->tokens = (uint64_t)tokens;
    f->samples = (uint64_t)samples;
    f->has_blocks = blocks != NULL;
    if (digest_parse(hex, &f->digest, err) || (blocks && digest_parse(blocks, &f->blocks, err)))
        return err_set(err, ERR_CORRUPT, "%s: a digest is '%.70s'", name, hex);
    return 0;
}

static int parse_files(struct data *d, json_t *list, struct err *err) {
    size_t n = json_array_size(list);
    if (!n || n > DATA_FILES_MAX) return err_set(err, ERR_CORRUPT, "%zu files", n);
    if (!(d->file = calloc(n, sizeof *d->file))) return err_set(err, ERR_MEMORY, "no memory");
    d->info.files = (uint32_t)n;
    for (size_t i = 0; i < n; i++) {
        struct token_file *f = &d->file[i];
        if (parse_file(json_array_get(list, i), f, err)) return -1;
        if (!f->tokens || f->samples != (f->tokens - 1) / d->info.sequence || !f->samples)
            return err_set(err, ERR_CORRUPT, "%s: %llu samples do not follow from %llu tokens", f->name,
                           (unsigned long long)f->samples, (unsigned long long)f->tokens);
        f->first_sample = d->info.samples;
        d->info.samples += f->samples;
        d->info.tokens += f->tokens;
    }
    return 0;
}

static int parse_header(struct data *d, json_t *root, struct err *err) {
    const char *tokenizer, *dtype;
    json_int_t format = 0, vocabulary, sequence, document_end = -1;
    json_error_t why;
    if (json_unpack_ex(root, &why, 0, "{s:I}", "format", &format))
        return err_set(err, ERR_CORRUPT, "%.150s", why.text);
    if (format != DATA_FORMAT)
        return err_set(err, ERR_UNSUPPORTED, "format %lld; this build reads %d", (long long)format,
                       DATA_FORMAT);
    if (json_unpack_ex(root, &why, 0, "{s:s, s:I, s:s, s:I, s?:I}", "tokenizer", &tokenizer, "vocabulary",
                       &vocabulary, "dtype", &dtype, "sequence", &sequence, "document_end", &document_end))
        return err_set(err, ERR_CORRUPT, "%.150s", why.text);
    if (vocabulary < 1 || vocabulary > 1 << 20 || sequence < 1 || sequence > 1 << 20 ||
        strlen(tokenizer) >= sizeof d->info.tokenizer)
        return err_set(err, ERR_CORRUPT, "vocabulary %lld, sequence %lld", (long long)vocabulary,
                       (long long)sequence);
    if (document_end < -1 || document_end >= vocabulary)
        return err_set(err, ERR_CORRUPT, "document_end %lld of a vocabulary of %lld",
                       (long long)document_end, (long long)vocabulary);
    d->info.document_end = (int32_t)document_end;
    d->token_bytes = !strcmp(dtype, "uint16") ? 2 : !strcmp(dtype, "uint32") ? 4 : 0;
    if (!d->token_bytes)
        return err_set(err, ERR_UNSUPPORTED, "dtype '%.32s'; this build reads uint16 and uint32", dtype);
    strcpy(d->info.tokenizer, tokenizer);
    d->info.vocabulary = (uint32_t)vocabulary;
    d->info.sequence = (uint32_t)sequence;
    return 0;
}

static int parse_own_files(struct data *d, json_t *root, struct err *err) {
    json_t *files, *heldout;
    json_int_t samples;
    json_error_t why;
    if (json_unpack_ex(root, &why, 0, "{s:o, s:I, s:o}", "files", &files, "samples", &samples, "heldout",
                       &heldout))
        return err_set(err, ERR_CORRUPT, "%.150s", why.text);
    if (parse_files(d, files, err) || parse_file(heldout, &d->heldout, err)) return -1;
    d->info.heldout_tokens = d->heldout.tokens;
    if ((uint64_t)samples == d->info.samples) return 0;
    return err_set(err, ERR_CORRUPT, "%lld samples; the files have %llu", (long long)samples,
                   (unsigned long long)d->info.samples);
}

static uint64_t bytes_of(const struct data *d, const struct token_file *f) {
    return f->tokens * d->token_bytes;
}

static int check_files(struct data *d, struct err *err) {
    bool all = (d->info.tokens + d->info.heldout_tokens) * d->token_bytes <= DATA_CHECK_AT_OPEN_BYTES_MAX;
    if (data_files_check_size(d->where, &d->heldout, bytes_of(d, &d->heldout), err) ||
        data_files_check_digest(d->where, &d->heldout, err))
        return -1;
    for (uint32_t i = 0; i < d->info.files; i++) {
        if (data_files_check_size(d->where, &d->file[i], bytes_of(d, &d->file[i]), err)) return -1;
        if (all && data_files_check_digest(d->where, &d->file[i], err)) return -1;
        d->file[i].checked = all;
    }
    return 0;
}

static int check_manifest(struct data *d, const char *text, size_t length, const struct digest *expected,
                          struct err *err) {
    char hex[2][DIGEST_HEX_BYTES];
    d->info.manifest_digest = digest_of(text, length);
    if (!expected || digest_equal(expected, &d->info.manifest_digest)) return 0;
    digest_hex(&d->info.manifest_digest, hex[0]);
    digest_hex(expected, hex[1]);
    return err_set(err, ERR_CORRUPT,
                   "%.100s/" DATA_MANIFEST_NAME " has digest %.16s..., the run says %.16s...: "
                   "another corpus",
                   data_files_where(d->where), hex[0], hex[1]);
}

static struct data *open_one(const char *url, const struct digest *expected, uint64_t seed, bool nested,
                             struct err *err);

/* ---- mixtures ---------------------------------------------------------------------------------- */

/* Where a part lies: as it is written, or seen from the mixture. */
static int part_url(const struct data *d, const char *corpus, char out[PATH_BYTES_MAX], struct err *err) {
    const char *where = data_files_where(d->where);
    size_t path = strcspn(where, "?");
    bool remote = data_files_remote(d->where);
    if (*corpus == '/' || strstr(corpus, "://")) {
        if (remote && !ckpt_store_remote(corpus))
            return err_set(err, ERR_CORRUPT, "part %.100s is a path, and the mixture is %.80s", corpus,
                           where);
        if ((size_t)snprintf(out, PATH_BYTES_MAX, "%s", corpus) < PATH_BYTES_MAX) return 0;
        return err_set(err, ERR_CONFIG, "path too long: %.100s...", corpus);
    }
    for (; remote && !strncmp(corpus, "../", 3); corpus += 3) /* no server need know what that means */
        while (path > strlen("https://") && where[--path] != '/');
    if ((size_t)snprintf(out, PATH_BYTES_MAX, "%.*s/%s%s", (int)path, where, corpus,
                         remote ? where + strcspn(where, "?") : "") < PATH_BYTES_MAX)
        return 0;
    return err_set(err, ERR_CONFIG, "path too long: %.100s...", corpus);
}

static int check_part(const struct data *d, const struct data *p, const char *name, struct err *err) {
    if (!strcmp(d->info.tokenizer, p->info.tokenizer) && d->info.vocabulary == p->info.vocabulary &&
        d->info.sequence == p->info.sequence && d->info.document_end == p->info.document_end)
        return 0;
    return err_set(err, ERR_CONFIG,
                   "part %.80s has tokenizer %.40s, sequence %u, document end %d; the mixture has %.40s, "
                   "%u, %d",
                   name, p->info.tokenizer, p->info.sequence, p->info.document_end, d->info.tokenizer,
                   d->info.sequence, d->info.document_end);
}

static int parse_part(struct data *d, json_t *o, struct err *err) {
    const char *corpus, *hex;
    char url[PATH_BYTES_MAX];
    json_int_t weight;
    json_error_t why;
    struct digest manifest;
    struct data_part *p = &d->part[d->parts];
    if (json_unpack_ex(o, &why, 0, "{s:s, s:s, s:I}", "corpus", &corpus, "manifest", &hex, "weight", &weight))
        return err_set(err, ERR_CORRUPT, "%.150s", why.text);
    if (weight < 1 || weight > DATA_WEIGHTS_MAX - d->weights || digest_parse(hex, &manifest, err))
        return err_set(err, ERR_CORRUPT,
                       "part %.80s has weight %lld and digest '%.70s'; weights are 1 or more, %u in all",
                       corpus, (long long)weight, hex, DATA_WEIGHTS_MAX);
    if (part_url(d, corpus, url, err)) return -1;
    if (!(p->data = open_one(url, &manifest, 0, true, err))) return -1;
    d->info.parts = ++d->parts;
    p->weight = (uint32_t)weight;
    p->first = d->weights;
    d->weights += p->weight;
    d->info.tokens += p->data->info.tokens;
    d->info.heldout_tokens += p->data->info.heldout_tokens;
    d->info.files += p->data->info.files;
    return check_part(d, p->data, corpus, err);
}

static int parse_mixture(struct data *d, json_t *list, json_t *samples, struct err *err) {
    size_t n = json_array_size(list);
    if (!n || n > DATA_PARTS_MAX || json_integer_value(samples) < 1)
        return err_set(err, ERR_CORRUPT,
                       "a mixture of %zu parts with %lld samples; allowed are 1 to %d parts", n,
                       (long long)json_integer_value(samples), DATA_PARTS_MAX);
    if (!(d->part = calloc(n, sizeof *d->part))) return err_set(err, ERR_MEMORY, "no memory");
    d->info.samples = (uint64_t)json_integer_value(samples);
    for (size_t i = 0; i < n; i++)
        if (parse_part(d, json_array_get(list, i), err)) return -1;
    return 0;
}

/* f of docs/protocol.md, "Samples": keys for the permutations of a mixture. */
static uint64_t key_of(uint64_t seed, uint64_t what) {
    return mix(seed + mix(what));
}

/* Blocks of as many positions as the weights are in all: each has from each part as many samples as its
 * weight, in an order of its own. A part's samples come in a permutation of them, and in another one when all
 * have come. */
static const struct data *sample_of_mixture(const struct data *d, uint64_t index, uint64_t *sample) {
    uint64_t block = index / d->weights;
    uint32_t at = (uint32_t)data_permute(key_of(d->seed, 2 * block + 1), d->weights, index % d->weights),
             k = 0;
    while (k + 1 < d->parts && d->part[k + 1].first <= at) k++;
    const struct data_part *p = &d->part[k];
    uint64_t number = block * p->weight + (at - p->first), n = p->data->info.samples;
    uint64_t pass = number / n;
    *sample = data_permute(key_of(d->seed, 2 * (((uint64_t)k + 1) << 40 | pass)), n, number % n);
    return p->data;
}

/* ---- open -------------------------------------------------------------------------------------- */

static int parse_manifest(struct data *d, const char *text, size_t length, bool nested, struct err *err) {
    json_error_t why;
    json_t *root = json_loadb(text, length, JSON_REJECT_DUPLICATES, &why),
           *mixture = json_object_get(root, "mixture");
    if (!root) return err_set(err, ERR_CORRUPT, "line %d: %.150s", why.line, why.text);
    int rc = parse_header(d, root, err);
    if (rc == 0 && mixture && nested)
        rc = err_set(err, ERR_UNSUPPORTED, "a mixture is no part of another one");
    if (rc == 0)
        rc = mixture ? parse_mixture(d, mixture, json_object_get(root, "samples"), err)
                     : parse_own_files(d, root, err);
    json_decref(root);
    return rc;
}

static int open_at(struct data *d, const char *url, const struct digest *expected, bool nested,
                   struct err *err) {
    char *text;
    size_t length;
    if (!(d->where = data_files_open(url, err)) || data_files_whole(d->where, NULL, &text, &length, err))
        return -1;
    int rc = check_manifest(d, text, length, expected, err);
    if (rc == 0 && (rc = parse_manifest(d, text, length, nested, err)))
        err_prefix(err, "%.100s/" DATA_MANIFEST_NAME, data_files_where(d->where));
    free(text);
    return rc || d->parts ? rc : check_files(d, err);
}

static struct data *open_one(const char *url, const struct digest *expected, uint64_t seed, bool nested,
                             struct err *err) {
    struct data *d = calloc(1, sizeof *d);
    if (!d) {
        err_set(err, ERR_MEMORY, "no memory for a corpus");
        return NULL;
    }
    pthread_mutex_init(&d->lock, NULL);
    d->seed = seed;
    d->last_sample = UINT64_MAX - 1;
    if (!open_at(d, url, expected, nested, err)) return d;
    data_close(d);
    return NULL;
}

struct data *data_open(const char *manifest_url, const struct digest *expected, uint64_t shuffle_seed,
                       struct err *err) {
    return open_one(manifest_url, expected, shuffle_seed, false, err);
}

void data_close(struct data *d) {
    if (!d) return;
    prefetch_destroy(d->prefetch);
    for (uint32_t i = 0; i < d->parts; i++) data_close(d->part[i].data);
    for (uint32_t i = 0; d->file && i < d->info.files; i++) free(d->file[i].block);
    free(d->heldout.block);
    data_files_close(d->where);
    pthread_mutex_destroy(&d->lock);
    free(d->part);
    free(d->file);
    free(d);
}

const struct data_info *data_info(const struct data *d) {
    return &d->info;
}

struct tokenizer *data_tokenizer(const struct data *d, struct err *err) {
    struct tokenizer *t = NULL;
    char *json;
    size_t n;
    if (!strcmp(d->info.tokenizer, "bytes")) return tokenizer_open("bytes", err);
    if (data_files_whole(d->where, TOKENIZER_FILE_NAME, &json, &n, err)) return NULL;
    if (!(t = tokenizer_parse(json, n, err)))
        err_prefix(err, "%.100s/" TOKENIZER_FILE_NAME, data_files_where(d->where));
    free(json);
    if (!t || !strcmp(tokenizer_name(t), d->info.tokenizer)) return t;
    err_set(err, ERR_CORRUPT, "%.100s/" TOKENIZER_FILE_NAME " is %s, the manifest says %s",
            data_files_where(d->where), tokenizer_name(t), d->info.tokenizer);
    tokenizer_close(t);
    return NULL;
}

/* ---- read -------------------------------------------------------------------------------------- */

/* Widen n packed tokens in place; from the end, because ids take more room than packed tokens. */
static int widen(int32_t *ids, size_t n, unsigned token_bytes, uint32_t vocabulary) {
    const uint8_t *packed = (const uint8_t *)ids;
    uint32_t largest = 0;
    for (size_t i = n; i-- > 0;) {
        uint32_t id = 0;
        for (unsigned b = token_bytes; b-- > 0;) id = id << 8 | packed[i * token_bytes + b];
        if (id > largest) largest = id;
        ids[i] = (int32_t)id;
    }
    return n == 0 || largest < vocabulary ? 0 : -1;
}

static int read_tokens(const struct data *d, struct token_file *f, uint64_t first, size_t n, int32_t *out,
                       struct err *err) {
    if (data_files_read(d->where, f, bytes_of(d, f), first * d->token_bytes, n * d->token_bytes, out, err))
        return -1;
    if (!widen(out, n, d->token_bytes, d->info.vocabulary)) return 0;
    return err_set(err, ERR_CORRUPT, "%.150s/%.60s has a token outside the vocabulary of %u",
                   data_files_where(d->where), f->name, d->info.vocabulary);
}

static struct token_file *file_of_sample(const struct data *d, uint64_t sample) {
    uint32_t low = 0, high = d->info.files - 1;
    while (low < high) {
        uint32_t middle = low + (high - low + 1) / 2;
        if (d->file[middle].first_sample <= sample)
            low = middle;
        else
            high = middle - 1;
    }
    return &d->file[low];
}

static int check_once(struct data *d, struct token_file *f, struct err *err) {
    pthread_mutex_lock(&d->lock);
    int rc = f->checked ? 0 : data_files_check_digest(d->where, f, err);
    f->checked = f->checked || rc == 0;
    pthread_mutex_unlock(&d->lock);
    return rc;
}

/* Window `sample` of the corpus itself, that is in the order of its files. */
static int read_window(struct data *d, uint64_t sample, int32_t *out, struct err *err) {
    struct token_file *f = file_of_sample(d, sample);
    if (check_once(d, f, err)) return -1;
    return read_tokens(d, f, (sample - f->first_sample) * d->info.sequence, (size_t)d->info.sequence + 1, out,
                       err);
}

static int read_sample(void *arg, uint64_t index, void *out, struct err *err) {
    struct data *d = arg;
    uint64_t sample;
    if (!d->parts) return read_window(d, data_permute(d->seed, d->info.samples, index), out, err);
    const struct data *part = sample_of_mixture(d, index, &sample);
    return read_window((struct data *)(uintptr_t)part, sample, out, err);
}

static unsigned streams_of(const struct data *d) {
    unsigned most = data_files_streams(d->where);
    for (uint32_t i = 0; i < d->parts; i++)
        if (streams_of(d->part[i].data) > most) most = streams_of(d->part[i].data);
    return most;
}

/* Who asks for one sample after the other is read ahead for, from the second one on. */
static struct prefetch *prefetch_for(struct data *d, uint64_t index) {
    pthread_mutex_lock(&d->lock);
    if (!d->prefetch_tried && index == d->last_sample + 1) {
        size_t bytes = ((size_t)d->info.sequence + 1) * sizeof(int32_t);
        size_t ahead = AHEAD_BYTES / bytes;
        d->prefetch_tried = true; /* without memory for it reading goes on as it was */
        d->prefetch = prefetch_create(read_sample, d, bytes, d->info.samples,
                                      ahead < 4           ? 4
                                      : ahead < AHEAD_MAX ? (unsigned)ahead
                                                          : AHEAD_MAX,
                                      streams_of(d), NULL);
    }
    d->last_sample = index;
    struct prefetch *p = d->prefetch;
    pthread_mutex_unlock(&d->lock);
    return p;
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int data_sample(struct data *d, uint64_t index, int32_t *tokens_out, struct err *err) {
    if (index >= d->info.samples)
        return err_set(err, ERR_CONFIG, "sample %llu asked for, the corpus has %llu",
                       (unsigned long long)index, (unsigned long long)d->info.samples);
    uint64_t begun = now_ns();
    struct prefetch *p = prefetch_for(d, index);
    int rc = p ? prefetch_take(p, index, tokens_out, err) : read_sample(d, index, tokens_out, err);
    __atomic_fetch_add(&d->waited_ns, now_ns() - begun, __ATOMIC_RELAXED);
    return rc;
}

double data_waited_s(const struct data *d) {
    return (double)__atomic_load_n(&d->waited_ns, __ATOMIC_RELAXED) / 1e9;
}

static int read_some(const struct data *d, struct token_file *f, uint64_t first, size_t n,
                     int32_t *out, size_t *got, struct err *err) {
    uint64_t left = first < f->tokens ? f->tokens - first : 0;
    *got = left < n ? (size_t)left : n;
    return *got ? read_tokens(d, f, first, *got, out, err) : 0;
}

/* The held-out texts of a mixture are one after the other. */
int data_heldout(struct data *d, uint64_t first, size_t n, int32_t *out, size_t *got, struct err *err) {
    if (!d->parts) return read_some(d, &d->heldout, first, n, out, got, err);
    *got = 0;
    for (uint32_t i = 0; i < d->parts && *got < n; i++) {
        uint64_t has = d->part[i].data->info.heldout_tokens;
        size_t some = 0;
        if (first < has && data_heldout(d->part[i].data, first, n - *got, out + *got, &some, err)) return -1;
        *got += some;
        first = first < has ? 0 : first - has;
    }
    return 0;
}

int data_text(struct data *d, uint32_t file, uint64_t first, size_t n, int32_t *out, size_t *got,
              struct err *err) {
    assert(file < d->info.files);
    for (uint32_t i = 0; i < d->parts; file -= d->part[i++].data->info.files)
        if (file < d->part[i].data->info.files)
            return data_text(d->part[i].data, file, first, n, out, got, err);
    if (check_once(d, &d->file[file], err)) return -1;
    return read_some(d, &d->file[file], first, n, out, got, err);
}
