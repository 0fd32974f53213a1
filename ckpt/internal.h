/* internal.h - what the files of ckpt/ share and nobody else needs; tests may. */
#ifndef INTELLECT_CKPT_INTERNAL_H
#define INTELLECT_CKPT_INTERNAL_H

#include <jansson.h>

#include "ckpt/ckpt.h"
#include "proto/model.h"
#include "proto/proto.h"

#define CKPT_HEADER_BYTES_MAX (8u << 20) /* of a safetensors file; the format allows 100 MB */
#define CKPT_JSON_BYTES_MAX (8u << 20)   /* of any other JSON object but the manifest */
#define CKPT_OBJECTS_MAX 4096u           /* in one checkpoint: the manifest stays under 1 MiB */
#define CKPT_BLOCK_BYTES (1u << 20)      /* read and hashed at a time, from a folder */

#define CKPT_TOKENIZER_BYTES "bytes"

/* Bytes that are the caller's, from malloc. */
struct ckpt_blob {
    uint8_t *data;
    size_t length;
};

/* ---- safetensors.c: one file of tensors --------------------------------------------------------
 * u64 LE header length, JSON header, padding, data. https://github.com/huggingface/safetensors */

enum safetensors_dtype { SAFETENSORS_F32, SAFETENSORS_F16, SAFETENSORS_BF16, SAFETENSORS_OTHER };

#define SAFETENSORS_DIMS_MAX 8
struct safetensors_tensor {
    char *name;
    enum safetensors_dtype dtype;
    uint32_t dims;
    uint64_t shape[SAFETENSORS_DIMS_MAX];
    uint64_t offset, bytes; /* in the file */
};
struct safetensors {
    struct safetensors_tensor *tensor; /* by name, ascending */
    uint32_t count;
};

/* Read the first eight bytes: *length receives the header's, at most CKPT_HEADER_BYTES_MAX and
 * inside a file of file_bytes. `what` is the file, for messages. */
int safetensors_header_length(const uint8_t first[8], uint64_t file_bytes, const char *what,
                              size_t *length, struct err *err);

/* Check and take in a header of `length` bytes from a file of file_bytes: well-formed, no name
 * twice, sizes that are the product of shape and dtype, data without gap or overlap up to the end
 * of the file. ERR_CORRUPT names file, tensor and numbers. Release with safetensors_release. */
int safetensors_parse(const uint8_t *header, size_t length, uint64_t file_bytes, const char *what,
                      struct safetensors *out, struct err *err);
void safetensors_release(struct safetensors *s);

/* NULL when there is none of that name. */
const struct safetensors_tensor *safetensors_find(const struct safetensors *s, const char *name);

/* Bytes of an element; 0 of SAFETENSORS_OTHER. */
size_t safetensors_width(enum safetensors_dtype dtype);

/* The start of a file with the model's tensors [first, end) in canonical order, so that its
 * data is one range of the canonical vector: length, header, padding to 64 bytes. */
int safetensors_format(const struct msg_model *m, uint32_t first, uint32_t end, enum safetensors_dtype dtype,
                       struct ckpt_blob *out, struct err *err);

/* fp32 to bf16: the nearest, ties to even; NaNs stay such. */
void safetensors_narrow(const float *in, uint16_t *out, size_t n);

/* Widen n values that lie in the last 2n bytes of out[4n bytes] to fp32, in place. */
void safetensors_widen(enum safetensors_dtype dtype, float *out, size_t n);

/* ---- hf.c: the files that make a folder a Hugging Face model ----------------------------------- */

int hf_config_format(const struct msg_model *m, enum safetensors_dtype weights, float init_std,
                     struct ckpt_blob *out, struct err *err);
/* ERR_UNSUPPORTED names a key that makes it another network than ours; ERR_CORRUPT what is wrong. */
int hf_config_parse(const struct ckpt_blob *json, const char *what, struct msg_model *out,
                    struct err *err);
int hf_generation_config_format(struct ckpt_blob *out, struct err *err);
int hf_tokenizer_format(struct ckpt_blob *out, struct err *err); /* of "bytes" */
/* name: the tokenizer's, in our words. */
int hf_tokenizer_config_format(const struct msg_model *m, const char *name, struct ckpt_blob *out,
                               struct err *err);
/* Our name of the tokenizer that a tokenizer_config.json stands for; "" when it is not ours. */
void hf_tokenizer_name(const struct ckpt_blob *json, char out[65]);

