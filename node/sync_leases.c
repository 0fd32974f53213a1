/* sync_leases.c - samples: what is leased to this member, what of it the trainer got, and what
 * is in its uncommitted work. The coordinator's list is the truth about leases; the order in
 * which the trainer consumes them is ours, because the list comes sorted by lease. */
#include <string.h>

#include "node/sync_internal.h"

uint64_t leases_used(const struct sync *s) {
    uint64_t n = 0;
    for (uint32_t i = 0; i < s->leases.count; i++)
        n += s->leases.grant[i].used - s->leases.grant[i].start;
    return n;
}

uint64_t leases_queued(const struct sync *s) {
    uint64_t n = 0;
    for (uint32_t i = 0; i < s->leases.count; i++)
        n += s->leases.grant[i].sent - s->leases.grant[i].used;
    return n;
}

static struct grant *find_grant(struct leases *l, uint64_t lease, uint32_t generation) {
    for (uint32_t i = 0; i < l->count; i++)
        if (l->grant[i].lease == lease && l->grant[i].generation == generation) return &l->grant[i];
    return NULL;
}

static const struct msg_lease *find_in(const struct msg_lease *list, uint32_t count, uint64_t lease,
                                       uint32_t generation) {
    for (uint32_t i = 0; i < count; i++)
        if (list[i].lease == lease && list[i].generation == generation) return &list[i];
    return NULL;
}

/* Samples nobody trained on yet. */
static uint64_t unused(const struct sync *s) {
    uint64_t n = 0;
    for (uint32_t i = 0; i < s->leases.count; i++)
        if (!s->leases.grant[i].blocked) n += s->leases.grant[i].end - s->leases.grant[i].used;
    return n;
}

/* Where the claims of our frozen contributions to the lease end; 0: they claim nothing of it. */
static uint64_t claimed_end(const struct sync *s, uint64_t lease, uint32_t generation) {
    uint64_t end = 0;
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        const struct contribution *c = &s->contribution[f];
        const struct msg_lease *r = c->frozen ? find_in(c->ready.ranges, c->ready.ranges_count,
                                                        lease, generation)
                                              : NULL;
        if (r && r->start + r->count > end) end = r->start + r->count;
    }
    return end;
}

uint64_t leases_unfrozen(const struct sync *s) {
    uint64_t n = 0;
    for (uint32_t i = 0; i < s->leases.count; i++) {
        const struct grant *g = &s->leases.grant[i];
        uint64_t end = claimed_end(s, g->lease, g->generation);
        if (end < g->floor) end = g->floor;
        if (g->used > end) n += g->used - end;
    }
    return n;
}

/* ---- taking the coordinator's list ------------------------------------------------------ */

/* Did samples of it reach the trainer? Then they are in its parameters or will be. */
static bool touched(const struct grant *g) { return g->sent > g->floor; }

static void advance(struct grant *g, uint64_t start) {
    if (g->start < start) g->start = start;
    if (g->floor < g->start) g->floor = g->start;
    if (g->used < g->floor) g->used = g->floor;
    if (g->sent < g->used) g->sent = g->used;
}

/* What the entry says is ours is what we think it is: its end may be nearer, as long as nothing of what
 * is in work is beyond it; its start further where commits spent what we forgot that they did. */
static bool agrees(const struct grant *g, const struct msg_lease *e) {
    return e && e->start <= g->used && e->start + e->count >= g->sent;
}

/* The lease is not ours any more: contributions that claim unspent samples of it are void. */
static void drop_claims(struct sync *s, const struct grant *g) {
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        const struct contribution *c = &s->contribution[f];
        const struct msg_lease *r = c->frozen ? find_in(c->ready.ranges, c->ready.ranges_count,
                                                        g->lease, g->generation)
                                              : NULL;
        if (!r || r->start + r->count <= g->start) continue;
        sync_log(s, SYNC_WARNING,
                 "our contribution to fragment %u is void: lease %llu is no longer ours", f,
                 (unsigned long long)g->lease);
        s->refused++;
        contribution_drop(s, f);
    }
}

static void add_grant(struct leases *l, const struct msg_lease *e) {
    if (l->count == PROTO_LEASES_MAX)
        return; /* held, but not used: the list has no more than that itself */
    l->grant[l->count++] = (struct grant){.lease = e->lease,
                                          .generation = e->generation,
                                          .start = e->start,
                                          .floor = e->start,
                                          .used = e->start,
                                          .sent = e->start,
                                          .end = e->start + e->count};
}

