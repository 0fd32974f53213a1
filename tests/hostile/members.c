/* members.c - a member's side of the protocol, just enough of it; and attacks of keys that have got
 * as far as a coordinator's WELCOME, or a node's handshake, and then say what they must not. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tests/hostile/hostile.h"

/* ---- following the run ------------------------------------------------------------------------------ */

int member_dial(struct member *m, const struct target *t, struct err *err) {
    *m = (struct member){.target = t};
    if (link_dial(&m->link, t, err)) return -1;
    if (!link_expect(&m->link, MSG_WELCOME)) return err_set(err, ERR_TIMEOUT, "no WELCOME: %.200s", m->link.heard);
    struct proto_bytes genesis = m->link.msg.welcome.genesis;
    m->link.term = m->link.frame.term;
    m->run = digest_of(genesis.data, genesis.length);
    if (!(m->genesis_bytes = malloc(genesis.length))) return err_set(err, ERR_MEMORY, "no memory");
    memcpy(m->genesis_bytes, genesis.data, genesis.length);
    return proto_decode(m->genesis_bytes, genesis.length, RECORD_genesis, &m->genesis, err);
}

void member_close(struct member *m) {
    link_close(&m->link);
    proto_decoded_release(RECORD_genesis, &m->genesis);
    if (m->has_plan) proto_copy_release(RECORD_plan, &m->plan);
    free(m->genesis_bytes);
}

static void beat(void *arg) {
    struct member *m = arg;
    struct msg_heartbeat msg = {.phase = m->phase, .state_index = m->base_index,
                                .rates = m->rates, .rates_count = m->rate_count};
    link_send(&m->link, MSG_HEARTBEAT, 0, &msg);
}

bool member_hello(struct member *m, uint32_t port) {
    struct msg_hello hello = {.software = proto_str("hostile"), .instance = m->instance, .trains = 1, .port = port,
                              .term_max = m->link.term};
    if (!link_send(&m->link, MSG_HELLO, 0, &hello) || !link_expect(&m->link, MSG_HELLO_ACK)) return false;
    m->link.session = m->link.msg.hello_ack.session;
    m->link.on_idle = beat;
    m->link.idle_arg = m;
    return true;
}

/* A commit makes a new base, whose root is yet to be told. */
static void take_commit(struct member *m, uint64_t index, const struct msg_commit *c) {
    m->round = c->round + 1;
    m->base_index = index;
    m->phase = PHASE_CATCHING_UP;
    for (uint32_t i = 0; i < c->contributors_count; i++)
        for (uint32_t r = 0; c->contributors[i].member == m->id && r < c->summed_count; r++)
            if (c->summed[r].set.length > i / 8 && proto_set_has(c->summed[r].set.data, i))
                m->summed_round = c->round + 1;
    for (uint32_t i = 0; i < c->spent_count; i++)
        if (c->spent[i].member != m->id)
            m->foreign = (struct msg_lease){c->spent[i].lease, c->spent[i].generation,
                                            c->spent[i].start + c->spent[i].count, 1};
}

static void take_entry(struct member *m, const struct msg_entry *e) {
    struct msg_commit commit;
    struct msg_enrolment enrolment;
    struct msg_quarantine quarantine;
    if (e->index < m->head) return;
    m->head = e->index;
    if (e->kind == LEDGER_ENROLMENT && !proto_decode(e->body.data, e->body.length, RECORD_enrolment, &enrolment, NULL))
        if (!memcmp(&enrolment.key, &m->target->id.key, sizeof enrolment.key)) m->id = enrolment.member;
    if (e->kind == LEDGER_QUARANTINE && !proto_decode(e->body.data, e->body.length, RECORD_quarantine, &quarantine, NULL))
        if (quarantine.member == m->id) m->quarantined = !quarantine.lifted;
    if (e->kind == LEDGER_COMMIT && !proto_decode(e->body.data, e->body.length, RECORD_commit, &commit, NULL)) {
        take_commit(m, e->index, &commit);
        proto_decoded_release(RECORD_commit, &commit);
    }
}

