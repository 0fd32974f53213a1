/* aggregator.h - the aggregate-only node beside a coordinator: an ordinary `intellect-node` process
 * of our own, so that a run works when everyone else sits behind NAT. It is started, watched,
 * started again with backoff, and ends with us (PR_SET_PDEATHSIG), however we end. */
#ifndef INTELLECT_COORDINATOR_AGGREGATOR_H
#define INTELLECT_COORDINATOR_AGGREGATOR_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "proto/err.h"

#define AGGREGATOR_FOLDER "aggregator"          /* below the run's folder: the node's home */
#define AGGREGATOR_IDENTITY "aggregator/identity.key"
#define AGGREGATOR_TOKENIZER "tokenizer.json" /* in its home: goes into the checkpoints that it writes */
/* Between an end and the next start; doubles, and begins anew after a start that held a minute. */
#define AGGREGATOR_BACKOFF_MS_MIN 500
#define AGGREGATOR_BACKOFF_MS_MAX 30000

struct event_base;
struct aggregator;

struct aggregator_ops {
    /* Fill `line` with an invite and return 0, or set *line to '\0' where the node has enrolled
     * already; -1: try again later. */
    int (*invite)(void *arg, char *line, size_t size, struct err *err);
};

/* program  path of intellect-node; see aggregator_find_program().
 * home     the node's folder. listen_port: where it lets peers dial in; 0 = any.
 * Starts the process at once. Returns NULL with ERR_MEMORY or ERR_IO. */
struct aggregator *aggregator_create(struct event_base *base, const char *program, const char *home,
                                     uint16_t listen_port, const struct aggregator_ops *ops,
                                     void *arg, struct err *err);
/* Ask it to end in order (SIGTERM); aggregator_gone() tells when it has. */
void aggregator_stop(struct aggregator *a);
bool aggregator_gone(const struct aggregator *a);
/* Kills what is still there. */
void aggregator_destroy(struct aggregator *a);

/* `intellect-node` beside our own program, else in $PATH. ERR_NOT_FOUND says where it looked. */
int aggregator_find_program(char *out, size_t size, struct err *err);

#endif
