/* sync_internal.h - the state of a member's machine, shared by the files sync*.c and by nobody
 * else.
 *
 *   sync.c          create, the switch over events, actions, the coordinator's link, looking in
 *   sync_ledger.c   the ledger, the commits in it, the roster
 *   sync_state.c    anchor, momentum, versions and journal on the disk
 *   sync_trainer.c  the trainer: what it holds, when it freezes, resets and takes over
 *   sync_leases.c   which samples it may train on, which it has used
 *   sync_round.c    this member's contribution: encoded, announced, sent
 *   sync_plan.c     the plan in work: is it for now, what of it is this member's
 *   sync_reduce.c   a plan's shards: summed by the aggregator, copied by the holder
 *   sync_audit.c    single chunks summed once more, by this member or from its bytes
 *   sync_results.c  finished shards and fetched results: kept, served, settled
 *   sync_apply.c    from commit to commit: results fetched, chunks brought forward
 *   sync_catchup.c  chunks of state from other members, second moments for a joiner
 *   sync_peer.c     links to other members: dialling, flow control
 *
 * Functions that can meet the disk return 0 or -1 with s->failure filled in; the machine then
 * stops. */
#ifndef INTELLECT_SYNC_INTERNAL_H
#define INTELLECT_SYNC_INTERNAL_H

#include "kernels/kernels.h"
#include "node/sync.h"

/* ---- limits ----------------------------------------------------------------------------- */

#define SYNC_MISSING UINT64_MAX /* version of a chunk that is not there */
#ifndef SIM_FAULTS
#define SYNC_PEER_UNSENT_MAX \
    (8u << 20) /* assumed unsent bytes to one peer, above which bulk waits */
#define SYNC_WINDOW_BYTES  (32u << 20) /* of state: asked for and not yet applied */
#define SYNC_RESULT_WINDOW_BYTES \
    (128u << 20) /* of results, which are served before they are applied where they come fast */
#define SYNC_WORK_ELEMENTS (2u << 20)  /* arithmetic of one SYNC_EV_WORK */
#define SYNC_BATCH_ELEMENTS \
    (4u << 20) /* of state changed under one journal, 32 MiB with momentum */
#define SYNC_BATCH_CHUNKS      1024u
#define SYNC_RESULTS_BYTES \
    (256u << 20) /* of results in memory; own shards beyond are read from disk again */
#else /* so small that the models of the simulator reach them */
#define SYNC_PEER_UNSENT_MAX 1500u
#define SYNC_WINDOW_BYTES    4000u
#define SYNC_RESULT_WINDOW_BYTES 4000u
#define SYNC_WORK_ELEMENTS   200u
#define SYNC_BATCH_ELEMENTS  200u
#define SYNC_RESULTS_BYTES   700u
#define SYNC_BATCH_CHUNKS    4u
#endif
#define SYNC_FAST_MS           50u /* results that follow each other sooner come before what is done with them */
#define SYNC_COMMITS_KEPT      64u /* decoded; the ledger itself is kept whole */
#define SYNC_ROOTS_KEPT        64u /* agreed roots of states */
#define SYNC_STATES_KEPT       8u  /* whose leaves are kept */
#define SYNC_RESULTS_KEPT      8u  /* rounds of a fragment whose results are held: names on disk */
#define SYNC_RESUMS_MAX        64u /* shards of a resumed commit that are looked for on disk */
#define SYNC_RELAYS_MAX        6u  /* members asked for results beside aggregator and holder */
#define SYNC_SPARE_SUMS        16u /* int64 sums of a chunk kept for the next one */
#define SYNC_DRIP_SILENCES     3u  /* a contributor that would take longer is not waited for */
#define SYNC_LEDGER_SEGMENT    64u /* entries in one blob */
#define SYNC_LEDGER_FRAME_BYTES (2u << 20) /* about, in one LEDGER that we send */
#define SYNC_DONORS_MAX        16u
#define SYNC_EARLY_HEARTBEATS  4u /* so long a chunk of state waits for its root */
#define SYNC_MOMENTS_TRIES_MAX 3u
#define SYNC_AHEAD_SILENCES    3u /* samples in hand */

#ifdef SIM_FAULTS
#define SYNC_HAS_FAULT(name) (sync_fault == SYNC_FAULT_##name)
#else
#define SYNC_HAS_FAULT(name) false
#endif

/* ---- parts ------------------------------------------------------------------------------ */

/* A set of chunks that is synchronised together. Chunk k of the fragment is chunk `chunk[k]` of the
 * state; they ascend. */
struct fragment {
    uint32_t count;
    uint32_t *chunk;
    uint64_t elements;
};
/* Where a chunk of the state belongs. */
struct place {
    uint32_t fragment, k;
};

/* One outer step of the ledger. */
struct commit {
    uint64_t index, term; /* of its entry */
    uint64_t seen_ms;
    struct msg_commit body; /* owned */
    bool unavailable;       /* its results cannot be had: donors are asked */
    bool looked;            /* our own of its results are in s->held, if we have some */
};

struct known_root {
    uint64_t index;
    struct digest root;
};

