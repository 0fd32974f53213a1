/* sync_round.c - this member's contributions, at most one to each fragment: anchor minus local
 * parameters, encoded once into a mapped array, made durable together with its READY, announced, and
 * sent to the aggregators of the plan that names it. Its bytes never change; it ends with a commit or
 * a RESET, or goes into the next round where its trainer is gone. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "node/sync_internal.h"

/* ---- encoding --------------------------------------------------------------------------- */

/* The trainer goes on: what it had consumed and lost when it wrote the fragment is noted now. */
static void note_work(struct sync *s, uint32_t fragment) {
    struct contribution *c = &s->contribution[fragment];
    struct trainer *t = &s->trainer;
    struct turn *turn = &t->turn[fragment];
    uint64_t losses = t->loss_count - turn->losses_before;
    c->life = t->life;
    c->steps = t->steps_total;
    c->frozen_ms = s->now;
    c->samples = t->samples - turn->samples_before;
    turn->samples_frozen = t->samples;
    c->loss = losses ? (t->loss_sum - turn->loss_before) / (double)losses : 0;
    c->claims_count = leases_claims(s, c->claims);
    turn->loss_before = t->loss_sum;
    turn->losses_before = t->loss_count;
    turn->at_once = false;
}

int contribution_begin(struct sync *s, uint32_t fragment) {
    struct contribution *c = &s->contribution[fragment];
    contribution_drop(s, fragment); /* the mapped array is about to change */
    c->given_up = (struct digest){0};
    note_work(s, fragment);
    c->encoding = true;
    c->base_index = s->ledger.last[fragment];
    c->next = 0;
    c->norm2 = 0;
    c->absmax = 0;
    return s->failure.code ? -1 : 0;
}

void contribution_abort(struct sync *s, uint32_t fragment) {
    s->contribution[fragment].encoding = false;
}

static float *part(float *array, size_t first) { return array ? array + first : NULL; }

#define PIECE ((size_t)8 * OUTER_BLOCK) /* elements that stay in the nearest cache */

/* Elements [first, first + n) of the state, which stand at `bytes` when they are encoded. */
static int encode_piece(struct sync *s, uint32_t fragment, size_t first, size_t n, uint8_t *bytes,
                        struct err *err) {
    outer_pseudo_gradient(s->scratch, s->state.anchor + first,
                          s->trainer.turn[fragment].local + first, part(s->residual, first), n);
    if (outer_encode(bytes, s->scratch, n, s->codec, err)) return -1;
    return s->residual ? outer_residual(s->residual_next + first, s->scratch, bytes,
                                        outer_encoded_bytes(s->codec, n), n, s->codec, err)
                       : 0;
}

/* -1: the local parameters cannot be encoded (err), or an element of them is no number. */
static int encode_chunk(struct sync *s, uint32_t fragment, uint32_t k, struct err *err) {
    struct contribution *c = &s->contribution[fragment];
    uint32_t chunk = s->fragment[fragment].chunk[k];
    size_t first = chunk_first(s, chunk), n = chunk_elements(s, chunk),
           length = encoded_bytes(s, fragment, s->codec, k);
    uint8_t *bytes = encoded_chunk(s, fragment, k);
    float absmax;
    double norm2;
    for (size_t at = 0; at < n; at += PIECE)
        if (encode_piece(s, fragment, first + at, n - at < PIECE ? n - at : PIECE,
                         bytes + outer_encoded_bytes(s->codec, at), err))
            return -1;
    if (outer_measure(bytes, length, n, s->codec, &absmax, &norm2, err)) return -1;
    if (absmax > c->absmax) c->absmax = absmax;
    c->norm2 += norm2;
    if (SYNC_HAS_FAULT(LIES_NAN)) memset(bytes, 0xff, length);
    return 0;
}

/* Leaves of chunks [first, end), on several threads. */
static void hash_chunks(struct sync *s, uint32_t fragment, uint32_t first, uint32_t end) {
    struct digest_piece piece[SYNC_BATCH_CHUNKS];
    for (uint32_t k = first, n; k < end; k += n) {
        n = end - k < SYNC_BATCH_CHUNKS ? end - k : SYNC_BATCH_CHUNKS;
        for (uint32_t i = 0; i < n; i++)
            piece[i] = (struct digest_piece){.index = k + i,
                                             .a = encoded_chunk(s, fragment, k + i),
                                             .a_length = encoded_bytes(s, fragment, s->codec, k + i)};
        digest_leaves(piece, n, 0);
        for (uint32_t i = 0; i < n; i++)
            s->contribution[fragment].leaves[k + i].digest = piece[i].leaf;
    }
}

