/* sync_results.c - results that this member can give to others: the shards that it summed or copied, one
 * blob per shard and round on disk, and what it fetched of others' shards, in memory. Kept until every
 * live member has applied the round, served to whoever asks. Memory is bounded: own shards beyond that are
 * read from disk when they are needed, fetched results are forgotten, the oldest first.
 *
 * A blob: the encoded chunks one after the other, then an encoded msg_result_leaves, then a
 * trailer. Names go round SYNC_RESULTS_KEPT, so what was forgotten is overwritten. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "node/sync_internal.h"

struct trailer {
    char magic[8];
    uint64_t term, data_bytes, meta_bytes;
    uint32_t shard, codec;
    struct digest
        digest; /* of the leaves' record and what stands above; the leaves vouch for the data */
};

static void blob_name(uint32_t fragment, uint64_t round, uint32_t shard, char out[48]) {
    snprintf(out, 48, "result-%u-%u-%u", fragment, (uint32_t)(round % SYNC_RESULTS_KEPT), shard);
}

/* A plan that resumes a commit numbers its shards from 0 again, and this member may hold one of the
 * commit's own. */
uint32_t results_shard(const struct plan *p, uint32_t shard) {
    return p->msg.resum ? PROTO_SHARDS_MAX + shard : shard;
}

static struct digest trailer_digest(const struct trailer *t, const uint8_t *meta) {
    struct digest_stream d;
    digest_stream_init(&d);
    digest_stream_update(&d, meta, t->meta_bytes);
    digest_stream_update(&d, t, offsetof(struct trailer, digest));
    return digest_stream_final(&d);
}

/* ---- the list --------------------------------------------------------------------------- */

static void forget_bytes(struct sync *s, struct held *h) {
    for (uint32_t k = 0; h->chunk && k < h->leaves.leaves_count; k++) {
        sync_free_later(s, h->chunk[k]);
        h->chunk[k] = NULL;
    }
    sync_free_later(s, h->data);
    h->data = NULL;
    s->held_bytes -= h->bytes;
    h->bytes = 0;
}

static void forget(struct sync *s, uint32_t i) {
    forget_bytes(s, &s->held[i]);
    free(s->held[i].chunk);
    proto_copy_release(RECORD_result_leaves, &s->held[i].leaves);
    s->held[i] = s->held[--s->held_count];
}

static void note_use(struct sync *s, struct held *h) { h->used = ++s->held_used; }

/* What was used last stays, however large it is. */
static void make_room(struct sync *s, const struct held *keep) {
    while (s->held_bytes > SYNC_RESULTS_BYTES) {
        struct held *oldest = NULL;
        for (uint32_t i = 0; i < s->held_count; i++) {
            struct held *h = &s->held[i];
            if (h != keep && h->bytes && (!oldest || h->used < oldest->used)) oldest = h;
        }
        if (!oldest) return;
        forget_bytes(s, oldest);
    }
}

static void count_bytes(struct sync *s, struct held *h, size_t bytes) {
    h->bytes += bytes;
    s->held_bytes += bytes;
    note_use(s, h);
    make_room(s, h);
}

/* Do they have the same name on disk? */
static bool has_name(const struct held *h, uint32_t fragment, uint64_t round, uint32_t shard) {
    return h->fragment == fragment && h->shard == shard &&
           h->round % SYNC_RESULTS_KEPT == round % SYNC_RESULTS_KEPT;
}

static bool is_asked(const struct talk *t, uint32_t fragment, const struct held *h) {
    return h->fragment == fragment && h->term == t->results_term && h->plan == t->results_plan &&
           h->round == t->results_round;
}

/* Who asked before this was here has had no leaves of it, though perhaps another shard's. */
static void owe_leaves(struct sync *s, const struct held *h) {
    for (uint32_t i = 0; i < s->peer_count; i++) {
        struct talk *t = &s->peers[i]->talk[h->fragment];
        if (t->results && is_asked(t, h->fragment, h)) t->results_leaves = true;
    }
}

