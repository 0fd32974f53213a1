/* keeper.h - the agent's hand on its trainer process: starts it, restarts it when it dies or hangs,
 * gives up when it keeps failing. It moves no parameters and knows no rounds; the agent talks to
 * the trainer through keeper_segment(). */
#ifndef INTELLECT_NODE_KEEPER_H
#define INTELLECT_NODE_KEEPER_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "node/segment.h"
#include "proto/err.h"

struct event_base;
struct keeper;

struct keeper_ops {
    /* A message of the trainer, in order; between on_start and on_end. */
    void (*on_message)(void *arg, const struct segment_message *m);
    void (*on_start)(void *arg, pid_t pid);
    /* The process is gone (why: "killed by signal 9"); the in slot is the agent's again. A restart
     * follows after wait_ms, or none (keeper_stop was called). */
    void (*on_end)(void *arg, const char *why, uint32_t wait_ms);
    /* It failed KEEPER_FAILURES_MAX times in a row, within seconds and before its first step, or
     * could not even be set up, which would not be better the next time; or its device failed
     * KEEPER_DEVICE_FAILURES_MAX times, each within KEEPER_DEVICE_STEADY_MS. No restart follows. */
    void (*on_give_up)(void *arg, const struct err *why);
};
#define KEEPER_FAILURES_MAX 5
#define KEEPER_DEVICE_FAILURES_MAX 3
#define KEEPER_DEVICE_STEADY_MS 600000 /* a device that worked so long has not failed before */
#define KEEPER_DEVICE_WAIT_MS 1000     /* after the first failure: a driver may have to start again; doubles */
#define KEEPER_BACKOFF_MS 250          /* doubles from failure to failure */
#define KEEPER_BACKOFF_MS_MAX 10000
#define KEEPER_STOP_MS_MAX 20000       /* a trainer that is asked to stop has so long to save */

/* Make the segment and start the first trainer, as `PROGRAM trainer --fd N` (PROGRAM is the
 * running executable).
 *
 * silence_ms  a trainer that works and computes no layer for max(30 s, 4 * silence_ms, 20 of its slowest
 *             steps) is killed as hung; before its first step it has ten times as long. Time in which
 *             the agent itself did not run does not count.
 * Returns NULL with ERR_MEMORY or ERR_IO. */
struct keeper *keeper_create(struct event_base *base, const struct segment_setup *setup,
                             uint32_t silence_ms, const struct keeper_ops *ops, void *arg,
                             struct err *err);
/* Kills the trainer if there is one and waits for its end (milliseconds). NULL is fine. */
void keeper_destroy(struct keeper *k);

/* Ask the trainer to save and end; on_end follows at the latest after KEEPER_STOP_MS_MAX. Returns
 * false when none runs: nothing follows. */
bool keeper_stop(struct keeper *k);

struct segment *keeper_segment(struct keeper *k);
/* Send a command. One that no trainer takes (none runs) is dropped: on_end was called. A trainer
 * whose ring is full does not listen any more and is restarted. */
void keeper_send(struct keeper *k, const struct segment_message *m);
pid_t keeper_pid(const struct keeper *k);        /* 0 = none runs */
uint32_t keeper_restarts(const struct keeper *k);

#endif
