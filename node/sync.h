/* sync.h - a member's side of the outer steps, as a state machine of the same kind as
 * coordinator/core.h: (state, event, now) -> (state, actions). It knows ledger, leases, rounds,
 * chunks and peers; it knows nothing of layers, sockets or processes. The agent (agent.c) carries
 * the actions out in order; the simulator drives the very same code.
 *
 * Arithmetic on the state (encode, sum, mean, Nesterov) happens inside, a bounded number of chunks per
 * SYNC_EV_WORK, so that the thread that runs it stays responsive whatever the model's size.
 *
 * Rules: docs/flow.md. Durable state goes through `struct disk`; what a message promises is durable
 * before the message is emitted. */
#ifndef INTELLECT_SYNC_H
#define INTELLECT_SYNC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/proto.h"

/* ---- the disk, replaced in the simulator ------------------------------------------------------
 * Names are short and flat ("anchor", "momentum", "index", "contribution", "result-12"). */
struct disk {
    void *arg;
    /* A named array of `bytes`, zero-filled when new; the same memory for the life of the process.
     * What is stored there survives the death of the process, and of the machine once flushed. */
    void *(*map)(void *arg, const char *name, size_t bytes, bool *created, struct err *err);
    int (*flush)(void *arg, const char *name, size_t offset, size_t bytes, struct err *err);
    /* Replace a small file atomically and durably (temp, fsync, rename, fsync of the directory). */
    int (*put)(void *arg, const char *name, const void *bytes, size_t length, struct err *err);
    /* *out is malloc()ed, freed by the caller. ERR_NOT_FOUND when there is none. */
    int (*get)(void *arg, const char *name, uint8_t **out, size_t *length, struct err *err);
    void (*remove)(void *arg, const char *name); /* of a mapped name too: gone after the unmap */
};

/* ---- configuration ----------------------------------------------------------------------------- */

struct sync_config {
    const struct msg_genesis *genesis;   /* copied */
    struct digest run;
    const struct identity *identity;     /* own, signs contributions and reports; borrowed */
    uint64_t instance;                   /* random, of this life of the process */
    uint32_t member;                     /* own id, from ENROLLED */
    bool trains;                         /* false: aggregate-only */
    uint32_t port;                       /* where peers may dial us; 0 = not reachable */
    uint64_t elements;                   /* of the parameter vector; > 0 */
    /* Fill anchor[0..n) and momentum[0..n) from element `first` on: from == NULL: the initial state (by
     * genesis's seed, or its init_from checkpoint); else that checkpoint's. -1 with ERR_NOT_FOUND: it cannot be
     * had here; ERR_TIMEOUT: not yet. It is asked for again, and members meanwhile. */
    int (*load)(void *arg, const struct msg_checkpoint *from, uint64_t first, size_t n, float *anchor,
                float *momentum, struct err *err);
    void *load_arg;
    struct disk disk;
};

/* ---- events ------------------------------------------------------------------------------------- */

