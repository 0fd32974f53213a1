/* store_s3.c - a store in a bucket of S3 or of what speaks like it: AWS, Ceph, MinIO, R2, Garage. An
 * object is a key below the prefix. Every body goes with its SHA-256 in the signature, so that the
 * server refuses what changed on the way. */
#include <assert.h>
#include <inttypes.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ckpt/s3.h"

#define PAGES_MAX 10000 /* of a list, a thousand objects each */
#define ETAG_FLIGHTS 2  /* an ETag with and without its quotes */

/* ---- one request ------------------------------------------------------------------------------------ */

static int check_name(const struct s3_store *s, const char *name, struct err *err) {
    if (ckpt_name_valid(name)) return 0;
    return err_set(err, ERR_REFUSED, "%.120s: \"%.64s\" cannot be the name of an object", s->base.url, name);
}

static void sha256_header(const struct s3_call *c, char out[96]) {
    uint8_t digest[32];
    unsigned length = sizeof digest;
    const uint8_t *of = c->body_read ? c->sha256 : digest;
    int at = snprintf(out, 96, "x-amz-content-sha256: %s", of ? "" : "UNSIGNED-PAYLOAD");
    int done = c->body_read ||
               EVP_Digest(c->body ? c->body : "", c->body_bytes, digest, &length, EVP_sha256(), NULL) == 1;
    assert(done);
    for (int i = 0; of && i < 32; i++) at += snprintf(out + at, 96 - (size_t)at, "%02x", of[i]);
}

bool s3_is_sheltered(const struct s3_store *s) {
    return s->config.loopback || !strncmp(s->config.endpoint, "https:", 6);
}

int s3_call(struct s3_store *s, const struct s3_call *c, struct http_answer *a, struct err *err) {
    char url[S3_URL_BYTES_MAX], sha256[96], token[2100], key[S3_KEY_BYTES_MAX + 1];
    struct http_request r = {.method = c->method, .url = url, .body = c->body, .body_bytes = c->body_bytes,
                             .body_read = c->body_read, .body_arg = c->body_arg, .at_once = c->at_once,
                             .out = c->out, .out_bytes = c->out_bytes, .offset = c->offset, .tries = c->tries,
                             .stall_s = c->stall_s, .cancel = c->cancel, .again = s3_passes};
    s3_url(&s->config, c->name, c->query, url);
    if (*s->config.key) {
        r.auth = &s->auth;
        sha256_header(c, sha256);
        r.header[r.header_count++] = sha256;
        snprintf(token, sizeof token, "x-amz-security-token: %s", s->config.token);
        if (*s->config.token) r.header[r.header_count++] = token;
    }
    if (c->header) r.header[r.header_count++] = c->header;
    /* libcurl's is a form's */
    if (c->method == HTTP_POST) r.header[r.header_count++] = "Content-Type: application/xml";
    if (!http_perform(s->http, &r, a, err)) {
        if (a->status / 100 == 2) atomic_store(&s->bucket_seen, true);
        return 0;
    }
    s3_key(&s->config, c->name ? c->name : "", key);
    err_prefix(err, "s3://%.63s/%.60s at %.50s", s->config.bucket, key, s->config.endpoint);
    return -1;
}

static const char *verb_of(enum http_method m) {
    static const char *const verbs[] = {[HTTP_GET] = "GET", [HTTP_HEAD] = "HEAD", [HTTP_PUT] = "PUT",
                                        [HTTP_POST] = "POST", [HTTP_DELETE] = "DELETE"};
    return verbs[m];
}

static int refusal(struct s3_store *s, const struct s3_call *c, const struct http_answer *a,
                   struct err *err) {
    char key[S3_KEY_BYTES_MAX + 1];
    s3_key(&s->config, c->name ? c->name : "", key);
    return s3_refusal(&s->config, a, verb_of(c->method), key, err);
}

