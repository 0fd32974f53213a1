/* data_files.c - where the bytes of a corpus lie: a folder, or a store behind a network; see data_internal.h.
 */
#include "ckpt/store.h"
#include "node/data_cache.h"
#include "node/data_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define STREAMS_MAX 16
#define BLOCKS_BYTES_MAX ((size_t)64 << 20) /* of a token file of 512 GiB */

struct data_files {
    char where[PATH_BYTES_MAX];    /* the folder, or its URL */
    char manifest[NAME_BYTES_MAX]; /* its name there */
    struct ckpt_store *store;      /* NULL: a folder */
    struct data_cache *cache;      /* of a store; NULL: none */
    pthread_mutex_t lock;          /* of token_file.block */
};

int data_join(char out[PATH_BYTES_MAX], const char *folder, const char *name, struct err *err) {
    if ((size_t)snprintf(out, PATH_BYTES_MAX, "%s/%s", folder, name) < PATH_BYTES_MAX) return 0;
    return err_set(err, ERR_CONFIG, "path too long: %.100s.../%s", folder, name);
}

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

static int add_block(struct digest **block, size_t *blocks, const void *bytes, size_t n, struct err *err) {
    if ((*blocks & (*blocks - 1)) == 0) { /* full at each power of two */
        struct digest *more = realloc(*block, (*blocks ? 2 * *blocks : 1) * sizeof *more);
        if (!more) return err_set(err, ERR_MEMORY, "no memory for digests of blocks");
        *block = more;
    }
    (*block)[(*blocks)++] = digest_of(bytes, n);
    return 0;
}

int data_digest_of_file(int fd, const char *path, struct digest *out, struct digest **block, size_t *blocks,
                        struct err *err) {
    struct digest_stream s;
    char *bytes = malloc(DATA_BLOCK_BYTES);
    if (!bytes) return err_set(err, ERR_MEMORY, "no memory to check %.150s", path);
    digest_stream_init(&s);
    size_t got = DATA_BLOCK_BYTES;
    int rc = 0;
    for (uint64_t at = 0; rc == 0 && got == DATA_BLOCK_BYTES; at += got) {
        rc = data_read_at(fd, at, DATA_BLOCK_BYTES, bytes, &got, path, err);
        if (rc == 0) digest_stream_update(&s, bytes, got);
        if (rc == 0 && got && block) rc = add_block(block, blocks, bytes, got, err);
    }
    free(bytes);
    if (rc == 0) *out = digest_stream_final(&s);
    return rc;
}

/* ---- open -------------------------------------------------------------------------------------- */

/* Split a path to the manifest into folder and name; that of a folder stays. */
static int open_folder(struct data_files *f, const char *path, struct err *err) {
    struct stat st;
    if (!strncmp(path, "file://", 7)) path += 7;
    if (stat(path, &st)) return err_set_errno(err, "corpus %.150s", path);
    if (strlen(path) >= PATH_BYTES_MAX) return err_set(err, ERR_CONFIG, "path too long: %.100s...", path);
    strcpy(f->where, path);
    if (S_ISDIR(st.st_mode)) return 0;
    char *slash = strrchr(f->where, '/'), *name = slash ? slash + 1 : f->where;
    if (strlen(name) >= sizeof f->manifest)
        return err_set(err, ERR_CONFIG, "%.100s: the name is too long", path);
    strcpy(f->manifest, name);
    if (slash)
        slash[slash == f->where] = '\0';
    else
        strcpy(f->where, ".");
    return 0;
}

/* The same of a URL; settings ("?endpoint=...") stay behind what is left. */
static int open_store(struct data_files *f, const char *url, struct err *err) {
    static const char name[] = "/" DATA_MANIFEST_NAME;
    size_t path = strcspn(url, "?"), keep = path;
    if (keep >= sizeof name && !strncmp(url + keep - (sizeof name - 1), name, sizeof name - 1))
        keep -= sizeof name - 1;
    if ((size_t)snprintf(f->where, sizeof f->where, "%.*s%s", (int)keep, url, url + path) >= sizeof f->where)
        return err_set(err, ERR_CONFIG, "URL too long: %.100s...", url);
    if (!(f->store = ckpt_store_open(f->where, false, err))) return -1;
    f->cache = data_cache_open(DATA_BLOCK_BYTES);
    return 0;
}

struct data_files *data_files_open(const char *url, struct err *err) {
    struct data_files *f = calloc(1, sizeof *f);
    if (!f) {
        err_set(err, ERR_MEMORY, "no memory for a corpus");
        return NULL;
    }
    pthread_mutex_init(&f->lock, NULL);
    strcpy(f->manifest, DATA_MANIFEST_NAME);
    bool local = !strncmp(url, "file://", 7) || !strstr(url, "://");
    if (local ? !open_folder(f, url, err) : !open_store(f, url, err)) return f;
    data_files_close(f);
    return NULL;
}

