/* faults.c - what goes wrong, and when. Most faults heal; what destroys data for good (an older disk
 * image, a copied home that ends) waits until the run could lose that much again: a copy of everything
 * must remain somewhere, or no rule could help. */
#include "tests/sim/sim.h"

#include <stdlib.h>
#include <string.h>

bool sim_has(const struct sim_world *w, enum sim_injected fault) {
    return fault < 64 && w->weird >> fault & 1;
}

static struct sim_member *any_member(struct sim_world *w) {
    return &w->member[sim_random(w, w->members)];
}

static uint64_t a_while(struct sim_world *w) {
    return 500 + sim_random(w, 2ull * w->outer.silence_ms_max);
}

/* ---- what may be lost for good ----------------------------------------------------------------- */

/* ... where others can get it: nobody can dial a member behind NAT for what only it has. */
static bool has_head(const struct sim_world *w, const struct sim_member *m) {
    if (!m->alive || !m->sync || !m->reachable) return false;
    for (uint32_t c = 0; c < w->chunks; c++)
        if (sync_chunk_version(m->sync, c) != w->base_index[w->fragment_of[c]]) return false;
    return true;
}

/* Every fragment went on since the last loss. */
static bool is_recovered(const struct sim_world *w) {
    for (uint32_t f = 0; f < w->fragments; f++)
        if (w->next_round[f] <= w->destroyed_rounds[f]) return false;
    return true;
}

bool sim_others_have_head(const struct sim_world *w, const struct sim_member *m) {
    bool others = false;
    for (uint32_t i = 0; i < w->members; i++)
        others |= &w->member[i] != m && has_head(w, &w->member[i]);
    return others;
}

static bool may_lose(const struct sim_world *w, const struct sim_member *m) {
    return is_recovered(w) && sim_others_have_head(w, m);
}

static void note_loss(struct sim_world *w) {
    memcpy(w->destroyed_rounds, w->next_round, sizeof w->destroyed_rounds);
}

/* ---- disks ------------------------------------------------------------------------------------- */

static void older_image(struct sim_world *w, struct sim_member *m) {
    if (!m->alive || !m->id) return;
    if (!m->image.count || !may_lose(w, m)) return;
    note_loss(w);
    sim_member_kill(w, m, false, 0);
    m->restored = true;
    if (sim_chance(w, 250)) {
        sim_trace(w, "slot %u: its disk is empty", m->slot);
        w->injected[SIM_WIPED]++;
        sim_disk_release(&m->disk);
        return;
    }
    sim_trace(w, "slot %u: its disk is an older image", m->slot);
    w->injected[SIM_IMAGE]++;
    sim_disk_copy(&m->disk, &m->image, false);
}

/* Who was summed may have ended since, a copied home or a member that left, with the only bytes of it. */
static bool contributors_keep_bytes(struct sim_world *w, const struct msg_commit *c) {
    for (uint32_t i = 0; i < c->contributors_count; i++) {
        const struct sim_contribution *x = oracle_contribution(
            w, c->contributors[i].member, c->fragment, c->round, &c->contributors[i].root);
        const struct sim_member *m = x ? &w->member[x->slot] : NULL;
        if (!x || m->copy || m->gone || m->revoked || !oracle_keeps_bytes(w, x)) return false;
    }
    return true;
}

/* Contributors still have their bytes; of the commits before, somebody has the state. A sum that was a
 * lie cannot be made again. */
static bool may_lose_results(struct sim_world *w, const struct msg_commit *c) {
    bool before = false, lies = false;
    for (uint32_t i = 0; i < w->members; i++) {
        const struct sim_member *m = &w->member[i];
        bool has = m->alive && m->sync && m->reachable;
        for (uint32_t k = 0; k < w->chunks && has; k++) {
            uint32_t f = w->fragment_of[k];
            has = sync_chunk_version(m->sync, k) ==
                  (f == c->fragment ? c->base_index : w->base_index[f]);
        }
        before |= has;
        lies |= m->lie == SYNC_FAULT_LIES_SUM;
    }
    return before && !lies && is_recovered(w) && !w->member[w->copy_slot].alive &&
           contributors_keep_bytes(w, c);
}

