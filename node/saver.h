/* saver.h - saves an engine's state to one file beside training: the state is copied between two
 * steps, and a thread digests and writes the copy. When to save is the trainer's business. */
#ifndef INTELLECT_NODE_SAVER_H
#define INTELLECT_NODE_SAVER_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/err.h"

struct engine;
struct saver;

/* engine and path are borrowed until saver_destroy. Takes 12 bytes a parameter, which are touched by
 * the first save. NULL with ERR_MEMORY.
 * shared  NULL, or such memory that all ranks of a mesh see (engine_snapshot_create). All of them then make
 *         the same calls; those with a path of NULL leave the writing to the one that has one, and only that
 *         one's saver_busy() says when the next save may be. */
struct saver *saver_create(const struct engine *engine, const char *path, float *shared,
                           struct err *err);

/* Waits for what is being written. NULL is fine. */
void saver_destroy(struct saver *s);

/* Copy the state and write it beside what follows; between steps. One save at a time: while the one
 * before is still being written nothing happens. tag: see engine_snapshot_take.
 * Returns 0, or -1: this save could not begin, or it began and the one before has failed. */
int saver_begin(struct saver *s, uint64_t tag, struct err *err);

/* Is a save still being written? */
bool saver_busy(struct saver *s);

/* Save now, and return when it is on disk. */
int saver_finish(struct saver *s, uint64_t tag, struct err *err);

#endif