static void take_ledger(struct member *m, const struct msg_ledger *msg) {
    struct msg_entry e;
    for (uint32_t i = 0; i < msg->entries_count; i++)
        if (!proto_decode(msg->entries[i].bytes.data, msg->entries[i].bytes.length, RECORD_entry, &e, NULL))
            take_entry(m, &e);
}

bool member_is_current(const struct member *m) {
    return m->root_index == m->base_index && !digest_is_zero(&m->root);
}

bool member_has_plan(const struct member *m) { return m->has_plan && m->plan.round == m->round; }

static void take_root(struct member *m, uint64_t index, const struct digest *root) {
    m->root_index = index;
    m->root = *root;
    if (member_is_current(m)) m->phase = PHASE_IDLE;
}

static void take_plan(struct member *m) {
    if (m->has_plan) proto_copy_release(RECORD_plan, &m->plan);
    m->has_plan = !proto_copy(RECORD_plan, &m->link.msg.plan, &m->plan, NULL);
    m->plan_number = m->link.frame.plan;
}

static void take_leases(struct member *m, const struct msg_leases *msg) {
    m->lease_count = msg->leases_count;
    if (m->lease_count) memcpy(m->leases, msg->leases, m->lease_count * sizeof *m->leases);
    m->leases_came = true;
}

static void take_audit(struct member *m, const struct msg_audit *msg) {
    m->has_audit = true;
    m->audit_chunk = msg->chunk;
    m->audit_port = msg->address_count ? msg->address[0].port : 0;
    if (msg->address_count) proto_str_copy(msg->address[0].host, m->audit_host, sizeof m->audit_host);
}

static void take(struct member *m, int type) {
    const union any_message *msg = &m->link.msg;
    if (type == MSG_LEDGER) take_ledger(m, &msg->ledger);
    if (type == MSG_ROOT) take_root(m, msg->root.index, &msg->root.root);
    if (type == MSG_RESYNC) take_root(m, msg->resync.index, &msg->resync.root);
    if (type == MSG_LEASES) take_leases(m, &msg->leases);
    if (type == MSG_PLAN) take_plan(m);
    if (type == MSG_AUDIT) take_audit(m, &msg->audit);
}

bool member_follow(struct member *m, bool (*done)(const struct member *m), int ms) {
    uint64_t end = now_ms() + (uint64_t)ms;
    while (!done(m) && !m->link.over && now_ms() < end) take(m, link_receive(&m->link, IDLE_MS));
    return done(m);
}

/* ---- enrolment ---------------------------------------------------------------------------------------- */

static int enrol(const struct target *t, const struct attack *a) {
    struct member m;
    struct invite invite;
    struct err err = {0};
    if (!t->argument || invite_parse(t->argument, &invite, &err)) return verdict(a, false, "no invite: %s", err.msg);
    if (member_dial(&m, t, &err)) return verdict(a, false, "%s", err.msg);
    struct msg_enrol msg = {.secret = invite.secret, .name = proto_str("mallory")};
    bool ok = link_send(&m.link, MSG_ENROL, 0, &msg) && link_expect(&m.link, MSG_ENROLLED);
    if (ok) verdict(a, true, "enrolled as member %u", m.link.msg.enrolled.member);
    else verdict(a, false, "%s", m.link.heard);
    member_close(&m);
    return !ok;
}

/* ---- before HELLO, and in place of it -------------------------------------------------------------------- */

enum { READY_FIRST, LEASES_FIRST, HELLO_UNENROLLED, HELLO_NEWER_TERM, HELLO_OTHER_LEDGER };

static void say_first(struct link *l, int kind) {
    struct msg_ready ready = {.chunks = 1, .norm = 1, .absmax = 1};
    struct msg_lease_ask ask = {.samples = 1};
    struct msg_hello hello = {.software = proto_str("hostile"), .trains = 1, .term_max = l->term};
    if (kind == HELLO_NEWER_TERM) hello.term_max += 1000;
    if (kind == HELLO_OTHER_LEDGER) memset(&hello.head_digest, 7, sizeof hello.head_digest);
    if (kind == READY_FIRST) link_send(l, MSG_READY, 0, &ready);
    else if (kind == LEASES_FIRST) link_send(l, MSG_LEASE_ASK, 0, &ask);
    else link_send(l, MSG_HELLO, 0, &hello);
}

