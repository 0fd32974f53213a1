/* proto.h - bytes: digests, identities, signatures, invites, the ledger's chain, messages, frames
 * and the TLS 1.3 channel. What a message is for is not known here. Records: messages.h.
 *
 * Everything that comes from outside is checked here once: sizes, types, ranges, finite floats,
 * valid UTF-8. What passed proto_decode() has the declared form; whether it makes sense now is for
 * the receiver to judge.
 *
 * Call proto_init() once per process before anything else (libsodium, OpenSSL, SIGPIPE). */
#ifndef INTELLECT_PROTO_H
#define INTELLECT_PROTO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/err.h"
#include "proto/messages.h"

int proto_init(struct err *err);

/* ---- digests (BLAKE2b-256, RFC 7693) --------------------------------------------------------- */

struct digest digest_of(const void *bytes, size_t length);
bool digest_equal(const struct digest *a, const struct digest *b);
bool digest_is_zero(const struct digest *d);
/* Lower-case hexadecimal; `out` holds DIGEST_HEX_BYTES, NUL included. */
#define DIGEST_HEX_BYTES 65
void digest_hex(const struct digest *d, char *out);
int digest_parse(const char *hex, struct digest *out, struct err *err);

/* Incremental: init, update any number of times, final. Storage is the caller's. */
struct digest_stream {
    _Alignas(64) unsigned char opaque[384]; /* crypto_generichash_state */
};
void digest_stream_init(struct digest_stream *s);
void digest_stream_update(struct digest_stream *s, const void *bytes, size_t length);
struct digest digest_stream_final(struct digest_stream *s);

/* The digest tree: leaf = H(0x00 || index LE64 || bytes), node = H(0x01 || left || right); an odd
 * node moves up unchanged (RFC 6962 section 2.1 shape); the root of no leaves is all zero. */
struct digest digest_leaf(uint64_t index, const void *bytes, size_t length);
/* The same leaf over two pieces, as if they were one (anchor, then momentum). */
struct digest digest_leaf2(uint64_t index, const void *a, size_t a_length, const void *b, size_t b_length);
/* And in any pieces: what a leaf's digest begins with is in *s. */
void digest_leaf_begin(struct digest_stream *s, uint64_t index);
/* Many leaves at once, on as many as `threads` threads (0: one per core; fewer where there is little
 * to do), the caller's among them. Each piece's leaf = digest_leaf2() of its other fields. Returns when
 * all are done; cannot fail, for where no thread can be had the caller's does the work. */
struct digest_piece {
    uint64_t index;
    const void *a, *b; /* b may be NULL if b_length is 0 */
    size_t a_length, b_length;
    struct digest leaf; /* out */
};
#define DIGEST_THREADS_MAX 16
#define DIGEST_THREAD_BYTES_MIN ((size_t)1 << 19)
void digest_leaves(struct digest_piece *piece, size_t count, size_t threads);
struct digest digest_tree_root(const struct msg_digest_item *leaves, size_t count);
#define DIGEST_PATH_MAX 32
/* Siblings from leaf `index` up; returns their number (<= DIGEST_PATH_MAX). index < count. */
size_t digest_tree_path(const struct msg_digest_item *leaves, size_t count, size_t index,
                        struct msg_digest_item path[DIGEST_PATH_MAX]);
bool digest_tree_verify(const struct digest *root, const struct digest *leaf, size_t index, size_t count,
                        const struct msg_digest_item *path, size_t path_count);

/* ---- identities and signatures (Ed25519) ------------------------------------------------------ */

struct identity {
    struct proto_key key;   /* public */
    uint8_t secret[64];     /* libsodium's form; wipe with identity_release */
};
void identity_create(struct identity *id);
/* Deterministic, for simulations and tests only. */
void identity_from_seed(struct identity *id, const uint8_t seed[32]);
void identity_release(struct identity *id);
/* A file of mode 0600 with one line of text. load refuses one that others may read. */
int identity_save(const struct identity *id, const char *path, struct err *err);
int identity_load(struct identity *id, const char *path, struct err *err);

