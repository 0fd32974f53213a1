/* core_roots.c - who has which state: roots are compared, rounds settle, donors are named,
 * checkpoints are written, and the run ends. */
#include <assert.h>
#include <string.h>

#include "ckpt/ckpt.h"
#include "coordinator/core_internal.h"

struct state *core_find_state(const struct core *c, uint64_t index) {
    uint32_t low = 0, high = c->state_count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (c->states[middle].index < index)
            low = middle + 1;
        else
            high = middle;
    }
    return low < c->state_count && c->states[low].index == index ? &c->states[low] : NULL;
}

/* The newest state whose root is known; NULL before anybody told one. */
static const struct state *newest_known(const struct core *c) {
    for (uint32_t i = c->state_count; i-- > 0;)
        if (c->states[i].root_known) return &c->states[i];
    return NULL;
}

/* ---- donors --------------------------------------------------------------------------------- */

static bool can_donate(const struct member *m) { return core_serves(m) && m->port && m->has_root; }

/* Newest states first would be best; that all donors apply every commit soon makes ids do. */
uint32_t core_pick_donors(const struct core *c, struct member *m, struct msg_address *list) {
    m->donor_count = 0;
    for (uint32_t i = 0; i < c->member_count && m->donor_count < CORE_DONORS_MAX; i++) {
        const struct member *donor = &c->members[i];
        if (donor == m || !can_donate(donor) || !core_address(m, donor, &list[m->donor_count]))
            continue;
        m->donors[m->donor_count++] = donor->id;
    }
    return m->donor_count;
}

void core_send_resync(struct core *c, struct member *m, struct core_actions *out) {
    const struct state *s = newest_known(c);
    struct msg_address donors[CORE_DONORS_MAX];
    if (!s) return;
    struct msg_resync msg = {.index = s->index,
                             .root = s->root,
                             .donors = donors,
                             .donors_count = core_pick_donors(c, m, donors)};
    m->catching_up = true;
    core_send(out, m, MSG_RESYNC, 0, &msg);
}

static bool has_donor_left(const struct core *c, const struct member *m) {
    for (uint32_t i = 0; i < m->donor_count; i++)
        if (can_donate(core_member(c, m->donors[i]))) return true;
    return false;
}

void core_renew_donors(struct core *c, struct core_actions *out) {
    if (core_round(c) == 0) return; /* everybody makes the initial state for himself */
    for (uint32_t i = 0; i < c->member_count; i++) {
        struct member *m = &c->members[i];
        struct msg_address donors[CORE_DONORS_MAX];
        if (!m->conn || !m->catching_up || has_donor_left(c, m)) continue;
        if (core_pick_donors(c, m, donors)) core_send_resync(c, m, out);
    }
}

/* ---- roots ---------------------------------------------------------------------------------- */

static void report_mismatch(struct core *c, struct member *m, const struct state *s,
                            const struct digest *root, struct core_actions *out) {
    char shown[DIGEST_HEX_BYTES], right[DIGEST_HEX_BYTES];
    digest_hex(root, shown);
    digest_hex(&s->root, right);
    c->root_mismatches++;
    m->has_root = false;
    core_complain(c, out, CORE_ERROR,
                  "state at ledger %llu: " WHO " has root %.16s, member %u said %.16s; it must "
                  "check every chunk and catch up",
                  (unsigned long long)s->index, WHO_OF(m), shown, s->reference, right);
    core_send_resync(c, m, out);
}

/* The own node computes beside us and has no reason to lie: as long as the ledger does not name
 * the root, its word replaces that of whoever was first. */
