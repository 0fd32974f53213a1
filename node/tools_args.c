/* tools_args.c - numbers, names, devices and invites on a command line; see tools_args.h. */
#include "node/tools_args.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/proto.h"

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

int args_device(const char *text, struct device *out) {
    struct err err;
    if (!device_parse(text, out, &err)) return 0;
    fprintf(stderr, "%s\n", err.msg);
    return -1;
}

static int read_line(FILE *in, const char *what, char out[INVITE_BYTES_MAX], struct err *err) {
    if (fgets(out, INVITE_BYTES_MAX, in)) return 0;
    return ferror(in) ? err_set_errno(err, "%s", what)
                      : err_set(err, ERR_CONFIG, "%s: there is no invite in it", what);
}

int args_invite(const char *text, struct invite *out, struct err *err) {
    char line[INVITE_BYTES_MAX];
    int rc = 0;
    if (!strcmp(text, "-")) {
        rc = read_line(stdin, "standard input", line, err);
    } else if (text[0] == '@') {
        FILE *f = fopen(text + 1, "re");
        if (!f) return err_set_errno(err, "%s", text + 1);
        rc = read_line(f, text + 1, line, err);
        fclose(f);
    } else if (strlen(text) >= sizeof line) {
        return err_set(err, ERR_CONFIG, "the invite is too long");
    } else {
        snprintf(line, sizeof line, "%s", text);
    }
    if (rc) return -1;
    line[strcspn(line, "\r\n")] = 0;
    return invite_parse(line, out, err);
}

int args_name(const char *flag, const char *text, const char *(*name)(int), int *out) {
    for (int i = 0; name(i); i++)
        if (!strcmp(text, name(i))) {
            *out = i;
            return 0;
        }
    fprintf(stderr, "%s is '%s'; allowed are", flag, text);
    for (int i = 0; name(i); i++) fprintf(stderr, "%s %s", i ? "," : "", name(i));
    fputc('\n', stderr);
    return -1;
}

int args_failed(const char *name, const struct err *err) {
    fprintf(stderr, "intellect-node %s: %s\n", name, err->msg);
    return 1;
}

int args_wrong(const char *name, const char *what) {
    fprintf(stderr, "intellect-node %s: %s; see intellect-node %s --help\n", name, what, name);
    return 2;
}

int args_unknown(const char *name, char **argv) {
    char what[160];
    const char *option = argv[optind - 1];
    if (option[0] != '-') option = argv[optind]; /* within a cluster of short ones */
    snprintf(what, sizeof what, "%.100s is no option here, or wants a value", option ? option : "that");
    return args_wrong(name, what);
}
