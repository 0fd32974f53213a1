/* sync_reduce.c - this member's part in summing a plan's shards: as aggregator it checks every chunk
 * against the root its contributor announced, adds exactly, divides by the weight that really
 * arrived and quantises once; as second holder it copies the finished shard. Both report only
 * what is on disk. An auditor sums in the same way, see sync_audit.c. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "node/sync_internal.h"

#define NORM_SLACK 1e-6 /* sums of squares in another order differ in their last digits */

/* ---- who is waited for ------------------------------------------------------------------ */

static bool is_forced(const struct plan *p, const struct shard_work *w, uint32_t k, uint32_t i) {
    return proto_set_has(w->forced + (size_t)k * p->set_bytes, i);
}

/* Does chunk k still wait for contributor i? */
static bool takes(const struct plan *p, const struct shard_work *w, uint32_t k, uint32_t i) {
    if (w->finished[k] || proto_set_has(plan_set(p, w, k), i)) return false;
    return w->forced ? is_forced(p, w, k, i) : !p->inbound[i].dropped;
}

static bool is_complete(const struct plan *p, const struct shard_work *w, uint32_t k) {
    for (uint32_t i = 0; i < p->msg.contributors_count; i++)
        if (takes(p, w, k, i)) return false;
    return true;
}

/* Does it wait for our own contribution alone? That is added last, so that sums are open only while
 * others' chunks come. */
static bool waits_for_own(const struct sync *s, const struct plan *p, const struct shard_work *w,
                          uint32_t k) {
    if (p->own < 0 || !s->contribution[p->fragment].frozen) return false;
    for (uint32_t i = 0; i < p->msg.contributors_count; i++)
        if ((int)i != p->own && takes(p, w, k, i)) return false;
    return takes(p, w, k, (uint32_t)p->own);
}

static bool sums(const struct shard_work *w) { return w->role != SHARD_HOLD && !w->done; }

static uint32_t count_owed(const struct plan *p, uint32_t i) {
    uint32_t owed = 0;
    for (uint32_t j = 0; j < p->work_count; j++) {
        const struct shard_work *w = &p->work[j];
        for (uint32_t k = 0; sums(w) && k < w->count; k++) owed += takes(p, w, k, i);
    }
    return owed;
}

/* At its pace since the last mark, would the rest come in time? All it may take grows with every plan of the
 * round that came to nothing, as the coordinator's patience does: where all links are slow, none is
 * dropped for ever. One that sends fast first and then drips is seen by its last pace. */
static bool is_too_slow(const struct sync *s, const struct plan *p, struct inbound *in) {
    if (!in->asked_ms || !in->owed) return false;
    uint64_t silence = s->outer->silence_ms_max, passed = s->now - in->mark_ms;
    uint64_t limit = SYNC_DRIP_SILENCES * silence << (p->attempt < 8 ? p->attempt : 8);
    if (passed < silence / 2) return false;
    uint64_t got = in->mark_owed > in->owed ? in->mark_owed - in->owed : 0;
    bool slow = got ? s->now - in->asked_ms + in->owed * passed / got > limit : false;
    in->mark_ms = s->now;
    in->mark_owed = in->owed;
    return slow;
}

static void judge_contributor(struct sync *s, struct plan *p, uint32_t i) {
    struct inbound *in = &p->inbound[i];
    const char *why = s->now - in->heard_ms > s->outer->silence_ms_max ? "sends nothing" : NULL;
    if (in->dropped || (int)i == p->own) return;
    if (!why && is_too_slow(s, p, in)) why = "sends too slowly";
    if (!why || count_owed(p, i) == 0) return;
    sync_log(s, SYNC_WARNING, "member %u %s for fragment %u round %llu: going on without it",
             p->msg.contributors[i].member, why, p->fragment, (unsigned long long)p->msg.round);
    plan_drop_contributor(p, (int)i);
}

/* A commit that is summed again waits for all it names: without them it cannot be had. */
void reduce_judge(struct sync *s) {
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        struct plan *p = &s->plan[f];
        for (uint32_t i = 0; p->active && !p->msg.resum && i < p->msg.contributors_count; i++)
            judge_contributor(s, p, i);
    }
    audit_judge(s);
}

/* ---- asking contributors ---------------------------------------------------------------- */

static bool has_sums(const struct plan *p) {
    for (uint32_t i = 0; i < p->work_count; i++)
        if (p->work[i].role != SHARD_HOLD) return true;
    return false;
}

