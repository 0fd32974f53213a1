/* uplink.c - the connection to the coordinator; see uplink.h. */
#include "node/uplink.h"

#include <event2/event.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "node/timer.h"

#define WATCH_MS 500
#define STEADY_MS 5000     /* a connection that lasted so long starts the backoff anew */
#define SILENCE_MS 30000   /* before the run's own setting is known */
#define TROUBLE_MS 60000   /* say the same trouble again after so long */

enum uplink_state { UPLINK_WAITING, UPLINK_DIALLING, UPLINK_ENROLLING, UPLINK_UP, UPLINK_STOPPED };

struct uplink {
    struct event_base *base;
    struct channel_context *ctx;
    char host[PROTO_ADDRESS_BYTES_MAX + 1];
    uint16_t port;
    struct digest run;
    const struct uplink_ops *ops;
    void *arg;
    enum uplink_state state;
    struct channel *channel;
    struct event *redial, *watch;
    uint32_t attempts;
    uint64_t up_at_ms, trouble_at_ms, heard_at_ms, watched_at_ms;
    uint32_t silence_ms;
    bool enrols, aggregate_only;
    struct digest secret;
    char name[PROTO_NAME_BYTES_MAX + 1];
    bool welcomed;
    struct uplink_welcome welcome;
    struct msg_genesis genesis;           /* its strings point into genesis_bytes */
    uint8_t *genesis_bytes, *delegation;
};

/* ---- trying again ---------------------------------------------------------------------------- */

/* Half of the wait is fixed, half is chance: nodes that lost the coordinator at one moment do not
 * all come back at one moment. A coordinator that comes back waits one silence for its members: so
 * the backoff stays well below that. */
static void plan_redial(struct uplink *u) {
    uint64_t ms = (uint64_t)UPLINK_BACKOFF_MS << (u->attempts < 6 ? u->attempts : 6);
    if (ms > UPLINK_BACKOFF_MS_MAX) ms = UPLINK_BACKOFF_MS_MAX;
    if (ms > u->silence_ms / 3) ms = u->silence_ms / 3;
    u->attempts++;
    u->state = UPLINK_WAITING;
    timer_set(u->redial, ms / 2 + randombytes_uniform((uint32_t)ms / 2 + 1));
}

static void trouble(struct uplink *u, const char *text) {
    uint64_t now = timer_now_ms();
    if (u->trouble_at_ms && now - u->trouble_at_ms < TROUBLE_MS) return;
    u->trouble_at_ms = now;
    char line[512];
    snprintf(line, sizeof line, "coordinator %s:%u: %s; trying again", u->host, u->port, text);
    u->ops->on_trouble(u->arg, line);
}

/* The channel is gone or was closed: tell, and dial again. */
static void lost(struct uplink *u, const char *why) {
    bool was_up = u->state == UPLINK_UP;
    u->channel = NULL;
    event_del(u->watch);
    if (was_up && timer_now_ms() - u->up_at_ms > STEADY_MS) u->attempts = 0;
    plan_redial(u);
    if (was_up)
        u->ops->on_down(u->arg, why);
    else
        trouble(u, why);
}

static void close_channel(struct uplink *u, bool flush) {
    if (u->channel) channel_close(u->channel, flush);
    u->channel = NULL;
    event_del(u->watch);
}

/* This coordinator will not do; another attempt may help unless `final`. */
static void refuse(struct uplink *u, const struct err *why, bool final) {
    close_channel(u, true);
    if (final) {
        u->state = UPLINK_STOPPED;
        u->ops->on_refused(u->arg, why, true);
        return;
    }
    plan_redial(u);
    u->ops->on_refused(u->arg, why, false);
}

/* ---- before the HELLO ------------------------------------------------------------------------ */

/* Keep a copy of the welcome. The genesis never changes: its digest is the run. */
static int keep_welcome(struct uplink *u, const struct msg_welcome *m, struct err *err) {
    uint8_t *delegation = malloc(m->delegation.length + 1u);
    if (!delegation) return err_set(err, ERR_MEMORY, "no memory for a welcome");
    memcpy(delegation, m->delegation.data, m->delegation.length);
    free(u->delegation);
    u->delegation = delegation;
    u->welcome.delegation = (struct proto_bytes){ delegation, m->delegation.length };
    u->welcome.delegation_signature = m->delegation_signature;
    u->welcome.key = *channel_peer_key(u->channel);
    if (u->welcomed) return 0;
    if (!(u->genesis_bytes = malloc(m->genesis.length + 1u)))
        return err_set(err, ERR_MEMORY, "no memory for a genesis");
    memcpy(u->genesis_bytes, m->genesis.data, m->genesis.length);
    u->welcome.genesis_bytes = (struct proto_bytes){ u->genesis_bytes, m->genesis.length };
    u->welcome.genesis = &u->genesis;
    if (proto_decode(u->genesis_bytes, m->genesis.length, RECORD_genesis, &u->genesis, err)) {
        free(u->genesis_bytes);
        u->genesis_bytes = NULL;
        return -1;
    }
    u->welcomed = true;
    return 0;
}

