/* rewind.c - checkpoints as an object store keeps them, the operator's rewind to one of them between two
 * runs of the coordinator, and what the oracle expects of a run that went back. */
#include "tests/sim/sim.h"

#include <stdlib.h>
#include <string.h>

/* ---- checkpoints ------------------------------------------------------------------------------- */

static const struct sim_checkpoint *find_checkpoint(const struct sim_world *w, uint64_t index) {
    for (uint32_t i = w->checkpoints_kept; i--;)
        if (w->kept[i].index == index) return &w->kept[i];
    return NULL;
}

/* The bytes are those of now, while the writer takes its time. One that is never signed is never named. */
void sim_checkpoint_keep(struct sim_world *w, const struct sim_member *m, uint64_t index) {
    size_t bytes = w->elements * sizeof(float);
    if (w->checkpoints_kept == SIM_CHECKPOINTS_MAX) {
        free(w->kept[0].values);
        memmove(w->kept, w->kept + 1, --w->checkpoints_kept * sizeof *w->kept);
    }
    struct sim_checkpoint *k = &w->kept[w->checkpoints_kept++];
    *k = (struct sim_checkpoint){index, malloc(2 * bytes)};
    memcpy(k->values, sync_anchor(m->sync), bytes);
    memcpy(k->values + w->elements, sync_momentum(m->sync), bytes);
}

/* In half of the runs only the coordinator's own node can read the store; in a third reading it takes a while. */
int sim_checkpoint_load(const struct sim_world *w, const struct sim_member *m,
                        const struct msg_checkpoint *from, uint64_t first, size_t n, float *anchor,
                        float *momentum, struct err *err) {
    const struct sim_checkpoint *k = find_checkpoint(w, from->at_index);
    if (!k || (m->slot && w->seed % 2)) return err_set(err, ERR_NOT_FOUND, "no checkpoint here");
    if (w->seed % 3 == 0 && w->now / 500 % 4) return err_set(err, ERR_TIMEOUT, "is being read");
    memcpy(anchor, k->values + first, n * sizeof *anchor);
    memcpy(momentum, k->values + w->elements + first, n * sizeof *momentum);
    return 0;
}

void sim_checkpoints_release(struct sim_world *w) {
    for (uint32_t i = 0; i < w->checkpoints_kept; i++) free(w->kept[i].values);
}

/* ---- the ledger, read backwards ------------------------------------------------------------------ */

/* False where the entry is none; release r with proto_decoded_release() after true. */
static bool is_rewind(struct sim_world *w, uint64_t index, struct msg_rewind *r) {
    struct msg_entry e;
    struct err err;
    if (proto_decode(w->entry_bytes[index], w->entry_length[index], RECORD_entry, &e, &err))
        sim_violation(w, "ledger entry %llu: %s", LLU(index), err.msg);
    if (e.kind != LEDGER_REWIND) return false;
    if (proto_decode(e.body.data, e.body.length, RECORD_rewind, r, &err) || r->to_count != 1)
        sim_violation(w, "rewind %llu: %s", LLU(index), err.msg);
    return true;
}

static bool is_checkpoint(struct sim_world *w, uint64_t index, struct msg_checkpoint *c) {
    struct msg_entry e;
    struct err err;
    if (proto_decode(w->entry_bytes[index], w->entry_length[index], RECORD_entry, &e, &err))
        sim_violation(w, "ledger entry %llu: %s", LLU(index), err.msg);
    if (e.kind != LEDGER_CHECKPOINT) return false;
    if (proto_decode(e.body.data, e.body.length, RECORD_checkpoint, c, &err))
        sim_violation(w, "checkpoint %llu: %s", LLU(index), err.msg);
    return true;
}

/* The commit that made the fragment what it is in the state at `index`, whatever was undone before. */
static uint64_t commit_at(struct sim_world *w, uint32_t fragment, uint64_t index) {
    struct msg_entry e;
    struct msg_commit c;
    struct msg_rewind r;
    for (uint64_t i = index; i; i--) {
        if (oracle_commit(w, i, &e, &c)) {
            bool found = c.fragment == fragment;
            proto_decoded_release(RECORD_commit, &c);
            if (found) return i;
        } else if (is_rewind(w, i, &r)) {
            i = r.to->at_index + 1;
            proto_decoded_release(RECORD_rewind, &r);
        }
    }
    return 0;
}

/* ---- what the oracle expects ---------------------------------------------------------------------- */

/* Whose work is in the chunk, from the commit it goes back to on. */
static void effects_of(struct sim_world *w, uint32_t chunk, uint64_t version) {
    uint32_t f = w->fragment_of[chunk], k = w->place_of[chunk];
    struct msg_entry e;
    struct msg_commit c;
    memset(w->in_chunk[chunk], 0, sizeof w->in_chunk[chunk]);
    while ((version = commit_at(w, f, version)) && oracle_commit(w, version, &e, &c)) {
        const struct msg_summed *s = oracle_summed(&c, k);
        for (uint32_t i = 0; i < c.contributors_count; i++) {
            if (i / 8 >= s->set.length || !proto_set_has(s->set.data, i)) continue;
            const struct sim_contribution *x = oracle_contribution(
                w, c.contributors[i].member, f, c.round, &c.contributors[i].root);
            if (x) samples_add(w->in_chunk[chunk], x->effect[k]);
        }
        version = c.base_index;
        proto_decoded_release(RECORD_commit, &c);
    }
}

/* Under its new version the chunk has the bits it had then. */
static void state_again(struct sim_world *w, uint32_t chunk, uint64_t then, uint64_t index) {
    const struct sim_state *old = oracle_state(w, chunk, then);
    if (old && !oracle_state(w, chunk, index)) oracle_keep_state(w, old->slot, chunk, index, old->values);
}

