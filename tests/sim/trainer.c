/* trainer.c - the simulated trainer. It carries its commands out in order at step boundaries, as a
 * real one does. A sample moves the parameters by a fixed small vector; beside the parameters it
 * keeps, chunk by chunk, whose samples' work is in them, so that what a member claims, and what is
 * committed, can be compared with what was trained. */
#include "tests/sim/sim.h"

#include <string.h>

/* Cheap, and a little different in every element. */
static void move_parameters(struct sim_world *w, float *local, uint64_t sample) {
    uint64_t h = (sample + 1) * 0x9e3779b97f4a7c15ull;
    for (uint32_t i = 0; i < w->elements; i++) {
        h = h * 6364136223846793005ull + 1442695040888963407ull;
        local[i] += (float)((int)(h >> 54) - 512) * 1e-5f;
    }
}

static void train_on(struct sim_world *w, struct sim_member *m, uint64_t sample) {
    struct sim_trainer *t = &m->trainer;
    if (sample >= w->corpus.samples)
        sim_violation(w, "slot %u trains sample %llu, there are %llu", m->slot, LLU(sample),
                      LLU(w->corpus.samples));
    if (proto_set_has(t->trained, (uint32_t)sample))
        sim_violation(w, "slot %u trains sample %llu twice without a reset between", m->slot,
                      LLU(sample));
    proto_set_add(t->trained, (uint32_t)sample);
    for (uint32_t c = 0; c < w->chunks; c++) proto_set_add(t->effect[c], (uint32_t)sample);
    for (uint32_t f = 0; f < w->fragments; f++)
        proto_set_add(t->fragment_effect[f], (uint32_t)sample);
    move_parameters(w, t->local, sample);
}

static void reply(struct sim_world *w, struct sim_member *m, enum sync_event_type what,
                  uint32_t fragment) {
    struct sim_event *ev = sim_schedule(w, 1 + sim_random(w, 10), SIM_TRAINER_REPLY, m->slot);
    ev->value = what;
    ev->fragment = fragment;
    m->trainer.replying = true;
}

static void freeze(struct sim_world *w, struct sim_member *m, const struct sim_command *c) {
    struct sim_trainer *t = &m->trainer;
    for (uint32_t k = 0; k < w->fragment_chunks[c->fragment]; k++) {
        uint32_t chunk = w->chunk_at[c->fragment][k], first = chunk * w->chunk_elements;
        memcpy(t->frozen[c->fragment] + first, t->local + first,
               sim_chunk_elements(w, chunk) * sizeof(float));
    }
    oracle_frozen(w, m, c->fragment);
    t->waits = c->wait;
    reply(w, m, SYNC_EV_TRAINER_FROZEN, c->fragment);
}

static void apply(struct sim_world *w, struct sim_member *m) {
    float *local = m->trainer.local;
    for (uint32_t c = 0; c < w->chunks; c++) {
        uint32_t first = c * w->chunk_elements, n = sim_chunk_elements(w, c);
        if (m->slot_ops[c] != SYNC_OP_KEEP) m->trainer.base[c] = m->slot_versions[c];
        if (m->slot_ops[c] == SYNC_OP_ADD)
            for (uint32_t i = first; i < first + n; i++) local[i] += m->slot_values[i];
        if (m->slot_ops[c] != SYNC_OP_MIX) continue;
        outer_mix(local + first, m->slot_values + first, n, w->outer.alpha);
        oracle_mix(w, m, c);
    }
}

static void reset(struct sim_world *w, struct sim_member *m) {
    struct sim_trainer *t = &m->trainer;
    memcpy(t->local, m->slot_values, w->elements * sizeof *t->local);
    t->queued = 0;
    t->samples = 0;
    t->has_parameters = true;
    for (uint32_t c = 0; c < w->chunks; c++) t->base[c] = m->slot_versions[c];
    memset(t->trained, 0, sizeof t->trained);
    memset(t->effect, 0, sizeof t->effect);
    memset(t->fragment_effect, 0, sizeof t->fragment_effect);
}

/* Carry out the first command; false: it has to wait. */
static bool obey(struct sim_world *w, struct sim_member *m) {
    struct sim_trainer *t = &m->trainer;
    struct sim_command c = t->commands[0];
    memmove(t->commands, t->commands + 1, --t->command_count * sizeof *t->commands);
    switch (c.type) {
    case SYNC_ACT_TRAINER_SAMPLES:
        if (t->queued == SIM_COMMANDS_MAX)
            sim_violation(w, "slot %u: more than %d ranges queued", m->slot, SIM_COMMANDS_MAX);
        t->queue[t->queued++] = c.samples;
        break;
    case SYNC_ACT_TRAINER_FREEZE: freeze(w, m, &c); break;
    case SYNC_ACT_TRAINER_CONTINUE: t->waits = false; break;
    case SYNC_ACT_TRAINER_APPLY:
        apply(w, m);
        t->waits = false;
        reply(w, m, SYNC_EV_TRAINER_APPLIED, 0);
        break;
    case SYNC_ACT_TRAINER_RESET:
        sim_trace(w, "    %u: trainer is reset, it had %u samples", m->slot,
                  samples_count(m->trainer.trained));
        reset(w, m);
        t->waits = false;
        reply(w, m, SYNC_EV_TRAINER_APPLIED, 0);
        break;
    case SYNC_ACT_TRAINER_MOMENTS_EXPORT: reply(w, m, SYNC_EV_TRAINER_MOMENTS, 0); break;
    default: reply(w, m, SYNC_EV_TRAINER_APPLIED, 0); break; /* MOMENTS_IMPORT */
    }
    return !t->replying;
}