void data_files_close(struct data_files *f) {
    if (!f) return;
    if (f->store) f->store->ops->close(f->store);
    data_cache_close(f->cache);
    pthread_mutex_destroy(&f->lock);
    free(f);
}

const char *data_files_where(const struct data_files *f) {
    return f->where;
}

bool data_files_remote(const struct data_files *f) {
    return f->store != NULL;
}

unsigned data_files_streams(const struct data_files *f) {
    if (!f->store) return 1;
    return f->store->streams < 4 ? 4 : f->store->streams > STREAMS_MAX ? STREAMS_MAX : f->store->streams;
}

/* ---- whole files ------------------------------------------------------------------------------- */

static int too_long(const struct data_files *f, const char *name, uint64_t bytes, struct err *err) {
    return err_set(err, ERR_CORRUPT, "%.120s/%.60s: %llu bytes are too many", f->where, name,
                   (unsigned long long)bytes);
}

/* All of a small object, with a NUL behind it. */
static int get_whole(struct data_files *f, const char *name, size_t max, char **bytes, size_t *n,
                     struct err *err) {
    struct ckpt_object o;
    if (f->store->ops->stat(f->store, name, &o, err)) return -1;
    if (o.bytes > max) return too_long(f, name, o.bytes, err);
    if (!(*bytes = malloc((size_t)o.bytes + 1))) return err_set(err, ERR_MEMORY, "no memory for %.60s", name);
    *n = (size_t)o.bytes;
    (*bytes)[*n] = '\0';
    if (!*n || !f->store->ops->get(f->store, name, 0, *bytes, *n, err)) return 0;
    free(*bytes);
    *bytes = NULL;
    return -1;
}

static int read_whole(const char *path, char **text, size_t *length, struct err *err) {
    struct stat st;
    int rc = -1, fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return err_set_errno(err, "open %.150s", path);
    if (fstat(fd, &st))
        err_set_errno(err, "stat %.150s", path);
    else if (st.st_size > (off_t)WHOLE_BYTES_MAX)
        err_set(err, ERR_CORRUPT, "%.150s: %lld bytes are more than %zu", path, (long long)st.st_size,
                WHOLE_BYTES_MAX);
    else if (!(*text = calloc(1, (size_t)st.st_size + 1)))
        err_set(err, ERR_MEMORY, "no memory for %.150s", path);
    else
        rc = data_read_at(fd, 0, (size_t)st.st_size, *text, length, path, err);
    close(fd);
    return rc;
}

int data_files_whole(struct data_files *f, const char *name, char **text, size_t *length, struct err *err) {
    char path[PATH_BYTES_MAX];
    if (!name) name = f->manifest;
    *text = NULL;
    if (f->store) return get_whole(f, name, WHOLE_BYTES_MAX, text, length, err);
    return data_join(path, f->where, name, err) ? -1 : read_whole(path, text, length, err);
}

int data_files_check_size(const struct data_files *f, const struct token_file *t, uint64_t bytes,
                          struct err *err) {
    char path[PATH_BYTES_MAX];
    struct stat st;
    if (f->store) return 0;
    if (data_join(path, f->where, t->name, err)) return -1;
    if (stat(path, &st)) return err_set_errno(err, "%.150s", path);
    if ((uint64_t)st.st_size == bytes) return 0;
    return err_set(err, (uint64_t)st.st_size < bytes ? ERR_TRUNCATED : ERR_CORRUPT,
                   "%.150s: %llu bytes, the manifest says %llu", path, (unsigned long long)st.st_size,
                   (unsigned long long)bytes);
}

static int other_digest(const char *what, const struct digest *found, const struct digest *expected,
                        struct err *err) {
    char hex[2][DIGEST_HEX_BYTES];
    digest_hex(found, hex[0]);
    digest_hex(expected, hex[1]);
    return err_set(err, ERR_CORRUPT, "%.150s has digest %.16s..., the manifest says %.16s...", what, hex[0],
                   hex[1]);
}

int data_files_check_digest(const struct data_files *f, struct token_file *t, struct err *err) {
    char path[PATH_BYTES_MAX];
    struct digest found;
    if (f->store) return 0;
    if (data_join(path, f->where, t->name, err)) return -1;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return err_set_errno(err, "open %.150s", path);
    int rc = data_digest_of_file(fd, path, &found, NULL, NULL, err);
    close(fd);
    if (rc) return -1;
    return digest_equal(&found, &t->digest) ? 0 : other_digest(path, &found, &t->digest, err);
}

/* ---- blocks ------------------------------------------------------------------------------------ */

