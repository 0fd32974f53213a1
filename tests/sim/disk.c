/* disk.c - struct disk in memory. A mapped file keeps two images: what the process sees and what
 * would survive a power cut; flush copies from one to the other. The owner can be made to die at
 * any operation: that operation and all later ones of the step fail and change nothing. */
#include "tests/sim/sim.h"

#include <stdlib.h>
#include <string.h>

#define GRANULE 64

static int dies_now(struct sim_disk *d, const char *what, const char *name, struct err *err) {
    if (!d->dead && d->dies_after && --d->dies_after == 0) {
        d->dead = true;
        sim_trace(d->world, "member slot %u dies at disk %s %s", d->owner, what, name);
    }
    return d->dead ? err_set(err, ERR_IO, "simulated death at %s %s", what, name) : 0;
}

static struct sim_file *find(struct sim_disk *d, const char *name) {
    for (uint32_t i = 0; i < d->count; i++)
        if (!strcmp(d->files[i].name, name)) return &d->files[i];
    return NULL;
}

const struct sim_file *sim_disk_find(const struct sim_disk *d, const char *name) {
    for (uint32_t i = 0; i < d->count; i++)
        if (!strcmp(d->files[i].name, name)) return &d->files[i];
    return NULL;
}

static struct sim_file *add(struct sim_disk *d, const char *name) {
    if (d->count == SIM_DISK_FILES_MAX)
        sim_violation(d->world, "slot %u keeps %u files on its disk: they are never removed",
                      d->owner, d->count);
    struct sim_file *f = &d->files[d->count++];
    memset(f, 0, sizeof *f);
    snprintf(f->name, sizeof f->name, "%s", name);
    return f;
}

static void *disk_map(void *arg, const char *name, size_t bytes, bool *created, struct err *err) {
    struct sim_disk *d = arg;
    if (dies_now(d, "map", name, err)) return NULL;
    struct sim_file *f = find(d, name);
    *created = !f;
    if (!f) {
        f = add(d, name);
        f->mapped = true;
        f->bytes = bytes;
        f->memory = calloc(1, bytes ? bytes : 1);
        f->durable = calloc(1, bytes ? bytes : 1);
    }
    if (f->bytes != bytes)
        sim_violation(d->world, "map of %s with %zu bytes, it has %zu", name, bytes, f->bytes);
    return f->memory;
}

static int disk_flush(void *arg, const char *name, size_t offset, size_t bytes, struct err *err) {
    struct sim_disk *d = arg;
    if (dies_now(d, "flush", name, err)) return -1;
    struct sim_file *f = find(d, name);
    if (!f || offset + bytes > f->bytes)
        sim_violation(d->world, "flush of %s outside the file", name);
    memcpy(f->durable + offset, f->memory + offset, bytes);
    return 0;
}

static int disk_put(void *arg, const char *name, const void *bytes, size_t length,
                    struct err *err) {
    struct sim_disk *d = arg;
    if (dies_now(d, "put", name, err)) return -1;
    struct sim_file *f = find(d, name);
    if (!f) f = add(d, name);
    free(f->memory);
    f->memory = malloc(length ? length : 1);
    memcpy(f->memory, bytes, length);
    f->bytes = length;
    return 0;
}

static int disk_get(void *arg, const char *name, uint8_t **out, size_t *length, struct err *err) {
    struct sim_disk *d = arg;
    if (dies_now(d, "get", name, err)) return -1;
    struct sim_file *f = find(d, name);
    if (!f) return err_set(err, ERR_NOT_FOUND, "%s: not there", name);
    *out = malloc(f->bytes ? f->bytes : 1);
    memcpy(*out, f->memory, f->bytes);
    *length = f->bytes;
    return 0;
}

static void drop(struct sim_disk *d, struct sim_file *f) {
    free(f->memory);
    free(f->durable);
    *f = d->files[--d->count];
}

static void disk_remove(void *arg, const char *name) {
    struct sim_disk *d = arg;
    struct err err;
    if (dies_now(d, "remove", name, &err)) return;
    struct sim_file *f = find(d, name);
    if (f) drop(d, f);
}

struct disk sim_disk_ops(struct sim_disk *d) {
    return (struct disk){.arg = d,
                         .map = disk_map,
                         .flush = disk_flush,
                         .put = disk_put,
                         .get = disk_get,
                         .remove = disk_remove};
}

void sim_disk_lose_power(struct sim_disk *d) {
    for (uint32_t i = 0; i < d->count; i++) {
        struct sim_file *f = &d->files[i];
        if (!f->mapped) continue;
        for (size_t at = 0; at < f->bytes; at += GRANULE) {
            size_t n = f->bytes - at < GRANULE ? f->bytes - at : GRANULE;
            if (!memcmp(f->memory + at, f->durable + at, n)) continue;
            /* The kernel may or may not have written it back before the power went. */
            if (sim_chance(d->world, 500)) memcpy(f->memory + at, f->durable + at, n);
            else memcpy(f->durable + at, f->memory + at, n);
        }
    }
}

static uint8_t *copy_of(const uint8_t *bytes, size_t length) {
    uint8_t *copy = malloc(length ? length : 1);
    memcpy(copy, bytes, length);
    return copy;
}

void sim_disk_copy(struct sim_disk *to, const struct sim_disk *from, bool durable) {
    sim_disk_release(to);
    for (uint32_t i = 0; i < from->count; i++) {
        const struct sim_file *f = &from->files[i];
        const uint8_t *bytes = f->mapped && durable ? f->durable : f->memory;
        to->files[i] = *f;
        to->files[i].memory = copy_of(bytes, f->bytes);
        if (f->mapped) to->files[i].durable = copy_of(bytes, f->bytes);
    }
    to->count = from->count;
}

void sim_disk_forget(struct sim_disk *d, const char *prefix) {
    for (uint32_t i = d->count; i--;)
        if (!strncmp(d->files[i].name, prefix, strlen(prefix))) drop(d, &d->files[i]);
}

void sim_disk_release(struct sim_disk *d) {
    for (uint32_t i = 0; i < d->count; i++) {
        free(d->files[i].memory);
        free(d->files[i].durable);
    }
    d->count = 0;
}
