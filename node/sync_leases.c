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

/* Samples nobody trained on yet, also those of a list that is not taken over yet. */
static uint64_t unused(struct sync *s) {
    struct leases *l = &s->leases;
    uint64_t n = 0;
    for (uint32_t i = 0; !l->deferred && i < l->count; i++) n += l->grant[i].end - l->grant[i].used;
    for (uint32_t i = 0; l->deferred && i < l->list_count; i++) {
        const struct grant *g = find_grant(l, l->list[i].lease, l->list[i].generation);
        uint64_t start = l->list[i].start, end = start + l->list[i].count;
        if (g && g->used > start) start = g->used < end ? g->used : end;
        n += end - start;
    }
    return n;
}

/* ---- taking the coordinator's list ------------------------------------------------------ */

/* Did samples of it reach the trainer? Then they are in its parameters or will be. */
static bool touched(const struct grant *g) { return g->sent > g->start; }

/* False: what the trainer got of this lease is not (or no longer) ours. */
static bool grant_agrees(struct grant *g, const struct msg_lease *e) {
    if (!e) return !touched(g);
    uint64_t end = e->start + e->count;
    bool kept = !touched(g) || (e->start <= g->start && end >= g->sent);
    if (!touched(g)) g->start = g->used = g->sent = e->start > g->start ? e->start : g->start;
    g->end = end > g->sent ? end : g->sent;
    return kept;
}

static void add_grant(struct leases *l, const struct msg_lease *e) {
    if (l->count == PROTO_LEASES_MAX)
        return; /* held, but not used: the list has no more than that itself */
    l->grant[l->count++] = (struct grant){.lease = e->lease,
                                          .generation = e->generation,
                                          .start = e->start,
                                          .used = e->start,
                                          .sent = e->start,
                                          .end = e->start + e->count};
}

static void take_list(struct sync *s, const struct msg_lease *list, uint32_t count) {
    struct leases *l = &s->leases;
    bool lost = false;
    uint32_t kept = 0;
    for (uint32_t i = 0; i < l->count; i++) {
        struct grant *g = &l->grant[i];
        const struct msg_lease *e = find_in(list, count, g->lease, g->generation);
        if (!grant_agrees(g, e)) lost = true;
        if (e && g->start < g->end) l->grant[kept++] = *g;
    }
    l->count = kept;
    for (uint32_t i = 0; i < count; i++)
        if (list[i].count && !find_grant(l, list[i].lease, list[i].generation))
            add_grant(l, &list[i]);
    if (lost) trainer_lose_work(s, "a lease its work came from is no longer ours");
}

/* Is there anything in the list that we did not have? */
static bool grants_more(struct leases *l, const struct msg_lease *list, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        const struct grant *g = find_grant(l, list[i].lease, list[i].generation);
        bool listed = l->deferred &&
                      find_in(l->list, l->list_count, list[i].lease, list[i].generation);
        if (!g && !listed) return true;
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
    if (!s->contribution.frozen) {
        take_list(s, msg->leases, msg->leases_count);
        return;
    }
    l->deferred = true;
    l->list_count = msg->leases_count;
    if (l->list_count) memcpy(l->list, msg->leases, l->list_count * sizeof *l->list);
}

void leases_judge(struct sync *s) {
    if (!s->leases.deferred) return;
    s->leases.deferred = false;
    take_list(s, s->leases.list, s->leases.list_count);
}

/* ---- using ------------------------------------------------------------------------------ */

/* The commit spent what its contributions claimed. */
void leases_spend(struct sync *s, const struct commit *c) {
    struct leases *l = &s->leases;
    for (uint32_t i = 0; i < c->body.spent_count; i++) {
        const struct msg_spend *e = &c->body.spent[i];
        struct grant *g = e->member == s->config.member ? find_grant(l, e->lease, e->generation)
                                                        : NULL;
        if (!g || g->start != e->start || e->count > g->end - g->start) continue;
        g->start += e->count;
        if (g->used < g->start) g->used = g->start;
        if (g->sent < g->start) g->sent = g->start;
        if (g->start < g->end) continue;
        memmove(g, g + 1, (size_t)(l->grant + l->count - (g + 1)) * sizeof *g);
        l->count--;
    }
}

void leases_rewind(struct sync *s) {
    for (uint32_t i = 0; i < s->leases.count; i++)
        s->leases.grant[i].used = s->leases.grant[i].sent = s->leases.grant[i].start;
}

void leases_requeue(struct sync *s) {
    for (uint32_t i = 0; i < s->leases.count; i++)
        s->leases.grant[i].sent = s->leases.grant[i].used;
}

void leases_consume(struct sync *s, uint64_t samples) {
    uint64_t used = leases_used(s), more = samples > used ? samples - used : 0;
    for (uint32_t i = 0; i < s->leases.count && more; i++) {
        struct grant *g = &s->leases.grant[i];
        uint64_t n = g->sent - g->used < more ? g->sent - g->used : more;
        g->used += n;
        more -= n;
    }
    if (more || samples < used)
        sync_log(s, SYNC_ERROR, "the trainer says it consumed %llu samples, it was given %llu",
                 (unsigned long long)samples, (unsigned long long)(used + leases_queued(s)));
}

uint32_t leases_claims(const struct sync *s, struct msg_lease *out) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < s->leases.count; i++) {
        const struct grant *g = &s->leases.grant[i];
        if (g->used > g->start)
            out[n++] = (struct msg_lease){g->lease, g->generation, g->start, g->used - g->start};
    }
    return n;
}

/* Whole batches, so that no step is smaller than the others; the rest only when no more will
 * come. */
void leases_feed(struct sync *s) {
    uint64_t have = unused(s), queued = leases_queued(s);
    uint64_t target = s->leases.dry ? have : have - have % s->inner->batch;
    for (uint32_t i = 0; i < s->leases.count && queued < target; i++) {
        struct grant *g = &s->leases.grant[i];
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

/* About two rounds ahead, within what the coordinator leases to one member. */
static uint64_t samples_wanted(struct sync *s) {
    struct leases *l = &s->leases;
    uint64_t batch = s->inner->batch, cap = 2 * (uint64_t)s->outer->lease_samples;
    uint64_t full = (uint64_t)s->outer->inner_steps * batch,
             round = cap / 2 < full ? cap / 2 : full;
    if (l->round_samples > round) round = l->round_samples; /* what a round really took us */
    uint64_t target = 2 * (round > batch ? round : batch), have = unused(s);
    uint64_t held = have + (s->contribution.frozen ? 0 : leases_used(s));
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
