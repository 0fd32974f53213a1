/* listener.c - a listening TCP socket that hands over raw descriptors. */
#include <dirent.h>
#include <errno.h>
#include <event2/event.h>
#include <event2/listener.h>
#include <event2/util.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "proto/proto.h"

#define BACKLOG 256
#define PAUSE_MS 200 /* after accept() failed, as with no descriptors left */

struct listener {
    struct evconnlistener *socket;
    struct event *resume;
    void (*on_accept)(void *arg, int fd);
    void *arg;
};

/* ---- who holds a port (Linux, /proc; for the error message only)
 * ----------------------------------- */

/* The socket inode that listens on `port`, from one of the tables of /proc/net, or 0. */
static unsigned long listening_inode(const char *table, unsigned port) {
    char line[512];
    unsigned long found = 0;
    FILE *f = fopen(table, "re");
    while (f && !found && fgets(line, sizeof line, f)) {
        unsigned local, state;
        unsigned long inode;
        if (sscanf(line, " %*d: %*[0-9A-Fa-f]:%x %*[0-9A-Fa-f]:%*x %x %*s %*s %*s %*d %*d %lu",
                   &local, &state, &inode) == 3 &&
            local == port && state == 0x0a)
            found = inode;
    }
    if (f) fclose(f);
    return found;
}

static bool process_has_socket(const char *pid, unsigned long inode) {
    char path[300], link[64], want[64];
    bool found = false;
    snprintf(want, sizeof want, "socket:[%lu]", inode);
    snprintf(path, sizeof path, "/proc/%.20s/fd", pid);
    DIR *dir = opendir(path);
    struct dirent *entry;
    while (dir && !found && (entry = readdir(dir))) {
        snprintf(path, sizeof path, "/proc/%.20s/fd/%.20s", pid, entry->d_name);
        ssize_t n = readlink(path, link, sizeof link - 1);
        if (n < 0) continue;
        link[n] = '\0';
        found = strcmp(link, want) == 0;
    }
    if (dir) closedir(dir);
    return found;
}

/* "another process", or better "intellect-coord (process 4711)" where we may look. */
static void describe_holder(unsigned port, char *out, size_t size) {
    unsigned long inode = listening_inode("/proc/net/tcp", port);
    if (!inode) inode = listening_inode("/proc/net/tcp6", port);
    snprintf(out, size, "another process");
    DIR *proc = inode ? opendir("/proc") : NULL;
    struct dirent *entry;
    while (proc && (entry = readdir(proc))) {
        char path[64], name[64] = "";
        if (strspn(entry->d_name, "0123456789") != strlen(entry->d_name)) continue;
        if (!process_has_socket(entry->d_name, inode)) continue;
        snprintf(path, sizeof path, "/proc/%.20s/comm", entry->d_name);
        FILE *f = fopen(path, "re");
        if (f && fgets(name, sizeof name, f)) name[strcspn(name, "\n")] = '\0';
        if (f) fclose(f);
        snprintf(out, size, "%s (process %.20s)", name, entry->d_name);
        break;
    }
    if (proc) closedir(proc);
}

/* ---- listening
 * ---------------------------------------------------------------------------------------- */

static void on_connection(struct evconnlistener *socket, evutil_socket_t fd, struct sockaddr *peer,
                          int length, void *arg) {
    (void)socket, (void)peer, (void)length;
    struct listener *l = arg;
    l->on_accept(l->arg, (int)fd);
}

/* The connection still waits in the kernel, so going on at once would spin. */
static void on_accept_failed(struct evconnlistener *socket, void *arg) {
    struct listener *l = arg;
    struct timeval pause = {.tv_usec = PAUSE_MS * 1000};
    evconnlistener_disable(socket);
    evtimer_add(l->resume, &pause);
}

static void on_resume(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct listener *l = arg;
    evconnlistener_enable(l->socket);
}

static int explain_bind(const char *host, uint16_t port, struct err *err) {
    char holder[128];
    if (errno != EADDRINUSE) return err_set_errno(err, "listen on %s port %u", host, port);
    describe_holder(port, holder, sizeof holder);
    return err_set(err, ERR_IO, "listen on %s port %u: %s holds it already", host, port, holder);
}

static int listen_on(struct listener *l, struct event_base *base, const struct addrinfo *a,
                     const char *host, uint16_t *port, struct err *err) {
    struct sockaddr_storage bound;
    socklen_t length = sizeof bound;
    l->socket = evconnlistener_new_bind(
        base, on_connection, l, LEV_OPT_CLOSE_ON_FREE | LEV_OPT_CLOSE_ON_EXEC | LEV_OPT_REUSEABLE,
        BACKLOG, a->ai_addr, (int)a->ai_addrlen);
    if (!l->socket) return explain_bind(host, *port, err);
    evconnlistener_set_error_cb(l->socket, on_accept_failed);
    if (getsockname(evconnlistener_get_fd(l->socket), (struct sockaddr *)&bound, &length))
        return err_set_errno(err, "listen on %s", host);
    *port = ntohs(bound.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&bound)->sin6_port
                                              : ((struct sockaddr_in *)&bound)->sin_port);
    return 0;
}

struct listener *listener_create(struct event_base *base, const char *host, uint16_t *port,
                                 void (*on_accept)(void *arg, int fd), void *arg, struct err *err) {
    struct addrinfo hints = {.ai_family = AF_UNSPEC,
                             .ai_socktype = SOCK_STREAM,
                             .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    struct addrinfo *addresses = NULL;
    char service[8];
    struct listener *l = calloc(1, sizeof *l);
    if (l) l->resume = evtimer_new(base, on_resume, l);
    if (!l || !l->resume) {
        err_set(err, ERR_MEMORY, "no memory to listen");
        goto failed;
    }
    l->on_accept = on_accept;
    l->arg = arg;
    snprintf(service, sizeof service, "%u", *port);
    int failed = getaddrinfo(host, service, &hints, &addresses);
    if (failed) {
        err_set(err, ERR_CONFIG, "listen on \"%s\": %s", host, gai_strerror(failed));
        addresses = NULL;
        goto failed;
    }
    if (listen_on(l, base, addresses, host, port, err)) goto failed;
    freeaddrinfo(addresses);
    return l;
failed:
    if (addresses) freeaddrinfo(addresses);
    listener_destroy(l);
    return NULL;
}

void listener_destroy(struct listener *l) {
    if (!l) return;
    if (l->socket) evconnlistener_free(l->socket);
    if (l->resume) event_free(l->resume);
    free(l);
}
