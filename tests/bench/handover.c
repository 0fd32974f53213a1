/* handover.c - an aggregator is killed the moment it has its plan: how long until the coordinator has
 * noticed, and from there until everybody else has the round's new state. */
#include <stdio.h>

#include "tests/bench/bench.h"
#include "tests/bench/fleet.h"

#define MEMBERS 4
#define KILLS 3
#define ROUND_S_MAX 200.0

static int kill_once(struct bench *b, const char *const *settings, int number,
                     struct series *noticed, struct series *rest, struct err *err) {
    char folder[FLEET_PATH_BYTES], home[FLEET_PATH_BYTES + 16];
    snprintf(folder, sizeof folder, "%.200s/handover-%d", b->folder, number);
    struct fleet *f =
        fleet_create(&(struct fleet_config){.folder = folder, .settings = settings}, err);
    int rc = f ? 0 : -1;
    for (int i = 0; i < MEMBERS && !rc; i++) {
        snprintf(home, sizeof home, "%s/member-%d", folder, i);
        rc = fleet_add(f, home, true, err) < 0 ? -1 : 0;
    }
    if (!rc) {
        f->die_in_round = 2; /* connections are there, and everybody trains */
        f->rounds = 3;
        rc = fleet_wait(f, 3, ROUND_S_MAX, err);
    }
    double killed = 0, plan = 0, applied = 0;
    for (int i = 0; i < MEMBERS && !rc; i++) {
        const struct fleet_member *m = &f->member[i];
        const struct fleet_moment *step = m->round[2].step;
        if (m->killed_s > 0) killed = m->killed_s;
        else if (step[FLEET_APPLIED].at_s > applied) applied = step[FLEET_APPLIED].at_s;
        double at = step[FLEET_REPLAN].at_s > 0 ? step[FLEET_REPLAN].at_s : step[FLEET_PLAN].at_s;
        if (m->killed_s == 0 && (plan == 0 || at < plan)) plan = at;
    }
    fleet_destroy(f);
    if (rc) return -1;
    if (killed == 0) return err_set(err, ERR_PROTOCOL, "nobody was the aggregator of shard 0");
    series_add(noticed, plan - killed);
    series_add(rest, applied - plan);
    if (!b->keep) remove_folder(folder);
    return 0;
}

int bench_handover(struct bench *b, int silence_s, struct err *err) {
    char silence[48], heartbeat[48], text[64];
    const char *const settings[] = {
        "model.sequence=64", "inner.batch=1", "outer.mode=diloco", "outer.inner_steps=1",
        "outer.quorum=4", "outer.ramp_rounds=0", "outer.chunk_elements=65536",
        "outer.shard_chunks=1", "outer.checkpoint_rounds=1000000", silence, heartbeat, NULL};
    struct series noticed = {0}, rest = {0}, all = {0};
    snprintf(silence, sizeof silence, "outer.silence_seconds=%d", silence_s);
    snprintf(heartbeat, sizeof heartbeat, "outer.heartbeat_seconds=%g",
             silence_s < 16 ? silence_s / 8.0 : 2.0);
    for (int i = 0; i < (silence_s < 16 ? KILLS : 1); i++)
        if (kill_once(b, settings, i, &noticed, &rest, err)) return -1;
    for (int i = 0; i < rest.count; i++) series_add(&all, noticed.value[i] + rest.value[i]);
    snprintf(text, sizeof text, "aggregator killed to round applied, silence %d s", silence_s);
    row_value(b, text, "s", &all, 0);
    row_value(b, "    of it until it is noticed", "s", &noticed, 0);
    row_value(b, "    of it from the new PLAN on", "s", &rest, 0);
    return 0;
}
