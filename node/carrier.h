/* carrier.h - sends and looks at parts of a checkpoint that another member writes. The state is kept as it
 * was at the checkpoint's index, chunk by chunk as it changes; a thread does what waits for the network. Who
 * is asked for what is the coordinator's business. */
#ifndef INTELLECT_NODE_CARRIER_H
#define INTELLECT_NODE_CARRIER_H

#include <stdbool.h>
#include <stdint.h>

#include "node/sync.h"
#include "proto/proto.h"

struct event_base;
struct carrier;

/* The answer to a part. Told from the loop, never from within a call. */
typedef void carrier_done_fn(void *arg, const struct msg_checkpoint_part_done *done);

/* elements, chunk_elements: of the state. store_url: the run's (genesis), copied. spool: folder for
 * what is kept, on the disk, borrowed. NULL: no memory. */
struct carrier *carrier_create(struct event_base *base, const struct msg_model *model, uint64_t elements,
                               uint32_t chunk_elements, struct proto_bytes store_url, const char *spool,
                               carrier_done_fn *done, void *arg);
void carrier_destroy(struct carrier *c); /* NULL is fine */

/* The state of `s` is that of msg->index now: keep msg->chunks of it, or, where there are none, nothing any
 * more. What was kept before is forgotten. s is borrowed until then. */
void carrier_keep(struct carrier *c, const struct sync *s, const struct msg_checkpoint_keep *msg);

/* To be called before a chunk of the state changes. */
void carrier_before_change(struct carrier *c, uint32_t chunk);

/* Send a part, or look at one. Where its bytes are not kept, or are not those that the digest says, the
 * answer is no. */
void carrier_part(struct carrier *c, const struct msg_checkpoint_part *msg);

#endif
