/* tools_plan.c - the command `plan`; see tools.h. */
#include "kernels/comm.h"
#include "kernels/kernels.h"
#include "node/device.h"
#include "node/engine.h"
#include "node/layout.h"
#include "node/mesh.h"
#include "node/model.h"
#include "node/tools.h"
#include "node/tools_args.h"
#include "node/trainer.h"
#include "proto/model.h"

#include <getopt.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char plan_help[] =
    "intellect-node plan --model NAME [options]\n"
    "\n"
    "What each rank of a trainer will hold in memory, before anything is loaded; exit status 1 if it does\n"
    "not fit. On CPU the sum is within 10 %% of the measured peak, and some 50 MB for libraries come on\n"
    "top. Where --devices are named and no mesh is, the one is shown that fits with the least said\n"
    "between ranks.\n"
    "\n"
    "  --model NAME       one of: %s\n"
    "  --sequence N       tokens of a sample (default: the model's)\n"
    "  --layers N         layers (default: the model's)\n"
    "  --batch N          samples of an inner step (default: the model's)\n"
    "  --precision P      fp32 (default), bf16 or bf16-stochastic\n"
    "  --optimizer O      adamw (default) or muon, as inner.optimizer of run.yaml\n"
    "  --states S         fp32 (default), bf16 or 8bit, as inner.states\n"
    "  --devices NxGB     what to train on, for example 8x80: a rank each; 4x80 --tp 2 is two by two\n"
    "  --tp N, --dp N     tensor-parallel by data-parallel ranks (default: 1, with --devices what fits)\n"
    "  --shard S          what data-parallel ranks share out: none (default), optimizer, gradients, full\n"
    "  --activations GB   of a rank at most, as in `train --help` (default: 2.1, or what fits --devices)\n"
    "  --offload W        none (default), or optimizer: moments in host memory, as in `train --help`\n"
    "  --threads N        threads of the trainer (default: all cores)\n"
    "  --memory GB        what there is without --devices (default: what this machine has available)\n"
    "  --json             print one JSON object, in bytes\n"
    "\n"
    "example: intellect-node plan --model 150m --precision bf16\n"
    "example: intellect-node plan --model 10b --precision bf16 --devices 8x80\n";

struct plan {
    struct msg_model m;
    struct msg_inner inner;
    uint64_t sequence, layers, batch, threads;
    int precision;
    uint64_t devices;           /* 0: this machine, for all ranks */
    double memory;              /* bytes of a device, or of the machine */
    struct engine_shape shape;
    bool tp, dp, shard;         /* were given */
    struct engine_memory needs; /* of a rank */
    struct engine_memory widest;
};

static const char *optimizer_name(int i) {
    static const char *const names[] = { "adamw", "muon", NULL };
    return names[i];
}

static const char *states_name(int i) {
    static const char *const names[] = { "fp32", "bf16", "8bit", NULL };
    return names[i];
}

static const char *training_name(int training) {
    static const char *const names[] = {
        "", "nothing", "norms", "norms, SwiGLU", "norms, SwiGLU, gate and up", "all but attention"
    };
    return names[training];
}

static int set_shape(struct plan *p, const char *preset, struct err *err) {
    const uint8_t optimizer = p->inner.optimizer, states = p->inner.states;
    float std;
    if (proto_model_preset(preset, &p->m, err) ||
        proto_inner_preset(preset, 1000000000, &p->inner, &std, err))
        return -1;
    p->inner.optimizer = optimizer;
    p->inner.states = states;
    if (p->sequence) p->m.sequence = (uint32_t)p->sequence;
    if (p->layers) p->m.layers = (uint32_t)p->layers;
    if (p->batch) p->inner.batch = (uint32_t)p->batch;
    return proto_model_check(&p->m, err) || proto_inner_check(&p->inner, err) ? -1 : 0;
}

/* ---- what fits --------------------------------------------------------------------------------- */

static int ranks(const struct plan *p) { return p->shape.tp * p->shape.dp; }

/* What one rank may take. */
static double share(const struct plan *p) { return p->devices ? p->memory : p->memory / ranks(p); }

/* What one rank takes of that: this machine's memory is the host's too. */
static size_t taken(const struct plan *p, const struct engine_memory *e) {
    return e->all + (p->devices ? 0 : e->host);
}

