/* data.c - preparing, opening and reading a corpus; see data.h. */
#include "node/data.h"

#include "node/file.h"
#include "node/tokenizer.h"
#include "proto/proto.h"

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

#define FORMAT 1
#define BLOCK_BYTES (1u << 20)
#define NAME_BYTES_MAX 64
#define PATH_BYTES_MAX 4096
#define MANIFEST_BYTES_MAX ((size_t)32 << 20)
#define HELDOUT_NAME "heldout.bin"

/* One file of tokens, as the manifest names it. */
struct token_file {
    char name[NAME_BYTES_MAX];
    uint64_t tokens;
    uint64_t samples;
    uint64_t first_sample; /* samples of the files before it */
    struct digest digest;
    int checked; /* its bytes have this digest; under data.lock */
};

struct data {
    struct data_info info;
    char folder[PATH_BYTES_MAX];
    uint64_t seed;
    unsigned token_bytes; /* 2 or 4 */
    struct token_file *file;
    struct token_file heldout;
    pthread_mutex_t lock;
};

static unsigned token_bytes_of(uint32_t vocabulary) {
    return vocabulary <= 1u << 16 ? 2 : 4;
}

static int join(char out[PATH_BYTES_MAX], const char *folder, const char *name, struct err *err) {
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

/* Up to n bytes at `offset`; *got is less only at the end of the file. */
static int read_at(int fd, uint64_t offset, size_t n, void *out, size_t *got, const char *path,
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

static int digest_of_file(int fd, const char *path, struct digest *out, struct err *err) {
    struct digest_stream s;
    char *block = malloc(BLOCK_BYTES);
    if (!block) return err_set(err, ERR_MEMORY, "no memory to check %.150s", path);
    digest_stream_init(&s);
    size_t got = BLOCK_BYTES;
    int rc = 0;
    for (uint64_t at = 0; rc == 0 && got == BLOCK_BYTES; at += got) {
        rc = read_at(fd, at, BLOCK_BYTES, block, &got, path, err);
        if (rc == 0) digest_stream_update(&s, block, got);
    }
    free(block);
    if (rc == 0) *out = digest_stream_final(&s);
    return rc;
}

/* ---- prepare ----------------------------------------------------------------------------------- */

struct prepare {
    const char *folder;
    const struct tokenizer *tokenizer;
    uint32_t sequence;
    double heldout_fraction;
    int32_t document_end;
    unsigned token_bytes;
    int heldout_fd;
    char heldout_path[PATH_BYTES_MAX];
    uint64_t heldout_tokens;
};

static void pack(uint8_t *out, const int32_t *ids, size_t n, unsigned token_bytes) {
    for (size_t i = 0; i < n; i++)
        for (unsigned b = 0; b < token_bytes; b++) *out++ = (uint8_t)((uint32_t)ids[i] >> 8 * b);
}

/* Tokenise the text at `in` to the end of `out`, block by block. */
static int encode_file(const struct prepare *p, int in, const char *in_path, int out,
                       const char *out_path, uint64_t *tokens, struct err *err) {
    size_t ids_max = p->tokenizer->encode_max(BLOCK_BYTES), got = BLOCK_BYTES;
    char *text = malloc(BLOCK_BYTES);
    int32_t *ids = malloc(ids_max * sizeof *ids);
    uint8_t *packed = malloc(ids_max * p->token_bytes);
    int rc = text && ids && packed ? 0 : err_set(err, ERR_MEMORY, "no memory to tokenise");
    for (uint64_t at = 0; rc == 0 && got == BLOCK_BYTES; at += got) {
        if ((rc = read_at(in, at, BLOCK_BYTES, text, &got, in_path, err))) break;
        size_t n = p->tokenizer->encode(text, got, ids);
        pack(packed, ids, n, p->token_bytes);
        rc = file_write(out, packed, n * p->token_bytes, out_path, err);
        *tokens += n;
    }
    free(text);
    free(ids);
    free(packed);
    return rc;
}

/* Move the last `n` tokens of the file to the end of the held-out file. */
static int cut_heldout(struct prepare *p, int fd, const char *path, uint64_t tokens, uint64_t n,
                       struct err *err) {
    uint64_t at = (tokens - n) * p->token_bytes, left = n * p->token_bytes;
    char *block = malloc(BLOCK_BYTES);
    int rc = block ? 0 : err_set(err, ERR_MEMORY, "no memory to cut the held-out text");
    for (size_t got; rc == 0 && left; at += got, left -= got) {
        rc = read_at(fd, at, left < BLOCK_BYTES ? (size_t)left : BLOCK_BYTES, block, &got, path, err);
        if (rc == 0) rc = file_write(p->heldout_fd, block, got, p->heldout_path, err);
        if (rc == 0 && !got) rc = err_set(err, ERR_TRUNCATED, "%.150s shrank while it was read", path);
    }
    free(block);
    if (rc == 0 && ftruncate(fd, (off_t)((tokens - n) * p->token_bytes)))
        rc = err_set_errno(err, "truncate %.150s", path);
    p->heldout_tokens += n;
    return rc;
}

static int finish_file(int fd, const char *path, struct digest *digest, struct err *err) {
    if (digest_of_file(fd, path, digest, err)) return -1;
    return fsync(fd) ? err_set_errno(err, "fsync %.150s", path) : 0;
}

/* Everything is written under such a name first: the corpus that may be there stays, and whoever
 * reads it goes on, until the new one is whole. */
static int join_new(char out[PATH_BYTES_MAX], const char *folder, const char *name, struct err *err) {
    char file[NAME_BYTES_MAX + sizeof ".new"];
    snprintf(file, sizeof file, "%s.new", name);
    return join(out, folder, file, err);
}

/* One text becomes one token file, less its held-out end. */
static int prepare_file(struct prepare *p, const char *in_path, struct token_file *f, struct err *err) {
    char path[PATH_BYTES_MAX];
    int rc = -1, in = -1, out = -1;
    if (join_new(path, p->folder, f->name, err)) goto out;
    if ((in = open(in_path, O_RDONLY | O_CLOEXEC)) < 0) {
        err_set_errno(err, "open %.150s", in_path);
        goto out;
    }
    if ((out = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644)) < 0) {
        err_set_errno(err, "create %.150s", path);
        goto out;
    }
    uint64_t all = 0;
    if (encode_file(p, in, in_path, out, path, &all, err)) goto out;
    uint64_t heldout = (uint64_t)((double)all * p->heldout_fraction);
    f->tokens = all - heldout;
    if (f->tokens < (uint64_t)p->sequence + 1) {
        err_set(err, ERR_CONFIG, "%.100s: %llu tokens to train on (%llu in all), one sample of sequence "
                "%u needs %u", in_path, (unsigned long long)f->tokens, (unsigned long long)all,
                p->sequence, p->sequence + 1);
        goto out;
    }
    f->samples = (f->tokens - 1) / p->sequence;
    if (cut_heldout(p, out, path, all, heldout, err)) goto out;
    rc = finish_file(out, path, &f->digest, err);
out:
    if (in >= 0) close(in);
    if (out >= 0) close(out);
    return rc;
}

static json_t *file_json(const struct token_file *f, int with_samples) {
    char hex[DIGEST_HEX_BYTES];
    digest_hex(&f->digest, hex);
    json_t *o = json_pack("{s:s, s:I, s:s}", "name", f->name, "tokens", (json_int_t)f->tokens,
                          "blake2b", hex);
    if (o && with_samples) json_object_set_new(o, "samples", json_integer((json_int_t)f->samples));
    return o;
}

static char *manifest_text(const struct prepare *p, const struct token_file *file, uint32_t n,
                           const struct token_file *heldout) {
    uint64_t samples = 0;
    json_t *list = json_array();
    for (uint32_t i = 0; i < n; i++) {
        json_array_append_new(list, file_json(&file[i], 1));
        samples += file[i].samples;
    }
    json_t *root = json_pack("{s:i, s:s, s:I, s:s, s:I, s:o, s:I, s:o}", "format", FORMAT, "tokenizer",
                             p->tokenizer->name, "vocabulary", (json_int_t)p->tokenizer->vocabulary,
                             "dtype", p->token_bytes == 2 ? "uint16" : "uint32", "sequence",
                             (json_int_t)p->sequence, "files", list, "samples", (json_int_t)samples,
                             "heldout", file_json(heldout, 0));
    if (root && p->document_end >= 0)
        json_object_set_new(root, "document_end", json_integer(p->document_end));
    char *text = root ? json_dumps(root, JSON_INDENT(2)) : NULL;
    json_decref(root);
    return text;
}

static int write_manifest(const char *folder, const char *text, struct err *err) {
    char temporary[PATH_BYTES_MAX];
    if (join_new(temporary, folder, DATA_MANIFEST_NAME, err)) return -1;
    int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0) return err_set_errno(err, "create %.150s", temporary);
    int rc = file_write(fd, text, strlen(text), temporary, err);
    if (rc == 0 && fsync(fd)) rc = err_set_errno(err, "fsync %.150s", temporary);
    close(fd);
    return rc;
}

