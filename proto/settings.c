/* settings.c - the table of settings, and everything that runs over it: reading run.yaml with
 * libyaml, checking one value, writing the commented file, comparing with the sealed run. What
 * the settings mean together (defaults, cross checks, the genesis) is in settings_resolve.c. */
#include "proto/settings.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <yaml.h>

#include "proto/model.h"

/* The first ones are a byte that stands for a name, see `choices`. */
enum kind {
    U8_SWITCH, U8_CODEC, U8_RULE, U8_ROPE, U8_WEIGHTS, U8_SCHEDULE, U8_OPTIMIZER, U8_STATES,
    CHOICES,
    TEXT = CHOICES, U32, U64, F32, F64, SECONDS
};

struct setting {
    const char *section, *key;
    enum kind kind;
    size_t offset;
    double min, max; /* inclusive; of a TEXT: bytes */
    bool sealed;
    const char *unknown; /* shown as the default while it is 0: where it will come from */
    const char *text;    /* for run.yaml: what it is, its unit, what breaks at both ends */
};

#define AT(field) offsetof(struct settings, field)
#define SEALED true
#define FREE false
#define TINY 1e-300 /* greater than zero */

static const struct setting table[] = {
    { "run", "name", TEXT, AT(name), 1, 64, SEALED, NULL,
      "What people call this run; shown, never used to find it." },

    { "model", "preset", TEXT, AT(preset), 1, 31, FREE, NULL,
      "The network, and inner settings tuned for it: debug (about 1M parameters), 10m, 150m, 1b, 8b, 10b.\n"
      "Larger learns more and needs more memory: about 16 bytes per parameter on each member." },
    { "model", "layers", U32, AT(model.layers), 1, 1024, SEALED, NULL,
      "Transformer blocks. Fewer learn less; more cost memory and time in proportion." },
    { "model", "width", U32, AT(model.width), 1, 65536, SEALED, NULL,
      "Elements of a token's vector, a multiple of heads; cost grows with its square." },
    { "model", "heads", U32, AT(model.heads), 1, 1024, SEALED, NULL,
      "Attention heads; width / heads must be even, 64 or 128 is usual." },
    { "model", "kv_heads", U32, AT(model.kv_heads), 1, 1024, SEALED, NULL,
      "Key and value heads, a divisor of heads. Fewer save memory when generating; 1 costs quality." },
    { "model", "ffn", U32, AT(model.ffn), 1, 262144, SEALED, NULL,
      "Width of the feed-forward layer, usually 2.7 to 4 times width." },
    { "model", "vocabulary", U32, AT(model.vocabulary), 1, 1048576, SEALED, NULL,
      "Rows of the embedding; at least the tokenizer's vocabulary, or tokens have no row." },
    { "model", "sequence", U32, AT(model.sequence), 1, 1048576, SEALED, NULL,
      "Tokens of one sample; the corpus must have been made with the same. Short: no long context;\n"
      "long: memory for attention grows with its square." },
    { "model", "rope_theta", F64, AT(model.rope_theta), 1, 1e12, SEALED, NULL,
      "Base of the rotary embedding; longer sequences want more (1e4 for 2k tokens, 5e5 for 8k)." },
    { "model", "rope_type", U8_ROPE, AT(model.rope_type), 0, 2, SEALED, NULL,
      "Hugging Face's rope_scaling, for a context stretched beyond the one trained on: default (none),\n"
      "linear, llama3 (as Llama 3.1: stretches slow pairs only)." },
    { "model", "rope_factor", F64, AT(model.rope_factor), 0, 1e6, SEALED, NULL,
      "linear and llama3: how much longer the context is. 1: not at all; large: near tokens blur." },
    { "model", "rope_low_factor", F64, AT(model.rope_low_factor), 0, 1e6, SEALED, NULL,
      "llama3: pairs that turn less often than this in the original context are stretched; usually 1." },
    { "model", "rope_high_factor", F64, AT(model.rope_high_factor), 0, 1e6, SEALED, NULL,
      "llama3: pairs that turn more often than this are left alone, over rope_low_factor; usually 4." },
    { "model", "rope_original", U32, AT(model.rope_original), 0, 1048576, SEALED, NULL,
      "llama3: tokens of the original context, 8192 for Llama 3." },
    { "model", "norm_eps", F64, AT(model.norm_eps), TINY, 0.1, SEALED, NULL,
      "Added under RMSNorm's root. Too small: division by almost nothing; too large: no norm." },
    { "model", "tied", U8_SWITCH, AT(model.tied), 0, 1, SEALED, NULL,
      "Embedding and output share one matrix; saves memory in small models, costs quality in large." },
    { "model", "init_seed", U64, AT(init_seed), 0, 9e18, SEALED, NULL,
      "Seed of the first parameters: the same on every member, so none has to send them." },
    { "model", "init_std", F32, AT(init_std), TINY, 1, SEALED, NULL,
      "Standard deviation of the first parameters. Too small: slow start; too large: it diverges." },

    { "model", "from", TEXT, AT(from), 0, PROTO_URL_BYTES_MAX, SEALED, "\"\"",
      "URL of a checkpoint whose parameters and outer momentum the run begins with, in place of the\n"
      "seed's: file:///FOLDER, s3://BUCKET/PREFIX or https://HOST/PATH, which the machine of the\n"
      "aggregate-only node must be able to read." },

    { "corpus", "manifest", TEXT, AT(corpus), 1, PROTO_URL_BYTES_MAX, SEALED, "\"\"",
      "corpus.json as `intellect-node data` wrote it, or its folder: a path, or a URL (file://, https://,\n"
      "s3://). A relative path is taken from the folder of this file." },
    { "corpus", "shuffle_seed", U64, AT(shuffle_seed), 0, 9e18, SEALED, NULL,
      "Seed of the order in which samples are trained on." },

    { "inner", "optimizer", U8_OPTIMIZER, AT(inner.optimizer), 0, 1, SEALED, NULL,
      "adamw, or muon (arXiv:2502.16982, arXiv:2505.23725): the layers' matrices step along momentum made\n"
      "orthogonal, with AdamW's decay and up to twice its rate; half its memory, more time where batches\n"
      "are small (docs/results.md)." },
    { "inner", "states", U8_STATES, AT(inner.states), 0, 2, SEALED, NULL,
      "How what the optimizer remembers of the layers' matrices is kept: fp32, bf16 or 8bit (blocks of 256,\n"
      "arXiv:2110.02861), 4, 2 or 1 bytes for each moment; less is rounded, stochastically." },
    { "inner", "batch", U32, AT(inner.batch), 1, 65536, SEALED, NULL,
      "Samples of one inner step of one member. Small: noisy steps; large: memory, fewer steps." },
    { "inner", "lr", F64, AT(inner.lr), TINY, 10, SEALED, NULL,
      "AdamW's learning rate after warm-up. Too small: nothing is learnt; too large: it diverges." },
    { "inner", "beta1", F64, AT(inner.beta1), 0, 0.999999, SEALED, NULL,
      "AdamW's memory of the gradient, in [0, 1). 0: none; near 1: turns too slowly." },
    { "inner", "beta2", F64, AT(inner.beta2), 0, 0.9999999, SEALED, NULL,
      "AdamW's memory of the squared gradient, in [0, 1). Small: unstable; near 1: blind to change." },
    { "inner", "eps", F64, AT(inner.eps), TINY, 1, SEALED, NULL,
      "Added to AdamW's divisor. Too large: steps shrink to nothing." },
    { "inner", "weight_decay", F64, AT(inner.weight_decay), 0, 10, SEALED, NULL,
      "Pull of the weights towards zero. 0: none; above about 1: nothing is kept." },
    { "inner", "clip", F64, AT(inner.clip), 0, 1e9, SEALED, NULL,
      "Largest global norm of a gradient; longer ones are scaled down. 0: never, then one bad batch\n"
      "can ruin a run; far below the usual norm it is a smaller learning rate." },
    { "inner", "z_loss", F64, AT(inner.z_loss), 0, 1, SEALED, NULL,
      "Weight of the squared logarithm of softmax's divisor, added to the loss (PaLM: 1e-4). 0: none,\n"
      "then the logits may drift until bf16 rounds them apart; large: confidence is punished." },
    { "inner", "max_z_loss", F64, AT(inner.max_z_loss), 0, 1, SEALED, NULL,
      "Likewise of the squared largest logit (Baichuan 2, INTELLECT-1: 2e-4); one of the two is enough." },
    { "inner", "total_tokens", U64, AT(inner.total_tokens), 1, 9e18, SEALED,
      "(the tokens of the corpus)",
      "Tokens of the whole run: it ends there, or when every sample is spent." },
    { "inner", "schedule", U8_SCHEDULE, AT(inner.schedule), 0, 2, SEALED, NULL,
      "How the learning rate goes on after the warm-up: wsd (stays, then falls over decay_tokens: a run can\n"
      "be prolonged before that), cosine (falls from there to the end), constant." },
    { "inner", "warmup_tokens", U64, AT(inner.warmup_tokens), 0, 9e18, SEALED,
      "(1 % of total_tokens)", "The learning rate rises for so many tokens. 0: early divergence." },
    { "inner", "decay_tokens", U64, AT(inner.decay_tokens), 0, 9e18, SEALED,
      "(20 % of total_tokens)",
      "wsd: it falls over the last so many tokens. 0: the loss stays where noise keeps it; all of them:\n"
      "little is learnt at the full rate." },

    { "outer", "mode", TEXT, AT(mode), 1, 15, FREE, NULL,
      "What the keys below are unless they are given. streaming: the parameters go in 4 parts, one after\n"
      "the other, while training goes on (arXiv:2501.18512); decoupled: likewise, and a single member\n"
      "may step; diloco: all of them at once, members wait for the result (arXiv:2311.08105);\n"
      "intellect1: likewise, and everybody waits for everybody (arXiv:2412.01152)." },
    { "outer", "inner_steps", U32, AT(outer.inner_steps), 1, 1048576, SEALED, NULL,
      "Inner steps between two outer steps (H in the DiLoCo paper). 1: all time goes into sending;\n"
      "above about 500 the members drift apart and averaging helps less." },
    { "outer", "round_seconds", SECONDS, AT(outer.round_ms), 0.05, 86400, SEALED, NULL,
      "A member is ready after inner_steps or after so long, whichever is first, so that a slow one\n"
      "holds nobody up. Short: few steps a round; long: a slow member decides." },
    { "outer", "quorum", U32, AT(outer.quorum), 1, PROTO_MEMBERS_MAX, SEALED, NULL,
      "A round is planned when so many members are ready (or all that live, where they are fewer)\n"
      "and the grace window is over. 1: the fastest alone may step; all: the slowest decides." },
    { "outer", "grace_seconds", SECONDS, AT(outer.grace_ms), 0, 86400, SEALED, NULL,
      "How long the quorum waits for the others. 0: slow members are never summed; long: all wait." },
    { "outer", "lr", F32, AT(outer.lr), TINY, 10, SEALED, NULL,
      "Outer learning rate of Nesterov SGD: 0.4 for one member, 0.6 to 0.8 for several. Far from\n"
      "that: slower than plain averaging (1 with momentum 0), or divergence." },
    { "outer", "momentum", F32, AT(outer.momentum), 0, 0.9999, SEALED, NULL,
      "Outer momentum, in [0, 1). 0: plain averaging; near 1: overshoots for many rounds." },
    { "outer", "alpha", F32, AT(outer.alpha), 0, 1, SEALED, NULL,
      "A summed member goes on from alpha * its own + (1 - alpha) * the new parameters. 0: all take\n"
      "the new ones; 1: members never come together again." },
    { "outer", "contribution_codec", U8_CODEC, AT(outer.contribution_codec), 0, 2, SEALED, NULL,
      "What members send: int8 (a quarter of the bytes, blocks with a scale), fp4 (an eighth; what it\n"
      "loses comes with the next contribution) or fp32 (exact)." },
    { "outer", "result_codec", U8_CODEC, AT(outer.result_codec), 0, 2, SEALED, NULL,
      "What they get back, likewise; but what is lost here is lost: fp4 makes outer steps noisy." },
    { "outer", "chunk_elements", U32, AT(outer.chunk_elements), 4096, PROTO_CHUNK_ELEMENTS_MAX,
      SEALED, NULL,
      "Parameters of one chunk, a multiple of 4096: the unit of sending, hashing and resuming.\n"
      "Small: many digests; large: a broken link repeats more." },
    { "outer", "fragments", U32, AT(outer.fragments), 1, PROTO_FRAGMENTS_MAX, SEALED, NULL,
      "Parts of the model, by layers, that are averaged in turn, each once in inner_steps. 1: all traffic\n"
      "at one moment; many: an even trickle, but each part's rounds overlap with the others'." },
    { "outer", "overlap", U32, AT(outer.overlap), 0, 1048576, SEALED, NULL,
      "Inner steps that members may do while a round is under way. 0: they wait for its result; more:\n"
      "they train on and mix it in when it comes, and slow members have so many steps to be ready." },
    { "outer", "shard_chunks", U32, AT(outer.shard_chunks), 1, PROTO_CHUNKS_MAX, SEALED, NULL,
      "Chunks that one member sums at least. Few: every member sums a little; many: few members do." },
    { "outer", "audits", U32, AT(outer.audits), 0, PROTO_AUDITS_MAX, SEALED, NULL,
      "Chunks of each round, drawn after it was summed, that somebody else sums again before it counts.\n"
      "0: a lying aggregator is not found; many: that much more traffic." },
    { "outer", "lr_rule", U8_RULE, AT(outer.lr_rule), 0, 1, SEALED, NULL,
      "constant, or sqrt: while a round has under two thirds of the samples that the last ones had, lr is\n"
      "scaled by the square root of that share. docs/results.md has both measured: constant was better." },
    { "outer", "fixed_membership", U8_SWITCH, AT(outer.fixed_membership), 0, 1, SEALED, NULL,
      "The run stops with an error when a member is lost: for experiments that must stay comparable." },
    { "outer", "clip_factor", F32, AT(outer.clip_factor), 0, 1e6, SEALED, NULL,
      "A contribution whose norm is over this times the median of the round is scaled down to it.\n"
      "0: never, so one broken member can ruin a step; near 1: honest ones are cut." },
    { "outer", "ramp_rounds", U32, AT(outer.ramp_rounds), 0, 1024, SEALED, NULL,
      "A new member's weight grows to full over so many rounds. 0: its cold optimizer counts fully\n"
      "at once, which shows as a bump in the loss; many: its work is wasted for long." },
    { "outer", "heartbeat_seconds", SECONDS, AT(outer.heartbeat_ms), 0.05, 3600, SEALED, NULL,
      "How often a member reports its progress. Short: traffic; long: a death is noticed late." },
    { "outer", "silence_seconds", SECONDS, AT(outer.silence_ms_max), 0.2, 86400, SEALED, NULL,
      "A member without progress for so long is lost: its data goes to others. At least three\n"
      "heartbeats; every layer that is computed is progress, so a step may take longer." },
    { "outer", "lease_samples", U32, AT(outer.lease_samples), 1, 1048576, SEALED, NULL,
      "Samples a member is handed at a time; it holds at most twice as many unspent. Small: it\n"
      "waits for data; large: much is handed out again when it dies." },
    { "outer", "checkpoint_rounds", U32, AT(outer.checkpoint_rounds), 1, 1048576, SEALED, NULL,
      "A checkpoint every so many rounds, and one at the end. 1: much disk; many: an old one to\n"
      "fall back to." },

    { "checkpoint", "url", TEXT, AT(checkpoint_url), 1, PROTO_URL_BYTES_MAX, SEALED, NULL,
      "Where checkpoints go: file:///FOLDER, on the machine of the aggregate-only node, or a bucket,\n"
      "s3://BUCKET/PREFIX?endpoint=https://HOST&region=NAME. Everybody reads this URL, so no key is in\n"
      "it: that stays in the environment or a file of the machine of the aggregate-only node, which\n"
      "alone writes (docs/checkpoint.md)." },
    { "checkpoint", "weights", U8_WEIGHTS, AT(checkpoint_bf16), 0, 1, FREE, NULL,
      "What others load of a checkpoint: fp32, or bf16, half as much, with the fp32 parameters that\n"
      "the run goes on from beside it: 10 bytes a parameter in all, not 8." },

    { "serve", "listen", TEXT, AT(listen), 1, PROTO_ADDRESS_BYTES_MAX + 7, FREE, NULL,
      "HOST:PORT to listen on; 0.0.0.0 is every IPv4 address of this machine, [::] also IPv6." },
    { "serve", "address", TEXT, AT(address), 1, PROTO_ADDRESS_BYTES_MAX + 7, FREE,
      "(what listen says; for 0.0.0.0 the first address of this machine)",
      "HOST or HOST:PORT under which members reach this machine: what invites say, and where the\n"
      "aggregate-only node beside the coordinator is dialled. Wrong: nobody can join." },
    { "serve", "aggregator_port", U32, AT(aggregator_port), 0, 65535, FREE, NULL,
      "Port of the aggregate-only node; open it in the firewall beside listen's. 0: any free one." },
    { "serve", "strangers_max", U32, AT(strangers_max), 1, 65536, FREE, NULL,
      "Connections that have not shown a member's key yet. Few: a scan keeps members out; many: memory." },
    { "serve", "stranger_seconds", U32, AT(stranger_seconds), 1, 3600, FREE, NULL,
      "How long such a connection may take to enrol. Short: slow links fail; long: they pile up." },
    { "serve", "connects_per_minute", U32, AT(connects_per_minute), 1, 1000000, FREE, NULL,
      "New connections of one address. Few: members behind one NAT wait; many: a flood gets in." },
};
#define SETTINGS ((int)(sizeof table / sizeof *table))
_Static_assert(sizeof table / sizeof *table <= SETTINGS_MAX, "struct settings counts them");

