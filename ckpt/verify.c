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

/* ---- the state's root ------------------------------------------------------------------------------ */

/* A leaf covers a chunk of the anchor, then the same of the momentum: its stream waits in between. */
struct rooting {
    uint64_t elements, chunk_bytes;
    size_t chunks;
    struct digest_stream *stream;
    struct msg_digest_item *leaf;
    bool narrowed; /* the weights are the anchor in bf16: what they are, and what they should be */
    struct digest_stream weights, rounded;
    enum ckpt_which which; /* the vector that comes now, and of it: */
    uint64_t data, first, bytes; /* where in the file its data begins, and what of the vector that is */
};

static int begin_root(const struct ckpt *c, struct rooting *r, struct err *err) {
    const struct msg_genesis *g = &c->genesis;
    uint64_t chunk = g->outer_count == 1 ? g->outer->chunk_elements : 0;
    r->elements = proto_model_elements(&c->model);
    if (chunk == 0 || (r->elements - 1) / chunk >= PROTO_CHUNKS_MAX)
        return err_set(err, ERR_CORRUPT, "genesis.bin: %" PRIu64 " elements in chunks of %" PRIu64,
                       r->elements, chunk);
    r->chunk_bytes = chunk * 4;
    r->chunks = (size_t)((r->elements + chunk - 1) / chunk);
    r->stream = aligned_alloc(_Alignof(struct digest_stream), r->chunks * sizeof *r->stream);
    r->leaf = calloc(r->chunks, sizeof *r->leaf);
    if (!r->stream || !r->leaf)
        return err_set(err, ERR_MEMORY, "%.100s: out of memory for %zu digests", c->where, r->chunks);
    for (size_t i = 0; i < r->chunks; i++) digest_leaf_begin(&r->stream[i], i);
    r->narrowed = c->tensors[CKPT_WEIGHTS].file != c->tensors[CKPT_ANCHOR].file;
    digest_stream_init(&r->weights);
    digest_stream_init(&r->rounded);
    return 0;
}

static void end_root(struct rooting *r) {
    free(r->stream);
    free(r->leaf);
}

/* Blocks and the data in them begin at multiples of 4, so values come whole. */
static void root_rounded(struct rooting *r, const uint8_t *bytes, uint64_t n) {
    float wide[1024];
    uint16_t narrow[1024];
    for (uint64_t at = 0, take; at < n; at += take) {
        take = n - at < sizeof wide ? n - at : sizeof wide;
        memcpy(wide, bytes + at, take);
        safetensors_narrow(wide, narrow, take / 4);
        digest_stream_update(&r->rounded, narrow, take / 2);
    }
}

/* A block of a file: what of it is the vector's goes on in the leaf of its chunk. */
static int root_block(void *rooting, uint64_t offset, const void *data, size_t n, struct err *err) {
    struct rooting *r = rooting;
    const uint8_t *bytes = data;
    (void)err;
    uint64_t from = offset > r->data ? offset : r->data;
    uint64_t end = offset + n < r->data + r->bytes ? offset + n : r->data + r->bytes;
    if (from >= end) return 0;
    if (r->which == CKPT_WEIGHTS) digest_stream_update(&r->weights, bytes + (from - offset), end - from);
    if (r->which == CKPT_ANCHOR && r->narrowed) root_rounded(r, bytes + (from - offset), end - from);
    while (r->which != CKPT_WEIGHTS && from < end) {
        uint64_t at = r->first + (from - r->data), chunk = at / r->chunk_bytes;
        uint64_t left = (chunk + 1) * r->chunk_bytes - at;
        size_t take = (size_t)(end - from < left ? end - from : left);
        digest_stream_update(&r->stream[chunk], bytes + (from - offset), take);
        from += take;
    }
    return 0;
}

/* The range of the vector that a file is. It is one: tensors in canonical order, without gaps. */
static int root_file(const struct ckpt *c, struct rooting *r, uint32_t file, uint32_t *tensor,
                     struct err *err) {
    const struct tensors *t = &c->tensors[r->which];
    enum safetensors_dtype dtype = r->which == CKPT_WEIGHTS ? SAFETENSORS_BF16 : SAFETENSORS_F32;
    struct proto_tensor p;
    r->bytes = 0;
    for (; *tensor < proto_model_tensor_count(&c->model) && t->place[*tensor].file == file; ++*tensor) {
        const struct place *is = &t->place[*tensor];
        proto_model_tensor(&c->model, *tensor, &p);
        if (r->bytes == 0) r->data = is->offset, r->first = p.offset * safetensors_width(dtype);
        if (is->dtype != dtype || is->offset != r->data + r->bytes || r->data % 4)
            return err_set(err, ERR_CORRUPT, "%s: tensor %s is not %s behind the one before", t->file[file],
                           p.name, dtype == SAFETENSORS_F32 ? "F32" : "BF16");
        r->bytes += p.count * safetensors_width(dtype);
    }
    return 0;
}

static int check_root(const struct ckpt *c, struct rooting *r, struct err *err) {
    char ours[DIGEST_HEX_BYTES], theirs[DIGEST_HEX_BYTES];
    for (size_t i = 0; i < r->chunks; i++) r->leaf[i].digest = digest_stream_final(&r->stream[i]);
    struct digest root = digest_tree_root(r->leaf, r->chunks);
    if (digest_equal(&root, &c->manifest.facts.state_root)) return 0;
    digest_hex(&root, ours);
    digest_hex(&c->manifest.facts.state_root, theirs);
    return err_set(err, ERR_CORRUPT, "anchor and momentum have root %s, the manifest says %s", ours, theirs);
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
static int check_vector(const struct ckpt *c, struct rooting *r, struct checking *k, struct err *err) {
    const struct tensors *t = &c->tensors[r->which];
    uint32_t tensor = 0;
    for (uint32_t i = 0; i < t->file_count; i++)
        if (root_file(c, r, i, &tensor, err) ||
            check_named(c, manifest_find(&c->manifest, t->file[i]), k, err))
            return -1;
    if (tensor == proto_model_tensor_count(&c->model)) return 0;
    return err_set(err, ERR_CORRUPT, "%s: its tensors are not one range of the model's", t->file[0]);
}

static int check_narrowed(struct rooting *r, struct err *err) {
    struct digest is = digest_stream_final(&r->weights), want = digest_stream_final(&r->rounded);
    if (!r->narrowed || digest_equal(&is, &want)) return 0;
    return err_set(err, ERR_CORRUPT, "the weights are not the anchor rounded to bf16");
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

static int check_state(const struct ckpt *c, struct checking *k, struct err *err) {
    struct rooting r = {0};
    k->taker = root_block;
    k->to = &r;
    int rc = begin_root(c, &r, err);
    for (int which = r.narrowed ? CKPT_WEIGHTS : CKPT_ANCHOR; !rc && which <= CKPT_MOMENTUM; which++) {
        r.which = (enum ckpt_which)which;
        rc = check_vector(c, &r, k, err);
    }
    if (!rc) rc = check_root(c, &r, err) || check_narrowed(&r, err) ? -1 : 0;
    end_root(&r);
    return rc;
}

int ckpt_verify(const struct ckpt *c, ckpt_progress_fn *progress, void *arg, struct err *err) {
    struct checking k = {.progress = progress, .arg = arg};
    if (c->plain) return err_set(err, ERR_NOT_FOUND, "%.100s: a plain folder has no digests", c->where);
    for (uint32_t i = 0; i < c->manifest.count; i++) k.now.total += c->manifest.object[i].bytes;
    return check_rest(c, &k, err) || check_ledger(c, err) || check_state(c, &k, err) ? -1 : 0;
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
