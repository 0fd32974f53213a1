/* member.c - a light member, see fleet.h: the agent's loop around sync. What it sees goes to its place
 * in the shared memory. */
#include <signal.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "node/agent.h"
#include "proto/model.h"
#include "tests/bench/member.h"

void member_die(struct member *m, const char *what, const struct err *err) {
    snprintf(m->me->trouble, sizeof m->me->trouble, "%s: %s", what, err->msg);
    fprintf(stderr, "%s\n", m->me->trouble);
    exit(1);
}

/* ---- what is written down -------------------------------------------------------------------- */

uint64_t member_rounds(const struct member *m) {
    struct sync_view v;
    sync_look(m->sync, &v);
    return v.round;
}

void member_note(struct member *m, uint64_t round, enum fleet_step step, bool again) {
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
    member_note(m, plan->round, r->step[FLEET_PLAN].at_s > 0 ? FLEET_REPLAN : FLEET_PLAN, false);
    r->shards = plan->shards_count;
    r->contributors = plan->contributors_count;
    if (m->me->profile) profile_begin(0);
    if (plan->round && plan->round == m->all->die_in_round && plan->shards_count &&
        plan->shards[0].aggregator == m->me->member) {
        m->all->die_in_round = 0;
        m->me->killed_s = now_s();
        kill(getpid(), SIGKILL);
    }
}

static void note_sent(struct member *m, const struct sync_action *a) {
    if (a->message == MSG_READY) {
        member_note(m, ((const struct msg_ready *)a->msg)->round, FLEET_READY, false);
    } else if (a->message == MSG_SHARD_REPORT) {
        member_note(m, ((const struct msg_shard_report *)a->msg)->round, FLEET_REPORTED, true);
    } else if (a->message == MSG_ROOT && member_rounds(m)) {
        uint64_t round = member_rounds(m) - 1;
        member_note(m, round, FLEET_APPLIED, false);
        profile_stop();
        m->me->applied = (uint32_t)round + 1;
    }
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
    case SYNC_ACT_TRAINER_SAMPLES:
    case SYNC_ACT_TRAINER_FREEZE:
    case SYNC_ACT_TRAINER_APPLY:
    case SYNC_ACT_TRAINER_RESET:
    case SYNC_ACT_TRAINER_CONTINUE:
    case SYNC_ACT_TRAINER_MOMENTS_IMPORT:
    case SYNC_ACT_TRAINER_MOMENTS_EXPORT:
        if (m->real.keeper) real_perform(m, a);
        else played_perform(m, a);
        break;
    case SYNC_ACT_BYE: fprintf(stderr, "coordinator: %s\n", a->text); break;
    case SYNC_ACT_LOG: fprintf(stderr, "%.3f %d %s\n", now_s(), a->level, a->text); break;
    case SYNC_ACT_CHECKPOINT_BEGIN:
    case SYNC_ACT_CHECKPOINT_SIGNED:
    case SYNC_ACT_CHECKPOINT_PART_DONE:
    case SYNC_ACT_CHECKPOINT_ALONE:
    case SYNC_ACT_CHECKPOINT_KEEP:
    case SYNC_ACT_CHECKPOINT_PART: break;
    }
}

static void step(struct member *m, const struct sync_event *ev) {
    struct err err = {0};
    m->stepping = true;
    sync_actions_clear(&m->actions);
    if (sync_step(m->sync, ev, timer_now_ms(), &m->actions, &err)) member_die(m, "state", &err);
    for (uint32_t i = 0; i < m->actions.count; i++) perform(m, &m->actions.list[i]);
    m->stepping = false;
    if (sync_has_work(m->sync)) timer_set(m->work, 0);
}

void member_feed(struct member *m, const struct sync_event *ev) {
    if (!m->sync) return;
    uint64_t before = member_rounds(m);
    step(m, ev);
    if (member_rounds(m) > before) {
        member_note(m, member_rounds(m) - 1, FLEET_COMMITTED, false);
        if (m->me->profile) profile_begin(1);
    }
    if (m->cut) {
        m->cut = false;
        step(m, &(struct sync_event){.type = SYNC_EV_DISCONNECTED});
    }
}

static void on_work(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    member_feed(arg, &(struct sync_event){.type = SYNC_EV_WORK});
}

static void on_tick(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    member_feed(arg, &(struct sync_event){.type = SYNC_EV_TICK});
    played_tick(arg);
}

/* ---- links ----------------------------------------------------------------------------------- */

static void on_peer_open(void *arg, uint32_t peer) {
    member_feed(arg, &(struct sync_event){.type = SYNC_EV_PEER_OPEN, .peer = peer});
}