/* A slice of the canonical vector that goes into one file. */
struct hf_shard {
    uint32_t first_tensor, end_tensor;
    uint64_t first, count; /* elements */
};
/* Cut the vector into files of at most `bytes` of fp32 data. *out is the caller's (free). */
int hf_shards(const struct msg_model *m, uint64_t bytes, struct hf_shard **out, uint32_t *count,
              struct err *err);
/* "model-00001-of-00002.safetensors"; stem is "model", "anchor" or "momentum", i counts from 0. */
void hf_shard_name(const char *stem, uint32_t i, uint32_t count, char out[64]);
int hf_index_format(const struct msg_model *m, const char *stem, enum safetensors_dtype dtype,
                    const struct hf_shard *shards, uint32_t count, struct ckpt_blob *out, struct err *err);

/* ---- image.c: the tensor files ------------------------------------------------------------------- */

/* A safetensors file: header, then elements [first, first + count) of anchor or momentum, F32 or BF16. */
struct image_file {
    char name[64];
    bool momentum;
    enum safetensors_dtype dtype;
    struct ckpt_blob header;
    uint64_t first, count, bytes;
};
struct ckpt_image {
    struct image_file *file; /* each vector's shards, the vectors in the order in which they are read back */
    uint32_t files, shards;
    struct hf_shard *shard;
};
/* The index of each vector, one after the other, through `take`, which owns the blob from then on. */
int image_indices(const struct ckpt_image *im, const struct msg_model *m, enum ckpt_weights weights,
                  int (*take)(void *arg, const char *name, int failed, const struct ckpt_blob *blob,
                              struct err *err),
                  void *arg, struct err *err);

/* ---- manifest.c: manifest, signature, cursor, latest, ledger ----------------------------------- */

struct manifest_object {
    char name[CKPT_NAME_BYTES_MAX + 1];
    uint64_t bytes;
    struct digest digest;
};
struct manifest {
    struct ckpt_facts facts; /* all but manifest, signer and term */
    char tokenizer[65];
    struct manifest_object *object;
    uint32_t count;
};
int manifest_format(const struct manifest *m, struct ckpt_blob *out, struct err *err);
int manifest_parse(const struct ckpt_blob *json, struct manifest *out, struct err *err);
void manifest_release(struct manifest *m);
const struct manifest_object *manifest_find(const struct manifest *m, const char *name);

/* Who signed the manifest, and why that counts. The delegation's bytes are the struct's. */
struct manifest_sig {
    struct proto_key key;
    uint64_t term;
    struct proto_sig signature, delegation_signature;
    struct ckpt_blob delegation;
};
int manifest_sig_format(const struct manifest_sig *s, struct ckpt_blob *out, struct err *err);
int manifest_sig_parse(const struct ckpt_blob *json, struct manifest_sig *out, struct err *err);
void manifest_sig_release(struct manifest_sig *s);
/* Root key of the genesis -> delegation -> key -> manifest. ERR_REFUSED says which link breaks. */
int manifest_sig_check(const struct manifest_sig *s, const struct msg_genesis *genesis,
                       const struct digest *run, const struct ckpt_blob *manifest, struct err *err);

/* Sort and join ranges in place; returns their number. ERR_CORRUPT (and 0): empty, too far, or
 * two overlap: a sample was spent twice. */
int ranges_normalise(struct msg_range *r, uint32_t *count, struct err *err);
int cursor_format(const struct ckpt_facts *f, const struct msg_range *spent, uint32_t count,
                  struct ckpt_blob *out, struct err *err);
/* Also checks that it says what the manifest says. *spent is the caller's (free). */
int cursor_parse(const struct ckpt_blob *json, const struct ckpt_facts *f, struct msg_range **spent,
                 uint32_t *count, struct err *err);

struct latest {
    char prefix[CKPT_PREFIX_BYTES_MAX + 1];
    uint64_t index;
    struct digest manifest;
};
int latest_format(const struct latest *l, struct ckpt_blob *out, struct err *err);
int latest_parse(const struct ckpt_blob *json, struct latest *out, struct err *err);
/* Read STORE/latest. version, for a conditional put, is taken before. ERR_NOT_FOUND. */
int latest_read(struct ckpt_store *s, struct latest *out, char version[CKPT_VERSION_BYTES_MAX + 1],
                struct err *err);

/* Entry after entry: u32 LE length, bytes, 64 bytes of signature. */
int ledger_format(const struct msg_signed_entry *entries, uint32_t count, struct ckpt_blob *out,
                  struct err *err);