/* Numbers of docs/protocol.md. */
static const struct choice {
    uint8_t count;
    const char *name[3], *allowed;
} choices[CHOICES] = {
    [U8_SWITCH] = { 2, { "false", "true" }, "true and false" },
    [U8_CODEC] = { 3, { "fp32", "int8", "fp4" }, "fp32, int8 and fp4" },
    [U8_RULE] = { 2, { "constant", "sqrt" }, "constant and sqrt" },
    [U8_ROPE] = { 3, { "default", "linear", "llama3" }, "default, linear and llama3" },
    [U8_WEIGHTS] = { 2, { "fp32", "bf16" }, "fp32 and bf16" },
    [U8_SCHEDULE] = { 3, { "wsd", "cosine", "constant" }, "wsd, cosine and constant" },
    [U8_OPTIMIZER] = { 2, { "adamw", "muon" }, "adamw and muon" },
    [U8_STATES] = { 3, { "fp32", "bf16", "8bit" }, "fp32, bf16 and 8bit" },
};

void settings_init(struct settings *s) {
    memset(s, 0, sizeof *s);
}

static int index_of_field(const struct settings *s, const void *field) {
    size_t offset = (size_t)((const char *)field - (const char *)s);
    for (int i = 0; i < SETTINGS; i++)
        if (table[i].offset == offset) return i;
    assert(!"no setting is kept in this field");
    return 0;
}