static int check_mesh(const struct plan *p, struct err *err) {
    int n = ranks(p);
    if (layout_check(&p->m, p->shape.tp, err)) return -1;
    if (n > COMM_RANKS_MAX)
        return err_set(err, ERR_CONFIG, "%d x %d are %d ranks; %d are the most", p->shape.tp, p->shape.dp, n,
                       COMM_RANKS_MAX);
    if (p->devices && (uint64_t)n > p->devices)
        return err_set(err, ERR_CONFIG, "--tp %d --dp %d takes %d devices, there are %llu", p->shape.tp,
                       p->shape.dp, n, (unsigned long long)p->devices);
    if ((uint32_t)p->shape.dp > p->inner.batch)
        return err_set(err, ERR_CONFIG,
                       "a batch of %u samples leaves some of %d data-parallel ranks without any: take "
                       "a larger --batch, or fewer of them", p->inner.batch, p->shape.dp);
    return 0;
}

/* False: not even one sample at once. Activations have as much room as --activations says; where that is
 * not given, all that a device has, and no more than there is elsewhere. */
static bool weigh(struct plan *p, const struct kernels *k) {
    size_t bytes = (size_t)share(p), elsewhere;
    engine_plan(&p->m, &p->inner, k, &p->shape, &p->needs);
    elsewhere = taken(p, &p->needs) - p->needs.all;
    bytes = bytes > elsewhere ? bytes - elsewhere : 0;
    bool any = engine_widest(&p->m, &p->inner, k, &p->shape, bytes, &p->widest) == 0;
    bool unlimited = p->devices && !p->shape.activation_bytes;
    if (any && (unlimited || (double)taken(p, &p->needs) > share(p))) {
        p->shape.activation_bytes = p->widest.activations;
        engine_plan(&p->m, &p->inner, k, &p->shape, &p->needs);
    }
    return any && (double)taken(p, &p->needs) <= share(p);
}

/* All devices, with the least said between ranks first: whole replicas; slices of moments, of gradients, of
 * parameters, once a step each; then tensor-parallel ranks, which speak in every layer. */
static int choose(struct plan *p, const struct kernels *k, struct err *err) {
    const struct plan asked = *p;
    struct plan least = *p;
    struct err ignored;
    bool any = false;
    for (int tp = 1; (uint64_t)tp <= asked.devices; tp++) {
        if (asked.devices % (uint64_t)tp || (asked.tp && tp != asked.shape.tp)) continue;
        for (int shard = 0; engine_shard_name(shard); shard++) {
            if ((asked.shard && shard != (int)asked.shape.shard) ||
                (shard && (uint64_t)tp == asked.devices)) continue;
            *p = asked;
            p->shape.tp = tp;
            p->shape.dp = asked.dp ? asked.shape.dp : (int)(asked.devices / (uint64_t)tp);
            p->shape.shard = (enum engine_shard)shard;
            if (check_mesh(p, any ? &ignored : err)) continue;
            if (weigh(p, k)) return 0;
            if (!any || p->widest.all < least.widest.all) least = *p;
            any = true;
        }
    }
    if (!any) return -1; /* why not is said */
    *p = least;
    const char *advice = p->precision == TRAINER_FP32     ? "--precision bf16, "
                         : p->inner.states == STATES_FP32 ? "--states 8bit, "
                                                          : "";
    return err_set(err, ERR_MEMORY,
                   "no mesh of %llu devices fits: the least, --tp %d --dp %d --shard %s with one sample at once, "
                   "takes %.1f GB of %.1f of each; take a smaller model, %sa shorter --sequence, or more devices",
                   (unsigned long long)p->devices, p->shape.tp, p->shape.dp,
                   engine_shard_name((int)p->shape.shard), (double)p->widest.all / 1e9, p->memory / 1e9, advice);
}

/* ---- what is said ------------------------------------------------------------------------------ */

/* Of the node, not of a rank: the agent's anchor and outer momentum, and copies that go between agent,
 * trainer and disk: what the trainer reads, two that it writes, and the saved state. */
static double anchor_bytes(const struct plan *p) { return 8.0 * (double)proto_model_elements(&p->m); }
static double copies_bytes(const struct plan *p) { return 24.0 * (double)proto_model_elements(&p->m); }