int s3_call_ok(struct s3_store *s, const struct s3_call *c, struct http_answer *a, struct err *err) {
    if (s3_call(s, c, a, err)) return -1;
    if (a->status / 100 == 2) return 0;
    refusal(s, c, a, err);
    http_answer_release(a);
    return -1;
}

/* ---- reading ---------------------------------------------------------------------------------------- */

/* The answer to HEAD has no body, so the reason of a refusal is had by asking for the first byte. What
 * is not there needs none, once the bucket is known to be. */
static int why_not(struct s3_store *s, const char *name, const struct http_answer *head, struct err *err) {
    struct s3_call c = {.method = HTTP_GET, .name = name, .out = (uint8_t[1]){0}, .out_bytes = 1};
    struct http_answer a;
    if (head->status == 404 && atomic_load(&s->bucket_seen)) return refusal(s, &c, head, err);
    if (s3_call(s, &c, &a, err)) return -1;
    char code[64];
    s3_code(&a, code);
    if (!strcmp(code, "NoSuchKey")) atomic_store(&s->bucket_seen, true);
    refusal(s, &c, a.status / 100 == 2 ? head : &a, err);
    http_answer_release(&a);
    return -1;
}

int s3_stat(struct ckpt_store *base, const char *name, struct ckpt_object *out, struct err *err) {
    struct s3_store *s = (struct s3_store *)base;
    struct s3_call c = {.method = HTTP_HEAD, .name = name};
    struct http_answer a;
    if (check_name(s, name, err) || s3_call(s, &c, &a, err)) return -1;
    int r = -1;
    if (a.status != 200) {
        why_not(s, name, &a, err);
    } else if (a.length == UINT64_MAX) {
        err_set(err, ERR_UNSUPPORTED, "%.120s/%.64s: the store does not say how long it is", s->base.url,
                name);
    } else {
        *out = (struct ckpt_object){.bytes = a.length, .modified_s = a.modified_s};
        snprintf(out->name, sizeof out->name, "%s", name);
        snprintf(out->version, sizeof out->version, "%s", a.etag);
        r = 0;
    }
    http_answer_release(&a);
    return r;
}

static int s3_get(struct ckpt_store *base, const char *name, uint64_t offset, void *out, size_t n,
                  struct err *err) {
    struct s3_store *s = (struct s3_store *)base;
    struct s3_call c = {.method = HTTP_GET, .name = name, .out = out, .out_bytes = n, .offset = offset};
    struct http_answer a;
    struct ckpt_object o;
    if (n == 0) return s3_stat(base, name, &o, err);
    if (check_name(s, name, err) || s3_call_ok(s, &c, &a, err)) return -1;
    int r = a.data_bytes == n ? 0
          : err_set(err, ERR_TRUNCATED, "%.120s/%.64s: ends at byte %" PRIu64 ", wanted %" PRIu64,
                    s->base.url, name,
                    offset + a.data_bytes, offset + n);
    http_answer_release(&a);
    return r;
}

/* ---- put -------------------------------------------------------------------------------------------- */

/* Is what lies there what we wanted to put? A try whose answer was lost may have been carried out, and
 * the next one then fails on its own condition. */
static bool is_ours(struct s3_store *s, const char *name, const void *bytes, size_t n) {
    struct ckpt_object o;
    uint8_t *now = malloc(n + 1);
    bool same = now && !s3_stat(&s->base, name, &o, NULL) && o.bytes == n &&
                (n == 0 || !s3_get(&s->base, name, 0, now, n, NULL)) && !memcmp(now, bytes, n);
    free(now);
    return same;
}

/* One put under a condition that stands in `header` (NULL: none). */
static int put_if(struct s3_store *s, const char *name, const void *bytes, size_t n, const char *header,
                  struct err *err) {
    struct s3_call c = {.method = HTTP_PUT, .name = name, .body = bytes, .body_bytes = n, .header = header};
    struct http_answer a;
    if (s3_call(s, &c, &a, err)) return -1;
    int r = a.status / 100 == 2 ? 0 : -1;
    if (r && a.status == 412 && a.may_repeat && is_ours(s, name, bytes, n)) r = 0;
    if (r) refusal(s, &c, &a, err);
    http_answer_release(&a);
    return r;
}

