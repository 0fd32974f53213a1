/* tools_model.c - the commands `eval` and `generate`; see tools.h. */
#include "ckpt/ckpt.h"
#include "kernels/kernels.h"
#include "node/data.h"
#include "node/decoder.h"
#include "node/model.h"
#include "node/tokenizer.h"
#include "node/tools.h"
#include "node/tools_args.h"
#include "node/trainer.h"
#include "proto/model.h"

#include <getopt.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* ---- a checkpoint, ready to run ---------------------------------------------------------------- */

struct loaded {
    struct msg_model m;
    struct tokenizer *tokenizer;
    struct kernels *k;
    float *params; /* canonical vector in k's memory */
};

/* The file that lies with the tensors. */
static struct tokenizer *stored_tokenizer(const struct loaded *l, const struct ckpt *c, struct err *err) {
    char *json;
    size_t n;
    if (ckpt_tokenizer_json(c, &json, &n, err)) {
        if (err->code == ERR_NOT_FOUND)
            err_set(err, ERR_CONFIG,
                    "the tokenizer of this model of vocabulary %u%s%.40s, is not in its folder: "
                    "name the tokenizer.json with --tokenizer",
                    l->m.vocabulary, *ckpt_tokenizer(c) ? ", " : "", ckpt_tokenizer(c));
        return NULL;
    }
    struct tokenizer *t = tokenizer_parse(json, n, err);
    if (!t) err_prefix(err, "%.100s/" TOKENIZER_FILE_NAME, ckpt_where(c));
    free(json);
    return t;
}

/* A checkpoint of ours names its tokenizer. Bytes are taken for granted only where the vocabulary is theirs. */
static int pick_tokenizer(struct loaded *l, const struct ckpt *c, const char *wanted, struct err *err) {
    const char *stored = ckpt_tokenizer(c);
    bool bytes = !strcmp(stored, "bytes") || (!*stored && l->m.vocabulary == 256);
    l->tokenizer = wanted || bytes ? tokenizer_open(wanted ? wanted : "bytes", err) : stored_tokenizer(l, c, err);
    if (!l->tokenizer) return -1;
    const char *name = tokenizer_name(l->tokenizer);
    if (*stored && strcmp(stored, name) != 0)
        return err_set(err, ERR_CONFIG, "the model was trained with tokenizer %s, this one is %s", stored,
                       name);
    if (tokenizer_vocabulary(l->tokenizer) > l->m.vocabulary)
        return err_set(err, ERR_CONFIG, "tokenizer %s has %u tokens, the model's vocabulary has %u", name,
                       tokenizer_vocabulary(l->tokenizer), l->m.vocabulary);
    return 0;
}

#define BLOCK_ELEMENTS ((size_t)1 << 20)

/* A block of the checkpoint's parameters, or of those that the run began with. */
static int read_block(const struct loaded *l, const struct ckpt *c, const struct msg_genesis *untrained,
                      size_t at, size_t n, float *block, struct err *err) {
    if (!untrained) return ckpt_read(c, CKPT_WEIGHTS, at, n, block, err);
    model_init_elements(&l->m, untrained->init_std, untrained->init_seed, at, n, block);
    return 0;
}

static int read_params(struct loaded *l, const struct ckpt *c, const struct msg_genesis *untrained,
                       struct err *err) {
    size_t n = (size_t)proto_model_elements(&l->m);
    if (!(l->params = l->k->alloc(l->k, n * sizeof *l->params, err))) return -1;
    float *block = malloc(BLOCK_ELEMENTS * sizeof *block);
    int rc = block ? 0 : err_set(err, ERR_MEMORY, "no memory to read parameters");
    for (size_t at = 0, take; rc == 0 && at < n; at += take) {
        take = n - at < BLOCK_ELEMENTS ? n - at : BLOCK_ELEMENTS;
        if ((rc = read_block(l, c, untrained, at, take, block, err))) break;
        l->k->copy_in(l->k, l->params + at, block, take * sizeof *block);
        rc = l->k->check(l->k, err);
    }
    free(block);
    return rc;
}

