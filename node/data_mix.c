/* data_mix.c - several corpora made into one by weights; see data.h. */
#include "node/data_internal.h"
#include "node/file.h"
#include "node/tokenizer.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static uint32_t divisor(uint32_t a, uint32_t b) {
    while (b) {
        uint32_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

/* How `to` is reached from the folder `from`; both absolute. */
static int way_between(const char *from, const char *to, char out[PATH_MAX], struct err *err) {
    size_t same = 0, n = 0;
    for (size_t i = 0; from[i] == to[i]; i++) {
        if (to[i] == '/') same = i + 1;
        if (!to[i]) break;
    }
    size_t length = strlen(from);
    if (!strncmp(from, to, length) && to[length] == '/') same = length + 1;
    for (const char *p = from + same; same <= length && *p; p++)
        if ((*p == '/' || p == from + same) && n + 4 < PATH_MAX) n += (size_t)sprintf(out + n, "../");
    if (n + strlen(to + same) < PATH_MAX) {
        strcpy(out + n, to + same);
        return 0;
    }
    return err_set(err, ERR_CONFIG, "path too long: %.100s...", to);
}

/* A part as the manifest names it: a URL stays, a path becomes the way from the mixture's folder. */
static int name_of(const char *out_dir, const char *corpus, char out[PATH_MAX], struct err *err) {
    char from[PATH_MAX], to[PATH_MAX];
    if (!strncmp(corpus, "file://", 7)) corpus += 7;
    if (strstr(corpus, "://")) {
        if ((size_t)snprintf(out, PATH_MAX, "%s", corpus) < PATH_MAX) return 0;
        return err_set(err, ERR_CONFIG, "URL too long: %.100s...", corpus);
    }
    if (!realpath(out_dir, from)) return err_set_errno(err, "%.150s", out_dir);
    if (!realpath(corpus, to)) return err_set_errno(err, "%.150s", corpus);
    return way_between(from, to, out, err);
}

static int same_kind(const struct data_info *a, const struct data_info *b, const char *x, const char *y,
                     struct err *err) {
    if (!strcmp(a->tokenizer, b->tokenizer) && a->sequence == b->sequence &&
        a->document_end == b->document_end)
        return 0;
    return err_set(err, ERR_CONFIG,
                   "%.60s has tokenizer %.40s, sequence %u, document end %d; %.60s has %.40s, %u, %d", x,
                   a->tokenizer, a->sequence, a->document_end, y, b->tokenizer, b->sequence, b->document_end);
}

static int add_part(json_t *list, const char *out_dir, const struct data_mix_part *part, uint32_t weight,
                    struct data_info *info, struct err *err) {
    char name[PATH_MAX], hex[DIGEST_HEX_BYTES];
    struct data *d = data_open(part->corpus, NULL, 0, err);
    if (!d) return -1;
    *info = *data_info(d);
    data_close(d);
    if (info->parts)
        return err_set(err, ERR_CONFIG, "%.150s is a mixture, which is no part of another one", part->corpus);
    if (name_of(out_dir, part->corpus, name, err)) return -1;
    digest_hex(&info->manifest_digest, hex);
    json_t *o = json_pack("{s:s, s:s, s:I, s:I}", "corpus", name, "manifest", hex, "weight",
                          (json_int_t)weight, "samples", (json_int_t)info->samples);
    return json_array_append_new(list, o) ? err_set(err, ERR_MEMORY, "no memory for a manifest") : 0;
}

/* The parts into the list; *samples: after so many the first part begins anew. */
static int add_parts(json_t *list, const char *out_dir, const struct data_mix_part *part, uint32_t n,
                     struct data_info *first, uint64_t *samples, struct err *err) {
    uint32_t common = 0;
    uint64_t weights = 0, blocks = UINT64_MAX;
    for (uint32_t i = 0; i < n; i++) common = divisor(common, part[i].weight);
    for (uint32_t i = 0; i < n; i++) {
        struct data_info info;
        uint32_t weight = part[i].weight / common;
        if (add_part(list, out_dir, &part[i], weight, &info, err)) return -1;
        if (!i) *first = info;
        if (same_kind(first, &info, part[0].corpus, part[i].corpus, err)) return -1;
        if (info.samples / weight < blocks) blocks = info.samples / weight;
        weights += weight;
    }
    if (weights > DATA_WEIGHTS_MAX)
        return err_set(err, ERR_CONFIG,
                       "the weights are %llu in all, without a common divisor; allowed are %u",
                       (unsigned long long)weights, DATA_WEIGHTS_MAX);
    *samples = blocks * weights;
    return 0;
}

static int replace_file(const char *out_dir, const char *name, const char *bytes, size_t n, struct err *err) {
    char path[PATH_BYTES_MAX], temporary[PATH_BYTES_MAX + 8];
    if (data_join(path, out_dir, name, err)) return -1;
    snprintf(temporary, sizeof temporary, "%s.new", path);
    int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    int rc = fd < 0 ? err_set_errno(err, "create %.150s", temporary) : file_write(fd, bytes, n, temporary, err);
    if (rc == 0 && fsync(fd)) rc = err_set_errno(err, "fsync %.150s", temporary);
    if (fd >= 0) close(fd);
    if (rc == 0 && rename(temporary, path)) rc = err_set_errno(err, "rename %.150s", temporary);
    if (rc && fd >= 0) unlink(temporary);
    return rc;
}

static int write_manifest(const char *out_dir, json_t *root, struct err *err) {
    char *text = json_dumps(root, JSON_INDENT(2));
    int rc = text ? replace_file(out_dir, DATA_MANIFEST_NAME, text, strlen(text), err)
                  : err_set(err, ERR_MEMORY, "no memory for a manifest");
    free(text);
    return rc;
}

/* All parts have the same. */
static int write_tokenizer(const char *out_dir, const char *corpus, struct err *err) {
    size_t n;
    struct data *d = data_open(corpus, NULL, 0, err);
    struct tokenizer *t = d ? data_tokenizer(d, err) : NULL;
    const char *json = t ? tokenizer_json(t, &n) : NULL;
    int rc = !t ? -1 : json ? replace_file(out_dir, TOKENIZER_FILE_NAME, json, n, err) : 0;
    tokenizer_close(t);
    data_close(d);
    return rc;
}

static int check(const struct data_mix_part *part, uint32_t n, uint64_t samples, struct err *err) {
    if (!n || n > DATA_PARTS_MAX)
        return err_set(err, ERR_CONFIG, "%u corpora given; allowed are 1 to %d", n, DATA_PARTS_MAX);
    if (samples > INT64_MAX)
        return err_set(err, ERR_CONFIG, "%llu samples are too many", (unsigned long long)samples);
    for (uint32_t i = 0; i < n; i++)
        if (!part[i].weight) return err_set(err, ERR_CONFIG, "%.150s has weight 0", part[i].corpus);
    return 0;
}

int data_mix(const char *out_dir, const struct data_mix_part *part, uint32_t n, uint64_t samples,
             struct data_info *info, struct err *err) {
    struct data_info first = { 0 };
    uint64_t once;
    if (check(part, n, samples, err)) return -1;
    if (mkdir(out_dir, 0755) && errno != EEXIST) return err_set_errno(err, "create %.150s", out_dir);
    json_t *list = json_array();
    int rc = add_parts(list, out_dir, part, n, &first, &once, err);
    if (rc == 0 && !samples && !once)
        rc = err_set(err, ERR_CONFIG,
                     "a part has fewer samples than its weight: --samples says how many there are to be, "
                     "and parts are gone through as often as that takes");
    json_t *root = rc ? NULL
                      : json_pack("{s:i, s:s, s:I, s:s, s:I, s:O, s:I}", "format", DATA_FORMAT, "tokenizer",
                                  first.tokenizer, "vocabulary", (json_int_t)first.vocabulary, "dtype",
                                  first.vocabulary <= 1u << 16 ? "uint16" : "uint32", "sequence",
                                  (json_int_t)first.sequence, "mixture", list, "samples",
                                  (json_int_t)(samples ? samples : once));
    if (root && first.document_end >= 0)
        json_object_set_new(root, "document_end", json_integer(first.document_end));
    if (rc == 0) rc = write_tokenizer(out_dir, part[0].corpus, err);
    if (rc == 0)
        rc = root ? write_manifest(out_dir, root, err) : err_set(err, ERR_MEMORY, "no memory for a manifest");
    json_decref(list);
    json_decref(root);
    struct data *d = rc ? NULL : data_open(out_dir, NULL, 0, err);
    if (d && info) *info = *data_info(d);
    data_close(d);
    return d ? 0 : -1;
}
