/* status.h - what a run looks like right now, as JSON and as text for people. */
#ifndef INTELLECT_COORDINATOR_STATUS_H
#define INTELLECT_COORDINATOR_STATUS_H

#include <jansson.h>
#include <stdio.h>

#include "coordinator/run.h"

/* {"run", "name", "serving", "term", "round", "phase", "members": [...], ...}; the caller owns it,
 * NULL when there is no memory. serving: the core is started, and its members are connected or not;
 * otherwise it holds what the store says. */
json_t *status_json(const struct core *c, uint64_t now_ms, const struct run *run, bool serving);
void status_print(const json_t *status, FILE *out);

#endif
