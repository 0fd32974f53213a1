/* http.c - HTTP requests that are tried until they get through; see http.h. Each try is a blocking
 * libcurl transfer on a handle from a pool, so that connections are used again. */
#include "ckpt/http.h"

#include <assert.h>
#include <curl/curl.h>
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/random.h>
#include <time.h>

#define CONNECT_TIMEOUT_S 15
#define IDLE_MAX 64
#define REDIRECTS_MAX 5

/* ---- settings -------------------------------------------------------------------------------------- */

static int number(const char *name, uint64_t low, uint64_t high, uint64_t fallback, uint64_t *out,
                  struct err *err) {
    const char *text = getenv(name);
    char *end;
    *out = fallback;
    if (!text || !*text) return 0;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    *out = value;
    if (*text >= '0' && *text <= '9' && !*end && !errno && value >= low && value <= high) return 0;
    return err_set(err, ERR_CONFIG, "%s is '%.40s'; allowed are whole numbers from %" PRIu64 " to %" PRIu64,
                   name, text, low, high);
}

int http_limits_load(struct http_limits *out, struct err *err) {
    uint64_t tries, stall, streams, part, up, down;
    if (number("INTELLECT_STORE_TRIES", 1, 100, 10, &tries, err) ||
        number("INTELLECT_STORE_STALL_S", 1, 3600, 30, &stall, err) ||
        number("INTELLECT_STORE_STREAMS", 1, 64, 4, &streams, err) ||
        number("INTELLECT_STORE_PART_MIB", 5, 1024, 8, &part, err) ||
        number("INTELLECT_STORE_UP_MBIT", 1, 1000000, 0, &up, err) ||
        number("INTELLECT_STORE_DOWN_MBIT", 1, 1000000, 0, &down, err))
        return -1;
    *out = (struct http_limits){.tries = (uint32_t)tries, .stall_s = (uint32_t)stall,
                                .streams = (uint32_t)streams, .part_mib = (uint32_t)part,
                                .up_bytes_s = up * 125000, .down_bytes_s = down * 125000};
    return 0;
}

/* ---- decisions ------------------------------------------------------------------------------------- */

bool http_status_passes(long status) {
    return status == 408 || status == 429 || status == 500 || (status >= 502 && status <= 504);
}

bool http_failure_passes(int curl_code) {
    switch (curl_code) {
    case CURLE_COULDNT_RESOLVE_HOST: case CURLE_COULDNT_RESOLVE_PROXY: case CURLE_COULDNT_CONNECT:
    case CURLE_OPERATION_TIMEDOUT: case CURLE_PARTIAL_FILE: case CURLE_GOT_NOTHING:
    case CURLE_SEND_ERROR: case CURLE_RECV_ERROR: case CURLE_SSL_CONNECT_ERROR: case CURLE_WEIRD_SERVER_REPLY:
    case CURLE_HTTP2: case CURLE_HTTP2_STREAM: case CURLE_SEND_FAIL_REWIND: return true;
    default: return false;
    }
}

uint64_t http_pause_ms(uint32_t try, uint64_t retry_after_s, uint32_t random) {
    uint64_t most = HTTP_PAUSE_MS;
    for (uint32_t i = 1; i < try && most < HTTP_PAUSE_MS_MAX; i++) most *= 2;
    if (most > HTTP_PAUSE_MS_MAX) most = HTTP_PAUSE_MS_MAX;
    uint64_t pause = most / 2 + random % (most / 2 + 1);
    uint64_t asked = retry_after_s < HTTP_RETRY_AFTER_S_MAX ? retry_after_s : HTTP_RETRY_AFTER_S_MAX;
    return asked * 1000 > pause ? asked * 1000 + random % 1000 : pause;
}

