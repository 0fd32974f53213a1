/* keeper.c - starts, watches and restarts the trainer process; see keeper.h. */
#define _GNU_SOURCE
#include "node/keeper.h"

#include <assert.h>
#include <errno.h>
#include <event2/event.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "node/timer.h"

#define WATCH_MS 500
#define HUNG_MS_MIN 30000u
#define HUNG_SLOWEST_STEPS 20u
#define HUNG_FIRST_STEP 10u
#define FAST_MS 30000u /* a trainer that lived longer did not fail fast */
#define ENVIRONMENT_MAX 1024

struct keeper {
    struct event_base *base;
    struct segment *segment;
    const struct keeper_ops *ops;
    void *arg;
    pid_t pid;                 /* 0 = none runs */
    uint32_t restarts, failures;
    bool stopping, stepped;    /* stepped: this trainer has taken a step */
    struct err said;           /* what it said before it ended */
    uint32_t device_failures;
    bool device_failed;        /* this trainer's; `said` is why */
    struct event *wake, *child, *watch, *restart, *too_late;
    /* The watch: how long the trainer had something to do and moved nothing. */
    uint64_t silence_ms, started_at_ms, watched_at_ms, still_ms, slowest_step_ms, taken, beats;
    bool moved;
};

/* ---- start ----------------------------------------------------------------------------------- */

/* The trainer's environment: OpenMP's threads wait without spinning, since they share their cores
 * with the agent; libgomp reads this before main(). */
static void make_environment(char *out[ENVIRONMENT_MAX]) {
    static char policy[] = "OMP_WAIT_POLICY=passive";
    size_t n = 0;
    for (char **e = environ; *e && n < ENVIRONMENT_MAX - 2; e++)
        if (strncmp(*e, "OMP_WAIT_POLICY=", 16)) out[n++] = *e;
    out[n++] = policy;
    out[n] = NULL;
}

/* posix_spawn, since a fork() of a process with threads may not do much before its exec. */
static int spawn(struct keeper *k) {
    int fds[SEGMENT_FDS];
    char number[16], program[] = "intellect-node", command[] = "trainer", flag[] = "--fd";
    char *argv[] = { program, command, flag, number, NULL };
    char **environment = calloc(ENVIRONMENT_MAX, sizeof *environment);
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t none;
    if (!environment) return ENOMEM;
    make_environment(environment);
    segment_fds(k->segment, fds);
    snprintf(number, sizeof number, "%d", fds[0]);
    posix_spawn_file_actions_init(&actions);
    /* A dup2 onto itself takes close-on-exec away in the child alone. */
    for (int i = 0; i < SEGMENT_FDS; i++)
        posix_spawn_file_actions_adddup2(&actions, fds[i], fds[i]);
    posix_spawn_file_actions_adddup2(&actions, STDERR_FILENO, STDOUT_FILENO);
    posix_spawnattr_init(&attributes);
    sigemptyset(&none);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK);
    int rc = posix_spawn(&k->pid, "/proc/self/exe", &actions, &attributes, argv, environment);
    if (rc) k->pid = 0;
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
    free(environment);
    return rc;
}

static void on_failure(struct keeper *k, const char *why);

static void start(struct keeper *k) {
    segment_reset(k->segment);
    k->stepped = false;
    k->said = (struct err){0};
    k->device_failed = false;
    k->still_ms = k->taken = 0;
    k->moved = true;
    k->watched_at_ms = k->started_at_ms = timer_now_ms();
    int rc = spawn(k);
    if (rc) {
        char why[128];
        snprintf(why, sizeof why, "cannot be started: %s", strerror(rc));
        on_failure(k, why);
        return;
    }
    timer_set(k->watch, WATCH_MS);
    k->ops->on_start(k->arg, k->pid);
}

static void on_restart(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct keeper *k = arg;
    k->restarts++;
    start(k);
}

/* ---- messages -------------------------------------------------------------------------------- */

