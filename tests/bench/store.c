/* store.c - an object store behind a network, beside `curl` with four parallel transfers of as many bytes.
 * tests/s3/bench.sh starts a server and sets BENCH_STORE=s3://BUCKET/PREFIX?endpoint=URL (style: path). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ckpt/s3.h"
#include "tests/bench/bench.h"

#define STREAMS 4
#define PART ((size_t)8 << 20) /* ours is by default */
#define PARTS (OBJECT_BYTES / PART)
#define OBJECT_BYTES ((size_t)256 << 20) /* a bucket gives the space of what was replaced back hours later */
#define PIECE ((size_t)2 << 20)
#define BUDGET_S 12.0

struct storing {
    struct ckpt_store *store; /* of a bucket */
    uint8_t *bytes;
    uint32_t seed;
    char folder[300];
    struct series curl_cpu; /* of its uploads; the shell's is in it */
    double writing_s;       /* into the files that curl sends */
};

const char *bench_store(void) {
    const char *url = getenv("BENCH_STORE");
    return url && *url ? url : NULL;
}

void bench_store_below(const char *name, char *out, size_t size) {
    const char *url = bench_store(), *query = strchr(url, '?');
    int path = query ? (int)(query - url) : (int)strlen(url);
    snprintf(out, size, "%.*s/%s%s", path, url, name, query ? query : "");
}

/* ---- ours ------------------------------------------------------------------------------------ */

static int reset_upload(void *arg, struct err *err) {
    struct storing *s = arg;
    for (size_t i = 0; i < OBJECT_BYTES; i += 4096) s->bytes[i]++;
    return s->store->ops->remove(s->store, "object", err);
}

/* As whoever writes a checkpoint: no more than a backlog is put and not sent. */
static int run_upload(void *arg, struct err *err) {
    struct storing *s = arg;
    const struct ckpt_store_ops *ops = s->store->ops;
    struct ckpt_upload *u = ops->upload_begin(s->store, "object", OBJECT_BYTES, err);
    int r = u ? ops->upload_sync(u, err) : -1; /* from here on parts are sent as they come */
    for (size_t at = 0; !r && at < OBJECT_BYTES; at += PIECE) {
        while (ops->upload_behind(u) >= CKPT_BACKLOG_BYTES) pause_s(0.001);
        r = ops->upload_put(u, at, s->bytes + at, PIECE, err);
    }
    if (!r) r = ops->upload_complete(u, err);
    ops->upload_destroy(u);
    return r;
}

static int take_block(void *arg, uint64_t offset, const void *data, size_t n, struct err *err) {
    const struct storing *s = arg;
    if (!memcmp(s->bytes + offset, data, n < 4096 ? n : 4096)) return 0;
    return err_set(err, ERR_CORRUPT, "the object is another one at %llu", (unsigned long long)offset);
}

static int run_download(void *arg, struct err *err) {
    struct storing *s = arg;
    return object_stream(s->store, "object", 0, OBJECT_BYTES, take_block, s, err);
}

/* ---- curl ------------------------------------------------------------------------------------ */

/* The store's endpoint with bucket and prefix, from BENCH_STORE. */
static int curl_base(char *out, size_t size, struct err *err) {
    const char *url = bench_store(), *query = strchr(url, '?');
    const char *endpoint = query ? strstr(query, "endpoint=") : NULL;
    if (strncmp(url, "s3://", 5) || !endpoint)
        return err_set(err, ERR_CONFIG, "BENCH_STORE=%.100s: s3://BUCKET/PREFIX?endpoint=URL is needed", url);
    endpoint += strlen("endpoint=");
    snprintf(out, size, "%.*s/%.*s", (int)strcspn(endpoint, "&"), endpoint, (int)(query - url - 5), url + 5);
    return 0;
}

static void write_order(FILE *f, const char *url, const char *file) {
    fprintf(f, "%surl = \"%s\"\naws-sigv4 = \"aws:amz:us-east-1:s3\"\nuser = \"%s:%s\"\nnoproxy = \"*\"\n"
               "header = \"x-amz-content-sha256: UNSIGNED-PAYLOAD\"\noutput = \"/dev/null\"\n",
            ftell(f) ? "next\n" : "", url, getenv("AWS_ACCESS_KEY_ID"), getenv("AWS_SECRET_ACCESS_KEY"));
    if (*file) fprintf(f, "upload-file = \"%s\"\n", file);
}

