/* reader.c - opens a checkpoint or a plain Hugging Face folder and hands out element ranges of the
 * canonical vector. Everything read here is hostile until it is checked: the order in open_signed()
 * is the order of trust. */
#include "ckpt/opened.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const stems[] = {[CKPT_WEIGHTS] = "model", [CKPT_ANCHOR] = "anchor",
                                     [CKPT_MOMENTUM] = "momentum"};

/* ---- objects of this checkpoint ---------------------------------------------------------------- */

static int get(const struct ckpt *c, const char *name, uint64_t offset, void *out, size_t n,
               struct err *err) {
    char full[CKPT_NAME_BYTES_MAX + 1];
    object_name(c->prefix, name, full);
    return object_get(c->store, full, offset, out, n, err);
}

int opened_stat(const struct ckpt *c, const char *name, uint64_t *bytes, struct err *err) {
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
    if (c->unseen.code == ERR_TIMEOUT) return false; /* not to wait for the same again */
    if (!opened_stat(c, name, &bytes, &e)) return true;
    if (e.code != ERR_NOT_FOUND && !c->unseen.code) c->unseen = e;
    return false;
}

static int read_any(const struct ckpt *c, const char *name, size_t bytes_max, struct ckpt_blob *out,
                    struct err *err) {
    char full[CKPT_NAME_BYTES_MAX + 1];
    object_name(c->prefix, name, full);
    return object_read(c->store, full, bytes_max, out, err);
}

int opened_wrong_digest(const char *name, const struct digest *is, const struct digest *want,
                        struct err *err) {
    char a[DIGEST_HEX_BYTES], b[DIGEST_HEX_BYTES];
    digest_hex(is, a);
    digest_hex(want, b);
    return err_set(err, ERR_CORRUPT, "%s: digest %.16s..., manifest says %.16s...", name, a, b);
}

int opened_read(const struct ckpt *c, const char *name, size_t bytes_max,
                        struct ckpt_blob *out, struct err *err) {
    const struct manifest_object *o = c->plain ? NULL : manifest_find(&c->manifest, name);
    if (!c->plain && !o) return err_set(err, ERR_CORRUPT, "manifest.json: no %s in it", name);
    if (read_any(c, name, bytes_max, out, err)) return -1;
    struct digest is = digest_of(out->data, out->length);
    if (!o || digest_equal(&is, &o->digest)) return 0;
    free(out->data);
    *out = (struct ckpt_blob){0};
    return opened_wrong_digest(name, &is, &o->digest, err);
}

/* ---- tensors ----------------------------------------------------------------------------------- */

static int read_header(const struct ckpt *c, const char *name, struct safetensors *out,
                       struct err *err) {
    uint8_t first[8];
    uint64_t bytes;
    size_t length;
    if (opened_stat(c, name, &bytes, err)) return -1;
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

/* Find every tensor of a vector. A plain folder may have one file without an index. */
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
        if (opened_read(c, name, CKPT_JSON_BYTES_MAX, &index, err)) goto out;
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
    struct ckpt_blob *manifest = &c->manifest_bytes, *sig = &c->sig_bytes;
    struct manifest_sig s = {0};
    int r = read_any(c, "manifest.json", CKPT_MANIFEST_BYTES_MAX, manifest, err) ||
            read_any(c, "manifest.sig", CKPT_JSON_BYTES_MAX, sig, err) ||
            manifest_sig_parse(sig, &s, err) ||
            manifest_sig_check(&s, &c->genesis, run, manifest, err) ||
            manifest_parse(manifest, &c->manifest, err);
    if (!r) {
        c->manifest.facts.signer = s.key;
        c->manifest.facts.term = s.term;
        snprintf(c->tokenizer, sizeof c->tokenizer, "%s", c->manifest.tokenizer);
        if (!digest_equal(&c->manifest.facts.run, run))
            r = err_set(err, ERR_CORRUPT, "manifest.json: names another run than genesis.bin");
    }
    manifest_sig_release(&s);
    return r ? -1 : 0;
}

static int check_sizes(const struct ckpt *c, struct err *err) {
    for (uint32_t i = 0; i < c->manifest.count; i++) {
        const struct manifest_object *o = &c->manifest.object[i];
        uint64_t bytes;
        if (opened_stat(c, o->name, &bytes, err)) return -1;
        if (bytes != o->bytes)
            return err_set(err, bytes < o->bytes ? ERR_TRUNCATED : ERR_CORRUPT,
                           "%s: %" PRIu64 " bytes, manifest says %" PRIu64, o->name, bytes, o->bytes);
    }
    return 0;
}

static int load_config(struct ckpt *c, struct err *err) {
    struct ckpt_blob b;
    if (opened_read(c, "config.json", CKPT_JSON_BYTES_MAX, &b, err)) return -1;
    int r = hf_config_parse(&b, "config.json", &c->model, err);
    free(b.data);
    if (!r && !c->plain && !proto_model_equal(&c->model, c->genesis.model))
        return err_set(err, ERR_CORRUPT, "config.json: another model than genesis.bin has");
    return r;
}

static int load_cursor(struct ckpt *c, struct err *err) {
    struct ckpt_blob b;
    if (opened_read(c, "cursor.json", CKPT_JSON_BYTES_MAX, &b, err)) return -1;
    int r = cursor_parse(&b, &c->manifest.facts, &c->spent, &c->spent_count, err);
    free(b.data);
    return r;
}

