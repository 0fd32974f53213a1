/* source.c - files of text, plain or packed; see source.h. */
#include "node/source.h"

#include <errno.h>
#include <fcntl.h>
#include <fts.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#define PACKED_BYTES (256u << 10)

enum packing { PLAIN, GZIP, ZSTD };

struct source {
    char *path;
    int fd;
    enum packing packing;
    uint64_t position;
    uint8_t *packed; /* [PACKED_BYTES] */
    size_t packed_n, packed_at;
    bool at_end; /* of the file */
    bool inside; /* a packed stream has begun and not ended */
    z_stream z;
    ZSTD_DStream *zstd;
};

static bool ends_in(const char *name, size_t n, const char *suffix) {
    size_t k = strlen(suffix);
    return n > k && !strncmp(name + n - k, suffix, k);
}

static enum packing packing_of(const char *path) {
    size_t n = strlen(path);
    return ends_in(path, n, ".gz") ? GZIP : ends_in(path, n, ".zst") ? ZSTD : PLAIN;
}

bool source_is_lines(const char *path) {
    static const size_t suffix[] = { [PLAIN] = 0, [GZIP] = 3, [ZSTD] = 4 };
    size_t n = strlen(path) - suffix[packing_of(path)];
    return ends_in(path, n, ".jsonl") || ends_in(path, n, ".ndjson");
}

/* ---- reading ----------------------------------------------------------------------------------- */

static int begin_packing(struct source *s, struct err *err) {
    if (s->packing != PLAIN && !(s->packed = malloc(PACKED_BYTES)))
        return err_set(err, ERR_MEMORY, "no memory to unpack %.150s", s->path);
    if (s->packing == GZIP && inflateInit2(&s->z, 16 + MAX_WBITS) != Z_OK)
        return err_set(err, ERR_MEMORY, "no memory to unpack %.150s", s->path);
    if (s->packing == ZSTD && !(s->zstd = ZSTD_createDStream()))
        return err_set(err, ERR_MEMORY, "no memory to unpack %.150s", s->path);
    return 0;
}

struct source *source_open(const char *path, struct err *err) {
    struct source *s = calloc(1, sizeof *s);
    if (!s || !(s->path = strdup(path))) {
        free(s);
        err_set(err, ERR_MEMORY, "no memory to read %.150s", path);
        return NULL;
    }
    s->packing = packing_of(path);
    if ((s->fd = open(path, O_RDONLY | O_CLOEXEC)) < 0)
        err_set_errno(err, "open %.150s", path);
    else if (!begin_packing(s, err))
        return s;
    source_close(s);
    return NULL;
}

void source_close(struct source *s) {
    if (!s) return;
    if (s->packing == GZIP) inflateEnd(&s->z);
    ZSTD_freeDStream(s->zstd);
    if (s->fd >= 0) close(s->fd);
    free(s->packed);
    free(s->path);
    free(s);
}

static int read_some(struct source *s, void *out, size_t n, size_t *got, struct err *err) {
    ssize_t done;
    do done = read(s->fd, out, n);
    while (done < 0 && errno == EINTR);
    if (done < 0) return err_set_errno(err, "read %.150s", s->path);
    *got = (size_t)done;
    s->position += *got;
    return 0;
}

static int wrong(const struct source *s, const char *kind, const char *why, struct err *err) {
    return err_set(err, ERR_CORRUPT, "%.150s, unpacked as %s near byte %llu: %.60s", s->path, kind,
                   (unsigned long long)s->position, why ? why : "wrong data");
}

/* One step of unpacking: from packed[packed_at..packed_n) to out[n]; *got may be 0. A file may be several
 * streams, one after the other. */
static int step_gzip(struct source *s, void *out, size_t n, size_t *got, struct err *err) {
    s->z.next_in = s->packed + s->packed_at;
    s->z.avail_in = (uInt)(s->packed_n - s->packed_at);
    s->z.next_out = out;
    s->z.avail_out = n < 1u << 30 ? (uInt)n : 1u << 30;
    uInt room = s->z.avail_out;
    int rc = inflate(&s->z, Z_NO_FLUSH);
    s->packed_at = s->packed_n - s->z.avail_in;
    *got = room - s->z.avail_out;
    if (rc != Z_OK && rc != Z_STREAM_END && rc != Z_BUF_ERROR) return wrong(s, "gzip", s->z.msg, err);
    s->inside = rc != Z_STREAM_END;
    if (!s->inside) inflateReset(&s->z);
    return 0;
}

static int step_zstd(struct source *s, void *out, size_t n, size_t *got, struct err *err) {
    ZSTD_inBuffer in = { s->packed, s->packed_n, s->packed_at };
    ZSTD_outBuffer to = { out, n, 0 };
    size_t rc = ZSTD_decompressStream(s->zstd, &to, &in);
    if (ZSTD_isError(rc)) return wrong(s, "zstd", ZSTD_getErrorName(rc), err);
    s->packed_at = in.pos;
    *got = to.pos;
    s->inside = rc != 0;
    return 0;
}

