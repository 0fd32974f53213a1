/* data_cache.h - blocks that came over a network, kept on the local disk by their digest: one file of fixed
 * size, which all corpora and processes of a user share. What is read from it is checked by the digest, so
 * whatever happens to the file costs a fetch and no more.
 *
 * It lies in $INTELLECT_CACHE, else $XDG_CACHE_HOME/intellect, else $HOME/.cache/intellect, and takes at most
 * $INTELLECT_CACHE_GB of 10^9 bytes (default 16; 0: nothing is kept). */
#ifndef INTELLECT_NODE_DATA_CACHE_H
#define INTELLECT_NODE_DATA_CACHE_H

#include "proto/messages.h"

#include <stdbool.h>
#include <stddef.h>

struct data_cache;

/* block_bytes: the most that one block has. NULL where there is to be none, or none can be. */
struct data_cache *data_cache_open(size_t block_bytes);
void data_cache_close(struct data_cache *c); /* NULL is fine */

/* The block of n bytes with this digest into out. Thread-safe, as is keeping. */
bool data_cache_get(const struct data_cache *c, const struct digest *d, void *out, size_t n);
/* Keep a block, in place of another where all is full. A disk that is full keeps nothing. */
void data_cache_keep(struct data_cache *c, const struct digest *d, const void *bytes, size_t n);

#endif
