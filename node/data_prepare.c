/* data_prepare.c - texts made into a corpus; see data.h.
 *
 * The calling thread reads the texts in blocks and writes what becomes of them, in their order; workers
 * tokenise the blocks between. Where a block ends depends on the texts alone, so the corpus does not depend
 * on how many workers there are. */
#define _GNU_SOURCE /* memrchr */
#include "node/data_internal.h"
#include "node/file.h"
#include "node/source.h"
#include "node/text.h"
#include "node/tokenizer.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define HELDOUT_NAME "heldout.bin"
#define DOCUMENT_BYTES_MAX (256u << 20)
#define THREADS_MAX 256
#define JOBS_PER_THREAD 3 /* one at work, one waiting, one to be written */

enum job_state { JOB_FREE, JOB_READY, JOB_AT_WORK, JOB_DONE };

/* A block on its way: a piece of one document, or some JSON lines. */
struct job {
    enum job_state state; /* under lock */
    struct text_buffer text;
    bool lines, first, last; /* JSON lines; first and last piece of its source */
    const char *path;        /* of the source, and the number of its first line, for errors */
    uint64_t line;
    struct text_buffer packed; /* the tokens */
    uint64_t tokens, documents;
    struct err err;
    int failed;
};

struct prepare {
    const struct data_recipe *recipe;
    const char *folder;
    struct tokenizer *tokenizer;
    int32_t document_end;
    unsigned token_bytes;
    /* reading */
    struct source_list list;
    uint32_t next_source;
    struct source *source;
    struct text_buffer rest; /* of the source: read and not yet in a job */
    bool source_begun, source_ended;
    uint64_t line;
    /* the jobs; number i is in job[i % jobs] */
    struct job *job;
    unsigned jobs, threads;
    pthread_t *thread;
    uint64_t taken; /* by workers; under lock */
    bool stop;      /* under lock */
    pthread_mutex_t lock;
    pthread_cond_t to_do, done;
    /* writing */
    struct token_file *file; /* [DATA_FILES_MAX] */
    uint32_t files;
    int fd; /* of the last of them, or -1 */
    char path[PATH_BYTES_MAX];
    int heldout_fd;
    char heldout_path[PATH_BYTES_MAX];
    uint64_t heldout_tokens;
    struct data_progress progress;
    uint64_t bytes_before; /* of the sources before this one */
};

/* ---- tokenising, in the workers ---------------------------------------------------------------- */

struct worker {
    struct prepare *p;
    struct encoder *encoder;
    struct text_buffer repaired;
};

static int pack(const struct prepare *p, struct job *j, const int32_t *ids, size_t n, struct err *err) {
    if (text_buffer_reserve(&j->packed, j->packed.n + n * p->token_bytes, err)) return -1;
    uint8_t *out = (uint8_t *)j->packed.bytes + j->packed.n;
    for (size_t i = 0; i < n; i++)
        for (unsigned b = 0; b < p->token_bytes; b++) *out++ = (uint8_t)((uint32_t)ids[i] >> 8 * b);
    j->packed.n += n * p->token_bytes;
    j->tokens += n;
    return 0;
}

/* Text that begins a document, ends one, both or neither. */
static int encode(struct worker *w, struct job *j, const char *text, size_t n, bool first, bool last,
                  struct err *err) {
    const int32_t *ids;
    size_t count;
    int32_t end = w->p->document_end;
    if (first && last && !n) return 0;
    if (encoder_encode(w->encoder, text, n, &ids, &count, err) || pack(w->p, j, ids, count, err)) return -1;
    if (last) j->documents++;
    return last && end >= 0 && !(count && ids[count - 1] == end) ? pack(w->p, j, &end, 1, err) : 0;
}

