/* tools_train.c - the command `train`; see tools.h. */
#include "ckpt/ckpt.h"
#include "ckpt/corpus.h"
#include "kernels/comm.h"
#include "node/curve.h"
#include "node/engine.h"
#include "node/solo.h"
#include "node/tools.h"
#include "node/tools_args.h"
#include "node/trainer.h"

#include <errno.h>
#include <getopt.h>
#include <libgen.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char train_help[] =
    "intellect-node train CONFIG [options]\n"
    "\n"
    "Train a model alone, without a coordinator: the network, corpus, schedule and seeds of CONFIG, which\n"
    "is the run.yaml that `intellect-coordinator init` writes and explains; sections `model`, `corpus`\n"
    "and `inner` count here. The shortest one is\n"
    "\n"
    "  model: {preset: 10m}\n"
    "  corpus: {manifest: path/to/corpus}\n"
    "\n"
    "Everything goes to a folder. Ctrl-C stops after the current step; the same command goes on from\n"
    "there, and ends with the same bits as if it had not been stopped. After a kill or a power cut it\n"
    "goes on from what was saved last. At the end DIR/model is the trained model: a Hugging Face folder,\n"
    "for `eval`, `generate`, `train --from` and transformers.\n"
    "\n"
    "  --out DIR          the folder (default: CONFIG's, with .out in place of .yaml)\n"
    "  --from URL         begin with the parameters of this model: a checkpoint of a run, its store, or a\n"
    "                     Hugging Face folder of a Llama model (file://, s3://, https:// or a path). Its\n"
    "                     network is taken where CONFIG says nothing; moments begin at zero\n"
    "  --set SECTION.KEY=VALUE  any setting of CONFIG; may be given several times\n"
    "  --tp N, --dp N     train as N x N processes: tensor-parallel by data-parallel ranks (default: 1).\n"
    "                     On GPUs cuda:each gives each rank its own, cuda all of them one\n"
    "  --shard S          what data-parallel ranks share out: none (default), optimizer (ZeRO-1),\n"
    "                     gradients (ZeRO-2), full (ZeRO-3); each saves memory\n"
    "  --precision P      fp32 (default), bf16 or bf16-stochastic, as in `join --help`\n"
    DEVICE_HELP
    "  --activations GB   of a rank at most (default: 2.1): a batch that takes more goes in parts, whose\n"
    "                     gradients are added up; where one sample takes more, some is computed twice\n"
    "  --offload W        none (default), or optimizer: its moments lie in the host's memory, 8 bytes a\n"
    "                     parameter with AdamW, and go over a GPU's link once a step; not so on the CPU\n"
    "  --threads N        CPU threads of all ranks together (default: all cores)\n"
    "  --stop-after N     stop once N steps are done in all; the schedule stays that of CONFIG\n"
    "  --save-steps N     save every N steps (default 200), and at the end\n"
    "  --keep             keep every state that is saved, as DIR/state-STEP: 12 bytes a parameter each;\n"
    "                     training then waits for a disk that is slower\n"
    "  --replay STEP      do not train: compute again from the kept state before STEP, and hold what\n"
    "                     comes out against that of STEP, bit by bit; the same mesh, precision and\n"
    "                     threads as then. Exit status 1, and the first tensor that differs, if one does\n"
    "  --heldout N        at the end, the mean loss of the first N held-out samples (default 64)\n"
    "  --plot FILE.svg    draw the loss curve when it ends; DIR/loss.csv has it in numbers\n"
    "  --silence S        give up when one of several ranks says nothing for so many seconds: it hangs\n"
    "                     (default 600; 0: wait for it); the same command goes on from what was saved\n"
    "  --quiet            no lines about progress\n"
    "  --json             print one JSON object at the end: steps, tokens, loss, heldout, tokens_per_s,\n"
    "                     data_share\n"
    "\n"
    "example: intellect-node train run.yaml --dp 2 --shard optimizer --plot loss.svg\n";

#define SETS_MAX 64

struct train_wish {
    const char *config, *out, *plot, *from, *set[SETS_MAX];
    char folder[PATH_MAX];
    int sets, json;
    struct solo_options solo;
};

/* ---- what is asked for ------------------------------------------------------------------------- */

static int take_number(const char *flag, const char *text, uint64_t min, uint64_t max, int *out) {
    uint64_t n;
    if (args_integer(flag, text, min, max, &n)) return -1;
    *out = (int)n;
    return 0;
}

