/* manifest.c - the small objects that make tensors a checkpoint: the manifest and who signed it,
 * the data cursor, the ledger, and `latest`. Bytes to structs and back; nothing here does I/O
 * but latest_read. */
#include "ckpt/internal.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MANIFEST_VERSION 1
#define FORMAT_CHECKPOINT "intellect-checkpoint"
#define FORMAT_SIGNATURE "intellect-signature"
#define FORMAT_CURSOR "intellect-cursor"
#define FORMAT_LATEST "intellect-latest"

/* Is this the kind of object, in the version, that we read? */
static int check_format(const json_t *json, const char *format, const char *what, struct err *err) {
    uint64_t version;
    const char *is = json_text(json, "format", what, err);
    if (!is || json_u64(json, "version", what, &version, err)) return -1;
    if (strcmp(is, format) != 0)
        return err_set(err, ERR_CORRUPT, "%s: format \"%.40s\", expected \"%s\"", what, is, format);
    if (version != MANIFEST_VERSION)
        return err_set(err, ERR_UNSUPPORTED, "%s: version %" PRIu64 ", this build reads %d", what,
                       version, MANIFEST_VERSION);
    return 0;
}

/* ---- manifest.json ----------------------------------------------------------------------------- */

static json_t *format_objects(const struct manifest *m) {
    json_t *list = json_array();
    for (uint32_t i = 0; list && i < m->count; i++) {
        const struct manifest_object *o = &m->object[i];
        json_t *item = json_pack("{ss sI so}", "name", o->name, "bytes", (json_int_t)o->bytes,
                                 "blake2b", json_hex_new(o->digest.b, sizeof o->digest.b));
        if (!json_array_append_new(list, item)) continue;
        json_decref(list);
        return NULL;
    }
    return list;
}

int manifest_format(const struct manifest *m, struct ckpt_blob *out, struct err *err) {
    const struct ckpt_facts *f = &m->facts;
    json_t *json = json_pack(
        "{ss si so sI sI sI so so ss so}", "format", FORMAT_CHECKPOINT, "version", MANIFEST_VERSION,
        "run", json_hex_new(f->run.b, sizeof f->run.b), "ledger_index", (json_int_t)f->index,
        "round", (json_int_t)f->round, "tokens_committed", (json_int_t)f->tokens_committed,
        "ledger_head", json_hex_new(f->ledger_head.b, sizeof f->ledger_head.b), "state_root",
        json_hex_new(f->state_root.b, sizeof f->state_root.b), "tokenizer", m->tokenizer,
        "objects", format_objects(m));
    return json_write(json, JSON_INDENT(1), out, err);
}

static int parse_object(const json_t *json, struct manifest_object *o, struct err *err) {
    const char *name = json_text(json, "name", "manifest.json", err);
    if (!name) return -1;
    if (!ckpt_name_valid(name) || strchr(name, '/'))
        return err_set(err, ERR_CORRUPT, "manifest.json: \"%.64s\" cannot be an object's name", name);
    snprintf(o->name, sizeof o->name, "%s", name);
    return json_u64(json, "bytes", name, &o->bytes, err) ||
           json_hex(json, "blake2b", name, o->digest.b, sizeof o->digest.b, err) ? -1 : 0;
}

static int parse_objects(const json_t *list, struct manifest *m, struct err *err) {
    size_t n = json_array_size(list);
    if (n == 0 || n > CKPT_OBJECTS_MAX)
        return err_set(err, ERR_CORRUPT, "manifest.json: %zu objects, allowed are 1 to %u", n,
                       CKPT_OBJECTS_MAX);
    m->object = calloc(n, sizeof *m->object);
    if (!m->object) return err_set(err, ERR_MEMORY, "manifest.json: out of memory");
    for (size_t i = 0; i < n; i++) {
        struct manifest_object *o = &m->object[i];
        if (parse_object(json_array_get(list, i), o, err)) return -1;
        if (manifest_find(m, o->name))
            return err_set(err, ERR_CORRUPT, "manifest.json: \"%s\" stands there twice", o->name);
        m->count++;
    }
    return 0;
}

