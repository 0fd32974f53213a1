/* contribution.c - an enrolled member with real leases takes part in a round, and one thing about its
 * contribution is wrong: what it announces to the coordinator, or what it sends to the aggregator.
 * `honest` gets all of it right and is summed, which shows that the rest fails for its fault alone. */
#define _GNU_SOURCE /* memmem */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"
#include "proto/model.h"
#include "tests/hostile/hostile.h"

#define TRIES 10
#define SCALE 1e-5f
#define FAR_PORT 9 /* "I can be dialled", where nobody is */

enum fault {
    HONEST,
    /* READY */
    NOT_FINITE, WRONG_CHUNKS, WRONG_CODEC, NORM_TOO_SMALL, NORM_TOO_LARGE, ABSMAX_TOO_LARGE, NO_ROOT, NO_CLAIMS,
    FOREIGN_LEASE, STOLEN_LEASE, OLD_GENERATION, MORE_THAN_LEASED, CLAIMED_TWICE, ROUND_AHEAD, OTHER_BASE,
    WRONG_SIGNATURE, INFLATED_SAMPLES,
    /* to the coordinator while the plan is in work */
    FOREIGN_REPORT, UNFOUNDED_ACCUSE,
    /* to the aggregator */
    WRONG_LEAVES, FLIPPED_BYTE, NAN_SCALE, SHORT_CHUNK, NAN_SHOWN, HUGE_VALUES, LARGER_NORM, FOREIGN_SET,
    WRONG_WEIGHT, SILENT,
    /* as second holder */
    LYING_HOLDER, BROKEN_HOLDER, UNSIGNED_HOLDER
};

struct contribution {
    uint64_t elements;
    uint32_t chunks, chunk_elements;
    enum outer_codec codec;
    uint8_t *bytes; /* chunk k at k * stride */
    size_t stride;
    struct msg_digest_item *leaves;
    struct msg_ready ready;
    struct msg_lease claims[PROTO_LEASES_MAX];
};

/* ---- making one ------------------------------------------------------------------------------------------ */

static size_t elements_of(const struct contribution *c, uint32_t k) {
    uint64_t left = c->elements - (uint64_t)k * c->chunk_elements;
    return left < c->chunk_elements ? (size_t)left : c->chunk_elements;
}

static size_t bytes_of(const struct contribution *c, uint32_t k) {
    return outer_encoded_bytes(c->codec, elements_of(c, k));
}

static void encode_chunk(struct contribution *c, uint32_t k, enum fault fault, float *x, double *norm2) {
    static const uint8_t nan_scale[4] = {0, 0, 0xc0, 0x7f};
    size_t n = elements_of(c, k);
    uint8_t *bytes = c->bytes + k * c->stride;
    for (size_t i = 0; i < n; i++) x[i] = SCALE * ((float)((i * 2654435761u >> 8) & 0xff) - 128) / 128;
    if (outer_encode(bytes, x, n, c->codec, NULL) || outer_decode(x, bytes, bytes_of(c, k), n, c->codec, NULL)) abort();
    *norm2 += outer_norm2(x, n);
    if (outer_absmax(x, n) > (float)c->ready.absmax) c->ready.absmax = (double)outer_absmax(x, n);
    if (fault == HUGE_VALUES) { /* after the norm was taken */
        for (size_t i = 0; i < n; i++) x[i] = 1e9f;
        if (outer_encode(bytes, x, n, c->codec, NULL)) abort();
    }
    if (fault == LARGER_NORM) { /* values that fit, of a norm that would have been clipped */
        for (size_t i = 0; i < n; i++) x[i] *= 10;
        if (outer_encode(bytes, x, n, c->codec, NULL)) abort();
    }
    if (fault == NAN_SCALE || fault == NAN_SHOWN) memcpy(bytes, nan_scale, sizeof nan_scale);
    c->leaves[k].digest = digest_leaf(k, bytes, bytes_of(c, k) - (fault == SHORT_CHUNK ? 1 : 0));
}

