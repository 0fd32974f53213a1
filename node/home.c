/* home.c - identity, settings and lock of a node's folder; see home.h. */
#include "node/home.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "node/disk.h"

#define RUN_NAME "run.json"
#define RUN_FORMAT 1

int home_default(char out[HOME_PATH_BYTES], struct err *err) {
    const char *own = getenv("INTELLECT_HOME"), *user = getenv("HOME");
    int n;
    if (own && *own)
        n = snprintf(out, HOME_PATH_BYTES, "%s", own);
    else if (user && *user)
        n = snprintf(out, HOME_PATH_BYTES, "%s/.local/share/intellect", user);
    else
        return err_set(err, ERR_CONFIG,
                       "no home folder: set HOME or INTELLECT_HOME, or give --home");
    if (n >= HOME_PATH_BYTES)
        return err_set(err, ERR_CONFIG, "home folder: the path has more than %d bytes",
                       HOME_PATH_BYTES - 1);
    return 0;
}

void home_file(const struct home *h, const char *name, char out[HOME_FILE_BYTES]) {
    int n = snprintf(out, HOME_FILE_BYTES, "%s/%s", h->path, name);
    assert(n > 0 && n < HOME_FILE_BYTES);
}

/* ---- opening --------------------------------------------------------------------------------- */

/* mkdir -p; only the last folder is ours, so only it gets mode 0700. */
static int make_folders(const char *path, struct err *err) {
    char p[HOME_PATH_BYTES];
    snprintf(p, sizeof p, "%s", path);
    for (char *slash = strchr(p + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        if (mkdir(p, 0755) && errno != EEXIST) return err_set_errno(err, "%s", p);
        *slash = '/';
    }
    if (mkdir(p, 0700) && errno != EEXIST) return err_set_errno(err, "%s", p);
    struct stat st;
    if (stat(p, &st)) return err_set_errno(err, "%s", p);
    if (!S_ISDIR(st.st_mode)) return err_set(err, ERR_CONFIG, "%s is not a folder", p);
    return 0;
}

/* The lock goes with the process, however that ends; the number in the file is for people. */
static int take_lock(struct home *h, struct err *err) {
    char path[HOME_FILE_BYTES], text[32] = "";
    home_file(h, "lock", path);
    h->lock_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (h->lock_fd < 0) return err_set_errno(err, "%s", path);
    if (flock(h->lock_fd, LOCK_EX | LOCK_NB)) {
        if (errno != EWOULDBLOCK) return err_set_errno(err, "%s", path);
        ssize_t n = pread(h->lock_fd, text, sizeof text - 1, 0);
        text[n > 0 ? strcspn(text, "\n") : 0] = 0;
        return err_set(err, ERR_REFUSED,
                       "%s is in use by a running node (process %s): stop it, or give another --home",
                       h->path, *text ? text : "unknown");
    }
    int n = snprintf(text, sizeof text, "%ld\n", (long)getpid());
    if (ftruncate(h->lock_fd, 0) || pwrite(h->lock_fd, text, (size_t)n, 0) != n)
        return err_set_errno(err, "%s", path);
    return 0;
}

static int take_identity(struct home *h, struct err *err) {
    char path[HOME_FILE_BYTES];
    struct err why = {0};
    home_file(h, "identity.key", path);
    if (!identity_load(&h->identity, path, &why)) return 0;
    if (why.code != ERR_NOT_FOUND) {
        if (err) *err = why;
        return -1;
    }
    identity_create(&h->identity);
    h->identity_new = true;
    return identity_save(&h->identity, path, err);
}

int home_open(struct home *h, const char *path, struct err *err) {
    memset(h, 0, sizeof *h);
    h->lock_fd = -1;
    size_t length = strlen(path);
    while (length > 1 && path[length - 1] == '/') length--;
    if (length == 0 || length >= sizeof h->path)
        return err_set(err, ERR_CONFIG, "--home: a path of 1 to %d bytes", HOME_PATH_BYTES - 1);
    memcpy(h->path, path, length);
    if (!make_folders(h->path, err) && !take_lock(h, err) && !take_identity(h, err)) return 0;
    home_release(h);
    return -1;
}

void home_release(struct home *h) {
    if (!h->path[0]) return;
    if (h->lock_fd >= 0) close(h->lock_fd);
    identity_release(&h->identity);
    memset(h, 0, sizeof *h);
    h->lock_fd = -1;
}

/* ---- run.json -------------------------------------------------------------------------------- */

static char *hex_of(const uint8_t *bytes, size_t n) {
    char *out = malloc(2 * n + 1);
    if (!out) return NULL;
    for (size_t i = 0; i < n; i++) snprintf(out + 2 * i, 3, "%02x", bytes[i]);
    out[2 * n] = 0;
    return out;
}

static int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    return -1;
}

/* Returns malloc()ed bytes, or NULL where text is not hexadecimal. */
static uint8_t *hex_bytes(const char *text, uint32_t *length) {
    size_t n = strlen(text) / 2;
    if (strlen(text) % 2 || n == 0 || n > PROTO_BLOB_BYTES_MAX) return NULL;
    uint8_t *out = malloc(n);
    for (size_t i = 0; out && i < n; i++) {
        int high = hex_digit(text[2 * i]), low = hex_digit(text[2 * i + 1]);
        if (high < 0 || low < 0) {
            free(out);
            return NULL;
        }
        out[i] = (uint8_t)(high << 4 | low);
    }
    *length = (uint32_t)n;
    return out;
}