enum sync_event_type {
    SYNC_EV_CONNECTED,        /* to the coordinator, WELCOME checked (by the agent): frame = the WELCOME's
                               * (its term); HELLO follows */
    SYNC_EV_MESSAGE,          /* frame + msg from the coordinator */
    SYNC_EV_DISCONNECTED,
    SYNC_EV_PEER_OPEN,        /* a link asked for by SYNC_ACT_PEER_DIAL is up, or a peer dialled us */
    SYNC_EV_PEER_MESSAGE,     /* frame + msg from `peer` (its key stands in the roster) */
    SYNC_EV_PEER_CLOSED,      /* link to `peer` is gone, or could not be made */
    SYNC_EV_PEER_DRAINED,     /* little is unsent to `peer`: more may be emitted */
    SYNC_EV_WORK,             /* go on with queued work; ask sync_has_work() whether there is some */
    SYNC_EV_TICK,             /* about every SYNC_TICK_MS; beats */
    SYNC_EV_TRAINER_UP,       /* trainer processes run and wait for parameters; also after a restart. steps: as
                               * found in its saved inner state; 0 = it has no moments, so peers are asked */
    SYNC_EV_TRAINER_STEP,     /* one inner step done: samples, steps, loss, tokens_per_s */
    SYNC_EV_TRAINER_FROZEN,   /* answer to TRAINER_FREEZE: fragment, samples, steps; local = parameters [elements], of
                               * which the fragment's chunks were written, and are encoded piece by piece: valid until
                               * the next TRAINER_FREEZE of the fragment or TRAINER_DOWN */
    SYNC_EV_TRAINER_APPLIED,  /* answer to TRAINER_APPLY, _RESET or _MOMENTS_IMPORT: its slot may be rewritten */
    SYNC_EV_TRAINER_MOMENTS,  /* answer to TRAINER_MOMENTS_EXPORT: local = second moments [elements], served to
                               * peers piece by piece: valid until the next EXPORT or TRAINER_DOWN; steps */
    SYNC_EV_TRAINER_DOWN,     /* died or was stopped: its parameters and queued samples are lost */
    SYNC_EV_CHECKPOINT,       /* the agent's writer: see done, manifest, text */
    SYNC_EV_CHECKPOINT_OFFER, /* the agent's writer offers a part: msg (msg_checkpoint_part) */
    SYNC_EV_CHECKPOINT_PART,  /* what became of a part of ACT_CHECKPOINT_PART, or the writer has looked at one
                               * itself: msg (msg_checkpoint_part_done) */
    SYNC_EV_LEAVE             /* the owner wants to leave in order: LEAVE is sent, then nothing more */
};
#define SYNC_TICK_MS 50

struct sync_event {
    enum sync_event_type type;
    uint32_t peer;
    struct frame frame;
    const void *msg;              /* borrowed until return */
    uint32_t fragment;
    const float *local;
    uint64_t samples;             /* consumed since the trainer's last RESET, in all */
    uint64_t beats;               /* what the trainers have computed in all, in units smaller than a step: while
                                   * it grows they are at work, however long a step takes */
    uint64_t steps;               /* inner steps it ever did, or went into its moments */
    double loss, tokens_per_s;
    /* SYNC_EV_CHECKPOINT: either manifest bytes to be signed (done = false) or the end (done = true, ok) */
    bool done, ok;
    struct proto_bytes manifest;
    struct digest manifest_digest;
    const char *text;
};

/* ---- actions ------------------------------------------------------------------------------------- */

enum sync_action_type {
    SYNC_ACT_SEND,               /* msg to the coordinator */
    SYNC_ACT_DISCONNECT,         /* from the coordinator (broken or older term); the agent dials again */
    SYNC_ACT_PEER_DIAL,          /* peer, host, port: make a link unless there is one */
    SYNC_ACT_PEER_SEND,          /* msg to peer; if there is no link it is dropped and PEER_CLOSED follows */
    SYNC_ACT_PEER_CLOSE,
    SYNC_ACT_ROSTER,             /* msg (msg_roster_body): whom to accept from now on */
    SYNC_ACT_TRAINER_SAMPLES,    /* append [start, start+count) to what the trainer works on */
    SYNC_ACT_TRAINER_FREEZE,     /* at the next step boundary: write the fragment's parameters; wait: then stand still
                                  * until APPLY, RESET or CONTINUE */
    SYNC_ACT_TRAINER_APPLY,      /* slot and ops were filled in: take them over at a step boundary and go on */
    SYNC_ACT_TRAINER_RESET,      /* parameters := slot (the anchor), forget queued samples; keep moments */
    SYNC_ACT_TRAINER_CONTINUE,   /* after a FREEZE that waits and whose contribution is dropped: go on as is */
    SYNC_ACT_TRAINER_MOMENTS_EXPORT,
    SYNC_ACT_TRAINER_MOMENTS_IMPORT, /* slot holds second moments, steps their count */
    SYNC_ACT_CHECKPOINT_BEGIN,   /* msg (msg_checkpoint_write): the agent opens a writer; the state is the current one */
    SYNC_ACT_CHECKPOINT_SIGNED,  /* msg (msg_checkpoint_signed) */
    SYNC_ACT_CHECKPOINT_PART_DONE, /* to the writer: msg (msg_checkpoint_part_done), of a part it offered */
    /* to the writer: nobody answers for the parts that are offered; it does all else alone */
    SYNC_ACT_CHECKPOINT_ALONE,
    SYNC_ACT_CHECKPOINT_KEEP,    /* msg (msg_checkpoint_keep): of the current state, or none any more */
    /* msg (msg_checkpoint_part): send it, or look at it; answer with EV_CHECKPOINT_PART */
    SYNC_ACT_CHECKPOINT_PART,
    SYNC_ACT_BYE,                /* the coordinator said good-bye: code, final, text */
    SYNC_ACT_LOG
};
enum sync_level { SYNC_DEBUG, SYNC_INFO, SYNC_WARNING, SYNC_ERROR };

