/* origin.c - the state of a seed or of a checkpoint; see origin.h. */
#include "node/origin.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "ckpt/ckpt.h"
#include "node/model.h"
#include "node/timer.h"
#include "proto/model.h"

struct origin {
    const struct msg_genesis *genesis;
    bool network; /* stores behind one are read too */
    /* The checkpoint that was asked for last, by its manifest; open or failed. */
    bool asked;
    struct digest manifest;
    struct ckpt *ckpt;
    struct err failed;
    uint64_t failed_at_ms;
};

struct origin *origin_create(const struct msg_genesis *genesis, bool network) {
    struct origin *o = calloc(1, sizeof *o);
    if (!o) return NULL;
    o->genesis = genesis;
    o->network = network;
    return o;
}

void origin_destroy(struct origin *o) {
    if (!o) return;
    ckpt_close(o->ckpt);
    free(o);
}

/* Tensors of equal names and shapes; a run may go on with other sequences or another rope_theta. */
static bool same_shapes(const struct msg_model *a, const struct msg_model *b) {
    return a->layers == b->layers && a->width == b->width && a->heads == b->heads &&
           a->kv_heads == b->kv_heads && a->ffn == b->ffn && a->vocabulary == b->vocabulary &&
           a->tied == b->tied;
}

/* Is it the one that the ledger or genesis names, and whole? Its own signatures were checked when it
 * was opened, but any run's root key could have made those. */
static int check(const struct origin *o, const struct msg_checkpoint *from, struct err *err) {
    if (ckpt_is_plain(o->ckpt)) return err_set(err, ERR_CORRUPT, "it has no manifest");
    const struct ckpt_facts *f = ckpt_facts(o->ckpt);
    if (!digest_equal(&f->manifest, &from->manifest) || f->index != from->at_index ||
        !digest_equal(&f->state_root, &from->state_root))
        return err_set(err, ERR_CORRUPT, "it is another checkpoint than the one that is meant");
    if (!same_shapes(ckpt_model(o->ckpt), o->genesis->model))
        return err_set(err, ERR_CONFIG, "it is of another model");
    return ckpt_verify_vector(o->ckpt, CKPT_ANCHOR, err) ||
                   ckpt_verify_vector(o->ckpt, CKPT_MOMENTUM, err) ? -1 : 0;
}

static int open_checkpoint(struct origin *o, const struct msg_checkpoint *from, struct err *err) {
    char url[PROTO_URL_BYTES_MAX + 1];
    ckpt_close(o->ckpt);
    o->ckpt = NULL;
    proto_str_copy(from->url, url, sizeof url);
    o->asked = true;
    o->manifest = from->manifest;
    if (o->network || !ckpt_store_remote(url)) o->ckpt = ckpt_open(url, NULL, err);
    else err_set(err, ERR_NOT_FOUND, "is not on this machine");
    if (o->ckpt && !check(o, from, err)) return 0;
    ckpt_close(o->ckpt);
    o->ckpt = NULL;
    err_prefix(err, "checkpoint %.100s", url);
    o->failed = *err;
    o->failed_at_ms = timer_now_ms();
    return -1;
}

static int have_checkpoint(struct origin *o, const struct msg_checkpoint *from, struct err *err) {
    bool same = o->asked && digest_equal(&o->manifest, &from->manifest);
    if (same && o->ckpt) return 0;
    if (same && timer_now_ms() - o->failed_at_ms < ORIGIN_RETRY_MS) {
        *err = o->failed;
        return -1;
    }
    return open_checkpoint(o, from, err);
}

int origin_load(void *origin, const struct msg_checkpoint *from, uint64_t first, size_t n, float *anchor,
                float *momentum, struct err *err) {
    struct origin *o = origin;
    const struct msg_genesis *g = o->genesis;
    if (!from && g->init_from_count) from = g->init_from;
    if (!from) {
        model_init_elements(g->model, g->init_std, g->init_seed, first, n, anchor);
        memset(momentum, 0, n * sizeof *momentum);
        return 0;
    }
    if (!have_checkpoint(o, from, err) &&
        !ckpt_read(o->ckpt, CKPT_ANCHOR, first, n, anchor, err) &&
        !ckpt_read(o->ckpt, CKPT_MOMENTUM, first, n, momentum, err))
        return 0;
    err->code = ERR_NOT_FOUND;
    return -1;
}
