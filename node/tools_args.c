/* tools_args.c - numbers on a command line; see tools_args.h. */
#include "node/tools_args.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

int args_integer(const char *flag, const char *text, uint64_t min, uint64_t max, uint64_t *out) {
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (*text >= '0' && *text <= '9' && !*end && !errno && value >= min && value <= max) {
        *out = value;
        return 0;
    }
    fprintf(stderr, "%s is '%s'; allowed are whole numbers from %llu to %llu\n", flag, text,
            (unsigned long long)min, (unsigned long long)max);
    return -1;
}

int args_real(const char *flag, const char *text, double min, double max, double *out) {
    char *end;
    double value = strtod(text, &end);
    if (end != text && !*end && value >= min && value <= max) {
        *out = value;
        return 0;
    }
    fprintf(stderr, "%s is '%s'; allowed are numbers from %g to %g\n", flag, text, min, max);
    return -1;
}

int args_failed(const char *name, const struct err *err) {
    fprintf(stderr, "%s: %s\n", name, err->msg);
    return 1;
}

int args_wrong(const char *name, const char *what) {
    fprintf(stderr, "%s: %s; see %s --help\n", name, what, name);
    return 2;
}