static int first_word(const struct target *t, const struct attack *a) {
    struct member m;
    struct err err;
    if (member_dial(&m, t, &err)) return verdict(a, false, "%s", err.msg);
    say_first(&m.link, a->kind);
    bool ok = link_hear_out(&m.link) && !strncmp(m.link.heard, "BYE", 3);
    verdict(a, ok, "%s", m.link.heard);
    member_close(&m);
    return !ok;
}

/* ---- after HELLO --------------------------------------------------------------------------------------- */

enum { SECOND_HELLO, SECOND_ENROL, LEDGER_TO_COORDINATOR, PLAN_TO_COORDINATOR, CHUNK_TO_COORDINATOR, BAD_PHASE,
       FOREIGN_CHECKPOINT };

static void say_wrong(struct link *l, int kind) {
    struct msg_hello hello = {.software = proto_str("hostile"), .term_max = l->term};
    struct msg_enrol msg_enrol = {.name = proto_str("again")};
    struct msg_signed_entry entry = {.bytes = {(const uint8_t *)"forged", 6}};
    struct msg_ledger ledger = {.entries = &entry, .entries_count = 1};
    struct msg_plan plan = {.round = 1};
    struct msg_chunk chunk = {.data = {(const uint8_t *)"forged", 6}};
    struct msg_heartbeat beat_msg = {.phase = 99};
    struct msg_checkpoint_sign sign = {.index = 1, .manifest = {(const uint8_t *)"forged", 6}};
    switch (kind) {
    case SECOND_HELLO: link_send(l, MSG_HELLO, 0, &hello); break;
    case SECOND_ENROL: link_send(l, MSG_ENROL, 0, &msg_enrol); break;
    case LEDGER_TO_COORDINATOR: link_send(l, MSG_LEDGER, 0, &ledger); break;
    case PLAN_TO_COORDINATOR: link_send(l, MSG_PLAN, 0, &plan); break;
    case CHUNK_TO_COORDINATOR: link_send(l, MSG_CHUNK, 0, &chunk); break;
    case BAD_PHASE: link_send(l, MSG_HEARTBEAT, 0, &beat_msg); break;
    default: link_send(l, MSG_CHECKPOINT_SIGN, 0, &sign); break;
    }
}

static int out_of_place(const struct target *t, const struct attack *a) {
    struct member m;
    struct err err;
    if (member_dial(&m, t, &err) || !member_hello(&m, 0)) return verdict(a, false, "no session: %s", m.link.heard);
    m.link.on_idle = NULL;
    say_wrong(&m.link, a->kind);
    bool ok = link_hear_out(&m.link) && !strncmp(m.link.heard, "BYE", 3);
    verdict(a, ok, "%s", m.link.heard);
    member_close(&m);
    return !ok;
}

/* ---- of another term, another session ------------------------------------------------------------------------ */

enum { OTHER_TERM, OTHER_SESSION };

/* Messages of one connection are taken in order: the answer to a HEARTBEAT says that what was asked
 * before it has been dealt with. Returns the LEASES that came before it. */
static uint32_t leases_until_answered(struct member *m, bool *answered) {
    uint32_t leases = 0;
    *answered = false;
    beat(m);
    for (uint64_t end = now_ms() + PATIENCE_MS; now_ms() < end && !m->link.over && !*answered;) {
        int type = link_receive(&m->link, IDLE_MS);
        if (type == MSG_LEASES) take_leases(m, &m->link.msg.leases);
        leases += type == MSG_LEASES;
        *answered = type == MSG_HEARTBEAT_ACK;
    }
    return leases;
}

/* As far as the LEASES that follow HELLO_ACK, and silent from there on. */
static bool say_hello(struct member *m, const struct target *t) {
    struct err err;
    if (member_dial(m, t, &err) || !member_hello(m, 0)) return false;
    m->link.on_idle = NULL;
    return link_expect(&m->link, MSG_LEASES);
}