/* Signatures cover purpose, run, term and the bytes as sent:
 * "intellect/1 " || purpose || 0x00 || run || term LE64 || bytes. Purposes in use: "delegation" (by the root key, term 0),
 * "ledger", "roster", "manifest" (by an online key), and those of proto_record_sign(). */
void proto_sign(const struct identity *id, const char *purpose, const struct digest *run, uint64_t term,
                const void *bytes, size_t length, struct proto_sig *out);
bool proto_verify(const struct proto_key *key, const char *purpose, const struct digest *run, uint64_t term,
                  const void *bytes, size_t length, const struct proto_sig *sig);

/* A record that ends in a field `signature` carries a signature of its own: over its encoding with 64 zero
 * bytes in place of the signature, which are the last 64. Purposes: "ready", "shard_report" (by a member).
 * sign: whatever `record` holds there is ignored. -1: as proto_encode. */
int proto_record_sign(const struct identity *id, const char *purpose, const struct digest *run, uint64_t term,
                      enum proto_record which, const void *record, struct proto_sig *out, struct err *err);
/* Of the encoding; false where it is no such record or the signature is not key's. */
bool proto_record_verify(const struct proto_key *key, const char *purpose, const struct digest *run,
                         uint64_t term, const uint8_t *bytes, size_t length);

/* ---- invites ----------------------------------------------------------------------------------
 * One line: "intellect://HOST:PORT/RUN#SECRET", RUN and SECRET in hexadecimal (32 bytes each).
 * An IPv6 literal stands in brackets. */
struct invite {
    char host[PROTO_ADDRESS_BYTES_MAX + 1];
    uint16_t port;
    struct digest run;
    struct digest secret;
};
#define INVITE_BYTES_MAX 512
int invite_format(const struct invite *invite, char out[INVITE_BYTES_MAX], struct err *err);
int invite_parse(const char *line, struct invite *out, struct err *err);

/* ---- messages ---------------------------------------------------------------------------------- */

/* Grows by itself up to `limit`; an append past it or out of memory sets `failed`. */
struct proto_buffer {
    uint8_t *data;
    size_t length, capacity, limit;
    bool failed;
};
void proto_buffer_init(struct proto_buffer *b, size_t limit);
void proto_buffer_release(struct proto_buffer *b);
void proto_buffer_append(struct proto_buffer *b, const void *bytes, size_t length);

/* Append `record` (a struct msg_<record>) in msgpack. -1 with ERR_PROTOCOL names the field that is
 * over its limit or not finite: then the caller has a bug or foreign data; nothing was appended. */
int proto_encode(struct proto_buffer *out, enum proto_record which, const void *record, struct err *err);

/* As proto_encode(), but where the record's last field is BYTES its contents are left out: *tail
 * (borrowed from the record) follows, and the two together are what proto_encode() would have made.
 * Otherwise *tail is empty. */
int proto_encode_head(struct proto_buffer *out, enum proto_record which, const void *record,
                      struct proto_bytes *tail, struct err *err);

/* The largest encoding a record can have by its limits. */
size_t proto_record_bytes_max(enum proto_record which);

/* Decode exactly `length` bytes into `record`. Byte strings point into `bytes`; lists are allocated
 * and freed by proto_decoded_release() (safe on a failed or zeroed record). Never builds a generic
 * tree; memory is bounded by `length`. -1 with ERR_PROTOCOL: record, field, what was wrong. */
int proto_decode(const uint8_t *bytes, size_t length, enum proto_record which, void *record, struct err *err);
void proto_decoded_release(enum proto_record which, void *record);

/* A deep copy whose byte strings are owned too; freed by proto_copy_release(). */
int proto_copy(enum proto_record which, const void *from, void *to, struct err *err);
void proto_copy_release(enum proto_record which, void *record);

size_t proto_record_size(enum proto_record which);   /* sizeof(struct msg_...) */
const char *proto_record_name(enum proto_record which);
/* -1 for a type byte that is no message. */
int proto_record_of_type(uint8_t type);
const char *proto_type_name(uint8_t type);           /* "READY", or "unknown" */

