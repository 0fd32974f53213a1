/* doctor.c - can this machine be a member? See doctor.h. */
#include "node/doctor.h"

#include "node/tools_args.h"
#include "node/trainer.h"
#include "proto/model.h"

#include <errno.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

static const char doctor_help[] =
    "intellect-node doctor [INVITE] [options]\n"
    "\n"
    "Can this machine be a member of a run, and how fast will it be? Looks at GPUs and driver, measures\n"
    "matrix products, memory and disk, asks the coordinator and the corpus' server, opens the port for\n"
    "other members. Nothing is enrolled and nothing stays; a node that runs meanwhile is not disturbed,\n"
    "but it makes the rates lower. About 10 seconds; no check takes much longer than that.\n"
    "\n"
    "INVITE is the line you were given, - or @FILE as with join; without it, the run that --home has\n"
    "joined. Without either, the machine alone is looked at.\n"
    "\n"
    "  --home DIR         where the node keeps or will keep its state (default: as with join)\n"
    DEVICE_HELP
    "  --precision P      fp32 (default), bf16 or bf16-stochastic, as in `join --help`\n"
    "  --threads N        CPU threads (default: all)\n"
    "  --listen PORT      the port for other members, as with join (default: any free one)\n"
    "  --no-listen        as with join\n"
    "  --corpus PATH      as with join\n"
    "  --model NAME       estimate memory and speed for this one where no run is known, such as 1b\n"
    "  --json             one JSON object: can_join, and checks: name, verdict, text, numbers\n"
    "\n"
    "Each line has a verdict: ok; warn, something is not as it should be; FAIL, the node cannot be a\n"
    "member like this; skip, it could not be looked at. Exit status: 0 it can join, 1 not, 2 misuse.\n"
    "\n"
    "example: intellect-node doctor 'intellect://my.host:7171/...#...' --precision bf16\n";

#define DISK_BLOCK ((size_t)8 << 20)
#define DISK_BYTES ((size_t)256 << 20)
#define DISK_S 3.0
/* Of a parameter, in the home: anchor, momentum, two residuals, the own contribution, the trainer's three. */
#define DISK_BYTES_PER_PARAMETER 32.0

double doctor_now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- the report ---------------------------------------------------------------------------------- */

json_t *doctor_say(struct doctor *d, const char *name, enum doctor_verdict verdict, const char *format, ...) {
    static const char *const words[] = { "ok", "warn", "FAIL", "skip" };
    static const char *const json[] = { "ok", "warn", "fail", "skip" };
    char text[1600];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (verdict == DOCTOR_FAIL) d->failed = true;
    json_t *o = json_pack("{ss ss ss%}", "name", name, "verdict", json[verdict], "text", text, strlen(text));
    if (!o) o = json_pack("{ss ss ss}", "name", name, "verdict", json[verdict], "text", "(not UTF-8)");
    json_array_append_new(d->checks, o);
    if (!d->json) {
        printf("%-12s %-4s  %s\n", name, words[verdict], text);
        fflush(stdout);
    }
    return o;
}

static void conclude(struct doctor *d) {
    if (!d->json) {
        puts(d->failed ? "This machine cannot join like this: see FAIL above." : "This machine can join.");
        return;
    }
    json_t *o = json_pack("{sb sO}", "can_join", !d->failed, "checks", d->checks);
    json_dumpf(o, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(6));
    putchar('\n');
    json_decref(o);
}

/* ---- the run -------------------------------------------------------------------------------------- */

bool doctor_shape(const struct doctor *d, struct msg_model *m, struct msg_inner *inner) {
    struct err err;
    float std;
    if (d->has_genesis && d->genesis.model_count == 1 && d->genesis.inner_count == 1) {
        *m = *d->genesis.model;
        *inner = *d->genesis.inner;
        return !proto_model_check(m, &err) && !proto_inner_check(inner, &err);
    }
    return d->model_name && !proto_model_preset(d->model_name, m, &err) &&
           !proto_inner_preset(d->model_name, 1000000000, inner, &std, &err);
}

