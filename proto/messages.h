/* messages.h - every message of the wire and every record of the ledger, declared once.
 *
 * A record is a list of fields; from it come the C struct below, the msgpack encoder and the
 * decoder with its limits (message.c). On the wire a record is a msgpack array with exactly these
 * elements in this order. F(kind, name, max) is one field:
 *
 *   U8 U32 U64 I32   integers; max is the largest value accepted (0 = whatever the width holds)
 *   F32 F64          floats; only finite values are accepted
 *   DIGEST KEY SIG   byte strings of exactly 32, 32 and 64 bytes
 *   BYTES            a byte string of at most max bytes, borrowed from the frame
 *   STR              UTF-8 without NUL or control characters, at most max bytes
 *   L(record, name, max) is a list of at most max records of another kind.
 *
 * Numbers the whole run agrees on: a *sample* is one sequence; `ledger index` is the run's clock;
 * `round` counts the outer steps of one fragment from 0. Who may send what, and when, is in
 * docs/protocol.md. */
#ifndef INTELLECT_MESSAGES_H
#define INTELLECT_MESSAGES_H

#include <stddef.h>
#include <stdint.h>

/* ---- limits ------------------------------------------------------------------------------ */
#define PROTO_VERSION 1
#define PROTO_DIGEST_BYTES 32
#define PROTO_KEY_BYTES 32
#define PROTO_SIG_BYTES 64
#define PROTO_NAME_BYTES_MAX 64         /* a member's display name */
#define PROTO_TEXT_BYTES_MAX 240        /* a reason, an error */
#define PROTO_ADDRESS_BYTES_MAX 256     /* host name or literal */
#define PROTO_URL_BYTES_MAX 1024
#define PROTO_MEMBERS_MAX 1024u
#define PROTO_SET_BYTES_MAX (PROTO_MEMBERS_MAX / 8) /* bitmap over a plan's contributor list */
#define PROTO_CHUNKS_MAX 65536u         /* of one fragment */
#define PROTO_PART_BYTES_MAX (1u << 30) /* of an object in a store */
#define PROTO_PARTS_MAX (1u << 20)      /* of a checkpoint */
#define PROTO_INIT_SPENT_MAX 4096u      /* ranges of samples that a run begins without */
#define PROTO_CHUNK_ELEMENTS_MAX (1u << 20)
#define PROTO_SHARDS_MAX 1024u
#define PROTO_LEASES_MAX 256u           /* held by one member at once */
#define PROTO_FRAGMENTS_MAX 64u
#define PROTO_RATES_MAX 64u             /* of one heartbeat */
#define PROTO_AUDITS_MAX 16u            /* chunks summed again in one round */
#define PROTO_LEDGER_BATCH_MAX 256u
#define PROTO_BLOB_BYTES_MAX (1u << 20) /* genesis, ledger body, roster, manifest */

/* ---- records inside messages and the ledger ------------------------------------------------ */

/* The network. Hugging Face names: hidden_size, num_hidden_layers, num_attention_heads,
 * num_key_value_heads, intermediate_size, vocab_size, max_position_embeddings. */
#define FIELDS_model(F, L)                                                                         \
    F(U32, layers, 1024) F(U32, width, 65536) F(U32, heads, 1024) F(U32, kv_heads, 1024)           \
    F(U32, ffn, 262144) F(U32, vocabulary, 1u << 20) F(U32, sequence, 1u << 20)                    \
    F(F64, rope_theta, 0) F(F64, norm_eps, 0) F(U8, tied, 1)                                       \
    /* rope_scaling: 0 default, 1 linear, 2 llama3. What a type does not use is 0. */              \
    F(U8, rope_type, 2) F(F64, rope_factor, 0) F(F64, rope_low_factor, 0)                          \
    F(F64, rope_high_factor, 0) F(U32, rope_original, 1u << 20)

/* Settings of inner training; lr follows committed tokens. */
#define FIELDS_inner(F, L)                                                                         \
    F(U32, batch, 65536)            /* samples per inner step */                                   \
    F(F64, lr, 0) F(F64, beta1, 0) F(F64, beta2, 0) F(F64, eps, 0) F(F64, weight_decay, 0)         \
    F(F64, clip, 0)                 /* global norm; 0 = none */                                    \
    F(F64, z_loss, 0) F(F64, max_z_loss, 0) /* weights of what is added to the loss; 0 = none */   \
    F(U64, warmup_tokens, 0) F(U64, decay_tokens, 0) F(U64, total_tokens, 0)                       \
    F(U8, schedule, 2)              /* enum inner_schedule */                                      \
    F(U8, optimizer, 1)             /* enum inner_optimizer */                                     \
    F(U8, states, 2)                /* enum inner_states */