bool settings_given(const struct settings *s, const void *field) {
    return s->given[index_of_field(s, field)];
}

void settings_mark_given(struct settings *s, const void *field) {
    s->given[index_of_field(s, field)] = true;
}

void settings_mark_all_given(struct settings *s, const void *first, size_t bytes) {
    size_t from = (size_t)((const char *)first - (const char *)s);
    for (int i = 0; i < SETTINGS; i++)
        if (table[i].offset >= from && table[i].offset < from + bytes) s->given[i] = true;
}

/* ---- one value ----------------------------------------------------------------------------- */

/* Where a value came from, for messages: "run.yaml line 12", "--set". */
struct origin {
    const char *path;
    size_t line; /* 0: not from a file */
};

static int refuse(const struct origin *at, struct err *err, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static int refuse(const struct origin *at, struct err *err, const char *format, ...) {
    char text[256];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    if (!at->line) return err_set(err, ERR_CONFIG, "%s: %s", at->path, text);
    const char *slash = strrchr(at->path, '/');
    return err_set(err, ERR_CONFIG, "%s line %zu: %s", slash ? slash + 1 : at->path, at->line, text);
}

/* "a whole number from 1 to 1024" */
static void describe_allowed(const struct setting *t, char *out, size_t size) {
    switch (t->kind) {
    case TEXT: snprintf(out, size, "%.0f to %.0f bytes of UTF-8 without control characters", t->min, t->max); return;
    default: snprintf(out, size, "%s", choices[t->kind].allowed); return;
    case U32:
    case U64: snprintf(out, size, "whole numbers from %.0f to %.0f", t->min, t->max); return;
    case SECONDS: snprintf(out, size, "seconds from %g to %g", t->min, t->max); return;
    case F32:
    case F64:
        if (t->min == TINY) snprintf(out, size, "numbers over 0 up to %g", t->max);
        else snprintf(out, size, "numbers from %g to %.10g", t->min, t->max);
    }
}

static bool parse_whole(const char *text, uint64_t *out) {
    size_t digits = strspn(text, "0123456789");
    if (!digits || text[digits] || digits > 20) return false;
    errno = 0;
    *out = strtoull(text, NULL, 10);
    return errno == 0;
}

/* Decimal only: strtod() alone would also take "nan", "inf" and "0x10". */
static bool parse_number(const char *text, double *out) {
    char *end;
    if (!*text || text[strspn(text, "0123456789+-.eE")]) return false;
    *out = strtod(text, &end);
    return !*end && isfinite(*out);
}

static bool store_choice(uint8_t *field, const struct choice *c, const char *text) {
    for (uint8_t i = 0; i < c->count; i++)
        if (!strcmp(text, c->name[i])) {
            *field = i;
            return true;
        }
    return false;
}

static bool store_text(char *field, const struct setting *t, const char *text) {
    size_t length = strlen(text);
    if (length < t->min || length > t->max) return false;
    if (!proto_text_is_clean((const uint8_t *)text, length)) return false; /* it goes into the genesis */
    strcpy(field, text);
    return true;
}

static bool store_whole(char *field, const struct setting *t, const char *text) {
    uint64_t whole;
    if (!parse_whole(text, &whole) || (double)whole < t->min || (double)whole > t->max) return false;
    uint32_t narrow = (uint32_t)whole;
    if (t->kind == U64) memcpy(field, &whole, sizeof whole);
    else memcpy(field, &narrow, sizeof narrow);
    return true;
}

static bool store_number(char *field, const struct setting *t, const char *text) {
    double number;
    if (!parse_number(text, &number) || number < t->min || number > t->max) return false;
    float single = (float)number;
    if (t->kind == F32) memcpy(field, &single, sizeof single);
    else memcpy(field, &number, sizeof number);
    return true;
}

static bool store_seconds(char *field, const struct setting *t, const char *text) {
    double seconds;
    if (!parse_number(text, &seconds) || seconds < t->min || seconds > t->max) return false;
    uint32_t ms = (uint32_t)llround(seconds * 1000);
    memcpy(field, &ms, sizeof ms);
    return true;
}

/* Put `text` into the setting's field if it is allowed there. */
static bool store_value(struct settings *s, const struct setting *t, const char *text) {
    char *field = (char *)s + t->offset;
    switch (t->kind) {
    case TEXT: return store_text(field, t, text);
    case U32:
    case U64: return store_whole(field, t, text);
    case F32:
    case F64: return store_number(field, t, text);
    case SECONDS: return store_seconds(field, t, text);
    default: return store_choice((uint8_t *)field, &choices[t->kind], text);
    }
}

static int set_value(struct settings *s, const struct setting *t, const char *text, bool quoted,
                     const struct origin *at, struct err *err) {
    if ((!quoted || t->kind == TEXT) && store_value(s, t, text)) {
        s->given[t - table] = true;
        return 0;
    }
    char allowed[128];
    describe_allowed(t, allowed, sizeof allowed);
    const char *quote = quoted ? "\"" : "'";
    return refuse(at, err, "%s.%s is %s%.40s%s; allowed are %s", t->section, t->key, quote, text,
                  quote, allowed);
}

/* ---- finding a key --------------------------------------------------------------------------- */

/* List what may stand there: keys of a section, or the sections when section is NULL. */
static void list_names(const char *section, char *out, size_t size) {
    size_t used = 0;
    out[0] = '\0';
    for (int i = 0; i < SETTINGS; i++) {
        const struct setting *t = &table[i];
        if (section && strcmp(t->section, section) != 0) continue;
        if (!section && i > 0 && !strcmp(t->section, table[i - 1].section)) continue;
        int n = snprintf(out + used, size - used, "%s%s", used ? ", " : "",
                         section ? t->key : t->section);
        if (n < 0 || used + (size_t)n >= size) return;
        used += (size_t)n;
    }
}

static int check_section(const char *section, const struct origin *at, struct err *err) {
    char names[200];
    for (int i = 0; i < SETTINGS; i++)
        if (!strcmp(table[i].section, section)) return 0;
    list_names(NULL, names, sizeof names);
    return refuse(at, err, "unknown section '%.40s'; allowed are %s", section, names);
}

static const struct setting *find_setting(const char *section, const char *key,
                                          const struct origin *at, struct err *err) {
    char names[256];
    if (check_section(section, at, err)) return NULL;
    for (int i = 0; i < SETTINGS; i++)
        if (!strcmp(table[i].section, section) && !strcmp(table[i].key, key)) return &table[i];
    list_names(section, names, sizeof names);
    refuse(at, err, "unknown key %s.%.40s; allowed in %s: %s", section, key, section, names);
    return NULL;
}

int settings_set(struct settings *s, const char *assignment, struct err *err) {
    char section[32], key[48];
    struct origin at = { .path = "--set" };
    if (sscanf(assignment, "%31[a-z0-9_].%47[a-z0-9_]", section, key) != 2)
        return refuse(&at, err, "'%.60s' is not SECTION.KEY=VALUE, like outer.quorum=3", assignment);
    const char *equals = assignment + strlen(section) + 1 + strlen(key);
    if (*equals != '=')
        return refuse(&at, err, "'%.60s' is not SECTION.KEY=VALUE, like outer.quorum=3", assignment);
    const struct setting *t = find_setting(section, key, &at, err);
    return t ? set_value(s, t, equals + 1, false, &at, err) : -1;
}

/* ---- reading run.yaml -------------------------------------------------------------------------- */

#define DEPTH_MAX 8

struct reader {
    struct settings *s;
    const char *path;
    yaml_document_t doc;
    bool seen[SETTINGS_MAX];
};

static struct origin origin_of(const struct reader *r, const yaml_node_t *node) {
    return (struct origin){ .path = r->path, .line = node->start_mark.line + 1 };
}

static const char *scalar_text(const yaml_node_t *node) {
    if (node->type != YAML_SCALAR_NODE) return NULL;
    const char *text = (const char *)node->data.scalar.value;
    return strlen(text) == node->data.scalar.length ? text : NULL; /* no NUL inside */
}

static int read_setting(struct reader *r, const char *section, yaml_node_pair_t *pair,
                        struct err *err) {
    yaml_node_t *key = yaml_document_get_node(&r->doc, pair->key);
    yaml_node_t *value = yaml_document_get_node(&r->doc, pair->value);
    struct origin at = origin_of(r, key);
    const char *name = scalar_text(key), *text = scalar_text(value);
    if (!name) return refuse(&at, err, "a key of %s is not a plain word", section);
    const struct setting *t = find_setting(section, name, &at, err);
    if (!t) return -1;
    if (r->seen[t - table])
        return refuse(&at, err, "%s.%s stands here a second time", section, name);
    r->seen[t - table] = true;
    if (!text) {
        char allowed[128];
        describe_allowed(t, allowed, sizeof allowed);
        return refuse(&at, err, "%s.%s is a %s; allowed are %s", section, name,
                      value->type == YAML_SEQUENCE_NODE ? "list" : "section", allowed);
    }
    return set_value(r->s, t, text, value->data.scalar.style != YAML_PLAIN_SCALAR_STYLE, &at, err);
}

static int read_section(struct reader *r, yaml_node_pair_t *pair, struct err *err) {
    yaml_node_t *key = yaml_document_get_node(&r->doc, pair->key);
    yaml_node_t *value = yaml_document_get_node(&r->doc, pair->value);
    struct origin at = origin_of(r, key);
    const char *name = scalar_text(key);
    if (!name) return refuse(&at, err, "the name of a section is not a plain word");
    if (check_section(name, &at, err)) return -1;
    if (value->type == YAML_SCALAR_NODE && !value->data.scalar.length) return 0; /* all defaults */
    if (value->type != YAML_MAPPING_NODE)
        return refuse(&at, err, "section '%s' has no keys; write them below it, indented", name);
    for (yaml_node_pair_t *p = value->data.mapping.pairs.start; p < value->data.mapping.pairs.top;
         p++)
        if (read_setting(r, name, p, err)) return -1;
    return 0;
}

static int read_document(struct reader *r, struct err *err) {
    yaml_node_t *root = yaml_document_get_root_node(&r->doc);
    if (!root) return 0; /* an empty file: all defaults */
    struct origin at = origin_of(r, root);
    if (root->type != YAML_MAPPING_NODE) {
        char names[200];
        list_names(NULL, names, sizeof names);
        return refuse(&at, err, "expected sections: %s", names);
    }
    for (yaml_node_pair_t *p = root->data.mapping.pairs.start; p < root->data.mapping.pairs.top; p++)
        if (read_section(r, p, err)) return -1;
    return 0;
}

/* Lists in lists by the thousand take libyaml minutes to load; reading them one by one does not. What
 * is no YAML is left to yaml_parser_load(). */
static bool is_nested_too_deeply(const char *text, size_t length) {
    yaml_parser_t parser;
    int depth = 0, deepest = 0;
    bool more = yaml_parser_initialize(&parser);
    if (!more) return false;
    yaml_parser_set_input_string(&parser, (const unsigned char *)text, length);
    while (more && deepest <= DEPTH_MAX) {
        yaml_event_t event;
        if (!yaml_parser_parse(&parser, &event)) break;
        depth += event.type == YAML_MAPPING_START_EVENT || event.type == YAML_SEQUENCE_START_EVENT;
        depth -= event.type == YAML_MAPPING_END_EVENT || event.type == YAML_SEQUENCE_END_EVENT;
        if (depth > deepest) deepest = depth;
        more = event.type != YAML_STREAM_END_EVENT;
        yaml_event_delete(&event);
    }
    yaml_parser_delete(&parser);
    return deepest > DEPTH_MAX;
}

int settings_parse(struct settings *s, const char *path, const char *text, size_t length,
                   struct err *err) {
    struct reader r = { .s = s, .path = path };
    yaml_parser_t parser;
    if (is_nested_too_deeply(text, length))
        return err_set(err, ERR_CONFIG, "%s: lists or sections more than %d deep; run.yaml has sections of keys",
                       path, DEPTH_MAX);
    if (!yaml_parser_initialize(&parser)) return err_set(err, ERR_MEMORY, "no memory for %s", path);
    yaml_parser_set_input_string(&parser, (const unsigned char *)text, length);
    int result;
    if (!yaml_parser_load(&parser, &r.doc)) {
        struct origin at = { .path = path, .line = parser.problem_mark.line + 1 };
        result = refuse(&at, err, "not YAML: %s%s%s", parser.problem ? parser.problem : "?",
                        parser.context ? ", " : "", parser.context ? parser.context : "");
    } else {
        result = read_document(&r, err);
        yaml_document_delete(&r.doc);
    }
    yaml_parser_delete(&parser);
    return result;
}

int settings_load(struct settings *s, const char *path, struct err *err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC), result = -1;
    if (fd < 0) return err_set_errno(err, "open %s", path);
    char *text = malloc(SETTINGS_BYTES_MAX + 1);
    ssize_t n = text ? read(fd, text, SETTINGS_BYTES_MAX + 1) : 0;
    if (!text) err_set(err, ERR_MEMORY, "no memory for %s", path);
    else if (n < 0) err_set_errno(err, "read %s", path);
    else if (n > (ssize_t)SETTINGS_BYTES_MAX)
        err_set(err, ERR_CONFIG, "%s is over %u bytes: no run.yaml", path, SETTINGS_BYTES_MAX);
    else result = settings_parse(s, path, text, (size_t)n, err);
    free(text);
    close(fd);
    return result;
}

