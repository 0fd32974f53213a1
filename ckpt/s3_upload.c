/* s3_upload.c - objects on their way into a bucket. Bytes come in any order, from an event loop that
 * must not wait: they go into memory for so many parts, and what comes beyond, or is shared with others,
 * into a hidden file on the local disk, the spool. Once a part is whole, a thread of the store's sends it and
 * gives its space back. */
#define _GNU_SOURCE /* O_TMPFILE, fallocate, gettid */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <openssl/evp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "ckpt/s3.h"

#define PARTS_MAX 10000
#define SENDER_NICE 10
#define HUGE_PAGE ((size_t)2 << 20)
#define PART_URL_S 3600 /* how long others may send a part; less where the upload is completed */
#define COMPLETE_STALL_S 600 /* a server may think for minutes before it answers */

enum part_state { PART_FILLING, PART_FULL, PART_QUEUED, PART_SENDING, PART_SENT, PART_RELEASED };

struct part {
    enum part_state state;
    uint64_t filled;
    uint8_t *memory;    /* its bytes, one of the sender's buffers; NULL: they are in the spool */
    bool digested;      /* of a shared upload: */
    uint8_t sha256[32];
    char etag[96];
};

struct s3_upload {
    struct s3_store *store;
    struct s3_sender *sender;
    struct s3_upload *next; /* of the sender's uploads */
    char name[CKPT_NAME_BYTES_MAX + 1];
    uint64_t bytes, part_bytes;
    uint32_t part_count;
    int spool;
    atomic_bool cancelled;
    /* Under the sender's mutex: */
    struct part *part;
    bool begun; /* parts may be sent: from the first sync on */
    bool shared; /* others send them; the spool keeps all bytes until it is released */
    uint32_t busy, unreleased; /* parts queued or in a thread's hands; sent, and still in the spool */
    uint64_t behind; /* bytes of whole parts that we are to send and have not */
    char id[S3_UPLOAD_ID_MAX + 1];
    bool starting; /* a thread asks for the id */
    struct err failure; /* code ERR_NONE: none */
    bool done;
};

struct s3_sender {
    struct s3_store *store;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    struct s3_upload *uploads; /* that have parts to send, among others */
    pthread_t *thread;
    uint32_t thread_count;
    uint8_t **spare; /* buffers for parts that nobody uses now; a stack: what was used last is in caches */
    uint32_t spare_count, buffers; /* buffers: all there are */
    bool takes; /* the store has taken a part, so the next one is sent at once */
    bool end;
};

uint64_t s3_part_bytes(uint64_t bytes, uint32_t part_mib) {
    const uint64_t mib = 1 << 20;
    uint64_t least = (bytes + PARTS_MAX - 1) / PARTS_MAX;
    return least > part_mib * mib ? (least + mib - 1) / mib * mib : part_mib * mib;
}

/* An object that fits one part is put as a whole: one request, and under a condition. */
static bool is_small(const struct s3_upload *u) { return u->part_count <= 1; }

static uint64_t bytes_of(const struct s3_upload *u, uint32_t part) {
    uint64_t first = part * u->part_bytes;
    return u->bytes - first < u->part_bytes ? u->bytes - first : u->part_bytes;
}

/* ---- requests --------------------------------------------------------------------------------------- */

static int begin_multipart(struct s3_upload *u, char id[S3_UPLOAD_ID_MAX + 1], struct err *err) {
    struct s3_call c = {.method = HTTP_POST, .name = u->name, .query = "uploads=", .cancel = &u->cancelled};
    struct http_answer a;
    if (s3_call_ok(u->store, &c, &a, err)) return -1;
    bool found = s3_xml_text(a.text, a.text + a.text_bytes, "UploadId", id, S3_UPLOAD_ID_MAX + 1) && *id;
    http_answer_release(&a);
    return found ? 0 : err_set(err, ERR_IO, "%.120s/%.64s: the store begins an upload and does not name it",
                               u->store->base.url, u->name);
}

static int query_of(const struct s3_upload *u, const char *before, char *out, size_t size, struct err *err) {
    int n = snprintf(out, size, "%suploadId=", before);
    if (!http_escape(u->id, out + n, size - (size_t)n)) return 0;
    return err_set(err, ERR_IO, "%.120s/%.64s: the upload's name is too long", u->store->base.url, u->name);
}

