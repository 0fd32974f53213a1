/* world.c - the simulated clock, what a seed chooses, and the loop over all events. */
#include "tests/sim/sim.h"

#include "proto/model.h"

#include <stdlib.h>
#include <string.h>

/* ---- randomness, trace, violations ------------------------------------------------------------- */

uint64_t sim_random(struct sim_world *w, uint64_t below) { /* splitmix64 */
    uint64_t z = (w->random += 0x9e3779b97f4a7c15ull);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return below ? (z ^ z >> 31) % below : 0;
}

bool sim_chance(struct sim_world *w, uint32_t per_mille) { return sim_random(w, 1000) < per_mille; }

void sim_trace(struct sim_world *w, const char *format, ...) {
    if (!w->trace) return;
    va_list ap;
    va_start(ap, format);
    printf("%9.3f  ", (double)w->now / 1000);
    vprintf(format, ap);
    putchar('\n');
    va_end(ap);
}

void sim_violation(struct sim_world *w, const char *format, ...) {
    va_list ap;
    va_start(ap, format);
    vsnprintf(w->violation, sizeof w->violation, format, ap);
    va_end(ap);
    longjmp(w->stop, 1);
}

/* ---- the queue of events: a binary heap by (time, order) --------------------------------------- */

static bool before(const struct sim_event *a, const struct sim_event *b) {
    return a->at != b->at ? a->at < b->at : a->order < b->order;
}