static void make_contribution(struct contribution *c, const struct member *m, enum fault fault) {
    const struct msg_outer *o = m->genesis.outer;
    double norm2 = 0;
    *c = (struct contribution){.elements = proto_model_elements(m->genesis.model),
                               .chunk_elements = o->chunk_elements,
                               .codec = (enum outer_codec)o->contribution_codec};
    c->chunks = (uint32_t)((c->elements + o->chunk_elements - 1) / o->chunk_elements);
    c->stride = outer_encoded_bytes(c->codec, o->chunk_elements);
    c->bytes = calloc(c->chunks, c->stride);
    c->leaves = calloc(c->chunks, sizeof *c->leaves);
    float *x = calloc(o->chunk_elements, sizeof *x);
    if (!c->bytes || !c->leaves || !x) abort();
    for (uint32_t k = 0; k < c->chunks; k++) encode_chunk(c, k, fault, x, &norm2);
    free(x);
    memcpy(c->claims, m->leases, m->lease_count * sizeof *m->leases);
    double absmax = c->ready.absmax;
    c->ready = (struct msg_ready){.round = m->round, .base_index = m->base_index,
                                  .state_index = m->root_index, .state_root = m->root,
                                  .codec = (uint8_t)c->codec, .chunks = c->chunks, .norm = sqrt(norm2),
                                  .absmax = absmax, .loss = 3, .root = digest_tree_root(c->leaves, c->chunks),
                                  .ranges = c->claims, .ranges_count = m->lease_count};
    for (uint32_t i = 0; i < m->lease_count; i++) c->ready.samples += c->claims[i].count;
}

static void release(struct contribution *c) {
    free(c->bytes);
    free(c->leaves);
}

/* ---- READY ------------------------------------------------------------------------------------------------- */

static void spoil_ready(struct contribution *c, const struct member *m, enum fault fault) {
    struct msg_ready *r = &c->ready;
    switch (fault) {
    case WRONG_CHUNKS: r->chunks++; break;
    case WRONG_CODEC: r->codec ^= 1; break;
    case NORM_TOO_SMALL: r->norm = r->absmax / 2; break;
    case NORM_TOO_LARGE: r->norm = 2 * r->absmax * sqrt((double)c->elements); break;
    case ABSMAX_TOO_LARGE: r->norm = r->absmax = 1e300; break;
    case NO_ROOT: memset(&r->root, 0, sizeof r->root); break;
    case NO_CLAIMS: r->ranges_count = 0; break;
    case FOREIGN_LEASE: c->claims[0].lease += 1000000; break;
    case STOLEN_LEASE: c->claims[0] = m->foreign; break;
    case INFLATED_SAMPLES: r->samples = 1u << 20; break;
    case OLD_GENERATION: c->claims[0].generation--; break;
    case MORE_THAN_LEASED: c->claims[0].count++; break;
    case CLAIMED_TWICE: c->claims[1] = c->claims[0]; r->ranges_count = 2; break;
    case ROUND_AHEAD: r->round += 5; break;
    case OTHER_BASE: memset(&r->state_root, 7, sizeof r->state_root); break;
    default: break;
    }
}

static bool send_ready(struct contribution *c, struct member *m, enum fault fault) {
    spoil_ready(c, m, fault);
    struct msg_ready *r = &c->ready;
    if (proto_record_sign(&m->target->id, "ready", &m->run, m->link.term, RECORD_ready, r, &r->signature, NULL))
        return false;
    if (fault == WRONG_SIGNATURE) r->signature.b[0] ^= 1;
    return link_send(&m->link, MSG_READY, 0, r);
}

