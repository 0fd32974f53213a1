/* sync_trainer.c - the trainer as sync sees it. What it holds is always the anchor plus its own
 * uncommitted work: every change of the state reaches it through the slot, as one TRAINER_APPLY per
 * new base; where that cannot be, it is set back to the anchor (TRAINER_RESET) and its samples are
 * queued again.
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
    return t->state >= TRAINER_TRAINING && !t->need_reset && t->slot;
}

/* old: the chunk before; the anchor already holds the new one. Several changes may meet in one
 * chunk. */
void trainer_change(struct sync *s, uint32_t chunk, const float *old, bool summed) {
    struct trainer *t = &s->trainer;
    size_t first = chunk_first(s, chunk), n = chunk_elements(s, chunk);
    const float *now = s->state.anchor + first;
    float *slot = t->slot + first;
    if (t->ops[chunk] == SYNC_OP_KEEP) {
        t->ops[chunk] = summed ? SYNC_OP_MIX : SYNC_OP_ADD;
        memset(slot, 0, n * sizeof *slot);
    }
    if (t->ops[chunk] == SYNC_OP_MIX) memcpy(slot, now, n * sizeof *slot);
    else outer_add_delta(slot, now, old, n);
    t->slot_dirty = true;
}

/* ---- losing work ------------------------------------------------------------------------ */

/* A frozen contribution lives on without its trainer: its claims stay. */
static void rewind_leases(struct sync *s) {
    if (s->contribution.frozen) leases_requeue(s);
    else leases_rewind(s);
}

void trainer_lose_work(struct sync *s, const char *why) {
    struct trainer *t = &s->trainer;
    contribution_abort(s);
    if (t->state >= TRAINER_TRAINING && leases_used(s))
        sync_log(s, SYNC_WARNING, "back to the anchor: %s", why);
    rewind_leases(s);
    t->need_reset = true;
    if (!t->slot_busy) clear_ops(s);
}

void trainer_new_base(struct sync *s, bool had_contribution) {
    struct trainer *t = &s->trainer;
    t->round_ms = s->now;
    t->round_steps = 0;
    t->loss_sum = 0;
    t->loss_count = 0;
    /* Its contribution was made by an earlier life, so what it holds is a bare anchor. */
    if (had_contribution && t->state != TRAINER_FROZEN) t->need_reset = true;
}

/* ---- events ----------------------------------------------------------------------------- */

void trainer_on_down(struct sync *s) {
    struct trainer *t = &s->trainer;
    contribution_abort(s);
    moments_abort(s);
    t->moments = NULL;
    t->exporting = false;
    moments_refuse_all(s);
    t->state = TRAINER_DOWN;
    t->slot_busy = t->resetting = t->importing = t->filling = false;
    t->need_reset = true;
    t->local = NULL;
    clear_ops(s);
    rewind_leases(s);
}

int trainer_on_up(struct sync *s, const struct sync_event *ev) {
    struct trainer *t = &s->trainer;
    trainer_on_down(s); /* it may have been replaced without a word */
    t->state = TRAINER_BLANK;
    t->lives++;
    t->steps = ev->steps;
    t->want_moments = ev->steps == 0;
    t->moments_tries = t->moments_next = 0;
    return 0;
}

static void count_steps(struct sync *s, const struct sync_event *ev) {
    struct trainer *t = &s->trainer;
    uint64_t steps = ev->steps > t->steps ? ev->steps - t->steps : 0;
    t->steps = ev->steps;
    t->steps_total += steps;
    t->round_steps += steps;
    s->progress += steps;
}

/* What an earlier life or the time before a RESET had to say does not count. */
static bool is_current(const struct trainer *t) {
    return (t->state == TRAINER_TRAINING || t->state == TRAINER_FREEZING) && !t->resetting;
}

void trainer_on_step(struct sync *s, const struct sync_event *ev) {
    struct trainer *t = &s->trainer;
    if (!is_current(t)) {
        t->steps = ev->steps;
        return;
    }
    count_steps(s, ev);
    leases_consume(s, ev->samples);
    t->tokens_per_s = ev->tokens_per_s;
    if (!isfinite(ev->loss)) return;
    t->loss = ev->loss;
    t->loss_sum += ev->loss;
    t->loss_count++;
}

