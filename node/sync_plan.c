/* sync_plan.c - the newest plan of each fragment: is it for now, can its numbers be summed with, what of
 * it is this member's. Summing and copying are in sync_reduce.c. */
#include <stdlib.h>
#include <string.h>

#include "node/sync_internal.h"

/* ---- which plan ------------------------------------------------------------------------- */

bool plan_is_current(const struct sync *s, uint32_t fragment, const struct frame *f) {
    const struct plan *p = &s->plan[fragment];
    if (!p->active) return false;
    if (SYNC_HAS_FAULT(PLAN_NUMBER_IGNORED)) return true;
    return f->term == p->term && f->plan == p->number;
}

bool plan_is_newer(const struct sync *s, uint32_t fragment, uint64_t term, uint64_t number) {
    const struct plan *p = &s->plan[fragment];
    if (!p->active) return true;
    return term > p->term || (term == p->term && number > p->number);
}

/* A plan that resumes a commit is about the round that this very commit ended. */
bool plan_is_over(const struct sync *s, uint32_t fragment) {
    const struct plan *p = &s->plan[fragment];
    if (!p->active) return false;
    if (p->msg.resum) return p->msg.resum != s->ledger.last[fragment];
    return p->msg.round < s->ledger.rounds[fragment];
}

void plan_work_release(struct shard_work *w) {
    for (uint32_t k = 0; w->sums && k < w->count; k++) free(w->sums[k]);
    free(w->sums);
    free(w->data);
    free(w->leaves);
    free(w->sets);
    free(w->forced);
    free(w->weights);
    free(w->finished);
    *w = (struct shard_work){0};
}

void plan_release(struct sync *s, uint32_t fragment) {
    struct plan *p = &s->plan[fragment];
    if (!p->active) return;
    for (uint32_t i = 0; i < p->work_count; i++) plan_work_release(&p->work[i]);
    for (uint32_t i = 0; p->inbound && i < p->msg.contributors_count; i++)
        free(p->inbound[i].leaves);
    free(p->work);
    free(p->inbound);
    proto_copy_release(RECORD_plan, &p->msg);
    *p = (struct plan){0};
    for (uint32_t i = 0; i < s->peer_count; i++) {
        struct talk *t = &s->peers[i]->talk[fragment];
        free(t->wanted);
        t->wanted = NULL;
        t->leaves_sent = false;
    }
}

/* ---- checks ----------------------------------------------------------------------------- */

static const char *contributors_fault(const struct msg_plan *msg) {
    uint64_t weight = 0;
    if (msg->contributors_count == 0) return "it has no contributors";
    for (uint32_t i = 0; i < msg->contributors_count; i++) {
        if (msg->contributors[i].weight == 0) return "a weight is zero";
        if (!(msg->contributors[i].clip >= 0 && msg->contributors[i].clip <= 1))
            return "a clip factor is not in [0,1]";
        weight += msg->contributors[i].weight;
    }
    return weight >= OUTER_WEIGHT_LIMIT ? "the weights are too large" : NULL;
}

/* Ascending and apart; without gaps unless only what was lost is summed again. */
static const char *shards_fault(const struct sync *s, const struct msg_plan *msg) {
    uint32_t end = 0, count = s->fragment[msg->fragment].count;
    for (uint32_t i = 0; i < msg->shards_count; i++) {
        const struct msg_shard *m = &msg->shards[i];
        if (m->first < end || (m->first > end && !msg->resum) || m->count == 0 ||
            m->first > count || m->count > count - m->first)
            return "its shards do not cover the fragment";
        if (m->aggregator == m->holder) return "aggregator and holder are one member";
        end = m->first + m->count;
    }
    return end == count || (msg->resum && end) ? NULL : "its shards do not cover the fragment";
}

/* The sum of a commit that is made again is of the same values, or it would not be the same. */
static const char *resum_fault(struct sync *s, const struct msg_plan *msg) {
    const struct commit *c = msg->resum ? ledger_commit_at(s, msg->resum) : NULL;
    if (!msg->resum) return NULL;
    if (!c || c->body.fragment != msg->fragment || c->body.round != msg->round)
        return "we do not have the commit that it resumes";
    if (c->body.codec != msg->codec || c->body.grid_exponent != msg->grid_exponent ||
        c->body.contributors_count != msg->contributors_count)
        return "it is not like the commit that it resumes";
    for (uint32_t i = 0; i < msg->contributors_count; i++) {
        const struct msg_contributor *a = &c->body.contributors[i], *b = &msg->contributors[i];
        if (a->member != b->member || a->weight != b->weight || a->clip != b->clip ||
            !digest_equal(&a->root, &b->root))
            return "its contributors are not those of the commit that it resumes";
    }
    return NULL;
}

