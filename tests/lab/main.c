/* main.c - outer-lab: what the settings of the outer step do to the loss, without a network. All
 * replicas train in one process, in turns. The outer step is that of a run (kernels/kernels.h: codecs,
 * error feedback, exact sums, Nesterov), with weights as the coordinator gives them. Left out are clips,
 * ramps, late members, and whatever else timing does; tests/quality.sh has real processes.
 *
 * Fragment f is frozen first after (f + 1) / P * H inner steps and then each H, as node/sync does; its
 * mean is applied `overlap` steps later and mixed into every replica. Members that --phases sends away
 * stop; those that it brings back start from the anchor with the moments they left with. */
#include <getopt.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"
#include "node/data.h"
#include "node/engine.h"
#include "node/model.h"
#include "node/tools_args.h"
#include "proto/model.h"

#define NODES_MAX 64
#define PHASES_MAX 16
#define FRAGMENTS_MAX 16
#define RECENT 8 /* commits that a rule for the learning rate looks back on; coordinator/core_commit.c */
#define SOON 4u
#define EVAL_SAMPLES 16u

enum rule { RULE_CONSTANT, RULE_SQRT, RULE_LINEAR };
static const char *const rule_names[] = {"constant", "sqrt", "linear"};
#define RULES (sizeof rule_names / sizeof *rule_names)

static const char help[] =
    "outer-lab --corpus CORPUS [options]\n"
    "\n"
    "Train replicas in one process, with the outer step of a run between them, and print the held-out loss\n"
    "as one JSON object.\n"
    "\n"
    "  --nodes N            replicas (4)\n"
    "  --phases N,N,...     how many of them train, in equal shares of the tokens (all); the loss is taken\n"
    "                       four outer steps into each and at its end\n"
    "  --batch N            samples per inner step of one replica (the preset's)\n"
    "  --tokens N           of all replicas together (2000000)\n"
    "  --steps N            inner steps between outer steps (20)\n"
    "  --lr X --weight-decay X --beta2 X --warmup X --decay X   inner; these two as shares of the tokens\n"
    "  --optimizer adamw|muon --states fp32|bf16|8bit           inner (adamw, fp32)\n"
    "  --outer-lr X --momentum X --rule constant|sqrt|linear    outer\n"
    "  --fragments N --overlap N --alpha X                      streaming (1, 0, 0)\n"
    "  --codec fp32|int8|fp4|fp4+int8   of contributions and results (int8)\n"
    "  --seed N             of initial parameters and the order of samples (1)\n"
    "  --preset NAME        (debug)\n"
    "  --width N --ffn N --heads N --kv-heads N                 of the model (the preset's)\n"
    "  --trace N            the loss each N outer steps of fragment 0 too, on a sixteenth of the text\n";

struct options {
    const char *corpus, *preset;
    uint64_t nodes, batch, tokens, steps, fragments, overlap, seed, trace;
    uint64_t width, ffn, heads, kv_heads; /* 0: the preset's */
    double lr, warmup, decay, weight_decay, beta2, outer_lr, momentum, alpha;
    uint32_t phases[PHASES_MAX], phase_count;
    enum rule rule;
    enum outer_codec codec, result_codec;
    uint8_t optimizer, states;
};

struct fragment {
    uint64_t frozen_at;  /* inner step; UINT64_MAX: nothing is under way */
    uint64_t due;        /* inner step of the next freeze */
    uint64_t recent[RECENT], commits;
    bool in_plan[NODES_MAX];
    uint64_t samples[NODES_MAX]; /* of replica i since its last contribution here */
};

struct lab {
    struct options o;
    struct msg_model model;
    struct msg_inner inner;
    float init_std;
    struct kernels *kernels;
    struct data *data;
    struct engine *replica[NODES_MAX];
    bool active[NODES_MAX];
    struct fragment fragment[FRAGMENTS_MAX];
    uint8_t *fragment_of;      /* [chunks] */
    size_t elements, chunks;
    float *anchor, *momentum, *scratch;
    float *residual[NODES_MAX]; /* error feedback, whole vector */
    uint8_t *bytes[NODES_MAX];  /* encoded contribution, chunk c at c * chunk_bytes */
    int64_t *sum;
    int32_t *tokens;
    uint64_t step, next_sample, trained;
    uint32_t phase;
    uint64_t changed_at;            /* commits of fragment 0 when the phase began */
    double soon[PHASES_MAX], late[PHASES_MAX]; /* held-out loss SOON commits into a phase, and at its end */
};

