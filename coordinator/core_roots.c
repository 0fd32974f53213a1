/* core_roots.c - who has which state: roots are compared, rounds settle, donors are named. */
#include <string.h>

#include "coordinator/core_internal.h"

struct state *core_find_state(const struct core *c, uint64_t index) {
    uint32_t low = 0, high = c->state_count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (c->states[middle].index < index)
            low = middle + 1;
        else
            high = middle;
    }
    return low < c->state_count && c->states[low].index == index ? &c->states[low] : NULL;
}

/* ---- which root is right -------------------------------------------------------------------- */

/* The newest state whose root is known; NULL before anybody told one. */
static const struct state *newest_known(const struct core *c) {
    for (uint32_t i = c->state_count; i-- > 0;)
        if (c->states[i].root_known && !c->states[i].undone) return &c->states[i];
    return NULL;
}

/* One that a second member or our own node confirmed. A fragment's contributors all showed a root at
 * its base or after; where only one of them did, its word must do. */
const struct state *core_agreed_state(const struct core *c, const struct round *r) {
    const struct state *known = NULL;
    for (uint32_t i = c->state_count; i-- > 0;) {
        const struct state *s = &c->states[i];
        if (!s->root_known || s->disputed || s->undone) continue;
        if (s->root_fixed || s->root_confirmed) return s->index < r->base_index && known ? known : s;
        known = s;
    }
    return known ? known : newest_known(c);
}

bool core_is_initial(const struct core *c) {
    return c->state_count == 1 && !c->genesis.init_from_count;
}

/* ---- donors --------------------------------------------------------------------------------- */

static bool can_donate(const struct member *m) { return core_serves(m) && m->port && m->has_root; }

/* Newest states first would be best; that all donors apply every commit soon makes ids do. */
uint32_t core_pick_donors(const struct core *c, struct member *m, struct msg_address *list) {
    m->donor_count = 0;
    for (uint32_t i = 0; i < c->member_count && m->donor_count < CORE_DONORS_MAX; i++) {
        const struct member *donor = &c->members[i];
        if (donor == m || !can_donate(donor) || !core_address(m, donor, &list[m->donor_count]))
            continue;
        m->donors[m->donor_count++] = donor->id;
    }
    return m->donor_count;
}

void core_send_resync(struct core *c, struct member *m, const struct state *s, const uint8_t *wrong,
                      struct core_actions *out) {
    struct msg_address donors[CORE_DONORS_MAX];
    if (!s) s = newest_known(c);
    if (!s) return;
    struct msg_resync msg = {.index = s->index,
                             .root = s->root,
                             .wrong = {wrong, wrong ? (c->chunks + 7) / 8 : 0},
                             .donors = donors,
                             .donors_count = core_pick_donors(c, m, donors)};
    m->catching_up = true;
    core_send(out, m, MSG_RESYNC, 0, &msg);
}

static bool has_donor_left(const struct core *c, const struct member *m) {
    for (uint32_t i = 0; i < m->donor_count; i++)
        if (can_donate(core_member(c, m->donors[i]))) return true;
    return false;
}

static bool has_newest(const struct core *c, const struct member *m) {
    return core_serves(m) && m->has_root && m->root_index == core_state_now(c)->index;
}

/* Only members behind NAT have the newest state: nobody can dial them for it, so they dial those who lack
 * it, and are asked over that link. */
static void send_hidden_donors(struct core *c, uint64_t now_ms, struct core_actions *out) {
    struct msg_address needy[CORE_DONORS_MAX];
    const struct state *s = core_state_now(c);
    struct msg_resync msg = {.index = s->index, .root = s->root, .donors = needy};
    bool hidden = false;
    for (uint32_t i = 0; i < c->member_count; i++) {
        const struct member *m = &c->members[i];
        if (has_newest(c, m) && m->port) return;
        hidden |= has_newest(c, m);
        if (m->conn && m->catching_up && msg.donors_count < CORE_DONORS_MAX)
            msg.donors_count += core_address(NULL, m, &needy[msg.donors_count]);
    }
    if (!hidden || !msg.donors_count) return;
    if (c->hidden_ms && now_ms - c->hidden_ms < c->outer->silence_ms_max) return;
    c->hidden_ms = now_ms;
    for (uint32_t i = 0; i < c->member_count; i++)
        if (has_newest(c, &c->members[i])) core_send(out, &c->members[i], MSG_RESYNC, 0, &msg);
}

void core_renew_donors(struct core *c, uint64_t now_ms, struct core_actions *out) {
    if (core_is_initial(c)) return; /* everybody makes the initial state for himself */
    send_hidden_donors(c, now_ms, out);
    for (uint32_t i = 0; i < c->member_count; i++) {
        struct member *m = &c->members[i];
        struct msg_address donors[CORE_DONORS_MAX];
        if (!m->conn || !m->catching_up || has_donor_left(c, m)) continue;
        if (core_pick_donors(c, m, donors)) core_send_resync(c, m, NULL, NULL, out);
    }
}

/* ---- roots ---------------------------------------------------------------------------------- */

static void report_mismatch(struct core *c, struct member *m, const struct state *s,
                            const struct digest *root, struct core_actions *out) {
    char shown[DIGEST_HEX_BYTES], right[DIGEST_HEX_BYTES];
    digest_hex(root, shown);
    digest_hex(&s->root, right);
    c->root_mismatches++;
    m->has_root = false;
    core_complain(c, out, CORE_ERROR,
                  "state at ledger %llu: " WHO " has root %.16s, member %u said %.16s",
                  (unsigned long long)s->index, WHO_OF(m), shown, s->reference, right);
}