int manifest_parse(const struct ckpt_blob *blob, struct manifest *out, struct err *err) {
    static const char what[] = "manifest.json";
    struct ckpt_facts *f = &out->facts;
    const char *tokenizer;
    *out = (struct manifest){0};
    json_t *json = json_read(blob, what, err);
    if (!json) return -1;
    int r = check_format(json, FORMAT_CHECKPOINT, what, err) ||
            json_hex(json, "run", what, f->run.b, sizeof f->run.b, err) ||
            json_u64(json, "ledger_index", what, &f->index, err) ||
            json_u64(json, "round", what, &f->round, err) ||
            json_u64(json, "tokens_committed", what, &f->tokens_committed, err) ||
            json_hex(json, "ledger_head", what, f->ledger_head.b, sizeof f->ledger_head.b, err) ||
            json_hex(json, "state_root", what, f->state_root.b, sizeof f->state_root.b, err) ||
            !(tokenizer = json_text(json, "tokenizer", what, err)) ||
            parse_objects(json_object_get(json, "objects"), out, err);
    if (!r) {
        snprintf(out->tokenizer, sizeof out->tokenizer, "%s", tokenizer);
        f->manifest = digest_of(blob->data, blob->length);
    }
    json_decref(json);
    if (r) manifest_release(out);
    return r ? -1 : 0;
}

void manifest_release(struct manifest *m) {
    free(m->object);
    *m = (struct manifest){0};
}

const struct manifest_object *manifest_find(const struct manifest *m, const char *name) {
    for (uint32_t i = 0; i < m->count; i++)
        if (!strcmp(m->object[i].name, name)) return &m->object[i];
    return NULL;
}

/* ---- manifest.sig ------------------------------------------------------------------------------ */

int manifest_sig_format(const struct manifest_sig *s, struct ckpt_blob *out, struct err *err) {
    json_t *json = json_pack(
        "{ss si so sI so so so}", "format", FORMAT_SIGNATURE, "version", MANIFEST_VERSION, "key",
        json_hex_new(s->key.b, sizeof s->key.b), "term", (json_int_t)s->term, "signature",
        json_hex_new(s->signature.b, sizeof s->signature.b), "delegation",
        json_hex_new(s->delegation.data, s->delegation.length), "delegation_signature",
        json_hex_new(s->delegation_signature.b, sizeof s->delegation_signature.b));
    return json_write(json, JSON_INDENT(1), out, err);
}

int manifest_sig_parse(const struct ckpt_blob *blob, struct manifest_sig *out, struct err *err) {
    static const char what[] = "manifest.sig";
    const char *delegation;
    *out = (struct manifest_sig){0};
    json_t *json = json_read(blob, what, err);
    if (!json) return -1;
    int r = check_format(json, FORMAT_SIGNATURE, what, err) ||
            json_hex(json, "key", what, out->key.b, sizeof out->key.b, err) ||
            json_u64(json, "term", what, &out->term, err) ||
            json_hex(json, "signature", what, out->signature.b, sizeof out->signature.b, err) ||
            json_hex(json, "delegation_signature", what, out->delegation_signature.b,
                     sizeof out->delegation_signature.b, err) ||
            !(delegation = json_text(json, "delegation", what, err));
    if (!r) {
        size_t n = strlen(delegation) / 2;
        out->delegation = (struct ckpt_blob){malloc(n + 1), n};
        r = !out->delegation.data ? err_set(err, ERR_MEMORY, "%s: out of memory", what)
                                  : json_hex(json, "delegation", what, out->delegation.data, n, err);
    }
    json_decref(json);
    if (r) manifest_sig_release(out);
    return r ? -1 : 0;
}

void manifest_sig_release(struct manifest_sig *s) {
    free(s->delegation.data);
    s->delegation = (struct ckpt_blob){0};
}

int manifest_sig_check(const struct manifest_sig *s, const struct msg_genesis *genesis,
                       const struct digest *run, const struct ckpt_blob *manifest, struct err *err) {
    struct proto_bytes delegation = {s->delegation.data, (uint32_t)s->delegation.length};
    if (ledger_check_delegation(genesis, run, delegation, &s->delegation_signature, &s->key, err)) {
        if (err) err->code = ERR_REFUSED;
        err_prefix(err, "manifest.sig");
        return -1;
    }
    if (proto_verify(&s->key, "manifest", run, s->term, manifest->data, manifest->length, &s->signature))
        return 0;
    return err_set(err, ERR_REFUSED, "manifest.sig: not the signature of manifest.json (%zu bytes) "
                   "by the key it names", manifest->length);
}

/* ---- cursor.json ------------------------------------------------------------------------------- */

static int by_start(const void *a, const void *b) {
    const struct msg_range *x = a, *y = b;
    return (x->start > y->start) - (x->start < y->start);
}