int http_escape(const char *text, char *out, size_t size) {
    size_t n = 0;
    for (const unsigned char *p = (const unsigned char *)text; *p; p++) {
        bool plain = (*p >= 'a' && *p <= 'z') || (*p >= 'A' && *p <= 'Z') || (*p >= '0' && *p <= '9') ||
                     *p == '-' || *p == '.' || *p == '_' || *p == '~';
        if (n + (plain ? 1 : 3) >= size) return -1;
        if (plain) out[n++] = (char)*p;
        else n += (size_t)snprintf(out + n, size - n, "%%%02X", *p);
    }
    if (n >= size) return -1;
    out[n] = 0;
    return 0;
}

bool http_loopback(const char *host) {
    static const char *const names[] = {"localhost", "[::1]"};
    size_t n = strcspn(host, "/?#"), digits = strspn(host, "0123456789.");
    if (memchr(host, '@', n)) return false; /* "127.0.0.1@elsewhere" */
    if (!strncmp(host, "127.", 4)) return digits == n || host[digits] == ':';
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        size_t k = strlen(names[i]);
        if (!strncasecmp(host, names[i], k) && (k == n || host[k] == ':')) return true;
    }
    return false;
}

/* ---- client ---------------------------------------------------------------------------------------- */

/* Bytes leave at a rate, over all streams: each piece waits until those before it have had their time. */
struct pace {
    uint64_t bytes_s; /* 0: no limit */
    uint64_t next_us; /* under the client's mutex */
};

struct http_client {
    struct http_limits limits;
    bool loopback;
    atomic_bool cancelled;
    pthread_mutex_t mutex;
    CURL *idle[IDLE_MAX];
    uint32_t idle_count;
    struct pace up, down;
};

static pthread_once_t once = PTHREAD_ONCE_INIT;
static CURLcode initialised;
static void initialise(void) { initialised = curl_global_init(CURL_GLOBAL_DEFAULT); }

struct http_client *http_client_create(const struct http_limits *limits, bool loopback, struct err *err) {
    struct http_client *c = calloc(1, sizeof *c);
    pthread_once(&once, initialise);
    if (initialised) err_set(err, ERR_UNSUPPORTED, "libcurl: %s", curl_easy_strerror(initialised));
    else if (!c) err_set(err, ERR_MEMORY, "out of memory for an HTTP client");
    else {
        c->limits = *limits;
        c->loopback = loopback;
        c->up.bytes_s = limits->up_bytes_s;
        c->down.bytes_s = limits->down_bytes_s;
        pthread_mutex_init(&c->mutex, NULL);
        return c;
    }
    free(c);
    return NULL;
}

void http_client_destroy(struct http_client *c) {
    if (!c) return;
    for (uint32_t i = 0; i < c->idle_count; i++) curl_easy_cleanup(c->idle[i]);
    pthread_mutex_destroy(&c->mutex);
    free(c);
}

void http_client_cancel(struct http_client *c) { atomic_store(&c->cancelled, true); }
bool http_client_cancelled(const struct http_client *c) { return atomic_load(&c->cancelled); }

static CURL *take_handle(struct http_client *c) {
    pthread_mutex_lock(&c->mutex);
    CURL *h = c->idle_count ? c->idle[--c->idle_count] : NULL;
    pthread_mutex_unlock(&c->mutex);
    return h ? h : curl_easy_init();
}

static void give_handle(struct http_client *c, CURL *h) {
    curl_easy_reset(h); /* keeps its connections */
    pthread_mutex_lock(&c->mutex);
    bool room = c->idle_count < IDLE_MAX;
    if (room) c->idle[c->idle_count++] = h;
    pthread_mutex_unlock(&c->mutex);
    if (!room) curl_easy_cleanup(h);
}

static bool cancelled(const struct http_client *c, const struct http_request *r) {
    return http_client_cancelled(c) || (r->cancel && atomic_load(r->cancel));
}

static uint64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

/* In steps, so that a cancelled request does not sleep on. */
static void sleep_us(const struct http_client *c, const struct http_request *r, uint64_t us) {
    const uint64_t step = 50000;
    for (uint64_t end = now_us() + us, now; !cancelled(c, r) && (now = now_us()) < end;) {
        uint64_t left = end - now < step ? end - now : step;
        nanosleep(&(struct timespec){.tv_nsec = (long)left * 1000}, NULL);
    }
}