/* *entries is the caller's (free) and points into blob. */
int ledger_parse(const struct ckpt_blob *blob, struct msg_signed_entry **entries, uint32_t *count,
                 struct err *err);
/* Consecutive, chained, and the last one has this index; *head receives its digest. */
int ledger_check(const struct msg_signed_entry *entries, uint32_t count, uint64_t index,
                 struct digest *head, struct err *err);

/* ---- object.c: what reader, writer and retention do with a store's objects ------------------------- */

/* "prefix/name", or "name" where prefix is "". Cut names are refused by the store. */
void object_name(const char *prefix, const char *name, char out[CKPT_NAME_BYTES_MAX + 1]);
/* A whole object of at most bytes_max; ERR_FULL when it is larger. out->data is the caller's. */
int object_read(struct ckpt_store *s, const char *name, size_t bytes_max, struct ckpt_blob *out,
                struct err *err);
/* Names of all objects and unfinished uploads under a prefix. */
struct object_list {
    struct ckpt_object *object;
    size_t count, capacity;
};
int object_list(struct ckpt_store *s, const char *prefix, struct object_list *out, struct err *err);
void object_list_release(struct object_list *l);
/* Remove all under "prefix/", the manifest first, so that no half looks whole. */
int object_remove_all(struct ckpt_store *s, const char *prefix, struct err *err);

/* ---- stream.c: large reads, several at a time where the store is behind a network ----------------- */

/* As ops->get. */
int object_get(struct ckpt_store *s, const char *name, uint64_t offset, void *out, size_t n, struct err *err);
/* Bytes [from, bytes) of an object of that many, in blocks and in order, through `block`, which
 * returns -1 to stop. */
int object_stream(struct ckpt_store *s, const char *name, uint64_t from, uint64_t bytes,
                  int (*block)(void *arg, uint64_t offset, const void *data, size_t n, struct err *err),
                  void *arg, struct err *err);

/* ---- root.c: the state that a checkpoint's files hold, as they pass by ------------------------------- */

struct rooting {
    uint64_t chunk_bytes;
    size_t chunks;
    struct digest_stream *stream; /* of each chunk's leaf */
    struct msg_digest_item *leaf;
    bool narrowed; /* the weights are the anchor in bf16: what they are, and what they should be */
    struct digest_stream weights, rounded;
    enum ckpt_which which; /* the file that passes now: */
    uint64_t data, first, bytes; /* where in it its data begins, and which bytes of the vector that is */
};
/* ERR_CORRUPT: the genesis names no chunks. rooting_end() in any case. */
int rooting_begin(struct rooting *r, const struct msg_genesis *g, bool narrowed, struct err *err);
/* The next file, of elements [first, first + count) from byte `data` (a multiple of 4) on: fp32, weights
 * bf16. Those of a vector come in its order, and of the vectors weights (only where narrowed), anchor,
 * momentum. */
void rooting_file(struct rooting *r, enum ckpt_which which, uint64_t data, uint64_t first, uint64_t count);
/* A taker of object_stream()'s blocks. */
int rooting_block(void *rooting, uint64_t offset, const void *data, size_t n, struct err *err);
/* All have passed. ERR_CORRUPT: another root, or weights that are not the anchor's. */
int rooting_check(struct rooting *r, const struct digest *want, struct err *err);
void rooting_end(struct rooting *r);

/* ---- the stores behind ckpt_store_open(), by scheme; errors as there ------------------------------ */

struct ckpt_store *store_file_open(const char *path, bool create, struct err *err);
struct ckpt_store *store_s3_open(const char *url, struct err *err);
struct ckpt_store *store_http_open(const char *url, struct err *err);

/* ---- json.c: jansson with our errors ----------------------------------------------------------- */

json_t *json_read(const struct ckpt_blob *blob, const char *what, struct err *err);
/* Takes over `json` (NULL = out of memory on the way). flags: jansson's. */
int json_write(json_t *json, size_t flags, struct ckpt_blob *out, struct err *err);
/* A member of an object that must be there and of the kind. what: the file, for the message. */
int json_u64(const json_t *object, const char *key, const char *what, uint64_t *out, struct err *err);
const char *json_text(const json_t *object, const char *key, const char *what, struct err *err);
/* Exactly n bytes as lower- or upper-case hexadecimal. */
int json_hex(const json_t *object, const char *key, const char *what, void *out, size_t n,
             struct err *err);
json_t *json_hex_new(const void *bytes, size_t n);

#endif
