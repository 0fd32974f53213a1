/* server.h - the thin shell around the core: sockets, clock, store and signatures. It feeds the
 * core with events, one at a time, and carries its actions out in order. */
#ifndef INTELLECT_COORDINATOR_SERVER_H
#define INTELLECT_COORDINATOR_SERVER_H

#include <stdbool.h>

#include "coordinator/settings.h"
#include "coordinator/store.h"

#define SERVER_CONTROL_NAME "control.sock"  /* below the run's folder, mode 0600 */

struct server_config {
    const char *dir;                 /* the run's folder, absolute */
    const struct settings *settings; /* resolved */
    const char *listen;              /* overrides settings->listen; NULL = that */
    bool aggregator;                 /* start the aggregate-only node beside us */
};

/* Serve the run until SIGINT or SIGTERM (0), or until something is wrong: -1 with ERR_STALE
 * (another coordinator took the store over), ERR_IO (port in use, disk), ERR_CORRUPT (the store),
 * ERR_FULL. A second signal ends the process at once. */
int server_run(const struct server_config *config, struct err *err);

#endif
