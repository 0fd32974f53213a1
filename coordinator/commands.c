/* commands.c - what the commands share: parsing a command line, and ending badly. */
#include "coordinator/commands.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define OPTIONS_MAX 16
#define OPTION_HELP 'h'

int coordinator_failed(const struct err *err) {
    fprintf(stderr, "intellect-coordinator: %s\n", err->msg);
    return err->code == ERR_CONFIG ? 2 : 1;
}

int coordinator_misused(const char *command, const char *format, ...) {
    char text[256];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    fprintf(stderr, "intellect-coordinator %s: %s; see intellect-coordinator %s --help\n", command,
            text, command);
    return 2;
}

static size_t add_help(const struct option *options, struct option *all) {
    size_t n = 0;
    for (; options && options[n].name; n++) all[n] = options[n];
    assert(n + 2 <= OPTIONS_MAX);
    all[n++] = (struct option){ "help", no_argument, NULL, OPTION_HELP };
    all[n] = (struct option){ 0 };
    return n;
}

bool command_line_parse(const struct command_line *c, int argc, char **argv, const char **dir,
                        int *exit_code) {
    struct option all[OPTIONS_MAX];
    const char *command = argv[0];
    add_help(c->options, all);
    optind = 1;
    *exit_code = 2;
    for (int o; (o = getopt_long(argc, argv, ":h", all, NULL)) != -1;) {
        if (o == OPTION_HELP) {
            fputs(c->help, stdout);
            *exit_code = 0;
            return false;
        }
        if (o == ':') coordinator_misused(command, "%s wants a value", argv[optind - 1]);
        if (o == '?') coordinator_misused(command, "unknown option %s", argv[optind - 1]);
        if (o == ':' || o == '?' || c->take(c->arg, o, optarg)) return false;
    }
    if (argc - optind != 1) {
        if (optind == argc) coordinator_misused(command, "the run's folder is missing");
        else coordinator_misused(command, "'%s' is one argument too many", argv[optind + 1]);
        return false;
    }
    *dir = argv[optind];
    return true;
}
