/* core_share.c - members share the work of one checkpoint. Our own node writes it, has the key to the store,
 * and offers parts: to be sent, and, once they are there, to be looked at by somebody else than who sent
 * them. Here it is decided who does what; a part of somebody who fails, vanishes or takes too long goes to
 * another, and in the end back to the writer, who can do all of it alone. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "ckpt/ckpt.h"
#include "coordinator/core_internal.h"

#define LLU(x) ((unsigned long long)(x))
#define DEADLINE_SILENCES 4 /* of silence_ms_max, for one part */

/* ---- who helps ------------------------------------------------------------------------------ */

static bool may_help(const struct core *c, const struct member *m) {
    return m->conn && m->here && !m->revoked && !m->quarantined && !core_is_own(c, m);
}

/* Helper h keeps the chunks of its own share and of the one after it: the neighbour's, should that be
 * lost. */
static uint32_t share_chunks(const struct core *c) { return (c->chunks - 1) / c->share.helpers + 1; }

static struct msg_range share_of(const struct core *c, uint32_t h) {
    uint64_t each = share_chunks(c), first = h % c->share.helpers * each;
    uint64_t end = first + each < c->chunks ? first + each : c->chunks;
    return (struct msg_range){first, first < end ? end - first : 0};
}

static void send_keep(struct core *c, uint32_t h, const struct state *s, bool keep,
                      struct core_actions *out) {
    struct member *m = core_member(c, c->share.helper[h]);
    struct msg_range chunks[2];
    struct msg_checkpoint_keep msg = {.index = c->share.index, .bf16 = c->checkpoint_bf16, .chunks = chunks};
    if (s) msg.root = s->root;
    for (uint32_t k = 0; keep && k < 2 && k < c->share.helpers; k++) {
        chunks[msg.chunks_count] = share_of(c, h + k);
        if (chunks[msg.chunks_count].count) msg.chunks_count++;
    }
    if (m->conn) core_send(out, m, MSG_CHECKPOINT_KEEP, 0, &msg);
}

bool core_share_begin(struct core *c, const struct state *s, struct core_actions *out) {
    struct share *h = &c->share;
    char url[PROTO_URL_BYTES_MAX + 1];
    core_share_end(c, out);
    proto_str_copy(c->genesis.checkpoint_url, url, sizeof url);
    if (!ckpt_store_remote(url)) return false;
    for (uint32_t i = 0; i < c->member_count && h->helpers < CORE_HELPERS_MAX; i++) {
        const struct member *m = &c->members[i];
        if (may_help(c, m) && !m->catching_up) h->helper[h->helpers++] = m->id;
    }
    if (!h->helpers) return false;
    h->index = s->index;
    for (uint32_t i = 0; i < h->helpers; i++) send_keep(c, i, s, true, out);
    return true;
}

static void forget_job(struct share *h, uint32_t i) {
    proto_copy_release(RECORD_checkpoint_part, &h->jobs[i].msg);
    h->jobs[i] = h->jobs[--h->job_count];
}

void core_share_end(struct core *c, struct core_actions *out) {
    struct share *h = &c->share;
    uint32_t sent = 0;
    for (uint32_t i = 0; i < h->part_count; i++) sent += h->part[i].sent_by != 0;
    if (out && h->part_count)
        core_log(out, CORE_INFO, "checkpoint of ledger %llu: members sent %u of %u parts", LLU(h->index),
                 sent,
                 h->part_count);
    for (uint32_t i = 0; out && h->index && i < h->helpers; i++) send_keep(c, i, NULL, false, out);
    while (h->job_count) forget_job(h, 0);
    free(h->part);
    *h = (struct share){0};
}

/* ---- parts ---------------------------------------------------------------------------------- */

static struct share_part *part_at(struct share *h, uint32_t part) {
    while (h->part_count <= part) {
        h->part = core_grow32(h->part, h->part_count, &h->part_capacity, sizeof *h->part);
        h->part[h->part_count++] = (struct share_part){0};
    }
    return &h->part[part];
}

static void tell_writer(struct core *c, uint32_t part, bool check, bool done, struct core_actions *out) {
    struct msg_checkpoint_part_done msg = {.index = c->share.index, .part = part, .check = check,
                                           .done = done};
    struct member *own = core_own(c);
    if (own) core_send(out, own, MSG_CHECKPOINT_PART_DONE, 0, &msg);
}

static uint32_t jobs_of(const struct share *h, uint32_t member) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < h->job_count; i++) n += h->jobs[i].member == member;
    return n;
}

/* A part is sent by who keeps its share or keeps it beside the own one, and looked at by anybody but who
 * sent it. */
static bool may_do(struct core *c, const struct share_job *j, uint32_t i) {
    struct share *h = &c->share;
    uint32_t owner = j->msg.chunk / share_chunks(c);
    bool keeps = i == owner || (i + 1) % h->helpers == owner;
    bool sent = h->helper[i] == part_at(h, j->msg.part)->sent_by;
#ifdef SIM_FAULTS
    if (core_fault == CORE_FAULT_CHECKS_OWN_PARTS) sent = false;
#endif
    return !(j->tried >> i & 1) && (j->msg.check ? !sent : keeps) &&
        may_help(c, core_member(c, h->helper[i]));
}

