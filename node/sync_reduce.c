/* sync_reduce.c - a plan and this member's part in summing: as aggregator it checks every chunk
 * against the root its contributor announced, adds exactly, divides by the weight that really
 * arrived and quantises once; as second holder it copies the finished shard. Both report only
 * what is on disk. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "node/sync_internal.h"

#define NORM_SLACK 1e-6 /* sums of squares in another order differ in their last digits */

/* ---- which plan ------------------------------------------------------------------------- */

/* Is this frame about the fragment's plan in work? Another plan's chunks and results are void. */
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

static void work_release(struct shard_work *w) {
    for (uint32_t k = 0; w->sums && k < w->count; k++) free(w->sums[k]);
    free(w->sums);
    free(w->data);
    free(w->leaves);
    free(w->sets);
    free(w->weights);
    free(w->finished);
    *w = (struct shard_work){0};
}

void plan_release(struct sync *s, uint32_t fragment) {
    struct plan *p = &s->plan[fragment];
    if (!p->active) return;
    for (uint32_t i = 0; i < p->work_count; i++) work_release(&p->work[i]);
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

/* The coordinator is trusted, but arithmetic must not be set up on numbers that do not fit it. */
static const char *plan_fault(const struct sync *s, const struct msg_plan *msg) {
    uint64_t weight = 0, covered = 0;
    if (msg->contributors_count == 0) return "it has no contributors";
    for (uint32_t i = 0; i < msg->contributors_count; i++) {
        if (msg->contributors[i].weight == 0) return "a weight is zero";
        if (!(msg->contributors[i].clip >= 0 && msg->contributors[i].clip <= 1))
            return "a clip factor is not in [0,1]";
        weight += msg->contributors[i].weight;
    }
    if (weight >= OUTER_WEIGHT_LIMIT) return "the weights are too large";
    for (uint32_t i = 0; i < msg->shards_count; i++) {
        if (msg->shards[i].first != covered || msg->shards[i].count == 0)
            return "its shards do not cover the fragment";
        if (msg->shards[i].aggregator == msg->shards[i].holder)
            return "aggregator and holder are one member";
        covered += msg->shards[i].count;
    }
    if (covered != s->fragment[msg->fragment].count) return "its shards do not cover the fragment";
    if (outer_encoded_bytes((enum outer_codec)msg->codec, 1) == 0)
        return "its codec does not exist";
    if (msg->grid_exponent > OUTER_GRID_EXPONENT_MAX ||
        msg->grid_exponent < -OUTER_GRID_EXPONENT_MAX)
        return "its grid exponent is out of range";
    return NULL;
}

/* ---- setting up ------------------------------------------------------------------------- */

static int work_begin(struct sync *s, const struct plan *p, struct shard_work *w, uint32_t shard,
                      enum shard_role role) {
    const struct msg_shard *m = &p->msg.shards[shard];
    *w = (struct shard_work){.shard = shard, .first = m->first, .count = m->count, .role = role};
    w->data = sync_alloc(
        s, shard_bytes(s, p->fragment, (enum outer_codec)p->msg.codec, m->first, m->count), 1);
    w->leaves = sync_alloc(s, m->count, sizeof *w->leaves);
    w->sets = sync_alloc(s, m->count, p->set_bytes);
    w->weights = sync_alloc(s, m->count, sizeof *w->weights);
    w->finished = sync_alloc(s, m->count, sizeof *w->finished);
    if (role == SHARD_AGGREGATE) w->sums = sync_alloc(s, m->count, sizeof *w->sums);
    return s->failure.code ? -1 : 0;
}

/* A shard finished before this process started again needs no work. */
static int add_work(struct sync *s, struct plan *p, uint32_t shard, enum shard_role role) {
    struct shard_work *w = &p->work[p->work_count];
    struct held *h = results_find(s, p->fragment, p->term, p->number, p->msg.round, shard);
    if (h) *w = (struct shard_work){.shard = shard, .role = role, .done = true};
    else if (work_begin(s, p, w, shard, role)) return -1;
    p->work_count++;
    return 0;
}

static int own_number(const struct sync *s, const struct msg_plan *msg) {
    const struct contribution *c = &s->contribution[msg->fragment];
    if (!c->frozen || c->ready.base_index != msg->base_index) return -1;
    for (uint32_t i = 0; i < msg->contributors_count; i++)
        if (msg->contributors[i].member == s->config.member)
            return digest_equal(&msg->contributors[i].root, &c->ready.root) ? (int)i : -1;
    return -1;
}

/* Those that came with LEAVES before the plan did are asked for them again. */
static void invite_early(struct sync *s, const struct plan *p) {
    for (uint32_t i = 0; i < s->peer_count; i++) {
        struct peer *peer = s->peers[i];
        struct talk *t = &peer->talk[p->fragment];
        if (peer->open && t->early_leaves)
            peer_none(s, peer, MSG_LEAVES, p->term, p->number, p->fragment, p->msg.round, "now");
        t->early_leaves = false;
    }
}

static int plan_begin(struct sync *s, const struct frame *f, const struct msg_plan *msg) {
    struct plan *p = &s->plan[msg->fragment];
    plan_release(s, msg->fragment);
    if (proto_copy(RECORD_plan, msg, &p->msg, &s->failure)) return -1;
    p->active = true;
    p->fragment = msg->fragment;
    p->term = f->term;
    p->number = f->plan;
    p->set_bytes = (uint32_t)bitmap_bytes(msg->contributors_count);
    p->own = own_number(s, msg);
    p->inbound = sync_alloc(s, msg->contributors_count, sizeof *p->inbound);
    p->work = sync_alloc(s, msg->shards_count, sizeof *p->work);
    if (s->failure.code) return -1;
    for (uint32_t i = 0; i < msg->contributors_count; i++) {
        p->weight += msg->contributors[i].weight;
        p->inbound[i].heard_ms = s->now;
    }
    for (uint32_t i = 0; i < msg->shards_count; i++) {
        if (msg->shards[i].aggregator == s->config.member &&
            add_work(s, p, i, SHARD_AGGREGATE))
            return -1;
        if (msg->shards[i].holder == s->config.member && add_work(s, p, i, SHARD_HOLD)) return -1;
    }
    invite_early(s, p);
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
    p->term = f->term;
    p->number = f->plan;
    for (uint32_t i = 0; i < p->work_count; i++) p->work[i].reported = false;
    return true;
}
#endif

/* Of a round that can be summed now? */
static bool is_for_now(const struct sync *s, const struct frame *f, const struct msg_plan *msg) {
    return msg->round == s->ledger.rounds[msg->fragment] &&
           msg->base_index == s->ledger.last[msg->fragment] &&
           (plan_is_newer(s, msg->fragment, f->term, f->plan) ||
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

static int contributor_of(const struct plan *p, uint32_t member) {
    for (uint32_t i = 0; i < p->msg.contributors_count; i++)
        if (p->msg.contributors[i].member == member) return (int)i;
    return -1;
}

static void drop_contributor(struct plan *p, int i) {
    if (p->inbound[i].dropped) return;
    p->inbound[i].dropped = true;
    for (uint32_t w = 0; w < p->work_count; w++) p->work[w].recheck = true;
}

int plan_on_drop(struct sync *s, const struct frame *f, const struct msg_drop *msg) {
    if (msg->fragment >= s->fragment_count || !plan_is_current(s, msg->fragment, f)) return 0;
    struct plan *p = &s->plan[msg->fragment];
    int i = msg->round == p->msg.round ? contributor_of(p, msg->member) : -1;
    if (i >= 0) drop_contributor(p, i);
    return 0;
}

bool plan_owes(const struct sync *s, uint32_t member) {
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        int i = s->plan[f].active ? contributor_of(&s->plan[f], member) : -1;
        if (i >= 0 && !s->plan[f].inbound[i].dropped && s->plan[f].inbound[i].owed) return true;
    }
    return false;
}

/* Does an unfinished chunk still wait for contributor i? */
static bool is_waited_for(const struct plan *p, const struct shard_work *w, uint32_t i) {
    for (uint32_t k = 0; k < w->count; k++)
        if (!w->finished[k] && !proto_set_has(w->sets + (size_t)k * p->set_bytes, i)) return true;
    return false;
}

static void judge_work(struct sync *s, struct plan *p, const struct shard_work *w) {
    for (uint32_t i = 0; i < p->msg.contributors_count; i++) {
        struct inbound *in = &p->inbound[i];
        if (in->dropped || (int)i == p->own || s->now - in->heard_ms <= s->outer->silence_ms_max)
            continue;
        if (!is_waited_for(p, w, i)) continue;
        sync_log(s, SYNC_WARNING,
                 "member %u sends nothing for fragment %u round %llu: going on without it",
                 p->msg.contributors[i].member, p->fragment, (unsigned long long)p->msg.round);
        drop_contributor(p, (int)i);
    }
}

void reduce_judge(struct sync *s) {
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        struct plan *p = &s->plan[f];
        for (uint32_t w = 0; p->active && w < p->work_count; w++)
            if (p->work[w].role == SHARD_AGGREGATE && !p->work[w].done)
                judge_work(s, p, &p->work[w]);
    }
}

/* What of our shards contributor i has not given yet. */
static void say_wanted(struct sync *s, struct plan *p, struct peer *peer, uint32_t i) {
    size_t bytes = bitmap_bytes(s->fragment[p->fragment].count);
    uint8_t *want = sync_alloc(s, bytes, 1);
    if (!want) return;
    p->inbound[i].owed = 0;
    for (uint32_t w = 0; w < p->work_count; w++) {
        const struct shard_work *work = &p->work[w];
        if (work->role != SHARD_AGGREGATE || work->done) continue;
        for (uint32_t k = 0; k < work->count; k++) {
            if (work->finished[k] || proto_set_has(work->sets + (size_t)k * p->set_bytes, i))
                continue;
            proto_set_add(want, work->first + k);
            p->inbound[i].owed++;
        }
    }
    struct msg_want msg = {.fragment = p->fragment,
                           .round = p->msg.round,
                           .chunks = {want, (uint32_t)bytes}};
    peer_send(s, peer, MSG_WANT, p->term, p->number, &msg, bytes);
    free(want);
}

static bool has_aggregate_work(const struct plan *p) {
    for (uint32_t i = 0; i < p->work_count; i++)
        if (p->work[i].role == SHARD_AGGREGATE) return true;
    return false;
}

static bool take_leaves(struct sync *s, struct plan *p, uint32_t i, const struct msg_leaves *msg) {
    struct inbound *in = &p->inbound[i];
    if (in->leaves) return true; /* they are what was announced, whatever comes now */
    if (msg->all_count != s->fragment[p->fragment].count) return false;
    struct digest root = digest_tree_root(msg->all, msg->all_count);
    if (!digest_equal(&root, &p->msg.contributors[i].root)) return false;
    in->leaves = sync_alloc(s, msg->all_count, sizeof *in->leaves);
    if (in->leaves) memcpy(in->leaves, msg->all, msg->all_count * sizeof *in->leaves);
    return in->leaves != NULL;
}

void reduce_on_leaves(struct sync *s, struct peer *peer, const struct frame *f,
                      const struct msg_leaves *msg) {
    struct plan *p = &s->plan[msg->fragment];
    if (!plan_is_current(s, msg->fragment, f) || msg->round != p->msg.round) {
        peer->talk[msg->fragment].early_leaves = plan_is_newer(s, msg->fragment, f->term, f->plan);
        return;
    }
    int i = contributor_of(p, peer->id);
    if (i < 0 || p->inbound[i].dropped || !has_aggregate_work(p)) return;
    if (!take_leaves(s, p, (uint32_t)i, msg)) {
        peer_close(s, peer, "its leaves do not give the root it announced");
        return;
    }
    say_wanted(s, p, peer, (uint32_t)i);
}

/* ---- summing ---------------------------------------------------------------------------- */

static uint8_t *set_of(const struct plan *p, const struct shard_work *w, uint32_t k) {
    return w->sets + (size_t)k * p->set_bytes;
}

static uint64_t divisor(const struct plan *p, const struct shard_work *w, uint32_t k) {
    return SYNC_HAS_FAULT(DIVISOR_NOT_CORRECTED) ? p->weight : w->weights[k];
}

static bool is_complete(const struct plan *p, const struct shard_work *w, uint32_t k) {
    for (uint32_t i = 0; i < p->msg.contributors_count; i++)
        if (!p->inbound[i].dropped && !proto_set_has(set_of(p, w, k), i)) return false;
    return true;
}

/* Mean and encoding of chunk k; false where there is nothing in it that could be encoded. */
static bool close_sum(struct sync *s, const struct plan *p, struct shard_work *w, uint32_t k,
                      struct err *err) {
    enum outer_codec codec = (enum outer_codec)p->msg.codec;
    uint32_t in_fragment = w->first + k;
    size_t n = chunk_elements(s, s->fragment[p->fragment].chunk[in_fragment]);
    uint8_t *out = w->data + encoded_offset(s, codec, k);
    if (w->weights[k] == 0) return false;
    if (SYNC_HAS_FAULT(LIES_SUM)) w->sums[k][0] += (int64_t)1 << 30;
    outer_mean(s->scratch, w->sums[k], n, divisor(p, w, k), p->msg.grid_exponent);
    if (outer_encode(out, s->scratch, n, codec, err)) return false;
    w->leaves[k].digest = digest_leaf(in_fragment, out,
                                      encoded_bytes(s, p->fragment, codec, in_fragment));
    return true;
}

static void finish_chunk(struct sync *s, const struct plan *p, struct shard_work *w, uint32_t k) {
    struct err err = {0};
    if (!close_sum(s, p, w, k, &err)) {
        if (err.code)
            sync_log(s, SYNC_ERROR, "the mean of chunk %u of fragment %u: %.200s", w->first + k,
                     p->fragment, err.msg);
        memset(set_of(p, w, k), 0, p->set_bytes);
        w->weights[k] = 0;
    }
    free(w->sums[k]);
    w->sums[k] = NULL;
    w->finished[k] = true;
    w->finished_count++;
    s->progress++;
}

/* The clip factor stands on the norm that was announced, before anybody saw the bytes: more than that
 * is not taken. In shards of several aggregators each sees a part, which has no more than the whole. */
static int hold_to_norm(struct sync *s, struct plan *p, uint32_t i, const uint8_t *bytes,
                        size_t length, size_t n, struct err *err) {
    double *norm2 = &p->inbound[i].norm2, limit = p->msg.contributors[i].norm;
    if (outer_decode(s->scratch2, bytes, length, n, s->codec, err)) return -1;
    *norm2 += outer_norm2(s->scratch2, n);
    if (*norm2 <= limit * limit * (1 + NORM_SLACK)) return 0;
    return err_set(err, ERR_REFUSED, "its values have norm %g so far, announced was %g",
                   sqrt(*norm2), limit);
}

/* One contributor's chunk k of the shard; it was checked against the announced digest. */
static void add_chunk(struct sync *s, struct plan *p, struct shard_work *w, uint32_t k, uint32_t i,
                      const uint8_t *bytes, size_t length) {
    const struct msg_contributor *c = &p->msg.contributors[i];
    size_t n = chunk_elements(s, s->fragment[p->fragment].chunk[w->first + k]);
    struct err err = {0};
    if (!w->sums[k] && !(w->sums[k] = sync_alloc(s, n, sizeof **w->sums))) return;
    if (hold_to_norm(s, p, i, bytes, length, n, &err) ||
        outer_accumulate(w->sums[k], bytes, length, n, s->codec, c->weight, c->clip,
                         p->msg.grid_exponent, &err)) {
        sync_log(s, SYNC_WARNING, "member %u is left out of fragment %u round %llu, chunk %u: %.120s",
                 c->member, p->fragment, (unsigned long long)p->msg.round, w->first + k, err.msg);
        drop_contributor(p, (int)i);
        return;
    }
    proto_set_add(set_of(p, w, k), i);
    w->weights[k] += c->weight;
    s->progress++;
    if (is_complete(p, w, k)) finish_chunk(s, p, w, k);
}

/* The set must name just its contributor: partial sums of others come with shards of many
 * aggregators. */
static bool set_is_just(const struct plan *p, struct proto_bytes set, uint32_t i) {
    uint8_t want[PROTO_SET_BYTES_MAX] = {0};
    proto_set_add(want, i);
    return set.length == p->set_bytes && !memcmp(set.data, want, set.length);
}

static struct shard_work *work_with(struct plan *p, uint32_t chunk, enum shard_role role) {
    for (uint32_t i = 0; i < p->work_count; i++) {
        struct shard_work *w = &p->work[i];
        if (w->role == role && !w->done && chunk >= w->first && chunk - w->first < w->count)
            return w;
    }
    return NULL;
}

static bool chunk_is_right(const struct sync *s, const struct plan *p, const struct msg_chunk *msg,
                           uint32_t i) {
    if (msg->codec != s->codec ||
        msg->data.length != encoded_bytes(s, p->fragment, s->codec, msg->chunk))
        return false;
    if (!set_is_just(p, msg->set, i) || msg->weight != p->msg.contributors[i].weight) return false;
    struct digest leaf = digest_leaf(msg->chunk, msg->data.data, msg->data.length);
    return digest_equal(&leaf, &p->inbound[i].leaves[msg->chunk].digest);
}

static int finish_shard(struct sync *s, struct plan *p, struct shard_work *w);

int reduce_on_chunk(struct sync *s, struct peer *peer, const struct frame *f,
                    const struct msg_chunk *msg) {
    struct plan *p = &s->plan[msg->fragment];
    if (!plan_is_current(s, msg->fragment, f) || msg->round != p->msg.round) return 0;
    int i = contributor_of(p, peer->id);
    struct shard_work *w = work_with(p, msg->chunk, SHARD_AGGREGATE);
    if (i < 0 || !w || !p->inbound[i].leaves || p->inbound[i].dropped) return 0;
    uint32_t k = msg->chunk - w->first;
    p->inbound[i].heard_ms = s->now;
    if (w->finished[k]) return 0;
    if (proto_set_has(set_of(p, w, k), (uint32_t)i) && !SYNC_HAS_FAULT(CHUNK_SUMMED_TWICE)) return 0;
    if (!chunk_is_right(s, p, msg, (uint32_t)i)) {
        peer_close(s, peer, "a chunk is not what it announced");
        return 0;
    }
    if (p->inbound[i].owed) p->inbound[i].owed--;
    add_chunk(s, p, w, k, (uint32_t)i, msg->data.data, msg->data.length);
    return w->finished_count == w->count ? finish_shard(s, p, w) : 0;
}

/* ---- finished --------------------------------------------------------------------------- */

static void report(struct sync *s, const struct plan *p, struct shard_work *w) {
    struct held *h = results_find(s, p->fragment, p->term, p->number, p->msg.round, w->shard);
    if (!h || !s->synced || p->term != s->term) return;
    results_report(s, h);
    w->reported = true;
    w->reported_ms = s->now;
}

static int finish_shard(struct sync *s, struct plan *p, struct shard_work *w) {
    if (results_keep(s, p, w)) return -1;
    w->done = true;
    report(s, p, w);
    return 0;
}

/* ---- the second holder ------------------------------------------------------------------ */

static uint64_t weight_of(const struct plan *p, struct proto_bytes set) {
    uint64_t weight = 0;
    for (uint32_t i = 0; i < p->msg.contributors_count; i++)
        if (bitmap_has(set, i)) weight += p->msg.contributors[i].weight;
    return weight;
}

/* Spread the aggregator's runs over the chunks. False: they contradict the plan. */
static bool take_summed(const struct plan *p, struct shard_work *w,
                        const struct msg_result_leaves *msg) {
    uint32_t k = 0;
    for (uint32_t r = 0; r < msg->summed_count; r++) {
        const struct msg_summed *run = &msg->summed[r];
        if (run->set.length != p->set_bytes || run->weight != weight_of(p, run->set)) return false;
        if (run->chunks > w->count - k) return false;
        for (uint32_t end = k + run->chunks; k < end; k++) {
            memcpy(set_of(p, w, k), run->set.data, p->set_bytes);
            w->weights[k] = run->weight;
        }
    }
    return k == w->count;
}

static struct shard_work *held_work(struct sync *s, const struct peer *peer, const struct frame *f,
                                    uint32_t fragment, uint32_t first) {
    struct plan *p = &s->plan[fragment];
    struct shard_work *w = plan_is_current(s, fragment, f) ? work_with(p, first, SHARD_HOLD) : NULL;
    return w && p->msg.shards[w->shard].aggregator == peer->id ? w : NULL;
}

void reduce_on_result_leaves(struct sync *s, struct peer *peer, const struct frame *f,
                             const struct msg_result_leaves *msg) {
    struct shard_work *w = held_work(s, peer, f, msg->fragment, msg->first);
    if (!w || msg->first != w->first) return;
    w->asked_ms = s->now;
    if (w->leaves_known) return;
    if (msg->leaves_count != w->count || !take_summed(&s->plan[msg->fragment], w, msg)) {
        peer_close(s, peer, "the sum it shows is not of this plan");
        return;
    }
    memcpy(w->leaves, msg->leaves, w->count * sizeof *w->leaves);
    w->leaves_known = true;
    for (uint32_t k = 0; k < w->count; k++) {
        if (w->weights[k]) continue;
        w->finished[k] = true; /* nothing to copy */
        w->finished_count++;
    }
    w->recheck = w->finished_count == w->count;
}

int reduce_on_result(struct sync *s, struct peer *peer, const struct frame *f,
                     const struct msg_result *msg) {
    struct plan *p = &s->plan[msg->fragment];
    struct shard_work *w = held_work(s, peer, f, msg->fragment, msg->chunk);
    if (!w || !w->leaves_known || w->finished[msg->chunk - w->first]) return 0;
    enum outer_codec codec = (enum outer_codec)p->msg.codec;
    uint32_t k = msg->chunk - w->first;
    struct digest leaf = digest_leaf(msg->chunk, msg->data.data, msg->data.length);
    if (msg->codec != codec ||
        msg->data.length != encoded_bytes(s, p->fragment, codec, msg->chunk) ||
        !digest_equal(&leaf, &w->leaves[k].digest)) {
        peer_close(s, peer, "a result is not what it announced");
        return 0;
    }
    memcpy(w->data + encoded_offset(s, codec, k), msg->data.data, msg->data.length);
    w->asked_ms = s->now;
    w->finished[k] = true;
    w->finished_count++;
    s->progress++;
    return w->finished_count == w->count ? finish_shard(s, p, w) : 0;
}

/* Ask the aggregator for what is missing, again whenever it has been silent for a heartbeat. */
static void ask_results(struct sync *s, const struct plan *p, struct shard_work *w) {
    struct peer *peer = peer_link(s, p->msg.shards[w->shard].aggregator);
    if (!peer || (w->asked_ms && s->now - w->asked_ms < s->outer->heartbeat_ms)) return;
    size_t bytes = bitmap_bytes(s->fragment[p->fragment].count);
    uint8_t *chunks = sync_alloc(s, bytes, 1);
    if (!chunks) return;
    for (uint32_t k = 0; k < w->count; k++)
        if (!w->finished[k]) proto_set_add(chunks, w->first + k);
    struct msg_result_get get = {.fragment = p->fragment,
                                 .round = p->msg.round,
                                 .plan = p->number,
                                 .chunks = {chunks, (uint32_t)bytes}};
    peer_send(s, peer, MSG_RESULT_GET, p->term, p->number, &get, bytes);
    free(chunks);
    w->asked_ms = s->now;
}

/* ---- pump and work ---------------------------------------------------------------------- */

int reduce_pump(struct sync *s) {
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        struct plan *p = &s->plan[f];
        for (uint32_t i = 0; p->active && i < p->work_count; i++) {
            struct shard_work *w = &p->work[i];
            if (!w->done && w->role == SHARD_HOLD) ask_results(s, p, w);
            if (w->done && (!w->reported || s->now - w->reported_ms >= s->outer->silence_ms_max))
                report(s, p, w);
        }
    }
    return s->failure.code ? -1 : 0;
}

