/* cmd_operate.c - `intellect-coordinator pause`, `resume`, `revoke` and `release`. */
#include <stdio.h>
#include <string.h>

#include "coordinator/commands.h"
#include "coordinator/operate.h"

static const char help[] =
    "intellect-coordinator pause DIR\n"
    "intellect-coordinator resume DIR\n"
    "intellect-coordinator revoke DIR --member NODE [--reason TEXT]\n"
    "intellect-coordinator release DIR --member NODE [--reason TEXT]\n"
    "\n"
    "pause    hand out no more data and begin no new outer step; what is in work is finished, members\n"
    "         stay connected and train on what they have. Lasts over restarts, until resume.\n"
    "revoke   a member is out for good: its key leaves the roster, its connection is closed, its data\n"
    "         goes to others. An entry of the ledger, so nothing takes it back; the same machine may\n"
    "         join again under a new key with a new invite.\n"
    "release  a member that was put into quarantine, because its own signature proves that it sent or\n"
    "         summed something wrong, may take part again.\n"
    "\n"
    "  --member NODE  its number or its name, as `intellect-coordinator status` shows them\n"
    "  --reason TEXT  goes into the ledger, which everybody reads\n"
    "\n"
    "All work while the run is served and while it is not.\n"
    "\n"
    "example: intellect-coordinator pause myrun\n"
    "example: intellect-coordinator resume myrun\n"
    "example: intellect-coordinator revoke myrun --member 7 --reason 'its owner asked'\n"
    "example: intellect-coordinator release myrun --member 7 --reason 'its memory was replaced'\n";

enum { MEMBER = 256, REASON };
static const struct option options[] = {
    { "member", required_argument, NULL, MEMBER },
    { "reason", required_argument, NULL, REASON },
    { 0 },
};

static int take(void *arg, int option, const char *value) {
    struct order *o = arg;
    if (option == MEMBER) o->member = value;
    if (option == REASON) o->reason = value;
    return 0;
}

int coordinator_operate(int argc, char **argv) {
    struct order order = { .what = argv[0] };
    struct command_line line = { help, options, take, &order };
    struct err err;
    char text[512];
    const char *dir;
    int code;
    bool about_member = !strcmp(argv[0], "revoke") || !strcmp(argv[0], "release");
    if (!command_line_parse(&line, argc, argv, &dir, &code)) return code;
    if (about_member && !order.member)
        return coordinator_misused(argv[0], "say whom: --member NUMBER or --member NAME");
    if (!about_member && (order.member || order.reason))
        return coordinator_misused(argv[0], "it is about the whole run: no --member, no --reason");
    if (operate(dir, &order, text, sizeof text, &err)) return coordinator_failed(&err);
    puts(text);
    return 0;
}
