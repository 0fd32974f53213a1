/* core.c - the state machine itself: one switch over events, one over messages. What each of them
 * means is told in the other files; core_internal.h lists them. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"
#include "proto/model.h"

/* ---- life ----------------------------------------------------------------------------------- */

static int check_genesis(const struct msg_genesis *g, struct err *err) {
    if (g->model_count != 1 || g->inner_count != 1 || g->outer_count != 1 || g->corpus_count != 1)
        return err_set(err, ERR_CONFIG,
                       "genesis: model, inner, outer and corpus must each stand there once");
    const struct msg_outer *o = g->outer;
    uint64_t elements = proto_model_elements(g->model);
    if (!elements || !o->chunk_elements || (elements - 1) / o->chunk_elements >= PROTO_CHUNKS_MAX)
        return err_set(err, ERR_CONFIG,
                       "genesis: %llu parameters in chunks of %u make no 1 to %u chunks",
                       (unsigned long long)elements, o->chunk_elements, PROTO_CHUNKS_MAX);
    if (!g->corpus->samples || !g->model->sequence || !o->lease_samples)
        return err_set(err, ERR_CONFIG,
                       "genesis: corpus.samples, model.sequence and outer.lease_samples must be "
                       "over 0");
    if (!o->silence_ms_max || !o->heartbeat_ms)
        return err_set(err, ERR_CONFIG,
                       "genesis: outer.silence_ms_max and outer.heartbeat_ms must be over 0");
    if (o->fragments > 1)
        return err_set(err, ERR_UNSUPPORTED,
                       "genesis: outer.fragments is %u, this build has 1 fragment", o->fragments);
    return 0;
}

struct core *core_create(const struct msg_genesis *genesis, const struct digest *run,
                         const struct proto_key *own_key, struct err *err) {
    if (check_genesis(genesis, err)) return NULL;
    struct core *c = calloc(1, sizeof *c);
    assert(c);
    int failed = proto_copy(RECORD_genesis, genesis, &c->genesis, NULL);
    c->members = calloc(PROTO_MEMBERS_MAX, sizeof *c->members);
    c->contributors = calloc(PROTO_MEMBERS_MAX, sizeof *c->contributors);
    assert(!failed && c->members && c->contributors);
    c->outer = c->genesis.outer;
    c->run = *run;
    c->own_key = *own_key;
    c->elements = proto_model_elements(genesis->model);
    c->chunks = (uint32_t)((c->elements - 1) / c->outer->chunk_elements + 1);
    c->sequence = genesis->model->sequence;
    c->samples_total = genesis->corpus->samples;
    c->tokens_total = genesis->inner->total_tokens;
    c->next_lease = 1;
    c->states = core_grow32(c->states, 0, &c->state_capacity, sizeof *c->states);
    c->states[c->state_count++] = (struct state){0};
    return c;
}

void core_destroy(struct core *c) {
    if (!c) return;
    core_forget_reports(c);
    for (uint32_t i = 0; i < c->member_count; i++) core_forget_ready(&c->members[i]);
    proto_copy_release(RECORD_genesis, &c->genesis);
    interval_release(&c->spent);
    interval_release(&c->leased_at_load);
    free(c->entries);
    free(c->members);
    free(c->contributors);
    free(c->conns);
    free(c->leases);
    free(c->states);
    free(c);
}

/* ---- events --------------------------------------------------------------------------------- */

/* Members that hold leases count as live until silence_ms_max has judged them: what they train on
 * must not be given away because we died, and a round waits for them as it did before. */
static void on_start(struct core *c, const struct core_event *ev, uint64_t now_ms,
                     struct core_actions *out) {
    uint64_t end = 0;
    assert(!c->started && ev->term >= c->entry_term);
    interval_release(&c->leased_at_load);
    c->started = true;
    c->term = ev->term;
    c->tick_ms = now_ms;
    for (uint32_t i = 0; i < c->member_count; i++) {
        struct member *m = &c->members[i];
        m->here = m->trains = m->lease_count > 0;
        m->heard_ms = m->progress_ms = now_ms;
    }
    for (uint32_t i = 0; i < c->lease_count; i++) {
        const struct lease *l = &c->leases[i];
        if (l->start + l->count > end) end = l->start + l->count;
        if (l->id >= c->next_lease) c->next_lease = l->id + 1;
    }
    if (c->spent.count) {
        const struct msg_range *last = &c->spent.list[c->spent.count - 1];
        if (last->start + last->count > end) end = last->start + last->count;
    }
    if (end > c->next_sample) {
        core_log(
            out, CORE_ERROR,
            "store: sample %llu was to be leased next, but those up to %llu have been; gone on "
            "from there",
            (unsigned long long)c->next_sample, (unsigned long long)end);
        c->next_sample = end;
    }
    core_log(out, CORE_INFO,
             "term %llu: %llu ledger entries, %u members, round %llu, %llu of %llu samples spent%s",
             (unsigned long long)c->term, (unsigned long long)c->entry_count, c->member_count,
             (unsigned long long)core_round(c), (unsigned long long)c->spent.total,
             (unsigned long long)c->samples_total, c->paused ? ", paused" : "");
}

