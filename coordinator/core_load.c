/* core_load.c - the state from the rows of the store, and the entries of the ledger. What a
 * commit or an enrolment changes is written once here and serves the live run and a restart. */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

/* ---- intervals ------------------------------------------------------------------------------ */

/* The first range that ends after `start`, or count. */
static uint32_t interval_find(const struct interval_set *s, uint64_t start) {
    uint32_t low = 0, high = s->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (s->list[middle].start + s->list[middle].count <= start)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

bool interval_overlaps(const struct interval_set *s, uint64_t start, uint64_t count) {
    uint32_t i = interval_find(s, start);
    return i < s->count && s->list[i].start < start + count;
}

void interval_add(struct interval_set *s, uint64_t start, uint64_t count) {
    assert(count && !interval_overlaps(s, start, count));
    uint32_t i = interval_find(s, start);
    bool joins_left = i > 0 && s->list[i - 1].start + s->list[i - 1].count == start;
    bool joins_right = i < s->count && s->list[i].start == start + count;
    s->total += count;
    if (joins_left && joins_right) {
        s->list[i - 1].count += count + s->list[i].count;
        memmove(&s->list[i], &s->list[i + 1], (s->count - i - 1) * sizeof *s->list);
        s->count--;
    } else if (joins_left) {
        s->list[i - 1].count += count;
    } else if (joins_right) {
        s->list[i].start = start;
        s->list[i].count += count;
    } else {
        s->list = core_grow32(s->list, s->count, &s->capacity, sizeof *s->list);
        memmove(&s->list[i + 1], &s->list[i], (s->count - i) * sizeof *s->list);
        s->list[i] = (struct msg_range){start, count};
        s->count++;
    }
}

void interval_release(struct interval_set *s) {
    free(s->list);
    *s = (struct interval_set){0};
}

/* ---- entries -------------------------------------------------------------------------------- */

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

/* ---- what entries mean ---------------------------------------------------------------------- */

struct member *core_add_member(struct core *c, const struct msg_enrolment *enrolment) {
    assert(c->member_count < PROTO_MEMBERS_MAX);
    struct member *m = &c->members[c->member_count++];
    *m = (struct member){.id = c->member_count,
                         .key = enrolment->key,
                         .invite = enrolment->invite,
                         .aggregate_only = enrolment->aggregate_only};
    proto_str_copy(enrolment->name, m->name, sizeof m->name);
    if (!m->name[0]) snprintf(m->name, sizeof m->name, "unnamed");
    return m;
}

static int take_enrolment(struct core *c, uint64_t index, const struct msg_enrolment *e,
                          struct err *err) {
    if (e->member != c->member_count + 1 || e->member > PROTO_MEMBERS_MAX)
        return err_set(err, ERR_CORRUPT, "ledger entry %llu enrols member %u after member %u",
                       (unsigned long long)index, e->member, c->member_count);
    for (uint32_t i = 0; i < c->member_count; i++)
        if (!memcmp(&c->members[i].key, &e->key, sizeof e->key))
            return err_set(err, ERR_CORRUPT, "ledger entry %llu enrols the key of member %u again",
                           (unsigned long long)index, i + 1);
    core_add_member(c, e);
    c->roster_version = index;
    return 0;
}

static int take_revocation(struct core *c, uint64_t index, const struct msg_revocation *r,
                           struct err *err) {
    struct member *m = core_member(c, r->member);
    if (!m)
        return err_set(err, ERR_CORRUPT, "ledger entry %llu revokes member %u, who is not enrolled",
                       (unsigned long long)index, r->member);
    m->revoked = true;
    c->roster_version = index;
    return 0;
}

static int take_checkpoint(struct core *c, uint64_t index, const struct msg_checkpoint *k,
                           struct err *err) {
    struct state *s = core_find_state(c, k->at_index);
    if (!s || (s->root_known && !digest_equal(&s->root, &k->state_root)))
        return err_set(
            err, ERR_CORRUPT,
            "ledger entry %llu: a checkpoint of the state at %llu, which is not this run's",
            (unsigned long long)index, (unsigned long long)k->at_index);
    c->checkpoint_last = k->at_index;
    return 0;
}

/* Do these claims lie inside the corpus and overlap neither each other nor what is spent? Adds
 * them to the spent set one by one, and takes them out again by copying it back when one fails. */
static int spend_all(struct core *c, const struct msg_commit *commit, struct err *err) {
    struct interval_set before = {0};
    if (c->spent.count) {
        before.list = malloc(c->spent.count * sizeof *before.list);
        assert(before.list);
        memcpy(before.list, c->spent.list, c->spent.count * sizeof *before.list);
    }
    before.count = before.capacity = c->spent.count;
    before.total = c->spent.total;
    for (uint32_t i = 0; i < commit->spent_count; i++) {
        const struct msg_spend *s = &commit->spent[i];
        if (!s->count || s->start >= c->samples_total || s->count > c->samples_total - s->start ||
            interval_overlaps(&c->spent, s->start, s->count)) {
            interval_release(&c->spent);
            c->spent = before;
            return err_set(err, ERR_CORRUPT,
                           "round %llu: member %u spends samples %llu to %llu, of %llu, "
                           "which are spent already or do not exist",
                           (unsigned long long)commit->round, s->member,
                           (unsigned long long)s->start, (unsigned long long)(s->start + s->count),
                           (unsigned long long)c->samples_total);
        }
        interval_add(&c->spent, s->start, s->count);
    }
    interval_release(&before);
    return 0;
}

static int check_commit(const struct core *c, uint64_t index, const struct msg_commit *commit,
                        struct err *err) {
    const struct state *s = core_state_now(c);
    if (commit->fragment != 0 || commit->round != core_round(c) || commit->base_index != s->index)
        return err_set(err, ERR_CORRUPT,
                       "ledger entry %llu commits round %llu on the state at %llu; it must be "
                       "round %llu on %llu",
                       (unsigned long long)index, (unsigned long long)commit->round,
                       (unsigned long long)commit->base_index, (unsigned long long)core_round(c),
                       (unsigned long long)s->index);
    if (commit->tokens_committed != s->tokens_committed + commit->tokens ||
        commit->shards_count == 0 || commit->shards_count > CORE_SHARDS_MAX)
        return err_set(err, ERR_CORRUPT,
                       "ledger entry %llu: %llu tokens committed in %u shards do not follow from "
                       "%llu and %llu",
                       (unsigned long long)index, (unsigned long long)commit->tokens_committed,
                       commit->shards_count, (unsigned long long)s->tokens_committed,
                       (unsigned long long)commit->tokens);
    for (uint32_t i = 0; i < commit->contributors_count; i++)
        if (!core_member(c, commit->contributors[i].member))
            return err_set(err, ERR_CORRUPT, "ledger entry %llu: contributor %u is not enrolled",
                           (unsigned long long)index, commit->contributors[i].member);
    return 0;
}

static void add_state(struct core *c, const struct state *s) {
    c->states = core_grow32(c->states, c->state_count, &c->state_capacity, sizeof *c->states);
    c->states[c->state_count++] = *s;
}

static void credit_contributors(struct core *c, const struct msg_commit *commit) {
    uint8_t summed[PROTO_SET_BYTES_MAX];
    core_summed_union(commit->summed, commit->summed_count, summed);
    for (uint32_t i = 0; i < commit->contributors_count; i++) {
        if (!proto_set_has(summed, i)) continue;
        struct member *m = core_member(c, commit->contributors[i].member);
        m->tokens_committed += commit->contributors[i].tokens;
        m->rounds_summed++;
    }
}

int core_take_commit(struct core *c, uint64_t index, const struct msg_commit *commit,
                     struct err *err) {
    struct state *base = core_state_now(c);
    if (check_commit(c, index, commit, err) || spend_all(c, commit, err)) return -1;
    base->root = commit->state_root;
    base->root_known = base->root_fixed = true;
    struct state next = {.index = index, .tokens_committed = commit->tokens_committed};
    for (uint32_t i = 0; i < commit->shards_count; i++) {
        next.holders[next.holder_count++] = commit->shards[i].aggregator;
        next.holders[next.holder_count++] = commit->shards[i].holder;
    }
    add_state(c, &next);
    credit_contributors(c, commit);
    c->commits++;
    return 0;
}

/* ---- rows ----------------------------------------------------------------------------------- */

/* The record each kind of entry carries. */
static int body_record(uint8_t kind) {
    switch (kind) {
    case LEDGER_GENESIS: return RECORD_genesis;
    case LEDGER_DELEGATION: return RECORD_delegation;
    case LEDGER_ENROLMENT: return RECORD_enrolment;
    case LEDGER_REVOCATION: return RECORD_revocation;
    case LEDGER_COMMIT: return RECORD_commit;
    case LEDGER_CHECKPOINT: return RECORD_checkpoint;
    }
    return -1;
}

union body {
    struct msg_genesis genesis;
    struct msg_delegation delegation;
    struct msg_enrolment enrolment;
    struct msg_revocation revocation;
    struct msg_commit commit;
    struct msg_checkpoint checkpoint;
};

static int take_body(struct core *c, const struct msg_entry *e, const union body *body,
                     struct err *err) {
    switch (e->kind) {
    case LEDGER_GENESIS: {
        struct digest d = digest_of(e->body.data, e->body.length);
        if (e->index == 0 && digest_equal(&d, &c->run)) return 0;
        return err_set(err, ERR_CORRUPT, "ledger entry %llu is not the genesis of this run",
                       (unsigned long long)e->index);
    }
    case LEDGER_ENROLMENT: return take_enrolment(c, e->index, &body->enrolment, err);
    case LEDGER_REVOCATION: return take_revocation(c, e->index, &body->revocation, err);
    case LEDGER_COMMIT: return core_take_commit(c, e->index, &body->commit, err);
    case LEDGER_CHECKPOINT: return take_checkpoint(c, e->index, &body->checkpoint, err);
    default: return 0; /* a delegation: whose signatures count is the shell's business */
    }
}

static int check_chain(const struct core *c, uint64_t key, const struct msg_entry *e,
                       struct err *err) {
    struct digest previous = {{0}};
    if (c->entry_count) previous = c->entries[c->entry_count - 1];
    if (key != c->entry_count || e->index != key)
        return err_set(err, ERR_CORRUPT, "ledger row %llu holds entry %llu; entry %llu is next",
                       (unsigned long long)key, (unsigned long long)e->index,
                       (unsigned long long)c->entry_count);
    if (!digest_equal(&previous, &e->previous))
        return err_set(err, ERR_CORRUPT, "ledger entry %llu does not follow the entry before it",
                       (unsigned long long)key);
    if (e->term < c->entry_term)
        return err_set(err, ERR_CORRUPT, "ledger entry %llu is of term %llu after one of term %llu",
                       (unsigned long long)key, (unsigned long long)e->term,
                       (unsigned long long)c->entry_term);
    if (key == 0 && e->kind != LEDGER_GENESIS)
        return err_set(err, ERR_CORRUPT, "ledger entry 0 is not a genesis");
    return 0;
}

static int load_entry(struct core *c, uint64_t key, const uint8_t *value, size_t length,
                      struct err *err) {
    struct msg_entry e = {0};
    union body body;
    memset(&body, 0, sizeof body);
    int which = -1, result = -1;
    if (proto_decode(value, length, RECORD_entry, &e, err) || check_chain(c, key, &e, err))
        goto out;
    which = body_record(e.kind);
    if (which < 0) {
        err_set(err, ERR_CORRUPT, "ledger entry %llu is of unknown kind %u",
                (unsigned long long)key, e.kind);
        goto out;
    }
    if (proto_decode(e.body.data, e.body.length, (enum proto_record)which, &body, err)) goto out;
    if (take_body(c, &e, &body, err)) goto out;
    struct digest digest = digest_of(value, length);
    chain_entry(c, &digest);
    c->entry_term = e.term;
    result = 0;
out:
    if (which >= 0) proto_decoded_release((enum proto_record)which, &body);
    proto_decoded_release(RECORD_entry, &e);
    return result;
}

static int load_lease(struct core *c, uint64_t key, const uint8_t *value, size_t length,
                      struct err *err) {
    struct msg_spend s = {0};
    if (proto_decode(value, length, RECORD_spend, &s, err)) return -1;
    bool inside = s.count && s.start < c->samples_total && s.count <= c->samples_total - s.start;
    if (s.lease != key || !inside || (s.member && !core_member(c, s.member)))
        return err_set(err, ERR_CORRUPT,
                       "lease row %llu (lease %llu, member %u, samples %llu+%llu) makes no sense",
                       (unsigned long long)key, (unsigned long long)s.lease, s.member,
                       (unsigned long long)s.start, (unsigned long long)s.count);
    if (interval_overlaps(&c->spent, s.start, s.count) ||
        interval_overlaps(&c->leased_at_load, s.start, s.count))
        return err_set(
            err, ERR_CORRUPT, "lease %llu: samples %llu+%llu are spent or leased already",
            (unsigned long long)key, (unsigned long long)s.start, (unsigned long long)s.count);
    interval_add(&c->leased_at_load, s.start, s.count);
    core_add_lease(c, &(struct lease){s.lease, s.start, s.count, s.generation, s.member});
    return 0;
}

static int load_meta(struct core *c, uint64_t key, const uint8_t *value, size_t length,
                     struct err *err) {
    uint64_t number = 0;
    if (length != 8)
        return err_set(err, ERR_CORRUPT, "meta row %llu has %zu bytes, not 8",
                       (unsigned long long)key, length);
    for (int i = 0; i < 8; i++) number |= (uint64_t)value[i] << (8 * i);
    switch (key) {
    case CORE_META_NEXT_SAMPLE:
        if (number > c->samples_total)
            return err_set(err, ERR_CORRUPT, "next sample %llu of %llu", (unsigned long long)number,
                           (unsigned long long)c->samples_total);
        c->next_sample = number;
        return 0;
    case CORE_META_NEXT_LEASE: c->next_lease = number; return 0;
    case CORE_META_PAUSED: c->paused = number != 0; return 0;
    }
    return err_set(err, ERR_CORRUPT, "unknown meta row %llu", (unsigned long long)key);
}

int core_load(struct core *c, enum core_table table, uint64_t key, const uint8_t *value,
              size_t length, struct err *err) {
    assert(!c->started);
    struct err why = {0};
    int result = table == CORE_LEDGER  ? load_entry(c, key, value, length, &why)
                 : table == CORE_LEASE ? load_lease(c, key, value, length, &why)
                 : table == CORE_META  ? load_meta(c, key, value, length, &why)
                                       : 0; /* invites: the shell looks them up itself */
    return result ? err_set(err, ERR_CORRUPT, "store: %s", why.msg) : 0;
}
