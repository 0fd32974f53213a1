/* root.c - the root of a state, and bf16 weights beside their anchor, from the files of a checkpoint as
 * they pass by once. A leaf of the digest tree covers a chunk of the anchor and the same of the momentum,
 * which lie in different files: its digest stays open from the one to the other. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "ckpt/internal.h"

int rooting_begin(struct rooting *r, const struct msg_genesis *g, bool narrowed, struct err *err) {
    uint64_t chunk = g->outer_count == 1 ? g->outer->chunk_elements : 0;
    uint64_t elements = proto_model_elements(g->model);
    *r = (struct rooting){.narrowed = narrowed, .chunk_bytes = chunk * 4};
    if (chunk == 0 || (elements - 1) / chunk >= PROTO_CHUNKS_MAX)
        return err_set(err, ERR_CORRUPT, "genesis: %" PRIu64 " elements in chunks of %" PRIu64, elements,
                       chunk);
    r->chunks = (size_t)((elements - 1) / chunk) + 1;
    r->stream = aligned_alloc(_Alignof(struct digest_stream), r->chunks * sizeof *r->stream);
    r->leaf = calloc(r->chunks, sizeof *r->leaf);
    if (!r->stream || !r->leaf) return err_set(err, ERR_MEMORY, "out of memory for %zu digests", r->chunks);
    for (size_t i = 0; i < r->chunks; i++) digest_leaf_begin(&r->stream[i], i);
    digest_stream_init(&r->weights);
    digest_stream_init(&r->rounded);
    return 0;
}

void rooting_end(struct rooting *r) {
    free(r->stream);
    free(r->leaf);
    r->stream = NULL;
    r->leaf = NULL;
}

void rooting_file(struct rooting *r, enum ckpt_which which, uint64_t data, uint64_t first, uint64_t count) {
    uint64_t width = which == CKPT_WEIGHTS ? 2 : 4;
    r->which = which;
    r->data = data;
    r->first = first * width;
    r->bytes = count * width;
}

/* Blocks, and the data in them, begin at multiples of 4: values come whole. */
static void take_rounded(struct rooting *r, const uint8_t *bytes, uint64_t n) {
    float wide[1024];
    uint16_t narrow[1024];
    for (uint64_t at = 0, take; at < n; at += take) {
        take = n - at < sizeof wide ? n - at : sizeof wide;
        memcpy(wide, bytes + at, take);
        safetensors_narrow(wide, narrow, take / 4);
        digest_stream_update(&r->rounded, narrow, take / 2);
    }
}

static void take_leaves(struct rooting *r, uint64_t at, const uint8_t *bytes, uint64_t n) {
    for (uint64_t take; n > 0; at += take, bytes += take, n -= take) {
        uint64_t chunk = at / r->chunk_bytes, left = (chunk + 1) * r->chunk_bytes - at;
        take = n < left ? n : left;
        digest_stream_update(&r->stream[chunk], bytes, take);
    }
}

int rooting_block(void *rooting, uint64_t offset, const void *data, size_t n, struct err *err) {
    struct rooting *r = rooting;
    (void)err;
    uint64_t from = offset > r->data ? offset : r->data;
    uint64_t end = offset + n < r->data + r->bytes ? offset + n : r->data + r->bytes;
    if (from >= end) return 0;
    const uint8_t *bytes = (const uint8_t *)data + (from - offset);
    if (r->which == CKPT_WEIGHTS) digest_stream_update(&r->weights, bytes, end - from);
    else take_leaves(r, r->first + (from - r->data), bytes, end - from);
    if (r->which == CKPT_ANCHOR && r->narrowed) take_rounded(r, bytes, end - from);
    return 0;
}

int rooting_check(struct rooting *r, const struct digest *want, struct err *err) {
    char ours[DIGEST_HEX_BYTES], theirs[DIGEST_HEX_BYTES];
    for (size_t i = 0; i < r->chunks; i++) r->leaf[i].digest = digest_stream_final(&r->stream[i]);
    struct digest root = digest_tree_root(r->leaf, r->chunks);
    struct digest is = digest_stream_final(&r->weights), rounded = digest_stream_final(&r->rounded);
    digest_hex(&root, ours);
    digest_hex(want, theirs);
    if (!digest_equal(&root, want))
        return err_set(err, ERR_CORRUPT, "anchor and momentum have root %s, it should be %s", ours, theirs);
    if (!r->narrowed || digest_equal(&is, &rounded)) return 0;
    return err_set(err, ERR_CORRUPT, "the weights are not the anchor rounded to bf16");
}