static int read_spool(const struct s3_upload *u, uint64_t at, uint8_t *out, size_t n, struct err *err) {
    for (size_t done = 0; done < n;) {
        ssize_t got = pread(u->spool, out + done, n - done, (off_t)(at + done));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return err_set_errno(err, "%.64s: read the spool file", u->name);
        if (got == 0) return err_set(err, ERR_TRUNCATED, "%.64s: the spool file is short", u->name);
        done += (size_t)got;
    }
    return 0;
}

/* Bytes [at, at + n) of part i. */
static int read_part(const struct s3_upload *u, uint32_t i, uint64_t at, uint8_t *out, size_t n,
                     struct err *err) {
    if (!u->part[i].memory) return read_spool(u, i * u->part_bytes + at, out, n, err);
    memcpy(out, u->part[i].memory + at, n);
    return 0;
}

/* Of part i, which nobody else is at. */
static int digest_part(struct s3_upload *u, uint32_t i, struct err *err) {
    if (u->part[i].digested) return 0;
    uint8_t *block = malloc(CKPT_BLOCK_BYTES);
    EVP_MD_CTX *sha = EVP_MD_CTX_new();
    int r = block && sha && EVP_DigestInit_ex(sha, EVP_sha256(), NULL) == 1
                ? 0 : err_set(err, ERR_MEMORY, "%.64s: no SHA-256", u->name);
    for (uint64_t at = 0, bytes = bytes_of(u, i), n; !r && at < bytes; at += n) {
        n = bytes - at < CKPT_BLOCK_BYTES ? bytes - at : CKPT_BLOCK_BYTES;
        r = read_part(u, i, at, block, (size_t)n, err);
        if (!r && EVP_DigestUpdate(sha, block, (size_t)n) != 1) r = err_set(err, ERR_IO, "%.64s: SHA-256", u->name);
    }
    if (!r) u->part[i].digested = EVP_DigestFinal_ex(sha, u->part[i].sha256, NULL) == 1;
    EVP_MD_CTX_free(sha);
    free(block);
    return r;
}

struct part_body {
    const struct s3_upload *upload;
    uint32_t part;
};

static int read_body(void *arg, uint64_t at, void *out, size_t n, struct err *err) {
    const struct part_body *b = arg;
    return read_part(b->upload, b->part, at, out, n, err);
}

/* From where it lies into libcurl's buffer and on. A part that failed is read again. */
static int send_part(struct s3_upload *u, uint32_t i, bool at_once, char etag[96], struct err *err) {
    char before[32], query[3 * S3_UPLOAD_ID_MAX + 64];
    uint64_t n = bytes_of(u, i);
    bool sheltered = s3_is_sheltered(u->store);
    struct part_body body = {u, i};
    struct s3_call c = {.method = HTTP_PUT, .name = u->name, .query = query, .body_bytes = (size_t)n,
                        .body_read = read_body, .body_arg = &body, .at_once = at_once,
                        .sha256 = sheltered ? NULL : u->part[i].sha256, .cancel = &u->cancelled};
    struct http_answer a;
    snprintf(before, sizeof before, "partNumber=%u&", i + 1);
    if (query_of(u, before, query, sizeof query, err) || (!sheltered && digest_part(u, i, err)) ||
        s3_call_ok(u->store, &c, &a, err))
        return -1;
    snprintf(etag, 96, "%s", a.etag);
    http_answer_release(&a);
    if (!*etag) return err_set(err, ERR_IO, "%.120s/%.64s: part %u: no ETag", u->store->base.url, u->name,
                               i + 1);
    return 0;
}

static bool is_there(struct s3_upload *u) {
    struct ckpt_object o;
    return !s3_stat(&u->store->base, u->name, &o, NULL) && o.bytes == u->bytes;
}

static char *complete_body(const struct s3_upload *u) {
    size_t size = 160u * u->part_count + 128, n = 0;
    char *xml = malloc(size);
    if (!xml) return NULL;
    n += (size_t)snprintf(xml + n, size - n, "<CompleteMultipartUpload>");
    for (uint32_t i = 0; i < u->part_count; i++)
        n += (size_t)snprintf(xml + n, size - n, "<Part><PartNumber>%u</PartNumber><ETag>%s</ETag></Part>",
                              i + 1,
                              u->part[i].etag);
    snprintf(xml + n, size - n, "</CompleteMultipartUpload>");
    return xml;
}

