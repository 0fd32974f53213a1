/* core_referee.c - two members show different roots of one state. Each computed it from the same
 * committed bytes, so there is one right answer: what our own node or a third member has too. Both
 * show the leaves under their roots, so that the other one fetches only the chunks it has wrong. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

#define LLU(x) ((unsigned long long)(x))
enum { REFERENCE, CHALLENGER, THIRD };

static void end_inquiry(struct core *c, struct inquiry *q) {
    for (int i = 0; i < 3; i++) free(q->leaves[i]);
    struct state *s = core_find_state(c, q->index);
    if (s) s->disputed = false;
    *q = (struct inquiry){0};
}

void core_forget_inquiries(struct core *c) {
    for (uint32_t i = 0; i < CORE_INQUIRIES_MAX; i++)
        if (c->inquiries[i].deadline_ms) end_inquiry(c, &c->inquiries[i]);
}

/* Our own node where it is none of the two. */
static struct member *pick_third(const struct core *c, const struct inquiry *q) {
    struct member *best = NULL;
    for (uint32_t i = 0; i < c->member_count; i++) {
        struct member *m = &c->members[i];
        if (m->id == q->asked[REFERENCE] || m->id == q->asked[CHALLENGER] || !core_serves(m) ||
            !m->has_root)
            continue;
        if (!best || core_is_own(c, m)) best = m;
    }
    return best;
}

static bool is_open(const struct core *c, uint64_t index, uint32_t challenger) {
    for (uint32_t i = 0; i < CORE_INQUIRIES_MAX; i++) {
        const struct inquiry *q = &c->inquiries[i];
        if (q->deadline_ms && q->index == index && q->asked[CHALLENGER] == challenger) return true;
    }
    return false;
}

static struct inquiry *free_slot(struct core *c) {
    for (uint32_t i = 0; i < CORE_INQUIRIES_MAX; i++)
        if (!c->inquiries[i].deadline_ms) return &c->inquiries[i];
    return NULL;
}

/* Who has the state as it should be: who said so first, else anybody who stands there. */
static struct member *pick_reference(const struct core *c, const struct state *s) {
    assert(c->members);
    struct member *m = core_member(c, s->reference);
    if (m && m->conn) return m;
    for (uint32_t i = 0; i < c->member_count; i++) {
        m = &c->members[i];
        if (core_serves(m) && m->has_root && m->root_index == s->index) return m;
    }
    return NULL;
}

void core_inquire(struct core *c, struct state *s, struct member *m, const struct digest *root,
                  uint64_t now_ms, struct core_actions *out) {
    struct inquiry *q = free_slot(c);
    struct member *reference = pick_reference(c, s);
    struct msg_state_leaves_get get = {s->index};
    if (is_open(c, s->index, m->id)) return;
    if (!q || !reference || !m->conn) { /* nobody to compare with: every chunk is checked */
        core_send_resync(c, m, s, NULL, out);
        return;
    }
    *q = (struct inquiry){.index = s->index,
                          .deadline_ms = now_ms + c->outer->silence_ms_max / 2 + 1,
                          .asked = {reference->id, m->id, 0},
                          .root = *root};
    bool settled = s->root_fixed || s->root_confirmed || core_is_own(c, reference);
    struct member *third = settled ? NULL : pick_third(c, q);
    q->asked[THIRD] = third ? third->id : 0;
    q->vote = settled ? VOTE_REFERENCE : VOTE_NONE;
    s->disputed = !s->root_fixed;
    core_send(out, m, MSG_STATE_LEAVES_GET, 0, &get);
    core_send(out, reference, MSG_STATE_LEAVES_GET, 0, &get);
    if (third) core_send(out, third, MSG_STATE_LEAVES_GET, 0, &get);
}

/* ---- the verdict ---------------------------------------------------------------------------- */

static bool same_leaf(const struct inquiry *q, int a, int b, uint32_t chunk) {
    return digest_equal(&q->leaves[a][chunk].digest, &q->leaves[b][chunk].digest);
}

/* Chunks in which a and b differ, as a bitmap; how many, and the first. */
static uint32_t compare(const struct core *c, const struct inquiry *q, int a, int b, uint8_t *wrong,
                        uint32_t *first) {
    uint32_t n = 0;
    memset(wrong, 0, PROTO_CHUNKS_MAX / 8);
    for (uint32_t i = 0; i < c->chunks; i++) {
        if (same_leaf(q, a, b, i)) continue;
        if (!n++) *first = i;
        proto_set_add(wrong, i);
    }
    return n;
}

/* wrong: NULL where the leaves could not be had; then every chunk is checked. */
static void tell_wrong(struct core *c, struct member *m, const uint8_t *wrong, uint32_t count,
                       uint32_t first, uint64_t index, struct core_actions *out) {
    if (wrong)
        core_log(out, CORE_ERROR,
                 "state at ledger %llu: " WHO " is wrong in %u chunks, the first is %u; it gets "
                 "them anew",
                 LLU(index), WHO_OF(m), count, first);
    else
        core_log(out, CORE_ERROR, "state at ledger %llu: " WHO " is wrong; it checks every chunk",
                 LLU(index), WHO_OF(m));
    m->has_root = false;
    core_send_resync(c, m, core_find_state(c, index), wrong, out);
}

