/* schedule.c - warm-up, and what follows it; see schedule.h. */
#include "node/schedule.h"

#include <math.h>

static double warmup(const struct msg_inner *in, uint64_t tokens) {
    if (tokens >= in->warmup_tokens) return 1;
    double done = (double)tokens / (double)in->warmup_tokens;
    return SCHEDULE_WARMUP_FLOOR + (1 - SCHEDULE_WARMUP_FLOOR) * done;
}

static double cosine(const struct msg_inner *in, uint64_t tokens) {
    if (!in->total_tokens) return 1;
    if (tokens >= in->total_tokens) return SCHEDULE_END_FLOOR;
    if (tokens <= in->warmup_tokens) return 1;
    double done = (double)(tokens - in->warmup_tokens) / (double)(in->total_tokens - in->warmup_tokens);
    return fmax((1 + cos(M_PI * done)) / 2, SCHEDULE_END_FLOOR);
}

static double decay(const struct msg_inner *in, uint64_t tokens) {
    if (in->schedule == SCHEDULE_CONSTANT) return 1;
    if (in->schedule == SCHEDULE_COSINE) return cosine(in, tokens);
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