int ranges_normalise(struct msg_range *r, uint32_t *count, struct err *err) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < *count; i++)
        if (r[i].count == 0 || r[i].start > INT64_MAX || r[i].count > INT64_MAX - r[i].start)
            return err_set(err, ERR_CORRUPT, "spent samples: range %u is empty or too far (%" PRIu64
                           " from %" PRIu64 ")", i, r[i].count, r[i].start);
    if (*count) qsort(r, *count, sizeof *r, by_start);
    for (uint32_t i = 0; i < *count; i++) {
        uint64_t end = n ? r[n - 1].start + r[n - 1].count : 0;
        if (n && r[i].start < end)
            return err_set(err, ERR_CORRUPT, "spent samples: sample %" PRIu64 " was spent twice", r[i].start);
        if (n && r[i].start == end) r[n - 1].count += r[i].count;
        else r[n++] = r[i];
    }
    *count = n;
    return 0;
}

int cursor_format(const struct ckpt_facts *f, const struct msg_range *spent, uint32_t count,
                  struct ckpt_blob *out, struct err *err) {
    json_t *list = json_array();
    for (uint32_t i = 0; list && i < count; i++) {
        json_t *pair = json_pack("[II]", (json_int_t)spent[i].start, (json_int_t)spent[i].count);
        if (!json_array_append_new(list, pair)) continue;
        json_decref(list);
        list = NULL;
    }
    json_t *json = json_pack("{ss si sI sI sI so}", "format", FORMAT_CURSOR, "version",
                             MANIFEST_VERSION, "ledger_index", (json_int_t)f->index, "round",
                             (json_int_t)f->round, "tokens_committed",
                             (json_int_t)f->tokens_committed, "spent", list);
    return json_write(json, JSON_COMPACT, out, err);
}

/* [[start, count], ...], ascending, disjoint and joined, as it was written. */
static int parse_spent(const json_t *list, struct msg_range **spent, uint32_t *count, struct err *err) {
    size_t n = json_array_size(list);
    struct msg_range *r = json_is_array(list) ? calloc(n + 1, sizeof *r) : NULL;
    if (!r) return err_set(err, ERR_CORRUPT, "cursor.json: \"spent\" must be a list");
    for (size_t i = 0; i < n; i++) {
        json_int_t start, length;
        json_t *pair = json_array_get(list, i);
        if (json_array_size(pair) == 2 && !json_unpack(pair, "[II]", &start, &length) && start >= 0 && length > 0) {
            r[i] = (struct msg_range){(uint64_t)start, (uint64_t)length};
            continue;
        }
        free(r);
        return err_set(err, ERR_CORRUPT, "cursor.json: range %zu is not [start, count]", i);
    }
    *count = (uint32_t)n;
    if (ranges_normalise(r, count, err)) {
        err_prefix(err, "cursor.json");
        free(r);
        return -1;
    }
    *spent = r;
    return 0;
}

int cursor_parse(const struct ckpt_blob *blob, const struct ckpt_facts *f, struct msg_range **spent,
                 uint32_t *count, struct err *err) {
    static const char what[] = "cursor.json";
    uint64_t index, round, tokens;
    json_t *json = json_read(blob, what, err);
    if (!json) return -1;
    int r = check_format(json, FORMAT_CURSOR, what, err) ||
            json_u64(json, "ledger_index", what, &index, err) ||
            json_u64(json, "round", what, &round, err) ||
            json_u64(json, "tokens_committed", what, &tokens, err);
    if (!r && (index != f->index || round != f->round || tokens != f->tokens_committed))
        r = err_set(err, ERR_CORRUPT, "%s: of ledger index %" PRIu64 ", the manifest of %" PRIu64,
                    what, index, f->index);
    if (!r) r = parse_spent(json_object_get(json, "spent"), spent, count, err);
    json_decref(json);
    return r ? -1 : 0;
}

/* ---- latest ------------------------------------------------------------------------------------ */

int latest_format(const struct latest *l, struct ckpt_blob *out, struct err *err) {
    json_t *json = json_pack("{ss si ss sI so}", "format", FORMAT_LATEST, "version",
                             MANIFEST_VERSION, "checkpoint", l->prefix, "ledger_index",
                             (json_int_t)l->index, "manifest",
                             json_hex_new(l->manifest.b, sizeof l->manifest.b));
    return json_write(json, JSON_INDENT(1), out, err);
}

int latest_parse(const struct ckpt_blob *blob, struct latest *out, struct err *err) {
    static const char what[] = "latest";
    const char *prefix;
    json_t *json = json_read(blob, what, err);
    if (!json) return -1;
    int r = check_format(json, FORMAT_LATEST, what, err) ||
            json_u64(json, "ledger_index", what, &out->index, err) ||
            json_hex(json, "manifest", what, out->manifest.b, sizeof out->manifest.b, err) ||
            !(prefix = json_text(json, "checkpoint", what, err));
    if (!r && (!ckpt_name_valid(prefix) || strlen(prefix) > CKPT_PREFIX_BYTES_MAX))
        r = err_set(err, ERR_CORRUPT, "%s: \"%.64s\" cannot be a checkpoint's folder", what, prefix);
    if (!r) snprintf(out->prefix, sizeof out->prefix, "%s", prefix);
    json_decref(json);
    return r ? -1 : 0;
}

