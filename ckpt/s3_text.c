/* s3_text.c - what S3 servers answer: their XML, as far as it is needed, and their errors in words
 * that say what to do. The bytes are a stranger's: nothing is read beyond `end`. */
#define _GNU_SOURCE /* timegm, memmem */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ckpt/s3.h"

/* ---- XML -------------------------------------------------------------------------------------------- */

static const char *find(const char *from, const char *end, const char *what) {
    return from && from < end ? memmem(from, (size_t)(end - from), what, strlen(what)) : NULL;
}

const char *s3_xml_next(const char *from, const char *end, const char *tag, const char **content,
                        size_t *bytes) {
    char open[64], close[64];
    snprintf(open, sizeof open, "<%s>", tag);
    snprintf(close, sizeof close, "</%s>", tag);
    const char *a = find(from, end, open);
    const char *b = a ? find(a += strlen(open), end, close) : NULL;
    if (!b) return NULL;
    *content = a;
    *bytes = (size_t)(b - a);
    return b + strlen(close);
}

/* One entity, "&amp;" to '&'; returns its length, 0 if it is none that we know. */
static size_t entity(const char *p, size_t n, char *out) {
    static const struct { const char *name; char c; } known[] = {
        {"&amp;", '&'}, {"&lt;", '<'}, {"&gt;", '>'}, {"&quot;", '"'}, {"&apos;", '\''},
        {"&#34;", '"'}, {"&#39;", '\''}, {"&#38;", '&'}, {"&#x2F;", '/'}, {"&#47;", '/'}, {"&#43;", '+'},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        size_t k = strlen(known[i].name);
        if (n < k || strncmp(p, known[i].name, k) != 0) continue;
        *out = known[i].c;
        return k;
    }
    return 0;
}

bool s3_xml_text(const char *from, const char *end, const char *tag, char *out, size_t size) {
    const char *p;
    size_t n, used = 0;
    if (!s3_xml_next(from, end, tag, &p, &n)) return false;
    for (size_t i = 0; i < n; used++) {
        if (used + 1 >= size) return false;
        size_t k = p[i] == '&' ? entity(p + i, n - i, &out[used]) : 0;
        if (!k) out[used] = p[i], k = 1;
        i += k;
    }
    out[used] = 0;
    return true;
}

int64_t s3_time(const char *text) {
    struct tm t = {0};
    if (sscanf(text, "%4d-%2d-%2dT%2d:%2d:%2d", &t.tm_year, &t.tm_mon, &t.tm_mday, &t.tm_hour, &t.tm_min,
               &t.tm_sec) != 6)
        return -1;
    t.tm_year -= 1900;
    t.tm_mon--;
    return (int64_t)timegm(&t);
}

/* ---- errors ----------------------------------------------------------------------------------------- */

void s3_code(const struct http_answer *a, char out[64]) {
    out[0] = 0;
    if (!a->text || !find(a->text, a->text + a->text_bytes, "<Error")) return;
    if (!s3_xml_text(a->text, a->text + a->text_bytes, "Code", out, 64)) out[0] = 0;
    for (char *p = out; *p; p++) /* it goes to a terminal */
        if (*p < ' ' || *p > '~') *p = '?';
}

static bool is(const char *code, const char *names) { /* "A B C" has code as a word? */
    size_t n = strlen(code);
    for (const char *p = names; n && (p = strstr(p, code)); p += n)
        if ((p == names || p[-1] == ' ') && (p[n] == ' ' || !p[n])) return true;
    return false;
}

bool s3_passes(const struct http_answer *a) {
    char code[64];
    s3_code(a, code);
    return is(code, "RequestTimeout ConditionalRequestConflict OperationAborted SlowDown InternalError "
                    "ServiceUnavailable RequestTimeTooLong");
}

static int no_key(const struct s3_config *c, const char *what, struct err *err) {
    return err_set(err, ERR_REFUSED,
                   "%.70s: %.40s is not public, and there is no key here: AWS_ACCESS_KEY_ID and "
                   "AWS_SECRET_ACCESS_KEY, INTELLECT_S3_KEY_FILE or ~/.aws/credentials", what, c->bucket);
}