static int take_set(struct train_wish *w, const char *text) {
    if (w->sets == SETS_MAX) {
        fprintf(stderr, "--set may be given %d times; write them into CONFIG\n", SETS_MAX);
        return -1;
    }
    w->set[w->sets++] = text;
    return 0;
}

/* Returns -1 to go on, or the exit code. */
static int parse(int argc, char **argv, struct train_wish *w) {
    static const struct option options[] = {
        { "out", required_argument, NULL, 'o' },        { "set", required_argument, NULL, 's' },
        { "tp", required_argument, NULL, 't' },         { "dp", required_argument, NULL, 'd' },
        { "shard", required_argument, NULL, 'S' },      { "precision", required_argument, NULL, 'p' },
        { "device", required_argument, NULL, 'D' },
        { "threads", required_argument, NULL, 'n' },    { "stop-after", required_argument, NULL, 'a' },
        { "save-steps", required_argument, NULL, 'e' }, { "heldout", required_argument, NULL, 'H' },
        { "activations", required_argument, NULL, 'A' }, { "offload", required_argument, NULL, 'O' },
        { "keep", no_argument, NULL, 'k' },             { "replay", required_argument, NULL, 'R' },
        { "plot", required_argument, NULL, 'P' },       { "from", required_argument, NULL, 'f' },
        { "silence", required_argument, NULL, 'i' },    { "quiet", no_argument, NULL, 'q' },
        { "json", no_argument, NULL, 'j' },             { "help", no_argument, NULL, 'h' },
        { 0 },
    };
    struct solo_options *o = &w->solo;
    double gigabytes;
    int c;
    optind = 0; /* another tool may have parsed its own arguments in this process */
    while ((c = getopt_long(argc, argv, "h", options, NULL)) != -1) switch (c) {
        case 'o': w->out = optarg; break;
        case 's': if (take_set(w, optarg)) return 2; break;
        case 't': if (take_number("--tp", optarg, 1, COMM_RANKS_MAX, &o->tp)) return 2; break;
        case 'd': if (take_number("--dp", optarg, 1, COMM_RANKS_MAX, &o->dp)) return 2; break;
        case 'S': if (args_name("--shard", optarg, engine_shard_name, &o->shard)) return 2; break;
        case 'p':
            if (args_name("--precision", optarg, trainer_precision_name, &o->precision)) return 2;
            break;
        case 'D': if (args_device(optarg, &o->device)) return 2; break;
        case 'n': if (take_number("--threads", optarg, 1, 1024, &o->threads)) return 2; break;
        case 'A':
            if (args_real("--activations", optarg, 1e-6, 1e6, &gigabytes)) return 2;
            o->activation_bytes = (size_t)(gigabytes * 1e9);
            break;
        case 'O': if (args_name("--offload", optarg, engine_offload_name, &o->offload)) return 2; break;
        case 'a': if (args_integer("--stop-after", optarg, 1, UINT64_MAX, &o->stop_after)) return 2; break;
        case 'e': if (args_integer("--save-steps", optarg, 1, UINT64_MAX, &o->save_steps)) return 2; break;
        case 'H': if (args_integer("--heldout", optarg, 0, UINT32_MAX, &o->heldout_samples)) return 2; break;
        case 'i': if (take_number("--silence", optarg, 0, 86400, &o->silence_s)) return 2; break;
        case 'k': o->keep = true; break;
        case 'R': if (args_integer("--replay", optarg, 1, UINT64_MAX, &o->replay)) return 2; break;
        case 'P': w->plot = optarg; break;
        case 'f': w->from = optarg; break;
        case 'q': o->quiet = true; break;
        case 'j': w->json = 1; o->quiet = true; break;
        case 'h': fputs(train_help, stdout); return 0;
        default: return args_unknown(argv[0], argv);
        }
    if (optind + 1 == argc && (w->config = argv[optind])) return -1;
    args_wrong(argv[0], "one configuration is needed");
    return 2;
}

/* ---- the configuration ------------------------------------------------------------------------- */

/* A path is taken from where the person is, as every other argument; a setting of CONFIG is not. */
static int take_from(struct settings *s, const char *from, struct err *err) {
    char path[PATH_MAX], assignment[PATH_MAX + 16];
    if (!strstr(from, "://") && !realpath(from, path)) return err_set_errno(err, "--from %.150s", from);
    snprintf(assignment, sizeof assignment, "model.from=%s", strstr(from, "://") ? from : path);
    return settings_set(s, assignment, err);
}

