/* main.c - the simulator's command line: many seeds on several processes, or one seed with a trace.
 */
#include "tests/sim/sim.h"

#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct outcome {
    uint64_t seeds, failed, first_failed, commits, events, checked, unchecked, checkpoints;
    double simulated_s;
    char violation[512];
};

static void usage(FILE *to) {
    fputs(
        "sim - runs coordinator and members on a simulated clock, network and disk, with faults\n\n"
        "  sim [--seeds N] [--first S] [--jobs J]   N seeds from S on; exit 1 if an invariant is "
        "violated\n"
        "  sim --seed S --trace                     one seed, every event of note\n"
        "  sim --deliberate [--seeds N]             plant each deliberate fault; exit 1 unless "
        "each is found\n"
        "  sim --fault NAME --seed S --trace        replay a seed with a fault planted\n",
        to);
}

static const struct {
    const char *name;
    enum core_fault core;
    enum sync_fault sync;
} faults[] = {
    {"commit-announced-before-durable", CORE_FAULT_COMMIT_ANNOUNCED_BEFORE_DURABLE,
     SYNC_FAULT_NONE},
    {"divisor-not-corrected", CORE_FAULT_NONE, SYNC_FAULT_DIVISOR_NOT_CORRECTED},
    {"plan-number-ignored", CORE_FAULT_NONE, SYNC_FAULT_PLAN_NUMBER_IGNORED},
};
#define FAULTS (sizeof faults / sizeof *faults)

static void run_one(uint64_t seed, bool trace, struct outcome *o) {
    struct sim_world *w = malloc(sizeof *w);
    int rc = sim_run(w, seed, trace);
    o->seeds++;
    o->commits += w->commits;
    o->events += w->events;
    o->checked += w->checked_sums;
    o->unchecked += w->unchecked_sums;
    o->checkpoints += w->checkpoints;
    o->simulated_s += (double)w->now / 1000;
    if (rc) {
        if (!o->failed++) {
            o->first_failed = seed;
            memcpy(o->violation, w->violation, sizeof o->violation);
        }
        if (trace) printf("%9.3f  VIOLATED: %s\n", (double)w->now / 1000, w->violation);
    }
    sim_release(w);
    free(w);
}

/* One child process per job; each writes its outcome into a pipe. */
static struct outcome run_many(uint64_t first, uint64_t seeds, int jobs, bool stop_at_first) {
    struct outcome all = {0};
    int pipes[64][2];
    for (int j = 0; j < jobs; j++) {
        if (pipe(pipes[j])) exit(2);
        fflush(stdout);
        if (fork()) {
            close(pipes[j][1]);
            continue;
        }
        struct outcome o = {0};
        for (uint64_t s = (uint64_t)j; s < seeds && !(stop_at_first && o.failed) && o.failed < 5;
             s += (uint64_t)jobs) {
            uint64_t failed = o.failed;
            char last[512];
            memcpy(last, o.violation, sizeof last);
            alarm(60); /* a seed that hangs kills its job, which counts as a failure */
            run_one(first + s, false, &o);
            if (o.failed > failed && !stop_at_first)
                fprintf(stderr, "seed %llu: %s\n", (unsigned long long)(first + s),
                        failed ? "another violation" : o.violation);
        }
        if (write(pipes[j][1], &o, sizeof o) != sizeof o) _exit(2);
        _exit(0);
    }
    for (int j = 0; j < jobs; j++) {
        struct outcome o = {0};
        ssize_t n = read(pipes[j][0], &o, sizeof o);
        close(pipes[j][0]);
        if (n != sizeof o) {
            o.failed = 1;
            snprintf(o.violation, sizeof o.violation,
                     "a job died (an assertion, a crash, or a seed that ran for a minute)");
        }
        all.seeds += o.seeds, all.commits += o.commits, all.events += o.events,
            all.simulated_s += o.simulated_s;
        all.checked += o.checked, all.unchecked += o.unchecked, all.checkpoints += o.checkpoints;
        if (o.failed && (!all.failed || o.first_failed < all.first_failed)) {
            all.first_failed = o.first_failed;
            memcpy(all.violation, o.violation, sizeof all.violation);
        }
        all.failed += o.failed;
    }
    while (wait(NULL) > 0) {}
    return all;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int find_deliberate_faults(uint64_t seeds, int jobs) {
    int missed = 0;
    for (size_t i = 0; i < FAULTS; i++) {
        core_fault = faults[i].core;
        sync_fault = faults[i].sync;
        struct outcome o = run_many(1, seeds, jobs, true);
        if (o.failed)
            printf("deliberate fault %-34s found at seed %llu: %s\n", faults[i].name,
                   (unsigned long long)o.first_failed, o.violation);
        else
            printf("deliberate fault %-34s NOT FOUND in %llu seeds\n", faults[i].name,
                   (unsigned long long)o.seeds);
        missed += !o.failed;
    }
    return missed ? 1 : 0;
}

int main(int argc, char **argv) {
    uint64_t seeds = 1000, first = 1, one = 0;
    int jobs = 1, option;
    bool trace = false, deliberate = false;
    static const struct option options[] = {
        {"seeds", 1, 0, 'n'}, {"first", 1, 0, 'f'}, {"jobs", 1, 0, 'j'},
        {"seed", 1, 0, 's'},  {"trace", 0, 0, 't'}, {"deliberate", 0, 0, 'd'},
        {"fault", 1, 0, 'x'}, {"help", 0, 0, 'h'},  {0}};
    struct err err;
    if (proto_init(&err)) return fprintf(stderr, "sim: %s\n", err.msg), 2;
    while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1) switch (option) {
        case 'n': seeds = strtoull(optarg, NULL, 10); break;
        case 'f': first = strtoull(optarg, NULL, 10); break;
        case 'j': jobs = atoi(optarg); break;
        case 's': one = strtoull(optarg, NULL, 10); break;
        case 't': trace = true; break;
        case 'd': deliberate = true; break;
        case 'x':
            for (size_t i = 0; i < FAULTS; i++)
                if (!strcmp(optarg, faults[i].name))
                    core_fault = faults[i].core, sync_fault = faults[i].sync;
            break;
        case 'h': usage(stdout); return 0;
        default: usage(stderr); return 2;
        }
    if (jobs < 1 || jobs > 64 || optind < argc) return usage(stderr), 2;
    if (deliberate) return find_deliberate_faults(seeds, jobs);

    struct outcome o = {0};
    double start = seconds();
    if (one) run_one(one, trace, &o);
    else o = run_many(first, seeds, jobs, false);
    printf("%llu seeds, %.0f s simulated in %.1f s: %llu events, %llu commits, %llu checkpoints, "
           "%llu chunk sums recomputed (%llu not on the network)\n",
           (unsigned long long)o.seeds, o.simulated_s, seconds() - start,
           (unsigned long long)o.events, (unsigned long long)o.commits,
           (unsigned long long)o.checkpoints, (unsigned long long)o.checked,
           (unsigned long long)o.unchecked);
    if (!o.failed) return puts("all invariants held"), 0;
    printf("seed %llu VIOLATED: %s\nreplay: sim --seed %llu --trace\n",
           (unsigned long long)o.first_failed, o.violation, (unsigned long long)o.first_failed);
    return 1;
}
