/* oracle.c - what must hold of ledger, leases and contributions, computed independently of the code
 * under test. */
#include "tests/sim/sim.h"

#include <stdlib.h>
#include <string.h>

/* ---- looking things up ------------------------------------------------------------------------- */

/* The same bytes may come again in a later round: work that was not summed is contributed again. */
const struct sim_contribution *oracle_contribution(struct sim_world *w, uint32_t member,
                                                   uint32_t fragment, uint64_t round,
                                                   const struct digest *root) {
    for (uint32_t i = w->contribution_count; i--;) {
        const struct sim_contribution *k = &w->contributions[i];
        if (k->member == member && k->round == round && k->fragment == fragment &&
            digest_equal(&k->root, root))
            return k;
    }
    return NULL;
}

const struct msg_summed *oracle_summed(const struct msg_commit *c, uint32_t k) {
    uint32_t at = 0;
    for (uint32_t i = 0; i < c->summed_count; at += c->summed[i++].chunks)
        if (k < at + c->summed[i].chunks) return &c->summed[i];
    return NULL;
}

static bool in_set(const struct msg_summed *s, uint32_t bit) {
    return bit / 8 < s->set.length && proto_set_has(s->set.data, bit);
}

/* False where the entry is no commit; release c with proto_decoded_release() after true. */
bool oracle_commit(struct sim_world *w, uint64_t index, struct msg_entry *e, struct msg_commit *c) {
    struct err err;
    if (index >= w->truth_count || !w->entry_bytes[index]) return false;
    if (proto_decode(w->entry_bytes[index], w->entry_length[index], RECORD_entry, e, &err))
        sim_violation(w, "ledger entry %llu: %s", LLU(index), err.msg);
    if (e->kind != LEDGER_COMMIT) return false;
    if (proto_decode(e->body.data, e->body.length, RECORD_commit, c, &err))
        sim_violation(w, "commit %llu: %s", LLU(index), err.msg);
    return true;
}

/* ---- a commit: the next one of its fragment, every sample once ---------------------------------- */

static void check_summed(struct sim_world *w, const struct msg_commit *c) {
    uint32_t chunks = 0;
    for (uint32_t i = 0; i < c->summed_count; chunks += c->summed[i++].chunks) {
        uint64_t weight = 0;
        for (uint32_t k = 0; k < c->contributors_count; k++)
            if (in_set(&c->summed[i], k)) weight += c->contributors[k].weight;
        if (!weight || weight != c->summed[i].weight)
            sim_violation(w, "fragment %u round %llu: chunks of weight %llu, by their set %llu",
                          c->fragment, LLU(c->round), LLU(c->summed[i].weight), LLU(weight));
    }
    if (chunks != w->fragment_chunks[c->fragment])
        sim_violation(w, "fragment %u round %llu: commits %u of %u chunks", c->fragment,
                      LLU(c->round), chunks, w->fragment_chunks[c->fragment]);
}

static void spend(struct sim_world *w, uint64_t index, const struct msg_spend *x) {
    for (uint64_t s = x->start; s < x->start + x->count; s++) {
        if (s >= w->corpus.samples)
            sim_violation(w, "sample %llu is spent, there are %llu", LLU(s),
                          LLU(w->corpus.samples));
        if (proto_set_has(w->spent, (uint32_t)s))
            sim_violation(w, "sample %llu is spent twice, by members %u and %u", LLU(s),
                          w->owner[s], x->member);
        proto_set_add(w->spent, (uint32_t)s);
        w->owner[s] = x->member;
        w->spent_at[s] = index;
    }
}

/* The samples whose work went into chunk k with this contribution are its member's, and it was not
 * in there before. */
static void check_effects(struct sim_world *w, const struct msg_commit *c, uint32_t k,
                          const struct sim_contribution *x) {
    uint32_t chunk = w->chunk_at[c->fragment][k];
    for (uint32_t s = 0; s < w->corpus.samples; s++) {
        if (!proto_set_has(x->effect[k], s)) continue;
        if (!proto_set_has(w->spent, s) || w->owner[s] != x->member)
            sim_violation(w,
                          "fragment %u round %llu: sample %u is in the contribution of member %u, "
                          "and spent by %u",
                          c->fragment, LLU(c->round), s, x->member, w->owner[s]);
        if (!proto_set_has(w->in_chunk[chunk], s)) continue;
        w->twice++;
        if (!sim_has(w, SIM_COPY) && !sim_has(w, SIM_IMAGE))
            sim_violation(w,
                          "fragment %u round %llu: sample %u of member %u takes effect in chunk %u "
                          "a second time",
                          c->fragment, LLU(c->round), s, x->member, chunk);
    }
    samples_add(w->in_chunk[chunk], x->effect[k]);
}

