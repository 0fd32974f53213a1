/* gate.c - who may connect while nobody knows yet who it is; see proto.h.
 *
 * Memory is fixed: a place for each stranger, and a table of addresses in which those that have been
 * members' stay longest. The table is keyed, so that nobody can choose addresses that collide. */
#include <netinet/in.h>
#include <sodium.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "proto/proto.h"

#define WAYS 4 /* places in the table an address may have */
#define SETS 1024
#define MINUTE_MS 60000.0

/* Shares of strangers_max. A quarter is only for addresses from which members have come: they get in
 * while all the world holds the rest. */
#define UNKNOWN_MAX(all) ((all) - (all) / 4)
#define OF_UNKNOWN_ADDRESS_MAX(all) ((all) / 8 ? (all) / 8 : 1)
#define OF_KNOWN_ADDRESS_MAX(all) ((all) / 2 ? (all) / 2 : 1)
#define KNOWN_RATE 4          /* times connects_per_minute: many members behind one address */
#define ALL_UNKNOWN_RATE 20   /* times connects_per_minute: what handshakes may cost us */

struct bucket {
    double tokens;
    uint64_t at_ms;
};

struct address {
    uint64_t key; /* 0: a free place */
    struct bucket bucket;
    uint32_t present; /* strangers from here */
    bool known;       /* a member came from here */
};

struct gate_place {
    struct gate *gate;
    struct gate_place *next, **at; /* at: what points here; not in the list of free ones */
    struct address *address;
    uint64_t since_ms;
    void (*evict)(void *arg);
    void *arg;
};

struct gate {
    struct gate_limits limits;
    uint8_t key[crypto_shorthash_KEYBYTES];
    struct address addresses[SETS][WAYS];
    struct gate_place *places, *free;
    struct gate_place *oldest, **newest; /* the strangers, by age */
    uint32_t strangers, unknown;         /* unknown: those of them from addresses without a member */
    struct bucket all_unknown;
    uint32_t refused;
    struct {
        uint64_t since_ms;
        uint32_t told, untold;
    } talk[2]; /* about strangers, about members */
};

/* ---- lists ------------------------------------------------------------------------------------- */

static void unlink_place(struct gate_place *p) {
    if (p->next) p->next->at = p->at;
    else p->gate->newest = p->at;
    *p->at = p->next;
}

static void link_free(struct gate_place *p) {
    struct gate *g = p->gate;
    p->next = g->free;
    g->free = p;
}

static void link_newest(struct gate_place *p) {
    struct gate *g = p->gate;
    p->next = NULL;
    p->at = g->newest;
    *g->newest = p;
    g->newest = &p->next;
}

/* ---- birth and death --------------------------------------------------------------------------- */

struct gate *gate_create(const struct gate_limits *limits, struct err *err) {
    struct gate *g = calloc(1, sizeof *g);
    if (g) g->places = calloc(limits->strangers_max, sizeof *g->places);
    if (!g || !g->places) {
        free(g);
        err_set(err, ERR_MEMORY, "no memory for %u strangers", limits->strangers_max);
        return NULL;
    }
    g->limits = *limits;
    g->newest = &g->oldest;
    randombytes_buf(g->key, sizeof g->key);
    for (uint32_t i = 0; i < limits->strangers_max; i++) {
        g->places[i].gate = g;
        link_free(&g->places[i]);
    }
    return g;
}

void gate_destroy(struct gate *g) {
    if (!g) return;
    free(g->places);
    free(g);
}

/* ---- addresses --------------------------------------------------------------------------------- */

/* What counts as one: an IPv4 address, also in its IPv6 clothes, or a /64, which is what one IPv6 host
 * owns. Never 0. */
static uint64_t address_key(const struct gate *g, const struct sockaddr_storage *peer) {
    uint8_t bytes[9] = {(uint8_t)peer->ss_family};
    uint64_t key;
    if (peer->ss_family == AF_INET6) {
        const struct in6_addr *a = &((const struct sockaddr_in6 *)(const void *)peer)->sin6_addr;
        bool v4 = IN6_IS_ADDR_V4MAPPED(a);
        bytes[0] = v4 ? AF_INET : AF_INET6;
        memcpy(bytes + 1, a->s6_addr + (v4 ? 12 : 0), v4 ? 4 : 8);
    } else {
        memcpy(bytes + 1, &((const struct sockaddr_in *)(const void *)peer)->sin_addr, 4);
    }
    crypto_shorthash((unsigned char *)&key, bytes, sizeof bytes, g->key);
    return key ? key : 1;
}

/* Rather a free place than an unknown address, rather that than a known one, and of equals the one not
 * seen for longest. Addresses that strangers are here from stay. */
static bool is_better_victim(const struct address *a, const struct address *b) {
    if (a->present || !b) return !a->present;
    if (!a->key || !b->key) return !a->key;
    if (a->known != b->known) return b->known;
    return a->bucket.at_ms < b->bucket.at_ms;
}

