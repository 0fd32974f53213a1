/* links.h - what peers.c and links.c share: links and the connections they consist of.
 *
 *   peers.c   the door: who may connect, first words, the roster, what the agent calls
 *   links.c   a link's life: its lanes, which link is used, what goes where in which order
 *
 * A *lane* is one connection: number 0 is the control lane, the others are for bulk. Each side's
 * first word on a lane is LINK, the dialler's first. */
#ifndef INTELLECT_NODE_LINKS_H
#define INTELLECT_NODE_LINKS_H

#include "node/peers.h"

struct event;

struct lane {
    struct peers *peers;
    struct link *link; /* NULL: accepted, its LINK has not come */
    uint8_t number;
    bool outbound, open; /* open: LINK was said by both */
    struct channel *channel;
    uint32_t member;          /* whose key it is; 0: not shown yet */
    struct gate_place *place; /* of an accepted one until it has shown a member's key */
    const char *refused;      /* why we do not want it, or NULL */
    uint64_t told;            /* bulk, out: control messages the other side was told to wait for */
    uint64_t waits_for;       /* bulk, in: control messages that have to come first; 0 = none */
    struct lane *next;        /* among the accepted that belong to no link yet */
};

struct link {
    struct peers *peers;
    uint32_t member;
    bool outbound, open;
    uint64_t process; /* of the other side: another number is another life of it */
    uint64_t number;  /* what its dialler calls it */
    uint64_t opened_ms, serial;
    struct lane *lane[PEERS_LANES_MAX + 1];
    struct event *redial; /* bulk lanes that are missing */
    uint32_t redials;
    uint64_t control_sent, control_heard; /* messages on the control lane that are no tensor data */
    struct link *next;
};

/* A link that could not be made or used, to be told from the loop. */
struct notice {
    uint32_t member;
    char why[128];
    struct notice *next;
};

struct peers {
    struct event_base *base;
    struct channel_context *ctx;
    uint32_t own;
    const struct peers_ops *ops;
    void *arg;
    uint64_t process;             /* this life of ours */
    uint32_t bulk_lanes, bulk_lanes_local;
    uint64_t links_ever;
    struct link *links;
    struct lane *guests;          /* accepted, of no link yet */
    struct gate *gate;
    uint64_t refused_told_ms;
    struct notice *notices, **notices_end;
    struct event *tell;
    struct msg_roster_body roster; /* a deep copy */
};

/* ---- peers.c ----------------------------------------------------------------------------------- */

uint64_t peers_now_ms(void);
/* A line about a lane, and what is wrong with it. */
void peers_complain(const struct lane *l, const char *why);
/* Tell on_close from the loop, as links_settle() would. */
void peers_notify(struct peers *p, uint32_t member, const char *why);
/* Of every lane; the argument is the lane. */
extern const struct channel_ops peers_channel_ops;

/* ---- links.c ----------------------------------------------------------------------------------- */

/* The link that is used for sending to a member, or NULL. */
struct link *links_current(const struct peers *p, uint32_t member);
/* 0: there is none. */
uint64_t links_serial(const struct peers *p, uint32_t member);
bool links_any(const struct peers *p, uint32_t member); /* also one that is being made */
/* Tell what changed since links_serial() was `before`. */
void links_settle(struct peers *p, uint32_t member, uint64_t before, const char *why);

/* A link of ours, and its control lane on the way. -1: err says why not. */
int links_dial(struct peers *p, uint32_t member, const char *host, uint16_t port, struct err *err);
/* The first word on an accepted lane; its channel goes on, or else *why says why not. */
int links_greet(struct lane *l, const struct msg_link *m, const char **why);
/* The answer to ours; likewise. */
int links_answered(struct lane *l, const struct msg_link *m, const char **why);
/* A lane of a link has ended by itself; frees the lane, and the link where it was open. */
void links_lane_lost(struct lane *l, const char *why);

void links_close(struct link *l, bool flush);
/* Choose the lane and queue. -1: the link should be closed. */
int links_send(struct link *l, uint8_t type, uint64_t term, uint64_t session, uint64_t plan,
               const void *msg, struct err *err);
/* What an open lane brought: for the agent, for the link itself, or what has no place there. */
enum heard { HEARD_AGENT, HEARD_OWN, HEARD_WRONG };
enum heard links_hear(struct lane *l, const struct frame *f, const void *msg);
/* Does little wait on each lane? */
bool links_drained(const struct link *l);

#endif
