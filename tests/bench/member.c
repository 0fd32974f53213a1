/* member.c - a light member, see fleet.h: the agent's loop around sync, with a trainer that needs no
 * time. What it sees goes to its place in the shared memory. */
#include <event2/event.h>
#include <signal.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernels/kernels.h"
#include "node/disk.h"
#include "node/origin.h"
#include "node/peers.h"
#include "node/sync.h"
#include "node/timer.h"
#include "node/uplink.h"
#include "proto/model.h"
#include "tests/bench/bench.h"
#include "tests/bench/fleet.h"

#define NOISE_ELEMENTS ((size_t)1 << 16) /* repeated over the vector */
#define NOISE_STD 1e-4f
#define ANSWERS_MAX 64

struct member {
    struct fleet *all;
    struct fleet_member *me;
    struct identity identity;
    struct event_base *base;
    struct event *tick, *work, *answer, *end;
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
    struct msg_genesis genesis;
    struct origin *origin;
    /* the trainer: its parameters, the slot, what it will say in the next turn of the loop */
    float *local, *slot, *noise;
    uint8_t *ops, *fragment_of;
    uint64_t queued, consumed, steps;
    struct sync_event answers[ANSWERS_MAX];
    int answer_count;
    bool freezing; /* a FREEZE waits until fleet.rounds allow it */
    uint32_t freeze_fragment;
};

/* The process ends with its reason; the measuring one reads it. */
static void die(struct member *m, const char *what, const struct err *err) {
    snprintf(m->me->trouble, sizeof m->me->trouble, "%s: %s", what, err->msg);
    fprintf(stderr, "%s\n", m->me->trouble);
    exit(1);
}

/* ---- what is written down -------------------------------------------------------------------- */

static uint64_t rounds_seen(const struct member *m) {
    struct sync_view v;
    sync_look(m->sync, &v);
    return v.round;
}

/* again: a later one counts, else the first. */
static void note(struct member *m, uint64_t round, enum fleet_step step, bool again) {
    struct sync_view v;
    if (round >= FLEET_ROUNDS_MAX) return;
    struct fleet_moment *at = &m->me->round[round].step[step];
    if (at->at_s > 0 && !again) return;
    sync_look(m->sync, &v);
    *at = (struct fleet_moment){now_s(), cpu_s(), m->disk_s, v.bytes_to_peers};
}

static void note_plan(struct member *m, const struct msg_plan *plan) {
    if (plan->round >= FLEET_ROUNDS_MAX) return;
    struct fleet_round *r = &m->me->round[plan->round];
    note(m, plan->round, r->step[FLEET_PLAN].at_s > 0 ? FLEET_REPLAN : FLEET_PLAN, false);
    r->shards = plan->shards_count;
    r->contributors = plan->contributors_count;
    if (m->me->profile) profile_begin();
    if (plan->round && plan->round == m->all->die_in_round && plan->shards_count &&
        plan->shards[0].aggregator == m->me->member) {
        m->all->die_in_round = 0;
        m->me->killed_s = now_s();
        kill(getpid(), SIGKILL);
    }
}

static void note_current(struct member *m) {
    struct sync_view v;
    sync_look(m->sync, &v);
    bool current = v.session && v.chunks_missing == 0 && strcmp(v.phase, "catching up") != 0 &&
                   strcmp(v.phase, "applying") != 0;
    if (current && m->me->current_s == 0) m->me->current_s = now_s();
    m->me->current = current;
}

static void note_sent(struct member *m, const struct sync_action *a) {
    if (a->message == MSG_READY) {
        note(m, ((const struct msg_ready *)a->msg)->round, FLEET_READY, false);
    } else if (a->message == MSG_SHARD_REPORT) {
        note(m, ((const struct msg_shard_report *)a->msg)->round, FLEET_REPORTED, true);
    } else if (a->message == MSG_ROOT && rounds_seen(m)) {
        uint64_t round = rounds_seen(m) - 1;
        note(m, round, FLEET_APPLIED, false);
        profile_stop();
        m->me->applied = (uint32_t)round + 1;
    }
}

