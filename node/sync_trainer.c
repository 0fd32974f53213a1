/* sync_trainer.c - the trainer as sync sees it. What it holds is always the anchor plus its own
 * uncommitted work: every change of the state reaches it through the slot, as one TRAINER_APPLY per
 * new base; where that cannot be, it is set back to the anchor (TRAINER_RESET) and its samples are
 * queued again.
 *
 * Fragments are frozen one at a time, each by its own turn in the schedule. With outer.overlap = 0
 * the trainer stands still from then on until what it contributed to is applied; else it trains on, and
 * several contributions may be under way.
 *
 * The slot is ours until an APPLY, RESET or MOMENTS_IMPORT is emitted, and again after the answer;
 * until then no chunk of the state changes. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "node/sync_internal.h"

/* ---- changes of the state --------------------------------------------------------------- */

static void clear_ops(struct sync *s) {
    if (s->trainer.ops) memset(s->trainer.ops, SYNC_OP_KEEP, s->chunk_count);
    s->trainer.slot_dirty = false;
}

bool trainer_takes_changes(const struct sync *s) {
    return !s->trainer.slot_busy && !s->trainer.filling;
}

bool trainer_follows(const struct sync *s) {
    const struct trainer *t = &s->trainer;
    return t->state == TRAINER_TRAINING && !t->need_reset && t->slot;
}

bool trainer_holds(const struct sync *s, const struct contribution *c) {
    return trainer_follows(s) && c->life == s->trainer.life;
}

/* local = alpha*local + (1-alpha)*slot is to be followed by local += now - old: both in one. */
static void add_to_mix(struct sync *s, float *slot, const float *now, const float *old, size_t n) {
    float rest = 1 - s->outer->alpha;
    for (size_t i = 0; i < n; i++) slot[i] += (now[i] - old[i]) / rest;
}

/* old: the chunk before; the anchor already holds the new one. Several changes may meet in one
 * chunk. */
void trainer_change(struct sync *s, uint32_t chunk, const float *old, bool summed) {
    struct trainer *t = &s->trainer;
    size_t first = chunk_first(s, chunk), n = chunk_elements(s, chunk);
    const float *now = s->state.anchor + first;
    float *slot = t->slot + first;
    if (summed || SYNC_HAS_FAULT(MIX_NOT_SUMMED)) {
        t->ops[chunk] = SYNC_OP_MIX;
        t->turn[s->place[chunk].fragment].mixing = true;
        memcpy(slot, now, n * sizeof *slot);
    } else if (t->ops[chunk] == SYNC_OP_MIX && s->outer->alpha > 0 && s->outer->alpha < 1) {
        add_to_mix(s, slot, now, old, n);
    } else if (t->ops[chunk] == SYNC_OP_MIX) {
        memcpy(slot, now, n * sizeof *slot);
    } else {
        if (t->ops[chunk] == SYNC_OP_KEEP) memset(slot, 0, n * sizeof *slot);
        t->ops[chunk] = SYNC_OP_ADD;
        outer_add_delta(slot, now, old, n);
    }
    t->slot_dirty = true;
}

/* ---- the schedule ----------------------------------------------------------------------- */

static void begin_turn(struct sync *s, struct turn *turn, uint32_t part, uint32_t parts) {
    uint64_t steps = s->outer->inner_steps, ms = s->outer->round_ms;
    turn->after_steps = (steps * part + parts - 1) / parts;
    turn->after_ms = (ms * part + parts - 1) / parts;
    turn->at_once = false;
}

/* The trainer begins with a bare anchor: the fragments take turns from here. */
static void begin_schedule(struct sync *s) {
    struct trainer *t = &s->trainer;
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        struct turn *turn = &t->turn[f];
        *turn = (struct turn){.due = turn->due,
                              .due_round = turn->due_round,
                              .from_steps = t->steps_total,
                              .from_ms = s->now,
                              .frozen_steps = t->steps_total,
                              .loss_before = t->loss_sum,
                              .losses_before = t->loss_count};
        begin_turn(s, turn, f + 1, s->fragment_count);
    }
}

/* Where training went on meanwhile, work that was not summed is contributed again at once; where the
 * trainer stood still it would only stand still again, so it takes its ordinary turn (or MSG_DUE). */