/* Takes *h over; whatever had its name on disk is gone from memory too. */
static struct held *add(struct sync *s, struct held *h) {
    for (uint32_t i = s->held_count; i-- > 0;)
        if (has_name(&s->held[i], h->fragment, h->round, h->shard)) forget(s, i);
    struct held *list = realloc(s->held, (s->held_count + 1) * sizeof *list);
    if (!list) {
        err_set(&s->failure, ERR_MEMORY, "no memory for a result");
        proto_copy_release(RECORD_result_leaves, &h->leaves);
        free(h->data);
        free(h->chunk);
        return NULL;
    }
    s->held = list;
    h = memcpy(&s->held[s->held_count++], h, sizeof *h);
    s->held_change++;
    owe_leaves(s, h);
    size_t bytes = h->bytes;
    h->bytes = 0;
    count_bytes(s, h, bytes);
    return h;
}

void results_release(struct sync *s) {
    while (s->held_count) forget(s, s->held_count - 1);
    free(s->held);
    s->held = NULL;
}

void results_settle(struct sync *s) {
    for (uint32_t i = s->held_count; i-- > 0;) {
        struct held *h = &s->held[i];
        struct commit *c = ledger_commit(s, h->fragment, h->round);
        bool is_void = c ? c->term != h->term || c->body.plan != h->plan
                         : h->round < s->ledger.rounds[h->fragment];
        bool applied = c && s->state.known && s->state.index >= c->index;
        if (!is_void && !(applied && c->index <= s->settled)) continue;
        char name[48];
        blob_name(h->fragment, h->round, h->shard, name);
        if (h->shard != SYNC_RELAYED) s->disk.remove(s->disk.arg, name);
        forget(s, i);
    }
}

/* ---- writing ---------------------------------------------------------------------------- */

/* Neighbours that were summed from the same contributors are one run. */
static uint32_t make_runs(const struct plan *p, const struct shard_work *w,
                          struct msg_summed *runs) {
    uint32_t n = 0, bytes = p->set_bytes;
    for (uint32_t k = 0; k < w->count; k++) {
        const uint8_t *set = w->sets + (size_t)k * bytes;
        if (n && runs[n - 1].weight == w->weights[k] && !memcmp(runs[n - 1].set.data, set, bytes))
            runs[n - 1].chunks++;
        else
            runs[n++] = (struct msg_summed){
                .chunks = 1, .set = {set, bytes}, .weight = w->weights[k]};
    }
    return n;
}

/* The data array grows into the blob, so that a large shard is not copied. */
static int write_blob(struct sync *s, const struct plan *p, struct shard_work *w,
                      const struct msg_result_leaves *leaves) {
    enum outer_codec codec = (enum outer_codec)p->msg.codec;
    struct trailer t = {.magic = "ITLRSLT",
                        .term = p->result_term,
                        .shard = results_shard(p, w->shard),
                        .codec = codec,
                        .data_bytes = shard_bytes(s, p->fragment, codec, w->first, w->count)};
    struct proto_buffer meta;
    char name[48];
    proto_buffer_init(&meta, proto_record_bytes_max(RECORD_result_leaves));
    int rc = proto_encode(&meta, RECORD_result_leaves, leaves, &s->failure);
    uint8_t *blob = rc ? NULL : realloc(w->data, t.data_bytes + meta.length + sizeof t);
    if (blob) {
        w->data = blob;
        t.meta_bytes = meta.length;
        t.digest = trailer_digest(&t, meta.data);
        memcpy(blob + t.data_bytes, meta.data, meta.length);
        memcpy(blob + t.data_bytes + meta.length, &t, sizeof t);
        blob_name(p->fragment, p->msg.round, t.shard, name);
        if (!SYNC_HAS_FAULT(REPORT_BEFORE_DISK))
            rc = s->disk.put(s->disk.arg, name, blob, t.data_bytes + meta.length + sizeof t,
                             &s->failure);
    } else if (rc == 0) {
        rc = err_set(&s->failure, ERR_MEMORY, "no memory for a result");
    }
    proto_buffer_release(&meta);
    return rc;
}

