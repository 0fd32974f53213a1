/* core_ready.c - contributions are announced, checked and counted; is it time for a plan? */
#include <assert.h>
#include <math.h>
#include <string.h>

#include "coordinator/core_internal.h"

#define LLU(x) ((unsigned long long)(x))

/* ---- READY ---------------------------------------------------------------------------------- */

void core_forget_ready(struct part *p) {
    if (p->present) proto_copy_release(RECORD_ready, &p->msg);
    memset(&p->msg, 0, sizeof p->msg);
    p->present = p->planned = p->dropped = p->lost = false;
    p->unheard = 0;
}

/* The signature may differ: it is of a newer term where the announcement is. */
static bool same_ready(const struct msg_ready *a, const struct msg_ready *b) {
    if (!digest_equal(&a->root, &b->root) || a->round != b->round ||
        a->base_index != b->base_index || a->ranges_count != b->ranges_count ||
        a->samples != b->samples || a->norm != b->norm || a->absmax != b->absmax)
        return false;
    for (uint32_t i = 0; i < a->ranges_count; i++) {
        const struct msg_lease *x = &a->ranges[i], *y = &b->ranges[i];
        if (x->lease != y->lease || x->generation != y->generation || x->start != y->start ||
            x->count != y->count)
            return false;
    }
    return true;
}

/* What a member says of its bytes must be possible; the bytes are checked where they arrive. */
static int check_form(const struct core *c, const struct round *r, const struct msg_ready *msg,
                      struct err *err) {
    double slack = 1 + 1e-5, root_n = sqrt((double)r->elements);
    if (msg->codec != c->outer->contribution_codec)
        return err_set(err, ERR_REFUSED, "codec %u, this run's is %u", msg->codec,
                       c->outer->contribution_codec);
    if (msg->chunks != r->chunks)
        return err_set(err, ERR_REFUSED, "%u chunks, the fragment has %u", msg->chunks, r->chunks);
    if (digest_is_zero(&msg->root))
        return err_set(err, ERR_REFUSED, "the root of its chunks is missing");
    if (!(msg->absmax >= 0) || !(msg->absmax < CORE_ABSMAX_LIMIT) ||
        !(msg->norm >= msg->absmax / slack) || !(msg->norm <= msg->absmax * root_n * slack))
        return err_set(err, ERR_REFUSED,
                       "norm %g and largest value %g of %llu elements are impossible", msg->norm,
                       msg->absmax, LLU(r->elements));
    return 0;
}

static uint64_t credit_of(const struct part *p, uint64_t samples, uint64_t unspent) {
    uint64_t known = p->account + unspent;
    return samples < known ? samples : known;
}

uint64_t core_credit(const struct core *c, const struct round *r, const struct member *m) {
    const struct part *p = core_part(r, m);
    uint64_t unspent = 0;
    for (uint32_t i = 0; i < p->msg.ranges_count; i++)
        unspent += core_unspent(c, m, &p->msg.ranges[i]).count;
    return credit_of(p, p->msg.samples, unspent);
}

static int check_ready(struct core *c, const struct round *r, const struct member *m,
                       const struct msg_ready *msg, struct err *err) {
    uint64_t unspent = 0;
    if (!core_in_good_standing(m))
        return err_set(err, ERR_REFUSED, "this member is in quarantine; ask the operator");
    if (check_form(c, r, msg, err) ||
        core_check_claims(c, m, msg->ranges, msg->ranges_count, &unspent, err))
        return -1;
    if (!credit_of(core_part(r, m), msg->samples, unspent))
        return err_set(err, ERR_REFUSED, "it says %llu samples and claims none that count",
                       LLU(msg->samples));
    return 0;
}

void core_reset_member(struct core *c, const struct round *r, struct member *m, const char *why,
                       struct core_actions *out) {
    struct msg_reset msg = {.fragment = r->fragment, .reason = proto_str(why)};
    if (msg.reason.length > PROTO_TEXT_BYTES_MAX) msg.reason.length = PROTO_TEXT_BYTES_MAX;
    core_complain(c, out, CORE_WARNING,
                  "contribution of " WHO " to round %llu of fragment %u refused: %s; it starts "
                  "again",
                  WHO_OF(m), LLU(r->number), r->fragment, why);
    core_send(out, m, MSG_RESET, 0, &msg);
    core_send_leases(c, m, out);
}