#define CHUNK ((size_t)1 << 16)

static void die(const struct err *err) {
    fprintf(stderr, "outer-lab: %s\n", err->msg);
    exit(1);
}

static void *take(size_t count, size_t size) {
    void *p = calloc(count, size);
    if (!p) {
        fprintf(stderr, "outer-lab: no memory for %zu times %zu bytes\n", count, size);
        exit(1);
    }
    return p;
}

static size_t chunk_elements(const struct lab *l, size_t chunk) {
    size_t left = l->elements - chunk * CHUNK;
    return left < CHUNK ? left : CHUNK;
}

/* ---- evaluation ------------------------------------------------------------------------------ */

/* Of the anchor, on every stride-th block of EVAL_SAMPLES windows. */
static double heldout_loss(struct lab *l, uint64_t stride) {
    struct err err = {0};
    size_t T = l->model.sequence, got;
    uint64_t windows = (data_info(l->data)->heldout_tokens - 1) / T, blocks = 0;
    int32_t *tokens = take(EVAL_SAMPLES * (T + 1), sizeof *tokens);
    float *kept = take(l->elements, sizeof *kept);
    double sum = 0, loss;
    engine_params_read(l->replica[0], 0, l->elements, kept);
    engine_params_write(l->replica[0], 0, l->elements, l->anchor);
    for (uint64_t w = 0; w + EVAL_SAMPLES <= windows; w += stride * EVAL_SAMPLES, blocks++) {
        for (uint64_t i = 0; i < EVAL_SAMPLES; i++)
            if (data_heldout(l->data, (w + i) * T, T + 1, tokens + i * (T + 1), &got, &err)) die(&err);
        if (engine_eval_loss(l->replica[0], tokens, EVAL_SAMPLES, &loss, &err)) die(&err);
        sum += loss;
    }
    engine_params_write(l->replica[0], 0, l->elements, kept);
    free(tokens);
    free(kept);
    return sum / (double)blocks;
}

/* ---- the outer step -------------------------------------------------------------------------- */

/* Encode what replica i contributes to the fragment. */
static void freeze(struct lab *l, uint32_t f, uint32_t i) {
    struct err err = {0};
    size_t stride = outer_encoded_bytes(OUTER_FP32, CHUNK);
    for (size_t c = 0; c < l->chunks; c++) {
        size_t first = c * CHUNK, n = chunk_elements(l, c);
        if (l->fragment_of[c] != f) continue;
        engine_params_read(l->replica[i], first, n, l->scratch);
        outer_pseudo_gradient(l->scratch, l->anchor + first, l->scratch, l->residual[i] + first, n);
        uint8_t *bytes = l->bytes[i] + c * stride;
        if (outer_encode(bytes, l->scratch, n, l->o.codec, &err) ||
            outer_residual(l->residual[i] + first, l->scratch, bytes, outer_encoded_bytes(l->o.codec, n), n,
                           l->o.codec, &err))
            die(&err);
    }
}

/* W = samples of this round, R = mean of the fragment's last commits; docs/flow.md, "Learning rate". */
static float learning_rate(const struct lab *l, const struct fragment *f, uint64_t samples) {
    uint64_t n = f->commits < RECENT ? f->commits : RECENT, sum = 0;
    for (uint64_t i = 0; i < n; i++) sum += f->recent[i];
    if (!n || l->o.rule == RULE_CONSTANT) return (float)l->o.outer_lr;
    double ratio = (double)samples * (double)n / (double)sum;
    if (ratio >= 2.0 / 3) return (float)l->o.outer_lr;
    return (float)(l->o.outer_lr * (l->o.rule == RULE_SQRT ? sqrt(ratio) : ratio));
}

static int grid_exponent(const struct lab *l, const struct fragment *f, size_t c, size_t n) {
    struct err err = {0};
    size_t stride = outer_encoded_bytes(OUTER_FP32, CHUNK);
    float largest = 0, absmax;
    double norm2;
    int bits = 0;
    for (uint32_t i = 0; i < l->o.nodes; i++) {
        if (!f->in_plan[i]) continue;
        if (outer_measure(l->bytes[i] + c * stride, outer_encoded_bytes(l->o.codec, n), n, l->o.codec,
                          &absmax, &norm2, &err))
            die(&err);
        largest = absmax > largest ? absmax : largest;
    }
    frexp(largest, &bits);
    return largest > 0 && 37 - bits < 60 ? 37 - bits : 60;
}