struct ledger {
    struct ledger_chain chain;
    struct msg_signed_entry *entries; /* bytes owned */
    uint32_t count, capacity, saved, loaded; /* loaded: found on disk at the start */
    struct commit commits[SYNC_COMMITS_KEPT]; /* the i-th of the run at i % SYNC_COMMITS_KEPT */
    uint64_t commit_count;                    /* of all fragments so far */
    uint32_t commits_kept;                    /* the newest so many; none from before a rewind */
    uint64_t rounds[PROTO_FRAGMENTS_MAX];     /* commits of each fragment so far */
    uint64_t last[PROTO_FRAGMENTS_MAX];       /* index of its last one, or of the rewind; 0 = none */
    uint64_t head_version;                    /* the newest of these */
    struct {
        uint64_t index;                     /* of the newest rewind; 0 = none */
        uint64_t base[PROTO_FRAGMENTS_MAX]; /* versions in the state it goes back to */
        struct msg_checkpoint to;           /* owned */
    } rewind;
    uint64_t roster_version;
    struct known_root root[SYNC_ROOTS_KEPT]; /* ring */
    uint32_t root_count;                     /* ever noted */
};

/* A state we were at, for questions about it that come when we have moved on. */
struct past_state {
    uint64_t index;
    struct digest root;
    struct msg_digest_item *leaf; /* [chunk_count]; NULL = none */
};

struct state {
    float *anchor, *momentum;     /* mapped, [elements] */
    uint8_t *index_map;           /* mapped: header, then one entry per chunk */
    uint64_t *version;            /* [chunk_count], as in the map */
    struct msg_digest_item *leaf; /* [chunk_count], of anchor and momentum */
    bool whole; /* every chunk has its fragment's last commit up to `index` */
    bool known; /* it was whole once: index and root are those of then */
    uint64_t index;
    struct digest root;
    uint32_t missing;
    struct past_state past[SYNC_STATES_KEPT]; /* of index i, if any, somewhere */
    uint32_t past_next;
    uint64_t told_index; /* newest index whose ROOT was sent on this connection */
    bool told;
};

/* Samples of one lease. Before `start` they are spent. [start, floor) are in frozen contributions of an
 * earlier life of the trainer and in nobody's parameters; [floor, used) are in the trainer's, [used,
 * sent) are queued in it, [sent, end) are not given out yet. */
struct grant {
    uint64_t lease, start, floor, used, sent, end;
    uint32_t generation;
    bool blocked; /* a contribution of an earlier life claims [start, floor): claims are prefixes, so what follows
                   * is not used before it is known whether that is spent */
};

struct leases {
    struct grant grant[PROTO_LEASES_MAX]; /* in the order the trainer gets them */
    uint32_t count;
    bool known;                       /* a list came on this connection */
    bool asked;                       /* a LEASE_ASK is not answered yet */
    bool dry;                         /* the last answer granted nothing new */
    uint64_t asked_ms, round_samples; /* round_samples: of the last contribution; 0 = none yet */
};

enum trainer_state {
    TRAINER_DOWN,
    TRAINER_BLANK,   /* up, its parameters are nothing we know */
    TRAINER_TRAINING /* anchor + own work */
};

/* A fragment's turn in the trainer's schedule. */
struct turn {
    uint64_t from_steps, from_ms; /* of its last summed contribution, or of the last reset */
    uint64_t after_steps, after_ms; /* it is due so long after that */
    uint64_t frozen_steps;          /* of its last freeze, summed or not */
    bool at_once;                   /* its work was not summed: due now */
    bool due;                       /* MSG_DUE came for due_round */
    uint64_t due_round;
    uint64_t samples_before; /* of trainer.samples: those that have no effect in the fragment any more */
    uint64_t samples_frozen; /* trainer.samples at the last freeze */
    bool mixing;             /* an APPLY on its way takes over a commit that summed it */
    double loss_before;      /* of trainer.loss_sum, at the last freeze */
    uint64_t losses_before;
    const float *local; /* as FROZEN brought it */
};

struct trainer {
    enum trainer_state state;
    float *slot;
    uint8_t *ops;
    bool slot_busy;  /* handed over, not answered: nothing is written */
    bool slot_dirty; /* ops that are not KEEP: an APPLY is due */
    bool resetting;  /* slot_busy is about a RESET */
    bool importing;  /* ... about MOMENTS_IMPORT */
    bool need_reset;
    bool filling; /* the slot is being filled with the anchor, up to `fill_next` */
    uint32_t fill_next;
    bool freezing; /* it was asked to write fragment `freezing_fragment` */
    uint32_t freezing_fragment;
    bool standing; /* it wrote one and waits for APPLY, RESET or CONTINUE */
    uint64_t life; /* from 1: grows whenever its work is lost */
    uint32_t lives; /* TRAINER_UPs so far */
    uint64_t samples; /* consumed since the last RESET */
    uint64_t samples_said; /* likewise, of void work too */
    enum sync_loss lost_by; /* why it goes back to the anchor */
    uint64_t steps, steps_total, beats; /* beats: see EV_TICK */
    double loss, loss_sum, tokens_per_s;
    uint64_t loss_count;
    struct turn turn[PROTO_FRAGMENTS_MAX];
    /* second moments of another member, for a trainer that has none */
    bool want_moments;
    uint32_t moments_tries, moments_next, moments_peer,
        moments_got; /* next: place in the list of peers */
    uint64_t moments_ms, moments_steps;
    float *moments_in; /* owned, [elements]; NULL when none are being fetched */
    /* second moments for other members */
    bool exporting;
    const float *moments;
    uint64_t export_steps;
};