/* The encoder refuses to write what is not finite, so the bytes are changed behind it. */
static bool send_not_finite(struct link *l, struct msg_ready *ready) {
    static const uint8_t marker[8] = {0x40, 0x09, 0x21, 0xfb, 0x54, 0x44, 0x2d, 0x18}; /* pi */
    uint8_t header[PROTO_FRAME_HEADER_BYTES];
    struct proto_buffer b;
    proto_buffer_init(&b, PROTO_CONTROL_BYTES_MAX);
    ready->norm = 3.141592653589793;
    bool ok = proto_encode(&b, RECORD_ready, ready, NULL) == 0;
    uint8_t *at = ok ? memmem(b.data, b.length, marker, sizeof marker) : NULL;
    if (at) memcpy(at, "\x7f\xf8\0\0\0\0\0", 8);
    struct frame f = {MSG_READY, (uint32_t)b.length, l->term, l->session, 0};
    frame_write(&f, header);
    ok = at && link_write(l, header, sizeof header) && link_write(l, b.data, b.length);
    proto_buffer_release(&b);
    return ok;
}

static bool leases_came(const struct member *m) { return m->lease_count || (m->leases_came && m->quarantined); }

/* Connect and stand where the others stand, with samples. */
static bool take_part(struct member *m, const struct target *t, uint32_t port) {
    struct msg_lease_ask ask = {.samples = 4};
    struct err err;
    if (member_dial(m, t, &err)) {
        snprintf(m->link.heard, sizeof m->link.heard, "%.200s", err.msg);
        return false;
    }
    return member_hello(m, port) && member_follow(m, member_is_current, PATIENCE_MS) &&
           link_send(&m->link, MSG_LEASE_ASK, 0, &ask) && member_follow(m, leases_came, PATIENCE_MS);
}

static void leave(struct member *m) {
    struct msg_leave msg = {.reason = proto_str("seen enough")};
    m->link.on_idle = NULL;
    link_send(&m->link, MSG_LEAVE, 0, &msg);
    link_hear_out(&m->link);
}

static bool judged(const struct member *m) { return m->link.heard[0] || !member_is_current(m); }

/* A commit that overtakes the READY makes it an old one, which nobody answers: then once more. */
static int announce(const struct target *t, const struct attack *a) {
    struct member m;
    struct contribution c;
    for (int i = 0; i < TRIES; i++) {
        if (!take_part(&m, t, 0)) break;
        uint64_t base = m.base_index;
        make_contribution(&c, &m, (enum fault)a->kind);
        bool sent = a->kind == NOT_FINITE ? send_not_finite(&m.link, &c.ready) : send_ready(&c, &m, (enum fault)a->kind);
        m.phase = PHASE_WAITING;
        if (a->kind == OTHER_BASE) { /* the verdict is that everything must be checked */
            bool ok = sent && link_expect(&m.link, MSG_RESYNC);
            if (ok) snprintf(m.link.heard, sizeof m.link.heard, "RESYNC");
        } else {
            member_follow(&m, judged, PATIENCE_MS);
        }
        release(&c);
        if (m.link.heard[0] || (m.base_index == base && !sent) || i + 1 == TRIES) break;
        leave(&m);
        member_close(&m);
    }
    bool ok = !strncmp(m.link.heard, "RES", 3) || !strncmp(m.link.heard, "BYE", 3);
    verdict(a, ok, "%s", m.link.heard[0] ? m.link.heard : "no answer");
    char heard[sizeof m.link.heard];
    memcpy(heard, m.link.heard, sizeof heard);
    if (!m.link.over) leave(&m);
    member_close(&m);
    return !ok;
}

/* ---- to the aggregator -------------------------------------------------------------------------------------------- */

static bool plan_or_gone(const struct member *m) { return member_has_plan(m) || !member_is_current(m); }

static int own_place(const struct member *m) {
    for (uint32_t i = 0; i < m->plan.contributors_count; i++)
        if (m->plan.contributors[i].member == m->id) return (int)i;
    return -1;
}

