/* fault.h - where in a network a step went wrong whose loss or gradient is not finite. */
#ifndef INTELLECT_NODE_FAULT_H
#define INTELLECT_NODE_FAULT_H

#include <stddef.h>

struct model;
struct shard;

/* A few words into out: "the output of layer 3 is not finite" where the forward pass of the last micro-batch
 * is not from there on; else "the gradient of model.layers.3.mlp.up_proj.weight is not finite", the tensor
 * nearest to the loss whose gradient is not, since from there it spreads towards the embedding; else that all
 * are. All ranks of a mesh ask at once and are told the same. */
#define FAULT_BYTES 128
void fault_find(const struct shard *s, const struct model *m, char out[FAULT_BYTES]);

#endif
