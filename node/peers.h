/* peers.h - the links to other members: dials and accepts, knows who may (the roster), and gives
 * the rest of the agent one link per member id.
 *
 * A link has a control connection and, between machines, PEERS_BULK_LANES bulk connections for what
 * is tensor data (CHUNK, RESULT, STATE); whoever dialled makes them all. So no question and no answer
 * waits behind megabytes, and a long way is filled by several connections. On one machine they gain
 * nothing and there are none: tensor data then waits for all else in the control connection's queues,
 * which is the same order. MOMENTS are tensor data too, but always go there.
 *
 * What order holds on a link, in each direction:
 *   - control messages (all that are no tensor data) arrive in the order they were sent in;
 *   - a tensor message arrives after every control message that was sent before it;
 *   - a control message may arrive before tensor messages that were sent before it;
 *   - tensor messages among themselves arrive in any order, but for MOMENTS, which keep theirs.
 * While a link is open nothing is lost. When one of its connections breaks, the whole link is gone:
 * on_close says so, and what was sent and not answered has to be taken as lost.
 *
 * Two members may dial each other at the same moment. Both links are then used for a moment, and the
 * one stays that the lower id dialled; whoever changes from one link to the other hears on_close,
 * then on_open. */
#ifndef INTELLECT_NODE_PEERS_H
#define INTELLECT_NODE_PEERS_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/proto.h"

struct event_base;
struct peers;

struct peers_ops {
    void (*on_open)(void *arg, uint32_t member);
    void (*on_message)(void *arg, uint32_t member, const struct frame *f, const void *msg);
    /* The link is gone, or could not be made; what was queued may not have arrived. */
    void (*on_close)(void *arg, uint32_t member, const char *why);
    /* After something was sent: less than PROTO_SEND_LOW waits on each of the link's connections. */
    void (*on_drained)(void *arg, uint32_t member);
    /* A line for people: who was refused, or broke the rules. GATE_LINES_PER_MINUTE at most, of
     * strangers and of members each. */
    void (*on_complaint)(void *arg, const char *text);
};

#define PEERS_BULK_LANES 3
#define PEERS_BULK_LANES_LOCAL 0 /* to an address of this machine */
#define PEERS_LANES_MAX 8
#define PEERS_STRANGERS_MAX 256u
#define PEERS_CONNECTS_PER_MINUTE 600u /* of one address */

/* own: this member's id. No callback is called from within the functions below. */
struct peers *peers_create(struct event_base *base, struct channel_context *ctx, uint32_t own,
                           const struct peers_ops *ops, void *arg, struct err *err);
void peers_destroy(struct peers *p); /* NULL is fine */
/* Bulk connections of the links that are dialled from now on, at most PEERS_LANES_MAX; for tests. */
void peers_set_bulk_lanes(struct peers *p, uint32_t lanes);

/* Whom to accept from now on; links to others are closed (on_close follows). Copied. */
int peers_set_roster(struct peers *p, const struct msg_roster_body *roster, struct err *err);

/* A descriptor from a listener; taken over. */
void peers_accept(struct peers *p, int fd);

/* Make a link to `member` unless there is one or one is being made. on_open or on_close follows. */
void peers_dial(struct peers *p, uint32_t member, const char *host, uint16_t port);

/* Queue a message. Without a link it is dropped and on_close follows. */
void peers_send(struct peers *p, uint32_t member, uint8_t type, uint64_t term, uint64_t session,
                uint64_t plan, const void *msg);
void peers_close(struct peers *p, uint32_t member); /* on_close does not follow */
uint32_t peers_count(const struct peers *p);        /* members with an open link */

#endif
