/* main.c - the options, the list of what is measured, and the table as JSON. */
#define _GNU_SOURCE /* nftw */
#include <errno.h>
#include <ftw.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "coordinator/commands.h"
#include "kernels/kernels.h"
#include "node/agent.h"
#include "node/trainer.h"
#include "proto/proto.h"
#include "tests/bench/bench.h"
#include "tests/bench/fleet.h"

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *at) {
    (void)st, (void)type, (void)at;
    return remove(path);
}

void remove_folder(const char *path) { nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS); }

static const struct {
    const char *name;
    int (*run)(struct bench *b, int arg, struct err *err);
    int arg;
    bool asked; /* runs only where --only names it: it takes long */
} cases[] = {
    {"memory", bench_memory, 0},
    {"outer.encode", bench_outer, ENCODE},
    {"outer.accumulate", bench_outer, ACCUMULATE},
    {"outer.mean", bench_outer, MEAN},
    {"outer.decode", bench_outer, DECODE},
    {"outer.nesterov", bench_outer, NESTEROV},
    {"outer.fp4.encode", bench_outer, ENCODE | OF_FP4},
    {"outer.fp4.accumulate", bench_outer, ACCUMULATE | OF_FP4},
    {"outer.fp4.decode", bench_outer, DECODE | OF_FP4},
    {"sync.2", bench_swarm, 2},
    {"sync.4", bench_swarm, 4},
    {"digest", bench_digest, 0},
    {"proto", bench_proto, 0},
    {"channel", bench_channel, 0},
    {"matmul.debug", bench_matmul, 0},
    {"matmul.150m", bench_matmul, 1},
    {"train.debug.1", bench_debug, 1},
    {"train.debug.2", bench_debug, 2},
    {"train.10m.1", bench_10m, 1},
    {"train.10m.2", bench_10m, 2},
    {"checkpoint", bench_checkpoint, 0},
    {"step.memory.2", bench_step, 2},
    {"step.memory.4", bench_step, 4},
    {"step.fp4.2", bench_step, 2 | STEP_FP4},
    {"step.fp4.4", bench_step, 4 | STEP_FP4},
    {"step.disk.2", bench_step, 2 | STEP_ON_DISK, true},
    {"step.disk.4", bench_step, 4 | STEP_ON_DISK, true},
    {"handover.2s", bench_handover, 2},
    {"coordinator", bench_load, 0},
    {"join", bench_join, 0},
    {"stall", bench_stall, 0},
    {"store", bench_storing, 0}, /* where BENCH_STORE names one */
    {"handover.60s", bench_handover, 60, true}, /* outer.silence_seconds as it is by default */
};
#define CASES (sizeof cases / sizeof *cases)

static const char help[] =
    "bench [options]\n"
    "\n"
    "Measure how fast the parts are, in turns with a floor or a reference, and print a table.\n"
    "best: of several samples; share: best beside the reference's best, over 100 % is better.\n"
    "Rates of \"one core\" count the seconds that it worked, all others those that passed.\n"
    "It takes some minutes and wants the machine for itself; what takes longest (*) runs only where\n"
    "its full name is given.\n"
    "\n"
    "  --only NAME   these rows only; NAME may end at a dot: \"outer\" is all of outer.*\n"
    "  --json FILE   write the table to FILE too\n"
    "  --dir DIR     where to write checkpoints and members' states, on the disk that matters\n"
    "                (default: $TMPDIR, else /tmp); \"step.memory\" has them in /dev/shm instead\n"
    "  --keep        leave the folder there, with the logs of coordinators and members\n"
    "  --help        this text\n"
    "\n"
    "NAME is one of:";

static void print_help(void) {
    printf("%s", help);
    for (size_t i = 0; i < CASES; i++) printf("%s%s%s", i % 6 ? " " : "\n  ", cases[i].name, cases[i].asked ? "*" : "");
    printf("\n");
}

static bool picked(const char *name, const char *only) {
    size_t n = only ? strlen(only) : 0;
    return !only || (!strncmp(name, only, n) && (name[n] == 0 || name[n] == '.'));
}

/* What takes long has to be named in full. */
static bool is_due(size_t i, const char *only) {
    return cases[i].asked ? only && !strcmp(only, cases[i].name) : picked(cases[i].name, only);
}

static bool picks_any(const char *only) {
    for (size_t i = 0; i < CASES; i++)
        if (picked(cases[i].name, only)) return true;
    return false;
}

static int fail(const char *text, const char *what) {
    fprintf(stderr, "bench: %s%s; see --help\n", text, what);
    return 2;
}

/* "model name : AMD EPYC" of the first core; its place is the same on every x86 Linux. */
static void describe_cpu(char out[128]) {
    char line[256];
    FILE *f = fopen("/proc/cpuinfo", "re");
    snprintf(out, 128, "unknown processor");
    while (f && fgets(line, sizeof line, f)) {
        const char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) != 0 || !colon) continue;
        snprintf(out, 128, "%.*s", (int)strcspn(colon + 2, "\n"), colon + 2);
        break;
    }
    if (f) fclose(f);
}

static json_t *describe_machine(const struct bench *b) {
    char cpu[128], kernels[160] = "";
    double load[1] = {0};
    struct kernels *k = kernels_cpu_create(b->cores, NULL);
    if (k) {
        snprintf(kernels, sizeof kernels, "%s", k->description);
        k->destroy(k);
    }
    describe_cpu(cpu);
    getloadavg(load, 1);
    printf("%s, %d cores, load %.1f; %s\n\n", cpu, b->cores, load[0], kernels);
    return json_pack("{ss si sf ss}", "cpu", cpu, "cores", b->cores, "load", load[0], "kernels",
                     kernels);
}