static int encode_line(struct worker *w, struct job *j, const char *line, size_t n, struct err *err) {
    const char *field = w->p->recipe->field ? w->p->recipe->field : "text";
    json_error_t why;
    if (text_valid(line, n) < n) {
        if (text_repair(line, n, &w->repaired, err)) return -1;
        line = w->repaired.bytes;
        n = w->repaired.n;
    }
    json_t *o = json_loadb(line, n, JSON_ALLOW_NUL, &why), *text = json_object_get(o, field);
    int rc = 0;
    if (!o)
        rc = err_set(err, ERR_CORRUPT, "no JSON: %.100s", why.text);
    else if (!json_is_string(text))
        rc = err_set(err, ERR_CORRUPT, "no object with a string \"%.40s\": --field names another", field);
    else
        rc = encode(w, j, json_string_value(text), json_string_length(text), true, true, err);
    json_decref(o);
    return rc;
}

static int encode_lines(struct worker *w, struct job *j, struct err *err) {
    const char *at = j->text.bytes, *end = at + j->text.n;
    for (uint64_t line = j->line; at < end; line++) {
        const char *newline = memchr(at, '\n', (size_t)(end - at));
        size_t n = (size_t)((newline ? newline : end) - at), blank = 0;
        while (blank < n && strchr(" \t\r", at[blank])) blank++;
        if (blank < n && encode_line(w, j, at, n, err)) {
            err_prefix(err, "%.120s, line %llu", j->path, (unsigned long long)line);
            return -1;
        }
        at += newline ? n + 1 : n;
    }
    return 0;
}

static void do_job(struct worker *w, struct job *j) {
    j->packed.n = 0;
    j->tokens = j->documents = 0;
    j->failed = j->lines ? encode_lines(w, j, &j->err)
                         : encode(w, j, j->text.bytes, j->text.n, j->first, j->last, &j->err);
}

static void *work(void *arg) {
    struct worker *w = arg;
    struct prepare *p = w->p;
    pthread_mutex_lock(&p->lock);
    while (!p->stop) {
        struct job *j = &p->job[p->taken % p->jobs];
        if (j->state != JOB_READY) {
            pthread_cond_wait(&p->to_do, &p->lock);
            continue;
        }
        p->taken++;
        j->state = JOB_AT_WORK;
        pthread_mutex_unlock(&p->lock);
        do_job(w, j);
        pthread_mutex_lock(&p->lock);
        j->state = JOB_DONE;
        pthread_cond_signal(&p->done);
    }
    pthread_mutex_unlock(&p->lock);
    encoder_destroy(w->encoder);
    text_buffer_release(&w->repaired);
    free(w);
    return NULL;
}

static int start_worker(struct prepare *p, struct err *err) {
    struct worker *w = calloc(1, sizeof *w);
    if (!w) return err_set(err, ERR_MEMORY, "no memory for a thread");
    w->p = p;
    /* No text can end its document by writing what the end is called. */
    if (!(w->encoder = encoder_create(p->tokenizer, true, err))) {
        free(w);
        return -1;
    }
    if (!pthread_create(&p->thread[p->threads], NULL, work, w)) {
        p->threads++;
        return 0;
    }
    encoder_destroy(w->encoder);
    free(w);
    return err_set(err, ERR_MEMORY, "cannot start thread %u", p->threads + 1);
}

static int start_workers(struct prepare *p, struct err *err) {
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    unsigned threads = p->recipe->threads ? p->recipe->threads : cores > 0 ? (unsigned)cores : 1;
    if (threads > THREADS_MAX) threads = THREADS_MAX;
    p->jobs = threads * JOBS_PER_THREAD;
    p->job = calloc(p->jobs, sizeof *p->job);
    p->thread = calloc(threads, sizeof *p->thread);
    if (!p->job || !p->thread) return err_set(err, ERR_MEMORY, "no memory for %u threads", threads);
    while (p->threads < threads)
        if (start_worker(p, err)) return -1;
    return 0;
}

static void stop_workers(struct prepare *p) {
    pthread_mutex_lock(&p->lock);
    p->stop = true;
    pthread_cond_broadcast(&p->to_do);
    pthread_mutex_unlock(&p->lock);
    for (unsigned i = 0; i < p->threads; i++) pthread_join(p->thread[i], NULL);
    for (unsigned i = 0; p->job && i < p->jobs; i++) {
        text_buffer_release(&p->job[i].text);
        text_buffer_release(&p->job[i].packed);
    }
    free(p->job);
    free(p->thread);
}

