/* uplink.h - the agent's connection to the coordinator: dials, checks that it is the run's,
 * enrols, hands over messages, and dials again when it is lost. Which message means what, from the
 * HELLO on, is sync's business. */
#ifndef INTELLECT_NODE_UPLINK_H
#define INTELLECT_NODE_UPLINK_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/proto.h"

struct event_base;
struct uplink;

/* What the last checked WELCOME said; borrowed until the next one. */
struct uplink_welcome {
    const struct msg_genesis *genesis;
    struct proto_bytes genesis_bytes, delegation;
    struct proto_sig delegation_signature;
    struct proto_key key; /* the coordinator's online key */
    struct frame frame;   /* of the WELCOME: its term */
};

struct uplink_ops {
    /* A WELCOME was checked: run, root key's delegation, and that TLS proved the delegated key.
     * -1: the agent cannot serve this run; on_refused follows with *err, final. */
    int (*on_welcome)(void *arg, const struct uplink_welcome *w, struct err *err);
    /* Only after uplink_set_enrol(): the coordinator gave this key a member id. -1 as above. */
    int (*on_enrolled)(void *arg, uint32_t member, struct err *err);
    /* Ready for the HELLO. */
    void (*on_up)(void *arg);
    void (*on_message)(void *arg, const struct frame *f, const void *msg);
    /* After on_up: the connection is gone. */
    void (*on_down)(void *arg, const char *why);
    /* Said good-bye before on_up, or is not this run's coordinator. final: no further attempt is
     * made. */
    void (*on_refused)(void *arg, const struct err *why, bool final);
    /* For people: "cannot reach 127.0.0.1:7400 (connection refused); trying again every few
     * seconds". */
    void (*on_trouble)(void *arg, const char *text);
};

#define UPLINK_BACKOFF_MS 250 /* doubles, with jitter of half, up to a third of the silence ... */
#define UPLINK_BACKOFF_MS_MAX 10000 /* ... and to this */

/* Start dialling. run: the digest every WELCOME must show. host is copied. */
struct uplink *uplink_create(struct event_base *base, struct channel_context *ctx, const char *host,
                             uint16_t port, const struct digest *run, const struct uplink_ops *ops,
                             void *arg, struct err *err);
void uplink_destroy(struct uplink *u); /* NULL is fine; what is queued is still sent */

/* Show this secret before the HELLO, from the next WELCOME on, until a member id was given. */
void uplink_set_enrol(struct uplink *u, const struct digest *secret, const char *name,
                      bool aggregate_only);
/* No frame for so long: the connection is dead (default 30 s). Time in which this process itself
 * did not run does not count. */
void uplink_set_silence(struct uplink *u, uint32_t silence_ms);

/* Queue a message. Dropped when there is no connection: on_down was called. */
void uplink_send(struct uplink *u, uint8_t type, uint64_t term, uint64_t session, uint64_t plan,
                 const void *msg);
/* Close (on_down does not follow) and dial again after a while; stop: close for good. */
void uplink_redial(struct uplink *u);
void uplink_stop(struct uplink *u);
bool uplink_is_up(const struct uplink *u);
const struct uplink_welcome *uplink_welcome(const struct uplink *u); /* NULL before the first */

#endif
