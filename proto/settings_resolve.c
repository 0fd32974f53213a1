/* settings_resolve.c - what the settings mean together: defaults that depend on each other and on
 * the corpus, the checks across them, and the genesis they are sealed into. */
#include <jansson.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "proto/address.h"
#include "proto/settings.h"
#include "proto/model.h"

#define GENESIS_VERSION 1
#define CORPUS_FORMAT 1
#define CORPUS_NAME "corpus.json"

/* ---- the corpus ------------------------------------------------------------------------------ */

static int get_whole(const json_t *root, const char *key, uint64_t max, uint64_t *out,
                     const char *path, struct err *err) {
    const json_t *value = json_object_get(root, key);
    if (!json_is_integer(value) || json_integer_value(value) < 1 ||
        (uint64_t)json_integer_value(value) > max)
        return err_set(err, ERR_CONFIG, "%s: \"%s\" is not a whole number from 1 to %llu", path, key,
                       (unsigned long long)max);
    *out = (uint64_t)json_integer_value(value);
    return 0;
}

static int facts_from_json(struct corpus_facts *out, const json_t *root, const char *path,
                           struct err *err) {
    uint64_t format, vocabulary, sequence;
    const char *tokenizer = json_string_value(json_object_get(root, "tokenizer"));
    if (get_whole(root, "format", UINT32_MAX, &format, path, err) ||
        get_whole(root, "vocabulary", 1u << 20, &vocabulary, path, err) ||
        get_whole(root, "sequence", 1u << 20, &sequence, path, err) ||
        get_whole(root, "samples", INT64_MAX, &out->samples, path, err))
        return -1;
    if (format != CORPUS_FORMAT)
        return err_set(err, ERR_CONFIG, "%s has format %llu, this program knows %d", path,
                       (unsigned long long)format, CORPUS_FORMAT);
    if (!tokenizer || !*tokenizer || strlen(tokenizer) >= sizeof out->tokenizer)
        return err_set(err, ERR_CONFIG, "%s: \"tokenizer\" is not a name of 1 to %zu bytes", path,
                       sizeof out->tokenizer - 1);
    strcpy(out->tokenizer, tokenizer);
    out->vocabulary = (uint32_t)vocabulary;
    out->sequence = (uint32_t)sequence;
    return 0;
}

static char *read_whole_file(const char *path, size_t *length, struct err *err) {
    char *text = NULL;
    FILE *f = fopen(path, "re");
    struct stat st;
    if (!f || fstat(fileno(f), &st)) {
        err_set_errno(err, "open the corpus %s", path);
    } else if (!S_ISREG(st.st_mode) || st.st_size > (off_t)CORPUS_MANIFEST_BYTES_MAX) {
        err_set(err, ERR_CONFIG, "%s is no corpus manifest: not a file of at most %u bytes", path,
                CORPUS_MANIFEST_BYTES_MAX);
    } else if (!(text = malloc((size_t)st.st_size + 1))) {
        err_set(err, ERR_MEMORY, "no memory for %s", path);
    } else {
        *length = fread(text, 1, (size_t)st.st_size, f);
    }
    if (f) fclose(f);
    return text;
}

int corpus_facts_parse(struct corpus_facts *out, const char *text, size_t length, const char *where,
                       struct err *err) {
    json_error_t problem;
    json_t *root = json_loadb(text, length, JSON_REJECT_DUPLICATES, &problem);
    int result;
    memset(out, 0, sizeof *out);
    if (!root)
        result = err_set(err, ERR_CONFIG, "%.150s is not JSON, line %d: %s", where, problem.line, problem.text);
    else
        result = facts_from_json(out, root, where, err);
    out->manifest_digest = digest_of(text, length);
    json_decref(root);
    return result;
}

int corpus_facts_read(struct corpus_facts *out, const char *path, struct err *err) {
    size_t length;
    char *text = read_whole_file(path, &length, err);
    int result = text ? corpus_facts_parse(out, text, length, path, err) : -1;
    free(text);
    return result;
}