/* What a STR field may hold: UTF-8 (RFC 3629) without the control characters U+0000-U+001F and
 * U+007F-U+009F. */
bool proto_text_is_clean(const uint8_t *text, size_t length);

/* Which messages may overtake which on one connection: 0 HEARTBEAT and its answer, 2 tensor data
 * (CHUNK, RESULT, STATE, MOMENTS), 1 all others. */
#define PROTO_URGENCIES 3
int proto_urgency(uint8_t type);

/* Borrow a C string as a STR field; and the way back, cut to fit and NUL-terminated. */
struct proto_bytes proto_str(const char *text);
void proto_str_copy(struct proto_bytes s, char *out, size_t size);

static inline bool proto_set_has(const uint8_t *set, uint32_t bit) { return set[bit / 8] >> (bit % 8) & 1; }
static inline void proto_set_add(uint8_t *set, uint32_t bit) { set[bit / 8] |= (uint8_t)(1u << (bit % 8)); }
static inline void proto_set_del(uint8_t *set, uint32_t bit) { set[bit / 8] &= (uint8_t)~(1u << (bit % 8)); }

/* ---- the ledger's chain ------------------------------------------------------------------------ */

/* Digest of an entry's bytes: what the next entry names as `previous`. */
#define LEDGER_DIGEST(e) digest_of((e)->bytes.data, (e)->bytes.length)

/* Follows a ledger entry by entry: index, chain, signature, and that the signer was delegated.
 * Kept by every member and by `ledger verify`. Storage is the caller's. */
#define LEDGER_ONLINE_KEYS_MAX 64
struct ledger_chain {
    struct digest run;
    struct proto_key root_key;
    struct proto_key online[LEDGER_ONLINE_KEYS_MAX]; /* those that may sign the next entry */
    uint32_t number[LEDGER_ONLINE_KEYS_MAX];         /* of its delegation */
    uint32_t online_count, number_max;
    uint64_t next_index;
    struct digest head;
    uint64_t term;
};
void ledger_chain_init(struct ledger_chain *c, const struct digest *run);
/* May `key` speak for the run, as far as the entries taken in say? */
bool ledger_chain_speaks(const struct ledger_chain *c, const struct proto_key *key);
/* Check `e` as the next entry and take it in. `decoded` receives the entry (release it with
 * proto_decoded_release(RECORD_entry,...)). ERR_CORRUPT: broken chain or signature; ERR_STALE: an
 * index already taken in (harmless). Entry 0 is the genesis (its digest is the run) and is signed by
 * the root key; so is every delegation; all others by a delegated online key. */
int ledger_chain_take(struct ledger_chain *c, const struct msg_signed_entry *e, struct msg_entry *decoded,
                      struct err *err);
/* Take in the body of a DELEGATION whose signature was checked; ledger_chain_take() does both. Errors as there, and
 * ERR_FULL. */
int ledger_chain_delegate(struct ledger_chain *c, const struct msg_delegation *d, struct err *err);
/* What the body of an entry holds, by the entry's kind. */
union ledger_body {
    struct msg_genesis genesis;
    struct msg_delegation delegation;
    struct msg_enrolment enrolment;
    struct msg_revocation revocation;
    struct msg_commit commit;
    struct msg_checkpoint checkpoint;
    struct msg_quarantine quarantine;
    struct msg_rewind rewind;
};
/* ERR_CORRUPT: a kind that is none; else as proto_decode(). Released either way. */
int ledger_body_decode(const struct msg_entry *e, union ledger_body *body, struct err *err);
void ledger_body_release(const struct msg_entry *e, union ledger_body *body);
const char *ledger_kind_name(uint8_t kind); /* "commit"; NULL for one that is none */
/* Check a delegation shown in a WELCOME; ERR_REFUSED when it does not make `key` the run's. */
int ledger_check_delegation(const struct msg_genesis *genesis, const struct digest *run, struct proto_bytes delegation,
                            const struct proto_sig *sig, const struct proto_key *key, struct err *err);