void core_overrule(struct core *c, struct state *s, const struct digest *root, uint32_t reference,
                   uint64_t now_ms, struct core_actions *out) {
    struct batch b = {0};
    core_log(out, CORE_ERROR,
             "state at ledger %llu: the root of member %u is wrong, that of member %u is right",
             (unsigned long long)s->index, s->reference, reference);
    s->root = *root;
    s->reference = reference;
    s->root_confirmed = true;
    for (uint32_t f = 0; f < c->fragments; f++) { /* contributions stand on the wrong state */
        struct round *r = &c->rounds[f];
        if (r->base_index > s->index) continue;
        if (r->phase != ROUND_COLLECT) core_cancel(c, r, out);
        for (uint32_t i = 0; i < c->member_count; i++)
            core_forget_ready(core_part(r, &c->members[i]));
    }
    core_return_leases(c, &b);
    core_emit_persist(out, &b);
    for (uint32_t i = 0; i < c->member_count; i++) {
        struct member *m = &c->members[i];
        if (m->id == reference || !m->has_root || m->root_index != s->index ||
            digest_equal(&m->root, root))
            continue;
        struct digest shown = m->root;
        report_mismatch(c, m, s, &shown, out);
        core_inquire(c, s, m, &shown, now_ms, out);
    }
}

/* Members that catch up wait for the root of the newest state. */
static void tell_root(struct core *c, const struct state *s, struct core_actions *out) {
    struct msg_root msg = {s->index, s->root};
    for (uint32_t i = 0; i < c->member_count; i++)
        if (c->members[i].catching_up) core_send(out, &c->members[i], MSG_ROOT, 0, &msg);
}

static enum root_verdict note_other_root(struct core *c, struct member *m, struct state *s,
                                         const struct digest *root, uint64_t now_ms,
                                         struct core_actions *out) {
    bool overrules = !s->root_fixed && core_is_own(c, m) && s->reference != m->id;
    if (overrules) { /* it computes beside us and has no reason to lie */
        core_overrule(c, s, root, m->id, now_ms, out);
        return ROOT_AGREES;
    }
    report_mismatch(c, m, s, root, out);
    core_inquire(c, s, m, root, now_ms, out);
    return ROOT_DIFFERS;
}

enum root_verdict core_note_root(struct core *c, struct member *m, uint64_t index,
                                 const struct digest *root, uint64_t now_ms,
                                 struct core_actions *out) {
    struct state *s = core_find_state(c, index);
    if (!s || s->undone) return ROOT_OF_NOTHING;
    if (s->disputed && core_vote(c, m, index, root, now_ms, out) &&
        !digest_equal(&s->root, root)) /* not decided yet: it shows it again */
        return ROOT_DIFFERS;
    bool news = !s->root_known, is_newest = s == core_state_now(c);
    if (news) {
        s->root = *root;
        s->root_known = true;
        s->reference = m->id;
        s->root_confirmed = core_is_own(c, m);
    } else if (!digest_equal(&s->root, root)) {
        if (note_other_root(c, m, s, root, now_ms, out) != ROOT_AGREES) return ROOT_DIFFERS;
    } else if (m->id != s->reference) {
        s->root_confirmed = true;
    }
    if (!m->has_root || index >= m->root_index) {
        m->has_root = true;
        m->root_index = index;
        m->root = *root;
    }
    if (is_newest) m->catching_up = false;
    if (news && is_newest) tell_root(c, s, out);
    core_settle(c);
    return ROOT_AGREES;
}

void core_on_root(struct core *c, struct member *m, const struct msg_root *msg, uint64_t now_ms,
                  struct core_actions *out) {
    if (core_note_root(c, m, msg->index, &msg->root, now_ms, out) == ROOT_OF_NOTHING)
        core_complain(c, out, CORE_WARNING,
                      WHO " shows a root for ledger %llu, which is no commit; ignored", WHO_OF(m),
                      (unsigned long long)msg->index);
}

/* Who is here without a state gets one from donors; it wants the results of the newest rounds at most. Who did not
 * say HELLO yet after our start may have any. */
static uint64_t applied_by(const struct core *c, const struct member *m) {
    uint32_t kept = CORE_UNSETTLED_ROUNDS * c->fragments + 1;
    if (m->has_root) return m->root_index;
    return m->conn && c->state_count > kept ? c->states[c->state_count - kept].index : 0;
}

/* Settled is what every live member has applied: nobody will ask for its bytes any more. One alone is not
 * everybody, nor are those whom nobody can dial: the others come back, and have to get it from somewhere. */
void core_settle(struct core *c) {
    uint64_t lowest = core_state_now(c)->index;
    uint32_t live = 0;
    bool dialable = false;
    for (uint32_t i = 0; i < c->member_count; i++) {
        const struct member *m = &c->members[i];
        if (!m->here || !core_in_good_standing(m)) continue;
        uint64_t applied = applied_by(c, m);
        if (applied < lowest) lowest = applied;
        dialable |= m->port > 0;
        live++;
    }
    if (live > 1 && dialable && lowest > c->settled_index) c->settled_index = lowest;
}