static int load(struct loaded *l, const char *where, const char *tokenizer, struct device device, uint64_t threads,
                bool untrained, struct err *err) {
    struct ckpt *c = ckpt_open(where, NULL, err);
    if (!c) return -1;
    l->m = *ckpt_model(c);
    int rc = proto_model_check(&l->m, err);
    if (rc == 0 && untrained && !ckpt_genesis(c))
        rc = err_set(err, ERR_CONFIG, "%.150s is of no run: how its parameters began is not known", where);
    if (rc == 0) rc = pick_tokenizer(l, c, tokenizer, err);
    if (rc == 0) rc = ckpt_verify_vector(c, CKPT_WEIGHTS, err); /* a wrong byte would only be a worse model */
    if (rc == 0 && !(l->k = device_create(device, TRAINER_FP32, (int)threads, 1, NULL, err))) rc = -1;
    if (rc == 0) rc = read_params(l, c, untrained ? ckpt_genesis(c) : NULL, err);
    ckpt_close(c);
    return rc;
}

static void unload(struct loaded *l) {
    tokenizer_close(l->tokenizer);
    if (!l->k) return;
    l->k->free(l->k, l->params);
    l->k->destroy(l->k);
}

/* ---- eval -------------------------------------------------------------------------------------- */

static const char eval_help[] =
    "intellect-node eval CHECKPOINT (--text FILE | --corpus CORPUS) [options]\n"
    "\n"
    "Mean loss in nats per token of a model on a text: windows of N tokens side by side, in which each\n"
    "token predicts its next. What is left at the end, less than a window, is not counted. Bits per byte\n"
    "compare models of different tokenizers: the loss of all tokens over the bytes that they stand for.\n"
    "CHECKPOINT is a folder or URL that a run wrote, a store (then its newest checkpoint), or a plain\n"
    "Hugging Face folder of a Llama model.\n"
    "\n"
    "  --text FILE        the text, whole\n"
    "  --corpus CORPUS    the held-out slice of a corpus that `data` wrote\n"
    "  --sequence N       tokens per window, at most the model's sequence (default: that)\n"
    "  --tokenizer T      bytes, or a tokenizer.json; needed where the model does not say\n"
    "  --logits FILE      write the first window's logits too: fp32, [tokens, vocabulary]; takes a pass a\n"
    "                     token\n"
    "  --untrained        the parameters that the run began with, instead of the checkpoint's\n"
    DEVICE_HELP
    "  --threads N        CPU threads (default: all)\n"
    "  --json             print one JSON object: loss, perplexity, bits_per_byte, tokens, sequence\n"
    "\n"
    "example: intellect-node eval demo-run/checkpoints --text book.txt --sequence 128\n";

/* Windows evaluated together: enough rows for fast matrix products. */
#define EVAL_ROWS 2048
#define TEXT_BYTES_MAX ((size_t)4 << 30)

static int read_text(const char *path, char **text, size_t *bytes, struct err *err) {
    struct stat st;
    FILE *f = fopen(path, "rb");
    if (!f) return err_set_errno(err, "open %.150s", path);
    int rc = 0;
    *text = NULL;
    if (fstat(fileno(f), &st))
        rc = err_set_errno(err, "stat %.150s", path);
    else if (!S_ISREG(st.st_mode) || (size_t)st.st_size > TEXT_BYTES_MAX)
        rc = err_set(err, ERR_CONFIG, "%.150s is not a file of at most %zu bytes", path, TEXT_BYTES_MAX);
    else if (!(*text = malloc((size_t)st.st_size + 1)))
        rc = err_set(err, ERR_MEMORY, "no memory for the %lld bytes of %.100s", (long long)st.st_size, path);
    else {
        *bytes = fread(*text, 1, (size_t)st.st_size, f);
        if (ferror(f)) rc = err_set_errno(err, "read %.150s", path);
    }
    fclose(f);
    return rc;
}