/* The coordinator is trusted, but arithmetic must not be set up on numbers that do not fit it. */
static const char *plan_fault(struct sync *s, const struct msg_plan *msg) {
    const char *fault = contributors_fault(msg);
    if (!fault) fault = shards_fault(s, msg);
    if (!fault) fault = resum_fault(s, msg);
    if (fault) return fault;
    if (outer_encoded_bytes((enum outer_codec)msg->codec, 1) == 0)
        return "its codec does not exist";
    if (msg->grid_exponent > OUTER_GRID_EXPONENT_MAX ||
        msg->grid_exponent < -OUTER_GRID_EXPONENT_MAX)
        return "its grid exponent is out of range";
    return NULL;
}

/* ---- setting up ------------------------------------------------------------------------- */

int plan_work_begin(struct sync *s, const struct plan *p, struct shard_work *w, uint32_t first,
                    uint32_t count, enum shard_role role) {
    *w = (struct shard_work){.first = first, .count = count, .role = role, .begun_ms = s->now,
                             .recheck = role != SHARD_HOLD};
    w->data =
        sync_alloc(s, shard_bytes(s, p->fragment, (enum outer_codec)p->msg.codec, first, count), 1);
    w->leaves = sync_alloc(s, count, sizeof *w->leaves);
    w->sets = sync_alloc(s, count, p->set_bytes);
    w->weights = sync_alloc(s, count, sizeof *w->weights);
    w->finished = sync_alloc(s, count, sizeof *w->finished);
    if (role != SHARD_HOLD) w->sums = sync_alloc(s, count, sizeof *w->sums);
    return s->failure.code ? -1 : 0;
}

static const struct msg_summed *summed_at(const struct msg_commit *c, uint32_t k) {
    for (uint32_t i = 0; i < c->summed_count; i++) {
        if (k < c->summed[i].chunks) return &c->summed[i];
        k -= c->summed[i].chunks;
    }
    return NULL;
}

/* Each chunk is summed from those the commit names, and from nobody else. */
static int force_sets(struct sync *s, const struct plan *p, struct shard_work *w) {
    const struct commit *c = ledger_commit_at(s, p->msg.resum);
    w->forced = sync_alloc(s, w->count, p->set_bytes);
    for (uint32_t k = 0; w->forced && k < w->count; k++) {
        const struct msg_summed *run = summed_at(&c->body, w->first + k);
        if (run && run->set.length == p->set_bytes)
            memcpy(w->forced + (size_t)k * p->set_bytes, run->set.data, p->set_bytes);
    }
    return w->forced ? 0 : -1;
}

/* A shard finished before this process started again needs no work. */
static int add_work(struct sync *s, struct plan *p, uint32_t shard, enum shard_role role) {
    struct shard_work *w = &p->work[p->work_count];
    const struct msg_shard *m = &p->msg.shards[shard];
    struct held *h = results_find(s, p->fragment, p->result_term, p->result_plan, p->msg.round,
                                  results_shard(p, shard));
    bool have = h && h->leaves.first == m->first && h->leaves.leaves_count == m->count;
    if (have) *w = (struct shard_work){.role = role, .done = true};
    else if (plan_work_begin(s, p, w, m->first, m->count, role)) return -1;
    w->shard = shard;
    p->work_count++;
    return p->msg.resum && !have && role == SHARD_AGGREGATE ? force_sets(s, p, w) : 0;
}

static int own_number(const struct sync *s, const struct msg_plan *msg) {
    const struct contribution *c = &s->contribution[msg->fragment];
    if (!c->frozen || c->ready.base_index != msg->base_index) return -1;
    for (uint32_t i = 0; i < msg->contributors_count; i++)
        if (msg->contributors[i].member == s->config.member)
            return digest_equal(&msg->contributors[i].root, &c->ready.root) ? (int)i : -1;
    return -1;
}

void plan_invite_early(struct sync *s, const struct plan *p) {
    for (uint32_t i = 0; i < s->peer_count; i++) {
        struct peer *peer = s->peers[i];
        struct talk *t = &peer->talk[p->fragment];
        if (peer->open && t->early_leaves)
            peer_none(s, peer, MSG_LEAVES, p->term, p->number, p->fragment, p->msg.round, "now");
        t->early_leaves = false;
    }
}

static int make_plan(struct sync *s, const struct frame *f, const struct msg_plan *msg) {
    struct plan *p = &s->plan[msg->fragment];
    const struct commit *resumed = msg->resum ? ledger_commit_at(s, msg->resum) : NULL;
    bool again = p->active && p->term == f->term && p->msg.round == msg->round;
    uint32_t attempt = again ? p->attempt + 1 : 0;
    plan_release(s, msg->fragment);
    if (proto_copy(RECORD_plan, msg, &p->msg, &s->failure)) return -1;
    p->active = true;
    p->fragment = msg->fragment;
    p->term = f->term;
    p->number = f->plan;
    p->attempt = attempt;
    p->result_term = resumed ? resumed->term : f->term;
    p->result_plan = resumed ? resumed->body.plan : f->plan;
    p->set_bytes = (uint32_t)bitmap_bytes(msg->contributors_count);
    p->own = own_number(s, msg);
    p->inbound = sync_alloc(s, msg->contributors_count, sizeof *p->inbound);
    p->work = sync_alloc(s, (size_t)msg->shards_count + PROTO_AUDITS_MAX, sizeof *p->work);
    return s->failure.code ? -1 : 0;
}

