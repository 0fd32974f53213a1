/* sim.h - the simulator: coordinator/core and node/sync against each other on a simulated clock,
 * network, disk and trainer. A seed decides everything: sizes, speeds, faults. After every event
 * the oracle checks the invariants of docs/architecture.md; a violation names the seed that replays
 * it.
 *
 *   world.c   clock, queue of events, network, coordinator's shell, the faults
 *   member.c  a member's shell: sync, simulated trainer, links
 *   disk.c    struct disk in memory, which can die in the middle of a write
 *   oracle.c  what must always hold
 *   main.c    seeds, jobs, replay */
#ifndef INTELLECT_SIM_H
#define INTELLECT_SIM_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>

#include "coordinator/core.h"
#include "kernels/kernels.h"
#include "node/sync.h"

#define SIM_MEMBERS_MAX 8 /* slot 0 is the coordinator's own aggregate-only node */
#define SIM_ELEMENTS_MAX 512
#define SIM_CHUNKS_MAX 16
#define SIM_SAMPLES_MAX 512
#define SIM_ENTRIES_MAX 512
#define SIM_LEASES_MAX 1024
#define SIM_DISK_FILES_MAX 64

/* ---- disk ----------------------------------------------------------------------------------- */

struct sim_file {
    char name[48];
    bool mapped;
    uint8_t *memory, *durable;
    size_t bytes;
};
struct sim_world;
struct sim_disk {
    struct sim_world *world;
    uint32_t owner;
    struct sim_file files[SIM_DISK_FILES_MAX];
    uint32_t count;
    uint32_t dies_after; /* operations until the process dies in the middle of its step; 0 = no */
    bool dead;           /* died in this step: further operations fail and change nothing */
};
struct disk sim_disk_ops(struct sim_disk *d);
/* The machine died: of what was not flushed, each granule survives or not. */
void sim_disk_lose_power(struct sim_disk *d);
void sim_disk_release(struct sim_disk *d);

/* ---- a member ------------------------------------------------------------------------------- */

struct sim_range {
    uint64_t start, count;
};
struct sim_trainer {
    bool alive, has_parameters, stepping, freeze_asked, frozen;
    uint32_t generation; /* events of an earlier life are void */
    float local[SIM_ELEMENTS_MAX], moments[SIM_ELEMENTS_MAX];
    struct sim_range queue[64];
    uint32_t queued;
    uint64_t samples; /* as SYNC_EV_TRAINER_STEP counts them */
    uint8_t effect[SIM_SAMPLES_MAX /
                   8]; /* samples whose effect is in `local` and not yet in the anchor */
    uint64_t steps;
};
struct sim_member {
    uint32_t slot, id; /* id 0: not enrolled yet */
    struct identity identity;
    bool alive, trains, reachable, gone; /* gone: left, or the run is complete */
    bool complete;
    bool work_queued;
    uint64_t paused_until;
    uint32_t life; /* counts starts: events for an earlier life are void */
    struct sync *sync;
    struct sim_disk disk;
    struct sim_trainer trainer;
    float slot_values[SIM_ELEMENTS_MAX];
    uint8_t slot_ops[SIM_CHUNKS_MAX];
    uint64_t conn; /* connection to the coordinator, 0 = none */
    bool roster[SIM_MEMBERS_MAX + 1]; /* by id */
    uint32_t step_ms;
    uint64_t versions[SIM_CHUNKS_MAX]; /* as the oracle saw them last */
    uint8_t
        frozen_effect[SIM_SAMPLES_MAX / 8]; /* of the newest freeze: what its READY must claim */
    struct digest ready_root;
};

/* ---- the world ------------------------------------------------------------------------------ */

enum sim_kind {
    SIM_TO_CORE,
    SIM_TO_MEMBER,
    SIM_TO_PEER, /* a message arrives */
    SIM_CORE_CLOSED,
    SIM_MEMBER_CLOSED,
    SIM_PEER_CLOSED,
    SIM_CORE_OPENED,
    SIM_MEMBER_WELCOME,
    SIM_PEER_OPENED,
    SIM_PEER_DRAINED,
    SIM_CORE_TICK,
    SIM_MEMBER_TICK,
    SIM_MEMBER_WORK,
    SIM_MEMBER_DIAL,
    SIM_PEER_DIAL,
    SIM_TRAINER_STEP,
    SIM_TRAINER_UP,
    SIM_TRAINER_REPLY,
    SIM_CHECKPOINT,
    SIM_CORE_START,
    SIM_MEMBER_START,
    SIM_FAULT
};
struct sim_event {
    uint64_t at, order;
    enum sim_kind kind;
    uint32_t member, peer, life; /* life of the target; of the trainer for trainer events */
    uint64_t conn;               /* connection or link number it belongs to */
    struct frame frame;
    uint8_t *payload; /* owned */
    uint32_t payload_length;
    uint64_t value;
};
struct sim_link {         /* between two members, a < b by slot */
    uint64_t number;      /* 0 = none */
    bool broken;          /* was cut: what is sent is lost, and both ends will see it closed */
    uint64_t clear_at[2]; /* arrival of the last message in each direction: keeps order */
    uint32_t in_flight[2];
};
struct sim_conn { /* between a member and the coordinator */
    uint64_t number;
    uint32_t member;
    bool open, broken; /* open: at the coordinator's end */
    uint64_t clear_at[2];
};
struct sim_row {
    uint64_t key;
    uint8_t *value;
    uint32_t length;
    struct proto_sig signature; /* CORE_LEDGER */
};
struct sim_table {
    struct sim_row *rows;
    uint32_t count, capacity;
};
struct sim_contribution { /* bytes of a chunk as a contributor sent it */
    uint64_t term, plan;
    uint32_t bit, chunk;
    uint8_t *bytes;
    uint32_t length;
};
struct sim_state { /* a chunk version as the first member that reached it has it */
    uint32_t chunk;
    uint64_t version;
    uint32_t slot;
    float *values; /* anchor, then momentum */
};

