/* disk.c - mapped arrays and atomically replaced records in a folder; see disk.h. */
#include "node/disk.h"

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define NAME_BYTES_MAX 64
#define TEMPORARY ".new-" /* a name that no caller can use */
#define RECORD_BYTES_MAX ((size_t)1 << 32)

struct mapping {
    char name[NAME_BYTES_MAX + 1]; /* "" = free */
    void *memory;
    size_t bytes;
};

struct folder {
    int fd;
    char path[1024]; /* for messages */
    struct mapping map[DISK_MAPS_MAX];
};

static void check_name(const char *name) {
    size_t n = strlen(name);
    assert(n > 0 && n <= NAME_BYTES_MAX && name[0] != '.' && !strchr(name, '/'));
}

static struct mapping *find(struct folder *f, const char *name) {
    for (int i = 0; i < DISK_MAPS_MAX; i++)
        if (!strcmp(f->map[i].name, name)) return &f->map[i];
    return NULL;
}

/* ---- atomically: write under another name, sync, rename, sync the folder --------------------- */

static int write_all(int fd, const uint8_t *bytes, size_t length) {
    while (length > 0) {
        ssize_t n = write(fd, bytes, length);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return -1;
        bytes += n;
        length -= (size_t)n;
    }
    return 0;
}

/* Fill the new file: with the bytes, or with zeroes whose blocks are reserved. */
static int fill(int fd, const void *bytes, size_t length) {
    if (bytes) return write_all(fd, bytes, length);
    errno = posix_fallocate(fd, 0, (off_t)length);
    return errno ? -1 : 0;
}

static int put_file(struct folder *f, const char *name, const void *bytes, size_t length,
                    struct err *err) {
    char temporary[sizeof TEMPORARY + NAME_BYTES_MAX];
    snprintf(temporary, sizeof temporary, "%s%s", TEMPORARY, name);
    int fd = openat(f->fd, temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0) return err_set_errno(err, "%s/%s", f->path, temporary);
    int rc = fill(fd, bytes, length) || fsync(fd) ? -1 : 0;
    if (rc) err_set_errno(err, "%s/%s, %zu bytes", f->path, name, length);
    close(fd);
    if (!rc && (renameat(f->fd, temporary, f->fd, name) || fsync(f->fd)))
        rc = err_set_errno(err, "%s/%s", f->path, name);
    if (rc) unlinkat(f->fd, temporary, 0);
    return rc;
}

static int disk_put(void *arg, const char *name, const void *bytes, size_t length,
                    struct err *err) {
    check_name(name);
    return put_file(arg, name, bytes ? bytes : "", length, err);
}

static int read_all(int fd, uint8_t *out, size_t length) {
    for (size_t at = 0; at < length;) {
        ssize_t n = read(fd, out + at, length - at);
        if (n < 0 && errno == EINTR) continue;
        if (n == 0) errno = EIO; /* it became shorter while we read it */
        if (n <= 0) return -1;
        at += (size_t)n;
    }
    return 0;
}

static int disk_get(void *arg, const char *name, uint8_t **out, size_t *length, struct err *err) {
    struct folder *f = arg;
    check_name(name);
    int fd = openat(f->fd, name, O_RDONLY | O_CLOEXEC);
    struct stat st;
    if (fd < 0) return err_set_errno(err, "%s/%s", f->path, name);
    int rc = -1;
    if (fstat(fd, &st)) {
        err_set_errno(err, "%s/%s", f->path, name);
    } else if ((uint64_t)st.st_size > RECORD_BYTES_MAX) {
        err_set(err, ERR_CORRUPT, "%s/%s is too large (%lld bytes)", f->path, name,
                (long long)st.st_size);
    } else if (!(*out = malloc((size_t)st.st_size + 1))) {
        err_set(err, ERR_MEMORY, "%s/%s: no memory", f->path, name);
    } else if (read_all(fd, *out, (size_t)st.st_size)) {
        err_set_errno(err, "%s/%s", f->path, name);
        free(*out);
        *out = NULL;
    } else {
        *length = (size_t)st.st_size;
        rc = 0;
    }
    close(fd);
    return rc;
}

