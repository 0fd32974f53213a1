/* tools.h - the commands around a model, as node/cli calls them. Each parses its own arguments
 * (argv[0] is the command's name; --help teaches), prints results to stdout (one JSON object with
 * --json) and errors to stderr, and returns the exit code: 0, 1 (failed), 2 (wrong use). */
#ifndef INTELLECT_NODE_TOOLS_H
#define INTELLECT_NODE_TOOLS_H

/* data [tokenize] --out DIR [--sequence N] [--heldout F] [--tokenizer T] [--document-end E] [--field NAME]
 * [--file-tokens N] [--threads N] [--json] PATH...
 * Tokenise texts into a corpus.
 * data mix --out DIR [--samples N] [--json] WEIGHT:CORPUS...
 * Make one of several by weights. */
int tool_data(int argc, char **argv);

/* bigram CORPUS [--json]
 * Loss of an order-2 byte model of the training text on the held-out slice: what a network must
 * beat to have learnt more than letter statistics. */
int tool_bigram(int argc, char **argv);

/* train CONFIG [--out DIR] [--tp N] [--dp N] [--shard S] [--precision P] [--activations GB] [--offload W]
 * [--threads N] [--keep] [--replay STEP] [--stop-after N] [--save-steps N] [--heldout N] [--set SECTION.KEY=VALUE]
 * [--plot FILE.svg] [--quiet] [--json] Train alone, without a coordinator; solo.h. To be called before any
 * thread was made. */
int tool_train(int argc, char **argv);

/* eval CHECKPOINT (--text FILE | --corpus CORPUS) [--sequence N] [--tokenizer NAME] [--threads N] [--json]
 * Mean loss in nats per token, perplexity, bits per byte, tokens; of a text or of a corpus' held-out
 * slice. */
int tool_eval(int argc, char **argv);

/* generate CHECKPOINT --prompt TEXT [--tokens N] [--temperature T] [--top-k K] [--top-p P] [--seed N]
 * [--tokenizer NAME] [--threads N] [--json]
 * Continue a text. */
int tool_generate(int argc, char **argv);

/* plan --model NAME [--sequence N] [--layers N] [--batch N] [--precision P] [--optimizer O] [--states S]
 * [--devices NxGB] [--tp N] [--dp N] [--shard S] [--activations GB] [--offload W] [--threads N] [--memory GB]
 * [--json]
 * What each rank of a trainer will hold in memory, before anything is loaded, and which mesh fits some
 * devices; 1 where it does not fit. */
int tool_plan(int argc, char **argv);

#endif
