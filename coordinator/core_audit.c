/* core_audit.c - some chunks are summed once more by somebody who had no part in them: a few drawn
 * after the reports, those in which two reports differ, those whose contributor was accused. The sum
 * is exact, so one differing leaf proves its signer wrong - if the auditor can be believed: our own
 * node can, another member needs a second one that finds the same. */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

#define LLU(x) ((unsigned long long)(x))

static const char *const causes[] = {"drawn", "reports differ", "accused"};

/* ---- who audits ----------------------------------------------------------------------------- */

/* Contributors dial it, so it must be reachable; nobody judges himself or what he holds. */
static bool may_audit(const struct core *c, const struct round *r, const struct audit *a,
                      const struct member *m) {
    const struct shard *s = core_shard_of(&r->plan, a->chunk);
    bool involved = s->where.aggregator == m->id || m->id == a->accused || m->id == a->accuser ||
                    m->id == a->first || (s->where.holder == m->id && !core_is_own(c, m));
    return core_serves(m) && m->port && !m->distrusted && !involved;
}

/* Our own node if it can; else in turn, by chance as far as members know. */
static struct member *pick_auditor(const struct core *c, const struct round *r,
                                   const struct audit *a) {
    struct member *own = core_own(c);
    uint32_t n = 0, turn;
    if (own && may_audit(c, r, a, own)) return own;
    for (uint32_t i = 0; i < c->member_count; i++) n += may_audit(c, r, a, &c->members[i]);
    if (!n) return NULL;
    memcpy(&turn, c->seed.b, sizeof turn);
    turn = (turn + (uint32_t)r->plan.number + a->chunk + a->first) % n;
    for (uint32_t i = 0; i < c->member_count; i++)
        if (may_audit(c, r, a, &c->members[i]) && turn-- == 0) return &c->members[i];
    return NULL;
}

/* To the auditor, and to those who must send it their chunk. An auditor that contributes has it. */
static void send_audit(struct core *c, const struct round *r, const struct audit *a,
                       struct core_actions *out) {
    struct member *auditor = core_member(c, a->auditor);
    struct msg_address address;
    struct msg_audit msg = {.fragment = r->fragment,
                            .round = r->number,
                            .chunk = a->chunk,
                            .auditor = a->auditor,
                            .set = {a->set, (r->plan.contributor_count + 7) / 8},
                            .address = &address};
    if (!core_in_plan(&r->plan, auditor)) core_send_plan(c, &r->plan, auditor, out); /* weights, grid */
    core_send(out, auditor, MSG_AUDIT, r->plan.number, &msg);
    for (uint32_t i = 0; i < r->plan.contributor_count; i++) {
        const struct member *m = core_member(c, r->plan.contributors[i].member);
        if (!proto_set_has(a->set, i) || m == auditor) continue;
        msg.address_count = core_address(m, auditor, &address);
        core_send(out, m, MSG_AUDIT, r->plan.number, &msg);
    }
}

static bool begin_audit(struct core *c, struct round *r, struct audit *a, uint64_t now_ms,
                        struct core_actions *out) {
    struct member *auditor = pick_auditor(c, r, a);
    if (!auditor) return false;
    a->auditor = auditor->id;
    a->answered = false;
    a->deadline_ms = now_ms + c->outer->silence_ms_max;
    core_log(out, CORE_INFO, "plan %llu: " WHO " sums chunk %u of fragment %u once more (%s)",
             LLU(r->plan.number), WHO_OF(auditor), a->chunk, r->fragment, causes[a->cause]);
    send_audit(c, r, a, out);
    c->audits++;
    return true;
}

static struct audit *add_audit(struct round *r, const struct audit *a) {
    if (r->audit_count == PROTO_AUDITS_MAX) return NULL;
    r->audits[r->audit_count] = *a;
    return &r->audits[r->audit_count++];
}

static void end_audit(struct round *r, struct audit *a) { *a = r->audits[--r->audit_count]; }

bool core_audits_open(const struct round *r) { return r->audit_count > 0; }

/* ---- drawing -------------------------------------------------------------------------------- */

