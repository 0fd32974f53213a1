/* sim.h - the simulator: coordinator/core and node/sync against each other on a simulated clock,
 * network, disk and trainer. A seed decides everything: sizes, speeds, settings, faults. After every
 * event the oracle checks the invariants of docs/architecture.md; a violation names the seed that
 * replays it.
 *
 *   world.c        clock, queue of events, what a seed chooses, the loop
 *   network.c      connections to the coordinator, links between members
 *   coordinator.c  the coordinators' shell and their store
 *   member.c       a member's shell
 *   trainer.c      the simulated trainer: which samples have an effect in which chunk
 *   disk.c         struct disk in memory, which can die in the middle of a write
 *   faults.c       what goes wrong, and when
 *   share.c        parts of a checkpoint that members send and look at
 *   rewind.c       checkpoints, and the operator's way back to one
 *   oracle.c       what must always hold of ledger, leases and contributions
 *   oracle_state.c what must always hold of the state, and at the end
 *   main.c         seeds, jobs, replay, deliberate faults */
#ifndef INTELLECT_SIM_H
#define INTELLECT_SIM_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>

#include "coordinator/core.h"
#include "kernels/kernels.h"
#include "node/sync.h"

/* Slot 0 is the coordinator's own aggregate-only node, the last one a copied home directory. */
#define SIM_MEMBERS_MAX    52
#define SIM_COORDINATOR    SIM_MEMBERS_MAX /* where a slot is asked for */
#define SIM_FRAGMENTS_MAX  4
#define SIM_ELEMENTS_MAX   1024
#define SIM_CHUNKS_MAX     24
#define SIM_SAMPLES_MAX    1024
#define SIM_ENTRIES_MAX    2048
#define SIM_DISK_FILES_MAX 96
#define SIM_CONNS          1024
#define SIM_STREAMS_MAX    4
#define SIM_CORES          2
#define SIM_REPORTS        256
#define SIM_CHECKPOINTS_MAX 64
#define SIM_REWINDS_MAX    64
#define SIM_COMMANDS_MAX   300

typedef uint8_t sim_samples[SIM_SAMPLES_MAX / 8]; /* a set of samples */

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
/* to := from, which is released before. durable: what a power cut would leave of it. */
void sim_disk_copy(struct sim_disk *to, const struct sim_disk *from, bool durable);
void sim_disk_forget(struct sim_disk *d, const char *prefix);
const struct sim_file *sim_disk_find(const struct sim_disk *d, const char *name);

/* ---- a member ------------------------------------------------------------------------------- */

struct sim_range {
    uint64_t start, count;
};
struct sim_command { /* to the trainer, carried out in order at a step boundary */
    enum sync_action_type type;
    uint32_t fragment;
    bool wait;
    struct sim_range samples;
};
/* Effects: samples whose work is in a part of `local` and not yet in the anchor. A commit that
 * summed this member's contribution takes away those that were in it. */
