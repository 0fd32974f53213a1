/* cmd_invite.c - `intellect-coordinator invite`: draws a secret, keeps its digest, prints the line. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/address.h"
#include "coordinator/commands.h"
#include "coordinator/control.h"
#include "coordinator/run.h"

#define USES_MAX 1000000
#define EXPIRES_SECONDS_MAX (10ull * 365 * 86400)

static const char help[] =
    "intellect-coordinator invite DIR [options]\n"
    "\n"
    "Print one line to hand to a contributor. Whoever has it can join, so send it over a channel you\n"
    "trust; the run keeps a digest of its secret only. A use binds it to the key of the node that\n"
    "used it. Works while the run is served and while it is not.\n"
    "\n"
    "  --uses N             how many nodes may join with it (default: 1)\n"
    "  --expires TIME       from now, like 30m, 12h or 7d (default: 7d)\n"
    "  --address HOST:PORT  where that machine reaches us (default: serve.address in run.yaml)\n"
    "\n"
    "example: intellect-coordinator invite myrun --uses 8 --expires 2d > invite.txt\n"
    "         and there: intellect-node join @invite.txt\n";

struct invite_options {
    const char *command, *address;
    uint32_t uses;
    uint64_t seconds;
};
enum { USES = 256, EXPIRES, ADDRESS };
static const struct option options[] = {
    { "uses", required_argument, NULL, USES },
    { "expires", required_argument, NULL, EXPIRES },
    { "address", required_argument, NULL, ADDRESS },
    { 0 },
};

static bool parse_whole(const char *text, size_t digits, uint64_t max, uint64_t *out) {
    if (!digits || digits > 12) return false;
    *out = strtoull(text, NULL, 10);
    return *out >= 1 && *out <= max;
}

/* "90s", "30m", "12h", "7d" */
static bool parse_time(const char *text, uint64_t *seconds) {
    static const char units[] = "smhd";
    static const uint64_t factor[] = { 1, 60, 3600, 86400 };
    size_t digits = strspn(text, "0123456789");
    const char *unit = text[digits] ? strchr(units, text[digits]) : NULL;
    if (!unit || text[digits + 1]) return false;
    if (!parse_whole(text, digits, EXPIRES_SECONDS_MAX, seconds)) return false;
    *seconds *= factor[unit - units];
    return *seconds <= EXPIRES_SECONDS_MAX;
}

static int take(void *arg, int option, const char *value) {
    struct invite_options *o = arg;
    uint64_t uses;
    switch (option) {
    case USES:
        if (value[strspn(value, "0123456789")] ||
            !parse_whole(value, strlen(value), USES_MAX, &uses)) {
            coordinator_misused(o->command, "--uses is '%.40s'; allowed are whole numbers from 1 to %d",
                                value, USES_MAX);
            return -1;
        }
        o->uses = (uint32_t)uses;
        return 0;
    case EXPIRES:
        if (parse_time(value, &o->seconds)) return 0;
        coordinator_misused(o->command, "--expires is '%.40s'; allowed are times like 30m, 12h and 7d",
                            value);
        return -1;
    default: o->address = value; return 0;
    }
}

/* Where the serving process says it is found; it may have been told otherwise than run.yaml. */
static bool address_of_serving(const struct run *run, struct address *out) {
    struct err ignored;
    json_t *status = control_ask(run->dir, NULL, &ignored);
    const char *text = json_string_value(json_object_get(status, "address"));
    bool found = text && address_split(text, false, out, &ignored) == 0;
    json_decref(status);
    return found;
}

static int find_address(const struct run *run, const char *given, struct address *out,
                        struct err *err) {
    struct settings settings;
    struct address listen;
    bool serving = address_of_serving(run, &listen);
    if (!serving && (run_settings(run, &settings, err) ||
                     address_split(settings.listen, false, &listen, err)))
        return -1;
    if (address_for_others(&listen, given ? given : serving ? "" : settings.address, out, err))
        return -1;
    if (out->port) return 0;
    return err_set(err, ERR_CONFIG, "the port is not known while nobody serves the run (serve.listen "
                   "has port 0): give --address HOST:PORT");
}

static void explain(const struct invite_options *o, const struct address *a, uint64_t expires_ms) {
    char when[40], address[ADDRESS_TEXT_BYTES];
    time_t seconds = (time_t)(expires_ms / 1000);
    struct tm utc;
    gmtime_r(&seconds, &utc);
    strftime(when, sizeof when, "%Y-%m-%d %H:%M UTC", &utc);
    address_format(a, address);
    fprintf(stderr, "for %u node%s, until %s, to join at %s\n", o->uses, o->uses == 1 ? "" : "s", when,
            address);
    if (address_is_loopback(a->host))
        fprintf(stderr, "%s is only for nodes on this machine; for others give --address or set "
                "serve.address\n", a->host);
}

static int make_invite(const char *dir, const struct invite_options *o, struct err *err) {
    struct run run;
    struct address address;
    struct msg_invite_record record;
    char line[INVITE_BYTES_MAX];
    struct timespec now;
    int result = -1;
    if (run_open(&run, dir, err)) return -1;
    struct invite invite = { .run = run.id };
    clock_gettime(CLOCK_REALTIME, &now);
    store_invite_make(o->uses, ((uint64_t)now.tv_sec + o->seconds) * 1000, false, &invite.secret,
                      &record);
    if (find_address(&run, o->address, &address, err)) goto out;
    memcpy(invite.host, address.host, sizeof invite.host);
    invite.port = address.port;
    if (invite_format(&invite, line, err) || store_invite_add(run.store, &record, err)) goto out;
    explain(o, &address, record.expires_ms);
    puts(line);
    result = 0;
out:
    run_release(&run);
    return result;
}

int coordinator_invite(int argc, char **argv) {
    struct invite_options o = { .command = argv[0], .uses = 1, .seconds = 7 * 86400 };
    struct command_line line = { help, options, take, &o };
    struct err err;
    const char *dir;
    int code;
    if (!command_line_parse(&line, argc, argv, &dir, &code)) return code;
    return make_invite(dir, &o, &err) ? coordinator_failed(&err) : 0;
}
