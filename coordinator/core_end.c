/* core_end.c - checkpoints, which our own node writes, and the end of the run. */
#include <assert.h>
#include <string.h>

#include "ckpt/ckpt.h"
#include "coordinator/core_internal.h"

/* ---- checkpoints ---------------------------------------------------------------------------- */

static bool has_checkpoints(const struct core *c) { return c->genesis.checkpoint_url.length > 0; }

void core_set_bf16(struct core *c, bool bf16) { c->checkpoint_bf16 = bf16; }

void core_checkpoint_after_commit(struct core *c, struct core_actions *out) {
    uint32_t every = c->outer->checkpoint_rounds;
    if (!has_checkpoints(c) || !every || c->commits % every) return;
    if (core_own(c))
        c->checkpoint_due = core_state_now(c)->index;
    else
        core_log(out, CORE_WARNING,
                 "the checkpoint of ledger %llu is skipped: the coordinator's own node is not "
                 "connected",
                 (unsigned long long)core_state_now(c)->index);
}

static int checkpoint_url(const struct core *c, uint64_t index, char out[PROTO_URL_BYTES_MAX + 1],
                          struct err *err) {
    char store[PROTO_URL_BYTES_MAX + 1];
    proto_str_copy(c->genesis.checkpoint_url, store, sizeof store);
    return ckpt_url(store, index, out, err);
}

/* Ask for the checkpoint that is due, when the own node stands exactly at the newest commit: the
 * counters that go with it are of that moment. */
static void try_checkpoint(struct core *c, struct core_actions *out) {
    const struct state *s = core_state_now(c);
    const struct member *own = core_own(c);
    if (!c->checkpoint_due || s->index < c->checkpoint_due || c->checkpoint_writing) return;
    if (!own || !own->has_root || own->root_index != s->index ||
        c->tick_ms < c->checkpoint_retry_ms)
        return;
    struct err err;
    char url[PROTO_URL_BYTES_MAX + 1];
    if (c->spent.count > PROTO_CHUNKS_MAX || checkpoint_url(c, s->index, url, &err)) {
        core_log(out, CORE_ERROR, "no checkpoint of ledger %llu: %s", (unsigned long long)s->index,
                 c->spent.count > PROTO_CHUNKS_MAX ? "its list of spent samples has too many gaps"
                                                   : err.msg);
        c->checkpoint_due = 0;
        return;
    }
    struct msg_checkpoint_write msg = {.index = s->index,
                                       .root = s->root,
                                       .url = proto_str(url),
                                       .round = c->commits,
                                       .tokens_committed = s->tokens_committed,
                                       .spent = c->spent.list,
                                       .spent_count = c->spent.count,
                                       .bf16 = c->checkpoint_bf16,
                                       .shared = core_share_begin(c, s, out)};
    core_log(out, CORE_INFO, "checkpoint of ledger %llu begins", (unsigned long long)s->index);
    core_send(out, own, MSG_CHECKPOINT_WRITE, 0, &msg);
    c->checkpoint_writing = s->index;
    c->checkpoint_due = 0;
}

/* The state a checkpoint message of the own node is about; NULL if it is nobody's business. */
static const struct state *state_of_checkpoint(struct core *c, struct member *m, uint64_t index,
                                               const char *what, struct core_actions *out) {
    if (!core_is_own(c, m)) {
        core_close(c, out, m->conn, ERR_PROTOCOL, false,
                   "%s from a member that was not asked to write one", what);
        return NULL;
    }
    const struct state *s = index ? core_find_state(c, index) : NULL;
    if (s && s->root_known && !s->undone) return s;
    core_complain(c, out, CORE_WARNING, "%s for ledger %llu, which is no commit; ignored", what,
                  (unsigned long long)index);
    return NULL;
}

void core_on_checkpoint_sign(struct core *c, struct member *m,
                             const struct msg_checkpoint_sign *msg, struct core_actions *out) {
    if (!state_of_checkpoint(c, m, msg->index, "CHECKPOINT_SIGN", out)) return;
    if (msg->index == c->share.index && !core_share_is_checked(c)) {
        core_close(c, out, m->conn, ERR_PROTOCOL, false,
                   "CHECKPOINT_SIGN while parts that members sent have not "
                   "been looked at");
        return;
    }
    core_emit_sign(out, m, msg);
}

#define NEWER_ENTRIES "members may still show newer entries than this store has"
#define WHY_SHOWN 150 /* of a reason that is longer, the end: it has the cause, the rest is a path */

/* Of the run's last state it is tried again, some times; one that was begun before and failed says nothing of it. */
static void checkpoint_failed(struct core *c, const struct msg_checkpoint_done *msg,
                              uint64_t now_ms, struct core_actions *out) {
    char why[PROTO_TEXT_BYTES_MAX + 1];
    bool last = c->complete && msg->index == core_state_now(c)->index;
    bool again = last && ++c->checkpoint_tries < CORE_CHECKPOINT_TRIES_MAX;
    proto_str_copy(msg->written ? proto_str(NEWER_ENTRIES) : msg->text, why, sizeof why);
    size_t length = strlen(why), cut = length > WHY_SHOWN ? length - WHY_SHOWN : 0;
    core_log(out, CORE_ERROR, "checkpoint of ledger %llu failed: %s%s; %s",
             (unsigned long long)msg->index, cut ? "..." : "", why + cut,
             again ? "tried again soon" : last ? "given up" : "the next one is written as planned");
    if (last) c->checkpoint_due = again ? core_state_now(c)->index : 0;
    c->checkpoint_retry_ms = now_ms + c->outer->silence_ms_max;
}