static void on_peer_message(void *arg, uint32_t peer, const struct frame *f, const void *msg) {
    struct member *m = arg;
    if (f->type == MSG_RESULT && ((const struct msg_result *)msg)->round < member_rounds(m))
        member_note(m, ((const struct msg_result *)msg)->round, FLEET_FETCHED, true);
    member_feed(arg, &(struct sync_event){.type = SYNC_EV_PEER_MESSAGE, .peer = peer, .frame = *f,
                                   .msg = msg});
}

static void on_peer_close(void *arg, uint32_t peer, const char *why) {
    fprintf(stderr, "peer %u: %s\n", peer, why);
    member_feed(arg, &(struct sync_event){.type = SYNC_EV_PEER_CLOSED, .peer = peer});
}

static void on_peer_drained(void *arg, uint32_t peer) {
    member_feed(arg, &(struct sync_event){.type = SYNC_EV_PEER_DRAINED, .peer = peer});
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

static int on_welcome(void *arg, const struct uplink_welcome *w, struct err *err) {
    struct member *m = arg;
    if (m->genesis_bytes) return 0;
    m->genesis_bytes = take_memory(w->genesis_bytes.length);
    m->genesis_length = w->genesis_bytes.length;
    memcpy(m->genesis_bytes, w->genesis_bytes.data, w->genesis_bytes.length);
    if (proto_decode(m->genesis_bytes, w->genesis_bytes.length, RECORD_genesis, &m->genesis, err))
        return -1;
    m->me->elements = proto_model_elements(m->genesis.model);
    m->me->chunks = (uint32_t)((m->me->elements - 1) / m->genesis.outer->chunk_elements) + 1;
    return 0;
}

static int on_enrolled(void *arg, uint32_t member, struct err *err) {
    struct member *m = arg;
    struct timeval tick = {.tv_usec = SYNC_TICK_MS * 1000};
    m->me->member = member;
    if (disk_open(m->me->home, &m->disk, err)) return -1;
    m->timed = (struct disk){.arg = m, .map = timed_map, .flush = timed_flush, .put = timed_put,
                             .get = timed_get, .remove = timed_remove};
    if (!(m->origin = origin_create(&m->genesis, NULL))) return err_set(err, ERR_MEMORY, "no memory");
    struct sync_config config = {.genesis = &m->genesis, .run = m->all->run,
                                 .identity = &m->identity, .member = member,
                                 .trains = m->me->trains, .port = m->port,
                                 .elements = m->me->elements, .load = load_state, .load_arg = m,
                                 .disk = m->timed};
    randombytes_buf(&config.instance, sizeof config.instance);
    if (!(m->sync = sync_create(&config, timer_now_ms(), err))) return -1;
    if (!(m->peers = peers_create(m->base, m->ctx, member, &peers_ops, m, err))) return -1;
    event_add(m->tick, &tick);
    if (m->me->threads) return real_begin(m, err);
    if (m->me->trains) played_begin(m);
    return 0;
}

static void on_up(void *arg) {
    struct member *m = arg;
    member_feed(m, &(struct sync_event){.type = SYNC_EV_CONNECTED,
                                 .frame = uplink_welcome(m->uplink)->frame});
}

static void on_message(void *arg, const struct frame *f, const void *msg) {
    struct member *m = arg;
    if (f->type == MSG_PLAN) note_plan(m, msg);
    member_feed(m, &(struct sync_event){.type = SYNC_EV_MESSAGE, .frame = *f, .msg = msg});
}

static void on_down(void *arg, const char *why) {
    fprintf(stderr, "lost the coordinator: %s\n", why);
    member_feed(arg, &(struct sync_event){.type = SYNC_EV_DISCONNECTED});
}

static void on_refused(void *arg, const struct err *why, bool final) {
    (void)final;
    member_die(arg, "refused", why);
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
    m->end = evsignal_new(m->base, SIGTERM, on_end, m);
    if (!m->tick || !m->work || !m->end || event_add(m->end, NULL))
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
    if (m->me->profile) profile_write(m->me->profile_of);
}

int fleet_member_main(int argc, char **argv) {
    struct member m = {0};
    struct err err = {0};
    if (argc != 3) return 2;
    m.all = mmap(NULL, sizeof *m.all, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(argv[1]), 0);
    int place = atoi(argv[2]);
    if (m.all == MAP_FAILED || place < 0 || place >= FLEET_MEMBERS_MAX) return 2;
    m.me = &m.all->member[place];
    agent_keep_memory();
    if (proto_init(&err) || start(&m, &err)) member_die(&m, "start", &err);
    event_base_dispatch(m.base);
    report(&m);
    return 0; /* the rest goes with the process */
}
