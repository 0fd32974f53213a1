/* timer.c - the monotonic clock and one-shot timers; see timer.h. */
#include "node/timer.h"

#include <event2/event.h>
#include <time.h>

static uint64_t now_us(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

uint64_t timer_now_ms(void) { return now_us(CLOCK_MONOTONIC) / 1000; }

struct timer_turn timer_turn(void) {
    return (struct timer_turn){now_us(CLOCK_MONOTONIC), now_us(CLOCK_THREAD_CPUTIME_ID)};
}

struct timer_turn timer_turn_end(const struct timer_turn *begun) {
    struct timer_turn now = timer_turn();
    return (struct timer_turn){now.us - begun->us, now.worked_us - begun->worked_us};
}

void timer_set(struct event *ev, uint64_t ms) {
    struct timeval tv = { .tv_sec = (time_t)(ms / 1000),
                          .tv_usec = (suseconds_t)(ms % 1000 * 1000) };
    event_add(ev, &tv);
}