/* Servers may say 200 and put an error into the body, minutes later. And where an answer was lost, the
 * next try finds the upload gone and the object there. */
static int complete_multipart(struct s3_upload *u, struct err *err) {
    char query[3 * S3_UPLOAD_ID_MAX + 64], code[64];
    struct ckpt_object o;
    struct err e = {0};
    struct http_answer a;
    if (!s3_stat(&u->store->base, u->name, &o, &e))
        return err_set(err, ERR_STALE, "%.120s/%.64s: somebody else put it first", u->store->base.url,
                       u->name);
    if (e.code != ERR_NOT_FOUND) {
        if (err) *err = e;
        return -1;
    }
    char *body = complete_body(u);
    struct s3_call c = {.method = HTTP_POST, .name = u->name, .query = query, .header = "If-None-Match: *",
                        .body = body,
                        .body_bytes = body ? strlen(body) : 0, .stall_s = COMPLETE_STALL_S, .cancel = &u->cancelled};
    int r = !body ? err_set(err, ERR_MEMORY, "%.64s: out of memory", u->name)
                  : query_of(u, "", query, sizeof query, err) || s3_call(u->store, &c, &a, err) ? -1 : 0;
    free(body);
    if (r) return -1;
    s3_code(&a, code);
    bool good = a.status / 100 == 2 && !*code;
    bool perhaps = a.may_repeat && (a.status == 404 || a.status == 412 || a.status >= 500);
    struct err refused = {0};
    if (!good) {
        if (a.status / 100 == 2) a.status = 500; /* of an error in the body */
        s3_refusal(&u->store->config, &a, "POST", u->name, &refused);
    }
    http_answer_release(&a);
    if (good || (perhaps && is_there(u))) return 0;
    if (err) *err = refused;
    return -1;
}

static void abort_multipart(struct s3_upload *u) {
    char query[3 * S3_UPLOAD_ID_MAX + 64];
    struct s3_call c = {.method = HTTP_DELETE, .name = u->name, .query = query, .tries = 2};
    struct http_answer a;
    if (!*u->id || u->done || query_of(u, "", query, sizeof query, NULL)) return;
    if (!s3_call(u->store, &c, &a, NULL)) http_answer_release(&a);
}

/* ---- what is to be sent ------------------------------------------------------------------------------- */

static struct s3_upload *next_job(struct s3_sender *p, uint32_t *part) {
    for (struct s3_upload *u = p->uploads; u; u = u->next) {
        if (!u->busy || u->starting || u->failure.code) continue;
        for (uint32_t i = 0; i < u->part_count; i++)
            if (u->part[i].state == PART_QUEUED) {
                *part = i;
                return u;
            }
    }
    return NULL;
}

/* What is queued will not be sent any more. */
static void give_up(struct s3_upload *u, const struct err *why) {
    if (!u->failure.code) u->failure = *why;
    for (uint32_t i = 0; i < u->part_count; i++)
        if (u->part[i].state == PART_QUEUED) {
            u->part[i].state = PART_FULL;
            u->busy--;
        }
}

/* With the mutex, which is let go of while the network is waited for. The first who needs the upload's id
 * asks for it. */
static int need_id(struct s3_sender *p, struct s3_upload *u, struct err *err) {
    char id[S3_UPLOAD_ID_MAX + 1];
    while (u->starting) pthread_cond_wait(&p->changed, &p->mutex);
    if (*u->id) return 0;
    u->starting = true;
    pthread_mutex_unlock(&p->mutex);
    int r = begin_multipart(u, id, err);
    pthread_mutex_lock(&p->mutex);
    if (!r) memcpy(u->id, id, sizeof id);
    u->starting = false;
    pthread_cond_broadcast(&p->changed);
    return r;
}

/* ---- memory for parts, all of it with the mutex ------------------------------------------------------ */