static void take_list(struct sync *s, const struct msg_lease *list, uint32_t count) {
    struct leases *l = &s->leases;
    bool lost = false;
    uint32_t kept = 0;
    for (uint32_t i = 0; i < l->count; i++) {
        struct grant g = l->grant[i];
        const struct msg_lease *e = find_in(list, count, g.lease, g.generation);
        if (SYNC_HAS_FAULT(CLAIMS_KEPT) && !e && touched(&g)) {
            l->grant[kept++] = g;
            continue;
        }
        if (agrees(&g, e)) {
            advance(&g, e->start);
            g.end = e->start + e->count;
            if (g.start < g.end) l->grant[kept++] = g;
            continue;
        }
        lost |= touched(&g);
        s->account.lost[SYNC_LOSS_LEASES] += g.used - g.start;
        drop_claims(s, &g);
    }
    l->count = kept;
    for (uint32_t i = 0; i < count; i++)
        if (list[i].count && !find_grant(l, list[i].lease, list[i].generation))
            add_grant(l, &list[i]);
    if (lost) trainer_lose_work(s, SYNC_LOSS_LEASES, "a lease its work came from is no longer ours");
    else leases_orphan_decided(s);
}

/* Is there anything in the list that we did not have? */
static bool grants_more(struct leases *l, const struct msg_lease *list, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        const struct grant *g = find_grant(l, list[i].lease, list[i].generation);
        if (!g || list[i].start + list[i].count > g->end) return true;
    }
    return false;
}

static bool list_makes_sense(const struct msg_leases *msg) {
    for (uint32_t i = 0; i < msg->leases_count; i++)
        if (msg->leases[i].count > UINT64_MAX - msg->leases[i].start) return false;
    return true;
}

void leases_on_list(struct sync *s, const struct msg_leases *msg) {
    struct leases *l = &s->leases;
    if (!s->config.trains || !list_makes_sense(msg)) return;
    bool more = grants_more(l, msg->leases, msg->leases_count);
    l->known = true;
    if (more) l->dry = false;
    else if (l->asked) l->dry = true;
    l->asked = false;
    take_list(s, msg->leases, msg->leases_count);
}

/* ---- using ------------------------------------------------------------------------------ */

static void spend(struct sync *s, const struct msg_spend *e) {
    struct leases *l = &s->leases;
    struct grant *g = e->member == s->config.member ? find_grant(l, e->lease, e->generation) : NULL;
    if (!g || e->count > UINT64_MAX - e->start) return;
    advance(g, e->start + e->count);
    if (g->start < g->end) return;
    memmove(g, g + 1, (size_t)(l->grant + l->count - (g + 1)) * sizeof *g);
    l->count--;
}

/* Is it spent through a contribution that we do not have any more (an older disk, a copied home), while
 * our trainer works on it again? */
static bool is_worked_on(struct sync *s, const struct commit *c, const struct msg_spend *e) {
    const struct contribution *own = &s->contribution[c->body.fragment];
    struct grant *g = e->member == s->config.member
                          ? find_grant(&s->leases, e->lease, e->generation)
                          : NULL;
    if (!g || !touched(g) || e->start + e->count <= g->floor) return false;
    return !own->frozen || commit_contributor(c, s->config.member, &own->ready.root) < 0;
}

void leases_spend(struct sync *s, const struct commit *c) {
    bool again = false;
    for (uint32_t i = 0; i < c->body.spent_count; i++)
        again |= is_worked_on(s, c, &c->body.spent[i]);
    for (uint32_t i = 0; i < c->body.spent_count; i++) spend(s, &c->body.spent[i]);
    if (again)
        trainer_lose_work(s, SYNC_LOSS_LEASES, "its samples were spent through a contribution that is lost");
}

struct msg_lease leases_left(struct sync *s, const struct msg_lease *claim) {
    const struct grant *g = find_grant(&s->leases, claim->lease, claim->generation);
    struct msg_lease left = *claim;
    uint64_t end = claim->start + claim->count;
    if (g && g->start > left.start) left.start = g->start;
    left.count = g && end > left.start ? end - left.start : 0;
    return left;
}

/* Of a lease that two contributions claim, the longer prefix. */
void leases_restore(struct sync *s, const struct msg_ready *ready) {
    struct leases *l = &s->leases;
    for (uint32_t i = 0; i < ready->ranges_count; i++) {
        const struct msg_lease *r = &ready->ranges[i];
        struct grant *g = find_grant(l, r->lease, r->generation);
        if (r->count == 0 || r->count > UINT64_MAX - r->start) continue;
        if (!g) add_grant(l, r);
        else if (g->start > r->start) g->start = r->start;
        g = find_grant(l, r->lease, r->generation);
        if (g && g->end < r->start + r->count) g->end = r->start + r->count;
        if (g) g->floor = g->used = g->sent = g->end, g->blocked = true;
    }
    struct commit *c;
    for (uint32_t i = SYNC_COMMITS_KEPT; i-- > 0;)
        if ((c = ledger_recent(s, i)) && c->index > ready->base_index) leases_spend(s, c);
}

void leases_restart(struct sync *s) {
    for (uint32_t i = 0; i < s->leases.count; i++) {
        struct grant *g = &s->leases.grant[i];
        uint64_t claimed = claimed_end(s, g->lease, g->generation);
        g->floor = claimed > g->start ? claimed : g->start;
        if (g->floor > g->end) g->floor = g->end;
        g->used = g->sent = g->floor;
        g->blocked = g->start < g->floor;
    }
}

