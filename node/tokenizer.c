/* tokenizer.c - text to token ids and back; see tokenizer.h. */
#include "node/tokenizer.h"

#include "node/text.h"
#include "node/tokenizer_file.h"
#include "proto/proto.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* Added tokens that are looked for at the same time, sorted by what is looked for. */
struct needle {
    char *text;
    size_t n;
    uint32_t id;
    bool special;
};

struct needles {
    struct needle *sorted;
    size_t count;
    uint32_t first[257]; /* those that begin with byte b: [first[b], first[b + 1]) */
};

struct tokenizer {
    bool bytes; /* the kind without a file */
    char name[TOKENIZER_NAME_BYTES_MAX + 1];
    char *json; /* the file */
    size_t json_n;
    struct digest digest;
    struct tokenizer_file file;
    struct needles raw, normal; /* in the text as it is; in its normal form */
    bool cut_anywhere;          /* no added token begins before a place of split_cut() and ends after it */
    struct split *split;
    struct text_nfc *nfc; /* NULL: not wanted */
};

/* ---- added tokens ------------------------------------------------------------------------------ */

static int by_text(const void *a, const void *b) {
    const struct needle *x = a, *y = b;
    int order = memcmp(x->text, y->text, x->n < y->n ? x->n : y->n);
    return order ? order : x->n < y->n ? -1 : x->n > y->n;
}

static int needle_fill(const struct tokenizer *t, const struct added_token *a, struct needle *out,
                       struct err *err) {
    struct text_buffer scratch = { 0 };
    const char *text = a->content;
    size_t n = a->n;
    int rc = 0;
    if (a->normalized && t->nfc) rc = text_nfc_apply(t->nfc, a->content, a->n, &scratch, &text, &n, err);
    *out = (struct needle){ rc ? NULL : malloc(n), n, a->id, a->special };
    if (rc == 0 && !out->text) rc = err_set(err, ERR_MEMORY, "no memory for added tokens");
    if (rc == 0) memcpy(out->text, text, n);
    text_buffer_release(&scratch);
    return rc;
}

static int needles_fill(struct tokenizer *t, struct needles *s, bool normalized, struct err *err) {
    const struct tokenizer_file *f = &t->file;
    if (!(s->sorted = calloc(f->added_count + 1, sizeof *s->sorted)))
        return err_set(err, ERR_MEMORY, "no memory for added tokens");
    for (uint32_t i = 0; i < f->added_count; i++)
        if (f->added[i].normalized == normalized && needle_fill(t, &f->added[i], &s->sorted[s->count++], err))
            return -1;
    qsort(s->sorted, s->count, sizeof *s->sorted, by_text);
    for (size_t i = 0; i < s->count; i++) {
        const struct needle *e = &s->sorted[i];
        if (i && !by_text(e - 1, e))
            return err_set(err, ERR_UNSUPPORTED, "added_tokens: %u and %u are the same text", e[-1].id,
                           e->id);
        s->first[(unsigned char)e->text[0] + 1] = (uint32_t)i + 1;
        if (memchr(e->text + 1, ' ', e->n - 1) || memchr(e->text, '\n', e->n - 1)) t->cut_anywhere = false;
    }
    for (int b = 0; b < 256; b++)
        if (s->first[b + 1] < s->first[b]) s->first[b + 1] = s->first[b];
    return 0;
}

static void needles_release(struct needles *s) {
    for (size_t i = 0; i < s->count; i++) free(s->sorted[i].text);
    free(s->sorted);
}

/* The longest needle that text[n] begins with, or NULL. Those that agree with the text so far are neighbours,
 * and the one that ends here comes first of them. */
static const struct needle *longest_at(const struct needles *s, const char *text, size_t n) {
    const struct needle *found = NULL;
    unsigned char c = (unsigned char)text[0];
    size_t low = s->first[c], high = s->first[c + 1];
    for (size_t depth = 1; low < high; depth++) {
        if (s->sorted[low].n == depth) found = &s->sorted[low++];
        if (depth == n) break;
        c = (unsigned char)text[depth];
        size_t a = low, b = high;
        while (a < b) { /* the first whose next byte is c or more */
            size_t middle = a + (b - a) / 2;
            if ((unsigned char)s->sorted[middle].text[depth] < c) a = middle + 1; else b = middle;
        }
        low = a;
        for (b = high; a < b;) { /* the first whose next byte is more than c */
            size_t middle = a + (b - a) / 2;
            if ((unsigned char)s->sorted[middle].text[depth] <= c) a = middle + 1; else b = middle;
        }
        high = a;
    }
    return found;
}

/* ---- open -------------------------------------------------------------------------------------- */

