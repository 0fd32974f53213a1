/* main.c - the simulator's command line: many seeds on several processes, one seed with a trace, or
 * every deliberate fault in turn. */
#include "tests/sim/sim.h"

#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct outcome {
    uint64_t seeds, failed, first_failed, commits, events, checked, unchecked, checkpoints, twice;
    uint64_t injected[SIM_INJECTED], seeds_with[SIM_INJECTED];
    double simulated_s, slowest_s;
    uint64_t slowest;
    char violation[512];
};

static void usage(FILE *to) {
    fputs(
        "sim - runs coordinator and members on a simulated clock, network and disk, with faults\n\n"
        "  sim [--seeds N] [--first S] [--jobs J] [--json]\n"
        "                                           N seeds from S on; exit 1 if an invariant is "
        "violated\n"
        "  sim --seed S --trace                     one seed, every event of note\n"
        "  sim --deliberate [--seeds N]             plant each deliberate fault; exit 1 unless "
        "each is found\n"
        "  sim --fault NAME --seed S --trace        replay a seed with a fault planted\n",
        to);
}

/* Every deliberate fault that core.h and sync.h know. */
struct deliberate {
    const char *name;
    enum core_fault core;
    enum sync_fault sync;
};
#define IN_CORE(name, fault) {name, fault, SYNC_FAULT_NONE}
#define IN_SYNC(name, fault) {name, CORE_FAULT_NONE, fault}
static const struct deliberate faults[] = {
    IN_CORE("commit-announced-before-durable", CORE_FAULT_COMMIT_ANNOUNCED_BEFORE_DURABLE),
    IN_CORE("one-report-suffices", CORE_FAULT_ONE_REPORT_SUFFICES),
    IN_CORE("lease-returned-twice", CORE_FAULT_LEASE_RETURNED_TWICE),
    IN_CORE("timers-before-input", CORE_FAULT_TIMERS_BEFORE_INPUT),
    IN_CORE("spent-again-by-other-fragment", CORE_FAULT_SPENDS_OTHER_FRAGMENT_AGAIN),
    IN_CORE("weight-zero-commits", CORE_FAULT_WEIGHT_ZERO_COMMITS),
    IN_CORE("checks-own-parts", CORE_FAULT_CHECKS_OWN_PARTS),
    IN_CORE("rewind-keeps-spent", CORE_FAULT_REWIND_KEEPS_SPENT),
    IN_SYNC("divisor-not-corrected", SYNC_FAULT_DIVISOR_NOT_CORRECTED),
    IN_SYNC("plan-number-ignored", SYNC_FAULT_PLAN_NUMBER_IGNORED),
    IN_SYNC("chunk-summed-twice", SYNC_FAULT_CHUNK_SUMMED_TWICE),
    IN_SYNC("residual-updated-at-send", SYNC_FAULT_RESIDUAL_AT_SEND),
    IN_SYNC("momentum-not-joined", SYNC_FAULT_MOMENTUM_NOT_JOINED),
    IN_SYNC("join-misses-a-commit", SYNC_FAULT_JOIN_MISSES_COMMIT),
    IN_SYNC("claims-too-much", SYNC_FAULT_CLAIMS_TOO_MUCH),
    IN_SYNC("report-before-disk", SYNC_FAULT_REPORT_BEFORE_DISK),
    IN_SYNC("ready-before-disk", SYNC_FAULT_READY_BEFORE_DISK),
    IN_SYNC("mix-where-not-summed", SYNC_FAULT_MIX_NOT_SUMMED),
    IN_SYNC("claims-of-lost-leases-kept", SYNC_FAULT_CLAIMS_KEPT),
    IN_SYNC("rewind-keeps-work", SYNC_FAULT_REWIND_KEEPS_WORK),
};
#define FAULTS (sizeof faults / sizeof *faults)

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void run_one(uint64_t seed, bool trace, struct outcome *o) {
    struct sim_world *w = malloc(sizeof *w);
    double start = seconds();
    if (!w) exit(2);
    int rc = sim_run(w, seed, trace);
    double took = seconds() - start;
    if (took > o->slowest_s) o->slowest_s = took, o->slowest = seed;
    o->seeds++;
    o->commits += w->commits;
    o->events += w->events;
    o->checked += w->checked_sums;
    o->unchecked += w->unchecked_sums;
    o->checkpoints += w->checkpoints;
    o->twice += w->twice;
    o->simulated_s += (double)w->now / 1000;
    for (int i = 0; i < SIM_INJECTED; i++) {
        o->injected[i] += w->injected[i];
        o->seeds_with[i] += w->injected[i] > 0;
    }
    if (rc) {
        if (!o->failed++) {
            o->first_failed = seed;
            memcpy(o->violation, w->violation, sizeof o->violation);
        }
        if (trace) printf("%9.3f  VIOLATED: %s\n", (double)w->now / 1000, w->violation);
        else fprintf(stderr, "seed %llu: %s\n", LLU(seed), w->violation);
    }
    sim_release(w);
    free(w);
}

