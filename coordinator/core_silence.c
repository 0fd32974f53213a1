/* core_silence.c - heartbeats: who is alive and moves, how fast members send as their receivers see
 * it, and who is lost. Time is our own clock's; what lay unread while we stood still is no silence. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "coordinator/core_internal.h"

#define LLU(x) ((unsigned long long)(x))
#define RATE_MAX    1e12 /* bytes a second that one receiver may claim to have had */

static uint64_t since(uint64_t then, uint64_t now) { return now > then ? now - then : 0; }

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, uint32_t n) {
    if (!n) return 0;
    qsort(values, n, sizeof *values, by_value);
    return (values[(n - 1) / 2] + values[n / 2]) / 2;
}

/* ---- uplinks -------------------------------------------------------------------------------- */

/* The place of this receiver's measurement of m: its own, a new one, or the oldest. */
static struct rate *rate_place(struct member *m, uint32_t receiver) {
    struct rate *oldest = &m->rates[0];
    for (uint32_t i = 0; i < m->rate_count; i++) {
        if (m->rates[i].receiver == receiver) return &m->rates[i];
        if (m->rates[i].at_ms < oldest->at_ms) oldest = &m->rates[i];
    }
    return m->rate_count < PROTO_RATES_MAX ? &m->rates[m->rate_count++] : oldest;
}

/* What all receivers of the last while had together, if each had what the middle one had: one that
 * lies moves nothing. */
static void take_rate(struct core *c, const struct member *receiver, const struct msg_rate *said,
                      uint64_t now_ms) {
    struct member *m = core_member(c, said->member);
    double values[PROTO_RATES_MAX];
    uint32_t n = 0;
    if (!m || m == receiver || !said->bytes || !said->busy_ms) return;
    double rate = 1000.0 * (double)said->bytes / said->busy_ms;
    *rate_place(m, receiver->id) =
        (struct rate){receiver->id, rate < RATE_MAX ? rate : RATE_MAX, now_ms};
    for (uint32_t i = 0; i < m->rate_count; i++)
        if (since(m->rates[i].at_ms, now_ms) < c->outer->silence_ms_max)
            values[n++] = m->rates[i].bytes_per_s;
    double now = median(values, n) * n;
    /* Between the old one and the new one by their ratio: a neighbour on the same machine, heard first, has
     * had a thousand times what others will, and must not make it the fastest for long. */
    m->uplink = m->uplink > 0 ? sqrt(m->uplink * now) : now;
}

double core_middle_uplink(const struct core *c) {
    double values[PROTO_MEMBERS_MAX];
    uint32_t n = 0;
    for (uint32_t i = 0; i < c->member_count; i++)
        if (core_serves(&c->members[i]) && c->members[i].uplink > 0)
            values[n++] = c->members[i].uplink;
    return n ? median(values, n) : 1;
}

double core_uplink(const struct member *m, double middle) {
    double uplink = m->uplink > 0 ? m->uplink : middle;
    return uplink < CORE_UPLINK_CAP * middle ? uplink : CORE_UPLINK_CAP * middle;
}

double core_step_ms(const struct core *c) {
    double values[PROTO_MEMBERS_MAX];
    uint32_t n = 0;
    double tokens = (double)c->genesis.inner->batch * c->sequence;
    for (uint32_t i = 0; i < c->member_count; i++) {
        const struct member *m = &c->members[i];
        if (m->here && m->trains && m->beat.tokens_per_s > 0)
            values[n++] = 1000 * tokens / m->beat.tokens_per_s;
    }
    return median(values, n);
}

/* ---- heartbeats ----------------------------------------------------------------------------- */

static bool is_working(uint8_t phase) { return phase == PHASE_TRAINING || phase == PHASE_APPLYING; }

void core_on_heartbeat(struct core *c, struct member *m, const struct msg_heartbeat *msg,
                       uint64_t now_ms, struct core_actions *out) {
    if (msg->phase > PHASE_APPLYING) {
        core_close(c, out, m->conn, ERR_PROTOCOL, false, "HEARTBEAT: there is no phase %u",
                   msg->phase);
        return;
    }
    m->heard_ms = now_ms;
    if (msg->progress != m->beat.progress || !is_working(msg->phase)) m->progress_ms = now_ms;
    m->beat = *msg;
    m->beat.rates = NULL; /* of the frame */
    m->beat.rates_count = 0;
    for (uint32_t i = 0; i < msg->rates_count && core_in_good_standing(m); i++)
        take_rate(c, m, &msg->rates[i], now_ms);
    m->state_index = msg->state_index;
    m->catching_up = msg->phase == PHASE_CATCHING_UP;
    if (!m->catching_up) m->donor_count = 0;
    struct msg_heartbeat_ack ack = {c->settled_index, core_state_now(c)->tokens_committed,
                                    core_live_count(c)};
    core_send(out, m, MSG_HEARTBEAT_ACK, 0, &ack);
}

/* ---- losses --------------------------------------------------------------------------------- */

/* An experiment whose members must stay the same ends loudly when one goes. */
static void fail_run(struct core *c, const struct member *m, const char *why,
                     struct core_actions *out) {
    struct batch b = {0};
    c->paused = true;
    batch_put_meta(&b, CORE_META_PAUSED, 1);
    core_emit_persist(out, &b);
    core_log(out, CORE_ERROR,
             "this run has a fixed membership and " WHO " is lost: %s; it is paused, and ends here",
             WHO_OF(m), why);
    while (c->conn_count)
        core_close(c, out, c->conns[0].id, ERR_STALE, true,
                   "the run has a fixed membership, and member %u is lost", m->id);
    struct core_action *a = core_emit(out, CORE_ACT_FAIL);
    a->code = ERR_STALE;
    snprintf(a->text, sizeof a->text, "member %u of a run with fixed membership is lost", m->id);
    c->over = true;
}

void core_lose(struct core *c, struct member *m, enum err_code code, const char *why,
               struct core_actions *out) {
    bool leaves_unused = code == ERR_NONE && !m->rounds_summed;
    m->here = false;
    uint64_t samples = core_take_away(c, m, out);
    core_log(out, CORE_WARNING, WHO " lost: %s; %llu samples go back", WHO_OF(m), why,
             LLU(samples));
    if (m->conn) core_close(c, out, m->conn, code, false, "%s", why);
    m->session = 0;
    m->has_root = m->catching_up = false;
    m->donor_count = m->rate_count = 0;
    m->uplink = 0;
    core_settle(c);
    if (c->outer->fixed_membership && m->trains && !leaves_unused && !c->complete && !m->revoked)
        fail_run(c, m, why, out);
}

void core_judge(struct core *c, bool stopped, uint64_t now_ms, struct core_actions *out) {
    uint64_t limit = c->outer->silence_ms_max;
    for (uint32_t i = 0; i < c->member_count && !c->over; i++) {
        struct member *m = &c->members[i];
        m->asks = 0;
        if (!m->here) continue;
        if (stopped) {
            m->heard_ms = m->progress_ms = m->closed_ms = now_ms;
        } else if (since(m->heard_ms, now_ms) >= limit) {
            core_lose(c, m, ERR_TIMEOUT, "no heartbeat for silence_ms_max", out);
        } else if (is_working(m->beat.phase) && since(m->progress_ms, now_ms) >= limit) {
            core_lose(c, m, ERR_TIMEOUT, "alive, but no progress for silence_ms_max", out);
        }
    }
}
