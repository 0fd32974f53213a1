/* store_http.c - a store to read from, on any web server: names are appended to the URL. For
 * published checkpoints, whose signatures and digests say whether what came is right. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ckpt/http.h"
#include "ckpt/internal.h"

#define URL_BYTES_MAX 2048

struct http_store {
    struct ckpt_store base;
    struct http_limits limits;
    struct http_client *http;
};

static int refusal(const struct http_store *s, const char *name, const struct http_answer *a,
                   struct err *err) {
    long status = a->status;
    if (status == 404 || status == 410)
        return err_set(err, ERR_NOT_FOUND, "%.120s/%.64s: not there", s->base.url, name);
    if (status == 401 || status == 403)
        return err_set(err, ERR_REFUSED, "%.120s/%.64s: not public (%ld)", s->base.url, name, status);
    if (status == 416) return err_set(err, ERR_TRUNCATED, "%.120s/%.64s: ends before the range", s->base.url,
                                      name);
    if (http_status_passes(status))
        return err_set(err, ERR_TIMEOUT, "%.120s/%.64s: the server answers %ld (tried %u times)",
                       s->base.url, name,
                       status, a->tries);
    return err_set(err, ERR_IO, "%.120s/%.64s: the server answers %ld", s->base.url, name, status);
}

static int perform(struct http_store *s, const char *name, struct http_request *r, struct http_answer *a,
                   struct err *err) {
    char url[URL_BYTES_MAX];
    if (!ckpt_name_valid(name))
        return err_set(err, ERR_REFUSED, "%.120s: \"%.64s\" cannot be the name of an object", s->base.url,
                       name);
    snprintf(url, sizeof url, "%s/%s%s", s->base.url, name, s->base.query);
    r->url = url;
    r->follow = true;
    if (!http_perform(s->http, r, a, err)) return 0;
    err_prefix(err, "%.120s/%.64s", s->base.url, name);
    return -1;
}

/* HEAD; where the server does not say the length there, the first byte's Content-Range does. */
static int http_stat(struct ckpt_store *base, const char *name, struct ckpt_object *out, struct err *err) {
    struct http_store *s = (struct http_store *)base;
    struct http_request head = {.method = HTTP_HEAD};
    struct http_request get = {.method = HTTP_GET, .out = (uint8_t[1]){0}, .out_bytes = 1};
    struct http_answer a;
    if (perform(s, name, &head, &a, err)) return -1;
    uint64_t bytes = a.status == 200 ? a.length : UINT64_MAX;
    bool look = a.status == 405 || a.status == 501 || (a.status == 200 && bytes == UINT64_MAX);
    if (look) {
        http_answer_release(&a);
        if (perform(s, name, &get, &a, err)) return -1;
        bytes = a.status == 206 ? a.total : a.status == 200 ? a.length : a.status == 416 ? 0 : UINT64_MAX;
    }
    int r = bytes != UINT64_MAX ? 0
          : a.status / 100 == 2 ? err_set(err, ERR_UNSUPPORTED,
                                          "%.120s/%.64s: the server does not say how long it is",
                                          s->base.url, name)
                                : refusal(s, name, &a, err);
    if (!r) {
        *out = (struct ckpt_object){.bytes = bytes, .modified_s = a.modified_s};
        snprintf(out->name, sizeof out->name, "%s", name);
        snprintf(out->version, sizeof out->version, "%s", a.etag);
    }
    http_answer_release(&a);
    return r;
}

static int http_get(struct ckpt_store *base, const char *name, uint64_t offset, void *out, size_t n,
                    struct err *err) {
    struct http_store *s = (struct http_store *)base;
    struct http_request get = {.method = HTTP_GET, .out = out, .out_bytes = n, .offset = offset};
    struct http_answer a;
    struct ckpt_object o;
    if (n == 0) return http_stat(base, name, &o, err);
    if (perform(s, name, &get, &a, err)) return -1;
    int r = a.status / 100 != 2 ? refusal(s, name, &a, err)
          : a.data_bytes == n   ? 0
                                : err_set(err, ERR_TRUNCATED,
                                          "%.120s/%.64s: ends at byte %" PRIu64 ", wanted %" PRIu64,
                                          s->base.url, name, offset + a.data_bytes, offset + n);
    http_answer_release(&a);
    return r;
}