static int tokens_of(const struct tokenizer *t, const char *text, size_t bytes, int32_t **tokens, size_t *n,
                     struct err *err) {
    const int32_t *ids;
    struct encoder *e = encoder_create(t, false, err);
    int rc = e ? encoder_encode(e, text, bytes, &ids, n, err) : -1;
    if (rc == 0 && !(*tokens = malloc((*n + 1) * sizeof **tokens)))
        rc = err_set(err, ERR_MEMORY, "no memory for %zu tokens", *n);
    if (rc == 0) memcpy(*tokens, ids, *n * sizeof **tokens);
    encoder_destroy(e);
    return rc;
}

static int tokens_of_text(const struct tokenizer *t, const char *path, int32_t **tokens, size_t *n,
                          struct err *err) {
    char *text = NULL;
    size_t bytes = 0;
    int rc = read_text(path, &text, &bytes, err);
    if (rc == 0) rc = tokens_of(t, text, bytes, tokens, n, err);
    free(text);
    return rc;
}

static int tokens_of_corpus(const struct tokenizer *t, const char *corpus, int32_t **tokens, size_t *n,
                            int32_t *document_end, struct err *err) {
    struct data *d = data_open(corpus, NULL, 0, err);
    if (!d) return -1;
    size_t all = (size_t)data_info(d)->heldout_tokens;
    *document_end = data_info(d)->document_end;
    int rc = 0;
    if (strcmp(data_info(d)->tokenizer, tokenizer_name(t)) != 0)
        rc = err_set(err, ERR_CONFIG, "the corpus has tokenizer %s, the model %s", data_info(d)->tokenizer,
                     tokenizer_name(t));
    else if (!(*tokens = malloc((all + 1) * sizeof **tokens)))
        rc = err_set(err, ERR_MEMORY, "no memory for %zu held-out tokens", all);
    else
        rc = data_heldout(d, 0, all, *tokens, n, err);
    data_close(d);
    return rc;
}

/* Window i is tokens [i * T, i * T + T], its last one only a target. model_loss() wants windows
 * apart from each other, so they are copied. */
static int loss_of_windows(const struct loaded *l, int32_t document_end, const int32_t *tokens,
                           size_t windows, int T, double *loss, size_t *targets, struct err *err) {
    int B = EVAL_ROWS / T > 1 ? EVAL_ROWS / T : 1, rc = 0;
    size_t width = (size_t)T + 1;
    int32_t *batch = malloc((size_t)B * width * sizeof *batch);
    struct model *model = batch ? model_create(&l->m, l->k, B, T, 0, err) : NULL;
    if (!batch) err_set(err, ERR_MEMORY, "no memory for %d windows", B);
    if (!model) rc = -1;
    if (model) model_set_objective(model, &(struct model_objective){ .document_end = document_end });
    struct model_loss part;
    double sum = 0;
    *targets = 0;
    for (size_t i = 0; rc == 0 && i < windows; i += (size_t)B) {
        int n = windows - i < (size_t)B ? (int)(windows - i) : B;
        for (int b = 0; b < n; b++)
            memcpy(batch + (size_t)b * width, tokens + (i + (size_t)b) * (size_t)T, width * sizeof *batch);
        rc = model_loss(model, l->params, batch, n, T, &part, err);
        if (rc) break;
        sum += part.nats;
        *targets += model_targets(model, batch, n, T);
    }
    *loss = *targets ? sum / (double)*targets : 0;
    model_destroy(model);
    free(batch);
    return rc;
}

/* What the targets that count stand for; the token that ends a document is no byte of it. */
static uint64_t bytes_of_targets(const struct loaded *l, int32_t document_end, const int32_t *tokens,
                                 size_t n) {
    uint64_t bytes = 0;
    size_t length;
    for (size_t i = 1; i < n; i++) {
        if (tokens[i - 1] == document_end || tokens[i] == document_end) continue;
        tokenizer_token(l->tokenizer, (uint32_t)tokens[i], &length);
        bytes += length;
    }
    return bytes;
}