static bool has_own_chunks(const struct sync *s, const struct plan *p,
                           const struct shard_work *w) {
    return w->role == SHARD_AGGREGATE && !w->done && p->own >= 0 &&
           s->contribution[p->fragment].frozen && !p->inbound[p->own].dropped &&
           w->own_next < w->count;
}

/* A shard with something to compute, and its plan. NULL: none. */
static struct shard_work *work_now(const struct sync *s, struct plan **plan) {
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        struct plan *p = &s->plan[f];
        for (uint32_t i = 0; p->active && i < p->work_count; i++) {
            struct shard_work *w = &p->work[i];
            if (w->done || !(w->recheck || has_own_chunks(s, p, w))) continue;
            *plan = p;
            return w;
        }
    }
    return NULL;
}

bool reduce_has_work(const struct sync *s) {
    struct plan *p;
    return work_now(s, &p) != NULL;
}

/* Somebody was dropped: chunks that waited for nobody else are finished. */
static void recheck(struct sync *s, const struct plan *p, struct shard_work *w) {
    size_t done = 0;
    w->recheck = false;
    for (uint32_t k = 0; w->role == SHARD_AGGREGATE && k < w->count; k++) {
        if (w->finished[k] || !is_complete(p, w, k)) continue;
        finish_chunk(s, p, w, k);
        done += s->chunk_elements;
        if (done < SYNC_WORK_ELEMENTS) continue;
        w->recheck = true; /* the rest in the next turn */
        return;
    }
}

static void add_own_chunks(struct sync *s, struct plan *p, struct shard_work *w) {
    for (size_t done = 0; has_own_chunks(s, p, w) && done < SYNC_WORK_ELEMENTS;
         done += s->chunk_elements) {
        uint32_t k = w->own_next++, chunk = w->first + k;
        if (w->finished[k]) continue;
        add_chunk(s, p, w, k, (uint32_t)p->own, encoded_chunk(s, p->fragment, chunk),
                  encoded_bytes(s, p->fragment, s->codec, chunk));
    }
}

int reduce_work(struct sync *s) {
    struct plan *p;
    struct shard_work *w = work_now(s, &p);
    if (w->recheck) recheck(s, p, w);
    else add_own_chunks(s, p, w);
    return w->finished_count == w->count ? finish_shard(s, p, w) : 0;
}