static void drain(struct keeper *k) {
    struct segment_message m;
    segment_clear(k->segment);
    while (segment_receive(k->segment, &m)) {
        k->moved = true;
        if (m.type == SEGMENT_STEP) {
            k->stepped = true;
            k->failures = 0;
            if (k->still_ms > k->slowest_step_ms) k->slowest_step_ms = k->still_ms;
        }
        if (m.type == SEGMENT_DEVICE_FAILED) k->device_failed = true;
        if (m.type == SEGMENT_FAILED || m.type == SEGMENT_DEVICE_FAILED)
            err_set(&k->said, (enum err_code)m.code, "%.*s", (int)sizeof m.text - 1, m.text);
        k->ops->on_message(k->arg, &m);
    }
}

static void on_wake(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    drain(arg);
}

void keeper_send(struct keeper *k, const struct segment_message *m) {
    if (!k->pid) return;
    if (!segment_send(k->segment, m)) kill(k->pid, SIGKILL);
}

/* ---- end ------------------------------------------------------------------------------------- */

static uint32_t backoff_ms(const struct keeper *k) {
    uint32_t ms = KEEPER_BACKOFF_MS;
    for (uint32_t i = 1; i < k->failures && ms < KEEPER_BACKOFF_MS_MAX; i++) ms *= 2;
    return ms < KEEPER_BACKOFF_MS_MAX ? ms : KEEPER_BACKOFF_MS_MAX;
}

/* The next one may find its device well again; also where the device is away altogether after that. */
static bool device_restarts(struct keeper *k, const char *why) {
    if (!k->device_failed && !(k->device_failures && k->said.code != ERR_NONE)) return false;
    if (timer_now_ms() - k->started_at_ms > KEEPER_DEVICE_STEADY_MS) k->device_failures = 0;
    if (++k->device_failures >= KEEPER_DEVICE_FAILURES_MAX) {
        err_prefix(&k->said, "the device failed %u times and is given up", k->device_failures);
        return false;
    }
    uint32_t wait_ms = KEEPER_DEVICE_WAIT_MS << (k->device_failures - 1);
    timer_set(k->restart, wait_ms);
    k->ops->on_end(k->arg, why, wait_ms);
    return true;
}

static void on_failure(struct keeper *k, const char *why) {
    struct err err;
    if (k->stopping) {
        k->ops->on_end(k->arg, why, 0);
        return;
    }
    if (device_restarts(k, why)) return;
    if (timer_now_ms() - k->started_at_ms > FAST_MS) k->failures = 0;
    k->failures++;
    if (k->said.code == ERR_NONE && k->failures < KEEPER_FAILURES_MAX) {
        uint32_t wait_ms = backoff_ms(k);
        timer_set(k->restart, wait_ms);
        k->ops->on_end(k->arg, why, wait_ms);
        return;
    }
    k->stopping = true;
    k->ops->on_end(k->arg, why, 0);
    if (k->said.code == ERR_NONE)
        err_set(&err, ERR_IO, "the trainer ended %u times in a row before its first step: %s",
                k->failures, why);
    else
        err = k->said;
    k->ops->on_give_up(k->arg, &err);
}

static void describe(int status, char *out, size_t size) {
    if (WIFSIGNALED(status))
        snprintf(out, size, "killed by signal %d (%s)", WTERMSIG(status),
                 strsignal(WTERMSIG(status)));
    else
        snprintf(out, size, "exit status %d", WEXITSTATUS(status));
}

static void on_child(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct keeper *k = arg;
    int status;
    char why[128];
    if (!k->pid || waitpid(k->pid, &status, WNOHANG) != k->pid) return;
    drain(k); /* its last words; all that it sent is complete */
    k->pid = 0;
    event_del(k->watch);
    event_del(k->too_late);
    describe(status, why, sizeof why);
    on_failure(k, why);
}

/* ---- the watch ------------------------------------------------------------------------------- */

static uint64_t hung_after_ms(const struct keeper *k) {
    uint64_t ms = HUNG_MS_MIN;
    if (ms < 4 * k->silence_ms) ms = 4 * k->silence_ms;
    if (ms < HUNG_SLOWEST_STEPS * k->slowest_step_ms) ms = HUNG_SLOWEST_STEPS * k->slowest_step_ms;
    return k->stepped ? ms : ms * HUNG_FIRST_STEP;
}