static struct sim_event *push(struct sim_world *w, const struct sim_event *ev) {
    if (w->heap_count == w->heap_capacity) {
        w->heap_capacity = w->heap_capacity ? 2 * w->heap_capacity : 1024;
        w->heap = realloc(w->heap, w->heap_capacity * sizeof *w->heap);
    }
    uint32_t i = w->heap_count++;
    while (i && before(ev, &w->heap[(i - 1) / 2])) {
        w->heap[i] = w->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    w->heap[i] = *ev;
    return &w->heap[i];
}

static struct sim_event pop(struct sim_world *w) {
    struct sim_event first = w->heap[0], last = w->heap[--w->heap_count];
    uint32_t i = 0, child;
    while ((child = 2 * i + 1) < w->heap_count) {
        if (child + 1 < w->heap_count && before(&w->heap[child + 1], &w->heap[child])) child++;
        if (!before(&w->heap[child], &last)) break;
        w->heap[i] = w->heap[child];
        i = child;
    }
    if (w->heap_count) w->heap[i] = last;
    return first;
}

bool sim_at_core(enum sim_kind k) {
    return k == SIM_TO_CORE || k == SIM_CORE_CLOSED || k == SIM_CORE_OPENED || k == SIM_CORE_TICK ||
           k == SIM_CORE_OPERATOR;
}

struct sim_event *sim_schedule(struct sim_world *w, uint64_t in_ms, enum sim_kind kind,
                               uint32_t member) {
    struct sim_event ev = {
        .at = w->now + in_ms, .order = ++w->order, .kind = kind, .member = member};
    bool of_trainer =
        kind == SIM_TRAINER_STEP || kind == SIM_TRAINER_REPLY || kind == SIM_TRAINER_UP;
    if (of_trainer) ev.life = w->member[member].trainer.generation;
    else if (!sim_at_core(kind) && member < SIM_MEMBERS_MAX) ev.life = w->member[member].life;
    return push(w, &ev);
}

/* ---- what a seed chooses ----------------------------------------------------------------------- */

static uint32_t between(struct sim_world *w, uint32_t least, uint32_t most) {
    return least + (uint32_t)sim_random(w, most - least + 1);
}

static void choose_model(struct sim_world *w) {
    struct err err;
    uint32_t fragments = sim_chance(w, 400) ? 1 : between(w, 2, SIM_FRAGMENTS_MAX);
    w->model = (struct msg_model){.layers = between(w, fragments > 1 ? 2 : 1, 4),
                                  .width = 4,
                                  .heads = 1,
                                  .kv_heads = 1,
                                  .ffn = between(w, 1, 8),
                                  .vocabulary = between(w, 4, 15),
                                  .sequence = 10,
                                  .rope_theta = 1e4,
                                  .norm_eps = 1e-5,
                                  .tied = 1};
    w->elements = (uint32_t)proto_model_elements(&w->model);
    for (;; fragments--) { /* not every number of chunks can be dealt to so many */
        for (int tries = 0; tries < 8; tries++) {
            uint32_t pieces = between(w, fragments, fragments == 1 ? 6 : 16);
            w->chunk_elements = w->elements / pieces + 1;
            w->chunks = (w->elements + w->chunk_elements - 1) / w->chunk_elements;
            if (w->chunks <= SIM_CHUNKS_MAX &&
                !proto_model_fragments(&w->model, w->chunk_elements, fragments, w->fragment_of,
                                       &err))
                goto found;
        }
    }
found:
    w->fragments = fragments;
    for (uint32_t c = 0; c < w->chunks; c++) {
        uint32_t f = w->fragment_of[c];
        w->place_of[c] = w->fragment_chunks[f]++;
        w->chunk_at[f][w->place_of[c]] = c;
    }
}

static void choose_outer(struct sim_world *w) {
    bool all = sim_chance(w, 300), overlaps = sim_chance(w, 550);
    static const float alphas[] = {0, 0.25f, 0.5f};
    w->outer = (struct msg_outer){.inner_steps = between(w, 2, 4) * (w->fragments > 1 ? 2 : 1),
                                  .round_ms = 3000,
                                  .quorum = all ? PROTO_MEMBERS_MAX : between(w, 1, 3),
                                  .grace_ms = between(w, 200, 1200),
                                  .lr = 0.7f,
                                  .momentum = 0.9f,
                                  .alpha = alphas[sim_random(w, 3)],
                                  .contribution_codec = sim_chance(w, 850) ? OUTER_INT8 : OUTER_FP32,
                                  .result_codec = sim_chance(w, 500) ? OUTER_INT8 : OUTER_FP32,
                                  .chunk_elements = w->chunk_elements,
                                  .fragments = w->fragments,
                                  .overlap = overlaps ? between(w, 1, 6) : 0,
                                  .shard_chunks = between(w, 1, 4),
                                  .audits = sim_chance(w, 500) ? 0 : between(w, 1, 2),
                                  .lr_rule = (uint8_t)sim_random(w, 2),
                                  .clip_factor = sim_chance(w, 500) ? 0 : 2,
                                  .ramp_rounds = between(w, 0, 2),
                                  .heartbeat_ms = 400,
                                  .silence_ms_max = 3000,
                                  .lease_samples = between(w, 6, 26),
                                  .checkpoint_rounds = sim_chance(w, 500) ? 3 : 0,
                                  .fixed_membership = sim_chance(w, 30)};
}

/* Samples for some rounds of each fragment. */
static void choose_data(struct sim_world *w) {
    uint32_t round = (w->members - 1) * w->outer.inner_steps * w->inner.batch;
    uint64_t samples = 30 + sim_random(w, 60) + (uint64_t)round * between(w, 1, 6) / 2;
    w->corpus = (struct msg_corpus){.manifest_url = proto_str("file:///corpus.json"),
                                    .tokenizer = proto_str("bytes"),
                                    .samples = samples < SIM_SAMPLES_MAX ? samples : SIM_SAMPLES_MAX,
                                    .shuffle_seed = w->seed};
    if (sim_chance(w, 150)) /* the tokens run out before the data */
        w->inner.total_tokens = w->model.sequence * (w->corpus.samples / 2 + 1);
}

static void choose_weird(struct sim_world *w) {
    static const struct {
        enum sim_injected fault;
        uint32_t per_mille;
    } rare[] = {{SIM_SUCCESSOR, 300}, {SIM_DRIP, 250},   {SIM_IMAGE, 200},  {SIM_STORE_IMAGE, 100},
                {SIM_COPY, 150},      {SIM_REVOKE, 80},  {SIM_LEAVE, 80},   {SIM_OPERATOR_PAUSE, 80},
                {SIM_HOLDERS, 200},   {SIM_BLACKOUT, 150}, {SIM_IN_PLAN, 250}, {SIM_REWIND, 120}};
    for (size_t i = 0; i < sizeof rare / sizeof *rare; i++)
        if (sim_chance(w, rare[i].per_mille)) w->weird |= 1ull << rare[i].fault;
    if (sim_has(w, SIM_REWIND)) w->outer.checkpoint_rounds = between(w, 1, 3);
}

static void choose_member(struct sim_world *w, uint32_t slot) {
    struct sim_member *m = &w->member[slot];
    m->slot = slot;
    m->trains = slot > 0;
    m->reachable = slot < 2 || sim_chance(w, 600);
    m->step_ms = between(w, 20, 320);
    m->uplink = sim_chance(w, 300) ? between(w, 2, 10) : between(w, 20, 200);
    m->disk.world = m->image.world = w;
    m->disk.owner = m->image.owner = slot;
}

/* At most one of the members lies. */
static void choose_liar(struct sim_world *w) {
    struct sim_member *m = &w->member[1 + sim_random(w, w->members - 1)];
    uint64_t kind = sim_random(w, 24);
    if (w->members < 4 || kind > 2) return;
    m->lie = kind == 0 ? SYNC_FAULT_LIES_SUM : kind == 1 ? SYNC_FAULT_LIES_NORM
                                                         : SYNC_FAULT_LIES_NAN;
    m->reachable |= kind == 0;
    w->injected[kind == 0 ? SIM_LIAR_SUM : SIM_LIAR_NORM]++;
}

static void choose(struct sim_world *w) {
    w->swarm = sim_chance(w, 8);
    w->members = 1 + (w->swarm ? between(w, 9, 50) : between(w, 2, sim_chance(w, 200) ? 8 : 4));
    w->copy_slot = w->members;
    choose_model(w);
    w->inner = (struct msg_inner){.batch = between(w, 1, 3),
                                  .lr = 1e-3,
                                  .beta1 = .9,
                                  .beta2 = .95,
                                  .eps = 1e-8,
                                  .total_tokens = 1u << 30};
    choose_outer(w);
    choose_data(w);
    w->delay_ms_max = sim_chance(w, 500) ? 20 : 150;
    w->duplicate_per_mille = sim_chance(w, 400) ? 0 : sim_chance(w, 500) ? 20 : 150;
    w->streams = between(w, 1, SIM_STREAMS_MAX);
    w->fault_every_ms = 800 + (uint32_t)sim_random(w, 4000);
    w->faults_until = sim_chance(w, 100) ? 0 : 8000 + sim_random(w, 40000);
    if (w->faults_until) choose_weird(w);
    for (uint32_t i = 0; i <= w->copy_slot; i++) choose_member(w, i);
    choose_liar(w);
    w->genesis = (struct msg_genesis){.version = 1,
                                      .name = proto_str("simulated"),
                                      .root_key = w->root.key,
                                      .model = &w->model,
                                      .model_count = 1,
                                      .inner = &w->inner,
                                      .inner_count = 1,
                                      .outer = &w->outer,
                                      .outer_count = 1,
                                      .corpus = &w->corpus,
                                      .corpus_count = 1,
                                      .init_seed = w->seed,
                                      .init_std = 0.02f,
                                      .checkpoint_url = proto_str(w->seed % 2 ? "s3://bucket/checkpoints"
                                                                              : "file:///checkpoints"),
                                      .init_spent = w->init_spent};
    if (w->outer.contribution_codec == OUTER_INT8 && w->seed % 3 == 0) w->outer.contribution_codec = OUTER_FP4;
    if (w->outer.result_codec == OUTER_INT8 && w->seed % 5 == 0) w->outer.result_codec = OUTER_FP4;
    if (w->seed % 7 != 3 || w->inner.total_tokens < 1u << 30) return; /* it goes on with another run's data */
    w->init_spent[0] = (struct msg_range){w->seed % 3, 1 + w->seed % 5};
    w->init_spent[1] = (struct msg_range){10, 1 + w->seed % 9};
    w->genesis.init_spent_count = 1 + w->seed % 2;
}

uint32_t sim_chunk_elements(const struct sim_world *w, uint32_t chunk) {
    uint32_t left = w->elements - chunk * w->chunk_elements;
    return left < w->chunk_elements ? left : w->chunk_elements;
}

size_t sim_encoded(const struct sim_world *w, uint32_t fragment, uint32_t k, uint8_t codec,
                   size_t *offset) {
    *offset = k * outer_encoded_bytes((enum outer_codec)codec, w->chunk_elements);
    return outer_encoded_bytes((enum outer_codec)codec,
                               sim_chunk_elements(w, w->chunk_at[fragment][k]));
}

/* ---- entries that no coordinator writes ---------------------------------------------------------- */

void sim_write_entry(struct sim_world *w, uint64_t term, enum ledger_kind kind,
                     enum proto_record which, const void *body) {
    struct digest previous = {{0}};
    struct proto_buffer b;
    struct err err;
    uint64_t index = w->store.table[CORE_LEDGER].count;
    const struct sim_row *last =
        index ? sim_row_find(&w->store.table[CORE_LEDGER], index - 1) : NULL;
    if (last) previous = digest_of(last->value, last->length);
    proto_buffer_init(&b, PROTO_BLOB_BYTES_MAX);
    if (core_entry_encode(&b, index, &previous, term, kind, which, body, &err))
        sim_violation(w, "an entry by hand: %s", err.msg);
    struct core_write write = {.table = CORE_LEDGER,
                               .key = index,
                               .value = b.data,
                               .value_length = (uint32_t)b.length};
    sim_store_write(w, term, &write);
    struct core_action a = {.writes = &write, .write_count = 1};
    oracle_persist(w, &a);
    proto_buffer_release(&b);
}

static void init_run(struct sim_world *w) {
    struct proto_buffer b;
    struct err err;
    proto_buffer_init(&b, PROTO_BLOB_BYTES_MAX);
    if (proto_encode(&b, RECORD_genesis, &w->genesis, &err))
        sim_violation(w, "genesis: %s", err.msg);
    w->run = digest_of(b.data, b.length);
    proto_buffer_release(&b);
    sim_write_entry(w, 0, LEDGER_GENESIS, RECORD_genesis, &w->genesis);
    sim_write_entry(w, 0, LEDGER_DELEGATION, RECORD_delegation,
                    &(struct msg_delegation){.run = w->run, .key = w->online.key, .number = 1});
    w->announced_head = 1;
    oracle_begin(w);
}

static void identities(struct sim_world *w) {
    uint8_t seed[32] = {1};
    identity_from_seed(&w->root, seed);
    seed[0] = 2;
    identity_from_seed(&w->online, seed);
    for (uint32_t i = 0; i < w->members; i++) {
        seed[0] = (uint8_t)(10 + i);
        identity_from_seed(&w->member[i].identity, seed);
    }
}

/* ---- the loop ---------------------------------------------------------------------------------- */

static bool finished(const struct sim_world *w) {
    for (uint32_t i = 1; i < w->members; i++) /* the coordinator's own node stays */
        if (!w->member[i].complete) return false;
    return true;
}

/* Whoever is stopped gets its input later, in order; its clock catches up after the input that is there. */
static bool defer(struct sim_world *w, struct sim_event *e) {
    struct sim_core *core = e->kind == SIM_CORE_OPERATOR ? sim_core_active(w)
                                                         : sim_core_of(w, e->life);
    uint64_t until = 0;
    if (e->kind == SIM_CORE_TICK) until = core ? core->paused_until : 0;
    else if (sim_at_core(e->kind)) until = core ? core->input_until : 0;
    else if (e->member < SIM_MEMBERS_MAX && e->kind != SIM_MEMBER_START && e->kind != SIM_COPY_ENDS &&
             e->kind != SIM_MEMBER_KILL)
        until = w->member[e->member].paused_until;
    if (until <= w->now) return false;
    bool late = e->kind == SIM_CORE_TICK || e->kind == SIM_MEMBER_TICK;
    e->at = until + late;
    if (late) e->order = ++w->order;
    push(w, e);
    return true;
}

static void deliver(struct sim_world *w, struct sim_event *e) {
    struct sim_member *m = &w->member[e->member < SIM_MEMBERS_MAX ? e->member : 0];
    switch (e->kind) {
    case SIM_FAULT: sim_fault(w); break;
    case SIM_CORE_START:
        if (!sim_core_active(w)) sim_core_start(w);
        break;
    case SIM_MEMBER_START:
        if (!m->alive && !m->gone) sim_member_start(w, m);
        break;
    case SIM_MEMBER_KILL:
        if (m->alive && e->life == m->life) sim_member_kill(w, m, false, e->value);
        break;
    case SIM_COPY_ENDS: /* with its disk, so not while only that has something */
        if (!sim_others_have_head(w, m)) {
            sim_schedule(w, 1000, SIM_COPY_ENDS, m->slot);
            break;
        }
        sim_member_kill(w, m, false, UINT64_MAX);
        m->id = 0;
        memcpy(w->destroyed_rounds, w->next_round, sizeof w->destroyed_rounds);
        break;
    case SIM_MEMBER_DIAL:
        if (m->alive && e->life == m->life) sim_dial_coordinator(w, m);
        break;
    default: sim_at_core(e->kind) ? sim_core_event(w, e) : sim_member_event(w, m, e);
    }
}

/* The longest a run may take after the last fault: each round's result has to reach every member over
 * uplinks of a few bytes a millisecond, at worst through one of them. */
static uint64_t grace_ms(const struct sim_world *w) {
    uint64_t swarm_ms = 20000ull * w->members;
    return swarm_ms > 400000 ? swarm_ms : 400000;
}

__attribute__((noinline)) static void trace_members(struct sim_world *w) {
    for (uint32_t i = 0; i <= w->copy_slot && w->trace; i++) {
        struct sim_member *m = &w->member[i];
        struct sync_view v = {0};
        if (m->sync) sync_look(m->sync, &v);
        sim_trace(w,
                  "slot %u: member %u%s%s%s, ledger %llu, state %llu, %u chunks missing, %s, plan %llu, "
                  "%llu samples uncommitted%s; trainer%s%s%s%s, %u ranges, %u commands",
                  i, m->id, m->alive ? "" : ", dead", m->complete ? ", complete" : "",
                  m->conn ? "" : ", not connected", LLU(v.head_index), LLU(v.state_index),
                  v.chunks_missing, v.phase ? v.phase : "", LLU(v.plan), LLU(v.samples_uncommitted),
                  m->sync && sync_has_work(m->sync) ? ", has work" : "",
                  m->trainer.alive ? " alive" : "", m->trainer.has_parameters ? "" : " blank",
                  m->trainer.waits ? " waits" : "", m->trainer.stepping ? " steps" : "",
                  m->trainer.queued, m->trainer.command_count);
    }
}

_Noreturn static void never_ends(struct sim_world *w) {
    struct core_view v = {0};
    uint64_t rounds = 0;
    if (sim_core_active(w)) core_look(sim_core_active(w)->core, w->now, &v);
    for (uint32_t f = 0; f < w->fragments; f++) rounds += w->next_round[f];
    trace_members(w);
    sim_violation(w,
                  "the run does not end: %llu s after the last fault it has %llu commits, phase %s, "
                  "%u live, %llu samples free, %llu spent of %llu",
                  LLU(grace_ms(w) / 1000), LLU(rounds), v.phase, v.members_live, LLU(v.samples_free),
                  LLU(v.samples_spent), LLU(w->corpus.samples));
}

static void loop(struct sim_world *w) {
    init_run(w);
    sim_schedule(w, 0, SIM_CORE_START, SIM_COORDINATOR);
    for (uint32_t i = 0; i < w->members; i++)
        sim_schedule(w, 10 + (i > 2 ? sim_random(w, 15000) : sim_random(w, 500)), SIM_MEMBER_START,
                     i);
    sim_schedule(w, 3000, SIM_FAULT, SIM_COORDINATOR);
    while (!finished(w) && !w->failed) {
        struct sim_event e = pop(w);
        w->now = e.at;
        w->events++;
        if (e.kind == SIM_TO_CORE) oracle_arrived(w, &e);
        if (!defer(w, &e)) { /* else its payload went along */
            w->current_payload = e.payload;
            deliver(w, &e);
            w->current_payload = NULL;
            free(e.payload);
        }
        if (w->now > w->faults_until + grace_ms(w)) never_ends(w);
    }
    if (!w->failed) oracle_end(w);
}

int sim_run(struct sim_world *w, uint64_t seed, bool trace) {
    memset(w, 0, sizeof *w);
    w->seed = w->random = seed;
    w->trace = trace;
    w->core_fault = core_fault;
    w->sync_fault = sync_fault;
    choose(w);
    identities(w);
    w->genesis.root_key = w->root.key;
    sim_trace(w,
              "seed %llu: %u members, %u elements in %u chunks of %u, %u fragments, %llu samples, "
              "H=%u, overlap %u, alpha %.2f, quorum %u, audits %u, faults until %.1f s",
              LLU(seed), w->members, w->elements, w->chunks, w->chunk_elements, w->fragments,
              LLU(w->corpus.samples), w->outer.inner_steps, w->outer.overlap,
              (double)w->outer.alpha, w->outer.quorum, w->outer.audits,
              (double)w->faults_until / 1000);
    if (setjmp(w->stop)) return -1;
    loop(w);
    return 0;
}

void sim_release(struct sim_world *w) {
    while (w->heap_count) free(pop(w).payload);
    free(w->heap);
    free(w->current_payload);
    for (int i = 0; i < SIM_CORES; i++) {
        core_destroy(w->cores[i].core);
        core_actions_release(&w->cores[i].out);
    }
    sync_actions_release(&w->sync_out);
    sim_store_release(&w->store);
    sim_store_release(&w->store_image);
    for (uint32_t i = 0; i < SIM_MEMBERS_MAX; i++) {
        sync_destroy(w->member[i].sync);
        sim_disk_release(&w->member[i].disk);
        sim_disk_release(&w->member[i].image);
    }
    for (uint32_t i = 0; i < w->contribution_count; i++) {
        free(w->contributions[i].bytes);
        free(w->contributions[i].effect);
    }
    free(w->contributions);
    sim_checkpoints_release(w);
    for (uint32_t i = 0; i < w->state_count; i++) free(w->states[i].values);
    free(w->states);
    for (uint32_t i = 0; i < SIM_ENTRIES_MAX; i++) free(w->entry_bytes[i]);
}