static double rate_of(const struct gate *g, const struct address *a) {
    return (double)g->limits.connects_per_minute * (a->known ? KNOWN_RATE : 1);
}

/* NULL: strangers fill all the places this one could have. */
static struct address *address_of(struct gate *g, uint64_t key, uint64_t now_ms) {
    struct address *set = g->addresses[key % SETS], *victim = NULL;
    for (int i = 0; i < WAYS; i++) {
        if (set[i].key == key) return &set[i];
        if (is_better_victim(&set[i], victim)) victim = &set[i];
    }
    if (!victim) return NULL;
    *victim = (struct address){.key = key};
    victim->bucket = (struct bucket){rate_of(g, victim), now_ms};
    return victim;
}

static bool take_token(struct bucket *b, double full, double per_minute, uint64_t now_ms) {
    b->tokens += per_minute * (double)(now_ms - b->at_ms) / MINUTE_MS;
    if (b->tokens > full) b->tokens = full;
    b->at_ms = now_ms;
    if (b->tokens < 1) return false;
    b->tokens -= 1;
    return true;
}

static bool rates_allow(struct gate *g, struct address *a, uint64_t now_ms) {
    double rate = rate_of(g, a), all = (double)g->limits.connects_per_minute * ALL_UNKNOWN_RATE;
    if (!take_token(&a->bucket, rate, rate, now_ms)) return false;
    if (!g->all_unknown.at_ms) g->all_unknown = (struct bucket){all, now_ms};
    return a->known || take_token(&g->all_unknown, all, all, now_ms);
}

/* ---- places ------------------------------------------------------------------------------------ */

static void leave(struct gate_place *p) {
    struct gate *g = p->gate;
    unlink_place(p);
    link_free(p);
    p->address->present--;
    g->strangers--;
    if (!p->address->known) g->unknown--;
}

enum crowd { IN_ALL, OF_UNKNOWN, OF_ADDRESS };

static bool belongs(const struct gate_place *p, enum crowd crowd, const struct address *a) {
    return crowd == IN_ALL || (crowd == OF_UNKNOWN && !p->address->known) ||
           (crowd == OF_ADDRESS && p->address == a);
}

/* The crowd is as large as it may be: its oldest gives way, if it had time enough to say who it is. */
static bool make_way(struct gate *g, enum crowd crowd, const struct address *a, uint64_t now_ms) {
    struct gate_place *p = g->oldest;
    while (p && !belongs(p, crowd, a)) p = p->next;
    if (!p || now_ms - p->since_ms < GATE_TENURE_MS) return false;
    void (*evict)(void *arg) = p->evict;
    void *arg = p->arg;
    leave(p);
    g->refused++;
    evict(arg);
    return true;
}

static bool fits(struct gate *g, const struct address *a, uint64_t now_ms) {
    uint32_t all = g->limits.strangers_max;
    uint32_t of_address = a->known ? OF_KNOWN_ADDRESS_MAX(all) : OF_UNKNOWN_ADDRESS_MAX(all);
    if (a->present >= of_address && !make_way(g, OF_ADDRESS, a, now_ms)) return false;
    if (!a->known && g->unknown >= UNKNOWN_MAX(all) && !make_way(g, OF_UNKNOWN, a, now_ms))
        return false;
    return g->strangers < all || make_way(g, IN_ALL, a, now_ms);
}

struct gate_place *gate_enter(struct gate *g, const struct sockaddr_storage *peer, uint64_t now_ms,
                              void (*evict)(void *arg), void *arg) {
    struct address *a = address_of(g, address_key(g, peer), now_ms);
    if (!a || !rates_allow(g, a, now_ms) || !fits(g, a, now_ms)) {
        g->refused++;
        return NULL;
    }
    struct gate_place *p = g->free;
    g->free = p->next;
    p->address = a;
    p->since_ms = now_ms;
    p->evict = evict;
    p->arg = arg;
    link_newest(p);
    a->present++;
    g->strangers++;
    if (!a->known) g->unknown++;
    return p;
}

void gate_leave(struct gate_place *p) { leave(p); }

void gate_known(struct gate_place *p) {
    struct address *a = p->address;
    struct gate *g = p->gate;
    leave(p);
    if (a->known) return;
    g->unknown -= a->present; /* others from here count as from a known address now */
    a->known = true;
}

uint32_t gate_take_refused(struct gate *g) {
    uint32_t refused = g->refused;
    g->refused = 0;
    return refused;
}

bool gate_may_tell(struct gate *g, bool of_member, uint64_t now_ms, uint32_t *untold) {
    if (now_ms - g->talk[of_member].since_ms >= (uint64_t)MINUTE_MS) {
        g->talk[of_member].since_ms = now_ms;
        g->talk[of_member].told = 0;
    }
    if (g->talk[of_member].told == GATE_LINES_PER_MINUTE) {
        g->talk[of_member].untold++;
        return false;
    }
    g->talk[of_member].told++;
    *untold = g->talk[of_member].untold;
    g->talk[of_member].untold = 0;
    return true;
}