static void print_json(const struct plan *p) {
    const struct engine_memory *e = &p->needs;
    printf("{\"parameters\": %llu, \"tp\": %d, \"dp\": %d, \"shard\": \"%s\", \"weights\": %zu, "
           "\"gradients\": %zu, \"optimizer\": %zu, \"activations\": %zu, \"scratch\": %zu, "
           "\"buffers\": %zu, \"all\": %zu, \"host_optimizer\": %zu, "
           "\"memory\": %.0f, \"micro_batch\": %u, \"computed_twice\": \"%s\", \"widest\": %u, "
           "\"widest_computed_twice\": \"%s\", \"host_anchor\": %.0f, \"host_copies\": %.0f}\n",
           (unsigned long long)proto_model_elements(&p->m), p->shape.tp, p->shape.dp,
           engine_shard_name((int)p->shape.shard), e->weights, e->gradients, e->optimizer, e->activations,
           e->scratch, e->buffers, e->all, e->host, share(p), e->micro_batch, training_name(e->training),
           p->widest.micro_batch, training_name(p->widest.training), anchor_bytes(p), copies_bytes(p));
}

static void print_table(const struct plan *p) {
    const struct engine_memory *e = &p->needs;
    static const char offloaded[] = "in host memory";
    const struct {
        const char *what;
        double bytes;
    } row[] = {
        { "weights", (double)e->weights },
        { "gradients", (double)e->gradients },
        { "optimizer", (double)e->optimizer },
        { "activations", (double)e->activations },
        { "scratch", (double)e->scratch },
        { "buffers", (double)e->buffers },
        { "all", (double)e->all },
        { offloaded, (double)e->host },
        { "there is", share(p) },
    };
    printf("%llu parameters in %s, %s with moments in %s; %u samples of %u tokens a step\n",
           (unsigned long long)proto_model_elements(&p->m), trainer_precision_name(p->precision),
           optimizer_name(p->inner.optimizer), states_name(p->inner.states), p->inner.batch, p->m.sequence);
    printf("each of %d ranks, --tp %d --dp %d --shard %s; %u samples at once; computed twice: %s\n", ranks(p),
           p->shape.tp, p->shape.dp, engine_shard_name((int)p->shape.shard), e->micro_batch,
           training_name(e->training));
    for (size_t i = 0; i < sizeof row / sizeof *row; i++)
        if (row[i].bytes > 0 || row[i].what != offloaded)
            printf("  %-18s %10.1f MB\n", row[i].what, row[i].bytes / 1e6);
    printf("widest: %u samples at once, computed twice: %s; with --activations %.3g\n", p->widest.micro_batch,
           training_name(p->widest.training), (double)p->widest.activations / 1e9);
    printf("the node's host memory: anchor and outer momentum %.1f MB; copies between agent, trainer and "
           "disk %.1f MB\n", anchor_bytes(p) / 1e6, copies_bytes(p) / 1e6);
}

static int refuse(const struct plan *p, struct err *err) {
    return err_set(err, ERR_MEMORY,
                   "%s takes %.2f GB and there are %.2f: take %sa smaller model, or a shorter --sequence",
                   ranks(p) > 1 ? "a rank" : "it", (double)taken(p, &p->needs) / 1e9, share(p) / 1e9,
                   p->precision == TRAINER_BF16_STOCHASTIC ? "" : "--precision bf16-stochastic, ");
}

static int plan(struct plan *p, int json, struct err *err) {
    const struct mesh mesh = { .ranks = p->devices ? 1 : ranks(p) };
    int threads = mesh_threads(&mesh, (int)p->threads), stochastic = p->precision == TRAINER_BF16_STOCHASTIC;
    struct kernels *k = p->precision == TRAINER_FP32 ? kernels_cpu_create(threads, err)
                                                     : kernels_cpu_bf16_create(threads, stochastic, err);
    if (!k) return -1;
    bool chosen = p->devices && !(p->tp && p->dp);
    int rc = chosen ? choose(p, k, err) : check_mesh(p, err);
    bool fit = rc == 0 && (chosen || weigh(p, k));
    k->destroy(k);
    if (rc) return -1;
    if (json) print_json(p);
    else print_table(p);
    return fit ? 0 : refuse(p, err);
}

/* ---- what is asked for ------------------------------------------------------------------------- */

/* "8x80", "8x80GB" */
static int take_devices(const char *text, struct plan *p) {
    unsigned n;
    double gb;
    int used = 0;
    if (sscanf(text, "%2ux%lf%n", &n, &gb, &used) == 2 && (!text[used] || !strcmp(text + used, "GB")) &&
        n >= 1 &&
        n <= COMM_RANKS_MAX && gb > 0.001 && gb < 1e6) {
        p->devices = n;
        p->memory = gb * 1e9;
        return 0;
    }
    fprintf(stderr, "--devices is '%s'; allowed are 1 to %d devices with their memory in GB, as in 8x80\n",
            text,
            COMM_RANKS_MAX);
    return -1;
}

