/* tools_ckpt.h - the commands that look at a checkpoint without a network in memory. As in
 * tools.h: each parses its own arguments, prints results to stdout and errors to stderr, and
 * returns the exit code: 0, 1 (failed), 2 (wrong use). CHECKPOINT is a folder or URL of a
 * checkpoint, or of a store of them: then its latest. */
#ifndef INTELLECT_NODE_TOOLS_CKPT_H
#define INTELLECT_NODE_TOOLS_CKPT_H

/* inspect CHECKPOINT [--tensors] [--json]
 * Network, run, ledger index, tokens, round, who signed; tensors and objects. Signatures are
 * checked, tensors are not. */
int tool_inspect(int argc, char **argv);

/* verify CHECKPOINT [--run DIGEST] [--json]
 * Every digest, the signatures from the root key down, the ledger's chain, and that anchor and
 * momentum are the state whose root the manifest names. Reads everything. */
int tool_verify(int argc, char **argv);

/* fetch URL DIR [--run DIGEST] [--json]
 * All objects into a folder, digests checked; goes on where an earlier call ended. */
int tool_fetch(int argc, char **argv);

/* export CHECKPOINT DIR [--weights fp32|bf16] [--file-gb N]
 * A Hugging Face folder, which transformers opens as it is. */
int tool_export(int argc, char **argv);

/* import FOLDER DIR [--weights fp32|bf16] [--file-gb N]
 * A Hugging Face folder of somebody else's, checked, as one of ours. */
int tool_import(int argc, char **argv);

#endif
