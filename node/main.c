/* main.c - the command line of intellect-node: which command, and the options of join and run. The
 * tools parse their own (tools.h). */
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/comm.h"
#include "node/agent.h"
#include "node/device.h"
#include "node/doctor.h"
#include "node/engine.h"
#include "node/home.h"
#include "node/tools.h"
#include "node/tools_args.h"
#include "node/tools_ckpt.h"
#include "node/trainer.h"
#include "proto/proto.h"

#define THREADS_MAX 1024
#ifndef INTELLECT_VERSION
#define INTELLECT_VERSION "unknown" /* the Makefile knows */
#endif

static const char join_help[] =
    "intellect-node join INVITE [options]\n"
    "\n"
    "Become a member of a run and train until it is over or you stop it. INVITE is the line you were\n"
    "given, \"-\" to read it from standard input, or @FILE to read it from a file (others on this\n"
    "machine can see a command line, but not those). Joining again with the same invite is harmless.\n"
    "\n"
    "  --home DIR         identity, state and settings (default: $INTELLECT_HOME, else\n"
    "                     ~/.local/share/intellect); one running node per folder\n"
    "  --name NAME        how others see this node (default: the host's name)\n"
    "  --aggregate-only   hold the model and sum for others, but do not train\n";
static const char run_help[] =
    "intellect-node run [options]\n"
    "\n"
    "Go on with the run that this home has joined.\n"
    "\n"
    "  --home DIR         the folder given to join (default: $INTELLECT_HOME, else\n"
    "                     ~/.local/share/intellect)\n"
    "  --name NAME        as with join\n";
static const char node_help[] =
    DEVICE_HELP
    "  --threads N        threads for training (default: all cores)\n"
    "  --tp N, --dp N     train as N x N processes: tensor-parallel by data-parallel ranks (default: 1).\n"
    "                     On GPUs cuda:each gives each rank its own, cuda all of them one\n"
    "  --shard S          what data-parallel ranks share out: none (default), optimizer (ZeRO-1),\n"
    "                     gradients (ZeRO-2), full (ZeRO-3); each saves memory\n"
    "  --precision P      fp32 (default); bf16: weights and activations in bf16, about 1.7 times as fast\n"
    "                     with AVX512-BF16; bf16-stochastic: and half the memory for weights\n"
    "  --activations GB   of a rank at most (default: 2.1), as in `train --help`; `plan` says what fits\n"
    "  --offload W        none (default), or optimizer: its moments lie in the host's memory, as in\n"
    "                     `train --help`\n"
    "  --nice N           how far training stands back behind other programs, 0 to 19 (default: 10)\n"
    "  --corpus PATH      where this machine has the corpus, or an https:// or s3:// URL from where\n"
    "                     samples then come (default: where the run says); it must be the very same\n"
    "  --listen PORT      let other members connect here (default: any free port)\n"
    "  --no-listen        only connect to others, for machines behind NAT\n"
    "  --log-json         one JSON object a line\n"
    "  --quiet            warnings and errors only\n"
    "  --verbose          everything\n"
    "\n"
    "Ctrl-C leaves in order: the moments are saved and the coordinator is told. A second Ctrl-C\n"
    "quits at once, which loses the moments since they were last saved and nothing else.\n"
    "\n";

static int misuse(const char *command, const char *text, const char *what) {
    fprintf(stderr, "intellect-node %s: %s%s%s; see intellect-node %s --help\n", command, text,
            what ? " " : "", what ? what : "", command);
    return 2;
}

static int failed(const char *command, const struct err *err) {
    fprintf(stderr, "intellect-node %s: %s\n", command, err->msg);
    return err->code == ERR_CONFIG ? 2 : 1;
}

/* ---- join and run ---------------------------------------------------------------------------- */

static int take_number(const char *text, long min, long max, int *out) {
    char *end;
    errno = 0;
    long n = strtol(text, &end, 10);
    if (errno || end == text || *end || n < min || n > max) return -1;
    *out = (int)n;
    return 0;
}

/* What is not fit for the wire would never be sent, and the coordinator never answer. */
static int check_name(const char *name, struct err *err) {
    if (!name) return 0;
    if (!*name || strlen(name) > PROTO_NAME_BYTES_MAX)
        return err_set(err, ERR_CONFIG, "--name: 1 to %d bytes", PROTO_NAME_BYTES_MAX);
    if (proto_text_is_clean((const uint8_t *)name, strlen(name))) return 0;
    return err_set(err, ERR_CONFIG, "--name: UTF-8 without control characters");
}

