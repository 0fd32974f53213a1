/* tools_export.c - export and import: a model as a plain Hugging Face folder; see tools_ckpt.h. */
#include "node/tools_ckpt.h"

#include <getopt.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ckpt/ckpt.h"
#include "node/tokenizer.h"
#include "node/tools_args.h"
#include "proto/model.h"

static const char export_help[] =
    "intellect-node export CHECKPOINT DIR [--weights W] [--file-gb N]\n"
    "\n"
    "Make the new or empty folder DIR a Hugging Face folder (tensors, config, tokenizer) of a checkpoint.\n"
    "Digests are checked on the way. Without options the files are copied.\n"
    "\n"
    "  --weights W   fp32 (of the parameters that the run goes on from) or bf16 (rounded to the nearest)\n"
    "  --file-gb N   no file larger, but for one tensor alone (default: 5)\n"
    "\n"
    "example: intellect-node export demo-run/checkpoints my-model --weights bf16\n";

static const char import_help[] =
    "intellect-node import FOLDER DIR [--weights W] [--file-gb N]\n"
    "\n"
    "Check a Hugging Face folder of a Llama model (LlamaForCausalLM, safetensors in fp32, fp16 or bf16,\n"
    "in one file or several; a path or file://, s3://, https://) and write it to the new or empty folder\n"
    "DIR as this program does: tensors in the canonical order, in fp32, its tokenizer named. A network\n"
    "that is not ours, a tensor that is missing or of another shape, and weights that are not finite are\n"
    "refused. `train --from` and `intellect-coordinator init --from` take DIR, and FOLDER itself too.\n"
    "\n"
    "  --weights W   fp32 (default) or bf16\n"
    "  --file-gb N   no file larger, but for one tensor alone (default: 5)\n"
    "\n"
    "example: intellect-node import Llama-3.2-1B llama && intellect-node train run.yaml --from llama\n";

struct export_wish {
    const char *name, *from, *to;
    int weights;      /* enum ckpt_weights; -1: as they are */
    double file_gb;   /* 0: the default */
};

static const char *weights_name(int i) {
    static const char *const names[] = { [CKPT_FP32] = "fp32", [CKPT_BF16] = "bf16", NULL };
    return names[i];
}

/* Returns -1 to go on, or the exit code. */
static int parse(int argc, char **argv, const char *help, struct export_wish *w) {
    static const struct option options[] = { { "weights", required_argument, NULL, 'w' },
                                             { "file-gb", required_argument, NULL, 'f' },
                                             { "help", no_argument, NULL, 'h' }, { 0 } };
    int c;
    w->name = argv[0];
    optind = 0; /* another tool may have parsed its own arguments in this process */
    while ((c = getopt_long(argc, argv, "h", options, NULL)) != -1) switch (c) {
        case 'w': if (args_name("--weights", optarg, weights_name, &w->weights)) return 2; break;
        case 'f': if (args_real("--file-gb", optarg, 1e-6, 1e6, &w->file_gb)) return 2; break;
        case 'h': fputs(help, stdout); return 0;
        default: return args_unknown(argv[0], argv);
        }
    if (argc - optind != 2)
        return args_wrong(w->name, argc - optind < 2 ? "an argument is missing" : "too many arguments");
    w->from = argv[optind];
    w->to = argv[optind + 1];
    return -1;
}

/* ---- a folder of a vector ---------------------------------------------------------------------- */

struct source {
    const struct ckpt *c;
    enum ckpt_which which;
};

static int read_finite(void *arg, uint64_t first, size_t n, float *out, struct err *err) {
    const struct source *s = arg;
    if (ckpt_read(s->c, s->which, first, n, out, err)) return -1;
    for (size_t i = 0; i < n; i++) {
        if (isfinite(out[i])) continue;
        struct proto_tensor t;
        proto_model_tensor(ckpt_model(s->c), proto_model_tensor_at(ckpt_model(s->c), first + i), &t);
        return err_set(err, ERR_CORRUPT, "%.100s: element %llu of %s is %g", ckpt_where(s->c),
                       (unsigned long long)(first + i - t.offset), t.name, (double)out[i]);
    }
    return 0;
}