/* The anchor is in files of its own, or is the weights. */
static int load_vectors(struct ckpt *c, struct err *err) {
    if (load_tensors(c, CKPT_WEIGHTS, err)) return -1;
    if (!c->plain && manifest_find(&c->manifest, "anchor.safetensors.index.json"))
        return load_tensors(c, CKPT_ANCHOR, err);
    c->tensors[CKPT_ANCHOR] = c->tensors[CKPT_WEIGHTS];
    return 0;
}

static int open_signed(struct ckpt *c, const struct digest *run, struct err *err) {
    struct digest is;
    return load_genesis(c, run, &is, err) || load_manifest(c, &is, err) || check_sizes(c, err) ||
           load_config(c, err) || load_cursor(c, err) || load_vectors(c, err) ||
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
    return load_vectors(c, err);
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

struct ckpt *ckpt_open_at(struct ckpt_store *store, const struct digest *run, struct err *err) {
    struct ckpt *c = calloc(1, sizeof *c);
    if (!c) {
        err_set(err, ERR_MEMORY, "%.100s: out of memory", store->url);
        return NULL;
    }
    c->store = store;
    c->borrowed = true;
    snprintf(c->where, sizeof c->where, "%s%s", c->store->url, c->store->query);
    int r = has(c, "manifest.json") ? open_signed(c, run, err)
          : has(c, "latest")        ? open_latest(c, run, err)
                                    : open_plain(c, run, err);
    if (!r) return c;
    if (err && err->code == ERR_NOT_FOUND && c->unseen.code) *err = c->unseen;
    if (err && !strstr(err->msg, c->store->url)) err_prefix(err, "%.100s", c->where);
    ckpt_close(c);
    return NULL;
}

struct ckpt *ckpt_open(const char *url, const struct digest *run, struct err *err) {
    struct ckpt_store *store = ckpt_store_open(url, false, err);
    struct ckpt *c = store ? ckpt_open_at(store, run, err) : NULL;
    if (c) c->borrowed = false;
    else if (store) store->ops->close(store);
    return c;
}

void ckpt_close(struct ckpt *c) {
    if (!c) return;
    for (int i = 0; i < 3; i++) {
        if (i == CKPT_ANCHOR && c->tensors[i].file == c->tensors[CKPT_WEIGHTS].file) continue;
        free(c->tensors[i].file);
        free(c->tensors[i].place);
    }
    manifest_release(&c->manifest);
    free(c->manifest_bytes.data);
    free(c->sig_bytes.data);
    proto_decoded_release(RECORD_genesis, &c->genesis);
    free(c->genesis_bytes.data);
    free(c->spent);
    free(c->ledger);
    free(c->ledger_bytes.data);
    if (!c->borrowed) c->store->ops->close(c->store);
    free(c);
}

/* ---- what it says ------------------------------------------------------------------------------ */

bool ckpt_is_plain(const struct ckpt *c) { return c->plain; }
const char *ckpt_where(const struct ckpt *c) { return c->where; }
const struct msg_model *ckpt_model(const struct ckpt *c) { return &c->model; }
const char *ckpt_weights_name(const struct ckpt *c) {
    enum safetensors_dtype dtype = c->tensors[CKPT_WEIGHTS].place[0].dtype;
    return dtype == SAFETENSORS_F32 ? "fp32" : dtype == SAFETENSORS_F16 ? "fp16" : "bf16";
}

const char *ckpt_tokenizer(const struct ckpt *c) { return c->tokenizer; }

const struct ckpt_facts *ckpt_facts(const struct ckpt *c) {
    assert(!c->plain);
    return &c->manifest.facts;
}

int ckpt_tokenizer_json(const struct ckpt *c, char **json, size_t *n, struct err *err) {
    struct ckpt_blob b;
    if (!c->plain && !manifest_find(&c->manifest, "tokenizer.json"))
        return err_set(err, ERR_NOT_FOUND, "%.150s has no tokenizer.json", c->where);
    if (opened_read(c, "tokenizer.json", CKPT_TOKENIZER_JSON_BYTES_MAX, &b, err)) return -1;
    *json = (char *)b.data;
    *n = b.length;
    return 0;
}

const struct msg_genesis *ckpt_genesis(const struct ckpt *c) { return c->plain ? NULL : &c->genesis; }

struct proto_bytes ckpt_genesis_bytes(const struct ckpt *c) {
    return (struct proto_bytes){c->genesis_bytes.data, (uint32_t)c->genesis_bytes.length};
}

uint32_t ckpt_object_count(const struct ckpt *c) { return c->manifest.count; }

const char *ckpt_object(const struct ckpt *c, uint32_t i, uint64_t *bytes, struct digest *digest) {
    assert(i < c->manifest.count);
    *bytes = c->manifest.object[i].bytes;
    *digest = c->manifest.object[i].digest;
    return c->manifest.object[i].name;
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
            opened_read(c, "ledger.bin", CKPT_LEDGER_BYTES_MAX, &c->ledger_bytes, err))
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
        size_t width = safetensors_width(p->dtype);
        uint8_t *to = (uint8_t *)out + part * (4 - width); /* halves are widened in place */
        if (get(c, t->file[p->file], p->offset + skip * width, to, part * width, err)) return -1;
        if (width == 2) safetensors_widen(p->dtype, out, part);
        first += part;
        out += part;
        n -= part;
    }
    return 0;
}
