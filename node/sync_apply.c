/* sync_apply.c - from commit to commit, in ledger order over all fragments: the result chunks of the
 * oldest commit that the state lacks are fetched from its holders, checked against the ledger's
 * result_root, and applied chunk by chunk in batches. Then the fate of the contribution to it is known,
 * the trainer follows, and the root is shown.
 *
 * A chunk that cannot be brought forward like this is left to sync_catchup.c. */
#include <stdlib.h>
#include <string.h>

#include "node/sync_internal.h"

/* ---- which commit ----------------------------------------------------------------------- */

static struct commit *fetch_commit(struct sync *s) {
    return s->fetch.active ? ledger_commit_at(s, s->fetch.index) : NULL;
}

/* k: in the commit's fragment. */
static bool needs(const struct sync *s, const struct commit *c, uint32_t k) {
    return s->state.version[s->fragment[c->body.fragment].chunk[k]] == c->body.base_index;
}

static bool needs_any(const struct sync *s, const struct commit *c) {
    for (uint32_t k = 0; k < s->fragment[c->body.fragment].count; k++)
        if (needs(s, c, k)) return true;
    return false;
}

/* The oldest that some chunk needs. NULL: every chunk is at the head, missing, or too far behind; or
 * its results cannot be had. */
static struct commit *next_commit(struct sync *s) {
    for (uint32_t i = SYNC_COMMITS_KEPT; i-- > 0;) {
        struct commit *c = ledger_recent(s, i);
        if (!c || (s->state.known && c->index <= s->state.index)) continue;
        if (needs_any(s, c)) return c->unavailable ? NULL : c;
    }
    return NULL;
}

bool apply_fragment_is_current(const struct sync *s, uint32_t fragment) {
    const struct fragment *f = &s->fragment[fragment];
    for (uint32_t k = 0; k < f->count; k++)
        if (s->state.version[f->chunk[k]] != s->ledger.last[fragment]) return false;
    return true;
}

bool apply_waits_for_donors(struct sync *s, uint32_t chunk) {
    uint64_t version = s->state.version[chunk];
    uint32_t fragment = s->place[chunk].fragment;
    if (version == SYNC_MISSING) return true;
    if (version == s->ledger.last[fragment]) return false;
    const struct commit *c = ledger_commit_after(s, fragment, version);
    return !c || c->unavailable;
}

/* ---- the fetch -------------------------------------------------------------------------- */

static void fetch_end(struct sync *s) {
    struct fetch *f = &s->fetch;
    if (!f->active) return;
    for (uint32_t k = 0; f->data && k < f->chunks; k++) free(f->data[k]);
    free(f->data);
    free(f->leaves);
    free(f->leaf_have);
    free(f->shard);
    free(f->asked);
    *f = (struct fetch){0};
}

void apply_release(struct sync *s) { fetch_end(s); }

/* Under a leaf that is the ledger's, so what another shard's aggregator told us is not taken for it. */
static struct held *held_with(struct sync *s, const struct commit *c, uint32_t k) {
    struct held *h = results_with(s, c, k);
    bool right = h && h->codec == c->body.codec &&
                 digest_equal(&h->leaves.leaves[k - h->leaves.first].digest, &s->fetch.leaves[k].digest);
    return right ? h : NULL;
}

static bool has_data(struct sync *s, const struct commit *c, uint32_t k) {
    return s->fetch.data[k] || held_with(s, c, k);
}

/* NULL: the disk has lost it. */
static const uint8_t *data_of(struct sync *s, const struct commit *c, uint32_t k) {
    if (s->fetch.data[k]) return s->fetch.data[k];
    struct held *h = held_with(s, c, k);
    return h ? results_chunk(s, h, k) : NULL;
}

/* How many chunks could be applied now. */
static void count_ready(struct sync *s, const struct commit *c) {
    s->fetch.ready = 0;
    for (uint32_t k = 0; s->fetch.verified && k < s->fetch.chunks; k++)
        if (needs(s, c, k) && has_data(s, c, k)) s->fetch.ready++;
}

