/* peers.h - the links to other members: dials and accepts, knows who may (the roster), and gives
 * the rest of the agent one link per member id.
 *
 * Two members may dial each other at the same moment. Both connections are then kept; what is sent
 * goes over the one that opened last, what arrives is taken from both. A member is gone when its
 * last connection is. */
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
    void (*on_drained)(void *arg, uint32_t member);
    /* A line for people: who was refused, or broke the rules. PEERS_COMPLAINTS_MAX a minute. */
    void (*on_complaint)(void *arg, const char *text);
};
#define PEERS_COMPLAINTS_MAX 60

/* own: this member's id. No callback is called from within the functions below. */
struct peers *peers_create(struct event_base *base, struct channel_context *ctx, uint32_t own,
                           const struct peers_ops *ops, void *arg, struct err *err);
void peers_destroy(struct peers *p); /* NULL is fine */

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
