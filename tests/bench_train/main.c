/* main.c - options, the cases, a process for each, the table and the same as JSON. */
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "proto/proto.h"
#include "tests/bench_train/bench_train.h"

static const struct bench_case cases[] = {
    { "10m.fp32", "10m", 0, 0, 4 },   { "10m.bf16", "10m", 0, 1, 4 }, { "150m.fp32", "150m", 0, 0, 4 },
    { "150m.bf16", "150m", 0, 1, 4 }, { "1b4.fp32", "1b", 4, 0, 1 },  { "1b4.bf16", "1b", 4, 1, 1 },
};
#define CASES (int)(sizeof cases / sizeof *cases)

static const char help[] =
    "bench-train [options]\n"
    "\n"
    "Measure a whole training step (forward, backward, optimizer) on all cores, at sequence 1024.\n"
    "\n"
    "tokens/s   of the fastest step\n"
    "products   share of the time that is spent in matrix products (attention's own not among them)\n"
    "oneDNN     what oneDNN alone reaches on the same products, measured in turns with the steps\n"
    "share      of that rate: the step's FLOP (products, causal attention) per second over it\n"
    "floor      tokens/s if products and attention took what oneDNN takes for the former, AdamW what a\n"
    "           copy of as many bytes takes, and all else nothing\n"
    "peak       the most memory the process held\n"
    "\n"
    "  --device cuda  on a GPU: other cases, beside its own large products and its own copy of memory\n"
    "  --only NAME    these cases only; NAME may end at a dot: \"150m\"\n"
    "  --steps N      steps that count (default 3)\n"
    "  --json FILE    write the table, and the time of each kernel, to FILE too; - is the output, then\n"
    "                 without the table\n"
    "  --core         on one core, by the seconds that it worked: for a busy machine\n"
    "  --kernels      print the time of each kernel too\n"
    "  --help         this text\n"
    "\n"
    "NAME is one of: ";

struct options {
    const char *only, *json, *device_name; /* device_name: NULL for the CPU */
    struct device device;
    int steps, kernels, core;
};

static int case_count(const struct options *o) { return o->device_name ? gpu_case_count : CASES; }
static const struct bench_case *case_at(const struct options *o, int i) {
    return o->device_name ? &gpu_cases[i] : &cases[i];
}

static int picked(const char *name, const char *only) {
    size_t n = only ? strlen(only) : 0;
    return !only || (!strncmp(name, only, n) && (name[n] == 0 || name[n] == '.'));
}

/* In the child: the JSON to its output. */
static int child(const char *name, int steps, const struct options *options) {
    struct err err = { 0 };
    for (int i = 0; i < case_count(options); i++) {
        const struct bench_case *c = case_at(options, i);
        if (strcmp(c->name, name) != 0) continue;
        json_t *o = options->device_name ? gpu_measure(c, options->device, steps, &err) : measure(c, steps, &err);
        if (!o) fprintf(stderr, "bench-train: %s: %s\n", name, err.msg);
        else json_dumpf(o, stdout, JSON_COMPACT | JSON_REAL_PRECISION(6));
        return o ? 0 : 1;
    }
    return 2;
}

/* NULL: the child said why. */
static json_t *run_child(const char *name, const struct options *o) {
    char count[16];
    int ends[2], status;
    snprintf(count, sizeof count, "%d", o->steps);
    if (pipe(ends)) return NULL;
    pid_t pid = fork();
    if (pid == 0) {
        dup2(ends[1], STDOUT_FILENO);
        close(ends[0]);
        execl("/proc/self/exe", "bench-train", o->core ? "measure-core" : "measure", name, count, o->device_name,
              (char *)NULL);
        _exit(127);
    }
    close(ends[1]);
    FILE *f = fdopen(ends[0], "r");
    json_t *row = pid > 0 && f ? json_loadf(f, 0, NULL) : NULL;
    if (f) fclose(f);
    if (pid > 0) waitpid(pid, &status, 0);
    return row;
}

static double number(const json_t *o, const char *key) {
    return json_number_value(json_object_get(o, key));
}

static void print_head(void) {
    printf("%-10s %9s %8s %9s %6s %9s %8s %8s %8s\n", "case", "tokens/s", "products", "oneDNN", "share",
           "floor", "TFLOP", "GB moved", "peak GB");
}

static void print_kernels(const json_t *o) {
    const char *name;
    json_t *seconds;
    json_object_foreach(json_object_get(o, "entries"), name, seconds)
        printf("    %-24s %8.1f ms\n", name, 1e3 * json_number_value(seconds));
    fflush(stdout);
}