void trainer_decided(struct sync *s, uint32_t fragment, bool summed) {
    const struct contribution *c = &s->contribution[fragment];
    struct turn *turn = &s->trainer.turn[fragment];
    if (!trainer_holds(s, c)) return;
    begin_turn(s, turn, 1, 1);
    turn->from_steps = c->steps;
    turn->from_ms = s->outer->overlap ? c->frozen_ms : s->now;
    turn->at_once = !summed && s->outer->overlap;
}

void trainer_on_due(struct sync *s, const struct msg_due *msg) {
    if (msg->fragment >= s->fragment_count) return;
    s->trainer.turn[msg->fragment].due = true;
    s->trainer.turn[msg->fragment].due_round = msg->round;
}

/* Samples whose effect on the fragment is the trainer's alone. */
static uint64_t own_samples(const struct sync *s, uint32_t fragment) {
    return s->trainer.samples - s->trainer.turn[fragment].samples_before;
}

/* Would what the trainer writes now be anchor + work of the newest base? */
static bool may_freeze(const struct sync *s, uint32_t fragment) {
    const struct fragment *f = &s->fragment[fragment];
    const struct contribution *c = &s->contribution[fragment];
    if (c->frozen || c->encoding || own_samples(s, fragment) == 0 || !trainer_follows(s))
        return false;
    for (uint32_t k = 0; k < f->count; k++)
        if (s->trainer.ops[f->chunk[k]] != SYNC_OP_KEEP) return false;
    return apply_fragment_is_current(s, fragment);
}

static bool is_due(const struct sync *s, uint32_t fragment) {
    const struct trainer *t = &s->trainer;
    const struct turn *turn = &t->turn[fragment];
    bool idle = leases_queued(s) == 0;
    /* Without a coordinator training goes on; where the data ends, the work is made durable. */
    if (!s->synced) return idle;
    if (turn->at_once || (idle && s->leases.dry)) return true;
    if (t->steps_total == turn->frozen_steps) return false;
    if (turn->due && turn->due_round == s->ledger.rounds[fragment]) return true;
    return (turn->after_steps && t->steps_total - turn->from_steps >= turn->after_steps) ||
           (turn->after_ms && s->now - turn->from_ms >= turn->after_ms);
}

/* The fragment that waits longest, or -1. */
static int next_due(const struct sync *s) {
    int best = -1;
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        if (own_samples(s, f) == 0 || !is_due(s, f) || !may_freeze(s, f)) continue;
        if (best < 0 || s->trainer.turn[f].from_steps < s->trainer.turn[best].from_steps)
            best = (int)f;
    }
    return best;
}

/* ---- losing work ------------------------------------------------------------------------ */

/* Contributions that are frozen live on without their trainer: their claims stay. */
static void void_work(struct sync *s, enum sync_loss by) {
    struct trainer *t = &s->trainer;
    for (uint32_t f = 0; f < s->fragment_count; f++) contribution_abort(s, f);
    s->account.lost[by] += leases_unfrozen(s);
    t->lost_by = by;
    t->life++;
    t->need_reset = true;
    t->freezing = t->standing = false;
    leases_restart(s);
}

void trainer_lose_work(struct sync *s, enum sync_loss by, const char *why) {
    struct trainer *t = &s->trainer;
    if (t->state == TRAINER_TRAINING && t->samples)
        sync_log(s, SYNC_WARNING, "back to the anchor: %s", why);
    void_work(s, by);
    t->filling = false; /* what of the anchor is in the slot may be no more */
    if (!t->slot_busy) clear_ops(s);
}

void trainer_on_down(struct sync *s) {
    struct trainer *t = &s->trainer;
    moments_abort(s);
    t->moments = NULL;
    t->exporting = false;
    moments_refuse_all(s);
    t->state = TRAINER_DOWN;
    t->slot_busy = t->resetting = t->importing = t->filling = false;
    clear_ops(s);
    void_work(s, SYNC_LOSS_TRAINER);
}

int trainer_on_up(struct sync *s, const struct sync_event *ev) {
    struct trainer *t = &s->trainer;
    trainer_on_down(s); /* it may have been replaced without a word */
    t->state = TRAINER_BLANK;
    t->samples_said = 0;
    t->lives++;
    t->steps = ev->steps;
    t->want_moments = ev->steps == 0;
    t->moments_tries = t->moments_next = 0;
    return 0;
}

