/* sync_round.c - this member's contribution to a round: anchor minus local parameters, encoded once
 * into a mapped array, made durable together with its READY, announced, and sent to the aggregators
 * of the plan that names it. Its bytes never change; it ends with a commit or a RESET. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "node/sync_internal.h"

/* ---- encoding --------------------------------------------------------------------------- */

int contribution_begin(struct sync *s) {
    struct contribution *c = &s->contribution;
    contribution_drop(s); /* the mapped array is about to change */
    c->encoding = true;
    c->next = 0;
    c->norm2 = 0;
    c->absmax = 0;
    return s->failure.code ? -1 : 0;
}

void contribution_abort(struct sync *s) { s->contribution.encoding = false; }

static float *part(float *array, size_t first) { return array ? array + first : NULL; }

/* -1: the local parameters cannot be encoded (err), or an element of them is no number. */
static int encode_chunk(struct sync *s, uint32_t k, struct err *err) {
    struct contribution *c = &s->contribution;
    uint32_t chunk = s->fragment.chunk[k];
    size_t first = chunk_first(s, chunk), n = chunk_elements(s, chunk),
           length = encoded_bytes(s, s->codec, k);
    uint8_t *bytes = c->bytes + encoded_offset(s, s->codec, k);
    outer_pseudo_gradient(s->scratch, s->state.anchor + first, s->trainer.local + first,
                          part(c->residual, first), n);
    if (outer_encode(bytes, s->scratch, n, s->codec, err)) return -1;
    if (outer_decode(s->scratch2, bytes, length, n, s->codec, err)) return -1;
    if (c->residual &&
        outer_residual(c->residual_next + first, s->scratch, bytes, length, n, s->codec, err))
        return -1;
    float absmax = outer_absmax(s->scratch2, n);
    if (absmax > c->absmax) c->absmax = absmax;
    c->norm2 += outer_norm2(s->scratch2, n);
    c->leaves[k].digest = digest_leaf(k, bytes, length);
    return 0;
}

/* As the values give them, but never apart by a rounding error: absmax <= norm <= absmax *
 * sqrt(n). */
static double norm_of(const struct sync *s) {
    double absmax = s->contribution.absmax, norm = sqrt(s->contribution.norm2);
    return fmax(absmax, fmin(norm, absmax * sqrt((double)s->config.elements)));
}

/* The file "ready": digest, then the encoded READY. */
static int put_ready(struct sync *s, const struct msg_ready *ready) {
    struct proto_buffer b;
    struct digest d = {{0}};
    proto_buffer_init(&b, sizeof d + proto_record_bytes_max(RECORD_ready));
    proto_buffer_append(&b, &d, sizeof d);
    int rc = proto_encode(&b, RECORD_ready, ready, &s->failure);
    if (rc == 0) {
        d = digest_of(b.data + sizeof d, b.length - sizeof d);
        memcpy(b.data, &d, sizeof d);
        rc = s->disk.put(s->disk.arg, "ready", b.data, b.length, &s->failure);
    }
    proto_buffer_release(&b);
    return rc;
}

static size_t contribution_bytes(const struct sync *s) {
    uint32_t last = s->fragment.count - 1;
    return encoded_offset(s, s->codec, last) + encoded_bytes(s, s->codec, last);
}

static int freeze(struct sync *s) {
    struct contribution *c = &s->contribution;
    const struct trainer *t = &s->trainer;
    struct msg_lease claims[PROTO_LEASES_MAX];
    struct msg_ready ready = {
        .round = s->ledger.rounds,
        .base_index = s->state.index,
        .state_index = s->state.index,
        .state_root = s->state.root,
        .codec = (uint8_t)s->codec,
        .chunks = s->fragment.count,
        .samples = leases_used(s),
        .norm = norm_of(s),
        .absmax = c->absmax,
        .loss = t->loss_count ? t->loss_sum / (double)t->loss_count : 0,
        .root = digest_tree_root(c->leaves, s->fragment.count),
        .ranges = claims,
        .ranges_count = leases_claims(s, claims),
    };
    if (s->disk.flush(s->disk.arg, "contribution", 0, contribution_bytes(s), &s->failure))
        return -1;
    if (put_ready(s, &ready) || proto_copy(RECORD_ready, &ready, &c->ready, &s->failure)) return -1;
    c->encoding = false;
    c->frozen = true;
    s->leases.round_samples = leases_used(s);
    contribution_announce(s);
    return 0;
}

