/* agent_internal.h - what the two files of the agent share: agent.c (begin, become a member, end)
 * and agent_events.c (what happens outside becomes an event for sync, what sync wants a call). */
#ifndef INTELLECT_NODE_AGENT_INTERNAL_H
#define INTELLECT_NODE_AGENT_INTERNAL_H

#include <event2/event.h>
#include <stdbool.h>
#include <stdint.h>

#include "node/agent.h"
#include "node/carrier.h"
#include "node/checkpoint.h"
#include "node/console.h"
#include "node/disk.h"
#include "node/home.h"
#include "node/keeper.h"
#include "node/origin.h"
#include "node/peers.h"
#include "node/sync.h"
#include "node/timer.h"
#include "node/uplink.h"

#define AGENT_GOODBYE_MS 200 /* what is queued on connections is sent before the loop ends */

struct agent {
    const struct agent_options *options;
    struct home home;
    struct home_run run;
    char corpus[PROTO_URL_BYTES_MAX + 1]; /* as asked for; in `run` once a trainer has opened it */
    struct console *console;
    struct event_base *base;
    struct channel_context *ctx;
    struct listener *listener;
    uint16_t port;              /* that members may dial; 0 = none */
    struct uplink *uplink;

    /* From set_up() on: the run is known and this node is a member of it. */
    bool is_member;
    struct msg_genesis genesis; /* its strings point into run.genesis */
    uint64_t elements;
    struct disk disk;
    struct origin *origin;
    char origin_said[sizeof(((struct err *)0)->msg)]; /* the last trouble with it that was told */
    struct sync *sync;
    struct peers *peers;
    struct keeper *keeper;      /* NULL: this node does not train */
    struct checkpoint *checkpoint;
    struct carrier *carrier;
    struct sync_actions actions;
    bool stepping;              /* inside sync_step or its actions */
    bool trainer_up, cut;       /* cut: sync asked to disconnect */
    uint64_t step;
    double loss, tokens_per_s;  /* of the last step; smoothed */
    double data_share;          /* of the trainer's time, waiting for the corpus */
    double loss_sum;            /* over loss_count steps, since the last round's line */
    uint32_t loss_count;
    uint64_t index_shown, round_shown; /* of the state, when the last round's line was written */

    struct timer_turn longest;  /* of the loop's turns since it was told */
    const char *longest_for;
    uint64_t longest_told_ms;

    struct event *tick, *work, *end, *signals[3];
    bool leaving, trainer_gone, said_goodbye;
    int signals_seen;
    struct err failed;          /* code != ERR_NONE: why the node ends */
};

/* agent_events.c: feed sync one event and carry out its actions. Not from within an action. */
void agent_feed(struct agent *a, const struct sync_event *ev);
void agent_on_tick(evutil_socket_t fd, short what, void *arg);
void agent_on_work(evutil_socket_t fd, short what, void *arg);
extern const struct keeper_ops agent_keeper_ops;
extern const struct peers_ops agent_peers_ops;
extern const struct checkpoint_ops agent_checkpoint_ops;
void agent_on_part_done(void *agent, const struct msg_checkpoint_part_done *done);
void agent_before_change(void *agent, uint32_t chunk);

/* agent.c: end in order; with an error, of which the first one counts. Only sets things in motion,
 * so it may be called from anywhere. */
void agent_leave(struct agent *a);
void agent_fail(struct agent *a, const struct err *why);

#endif
