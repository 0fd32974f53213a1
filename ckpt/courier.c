/* courier.c - parts of a checkpoint sent and read by who has no key to the store, only a URL for each. */
#include <assert.h>
#include <inttypes.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ckpt/http.h"
#include "ckpt/internal.h"
#include "ckpt/s3.h"

#define TRIES 4 /* others are there to take it over */

struct ckpt_courier {
    struct s3_config store;            /* as the URL of the run's store says it */
    struct http_client *http, *here; /* here: for servers on this machine, which no proxy is asked for */
};

struct ckpt_courier *ckpt_courier_create(const char *store_url, struct err *err) {
    struct http_limits limits;
    struct ckpt_courier *c = calloc(1, sizeof *c);
    if (!c) {
        err_set(err, ERR_MEMORY, "out of memory for an HTTP client");
        return NULL;
    }
    if (!s3_url_parse(store_url, &c->store, err) && !http_limits_load(&limits, err) && (c->http = http_client_create(&limits, false, err)) &&
        (c->here = http_client_create(&limits, true, err)))
        return c;
    ckpt_courier_destroy(c);
    return NULL;
}

void ckpt_courier_cancel(struct ckpt_courier *c) {
    http_client_cancel(c->http);
    http_client_cancel(c->here);
}

void ckpt_courier_destroy(struct ckpt_courier *c) {
    if (!c) return;
    http_client_destroy(c->http);
    http_client_destroy(c->here);
    free(c);
}

/* Does it lie below this store's prefix, its bucket in the path or in the host? */
static bool below(const struct s3_config *store, bool path_style, const char *url) {
    struct s3_config c = *store;
    char top[S3_URL_BYTES_MAX];
    c.path_style = path_style;
    s3_url(&c, "", NULL, top);
    size_t n = strlen(top);
    while (n > 0 && top[n - 1] == '/') n--;
    return !strncmp(url, top, n) && url[n] == '/';
}

/* A store whose URL names no endpoint is Amazon's, in a region that the writer's machine may know alone. */
static bool at_amazon(const struct s3_config *store, const char *url) {
    static const char amazon[] = ".amazonaws.com/", https[] = "https://";
    struct s3_config c = *store;
    const char *host = url + sizeof https - 1, *path = host + strcspn(host, "/");
    const char *service = strncmp(host, c.bucket, strlen(c.bucket)) ? host : host + strlen(c.bucket) + 1;
    size_t n = (size_t)(path + 1 - host), k = sizeof amazon - 1;
    if (strncmp(url, https, sizeof https - 1) || n <= k || strncmp(path + 1 - k, amazon, k)) return false;
    if (service > path || strncmp(service, "s3.", 3)) return false;
    snprintf(c.endpoint, sizeof c.endpoint, "%s%.*s", https, (int)(path - service), service);
    return below(&c, service == host, url);
}

bool ckpt_courier_follows(const struct ckpt_courier *c, const char *url) {
    if (!*c->store.endpoint) return at_amazon(&c->store, url);
    return below(&c->store, true, url) || below(&c->store, false, url);
}

/* The client for this URL; NULL: none that a member should follow. */
static struct http_client *client_of(struct ckpt_courier *c, const char *url, struct err *err) {
    if (!ckpt_courier_follows(c, url)) {
        err_set(err, ERR_REFUSED, "a part's URL \"%.60s\" is not in the run's store (bucket %.63s%s%.100s)", url,
                c->store.bucket, *c->store.endpoint ? " at " : "", c->store.endpoint);
        return NULL;
    }
    if (!strncmp(url, "http://", 7) && http_loopback(url + 7)) return c->here;
    if (!strncmp(url, "https://", 8)) return http_loopback(url + 8) ? c->here : c->http;
    err_set(err, ERR_REFUSED, "a part's URL \"%.40s\" is neither https nor on this machine", url);
    return NULL;
}

/* Where it goes, for messages: the signature in the query is nobody's business. */
static int refused(const struct ckpt_part *p, const char *verb, const struct http_answer *a,
                   struct err *err) {
    return err_set(err, a->status == 403 || a->status == 404 ? ERR_REFUSED : ERR_IO,
                   "%s %.120s...: bytes %" PRIu64 "+%" PRIu64 ": the store answers %ld", verb, p->url,
                   p->offset, p->bytes, a->status);
}

int ckpt_courier_send(struct ckpt_courier *c, const struct ckpt_part *p, const void *bytes, struct err *err) {
    char sha256[96];
    int at = snprintf(sha256, sizeof sha256, "x-amz-content-sha256: ");
    for (int i = 0; i < 32; i++) at += snprintf(sha256 + at, sizeof sha256 - (size_t)at, "%02x",
                                                p->sha256[i]);
    struct http_request r = {.method = HTTP_PUT, .url = p->url, .header = {sha256}, .header_count = 1,
                             .body = bytes,
                             .body_bytes = (size_t)p->bytes, .tries = TRIES};
    struct http_client *http = client_of(c, p->url, err);
    struct http_answer a;
    if (!http || http_perform(http, &r, &a, err)) return -1;
    int result = a.status / 100 == 2 ? 0 : refused(p, "PUT", &a, err);
    http_answer_release(&a);
    return result;
}

int ckpt_part_matches(const struct ckpt_part *p, const void *bytes, struct err *err) {
    uint8_t digest[32];
    unsigned n = sizeof digest;
    int done = EVP_Digest(bytes, (size_t)p->bytes, digest, &n, EVP_sha256(), NULL);
    assert(done == 1);
    if (!memcmp(digest, p->sha256, sizeof digest)) return 0;
    return err_set(err, ERR_CORRUPT,
                   "bytes %" PRIu64 "+%" PRIu64 " of the object have SHA-256 %02x%02x%02x%02x..., "
                   "%02x%02x%02x%02x... is asked for", p->offset, p->bytes, digest[0], digest[1], digest[2],
                   digest[3],
                   p->sha256[0], p->sha256[1], p->sha256[2], p->sha256[3]);
}

int ckpt_courier_check(struct ckpt_courier *c, const struct ckpt_part *p, void *room, struct err *err) {
    struct http_request r = {.method = HTTP_GET, .url = p->url, .out = room, .out_bytes = (size_t)p->bytes,
                             .offset = p->offset, .tries = TRIES};
    struct http_client *http = client_of(c, p->url, err);
    struct http_answer a;
    if (!http || http_perform(http, &r, &a, err)) return -1;
    int result = a.status / 100 != 2           ? refused(p, "GET", &a, err)
               : a.data_bytes != r.out_bytes ? err_set(err, ERR_CORRUPT,
                                                       "GET %.120s...: ends %zu bytes early", p->url,
                                                         r.out_bytes - a.data_bytes)
                                             : ckpt_part_matches(p, room, err);
    http_answer_release(&a);
    return result;
}