/* The helper with the least to do, or -1: nobody may. */
static int pick_helper(struct core *c, const struct share_job *j) {
    struct share *h = &c->share;
    int best = -1;
    for (uint32_t i = 0; i < h->helpers; i++)
        if (may_do(c, j, i) &&
            (best < 0 || jobs_of(h, h->helper[i]) < jobs_of(h, h->helper[best])))
            best = (int)i;
    return best;
}

/* To the next who may. With nobody left the writer does it, and where all have enough to do it sends it,
 * too: so slow members do not hold it up. A look waits until one has room. True where the job is gone. */
static bool hand_on(struct core *c, uint32_t i, uint64_t now_ms, struct core_actions *out) {
    struct share *h = &c->share;
    struct share_job *j = &h->jobs[i];
    j->member = 0;
    int k = pick_helper(c, j);
    bool full = k >= 0 && jobs_of(h, h->helper[k]) == CORE_MEMBER_JOBS_MAX;
    if (k < 0 || (full && !j->msg.check)) {
        tell_writer(c, j->msg.part, j->msg.check, false, out);
        forget_job(h, i);
        return true;
    }
    if (full) return false;
    j->tried |= 1ull << k;
    j->member = h->helper[k];
    j->since_ms = now_ms;
    core_send(out, core_member(c, j->member), MSG_CHECKPOINT_PART, 0, &j->msg);
    return false;
}

/* What waits, the longest-waiting first as far as the list has kept its order. */
static void hand_out(struct core *c, uint64_t now_ms, struct core_actions *out) {
    for (uint32_t i = 0; i < c->share.job_count;)
        if (c->share.jobs[i].member || !hand_on(c, i, now_ms, out)) i++;
}

void core_on_checkpoint_part(struct core *c, struct member *m, const struct msg_checkpoint_part *msg,
                             uint64_t now_ms, struct core_actions *out) {
    struct share *h = &c->share;
    if (!core_is_own(c, m)) {
        core_close(c, out, m->conn, ERR_PROTOCOL, false,
                   "CHECKPOINT_PART from a member that writes no checkpoint");
        return;
    }
    if (!h->index || msg->index != h->index || h->job_count == CORE_SHARE_JOBS_MAX) {
        struct msg_checkpoint_part_done no = {.index = msg->index, .part = msg->part, .check = msg->check};
        core_send(out, m, MSG_CHECKPOINT_PART_DONE, 0, &no);
        return;
    }
    struct share_job *j = &h->jobs[h->job_count++];
    *j = (struct share_job){0};
    int failed = proto_copy(RECORD_checkpoint_part, msg, &j->msg, NULL);
    assert(!failed);
    part_at(h, msg->part);
    hand_on(c, h->job_count - 1, now_ms, out);
}

void core_on_checkpoint_part_done(struct core *c, struct member *m,
                                  const struct msg_checkpoint_part_done *msg,
                                  uint64_t now_ms, struct core_actions *out) {
    struct share *h = &c->share;
    char why[PROTO_TEXT_BYTES_MAX + 1];
    if (!h->index || msg->index != h->index) return; /* of a checkpoint that is over */
    if (core_is_own(c, m)) {
        if (msg->check && msg->done && msg->part < h->part_count) h->part[msg->part].checked = true;
        return;
    }
    for (uint32_t i = 0; i < h->job_count; i++) {
        struct share_job *j = &h->jobs[i];
        if (j->member != m->id || j->msg.part != msg->part || j->msg.check != msg->check) continue;
        proto_str_copy(msg->text, why, sizeof why);
        if (!msg->done) {
            core_log(out, CORE_INFO, "checkpoint of ledger %llu: " WHO " did not %s part %u: %.100s",
                     LLU(h->index),
                     WHO_OF(m), msg->check ? "find" : "send", msg->part, why);
            hand_on(c, i, now_ms, out);
            hand_out(c, now_ms, out);
            return;
        }
        struct share_part *p = part_at(h, msg->part);
        if (msg->check) p->checked = true;
        else p->sent_by = m->id;
        tell_writer(c, msg->part, msg->check, true, out);
        forget_job(h, i);
        hand_out(c, now_ms, out);
        return;
    }
    /* Somebody else has it by now. What it sent has the right bytes, or the store would not have taken it. */
}

void core_check_share(struct core *c, uint64_t now_ms, struct core_actions *out) {
    struct share *h = &c->share;
    uint64_t limit = (uint64_t)DEADLINE_SILENCES * c->outer->silence_ms_max;
    for (uint32_t i = 0; i < h->job_count;) {
        const struct share_job *j = &h->jobs[i];
        const struct member *m = core_member(c, j->member);
        if (!m || (may_help(c, m) && now_ms - j->since_ms < limit)) {
            i++;
            continue;
        }
        core_log(out, CORE_INFO, "checkpoint of ledger %llu: " WHO " is %s, its part %u goes on",
                 LLU(h->index),
                 WHO_OF(m), may_help(c, m) ? "late" : "gone", j->msg.part);
        if (!hand_on(c, i, now_ms, out)) i++;
    }
    hand_out(c, now_ms, out);
}

bool core_share_is_checked(const struct core *c) {
    for (uint32_t i = 0; i < c->share.part_count; i++)
        if (c->share.part[i].sent_by && !c->share.part[i].checked) return false;
    return true;
}
