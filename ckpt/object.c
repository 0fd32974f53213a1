/* object.c - what writer, reader and sweep do with the objects of a store: whole small ones,
 * streams of large ones, folders. */
#include "ckpt/internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

void ckpt_prefix(uint64_t index, char out[CKPT_PREFIX_BYTES_MAX + 1]) {
    snprintf(out, CKPT_PREFIX_BYTES_MAX + 1, "step-%012" PRIu64, index);
}

/* Where the settings of a URL begin. A folder's path may have a '?' in it. */
static size_t path_end(const char *url) {
    bool folder = !strstr(url, "://") || !strncmp(url, "file://", 7);
    return folder ? strlen(url) : strcspn(url, "?");
}

int ckpt_url(const char *store_url, uint64_t index, char out[PROTO_URL_BYTES_MAX + 1],
             struct err *err) {
    char prefix[CKPT_PREFIX_BYTES_MAX + 1];
    size_t end = path_end(store_url), n = end;
    while (n > 0 && store_url[n - 1] == '/') n--;
    ckpt_prefix(index, prefix);
    if (strlen(store_url) + 1 + strlen(prefix) > PROTO_URL_BYTES_MAX)
        return err_set(err, ERR_CONFIG, "store %.64s...: URL of more than %d bytes", store_url,
                       PROTO_URL_BYTES_MAX - CKPT_PREFIX_BYTES_MAX - 1);
    snprintf(out, PROTO_URL_BYTES_MAX + 1, "%.*s/%s%s", (int)n, store_url, prefix, store_url + end);
    return 0;
}

void ckpt_store_url(const char *url, uint64_t index, char out[PROTO_URL_BYTES_MAX + 1]) {
    char prefix[CKPT_PREFIX_BYTES_MAX + 1];
    size_t end = path_end(url), n = end;
    ckpt_prefix(index, prefix);
    size_t p = strlen(prefix);
    if (n > p + 1 && !strncmp(url + n - p, prefix, p) && url[n - p - 1] == '/') n -= p + 1;
    snprintf(out, PROTO_URL_BYTES_MAX + 1, "%.*s%s", (int)n, url, url + end);
}

void object_name(const char *prefix, const char *name, char out[CKPT_NAME_BYTES_MAX + 1]) {
    snprintf(out, CKPT_NAME_BYTES_MAX + 1, "%s%s%s", prefix, *prefix ? "/" : "", name);
}

int object_read(struct ckpt_store *s, const char *name, size_t bytes_max, struct ckpt_blob *out,
                struct err *err) {
    struct ckpt_object o;
    if (s->ops->stat(s, name, &o, err)) return -1;
    if (o.bytes > bytes_max)
        return err_set(err, ERR_FULL, "%s: %" PRIu64 " bytes, at most %zu are read", name, o.bytes, bytes_max);
    out->length = (size_t)o.bytes;
    out->data = malloc(out->length + 1);
    if (!out->data) return err_set(err, ERR_MEMORY, "%s: out of memory for %zu bytes", name, out->length);
    if (!object_get(s, name, 0, out->data, out->length, err)) return 0;
    free(out->data);
    *out = (struct ckpt_blob){0};
    return -1;
}

/* ---- folders ----------------------------------------------------------------------------------- */

static int take_object(void *arg, const struct ckpt_object *o, struct err *err) {
    struct object_list *l = arg;
    if (l->count == l->capacity) {
        size_t more = l->capacity ? 2 * l->capacity : 32;
        struct ckpt_object *grown = realloc(l->object, more * sizeof *grown);
        if (!grown) return err_set(err, ERR_MEMORY, "out of memory for a list of %zu objects", more);
        l->object = grown;
        l->capacity = more;
    }
    l->object[l->count++] = *o;
    return 0;
}

int object_list(struct ckpt_store *s, const char *prefix, struct object_list *out, struct err *err) {
    *out = (struct object_list){0};
    if (!s->ops->list(s, prefix, take_object, out, err)) return 0;
    object_list_release(out);
    return -1;
}

