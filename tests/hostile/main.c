/* main.c - `hostile [--from ADDRESS] [--identity FILE] HOST PORT ATTACK [ARGUMENT]`; see hostile.h. */
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/hostile/hostile.h"

static const struct attack *const lists[] = {stranger_attacks, frame_attacks, member_attacks, contribution_attacks};

int verdict(const struct attack *a, bool ok, const char *format, ...) {
    va_list ap;
    printf("%s: ", a->name);
    va_start(ap, format);
    vprintf(format, ap);
    va_end(ap);
    printf("%s\n", ok ? "" : "  <- not as it should be");
    return ok ? 0 : 1;
}

static const struct attack *find(const char *name) {
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++)
        for (const struct attack *a = lists[i]; a->name; a++)
            if (!strcmp(a->name, name)) return a;
    return NULL;
}

static int misuse(void) {
    fprintf(stderr, "hostile [--from ADDRESS] [--identity FILE] HOST PORT ATTACK [ARGUMENT]\nattacks:");
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++)
        for (const struct attack *a = lists[i]; a->name; a++) fprintf(stderr, " %s", a->name);
    fprintf(stderr, "\n");
    return 2;
}

/* A new one each time unless it is kept in a file, which is made when it is not there. */
static int take_identity(struct identity *id, const char *path, struct err *err) {
    struct err none;
    if (path && !identity_load(id, path, &none)) return 0;
    identity_create(id);
    return path ? identity_save(id, path, err) : 0;
}

int main(int argc, char **argv) {
    struct target t = {.from = "127.0.0.66"};
    const char *identity = NULL;
    struct err err;
    int i = 1;
    for (; i + 1 < argc && !strncmp(argv[i], "--", 2); i += 2) {
        if (!strcmp(argv[i], "--from")) t.from = argv[i + 1];
        else if (!strcmp(argv[i], "--identity")) identity = argv[i + 1];
        else return misuse();
    }
    if (argc - i < 3 || argc - i > 4) return misuse();
    const struct attack *a = find(argv[i + 2]);
    if (!a) return misuse();
    t.host = argv[i];
    t.port = (uint16_t)strtoul(argv[i + 1], NULL, 10);
    t.argument = argv[i + 3]; /* or argv's NULL */
    setvbuf(stdout, NULL, _IOLBF, 0);
    signal(SIGPIPE, SIG_IGN);
    if (proto_init(&err) || take_identity(&t.id, identity, &err)) {
        fprintf(stderr, "hostile: %s\n", err.msg);
        return 2;
    }
    int rc = a->run(&t, a);
    identity_release(&t.id);
    return rc;
}