static uint32_t shard_of(const struct commit *c, uint32_t k) {
    uint32_t i = 0;
    while (i + 1 < c->body.shards_count && k - c->body.shards[i].first >= c->body.shards[i].count)
        i++;
    return i;
}

/* What was asked for in this shard is not waited for. */
static void stop_asking(struct sync *s, const struct commit *c, uint32_t shard) {
    struct fetch *f = &s->fetch;
    const struct msg_shard *m = &c->body.shards[shard];
    for (uint32_t k = m->first; k < m->first + m->count; k++) {
        if (!proto_set_has(f->asked, k)) continue;
        proto_set_del(f->asked, k);
        f->outstanding--;
        f->window -= encoded_bytes(s, c->body.fragment, (enum outer_codec)c->body.codec, k);
    }
    f->shard[shard].asking = f->shard[shard].dialling = false;
}

static void turn_away(struct sync *s, const struct commit *c, uint32_t shard) {
    struct fetch_shard *fs = &s->fetch.shard[shard];
    stop_asking(s, c, shard);
    fs->asked_ms = s->now;
    fs->turn++;
    fs->refusals++;
}

/* Have the leaves of all shards come, and are they the ledger's? */
static void check_leaves(struct sync *s, const struct commit *c) {
    struct fetch *f = &s->fetch;
    for (uint32_t i = 0; i < c->body.shards_count; i++)
        if (!f->shard[i].leaves_have) return;
    struct digest root = digest_tree_root(f->leaves, f->chunks);
    f->verified = digest_equal(&root, &c->body.result_root);
    if (f->verified) {
        count_ready(s, c);
        return;
    }
    sync_log(s, SYNC_WARNING,
             "the results of fragment %u round %llu are not those that were committed; asking others",
             c->body.fragment, (unsigned long long)c->body.round);
    memset(f->leaf_have, 0, bitmap_bytes(f->chunks));
    for (uint32_t i = 0; i < c->body.shards_count; i++) {
        f->shard[i].leaves_have = false;
        turn_away(s, c, i);
    }
}

/* Leaves of chunks [first, first + n) came, of which only those in the shard count. False: no new ones. */
static bool take_leaves(struct sync *s, const struct commit *c, uint32_t shard, uint32_t first,
                        const struct msg_digest_item *leaves, uint32_t n) {
    struct fetch *f = &s->fetch;
    const struct msg_shard *m = &c->body.shards[shard];
    bool all = true, news = false;
    for (uint32_t k = m->first; k < m->first + m->count; k++) {
        if (!proto_set_has(f->leaf_have, k) && k >= first && k - first < n) {
            f->leaves[k] = leaves[k - first];
            proto_set_add(f->leaf_have, k);
            news = true;
        }
        all = all && proto_set_has(f->leaf_have, k);
    }
    f->shard[shard].leaves_have = all;
    return news;
}

/* What we hold ourselves, by now. */
static void take_held(struct sync *s, const struct commit *c) {
    struct fetch *f = &s->fetch;
    f->held_change = s->held_change;
    for (uint32_t i = 0; i < c->body.shards_count; i++) f->shard[i].complete = false;
    for (uint32_t k = 0; !f->verified && k < f->chunks; k++) {
        const struct held *h = results_with(s, c, k);
        if (h) take_leaves(s, c, shard_of(c, k), k, &h->leaves.leaves[k - h->leaves.first], 1);
    }
    if (f->verified) count_ready(s, c);
    else check_leaves(s, c);
}

/* Is our state the one that the run agreed on? Nothing is built on another. */
static bool base_is_right(struct sync *s) {
    struct digest root;
    if (!s->state.whole || !ledger_root(s, s->state.index, &root)) return true;
    if (digest_equal(&s->state.root, &root)) return true;
    sync_log(s, SYNC_ERROR, "our state at ledger index %llu is not the run's: fetching it anew",
             (unsigned long long)s->state.index);
    catchup_forget_state(s);
    return false;
}