/* The run that this home has joined. None is no fault; one that cannot be read is, or another than the invite's. */
static int take_joined_run(struct doctor *d, struct err *err) {
    struct home h = { .lock_fd = -1 };
    struct home_run run;
    struct stat st;
    char path[HOME_FILE_BYTES];
    snprintf(h.path, sizeof h.path, "%s", d->home_path);
    home_file(&h, "run.json", path);
    if (stat(path, &st)) return 0;
    if (home_run_load(&h, &run, err)) return -1;
    if (d->invite.host[0] && !digest_equal(&d->invite.run, &run.run)) {
        home_run_release(&run);
        return err_set(err, ERR_CONFIG, "%s belongs to another run: give another --home", d->home_path);
    }
    if (!d->invite.host[0]) {
        snprintf(d->invite.host, sizeof d->invite.host, "%s", run.host);
        d->invite.port = run.port;
        d->invite.run = run.run;
    }
    snprintf(d->joined_corpus, sizeof d->joined_corpus, "%s", run.corpus);
    if (!d->corpus && run.corpus[0]) d->corpus = d->joined_corpus;
    home_run_release(&run);
    return 0;
}

/* ---- disk ----------------------------------------------------------------------------------------- */

/* What will hold `path`: itself, or the nearest folder above that is there. */
static void nearest_folder(const char *path, char out[HOME_PATH_BYTES]) {
    struct stat st;
    snprintf(out, HOME_PATH_BYTES, "%s", path);
    while (stat(out, &st)) {
        char *slash = strrchr(out, '/');
        if (!slash) strcpy(out, ".");
        else slash[slash == out] = '\0';
    }
}

/* Bytes a second written and flushed to a file that has lost its name; < 0 on failure. */
static double write_rate(const char *folder, struct err *err) {
    char *block = malloc(DISK_BLOCK), path[HOME_PATH_BYTES + 32];
    snprintf(path, sizeof path, "%s/.doctor-XXXXXX", folder);
    int fd = block ? mkstemp(path) : -1;
    if (fd >= 0) unlink(path);
    size_t done = 0;
    double began = doctor_now_s(), rate = -1;
    if (!block) err_set(err, ERR_MEMORY, "no memory for a block");
    else if (fd < 0) err_set_errno(err, "write into %.150s", folder);
    for (size_t i = 0; block && i < DISK_BLOCK; i++) /* nothing to compress */
        block[i] = (char)(i * 2654435761u >> 13);
    while (fd >= 0 && done < DISK_BYTES && doctor_now_s() - began < DISK_S) {
        ssize_t n = write(fd, block, DISK_BLOCK);
        if (n < (ssize_t)DISK_BLOCK || fdatasync(fd)) {
            if (n >= 0 && n < (ssize_t)DISK_BLOCK) errno = ENOSPC;
            err_set_errno(err, "write into %.150s", folder);
            done = 0;
            break;
        }
        done += DISK_BLOCK;
    }
    if (done) rate = (double)done / (doctor_now_s() - began);
    if (fd >= 0) close(fd);
    free(block);
    return rate;
}

static void check_disk(struct doctor *d) {
    char folder[HOME_PATH_BYTES];
    struct statvfs fs;
    struct err err;
    struct msg_model m;
    struct msg_inner inner;
    nearest_folder(d->home_path, folder);
    double rate = write_rate(folder, &err);
    if (rate < 0 || statvfs(folder, &fs)) {
        doctor_say(d, "disk", DOCTOR_FAIL, "%s", rate < 0 ? err.msg : strerror(errno));
        return;
    }
    double there = (double)fs.f_bavail * (double)fs.f_frsize, takes = 0;
    if (doctor_shape(d, &m, &inner)) takes = DISK_BYTES_PER_PARAMETER * (double)proto_model_elements(&m);
    char state[HOME_PATH_BYTES + 16];
    struct stat st;
    snprintf(state, sizeof state, "%s/state", d->home_path);
    bool lacks = there < takes && stat(state, &st); /* of a run that was joined most is there already */
    json_t *o = doctor_say(d, "disk", lacks ? DOCTOR_FAIL : DOCTOR_OK,
                           "%s: %.0f MB/s written and flushed, %.1f GB free%s", folder, rate / 1e6, there / 1e9,
                           lacks ? "; the run's state needs more: give another --home" : "");
    json_object_set_new(o, "bytes_per_s", json_real(rate));
    json_object_set_new(o, "free_bytes", json_real(there));
    json_object_set_new(o, "needed_bytes", json_real(takes));
}