/* In a plan, with everything announced rightly. */
static bool get_into_a_plan(struct member *m, struct contribution *c, const struct target *t, enum fault fault) {
    for (int i = 0; i < TRIES; i++) {
        if (!take_part(m, t, 0)) return false;
        make_contribution(c, m, fault);
        if (!send_ready(c, m, fault)) return false;
        m->phase = PHASE_WAITING;
        member_follow(m, plan_or_gone, PATIENCE_MS);
        if (member_has_plan(m) && own_place(m) >= 0) return true;
        release(c);
        leave(m);
        member_close(m);
    }
    return false;
}

/* An aggregator or an auditor. */
static bool dial_member(const struct member *m, const struct msg_address *to, struct link *l) {
    char host[PROTO_ADDRESS_BYTES_MAX + 1];
    struct target there = *m->target;
    struct err err;
    proto_str_copy(to->host, host, sizeof host);
    if (host[0]) there.host = host;
    there.port = (uint16_t)to->port;
    if (link_dial(l, &there, &err) || link_greet(l, &err)) return false;
    l->term = m->link.term;
    l->session = m->link.session;
    l->on_idle = m->link.on_idle; /* the coordinator must not miss us meanwhile */
    l->idle_arg = m->link.idle_arg;
    return true;
}

/* The aggregator may hear of the plan later than we did. */
static bool show_leaves(const struct member *m, struct contribution *c, struct link *l, enum fault fault) {
    struct msg_leaves leaves = {.round = m->plan.round, .all = c->leaves, .all_count = c->chunks};
    if (fault == WRONG_LEAVES) c->leaves[c->chunks - 1].digest.b[0] ^= 1;
    for (uint64_t end = now_ms() + PATIENCE_MS; now_ms() < end && !l->over;) {
        if (!link_send(l, MSG_LEAVES, m->plan_number, &leaves)) return false;
        int type = 0;
        for (int i = 0; i < 50 && !l->over && type != MSG_NONE; i++)
            if ((type = link_receive(l, IDLE_MS)) == MSG_WANT) return true;
    }
    return false;
}

static bool send_chunk(const struct member *m, const struct contribution *c, struct link *l, uint32_t k,
                       enum fault fault) {
    uint8_t set[PROTO_SET_BYTES_MAX] = {0};
    uint32_t place = (uint32_t)own_place(m);
    proto_set_add(set, place);
    if (fault == FOREIGN_SET) proto_set_add(set, place ^ 1);
    if (fault == FLIPPED_BYTE) c->bytes[k * c->stride + 5] ^= 1;
    struct msg_chunk chunk = {
        .round = m->plan.round, .chunk = k, .codec = (uint8_t)c->codec,
        .set = {set, (m->plan.contributors_count + 7) / 8},
        .weight = m->plan.contributors[place].weight + (fault == WRONG_WEIGHT),
        .data = {c->bytes + k * c->stride, (uint32_t)(bytes_of(c, k) - (fault == SHORT_CHUNK))},
    };
    return link_send(l, MSG_CHUNK, m->plan_number, &chunk);
}

static bool needs_us(const struct member *m) { return m->has_audit || m->round > m->plan.round; }

/* Whoever sums one of our chunks once more gets it as the aggregator did. */
static void serve_audit(struct member *m, struct contribution *c) {
    struct link l = {.fd = -1, .record = -1};
    struct msg_address to = {.host = proto_str(m->audit_host), .port = m->audit_port};
    if (to.port && dial_member(m, &to, &l) && show_leaves(m, c, &l, HONEST) &&
        send_chunk(m, c, &l, m->audit_chunk, HONEST))
        link_receive(&l, 5 * IDLE_MS);
    link_close(&l);
    m->has_audit = false;
}

/* False: no commit came. */
static bool see_it_through(struct member *m, struct contribution *c, bool serves) {
    uint64_t end = now_ms() + PATIENCE_MS;
    while (m->round <= m->plan.round && !m->link.over && now_ms() < end) {
        member_follow(m, needs_us, IDLE_MS);
        if (m->has_audit && serves) serve_audit(m, c);
        m->has_audit = false;
    }
    return m->round > m->plan.round;
}