/* ---- the trainer ----------------------------------------------------------------------------- */

static void feed(struct member *m, const struct sync_event *ev);

static void say(struct member *m, struct sync_event ev) {
    struct err full;
    ev.samples = m->consumed;
    ev.steps = m->steps;
    ev.loss = 1;
    ev.tokens_per_s = 1e6;
    if (m->answer_count == ANSWERS_MAX) {
        err_set(&full, ERR_FULL, "%d answers wait", ANSWERS_MAX);
        die(m, "trainer", &full);
    }
    m->answers[m->answer_count++] = ev;
    timer_set(m->answer, 0);
}

static void on_answer(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct member *m = arg;
    struct sync_event answers[ANSWERS_MAX];
    int n = m->answer_count;
    memcpy(answers, m->answers, (size_t)n * sizeof *answers);
    m->answer_count = 0;
    for (int i = 0; i < n; i++) feed(m, &answers[i]);
}

static void train(struct member *m, uint64_t samples) {
    m->queued += samples;
    while (m->queued >= m->genesis.inner->batch) {
        m->queued -= m->genesis.inner->batch;
        m->consumed += m->genesis.inner->batch;
        m->steps++;
        say(m, (struct sync_event){.type = SYNC_EV_TRAINER_STEP});
    }
}

/* Every member's noise is its own, and the same in each round: the memory is warm. */
static void fill_local(struct member *m, uint32_t fragment) {
    const float *anchor = sync_anchor(m->sync);
    size_t chunk = m->genesis.outer->chunk_elements, n = m->me->elements;
    for (size_t first = 0; first < n; first += chunk) {
        if (m->fragment_of[first / chunk] != fragment) continue;
        size_t end = first + chunk < n ? first + chunk : n;
        for (size_t i = first; i < end; i++)
            m->local[i] = anchor[i] + m->noise[i % NOISE_ELEMENTS];
    }
}

static void freeze(struct member *m) {
    if (!m->freezing || rounds_seen(m) >= m->all->rounds) return;
    m->freezing = false;
    fill_local(m, m->freeze_fragment);
    note(m, rounds_seen(m), FLEET_FROZEN, false);
    say(m, (struct sync_event){.type = SYNC_EV_TRAINER_FROZEN, .fragment = m->freeze_fragment,
                               .local = m->local});
}

static void reset(struct member *m) {
    m->queued = m->consumed = 0;
    m->freezing = false;
    m->answer_count = 0; /* what was said before is of another life */
    say(m, (struct sync_event){.type = SYNC_EV_TRAINER_APPLIED});
}

/* ---- sync ------------------------------------------------------------------------------------ */

