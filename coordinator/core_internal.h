/* core_internal.h - the state of the core, shared by the files core*.c and by nobody else.
 *
 *   core.c          create, the switch over events, looking in
 *   core_actions.c  how actions are put on the list
 *   core_load.c     the state from the rows of the store; ledger entries
 *   core_members.c  connections, enrolment, HELLO, heartbeats, silence
 *   core_leases.c   who may train on which samples, and what is spent
 *   core_ready.c    contributions are announced, a plan is made
 *   core_round.c    shards are reported, the round commits or is planned again
 *   core_roots.c    who has which state; donors, settled rounds, checkpoints, the end of the run
 *
 * Pointers to members are stable for the life of the core; nothing else is. */
#ifndef INTELLECT_CORE_INTERNAL_H
#define INTELLECT_CORE_INTERNAL_H

#include "coordinator/core.h"

/* ---- limits --------------------------------------------------------------------------------- */

#define CORE_CONNECTIONS_MAX 4096u      /* known and unknown keys together */
#define CORE_SESSIONS_MAX    (1u << 24) /* in one term: the low bits of a session number */
#define CORE_SHARDS_MAX      1u         /* of a plan */
#define CORE_PLAN_RANGES_MAX                                                                       \
    8192u /* claims in one commit: the entry must fit PROTO_BLOB_BYTES_MAX */
#define CORE_ASKS_PER_TICK_MAX       16u /* LEASE_ASKs of one member that are answered */
#define CORE_COMPLAINTS_PER_TICK_MAX 64u /* log lines that members can cause */
#define CORE_DONORS_MAX              16u /* the limit of HELLO_ACK and RESYNC */
#define CORE_HOLDERS_SENT_MAX        64u /* rounds whose holders a member that was away is told */
#define CORE_CHECKPOINT_TRIES_MAX    3u  /* of the last checkpoint of a run */
#define CORE_BACKOFF_SHIFT_MAX                                                                     \
    6u /* a round's plans get 1, 2, 4 ... 64 times the time for reports */
#define CORE_REPORT_SILENCES   4u     /* the first has 4 * silence_ms_max */
#define CORE_ABSMAX_LIMIT      0x1p96 /* a pseudo-gradient this large is no number any more */
#define CORE_GRID_EXPONENT_MAX 60     /* docs/flow.md, "A round", 3 */
#define CORE_GRID_BITS         37

/* ---- parts ---------------------------------------------------------------------------------- */

/* Disjoint ranges of samples in ascending order; neighbours are merged. */
struct interval_set {
    struct msg_range *list;
    uint32_t count, capacity;
    uint64_t total;
};
bool interval_overlaps(const struct interval_set *s, uint64_t start, uint64_t count);
/* Add a range that overlaps nothing (asserts); count > 0. */
void interval_add(struct interval_set *s, uint64_t start, uint64_t count);
void interval_release(struct interval_set *s);

struct lease {
    uint64_t id, start, count;
    uint32_t generation;
    uint32_t member; /* 0: returned; the next grant is of generation + 1 */
};

struct ready {
    bool present;
    bool planned; /* a contributor of the current plan, or of the one that failed a moment ago */
    bool dropped; /* lost since: the aggregators were told to go on without it */
    struct msg_ready msg;
    uint64_t samples;
};

struct member {
    uint32_t id;
    struct proto_key key;
    char name[PROTO_NAME_BYTES_MAX + 1];
    bool aggregate_only, revoked;
    uint64_t invite;

    bool here; /* counted as live: said HELLO, or held leases when we started; not lost since */
    uint64_t conn, session; /* 0: not connected just now */
    bool trains;
    char host[PROTO_ADDRESS_BYTES_MAX + 1];
    uint32_t port; /* 0: nobody can dial it */
    uint64_t heard_ms, progress_ms;
    struct msg_heartbeat beat;
    uint32_t asks; /* LEASE_ASKs since the last tick */

    bool catching_up;
    bool has_root; /* root_index: newest state of which it showed the right root */
    uint64_t root_index;
    struct digest root;
    uint64_t state_index;                          /* as it says itself */
    uint32_t donors[CORE_DONORS_MAX], donor_count; /* what it was told while catching up */