/* Only where nothing is. Looked at before as well: some stores know no conditions, and say so (501) or not. */
static int put_absent(struct s3_store *s, const char *name, const void *bytes, size_t n, struct err *err) {
    struct ckpt_object o;
    struct err e = {0};
    if (!s3_stat(&s->base, name, &o, &e))
        return err_set(err, ERR_STALE, "%.120s/%.64s: somebody else put it first", s->base.url, name);
    if (e.code == ERR_NOT_FOUND) {
        if (!put_if(s, name, bytes, n, "If-None-Match: *", &e)) return 0;
        if (e.code == ERR_UNSUPPORTED) return put_if(s, name, bytes, n, NULL, err);
    }
    if (err) *err = e;
    return -1;
}

/* Only over that version. Ceph compares with the ETag without its quotes: where the condition fails
 * and the version is still the one, it is tried in the other form, which is then remembered. */
static int put_over(struct s3_store *s, const char *name, const void *bytes, size_t n, const char *version,
                    struct err *err) {
    struct ckpt_object o;
    struct err e = {0};
    for (int i = 0; i < ETAG_FLIGHTS; i++) {
        if (s3_stat(&s->base, name, &o, err)) return -1;
        if (strcmp(o.version, version) != 0) break;
        char header[128];
        size_t length = strlen(version);
        bool quoted = length > 1 && *version == '"' && version[length - 1] == '"', bare = atomic_load(&s->bare_etag);
        snprintf(header, sizeof header, "If-Match: %.*s", quoted && bare ? (int)length - 2 : (int)length,
                 version + (quoted && bare));
        if (!put_if(s, name, bytes, n, header, &e)) return 0;
        if (e.code == ERR_UNSUPPORTED) return put_if(s, name, bytes, n, NULL, err);
        if (e.code != ERR_STALE) break;
        atomic_store(&s->bare_etag, !bare);
    }
    if (e.code && e.code != ERR_STALE) {
        if (err) *err = e;
        return -1;
    }
    return err_set(err, ERR_STALE, "%.120s/%.64s: changed by somebody else", s->base.url, name);
}

int s3_put(struct ckpt_store *base, const char *name, const void *bytes, size_t n, const char *version,
           struct err *err) {
    struct s3_store *s = (struct s3_store *)base;
    if (check_name(s, name, err)) return -1;
    return !version  ? put_if(s, name, bytes, n, NULL, err)
         : !*version ? put_absent(s, name, bytes, n, err)
                     : put_over(s, name, bytes, n, version, err);
}

/* ---- list, remove ----------------------------------------------------------------------------------- */

/* "a/b" and an upload's id: "a/.b.0123456789abcdef", as a folder hides what is under way. False where
 * that is too long for a name, which none of a checkpoint's is. */
static bool hide(const char *name, const char *id, char out[CKPT_NAME_BYTES_MAX + 1]) {
    char hex[DIGEST_HEX_BYTES];
    struct digest d = digest_of(id, strlen(id));
    const char *slash = strrchr(name, '/');
    int folder = slash ? (int)(slash - name) + 1 : 0;
    digest_hex(&d, hex);
    return snprintf(out, CKPT_NAME_BYTES_MAX + 1, "%.*s.%s.%.16s", folder, name, name + folder, hex) <=
           CKPT_NAME_BYTES_MAX;
}

struct listing {
    struct s3_store *store;
    int (*visit)(void *arg, const struct ckpt_object *o, struct err *err);
    void *arg;
};

/* The object's name below the store's prefix; NULL for a key that is none of ours. */
static const char *name_in(const struct s3_store *s, const char *key) {
    size_t n = strlen(s->config.prefix);
    if (n && (strncmp(key, s->config.prefix, n) != 0 || key[n] != '/')) return NULL;
    const char *name = key + (n ? n + 1 : 0);
    return ckpt_name_valid(name) ? name : NULL;
}

