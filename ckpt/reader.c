/* reader.c - opens a checkpoint or a plain Hugging Face folder, hands out element ranges of the
 * canonical vector, verifies, exports. Everything read here is hostile until it is checked: the
 * order in open_signed() is the order of trust. */
#include "ckpt/internal.h"

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Where a tensor of the canonical order lies. */
struct place {
    uint32_t file; /* index into struct tensors */
    enum safetensors_dtype dtype;
    uint64_t offset;
};

/* The safetensors files of anchor or momentum. */
struct tensors {
    char (*file)[CKPT_NAME_BYTES_MAX + 1]; /* without the prefix */
    uint32_t file_count;
    struct place *place; /* one per tensor; NULL where there is none */
};

struct ckpt {
    struct ckpt_store *store;
    char prefix[CKPT_PREFIX_BYTES_MAX + 1]; /* "" where the store is the checkpoint's folder */
    char where[PROTO_URL_BYTES_MAX + CKPT_PREFIX_BYTES_MAX + 2 + 513];
    bool plain;
    struct err unseen; /* code ERR_NONE: everything could be looked for */
    struct msg_model model;
    char tokenizer[65];
    struct tensors tensors[2]; /* by enum ckpt_which */

    struct manifest manifest; /* from here on: not of a plain folder */
    struct msg_genesis genesis;
    struct ckpt_blob genesis_bytes;
    struct msg_range *spent;
    uint32_t spent_count;
    struct ckpt_blob ledger_bytes;
    struct msg_signed_entry *ledger;
    uint32_t ledger_count;
};

static const char *const stems[] = {[CKPT_ANCHOR] = "model", [CKPT_MOMENTUM] = "momentum"};

/* ---- objects of this checkpoint ---------------------------------------------------------------- */

static int get(const struct ckpt *c, const char *name, uint64_t offset, void *out, size_t n,
               struct err *err) {
    char full[CKPT_NAME_BYTES_MAX + 1];
    object_name(c->prefix, name, full);
    return object_get(c->store, full, offset, out, n, err);
}

static int stat_bytes(const struct ckpt *c, const char *name, uint64_t *bytes, struct err *err) {
    char full[CKPT_NAME_BYTES_MAX + 1];
    struct ckpt_object o;
    object_name(c->prefix, name, full);
    if (c->store->ops->stat(c->store, full, &o, err)) return -1;
    *bytes = o.bytes;
    return 0;
}

/* Is there such an object? Where that cannot be told, for want of a right or a network, it counts as
 * absent, and why is kept: it is the reason then why there is no checkpoint. */
static bool has(struct ckpt *c, const char *name) {
    uint64_t bytes;
    struct err e = {0};
    if (!stat_bytes(c, name, &bytes, &e)) return true;
    if (e.code != ERR_NOT_FOUND && !c->unseen.code) c->unseen = e;
    return false;
}

static int read_any(const struct ckpt *c, const char *name, size_t bytes_max, struct ckpt_blob *out,
                    struct err *err) {
    char full[CKPT_NAME_BYTES_MAX + 1];
    object_name(c->prefix, name, full);
    return object_read(c->store, full, bytes_max, out, err);
}

static int wrong_digest(const char *name, const struct digest *is, const struct digest *want,
                        struct err *err) {
    char a[DIGEST_HEX_BYTES], b[DIGEST_HEX_BYTES];
    digest_hex(is, a);
    digest_hex(want, b);
    return err_set(err, ERR_CORRUPT, "%s: digest %.16s..., manifest says %.16s...", name, a, b);
}

/* A small object whole; of a checkpoint it must be in the manifest and have its digest. */
static int read_checked(const struct ckpt *c, const char *name, size_t bytes_max,
                        struct ckpt_blob *out, struct err *err) {
    const struct manifest_object *o = c->plain ? NULL : manifest_find(&c->manifest, name);
    if (!c->plain && !o) return err_set(err, ERR_CORRUPT, "manifest.json: no %s in it", name);
    if (read_any(c, name, bytes_max, out, err)) return -1;
    struct digest is = digest_of(out->data, out->length);
    if (!o || digest_equal(&is, &o->digest)) return 0;
    free(out->data);
    *out = (struct ckpt_blob){0};
    return wrong_digest(name, &is, &o->digest, err);
}

/* ---- tensors ----------------------------------------------------------------------------------- */

