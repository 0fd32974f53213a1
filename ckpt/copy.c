/* copy.c - copies of an open checkpoint: all of it fetched into a folder, or what makes a Hugging Face
 * model exported; digests checked on the way. */
#define _GNU_SOURCE /* fallocate */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ckpt/opened.h"

/* The index only makes sense where it was: a plain folder may have one file without it. */
static const char *const hf_names[] = {
    "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.json", "merges.txt",
};

/* ---- fetch ------------------------------------------------------------------------------------------- */

#define PART_NAME_BYTES (CKPT_NAME_BYTES_MAX + 8)

struct fetching {
    const struct ckpt *c;
    struct checking k;
    const char *path;
    int dir;
    int fd; /* the object on its way */
    const struct ckpt_blob *believed; /* its bytes, where they are known; else the store has them */
};

/* ".NAME.part": no object has such a name, and the next call finds it again. */
static void part_name(const char *name, char out[PART_NAME_BYTES]) {
    snprintf(out, PART_NAME_BYTES, ".%s.part", name);
}

static int fetch_block(void *arg, uint64_t offset, const void *data, size_t n, struct err *err) {
    struct fetching *f = arg;
    for (size_t done = 0; done < n;) {
        ssize_t put = pwrite(f->fd, (const uint8_t *)data + done, n - done, (off_t)(offset + done));
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) return err_set_errno(err, "%.100s/%.60s: write", f->path, f->k.now.object);
        done += (size_t)put;
    }
    return checking_block(&f->k, offset, data, n, err);
}

/* Take the first n bytes of what lies in fd into the digest. */
static int take_local(struct fetching *f, int fd, uint64_t n, struct err *err) {
    uint8_t *buffer = malloc(CKPT_BLOCK_BYTES);
    if (!buffer) return err_set(err, ERR_MEMORY, "%.100s: out of memory", f->path);
    int r = 0;
    for (uint64_t at = 0; !r && at < n;) {
        ssize_t got = pread(fd, buffer, n - at < CKPT_BLOCK_BYTES ? (size_t)(n - at) : CKPT_BLOCK_BYTES,
                            (off_t)at);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) r = err_set_errno(err, "%.100s/%.60s: read", f->path, f->k.now.object);
        else if (got == 0) r = err_set(err, ERR_TRUNCATED, "%.100s/%.60s: grows shorter", f->path,
                                       f->k.now.object);
        else digest_stream_update(&f->k.stream, buffer, (size_t)got);
        at += got > 0 ? (uint64_t)got : 0;
        if (!r) r = checking_show(&f->k, at, 0, err);
    }
    free(buffer);
    return r;
}

static bool digest_is(const struct fetching *f, const struct manifest_object *o, struct digest *is) {
    struct digest_stream copy = f->k.stream;
    *is = digest_stream_final(&copy);
    return f->c->plain || digest_equal(is, &o->digest);
}

/* 1: it is there already, whole and the same. 0: nothing of that name. */
static int look_local(struct fetching *f, const struct manifest_object *o, struct err *err) {
    struct stat st;
    struct digest is;
    int fd = openat(f->dir, o->name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0 && errno == ENOENT) return 0;
    bool same = fd >= 0 && !fstat(fd, &st) && S_ISREG(st.st_mode) && (uint64_t)st.st_size == o->bytes;
    int r = same ? take_local(f, fd, o->bytes, err) : 0;
    if (fd >= 0) close(fd);
    if (r) return -1;
    if (same && digest_is(f, o, &is)) return 1;
    return err_set(err, ERR_REFUSED,
                   "%.100s/%.60s: is there, and is not the checkpoint's: remove it, or give another folder",
                   f->path, o->name);
}

/* What lies in f->fd so far, and the rest. */
static int fill(struct fetching *f, const struct manifest_object *o, uint64_t have, struct err *err) {
    char full[CKPT_NAME_BYTES_MAX + 1];
    object_name(f->c->prefix, o->name, full);
    digest_stream_init(&f->k.stream);
    if (f->believed) return fetch_block(f, 0, f->believed->data, f->believed->length, err);
    return take_local(f, f->fd, have, err) ||
           object_stream(f->c->store, full, have, o->bytes, fetch_block, f, err) ? -1 : 0;
}

