/* doctor_net.c - whom this machine reaches and who can reach it, the corpus, the clock; see doctor.h. */
#include "node/doctor.h"

#include "ckpt/http.h"
#include "ckpt/store.h"
#include "node/data.h"
#include "node/uplink.h"
#include "proto/address.h"

#include <arpa/inet.h>
#include <errno.h>
#include <event2/event.h>
#include <ifaddrs.h>
#include <netdb.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/timex.h>
#include <time.h>
#include <unistd.h>

#define CLOSE_MS 1500

/* ---- the coordinator ---------------------------------------------------------------------------- */

struct visit {
    struct event_base *base;
    struct doctor *d;
    bool welcomed;
    double began_s, took_s;
    char why[300]; /* the last reason of a failure */
};

/* The genesis is what the run's digest names, uplink.h has checked; it is decoded once more to be kept. */
static int on_welcome(void *arg, const struct uplink_welcome *w, struct err *err) {
    struct visit *v = arg;
    struct doctor *d = v->d;
    if (d->has_genesis) return 0;
    if (!(d->genesis_bytes = malloc(w->genesis_bytes.length + 1u)))
        return err_set(err, ERR_MEMORY, "no memory for a genesis");
    d->genesis_length = w->genesis_bytes.length;
    memcpy(d->genesis_bytes, w->genesis_bytes.data, d->genesis_length);
    if (proto_decode(d->genesis_bytes, d->genesis_length, RECORD_genesis, &d->genesis, err)) return -1;
    d->has_genesis = true;
    return 0;
}

static int on_enrolled(void *arg, uint32_t member, struct err *err) {
    (void)arg, (void)member;
    return err_set(err, ERR_PROTOCOL, "it enrolled who did not ask for it");
}

static void on_up(void *arg) {
    struct visit *v = arg;
    v->welcomed = true;
    v->took_s = doctor_now_s() - v->began_s;
    event_base_loopbreak(v->base);
}

static void on_refused(void *arg, const struct err *why, bool final) {
    struct visit *v = arg;
    snprintf(v->why, sizeof v->why, "%s", why->msg);
    if (final) event_base_loopbreak(v->base);
}

static void on_trouble(void *arg, const char *text) {
    struct visit *v = arg;
    snprintf(v->why, sizeof v->why, "%.*s", (int)strcspn(text, ";"), text);
}

static void on_limit(evutil_socket_t fd, short what, void *base) {
    (void)fd, (void)what;
    event_base_loopbreak(base);
}

static void on_message(void *arg, const struct frame *f, const void *msg) { (void)arg, (void)f, (void)msg; }
static void on_down(void *arg, const char *why) { (void)arg, (void)why; }

/* A channel that was closed says so to the other side first; its memory goes when it has. */
static void let_channels_end(struct event_base *base) {
    for (int ms = 0; ms < CLOSE_MS && event_base_get_num_events(base, EVENT_BASE_COUNT_ADDED); ms += 10) {
        event_base_loop(base, EVLOOP_NONBLOCK);
        usleep(10000);
    }
}

/* With a key of its own: a member that runs meanwhile is not disturbed, and nobody is enrolled. */
static int visit(struct visit *v, struct err *err) {
    static const struct uplink_ops ops = { .on_welcome = on_welcome, .on_enrolled = on_enrolled, .on_up = on_up,
                                           .on_message = on_message, .on_down = on_down, .on_refused = on_refused,
                                           .on_trouble = on_trouble };
    const struct invite *i = &v->d->invite;
    struct timeval seconds = { .tv_sec = DOCTOR_CHECK_S };
    struct identity stranger;
    identity_create(&stranger);
    struct channel_context *ctx = channel_context_create(&stranger, err);
    v->base = ctx ? event_base_new() : NULL;
    if (ctx && !v->base) err_set(err, ERR_MEMORY, "no memory for an event loop");
    v->began_s = doctor_now_s();
    struct uplink *u = v->base ? uplink_create(v->base, ctx, i->host, i->port, &i->run, &ops, v, err) : NULL;
    struct event *limit = u ? evtimer_new(v->base, on_limit, v->base) : NULL;
    if (u && limit) {
        event_add(limit, &seconds);
        event_base_dispatch(v->base);
        uplink_stop(u);
    }
    if (limit) event_free(limit);
    uplink_destroy(u);
    if (v->base) {
        let_channels_end(v->base);
        event_base_free(v->base);
    }
    channel_context_destroy(ctx);
    identity_release(&stranger);
    return u ? 0 : -1;
}