/* Aggregator and second holder of a shard end with the commit that names them, before anybody else
 * has its result; with some luck their results are gone too. */
void sim_fault_at_commit(struct sim_world *w, const struct msg_commit *c) {
    if (!sim_has(w, SIM_HOLDERS) || w->now >= w->faults_until || w->now < w->calm_until) return;
    if (!c->shards_count || !sim_chance(w, 150)) return;
    const struct msg_shard *s = &c->shards[sim_random(w, c->shards_count)];
    bool lose = sim_chance(w, 400) && may_lose_results(w, c);
    if (lose) note_loss(w);
    for (uint32_t i = 0; i < w->members; i++) {
        struct sim_member *m = &w->member[i];
        if (!m->alive || (m->id != s->aggregator && m->id != s->holder)) continue;
        sim_member_kill(w, m, false, 4000 + sim_random(w, 8000));
        if (lose) sim_disk_forget(&m->disk, "result");
    }
    w->injected[SIM_HOLDERS]++;
    if (lose) w->injected[SIM_RESULTS]++;
}

/* ---- the coordinator --------------------------------------------------------------------------- */

/* One of the contributors or aggregators dies while a plan is carried out, for longer than the others wait. */
void sim_fault_at_plan(struct sim_world *w, const struct msg_plan *p) {
    if (!sim_has(w, SIM_IN_PLAN) || w->now >= w->faults_until || w->now < w->calm_until) return;
    if (!sim_chance(w, 120)) return;
    bool sums = sim_chance(w, 400) && p->shards_count;
    uint32_t id = sums ? p->shards[sim_random(w, p->shards_count)].aggregator
                       : p->contributors[sim_random(w, p->contributors_count)].member;
    for (uint32_t i = 0; i < w->members; i++)
        if (w->member[i].id == id && w->member[i].alive)
            sim_schedule(w, 1 + sim_random(w, 2ull * w->delay_ms_max + 200), SIM_MEMBER_KILL, i)
                ->value = 3500 + sim_random(w, 5000);
    w->injected[SIM_IN_PLAN]++;
}

/* One that is stopped already goes on no sooner for it: what waits for it would come after what is sent later. */
static void stop_until(uint64_t *until, uint64_t at) {
    if (at > *until) *until = at;
}

static void successor(struct sim_world *w) {
    struct sim_core *old = sim_core_active(w);
    if (!old || w->cores[w->active ^ 1].core) return;
    uint64_t pause = 1000 + sim_random(w, 3ull * w->outer.silence_ms_max);
    sim_trace(w, "the coordinator of term %llu is stopped for %llu ms, another one starts",
              LLU(old->term), LLU(pause));
    if (sim_chance(w, 800)) {
        stop_until(&old->paused_until, w->now + pause);
        stop_until(&old->input_until, old->paused_until);
    }
    w->injected[SIM_SUCCESSOR]++;
    sim_core_start(w);
}

static uint32_t entries_everybody_could_have(struct sim_world *w) {
    uint32_t count = w->store_image.table[CORE_LEDGER].count;
    for (uint32_t i = 0; i < w->members; i++)
        if (w->member[i].sync && sync_ledger_count(w->member[i].sync) > count)
            count = sync_ledger_count(w->member[i].sync);
    return count;
}

static bool enrolments_after(struct sim_world *w, uint64_t count) {
    for (uint64_t i = count; i < w->store.table[CORE_LEDGER].count; i++) {
        struct sim_row *r = sim_row_find(&w->store.table[CORE_LEDGER], i);
        struct msg_entry e;
        struct err err;
        if (!r || proto_decode(r->value, r->length, RECORD_entry, &e, &err)) return true;
        if (e.kind == LEDGER_ENROLMENT || e.kind == LEDGER_REVOCATION) return true;
    }
    return false;
}