/* ---- writing it ------------------------------------------------------------------------------- */

/* The shortest decimal that reads back as the same number, but 10000 rather than 1e+04. */
static void format_number(double number, bool is_float, char *out, size_t size) {
    int before_point = number >= 1 && number < 1e9 ? (int)log10(number) + 1 : 1;
    for (int digits = before_point; digits <= 17; digits++) {
        snprintf(out, size, "%.*g", digits, number);
        double back = strtod(out, NULL);
        if (is_float ? (float)back == (float)number : back == number) return;
    }
}

/* What YAML would fold or refuse even between quotation marks: U+2028, U+2029, U+FEFF, U+FFFE, U+FFFF. */
static const char *escape_of(const char *text) {
    static const char *const escapes[][2] = {
        { "\xe2\x80\xa8", "\\u2028" }, { "\xe2\x80\xa9", "\\u2029" }, { "\xef\xbb\xbf", "\\uFEFF" },
        { "\xef\xbf\xbe", "\\uFFFE" }, { "\xef\xbf\xbf", "\\uFFFF" },
    };
    for (size_t i = 0; i < sizeof escapes / sizeof *escapes; i++)
        if (!strncmp(text, escapes[i][0], 3)) return escapes[i][1];
    return NULL;
}

/* Between quotation marks; out has room for twice the text and 8 bytes. */
static void format_text(const char *text, char *out, size_t size) {
    size_t used = 0;
    assert(size >= 2 * strlen(text) + 8);
    out[used++] = '"';
    while (*text) {
        const char *escape = escape_of(text);
        if (escape) {
            memcpy(out + used, escape, 6);
            used += 6;
            text += 3;
            continue;
        }
        if (*text == '"' || *text == '\\') out[used++] = '\\';
        out[used++] = *text++;
    }
    out[used++] = '"';
    out[used] = '\0';
}