/* After a sleep of our own, what came meanwhile may still lie unread: nobody is judged by it. */
static void on_tick(struct core *c, uint64_t now_ms, struct core_actions *out) {
    uint64_t gap = now_ms - c->tick_ms;
    bool stopped = gap > c->outer->silence_ms_max / 2;
    if (stopped) {
        core_log(out, CORE_WARNING,
                 "the coordinator itself stood still for %llu ms: nobody is judged by that time",
                 (unsigned long long)gap);
        c->deadline_ms += gap;
        c->quorum_ms += c->quorum_reached ? gap : 0;
    }
    if (c->complaints > CORE_COMPLAINTS_PER_TICK_MAX)
        core_log(out, CORE_WARNING, "%u more such lines were left out",
                 c->complaints - CORE_COMPLAINTS_PER_TICK_MAX);
    c->complaints = 0;
    c->tick_ms = now_ms;
    core_judge(c, stopped, now_ms, out);
    core_renew_donors(c, out);
}

static void on_pause(struct core *c, bool paused, struct core_actions *out) {
    if (c->paused == paused) return;
    struct batch b = {0};
    c->paused = paused;
    batch_put_meta(&b, CORE_META_PAUSED, paused);
    core_emit_persist(out, &b);
    core_log(out, CORE_INFO, paused ? "paused: no leases, no new plans" : "resumed");
}

static void on_stop(struct core *c, struct core_actions *out) {
    while (c->conn_count)
        core_close(c, out, c->conns[0].id, ERR_NONE, false, "the coordinator stops");
}

/* ---- messages ------------------------------------------------------------------------------- */

static void refuse_message(struct core *c, struct conn *k, uint8_t type, const char *why,
                           struct core_actions *out) {
    core_close(c, out, k->id, ERR_PROTOCOL, false, "%s %s", proto_type_name(type), why);
}

/* A frame of another term or session was meant for a coordinator or connection that is gone. */
static bool is_stale(struct core *c, const struct member *m, const struct frame *f,
                     struct core_actions *out) {
    if (f->term == c->term && f->session == m->session) return false;
    core_complain(c, out, CORE_WARNING,
                  "%s of " WHO " is of term %llu, session %llu, not of %llu, %llu; dropped",
                  proto_type_name(f->type), WHO_OF(m), (unsigned long long)f->term,
                  (unsigned long long)f->session, (unsigned long long)c->term,
                  (unsigned long long)m->session);
    return true;
}

static void on_leave(struct core *c, struct member *m, const struct msg_leave *msg,
                     struct core_actions *out) {
    char why[PROTO_TEXT_BYTES_MAX + 1];
    proto_str_copy(msg->reason, why, sizeof why);
    core_log(out, CORE_INFO, WHO " leaves: %s", WHO_OF(m), why[0] ? why : "no reason given");
    core_lose(c, m, ERR_NONE, "it left", out);
}

/* Its connection ends; the member itself is judged by its silence. */
static void on_bye(struct core *c, struct member *m, const struct msg_bye *msg,
                   struct core_actions *out) {
    char why[PROTO_TEXT_BYTES_MAX + 1];
    proto_str_copy(msg->reason, why, sizeof why);
    core_complain(c, out, CORE_INFO, WHO " ends its connection: %s", WHO_OF(m), why);
    core_close(c, out, m->conn, ERR_NONE, false, "good-bye");
}

static void on_member_message(struct core *c, struct conn *k, const struct core_event *ev,
                              uint64_t now_ms, struct core_actions *out) {
    struct member *m = k->member;
    switch (ev->frame.type) {
    case MSG_HEARTBEAT: core_on_heartbeat(c, m, ev->msg, now_ms, out); break;
    case MSG_LEASE_ASK:
        core_on_lease_ask(c, m, ((const struct msg_lease_ask *)ev->msg)->samples, out);
        break;
    case MSG_READY: core_on_ready(c, m, ev->msg, out); break;
    case MSG_SHARD_REPORT: core_on_shard_report(c, m, &ev->frame, ev->msg, now_ms, out); break;
    case MSG_ROOT: core_on_root(c, m, ev->msg, out); break;
    case MSG_CHECKPOINT_SIGN: core_on_checkpoint_sign(c, m, ev->msg, out); break;
    case MSG_CHECKPOINT_DONE: core_on_checkpoint_done(c, m, ev->msg, now_ms, out); break;
    case MSG_LEAVE: on_leave(c, m, ev->msg, out); break;
    case MSG_BYE: on_bye(c, m, ev->msg, out); break;
    default: refuse_message(c, k, ev->frame.type, "is no message to a coordinator", out);
    }
}

