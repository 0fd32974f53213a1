/* core_resum.c - a commit that no live member has applied, and whose results nobody holds any more:
 * the contributors still have their bytes, and the commit says who was summed in each chunk. So the
 * lost shards are summed again, to the very same bits, under a plan of their own. */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

#define LLU(x) ((unsigned long long)(x))
#define TELL_EVERY_MS 60000u

static bool is_lost(const struct core *c, uint32_t id) {
    const struct member *m = core_member(c, id);
    return !m || !m->here || !core_in_good_standing(m);
}

static bool covers(const struct msg_shard *shards, uint32_t count, const struct core *c,
                   uint32_t chunk) {
    for (uint32_t i = 0; i < count; i++)
        if (chunk >= shards[i].first && chunk - shards[i].first < shards[i].count &&
            (!is_lost(c, shards[i].aggregator) || !is_lost(c, shards[i].holder)))
            return true;
    return false;
}

/* The next run of chunks at or after *first whose results nobody live holds; false: there is none. */
static bool find_unheld(const struct core *c, const struct state *s, uint32_t *first,
                        uint32_t *count) {
    uint32_t chunks = c->rounds[s->commit->fragment].chunks, i = *first;
    const struct msg_commit *k = s->commit;
    *count = 0;
    for (; i < chunks; i++) {
        bool held = (!s->forsaken && covers(k->shards, k->shards_count, c, i)) ||
                    covers(s->resummed, s->resummed_count, c, i);
        if (!held && !(*count)++) *first = i;
        if (held && *count) break;
    }
    return *count > 0;
}

static bool is_applied(const struct core *c, const struct state *s) {
    for (uint32_t i = 0; i < c->member_count; i++) {
        const struct member *m = &c->members[i];
        if (m->here && core_in_good_standing(m) && m->has_root && m->root_index >= s->index)
            return true;
    }
    return false;
}

/* Does a live member have the state, or the results of every chunk? */
static bool is_reachable(const struct core *c, const struct state *s) {
    uint32_t first = 0, count;
    return is_applied(c, s) || !find_unheld(c, s, &first, &count);
}

static struct state *find_oldest(const struct core *c,
                                 bool (*has)(const struct core *, const struct state *)) {
    for (uint32_t i = 0; i < c->state_count; i++) {
        struct state *s = &c->states[i];
        if (s->commit && s->index > c->settled_index && !s->undone && !has(c, s)) return s;
    }
    return NULL;
}

/* The oldest commit that nobody can apply any more; those after it hang on it. */
static struct state *find_lost(const struct core *c) { return find_oldest(c, is_reachable); }

/* Where nobody can apply a commit although its holders are here, these have lost what they reported:
 * with an older disk, say. */
static void forsake_holders(struct core *c, uint64_t now_ms, struct core_actions *out) {
    struct state *s = core_live_count(c) ? find_oldest(c, is_applied) : NULL;
    uint64_t index = s ? s->index : 0;
    if (index != c->resum.unapplied_index) {
        c->resum.unapplied_index = index;
        c->resum.unapplied_ms = now_ms;
    }
    if (!s || (s->forsaken && !s->resummed_count) ||
        now_ms - c->resum.unapplied_ms < CORE_REPORT_SILENCES * (uint64_t)c->outer->silence_ms_max)
        return;
    c->resum.unapplied_ms = now_ms;
    s->forsaken = true;
    s->resummed_count = 0;
    core_log(out, CORE_WARNING,
             "nobody has applied the commit at ledger %llu, although its holders are here", LLU(index));
}

/* Contributors of lost shards that are away: who, in words. True if there are none. */
static bool all_are_here(const struct core *c, const struct msg_commit *k, char *names, size_t size) {
    uint8_t set[PROTO_SET_BYTES_MAX];
    size_t length = 0;
    core_summed_union(k->summed, k->summed_count, set);
    names[0] = '\0';
    for (uint32_t i = 0; i < k->contributors_count; i++) {
        const struct member *m = core_member(c, k->contributors[i].member);
        if (!proto_set_has(set, i) || m->conn) continue;
        int n = snprintf(names + length, size - length, "%s%u (%.20s)", length ? ", " : "", m->id,
                         m->name);
        if (n > 0 && length + (size_t)n < size) length += (size_t)n;
    }
    return names[0] == '\0';
}

static void tell_operator(struct core *c, const struct state *s, const char *names, uint64_t now_ms,
                          struct core_actions *out) {
    if (c->resum.told_ms && now_ms - c->resum.told_ms < TELL_EVERY_MS) return;
    c->resum.told_ms = now_ms;
    core_log(out, CORE_ERROR,
             "the results of the commit at ledger %llu are lost; members %.80s could bring them "
             "back; if they never come: intellect-coordinator rewind DIR INDEX",
             LLU(s->index), names[0] ? names : "(two that are reachable)");
}