/* Settings of the outer step. Times in milliseconds. */
#define FIELDS_outer(F, L)                                                                         \
    F(U32, inner_steps, 1u << 20)   /* H: ready after this many ... */                             \
    F(U32, round_ms, 0)             /* ... or after this long, whichever is first */               \
    F(U32, quorum, PROTO_MEMBERS_MAX) F(U32, grace_ms, 0)                                          \
    F(F32, lr, 0) F(F32, momentum, 0) F(F32, alpha, 0)                                             \
    F(U8, contribution_codec, 15) F(U8, result_codec, 15)                                          \
    F(U32, chunk_elements, PROTO_CHUNK_ELEMENTS_MAX)                                               \
    F(U32, fragments, PROTO_FRAGMENTS_MAX) /* P: chunk i belongs to fragment i mod P */            \
    F(U32, overlap, 1u << 20)       /* tau: 0 = a trainer waits for the round it contributes to; else it \
                                     * trains on, and stragglers are given about so many inner steps */ \
    F(U32, shard_chunks, PROTO_CHUNKS_MAX) /* of a shard, at least */                              \
    F(U32, audits, PROTO_AUDITS_MAX) /* chunks of a round that somebody else sums again */         \
    F(U8, lr_rule, 1)               /* enum lr_rule: when contributors vanish or appear */         \
    F(U8, fixed_membership, 1)      /* the run fails when a member is lost */                      \
    F(F32, clip_factor, 0)          /* norm over this times the median is scaled down; 0 = never */\
    F(U32, ramp_rounds, 1024)       /* a joiner's weight grows to full over so many rounds */      \
    F(U32, heartbeat_ms, 0) F(U32, silence_ms_max, 0) /* no progress for so long: member lost */   \
    F(U32, lease_samples, 1u << 20) F(U32, checkpoint_rounds, 1u << 20)

#define FIELDS_corpus(F, L)                                                                        \
    F(STR, manifest_url, PROTO_URL_BYTES_MAX) F(DIGEST, manifest_digest, 0)                        \
    F(STR, tokenizer, 64) F(U64, samples, 0) F(U64, shuffle_seed, 0)

/* Ledger entry 0. The run's name is the BLAKE2b-256 digest of these bytes. init_spent: samples that count as
 * spent from the beginning, where the run goes on with the data of the one that wrote init_from; ascending,
 * disjoint, not touching. */
#define FIELDS_genesis(F, L)                                                                       \
    F(U32, version, 0) F(STR, name, 64) F(KEY, root_key, 0) F(U64, created_ms, 0)                  \
    L(model, model, 1) L(inner, inner, 1) L(outer, outer, 1) L(corpus, corpus, 1)                  \
    F(U64, init_seed, 0) F(F32, init_std, 0) F(STR, checkpoint_url, PROTO_URL_BYTES_MAX)           \
    L(checkpoint, init_from, 1)     /* the initial state is this checkpoint's, not the seed's */ \
    L(range, init_spent, PROTO_INIT_SPENT_MAX)

/* The root key's word that `key` may speak for the run as a coordinator. number counts from 1;
 * retires: the delegation whose key speaks for the run no longer (0 = none). */
#define FIELDS_delegation(F, L)                                                                    \
    F(DIGEST, run, 0) F(KEY, key, 0) F(U32, number, 0) F(U32, retires, 0)

#define FIELDS_enrolment(F, L)                                                                     \
    F(U32, member, 0) F(KEY, key, 0) F(STR, name, PROTO_NAME_BYTES_MAX) F(U8, aggregate_only, 1)   \
    F(U64, invite, 0)

#define FIELDS_lease(F, L)                                                                         \
    F(U64, lease, 0) F(U32, generation, 0) F(U64, start, 0) F(U64, count, 0)

/* What a member claims to have trained on, or a commit spends: samples [start, start+count). */
#define FIELDS_spend(F, L)                                                                         \
    F(U32, member, 0) F(U64, lease, 0) F(U32, generation, 0) F(U64, start, 0) F(U64, count, 0)

#define FIELDS_range(F, L) F(U64, start, 0) F(U64, count, 0)

#define FIELDS_digest_item(F, L) F(DIGEST, digest, 0)

/* One contributor of a plan. weight is what its values are multiplied by (see outer_accumulate in
 * kernels.h); root, the digest tree over its encoded chunks, and norm were announced before the plan.
 * clip stands on the norm, so aggregators hold the contributor to it. */