static int take_object(const struct listing *l, const char *from, const char *end, struct err *err) {
    char key[S3_KEY_BYTES_MAX + 1], size[32], modified[64];
    struct ckpt_object o = {0};
    if (!s3_xml_text(from, end, "Key", key, sizeof key) ||
        !s3_xml_text(from, end, "Size", size, sizeof size)) return 0;
    const char *name = name_in(l->store, key);
    if (!name) return 0;
    snprintf(o.name, sizeof o.name, "%s", name);
    o.bytes = strtoull(size, NULL, 10);
    o.modified_s = s3_xml_text(from, end, "LastModified", modified, sizeof modified) ? s3_time(modified) : -1;
    if (!s3_xml_text(from, end, "ETag", o.version, sizeof o.version)) o.version[0] = 0;
    return l->visit(l->arg, &o, err);
}

static int take_upload(const struct listing *l, const char *from, const char *end, struct err *err) {
    char key[S3_KEY_BYTES_MAX + 1], id[S3_UPLOAD_ID_MAX + 1], begun[64];
    struct ckpt_object o = {.unfinished = true};
    if (!s3_xml_text(from, end, "Key", key, sizeof key) ||
        !s3_xml_text(from, end, "UploadId", id, sizeof id)) return 0;
    const char *name = name_in(l->store, key);
    if (!name || !hide(name, id, o.name)) return 0;
    o.modified_s = s3_xml_text(from, end, "Initiated", begun, sizeof begun) ? s3_time(begun) : -1;
    return l->visit(l->arg, &o, err);
}

/* `pattern` is the query with one %s for where the page before ended. */
struct page_kind {
    const char *item, *next[2]; /* elements: what is listed, where the next page begins */
    const char *first;          /* of the query, up to the prefix */
    const char *parameter[2];   /* that carry `next` on; the first sorts before `first` */
    int (*take)(const struct listing *l, const char *from, const char *end, struct err *err);
};

static const struct page_kind objects = {"Contents", {"NextContinuationToken", NULL}, "list-type=2&prefix=",
                                         {"continuation-token", NULL}, take_object};
static const struct page_kind uploads = {"Upload", {"NextKeyMarker", "NextUploadIdMarker"}, "prefix=",
                                         {"key-marker", "upload-id-marker"}, take_upload};

/* Parameters must be in order of their names: continuation-token or key-marker, list-type or prefix,
 * upload-id-marker, uploads. */
static int page_query(const struct s3_store *s, const struct page_kind *k, const char *prefix,
                      const char next[2][2048], char *out, size_t size, struct err *err) {
    char key[S3_KEY_BYTES_MAX + 1], escaped[3 * S3_KEY_BYTES_MAX + 1], token[2][6200] = {"", ""};
    s3_key(&s->config, prefix, key);
    if (!*prefix && *s->config.prefix) snprintf(key, sizeof key, "%s/", s->config.prefix);
    bool failed = http_escape(key, escaped, sizeof escaped) != 0;
    for (int i = 0; i < 2; i++) failed |= http_escape(next[i], token[i], sizeof token[i]) != 0;
    int n = snprintf(out, size, "%s%s%s%s%s%s", *token[0] ? k->parameter[0] : "", *token[0] ? "=" : "",
                     token[0],
                     *token[0] ? "&" : "", k->first, escaped);
    if (n < (int)size && k->parameter[1]) {
        if (*token[1])
            n += snprintf(out + n, size - (size_t)n, "&%s=%s", k->parameter[1], token[1]);
        if (n < (int)size) n += snprintf(out + n, size - (size_t)n, "&uploads=");
    }
    return !failed && n < (int)size ? 0 : err_set(err, ERR_UNSUPPORTED, "%.120s: a list's page is too far",
                                                  s->base.url);
}