/* For a part of this upload; NULL: all buffers are in use, or it is to lie in the spool. */
static uint8_t *take_buffer(struct s3_sender *p, const struct s3_upload *u) {
    struct s3_store *s = p->store;
    if (u->shared || u->part_bytes != (uint64_t)s->limits.part_mib << 20) return NULL;
    if (p->spare_count) return p->spare[--p->spare_count];
    size_t bytes = (size_t)(u->part_bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    uint8_t *b = p->buffers < s->memory_parts ? aligned_alloc(HUGE_PAGE, bytes) : NULL;
    if (b) madvise(b, bytes, MADV_HUGEPAGE); /* where there are none it is ordinary memory */
    p->buffers += b != NULL;
    return b;
}

static void give_buffer(struct s3_sender *p, struct part *part) {
    if (part->memory) p->spare[p->spare_count++] = part->memory;
    part->memory = NULL;
}

/* What was sent: memory is free at once, the spool when its own thread comes by. */
static void sent(struct s3_sender *p, struct s3_upload *u, uint32_t i) {
    struct part *part = &u->part[i];
    bool spooled = !part->memory;
    part->state = PART_SENT;
    give_buffer(p, part);
    if (u->shared) return;
    u->behind -= bytes_of(u, i);
    if (spooled) u->unreleased++;
    else part->state = PART_RELEASED;
}

/* ---- the sender's threads --------------------------------------------------------------------------- */

/* With the mutex, which is let go of while the network is waited for. */
static void do_job(struct s3_sender *p, struct s3_upload *u, uint32_t i) {
    struct err e = {0};
    char etag[96] = "";
    u->part[i].state = PART_SENDING;
    int r = need_id(p, u, &e);
    bool at_once = p->takes;
    pthread_mutex_unlock(&p->mutex);
    if (!r) r = send_part(u, i, at_once, etag, &e);
    pthread_mutex_lock(&p->mutex);
    p->takes = !r;
    memcpy(u->part[i].etag, etag, sizeof etag);
    u->busy--;
    if (r) u->part[i].state = PART_FULL;
    else sent(p, u, i);
    if (r) give_up(u, &e);
    pthread_cond_broadcast(&p->changed);
}

static void *sender_main(void *arg) {
    struct s3_sender *p = arg;
    setpriority(PRIO_PROCESS, (id_t)gettid(), SENDER_NICE); /* on Linux: of this thread */
    pthread_mutex_lock(&p->mutex);
    while (!p->end) {
        uint32_t part;
        struct s3_upload *u = next_job(p, &part);
        if (u) do_job(p, u, part);
        else pthread_cond_wait(&p->changed, &p->mutex);
    }
    pthread_mutex_unlock(&p->mutex);
    return NULL;
}

/* Waits for its threads. */
static void sender_destroy(struct s3_sender *p) {
    pthread_mutex_lock(&p->mutex);
    p->end = true;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->mutex);
    for (uint32_t i = 0; i < p->thread_count; i++) pthread_join(p->thread[i], NULL);
    assert(!p->uploads && p->spare_count == p->buffers);
    pthread_mutex_destroy(&p->mutex);
    pthread_cond_destroy(&p->changed);
    while (p->spare_count) free(p->spare[--p->spare_count]);
    free(p->spare);
    free(p->thread);
    free(p);
}

static struct s3_sender *sender_create(struct s3_store *s) {
    struct s3_sender *p = calloc(1, sizeof *p);
    sigset_t all, before; /* signals are the caller's business */
    if (!p) return NULL;
    p->store = s;
    p->thread = calloc(s->limits.streams, sizeof *p->thread);
    p->spare = calloc(s->memory_parts + 1u, sizeof *p->spare);
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->changed, NULL);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (p->thread && p->spare && p->thread_count < s->limits.streams &&
           !pthread_create(&p->thread[p->thread_count], NULL, sender_main, p))
        p->thread_count++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (p->thread_count) return p;
    sender_destroy(p);
    return NULL;
}

/* The store's sender is there from the first upload to the last: who ends that one waits for the network
 * anyway, and nobody else waits for its threads, or for its memory to be freed. */
static struct s3_sender *hold_sender(struct s3_store *s, struct err *err) {
    pthread_mutex_lock(&s->mutex);
    if (!s->sender) s->sender = sender_create(s);
    struct s3_sender *p = s->sender;
    s->uploads += p != NULL;
    pthread_mutex_unlock(&s->mutex);
    if (!p) err_set(err, ERR_MEMORY, "%.120s: no threads to send with", s->base.url);
    return p;
}

static void drop_sender(struct s3_store *s) {
    pthread_mutex_lock(&s->mutex);
    struct s3_sender *last = --s->uploads ? NULL : s->sender;
    if (last) s->sender = NULL;
    pthread_mutex_unlock(&s->mutex);
    if (last) sender_destroy(last);
}

