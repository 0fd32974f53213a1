/* core_internal.h - the state of the core, shared by the files core*.c and by nobody else.
 *
 *   core.c            create, the switch over events, looking in
 *   core_actions.c    how actions are put on the list
 *   core_intervals.c  sets of samples
 *   core_ledger.c     entries: how they are appended, what each means for the run
 *   core_load.c       the state from the rows of the store, and what a start puts right
 *   core_takeover.c   a member shows a newer ledger than ours
 *   core_members.c    connections, enrolment, HELLO
 *   core_silence.c    heartbeats, measured uplinks, who is lost
 *   core_standing.c   revoked, quarantined, released
 *   core_leases.c     who may train on which samples, and what is spent
 *   core_ready.c      contributions are announced; is it time for a plan?
 *   core_plan.c       a plan is made: weights, clips, grid, shards over aggregators
 *   core_round.c      shards are reported; losses and delays make a new plan
 *   core_audit.c      some chunks are summed again, accusations are looked into
 *   core_commit.c     the one transaction in which a round becomes part of the run
 *   core_resum.c      committed results that nobody holds any more
 *   core_roots.c      who has which state; donors, settled rounds
 *   core_referee.c    two members' states differ: which chunks, and whose are wrong
 *   core_share.c      parts of a checkpoint: who sends, who looks at them
 *   core_end.c        checkpoints, and the end of the run
 *
 * Pointers to members are stable for the life of the core; nothing else is. */
#ifndef INTELLECT_CORE_INTERNAL_H
#define INTELLECT_CORE_INTERNAL_H

#include "coordinator/core.h"

/* ---- limits --------------------------------------------------------------------------------- */

#define CORE_CONNECTIONS_MAX 4096u      /* known and unknown keys together */
#define CORE_CUT_HEARTBEATS   3u        /* so long a plan waits for who closed its connection */
#define CORE_SESSIONS_MAX    (1u << 24) /* in one term: the low bits of a session number */
#define CORE_PLAN_RANGES_MAX                                                                       \
    8192u /* claims in one commit: the entry must fit PROTO_BLOB_BYTES_MAX */
#define CORE_AWAY_SILENCES           8u  /* so long a lost member's samples are handed out last */
#define CORE_ASKS_PER_TICK_MAX       16u /* LEASE_ASKs of one member that are answered */
#define CORE_COMPLAINTS_PER_TICK_MAX 64u /* log lines that members can cause */
#define CORE_DONORS_MAX              16u /* the limit of HELLO_ACK and RESYNC */
#define CORE_COMMITS_KEPT            64u /* of the newest: their holders are told to who was away */
#define CORE_UNSETTLED_ROUNDS        8u  /* of each fragment, for who has no state yet: as many as holders keep */
#define CORE_CHECKPOINT_TRIES_MAX    3u  /* of the last checkpoint of a run */
#define CORE_BACKOFF_SHIFT_MAX                                                                     \
    6u /* a round's plans get 1, 2, 4 ... 64 times the time for reports */
#define CORE_REPORT_SILENCES   4u     /* the first has 4 * silence_ms_max */
#define CORE_ABSMAX_LIMIT      0x1p96 /* a pseudo-gradient this large is no number any more */
#define CORE_GRID_EXPONENT_MAX 60     /* docs/flow.md, "A round", 3 */
#define CORE_GRID_BITS         37
#define CORE_UPLINK_CAP        8.0    /* times the median; more nobody is taken for */
#define CORE_LR_ROUNDS         8u     /* whose weights are the measure of the next one */
#define CORE_MISSED_ROUNDS_MAX 3u     /* summed nowhere so often running: not waited for any more */
#define CORE_UNHEARD_PLANS_MAX 3u     /* so many, and a contribution of which nothing arrives is given up;
                                       * of which something arrives, after twice as many */