/* What of our shards contributor i has not given yet: all of it, also after its link broke. */
static void say_wanted(struct sync *s, struct plan *p, struct peer *peer, uint32_t i) {
    size_t bytes = bitmap_bytes(s->fragment[p->fragment].count);
    struct inbound *in = &p->inbound[i];
    uint8_t *want = sync_alloc(s, bytes, 1);
    if (!want) return;
    for (uint32_t j = 0; j < p->work_count; j++) {
        const struct shard_work *w = &p->work[j];
        for (uint32_t k = 0; sums(w) && k < w->count; k++)
            if (takes(p, w, k, i)) proto_set_add(want, w->first + k);
    }
    in->owed = count_owed(p, i);
    if (!in->asked_ms) {
        in->asked_ms = in->mark_ms = s->now;
        in->mark_owed = in->owed;
    }
    struct msg_want msg = {.fragment = p->fragment,
                           .round = p->msg.round,
                           .chunks = {want, (uint32_t)bytes}};
    peer_send(s, peer, MSG_WANT, p->term, p->number, &msg, bytes);
    free(want);
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
    struct talk *t = &peer->talk[msg->fragment];
    if (!plan_is_current(s, msg->fragment, f) || msg->round != p->msg.round) {
        t->early_leaves = plan_is_newer(s, msg->fragment, f->term, f->plan);
        return;
    }
    int i = plan_contributor(p, peer->id);
    if (i < 0) return;
    if (!has_sums(p)) {
        t->early_leaves = true; /* an audit may be on its way */
        return;
    }
    if (!take_leaves(s, p, (uint32_t)i, msg)) {
        peer_close(s, peer, "its leaves do not give the root it announced");
        return;
    }
    say_wanted(s, p, peer, (uint32_t)i);
}

/* ---- summing ---------------------------------------------------------------------------- */

static uint64_t divisor(const struct plan *p, const struct shard_work *w, uint32_t k) {
    return SYNC_HAS_FAULT(DIVISOR_NOT_CORRECTED) ? p->weight : w->weights[k];
}

/* Zeroed. Sums come and go with every chunk: some are kept, since fresh memory costs more than the sum. */
static int64_t *sum_take(struct sync *s, size_t n) {
    if (!s->spare_sum_count) return sync_alloc(s, s->chunk_elements, sizeof(int64_t));
    int64_t *sum = s->spare_sum[--s->spare_sum_count];
    memset(sum, 0, n * sizeof *sum);
    return sum;
}

static void sum_give(struct sync *s, int64_t *sum) {
    if (sum && s->spare_sum_count < SYNC_SPARE_SUMS) s->spare_sum[s->spare_sum_count++] = sum;
    else free(sum);
}

void reduce_release(struct sync *s) {
    while (s->spare_sum_count) free(s->spare_sum[--s->spare_sum_count]);
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
        memset(plan_set(p, w, k), 0, p->set_bytes);
        w->weights[k] = 0;
    }
    sum_give(s, w->sums[k]);
    w->sums[k] = NULL;
    w->finished[k] = true;
    w->finished_count++;
    s->progress++;
}

/* The clip factor stands on the norm that was announced, before anybody saw the bytes: more than that
 * is not taken. In shards of several aggregators each sees a part, which has no more than the whole.
 * *proven: this one chunk shows it to whoever looks. */
static int hold_to_norm(struct plan *p, enum outer_codec codec, uint32_t i, const uint8_t *bytes,
                        size_t length, size_t n, bool *proven, struct err *err) {
    struct inbound *in = &p->inbound[i];
    double norm2, limit = p->msg.contributors[i].norm,
           limit2 = limit * limit * (1 + NORM_SLACK);
    float absmax;
    *proven = true;
    if (outer_measure(bytes, length, n, codec, &absmax, &norm2, err)) return -1;
    *proven = norm2 > limit2;
    if (!*proven && in->norm2 + norm2 <= limit2) {
        in->norm2 += norm2;
        return 0;
    }
    return err_set(err, ERR_REFUSED, "its values have norm %g so far, announced was %g",
                   sqrt(in->norm2 + norm2), limit);
}

/* An audit looks at one chunk, which has no more than the whole. */
static int check_chunk(struct sync *s, struct plan *p, const struct shard_work *w, uint32_t i,
                       const uint8_t *bytes, size_t length, size_t n, bool *proven,
                       struct err *err) {
    double before = p->inbound[i].norm2;
    if ((int)i == p->own || p->msg.resum) return 0;
    if (w->role == SHARD_AUDIT) p->inbound[i].norm2 = 0;
    int rc = hold_to_norm(p, s->codec, i, bytes, length, n, proven, err);
    if (w->role == SHARD_AUDIT) p->inbound[i].norm2 = before;
    return rc;
}