static bool is_signed(const struct core *c, const struct member *m, const struct msg_ready *msg) {
    struct proto_buffer bytes;
    proto_buffer_init(&bytes, proto_record_bytes_max(RECORD_ready));
    bool good = !proto_encode(&bytes, RECORD_ready, msg, NULL) &&
                proto_record_verify(&m->key, "ready", &c->run, c->term, bytes.data, bytes.length);
    proto_buffer_release(&bytes);
    return good;
}

/* The round that the READY belongs to. NULL: an old one, which crossed its commit on the way, or
 * one that cannot be, and ended the connection. */
static struct round *round_of(struct core *c, struct member *m, const struct msg_ready *msg,
                              struct core_actions *out) {
    struct round *r = msg->fragment < c->fragments ? &c->rounds[msg->fragment] : NULL;
    const struct state *now = core_state_now(c);
    if (!r || !m->trains) {
        core_close(c, out, m->conn, ERR_PROTOCOL, false, "READY of fragment %u from a member that %s",
                   msg->fragment, r ? "does not train" : "knows fragments that are not there");
        return NULL;
    }
    if (msg->round < r->number || msg->base_index < r->base_index) return NULL;
    if (msg->round == r->number && msg->base_index == r->base_index &&
        msg->state_index >= r->base_index && msg->state_index <= now->index)
        return r;
    core_close(c, out, m->conn, ERR_PROTOCOL, false,
               "READY of round %llu on ledger %llu, state %llu; the newest is %llu on %llu",
               LLU(msg->round), LLU(msg->base_index), LLU(msg->state_index), LLU(r->number),
               LLU(r->base_index));
    return NULL;
}

void core_on_ready(struct core *c, struct member *m, const struct msg_ready *msg, uint64_t now_ms,
                   struct core_actions *out) {
    struct err err;
    if (c->complete) return;
    struct round *r = round_of(c, m, msg, out);
    if (!r || r->last_done) return;
    struct part *p = core_part(r, m);
    if (p->present && same_ready(&p->msg, msg)) {
        p->lost = false;
        if (p->planned && r->phase != ROUND_COLLECT) core_send_plan(c, &r->plan, m, out);
        return;
    }
    if (!is_signed(c, m, msg)) {
        core_close(c, out, m->conn, ERR_PROTOCOL, false, "READY without its sender's signature");
        return;
    }
    if (core_note_root(c, m, msg->state_index, &msg->state_root, now_ms, out) != ROOT_AGREES) return;
    if (p->planned) { /* a member has one: that of the plan is lost, with its disk perhaps */
        if (!p->dropped) core_drop_contributor(c, r, m, out);
        p->lost = true;
        core_reset_member(c, r, m, "another contribution of yours is in the plan", out);
        return;
    }
    core_forget_ready(p);
    if (check_ready(c, r, m, msg, &err)) {
        core_reset_member(c, r, m, err.msg, out);
        return;
    }
    int failed = proto_copy(RECORD_ready, msg, &p->msg, NULL);
    assert(!failed);
    p->present = true;
    p->since_ms = now_ms;
    core_log(out, CORE_INFO,
             WHO " is ready for round %llu of fragment %u: %llu samples, norm %.4g, loss %.4f",
             WHO_OF(m), LLU(r->number), r->fragment, LLU(msg->samples), msg->norm, msg->loss);
}

/* ---- is it time? ---------------------------------------------------------------------------- */

/* Without overlap a trainer that is frozen for one fragment can give nothing to another. */
static bool is_frozen_elsewhere(const struct core *c, const struct round *r,
                                const struct member *m) {
    for (uint32_t f = 0; f < c->fragments && !c->outer->overlap; f++)
        if (f != r->fragment && m->parts[f].present) return true;
    return false;
}