/* The address that packets to the coordinator leave from; nothing is sent. */
static void find_local_address(struct doctor *d) {
    char port[16];
    struct addrinfo *found = NULL, hints = { .ai_socktype = SOCK_DGRAM };
    struct sockaddr_storage own;
    socklen_t n = sizeof own;
    snprintf(port, sizeof port, "%u", d->invite.port);
    if (getaddrinfo(d->invite.host, port, &hints, &found)) return;
    for (struct addrinfo *a = found; a && !d->local_address[0]; a = a->ai_next) {
        int fd = socket(a->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        if (fd >= 0 && !connect(fd, a->ai_addr, a->ai_addrlen) && !getsockname(fd, (struct sockaddr *)&own, &n))
            getnameinfo((struct sockaddr *)&own, n, d->local_address, sizeof d->local_address, NULL, 0,
                        NI_NUMERICHOST);
        if (fd >= 0) close(fd);
    }
    freeaddrinfo(found);
}

void doctor_coordinator(struct doctor *d) {
    if (!d->invite.host[0]) {
        doctor_say(d, "coordinator", DOCTOR_SKIP, "no run is known: give an invite, or the --home that has joined one");
        return;
    }
    struct visit v = { .d = d };
    struct err err;
    if (visit(&v, &err)) {
        doctor_say(d, "coordinator", DOCTOR_FAIL, "%s", err.msg);
    } else if (!v.welcomed) {
        doctor_say(d, "coordinator", DOCTOR_FAIL, "%s; is the address in the invite right, and the coordinator up?",
                   v.why[0] ? v.why : "no answer");
    } else {
        char name[80];
        find_local_address(d);
        proto_str_copy(d->genesis.name, name, sizeof name);
        json_t *o = doctor_say(d, "coordinator", DOCTOR_OK, "%s:%u speaks for the run \"%s\", answered in %.0f ms",
                               d->invite.host, d->invite.port, name, 1e3 * v.took_s);
        json_object_set_new(o, "ms", json_real(1e3 * v.took_s));
    }
}

/* ---- the port for other members ------------------------------------------------------------------ */

/* RFC 1918, RFC 6598 (a provider's own), link-local, and IPv6's like. */
static bool is_private(const char *address) {
    struct in_addr v4;
    struct in6_addr v6;
    if (inet_pton(AF_INET, address, &v4) == 1) {
        uint32_t a = ntohl(v4.s_addr);
        return a >> 24 == 10 || a >> 20 == 0xac1 || a >> 16 == 0xc0a8 || a >> 22 == 0x191 || a >> 16 == 0xa9fe;
    }
    return inet_pton(AF_INET6, address, &v6) == 1 && ((v6.s6_addr[0] & 0xfe) == 0xfc || IN6_IS_ADDR_LINKLOCAL(&v6));
}

static void on_accept(void *arg, int fd) {
    (void)arg;
    close(fd);
}

/* Connect to ourselves by that address: a firewall on this machine shows. 0, or an errno. */
static int reach(const char *address, uint16_t port) {
    char number[16];
    struct addrinfo *a = NULL, hints = { .ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICHOST };
    snprintf(number, sizeof number, "%u", port);
    if (getaddrinfo(address, number, &hints, &a)) return EADDRNOTAVAIL;
    int fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), failure = 0;
    socklen_t n = sizeof failure;
    if (fd < 0 || (connect(fd, a->ai_addr, a->ai_addrlen) && errno != EINPROGRESS)) failure = errno;
    if (!failure && poll(&(struct pollfd){ .fd = fd, .events = POLLOUT }, 1, 3000) < 1) failure = ETIMEDOUT;
    else if (!failure) getsockopt(fd, SOL_SOCKET, SO_ERROR, &failure, &n);
    if (fd >= 0) close(fd);
    freeaddrinfo(a);
    return failure;
}

