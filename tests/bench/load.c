/* load.c - what a coordinator bears: memory per idle connection of members and of strangers, and
 * messages a second. The other ends of all connections are in this process, on one thread; so rates
 * are given per second that the coordinator's process worked, too. */
#include <event2/event.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "proto/proto.h"
#include "tests/bench/bench.h"
#include "tests/bench/fleet.h"

#define CLIENTS 1000
#define SPEAKERS 400    /* of them, in the rates */
#define LEASES_HELD 2   /* twice outer.lease_samples, which is 1 here */
#define IN_FLIGHT 4     /* unanswered messages of one speaker */
#define RATE_S 2.0
#define AGAIN_S 0.1     /* a tick of the coordinator's allowance */
#define PATIENCE_S 60.0
#define DIALS 16        /* at once */
#define REST_MS 500     /* then nothing is on its way any more */

struct crowd;

enum stage { STAGE_ENROL, STAGE_HELLO, STAGE_STRANGER };

struct client {
    struct crowd *crowd;
    struct identity identity;
    struct channel_context *tls;
    struct channel *channel; /* NULL: closed */
    uint64_t term, session;
    bool done;     /* with what the stage wants */
    double spoke;  /* when it said something last */
};

struct crowd {
    struct fleet *fleet;
    struct event_base *base;
    struct event *tick;
    struct client *client; /* [CLIENTS] */
    uint32_t next, under_way, done;
    enum stage stage;
    struct digest secret;
    uint64_t head_index; /* of the ledger, as the first one got it */
    struct digest head;
    uint8_t speaks;      /* message type that is answered with the next one; 0: nothing is said */
    uint64_t answers;
    struct err failed;
};

/* ---- one connection -------------------------------------------------------------------------- */

static void say(struct client *c, uint8_t type, const void *msg) {
    if (channel_send(c->channel, type, c->term, c->session, 0, msg, &c->crowd->failed))
        c->crowd->failed.code = ERR_IO;
}

static void ask(struct client *c) {
    say(c, MSG_LEASE_ASK, &(struct msg_lease_ask){.samples = 1});
}

static void speak(struct client *c) {
    static const struct msg_heartbeat beat = {.progress = 1, .phase = PHASE_IDLE};
    c->spoke = now_s();
    if (c->crowd->speaks == MSG_HEARTBEAT) say(c, MSG_HEARTBEAT, &beat);
    if (c->crowd->speaks == MSG_LEASE_ASK) ask(c);
}

static void is_done(struct client *c) {
    if (c->done) return;
    c->done = true;
    c->crowd->done++;
    c->crowd->under_way--;
}

static void on_welcome(struct client *c) {
    struct crowd *w = c->crowd;
    struct msg_enrol enrol = {.secret = w->secret, .name = proto_str("idle")};
    struct msg_hello hello = {.software = proto_str("bench"), .trains = 1, .term_max = c->term,
                              .head_index = w->head_index, .head_digest = w->head};
    hello.instance = (uint64_t)(c - w->client) + 1;
    if (w->stage == STAGE_ENROL) say(c, MSG_ENROL, &enrol);
    if (w->stage == STAGE_HELLO) say(c, MSG_HELLO, &hello);
    if (w->stage == STAGE_STRANGER) is_done(c);
}

static void on_ledger(struct crowd *w, const struct msg_ledger *l) {
    struct msg_entry e;
    const struct msg_signed_entry *last = &l->entries[l->entries_count - 1];
    if (proto_decode(last->bytes.data, last->bytes.length, RECORD_entry, &e, &w->failed)) return;
    w->head_index = e.index;
    w->head = LEDGER_DIGEST(last);
    proto_decoded_release(RECORD_entry, &e);
}

static bool on_open(void *arg, struct channel *ch, const struct proto_key *key) {
    (void)arg, (void)key;
    channel_set_frame_bytes_max(ch, PROTO_CONTROL_BYTES_MAX);
    return true;
}

static void on_message(void *arg, struct channel *ch, const struct frame *f, const void *msg) {
    struct client *c = arg;
    struct crowd *w = c->crowd;
    (void)ch;
    c->term = f->term;
    switch (f->type) {
    case MSG_WELCOME: on_welcome(c); break;
    case MSG_ENROLLED: is_done(c); break;
    case MSG_HELLO_ACK: c->session = ((const struct msg_hello_ack *)msg)->session; break;
    case MSG_LEDGER: on_ledger(w, msg); break;
    case MSG_LEASES:
        is_done(c); /* the last word after a HELLO */
        w->answers++;
        speak(c);
        break;
    case MSG_HEARTBEAT_ACK:
        w->answers++;
        speak(c);
        break;
    case MSG_BYE:
        err_set(&w->failed, ERR_REFUSED, "the coordinator says: %.*s",
                (int)((const struct msg_bye *)msg)->reason.length,
                (const char *)((const struct msg_bye *)msg)->reason.data);
        break;
    }
}

