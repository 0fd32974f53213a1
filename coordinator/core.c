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
    for (uint64_t i = 0, end = 0; i < g->init_spent_count; i++) {
        const struct msg_range *r = &g->init_spent[i];
        if (!r->count || (i && r->start <= end) || r->start >= g->corpus->samples ||
            r->count > g->corpus->samples - r->start)
            return err_set(err, ERR_CONFIG,
                           "genesis: samples %llu+%llu are to count as spent; ranges must ascend, not touch, "
                           "and lie inside the corpus' %llu", (unsigned long long)r->start,
                           (unsigned long long)r->count, (unsigned long long)g->corpus->samples);
        end = r->start + r->count;
    }
    if (o->fragments > PROTO_FRAGMENTS_MAX || o->alpha < 0 || o->alpha > 1)
        return err_set(err, ERR_CONFIG,
                       "genesis: outer.fragments is %u (at most %u), outer.alpha %g (0 to 1)",
                       o->fragments, PROTO_FRAGMENTS_MAX, (double)o->alpha);
    return 0;
}

/* How many chunks and elements each fragment has; -1 where one would be empty. */
static int create_rounds(struct core *c, struct err *err) {
    uint8_t *fragment_of = malloc(c->chunks);
    c->fragments = c->outer->fragments ? c->outer->fragments : 1;
    c->rounds = calloc(c->fragments, sizeof *c->rounds);
    assert(fragment_of && c->rounds);
    int result = proto_model_fragments(c->genesis.model, c->outer->chunk_elements, c->fragments,
                                       fragment_of, err);
    for (uint32_t i = 0; i < c->chunks && !result; i++) {
        struct round *r = &c->rounds[fragment_of[i]];
        uint64_t first = (uint64_t)i * c->outer->chunk_elements, left = c->elements - first;
        r->chunks++;
        r->elements += left < c->outer->chunk_elements ? left : c->outer->chunk_elements;
    }
    for (uint32_t f = 0; f < c->fragments; f++) {
        c->rounds[f].fragment = f;
        c->rounds[f].audits = calloc(PROTO_AUDITS_MAX, sizeof *c->rounds[f].audits);
        assert(c->rounds[f].audits);
    }
    free(fragment_of);
    return result;
}

/* The data goes on where the run stood that wrote the checkpoint. What it had handed out and not spent
 * lies in gaps, which are free once the core starts. */
static void take_init_spent(struct core *c) {
    for (uint32_t i = 0; i < c->genesis.init_spent_count; i++) {
        const struct msg_range *r = &c->genesis.init_spent[i];
        interval_add(&c->spent, r->start, r->count);
        c->next_sample = r->start + r->count;
    }
    c->states[0].tokens_committed = c->spent.total * c->sequence;
}

struct core *core_create(const struct msg_genesis *genesis, const struct digest *run,
                         const struct proto_key *own_key, struct err *err) {
    if (check_genesis(genesis, err)) return NULL;
    struct core *c = calloc(1, sizeof *c);
    assert(c);
    int failed = proto_copy(RECORD_genesis, genesis, &c->genesis, NULL);
    c->members = calloc(PROTO_MEMBERS_MAX, sizeof *c->members);
    assert(!failed && c->members);
    c->outer = c->genesis.outer;
    c->run = *run;
    c->own_key = *own_key;
    ledger_chain_init(&c->keys, run);
    c->keys.root_key = genesis->root_key;
    c->elements = proto_model_elements(genesis->model);
    c->chunks = (uint32_t)((c->elements - 1) / c->outer->chunk_elements + 1);
    c->sequence = genesis->model->sequence;
    c->samples_total = genesis->corpus->samples;
    c->tokens_total = genesis->inner->total_tokens;
    c->next_lease = 1;
    c->states = core_grow32(c->states, 0, &c->state_capacity, sizeof *c->states);
    c->states[c->state_count++] = (struct state){0};
    take_init_spent(c);
    if (create_rounds(c, err)) {
        core_destroy(c);
        return NULL;
    }
    return c;
}

