/* member_played.c - a trainer of some lines: it trains on everything at once, and what it holds when
 * it freezes is the anchor and a little noise, its own and the same in each round. */
#include <stdlib.h>
#include <string.h>

#include "proto/model.h"
#include "tests/bench/member.h"

#define NOISE_ELEMENTS ((size_t)1 << 16) /* repeated over the vector */
#define NOISE_STD 1e-4f

static void say(struct member *m, struct sync_event ev) {
    struct played *p = &m->played;
    struct err full;
    ev.samples = p->consumed;
    ev.steps = p->steps;
    ev.loss = 1;
    ev.tokens_per_s = 1e6;
    if (p->answer_count == MEMBER_ANSWERS_MAX) {
        err_set(&full, ERR_FULL, "%d answers wait", MEMBER_ANSWERS_MAX);
        member_die(m, "trainer", &full);
    }
    p->answers[p->answer_count++] = ev;
    timer_set(p->answer, 0);
}

static void on_answer(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct member *m = arg;
    struct sync_event answers[MEMBER_ANSWERS_MAX];
    int n = m->played.answer_count;
    memcpy(answers, m->played.answers, (size_t)n * sizeof *answers);
    m->played.answer_count = 0;
    for (int i = 0; i < n; i++) member_feed(m, &answers[i]);
}

static void train(struct member *m, uint64_t samples) {
    struct played *p = &m->played;
    uint32_t batch = m->genesis.inner->batch;
    for (p->queued += samples; p->queued >= batch; p->queued -= batch) {
        p->consumed += batch;
        p->steps++;
        say(m, (struct sync_event){.type = SYNC_EV_TRAINER_STEP});
    }
}

static void fill_local(struct member *m, uint32_t fragment) {
    const float *anchor = sync_anchor(m->sync);
    size_t chunk = m->genesis.outer->chunk_elements, n = m->me->elements;
    for (size_t first = 0; first < n; first += chunk) {
        if (m->played.fragment_of[first / chunk] != fragment) continue;
        size_t end = first + chunk < n ? first + chunk : n;
        for (size_t i = first; i < end; i++)
            m->played.local[i] = anchor[i] + m->played.noise[i % NOISE_ELEMENTS];
    }
}

void played_tick(struct member *m) {
    struct played *p = &m->played;
    if (!p->freezing || member_rounds(m) >= m->all->rounds) return;
    p->freezing = false;
    fill_local(m, p->freeze_fragment);
    member_note(m, member_rounds(m), FLEET_FROZEN, false);
    say(m, (struct sync_event){.type = SYNC_EV_TRAINER_FROZEN, .fragment = p->freeze_fragment,
                               .local = p->local});
}

static void reset(struct played *p) {
    p->queued = p->consumed = 0;
    p->freezing = false;
    p->answer_count = 0; /* what was said before is of another life */
}

void played_perform(struct member *m, const struct sync_action *a) {
    struct sync_event done = {.type = SYNC_EV_TRAINER_APPLIED};
    switch (a->type) {
    case SYNC_ACT_TRAINER_SAMPLES: train(m, a->count); break;
    case SYNC_ACT_TRAINER_FREEZE:
        m->played.freezing = true;
        m->played.freeze_fragment = a->fragment;
        played_tick(m);
        break;
    case SYNC_ACT_TRAINER_RESET: reset(&m->played); say(m, done); break;
    case SYNC_ACT_TRAINER_APPLY:
    case SYNC_ACT_TRAINER_MOMENTS_IMPORT: say(m, done); break;
    case SYNC_ACT_TRAINER_MOMENTS_EXPORT:
        say(m, (struct sync_event){.type = SYNC_EV_TRAINER_MOMENTS, .local = m->played.local});
        break;
    default: break;
    }
}

void played_begin(struct member *m) {
    struct played *p = &m->played;
    const struct msg_outer *o = m->genesis.outer;
    struct err err;
    size_t n = m->me->elements, chunks = m->me->chunks;
    p->fragment_of = take_memory(chunks);
    if (proto_model_fragments(m->genesis.model, o->chunk_elements, o->fragments, p->fragment_of,
                              &err))
        member_die(m, "genesis", &err);
    p->local = take_memory(n * sizeof *p->local);
    p->slot = take_memory(n * sizeof *p->slot);
    p->ops = take_memory(chunks);
    memset(p->ops, 0, chunks);
    p->noise = take_floats(NOISE_ELEMENTS, NOISE_STD, m->me->member);
    p->answer = evtimer_new(m->base, on_answer, m);
    p->steps = 1; /* with steps behind it, it asks nobody for second moments */
    sync_set_slot(m->sync, p->slot, p->ops);
    say(m, (struct sync_event){.type = SYNC_EV_TRAINER_UP});
}