struct eval_wish {
    const char *where, *text, *corpus, *tokenizer, *logits;
    struct device device;
    uint64_t sequence, threads;
    int json;
    bool untrained;
};

static int write_logits(const struct loaded *l, const int32_t *tokens, int T, const char *path, struct err *err) {
    float *row = malloc(l->m.vocabulary * sizeof *row);
    struct model *model = row ? model_create(&l->m, l->k, 1, T, 0, err) : NULL;
    FILE *f = model ? fopen(path, "wb") : NULL;
    int rc = f ? 0 : row && !model ? -1 : err_set_errno(err, "%.150s", path);
    for (int t = 0; rc == 0 && t < T; t++) {
        rc = model_logits(model, l->params, tokens, T, t, row, err);
        if (rc == 0 && fwrite(row, sizeof *row, l->m.vocabulary, f) != l->m.vocabulary)
            rc = err_set_errno(err, "write %.150s", path);
    }
    if (f && fclose(f) && rc == 0) rc = err_set_errno(err, "write %.150s", path);
    model_destroy(model);
    free(row);
    return rc;
}

static int eval_tokens(const struct eval_wish *w, const struct loaded *l, int32_t document_end,
                       const int32_t *tokens, size_t n, struct err *err) {
    size_t targets, T = w->sequence ? (size_t)w->sequence : l->m.sequence;
    double loss;
    if (T > l->m.sequence)
        return err_set(err, ERR_CONFIG, "--sequence %zu is more than the model's %u", T, l->m.sequence);
    if (n < T + 1)
        return err_set(err, ERR_CONFIG, "%.100s has %zu tokens, one window of sequence %zu needs %zu",
                       w->text ? w->text : w->corpus, n, T, T + 1);
    size_t windows = (n - 1) / T;
    if (loss_of_windows(l, document_end, tokens, windows, (int)T, &loss, &targets, err)) return -1;
    if (w->logits && write_logits(l, tokens, (int)T, w->logits, err)) return -1;
    uint64_t bytes = bytes_of_targets(l, document_end, tokens, windows * T + 1);
    double bits = bytes ? loss * (double)targets / log(2) / (double)bytes : 0;
    printf(w->json
               ? "{\"loss\": %.9g, \"perplexity\": %.9g, \"bits_per_byte\": %.9g, \"tokens\": %zu, "
                 "\"windows\": %zu, \"sequence\": %zu}\n"
               : "loss %.4f nats per token, perplexity %.3f, %.4f bits per byte, %zu tokens in %zu windows "
                 "of %zu\n",
           loss, exp(loss), bits, targets, windows, T);
    return 0;
}

static int eval(const struct eval_wish *w, struct err *err) {
    struct loaded l = { 0 };
    int32_t *tokens = NULL, document_end = -1;
    size_t n = 0;
    int rc = load(&l, w->where, w->tokenizer, w->device, w->threads, w->untrained, err);
    if (rc == 0)
        rc = w->text ? tokens_of_text(l.tokenizer, w->text, &tokens, &n, err)
                     : tokens_of_corpus(l.tokenizer, w->corpus, &tokens, &n, &document_end, err);
    if (rc == 0) rc = eval_tokens(w, &l, document_end, tokens, n, err);
    free(tokens);
    unload(&l);
    return rc;
}

