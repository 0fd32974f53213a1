/* core_round.c - a plan is out: shards are reported by two members each; losses, delays and broken
 * reports make another plan under a higher number. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

#define LLU(x) ((unsigned long long)(x))

#ifdef SIM_FAULTS
enum core_fault core_fault = CORE_FAULT_NONE;
#endif

/* ---- losses --------------------------------------------------------------------------------- */

void core_avoid(struct round *r, struct member *m) { core_part(r, m)->avoid = true; }

/* Each aggregator once, whatever the number of its shards. */
void core_drop_contributor(struct core *c, struct round *r, struct member *m,
                           struct core_actions *out) {
    struct msg_drop msg = {.fragment = r->fragment, .round = r->number, .member = m->id};
    core_part(r, m)->dropped = true;
    for (uint32_t i = 0; i < c->member_count; i++) {
        bool aggregates = false;
        for (uint32_t j = 0; j < r->plan.shard_count; j++)
            aggregates |= r->plan.shards[j].where.aggregator == i + 1;
        if (aggregates) core_send(out, &c->members[i], MSG_DROP, r->plan.number, &msg);
    }
}

static bool is_unable(const struct core *c, uint32_t id) {
    const struct member *m = core_member(c, id);
    return !m->here || m->catching_up || !core_in_good_standing(m) || core_is_cut(c, m);
}

/* Contributions of the plan whose members are still here and have them; the others' are forgotten, until they are
 * announced again. */
static uint32_t keep_live_contributors(struct core *c, struct round *r) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < c->member_count; i++) {
        struct member *m = &c->members[i];
        struct part *p = core_part(r, m);
        if (!p->planned) continue;
        if (m->here && !core_is_cut(c, m) && core_in_good_standing(m) && !p->lost)
            n++;
        else
            core_forget_ready(p);
    }
    return n;
}

void core_cancel(struct core *c, struct round *r, struct core_actions *out) {
    r->phase = ROUND_COLLECT;
    r->audit_count = 0;
    core_forget_plan(&r->plan);
    for (uint32_t i = 0; i < c->member_count; i++) {
        struct part *p = core_part(r, &c->members[i]);
        p->planned = p->dropped = false;
    }
    core_log(out, CORE_INFO, "round %llu of fragment %u collects contributions again",
             LLU(r->number), r->fragment);
}

void core_replan(struct core *c, struct round *r, uint64_t now_ms, struct core_actions *out) {
    struct batch b = {0};
    uint32_t left = keep_live_contributors(c, r);
    r->attempts++;
    r->audit_count = 0;
    /* Of contributors that were lost: nothing can spend their claims in this round now. */
    core_return_leases(c, &b);
    core_emit_persist(out, &b);
    bool enough = left && (c->closing || left >= core_count_heads(c, r).need);
    if (!enough || now_ms < c->hold_until_ms || !core_make_plan(c, r, true, now_ms, out))
        core_cancel(c, r, out);
}

static bool replace_lost(struct core *c, struct round *r, uint64_t now_ms,
                         struct core_actions *out) {
    for (uint32_t i = 0; i < r->plan.shard_count; i++) {
        const struct msg_shard *s = &r->plan.shards[i].where;
        bool aggregates = is_unable(c, s->aggregator);
        if (!aggregates && !is_unable(c, s->holder)) continue;
        c->handovers++;
        core_log(
            out, CORE_WARNING, "plan %llu: member %u, who %s, is lost; the shard goes to others",
            LLU(r->plan.number), aggregates ? s->aggregator : s->holder,
            aggregates ? "aggregates" : "holds");
        core_replan(c, r, now_ms, out);
        return true;
    }
    return false;
}

static void replace_late(struct core *c, struct round *r, uint64_t now_ms,
                         struct core_actions *out) {
    for (uint32_t i = 0; i < r->plan.shard_count; i++) {
        const struct shard *s = &r->plan.shards[i];
        if (s->reported[BY_AGGREGATOR] && s->reported[BY_HOLDER]) continue;
        uint32_t late = s->reported[BY_AGGREGATOR] ? s->where.holder : s->where.aggregator;
        core_avoid(r, core_member(c, late));
        core_log(out, CORE_WARNING,
                 "plan %llu: no report of shard %u from " WHO " in time; others get it",
                 LLU(r->plan.number), i, WHO_OF(core_member(c, late)));
    }
    core_replan(c, r, now_ms, out);
}

/* ---- reports -------------------------------------------------------------------------------- */