static void check_contributors(struct sim_world *w, const struct msg_commit *c) {
    bool partial = false;
    for (uint32_t i = 0; i < c->contributors_count; i++) {
        const struct msg_contributor *m = &c->contributors[i];
        const struct sim_contribution *x = 
            oracle_contribution(w, m->member, c->fragment, c->round, &m->root);
        uint32_t chunks = 0;
        if (!x)
            sim_violation(w, "fragment %u round %llu: member %u never announced this contribution",
                          c->fragment, LLU(c->round), m->member);
        for (uint32_t k = 0; k < w->fragment_chunks[c->fragment]; k++) {
            if (!in_set(oracle_summed(c, k), i)) continue;
            chunks++;
            check_effects(w, c, k, x);
        }
        partial |= chunks > 0 && chunks < w->fragment_chunks[c->fragment];
        for (uint32_t n = 0; n < c->spent_count; n++) {
            const struct msg_spend *p = &c->spent[n];
            if (p->member != m->member) continue;
            for (uint64_t s = p->start; s < p->start + p->count; s++)
                if (!chunks || !proto_set_has(x->all, (uint32_t)s))
                    sim_violation(w,
                                  "fragment %u round %llu: sample %llu of member %u is spent and "
                                  "in no chunk",
                                  c->fragment, LLU(c->round), LLU(s), m->member);
        }
    }
    if (partial) w->injected[SIM_PARTIAL]++;
}

static bool is_report(const struct sim_report *r, uint64_t term, uint64_t plan, uint32_t member,
                      uint32_t shard) {
    return r->term == term && r->plan == plan && r->member == member && r->shard == shard;
}

/* What both members of the shard have reported. An older disk may have made one of them report twice: then
 * *times counts more than one. */
static const struct sim_report *find_reported(const struct sim_world *w, uint64_t term,
                                              const struct msg_commit *c, uint32_t shard,
                                              uint32_t *times) {
    const struct msg_shard *s = &c->shards[shard];
    const struct sim_report *found = NULL;
    *times = 0;
    for (uint32_t i = 0; i < SIM_REPORTS; i++) {
        const struct sim_report *a = &w->reports[i];
        if (!is_report(a, term, c->plan, s->aggregator, shard) || a->count != s->count) continue;
        for (uint32_t k = 0; k < SIM_REPORTS; k++) {
            const struct sim_report *h = &w->reports[k];
            if (!is_report(h, term, c->plan, s->holder, shard) || h->count != s->count ||
                memcmp(a->leaf, h->leaf, s->count * sizeof *a->leaf))
                continue;
            found = a;
            ++*times;
        }
    }
    return found;
}

/* An auditor that does not lie found another sum: then there is no such commit. */
static void check_audits(struct sim_world *w, uint64_t term, const struct msg_commit *c) {
    for (uint32_t i = 0; i < 64; i++) {
        const struct sim_audit *a = &w->audits[i];
        const struct msg_summed *summed = a->reported ? oracle_summed(c, a->chunk) : NULL;
        if (!summed || a->term != term || a->plan != c->plan) continue;
        struct digest set = digest_of(summed->set.data, summed->set.length);
        for (uint32_t k = 0; k < c->shards_count && digest_equal(&set, &a->set); k++) {
            const struct msg_shard *s = &c->shards[k];
            uint32_t times;
            const struct sim_report *r = find_reported(w, term, c, k, &times);
            if (a->chunk < s->first || a->chunk >= s->first + s->count || times != 1) continue;
            if (!digest_equal(&r->leaf[a->chunk - s->first], &a->leaf))
                sim_violation(w,
                              "fragment %u round %llu: chunk %u is committed although an audit "
                              "found another sum",
                              c->fragment, LLU(c->round), a->chunk);
        }
    }
}

/* A commit survives each of its members: the results of every shard are what two of them reported, who
 * had made them durable first. */
static void check_reports(struct sim_world *w, uint64_t term, const struct msg_commit *c) {
    struct msg_digest_item leaves[SIM_CHUNKS_MAX];
    bool sure = true;
    for (uint32_t i = 0; i < c->shards_count; i++) {
        const struct msg_shard *s = &c->shards[i];
        uint32_t times;
        const struct sim_report *r = find_reported(w, term, c, i, &times);
        if (!r || s->aggregator == s->holder)
            sim_violation(w,
                          "fragment %u round %llu: shard %u is committed, and not reported by members %u "
                          "and %u",
                          c->fragment, LLU(c->round), i, s->aggregator, s->holder);
        for (uint32_t k = 0; k < s->count; k++) leaves[s->first + k].digest = r->leaf[k];
        sure &= times == 1;
    }
    struct digest root = digest_tree_root(leaves, w->fragment_chunks[c->fragment]);
    if (sure && !digest_equal(&root, &c->result_root))
        sim_violation(w, "fragment %u round %llu: what was reported is not what is committed",
                      c->fragment, LLU(c->round));
}