static void perform(struct member *m, const struct sync_action *a) {
    switch (a->type) {
    case SYNC_ACT_SEND:
        note_sent(m, a);
        uplink_send(m->uplink, a->message, a->term, a->session, a->plan, a->msg);
        break;
    case SYNC_ACT_DISCONNECT:
        m->cut = uplink_is_up(m->uplink);
        uplink_redial(m->uplink);
        break;
    case SYNC_ACT_PEER_DIAL: peers_dial(m->peers, a->peer, a->host, a->port); break;
    case SYNC_ACT_PEER_SEND:
        peers_send(m->peers, a->peer, a->message, a->term, a->session, a->plan, a->msg);
        break;
    case SYNC_ACT_PEER_CLOSE: peers_close(m->peers, a->peer); break;
    case SYNC_ACT_ROSTER: peers_set_roster(m->peers, a->msg, NULL); break;
    case SYNC_ACT_TRAINER_SAMPLES: train(m, a->count); break;
    case SYNC_ACT_TRAINER_FREEZE:
        m->freezing = true;
        m->freeze_fragment = a->fragment;
        freeze(m);
        break;
    case SYNC_ACT_TRAINER_APPLY: say(m, (struct sync_event){.type = SYNC_EV_TRAINER_APPLIED}); break;
    case SYNC_ACT_TRAINER_RESET: reset(m); break;
    case SYNC_ACT_TRAINER_MOMENTS_IMPORT:
        say(m, (struct sync_event){.type = SYNC_EV_TRAINER_APPLIED});
        break;
    case SYNC_ACT_TRAINER_MOMENTS_EXPORT:
        say(m, (struct sync_event){.type = SYNC_EV_TRAINER_MOMENTS, .local = m->local});
        break;
    case SYNC_ACT_BYE: fprintf(stderr, "coordinator: %s\n", a->text); break;
    case SYNC_ACT_LOG: fprintf(stderr, "%.3f %d %s\n", now_s(), a->level, a->text); break;
    case SYNC_ACT_TRAINER_CONTINUE:
    case SYNC_ACT_CHECKPOINT_BEGIN:
    case SYNC_ACT_CHECKPOINT_SIGNED: break;
    }
}

static void step(struct member *m, const struct sync_event *ev) {
    struct err err = {0};
    m->stepping = true;
    sync_actions_clear(&m->actions);
    if (sync_step(m->sync, ev, timer_now_ms(), &m->actions, &err)) die(m, "state", &err);
    for (uint32_t i = 0; i < m->actions.count; i++) perform(m, &m->actions.list[i]);
    m->stepping = false;
    if (sync_has_work(m->sync)) timer_set(m->work, 0);
}

static void feed(struct member *m, const struct sync_event *ev) {
    if (!m->sync) return;
    uint64_t before = rounds_seen(m);
    step(m, ev);
    if (rounds_seen(m) > before) note(m, rounds_seen(m) - 1, FLEET_COMMITTED, false);
    if (m->cut) {
        m->cut = false;
        step(m, &(struct sync_event){.type = SYNC_EV_DISCONNECTED});
    }
    note_current(m);
}

static void on_work(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    feed(arg, &(struct sync_event){.type = SYNC_EV_WORK});
}

static void on_tick(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    feed(arg, &(struct sync_event){.type = SYNC_EV_TICK});
    freeze(arg);
}

/* ---- links ----------------------------------------------------------------------------------- */

static void on_peer_open(void *arg, uint32_t peer) {
    feed(arg, &(struct sync_event){.type = SYNC_EV_PEER_OPEN, .peer = peer});
}

static void on_peer_message(void *arg, uint32_t peer, const struct frame *f, const void *msg) {
    feed(arg, &(struct sync_event){.type = SYNC_EV_PEER_MESSAGE, .peer = peer, .frame = *f,
                                   .msg = msg});
}

static void on_peer_close(void *arg, uint32_t peer, const char *why) {
    fprintf(stderr, "peer %u: %s\n", peer, why);
    feed(arg, &(struct sync_event){.type = SYNC_EV_PEER_CLOSED, .peer = peer});
}

static void on_peer_drained(void *arg, uint32_t peer) {
    feed(arg, &(struct sync_event){.type = SYNC_EV_PEER_DRAINED, .peer = peer});
}

static void on_complaint(void *arg, const char *text) {
    (void)arg;
    fprintf(stderr, "%s\n", text);
}

static const struct peers_ops peers_ops = {.on_open = on_peer_open, .on_message = on_peer_message,
                                           .on_close = on_peer_close,
                                           .on_drained = on_peer_drained,
                                           .on_complaint = on_complaint};

static void on_accept(void *arg, int fd) {
    struct member *m = arg;
    if (m->peers) peers_accept(m->peers, fd);
    else close(fd);
}

/* ---- the disk, timed ------------------------------------------------------------------------- */

static void *timed_map(void *arg, const char *name, size_t bytes, bool *created, struct err *err) {
    struct member *m = arg;
    return m->disk.map(m->disk.arg, name, bytes, created, err);
}

