/* verify.c - an open checkpoint against its manifest, everything read once: whole objects against their
 * digests, and on the way the tensors against the root of the state, and the weights against the anchor. */
#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "ckpt/opened.h"

/* ---- objects --------------------------------------------------------------------------------------- */

int checking_show(struct checking *k, uint64_t done, uint64_t read, struct err *err) {
    k->now.done = k->before + done;
    k->now.read += read;
    if (!k->progress || k->progress(k->arg, &k->now)) return 0;
    return err_set(err, ERR_REFUSED, "%.60s: given up", k->now.object);
}

int checking_block(void *checking, uint64_t offset, const void *data, size_t n, struct err *err) {
    struct checking *k = checking;
    digest_stream_update(&k->stream, data, n);
    if (checking_show(k, offset + n, n, err)) return -1;
    return k->taker ? k->taker(k->to, offset, data, n, err) : 0;
}

int checking_object(const struct ckpt *c, const char *name, uint64_t bytes, struct checking *k,
                    struct err *err) {
    char full[CKPT_NAME_BYTES_MAX + 1];
    const struct manifest_object *o = manifest_find(&c->manifest, name);
    k->now.object = name;
    object_name(c->prefix, name, full);
    digest_stream_init(&k->stream);
    if (object_stream(c->store, full, 0, bytes, checking_block, k, err)) return -1;
    struct digest is = digest_stream_final(&k->stream);
    return !o || digest_equal(&is, &o->digest) ? 0 : opened_wrong_digest(name, &is, &o->digest, err);
}

/* ---- a vector's files ------------------------------------------------------------------------------ */

/* The range of the vector that a file is. It is one: tensors in canonical order, without gaps. */
static int take_file(const struct ckpt *c, struct rooting *r, enum ckpt_which which, uint32_t file,
                     uint32_t *tensor, struct err *err) {
    const struct tensors *t = &c->tensors[which];
    enum safetensors_dtype dtype = which == CKPT_WEIGHTS ? SAFETENSORS_BF16 : SAFETENSORS_F32;
    uint64_t data = 0, first = 0, count = 0;
    struct proto_tensor p;
    for (; *tensor < proto_model_tensor_count(&c->model) && t->place[*tensor].file == file; ++*tensor) {
        const struct place *is = &t->place[*tensor];
        proto_model_tensor(&c->model, *tensor, &p);
        if (count == 0) data = is->offset, first = p.offset;
        if (is->dtype != dtype || is->offset != data + count * safetensors_width(dtype) || data % 4)
            return err_set(err, ERR_CORRUPT, "%s: tensor %s is not %s behind the one before", t->file[file],
                           p.name, dtype == SAFETENSORS_F32 ? "F32" : "BF16");
        count += p.count;
    }
    rooting_file(r, which, data, first, count);
    return 0;
}

/* ---- all of it ------------------------------------------------------------------------------------- */

static int check_named(const struct ckpt *c, const struct manifest_object *o, struct checking *k,
                       struct err *err) {
    k->now.object = o->name;
    if (checking_show(k, 0, 0, err) || checking_object(c, o->name, o->bytes, k, err)) return -1;
    k->before += o->bytes;
    return 0;
}

/* The files of a vector, in its order. */
static int check_vector(const struct ckpt *c, enum ckpt_which which, struct rooting *r, struct checking *k,
                        struct err *err) {
    const struct tensors *t = &c->tensors[which];
    uint32_t tensor = 0;
    for (uint32_t i = 0; i < t->file_count; i++)
        if (take_file(c, r, which, i, &tensor, err) ||
            check_named(c, manifest_find(&c->manifest, t->file[i]), k, err))
            return -1;
    if (tensor == proto_model_tensor_count(&c->model)) return 0;
    return err_set(err, ERR_CORRUPT, "%s: its tensors are not one range of the model's", t->file[0]);
}

static bool in_vector(const struct tensors *t, const char *name) {
    for (uint32_t i = 0; i < t->file_count; i++)
        if (!strcmp(t->file[i], name)) return true;
    return false;
}

static int check_rest(const struct ckpt *c, struct checking *k, struct err *err) {
    const struct manifest *m = &c->manifest;
    for (uint32_t i = 0; i < m->count; i++)
        if (!in_vector(&c->tensors[CKPT_WEIGHTS], m->object[i].name) &&
            !in_vector(&c->tensors[CKPT_ANCHOR], m->object[i].name) &&
            !in_vector(&c->tensors[CKPT_MOMENTUM], m->object[i].name) &&
            check_named(c, &m->object[i], k, err))
            return -1;
    return 0;
}

static int check_ledger(const struct ckpt *c, struct err *err) {
    struct ckpt_blob b;
    struct msg_signed_entry *entries = NULL;
    uint32_t count;
    struct digest head;
    if (opened_read(c, "ledger.bin", CKPT_LEDGER_BYTES_MAX, &b, err)) return -1;
    int r = ledger_parse(&b, &entries, &count, err) ||
            ledger_check(entries, count, c->manifest.facts.index, &head, err) ? -1 : 0;
    free(entries);
    free(b.data);
    if (r || digest_equal(&head, &c->manifest.facts.ledger_head)) return r;
    return opened_wrong_digest("ledger.bin: head", &head, &c->manifest.facts.ledger_head, err);
}