/* ---- mapped arrays --------------------------------------------------------------------------- */

/* Open the file of a mapping; *created where there was none. Returns the descriptor or -1. */
static int open_array(struct folder *f, const char *name, size_t bytes, bool *created,
                      struct err *err) {
    struct stat st;
    *created = fstatat(f->fd, name, &st, 0) != 0;
    if (*created && put_file(f, name, NULL, bytes, err)) return -1;
    int fd = openat(f->fd, name, O_RDWR | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st)) {
        err_set_errno(err, "%s/%s", f->path, name);
    } else if ((uint64_t)st.st_size != bytes) {
        err_set(err, ERR_CORRUPT, "%s/%s has %lld bytes, this run needs %zu", f->path, name,
                (long long)st.st_size, bytes);
    } else {
        return fd;
    }
    if (fd >= 0) close(fd);
    return -1;
}

static void *disk_map(void *arg, const char *name, size_t bytes, bool *created, struct err *err) {
    struct folder *f = arg;
    check_name(name);
    assert(bytes > 0);
    bool fresh = false;
    struct mapping *m = find(f, name);
    if (m) {
        assert(m->bytes == bytes);
    } else {
        m = find(f, "");
        assert(m); /* DISK_MAPS_MAX */
        int fd = open_array(f, name, bytes, &fresh, err);
        if (fd < 0) return NULL;
        void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
        if (memory == MAP_FAILED) {
            err_set_errno(err, "%s/%s", f->path, name);
            return NULL;
        }
        snprintf(m->name, sizeof m->name, "%s", name);
        m->memory = memory;
        m->bytes = bytes;
    }
    if (created) *created = fresh;
    return m->memory;
}

static int disk_flush(void *arg, const char *name, size_t offset, size_t bytes, struct err *err) {
    struct folder *f = arg;
    struct mapping *m = find(f, name);
    assert(m && offset <= m->bytes && bytes <= m->bytes - offset);
    size_t page = (size_t)sysconf(_SC_PAGESIZE), begin = offset / page * page;
    if (bytes == 0) return 0;
    if (msync((char *)m->memory + begin, offset - begin + bytes, MS_SYNC))
        return err_set_errno(err, "%s/%s", f->path, name);
    return 0;
}

static void unmap(struct mapping *m) {
    munmap(m->memory, m->bytes);
    memset(m, 0, sizeof *m);
}

static void disk_remove(void *arg, const char *name) {
    struct folder *f = arg;
    check_name(name);
    struct mapping *m = find(f, name);
    if (m) unmap(m);
    unlinkat(f->fd, name, 0);
}

/* ---- life ------------------------------------------------------------------------------------ */

static void remove_leftovers(struct folder *f) {
    int fd = dup(f->fd);
    DIR *d = fd < 0 ? NULL : fdopendir(fd);
    if (!d) {
        if (fd >= 0) close(fd);
        return;
    }
    for (struct dirent *e; (e = readdir(d));)
        if (!strncmp(e->d_name, TEMPORARY, strlen(TEMPORARY))) unlinkat(f->fd, e->d_name, 0);
    closedir(d);
}

int disk_open(const char *path, struct disk *out, struct err *err) {
    memset(out, 0, sizeof *out);
    if (mkdir(path, 0700) && errno != EEXIST) return err_set_errno(err, "%s", path);
    struct folder *f = calloc(1, sizeof *f);
    if (!f) return err_set(err, ERR_MEMORY, "%s: no memory", path);
    snprintf(f->path, sizeof f->path, "%s", path);
    f->fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (f->fd < 0) {
        free(f);
        return err_set_errno(err, "%s", path);
    }
    remove_leftovers(f);
    *out = (struct disk){ .arg = f, .map = disk_map, .flush = disk_flush, .put = disk_put,
                          .get = disk_get, .remove = disk_remove };
    return 0;
}

void disk_close(struct disk *d) {
    struct folder *f = d->arg;
    if (!f) return;
    for (int i = 0; i < DISK_MAPS_MAX; i++)
        if (f->map[i].name[0]) unmap(&f->map[i]);
    close(f->fd);
    free(f);
    memset(d, 0, sizeof *d);
}
