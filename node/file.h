/* file.h - whole reads and writes of descriptors, with the file's name in the error. */
#ifndef INTELLECT_NODE_FILE_H
#define INTELLECT_NODE_FILE_H

#include <stddef.h>

#include "proto/err.h"

/* Write all n bytes. `path` is only for the message. ERR_IO or ERR_FULL. */
int file_write(int fd, const void *bytes, size_t n, const char *path, struct err *err);

/* Read exactly n bytes. ERR_IO, or ERR_TRUNCATED (msg says how many are missing). */
int file_read(int fd, void *bytes, size_t n, const char *path, struct err *err);

/* Make a rename inside the folder of `path` durable. ERR_IO. */
int file_sync_folder_of(const char *path, struct err *err);

#endif