static void keep_pace(struct http_client *c, const struct http_request *r, struct pace *p, size_t n) {
    if (!p->bytes_s || n == 0) return;
    uint64_t now = now_us();
    pthread_mutex_lock(&c->mutex);
    uint64_t mine = p->next_us > now ? p->next_us : now;
    p->next_us = mine + (uint64_t)n * 1000000 / p->bytes_s;
    pthread_mutex_unlock(&c->mutex);
    if (mine > now) sleep_us(c, r, mine - now);
}

/* ---- one try --------------------------------------------------------------------------------------- */

struct transfer {
    struct http_client *client;
    const struct http_request *request;
    struct http_answer *answer;
    CURL *handle;
    size_t sent;
    bool complete; /* the head of the answer: libcurl takes one that was cut off for a short one */
    bool enough;  /* all of `out` is there, and the server, which knows no ranges, goes on */
    bool too_much;
    struct err unread; /* code ERR_NONE: the body could be read */
    char why[CURL_ERROR_SIZE];
};

static void clear_answer(struct http_answer *a) {
    a->status = 0;
    a->text_bytes = a->data_bytes = 0;
    if (a->text) a->text[0] = 0;
    a->etag[0] = a->region[0] = 0;
    a->length = a->total = UINT64_MAX;
    a->modified_s = a->date_s = -1;
    a->retry_after_s = 0;
}

void http_answer_release(struct http_answer *a) {
    free(a->text);
    *a = (struct http_answer){0};
}

/* The value of header `name` if the line is that one. */
static const char *value_of(const char *line, const char *name) {
    size_t n = strlen(name);
    if (strncasecmp(line, name, n) != 0 || line[n] != ':') return NULL;
    for (line += n + 1; *line == ' ' || *line == '\t';) line++;
    return line;
}

static uint64_t number_of(const char *text) {
    char *end;
    errno = 0;
    unsigned long long v = strtoull(text, &end, 10);
    return *text >= '0' && *text <= '9' && !errno ? v : UINT64_MAX;
}

static size_t take_header(char *bytes, size_t size, size_t count, void *arg) {
    struct transfer *t = arg;
    struct http_answer *a = t->answer;
    char line[512];
    const char *v, *slash;
    size_t n = size * count, kept = n < sizeof line - 1 ? n : sizeof line - 1;
    memcpy(line, bytes, kept);
    while (kept > 0 && (line[kept - 1] == '\r' || line[kept - 1] == '\n' || line[kept - 1] == ' ')) kept--;
    line[kept] = 0;
    t->complete = kept == 0;
    if (!strncmp(line, "HTTP/", 5)) clear_answer(a); /* "100 Continue" and redirections come before the last one */
    else if ((v = value_of(line, "ETag"))) snprintf(a->etag, sizeof a->etag, "%s", v);
    else if ((v = value_of(line, "Content-Length"))) a->length = number_of(v);
    else if ((v = value_of(line, "Content-Range")) && (slash = strchr(v, '/')))
        a->total = number_of(slash + 1);
    else if ((v = value_of(line, "Last-Modified"))) a->modified_s = curl_getdate(v, NULL);
    else if ((v = value_of(line, "Date"))) a->date_s = curl_getdate(v, NULL);
    else if ((v = value_of(line, "x-amz-bucket-region"))) snprintf(a->region, sizeof a->region, "%s", v);
    else if ((v = value_of(line, "Retry-After")))
        a->retry_after_s = number_of(v) == UINT64_MAX ? 0 : number_of(v);
    return n;
}

