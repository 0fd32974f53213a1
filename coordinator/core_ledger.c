/* core_ledger.c - the entries of the ledger: how one is appended, and what each kind changes for
 * good. It is written once here and serves the live run and a restart. */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

#define LLU(x) ((unsigned long long)(x))

/* ---- appending ------------------------------------------------------------------------------ */

int core_entry_encode(struct proto_buffer *out, uint64_t index, const struct digest *previous,
                      uint64_t term, enum ledger_kind kind, enum proto_record body_record,
                      const void *body, struct err *err) {
    struct proto_buffer bytes;
    proto_buffer_init(&bytes, PROTO_BLOB_BYTES_MAX);
    int result = proto_encode(&bytes, body_record, body, err);
    if (!result) {
        struct msg_entry entry = {.index = index,
                                  .previous = *previous,
                                  .term = term,
                                  .kind = (uint8_t)kind,
                                  .body = {bytes.data, (uint32_t)bytes.length}};
        result = proto_encode(out, RECORD_entry, &entry, err);
    }
    proto_buffer_release(&bytes);
    return result;
}

static void chain_entry(struct core *c, const struct digest *digest) {
    c->entries = core_grow(c->entries, c->entry_count, &c->entry_capacity, sizeof *c->entries);
    c->entries[c->entry_count++] = *digest;
}

int core_append(struct core *c, struct batch *b, enum ledger_kind kind, enum proto_record which,
                const void *body, uint64_t *index, struct err *err) {
    struct proto_buffer bytes;
    struct digest previous = {{0}};
    if (c->entry_count) previous = c->entries[c->entry_count - 1];
    proto_buffer_init(&bytes, PROTO_BLOB_BYTES_MAX);
    if (core_entry_encode(&bytes, c->entry_count, &previous, c->term, kind, which, body, err)) {
        proto_buffer_release(&bytes);
        return err_set(err, ERR_FULL, "%s is too large for a ledger entry of %u bytes",
                       proto_record_name(which), PROTO_BLOB_BYTES_MAX);
    }
    struct digest digest = digest_of(bytes.data, bytes.length);
    *index = c->entry_count;
    batch_put_bytes(b, CORE_LEDGER, *index, bytes.data, bytes.length);
    chain_entry(c, &digest);
    return 0;
}

/* ---- members -------------------------------------------------------------------------------- */

struct member *core_add_member(struct core *c, const struct msg_enrolment *enrolment) {
    assert(c->member_count < PROTO_MEMBERS_MAX);
    struct member *m = &c->members[c->member_count++];
    *m = (struct member){.id = c->member_count,
                         .key = enrolment->key,
                         .invite = enrolment->invite,
                         .aggregate_only = enrolment->aggregate_only,
                         .parts = calloc(c->fragments, sizeof *m->parts)};
    assert(m->parts);
    proto_str_copy(enrolment->name, m->name, sizeof m->name);
    if (!m->name[0]) snprintf(m->name, sizeof m->name, "unnamed");
    return m;
}

static int take_enrolment(struct core *c, uint64_t index, const struct msg_enrolment *e,
                          struct err *err) {
    if (e->member != c->member_count + 1 || e->member > PROTO_MEMBERS_MAX)
        return err_set(err, ERR_CORRUPT, "ledger entry %llu enrols member %u after member %u",
                       LLU(index), e->member, c->member_count);
    for (uint32_t i = 0; i < c->member_count; i++)
        if (!memcmp(&c->members[i].key, &e->key, sizeof e->key))
            return err_set(err, ERR_CORRUPT, "ledger entry %llu enrols the key of member %u again",
                           LLU(index), i + 1);
    core_add_member(c, e);
    c->roster_version = index;
    return 0;
}

static int take_revocation(struct core *c, uint64_t index, const struct msg_revocation *r,
                           struct err *err) {
    struct member *m = core_member(c, r->member);
    if (!m)
        return err_set(err, ERR_CORRUPT, "ledger entry %llu revokes member %u, who is not enrolled",
                       LLU(index), r->member);
    m->revoked = true;
    c->roster_version = index;
    return 0;
}

static int take_quarantine(struct core *c, uint64_t index, const struct msg_quarantine *q,
                           struct err *err) {
    struct member *m = core_member(c, q->member);
    if (!m)
        return err_set(err, ERR_CORRUPT,
                       "ledger entry %llu is about member %u, who is not enrolled", LLU(index),
                       q->member);
    m->quarantined = !q->lifted;
    return 0;
}

static int take_delegation(struct core *c, uint64_t index, const struct msg_delegation *d,
                           struct err *err) {
    c->keys.next_index = index;
    return ledger_chain_delegate(&c->keys, d, err);
}

