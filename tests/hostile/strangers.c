/* strangers.c - attacks of those who are no members: what is not TLS, or not our TLS, silence,
 * very many connections, and all of this for as long as one likes. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "proto/tls.h"
#include "tests/hostile/hostile.h"

/* ---- no TLS ------------------------------------------------------------------------------------------ */

enum { GARBAGE, SILENT_TCP, HALF_HELLO };

static int plain(const struct target *t, const struct attack *a) {
    static const char *const first[] = {
        [GARBAGE] = "hello, is there anybody?\r\n",
        [SILENT_TCP] = "",
        [HALF_HELLO] = "\x16\x03\x01\x02", /* the first bytes of a TLS record that never comes */
    };
    struct link l;
    struct err err;
    uint64_t start = now_ms();
    if (link_open(&l, t, t->from, &err)) return verdict(a, false, "%s", err.msg);
    link_write(&l, first[a->kind], strlen(first[a->kind]));
    bool ok = link_hear_out(&l);
    verdict(a, ok, "%s after %.1f s", l.heard, (double)(now_ms() - start) / 1000);
    link_close(&l);
    return !ok;
}

/* Whoever looks at the port with a browser is told what it is. */
static int http(const struct target *t, const struct attack *a) {
    static const char request[] = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    char answer[512] = "";
    size_t have = 0;
    struct link l;
    struct err err;
    if (link_open(&l, t, t->from, &err)) return verdict(a, false, "%s", err.msg);
    link_write(&l, request, sizeof request - 1);
    for (uint64_t end = now_ms() + PATIENCE_MS; now_ms() < end && have < sizeof answer - 1;) {
        ssize_t n = recv(l.fd, answer + have, sizeof answer - 1 - have, 0);
        if (n == 0) break;
        if (n > 0) have += (size_t)n;
    }
    answer[have] = '\0';
    bool ok = strstr(answer, "400 Bad Request") && strstr(answer, "not plain HTTP");
    const char *body = strstr(answer, "\r\n\r\n");
    verdict(a, ok, "%.*s / %.*s", (int)strcspn(answer, "\r\n"), answer, body ? (int)strcspn(body + 4, "\r\n") : 0,
            body ? body + 4 : "");
    link_close(&l);
    return !ok;
}

/* ---- not our TLS -------------------------------------------------------------------------------------- */

enum { OLD_TLS, NO_CERTIFICATE, NO_ALPN, NEW_KEY };

static SSL_CTX *wrong_context(const struct target *t, int kind, struct err *err) {
    SSL_CTX *ctx = kind == NO_CERTIFICATE ? SSL_CTX_new(TLS_client_method()) : tls_context_create(&t->id, err);
    if (!ctx) return NULL;
    if (kind == NO_CERTIFICATE) SSL_CTX_set_alpn_protos(ctx, (const unsigned char *)"\x0bintellect/1", 12);
    if (kind == NO_ALPN) SSL_CTX_set_alpn_protos(ctx, NULL, 0);
    if (kind == OLD_TLS) {
        SSL_CTX_set_min_proto_version(ctx, TLS1_2_VERSION);
        SSL_CTX_set_max_proto_version(ctx, TLS1_2_VERSION);
    }
    return ctx;
}

/* In TLS 1.3 a server judges the client's certificate when the client is already done. */
static int tls(const struct target *t, const struct attack *a) {
    struct link l;
    struct err err = {0};
    SSL_CTX *ctx = wrong_context(t, a->kind, &err);
    if (!ctx || link_open(&l, t, t->from, &err)) return verdict(a, false, "%s", err.msg);
    bool ok = link_start_tls(&l, t, ctx, &err) ? err.code == ERR_REFUSED : link_hear_out(&l);
    verdict(a, ok, "%s", l.heard);
    link_close(&l);
    return !ok;
}

/* ---- silence --------------------------------------------------------------------------------------------- */

enum { SILENT_STRANGER, HALF_FRAME };

static int stall(const struct target *t, const struct attack *a) {
    static const struct frame hello = {.type = MSG_HELLO, .length = 200};
    uint8_t bytes[PROTO_FRAME_HEADER_BYTES + 10] = {0};
    struct link l;
    struct err err;
    uint64_t start = now_ms();
    if (link_dial(&l, t, &err)) return verdict(a, false, "%s", err.msg);
    frame_write(&hello, bytes);
    if (a->kind == HALF_FRAME) link_write(&l, bytes, sizeof bytes);
    bool ok = link_hear_out(&l);
    verdict(a, ok, "%s after %.1f s", l.heard, (double)(now_ms() - start) / 1000);
    link_close(&l);
    return !ok;
}