static void fetch_begin(struct sync *s, struct commit *c) {
    struct fetch *f = &s->fetch;
    if (!base_is_right(s)) return;
    uint32_t n = s->fragment[c->body.fragment].count;
    *f = (struct fetch){
        .active = true, .index = c->index, .chunks = n, .progress_ms = s->now, .came_ms = s->now};
    f->leaves = sync_alloc(s, n, sizeof *f->leaves);
    f->leaf_have = sync_alloc(s, bitmap_bytes(n), 1);
    f->shard = sync_alloc(s, c->body.shards_count, sizeof *f->shard);
    f->data = sync_alloc(s, n, sizeof *f->data);
    f->asked = sync_alloc(s, bitmap_bytes(n), 1);
    results_look(s, c);
    if (s->failure.code) return; /* out of memory: the machine stops */
    take_held(s, c);
}

/* ---- asking holders --------------------------------------------------------------------- */

static uint32_t relays(const struct sync *s) {
    return s->peer_count < SYNC_RELAYS_MAX ? s->peer_count : SYNC_RELAYS_MAX;
}

/* Who is asked for the shard at this turn: half of the members begin with its aggregator and half with
 * its holder; then other members, who may have kept what they fetched, each member others of them. */
static uint32_t candidate(const struct sync *s, const struct commit *c, uint32_t shard) {
    const struct msg_shard *m = &c->body.shards[shard];
    uint32_t turn = s->fetch.shard[shard].turn % (2 + relays(s));
    if (turn >= 2)
        return s->peers[(s->config.member + s->fetch.shard[shard].turn) % s->peer_count]->id;
    return (turn + s->config.member + shard) % 2 ? m->holder : m->aggregator;
}

/* Chunks of the shard that are neither here nor on their way, as many as the window takes. */
static uint32_t choose(struct sync *s, const struct commit *c, uint32_t shard, uint8_t *chunks) {
    struct fetch *f = &s->fetch;
    const struct msg_shard *m = &c->body.shards[shard];
    uint32_t n = 0;
    for (uint32_t k = m->first; k < m->first + m->count && f->window < SYNC_RESULT_WINDOW_BYTES; k++) {
        if (!needs(s, c, k) || has_data(s, c, k) || proto_set_has(f->asked, k)) continue;
        proto_set_add(f->asked, k);
        proto_set_add(chunks, k);
        f->outstanding++;
        f->window += encoded_bytes(s, c->body.fragment, (enum outer_codec)c->body.codec, k);
        n++;
    }
    return n;
}

static void ask(struct sync *s, const struct commit *c, uint32_t shard, struct peer *p) {
    struct fetch_shard *fs = &s->fetch.shard[shard];
    size_t bytes = bitmap_bytes(s->fetch.chunks);
    uint8_t *chunks = sync_alloc(s, bytes, 1);
    if (!chunks) return;
    /* Results are taken only under verified leaves; with one shard these come first anyway. */
    bool data_too = s->fetch.verified || c->body.shards_count == 1;
    uint32_t n = data_too ? choose(s, c, shard, chunks) : 0;
    if (n || !fs->leaves_have) {
        struct msg_result_get get = {.fragment = c->body.fragment,
                                     .round = c->body.round,
                                     .plan = c->body.plan,
                                     .chunks = {chunks, (uint32_t)bytes}};
        peer_send(s, p, MSG_RESULT_GET, c->term, c->body.plan, &get, bytes);
        fs->asking = true;
        fs->dialling = false;
        fs->asked_ms = s->now;
    }
    free(chunks);
}

static bool shard_is_complete(struct sync *s, const struct commit *c, uint32_t shard) {
    const struct msg_shard *m = &c->body.shards[shard];
    for (uint32_t k = m->first; k < m->first + m->count; k++)
        if (needs(s, c, k) && !has_data(s, c, k)) return false;
    return true;
}

/* Everybody said no, or nothing came: not at once again. */
static bool rests(const struct sync *s, const struct fetch_shard *fs) {
    return !fs->asking && fs->refusals && fs->turn % (2 + relays(s)) == 0 &&
           s->now - fs->asked_ms < s->outer->heartbeat_ms;
}