int settings_locate_corpus(struct settings *s, const char *dir, char *path, size_t path_size,
                           struct err *err) {
    char joined[2 * PATH_MAX], absolute[PATH_MAX];
    const char *given = s->corpus;
    struct stat st;
    *path = '\0';
    if (!strncmp(given, "https://", 8) || !strncmp(given, "http://", 7) || !strncmp(given, "s3://", 5)) return 0;
    if (!strncmp(given, "file://", 7)) given += 7;
    else if (strstr(given, "://"))
        return err_set(err, ERR_CONFIG,
                       "corpus.manifest '%.100s': allowed are a path, file://PATH, https://HOST/PATH and "
                       "s3://BUCKET/PREFIX", given);
    snprintf(joined, sizeof joined, "%s%s%s", *given == '/' ? "" : dir, *given == '/' ? "" : "/",
             given);
    if (stat(joined, &st) == 0 && S_ISDIR(st.st_mode))
        snprintf(joined + strlen(joined), sizeof joined - strlen(joined), "/" CORPUS_NAME);
    if (!realpath(joined, absolute)) return err_set_errno(err, "corpus.manifest %.150s", joined);
    if (strlen(absolute) + 7 > PROTO_URL_BYTES_MAX || strlen(absolute) >= path_size)
        return err_set(err, ERR_CONFIG, "corpus.manifest: the path is over %d bytes long",
                       PROTO_URL_BYTES_MAX - 7);
    memcpy(path, absolute, strlen(absolute) + 1);
    snprintf(s->corpus, sizeof s->corpus, "file://%.*s", PROTO_URL_BYTES_MAX - 7, absolute);
    return 0;
}

/* ---- defaults -------------------------------------------------------------------------------- */

#define DEFAULT(field, value)                                                                      \
    do {                                                                                           \
        if (!settings_given(s, &s->field)) s->field = (value);                                     \
    } while (0)
#define DEFAULT_TEXT(field, ...)                                                                   \
    do {                                                                                           \
        if (!settings_given(s, s->field)) snprintf(s->field, sizeof s->field, __VA_ARGS__);        \
    } while (0)

static void default_network(struct settings *s, const struct msg_model *m) {
    DEFAULT(model.layers, m->layers);
    DEFAULT(model.width, m->width);
    DEFAULT(model.heads, m->heads);
    DEFAULT(model.kv_heads, m->kv_heads);
    DEFAULT(model.ffn, m->ffn);
    DEFAULT(model.vocabulary, m->vocabulary);
    DEFAULT(model.sequence, m->sequence);
    DEFAULT(model.rope_theta, m->rope_theta);
    DEFAULT(model.rope_type, m->rope_type);
    DEFAULT(model.rope_factor, m->rope_factor);
    DEFAULT(model.rope_low_factor, m->rope_low_factor);
    DEFAULT(model.rope_high_factor, m->rope_high_factor);
    DEFAULT(model.rope_original, m->rope_original);
    DEFAULT(model.norm_eps, m->norm_eps);
    DEFAULT(model.tied, m->tied);
}

static int default_model(struct settings *s, struct err *err) {
    struct msg_model m;
    if (proto_model_preset(s->preset, &m, err)) {
        err_prefix(err, "model.preset");
        return -1;
    }
    default_network(s, &m);
    DEFAULT(init_seed, 1);
    return 0;
}

void settings_take_model(struct settings *s, const struct msg_model *m, const struct corpus_facts *corpus) {
    struct msg_model taken = *m;
    if (corpus && corpus->sequence < m->sequence) taken.sequence = corpus->sequence;
    default_network(s, &taken);
    settings_mark_all_given(s, &s->model, sizeof s->model);
}

static int default_inner(struct settings *s, const struct corpus_facts *corpus, struct err *err) {
    struct msg_inner in;
    float init_std;
    if (corpus) DEFAULT(inner.total_tokens, corpus->samples * corpus->sequence);
    bool known = s->inner.total_tokens > 0; /* else nothing says yet how long the run will be */
    if (proto_inner_preset(s->preset, known ? s->inner.total_tokens : 1, &in, &init_std, err))
        return -1;
    DEFAULT(inner.optimizer, in.optimizer);
    DEFAULT(inner.states, in.states);
    DEFAULT(inner.batch, in.batch);
    DEFAULT(inner.lr, in.lr);
    DEFAULT(inner.beta1, in.beta1);
    DEFAULT(inner.beta2, in.beta2);
    DEFAULT(inner.eps, in.eps);
    DEFAULT(inner.weight_decay, in.weight_decay);
    DEFAULT(inner.clip, in.clip);
    DEFAULT(inner.z_loss, in.z_loss);
    DEFAULT(inner.max_z_loss, in.max_z_loss);
    DEFAULT(inner.schedule, in.schedule);
    DEFAULT(inner.warmup_tokens, known ? in.warmup_tokens : 0);
    DEFAULT(inner.decay_tokens, known ? in.decay_tokens : 0);
    DEFAULT(init_std, init_std);
    return 0;
}

static uint32_t round_samples(const struct settings *s) {
    uint64_t samples = (uint64_t)s->inner.batch * s->outer.inner_steps;
    return samples < 1u << 20 ? (uint32_t)samples : 1u << 20;
}

/* How the classic methods are settings of the one path; docs/architecture.md, "Modes". */
static const struct mode {
    const char *name;
    uint32_t quorum, fragments, overlap;
    float alpha;
} modes[] = {
    { "decoupled", 1, 4, 5, 0.5f },
    { "streaming", 2, 4, 5, 0.5f },
    { "intellect1", PROTO_MEMBERS_MAX, 1, 0, 0 },
    { "diloco", 2, 1, 0, 0 },
};

