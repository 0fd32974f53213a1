/* core_members.c - who is here: connections, enrolment, HELLO. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

#define LLU(x) ((unsigned long long)(x))

/* ---- connections ---------------------------------------------------------------------------- */

struct conn *core_conn(const struct core *c, uint64_t id) {
    for (uint32_t i = 0; i < c->conn_count; i++)
        if (c->conns[i].id == id) return &c->conns[i];
    return NULL;
}

void core_forget_conn(struct core *c, uint64_t id) {
    struct conn *k = core_conn(c, id);
    if (!k) return;
    if (k->member && k->member->conn == id) {
        k->member->conn = 0;
        k->member->closed_ms = c->tick_ms;
    }
    if (k->showing) core_forget_takeover(c, id);
    uint32_t i = (uint32_t)(k - c->conns);
    memmove(k, k + 1, (c->conn_count - i - 1) * sizeof *k);
    c->conn_count--;
}

static struct member *member_by_key(const struct core *c, const struct proto_key *key) {
    for (uint32_t i = 0; i < c->member_count; i++)
        if (!memcmp(&c->members[i].key, key, sizeof *key)) return &c->members[i];
    return NULL;
}

void core_on_opened(struct core *c, const struct core_event *ev, struct core_actions *out) {
    if (c->conn_count >= CORE_CONNECTIONS_MAX) {
        core_close(c, out, ev->conn, ERR_FULL, false, "%u connections are open; try again later",
                   CORE_CONNECTIONS_MAX);
        return;
    }
    c->conns = core_grow32(c->conns, c->conn_count, &c->conn_capacity, sizeof *c->conns);
    struct conn *k = &c->conns[c->conn_count++];
    *k = (struct conn){.id = ev->conn, .key = ev->key, .member = member_by_key(c, &ev->key)};
    memcpy(k->host, ev->host, sizeof k->host);
    k->host[sizeof k->host - 1] = '\0';
    if (k->member && k->member->revoked)
        core_close(c, out, k->id, ERR_REFUSED, true, "member %u was revoked", k->member->id);
    else if (k->member)
        core_emit(out, CORE_ACT_KNOWN)->conn = k->id;
}

/* A reconnect is cheap and common; only silence makes a loss of it, and a plan waits three heartbeats. */
void core_on_closed(struct core *c, uint64_t conn) { core_forget_conn(c, conn); }

/* ---- who can do what ------------------------------------------------------------------------ */

bool core_is_own(const struct core *c, const struct member *m) {
    static const struct proto_key none;
    return memcmp(&c->own_key, &none, sizeof none) && !memcmp(&c->own_key, &m->key, sizeof m->key);
}

struct member *core_own(const struct core *c) {
    struct member *m = member_by_key(c, &c->own_key);
    return m && core_is_own(c, m) && m->conn ? m : NULL;
}

bool core_serves(const struct member *m) {
    return m->here && m->conn && !m->catching_up && core_in_good_standing(m);
}

bool core_is_cut(const struct core *c, const struct member *m) {
    return m->here && !m->conn &&
           c->tick_ms >= m->closed_ms + (uint64_t)CORE_CUT_HEARTBEATS * c->outer->heartbeat_ms;
}

uint32_t core_live_count(const struct core *c) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < c->member_count; i++) n += c->members[i].here;
    return n;
}

bool core_address(const struct member *to, const struct member *target, struct msg_address *out) {
    if (!target->conn || !target->port || target == to) return false;
    *out = (struct msg_address){target->id, proto_str(target->host), target->port};
    return true;
}

/* ---- enrolment ------------------------------------------------------------------------------ */