static void on_close(void *arg, struct channel *ch, const struct err *why) {
    struct client *c = arg;
    (void)ch;
    c->channel = NULL;
    if (!c->crowd->failed.code)
        err_set(&c->crowd->failed, ERR_IO, "connection %td: %.200s", c - c->crowd->client,
                why->msg);
}

static int dial(struct client *c, struct err *err) {
    static const struct channel_ops ops = {on_open, on_message, on_close, NULL};
    struct crowd *w = c->crowd;
    if (!c->tls && !(c->tls = channel_context_create(&c->identity, err))) return -1;
    c->channel = channel_dial(w->base, c->tls, w->fleet->host, w->fleet->port, &ops, c, err);
    return c->channel ? 0 : -1;
}

/* ---- all of them ----------------------------------------------------------------------------- */

/* The loop wakes. A LEASE_ASK beyond a member's share of a tick gets no answer: it is said again. */
static void on_tick(evutil_socket_t fd, short what, void *arg) {
    struct crowd *w = arg;
    (void)fd, (void)what;
    if (w->speaks != MSG_LEASE_ASK) return;
    for (int i = 0; i < SPEAKERS; i++)
        if (now_s() - w->client[i].spoke > AGAIN_S) speak(&w->client[i]);
}

static int turn(struct crowd *w, struct err *err) {
    event_base_loop(w->base, EVLOOP_ONCE);
    if (w->failed.code) *err = w->failed;
    return w->failed.code ? -1 : 0;
}

static void close_all(struct crowd *w) {
    for (int i = 0; i < CLIENTS; i++) {
        if (w->client[i].channel) channel_close(w->client[i].channel, false);
        w->client[i].channel = NULL;
    }
}

/* Everybody connects and says what the stage wants, some at a time. */
static int go(struct crowd *w, enum stage stage, struct err *err) {
    w->stage = stage;
    w->next = w->done = w->under_way = 0;
    w->failed.code = ERR_NONE;
    for (int i = 0; i < CLIENTS; i++) w->client[i].done = false;
    /* The first comes alone: what it is sent of the ledger, the others need not be. */
    for (double begin = now_s(); w->done < CLIENTS;) {
        while (w->next < CLIENTS && w->under_way < (w->done ? DIALS : 1)) {
            if (dial(&w->client[w->next++], err)) return -1;
            w->under_way++;
        }
        if (turn(w, err)) return -1;
        if (now_s() - begin > PATIENCE_S)
            return err_set(err, ERR_TIMEOUT, "%u of %d connections in %.0f s", w->done, CLIENTS,
                           PATIENCE_S);
    }
    return 0;
}

static int rest(struct crowd *w, int ms, struct err *err) {
    for (double begin = now_s(); now_s() - begin < ms / 1e3;)
        if (turn(w, err)) return -1;
    return 0;
}

static double worked_s(pid_t pid) {
    char path[64], text[1024] = "";
    unsigned long user = 0, system = 0;
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    FILE *f = fopen(path, "re");
    if (f) {
        text[fread(text, 1, sizeof text - 1, f)] = 0;
        fclose(f);
    }
    const char *end = strrchr(text, ')'); /* the name may have anything in it */
    if (end) sscanf(end + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system);
    return (double)(user + system) / (double)sysconf(_SC_CLK_TCK);
}

/* ---- what is measured ------------------------------------------------------------------------ */

/* A coordinator that was just started, and then so many connections. */
static int measure_memory(struct bench *b, struct crowd *w, enum stage stage, const char *what,
                          struct err *err) {
    struct series kilobytes = {0};
    if (fleet_restart(w->fleet, err)) return -1;
    double before = (double)fleet_status_bytes(w->fleet->coordinator, "VmRSS");
    if (go(w, stage, err) || rest(w, REST_MS, err)) return -1;
    double after = (double)fleet_status_bytes(w->fleet->coordinator, "VmRSS");
    series_add(&kilobytes, (after - before) / CLIENTS / 1e3);
    row_value(b, what, "kB", &kilobytes, 100);
    row_note(b, "%.1f MB before, %.1f MB with %d connections", before / MB, after / MB, CLIENTS);
    return 0;
}