#define FAILURES_MAX 20 /* of one job */

static void job(uint64_t first, uint64_t seeds, uint64_t step, bool stop_at_first, bool progress,
                struct outcome *o) {
    double start = seconds(), told = start;
    for (uint64_t s = first; s < seeds && o->failed < (stop_at_first ? 1 : FAILURES_MAX);
         s += step) {
        alarm(120); /* a seed that hangs kills its job, which counts as a failure */
        run_one(s, false, o);
        if (!progress || seconds() - told < 10) continue;
        told = seconds();
        fprintf(stderr, "%llu of about %llu seeds, %.0f a second, %llu failed here\n",
                LLU(o->seeds * step), LLU(seeds - first + step - 1), 
                (double)(o->seeds * step) / (told - start), LLU(o->failed));
    }
}

static void add(struct outcome *all, const struct outcome *o) {
    all->seeds += o->seeds, all->commits += o->commits, all->events += o->events;
    all->simulated_s += o->simulated_s, all->checked += o->checked;
    all->unchecked += o->unchecked, all->checkpoints += o->checkpoints, all->twice += o->twice;
    for (int i = 0; i < SIM_INJECTED; i++) {
        all->injected[i] += o->injected[i];
        all->seeds_with[i] += o->seeds_with[i];
    }
    if (o->slowest_s > all->slowest_s) all->slowest_s = o->slowest_s, all->slowest = o->slowest;
    if (o->failed && (!all->failed || o->first_failed < all->first_failed)) {
        all->first_failed = o->first_failed;
        memcpy(all->violation, o->violation, sizeof all->violation);
    }
    all->failed += o->failed;
}

/* One child process per job; each writes its outcome into a pipe. */
static struct outcome run_many(uint64_t first, uint64_t seeds, int jobs, bool stop_at_first) {
    static struct outcome all;
    int pipes[64][2];
    memset(&all, 0, sizeof all);
    for (int j = 0; j < jobs; j++) {
        if (pipe(pipes[j])) exit(2);
        fflush(stdout);
        if (fork()) {
            close(pipes[j][1]);
            continue;
        }
        static struct outcome o;
        if (stop_at_first && !freopen("/dev/null", "w", stderr)) _exit(2);
        job(first + (uint64_t)j, first + seeds, (uint64_t)jobs, stop_at_first, j == 0, &o);
        if (write(pipes[j][1], &o, sizeof o) != sizeof o) _exit(2);
        _exit(0);
    }
    for (int j = 0; j < jobs; j++) {
        struct outcome o = {0};
        ssize_t n = read(pipes[j][0], &o, sizeof o);
        close(pipes[j][0]);
        if (n != sizeof o) {
            memset(&o, 0, sizeof o);
            o.failed = 1;
            snprintf(o.violation, sizeof o.violation,
                     "a job died (an assertion, a crash, or a seed that ran for two minutes)");
        }
        add(&all, &o);
    }
    while (wait(NULL) > 0) {}
    return all;
}

static int find_deliberate_faults(uint64_t seeds, int jobs) {
    int missed = 0;
    for (size_t i = 0; i < FAULTS; i++) {
        core_fault = faults[i].core;
        sync_fault = faults[i].sync;
        struct outcome o = run_many(1, seeds, jobs, true);
        if (o.failed)
            printf("deliberate fault %-36s found at seed %llu: %s\n", faults[i].name,
                   LLU(o.first_failed), o.violation);
        else
            printf("deliberate fault %-36s NOT FOUND in %llu seeds\n", faults[i].name,
                   LLU(o.seeds));
        fflush(stdout);
        missed += !o.failed;
    }
    return missed ? 1 : 0;
}

/* ---- the summary -------------------------------------------------------------------------------- */

