/* core_takeover.c - a member has seen more of the run than our store: an older copy of it was put
 * back. What the run's keys signed is taken over, entry by entry as any reader would, and the core
 * starts again from the store under a term above all it saw. Nobody's bare word is enough for more
 * than that: a term without entries needs a second witness, or time. A key that we don't know may be
 * enrolled in what we lack, so it may show entries too; but the run waits for a stranger only once
 * one of them has proved good, and a member may take its place until then. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

#define LLU(x) ((unsigned long long)(x))
#define PATIENCE 8u /* silences that one member must stand by its word for a newer term before it is taken, and
                     * between two times that a member may show entries */
#define COME_AGAIN "the coordinator's store is older than the run; come again"

struct takeover {
    uint64_t conn, head_index, term, bytes, until_ms;
    bool holds; /* nothing is planned, granted or written: what comes might contradict it */
    struct ledger_chain chain;
    struct batch batch;
};

static uint64_t patience_ms(const struct core *c) {
    return (uint64_t)PATIENCE * c->outer->silence_ms_max;
}

void core_forget_takeover(struct core *c, uint64_t conn) {
    struct takeover *t = c->takeover;
    if (!t || (conn && t->conn != conn)) return;
    for (uint32_t i = 0; i < t->batch.count; i++) free(t->batch.writes[i].value);
    free(t->batch.writes);
    free(t);
    c->takeover = NULL;
}

static void restart(struct core *c, uint64_t term, struct core_actions *out) {
    struct core_action *a = core_emit(out, CORE_ACT_RESTART);
    a->term = term;
    c->over = true;
}

bool core_awaits_entries(const struct core *c) { return c->takeover && c->takeover->holds; }

bool core_is_behind(const struct core *c) {
    return core_awaits_entries(c) || c->tick_ms < c->hold_until_ms;
}

/* ---- a newer term --------------------------------------------------------------------------- */

/* Our own node, two members, or one whose word has stood for a while. */
static bool is_witnessed(const struct core *c, const struct member *m, uint64_t now_ms) {
    uint32_t witnesses = 0;
    for (uint32_t i = 0; i < c->member_count; i++)
        witnesses += core_in_good_standing(&c->members[i]) && c->members[i].term_shown > c->term;
    return core_is_own(c, m) || witnesses > 1 || now_ms - m->term_shown_ms >= patience_ms(c);
}

static void on_newer_term(struct core *c, struct conn *k, uint64_t term, uint64_t now_ms,
                          struct core_actions *out) {
    struct member *m = k->member;
    core_complain(c, out, CORE_ERROR,
                  WHO " has seen term %llu, this store is of term %llu: it is an older copy",
                  WHO_OF(m), LLU(term), LLU(c->term));
    if (term - c->term <= CORE_TERM_STEP_MAX) {
        if (m->term_shown <= c->term) m->term_shown_ms = now_ms;
        m->term_shown = term;
    }
    core_close(c, out, k->id, ERR_STALE, false, COME_AGAIN);
    if (m->term_shown == term && is_witnessed(c, m, now_ms)) restart(c, term, out);
}

/* ---- newer entries -------------------------------------------------------------------------- */

static void hold(struct core *c) {
    c->takeover->holds = true;
    c->hold_until_ms = c->takeover->until_ms;
}

static void begin(struct core *c, struct conn *k, const struct msg_hello *msg, uint64_t now_ms,
                  struct core_actions *out) {
    struct msg_ledger_get get = {.from = c->entry_count};
    struct takeover *t = calloc(1, sizeof *t);
    assert(t);
    t->conn = k->id;
    t->head_index = msg->head_index;
    t->term = msg->term_max;
    t->until_ms = now_ms + c->outer->silence_ms_max;
    t->chain = c->keys;
    t->chain.next_index = c->entry_count;
    t->chain.head = c->entries[c->entry_count - 1];
    t->chain.term = c->entry_term;
    c->takeover = t;
    k->showing = true;
    core_send_conn(out, k->id, 0, MSG_LEDGER_GET, 0, &get);
}

static void on_newer_head(struct core *c, struct conn *k, const struct msg_hello *msg,
                          uint64_t now_ms, struct core_actions *out) {
    struct member *m = k->member;
    bool again = m->showed_ms && now_ms - m->showed_ms < patience_ms(c);
    if (core_awaits_entries(c) || again) {
        core_close(c, out, k->id, ERR_STALE, false, COME_AGAIN);
        return;
    }
    uint64_t conn = k->id;
    if (c->takeover) core_close(c, out, c->takeover->conn, ERR_STALE, false, COME_AGAIN);
    k = core_conn(c, conn); /* closing the other one moved the list */
    begin(c, k, msg, now_ms, out);
    m->showed_ms = now_ms;
    hold(c);
    core_log(out, CORE_WARNING,
             WHO " has ledger entry %llu, this store ends at %llu: it is an older copy, and asks for "
                 "the rest",
             WHO_OF(m), LLU(msg->head_index), LLU(c->entry_count - 1));
}

bool core_is_shown_by_stranger(struct core *c, struct conn *k, const struct msg_hello *msg,
                               uint64_t now_ms, struct core_actions *out) {
    if (digest_is_zero(&msg->head_digest) || msg->head_index < c->entry_count || c->takeover)
        return false;
    begin(c, k, msg, now_ms, out);
    core_emit(out, CORE_ACT_LISTEN)->conn = k->id;
    core_complain(c, out, CORE_WARNING,
                  "HELLO from %s with a key that is not enrolled and ledger entry %llu, this store ends "
                  "at %llu: it may show the rest",
                  k->host, LLU(msg->head_index), LLU(c->entry_count - 1));
    return true;
}