/* What curl is to do, in a file, since a key does not belong on a command line: four objects up or down, or
 * with the id of an upload, its parts. */
static int write_orders(const struct storing *s, const char *what, const char *id, struct err *err) {
    char base[600], path[400], url[3000], file[400];
    if (!getenv("AWS_ACCESS_KEY_ID") || !getenv("AWS_SECRET_ACCESS_KEY"))
        return err_set(err, ERR_CONFIG, "no AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY");
    if (curl_base(base, sizeof base, err)) return -1;
    snprintf(path, sizeof path, "%s/%s", s->folder, what);
    FILE *f = fopen(path, "w");
    if (!f) return err_set_errno(err, "%s", path);
    fchmod(fileno(f), 0600);
    for (size_t i = 0; i < (id ? PARTS : STREAMS); i++) {
        if (id) snprintf(url, sizeof url, "%s/store/parts?partNumber=%zu&uploadId=%s", base, i + 1, id);
        else snprintf(url, sizeof url, "%s/curl-%zu", base, i);
        snprintf(file, sizeof file, "%s/%s-%zu", s->folder, id ? "part" : "quarter", i);
        write_order(f, url, !strcmp(what, "down") ? "" : file);
    }
    return fclose(f) ? err_set_errno(err, "%s", path) : 0;
}