/* ---- reading ----------------------------------------------------------------------------------- */

static int open_next(struct prepare *p, struct err *err) {
    const char *path = p->list.path[p->next_source];
    if (source_is_lines(path) && p->document_end < 0)
        return err_set(err, ERR_CONFIG,
                       "%.120s holds many documents: --document-end must name the token that ends one", path);
    if (!(p->source = source_open(path, err))) return -1;
    p->next_source++;
    p->rest.n = 0;
    p->line = 1;
    p->source_begun = p->source_ended = false;
    return 0;
}

static void close_source(struct prepare *p) {
    source_close(p->source);
    p->source = NULL;
    p->bytes_before += p->list.bytes[p->next_source - 1];
}

/* Where what was read can be cut; 0: nowhere yet. */
static size_t place_to_cut(const struct prepare *p, bool lines) {
    if (p->source_ended) return p->rest.n;
    if (!lines) return tokenizer_cut(p->tokenizer, p->rest.bytes, p->rest.n);
    const char *newline = memrchr(p->rest.bytes, '\n', p->rest.n);
    return newline ? (size_t)(newline - p->rest.bytes) + 1 : 0;
}

/* Read on until there is a place to cut. Each time twice as much, so that looking for it stays linear. */
static int read_block(struct prepare *p, const char *path, bool lines, size_t *cut, struct err *err) {
    do {
        size_t got, want = p->rest.n > BLOCK_BYTES ? p->rest.n : BLOCK_BYTES;
        if (p->rest.n > DOCUMENT_BYTES_MAX)
            return err_set(err, ERR_UNSUPPORTED, "%.120s: more than %u bytes in one %s", path,
                           DOCUMENT_BYTES_MAX, lines ? "line" : "stretch without a space between letters");
        if (text_buffer_reserve(&p->rest, p->rest.n + want, err)) return -1;
        if (source_read(p->source, p->rest.bytes + p->rest.n, want, &got, err)) return -1;
        p->rest.n += got;
        p->source_ended = got < want;
        *cut = place_to_cut(p, lines);
    } while (!*cut && !p->source_ended);
    return 0;
}

static uint64_t newlines(const char *text, size_t n) {
    uint64_t count = 0;
    for (size_t i = 0; i < n; i++) count += text[i] == '\n';
    return count;
}

/* The next block into j: 1, or 0 where there is none. */
static int fill(struct prepare *p, struct job *j, struct err *err) {
    size_t cut;
    if (!p->source && p->next_source == p->list.n) return 0;
    if (!p->source && open_next(p, err)) return -1;
    j->path = p->list.path[p->next_source - 1];
    j->lines = source_is_lines(j->path);
    if (read_block(p, j->path, j->lines, &cut, err)) return -1;
    size_t left = p->rest.n - cut;
    struct text_buffer text = p->rest;
    if (text_buffer_reserve(&j->text, left, err)) return -1;
    if (left) memcpy(j->text.bytes, text.bytes + cut, left); /* the job's old buffer takes the rest */
    p->rest = j->text;
    p->rest.n = left;
    j->text = text;
    j->text.n = cut;
    j->line = p->line;
    j->first = !p->source_begun;
    j->last = p->source_ended && !left;
    if (j->lines) p->line += newlines(j->text.bytes, cut);
    p->source_begun = true;
    p->progress.bytes = p->bytes_before + source_position(p->source);
    if (j->last) close_source(p);
    return 1;
}

/* ---- writing ----------------------------------------------------------------------------------- */