#define CORE_GIVEN_UP_MAX      3u     /* so many in a row, and its member gets no samples any more */
#define CORE_UNFOUNDED_MAX     4u     /* accusations; more, and the accuser is avoided */
#define CORE_ACCUSATIONS_MAX   4u     /* of one member in one round: each may hold it up */
#define CORE_INQUIRIES_MAX     8u     /* differing roots that are looked into at once */
#define CORE_TAKEOVER_BYTES_MAX (64u << 20) /* of entries taken over at once; more follow later */
#define CORE_TERM_STEP_MAX     (1u << 20) /* a term further ahead than this is nobody's */

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
/* Take a range out that is wholly in the set (asserts). */
void interval_remove(struct interval_set *s, uint64_t start, uint64_t count);
/* The first gap at or after *start and below `end`: its start and length; false if there is none. */
bool interval_gap(const struct interval_set *s, uint64_t end, uint64_t *start, uint64_t *count);
void interval_release(struct interval_set *s);

struct lease {
    uint64_t id, start, count;
    uint32_t generation;
    uint32_t member;  /* 0: returned; the next grant is of generation + 1 */
    uint32_t former;  /* ... from this member, which gets it back if it comes before it is granted; 0 = nobody */
    uint64_t returned_ms;
    uint64_t claimed; /* scratch of core_leases.c: end of the furthest claim */
};

/* A lease that the ledger says was granted again, or more often. */
struct regrant {
    uint64_t lease;
    uint32_t generation; /* under which samples of it were spent */
};

/* Samples of a member that a commit spent a short while ago: a contribution that was frozen before
 * may still claim them. */
struct recent {
    uint64_t lease, start, count, index;
    uint32_t generation;
};

/* What a member has to do with the current round of one fragment. */
struct part {
    bool present; /* its READY */
    bool planned; /* a contributor of the current plan, or of the one that failed a moment ago */
    bool dropped; /* lost since: the aggregators were told to go on without it */
    uint64_t since_ms; /* when it came */
    bool lost;    /* its member has announced another one since: these bytes are gone */
    uint32_t unheard; /* plans running that had an empty chunk; twice where nothing of it came */
    bool due_told;
    bool avoid; /* as aggregator or holder, until the round commits */
    uint32_t accusations; /* of others, until the round commits */
    struct msg_ready msg;
    /* Samples of the member that were spent and have no weight in this fragment yet. It outlives
     * rounds; together with the claims that are not spent it limits what a contribution weighs. */
    uint64_t account;
};

/* What one receiver measured of a member's uplink. */
struct rate {
    uint32_t receiver;
    double bytes_per_s;
    uint64_t at_ms;
};

struct member {
    uint32_t id;
    struct proto_key key;
    char name[PROTO_NAME_BYTES_MAX + 1];
    bool aggregate_only, revoked, quarantined;
    uint64_t invite;

    bool here; /* counted as live: said HELLO, or held leases when we started; not lost since */
    bool left; /* it said LEAVE, and no HELLO since: it does not come back for its samples */
    uint64_t conn, session; /* 0: not connected just now */
    uint64_t instance;      /* of the process behind the session */
    bool trains;
    char host[PROTO_ADDRESS_BYTES_MAX + 1];
    uint32_t port; /* 0: nobody can dial it */
    uint64_t heard_ms, progress_ms;
    uint64_t closed_ms; /* conn 0: since when */
    struct msg_heartbeat beat; /* without its rates */
    uint32_t asks;             /* LEASE_ASKs since the last tick */
    struct rate rates[PROTO_RATES_MAX];
    uint32_t rate_count;
    double uplink; /* bytes a second, smoothed; 0 = unknown */

    bool catching_up;
    bool has_root; /* root_index: newest state of which it showed the right root */
    uint64_t root_index;
    struct digest root;
    uint64_t state_index;                          /* as it says itself */
    uint32_t donors[CORE_DONORS_MAX], donor_count; /* what it was told while catching up */

    uint32_t lease_count;
    uint64_t lease_samples, tokens_committed;
    uint32_t rounds_summed;
    uint32_t missed;    /* rounds running in which it was planned, live, and summed nowhere */
    uint32_t given_up;  /* contributions running of which too little arrived */
    uint32_t unfounded; /* accusations that an audit did not bear out */
    bool distrusted;    /* last choice for aggregator and holder, never an auditor */
    struct part *parts; /* [fragments] */
    struct recent *recent;
    uint32_t recent_count, recent_capacity;
    uint64_t term_shown, term_shown_ms; /* a newer term than ours, and since when it says so; */
    uint64_t showed_ms;                 /* when it last showed a newer ledger: see core_takeover.c */
};

