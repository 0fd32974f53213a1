/* agent.h - a node: one process that is a member of a run. It joins the state machine of sync.h to
 * the world: coordinator (uplink.h), other members (peers.h), trainer (keeper.h), disk (disk.h),
 * checkpoints (checkpoint.h) and the person at the terminal (console.h). One thread, one event
 * loop; sync's arithmetic is done in small pieces when nothing else is to be done. It never opens
 * a device. */
#ifndef INTELLECT_NODE_AGENT_H
#define INTELLECT_NODE_AGENT_H

#include <stdbool.h>
#include <stdint.h>

#include "node/device.h"
#include "proto/proto.h"

struct agent_options {
    const char *home;             /* folder; NULL = home_default() */
    const struct invite *invite;  /* join; NULL = go on with the run this home has joined */
    const char *name;             /* display name; NULL = host name */
    bool aggregate_only;          /* join: hold and sum, but do not train */
    struct device device;         /* of the trainer */
    int threads;                  /* of the trainer; 0 = all cores */
    int tp, dp, shard;            /* ranks of the trainer, 0 = 1, and enum engine_shard */
    int precision;                /* of the trainer; enum trainer_precision */
    uint64_t activation_bytes;    /* of a rank of the trainer at most; 0 = ENGINE_ACTIVATION_BYTES_MAX */
    int offload;                  /* of the trainer; enum engine_offload */
    int nice;                     /* of the trainer, 0..19 */
    int listen_port;              /* for other members; 0 = any free port, -1 = none (dials only) */
    const char *corpus;           /* where this machine has the corpus; NULL = where the run says */
    bool log_json, quiet, verbose; /* quiet: warnings and errors only; verbose: SYNC_DEBUG too */
};

/* Let this process keep the memory that it frees, up to AGENT_SPARE_BYTES. Chunks, sums and shards come
 * and go with every round; given back to the system each time, their pages are cleared and mapped
 * again, which takes a third of what a round costs. agent_run() does it itself. */
#define AGENT_SPARE_BYTES (256 << 20)
void agent_keep_memory(void);

/* Be a node until the run is over or its owner stops it. Prints through console.h.
 * Returns 0: left in order or the run is complete; or -1 with why it ended. */
int agent_run(const struct agent_options *options, struct err *err);

#endif