/* ---- the interface ---------------------------------------------------------------------------------- */

/* A file without a name; what is in it is gone with the process. */
static int open_spool(struct err *err) {
    const char *given = getenv("INTELLECT_STORE_SPOOL"), *tmp = getenv("TMPDIR");
    const char *dir = given && *given ? given : tmp && *tmp ? tmp : "/var/tmp";
    char path[4096];
    int fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0 && (errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL)) {
        snprintf(path, sizeof path, "%.4000s/intellect-spool-XXXXXX", dir);
        fd = mkostemp(path, O_CLOEXEC);
        if (fd >= 0) unlink(path);
    }
    if (fd < 0) err_set_errno(err, "spool folder %.150s (INTELLECT_STORE_SPOOL)", dir);
    if (fd < 0 && err && err->code == ERR_NOT_FOUND) err->code = ERR_CONFIG; /* it is not the object that is missing */
    return fd;
}

struct ckpt_upload *s3_upload_begin(struct ckpt_store *base, const char *name, uint64_t bytes,
                                    struct err *err) {
    struct s3_store *s = (struct s3_store *)base;
    if (!ckpt_name_valid(name)) {
        err_set(err, ERR_REFUSED, "%.120s: \"%.64s\" cannot be the name of an object", base->url, name);
        return NULL;
    }
    struct s3_upload *u = calloc(1, sizeof *u);
    uint64_t part_bytes = s3_part_bytes(bytes, s->limits.part_mib);
    uint64_t parts = (bytes + part_bytes - 1) / part_bytes;
    if (u) u->part = calloc((size_t)parts + 1, sizeof *u->part);
    if (!u || !u->part) {
        free(u);
        err_set(err, ERR_MEMORY, "%.120s/%.64s: out of memory", base->url, name);
        return NULL;
    }
    u->store = s;
    u->bytes = bytes;
    u->part_bytes = part_bytes;
    u->part_count = (uint32_t)parts;
    snprintf(u->name, sizeof u->name, "%s", name);
    u->spool = open_spool(err);
    u->sender = u->spool < 0 ? NULL : hold_sender(s, err);
    if (!u->sender) {
        if (u->spool >= 0) close(u->spool);
        free(u->part);
        free(u);
        return NULL;
    }
    pthread_mutex_lock(&u->sender->mutex);
    u->next = u->sender->uploads;
    u->sender->uploads = u;
    pthread_mutex_unlock(&u->sender->mutex);
    return (struct ckpt_upload *)u;
}

static int write_spool(struct s3_upload *u, uint64_t offset, const uint8_t *bytes, size_t n,
                       struct err *err) {
    for (size_t done = 0; done < n;) {
        ssize_t put = pwrite(u->spool, bytes + done, n - done, (off_t)(offset + done));
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) return err_set_errno(err, "%.64s: write to the spool folder (INTELLECT_STORE_SPOOL)",
                                          u->name);
        done += (size_t)put;
    }
    return 0;
}

/* True where a thread has something to do now. */
static bool queue(struct s3_upload *u, struct part *p) {
    if (!u->begun || u->shared || is_small(u) || p->state != PART_FULL || u->failure.code) return false;
    p->state = PART_QUEUED;
    u->busy++;
    return true;
}

/* The spool needs the space of a part that is sent no more. One at a time, and in the thread that writes to the
 * file: it would wait for the file's lock otherwise, while a thread of low priority frees the pages. Where the
 * space cannot be given back the file just stays large. */
static void release_one(struct s3_upload *u) {
    struct s3_sender *p = u->sender;
    uint32_t i = 0;
    pthread_mutex_lock(&p->mutex);
    bool any = u->unreleased > 0;
    while (any && u->part[i].state != PART_SENT) i++;
    if (any) u->part[i].state = PART_RELEASED, u->unreleased--;
    pthread_mutex_unlock(&p->mutex);
    int r = any ? fallocate(u->spool, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(i * u->part_bytes),
                            (off_t)bytes_of(u, i)) : 0;
    (void)r;
}