static void send_roster(const struct core *c, const struct member *m, struct core_actions *out) {
    struct msg_member list[PROTO_MEMBERS_MAX];
    struct msg_roster_body body = {.version = c->roster_version, .members = list};
    for (uint32_t i = 0; i < c->member_count; i++) {
        const struct member *one = &c->members[i];
        if (one->revoked) continue;
        list[body.members_count++] =
            (struct msg_member){one->id, one->key, proto_str(one->name), one->aggregate_only};
    }
    struct proto_buffer bytes;
    proto_buffer_init(&bytes, PROTO_BLOB_BYTES_MAX);
    int failed = proto_encode(&bytes, RECORD_roster_body, &body, NULL);
    assert(!failed);
    struct msg_roster msg = {.body = {bytes.data, (uint32_t)bytes.length}};
    core_send(out, m, MSG_ROSTER, 0, &msg);
    proto_buffer_release(&bytes);
}

void core_send_roster_to_all(struct core *c, struct core_actions *out) {
    for (uint32_t i = 0; i < c->member_count; i++)
        if (c->members[i].conn) send_roster(c, &c->members[i], out);
}

void core_send_ledger_to_all(struct core *c, uint64_t from, struct core_actions *out) {
    for (uint32_t i = 0; i < c->member_count; i++) core_send_ledger(out, &c->members[i], from);
}

/* NULL if this secret lets the stranger in, else why not. */
static const char *why_no_entry(const struct core *c, const struct core_invite *invite) {
    if (!invite->found) return "this invite is unknown here; ask the operator for a new one";
    if (invite->expired) return "this invite has expired; ask the operator for a new one";
    if (!invite->record.uses_left) return "this invite is used up; ask the operator for a new one";
    if (c->member_count >= PROTO_MEMBERS_MAX) return "the run has as many members as it can";
    return NULL;
}

static void enrol(struct core *c, struct conn *k, const struct msg_enrol *msg,
                  const struct core_invite *invite, struct core_actions *out) {
    struct msg_enrolment body = {.member = c->member_count + 1,
                                 .key = k->key,
                                 .name = msg->name,
                                 .aggregate_only =
                                     msg->aggregate_only || invite->record.aggregate_only,
                                 .invite = invite->id};
    struct msg_invite_record record = invite->record;
    struct batch b = {0};
    uint64_t index;
    int failed = core_append(c, &b, LEDGER_ENROLMENT, RECORD_enrolment, &body, &index, NULL);
    assert(!failed);
    record.uses_left--;
    batch_put(&b, CORE_INVITE, invite->id, RECORD_invite_record, &record);
    k->member = core_add_member(c, &body);
    c->roster_version = index;
    core_emit_persist(out, &b);
    core_log(out, CORE_INFO, WHO " enrolled at ledger %llu%s; its invite has %u uses left",
             WHO_OF(k->member), LLU(index),
             body.aggregate_only ? ", aggregate-only" : "", record.uses_left);
    core_emit(out, CORE_ACT_KNOWN)->conn = k->id;
    core_send_ledger_to_all(c, index, out);
    core_send_roster_to_all(c, out);
}

void core_on_enrol(struct core *c, struct conn *k, const struct msg_enrol *msg,
                   const struct core_invite *invite, struct core_actions *out) {
    assert(invite);
    const char *why = k->member ? (invite->found ? NULL : "this invite is unknown here")
                                : why_no_entry(c, invite);
    if (why) {
        core_complain(c, out, CORE_WARNING, "enrolment from %s refused: %s", k->host, why);
        core_close(c, out, k->id, ERR_REFUSED, true, "%s", why);
        return;
    }
    if (!k->member && core_is_behind(c)) {
        core_close(c, out, k->id, ERR_STALE, false,
                   "members may still show newer entries than this store has; come again");
        return;
    }
    if (!k->member) enrol(c, k, msg, invite, out);
    struct msg_enrolled answer = {.member = k->member->id};
    core_send_conn(out, k->id, 0, MSG_ENROLLED, 0, &answer);
}

/* ---- HELLO ---------------------------------------------------------------------------------- */

static bool state_is_current(const struct core *c, const struct msg_hello *msg) {
    const struct state *s = core_state_now(c);
    return msg->has_state && msg->state_index == s->index &&
           (!s->root_known || digest_equal(&s->root, &msg->state_root));
}