/* The root is the challenger's: it, and not who was first, has what the third computed too. */
static void reference_is_wrong(struct core *c, struct inquiry *q, const uint8_t *wrong,
                               uint32_t count, uint32_t first, uint64_t now_ms,
                               struct core_actions *out) {
    struct state *s = core_find_state(c, q->index);
    struct member *m = core_member(c, q->asked[REFERENCE]);
    struct member *right = core_member(c, q->asked[CHALLENGER]);
    uint64_t index = q->index;
    struct digest root = q->root;
    end_inquiry(c, q);
    right->has_root = true;
    right->root_index = index;
    right->root = root;
    if (m) m->has_root = false; /* told here, and not inquired about again */
    core_overrule(c, s, &root, right->id, now_ms, out);
    if (m) tell_wrong(c, m, wrong, count, first, index, out);
}

static void decide(struct core *c, struct inquiry *q, uint64_t now_ms, struct core_actions *out) {
    uint8_t wrong[PROTO_CHUNKS_MAX / 8];
    uint32_t first = 0, count = 0;
    struct member *m = core_member(c, q->asked[CHALLENGER]);
    struct state *s = core_find_state(c, q->index);
    bool both = q->leaves[REFERENCE] && q->leaves[CHALLENGER];
    if (both) count = compare(c, q, REFERENCE, CHALLENGER, wrong, &first);
    if (q->vote == VOTE_CHALLENGER && s && !s->root_fixed) {
        reference_is_wrong(c, q, both ? wrong : NULL, count, first, now_ms, out);
        return;
    }
    uint64_t index = q->index;
    end_inquiry(c, q);
    tell_wrong(c, m, both ? wrong : NULL, count, first, index, out);
}

static void decide_if_clear(struct core *c, struct inquiry *q, uint64_t now_ms,
                            struct core_actions *out) {
    uint8_t other[PROTO_CHUNKS_MAX / 8];
    uint32_t first;
    if (!q->answered[REFERENCE] || !q->answered[CHALLENGER]) return;
    if (q->vote == VOTE_NONE && q->leaves[THIRD] && q->leaves[CHALLENGER])
        q->vote = compare(c, q, THIRD, CHALLENGER, other, &first) ? VOTE_REFERENCE : VOTE_CHALLENGER;
    if (q->vote != VOTE_NONE) decide(c, q, now_ms, out);
}

bool core_vote(struct core *c, struct member *m, uint64_t index, const struct digest *root,
               uint64_t now_ms, struct core_actions *out) {
    const struct state *s = core_find_state(c, index);
    bool known = false;
    for (uint32_t i = 0; i < CORE_INQUIRIES_MAX; i++) {
        struct inquiry *q = &c->inquiries[i];
        if (!q->deadline_ms || q->index != index || q->vote != VOTE_NONE ||
            m->id == q->asked[REFERENCE] || m->id == q->asked[CHALLENGER])
            continue;
        if (digest_equal(root, &q->root))
            q->vote = VOTE_CHALLENGER;
        else if (s && digest_equal(root, &s->root))
            q->vote = VOTE_REFERENCE;
        known |= q->vote == VOTE_CHALLENGER;
        decide_if_clear(c, q, now_ms, out);
    }
    return known;
}

/* Leaves must stand under the root that was shown; others are none. */
static bool fits(const struct core *c, const struct inquiry *q, int who,
                 const struct msg_state_leaves *msg) {
    if (msg->leaves_count != c->chunks) return false;
    struct digest root = digest_tree_root(msg->leaves, msg->leaves_count);
    const struct state *s = core_find_state(c, q->index);
    if (who == REFERENCE) return s && digest_equal(&root, &s->root);
    if (who == CHALLENGER) return digest_equal(&root, &q->root);
    return true;
}

static void keep_leaves(const struct core *c, struct inquiry *q, int who,
                        const struct msg_state_leaves *msg) {
    q->answered[who] = true;
    if (!fits(c, q, who, msg)) return; /* it has gone on, or lies */
    q->leaves[who] = malloc(c->chunks * sizeof *q->leaves[who]);
    assert(q->leaves[who]);
    memcpy(q->leaves[who], msg->leaves, c->chunks * sizeof *q->leaves[who]);
}

void core_on_state_leaves(struct core *c, struct member *m, const struct msg_state_leaves *msg,
                          uint64_t now_ms, struct core_actions *out) {
    for (uint32_t i = 0; i < CORE_INQUIRIES_MAX; i++) {
        struct inquiry *q = &c->inquiries[i];
        for (int who = 0; q->deadline_ms && q->index == msg->index && who < 3; who++)
            if (q->asked[who] == m->id && !q->answered[who]) keep_leaves(c, q, who, msg);
        if (q->deadline_ms) decide_if_clear(c, q, now_ms, out);
    }
}

void core_check_inquiries(struct core *c, uint64_t now_ms, struct core_actions *out) {
    for (uint32_t i = 0; i < CORE_INQUIRIES_MAX; i++) {
        struct inquiry *q = &c->inquiries[i];
        if (q->deadline_ms && now_ms >= q->deadline_ms) decide(c, q, now_ms, out);
    }
}