static void say_port(struct doctor *d, uint16_t port) {
    const char *address = d->local_address[0] ? d->local_address : "127.0.0.1";
    int failure = reach(address, port);
    json_t *o;
    if (failure)
        o = doctor_say(d, "port", DOCTOR_WARN,
                       "port %u at %s cannot be reached from this machine itself (%s): a firewall? Without it the "
                       "node only dials, as with --no-listen", port, address, strerror(failure));
    else if (is_private(address) && !address_is_loopback(d->invite.host))
        o = doctor_say(d, "port", DOCTOR_WARN,
                       "port %u is open here, but %s is a private address: other members reach it only where the "
                       "router forwards the port; else say --no-listen", port, address);
    else
        o = doctor_say(d, "port", DOCTOR_OK,
                       "port %u is open at %s; whether it is from outside only others can tell", port, address);
    json_object_set_new(o, "port", json_integer(port));
    json_object_set_new(o, "address", json_string(address));
}

void doctor_port(struct doctor *d) {
    struct err err, no_v6;
    uint16_t port = (uint16_t)d->listen_port;
    if (d->listen_port < 0) {
        doctor_say(d, "port", DOCTOR_OK, "none is opened: the node dials others");
        return;
    }
    struct event_base *base = event_base_new();
    struct listener *l = base ? listener_create(base, "::", &port, on_accept, NULL, &no_v6) : NULL;
    if (base && !l) l = listener_create(base, "0.0.0.0", &port, on_accept, NULL, &err);
    if (!base) err_set(&err, ERR_MEMORY, "no memory for an event loop");
    if (l) say_port(d, port);
    else doctor_say(d, "port", DOCTOR_FAIL, "%s", err.msg);
    if (l) listener_destroy(l);
    if (base) event_base_free(base);
}

/* ---- the corpus ----------------------------------------------------------------------------------- */

static bool corpus_of(const struct doctor *d, char out[PROTO_URL_BYTES_MAX + 1]) {
    out[0] = '\0';
    if (d->corpus) snprintf(out, PROTO_URL_BYTES_MAX + 1, "%s", d->corpus);
    else if (d->has_genesis && d->genesis.corpus_count == 1)
        proto_str_copy(d->genesis.corpus->manifest_url, out, PROTO_URL_BYTES_MAX + 1);
    return out[0] != '\0';
}

void doctor_corpus(struct doctor *d) {
    char where[PROTO_URL_BYTES_MAX + 1];
    struct err err;
    if (!corpus_of(d, where)) {
        doctor_say(d, "corpus", DOCTOR_SKIP, "no run and no --corpus is known");
        return;
    }
    setenv("INTELLECT_STORE_TRIES", "2", 0); /* an answer soon rather than a patient one */
    setenv("INTELLECT_STORE_STALL_S", "5", 0);
    const struct msg_corpus *c = d->has_genesis && d->genesis.corpus_count == 1 ? d->genesis.corpus : NULL;
    double began = doctor_now_s();
    struct data *data = data_open(where, c ? &c->manifest_digest : NULL, c ? c->shuffle_seed : 0, &err);
    int32_t *tokens = data ? calloc(data_info(data)->sequence + 1u, sizeof *tokens) : NULL;
    if (data && !tokens) err_set(&err, ERR_MEMORY, "no memory for a sample");
    if (tokens && !data_sample(data, 0, tokens, &err)) {
        double took = doctor_now_s() - began;
        const struct data_info *i = data_info(data);
        json_t *o = doctor_say(d, "corpus", DOCTOR_OK,
                               "%s: %llu samples of %u tokens, the first one read in %.0f ms", where,
                               (unsigned long long)i->samples, i->sequence, 1e3 * took);
        json_object_set_new(o, "ms", json_real(1e3 * took));
    } else {
        doctor_say(d, "corpus", DOCTOR_FAIL, "%s; name another place with --corpus", err.msg);
    }
    free(tokens);
    data_close(data);
}