static int list_pages(struct s3_store *s, const struct page_kind *k, const char *prefix,
                      const struct listing *l,
                      struct err *err) {
    char next[2][2048] = {"", ""}, query[S3_URL_BYTES_MAX / 2];
    for (int page = 0; page < PAGES_MAX; page++) {
        struct s3_call c = {.method = HTTP_GET, .query = query};
        struct http_answer a;
        char more[8] = "";
        int r = 0;
        if (page_query(s, k, prefix, (const char (*)[2048])next, query, sizeof query, err) ||
            s3_call_ok(s, &c, &a, err))
            return -1;
        const char *end = a.text + a.text_bytes, *item;
        size_t n;
        for (const char *p = a.text; !r && (p = s3_xml_next(p, end, k->item, &item, &n));)
            r = k->take(l, item, item + n, err);
        bool truncated = s3_xml_text(a.text, end, "IsTruncated", more, sizeof more) && !strcmp(more, "true");
        for (int i = 0; i < 2; i++)
            if (!k->next[i] || !s3_xml_text(a.text, end, k->next[i], next[i], sizeof next[i])) next[i][0] = 0;
        http_answer_release(&a);
        if (r || !truncated) return r;
        if (!*next[0]) return err_set(err, ERR_IO, "%.120s: the store lists a part and not where it goes on",
                                      s->base.url);
    }
    return err_set(err, ERR_FULL, "%.120s: more than %d pages of objects", s->base.url, PAGES_MAX);
}

/* Stores without lists of uploads sweep those by themselves. */
static int list_uploads(struct s3_store *s, const char *prefix, const struct listing *l, struct err *err) {
    struct err e = {0};
    if (!list_pages(s, &uploads, prefix, l, &e) || e.code == ERR_UNSUPPORTED) return 0;
    if (err) *err = e;
    return -1;
}

static int s3_list(struct ckpt_store *base, const char *prefix,
                   int (*visit)(void *arg, const struct ckpt_object *o, struct err *err), void *arg,
                   struct err *err) {
    struct s3_store *s = (struct s3_store *)base;
    struct listing l = {s, visit, arg};
    return list_pages(s, &objects, prefix, &l, err) || list_uploads(s, prefix, &l, err) ? -1 : 0;
}

/* The upload whose hidden name is `want`. */
struct abortion {
    const char *want;
    char name[CKPT_NAME_BYTES_MAX + 1], id[S3_UPLOAD_ID_MAX + 1];
};

static int match_upload(const struct listing *l, const char *from, const char *end, struct err *err) {
    struct abortion *b = l->arg;
    char key[S3_KEY_BYTES_MAX + 1], id[S3_UPLOAD_ID_MAX + 1], hidden[CKPT_NAME_BYTES_MAX + 1];
    (void)err;
    if (!s3_xml_text(from, end, "Key", key, sizeof key) ||
        !s3_xml_text(from, end, "UploadId", id, sizeof id)) return 0;
    const char *name = name_in(l->store, key);
    if (name && hide(name, id, hidden) && !strcmp(hidden, b->want)) {
        snprintf(b->name, sizeof b->name, "%s", name);
        snprintf(b->id, sizeof b->id, "%s", id);
    }
    return 0;
}

/* Deleting what is not there is fine, an upload that somebody else ended too. */
static int delete(struct s3_store *s, const char *name, const char *query, struct err *err) {
    struct s3_call c = {.method = HTTP_DELETE, .name = name, .query = query};
    struct http_answer a;
    if (s3_call(s, &c, &a, err)) return -1;
    int r = a.status / 100 == 2 || a.status == 404 ? 0 : refusal(s, &c, &a, err);
    http_answer_release(&a);
    return r;
}