static bool value_is_zero(const struct setting *t, const char *field) {
    switch (t->kind) {
    case TEXT: return !*field;
    case U64: return *(const uint64_t *)(const void *)field == 0;
    case U32: return *(const uint32_t *)(const void *)field == 0;
    default: return false;
    }
}

static void format_value(const struct settings *s, const struct setting *t, char *out, size_t size) {
    const void *field = (const char *)s + t->offset;
    switch (t->kind) {
    case TEXT: format_text(field, out, size); return;
    case U8_SWITCH: snprintf(out, size, "%s", *(const uint8_t *)field ? "true" : "false"); return;
    default:
        snprintf(out, size, "%s", choices[t->kind].name[*(const uint8_t *)field % choices[t->kind].count]);
        return;
    case U32: snprintf(out, size, "%u", *(const uint32_t *)field); return;
    case U64:
        snprintf(out, size, "%llu", (unsigned long long)*(const uint64_t *)field);
        return;
    case SECONDS: format_number(*(const uint32_t *)field / 1000.0, false, out, size); return;
    case F32: format_number((double)*(const float *)field, true, out, size); return;
    case F64: format_number(*(const double *)field, false, out, size); return;
    }
}

static const char *const preamble =
    "# run.yaml - the settings of one run, for `intellect-coordinator`.\n"
    "#\n"
    "# Below each explanation stands its key. Where the key is commented out, the value is the\n"
    "# default; take the '#' away to change it. `init` seals all but the section `serve` into the\n"
    "# run's name: afterwards they cannot change. Until the first member has enrolled, change them\n"
    "# and run `intellect-coordinator init DIR` again.\n";