/* ---- the command ---------------------------------------------------------------------------------- */

/* Returns -1 to go on, or the exit code. */
static int parse(int argc, char **argv, struct doctor *d) {
    static const struct option options[] = {
        { "home", required_argument, NULL, 'H' },      { "device", required_argument, NULL, 'D' },
        { "precision", required_argument, NULL, 'p' }, { "threads", required_argument, NULL, 'n' },
        { "listen", required_argument, NULL, 'l' },    { "no-listen", no_argument, NULL, 'L' },
        { "corpus", required_argument, NULL, 'c' },    { "model", required_argument, NULL, 'm' },
        { "json", no_argument, NULL, 'j' },            { "help", no_argument, NULL, 'h' },
        { 0 },
    };
    struct err err;
    struct msg_model m;
    uint64_t n;
    int c;
    optind = 0; /* another tool may have parsed its own arguments in this process */
    while ((c = getopt_long(argc, argv, "h", options, NULL)) != -1) switch (c) {
        case 'H': d->home = optarg; break;
        case 'D': if (args_device(optarg, &d->device)) return 2; break;
        case 'p': if (args_name("--precision", optarg, trainer_precision_name, &d->precision)) return 2; break;
        case 'n': if (args_integer("--threads", optarg, 1, 1024, &n)) return 2; d->threads = (int)n; break;
        case 'l': if (args_integer("--listen", optarg, 1, 65535, &n)) return 2; d->listen_port = (int)n; break;
        case 'L': d->listen_port = -1; break;
        case 'c': d->corpus = optarg; break;
        case 'm': d->model_name = optarg; break;
        case 'j': d->json = true; break;
        case 'h': fputs(doctor_help, stdout); return 0;
        default: return args_unknown(argv[0], argv);
        }
    if (optind + 1 < argc) return args_wrong(argv[0], "too many arguments");
    if (optind < argc && args_invite(argv[optind], &d->invite, &err)) return args_failed(argv[0], &err), 2;
    if (d->model_name && proto_model_preset(d->model_name, &m, &err)) return args_failed(argv[0], &err), 2;
    return -1;
}

static void release(struct doctor *d) {
    if (d->has_genesis) proto_decoded_release(RECORD_genesis, &d->genesis);
    free(d->genesis_bytes);
    json_decref(d->checks);
}

int tool_doctor(int argc, char **argv) {
    struct doctor d = { .device = { DEVICE_AUTO, 0 }, .checks = json_array() };
    struct err err;
    int rc = parse(argc, argv, &d);
    if (rc >= 0) return json_decref(d.checks), rc;
    if (!d.checks) err_set(&err, ERR_MEMORY, "no memory for a report");
    if (!d.checks || (!d.home && home_default(d.home_path, &err))) return args_failed(argv[0], &err);
    if (d.home) snprintf(d.home_path, sizeof d.home_path, "%s", d.home);
    if (take_joined_run(&d, &err)) doctor_say(&d, "home", DOCTOR_FAIL, "%s", err.msg);
    doctor_coordinator(&d); /* first: it tells of the model and the corpus */
    doctor_corpus(&d);
    doctor_port(&d);
    doctor_clock(&d);
    check_disk(&d);
    doctor_device(&d);
    conclude(&d);
    release(&d);
    return d.failed;
}
