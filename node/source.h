/* source.h - a file of text as a stream of bytes: plain, or packed with gzip or zstd, as its name ends. */
#ifndef INTELLECT_NODE_SOURCE_H
#define INTELLECT_NODE_SOURCE_H

#include "proto/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct source;

/* ERR_NOT_FOUND, ERR_IO, ERR_MEMORY. */
struct source *source_open(const char *path, struct err *err);
void source_close(struct source *s); /* NULL is fine */

/* Up to n bytes, n > 0; *got is less only at the end, where the stream was found whole. ERR_TRUNCATED: it is
 * cut off, ERR_CORRUPT: it is not what its name says; both name the file. ERR_IO. */
int source_read(struct source *s, void *out, size_t n, size_t *got, struct err *err);

/* Bytes of the file read so far, as they lie on the disk. */
uint64_t source_position(const struct source *s);

/* Does a file of this name hold JSON lines? (.jsonl, .ndjson, also with .gz or .zst) */
bool source_is_lines(const char *path);

/* The files under each path, in the order of paths, those of a folder (with all below it) in the order of
 * their names; names that begin with a dot are passed over. Of *paths, all of the caller's to free with
 * source_list_release(). ERR_NOT_FOUND, ERR_IO, ERR_MEMORY, ERR_CONFIG: more than SOURCE_FILES_MAX, or none.
 */
#define SOURCE_FILES_MAX (1u << 22)
struct source_list {
    char **path;
    uint64_t *bytes; /* on the disk */
    uint32_t n;
};
int source_list_fill(struct source_list *l, const char *const *paths, uint32_t n, struct err *err);
void source_list_release(struct source_list *l);

#endif