/* As the values give them, but never apart by a rounding error: absmax <= norm <= absmax *
 * sqrt(n). */
static double norm_of(const struct sync *s, uint32_t fragment) {
    const struct contribution *c = &s->contribution[fragment];
    double absmax = c->absmax, norm = sqrt(c->norm2);
    return fmax(absmax, fmin(norm, absmax * sqrt((double)s->fragment[fragment].elements)));
}

/* ---- on disk ---------------------------------------------------------------------------- */

static void ready_name(uint32_t fragment, char out[32]) { snprintf(out, 32, "ready-%u", fragment); }

/* The file "ready-F": digest, then the encoded READY. */
static int put_ready(struct sync *s, const struct msg_ready *ready) {
    struct proto_buffer b;
    struct digest d = {{0}};
    char name[32];
    ready_name(ready->fragment, name);
    proto_buffer_init(&b, sizeof d + proto_record_bytes_max(RECORD_ready));
    proto_buffer_append(&b, &d, sizeof d);
    int rc = proto_encode(&b, RECORD_ready, ready, &s->failure);
    if (rc == 0) {
        d = digest_of(b.data + sizeof d, b.length - sizeof d);
        memcpy(b.data, &d, sizeof d);
        rc = s->disk.put(s->disk.arg, name, b.data, b.length, &s->failure);
    }
    proto_buffer_release(&b);
    return rc;
}

/* Runs of chunks that stand next to each other in one go. */
static int flush_bytes(struct sync *s, uint32_t fragment) {
    const struct fragment *f = &s->fragment[fragment];
    for (uint32_t k = 0, n; k < f->count; k += n) {
        for (n = 1; k + n < f->count && f->chunk[k + n] == f->chunk[k] + n; n++) continue;
        if (s->disk.flush(s->disk.arg, "contribution", encoded_offset(s, s->codec, f->chunk[k]),
                          shard_bytes(s, fragment, s->codec, k, n), &s->failure))
            return -1;
    }
    return 0;
}

static int freeze(struct sync *s, uint32_t fragment) {
    struct contribution *c = &s->contribution[fragment];
    struct msg_ready ready = {
        .fragment = fragment,
        .round = s->ledger.rounds[fragment],
        .base_index = c->base_index,
        .state_index = s->state.index,
        .state_root = s->state.root,
        .codec = (uint8_t)s->codec,
        .chunks = s->fragment[fragment].count,
        .samples = c->samples,
        .norm = norm_of(s, fragment),
        .absmax = c->absmax,
        .loss = c->loss,
        .root = digest_tree_root(c->leaves, s->fragment[fragment].count),
        .ranges = c->claims,
        .ranges_count = c->claims_count,
    };
    if (SYNC_HAS_FAULT(RESIDUAL_AT_SEND) && s->residual)
        memcpy(s->residual, s->residual_next, s->config.elements * sizeof *s->residual);
    if (SYNC_HAS_FAULT(LIES_NORM)) ready.norm /= 2, ready.absmax /= 2;
    if ((!SYNC_HAS_FAULT(READY_BEFORE_DISK) && flush_bytes(s, fragment)) || put_ready(s, &ready) ||
        proto_copy(RECORD_ready, &ready, &c->ready, &s->failure))
        return -1;
    c->encoding = false;
    c->frozen = true;
    s->leases.round_samples = c->samples;
    contribution_announce(s, fragment);
    return 0;
}

/* All chunks are encoded, but no state that the base is part of was whole yet: a commit of another
 * fragment is being applied. */
static bool waits_for_root(const struct sync *s, const struct contribution *c) {
    return !s->state.known || s->state.index < c->base_index;
}

/* The fragment to work on, or -1. */
static int encoding_now(const struct sync *s) {
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        const struct contribution *c = &s->contribution[f];
        if (c->encoding && (c->next < s->fragment[f].count || !waits_for_root(s, c))) return (int)f;
    }
    return -1;
}

bool contribution_has_work(const struct sync *s) { return encoding_now(s) >= 0; }

