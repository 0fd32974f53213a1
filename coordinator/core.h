/* core.h - the coordinator's decisions, as a pure state machine:
 *
 *     (state, event, now) -> (state, actions)
 *
 * No sockets, files, threads, clock or random numbers: the same events give the same actions
 * everywhere, so a run is replayed from its events, and the simulator in tests/sim drives the very
 * code that serves. The shell (server.c) carries the actions out IN ORDER; above all, what an
 * ACT_PERSIST promises is durable before any later action is begun. If the process dies between
 * two actions, the rest is lost and nothing else: a restart loads the store and goes on.
 *
 * One outer step of one fragment, seen from here:
 *   TRAIN    members work on leases; READYs are collected for (fragment, round)
 *   REDUCE   quorum was ready and the grace window is over (or everybody was): the plan is frozen and sent;
 *            aggregators and second holders report each shard; a lost contributor is dropped from what had not arrived
 *            (MSG_DROP), a lost aggregator or holder makes a new plan (higher number, same contributors)
 *   AUDIT    every shard has two equal reports and every chunk a weight > 0: some chunks are summed once more
 *   commit   ONE ACT_PERSIST appends the ledger entry and spends the leases; only then LEDGER, LEASES and
 *            HOLDERS are sent; next round
 * Fragments go through their rounds side by side; leases, terms and plan numbers are common to all.
 * Docs: docs/architecture.md (why), docs/protocol.md (each message). */
#ifndef INTELLECT_CORE_H
#define INTELLECT_CORE_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/proto.h"

/* ---- what is durable ------------------------------------------------------------------------
 * The store is a set of tables from u64 to bytes; values are encoded records of messages.h. */
enum core_table {
    CORE_LEDGER,   /* ledger index -> entry (bytes of msg_entry; the shell signs it and stores msg_signed_entry) */
    CORE_LEASE,    /* lease id -> msg_spend (member 0: returned, free to lease again under its next generation) */
    CORE_INVITE,   /* invite id -> msg_invite_record; written by `invite` and by enrolments; not fed to core_load */
    CORE_META,     /* see enum core_meta; u64 little-endian */
    CORE_TABLES
};
enum core_meta { CORE_META_NEXT_SAMPLE = 1, CORE_META_NEXT_LEASE = 2, CORE_META_PAUSED = 3 };

struct core_write {
    enum core_table table;
    uint64_t key;
    uint8_t *value; /* owned by the action; NULL deletes the row */
    uint32_t value_length;
    bool is_signed; /* CORE_LEDGER: an entry taken over from a member; the shell keeps this signature */
    struct proto_sig signature;
};

/* ---- events ---------------------------------------------------------------------------------- */

/* What the store knows about the invite whose secret an ENROL showed; filled in by the shell,
 * because expiry needs a wall clock and `invite` writes the store from another process. */
struct core_invite {
    bool found, expired;
    uint64_t id;
    struct msg_invite_record record; /* an enrolment writes it back with one use less; aggregate_only: it
                                      * is for the coordinator's own aggregate-only node */
};

enum core_event_type {
    CORE_EV_START,        /* after the last core_load(); `term` was just raised in the store */
    CORE_EV_OPENED,       /* connection `conn` proved `key` and was sent a WELCOME by the shell */
    CORE_EV_MESSAGE,      /* frame + msg (struct msg_* of frame.type) from conn */
    CORE_EV_CLOSED,
    CORE_EV_TICK,         /* about every CORE_TICK_MS, only after all pending input was delivered */
    CORE_EV_PAUSE, CORE_EV_RESUME, /* operator */
    CORE_EV_REVOKE,       /* operator: member, text: never again, its key leaves the roster */
    CORE_EV_RELEASE,      /* operator: member, text: out of quarantine */
    CORE_EV_STOP          /* operator: say BYE (not final) to everybody */
};
#define CORE_TICK_MS 100

struct core_event {
    enum core_event_type type;
    uint64_t conn;                 /* a number the shell never uses twice */
    uint64_t term;                 /* CORE_EV_START */
    struct digest seed;            /* CORE_EV_START: random, secret; which chunks are audited follows from it */
    uint64_t hold_ms;              /* CORE_EV_START: no leases and plans for so long: after CORE_ACT_RESTART */
    uint32_t member;               /* CORE_EV_REVOKE, CORE_EV_RELEASE */
    const char *text;              /* likewise: the operator's reason, borrowed */
    struct proto_key key;          /* CORE_EV_OPENED */
    char host[PROTO_ADDRESS_BYTES_MAX + 1]; /* CORE_EV_OPENED: the address the peer is seen from */
    struct frame frame;            /* CORE_EV_MESSAGE */
    const void *msg;               /* borrowed until core_step returns */
    const struct core_invite *invite; /* with MSG_ENROL */
};

/* ---- actions --------------------------------------------------------------------------------- */

enum core_action_type {
    CORE_ACT_PERSIST,      /* all writes in one transaction, conditional on the term; durable before going on */
    CORE_ACT_SEND,         /* msg of `message` type to conn; the shell fills in the signature of a ROSTER */
    CORE_ACT_SEND_LEDGER,  /* entries [from, head] to conn, as MSG_LEDGER batches */
    CORE_ACT_SIGN,         /* sign msg (a msg_checkpoint_sign), answer conn with MSG_CHECKPOINT_SIGNED */
    CORE_ACT_KNOWN,        /* conn is a member now: lift the limits for strangers */
    CORE_ACT_LISTEN,       /* conn, a stranger, was asked for its ledger: take frames of a member's size from it */
    CORE_ACT_CLOSE,        /* send BYE with code, final, text; then close conn */
    CORE_ACT_RESTART,      /* entries of a newer ledger were persisted: raise the store's term above `term`, make a
                            * new core from the store, start it with hold_ms; nothing of this list comes after */
    CORE_ACT_FAIL,         /* the run has failed (fixed membership): end, with code and text */
    CORE_ACT_LOG           /* one line for the operator: level, text */
};
enum core_level { CORE_INFO, CORE_WARNING, CORE_ERROR };