int results_keep(struct sync *s, const struct plan *p, struct shard_work *w) {
    struct held h = {.term = p->result_term,
                     .plan = p->result_plan,
                     .fragment = p->fragment,
                     .round = p->msg.round,
                     .shard = results_shard(p, w->shard),
                     .codec = (enum outer_codec)p->msg.codec};
    struct msg_summed *runs = sync_alloc(s, w->count, sizeof *runs);
    if (!runs) return -1;
    struct msg_result_leaves leaves = {.fragment = p->fragment,
                                       .round = p->msg.round,
                                       .plan = p->result_plan,
                                       .first = w->first,
                                       .leaves = w->leaves,
                                       .leaves_count = w->count,
                                       .summed = runs,
                                       .summed_count = make_runs(p, w, runs)};
    int rc = write_blob(s, p, w, &leaves);
    if (rc == 0) rc = proto_copy(RECORD_result_leaves, &leaves, &h.leaves, &s->failure);
    free(runs);
    if (rc) return -1;
    h.data = w->data;
    h.bytes = shard_bytes(s, p->fragment, h.codec, w->first, w->count);
    w->data = NULL;
    return add(s, &h) ? 0 : -1;
}

/* ---- reading ---------------------------------------------------------------------------- */

/* Does every chunk of the blob have the leaf it should? */
static const uint8_t *data_at(const struct sync *s, const struct held *h, uint32_t k) {
    return h->data + encoded_offset(s, h->codec, k - h->leaves.first);
}

static bool data_is_intact(const struct sync *s, const struct held *h, size_t bytes) {
    const struct msg_result_leaves *l = &h->leaves;
    uint32_t count = h->fragment < s->fragment_count ? s->fragment[h->fragment].count : 0;
    if (l->leaves_count == 0 || l->first >= count || l->leaves_count > count - l->first)
        return false;
    if (bytes != shard_bytes(s, h->fragment, h->codec, l->first, l->leaves_count)) return false;
    for (uint32_t k = 0; k < l->leaves_count; k++) {
        if (digest_is_zero(&l->leaves[k].digest)) continue;
        struct digest d = digest_leaf(l->first + k, data_at(s, h, l->first + k),
                                      encoded_bytes(s, h->fragment, h->codec, l->first + k));
        if (!digest_equal(&d, &l->leaves[k].digest)) return false;
    }
    return true;
}

static bool read_trailer(const uint8_t *blob, size_t length, struct trailer *t) {
    if (length < sizeof *t) return false;
    memcpy(t, blob + length - sizeof *t, sizeof *t);
    size_t rest = length - sizeof *t;
    if (memcmp(t->magic, "ITLRSLT", 8) || t->data_bytes > rest ||
        t->meta_bytes != rest - t->data_bytes)
        return false;
    if (outer_encoded_bytes((enum outer_codec)t->codec, 1) == 0) return false;
    struct digest d = trailer_digest(t, blob + t->data_bytes);
    return digest_equal(&d, &t->digest);
}

/* Takes the blob over when it is right. */
static bool read_blob(struct sync *s, uint8_t *blob, size_t length, struct held *h) {
    struct trailer t;
    struct msg_result_leaves leaves = {0};
    struct err err = {0};
    if (!read_trailer(blob, length, &t)) return false;
    bool ok = proto_decode(blob + t.data_bytes, t.meta_bytes, RECORD_result_leaves, &leaves,
                           &err) == 0;
    if (ok) {
        *h = (struct held){.term = t.term,
                           .plan = leaves.plan,
                           .fragment = leaves.fragment,
                           .round = leaves.round,
                           .shard = t.shard,
                           .codec = (enum outer_codec)t.codec,
                           .leaves = leaves,
                           .data = blob,
                           .bytes = t.data_bytes};
        ok = data_is_intact(s, h, t.data_bytes) &&
             proto_copy(RECORD_result_leaves, &leaves, &h->leaves, &s->failure) == 0;
    }
    proto_decoded_release(RECORD_result_leaves, &leaves);
    return ok;
}