static int read_header(const struct ckpt *c, const char *name, struct safetensors *out,
                       struct err *err) {
    uint8_t first[8];
    uint64_t bytes;
    size_t length;
    if (stat_bytes(c, name, &bytes, err)) return -1;
    if (bytes < sizeof first)
        return err_set(err, ERR_TRUNCATED, "%s: %" PRIu64 " bytes are no safetensors file", name, bytes);
    if (get(c, name, 0, first, sizeof first, err) ||
        safetensors_header_length(first, bytes, name, &length, err))
        return -1;
    uint8_t *header = malloc(length + 1);
    if (!header) return err_set(err, ERR_MEMORY, "%s: out of memory for a header of %zu bytes", name, length);
    int r = get(c, name, 8, header, length, err) ||
            safetensors_parse(header, length, bytes, name, out, err) ? -1 : 0;
    free(header);
    return r;
}

/* Does the file's tensor have dtype and shape that the model needs? */
static int check_tensor(const struct safetensors_tensor *is, const struct proto_tensor *want,
                        const char *file, struct err *err) {
    if (is->dtype == SAFETENSORS_OTHER)
        return err_set(err, ERR_UNSUPPORTED, "%s: tensor %s: only F32, F16 and BF16 are read", file, want->name);
    bool same = is->dims == (uint32_t)want->dims;
    for (int i = 0; same && i < want->dims; i++) same = is->shape[i] == want->shape[i];
    if (same) return 0;
    return err_set(err, ERR_CORRUPT, "%s: tensor %s: shape [%" PRIu64 ",%" PRIu64 "] of %u dimensions, "
                   "config.json makes [%" PRIu64 ",%" PRIu64 "] of %d", file, want->name,
                   is->dims > 0 ? is->shape[0] : 1, is->dims > 1 ? is->shape[1] : 1, is->dims,
                   want->shape[0], want->dims > 1 ? want->shape[1] : 1, want->dims);
}

/* Which file each tensor is in: one name for all, or what the index says. */
static const char *file_of(const json_t *map, const char *stem, const char *tensor, char out[64],
                           struct err *err) {
    if (!map) {
        snprintf(out, 64, "%s.safetensors", stem);
        return out;
    }
    const char *name = json_string_value(json_object_get(map, tensor));
    if (!name)
        err_set(err, ERR_CORRUPT, "%s.safetensors.index.json: tensor %s is in no file", stem, tensor);
    else if (!ckpt_name_valid(name) || strchr(name, '/')) {
        err_set(err, ERR_CORRUPT, "%s.safetensors.index.json: \"%.64s\" cannot be a file's name", stem, name);
        return NULL;
    }
    return name;
}

/* The file in the table; added, and its header read, where it is new. -1 on failure. */
static int64_t find_file(const struct ckpt *c, struct tensors *t, struct safetensors *headers,
                         const char *name, struct err *err) {
    for (uint32_t i = t->file_count; i-- > 0;) /* the last one is the likely one */
        if (!strcmp(t->file[i], name)) return i;
    if (t->file_count == CKPT_OBJECTS_MAX)
        return err_set(err, ERR_FULL, "more than %u tensor files", CKPT_OBJECTS_MAX);
    if (!c->plain && !manifest_find(&c->manifest, name))
        return err_set(err, ERR_CORRUPT, "manifest.json: no %s in it", name);
    if (read_header(c, name, &headers[t->file_count], err)) return -1;
    snprintf(t->file[t->file_count], sizeof *t->file, "%s", name);
    return t->file_count++;
}

static int place_tensors(const struct ckpt *c, const char *stem, const json_t *map, struct tensors *t,
                         struct safetensors *headers, struct err *err) {
    uint32_t n = proto_model_tensor_count(&c->model);
    for (uint32_t i = 0; i < n; i++) {
        struct proto_tensor want;
        char buffer[64];
        proto_model_tensor(&c->model, i, &want);
        const char *name = file_of(map, stem, want.name, buffer, err);
        int64_t file = name ? find_file(c, t, headers, name, err) : -1;
        if (file < 0) return -1;
        const struct safetensors_tensor *is = safetensors_find(&headers[file], want.name);
        if (!is) return err_set(err, ERR_CORRUPT, "%s: tensor %s is missing", name, want.name);
        if (check_tensor(is, &want, name, err)) return -1;
        t->place[i] = (struct place){(uint32_t)file, is->dtype, is->offset};
    }
    return 0;
}