void leases_orphan_decided(struct sync *s) {
    for (uint32_t i = 0; i < s->leases.count; i++) {
        struct grant *g = &s->leases.grant[i];
        uint64_t claimed = claimed_end(s, g->lease, g->generation);
        if (!g->blocked || claimed >= g->floor) continue;
        uint64_t kept = claimed > g->start ? claimed : g->start;
        s->account.lost[SYNC_LOSS_ORPHAN] += g->floor - kept;
        g->floor = g->used = g->sent = kept;
    }
}

void leases_consume(struct sync *s, uint64_t samples) {
    uint64_t more = samples;
    for (uint32_t i = 0; i < s->leases.count && more; i++) {
        struct grant *g = &s->leases.grant[i];
        uint64_t n = g->sent - g->used < more ? g->sent - g->used : more;
        g->used += n;
        more -= n;
    }
    if (more)
        sync_log(s, SYNC_ERROR, "the trainer says it consumed %llu samples more than it was given",
                 (unsigned long long)more);
}

uint32_t leases_claims(const struct sync *s, struct msg_lease *out) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < s->leases.count; i++) {
        const struct grant *g = &s->leases.grant[i];
        if (g->blocked) continue;
        uint64_t end = SYNC_HAS_FAULT(CLAIMS_TOO_MUCH) ? g->sent : g->used;
        if (end > g->start)
            out[n++] = (struct msg_lease){g->lease, g->generation, g->start, end - g->start};
    }
    return n;
}

/* What is blocked no more goes to the end: the trainer has samples of the others already, and consumes them
 * in the order of the list. */
static void unblock(struct leases *l) {
    for (uint32_t i = 0, left = l->count; left--;) {
        struct grant g = l->grant[i];
        if (!g.blocked || g.start < g.floor) {
            i++;
            continue;
        }
        memmove(l->grant + i, l->grant + i + 1, (l->count - i - 1) * sizeof g);
        g.blocked = false;
        l->grant[l->count - 1] = g;
    }
}

/* Whole batches, so that no step is smaller than the others; the rest only when no more will
 * come. */
void leases_feed(struct sync *s) {
    unblock(&s->leases);
    uint64_t have = unused(s), queued = leases_queued(s);
    uint64_t target = s->leases.dry ? have : have - have % s->inner->batch;
    for (uint32_t i = 0; i < s->leases.count && queued < target; i++) {
        struct grant *g = &s->leases.grant[i];
        if (g->blocked) continue;
        uint64_t n = g->end - g->sent < target - queued ? g->end - g->sent : target - queued;
        struct sync_action *a = n ? sync_act(s, SYNC_ACT_TRAINER_SAMPLES) : NULL;
        if (!a) continue;
        a->start = g->sent;
        a->count = n;
        g->sent += n;
        queued += n;
    }
}

/* ---- asking ----------------------------------------------------------------------------- */

/* Held and in no READY. */
static uint64_t unclaimed(const struct sync *s) {
    uint64_t n = 0;
    for (uint32_t i = 0; i < s->leases.count; i++) {
        const struct grant *g = &s->leases.grant[i];
        uint64_t claimed = claimed_end(s, g->lease, g->generation);
        n += g->end - (claimed > g->start ? claimed : g->start);
    }
    return n;
}

/* What the trainer works off while the coordinator is out of reach for a while, at its own pace. */
static uint64_t samples_for_silences(const struct sync *s) {
    double n = s->trainer.tokens_per_s / s->genesis.model->sequence * SYNC_AHEAD_SILENCES *
               (s->outer->silence_ms_max / 1000.0);
    return n > 0 && n < 1u << 20 ? (uint64_t)n : 0;
}

/* About two rounds ahead, and where rounds are short some silences, so that who is cut off can train on; within
 * what the coordinator leases to one member. */
static uint64_t samples_wanted(struct sync *s) {
    struct leases *l = &s->leases;
    uint64_t batch = s->inner->batch, cap = 2 * (uint64_t)s->outer->lease_samples;
    uint64_t full = (uint64_t)s->outer->inner_steps * batch,
             round = cap / 2 < full ? cap / 2 : full;
    if (l->round_samples > round) round = l->round_samples; /* what a round really took us */
    uint64_t target = 2 * (round > batch ? round : batch), ahead = samples_for_silences(s),
             have = unused(s), held = unclaimed(s);
    if (ahead > target) target = ahead;
    if (have + (round + 3) / 4 > target) return 0;
    uint64_t room = held < cap ? cap - held : 0, want = target - have;
    if (want > room) want = room;
    if (want == 0 && leases_queued(s) == 0)
        want = batch; /* the answer, nothing, says that data ran out */
    return want < (1u << 20) ? want : 1u << 20;
}

void leases_ask(struct sync *s) {
    struct leases *l = &s->leases;
    if (!s->synced || !l->known) return;
    if ((l->asked || l->dry) && s->now - l->asked_ms < s->outer->heartbeat_ms) return;
    struct msg_lease_ask ask = {.samples = (uint32_t)samples_wanted(s)};
    if (ask.samples == 0) return;
    sync_send(s, MSG_LEASE_ASK, 0, &ask);
    l->asked = true;
    l->asked_ms = s->now;
}