static int plan_begin(struct sync *s, const struct frame *f, const struct msg_plan *msg) {
    struct plan *p = &s->plan[msg->fragment];
    if (make_plan(s, f, msg)) return -1;
    for (uint32_t i = 0; i < msg->contributors_count; i++) {
        p->weight += msg->contributors[i].weight;
        p->inbound[i].heard_ms = s->now;
    }
    for (uint32_t i = 0; i < msg->shards_count; i++) {
        if (msg->shards[i].aggregator == s->config.member && add_work(s, p, i, SHARD_AGGREGATE))
            return -1;
        if (msg->shards[i].holder == s->config.member && add_work(s, p, i, SHARD_HOLD)) return -1;
    }
    plan_invite_early(s, p);
    return 0;
}

#ifdef SIM_FAULTS
/* The fault: sums of the older plan are taken as if they were of this one. */
static bool plan_keeps_sums(struct sync *s, const struct frame *f, const struct msg_plan *msg) {
    struct plan *p = &s->plan[msg->fragment];
    if (sync_fault != SYNC_FAULT_PLAN_NUMBER_IGNORED || !p->active || p->msg.round != msg->round)
        return false;
    for (uint32_t i = 0; i < s->held_count; i++) {
        struct held *h = &s->held[i];
        if (h->fragment != msg->fragment || h->round != msg->round) continue;
        h->term = f->term;
        h->plan = h->leaves.plan = f->plan;
    }
    p->term = p->result_term = f->term;
    p->number = p->result_plan = f->plan;
    for (uint32_t i = 0; i < p->work_count; i++) p->work[i].reported = false;
    return true;
}
#endif

/* Of a round that can be summed now, or of a commit that nobody can apply yet? */
static bool is_for_now(const struct sync *s, const struct frame *f, const struct msg_plan *msg) {
    uint64_t rounds = s->ledger.rounds[msg->fragment], last = s->ledger.last[msg->fragment];
    bool now = msg->resum ? msg->resum == last && msg->round + 1 == rounds
                          : msg->round == rounds && msg->base_index == last;
    return now && (plan_is_newer(s, msg->fragment, f->term, f->plan) ||
                   plan_is_current(s, msg->fragment, f));
}

int plan_on_plan(struct sync *s, const struct frame *f, const struct msg_plan *msg) {
    if (msg->fragment >= s->fragment_count || !is_for_now(s, f, msg)) {
        sync_log(s, SYNC_DEBUG, "plan %llu of fragment %u round %llu ignored",
                 (unsigned long long)f->plan, msg->fragment, (unsigned long long)msg->round);
        return 0;
    }
    const char *fault = plan_fault(s, msg);
    if (fault) {
        sync_log(s, SYNC_ERROR, "plan %llu of fragment %u round %llu is ignored: %s",
                 (unsigned long long)f->plan, msg->fragment, (unsigned long long)msg->round,
                 fault);
        return 0;
    }
    peer_set_addresses(s, msg->addresses, msg->addresses_count);
#ifdef SIM_FAULTS
    if (plan_keeps_sums(s, f, msg)) return 0;
#endif
    struct plan *p = &s->plan[msg->fragment];
    if (plan_is_newer(s, msg->fragment, f->term, f->plan)) return plan_begin(s, f, msg);
    for (uint32_t i = 0; i < p->work_count; i++) p->work[i].reported = false; /* it asks again */
    return 0;
}

/* ---- contributors ----------------------------------------------------------------------- */

int plan_contributor(const struct plan *p, uint32_t member) {
    for (uint32_t i = 0; i < p->msg.contributors_count; i++)
        if (p->msg.contributors[i].member == member) return (int)i;
    return -1;
}

/* Not where a set is forced: such a sum is made from its contributors or not at all. */
void plan_drop_contributor(struct plan *p, int i) {
    if (p->inbound[i].dropped || p->msg.resum) return;
    p->inbound[i].dropped = true;
    for (uint32_t w = 0; w < p->work_count; w++) p->work[w].recheck = true;
}

int plan_on_drop(struct sync *s, const struct frame *f, const struct msg_drop *msg) {
    if (msg->fragment >= s->fragment_count || !plan_is_current(s, msg->fragment, f)) return 0;
    struct plan *p = &s->plan[msg->fragment];
    int i = msg->round == p->msg.round ? plan_contributor(p, msg->member) : -1;
    if (i >= 0) plan_drop_contributor(p, i);
    return 0;
}

bool plan_owes(const struct sync *s, uint32_t member) {
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        int i = s->plan[f].active ? plan_contributor(&s->plan[f], member) : -1;
        if (i >= 0 && !s->plan[f].inbound[i].dropped && s->plan[f].inbound[i].owed) return true;
    }
    return false;
}