int tool_eval(int argc, char **argv) {
    static const struct option options[] = {
        { "text", required_argument, NULL, 't' },      { "corpus", required_argument, NULL, 'c' },
        { "sequence", required_argument, NULL, 's' },  { "tokenizer", required_argument, NULL, 'z' },
        { "device", required_argument, NULL, 'D' },
        { "threads", required_argument, NULL, 'n' },   { "json", no_argument, NULL, 'j' },
        { "untrained", no_argument, NULL, 'u' },       { "help", no_argument, NULL, 'h' },
        { "logits", required_argument, NULL, 'l' },    { 0 },
    };
    struct eval_wish w = { .device = { DEVICE_AUTO, 0 } };
    struct err err;
    int c;
    optind = 0; /* another tool may have parsed its own arguments in this process */
    while ((c = getopt_long(argc, argv, "h", options, NULL)) != -1) switch (c) {
        case 't': w.text = optarg; break;
        case 'c': w.corpus = optarg; break;
        case 's': if (args_integer("--sequence", optarg, 1, 1u << 20, &w.sequence)) return 2; break;
        case 'z': w.tokenizer = optarg; break;
        case 'D': if (args_device(optarg, &w.device)) return 2; break;
        case 'n': if (args_integer("--threads", optarg, 1, 1024, &w.threads)) return 2; break;
        case 'j': w.json = 1; break;
        case 'u': w.untrained = true; break;
        case 'l': w.logits = optarg; break;
        case 'h': fputs(eval_help, stdout); return 0;
        default: return args_unknown(argv[0], argv);
        }
    if (optind + 1 != argc) return args_wrong(argv[0], "one checkpoint is needed");
    if (!w.text == !w.corpus) return args_wrong(argv[0], "one of --text and --corpus is needed");
    w.where = argv[optind];
    return eval(&w, &err) ? args_failed(argv[0], &err) : 0;
}

/* ---- generate ---------------------------------------------------------------------------------- */

static const char generate_help[] =
    "intellect-node generate CHECKPOINT --prompt TEXT [options]\n"
    "\n"
    "Continue a text with what the model finds likely. CHECKPOINT is as in `eval`. The same arguments\n"
    "give the same text.\n"
    "\n"
    "  --prompt TEXT      what to continue\n"
    "  --tokens N         how many tokens to add (default 200)\n"
    "  --temperature T    0 takes the likeliest token always; above 1 gets wild (default 0.8)\n"
    "  --top-k K          draw from the K likeliest tokens; 0 = all (default 40)\n"
    "  --top-p P          and of these from the fewest that have P of the probability (default 1)\n"
    "  --seed N           of the draws (default 1)\n"
    "  --tokenizer T      bytes, or a tokenizer.json; needed where the model does not say\n"
    DEVICE_HELP
    "  --threads N        CPU threads (default: all)\n"
    "  --json             print one JSON object: prompt, text, tokens (bytes that are not UTF-8 as ?)\n"
    "\n"
    "Text is printed as it comes. The model sees the tokens before, up to its sequence; when that is\n"
    "full, it reads the last half of them again and goes on.\n"
    "\n"
    "example: intellect-node generate demo-run/checkpoints --prompt 'The '\n";

struct generate_wish {
    const char *where, *prompt, *tokenizer;
    struct device device;
    uint64_t tokens, top_k, seed, threads;
    double temperature, top_p;
    int json;
};

struct choice {
    float logit;
    int32_t id;
};

static int by_logit(const void *a, const void *b) {
    const struct choice *x = a, *y = b;
    if (x->logit != y->logit) return x->logit < y->logit ? 1 : -1;
    return x->id < y->id ? -1 : 1; /* the same order everywhere */
}

/* Of the k likeliest, how many have the share top_p of their probability (arXiv:1904.09751); *sum is then
 * theirs. */
static size_t nucleus(const struct choice *choice, size_t k, double temperature, double top_p, double *sum) {
    double all = *sum;
    size_t n = 0;
    if (top_p >= 1) return k;
    for (*sum = 0; n < k && *sum < top_p * all; n++)
        *sum += exp((choice[n].logit - choice[0].logit) / temperature);
    return n ? n : 1;
}

