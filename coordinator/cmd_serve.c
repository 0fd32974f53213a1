/* cmd_serve.c - `intellect-coordinator serve`. */
#include <string.h>

#include "coordinator/commands.h"
#include "coordinator/log.h"
#include "coordinator/server.h"

static const char help[] =
    "intellect-coordinator serve DIR [options]\n"
    "\n"
    "Coordinate the run in DIR until Ctrl-C; a second one quits at once. Beside itself it starts an\n"
    "intellect-node that only aggregates. Stopping, crashing and starting again loses nothing: members\n"
    "go on training meanwhile and come back by themselves.\n"
    "\n"
    "  --listen HOST:PORT   in place of serve.listen in run.yaml\n"
    "  --log-json           one JSON object a line\n"
    "  --no-aggregator      do not start the aggregate-only node: members must then reach each other\n"
    "\n"
    "example: intellect-coordinator serve myrun --listen 0.0.0.0:7171\n";

struct serve_options {
    const char *listen;
    bool log_json, no_aggregator;
};
enum { LISTEN = 256, LOG_JSON, NO_AGGREGATOR };
static const struct option options[] = {
    { "listen", required_argument, NULL, LISTEN },
    { "log-json", no_argument, NULL, LOG_JSON },
    { "no-aggregator", no_argument, NULL, NO_AGGREGATOR },
    { 0 },
};

static int take(void *arg, int option, const char *value) {
    struct serve_options *o = arg;
    if (option == LISTEN) o->listen = value;
    if (option == LOG_JSON) o->log_json = true;
    if (option == NO_AGGREGATOR) o->no_aggregator = true;
    return 0;
}

int coordinator_serve(int argc, char **argv) {
    struct serve_options o = { 0 };
    struct command_line line = { help, options, take, &o };
    struct settings settings;
    struct run run;
    struct err err;
    const char *dir;
    int code;
    if (!command_line_parse(&line, argc, argv, &dir, &code)) return code;
    log_open(o.log_json);
    if (run_open(&run, dir, &err)) return coordinator_failed(&err);
    struct server_config config = { &run, &settings, o.listen, !o.no_aggregator };
    int failed = run_settings(&run, &settings, &err) || server_run(&config, &err);
    run_release(&run);
    return failed ? coordinator_failed(&err) : 0;
}