/* Mean of a chunk's contributions into scratch, as the run's members would decode it. */
static void sum_chunk(struct lab *l, const struct fragment *f, size_t c) {
    struct err err = {0};
    size_t n = chunk_elements(l, c), stride = outer_encoded_bytes(OUTER_FP32, CHUNK),
           length = outer_encoded_bytes(l->o.codec, n);
    int exponent = grid_exponent(l, f, c, n);
    uint64_t weight = 0;
    uint8_t *result = (uint8_t *)l->sum + CHUNK * sizeof *l->sum;
    memset(l->sum, 0, n * sizeof *l->sum);
    for (uint32_t i = 0; i < l->o.nodes; i++) {
        if (!f->in_plan[i]) continue;
        weight += f->samples[i];
        if (outer_accumulate(l->sum, l->bytes[i] + c * stride, length, n, l->o.codec, (uint32_t)f->samples[i],
                             1, exponent, &err))
            die(&err);
    }
    outer_mean(l->scratch, l->sum, n, weight, exponent);
    if (outer_encode(result, l->scratch, n, l->o.result_codec, &err) ||
        outer_decode(l->scratch, result, outer_encoded_bytes(l->o.result_codec, n), n, l->o.result_codec, &err))
        die(&err);
}

static void apply(struct lab *l, uint32_t index) {
    struct fragment *f = &l->fragment[index];
    uint64_t samples = 0;
    for (uint32_t i = 0; i < l->o.nodes; i++) samples += f->in_plan[i] ? f->samples[i] : 0;
    float lr = learning_rate(l, f, samples);
    for (size_t c = 0; c < l->chunks; c++) {
        size_t first = c * CHUNK, n = chunk_elements(l, c);
        if (l->fragment_of[c] != index) continue;
        sum_chunk(l, f, c);
        outer_nesterov(l->anchor + first, l->momentum + first, l->scratch, n, lr, (float)l->o.momentum);
        for (uint32_t i = 0; i < l->o.nodes; i++) {
            if (!l->active[i]) continue;
            engine_params_read(l->replica[i], first, n, l->scratch);
            outer_mix(l->scratch, l->anchor + first, n, (float)l->o.alpha);
            engine_params_write(l->replica[i], first, n, l->scratch);
        }
    }
    f->recent[f->commits++ % RECENT] = samples;
    f->frozen_at = UINT64_MAX;
    if (index == 0 && l->o.phase_count > 1 && f->commits == l->changed_at + SOON)
        l->soon[l->phase] = heldout_loss(l, 1);
    if (l->o.trace && index == 0 && f->commits % l->o.trace == 0)
        fprintf(stderr, "%llu %.4f\n", (unsigned long long)l->trained, heldout_loss(l, 16));
}

/* Contributions of all that train. What they do from here on counts for the next one. */
static void plan(struct lab *l, uint32_t index, uint64_t own[NODES_MAX]) {
    struct fragment *f = &l->fragment[index];
    for (uint32_t i = 0; i < l->o.nodes; i++) {
        f->in_plan[i] = l->active[i];
        if (!f->in_plan[i]) continue;
        f->samples[i] = own[i] ? own[i] : 1;
        freeze(l, index, i);
    }
    f->frozen_at = l->step;
    f->due = l->step + l->o.steps;
}

/* ---- the run --------------------------------------------------------------------------------- */

/* Who trains at this point; who comes (back) starts from the anchor. */
static void set_members(struct lab *l) {
    uint64_t phase = l->trained * l->o.phase_count / l->o.tokens;
    if (phase >= l->o.phase_count) phase = l->o.phase_count - 1;
    if (phase != l->phase) {
        l->late[l->phase] = heldout_loss(l, 1);
        l->phase = (uint32_t)phase;
        l->changed_at = l->fragment[0].commits;
    }
    for (uint32_t i = 0; i < l->o.nodes; i++) {
        bool active = i < l->o.phases[phase];
        if (active && !l->active[i]) engine_params_write(l->replica[i], 0, l->elements, l->anchor);
        l->active[i] = active;
    }
}

/* One inner step of every replica. Each draws a whole round's samples at once, as a lease does: together they
 * have in each round what one worker with the sum of their batches would have. */