static bool keep_text(struct http_answer *a, const char *bytes, size_t n) {
    if (a->text_bytes + n > HTTP_TEXT_BYTES_MAX) return false;
    if (a->text_bytes + n + 1 > a->text_capacity) {
        size_t capacity = 2 * (a->text_bytes + n) + 1024;
        char *grown = realloc(a->text, capacity);
        if (!grown) return false;
        a->text = grown;
        a->text_capacity = capacity;
    }
    memcpy(a->text + a->text_bytes, bytes, n);
    a->text[a->text_bytes += n] = 0;
    return true;
}

/* Data goes to `out`, everything else is text. A server that ignores the range sends the object from
 * its beginning: enough where that is what was asked for. */
static size_t take_body(char *bytes, size_t size, size_t count, void *arg) {
    struct transfer *t = arg;
    struct http_answer *a = t->answer;
    size_t n = size * count, left = t->request->out_bytes - a->data_bytes;
    long status = 0;
    curl_easy_getinfo(t->handle, CURLINFO_RESPONSE_CODE, &status);
    if (!t->request->out || (status != 200 && status != 206))
        return keep_text(a, bytes, n) ? n : CURL_WRITEFUNC_ERROR;
    t->enough = status == 200 && t->request->offset == 0 && n >= left;
    t->too_much = !t->enough && (n > left || (status == 200 && t->request->offset > 0));
    if (t->too_much) return CURL_WRITEFUNC_ERROR;
    size_t kept = n < left ? n : left;
    memcpy((uint8_t *)t->request->out + a->data_bytes, bytes, kept);
    a->data_bytes += kept;
    keep_pace(t->client, t->request, &t->client->down, kept);
    return kept < n ? CURL_WRITEFUNC_ERROR : n;
}

static size_t give_body(char *to, size_t size, size_t count, void *arg) {
    struct transfer *t = arg;
    size_t left = t->request->body_bytes - t->sent, n = size * count < left ? size * count : left;
    const struct http_request *r = t->request;
    keep_pace(t->client, r, &t->client->up, n);
    if (n && !r->body_read) memcpy(to, (const uint8_t *)r->body + t->sent, n);
    if (n && r->body_read && r->body_read(r->body_arg, t->sent, to, n, &t->unread)) return CURL_READFUNC_ABORT;
    t->sent += n;
    return n;
}

static int rewind_body(void *arg, curl_off_t offset, int origin) {
    struct transfer *t = arg;
    if (origin != SEEK_SET || offset < 0 || (size_t)offset > t->request->body_bytes)
        return CURL_SEEKFUNC_FAIL;
    t->sent = (size_t)offset;
    return CURL_SEEKFUNC_OK;
}

static int look_for_cancel(void *arg, curl_off_t a, curl_off_t b, curl_off_t c, curl_off_t d) {
    struct transfer *t = arg;
    (void)a, (void)b, (void)c, (void)d;
    return cancelled(t->client, t->request);
}

/* The first failure of many calls, so that each need not be asked by itself. */
#define SET(...)                                                                                     \
    do {                                                                                             \
        if (rc == CURLE_OK) rc = curl_easy_setopt(h, __VA_ARGS__);                                   \
    } while (0)

static CURLcode set_method(CURL *h, const struct transfer *t) {
    const struct http_request *r = t->request;
    CURLcode rc = CURLE_OK;
    char range[64];
    if (r->method == HTTP_HEAD) SET(CURLOPT_NOBODY, 1L);
    if (r->method == HTTP_DELETE) SET(CURLOPT_CUSTOMREQUEST, "DELETE");
    if (r->method == HTTP_POST) {
        SET(CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)r->body_bytes);
        SET(CURLOPT_POSTFIELDS, r->body_bytes ? r->body : "");
    }
    if (r->method == HTTP_PUT) {
        SET(CURLOPT_UPLOAD, 1L);
        SET(CURLOPT_INFILESIZE_LARGE, (curl_off_t)r->body_bytes);
        SET(CURLOPT_READFUNCTION, give_body);
        SET(CURLOPT_READDATA, t);
        SET(CURLOPT_SEEKFUNCTION, rewind_body);
        SET(CURLOPT_SEEKDATA, t);
        if (r->at_once && !t->answer->tries) SET(CURLOPT_EXPECT_100_TIMEOUT_MS, 0L);
    }
    if (r->method == HTTP_GET && r->out) {
        snprintf(range, sizeof range, "%" PRIu64 "-%" PRIu64, r->offset, r->offset + r->out_bytes - 1);
        SET(CURLOPT_RANGE, range);
    }
    return rc;
}