/* This member's contribution to the round of one fragment. */
struct contribution {
    bool encoding; /* chunks [0, next) are done */
    uint32_t next;
    uint64_t base_index; /* while encoding */
    double norm2;
    float absmax;
    bool frozen;    /* bytes and READY are durable */
    bool announced; /* on this connection */
    uint64_t announced_ms;
    uint64_t life; /* of the trainer that holds its work; 0 = of an earlier process */
    uint64_t steps, frozen_ms, samples;
    double loss;
    struct msg_lease *claims; /* [PROTO_LEASES_MAX], as they were when the trainer wrote it */
    uint32_t claims_count;
    struct msg_ready ready;         /* owned */
    struct msg_digest_item *leaves; /* [fragment.count] */
    struct digest given_up;         /* root of the one that was dropped last: residual_next is still of it */
    uint64_t given_up_base;         /* its base_index */
};

/* What one contributor of a plan has shown this aggregator. */
struct inbound {
    struct msg_digest_item *leaves; /* [fragment.count] once they gave the announced root */
    bool dropped;
    uint64_t heard_ms; /* a chunk that was still missing came */
    uint32_t owed;     /* chunks it was asked for that did not come */
    double norm2;      /* of the chunks that were added */
    bool accused;
    /* its pace: since it was first asked, and since the last mark; asked_ms 0 = not yet */
    uint64_t asked_ms, mark_ms;
    uint32_t mark_owed;
};

/* An auditor sums one chunk for its leaf alone. */
enum shard_role { SHARD_AGGREGATE, SHARD_HOLD, SHARD_AUDIT };

/* A shard of a plan in work that this member aggregates, copies or audits. k counts within the shard. */
struct shard_work {
    uint32_t shard, first, count;
    enum shard_role role;
    uint8_t *forced; /* [count][set_bytes]: summed from exactly these; NULL = from all not dropped */
    uint64_t begun_ms;
    uint8_t *data;                  /* encoded result chunks, [shard_bytes] */
    struct msg_digest_item *leaves; /* [count], zero = weight 0 */
    uint8_t *sets;                  /* [count][set_bytes] */
    uint64_t *weights;              /* [count] */
    bool *finished;                 /* [count] */
    uint32_t finished_count;
    int64_t **sums;    /* aggregator: [count], only for chunks in work */
    bool recheck;      /* some chunk may wait for nobody else */
    bool leaves_known; /* holder: RESULT_LEAVES came */
    uint64_t asked_ms; /* holder: of the last question or answer; 0 = none yet */
    bool done, reported;
    uint64_t reported_ms;
};

/* A chunk of ours that an auditor sums again. */
struct audit {
    uint32_t auditor, chunk;
};

/* The newest plan of a fragment. */
struct plan {
    bool active;
    uint32_t fragment;
    uint64_t term, number;
    uint64_t result_term, result_plan; /* what its results are kept under: a resumed commit's, else its own */
    uint32_t attempt;                  /* plans of this round that we saw before */
    struct msg_plan msg; /* owned */
    uint64_t weight;     /* of all contributors */
    uint32_t set_bytes;
    int own;                 /* index among the contributors with our frozen root, or -1 */
    struct inbound *inbound; /* [contributors] */
    struct shard_work *work; /* [shards + PROTO_AUDITS_MAX] */
    uint32_t work_count;
    struct audit audits[PROTO_AUDITS_MAX]; /* the newest; auditor 0 = none */
    uint32_t audit_next;
};

/* Results that this member can give to others until the round is settled: a shard that it summed or
 * copied, which is on disk and may be in memory too, or what it fetched, in memory alone. */
struct held {
    uint64_t term, plan, round;
    uint32_t fragment, shard;        /* shard: see results_shard(); SYNC_RELAYED = fetched */
    enum outer_codec codec;
    struct msg_result_leaves leaves; /* owned: first, leaves, summed */
    uint8_t *data;   /* a shard's encoded chunks, one after the other; NULL = on disk only */
    uint8_t **chunk; /* of fetched ones: [leaves_count], NULL = not kept */
    size_t bytes;    /* in memory */
    uint64_t used;   /* larger = later */
};
#define SYNC_RELAYED UINT32_MAX

/* The results of one commit, on their way here. */
struct fetch_shard {
    bool leaves_have;
    bool complete;     /* every chunk is here or applied */
    uint32_t turn;     /* 0, 1: aggregator and holder; later ones: other members */
    uint32_t from;     /* who is asked or dialled */
    uint32_t refusals; /* in a row */
    uint64_t asked_ms;      /* of the last question or answer */
    bool asking, dialling;
};
struct fetch {
    bool active;
    uint64_t index; /* of the commit */
    uint32_t chunks; /* of its fragment */
    struct msg_digest_item *leaves; /* [chunks] */
    uint8_t *leaf_have;             /* bitmap */
    bool verified;                  /* leaves give the commit's result_root */
    uint64_t held_change;           /* as of s->held_change when our own results were looked at */
    struct fetch_shard *shard;      /* [commit.shards] */
    uint8_t **data;                 /* [chunks]: received, not applied */
    uint8_t *asked;                 /* bitmap: asked for, not received */
    uint32_t ready, outstanding;
    size_t window; /* bytes asked for or received */
    uint64_t progress_ms, came_ms; /* came: the last result, or the begin */
};

