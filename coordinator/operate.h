/* operate.h - what an operator tells a run while it goes on: pause, resume, revoke, release. The
 * serving process is asked where there is one; else the run is opened under a new term, told, and
 * closed, and whoever serves it next knows. */
#ifndef INTELLECT_COORDINATOR_OPERATE_H
#define INTELLECT_COORDINATOR_OPERATE_H

#include <jansson.h>

#include "coordinator/run.h"

struct order {
    const char *what;   /* "pause", "resume", "revoke", "release" */
    const char *member; /* id or name; NULL where the order is about none */
    const char *reason; /* NULL: none given */
};

/* The run at `dir` does it: 0, with a sentence for people in text[size]. ERR_NOT_FOUND names the
 * members there are; ERR_REFUSED: nothing to do, and why. */
int operate(const char *dir, const struct order *order, char *text, size_t size, struct err *err);

/* For the serving process: the event for a request that came over the control socket, which it
 * borrows from; *text receives the sentence. ERR_* as above, nothing has changed then. */
int operate_event(const struct core *core, const json_t *request, struct core_event *ev, char *text,
                  size_t size, struct err *err);

#endif