int latest_read(struct ckpt_store *s, struct latest *out, char version[CKPT_VERSION_BYTES_MAX + 1],
                struct err *err) {
    struct ckpt_object o;
    struct ckpt_blob blob;
    if (s->ops->stat(s, "latest", &o, err)) return -1;
    memcpy(version, o.version, sizeof o.version);
    if (object_read(s, "latest", CKPT_JSON_BYTES_MAX, &blob, err)) return -1;
    int r = latest_parse(&blob, out, err);
    free(blob.data);
    return r;
}

/* ---- ledger.bin -------------------------------------------------------------------------------- */

int ledger_format(const struct msg_signed_entry *entries, uint32_t count, struct ckpt_blob *out,
                  struct err *err) {
    size_t total = 0;
    for (uint32_t i = 0; i < count; i++) total += 4 + entries[i].bytes.length + PROTO_SIG_BYTES;
    if (total > CKPT_LEDGER_BYTES_MAX)
        return err_set(err, ERR_FULL, "ledger.bin: %zu bytes, at most %u fit", total, CKPT_LEDGER_BYTES_MAX);
    uint8_t *p = malloc(total + 1);
    if (!p) return err_set(err, ERR_MEMORY, "ledger.bin: out of memory for %zu bytes", total);
    *out = (struct ckpt_blob){p, total};
    for (uint32_t i = 0; i < count; i++) {
        uint32_t n = entries[i].bytes.length;
        for (int b = 0; b < 4; b++) *p++ = (uint8_t)(n >> 8 * b);
        memcpy(p, entries[i].bytes.data, n);
        memcpy(p + n, entries[i].signature.b, PROTO_SIG_BYTES);
        p += n + PROTO_SIG_BYTES;
    }
    return 0;
}

/* The entry at *at, which moves on; -1 when the bytes end too early. */
static int next_entry(const struct ckpt_blob *blob, size_t *at, struct msg_signed_entry *e) {
    const uint8_t *p = blob->data + *at;
    size_t left = blob->length - *at;
    if (left < 4) return -1;
    uint32_t n = (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
    if (n > PROTO_BLOB_BYTES_MAX || left < 4 + (size_t)n + PROTO_SIG_BYTES) return -1;
    e->bytes = (struct proto_bytes){p + 4, n};
    memcpy(e->signature.b, p + 4 + n, PROTO_SIG_BYTES);
    *at += 4 + (size_t)n + PROTO_SIG_BYTES;
    return 0;
}

int ledger_parse(const struct ckpt_blob *blob, struct msg_signed_entry **entries, uint32_t *count,
                 struct err *err) {
    struct msg_signed_entry e;
    uint32_t n = 0;
    size_t at = 0;
    for (; at < blob->length; n++)
        if (next_entry(blob, &at, &e))
            return err_set(err, ERR_CORRUPT, "ledger.bin: entry %u at byte %zu of %zu is cut off", n,
                           at, blob->length);
    *entries = calloc(n + 1u, sizeof **entries);
    if (!*entries) return err_set(err, ERR_MEMORY, "ledger.bin: out of memory for %u entries", n);
    at = 0;
    for (uint32_t i = 0; i < n; i++) next_entry(blob, &at, &(*entries)[i]);
    *count = n;
    return 0;
}

int ledger_check(const struct msg_signed_entry *entries, uint32_t count, uint64_t index,
                 struct digest *head, struct err *err) {
    if (count == 0 || count > index + 1)
        return err_set(err, ERR_CORRUPT, "ledger: %u entries up to index %" PRIu64, count, index);
    for (uint32_t i = 0; i < count; i++) {
        struct msg_entry e = {0};
        uint64_t expected = index - (count - 1 - i);
        if (proto_decode(entries[i].bytes.data, entries[i].bytes.length, RECORD_entry, &e, err)) {
            if (err) err->code = ERR_CORRUPT;
            err_prefix(err, "ledger: entry %" PRIu64, expected);
            return -1;
        }
        bool chained = i == 0 || digest_equal(&e.previous, head);
        uint64_t is = e.index;
        proto_decoded_release(RECORD_entry, &e);
        if (is != expected || !chained)
            return err_set(err, ERR_CORRUPT, "ledger: entry %" PRIu64 " where %" PRIu64
                           " was expected%s", is, expected, chained ? "" : ", not chained to it");
        *head = LEDGER_DIGEST(&entries[i]);
    }
    return 0;
}