int contribution_work(struct sync *s) {
    uint32_t f = (uint32_t)encoding_now(s), count = s->fragment[f].count;
    struct contribution *c = &s->contribution[f];
    uint32_t first = c->next;
    struct err err = {0};
    for (size_t done = 0; c->next < count && done < SYNC_WORK_ELEMENTS; c->next++) {
        if (encode_chunk(s, f, c->next, &err)) {
            sync_log(s, SYNC_ERROR,
                     "the trainer's parameters cannot be contributed, chunk %u: %.150s",
                     s->fragment[f].chunk[c->next], err.msg);
            trainer_lose_work(s, SYNC_LOSS_REFUSED, "its parameters are not finite");
            return 0;
        }
        done += chunk_elements(s, s->fragment[f].chunk[c->next]);
    }
    hash_chunks(s, f, first, c->next);
    s->progress++;
    return c->next == count && !waits_for_root(s, c) ? freeze(s, f) : 0;
}

/* ---- its end, and a new process --------------------------------------------------------- */

void contribution_drop(struct sync *s, uint32_t fragment) {
    struct contribution *c = &s->contribution[fragment];
    char name[32];
    if (c->frozen) {
        ready_name(fragment, name);
        c->given_up = c->ready.root;
        c->given_up_base = c->ready.base_index;
        proto_copy_release(RECORD_ready, &c->ready);
        s->disk.remove(s->disk.arg, name);
    }
    c->frozen = c->announced = false;
    s->plan[fragment].own = -1;
}

/* What anchor - local is does not change when both take the commit that went by without it. */
bool contribution_again(struct sync *s, uint32_t fragment) {
    struct contribution *c = &s->contribution[fragment];
    struct msg_ready ready = c->ready;
    struct msg_lease ranges[PROTO_LEASES_MAX];
    ready.ranges = ranges;
    ready.ranges_count = 0;
    for (uint32_t i = 0; i < c->ready.ranges_count && i < PROTO_LEASES_MAX; i++) {
        struct msg_lease left = leases_left(s, &c->ready.ranges[i]);
        if (left.count) ranges[ready.ranges_count++] = left;
    }
    if (!ready.ranges_count) return false;
    if (!s->state.known || s->state.index < s->ledger.last[fragment]) return true;
    ready.round = s->ledger.rounds[fragment];
    ready.base_index = s->ledger.last[fragment];
    ready.state_index = s->state.index;
    ready.state_root = s->state.root;
    s->plan[fragment].own = -1;
    c->announced = false;
    struct msg_ready copy = {0};
    if (put_ready(s, &ready) || proto_copy(RECORD_ready, &ready, &copy, &s->failure)) return true;
    proto_copy_release(RECORD_ready, &c->ready);
    c->ready = copy;
    contribution_announce(s, fragment);
    return true;
}

/* Does what the array holds still have the root that was announced? */
static bool bytes_are_intact(struct sync *s, uint32_t fragment, const struct msg_ready *ready) {
    struct contribution *c = &s->contribution[fragment];
    uint32_t count = s->fragment[fragment].count;
    if (ready->fragment != fragment || ready->chunks != count || ready->codec != s->codec)
        return false;
    hash_chunks(s, fragment, 0, count);
    struct digest root = digest_tree_root(c->leaves, count);
    return digest_equal(&root, &ready->root);
}

static int load_ready(struct sync *s, uint32_t fragment) {
    struct contribution *c = &s->contribution[fragment];
    uint8_t *bytes;
    size_t length;
    struct msg_ready ready = {0};
    struct err err = {0};
    char name[32];
    ready_name(fragment, name);
    if (s->disk.get(s->disk.arg, name, &bytes, &length, &err)) {
        if (err.code == ERR_NOT_FOUND) return 0;
        s->failure = err;
        return -1;
    }
    struct digest d = length > sizeof d ? digest_of(bytes + sizeof d, length - sizeof d)
                                        : (struct digest){{0}};
    c->frozen = length > sizeof d && !memcmp(&d, bytes, sizeof d) &&
                proto_decode(bytes + sizeof d, length - sizeof d, RECORD_ready, &ready, &err) ==
                    0 &&
                bytes_are_intact(s, fragment, &ready);
    int rc = c->frozen ? proto_copy(RECORD_ready, &ready, &c->ready, &s->failure) : 0;
    if (c->frozen) leases_restore(s, &ready);
    else s->disk.remove(s->disk.arg, name);
    proto_decoded_release(RECORD_ready, &ready);
    free(bytes);
    return rc;
}