/* Find every tensor of anchor or momentum. A plain folder may have one file without an index. */
static int load_tensors(struct ckpt *c, enum ckpt_which which, struct err *err) {
    struct tensors *t = &c->tensors[which];
    struct safetensors *headers = calloc(CKPT_OBJECTS_MAX, sizeof *headers);
    struct ckpt_blob index = {0};
    json_t *json = NULL, *map = NULL;
    char name[64];
    int r = -1;
    t->file = calloc(CKPT_OBJECTS_MAX, sizeof *t->file);
    t->place = calloc(proto_model_tensor_count(&c->model), sizeof *t->place);
    if (!headers || !t->file || !t->place) {
        err_set(err, ERR_MEMORY, "%s: out of memory", c->where);
        goto out;
    }
    snprintf(name, sizeof name, "%s.safetensors.index.json", stems[which]);
    if (!c->plain || has(c, name)) {
        if (read_checked(c, name, CKPT_JSON_BYTES_MAX, &index, err)) goto out;
        if (!(json = json_read(&index, name, err))) goto out;
        if (!json_is_object(map = json_object_get(json, "weight_map"))) {
            err_set(err, ERR_CORRUPT, "%s: no weight_map", name);
            goto out;
        }
    }
    r = place_tensors(c, stems[which], map, t, headers, err);
out:
    for (uint32_t i = 0; headers && i < t->file_count; i++) safetensors_release(&headers[i]);
    free(headers);
    free(index.data);
    json_decref(json);
    return r;
}

/* ---- open -------------------------------------------------------------------------------------- */

/* The genesis is believed because the run is named by its digest. */
static int load_genesis(struct ckpt *c, const struct digest *run, struct digest *is, struct err *err) {
    char a[DIGEST_HEX_BYTES], b[DIGEST_HEX_BYTES];
    if (read_any(c, "genesis.bin", PROTO_BLOB_BYTES_MAX, &c->genesis_bytes, err)) return -1;
    *is = digest_of(c->genesis_bytes.data, c->genesis_bytes.length);
    if (run && !digest_equal(is, run)) {
        digest_hex(is, a);
        digest_hex(run, b);
        return err_set(err, ERR_REFUSED, "checkpoint of run %.16s..., expected run %.16s...", a, b);
    }
    if (proto_decode(c->genesis_bytes.data, c->genesis_bytes.length, RECORD_genesis, &c->genesis, err)) {
        if (err) err->code = ERR_CORRUPT;
        err_prefix(err, "genesis.bin");
        return -1;
    }
    if (c->genesis.model_count == 1) return 0;
    return err_set(err, ERR_CORRUPT, "genesis.bin: %u models", c->genesis.model_count);
}

/* The manifest is believed when the root key in the genesis stands for it. */
static int load_manifest(struct ckpt *c, const struct digest *run, struct err *err) {
    struct ckpt_blob manifest = {0}, sig = {0};
    struct manifest_sig s = {0};
    int r = read_any(c, "manifest.json", CKPT_MANIFEST_BYTES_MAX, &manifest, err) ||
            read_any(c, "manifest.sig", CKPT_JSON_BYTES_MAX, &sig, err) ||
            manifest_sig_parse(&sig, &s, err) ||
            manifest_sig_check(&s, &c->genesis, run, &manifest, err) ||
            manifest_parse(&manifest, &c->manifest, err);
    if (!r) {
        c->manifest.facts.signer = s.key;
        c->manifest.facts.term = s.term;
        snprintf(c->tokenizer, sizeof c->tokenizer, "%s", c->manifest.tokenizer);
        if (!digest_equal(&c->manifest.facts.run, run))
            r = err_set(err, ERR_CORRUPT, "manifest.json: names another run than genesis.bin");
    }
    manifest_sig_release(&s);
    free(sig.data);
    free(manifest.data);
    return r ? -1 : 0;
}

static int check_sizes(const struct ckpt *c, struct err *err) {
    for (uint32_t i = 0; i < c->manifest.count; i++) {
        const struct manifest_object *o = &c->manifest.object[i];
        uint64_t bytes;
        if (stat_bytes(c, o->name, &bytes, err)) return -1;
        if (bytes != o->bytes)
            return err_set(err, bytes < o->bytes ? ERR_TRUNCATED : ERR_CORRUPT,
                           "%s: %" PRIu64 " bytes, manifest says %" PRIu64, o->name, bytes, o->bytes);
    }
    return 0;
}