struct sync_action {
    enum sync_action_type type;
    uint32_t peer;
    uint8_t message;
    uint64_t term, session, plan;   /* for the frame header */
    void *msg;                      /* owned copy; but the data of a CHUNK or RESULT is sync's, and there until
                                     * the next event */
    char host[PROTO_ADDRESS_BYTES_MAX + 1];
    uint16_t port;
    uint64_t start, count;          /* TRAINER_SAMPLES */
    uint32_t fragment;              /* TRAINER_FREEZE */
    bool wait;                      /* likewise */
    uint64_t tokens;                /* TRAINER_APPLY, _RESET: committed tokens, for the learning rate */
    uint32_t contributors;          /* likewise: members whose tokens grow the run between commits */
    uint64_t steps;
    enum err_code code;
    bool final;
    enum sync_level level;
    char text[PROTO_TEXT_BYTES_MAX + 1];
};
struct sync_actions {
    struct sync_action *list;
    uint32_t count, capacity;
};
void sync_actions_clear(struct sync_actions *a);
void sync_actions_release(struct sync_actions *a);

/* How the trainer takes over a chunk of its slot. */
enum sync_op {
    SYNC_OP_KEEP = 0,  /* nothing changed here */
    SYNC_OP_MIX = 1,   /* local = alpha*local + (1-alpha)*slot */
    SYNC_OP_ADD = 2    /* local += slot */
};

/* ---- the machine --------------------------------------------------------------------------------- */

struct sync;

/* Loads what the disk has (anchor, momentum, versions, ledger, frozen contribution, results). A torn
 * chunk is undone from the journal or marked missing; nothing is fatal but a disk error. */
struct sync *sync_create(const struct sync_config *config, uint64_t now_ms, struct err *err);
void sync_destroy(struct sync *s);
/* -1: the disk failed; the agent ends with this error (state on disk stays consistent). */
int sync_step(struct sync *s, const struct sync_event *ev, uint64_t now_ms, struct sync_actions *out,
              struct err *err);
bool sync_has_work(const struct sync *s);

/* The slot that sync fills before TRAINER_APPLY/_RESET/_MOMENTS_IMPORT: `slot` [elements] floats, `ops`
 * one byte per chunk; memory of the agent (shared with the trainers), set before SYNC_EV_TRAINER_UP. */
void sync_set_slot(struct sync *s, float *slot, uint8_t *ops);

/* Called before a chunk of the state changes: the agent's checkpoint writer saves it first. May be NULL. */
void sync_set_before_change(struct sync *s, void (*hook)(void *arg, uint32_t chunk), void *arg);

/* ---- looking in ------------------------------------------------------------------------------------ */

/* What became of the samples that the trainer worked on, and of its time, since this process began. Of work that
 * is lost only that which no frozen contribution holds counts: what is frozen may still be summed. */