/* Nobody can know it before the reports are in: it follows from them, and from a secret of ours. */
static struct digest draw_seed(const struct core *c, const struct round *r) {
    struct digest_stream s;
    digest_stream_init(&s);
    digest_stream_update(&s, c->seed.b, sizeof c->seed.b);
    digest_stream_update(&s, &r->plan.number, sizeof r->plan.number);
    for (uint32_t i = 0; i < r->plan.shard_count; i++)
        for (uint32_t j = 0; j < r->plan.shards[i].where.count; j++)
            digest_stream_update(&s, r->plan.shards[i].reports[BY_AGGREGATOR].results[j].digest.b,
                                 PROTO_DIGEST_BYTES);
    return digest_stream_final(&s);
}

static const struct msg_summed *set_of(const struct round *r, uint32_t chunk) {
    const struct shard *s = core_shard_of(&r->plan, chunk);
    const struct msg_shard_report *report = &s->reports[BY_AGGREGATOR];
    return core_summed_at(report->summed, report->summed_count, s->where.first, chunk);
}

/* One audit a chunk: a report names no more than the chunk. */
static bool is_audited(const struct round *r, uint32_t chunk) {
    for (uint32_t i = 0; i < r->audit_count; i++)
        if (r->audits[i].chunk == chunk) return true;
    return false;
}

bool core_draw_audits(struct core *c, struct round *r, uint64_t now_ms, struct core_actions *out) {
    uint32_t wanted = c->outer->audits < r->chunks ? c->outer->audits : r->chunks, begun = 0;
    struct digest d = draw_seed(c, r);
    for (uint32_t i = 0; i < wanted && r->audit_count < r->chunks; i++) {
        uint64_t number;
        d = digest_of(d.b, sizeof d.b);
        memcpy(&number, d.b, sizeof number);
        uint32_t chunk = (uint32_t)(number % r->chunks);
        while (is_audited(r, chunk)) chunk = (chunk + 1) % r->chunks;
        struct audit *a = add_audit(r, &(struct audit){.cause = AUDIT_DRAWN, .chunk = chunk});
        if (!a) break;
        const struct msg_summed *run = set_of(r, chunk);
        if (run->set.length) memcpy(a->set, run->set.data, run->set.length);
        if (begin_audit(c, r, a, now_ms, out))
            begun++;
        else
            end_audit(r, a); /* nobody is free to judge */
    }
    return begun > 0;
}

bool core_audit_unequal(struct core *c, struct round *r, uint32_t chunk, uint64_t now_ms,
                        struct core_actions *out) {
    const struct msg_summed *run = set_of(r, chunk);
    struct audit *a = add_audit(r, &(struct audit){.cause = AUDIT_UNEQUAL, .chunk = chunk});
    if (!a) return false;
    if (run->set.length) memcpy(a->set, run->set.data, run->set.length);
    if (run->weight && begin_audit(c, r, a, now_ms, out)) {
        r->phase = ROUND_AUDIT;
        return true;
    }
    end_audit(r, a);
    return false;
}

/* ---- verdicts ------------------------------------------------------------------------------- */

static const struct msg_shard_report *report_on(const struct round *r, const struct audit *a) {
    return &core_shard_of(&r->plan, a->chunk)->reports[BY_AGGREGATOR];
}

static bool agrees_with_aggregator(const struct round *r, const struct audit *a) {
    const struct shard *s = core_shard_of(&r->plan, a->chunk);
    return !a->culprit &&
           digest_equal(&a->leaf, &report_on(r, a)->results[a->chunk - s->where.first].digest);
}

/* The aggregator's own signed word, or the contributor's, is the proof. */
static void convict(struct core *c, struct round *r, const struct audit *a, uint64_t now_ms,
                    struct core_actions *out) {
    char why[PROTO_TEXT_BYTES_MAX + 1];
    const struct shard *s = core_shard_of(&r->plan, a->chunk);
    struct member *m = core_member(c, a->culprit ? a->culprit : s->where.aggregator);
    snprintf(why, sizeof why, "%s chunk %u, round %llu of fragment %u",
             a->culprit ? "its bytes are not what it announced:" : "it summed wrongly:", a->chunk,
             LLU(r->number), r->fragment);
    c->audits_failed++;
    if (a->culprit)
        core_quarantine(c, m, MSG_READY, &core_part(r, m)->msg, why, out);
    else
        core_quarantine(c, m, MSG_SHARD_REPORT, report_on(r, a), why, out);
    if (a->cause == AUDIT_ACCUSED) return; /* it is in no chunk; the round goes on without it */
    core_replan(c, r, now_ms, out);
    core_send_leases(c, m, out); /* they went back now that no plan names it */
}