/* A crash may have left nonsense in what was begun: then it is begun once more. */
static int fill_right(struct fetching *f, const struct manifest_object *o, struct err *err) {
    struct stat st;
    struct digest is;
    if (fstat(f->fd, &st)) return err_set_errno(err, "%.100s/%.60s", f->path, o->name);
    if (!S_ISREG(st.st_mode))
        return err_set(err, ERR_REFUSED, "%.100s: .%.60s.part is no file", f->path, o->name);
    uint64_t have = !f->believed && (uint64_t)st.st_size <= o->bytes ? (uint64_t)st.st_size : 0;
    if (o->bytes && fallocate(f->fd, FALLOC_FL_KEEP_SIZE, 0, (off_t)o->bytes) &&
        (errno == ENOSPC || errno == EDQUOT))
        return err_set_errno(err, "%.100s/%.60s: cannot reserve %" PRIu64 " bytes", f->path, o->name,
                             o->bytes);
    for (;; have = 0) {
        if (have == 0 && ftruncate(f->fd, 0)) return err_set_errno(err, "%.100s/%.60s", f->path, o->name);
        if (fill(f, o, have, err)) return -1;
        if (digest_is(f, o, &is)) return 0;
        if (have == 0) break;
    }
    if (ftruncate(f->fd, 0)) return err_set_errno(err, "%.100s/%.60s", f->path, o->name);
    return opened_wrong_digest(o->name, &is, &o->digest, err);
}

static int fetch_object(struct fetching *f, const struct manifest_object *o, struct err *err) {
    char part[PART_NAME_BYTES];
    f->k.now.object = o->name;
    digest_stream_init(&f->k.stream);
    if (checking_show(&f->k, 0, 0, err)) return -1;
    int there = look_local(f, o, err);
    if (there) return there < 0 ? -1 : 0;
    part_name(o->name, part);
    f->fd = openat(f->dir, part, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0666);
    if (f->fd < 0) return err_set_errno(err, "%.100s/%.60s", f->path, part);
    int r = fill_right(f, o, err);
    if (!r && fsync(f->fd)) r = err_set_errno(err, "%.100s/%.60s: sync", f->path, part);
    close(f->fd);
    if (r) return -1;
    if (renameat(f->dir, part, f->dir, o->name) || fsync(f->dir))
        return err_set_errno(err, "%.100s/%.60s: rename", f->path, o->name);
    return 0;
}

/* manifest.sig and manifest.json, as they were believed when the checkpoint was opened. */
static int put_believed(struct fetching *f, const char *name, const struct ckpt_blob *bytes,
                        struct err *err) {
    struct manifest_object o = {.bytes = bytes->length, .digest = digest_of(bytes->data, bytes->length)};
    snprintf(o.name, sizeof o.name, "%s", name);
    f->believed = bytes;
    return fetch_object(f, &o, err);
}

static int add(struct manifest *list, const struct ckpt *c, const char *name, struct err *err) {
    struct manifest_object *o = &list->object[list->count];
    if (opened_stat(c, name, &o->bytes, err)) return -1;
    snprintf(o->name, sizeof o->name, "%s", name);
    list->count++;
    return 0;
}

/* Of a plain folder: what is there of a model's files, config.json last, as it makes the folder one. */
static int list_plain(const struct ckpt *c, struct manifest *list, struct err *err) {
    const struct tensors *t = &c->tensors[CKPT_WEIGHTS];
    for (uint32_t i = 0; i < t->file_count; i++)
        if (add(list, c, t->file[i], err)) return -1;
    for (size_t i = sizeof hf_names / sizeof *hf_names; i-- > 0;) {
        struct err e = {0};
        if (add(list, c, hf_names[i], &e) && e.code != ERR_NOT_FOUND && e.code != ERR_REFUSED) {
            if (err) *err = e;
            return -1;
        }
    }
    return 0;
}

static int fetch_plain(struct fetching *f, struct err *err) {
    struct manifest list = {.object = calloc(CKPT_OBJECTS_MAX + sizeof hf_names / sizeof *hf_names,
                                             sizeof *list.object)};
    int r = list.object ? list_plain(f->c, &list, err) : err_set(err, ERR_MEMORY, "%.100s: out of memory",
                                                                 f->path);
    for (uint32_t i = 0; !r && i < list.count; i++) f->k.now.total += list.object[i].bytes;
    for (uint32_t i = 0; !r && i < list.count; f->k.before += list.object[i++].bytes)
        r = fetch_object(f, &list.object[i], err);
    free(list.object);
    return r;
}

