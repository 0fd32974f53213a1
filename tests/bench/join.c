/* join.c - a new member of a run of the 10m model: from the start of `intellect-node join` until it has
 * the run's state, from one donor on the loopback. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

#include "tests/bench/bench.h"
#include "tests/bench/fleet.h"

#define JOINS 3
#define PATIENCE_S 60.0

/* When this stood in the log; 0: not within PATIENCE_S. */
static double when_said(const char *log, const char *text) {
    static char all[1 << 16];
    for (double begin = now_s(); now_s() - begin < PATIENCE_S; pause_s(0.002)) {
        FILE *f = fopen(log, "re");
        size_t n = f ? fread(all, 1, sizeof all - 1, f) : 0;
        if (f) fclose(f);
        all[n] = 0;
        if (strstr(all, text)) return now_s();
    }
    return 0;
}

struct joining {
    struct series enrolled, current;
};

/* The program beside this one. */
static int join(struct fleet *f, int number, const char *corpus, struct joining *j,
                struct err *err) {
    char line[INVITE_BYTES_MAX], home[FLEET_PATH_BYTES + 32], log[FLEET_PATH_BYTES + 32];
    struct digest secret;
    snprintf(home, sizeof home, "%s/joiner-%d", f->folder, number);
    snprintf(log, sizeof log, "%s/joiner-%d.log", f->folder, number);
    if (fleet_invite(f, 1, &secret, line, err)) return -1;
    const char *arguments[] = {"join", line, "--home", home, "--corpus", corpus, "--threads", "1",
                               "--log-json", NULL};
    double begin = now_s();
    pid_t pid = fleet_spawn("intellect-node", arguments, log, -1, err);
    if (pid < 0) return -1;
    double enrolled = when_said(log, "\"event\":\"enrolled\"");
    double current = when_said(log, "\"event\":\"round\""); /* said when the state is a newer one */
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    if (enrolled == 0 || current == 0)
        return err_set(err, ERR_TIMEOUT, "intellect-node join: no %s after %.0f s",
                       enrolled > 0 ? "state" : "enrolment", PATIENCE_S);
    series_add(&j->enrolled, enrolled - begin);
    series_add(&j->current, current - begin);
    return 0;
}

/* A commit takes two members; then one of them goes. */
static int make_donor(struct fleet *f, struct err *err) {
    char home[FLEET_PATH_BYTES + 32];
    for (int i = 0; i < 2; i++) {
        snprintf(home, sizeof home, "%s/member-%d", f->folder, i);
        if (fleet_add(f, home, true, err) < 0) return -1;
    }
    f->rounds = 1;
    return fleet_wait(f, 1, PATIENCE_S, err) || fleet_end(f, 1, err) ? -1 : 0;
}

int bench_join(struct bench *b, int unused, struct err *err) {
    static const char *const settings[] = {
        "model.preset=10m", "model.sequence=64", "inner.batch=1", "outer.mode=diloco",
        "outer.inner_steps=1", "outer.quorum=2", "outer.grace_seconds=3600", NULL};
    char folder[FLEET_PATH_BYTES], corpus[FLEET_PATH_BYTES];
    struct joining j = {0};
    (void)unused;
    snprintf(folder, sizeof folder, "%.200s/join", b->folder);
    if (fleet_make_corpus(folder, corpus, err)) return -1;
    struct fleet *f = fleet_create(&(struct fleet_config){folder, corpus, settings}, err);
    int rc = f ? make_donor(f, err) : -1;
    for (int i = 0; i < JOINS && !rc; i++) rc = join(f, i, corpus, &j, err);
    if (!rc) {
        row_value(b, "joining a run of 10m, until the state is there", "s", &j.current, 0);
        row_note(b, "%.0f MB from one donor; SYNC_TICK_MS of it is waiting for the line in the log",
                 8 * (double)f->member[0].elements / MB);
        row_value(b, "    of it until it is enrolled", "s", &j.enrolled, 0);
    }
    fleet_destroy(f);
    return rc;
}
