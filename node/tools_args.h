/* tools_args.h - numbers, names, devices and invites on a command line. Each function prints what is wrong with
 * flag, value and what is allowed to stderr and returns -1, or returns 0. */
#ifndef INTELLECT_NODE_TOOLS_ARGS_H
#define INTELLECT_NODE_TOOLS_ARGS_H

#include "node/device.h"
#include "proto/err.h"

#include <stdint.h>

int args_integer(const char *flag, const char *text, uint64_t min, uint64_t max, uint64_t *out);
int args_device(const char *text, struct device *out); /* of --device */
int args_real(const char *flag, const char *text, double min, double max, double *out);

/* An invite as given: the line, "-" (standard input) or "@FILE". ERR_CONFIG; nothing is printed. */
struct invite;
int args_invite(const char *text, struct invite *out, struct err *err);

/* One of the names that name(0), name(1), ... are, up to NULL. */
int args_name(const char *flag, const char *text, const char *(*name)(int), int *out);

/* "intellect-node NAME: message" to stderr; returns 1, the exit code. */
int args_failed(const char *name, const struct err *err);

/* "intellect-node NAME: what; see intellect-node NAME --help" to stderr; returns 2, the exit code of wrong use. */
int args_wrong(const char *name, const char *what);

/* Likewise, of the option that getopt_long has just refused. */
int args_unknown(const char *name, char **argv);

#endif