static void refuse_chunk(struct sync *s, struct plan *p, struct shard_work *w, uint32_t k,
                         uint32_t i, bool proven, const char *why) {
    sync_log(s, SYNC_WARNING, "member %u is left out of fragment %u round %llu, chunk %u: %.120s",
             p->msg.contributors[i].member, p->fragment, (unsigned long long)p->msg.round,
             w->first + k, why);
    if (w->role == SHARD_AUDIT) {
        audit_finish(s, p, w, p->msg.contributors[i].member);
        return;
    }
    plan_drop_contributor(p, (int)i);
    if (proven && (int)i != p->own) audit_accuse(s, p, i, w->first + k, why);
}

/* One contributor's chunk k of the shard; it was checked against the announced digest. */
static void add_values(struct sync *s, struct plan *p, struct shard_work *w, uint32_t k,
                       uint32_t i, const uint8_t *bytes, size_t length) {
    const struct msg_contributor *c = &p->msg.contributors[i];
    size_t n = chunk_elements(s, s->fragment[p->fragment].chunk[w->first + k]);
    struct err err = {0};
    bool proven = true;
    if (!w->sums[k] && !(w->sums[k] = sum_take(s, n))) return;
    if (check_chunk(s, p, w, i, bytes, length, n, &proven, &err)) {
        refuse_chunk(s, p, w, k, i, proven, err.msg);
        return;
    }
    if (outer_accumulate(w->sums[k], bytes, length, n, s->codec, c->weight, c->clip,
                         p->msg.grid_exponent, &err)) {
        refuse_chunk(s, p, w, k, i, true, err.msg);
        return;
    }
    proto_set_add(plan_set(p, w, k), i);
    w->weights[k] += c->weight;
    s->progress++;
}

/* Our own values, if nobody else's are missing; then it is finished. False: it waits for others. */
static bool complete_chunk(struct sync *s, struct plan *p, struct shard_work *w, uint32_t k) {
    if (waits_for_own(s, p, w, k))
        add_values(s, p, w, k, (uint32_t)p->own, encoded_chunk(s, p->fragment, w->first + k),
                   encoded_bytes(s, p->fragment, s->codec, w->first + k));
    if (w->done || w->finished[k] || s->failure.code || !is_complete(p, w, k)) return false;
    finish_chunk(s, p, w, k);
    return true;
}

static int finish_shard(struct sync *s, struct plan *p, struct shard_work *w);

static int finish_work(struct sync *s, struct plan *p, struct shard_work *w) {
    if (w->done || w->finished_count < w->count) return 0;
    if (w->role != SHARD_AUDIT) return finish_shard(s, p, w);
    audit_finish(s, p, w, 0);
    return 0;
}

/* The set must name just its contributor: partial sums of others come with shards of many
 * aggregators. */
static bool set_is_just(const struct plan *p, struct proto_bytes set, uint32_t i) {
    uint8_t want[PROTO_SET_BYTES_MAX] = {0};
    proto_set_add(want, i);
    return set.length == p->set_bytes && !memcmp(set.data, want, set.length);
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

/* The sum that waits for this chunk of contributor i. */
static struct shard_work *sum_of(struct plan *p, uint32_t chunk, uint32_t i) {
    for (uint32_t j = 0; j < p->work_count; j++) {
        struct shard_work *w = &p->work[j];
        if (!sums(w) || chunk < w->first || chunk - w->first >= w->count) continue;
        if (takes(p, w, chunk - w->first, i)) return w;
        if (SYNC_HAS_FAULT(CHUNK_SUMMED_TWICE) && !w->finished[chunk - w->first]) return w;
    }
    return NULL;
}

/* A chunk that is not waited for any more is no sign of life. */
int reduce_on_chunk(struct sync *s, struct peer *peer, const struct frame *f,
                    const struct msg_chunk *msg) {
    struct plan *p = &s->plan[msg->fragment];
    if (!plan_is_current(s, msg->fragment, f) || msg->round != p->msg.round) return 0;
    int i = plan_contributor(p, peer->id);
    struct shard_work *w = i < 0 ? NULL : sum_of(p, msg->chunk, (uint32_t)i);
    if (!w || !p->inbound[i].leaves) return 0;
    if (!chunk_is_right(s, p, msg, (uint32_t)i)) {
        peer_close(s, peer, "a chunk is not what it announced");
        return 0;
    }
    p->inbound[i].heard_ms = s->now;
    if (p->inbound[i].owed) p->inbound[i].owed--;
    add_values(s, p, w, msg->chunk - w->first, (uint32_t)i, msg->data.data, msg->data.length);
    if (!w->done) complete_chunk(s, p, w, msg->chunk - w->first);
    return finish_work(s, p, w);
}

/* ---- finished --------------------------------------------------------------------------- */

static void report(struct sync *s, const struct plan *p, struct shard_work *w) {
    struct held *h = results_find(s, p->fragment, p->result_term, p->result_plan, p->msg.round,
                                  results_shard(p, w->shard));
    if (!h || !s->synced || p->term != s->term) return;
    results_report(s, p, w->shard, h);
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
            memcpy(plan_set(p, w, k), run->set.data, p->set_bytes);
            w->weights[k] = run->weight;
        }
    }
    return k == w->count;
}