static void overrule(struct core *c, struct member *own, struct state *s, const struct digest *root,
                     struct core_actions *out) {
    core_log(
        out, CORE_ERROR,
        "state at ledger %llu: the root of member %u is not that of the coordinator's own node, "
        "which is taken as right",
        (unsigned long long)s->index, s->reference);
    s->root = *root;
    s->reference = own->id;
    if (c->phase == CORE_REDUCE) { /* its contributions stand on the wrong state */
        core_forget_reports(c);
        c->contributor_count = 0;
        c->phase = CORE_TRAIN;
    }
    for (uint32_t i = 0; i < c->member_count; i++) core_forget_ready(&c->members[i]);
    struct batch b = {0};
    core_return_leases(c, &b);
    core_emit_persist(out, &b);
    for (uint32_t i = 0; i < c->member_count; i++) {
        struct member *m = &c->members[i];
        if (m != own && m->has_root && m->root_index == s->index && !digest_equal(&m->root, root)) {
            struct digest shown = m->root;
            report_mismatch(c, m, s, &shown, out);
        }
    }
}

/* Members that catch up wait for the root of the newest state. */
static void tell_root(struct core *c, const struct state *s, struct core_actions *out) {
    struct msg_root msg = {s->index, s->root};
    for (uint32_t i = 0; i < c->member_count; i++)
        if (c->members[i].catching_up) core_send(out, &c->members[i], MSG_ROOT, 0, &msg);
}

enum root_verdict core_note_root(struct core *c, struct member *m, uint64_t index,
                                 const struct digest *root, struct core_actions *out) {
    struct state *s = core_find_state(c, index);
    bool news = s && !s->root_known, is_newest = s == core_state_now(c);
    if (!s) return ROOT_OF_NOTHING;
    if (news) {
        s->root = *root;
        s->root_known = true;
        s->reference = m->id;
    } else if (!digest_equal(&s->root, root)) {
        if (s->root_fixed || !core_is_own(c, m) || s->reference == m->id) {
            report_mismatch(c, m, s, root, out);
            return ROOT_DIFFERS;
        }
        overrule(c, m, s, root, out);
    }
    if (!m->has_root || index >= m->root_index) {
        m->has_root = true;
        m->root_index = index;
        m->root = *root;
    }
    if (is_newest) m->catching_up = false;
    if (news && is_newest) tell_root(c, s, out);
    core_settle(c);
    return ROOT_AGREES;
}

void core_on_root(struct core *c, struct member *m, const struct msg_root *msg,
                  struct core_actions *out) {
    if (core_note_root(c, m, msg->index, &msg->root, out) == ROOT_OF_NOTHING)
        core_complain(c, out, CORE_WARNING,
                      WHO " shows a root for ledger %llu, which is no commit; ignored", WHO_OF(m),
                      (unsigned long long)msg->index);
}

/* Settled is what every live member has applied: nobody will ask for its bytes any more. */
void core_settle(struct core *c) {
    uint64_t lowest = core_state_now(c)->index;
    uint32_t live = 0;
    for (uint32_t i = 0; i < c->member_count; i++) {
        const struct member *m = &c->members[i];
        if (!m->here) continue;
        if (!m->has_root) return;
        if (m->root_index < lowest) lowest = m->root_index;
        live++;
    }
    if (live && lowest > c->settled_index) c->settled_index = lowest;
}

/* ---- checkpoints ---------------------------------------------------------------------------- */

static bool has_checkpoints(const struct core *c) { return c->genesis.checkpoint_url.length > 0; }

void core_checkpoint_after_commit(struct core *c, struct core_actions *out) {
    uint32_t every = c->outer->checkpoint_rounds;
    if (!has_checkpoints(c) || !every || core_round(c) % every) return;
    if (core_own(c))
        c->checkpoint_due = core_state_now(c)->index;
    else
        core_log(out, CORE_WARNING,
                 "the checkpoint of round %llu is skipped: the coordinator's own node is not "
                 "connected",
                 (unsigned long long)core_round(c) - 1);
}

static int checkpoint_url(const struct core *c, uint64_t index, char out[PROTO_URL_BYTES_MAX + 1],
                          struct err *err) {
    char store[PROTO_URL_BYTES_MAX + 1];
    proto_str_copy(c->genesis.checkpoint_url, store, sizeof store);
    return ckpt_url(store, index, out, err);
}

