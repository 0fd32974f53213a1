/* server_internal.h - the server's state, shared by the files server*.c and by nobody else.
 *
 *   server.c              start, timers, signals, stop, the line per round
 *   server_connections.c  sockets in: who may connect, messages become events of the core
 *   server_actions.c      the core's actions out: store, signatures, messages
 *   server_own_node.c     the aggregate-only node beside us: when it joins, when it goes on */
#ifndef INTELLECT_COORDINATOR_SERVER_INTERNAL_H
#define INTELLECT_COORDINATOR_SERVER_INTERNAL_H

#include <event2/event.h>

#include "coordinator/address.h"
#include "coordinator/aggregator.h"
#include "coordinator/control.h"
#include "coordinator/log.h"
#include "coordinator/run.h"
#include "coordinator/server.h"

/* A connection's number: place in `conns` in the low bits, a count above it, so that none is used
 * twice and each is found at once. */
#define SERVER_CONNECTIONS_MAX 4096u
#define SERVER_RATES 1024u

struct connection {
    uint64_t id; /* 0: the place is free */
    struct server *server;
    struct channel *channel;
    bool open;   /* TLS is up and the core knows of it */
    bool known;  /* a member's */
};

/* How many connections an address may open: a bucket that fills by the minute. Addresses share a
 * place in the table now and then; the later one then begins with a full bucket. */
struct rate {
    uint64_t address; /* keyed digest */
    double tokens;
    uint64_t at_ms;
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
    struct event *tick, *on_int, *on_term, *patience;
    struct address listen, others; /* where we listen; where others find us */
    bool stopping;
    uint64_t ticks;
    struct err failure;            /* code is ERR_NONE while all is well */

    struct connection conns[SERVER_CONNECTIONS_MAX];
    uint64_t connection_count_ever;
    uint32_t stranger_count;
    struct rate rates[SERVER_RATES];
    uint8_t rate_seed[32];
    uint32_t refused;              /* connections since the last log line about them */
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
void server_connection_known(struct server *s, struct connection *c);
/* Close, after sending what is queued; the core does not hear of it. */
void server_connection_close(struct server *s, struct connection *c);
/* A log line for the connections refused since the last one. */
void server_report_refused(struct server *s);

/* ---- server_actions.c ---------------------------------------------------------------------------- */

/* Give the core an event and carry out what it answers. Nothing after a failure. */
void server_step(struct server *s, const struct core_event *ev);

/* ---- server_own_node.c ---------------------------------------------------------------------------- */

/* Once the listener is up: s->aggregator. ERR_NOT_FOUND: there is no program for it. */
int server_start_own_node(struct server *s, struct err *err);

#endif
