/* core_standing.c - who may have a part in the run: revoked for good, in quarantine until the
 * operator says otherwise. Both are entries of the ledger. */
#include <assert.h>
#include <string.h>

#include "coordinator/core_internal.h"

#define LLU(x) ((unsigned long long)(x))

uint64_t core_take_away(struct core *c, struct member *m, struct core_actions *out) {
    struct batch b = {0};
    for (uint32_t f = 0; f < c->fragments; f++) {
        struct round *r = &c->rounds[f];
        struct part *p = core_part(r, m);
        if (!p->planned)
            core_forget_ready(p);
        else if (!p->dropped)
            core_drop_contributor(c, r, m, out);
    }
    uint64_t samples = core_return_leases(c, &b);
    core_emit_persist(out, &b);
    return samples;
}

/* The operator's or our own words, as much as an entry takes. */
static struct proto_bytes reason_of(const char *text) {
    struct proto_bytes s = proto_str(text ? text : "");
    if (s.length > PROTO_TEXT_BYTES_MAX) s.length = PROTO_TEXT_BYTES_MAX;
    while (s.length && s.length == PROTO_TEXT_BYTES_MAX && (s.data[s.length - 1] & 0x80)) s.length--;
    return s;
}

/* The operator has to say it again: what a newer ledger holds is not known yet. */
static bool is_too_early(struct core *c, const struct member *m, const char *what,
                         struct core_actions *out) {
    if (!core_is_behind(c)) return false;
    core_log(out, CORE_ERROR,
             WHO " is not %s: members may still show newer entries than this store has; try again later",
             WHO_OF(m), what);
    return true;
}

/* ---- revocation ----------------------------------------------------------------------------- */

void core_on_revoke(struct core *c, uint32_t member, const char *why, struct core_actions *out) {
    struct member *m = core_member(c, member);
    if (!m || m->revoked) {
        core_log(out, CORE_WARNING, "member %u %s", member, m ? "is revoked already" : "is unknown");
        return;
    }
    if (is_too_early(c, m, "revoked", out)) return;
    struct msg_revocation body = {.member = member, .reason = reason_of(why)};
    struct batch b = {0};
    uint64_t index;
    int failed = core_append(c, &b, LEDGER_REVOCATION, RECORD_revocation, &body, &index, NULL);
    assert(!failed);
    core_emit_persist(out, &b);
    m->revoked = true;
    c->roster_version = index;
    core_log(out, CORE_INFO, WHO " is revoked at ledger %llu", WHO_OF(m), LLU(index));
    if (m->conn)
        core_close(c, out, m->conn, ERR_REFUSED, true, "this member was revoked by the operator");
    core_lose(c, m, ERR_REFUSED, "revoked", out);
    core_send_ledger_to_all(c, index, out);
    core_send_roster_to_all(c, out);
}

/* ---- quarantine ----------------------------------------------------------------------------- */

static uint64_t append_quarantine(struct core *c, struct member *m, bool lifted,
                                  enum proto_type kind, struct proto_bytes proof, const char *why,
                                  struct core_actions *out) {
    struct msg_quarantine body = {.member = m->id,
                                  .lifted = lifted,
                                  .reason = reason_of(why),
                                  .kind = (uint8_t)kind,
                                  .proof_term = proof.length ? c->term : 0, /* taken in under it */
                                  .proof = proof};
    struct batch b = {0};
    uint64_t index;
    int failed = core_append(c, &b, LEDGER_QUARANTINE, RECORD_quarantine, &body, &index, NULL);
    assert(!failed);
    core_emit_persist(out, &b);
    m->quarantined = !lifted;
    core_send_ledger_to_all(c, index, out);
    return index;
}

void core_quarantine(struct core *c, struct member *m, enum proto_type kind, const void *record,
                     const char *why, struct core_actions *out) {
    struct proto_buffer proof;
    int which = proto_record_of_type((uint8_t)kind);
    if (m->quarantined) return;
    proto_buffer_init(&proof, PROTO_BLOB_BYTES_MAX / 2);
    if (proto_encode(&proof, (enum proto_record)which, record, NULL)) { /* too long for an entry */
        proto_buffer_release(&proof);
        proto_buffer_init(&proof, PROTO_BLOB_BYTES_MAX / 2);
    }
    uint64_t index = append_quarantine(c, m, false, proof.length ? kind : 0,
                                       (struct proto_bytes){proof.data, (uint32_t)proof.length},
                                       why, out);
    proto_buffer_release(&proof);
    c->quarantines++;
    uint64_t samples = core_take_away(c, m, out);
    core_log(out, CORE_ERROR,
             WHO " is in quarantine from ledger %llu on: %.120s; %llu samples go back", WHO_OF(m),
             LLU(index), why, LLU(samples));
    core_send_leases(c, m, out);
    core_settle(c);
}

void core_on_release(struct core *c, uint32_t member, const char *why, struct core_actions *out) {
    struct member *m = core_member(c, member);
    if (!m || !m->quarantined) {
        core_log(out, CORE_WARNING, "member %u is not in quarantine", member);
        return;
    }
    if (is_too_early(c, m, "released", out)) return;
    m->unfounded = m->missed = m->given_up = 0;
    m->distrusted = false;
    uint64_t index = append_quarantine(c, m, true, 0, (struct proto_bytes){0}, why, out);
    core_log(out, CORE_INFO, WHO " is out of quarantine at ledger %llu", WHO_OF(m), LLU(index));
}