void core_summed_union(const struct msg_summed *summed, uint32_t count,
                       uint8_t set[PROTO_SET_BYTES_MAX]) {
    memset(set, 0, PROTO_SET_BYTES_MAX);
    for (uint32_t i = 0; i < count; i++)
        for (uint32_t j = 0; j < summed[i].set.length; j++) set[j] |= summed[i].set.data[j];
}

/* Total weight of the members of a set, or UINT64_MAX for a bit that is nobody's. */
static uint64_t weight_of(const struct plan *p, struct proto_bytes set) {
    uint64_t weight = 0;
    for (uint32_t bit = 0; bit < set.length * 8; bit++) {
        if (!proto_set_has(set.data, bit)) continue;
        if (bit >= p->contributor_count) return UINT64_MAX;
        weight += p->contributors[bit].weight;
    }
    return weight;
}

static int check_run(const struct plan *p, const struct msg_summed *run, struct err *err) {
    uint32_t need = (p->contributor_count + 7) / 8;
    if (run->chunks == 0) return err_set(err, ERR_PROTOCOL, "a run of no chunks");
    if (run->set.length != need && !(run->set.length == 0 && run->weight == 0))
        return err_set(err, ERR_PROTOCOL, "a set of %u bytes for %u contributors", run->set.length,
                       p->contributor_count);
    if (weight_of(p, run->set) != run->weight)
        return err_set(err, ERR_PROTOCOL, "weight %llu is not that of its contributors",
                       LLU(run->weight));
    return 0;
}

int core_check_report(const struct plan *p, const struct msg_shard_report *msg, struct err *err) {
    const struct msg_shard *where = &p->shards[msg->shard].where;
    uint64_t chunks = 0;
    if (msg->results_count != where->count)
        return err_set(err, ERR_PROTOCOL, "%u digests for %u chunks", msg->results_count,
                       where->count);
    for (uint32_t i = 0; i < msg->summed_count; i++) {
        if (check_run(p, &msg->summed[i], err)) return -1;
        chunks += msg->summed[i].chunks;
    }
    if (chunks != where->count)
        return err_set(err, ERR_PROTOCOL, "runs over %llu of %u chunks", LLU(chunks), where->count);
    return 0;
}

const struct msg_summed *core_summed_at(const struct msg_summed *summed, uint32_t count,
                                        uint32_t first, uint32_t chunk) {
    for (uint32_t i = 0; i < count; first += summed[i++].chunks)
        if (chunk >= first && chunk - first < summed[i].chunks) return &summed[i];
    return NULL;
}

bool core_same_set(const struct msg_summed *a, const struct msg_summed *b) {
    if (a->weight != b->weight) return false;
    if (a->weight == 0) return true;
    return a->set.length == b->set.length && !memcmp(a->set.data, b->set.data, a->set.length);
}

/* Chunk by chunk, however each cut its runs. Both passed core_check_report for the same shard. */
uint32_t core_reports_differ(const struct msg_shard_report *a, const struct msg_shard_report *b) {
    uint32_t i = 0, j = 0, left_a = a->summed[0].chunks, left_b = b->summed[0].chunks;
    for (uint32_t k = 0; k < a->results_count; k++) {
        if (!left_a) left_a = a->summed[++i].chunks;
        if (!left_b) left_b = b->summed[++j].chunks;
        if (!digest_equal(&a->results[k].digest, &b->results[k].digest) ||
            !core_same_set(&a->summed[i], &b->summed[j]))
            return k + 1;
        left_a--;
        left_b--;
    }
    return 0;
}

struct shard *core_shard_of(const struct plan *p, uint32_t chunk) {
    for (uint32_t i = 0; i < p->shard_count; i++)
        if (chunk >= p->shards[i].where.first &&
            chunk - p->shards[i].where.first < p->shards[i].where.count)
            return &p->shards[i];
    return NULL;
}

bool core_held_twice(const struct plan *p) {
    for (uint32_t i = 0; i < p->shard_count; i++) {
#ifdef SIM_FAULTS
        if (core_fault == CORE_FAULT_ONE_REPORT_SUFFICES && !p->resum &&
            p->shards[i].reported[BY_AGGREGATOR])
            continue;
#endif
        if (!p->shards[i].reported[BY_AGGREGATOR] || !p->shards[i].reported[BY_HOLDER])
            return false;
    }
    return true;
}

static bool has_empty_chunk(const struct plan *p) {
#ifdef SIM_FAULTS
    if (core_fault == CORE_FAULT_WEIGHT_ZERO_COMMITS) return false;
#endif
    for (uint32_t i = 0; i < p->shard_count; i++)
        for (uint32_t j = 0; j < p->shards[i].reports[BY_AGGREGATOR].summed_count; j++)
            if (p->shards[i].reports[BY_AGGREGATOR].summed[j].weight == 0) return true;
    return false;
}