static void inner_step(struct lab *l, uint64_t *cursor, uint64_t own[FRAGMENTS_MAX][NODES_MAX]) {
    struct err err = {0};
    struct engine_result r;
    uint64_t position = l->trained;
    for (uint32_t i = 0; i < l->o.nodes; i++) {
        if (!l->active[i]) continue;
        for (uint64_t s = 0; s < l->o.batch; s++) {
            if (cursor[i] % (l->o.batch * l->o.steps) == 0) {
                cursor[i] = l->next_sample;
                l->next_sample += l->o.batch * l->o.steps;
            }
            uint64_t sample = cursor[i]++ % data_info(l->data)->samples;
            if (data_sample(l->data, sample, l->tokens + s * (l->model.sequence + 1), &err)) die(&err);
        }
        if (engine_step(l->replica[i], l->tokens, (uint32_t)l->o.batch, position, &r, &err)) die(&err);
        l->trained += r.tokens;
        for (uint32_t f = 0; f < l->o.fragments; f++) own[f][i] += l->o.batch;
    }
    l->step++;
}

static void train(struct lab *l) {
    static uint64_t cursor[NODES_MAX], own[FRAGMENTS_MAX][NODES_MAX];
    for (uint32_t f = 0; f < l->o.fragments; f++) {
        l->fragment[f].frozen_at = UINT64_MAX;
        l->fragment[f].due = (l->o.steps * (f + 1) + l->o.fragments - 1) / l->o.fragments;
    }
    set_members(l);
    bool ended = false;
    while (!ended) {
        inner_step(l, cursor, own);
        ended = l->trained >= l->o.tokens;
        for (uint32_t f = 0; f < l->o.fragments; f++) {
            struct fragment *p = &l->fragment[f];
            if (p->frozen_at != UINT64_MAX && (ended || l->step - p->frozen_at >= l->o.overlap)) apply(l, f);
            if (p->frozen_at != UINT64_MAX || (!ended && l->step < p->due)) continue;
            plan(l, f, own[f]);
            memset(own[f], 0, sizeof own[f]);
            if (ended || l->o.overlap == 0) apply(l, f);
        }
        if (l->step % l->o.steps == 0) set_members(l);
    }
}

/* ---- set-up ---------------------------------------------------------------------------------- */

static void set_up(struct lab *l) {
    struct err err = {0};
    struct options *o = &l->o;
    if (proto_model_preset(o->preset, &l->model, &err) ||
        proto_inner_preset(o->preset, o->tokens, &l->inner, &l->init_std, &err))
        die(&err);
    if (o->width) l->model.width = (uint32_t)o->width;
    if (o->ffn) l->model.ffn = (uint32_t)o->ffn;
    if (o->heads) l->model.heads = (uint32_t)o->heads;
    if (o->kv_heads) l->model.kv_heads = (uint32_t)o->kv_heads;
    if (proto_model_check(&l->model, &err)) die(&err);
    if (!o->batch) o->batch = l->inner.batch;
    l->inner.batch = (uint32_t)o->batch;
    l->inner.optimizer = o->optimizer;
    l->inner.states = o->states;
    if (o->lr > 0) l->inner.lr = o->lr;
    if (o->weight_decay >= 0) l->inner.weight_decay = o->weight_decay;
    if (o->beta2 > 0) l->inner.beta2 = o->beta2;
    if (o->warmup >= 0) l->inner.warmup_tokens = (uint64_t)(o->warmup * (double)o->tokens);
    if (o->decay >= 0) l->inner.decay_tokens = (uint64_t)(o->decay * (double)o->tokens);
    if (!(l->data = data_open(o->corpus, NULL, o->seed, &err))) die(&err);
    if (!(l->kernels = kernels_cpu_create(1, &err))) die(&err);
    l->elements = proto_model_elements(&l->model);
    l->chunks = (l->elements + CHUNK - 1) / CHUNK;
    l->fragment_of = take(l->chunks, 1);
    if (proto_model_fragments(&l->model, CHUNK, (uint32_t)o->fragments, l->fragment_of, &err)) die(&err);
    l->anchor = take(l->elements, sizeof *l->anchor);
    l->momentum = take(l->elements, sizeof *l->momentum);
    l->scratch = take(CHUNK, sizeof *l->scratch);
    l->sum = take(2 * CHUNK, sizeof *l->sum); /* behind the sums: the encoded result */
    l->tokens = take(o->batch * (l->model.sequence + 1), sizeof *l->tokens);
    model_init_elements(&l->model, l->init_std, o->seed, 0, l->elements, l->anchor);
    for (uint32_t i = 0; i < o->nodes; i++) {
        if (!(l->replica[i] = engine_create(&l->model, &l->inner, l->kernels, &err))) die(&err);
        l->residual[i] = take(l->elements, sizeof **l->residual);
        l->bytes[i] = take(l->chunks, outer_encoded_bytes(OUTER_FP32, CHUNK));
    }
}

