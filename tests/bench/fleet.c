/* fleet.c - processes of a measured run: begun, watched, ended. See fleet.h. */
#define _GNU_SOURCE /* memfd_create */
#include "tests/bench/fleet.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "proto/address.h"
#include "coordinator/control.h"
#include "coordinator/run.h"
#include "coordinator/store.h"
#include "tests/bench/bench.h"

#define ARGUMENTS_MAX 64
#define SERVE_S_MAX 20.0
#define END_S_MAX 20.0
#define CORPUS_BYTES (4 << 20)
#define WAIT_S 0.005

/* ---- processes ------------------------------------------------------------------------------- */

/* "" where it cannot be told. */
static void path_beside_us(const char *program, char out[PATH_MAX]) {
    ssize_t n = readlink("/proc/self/exe", out, PATH_MAX - 1);
    out[n > 0 ? n : 0] = 0;
    char *slash = strrchr(out, '/');
    if (slash) snprintf(slash + 1, (size_t)(out + PATH_MAX - slash - 1), "%s", program);
}

static void become(const char *program, const char *const *arguments, const char *log,
                   int inherited_fd) {
    char path[PATH_MAX] = "/proc/self/exe", *argv[ARGUMENTS_MAX + 2] = {path};
    if (program) path_beside_us(program, path);
    int out = open(log, O_WRONLY | O_CREAT | O_APPEND, 0600);
    for (int i = 0; arguments[i] && i < ARGUMENTS_MAX; i++)
        argv[i + 1] = (char *)(uintptr_t)arguments[i];
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (out < 0 || dup2(out, 1) < 0 || dup2(out, 2) < 0) _exit(127);
    if (inherited_fd >= 0) fcntl(inherited_fd, F_SETFD, 0);
    execv(path, argv);
    fprintf(stderr, "%s: %s\n", path, strerror(errno));
    _exit(127);
}

pid_t fleet_spawn(const char *program, const char *const *arguments, const char *log,
                  int inherited_fd, struct err *err) {
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) become(program, arguments, log, inherited_fd);
    if (pid < 0) err_set_errno(err, "fork");
    return pid;
}

uint64_t fleet_status_bytes(pid_t pid, const char *key) {
    char path[64], line[256];
    unsigned long long kilobytes = 0;
    size_t n = strlen(key);
    snprintf(path, sizeof path, "/proc/%d/status", (int)pid);
    FILE *f = fopen(path, "re");
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, key, n) && line[n] == ':') sscanf(line + n + 1, "%llu", &kilobytes);
    if (f) fclose(f);
    return kilobytes * 1024;
}

static void last_line(const char *path, char out[160]) {
    char line[160];
    FILE *f = fopen(path, "re");
    out[0] = 0;
    while (f && fgets(line, sizeof line, f))
        if (line[0] != '\n') snprintf(out, 160, "%.*s", (int)strcspn(line, "\n"), line);
    if (f) fclose(f);
}

/* Where it ended: its exit code or 128 + signal; -1 while it runs after so many seconds. */
static int ended(pid_t pid, double seconds) {
    int status;
    for (double begin = now_s();; pause_s(WAIT_S)) {
        if (waitpid(pid, &status, WNOHANG) == pid)
            return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
        if (now_s() - begin > seconds) return -1;
    }
}

static void end_process(pid_t *pid) {
    if (*pid <= 0) return;
    kill(*pid, SIGTERM);
    if (ended(*pid, END_S_MAX) < 0) {
        kill(*pid, SIGKILL);
        ended(*pid, END_S_MAX);
    }
    *pid = 0;
}

/* ---- the coordinator ------------------------------------------------------------------------- */

static void log_path(const struct fleet *f, const char *who, char out[FLEET_PATH_BYTES + 64]) {
    snprintf(out, FLEET_PATH_BYTES + 64, "%s/%s.log", f->folder, who);
}

static int coordinator_failed_to(const struct fleet *f, const char *what, struct err *err) {
    char log[FLEET_PATH_BYTES + 64], line[160];
    log_path(f, "coordinator", log);
    last_line(log, line);
    return err_set(err, ERR_IO, "the coordinator's %s: %s", what, line);
}

static int write_corpus(const char *path, struct err *err) {
    FILE *f = fopen(path, "we");
    if (!f) return err_set_errno(err, "%s", path);
    fputs("{\"format\":1,\"tokenizer\":\"bytes\",\"vocabulary\":256,\"sequence\":64,"
          "\"samples\":1000000000}\n",
          f);
    return fclose(f) ? err_set_errno(err, "%s", path) : 0;
}

