/* fuzz_sync.c - a member that lies to other members, in the middle of a run. Members 1 (aggregates) and
 * 2 (trains, holds) are honest, member 3 trains too and has its messages to them changed, swallowed and
 * made up. Whatever it says, no honest member fails an assert, and two that stand at the same ledger
 * index hold the same bits. The coordinator, the disks and the trainers are those of test_sync.c.
 *
 * Input: steps, see play(); each message of member 3 on its way takes a byte that says what happens to
 * it, 0 that nothing does. */
#pragma GCC diagnostic ignored "-Wunused-function" /* of the rig, which was made for many tests */
#include "tests/sync_rounds.h"

#include "tests/fuzz/form.h"

#define HOSTILE 3
#define STEPS_MAX 150
#define ROUNDS_MAX 6

static const struct plan_spec spec = {.contributor = {2, HOSTILE}, .count = 2, .aggregator = 1, .holder = 2};

#define ID_OF_MESSAGE(NAME, record, number) number,
static const uint8_t types[] = {PROTO_MESSAGES(ID_OF_MESSAGE)};

static struct form_memory memory;
static struct fuzz_input input;
static struct proto_buffer *recording; /* a sample that is being made: nobody lies */

static void init(void) {
    struct err err;
    int failed = proto_init(&err);
    assert(!failed);
}

/* ---- the liar ----------------------------------------------------------------------------------- */

static void deliver(struct rig *r, uint32_t to, uint8_t type, uint64_t plan, const struct proto_buffer *b) {
    enum proto_record which = (enum proto_record)proto_record_of_type(type);
    union any_record msg;
    if (proto_decode(b->data, b->length, which, &msg, NULL)) return; /* the channel would have closed */
    struct frame f = {.type = type, .length = (uint32_t)b->length, .term = r->term, .session = 1, .plan = plan};
    step(r, to, &(struct sync_event){.type = SYNC_EV_PEER_MESSAGE, .peer = HOSTILE, .frame = f, .msg = &msg});
    proto_decoded_release(which, &msg);
}

static void inject(struct rig *r, uint32_t to, uint8_t type, uint64_t plan) {
    enum proto_record which = (enum proto_record)proto_record_of_type(type);
    union any_record filled;
    form_fill(&memory, &input, which, &filled);
    struct proto_buffer b = record_encoded(which, &filled);
    deliver(r, to, type, plan, &b);
    proto_decoded_release(which, &filled);
    proto_buffer_release(&b);
}

/* One byte of it is another; mostly one of the data. */
static void flip(struct rig *r, const struct sent *m) {
    struct proto_buffer b = record_encoded((enum proto_record)proto_record_of_type(m->frame.type), m->msg);
    size_t where = fuzz_le(&input, 2) % b.length;
    uint8_t by = fuzz_u8(&input);
    b.data[where] ^= by ? by : 1;
    deliver(r, m->to, m->frame.type, m->frame.plan, &b);
    proto_buffer_release(&b);
}

enum { PASS, CHANGE, SWALLOW, TWICE, OTHER_PLAN, OTHER_TYPE, FLIP };

static bool lie(struct rig *r, struct sent *m) {
    enum proto_record which = (enum proto_record)proto_record_of_type(m->frame.type);
    const uint8_t truth = PASS;
    form_learn(&memory, which, m->msg);
    if (m->from != HOSTILE) return true;
    if (recording) proto_buffer_append(recording, &truth, 1);
    switch (recording ? truth : fuzz_u8(&input) % 8) {
    case CHANGE: inject(r, m->to, m->frame.type, m->frame.plan); return false;
    case SWALLOW: return false;
    case TWICE: inject(r, m->to, m->frame.type, m->frame.plan); return true;
    case OTHER_PLAN: m->frame.plan += fuzz_u8(&input) - 128u; return true;
    case OTHER_TYPE: inject(r, m->to, types[fuzz_u8(&input) % sizeof types], m->frame.plan); return true;
    case FLIP: flip(r, m); return false;
    default: return true;
    }
}

/* ---- the honest rest ---------------------------------------------------------------------------- */

static uint64_t used(const struct rig *r) { return r->rounds * STEPS * BATCH; }