/* A copied home directory: two processes with one key would break each other's sessions for ever. */
static bool is_copy(const struct core *c, const struct member *m, const struct msg_hello *msg,
                    uint64_t now_ms) {
    return m->conn && m->instance != msg->instance &&
           now_ms - m->heard_ms < 2ull * c->outer->heartbeat_ms;
}

/* Refusals come before anything changes. */
static bool refuse_hello(struct core *c, struct conn *k, const struct msg_hello *msg,
                         uint64_t now_ms, struct core_actions *out) {
    if (!k->member) { /* in a newer ledger than ours its key may be, which it or others show */
        if (core_is_shown_by_stranger(c, k, msg, now_ms, out)) return true;
        bool final = msg->head_index < c->entry_count && msg->term_max <= c->term &&
                     now_ms - c->start_ms >= 2ull * c->outer->silence_ms_max;
        core_complain(c, out, CORE_WARNING,
                      "HELLO from %s with a key that is not enrolled; refused", k->host);
        core_close(c, out, k->id, ERR_REFUSED, final,
                   "this key is not enrolled; join with an invite");
    } else if (is_copy(c, k->member, msg, now_ms)) {
        core_complain(c, out, CORE_WARNING,
                      WHO " says HELLO from %s while it lives at %s: its home directory runs twice",
                      WHO_OF(k->member), k->host, k->member->host);
        core_close(c, out, k->id, ERR_REFUSED, false,
                   "this home directory runs twice: another process with its key is connected");
    } else if (c->session_counter + 1 >= CORE_SESSIONS_MAX) {
        core_complain(c, out, CORE_ERROR,
                      "no session numbers are left in term %llu: restart the coordinator",
                      LLU(c->term));
        core_close(c, out, k->id, ERR_FULL, false, "no session numbers are left");
    } else {
        return core_is_shown_more(c, k, msg, now_ms, out);
    }
    return true;
}

static void begin_session(struct core *c, struct conn *k, const struct msg_hello *msg,
                          uint64_t now_ms) {
    struct member *m = k->member;
    k->hello = true;
    m->here = true;
    m->left = false;
    m->conn = k->id;
    m->session = c->term << 24 | ++c->session_counter;
    m->instance = msg->instance;
    m->trains = msg->trains && !m->aggregate_only;
    memcpy(m->host, k->host, sizeof m->host);
    m->port = msg->port;
    m->heard_ms = m->progress_ms = now_ms;
    m->beat = (struct msg_heartbeat){.phase = PHASE_IDLE};
    m->has_root = false;
    if (m->given_up >= CORE_GIVEN_UP_MAX) m->given_up = CORE_GIVEN_UP_MAX - 1; /* one more try */
    m->state_index = msg->has_state ? msg->state_index : 0;
    m->donor_count = 0;
    m->catching_up = !core_is_initial(c) && !state_is_current(c, msg);
    /* It says READY again if it still has what it announced; in a plan the old word stands. */
    for (uint32_t f = 0; f < c->fragments; f++) {
        m->parts[f].due_told = false;
        if (!m->parts[f].planned) core_forget_ready(&m->parts[f]);
    }
}

static void send_hello_ack(struct core *c, struct member *m, const struct msg_hello *msg,
                           struct core_actions *out) {
    struct msg_address donors[CORE_DONORS_MAX];
    struct msg_hello_ack ack = {.session = m->session,
                                .head_index = c->entry_count - 1,
                                .settled_index = c->settled_index,
                                .tokens_committed = core_state_now(c)->tokens_committed,
                                .donors = donors};
    if (!state_is_current(c, msg)) ack.donors_count = core_pick_donors(c, m, donors);
    core_send(out, m, MSG_HELLO_ACK, 0, &ack);
    uint64_t from = digest_is_zero(&msg->head_digest) ? 0 : msg->head_index + 1;
    if (from < c->entry_count) core_send_ledger(out, m, from);
    send_roster(c, m, out);
}

static uint32_t first_kept(const struct core *c) {
    return c->state_count > CORE_COMMITS_KEPT ? c->state_count - CORE_COMMITS_KEPT : 0;
}