/* Counts time in turns of this loop, so that the agent's own sleep is not the trainer's fault. */
static void on_watch(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct keeper *k = arg;
    uint64_t now = timer_now_ms(), passed = now - k->watched_at_ms;
    drain(k);
    if (segment_taken(k->segment) != k->taken || segment_beats(k->segment) != k->beats) k->moved = true;
    k->taken = segment_taken(k->segment);
    k->beats = segment_beats(k->segment);
    bool must_work = segment_busy(k->segment) || segment_untaken(k->segment) > 0;
    k->still_ms =
        k->moved || !must_work ? 0 : k->still_ms + (passed < 2 * WATCH_MS ? passed : WATCH_MS);
    k->moved = false;
    k->watched_at_ms = now;
    if (k->pid && k->still_ms > hung_after_ms(k)) {
        struct segment_message m = { .type = SEGMENT_NOTE };
        snprintf(m.text, sizeof m.text, "the trainer has not moved for %llu s: killing it",
                 (unsigned long long)k->still_ms / 1000);
        k->ops->on_message(k->arg, &m);
        kill(k->pid, SIGKILL);
        k->still_ms = 0;
    }
    if (k->pid) timer_set(k->watch, WATCH_MS);
}

static void on_too_late(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct keeper *k = arg;
    if (k->pid) kill(k->pid, SIGKILL);
}

bool keeper_stop(struct keeper *k) {
    k->stopping = true;
    event_del(k->restart);
    if (!k->pid) return false;
    timer_set(k->too_late, KEEPER_STOP_MS_MAX);
    keeper_send(k, &(struct segment_message){ .type = SEGMENT_STOP });
    return true;
}

/* ---- life ------------------------------------------------------------------------------------ */

static int make_events(struct keeper *k) {
    k->wake = event_new(k->base, segment_wake_fd(k->segment), EV_READ | EV_PERSIST, on_wake, k);
    k->child = evsignal_new(k->base, SIGCHLD, on_child, k);
    k->watch = evtimer_new(k->base, on_watch, k);
    k->restart = evtimer_new(k->base, on_restart, k);
    k->too_late = evtimer_new(k->base, on_too_late, k);
    if (!k->wake || !k->child || !k->watch || !k->restart || !k->too_late) return -1;
    return event_add(k->wake, NULL) || event_add(k->child, NULL) ? -1 : 0;
}

struct keeper *keeper_create(struct event_base *base, const struct segment_setup *setup,
                             uint32_t silence_ms, const struct keeper_ops *ops, void *arg,
                             struct err *err) {
    struct keeper *k = calloc(1, sizeof *k);
    if (!k) {
        err_set(err, ERR_MEMORY, "no memory for a keeper");
        return NULL;
    }
    k->base = base;
    k->ops = ops;
    k->arg = arg;
    k->silence_ms = silence_ms;
    if (!(k->segment = segment_create(setup, err))) {
        keeper_destroy(k);
        return NULL;
    }
    if (make_events(k)) {
        err_set(err, ERR_MEMORY, "no memory for the trainer's events");
        keeper_destroy(k);
        return NULL;
    }
    timer_set(k->restart, 0);
    return k;
}

static void free_event(struct event *ev) {
    if (ev) event_free(ev);
}

void keeper_destroy(struct keeper *k) {
    if (!k) return;
    if (k->pid) {
        kill(k->pid, SIGKILL);
        waitpid(k->pid, NULL, 0);
    }
    free_event(k->wake);
    free_event(k->child);
    free_event(k->watch);
    free_event(k->restart);
    free_event(k->too_late);
    segment_destroy(k->segment);
    free(k);
}

struct segment *keeper_segment(struct keeper *k) { return k->segment; }
pid_t keeper_pid(const struct keeper *k) { return k->pid; }
uint32_t keeper_restarts(const struct keeper *k) { return k->restarts ? k->restarts - 1 : 0; }
