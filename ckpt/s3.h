/* s3.h - what the files of the S3 store share; tests may use it. s3_config.c and s3_text.c are pure
 * but for the environment and files they read; store_s3.c speaks to the server; s3_upload.c sends
 * objects in parts. */
#ifndef INTELLECT_CKPT_S3_H
#define INTELLECT_CKPT_S3_H

#include <pthread.h>

#include "ckpt/http.h"
#include "ckpt/internal.h"

/* ---- s3_config.c: where the store is, and who we are ---------------------------------------------- */

struct s3_config {
    char bucket[64], prefix[CKPT_NAME_BYTES_MAX + 1]; /* prefix without '/' at its ends; "" for the bucket */
    char endpoint[257];                               /* "https://host:port" */
    char region[64];
    bool path_style; /* https://host/bucket/key, not https://bucket.host/key */
    bool loopback;
    char query[513]; /* "?endpoint=..." as it stood in the URL; "" */
    char key[129], secret[129], token[2049]; /* key "": anonymous. token "": none */
    char source[257]; /* where the key is from, for messages */
};

/* Read s3://BUCKET[/PREFIX][?endpoint=URL&region=NAME&style=path|host] alone.
 *
 * Nothing of this machine is looked at: what the URL does not say stays "". ERR_CONFIG says what is
 * wrong and what is allowed; a URL with a key or a password in it is refused without repeating it. */
int s3_url_parse(const char *url, struct s3_config *out, struct err *err);

/* The same, and then what the URL leaves open:
 *
 *   endpoint  AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, endpoint_url in the configuration file, else AWS
 *   region    AWS_REGION, AWS_DEFAULT_REGION, region in the configuration file, else us-east-1
 *   style     host where the endpoint is AWS and the bucket has no dots, else path
 *   key       the file INTELLECT_S3_KEY_FILE; AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and perhaps
 *             AWS_SESSION_TOKEN; the file AWS_SHARED_CREDENTIALS_FILE (~/.aws/credentials); else none
 *
 * Files are those of AWS' tools: AWS_CONFIG_FILE (~/.aws/config), profile AWS_PROFILE or default. A
 * key file has the same lines, aws_access_key_id = ... and so on, and needs no [section].
 * ERR_CONFIG: half a key, a file that was named and does not read, a profile that is not there. */
int s3_config_load(const char *url, struct s3_config *out, struct err *err);

/* The value of `key` in [section] of an INI text; before any section too where `section` is "default".
 * False: not there, or longer than `size`. */
bool s3_ini_value(const char *text, const char *section, const char *key, char *out, size_t size);

/* ---- s3_text.c: what servers write ------------------------------------------------------------------ */

/* The next <tag>...</tag> in [from, end). Returns the position after it, or NULL. */
const char *s3_xml_next(const char *from, const char *end, const char *tag, const char **content,
                        size_t *bytes);
/* The text of the first <tag> in [from, end), entities decoded. False: none, or too long. */
bool s3_xml_text(const char *from, const char *end, const char *tag, char *out, size_t size);
/* "2026-11-28T16:00:00.000Z" in seconds since 1970; -1 for anything else. */
int64_t s3_time(const char *text);

/* An answer that is no success, as an error that says what to do.
 *
 * verb, name  what was tried ("GET") with which object; name may be "".
 * ERR_NOT_FOUND (no such object), ERR_STALE (a condition did not hold), ERR_FULL (quota, disk),
 * ERR_TRUNCATED (the object ends before the range), ERR_CONFIG (no such bucket, another region, a
 * clock that is wrong), ERR_REFUSED (key, secret or rights; msg says which), ERR_TIMEOUT (it passes,
 * and did not in all tries), ERR_UNSUPPORTED (501), ERR_IO (anything else). */
int s3_refusal(const struct s3_config *c, const struct http_answer *a, const char *verb, const char *name,
               struct err *err);
/* <Code> of an error, or "". */
void s3_code(const struct http_answer *a, char out[64]);
/* Answers that pass although their status does not say so: RequestTimeout, conflicts of two writers. */
bool s3_passes(const struct http_answer *a);

/* ---- s3_sign.c: URLs ---------------------------------------------------------------------------------- */

#define S3_KEY_BYTES_MAX (2 * CKPT_NAME_BYTES_MAX + 1)
#define S3_URL_BYTES_MAX 4096

/* "prefix/name". */
void s3_key(const struct s3_config *c, const char *name, char out[S3_KEY_BYTES_MAX + 1]);
/* Of an object (name NULL: of the bucket), with a query (may be NULL). */
void s3_url(const struct s3_config *c, const char *name, const char *query, char out[S3_URL_BYTES_MAX]);

