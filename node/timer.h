/* timer.h - milliseconds for what runs on an event loop: the monotonic clock, which no person sets,
 * and one-shot timers. */
#ifndef INTELLECT_NODE_TIMER_H
#define INTELLECT_NODE_TIMER_H

#include <stdint.h>

struct event;

/* Milliseconds since some moment before this process began. */
uint64_t timer_now_ms(void);

/* A turn of a loop, from timer_turn() on: how long it took, and how much of that this thread worked. For the
 * rest it waited, for a processor, a lock or a disk. */
struct timer_turn {
    uint64_t us, worked_us;
};
struct timer_turn timer_turn(void);
struct timer_turn timer_turn_end(const struct timer_turn *begun);

/* Let `ev` fire in `ms` milliseconds, once; 0 = in the next turn of its loop. Moves a timer that
 * runs already. */
void timer_set(struct event *ev, uint64_t ms);

#endif
