/* retention.c - which checkpoints there are in a store, which of them stay, and the removal of the rest.
 *
 * Every object that a manifest names lies in its checkpoint's own folder, and a folder is removed as a
 * whole or not at all: so nothing that a kept manifest names can go. */
#include "ckpt/internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PINS "pins/"

/* "step-<digits>/...": its index and the length of the folder's name; false for anything else. */
static bool parse_prefix(const char *name, size_t *length, uint64_t *index) {
    char *end, again[CKPT_PREFIX_BYTES_MAX + 1];
    if (strncmp(name, "step-", 5) != 0 || name[5] < '0' || name[5] > '9') return false;
    *index = strtoull(name + 5, &end, 10);
    *length = (size_t)(end - name);
    if (*length > CKPT_PREFIX_BYTES_MAX) return false;
    ckpt_prefix(*index, again);
    return strlen(again) == *length && !strncmp(again, name, *length);
}

/* The entry of an index, made where it is missing; newest first. `room` is for all that can come. */
static struct ckpt_entry *entry_of(struct ckpt_entry *e, uint32_t *count, uint64_t index) {
    uint32_t at = 0;
    while (at < *count && e[at].index > index) at++;
    if (at == *count || e[at].index != index) {
        memmove(&e[at + 1], &e[at], (*count - at) * sizeof *e);
        e[at] = (struct ckpt_entry){.index = index, .modified_s = INT64_MIN};
        ckpt_prefix(index, e[at].prefix);
        (*count)++;
    }
    return &e[at];
}

static void take_object(struct ckpt_entry *e, uint32_t *count, const struct ckpt_object *o) {
    uint64_t index;
    size_t length;
    if (!parse_prefix(o->name, &length, &index) || o->name[length] != '/') return;
    struct ckpt_entry *mine = entry_of(e, count, index);
    mine->bytes += o->bytes;
    if (o->modified_s > mine->modified_s) mine->modified_s = o->modified_s;
    if (!o->unfinished && !strcmp(o->name + length, "/manifest.json")) mine->complete = true;
}

static void take_pin(struct ckpt_entry *e, uint32_t count, const struct ckpt_object *o) {
    uint64_t index;
    size_t length;
    if (o->unfinished || !parse_prefix(o->name + strlen(PINS), &length, &index) ||
        o->name[strlen(PINS) + length]) return;
    for (uint32_t i = 0; i < count; i++)
        if (e[i].index == index) e[i].pinned = true;
}

/* *latest receives the folder that `latest` names, or "". */
static int read_latest(struct ckpt_store *s, struct latest *latest, struct err *err) {
    char version[CKPT_VERSION_BYTES_MAX + 1];
    struct err e = {0};
    *latest = (struct latest){0};
    if (!latest_read(s, latest, version, &e)) return 0;
    *latest = (struct latest){0};
    if (e.code == ERR_NOT_FOUND || e.code == ERR_CORRUPT) return 0;
    if (err) *err = e;
    return -1;
}

int ckpt_list(struct ckpt_store *store, struct ckpt_entry **out, uint32_t *count, struct err *err) {
    struct object_list l, pins = {0};
    struct latest latest;
    *count = 0;
    if (read_latest(store, &latest, err) || object_list(store, "step-", &l, err)) return -1;
    *out = calloc(l.count + 1, sizeof **out);
    int r = !*out ? err_set(err, ERR_MEMORY, "out of memory for %zu objects", l.count)
                  : object_list(store, PINS, &pins, err);
    for (size_t i = 0; !r && i < l.count; i++) take_object(*out, count, &l.object[i]);
    for (size_t i = 0; !r && i < pins.count; i++) take_pin(*out, *count, &pins.object[i]);
    for (uint32_t i = 0; !r && i < *count; i++) (*out)[i].latest = !strcmp((*out)[i].prefix, latest.prefix);
    object_list_release(&l);
    object_list_release(&pins);
    if (r) free(*out);
    return r;
}

static void pin_name(uint64_t index, char out[CKPT_NAME_BYTES_MAX + 1]) {
    char prefix[CKPT_PREFIX_BYTES_MAX + 1];
    ckpt_prefix(index, prefix);
    snprintf(out, CKPT_NAME_BYTES_MAX + 1, PINS "%s", prefix);
}

int ckpt_pin(struct ckpt_store *store, uint64_t index, bool pinned, struct err *err) {
    char pin[CKPT_NAME_BYTES_MAX + 1], manifest[CKPT_NAME_BYTES_MAX + 1], prefix[CKPT_PREFIX_BYTES_MAX + 1];
    struct ckpt_object o;
    struct err e = {0};
    pin_name(index, pin);
    if (!pinned) return store->ops->remove(store, pin, err);
    ckpt_prefix(index, prefix);
    object_name(prefix, "manifest.json", manifest);
    if (store->ops->put(store, pin, "", 0, CKPT_ABSENT, &e) && e.code != ERR_STALE) {
        if (err) *err = e;
        return -1;
    }
    /* Looked at after the pin is there: a prune that began before it may have taken the folder. */
    if (!store->ops->stat(store, manifest, &o, err)) return 0;
    store->ops->remove(store, pin, NULL);
    return -1;
}

void ckpt_retain(const struct ckpt_retention *how, int64_t now_s, struct ckpt_entry *e, uint32_t count) {
    uint32_t complete = 0;
    uint64_t bucket = UINT64_MAX;
    for (uint32_t i = 0; i < count; i++) { /* newest first */
        e[i].kept = !e[i].complete ? e[i].latest || e[i].modified_s > now_s - how->stale_s
                                   : !how->last || complete++ < how->last || e[i].latest || e[i].pinned;
    }
    for (uint32_t i = count; how->every && i-- > 0;) { /* oldest first */
        if (!e[i].complete || e[i].index / how->every == bucket) continue;
        bucket = e[i].index / how->every;
        e[i].kept = true;
    }
}

/* A pin may have come since the list was made, and `latest` may have been put by hand. */
static int still_unwanted(struct ckpt_store *s, const struct ckpt_entry *e, bool *unwanted, struct err *err) {
    char pin[CKPT_NAME_BYTES_MAX + 1];
    struct ckpt_object o;
    struct latest latest;
    struct err not_there = {0};
    pin_name(e->index, pin);
    if (read_latest(s, &latest, err)) return -1;
    bool pinned = !s->ops->stat(s, pin, &o, &not_there);
    if (!pinned && not_there.code != ERR_NOT_FOUND) {
        if (err) *err = not_there;
        return -1;
    }
    *unwanted = !pinned && strcmp(latest.prefix, e->prefix) != 0;
    return 0;
}

int ckpt_prune(struct ckpt_store *store, const struct ckpt_retention *how,
               void (*removed)(void *arg, const struct ckpt_entry *e), void *arg, struct err *err) {
    struct ckpt_entry *e;
    uint32_t count;
    if (ckpt_list(store, &e, &count, err)) return -1;
    ckpt_retain(how, time(NULL), e, count);
    int r = 0;
    for (uint32_t i = count; !r && i-- > 0;) { /* the oldest first */
        bool unwanted = false;
        if (e[i].kept) continue;
        r = still_unwanted(store, &e[i], &unwanted, err);
        if (r || !unwanted) continue;
        r = object_remove_all(store, e[i].prefix, err);
        if (!r && removed) removed(arg, &e[i]);
    }
    free(e);
    return r;
}