static void tear_down(struct lab *l) {
    for (uint32_t i = 0; i < l->o.nodes; i++) {
        engine_destroy(l->replica[i]);
        free(l->residual[i]);
        free(l->bytes[i]);
    }
    free(l->fragment_of);
    free(l->anchor);
    free(l->momentum);
    free(l->scratch);
    free(l->sum);
    free(l->tokens);
    data_close(l->data);
    l->kernels->destroy(l->kernels);
}

/* ---- options --------------------------------------------------------------------------------- */

enum { NODES = 256, PHASES, BATCH, TOKENS, STEPS, LR, WARMUP, DECAY, WEIGHT_DECAY, BETA2, OUTER_LR, MOMENTUM,
       RULE, FRAGMENTS, OVERLAP, ALPHA, CODEC, SEED, PRESET, TRACE, CORPUS, WIDTH, FFN,
       HEADS, KV_HEADS, OPTIMIZER, STATES, HELP };

static const struct option long_options[] = {
    {"nodes", 1, NULL, NODES}, {"phases", 1, NULL, PHASES}, {"batch", 1, NULL, BATCH},
    {"tokens", 1, NULL, TOKENS}, {"steps", 1, NULL, STEPS}, {"lr", 1, NULL, LR},
    {"warmup", 1, NULL, WARMUP}, {"decay", 1, NULL, DECAY}, {"weight-decay", 1, NULL, WEIGHT_DECAY},
    {"beta2", 1, NULL, BETA2}, {"outer-lr", 1, NULL, OUTER_LR}, {"momentum", 1, NULL, MOMENTUM},
    {"rule", 1, NULL, RULE}, {"fragments", 1, NULL, FRAGMENTS}, {"overlap", 1, NULL, OVERLAP},
    {"alpha", 1, NULL, ALPHA}, {"codec", 1, NULL, CODEC}, {"seed", 1, NULL, SEED},
    {"preset", 1, NULL, PRESET}, {"trace", 1, NULL, TRACE}, {"corpus", 1, NULL, CORPUS},
    {"width", 1, NULL, WIDTH}, {"ffn", 1, NULL, FFN}, {"heads", 1, NULL, HEADS},
    {"kv-heads", 1, NULL, KV_HEADS}, {"optimizer", 1, NULL, OPTIMIZER},
    {"states", 1, NULL, STATES}, {"help", 0, NULL, HELP}, {0},
};

static int phases_of(struct options *o, const char *text) {
    for (char *end; o->phase_count < PHASES_MAX; text = end + 1) {
        unsigned long n = strtoul(text, &end, 10);
        if (end == text || n < 1 || n > NODES_MAX || (*end && *end != ',')) break;
        o->phases[o->phase_count++] = (uint32_t)n;
        if (!*end) return 0;
    }
    fprintf(stderr, "--phases are up to %d numbers from 1 to %d, with commas between\n", PHASES_MAX,
            NODES_MAX);
    return -1;
}

static int choice_of(const char *flag, const char *text, const char *const *names, size_t n, int *out) {
    for (size_t i = 0; i < n; i++)
        if (!strcmp(text, names[i])) {
            *out = (int)i;
            return 0;
        }
    fprintf(stderr, "%s is '%s'; see --help\n", flag, text);
    return -1;
}

