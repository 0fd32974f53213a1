/* data_internal.h - what data.c, which reads a corpus, data_prepare.c, which writes one, and data_files.c,
 * where its bytes lie, share. */
#ifndef INTELLECT_NODE_DATA_INTERNAL_H
#define INTELLECT_NODE_DATA_INTERNAL_H

#include "node/data.h"
#include "proto/proto.h"

#include <stdbool.h>

#define DATA_FORMAT 1
#define BLOCK_BYTES (1u << 20)
#define NAME_BYTES_MAX 64
#define PATH_BYTES_MAX 4096
#define WHOLE_BYTES_MAX ((size_t)32 << 20) /* of a manifest, or a tokenizer.json */

/* A file that lies behind a network is fetched and checked in blocks of so many bytes; their digests, one
 * after the other, are the file NAME.blocks. */
#define DATA_BLOCK_BYTES (256u << 10)
#define DATA_BLOCKS_SUFFIX ".blocks"

/* One file of tokens, as the manifest names it. */
struct token_file {
    char name[NAME_BYTES_MAX];
    uint64_t tokens;
    uint64_t samples;
    uint64_t first_sample; /* samples of the files before it */
    struct digest digest;
    struct digest blocks;  /* of NAME.blocks */
    bool has_blocks;
    bool checked;          /* its bytes have this digest; under data.lock */
    struct digest
        *block; /* the digests in NAME.blocks, once they were read; data_files.c's, under its lock */
};

int data_join(char out[PATH_BYTES_MAX], const char *folder, const char *name, struct err *err);

/* Up to n bytes at `offset`; *got is less only at the end of the file. */
int data_read_at(int fd, uint64_t offset, size_t n, void *out, size_t *got, const char *path,
                 struct err *err);

/* The digest of a whole file, and of NAME.blocks: what stands in *block, the caller's to free. block may be
 * NULL. */
int data_digest_of_file(int fd, const char *path, struct digest *out, struct digest **block, size_t *blocks,
                        struct err *err);

/* ---- data_files.c: the bytes ------------------------------------------------------------------- */

struct data_files;

/* url  of the manifest or its folder: a path, file://PATH, or a store that ckpt_store_open() takes.
 * NULL with ERR_NOT_FOUND, ERR_CONFIG, ERR_IO. */
struct data_files *data_files_open(const char *url, struct err *err);
void data_files_close(struct data_files *f); /* NULL is fine; frees no token_file's digests */

/* For messages. */
const char *data_files_where(const struct data_files *f);
bool data_files_remote(const struct data_files *f);
/* How many reads at a time are worth it. */
unsigned data_files_streams(const struct data_files *f);

/* The bytes of a small file beside the manifest, or where name is NULL of the manifest: the caller's to free, with
 * a NUL behind them. */
int data_files_whole(struct data_files *f, const char *name, char **text, size_t *length, struct err *err);

/* Are there as many bytes as the manifest says? Behind a network this is found out by reading. */
int data_files_check_size(const struct data_files *f, const struct token_file *t, uint64_t bytes,
                          struct err *err);
/* Read all of a file and compare its digest. Behind a network each block is checked when it comes: returns 0.
 */
int data_files_check_digest(const struct data_files *f, struct token_file *t, struct err *err);
/* n bytes at `offset` of a file of `bytes`. Thread-safe. ERR_TRUNCATED, ERR_CORRUPT (msg names file, block
 * and both digests), ERR_IO, ERR_TIMEOUT, ERR_NOT_FOUND. */
int data_files_read(struct data_files *f, struct token_file *t, uint64_t bytes, uint64_t offset, size_t n,
                    void *out, struct err *err);

#endif