static void take_commit(struct sim_world *w, uint64_t index, uint64_t term,
                        const struct msg_commit *c) {
    uint64_t tokens = 0;
    if (c->fragment >= w->fragments || c->round != w->next_round[c->fragment] ||
        c->base_index != w->base_index[c->fragment])
        sim_violation(w, "fragment %u: a commit of round %llu on %llu is written, the next is %llu on "
                      "%llu", c->fragment, LLU(c->round), LLU(c->base_index),
                      LLU(c->fragment < w->fragments ? w->next_round[c->fragment] : 0),
                      LLU(c->fragment < w->fragments ? w->base_index[c->fragment] : 0));
    check_summed(w, c);
    for (uint32_t i = 0; i < c->spent_count; i++) {
        spend(w, index, &c->spent[i]);
        tokens += c->spent[i].count * w->model.sequence;
    }
    if (c->tokens != tokens || c->tokens_committed != w->tokens_committed + tokens)
        sim_violation(w, "fragment %u round %llu: %llu tokens, %llu in all; it spends %llu of %llu",
                      c->fragment, LLU(c->round), LLU(c->tokens), LLU(c->tokens_committed),
                      LLU(tokens), LLU(w->tokens_committed + tokens));
    check_contributors(w, c);
    check_audits(w, term, c);
    if (!digest_is_zero(&w->root_seen[c->state_index]) && !digest_is_zero(&c->state_root) &&
        !digest_equal(&w->root_seen[c->state_index], &c->state_root))
        sim_violation(w, "the commit at %llu names a root of state %llu that no member has",
                      LLU(index), LLU(c->state_index));
    w->tokens_committed += tokens;
    w->next_round[c->fragment]++;
    w->base_index[c->fragment] = index;
    w->commits++;
    w->injected[SIM_SEVERAL_SHARDS] += c->shards_count > 1;
    sim_trace(w, "fragment %u round %llu commits at %llu: %u contributors, %u shards, %u spends",
              c->fragment, LLU(c->round), LLU(index), c->contributors_count, c->shards_count,
              c->spent_count);
}

static void trace_commit(struct sim_world *w, const struct msg_commit *c) {
    for (uint32_t i = 0; i < c->shards_count && w->trace; i++)
        sim_trace(w, "    chunks %u+%u: member %u, second holder %u", c->shards[i].first,
                  c->shards[i].count, c->shards[i].aggregator, c->shards[i].holder);
    for (uint32_t i = 0; i < c->contributors_count && w->trace; i++)
        sim_trace(w, "    contributor %u", c->contributors[i].member);
}

/* ---- the ledger -------------------------------------------------------------------------------- */

static void take_entry(struct sim_world *w, uint64_t index, const uint8_t *bytes, uint32_t length) {
    struct msg_entry e;
    struct msg_commit c;
    struct msg_quarantine q;
    struct err err;
    if (index >= SIM_ENTRIES_MAX)
        sim_violation(w, "more than %d ledger entries", SIM_ENTRIES_MAX);
    free(w->entry_bytes[index]);
    w->entry_bytes[index] = malloc(length);
    memcpy(w->entry_bytes[index], bytes, length);
    w->entry_length[index] = length;
    w->truth_count = index + 1;
    if (oracle_commit(w, index, &e, &c)) {
        take_commit(w, index, e.term, &c);
        trace_commit(w, &c);
        proto_decoded_release(RECORD_commit, &c);
    } else if (e.kind == LEDGER_REWIND) {
        oracle_rewind(w, index);
    } else if (e.kind == LEDGER_QUARANTINE) {
        if (proto_decode(e.body.data, e.body.length, RECORD_quarantine, &q, &err))
            sim_violation(w, "quarantine: %s", err.msg);
        w->injected[SIM_QUARANTINE]++;
        for (uint32_t i = 0; i < w->members; i++)
            if (w->member[i].id == q.member && !w->member[i].lie && !q.lifted)
                sim_violation(w, "member %u is quarantined and did nothing: %.*s", q.member,
                              (int)q.reason.length, (const char *)q.reason.data);
    }
}

static void on_entry(struct sim_world *w, const struct core_write *x) {
    struct digest d = digest_of(x->value, x->value_length);
    struct msg_entry e;
    struct msg_commit c;
    if (x->key >= SIM_ENTRIES_MAX)
        sim_violation(w, "more than %d ledger entries", SIM_ENTRIES_MAX);
    if (w->entry_known[x->key] && !digest_equal(&d, &w->entry_seen[x->key]))
        sim_violation(w, "ledger entry %llu is written, members already have another one",
                      LLU(x->key));
    w->entry_known[x->key] = true;
    w->entry_seen[x->key] = d;
    if (x->key < w->truth_count) return; /* taken over from a member */
    take_entry(w, x->key, x->value, x->value_length);
    if (oracle_commit(w, x->key, &e, &c)) {
        check_reports(w, e.term, &c);
        sim_fault_at_commit(w, &c);
        proto_decoded_release(RECORD_commit, &c);
    }
}

void oracle_persist(struct sim_world *w, const struct core_action *a) {
    for (uint32_t i = 0; i < a->write_count; i++)
        if (a->writes[i].table == CORE_LEDGER) on_entry(w, &a->writes[i]);
    oracle_check_leases(w);
}