/* ---- events ----------------------------------------------------------------------------- */

/* What an earlier life or the time before a RESET had to say does not count. */
static bool is_current(const struct trainer *t) {
    return t->state == TRAINER_TRAINING && !t->resetting && !t->need_reset;
}

/* All that it trained on, whether it still counts or not. */
static void count_samples(struct sync *s, uint64_t samples) {
    struct trainer *t = &s->trainer;
    uint64_t more = samples > t->samples_said ? samples - t->samples_said : 0;
    t->samples_said = samples;
    s->account.trained += more;
    if (!is_current(t)) s->account.lost[t->lost_by] += more;
}

/* Time it stood for one fragment is not time it trained the others: without this, rounds that take longer
 * than round_ms leave every fragment due after one step. */
static void stand(struct sync *s, uint64_t ms) {
    s->account.standing_ms += ms;
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        uint64_t *from = &s->trainer.turn[f].from_ms;
        *from = *from + ms < s->now ? *from + ms : s->now;
    }
}

void trainer_spend(struct sync *s, uint64_t ms) {
    struct trainer *t = &s->trainer;
    struct sync_account *a = &s->account;
    if (!s->config.trains || t->state == TRAINER_DOWN) return;
    if (t->state == TRAINER_BLANK || t->need_reset || t->resetting || t->importing) a->no_state_ms += ms;
    else if (t->standing) stand(s, ms);
    else if (leases_queued(s)) a->working_ms += ms;
    else a->no_data_ms += ms;
}

static void count_steps(struct sync *s, const struct sync_event *ev) {
    struct trainer *t = &s->trainer;
    uint64_t steps = ev->steps > t->steps ? ev->steps - t->steps : 0;
    t->steps = ev->steps;
    t->steps_total += steps;
    s->progress += steps;
    if (ev->samples < t->samples) {
        sync_log(s, SYNC_ERROR, "the trainer has consumed %llu samples, it had %llu before",
                 (unsigned long long)ev->samples, (unsigned long long)t->samples);
        return;
    }
    leases_consume(s, ev->samples - t->samples);
    t->samples = ev->samples;
}

void trainer_on_step(struct sync *s, const struct sync_event *ev) {
    struct trainer *t = &s->trainer;
    count_samples(s, ev->samples);
    if (!is_current(t)) {
        t->steps = ev->steps;
        return;
    }
    count_steps(s, ev);
    t->tokens_per_s = ev->tokens_per_s;
    if (!isfinite(ev->loss)) return;
    t->loss = ev->loss;
    t->loss_sum += ev->loss;
    t->loss_count++;
}

/* Where the base moved meanwhile, the fragment is frozen again when it has come to rest. */
int trainer_on_frozen(struct sync *s, const struct sync_event *ev) {
    struct trainer *t = &s->trainer;
    count_samples(s, ev->samples);
    if (!is_current(t) || !t->freezing || ev->fragment != t->freezing_fragment) return 0;
    count_steps(s, ev);
    t->freezing = false;
    t->standing = t->standing || s->outer->overlap == 0;
    if (!may_freeze(s, ev->fragment)) return 0;
    t->turn[ev->fragment].local = ev->local;
    t->turn[ev->fragment].frozen_steps = t->steps_total;
    return contribution_begin(s, ev->fragment);
}

/* The taken-over commits left what was done since the freeze in the fragments they summed. */
void trainer_on_applied(struct sync *s) {
    struct trainer *t = &s->trainer;
    if (!t->slot_busy) return;
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        if (!t->turn[f].mixing) continue;
        t->turn[f].mixing = false;
        t->turn[f].samples_before = t->turn[f].samples_frozen;
    }
    if (t->resetting) t->samples_said = 0;
    t->slot_busy = t->resetting = t->importing = false;
    clear_ops(s);
}

/* ---- what it is told next --------------------------------------------------------------- */

static void emit_slot(struct sync *s, enum sync_action_type type) {
    struct commit *c = ledger_last(s);
    struct sync_action *a = sync_act(s, type);
    if (!a) return;
    a->tokens = c ? c->body.tokens_committed : s->ledger.rewind.to.tokens_committed;
    a->contributors = c && c->body.contributors_count ? c->body.contributors_count : 1;
    s->trainer.slot_busy = true;
    s->trainer.standing = false;
}