#define FIELDS_contributor(F, L)                                                                   \
    F(U32, member, 0) F(U32, weight, 1u << 24) F(F32, clip, 0) F(U64, tokens, 0) F(DIGEST, root, 0) \
    F(F64, norm, 0)

/* Chunks [first, first+count) of the fragment: averaged by `aggregator`, copied by `holder`. */
#define FIELDS_shard(F, L)                                                                         \
    F(U32, first, PROTO_CHUNKS_MAX) F(U32, count, PROTO_CHUNKS_MAX)                                \
    F(U32, aggregator, 0) F(U32, holder, 0)

/* Where a member listens; only in messages to those who must dial it, never in the ledger. */
#define FIELDS_address(F, L)                                                                       \
    F(U32, member, 0) F(STR, host, PROTO_ADDRESS_BYTES_MAX) F(U32, port, 65535)

/* Run-length: the next `chunks` chunks were summed from the contributors whose bits stand in set
 * (bit i of byte i/8 = i-th contributor of the plan) with `weight` in all. */
#define FIELDS_summed(F, L)                                                                        \
    F(U32, chunks, PROTO_CHUNKS_MAX) F(BYTES, set, PROTO_SET_BYTES_MAX) F(U64, weight, 0)

#define FIELDS_member(F, L)                                                                        \
    F(U32, member, 0) F(KEY, key, 0) F(STR, name, PROTO_NAME_BYTES_MAX) F(U8, aggregate_only, 1)

#define FIELDS_signed_entry(F, L) F(BYTES, bytes, PROTO_BLOB_BYTES_MAX) F(SIG, signature, 0)

/* A ledger entry; `bytes` of a signed_entry decode to this. previous = digest of the bytes of
 * the entry before. kind says what body is (enum ledger_kind). */
#define FIELDS_entry(F, L)                                                                         \
    F(U64, index, 0) F(DIGEST, previous, 0) F(U64, term, 0) F(U8, kind, 0)                         \
    F(BYTES, body, PROTO_BLOB_BYTES_MAX)

/* Body of a LEDGER_COMMIT. base_index: ledger index of the fragment's commit before (0 = initial state);
 * state_index/state_root: a state on whose digest-tree root the members agreed by then, the newest such one;
 * result_root: tree over the encoded result chunks of the fragment. tokens: of the samples in `spent`,
 * which nobody had spent before. */
#define FIELDS_commit(F, L)                                                                        \
    F(U32, fragment, 0) F(U64, round, 0) F(U64, plan, 0) F(U64, base_index, 0)                     \
    F(U64, state_index, 0) F(DIGEST, state_root, 0) F(F32, lr, 0) F(F32, momentum, 0)              \
    F(U8, codec, 15) F(I32, grid_exponent, 0) F(U64, tokens, 0) F(U64, tokens_committed, 0)        \
    F(DIGEST, result_root, 0)                                                                      \
    L(contributor, contributors, PROTO_MEMBERS_MAX) L(shard, shards, PROTO_SHARDS_MAX)             \
    L(summed, summed, PROTO_CHUNKS_MAX) L(spend, spent, PROTO_CHUNKS_MAX)

#define FIELDS_checkpoint(F, L)                                                                    \
    F(U64, at_index, 0) F(DIGEST, state_root, 0) F(STR, url, PROTO_URL_BYTES_MAX)                  \
    F(DIGEST, manifest, 0) F(U64, tokens_committed, 0)

/* An invite as the store keeps it; its id is the first 8 bytes of secret_digest (LE, below 2^63).
 * expires_ms: wall clock, Unix time. Never on the wire, never in the ledger. */
#define FIELDS_invite_record(F, L)                                                                 \
    F(DIGEST, secret_digest, 0) F(U32, uses_left, 0) F(U64, expires_ms, 0) F(U8, aggregate_only, 1)

#define FIELDS_revocation(F, L) F(U32, member, 0) F(STR, reason, PROTO_TEXT_BYTES_MAX)

/* A member is no contributor, aggregator or holder from here on, until an entry with lifted = 1. kind: enum
 * proto_type of the signed message that proves it (READY or SHARD_REPORT; 0 = lifted, or one that is longer than
 * proof may be), proof its bytes as sent and signed under proof_term. */
#define FIELDS_quarantine(F, L)                                                                    \
    F(U32, member, 0) F(U8, lifted, 1) F(STR, reason, PROTO_TEXT_BYTES_MAX)                        \
    F(U8, kind, 0) F(U64, proof_term, 0) F(BYTES, proof, PROTO_BLOB_BYTES_MAX / 2)