    uint32_t lease_count;
    uint64_t lease_samples, tokens_committed;
    uint32_t rounds_summed;
    struct ready ready;
    bool avoid; /* as aggregator or holder, until the round commits */
};

struct conn {
    uint64_t id;
    struct proto_key key;
    char host[PROTO_ADDRESS_BYTES_MAX + 1];
    struct member *member; /* NULL: the key is not enrolled */
    bool hello;
};

/* The anchor after so many commits; states[0] is the initial one. */
struct state {
    uint64_t index; /* ledger index of the commit, 0 for the initial state */
    bool root_known;
    bool root_fixed; /* named by the next commit: past discussion */
    struct digest root;
    uint32_t reference; /* who said so first; 0 = the ledger */
    uint64_t tokens_committed;
    uint32_t holders[2 * CORE_SHARDS_MAX], holder_count;
};

enum report_role { BY_AGGREGATOR, BY_HOLDER, REPORT_ROLES };
struct shard {
    struct msg_shard where;
    bool reported[REPORT_ROLES];
    struct msg_shard_report reports[REPORT_ROLES]; /* deep copies */
};

enum core_phase { CORE_TRAIN, CORE_REDUCE, CORE_COMPLETE };

struct core {
    struct msg_genesis genesis;
    const struct msg_outer *outer;
    struct digest run;
    struct proto_key own_key;
    uint64_t elements, samples_total, tokens_total;
    uint32_t chunks, sequence;

    uint64_t term, tick_ms;
    bool started, paused;
    uint32_t complaints; /* since the last tick */

    struct digest *entries; /* digest of every ledger entry */
    uint64_t entry_count, entry_capacity, entry_term;

    struct member *members; /* [PROTO_MEMBERS_MAX] */
    uint32_t member_count, session_counter;
    uint64_t roster_version;
    struct conn *conns;
    uint32_t conn_count, conn_capacity;

    struct lease *leases; /* ascending ids */
    uint32_t lease_count, lease_capacity;
    uint64_t next_sample, next_lease, returned_samples;
    struct interval_set spent, leased_at_load;

    struct state *states;
    uint32_t state_count, state_capacity;
    enum core_phase phase;
    bool quorum_reached, waiting_told;
    uint64_t quorum_ms;

    uint64_t plan,
        deadline_ms; /* number of the current or last plan; when its reports are overdue */
    struct msg_contributor *contributors; /* [PROTO_MEMBERS_MAX] */
    uint32_t contributor_count, shard_count, attempts;
    int32_t grid_exponent;
    struct shard shards[CORE_SHARDS_MAX];

    uint64_t settled_index;
    uint64_t checkpoint_due, checkpoint_writing,
        checkpoint_last; /* ledger indices of states; 0 = none */
    uint64_t complete_ms, checkpoint_retry_ms;
    uint32_t checkpoint_tries;
    bool finished; /* complete, and the last checkpoint is written or given up */

    uint32_t root_mismatches, plans_made, handovers;
    uint64_t commits;
};

static inline struct state *core_state_now(const struct core *c) {
    return &c->states[c->state_count - 1];
}
static inline uint64_t core_round(const struct core *c) { return c->state_count - 1; }
/* NULL for an id that is no member's. */
static inline struct member *core_member(const struct core *c, uint32_t id) {
    return id >= 1 && id <= c->member_count ? &c->members[id - 1] : NULL;
}

/* For log lines: printf(WHO, WHO_OF(m)). */
#define WHO       "member %u (%s)"
#define WHO_OF(m) (m)->id, (m)->name

/* Make room for one more element of `size` bytes in a list; out of memory ends the process. */
void *core_grow(void *list, uint64_t count, uint64_t *capacity, size_t size);
void *core_grow32(void *list, uint32_t count, uint32_t *capacity, size_t size);

/* ---- core_actions.c ------------------------------------------------------------------------- */

/* The rows of one transaction, collected before it is emitted. */
struct batch {
    struct core_write *writes;
    uint32_t count, capacity;
};
/* Encode `record` into a row; it must be within its limits (asserts). */
void batch_put(struct batch *b, enum core_table table, uint64_t key, enum proto_record which,
               const void *record);
void batch_put_meta(struct batch *b, enum core_meta key, uint64_t value);
void batch_put_bytes(struct batch *b, enum core_table table, uint64_t key, uint8_t *owned,
                     size_t length);