struct conn {
    uint64_t id;
    struct proto_key key;
    char host[PROTO_ADDRESS_BYTES_MAX + 1];
    struct member *member; /* NULL: the key is not enrolled */
    bool hello;
    bool showing; /* was asked for the entries that we lack */
};

/* A checkpoint whose parts members send and look at. */
#define CORE_HELPERS_MAX 32u
#define CORE_SHARE_JOBS_MAX 256u /* offered and not answered */
#define CORE_MEMBER_JOBS_MAX 2u  /* of these, with one member: one on its way, and the next */
struct share_job {
    struct msg_checkpoint_part msg; /* deep copy */
    uint32_t member; /* 0: waits until somebody has room */
    uint64_t since_ms, tried; /* tried: bits by helper */
};
struct share_part {
    uint32_t sent_by; /* a member, or 0: the writer itself */
    bool checked;
};
struct share {
    uint64_t index; /* of the state; 0: nothing is shared */
    uint32_t helper[CORE_HELPERS_MAX], helpers;
    struct share_job jobs[CORE_SHARE_JOBS_MAX];
    uint32_t job_count;
    struct share_part *part; /* owned */
    uint32_t part_count, part_capacity;
};

/* The vector after so many commits; states[0] is the initial one. Every commit and rewind makes one. */
struct state {
    uint64_t index; /* of the ledger entry, 0 for the initial state */
    bool root_known;
    bool root_confirmed; /* a second member or our own node said the same */
    bool root_fixed;     /* named by a commit or checkpoint: past discussion */
    bool disputed;       /* the referee is on it */
    bool undone;         /* by a rewind */
    bool forsaken;       /* those who reported its results have lost them, it seems */
    struct digest root;
    uint32_t reference; /* who said so first; 0 = the ledger */
    uint64_t tokens_committed;
    struct msg_spend *spent; /* by this commit, for a rewind; owned */
    uint32_t spent_count;
    uint64_t term;             /* of the commit */
    struct msg_commit *commit; /* owned; of the newest CORE_COMMITS_KEPT commits, else NULL */
    uint32_t *holders, holder_count; /* of its results; owned, kept as long as `commit` */
    struct msg_shard *resummed;      /* who holds what was summed again; likewise */
    uint32_t resummed_count;
};

enum report_role { BY_AGGREGATOR, BY_HOLDER, REPORT_ROLES };
struct shard {
    struct msg_shard where;
    bool reported[REPORT_ROLES];
    struct msg_shard_report reports[REPORT_ROLES]; /* deep copies */
};

/* Who sums what of a round; or, where `resum`, of a committed round whose results are lost. */
struct plan {
    uint32_t fragment;
    uint64_t round, base_index, resum;
    uint64_t number, deadline_ms; /* deadline: its reports are overdue */
    int32_t grid_exponent;
    uint8_t codec;
    struct msg_contributor *contributors; /* owned */
    uint32_t contributor_count;
    struct shard *shards; /* owned */
    uint32_t shard_count;
};

/* A chunk that is summed once more. */
enum audit_cause { AUDIT_DRAWN, AUDIT_UNEQUAL, AUDIT_ACCUSED };
struct audit {
    enum audit_cause cause;
    uint32_t chunk;
    uint32_t accuser, accused;    /* AUDIT_ACCUSED */
    uint32_t auditor, first;      /* first: who audited before, where a second one decides; else 0 */
    struct digest leaf, before;   /* what this auditor and the first one found */
    uint32_t culprit, culprit_before;
    bool answered;
    uint64_t deadline_ms;
    uint8_t set[PROTO_SET_BYTES_MAX];
};

enum round_phase { ROUND_COLLECT, ROUND_REDUCE, ROUND_AUDIT };

/* One fragment: what it consists of and its current round. */
struct round {
    uint32_t fragment, chunks;
    uint64_t elements;
    uint64_t number, base_index; /* commits so far; ledger index of the newest, or of a rewind */
    double samples[CORE_LR_ROUNDS]; /* weight of the newest rounds, a ring */
    uint32_t samples_count;