/* The commits after at_index are undone and their samples are free again: the state of this entry is that
 * checkpoint's, every chunk's version is this entry's index. */
#define FIELDS_rewind(F, L) L(checkpoint, to, 1) F(STR, reason, PROTO_TEXT_BYTES_MAX)

/* ---- coordinator and member ---------------------------------------------------------------- */

/* C->N, first on every connection, also to strangers. */
#define FIELDS_welcome(F, L)                                                                       \
    F(U32, version, 0) F(BYTES, genesis, PROTO_BLOB_BYTES_MAX)                                     \
    F(BYTES, delegation, 4096) F(SIG, delegation_signature, 0)

#define FIELDS_enrol(F, L)                                                                         \
    F(DIGEST, secret, 0) F(STR, name, PROTO_NAME_BYTES_MAX) F(U8, aggregate_only, 1)
#define FIELDS_enrolled(F, L) F(U32, member, 0)

/* N->C. head_*: last ledger entry the member has; term_max: highest term it ever saw; instance: a random
 * number of this process' life, so that a copied home directory is told from a reconnect;
 * state_*: what its anchor is (has_state 0 = nothing yet). port 0 = not reachable, dials only. */
#define FIELDS_hello(F, L)                                                                         \
    F(STR, software, 64) F(U64, instance, 0) F(U8, trains, 1) F(U32, port, 65535)                  \
    F(U64, head_index, 0) F(DIGEST, head_digest, 0) F(U64, term_max, 0)                            \
    F(U8, has_state, 1) F(U64, state_index, 0) F(DIGEST, state_root, 0)

/* C->N. From here on frames carry this session. donors: members to catch up from (empty when the
 * member's state is the current one). roster and the missing ledger follow at once. */
#define FIELDS_hello_ack(F, L)                                                                     \
    F(U64, session, 0) F(U64, head_index, 0) F(U64, settled_index, 0)                              \
    F(U64, tokens_committed, 0) L(address, donors, 16)

#define FIELDS_ledger(F, L) L(signed_entry, entries, PROTO_LEDGER_BATCH_MAX)

/* The members at ledger index `version`. Signed by the coordinator's online key over `body`,
 * which decodes to roster_body. */
#define FIELDS_roster(F, L) F(BYTES, body, PROTO_BLOB_BYTES_MAX) F(SIG, signature, 0)
#define FIELDS_roster_body(F, L) F(U64, version, 0) L(member, members, PROTO_MEMBERS_MAX)

/* What the sender of the heartbeat received from `member` since the heartbeat before: bulk bytes, and
 * the milliseconds in which they kept coming. An uplink is what its receivers say it is. */
#define FIELDS_rate(F, L) F(U32, member, 0) F(U64, bytes, 0) F(U32, busy_ms, 0)

/* progress grows with every inner step, applied chunk or summed chunk: a process that is alive but
 * stuck does not move it. phase: enum member_phase. */
#define FIELDS_heartbeat(F, L)                                                                     \
    F(U64, progress, 0) F(U64, step, 0) F(F64, loss, 0) F(F64, tokens_per_s, 0) F(U8, phase, 0)    \
    F(U32, trainer_restarts, 0) F(U64, state_index, 0) L(rate, rates, PROTO_RATES_MAX)
#define FIELDS_heartbeat_ack(F, L)                                                                 \
    F(U64, settled_index, 0) F(U64, tokens_committed, 0) F(U32, members_live, 0)

#define FIELDS_lease_ask(F, L) F(U32, samples, 1u << 20)
/* All leases the member holds now; what is not in the list it no longer has. */
#define FIELDS_leases(F, L) L(lease, leases, PROTO_LEASES_MAX)

/* N->C: a frozen contribution. Its bytes never change from here on. base_index: as in the commit;
 * state_*: the member's whole state when it froze (state_index >= base_index). samples: whose effect on this
 * fragment is in it, also of those that other fragments' commits have spent. ranges: those not known to be
 * spent. signature: by the member's key, over these bytes with 64 zero bytes in its place, purpose "ready". */
#define FIELDS_ready(F, L)                                                                         \
    F(U32, fragment, 0) F(U64, round, 0) F(U64, base_index, 0) F(U64, state_index, 0)              \
    F(DIGEST, state_root, 0) F(U8, codec, 15) F(U32, chunks, PROTO_CHUNKS_MAX) F(U64, samples, 0)  \
    F(F64, norm, 0) F(F64, absmax, 0) F(F64, loss, 0) F(DIGEST, root, 0)                           \
    L(lease, ranges, PROTO_LEASES_MAX) F(SIG, signature, 0)