/* What the genesis says is spent. */
void oracle_begin(struct sim_world *w) {
    w->tokens_committed = 0;
    for (uint32_t i = 0; i < w->genesis.init_spent_count; i++)
        for (uint64_t k = 0; k < w->init_spent[i].count; k++) {
            uint64_t s = w->init_spent[i].start + k;
            proto_set_add(w->spent, (uint32_t)s);
            w->owner[s] = 0;
            w->spent_at[s] = 0;
            w->tokens_committed += w->model.sequence;
        }
}

void oracle_rollback(struct sim_world *w, uint64_t count) {
    struct sim_table *ledger = &w->store.table[CORE_LEDGER];
    uint64_t commits = w->commits;
    memset(w->spent, 0, sizeof w->spent);
    memset(w->in_chunk, 0, sizeof w->in_chunk);
    memset(w->next_round, 0, sizeof w->next_round);
    memset(w->base_index, 0, sizeof w->base_index);
    memset(w->audits, 0, sizeof w->audits); /* they were judged when they counted */
    w->rewind_index = w->rewind_count = 0;
    oracle_begin(w);
    for (uint64_t i = 0; i < count; i++) {
        struct sim_row *r = sim_row_find(ledger, i);
        take_entry(w, i, r->value, r->length);
    }
    for (uint64_t i = count; i < SIM_ENTRIES_MAX; i++) {
        w->entry_known[i] = false;
        w->root_seen[i] = (struct digest){{0}};
    }
    for (uint32_t i = w->state_count; i--;) {
        if (w->states[i].version < count) continue;
        free(w->states[i].values);
        w->states[i] = w->states[--w->state_count];
    }
    memcpy(w->destroyed_rounds, w->next_round, sizeof w->destroyed_rounds);
    w->commits = commits;
}

/* ---- leases: every sample is spent, in one lease, or not handed out yet --------------------------- */

void oracle_check_leases(struct sim_world *w) {
    sim_samples owned;
    struct err err;
    struct sim_table *leases = &w->store.table[CORE_LEASE];
    if (w->store.table[CORE_LEDGER].count < w->truth_count || w->taking_over) return;
    memcpy(owned, w->spent, sizeof owned);
    for (uint32_t i = 0; i < leases->count; i++) {
        struct sim_row *r = &leases->rows[i];
        struct msg_spend l;
        if (proto_decode(r->value, r->length, RECORD_spend, &l, &err))
            sim_violation(w, "lease row: %s", err.msg);
        for (uint64_t s = l.start; s < l.start + l.count; s++) {
            if (s >= w->corpus.samples || proto_set_has(owned, (uint32_t)s))
                sim_violation(w,
                              "sample %llu of lease %llu is leased twice, or spent, or not there",
                              LLU(s), LLU(l.lease));
            proto_set_add(owned, (uint32_t)s);
        }
    }
    struct sim_row *next = sim_row_find(&w->store.table[CORE_META], CORE_META_NEXT_SAMPLE);
    uint64_t end = 0;
    for (uint32_t i = 0; next && i < next->length && i < 8; i++)
        end |= (uint64_t)next->value[i] << 8 * i;
    for (uint64_t s = 0; s < end; s++)
        if (!proto_set_has(owned, (uint32_t)s))
            sim_violation(w, "sample %llu was handed out and is now nowhere", LLU(s));
    if (w->genesis.init_spent_count) { /* the cursor begins behind it, and is written when it moves */
        const struct msg_range *last = &w->init_spent[w->genesis.init_spent_count - 1];
        if (last->start + last->count > end) end = last->start + last->count;
    }
    for (uint64_t s = end; s < w->corpus.samples; s++)
        if (proto_set_has(owned, (uint32_t)s))
            sim_violation(w, "sample %llu is leased beyond the cursor %llu", LLU(s), LLU(end));
}

/* ---- a contribution: its bytes, and what it claims ------------------------------------------------ */

/* A residual is not flushed: a machine that died may have any mixture of old and new. */
static void read_residual(struct sim_world *w, const struct sim_disk *d, const char *name,
                          float *out) {
    const struct sim_file *f = sim_disk_find(d, name);
    memset(out, 0, w->elements * sizeof *out);
    if (f && f->bytes == w->elements * sizeof *out) memcpy(out, f->memory, f->bytes);
    for (uint32_t i = 0; i < w->elements; i++)
        if (!__builtin_isfinite(out[i])) out[i] = 0;
}

void oracle_start(struct sim_world *w, struct sim_member *m) {
    read_residual(w, &m->disk, "residual", m->residual);
    read_residual(w, &m->disk, "residual-next", m->residual_next);
    m->restarted = ~0u;
    oracle_hears_of_rewind(w, m, true);
}