/* Reports that differ though the aggregator's leaf is right: it may have told the holder another
 * one, or the holder lies. Neither is proven, neither is asked again in this round. */
static void avoid_both(struct core *c, struct round *r, const struct audit *a, uint64_t now_ms,
                       struct core_actions *out) {
    const struct shard *s = core_shard_of(&r->plan, a->chunk);
    core_avoid(r, core_member(c, s->where.aggregator));
    core_avoid(r, core_member(c, s->where.holder));
    core_replan(c, r, now_ms, out);
}

static void acquit(struct core *c, struct round *r, struct audit *a, uint64_t now_ms,
                   struct core_actions *out) {
    if (a->cause == AUDIT_UNEQUAL) {
        avoid_both(c, r, a, now_ms, out);
        return;
    }
    struct member *accuser = core_member(c, a->accuser);
    if (a->cause == AUDIT_ACCUSED && ++accuser->unfounded > CORE_UNFOUNDED_MAX) {
        accuser->distrusted = true;
        core_log(out, CORE_WARNING, WHO " accused others %u times without ground; avoided",
                 WHO_OF(accuser), accuser->unfounded);
    }
    end_audit(r, a);
}

/* Nothing is proven. Where reports differ, or one auditor has found the drawn chunk wrong already, it does not commit:
 * whoever summed wrongly would need no more than that the second one goes away. */
static void leave_open(struct core *c, struct round *r, struct audit *a, uint64_t now_ms,
                       struct core_actions *out) {
    if (a->cause == AUDIT_UNEQUAL || (a->cause == AUDIT_DRAWN && a->first))
        avoid_both(c, r, a, now_ms, out);
    else
        end_audit(r, a);
}

static void give_up(struct core *c, struct round *r, struct audit *a, const char *why,
                    uint64_t now_ms, struct core_actions *out) {
    core_log(out, CORE_WARNING, "plan %llu: the audit of chunk %u by member %u is void: %s",
             LLU(r->plan.number), a->chunk, a->auditor, why);
    leave_open(c, r, a, now_ms, out);
}

/* Does what the auditor found speak for everybody it could accuse? */
static bool finds_nothing(const struct round *r, const struct audit *a) {
    return a->cause == AUDIT_ACCUSED ? a->culprit != a->accused : agrees_with_aggregator(r, a);
}

static bool same_finding(const struct audit *a) {
    return a->culprit == a->culprit_before && (a->culprit || digest_equal(&a->leaf, &a->before));
}

/* A member's word against another's: a second auditor decides. */
static void ask_second(struct core *c, struct round *r, struct audit *a, uint64_t now_ms,
                       struct core_actions *out) {
    a->first = a->auditor;
    a->before = a->leaf;
    a->culprit_before = a->culprit;
    a->culprit = 0;
    if (begin_audit(c, r, a, now_ms, out)) return;
    core_log(out, CORE_WARNING,
             "plan %llu: member %u finds chunk %u wrong, and nobody is left to look again",
             LLU(r->plan.number), a->auditor, a->chunk);
    leave_open(c, r, a, now_ms, out);
}

static void stands_alone(struct core *c, uint32_t member, struct core_actions *out) {
    struct member *m = core_member(c, member);
    m->distrusted = true;
    core_log(out, CORE_WARNING, WHO " found a chunk wrong that another auditor found right; avoided",
             WHO_OF(m));
}

static void judge(struct core *c, struct round *r, struct audit *a, uint64_t now_ms,
                  struct core_actions *out) {
    bool fine = finds_nothing(r, a), decisive = core_is_own(c, core_member(c, a->auditor));
    if (fine) {
        if (a->first) stands_alone(c, a->first, out);
        acquit(c, r, a, now_ms, out);
        return;
    }
    if (!decisive && !a->first) {
        ask_second(c, r, a, now_ms, out);
        return;
    }
    if (!decisive && !same_finding(a)) {
        give_up(c, r, a, "two auditors found two different things", now_ms, out);
        return;
    }
    struct audit verdict = *a;
    end_audit(r, a);
    convict(c, r, &verdict, now_ms, out);
}

/* ---- messages ------------------------------------------------------------------------------- */