/* -1: the disk failed, or has nothing right under this name. */
static int read_held(struct sync *s, uint32_t fragment, uint64_t round, uint32_t shard,
                     struct held *out) {
    char name[48];
    uint8_t *blob;
    size_t length;
    struct err err = {0};
    blob_name(fragment, round, shard, name);
    if (s->disk.get(s->disk.arg, name, &blob, &length, &err)) {
        if (err.code != ERR_NOT_FOUND) s->failure = err;
        return -1;
    }
    if (read_blob(s, blob, length, out)) return 0;
    free(blob);
    return -1;
}

struct held *results_find(struct sync *s, uint32_t fragment, uint64_t term, uint64_t plan,
                          uint64_t round, uint32_t shard) {
    struct held *h = NULL, found;
    for (uint32_t i = 0; i < s->held_count && !h; i++)
        if (has_name(&s->held[i], fragment, round, shard)) h = &s->held[i];
    if (!h && !read_held(s, fragment, round, shard, &found)) h = add(s, &found);
    bool right = h && has_name(h, fragment, round, shard) && h->term == term && h->plan == plan &&
                 h->round == round;
    return right ? h : NULL;
}

static bool is_of_commit(const struct held *h, const struct commit *c) {
    return h->fragment == c->body.fragment && h->term == c->term && h->plan == c->body.plan &&
           h->round == c->body.round;
}

/* After a restart own shards are on disk only. */
void results_look(struct sync *s, struct commit *c) {
    uint32_t f = c->body.fragment;
    if (c->looked) return;
    c->looked = true;
    for (uint32_t i = 0; i < c->body.shards_count; i++)
        if (c->body.shards[i].aggregator == s->config.member ||
            c->body.shards[i].holder == s->config.member)
            results_find(s, f, c->term, c->body.plan, c->body.round, i);
    /* Later ones were resumed, if at all, in the life of this process. */
    for (uint32_t i = 0; c->index < s->ledger.loaded && i < SYNC_RESUMS_MAX; i++)
        results_find(s, f, c->term, c->body.plan, c->body.round, PROTO_SHARDS_MAX + i);
}

static bool covers(const struct held *h, uint32_t k) {
    return k >= h->leaves.first && k - h->leaves.first < h->leaves.leaves_count &&
           (!h->chunk || h->chunk[k - h->leaves.first]);
}

struct held *results_with(struct sync *s, const struct commit *c, uint32_t k) {
    for (uint32_t i = 0; i < s->held_count; i++)
        if (is_of_commit(&s->held[i], c) && covers(&s->held[i], k)) return &s->held[i];
    return NULL;
}

/* Into memory again. -1: the disk lost it; then nobody is told any more that we hold it. */
static int load(struct sync *s, struct held *h) {
    struct held found;
    int rc = read_held(s, h->fragment, h->round, h->shard, &found);
    if (rc == 0 && found.term == h->term && found.leaves.plan == h->plan && found.round == h->round) {
        h->data = found.data;
        proto_copy_release(RECORD_result_leaves, &found.leaves);
        count_bytes(s, h, found.bytes);
        return 0;
    }
    if (rc == 0) {
        free(found.data);
        proto_copy_release(RECORD_result_leaves, &found.leaves);
    }
    sync_log(s, SYNC_ERROR, "results of fragment %u round %llu are gone from the disk", h->fragment,
             (unsigned long long)h->round);
    forget(s, (uint32_t)(h - s->held));
    s->held_change++;
    return -1;
}

const uint8_t *results_chunk(struct sync *s, struct held *h, uint32_t k) {
    note_use(s, h);
    if (h->chunk) return h->chunk[k - h->leaves.first];
    if (!h->data && load(s, h)) return NULL;
    return data_at(s, h, k);
}

/* ---- what was fetched ------------------------------------------------------------------- */