/* C->N: the quorum of this round is ready; who has done a step freezes now or is not waited for. */
#define FIELDS_due(F, L) F(U32, fragment, 0) F(U64, round, 0)

/* C->N. The plan's number is in the frame header. addresses: whom the receiver must dial. resum: ledger
 * index of a commit whose results are lost and are summed again, chunk by chunk from the contributors it
 * names (the shards are then only the lost ones); 0 = an ordinary plan. */
#define FIELDS_plan(F, L)                                                                          \
    F(U32, fragment, 0) F(U64, round, 0) F(U64, base_index, 0) F(U64, resum, 0)                    \
    F(I32, grid_exponent, 0)                                                                       \
    F(U8, codec, 15) L(contributor, contributors, PROTO_MEMBERS_MAX)                               \
    L(shard, shards, PROTO_SHARDS_MAX) L(address, addresses, PROTO_SHARDS_MAX)

/* C->aggregators: finish the round without what has not yet arrived from this contributor. */
#define FIELDS_drop(F, L) F(U32, fragment, 0) F(U64, round, 0) F(U32, member, 0)

/* N->C, from the aggregator and from the second holder, each after writing to disk. signature: as in
 * READY, purpose "shard_report". */
#define FIELDS_shard_report(F, L)                                                                  \
    F(U32, fragment, 0) F(U64, round, 0) F(U64, plan, 0) F(U32, shard, PROTO_SHARDS_MAX)           \
    L(digest_item, results, PROTO_CHUNKS_MAX) L(summed, summed, PROTO_CHUNKS_MAX)                  \
    F(SIG, signature, 0)

/* C->auditor and contributors of the plan in the frame header: this chunk is summed once more, from the
 * contributors in `set`, by the auditor. address: whom a contributor dials (none: it is dialled). */
#define FIELDS_audit(F, L)                                                                         \
    F(U32, fragment, 0) F(U64, round, 0) F(U32, chunk, PROTO_CHUNKS_MAX) F(U32, auditor, 0)        \
    F(BYTES, set, PROTO_SET_BYTES_MAX) L(address, address, 1)
/* N->C: leaf: digest_leaf of the encoded mean; culprit: the contributor whose bytes, right under its root,
 * are not what it announced (then leaf is zero), else 0; complete = 0: not all bytes could be had. */
#define FIELDS_audit_report(F, L)                                                                  \
    F(U32, fragment, 0) F(U64, round, 0) F(U32, chunk, PROTO_CHUNKS_MAX) F(U8, complete, 1)        \
    F(DIGEST, leaf, 0) F(U32, culprit, 0)
/* Aggregator->C: bytes right under the contributor's root are not finite, off the grid, or larger than
 * announced. */
#define FIELDS_accuse(F, L)                                                                        \
    F(U32, fragment, 0) F(U64, round, 0) F(U32, chunk, PROTO_CHUNKS_MAX) F(U32, member, 0)         \
    F(STR, reason, PROTO_TEXT_BYTES_MAX)

/* C->N: show the leaves of your state, two members' roots differ. N->C: the leaves, of state `index`. */
#define FIELDS_state_leaves_get(F, L) F(U64, index, 0)
#define FIELDS_state_leaves(F, L) F(U64, index, 0) L(digest_item, leaves, PROTO_CHUNKS_MAX)

/* C->N: send me the ledger from here on (as LEDGER): your head is newer than my store. */
#define FIELDS_ledger_get(F, L) F(U64, from, 0)

/* C->N, with a commit: who holds its result. */
#define FIELDS_holders(F, L) F(U64, index, 0) L(address, addresses, PROTO_SHARDS_MAX)

#define FIELDS_root(F, L) F(U64, index, 0) F(DIGEST, root, 0)
/* C->N: your contribution was refused; drop it and go back to the anchor. */
#define FIELDS_reset(F, L) F(U32, fragment, 0) F(STR, reason, PROTO_TEXT_BYTES_MAX)
/* C->N: your state is not the run's; check every chunk and catch up. root: of state at index. wrong: the
 * chunks known to differ (bitmap over the state); empty = unknown, all are fetched anew. */
#define FIELDS_resync(F, L)                                                                        \
    F(U64, index, 0) F(DIGEST, root, 0) F(BYTES, wrong, PROTO_CHUNKS_MAX / 8) L(address, donors, 16)

/* C->N: write the state at `index` (the newest applied) to url. spent: the data cursor; bf16: the published
 * weights are rounded, with the fp32 anchor beside them; shared: other members send parts of it. */
