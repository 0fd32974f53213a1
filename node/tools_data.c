/* tools_data.c - the commands `data` and `bigram`; see tools.h. */
#include "node/data.h"
#include "node/progress.h"
#include "node/tools.h"
#include "node/tools_args.h"
#include "proto/proto.h"

#include <getopt.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char data_help[] =
    "intellect-node data [tokenize] --out DIR [options] PATH...\n"
    "\n"
    "Turn texts into a corpus that a run can train on: token files, a held-out slice that is never\n"
    "trained on, and the manifest corpus.json, which is written last. A PATH is a text, JSON lines\n"
    "(.jsonl, .ndjson), either also packed (.gz, .zst), or a folder of such files.\n"
    "\n"
    "  --out DIR          folder to write, made if missing\n"
    "  --sequence N       tokens of one sample; must be the model's sequence (default 128)\n"
    "  --heldout F        share of each token file kept apart at its end, 0 to 0.5 (default 0.02)\n"
    "  --tokenizer T      bytes: vocabulary 256, a token is a byte (default); or the tokenizer.json of a\n"
    "                     Hugging Face model with byte-level BPE, or its folder\n"
    "  --document-end E   token that ends a document, as its text (\"<|end_of_text|>\") or id (0 for texts\n"
    "                     with NUL between them): it is put after each text and JSON line, and attention\n"
    "                     will stay inside each document. none: a text is a document, each a token file\n"
    "                     (default: what the tokenizer calls the end of a text, or none)\n"
    "  --field NAME       of a JSON line that is its text (default text)\n"
    "  --file-tokens N    begin another token file after so many (default 268435456)\n"
    "  --threads N        that tokenise (default: one per core); the corpus is the same\n"
    "  --json             print one JSON object\n"
    "\n"
    "`data mix` makes one corpus of several by weights: data mix --help.\n"
    "\n"
    "example: intellect-node data --out corpus --sequence 128 book1.txt book2.txt\n"
    "example: intellect-node data tokenize --out corpus --sequence 8192 --tokenizer Llama-3.2-1B \\\n"
    "             web/ code.jsonl.zst\n";

static void print_corpus(const char *out, const struct data_info *info, double seconds, int json) {
    char hex[DIGEST_HEX_BYTES];
    digest_hex(&info->manifest_digest, hex);
    if (json)
        printf("{\"samples\": %llu, \"sequence\": %u, \"tokens\": %llu, \"heldout_tokens\": %llu, "
               "\"files\": %u, \"tokenizer\": \"%s\", \"seconds\": %.3f, \"manifest_digest\": \"%s\"}\n",
               (unsigned long long)info->samples, info->sequence, (unsigned long long)info->tokens,
               (unsigned long long)info->heldout_tokens, info->files, info->tokenizer, seconds, hex);
    else
        printf("%s/%s: %llu samples of %u tokens in %u files, %llu tokens held out\nmanifest digest %s\n",
               out, DATA_MANIFEST_NAME, (unsigned long long)info->samples, info->sequence, info->files,
               (unsigned long long)info->heldout_tokens, hex);
}

static void show_tokens(void *arg, const struct data_progress *now) {
    char what[64];
    snprintf(what, sizeof what, "%.1f M tokens", (double)now->tokens / 1e6);
    progress_show(arg, now->bytes, now->bytes_total, now->bytes, what);
}

static int tokenize(const char *name, const char *out, const char *const *paths, int n,
                    const struct data_recipe *wanted, int json) {
    struct progress bar = { 0 };
    struct data_recipe recipe = *wanted;
    struct data_info info;
    struct err err;
    recipe.progress = show_tokens;
    recipe.progress_arg = &bar;
    int rc = data_prepare(out, paths, (uint32_t)n, &recipe, &info, &err);
    progress_end();
    if (rc) return args_failed(name, &err);
    print_corpus(out, &info, progress_seconds(&bar), json);
    return 0;
}

static const char mix_help[] =
    "intellect-node data mix --out DIR [--samples N] [--json] WEIGHT:CORPUS...\n"
    "\n"
    "Make one corpus of several, of one tokenizer and sequence: in each hundred samples, where the\n"
    "weights are percents, so many are of each. DIR gets a manifest that names them; their files stay\n"
    "where they are. CORPUS is a folder or URL.\n"
    "\n"
    "  --out DIR      folder to write, made if missing\n"
    "  --samples N    of the mixture: a corpus that has come to its end begins anew in another order\n"
    "                 (default: as many as there are until one ends)\n"
    "  --json         print one JSON object\n"
    "\n"
    "example: intellect-node data mix --out mixture 55:fineweb-edu 10:fineweb 20:stack-v1 10:dclm \\\n"
    "             5:open-web-math\n";