struct core_action {
    enum core_action_type type;
    uint64_t conn;
    uint8_t message;
    uint64_t session, plan;        /* for the frame header; the term is the core's */
    void *msg;                     /* owned copy of a struct msg_*, released with the list */
    struct core_write *writes;     /* CORE_ACT_PERSIST */
    uint32_t write_count;
    uint64_t from;                 /* CORE_ACT_SEND_LEDGER */
    uint64_t term;                 /* CORE_ACT_RESTART: the highest seen */
    enum err_code code;            /* CORE_ACT_CLOSE */
    bool final;
    enum core_level level;
    char text[PROTO_TEXT_BYTES_MAX + 1];
};

struct core_actions {
    struct core_action *list;      /* grows; reuse one struct for all steps */
    uint32_t count, capacity;
};
void core_actions_clear(struct core_actions *a);    /* frees what the actions own, keeps capacity */
void core_actions_release(struct core_actions *a);

/* ---- the machine ------------------------------------------------------------------------------ */

struct core;

/* genesis is copied. run = its digest. own_key: the coordinator's own aggregate-only node, which is the
 * first choice as aggregator and the referee's reference when roots differ; all zero if none. */
struct core *core_create(const struct msg_genesis *genesis, const struct digest *run,
                         const struct proto_key *own_key, struct err *err);
void core_destroy(struct core *c);

/* Checkpoints are written with bf16 weights from now on (settings.h: checkpoint.weights), or not. */
void core_set_bf16(struct core *c, bool bf16);

/* Feed every row of the store, CORE_LEDGER in index order first (value = entry bytes without the
 * signature; who signed is the shell's business, but entries that a member shows are checked in full);
 * then one CORE_EV_START. ERR_CORRUPT: the row does not decode or contradicts another. */
int core_load(struct core *c, enum core_table table, uint64_t key, const uint8_t *value, size_t length,
              struct err *err);

/* now_ms: a monotonic clock of the coordinator's own. Appends to *out. */
void core_step(struct core *c, const struct core_event *ev, uint64_t now_ms, struct core_actions *out);

/* The initial ledger (genesis and first delegation entries) is written by `init`, through this. */
int core_entry_encode(struct proto_buffer *out, uint64_t index, const struct digest *previous, uint64_t term,
                      enum ledger_kind kind, enum proto_record body_record, const void *body, struct err *err);

/* ---- looking in (status, dashboard, simulator); pointers are valid until the next step ---------- */

struct core_member_view {
    uint32_t member;
    const char *name;
    struct proto_key key;
    bool aggregate_only, revoked, quarantined, live, ready, trains; /* ready: for any fragment */
    bool own; /* the coordinator's own aggregate-only node */
    uint64_t session, tokens_committed, state_index, step;
    double loss, tokens_per_s;
    uint8_t phase;
    uint32_t trainer_restarts;
    uint64_t silent_ms;
    double uplink; /* bytes a second, as its receivers measured; 0 = unknown */
};
struct core_fragment_view {
    uint64_t round, base_index, plan; /* plan: number of the one in work, 0 = none */
    uint32_t ready, contributors, shards;
    const char *phase; /* "train", "reduce", "audit" */
};
struct core_view {
    uint64_t term, head_index, settled_index, round, tokens_committed, tokens_total, samples_free, samples_spent,
        plan; /* round: commits of all fragments; plan: the newest number */
    struct digest head_digest, state_root; /* newest root that all reports agree on */
    uint64_t state_root_index;
    const char *phase; /* "train", "reduce", "paused", "complete" */
    bool behind;       /* members may still show newer entries: nothing is written to the ledger */
    uint32_t members_live, root_mismatches, plans_made, handovers, audits, audits_failed, quarantines;
    uint32_t fragments;
    uint64_t commits;
};
void core_look(const struct core *c, uint64_t now_ms, struct core_view *out);
void core_fragment_look(const struct core *c, uint32_t fragment, struct core_fragment_view *out);
uint32_t core_member_count(const struct core *c);
void core_member_look(const struct core *c, uint32_t i, uint64_t now_ms, struct core_member_view *out);

#ifdef SIM_FAULTS
/* Deliberate faults, compiled only into the simulator, which must find each. */
enum core_fault {
    CORE_FAULT_NONE,
    CORE_FAULT_COMMIT_ANNOUNCED_BEFORE_DURABLE,
    CORE_FAULT_ONE_REPORT_SUFFICES,        /* a round commits when its aggregators have reported */
    CORE_FAULT_LEASE_RETURNED_TWICE,       /* a lost member's lease goes back under two ids */
    CORE_FAULT_TIMERS_BEFORE_INPUT,        /* after a stop of its own it judges silence at once */
    CORE_FAULT_SPENDS_OTHER_FRAGMENT_AGAIN,/* a claim that another fragment's commit spent is spent again */
    CORE_FAULT_WEIGHT_ZERO_COMMITS,        /* a chunk summed from nobody is committed */
    CORE_FAULT_CHECKS_OWN_PARTS,           /* who sent a part of a checkpoint looks at it, too */
    CORE_FAULT_REWIND_KEEPS_SPENT          /* samples of undone commits are not handed out again */
};
extern enum core_fault core_fault;
#endif

#endif
