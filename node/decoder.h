/* decoder.h - the network of model.h read token by token: keys and values of what was read are kept, so that
 * a token costs one row of each matrix product and a look back, not the sequence again. One sequence, one
 * document. */
#ifndef INTELLECT_NODE_DECODER_H
#define INTELLECT_NODE_DECODER_H

#include "kernels/kernels.h"
#include "proto/err.h"
#include "proto/messages.h"

struct decoder;

/* m       checked with proto_model_check; copied.
 * params  canonical vector in k's memory, as the backend keeps weights; borrowed, as k is.
 * room    tokens that can be read until decoder_forget(), at most m->sequence. Keys and values take
 *         layers * room * 2 * kv_heads * head size * 4 bytes of host memory.
 * NULL with ERR_MEMORY. */
struct decoder *decoder_create(const struct msg_model *m, const struct kernels *k, const void *params,
                               int room, struct err *err);
void decoder_destroy(struct decoder *d); /* NULL is fine */

/* Read n tokens after those before, 1 <= n <= room - decoder_count(), each in [0, vocabulary): the caller
 * checked. logits [vocabulary] of the token after the last one, host memory. Asks the backend for its first
 * failure. */
int decoder_read(struct decoder *d, const int32_t *tokens, int n, float *logits, struct err *err);

/* How many tokens have been read, and none any more. */
int decoder_count(const struct decoder *d);
void decoder_forget(struct decoder *d);

#endif