/* ---- states --------------------------------------------------------------------------------- */

static void forget_commit(struct state *s) {
    if (s->commit) proto_copy_release(RECORD_commit, s->commit);
    free(s->commit);
    free(s->holders);
    free(s->resummed);
    s->commit = NULL;
    s->holders = NULL;
    s->resummed = NULL;
    s->holder_count = s->resummed_count = 0;
}

void core_release_state(struct state *s) {
    forget_commit(s);
    free(s->spent);
    s->spent = NULL;
    s->spent_count = 0;
}

static struct state *add_state(struct core *c, const struct state *s) {
    c->states = core_grow32(c->states, c->state_count, &c->state_capacity, sizeof *c->states);
    c->states[c->state_count] = *s;
    if (c->state_count > CORE_COMMITS_KEPT)
        forget_commit(&c->states[c->state_count - CORE_COMMITS_KEPT]);
    return &c->states[c->state_count++];
}

static void add_holder(struct state *s, uint32_t member) {
    for (uint32_t i = 0; i < s->holder_count; i++)
        if (s->holders[i] == member) return;
    s->holders[s->holder_count++] = member;
}

static void keep_commit(struct state *s, const struct msg_commit *commit) {
    s->commit = calloc(1, sizeof *s->commit);
    s->holders = calloc(2 * (size_t)commit->shards_count, sizeof *s->holders);
    assert(s->commit && s->holders);
    int failed = proto_copy(RECORD_commit, commit, s->commit, NULL);
    assert(!failed);
    for (uint32_t i = 0; i < commit->shards_count; i++) {
        add_holder(s, commit->shards[i].aggregator);
        add_holder(s, commit->shards[i].holder);
    }
    if (!commit->spent_count) return;
    s->spent = malloc(commit->spent_count * sizeof *s->spent);
    assert(s->spent);
    memcpy(s->spent, commit->spent, commit->spent_count * sizeof *s->spent);
    s->spent_count = commit->spent_count;
}

static int take_checkpoint(struct core *c, uint64_t index, const struct msg_checkpoint *k,
                           struct err *err) {
    struct state *s = core_find_state(c, k->at_index);
    if (!s || (s->root_known && !digest_equal(&s->root, &k->state_root)))
        return err_set(
            err, ERR_CORRUPT,
            "ledger entry %llu: a checkpoint of the state at %llu, which is not this run's",
            LLU(index), LLU(k->at_index));
    s->root = k->state_root;
    s->root_known = s->root_fixed = true;
    c->checkpoint_last = k->at_index;
    return 0;
}

/* ---- commits -------------------------------------------------------------------------------- */

/* A row of an older store may name a former holder. */
static void note_regrants(struct core *c, const struct msg_commit *commit) {
    for (uint32_t i = 0; i < commit->spent_count && !c->started; i++) {
        const struct msg_spend *s = &commit->spent[i];
        if (s->generation < 2) continue;
        c->regrants = core_grow32(c->regrants, c->regrant_count, &c->regrant_capacity, sizeof *c->regrants);
        c->regrants[c->regrant_count++] = (struct regrant){s->lease, s->generation};
    }
}

/* Do these claims lie inside the corpus and overlap neither each other nor what is spent? Adds
 * them to the spent set one by one, and takes them out again when one fails. */
static int spend_all(struct core *c, const struct msg_commit *commit, struct err *err) {
    for (uint32_t i = 0; i < commit->spent_count; i++) {
        const struct msg_spend *s = &commit->spent[i];
#ifdef SIM_FAULTS
        if (core_fault == CORE_FAULT_SPENDS_OTHER_FRAGMENT_AGAIN &&
            interval_overlaps(&c->spent, s->start, s->count))
            continue;
#endif
        if (core_member(c, s->member) && s->count && s->start < c->samples_total &&
            s->count <= c->samples_total - s->start &&
            !interval_overlaps(&c->spent, s->start, s->count)) {
            interval_add(&c->spent, s->start, s->count);
            continue;
        }
        while (i--) interval_remove(&c->spent, commit->spent[i].start, commit->spent[i].count);
        return err_set(err, ERR_CORRUPT,
                       "round %llu of fragment %u: member %u spends samples %llu to %llu, of %llu, "
                       "which are spent already or do not exist",
                       LLU(commit->round), commit->fragment, s->member, LLU(s->start),
                       LLU(s->start + s->count), LLU(c->samples_total));
    }
    return 0;
}