enum { OPT_HOME = 256, OPT_NAME, OPT_AGGREGATE, OPT_DEVICE, OPT_THREADS, OPT_PRECISION, OPT_NICE, OPT_CORPUS,
       OPT_TP, OPT_DP, OPT_SHARD, OPT_ACTIVATIONS, OPT_OFFLOAD, OPT_LISTEN, OPT_NO_LISTEN, OPT_JSON, OPT_QUIET,
       OPT_VERBOSE, OPT_HELP };
static const struct option node_options[] = {
    { "home", required_argument, NULL, OPT_HOME }, { "name", required_argument, NULL, OPT_NAME },
    { "device", required_argument, NULL, OPT_DEVICE },
    { "threads", required_argument, NULL, OPT_THREADS },
    { "precision", required_argument, NULL, OPT_PRECISION },
    { "tp", required_argument, NULL, OPT_TP }, { "dp", required_argument, NULL, OPT_DP },
    { "shard", required_argument, NULL, OPT_SHARD },
    { "activations", required_argument, NULL, OPT_ACTIVATIONS },
    { "offload", required_argument, NULL, OPT_OFFLOAD },
    { "nice", required_argument, NULL, OPT_NICE }, { "corpus", required_argument, NULL, OPT_CORPUS },
    { "listen", required_argument, NULL, OPT_LISTEN },
    { "no-listen", no_argument, NULL, OPT_NO_LISTEN }, { "log-json", no_argument, NULL, OPT_JSON },
    { "quiet", no_argument, NULL, OPT_QUIET }, { "verbose", no_argument, NULL, OPT_VERBOSE },
    { "help", no_argument, NULL, OPT_HELP },
    { "aggregate-only", no_argument, NULL, OPT_AGGREGATE }, { 0 }
};

static int take_gigabytes(const char *text, uint64_t *out) {
    char *end;
    double gb = strtod(text, &end);
    if (end == text || *end || !(gb >= 1e-6 && gb <= 1e6)) return -1;
    *out = (uint64_t)(gb * 1e9);
    return 0;
}

/* Which of a list's names it is. */
static int take_name(const char *text, const char *(*name)(int), int *out) {
    for (int i = 0; name(i); i++)
        if (!strcmp(text, name(i))) {
            *out = i;
            return 0;
        }
    return -1;
}

/* One option into *o. Returns 0, or a complaint. */
static const char *take_option(int c, struct agent_options *o) {
    switch (c) {
    case OPT_HOME: o->home = optarg; return NULL;
    case OPT_NAME: o->name = optarg; return NULL;
    case OPT_AGGREGATE: o->aggregate_only = true; return NULL;
    case OPT_DEVICE:
        return device_parse(optarg, &o->device, NULL) ? "--device: auto, cpu, cuda, cuda:N or cuda:each" : NULL;
    case OPT_THREADS:
        return take_number(optarg, 1, THREADS_MAX, &o->threads)
                   ? "--threads: a number from 1 to 1024"
                   : NULL;
    case OPT_PRECISION:
        return take_name(optarg, trainer_precision_name, &o->precision)
                   ? "--precision: fp32, bf16 or bf16-stochastic" : NULL;
    case OPT_TP:
        return take_number(optarg, 1, COMM_RANKS_MAX, &o->tp) ? "--tp: a number from 1 to 64" : NULL;
    case OPT_DP:
        return take_number(optarg, 1, COMM_RANKS_MAX, &o->dp) ? "--dp: a number from 1 to 64" : NULL;
    case OPT_SHARD:
        return take_name(optarg, engine_shard_name, &o->shard)
                   ? "--shard: none, optimizer, gradients or full" : NULL;
    case OPT_ACTIVATIONS:
        return take_gigabytes(optarg, &o->activation_bytes)
                   ? "--activations: gigabytes, from 1e-6 to 1e6" : NULL;
    case OPT_OFFLOAD:
        return take_name(optarg, engine_offload_name, &o->offload) ? "--offload: none or optimizer" : NULL;
    case OPT_NICE:
        return take_number(optarg, 0, 19, &o->nice) ? "--nice: a number from 0 to 19" : NULL;
    case OPT_CORPUS: o->corpus = optarg; return NULL;
    case OPT_LISTEN:
        return take_number(optarg, 1, 65535, &o->listen_port) ? "--listen: a port from 1 to 65535"
                                                              : NULL;
    case OPT_NO_LISTEN: o->listen_port = -1; return NULL;
    case OPT_JSON: o->log_json = true; return NULL;
    case OPT_QUIET: o->quiet = true; return NULL;
    case OPT_VERBOSE: o->verbose = true; return NULL;
    case ':': return "a value is missing after";
    default: return "unknown option";
    }
}

