/* cmd_status.c - `intellect-coordinator status`: live from the serving process, else from the store. */
#include <stdlib.h>
#include <string.h>

#include "coordinator/commands.h"
#include "coordinator/control.h"
#include "coordinator/status.h"

static const char help[] =
    "intellect-coordinator status DIR [--json]\n"
    "\n"
    "What the run in DIR is doing: phase, round, tokens, members. While nobody serves it, what the\n"
    "store remembers.\n"
    "\n"
    "  --json   one JSON object\n"
    "\n"
    "example: intellect-coordinator status myrun\n";

enum { JSON = 256 };
static const struct option options[] = { { "json", no_argument, NULL, JSON }, { 0 } };

static int take(void *arg, int option, const char *value) {
    (void)option;
    (void)value;
    *(bool *)arg = true;
    return 0;
}

static json_t *from_store(const struct run *run, struct err *err) {
    struct core *core = run_core(run, err);
    if (!core) return NULL;
    json_t *status = status_json(core, 0, run, false);
    uint64_t term;
    if (status && store_term(run->store, &term, NULL) == 0)
        json_object_set_new(status, "term", json_integer((json_int_t)term));
    if (!status) err_set(err, ERR_MEMORY, "no memory for a status");
    core_destroy(core);
    return status;
}

static json_t *ask(const char *dir, struct err *err) {
    struct run run;
    struct err why;
    if (run_open(&run, dir, err)) return NULL;
    json_t *status = control_ask(run.dir, NULL, &why);
    if (!status && why.code != ERR_NOT_FOUND)
        fprintf(stderr, "intellect-coordinator: %s; this is what the store says\n", why.msg);
    if (!status) status = from_store(&run, err);
    run_release(&run);
    return status;
}

int coordinator_status(int argc, char **argv) {
    bool json = false;
    struct command_line line = { help, options, take, &json };
    struct err err;
    const char *dir;
    int code;
    if (!command_line_parse(&line, argc, argv, &dir, &code)) return code;
    json_t *status = ask(dir, &err);
    if (!status) return coordinator_failed(&err);
    if (json) {
        json_dumpf(status, stdout, JSON_INDENT(2));
        putchar('\n');
    } else {
        status_print(status, stdout);
    }
    json_decref(status);
    return 0;
}