/* What the contribution must be: anchor - local + residual, encoded. */
static void encode(struct sim_world *w, struct sim_member *m, uint32_t fragment) {
    struct sim_freeze *z = &m->freeze[fragment];
    enum outer_codec codec = (enum outer_codec)w->outer.contribution_codec;
    struct msg_digest_item leaves[SIM_CHUNKS_MAX];
    float x[SIM_ELEMENTS_MAX];
    struct err err;
    z->encodes = true;
    for (uint32_t k = 0; k < w->fragment_chunks[fragment]; k++) {
        uint32_t chunk = w->chunk_at[fragment][k], first = chunk * w->chunk_elements;
        uint32_t n = sim_chunk_elements(w, chunk);
        size_t offset, length = sim_encoded(w, fragment, k, (uint8_t)codec, &offset);
        outer_pseudo_gradient(x, sync_anchor(m->sync) + first,
                              m->trainer.frozen[fragment] + first,
                              codec == OUTER_FP32 ? NULL : m->residual + first, n);
        if (outer_encode(z->bytes + offset, x, n, codec, &err)) z->encodes = false;
        else if (codec != OUTER_FP32)
            outer_residual(m->residual_next + first, x, z->bytes + offset, length, n, codec, &err);
        leaves[k].digest = digest_leaf(k, z->bytes + offset, length);
    }
    z->root = digest_tree_root(leaves, w->fragment_chunks[fragment]);
}

/* As frozen: `as` is by value, for it may be one of those kept. */
static void keep_contribution(struct sim_world *w, uint32_t fragment, uint64_t round, const struct digest *root,
                              struct sim_contribution as) {
    uint32_t chunks = w->fragment_chunks[fragment];
    size_t offset, length = sim_encoded(w, fragment, chunks - 1, (uint8_t)w->outer.contribution_codec, &offset);
    if (w->contribution_count == w->contribution_capacity) {
        w->contribution_capacity = w->contribution_capacity ? 2 * w->contribution_capacity : 256;
        w->contributions =
            realloc(w->contributions, w->contribution_capacity * sizeof *w->contributions);
    }
    struct sim_contribution *x = &w->contributions[w->contribution_count++];
    *x = as;
    x->round = round;
    x->root = *root;
    x->bytes = malloc(offset + length);
    memcpy(x->bytes, as.bytes, offset + length);
    x->effect = malloc(chunks * sizeof *x->effect);
    memcpy(x->effect, as.effect, chunks * sizeof *x->effect);
}

static struct sim_contribution newest_frozen(struct sim_member *m, uint32_t fragment) {
    struct sim_freeze *z = &m->freeze[fragment];
    struct sim_contribution as = {.member = m->id, .slot = m->slot, .fragment = fragment, .freeze = z->number,
                                  .bytes = z->bytes, .effect = z->effect};
    memcpy(as.all, z->all, sizeof as.all);
    return as;
}

void oracle_frozen(struct sim_world *w, struct sim_member *m, uint32_t fragment) {
    struct sim_freeze *z = &m->freeze[fragment];
    struct sync_view v;
    sync_look(m->sync, &v);
    if (z->valid && !z->announced) /* an older disk may yet announce it */
        keep_contribution(w, fragment, SIM_UNANNOUNCED, &z->root, newest_frozen(m, fragment));
    z->announced = false;
    z->valid = true;
    z->number = ++w->freezes;
    z->known_head = v.head_index;
    for (uint32_t k = 0; k < w->fragment_chunks[fragment]; k++) {
        uint32_t chunk = w->chunk_at[fragment][k];
        memcpy(z->effect[k], m->trainer.effect[chunk], sizeof z->effect[k]);
        z->base[k] = m->trainer.base[chunk];
        z->anchor[k] = sync_chunk_version(m->sync, chunk);
    }
    z->based = z->anchor[0];
    memcpy(z->all, m->trainer.fragment_effect[fragment], sizeof z->all);
    z->samples = samples_count(z->all);
    sim_trace(w, "    %u: trainer freezes fragment %u with %llu samples", m->slot, fragment,
              LLU(z->samples));
    /* A new process may have had to give a contribution up without hearing that it was summed, and an older
     * disk has others: then only the member knows what it keeps. */
    if (m->restored || m->restarted >> fragment & 1)
        read_residual(w, &m->disk, "residual", m->residual);
    m->restarted &= ~(1u << fragment);
    encode(w, m, fragment);
}

/* The trainer takes over a chunk into which its work was summed: that work is the anchor's now. */
void oracle_mix(struct sim_world *w, struct sim_member *m, uint32_t chunk) {
    uint32_t f = w->fragment_of[chunk], k = w->place_of[chunk];
    uint64_t version = m->slot_versions[chunk];
    const struct digest *root = &m->freeze[f].root; /* a copied home has later ones of the same member */
    const struct sim_contribution *x = NULL;
    struct msg_entry e;
    struct msg_commit c;
    while (!x && version && version != UINT64_MAX && oracle_commit(w, version, &e, &c)) {
        for (uint32_t i = 0; i < c.contributors_count; i++)
            if (c.contributors[i].member == m->id && in_set(oracle_summed(&c, k), i) &&
                (m->lie || digest_equal(&c.contributors[i].root, root)))
                x = oracle_contribution(w, m->id, f, c.round, &c.contributors[i].root);
        version = c.base_index;
        proto_decoded_release(RECORD_commit, &c);
    }
    if (!x)
        sim_violation(w, "slot %u mixes chunk %u as if it had been summed there", m->slot, chunk);
    if (!samples_within(x->effect[k], m->trainer.effect[chunk]))
        sim_violation(w,
                      "slot %u mixes chunk %u for a contribution that its trainer's parameters do "
                      "not hold",
                      m->slot, chunk);
    samples_remove(m->trainer.effect[chunk], x->effect[k]);
    if (w->outer.alpha == 0) /* what was done since is not kept either */
        memset(m->trainer.effect[chunk], 0, sizeof m->trainer.effect[chunk]);
    samples_remove(m->trainer.fragment_effect[f], x->all);
}

