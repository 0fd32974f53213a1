/* control.c - both ends of the control socket; see control.h. */
#define _GNU_SOURCE /* accept4 */
#include "coordinator/control.h"

#include <errno.h>
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/event.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define ANSWER_BYTES_MAX (16u << 20)

struct client {
    struct control *control;
    struct bufferevent *bev;
};

struct control {
    struct event_base *base;
    int dir_fd, fd;
    json_t *(*answer)(void *arg, const json_t *request);
    void *arg;
    struct event *incoming;
    struct client clients[CONTROL_CLIENTS_MAX];
};

/* The socket's address. A path may have 107 bytes only; through an open folder any depth will do. */
static struct sockaddr_un address_in(int dir_fd) {
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    snprintf(a.sun_path, sizeof a.sun_path, "/proc/self/fd/%d/" CONTROL_SOCKET_NAME, dir_fd);
    return a;
}

/* ---- the serving end ------------------------------------------------------------------------------ */

static void drop(struct client *c) {
    if (c->bev) bufferevent_free(c->bev);
    c->bev = NULL;
}

static void on_sent(struct bufferevent *bev, void *arg) {
    (void)bev;
    drop(arg);
}

static void on_trouble(struct bufferevent *bev, short what, void *arg) {
    (void)bev;
    (void)what;
    drop(arg);
}

static void reply(struct client *c, const json_t *request) {
    json_t *object = request ? c->control->answer(c->control->arg, request)
                             : json_pack("{ss}", "error", "that is no JSON object on one line");
    char *text = object ? json_dumps(object, JSON_COMPACT) : NULL;
    json_decref(object);
    if (!text || evbuffer_add(bufferevent_get_output(c->bev), text, strlen(text))) drop(c);
    else bufferevent_setcb(c->bev, NULL, on_sent, on_trouble, c);
    free(text);
}

static void on_request(struct bufferevent *bev, void *arg) {
    struct client *c = arg;
    struct evbuffer *input = bufferevent_get_input(bev);
    char *line = evbuffer_readln(input, NULL, EVBUFFER_EOL_LF);
    if (!line && evbuffer_get_length(input) <= CONTROL_REQUEST_BYTES_MAX) return;
    json_t *request = line ? json_loads(line, JSON_REJECT_DUPLICATES, NULL) : NULL;
    reply(c, json_is_object(request) ? request : NULL);
    json_decref(request);
    free(line);
}

static void take(struct client *c, int fd) {
    struct timeval patience = { .tv_sec = CONTROL_ANSWER_MS_MAX / 1000 };
    c->bev = bufferevent_socket_new(c->control->base, fd, BEV_OPT_CLOSE_ON_FREE);
    if (!c->bev) {
        close(fd);
        return;
    }
    bufferevent_setwatermark(c->bev, EV_READ, 0, CONTROL_REQUEST_BYTES_MAX + 1);
    bufferevent_setcb(c->bev, on_request, NULL, on_trouble, c);
    bufferevent_set_timeouts(c->bev, &patience, &patience);
    bufferevent_enable(c->bev, EV_READ | EV_WRITE);
}

static void on_incoming(evutil_socket_t listening, short what, void *arg) {
    struct control *c = arg;
    (void)what;
    int fd = accept4(listening, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) return;
    for (int i = 0; i < CONTROL_CLIENTS_MAX; i++)
        if (!c->clients[i].bev) {
            take(&c->clients[i], fd);
            return;
        }
    close(fd);
}

static int listen_in(struct control *c, const char *dir, struct err *err) {
    c->dir_fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (c->dir_fd < 0) return err_set_errno(err, "open %s", dir);
    c->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) return err_set_errno(err, "socket");
    struct sockaddr_un a = address_in(c->dir_fd);
    unlinkat(c->dir_fd, CONTROL_SOCKET_NAME, 0);
    mode_t before = umask(0177);
    int failed = bind(c->fd, (struct sockaddr *)&a, sizeof a) || listen(c->fd, CONTROL_CLIENTS_MAX);
    umask(before);
    return failed ? err_set_errno(err, "make %s/" CONTROL_SOCKET_NAME, dir) : 0;
}

