/* opened.h - an open checkpoint from the inside: reader.c opens it and reads ranges, others read whole
 * objects, to verify (verify.c) or to copy them (copy.c). */
#ifndef INTELLECT_CKPT_OPENED_H
#define INTELLECT_CKPT_OPENED_H

#include "ckpt/internal.h"

/* Where a tensor of the canonical order lies. */
struct place {
    uint32_t file; /* index into struct tensors */
    enum safetensors_dtype dtype;
    uint64_t offset;
};

/* The safetensors files of a vector. */
struct tensors {
    char (*file)[CKPT_NAME_BYTES_MAX + 1]; /* without the prefix */
    uint32_t file_count;
    struct place *place; /* one per tensor; NULL where there is none */
};

struct ckpt {
    struct ckpt_store *store;
    bool borrowed; /* the store */
    char prefix[CKPT_PREFIX_BYTES_MAX + 1]; /* "" where the store is the checkpoint's folder */
    char where[PROTO_URL_BYTES_MAX + CKPT_PREFIX_BYTES_MAX + 515]; /* with the store's settings */
    bool plain;
    struct err unseen; /* code ERR_NONE: everything could be looked for */
    struct msg_model model;
    char tokenizer[65];
    struct tensors tensors[3]; /* by enum ckpt_which; the weights' and the anchor's may be the same */

    struct manifest manifest; /* from here on: not of a plain folder */
    struct ckpt_blob manifest_bytes, sig_bytes; /* manifest.json and manifest.sig as they were believed */
    struct msg_genesis genesis;
    struct ckpt_blob genesis_bytes;
    struct msg_range *spent;
    uint32_t spent_count;
    struct ckpt_blob ledger_bytes;
    struct msg_signed_entry *ledger;
    uint32_t ledger_count;
};

/* Bytes of an object of this checkpoint. */
int opened_stat(const struct ckpt *c, const char *name, uint64_t *bytes, struct err *err);
/* A small object whole; of a checkpoint it must be in the manifest and have its digest. */
int opened_read(const struct ckpt *c, const char *name, size_t bytes_max, struct ckpt_blob *out, struct err *err);
int opened_wrong_digest(const char *name, const struct digest *is, const struct digest *want, struct err *err);

/* ---- verify.c: whole objects, block after block in order --------------------------------------------- */

struct checking {
    struct digest_stream stream;
    uint64_t before; /* bytes of the objects before this one */
    struct ckpt_progress now;
    ckpt_progress_fn *progress;
    void *arg;
    int (*taker)(void *to, uint64_t offset, const void *data, size_t n, struct err *err); /* NULL: nobody */
    void *to;
};
/* The object now has `done` bytes checked, `read` of them came since the last call. -1: to be ended. */
int checking_show(struct checking *k, uint64_t done, uint64_t read, struct err *err);
int checking_block(void *checking, uint64_t offset, const void *data, size_t n, struct err *err);
/* Stream an object through the taker and compare its digest, where the manifest has one. */
int checking_object(const struct ckpt *c, const char *name, uint64_t bytes, struct checking *k,
                    struct err *err);

#endif
