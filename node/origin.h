/* origin.h - where a state comes from when no member can be asked for it: the run's seed, or a checkpoint
 * that this machine can read. It is what sync calls to load a state (sync_config.load); what the
 * state is for, it does not know. */
#ifndef INTELLECT_NODE_ORIGIN_H
#define INTELLECT_NODE_ORIGIN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/proto.h"

struct origin;

/* genesis is borrowed until origin_destroy. NULL: no memory.
 *
 * folder  where a checkpoint in a store behind a network is fetched to; made, and removed again, when it
 *         is needed. It takes the space of the checkpoint. NULL: none is fetched, others are asked; so all
 *         but the coordinator's own node do, which has the key. */
struct origin *origin_create(const struct msg_genesis *genesis, const char *folder);
/* Ends what is being read; what was fetched of it stays for the next life of this home. NULL is fine. */
void origin_destroy(struct origin *o);

/* Fill anchor[0..n) and momentum[0..n) from element `first` on.
 *
 * origin  a struct origin; void as sync's hook wants it.
 * from    NULL: the run's initial state, that is the checkpoint genesis.init_from, or where there is none the
 *         one made of genesis.init_seed with zero momentum; else this checkpoint.
 *
 * A checkpoint is opened once, by a thread. It must be the very one that `from` names (manifest digest,
 * index, state root), with the signatures, tensor digests and shapes right, or where the manifest's digest is
 * zero a plain folder of this state root; so all of it is fetched or read first, in blocks. Returns 0, or -1 with ERR_TIMEOUT while that goes on (msg says how far it is), else with ERR_NOT_FOUND
 * whatever is wrong, as others can be asked; msg says what. A failure is remembered for ORIGIN_RETRY_MS. */
#define ORIGIN_RETRY_MS 60000
int origin_load(void *origin, const struct msg_checkpoint *from, uint64_t first, size_t n, float *anchor,
                float *momentum, struct err *err);

/* The state is whole: end what is being read, and remove what was fetched (a thread does). Cheap where
 * there is nothing to do. */
void origin_rest(struct origin *o);

#endif