static void write_settings(const struct settings *s, FILE *out) {
    char value[PROTO_URL_BYTES_MAX * 2 + 8];
    fputs(preamble, out);
    for (int i = 0; i < SETTINGS; i++) {
        const struct setting *t = &table[i];
        if (i == 0 || strcmp(t->section, table[i - 1].section) != 0)
            fprintf(out, "\n%s:\n", t->section);
        for (const char *line = t->text; *line;) {
            int length = (int)strcspn(line, "\n");
            fprintf(out, "  # %.*s\n", length, line);
            line += length + (line[length] == '\n');
        }
        /* What is not known yet is 0, but 0 may also have been given. */
        if (t->unknown && !s->given[i] && value_is_zero(t, (const char *)s + t->offset))
            snprintf(value, sizeof value, "%s", t->unknown);
        else
            format_value(s, t, value, sizeof value);
        fprintf(out, "  %s%s: %s\n", s->given[i] ? "" : "# ", t->key, value);
    }
}

static int sync_and_rename(FILE *f, const char *from, const char *to, struct err *err) {
    if (fflush(f) || ferror(f) || fsync(fileno(f))) return err_set_errno(err, "write %s", from);
    if (rename(from, to)) return err_set_errno(err, "rename %s to %s", from, to);
    return 0;
}