static int timed_flush(void *arg, const char *name, size_t offset, size_t bytes, struct err *err) {
    struct member *m = arg;
    double begin = now_s();
    int rc = m->disk.flush(m->disk.arg, name, offset, bytes, err);
    m->disk_s += now_s() - begin;
    return rc;
}

static int timed_put(void *arg, const char *name, const void *bytes, size_t length,
                     struct err *err) {
    struct member *m = arg;
    double begin = now_s();
    int rc = m->disk.put(m->disk.arg, name, bytes, length, err);
    m->disk_s += now_s() - begin;
    return rc;
}

static int timed_get(void *arg, const char *name, uint8_t **out, size_t *length, struct err *err) {
    struct member *m = arg;
    return m->disk.get(m->disk.arg, name, out, length, err);
}

static void timed_remove(void *arg, const char *name) {
    struct member *m = arg;
    double begin = now_s();
    m->disk.remove(m->disk.arg, name);
    m->disk_s += now_s() - begin;
}

/* ---- becoming a member ----------------------------------------------------------------------- */

static int load_state(void *arg, const struct msg_checkpoint *from, uint64_t first, size_t n,
                      float *anchor, float *momentum, struct err *err) {
    struct member *m = arg;
    return origin_load(m->origin, from, first, n, anchor, momentum, err);
}

static void make_trainer(struct member *m) {
    const struct msg_outer *o = m->genesis.outer;
    struct err err;
    size_t n = m->me->elements, chunks = (n + o->chunk_elements - 1) / o->chunk_elements;
    m->fragment_of = take_memory(chunks);
    if (proto_model_fragments(m->genesis.model, o->chunk_elements, o->fragments, m->fragment_of,
                              &err))
        die(m, "genesis", &err);
    m->me->chunks = (uint32_t)chunks;
    if (!m->me->trains) return;
    m->local = take_memory(n * sizeof *m->local);
    m->slot = take_memory(n * sizeof *m->slot);
    m->ops = take_memory(chunks);
    memset(m->ops, 0, chunks);
    m->noise = take_floats(NOISE_ELEMENTS, NOISE_STD, m->me->member);
}

static int on_welcome(void *arg, const struct uplink_welcome *w, struct err *err) {
    struct member *m = arg;
    if (m->genesis_bytes) return 0;
    m->genesis_bytes = take_memory(w->genesis_bytes.length);
    memcpy(m->genesis_bytes, w->genesis_bytes.data, w->genesis_bytes.length);
    if (proto_decode(m->genesis_bytes, w->genesis_bytes.length, RECORD_genesis, &m->genesis, err))
        return -1;
    m->me->elements = proto_model_elements(m->genesis.model);
    return 0;
}

static int on_enrolled(void *arg, uint32_t member, struct err *err) {
    struct member *m = arg;
    struct timeval tick = {.tv_usec = SYNC_TICK_MS * 1000};
    m->me->member = member;
    m->me->enrolled_s = now_s();
    if (disk_open(m->me->home, &m->disk, err)) return -1;
    m->timed = (struct disk){.arg = m, .map = timed_map, .flush = timed_flush, .put = timed_put,
                             .get = timed_get, .remove = timed_remove};
    if (!(m->origin = origin_create(&m->genesis))) return err_set(err, ERR_MEMORY, "no memory");
    struct sync_config config = {.genesis = &m->genesis, .run = m->all->run,
                                 .identity = &m->identity, .member = member,
                                 .trains = m->me->trains, .port = m->port,
                                 .elements = m->me->elements, .load = load_state, .load_arg = m,
                                 .disk = m->timed};
    randombytes_buf(&config.instance, sizeof config.instance);
    make_trainer(m);
    if (!(m->sync = sync_create(&config, timer_now_ms(), err))) return -1;
    if (m->me->trains) sync_set_slot(m->sync, m->slot, m->ops);
    if (!(m->peers = peers_create(m->base, m->ctx, member, &peers_ops, m, err))) return -1;
    event_add(m->tick, &tick);
    return 0;
}