/* Nothing secret is said before this has passed. */
static int check_welcome(struct uplink *u, const struct msg_welcome *m, struct err *err) {
    char theirs[DIGEST_HEX_BYTES], ours[DIGEST_HEX_BYTES];
    struct digest run = digest_of(m->genesis.data, m->genesis.length);
    struct msg_genesis genesis;
    if (m->version != PROTO_VERSION)
        return err_set(err, ERR_UNSUPPORTED, "it speaks protocol version %u, this program %u",
                       m->version, PROTO_VERSION);
    if (!digest_equal(&run, &u->run)) {
        digest_hex(&run, theirs);
        digest_hex(&u->run, ours);
        return err_set(err, ERR_REFUSED, "it serves run %.16s..., not %.16s...", theirs, ours);
    }
    if (proto_decode(m->genesis.data, m->genesis.length, RECORD_genesis, &genesis, err)) return -1;
    int rc = ledger_check_delegation(&genesis, &u->run, m->delegation, &m->delegation_signature,
                                     channel_peer_key(u->channel), err);
    proto_decoded_release(RECORD_genesis, &genesis);
    return rc ? -1 : keep_welcome(u, m, err);
}

static void come_up(struct uplink *u) {
    u->state = UPLINK_UP;
    u->up_at_ms = timer_now_ms();
    u->trouble_at_ms = 0;
    u->ops->on_up(u->arg);
}

static void send_enrol(struct uplink *u) {
    struct msg_enrol m = { .secret = u->secret, .name = proto_str(u->name),
                           .aggregate_only = u->aggregate_only };
    u->state = UPLINK_ENROLLING;
    channel_send(u->channel, MSG_ENROL, 0, 0, 0, &m, NULL);
}

static void on_welcome(struct uplink *u, const struct frame *f, const struct msg_welcome *m) {
    struct err err = {0};
    if (check_welcome(u, m, &err)) {
        err_prefix(&err, "coordinator %s:%u", u->host, u->port);
        refuse(u, &err, u->up_at_ms == 0); /* one that was right before may be so again */
        return;
    }
    u->welcome.frame = *f;
    if (u->ops->on_welcome(u->arg, &u->welcome, &err))
        refuse(u, &err, true);
    else if (u->enrols)
        send_enrol(u);
    else
        come_up(u);
}

static void on_enrolled(struct uplink *u, const struct msg_enrolled *m) {
    struct err err = {0};
    u->enrols = false;
    sodium_memzero(&u->secret, sizeof u->secret);
    if (u->ops->on_enrolled(u->arg, m->member, &err))
        refuse(u, &err, true);
    else
        come_up(u);
}

static void on_early_bye(struct uplink *u, const struct msg_bye *m) {
    char reason[PROTO_TEXT_BYTES_MAX + 1];
    struct err err = {0};
    proto_str_copy(m->reason, reason, sizeof reason);
    err_set(&err, (enum err_code)m->code, "the coordinator says: %s", reason);
    refuse(u, &err, m->final);
}

/* ---- the channel ----------------------------------------------------------------------------- */

static bool on_open(void *arg, struct channel *ch, const struct proto_key *key) {
    (void)arg, (void)key; /* judged by the WELCOME's delegation, which is in a genesis' size */
    channel_set_frame_bytes_max(ch, PROTO_CONTROL_BYTES_MAX);
    return true;
}

static void on_message(void *arg, struct channel *ch, const struct frame *f, const void *msg) {
    struct uplink *u = arg;
    (void)ch;
    u->heard_at_ms = timer_now_ms();
    if (u->state == UPLINK_UP)
        u->ops->on_message(u->arg, f, msg);
    else if (f->type == MSG_BYE)
        on_early_bye(u, msg);
    else if (u->state == UPLINK_DIALLING && f->type == MSG_WELCOME)
        on_welcome(u, f, msg);
    else if (u->state == UPLINK_ENROLLING && f->type == MSG_ENROLLED)
        on_enrolled(u, msg);
    else {
        char why[96];
        snprintf(why, sizeof why, "it sent %s out of order", proto_type_name(f->type));
        close_channel(u, false);
        lost(u, why);
    }
}