/* Draw from the k likeliest of the V logits; `choice` has room for V. */
static int32_t draw(const struct generate_wish *w, const float *logits, size_t V, struct choice *choice,
                    unsigned short random[3]) {
    size_t k = w->temperature == 0 ? 1 : w->top_k && w->top_k < V ? (size_t)w->top_k : V;
    double sum = 0, u = erand48(random);
    for (size_t i = 0; i < V; i++) choice[i] = (struct choice){ logits[i], (int32_t)i };
    qsort(choice, V, sizeof *choice, by_logit);
    if (k == 1) return choice[0].id;
    for (size_t i = 0; i < k; i++) sum += exp((choice[i].logit - choice[0].logit) / w->temperature);
    k = nucleus(choice, k, w->temperature, w->top_p, &sum);
    u *= sum;
    for (size_t i = 0; i < k; i++) {
        u -= exp((choice[i].logit - choice[0].logit) / w->temperature);
        if (u < 0) return choice[i].id;
    }
    return choice[k - 1].id;
}

struct generator {
    const struct loaded *l;
    struct decoder *decoder;
    int room; /* of the decoder, in tokens */
    int32_t *tokens; /* prompt and continuation */
    size_t count, read; /* the decoder has read up to `read` */
    float *logits; /* [vocabulary] */
    struct choice *choice;
};

/* Read what has not been read yet; where there is no room for it, the last half of what there is room for. */
static int read_on(struct generator *g, struct err *err) {
    if (g->count - g->read > (size_t)(g->room - decoder_count(g->decoder))) {
        decoder_forget(g->decoder);
        size_t again = g->room > 1 ? (size_t)g->room / 2 : 1;
        g->read = g->count - (g->count < again ? g->count : again);
    }
    int n = (int)(g->count - g->read);
    g->read = g->count;
    return decoder_read(g->decoder, g->tokens + g->count - n, n, g->logits, err);
}

static int next_token(struct generator *g, const struct generate_wish *w, unsigned short random[3],
                      struct err *err) {
    if (read_on(g, err)) return -1;
    for (size_t i = 0; i < g->l->m.vocabulary; i++)
        if (!isfinite(g->logits[i]))
            return err_set(err, ERR_CORRUPT, "the model's logit %zu is %g", i, (double)g->logits[i]);
    g->tokens[g->count++] = draw(w, g->logits, g->l->m.vocabulary, g->choice, random);
    return 0;
}

static void print_token(const struct tokenizer *t, int32_t id) {
    size_t n;
    const char *bytes = tokenizer_token(t, (uint32_t)id, &n);
    if (n) fwrite(bytes, 1, n, stdout);
    fflush(stdout);
}

static void print_json(const struct generator *g, const struct generate_wish *w, size_t prompt_tokens) {
    const struct tokenizer *t = g->l->tokenizer;
    char *text = malloc((g->count - prompt_tokens) * TOKENIZER_TOKEN_BYTES_MAX + 1);
    size_t n = 0, token_n;
    if (!text) return;
    for (size_t i = prompt_tokens; i < g->count; i++, n += token_n) {
        const char *token = tokenizer_token(t, (uint32_t)g->tokens[i], &token_n);
        if (token_n) memcpy(text + n, token, token_n);
    }
    json_t *string = json_stringn(text, n);
    for (size_t i = 0; !string && i < n; i++)
        if (text[i] & 0x80) text[i] = '?';
    if (!string) string = json_stringn(text, n);
    json_t *prompt = json_string(w->prompt);
    json_t *o = json_pack("{s:o, s:o, s:I}", "prompt", prompt ? prompt : json_null(), "text", string,
                          "tokens", (json_int_t)(g->count - prompt_tokens));
    json_dumpf(o, stdout, JSON_ENSURE_ASCII);
    putchar('\n');
    json_decref(o);
    free(text);
}

static int take_generator(struct generator *g, const struct generate_wish *w, struct err *err) {
    const struct msg_model *m = &g->l->m;
    int32_t *prompt = NULL;
    if (tokens_of(g->l->tokenizer, w->prompt, strlen(w->prompt), &prompt, &g->count, err)) return -1;
    size_t most = g->count + (size_t)w->tokens;
    g->tokens = realloc(prompt, most * sizeof *g->tokens);
    if (!g->tokens) free(prompt);
    g->logits = malloc(m->vocabulary * sizeof *g->logits);
    g->choice = malloc(m->vocabulary * sizeof *g->choice);
    if (!g->tokens || !g->logits || !g->choice)
        return err_set(err, ERR_MEMORY, "no memory to generate %llu tokens", (unsigned long long)w->tokens);
    g->room = most < m->sequence ? (int)most : (int)m->sequence;
    g->decoder = decoder_create(m, g->l->k, g->l->params, g->room, err);
    return g->decoder ? 0 : -1;
}