static void on_up(void *arg) {
    struct member *m = arg;
    feed(m, &(struct sync_event){.type = SYNC_EV_CONNECTED,
                                 .frame = uplink_welcome(m->uplink)->frame});
    /* Its steps are not 0, so nobody is asked for second moments. */
    m->steps = 1;
    if (m->me->trains) say(m, (struct sync_event){.type = SYNC_EV_TRAINER_UP});
}

static void on_message(void *arg, const struct frame *f, const void *msg) {
    struct member *m = arg;
    if (f->type == MSG_PLAN) note_plan(m, msg);
    feed(m, &(struct sync_event){.type = SYNC_EV_MESSAGE, .frame = *f, .msg = msg});
}

static void on_down(void *arg, const char *why) {
    fprintf(stderr, "lost the coordinator: %s\n", why);
    feed(arg, &(struct sync_event){.type = SYNC_EV_DISCONNECTED});
}

static void on_refused(void *arg, const struct err *why, bool final) {
    (void)final;
    die(arg, "refused", why);
}

static const struct uplink_ops uplink_ops = {.on_welcome = on_welcome, .on_enrolled = on_enrolled,
                                             .on_up = on_up, .on_message = on_message,
                                             .on_down = on_down, .on_refused = on_refused,
                                             .on_trouble = on_complaint};

/* ---- life ------------------------------------------------------------------------------------ */

static void on_end(evutil_socket_t number, short what, void *arg) {
    (void)number, (void)what;
    event_base_loopbreak(((struct member *)arg)->base);
}

static int start(struct member *m, struct err *err) {
    char name[16];
    m->base = event_base_new();
    if (!m->base) return err_set(err, ERR_MEMORY, "no event loop");
    m->tick = event_new(m->base, -1, EV_PERSIST, on_tick, m);
    m->work = evtimer_new(m->base, on_work, m);
    m->answer = evtimer_new(m->base, on_answer, m);
    m->end = evsignal_new(m->base, SIGTERM, on_end, m);
    if (!m->tick || !m->work || !m->answer || !m->end || event_add(m->end, NULL))
        return err_set(err, ERR_MEMORY, "no events");
    identity_create(&m->identity);
    if (!(m->ctx = channel_context_create(&m->identity, err))) return -1;
    m->listener = listener_create(m->base, "127.0.0.1", &m->port, on_accept, m, err);
    if (!m->listener) return -1;
    m->uplink = uplink_create(m->base, m->ctx, m->all->host, m->all->port, &m->all->run,
                              &uplink_ops, m, err);
    if (!m->uplink) return -1;
    snprintf(name, sizeof name, "light-%d", (int)(m->me - m->all->member));
    uplink_set_enrol(m->uplink, &m->me->secret, name, !m->me->trains);
    return 0;
}

static void report(struct member *m) {
    m->me->memory = (struct fleet_memory){fleet_status_bytes(getpid(), "VmHWM"),
                                          fleet_status_bytes(getpid(), "RssAnon")};
    if (m->me->profile) profile_write(&m->me->profile_of);
}

int fleet_member_main(int argc, char **argv) {
    struct member m = {0};
    struct err err = {0};
    if (argc != 3) return 2;
    m.all = mmap(NULL, sizeof *m.all, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(argv[1]), 0);
    int place = atoi(argv[2]);
    if (m.all == MAP_FAILED || place < 0 || place >= FLEET_MEMBERS_MAX) return 2;
    m.me = &m.all->member[place];
    m.me->started_s = now_s();
    if (proto_init(&err) || start(&m, &err)) die(&m, "start", &err);
    event_base_dispatch(m.base);
    report(&m);
    return 0; /* the rest goes with the process */
}
