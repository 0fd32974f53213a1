/* member.h - inside a light member (fleet.h): what its files share.
 *
 *   member.c         the loop around sync, links, disk, life
 *   member_played.c  the trainer that needs no time
 *   member_real.c    a real trainer process instead, checkpoints, and how late the loop is */
#ifndef INTELLECT_BENCH_MEMBER_H
#define INTELLECT_BENCH_MEMBER_H

#include <event2/event.h>

#include "node/checkpoint.h"
#include "node/disk.h"
#include "node/keeper.h"
#include "node/origin.h"
#include "node/peers.h"
#include "node/sync.h"
#include "node/timer.h"
#include "node/uplink.h"
#include "tests/bench/bench.h"
#include "tests/bench/fleet.h"

#define MEMBER_ANSWERS_MAX 64

/* Parameters, the slot, what it will say in the next turn of the loop. */
struct played {
    float *local, *slot, *noise;
    uint8_t *ops, *fragment_of;
    uint64_t queued, consumed, steps;
    struct event *answer;
    struct sync_event answers[MEMBER_ANSWERS_MAX];
    int answer_count;
    bool freezing; /* a FREEZE waits until fleet.rounds allow it */
    uint32_t freeze_fragment;
};

struct real {
    struct keeper *keeper;
    bool up;
    struct checkpoint *checkpoint;
    uint32_t checkpoints_begun;
    struct event *watch;
    double watched_s;
};

struct member {
    struct fleet *all;
    struct fleet_member *me;
    struct identity identity;
    struct event_base *base;
    struct event *tick, *work, *end;
    struct channel_context *ctx;
    struct listener *listener;
    uint16_t port;
    struct uplink *uplink;
    struct peers *peers;
    struct disk disk, timed; /* timed: disk's calls, their time counted */
    double disk_s;
    struct sync *sync;
    struct sync_actions actions;
    bool stepping, cut;
    uint8_t *genesis_bytes;
    uint32_t genesis_length;
    struct msg_genesis genesis;
    struct origin *origin;
    struct played played;
    struct real real;
};

/* ---- member.c -------------------------------------------------------------------------------- */

/* The process ends with its reason; the measuring one reads it. */
void member_die(struct member *m, const char *what, const struct err *err);
/* One event for sync, and what it wants. Not from within an action. */
void member_feed(struct member *m, const struct sync_event *ev);
/* Commits in the ledger here. */
uint64_t member_rounds(const struct member *m);
/* Write down that it is now. again: a later one counts, else the first. */
void member_note(struct member *m, uint64_t round, enum fleet_step step, bool again);

/* ---- member_played.c, member_real.c ---------------------------------------------------------- */

/* Once sync is there. */
void played_begin(struct member *m);
/* What sync asks of a trainer (SYNC_ACT_TRAINER_*). */
void played_perform(struct member *m, const struct sync_action *a);
/* A FREEZE that had to wait, now and then. */
void played_tick(struct member *m);

int real_begin(struct member *m, struct err *err);
void real_perform(struct member *m, const struct sync_action *a);

#endif