static void emit_apply(struct sync *s) {
    emit_slot(s, SYNC_ACT_TRAINER_APPLY);
    s->trainer.slot_dirty = false;
}

static void emit_reset(struct sync *s) {
    struct trainer *t = &s->trainer;
    emit_slot(s, SYNC_ACT_TRAINER_RESET);
    leases_restart(s);
    t->resetting = true;
    t->need_reset = false;
    t->state = TRAINER_TRAINING;
    t->samples = 0;
    begin_schedule(s);
}

static void emit_moments(struct sync *s) {
    struct trainer *t = &s->trainer;
    memcpy(t->slot, t->moments_in, s->config.elements * sizeof *t->slot);
    struct sync_action *a = sync_act(s, SYNC_ACT_TRAINER_MOMENTS_IMPORT);
    if (!a) return;
    a->steps = t->moments_steps;
    sync_log(s, SYNC_INFO, "the trainer takes over second moments of member %u (%llu steps)",
             t->moments_peer, (unsigned long long)t->moments_steps);
    t->slot_busy = t->importing = true;
    moments_abort(s);
}

static void emit_freeze(struct sync *s, uint32_t fragment) {
    struct trainer *t = &s->trainer;
    struct sync_action *a = sync_act(s, SYNC_ACT_TRAINER_FREEZE);
    if (!a) return;
    a->fragment = fragment;
    a->wait = s->outer->overlap == 0;
    t->freezing = true;
    t->freezing_fragment = fragment;
}

/* Is a contribution under way that is in its parameters? */
static bool has_contribution(const struct sync *s) {
    for (uint32_t f = 0; f < s->fragment_count; f++) {
        const struct contribution *c = &s->contribution[f];
        if (c->encoding || (c->frozen && trainer_holds(s, c))) return true;
    }
    return false;
}

static void train(struct sync *s) {
    struct trainer *t = &s->trainer;
    if (moments_pending(s)) return;
    if (t->moments_in && t->moments_got == s->chunk_count) {
        if (!t->slot_dirty) emit_moments(s); /* else an APPLY is about to leave by the same slot */
        return;
    }
    leases_feed(s);
    int f = t->freezing ? -1 : next_due(s);
    if (f >= 0) emit_freeze(s, (uint32_t)f);
}

/* One APPLY for all commits that are here, unless the next one takes its time. */
static bool is_apply_due(struct sync *s) {
    const struct trainer *t = &s->trainer;
    if (!t->slot_dirty || t->freezing || !s->state.whole) return false;
    if (t->standing && has_contribution(s)) return false;
    return state_current(s) || !apply_has_work(s);
}

void trainer_pump(struct sync *s) {
    struct trainer *t = &s->trainer;
    if (!s->config.trains || t->state == TRAINER_DOWN || !t->slot) return;
    if (!catchup_busy(s)) leases_ask(s);
    if (t->slot_busy) return;
    if (t->need_reset) {
        if (!t->filling && state_current(s)) {
            t->filling = true;
            t->fill_next = 0;
        }
        return;
    }
    if (is_apply_due(s)) {
        emit_apply(s);
        return;
    }
    train(s);
    if (t->standing && !t->freezing && !t->slot_dirty && !has_contribution(s)) {
        sync_act(s, SYNC_ACT_TRAINER_CONTINUE);
        t->standing = false;
    }
}

/* ---- work: the anchor into the slot, some chunks at a time ------------------------------ */

bool trainer_has_work(const struct sync *s) { return s->trainer.filling; }

int trainer_work(struct sync *s) {
    struct trainer *t = &s->trainer;
    for (size_t done = 0; t->fill_next < s->chunk_count && done < SYNC_WORK_ELEMENTS;
         t->fill_next++) {
        size_t first = chunk_first(s, t->fill_next), n = chunk_elements(s, t->fill_next);
        memcpy(t->slot + first, s->state.anchor + first, n * sizeof *t->slot);
        done += n;
    }
    if (t->fill_next < s->chunk_count) return 0;
    t->filling = false;
    emit_reset(s);
    return 0;
}