static void on_close(void *arg, struct channel *ch, const struct err *why) {
    struct uplink *u = arg;
    (void)ch;
    lost(u, why->msg);
}

static const struct channel_ops channel_callbacks = { .on_open = on_open, .on_message = on_message,
                                                      .on_close = on_close };

static void on_redial(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct uplink *u = arg;
    struct err err = {0};
    u->state = UPLINK_DIALLING;
    u->channel = channel_dial(u->base, u->ctx, u->host, u->port, &channel_callbacks, u, &err);
    if (!u->channel) {
        lost(u, err.msg);
        return;
    }
    u->heard_at_ms = u->watched_at_ms = timer_now_ms();
    timer_set(u->watch, WATCH_MS);
}

/* A coordinator that vanished closes nothing. If this process itself did not run, what the
 * coordinator sent meanwhile is still to be read: silence is counted from now on. */
static void on_watch(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct uplink *u = arg;
    uint64_t now = timer_now_ms();
    if (now - u->watched_at_ms > 4 * WATCH_MS) u->heard_at_ms = now;
    u->watched_at_ms = now;
    timer_set(u->watch, WATCH_MS);
    if (now - u->heard_at_ms <= u->silence_ms) return;
    char why[96];
    snprintf(why, sizeof why, "no word for %u ms", u->silence_ms);
    close_channel(u, false);
    lost(u, why);
}

/* ---- for the agent --------------------------------------------------------------------------- */

struct uplink *uplink_create(struct event_base *base, struct channel_context *ctx, const char *host,
                             uint16_t port, const struct digest *run, const struct uplink_ops *ops,
                             void *arg, struct err *err) {
    struct uplink *u = calloc(1, sizeof *u);
    if (!u) {
        err_set(err, ERR_MEMORY, "no memory for an uplink");
        return NULL;
    }
    *u = (struct uplink){ .base = base, .ctx = ctx, .port = port, .run = *run, .ops = ops,
                          .arg = arg, .silence_ms = SILENCE_MS };
    snprintf(u->host, sizeof u->host, "%s", host);
    u->redial = evtimer_new(base, on_redial, u);
    u->watch = evtimer_new(base, on_watch, u);
    if (!u->redial || !u->watch) {
        err_set(err, ERR_MEMORY, "no memory for an uplink's timers");
        uplink_destroy(u);
        return NULL;
    }
    timer_set(u->redial, 0);
    return u;
}

void uplink_destroy(struct uplink *u) {
    if (!u) return;
    if (u->channel) channel_close(u->channel, true);
    if (u->redial) event_free(u->redial);
    if (u->watch) event_free(u->watch);
    if (u->welcomed) proto_decoded_release(RECORD_genesis, &u->genesis);
    free(u->genesis_bytes);
    free(u->delegation);
    sodium_memzero(&u->secret, sizeof u->secret);
    free(u);
}

void uplink_set_enrol(struct uplink *u, const struct digest *secret, const char *name,
                      bool aggregate_only) {
    u->enrols = true;
    u->secret = *secret;
    u->aggregate_only = aggregate_only;
    snprintf(u->name, sizeof u->name, "%s", name);
}

void uplink_set_silence(struct uplink *u, uint32_t silence_ms) { u->silence_ms = silence_ms; }

void uplink_send(struct uplink *u, uint8_t type, uint64_t term, uint64_t session, uint64_t plan,
                 const void *msg) {
    struct err err = {0};
    if (u->state != UPLINK_UP) return;
    if (channel_send(u->channel, type, term, session, plan, msg, &err) && err.code != ERR_IO) {
        char line[320];
        snprintf(line, sizeof line, "%s was not sent: %.200s", proto_type_name(type), err.msg);
        u->ops->on_trouble(u->arg, line);
    }
}

void uplink_redial(struct uplink *u) {
    if (u->state == UPLINK_WAITING || u->state == UPLINK_STOPPED) return;
    close_channel(u, false);
    plan_redial(u);
}

void uplink_stop(struct uplink *u) {
    close_channel(u, true);
    event_del(u->redial);
    u->state = UPLINK_STOPPED;
}

bool uplink_is_up(const struct uplink *u) { return u->state == UPLINK_UP; }
const struct uplink_welcome *uplink_welcome(const struct uplink *u) {
    return u->welcomed ? &u->welcome : NULL;
}