/* ---- frames ------------------------------------------------------------------------------------
 * 36 bytes, little-endian: magic "ITL1" 4 | version u8 | type u8 | reserved u16 = 0 | payload length u32 |
 * term u64 | session u64 | plan u64. Then the payload. Term, session and plan say what a frame belongs
 * to; anything older than current is refused. */
#define PROTO_FRAME_HEADER_BYTES 36u
#define PROTO_FRAME_BYTES_MAX (9u << 20)           /* on a link between members */
#define PROTO_CONTROL_BYTES_MAX (4u << 20)         /* on a link to the coordinator */
#define PROTO_STRANGER_BYTES_MAX (8u << 10)        /* before the peer is known */
struct frame {
    uint8_t type;
    uint32_t length;
    uint64_t term, session, plan;
};
void frame_write(const struct frame *f, uint8_t out[PROTO_FRAME_HEADER_BYTES]);
/* ERR_PROTOCOL: wrong magic (says so if it looks like HTTP or TLS), version, type, length > max. */
int frame_read(const uint8_t in[PROTO_FRAME_HEADER_BYTES], uint32_t length_max, struct frame *out, struct err *err);

/* ---- TLS channels (libevent, OpenSSL, TLS 1.3 only) --------------------------------------------
 * Mutual TLS with self-signed Ed25519 certificates made from the identity; no dates, no authority.
 * A channel is one connection: it frames, decodes and hands over messages on its event_base's
 * thread. Callbacks may close the channel.
 *
 * Messages that wait to be sent are sorted by proto_urgency(): one never overtakes another that is as
 * urgent or more, so that order is kept but for what is announced here. A frame that has begun ends
 * before another begins. */
struct event_base;
struct channel;
struct channel_context; /* TLS settings + identity; one per process, shared by channels of one thread */

struct channel_context *channel_context_create(const struct identity *id, struct err *err);
void channel_context_destroy(struct channel_context *ctx);

struct channel_ops {
    /* TLS is up and `key` is what the peer proved. Return false to refuse: the channel closes and
     * on_close follows. */
    bool (*on_open)(void *arg, struct channel *ch, const struct proto_key *key);
    /* One decoded message; `msg` is a struct msg_* valid until return. */
    void (*on_message)(void *arg, struct channel *ch, const struct frame *f, const void *msg);
    /* The connection is gone (why: "closed by peer", "TLS: ...", "protocol: ..."); the channel is
     * freed after return. Not called after channel_close(), else called exactly once. Where the
     * peer broke the protocol it is sent a BYE that says so. */
    void (*on_close)(void *arg, struct channel *ch, const struct err *why);
    /* After something was sent: less than PROTO_SEND_LOW waits now. May be NULL. */
    void (*on_drained)(void *arg, struct channel *ch);
};
#define PROTO_SEND_LOW (1u << 20)
#define PROTO_SEND_MAX (64u << 20)      /* a peer that reads so slowly is cut off */
#define CHANNEL_HANDSHAKE_MS_MAX 10000  /* connect, and again the handshake */
#define CHANNEL_STRANGER_MS_MAX 30000   /* open, but channel_set_frame_bytes_max() was never called */
/* A frame of a known peer that has begun: so long for its header, and again and one second for each so
 * many bytes for its payload. */
#define CHANNEL_FRAME_MS_MAX 20000
#define CHANNEL_FRAME_BYTES_PER_S (16u << 10)
/* Other limits for the channels made from now on; for tests. */
void channel_context_set_timeouts(struct channel_context *ctx, int handshake_ms, int stranger_ms);
void channel_context_set_frame_time(struct channel_context *ctx, int ms, uint32_t bytes_per_s);

/* `ops` is copied. A host name is looked up at once and blocks meanwhile; addresses do not. NULL only
 * where the name has no address or memory is out: a failed connection shows in on_close. */