/* One of the two lies or errs. An audit of the first chunk says whether it is the aggregator. */
static bool settle_unequal(struct core *c, struct round *r, uint64_t now_ms,
                           struct core_actions *out) {
    for (uint32_t i = 0; i < r->plan.shard_count; i++) {
        const struct shard *s = &r->plan.shards[i];
        uint32_t differs = s->reported[BY_HOLDER] ? core_reports_differ(&s->reports[BY_AGGREGATOR],
                                                                        &s->reports[BY_HOLDER])
                                                  : 0;
        if (!differs) continue;
        core_log(out, CORE_ERROR,
                 "plan %llu, shard %u: the reports of member %u (aggregator) and member %u "
                 "(holder) differ from chunk %u on",
                 LLU(r->plan.number), i, s->where.aggregator, s->where.holder,
                 s->where.first + differs - 1);
        if (core_audit_unequal(c, r, s->where.first + differs - 1, now_ms, out)) return true;
        core_avoid(r, core_member(c, s->where.aggregator));
        core_avoid(r, core_member(c, s->where.holder));
        core_replan(c, r, now_ms, out);
        return true;
    }
    return false;
}

/* Its bytes are lost or wrong, however lively the member is: it begins anew. Who does so again and again
 * would keep its samples from the run for ever: others get them. */
static void give_up(struct core *c, struct round *r, struct member *m, struct core_actions *out) {
    struct batch b = {0};
    core_forget_ready(core_part(r, m));
    if (++m->given_up == CORE_GIVEN_UP_MAX)
        core_complain(c, out, CORE_WARNING,
                      WHO ": %u contributions running did not arrive; it gets no samples until it comes anew",
                      WHO_OF(m), m->given_up);
    core_return_leases(c, &b);
    core_emit_persist(out, &b);
    core_reset_member(c, r, m, "it never arrived", out);
}

/* Where a chunk stays empty plan after plan. */
static void give_up_unheard(struct core *c, struct round *r, struct core_actions *out) {
    uint8_t heard[PROTO_SET_BYTES_MAX] = {0}, set[PROTO_SET_BYTES_MAX];
    for (uint32_t i = 0; i < r->plan.shard_count; i++) {
        const struct msg_shard_report *report = &r->plan.shards[i].reports[BY_AGGREGATOR];
        core_summed_union(report->summed, report->summed_count, set);
        for (uint32_t j = 0; j < sizeof set; j++) heard[j] |= set[j];
    }
    for (uint32_t i = 0; i < r->plan.contributor_count; i++) {
        struct member *m = core_member(c, r->plan.contributors[i].member);
        struct part *p = core_part(r, m);
        p->unheard += proto_set_has(heard, i) ? 1 : 2;
        if (p->planned && p->unheard >= 2 * CORE_UNHEARD_PLANS_MAX) give_up(c, r, m, out);
    }
}

static void reports_are_complete(struct core *c, struct round *r, uint64_t now_ms,
                                 struct core_actions *out) {
    if (settle_unequal(c, r, now_ms, out)) return;
    if (has_empty_chunk(&r->plan)) {
        if (core_audits_open(r)) return; /* who is accused may be why: under another plan it could not be shown */
        core_log(out, CORE_WARNING,
                 "plan %llu: a chunk was summed from nobody; planned again with who is still here",
                 LLU(r->plan.number));
        core_avoid(r, core_member(c, r->plan.shards[0].where.aggregator));
        give_up_unheard(c, r, out);
        core_replan(c, r, now_ms, out);
    } else if (!core_draw_audits(c, r, now_ms, out) && !core_audits_open(r)) {
        core_commit(c, r, now_ms, out);
    } else {
        r->phase = ROUND_AUDIT;
    }
}

/* Contributors whose process is gone send nothing more: what they lack is not waited for. */
static void drop_cut(struct core *c, struct round *r, struct core_actions *out) {
    for (uint32_t i = 0; i < r->plan.contributor_count; i++) {
        struct member *m = core_member(c, r->plan.contributors[i].member);
        struct part *p = core_part(r, m);
        if (p->planned && !p->dropped && core_is_cut(c, m))
            core_drop_contributor(c, r, m, out);
    }
}