static int parse_parts(char *const *argv, int n, struct data_mix_part *part) {
    for (int i = 0; i < n; i++) {
        char weight[16] = "", *colon = strchr(argv[i], ':');
        uint64_t value;
        if (!colon || !colon[1] || colon - argv[i] >= (int)sizeof weight) {
            fprintf(stderr, "'%s' is not WEIGHT:CORPUS\n", argv[i]);
            return -1;
        }
        memcpy(weight, argv[i], (size_t)(colon - argv[i]));
        if (args_integer("WEIGHT", weight, 1, DATA_WEIGHTS_MAX, &value)) return -1;
        part[i] = (struct data_mix_part){ colon + 1, (uint32_t)value };
    }
    return 0;
}

static int tool_mix(int argc, char **argv) {
    static const struct option options[] = {
        { "out", required_argument, NULL, 'o' }, { "samples", required_argument, NULL, 's' },
        { "json", no_argument, NULL, 'j' },      { "help", no_argument, NULL, 'h' }, { 0 },
    };
    struct data_mix_part part[DATA_PARTS_MAX];
    const char *out = NULL;
    uint64_t samples = 0;
    int json = 0, c;
    struct data_info info;
    struct err err;
    optind = 0;
    while ((c = getopt_long(argc, argv, "h", options, NULL)) != -1) switch (c) {
        case 'o': out = optarg; break;
        case 's': if (args_integer("--samples", optarg, 1, INT64_MAX, &samples)) return 2; break;
        case 'j': json = 1; break;
        case 'h': fputs(mix_help, stdout); return 0;
        default: return args_unknown("data mix", argv);
        }
    if (!out) return args_wrong("data mix", "--out DIR is missing");
    if (optind == argc || argc - optind > DATA_PARTS_MAX)
        return args_wrong("data mix", "1 to 1024 corpora are needed");
    if (parse_parts(argv + optind, argc - optind, part)) return 2;
    if (data_mix(out, part, (uint32_t)(argc - optind), samples, &info, &err))
        return args_failed("data mix", &err);
    print_corpus(out, &info, 0, json);
    return 0;
}

int tool_data(int argc, char **argv) {
    static const struct option options[] = {
        { "out", required_argument, NULL, 'o' },       { "sequence", required_argument, NULL, 's' },
        { "heldout", required_argument, NULL, 'f' },   { "tokenizer", required_argument, NULL, 't' },
        { "document-end", required_argument, NULL, 'e' }, { "field", required_argument, NULL, 'i' },
        { "file-tokens", required_argument, NULL, 'k' }, { "threads", required_argument, NULL, 'n' },
        { "json", no_argument, NULL, 'j' },            { "help", no_argument, NULL, 'h' }, { 0 },
    };
    const char *out = NULL;
    struct data_recipe recipe = { .tokenizer = "bytes", .heldout_fraction = 0.02 };
    uint64_t sequence = 128, threads = 0;
    int json = 0, c;
    if (argc > 1 && !strcmp(argv[1], "mix")) return tool_mix(argc - 1, argv + 1);
    if (argc > 1 && !strcmp(argv[1], "tokenize")) argc--, argv++;
    optind = 0; /* another tool may have parsed its own arguments in this process */
    while ((c = getopt_long(argc, argv, "h", options, NULL)) != -1) switch (c) {
        case 'o': out = optarg; break;
        case 's': if (args_integer("--sequence", optarg, 1, 1u << 20, &sequence)) return 2; break;
        case 'f': if (args_real("--heldout", optarg, 0, 0.5, &recipe.heldout_fraction)) return 2; break;
        case 't': recipe.tokenizer = optarg; break;
        case 'e': recipe.document_end = optarg; break;
        case 'i': recipe.field = optarg; break;
        case 'k':
            if (args_integer("--file-tokens", optarg, 1, UINT64_MAX, &recipe.file_tokens)) return 2;
            break;
        case 'n': if (args_integer("--threads", optarg, 1, 256, &threads)) return 2; break;
        case 'j': json = 1; break;
        case 'h': fputs(data_help, stdout); return 0;
        default: return args_unknown(argv[0], argv);
        }
    if (!out) return args_wrong(argv[0], "--out DIR is missing");
    if (optind == argc) return args_wrong(argv[0], "no text given");
    recipe.sequence = (uint32_t)sequence;
    recipe.threads = (unsigned)threads;
    return tokenize(argv[0], out, (const char *const *)argv + optind, argc - optind, &recipe, json);
}

/* ---- bigram ------------------------------------------------------------------------------------ */

static const char bigram_help[] =
    "intellect-node bigram CORPUS [--json]\n"
    "\n"
    "Count which byte follows which two in a corpus' training text, and print the mean loss of these\n"
    "statistics on its held-out slice, in nats per byte. It is what a network must beat to have\n"
    "learnt more than letter statistics. Orders are interpolated (Witten and Bell 1991), so that\n"
    "contexts never seen cost no more than they must. CORPUS is a folder that `data` wrote, with\n"
    "the tokenizer bytes.\n"
    "\n"
    "example: intellect-node bigram corpus\n";

#define BLOCK_TOKENS 65536

/* Counts of each byte after no, one and two bytes, and per context how many bytes followed it and
 * how many different ones. */