/* Move the last `n` tokens of the file to the end of the held-out file. */
static int cut_heldout(struct prepare *p, uint64_t tokens, uint64_t n, struct err *err) {
    uint64_t at = (tokens - n) * p->token_bytes, left = n * p->token_bytes;
    char *block = malloc(BLOCK_BYTES);
    int rc = block ? 0 : err_set(err, ERR_MEMORY, "no memory to cut the held-out text");
    for (size_t got; rc == 0 && left; at += got, left -= got) {
        rc = data_read_at(p->fd, at, left < BLOCK_BYTES ? (size_t)left : BLOCK_BYTES, block, &got, p->path,
                          err);
        if (rc == 0) rc = file_write(p->heldout_fd, block, got, p->heldout_path, err);
        if (rc == 0 && !got) rc = err_set(err, ERR_TRUNCATED, "%.150s shrank while it was read", p->path);
    }
    free(block);
    if (rc == 0 && ftruncate(p->fd, (off_t)((tokens - n) * p->token_bytes)))
        rc = err_set_errno(err, "truncate %.150s", p->path);
    p->heldout_tokens += n;
    return rc;
}

/* Everything is written under such a name first: the corpus that may be there stays, and whoever
 * reads it goes on, until the new one is whole. */
static int join_new(char out[PATH_BYTES_MAX], const char *folder, const char *name, struct err *err) {
    char file[NAME_BYTES_MAX + 32];
    snprintf(file, sizeof file, "%s.new", name);
    return data_join(out, folder, file, err);
}

static int create_new(char path[PATH_BYTES_MAX], const char *folder, const char *name, struct err *err) {
    if (join_new(path, folder, name, err)) return -1;
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    return fd >= 0 ? fd : err_set_errno(err, "create %.150s", path);
}

static int write_new(const char *folder, const char *name, const void *bytes, size_t n, struct err *err) {
    char path[PATH_BYTES_MAX];
    int fd = create_new(path, folder, name, err);
    if (fd < 0) return -1;
    int rc = file_write(fd, bytes, n, path, err);
    if (rc == 0 && fsync(fd)) rc = err_set_errno(err, "fsync %.150s", path);
    close(fd);
    return rc;
}

static void blocks_name(char out[NAME_BYTES_MAX + 16], const char *name) {
    snprintf(out, NAME_BYTES_MAX + 16, "%s" DATA_BLOCKS_SUFFIX, name);
}

/* Digests of a file and of its blocks; all of it is on the disk then. */
static int finish_file(const struct prepare *p, int fd, const char *path, struct token_file *f,
                       struct err *err) {
    char name[NAME_BYTES_MAX + 16];
    struct digest *block = NULL;
    size_t blocks = 0;
    blocks_name(name, f->name);
    int rc = data_digest_of_file(fd, path, &f->digest, &block, &blocks, err);
    if (rc == 0 && fsync(fd)) rc = err_set_errno(err, "fsync %.150s", path);
    if (rc == 0) rc = write_new(p->folder, name, block, blocks * sizeof *block, err);
    if (rc == 0) f->blocks = digest_of(block, blocks * sizeof *block);
    f->has_blocks = true;
    free(block);
    return rc;
}

static int begin_tokens(struct prepare *p, struct err *err) {
    if (p->files == DATA_FILES_MAX)
        return err_set(err, ERR_CONFIG, "more than %d texts, each a token file: --document-end joins them",
                       DATA_FILES_MAX);
    struct token_file *f = &p->file[p->files++];
    *f = (struct token_file){ 0 };
    snprintf(f->name, sizeof f->name, "tokens-%05u.bin", p->files - 1);
    p->fd = create_new(p->path, p->folder, f->name, err);
    return p->fd < 0 ? -1 : 0;
}

/* The end of a token file: its own end is held out, and all of one that follows others and is too short for a
 * sample. */
static int end_tokens(struct prepare *p, const char *source, struct err *err) {
    struct token_file *f = &p->file[p->files - 1];
    uint32_t sequence = p->recipe->sequence;
    uint64_t all = f->tokens, heldout = (uint64_t)((double)all * p->recipe->heldout_fraction);
    if (p->document_end >= 0 && p->files > 1 && all - heldout < (uint64_t)sequence + 1) heldout = all;
    f->tokens = all - heldout;
    if (cut_heldout(p, all, heldout, err)) return -1;
    if (!f->tokens && heldout) {
        p->files--;
        unlink(p->path);
    } else if (f->tokens < (uint64_t)sequence + 1) {
        return err_set(err, ERR_CONFIG,
                       "%.100s: %llu tokens to train on (%llu in all), one sample of sequence "
                       "%u needs %u",
                       source, (unsigned long long)f->tokens, (unsigned long long)all, sequence,
                       sequence + 1);
    } else {
        f->samples = (f->tokens - 1) / sequence;
        if (finish_file(p, p->fd, p->path, f, err)) return -1;
    }
    close(p->fd);
    p->fd = -1;
    return 0;
}