int contribution_work(struct sync *s) {
    struct contribution *c = &s->contribution;
    struct err err = {0};
    for (size_t done = 0; c->next < s->fragment.count && done < SYNC_WORK_ELEMENTS; c->next++) {
        if (encode_chunk(s, c->next, &err)) {
            sync_log(s, SYNC_ERROR,
                     "the trainer's parameters cannot be contributed, chunk %u: %.150s", c->next,
                     err.msg);
            trainer_lose_work(s, "its parameters are not finite");
            return 0;
        }
        done += chunk_elements(s, s->fragment.chunk[c->next]);
    }
    s->progress++;
    return c->next == s->fragment.count ? freeze(s) : 0;
}

/* ---- on disk ---------------------------------------------------------------------------- */

void contribution_drop(struct sync *s) {
    struct contribution *c = &s->contribution;
    if (c->frozen) {
        proto_copy_release(RECORD_ready, &c->ready);
        s->disk.remove(s->disk.arg, "ready");
    }
    c->frozen = c->announced = false;
}

/* Does what the array holds still have the root that was announced? */
static bool bytes_are_intact(struct sync *s, const struct msg_ready *ready) {
    struct contribution *c = &s->contribution;
    if (ready->fragment != 0 || ready->chunks != s->fragment.count || ready->codec != s->codec)
        return false;
    for (uint32_t k = 0; k < s->fragment.count; k++)
        c->leaves[k].digest = digest_leaf(k, c->bytes + encoded_offset(s, s->codec, k),
                                          encoded_bytes(s, s->codec, k));
    struct digest root = digest_tree_root(c->leaves, s->fragment.count);
    return digest_equal(&root, &ready->root);
}

static int load_ready(struct sync *s) {
    struct contribution *c = &s->contribution;
    uint8_t *bytes;
    size_t length;
    struct msg_ready ready = {0};
    struct err err = {0};
    if (s->disk.get(s->disk.arg, "ready", &bytes, &length, &err)) {
        if (err.code == ERR_NOT_FOUND) return 0;
        s->failure = err;
        return -1;
    }
    struct digest d = length > sizeof d ? digest_of(bytes + sizeof d, length - sizeof d)
                                        : (struct digest){{0}};
    c->frozen = length > sizeof d && !memcmp(&d, bytes, sizeof d) &&
                proto_decode(bytes + sizeof d, length - sizeof d, RECORD_ready, &ready, &err) ==
                    0 &&
                bytes_are_intact(s, &ready);
    int rc = c->frozen ? proto_copy(RECORD_ready, &ready, &c->ready, &s->failure) : 0;
    if (!c->frozen) s->disk.remove(s->disk.arg, "ready");
    proto_decoded_release(RECORD_ready, &ready);
    free(bytes);
    return rc;
}

/* Nobody's correctness hangs on a residual: it is not flushed, and lost with a machine at worst. */
static int open_residuals(struct sync *s) {
    struct contribution *c = &s->contribution;
    size_t bytes = s->config.elements * sizeof(float);
    bool created;
    if (s->codec == OUTER_FP32) return 0;
    c->residual = s->disk.map(s->disk.arg, "residual", bytes, &created, &s->failure);
    c->residual_next = s->disk.map(s->disk.arg, "residual-next", bytes, &created, &s->failure);
    if (!c->residual || !c->residual_next) return -1;
    for (size_t i = 0; i < s->config.elements; i++)
        if (!isfinite(c->residual[i])) c->residual[i] = 0;
    return 0;
}

int contribution_open(struct sync *s) {
    struct contribution *c = &s->contribution;
    bool created;
    if (!s->config.trains) return 0;
    c->leaves = sync_alloc(s, s->fragment.count, sizeof *c->leaves);
    c->bytes = s->disk.map(s->disk.arg, "contribution", contribution_bytes(s), &created,
                           &s->failure);
    if (!c->leaves || !c->bytes || open_residuals(s)) return -1;
    return load_ready(s);
}

void contribution_release(struct sync *s) {
    if (s->contribution.frozen) proto_copy_release(RECORD_ready, &s->contribution.ready);
    free(s->contribution.leaves);
}

/* ---- announcing ------------------------------------------------------------------------- */

void contribution_announce(struct sync *s) {
    struct contribution *c = &s->contribution;
    if (!s->synced || !c->frozen || c->ready.base_index != ledger_head_version(s)) return;
    sync_send(s, MSG_READY, 0, &c->ready);
    c->announced = true;
    c->announced_ms = s->now;
}

int contribution_on_reset(struct sync *s, const struct msg_reset *msg) {
    char why[PROTO_TEXT_BYTES_MAX + 1];
    if (!s->contribution.frozen || msg->fragment != 0) return 0;
    proto_str_copy(msg->reason, why, sizeof why);
    sync_log(s, SYNC_WARNING, "the coordinator refused our contribution: %.200s", why);
    s->refused++;
    s->leases.deferred = false; /* a new list follows */
    contribution_drop(s);
    trainer_lose_work(s, "its contribution was refused");
    return 0;
}