static void print_node_help(bool joins) {
    fputs(joins ? join_help : run_help, stdout);
    fputs(node_help, stdout);
    puts(joins ? "example: intellect-node join @invite.txt --threads 4 --name \"my workstation\""
               : "example: intellect-node run --threads 4");
}

static int run_node(int argc, char **argv, bool joins) {
    struct agent_options o = { .device = { DEVICE_AUTO, 0 }, .nice = 10 };
    struct invite invite;
    struct err err = {0};
    const char *complaint;
    optind = 1;
    for (int c; (c = getopt_long(argc, argv, ":", node_options, NULL)) != -1;) {
        if (c == OPT_HELP) {
            print_node_help(joins);
            return 0;
        }
        if (c == OPT_AGGREGATE && !joins)
            return misuse(argv[0], "--aggregate-only was settled by join", NULL);
        if ((complaint = take_option(c, &o)))
            return misuse(argv[0], complaint, c == '?' || c == ':' ? argv[optind - 1] : NULL);
    }
    if (argc - optind > joins)
        return misuse(argv[0], "one argument too many:", argv[optind + joins]);
    if (argc - optind < joins) return misuse(argv[0], "the invite is missing", NULL);
    if (check_name(o.name, &err)) return failed(argv[0], &err);
    if (joins) {
        if (args_invite(argv[optind], &invite, &err)) return failed(argv[0], &err);
        o.invite = &invite;
    }
    if (!agent_run(&o, &err)) return 0;
    failed(argv[0], &err);
    return 1;
}

static int command_join(int argc, char **argv) { return run_node(argc, argv, true); }
static int command_run(int argc, char **argv) { return run_node(argc, argv, false); }

/* ---- which command --------------------------------------------------------------------------- */

/* What the agent starts; not for people. */
static int command_trainer(int argc, char **argv) {
    int fd;
    if (argc != 3 || strcmp(argv[1], "--fd") || take_number(argv[2], 0, 1 << 20, &fd))
        return misuse("run", "`trainer` is started by the node itself", NULL);
    return trainer_main(fd);
}

static const struct command {
    const char *name, *help; /* help: NULL = not listed */
    int (*run)(int argc, char **argv);
} commands[] = {
    { "join", "become a member of a run, with an invite, and train", command_join },
    { "run", "go on with the run that was joined", command_run },
    { "doctor", "can this machine join, and how fast will it be", tool_doctor },
    { "train", "train a model alone, without a coordinator", tool_train },
    { "data", "turn texts into a corpus, or several into one", tool_data },
    { "bigram", "loss of a byte model of order 2, to compare with", tool_bigram },
    { "plan", "what training a model takes in memory", tool_plan },
    { "eval", "mean loss of a checkpoint on a text", tool_eval },
    { "generate", "let a checkpoint write", tool_generate },
    { "inspect", "what is in a checkpoint", tool_inspect },
    { "verify", "check signatures and digests of a checkpoint", tool_verify },
    { "fetch", "bring a checkpoint from a store to this disk", tool_fetch },
    { "export", "make a Hugging Face folder of a checkpoint", tool_export },
    { "import", "check a Hugging Face folder of a Llama model, and make it one of ours", tool_import },
    { "trainer", NULL, command_trainer },
};
#define COMMANDS (sizeof commands / sizeof *commands)

static void print_help(FILE *out) {
    fputs("intellect-node COMMAND ... - a training node of an intellect run\n\n", out);
    for (size_t i = 0; i < COMMANDS; i++)
        if (commands[i].help) fprintf(out, "  %-10s %s\n", commands[i].name, commands[i].help);
    fputs("\nintellect-node COMMAND --help explains a command; intellect-node --version says which this is.\n"
          "example: intellect-node join @invite.txt\n",
          out);
}

int main(int argc, char **argv) {
    struct err err = {0};
    if (argc < 2) {
        print_help(stderr);
        return 2;
    }
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help")) {
        print_help(stdout);
        return 0;
    }
    if (!strcmp(argv[1], "--version")) {
        puts("intellect-node " INTELLECT_VERSION);
        return 0;
    }
    opterr = 0; /* what is wrong with an option is said in our words */
    if (proto_init(&err)) return failed(argv[1], &err);
    for (size_t i = 0; i < COMMANDS; i++)
        if (!strcmp(argv[1], commands[i].name)) return commands[i].run(argc - 1, argv + 1);
    fprintf(stderr, "intellect-node: unknown command \"%s\"; intellect-node --help lists them\n",
            argv[1]);
    return 2;
}