/* A fork is for a person to settle: of two entries with one index the higher term holds. */
static void on_fork(struct core *c, struct conn *k, uint64_t index, const struct digest *theirs,
                    uint64_t term, struct core_actions *out) {
    char mine[DIGEST_HEX_BYTES], other[DIGEST_HEX_BYTES];
    digest_hex(&c->entries[index], mine);
    digest_hex(theirs, other);
    core_complain(c, out, CORE_ERROR,
                  "two histories: ledger entry %llu is %.16s here (term %llu) and %.16s at " WHO
                  " (term %llu); the higher term holds: if it is the member's, replace the store",
                  LLU(index), mine, LLU(c->entry_term), other, WHO_OF(k->member), LLU(term));
    core_close(c, out, k->id, ERR_STALE, false, "two histories of this run: ask the operator");
}

bool core_is_shown_more(struct core *c, struct conn *k, const struct msg_hello *msg,
                        uint64_t now_ms, struct core_actions *out) {
    bool has_ledger = !digest_is_zero(&msg->head_digest);
    if (has_ledger && msg->head_index >= c->entry_count)
        on_newer_head(c, k, msg, now_ms, out);
    else if (has_ledger && !digest_equal(&c->entries[msg->head_index], &msg->head_digest))
        on_fork(c, k, msg->head_index, &msg->head_digest, msg->term_max, out);
    else if (msg->term_max > c->term)
        on_newer_term(c, k, msg->term_max, now_ms, out);
    else
        return false;
    return true;
}

/* ---- the entries come ----------------------------------------------------------------------- */

static int take_shown(struct core *c, const struct msg_signed_entry *e, struct err *err) {
    struct takeover *t = c->takeover;
    struct msg_entry entry;
    if (ledger_chain_take(&t->chain, e, &entry, err)) return -1;
    uint64_t index = entry.index;
    proto_decoded_release(RECORD_entry, &entry);
    uint8_t *copy = malloc(e->bytes.length);
    assert(copy);
    memcpy(copy, e->bytes.data, e->bytes.length);
    batch_put_bytes(&t->batch, CORE_LEDGER, index, copy, e->bytes.length);
    struct core_write *w = &t->batch.writes[t->batch.count - 1];
    w->is_signed = true;
    w->signature = e->signature;
    t->bytes += e->bytes.length;
    return 0;
}

/* The first entry must hang on our head: what follows another one is another history. */
static bool is_fork(const struct core *c, const struct msg_ledger *msg, uint64_t *term) {
    struct msg_entry e = {0};
    bool fork = false;
    if (c->takeover->batch.count || !msg->entries_count) return false;
    if (!proto_decode(msg->entries[0].bytes.data, msg->entries[0].bytes.length, RECORD_entry, &e,
                      NULL))
        fork = e.index == c->entry_count && !digest_equal(&e.previous, &c->takeover->chain.head);
    *term = e.term;
    if (fork) c->takeover->chain.head = e.previous;
    proto_decoded_release(RECORD_entry, &e);
    return fork;
}

static void finish(struct core *c, struct core_actions *out) {
    struct takeover *t = c->takeover;
    uint64_t term = t->chain.term > t->term ? t->chain.term : t->term;
    if (term > c->term + CORE_TERM_STEP_MAX && term > t->chain.term) term = t->chain.term;
    if (term < c->term) term = c->term;
    core_log(out, CORE_WARNING,
             "%u ledger entries are taken over from a member; starting again from entry %llu",
             t->batch.count, LLU(t->chain.next_index - 1));
    core_emit_persist(out, &t->batch);
    core_forget_takeover(c, t->conn);
    restart(c, term, out);
}

void core_check_takeover(struct core *c, uint64_t now_ms, struct core_actions *out) {
    if (c->takeover && now_ms >= c->takeover->until_ms)
        core_close(c, out, c->takeover->conn, ERR_TIMEOUT, false,
                   "the entries that HELLO spoke of did not come");
}

void core_on_ledger(struct core *c, struct conn *k, const struct msg_ledger *msg,
                    struct core_actions *out) {
    struct takeover *t = c->takeover;
    struct err err;
    uint64_t term;
    assert(t && t->conn == k->id);
    if (t->chain.next_index - t->batch.count != c->entry_count) { /* an entry was written meanwhile */
        core_close(c, out, k->id, ERR_STALE, false, "the ledger has moved; come again");
        return;
    }
    if (is_fork(c, msg, &term)) {
        struct digest theirs = t->chain.head;
        if (!k->member) /* no signature was looked at: a stranger's word is not the operator's affair */
            core_close(c, out, k->id, ERR_STALE, false, "LEDGER: entry %llu hangs on another head",
                       LLU(c->entry_count));
        else
            on_fork(c, k, c->entry_count - 1, &theirs, term, out);
        return;
    }
    for (uint32_t i = 0; i < msg->entries_count; i++)
        if (take_shown(c, &msg->entries[i], &err)) {
            core_close(c, out, k->id, ERR_PROTOCOL, false, "LEDGER: %s", err.msg);
            return;
        }
    if (t->batch.count) hold(c);
    bool whole = t->chain.next_index > t->head_index || t->bytes > CORE_TAKEOVER_BYTES_MAX;
    if (whole && t->batch.count) finish(c, out);
}
