/* member_real.c - a real trainer process under a light member, as the agent keeps it; checkpoints when
 * the measuring process wants one, signed with the run's own key; and how late the loop is. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "coordinator/run.h"
#include "tests/bench/member.h"

#define WATCH_S 0.002

/* ---- the trainer ----------------------------------------------------------------------------- */

void real_perform(struct member *m, const struct sync_action *a) {
    static const uint32_t commands[] = {
        [SYNC_ACT_TRAINER_SAMPLES] = SEGMENT_SAMPLES, [SYNC_ACT_TRAINER_FREEZE] = SEGMENT_FREEZE,
        [SYNC_ACT_TRAINER_APPLY] = SEGMENT_APPLY, [SYNC_ACT_TRAINER_RESET] = SEGMENT_RESET,
        [SYNC_ACT_TRAINER_CONTINUE] = SEGMENT_CONTINUE,
        [SYNC_ACT_TRAINER_MOMENTS_EXPORT] = SEGMENT_MOMENTS_EXPORT,
        [SYNC_ACT_TRAINER_MOMENTS_IMPORT] = SEGMENT_MOMENTS_IMPORT};
    if (!m->real.up) return;
    keeper_send(m->real.keeper,
                &(struct segment_message){.type = commands[a->type], .start = a->start,
                                          .count = a->count, .fragment = a->fragment,
                                          .wait = a->wait, .tokens = a->tokens,
                                          .contributors = a->contributors, .steps = a->steps});
}

static void note_step(struct fleet_member *me) {
    if (me->inner_steps == FLEET_INNER_STEPS_MAX) return;
    me->inner_step_s[me->inner_steps] = now_s();
    me->inner_steps++;
}

static void on_message(void *arg, const struct segment_message *s) {
    struct member *m = arg;
    struct sync_event ev = {.fragment = s->fragment, .samples = s->samples, .steps = s->steps,
                            .loss = s->loss, .tokens_per_s = s->tokens_per_s};
    const struct segment *segment = keeper_segment(m->real.keeper);
    switch (s->type) {
    case SEGMENT_UP:
        m->real.up = true;
        ev.type = SYNC_EV_TRAINER_UP;
        break;
    case SEGMENT_STEP:
        note_step(m->me);
        ev.type = SYNC_EV_TRAINER_STEP;
        break;
    case SEGMENT_FROZEN:
        ev.type = SYNC_EV_TRAINER_FROZEN;
        ev.local = segment_out((struct segment *)(uintptr_t)segment, SEGMENT_OUT_PARAMETERS);
        break;
    case SEGMENT_APPLIED: ev.type = SYNC_EV_TRAINER_APPLIED; break;
    case SEGMENT_MOMENTS:
        ev.type = SYNC_EV_TRAINER_MOMENTS;
        ev.local = segment_out((struct segment *)(uintptr_t)segment, SEGMENT_OUT_MOMENTS);
        break;
    default: return;
    }
    member_feed(m, &ev);
}

static void on_start(void *arg, pid_t pid) {
    (void)arg;
    fprintf(stderr, "trainer %d\n", (int)pid);
}

static void on_end(void *arg, const char *why, uint32_t wait_ms) {
    struct err err;
    (void)wait_ms;
    err_set(&err, ERR_IO, "%s", why);
    member_die(arg, "the trainer ended", &err);
}

static void on_give_up(void *arg, const struct err *why) { member_die(arg, "trainer", why); }

static const struct keeper_ops keeper_ops = {.on_message = on_message, .on_start = on_start,
                                             .on_end = on_end, .on_give_up = on_give_up};

/* ---- checkpoints ----------------------------------------------------------------------------- */

static void store_path(const struct member *m, char out[FLEET_PATH_BYTES + 32]) {
    snprintf(out, FLEET_PATH_BYTES + 32, "%s-checkpoint", m->me->home);
}