/* k's blocks go to r. */
static int check_state(const struct ckpt *c, struct rooting *r, struct checking *k, struct err *err) {
    bool narrowed = c->tensors[CKPT_WEIGHTS].file != c->tensors[CKPT_ANCHOR].file;
    int rc = rooting_begin(r, &c->genesis, narrowed, err);
    for (int which = narrowed ? CKPT_WEIGHTS : CKPT_ANCHOR; !rc && which <= CKPT_MOMENTUM; which++)
        rc = check_vector(c, (enum ckpt_which)which, r, k, err);
    if (!rc) rc = rooting_check(r, &c->manifest.facts.state_root, err);
    rooting_end(r);
    return rc;
}

int ckpt_verify(const struct ckpt *c, ckpt_progress_fn *progress, void *arg, struct err *err) {
    struct checking k = {.progress = progress, .arg = arg};
    struct rooting r;
    if (c->plain) return err_set(err, ERR_NOT_FOUND, "%.100s: a plain folder has no digests", c->where);
    for (uint32_t i = 0; i < c->manifest.count; i++) k.now.total += c->manifest.object[i].bytes;
    if (check_rest(c, &k, err) || check_ledger(c, err)) return -1;
    k.taker = rooting_block;
    k.to = &r;
    return check_state(c, &r, &k, err);
}

int ckpt_verify_vector(const struct ckpt *c, enum ckpt_which which, struct err *err) {
    const struct tensors *t = &c->tensors[which];
    struct checking k = {0};
    for (uint32_t i = 0; !c->plain && i < t->file_count; i++) {
        uint64_t bytes;
        if (opened_stat(c, t->file[i], &bytes, err) || checking_object(c, t->file[i], bytes, &k, err))
            return -1;
    }
    return 0;
}

/* ---- the root in other chunks ------------------------------------------------------------------------ */

#define ROOT_BYTES ((size_t)32 << 20) /* of anchor, and of momentum, read at a time; a chunk may be larger */

struct chunks {
    const struct ckpt *c;
    size_t each, at_once; /* elements of a chunk, chunks */
    float *anchor, *momentum;
    struct digest_piece *piece;
    struct msg_digest_item *leaf;
};

static int read_state(const struct chunks *k, uint64_t first, size_t n, struct err *err) {
    if (ckpt_read(k->c, CKPT_ANCHOR, first, n, k->anchor, err)) return -1;
    return k->c->plain ? 0 : ckpt_read(k->c, CKPT_MOMENTUM, first, n, k->momentum, err);
}

/* The leaves of some chunks from `chunk` on, which are n elements. */
static void hash_chunks(struct chunks *k, size_t chunk, size_t n) {
    size_t count = 0;
    for (size_t at = 0; at < n; at += k->each, count++) {
        size_t bytes = (n - at < k->each ? n - at : k->each) * sizeof(float);
        k->piece[count] = (struct digest_piece){.index = chunk + count, .a = k->anchor + at,
                                                .b = k->momentum + at, .a_length = bytes, .b_length = bytes};
    }
    digest_leaves(k->piece, count, 0);
    for (size_t i = 0; i < count; i++) k->leaf[chunk + i].digest = k->piece[i].leaf;
}

static int hash_state(struct chunks *k, uint64_t elements, struct err *err) {
    for (uint64_t first = 0, n; first < elements; first += n) {
        n = elements - first < k->at_once * k->each ? elements - first : k->at_once * k->each;
        if (read_state(k, first, (size_t)n, err)) return -1;
        hash_chunks(k, (size_t)(first / k->each), (size_t)n);
    }
    return 0;
}

int ckpt_root(const struct ckpt *c, uint32_t chunk_elements, struct digest *root, struct err *err) {
    uint64_t elements = proto_model_elements(&c->model);
    size_t count = (size_t)((elements + chunk_elements - 1) / chunk_elements);
    struct chunks k = {.c = c, .each = chunk_elements, .at_once = ROOT_BYTES / sizeof(float) / chunk_elements + 1};
    k.anchor = malloc(k.at_once * k.each * sizeof(float));
    k.momentum = calloc(k.at_once * k.each, sizeof(float));
    k.piece = calloc(k.at_once, sizeof *k.piece);
    k.leaf = calloc(count, sizeof *k.leaf);
    int r = k.anchor && k.momentum && k.piece && k.leaf
                ? hash_state(&k, elements, err)
                : err_set(err, ERR_MEMORY, "no memory for the digests of %.150s", c->where);
    if (!r) *root = digest_tree_root(k.leaf, count);
    free(k.anchor);
    free(k.momentum);
    free(k.piece);
    free(k.leaf);
    return r;
}