static bool report(struct member *m, const struct contribution *c, enum fault fault);

/* A sum that nobody asked us for, and a word against all others that only who sums may say. */
static bool disturb(struct member *m, const struct contribution *c, enum fault fault) {
    bool sent = fault != FOREIGN_REPORT || report(m, c, fault);
    for (uint32_t i = 0; fault == UNFOUNDED_ACCUSE && sent && i < m->plan.contributors_count; i++) {
        struct msg_accuse msg = {.round = m->plan.round, .member = m->plan.contributors[i].member,
                                 .reason = proto_str("its values are not finite")};
        sent = msg.member == m->id || link_send(&m->link, MSG_ACCUSE, m->plan_number, &msg);
    }
    return sent;
}

/* What a contributor weighs is what it was leased, whatever it says. */
static bool weighs_what_it_claims(const struct member *m, const struct contribution *c) {
    uint64_t claimed = 0;
    for (uint32_t i = 0; i < c->ready.ranges_count; i++) claimed += c->claims[i].count;
    return m->plan.contributors[own_place(m)].tokens == claimed * m->genesis.model->sequence;
}

static bool is_summed(enum fault f) {
    return f == HONEST || f == INFLATED_SAMPLES || f == FOREIGN_REPORT || f == UNFOUNDED_ACCUSE;
}

static bool is_left_out(enum fault f) {
    return f == NAN_SCALE || f == NAN_SHOWN || f == HUGE_VALUES || f == LARGER_NORM || f == SILENT;
}

/* Those that are left out at once, or stay to see that they are, wait for the commit; the others leave,
 * which spares the round the time until they would be missed. */
static int contribute(const struct target *t, const struct attack *a) {
    struct member m;
    struct contribution c;
    struct link l = {.fd = -1, .record = -1};
    enum fault fault = (enum fault)a->kind;
    if (!get_into_a_plan(&m, &c, t, fault)) return verdict(a, false, "in no plan: %s", m.link.heard);
    uint64_t round = m.plan.round;
    bool due = weighs_what_it_claims(&m, &c);
    bool dialled = disturb(&m, &c, fault) &&
                   (fault == SILENT || (m.plan.addresses_count && dial_member(&m, &m.plan.addresses[0], &l)));
    bool wanted = dialled && fault != SILENT && show_leaves(&m, &c, &l, fault);
    for (uint32_t k = 0; wanted && k < c.chunks; k++)
        if (!send_chunk(&m, &c, &l, k, k ? HONEST : fault)) break;
    bool stays = is_summed(fault) || is_left_out(fault) || fault == FLIPPED_BYTE;
    bool cut = !stays || fault == FLIPPED_BYTE ? link_hear_out(&l) : false;
    bool over = stays && see_it_through(&m, &c, is_summed(fault) || fault == NAN_SHOWN);
    bool summed = m.summed_round == round + 1;
    bool ok = dialled && due && (stays ? over && summed == is_summed(fault) : cut);
    verdict(a, ok, "%s%s%s%s%s", cut ? "the aggregator ended the link" : "the link stays",
            over ? ", the round is committed" : "", !over ? "" : summed ? " with it" : " without it",
            due ? "" : ", it weighs what it said", m.quarantined ? ", and it is in quarantine" : "");
    link_close(&l);
    if (!m.link.over) leave(&m);
    member_close(&m);
    release(&c);
    return !ok;
}

/* ---- as second holder ------------------------------------------------------------------------------------------------ */

static bool holds(const struct member *m) { return member_has_plan(m) && m->plan.shards[0].holder == m->id; }
static bool planned_again(const struct member *m) { return !holds(m) || !member_is_current(m); }