/* What lies in one part of what is put. True in *queued where a thread has something to do now. */
static int put_piece(struct s3_upload *u, uint64_t offset, const uint8_t *bytes, size_t n, bool *queued,
                     struct err *err) {
    struct s3_sender *p = u->sender;
    uint32_t i = (uint32_t)(offset / u->part_bytes);
    struct part *part = &u->part[i];
    pthread_mutex_lock(&p->mutex);
    if (!part->filled) part->memory = take_buffer(p, u);
    pthread_mutex_unlock(&p->mutex);
    if (part->memory) memcpy(part->memory + (offset - i * u->part_bytes), bytes, n);
    else if (write_spool(u, offset, bytes, n, err)) return -1;
    pthread_mutex_lock(&p->mutex);
    part->filled += n;
    assert(part->filled <= bytes_of(u, i)); /* pieces overlap */
    if (part->filled == bytes_of(u, i)) {
        part->state = PART_FULL;
        if (!u->shared && !is_small(u)) u->behind += bytes_of(u, i);
        *queued = queue(u, part) || *queued;
    }
    struct err e = u->failure;
    pthread_mutex_unlock(&p->mutex);
    if (e.code && err) *err = e;
    return e.code ? -1 : 0;
}

int s3_upload_put(struct ckpt_upload *upload, uint64_t offset, const void *bytes, size_t n, struct err *err) {
    struct s3_upload *u = (struct s3_upload *)upload;
    struct s3_sender *p = u->sender;
    assert(offset <= u->bytes && n <= u->bytes - offset);
    release_one(u);
    bool queued = false;
    int r = 0;
    for (uint64_t at = offset, end = offset + n, stop; !r && at < end; at = stop) {
        stop = (at / u->part_bytes + 1) * u->part_bytes;
        if (stop > end) stop = end;
        r = put_piece(u, at, (const uint8_t *)bytes + (at - offset), (size_t)(stop - at), &queued, err);
    }
    if (!queued) return r; /* each piece would wake all threads, to find nothing */
    pthread_mutex_lock(&p->mutex);
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->mutex);
    return r;
}

/* By who waits for the network anyway: to free a gigabyte's pages takes 80 ms of whoever closes the file. */
static int empty_spool(struct s3_upload *u, struct err *err) {
    return ftruncate(u->spool, 0) ? err_set_errno(err, "%.64s: shorten the spool file", u->name) : 0;
}

/* From now on whole parts are sent as they come. */
int s3_upload_sync(struct ckpt_upload *upload, struct err *err) {
    struct s3_upload *u = (struct s3_upload *)upload;
    struct s3_sender *p = u->sender;
    pthread_mutex_lock(&p->mutex);
    u->begun = true;
    for (uint32_t i = 0; i < u->part_count; i++) queue(u, &u->part[i]);
    pthread_cond_broadcast(&p->changed);
    struct err e = u->failure;
    pthread_mutex_unlock(&p->mutex);
    if (e.code && err) *err = e;
    return e.code ? -1 : 0;
}

uint64_t s3_upload_behind(struct ckpt_upload *upload) {
    struct s3_upload *u = (struct s3_upload *)upload;
    struct s3_sender *p = u->sender;
    pthread_mutex_lock(&p->mutex);
    uint64_t behind = u->failure.code ? 0 : u->behind;
    pthread_mutex_unlock(&p->mutex);
    return behind;
}

/* Wait until no part is on its way. */
static int wait_sent(struct s3_upload *u, struct err *err) {
    struct s3_sender *p = u->sender;
    pthread_mutex_lock(&p->mutex);
    while (u->busy) pthread_cond_wait(&p->changed, &p->mutex);
    struct err e = u->failure;
    pthread_mutex_unlock(&p->mutex);
    if (e.code && err) *err = e;
    return e.code ? -1 : 0;
}

static int put_small(struct s3_upload *u, struct err *err) {
    uint8_t *bytes = malloc((size_t)u->bytes + 1);
    if (!bytes) return err_set(err, ERR_MEMORY, "%.64s: out of memory", u->name);
    int r = read_part(u, 0, 0, bytes, (size_t)u->bytes, err) ||
            s3_put(&u->store->base, u->name, bytes, (size_t)u->bytes, CKPT_ABSENT, err) ? -1 : 0;
    free(bytes);
    return r;
}

/* ---- parts that others send --------------------------------------------------------------------------- */

uint32_t s3_upload_share(struct ckpt_upload *upload) {
    struct s3_upload *u = (struct s3_upload *)upload;
    if (is_small(u) || !*u->store->config.key || !s3_is_sheltered(u->store)) return 0;
    u->shared = true;
    return u->part_count;
}