struct sim_trainer {
    bool alive, has_parameters, stepping, replying, waits;
    uint32_t generation; /* events of an earlier life are void */
    float local[SIM_ELEMENTS_MAX], moments[SIM_ELEMENTS_MAX];
    float frozen[SIM_FRAGMENTS_MAX][SIM_ELEMENTS_MAX];
    struct sim_range queue[SIM_COMMANDS_MAX];
    uint32_t queued;
    struct sim_command commands[SIM_COMMANDS_MAX];
    uint32_t command_count;
    uint64_t samples, steps; /* as SYNC_EV_TRAINER_STEP counts them */
    sim_samples trained;     /* since the last RESET */
    sim_samples effect[SIM_CHUNKS_MAX], fragment_effect[SIM_FRAGMENTS_MAX];
    uint64_t base[SIM_CHUNKS_MAX]; /* version of the state it has in each chunk, beside its own work */
};
struct sim_freeze { /* what the newest freeze of a fragment must lead to */
    bool valid, announced;
    sim_samples effect[SIM_CHUNKS_MAX], all; /* by chunk of the fragment; by fragment */
    uint64_t base[SIM_CHUNKS_MAX];   /* versions: of what the trainer has, */
    uint64_t anchor[SIM_CHUNKS_MAX]; /* ... and of what that is subtracted from */
    uint64_t based;                  /* as announced last */
    uint64_t samples, known_head, number;
    bool encodes;
    uint8_t bytes[8 * SIM_ELEMENTS_MAX]; /* all chunks, one after the other */
    struct digest root;                  /* over them; and of the READY that came of it */
};
struct sim_member {
    uint32_t slot, id; /* id 0: not enrolled yet */
    struct identity identity;
    bool alive, trains, reachable, gone; /* gone: left, or the run is complete */
    bool complete, behind, restored, revoked, left, copy;
    uint32_t restarted; /* since its last freeze, bits by fragment */
    enum sync_fault lie; /* a fault that only this member has */
    bool work_queued;
    uint64_t paused_until;
    uint32_t life; /* counts starts: events for an earlier life are void */
    struct sync *sync;
    struct sim_disk disk, image; /* image: an earlier durable state of the disk */
    struct sim_trainer trainer;
    struct sim_freeze freeze[SIM_FRAGMENTS_MAX];
    float residual[SIM_ELEMENTS_MAX], residual_next[SIM_ELEMENTS_MAX];
    float slot_values[SIM_ELEMENTS_MAX];
    uint8_t slot_ops[SIM_CHUNKS_MAX];
    uint64_t slot_versions[SIM_CHUNKS_MAX]; /* of the state, when the slot was handed over */
    uint64_t conn; /* connection to the coordinator, 0 = none */
    bool roster[SIM_MEMBERS_MAX + 1]; /* by id */
    uint32_t step_ms, uplink; /* uplink: bytes a millisecond */
    uint64_t uplink_clear;
    uint64_t versions[SIM_CHUNKS_MAX]; /* as the oracle saw them last */
    uint64_t rewound;                  /* newest rewind in its ledger */
    uint64_t heard_at, moved_at; /* as of its newest connection, and whose that is */
    uint32_t heard_by;
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
    SIM_CORE_OPERATOR, /* value: enum core_event_type */
    SIM_MEMBER_TICK,
    SIM_MEMBER_WORK,
    SIM_MEMBER_DIAL,
    SIM_PEER_DIAL,
    SIM_TRAINER_STEP,
    SIM_TRAINER_UP,
    SIM_TRAINER_REPLY,
    SIM_CHECKPOINT,
    SIM_PART, /* a member has done what it was asked for of a checkpoint */
    SIM_CORE_START,
    SIM_MEMBER_START,
    SIM_MEMBER_KILL, /* value: how long it stays away */
    SIM_COPY_ENDS,
    SIM_FAULT
};
struct sim_event {
    uint64_t at, order;
    enum sim_kind kind;
    uint32_t member, peer, fragment;
    uint32_t life;  /* of the target: a member's, a trainer's, or the number of a coordinator */
    uint64_t conn;  /* connection or link number it belongs to */
    struct frame frame;
    uint8_t *payload; /* owned */
    uint32_t payload_length;
    uint64_t value;
};
struct sim_link {         /* between two members, a < b by slot */
    uint64_t number;      /* 0 = none */
    bool broken;          /* was cut: what is sent is lost, and both ends will see it closed */
    uint32_t slow;        /* a drip: milliseconds per 16 bytes */
    uint64_t clear_at[2][SIM_STREAMS_MAX]; /* arrival of the last message: keeps order */
    uint32_t in_flight[2];
};
struct sim_conn { /* between a member and a coordinator */
    uint64_t number;
    uint32_t member, core;
    bool open, broken; /* open: at the coordinator's end */
    uint64_t clear_at[2];
    uint64_t heard_at, moved_at, progress; /* when a HEARTBEAT came last, and one that showed progress */
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
struct sim_store {
    struct sim_table table[CORE_TABLES];
    uint64_t term;
};
struct sim_core { /* a coordinator's process */
    struct core *core;
    uint32_t number; /* of this process, 0 = none */
    uint64_t term, paused_until;
    uint64_t input_until; /* what was sent to it meanwhile comes then; see stop_core() */
    uint32_t dies_after; /* actions until it dies between two of them; 0 = no */
    struct core_actions out;
};
#define SIM_UNANNOUNCED UINT64_MAX /* round of one that was frozen, and never announced */
struct sim_contribution { /* as its member froze it */
    uint32_t member, slot, fragment;
    uint64_t round, freeze;
    bool lies;
    struct digest root;
    uint8_t *bytes; /* all chunks of the fragment, one after the other */
    sim_samples *effect, all; /* [chunks of the fragment] */
};
struct sim_state { /* a chunk version as the first member that reached it has it */
    uint32_t chunk;
    uint64_t version;
    uint32_t slot;
    float *values; /* anchor, then momentum */
};
/* A checkpoint whose parts members send and look at: what the writer waits for, and who did what. */
#define SIM_PARTS_MAX 6
struct sim_share {
    uint64_t index, term; /* 0: none is written; of the coordinator that asked for it */
    uint32_t parts, open; /* open: offered and not answered */
    bool alone;
    /* Bits by id, as a machine may become another member; 1: the writer. */
    uint64_t sent_by[SIM_PARTS_MAX], seen_by[SIM_PARTS_MAX];
};

struct sim_checkpoint {
    uint64_t index;
    float *values; /* anchor, then momentum, of all chunks */
};
struct sim_audit { /* what an honest auditor was asked, and said */
    uint64_t term, plan;
    uint32_t chunk, auditor;
    struct digest set, leaf; /* set: the digest of the contributor set */
    bool reported;
};
struct sim_report { /* as its member signed it last */
    uint64_t term, plan;
    uint32_t member, shard, count;
    struct digest leaf[SIM_CHUNKS_MAX];
};

/* What went wrong how often, X(name, text). */
#define SIM_FAULTS_INJECTED(X)                                                                     \
    X(KILL, "member killed") X(POWER, "machine lost") X(DISK, "death in a disk operation")         \
    X(TRAINER, "trainer died") X(PAUSE, "member stopped") X(CORE_PAUSE, "coordinator stopped")     \
    X(CORE_KILL, "coordinator killed") X(CORE_DISK, "coordinator killed between actions")          \
    X(CORE_CUT, "link to coordinator cut") X(PEER_CUT, "link between members cut")                 \
    X(SUCCESSOR, "successor beside a stopped coordinator") X(FENCED, "stale coordinator fenced")   \
    X(DRIP, "slow link") X(DUPLICATE, "frame delivered twice") X(REORDER, "frame overtaken")       \
    X(IMAGE, "older disk image") X(WIPED, "empty disk") X(STORE_IMAGE, "older store")              \
    X(TAKE_OVER, "ledger taken over from members") X(BLACKOUT, "everything killed")                \
    X(HOLDERS, "both holders of a commit killed") X(RESULTS, "both results lost")                  \
    X(IN_PLAN, "contributor or aggregator killed in a plan")                                       \
    X(RESUM, "plan that sums a commit again") X(COPY, "home directory copied")                     \
    X(COPY_IN, "copy took the place of its original") X(REVOKE, "member revoked")                  \
    X(LEAVE, "member left") X(REWIND, "rewind to a checkpoint")                          \
    X(FAILED, "fixed membership ended the run")                                                    \
    X(OPERATOR_PAUSE, "run paused") X(LIAR_SUM, "aggregator that lies")                            \
    X(LIAR_NORM, "contributor that lies") X(AUDIT, "audit reported")                               \
    X(QUARANTINE, "member quarantined") X(HANDOVER, "round planned again")  \
    X(PARTIAL, "commit without a part of a contributor") X(SEVERAL_SHARDS, "commit of several shards")
#define SIM_FAULT_ID(name, text) SIM_##name,
enum sim_injected { SIM_FAULTS_INJECTED(SIM_FAULT_ID) SIM_INJECTED };

struct sim_world {
    uint64_t seed, random, now, order;
    bool trace;
    enum core_fault core_fault; /* deliberate */
    enum sync_fault sync_fault;
    /* what the seed chose */
    uint32_t members, copy_slot, elements, chunk_elements, chunks, streams;
    uint32_t fragments, fragment_chunks[SIM_FRAGMENTS_MAX];
    uint8_t fragment_of[SIM_CHUNKS_MAX];
    uint32_t place_of[SIM_CHUNKS_MAX], chunk_at[SIM_FRAGMENTS_MAX][SIM_CHUNKS_MAX];
    bool swarm;
    uint64_t weird; /* bits by enum sim_injected: which rare faults this seed has */
    struct msg_genesis genesis;
    struct msg_model model;
    struct msg_inner inner;
    struct msg_outer outer;
    struct msg_corpus corpus;
    struct msg_range init_spent[2]; /* genesis.init_spent */
    struct digest run;
    uint64_t faults_until; /* after this everything is healed and the run must end */
    uint32_t fault_every_ms, duplicate_per_mille;
    uint32_t delay_ms_max;
    bool healed;
    /* clock */
    struct sim_event *heap;
    uint32_t heap_count, heap_capacity;
    /* coordinators: cores[active] is the one that takes connections */
    struct sim_core cores[SIM_CORES];
    uint32_t active, core_number;
    struct identity root, online;
    struct sim_store store, store_image;
    bool has_store_image, paused_by_operator;
    uint64_t announced_head; /* highest ledger index that any member was sent */
    uint64_t hold_ms;        /* for the next START */
    uint64_t shown_until;    /* until then all members have come to show an older store what they have */
    uint64_t calm_until;     /* no faults before */
    uint64_t destroyed_rounds[SIM_FRAGMENTS_MAX]; /* when something was last lost for good */
    /* network */
    struct sim_conn conns[SIM_CONNS]; /* ring of the newest connections, by number */
    uint64_t conn_next;
    struct sim_link links[SIM_MEMBERS_MAX][SIM_MEMBERS_MAX];
    uint64_t link_next;
    uint64_t cut_until[SIM_MEMBERS_MAX + 1][SIM_MEMBERS_MAX + 1];
    struct sim_member member[SIM_MEMBERS_MAX];
    struct sync_actions sync_out;
    /* oracle: of the ledger as it will stand, also where a coordinator with an older store has yet
     * to take the newest entries over */
    uint64_t truth_count;
    bool taking_over; /* its leases are put right when it starts again */
    bool failed;      /* a member of a fixed membership was given up, which ended the run */
    uint64_t live;    /* bits by place in the coordinator's list: who of them trains and is live */
    uint32_t live_of; /* ... as this process sees it */
    uint8_t *entry_bytes[SIM_ENTRIES_MAX];
    uint32_t entry_length[SIM_ENTRIES_MAX];
    sim_samples spent;
    uint32_t owner[SIM_SAMPLES_MAX];    /* member that a sample was spent by */
    uint64_t spent_at[SIM_SAMPLES_MAX]; /* ledger index */
    sim_samples in_chunk[SIM_CHUNKS_MAX]; /* samples whose effect is in the committed chunk */
    struct digest entry_seen[SIM_ENTRIES_MAX];
    bool entry_known[SIM_ENTRIES_MAX];
    struct digest root_seen[SIM_ENTRIES_MAX]; /* of the state at a ledger index, as members said */
    uint64_t next_round[SIM_FRAGMENTS_MAX], base_index[SIM_FRAGMENTS_MAX], commits;
    uint64_t tokens_committed;
    struct sim_contribution *contributions;
    uint32_t contribution_count, contribution_capacity;
    struct sim_state *states;
    uint32_t state_count, state_capacity;
    struct sim_checkpoint kept[SIM_CHECKPOINTS_MAX]; /* in the object store */
    uint32_t checkpoints_kept;
    struct sim_share share;
    uint64_t rewinds[SIM_REWINDS_MAX], rewind_index; /* in the ledger, ascending; the newest, 0 = none */
    uint32_t rewind_count;
    struct sim_audit audits[64]; /* the newest */
    struct sim_report reports[SIM_REPORTS];
    uint64_t audit_count, report_count;
    uint64_t checked_sums, unchecked_sums, checkpoints, twice;
    uint64_t planned[SIM_FRAGMENTS_MAX][2]; /* number and round of the newest plan */
    uint64_t freezes, events, injected[SIM_INJECTED];
    uint8_t *current_payload; /* of the event being delivered */
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
void sim_push(struct sim_world *w, const struct sim_event *ev);
void sim_trace(struct sim_world *w, const char *format, ...) __attribute__((format(printf, 2, 3)));
_Noreturn void sim_violation(struct sim_world *w, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
bool sim_at_core(enum sim_kind k);
uint32_t sim_chunk_elements(const struct sim_world *w, uint32_t chunk);
/* Where chunk k begins in the bytes of a whole fragment, and how many bytes it has. */
size_t sim_encoded(const struct sim_world *w, uint32_t fragment, uint32_t k, uint8_t codec,
                   size_t *offset);

/* A message after proto_decode(); every record fits. */
union sim_record {
    long double align;
    char bytes[1024];
};
void sim_decode(struct sim_world *w, const struct sim_event *e, union sim_record *out);

bool sim_is_cut(const struct sim_world *w, uint32_t a, uint32_t b);
void sim_cut(struct sim_world *w, uint32_t a, uint32_t b, uint64_t for_ms);
void sim_conn_send(struct sim_world *w, struct sim_conn *c, bool to_core, uint8_t type,
                   struct frame frame, const void *msg);
struct sim_conn *sim_conn_find(struct sim_world *w, uint64_t number);
void sim_conn_close(struct sim_world *w, struct sim_conn *c, bool by_core);
void sim_dial_coordinator(struct sim_world *w, struct sim_member *m);
struct sim_link *sim_link(struct sim_world *w, uint32_t a, uint32_t b);
void sim_link_dial(struct sim_world *w, struct sim_member *m, uint32_t to);
void sim_link_send(struct sim_world *w, struct sim_member *m, const struct sync_action *a);
/* The slot at the other end of m's link to a member, or SIM_MEMBERS_MAX. */
uint32_t sim_link_slot(struct sim_world *w, struct sim_member *m, uint32_t id);
void sim_link_close(struct sim_world *w, uint32_t a, uint32_t b);
void sim_links_lose(struct sim_world *w, struct sim_member *m);

struct sim_row *sim_row_find(struct sim_table *t, uint64_t key);
void sim_store_write(struct sim_world *w, uint64_t term, const struct core_write *write);
void sim_store_copy(struct sim_store *to, const struct sim_store *from);
void sim_store_release(struct sim_store *s);
struct sim_core *sim_core_active(struct sim_world *w); /* NULL: none runs */
void sim_core_start(struct sim_world *w);
void sim_core_kill(struct sim_world *w, struct sim_core *c, bool restart);
void sim_core_event(struct sim_world *w, struct sim_event *e);
struct sim_core *sim_core_of(struct sim_world *w, uint32_t number);

void sim_member_start(struct sim_world *w, struct sim_member *m);
/* away_ms: until it starts again; 0 = some seconds, UINT64_MAX = never. */
void sim_member_kill(struct sim_world *w, struct sim_member *m, bool power, uint64_t away_ms);
void sim_member_event(struct sim_world *w, struct sim_member *m, struct sim_event *ev);
void sim_member_step(struct sim_world *w, struct sim_member *m, struct sync_event *ev);

void sim_trainer_kill(struct sim_world *w, struct sim_member *m);
void sim_trainer_action(struct sim_world *w, struct sim_member *m, const struct sync_action *a);
void sim_trainer_event(struct sim_world *w, struct sim_member *m, struct sim_event *e);
void sim_trainer_go(struct sim_world *w, struct sim_member *m);

bool sim_has(const struct sim_world *w, enum sim_injected fault);
void sim_fault(struct sim_world *w);
/* Does somebody else whom others can dial have the newest state? */
bool sim_others_have_head(const struct sim_world *w, const struct sim_member *m);
void sim_rewind(struct sim_world *w);
/* share.c: the writer begins, somebody answers, somebody is asked; all of it in events. */
void sim_share_begin(struct sim_world *w, struct sim_member *m, const struct msg_checkpoint_write *msg);
void sim_share_answer(struct sim_world *w, struct sim_member *m, const struct msg_checkpoint_part_done *msg);
void sim_share_alone(struct sim_world *w, struct sim_member *m);
void sim_share_asked(struct sim_world *w, struct sim_member *m, const struct msg_checkpoint_part *msg);
/* Its manifest has been signed. */
void sim_share_publish(struct sim_world *w, struct sim_member *m);
void sim_share_event(struct sim_world *w, struct sim_member *m, const struct sim_event *e);
/* The coordinator signs a manifest: what members sent, others have looked at. */
void sim_share_signed(struct sim_world *w, uint64_t term, uint64_t index);
void sim_checkpoint_keep(struct sim_world *w, const struct sim_member *m, uint64_t index);
int sim_checkpoint_load(const struct sim_world *w, const struct sim_member *m,
                        const struct msg_checkpoint *from, uint64_t first, size_t n, float *anchor,
                        float *momentum, struct err *err);
void sim_checkpoints_release(struct sim_world *w);
/* As the next one, signed. */
void sim_write_entry(struct sim_world *w, uint64_t term, enum ledger_kind kind,
                     enum proto_record which, const void *body);
void sim_fault_at_plan(struct sim_world *w, const struct msg_plan *p);
void sim_fault_at_commit(struct sim_world *w, const struct msg_commit *c);

void oracle_persist(struct sim_world *w, const struct core_action *a);
void oracle_check_leases(struct sim_world *w);
/* The ledger ends at `count` entries after all: what came later is forgotten. */
void oracle_begin(struct sim_world *w);
void oracle_rollback(struct sim_world *w, uint64_t count);
void oracle_start(struct sim_world *w, struct sim_member *m);
void oracle_frozen(struct sim_world *w, struct sim_member *m, uint32_t fragment);
void oracle_mix(struct sim_world *w, struct sim_member *m, uint32_t chunk);
void oracle_ready(struct sim_world *w, struct sim_member *m, const struct msg_ready *r);
void oracle_to_core(struct sim_world *w, struct sim_member *m, uint8_t type, const struct frame *f,
                    const void *msg);
void oracle_audit_asked(struct sim_world *w, uint64_t term, uint64_t plan,
                        const struct msg_audit *a);
void oracle_received(struct sim_world *w, struct sim_member *m, const struct frame *f,
                     const void *msg);
/* A message reached the machine of a coordinator, which may be stopped; it closes a connection. */
void oracle_arrived(struct sim_world *w, const struct sim_event *e);
void oracle_closed(struct sim_world *w, const struct sim_conn *c, enum err_code code);
/* A coordinator says that the run has failed; or has carried out all that an event led to. */
bool oracle_has_ended(struct sim_world *w); /* the store says so, and no operator */
void oracle_ended(struct sim_world *w, const char *why); /* a member hears of that */
void oracle_failed(struct sim_world *w, const struct sim_core *core, const char *why);
void oracle_stepped(struct sim_world *w, const struct sim_core *core);
const struct sim_contribution *oracle_contribution(struct sim_world *w, uint32_t member,
                                                   uint32_t fragment, uint64_t round,
                                                   const struct digest *root);
const struct msg_summed *oracle_summed(const struct msg_commit *c, uint32_t k);
bool oracle_commit(struct sim_world *w, uint64_t index, struct msg_entry *e, struct msg_commit *c);
/* Does the disk of the slot that announced it still have all of a contribution? */
bool oracle_keeps_bytes(const struct sim_world *w, const struct sim_contribution *x);
void oracle_rewind(struct sim_world *w, uint64_t index);
void oracle_hears_of_rewind(struct sim_world *w, struct sim_member *m, bool starts);
/* A chunk version as the first member that reached it had it; NULL: nobody did. */
const struct sim_state *oracle_state(struct sim_world *w, uint32_t chunk, uint64_t version);
void oracle_keep_state(struct sim_world *w, uint32_t slot, uint32_t chunk, uint64_t version,
                       const float *values);
void oracle_member(struct sim_world *w, struct sim_member *m);
void oracle_end(struct sim_world *w);

static inline void samples_add(sim_samples a, const sim_samples b) {
    for (uint32_t i = 0; i < sizeof(sim_samples); i++) a[i] |= b[i];
}
static inline void samples_remove(sim_samples a, const sim_samples b) {
    for (uint32_t i = 0; i < sizeof(sim_samples); i++) a[i] &= (uint8_t)~b[i];
}
static inline bool samples_meet(const sim_samples a, const sim_samples b) {
    for (uint32_t i = 0; i < sizeof(sim_samples); i++)
        if (a[i] & b[i]) return true;
    return false;
}
static inline bool samples_within(const sim_samples a, const sim_samples b) { /* a in b */
    for (uint32_t i = 0; i < sizeof(sim_samples); i++)
        if (a[i] & ~b[i]) return false;
    return true;
}
static inline uint32_t samples_count(const sim_samples a) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < sizeof(sim_samples); i++) n += (uint32_t)__builtin_popcount(a[i]);
    return n;
}

#define LLU(x) ((unsigned long long)(x))

#endif