/* Where the results of rounds are that m has not applied. */
static void tell_holders(const struct core *c, const struct member *m, uint64_t applied,
                         struct core_actions *out) {
    for (uint32_t i = first_kept(c); i < c->state_count; i++)
        if (c->states[i].holder_count && c->states[i].index > applied)
            core_send_holders(c, &c->states[i], m, out);
}

/* A holder is back, perhaps at another address: those who still need its results learn of it. */
static void announce_holder(const struct core *c, const struct member *m,
                            struct core_actions *out) {
    for (uint32_t i = first_kept(c); i < c->state_count; i++) {
        const struct state *s = &c->states[i];
        bool holds = false;
        for (uint32_t j = 0; j < s->holder_count; j++) holds |= s->holders[j] == m->id;
        if (!holds || s->index <= c->settled_index) continue;
        for (uint32_t j = 0; j < c->member_count; j++) {
            const struct member *to = &c->members[j];
            if (to != m && to->conn && !(to->has_root && to->root_index >= s->index))
                core_send_holders(c, s, to, out);
        }
    }
}

/* moved: those who dial it need the new address. */
static void send_plan_again(struct core *c, const struct plan *p, struct member *m, bool moved,
                            struct core_actions *out) {
    if (!core_in_plan(p, m)) return;
    if (moved)
        core_send_plan_to_all(c, p, out);
    else
        core_send_plan(c, p, m, out);
}

static void send_plans(struct core *c, struct member *m, bool moved, struct core_actions *out) {
    for (uint32_t f = 0; f < c->fragments; f++)
        if (c->rounds[f].phase != ROUND_COLLECT)
            send_plan_again(c, &c->rounds[f].plan, m, moved, out);
    if (c->resum.plan.resum) send_plan_again(c, &c->resum.plan, m, moved, out);
}

/* It worked on while it was away, perhaps: what of its samples nobody else has, it keeps. */
static void take_back_leases(struct core *c, struct member *m, struct core_actions *out) {
    if (!m->trains || !core_may_train(m)) return;
    uint64_t samples = core_take_back_leases(c, m);
    if (samples)
        core_log(out, CORE_INFO, WHO " is back, and gets its %llu samples again", WHO_OF(m),
                 LLU(samples));
}

void core_on_hello(struct core *c, struct conn *k, const struct msg_hello *msg, uint64_t now_ms,
                   struct core_actions *out) {
    if (refuse_hello(c, k, msg, now_ms, out)) return;
    struct member *m = k->member;
    uint64_t conn = k->id;
    if (m->conn)
        core_close(c, out, m->conn, ERR_STALE, false,
                   "replaced by a newer connection of the same key");
    k = core_conn(c, conn); /* closing the other one moved the list */
    assert(k);
    bool moved = m->port != msg->port || strcmp(m->host, k->host) != 0;
    begin_session(c, k, msg, now_ms);
    core_log(out, CORE_INFO, WHO " connected from %s, session %llu, %s%s%s", WHO_OF(m), m->host,
             LLU(m->session), m->trains ? "trains" : "aggregates only",
             m->catching_up ? ", catches up first" : "", m->quarantined ? ", in quarantine" : "");
    send_hello_ack(c, m, msg, out);
    tell_holders(c, m, msg->has_state ? msg->state_index : 0, out);
    announce_holder(c, m, out);
    if (msg->has_state) core_note_root(c, m, msg->state_index, &msg->state_root, now_ms, out);
    const struct state *s = core_state_now(c);
    if (m->catching_up && s->root_known) {
        struct msg_root root = {s->index, s->root};
        core_send(out, m, MSG_ROOT, 0, &root);
    }
    take_back_leases(c, m, out);
    core_send_leases(c, m, out);
    send_plans(c, m, moved, out);
    if (core_is_own(c, m) && c->checkpoint_writing) { /* its writer may have died with it */
        c->checkpoint_due = c->checkpoint_writing;
        c->checkpoint_writing = 0;
        core_share_end(c, out); /* one that lives goes on alone */
    }
}
