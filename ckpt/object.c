/* object.c - what writer, reader and retention do with the objects of a store: names, whole small
 * ones, folders. */
#include "ckpt/internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
    for (size_t i = 0; !r && i < l.count; i++) /* whatever a store lists: nothing of another folder */
        if (!strncmp(l.object[i].name, name, strlen(name))) r = s->ops->remove(s, l.object[i].name, err);
    object_list_release(&l);
    return r;
}
