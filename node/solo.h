/* solo.h - training alone: no coordinator, no rounds, one node's ranks on one corpus, from the first
 * parameters to the last step of run.yaml's schedule. The engine, the order of samples and the learning rate
 * are those of a member of a run; position in the schedule is the tokens of the batches done.
 *
 * Everything of a run lies in one folder:
 *   genesis      the settings it was begun with; other ones are refused
 *   state        parameters, moments and the number of batches done (engine.h), replaced every save_steps
 *   state-STEP   the ones before, where they are kept
 *   loss.csv     the curve (curve.h)
 *   model        a Hugging Face folder of the parameters, made anew each time that the end is reached
 *   lock         held while it runs
 *
 * A run that was stopped or killed goes on from its state when the same command comes again, and what it ends
 * with has the same bits as if it had never been cut, for the same mesh, kernels, threads and room for activations. */
#ifndef INTELLECT_NODE_SOLO_H
#define INTELLECT_NODE_SOLO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "node/device.h"
#include "proto/settings.h"

struct solo_options {
    const char *out;          /* the folder; made if missing */
    struct device device;     /* zeroed: the CPU */
    int tp, dp, shard;        /* >= 1, and enum engine_shard */
    int precision, threads;   /* enum trainer_precision; 0 = all cores */
    size_t activation_bytes;  /* of a rank, struct engine_mesh; 0 = the default */
    int offload;              /* enum engine_offload */
    uint64_t stop_after;      /* stop once so many batches are done; 0 = at the schedule's end */
    uint64_t save_steps;      /* >= 1 */
    bool keep;                /* every state that is saved stays, as state-STEP */
    uint64_t replay;          /* not train: compute the steps to this one again, see solo_run(); 0 = train */
    uint64_t heldout_samples; /* for the loss at the end; 0 = none */
    int silence_s;            /* a rank that says nothing for so long is given up, and the run with it; 0: never */
    bool quiet;               /* no line about progress */
};

struct solo_result {
    uint64_t steps, steps_total, tokens; /* batches done, of the whole schedule; tokens in them */
    double loss;                         /* of the last step; NAN where none was done */
    double heldout;                      /* NAN where there is none */
    double tokens_per_s, data_share;     /* of this call; the share of its time that waited for samples */
    bool stopped;                        /* by a signal */
};

/* Train. settings and corpus: resolved (settings.h). SIGINT and SIGTERM stop it after the step, saved.
 * Starts ranks (mesh.h): to be called before any thread. Returns 0, or -1 with ERR_CONFIG (the network
 * cannot be cut so; the folder was begun with other settings), ERR_REFUSED (it runs already), ERR_TIMEOUT (a rank
 * hangs), or what went wrong; what was saved before stays.
 *
 * replay: from the newest state that was kept before that step (none: from the first parameters) the steps are computed
 * again, and what comes out is held against the one kept of it, bit by bit. Nothing in the folder changes. ERR_NOT_FOUND:
 * the step was not kept; ERR_CORRUPT names the first tensor that differs. */
int solo_run(const struct solo_options *options, const struct settings *settings,
             const struct corpus_facts *corpus, struct solo_result *result, struct err *err);

/* Batches of the schedule: its tokens over those of a batch, up. */
uint64_t solo_steps(const struct settings *settings);

#endif