/* Spent by what the member knew (`until` entries). */
static bool was_spent(const struct sim_world *w, uint32_t s, uint64_t until) {
    return proto_set_has(w->spent, s) && w->spent_at[s] <= until;
}

static void check_claims(struct sim_world *w, struct sim_member *m, const struct msg_ready *r) {
    const struct sim_freeze *z = &m->freeze[r->fragment];
    sim_samples claimed = {0};
    struct sync_view v;
    if (w->rewind_index && sync_ledger_count(m->sync) <= w->rewind_index) return; /* nobody hears it */
    sync_look(m->sync, &v);
    for (uint32_t i = 0; i < r->ranges_count; i++)
        for (uint64_t s = r->ranges[i].start; s < r->ranges[i].start + r->ranges[i].count; s++) {
            if (s >= w->corpus.samples || proto_set_has(claimed, (uint32_t)s))
                sim_violation(w, "slot %u claims sample %llu twice, or there is no such", m->slot,
                              LLU(s));
            proto_set_add(claimed, (uint32_t)s);
        }
    for (uint32_t s = 0; s < w->corpus.samples; s++) {
        bool effect = proto_set_has(z->all, s);
        if (proto_set_has(claimed, s)
                ? effect && !(was_spent(w, s, z->known_head) && w->owner[s] == m->id)
                : !effect || was_spent(w, s, v.head_index))
            continue;
        sim_violation(w, "slot %u, fragment %u round %llu: sample %u is %s", m->slot, r->fragment,
                      LLU(r->round), s,
                      !proto_set_has(claimed, s) ? "in the contribution and not claimed"
                      : effect                   ? "claimed although known to be spent"
                                                 : "claimed and not in the contribution");
    }
    if (r->samples != z->samples)
        sim_violation(w, "slot %u, fragment %u round %llu: %llu samples announced, %llu are in it",
                      m->slot, r->fragment, LLU(r->round), LLU(r->samples), LLU(z->samples));
}

static bool holds_bytes(const uint8_t *in, size_t in_length, const uint8_t *bytes, size_t length) {
    for (size_t at = 0; at + length <= in_length; at++)
        if (in[at] == bytes[0] && !memcmp(in + at, bytes, length)) return true;
    return false;
}

/* What a READY announces is on the disk, and would survive a loss of power. */
static bool is_durable(const struct sim_member *m, const char *prefix, const void *bytes,
                       size_t length) {
    for (uint32_t i = 0; i < m->disk.count; i++) {
        const struct sim_file *f = &m->disk.files[i];
        if (strncmp(f->name, prefix, strlen(prefix))) continue;
        if (holds_bytes(f->mapped ? f->durable : f->memory, f->bytes, bytes, length)) return true;
    }
    return false;
}

static bool keeps_bytes(const struct sim_world *w, const struct sim_member *m, uint32_t fragment,
                        const uint8_t *bytes) {
    for (uint32_t k = 0; k < w->fragment_chunks[fragment]; k++) {
        size_t offset,
            length = sim_encoded(w, fragment, k, w->outer.contribution_codec, &offset);
        if (!is_durable(m, "contribution", bytes + offset, length)) return false;
    }
    return true;
}

bool oracle_keeps_bytes(const struct sim_world *w, const struct sim_contribution *x) {
    return keeps_bytes(w, &w->member[x->slot], x->fragment, x->bytes);
}

/* What the trainer wrote is own work on the very anchor that it was subtracted from, and that is the one which the
 * contribution is based on. Or an older one: a contribution may miss the commit for which it was made, and anchor -
 * local is the same on the next base, but never across a rewind. */
static void check_base(struct sim_world *w, const struct sim_member *m, const struct msg_ready *r) {
    const struct sim_freeze *z = &m->freeze[r->fragment];
    for (uint32_t k = 0; k < r->chunks; k++) {
        bool older = z->base[k] == z->base[0] && z->base[k] < r->base_index && z->base[k] >= m->rewound;
        if (z->base[k] == z->anchor[k] && (z->base[k] == r->base_index || older)) continue;
        sim_violation(w,
                      "slot %u, fragment %u round %llu: its trainer has chunk %u of state %llu, the contribution is "
                      "based on %llu and made with %llu",
                      m->slot, r->fragment, LLU(r->round), k, LLU(z->base[k]), LLU(r->base_index),
                      LLU(z->anchor[k]));
    }
}