static int check_commit(const struct core *c, uint64_t index, const struct msg_commit *commit,
                        struct err *err) {
    const struct round *r = commit->fragment < c->fragments ? &c->rounds[commit->fragment] : NULL;
    uint64_t tokens = core_state_now(c)->tokens_committed;
    if (!r || commit->round != r->number || commit->base_index != r->base_index)
        return err_set(err, ERR_CORRUPT,
                       "ledger entry %llu commits round %llu of fragment %u on the state at %llu; "
                       "it must be round %llu on %llu",
                       LLU(index), LLU(commit->round), commit->fragment, LLU(commit->base_index),
                       LLU(r ? r->number : 0), LLU(r ? r->base_index : 0));
    if (commit->tokens_committed != tokens + commit->tokens || commit->shards_count == 0)
        return err_set(err, ERR_CORRUPT,
                       "ledger entry %llu: %llu tokens committed in %u shards do not follow from "
                       "%llu and %llu",
                       LLU(index), LLU(commit->tokens_committed), commit->shards_count, LLU(tokens),
                       LLU(commit->tokens));
    const struct state *s = core_find_state(c, commit->state_index);
    if (!s || (s->root_fixed && !digest_equal(&s->root, &commit->state_root)))
        return err_set(err, ERR_CORRUPT,
                       "ledger entry %llu names a root of the state at %llu, which is no state or "
                       "has another one",
                       LLU(index), LLU(commit->state_index));
    for (uint32_t i = 0; i < commit->contributors_count; i++)
        if (!core_member(c, commit->contributors[i].member))
            return err_set(err, ERR_CORRUPT, "ledger entry %llu: contributor %u is not enrolled",
                           LLU(index), commit->contributors[i].member);
    return 0;
}

/* Spends that a claim in flight may still name: those after the oldest fragment's base. */
static void prune_recent(struct core *c) {
    uint64_t oldest = UINT64_MAX;
    for (uint32_t f = 0; f < c->fragments; f++)
        if (c->rounds[f].base_index < oldest) oldest = c->rounds[f].base_index;
    for (uint32_t i = 0; i < c->member_count; i++) {
        struct member *m = &c->members[i];
        uint32_t n = 0;
        for (uint32_t j = 0; j < m->recent_count; j++)
            if (m->recent[j].index > oldest) m->recent[n++] = m->recent[j];
        m->recent_count = n;
    }
}

static void credit_spends(struct core *c, uint64_t index, const struct msg_commit *commit) {
    for (uint32_t i = 0; i < commit->spent_count; i++) {
        const struct msg_spend *s = &commit->spent[i];
        struct member *m = core_member(c, s->member);
        m->tokens_committed += s->count * c->sequence;
        for (uint32_t f = 0; f < c->fragments; f++) m->parts[f].account += s->count;
        m->recent = core_grow32(m->recent, m->recent_count, &m->recent_capacity, sizeof *m->recent);
        m->recent[m->recent_count++] =
            (struct recent){s->lease, s->start, s->count, index, s->generation};
    }
}

/* Who was summed anywhere has its weight taken off its account, and one more round on its ramp. */
static double credit_contributors(struct core *c, const struct msg_commit *commit) {
    uint8_t summed[PROTO_SET_BYTES_MAX];
    double samples = 0;
    core_summed_union(commit->summed, commit->summed_count, summed);
    for (uint32_t i = 0; i < commit->contributors_count; i++) {
        if (!proto_set_has(summed, i)) continue;
        struct member *m = core_member(c, commit->contributors[i].member);
        uint64_t weight = commit->contributors[i].tokens / c->sequence;
        uint64_t *account = &m->parts[commit->fragment].account;
        *account -= weight < *account ? weight : *account;
        m->rounds_summed++;
        samples += (double)weight;
    }
    return samples;
}

int core_take_commit(struct core *c, uint64_t index, uint64_t term, const struct msg_commit *commit,
                     struct err *err) {
    if (check_commit(c, index, commit, err) || spend_all(c, commit, err)) return -1;
    note_regrants(c, commit);
    struct round *r = &c->rounds[commit->fragment];
    struct state *named = core_find_state(c, commit->state_index);
    named->root = commit->state_root;
    named->root_known = named->root_fixed = true;
    struct state next = {
        .index = index, .term = term, .tokens_committed = commit->tokens_committed};
    keep_commit(add_state(c, &next), commit);
    credit_spends(c, index, commit);
    r->samples[r->samples_count++ % CORE_LR_ROUNDS] = credit_contributors(c, commit);
    r->number++;
    r->base_index = index;
    prune_recent(c);
    c->commits++;
    return 0;
}

/* ---- rewinds -------------------------------------------------------------------------------- */