int s3_upload_read(struct ckpt_upload *upload, uint64_t offset, void *out, size_t n, struct err *err) {
    struct s3_upload *u = (struct s3_upload *)upload;
    assert(u->shared && offset <= u->bytes && n <= u->bytes - offset);
    return read_spool(u, offset, out, n, err);
}

/* Who looks at the parts in the store from now on knows them by their digests. */
int s3_upload_release(struct ckpt_upload *upload, struct err *err) {
    struct s3_upload *u = (struct s3_upload *)upload;
    assert(u->shared && u->done);
    for (uint32_t i = 0; i < u->part_count; i++)
        if (digest_part(u, i, err)) return -1;
    return empty_spool(u, err);
}

static int sign_part(struct s3_upload *u, uint32_t i, struct s3_presign *p, struct ckpt_part *out,
                     struct err *err) {
    if (digest_part(u, i, err)) return -1;
    p->name = u->name;
    p->bytes = bytes_of(u, i);
    p->offset = i * u->part_bytes;
    p->expires_s = PART_URL_S;
    out->offset = p->offset;
    out->bytes = p->bytes;
    memcpy(out->sha256, u->part[i].sha256, sizeof out->sha256);
    return s3_presign(&u->store->config, p, time(NULL), out->url, sizeof out->url, err);
}

bool s3_upload_whole(struct ckpt_upload *upload, uint32_t i) {
    struct s3_upload *u = (struct s3_upload *)upload;
    struct s3_sender *p = u->sender;
    pthread_mutex_lock(&p->mutex);
    bool whole = u->part[i].filled == bytes_of(u, i);
    pthread_mutex_unlock(&p->mutex);
    return whole;
}

int s3_upload_offer(struct ckpt_upload *upload, uint32_t i, struct ckpt_part *out, struct err *err) {
    struct s3_upload *u = (struct s3_upload *)upload;
    struct s3_sender *p = u->sender;
    char before[32], query[3 * S3_UPLOAD_ID_MAX + 64];
    struct s3_presign sign = {.method = HTTP_PUT, .query = query, .sha256 = u->part[i].sha256};
    assert(u->shared && i < u->part_count);
    pthread_mutex_lock(&p->mutex);
    int r = need_id(p, u, err);
    pthread_mutex_unlock(&p->mutex);
    snprintf(before, sizeof before, "partNumber=%u&", i + 1);
    return r || query_of(u, before, query, sizeof query, err) || sign_part(u, i, &sign, out, err) ? -1 : 0;
}

int s3_upload_check(struct ckpt_upload *upload, uint32_t i, struct ckpt_part *out, struct err *err) {
    struct s3_upload *u = (struct s3_upload *)upload;
    struct s3_presign sign = {.method = HTTP_GET};
    assert(u->shared && u->done && i < u->part_count);
    return sign_part(u, i, &sign, out, err);
}

int s3_upload_send(struct ckpt_upload *upload, uint32_t i, struct err *err) {
    struct s3_upload *u = (struct s3_upload *)upload;
    struct s3_sender *p = u->sender;
    pthread_mutex_lock(&p->mutex);
    assert(u->shared && u->part[i].filled == bytes_of(u, i));
    struct err e = u->failure;
    if (!e.code && u->part[i].state == PART_FULL) {
        u->part[i].state = PART_QUEUED;
        u->busy++;
        pthread_cond_broadcast(&p->changed);
    }
    pthread_mutex_unlock(&p->mutex);
    if (e.code && err) *err = e;
    return e.code ? -1 : 0;
}

bool s3_upload_sent(struct ckpt_upload *upload, uint32_t i) {
    struct s3_upload *u = (struct s3_upload *)upload;
    struct s3_sender *p = u->sender;
    pthread_mutex_lock(&p->mutex);
    bool sent = u->part[i].state == PART_SENT || u->failure.code;
    pthread_mutex_unlock(&p->mutex);
    return sent;
}

/* One part as the store lists it. What has another size than it must have is sent once more. */
static void take_part(struct s3_upload *u, const char *from, const char *end) {
    char number[16], size[32], etag[96];
    if (!s3_xml_text(from, end, "PartNumber", number, sizeof number) ||
        !s3_xml_text(from, end, "Size", size, sizeof size) ||
        !s3_xml_text(from, end, "ETag", etag, sizeof etag))
        return;
    uint64_t i = strtoull(number, NULL, 10) - 1;
    if (i >= u->part_count || strtoull(size, NULL, 10) != bytes_of(u, (uint32_t)i) || !*etag) return;
    u->part[i].state = PART_SENT;
    memcpy(u->part[i].etag, etag, sizeof etag);
}