static int unpack_some(struct source *s, void *out, size_t n, size_t *got, struct err *err) {
    *got = 0;
    if (s->packed_at == s->packed_n && !s->at_end) {
        if (read_some(s, s->packed, PACKED_BYTES, &s->packed_n, err)) return -1;
        s->packed_at = 0;
        s->at_end = s->packed_n == 0;
    }
    /* Within a stream there may be output that needs no more input. */
    if (s->packed_at == s->packed_n && !s->inside) return 0;
    return s->packing == GZIP ? step_gzip(s, out, n, got, err) : step_zstd(s, out, n, got, err);
}

int source_read(struct source *s, void *out, size_t n, size_t *got, struct err *err) {
    size_t some = 0;
    for (*got = 0; *got < n; *got += some) {
        char *to = (char *)out + *got;
        if (s->packing == PLAIN ? read_some(s, to, n - *got, &some, err)
                                : unpack_some(s, to, n - *got, &some, err))
            return -1;
        if (some) continue;
        if (s->packing == PLAIN || (s->at_end && !s->inside)) break;
        if (s->at_end) return err_set(err, ERR_TRUNCATED, "%.150s is cut off after %llu bytes", s->path,
                                      (unsigned long long)s->position);
    }
    return 0;
}

uint64_t source_position(const struct source *s) {
    return s->position;
}

/* ---- files of folders -------------------------------------------------------------------------- */

static int add(struct source_list *l, const char *path, uint64_t bytes, struct err *err) {
    if (l->n == SOURCE_FILES_MAX) return err_set(err, ERR_CONFIG, "more than %u files", SOURCE_FILES_MAX);
    if ((l->n & (l->n - 1)) == 0) { /* full at each power of two */
        size_t room = l->n ? 2 * (size_t)l->n : 1;
        char **paths = realloc(l->path, room * sizeof *paths);
        if (paths) l->path = paths;
        uint64_t *sizes = paths ? realloc(l->bytes, room * sizeof *sizes) : NULL;
        if (!sizes) return err_set(err, ERR_MEMORY, "no memory for the names of %u files", l->n);
        l->bytes = sizes;
    }
    l->bytes[l->n] = bytes;
    if (!(l->path[l->n] = strdup(path)))
        return err_set(err, ERR_MEMORY, "no memory for the names of %u files", l->n);
    l->n++;
    return 0;
}

static int by_name(const FTSENT **a, const FTSENT **b) {
    return strcmp((*a)->fts_name, (*b)->fts_name);
}

static int walk(struct source_list *l, FTS *tree, struct err *err) {
    FTSENT *e;
    while ((errno = 0, e = fts_read(tree))) {
        bool hidden = e->fts_level > 0 && e->fts_name[0] == '.';
        if (hidden) fts_set(tree, e, FTS_SKIP);
        if (hidden || e->fts_info == FTS_D || e->fts_info == FTS_DP || e->fts_info == FTS_DC) continue;
        if (e->fts_info == FTS_NS || e->fts_info == FTS_ERR || e->fts_info == FTS_DNR ||
            e->fts_info == FTS_SLNONE) {
            errno = e->fts_errno ? e->fts_errno : ENOENT;
            return err_set_errno(err, "open %.150s", e->fts_path);
        }
        if (e->fts_info == FTS_F && add(l, e->fts_path, (uint64_t)e->fts_statp->st_size, err)) return -1;
    }
    return errno ? err_set_errno(err, "list files") : 0;
}

int source_list_fill(struct source_list *l, const char *const *paths, uint32_t n, struct err *err) {
    *l = (struct source_list){ 0 };
    for (uint32_t i = 0; i < n; i++) {
        uint32_t before = l->n;
        char *const one[] = { (char *)(uintptr_t)paths[i], NULL };
        FTS *tree = fts_open(one, FTS_LOGICAL | FTS_NOCHDIR, by_name);
        if (!tree) return err_set_errno(err, "list %.150s", paths[i]);
        int rc = walk(l, tree, err);
        fts_close(tree);
        if (rc == 0 && l->n == before)
            rc = err_set(err, ERR_CONFIG, "%.150s holds no file to read", paths[i]);
        if (rc) return -1;
    }
    return l->n ? 0 : err_set(err, ERR_CONFIG, "no text file given");
}

void source_list_release(struct source_list *l) {
    for (uint32_t i = 0; i < l->n; i++) free(l->path[i]);
    free(l->path);
    free(l->bytes);
    *l = (struct source_list){ 0 };
}