static int finish(struct tokenizer *t, const void *json, size_t n, struct err *err) {
    char hex[DIGEST_HEX_BYTES];
    if (!(t->json = malloc(n + 1))) return err_set(err, ERR_MEMORY, "no memory for a tokenizer");
    memcpy(t->json, json, n);
    t->json_n = n;
    t->digest = digest_of(json, n);
    digest_hex(&t->digest, hex);
    snprintf(t->name, sizeof t->name, "bpe-%.32s", hex);
    t->cut_anywhere = true;
    if (t->file.nfc && !(t->nfc = text_nfc_create(err))) return -1;
    if (needles_fill(t, &t->raw, false, err) || needles_fill(t, &t->normal, true, err)) return -1;
    return (t->split = split_create(t->file.pattern, err)) ? 0 : -1;
}

struct tokenizer *tokenizer_parse(const void *json, size_t n, struct err *err) {
    struct tokenizer *t = calloc(1, sizeof *t);
    if (!t) {
        err_set(err, ERR_MEMORY, "no memory for a tokenizer");
        return NULL;
    }
    if (!tokenizer_file_parse(&t->file, json, n, err) && !finish(t, json, n, err)) return t;
    tokenizer_close(t);
    return NULL;
}

static struct tokenizer *open_bytes(struct err *err) {
    struct tokenizer *t = calloc(1, sizeof *t);
    if (!t) {
        err_set(err, ERR_MEMORY, "no memory for a tokenizer");
        return NULL;
    }
    t->bytes = true;
    t->file.vocabulary = 256;
    strcpy(t->name, "bytes");
    return t;
}

static int read_file(const char *path, char **bytes, size_t *n, struct err *err) {
    struct stat st;
    FILE *f = fopen(path, "rbe");
    int rc = -1;
    if (!f) return err_set_errno(err, "a tokenizer is bytes or a tokenizer.json: %.150s", path);
    if (fstat(fileno(f), &st))
        err_set_errno(err, "stat %.150s", path);
    else if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size > TOKENIZER_FILE_BYTES_MAX)
        err_set(err, ERR_UNSUPPORTED, "%.150s is not a file of at most %zu bytes", path,
                TOKENIZER_FILE_BYTES_MAX);
    else if (!(*bytes = malloc((size_t)st.st_size + 1)))
        err_set(err, ERR_MEMORY, "no memory for %.150s", path);
    else {
        *n = fread(*bytes, 1, (size_t)st.st_size, f);
        rc = ferror(f) ? err_set_errno(err, "read %.150s", path) : 0;
    }
    fclose(f);
    return rc;
}

struct tokenizer *tokenizer_open(const char *what, struct err *err) {
    char path[4096], *bytes = NULL;
    struct stat st;
    struct tokenizer *t = NULL;
    size_t n;
    if (!strcmp(what, "bytes")) return open_bytes(err);
    int folder = !stat(what, &st) && S_ISDIR(st.st_mode);
    if ((size_t)snprintf(path, sizeof path, folder ? "%s/" TOKENIZER_FILE_NAME : "%s", what) >= sizeof path) {
        err_set(err, ERR_CONFIG, "path too long: %.100s...", what);
        return NULL;
    }
    if (!read_file(path, &bytes, &n, err) && !(t = tokenizer_parse(bytes, n, err)))
        err_prefix(err, "%.100s", path);
    free(bytes);
    return t;
}

void tokenizer_close(struct tokenizer *t) {
    if (!t) return;
    needles_release(&t->raw);
    needles_release(&t->normal);
    split_destroy(t->split);
    text_nfc_destroy(t->nfc);
    tokenizer_file_release(&t->file);
    free(t->json);
    free(t);
}

const char *tokenizer_name(const struct tokenizer *t) {
    return t->name;
}

const struct digest *tokenizer_digest(const struct tokenizer *t) {
    return t->bytes ? NULL : &t->digest;
}

const char *tokenizer_json(const struct tokenizer *t, size_t *n) {
    *n = t->json_n;
    return t->json;
}

uint32_t tokenizer_vocabulary(const struct tokenizer *t) {
    return t->file.vocabulary;
}

const char *tokenizer_token(const struct tokenizer *t, uint32_t id, size_t *n) {
    static const unsigned char all[256] = {
#define B4(i) i, i + 1, i + 2, i + 3
#define B16(i) B4(i), B4(i + 4), B4(i + 8), B4(i + 12)
#define B64(i) B16(i), B16(i + 16), B16(i + 32), B16(i + 48)
        B64(0), B64(64), B64(128), B64(192)
    };
    *n = 0;
    if (id >= t->file.vocabulary) return NULL;
    if (t->bytes) {
        *n = 1;
        return (const char *)&all[id];
    }
    if (!t->file.other[id]) return bpe_token(t->file.bpe, id, n);
    *n = strlen(t->file.other[id]);
    return t->file.other[id];
}