/* Results of a commit that is summed again stand under that commit's own numbers. */
static bool are_results_of(const struct sync *s, const struct plan *p, const struct frame *f) {
    if (p->active && p->msg.resum) return f->term == p->result_term && f->plan == p->result_plan;
    return plan_is_current(s, (uint32_t)(p - s->plan), f);
}

static struct shard_work *held_work(struct sync *s, const struct peer *peer, const struct frame *f,
                                    uint32_t fragment, uint32_t chunk) {
    struct plan *p = &s->plan[fragment];
    for (uint32_t i = 0; are_results_of(s, p, f) && i < p->work_count; i++) {
        struct shard_work *w = &p->work[i];
        if (w->role == SHARD_HOLD && !w->done && chunk >= w->first && chunk - w->first < w->count &&
            p->msg.shards[w->shard].aggregator == peer->id)
            return w;
    }
    return NULL;
}

bool reduce_waits_for(struct sync *s, const struct peer *p, const struct frame *f,
                      uint32_t fragment, uint32_t chunk) {
    return held_work(s, p, f, fragment, chunk) != NULL;
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
                                 .plan = p->result_plan,
                                 .chunks = {chunks, (uint32_t)bytes}};
    peer_send(s, peer, MSG_RESULT_GET, p->result_term, p->result_plan, &get, bytes);
    free(chunks);
    w->asked_ms = s->now;
}

void reduce_ask_again(struct sync *s, const struct peer *peer) {
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        struct plan *p = &s->plan[f];
        for (uint32_t i = 0; p->active && i < p->work_count; i++)
            if (p->work[i].role == SHARD_HOLD && p->msg.shards[p->work[i].shard].aggregator == peer->id)
                p->work[i].asked_ms = 0;
    }
}

/* ---- pump and work ---------------------------------------------------------------------- */

int reduce_pump(struct sync *s) {
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        struct plan *p = &s->plan[f];
        for (uint32_t i = 0; p->active && i < p->work_count; i++) {
            struct shard_work *w = &p->work[i];
            if (!w->done && w->role == SHARD_HOLD) ask_results(s, p, w);
            if (w->role == SHARD_AUDIT) continue;
            if (w->done && (!w->reported || s->now - w->reported_ms >= s->outer->silence_ms_max))
                report(s, p, w);
        }
    }
    return s->failure.code ? -1 : 0;
}

/* A shard with something to compute, and its plan. NULL: none. */
static struct shard_work *work_now(const struct sync *s, struct plan **plan) {
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        struct plan *p = &s->plan[f];
        for (uint32_t i = 0; p->active && i < p->work_count; i++) {
            if (p->work[i].done || !p->work[i].recheck) continue;
            *plan = p;
            return &p->work[i];
        }
    }
    return NULL;
}

bool reduce_has_work(const struct sync *s) {
    struct plan *p;
    return work_now(s, &p) != NULL;
}

/* The plan is new, or somebody was dropped: chunks that wait for nobody else are finished. */
int reduce_work(struct sync *s) {
    struct plan *p;
    struct shard_work *w = work_now(s, &p);
    size_t done = 0;
    w->recheck = false;
    for (uint32_t k = 0; w->role != SHARD_HOLD && !w->done && k < w->count; k++) {
        if (w->finished[k] || !complete_chunk(s, p, w, k)) continue;
        done += s->chunk_elements;
        if (done < SYNC_WORK_ELEMENTS) continue;
        w->recheck = true; /* the rest in the next turn */
        break;
    }
    return finish_work(s, p, w);
}