/* What somebody without a key may do once. */
struct s3_presign {
    enum http_method method; /* HTTP_PUT or HTTP_GET */
    const char *name;
    const char *query;       /* as in struct s3_call */
    const uint8_t *sha256;   /* 32 bytes, of the body of `bytes` bytes: no other will be taken. NULL: any */
    uint64_t bytes, offset;  /* HTTP_GET: the range; bytes 0: no range is asked for */
    uint32_t expires_s;
};
/* Sign such a URL, by AWS signature 4 in the query. Whoever uses it sends what is bound by it as headers:
 * x-amz-content-sha256 with a body that has one, Range as "bytes=FIRST-LAST". ERR_REFUSED: there is no key;
 * ERR_CONFIG: the URL does not fit. */
int s3_presign(const struct s3_config *c, const struct s3_presign *p, int64_t now_s, char *out, size_t size,
               struct err *err);

/* ---- store_s3.c ------------------------------------------------------------------------------------- */

#define S3_UPLOAD_ID_MAX 1023
#define S3_MEMORY_BYTES (CKPT_BACKLOG_BYTES + (32u << 20)) /* for parts: a backlog, and some that fill */

struct s3_sender; /* s3_upload.c: the threads that send parts */

struct s3_store {
    struct ckpt_store base;
    struct s3_config config;
    struct http_limits limits;
    struct http_client *http;
    struct http_auth auth;
    atomic_bool bucket_seen; /* so a 404 is about the object */
    atomic_bool bare_etag;   /* If-Match wants the ETag without its quotes (Ceph) */
    pthread_mutex_t mutex;
    uint32_t memory_parts;    /* so many parts to be sent may lie in memory, of all uploads */
    uint32_t uploads;         /* under the mutex: how many there are, and while there are some: */
    struct s3_sender *sender;
};

struct s3_call {
    enum http_method method;
    const char *name;       /* an object's, or NULL: the bucket */
    const char *query;      /* sorted, escaped, each with '=': "partNumber=1&uploadId=..."; or NULL */
    const char *header;     /* one more: "If-None-Match: *"; or NULL */
    const void *body;
    size_t body_bytes;
    int (*body_read)(void *arg, uint64_t at, void *out, size_t n, struct err *err); /* as in http_request */
    void *body_arg;
    bool at_once;           /* likewise */
    const uint8_t *sha256;  /* of a body that is read; NULL: it is not signed, see s3_is_sheltered */
    void *out;
    size_t out_bytes;
    uint64_t offset;
    uint32_t tries, stall_s;
    const atomic_bool *cancel;
};
/* Is the way to the server one that nobody listens to or changes: TLS, or within this machine? */
bool s3_is_sheltered(const struct s3_store *s);
/* Sign and perform; see http_perform(). The answer may have any status. */
int s3_call(struct s3_store *s, const struct s3_call *c, struct http_answer *a, struct err *err);
/* The same, and every status but 2xx is an error by s3_refusal. */
int s3_call_ok(struct s3_store *s, const struct s3_call *c, struct http_answer *a, struct err *err);
/* The ops->put of the store, which small uploads use too. */
int s3_put(struct ckpt_store *s, const char *name, const void *bytes, size_t n, const char *version,
           struct err *err);
int s3_stat(struct ckpt_store *s, const char *name, struct ckpt_object *out, struct err *err);

/* ---- s3_upload.c ------------------------------------------------------------------------------------ */

struct ckpt_upload *s3_upload_begin(struct ckpt_store *s, const char *name, uint64_t bytes, struct err *err);
int s3_upload_put(struct ckpt_upload *u, uint64_t offset, const void *bytes, size_t n, struct err *err);
int s3_upload_sync(struct ckpt_upload *u, struct err *err);
uint64_t s3_upload_behind(struct ckpt_upload *u);
int s3_upload_complete(struct ckpt_upload *u, struct err *err);
uint32_t s3_upload_share(struct ckpt_upload *u);
bool s3_upload_whole(struct ckpt_upload *u, uint32_t part);
int s3_upload_offer(struct ckpt_upload *u, uint32_t part, struct ckpt_part *out, struct err *err);
int s3_upload_send(struct ckpt_upload *u, uint32_t part, struct err *err);
bool s3_upload_sent(struct ckpt_upload *u, uint32_t part);
int s3_upload_check(struct ckpt_upload *u, uint32_t part, struct ckpt_part *out, struct err *err);
int s3_upload_read(struct ckpt_upload *u, uint64_t offset, void *out, size_t n, struct err *err);
int s3_upload_release(struct ckpt_upload *u, struct err *err);
void s3_upload_destroy(struct ckpt_upload *u);

/* Bytes of a part so that an object of `bytes` has at most 10,000. */
uint64_t s3_part_bytes(uint64_t bytes, uint32_t part_mib);

#endif
