/* data.c - opening and reading a corpus; see data.h. */
#include "node/data_internal.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MANIFEST_BYTES_MAX ((size_t)32 << 20)

struct data {
    struct data_info info;
    char folder[PATH_BYTES_MAX];
    uint64_t seed;
    unsigned token_bytes; /* 2 or 4 */
    struct token_file *file;
    struct token_file heldout;
    pthread_mutex_t lock;
};

int data_join(char out[PATH_BYTES_MAX], const char *folder, const char *name, struct err *err) {
    if ((size_t)snprintf(out, PATH_BYTES_MAX, "%s/%s", folder, name) < PATH_BYTES_MAX) return 0;
    return err_set(err, ERR_CONFIG, "path too long: %.100s.../%s", folder, name);
}

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

/* ---- files ------------------------------------------------------------------------------------- */

int data_read_at(int fd, uint64_t offset, size_t n, void *out, size_t *got, const char *path,
                 struct err *err) {
    for (*got = 0; *got < n;) {
        ssize_t done = pread(fd, (char *)out + *got, n - *got, (off_t)(offset + *got));
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return err_set_errno(err, "read %.150s", path);
        if (done == 0) break;
        *got += (size_t)done;
    }
    return 0;
}

int data_digest_of_file(int fd, const char *path, struct digest *out, struct err *err) {
    struct digest_stream s;
    char *block = malloc(BLOCK_BYTES);
    if (!block) return err_set(err, ERR_MEMORY, "no memory to check %.150s", path);
    digest_stream_init(&s);
    size_t got = BLOCK_BYTES;
    int rc = 0;
    for (uint64_t at = 0; rc == 0 && got == BLOCK_BYTES; at += got) {
        rc = data_read_at(fd, at, BLOCK_BYTES, block, &got, path, err);
        if (rc == 0) digest_stream_update(&s, block, got);
    }
    free(block);
    if (rc == 0) *out = digest_stream_final(&s);
    return rc;
}

/* ---- open -------------------------------------------------------------------------------------- */

/* Split a path or file:// URL of the manifest or its folder into folder and manifest path. */
static int resolve(const char *url, char folder[PATH_BYTES_MAX], char manifest[PATH_BYTES_MAX],
                   struct err *err) {
    if (!strncmp(url, "file://", 7))
        url += 7;
    else if (strstr(url, "://"))
        return err_set(err, ERR_UNSUPPORTED, "corpus %.150s: this build reads paths and file:// only", url);
    struct stat st;
    if (stat(url, &st)) return err_set_errno(err, "corpus %.150s", url);
    size_t length = strlen(url);
    if (length >= PATH_BYTES_MAX) return err_set(err, ERR_CONFIG, "path too long: %.100s...", url);
    memcpy(folder, url, length + 1);
    if (S_ISDIR(st.st_mode)) return data_join(manifest, folder, DATA_MANIFEST_NAME, err);
    memcpy(manifest, url, length + 1);
    char *slash = strrchr(folder, '/');
    if (slash)
        slash[slash == folder] = '\0';
    else
        strcpy(folder, ".");
    return 0;
}

static int read_manifest(const char *path, char **text, size_t *length, struct err *err) {
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return err_set_errno(err, "open %.150s", path);
    int rc = -1;
    *text = NULL;
    if (fstat(fd, &st))
        err_set_errno(err, "stat %.150s", path);
    else if (st.st_size > (off_t)MANIFEST_BYTES_MAX)
        err_set(err, ERR_CORRUPT, "%.150s: %lld bytes are too many for a manifest", path,
                (long long)st.st_size);
    else if (!(*text = malloc((size_t)st.st_size + 1)))
        err_set(err, ERR_MEMORY, "no memory for %.150s", path);
    else
        rc = data_read_at(fd, 0, (size_t)st.st_size, *text, length, path, err);
    close(fd);
    return rc;
}

/* A name from a manifest stays inside its folder. */
static int name_ok(const char *name) {
    return name[0] && name[0] != '.' && strlen(name) < NAME_BYTES_MAX && !strchr(name, '/');
}

