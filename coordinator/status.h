/* status.h - what a run looks like right now, as JSON and as text for people. */
#ifndef INTELLECT_COORDINATOR_STATUS_H
#define INTELLECT_COORDINATOR_STATUS_H

#include <jansson.h>
#include <stdio.h>

#include "coordinator/core.h"
#include "coordinator/store.h"

/* A new core with everything the store holds, not yet started. genesis_bytes receives what the
 * caller frees after the core. own_key: as for core_create(). */
struct core *status_load(struct store *s, const struct proto_key *own_key, struct digest *run,
                         struct err *err);

/* {"run", "name", "serving", "term", "round", "phase", "members": [...], ...}; the caller owns it. */
json_t *status_json(const struct core *c, uint64_t now_ms, const struct msg_genesis *genesis,
                    const struct digest *run, bool serving);
void status_print(const json_t *status, FILE *out);

#endif