static uint64_t tokens_at(struct sim_world *w, uint64_t index) {
    uint64_t tokens = 0;
    for (uint32_t s = 0; s < w->corpus.samples; s++)
        if (proto_set_has(w->spent, s) && w->spent_at[s] <= index) tokens += w->model.sequence;
    return tokens;
}

/* Rounds count on; everything else is as in the state at r->to->at_index. */
static void go_back(struct sim_world *w, uint64_t index, const struct msg_checkpoint *to) {
    if (to->tokens_committed != tokens_at(w, to->at_index))
        sim_violation(w, "rewind %llu: %llu tokens in the state at %llu, the checkpoint says %llu",
                      LLU(index), LLU(tokens_at(w, to->at_index)), LLU(to->at_index),
                      LLU(to->tokens_committed));
    if (!digest_is_zero(&w->root_seen[to->at_index]) &&
        !digest_equal(&w->root_seen[to->at_index], &to->state_root))
        sim_violation(w, "rewind %llu: nobody had this root at %llu", LLU(index), LLU(to->at_index));
    for (uint32_t s = 0; s < w->corpus.samples; s++)
        if (w->spent_at[s] > to->at_index) proto_set_del(w->spent, s);
    for (uint32_t c = 0; c < w->chunks; c++) {
        effects_of(w, c, to->at_index);
        state_again(w, c, commit_at(w, w->fragment_of[c], to->at_index), index);
    }
    for (uint32_t f = 0; f < w->fragments; f++) w->base_index[f] = index;
    w->tokens_committed = to->tokens_committed;
    w->root_seen[index] = to->state_root;
    w->rewind_index = index;
    if (w->rewind_count == SIM_REWINDS_MAX)
        sim_violation(w, "more than %d rewinds", SIM_REWINDS_MAX);
    w->rewinds[w->rewind_count++] = index;
    memcpy(w->destroyed_rounds, w->next_round, sizeof w->destroyed_rounds);
}

void oracle_rewind(struct sim_world *w, uint64_t index) {
    struct msg_rewind r;
    if (!is_rewind(w, index, &r)) return;
    sim_trace(w, "entry %llu goes back to the state at %llu", LLU(index), LLU(r.to->at_index));
    go_back(w, index, r.to);
    proto_decoded_release(RECORD_rewind, &r);
}

/* Error feedback of what never was is forgotten when a member hears of it. */
void oracle_hears_of_rewind(struct sim_world *w, struct sim_member *m, bool starts) {
    uint64_t knows = 0;
    for (uint32_t i = 0; i < w->rewind_count; i++)
        if (w->rewinds[i] < sync_ledger_count(m->sync)) knows = w->rewinds[i];
    if (knows > m->rewound && !starts) memset(m->residual, 0, sizeof m->residual);
    m->rewound = knows;
}

/* ---- the operator ------------------------------------------------------------------------------ */

/* A checkpoint that is none of those an earlier rewind has undone, with something to undo. */
static bool choose_target(struct sim_world *w, struct msg_checkpoint *out) {
    struct msg_checkpoint c;
    struct msg_rewind r;
    uint64_t newest = 0, found = 0;
    for (uint32_t f = 0; f < w->fragments; f++)
        if (w->base_index[f] > newest) newest = w->base_index[f];
    for (uint64_t i = w->truth_count - 1, limit = newest; i; i--) {
        if (is_rewind(w, i, &r)) {
            if (r.to->at_index < limit) limit = r.to->at_index + 1;
            proto_decoded_release(RECORD_rewind, &r);
        } else if (is_checkpoint(w, i, &c) && c.at_index < limit && find_checkpoint(w, c.at_index) &&
                   sim_random(w, ++found) == 0) {
            *out = c; /* its text lies in the entry's bytes, which stay */
        }
    }
    return found;
}

static bool may_rewind(struct sim_world *w, const struct sim_core *core) {
    struct core_view v = {0};
    if (!core || w->cores[w->active ^ 1].core || w->taking_over) return false;
    if (w->truth_count != w->store.table[CORE_LEDGER].count) return false;
    for (uint32_t i = 1; i < w->members; i++) /* whom it let go is not there to train again */
        if (w->member[i].complete && !w->member[i].left && !w->member[i].revoked) return false;
    core_look(core->core, w->now, &v);
    return strcmp(v.phase, "complete") != 0;
}

/* As cmd_rewind.c: the coordinator is stopped, one transaction voids all leases and appends the entry. */
void sim_rewind(struct sim_world *w) {
    struct sim_core *core = sim_core_active(w);
    struct msg_checkpoint to;
    if (!may_rewind(w, core) || !choose_target(w, &to)) return;
    sim_trace(w, "the operator rewinds to the state at %llu", LLU(to.at_index));
    w->injected[SIM_REWIND]++;
    sim_core_kill(w, core, false);
    w->store.term += 1 + sim_random(w, 1000);
    w->taking_over = true; /* samples are in no row until a coordinator starts */
    while (w->store.table[CORE_LEASE].count) {
        struct core_write gone = {.table = CORE_LEASE, .key = w->store.table[CORE_LEASE].rows[0].key};
        sim_store_write(w, w->store.term, &gone);
    }
    struct msg_rewind body = {.to = &to, .to_count = 1, .reason = proto_str("the simulator's word")};
    sim_write_entry(w, w->store.term, LEDGER_REWIND, RECORD_rewind, &body);
    sim_schedule(w, 200 + sim_random(w, 3000), SIM_CORE_START, SIM_COORDINATOR);
}
