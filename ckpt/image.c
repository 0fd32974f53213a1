/* image.c - the tensor files of a checkpoint as a function of the state: which there are, and what stands at
 * which byte of them. The writer needs it for all of a checkpoint, a member for the parts that it sends. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "ckpt/internal.h"

/* The vectors: in files of which name, as what. */
struct vector {
    const char *stem;
    bool momentum;
    enum safetensors_dtype dtype;
};

static uint32_t vectors_of(enum ckpt_weights weights, struct vector out[3]) {
    uint32_t n = 0;
    bool bf16 = weights == CKPT_BF16;
    out[n++] = (struct vector){"model", false, bf16 ? SAFETENSORS_BF16 : SAFETENSORS_F32};
    if (bf16) out[n++] = (struct vector){"anchor", false, SAFETENSORS_F32};
    out[n++] = (struct vector){"momentum", true, SAFETENSORS_F32};
    return n;
}

static int begin_file(const struct msg_model *m, const struct vector *v, const struct hf_shard *s, uint32_t i,
                      uint32_t shards, struct image_file *f, struct err *err) {
    f->momentum = v->momentum;
    f->dtype = v->dtype;
    f->first = s->first;
    f->count = s->count;
    hf_shard_name(v->stem, i, shards, f->name);
    if (safetensors_format(m, s->first_tensor, s->end_tensor, v->dtype, &f->header, err)) return -1;
    f->bytes = f->header.length + f->count * safetensors_width(f->dtype);
    return 0;
}

struct ckpt_image *ckpt_image_create(const struct msg_model *m, enum ckpt_weights weights,
                                     uint64_t shard_bytes,
                                     struct err *err) {
    struct vector v[3];
    struct ckpt_image *im = calloc(1, sizeof *im);
    if (!im) {
        err_set(err, ERR_MEMORY, "out of memory for a checkpoint's files");
        return NULL;
    }
    int r = hf_shards(m, shard_bytes ? shard_bytes : CKPT_SHARD_BYTES, &im->shard, &im->shards, err);
    uint32_t n = vectors_of(weights, v), files = r ? 0 : n * im->shards;
    if (!r && !(im->file = calloc(files, sizeof *im->file)))
        r = err_set(err, ERR_MEMORY, "out of memory for %u files", files);
    for (; !r && im->files < files; im->files++) {
        uint32_t i = im->files;
        r = begin_file(m, &v[i / im->shards], &im->shard[i % im->shards], i % im->shards, im->shards,
                       &im->file[i], err);
    }
    if (!r) return im;
    ckpt_image_destroy(im);
    return NULL;
}

void ckpt_image_destroy(struct ckpt_image *im) {
    if (!im) return;
    for (uint32_t i = 0; im->file && i < im->files; i++) free(im->file[i].header.data);
    free(im->file);
    free(im->shard);
    free(im);
}

int image_indices(const struct ckpt_image *im, const struct msg_model *m, enum ckpt_weights weights,
                  int (*take)(void *arg, const char *name, int failed, const struct ckpt_blob *blob,
                              struct err *err),
                  void *arg, struct err *err) {
    static const char *const names[] = {"model.safetensors.index.json", "anchor.safetensors.index.json",
                                        "momentum.safetensors.index.json"};
    struct vector v[3];
    uint32_t n = vectors_of(weights, v);
    for (uint32_t i = 0; i < n; i++) {
        struct ckpt_blob b = {0};
        int r = hf_index_format(m, v[i].stem, v[i].dtype, im->shard, im->shards, &b, err);
        if (take(arg, names[n == 3 ? i : 2 * i], r, &b, err)) return -1;
    }
    return 0;
}

/* ---- some bytes of a file ---------------------------------------------------------------------------- */

int ckpt_image_find(const struct ckpt_image *im, const char *name, uint64_t offset, uint64_t bytes,
                    struct ckpt_piece *out, struct err *err) {
    for (uint32_t i = 0; i < im->files; i++) {
        const struct image_file *f = &im->file[i];
        size_t width = safetensors_width(f->dtype);
        if (strcmp(f->name, name) != 0) continue;
        uint64_t end = offset + bytes, from = offset > f->header.length ? offset : f->header.length;
        if (offset > f->bytes || bytes > f->bytes - offset || end <= from ||
            (from - f->header.length) % width ||
            (end - f->header.length) % width)
            return err_set(err, ERR_REFUSED,
                           "%.64s has %" PRIu64 " bytes, %zu of them its header: there is no part %" PRIu64
                           "+%" PRIu64, name, f->bytes, f->header.length, offset, bytes);
        *out = (struct ckpt_piece){.file = i, .momentum = f->momentum, .header = from - offset,
                                   .first = f->first + (from - f->header.length) / width,
                                   .count = (end - from) / width};
        return 0;
    }
    return err_set(err, ERR_REFUSED, "a checkpoint has no file \"%.64s\"", name);
}

void ckpt_image_fill(const struct ckpt_image *im, const struct ckpt_piece *p, uint64_t first, size_t n,
                     const float *values, uint8_t *out) {
    const struct image_file *f = &im->file[p->file];
    size_t width = safetensors_width(f->dtype);
    uint8_t *to = out + p->header + (first - p->first) * width;
    if (p->header && first == p->first) memcpy(out, f->header.data + f->header.length - p->header, p->header);
    if (f->dtype == SAFETENSORS_BF16) safetensors_narrow(values, (uint16_t *)(void *)to, n);
    else memcpy(to, values, n * width);
}
