/* sync_results.c - finished shards that this member holds, as aggregator or second holder: one
 * blob per shard and round on disk, kept until every live member has applied the round, served
 * to whoever asks.
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

const uint8_t *results_chunk(const struct sync *s, const struct held *h, uint32_t k) {
    return h->data + encoded_offset(s, h->codec, k - h->leaves.first);
}

static struct digest trailer_digest(const struct trailer *t, const uint8_t *meta) {
    struct digest_stream d;
    digest_stream_init(&d);
    digest_stream_update(&d, meta, t->meta_bytes);
    digest_stream_update(&d, t, offsetof(struct trailer, digest));
    return digest_stream_final(&d);
}

/* ---- the list --------------------------------------------------------------------------- */

static void held_release(struct held *h) {
    proto_copy_release(RECORD_result_leaves, &h->leaves);
    free(h->data);
}

static void forget(struct sync *s, uint32_t i) {
    held_release(&s->held[i]);
    s->held[i] = s->held[--s->held_count];
}

/* Do they have the same name on disk? */
static bool has_name(const struct held *h, uint32_t fragment, uint64_t round, uint32_t shard) {
    return h->fragment == fragment && h->shard == shard &&
           h->round % SYNC_RESULTS_KEPT == round % SYNC_RESULTS_KEPT;
}

/* Takes *h over; whatever had its name on disk is gone from memory too. */
static struct held *add(struct sync *s, struct held *h) {
    for (uint32_t i = s->held_count; i-- > 0;)
        if (has_name(&s->held[i], h->fragment, h->round, h->shard)) forget(s, i);
    struct held *list = realloc(s->held, (s->held_count + 1) * sizeof *list);
    if (!list) {
        err_set(&s->failure, ERR_MEMORY, "no memory for a result");
        held_release(h);
        return NULL;
    }
    s->held = list;
    s->held[s->held_count] = *h;
    return &s->held[s->held_count++];
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
        s->disk.remove(s->disk.arg, name);
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
                        .term = p->term,
                        .shard = w->shard,
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
        blob_name(p->fragment, p->msg.round, w->shard, name);
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
    struct held h = {.term = p->term,
                     .plan = p->number,
                     .fragment = p->fragment,
                     .round = p->msg.round,
                     .shard = w->shard,
                     .codec = (enum outer_codec)p->msg.codec};
    struct msg_summed *runs = sync_alloc(s, w->count, sizeof *runs);
    if (!runs) return -1;
    struct msg_result_leaves leaves = {.fragment = p->fragment,
                                       .round = p->msg.round,
                                       .plan = p->number,
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
    w->data = NULL;
    return add(s, &h) ? 0 : -1;
}

/* ---- reading ---------------------------------------------------------------------------- */

/* Does every chunk of the blob have the leaf it should? */
static bool data_is_intact(const struct sync *s, const struct held *h, size_t bytes) {
    const struct msg_result_leaves *l = &h->leaves;
    uint32_t count = h->fragment < s->fragment_count ? s->fragment[h->fragment].count : 0;
    if (l->leaves_count == 0 || l->first >= count || l->leaves_count > count - l->first)
        return false;
    if (bytes != shard_bytes(s, h->fragment, h->codec, l->first, l->leaves_count)) return false;
    for (uint32_t k = 0; k < l->leaves_count; k++) {
        if (digest_is_zero(&l->leaves[k].digest)) continue;
        struct digest d = digest_leaf(l->first + k, results_chunk(s, h, l->first + k),
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
                           .data = blob};
        ok = data_is_intact(s, h, t.data_bytes) &&
             proto_copy(RECORD_result_leaves, &leaves, &h->leaves, &s->failure) == 0;
    }
    proto_decoded_release(RECORD_result_leaves, &leaves);
    return ok;
}

static struct held *load(struct sync *s, uint32_t fragment, uint64_t round, uint32_t shard) {
    char name[48];
    uint8_t *blob;
    size_t length;
    struct held h;
    struct err err = {0};
    blob_name(fragment, round, shard, name);
    if (s->disk.get(s->disk.arg, name, &blob, &length, &err)) {
        if (err.code != ERR_NOT_FOUND) s->failure = err;
        return NULL;
    }
    if (read_blob(s, blob, length, &h)) return add(s, &h);
    free(blob);
    return NULL;
}

struct held *results_find(struct sync *s, uint32_t fragment, uint64_t term, uint64_t plan,
                          uint64_t round, uint32_t shard) {
    struct held *h = NULL;
    for (uint32_t i = 0; i < s->held_count && !h; i++)
        if (has_name(&s->held[i], fragment, round, shard)) h = &s->held[i];
    if (!h) h = load(s, fragment, round, shard);
    bool right = h && has_name(h, fragment, round, shard) && h->term == term && h->plan == plan &&
                 h->round == round;
    return right ? h : NULL;
}

/* ---- reporting -------------------------------------------------------------------------- */

void results_report(struct sync *s, const struct held *h) {
    struct msg_shard_report report = {.fragment = h->fragment,
                                      .round = h->round,
                                      .plan = h->plan,
                                      .shard = h->shard,
                                      .results = h->leaves.leaves,
                                      .results_count = h->leaves.leaves_count,
                                      .summed = h->leaves.summed,
                                      .summed_count = h->leaves.summed_count};
    if (proto_record_sign(s->config.identity, "shard_report", &s->config.run, s->term,
                          RECORD_shard_report, &report, &report.signature, &s->failure))
        return;
    sync_send(s, MSG_SHARD_REPORT, h->plan, &report);
}

/* ---- serving ---------------------------------------------------------------------------- */

/* After a restart what we hold of a commit is still on disk only. */
static void load_of_commit(struct sync *s, uint32_t fragment, uint64_t term, uint64_t plan,
                           uint64_t round) {
    struct commit *c = ledger_commit(s, fragment, round);
    if (!c || c->term != term || c->body.plan != plan) return;
    for (uint32_t i = 0; i < c->body.shards_count; i++)
        if (c->body.shards[i].aggregator == s->config.member ||
            c->body.shards[i].holder == s->config.member)
            results_find(s, fragment, term, plan, round, i);
}

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
    load_of_commit(s, msg->fragment, f->term, f->plan, msg->round);
}