/* What is there is what the store says, not who sent it. */
static int list_parts(struct s3_upload *u, struct err *err) {
    char marker[16] = "0", more[8];
    for (bool truncated = true; truncated;) {
        char before[64], query[3 * S3_UPLOAD_ID_MAX + 128];
        struct s3_call c = {.method = HTTP_GET, .name = u->name, .query = query, .cancel = &u->cancelled};
        struct http_answer a;
        snprintf(before, sizeof before, "part-number-marker=%s&", marker);
        if (query_of(u, before, query, sizeof query, err) || s3_call_ok(u->store, &c, &a, err)) return -1;
        const char *end = a.text + a.text_bytes, *item;
        size_t n;
        pthread_mutex_lock(&u->sender->mutex);
        for (const char *p = a.text; (p = s3_xml_next(p, end, "Part", &item, &n));)
            take_part(u, item, item + n);
        pthread_mutex_unlock(&u->sender->mutex);
        unsigned long long last = strtoull(marker, NULL, 10), next = 0;
        truncated = s3_xml_text(a.text, end, "IsTruncated", more, sizeof more) && !strcmp(more, "true");
        if (truncated && s3_xml_text(a.text, end, "NextPartNumberMarker", marker, sizeof marker))
            next = strtoull(marker, NULL, 10);
        http_answer_release(&a);
        if (truncated && next <= last)
            return err_set(err, ERR_IO, "%.120s/%.64s: the store lists some parts and not where it goes on",
                           u->store->base.url, u->name);
    }
    return 0;
}

/* What nobody has sent we send. Where sending has failed before nobody would take what is queued. */
static int send_the_rest(struct s3_upload *u, struct err *err) {
    struct s3_sender *p = u->sender;
    pthread_mutex_lock(&p->mutex);
    int r = need_id(p, u, err);
    if (!r && u->failure.code) {
        if (err) *err = u->failure;
        r = -1;
    }
    pthread_mutex_unlock(&p->mutex);
    if (r || list_parts(u, err)) return -1;
    pthread_mutex_lock(&p->mutex);
    for (uint32_t i = 0; i < u->part_count; i++)
        if (u->part[i].state == PART_FULL && !u->failure.code) {
            u->part[i].state = PART_QUEUED;
            u->busy++;
        }
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->mutex);
    return 0;
}

/* ---- the end ------------------------------------------------------------------------------------------ */

int s3_upload_complete(struct ckpt_upload *upload, struct err *err) {
    struct s3_upload *u = (struct s3_upload *)upload;
    for (uint32_t i = 0; i < u->part_count; i++)
        if (u->part[i].filled != bytes_of(u, i))
            return err_set(err, ERR_TRUNCATED, "%.64s: bytes of part %u are missing", u->name, i + 1);
    if ((u->shared && send_the_rest(u, err)) || s3_upload_sync(upload, err) || wait_sent(u, err) ||
        (is_small(u) ? put_small(u, err) : complete_multipart(u, err)))
        return -1;
    u->done = true;
    return u->shared ? 0 : empty_spool(u, err);
}

void s3_upload_destroy(struct ckpt_upload *upload) {
    struct s3_upload *u = (struct s3_upload *)upload;
    if (!u) return;
    struct s3_sender *p = u->sender;
    struct err closed = {.code = ERR_REFUSED, .msg = "the upload is given up"};
    pthread_mutex_lock(&p->mutex);
    if (!u->done) {
        atomic_store(&u->cancelled, true);
        give_up(u, &closed);
    }
    while (u->busy) pthread_cond_wait(&p->changed, &p->mutex);
    struct s3_upload **at = &p->uploads;
    while (*at != u) at = &(*at)->next;
    *at = u->next;
    for (uint32_t i = 0; i < u->part_count; i++) give_buffer(p, &u->part[i]);
    pthread_mutex_unlock(&p->mutex);
    abort_multipart(u);
    close(u->spool);
    drop_sender(u->store);
    free(u->part);
    free(u);
}
