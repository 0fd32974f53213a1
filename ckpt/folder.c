/* folder.c - a plain Hugging Face folder, written from a vector in memory; see ckpt_folder_write() in ckpt.h. */
#define _GNU_SOURCE /* renameat2 */
#include "ckpt/internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BLOCK_ELEMENTS ((size_t)1 << 20)
#define PATH_BYTES 4096

struct folder {
    const struct ckpt_folder *what;
    enum safetensors_dtype dtype;
    struct ckpt_store *to;
    float *block;
    uint16_t *narrow;
};

/* ---- small files ------------------------------------------------------------------------------------- */

/* Put *blob, whose making gave `failed`, and free it. */
static int put(struct folder *f, const char *name, int failed, struct ckpt_blob *blob, struct err *err) {
    int r = failed ? -1 : f->to->ops->put(f->to, name, blob->data, blob->length, NULL, err);
    free(blob->data);
    *blob = (struct ckpt_blob){0};
    return r;
}

static int put_tokenizer(struct folder *f, struct err *err) {
    const struct ckpt_folder *w = f->what;
    struct ckpt_blob b = {0};
    if (put(f, "tokenizer_config.json", hf_tokenizer_config_format(w->model, w->tokenizer, &b, err), &b, err))
        return -1;
    if (!strcmp(w->tokenizer, CKPT_TOKENIZER_BYTES))
        return put(f, "tokenizer.json", hf_tokenizer_format(&b, err), &b, err);
    if (!w->tokenizer_json.length) return 0;
    return f->to->ops->put(f->to, "tokenizer.json", w->tokenizer_json.data, w->tokenizer_json.length, NULL, err);
}

static int put_index(struct folder *f, const struct hf_shard *shards, uint32_t count, struct err *err) {
    struct ckpt_blob b = {0};
    return put(f, "model.safetensors.index.json",
               hf_index_format(f->what->model, "model", f->dtype, shards, count, &b, err), &b, err);
}

static int put_configs(struct folder *f, struct err *err) {
    const struct ckpt_folder *w = f->what;
    struct ckpt_blob b = {0};
    return put(f, "generation_config.json", hf_generation_config_format(&b, err), &b, err) ||
           put(f, "config.json", hf_config_format(w->model, f->dtype, w->init_std, &b, err), &b, err)
               ? -1 : 0;
}

/* ---- tensors ----------------------------------------------------------------------------------------- */

static int put_block(struct folder *f, struct ckpt_upload *u, uint64_t offset, size_t n, struct err *err) {
    if (f->dtype == SAFETENSORS_F32) return f->to->ops->upload_put(u, offset, f->block, 4 * n, err);
    safetensors_narrow(f->block, f->narrow, n);
    return f->to->ops->upload_put(u, offset, f->narrow, 2 * n, err);
}

static int put_elements(struct folder *f, struct ckpt_upload *u, const struct hf_shard *s, size_t header,
                        struct err *err) {
    size_t width = safetensors_width(f->dtype);
    for (uint64_t at = 0, n; at < s->count; at += n) {
        n = s->count - at < BLOCK_ELEMENTS ? s->count - at : BLOCK_ELEMENTS;
        if (f->what->read(f->what->arg, s->first + at, (size_t)n, f->block, err) ||
            put_block(f, u, header + at * width, (size_t)n, err))
            return -1;
    }
    return f->to->ops->upload_complete(u, err);
}

static int put_shard(struct folder *f, const struct hf_shard *s, uint32_t i, uint32_t count, struct err *err) {
    char name[64];
    struct ckpt_blob header = {0};
    hf_shard_name("model", i, count, name);
    if (safetensors_format(f->what->model, s->first_tensor, s->end_tensor, f->dtype, &header, err)) return -1;
    uint64_t bytes = header.length + s->count * safetensors_width(f->dtype);
    struct ckpt_upload *u = f->to->ops->upload_begin(f->to, name, bytes, err);
    int r = u && !f->to->ops->upload_put(u, 0, header.data, header.length, err)
                ? put_elements(f, u, s, header.length, err) : -1;
    f->to->ops->upload_destroy(u);
    free(header.data);
    return r;
}

static int put_tensors(struct folder *f, struct err *err) {
    struct hf_shard *shards = NULL;
    uint32_t count;
    uint64_t most = f->what->shard_bytes ? f->what->shard_bytes : CKPT_SHARD_BYTES;
    if (hf_shards(f->what->model, most, &shards, &count, err)) return -1;
    int r = put_index(f, shards, count, err);
    for (uint32_t i = 0; !r && i < count; i++) r = put_shard(f, &shards[i], i, count, err);
    free(shards);
    return r;
}

/* ---- the folder -------------------------------------------------------------------------------------- */

int ckpt_folder_remove(const char *dir, struct err *err) {
    char name[PATH_BYTES + 256];
    DIR *d = opendir(dir);
    if (!d) return errno == ENOENT ? 0 : err_set_errno(err, "remove %.200s", dir);
    for (struct dirent *e; (e = readdir(d));) {
        snprintf(name, sizeof name, "%s/%s", dir, e->d_name);
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) unlink(name);
    }
    closedir(d);
    return rmdir(dir) ? err_set_errno(err, "remove %.200s", dir) : 0;
}

/* What was there gets the other's name, and goes. */
static int exchange(const char *made, const char *dir, struct err *err) {
    if (!renameat2(AT_FDCWD, made, AT_FDCWD, dir, RENAME_EXCHANGE)) return ckpt_folder_remove(made, err);
    if (errno == ENOENT && !rename(made, dir)) return 0;
    return err_set_errno(err, "rename %.150s to %.80s", made, dir);
}

static int write_all(struct folder *f, const char *made, struct err *err) {
    f->block = malloc(BLOCK_ELEMENTS * sizeof *f->block);
    f->narrow = malloc(BLOCK_ELEMENTS * sizeof *f->narrow);
    if (!f->block || !f->narrow) return err_set(err, ERR_MEMORY, "no memory to write %.150s", made);
    if (!(f->to = ckpt_store_open(made, true, err))) return -1;
    int r = put_tensors(f, err) || put_tokenizer(f, err) || put_configs(f, err) ? -1 : 0;
    f->to->ops->close(f->to);
    return r;
}

int ckpt_folder_write(const struct ckpt_folder *what, const char *dir, struct err *err) {
    struct folder f = {.what = what, .dtype = what->weights == CKPT_BF16 ? SAFETENSORS_BF16 : SAFETENSORS_F32};
    char made[PATH_BYTES];
    if ((size_t)snprintf(made, sizeof made, "%s.new", dir) >= sizeof made)
        return err_set(err, ERR_CONFIG, "path too long: %.100s...", dir);
    int r = ckpt_folder_remove(made, err) || write_all(&f, made, err) ? -1 : exchange(made, dir, err);
    if (r) ckpt_folder_remove(made, NULL);
    free(f.block);
    free(f.narrow);
    return r;
}