static void hang_up(struct sim_world *w, struct sim_member *m) {
    if (!m->conn) return;
    m->conn = 0;
    sim_member_step(w, m, &(struct sync_event){.type = SYNC_EV_DISCONNECTED});
    if (m->alive && !m->gone) sim_schedule(w, 100, SIM_MEMBER_DIAL, m->slot);
}

/* The store's file is an older one. What nobody but the store had is gone; the rest is with members,
 * who all come to show it before the coordinator goes on. */
static void older_store(struct sim_world *w) {
    struct sim_core *core = sim_core_active(w);
    if (!core || w->cores[w->active ^ 1].core) return;
    if (!w->has_store_image || sim_chance(w, 300)) {
        sim_store_copy(&w->store_image, &w->store);
        w->has_store_image = true;
        return;
    }
    for (uint32_t i = 0; i < w->members; i++)
        if (!w->member[i].gone && (!w->member[i].sync || w->member[i].paused_until > w->now))
            return;
    if (w->member[w->copy_slot].alive) return;
    uint32_t count = entries_everybody_could_have(w);
    if (w->truth_count != w->store.table[CORE_LEDGER].count || enrolments_after(w, count)) return;
    sim_trace(w, "the store is an older one, of %u entries; members have %u of %llu",
              w->store_image.table[CORE_LEDGER].count, count, LLU(w->truth_count));
    w->injected[SIM_STORE_IMAGE]++;
    oracle_rollback(w, count);
    w->announced_head = count - 1;
    sim_core_kill(w, core, false);
    sim_store_copy(&w->store, &w->store_image);
    memset(w->cut_until, 0, sizeof w->cut_until);
    for (uint32_t i = 0; i < w->members; i++) hang_up(w, &w->member[i]);
    w->hold_ms = 20000;
    w->shown_until = w->now + w->hold_ms; /* also for one that takes over and starts again */
    w->calm_until = w->now + 25000;
    sim_schedule(w, 300, SIM_CORE_START, SIM_COORDINATOR);
}

static void blackout(struct sim_world *w) {
    bool power = sim_chance(w, 500);
    w->injected[SIM_BLACKOUT]++;
    sim_trace(w, "everything dies at once");
    for (int i = 0; i < SIM_CORES; i++)
        if (w->cores[i].core) sim_core_kill(w, &w->cores[i], i == (int)w->active);
    for (uint32_t i = 0; i < w->members; i++) sim_member_kill(w, &w->member[i], power, 0);
}

/* ---- people ------------------------------------------------------------------------------------ */

static void copy_home(struct sim_world *w, struct sim_member *m) {
    struct sim_member *copy = &w->member[w->copy_slot];
    if (copy->alive || !m->trains || !m->id || m->gone || !may_lose(w, m)) return;
    sim_trace(w, "the home of slot %u is copied to slot %u", m->slot, copy->slot);
    w->injected[SIM_COPY]++;
    sim_disk_copy(&copy->disk, &m->disk, false);
    copy->disk.world = w;
    copy->disk.owner = copy->slot;
    copy->identity = m->identity;
    copy->id = m->id;
    copy->trains = copy->copy = true;
    copy->gone = copy->complete = false;
    copy->reachable = m->reachable;
    copy->step_ms = m->step_ms;
    copy->uplink = m->uplink;
    copy->paused_until = 0;
    memcpy(copy->freeze, m->freeze, sizeof copy->freeze);
    memcpy(copy->residual_next, m->residual_next, sizeof copy->residual_next);
    memcpy(copy->roster, m->roster, sizeof copy->roster);
    sim_member_start(w, copy);
    sim_schedule(w, 2000 + sim_random(w, 15000), SIM_COPY_ENDS, copy->slot);
    if (sim_chance(w, 600)) sim_member_kill(w, m, false, 3000 + sim_random(w, 10000));
}