static int seal(struct fleet *f, const struct fleet_config *c, struct err *err) {
    char corpus[FLEET_PATH_BYTES + 16], log[FLEET_PATH_BYTES + 64];
    const char *arguments[ARGUMENTS_MAX] = {"coordinator", "init", f->dir, "--corpus",
                                            c->corpus ? c->corpus : corpus};
    int n = 5;
    snprintf(corpus, sizeof corpus, "%s/corpus.json", f->folder);
    if (!c->corpus && write_corpus(corpus, err)) return -1;
    for (int i = 0; c->settings[i] && n + 3 < ARGUMENTS_MAX; i++) {
        arguments[n++] = "--set";
        arguments[n++] = c->settings[i];
    }
    log_path(f, "coordinator", log);
    pid_t pid = fleet_spawn(NULL, arguments, log, -1, err);
    if (pid < 0) return -1;
    return ended(pid, SERVE_S_MAX) ? coordinator_failed_to(f, "init", err) : 0;
}

static bool is_served(struct fleet *f) {
    struct address at;
    struct err err;
    json_t *status = control_ask(f->dir, NULL, &err);
    const char *listen = json_string_value(json_object_get(status, "listen"));
    bool there = listen && !address_split(listen, false, &at, &err) &&
                 json_integer_value(json_object_get(status, "pid")) == f->coordinator;
    if (there) {
        memcpy(f->host, at.host, sizeof f->host);
        f->port = at.port;
    }
    json_decref(status);
    return there;
}

static int serve(struct fleet *f, struct err *err) {
    const char *arguments[] = {"coordinator", "serve", f->dir, "--no-aggregator", "--listen",
                               "127.0.0.1:0", NULL};
    char log[FLEET_PATH_BYTES + 64];
    struct run run;
    log_path(f, "coordinator", log);
    if ((f->coordinator = fleet_spawn(NULL, arguments, log, -1, err)) < 0) return -1;
    for (double begin = now_s(); !is_served(f); pause_s(WAIT_S)) {
        if (waitpid(f->coordinator, NULL, WNOHANG) != f->coordinator &&
            now_s() - begin < SERVE_S_MAX)
            continue;
        return coordinator_failed_to(f, "serve", err);
    }
    if (run_open(&run, f->dir, err)) return -1;
    f->run = run.id;
    run_release(&run);
    return 0;
}

/* Letters by chance are as good as words: nobody looks at the loss. */
static int write_text(const char *path, struct err *err) {
    FILE *f = fopen(path, "we");
    uint64_t random = 1;
    if (!f) return err_set_errno(err, "%s", path);
    for (int i = 0; i < CORPUS_BYTES; i++) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        fputc(random % 6 ? 'a' + (int)(random % 26) : ' ', f);
    }
    return fclose(f) ? err_set_errno(err, "%s", path) : 0;
}

int fleet_make_corpus(const char *folder, char corpus[FLEET_PATH_BYTES], struct err *err) {
    char text[FLEET_PATH_BYTES], log[FLEET_PATH_BYTES + 64], line[160];
    const char *arguments[] = {"data", "--out", corpus, "--sequence", "64", text, NULL};
    snprintf(text, sizeof text, "%.*s/text.txt", (int)sizeof text - 16, folder);
    snprintf(corpus, FLEET_PATH_BYTES, "%.*s/corpus", FLEET_PATH_BYTES - 16, folder);
    snprintf(log, sizeof log, "%s/data.log", folder);
    if (mkdir(folder, 0700) && errno != EEXIST) return err_set_errno(err, "%s", folder);
    if (write_text(text, err)) return -1;
    pid_t pid = fleet_spawn("intellect-node", arguments, log, -1, err);
    if (pid < 0) return -1;
    if (!ended(pid, SERVE_S_MAX)) return 0;
    last_line(log, line);
    return err_set(err, ERR_IO, "intellect-node data: %s", line);
}