/* Nobody's correctness hangs on a residual: it is not flushed, and lost with a machine at worst. */
static int open_residuals(struct sync *s) {
    size_t bytes = s->config.elements * sizeof(float);
    bool created;
    if (s->codec == OUTER_FP32) return 0;
    s->residual = s->disk.map(s->disk.arg, "residual", bytes, &created, &s->failure);
    s->residual_next = s->disk.map(s->disk.arg, "residual-next", bytes, &created, &s->failure);
    if (!s->residual || !s->residual_next) return -1;
    for (size_t i = 0; i < s->config.elements; i++) {
        if (!isfinite(s->residual[i])) s->residual[i] = 0;
        if (!isfinite(s->residual_next[i])) s->residual_next[i] = 0;
    }
    return 0;
}

static size_t all_encoded_bytes(const struct sync *s) {
    uint32_t last = s->chunk_count - 1;
    return encoded_offset(s, s->codec, last) +
           outer_encoded_bytes(s->codec, chunk_elements(s, last));
}

int contribution_open(struct sync *s) {
    bool created;
    if (!s->config.trains) return 0;
    s->encoded = s->disk.map(s->disk.arg, "contribution", all_encoded_bytes(s), &created,
                             &s->failure);
    if (!s->encoded || open_residuals(s)) return -1;
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        struct contribution *c = &s->contribution[f];
        c->leaves = sync_alloc(s, s->fragment[f].count, sizeof *c->leaves);
        c->claims = sync_alloc(s, PROTO_LEASES_MAX, sizeof *c->claims);
        if (!c->leaves || !c->claims || load_ready(s, f)) return -1;
    }
    return 0;
}

void contribution_release(struct sync *s) {
    for (uint32_t f = 0; s->contribution && f < s->fragment_count; f++) {
        struct contribution *c = &s->contribution[f];
        if (c->frozen) proto_copy_release(RECORD_ready, &c->ready);
        free(c->leaves);
        free(c->claims);
    }
    free(s->contribution);
}

/* ---- announcing ------------------------------------------------------------------------- */

/* Signed under the term it is said in. */
void contribution_announce(struct sync *s, uint32_t fragment) {
    struct contribution *c = &s->contribution[fragment];
    if (!s->synced || !c->frozen || c->ready.base_index != s->ledger.last[fragment]) return;
    if (proto_record_sign(s->config.identity, "ready", &s->config.run, s->term, RECORD_ready,
                          &c->ready, &c->ready.signature, &s->failure))
        return;
    sync_send(s, MSG_READY, 0, &c->ready);
    c->announced = true;
    c->announced_ms = s->now;
}

int contribution_on_reset(struct sync *s, const struct msg_reset *msg) {
    char why[PROTO_TEXT_BYTES_MAX + 1];
    if (msg->fragment >= s->fragment_count || !s->contribution[msg->fragment].frozen) return 0;
    proto_str_copy(msg->reason, why, sizeof why);
    sync_log(s, SYNC_WARNING, "the coordinator refused our contribution to fragment %u: %.200s",
             msg->fragment, why);
    s->refused++;
    contribution_drop(s, msg->fragment);
    trainer_lose_work(s, SYNC_LOSS_REFUSED, "its contribution was refused");
    return 0;
}

/* ---- sending ---------------------------------------------------------------------------- */

static bool aggregates(const struct plan *plan, uint32_t member) {
    for (uint32_t i = 0; i < plan->msg.shards_count; i++)
        if (plan->msg.shards[i].aggregator == member) return true;
    return false;
}

static bool wants_something(const struct sync *s, const struct talk *t, uint32_t fragment) {
    return t->wanted && bitmap_next(t->wanted, s->fragment[fragment].count) >= 0;
}

/* Again when there was no WANT, and now and then when all was sent: it says what is still
 * missing. */
static void show_leaves(struct sync *s, struct peer *p, const struct plan *plan) {
    struct talk *t = &p->talk[plan->fragment];
    uint32_t wait_ms = t->wanted ? s->outer->silence_ms_max / 2 : s->outer->heartbeat_ms,
             count = s->fragment[plan->fragment].count;
    if (t->leaves_sent &&
        (wants_something(s, t, plan->fragment) || s->now - t->leaves_ms < wait_ms))
        return;
    struct msg_leaves leaves = {.fragment = plan->fragment,
                                .round = plan->msg.round,
                                .all = s->contribution[plan->fragment].leaves,
                                .all_count = count};
    peer_send(s, p, MSG_LEAVES, plan->term, plan->number, &leaves, count * sizeof(struct digest));
    t->leaves_sent = true;
    t->leaves_ms = s->now;
}

