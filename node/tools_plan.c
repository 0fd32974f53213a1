/* tools_plan.c - the command `plan`; see tools.h. */
#include "kernels/kernels.h"
#include "node/engine.h"
#include "node/model.h"
#include "node/tools.h"
#include "node/tools_args.h"
#include "node/trainer.h"
#include "proto/model.h"

#include <getopt.h>
#include <stdio.h>
#include <string.h>

static const char plan_help[] =
    "plan --model NAME [options]\n"
    "\n"
    "What a trainer of a model will hold in memory, before anything is loaded; exit status 1 if it does "
    "not\n"
    "fit. On CPU the sum is within 10 %% of the measured peak, and some 50 MB for libraries come on top.\n"
    "\n"
    "  --model NAME       one of: %s\n"
    "  --sequence N       tokens of a sample (default: the model's)\n"
    "  --layers N         layers (default: the model's)\n"
    "  --batch N          samples of an inner step (default: the model's)\n"
    "  --precision P      fp32 (default), bf16 or bf16-stochastic\n"
    "  --threads N        threads of the trainer (default: all cores)\n"
    "  --memory GB        what there is (default: what this machine has available)\n"
    "  --json             print one JSON object, in bytes\n"
    "\n"
    "Example: plan --model 150m --precision bf16\n";

struct plan {
    struct msg_model m;
    struct msg_inner inner;
    uint64_t sequence, layers, batch, threads;
    int precision;
    double memory; /* bytes */
};

static const char *training_name(int training) {
    static const char *const names[] = {
        "", "nothing", "norms", "norms, SwiGLU", "norms, SwiGLU, gate and up", "all but attention"
    };
    return names[training];
}

static double available_bytes(void) {
    char line[256];
    double kb = 0;
    FILE *f = fopen("/proc/meminfo", "re");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "MemAvailable: %lf", &kb) == 1) break;
    if (f) fclose(f);
    return 1024 * kb;
}

static int take_precision(const char *text, int *out) {
    for (int i = 0; trainer_precision_name(i); i++)
        if (!strcmp(text, trainer_precision_name(i))) return *out = i, 0;
    return -1;
}

static int set_shape(struct plan *p, const char *preset, struct err *err) {
    float std;
    if (proto_model_preset(preset, &p->m, err) ||
        proto_inner_preset(preset, 1000000000, &p->inner, &std, err))
        return -1;
    if (p->sequence) p->m.sequence = (uint32_t)p->sequence;
    if (p->layers) p->m.layers = (uint32_t)p->layers;
    if (p->batch) p->inner.batch = (uint32_t)p->batch;
    return proto_model_check(&p->m, err) || proto_inner_check(&p->inner, err) ? -1 : 0;
}

static void print_json(const struct plan *p, const struct engine_memory *e) {
    printf("{\"parameters\": %llu, \"weights\": %zu, \"gradients\": %zu, \"optimizer\": %zu, "
           "\"activations\": %zu, "
           "\"scratch\": %zu, \"all\": %zu, \"memory\": %.0f, \"micro_batch\": %u, \"computed_twice\": "
           "\"%s\"}\n",
           (unsigned long long)proto_model_elements(&p->m), e->weights, e->gradients, e->optimizer,
           e->activations, e->scratch, e->all, p->memory, e->micro_batch, training_name(e->training));
}

static void print_table(const struct plan *p, const struct engine_memory *e) {
    const struct {
        const char *what;
        size_t bytes;
    } row[] = {
        { "weights", e->weights },          { "gradients", e->gradients },
        { "optimizer", e->optimizer }, { "activations", e->activations },
        { "scratch", e->scratch },          { "all", e->all },
    };
    printf("%llu parameters in %s, %u samples of %u tokens a step, %u at once; computed twice: %s\n",
           (unsigned long long)proto_model_elements(&p->m), trainer_precision_name(p->precision),
           p->inner.batch, p->m.sequence, e->micro_batch, training_name(e->training));
    for (size_t i = 0; i < sizeof row / sizeof *row; i++)
        printf("  %-18s %10.1f MB\n", row[i].what, (double)row[i].bytes / 1e6);
    printf("  %-18s %10.1f MB\n", "there is", p->memory / 1e6);
}

static int plan(struct plan *p, int json, struct err *err) {
    struct engine_memory e;
    int threads = (int)p->threads, stochastic = p->precision == TRAINER_BF16_STOCHASTIC;
    struct kernels *k = p->precision == TRAINER_FP32 ? kernels_cpu_create(threads, err)
                                                     : kernels_cpu_bf16_create(threads, stochastic, err);
    if (!k) return -1;
    engine_plan(&p->m, &p->inner, k, &e);
    k->destroy(k);
    if (json) print_json(p, &e);
    else print_table(p, &e);
    if ((double)e.all <= p->memory) return 0;
    return err_set(err, ERR_MEMORY,
                   "it takes %.1f GB and there are %.1f: take %sa smaller model, or a shorter "
                   "--sequence",
                   (double)e.all / 1e9, p->memory / 1e9,
                   p->precision == TRAINER_BF16_STOCHASTIC ? "" : "--precision bf16-stochastic, ");
}

int tool_plan(int argc, char **argv) {
    static const struct option options[] = {
        { "model", required_argument, NULL, 'm' },
        { "sequence", required_argument, NULL, 's' },
        { "layers", required_argument, NULL, 'l' },
        { "batch", required_argument, NULL, 'b' },
        { "precision", required_argument, NULL, 'p' },
        { "threads", required_argument, NULL, 't' },
        { "memory", required_argument, NULL, 'g' },
        { "json", no_argument, NULL, 'j' },
        { "help", no_argument, NULL, 'h' },
        { 0 },
    };
    struct plan p = { .memory = available_bytes() };
    struct err err;
    const char *preset = NULL;
    double gb = 0;
    int json = 0, c;
    optind = 0; /* another tool may have parsed its own arguments in this process */
    while ((c = getopt_long(argc, argv, "h", options, NULL)) != -1) switch (c) {
        case 'm':
            preset = optarg;
            break;
        case 's':
            if (args_integer("--sequence", optarg, 1, 1u << 20, &p.sequence)) return 2;
            break;
        case 'l':
            if (args_integer("--layers", optarg, 1, 1024, &p.layers)) return 2;
            break;
        case 'b':
            if (args_integer("--batch", optarg, 1, 1u << 16, &p.batch)) return 2;
            break;
        case 't':
            if (args_integer("--threads", optarg, 1, 1024, &p.threads)) return 2;
            break;
        case 'g':
            if (args_real("--memory", optarg, 0.001, 1e6, &gb)) return 2;
            break;
        case 'p':
            if (take_precision(optarg, &p.precision))
                return args_wrong("plan", "--precision: fp32, bf16 or bf16-stochastic");
            break;
        case 'j':
            json = 1;
            break;
        case 'h':
            printf(plan_help, proto_model_preset_names());
            return 0;
        default:
            return 2;
        }
    if (!preset || optind < argc)
        return args_wrong("plan", preset ? "too many arguments" : "which --model?");
    if (gb > 0) p.memory = gb * 1e9;
    return set_shape(&p, preset, &err) || plan(&p, json, &err) ? args_failed("plan", &err) : 0;
}