static bool alive(const struct rig *r, uint32_t id) { return r->node[id].sync != NULL; }

/* Has the member said READY for the round that is next? */
static bool is_ready(const struct rig *r, uint32_t id) {
    const struct sent *s = last_sent(r, id, MSG_READY);
    return s && ((const struct msg_ready *)s->msg)->round == r->rounds;
}

static const struct msg_shard_report *reported(const struct rig *r, uint32_t id) {
    const struct sent *s = last_sent(r, id, MSG_SHARD_REPORT);
    return s && s->frame.plan == r->plan ? s->msg : NULL;
}

static bool can_commit(const struct rig *r) {
    const struct msg_shard_report *a = reported(r, 1), *b = reported(r, 2);
    return a && b && a->results_count == CHUNKS && b->results_count == CHUNKS && a->summed_count == b->summed_count &&
           a->round == r->rounds && b->round == r->rounds &&
           !memcmp(a->results, b->results, CHUNKS * sizeof *a->results);
}

static void try_plan(struct rig *r) {
    if (alive(r, 2) && alive(r, HOSTILE) && is_ready(r, 2) && is_ready(r, HOSTILE) && r->rounds < ROUNDS_MAX)
        say_plan(r, &spec);
}

static void try_commit(struct rig *r) {
    if (r->rounds == ROUNDS_MAX || !alive(r, 1) || !is_ready(r, 2) || !is_ready(r, HOSTILE) || !can_commit(r)) return;
    struct digest root = look(r, 1).state_root;
    commit(r, &spec, &root);
    for (uint32_t id = 1; id < MEMBERS; id++)
        if (alive(r, id) && r->node[id].connected) announce(r, id, &spec, r->node[id].trains ? used(r) : 0);
}

/* Let it fetch the newest state: the coordinator knows the root from an honest member that has it. */
static void resync(struct rig *r, uint32_t id, bool liar_gives) {
    uint32_t other = id == 1 ? 2 : 1;
    struct msg_address donors[2] = {{HOSTILE, proto_str("10.0.0.1"), 7000 + HOSTILE},
                                    {other, proto_str("10.0.0.1"), 7000 + other}};
    struct msg_resync m = {
        .index = r->base_index, .donors = donors + !liar_gives, .donors_count = 1u + liar_gives};
    if (!r->rounds || !alive(r, other)) return;
    struct sync_view v = look(r, other);
    if (v.state_index != r->base_index || v.chunks_missing) return;
    m.root = v.state_root;
    say(r, id, MSG_RESYNC, 0, &m);
}

/* What a member still holds when all its rounds were summed. */
static void say_lease(struct rig *r, uint32_t id) {
    struct msg_lease lease = lease_of(id, used(r));
    say(r, id, MSG_LEASES, 0, &(struct msg_leases){.leases = &lease, .leases_count = 1});
}

/* The member dies and comes back, with or without what it had; the liar is among its donors, or is not. */
static void restart(struct rig *r, uint32_t id, bool wiped, bool liar_gives) {
    node_kill(r, id);
    if (wiped) disk_wipe(&r->node[id].disk);
    node_start(r, id);
    dial_coordinator(r, id);
    welcome(r, id, NULL, 0);
    resync(r, id, liar_gives);
    if (!r->node[id].trains) return;
    say_lease(r, id);
    trainer_up(r, id, r->node[id].steps);
}

/* Time passes with a coordinator that answers. */
static void pass_tended(struct rig *r, uint32_t ms) {
    for (uint32_t id = 1; id <= HOSTILE; id++) {
        if (!alive(r, id)) continue;
        if (r->node[id].connected) {
            say(r, id, MSG_HEARTBEAT_ACK, 0, &(struct msg_heartbeat_ack){.tokens_committed = 1000 * r->rounds});
        } else {
            dial_coordinator(r, id);
            welcome(r, id, NULL, 0);
            resync(r, id, false);
        }
    }
    pass(r, ms);
}

static void try_train(struct rig *r, uint32_t id) {
    if (alive(r, id) && r->node[id].trainer_up && !r->node[id].frozen) train(r, id);
}