struct channel *channel_dial(struct event_base *base, struct channel_context *ctx, const char *host, uint16_t port,
                             const struct channel_ops *ops, void *arg, struct err *err);
/* Takes over `fd` (also when it fails). */
struct channel *channel_accept(struct event_base *base, struct channel_context *ctx, int fd,
                               const struct channel_ops *ops, void *arg, struct err *err);
void channel_set_arg(struct channel *ch, void *arg);
void *channel_arg(struct channel *ch);
/* Starts at PROTO_STRANGER_BYTES_MAX; raise it when the peer is known. */
void channel_set_frame_bytes_max(struct channel *ch, uint32_t bytes);
/* Hand over no more messages until held is false again; what comes meanwhile stays in the kernel, and
 * the end of the connection is not noticed either. */
void channel_hold(struct channel *ch, bool held);
/* Encode and queue, from on_open on. Nothing of msg is used after the return. -1: not open, encoding failed (caller's bug) or over
 * PROTO_SEND_MAX (on_close follows soon, not from here). */
int channel_send(struct channel *ch, uint8_t type, uint64_t term, uint64_t session, uint64_t plan,
                 const void *msg, struct err *err);
size_t channel_unsent_bytes(const struct channel *ch);
uint64_t channel_received_bytes(const struct channel *ch);
const struct proto_key *channel_peer_key(const struct channel *ch);
/* "203.0.113.7" and port of the other end. */
void channel_peer_address(const struct channel *ch, char out[PROTO_ADDRESS_BYTES_MAX + 1], uint16_t *port);
/* Close now; what is queued is sent first for at most a second when `flush`, as long as the loop
 * runs. No callback follows; the channel must not be touched again. */
void channel_close(struct channel *ch, bool flush);

/* Listen on host:port (port 0 = any; *port receives it). Accepts and hands over raw
 * descriptors, which the callback owns. ERR_IO names the address and what holds the port. */
struct listener;
struct listener *listener_create(struct event_base *base, const char *host, uint16_t *port,
                                 void (*on_accept)(void *arg, int fd), void *arg, struct err *err);
void listener_destroy(struct listener *l);

/* ---- strangers at the gate ----------------------------------------------------------------------
 * Whoever connects costs memory and a handshake before anybody knows who it is. The gate counts them:
 * so many at once, in all and of one address (a /64, where it is IPv6), so many in a minute of one
 * address and of all. Who is too many takes the place of the oldest that has had GATE_TENURE_MS to say
 * who it is, else it is refused. A quarter of the places is for addresses that members have come from,
 * and these may connect more often: so members get in while strangers flood.
 *
 * Times are milliseconds of a clock that never goes back. */
struct gate;
struct gate_place; /* of one connection */
struct sockaddr_storage;
struct gate_limits {
    uint32_t strangers_max;       /* at once; at least 1 */
    uint32_t connects_per_minute; /* of one address */
};
#define GATE_TENURE_MS 2000
#define GATE_LINES_PER_MINUTE 60

struct gate *gate_create(const struct gate_limits *limits, struct err *err);
void gate_destroy(struct gate *g); /* NULL is fine; its places are void */
/* A connection from `peer` has come. NULL: close it. Else a place, which ends with gate_known(),
 * gate_leave(), or evict(arg): then the connection has to be closed; evict may be called from within
 * gate_enter(), must not call back, and is not called for the place that is being made. */
struct gate_place *gate_enter(struct gate *g, const struct sockaddr_storage *peer, uint64_t now_ms,
                              void (*evict)(void *arg), void *arg);
void gate_known(struct gate_place *p); /* a member proved who it is */
void gate_leave(struct gate_place *p); /* it went, or was refused */
/* How many were refused or evicted since the last call. */
uint32_t gate_take_refused(struct gate *g);
/* Strangers must not fill a disk with lines about them, nor a member with lines about itself: may one
 * be written now? *untold: how many were not since the last that was. */
bool gate_may_tell(struct gate *g, bool of_member, uint64_t now_ms, uint32_t *untold);

#endif