static uint32_t trainers_left(const struct sim_world *w) {
    uint32_t n = 0;
    for (uint32_t i = 1; i < w->members; i++) n += !w->member[i].gone && !w->member[i].revoked;
    return n;
}

static void revoke(struct sim_world *w, struct sim_member *m) {
    if (!m->slot || !m->id || m->revoked || m->gone || trainers_left(w) < 3 || !may_lose(w, m))
        return;
    if (!sim_core_active(w) || sim_core_active(w)->paused_until > w->now) return;
    sim_trace(w, "the operator revokes slot %u", m->slot);
    note_loss(w);
    w->injected[SIM_REVOKE]++;
    sim_schedule(w, 1, SIM_CORE_OPERATOR, m->slot)->value = CORE_EV_REVOKE;
}

static void leave(struct sim_world *w, struct sim_member *m) {
    if (!m->slot || !m->sync || !m->conn || m->gone || trainers_left(w) < 3 || !may_lose(w, m))
        return;
    sim_trace(w, "slot %u leaves", m->slot);
    note_loss(w);
    w->injected[SIM_LEAVE]++;
    sim_member_step(w, m, &(struct sync_event){.type = SYNC_EV_LEAVE});
    m->gone = m->complete = m->left = true;
    sim_member_kill(w, m, false, UINT64_MAX);
}

static void pause_run(struct sim_world *w) {
    if (!sim_core_active(w)) return;
    w->paused_by_operator = !w->paused_by_operator;
    w->injected[SIM_OPERATOR_PAUSE]++;
    sim_trace(w, "the operator %s the run", w->paused_by_operator ? "pauses" : "resumes");
    sim_schedule(w, 1, SIM_CORE_OPERATOR, SIM_COORDINATOR)->value =
        w->paused_by_operator ? CORE_EV_PAUSE : CORE_EV_RESUME;
}

/* ---- which of them ----------------------------------------------------------------------------- */

static void drip(struct sim_world *w, struct sim_member *m) {
    uint32_t other = (uint32_t)sim_random(w, w->members);
    if (other == m->slot) return;
    struct sim_link *l = sim_link(w, m->slot, other);
    if (!l->number) return;
    l->slow = 1 + (uint32_t)sim_random(w, 400);
    w->injected[SIM_DRIP]++;
}

static void stop_member(struct sim_world *w, struct sim_member *m) {
    stop_until(&m->paused_until, w->now + a_while(w));
    sim_trace(w, "slot %u is stopped for %llu ms", m->slot, LLU(m->paused_until - w->now));
    w->injected[SIM_PAUSE]++;
}

/* Where its machine stood still as well, what was sent to it meanwhile is on its way again when its
 * clocks already run. */
static void stop_core(struct sim_world *w, struct sim_core *c) {
    bool machine = sim_chance(w, 500) && w->now >= c->input_until + w->outer.silence_ms_max;
    stop_until(&c->paused_until, w->now + a_while(w));
    stop_until(&c->input_until, c->paused_until + (machine ? 1 + sim_random(w, 500) : 0));
    sim_trace(w, "the coordinator is stopped for %llu ms%s", LLU(c->paused_until - w->now),
              machine ? ", with its machine" : "");
    w->injected[SIM_CORE_PAUSE]++;
}

static void common(struct sim_world *w, struct sim_member *m) {
    struct sim_core *core = sim_core_active(w);
    uint32_t other = (uint32_t)sim_random(w, w->members);
    uint64_t kind = sim_random(w, 9);
    if (kind < 2 && m->alive) w->injected[kind ? SIM_POWER : SIM_KILL]++;
    switch (kind) {
    case 0:
    case 1: sim_member_kill(w, m, kind == 1, 0); break;
    case 2: m->disk.dies_after = 1 + (uint32_t)sim_random(w, 12); break;
    case 3:
        if (m->trainer.alive) w->injected[SIM_TRAINER]++;
        sim_trainer_kill(w, m);
        break;
    case 4: stop_member(w, m); break;
    case 5:
        if (core) stop_core(w, core);
        break;
    case 6:
        if (core && sim_chance(w, 500)) core->dies_after = 1 + (uint32_t)sim_random(w, 30);
        else if (core) w->injected[SIM_CORE_KILL]++, sim_core_kill(w, core, true);
        break;
    case 7:
        w->injected[SIM_CORE_CUT]++;
        sim_cut(w, m->slot, SIM_COORDINATOR, a_while(w));
        break;
    default:
        if (other != m->slot) w->injected[SIM_PEER_CUT]++, sim_cut(w, m->slot, other, a_while(w));
    }
}