int trainer_on_frozen(struct sync *s, const struct sync_event *ev) {
    struct trainer *t = &s->trainer;
    if (t->state != TRAINER_FREEZING || t->resetting) return 0;
    count_steps(s, ev);
    leases_consume(s, ev->samples);
    t->state = TRAINER_FROZEN;
    t->local = ev->local;
    if (t->need_reset || t->slot_dirty || !state_current(s) || leases_used(s) == 0) return 0;
    return contribution_begin(s);
}

void trainer_on_applied(struct sync *s) {
    struct trainer *t = &s->trainer;
    if (!t->slot_busy) return;
    t->slot_busy = t->resetting = t->importing = false;
    clear_ops(s);
}

/* ---- what it is told next --------------------------------------------------------------- */

static void emit_slot(struct sync *s, enum sync_action_type type) {
    struct commit *c = ledger_last(s);
    struct sync_action *a = sync_act(s, type);
    if (!a) return;
    a->tokens = c ? c->body.tokens_committed : 0;
    a->contributors = c && c->body.contributors_count ? c->body.contributors_count : 1;
    s->trainer.slot_busy = true;
}

static void emit_apply(struct sync *s) {
    emit_slot(s, SYNC_ACT_TRAINER_APPLY);
    s->trainer.slot_dirty = false;
    s->trainer.state = TRAINER_TRAINING;
    s->trainer.local = NULL;
}

static void emit_reset(struct sync *s) {
    struct trainer *t = &s->trainer;
    emit_slot(s, SYNC_ACT_TRAINER_RESET);
    rewind_leases(s);
    t->resetting = true;
    t->need_reset = false;
    t->state = TRAINER_TRAINING;
    t->local = NULL;
    trainer_new_base(s, false);
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

static bool is_freeze_due(struct sync *s) {
    const struct trainer *t = &s->trainer;
    if (leases_used(s) == 0) return false;
    bool idle = leases_queued(s) == 0;
    /* Without a coordinator training goes on; where the data ends, the work is made durable. */
    if (!s->synced) return idle;
    if (idle && s->leases.dry) return true;
    if (t->round_steps == 0) return false;
    return (s->outer->inner_steps && t->round_steps >= s->outer->inner_steps) ||
           (s->outer->round_ms && s->now - t->round_ms >= s->outer->round_ms);
}

static void train(struct sync *s) {
    struct trainer *t = &s->trainer;
    if (s->contribution.frozen || moments_pending(s)) return;
    if (t->moments_in && t->moments_got == s->chunk_count) {
        emit_moments(s);
        return;
    }
    leases_feed(s);
    if (!state_current(s) || !is_freeze_due(s)) return;
    sync_act(s, SYNC_ACT_TRAINER_FREEZE);
    t->state = TRAINER_FREEZING;
}

/* It froze for nothing: the base moved and has come to rest, or it had done no step. */
static void unfreeze(struct sync *s) {
    if (s->contribution.frozen || s->contribution.encoding || !state_current(s)) return;
    sync_act(s, SYNC_ACT_TRAINER_CONTINUE);
    s->trainer.state = TRAINER_TRAINING;
    s->trainer.local = NULL;
}

void trainer_pump(struct sync *s) {
    struct trainer *t = &s->trainer;
    if (!s->config.trains || t->state == TRAINER_DOWN || !t->slot) return;
    if (state_current(s)) leases_ask(s);
    if (t->slot_busy) return;
    if (t->need_reset) {
        if (!t->filling && state_current(s)) {
            t->filling = true;
            t->fill_next = 0;
        }
        return;
    }
    if (t->slot_dirty && state_current(s) && t->state != TRAINER_FREEZING) emit_apply(s);
    else if (t->state == TRAINER_FROZEN) unfreeze(s);
    else if (t->state == TRAINER_TRAINING && !t->slot_dirty) train(s);
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