static int abort_hidden(struct s3_store *s, const char *hidden, struct err *err) {
    char prefix[CKPT_NAME_BYTES_MAX + 1], query[3 * S3_UPLOAD_ID_MAX + 16] = "uploadId=";
    struct page_kind kind = uploads;
    struct abortion b = {.want = hidden};
    struct listing l = {.store = s, .arg = &b};
    const char *slash = strrchr(hidden, '/');
    int folder = slash ? (int)(slash - hidden) + 1 : 0;
    size_t n = strlen(hidden + folder);
    if (n < 19) return err_set(err, ERR_REFUSED, "%.120s: \"%.64s\" is no object's name", s->base.url,
                               hidden);
    snprintf(prefix, sizeof prefix, "%.*s%.*s", folder, hidden, (int)n - 18, hidden + folder + 1);
    kind.take = match_upload;
    if (list_pages(s, &kind, prefix, &l, err)) return -1;
    if (!*b.id) return 0;
    if (http_escape(b.id, query + 9, sizeof query - 9)) return err_set(err, ERR_IO, "upload id: too long");
    return delete(s, b.name, query, err);
}

static int s3_remove(struct ckpt_store *base, const char *name, struct err *err) {
    struct s3_store *s = (struct s3_store *)base;
    const char *slash = strrchr(name, '/');
    if ((slash ? slash[1] : *name) == '.' && !strstr(name, "..")) return abort_hidden(s, name, err);
    return check_name(s, name, err) ? -1 : delete(s, name, NULL, err);
}

/* ---- open and close --------------------------------------------------------------------------------- */

static void s3_cancel(struct ckpt_store *base) { http_client_cancel(((struct s3_store *)base)->http); }

static void s3_close(struct ckpt_store *base) {
    struct s3_store *s = (struct s3_store *)base;
    assert(!s->uploads); /* they are destroyed before */
    http_client_destroy(s->http);
    pthread_mutex_destroy(&s->mutex);
    OPENSSL_cleanse(s->config.secret, sizeof s->config.secret);
    free(s);
}

static const struct ckpt_store_ops s3_ops = {
    .get = s3_get,
    .stat = s3_stat,
    .put = s3_put,
    .upload_begin = s3_upload_begin,
    .upload_put = s3_upload_put,
    .upload_sync = s3_upload_sync,
    .upload_behind = s3_upload_behind,
    .upload_complete = s3_upload_complete,
    .upload_destroy = s3_upload_destroy,
    .upload_share = s3_upload_share,
    .upload_whole = s3_upload_whole,
    .upload_offer = s3_upload_offer,
    .upload_send = s3_upload_send,
    .upload_sent = s3_upload_sent,
    .upload_check = s3_upload_check,
    .upload_read = s3_upload_read,
    .upload_release = s3_upload_release,
    .list = s3_list,
    .remove = s3_remove,
    .cancel = s3_cancel,
    .close = s3_close,
};

struct ckpt_store *store_s3_open(const char *url, struct err *err) {
    struct s3_store *s = calloc(1, sizeof *s);
    if (!s) {
        err_set(err, ERR_MEMORY, "%.120s: out of memory", url);
        return NULL;
    }
    if (!s3_config_load(url, &s->config, err) && !http_limits_load(&s->limits, err) &&
        (s->http = http_client_create(&s->limits, s->config.loopback, err))) {
        s->base = (struct ckpt_store){.ops = &s3_ops, .remote = true, .streams = s->limits.streams,
                                      .block_bytes = (size_t)s->limits.part_mib << 20};
        snprintf(s->base.url, sizeof s->base.url, "s3://%s%s%s", s->config.bucket,
                 *s->config.prefix ? "/" : "",
                 s->config.prefix);
        snprintf(s->base.query, sizeof s->base.query, "%s", s->config.query);
        s->memory_parts = S3_MEMORY_BYTES / (uint32_t)s->base.block_bytes;
        s->auth = (struct http_auth){s->config.key, s->config.secret, s->config.region};
        pthread_mutex_init(&s->mutex, NULL);
        return &s->base;
    }
    free(s);
    return NULL;
}