static void rare(struct sim_world *w, struct sim_member *m) {
    static const enum sim_injected kinds[] = {SIM_SUCCESSOR,      SIM_DRIP,  SIM_IMAGE,
                                              SIM_STORE_IMAGE,    SIM_COPY,  SIM_BLACKOUT,
                                              SIM_OPERATOR_PAUSE, SIM_LEAVE, SIM_REVOKE,
                                              SIM_REWIND};
    enum sim_injected has[sizeof kinds / sizeof *kinds], kind;
    uint32_t count = 0;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (sim_has(w, kinds[i])) has[count++] = kinds[i];
    if (!count) return;
    kind = has[sim_random(w, count)];
    switch (kind) {
    case SIM_SUCCESSOR: successor(w); break;
    case SIM_DRIP: drip(w, m); break;
    case SIM_IMAGE: older_image(w, m); break;
    case SIM_STORE_IMAGE: older_store(w); break;
    case SIM_COPY: copy_home(w, m); break;
    case SIM_BLACKOUT: blackout(w); break;
    case SIM_OPERATOR_PAUSE: pause_run(w); break;
    case SIM_REWIND: sim_rewind(w); break;
    case SIM_LEAVE:
        if (sim_chance(w, 500)) leave(w, m);
        break;
    default:
        if (sim_chance(w, 500)) revoke(w, m);
    }
}

/* Everything goes well from here on, and the run must end. */
static void heal(struct sim_world *w) {
    sim_trace(w, "no more faults");
    w->healed = true;
    memset(w->cut_until, 0, sizeof w->cut_until);
    for (int i = 0; i < SIM_CORES; i++) w->cores[i].dies_after = 0;
    sim_core_kill(w, &w->cores[w->active ^ 1], false); /* a server sees by its store that it is stale */
    for (uint32_t i = 0; i <= w->copy_slot; i++)
        w->member[i].disk.dies_after = 0;
    for (uint32_t i = 0; i < SIM_MEMBERS_MAX; i++)
        for (uint32_t k = 0; k < SIM_MEMBERS_MAX; k++) w->links[i][k].slow = 0;
}

/* What an older disk can be: whatever it was at some moments of the run. */
static void take_images(struct sim_world *w) {
    for (uint32_t i = 0; i < w->members; i++)
        if (w->member[i].alive && w->member[i].id && sim_chance(w, 300))
            sim_disk_copy(&w->member[i].image, &w->member[i].disk, true);
}

void sim_fault(struct sim_world *w) {
    uint64_t wait = 1 + sim_random(w, 2ull * w->fault_every_ms);
    struct sim_member *m = any_member(w);
    if (w->now >= w->faults_until) {
        if (!w->healed) heal(w);
        /* The operator's word may meet a coordinator that is away: said until it is heard. */
        if (sim_has(w, SIM_OPERATOR_PAUSE))
            sim_schedule(w, 1, SIM_CORE_OPERATOR, SIM_COORDINATOR)->value = CORE_EV_RESUME;
        wait = 5000;
    } else if (w->now >= w->calm_until) {
        if (sim_has(w, SIM_IMAGE)) take_images(w);
        if (w->weird && sim_chance(w, 500)) rare(w, m);
        else common(w, m);
    }
    sim_schedule(w, wait, SIM_FAULT, SIM_COORDINATOR);
}
