/* data_internal.h - what data.c, which reads a corpus, and data_prepare.c, which writes one, share. */
#ifndef INTELLECT_NODE_DATA_INTERNAL_H
#define INTELLECT_NODE_DATA_INTERNAL_H

#include "node/data.h"
#include "proto/proto.h"

#define DATA_FORMAT 1
#define BLOCK_BYTES (1u << 20)
#define NAME_BYTES_MAX 64
#define PATH_BYTES_MAX 4096

/* One file of tokens, as the manifest names it. */
struct token_file {
    char name[NAME_BYTES_MAX];
    uint64_t tokens;
    uint64_t samples;
    uint64_t first_sample; /* samples of the files before it */
    struct digest digest;
    int checked; /* its bytes have this digest; under data.lock */
};

int data_join(char out[PATH_BYTES_MAX], const char *folder, const char *name, struct err *err);

/* Up to n bytes at `offset`; *got is less only at the end of the file. */
int data_read_at(int fd, uint64_t offset, size_t n, void *out, size_t *got, const char *path,
                 struct err *err);

int data_digest_of_file(int fd, const char *path, struct digest *out, struct err *err);

#endif