static double process_cpu_s(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

static void begin_checkpoint(struct member *m) {
    char path[FLEET_PATH_BYTES + 32], url[PROTO_URL_BYTES_MAX + 1], name[64];
    struct sync_view v;
    store_path(m, path);
    snprintf(url, sizeof url, "file://%s", path);
    snprintf(name, sizeof name, "stall-%d-%u", (int)getpid(), m->real.checkpoints_begun);
    if (bench_store()) bench_store_below(name, url, sizeof url); /* each is of the same state */
    sync_look(m->sync, &v);
    struct msg_checkpoint_write write = {.index = v.state_index, .root = v.state_root,
                                         .url = proto_str(url), .round = v.round};
    m->real.checkpoints_begun++;
    m->me->checkpoint_begin_s = now_s();
    m->me->checkpoint_cpu_s = -process_cpu_s();
    checkpoint_begin(m->real.checkpoint, m->sync,
                     (struct proto_bytes){m->genesis_bytes, m->genesis_length}, &write);
}

/* The coordinator signs those of its own node only, so we do it with its key. */
static void on_manifest(void *arg, const void *manifest, size_t length) {
    struct member *m = arg;
    struct run run = {0};
    struct run_keys keys = {0};
    struct proto_sig signature;
    struct sync_view v;
    struct err err;
    const struct uplink_welcome *w = uplink_welcome(m->uplink);
    sync_look(m->sync, &v);
    if (run_open(&run, m->all->dir, &err) || run_keys_load(&keys, &run, &err))
        member_die(m, "keys", &err);
    proto_sign(&keys.online, "manifest", &m->all->run, w->frame.term, manifest, length, &signature);
    checkpoint_signed(m->real.checkpoint, v.state_index, w->frame.term, &signature, w);
    run_keys_release(&keys);
    run_release(&run);
}

static void on_done(void *arg, bool ok, const struct digest *manifest, const char *text) {
    struct member *m = arg;
    struct err err;
    char path[FLEET_PATH_BYTES + 32];
    (void)manifest;
    m->me->checkpoint_end_s = now_s();
    m->me->checkpoint_cpu_s += process_cpu_s();
    err_set(&err, ERR_IO, "%s", text);
    if (!ok) member_die(m, "checkpoint", &err);
    store_path(m, path);
    remove_folder(path); /* the next one is of the same state */
    m->me->checkpoints++;
}

static void on_turn(void *arg, const struct timer_turn *turn) {
    struct fleet_member *me = ((struct member *)arg)->me;
    if (1e-6 * (double)turn->worked_us > me->worked_s) me->worked_s = 1e-6 * (double)turn->worked_us;
}

static const struct checkpoint_ops checkpoint_ops = {.on_manifest = on_manifest, .on_turn = on_turn,
                                                     .on_done = on_done};

/* ---- the loop -------------------------------------------------------------------------------- */

static void on_watch(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct member *m = arg;
    double now = now_s(), late = now - m->real.watched_s - WATCH_S;
    m->real.watched_s = now;
    if (m->me->forget_late) {
        m->me->late_s = m->me->worked_s = 0;
        m->me->forget_late = false;
    } else if (late > m->me->late_s) {
        m->me->late_s = late;
    }
    if (m->me->checkpoints_wanted > m->real.checkpoints_begun) begin_checkpoint(m);
}

int real_begin(struct member *m, struct err *err) {
    struct segment_setup setup = {.elements = m->me->elements,
                                  .chunk_elements = m->genesis.outer->chunk_elements,
                                  .genesis = {m->genesis_bytes, m->genesis_length},
                                  .threads = m->me->threads};
    struct timeval often = {.tv_usec = (suseconds_t)(1e6 * WATCH_S)};
    snprintf(setup.inner_state, sizeof setup.inner_state, "%s-inner.state", m->me->home);
    snprintf(setup.corpus, sizeof setup.corpus, "%s", m->me->corpus);
    m->real.keeper = keeper_create(m->base, &setup, m->genesis.outer->silence_ms_max, &keeper_ops,
                                   m, err);
    if (!m->real.keeper) return -1;
    struct segment *segment = keeper_segment(m->real.keeper);
    sync_set_slot(m->sync, segment_in(segment), segment_ops(segment));
    m->real.checkpoint = checkpoint_create(m->base, m->me->elements, setup.chunk_elements,
                                           NULL, &checkpoint_ops, m);
    m->real.watch = event_new(m->base, -1, EV_PERSIST, on_watch, m);
    if (!m->real.checkpoint || !m->real.watch || event_add(m->real.watch, &often))
        return err_set(err, ERR_MEMORY, "no memory for checkpoints");
    sync_set_before_change(m->sync, checkpoint_before_change, m->real.checkpoint);
    m->real.watched_s = now_s();
    return 0;
}