#define FIELDS_checkpoint_write(F, L)                                                              \
    F(U64, index, 0) F(DIGEST, root, 0) F(STR, url, PROTO_URL_BYTES_MAX) F(U64, round, 0)          \
    F(U64, tokens_committed, 0) L(range, spent, PROTO_CHUNKS_MAX) F(U8, bf16, 1) F(U8, shared, 1)
#define FIELDS_checkpoint_sign(F, L) F(U64, index, 0) F(BYTES, manifest, PROTO_BLOB_BYTES_MAX)
#define FIELDS_checkpoint_signed(F, L) F(U64, index, 0) F(SIG, signature, 0)
#define FIELDS_checkpoint_done(F, L)                                                               \
    F(U64, index, 0) F(U8, written, 1) F(DIGEST, manifest, 0) F(STR, text, PROTO_TEXT_BYTES_MAX)

/* C->N, while another member writes the checkpoint of the state at `index`: keep these chunks of it, once it
 * is there, for parts that will be asked for. None: what was kept for `index` is needed no more. bf16 as in
 * CHECKPOINT_WRITE. */
#define FIELDS_checkpoint_keep(F, L)                                                               \
    F(U64, index, 0) F(DIGEST, root, 0) F(U8, bf16, 1) L(range, chunks, 2)
/* The writer to C: bytes [offset, offset+bytes) of `object` in the checkpoint of `index`, which have this
 * SHA-256, and whose data begins in `chunk`. check 0: url takes them by PUT; 1: it gives them by GET, and
 * they are to be looked at. C to a member: do that. part: a number of the writer's, the same for both. */
#define FIELDS_checkpoint_part(F, L)                                                               \
    F(U64, index, 0) F(U32, part, PROTO_PARTS_MAX) F(U8, check, 1) F(U32, chunk, PROTO_CHUNKS_MAX) \
    F(STR, object, 255) F(U64, offset, 0) F(U32, bytes, PROTO_PART_BYTES_MAX) F(DIGEST, sha256, 0) \
    F(STR, url, 4095)
/* The answer; C to the writer: done 0 = no member will, do it yourself. The writer to C, check 1: it has
 * looked at this part itself. */
#define FIELDS_checkpoint_part_done(F, L)                                                          \
    F(U64, index, 0) F(U32, part, PROTO_PARTS_MAX) F(U8, check, 1) F(U8, done, 1)                  \
    F(STR, text, PROTO_TEXT_BYTES_MAX)

#define FIELDS_leave(F, L) F(STR, reason, PROTO_TEXT_BYTES_MAX)
/* Either side, last on a connection: code is an enum err_code, final 1 = do not come back. */
#define FIELDS_bye(F, L) F(U8, code, 0) F(U8, final, 1) F(STR, reason, PROTO_TEXT_BYTES_MAX)

/* ---- member and member --------------------------------------------------------------------- */

/* The first word on every connection between members: the dialler's, and then the answer, which repeats
 * number and lane. process: random, of the sender's life; number: which of the dialler's links this
 * connection belongs to; lane: 0 for control, else the link must be there already, and the lane is for
 * tensor data alone (CHUNK, RESULT, STATE, MOMENTS). */
#define FIELDS_link(F, L) F(U64, process, 0) F(U64, number, 0) F(U32, lane, 0)
/* On such a lane: what follows is to be taken after the first `control` messages of lane 0 in the same
 * direction, LINK and tensor data not counted. */
#define FIELDS_after(F, L) F(U64, control, 0)

/* contributor -> aggregator: the leaves under the root it announced, of the shard's chunks
 * [first, first+n). all = every leaf of the fragment, so that the root can be checked. */
#define FIELDS_leaves(F, L)                                                                        \
    F(U32, fragment, 0) F(U64, round, 0) L(digest_item, all, PROTO_CHUNKS_MAX)
/* The receiver's answer, and the way to resume: bitmap over the fragment's chunks still wanted. */
#define FIELDS_want(F, L)                                                                          \
    F(U32, fragment, 0) F(U64, round, 0) F(BYTES, chunks, PROTO_CHUNKS_MAX / 8)
/* One encoded chunk of a contribution, or of a partial sum (codec PARTIAL): set and weight say
 * whose values are in it. */
#define FIELDS_chunk(F, L)                                                                         \
    F(U32, fragment, 0) F(U64, round, 0) F(U32, chunk, PROTO_CHUNKS_MAX) F(U8, codec, 15)          \
    F(BYTES, set, PROTO_SET_BYTES_MAX) F(U64, weight, 0)                                           \
    F(BYTES, data, PROTO_CHUNK_ELEMENTS_MAX * 8)