/* Its name in our words, in `name`; a tokenizer that we cannot read goes along without. */
static struct tokenizer *name_tokenizer(const struct export_wish *w, const struct ckpt *c, const char *json,
                                        size_t n, const char **name) {
    struct err err;
    *name = ckpt_tokenizer(c);
    if (**name || !json) return NULL;
    struct tokenizer *t = tokenizer_parse(json, n, &err);
    if (t) *name = tokenizer_name(t);
    else fprintf(stderr, "%s: its tokenizer.json is copied but cannot be used here: %s\n", w->name, err.msg);
    return t;
}

static int rewrite(const struct export_wish *w, const struct ckpt *c, struct err *err) {
    enum ckpt_weights weights = w->weights >= 0 ? (enum ckpt_weights)w->weights
                                : strcmp(ckpt_weights_name(c), "bf16") ? CKPT_FP32 : CKPT_BF16;
    struct source s = { c, weights == CKPT_FP32 ? CKPT_ANCHOR : CKPT_WEIGHTS };
    struct ckpt_folder f = { .model = ckpt_model(c), .weights = weights, .read = read_finite, .arg = &s,
                             .init_std = ckpt_genesis(c) ? ckpt_genesis(c)->init_std : 0.02f,
                             .shard_bytes = (uint64_t)(w->file_gb * 1e9) };
    char *json = NULL;
    size_t n = 0;
    /* ckpt_folder_write() would exchange what is there. */
    if (ckpt_check_empty(w->to, err) || ckpt_verify_vector(c, s.which, err)) return -1;
    if (ckpt_tokenizer_json(c, &json, &n, err) && err->code != ERR_NOT_FOUND) return -1;
    struct tokenizer *t = name_tokenizer(w, c, json, n, &f.tokenizer);
    if (json) f.tokenizer_json = (struct proto_bytes){ (const uint8_t *)json, (uint32_t)n };
    int rc = ckpt_folder_write(&f, w->to, err);
    tokenizer_close(t);
    free(json);
    return rc;
}

/* ---- the commands ------------------------------------------------------------------------------ */

int tool_export(int argc, char **argv) {
    struct export_wish w = { .weights = -1 };
    struct err err = { 0 };
    int rc = parse(argc, argv, export_help, &w);
    if (rc >= 0) return rc;
    struct ckpt *c = ckpt_open(w.from, NULL, &err);
    if (!c) return args_failed(w.name, &err);
    bool as_it_is = w.weights < 0 && w.file_gb <= 0;
    rc = as_it_is ? ckpt_export(c, w.to, &err) : rewrite(&w, c, &err);
    if (rc) rc = args_failed(w.name, &err);
    else printf("%s: a Hugging Face folder of %s\n", w.to, ckpt_where(c));
    ckpt_close(c);
    return rc;
}

int tool_import(int argc, char **argv) {
    struct export_wish w = { .weights = CKPT_FP32 };
    struct err err = { 0 };
    int rc = parse(argc, argv, import_help, &w);
    if (rc >= 0) return rc;
    struct ckpt *c = ckpt_open(w.from, NULL, &err);
    if (!c) return args_failed(w.name, &err);
    const struct msg_model *m = ckpt_model(c);
    if (proto_model_check(m, &err) || rewrite(&w, c, &err)) rc = args_failed(w.name, &err);
    else
        printf("%s: %.1f million parameters of %s (%s), %u layers of width %u, vocabulary %u, sequence %u\n",
               w.to, (double)proto_model_elements(m) / 1e6, ckpt_where(c), ckpt_weights_name(c), m->layers,
               m->width, m->vocabulary, m->sequence);
    rc = rc > 0 ? rc : 0;
    ckpt_close(c);
    return rc;
}