static int load_config(struct ckpt *c, struct err *err) {
    struct ckpt_blob b;
    if (read_checked(c, "config.json", CKPT_JSON_BYTES_MAX, &b, err)) return -1;
    int r = hf_config_parse(&b, "config.json", &c->model, err);
    free(b.data);
    if (!r && !c->plain && !proto_model_equal(&c->model, c->genesis.model))
        return err_set(err, ERR_CORRUPT, "config.json: another model than genesis.bin has");
    return r;
}

static int load_cursor(struct ckpt *c, struct err *err) {
    struct ckpt_blob b;
    if (read_checked(c, "cursor.json", CKPT_JSON_BYTES_MAX, &b, err)) return -1;
    int r = cursor_parse(&b, &c->manifest.facts, &c->spent, &c->spent_count, err);
    free(b.data);
    return r;
}

static int open_signed(struct ckpt *c, const struct digest *run, struct err *err) {
    struct digest is;
    return load_genesis(c, run, &is, err) || load_manifest(c, &is, err) || check_sizes(c, err) ||
           load_config(c, err) || load_cursor(c, err) || load_tensors(c, CKPT_ANCHOR, err) ||
           load_tensors(c, CKPT_MOMENTUM, err) ? -1 : 0;
}

/* An unfinished checkpoint has a config.json too; its state's other parts give it away. */
static int open_plain(struct ckpt *c, const struct digest *run, struct err *err) {
    static const char *const parts[] = {"genesis.bin", "claim", "cursor.json", "manifest.sig"};
    struct ckpt_blob b;
    c->plain = true;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (has(c, parts[i]))
            return err_set(err, ERR_NOT_FOUND, "%s but no manifest.json: a checkpoint that was not finished",
                           parts[i]);
    bool config = has(c, "config.json");
    if (c->unseen.code && c->unseen.code != ERR_REFUSED) { /* it may be a checkpoint for all we know */
        if (err) *err = c->unseen;
        return -1;
    }
    if (!config)
        return err_set(err, ERR_NOT_FOUND, "no manifest.json, no latest, no config.json: no checkpoint here");
    if (run) return err_set(err, ERR_REFUSED, "a plain model folder belongs to no run");
    if (load_config(c, err)) return -1;
    if (has(c, "tokenizer_config.json")) {
        if (read_any(c, "tokenizer_config.json", CKPT_JSON_BYTES_MAX, &b, err)) return -1;
        hf_tokenizer_name(&b, c->tokenizer);
        free(b.data);
    }
    return load_tensors(c, CKPT_ANCHOR, err);
}

/* A store's root: go to the folder that `latest` names. */
static int open_latest(struct ckpt *c, const struct digest *run, struct err *err) {
    struct latest l;
    char version[CKPT_VERSION_BYTES_MAX + 1];
    if (latest_read(c->store, &l, version, err)) return -1;
    memcpy(c->prefix, l.prefix, sizeof c->prefix);
    snprintf(c->where, sizeof c->where, "%s/%s%s", c->store->url, c->prefix, c->store->query);
    if (!has(c, "manifest.json"))
        return err_set(err, ERR_NOT_FOUND, "`latest` names it, but it has no manifest.json");
    if (open_signed(c, run, err)) return -1;
    if (digest_equal(&l.manifest, &c->manifest.facts.manifest)) return 0;
    return err_set(err, ERR_CORRUPT, "manifest.json: not the one that `latest` names");
}

struct ckpt *ckpt_open(const char *url, const struct digest *run, struct err *err) {
    struct ckpt *c = calloc(1, sizeof *c);
    if (!c) {
        err_set(err, ERR_MEMORY, "%.100s: out of memory", url);
        return NULL;
    }
    int r = -1;
    if ((c->store = ckpt_store_open(url, false, err))) {
        snprintf(c->where, sizeof c->where, "%s%s", c->store->url, c->store->query);
        r = has(c, "manifest.json") ? open_signed(c, run, err)
          : has(c, "latest")        ? open_latest(c, run, err)
                                    : open_plain(c, run, err);
        if (r && err && err->code == ERR_NOT_FOUND && c->unseen.code) *err = c->unseen;
        if (r && !c->store->remote) err_prefix(err, "%.100s", c->where); /* the others name it themselves */
    }
    if (!r) return c;
    ckpt_close(c);
    return NULL;
}