void core_destroy(struct core *c) {
    if (!c) return;
    for (uint32_t i = 0; i < c->member_count; i++) {
        for (uint32_t f = 0; f < c->fragments; f++) core_forget_ready(&c->members[i].parts[f]);
        free(c->members[i].parts);
        free(c->members[i].recent);
    }
    for (uint32_t f = 0; f < c->fragments; f++) {
        core_forget_plan(&c->rounds[f].plan);
        free(c->rounds[f].audits);
    }
    for (uint32_t i = 0; i < c->state_count; i++) core_release_state(&c->states[i]);
    core_forget_plan(&c->resum.plan);
    core_forget_inquiries(c);
    core_forget_takeover(c, 0);
    core_share_end(c, NULL);
    proto_copy_release(RECORD_genesis, &c->genesis);
    interval_release(&c->spent);
    interval_release(&c->leased_at_load);
    free(c->stale);
    free(c->regrants);
    free(c->rounds);
    free(c->entries);
    free(c->members);
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
    assert(!c->started && ev->term >= c->entry_term);
    c->started = true;
    c->term = ev->term;
    c->seed = ev->seed;
    c->tick_ms = c->start_ms = now_ms;
    c->hold_until_ms = now_ms + ev->hold_ms;
    for (uint32_t i = 0; i < c->member_count; i++) {
        struct member *m = &c->members[i];
        m->here = m->trains = m->lease_count > 0 && !m->revoked;
        m->heard_ms = m->progress_ms = m->closed_ms = now_ms;
    }
    core_put_right(c, out);
    core_log(out, CORE_INFO,
             "term %llu: %llu ledger entries, %u members, %llu commits, %llu of %llu samples "
             "spent%s",
             (unsigned long long)c->term, (unsigned long long)c->entry_count, c->member_count,
             (unsigned long long)c->commits, (unsigned long long)c->spent.total,
             (unsigned long long)c->samples_total, c->paused ? ", paused" : "");
}

/* Nothing is overdue by time in which we did not look. */
static void move_deadlines(struct core *c, uint64_t gap) {
    for (uint32_t f = 0; f < c->fragments; f++) {
        struct round *r = &c->rounds[f];
        r->plan.deadline_ms += gap;
        r->quorum_ms += r->quorum_reached ? gap : 0;
        for (uint32_t i = 0; i < r->audit_count; i++) r->audits[i].deadline_ms += gap;
    }
    for (uint32_t i = 0; i < CORE_INQUIRIES_MAX; i++)
        if (c->inquiries[i].deadline_ms) c->inquiries[i].deadline_ms += gap;
    for (uint32_t i = 0; i < c->share.job_count; i++) c->share.jobs[i].since_ms += gap;
    c->resum.plan.deadline_ms += gap;
}

/* A gap between ticks that only a stop of the process or its machine explains. */
static uint64_t gap_ms_max(const struct core *c) {
    uint64_t most = c->outer->silence_ms_max / 2, gap = most / 4;
    if (gap < 5 * CORE_TICK_MS) gap = 5 * CORE_TICK_MS; /* a busy machine is late so much */
    return gap < most ? gap : most;
}

/* After a sleep of our own, what came meanwhile may still lie unread: nobody is judged by it, nor by the
 * sum of it and of a silence before it. */
static void on_tick(struct core *c, uint64_t now_ms, struct core_actions *out) {
    uint64_t gap = now_ms - c->tick_ms;
    bool stopped = gap > gap_ms_max(c);
#ifdef SIM_FAULTS
    if (core_fault == CORE_FAULT_TIMERS_BEFORE_INPUT) stopped = false;
#endif
    if (stopped) {
        core_log(out, CORE_WARNING,
                 "the coordinator itself stood still for %llu ms: nobody is judged by that time",
                 (unsigned long long)gap);
        move_deadlines(c, gap);
    }
    if (c->complaints > CORE_COMPLAINTS_PER_TICK_MAX)
        core_log(out, CORE_WARNING, "%u more such lines were left out",
                 c->complaints - CORE_COMPLAINTS_PER_TICK_MAX);
    c->complaints = 0;
    c->tick_ms = now_ms;
    core_judge(c, stopped, now_ms, out);
    if (c->over) return;
    core_renew_donors(c, now_ms, out);
    core_check_takeover(c, now_ms, out);
    core_check_inquiries(c, now_ms, out);
    core_check_resum(c, now_ms, out);
    core_check_share(c, now_ms, out);
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
    m->left = true;
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
        core_on_lease_ask(c, m, ((const struct msg_lease_ask *)ev->msg)->samples, now_ms, out);
        break;
    case MSG_READY: core_on_ready(c, m, ev->msg, now_ms, out); break;
    case MSG_SHARD_REPORT: core_on_shard_report(c, m, &ev->frame, ev->msg, now_ms, out); break;
    case MSG_AUDIT_REPORT: core_on_audit_report(c, m, &ev->frame, ev->msg, now_ms, out); break;
    case MSG_ACCUSE: core_on_accuse(c, m, &ev->frame, ev->msg, now_ms, out); break;
    case MSG_ROOT: core_on_root(c, m, ev->msg, now_ms, out); break;
    case MSG_STATE_LEAVES: core_on_state_leaves(c, m, ev->msg, now_ms, out); break;
    case MSG_CHECKPOINT_PART: core_on_checkpoint_part(c, m, ev->msg, now_ms, out); break;
    case MSG_CHECKPOINT_PART_DONE: core_on_checkpoint_part_done(c, m, ev->msg, now_ms, out); break;
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
        if (k->hello || k->showing)
            refuse_message(c, k, type, "after HELLO", out);
        else if (type == MSG_ENROL)
            core_on_enrol(c, k, ev->msg, ev->invite, out);
        else
            core_on_hello(c, k, ev->msg, now_ms, out);
    } else if (k->showing && type == MSG_LEDGER) {
        core_on_ledger(c, k, ev->msg, out);
    } else if (!k->hello) {
        refuse_message(c, k, type, "before HELLO", out);
    } else if (!is_stale(c, k->member, &ev->frame, out)) {
        on_member_message(c, k, ev, now_ms, out);
    }
}