/* ---- the clock ------------------------------------------------------------------------------------ */

#define CLOCK_WARN_S 60      /* a signed request to an S3 store may be off by 900 */
#define CLOCK_FAIL_S 43200   /* certificates of https are no longer, or not yet, valid */

/* Where the corpus is behind a network, its server's clock; false where there is none, or it does not say. */
static bool server_clock(const struct doctor *d, char url[PROTO_URL_BYTES_MAX + 1], double *ahead_s) {
    char where[PROTO_URL_BYTES_MAX + 1];
    struct http_limits limits;
    struct http_answer a;
    struct err err;
    if (!corpus_of(d, where)) return false;
    const char *from = strstr(where, "endpoint=");
    from = from ? from + strlen("endpoint=") : where;
    if (strncmp(from, "https://", 8) != 0 && strncmp(from, "http://", 7) != 0) return false;
    size_t host = (size_t)(strstr(from, "://") - from) + 3;
    snprintf(url, PROTO_URL_BYTES_MAX + 1, "%.*s/", (int)(host + strcspn(from + host, "/?&")), from);
    if (http_limits_load(&limits, &err)) return false;
    struct http_client *c = http_client_create(&limits, http_loopback(url + host), &err);
    struct http_request r = { .method = HTTP_HEAD, .url = url, .stall_s = 5, .tries = 1 };
    struct timespec before, after;
    clock_gettime(CLOCK_REALTIME, &before);
    bool answered = c && !http_perform(c, &r, &a, &err);
    clock_gettime(CLOCK_REALTIME, &after);
    bool told = answered && a.date_s >= 0;
    /* A Date is cut to whole seconds. */
    if (told)
        *ahead_s = ((double)before.tv_sec + (double)after.tv_sec) / 2 +
                   1e-9 * (double)(before.tv_nsec + after.tv_nsec) / 2 - ((double)a.date_s + 0.5);
    if (answered) http_answer_release(&a);
    http_client_destroy(c);
    return told;
}

void doctor_clock(struct doctor *d) {
    char url[PROTO_URL_BYTES_MAX + 1];
    struct timex t = { 0 };
    double ahead = 0;
    json_t *o;
    if (server_clock(d, url, &ahead)) {
        double off = ahead < 0 ? -ahead : ahead;
        o = doctor_say(d, "clock", off > CLOCK_FAIL_S ? DOCTOR_FAIL : off > CLOCK_WARN_S ? DOCTOR_WARN : DOCTOR_OK,
                       "%.0f s %s that of %s, to a second%s", off, ahead < 0 ? "behind" : "ahead of", url,
                       off > CLOCK_WARN_S ? ": set it, and let NTP keep it" : "");
        json_object_set_new(o, "ahead_s", json_real(ahead));
        return;
    }
    int state = adjtimex(&t);
    if (state < 0) doctor_say(d, "clock", DOCTOR_SKIP, "nothing to compare it with, and the kernel does not tell");
    else if (state == TIME_ERROR || t.status & STA_UNSYNC)
        doctor_say(d, "clock", DOCTOR_WARN,
                   "nothing sets it: let NTP keep it (the run itself needs no clock; https does)");
    else
        doctor_say(d, "clock", DOCTOR_OK, "NTP keeps it, to %.3g s as the kernel reckons", (double)t.maxerror / 1e6);
}
