/* prefetch.h - samples read ahead of whoever asks for them one after the other, by threads of its own. */
#ifndef INTELLECT_NODE_PREFETCH_H
#define INTELLECT_NODE_PREFETCH_H

#include "proto/err.h"

#include <stddef.h>
#include <stdint.h>

struct prefetch;

/* read   reads sample `index` into out, `bytes` bytes; called by several threads at a time.
 * ahead  so many samples after the last one that was asked for are read; below `end`.
 * NULL with ERR_MEMORY. */
struct prefetch *prefetch_create(int (*read)(void *arg, uint64_t index, void *out, struct err *err),
                                 void *arg, size_t bytes, uint64_t end, unsigned ahead, unsigned threads,
                                 struct err *err);
/* Waits for the reads under way. NULL is fine. */
void prefetch_destroy(struct prefetch *p);

/* Sample `index` into out. One that follows the last one is there already, or comes; another is read now, and
 * those after it from then on. A read that failed ahead is tried again here. Thread-safe. As read(). */
int prefetch_take(struct prefetch *p, uint64_t index, void *out, struct err *err);

#endif