void ckpt_close(struct ckpt *c) {
    if (!c) return;
    for (int i = 0; i < 2; i++) {
        free(c->tensors[i].file);
        free(c->tensors[i].place);
    }
    manifest_release(&c->manifest);
    proto_decoded_release(RECORD_genesis, &c->genesis);
    free(c->genesis_bytes.data);
    free(c->spent);
    free(c->ledger);
    free(c->ledger_bytes.data);
    if (c->store) c->store->ops->close(c->store);
    free(c);
}

/* ---- what it says ------------------------------------------------------------------------------ */

bool ckpt_is_plain(const struct ckpt *c) { return c->plain; }
const char *ckpt_where(const struct ckpt *c) { return c->where; }
const struct msg_model *ckpt_model(const struct ckpt *c) { return &c->model; }
const char *ckpt_tokenizer(const struct ckpt *c) { return c->tokenizer; }

const struct ckpt_facts *ckpt_facts(const struct ckpt *c) {
    assert(!c->plain);
    return &c->manifest.facts;
}

const struct msg_genesis *ckpt_genesis(const struct ckpt *c) { return c->plain ? NULL : &c->genesis; }

struct proto_bytes ckpt_genesis_bytes(const struct ckpt *c) {
    return (struct proto_bytes){c->genesis_bytes.data, (uint32_t)c->genesis_bytes.length};
}

const struct msg_range *ckpt_spent(const struct ckpt *c, uint32_t *count) {
    *count = c->spent_count;
    return c->spent;
}

int ckpt_ledger(struct ckpt *c, const struct msg_signed_entry **entries, uint32_t *count,
                struct err *err) {
    if (c->plain) return err_set(err, ERR_NOT_FOUND, "%.100s: a plain folder has no ledger", c->where);
    if (!c->ledger) {
        if (!c->ledger_bytes.data &&
            read_checked(c, "ledger.bin", CKPT_LEDGER_BYTES_MAX, &c->ledger_bytes, err))
            return -1;
        if (ledger_parse(&c->ledger_bytes, &c->ledger, &c->ledger_count, err)) return -1;
    }
    *entries = c->ledger;
    *count = c->ledger_count;
    return 0;
}

/* ---- read -------------------------------------------------------------------------------------- */

int ckpt_read(const struct ckpt *c, enum ckpt_which which, uint64_t first, size_t n, float *out,
              struct err *err) {
    const struct tensors *t = &c->tensors[which];
    uint64_t elements = proto_model_elements(&c->model);
    assert(first <= elements && n <= elements - first);
    if (!t->place) return err_set(err, ERR_NOT_FOUND, "%.100s: a plain folder has no momentum", c->where);
    for (uint32_t i = n ? proto_model_tensor_at(&c->model, first) : 0; n > 0; i++) {
        struct proto_tensor tensor;
        proto_model_tensor(&c->model, i, &tensor);
        const struct place *p = &t->place[i];
        uint64_t skip = first - tensor.offset, left = tensor.count - skip;
        size_t part = n < left ? n : (size_t)left;
        size_t width = p->dtype == SAFETENSORS_F32 ? 4 : 2;
        uint8_t *to = (uint8_t *)out + part * (4 - width); /* halves are widened in place */
        if (get(c, t->file[p->file], p->offset + skip * width, to, part * width, err)) return -1;
        if (width == 2) safetensors_widen(p->dtype, out, part);
        first += part;
        out += part;
        n -= part;
    }
    return 0;
}

/* ---- verify and export ------------------------------------------------------------------------- */

struct checking {
    struct digest_stream stream;
    const char *object;
    uint64_t before, total; /* bytes of the objects before this one, and of all */
    void (*progress)(void *arg, const char *object, uint64_t done, uint64_t total);
    void *arg;
    const struct ckpt_store_ops *ops; /* export: where the copy goes */
    struct ckpt_upload *copy;
};

static int check_block(void *arg, uint64_t offset, const void *data, size_t n, struct err *err) {
    struct checking *k = arg;
    digest_stream_update(&k->stream, data, n);
    if (k->progress) k->progress(k->arg, k->object, k->before + offset + n, k->total);
    return k->copy ? k->ops->upload_put(k->copy, offset, data, n, err) : 0;
}

/* Stream one object and compare its digest, where there is one. */
static int check_object(const struct ckpt *c, const char *name, uint64_t bytes, struct checking *k,
                        struct err *err) {
    char full[CKPT_NAME_BYTES_MAX + 1];
    const struct manifest_object *o = manifest_find(&c->manifest, name);
    k->object = name;
    object_name(c->prefix, name, full);
    digest_stream_init(&k->stream);
    if (object_stream(c->store, full, 0, bytes, check_block, k, err)) return -1;
    struct digest is = digest_stream_final(&k->stream);
    return !o || digest_equal(&is, &o->digest) ? 0 : wrong_digest(name, &is, &o->digest, err);
}