/* Ask for result chunks of a round (bitmap); answered by result_leaves, then results. */
#define FIELDS_result_get(F, L)                                                                    \
    F(U32, fragment, 0) F(U64, round, 0) F(U64, plan, 0) F(BYTES, chunks, PROTO_CHUNKS_MAX / 8)
#define FIELDS_result_leaves(F, L)                                                                 \
    F(U32, fragment, 0) F(U64, round, 0) F(U64, plan, 0) F(U32, first, PROTO_CHUNKS_MAX)           \
    L(digest_item, leaves, PROTO_CHUNKS_MAX) L(summed, summed, PROTO_CHUNKS_MAX)
#define FIELDS_result(F, L)                                                                        \
    F(U32, fragment, 0) F(U64, round, 0) F(U64, plan, 0) F(U32, chunk, PROTO_CHUNKS_MAX)           \
    F(U8, codec, 15) F(BYTES, data, PROTO_CHUNK_ELEMENTS_MAX * 4)

/* Catch-up: chunks of anchor and momentum (bitmap over the chunks of the whole state). */
#define FIELDS_state_get(F, L) F(U64, index_min, 0) F(BYTES, chunks, PROTO_CHUNKS_MAX / 8)
/* version: ledger index of the last commit in the chunk; index and path: digest-tree path to the
 * root of the state at `index`. data: fp32 anchor, then fp32 momentum, little-endian. */
#define FIELDS_state(F, L)                                                                         \
    F(U32, chunk, PROTO_CHUNKS_MAX) F(U64, version, 0) F(U64, index, 0)                            \
    L(digest_item, path, 32) F(BYTES, data, PROTO_CHUNK_ELEMENTS_MAX * 8)
/* A joiner asks a member's trainer for AdamW second moments; chunks of the parameter vector. */
#define FIELDS_moments_get(F, L) F(U32, fragment, 0)
#define FIELDS_moments(F, L)                                                                       \
    F(U32, chunk, PROTO_CHUNKS_MAX) F(U64, steps, 0) F(BYTES, data, PROTO_CHUNK_ELEMENTS_MAX * 4)
/* "I do not have that": what = message type asked for. */
#define FIELDS_none(F, L)                                                                          \
    F(U8, what, 0) F(U32, fragment, 0) F(U64, round, 0) F(STR, reason, PROTO_TEXT_BYTES_MAX)

/* ---- the lists ----------------------------------------------------------------------------- */

/* Records that are no messages of their own. A record stands after those it contains. */
#define PROTO_RECORDS(R)                                                                           \
    R(model) R(inner) R(outer) R(corpus) R(checkpoint) R(range) R(genesis) R(delegation) R(enrolment)       \
    R(lease) R(spend) R(digest_item) R(contributor) R(shard) R(address) R(summed)         \
    R(member) R(signed_entry) R(entry) R(commit) R(revocation) R(quarantine) R(rewind)             \
    R(roster_body) R(invite_record) R(rate)

/* M(NAME, record, number): number is the type byte of the frame and never changes its meaning. */
#define PROTO_MESSAGES(M)                                                                          \
    M(WELCOME, welcome, 1) M(ENROL, enrol, 2) M(ENROLLED, enrolled, 3) M(HELLO, hello, 4)          \
    M(HELLO_ACK, hello_ack, 5) M(LEDGER, ledger, 6) M(ROSTER, roster, 7)                           \
    M(HEARTBEAT, heartbeat, 8) M(HEARTBEAT_ACK, heartbeat_ack, 9) M(LEASE_ASK, lease_ask, 10)      \
    M(LEASES, leases, 11) M(READY, ready, 12) M(PLAN, plan, 13) M(SHARD_REPORT, shard_report, 14)  \
    M(HOLDERS, holders, 15) M(ROOT, root, 16) M(RESET, reset, 17) M(RESYNC, resync, 18)            \
    M(CHECKPOINT_WRITE, checkpoint_write, 19) M(CHECKPOINT_SIGN, checkpoint_sign, 20)              \
    M(CHECKPOINT_SIGNED, checkpoint_signed, 21) M(CHECKPOINT_DONE, checkpoint_done, 22)            \
    M(LEAVE, leave, 23) M(BYE, bye, 24) M(DROP, drop, 25) M(DUE, due, 26) M(AUDIT, audit, 27)      \
    M(AUDIT_REPORT, audit_report, 28) M(ACCUSE, accuse, 29)                                        \
    M(STATE_LEAVES_GET, state_leaves_get, 30) M(STATE_LEAVES, state_leaves, 31)                    \
    M(LEAVES, leaves, 32) M(WANT, want, 33) M(CHUNK, chunk, 34) M(RESULT_GET, result_get, 35)      \
    M(RESULT_LEAVES, result_leaves, 36) M(RESULT, result, 37) M(STATE_GET, state_get, 38)          \
    M(STATE, state, 39) M(MOMENTS_GET, moments_get, 40) M(MOMENTS, moments, 41) M(NONE, none, 42)  \
    M(LEDGER_GET, ledger_get, 43) M(CHECKPOINT_KEEP, checkpoint_keep, 44)                          \
    M(CHECKPOINT_PART, checkpoint_part, 45) M(CHECKPOINT_PART_DONE, checkpoint_part_done, 46)      \
    M(LINK, link, 48) M(AFTER, after, 49)