struct counts {
    uint32_t after0[256], after1[256][256], after2[65536][256];
    uint32_t total0, kinds0, total1[256], kinds1[256], total2[65536], kinds2[65536];
};

static void count(struct counts *n, const int32_t *t) {
    int two = t[0] << 8 | t[1];
    n->kinds0 += n->after0[t[2]]++ == 0;
    n->kinds1[t[1]] += n->after1[t[1]][t[2]]++ == 0;
    n->kinds2[two] += n->after2[two][t[2]]++ == 0;
    n->total0++;
    n->total1[t[1]]++;
    n->total2[two]++;
}

/* Witten-Bell: a context seen `total` times with `kinds` successors keeps kinds/(total + kinds) of
 * its probability for the shorter context. */
static double mix(uint32_t seen, uint32_t total, uint32_t kinds, double shorter) {
    return total ? (seen + kinds * shorter) / ((double)total + kinds) : shorter;
}

static void add_losses(const struct counts *n, const int32_t *t, double loss[3]) {
    int two = t[0] << 8 | t[1];
    double p0 = mix(n->after0[t[2]], n->total0, n->kinds0, 1.0 / 256);
    double p1 = mix(n->after1[t[1]][t[2]], n->total1[t[1]], n->kinds1[t[1]], p0);
    double p2 = mix(n->after2[two][t[2]], n->total2[two], n->kinds2[two], p1);
    loss[0] -= log(p0);
    loss[1] -= log(p1);
    loss[2] -= log(p2);
}

/* Blocks overlap by two tokens, the context of the next block's first. */
static int count_corpus(struct data *d, struct counts *n, int32_t *block, struct err *err) {
    for (uint32_t f = 0; f < data_info(d)->files; f++) {
        size_t got = BLOCK_TOKENS;
        for (uint64_t at = 0; got == BLOCK_TOKENS; at += BLOCK_TOKENS - 2) {
            if (data_text(d, f, at, BLOCK_TOKENS, block, &got, err)) return -1;
            for (size_t i = 0; i + 2 < got; i++) count(n, block + i);
        }
    }
    return 0;
}

static int heldout_losses(struct data *d, const struct counts *n, int32_t *block, double loss[3],
                          uint64_t *tokens, struct err *err) {
    size_t got = BLOCK_TOKENS;
    for (uint64_t at = 0; got == BLOCK_TOKENS; at += BLOCK_TOKENS - 2) {
        if (data_heldout(d, at, BLOCK_TOKENS, block, &got, err)) return -1;
        for (size_t i = 0; i + 2 < got; i++, ++*tokens) add_losses(n, block + i, loss);
    }
    if (!*tokens) return err_set(err, ERR_CONFIG, "the corpus has no held-out text of 3 bytes or more");
    for (int order = 0; order < 3; order++) loss[order] /= (double)*tokens;
    return 0;
}

static int bigram(const char *corpus, double loss[3], uint64_t *tokens, struct err *err) {
    struct data *d = data_open(corpus, NULL, 0, err);
    if (!d) return -1;
    struct counts *n = calloc(1, sizeof *n);
    int32_t *block = malloc(BLOCK_TOKENS * sizeof *block);
    int rc = n && block ? 0 : err_set(err, ERR_MEMORY, "no memory for %zu bytes of counts", sizeof *n);
    if (rc == 0 && data_info(d)->vocabulary > 256)
        rc = err_set(err, ERR_UNSUPPORTED, "%.100s has a vocabulary of %u; bytes have 256", corpus,
                     data_info(d)->vocabulary);
    if (rc == 0) rc = count_corpus(d, n, block, err);
    if (rc == 0) rc = heldout_losses(d, n, block, loss, tokens, err);
    free(block);
    free(n);
    data_close(d);
    return rc;
}

int tool_bigram(int argc, char **argv) {
    static const struct option options[] = {
        { "json", no_argument, NULL, 'j' }, { "help", no_argument, NULL, 'h' }, { 0 },
    };
    double loss[3] = { 0 };
    uint64_t tokens = 0;
    int json = 0, c;
    struct err err;
    optind = 0;
    while ((c = getopt_long(argc, argv, "h", options, NULL)) != -1) switch (c) {
        case 'j': json = 1; break;
        case 'h': fputs(bigram_help, stdout); return 0;
        default: return args_unknown(argv[0], argv);
        }
    if (optind + 1 != argc) return args_wrong(argv[0], "one corpus is needed");
    if (bigram(argv[optind], loss, &tokens, &err)) return args_failed(argv[0], &err);
    printf(json ? "{\"order\": 2, \"loss\": %.6f, \"loss_order_1\": %.6f, \"loss_order_0\": %.6f, "
                  "\"tokens\": %llu}\n"
                : "order 2: %.4f nats per byte (order 1: %.4f, order 0: %.4f) on %llu held-out bytes\n",
           loss[2], loss[1], loss[0], (unsigned long long)tokens);
    return 0;
}
