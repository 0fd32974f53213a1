/* commands.h - the commands of intellect-coordinator, as main.c calls them. Each parses its own
 * arguments (argv[0] is its name; --help teaches), prints results to stdout and explanations to
 * stderr, and returns the exit code: 0, 1 (failed), 2 (wrong use). */
#ifndef INTELLECT_COORDINATOR_COMMANDS_H
#define INTELLECT_COORDINATOR_COMMANDS_H

#include <getopt.h>
#include <stdbool.h>

#include "proto/err.h"

int coordinator_init(int argc, char **argv);
int coordinator_serve(int argc, char **argv);
int coordinator_invite(int argc, char **argv);
int coordinator_status(int argc, char **argv);
int coordinator_ledger(int argc, char **argv);
int coordinator_rotate(int argc, char **argv);
int coordinator_rewind(int argc, char **argv);
int coordinator_checkpoints(int argc, char **argv);
int coordinator_operate(int argc, char **argv); /* pause, resume, revoke, release */

/* ---- what they share (commands.c) -------------------------------------------------------------- */

/* "intellect-coordinator: TEXT" on stderr. Returns 2 for ERR_CONFIG, which a person wrote, else 1. */
int coordinator_failed(const struct err *err);

/* Likewise, with a hint at --help of the command; returns 2. */
int coordinator_misused(const char *command, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Options first, then one folder. take is called for each option but --help.
 *
 * options  as for getopt_long, without --help; each has its own `val` from 256 on.
 * take     puts optarg where it belongs; returns 0, or -1 after coordinator_misused().
 *
 * Returns true to go on, with *dir; or false with *exit_code (also after --help). */
struct command_line {
    const char *help;
    const struct option *options;
    int (*take)(void *arg, int option, const char *value);
    void *arg;
};
bool command_line_parse(const struct command_line *c, int argc, char **argv, const char **dir,
                        int *exit_code);

#endif