/* A report that is equal to nobody's, or that cannot be. */
static bool report(struct member *m, const struct contribution *c, enum fault fault) {
    uint8_t set[PROTO_SET_BYTES_MAX] = {0};
    struct msg_summed run = {.chunks = c->chunks, .set = {set, (m->plan.contributors_count + 7) / 8}};
    for (uint32_t i = 0; i < m->plan.contributors_count; i++) {
        proto_set_add(set, i);
        run.weight += m->plan.contributors[i].weight;
    }
    struct msg_shard_report msg = {.round = m->plan.round, .plan = m->plan_number, .results = c->leaves,
                                   .results_count = c->chunks - (fault == BROKEN_HOLDER),
                                   .summed = &run, .summed_count = 1};
    if (proto_record_sign(&m->target->id, "shard_report", &m->run, m->link.term, RECORD_shard_report, &msg,
                          &msg.signature, NULL))
        return false;
    if (fault == UNSIGNED_HOLDER) memset(&msg.signature, 0, sizeof msg.signature);
    return link_send(&m->link, MSG_SHARD_REPORT, m->plan_number, &msg);
}

static int hold(const struct target *t, const struct attack *a) {
    struct member m;
    struct contribution c = {0};
    bool ok = take_part(&m, t, FAR_PORT) && member_follow(&m, holds, PATIENCE_MS);
    if (ok) make_contribution(&c, &m, HONEST);
    ok = ok && report(&m, &c, (enum fault)a->kind);
    ok = ok && (a->kind == LYING_HOLDER ? member_follow(&m, planned_again, PATIENCE_MS) : link_hear_out(&m.link));
    verdict(a, ok, "%s", m.link.heard[0] ? m.link.heard : ok ? "the round was given to others" : "never asked to hold");
    if (!m.link.over) leave(&m);
    member_close(&m);
    release(&c);
    return !ok;
}

const struct attack contribution_attacks[] = {
    {"honest", contribute, HONEST},
    {"ready-not-finite", announce, NOT_FINITE},
    {"ready-chunks", announce, WRONG_CHUNKS},
    {"ready-codec", announce, WRONG_CODEC},
    {"ready-norm-small", announce, NORM_TOO_SMALL},
    {"ready-norm-large", announce, NORM_TOO_LARGE},
    {"ready-absmax", announce, ABSMAX_TOO_LARGE},
    {"ready-no-root", announce, NO_ROOT},
    {"ready-no-claims", announce, NO_CLAIMS},
    {"ready-foreign-lease", announce, FOREIGN_LEASE},
    {"ready-stolen-lease", announce, STOLEN_LEASE},
    {"ready-signature", announce, WRONG_SIGNATURE},
    {"ready-quarantined", announce, HONEST},
    {"inflated-samples", contribute, INFLATED_SAMPLES},
    {"foreign-report", contribute, FOREIGN_REPORT},
    {"unfounded-accuse", contribute, UNFOUNDED_ACCUSE},
    {"ready-old-generation", announce, OLD_GENERATION},
    {"ready-more-than-leased", announce, MORE_THAN_LEASED},
    {"ready-claimed-twice", announce, CLAIMED_TWICE},
    {"ready-round-ahead", announce, ROUND_AHEAD},
    {"ready-other-base", announce, OTHER_BASE},
    {"wrong-leaves", contribute, WRONG_LEAVES},
    {"flipped-byte", contribute, FLIPPED_BYTE},
    {"nan-scale", contribute, NAN_SCALE},
    {"nan-shown", contribute, NAN_SHOWN},
    {"short-chunk", contribute, SHORT_CHUNK},
    {"huge-values", contribute, HUGE_VALUES},
    {"larger-norm", contribute, LARGER_NORM},
    {"foreign-set", contribute, FOREIGN_SET},
    {"wrong-weight", contribute, WRONG_WEIGHT},
    {"silent-contributor", contribute, SILENT},
    {"lying-holder", hold, LYING_HOLDER},
    {"broken-holder", hold, BROKEN_HOLDER},
    {"unsigned-holder", hold, UNSIGNED_HOLDER},
    {NULL, NULL, 0},
};