int settings_save(const struct settings *s, const char *path, struct err *err) {
    char temporary[4096];
    if (snprintf(temporary, sizeof temporary, "%s.new", path) >= (int)sizeof temporary)
        return err_set(err, ERR_CONFIG, "the path of %s is too long", SETTINGS_FILE_NAME);
    FILE *f = fopen(temporary, "we");
    if (!f) return err_set_errno(err, "create %s", temporary);
    write_settings(s, f);
    int result = sync_and_rename(f, temporary, path, err);
    fclose(f);
    if (result) unlink(temporary);
    return result;
}

/* ---- comparing -------------------------------------------------------------------------------- */

/* Bytes of a field that is no text. */
static size_t value_size(const struct setting *t) {
    switch (t->kind) {
    default: return 1;
    case U32:
    case F32:
    case SECONDS: return 4;
    case U64:
    case F64: return 8;
    case TEXT: break;
    }
    return 0;
}

bool settings_same_sealed(const struct settings *file, const struct settings *sealed, char *what,
                          size_t what_size) {
    for (int i = 0; i < SETTINGS; i++) {
        const struct setting *t = &table[i];
        const char *a = (const char *)file + t->offset, *b = (const char *)sealed + t->offset;
        bool same = t->kind == TEXT ? !strcmp(a, b) : !memcmp(a, b, value_size(t));
        if (!t->sealed || same) continue;
        char in_file[PROTO_URL_BYTES_MAX * 2 + 8], in_run[PROTO_URL_BYTES_MAX * 2 + 8];
        format_value(file, t, in_file, sizeof in_file);
        format_value(sealed, t, in_run, sizeof in_run);
        snprintf(what, what_size, "%s.%s is %.80s in %s, but %.80s in the sealed run", t->section,
                 t->key, in_file, SETTINGS_FILE_NAME, in_run);
        return false;
    }
    return true;
}