/* The genesis first: with it there and no manifest, nobody takes the folder for a plain one. */
static int fetch_signed(struct fetching *f, struct err *err) {
    const struct manifest *m = &f->c->manifest;
    f->k.now.total = f->c->manifest_bytes.length + f->c->sig_bytes.length;
    for (uint32_t i = 0; i < m->count; i++) {
        f->k.now.total += m->object[i].bytes;
        if (!strncmp(m->object[i].name, "manifest.", 9) || !strcmp(m->object[i].name, "latest"))
            return err_set(err, ERR_REFUSED, "manifest.json: names %.60s", m->object[i].name);
    }
    for (int rest = 0; rest < 2; rest++)
        for (uint32_t i = 0; i < m->count; i++) {
            if (strcmp(m->object[i].name, "genesis.bin") != 0 ? !rest : rest) continue;
            if (fetch_object(f, &m->object[i], err)) return -1;
            f->k.before += m->object[i].bytes;
        }
    if (put_believed(f, "manifest.sig", &f->c->sig_bytes, err)) return -1;
    f->k.before += f->c->sig_bytes.length;
    return put_believed(f, "manifest.json", &f->c->manifest_bytes, err);
}

int ckpt_fetch(const struct ckpt *c, const char *dir, ckpt_progress_fn *progress, void *arg,
               struct err *err) {
    struct fetching f = {.c = c, .path = dir, .k = {.progress = progress, .arg = arg}};
    struct ckpt_store *made = store_file_open(dir, true, err); /* makes the folder, on the way to it too */
    if (!made) return -1;
    made->ops->close(made);
    f.dir = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (f.dir < 0) return err_set_errno(err, "%.150s", dir);
    int r = flock(f.dir, LOCK_EX | LOCK_NB)
                ? err_set(err, ERR_REFUSED, "%.150s: another fetch is at work in it", dir)
            : c->plain ? fetch_plain(&f, err) : fetch_signed(&f, err);
    close(f.dir);
    return r;
}

/* ---- export ------------------------------------------------------------------------------------------ */

struct copying {
    const struct ckpt_store_ops *ops;
    struct ckpt_upload *to;
};

static int copy_block(void *copying, uint64_t offset, const void *data, size_t n, struct err *err) {
    struct copying *c = copying;
    return c->ops->upload_put(c->to, offset, data, n, err);
}

static int export_object(const struct ckpt *c, struct ckpt_store *to, const char *name,
                         struct err *err) {
    struct copying copy = {.ops = to->ops};
    struct checking k = {.taker = copy_block, .to = &copy};
    uint64_t bytes;
    if (opened_stat(c, name, &bytes, err)) return -1;
    copy.to = to->ops->upload_begin(to, name, bytes, err);
    if (!copy.to) return -1;
    int r = checking_object(c, name, bytes, &k, err) || to->ops->upload_complete(copy.to, err) ? -1 : 0;
    to->ops->upload_destroy(copy.to);
    return r;
}

static int export_all(const struct ckpt *c, struct ckpt_store *to, struct err *err) {
    const struct tensors *t = &c->tensors[CKPT_WEIGHTS];
    uint64_t ignored;
    for (size_t i = 0; i < sizeof hf_names / sizeof *hf_names; i++)
        if ((c->plain ? !opened_stat(c, hf_names[i], &ignored, NULL)
                      : !!manifest_find(&c->manifest, hf_names[i])) &&
            export_object(c, to, hf_names[i], err))
            return -1;
    for (uint32_t i = 0; i < t->file_count; i++)
        if (export_object(c, to, t->file[i], err)) return -1;
    return 0;
}

int ckpt_check_empty(const char *dir, struct err *err) {
    DIR *d = opendir(dir);
    if (!d) return errno == ENOENT ? 0 : err_set_errno(err, "%s", dir);
    int r = 0;
    for (struct dirent *e; !r && (e = readdir(d));)
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, ".."))
            r = err_set(err, ERR_REFUSED, "%.100s: has \"%.64s\" in it; give a new or empty folder", dir,
                        e->d_name);
    closedir(d);
    return r;
}

int ckpt_export(const struct ckpt *c, const char *dir, struct err *err) {
    if (ckpt_check_empty(dir, err)) return -1;
    struct ckpt_store *to = ckpt_store_open(dir, true, err);
    if (!to) return -1;
    int r = export_all(c, to, err);
    if (r) object_remove_all(to, "", NULL);
    to->ops->close(to);
    return r;
}
