/* server.h - the thin shell around the core: sockets, clock, store and signatures. It feeds the
 * core with events, one at a time, and carries its actions out in order. */
#ifndef INTELLECT_COORDINATOR_SERVER_H
#define INTELLECT_COORDINATOR_SERVER_H

#include <stdbool.h>

#include "coordinator/run.h"

struct server_config {
    struct run *run;                 /* open */
    const struct settings *settings; /* run_settings() */
    const char *listen;              /* HOST:PORT in place of serve.listen; NULL = that. Port 0 = any */
    bool aggregator;                 /* start the aggregate-only node beside us */
};

/* Serve the run until SIGINT or SIGTERM (0), or until something is wrong: -1 with ERR_STALE
 * (another coordinator took the store over), ERR_REFUSED (this process' folder is served already),
 * ERR_IO (port in use, disk), ERR_CORRUPT (the store), ERR_FULL. A second signal ends the process
 * at once. Logs through log.h. */
int server_run(const struct server_config *config, struct err *err);

#endif
