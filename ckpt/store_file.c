/* store_file.c - a store that is a folder. An object under way is a hidden file beside its final
 * name; it becomes the object by a rename after fsync, and the folder is synced after that. */
#define _GNU_SOURCE /* renameat2, fallocate */
#include "ckpt/internal.h"

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#define DEPTH_MAX 4            /* of folders in a listing */
#define LOCK_TRIES_MAX 100     /* times 50 ms: nobody holds the lock for longer than an fsync */
#define HIDDEN_SUFFIX_BYTES 18 /* a dot in front; a dot and 16 random digits at the end */

struct file_store {
    struct ckpt_store base;
    int dir; /* the store's folder */
};

struct file_upload {
    struct file_store *store;
    int fd;
    bool done;
    uint64_t bytes;
    char name[CKPT_NAME_BYTES_MAX + 1];
    char hidden[CKPT_NAME_BYTES_MAX + HIDDEN_SUFFIX_BYTES + 1];
};

static int check_name(const struct file_store *s, const char *name, struct err *err) {
    if (ckpt_name_valid(name)) return 0;
    return err_set(err, ERR_REFUSED, "%s: \"%.64s\" cannot be the name of an object", s->base.url, name);
}

/* ---- reading ----------------------------------------------------------------------------------- */

static void describe(const struct stat *st, struct ckpt_object *out) {
    out->bytes = (uint64_t)st->st_size;
    out->modified_s = st->st_mtim.tv_sec;
    snprintf(out->version, sizeof out->version, "%" PRIx64 "-%" PRIx64 "-%lld.%09ld",
             (uint64_t)st->st_ino, (uint64_t)st->st_size, (long long)st->st_mtim.tv_sec,
             st->st_mtim.tv_nsec);
}

static int file_stat(struct ckpt_store *base, const char *name, struct ckpt_object *out,
                     struct err *err) {
    struct file_store *s = (struct file_store *)base;
    struct stat st;
    if (check_name(s, name, err)) return -1;
    if (fstatat(s->dir, name, &st, 0)) return err_set_errno(err, "%s/%s", base->url, name);
    if (!S_ISREG(st.st_mode)) return err_set(err, ERR_IO, "%s/%s: not a file", base->url, name);
    *out = (struct ckpt_object){0};
    snprintf(out->name, sizeof out->name, "%s", name);
    describe(&st, out);
    return 0;
}

static int read_all(int fd, uint64_t offset, uint8_t *out, size_t n, const char *url,
                    const char *name, struct err *err) {
    size_t done = 0;
    while (done < n) {
        ssize_t got = pread(fd, out + done, n - done, (off_t)(offset + done));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return err_set_errno(err, "%s/%s: read", url, name);
        if (got == 0)
            return err_set(err, ERR_TRUNCATED, "%s/%s: ends at byte %" PRIu64 ", wanted %" PRIu64,
                           url, name, offset + done, offset + n);
        done += (size_t)got;
    }
    return 0;
}

