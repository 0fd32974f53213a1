/* http.h - one HTTP request, carried out until there is an answer worth looking at: retries with
 * growing, random pauses, a stall detector, bandwidth caps, connections that are used again. What
 * the request means, and what a status says about it, is for store_s3.c and store_http.c. */
#ifndef INTELLECT_CKPT_HTTP_H
#define INTELLECT_CKPT_HTTP_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/err.h"

/* ---- settings: of this machine, so from the environment ------------------------------------------ */

struct http_limits {
    uint32_t tries;       /* INTELLECT_STORE_TRIES: 1 to 100, default 10: about two minutes of pauses */
    uint32_t stall_s;     /* INTELLECT_STORE_STALL_S: 1 to 3600, default 30: under HTTP_STALL_BYTES a
                             second for so long, and the request is tried again */
    uint32_t streams;     /* INTELLECT_STORE_STREAMS: 1 to 64 requests at a time, default 4 */
    uint32_t part_mib;    /* INTELLECT_STORE_PART_MIB: 5 to 1024, default 8: the unit of transfer */
    uint64_t up_bytes_s;  /* INTELLECT_STORE_UP_MBIT: 1 to 1000000 Mbit/s, default none (0) */
    uint64_t down_bytes_s; /* INTELLECT_STORE_DOWN_MBIT: likewise; both over all streams of a store */
};
/* ERR_CONFIG names the variable, its value and what is allowed. */
int http_limits_load(struct http_limits *out, struct err *err);

/* ---- decisions, without a network ---------------------------------------------------------------- */

#define HTTP_STALL_BYTES 1024
#define HTTP_PAUSE_MS 500       /* before the second try, at most; doubles from try to try */
#define HTTP_PAUSE_MS_MAX 30000
#define HTTP_RETRY_AFTER_S_MAX 120

/* Is this status worth another try: 408, 429, 500, 502, 503, 504? */
bool http_status_passes(long status);
/* Is this libcurl result: a reset, a stall, a short answer, no connection? A certificate that does
 * not hold or a malformed URL is not. */
bool http_failure_passes(int curl_code);
/* How long to wait before try number `try` (from 1): half fixed, half by `random`, and never less
 * than the server asked for. retry_after_s: 0 when it said nothing. */
uint64_t http_pause_ms(uint32_t try, uint64_t retry_after_s, uint32_t random);

/* The value of a query parameter: "%2F" for everything but A-Z a-z 0-9 - . _ ~. -1: `size` is too small. */
int http_escape(const char *text, char *out, size_t size);
/* Does "host:port/..." begin with a name of this machine: localhost, 127.x.y.z, [::1]? */
bool http_loopback(const char *host);

/* ---- requests -------------------------------------------------------------------------------------- */

#define HTTP_TEXT_BYTES_MAX (4u << 20) /* of an answer that is not data: lists, errors */
#define HTTP_HEADERS_MAX 8

enum http_method { HTTP_GET, HTTP_HEAD, HTTP_PUT, HTTP_POST, HTTP_DELETE };

struct http_auth { /* AWS signature 4 */
    const char *key, *secret, *region;
};

struct http_answer {
    long status;
    char *text; /* what is not data, NUL-terminated; "" if nothing. Free with http_answer_release. */
    size_t text_bytes, text_capacity;
    size_t data_bytes; /* of `out` that were filled */
    char etag[96], region[64]; /* as sent, ETag with its quotes */
    uint64_t length, total; /* Content-Length; the whole object's by Content-Range. UINT64_MAX: not said */
    int64_t modified_s, date_s; /* Last-Modified and Date, -1: not said */
    uint64_t retry_after_s;
    uint32_t tries;   /* how many it took */
    bool may_repeat;  /* an earlier try may have reached the server and been carried out */
};
void http_answer_release(struct http_answer *a);

struct http_request {
    enum http_method method;
    const char *url;
    const char *header[HTTP_HEADERS_MAX]; /* "Name: value" */
    uint32_t header_count;
    const struct http_auth *auth; /* NULL: unsigned */
    const void *body;             /* PUT, POST */
    size_t body_bytes;
    /* PUT, instead of `body`: bytes [at, at + n) of it, each perhaps several times; -1 ends the request with
     * that error. */
    int (*body_read)(void *arg, uint64_t at, void *out, size_t n, struct err *err);
    void *body_arg;
    bool at_once;                 /* PUT: at the first try the server's word that it wants it (100 Continue)
                                   * is not waited for, which is the way there and back each time */
    void *out;                    /* GET: bytes [offset, offset + out_bytes) are asked for */
    size_t out_bytes;
    uint64_t offset;
    uint32_t stall_s;             /* 0: that of the limits. Longer where a server thinks before it answers */
    uint32_t tries;               /* 0: that of the limits */
    const atomic_bool *cancel;    /* may be NULL: ends the request with ERR_REFUSED soon after it is set */
    bool follow;                  /* redirections, to https only */
    bool (*again)(const struct http_answer *a); /* may be NULL: further answers to try again on */
};

struct http_client;

/* loopback: the server is on this machine, so no proxy is asked. NULL: ERR_MEMORY, ERR_UNSUPPORTED. */
struct http_client *http_client_create(const struct http_limits *limits, bool loopback, struct err *err);
void http_client_destroy(struct http_client *c); /* nothing may be running. NULL is fine */

/* End what is running and refuse what comes later. */
void http_client_cancel(struct http_client *c);
bool http_client_cancelled(const struct http_client *c);

/* Returns 0 with an answer, to be released: of any status, also of one that passes if it did not pass
 * in all tries. -1 without one: ERR_TIMEOUT (msg: the last reason, how often it was tried),
 * ERR_REFUSED (cancelled), ERR_CONFIG (a certificate that does not hold, no such URL), ERR_CORRUPT
 * (more bytes than asked for), ERR_MEMORY, what body_read says. Blocks; from any thread. */
int http_perform(struct http_client *c, const struct http_request *r, struct http_answer *a,
                 struct err *err);

#endif
