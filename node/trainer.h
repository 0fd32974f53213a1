/* trainer.h - the trainer process: owns one device (device.h), trains on the samples it is given, and moves
 * parameters through the segment at step boundaries. Everything it does is asked for by its agent;
 * it knows no run state, no network and no other trainer, and it dies with its agent.
 *
 * An inner step takes inner.batch samples. Fewer are trained only when a FREEZE finds some left
 * over or no more came for TRAINER_PARTIAL_S, so that the end of the data is used too.
 *
 * It may be several rank processes (mesh.h): rank 0 alone speaks with the agent, and tells the others what
 * to do before it does it itself, so that all do the same in the same order. Each reads its own samples and
 * moves its own part of the parameters to and from the slots. When one dies or fails, all end.
 *
 * Moments and counters are saved to setup.inner_state between two steps every TRAINER_SAVE_S
 * seconds, written by a thread while training goes on, and at the end. A new trainer starts from
 * them; its parameters come with the first RESET. */
#ifndef INTELLECT_NODE_TRAINER_H
#define INTELLECT_NODE_TRAINER_H

#define TRAINER_PARTIAL_S 1
#define TRAINER_SAVE_S 30

/* A step whose loss or gradient is not finite is skipped, its samples with it; so many in a row are
 * the end of the trainer. */
#define TRAINER_BAD_STEPS_MAX 8

/* What this member computes in. The run's state is fp32 whatever its members choose: bf16 keeps the rest
 * of every weight beside it, so nothing of an update or of a new anchor is lost; bf16-stochastic keeps
 * half of the bytes, and rounds both. */
enum trainer_precision { TRAINER_FP32 = 0, TRAINER_BF16 = 1, TRAINER_BF16_STOCHASTIC = 2 };

/* "fp32", "bf16", "bf16-stochastic", or NULL past the last. */
const char *trainer_precision_name(int precision);

/* The trainer's main: serves the segment behind descriptor `fd` (segment.h) until told to stop.
 * Returns the exit status: 0, 1 (it said why through the segment), 2 (`fd` is no segment). */
int trainer_main(int fd);

#endif