static bool is_claimed(const struct core *c, const struct member *m, const struct lease *l) {
    for (uint32_t f = 0; f < c->fragments; f++) {
        const struct part *p = &m->parts[f];
        for (uint32_t i = 0; p->present && i < p->msg.ranges_count; i++) {
            const struct msg_lease *k = &p->msg.ranges[i];
            if (k->lease == l->id && k->generation == l->generation) return true;
        }
    }
    return false;
}

/* All its leases are claimed by contributions that it announced a while ago: if its trainer died since, nothing is
 * left to contribute to the other fragments with (what of a lease is behind a claim waits for it too), and each
 * would wait for another one's quorum. */
static bool is_spent_out(const struct core *c, const struct member *m) {
    uint64_t newest = 0;
    for (uint32_t f = 0; f < c->fragments; f++)
        if (m->parts[f].present && m->parts[f].since_ms > newest) newest = m->parts[f].since_ms;
    if (c->tick_ms < newest + c->outer->silence_ms_max) return false;
    for (uint32_t i = 0; i < c->lease_count; i++)
        if (c->leases[i].member == m->id && !is_claimed(c, m, &c->leases[i])) return false;
    return true;
}

static bool has_data(const struct core *c, const struct member *m) {
    if (core_samples_free(c) && !core_tokens_reached(c) && !c->closing) return true;
    return m->lease_count && !is_spent_out(c, m);
}

/* A trainer that works on the current state, or could; or whose contribution waits for its connection. */
static bool is_awaited(const struct core *c, const struct round *r, const struct member *m) {
    return m->here && m->trains && core_may_train(m) && !m->catching_up &&
           (!core_part(r, m)->present || core_is_cut(c, m)) && has_data(c, m) && !is_frozen_elsewhere(c, r, m);
}

/* Who was summed nowhere three rounds running counts for the grace window, not for the quorum. */
struct head_count core_count_heads(const struct core *c, const struct round *r) {
    struct head_count n = {0};
    uint32_t reliable = 0;
    for (uint32_t i = 0; i < c->member_count; i++) {
        const struct member *m = &c->members[i];
        n.ready += m->here && core_part(r, m)->present && !core_is_cut(c, m);
        if (!is_awaited(c, r, m)) continue;
        n.waited++;
        reliable += m->missed < CORE_MISSED_ROUNDS_MAX;
    }
    uint32_t reachable = n.ready + reliable;
    n.need = c->outer->quorum < reachable ? c->outer->quorum : reachable;
    if (!n.need) n.need = 1;
    return n;
}

/* Who has done a step may freeze now; said once a round, and again to who reconnects. */
static void tell_due(struct core *c, const struct round *r, struct core_actions *out) {
    struct msg_due msg = {r->fragment, r->number};
    for (uint32_t i = 0; i < c->member_count; i++) {
        struct member *m = &c->members[i];
        if (!m->conn || core_part(r, m)->due_told || !is_awaited(c, r, m)) continue;
        core_part(r, m)->due_told = true;
        core_send(out, m, MSG_DUE, 0, &msg);
    }
}

/* With overlap the window is at most the slack: later the result would come too late to be mixed. */
static uint64_t grace_ms(const struct core *c) {
    double slack = c->outer->overlap * core_step_ms(c);
    return slack > 0 && slack < c->outer->grace_ms ? (uint64_t)slack : c->outer->grace_ms;
}

void core_try_plan(struct core *c, struct round *r, uint64_t now_ms, struct core_actions *out) {
    if (r->phase != ROUND_COLLECT || c->paused || c->complete || now_ms < c->hold_until_ms) return;
    struct head_count n = core_count_heads(c, r);
    if (c->closing) n.need = 1; /* the last round takes what is ready */
    if (n.need > n.ready) {
        r->quorum_reached = false;
        return;
    }
    if (!r->quorum_reached) {
        r->quorum_reached = true;
        r->quorum_ms = now_ms;
    }
    if (n.waited && !c->closing) {
        tell_due(c, r, out);
        if (now_ms - r->quorum_ms < grace_ms(c)) return;
    }
    core_make_plan(c, r, false, now_ms, out);
}
