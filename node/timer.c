/* timer.c - the monotonic clock and one-shot timers; see timer.h. */
#include "node/timer.h"

#include <event2/event.h>
#include <time.h>

uint64_t timer_now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

void timer_set(struct event *ev, uint64_t ms) {
    struct timeval tv = { .tv_sec = (time_t)(ms / 1000),
                          .tv_usec = (suseconds_t)(ms % 1000 * 1000) };
    event_add(ev, &tv);
}