int32_t tokenizer_added(const struct tokenizer *t, const char *content) {
    for (uint32_t i = 0; i < t->file.added_count; i++)
        if (!strcmp(t->file.added[i].content, content)) return (int32_t)t->file.added[i].id;
    return -1;
}

size_t tokenizer_cut(const struct tokenizer *t, const char *text, size_t n) {
    return t->bytes ? n : t->cut_anywhere ? split_cut(text, n) : 0;
}

/* ---- encode ------------------------------------------------------------------------------------ */

struct encoder {
    const struct tokenizer *t;
    bool special_as_text;
    struct bpe_worker *worker;
    struct split_worker *match;
    struct text_buffer repaired, normal;
    int32_t *id;
    size_t n, room;
};

struct encoder *encoder_create(const struct tokenizer *t, bool special_as_text, struct err *err) {
    struct encoder *e = calloc(1, sizeof *e);
    if (!e) {
        err_set(err, ERR_MEMORY, "no memory to tokenise");
        return NULL;
    }
    e->t = t;
    e->special_as_text = special_as_text;
    if (t->bytes) return e;
    if ((e->worker = bpe_worker_create(err)) && (e->match = split_worker_create(t->split, err))) return e;
    encoder_destroy(e);
    return NULL;
}

void encoder_destroy(struct encoder *e) {
    if (!e) return;
    bpe_worker_destroy(e->worker);
    split_worker_destroy(e->match);
    text_buffer_release(&e->repaired);
    text_buffer_release(&e->normal);
    free(e->id);
    free(e);
}

static int reserve(struct encoder *e, size_t more, struct err *err) {
    if (e->n + more <= e->room) return 0;
    size_t room = e->n + more > e->room + e->room / 2 ? e->n + more : e->room + e->room / 2;
    int32_t *id = realloc(e->id, room * sizeof *id);
    if (!id) return err_set(err, ERR_MEMORY, "no memory for %zu token ids", room);
    e->id = id;
    e->room = room;
    return 0;
}

static int put_words(struct encoder *e, const char *text, size_t n, struct err *err) {
    if (reserve(e, n, err)) return -1;
    while (n) {
        size_t word = split_next(e->t->split, e->match, text, n, err);
        size_t count = word ? bpe_encode(e->t->file.bpe, e->worker, text, word, n, e->id + e->n, err) : 0;
        if (!count) return -1;
        e->n += count;
        text += word;
        n -= word;
    }
    return 0;
}

static int put_token(struct encoder *e, uint32_t id, struct err *err) {
    if (reserve(e, 1, err)) return -1;
    e->id[e->n++] = (int32_t)id;
    return 0;
}

/* Hand what lies between the needles on, and take the needles' ids. */
static int between(struct encoder *e, const struct needles *s, const char *text, size_t n,
                   int (*on_text)(struct encoder *, const char *, size_t, struct err *), struct err *err) {
    size_t done = 0;
    for (size_t at = 0; s->count && at < n;) {
        const struct needle *found = longest_at(s, text + at, n - at);
        at += found ? found->n : 1;
        if (!found || (found->special && e->special_as_text)) continue;
        size_t begin = at - found->n;
        if (begin > done && on_text(e, text + done, begin - done, err)) return -1;
        if (put_token(e, found->id, err)) return -1;
        done = at;
    }
    return done < n ? on_text(e, text + done, n - done, err) : 0;
}

static int put_normal(struct encoder *e, const char *text, size_t n, struct err *err) {
    if (e->t->nfc && text_nfc_apply(e->t->nfc, text, n, &e->normal, &text, &n, err)) return -1;
    return between(e, &e->t->normal, text, n, put_words, err);
}

static int put_bytes(struct encoder *e, const char *text, size_t n, struct err *err) {
    if (reserve(e, n, err)) return -1;
    for (size_t i = 0; i < n; i++) e->id[e->n++] = (unsigned char)text[i];
    return 0;
}

int encoder_encode(struct encoder *e, const char *text, size_t n, const int32_t **ids, size_t *count,
                   struct err *err) {
    int rc;
    e->n = 0;
    if (e->t->bytes) {
        rc = put_bytes(e, text, n, err);
    } else if (text_valid(text, n) == n) {
        rc = between(e, &e->t->raw, text, n, put_normal, err);
    } else {
        rc = text_repair(text, n, &e->repaired, err);
        if (rc == 0) rc = between(e, &e->t->raw, e->repaired.bytes, e->repaired.n, put_normal, err);
    }
    *ids = e->id;
    *count = e->n;
    return rc;
}