static struct held *relay_of(struct sync *s, const struct commit *c,
                             const struct msg_digest_item *leaves) {
    uint32_t count = s->fragment[c->body.fragment].count;
    for (uint32_t i = 0; i < s->held_count; i++)
        if (s->held[i].shard == SYNC_RELAYED && is_of_commit(&s->held[i], c)) return &s->held[i];
    struct held h = {.term = c->term,
                     .plan = c->body.plan,
                     .fragment = c->body.fragment,
                     .round = c->body.round,
                     .shard = SYNC_RELAYED,
                     .codec = (enum outer_codec)c->body.codec};
    struct msg_result_leaves all = {.fragment = c->body.fragment,
                                    .round = c->body.round,
                                    .plan = c->body.plan,
                                    .leaves = (struct msg_digest_item *)(uintptr_t)leaves,
                                    .leaves_count = count,
                                    .summed = c->body.summed,
                                    .summed_count = c->body.summed_count};
    h.chunk = sync_alloc(s, count, sizeof *h.chunk);
    if (!h.chunk || proto_copy(RECORD_result_leaves, &all, &h.leaves, &s->failure)) {
        free(h.chunk);
        return NULL;
    }
    return add(s, &h);
}

void results_relay(struct sync *s, const struct commit *c, const struct msg_digest_item *leaves,
                   uint32_t k, uint8_t *data) {
    size_t bytes = encoded_bytes(s, c->body.fragment, (enum outer_codec)c->body.codec, k);
    struct held *h = c->index > s->settled ? relay_of(s, c, leaves) : NULL;
    if (!h || h->chunk[k] || h->bytes + bytes > SYNC_RESULTS_BYTES) {
        free(data);
        return;
    }
    h->chunk[k] = data;
    count_bytes(s, h, bytes);
}

/* ---- reporting -------------------------------------------------------------------------- */

/* Of shard `shard` of the plan, whatever it is kept under. */
void results_report(struct sync *s, const struct plan *p, uint32_t shard, const struct held *h) {
    struct msg_shard_report report = {.fragment = h->fragment,
                                      .round = h->round,
                                      .plan = p->number,
                                      .shard = shard,
                                      .results = h->leaves.leaves,
                                      .results_count = h->leaves.leaves_count,
                                      .summed = h->leaves.summed,
                                      .summed_count = h->leaves.summed_count};
    if (proto_record_sign(s->config.identity, "shard_report", &s->config.run, s->term,
                          RECORD_shard_report, &report, &report.signature, &s->failure))
        return;
    sync_send(s, MSG_SHARD_REPORT, p->number, &report);
}

/* ---- serving ---------------------------------------------------------------------------- */

void results_on_get(struct sync *s, struct peer *p, const struct frame *f,
                    const struct msg_result_get *msg) {
    size_t bytes = bitmap_bytes(s->fragment[msg->fragment].count);
    struct talk *t = &p->talk[msg->fragment];
    if (msg->plan != f->plan || msg->chunks.length != bytes) {
        peer_close(s, p, "it asks for results that cannot be");
        return;
    }
    bool more = t->results && t->results_term == f->term && t->results_plan == f->plan &&
                t->results_round == msg->round;
    if (!more) {
        if (!t->results && !(t->results = sync_alloc(s, bytes, 1))) return;
        memset(t->results, 0, bytes);
        t->results_term = f->term;
        t->results_plan = f->plan;
        t->results_round = msg->round;
    }
    for (size_t i = 0; i < bytes; i++) t->results[i] |= msg->chunks.data[i];
    t->results_leaves = true;
    struct commit *c = ledger_commit(s, msg->fragment, msg->round);
    if (c && c->term == f->term && c->body.plan == f->plan) results_look(s, c);
}

static void end_results(struct talk *t) {
    free(t->results);
    t->results = NULL;
    t->results_leaves = t->results_lack = false;
}

