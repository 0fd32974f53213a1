/* aggregator.c - keeps the aggregate-only node running beside the coordinator; see aggregator.h. */
#define _GNU_SOURCE /* pipe2 */
#include "coordinator/aggregator.h"

#include <errno.h>
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/event.h>
#include <fcntl.h>
#include <jansson.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "coordinator/log.h"

#define PROGRAM_NAME "intellect-node"
#define LINE_BYTES_MAX 65536
#define HELD_MS 60000

struct aggregator {
    struct event_base *base;
    char program[PATH_MAX], home[PATH_MAX], port[8];
    struct aggregator_ops ops;
    void *arg;
    pid_t pid;                 /* 0: does not run */
    bool stopping;
    uint64_t started_ms;
    unsigned backoff_ms;
    struct event *died, *retry;
    struct bufferevent *output; /* what it says: JSON lines */
    char last_line[240];       /* its last words, for the log */
};

static uint64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* ---- what it says ------------------------------------------------------------------------------ */

static void take_line(struct aggregator *a, const char *line) {
    json_t *object = json_loads(line, 0, NULL);
    const char *text = json_string_value(json_object_get(object, "text"));
    const char *level_name = json_string_value(json_object_get(object, "level"));
    enum core_level level = !level_name                        ? CORE_INFO
                          : !strcmp(level_name, "error")   ? CORE_ERROR
                          : !strcmp(level_name, "warning") ? CORE_WARNING
                                                           : CORE_INFO;
    if (object && !text) goto out; /* figures of a round: we have our own */
    snprintf(a->last_line, sizeof a->last_line, "%.*s", (int)sizeof a->last_line - 1,
             text ? text : line);
    log_line(level, "aggregator: %s", a->last_line);
out:
    json_decref(object);
}

static void on_output(struct bufferevent *bev, void *arg) {
    struct aggregator *a = arg;
    struct evbuffer *in = bufferevent_get_input(bev);
    char *line;
    while ((line = evbuffer_readln(in, NULL, EVBUFFER_EOL_ANY))) {
        if (*line) take_line(a, line);
        free(line);
    }
    if (evbuffer_get_length(in) > LINE_BYTES_MAX) evbuffer_drain(in, evbuffer_get_length(in));
}

static void close_output(struct aggregator *a) {
    if (a->output) bufferevent_free(a->output);
    a->output = NULL;
}

static void on_output_end(struct bufferevent *bev, short what, void *arg) {
    (void)bev;
    (void)what;
    close_output(arg);
}

/* ---- starting ---------------------------------------------------------------------------------- */

/* In the child, between fork and exec: only what is safe there. */
static void become(char *const argv[], int in, int out, pid_t parent) {
    sigset_t none;
    prctl(PR_SET_PDEATHSIG, SIGTERM); /* it must not outlive us, even after kill -9 */
    if (getppid() != parent) _exit(1);
    setpgid(0, 0); /* Ctrl-C in a terminal is for us; we then end it in order */
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (dup2(in, 0) < 0 || dup2(out, 1) < 0 || dup2(out, 2) < 0) _exit(1);
    execv(argv[0], argv);
    _exit(127);
}

/* A pipe whose reading end has the invite in it: an argument could be read by every user. */
static int pipe_with(const char *line, struct err *err) {
    int ends[2];
    size_t length = strlen(line);
    if (pipe2(ends, O_CLOEXEC)) return err_set_errno(err, "pipe");
    if (write(ends[1], line, length) != (ssize_t)length) { /* shorter than any pipe's buffer */
        err_set_errno(err, "write into a pipe");
        close(ends[0]);
        ends[0] = -1;
    }
    close(ends[1]);
    return ends[0];
}

static int spawn(struct aggregator *a, const char *invite, struct err *err) {
    const char *argv[16] = { a->program };
    int n = 1, out[2] = { -1, -1 };
    char line[1024];
    argv[n++] = *invite ? "join" : "run";
    if (*invite) argv[n++] = "--aggregate-only";
    if (*invite) argv[n++] = "--name", argv[n++] = "coordinator";
    argv[n++] = "--home", argv[n++] = a->home;
    if (*a->port) argv[n++] = "--listen", argv[n++] = a->port;
    argv[n++] = "--log-json";
    if (*invite) argv[n++] = "-";
    snprintf(line, sizeof line, "%s%s", invite, *invite ? "\n" : "");

    pid_t self = getpid();
    int in = pipe_with(line, err);
    if (in < 0) return -1;
    if (pipe2(out, O_CLOEXEC)) {
        err_set_errno(err, "pipe");
        close(in);
        return -1;
    }
    pid_t pid = fork();
    if (pid == 0) become((char *const *)(void *)argv, in, out[1], self);
    close(in);
    close(out[1]);
    if (pid < 0) {
        err_set_errno(err, "fork");
        close(out[0]);
        return -1;
    }
    a->pid = pid;
    a->started_ms = now_ms();
    a->last_line[0] = '\0';
    fcntl(out[0], F_SETFL, O_NONBLOCK);
    close_output(a);
    a->output = bufferevent_socket_new(a->base, out[0], BEV_OPT_CLOSE_ON_FREE);
    if (!a->output) {
        close(out[0]);
        return 0; /* it runs, unheard */
    }
    bufferevent_setcb(a->output, on_output, NULL, on_output_end, a);
    bufferevent_enable(a->output, EV_READ);
    return 0;
}

