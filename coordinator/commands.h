/* commands.h - the commands of intellect-coordinator, as main.c calls them. Each parses its own
 * arguments (argv[0] is its name; --help teaches), prints results to stdout and explanations to
 * stderr, and returns the exit code: 0, 1 (failed), 2 (wrong use). */
#ifndef INTELLECT_COORDINATOR_COMMANDS_H
#define INTELLECT_COORDINATOR_COMMANDS_H

#include "proto/err.h"

int coordinator_init(int argc, char **argv);
int coordinator_serve(int argc, char **argv);
int coordinator_invite(int argc, char **argv);
int coordinator_status(int argc, char **argv);
int coordinator_ledger(int argc, char **argv);

/* "intellect-coordinator: TEXT" on stderr; returns 1. */
int coordinator_failed(const struct err *err);
/* Likewise, with a hint at --help of the command; returns 2. */
int coordinator_misused(const char *command, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

#endif