static int take_ranks(const char *flag, const char *text, int *out, bool *given) {
    uint64_t n;
    if (args_integer(flag, text, 1, COMM_RANKS_MAX, &n)) return -1;
    *out = (int)n;
    *given = true;
    return 0;
}

static int take_enum(const char *flag, const char *text, const char *(*name)(int), uint8_t *out) {
    int n;
    if (args_name(flag, text, name, &n)) return -1;
    *out = (uint8_t)n;
    return 0;
}

/* Returns -1 to go on, or the exit code. */
static int parse(int argc, char **argv, struct plan *p, const char **preset, int *json) {
    static const struct option options[] = {
        { "model", required_argument, NULL, 'm' },     { "sequence", required_argument, NULL, 's' },
        { "layers", required_argument, NULL, 'l' },    { "batch", required_argument, NULL, 'b' },
        { "precision", required_argument, NULL, 'p' }, { "optimizer", required_argument, NULL, 'o' },
        { "states", required_argument, NULL, 'S' },    { "devices", required_argument, NULL, 'D' },
        { "tp", required_argument, NULL, 'T' },        { "dp", required_argument, NULL, 'd' },
        { "shard", required_argument, NULL, 'z' },     { "activations", required_argument, NULL, 'a' },
        { "offload", required_argument, NULL, 'O' },
        { "threads", required_argument, NULL, 't' },   { "memory", required_argument, NULL, 'g' },
        { "json", no_argument, NULL, 'j' },            { "help", no_argument, NULL, 'h' },
        { 0 },
    };
    double gb;
    int c, shard, offload;
    optind = 0; /* another tool may have parsed its own arguments in this process */
    while ((c = getopt_long(argc, argv, "h", options, NULL)) != -1) switch (c) {
        case 'm': *preset = optarg; break;
        case 's': if (args_integer("--sequence", optarg, 1, 1u << 20, &p->sequence)) return 2; break;
        case 'l': if (args_integer("--layers", optarg, 1, 1024, &p->layers)) return 2; break;
        case 'b': if (args_integer("--batch", optarg, 1, 1u << 16, &p->batch)) return 2; break;
        case 't': if (args_integer("--threads", optarg, 1, 1024, &p->threads)) return 2; break;
        case 'o': if (take_enum("--optimizer", optarg, optimizer_name, &p->inner.optimizer)) return 2; break;
        case 'S': if (take_enum("--states", optarg, states_name, &p->inner.states)) return 2; break;
        case 'D': if (take_devices(optarg, p)) return 2; break;
        case 'T': if (take_ranks("--tp", optarg, &p->shape.tp, &p->tp)) return 2; break;
        case 'd': if (take_ranks("--dp", optarg, &p->shape.dp, &p->dp)) return 2; break;
        case 'O':
            if (args_name("--offload", optarg, engine_offload_name, &offload)) return 2;
            p->shape.offload = (enum engine_offload)offload;
            break;
        case 'z':
            if (args_name("--shard", optarg, engine_shard_name, &shard)) return 2;
            p->shape.shard = (enum engine_shard)shard;
            p->shard = true;
            break;
        case 'a':
            if (args_real("--activations", optarg, 1e-6, 1e6, &gb)) return 2;
            p->shape.activation_bytes = (size_t)(gb * 1e9);
            break;
        case 'g':
            if (args_real("--memory", optarg, 0.001, 1e6, &gb)) return 2;
            if (!p->devices) p->memory = gb * 1e9;
            break;
        case 'p':
            if (args_name("--precision", optarg, trainer_precision_name, &p->precision)) return 2;
            break;
        case 'j': *json = 1; break;
        case 'h': printf(plan_help, proto_model_preset_names()); return 0;
        default: return args_unknown("plan", argv);
        }
    if (*preset && optind == argc) return -1;
    return args_wrong("plan", *preset ? "too many arguments" : "--model NAME is missing");
}

int tool_plan(int argc, char **argv) {
    struct plan p = { .memory = device_host_bytes(), .shape = { .tp = 1, .dp = 1 } };
    struct err err = { 0 };
    const char *preset = NULL;
    int json = 0, rc = parse(argc, argv, &p, &preset, &json);
    if (rc >= 0) return rc;
    return set_shape(&p, preset, &err) || plan(&p, json, &err) ? args_failed("plan", &err) : 0;
}