int home_run_save(const struct home *h, const struct home_run *run, struct err *err) {
    char hex[DIGEST_HEX_BYTES];
    digest_hex(&run->run, hex);
    char *genesis = run->genesis ? hex_of(run->genesis, run->genesis_bytes) : NULL;
    json_t *root = json_pack("{si ss si ss si sb ss ss ss*}", "format", RUN_FORMAT, "host",
                             run->host, "port", (int)run->port, "run", hex, "member",
                             (int)run->member, "aggregate_only", (int)run->aggregate_only, "name",
                             run->name, "corpus", run->corpus, "genesis", genesis);
    char *text = root ? json_dumps(root, JSON_INDENT(2)) : NULL;
    free(genesis);
    json_decref(root);
    if (!text) return err_set(err, ERR_MEMORY, "%s/" RUN_NAME ": no memory", h->path);
    struct disk folder;
    int rc = disk_open(h->path, &folder, err);
    if (!rc) rc = folder.put(folder.arg, RUN_NAME, text, strlen(text), err);
    disk_close(&folder);
    free(text);
    return rc;
}

static int take_string(const json_t *root, const char *key, char *out, size_t size,
                       struct err *err) {
    const char *s = json_string_value(json_object_get(root, key));
    if (!s || strlen(s) >= size)
        return err_set(err, ERR_CORRUPT, "key \"%s\": a text of at most %zu bytes", key, size - 1);
    memcpy(out, s, strlen(s) + 1);
    return 0;
}

static int take_number(const json_t *root, const char *key, json_int_t max, json_int_t *out,
                       struct err *err) {
    const json_t *v = json_object_get(root, key);
    *out = json_integer_value(v);
    if (!json_is_integer(v) || *out < 0 || *out > max)
        return err_set(err, ERR_CORRUPT, "key \"%s\": a number from 0 to %lld", key,
                       (long long)max);
    return 0;
}

static int take_genesis(const json_t *root, struct home_run *out, struct err *err) {
    const json_t *v = json_object_get(root, "genesis");
    if (!v) return 0;
    const char *hex = json_string_value(v);
    out->genesis = hex ? hex_bytes(hex, &out->genesis_bytes) : NULL;
    if (!out->genesis) return err_set(err, ERR_CORRUPT, "key \"genesis\": not hexadecimal");
    struct digest d = digest_of(out->genesis, out->genesis_bytes);
    if (!digest_equal(&d, &out->run))
        return err_set(err, ERR_CORRUPT, "key \"genesis\": is not that of the run");
    return 0;
}

static int take_run(const json_t *root, struct home_run *out, struct err *err) {
    char hex[DIGEST_HEX_BYTES];
    json_int_t format, port, member;
    const json_t *aggregate_only = json_object_get(root, "aggregate_only");
    if (take_number(root, "format", INT32_MAX, &format, err)) return -1;
    if (format != RUN_FORMAT)
        return err_set(err, ERR_UNSUPPORTED, "format %lld; this build knows %d", (long long)format,
                       RUN_FORMAT);
    if (take_string(root, "host", out->host, sizeof out->host, err) ||
        take_number(root, "port", 65535, &port, err) ||
        take_string(root, "run", hex, sizeof hex, err) || digest_parse(hex, &out->run, err) ||
        take_number(root, "member", UINT32_MAX, &member, err) ||
        take_string(root, "name", out->name, sizeof out->name, err) ||
        take_string(root, "corpus", out->corpus, sizeof out->corpus, err))
        return -1;
    if (!json_is_boolean(aggregate_only))
        return err_set(err, ERR_CORRUPT, "key \"aggregate_only\": true or false");
    out->port = (uint16_t)port;
    out->member = (uint32_t)member;
    out->aggregate_only = json_is_true(aggregate_only);
    return take_genesis(root, out, err);
}

int home_run_load(const struct home *h, struct home_run *out, struct err *err) {
    memset(out, 0, sizeof *out);
    struct disk folder;
    uint8_t *text = NULL;
    size_t length = 0;
    if (disk_open(h->path, &folder, err)) return -1;
    int rc = folder.get(folder.arg, RUN_NAME, &text, &length, err);
    disk_close(&folder);
    if (rc) return -1;
    json_error_t why;
    json_t *root = json_loadb((const char *)text, length, JSON_REJECT_DUPLICATES, &why);
    free(text);
    if (!root)
        rc = err_set(err, ERR_CORRUPT, "%s/" RUN_NAME ", line %d: %s", h->path, why.line, why.text);
    else if ((rc = take_run(root, out, err)))
        err_prefix(err, "%s/" RUN_NAME, h->path);
    json_decref(root);
    if (rc) home_run_release(out);
    return rc;
}

void home_run_release(struct home_run *run) {
    free(run->genesis);
    memset(run, 0, sizeof *run);
}