void object_list_release(struct object_list *l) {
    free(l->object);
    *l = (struct object_list){0};
}

int object_remove_all(struct ckpt_store *s, const char *prefix, struct err *err) {
    char name[CKPT_NAME_BYTES_MAX + 1];
    struct object_list l;
    object_name(prefix, "manifest.json", name);
    if (s->ops->remove(s, name, err)) return -1;
    object_name(prefix, "", name);
    if (object_list(s, name, &l, err)) return -1;
    int r = 0;
    for (size_t i = 0; !r && i < l.count; i++) r = s->ops->remove(s, l.object[i].name, err);
    object_list_release(&l);
    return r;
}

/* ---- sweep ------------------------------------------------------------------------------------- */

struct folder {
    char prefix[CKPT_PREFIX_BYTES_MAX + 1];
    uint64_t index;
    int64_t modified_s; /* of the newest object */
    bool complete;
};

/* "step-<digits>/...": its index and the length of the folder's name; false for anything else. */
static bool parse_prefix(const char *name, size_t *length, uint64_t *index) {
    char *end, again[CKPT_PREFIX_BYTES_MAX + 1];
    if (strncmp(name, "step-", 5) != 0 || name[5] < '0' || name[5] > '9') return false;
    *index = strtoull(name + 5, &end, 10);
    *length = (size_t)(end - name);
    if (*end != '/' || *length > CKPT_PREFIX_BYTES_MAX) return false;
    ckpt_prefix(*index, again);
    return strlen(again) == *length && !strncmp(again, name, *length);
}

/* Group objects into folders, newest index first. Returns NULL when out of memory. */
static struct folder *group(const struct object_list *l, uint32_t *count) {
    struct folder *f = calloc(l->count + 1, sizeof *f);
    *count = 0;
    for (size_t i = 0; f && i < l->count; i++) {
        const struct ckpt_object *o = &l->object[i];
        uint64_t index;
        size_t length;
        uint32_t at = 0;
        if (!parse_prefix(o->name, &length, &index)) continue;
        while (at < *count && f[at].index > index) at++;
        if (at == *count || f[at].index != index) {
            memmove(&f[at + 1], &f[at], (*count - at) * sizeof *f);
            f[at] = (struct folder){.index = index, .modified_s = INT64_MIN};
            memcpy(f[at].prefix, o->name, length);
            (*count)++;
        }
        if (o->modified_s > f[at].modified_s) f[at].modified_s = o->modified_s;
        if (!o->unfinished && !strcmp(o->name + length, "/manifest.json")) f[at].complete = true;
    }
    return f;
}

int ckpt_sweep(struct ckpt_store *store, int64_t stale_s, uint32_t keep, uint32_t *removed,
               struct err *err) {
    struct object_list l;
    struct latest latest = {0};
    char version[CKPT_VERSION_BYTES_MAX + 1];
    uint32_t folders, gone = 0, complete = 0;
    struct err e = {0};
    if (latest_read(store, &latest, version, &e) && e.code != ERR_NOT_FOUND && e.code != ERR_CORRUPT) {
        if (err) *err = e;
        return -1;
    }
    if (object_list(store, "step-", &l, err)) return -1;
    struct folder *f = group(&l, &folders);
    int r = f ? 0 : err_set(err, ERR_MEMORY, "out of memory for %zu objects", l.count);
    for (uint32_t i = 0; !r && i < folders; i++) {
        bool spare = f[i].complete ? !keep || complete++ < keep || !strcmp(f[i].prefix, latest.prefix)
                                   : time(NULL) - f[i].modified_s < stale_s;
        if (spare) continue;
        r = object_remove_all(store, f[i].prefix, err);
        gone += !r;
    }
    if (removed) *removed = gone;
    free(f);
    object_list_release(&l);
    return r;
}