void batch_delete(struct batch *b, enum core_table table, uint64_t key);
/* Emits nothing for an empty batch; takes the writes over. */
void core_emit_persist(struct core_actions *out, struct batch *b);

/* To a member that is connected, else nothing. plan: 0 unless the message is about one. */
void core_send(struct core_actions *out, const struct member *m, enum proto_type type,
               uint64_t plan, const void *msg);
void core_send_conn(struct core_actions *out, uint64_t conn, uint64_t session, enum proto_type type,
                    uint64_t plan, const void *msg);
void core_send_ledger(struct core_actions *out, const struct member *m, uint64_t from);
void core_emit_sign(struct core_actions *out, const struct member *m,
                    const struct msg_checkpoint_sign *msg);
struct core_action *core_emit(struct core_actions *out, enum core_action_type type);
void core_log(struct core_actions *out, enum core_level level, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* A line that a member's behaviour causes: only so many per tick. */
void core_complain(struct core *c, struct core_actions *out, enum core_level level,
                   const char *format, ...) __attribute__((format(printf, 4, 5)));
/* Say BYE and forget the connection. */
void core_close(struct core *c, struct core_actions *out, uint64_t conn, enum err_code code,
                bool final, const char *format, ...) __attribute__((format(printf, 6, 7)));

/* ---- core_load.c ---------------------------------------------------------------------------- */

/* Append the next ledger entry: a row in the batch and its digest in the chain. *index receives
 * its place. -1 with ERR_FULL where body does not fit an entry; nothing has changed then. */
int core_append(struct core *c, struct batch *b, enum ledger_kind kind, enum proto_record which,
                const void *body, uint64_t *index, struct err *err);
/* What a commit changes for good, the same live and at a restart: spent samples, tokens, ramps and
 * the new state. ERR_CORRUPT: it contradicts what was committed before; nothing has changed. */
int core_take_commit(struct core *c, uint64_t index, const struct msg_commit *commit,
                     struct err *err);
struct member *core_add_member(struct core *c, const struct msg_enrolment *enrolment);

/* ---- core_members.c ------------------------------------------------------------------------- */

void core_on_opened(struct core *c, const struct core_event *ev, struct core_actions *out);
void core_on_closed(struct core *c, uint64_t conn);
void core_on_enrol(struct core *c, struct conn *k, const struct msg_enrol *msg,
                   const struct core_invite *invite, struct core_actions *out);
void core_on_hello(struct core *c, struct conn *k, const struct msg_hello *msg, uint64_t now_ms,
                   struct core_actions *out);
void core_on_heartbeat(struct core *c, struct member *m, const struct msg_heartbeat *msg,
                       uint64_t now_ms, struct core_actions *out);
/* The member is gone: its connection, leases, and its parts in the round. */
void core_lose(struct core *c, struct member *m, enum err_code code, const char *why,
               struct core_actions *out);
/* Lose whoever was silent for too long; `stopped`: we were, so nobody is judged. */
void core_judge(struct core *c, bool stopped, uint64_t now_ms, struct core_actions *out);

struct conn *core_conn(const struct core *c, uint64_t id);
void core_forget_conn(struct core *c, uint64_t id);
bool core_is_own(const struct core *c, const struct member *m);
struct member *core_own(const struct core *c); /* the coordinator's own node if it is connected */
/* Connected, holds a whole state as far as we know: may aggregate and hold. */
bool core_serves(const struct member *m);
uint32_t core_live_count(const struct core *c);
/* Where `to` dials `target`; false if nobody can. The host is borrowed. */
bool core_address(const struct member *to, const struct member *target, struct msg_address *out);

/* ---- core_leases.c -------------------------------------------------------------------------- */

void core_on_lease_ask(struct core *c, struct member *m, uint32_t samples,
                       struct core_actions *out);
void core_send_leases(struct core *c, struct member *m, struct core_actions *out);
/* 0 if m may claim these ranges, and *samples is their sum. ERR_REFUSED says which one is wrong. */
int core_check_claims(const struct core *c, const struct member *m, const struct msg_lease *ranges,
                      uint32_t count, uint64_t *samples, struct err *err);
/* Take the claimed prefixes off the lease table. */
void core_spend_claims(struct core *c, struct member *m, const struct msg_lease *ranges,
                       uint32_t count, struct batch *b);
/* Leases of members that are lost go back, except those claimed in the current plan: until that
 * ends nobody knows whether they are spent. Returns how many samples went back. */
uint64_t core_return_leases(struct core *c, struct batch *b);
/* A row read from the store; `id` is not in the table yet. */
void core_add_lease(struct core *c, const struct lease *lease);
uint64_t core_samples_free(const struct core *c);
bool core_tokens_reached(const struct core *c);
bool core_data_exhausted(const struct core *c); /* every sample is spent */

/* ---- core_ready.c --------------------------------------------------------------------------- */

void core_on_ready(struct core *c, struct member *m, const struct msg_ready *msg,
                   struct core_actions *out);
void core_forget_ready(struct member *m);
/* Make a plan if it is time. */
void core_try_plan(struct core *c, uint64_t now_ms, struct core_actions *out);
uint32_t core_quorum_needed(const struct core *c, uint32_t *ready, uint32_t *waited);
/* Freeze and send a plan over the READYs of live members (only_planned: of the plan before).
 * False if there is nobody to aggregate or to hold. */
bool core_make_plan(struct core *c, bool only_planned, uint64_t now_ms, struct core_actions *out);
void core_send_plan(struct core *c, const struct member *m, struct core_actions *out);
bool core_in_plan(const struct core *c, const struct member *m);
/* Index among the plan's contributors, or -1. */
int core_contributor_index(const struct core *c, uint32_t member);

/* ---- core_round.c --------------------------------------------------------------------------- */

void core_on_shard_report(struct core *c, struct member *m, const struct frame *f,
                          const struct msg_shard_report *msg, uint64_t now_ms,
                          struct core_actions *out);
/* Give the round to others: a new plan number, or back to collecting READYs. */
void core_replan(struct core *c, uint64_t now_ms, struct core_actions *out);
void core_drop_contributor(struct core *c, struct member *m, struct core_actions *out);
/* Is somebody lost whom the plan needs, or are its reports overdue? Then plan again. */
void core_check_round(struct core *c, uint64_t now_ms, struct core_actions *out);
void core_set_deadline(struct core *c, uint64_t now_ms);
/* Who stands in any of these sets. */
void core_summed_union(const struct msg_summed *summed, uint32_t count,
                       uint8_t set[PROTO_SET_BYTES_MAX]);
void core_forget_reports(struct core *c);
void core_send_holders(const struct core *c, const struct state *s, const struct member *m,
                       struct core_actions *out);

/* ---- core_roots.c --------------------------------------------------------------------------- */

enum root_verdict { ROOT_AGREES, ROOT_DIFFERS, ROOT_OF_NOTHING };
/* A member shows the root of its state at `index`. */
enum root_verdict core_note_root(struct core *c, struct member *m, uint64_t index,
                                 const struct digest *root, struct core_actions *out);
void core_on_root(struct core *c, struct member *m, const struct msg_root *msg,
                  struct core_actions *out);
struct state *core_find_state(const struct core *c, uint64_t index);
/* Whom m can catch up from: fills m->donors and, borrowing hosts, list[CORE_DONORS_MAX]. */
uint32_t core_pick_donors(const struct core *c, struct member *m, struct msg_address *list);
void core_send_resync(struct core *c, struct member *m, struct core_actions *out);
/* Members that catch up and whose donors are all gone get new ones. */
void core_renew_donors(struct core *c, struct core_actions *out);
void core_settle(struct core *c);

void core_checkpoint_after_commit(struct core *c, struct core_actions *out);
void core_try_checkpoint(struct core *c, struct core_actions *out);
void core_on_checkpoint_sign(struct core *c, struct member *m,
                             const struct msg_checkpoint_sign *msg, struct core_actions *out);
void core_on_checkpoint_done(struct core *c, struct member *m,
                             const struct msg_checkpoint_done *msg, uint64_t now_ms,
                             struct core_actions *out);
/* Is the run over? Then the last checkpoint, then BYE to everybody who has the last state. */
void core_check_complete(struct core *c, uint64_t now_ms, struct core_actions *out);

#endif