static void end_results(struct talk *t) {
    free(t->results);
    t->results = NULL;
    t->results_leaves = false;
}

static bool is_asked(const struct talk *t, uint32_t fragment, const struct held *h) {
    return h->fragment == fragment && h->term == t->results_term && h->plan == t->results_plan &&
           h->round == t->results_round;
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

static const struct held *held_with(const struct sync *s, const struct talk *t, uint32_t fragment,
                                    uint32_t k) {
    for (uint32_t i = 0; i < s->held_count; i++) {
        const struct held *h = &s->held[i];
        if (is_asked(t, fragment, h) && k >= h->leaves.first &&
            k - h->leaves.first < h->leaves.leaves_count)
            return h;
    }
    return NULL;
}

static void send_result(struct sync *s, struct peer *p, const struct held *h, uint32_t k) {
    size_t length = encoded_bytes(s, h->fragment, h->codec, k);
    struct msg_result result = {.fragment = h->fragment,
                                .round = h->round,
                                .plan = h->plan,
                                .chunk = k,
                                .codec = (uint8_t)h->codec,
                                .data = {results_chunk(s, h, k), (uint32_t)length}};
    peer_send(s, p, MSG_RESULT, h->term, h->plan, &result, length);
    s->progress++;
}

/* Is the plan somebody asked for still in work here, or not even known yet? */
static bool may_come(const struct sync *s, const struct talk *t, uint32_t fragment) {
    const struct plan *p = &s->plan[fragment];
    if (t->results_round < s->ledger.rounds[fragment]) return false;
    return plan_is_newer(s, fragment, t->results_term, t->results_plan) ||
           (t->results_term == p->term && t->results_plan == p->number && p->work_count > 0);
}

bool results_send_next(struct sync *s, struct peer *p, uint32_t fragment) {
    struct talk *t = &p->talk[fragment];
    if (!t->results) return false;
    if (t->results_leaves) {
        if (!send_leaves(s, p, fragment)) {
            if (may_come(s, t, fragment)) return false;
            peer_none(s, p, MSG_RESULT_GET, t->results_term, t->results_plan, fragment,
                      t->results_round, "not held");
            end_results(t);
            return false;
        }
        t->results_leaves = false;
        return true;
    }
    for (int64_t k; (k = bitmap_next(t->results, s->fragment[fragment].count)) >= 0;) {
        proto_set_del(t->results, (uint32_t)k);
        const struct held *h = held_with(s, t, fragment, (uint32_t)k);
        if (!h || digest_is_zero(&h->leaves.leaves[k - h->leaves.first].digest)) continue;
        send_result(s, p, h, (uint32_t)k);
        return true;
    }
    end_results(t);
    return false;
}
