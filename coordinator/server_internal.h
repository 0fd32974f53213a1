/* server_internal.h - the server's state, shared by the files server*.c and by nobody else.
 *
 *   server.c              start, timers, signals, stop, the line per round
 *   server_connections.c  sockets in: who may connect, messages become events of the core
 *   server_actions.c      the core's actions out: store, signatures, messages
 *   server_own_node.c     the aggregate-only node beside us: when it joins, when it goes on */
#ifndef INTELLECT_COORDINATOR_SERVER_INTERNAL_H
#define INTELLECT_COORDINATOR_SERVER_INTERNAL_H

#include <event2/event.h>

#include "proto/address.h"
#include "coordinator/aggregator.h"
#include "coordinator/control.h"
#include "coordinator/log.h"
#include "coordinator/run.h"
#include "coordinator/server.h"

/* A connection's number: place in `conns` in the low bits, a count above it, so that none is used
 * twice and each is found at once. */
#define SERVER_CONNECTIONS_MAX 4096u

struct connection {
    uint64_t id; /* 0: the place is free */
    struct server *server;
    struct channel *channel;
    bool open;                /* TLS is up and the core knows of it */
    struct gate_place *place; /* a stranger's; NULL once it is known as a member's */
};

/* What one line per round is made of. */
struct round_clock {
    uint64_t commits, tokens, since_ms, at_ms, train_ms, reduce_ms;
};

struct server {
    const struct server_config *config;
    struct run *run;
    struct run_keys keys;
    uint64_t term, restart_above; /* restart_above: the core asked for a new one under a higher term; 0 = no */
    struct core *core;
    struct core_actions actions;
    struct event_base *base;
    struct channel_context *tls;
    struct listener *listener;
    struct control *control;
    struct aggregator *aggregator;
    struct event *tick, *on_int, *on_term, *on_hup, *patience; /* on_hup: NULL under nohup */
    struct address listen, others; /* where we listen; where others find us */
    bool stopping;
    uint64_t ticks;
    struct err failure;            /* code is ERR_NONE while all is well */

    struct connection conns[SERVER_CONNECTIONS_MAX];
    uint64_t connection_count_ever;
    struct gate *gate;
    bool stranger_speaks;          /* the core is in the message of a stranger */
    struct round_clock clock;
};

uint64_t server_now_ms(void);
uint64_t server_unix_ms(void);

/* ---- server.c ---------------------------------------------------------------------------------- */

/* The store holds more of the ledger than our core knows: a new core from it, under a new term. */
void server_begin_again(struct server *s);
/* Something is wrong for good: nothing more is sent, the loop ends, server_run() returns this. */
void server_fail(struct server *s, const struct err *why);

/* ---- server_connections.c ----------------------------------------------------------------------- */

void server_on_accept(void *arg, int fd);
/* NULL when it is gone. */
struct connection *server_connection(struct server *s, uint64_t id);
void server_connection_known(struct connection *c);
/* Close, after sending what is queued; the core does not hear of it. */
void server_connection_close(struct connection *c);
/* A warning about somebody outside, as long as there are not too many of them. */
void server_tell(struct server *s, bool of_member, const char *text);
/* A log line for the connections refused since the last one. */
void server_report_refused(struct server *s);

/* ---- server_actions.c ---------------------------------------------------------------------------- */

/* Give the core an event and carry out what it answers. Nothing after a failure. */
void server_step(struct server *s, const struct core_event *ev);

/* ---- server_own_node.c ---------------------------------------------------------------------------- */

/* Once the listener is up: s->aggregator. ERR_NOT_FOUND: there is no program for it. */
int server_start_own_node(struct server *s, struct err *err);

#endif