static const struct mode *find_mode(const char *name, struct err *err) {
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++)
        if (!strcmp(name, modes[i].name)) return &modes[i];
    err_set(err, ERR_CONFIG,
            "outer.mode is '%s'; allowed are decoupled, streaming, intellect1 and diloco", name);
    return NULL;
}

static int default_outer(struct settings *s, struct err *err) {
    DEFAULT_TEXT(mode, "diloco");
    const struct mode *mode = find_mode(s->mode, err);
    float lr, momentum;
    if (!mode || proto_outer_preset(s->preset, &lr, &momentum, err)) return -1;
    DEFAULT(outer.inner_steps, 100);
    DEFAULT(outer.round_ms, 600000);
    DEFAULT(outer.quorum, mode->quorum);
    DEFAULT(outer.grace_ms, 30000);
    DEFAULT(outer.fragments, mode->fragments);
    DEFAULT(outer.overlap, mode->overlap);
    DEFAULT(outer.alpha, mode->alpha);
    DEFAULT(outer.audits, 1);
    DEFAULT(outer.lr_rule, LR_CONSTANT); /* better than sqrt in each of three seeds: docs/results.md */
    DEFAULT(outer.fixed_membership, 0);
    DEFAULT(outer.lr, lr);
    DEFAULT(outer.momentum, momentum);
    DEFAULT(outer.contribution_codec, 1);
    DEFAULT(outer.result_codec, 1);
    DEFAULT(outer.chunk_elements, 1u << 18);
    DEFAULT(outer.clip_factor, 3.0f);
    DEFAULT(outer.ramp_rounds, 3);
    DEFAULT(outer.silence_ms_max, 60000);
    DEFAULT(outer.heartbeat_ms, s->outer.silence_ms_max / 8 < 2000 ? s->outer.silence_ms_max / 8 : 2000);
    DEFAULT(outer.lease_samples, round_samples(s));
    DEFAULT(outer.checkpoint_rounds, 10);
    /* 16 MiB of parameters: less is not worth a member's attention. */
    uint32_t enough = (4u << 20) / s->outer.chunk_elements;
    DEFAULT(outer.shard_chunks, enough ? enough : 1);
    return 0;
}

static void default_rest(struct settings *s, const char *dir) {
    const char *slash = strrchr(dir, '/');
    DEFAULT_TEXT(name, "%.64s", slash && slash[1] ? slash + 1 : "run");
    DEFAULT(shuffle_seed, 1);
    DEFAULT_TEXT(checkpoint_url, "file://%.*s/checkpoints", PROTO_URL_BYTES_MAX - 20, dir);
    DEFAULT_TEXT(listen, "0.0.0.0:7171");
    DEFAULT(strangers_max, 256);
    DEFAULT(stranger_seconds, 20);
    DEFAULT(connects_per_minute, 600);
}

/* ---- checks across settings --------------------------------------------------------------------- */

static int check_corpus(const struct settings *s, const struct corpus_facts *c, struct err *err) {
    if (c->sequence != s->model.sequence)
        return err_set(err, ERR_CONFIG,
                       "the corpus has samples of %u tokens, model.sequence is %u: make it again with "
                       "`intellect-node data --sequence %u`, or set model.sequence to %u",
                       c->sequence, s->model.sequence, s->model.sequence, c->sequence);
    if (c->vocabulary > s->model.vocabulary)
        return err_set(err, ERR_CONFIG,
                       "the corpus' tokenizer '%s' has %u tokens, model.vocabulary is %u: set it to at "
                       "least %u", c->tokenizer, c->vocabulary, s->model.vocabulary, c->vocabulary);
    if (c->samples < s->inner.batch)
        return err_set(err, ERR_CONFIG,
                       "the corpus has %llu samples, fewer than one batch (inner.batch %u): it takes "
                       "more text", (unsigned long long)c->samples, s->inner.batch);
    return 0;
}