static void begin_resum(struct core *c, struct state *s, uint64_t now_ms, struct core_actions *out) {
    const struct msg_commit *k = s->commit;
    struct plan *p = &c->resum.plan;
    struct shard_choice choice = {
        .round = &c->rounds[k->fragment], .attempts = c->resum.attempts, .behind = true};
    core_forget_plan(p);
    *p = (struct plan){.fragment = k->fragment,
                       .round = k->round,
                       .base_index = k->base_index,
                       .resum = s->index,
                       .grid_exponent = k->grid_exponent,
                       .codec = k->codec};
    for (uint32_t first = 0, count; find_unheld(c, s, &first, &count); first += count) {
        if (core_assign_shards(c, &choice, first, count, p)) continue;
        core_forget_plan(p);
        tell_operator(c, s, "", now_ms, out);
        return;
    }
    p->contributors = calloc(k->contributors_count, sizeof *p->contributors);
    assert(p->contributors && p->shard_count);
    memcpy(p->contributors, k->contributors, k->contributors_count * sizeof *p->contributors);
    p->contributor_count = k->contributors_count;
    p->number = ++c->plan;
    p->deadline_ms = core_deadline(c, c->resum.attempts, now_ms);
    core_log(out, CORE_WARNING,
             "plan %llu: the results of the commit at ledger %llu are lost and summed again, %u "
             "shards",
             LLU(p->number), LLU(s->index), p->shard_count);
    core_send_plan_to_all(c, p, out);
}

static bool is_hopeless(const struct core *c, const struct plan *p) {
    for (uint32_t i = 0; i < p->shard_count; i++)
        if (is_lost(c, p->shards[i].where.aggregator) || is_lost(c, p->shards[i].where.holder))
            return true;
    return false;
}

void core_check_resum(struct core *c, uint64_t now_ms, struct core_actions *out) {
    char names[120];
    struct plan *p = &c->resum.plan;
    if (p->resum) {
        const struct state *s = core_find_state(c, p->resum);
        bool late = now_ms >= p->deadline_ms || is_hopeless(c, p);
        if (!late && s && s->commit && !is_reachable(c, s)) return;
        if (late) c->resum.attempts++;
        core_forget_plan(p);
    }
    /* After a start of ours members need their time to come back. */
    if (now_ms - c->start_ms < c->outer->silence_ms_max || core_awaits_entries(c)) return;
    forsake_holders(c, now_ms, out);
    struct state *s = core_live_count(c) ? find_lost(c) : NULL;
    if (!s) {
        c->resum.attempts = 0;
        return;
    }
    if (all_are_here(c, s->commit, names, sizeof names))
        begin_resum(c, s, now_ms, out);
    else
        tell_operator(c, s, names, now_ms, out);
}

/* ---- reports -------------------------------------------------------------------------------- */

/* Every chunk must be the sum of those the commit names, and of nobody else. */
static bool matches_commit(const struct msg_commit *k, const struct shard *s,
                           const struct msg_shard_report *r) {
    for (uint32_t i = 0; i < s->where.count; i++) {
        const struct msg_summed *now =
            core_summed_at(r->summed, r->summed_count, s->where.first, s->where.first + i);
        const struct msg_summed *then =
            core_summed_at(k->summed, k->summed_count, 0, s->where.first + i);
        if (!now || !then || !core_same_set(now, then)) return false;
    }
    return true;
}

static bool is_good(const struct msg_commit *k, const struct shard *s) {
    const struct msg_shard_report *a = &s->reports[BY_AGGREGATOR], *b = &s->reports[BY_HOLDER];
    return core_reports_differ(a, b) == 0 && matches_commit(k, s, a);
}

static void add_holders(struct state *s, const struct plan *p) {
    s->holders = realloc(s->holders, (s->holder_count + 2 * p->shard_count) * sizeof *s->holders);
    s->resummed = realloc(s->resummed, (s->resummed_count + p->shard_count) * sizeof *s->resummed);
    assert(s->holders && s->resummed);
    for (uint32_t i = 0; i < p->shard_count; i++) {
        s->resummed[s->resummed_count++] = p->shards[i].where;
        s->holders[s->holder_count++] = p->shards[i].where.aggregator;
        s->holders[s->holder_count++] = p->shards[i].where.holder;
    }
}

void core_resum_reported(struct core *c, uint64_t now_ms, struct core_actions *out) {
    struct plan *p = &c->resum.plan;
    struct state *s = core_find_state(c, p->resum);
    (void)now_ms;
    if (!core_held_twice(p)) return;
    bool good = s && s->commit;
    for (uint32_t i = 0; i < p->shard_count && good; i++) good = is_good(s->commit, &p->shards[i]);
    if (!good) {
        core_log(out, CORE_ERROR, "plan %llu: not the sums of the commit at ledger %llu; once more",
                 LLU(p->number), LLU(p->resum));
        c->resum.attempts++;
        core_forget_plan(p);
        return;
    }
    add_holders(s, p);
    core_log(out, CORE_INFO, "the results of the commit at ledger %llu are held again", LLU(s->index));
    core_forget_plan(p);
    for (uint32_t i = 0; i < c->member_count; i++)
        if (c->members[i].conn) core_send_holders(c, s, &c->members[i], out);
}