void core_on_checkpoint_done(struct core *c, struct member *m,
                             const struct msg_checkpoint_done *msg, uint64_t now_ms,
                             struct core_actions *out) {
    const struct state *s = state_of_checkpoint(c, m, msg->index, "CHECKPOINT_DONE", out);
    char url[PROTO_URL_BYTES_MAX + 1];
    if (!s) return;
    if (c->checkpoint_writing == msg->index) c->checkpoint_writing = 0;
    if (c->share.index == msg->index) core_share_end(c, out);
    if (!msg->written || core_is_behind(c)) {
        checkpoint_failed(c, msg, now_ms, out);
        return;
    }
    if (msg->index <= c->checkpoint_last || checkpoint_url(c, msg->index, url, NULL))
        return; /* said twice */
    struct msg_checkpoint body = {.at_index = s->index,
                                  .state_root = s->root,
                                  .url = proto_str(url),
                                  .manifest = msg->manifest,
                                  .tokens_committed = s->tokens_committed};
    struct batch b = {0};
    uint64_t index;
    int failed = core_append(c, &b, LEDGER_CHECKPOINT, RECORD_checkpoint, &body, &index, NULL);
    assert(!failed);
    c->checkpoint_last = msg->index;
    core_emit_persist(out, &b);
    core_log(out, CORE_INFO, "checkpoint of ledger %llu is published: %.160s",
             (unsigned long long)s->index, url);
    core_send_ledger_to_all(c, index, out);
}

/* ---- the end -------------------------------------------------------------------------------- */

static void complete(struct core *c, uint64_t now_ms, struct core_actions *out) {
    const struct state *s = core_state_now(c);
    c->complete = true;
    c->complete_ms = now_ms;
    bool wanted = has_checkpoints(c) && s->index && c->checkpoint_last != s->index;
    c->checkpoint_due = wanted && c->checkpoint_writing != s->index ? s->index : 0;
    for (uint32_t f = 0; f < c->fragments; f++)
        for (uint32_t i = 0; i < c->member_count; i++)
            core_forget_ready(core_part(&c->rounds[f], &c->members[i]));
    core_log(out, CORE_INFO, "the run is complete: %llu rounds, %llu tokens, %llu of %llu samples",
             (unsigned long long)c->commits, (unsigned long long)s->tokens_committed,
             (unsigned long long)c->spent.total, (unsigned long long)c->samples_total);
}

/* Members are let go when the last checkpoint is published, or when our own node, which writes it,
 * has been away for long; it still writes it when it comes back. */
static void finish_last_checkpoint(struct core *c, uint64_t now_ms, struct core_actions *out) {
    try_checkpoint(c, out);
    bool open = c->checkpoint_due || c->checkpoint_writing;
    bool away = open && !core_own(c) && now_ms - c->complete_ms >= c->outer->silence_ms_max;
    if (away && !c->finished)
        core_log(out, CORE_WARNING,
                 "the last checkpoint waits: the coordinator's own node is not connected");
    if (!open || away) c->finished = true;
}

/* Nothing more to do for the run: it has the last state, or nobody is left who could give it. Our
 * own node stays, for those who come late. */
static bool may_leave(struct core *c, struct member *m) {
    struct msg_address donors[CORE_DONORS_MAX];
    if (!m->conn || core_is_own(c, m)) return false;
    if (m->has_root && m->root_index == core_state_now(c)->index) return true;
    return m->catching_up && core_pick_donors(c, m, donors) == 0;
}

/* The samples or tokens are used up. Every other fragment takes what is ready once more: its work is
 * on samples that count already, and would have no effect there otherwise. */
static bool last_rounds_are_over(struct core *c, struct core_actions *out) {
    if (!c->closing) {
        c->closing = true;
        if (c->fragments > 1)
            core_log(out, CORE_INFO, "nothing is left to commit; the last rounds take what is ready");
        for (uint32_t f = 0; f < c->fragments; f++)
            c->rounds[f].last_done = c->rounds[f].base_index == core_state_now(c)->index;
    }
    for (uint32_t f = 0; f < c->fragments; f++) {
        const struct round *r = &c->rounds[f];
        if (r->phase != ROUND_COLLECT) return false;
        if (!r->last_done && core_count_heads(c, r).ready) return false;
    }
    return true;
}

void core_check_complete(struct core *c, uint64_t now_ms, struct core_actions *out) {
    if (!c->started) return;
    if (!c->complete && (core_tokens_reached(c) || core_data_exhausted(c)) &&
        last_rounds_are_over(c, out))
        complete(c, now_ms, out);
    if (!c->complete) {
        try_checkpoint(c, out);
        return;
    }
    finish_last_checkpoint(c, now_ms, out);
    for (uint32_t i = 0; i < c->member_count && c->finished; i++) {
        struct member *m = &c->members[i];
        if (!may_leave(c, m)) continue;
        m->here = false;
        bool current = m->has_root && m->root_index == core_state_now(c)->index;
        core_close(c, out, m->conn, ERR_NONE, true,
                   current ? "run complete"
                           : "run complete; its last state is in the newest checkpoint");
    }
}