static void on_message(struct core *c, const struct core_event *ev, uint64_t now_ms,
                       struct core_actions *out) {
    struct conn *k = core_conn(c, ev->conn);
    if (!k) return; /* closed a moment ago */
    uint8_t type = ev->frame.type;
    if (type == MSG_ENROL || type == MSG_HELLO) {
        if (k->hello)
            refuse_message(c, k, type, "after HELLO", out);
        else if (type == MSG_ENROL)
            core_on_enrol(c, k, ev->msg, ev->invite, out);
        else
            core_on_hello(c, k, ev->msg, now_ms, out);
    } else if (!k->hello) {
        refuse_message(c, k, type, "before HELLO", out);
    } else if (!is_stale(c, k->member, &ev->frame, out)) {
        on_member_message(c, k, ev, now_ms, out);
    }
}

void core_step(struct core *c, const struct core_event *ev, uint64_t now_ms,
               struct core_actions *out) {
    assert(c->started || ev->type == CORE_EV_START);
    switch (ev->type) {
    case CORE_EV_START: on_start(c, ev, now_ms, out); break;
    case CORE_EV_OPENED: core_on_opened(c, ev, out); break;
    case CORE_EV_MESSAGE: on_message(c, ev, now_ms, out); break;
    case CORE_EV_CLOSED: core_on_closed(c, ev->conn); break;
    case CORE_EV_TICK: on_tick(c, now_ms, out); break;
    case CORE_EV_PAUSE: on_pause(c, true, out); break;
    case CORE_EV_RESUME: on_pause(c, false, out); break;
    case CORE_EV_REVOKE:
    case CORE_EV_RELEASE: break;
    case CORE_EV_STOP: on_stop(c, out); return;
    }
    core_check_round(c, now_ms, out);
    core_try_plan(c, now_ms, out);
    core_check_complete(c, now_ms, out);
}

/* ---- looking in ----------------------------------------------------------------------------- */

static const char *phase_name(const struct core *c) {
    if (c->phase == CORE_COMPLETE) return "complete";
    if (c->paused) return "paused";
    return c->phase == CORE_REDUCE ? "reduce" : "train";
}

void core_look(const struct core *c, uint64_t now_ms, struct core_view *out) {
    const struct state *s = core_state_now(c);
    (void)now_ms;
    *out = (struct core_view){.term = c->term,
                              .settled_index = c->settled_index,
                              .round = core_round(c),
                              .tokens_committed = s->tokens_committed,
                              .tokens_total = c->tokens_total,
                              .samples_free = core_samples_free(c),
                              .samples_spent = c->spent.total,
                              .plan = c->plan,
                              .phase = phase_name(c),
                              .members_live = core_live_count(c),
                              .root_mismatches = c->root_mismatches,
                              .plans_made = c->plans_made,
                              .handovers = c->handovers,
                              .commits = c->commits};
    if (c->entry_count) {
        out->head_index = c->entry_count - 1;
        out->head_digest = c->entries[c->entry_count - 1];
    }
    for (uint32_t i = c->state_count; i-- > 0;) {
        if (!c->states[i].root_known) continue;
        out->state_root = c->states[i].root;
        out->state_root_index = c->states[i].index;
        break;
    }
}

uint32_t core_member_count(const struct core *c) { return c->member_count; }

void core_member_look(const struct core *c, uint32_t i, uint64_t now_ms,
                      struct core_member_view *out) {
    assert(i < c->member_count);
    const struct member *m = &c->members[i];
    *out = (struct core_member_view){
        .member = m->id,
        .name = m->name,
        .key = m->key,
        .aggregate_only = m->aggregate_only,
        .revoked = m->revoked,
        .live = m->here,
        .ready = m->ready.present,
        .trains = m->trains,
        .session = m->session,
        .tokens_committed = m->tokens_committed,
        .state_index = m->state_index,
        .step = m->beat.step,
        .loss = m->beat.loss,
        .tokens_per_s = m->beat.tokens_per_s,
        .phase = m->beat.phase,
        .trainer_restarts = m->beat.trainer_restarts,
        .silent_ms = m->here && now_ms > m->heard_ms ? now_ms - m->heard_ms : 0};
}
