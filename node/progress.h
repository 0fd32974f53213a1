/* progress.h - one line on the terminal while a tool works: how far it is, how fast, how long still. */
#ifndef INTELLECT_NODE_PROGRESS_H
#define INTELLECT_NODE_PROGRESS_H

#include <stdint.h>

struct progress {
    uint64_t begun_ms, shown_ms; /* zero to begin with */
};

/* Redraw the line, a few times a second at most, where stderr is a terminal. May be called as often as one
 * likes.
 *
 * done, total  bytes; the time left follows from
 * read         bytes that were worked on since the first call: done may have a head start.
 * what         stands at the end of the line. */
void progress_show(struct progress *p, uint64_t done, uint64_t total, uint64_t read, const char *what);

/* Wipe the line. */
void progress_end(void);

/* Since the first call, never 0. */
double progress_seconds(const struct progress *p);

#endif