static void start_later(struct aggregator *a) {
    struct timeval delay = { a->backoff_ms / 1000, a->backoff_ms % 1000 * 1000 };
    event_add(a->retry, &delay);
    a->backoff_ms = a->backoff_ms * 2 < AGGREGATOR_BACKOFF_MS_MAX ? a->backoff_ms * 2
                                                                  : AGGREGATOR_BACKOFF_MS_MAX;
}

static void start(struct aggregator *a) {
    char invite[INVITE_BYTES_MAX];
    struct err err;
    if (a->ops.invite(a->arg, invite, sizeof invite, &err) || spawn(a, invite, &err)) {
        log_line(CORE_WARNING, "the aggregate-only node cannot be started: %s; again in %g s",
                 err.msg, a->backoff_ms / 1000.0);
        start_later(a);
        return;
    }
    log_line(CORE_INFO, "the aggregate-only node is process %ld", (long)a->pid);
}

static void on_retry(evutil_socket_t fd, short what, void *arg) {
    struct aggregator *a = arg;
    (void)fd;
    (void)what;
    if (!a->stopping) start(a);
}

/* ---- ending ------------------------------------------------------------------------------------- */

static void describe_end(int status, char *out, size_t size) {
    if (WIFSIGNALED(status)) snprintf(out, size, "signal %d (%s)", WTERMSIG(status),
                                      strsignal(WTERMSIG(status)));
    else if (WEXITSTATUS(status) == 127) snprintf(out, size, "it could not be executed");
    else snprintf(out, size, "exit status %d", WEXITSTATUS(status));
}

static void on_child(evutil_socket_t fd, short what, void *arg) {
    struct aggregator *a = arg;
    int status;
    char end[80];
    (void)fd;
    (void)what;
    if (!a->pid || waitpid(a->pid, &status, WNOHANG) != a->pid) return;
    a->pid = 0;
    if (a->output) on_output(a->output, a); /* its last words may have come first */
    if (a->stopping) return;
    describe_end(status, end, sizeof end);
    if (now_ms() - a->started_ms > HELD_MS) a->backoff_ms = AGGREGATOR_BACKOFF_MS_MIN;
    log_line(CORE_WARNING, "the aggregate-only node ended: %s%s%.150s; it starts again in %g s", end,
             *a->last_line ? ", saying: " : "", a->last_line, a->backoff_ms / 1000.0);
    start_later(a);
}

struct aggregator *aggregator_create(struct event_base *base, const char *program, const char *home,
                                     uint16_t listen_port, const struct aggregator_ops *ops,
                                     void *arg, struct err *err) {
    struct aggregator *a = calloc(1, sizeof *a);
    if (!a) {
        err_set(err, ERR_MEMORY, "no memory to start a node");
        return NULL;
    }
    a->base = base;
    a->ops = *ops;
    a->arg = arg;
    a->backoff_ms = AGGREGATOR_BACKOFF_MS_MIN;
    snprintf(a->program, sizeof a->program, "%s", program);
    snprintf(a->home, sizeof a->home, "%s", home);
    if (listen_port) snprintf(a->port, sizeof a->port, "%u", (unsigned)listen_port);
    a->died = evsignal_new(base, SIGCHLD, on_child, a);
    a->retry = evtimer_new(base, on_retry, a);
    if (!a->died || !a->retry || evsignal_add(a->died, NULL)) {
        err_set(err, ERR_MEMORY, "no memory to watch a node");
        aggregator_destroy(a);
        return NULL;
    }
    start(a);
    return a;
}

void aggregator_stop(struct aggregator *a) {
    a->stopping = true;
    if (a->pid) kill(a->pid, SIGTERM);
}

bool aggregator_gone(const struct aggregator *a) {
    return a->pid == 0;
}

void aggregator_destroy(struct aggregator *a) {
    if (!a) return;
    if (a->pid) {
        kill(a->pid, SIGKILL);
        waitpid(a->pid, NULL, 0);
    }
    close_output(a);
    if (a->died) event_free(a->died);
    if (a->retry) event_free(a->retry);
    free(a);
}

/* ---- finding it --------------------------------------------------------------------------------- */

static bool is_program(const char *folder, size_t length, char *out, size_t size) {
    int n = snprintf(out, size, "%.*s/" PROGRAM_NAME, (int)length, folder);
    return n > 0 && (size_t)n < size && access(out, X_OK) == 0;
}

int aggregator_find_program(char *out, size_t size, struct err *err) {
    char self[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    size_t folder = 0;
    if (n > 0) {
        self[n] = '\0';
        folder = (size_t)(strrchr(self, '/') - self);
        if (is_program(self, folder, out, size)) return 0;
    }
    const char *path = getenv("PATH");
    for (const char *at = path ? path : ""; *at;) {
        size_t length = strcspn(at, ":");
        if (length && is_program(at, length, out, size)) return 0;
        at += length + (at[length] == ':');
    }
    return err_set(err, ERR_NOT_FOUND, PROGRAM_NAME " is neither in %.*s nor in $PATH; install it "
                   "there, or serve with --no-aggregator", (int)folder, folder ? self : "");
}
