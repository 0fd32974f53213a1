/* schedule.c - warm-up, stable, decay; see schedule.h. */
#include "node/schedule.h"

#include <math.h>

static double warmup(const struct msg_inner *in, uint64_t tokens) {
    if (tokens >= in->warmup_tokens) return 1;
    double done = (double)tokens / (double)in->warmup_tokens;
    return SCHEDULE_WARMUP_FLOOR + (1 - SCHEDULE_WARMUP_FLOOR) * done;
}

static double decay(const struct msg_inner *in, uint64_t tokens) {
    if (!in->total_tokens || !in->decay_tokens) return 1;
    if (tokens >= in->total_tokens) return SCHEDULE_END_FLOOR;
    uint64_t left = in->total_tokens - tokens;
    if (left >= in->decay_tokens) return 1;
    double done = (double)(in->decay_tokens - left) / (double)in->decay_tokens;
    return fmax(1 - sqrt(done), SCHEDULE_END_FLOOR);
}

double schedule_lr(const struct msg_inner *inner, uint64_t tokens) {
    return inner->lr * fmin(warmup(inner, tokens), decay(inner, tokens));
}