/* ---- very many ---------------------------------------------------------------------------------------------- */

/* One of four ways to waste somebody's time. 0: the connection could not even be made. */
static int waste(const struct target *t, const char *from, uint32_t way) {
    struct link l;
    struct err err;
    struct msg_hello hello = {.software = proto_str("storm"), .trains = 1};
    int made = link_open(&l, t, from, &err) == 0;
    if (made && way == 1) link_write(&l, "\x16\x03\x01garbage", 10);
    if (made && way >= 2 && !link_start_tls(&l, t, NULL, &err) && way == 3 && link_expect(&l, MSG_WELCOME)) {
        l.term = l.frame.term;
        link_send(&l, MSG_HELLO, 0, &hello);
        link_hear_out(&l);
    }
    link_close(&l);
    return made;
}

static uint32_t count_of(const struct target *t, uint32_t otherwise) {
    return t->argument ? (uint32_t)strtoul(t->argument, NULL, 10) : otherwise;
}

/* Each from an address of its own, as a botnet would, so that the limit per address does not help. */
static int storm(const struct target *t, const struct attack *a) {
    static const uint8_t ways[8] = {0, 1, 0, 1, 0, 1, 2, 3}; /* TLS costs us as much as them */
    uint32_t count = count_of(t, 1000), made = 0;
    uint64_t start = now_ms();
    for (uint32_t i = 0; i < count; i++) {
        char from[32];
        snprintf(from, sizeof from, "127.1.%u.%u", i / 250, i % 250 + 1);
        made += (uint32_t)waste(t, from, ways[i % 8]);
    }
    return verdict(a, made == count, "%u of %u connections made in %.1f s", made, count,
                   (double)(now_ms() - start) / 1000);
}

/* Many from one address, all open at once: those over the limit are closed unheard. */
static int crowd(const struct target *t, const struct attack *a) {
    uint32_t count = count_of(t, 1000), made = 0, closed = 0;
    struct link *all = calloc(count, sizeof *all);
    struct err err;
    if (!all) return 1;
    while (made < count && !link_open(&all[made], t, t->from, &err)) made++;
    for (uint32_t i = 0; i < made; i++) {
        char c;
        ssize_t n = recv(all[i].fd, &c, 1, MSG_DONTWAIT);
        closed += n == 0 || (n < 0 && errno == ECONNRESET);
    }
    for (uint32_t i = 0; i < made; i++) link_close(&all[i]);
    free(all);
    return verdict(a, made == count && closed > 0, "%u connections at once, %u of them refused", made, closed);
}

/* ---- an hour of it --------------------------------------------------------------------------------------------- */

#define HELD_MAX 128 /* connections that are left open until as many others were */
#define DRIP_MS 1000

struct held {
    struct link link;
    bool drips;
};

static struct {
    struct held held[HELD_MAX];
    uint32_t next, made, failed;
    uint64_t drip_ms;
} siege;

static void hold(struct link *l, bool drips) {
    struct held *h = &siege.held[siege.next++ % HELD_MAX];
    if (h->link.fd > 0) link_close(&h->link);
    *h = (struct held){*l, drips};
}

/* A byte a second each, of what could still become something. */
static void drip_all(void) {
    if (now_ms() - siege.drip_ms < DRIP_MS) return;
    siege.drip_ms = now_ms();
    for (uint32_t i = 0; i < HELD_MAX; i++) {
        struct held *h = &siege.held[i];
        if (h->link.fd > 0 && h->drips && !h->link.over) link_write(&h->link, "\x01", 1);
    }
}

enum {
    SAY_NOTHING, SAY_GARBAGE, SAY_HTTP, DRIP_TLS, RESET, TLS_NO_CERTIFICATE, TLS_NO_ALPN, TLS_OLD, TLS_SILENT,
    TLS_GARBAGE, TLS_OVERSIZED, TLS_DRIP_FRAME, TLS_HELLO, TLS_LINK, WAYS
};