static int measure_rate(struct bench *b, struct crowd *w, uint8_t type, int in_flight,
                        const char *what, struct err *err) {
    struct series wall = {0}, worked = {0};
    char text[64];
    w->speaks = type;
    for (int i = 0; i < SPEAKERS; i++)
        for (int j = 0; j < in_flight; j++) speak(&w->client[i]);
    if (rest(w, REST_MS, err)) return -1;
    double begin = now_s(), cpu = worked_s(w->fleet->coordinator);
    w->answers = 0;
    if (rest(w, (int)(1e3 * RATE_S), err)) return -1;
    double answers = (double)w->answers;
    series_add(&wall, now_s() - begin);
    series_add(&worked, worked_s(w->fleet->coordinator) - cpu);
    w->speaks = 0;
    if (rest(w, REST_MS, err)) return -1;
    snprintf(text, sizeof text, "coordinator: %s", what);
    row_rate(b, text, "1/s", answers, &wall, NULL, 0, NULL);
    row_rate(b, "    for a second of its processor", "1/s", answers, &worked, NULL, 0, NULL);
    return 0;
}

/* Each is granted something once: a transaction, durable before the answer. */
static int measure_grants(struct bench *b, struct crowd *w, struct err *err) {
    struct series wall = {0};
    for (int turns = 0; turns < LEASES_HELD; turns++) {
        double begin = now_s();
        w->answers = 0;
        for (int i = 0; i < SPEAKERS; i++) ask(&w->client[i]);
        while (w->answers < SPEAKERS)
            if (turn(w, err)) return -1;
        series_add(&wall, now_s() - begin);
    }
    row_rate(b, "coordinator: leases granted, each durable", "1/s", SPEAKERS, &wall, NULL, 0, NULL);
    return 0;
}

static int measure(struct bench *b, struct crowd *w, struct err *err) {
    struct series enrolled = {0};
    double begin = now_s();
    if (fleet_invite(w->fleet, CLIENTS, &w->secret, NULL, err) || go(w, STAGE_ENROL, err)) return -1;
    series_add(&enrolled, now_s() - begin);
    close_all(w);
    row_rate(b, "coordinator: strangers enrolled", "1/s", CLIENTS, &enrolled, NULL, 0, NULL);
    if (measure_memory(b, w, STAGE_HELLO, "coordinator: memory of an idle member's connection", err))
        return -1;
    if (measure_grants(b, w, err) ||
        measure_rate(b, w, MSG_LEASE_ASK, 1, "LEASE_ASKs of 400, nothing granted", err) ||
        measure_rate(b, w, MSG_HEARTBEAT, IN_FLIGHT, "HEARTBEATs of 400 members", err))
        return -1;
    close_all(w);
    for (int i = 0; i < CLIENTS; i++) { /* nobody whom it knows */
        channel_context_destroy(w->client[i].tls);
        w->client[i].tls = NULL;
        identity_create(&w->client[i].identity);
    }
    if (measure_memory(b, w, STAGE_STRANGER, "coordinator: memory of a stranger's connection", err))
        return -1;
    close_all(w);
    return 0;
}

/* Both ends of each connection, and what else is open. */
static int take_descriptors(struct err *err) {
    struct rlimit r;
    if (getrlimit(RLIMIT_NOFILE, &r)) return err_set_errno(err, "descriptors");
    if (r.rlim_cur >= CLIENTS + 200) return 0;
    r.rlim_cur = r.rlim_max < CLIENTS + 200 ? r.rlim_max : CLIENTS + 200;
    return setrlimit(RLIMIT_NOFILE, &r) ? err_set_errno(err, "descriptors") : 0;
}

int bench_load(struct bench *b, int unused, struct err *err) {
    static const char *const settings[] = {
        "model.sequence=64", "inner.batch=1", "outer.inner_steps=1000", "outer.lease_samples=1",
        "outer.heartbeat_seconds=60", "outer.silence_seconds=3600", "serve.strangers_max=32768",
        "serve.stranger_seconds=3600", "serve.connects_per_minute=1000000", NULL};
    static struct client client[CLIENTS];
    struct crowd w = {.base = event_base_new(), .client = client};
    struct timeval often = {.tv_usec = 20000};
    char folder[FLEET_PATH_BYTES];
    (void)unused;
    if (!w.base) return err_set(err, ERR_MEMORY, "no event loop");
    snprintf(folder, sizeof folder, "%.200s/load", b->folder);
    if (take_descriptors(err)) return -1;
    w.fleet = fleet_create(&(struct fleet_config){.folder = folder, .settings = settings}, err);
    if (!w.fleet) return -1;
    w.tick = event_new(w.base, -1, EV_PERSIST, on_tick, &w);
    event_add(w.tick, &often);
    for (int i = 0; i < CLIENTS; i++) {
        w.client[i].crowd = &w;
        identity_create(&w.client[i].identity);
    }
    int rc = measure(b, &w, err);
    close_all(&w);
    for (int i = 0; i < CLIENTS; i++) channel_context_destroy(w.client[i].tls);
    event_free(w.tick);
    event_base_free(w.base);
    fleet_destroy(w.fleet);
    return rc;
}