/* A chunk as a donor showed it. Its state may be newer than the ledger we have or the roots we know: then
 * it waits to be judged. */
struct donor_chunk {
    uint32_t chunk, peer;
    uint64_t version, index, came_ms;
    bool verified;
    struct msg_digest_item path[DIGEST_PATH_MAX];
    uint32_t path_count;
    uint8_t *data; /* anchor, then momentum */
};
struct catchup {
    uint32_t donors[SYNC_DONORS_MAX], donor_count, turn;
    uint8_t *asked; /* bitmap over the state: asked for, not received */
    uint32_t outstanding;
    uint64_t asked_ms, progress_ms, rest_ms; /* rest: no question before */
    struct donor_chunk *ready;               /* received, not stored */
    uint32_t ready_count, ready_capacity, verified_count;
    size_t window;
    bool busy;         /* as last seen */
    uint32_t from_members, from_origin; /* chunks stored since it began, to be told at its end */
    bool initialising; /* the first state, or the one of a rewind, is being read or derived here */
    bool no_origin;    /* that cannot be done here, as far as is known; it was said */
    uint64_t origin_ms; /* not before then */
};

/* What goes on with a member about one fragment. */
struct talk {
    /* our contribution, to this aggregator */
    bool leaves_sent, early_leaves; /* early: it sent LEAVES of a plan we did not know */
    uint64_t leaves_ms;
    uint8_t *wanted; /* bitmap over the fragment: WANT, less what was sent; NULL = no WANT */
    uint64_t wanted_term, wanted_plan;
    /* what it asked for */
    uint8_t *results;    /* bitmap over the fragment; NULL = nothing */
    bool results_leaves; /* leaves are due first */
    bool results_lack;   /* something it asked for is not here */
    uint64_t results_term, results_plan, results_round;
};

struct peer {
    uint32_t id;
    bool open;
    char host[PROTO_ADDRESS_BYTES_MAX + 1];
    uint32_t port;    /* 0 = we cannot dial it */
    uint64_t dial_ms; /* no sooner */
    size_t unsent;
    struct talk *talk; /* [fragment_count] */
    uint8_t *states;   /* it asked for: bitmap over the state */
    uint64_t states_min;
    bool moments;
    uint32_t moments_next;
    /* bulk from it since the last heartbeat */
    uint64_t bulk_bytes, bulk_busy_ms;
    uint64_t bulk_ms; /* when the last came */
    bool owing;       /* more was asked for then */
};

struct sync {
    struct sync_config config;
    struct msg_genesis genesis; /* owned */
    const struct msg_outer *outer;
    const struct msg_inner *inner;
    struct disk disk;
    uint32_t chunk_elements, chunk_count;
    uint32_t fragment_count;
    struct fragment *fragment; /* [fragment_count] */
    struct place *place;       /* [chunk_count] */
    enum outer_codec codec;    /* of contributions */
    float *scratch, *scratch2; /* [chunk_elements] each */
    void **grave; /* to be freed at the next tick */
    uint32_t grave_count, grave_capacity;
    int64_t *spare_sum[SYNC_SPARE_SUMS]; /* [chunk_elements] each */
    uint32_t spare_sum_count;

    /* for the length of one step */
    uint64_t now;
    struct sync_actions *out;
    struct err failure;

    /* the coordinator */
    bool connected, welcomed, synced,
        left; /* welcomed: HELLO_ACK came; synced: its ledger did too */
    uint64_t term, term_max, session, ack_head;
    uint64_t heard_ms, beat_ms, tick_ms;
    uint64_t settled, tokens_committed;
    uint32_t members_live;
    uint64_t progress;

    struct ledger ledger;
    struct state state;
    struct leases leases;
    struct trainer trainer;
    struct contribution *contribution; /* [fragment_count] */
    uint8_t *encoded;                  /* mapped: contributed chunks, each in the place of its chunk */
    float *residual, *residual_next;   /* mapped, [elements]; NULL with a codec that loses nothing */
    struct plan *plan;                 /* [fragment_count] */
    struct held *held;
    uint32_t held_count;
    size_t held_bytes;              /* in memory */
    uint64_t held_used, held_change; /* count up */
    struct fetch fetch;
    struct catchup catchup;
    struct peer **peers;
    uint32_t peer_count;

    struct {
        bool open, unsaid, ok; /* unsaid: it ended, CHECKPOINT_DONE is due */
        uint64_t index;
        uint8_t *manifest; /* owned; waits for its signature */
        uint32_t manifest_length;
        struct digest digest;
        char text[PROTO_TEXT_BYTES_MAX + 1];
        bool next_waits; /* for the end of this one */
        struct msg_checkpoint_write next; /* owned */
        struct checkpoint_keep { /* of another's: waits until the state is that of its index */
            bool waits;
            struct msg_checkpoint_keep msg;
            struct msg_range chunks[2];
        } keep;
    } checkpoint;
    void (*before_change)(void *arg, uint32_t chunk);
    void *before_change_arg;