void sim_trainer_go(struct sim_world *w, struct sim_member *m) {
    struct sim_trainer *t = &m->trainer;
    if (!t->alive || t->stepping || t->replying) return;
    while (t->command_count)
        if (!obey(w, m)) return;
    if (!t->has_parameters || t->waits || !t->queued) return;
    t->stepping = true;
    sim_schedule(w, 1 + sim_random(w, 2 * m->step_ms), SIM_TRAINER_STEP, m->slot);
}

static void trace_command(struct sim_world *w, const struct sim_member *m,
                          const struct sync_action *a) {
    static const char *const names[] = {"SAMPLES", "FREEZE",         "APPLY",         "RESET",
                                        "CONTINUE", "MOMENTS_EXPORT", "MOMENTS_IMPORT"};
    sim_trace(w, "    %u > trainer %s %llu+%llu, fragment %u", m->slot,
              names[a->type - SYNC_ACT_TRAINER_SAMPLES], LLU(a->start), LLU(a->count), a->fragment);
}

void sim_trainer_action(struct sim_world *w, struct sim_member *m, const struct sync_action *a) {
    struct sim_trainer *t = &m->trainer;
    if (!t->alive)
        sim_violation(w, "slot %u: action %d for a dead trainer", m->slot, (int)a->type);
    if (t->command_count == SIM_COMMANDS_MAX)
        sim_violation(w, "slot %u: more than %d commands wait for the trainer", m->slot,
                      SIM_COMMANDS_MAX);
    if (a->type == SYNC_ACT_TRAINER_FREEZE && a->fragment >= w->fragments)
        sim_violation(w, "slot %u: FREEZE of fragment %u", m->slot, a->fragment);
    trace_command(w, m, a);
    if (a->type == SYNC_ACT_TRAINER_APPLY || a->type == SYNC_ACT_TRAINER_RESET)
        for (uint32_t c = 0; c < w->chunks; c++) m->slot_versions[c] = sync_chunk_version(m->sync, c);
    t->commands[t->command_count++] =
        (struct sim_command){a->type, a->fragment, a->wait, {a->start, a->count}};
}

static void step(struct sim_world *w, struct sim_member *m) {
    struct sim_trainer *t = &m->trainer;
    t->stepping = false;
    for (uint32_t b = 0; b < w->inner.batch && t->queued; b++) {
        train_on(w, m, t->queue[0].start++);
        t->samples++;
        if (--t->queue[0].count == 0)
            memmove(t->queue, t->queue + 1, --t->queued * sizeof *t->queue);
    }
    t->steps++;
    struct sync_event ev = {.type = SYNC_EV_TRAINER_STEP,
                            .samples = t->samples,
                            .steps = t->steps,
                            .loss = 5.0,
                            .tokens_per_s = 1000};
    sim_member_step(w, m, &ev);
}

void sim_trainer_event(struct sim_world *w, struct sim_member *m, struct sim_event *e) {
    struct sim_trainer *t = &m->trainer;
    uint32_t life = t->generation;
    struct sync_event ev = {.type = (enum sync_event_type)e->value,
                            .fragment = e->fragment,
                            .samples = t->samples,
                            .steps = t->steps,
                            .local = t->moments,
                            .loss = 5.0};
    switch (e->kind) {
    case SIM_TRAINER_UP:
        if (t->alive || !m->sync) return;
        t->alive = true;
        for (uint32_t i = 0; i < w->elements; i++) t->moments[i] = 1e-4f * (float)(i + 1);
        sim_member_step(w, m, &(struct sync_event){.type = SYNC_EV_TRAINER_UP});
        break;
    case SIM_TRAINER_STEP: step(w, m); break;
    default:
        t->replying = false;
        if (ev.type == SYNC_EV_TRAINER_FROZEN) ev.local = t->frozen[e->fragment];
        sim_member_step(w, m, &ev);
    }
    if (t->generation == life) sim_trainer_go(w, m);
}

void sim_trainer_kill(struct sim_world *w, struct sim_member *m) {
    struct sim_trainer *t = &m->trainer;
    if (!m->trains || !t->alive || !m->sync) return;
    uint32_t generation = t->generation + 1;
    memset(t, 0, sizeof *t);
    t->generation = generation;
    sim_trace(w, "slot %u: trainer dies", m->slot);
    sim_member_step(w, m, &(struct sync_event){.type = SYNC_EV_TRAINER_DOWN});
    if (m->alive) sim_schedule(w, 100 + sim_random(w, 1000), SIM_TRAINER_UP, m->slot);
}