static void pump_fragment(struct sync *s, uint32_t fragment) {
    const struct contribution *c = &s->contribution[fragment];
    const struct plan *plan = &s->plan[fragment];
    bool planned = plan->active && plan->own >= 0;
    if (c->frozen && s->synced && !planned &&
        s->now - c->announced_ms >= s->outer->silence_ms_max / 2)
        contribution_announce(s, fragment);
    for (uint32_t i = 0; planned && i < plan->msg.shards_count; i++) {
        uint32_t aggregator = plan->msg.shards[i].aggregator;
        struct peer *p = aggregator == s->config.member ? NULL : peer_link(s, aggregator);
        if (p) show_leaves(s, p, plan);
    }
    for (uint32_t i = 0; planned && i < PROTO_AUDITS_MAX; i++) {
        struct peer *p = plan->audits[i].auditor ? peer_link(s, plan->audits[i].auditor) : NULL;
        if (p) show_leaves(s, p, plan);
    }
}

void contribution_pump(struct sync *s) {
    for (uint32_t f = 0; f < s->fragment_count; f++) pump_fragment(s, f);
}

static bool aggregates_chunk(const struct plan *plan, uint32_t member, uint32_t k) {
    for (uint32_t i = 0; i < plan->msg.shards_count; i++) {
        const struct msg_shard *m = &plan->msg.shards[i];
        if (m->aggregator == member && k >= m->first && k - m->first < m->count) return true;
    }
    return false;
}

/* Chunks that p neither aggregates nor audits are none of its business. */
static void keep_own_shards(const struct sync *s, const struct plan *plan, const struct peer *p) {
    uint8_t *wanted = p->talk[plan->fragment].wanted;
    for (uint32_t k = 0; k < s->fragment[plan->fragment].count; k++)
        if (proto_set_has(wanted, k) && !aggregates_chunk(plan, p->id, k) &&
            !audit_is_of(plan, p->id, k))
            proto_set_del(wanted, k);
}

void contribution_on_want(struct sync *s, struct peer *p, const struct frame *f,
                          const struct msg_want *msg) {
    const struct plan *plan = &s->plan[msg->fragment];
    struct talk *t = &p->talk[msg->fragment];
    if (!plan->active || plan->own < 0 || f->term != plan->term || f->plan != plan->number ||
        msg->round != plan->msg.round ||
        !(aggregates(plan, p->id) || audit_is_by(plan, p->id))) {
        sync_log(s, SYNC_DEBUG, "WANT of member %u for another plan ignored", p->id);
        return;
    }
    size_t bytes = bitmap_bytes(s->fragment[msg->fragment].count);
    if (msg->chunks.length != bytes) {
        peer_close(s, p, "its WANT has another number of chunks");
        return;
    }
    if (!t->wanted && !(t->wanted = sync_alloc(s, bytes, 1))) return;
    memcpy(t->wanted, msg->chunks.data, bytes);
    t->wanted_term = f->term;
    t->wanted_plan = f->plan;
    t->leaves_ms = s->now;
    keep_own_shards(s, plan, p);
}

bool contribution_send_chunk(struct sync *s, struct peer *p, uint32_t fragment) {
    const struct plan *plan = &s->plan[fragment];
    struct talk *t = &p->talk[fragment];
    if (!t->wanted || !plan->active || plan->own < 0 || !s->contribution[fragment].frozen)
        return false;
    if (t->wanted_term != plan->term || t->wanted_plan != plan->number) return false;
    int64_t k = bitmap_next(t->wanted, s->fragment[fragment].count);
    if (k < 0) return false;
    uint8_t set[PROTO_SET_BYTES_MAX] = {0};
    proto_set_add(set, (uint32_t)plan->own);
    size_t length = encoded_bytes(s, fragment, s->codec, (uint32_t)k);
    struct msg_chunk chunk = {
        .fragment = fragment,
        .round = plan->msg.round,
        .chunk = (uint32_t)k,
        .codec = (uint8_t)s->codec,
        .set = {set, plan->set_bytes},
        .weight = plan->msg.contributors[plan->own].weight,
        .data = {encoded_chunk(s, fragment, (uint32_t)k), (uint32_t)length},
    };
    peer_send(s, p, MSG_CHUNK, plan->term, plan->number, &chunk, length);
    proto_set_del(t->wanted, (uint32_t)k);
    t->leaves_ms = s->now;
    s->progress++;
    return true;
}