static void ask_shard(struct sync *s, const struct commit *c, uint32_t shard) {
    struct fetch *f = &s->fetch;
    struct fetch_shard *fs = &f->shard[shard];
    if (!fs->complete && f->verified && shard_is_complete(s, c, shard)) {
        stop_asking(s, c, shard); /* the rest of it we hold ourselves by now */
        fs->complete = true;
    }
    if (fs->complete) return;
    if ((fs->asking || fs->dialling) && s->now - fs->asked_ms >= 2 * s->outer->heartbeat_ms)
        turn_away(s, c, shard);
    if (fs->asking && (!fs->leaves_have || f->window > SYNC_RESULT_WINDOW_BYTES / 2)) return;
    if (rests(s, fs)) return;
    if (!fs->asking && !fs->dialling) fs->from = candidate(s, c, shard);
    uint32_t from = fs->from;
    struct peer *p = from == s->config.member ? NULL : peer_link(s, from);
    if (p && p->open) {
        ask(s, c, shard, p);
    } else if (from == s->config.member || !peer_reachable(s, from)) {
        turn_away(s, c, shard);
    } else if (!fs->dialling) {
        fs->dialling = true;
        fs->asked_ms = s->now;
    }
}

/* Nobody who was asked for a shard has it, or nothing came for long: members who have the state are
 * asked. */
static bool is_hopeless(const struct sync *s, const struct commit *c) {
    const struct fetch *f = &s->fetch;
    uint64_t silent = s->now - f->progress_ms;
    if (f->ready) return false;
    for (uint32_t i = 0; i < c->body.shards_count; i++)
        if (f->shard[i].refusals >= 2 + relays(s) && silent >= s->outer->heartbeat_ms)
            return true;
    return silent >= s->outer->silence_ms_max;
}

void apply_pump(struct sync *s) {
    apply_show_root(s);
    if (!s->fetch.active) {
        struct commit *next = state_current(s) ? NULL : next_commit(s);
        if (next) fetch_begin(s, next);
    }
    if (!s->fetch.active || s->failure.code) return;
    struct commit *c = fetch_commit(s);
    if (!c || !needs_any(s, c)) {
        fetch_end(s);
        apply_arrived(s); /* donors may have brought the last of it */
        return;
    }
    if (s->fetch.held_change != s->held_change) take_held(s, c);
    for (uint32_t i = 0; i < c->body.shards_count; i++) ask_shard(s, c, i);
    if (!is_hopeless(s, c)) return;
    sync_log(s, SYNC_INFO,
             "nobody gives the results of fragment %u round %llu; asking for the state",
             c->body.fragment, (unsigned long long)c->body.round);
    c->unavailable = true;
    fetch_end(s);
}

/* ---- answers ---------------------------------------------------------------------------- */

void apply_on_holders(struct sync *s, const struct msg_holders *msg) {
    peer_set_addresses(s, msg->addresses, msg->addresses_count);
    catchup_set_donors(s, msg->addresses, msg->addresses_count, false);
    struct commit *c = ledger_commit_at(s, msg->index);
    if (!c) return;
    c->unavailable = false;
    if (fetch_commit(s) != c) return;
    s->fetch.progress_ms = s->now;
    for (uint32_t i = 0; i < c->body.shards_count; i++) s->fetch.shard[i].refusals = 0;
}

/* The commit a frame's results belong to, if that is the one being fetched. */
static struct commit *fetched(struct sync *s, const struct frame *f, uint32_t fragment,
                              uint64_t round) {
    struct commit *c = fetch_commit(s);
    return c && c->body.fragment == fragment && c->body.round == round && f->term == c->term &&
                   f->plan == c->body.plan
               ? c
               : NULL;
}

bool apply_owes(const struct sync *s, uint32_t member) {
    const struct fetch *f = &s->fetch;
    struct commit *c = fetch_commit((struct sync *)(uintptr_t)s);
    for (uint32_t i = 0; c && f->outstanding && i < c->body.shards_count; i++)
        if (f->shard[i].asking && f->shard[i].from == member) return true;
    return false;
}