static int file_get(struct ckpt_store *base, const char *name, uint64_t offset, void *out, size_t n,
                    struct err *err) {
    struct file_store *s = (struct file_store *)base;
    struct stat st;
    int r = -1;
    if (check_name(s, name, err)) return -1;
    if (offset > INT64_MAX - n) return err_set(err, ERR_TRUNCATED, "%s/%s: no such offset", base->url, name);
    int fd = openat(s->dir, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a fifo would hang */
    if (fd < 0) return err_set_errno(err, "%s/%s", base->url, name);
    if (fstat(fd, &st)) err_set_errno(err, "%s/%s", base->url, name);
    else if (!S_ISREG(st.st_mode)) err_set(err, ERR_IO, "%s/%s: not a file", base->url, name);
    else r = read_all(fd, offset, out, n, base->url, name, err);
    close(fd);
    return r;
}

/* ---- folders and hidden names ------------------------------------------------------------------ */

/* Sync the folder that `name` lies in (the store's own for "" or a plain name). */
static int sync_parent(struct file_store *s, const char *name, struct err *err) {
    char parent[CKPT_NAME_BYTES_MAX + HIDDEN_SUFFIX_BYTES + 1];
    const char *slash = strrchr(name, '/');
    snprintf(parent, sizeof parent, "%.*s", slash ? (int)(slash - name) : 1, slash ? name : ".");
    int fd = openat(s->dir, parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return err_set_errno(err, "%s/%s", s->base.url, parent);
    int r = fsync(fd) ? err_set_errno(err, "%s/%s: sync", s->base.url, parent) : 0;
    close(fd);
    return r;
}

/* Make the folders on the way to `name`, each durable in its parent. */
static int make_parents(struct file_store *s, const char *name, struct err *err) {
    char path[CKPT_NAME_BYTES_MAX + 1];
    for (const char *slash = strchr(name, '/'); slash; slash = strchr(slash + 1, '/')) {
        snprintf(path, sizeof path, "%.*s", (int)(slash - name), name);
        if (mkdirat(s->dir, path, 0777)) {
            if (errno == EEXIST) continue;
            return err_set_errno(err, "%s/%s: make folder", s->base.url, path);
        }
        if (sync_parent(s, path, err)) return -1;
    }
    return 0;
}

/* "a/b" becomes "a/.b.0123456789abcdef": never a valid object name, and never the same twice. */
static void hide(const char *name, char out[CKPT_NAME_BYTES_MAX + HIDDEN_SUFFIX_BYTES + 1]) {
    const char *slash = strrchr(name, '/');
    int folder = slash ? (int)(slash - name) + 1 : 0;
    uint64_t random = 0;
    if (getrandom(&random, sizeof random, 0) != (ssize_t)sizeof random)
        random = (uint64_t)getpid() << 32 ^ (uint64_t)clock();
    snprintf(out, CKPT_NAME_BYTES_MAX + HIDDEN_SUFFIX_BYTES + 1, "%.*s.%s.%016" PRIx64, folder, name,
             name + folder, random);
}

/* A prune may remove an empty folder between its making and the first file in it: try again. */
static int create_hidden(struct file_store *s, const char *name, char *hidden, struct err *err) {
    for (int i = 0; i < 4; i++) {
        if (make_parents(s, name, err)) return -1;
        hide(name, hidden);
        int fd = openat(s->dir, hidden, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (fd >= 0) return fd;
        if (errno != ENOENT && errno != EEXIST) break;
    }
    return err_set_errno(err, "%s/%s: create", s->base.url, hidden);
}

static int write_all(int fd, uint64_t offset, const uint8_t *bytes, size_t n, const char *url,
                     const char *name, struct err *err) {
    size_t done = 0;
    while (done < n) {
        ssize_t put = pwrite(fd, bytes + done, n - done, (off_t)(offset + done));
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) return err_set_errno(err, "%s/%s: write", url, name);
        done += (size_t)put;
    }
    return 0;
}

/* Rename hidden to name; with exclusive, only where nothing of that name is. */
static int reveal(struct file_store *s, const char *hidden, const char *name, bool exclusive,
                  struct err *err) {
    int r = renameat2(s->dir, hidden, s->dir, name, exclusive ? RENAME_NOREPLACE : 0);
    if (r && exclusive && (errno == EINVAL || errno == ENOSYS)) { /* NFS and a few others */
        r = linkat(s->dir, hidden, s->dir, name, 0);
        if (!r) unlinkat(s->dir, hidden, 0);
    }
    if (!r) return sync_parent(s, name, err);
    if (exclusive && errno == EEXIST)
        return err_set(err, ERR_STALE, "%s/%s: somebody else put it first", s->base.url, name);
    if (errno == ENOENT)
        return err_set(err, ERR_STALE, "%s/%s: swept away while it was written", s->base.url, name);
    return err_set_errno(err, "%s/%s: rename", s->base.url, name);
}

/* ---- put --------------------------------------------------------------------------------------- */

/* One writer at a time may compare and replace. Not waited for endlessly: its holder may be a
 * stopped process. */
static int lock_store(struct file_store *s, struct err *err) {
    int fd = openat(s->dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return err_set_errno(err, "%s", s->base.url);
    for (int i = 0; i < LOCK_TRIES_MAX; i++) {
        if (!flock(fd, LOCK_EX | LOCK_NB)) return fd;
        if (errno != EWOULDBLOCK && errno != EINTR) break;
        nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
    }
    if (errno == EWOULDBLOCK) err_set(err, ERR_TIMEOUT, "%s: locked by another process", s->base.url);
    else err_set_errno(err, "%s: lock", s->base.url);
    close(fd);
    return -1;
}

static int replace_version(struct file_store *s, const char *hidden, const char *name,
                           const char *version, struct err *err) {
    struct ckpt_object now;
    int r = -1, lock = lock_store(s, err);
    if (lock < 0) return -1;
    if (file_stat(&s->base, name, &now, NULL) || strcmp(now.version, version) != 0)
        err_set(err, ERR_STALE, "%s/%s: changed by somebody else", s->base.url, name);
    else
        r = reveal(s, hidden, name, false, err);
    close(lock);
    return r;
}

static int file_put(struct ckpt_store *base, const char *name, const void *bytes, size_t n,
                    const char *version, struct err *err) {
    struct file_store *s = (struct file_store *)base;
    char hidden[CKPT_NAME_BYTES_MAX + HIDDEN_SUFFIX_BYTES + 1];
    if (check_name(s, name, err)) return -1;
    int fd = create_hidden(s, name, hidden, err);
    if (fd < 0) return -1;
    int r = write_all(fd, 0, bytes, n, base->url, name, err);
    if (!r && fsync(fd)) r = err_set_errno(err, "%s/%s: sync", base->url, name);
    close(fd);
    if (!r)
        r = version && *version ? replace_version(s, hidden, name, version, err)
                                : reveal(s, hidden, name, version != NULL, err);
    if (r) unlinkat(s->dir, hidden, 0);
    return r;
}

/* ---- uploads ----------------------------------------------------------------------------------- */

/* Where the file system cannot reserve, the file only gets its length. */
static int reserve(struct file_upload *u, struct err *err) {
    struct statvfs fs = {0};
    if (u->bytes == 0 || !fallocate(u->fd, 0, 0, (off_t)u->bytes)) return 0;
    if (errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL) {
        if (!ftruncate(u->fd, (off_t)u->bytes)) return 0;
    }
    int why = errno;
    fstatvfs(u->fd, &fs);
    errno = why;
    return err_set_errno(err, "%s/%s: cannot reserve %" PRIu64 " bytes (%" PRIu64 " are free)",
                         u->store->base.url, u->name, u->bytes,
                         (uint64_t)fs.f_bavail * (uint64_t)fs.f_frsize);
}

/* The folder of an object that is gone, if nothing else is in it. */
static bool remove_parent(struct file_store *s, const char *name) {
    char parent[CKPT_NAME_BYTES_MAX + 1];
    const char *slash = strrchr(name, '/');
    if (!slash) return false;
    snprintf(parent, sizeof parent, "%.*s", (int)(slash - name), name);
    return !unlinkat(s->dir, parent, AT_REMOVEDIR);
}

static void file_upload_destroy(struct ckpt_upload *upload) {
    struct file_upload *u = (struct file_upload *)upload;
    if (!u) return;
    if (u->fd >= 0) close(u->fd);
    if (!u->done && !unlinkat(u->store->dir, u->hidden, 0)) remove_parent(u->store, u->name);
    free(u);
}

static struct ckpt_upload *file_upload_begin(struct ckpt_store *base, const char *name,
                                             uint64_t bytes, struct err *err) {
    struct file_store *s = (struct file_store *)base;
    if (check_name(s, name, err)) return NULL;
    struct file_upload *u = calloc(1, sizeof *u);
    if (!u) {
        err_set(err, ERR_MEMORY, "%s/%s: out of memory", base->url, name);
        return NULL;
    }
    u->store = s;
    u->bytes = bytes;
    snprintf(u->name, sizeof u->name, "%s", name);
    u->fd = create_hidden(s, name, u->hidden, err);
    if (u->fd < 0) {
        free(u);
        return NULL;
    }
    if (!reserve(u, err)) return (struct ckpt_upload *)u;
    file_upload_destroy((struct ckpt_upload *)u);
    return NULL;
}

static int file_upload_put(struct ckpt_upload *upload, uint64_t offset, const void *bytes, size_t n,
                           struct err *err) {
    struct file_upload *u = (struct file_upload *)upload;
    assert(offset <= u->bytes && n <= u->bytes - offset);
    return write_all(u->fd, offset, bytes, n, u->store->base.url, u->name, err);
}

static int file_upload_sync(struct ckpt_upload *upload, struct err *err) {
    struct file_upload *u = (struct file_upload *)upload;
    if (!fdatasync(u->fd)) return 0;
    return err_set_errno(err, "%s/%s: sync", u->store->base.url, u->name);
}

static int file_upload_complete(struct ckpt_upload *upload, struct err *err) {
    struct file_upload *u = (struct file_upload *)upload;
    if (fsync(u->fd)) return err_set_errno(err, "%s/%s: sync", u->store->base.url, u->name);
    if (reveal(u->store, u->hidden, u->name, true, err)) return -1;
    u->done = true;
    return 0;
}

/* ---- list, remove ------------------------------------------------------------------------------ */

struct listing {
    struct file_store *store;
    const char *prefix;
    int (*visit)(void *arg, const struct ckpt_object *o, struct err *err);
    void *arg;
};

static int list_folder(const struct listing *l, const char *folder, int depth, struct err *err);

/* What is no object (foreign names, links, devices) is passed over. */
static int list_one(const struct listing *l, const char *name, int depth, struct err *err) {
    struct stat st;
    struct ckpt_object o = {0};
    if (fstatat(l->store->dir, name, &st, AT_SYMLINK_NOFOLLOW)) return 0; /* removed meanwhile */
    if (S_ISDIR(st.st_mode)) return depth < DEPTH_MAX ? list_folder(l, name, depth + 1, err) : 0;
    if (!S_ISREG(st.st_mode) || strncmp(name, l->prefix, strlen(l->prefix)) != 0) return 0;
    const char *slash = strrchr(name, '/');
    o.unfinished = (slash ? slash[1] : name[0]) == '.';
    if (!o.unfinished && !ckpt_name_valid(name)) return 0;
    snprintf(o.name, sizeof o.name, "%s", name);
    describe(&st, &o);
    return l->visit(l->arg, &o, err);
}

static int list_folder(const struct listing *l, const char *folder, int depth, struct err *err) {
    int fd = openat(l->store->dir, *folder ? folder : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT) return 0;
    if (fd < 0) return err_set_errno(err, "%s/%s", l->store->base.url, folder);
    DIR *dir = fdopendir(fd);
    if (!dir) {
        close(fd);
        return err_set_errno(err, "%s/%s", l->store->base.url, folder);
    }
    int r = 0;
    for (struct dirent *e; !r && (e = readdir(dir));) {
        char name[CKPT_NAME_BYTES_MAX + 1];
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        int n = snprintf(name, sizeof name, "%s%s%s", folder, *folder ? "/" : "", e->d_name);
        if (n < (int)sizeof name) r = list_one(l, name, depth, err);
    }
    closedir(dir);
    return r;
}

static int file_list(struct ckpt_store *base, const char *prefix,
                     int (*visit)(void *arg, const struct ckpt_object *o, struct err *err),
                     void *arg, struct err *err) {
    struct listing l = {(struct file_store *)base, prefix, visit, arg};
    char folder[CKPT_NAME_BYTES_MAX + 1] = ""; /* start as deep as the prefix allows */
    const char *slash = strrchr(prefix, '/');
    if (slash && (size_t)(slash - prefix) < sizeof folder)
        snprintf(folder, sizeof folder, "%.*s", (int)(slash - prefix), prefix);
    return list_folder(&l, folder, 0, err);
}

static int file_remove(struct ckpt_store *base, const char *name, struct err *err) {
    struct file_store *s = (struct file_store *)base;
    if (*name == '/' || !strncmp(name, "..", 2) || strstr(name, "/.."))
        return err_set(err, ERR_REFUSED, "%s: \"%.64s\" is no object's name", base->url, name);
    if (unlinkat(s->dir, name, 0) && errno != ENOENT)
        return err_set_errno(err, "%s/%s: remove", base->url, name);
    struct err e = {0};
    if (!sync_parent(s, remove_parent(s, name) ? "" : name, &e) || e.code == ERR_NOT_FOUND) return 0;
    if (err) *err = e;
    return -1;
}

static void file_close(struct ckpt_store *base) {
    struct file_store *s = (struct file_store *)base;
    close(s->dir);
    free(s);
}

static const struct ckpt_store_ops file_ops = {
    .get = file_get,
    .stat = file_stat,
    .put = file_put,
    .upload_begin = file_upload_begin,
    .upload_put = file_upload_put,
    .upload_sync = file_upload_sync,
    .upload_complete = file_upload_complete,
    .upload_destroy = file_upload_destroy,
    .list = file_list,
    .remove = file_remove,
    .close = file_close,
};

/* ---- open -------------------------------------------------------------------------------------- */

static int make_folder(const char *path, struct err *err) {
    char part[1025];
    if (snprintf(part, sizeof part, "%s", path) >= (int)sizeof part)
        return err_set(err, ERR_CONFIG, "%.64s...: path of more than %zu bytes", path, sizeof part - 1);
    for (char *p = part + 1;; p++) {
        if (*p != '/' && *p) continue;
        char end = *p;
        *p = 0;
        if (mkdir(part, 0777) && errno != EEXIST) return err_set_errno(err, "%s: make folder", part);
        *p = end;
        if (!end) return 0;
    }
}

struct ckpt_store *store_file_open(const char *path, bool create, struct err *err) {
    char real[4096];
    struct file_store *s = NULL;
    if (create && make_folder(path, err)) return NULL;
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || !realpath(path, real)) {
        err_set_errno(err, "%s", path);
    } else if (strlen(real) + sizeof "file://" > sizeof s->base.url) {
        err_set(err, ERR_CONFIG, "%.64s...: path too long", real);
    } else if (!(s = calloc(1, sizeof *s))) {
        err_set(err, ERR_MEMORY, "%s: out of memory", path);
    } else {
        s->base.ops = &file_ops;
        s->dir = fd;
        snprintf(s->base.url, sizeof s->base.url, "file://%.1000s", strcmp(real, "/") ? real : "");
        return &s->base;
    }
    if (fd >= 0) close(fd);
    return NULL;
}