enum sync_loss {
    SYNC_LOSS_TRAINER, /* the trainer died */
    SYNC_LOSS_LEASES,  /* the samples went to others, or were spent through another process */
    SYNC_LOSS_REFUSED, /* the coordinator refused the contribution */
    SYNC_LOSS_ORPHAN,  /* frozen by a trainer that died since, and not summed */
    SYNC_LOSS_STATE,   /* the state it stood on had to be fetched anew */
    SYNC_LOSSES
};
struct sync_account {
    uint64_t trained, lost[SYNC_LOSSES]; /* samples */
    uint64_t unfrozen;                   /* samples that are in the trainer's parameters alone, now */
    /* The trainer has samples to work on; has none; waits for the state, at a start or a reset; stands still for
     * a commit (overlap 0). Not while it is down, nor while this process itself was stopped. */
    uint64_t working_ms, no_data_ms, no_state_ms, standing_ms;
};

struct sync_view {
    uint64_t term, session, head_index, state_index, round, plan, tokens_committed, settled_index;
    struct digest state_root;       /* of state_index; zero while catching up */
    const char *phase;              /* "connecting", "catching up", "training", "frozen", "reducing", "applying", ... */
    uint32_t chunk_count, chunks_missing, members_live, peers;
    uint64_t bytes_to_peers, bytes_from_peers;
    uint64_t contributions_summed, contributions_refused;
    uint64_t samples_uncommitted;
    struct sync_account account;
};
void sync_look(const struct sync *s, struct sync_view *out);
/* The state itself, for checkpoints and invariants: fp32 [elements], read only. */
const float *sync_anchor(const struct sync *s);
const float *sync_momentum(const struct sync *s);
uint64_t sync_chunk_version(const struct sync *s, uint32_t chunk); /* UINT64_MAX = missing */
/* Signed ledger entries the member keeps, for the checkpoint: borrowed. */
uint32_t sync_ledger_count(const struct sync *s);
const struct msg_signed_entry *sync_ledger_entry(const struct sync *s, uint32_t i);

#ifdef SIM_FAULTS
/* Deliberate faults, compiled only into the simulator, which must find each. */
enum sync_fault {
    SYNC_FAULT_NONE,
    SYNC_FAULT_DIVISOR_NOT_CORRECTED, /* divides by the plan's whole weight although a contributor was dropped */
    SYNC_FAULT_PLAN_NUMBER_IGNORED,   /* takes chunks and reports of an older plan as if they were of this one */
    SYNC_FAULT_CHUNK_SUMMED_TWICE,    /* a chunk that is sent again is added again */
    SYNC_FAULT_RESIDUAL_AT_SEND,      /* error feedback changes with the freeze, not with the commit */
    SYNC_FAULT_MOMENTUM_NOT_JOINED,   /* a joiner takes the anchor of others and not their momentum */
    SYNC_FAULT_JOIN_MISSES_COMMIT,    /* ... and believes what it got to be newer than it is */
    SYNC_FAULT_CLAIMS_TOO_MUCH,       /* claims what the trainer has queued, too */
    SYNC_FAULT_REPORT_BEFORE_DISK,    /* a shard is reported and not kept */
    SYNC_FAULT_READY_BEFORE_DISK,     /* a contribution is announced before it is flushed */
    SYNC_FAULT_MIX_NOT_SUMMED,        /* takes over a commit that did not sum it, and loses its work */
    SYNC_FAULT_CLAIMS_KEPT,           /* what others' leases hold by now is still claimed and trained on */
    SYNC_FAULT_REWIND_KEEPS_WORK,     /* the trainer goes on with what was undone */
    /* Lies, which one member of a run tells and the others must see through. */
    SYNC_FAULT_LIES_SUM,  /* an aggregator's sums are not the sums */
    SYNC_FAULT_LIES_NORM, /* a contributor announces half of its norm */
    SYNC_FAULT_LIES_NAN   /* a contributor's bytes are no numbers */
};
extern enum sync_fault sync_fault;
#endif

#endif