/* ---- what a web server does not do ------------------------------------------------------------------ */

static int read_only(const struct ckpt_store *s, struct err *err) {
    return err_set(err, ERR_UNSUPPORTED, "%.150s: can only be read from", s->url);
}
static int http_put(struct ckpt_store *s, const char *name, const void *bytes, size_t n, const char *version,
                    struct err *err) {
    (void)name, (void)bytes, (void)n, (void)version;
    return read_only(s, err);
}
static struct ckpt_upload *http_begin(struct ckpt_store *s, const char *name, uint64_t bytes,
                                      struct err *err) {
    (void)name, (void)bytes;
    read_only(s, err);
    return NULL;
}
static void http_upload_destroy(struct ckpt_upload *u) { (void)u; } /* there is none but NULL */
static int http_list(struct ckpt_store *s, const char *prefix,
                     int (*visit)(void *arg, const struct ckpt_object *o, struct err *err), void *arg,
                     struct err *err) {
    (void)prefix, (void)visit, (void)arg;
    return err_set(err, ERR_UNSUPPORTED, "%.150s: a web server does not list", s->url);
}
static int http_remove(struct ckpt_store *s, const char *name, struct err *err) {
    (void)name;
    return read_only(s, err);
}

/* ---- open and close --------------------------------------------------------------------------------- */

static void http_cancel(struct ckpt_store *base) { http_client_cancel(((struct http_store *)base)->http); }

static void http_close(struct ckpt_store *base) {
    struct http_store *s = (struct http_store *)base;
    http_client_destroy(s->http);
    free(s);
}

static const struct ckpt_store_ops http_ops = {
    .get = http_get, .stat = http_stat, .put = http_put, .upload_begin = http_begin,
    .upload_destroy = http_upload_destroy, .list = http_list, .remove = http_remove, .cancel = http_cancel,
    .close = http_close,
};

/* The URL up to a '?', which goes behind the names. */
static int take_url(struct http_store *s, const char *url, struct err *err) {
    size_t n = strcspn(url, "?#"), q = strlen(url + n);
    const char *host = strstr(url, "//") + 2;
    if (!strncmp(url, "http://", 7) && !http_loopback(host))
        return err_set(err, ERR_CONFIG, "%.100s: what comes over http can be changed on its way; use https",
                       url);
    if (memchr(host, '@', strcspn(host, "/?#")))
        return err_set(err, ERR_CONFIG, "https: a password does not belong into a URL, which others read");
    while (n > 0 && url[n - 1] == '/') n--;
    if (url + n <= host || n >= sizeof s->base.url || q >= sizeof s->base.query)
        return err_set(err, ERR_CONFIG, "%.100s: not a URL of at most %zu bytes", url,
                       sizeof s->base.url - 1);
    snprintf(s->base.url, sizeof s->base.url, "%.*s", (int)n, url);
    snprintf(s->base.query, sizeof s->base.query, "%s", url + strcspn(url, "?#"));
    return 0;
}

struct ckpt_store *store_http_open(const char *url, struct err *err) {
    struct http_store *s = calloc(1, sizeof *s);
    if (!s) {
        err_set(err, ERR_MEMORY, "%.120s: out of memory", url);
        return NULL;
    }
    if (!take_url(s, url, err) && !http_limits_load(&s->limits, err) &&
        (s->http = http_client_create(&s->limits, http_loopback(strstr(url, "//") + 2), err))) {
        s->base.ops = &http_ops;
        s->base.remote = true;
        s->base.streams = s->limits.streams;
        s->base.block_bytes = (size_t)s->limits.part_mib << 20;
        return &s->base;
    }
    free(s);
    return NULL;
}
