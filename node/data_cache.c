/* data_cache.c - blocks kept on the local disk; see data_cache.h.
 *
 * The file is a table of tags, eight bytes of a block's digest each, and then the blocks. A block may lie in
 * any of WAYS places that follow from its digest. Tags are mapped and written without a lock: a wrong one is
 * found out by the digest of what it leads to. */
#define _GNU_SOURCE /* posix_fallocate */
#include "node/data_cache.h"

#include "proto/proto.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define WAYS 4
#define PATH_BYTES 4096
#define DEFAULT_GB 16

struct data_cache {
    int fd;
    size_t block_bytes, slots, table_bytes;
    uint64_t *tag; /* [slots]; 0: nothing there */
};

static bool folder_of(char out[PATH_BYTES]) {
    const char *own = getenv("INTELLECT_CACHE"), *xdg = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    int n;
    if (own && *own)
        n = snprintf(out, PATH_BYTES, "%s", own);
    else if (xdg && *xdg == '/')
        n = snprintf(out, PATH_BYTES, "%s/intellect", xdg);
    else if (home && *home == '/')
        n = snprintf(out, PATH_BYTES, "%s/.cache/intellect", home);
    else
        return false;
    return n < PATH_BYTES - 64;
}

static bool make_folder(char *path) {
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        mkdir(path, 0700); /* what is wrong shows below */
        *slash = '/';
    }
    return !mkdir(path, 0700) || errno == EEXIST;
}

/* A cache of another size is of no use any more; whoever has it open goes on with it. */
static void remove_others(const char *folder, const char *name) {
    char path[PATH_BYTES + 300];
    DIR *dir = opendir(folder);
    if (!dir) return;
    for (struct dirent *e; (e = readdir(dir));) {
        if (strncmp(e->d_name, "blocks-", 7) != 0 || !strcmp(e->d_name, name)) continue;
        snprintf(path, sizeof path, "%s/%.255s", folder, e->d_name);
        unlink(path);
    }
    closedir(dir);
}

static size_t slots_wanted(size_t block_bytes) {
    const char *text = getenv("INTELLECT_CACHE_GB");
    double gb = text && *text ? strtod(text, NULL) : DEFAULT_GB;
    if (!(gb > 0)) return 0;
    if (gb > 1e6) gb = 1e6;
    return (size_t)(gb * 1e9 / (double)(block_bytes + sizeof(uint64_t))) / WAYS * WAYS;
}

struct data_cache *data_cache_open(size_t block_bytes) {
    char folder[PATH_BYTES], name[64], path[PATH_BYTES + 64];
    struct data_cache *c = calloc(1, sizeof *c);
    if (!c || !(c->slots = slots_wanted(block_bytes)) || !folder_of(folder) || !make_folder(folder)) {
        free(c);
        return NULL;
    }
    c->block_bytes = block_bytes;
    c->table_bytes = (c->slots * sizeof *c->tag + 4095) / 4096 * 4096;
    snprintf(name, sizeof name, "blocks-%zu-%zu", c->block_bytes, c->slots);
    snprintf(path, sizeof path, "%s/%s", folder, name);
    remove_others(folder, name);
    c->fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    /* The table's place is taken at once: a mapped page that a full disk has none for would be a signal. */
    if (c->fd >= 0 && !posix_fallocate(c->fd, 0, (off_t)c->table_bytes))
        c->tag = mmap(NULL, c->table_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, c->fd, 0);
    if (c->tag && c->tag != MAP_FAILED) return c;
    if (c->fd >= 0) close(c->fd);
    free(c);
    return NULL;
}

void data_cache_close(struct data_cache *c) {
    if (!c) return;
    munmap(c->tag, c->table_bytes);
    close(c->fd);
    free(c);
}

static uint64_t tag_of(const struct digest *d) {
    uint64_t tag;
    memcpy(&tag, d->b, sizeof tag);
    return tag ? tag : 1;
}

/* The first of a block's places; from other bytes than the tag. */
static size_t first_slot(const struct data_cache *c, const struct digest *d) {
    uint64_t x;
    memcpy(&x, d->b + 8, sizeof x);
    return (size_t)(x % (c->slots / WAYS)) * WAYS;
}

static off_t place_of(const struct data_cache *c, size_t slot) {
    return (off_t)(c->table_bytes + slot * c->block_bytes);
}

bool data_cache_get(const struct data_cache *c, const struct digest *d, void *out, size_t n) {
    size_t first = first_slot(c, d);
    for (size_t slot = first; slot < first + WAYS; slot++) {
        if (__atomic_load_n(&c->tag[slot], __ATOMIC_RELAXED) != tag_of(d)) continue;
        if (pread(c->fd, out, n, place_of(c, slot)) != (ssize_t)n) continue;
        struct digest found = digest_of(out, n);
        if (digest_equal(&found, d)) return true;
    }
    return false;
}

void data_cache_keep(struct data_cache *c, const struct digest *d, const void *bytes, size_t n) {
    size_t first = first_slot(c, d), slot = first;
    while (slot < first + WAYS && __atomic_load_n(&c->tag[slot], __ATOMIC_RELAXED)) slot++;
    if (slot == first + WAYS) slot = first + d->b[16] % WAYS; /* any of them */
    __atomic_store_n(&c->tag[slot], 0, __ATOMIC_RELAXED);
    if (pwrite(c->fd, bytes, n, place_of(c, slot)) == (ssize_t)n)
        __atomic_store_n(&c->tag[slot], tag_of(d), __ATOMIC_RELAXED);
}
