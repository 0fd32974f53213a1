/* sync_audit.c - single chunks summed once more: as auditor this member sums one from the contributors'
 * own bytes and tells the coordinator its leaf, or whose bytes cannot be summed; as contributor it shows
 * its leaves and that chunk to the auditor, as it would to an aggregator. The summing itself is in
 * sync_reduce.c, under a work item of one chunk. */
#include <stdio.h>
#include <string.h>

#include "node/sync_internal.h"

/* ---- the auditor ------------------------------------------------------------------------ */

static void report(struct sync *s, uint64_t plan, const struct msg_audit_report *msg) {
    sync_send(s, MSG_AUDIT_REPORT, plan, msg);
}

static struct msg_audit_report report_on(const struct plan *p, const struct shard_work *w) {
    return (struct msg_audit_report){
        .fragment = p->fragment, .round = p->msg.round, .chunk = w->first};
}

void audit_finish(struct sync *s, const struct plan *p, struct shard_work *w, uint32_t culprit) {
    struct msg_audit_report msg = report_on(p, w);
    msg.complete = 1;
    msg.culprit = culprit;
    if (!culprit) msg.leaf = w->leaves[0].digest;
    w->done = true;
    report(s, p->number, &msg);
}

void audit_judge(struct sync *s) {
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        struct plan *p = &s->plan[f];
        for (uint32_t i = 0; p->active && i < p->work_count; i++) {
            struct shard_work *w = &p->work[i];
            if (w->role != SHARD_AUDIT || w->done ||
                s->now - w->begun_ms <= s->outer->silence_ms_max)
                continue;
            struct msg_audit_report msg = report_on(p, w);
            w->done = true;
            report(s, p->number, &msg);
        }
    }
}

/* Room in the list of work: after all shards, or where an audit of the same chunk or a finished one was. */
static struct shard_work *take_work(struct plan *p, uint32_t chunk) {
    struct shard_work *old = NULL;
    for (uint32_t i = 0; i < p->work_count; i++) {
        struct shard_work *w = &p->work[i];
        if (w->role != SHARD_AUDIT) continue;
        if (w->first == chunk && !w->done) old = w;
        if (w->done && !old) old = w;
    }
    if (old) {
        plan_work_release(old);
        return old;
    }
    return p->work_count < p->msg.shards_count + PROTO_AUDITS_MAX ? &p->work[p->work_count++] : NULL;
}

static int begin(struct sync *s, struct plan *p, const struct msg_audit *msg) {
    struct shard_work *w = take_work(p, msg->chunk);
    if (!w) return 0; /* more at once than there may be: the coordinator hears nothing of this one */
    if (plan_work_begin(s, p, w, msg->chunk, 1, SHARD_AUDIT)) return -1;
    if (!(w->forced = sync_alloc(s, 1, p->set_bytes))) return -1;
    memcpy(w->forced, msg->set.data, p->set_bytes);
    /* Whoever can only be dialled by us, since nobody was told where we are. */
    for (uint32_t i = 0; i < p->msg.contributors_count; i++)
        if (proto_set_has(w->forced, i) && (int)i != p->own)
            peer_link(s, p->msg.contributors[i].member);
    plan_invite_early(s, p);
    return 0;
}

/* ---- the contributor -------------------------------------------------------------------- */

/* It is shown our leaves at once, also if it saw them as aggregator. */
static void serve(struct sync *s, struct plan *p, const struct msg_audit *msg) {
    struct peer *auditor = peer_get(s, msg->auditor);
    if (!auditor) return;
    p->audits[p->audit_next++ % PROTO_AUDITS_MAX] = (struct audit){msg->auditor, msg->chunk};
    auditor->talk[p->fragment].leaves_sent = false;
}

bool audit_is_of(const struct plan *p, uint32_t member, uint32_t chunk) {
    for (uint32_t i = 0; i < PROTO_AUDITS_MAX; i++)
        if (p->audits[i].auditor == member && p->audits[i].chunk == chunk) return true;
    return false;
}

bool audit_is_by(const struct plan *p, uint32_t member) {
    for (uint32_t i = 0; i < PROTO_AUDITS_MAX; i++)
        if (p->audits[i].auditor && p->audits[i].auditor == member) return true;
    return false;
}

/* ---- messages --------------------------------------------------------------------------- */

int audit_on_audit(struct sync *s, const struct frame *f, const struct msg_audit *msg) {
    struct plan *p = msg->fragment < s->fragment_count ? &s->plan[msg->fragment] : NULL;
    if (!p || msg->chunk >= s->fragment[msg->fragment].count || msg->auditor == 0) return 0;
    bool ours = msg->auditor == s->config.member;
    if (!plan_is_current(s, msg->fragment, f) || msg->round != p->msg.round ||
        msg->set.length != p->set_bytes) {
        struct msg_audit_report none = {
            .fragment = msg->fragment, .round = msg->round, .chunk = msg->chunk};
        if (ours) report(s, f->plan, &none);
        return 0;
    }
    peer_set_addresses(s, msg->address, msg->address_count);
    if (ours) return begin(s, p, msg);
    if (p->own >= 0 && proto_set_has(msg->set.data, (uint32_t)p->own)) serve(s, p, msg);
    return 0;
}

/* Once a plan and contributor: it is left out of all that follows anyway. */
void audit_accuse(struct sync *s, struct plan *p, uint32_t contributor, uint32_t chunk,
                  const char *reason) {
    struct inbound *in = &p->inbound[contributor];
    if (in->accused || p->msg.resum) return;
    char text[PROTO_TEXT_BYTES_MAX + 1];
    snprintf(text, sizeof text, "%s", reason);
    struct msg_accuse msg = {.fragment = p->fragment,
                             .round = p->msg.round,
                             .chunk = chunk,
                             .member = p->msg.contributors[contributor].member,
                             .reason = proto_str(text)};
    in->accused = true;
    sync_send(s, MSG_ACCUSE, p->number, &msg);
}
