/* s3_sign.c - URLs of requests, and URLs that carry a signature of their own, for who has no key. */
#define _GNU_SOURCE /* gmtime_r */
#include <assert.h>
#include <inttypes.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "ckpt/s3.h"

void s3_key(const struct s3_config *c, const char *name, char out[S3_KEY_BYTES_MAX + 1]) {
    snprintf(out, S3_KEY_BYTES_MAX + 1, "%s%s%s", c->prefix, *c->prefix && *name ? "/" : "", name);
}

/* Names and prefixes consist of characters that need no escape. */
void s3_url(const struct s3_config *c, const char *name, const char *query, char out[S3_URL_BYTES_MAX]) {
    char key[S3_KEY_BYTES_MAX + 1] = "";
    const char *host = strstr(c->endpoint, "//") + 2;
    if (name) s3_key(c, name, key);
    int n = c->path_style ? snprintf(out, S3_URL_BYTES_MAX, "%s/%s", c->endpoint, c->bucket)
                          : snprintf(out, S3_URL_BYTES_MAX, "%.*s%s.%s", (int)(host - c->endpoint),
                                     c->endpoint,
                                     c->bucket, host);
    bool slash = *key || !c->path_style; /* "/bucket?list", not "/bucket/?list" */
    snprintf(out + n, S3_URL_BYTES_MAX - (size_t)n, "%s%s%s%s", slash ? "/" : "", key,
             query && *query ? "?" : "",
             query ? query : "");
}

/* ---- signature 4 in the query ------------------------------------------------------------------------- */

static void hex_of(const uint8_t *bytes, size_t n, char *out) {
    for (size_t i = 0; i < n; i++) snprintf(out + 2 * i, 3, "%02x", bytes[i]);
}

static void sha256_of(const char *text, uint8_t out[32]) {
    unsigned n = 32;
    int done = EVP_Digest(text, strlen(text), out, &n, EVP_sha256(), NULL);
    assert(done == 1);
}

static void hmac(const void *key, size_t key_bytes, const char *text, uint8_t out[32]) {
    unsigned n = 32;
    const uint8_t *done = HMAC(EVP_sha256(), key, (int)key_bytes, (const uint8_t *)text, strlen(text), out,
                               &n);
    assert(done);
}

/* date: "20261128". */
static void signing_key(const struct s3_config *c, const char *date, uint8_t out[32]) {
    char first[sizeof c->secret + 4];
    uint8_t a[32], b[32];
    snprintf(first, sizeof first, "AWS4%s", c->secret);
    hmac(first, strlen(first), date, a);
    hmac(a, sizeof a, c->region, b);
    hmac(b, sizeof b, "s3", a);
    hmac(a, sizeof a, "aws4_request", out);
    OPENSSL_cleanse(first, sizeof first);
}

/* As clients write it into the Host header: without the port that goes without saying. */
static size_t host_bytes(const char *url, const char *host) {
    size_t n = strcspn(host, "/?");
    const char *usual = !strncmp(url, "https:", 6) ? ":443" : ":80";
    size_t k = strlen(usual);
    return n > k && !strncmp(host + n - k, usual, k) ? n - k : n;
}

/* The headers that are signed: their names, and the lines as they enter the signature. A body is bound by its
 * digest and length, so the URL is good for these very bytes; what is read, by its range. */
static void signed_headers(const struct s3_presign *p, const char *host, size_t host_n, char names[96],
                           char lines[512], char payload[65]) {
    if (p->sha256) {
        hex_of(p->sha256, 32, payload);
        strcpy(names, "content-length%3Bhost%3Bx-amz-content-sha256");
        snprintf(lines, 512, "content-length:%" PRIu64 "\nhost:%.*s\nx-amz-content-sha256:%s\n", p->bytes,
                 (int)host_n,
                 host, payload);
        return;
    }
    strcpy(payload, "UNSIGNED-PAYLOAD");
    strcpy(names, p->bytes ? "host%3Brange" : "host");
    int n = snprintf(lines, 512, "host:%.*s\n", (int)host_n, host);
    if (p->bytes)
        snprintf(lines + n, 512 - (size_t)n, "range:bytes=%" PRIu64 "-%" PRIu64 "\n", p->offset,
                 p->offset + p->bytes - 1);
}

/* "a%3Bb" to "a;b": in the query they are escaped, in what is signed they are not. */
static void plain_names(const char *escaped, char *out) {
    for (; *escaped; escaped++)
        if (*escaped == '%') *out++ = ';', escaped += 2;
        else *out++ = *escaped;
    *out = 0;
}

int s3_presign(const struct s3_config *c, const struct s3_presign *p, int64_t now_s, char *out, size_t size,
               struct err *err) {
    static const char *const verbs[] = {[HTTP_GET] = "GET", [HTTP_PUT] = "PUT"};
    char url[S3_URL_BYTES_MAX], query[2 * S3_URL_BYTES_MAX], request[3 * S3_URL_BYTES_MAX], text[256],
        stamp[32], scope[128];
    char names[96], plain[96], lines[512], payload[65], credential[768], token[3 * sizeof c->token] = "",
        hex[65];
    uint8_t digest[32], key[32];
    time_t seconds = (time_t)now_s;
    struct tm t;
    assert(p->method == HTTP_GET || p->method == HTTP_PUT);
    if (!*c->key || !gmtime_r(&seconds, &t))
        return err_set(err, ERR_REFUSED, "s3://%.63s: without a key no URL can be signed", c->bucket);
    strftime(stamp, sizeof stamp, "%Y%m%dT%H%M%SZ", &t);
    snprintf(scope, sizeof scope, "%.8s/%s/s3/aws4_request", stamp, c->region);
    s3_url(c, p->name, NULL, url);
    const char *host = strstr(url, "//") + 2, *path = host + strcspn(host, "/");
    signed_headers(p, host, host_bytes(url, host), names, lines, payload);
    snprintf(text, sizeof text, "%.128s/%.120s", c->key, scope);
    if (http_escape(text, credential, sizeof credential) || http_escape(c->token, token, sizeof token))
        return err_set(err, ERR_CONFIG, "s3://%.63s: key or token is too long for a URL", c->bucket);
    int n = snprintf(query, sizeof query,
                     "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=%s&X-Amz-Date=%s&"
                     "X-Amz-Expires=%u%s%s&X-Amz-SignedHeaders=%s%s%s", credential, stamp, p->expires_s,
                     *token ? "&X-Amz-Security-Token=" : "", token, names, p->query ? "&" : "",
                     p->query ? p->query : "");
    plain_names(names, plain);
    int m = snprintf(request, sizeof request, "%s\n%s\n%s\n%s\n%s\n%s", verbs[p->method], path, query, lines,
                     plain,
                     payload);
    sha256_of(request, digest);
    hex_of(digest, sizeof digest, hex);
    snprintf(request, sizeof request, "AWS4-HMAC-SHA256\n%s\n%s\n%s", stamp, scope, hex);
    stamp[8] = 0; /* the date */
    signing_key(c, stamp, key);
    hmac(key, sizeof key, request, digest);
    hex_of(digest, sizeof digest, hex);
    OPENSSL_cleanse(key, sizeof key);
    if (n >= (int)sizeof query || m >= (int)sizeof request ||
        snprintf(out, size, "%s?%s&X-Amz-Signature=%s", url, query, hex) >= (int)size)
        return err_set(err, ERR_CONFIG,
                       "s3://%.63s/%.64s: its signed URL would be longer than %zu characters",
                       c->bucket, p->name, size - 1);
    return 0;
}
