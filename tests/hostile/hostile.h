/* hostile.h - a client that breaks the rules on purpose, for tests/integration/hostile.sh. It talks to
 * running processes over plain sockets and OpenSSL, because proto/channel sends nothing wrong.
 *
 *   link.c          one connection: bytes out, frames in, and why it ended
 *   strangers.c     who is no member: no TLS, wrong TLS, silence, a thousand connections
 *   frames.c        broken frames, on the coordinator's port and on a node's
 *   members.c       an enrolled member that says what it must not
 *   contribution.c  an enrolled member whose contribution is wrong
 *   main.c          the command line
 *
 * An attack ends with 0 when the other side did what it should (as far as it can be seen from here:
 * most is in its log), and prints the last thing it heard. */
#ifndef INTELLECT_HOSTILE_H
#define INTELLECT_HOSTILE_H

#include <openssl/ssl.h>

#include "proto/proto.h"

#define PATIENCE_MS 15000 /* nobody is left without an answer for longer */

/* Whom to attack, and as whom. */
struct target {
    const char *from; /* our own address, so that the limit per address is ours alone */
    const char *host;
    uint16_t port;
    struct identity id;
    const char *argument; /* the word after the attack's name, or NULL */
};

/* ---- link.c ------------------------------------------------------------------------------------ */

#define MEMBER_OF_ANY_MESSAGE(NAME, record, number) struct msg_##record record;
union any_message {
    PROTO_MESSAGES(MEMBER_OF_ANY_MESSAGE)
};

struct link {
    int fd;
    SSL *ssl; /* NULL: plain TCP */
    bool over;
    char heard[320]; /* the last BYE or RESET, else how the connection ended */
    uint64_t term, session;

    uint8_t *in; /* bytes that came */
    size_t have;
    struct frame frame; /* the last message, valid until the next link_receive() */
    union any_message msg;
    int record; /* its enum proto_record, or -1 */

    void (*on_idle)(void *arg); /* about every IDLE_MS while waiting; NULL */
    void *idle_arg;
    uint64_t idle_ms;
};
#define IDLE_MS 100

uint64_t now_ms(void);
/* TCP alone. */
int link_open(struct link *l, const struct target *t, const char *from, struct err *err);
/* TLS on top; takes over ctx. NULL: what intellect-node would do, as t->id. */
int link_start_tls(struct link *l, const struct target *t, SSL_CTX *ctx, struct err *err);
/* Both. */
int link_dial(struct link *l, const struct target *t, struct err *err);
/* On a node's port: the first word that members expect of each other. */
int link_greet(struct link *l, struct err *err);
void link_close(struct link *l);
/* False: nobody takes them any more. */
bool link_write(struct link *l, const void *bytes, size_t length);
bool link_send(struct link *l, enum proto_type type, uint64_t plan, const void *msg);
/* The type of the next message; 0: none within `ms`, or l->over. Plain links swallow what comes. */
int link_receive(struct link *l, int ms);
/* Wait for one type, passing over others. */
bool link_expect(struct link *l, enum proto_type type);
/* Read until the other side ends the connection. False: it did not within PATIENCE_MS. */
bool link_hear_out(struct link *l);

/* ---- attacks ------------------------------------------------------------------------------------- */

struct attack {
    const char *name;
    int (*run)(const struct target *t, const struct attack *a);
    int kind; /* which of several attacks that share `run` */
};
/* Each list ends with a name that is NULL. */
extern const struct attack stranger_attacks[], frame_attacks[], member_attacks[], contribution_attacks[];

/* Prints "NAME: TEXT". Returns ok ? 0 : 1. */
int verdict(const struct attack *a, bool ok, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* ---- members.c: a member's side of the protocol ----------------------------------------------------- */

struct member {
    const struct target *target;
    struct link link;
    uint8_t *genesis_bytes;
    struct msg_genesis genesis;
    struct digest run;
    uint64_t instance; /* of HELLO; the same each time unless an attack says otherwise */
    struct msg_rate *rates; /* of the heartbeats; NULL */
    uint32_t rate_count;
    uint8_t phase; /* of the heartbeats; PHASE_CATCHING_UP until the root is known */
    uint64_t head, round, base_index, root_index, beat_ms;
    struct digest root;
    struct msg_lease leases[PROTO_LEASES_MAX];
    uint32_t lease_count;
    bool has_plan, leases_came;
    struct msg_plan plan;
    uint64_t plan_number;
    bool quarantined;
    bool has_audit; /* whom to show audit_chunk, since this was last cleared */
    uint32_t audit_chunk;
    char audit_host[PROTO_ADDRESS_BYTES_MAX + 1];
    uint32_t audit_port; /* 0: we were told of none */
    struct msg_lease foreign; /* what somebody else's lease must have left: the newest commit says so */
    uint64_t summed_round; /* 1 + the last round a commit summed this member in */
    uint32_t id;           /* from the ledger */
};

/* Dial and read the WELCOME. */
int member_dial(struct member *m, const struct target *t, struct err *err);
void member_close(struct member *m);
bool member_hello(struct member *m, uint32_t port);
/* Take in what comes until `done` says so, with heartbeats. False: the link ended, or too long. */
bool member_follow(struct member *m, bool (*done)(const struct member *m), int ms);
bool member_is_current(const struct member *m);
bool member_has_plan(const struct member *m);

#endif
