/* share.c - a checkpoint whose parts members send and look at, without bytes: the writer offers parts,
 * members do them or not, and the oracle notes who did what. The duty: no manifest is signed before
 * everything that a member sent was looked at by another, or by the writer. */
#include "tests/sim/sim.h"

/* What an event carries: part, whether it is a look, and whether this went well. */
static uint64_t pack(uint32_t part, bool check, bool done) { return part << 2 | check << 1 | done; }

static void offer(struct sim_world *w, struct sim_member *m, uint32_t part, bool check) {
    struct sim_share *h = &w->share;
    struct msg_checkpoint_part msg = {.index = h->index, .part = part, .check = check,
                                      .chunk = part % w->chunks,
                                      .object = proto_str("tensors"), .url = proto_str("https://store/part")};
    h->open++;
    sim_member_step(w, m, &(struct sync_event){.type = SYNC_EV_CHECKPOINT_OFFER, .msg = &msg});
}

/* Of the checkpoint in progress: when another has begun by then, nobody waits for it. */
static struct sim_event *later(struct sim_world *w, struct sim_member *m, enum sim_kind kind, uint64_t ms, uint64_t value) {
    struct sim_event *e = sim_schedule(w, ms, kind, m->slot);
    e->value = value;
    e->frame.plan = w->share.index;
    return e;
}

/* The writer looks itself, and says so. */
static void look(struct sim_world *w, struct sim_member *m, uint32_t part) {
    struct msg_checkpoint_part_done msg = {.index = w->share.index, .part = part, .check = 1, .done = 1};
    w->share.seen_by[part] |= 1;
    sim_member_step(w, m, &(struct sync_event){.type = SYNC_EV_CHECKPOINT_PART, .msg = &msg});
}

/* First all are sent, then all are looked at, then comes the manifest. */
static void go_on(struct sim_world *w, struct sim_member *m) {
    struct sim_share *h = &w->share;
    bool sent = true, seen = true;
    if (h->open) return;
    for (uint32_t i = 0; i < h->parts; i++) sent = sent && h->sent_by[i], seen = seen && h->seen_by[i];
    if (seen) later(w, m, SIM_CHECKPOINT, 10 + sim_random(w, 200), 0);
    for (uint32_t i = 0; sent && !seen && i < h->parts; i++)
        if (h->alone || h->sent_by[i] == 1) look(w, m, i);
    for (uint32_t i = 0; sent && !seen && i < h->parts && h->index; i++)
        if (!h->seen_by[i]) offer(w, m, i, true);
    if (sent && !seen && !h->open) go_on(w, m);
}

void sim_share_begin(struct sim_world *w, struct sim_member *m, const struct msg_checkpoint_write *msg) {
    struct sim_share *h = &w->share;
    struct sync_view v;
    sync_look(m->sync, &v);
    *h = (struct sim_share){.index = msg->index, .term = v.term, .parts = msg->shared ? 1 + msg->index % SIM_PARTS_MAX : 0};
    later(w, m, SIM_PART, 50 + sim_random(w, 300), UINT64_MAX); /* it has read them */
}

static void begin_offers(struct sim_world *w, struct sim_member *m) {
    struct sim_share *h = &w->share;
    for (uint32_t i = 0; i < h->parts; i++) {
        if (h->alone) h->sent_by[i] |= 1;
        else offer(w, m, i, false);
    }
    go_on(w, m);
}

void sim_share_answer(struct sim_world *w, struct sim_member *m, const struct msg_checkpoint_part_done *msg) {
    struct sim_event *e = sim_schedule(w, 1, SIM_PART, m->slot);
    e->value = pack(msg->part, msg->check, msg->done) | 1ull << 40;
    e->frame.plan = msg->index;
}

void sim_share_alone(struct sim_world *w, struct sim_member *m) {
    w->share.alone = true;
    later(w, m, SIM_PART, 1, 1ull << 41);
}

void sim_share_asked(struct sim_world *w, struct sim_member *m, const struct msg_checkpoint_part *msg) {
    struct sim_event *e = sim_schedule(w, 5 + sim_random(w, sim_chance(w, 50) ? 20000 : 400), SIM_PART,
                                       m->slot);
    e->value = pack(msg->part, msg->check, !sim_chance(w, 100));
    e->frame.plan = msg->index;
}

/* The writer hears what became of a part. */
static void answered(struct sim_world *w, struct sim_member *m, uint64_t value) {
    struct sim_share *h = &w->share;
    uint32_t part = (uint32_t)(value >> 2 & 0xffff);
    bool check = value >> 1 & 1, done = value & 1;
    if (h->alone || !h->open || part >= h->parts) return;
    h->open--;
    if (!done && check) look(w, m, part);
    if (!done && !check) h->sent_by[part] |= 1;
    go_on(w, m);
}

static void go_alone(struct sim_world *w, struct sim_member *m) {
    struct sim_share *h = &w->share;
    bool waited = h->open > 0;
    h->open = 0;
    for (uint32_t i = 0; i < h->parts; i++)
        if (!h->sent_by[i]) h->sent_by[i] |= 1;
    if (waited) go_on(w, m);
}

void sim_share_event(struct sim_world *w, struct sim_member *m, const struct sim_event *e) {
    struct sim_share *h = &w->share;
    bool now = e->frame.plan == h->index;
    if (e->value == UINT64_MAX) {
        if (now) begin_offers(w, m);
    } else if (e->value & 1ull << 41) {
        if (now) go_alone(w, m);
    } else if (e->value & 1ull << 40) {
        if (now) answered(w, m, e->value);
    } else {
        struct msg_checkpoint_part_done msg = {.index = e->frame.plan, .part = (uint32_t)(e->value >> 2),
                                               .check = e->value >> 1 & 1, .done = e->value & 1};
        if (msg.done && msg.index == h->index)
            (msg.check ? h->seen_by : h->sent_by)[msg.part] |= 1ull << m->id;
        sim_member_step(w, m, &(struct sync_event){.type = SYNC_EV_CHECKPOINT_PART, .msg = &msg});
    }
}

void sim_share_publish(struct sim_world *w, struct sim_member *m) { later(w, m, SIM_CHECKPOINT, 10, 1); }

/* A coordinator that was stopped may sign what it was asked for before its successor had it written again. */
void sim_share_signed(struct sim_world *w, uint64_t term, uint64_t index) {
    const struct sim_share *h = &w->share;
    if (term < h->term) return;
    for (uint32_t i = 0; index == h->index && i < h->parts; i++) {
        if (!h->sent_by[i] || !h->seen_by[i])
            sim_violation(w, "checkpoint %llu is signed, and part %u was %s", (unsigned long long)index, i,
                          h->sent_by[i] ? "looked at by nobody" : "sent by nobody");
        bool one = !(h->sent_by[i] & (h->sent_by[i] - 1)) && h->sent_by[i] != 1;
        if (one && h->seen_by[i] == h->sent_by[i])
            sim_violation(w, "checkpoint %llu is signed, and part %u was looked at by nobody but who sent it",
                          (unsigned long long)index, i);
    }
}