static bool send_leaves(struct sync *s, struct peer *p, uint32_t fragment) {
    bool any = false;
    for (uint32_t i = 0; i < s->held_count; i++) {
        const struct held *h = &s->held[i];
        if (!is_asked(&p->talk[fragment], fragment, h)) continue;
        peer_send(s, p, MSG_RESULT_LEAVES, h->term, h->plan, &h->leaves,
                  h->leaves.leaves_count * sizeof(struct digest));
        any = true;
    }
    return any;
}

/* Who has chunk k in memory, else on disk. */
static struct held *held_with(struct sync *s, const struct talk *t, uint32_t fragment, uint32_t k) {
    struct held *best = NULL;
    for (uint32_t i = 0; i < s->held_count; i++) {
        struct held *h = &s->held[i];
        if (is_asked(t, fragment, h) && covers(h, k) && (!best || h->bytes)) best = h;
    }
    return best;
}

static bool send_result(struct sync *s, struct peer *p, struct held *h, uint32_t k) {
    size_t length = encoded_bytes(s, h->fragment, h->codec, k);
    struct msg_result result = {.fragment = h->fragment,
                                .round = h->round,
                                .plan = h->plan,
                                .chunk = k,
                                .codec = (uint8_t)h->codec};
    uint64_t term = h->term; /* h is gone where the disk lost it */
    result.data = (struct proto_bytes){results_chunk(s, h, k), (uint32_t)length};
    if (!result.data.data) return false;
    peer_send(s, p, MSG_RESULT, term, result.plan, &result, length);
    s->progress++;
    return true;
}

/* Is the plan somebody asked for still in work here, or not even known yet? */
static bool may_come(const struct sync *s, const struct talk *t, uint32_t fragment) {
    const struct plan *p = &s->plan[fragment];
    if (p->active && p->work_count && t->results_term == p->result_term &&
        t->results_plan == p->result_plan)
        return true;
    return t->results_round >= s->ledger.rounds[fragment] &&
           plan_is_newer(s, fragment, t->results_term, t->results_plan);
}

static void say_none(struct sync *s, struct peer *p, uint32_t fragment, const char *why) {
    struct talk *t = &p->talk[fragment];
    peer_none(s, p, MSG_RESULT_GET, t->results_term, t->results_plan, fragment, t->results_round,
              why);
}

/* Chunk k, if we have it; what may still come keeps waiting. */
static bool send_one(struct sync *s, struct peer *p, uint32_t fragment, uint32_t k, bool more) {
    struct talk *t = &p->talk[fragment];
    struct held *h = held_with(s, t, fragment, k);
    if (!h && more) return false;
    proto_set_del(t->results, k);
    if (h && digest_is_zero(&h->leaves.leaves[k - h->leaves.first].digest)) return false;
    if (h && send_result(s, p, h, k)) return true;
    t->results_lack = true;
    return false;
}

/* The next of the chunks that were asked for. *more: nothing now, but some may come. */
static bool send_some(struct sync *s, struct peer *p, uint32_t fragment, bool *more) {
    struct talk *t = &p->talk[fragment];
    bool may = may_come(s, t, fragment);
    for (uint32_t k = 0; k < s->fragment[fragment].count; k++) {
        if (k % 8 == 0 && !t->results[k / 8]) k += 7; /* none of these eight */
        else if (proto_set_has(t->results, k) && send_one(s, p, fragment, k, may)) return true;
    }
    *more = may && bitmap_next(t->results, s->fragment[fragment].count) >= 0;
    return false;
}

bool results_send_next(struct sync *s, struct peer *p, uint32_t fragment) {
    struct talk *t = &p->talk[fragment];
    if (!t->results) return false;
    if (t->results_leaves) {
        if (!send_leaves(s, p, fragment)) {
            if (may_come(s, t, fragment)) return false;
            say_none(s, p, fragment, "not held");
            end_results(t);
            return false;
        }
        t->results_leaves = false;
        return true;
    }
    bool more;
    if (send_some(s, p, fragment, &more)) return true;
    if (more) return false;
    if (t->results_lack) say_none(s, p, fragment, "not all of it is held");
    end_results(t);
    return false;
}