struct fleet *fleet_create(const struct fleet_config *c, struct err *err) {
    int fd = memfd_create("fleet", MFD_CLOEXEC);
    struct fleet *f = MAP_FAILED;
    if (fd >= 0 && !ftruncate(fd, sizeof *f))
        f = mmap(NULL, sizeof *f, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (f == MAP_FAILED) {
        err_set_errno(err, "memory to share with members");
        return NULL;
    }
    f->fd = fd;
    snprintf(f->folder, sizeof f->folder, "%s", c->folder);
    snprintf(f->dir, sizeof f->dir, "%.*s/run", (int)sizeof f->dir - 5, c->folder);
    int failed = mkdir(f->folder, 0700) && errno != EEXIST
                     ? err_set_errno(err, "%s", f->folder)
                     : seal(f, c, err) || serve(f, err);
    if (!failed) return f;
    fleet_destroy(f);
    return NULL;
}

int fleet_restart(struct fleet *f, struct err *err) {
    end_process(&f->coordinator);
    return serve(f, err);
}

void fleet_destroy(struct fleet *f) {
    if (!f) return;
    for (int i = 0; i < f->members; i++) end_process(&f->member[i].pid);
    end_process(&f->coordinator);
    close(f->fd);
    munmap(f, sizeof *f);
}

/* ---- members --------------------------------------------------------------------------------- */

int fleet_invite(const struct fleet *f, uint32_t uses, struct digest *secret,
                 char line[INVITE_BYTES_MAX], struct err *err) {
    struct msg_invite_record record;
    struct timespec now;
    struct store *s = store_open(f->dir, false, err);
    if (!s) return -1;
    clock_gettime(CLOCK_REALTIME, &now);
    store_invite_make(uses, ((uint64_t)now.tv_sec + 3600) * 1000, false, secret, &record);
    int rc = store_invite_add(s, &record, err);
    store_close(s);
    struct invite invite = {.port = f->port, .run = f->run, .secret = *secret};
    memcpy(invite.host, f->host, sizeof invite.host);
    return rc || !line ? rc : invite_format(&invite, line, err);
}

int fleet_add(struct fleet *f, const char *home, bool trains, struct err *err) {
    char fd[16], place[16], name[32], log[FLEET_PATH_BYTES + 64];
    if (f->members == FLEET_MEMBERS_MAX) return err_set(err, ERR_FULL, "no room for a member");
    struct fleet_member *m = &f->member[f->members];
    snprintf(m->home, sizeof m->home, "%s", home);
    m->trains = trains;
    m->profile = true;
    if (fleet_invite(f, 1, &m->secret, NULL, err)) return -1;
    snprintf(fd, sizeof fd, "%d", f->fd);
    snprintf(place, sizeof place, "%d", f->members);
    snprintf(name, sizeof name, "member-%d", f->members);
    log_path(f, name, log);
    const char *arguments[] = {"member", fd, place, NULL};
    if ((m->pid = fleet_spawn(NULL, arguments, log, f->fd, err)) < 0) return -1;
    return f->members++;
}

int fleet_end(struct fleet *f, int place, struct err *err) {
    struct fleet_member *m = &f->member[place];
    kill(m->pid, SIGTERM);
    int code = ended(m->pid, END_S_MAX);
    if (code < 0) end_process(&m->pid);
    m->pid = 0;
    return code ? err_set(err, ERR_IO, "member %d ended with %d: %s", place, code, m->trouble) : 0;
}

/* ---- waiting --------------------------------------------------------------------------------- */

/* One that killed itself as it was told is not missed. */
static int look_after(struct fleet *f, struct err *err) {
    int status;
    for (int i = 0; i < f->members; i++) {
        struct fleet_member *m = &f->member[i];
        if (m->pid <= 0 || waitpid(m->pid, &status, WNOHANG) != m->pid) continue;
        m->pid = 0;
        if (m->killed_s > 0) continue;
        return err_set(err, ERR_IO, "member %d ended: %s", i, m->trouble);
    }
    if (waitpid(f->coordinator, &status, WNOHANG) != f->coordinator) return 0;
    f->coordinator = 0;
    return coordinator_failed_to(f, "serve", err);
}

int fleet_wait(struct fleet *f, uint32_t rounds, double seconds, struct err *err) {
    for (double begin = now_s();; pause_s(WAIT_S)) {
        bool all = true;
        if (look_after(f, err)) return -1;
        for (int i = 0; i < f->members; i++)
            all = all && (f->member[i].pid <= 0 || f->member[i].applied >= rounds);
        if (all) return 0;
        if (now_s() - begin > seconds)
            return err_set(err, ERR_TIMEOUT, "no round %u after %.0f s", rounds, seconds);
    }
}