struct sim_world {
    uint64_t seed, random, now, order;
    bool trace;
    /* what the seed chose */
    uint32_t members, elements, chunk_elements, chunks;
    struct msg_genesis genesis;
    struct msg_model model;
    struct msg_inner inner;
    struct msg_outer outer;
    struct msg_corpus corpus;
    struct digest run;
    uint64_t faults_until; /* after this everything is healed and the run must end */
    uint32_t fault_every_ms, duplicate_per_mille;
    uint32_t delay_ms_max;
    /* clock */
    struct sim_event *heap;
    uint32_t heap_count, heap_capacity;
    /* coordinator */
    struct core *core;
    struct identity root, online;
    uint64_t term, core_paused_until;
    uint32_t core_life;
    struct sim_table store[CORE_TABLES];
    struct core_actions core_out;
    uint32_t core_dies_after; /* actions until the coordinator dies between two of them; 0 = no */
    uint64_t announced_head;  /* highest ledger index that any member was sent */
    /* network */
    struct sim_conn conns[256]; /* ring of the newest connections, by number % 256 */
    uint64_t conn_next;
    struct sim_link links[SIM_MEMBERS_MAX][SIM_MEMBERS_MAX];
    uint64_t link_next;
    uint64_t cut_until[SIM_MEMBERS_MAX + 1]
                      [SIM_MEMBERS_MAX + 1]; /* index SIM_MEMBERS_MAX = coordinator */
    struct sim_member member[SIM_MEMBERS_MAX];
    struct sync_actions sync_out;
    /* oracle */
    uint8_t spent[SIM_SAMPLES_MAX / 8];
    struct digest entry_seen[SIM_ENTRIES_MAX];
    bool entry_known[SIM_ENTRIES_MAX];
    uint64_t next_round, commits;
    struct sim_contribution *contributions;
    uint32_t contribution_count, contribution_capacity;
    struct sim_state *states;
    uint32_t state_count, state_capacity;
    uint64_t checked_sums, unchecked_sums, checkpoints;
    uint64_t events;
    char violation[512];
    jmp_buf stop;
};

/* Runs one seed. 0, or -1 with w->violation filled in. */
int sim_run(struct sim_world *w, uint64_t seed, bool trace);
void sim_release(struct sim_world *w);

/* Used between the files. */
uint64_t sim_random(struct sim_world *w, uint64_t below);
bool sim_chance(struct sim_world *w, uint32_t per_mille);
/* Stamped with the present life of its target: it is void for a later one. */
struct sim_event *sim_schedule(struct sim_world *w, uint64_t in_ms, enum sim_kind kind,
                               uint32_t member);
void sim_trace(struct sim_world *w, const char *format, ...) __attribute__((format(printf, 2, 3)));
_Noreturn void sim_violation(struct sim_world *w, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
bool sim_is_cut(const struct sim_world *w, uint32_t a, uint32_t b);
#define SIM_COORDINATOR SIM_MEMBERS_MAX
struct sim_row *sim_row_find(struct sim_table *t, uint64_t key);
void sim_encode(struct sim_world *w, uint8_t type, const void *msg, struct sim_event *ev);
void sim_conn_send(struct sim_world *w, struct sim_conn *c, bool to_core, uint8_t type,
                   struct frame frame, const void *msg);
struct sim_conn *sim_conn_find(struct sim_world *w, uint64_t number);
void sim_conn_close(struct sim_world *w, struct sim_conn *c, bool by_core);

void sim_member_start(struct sim_world *w, struct sim_member *m);
void sim_member_kill(struct sim_world *w, struct sim_member *m, bool power);
void sim_member_event(struct sim_world *w, struct sim_member *m, struct sim_event *ev);
void sim_trainer_kill(struct sim_world *w, struct sim_member *m);

void oracle_persist(struct sim_world *w, const struct core_action *a);
void oracle_ready(struct sim_world *w, struct sim_member *m, const struct msg_ready *r);
void oracle_chunk(struct sim_world *w, uint64_t term, uint64_t plan, const struct msg_chunk *c);
void oracle_member(struct sim_world *w, struct sim_member *m);
void oracle_end(struct sim_world *w);

#endif