static int rename_new(const char *folder, const char *name, struct err *err) {
    char from[PATH_BYTES_MAX], to[PATH_BYTES_MAX];
    if (join_new(from, folder, name, err) || join(to, folder, name, err)) return -1;
    return rename(from, to) ? err_set_errno(err, "rename %.150s", from) : 0;
}

/* The old manifest goes first and the new one comes last: a folder with a manifest is complete. */
static int publish(const char *folder, const struct token_file *file, uint32_t n, struct err *err) {
    char manifest[PATH_BYTES_MAX];
    if (join(manifest, folder, DATA_MANIFEST_NAME, err)) return -1;
    if (unlink(manifest) && errno != ENOENT) return err_set_errno(err, "remove %.150s", manifest);
    for (uint32_t i = 0; i < n; i++)
        if (rename_new(folder, file[i].name, err)) return -1;
    return rename_new(folder, HELDOUT_NAME, err) || rename_new(folder, DATA_MANIFEST_NAME, err) ? -1 : 0;
}

/* What a corpus that was refused has left; names that were never used are empty. */
static void discard(const char *folder, const struct token_file *file, uint32_t n) {
    char path[PATH_BYTES_MAX];
    for (uint32_t i = 0; i < n; i++)
        if (file[i].name[0] && !join_new(path, folder, file[i].name, NULL)) unlink(path);
    if (!join_new(path, folder, HELDOUT_NAME, NULL)) unlink(path);
    if (!join_new(path, folder, DATA_MANIFEST_NAME, NULL)) unlink(path);
}