/* Ask for the checkpoint that is due, when the own node stands exactly at the newest commit: the
 * counters that go with it are of that moment. */
void core_try_checkpoint(struct core *c, struct core_actions *out) {
    const struct state *s = core_state_now(c);
    const struct member *own = core_own(c);
    if (!c->checkpoint_due || s->index < c->checkpoint_due || c->checkpoint_writing) return;
    if (!own || !own->has_root || own->root_index != s->index ||
        c->tick_ms < c->checkpoint_retry_ms)
        return;
    struct err err;
    char url[PROTO_URL_BYTES_MAX + 1];
    if (c->spent.count > PROTO_CHUNKS_MAX || checkpoint_url(c, s->index, url, &err)) {
        core_log(out, CORE_ERROR, "no checkpoint of ledger %llu: %s", (unsigned long long)s->index,
                 c->spent.count > PROTO_CHUNKS_MAX ? "its list of spent samples has too many gaps"
                                                   : err.msg);
        c->checkpoint_due = 0;
        return;
    }
    struct msg_checkpoint_write msg = {.index = s->index,
                                       .root = s->root,
                                       .url = proto_str(url),
                                       .round = core_round(c),
                                       .tokens_committed = s->tokens_committed,
                                       .spent = c->spent.list,
                                       .spent_count = c->spent.count};
    core_log(out, CORE_INFO, "checkpoint of ledger %llu begins", (unsigned long long)s->index);
    core_send(out, own, MSG_CHECKPOINT_WRITE, 0, &msg);
    c->checkpoint_writing = s->index;
    c->checkpoint_due = 0;
}

/* The state a checkpoint message of the own node is about; NULL if it is nobody's business. */
static const struct state *state_of_checkpoint(struct core *c, struct member *m, uint64_t index,
                                               const char *what, struct core_actions *out) {
    if (!core_is_own(c, m)) {
        core_close(c, out, m->conn, ERR_PROTOCOL, false,
                   "%s from a member that was not asked to write one", what);
        return NULL;
    }
    const struct state *s = index ? core_find_state(c, index) : NULL;
    if (s && s->root_known) return s;
    core_complain(c, out, CORE_WARNING, "%s for ledger %llu, which is no commit; ignored", what,
                  (unsigned long long)index);
    return NULL;
}

void core_on_checkpoint_sign(struct core *c, struct member *m,
                             const struct msg_checkpoint_sign *msg, struct core_actions *out) {
    if (!state_of_checkpoint(c, m, msg->index, "CHECKPOINT_SIGN", out)) return;
    core_emit_sign(out, m, msg);
}

#define WHY_SHOWN 150 /* of a reason that is longer, the end: it has the cause, the rest is a path */

static void checkpoint_failed(struct core *c, const struct msg_checkpoint_done *msg,
                              uint64_t now_ms, struct core_actions *out) {
    char why[PROTO_TEXT_BYTES_MAX + 1];
    bool again = c->phase == CORE_COMPLETE && ++c->checkpoint_tries < CORE_CHECKPOINT_TRIES_MAX;
    proto_str_copy(msg->text, why, sizeof why);
    size_t length = strlen(why), cut = length > WHY_SHOWN ? length - WHY_SHOWN : 0;
    core_log(out, CORE_ERROR, "checkpoint of ledger %llu failed: %s%s; %s",
             (unsigned long long)msg->index, cut ? "..." : "", why + cut,
             again                       ? "tried again soon"
             : c->phase == CORE_COMPLETE ? "given up"
                                         : "the next one is written as planned");
    if (c->phase == CORE_COMPLETE) c->checkpoint_due = again ? core_state_now(c)->index : 0;
    c->checkpoint_retry_ms = now_ms + c->outer->silence_ms_max;
}