static CURLcode set_auth(CURL *h, const struct http_auth *auth) {
    CURLcode rc = CURLE_OK;
    char provider[128];
    if (!auth) return rc;
    snprintf(provider, sizeof provider, "aws:amz:%s:s3", auth->region);
    SET(CURLOPT_AWS_SIGV4, provider);
    SET(CURLOPT_USERNAME, auth->key);
    SET(CURLOPT_PASSWORD, auth->secret);
    return rc;
}

static CURLcode set_all(CURL *h, struct transfer *t, struct curl_slist *headers) {
    const struct http_request *r = t->request;
    const char *ca = getenv("AWS_CA_BUNDLE"); /* a store of one's own often has an authority of its own */
    CURLcode rc = CURLE_OK;
    SET(CURLOPT_URL, r->url);
    SET(CURLOPT_PROTOCOLS_STR, "http,https");
    SET(CURLOPT_REDIR_PROTOCOLS_STR, "https");
    SET(CURLOPT_FOLLOWLOCATION, r->follow ? 1L : 0L);
    SET(CURLOPT_MAXREDIRS, (long)REDIRECTS_MAX);
    /* As we, or who signed the URL, wrote it. libcurl 8 refuses that for what it signs itself; those are names of
     * objects, in which ckpt_name_valid() lets no dots be a folder. */
    SET(CURLOPT_PATH_AS_IS, r->auth ? 0L : 1L);
    SET(CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_1_1); /* streams are connections of their own */
    SET(CURLOPT_NOSIGNAL, 1L);
    SET(CURLOPT_ERRORBUFFER, t->why);
    SET(CURLOPT_CONNECTTIMEOUT, (long)CONNECT_TIMEOUT_S);
    SET(CURLOPT_LOW_SPEED_LIMIT, (long)HTTP_STALL_BYTES);
    SET(CURLOPT_LOW_SPEED_TIME, (long)(r->stall_s ? r->stall_s : t->client->limits.stall_s));
    SET(CURLOPT_HTTPHEADER, headers);
    SET(CURLOPT_HEADERFUNCTION, take_header);
    SET(CURLOPT_HEADERDATA, t);
    SET(CURLOPT_WRITEFUNCTION, take_body);
    SET(CURLOPT_WRITEDATA, t);
    SET(CURLOPT_NOPROGRESS, 0L);
    SET(CURLOPT_XFERINFOFUNCTION, look_for_cancel);
    SET(CURLOPT_XFERINFODATA, t);
    SET(CURLOPT_UPLOAD_BUFFERSIZE, 256L << 10);
    if (t->client->loopback) SET(CURLOPT_NOPROXY, "*");
    if (ca && *ca) SET(CURLOPT_CAINFO, ca);
    /* Refused where a try that found no host left its buffer: that one has this size already. */
    (void)curl_easy_setopt(h, CURLOPT_BUFFERSIZE, 256L << 10);
    if (rc == CURLE_OK) rc = set_method(h, t);
    return rc == CURLE_OK ? set_auth(h, r->auth) : rc;
}

static CURLcode try_once(struct transfer *t) {
    struct curl_slist *headers = NULL;
    CURLcode rc = CURLE_OK;
    t->sent = 0;
    t->complete = t->enough = t->too_much = false;
    t->why[0] = 0;
    clear_answer(t->answer);
    for (uint32_t i = 0; i < t->request->header_count; i++) {
        struct curl_slist *more = curl_slist_append(headers, t->request->header[i]);
        if (!more) rc = CURLE_OUT_OF_MEMORY;
        else headers = more;
    }
    if (rc == CURLE_OK) rc = set_all(t->handle, t, headers);
    if (rc == CURLE_OK) rc = curl_easy_perform(t->handle);
    if (rc == CURLE_WRITE_ERROR && t->enough) rc = CURLE_OK;
    if (rc == CURLE_OK && !t->complete) rc = CURLE_PARTIAL_FILE;
    curl_easy_getinfo(t->handle, CURLINFO_RESPONSE_CODE, &t->answer->status);
    curl_slist_free_all(headers);
    return rc;
}