static void before_tls(struct link *l, int way) {
    static const char http[] = "GET /admin HTTP/1.1\r\nHost: x\r\n\r\n";
    struct linger reset = {.l_onoff = 1};
    if (way == SAY_GARBAGE) link_write(l, "\x16\x03\x01garbage that is no TLS at all\r\n", 32);
    if (way == SAY_HTTP) link_write(l, http, sizeof http - 1);
    if (way == DRIP_TLS) link_write(l, "\x16\x03\x01\x02\x00", 5);
    if (way == RESET) setsockopt(l->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
}

/* Like the wrong contexts above; otherwise a new key, which is all a stranger needs for TLS. */
static int siege_tls(struct link *l, const struct target *t, int way, struct err *err) {
    SSL_CTX *ctx = NULL;
    if (way == TLS_NO_CERTIFICATE) ctx = wrong_context(t, NO_CERTIFICATE, err);
    if (way == TLS_NO_ALPN) ctx = wrong_context(t, NO_ALPN, err);
    if (way == TLS_OLD) ctx = wrong_context(t, OLD_TLS, err);
    return link_start_tls(l, t, ctx, err);
}

static void after_tls(struct link *l, int way) {
    struct msg_hello hello = {.software = proto_str("siege"), .trains = 1};
    struct msg_link link = {.process = 1, .number = 1};
    uint8_t header[PROTO_FRAME_HEADER_BYTES];
    frame_write(&(struct frame){.type = MSG_HELLO, .length = way == TLS_OVERSIZED ? UINT32_MAX : 200}, header);
    if (way == TLS_GARBAGE) link_write(l, "what is this to be, a frame of what kind?", 40);
    if (way == TLS_OVERSIZED || way == TLS_DRIP_FRAME) link_write(l, header, sizeof header);
    if (way == TLS_HELLO) link_send(l, MSG_HELLO, 0, &hello);
    if (way == TLS_LINK) link_send(l, MSG_LINK, 0, &link);
}

/* Half of them from one address, the others from all over. */
static void besiege(const struct target *t, uint32_t i) {
    char from[32];
    struct link l;
    struct err err;
    int way = (int)(i / 2 % WAYS);
    snprintf(from, sizeof from, "127.%u.%u.%u", 2 + i / 60000 % 100, i / 250 % 240, i % 250 + 1);
    if (link_open(&l, t, i % 2 ? from : t->from, &err)) {
        siege.failed++;
        link_close(&l);
        return;
    }
    siege.made++;
    before_tls(&l, way);
    if (way >= TLS_NO_CERTIFICATE && !siege_tls(&l, t, way, &err)) after_tls(&l, way);
    if (way == RESET || l.over) link_close(&l);
    else hold(&l, way == DRIP_TLS || way == TLS_DRIP_FRAME);
}

/* "RATE:SECONDS", RATE in connections a minute. */
static int run_siege(const struct target *t, const struct attack *a) {
    double rate = 1000, seconds = 60;
    if (t->argument && sscanf(t->argument, "%lf:%lf", &rate, &seconds) != 2)
        return verdict(a, false, "%s is not RATE:SECONDS", t->argument);
    uint64_t start = now_ms();
    for (uint32_t i = 0; now_ms() - start < (uint64_t)(seconds * 1000); i++) {
        besiege(t, i);
        drip_all();
        while ((double)(now_ms() - start) < i * 60000.0 / rate) {
            nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
            drip_all();
        }
    }
    for (uint32_t i = 0; i < HELD_MAX; i++)
        if (siege.held[i].link.fd > 0) link_close(&siege.held[i].link);
    return verdict(a, siege.failed == 0, "%u connections in %.0f s, %u that could not be made", siege.made,
                   (double)(now_ms() - start) / 1000, siege.failed);
}

const struct attack stranger_attacks[] = {
    {"garbage", plain, GARBAGE},
    {"http", http, 0},
    {"silent-tcp", plain, SILENT_TCP},
    {"half-hello", plain, HALF_HELLO},
    {"old-tls", tls, OLD_TLS},
    {"no-certificate", tls, NO_CERTIFICATE},
    {"no-alpn", tls, NO_ALPN},
    {"new-key", tls, NEW_KEY},
    {"silent-stranger", stall, SILENT_STRANGER},
    {"half-frame", stall, HALF_FRAME},
    {"storm", storm, 0},
    {"crowd", crowd, 0},
    {"siege", run_siege, 0},
    {NULL, NULL, 0},
};