static int take_network(struct settings *s, const struct corpus_facts *corpus, struct err *err) {
    struct ckpt *c = ckpt_open(s->from, NULL, err);
    if (!c) {
        err_prefix(err, "model.from");
        return -1;
    }
    settings_take_model(s, ckpt_model(c), corpus);
    ckpt_close(c);
    return 0;
}

static int read_settings(const struct train_wish *w, struct settings *s, struct corpus_facts *corpus,
                         struct err *err) {
    char path[PATH_MAX];
    settings_init(s);
    if (!realpath(w->config, path)) return err_set_errno(err, "%.150s", w->config);
    if (settings_load(s, path, err)) return -1;
    for (int i = 0; i < w->sets; i++)
        if (settings_set(s, w->set[i], err)) return -1;
    if (w->from && take_from(s, w->from, err)) return -1;
    if (!*s->corpus)
        return err_set(err, ERR_CONFIG, "%.100s names no corpus: set corpus.manifest to what `intellect-node "
                       "data` wrote", w->config);
    const char *dir = dirname(path);
    return corpus_facts_open(s, dir, corpus, err) || (*s->from && take_network(s, corpus, err)) ||
                   settings_resolve(s, dir, corpus, err) ? -1 : 0;
}

/* run.yaml -> run.out, any other name -> name.out */
static void default_folder(const char *config, char out[PATH_MAX]) {
    size_t n = strlen(config);
    if (n > 5 && !strcmp(config + n - 5, ".yaml")) n -= 5;
    snprintf(out, PATH_MAX, "%.*s.out", (int)n, config);
}

static void print_number(const char *key, double x) {
    if (isfinite(x)) printf(", \"%s\": %.9g", key, x);
    else printf(", \"%s\": null", key);
}

static void print_result(const struct train_wish *w, const struct solo_result *r) {
    unsigned long long steps = r->steps, total = r->steps_total, tokens = r->tokens;
    if (!w->json) {
        printf("%s after %llu of %llu steps, %llu tokens", r->stopped ? "stopped" : "ended", steps, total, tokens);
        if (isfinite(r->loss)) printf("; loss %.4f", r->loss);
        else printf("; no step was left to do");
        if (isfinite(r->heldout)) printf(", held-out %.4f", r->heldout);
        if (isfinite(r->loss))
            printf("; %.0f tokens/s, %.2f %% of the time waited for samples", r->tokens_per_s, 100 * r->data_share);
        putchar('\n');
        return;
    }
    printf("{\"steps\": %llu, \"steps_total\": %llu, \"tokens\": %llu", steps, total, tokens);
    print_number("loss", r->loss);
    print_number("heldout", r->heldout);
    print_number("tokens_per_s", r->tokens_per_s);
    print_number("data_share", r->data_share);
    puts("}");
}

/* Hours of training must not end with a picture that cannot be drawn. The folder of --out may come yet. */
static int check_plot(const struct train_wish *w, struct err *err) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s", w->plot);
    const char *there = access(w->plot, F_OK) ? dirname(path) : w->plot;
    if (!access(there, W_OK) || (errno == ENOENT && !strcmp(there, w->solo.out))) return 0;
    return err_set_errno(err, "--plot %.150s", w->plot);
}

static int train(struct train_wish *w, struct settings *s, struct err *err) {
    char csv[PATH_MAX + 16];
    struct corpus_facts corpus;
    struct solo_result r;
    if (read_settings(w, s, &corpus, err)) return -1;
    default_folder(w->config, w->folder);
    w->solo.out = w->out ? w->out : w->folder;
    if (w->plot && check_plot(w, err)) return -1;
    if (solo_run(&w->solo, s, &corpus, &r, err)) return -1;
    if (w->solo.replay) {
        printf("step %llu: the same bits again\n", (unsigned long long)w->solo.replay);
        return 0;
    }
    print_result(w, &r);
    snprintf(csv, sizeof csv, "%s/loss.csv", w->solo.out);
    return w->plot ? curve_plot(csv, w->plot, err) : 0;
}

int tool_train(int argc, char **argv) {
    struct train_wish w = { .solo = { .tp = 1, .dp = 1, .save_steps = 200, .heldout_samples = 64,
                                      .silence_s = 600, .device = { DEVICE_AUTO, 0 } } };
    struct err err = { 0 };
    int rc = parse(argc, argv, &w);
    if (!w.config) return rc;
    struct settings *s = calloc(1, sizeof *s);
    if (!s) err_set(&err, ERR_MEMORY, "no memory for settings");
    rc = !s || train(&w, s, &err) ? args_failed(argv[0], &err) : 0;
    free(s);
    return rc && err.code == ERR_CONFIG ? 2 : rc;
}