#define FAULT_TEXT(name, text) text,
#define FAULT_NAME(name, text) #name,
static const char *const fault_texts[] = {SIM_FAULTS_INJECTED(FAULT_TEXT)};
static const char *const fault_names[] = {SIM_FAULTS_INJECTED(FAULT_NAME)};

static void print_text(const struct outcome *o, double took) {
    printf("what happened                                    times   in seeds\n");
    for (int i = 0; i < SIM_INJECTED; i++)
        printf("  %-42s %9llu  %9llu\n", fault_texts[i], LLU(o->injected[i]),
               LLU(o->seeds_with[i]));
    printf("%llu seeds, %.0f s simulated in %.1f s (slowest seed %llu, %.1f s): %llu events, "
           "%llu commits, %llu checkpoints, %llu chunk sums recomputed (%llu a liar's), %llu "
           "samples twice in a chunk\n",
           LLU(o->seeds), o->simulated_s, took, LLU(o->slowest), o->slowest_s, LLU(o->events),
           LLU(o->commits), LLU(o->checkpoints), LLU(o->checked), LLU(o->unchecked), LLU(o->twice));
}

static void print_json(const struct outcome *o, double took) {
    printf("{\"seeds\":%llu,\"failed\":%llu,\"seconds\":%.1f,\"simulated_seconds\":%.0f,"
           "\"events\":%llu,\"commits\":%llu,\"checkpoints\":%llu,\"sums_checked\":%llu,"
           "\"sums_of_liars\":%llu,\"injected\":{",
           LLU(o->seeds), LLU(o->failed), took, o->simulated_s, LLU(o->events), LLU(o->commits),
           LLU(o->checkpoints), LLU(o->checked), LLU(o->unchecked));
    for (int i = 0; i < SIM_INJECTED; i++)
        printf("%s\"%s\":%llu", i ? "," : "", fault_names[i], LLU(o->injected[i]));
    printf("}}\n");
}

static int report(const struct outcome *o, double took, bool json, bool one) {
    if (json) print_json(o, took);
    else if (!one) print_text(o, took);
    if (!o->failed) return json ? 0 : (puts("all invariants held"), 0);
    fprintf(json ? stderr : stdout, "%llu seeds failed; seed %llu VIOLATED: %s\nreplay: sim --seed %llu --trace\n",
            LLU(o->failed), LLU(o->first_failed), o->violation, LLU(o->first_failed));
    return 1;
}

static bool plant(const char *name) {
    for (size_t i = 0; i < FAULTS; i++)
        if (!strcmp(name, faults[i].name)) {
            core_fault = faults[i].core;
            sync_fault = faults[i].sync;
            return true;
        }
    fprintf(stderr, "sim: there is no fault %s; there are:", name);
    for (size_t i = 0; i < FAULTS; i++) fprintf(stderr, " %s", faults[i].name);
    fputc('\n', stderr);
    return false;
}

int main(int argc, char **argv) {
    uint64_t seeds = 1000, first = 1, one = 0;
    int jobs = 1, option;
    bool trace = false, deliberate = false, json = false;
    static const struct option options[] = {
        {"seeds", 1, 0, 'n'}, {"first", 1, 0, 'f'}, {"jobs", 1, 0, 'j'}, {"json", 0, 0, 'J'},
        {"seed", 1, 0, 's'},  {"trace", 0, 0, 't'}, {"deliberate", 0, 0, 'd'},
        {"fault", 1, 0, 'x'}, {"help", 0, 0, 'h'},  {0}};
    struct err err;
    if (proto_init(&err)) return fprintf(stderr, "sim: %s\n", err.msg), 2;
    while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1) switch (option) {
        case 'n': seeds = strtoull(optarg, NULL, 10); break;
        case 'f': first = strtoull(optarg, NULL, 10); break;
        case 'j': jobs = atoi(optarg); break;
        case 'J': json = true; break;
        case 's': one = strtoull(optarg, NULL, 10); break;
        case 't': trace = true; break;
        case 'd': deliberate = true; break;
        case 'x':
            if (!plant(optarg)) return 2;
            break;
        case 'h': usage(stdout); return 0;
        default: usage(stderr); return 2;
        }
    if (jobs < 1 || jobs > 64 || optind < argc) return usage(stderr), 2;
    if (deliberate) return find_deliberate_faults(seeds, jobs);

    static struct outcome o;
    double start = seconds();
    if (one) run_one(one, trace, &o);
    else o = run_many(first, seeds, jobs, false);
    return report(&o, seconds() - start, json, one != 0);
}
