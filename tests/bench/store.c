/* store.c - an object store behind a network, beside `curl` with four parallel transfers of as many bytes.
 * tests/s3/bench.sh starts a server and sets BENCH_STORE=s3://BUCKET/PREFIX?endpoint=URL (style: path). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ckpt/internal.h"
#include "tests/bench/bench.h"

#define STREAMS 4
#define OBJECT_BYTES ((size_t)256 << 20) /* a bucket gives the space of what was replaced back hours later */
#define PIECE ((size_t)2 << 20)
#define BUDGET_S 20.0

struct storing {
    struct ckpt_store *store;
    uint8_t *bytes;
    uint32_t seed;
    char folder[300];
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

static int run_upload(void *arg, struct err *err) {
    struct storing *s = arg;
    const struct ckpt_store_ops *ops = s->store->ops;
    struct ckpt_upload *u = ops->upload_begin(s->store, "object", OBJECT_BYTES, err);
    int r = u ? ops->upload_sync(u, err) : -1; /* from here on parts are sent as they come */
    for (size_t at = 0; !r && at < OBJECT_BYTES; at += PIECE)
        r = ops->upload_put(u, at, s->bytes + at, PIECE, err);
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

/* What curl is to do, in a file, since a key does not belong on a command line. */
static int write_orders(const struct storing *s, bool up, struct err *err) {
    char base[600], path[400];
    const char *key = getenv("AWS_ACCESS_KEY_ID"), *secret = getenv("AWS_SECRET_ACCESS_KEY");
    if (!key || !secret) return err_set(err, ERR_CONFIG, "no AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY");
    if (curl_base(base, sizeof base, err)) return -1;
    snprintf(path, sizeof path, "%s/%s", s->folder, up ? "up" : "down");
    FILE *f = fopen(path, "w");
    if (!f) return err_set_errno(err, "%s", path);
    fchmod(fileno(f), 0600);
    for (int i = 0; i < STREAMS; i++) {
        fprintf(f, "%surl = \"%s/curl-%d\"\naws-sigv4 = \"aws:amz:us-east-1:s3\"\nuser = \"%s:%s\"\n"
                   "noproxy = \"*\"\nheader = \"x-amz-content-sha256: UNSIGNED-PAYLOAD\"\n",
                i ? "next\n" : "", base, i, key, secret);
        if (up) fprintf(f, "upload-file = \"%s/part-%d\"\n", s->folder, i);
        fprintf(f, "output = \"/dev/null\"\n");
    }
    return fclose(f) ? err_set_errno(err, "%s", path) : 0;
}

/* Uploads at low priority, as ours are sent: on a machine with other work that decides more than all else. */
static int run_curl(const struct storing *s, const char *orders, struct err *err) {
    char command[600];
    snprintf(command, sizeof command, "%scurl -f --fail-early --no-progress-meter -Z --parallel-immediate "
                                      "--parallel-max %d -K '%s/%s'",
             strcmp(orders, "up") ? "" : "nice -n 10 ", STREAMS, s->folder, orders);
    return system(command) ? err_set(err, ERR_IO, "%s failed", command) : 0;
}

static int run_curl_upload(void *arg, struct err *err) { return run_curl(arg, "up", err); }
static int run_curl_download(void *arg, struct err *err) { return run_curl(arg, "down", err); }

static int write_parts(const struct storing *s, struct err *err) {
    char path[400];
    const size_t part = OBJECT_BYTES / STREAMS;
    for (int i = 0; i < STREAMS; i++) {
        snprintf(path, sizeof path, "%s/part-%d", s->folder, i);
        FILE *f = fopen(path, "w");
        if (!f || fwrite(s->bytes + (size_t)i * part, part, 1, f) != 1 || fclose(f))
            return err_set_errno(err, "%s", path);
    }
    return 0;
}

/* ---- in turns -------------------------------------------------------------------------------- */

static int measure(struct bench *b, struct storing *s, struct err *err) {
    struct series t[2], cpu[2];
    static const char *const curl = "curl, four parallel transfers";
    static const char *const nice_curl = "nice -n 10 curl, four transfers";
    struct task up[] = {{run_upload, s, reset_upload}, {run_curl_upload, s, NULL}};
    struct task down[] = {{run_download, s, NULL}, {run_curl_download, s, NULL}};
    double megabytes = (double)OBJECT_BYTES / MB;
    if (write_parts(s, err) || write_orders(s, true, err) || write_orders(s, false, err)) return -1;
    if (time_both(up, t, cpu, 2, BUDGET_S, err)) return -1;
    row_rate(b, "store: upload of 268 MB", "MB/s", megabytes, &t[0], nice_curl, megabytes, &t[1]);
    row_note(b, "medians %.0f and %.0f MB/s; of ours, %.2f s of processor time", megabytes / middle(&t[0]),
             megabytes / middle(&t[1]), middle(&cpu[0]));
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