static void print_row(const json_t *o) {
    double tokens = number(o, "samples") * number(o, "sequence");
    printf("%-10s %9.0f %7.0f%% %5.0f GF/s %4.0f%% %9.0f %8.2f %8.1f %8.2f\n",
           json_string_value(json_object_get(o, "name")), number(o, "tokens_per_s"),
           100 * number(o, "product_share_of_time"), number(o, "onednn_gflop_per_s"),
           100 * number(o, "share_of_onednn"), tokens / number(o, "floor_seconds"),
           (number(o, "gflop_products") + number(o, "gflop_attention")) / 1e3,
           28e-9 * number(o, "parameters"), number(o, "peak_bytes") / 1e9);
    fflush(stdout);
}

static int write_json(const char *path, json_t *rows) {
    int to_output = !strcmp(path, "-");
    FILE *f = to_output ? stdout : fopen(path, "we");
    int failed = !f || json_dumpf(rows, f, JSON_INDENT(1) | JSON_REAL_PRECISION(6)) || fputc('\n', f) < 0;
    if (f && !to_output && fclose(f)) failed = 1;
    if (failed) fprintf(stderr, "bench-train: --json %s: %s\n", path, strerror(errno));
    return failed;
}

static void print_help(void) {
    printf("%s", help);
    for (int i = 0; i < CASES; i++) printf("%s%s", i ? ", " : "", cases[i].name);
    printf("; on a GPU ");
    for (int i = 0; i < gpu_case_count; i++) printf("%s%s", i ? ", " : "", gpu_cases[i].name);
    printf("\n");
}

/* The CPU is no name: it has other cases. */
static int take_device(struct options *o) {
    struct err err;
    if (!o->device_name) return 0;
    if (!device_parse(o->device_name, &o->device, &err) && o->device.kind == DEVICE_CUDA) return 0;
    return fprintf(stderr, "bench-train: --device: cuda or cuda:N\n"), -1;
}

/* -1 to go on, or the program's exit status. */
static int take_options(int argc, char **argv, struct options *o) {
    static const struct option known[] = {
        { "only", required_argument, NULL, 'o' }, { "device", required_argument, NULL, 'd' },
        { "steps", required_argument, NULL, 's' },
        { "json", required_argument, NULL, 'j' }, { "kernels", no_argument, NULL, 'k' },
                                           { "core", no_argument, NULL, 'c' },
        { "help", no_argument, NULL, 'h' },       { 0 }
    };
    int c;
    while ((c = getopt_long(argc, argv, "h", known, NULL)) != -1) {
        if (c == 'o') o->only = optarg;
        else if (c == 'd') o->device_name = optarg;
        else if (c == 's') o->steps = atoi(optarg);
        else if (c == 'j') o->json = optarg;
        else if (c == 'k') o->kernels = 1;
        else if (c == 'c') o->core = 1;
        else if (c == 'h') return print_help(), 0;
        else return 2;
    }
    if (take_device(o)) return 2;
    return o->steps >= 1 && optind == argc ? -1 : (fprintf(stderr, "bench-train: see --help\n"), 2);
}

int main(int argc, char **argv) {
    struct options o = { .steps = 3 };
    struct err err;
    int failed = 0;
    setenv("OMP_WAIT_POLICY", "passive", 0); /* as in a trainer; for the children */
    if (proto_init(&err)) return fprintf(stderr, "bench-train: %s\n", err.msg), 1;
    if (argc >= 4 && !strncmp(argv[1], "measure", 7)) {
        if (argv[1][7]) use_one_core();
        o.device_name = argv[4];
        return take_device(&o) ? 2 : child(argv[2], atoi(argv[3]), &o);
    }
    int status = take_options(argc, argv, &o), quiet = o.json && !strcmp(o.json, "-");
    if (status >= 0) return status;
    json_t *rows = json_array();
    if (!quiet) (o.device_name ? gpu_print_head : print_head)();
    for (int i = 0; i < case_count(&o); i++) {
        const struct bench_case *c = case_at(&o, i);
        if (!picked(c->name, o.only)) continue;
        json_t *row = run_child(c->name, &o);
        if (!row) {
            failed = 1;
            continue;
        }
        if (!quiet && o.device_name) gpu_print_row(row);
        else if (!quiet) print_row(row);
        if (!quiet && o.kernels) print_kernels(row);
        json_array_append_new(rows, row);
    }
    if (o.json && write_json(o.json, rows)) failed = 1;
    if (!json_array_size(rows)) failed = 1;
    json_decref(rows);
    return failed;
}