    uint64_t bytes_to_peers, bytes_from_peers, summed, refused;
    struct sync_account account;
};

/* ---- sync.c: memory, actions ------------------------------------------------------------ */

/* Zeroed memory; when there is none s->failure is set and NULL returned. */
void *sync_alloc(struct sync *s, size_t count, size_t size);
/* free() what a message in this step's actions may be made of: CHUNK and RESULT do not own their data. */
void sync_free_later(struct sync *s, void *p);
/* *list has room for one more element of `size` bytes afterwards. -1: no memory. */
int sync_grow(struct sync *s, void *list, uint32_t count, uint32_t *capacity, size_t size);
void sync_log(struct sync *s, enum sync_level level, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* Append an action; NULL: no memory. */
struct sync_action *sync_act(struct sync *s, enum sync_action_type type);
/* To the coordinator. plan: the number of the plan the message is about, else 0. */
void sync_send(struct sync *s, enum proto_type type, uint64_t plan, const void *msg);
/* Likewise to a member, whether there is a link or not. Callers use peer_send(). */
void sync_send_peer(struct sync *s, uint32_t peer, enum proto_type type, uint64_t term,
                    uint64_t plan, const void *msg);
void sync_act_roster(struct sync *s, const struct msg_roster_body *roster);
void sync_disconnect(struct sync *s, const char *why);
/* The run went back to the state at at_index: nobody will sign a checkpoint of a later one. */
void sync_checkpoint_undone(struct sync *s, uint64_t at_index);
/* The highest term and what else must outlive us. */
int sync_save_meta(struct sync *s);

static inline size_t bitmap_bytes(uint32_t bits) { return ((size_t)bits + 7) / 8; }
static inline bool bitmap_has(struct proto_bytes b, uint32_t bit) {
    return bit / 8 < b.length && proto_set_has(b.data, bit);
}
/* The first bit that is set, or -1. */
static inline int64_t bitmap_next(const uint8_t *bitmap, uint32_t bits) {
    for (uint32_t i = 0; i < bits; i++) {
        if (i % 8 == 0 && !bitmap[i / 8]) i += 7;
        else if (proto_set_has(bitmap, i)) return i;
    }
    return -1;
}
static inline size_t chunk_first(const struct sync *s, uint32_t chunk) {
    return (size_t)chunk * s->chunk_elements;
}
static inline size_t chunk_elements(const struct sync *s, uint32_t chunk) {
    uint64_t left = s->config.elements - chunk_first(s, chunk);
    return left < s->chunk_elements ? (size_t)left : s->chunk_elements;
}
/* Encoded chunks of a fragment stand one after the other in a shard and in its results; contributed
 * ones stand where their chunk stands in the state. All but the last chunk of the state are of one
 * size, and a fragment's ascend, so a place in either is a product. k: in the fragment. */
static inline size_t encoded_bytes(const struct sync *s, uint32_t fragment, enum outer_codec codec,
                                   uint32_t k) {
    return outer_encoded_bytes(codec, chunk_elements(s, s->fragment[fragment].chunk[k]));
}
static inline size_t encoded_offset(const struct sync *s, enum outer_codec codec, uint32_t i) {
    return (size_t)i * outer_encoded_bytes(codec, s->chunk_elements);
}
static inline uint8_t *encoded_chunk(const struct sync *s, uint32_t fragment, uint32_t k) {
    return s->encoded + encoded_offset(s, s->codec, s->fragment[fragment].chunk[k]);
}
static inline size_t shard_bytes(const struct sync *s, uint32_t fragment, enum outer_codec codec,
                                 uint32_t first, uint32_t count) {
    return encoded_offset(s, codec, count - 1) +
           encoded_bytes(s, fragment, codec, first + count - 1);
}

/* ---- sync_ledger.c ---------------------------------------------------------------------- */

int ledger_load(struct sync *s);
void ledger_release(struct sync *s);
int ledger_on_entries(struct sync *s, const struct msg_ledger *msg);
void ledger_on_roster(struct sync *s, const struct frame *f, const struct msg_roster *msg);
/* The next five: NULL where there is none or it is forgotten. */
struct commit *ledger_last(struct sync *s);
struct commit *ledger_commit(struct sync *s, uint32_t fragment, uint64_t round);
struct commit *ledger_commit_at(struct sync *s, uint64_t index);
struct commit *ledger_commit_after(struct sync *s, uint32_t fragment, uint64_t version);
/* The i-th newest. */
struct commit *ledger_recent(struct sync *s, uint32_t i);
/* Ledger index of the newest state, 0 = the initial one. */
uint64_t ledger_head_version(const struct sync *s);
/* What version a fragment's chunks have in the state at `index`; SYNC_MISSING: too long ago. */
uint64_t ledger_version(struct sync *s, uint32_t fragment, uint64_t index);
/* The agreed root of the state at `index`, if anybody said so. */
bool ledger_root(struct sync *s, uint64_t index, struct digest *out);
void ledger_note_root(struct sync *s, uint64_t index, const struct digest *root);
void ledger_on_get(struct sync *s, const struct msg_ledger_get *msg);
/* Contributor number of this member in the commit if it holds this root, or -1; was chunk k
 * summed from it? */
int commit_contributor(const struct commit *c, uint32_t member, const struct digest *root);
bool commit_summed(const struct commit *c, uint32_t k, int contributor);
bool commit_summed_any(const struct commit *c, int contributor);

/* ---- sync_state.c ----------------------------------------------------------------------- */

int state_open(struct sync *s);
void state_release(struct sync *s);
/* Bracket around a change of `count` chunks in ascending order: the old bytes are in the journal
 * before, the new ones with leaf and version are durable after. */
int state_change_begin(struct sync *s, const uint32_t *chunks, uint32_t count);
int state_change_end(struct sync *s, const uint32_t *chunks, const uint64_t *versions,
                     uint32_t count);
/* Every chunk is missing from now on; or those in the bitmap. */
int state_forget(struct sync *s);
int state_forget_chunks(struct sync *s, const uint8_t *chunks);
/* After a rewind, also one that this process finds in its ledger: chunks that are as the rewind says take its
 * version, others from before it are missing. */
int state_rewind(struct sync *s);
bool state_current(struct sync *s); /* whole and at the head of the ledger we have */
void state_survey(struct sync *s);
/* Root and leaves of the state at `index` as it was here; NULL: not (any more) known. */
const struct past_state *state_past(const struct sync *s, uint64_t index);

/* ---- sync_trainer.c --------------------------------------------------------------------- */

int trainer_on_up(struct sync *s, const struct sync_event *ev);
void trainer_on_step(struct sync *s, const struct sync_event *ev);
int trainer_on_frozen(struct sync *s, const struct sync_event *ev);
void trainer_on_applied(struct sync *s);
void trainer_on_moments(struct sync *s, const struct sync_event *ev);
void trainer_on_down(struct sync *s);
void trainer_on_due(struct sync *s, const struct msg_due *msg);
/* A chunk of the state goes from old to new under the trainer. before: whether that may be done
 * now. */
bool trainer_takes_changes(const struct sync *s);
bool trainer_follows(const struct sync *s); /* it holds anchor + work, so changes must reach it */
/* Does it hold the work of the contribution? */
bool trainer_holds(const struct sync *s, const struct contribution *c);
void trainer_change(struct sync *s, uint32_t chunk, const float *old, bool summed);
/* Work and queued samples are void: back to the anchor as soon as there is one. */
void trainer_lose_work(struct sync *s, enum sync_loss by, const char *why);
/* How the trainer spent the milliseconds since the last tick. */
void trainer_spend(struct sync *s, uint64_t ms);
/* What became of the fragment's contribution. */
void trainer_decided(struct sync *s, uint32_t fragment, bool summed);
void trainer_pump(struct sync *s);
bool trainer_has_work(const struct sync *s);
int trainer_work(struct sync *s);

/* ---- sync_leases.c ---------------------------------------------------------------------- */

void leases_on_list(struct sync *s, const struct msg_leases *msg);
/* What the commit spent of ours; called when its entry comes. */
void leases_spend(struct sync *s, const struct commit *c);
/* What of a claim is not spent, as far as we know; count 0: nothing. */
struct msg_lease leases_left(struct sync *s, const struct msg_lease *claim);
/* The claims of a contribution found on disk. */
void leases_restore(struct sync *s, const struct msg_ready *ready);
/* The trainer's work is void: it gets everything that no frozen contribution claims. */
void leases_restart(struct sync *s);
/* A contribution of an earlier life of the trainer was decided: what it claimed and is not spent goes to the
 * trainer again. */
void leases_orphan_decided(struct sync *s);
void leases_consume(struct sync *s, uint64_t more); /* the trainer did */
uint64_t leases_used(const struct sync *s);
uint64_t leases_unfrozen(const struct sync *s); /* of these: in no frozen contribution */
uint64_t leases_queued(const struct sync *s);
uint32_t leases_claims(const struct sync *s, struct msg_lease *out); /* out: [PROTO_LEASES_MAX] */
void leases_feed(struct sync *s);
void leases_ask(struct sync *s);

/* ---- sync_round.c ----------------------------------------------------------------------- */

int contribution_open(struct sync *s);
void contribution_release(struct sync *s);
/* Encode anchor - local of a fragment, announce it. */
int contribution_begin(struct sync *s, uint32_t fragment);
bool contribution_has_work(const struct sync *s);
int contribution_work(struct sync *s);
void contribution_abort(struct sync *s, uint32_t fragment); /* an encoding that is not finished */
void contribution_drop(struct sync *s, uint32_t fragment);  /* a frozen one */
/* Its round is over without it, and no trainer holds its work: the same bytes go into the next round, if it claims
 * samples that are not spent (else false). Waits, and is true, while the new base is in no whole state yet. */
bool contribution_again(struct sync *s, uint32_t fragment);
void contribution_announce(struct sync *s, uint32_t fragment);
int contribution_on_reset(struct sync *s, const struct msg_reset *msg);
void contribution_on_want(struct sync *s, struct peer *p, const struct frame *f,
                          const struct msg_want *msg);
void contribution_pump(struct sync *s);
/* Send the next chunk p wants of the fragment. False: nothing to send. */
bool contribution_send_chunk(struct sync *s, struct peer *p, uint32_t fragment);

/* ---- sync_plan.c ------------------------------------------------------------------------ */

int plan_on_plan(struct sync *s, const struct frame *f, const struct msg_plan *msg);
int plan_on_drop(struct sync *s, const struct frame *f, const struct msg_drop *msg);
void plan_release(struct sync *s, uint32_t fragment);
/* Entries of the ledger came: was the plan for a round that is over? */
bool plan_is_over(const struct sync *s, uint32_t fragment);
/* Is the frame about the fragment's plan in work? Another plan's chunks and results are void. */
bool plan_is_current(const struct sync *s, uint32_t fragment, const struct frame *f);
bool plan_is_newer(const struct sync *s, uint32_t fragment, uint64_t term, uint64_t number);
bool plan_owes(const struct sync *s, uint32_t member); /* chunks to this aggregator */
/* Number of a member among the contributors, or -1. */
int plan_contributor(const struct plan *p, uint32_t member);
/* Nothing more of contributor i goes into chunks that are not finished. */
void plan_drop_contributor(struct plan *p, int i);
/* Room for a shard's sums or copy. forced: [count] sets of set_bytes, taken over; may be NULL. */
int plan_work_begin(struct sync *s, const struct plan *p, struct shard_work *w, uint32_t first,
                    uint32_t count, enum shard_role role);
void plan_work_release(struct shard_work *w);
/* Those that came with LEAVES when we wanted none are asked for them again. */
void plan_invite_early(struct sync *s, const struct plan *p);
static inline uint8_t *plan_set(const struct plan *p, const struct shard_work *w, uint32_t k) {
    return w->sets + (size_t)k * p->set_bytes;
}

/* ---- sync_reduce.c ---------------------------------------------------------------------- */

void reduce_on_leaves(struct sync *s, struct peer *p, const struct frame *f,
                      const struct msg_leaves *msg);
int reduce_on_chunk(struct sync *s, struct peer *p, const struct frame *f,
                    const struct msg_chunk *msg);
/* The second holder's copy: does the plan in work wait for it? */
bool reduce_waits_for(struct sync *s, const struct peer *p, const struct frame *f,
                      uint32_t fragment, uint32_t chunk);
void reduce_on_result_leaves(struct sync *s, struct peer *p, const struct frame *f,
                             const struct msg_result_leaves *msg);
int reduce_on_result(struct sync *s, struct peer *p, const struct frame *f,
                     const struct msg_result *msg);
void reduce_judge(struct sync *s); /* silent and slow contributors are dropped */
/* As holder, where the connection to the aggregator was lost or replaced. */
void reduce_ask_again(struct sync *s, const struct peer *peer);
int reduce_pump(struct sync *s);
bool reduce_has_work(const struct sync *s);
int reduce_work(struct sync *s);
void reduce_release(struct sync *s);

/* ---- sync_audit.c ----------------------------------------------------------------------- */

int audit_on_audit(struct sync *s, const struct frame *f, const struct msg_audit *msg);
/* Is this our auditor, and of which chunk? The wanted bitmap loses all others' bits. */
bool audit_is_by(const struct plan *p, uint32_t member);
bool audit_is_of(const struct plan *p, uint32_t member, uint32_t chunk);
/* The chunk is summed; or contributor `culprit`'s bytes cannot be. */
void audit_finish(struct sync *s, const struct plan *p, struct shard_work *w, uint32_t culprit);
/* Those whose bytes do not come are given up. */
void audit_judge(struct sync *s);
void audit_accuse(struct sync *s, struct plan *p, uint32_t contributor, uint32_t chunk,
                  const char *reason);

/* ---- sync_results.c --------------------------------------------------------------------- */

/* Under which number a shard of the plan is kept: a resumed commit's own shards keep theirs. */
uint32_t results_shard(const struct plan *p, uint32_t shard);
/* Write the finished shard to disk and take its memory over. */
int results_keep(struct sync *s, const struct plan *p, struct shard_work *w);
/* Also looks on the disk. NULL: not held. */
struct held *results_find(struct sync *s, uint32_t fragment, uint64_t term, uint64_t plan,
                          uint64_t round, uint32_t shard);
/* What we have of a commit's results, own shards on disk too, is in s->held afterwards. */
void results_look(struct sync *s, struct commit *c);
/* Who holds chunk k (of the fragment) of the commit; NULL: we do not. The bytes: until the next call of a
 * results_ function; NULL: the disk lost them. */
struct held *results_with(struct sync *s, const struct commit *c, uint32_t k);
const uint8_t *results_chunk(struct sync *s, struct held *h, uint32_t k);
/* Chunk k of a commit was fetched and applied: kept for others as far as memory goes. `data` is taken
 * over; leaves: of the whole fragment. */
void results_relay(struct sync *s, const struct commit *c, const struct msg_digest_item *leaves,
                   uint32_t k, uint8_t *data);
void results_report(struct sync *s, const struct plan *p, uint32_t shard, const struct held *h);
void results_settle(struct sync *s);
void results_on_get(struct sync *s, struct peer *p, const struct frame *f,
                    const struct msg_result_get *msg);
bool results_send_next(struct sync *s, struct peer *p, uint32_t fragment);
void results_release(struct sync *s);

/* ---- sync_apply.c ----------------------------------------------------------------------- */

void apply_on_holders(struct sync *s, const struct msg_holders *msg);
void apply_on_result_leaves(struct sync *s, struct peer *p, const struct frame *f,
                            const struct msg_result_leaves *msg);
void apply_on_result(struct sync *s, struct peer *p, const struct frame *f,
                     const struct msg_result *msg);
void apply_on_none(struct sync *s, struct peer *p, const struct msg_none *msg);
void apply_pump(struct sync *s);
void apply_on_peer_closed(struct sync *s, const struct peer *p);
/* Its connection was replaced: what we asked it for may not have reached it. */
void apply_ask_again(struct sync *s, const struct peer *p);
/* The state changed, or this process began: what became of the contributions? */
void apply_resolve(struct sync *s);
void apply_arrived(struct sync *s);
void apply_show_root(struct sync *s);
bool apply_has_work(struct sync *s);
int apply_work(struct sync *s);
void apply_release(struct sync *s);
bool apply_waits_for_donors(struct sync *s, uint32_t chunk);
bool apply_owes(const struct sync *s, uint32_t member); /* results to us */
bool apply_fragment_is_current(const struct sync *s, uint32_t fragment);
/* Did the commit after the chunk's version sum our contribution in it? */
bool apply_summed_here(struct sync *s, uint32_t chunk);
/* A chunk of the state was changed, scratch2 holds what it was: the trainer follows, and the residual if
 * our contribution was summed in it. */
void apply_follow(struct sync *s, uint32_t chunk, bool summed);

/* ---- sync_catchup.c --------------------------------------------------------------------- */

void catchup_set_donors(struct sync *s, const struct msg_address *list, uint32_t count,
                        bool replace);
/* The run went back to a checkpoint. */
int catchup_rewind(struct sync *s);
/* The state proved wrong: everything comes from others. */
void catchup_forget_state(struct sync *s);
/* The agreed root of a state became known. */
void catchup_on_root(struct sync *s, const struct msg_root *msg);
int catchup_on_resync(struct sync *s, const struct msg_resync *msg);
void catchup_on_leaves_get(struct sync *s, const struct msg_state_leaves_get *msg);
void catchup_on_state(struct sync *s, struct peer *p, const struct msg_state *msg);
void catchup_on_state_get(struct sync *s, struct peer *p, const struct msg_state_get *msg);
void catchup_on_none(struct sync *s, struct peer *p, const struct msg_none *msg);
bool catchup_send_state(struct sync *s, struct peer *p);
void catchup_pump(struct sync *s);
void catchup_on_peer_closed(struct sync *s, const struct peer *p);
void catchup_ask_again(struct sync *s, const struct peer *p); /* as apply_ask_again */
bool catchup_has_work(struct sync *s);
int catchup_work(struct sync *s);
void catchup_release(struct sync *s);
bool catchup_owes(const struct sync *s, uint32_t member); /* chunks of state to us */
bool catchup_busy(struct sync *s); /* this member cannot follow the ledger by results alone */

void moments_on_get(struct sync *s, struct peer *p);
void moments_on_chunk(struct sync *s, struct peer *p, const struct msg_moments *msg);
void moments_on_none(struct sync *s, struct peer *p);
bool moments_send_next(struct sync *s, struct peer *p);
void moments_refuse_all(struct sync *s);
/* Fetching for our own trainer: true while it should not train yet. */
bool moments_pending(struct sync *s);
void moments_abort(struct sync *s);

/* ---- sync_peer.c ------------------------------------------------------------------------ */

struct peer *peer_find(struct sync *s, uint32_t id);
struct peer *peer_get(struct sync *s, uint32_t id); /* made if need be; NULL: too many, no memory */
void peer_set_addresses(struct sync *s, const struct msg_address *list, uint32_t count);
/* An open link, or NULL after dialling it if that is possible. */
struct peer *peer_link(struct sync *s, uint32_t id);
bool peer_reachable(struct sync *s, uint32_t id);
void peer_send(struct sync *s, struct peer *p, enum proto_type type, uint64_t term, uint64_t plan,
               const void *msg, size_t bulk_bytes);
void peer_none(struct sync *s, struct peer *p, enum proto_type what, uint64_t term, uint64_t plan,
               uint32_t fragment, uint64_t round, const char *why);
/* What was received of each member since the last call; returns their number. out: [PROTO_RATES_MAX]. */
uint32_t peer_rates(struct sync *s, struct msg_rate *out);
/* It broke the protocol. */
void peer_close(struct sync *s, struct peer *p, const char *why);
int peer_on_event(struct sync *s, const struct sync_event *ev);
void peer_pump(struct sync *s);
void peer_release(struct sync *s);

#endif