struct control *control_create(struct event_base *base, const char *dir,
                               json_t *(*answer)(void *arg, const json_t *request), void *arg,
                               struct err *err) {
    struct control *c = calloc(1, sizeof *c);
    if (!c) {
        err_set(err, ERR_MEMORY, "no memory for the control socket");
        return NULL;
    }
    *c = (struct control){ .base = base, .dir_fd = -1, .fd = -1, .answer = answer, .arg = arg };
    for (int i = 0; i < CONTROL_CLIENTS_MAX; i++) c->clients[i].control = c;
    if (listen_in(c, dir, err)) goto failed;
    c->incoming = event_new(base, c->fd, EV_READ | EV_PERSIST, on_incoming, c);
    if (!c->incoming || event_add(c->incoming, NULL)) {
        err_set(err, ERR_MEMORY, "no memory for the control socket");
        goto failed;
    }
    return c;
failed:
    control_destroy(c);
    return NULL;
}

void control_destroy(struct control *c) {
    if (!c) return;
    for (int i = 0; i < CONTROL_CLIENTS_MAX; i++) drop(&c->clients[i]);
    if (c->incoming) {
        event_free(c->incoming);
        unlinkat(c->dir_fd, CONTROL_SOCKET_NAME, 0);
    }
    if (c->fd >= 0) close(c->fd);
    if (c->dir_fd >= 0) close(c->dir_fd);
    free(c);
}

/* ---- the asking end -------------------------------------------------------------------------------- */

static int64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static int connect_in(const char *dir, struct err *err) {
    int dir_fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir_fd < 0) return err_set_errno(err, "open %s", dir);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    struct sockaddr_un a = address_in(dir_fd);
    int failed = fd < 0 || connect(fd, (struct sockaddr *)&a, sizeof a);
    int saved = errno;
    close(dir_fd);
    if (!failed) return fd;
    if (fd >= 0) close(fd);
    errno = saved;
    if (saved == EAGAIN) return err_set(err, ERR_TIMEOUT, "the serving process does not answer");
    if (saved == ENOENT || saved == ECONNREFUSED)
        return err_set(err, ERR_NOT_FOUND, "nobody serves the run in %s", dir);
    return err_set_errno(err, "ask the process that serves %s", dir);
}

/* Everything up to the end, into *text, which the caller frees; NUL-terminated. */
static int read_answer(int fd, char **text, struct err *err) {
    size_t length = 0, capacity = 1u << 16;
    int64_t deadline = now_ms() + CONTROL_ANSWER_MS_MAX;
    *text = malloc(capacity);
    while (*text) {
        struct pollfd p = { .fd = fd, .events = POLLIN };
        int64_t left = deadline - now_ms();
        if (left <= 0 || poll(&p, 1, (int)left) <= 0)
            return err_set(err, ERR_TIMEOUT, "the serving process does not answer");
        ssize_t n = read(fd, *text + length, capacity - length - 1);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) continue;
        if (n < 0) return err_set_errno(err, "read from the serving process");
        length += (size_t)n;
        (*text)[length] = '\0';
        if (n == 0) return 0;
        if (length + 1 < capacity) continue;
        char *grown = capacity < ANSWER_BYTES_MAX ? realloc(*text, capacity *= 2) : NULL;
        if (!grown) return err_set(err, ERR_FULL, "the serving process' answer is too long");
        *text = grown;
    }
    return err_set(err, ERR_MEMORY, "no memory for an answer");
}

static int send_request(int fd, const json_t *request, struct err *err) {
    char *text = json_dumps(request, JSON_COMPACT);
    size_t length = text ? strlen(text) : 0;
    if (!text || length >= CONTROL_REQUEST_BYTES_MAX) {
        free(text);
        return err_set(err, ERR_CONFIG, "the request has %zu bytes; allowed are %d", length,
                       CONTROL_REQUEST_BYTES_MAX);
    }
    text[length] = '\n'; /* in place of the NUL; a socket takes this much at once */
    ssize_t n = send(fd, text, length + 1, MSG_NOSIGNAL);
    free(text);
    return n == (ssize_t)length + 1 ? 0 : err_set_errno(err, "ask the serving process");
}

json_t *control_ask(const char *dir, const json_t *request, struct err *err) {
    char *text = NULL;
    json_t *answer = NULL, *nothing = json_object();
    int fd = connect_in(dir, err);
    if (fd >= 0 && send_request(fd, request ? request : nothing, err) == 0 &&
        read_answer(fd, &text, err) == 0) {
        answer = json_loads(text, 0, NULL);
        if (!answer) err_set(err, ERR_CORRUPT, *text ? "the serving process' answer is no JSON"
                                                     : "the serving process ended without an answer: see its log");
    }
    if (fd >= 0) close(fd);
    json_decref(nothing);
    free(text);
    return answer;
}