static void check_same_state(const struct rig *r) {
    struct sync_view a, b;
    if (!alive(r, 1) || !alive(r, 2)) return;
    sync_look(r->node[1].sync, &a);
    sync_look(r->node[2].sync, &b);
    if (a.state_index == b.state_index && !a.chunks_missing && !b.chunks_missing) assert_same_state(r, 1, 2);
}

enum { STEP_TRAIN_2, STEP_TRAIN_3, STEP_PLAN, STEP_COMMIT, STEP_PASS, STEP_INJECT, STEP_LINK, STEP_RESTART };

static void play(struct rig *r, uint8_t first) {
    uint32_t who = 1 + (first >> 3) % 3;
    switch (first & 7) {
    case STEP_TRAIN_2: try_train(r, 2); break;
    case STEP_TRAIN_3: try_train(r, HOSTILE); break;
    case STEP_PLAN: try_plan(r); break;
    case STEP_COMMIT: try_commit(r); break;
    case STEP_PASS: pass_tended(r, 50u << (first >> 3) % 5); break;
    case STEP_INJECT:
        inject(r, 1 + (first >> 3) % 2, types[fuzz_u8(&input) % sizeof types], r->plan);
        break;
    case STEP_LINK:
        if (r->link[HOSTILE][1 + who % 2]) hang_up(r, HOSTILE, 1 + who % 2);
        else dial(r, HOSTILE, 1 + who % 2);
        break;
    case STEP_RESTART: restart(r, who, first & 64, first & 128); break;
    }
    settle(r);
    check_same_state(r);
}

static struct rig *begin(void) {
    void *state;
    int failed = rig_setup(&state);
    assert(!failed);
    struct rig *r = state;
    r->spoil = lie;
    node_new(r, 1, false);
    node_with_work(r, 2);
    node_with_work(r, HOSTILE);
    return r;
}

static void end(struct rig *r) {
    void *state = r;
    rig_teardown(&state);
    form_memory_release(&memory);
}

/* An input is valid when a round is committed. */
static bool take(const uint8_t *bytes, size_t length) {
    input = (struct fuzz_input){bytes, length};
    struct rig *r = begin();
    for (int n = 0; n < STEPS_MAX && input.left && r->sent_count < SENT_MAX / 2; n++) play(r, fuzz_u8(&input));
    bool committed = r->rounds > 0;
    end(r);
    return committed;
}

static void sample(const struct fuzz_sink *out, const char *name, const uint8_t *step, size_t steps) {
    struct proto_buffer script;
    proto_buffer_init(&script, 1u << 16);
    recording = &script;
    struct rig *r = begin();
    for (size_t i = 0; i < steps; i++) {
        proto_buffer_append(&script, &step[i], 1);
        play(r, step[i]);
    }
    end(r);
    recording = NULL;
    out->sample(out->arg, name, script.data, script.length);
    proto_buffer_release(&script);
}

#define LONG_PASS (STEP_PASS | 2 << 3)
#define ROUND                                                                                      \
    STEP_TRAIN_2, STEP_TRAIN_2, STEP_TRAIN_2, STEP_TRAIN_3, STEP_TRAIN_3, STEP_TRAIN_3, STEP_PASS, \
        STEP_PLAN, LONG_PASS, STEP_COMMIT, LONG_PASS
#define RESTART_WIPED(id) (STEP_RESTART | ((id) - 1) << 3 | 64 | 128)

static void samples(const struct fuzz_sink *out) {
    static const uint8_t rounds[] = {ROUND, ROUND};
    static const uint8_t catch_up[] = {ROUND, RESTART_WIPED(2), LONG_PASS, ROUND, RESTART_WIPED(1), LONG_PASS};
    static const uint8_t lost_link[] = {ROUND, STEP_LINK, STEP_LINK | 1 << 3, ROUND, STEP_LINK, LONG_PASS};
    sample(out, "rounds", rounds, sizeof rounds);
    sample(out, "catch-up", catch_up, sizeof catch_up);
    sample(out, "lost-link", lost_link, sizeof lost_link);
}

const struct fuzz_target fuzz_sync = {"sync", init, take, samples};