/* The round in whose current plan a message of the audit belongs; NULL: it is old. */
static struct round *round_of(struct core *c, const struct frame *f, uint32_t fragment,
                              uint64_t number, uint32_t chunk) {
    struct round *r = fragment < c->fragments ? &c->rounds[fragment] : NULL;
    bool current = r && r->phase != ROUND_COLLECT && r->plan.number == f->plan &&
                   r->number == number && chunk < r->chunks;
    return current ? r : NULL;
}

void core_on_audit_report(struct core *c, struct member *m, const struct frame *f,
                          const struct msg_audit_report *msg, uint64_t now_ms,
                          struct core_actions *out) {
    struct round *r = round_of(c, f, msg->fragment, msg->round, msg->chunk);
    for (uint32_t i = 0; r && i < r->audit_count; i++) {
        struct audit *a = &r->audits[i];
        if (a->chunk != msg->chunk || a->auditor != m->id) continue;
        int bit = msg->culprit ? core_contributor_index(&r->plan, msg->culprit) : -1;
        if (!msg->complete) {
            give_up(c, r, a, "not all bytes could be had", now_ms, out);
        } else if (msg->culprit && (bit < 0 || !proto_set_has(a->set, (uint32_t)bit))) {
            core_close(c, out, m->conn, ERR_PROTOCOL, false,
                       "AUDIT_REPORT names member %u, who is not in the chunk", msg->culprit);
        } else {
            a->leaf = msg->leaf;
            a->culprit = msg->culprit;
            judge(c, r, a, now_ms, out);
        }
        return;
    }
    core_complain(c, out, CORE_INFO, "audit report of chunk %u from " WHO " is void: it was not asked",
                  msg->chunk, WHO_OF(m));
}

/* An accusation is taken from who sums the chunk and has not reported it, of who contributes to it;
 * one at a time, and a few in a round: the commit waits for what comes of it. */
static bool is_plausible(const struct core *c, const struct round *r, const struct member *m,
                         const struct msg_accuse *msg) {
    const struct member *accused = core_member(c, msg->member);
    const struct shard *s = core_shard_of(&r->plan, msg->chunk);
    if (r->phase != ROUND_REDUCE || core_part(r, m)->accusations >= CORE_ACCUSATIONS_MAX) return false;
    if (!accused || accused == m || s->where.aggregator != m->id || m->distrusted ||
        core_contributor_index(&r->plan, msg->member) < 0 || !core_part(r, accused)->present)
        return false;
    for (uint32_t i = 0; i < r->audit_count; i++)
        if (r->audits[i].accuser == m->id || r->audits[i].accused == msg->member) return false;
    return !is_audited(r, msg->chunk);
}

void core_on_accuse(struct core *c, struct member *m, const struct frame *f,
                    const struct msg_accuse *msg, uint64_t now_ms, struct core_actions *out) {
    char why[PROTO_TEXT_BYTES_MAX + 1];
    struct round *r = round_of(c, f, msg->fragment, msg->round, msg->chunk);
    proto_str_copy(msg->reason, why, sizeof why);
    core_complain(c, out, CORE_WARNING, WHO " accuses member %u (chunk %u of fragment %u): %.120s",
                  WHO_OF(m), msg->member, msg->chunk, msg->fragment, why);
    if (!r || !is_plausible(c, r, m, msg)) return;
    struct audit *a = add_audit(r, &(struct audit){.cause = AUDIT_ACCUSED,
                                                   .chunk = msg->chunk,
                                                   .accuser = m->id,
                                                   .accused = msg->member});
    if (!a) return;
    core_part(r, m)->accusations++;
    proto_set_add(a->set, (uint32_t)core_contributor_index(&r->plan, msg->member));
    if (!begin_audit(c, r, a, now_ms, out)) end_audit(r, a);
}

void core_check_audits(struct core *c, struct round *r, uint64_t now_ms, struct core_actions *out) {
    for (uint32_t i = r->audit_count; i-- > 0 && i < r->audit_count;) {
        struct audit *a = &r->audits[i];
        if (now_ms >= a->deadline_ms)
            give_up(c, r, a, "no report in time", now_ms, out);
        else if (!core_serves(core_member(c, a->auditor)))
            give_up(c, r, a, "the auditor is gone", now_ms, out);
    }
}