void core_check_round(struct core *c, struct round *r, uint64_t now_ms, struct core_actions *out) {
    if (r->phase == ROUND_COLLECT || replace_lost(c, r, now_ms, out)) return;
    drop_cut(c, r, out);
    core_check_audits(c, r, now_ms, out);
    if (core_awaits_entries(c)) return; /* our ledger may be behind: nothing is appended to it now */
    if (r->phase == ROUND_AUDIT) {
        if (!core_audits_open(r)) core_commit(c, r, now_ms, out);
    } else if (r->phase == ROUND_REDUCE && core_held_twice(&r->plan)) {
        reports_are_complete(c, r, now_ms, out);
    } else if (r->phase == ROUND_REDUCE && now_ms >= r->plan.deadline_ms) {
        replace_late(c, r, now_ms, out);
    }
}

/* ---- SHARD_REPORT --------------------------------------------------------------------------- */

/* The plan that a report is about; NULL: it came too late and means nothing now. */
static struct plan *plan_of(struct core *c, const struct frame *f,
                            const struct msg_shard_report *msg, struct round **round) {
    struct round *r = msg->fragment < c->fragments ? &c->rounds[msg->fragment] : NULL;
    *round = r;
    if (!r) return NULL;
    if (r->phase != ROUND_COLLECT && r->plan.number == f->plan && msg->plan == f->plan &&
        msg->round == r->number && msg->shard < r->plan.shard_count)
        return &r->plan;
    *round = NULL;
    struct plan *p = &c->resum.plan;
    bool current = p->resum && p->number == f->plan && p->fragment == msg->fragment &&
                   p->round == msg->round && msg->shard < p->shard_count;
    return current ? p : NULL;
}

static int role_in(const struct shard *s, const struct member *m) {
    if (s->where.aggregator == m->id) return BY_AGGREGATOR;
    return s->where.holder == m->id ? BY_HOLDER : -1;
}

static bool is_signed(const struct core *c, const struct member *m,
                      const struct msg_shard_report *msg) {
    struct proto_buffer bytes;
    proto_buffer_init(&bytes, proto_record_bytes_max(RECORD_shard_report));
    bool good =
        !proto_encode(&bytes, RECORD_shard_report, msg, NULL) &&
        proto_record_verify(&m->key, "shard_report", &c->run, c->term, bytes.data, bytes.length);
    proto_buffer_release(&bytes);
    return good;
}

static int check_report_of(const struct core *c, const struct member *m, const struct plan *p,
                           const struct msg_shard_report *msg, struct err *err) {
    if (!is_signed(c, m, msg))
        return err_set(err, ERR_PROTOCOL, "it lacks its sender's signature");
    return core_check_report(p, msg, err);
}

static void refuse_report(struct core *c, struct round *r, struct member *m,
                          const struct msg_shard_report *msg, const char *why, uint64_t now_ms,
                          struct core_actions *out) {
    core_complain(c, out, CORE_ERROR,
                  "report of shard %u from " WHO " is broken: %s; another gets the shard",
                  msg->shard, WHO_OF(m), why);
    core_close(c, out, m->conn, ERR_PROTOCOL, false, "SHARD_REPORT: %s", why);
    if (!r) return; /* of a resum: it is overdue one day */
    core_avoid(r, m);
    core_replan(c, r, now_ms, out);
}

void core_on_shard_report(struct core *c, struct member *m, const struct frame *f,
                          const struct msg_shard_report *msg, uint64_t now_ms,
                          struct core_actions *out) {
    struct err err;
    struct round *r;
    struct plan *p = plan_of(c, f, msg, &r);
    struct shard *s = p ? &p->shards[msg->shard] : NULL;
    int role = s ? role_in(s, m) : -1;
    if (role < 0) {
        core_complain(c, out, CORE_INFO,
                      "report of shard %u of fragment %u, round %llu, plan %llu from " WHO
                      " is void: no such plan is in work, or the shard is not its own",
                      msg->shard, msg->fragment, LLU(msg->round), LLU(f->plan), WHO_OF(m));
        return;
    }
    if (r && r->phase == ROUND_AUDIT) return; /* a repetition */
    if (check_report_of(c, m, p, msg, &err)) {
        refuse_report(c, r, m, msg, err.msg, now_ms, out);
        return;
    }
    if (s->reported[role])
        proto_copy_release(RECORD_shard_report, &s->reports[role]);
    else /* not for a repetition: the other one may be stuck */
        p->deadline_ms = core_deadline(c, r ? r->attempts : c->resum.attempts, now_ms);
    int failed = proto_copy(RECORD_shard_report, msg, &s->reports[role], NULL);
    assert(!failed);
    s->reported[role] = true;
    if (!r) core_resum_reported(c, now_ms, out);
}