    enum round_phase phase;
    bool quorum_reached, waiting_told;
    bool last_done; /* the run is closing and this fragment has had its last round */
    uint64_t quorum_ms;
    uint32_t attempts; /* plans of this round that came to nothing */
    struct plan plan;
    struct audit *audits; /* owned, [PROTO_AUDITS_MAX] */
    uint32_t audit_count;
};

/* Lost results that are summed again, one commit at a time. */
struct resum {
    struct plan plan; /* plan.resum = 0: none */
    uint64_t unapplied_index, unapplied_ms; /* the oldest commit that no live member has, since when */
    uint32_t attempts;
    uint64_t told_ms; /* when the operator was last told that it cannot be done */
};

enum vote { VOTE_NONE, VOTE_REFERENCE, VOTE_CHALLENGER };
struct inquiry {
    uint64_t index, deadline_ms; /* deadline 0: free */
    enum vote vote;              /* whose root somebody else has too */
    uint32_t asked[3];           /* the reference, who differs, a third; 0 = nobody */
    struct digest root;          /* what asked[1] showed */
    bool answered[3];
    struct msg_digest_item *leaves[3]; /* owned, [chunks of the vector]; NULL: it could not show them */
};

struct core {
    struct msg_genesis genesis;
    const struct msg_outer *outer;
    struct digest run;
    struct proto_key own_key;
    uint64_t elements, samples_total, tokens_total;
    uint32_t chunks, sequence; /* chunks of the whole vector */

    uint64_t term, start_ms, tick_ms, hold_until_ms;
    uint64_t hidden_ms; /* when members behind NAT were last told who lacks the state that only they have */
    struct digest seed;
    bool started, paused, over; /* over: RESTART or FAIL was emitted, nothing is done any more */
    uint32_t complaints;        /* since the last tick */

    struct digest *entries; /* digest of every ledger entry */
    uint64_t entry_count, entry_capacity, entry_term;
    struct ledger_chain keys; /* who may sign the next entry; its place in the chain only in a takeover */
    struct takeover *takeover; /* entries that a member shows; NULL = none */

    struct member *members; /* [PROTO_MEMBERS_MAX] */
    uint32_t member_count, session_counter;
    uint64_t roster_version;
    struct conn *conns;
    uint32_t conn_count, conn_capacity;

    struct lease *leases; /* ascending ids */
    uint32_t lease_count, lease_capacity;
    uint64_t next_sample, next_lease, returned_samples;
    struct interval_set spent, leased_at_load;
    uint64_t *stale; /* leases whose rows the ledger contradicts */
    uint32_t stale_count, stale_capacity;
    struct regrant *regrants; /* what the ledger says of leases that were granted again; gone after the start */
    uint32_t regrant_count, regrant_capacity;

    struct state *states;
    uint32_t state_count, state_capacity;
    struct round *rounds; /* [fragments] */
    uint32_t fragments;
    uint64_t plan; /* newest number of this term */
    struct resum resum;
    struct inquiry inquiries[CORE_INQUIRIES_MAX];

    bool closing;  /* no sample or token is left to commit: the last rounds take what is ready */
    bool complete; /* ... and have */
    bool finished; /* complete, and the last checkpoint is written or given up */
    uint64_t settled_index;
    uint64_t checkpoint_due, checkpoint_writing,
        checkpoint_last; /* ledger indices of states; 0 = none */
    bool checkpoint_bf16;
    struct share share;
    uint64_t complete_ms, checkpoint_retry_ms;
    uint32_t checkpoint_tries;

    uint32_t root_mismatches, plans_made, handovers, audits, audits_failed, quarantines;
    uint64_t commits;
};

