/* audit.c - a ledger is checked entry by entry, from its bytes alone: it shares no code with the
 * core that wrote it. */
#include "coordinator/audit.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FAULT(index, ...) fault(err, index, __VA_ARGS__)

static int fault(struct err *err, uint64_t index, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static int fault(struct err *err, uint64_t index, const char *format, ...) {
    char text[200];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    return err_set(err, ERR_CORRUPT, "ledger entry %llu: %s", (unsigned long long)index, text);
}

void audit_init(struct audit *a, const struct digest *run) {
    memset(a, 0, sizeof *a);
    ledger_chain_init(&a->chain, run);
}

void audit_release(struct audit *a) {
    free(a->member);
    free(a->spent);
    free(a->spends);
    a->member = NULL;
    a->spent = NULL;
    a->spends = NULL;
}

static struct audit_member *find_member(const struct audit *a, uint32_t id) {
    return id >= 1 && id <= a->member_count ? &a->member[id - 1] : NULL;
}

/* ---- one kind after the other ------------------------------------------------------------------- */

static int mark_spent(struct audit *a, uint64_t index, const char *who, uint64_t start, uint64_t count,
                      struct err *err) {
    if (!count || start >= a->samples || count > a->samples - start)
        return FAULT(index, "%s spends samples %llu to %llu of %llu", who, (unsigned long long)start,
                     (unsigned long long)(start + count), (unsigned long long)a->samples);
    for (uint64_t i = start; i < start + count; i++) {
        if (a->spent[i / 8] >> (i % 8) & 1)
            return FAULT(index, "%s spends sample %llu a second time", who, (unsigned long long)i);
        a->spent[i / 8] |= (uint8_t)(1u << (i % 8));
    }
    a->samples_spent += count;
    return 0;
}

static int take_genesis(struct audit *a, const struct msg_genesis *g, struct err *err) {
    if (g->model_count != 1 || g->corpus_count != 1 || g->outer_count != 1 || !g->corpus->samples ||
        !g->outer->fragments)
        return FAULT(0, "a genesis without a model, an outer step or a corpus");
    a->fragments = g->outer->fragments;
    a->sequence = g->model->sequence;
    a->samples = g->corpus->samples;
    a->spent = calloc(a->samples / 8 + 1, 1);
    if (!a->spent)
        return err_set(err, ERR_MEMORY, "no memory to follow %llu samples",
                       (unsigned long long)a->samples);
    for (uint32_t i = 0; i < g->init_spent_count; i++)
        if (mark_spent(a, 0, "the genesis", g->init_spent[i].start, g->init_spent[i].count, err)) return -1;
    a->tokens = a->samples_spent * a->sequence;
    return 0;
}

static int take_enrolment(struct audit *a, uint64_t index, const struct msg_enrolment *e,
                          struct err *err) {
    if (e->member != a->member_count + 1 || e->member > PROTO_MEMBERS_MAX)
        return FAULT(index, "enrols member %u, %u is next", e->member, a->member_count + 1);
    for (uint32_t i = 0; i < a->member_count; i++)
        if (!memcmp(&a->member[i].key, &e->key, sizeof e->key))
            return FAULT(index, "enrols the key of member %u again", i + 1);
    struct audit_member *grown = realloc(a->member, (a->member_count + 1) * sizeof *grown);
    if (!grown) return err_set(err, ERR_MEMORY, "no memory for %u members", e->member);
    a->member = grown;
    struct audit_member *m = &a->member[a->member_count++];
    *m = (struct audit_member){ .member = e->member, .key = e->key };
    proto_str_copy(e->name, m->name, sizeof m->name);
    return 0;
}

static int check_place(const struct audit *a, uint64_t index, const struct msg_commit *c,
                       struct err *err) {
    if (c->fragment >= a->fragments)
        return FAULT(index, "commits fragment %u of %u", c->fragment, a->fragments);
    if (c->round != a->rounds[c->fragment])
        return FAULT(index, "commits round %llu of fragment %u, round %llu is next",
                     (unsigned long long)c->round, c->fragment,
                     (unsigned long long)a->rounds[c->fragment]);
    if (c->base_index != a->base[c->fragment])
        return FAULT(index, "is based on entry %llu, the last commit of fragment %u is entry %llu",
                     (unsigned long long)c->base_index, c->fragment,
                     (unsigned long long)a->base[c->fragment]);
    uint32_t next = 0;
    for (uint32_t i = 0; i < c->shards_count; i++) {
        const struct msg_shard *s = &c->shards[i];
        if (s->aggregator == s->holder)
            return FAULT(index, "shard %u was held by member %u alone", i, s->holder);
        if (!find_member(a, s->aggregator) || !find_member(a, s->holder))
            return FAULT(index, "shard %u was held by somebody who is no member", i);
        if (s->first != next || !s->count) return FAULT(index, "shard %u leaves a gap", i);
        next += s->count;
    }
    return 0;
}

/* A plan that is in work when a contributor goes into quarantine goes on, and what of it is in the sum
 * already stays there: only a round that began later must not name it. */
static bool is_shut_out(const struct audit_member *m, const struct msg_commit *c) {
    return m->quarantined && m->quarantined < c->base_index;
}

/* Are the contributors members, each named once; and does each run of chunks have the weight of
 * those who are in it? summed: [PROTO_SET_BYTES_MAX], who is in at least one chunk. */
static int check_summed(struct audit *a, uint64_t index, const struct msg_commit *c,
                        uint8_t *summed, struct err *err) {
    for (uint32_t i = 0; i < c->contributors_count; i++) {
        if (!find_member(a, c->contributors[i].member))
            return FAULT(index, "contributor %u is no member", c->contributors[i].member);
        if (is_shut_out(find_member(a, c->contributors[i].member), c))
            return FAULT(index, "contributor %u is in quarantine", c->contributors[i].member);
        for (uint32_t j = 0; j < i; j++)
            if (c->contributors[j].member == c->contributors[i].member)
                return FAULT(index, "contributor %u stands there twice", c->contributors[i].member);
    }
    for (uint32_t r = 0; r < c->summed_count; r++) {
        const struct msg_summed *s = &c->summed[r];
        uint64_t weight = 0;
        for (uint32_t i = 0; i < s->set.length * 8; i++) {
            if (!proto_set_has(s->set.data, i)) continue;
            if (i >= c->contributors_count) return FAULT(index, "sums a contributor it does not name");
            weight += c->contributors[i].weight;
            proto_set_add(summed, i);
        }
        if (!weight || weight != s->weight)
            return FAULT(index, "chunks with weight %llu, their contributors have %llu",
                         (unsigned long long)s->weight, (unsigned long long)weight);
    }
    return 0;
}

static int spend(struct audit *a, uint64_t index, const struct msg_spend *s, struct err *err) {
    char who[32];
    snprintf(who, sizeof who, "member %u", s->member);
    if (mark_spent(a, index, who, s->start, s->count, err)) return -1;
    if (a->spend_count == a->spend_capacity) {
        uint64_t more = a->spend_capacity ? 2 * a->spend_capacity : 256;
        struct audit_spend *grown = realloc(a->spends, more * sizeof *grown);
        if (!grown) return err_set(err, ERR_MEMORY, "no memory for %llu spends", (unsigned long long)more);
        a->spends = grown;
        a->spend_capacity = more;
    }
    a->spends[a->spend_count++] = (struct audit_spend){ index, s->start, s->count };
    return 0;
}

/* Every spent sample belongs to a contributor that was summed, and was not more than it contributed. A
 * contribution's own samples may be more: other fragments' commits have spent those. */
static int check_spent(struct audit *a, uint64_t index, const struct msg_commit *c,
                       const uint8_t *summed, struct err *err) {
    uint64_t samples[PROTO_MEMBERS_MAX] = {0}, tokens = 0;
    for (uint32_t i = 0; i < c->spent_count; i++) {
        const struct msg_spend *s = &c->spent[i];
        uint32_t j = 0;
        while (j < c->contributors_count && c->contributors[j].member != s->member) j++;
        if (j == c->contributors_count || !proto_set_has(summed, j))
            return FAULT(index, "member %u spends samples and was not summed", s->member);
        samples[j] += s->count;
        if (spend(a, index, s, err)) return -1;
    }
    for (uint32_t j = 0; j < c->contributors_count; j++) {
        if (!proto_set_has(summed, j)) continue;
        const struct msg_contributor *k = &c->contributors[j];
        struct audit_member *m = find_member(a, k->member);
        m->tokens += samples[j] * a->sequence;
        m->rounds++;
        tokens += samples[j] * a->sequence;
    }
    if (tokens != c->tokens || c->tokens_committed != a->tokens + tokens)
        return FAULT(index, "says %llu tokens, %llu in all; its spent samples have %llu, %llu in all",
                     (unsigned long long)c->tokens, (unsigned long long)c->tokens_committed,
                     (unsigned long long)tokens, (unsigned long long)(a->tokens + tokens));
    return 0;
}

static int take_commit(struct audit *a, uint64_t index, const struct msg_commit *c,
                       struct err *err) {
    uint8_t summed[PROTO_SET_BYTES_MAX] = {0};
    if (check_place(a, index, c, err) || check_summed(a, index, c, summed, err) ||
        check_spent(a, index, c, summed, err))
        return -1;
    a->commits++;
    a->rounds[c->fragment]++;
    a->base[c->fragment] = a->last_commit = index;
    a->tokens = c->tokens_committed;
    return 0;
}

static int take_checkpoint(struct audit *a, uint64_t index, const struct msg_checkpoint *c,
                           struct err *err) {
    if (c->at_index > a->last_commit || c->tokens_committed > a->tokens)
        return FAULT(index, "a checkpoint of entry %llu, the last commit is entry %llu",
                     (unsigned long long)c->at_index, (unsigned long long)a->last_commit);
    a->checkpoints++;
    return 0;
}

static int take_revocation(struct audit *a, uint64_t index, const struct msg_revocation *r,
                           struct err *err) {
    struct audit_member *m = find_member(a, r->member);
    if (!m) return FAULT(index, "revokes member %u, who is none", r->member);
    m->revoked = true;
    return 0;
}

/* The member's own signature is the proof that anybody can check. One too long for an entry leaves the
 * coordinator's word, which could have revoked the member too. */
static int check_proof(const struct audit *a, uint64_t index, const struct msg_quarantine *q,
                       const struct audit_member *m, struct err *err) {
    const char *purpose = q->kind == MSG_READY          ? "ready"
                          : q->kind == MSG_SHARD_REPORT ? "shard_report"
                                                        : NULL;
    if (!q->kind && !q->proof.length) return 0;
    if (!purpose)
        return FAULT(index, "puts member %u into quarantine for a %s, which nobody signs", q->member,
                     proto_type_name(q->kind));
    if (proto_record_verify(&m->key, purpose, &a->chain.run, q->proof_term, q->proof.data,
                            q->proof.length))
        return 0;
    return FAULT(index, "puts member %u into quarantine, but what it shows is not signed by it",
                 q->member);
}

static int take_quarantine(struct audit *a, uint64_t index, const struct msg_quarantine *q,
                           struct err *err) {
    struct audit_member *m = find_member(a, q->member);
    if (!m) return FAULT(index, "puts member %u into quarantine, who is none", q->member);
    if (!q->lifted && check_proof(a, index, q, m, err)) return -1;
    m->quarantined = q->lifted ? 0 : index;
    a->quarantines += !q->lifted;
    return 0;
}

/* What the commits after the checkpoint spent is free again; rounds go on counting. */
static int take_rewind(struct audit *a, uint64_t index, const struct msg_rewind *r, struct err *err) {
    if (r->to_count != 1 || r->to->at_index > a->last_commit || r->to->tokens_committed > a->tokens)
        return FAULT(index, "goes back to a checkpoint that does not lie behind it");
    while (a->spend_count && a->spends[a->spend_count - 1].index > r->to->at_index) {
        const struct audit_spend *s = &a->spends[--a->spend_count];
        for (uint64_t i = s->start; i < s->start + s->count; i++)
            a->spent[i / 8] &= (uint8_t)~(1u << (i % 8));
        a->samples_spent -= s->count;
    }
    a->tokens = r->to->tokens_committed;
    for (uint32_t f = 0; f < a->fragments; f++) a->base[f] = index;
    a->last_commit = index;
    a->rewinds++;
    return 0;
}

/* ---- the entry ------------------------------------------------------------------------------------ */

static int take_body(struct audit *a, const struct msg_entry *e, const union ledger_body *body,
                     struct err *err) {
    switch (e->kind) {
    case LEDGER_GENESIS: return take_genesis(a, &body->genesis, err);
    case LEDGER_ENROLMENT: return take_enrolment(a, e->index, &body->enrolment, err);
    case LEDGER_COMMIT: return take_commit(a, e->index, &body->commit, err);
    case LEDGER_CHECKPOINT: return take_checkpoint(a, e->index, &body->checkpoint, err);
    case LEDGER_REVOCATION: return take_revocation(a, e->index, &body->revocation, err);
    case LEDGER_QUARANTINE: return take_quarantine(a, e->index, &body->quarantine, err);
    case LEDGER_REWIND: return take_rewind(a, e->index, &body->rewind, err);
    default: return 0; /* delegations are the chain's */
    }
}

int audit_take(struct audit *a, const struct msg_signed_entry *signed_entry, struct err *err) {
    struct msg_entry e = {0};
    union ledger_body body;
    struct err why = {0};
    if (ledger_chain_take(&a->chain, signed_entry, &e, &why))
        return err_set(err, ERR_CORRUPT, "%s", why.msg); /* ERR_STALE too: an index twice */
    int result = -1;
    if (ledger_body_decode(&e, &body, &why)) FAULT(e.index, "%s", why.msg);
    else result = take_body(a, &e, &body, err);
    ledger_body_release(&e, &body);
    if (result == 0) a->entries++;
    proto_decoded_release(RECORD_entry, &e);
    return result;
}