/* ---- sending ---------------------------------------------------------------------------- */

static bool aggregates(const struct sync *s, uint32_t member) {
    for (uint32_t i = 0; i < s->plan.msg.shards_count; i++)
        if (s->plan.msg.shards[i].aggregator == member) return true;
    return false;
}

static bool wants_something(const struct sync *s, const struct peer *p) {
    return p->wanted && bitmap_next(p->wanted, s->fragment.count) >= 0;
}

/* Again when there was no WANT, and now and then when all was sent: it says what is still
 * missing. */
static void show_leaves(struct sync *s, struct peer *p) {
    uint32_t wait_ms = p->wanted ? s->outer->silence_ms_max / 2 : s->outer->heartbeat_ms;
    if (p->leaves_sent && (wants_something(s, p) || s->now - p->leaves_ms < wait_ms)) return;
    struct msg_leaves leaves = {
        .round = s->plan.msg.round, .all = s->contribution.leaves, .all_count = s->fragment.count};
    peer_send(s, p, MSG_LEAVES, s->plan.term, s->plan.number, &leaves,
              s->fragment.count * sizeof(struct digest));
    p->leaves_sent = true;
    p->leaves_ms = s->now;
}

void contribution_pump(struct sync *s) {
    if (s->contribution.frozen && s->synced &&
        s->now - s->contribution.announced_ms >= s->outer->silence_ms_max / 2 &&
        !(s->plan.active && s->plan.own >= 0))
        contribution_announce(s);
    if (!s->plan.active || s->plan.own < 0) return;
    for (uint32_t i = 0; i < s->plan.msg.shards_count; i++) {
        uint32_t aggregator = s->plan.msg.shards[i].aggregator;
        struct peer *p = aggregator == s->config.member ? NULL : peer_link(s, aggregator);
        if (p) show_leaves(s, p);
    }
}

/* Chunks of shards that p does not aggregate are none of its business. */
static void keep_own_shards(const struct sync *s, struct peer *p) {
    for (uint32_t i = 0; i < s->plan.msg.shards_count; i++) {
        const struct msg_shard *shard = &s->plan.msg.shards[i];
        for (uint32_t k = shard->first;
             shard->aggregator != p->id && k < shard->first + shard->count; k++)
            proto_set_del(p->wanted, k);
    }
}

void contribution_on_want(struct sync *s, struct peer *p, const struct frame *f,
                          const struct msg_want *msg) {
    if (!s->plan.active || s->plan.own < 0 || f->term != s->plan.term ||
        f->plan != s->plan.number || msg->fragment != 0 || msg->round != s->plan.msg.round ||
        !aggregates(s, p->id)) {
        sync_log(s, SYNC_DEBUG, "WANT of member %u for another plan ignored", p->id);
        return;
    }
    size_t bytes = bitmap_bytes(s->fragment.count);
    if (msg->chunks.length != bytes) {
        peer_close(s, p, "its WANT has another number of chunks");
        return;
    }
    if (!p->wanted && !(p->wanted = sync_alloc(s, bytes, 1))) return;
    memcpy(p->wanted, msg->chunks.data, bytes);
    p->wanted_term = f->term;
    p->wanted_plan = f->plan;
    p->leaves_ms = s->now;
    keep_own_shards(s, p);
}

bool contribution_send_chunk(struct sync *s, struct peer *p) {
    const struct plan *plan = &s->plan;
    if (!p->wanted || !plan->active || plan->own < 0 || !s->contribution.frozen) return false;
    if (p->wanted_term != plan->term || p->wanted_plan != plan->number) return false;
    int64_t k = bitmap_next(p->wanted, s->fragment.count);
    if (k < 0) return false;
    uint8_t set[PROTO_SET_BYTES_MAX] = {0};
    proto_set_add(set, (uint32_t)plan->own);
    size_t length = encoded_bytes(s, s->codec, (uint32_t)k);
    struct msg_chunk chunk = {
        .round = plan->msg.round,
        .chunk = (uint32_t)k,
        .codec = (uint8_t)s->codec,
        .set = {set, plan->set_bytes},
        .weight = plan->msg.contributors[plan->own].weight,
        .data = {s->contribution.bytes + encoded_offset(s, s->codec, (uint32_t)k),
                 (uint32_t)length},
    };
    peer_send(s, p, MSG_CHUNK, plan->term, plan->number, &chunk, length);
    proto_set_del(p->wanted, (uint32_t)k);
    p->leaves_ms = s->now;
    s->progress++;
    return true;
}