static int parse_file(json_t *o, struct token_file *f, struct err *err) {
    const char *name, *hex;
    json_int_t tokens, samples = 0;
    json_error_t why;
    if (json_unpack_ex(o, &why, 0, "{s:s, s:I, s:s, s?:I}", "name", &name, "tokens", &tokens, "blake2b",
                       &hex, "samples", &samples))
        return err_set(err, ERR_CORRUPT, "%.150s", why.text);
    if (!name_ok(name) || tokens < 0 || samples < 0 || tokens > (json_int_t)1 << 56)
        return err_set(err, ERR_CORRUPT, "file '%.64s' with %lld tokens", name, (long long)tokens);
    strcpy(f->name, name);
    f->tokens = (uint64_t)tokens;
    f->samples = (uint64_t)samples;
    if (digest_parse(hex, &f->digest, err)) return err_set(err, ERR_CORRUPT, "%s: digest '%.70s'", name, hex);
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

static int parse_header(struct data *d, json_t *root, json_t **files, json_t **heldout,
                        json_int_t *samples, struct err *err) {
    const char *tokenizer, *dtype;
    json_int_t format = 0, vocabulary, sequence, document_end = -1;
    json_error_t why;
    if (json_unpack_ex(root, &why, 0, "{s:I}", "format", &format))
        return err_set(err, ERR_CORRUPT, "%.150s", why.text);
    if (format != DATA_FORMAT)
        return err_set(err, ERR_UNSUPPORTED, "format %lld; this build reads %d", (long long)format,
                       DATA_FORMAT);
    if (json_unpack_ex(root, &why, 0, "{s:s, s:I, s:s, s:I, s:o, s:I, s:o, s?:I}", "tokenizer", &tokenizer,
                       "vocabulary", &vocabulary, "dtype", &dtype, "sequence", &sequence, "files", files,
                       "samples", samples, "heldout", heldout, "document_end", &document_end))
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

static int parse_manifest(struct data *d, const char *text, size_t length, struct err *err) {
    json_error_t why;
    json_t *files, *heldout, *root = json_loadb(text, length, JSON_REJECT_DUPLICATES, &why);
    json_int_t samples;
    if (!root) return err_set(err, ERR_CORRUPT, "line %d: %.150s", why.line, why.text);
    int rc = parse_header(d, root, &files, &heldout, &samples, err);
    if (rc == 0) rc = parse_files(d, files, err);
    if (rc == 0) rc = parse_file(heldout, &d->heldout, err);
    if (rc == 0 && (uint64_t)samples != d->info.samples)
        rc = err_set(err, ERR_CORRUPT, "%lld samples; the files have %llu", (long long)samples,
                     (unsigned long long)d->info.samples);
    d->info.heldout_tokens = d->heldout.tokens;
    json_decref(root);
    return rc;
}

static int check_size(const struct data *d, const struct token_file *f, struct err *err) {
    char path[PATH_BYTES_MAX];
    struct stat st;
    if (data_join(path, d->folder, f->name, err)) return -1;
    if (stat(path, &st)) return err_set_errno(err, "%.150s", path);
    uint64_t expected = f->tokens * d->token_bytes;
    if ((uint64_t)st.st_size == expected) return 0;
    return err_set(err, (uint64_t)st.st_size < expected ? ERR_TRUNCATED : ERR_CORRUPT,
                   "%.150s: %llu bytes, the manifest says %llu", path, (unsigned long long)st.st_size,
                   (unsigned long long)expected);
}

static int check_digest(const struct data *d, struct token_file *f, struct err *err) {
    char path[PATH_BYTES_MAX], hex[2][DIGEST_HEX_BYTES];
    struct digest found;
    if (data_join(path, d->folder, f->name, err)) return -1;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return err_set_errno(err, "open %.150s", path);
    int rc = data_digest_of_file(fd, path, &found, err);
    close(fd);
    if (rc) return -1;
    f->checked = digest_equal(&found, &f->digest);
    if (f->checked) return 0;
    digest_hex(&found, hex[0]);
    digest_hex(&f->digest, hex[1]);
    return err_set(err, ERR_CORRUPT, "%.100s has digest %.16s..., the manifest says %.16s...", path,
                   hex[0], hex[1]);
}

static int check_files(struct data *d, struct err *err) {
    int all = (d->info.tokens + d->info.heldout_tokens) * d->token_bytes <= DATA_CHECK_AT_OPEN_BYTES_MAX;
    if (check_size(d, &d->heldout, err) || check_digest(d, &d->heldout, err)) return -1;
    for (uint32_t i = 0; i < d->info.files; i++) {
        if (check_size(d, &d->file[i], err)) return -1;
        if (all && check_digest(d, &d->file[i], err)) return -1;
    }
    return 0;
}

static int open_at(struct data *d, const char *url, const struct digest *expected, struct err *err) {
    char path[PATH_BYTES_MAX], hex[2][DIGEST_HEX_BYTES], *text = NULL;
    size_t length;
    if (resolve(url, d->folder, path, err)) return -1;
    int rc = read_manifest(path, &text, &length, err);
    if (rc) goto out;
    d->info.manifest_digest = digest_of(text, length);
    if (expected && !digest_equal(expected, &d->info.manifest_digest)) {
        digest_hex(&d->info.manifest_digest, hex[0]);
        digest_hex(expected, hex[1]);
        rc = err_set(err, ERR_CORRUPT, "%.100s has digest %.16s..., the run says %.16s...: another corpus",
                     path, hex[0], hex[1]);
        goto out;
    }
    if ((rc = parse_manifest(d, text, length, err))) err_prefix(err, "%.100s", path);
    if (rc == 0) rc = check_files(d, err);
out:
    free(text);
    return rc;
}

struct data *data_open(const char *manifest_url, const struct digest *expected,
                       uint64_t shuffle_seed, struct err *err) {
    struct data *d = calloc(1, sizeof *d);
    if (!d) {
        err_set(err, ERR_MEMORY, "no memory for a corpus");
        return NULL;
    }
    pthread_mutex_init(&d->lock, NULL);
    d->seed = shuffle_seed;
    if (open_at(d, manifest_url, expected, err)) {
        data_close(d);
        return NULL;
    }
    return d;
}

void data_close(struct data *d) {
    if (!d) return;
    pthread_mutex_destroy(&d->lock);
    free(d->file);
    free(d);
}

const struct data_info *data_info(const struct data *d) {
    return &d->info;
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

/* The file is opened each time: a corpus may have more files than a process may hold open. */
static int read_tokens(const struct data *d, const struct token_file *f, uint64_t first, size_t n,
                       int32_t *out, struct err *err) {
    char path[PATH_BYTES_MAX];
    size_t got, bytes = n * d->token_bytes;
    if (data_join(path, d->folder, f->name, err)) return -1;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return err_set_errno(err, "open %.150s", path);
    int rc = data_read_at(fd, first * d->token_bytes, bytes, out, &got, path, err);
    close(fd);
    if (rc) return -1;
    if (got < bytes)
        return err_set(err, ERR_TRUNCATED, "%.150s ends before token %llu", path,
                       (unsigned long long)(first + n));
    if (widen(out, n, d->token_bytes, d->info.vocabulary))
        return err_set(err, ERR_CORRUPT, "%.150s has a token outside the vocabulary of %u", path,
                       d->info.vocabulary);
    return 0;
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
    int rc = f->checked ? 0 : check_digest(d, f, err);
    pthread_mutex_unlock(&d->lock);
    return rc;
}

int data_sample(struct data *d, uint64_t index, int32_t *tokens_out, struct err *err) {
    if (index >= d->info.samples)
        return err_set(err, ERR_CONFIG, "sample %llu asked for, the corpus has %llu",
                       (unsigned long long)index, (unsigned long long)d->info.samples);
    uint64_t sample = data_permute(d->seed, d->info.samples, index);
    struct token_file *f = file_of_sample(d, sample);
    if (check_once(d, f, err)) return -1;
    return read_tokens(d, f, (sample - f->first_sample) * d->info.sequence,
                       (size_t)d->info.sequence + 1, tokens_out, err);
}

static int read_some(const struct data *d, const struct token_file *f, uint64_t first, size_t n,
                     int32_t *out, size_t *got, struct err *err) {
    uint64_t left = first < f->tokens ? f->tokens - first : 0;
    *got = left < n ? (size_t)left : n;
    return read_tokens(d, f, first, *got, out, err);
}

int data_heldout(const struct data *d, uint64_t first, size_t n, int32_t *out, size_t *got,
                 struct err *err) {
    return read_some(d, &d->heldout, first, n, out, got, err);
}

int data_text(struct data *d, uint32_t file, uint64_t first, size_t n, int32_t *out, size_t *got,
              struct err *err) {
    assert(file < d->info.files);
    if (check_once(d, &d->file[file], err)) return -1;
    return read_some(d, &d->file[file], first, n, out, got, err);
}