static int write_job(struct prepare *p, const struct job *j, struct err *err) {
    uint64_t limit = p->recipe->file_tokens ? p->recipe->file_tokens : DATA_FILE_TOKENS;
    bool joined = p->document_end >= 0;
    if (j->failed) {
        *err = j->err;
        return -1;
    }
    if (p->fd >= 0 && joined && p->file[p->files - 1].tokens >= limit && end_tokens(p, j->path, err))
        return -1;
    if (p->fd < 0 && begin_tokens(p, err)) return -1;
    if (file_write(p->fd, j->packed.bytes, j->packed.n, p->path, err)) return -1;
    p->file[p->files - 1].tokens += j->tokens;
    p->progress.tokens += j->tokens;
    p->progress.documents += j->documents;
    return !joined && j->last ? end_tokens(p, j->path, err) : 0;
}

/* Read while there is room, write what is next as soon as it is done. */
static int run_jobs(struct prepare *p, struct err *err) {
    uint64_t filled = 0, written = 0;
    for (int more = 1; more || written < filled;) {
        struct job *next = &p->job[written % p->jobs], *room = &p->job[filled % p->jobs];
        bool write = false, read = false;
        pthread_mutex_lock(&p->lock);
        for (;;) {
            write = written < filled && next->state == JOB_DONE;
            read = !write && more && filled - written < p->jobs;
            if (write || read) break;
            pthread_cond_wait(&p->done, &p->lock);
        }
        pthread_mutex_unlock(&p->lock);
        if (write && write_job(p, next, err)) return -1;
        if (read && (more = fill(p, room, err)) < 0) return -1;
        pthread_mutex_lock(&p->lock);
        if (write) next->state = JOB_FREE, written++;
        if (read && more) room->state = JOB_READY, filled++;
        pthread_cond_signal(&p->to_do);
        pthread_mutex_unlock(&p->lock);
        if (p->recipe->progress) p->recipe->progress(p->recipe->progress_arg, &p->progress);
    }
    return p->fd >= 0 ? end_tokens(p, p->list.path[p->list.n - 1], err) : 0;
}

/* ---- the manifest ------------------------------------------------------------------------------ */

static json_t *file_json(const struct token_file *f, int with_samples) {
    char hex[2][DIGEST_HEX_BYTES];
    digest_hex(&f->digest, hex[0]);
    digest_hex(&f->blocks, hex[1]);
    json_t *o = json_pack("{s:s, s:I, s:s, s:s}", "name", f->name, "tokens", (json_int_t)f->tokens, "blake2b",
                          hex[0], "blocks", hex[1]);
    if (o && with_samples) json_object_set_new(o, "samples", json_integer((json_int_t)f->samples));
    return o;
}

static json_t *tokenizer_file_json(const struct tokenizer *t) {
    char hex[DIGEST_HEX_BYTES];
    digest_hex(tokenizer_digest(t), hex);
    return json_pack("{s:s, s:s}", "name", TOKENIZER_FILE_NAME, "blake2b", hex);
}