static int forbidden(const struct s3_config *c, const struct http_answer *a, const char *code,
                     const char *what,
                     struct err *err) {
    if (is(code, "SignatureDoesNotMatch"))
        return err_set(err, ERR_REFUSED,
                       "%.90s: wrong secret key: it is not that of access key %.24s (from %.60s)",
                       what, c->key, c->source);
    if (is(code, "InvalidAccessKeyId"))
        return err_set(err, ERR_REFUSED, "%.80s: access key %.24s (from %.50s) is not known at %.50s", what,
                       c->key,
                       c->source, c->endpoint);
    if (is(code, "ExpiredToken InvalidToken TokenRefreshRequired"))
        return err_set(err, ERR_REFUSED, "%.80s: the session token (from %.50s) is not valid any more (%s)",
                       what,
                       c->source, code);
    if (is(code, "RequestTimeTooSkewed RequestExpired")) {
        int64_t off = a->date_s < 0 ? 0 : (int64_t)time(NULL) - a->date_s;
        return err_set(err, ERR_CONFIG,
                       "%.80s: the clock of this machine is %" PRId64 " s %s that of the store: set it "
                       "right (NTP); signatures hold for 15 minutes", what, off < 0 ? -off : off,
                       off < 0 ? "behind" : "ahead of");
    }
    if (!*c->key) return no_key(c, what, err);
    return err_set(err, ERR_REFUSED, "%.90s: access key %.24s (from %.50s) has no right to do that (%s)",
                   what, c->key,
                   c->source, *code ? code : "403");
}

static bool other_region(const struct http_answer *a, const char *code) {
    return a->status == 301 || a->status == 307 ||
           is(code, "PermanentRedirect AuthorizationHeaderMalformed IncorrectEndpoint "
                    "IllegalLocationConstraintException");
}

int s3_refusal(const struct s3_config *c, const struct http_answer *a, const char *verb, const char *name,
               struct err *err) {
    char code[64], what[128], region[64] = "";
    s3_code(a, code);
    snprintf(what, sizeof what, "%s s3://%.63s%s%.48s", verb, c->bucket, *name ? "/" : "", name);
    if (a->status == 507 ||
        is(code, "QuotaExceeded XMinioStorageFull InsufficientCapacity InsufficientStorage"))
        return err_set(err, ERR_FULL, "%s: the store is full, or its quota used up (%s)", what,
                       *code ? code : "507");
    if (is(code, "NoSuchBucket"))
        return err_set(err, ERR_CONFIG, "there is no bucket %.63s at %.100s", c->bucket, c->endpoint);
    if (other_region(a, code)) {
        if (!s3_xml_text(a->text, a->text + a->text_bytes, "Region", region, sizeof region))
            snprintf(region, sizeof region, "%.63s", a->region);
        return err_set(err, ERR_CONFIG,
                       "%.80s: the bucket is in region %.40s, not in %.40s: set AWS_REGION, or "
                       "?region= in the URL", what, *region ? region : "(unknown)", c->region);
    }
    if (a->status == 401 || a->status == 403 || is(code, "ExpiredToken InvalidToken TokenRefreshRequired"))
        return forbidden(c, a, code, what, err); /* some say 400 to an old token */
    if (a->status == 404) return err_set(err, ERR_NOT_FOUND, "%s: not there", what);
    if (a->status == 412) return err_set(err, ERR_STALE, "%s: somebody else put it first", what);
    if (a->status == 416)
        return err_set(err, ERR_TRUNCATED, "%s: ends before the range that was asked for", what);
    if (is(code, "XAmzContentSHA256Mismatch BadDigest InvalidDigest"))
        return err_set(err, ERR_CORRUPT, "%s: the bytes changed on their way to the store (%s)", what, code);
    if (http_status_passes(a->status) || s3_passes(a))
        return err_set(err, ERR_TIMEOUT, "%s: the store answers %ld %s (tried %u times)", what, a->status,
                       code,
                       a->tries);
    if (a->status == 501)
        return err_set(err, ERR_UNSUPPORTED, "%s: the store cannot do that (%s)", what, code);
    return err_set(err, ERR_IO, "%s: the store at %.60s answers %ld %s", what, c->endpoint, a->status, code);
}