static int check_ledger(const struct ckpt *c, struct err *err) {
    struct ckpt_blob b;
    struct msg_signed_entry *entries = NULL;
    uint32_t count;
    struct digest head;
    if (read_checked(c, "ledger.bin", CKPT_LEDGER_BYTES_MAX, &b, err)) return -1;
    int r = ledger_parse(&b, &entries, &count, err) ||
            ledger_check(entries, count, c->manifest.facts.index, &head, err) ? -1 : 0;
    free(entries);
    free(b.data);
    if (r || digest_equal(&head, &c->manifest.facts.ledger_head)) return r;
    return wrong_digest("ledger.bin: head", &head, &c->manifest.facts.ledger_head, err);
}

int ckpt_verify(const struct ckpt *c,
                void (*progress)(void *arg, const char *object, uint64_t done, uint64_t total),
                void *arg, struct err *err) {
    struct checking k = {.progress = progress, .arg = arg};
    const struct manifest *m = &c->manifest;
    if (c->plain) return err_set(err, ERR_NOT_FOUND, "%.100s: a plain folder has no digests", c->where);
    for (uint32_t i = 0; i < m->count; i++) k.total += m->object[i].bytes;
    for (uint32_t i = 0; i < m->count; k.before += m->object[i++].bytes) {
        if (progress) progress(arg, m->object[i].name, k.before, k.total);
        if (check_object(c, m->object[i].name, m->object[i].bytes, &k, err)) return -1;
    }
    return check_ledger(c, err);
}

int ckpt_verify_vector(const struct ckpt *c, enum ckpt_which which, struct err *err) {
    const struct tensors *t = &c->tensors[which];
    struct checking k = {0};
    for (uint32_t i = 0; !c->plain && i < t->file_count; i++) {
        uint64_t bytes;
        if (stat_bytes(c, t->file[i], &bytes, err) || check_object(c, t->file[i], bytes, &k, err)) return -1;
    }
    return 0;
}

static int export_object(const struct ckpt *c, struct ckpt_store *to, const char *name,
                         struct err *err) {
    struct checking k = {.ops = to->ops};
    uint64_t bytes;
    if (stat_bytes(c, name, &bytes, err)) return -1;
    k.copy = to->ops->upload_begin(to, name, bytes, err);
    if (!k.copy) return -1;
    int r = check_object(c, name, bytes, &k, err) || to->ops->upload_complete(k.copy, err) ? -1 : 0;
    to->ops->upload_destroy(k.copy);
    return r;
}

/* The index only makes sense where it was: a plain folder may have one file without it. */
static const char *const hf_names[] = {
    "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.json", "merges.txt",
};

static int export_all(const struct ckpt *c, struct ckpt_store *to, struct err *err) {
    const struct tensors *t = &c->tensors[CKPT_ANCHOR];
    uint64_t ignored;
    for (size_t i = 0; i < sizeof hf_names / sizeof *hf_names; i++)
        if ((c->plain ? !stat_bytes(c, hf_names[i], &ignored, NULL) : !!manifest_find(&c->manifest, hf_names[i])) &&
            export_object(c, to, hf_names[i], err))
            return -1;
    for (uint32_t i = 0; i < t->file_count; i++)
        if (export_object(c, to, t->file[i], err)) return -1;
    return 0;
}

static int check_empty(const char *dir, struct err *err) {
    DIR *d = opendir(dir);
    if (!d) return errno == ENOENT ? 0 : err_set_errno(err, "%s", dir);
    int r = 0;
    for (struct dirent *e; !r && (e = readdir(d));)
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, ".."))
            r = err_set(err, ERR_REFUSED, "%.100s: has \"%.64s\" in it; give a new or empty folder", dir, e->d_name);
    closedir(d);
    return r;
}

int ckpt_export(const struct ckpt *c, const char *dir, struct err *err) {
    if (check_empty(dir, err)) return -1;
    struct ckpt_store *to = ckpt_store_open(dir, true, err);
    if (!to) return -1;
    int r = export_all(c, to, err);
    if (r) object_remove_all(to, "", NULL);
    to->ops->close(to);
    return r;
}
