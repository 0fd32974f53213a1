/* segment.h - the memory that an agent shares with one trainer process: a ring of commands, a ring
 * of results, and slots through which parameters pass without being copied through a pipe. It
 * knows neither what trains nor what synchronises.
 *
 * The segment is a memfd, so it has no name, needs no clean-up and dies with its last process.
 * Each ring has one producer and one consumer and two eventfds wake the other side. The agent
 * makes the segment once and keeps it over the lives of several trainers.
 *
 *   setup     what a trainer must know before its first command (genesis, corpus, threads)
 *   in        [elements] fp32 and one byte per chunk: written by the agent, read by the trainer
 *   out[2]    [elements] fp32 each: written by the trainer, read by the agent. A slot belongs to the
 *             trainer from the command that names it to the result that does; of out[0] only the
 *             chunks of the fragment that a FREEZE names do, so other fragments may be read. */
#ifndef INTELLECT_NODE_SEGMENT_H
#define INTELLECT_NODE_SEGMENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "node/device.h"
#include "proto/proto.h"

#define SEGMENT_RING_MESSAGES 1024u /* per direction; a power of two */
#define SEGMENT_PATH_BYTES 1040

enum segment_out { SEGMENT_OUT_PARAMETERS = 0, SEGMENT_OUT_MOMENTS = 1, SEGMENT_OUTS = 2 };

enum segment_type {
    /* agent -> trainer */
    SEGMENT_SAMPLES = 1, /* append samples [start, start + count) of the run's order */
    SEGMENT_FREEZE,      /* write the fragment's parameters to out[0] at the next step boundary; wait = 1: then stand
                          * still until APPLY, RESET or CONTINUE */
    SEGMENT_APPLY,       /* take the in slot over as its ops say; tokens, contributors */
    SEGMENT_RESET,       /* parameters := in slot, no samples queued; tokens, contributors */
    SEGMENT_CONTINUE,    /* after a FREEZE: go on as if there had been none */
    SEGMENT_MOMENTS_EXPORT, /* write AdamW's second moments to out[1] */
    SEGMENT_MOMENTS_IMPORT, /* take them from the in slot; steps = how many they average over */
    SEGMENT_STOP,           /* save the inner state and end with exit status 0 */
    /* trainer -> agent */
    SEGMENT_UP = 64, /* ready for a RESET; steps = those in the inner state found on disk; text: what
                      * it computes with */
    SEGMENT_STEP,    /* one inner step done: samples, steps, loss, tokens_per_s, data_share */
    SEGMENT_FROZEN,  /* the fragment's chunks of out[0] are filled; fragment, samples, steps */
    SEGMENT_APPLIED, /* an APPLY, RESET or MOMENTS_IMPORT is done: the in slot is free */
    SEGMENT_MOMENTS, /* out[1] is filled; steps = how many they average over */
    SEGMENT_NOTE,    /* text: worth a line in the log */
    SEGMENT_FAILED,  /* text, code: the trainer ends, and would again */
    SEGMENT_DEVICE_FAILED /* text, code: its device failed, and the trainer ends; the next one may fare better */
};

struct segment_message {
    uint32_t type;
    uint32_t contributors; /* APPLY, RESET: members whose tokens grow the run between commits */
    uint64_t start, count; /* SAMPLES */
    uint32_t fragment, wait; /* FREEZE; FROZEN: fragment */
    uint64_t samples;      /* consumed since the last RESET */
    uint64_t steps;
    uint64_t tokens;       /* APPLY, RESET: the run's committed tokens */
    double loss, tokens_per_s;
    double data_share;     /* STEP: of the time of all steps so far, what they waited for samples */
    uint32_t code;         /* FAILED: enum err_code */
    char text[PROTO_TEXT_BYTES_MAX + 4];
};

/* What a trainer reads before anything else; fixed when the segment is made. */
struct segment_setup {
    uint64_t elements;       /* of the parameter vector, > 0 */
    uint32_t chunk_elements; /* > 0 */
    struct proto_bytes genesis; /* encoded msg_genesis; in the trainer it points into the segment */
    char corpus[SEGMENT_PATH_BYTES];      /* folder or file:// URL of the corpus */
    char inner_state[SEGMENT_PATH_BYTES]; /* file that moments and counters are saved to */
    int threads;             /* OpenMP threads of all ranks together; 0 = as many as cores */
    int tp, dp, shard;       /* the trainer's ranks, >= 1 each (0 = 1), and enum engine_shard */
    struct device device;    /* what it computes on */
    int precision;           /* enum trainer_precision, trainer.h */
    uint64_t activation_bytes; /* of a rank at most; 0 = ENGINE_ACTIVATION_BYTES_MAX, engine.h */
    int offload;             /* enum engine_offload */
    int nice;                /* added to the scheduling priority, 0..19 */
    pid_t agent;             /* filled in by segment_create */
};

struct segment;

/* Make a segment: memfd and eventfds, all close-on-exec; memory is taken when it is first touched.
 * Returns NULL with ERR_MEMORY or ERR_IO. */
struct segment *segment_create(const struct segment_setup *setup, struct err *err);

/* In the trainer: map the segment behind descriptor `fd`; its eventfds must have been inherited
 * under the numbers of segment_fds(). ERR_CORRUPT when `fd` is no segment of this build. */
struct segment *segment_open(int fd, struct err *err);

/* Unmap and close. NULL is fine. */
void segment_destroy(struct segment *s);

/* The descriptors a trainer must inherit under the same numbers; the first is the memfd. */
#define SEGMENT_FDS 3
void segment_fds(const struct segment *s, int out[SEGMENT_FDS]);

const struct segment_setup *segment_setup(const struct segment *s);

/* Empty both rings. Agent only, while no trainer runs. */
void segment_reset(struct segment *s);

/* Append a message for the other side and wake it. False: the ring is full; nothing was sent. */
bool segment_send(struct segment *s, const struct segment_message *m);

/* Take the next message of the other side. False: there is none. */
bool segment_receive(struct segment *s, struct segment_message *out);

/* Readable when there may be messages. Call segment_clear before draining them, so that none is
 * overlooked. */
int segment_wake_fd(const struct segment *s);
void segment_clear(struct segment *s);

/* Wait until there may be messages; false after timeout_ms without. Clears. */
bool segment_wait(struct segment *s, int timeout_ms);

/* How many messages the other side has taken so far, and how many lie there untaken: for an agent
 * that watches whether its trainer still listens. */
uint64_t segment_taken(const struct segment *s);
uint32_t segment_untaken(const struct segment *s);

/* The trainer says whether it is working (in a step) or waiting for commands; the agent reads it to
 * tell a slow trainer from one that has nothing to do. */
void segment_set_busy(struct segment *s, bool busy);
bool segment_busy(const struct segment *s);

/* The trainer counts what it computes in units smaller than a step (layers of a pass), so that a step may
 * take as long as it likes. Grows over the life of the segment. */
void segment_beat(struct segment *s);
uint64_t segment_beats(const struct segment *s);

float *segment_in(struct segment *s);                           /* [elements] */
uint8_t *segment_ops(struct segment *s);                        /* [chunks], enum sync_op */
float *segment_out(struct segment *s, enum segment_out which);  /* [elements] */
uint32_t segment_chunks(const struct segment *s); /* elements over chunk_elements, up */

#endif