static int run_generator(struct generator *g, const struct generate_wish *w, struct err *err) {
    unsigned short random[3] = { (unsigned short)w->seed, (unsigned short)(w->seed >> 16),
                                 (unsigned short)(w->seed >> 32) };
    size_t prompt_tokens = g->count;
    for (int i = 0; i < 8; i++) erand48(random); /* neighbouring seeds begin alike */
    if (!w->json) fputs(w->prompt, stdout);
    for (uint64_t i = 0; i < w->tokens; i++) {
        if (next_token(g, w, random, err)) return -1;
        if (!w->json) print_token(g->l->tokenizer, g->tokens[g->count - 1]);
    }
    if (w->json)
        print_json(g, w, prompt_tokens);
    else
        putchar('\n');
    return 0;
}

static int generate(const struct generate_wish *w, struct err *err) {
    struct loaded l = { 0 };
    struct generator g = { .l = &l };
    int rc = load(&l, w->where, w->tokenizer, w->device, w->threads, false, err);
    if (rc == 0) rc = take_generator(&g, w, err);
    if (rc == 0) rc = run_generator(&g, w, err);
    decoder_destroy(g.decoder);
    free(g.tokens);
    free(g.logits);
    free(g.choice);
    unload(&l);
    return rc;
}

int tool_generate(int argc, char **argv) {
    static const struct option options[] = {
        { "prompt", required_argument, NULL, 'p' },    { "tokens", required_argument, NULL, 't' },
        { "temperature", required_argument, NULL, 'e' }, { "top-k", required_argument, NULL, 'k' },
        { "seed", required_argument, NULL, 's' },      { "tokenizer", required_argument, NULL, 'z' },
        { "device", required_argument, NULL, 'D' },
        { "threads", required_argument, NULL, 'n' },   { "json", no_argument, NULL, 'j' },
        { "top-p", required_argument, NULL, 'q' },     { "help", no_argument, NULL, 'h' },
        { 0 },
    };
    struct generate_wish w = { .tokens = 200, .top_k = 40, .seed = 1, .temperature = 0.8, .top_p = 1,
                               .device = { DEVICE_AUTO, 0 } };
    struct err err;
    int c;
    optind = 0;
    while ((c = getopt_long(argc, argv, "h", options, NULL)) != -1) switch (c) {
        case 'p': w.prompt = optarg; break;
        case 't': if (args_integer("--tokens", optarg, 1, 1u << 20, &w.tokens)) return 2; break;
        case 'e': if (args_real("--temperature", optarg, 0, 100, &w.temperature)) return 2; break;
        case 'k': if (args_integer("--top-k", optarg, 0, 1u << 20, &w.top_k)) return 2; break;
        case 's': if (args_integer("--seed", optarg, 0, UINT64_MAX, &w.seed)) return 2; break;
        case 'q': if (args_real("--top-p", optarg, 0, 1, &w.top_p)) return 2; break;
        case 'z': w.tokenizer = optarg; break;
        case 'D': if (args_device(optarg, &w.device)) return 2; break;
        case 'n': if (args_integer("--threads", optarg, 1, 1024, &w.threads)) return 2; break;
        case 'j': w.json = 1; break;
        case 'h': fputs(generate_help, stdout); return 0;
        default: return args_unknown(argv[0], argv);
        }
    if (optind + 1 != argc) return args_wrong(argv[0], "one checkpoint is needed");
    if (!w.prompt || !*w.prompt) return args_wrong(argv[0], "--prompt TEXT is missing or empty");
    w.where = argv[optind];
    return generate(&w, &err) ? args_failed(argv[0], &err) : 0;
}