/* The leaves of what a shard's report promises stand in the file with its chunks. */
static void check_report(struct sim_world *w, struct sim_member *m,
                         const struct msg_shard_report *r) {
    for (uint32_t i = 0; i < r->results_count; i++)
        if (!digest_is_zero(&r->results[i].digest) &&
            !is_durable(m, "result", &r->results[i].digest, sizeof r->results[i].digest))
            sim_violation(w, "slot %u reports shard %u of fragment %u, which is not durable",
                          m->slot, r->shard, r->fragment);
}

/* Of one that an older disk, or a copy, announces for a later round, the newest freeze says nothing. */
static const struct sim_contribution *find_earlier(const struct sim_world *w, const struct sim_member *m,
                                                   const struct msg_ready *r) {
    for (uint32_t i = w->contribution_count; (m->restored || m->copy) && i--;) {
        const struct sim_contribution *x = &w->contributions[i];
        if (x->member == m->id && x->fragment == r->fragment &&
            (x->round < r->round || x->round == SIM_UNANNOUNCED) &&
            digest_equal(&x->root, &r->root))
            return x;
    }
    return NULL;
}

static void announce(struct sim_world *w, struct sim_member *m, const struct msg_ready *r,
                     struct sim_contribution as) {
    sim_trace(w, "    %u announces fragment %u round %llu: %u samples, %llu of them counted", m->slot,
              r->fragment, LLU(r->round), samples_count(as.all), LLU(r->samples));
    keep_contribution(w, r->fragment, r->round, &r->root, as);
}

void oracle_ready(struct sim_world *w, struct sim_member *m, const struct msg_ready *r) {
    struct sim_freeze *z = &m->freeze[r->fragment < w->fragments ? r->fragment : 0];
    if (r->fragment >= w->fragments)
        sim_violation(w, "slot %u is ready with fragment %u", m->slot, r->fragment);
    if (m->lie || digest_equal(&r->root, &z->root)) z->based = r->base_index;
    const struct sim_contribution *old =
        oracle_contribution(w, m->id, r->fragment, r->round, &r->root);
    /* The same one is announced again; or another one that happens to have the same bytes. */
    if (old && (old->freeze == z->number || !digest_equal(&r->root, &z->root))) return;
    const struct sim_contribution *earlier = digest_equal(&r->root, &z->root) ? NULL : find_earlier(w, m, r);
    if (earlier) {
        announce(w, m, r, *earlier);
        return;
    }
    if (!z->valid || r->chunks != w->fragment_chunks[r->fragment])
        sim_violation(w, "slot %u announces fragment %u, which its trainer never froze", m->slot,
                      r->fragment);
    if (!m->lie) {
        if (!digest_equal(&r->root, &z->root))
            sim_violation(w,
                          "slot %u, fragment %u round %llu: the contribution is not anchor - local "
                          "+ residual",
                          m->slot, r->fragment, LLU(r->round));
        check_base(w, m, r);
        check_claims(w, m, r);
        if (!keeps_bytes(w, m, r->fragment, z->bytes))
            sim_violation(w, "slot %u announces a contribution to fragment %u that is not durable",
                          m->slot, r->fragment);
    }
    z->announced = true;
    struct sim_contribution newest = newest_frozen(m, r->fragment);
    newest.lies = !digest_equal(&r->root, &z->root);
    announce(w, m, r, newest);
}

/* ---- what members tell the coordinator ------------------------------------------------------------- */

static void check_root(struct sim_world *w, const struct sim_member *m, const struct msg_root *r) {
    if (r->index >= SIM_ENTRIES_MAX) return;
    struct digest *seen = &w->root_seen[r->index];
    if (!digest_is_zero(seen) && !digest_equal(seen, &r->root))
        sim_violation(w, "slot %u shows another root of the state at %llu", m->slot, LLU(r->index));
    *seen = r->root;
}

/* Once, however often it is said. */
static void keep_report(struct sim_world *w, const struct sim_report *r) {
    for (uint32_t i = 0; i < SIM_REPORTS; i++)
        if (is_report(&w->reports[i], r->term, r->plan, r->member, r->shard) &&
            w->reports[i].count == r->count &&
            !memcmp(w->reports[i].leaf, r->leaf, r->count * sizeof *r->leaf))
            return;
    w->reports[w->report_count++ % SIM_REPORTS] = *r;
}

void oracle_to_core(struct sim_world *w, struct sim_member *m, uint8_t type, const struct frame *f,
                    const void *msg) {
    const struct msg_shard_report *s = msg;
    if (type == MSG_READY) oracle_ready(w, m, msg);
    if (type == MSG_ROOT) check_root(w, m, msg);
    if (type != MSG_SHARD_REPORT) return;
    check_report(w, m, s);
    struct sim_report r = {
        .term = f->term, .plan = s->plan, .member = m->id, .shard = s->shard};
    if (s->results_count <= SIM_CHUNKS_MAX) r.count = s->results_count;
    for (uint32_t i = 0; i < r.count; i++) r.leaf[i] = s->results[i].digest;
    keep_report(w, &r);
}