void core_on_checkpoint_done(struct core *c, struct member *m,
                             const struct msg_checkpoint_done *msg, uint64_t now_ms,
                             struct core_actions *out) {
    const struct state *s = state_of_checkpoint(c, m, msg->index, "CHECKPOINT_DONE", out);
    char url[PROTO_URL_BYTES_MAX + 1];
    if (!s) return;
    if (c->checkpoint_writing == msg->index) c->checkpoint_writing = 0;
    if (!msg->written) {
        checkpoint_failed(c, msg, now_ms, out);
        return;
    }
    if (msg->index <= c->checkpoint_last || checkpoint_url(c, msg->index, url, NULL))
        return; /* said twice */
    struct msg_checkpoint body = {.at_index = s->index,
                                  .state_root = s->root,
                                  .url = proto_str(url),
                                  .manifest = msg->manifest,
                                  .tokens_committed = s->tokens_committed};
    struct batch b = {0};
    uint64_t index;
    int failed = core_append(c, &b, LEDGER_CHECKPOINT, RECORD_checkpoint, &body, &index, NULL);
    assert(!failed);
    c->checkpoint_last = msg->index;
    core_emit_persist(out, &b);
    core_log(out, CORE_INFO, "checkpoint of ledger %llu is published: %.160s",
             (unsigned long long)s->index, url);
    for (uint32_t i = 0; i < c->member_count; i++) core_send_ledger(out, &c->members[i], index);
}

/* ---- the end -------------------------------------------------------------------------------- */

static void complete(struct core *c, uint64_t now_ms, struct core_actions *out) {
    const struct state *s = core_state_now(c);
    c->phase = CORE_COMPLETE;
    c->complete_ms = now_ms;
    bool wanted = has_checkpoints(c) && s->index && c->checkpoint_last != s->index;
    c->checkpoint_due = wanted && c->checkpoint_writing != s->index ? s->index : 0;
    for (uint32_t i = 0; i < c->member_count; i++) core_forget_ready(&c->members[i]);
    core_log(out, CORE_INFO, "the run is complete: %llu rounds, %llu tokens, %llu of %llu samples",
             (unsigned long long)core_round(c), (unsigned long long)s->tokens_committed,
             (unsigned long long)c->spent.total, (unsigned long long)c->samples_total);
}

/* Members are let go when the last checkpoint is published, or when our own node, which writes it,
 * has been away for long; it still writes it when it comes back. */
static void finish_last_checkpoint(struct core *c, uint64_t now_ms, struct core_actions *out) {
    core_try_checkpoint(c, out);
    bool open = c->checkpoint_due || c->checkpoint_writing;
    bool away = open && !core_own(c) && now_ms - c->complete_ms >= c->outer->silence_ms_max;
    if (away && !c->finished)
        core_log(out, CORE_WARNING,
                 "the last checkpoint waits: the coordinator's own node is not connected");
    if (!open || away) c->finished = true;
}

/* Nothing more to do for the run: it has the last state, or nobody is left who could give it. Our
 * own node stays, for those who come late. */
static bool may_leave(struct core *c, struct member *m) {
    struct msg_address donors[CORE_DONORS_MAX];
    if (!m->conn || core_is_own(c, m)) return false;
    if (m->has_root && m->root_index == core_state_now(c)->index) return true;
    return m->catching_up && core_pick_donors(c, m, donors) == 0;
}

void core_check_complete(struct core *c, uint64_t now_ms, struct core_actions *out) {
    if (!c->started) return;
    if (c->phase == CORE_TRAIN && (core_tokens_reached(c) || core_data_exhausted(c)))
        complete(c, now_ms, out);
    if (c->phase != CORE_COMPLETE) {
        core_try_checkpoint(c, out);
        return;
    }
    finish_last_checkpoint(c, now_ms, out);
    for (uint32_t i = 0; i < c->member_count && c->finished; i++) {
        struct member *m = &c->members[i];
        if (!may_leave(c, m)) continue;
        m->here = false;
        bool current = m->has_root && m->root_index == core_state_now(c)->index;
        core_close(c, out, m->conn, ERR_NONE, true,
                   current ? "run complete"
                           : "run complete; its last state is in the newest checkpoint");
    }
}