static int take_option(struct options *o, int option, const char *text) {
    static const char *const codec_names[] = {"fp32", "int8", "fp4", "fp4+int8"}, *const optimizer_names[] = {"adamw", "muon"},
                      *const states_names[] = {"fp32", "bf16", "8bit"};
    int choice = 0, rc;
    switch (option) {
    case NODES: return args_integer("--nodes", text, 1, NODES_MAX, &o->nodes);
    case PHASES: return phases_of(o, text);
    case BATCH: return args_integer("--batch", text, 1, 4096, &o->batch);
    case TOKENS: return args_integer("--tokens", text, 1, (uint64_t)1 << 40, &o->tokens);
    case STEPS: return args_integer("--steps", text, 1, 1u << 16, &o->steps);
    case LR: return args_real("--lr", text, 1e-9, 9, &o->lr);
    case WARMUP: return args_real("--warmup", text, 0, 1, &o->warmup);
    case DECAY: return args_real("--decay", text, 0, 1, &o->decay);
    case WEIGHT_DECAY: return args_real("--weight-decay", text, 0, 9, &o->weight_decay);
    case BETA2: return args_real("--beta2", text, 1e-9, 0.99999, &o->beta2);
    case OUTER_LR: return args_real("--outer-lr", text, 0, 10, &o->outer_lr);
    case MOMENTUM: return args_real("--momentum", text, 0, 0.999, &o->momentum);
    case FRAGMENTS: return args_integer("--fragments", text, 1, FRAGMENTS_MAX, &o->fragments);
    case OVERLAP: return args_integer("--overlap", text, 0, 1u << 16, &o->overlap);
    case ALPHA: return args_real("--alpha", text, 0, 0.999, &o->alpha);
    case SEED: return args_integer("--seed", text, 0, UINT64_MAX, &o->seed);
    case TRACE: return args_integer("--trace", text, 0, 1u << 20, &o->trace);
    case WIDTH: return args_integer("--width", text, 1, 65536, &o->width);
    case FFN: return args_integer("--ffn", text, 1, 65536, &o->ffn);
    case HEADS: return args_integer("--heads", text, 1, 65536, &o->heads);
    case KV_HEADS: return args_integer("--kv-heads", text, 1, 65536, &o->kv_heads);
    case RULE:
        rc = choice_of("--rule", text, rule_names, RULES, &choice);
        o->rule = (enum rule)choice;
        return rc;
    case CODEC:
        rc = choice_of("--codec", text, codec_names, 4, &choice);
        o->codec = choice < 3 ? (enum outer_codec)choice : OUTER_FP4;
        o->result_codec = choice < 3 ? (enum outer_codec)choice : OUTER_INT8;
        return rc;
    case OPTIMIZER:
        rc = choice_of("--optimizer", text, optimizer_names, 2, &choice);
        o->optimizer = (uint8_t)choice;
        return rc;
    case STATES:
        rc = choice_of("--states", text, states_names, 3, &choice);
        o->states = (uint8_t)choice;
        return rc;
    case PRESET: o->preset = text; return 0;
    case CORPUS: o->corpus = text; return 0;
    case HELP: fputs(help, stdout); exit(0);
    default: return -1;
    }
}

static int take_options(struct options *o, int argc, char **argv) {
    for (int option; (option = getopt_long(argc, argv, "", long_options, NULL)) != -1;)
        if (take_option(o, option, optarg)) return -1;
    if (!o->corpus || optind < argc) {
        fputs(help, stderr);
        return -1;
    }
    if (!o->phase_count) o->phases[o->phase_count++] = (uint32_t)o->nodes;
    for (uint32_t i = 0; i < o->phase_count; i++)
        if (o->phases[i] > o->nodes) o->nodes = o->phases[i];
    return 0;
}

int main(int argc, char **argv) {
    static struct lab l = {.o = {.preset = "debug", .nodes = 4, .tokens = 2000000, .steps = 20,
                                 .fragments = 1, .seed = 1, .warmup = -1, .decay = -1, .weight_decay = -1, .outer_lr = 1,
                                 .codec = OUTER_INT8, .result_codec = OUTER_INT8}};
    if (take_options(&l.o, argc, argv)) return 2;
    set_up(&l);
    train(&l);
    l.late[l.phase] = heldout_loss(&l, 1);
    printf("{\"loss\": %.5f, \"tokens\": %llu, \"outer_steps\": %llu, \"phases\": [", l.late[l.phase],
           (unsigned long long)l.trained, (unsigned long long)l.fragment[0].commits);
    for (uint32_t i = 0; i < l.o.phase_count; i++)
        printf("%s{\"nodes\": %u, \"soon\": %.5f, \"end\": %.5f}", i ? ", " : "", l.o.phases[i], l.soon[i],
               l.late[i]);
    printf("]}\n");
    tear_down(&l);
    return 0;
}