/* ---- many tries ------------------------------------------------------------------------------------ */

/* A data answer that ends early is a cut connection, unless the object itself ends there. */
static bool cut_short(const struct http_request *r, const struct http_answer *a) {
    if (!r->out || (a->status != 200 && a->status != 206) || a->data_bytes == r->out_bytes) return false;
    uint64_t total = a->status == 206 ? a->total : a->length;
    return total == UINT64_MAX || total > r->offset + a->data_bytes;
}

/* What went wrong for good, as an error. */
static int failed(const struct transfer *t, CURLcode rc, uint32_t tries, struct err *err) {
    const char *why = t->why[0] ? t->why : curl_easy_strerror(rc);
    if (cancelled(t->client, t->request))
        return err_set(err, ERR_REFUSED, "given up: the store is being closed");
    if (t->unread.code) {
        if (err) *err = t->unread;
        return -1;
    }
    if (t->too_much)
        return err_set(err, ERR_CORRUPT,
                       "the server answers with other bytes than the range that was asked for");
    if (rc == CURLE_OUT_OF_MEMORY) return err_set(err, ERR_MEMORY, "libcurl: out of memory");
    if (http_failure_passes((int)rc))
        return err_set(err, ERR_TIMEOUT, "%.120s (tried %u times)", why, tries);
    return err_set(err, ERR_CONFIG, "%.160s", why);
}

/* May the server have carried out a try that ended like this? Not if there was no connection. */
static bool may_have_arrived(CURLcode rc, long status) {
    if (rc == CURLE_OK) return status >= 500;
    return rc != CURLE_COULDNT_CONNECT && rc != CURLE_COULDNT_RESOLVE_HOST && rc != CURLE_COULDNT_RESOLVE_PROXY &&
           rc != CURLE_SSL_CONNECT_ERROR;
}

static uint32_t random_number(void) {
    uint32_t x = 0;
    return getrandom(&x, sizeof x, 0) == (ssize_t)sizeof x ? x : (uint32_t)now_us();
}

int http_perform(struct http_client *c, const struct http_request *r, struct http_answer *a,
                 struct err *err) {
    struct transfer t = {.client = c, .request = r, .answer = a, .handle = take_handle(c)};
    uint32_t tries = r->tries ? r->tries : c->limits.tries;
    *a = (struct http_answer){0};
    assert(r->header_count <= HTTP_HEADERS_MAX);
    if (!t.handle || !keep_text(a, "", 0)) {
        if (t.handle) give_handle(c, t.handle);
        return err_set(err, ERR_MEMORY, "libcurl: out of memory");
    }
    CURLcode rc = CURLE_ABORTED_BY_CALLBACK;
    while (!cancelled(c, r)) {
        rc = try_once(&t);
        a->tries++;
        if (rc == CURLE_OK && cut_short(r, a)) rc = CURLE_PARTIAL_FILE;
        bool passes = rc == CURLE_OK ? http_status_passes(a->status) || (r->again && r->again(a))
                                     : http_failure_passes((int)rc);
        if (!passes || a->tries >= tries) break;
        a->may_repeat = a->may_repeat || may_have_arrived(rc, a->status);
        sleep_us(c, r, http_pause_ms(a->tries, a->retry_after_s, random_number()) * 1000);
    }
    give_handle(c, t.handle);
    if (rc == CURLE_OK && !cancelled(c, r)) return 0;
    failed(&t, rc, a->tries, err);
    http_answer_release(a);
    return -1;
}