/* Such a frame is dropped, and nothing else happens: what was asked in it is not answered. */
static int stale(const struct target *t, const struct attack *a) {
    struct member m;
    struct msg_lease_ask ask = {.samples = 100};
    bool answered;
    if (!say_hello(&m, t)) return verdict(a, false, "no session: %s", m.link.heard);
    uint64_t term = m.link.term, session = m.link.session;
    if (a->kind == OTHER_TERM) m.link.term--;
    else m.link.session--;
    bool ok = link_send(&m.link, MSG_LEASE_ASK, 0, &ask);
    m.link.term = term;
    m.link.session = session;
    uint32_t leases = leases_until_answered(&m, &answered);
    ok = ok && leases == 0 && answered;
    verdict(a, ok, "%s, the connection %s", leases ? "answered" : "not answered", answered ? "goes on" : "is dead");
    member_close(&m);
    return !ok;
}

/* ---- floods, lies -------------------------------------------------------------------------------------------- */

/* More asks than anybody answers: what is granted stays within a member's due, and it stays connected. */
static int flood(const struct target *t, const struct attack *a) {
    struct member m;
    struct msg_lease_ask ask = {.samples = 1u << 20};
    bool answered;
    if (!say_hello(&m, t)) return verdict(a, false, "no session: %s", m.link.heard);
    uint32_t asks = t->argument ? (uint32_t)strtoul(t->argument, NULL, 10) : 5000;
    bool ok = true;
    for (uint32_t i = 0; i < asks && ok; i++) ok = link_send(&m.link, MSG_LEASE_ASK, 0, &ask);
    uint32_t answers = leases_until_answered(&m, &answered);
    uint64_t held = 0, due = 2 * (uint64_t)m.genesis.outer->lease_samples;
    for (uint32_t i = 0; i < m.lease_count; i++) held += m.leases[i].count;
    ok = ok && answered && answers < asks / 2 && held > 0 && held <= due;
    verdict(a, ok, "%u asks, %u answered, %llu samples held, at most %llu are due", asks, answers,
            (unsigned long long)held, (unsigned long long)due);
    member_close(&m);
    return !ok;
}

/* A root that nobody else has. The member is told the right one, and to check every chunk. */
static int wrong_root(const struct target *t, const struct attack *a) {
    struct member m;
    struct err err;
    if (member_dial(&m, t, &err) || !member_hello(&m, 0)) return verdict(a, false, "no session: %s", m.link.heard);
    bool ok = member_follow(&m, member_is_current, PATIENCE_MS);
    struct msg_root root = {.index = m.base_index};
    memset(&root.root, 7, sizeof root.root);
    ok = ok && link_send(&m.link, MSG_ROOT, 0, &root) && link_expect(&m.link, MSG_RESYNC);
    verdict(a, ok, ok ? "answered by RESYNC" : "no RESYNC: %s", m.link.heard);
    member_close(&m);
    return !ok;
}

static bool aggregates(const struct member *m) {
    for (uint32_t i = 0; m->has_plan && i < m->plan.shards_count; i++)
        if (m->plan.shards[i].aggregator == m->id) return true;
    return false;
}

/* It says that it sends faster than all others, so that what is summed goes through its hands. */
static int inflate_rates(const struct target *t, const struct attack *a) {
    struct member m;
    struct err err;
    if (member_dial(&m, t, &err) || !member_hello(&m, 9)) return verdict(a, false, "no session: %s", m.link.heard);
    bool ok = member_follow(&m, member_is_current, PATIENCE_MS);
    struct msg_rate rates[2] = {{.member = m.id, .bytes = 1ull << 50, .busy_ms = 1},
                                {.member = UINT32_MAX, .bytes = 1ull << 50, .busy_ms = 1}};
    m.rates = rates;
    m.rate_count = 2;
    ok = ok && !member_follow(&m, aggregates, 5000) && !m.link.over;
    verdict(a, ok, ok ? "nothing is summed by it" : "it was made an aggregator, or: %s", m.link.heard);
    member_close(&m);
    return !ok;
}

