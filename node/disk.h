/* disk.h - `struct disk` of sync.h on a folder: mapped arrays as files, small records replaced
 * atomically. What is stored in a mapped array survives the death of the process at once, and that
 * of the machine after flush. */
#ifndef INTELLECT_NODE_DISK_H
#define INTELLECT_NODE_DISK_H

#include "node/sync.h"
#include "proto/err.h"

/* Open `path` (made with mode 0700 if missing; its parent must exist) and fill *out.
 *
 * map     a file is made at full size with its blocks reserved under another name, then renamed,
 * so
 *         a full disk is ERR_FULL here and never a SIGBUS later. ERR_CORRUPT: the file that is there
 *         has another size. At most DISK_MAPS_MAX names are mapped at once.
 * remove  also unmaps a mapped name: its memory is gone, and a later map of it begins with zeroes.
 * Names have 1 to 64 of A-Z a-z 0-9 . _ - and do not begin with a dot; others are caller bugs.
 *
 * Used by one thread. Leftover temporary files are removed here. Returns 0, or -1 with ERR_IO. */
#define DISK_MAPS_MAX 64
int disk_open(const char *path, struct disk *out, struct err *err);

/* Flush nothing, unmap all. A zeroed struct is fine. */
void disk_close(struct disk *d);

#endif