static int check_outer(const struct settings *s, struct err *err) {
    const struct msg_outer *o = &s->outer;
    uint64_t elements = proto_model_elements(&s->model);
    uint64_t chunks = (elements + o->chunk_elements - 1) / o->chunk_elements;
    if (o->chunk_elements % 4096)
        return err_set(err, ERR_CONFIG, "outer.chunk_elements is %u; allowed are multiples of 4096",
                       o->chunk_elements);
    if (chunks > PROTO_CHUNKS_MAX)
        return err_set(err, ERR_CONFIG,
                       "outer.chunk_elements %u cuts %llu parameters into %llu chunks; allowed are %u: "
                       "set it to at least %llu", o->chunk_elements, (unsigned long long)elements,
                       (unsigned long long)chunks, PROTO_CHUNKS_MAX,
                       (unsigned long long)(elements / PROTO_CHUNKS_MAX / 4096 + 1) * 4096);
    if (o->silence_ms_max < 3 * (uint64_t)o->heartbeat_ms)
        return err_set(err, ERR_CONFIG,
                       "outer.silence_seconds is %g, under three times outer.heartbeat_seconds %g: "
                       "one late packet would lose a member", o->silence_ms_max / 1000.0,
                       o->heartbeat_ms / 1000.0);
    uint8_t *fragment_of = malloc(chunks);
    if (!fragment_of) return err_set(err, ERR_MEMORY, "no memory for %llu chunks", (unsigned long long)chunks);
    int empty = proto_model_fragments(&s->model, o->chunk_elements, o->fragments, fragment_of, err);
    free(fragment_of);
    if (empty) {
        err_prefix(err, "outer.fragments");
        return -1;
    }
    if (o->lease_samples < s->inner.batch)
        return err_set(err, ERR_CONFIG,
                       "outer.lease_samples %u is less than inner.batch %u: no inner step could be done",
                       o->lease_samples, s->inner.batch);
    return 0;
}

static int check_serve(const struct settings *s, struct err *err) {
    struct address a;
    if (address_split(s->listen, false, &a, err)) {
        err_prefix(err, "serve.listen");
        return -1;
    }
    if (*s->address && address_split(s->address, true, &a, err)) {
        err_prefix(err, "serve.address");
        return -1;
    }
    return 0;
}

int settings_resolve(struct settings *s, const char *dir, const struct corpus_facts *corpus,
                     struct err *err) {
    DEFAULT_TEXT(preset, "debug");
    if (default_model(s, err) || default_inner(s, corpus, err)) return -1;
    if (default_outer(s, err)) return -1;
    default_rest(s, dir);
    if (proto_model_check(&s->model, err) || proto_inner_check(&s->inner, err)) return -1;
    if (check_outer(s, err) || check_serve(s, err)) return -1;
    return corpus ? check_corpus(s, corpus, err) : 0;
}

/* ---- the genesis ------------------------------------------------------------------------------ */

void settings_to_genesis(const struct settings *s, const struct corpus_facts *corpus,
                         struct settings_genesis *out) {
    memset(out, 0, sizeof *out);
    out->model = s->model;
    out->inner = s->inner;
    out->outer = s->outer;
    out->corpus = (struct msg_corpus){
        .manifest_url = proto_str(s->corpus),
        .manifest_digest = corpus->manifest_digest,
        .tokenizer = proto_str(corpus->tokenizer),
        .samples = corpus->samples,
        .shuffle_seed = s->shuffle_seed,
    };
    out->genesis = (struct msg_genesis){
        .version = GENESIS_VERSION,
        .name = proto_str(s->name),
        .model = &out->model, .model_count = 1,
        .inner = &out->inner, .inner_count = 1,
        .outer = &out->outer, .outer_count = 1,
        .corpus = &out->corpus, .corpus_count = 1,
        .init_seed = s->init_seed,
        .init_std = s->init_std,
        .checkpoint_url = proto_str(s->checkpoint_url),
    };
}

int settings_from_genesis(struct settings *s, const struct msg_genesis *g, struct err *err) {
    settings_init(s);
    if (g->version != GENESIS_VERSION)
        return err_set(err, ERR_UNSUPPORTED, "the run's genesis has version %u, this program knows %d",
                       g->version, GENESIS_VERSION);
    if (g->model_count != 1 || g->inner_count != 1 || g->outer_count != 1 || g->corpus_count != 1)
        return err_set(err, ERR_CORRUPT, "the run's genesis lacks a section");
    proto_str_copy(g->name, s->name, sizeof s->name);
    s->model = *g->model;
    s->inner = *g->inner;
    s->outer = *g->outer;
    s->init_seed = g->init_seed;
    s->init_std = g->init_std;
    if (g->init_from_count) proto_str_copy(g->init_from->url, s->from, sizeof s->from);
    s->shuffle_seed = g->corpus->shuffle_seed;
    proto_str_copy(g->corpus->manifest_url, s->corpus, sizeof s->corpus);
    proto_str_copy(g->checkpoint_url, s->checkpoint_url, sizeof s->checkpoint_url);
    return 0;
}

void corpus_facts_from_genesis(struct corpus_facts *out, const struct msg_genesis *g) {
    memset(out, 0, sizeof *out);
    proto_str_copy(g->corpus->tokenizer, out->tokenizer, sizeof out->tokenizer);
    out->samples = g->corpus->samples;
    out->sequence = g->model->sequence;
    out->vocabulary = g->model->vocabulary;
    out->manifest_digest = g->corpus->manifest_digest;
}