/* ---- a copied home directory ------------------------------------------------------------------------------- */

/* HELLO under our key from another process, as a copied home would say it. */
static bool hello_as(struct member *m, const struct target *t, uint64_t instance) {
    struct err err;
    if (member_dial(m, t, &err)) return false;
    m->instance = instance;
    return member_hello(m, 0);
}

/* The second process is refused, and may come back, while the first lives; it is the first's heir. */
static int copied_home(const struct target *t, const struct attack *a) {
    struct member first, second, heir;
    bool answered = false;
    bool ok = hello_as(&first, t, 1);
    bool refused = !hello_as(&second, t, 2) && !strncmp(second.link.heard, "BYE: ", 5);
    leases_until_answered(&first, &answered);
    struct timespec wait = {.tv_sec = 1 + 2 * first.genesis.outer->heartbeat_ms / 1000};
    nanosleep(&wait, NULL);
    bool inherits = hello_as(&heir, t, 2);
    ok = ok && refused && answered && inherits;
    verdict(a, ok, "%s; the first %s; after its silence the second %s", second.link.heard,
            answered ? "lives on" : "is cut off", inherits ? "is let in" : "is not let in");
    member_close(&first);
    member_close(&second);
    member_close(&heir);
    return !ok;
}

/* ---- to a node --------------------------------------------------------------------------------------------------- */

enum { HELLO_TO_NODE, LEDGER_TO_NODE, RESULTS_THAT_CANNOT_BE, STATE_THAT_CANNOT_BE };

static int to_node(const struct target *t, const struct attack *a) {
    struct link l;
    struct err err;
    struct msg_result_get results = {.plan = 3, .chunks = {(const uint8_t *)"\xff\xff\xff\xff\xff\xff\xff\xff", 8}};
    struct msg_state_get state = {.chunks = results.chunks};
    if (link_dial(&l, t, &err) || link_greet(&l, &err)) return verdict(a, false, "%s", err.msg);
    l.term = 1;
    if (a->kind == HELLO_TO_NODE) say_first(&l, HELLO_UNENROLLED);
    else if (a->kind == LEDGER_TO_NODE) say_wrong(&l, LEDGER_TO_COORDINATOR);
    else if (a->kind == RESULTS_THAT_CANNOT_BE) link_send(&l, MSG_RESULT_GET, 4, &results);
    else link_send(&l, MSG_STATE_GET, 0, &state);
    bool ok = link_hear_out(&l);
    verdict(a, ok, "%s", l.heard);
    link_close(&l);
    return !ok;
}

const struct attack member_attacks[] = {
    {"enrol", enrol, 0},
    {"ready-first", first_word, READY_FIRST},
    {"leases-first", first_word, LEASES_FIRST},
    {"hello-unenrolled", first_word, HELLO_UNENROLLED},
    {"hello-newer-term", first_word, HELLO_NEWER_TERM},
    {"hello-other-ledger", first_word, HELLO_OTHER_LEDGER},
    {"second-hello", out_of_place, SECOND_HELLO},
    {"second-enrol", out_of_place, SECOND_ENROL},
    {"ledger", out_of_place, LEDGER_TO_COORDINATOR},
    {"plan", out_of_place, PLAN_TO_COORDINATOR},
    {"chunk", out_of_place, CHUNK_TO_COORDINATOR},
    {"bad-phase", out_of_place, BAD_PHASE},
    {"foreign-checkpoint", out_of_place, FOREIGN_CHECKPOINT},
    {"other-term", stale, OTHER_TERM},
    {"other-session", stale, OTHER_SESSION},
    {"lease-flood", flood, 0},
    {"wrong-root", wrong_root, 0},
    {"inflated-rates", inflate_rates, 0},
    {"copied-home", copied_home, 0},
    {"node-hello", to_node, HELLO_TO_NODE},
    {"node-ledger", to_node, LEDGER_TO_NODE},
    {"node-results", to_node, RESULTS_THAT_CANNOT_BE},
    {"node-state", to_node, STATE_THAT_CANNOT_BE},
    {NULL, NULL, 0},
};