/* The coordinator asks a member to sum a chunk again. */
void oracle_audit_asked(struct sim_world *w, uint64_t term, uint64_t plan,
                        const struct msg_audit *a) {
    w->audits[w->audit_count++ % 64] = (struct sim_audit){.term = term,
                                                          .plan = plan,
                                                          .chunk = a->chunk,
                                                          .auditor = a->auditor,
                                                          .set = digest_of(a->set.data,
                                                                           a->set.length)};
}

void oracle_received(struct sim_world *w, struct sim_member *m, const struct frame *f,
                     const void *msg) {
    const struct msg_audit_report *r = msg;
    if (f->type != MSG_AUDIT_REPORT || m->lie) return;
    w->injected[SIM_AUDIT]++;
    for (uint32_t i = 0; i < 64 && r->complete && !r->culprit; i++) {
        struct sim_audit *a = &w->audits[i];
        if (a->plan != f->plan || a->term != f->term || a->chunk != r->chunk ||
            a->auditor != m->id)
            continue;
        a->reported = true;
        a->leaf = r->leaf;
    }
}

/* ---- who is alive ------------------------------------------------------------------------------------ */

void oracle_arrived(struct sim_world *w, const struct sim_event *e) {
    struct sim_conn *c = sim_conn_find(w, e->conn);
    union sim_record record;
    if (!c || !c->open || e->frame.type != MSG_HEARTBEAT) return; /* of a session that is over: late, and no sign */
    sim_decode(w, e, &record);
    const struct msg_heartbeat *b = (const void *)&record;
    bool works = b->phase == PHASE_TRAINING || b->phase == PHASE_APPLYING;
    c->heard_at = w->now;
    if (b->progress != c->progress || !works) c->moved_at = w->now;
    c->progress = b->progress;
    w->member[c->member].heard_at = c->heard_at;
    w->member[c->member].moved_at = c->moved_at;
    w->member[c->member].heard_by = c->core;
    proto_decoded_release(RECORD_heartbeat, &record);
}

/* A member whose heartbeats came in time is not lost, whatever its coordinator was doing meanwhile. */
void oracle_closed(struct sim_world *w, const struct sim_conn *c, enum err_code code) {
    uint64_t limit = w->outer.silence_ms_max;
    if (code != ERR_TIMEOUT || w->now - c->heard_at >= limit || w->now - c->moved_at >= limit) return;
    sim_violation(w, "slot %u is given up for silence, its last heartbeat came %llu ms ago", c->member,
                  LLU(w->now - c->heard_at));
}

static bool is_paused(struct sim_world *w) {
    struct sim_row *paused = sim_row_find(&w->store.table[CORE_META], CORE_META_PAUSED);
    return paused && paused->length && paused->value[0];
}

bool oracle_has_ended(struct sim_world *w) {
    if (!w->outer.fixed_membership || sim_has(w, SIM_OPERATOR_PAUSE) || !is_paused(w)) return false;
    w->injected[SIM_FAILED]++;
    return w->failed = true;
}

/* The run has failed: the store says that nobody goes on. */
void oracle_ended(struct sim_world *w, const char *why) {
    if (!is_paused(w))
        sim_violation(w, "the run has failed and is not paused: %s", why);
    w->injected[SIM_FAILED]++;
    w->failed = true;
}

/* ... because a trainer of a fixed membership is gone, as this coordinator sees it. */
void oracle_failed(struct sim_world *w, const struct sim_core *core, const char *why) {
    uint64_t limit = w->outer.silence_ms_max;
    bool gone = false;
    for (uint32_t i = 1; i < w->members; i++) {
        const struct sim_member *m = &w->member[i];
        gone |= m->id && (m->left || m->heard_by != core->number ||
                          w->now - m->heard_at >= limit || w->now - m->moved_at >= limit);
    }
    if (!w->outer.fixed_membership || !gone) sim_violation(w, "the run has failed: %s", why);
    oracle_ended(w, why);
}

static bool goes_by_right(const struct sim_world *w, uint32_t id) {
    for (uint32_t i = 1; i < w->members; i++)
        if (w->member[i].id == id && (w->member[i].left || w->member[i].revoked)) return true;
    return false;
}

/* Where it gives a trainer up, the run has failed in the same step. */
void oracle_stepped(struct sim_world *w, const struct sim_core *core) {
    struct core_view v;
    struct core_member_view m;
    uint64_t before = w->live_of == core->number ? w->live : 0;
    w->live = 0;
    w->live_of = core->number;
    core_look(core->core, w->now, &v);
    for (uint32_t i = 0; i < core_member_count(core->core); i++) {
        core_member_look(core->core, i, w->now, &m);
        if (m.live && m.trains) w->live |= 1ull << i;
        else if (before >> i & 1 && !m.live && !goes_by_right(w, m.member) && strcmp(v.phase, "complete"))
            sim_violation(w, "member %u of a fixed membership was given up, and the run goes on", m.member);
    }
}