static inline struct state *core_state_now(const struct core *c) {
    return &c->states[c->state_count - 1];
}
/* NULL for an id that is no member's. */
static inline struct member *core_member(const struct core *c, uint32_t id) {
    return id >= 1 && id <= c->member_count ? &c->members[id - 1] : NULL;
}
/* May it have a part in the run at all? */
static inline bool core_in_good_standing(const struct member *m) {
    return !m->revoked && !m->quarantined;
}
/* ... and what it trains arrives. */
static inline bool core_may_train(const struct member *m) {
    return core_in_good_standing(m) && m->given_up < CORE_GIVEN_UP_MAX;
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

/* ---- core_ledger.c -------------------------------------------------------------------------- */

/* Append the next ledger entry: a row in the batch and its digest in the chain. *index receives
 * its place. -1 with ERR_FULL where body does not fit an entry; nothing has changed then. */
int core_append(struct core *c, struct batch *b, enum ledger_kind kind, enum proto_record which,
                const void *body, uint64_t *index, struct err *err);
/* What an entry changes for good, the same live and at a restart. ERR_CORRUPT: it contradicts what
 * came before; nothing has changed. A commit: spent samples, tokens, ramps, the new state. */
int core_take_commit(struct core *c, uint64_t index, uint64_t term, const struct msg_commit *commit,
                     struct err *err);
/* `bytes` of an entry, as it stands in the store: chain and meaning. */
int core_take_entry(struct core *c, uint64_t key, const uint8_t *bytes, size_t length,
                    struct err *err);
struct member *core_add_member(struct core *c, const struct msg_enrolment *enrolment);
void core_release_state(struct state *s);

/* ---- core_load.c ---------------------------------------------------------------------------- */

/* After the last row: ids above all used ones, and samples that no row has are returned leases. */
void core_put_right(struct core *c, struct core_actions *out);

/* ---- core_takeover.c ------------------------------------------------------------------------ */

/* Has the member of this HELLO seen more of the run than the store remembers? Then it was answered. */
bool core_is_shown_more(struct core *c, struct conn *k, const struct msg_hello *msg,
                        uint64_t now_ms, struct core_actions *out);
/* The same of a key that is not enrolled here, but perhaps in what it has: is it asked for its entries? The
 * run does not wait for them before one has proved good. */
bool core_is_shown_by_stranger(struct core *c, struct conn *k, const struct msg_hello *msg,
                               uint64_t now_ms, struct core_actions *out);
void core_on_ledger(struct core *c, struct conn *k, const struct msg_ledger *msg,
                    struct core_actions *out);
/* Who shows nothing in time is let go: the run may wait for it. */
void core_check_takeover(struct core *c, uint64_t now_ms, struct core_actions *out);
/* Is somebody about to show entries? Nothing is appended before them. */
bool core_awaits_entries(const struct core *c);
/* May members still show entries that this store lacks? One that we wrote now would be another history. */
bool core_is_behind(const struct core *c);
/* The connection that shows entries is gone; 0: whichever it is. */
void core_forget_takeover(struct core *c, uint64_t conn);

/* ---- core_members.c ------------------------------------------------------------------------- */

void core_on_opened(struct core *c, const struct core_event *ev, struct core_actions *out);
void core_on_closed(struct core *c, uint64_t conn);
void core_on_enrol(struct core *c, struct conn *k, const struct msg_enrol *msg,
                   const struct core_invite *invite, struct core_actions *out);
void core_on_hello(struct core *c, struct conn *k, const struct msg_hello *msg, uint64_t now_ms,
                   struct core_actions *out);
struct conn *core_conn(const struct core *c, uint64_t id);
void core_forget_conn(struct core *c, uint64_t id);
bool core_is_own(const struct core *c, const struct member *m);
struct member *core_own(const struct core *c); /* the coordinator's own node if it is connected */
/* Connected, holds a whole state as far as we know: may aggregate and hold. */
bool core_serves(const struct member *m);
/* Live, but its connection was closed and is not back: its process is gone, most likely. */
bool core_is_cut(const struct core *c, const struct member *m);
uint32_t core_live_count(const struct core *c);
/* Where `to` dials `target`; false if nobody can. The host is borrowed. */
bool core_address(const struct member *to, const struct member *target, struct msg_address *out);
void core_send_roster_to_all(struct core *c, struct core_actions *out);
void core_send_ledger_to_all(struct core *c, uint64_t from, struct core_actions *out);

/* ---- core_silence.c ------------------------------------------------------------------------- */

void core_on_heartbeat(struct core *c, struct member *m, const struct msg_heartbeat *msg,
                       uint64_t now_ms, struct core_actions *out);
/* The member is gone: its connection, leases, and its parts in the rounds. */
void core_lose(struct core *c, struct member *m, enum err_code code, const char *why,
               struct core_actions *out);
/* Lose whoever was silent for too long; `stopped`: we were, so nobody is judged. */
void core_judge(struct core *c, bool stopped, uint64_t now_ms, struct core_actions *out);
/* The median of what is known of the members that serve. */
double core_middle_uplink(const struct core *c);
/* Bytes a second that m is taken for: the median where nothing was measured, and within bounds. */
double core_uplink(const struct member *m, double middle);
/* Milliseconds of the median inner step of the live trainers; 0 = nobody said. */
double core_step_ms(const struct core *c);

/* ---- core_standing.c ------------------------------------------------------------------------ */

void core_on_revoke(struct core *c, uint32_t member, const char *why, struct core_actions *out);
void core_on_release(struct core *c, uint32_t member, const char *why, struct core_actions *out);
/* kind, record: the signed message (READY or SHARD_REPORT) that proves it. */
void core_quarantine(struct core *c, struct member *m, enum proto_type kind, const void *record,
                     const char *why, struct core_actions *out);
/* What m had is given to others: READYs that are in no plan, leases that no plan names. Returns how
 * many samples went back. */
uint64_t core_take_away(struct core *c, struct member *m, struct core_actions *out);

/* ---- core_leases.c -------------------------------------------------------------------------- */

void core_on_lease_ask(struct core *c, struct member *m, uint32_t samples, uint64_t now_ms,
                       struct core_actions *out);
void core_send_leases(struct core *c, struct member *m, struct core_actions *out);
/* 0 if m may claim these ranges, and *unspent is how many of their samples nobody has spent.
 * ERR_REFUSED says which one is wrong. */
int core_check_claims(const struct core *c, const struct member *m, const struct msg_lease *ranges,
                      uint32_t count, uint64_t *unspent, struct err *err);
/* What of a claim is still to be spent; count 0 if nothing. */
struct msg_range core_unspent(const struct core *c, const struct member *m,
                              const struct msg_lease *claim);
/* Take spent prefixes off the lease table. */
void core_spend(struct core *c, const struct msg_spend *spent, uint32_t count, struct batch *b);
/* Leases of members that are lost go back, except while a plan names the member: until that ends
 * nobody knows whether they are spent. Returns how many samples went back. */
uint64_t core_return_leases(struct core *c, struct batch *b);
/* m is back: what it had and nobody was granted since is its own again, under the same generation. Returns how
 * many samples. */
uint64_t core_take_back_leases(struct core *c, struct member *m);
/* A row read from the store; `id` is not in the table yet. */
void core_add_lease(struct core *c, const struct lease *lease);
/* A returned lease over samples that are in no other place. */
void core_add_returned(struct core *c, uint64_t start, uint64_t count, struct batch *b);
/* The row of this lease, or its deletion, as the table has it now. */
void core_rewrite_lease(const struct core *c, uint64_t id, struct batch *b);
uint64_t core_samples_free(const struct core *c);
bool core_tokens_reached(const struct core *c);
bool core_data_exhausted(const struct core *c); /* every sample is spent */

/* ---- core_ready.c --------------------------------------------------------------------------- */

void core_on_ready(struct core *c, struct member *m, const struct msg_ready *msg, uint64_t now_ms,
                   struct core_actions *out);
void core_forget_ready(struct part *p);
/* The member goes back to the anchor and works on what the LEASES that follow say. */
void core_reset_member(struct core *c, const struct round *r, struct member *m, const char *why,
                       struct core_actions *out);
static inline struct part *core_part(const struct round *r, const struct member *m) {
    return &m->parts[r->fragment];
}
/* Weight of the contribution in samples, from our own tables. */
uint64_t core_credit(const struct core *c, const struct round *r, const struct member *m);
struct head_count {
    uint32_t ready, need; /* contributions there are, and are needed */
    uint32_t waited;      /* that may still come within the grace window */
};
struct head_count core_count_heads(const struct core *c, const struct round *r);
/* Make a plan if it is time. */
void core_try_plan(struct core *c, struct round *r, uint64_t now_ms, struct core_actions *out);

/* ---- core_plan.c ---------------------------------------------------------------------------- */

/* Freeze and send a plan over the READYs of live members (only_planned: of the plan before).
 * False if there is nobody to aggregate or to hold. */
bool core_make_plan(struct core *c, struct round *r, bool only_planned, uint64_t now_ms,
                    struct core_actions *out);
/* Who sums and who holds: cuts chunks [first, first+count) into shards, appended to *shards. usable:
 * may this member take part? False if nobody can. */
struct shard_choice {
    const struct round *round;
    uint32_t attempts;
    bool behind; /* members that still catch up will do: nobody else is left */
};
bool core_assign_shards(const struct core *c, const struct shard_choice *choice, uint32_t first,
                        uint32_t count, struct plan *p);
void core_send_plan(struct core *c, const struct plan *p, const struct member *m,
                    struct core_actions *out);
void core_send_plan_to_all(struct core *c, const struct plan *p, struct core_actions *out);
bool core_in_plan(const struct plan *p, const struct member *m);
/* Index among the plan's contributors, or -1. */
int core_contributor_index(const struct plan *p, uint32_t member);
void core_forget_plan(struct plan *p);
uint64_t core_deadline(const struct core *c, uint32_t attempts, uint64_t now_ms);

/* ---- core_round.c --------------------------------------------------------------------------- */

void core_on_shard_report(struct core *c, struct member *m, const struct frame *f,
                          const struct msg_shard_report *msg, uint64_t now_ms,
                          struct core_actions *out);
/* Is this report well-formed for a shard of the plan? */
int core_check_report(const struct plan *p, const struct msg_shard_report *msg, struct err *err);
/* 0, or the number (from 1) of the first chunk of the shard in which they differ. */
uint32_t core_reports_differ(const struct msg_shard_report *a, const struct msg_shard_report *b);
/* Do two runs name the same contributors? */
bool core_same_set(const struct msg_summed *a, const struct msg_summed *b);
/* Has every shard both its reports? */
bool core_held_twice(const struct plan *p);
/* The run that chunk `chunk` of the fragment lies in, of runs that begin at chunk `first`. */
const struct msg_summed *core_summed_at(const struct msg_summed *summed, uint32_t count,
                                        uint32_t first, uint32_t chunk);
/* Give the round to others: a new plan number, or back to collecting READYs. */
void core_replan(struct core *c, struct round *r, uint64_t now_ms, struct core_actions *out);
void core_cancel(struct core *c, struct round *r, struct core_actions *out);
void core_drop_contributor(struct core *c, struct round *r, struct member *m,
                           struct core_actions *out);
/* Is somebody lost whom the plan needs, or are its reports overdue? Then plan again. Is everything
 * reported and audited? Then commit. */
void core_check_round(struct core *c, struct round *r, uint64_t now_ms, struct core_actions *out);
struct shard *core_shard_of(const struct plan *p, uint32_t chunk);
/* Who stands in any of these sets. */
void core_summed_union(const struct msg_summed *summed, uint32_t count,
                       uint8_t set[PROTO_SET_BYTES_MAX]);
void core_avoid(struct round *r, struct member *m);

/* ---- core_audit.c --------------------------------------------------------------------------- */

/* Everything is reported and equal: draw the chunks that are summed again. False if none will be. */
bool core_draw_audits(struct core *c, struct round *r, uint64_t now_ms, struct core_actions *out);
/* Two reports of a shard differ from this chunk of the fragment on. False if nobody can look. */
bool core_audit_unequal(struct core *c, struct round *r, uint32_t chunk, uint64_t now_ms,
                        struct core_actions *out);
void core_on_audit_report(struct core *c, struct member *m, const struct frame *f,
                          const struct msg_audit_report *msg, uint64_t now_ms,
                          struct core_actions *out);
void core_on_accuse(struct core *c, struct member *m, const struct frame *f,
                    const struct msg_accuse *msg, uint64_t now_ms, struct core_actions *out);
/* Audits that got no answer in time, or whose auditor is gone, are void. */
void core_check_audits(struct core *c, struct round *r, uint64_t now_ms, struct core_actions *out);
/* Does a drawn or unequal chunk still wait for its auditor? */
bool core_audits_open(const struct round *r);

/* ---- core_commit.c -------------------------------------------------------------------------- */

void core_commit(struct core *c, struct round *r, uint64_t now_ms, struct core_actions *out);
void core_send_holders(const struct core *c, const struct state *s, const struct member *m,
                       struct core_actions *out);

/* ---- core_resum.c --------------------------------------------------------------------------- */

void core_check_resum(struct core *c, uint64_t now_ms, struct core_actions *out);
void core_resum_reported(struct core *c, uint64_t now_ms, struct core_actions *out);

/* ---- core_roots.c --------------------------------------------------------------------------- */

enum root_verdict { ROOT_AGREES, ROOT_DIFFERS, ROOT_OF_NOTHING };
/* A member shows the root of its state at `index`. */
enum root_verdict core_note_root(struct core *c, struct member *m, uint64_t index,
                                 const struct digest *root, uint64_t now_ms,
                                 struct core_actions *out);
void core_on_root(struct core *c, struct member *m, const struct msg_root *msg, uint64_t now_ms,
                  struct core_actions *out);
struct state *core_find_state(const struct core *c, uint64_t index);
/* The newest state on whose root the members agree; what a commit on the round's base names. */
const struct state *core_agreed_state(const struct core *c, const struct round *r);
/* Can a member without a state make the present one for itself? */
bool core_is_initial(const struct core *c);
/* Whom m can catch up from: fills m->donors and, borrowing hosts, list[CORE_DONORS_MAX]. */
uint32_t core_pick_donors(const struct core *c, struct member *m, struct msg_address *list);
/* s: the state that m has wrong; NULL: it only gets donors. wrong: bitmap of the chunks known to
 * differ, or NULL. */
void core_send_resync(struct core *c, struct member *m, const struct state *s, const uint8_t *wrong,
                      struct core_actions *out);
/* Members that catch up and whose donors are all gone get new ones. */
void core_renew_donors(struct core *c, uint64_t now_ms, struct core_actions *out);
void core_settle(struct core *c);
/* This root is the right one of state s, whoever said another first. */
void core_overrule(struct core *c, struct state *s, const struct digest *root, uint32_t reference,
                   uint64_t now_ms, struct core_actions *out);

/* ---- core_referee.c ------------------------------------------------------------------------- */

/* m shows another root than the reference of s: ask for leaves. */
void core_inquire(struct core *c, struct state *s, struct member *m, const struct digest *root,
                  uint64_t now_ms, struct core_actions *out);
void core_on_state_leaves(struct core *c, struct member *m, const struct msg_state_leaves *msg,
                          uint64_t now_ms, struct core_actions *out);
/* A third member shows a root of a disputed state. True if it is not the reference's. */
bool core_vote(struct core *c, struct member *m, uint64_t index, const struct digest *root,
               uint64_t now_ms, struct core_actions *out);
void core_check_inquiries(struct core *c, uint64_t now_ms, struct core_actions *out);
void core_forget_inquiries(struct core *c);

/* ---- core_share.c --------------------------------------------------------------------------- */

/* Who is at this state, or soon will be, keeps it, each some of it. False: nobody helps, or the store is a
 * folder. */
bool core_share_begin(struct core *c, const struct state *s, struct core_actions *out);
/* Nothing more is asked of anybody. out NULL: nor is anybody told. */
void core_share_end(struct core *c, struct core_actions *out);
void core_on_checkpoint_part(struct core *c, struct member *m, const struct msg_checkpoint_part *msg,
                             uint64_t now_ms, struct core_actions *out);
void core_on_checkpoint_part_done(struct core *c, struct member *m,
                                  const struct msg_checkpoint_part_done *msg,
                                  uint64_t now_ms, struct core_actions *out);
/* Whose part is late, or who is gone: to others. */
void core_check_share(struct core *c, uint64_t now_ms, struct core_actions *out);
/* Has every part that a member sent been looked at by another? */
bool core_share_is_checked(const struct core *c);

/* ---- core_end.c ----------------------------------------------------------------------------- */

void core_checkpoint_after_commit(struct core *c, struct core_actions *out);
void core_on_checkpoint_sign(struct core *c, struct member *m,
                             const struct msg_checkpoint_sign *msg, struct core_actions *out);
void core_on_checkpoint_done(struct core *c, struct member *m,
                             const struct msg_checkpoint_done *msg, uint64_t now_ms,
                             struct core_actions *out);
/* Is the run over? Then the last checkpoint, then BYE to everybody who has the last state. */
void core_check_complete(struct core *c, uint64_t now_ms, struct core_actions *out);

#endif