static void note_answer(struct sync *s, uint32_t shard) {
    s->fetch.shard[shard].asked_ms = s->now;
    s->fetch.shard[shard].refusals = 0;
    s->fetch.progress_ms = s->now;
}

void apply_on_result_leaves(struct sync *s, struct peer *p, const struct frame *f,
                            const struct msg_result_leaves *msg) {
    struct commit *c = fetched(s, f, msg->fragment, msg->round);
    bool news = false;
    for (uint32_t i = 0; c && i < c->body.shards_count; i++) {
        const struct msg_shard *m = &c->body.shards[i];
        bool overlap = msg->first < m->first + m->count &&
                       msg->leaves_count > (m->first > msg->first ? m->first - msg->first : 0);
        if (!overlap || s->fetch.shard[i].from != p->id || !s->fetch.shard[i].asking) continue;
        /* Who shows what we know may have no more than that: it is no progress. */
        s->fetch.shard[i].asked_ms = s->now;
        if (!take_leaves(s, c, i, msg->first, msg->leaves, msg->leaves_count)) continue;
        note_answer(s, i);
        news = true;
    }
    if (news && !s->fetch.verified) check_leaves(s, c);
}

static bool result_is_right(struct sync *s, const struct commit *c, const struct msg_result *msg) {
    uint32_t k = msg->chunk;
    size_t n = chunk_elements(s, s->fragment[c->body.fragment].chunk[k]);
    if (msg->codec != c->body.codec ||
        msg->data.length !=
            encoded_bytes(s, c->body.fragment, (enum outer_codec)msg->codec, k))
        return false;
    struct digest leaf = digest_leaf(k, msg->data.data, msg->data.length);
    if (!digest_equal(&leaf, &s->fetch.leaves[k].digest)) return false;
    return outer_check(msg->data.data, msg->data.length, n, (enum outer_codec)msg->codec, NULL) ==
           0;
}

/* Also one that took longer than we wait for an answer. */
static bool is_welcome(struct sync *s, const struct commit *c, uint32_t k) {
    return proto_set_has(s->fetch.asked, k) ||
           (needs(s, c, k) && !has_data(s, c, k) && s->fetch.window < SYNC_RESULT_WINDOW_BYTES);
}

void apply_on_result(struct sync *s, struct peer *p, const struct frame *frame,
                     const struct msg_result *msg) {
    struct fetch *f = &s->fetch;
    struct commit *c = fetched(s, frame, msg->fragment, msg->round);
    if (!c || !f->verified || msg->chunk >= f->chunks || !is_welcome(s, c, msg->chunk)) return;
    if (!result_is_right(s, c, msg)) {
        peer_close(s, p, "a result is not what was committed");
        return;
    }
    if (!(f->data[msg->chunk] = sync_alloc(s, msg->data.length, 1))) return;
    memcpy(f->data[msg->chunk], msg->data.data, msg->data.length);
    if (proto_set_has(f->asked, msg->chunk)) f->outstanding--;
    else f->window += msg->data.length;
    proto_set_del(f->asked, msg->chunk);
    if (needs(s, c, msg->chunk)) f->ready++;
    f->came_ms = s->now;
    note_answer(s, shard_of(c, msg->chunk));
}

void apply_on_none(struct sync *s, struct peer *p, const struct msg_none *msg) {
    struct commit *c = fetch_commit(s);
    if (!c || msg->fragment != c->body.fragment || msg->round != c->body.round) return;
    for (uint32_t i = 0; i < c->body.shards_count; i++)
        if (s->fetch.shard[i].from == p->id && s->fetch.shard[i].asking) turn_away(s, c, i);
}

void apply_ask_again(struct sync *s, const struct peer *p) {
    struct commit *c = fetch_commit(s);
    for (uint32_t i = 0; c && i < c->body.shards_count; i++)
        if (s->fetch.shard[i].from == p->id && s->fetch.shard[i].asking) stop_asking(s, c, i);
}

void apply_on_peer_closed(struct sync *s, const struct peer *p) {
    struct commit *c = fetch_commit(s);
    for (uint32_t i = 0; c && i < c->body.shards_count; i++)
        if (s->fetch.shard[i].from == p->id &&
            (s->fetch.shard[i].asking || s->fetch.shard[i].dialling))
            turn_away(s, c, i);
}

