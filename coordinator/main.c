/* main.c - the command line of intellect-coordinator: which command. Each parses its own options. */
#include <stdio.h>
#include <string.h>

#include "coordinator/commands.h"
#include "proto/proto.h"

#ifndef INTELLECT_VERSION
#define INTELLECT_VERSION "unknown" /* the Makefile knows */
#endif

static const struct command {
    const char *name, *help;
    int (*run)(int argc, char **argv);
} commands[] = {
    { "init", "make a run: its folder, settings, keys and genesis", coordinator_init },
    { "serve", "coordinate the run", coordinator_serve },
    { "invite", "make an invite: one line to hand to a contributor", coordinator_invite },
    { "status", "what the run is doing", coordinator_status },
    { "ledger", "check the run's ledger, or show it", coordinator_ledger },
    { "pause", "hand out no more data, begin no new outer step", coordinator_operate },
    { "resume", "go on after a pause", coordinator_operate },
    { "revoke", "put a member out for good", coordinator_operate },
    { "release", "let a member out of quarantine", coordinator_operate },
    { "rotate", "give the coordinator a new online key", coordinator_rotate },
    { "rewind", "back to a checkpoint", coordinator_rewind },
    { "checkpoints", "list the run's checkpoints, pin some, remove old ones", coordinator_checkpoints },
};
#define COMMANDS (sizeof commands / sizeof *commands)

static void print_help(FILE *out) {
    fputs("intellect-coordinator COMMAND ... - the coordinator of an intellect run\n\n", out);
    for (size_t i = 0; i < COMMANDS; i++)
        fprintf(out, "  %-11s %s\n", commands[i].name, commands[i].help);
    fputs("\nintellect-coordinator COMMAND --help explains a command.\n"
          "example:\n"
          "  intellect-node data --out corpus --sequence 128 *.txt\n"
          "  intellect-coordinator init myrun --corpus corpus/corpus.json\n"
          "  intellect-coordinator serve myrun --listen 0.0.0.0:7171\n"
          "  intellect-coordinator invite myrun        # in another terminal\n", out);
}

int main(int argc, char **argv) {
    struct err err;
    if (argc < 2) {
        print_help(stderr);
        return 2;
    }
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help")) {
        print_help(stdout);
        return 0;
    }
    if (!strcmp(argv[1], "--version")) {
        puts("intellect-coordinator " INTELLECT_VERSION);
        return 0;
    }
    if (proto_init(&err)) return coordinator_failed(&err);
    for (size_t i = 0; i < COMMANDS; i++)
        if (!strcmp(argv[1], commands[i].name)) return commands[i].run(argc - 1, argv + 1);
    fprintf(stderr, "intellect-coordinator: unknown command '%s'; intellect-coordinator --help lists "
            "them\n", argv[1]);
    return 2;
}