/* Takes over the file and `machine`. */
static int write_json(FILE *f, const char *path, const struct bench *b, json_t *machine) {
    json_t *rows = json_array(), *all = json_pack("{so so sf}", "machine", machine, "rows", rows,
                                                  "seconds", elapsed_s());
    for (int i = 0; i < b->rows; i++) json_array_append_new(rows, row_json(&b->row[i]));
    int failed = json_dumpf(all, f, JSON_INDENT(1) | JSON_REAL_PRECISION(6)) || fputc('\n', f) < 0;
    if (fclose(f)) failed = 1;
    if (failed) fprintf(stderr, "bench: --json %s: %s\n", path, strerror(errno));
    json_decref(all);
    return failed ? -1 : 0;
}

static int run_cases(struct bench *b, const char *only) {
    for (size_t i = 0; i < CASES; i++) {
        struct err err = {0};
        if (!is_due(i, only) || !cases[i].run(b, cases[i].arg, &err)) continue;
        fprintf(stderr, "bench: %s: %s\n", cases[i].name, err.msg);
        return 1;
    }
    return 0;
}

/* As in a trainer. libgomp reads this before main(), so the program has to start again. */
static void wait_passively(char **argv) {
    if (getenv("OMP_WAIT_POLICY")) return;
    setenv("OMP_WAIT_POLICY", "passive", 1);
    execv("/proc/self/exe", argv); /* where it fails, we go on as we are */
}

/* What this program is when it starts itself; not for people. */
static int coordinator_main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "init")) return coordinator_init(argc - 1, argv + 1);
    return argc > 1 ? coordinator_serve(argc - 1, argv + 1) : 2;
}

/* As a keeper starts it, which starts the running program. */
static int run_trainer(int argc, char **argv) { return argc == 3 ? trainer_main(atoi(argv[2])) : 2; }

static const struct {
    const char *name;
    int (*run)(int argc, char **argv);
} roles[] = {
    {"coordinator", coordinator_main}, {"member", fleet_member_main}, {"trainer", run_trainer}};

/* Its exit status, or -1: it is the benchmark. */
static int play_role(int argc, char **argv) {
    struct err err;
    for (size_t i = 0; argc > 1 && i < sizeof roles / sizeof *roles; i++) {
        if (strcmp(argv[1], roles[i].name) != 0) continue;
        if (proto_init(&err)) return fail(err.msg, "");
        return roles[i].run(argc - 1, argv + 1);
    }
    return -1;
}

struct options {
    const char *only, *json, *dir;
    bool keep;
};

/* 0 to go on, or the program's exit status + 1. */
static int take_options(int argc, char **argv, struct options *o) {
    static const struct option known[] = {{"only", required_argument, NULL, 'o'},
                                          {"json", required_argument, NULL, 'j'},
                                          {"dir", required_argument, NULL, 'd'},
                                          {"keep", no_argument, NULL, 'k'},
                                          {"help", no_argument, NULL, 'h'},
                                          {0}};
    int c;
    opterr = 0;
    while ((c = getopt_long(argc, argv, ":h", known, NULL)) != -1) {
        if (c == 'o') o->only = optarg;
        else if (c == 'j') o->json = optarg;
        else if (c == 'd') o->dir = optarg;
        else if (c == 'k') o->keep = true;
        else if (c == 'h') return print_help(), 1;
        else
            return 1 + fail(c == ':' ? "a value is missing after " : "no such option: ",
                            argv[optind - 1]);
    }
    if (optind < argc) return 1 + fail("not an option: ", argv[optind]);
    if (o->only && !picks_any(o->only)) return 1 + fail("--only: there is no row ", o->only);
    return 0;
}

/* The folder first: a file for the table that stays empty would be worse than none. */
static int open_outputs(struct bench *b, const struct options *o, FILE **json) {
    int n = snprintf(b->folder, sizeof b->folder, "%s/intellect-bench-XXXXXX", o->dir);
    if (n >= (int)sizeof b->folder) return fail("--dir: too long: ", o->dir);
    if (!mkdtemp(b->folder)) {
        fprintf(stderr, "bench: --dir %s: %s\n", o->dir, strerror(errno));
        return 1;
    }
    if (o->json && !(*json = fopen(o->json, "we"))) {
        fprintf(stderr, "bench: --json %s: %s\n", o->json, strerror(errno));
        rmdir(b->folder);
        return 1;
    }
    return 0;
}

int main(int argc, char **argv) {
    static struct bench b;
    const char *tmp = getenv("TMPDIR");
    struct options o = {.dir = tmp && *tmp ? tmp : "/tmp"};
    struct err err = {0};
    FILE *json = NULL;
    int status = play_role(argc, argv);
    if (status >= 0) return status;
    agent_keep_memory(); /* as agents do */
    status = take_options(argc, argv, &o);
    if (status) return status - 1;
    wait_passively(argv);
    if (proto_init(&err)) return fail(err.msg, "");
    if ((status = open_outputs(&b, &o, &json))) return status;
    b.keep = o.keep;
    start_clock();
    b.cores = (int)sysconf(_SC_NPROCESSORS_ONLN);
    json_t *machine = describe_machine(&b);
    print_head();
    status = run_cases(&b, o.only);
    if (b.keep) printf("\n%s", b.folder);
    else remove_folder(b.folder);
    printf("\n%.0f s\n", elapsed_s());
    if (json && write_json(json, o.json, &b, machine)) status = 1;
    else if (!json) json_decref(machine);
    return status;
}