/* ---- applying --------------------------------------------------------------------------- */

/* Is half the window here, and would applying it let more come? */
static bool has_much(struct sync *s) {
    const struct fetch *f = &s->fetch;
    const struct commit *c = ledger_commit_at(s, f->index);
    enum outer_codec codec = c ? (enum outer_codec)c->body.codec : OUTER_INT8;
    size_t coming = f->outstanding * outer_encoded_bytes(codec, s->chunk_elements);
    return f->window > coming && f->window - coming >= SYNC_RESULT_WINDOW_BYTES / 2;
}

/* Where results come fast, nobody is kept waiting for his by what another does with its own. */
static bool is_batch_ready(struct sync *s) {
    const struct fetch *f = &s->fetch;
    if (!f->ready || f->outstanding == 0) return f->ready;
    if (s->now - f->came_ms < SYNC_FAST_MS && !has_much(s)) return false;
    return (uint64_t)f->ready * s->chunk_elements >= SYNC_BATCH_ELEMENTS || f->ready >= SYNC_BATCH_CHUNKS;
}

bool apply_has_work(struct sync *s) {
    return s->fetch.active && s->fetch.verified && trainer_takes_changes(s) && is_batch_ready(s);
}

/* Our number among the commit's contributors, if what it summed is the contribution we hold. */
static int own_contributor(struct sync *s, const struct commit *c) {
    const struct contribution *own = &s->contribution[c->body.fragment];
    if (!own->frozen || own->ready.base_index != c->body.base_index) return -1;
    return commit_contributor(c, s->config.member, &own->ready.root);
}

/* The outer step of one chunk; what it was stays in scratch2. */
static int step_chunk(struct sync *s, const struct commit *c, uint32_t k) {
    uint32_t f = c->body.fragment, chunk = s->fragment[f].chunk[k];
    size_t first = chunk_first(s, chunk), n = chunk_elements(s, chunk);
    enum outer_codec codec = (enum outer_codec)c->body.codec;
    float *anchor = s->state.anchor + first;
    const uint8_t *data = data_of(s, c, k);
    if (!data) return err_set(&s->failure, ERR_CORRUPT, "a result was lost while it was applied");
    if (outer_decode(s->scratch, data, encoded_bytes(s, f, codec, k), n, codec, &s->failure))
        return -1;
    memcpy(s->scratch2, anchor, n * sizeof *anchor);
    outer_nesterov(anchor, s->state.momentum + first, s->scratch, n, c->body.lr, c->body.momentum);
    return 0;
}

/* Was a contribution that we gave up summed all the same? A coordinator with an older store may have taken a lease
 * from us whose samples were committed, as we hear when another member shows it the rest. */
static bool sums_given_up(struct sync *s, uint32_t chunk) {
    const struct contribution *own = &s->contribution[s->place[chunk].fragment];
    if (digest_is_zero(&own->given_up) || own->given_up_base != s->state.version[chunk]) return false;
    struct commit *c = ledger_commit_after(s, s->place[chunk].fragment, own->given_up_base);
    return c && commit_summed(c, s->place[chunk].k, commit_contributor(c, s->config.member, &own->given_up));
}

/* The chunk goes from scratch2 to what the anchor holds now: the trainer follows, error feedback too. */
void apply_follow(struct sync *s, uint32_t chunk, bool summed) {
    const struct contribution *own = &s->contribution[s->place[chunk].fragment];
    size_t first = chunk_first(s, chunk), n = chunk_elements(s, chunk);
    if (trainer_follows(s))
        trainer_change(s, chunk, s->scratch2, summed && trainer_holds(s, own));
    if (s->residual && (summed || sums_given_up(s, chunk)))
        memcpy(s->residual + first, s->residual_next + first, n * sizeof *s->residual);
}

static int apply_chunk(struct sync *s, const struct commit *c, uint32_t k) {
    if (step_chunk(s, c, k)) return -1;
    apply_follow(s, s->fragment[c->body.fragment].chunk[k],
                 commit_summed(c, k, own_contributor(s, c)));
    return 0;
}