static char *manifest_text(const struct prepare *p, const struct token_file *heldout) {
    uint64_t samples = 0;
    json_t *list = json_array();
    for (uint32_t i = 0; i < p->files; i++) {
        json_array_append_new(list, file_json(&p->file[i], 1));
        samples += p->file[i].samples;
    }
    json_t *root =
        json_pack("{s:i, s:s, s:I, s:s, s:I, s:I, s:o, s:I, s:o}", "format", DATA_FORMAT, "tokenizer",
                  tokenizer_name(p->tokenizer), "vocabulary", (json_int_t)tokenizer_vocabulary(p->tokenizer),
                  "dtype", p->token_bytes == 2 ? "uint16" : "uint32", "sequence",
                  (json_int_t)p->recipe->sequence, "documents", (json_int_t)p->progress.documents, "files",
                  list, "samples", (json_int_t)samples, "heldout", file_json(heldout, 0));
    if (root && p->document_end >= 0)
        json_object_set_new(root, "document_end", json_integer(p->document_end));
    if (root && tokenizer_digest(p->tokenizer))
        json_object_set_new(root, "tokenizer_file", tokenizer_file_json(p->tokenizer));
    char *text = root ? json_dumps(root, JSON_INDENT(2)) : NULL;
    json_decref(root);
    return text;
}

static int rename_new(const char *folder, const char *name, struct err *err) {
    char from[PATH_BYTES_MAX], to[PATH_BYTES_MAX];
    if (join_new(from, folder, name, err) || data_join(to, folder, name, err)) return -1;
    return rename(from, to) ? err_set_errno(err, "rename %.150s", from) : 0;
}

static int rename_tokens(const char *folder, const char *name, struct err *err) {
    char blocks[NAME_BYTES_MAX + 16];
    blocks_name(blocks, name);
    return rename_new(folder, name, err) || rename_new(folder, blocks, err) ? -1 : 0;
}

/* The old manifest goes first and the new one comes last: a folder with a manifest is complete. */
static int publish(const struct prepare *p, struct err *err) {
    char manifest[PATH_BYTES_MAX];
    if (data_join(manifest, p->folder, DATA_MANIFEST_NAME, err)) return -1;
    if (unlink(manifest) && errno != ENOENT) return err_set_errno(err, "remove %.150s", manifest);
    for (uint32_t i = 0; i < p->files; i++)
        if (rename_tokens(p->folder, p->file[i].name, err)) return -1;
    if (tokenizer_digest(p->tokenizer) && rename_new(p->folder, TOKENIZER_FILE_NAME, err)) return -1;
    return rename_tokens(p->folder, HELDOUT_NAME, err) || rename_new(p->folder, DATA_MANIFEST_NAME, err) ? -1
                                                                                                      : 0;
}

static void discard_new(const char *folder, const char *name) {
    char path[PATH_BYTES_MAX];
    if (!join_new(path, folder, name, NULL)) unlink(path);
}

static void discard_tokens(const char *folder, const char *name) {
    char blocks[NAME_BYTES_MAX + 16];
    blocks_name(blocks, name);
    discard_new(folder, name);
    discard_new(folder, blocks);
}

/* What a corpus that was refused has left. */
static void discard(const struct prepare *p) {
    for (uint32_t i = 0; i < p->files; i++) discard_tokens(p->folder, p->file[i].name);
    discard_tokens(p->folder, HELDOUT_NAME);
    discard_new(p->folder, DATA_MANIFEST_NAME);
    discard_new(p->folder, TOKENIZER_FILE_NAME);
}

static int write_rest(struct prepare *p, struct err *err) {
    struct token_file heldout = { .name = HELDOUT_NAME, .tokens = p->heldout_tokens };
    size_t n;
    if (p->recipe->heldout_fraction > 0 && heldout.tokens < (uint64_t)p->recipe->sequence + 1)
        return err_set(err, ERR_CONFIG, "held-out fraction %g leaves %llu tokens, one sample of sequence "
                       "%u needs %u: use a larger fraction, or 0", p->recipe->heldout_fraction,
                       (unsigned long long)heldout.tokens, p->recipe->sequence, p->recipe->sequence + 1);
    if (finish_file(p, p->heldout_fd, p->heldout_path, &heldout, err)) return -1;
    const char *json = tokenizer_json(p->tokenizer, &n);
    if (json && write_new(p->folder, TOKENIZER_FILE_NAME, json, n, err)) return -1;
    char *text = manifest_text(p, &heldout);
    if (!text) return err_set(err, ERR_MEMORY, "no memory for the manifest of %u files", p->files);
    int rc = write_new(p->folder, DATA_MANIFEST_NAME, text, strlen(text), err);
    free(text);
    return rc ? rc : publish(p, err);
}