/* Does an event leave the rounds as they are until the next tick? These are nine in ten. */
static bool is_quiet(const struct core_event *ev) {
    return ev->type == CORE_EV_MESSAGE &&
           (ev->frame.type == MSG_HEARTBEAT || ev->frame.type == MSG_LEASE_ASK);
}

void core_step(struct core *c, const struct core_event *ev, uint64_t now_ms,
               struct core_actions *out) {
    assert(c->started || ev->type == CORE_EV_START);
    if (c->over) return;
    switch (ev->type) {
    case CORE_EV_START: on_start(c, ev, now_ms, out); break;
    case CORE_EV_OPENED: core_on_opened(c, ev, out); break;
    case CORE_EV_MESSAGE: on_message(c, ev, now_ms, out); break;
    case CORE_EV_CLOSED: core_on_closed(c, ev->conn); break;
    case CORE_EV_TICK: on_tick(c, now_ms, out); break;
    case CORE_EV_PAUSE: on_pause(c, true, out); break;
    case CORE_EV_RESUME: on_pause(c, false, out); break;
    case CORE_EV_REVOKE: core_on_revoke(c, ev->member, ev->text, out); break;
    case CORE_EV_RELEASE: core_on_release(c, ev->member, ev->text, out); break;
    case CORE_EV_STOP: on_stop(c, out); return;
    }
    if (is_quiet(ev)) return;
    for (uint32_t f = 0; f < c->fragments && !c->over; f++) {
        core_check_round(c, &c->rounds[f], now_ms, out);
        core_try_plan(c, &c->rounds[f], now_ms, out);
    }
    if (!c->over) core_check_complete(c, now_ms, out);
}

/* ---- looking in ----------------------------------------------------------------------------- */

static const char *phase_name(const struct core *c) {
    if (c->complete) return "complete";
    if (c->paused) return "paused";
    for (uint32_t f = 0; f < c->fragments; f++)
        if (c->rounds[f].phase != ROUND_COLLECT) return "reduce";
    return "train";
}

void core_look(const struct core *c, uint64_t now_ms, struct core_view *out) {
    const struct state *s = core_state_now(c);
    (void)now_ms;
    *out = (struct core_view){.term = c->term,
                              .behind = core_is_behind(c),
                              .settled_index = c->settled_index,
                              .round = c->commits,
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
                              .audits = c->audits,
                              .audits_failed = c->audits_failed,
                              .quarantines = c->quarantines,
                              .fragments = c->fragments,
                              .commits = c->commits};
    if (c->entry_count) {
        out->head_index = c->entry_count - 1;
        out->head_digest = c->entries[c->entry_count - 1];
    }
    for (uint32_t i = c->state_count; i-- > 0;) {
        if (!c->states[i].root_known || c->states[i].undone) continue;
        out->state_root = c->states[i].root;
        out->state_root_index = c->states[i].index;
        break;
    }
}

void core_fragment_look(const struct core *c, uint32_t fragment, struct core_fragment_view *out) {
    assert(fragment < c->fragments);
    static const char *const phases[] = {"train", "reduce", "audit"};
    const struct round *r = &c->rounds[fragment];
    *out = (struct core_fragment_view){.round = r->number,
                                       .base_index = r->base_index,
                                       .plan = r->plan.number,
                                       .ready = core_count_heads(c, r).ready,
                                       .contributors = r->plan.contributor_count,
                                       .shards = r->plan.shard_count,
                                       .phase = phases[r->phase]};
}

uint32_t core_member_count(const struct core *c) { return c->member_count; }

static bool is_ready(const struct core *c, const struct member *m) {
    for (uint32_t f = 0; f < c->fragments; f++)
        if (m->parts[f].present) return true;
    return false;
}

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
        .quarantined = m->quarantined,
        .live = m->here,
        .ready = is_ready(c, m),
        .own = core_is_own(c, m),
        .trains = m->trains,
        .session = m->session,
        .tokens_committed = m->tokens_committed,
        .state_index = m->state_index,
        .step = m->beat.step,
        .loss = m->beat.loss,
        .tokens_per_s = m->beat.tokens_per_s,
        .phase = m->beat.phase,
        .trainer_restarts = m->beat.trainer_restarts,
        .silent_ms = m->here && now_ms > m->heard_ms ? now_ms - m->heard_ms : 0,
        .uplink = m->uplink};
}