static int take_rewind(struct core *c, uint64_t index, const struct msg_rewind *w,
                       struct err *err) {
    const struct msg_checkpoint *to = w->to_count == 1 ? w->to : NULL;
    const struct state *target = to ? core_find_state(c, to->at_index) : NULL;
    if (!target || target->undone ||
        (target->root_known && !digest_equal(&target->root, &to->state_root)))
        return err_set(err, ERR_CORRUPT,
                       "ledger entry %llu rewinds to the state at %llu, which is none of this run's",
                       LLU(index), LLU(to ? to->at_index : 0));
    struct state next = {.index = index,
                         .root_known = true,
                         .root_fixed = true,
                         .root = to->state_root,
                         .tokens_committed = target->tokens_committed};
    for (uint32_t i = c->state_count; i-- && c->states[i].index > to->at_index;) {
        struct state *s = &c->states[i];
        for (uint32_t j = 0; j < s->spent_count; j++) {
#ifdef SIM_FAULTS
            if (core_fault != CORE_FAULT_REWIND_KEEPS_SPENT)
#endif
                interval_remove(&c->spent, s->spent[j].start, s->spent[j].count);
            core_member(c, s->spent[j].member)->tokens_committed -=
                s->spent[j].count * c->sequence;
        }
        core_release_state(s);
        s->undone = true;
    }
    for (uint32_t f = 0; f < c->fragments; f++) {
        c->rounds[f].base_index = index;
        for (uint32_t i = 0; i < c->member_count; i++) c->members[i].parts[f].account = 0;
    }
    for (uint32_t i = 0; i < c->member_count; i++) c->members[i].recent_count = 0;
    add_state(c, &next);
    return 0;
}

/* ---- any entry ------------------------------------------------------------------------------ */

static int take_body(struct core *c, const struct msg_entry *e, const union ledger_body *body,
                     struct err *err) {
    switch (e->kind) {
    case LEDGER_GENESIS: {
        struct digest d = digest_of(e->body.data, e->body.length);
        if (e->index == 0 && digest_equal(&d, &c->run)) return 0;
        return err_set(err, ERR_CORRUPT, "ledger entry %llu is not the genesis of this run",
                       LLU(e->index));
    }
    case LEDGER_DELEGATION: return take_delegation(c, e->index, &body->delegation, err);
    case LEDGER_ENROLMENT: return take_enrolment(c, e->index, &body->enrolment, err);
    case LEDGER_REVOCATION: return take_revocation(c, e->index, &body->revocation, err);
    case LEDGER_COMMIT: return core_take_commit(c, e->index, e->term, &body->commit, err);
    case LEDGER_CHECKPOINT: return take_checkpoint(c, e->index, &body->checkpoint, err);
    case LEDGER_QUARANTINE: return take_quarantine(c, e->index, &body->quarantine, err);
    default: return take_rewind(c, e->index, &body->rewind, err);
    }
}

static int check_chain(const struct core *c, uint64_t key, const struct msg_entry *e,
                       struct err *err) {
    struct digest previous = {{0}};
    if (c->entry_count) previous = c->entries[c->entry_count - 1];
    if (key != c->entry_count || e->index != key)
        return err_set(err, ERR_CORRUPT, "ledger row %llu holds entry %llu; entry %llu is next",
                       LLU(key), LLU(e->index), LLU(c->entry_count));
    if (!digest_equal(&previous, &e->previous))
        return err_set(err, ERR_CORRUPT, "ledger entry %llu does not follow the entry before it",
                       LLU(key));
    if (e->term < c->entry_term)
        return err_set(err, ERR_CORRUPT, "ledger entry %llu is of term %llu after one of term %llu",
                       LLU(key), LLU(e->term), LLU(c->entry_term));
    if (key == 0 && e->kind != LEDGER_GENESIS)
        return err_set(err, ERR_CORRUPT, "ledger entry 0 is not a genesis");
    return 0;
}

int core_take_entry(struct core *c, uint64_t key, const uint8_t *bytes, size_t length,
                    struct err *err) {
    struct msg_entry e = {0};
    union ledger_body body;
    int result = -1;
    if (proto_decode(bytes, length, RECORD_entry, &e, err) || check_chain(c, key, &e, err)) goto out;
    if (ledger_body_decode(&e, &body, err)) err_prefix(err, "ledger entry %llu", LLU(key));
    else if (take_body(c, &e, &body, err) == 0) result = 0;
    ledger_body_release(&e, &body);
    if (result) goto out;
    struct digest digest = digest_of(bytes, length);
    chain_entry(c, &digest);
    c->entry_term = e.term;
out:
    proto_decoded_release(RECORD_entry, &e);
    return result;
}