/* ---- all of it --------------------------------------------------------------------------------- */

static int check(const struct data_recipe *r, struct err *err) {
    if (!r->sequence || r->sequence > 1u << 20)
        return err_set(err, ERR_CONFIG, "sequence is %u; allowed are 1 to %u", r->sequence, 1u << 20);
    if (!(r->heldout_fraction >= 0 && r->heldout_fraction <= 0.5))
        return err_set(err, ERR_CONFIG, "held-out fraction is %g; allowed are 0 to 0.5", r->heldout_fraction);
    return 0;
}

/* The token that ends documents: by its id or its text, or the one that usually does. */
static int find_document_end(struct prepare *p, struct err *err) {
    static const char *const usual[] = { "<|end_of_text|>", "<|endoftext|>", "</s>" };
    const char *wanted = p->recipe->document_end;
    uint32_t vocabulary = tokenizer_vocabulary(p->tokenizer);
    char *end;
    p->document_end = -1;
    for (size_t i = 0; !wanted && i < sizeof usual / sizeof *usual && p->document_end < 0; i++)
        p->document_end = tokenizer_added(p->tokenizer, usual[i]);
    if (!wanted || !strcmp(wanted, "none")) return 0;
    if ((p->document_end = tokenizer_added(p->tokenizer, wanted)) >= 0) return 0;
    unsigned long long id = strtoull(wanted, &end, 10);
    if (*wanted < '0' || *wanted > '9' || *end || id >= vocabulary)
        return err_set(err, ERR_CONFIG,
                       "document end %.60s is neither an added token nor an id below the vocabulary of "
                       "the tokenizer, %u",
                       wanted, vocabulary);
    p->document_end = (int32_t)id;
    return 0;
}

static int prepare_in(struct prepare *p, struct err *err) {
    if (mkdir(p->folder, 0755) && errno != EEXIST) return err_set_errno(err, "create %.150s", p->folder);
    if (!(p->file = calloc(DATA_FILES_MAX, sizeof *p->file)))
        return err_set(err, ERR_MEMORY, "no memory for files");
    if ((p->heldout_fd = create_new(p->heldout_path, p->folder, HELDOUT_NAME, err)) < 0) return -1;
    for (uint32_t i = 0; i < p->list.n; i++) p->progress.bytes_total += p->list.bytes[i];
    int rc = start_workers(p, err);
    if (rc == 0) rc = run_jobs(p, err);
    stop_workers(p);
    if (rc == 0) rc = write_rest(p, err);
    if (rc) discard(p);
    return rc;
}

static int info_of(const char *folder, struct data_info *info, struct err *err) {
    struct data *d = data_open(folder, NULL, 0, err);
    if (!d) return -1;
    *info = *data_info(d);
    data_close(d);
    return 0;
}

int data_prepare(const char *out_dir, const char *const *paths, uint32_t n, const struct data_recipe *recipe,
                 struct data_info *info, struct err *err) {
    struct prepare p = { .recipe = recipe, .folder = out_dir, .fd = -1, .heldout_fd = -1,
                         .lock = PTHREAD_MUTEX_INITIALIZER, .to_do = PTHREAD_COND_INITIALIZER,
                         .done = PTHREAD_COND_INITIALIZER };
    int rc = -1;
    if (check(recipe, err) || !(p.tokenizer = tokenizer_open(recipe->tokenizer, err))) return -1;
    p.token_bytes = tokenizer_vocabulary(p.tokenizer) <= 1u << 16 ? 2 : 4;
    if (!find_document_end(&p, err) && !source_list_fill(&p.list, paths, n, err)) rc = prepare_in(&p, err);
    source_close(p.source);
    source_list_release(&p.list);
    text_buffer_release(&p.rest);
    tokenizer_close(p.tokenizer);
    free(p.file);
    if (p.fd >= 0) close(p.fd);
    if (p.heldout_fd >= 0) close(p.heldout_fd);
    return rc || !info ? rc : info_of(out_dir, info, err);
}