bool apply_summed_here(struct sync *s, uint32_t chunk) {
    const struct contribution *own = &s->contribution[s->place[chunk].fragment];
    struct commit *c = own->frozen ? ledger_commit_after(s, s->place[chunk].fragment,
                                                         own->ready.base_index)
                                   : NULL;
    return c && own->ready.base_index == s->state.version[chunk] &&
           commit_summed(c, s->place[chunk].k, own_contributor(s, c));
}

struct batch {
    uint32_t k[SYNC_BATCH_CHUNKS], chunk[SYNC_BATCH_CHUNKS], count;
    uint64_t version[SYNC_BATCH_CHUNKS];
};

static void choose_batch(struct sync *s, const struct commit *c, struct batch *b) {
    size_t elements = 0;
    b->count = 0;
    const struct fragment *f = &s->fragment[c->body.fragment];
    for (uint32_t k = 0; k < f->count && b->count < SYNC_BATCH_CHUNKS; k++) {
        if (elements >= SYNC_BATCH_ELEMENTS) return;
        if (!needs(s, c, k) || !data_of(s, c, k)) continue;
        b->k[b->count] = k;
        b->chunk[b->count] = f->chunk[k];
        b->version[b->count++] = c->index;
        elements += s->chunk_elements;
    }
}

static void forget_data(struct sync *s, const struct commit *c, uint32_t k) {
    struct fetch *f = &s->fetch;
    if (!f->data[k]) return;
    results_relay(s, c, f->leaves, k, f->data[k]);
    f->data[k] = NULL;
    f->window -= encoded_bytes(s, c->body.fragment, (enum outer_codec)c->body.codec, k);
}

int apply_work(struct sync *s) {
    struct commit *c = fetch_commit(s);
    struct batch b;
    if (!c) {
        fetch_end(s);
        return 0;
    }
    choose_batch(s, c, &b);
    if (state_change_begin(s, b.chunk, b.count)) return -1;
    for (uint32_t i = 0; i < b.count; i++)
        if (apply_chunk(s, c, b.k[i])) return -1;
    if (state_change_end(s, b.chunk, b.version, b.count)) return -1;
    for (uint32_t i = 0; i < b.count; i++) forget_data(s, c, b.k[i]);
    s->fetch.progress_ms = s->now;
    count_ready(s, c);
    if (!needs_any(s, c)) fetch_end(s);
    apply_arrived(s);
    return 0;
}

/* ---- at a new index --------------------------------------------------------------------- */

/* Once per state: a member that says nothing holds up what the others may delete. */
void apply_show_root(struct sync *s) {
    struct state *st = &s->state;
    if (!st->whole || !s->welcomed || (st->told && st->told_index == st->index)) return;
    struct msg_root root = {.index = st->index, .root = st->root};
    sync_send(s, MSG_ROOT, 0, &root);
    st->told = true;
    st->told_index = st->index;
}

/* A commit took the contribution's place in the ledger, and is in the state. Where it was not summed, the
 * work is still in the trainer, or in the frozen bytes alone, or it goes to a trainer again. */
static void resolve(struct sync *s, uint32_t fragment) {
    struct contribution *own = &s->contribution[fragment];
    struct commit *c = ledger_commit_after(s, fragment, own->ready.base_index);
    bool summed = c && commit_summed_any(c, own_contributor(s, c));
    if (c && !summed && !trainer_holds(s, own) && contribution_again(s, fragment)) return;
    *(summed ? &s->summed : &s->refused) += 1;
    trainer_decided(s, fragment, summed);
    contribution_drop(s, fragment);
    leases_orphan_decided(s);
}

void apply_resolve(struct sync *s) {
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        const struct contribution *own = &s->contribution[f];
        if (own->frozen && own->ready.base_index != s->ledger.last[f] &&
            apply_fragment_is_current(s, f))
            resolve(s, f);
    }
}

void apply_arrived(struct sync *s) {
    apply_show_root(s);
    apply_resolve(s);
    results_settle(s);
}