enum ledger_kind {
    LEDGER_GENESIS = 0, LEDGER_DELEGATION = 1, LEDGER_ENROLMENT = 2, LEDGER_REVOCATION = 3,
    LEDGER_COMMIT = 4, LEDGER_CHECKPOINT = 5, LEDGER_QUARANTINE = 6, LEDGER_REWIND = 7
};

/* How the inner learning rate goes on after its warm-up: node/schedule.h. */
enum inner_schedule { SCHEDULE_WSD = 0, SCHEDULE_COSINE = 1, SCHEDULE_CONSTANT = 2 };

/* What steps, and how what it remembers of matrices is kept: node/optimizer.h. */
enum inner_optimizer { OPTIMIZER_ADAMW = 0, OPTIMIZER_MUON = 1 };
enum inner_states { STATES_FP32 = 0, STATES_BF16 = 1, STATES_8BIT = 2 };

/* The outer learning rate of a round: 0 = the setting; 1 = the setting times the square root of the round's
 * weight over that of the rounds before, where that is under 2/3 or over 3/2 (docs/flow.md). */
enum lr_rule { LR_CONSTANT = 0, LR_SQRT = 1 };

enum member_phase {
    PHASE_CATCHING_UP = 0, PHASE_IDLE = 1, PHASE_TRAINING = 2, PHASE_WAITING = 3, PHASE_APPLYING = 4
};

/* ---- structs, generated -------------------------------------------------------------------- */

struct proto_bytes {
    const uint8_t *data;
    uint32_t length;
};
struct digest {
    uint8_t b[PROTO_DIGEST_BYTES];
};
struct proto_key {
    uint8_t b[PROTO_KEY_BYTES];
};
struct proto_sig {
    uint8_t b[PROTO_SIG_BYTES];
};

#define PROTO_TYPE_U8 uint8_t
#define PROTO_TYPE_U32 uint32_t
#define PROTO_TYPE_U64 uint64_t
#define PROTO_TYPE_I32 int32_t
#define PROTO_TYPE_F32 float
#define PROTO_TYPE_F64 double
#define PROTO_TYPE_DIGEST struct digest
#define PROTO_TYPE_KEY struct proto_key
#define PROTO_TYPE_SIG struct proto_sig
#define PROTO_TYPE_BYTES struct proto_bytes
#define PROTO_TYPE_STR struct proto_bytes

#define PROTO_DECLARE_FIELD(kind, name, max) PROTO_TYPE_##kind name;
#define PROTO_DECLARE_LIST(record, name, max) struct msg_##record *name; uint32_t name##_count;
#define PROTO_DECLARE_RECORD(record)                                                               \
    struct msg_##record { FIELDS_##record(PROTO_DECLARE_FIELD, PROTO_DECLARE_LIST) };
#define PROTO_DECLARE_MESSAGE(NAME, record, number) PROTO_DECLARE_RECORD(record)
PROTO_RECORDS(PROTO_DECLARE_RECORD)
PROTO_MESSAGES(PROTO_DECLARE_MESSAGE)

#define PROTO_DECLARE_NUMBER(NAME, record, number) MSG_##NAME = number,
enum proto_type { PROTO_MESSAGES(PROTO_DECLARE_NUMBER) MSG_TYPE_MAX = 255 };

#define PROTO_DECLARE_RECORD_ID(record) RECORD_##record,
#define PROTO_DECLARE_MESSAGE_ID(NAME, record, number) RECORD_##record,
enum proto_record {
    PROTO_RECORDS(PROTO_DECLARE_RECORD_ID) PROTO_MESSAGES(PROTO_DECLARE_MESSAGE_ID) RECORD_COUNT
};

#endif