static int fetch_digests(struct data_files *f, struct token_file *t, uint64_t bytes, struct err *err) {
    char name[NAME_BYTES_MAX + sizeof DATA_BLOCKS_SUFFIX], *list;
    size_t n = (size_t)((bytes + DATA_BLOCK_BYTES - 1) / DATA_BLOCK_BYTES) * sizeof(struct digest), got;
    if (!t->has_blocks)
        return err_set(err, ERR_UNSUPPORTED,
                       "%.120s: the manifest has no digests of the blocks of %.60s: over a network "
                       "it cannot be read; `data tokenize` makes it with them",
                       f->where, t->name);
    snprintf(name, sizeof name, "%s" DATA_BLOCKS_SUFFIX, t->name);
    if (n > BLOCKS_BYTES_MAX) return too_long(f, name, n, err);
    if (get_whole(f, name, n, &list, &got, err)) return -1;
    struct digest found = digest_of(list, got);
    if (got == n && digest_equal(&found, &t->blocks)) {
        t->block = (struct digest *)list;
        return 0;
    }
    free(list);
    if (got != n)
        return err_set(err, ERR_TRUNCATED, "%.120s/%.70s: %zu bytes, %zu are expected", f->where, name, got,
                       n);
    return other_digest(name, &found, &t->blocks, err);
}

static int digests_once(struct data_files *f, struct token_file *t, uint64_t bytes, struct err *err) {
    pthread_mutex_lock(&f->lock);
    int rc = t->block ? 0 : fetch_digests(f, t, bytes, err);
    pthread_mutex_unlock(&f->lock);
    return rc;
}

/* Block number b, n bytes, from the cache or the store; checked either way. */
static int get_block(struct data_files *f, const struct token_file *t, uint64_t b, size_t n, void *out,
                     struct err *err) {
    char what[NAME_BYTES_MAX + 64];
    const struct digest *expected = &t->block[b];
    if (f->cache && data_cache_get(f->cache, expected, out, n)) return 0;
    if (f->store->ops->get(f->store, t->name, b * DATA_BLOCK_BYTES, out, n, err)) return -1;
    struct digest found = digest_of(out, n);
    if (digest_equal(&found, expected)) {
        if (f->cache) data_cache_keep(f->cache, expected, out, n);
        return 0;
    }
    snprintf(what, sizeof what, "block %llu of %s", (unsigned long long)b, t->name);
    other_digest(what, &found, expected, err);
    err_prefix(err, "%.100s", f->where);
    return -1;
}

static int read_blocks(struct data_files *f, struct token_file *t, uint64_t bytes, uint64_t offset, size_t n,
                       char *out, struct err *err) {
    if (digests_once(f, t, bytes, err)) return -1;
    char *block = malloc(DATA_BLOCK_BYTES);
    if (!block) return err_set(err, ERR_MEMORY, "no memory for a block");
    int rc = 0;
    while (rc == 0 && n) {
        uint64_t b = offset / DATA_BLOCK_BYTES, begin = b * DATA_BLOCK_BYTES;
        size_t has = bytes - begin < DATA_BLOCK_BYTES ? (size_t)(bytes - begin) : DATA_BLOCK_BYTES;
        size_t skip = (size_t)(offset - begin), take = has - skip < n ? has - skip : n;
        if ((rc = get_block(f, t, b, has, block, err))) break;
        memcpy(out, block + skip, take);
        out += take;
        offset += take;
        n -= take;
    }
    free(block);
    return rc;
}

/* The file is opened each time: a corpus may have more files than a process may hold open. */
static int read_file(const struct data_files *f, const struct token_file *t, uint64_t offset, size_t n,
                     void *out, struct err *err) {
    char path[PATH_BYTES_MAX];
    size_t got;
    if (data_join(path, f->where, t->name, err)) return -1;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return err_set_errno(err, "open %.150s", path);
    int rc = data_read_at(fd, offset, n, out, &got, path, err);
    close(fd);
    if (rc || got == n) return rc;
    return err_set(err, ERR_TRUNCATED, "%.150s ends before byte %llu", path,
                   (unsigned long long)(offset + n));
}

int data_files_read(struct data_files *f, struct token_file *t, uint64_t bytes, uint64_t offset, size_t n,
                    void *out, struct err *err) {
    if (!n) return 0;
    if (offset > bytes || n > bytes - offset)
        return err_set(err, ERR_TRUNCATED, "%.120s/%.60s has %llu bytes; %zu at %llu were asked for",
                       f->where, t->name, (unsigned long long)bytes, n, (unsigned long long)offset);
    return f->store ? read_blocks(f, t, bytes, offset, n, out, err) : read_file(f, t, offset, n, out, err);
}
