/* schedule.h - the learning rate as a function of the run's committed tokens: warm-up, then what
 * inner.schedule says. No state: every member at the same position has the same rate, whenever it joined. */
#ifndef INTELLECT_NODE_SCHEDULE_H
#define INTELLECT_NODE_SCHEDULE_H

#include "proto/messages.h"

#include <stdint.h>

/* The rate at position `tokens`. With w = warmup_tokens, d = decay_tokens, n = total_tokens:
 *
 *   tokens < w            lr * (SCHEDULE_WARMUP_FLOOR + (1 - SCHEDULE_WARMUP_FLOOR) * tokens / w)
 *
 * wsd (warm-up, stable, decay, arXiv:2404.06395, with the 1-sqrt decay of arXiv:2405.18392):
 *   w <= tokens < n - d   lr
 *   n - d <= tokens < n   lr * max(1 - sqrt((tokens - (n - d)) / d), SCHEDULE_END_FLOOR)
 *   tokens >= n           lr * SCHEDULE_END_FLOOR (lr where d = 0)
 * cosine (arXiv:1608.03983, without restarts; d does not count):
 *   w <= tokens < n       lr * max((1 + cos(pi * (tokens - w) / (n - w))) / 2, SCHEDULE_END_FLOOR)
 *   tokens >= n           lr * SCHEDULE_END_FLOOR
 * constant:
 *   w <= tokens           lr
 *
 * Where warm-up and decay overlap the smaller rate counts. The floor of the warm-up is there
 * because position moves only when a round commits: from zero, the whole first round would train
 * at a rate of zero. n = 0 means no end: constant after the warm-up. */
#define SCHEDULE_WARMUP_FLOOR 0.1
#define SCHEDULE_END_FLOOR 0.01
double schedule_lr(const struct msg_inner *inner, uint64_t tokens);

#endif
