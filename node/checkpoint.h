/* checkpoint.h - writes one checkpoint at a time beside everything else: feeds ckpt_writer some
 * chunks per turn of the agent's loop, and each chunk right before a new commit changes it. When to
 * write one, and who signs it, is the coordinator's business. */
#ifndef INTELLECT_NODE_CHECKPOINT_H
#define INTELLECT_NODE_CHECKPOINT_H

#include <stdbool.h>
#include <stdint.h>

#include "ckpt/ckpt.h"
#include "node/sync.h"
#include "node/timer.h"
#include "node/uplink.h"
#include "proto/proto.h"

struct event_base;
struct checkpoint;

struct checkpoint_ops {
    /* The manifest must be signed: answer with checkpoint_signed(). */
    void (*on_manifest)(void *arg, const void *manifest, size_t length);
    /* A part that others may send or look at, whose first element is in `chunk`, or one that was looked at
     * here. The former is answered with checkpoint_settle(). */
    void (*on_note)(void *arg, uint64_t index, const struct ckpt_note *note, uint32_t chunk);
    /* It held up the loop for so long, mostly much less than a millisecond. */
    void (*on_turn)(void *arg, const struct timer_turn *turn);
    /* The end: ok, or why not (text, one line: "no space left ..."). manifest: digest of its bytes,
     * zero if not ok. */
    void (*on_done)(void *arg, bool ok, const struct digest *manifest, const char *text);
};

/* elements, chunk_elements: of the state that will be written.
 * tokenizer  path of the tokenizer.json of the run, which goes into checkpoints where it is there and is the one
 *            that the run names. NULL: none.
 * NULL: no memory. */
struct checkpoint *checkpoint_create(struct event_base *base, uint64_t elements, uint32_t chunk_elements,
                                     const char *tokenizer, const struct checkpoint_ops *ops, void *arg);
/* What was not published is removed. NULL is fine. */
void checkpoint_destroy(struct checkpoint *c);

/* Begin to write the state of `s`, which is that of msg->index, to the store that msg->url lies in.
 * One that is still being written is given up first, without a word: whoever asks again has
 * forgotten it. Failures are told through on_done, never from within this call. s is borrowed until
 * on_done. */
void checkpoint_begin(struct checkpoint *c, const struct sync *s, struct proto_bytes genesis,
                      const struct msg_checkpoint_write *msg);

/* The hook for sync_set_before_change(): saves the chunk if it is still to be written. */
void checkpoint_before_change(void *checkpoint, uint32_t chunk);

/* What became of a part; and: nobody answers for parts any more. */
void checkpoint_settle(struct checkpoint *c, const struct msg_checkpoint_part_done *msg);
void checkpoint_alone(struct checkpoint *c);

/* The manifest was signed under `term` by the coordinator that showed `w`. */
void checkpoint_signed(struct checkpoint *c, uint64_t index, uint64_t term,
                       const struct proto_sig *signature, const struct uplink_welcome *w);

#endif