static int prepare_all(struct prepare *p, const char *const *files, uint32_t n,
                       struct token_file *file, struct err *err) {
    struct token_file heldout = { .name = HELDOUT_NAME };
    for (uint32_t i = 0; i < n; i++) {
        snprintf(file[i].name, sizeof file[i].name, "tokens-%05u.bin", i);
        if (prepare_file(p, files[i], &file[i], err)) return -1;
    }
    heldout.tokens = p->heldout_tokens;
    if (p->heldout_fraction > 0 && heldout.tokens < (uint64_t)p->sequence + 1)
        return err_set(err, ERR_CONFIG, "held-out fraction %g leaves %llu tokens, one sample of sequence "
                       "%u needs %u: use a larger fraction, or 0", p->heldout_fraction,
                       (unsigned long long)heldout.tokens, p->sequence, p->sequence + 1);
    if (finish_file(p->heldout_fd, p->heldout_path, &heldout.digest, err)) return -1;
    char *text = manifest_text(p, file, n, &heldout);
    if (!text) return err_set(err, ERR_MEMORY, "no memory for the manifest of %u files", n);
    int rc = write_manifest(p->folder, text, err);
    free(text);
    return rc ? rc : publish(p->folder, file, n, err);
}

static int prepare_check(uint32_t n, uint32_t sequence, double heldout_fraction, struct err *err) {
    if (!n || n > DATA_FILES_MAX)
        return err_set(err, ERR_CONFIG, "%u text files given; allowed are 1 to %d", n, DATA_FILES_MAX);
    if (!sequence || sequence > 1u << 20)
        return err_set(err, ERR_CONFIG, "sequence is %u; allowed are 1 to %u", sequence, 1u << 20);
    if (!(heldout_fraction >= 0 && heldout_fraction <= 0.5))
        return err_set(err, ERR_CONFIG, "held-out fraction is %g; allowed are 0 to 0.5", heldout_fraction);
    return 0;
}

int data_prepare(const char *out_dir, const char *const *files, uint32_t n, const char *tokenizer,
                 uint32_t sequence, double heldout_fraction, int32_t document_end,
                 struct data_info *info, struct err *err) {
    struct prepare p = { .folder = out_dir, .sequence = sequence, .heldout_fraction = heldout_fraction,
                         .document_end = document_end, .heldout_fd = -1 };
    if (prepare_check(n, sequence, heldout_fraction, err)) return -1;
    if (!(p.tokenizer = tokenizer_find(tokenizer, err))) return -1;
    if (document_end >= (int64_t)p.tokenizer->vocabulary)
        return err_set(err, ERR_CONFIG, "document end is token %d; the tokenizer's vocabulary has %u",
                       document_end, p.tokenizer->vocabulary);
    p.token_bytes = token_bytes_of(p.tokenizer->vocabulary);
    if (join_new(p.heldout_path, out_dir, HELDOUT_NAME, err)) return -1;
    if (mkdir(out_dir, 0755) && errno != EEXIST) return err_set_errno(err, "create %.150s", out_dir);
    p.heldout_fd = open(p.heldout_path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (p.heldout_fd < 0) return err_set_errno(err, "create %.150s", p.heldout_path);
    struct token_file *file = calloc(n, sizeof *file);
    int rc = file ? prepare_all(&p, files, n, file, err)
                  : err_set(err, ERR_MEMORY, "no memory for %u files", n);
    if (rc && file) discard(out_dir, file, n);
    free(file);
    close(p.heldout_fd);
    if (rc || !info) return rc;
    struct data *d = data_open(out_dir, NULL, 0, err);
    if (d) *info = d->info;
    data_close(d);
    return d ? 0 : -1;
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
    if (S_ISDIR(st.st_mode)) return join(manifest, folder, DATA_MANIFEST_NAME, err);
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
        rc = read_at(fd, 0, (size_t)st.st_size, *text, length, path, err);
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
    if (format != FORMAT)
        return err_set(err, ERR_UNSUPPORTED, "format %lld; this build reads %d", (long long)format, FORMAT);
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
    if (join(path, d->folder, f->name, err)) return -1;
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
    if (join(path, d->folder, f->name, err)) return -1;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return err_set_errno(err, "open %.150s", path);
    int rc = digest_of_file(fd, path, &found, err);
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
    if (join(path, d->folder, f->name, err)) return -1;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return err_set_errno(err, "open %.150s", path);
    int rc = read_at(fd, first * d->token_bytes, bytes, out, &got, path, err);
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