static double children_cpu_s(void) {
    struct rusage u;
    getrusage(RUSAGE_CHILDREN, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + 1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

/* Uploads at low priority, as ours are sent: on a machine with other work that decides more than all else. */
static int run_curl(struct storing *s, const char *orders, struct err *err) {
    char command[600];
    bool up = strcmp(orders, "down") != 0;
    double before = children_cpu_s();
    snprintf(command, sizeof command, "%scurl -f --fail-early --no-progress-meter -Z --parallel-immediate "
                                      "--parallel-max %d -K '%s/%s'",
             up ? "nice -n 10 " : "", STREAMS, s->folder, orders);
    if (system(command)) return err_set(err, ERR_IO, "%s failed", command);
    if (up) series_add(&s->curl_cpu, children_cpu_s() - before);
    return 0;
}

static int run_curl_upload(void *arg, struct err *err) { return run_curl(arg, "up", err); }
static int run_curl_download(void *arg, struct err *err) { return run_curl(arg, "down", err); }

/* Tell the store that all parts are there, as it names them. */
static int complete_parts(struct s3_store *s, const char *id, struct err *err) {
    char query[3 * S3_UPLOAD_ID_MAX + 16], number[16], etag[96], xml[160 * PARTS + 128], code[64];
    int n = snprintf(xml, sizeof xml, "<CompleteMultipartUpload>");
    struct http_answer a;
    const char *item;
    size_t bytes;
    snprintf(query, sizeof query, "uploadId=%s", id);
    if (s3_call_ok(s, &(struct s3_call){.method = HTTP_GET, .name = "parts", .query = query}, &a, err)) return -1;
    for (const char *p = a.text; (p = s3_xml_next(p, a.text + a.text_bytes, "Part", &item, &bytes));)
        if (s3_xml_text(item, item + bytes, "PartNumber", number, sizeof number) &&
            s3_xml_text(item, item + bytes, "ETag", etag, sizeof etag))
            n += snprintf(xml + n, sizeof xml - (size_t)n, "<Part><PartNumber>%s</PartNumber><ETag>%s</ETag></Part>",
                          number, etag);
    http_answer_release(&a);
    n += snprintf(xml + n, sizeof xml - (size_t)n, "</CompleteMultipartUpload>");
    struct s3_call c = {.method = HTTP_POST, .name = "parts", .query = query, .body = xml, .body_bytes = (size_t)n};
    if (s3_call_ok(s, &c, &a, err)) return -1;
    s3_code(&a, code);
    http_answer_release(&a);
    return *code ? err_set(err, ERR_IO, "complete: %s", code) : 0;
}

static int write_files(const struct storing *s, const char *name, size_t each, struct err *err) {
    char path[400];
    for (size_t i = 0; i < OBJECT_BYTES / each; i++) {
        snprintf(path, sizeof path, "%s/%s-%zu", s->folder, name, i);
        FILE *f = fopen(path, "w");
        if (!f || fwrite(s->bytes + i * each, each, 1, f) != 1 || fclose(f)) return err_set_errno(err, "%s", path);
    }
    return 0;
}

/* ---- in turns -------------------------------------------------------------------------------- */

/* What is sent is in memory; curl wants files. */
static int reset_curl_parts(void *arg, struct err *err) {
    struct storing *s = arg;
    double begin = now_s();
    int r = write_files(s, "part", PART, err);
    s->writing_s = now_s() - begin;
    return r;
}

/* What we do, done by curl: the parts of one object, four at a time. */
static int run_curl_parts(void *arg, struct err *err) {
    struct storing *s = arg;
    struct s3_store *store = (struct s3_store *)s->store;
    char id[S3_UPLOAD_ID_MAX + 1];
    struct http_answer a;
    struct s3_call begin = {.method = HTTP_POST, .name = "parts", .query = "uploads="};
    if (s3_call_ok(store, &begin, &a, err)) return -1;
    bool named = s3_xml_text(a.text, a.text + a.text_bytes, "UploadId", id, sizeof id);
    http_answer_release(&a);
    if (!named) return err_set(err, ERR_IO, "the store begins an upload and does not name it");
    return write_orders(s, "parts", id, err) || run_curl(s, "parts", err) || complete_parts(store, id, err) ? -1 : 0;
}

static int measure(struct bench *b, struct storing *s, struct err *err) {
    struct series t[3], cpu[3];
    static const char *const curl = "curl, four parallel transfers";
    static const char *const nice_curl = "nice -n 10 curl, four whole objects at a time";
    static const char *const parts_curl = "nice -n 10 curl, the same parts, four at a time";
    struct task up[] = {{run_upload, s, reset_upload}, {run_curl_upload, s, NULL}, {run_curl_parts, s, reset_curl_parts}};
    struct task down[] = {{run_download, s, NULL}, {run_curl_download, s, NULL}};
    double megabytes = (double)OBJECT_BYTES / MB;
    if (write_files(s, "quarter", OBJECT_BYTES / STREAMS, err) ||
        write_orders(s, "up", NULL, err) || write_orders(s, "down", NULL, err))
        return -1;
    if (time_both(up, t, cpu, 3, BUDGET_S, err)) return -1;
    row_rate(b, "store: upload of 268 MB", "MB/s", megabytes, &t[0], nice_curl, megabytes, &t[1]);
    row_note(b, "medians %.0f and %.0f MB/s; %.2f and %.2f s of processor time", megabytes / middle(&t[0]),
             megabytes / middle(&t[1]), middle(&cpu[0]), middle(&s->curl_cpu));
    row_rate(b, "    the same", "MB/s", megabytes, &t[0], parts_curl, megabytes, &t[2]);
    row_note(b, "its median %.0f MB/s; files there already: to write them from memory, as we do, takes %.2f s more",
             megabytes / middle(&t[2]), s->writing_s);
    if (time_in_turns(down, t, 2, BUDGET_S, err)) return -1;
    row_rate(b, "store: download of 268 MB", "MB/s", megabytes, &t[0], curl, megabytes, &t[1]);
    row_note(b, "medians %.0f and %.0f MB/s", megabytes / middle(&t[0]), megabytes / middle(&t[1]));
    return 0;
}

int bench_storing(struct bench *b, int unused, struct err *err) {
    struct storing s = {0};
    char url[600];
    (void)unused;
    if (!bench_store()) return 0;
    bench_store_below("store", url, sizeof url);
    if (!(s.store = ckpt_store_open(url, true, err))) return -1;
    s.bytes = take_memory(OBJECT_BYTES);
    uint64_t x = 88172645463325252u;
    for (size_t i = 0; i < OBJECT_BYTES; i += 8) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        memcpy(s.bytes + i, &x, 8);
    }
    snprintf(s.folder, sizeof s.folder, "%s/store", b->folder);
    if (mkdir(s.folder, 0700)) return err_set_errno(err, "%s", s.folder);
    int r = measure(b, &s, err);
    remove_folder(s.folder);
    s.store->ops->close(s.store);
    free(s.bytes);
    return r;
}
