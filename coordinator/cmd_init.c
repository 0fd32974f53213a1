/* cmd_init.c - `intellect-coordinator init`: the run's folder, its settings, its keys, and, once
 * there is a corpus, the sealed genesis with the first two entries of the ledger. */
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "ckpt/ckpt.h"
#include "ckpt/corpus.h"
#include "coordinator/aggregator.h"
#include "coordinator/commands.h"
#include "coordinator/run.h"
#include "proto/model.h"

static const char help[] =
    "intellect-coordinator init DIR [options]\n"
    "\n"
    "Make a run: the folder DIR with run.yaml (every setting, explained), keys, and the genesis, whose\n"
    "digest is the run's name. Again on the same folder, as long as nobody has joined: the run is\n"
    "sealed anew with the changed run.yaml.\n"
    "\n"
    "  --corpus CORPUS          corpus.json (or its folder, or its URL) as `intellect-node data` wrote\n"
    "                           it; without one, run.yaml is written and nothing is sealed yet\n"
    "  --preset NAME            the network: debug, 10m, 150m, 1b, 8b or 10b (default: debug)\n"
    "  --from URL               begin with the state of this checkpoint, or with the weights of a plain\n"
    "                           Hugging Face folder of a Llama model (file:///FOLDER, s3://BUCKET/PREFIX,\n"
    "                           https://HOST/PATH); the network is its, unless you set another. On the\n"
    "                           same corpus, with the same corpus.shuffle_seed, a checkpoint's data goes\n"
    "                           on where it stood\n"
    "  --set SECTION.KEY=VALUE  any setting of run.yaml; may be given several times\n"
    "\n"
    "example: intellect-coordinator init myrun --corpus corpus/corpus.json --preset debug \\\n"
    "             --set outer.inner_steps=50 --set outer.quorum=3\n";

#define SETS_MAX 64

struct init_options {
    const char *command, *corpus, *preset, *from;
    const char *sets[SETS_MAX];
    int set_count;
};
enum { CORPUS = 256, PRESET, FROM, SET };
static const struct option options[] = {
    { "corpus", required_argument, NULL, CORPUS },
    { "preset", required_argument, NULL, PRESET },
    { "from", required_argument, NULL, FROM },
    { "set", required_argument, NULL, SET },
    { 0 },
};

static int take(void *arg, int option, const char *value) {
    struct init_options *o = arg;
    switch (option) {
    case CORPUS: o->corpus = value; return 0;
    case PRESET: o->preset = value; return 0;
    case FROM: o->from = value; return 0;
    default:
        if (o->set_count == SETS_MAX) {
            coordinator_misused(o->command, "--set may be given %d times; write run.yaml instead",
                                SETS_MAX);
            return -1;
        }
        o->sets[o->set_count++] = value;
        return 0;
    }
}

/* ---- the folder ----------------------------------------------------------------------------------- */

/* Does it hold something that init would not have put there? The lock is the first thing it does. */
static bool is_foreign(const char *dir) {
    DIR *d = opendir(dir);
    bool anything = false, ours = false;
    for (struct dirent *e; d && (e = readdir(d));) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        anything = true;
        if (!strcmp(e->d_name, SETTINGS_FILE_NAME) || !strcmp(e->d_name, STORE_LOCK_NAME)) ours = true;
    }
    if (d) closedir(d);
    return anything && !ours;
}

/* Make the folder, or take one that is empty or a run's. dir receives its absolute path. */
static int make_folder(const char *given, char *dir, struct err *err) {
    struct stat st;
    if (mkdir(given, 0700) && errno != EEXIST) return err_set_errno(err, "make the folder %s", given);
    if (!realpath(given, dir)) return err_set_errno(err, "the folder %s", given);
    if (stat(dir, &st)) return err_set_errno(err, "the folder %s", given);
    if (!S_ISDIR(st.st_mode)) return err_set(err, ERR_CONFIG, "%s is not a folder", given);
    if (is_foreign(dir))
        return err_set(err, ERR_CONFIG, "%s holds other things and no run; name a new folder", given);
    return 0;
}

/* ---- settings -------------------------------------------------------------------------------------- */

static int set_option(struct settings *s, const char *key, const char *value, struct err *err) {
    char assignment[PATH_MAX + 64];
    snprintf(assignment, sizeof assignment, "%s=%s", key, value);
    return settings_set(s, assignment, err);
}

/* run.yaml, then the command line. *present: there was a file. */
static int gather_settings(struct settings *s, const struct init_options *o, const char *path,
                           bool *present, struct err *err) {
    char corpus[PATH_MAX];
    settings_init(s);
    *present = access(path, F_OK) == 0;
    if (*present && settings_load(s, path, err)) return -1;
    if (o->preset && set_option(s, "model.preset", o->preset, err)) return -1;
    if (o->from && set_option(s, "model.from", o->from, err)) return -1;
    if (o->corpus) { /* relative to where the person is, not to the run's folder */
        bool remote = ckpt_store_remote(o->corpus);
        if (!remote && !realpath(o->corpus, corpus)) return err_set_errno(err, "--corpus %s", o->corpus);
        if (set_option(s, "corpus.manifest", remote ? o->corpus : corpus, err)) return -1;
    }
    for (int i = 0; i < o->set_count; i++)
        if (settings_set(s, o->sets[i], err)) return -1;
    return 0;
}

/* What run.yaml held stays beside it: comments of a person's own are lost in the new one. */
static int write_settings(const struct settings *s, const char *path, bool present, struct err *err) {
    char old[RUN_PATH_BYTES + 8];
    snprintf(old, sizeof old, "%s.old", path);
    if (present && (unlink(old) == 0 || errno == ENOENT) && link(path, old) == 0)
        fprintf(stderr, "%s is written anew; the one before is %s.old\n", SETTINGS_FILE_NAME,
                SETTINGS_FILE_NAME);
    return settings_save(s, path, err);
}

/* ---- keys -------------------------------------------------------------------------------------------- */

static int load_or_make_key(const char *dir, const char *name, struct identity *id, struct err *err) {
    char path[RUN_PATH_BYTES];
    if (run_path(dir, name, path, err)) return -1;
    if (access(path, F_OK) == 0) return identity_load(id, path, err);
    identity_create(id);
    return identity_save(id, path, err);
}

/* ---- the genesis --------------------------------------------------------------------------------------- */

struct keys {
    struct identity root, online;
};

struct sealing {
    struct digest run;
    struct proto_buffer genesis, delegation, entry[2], row[2], document;
    struct core_write writes[2];
};

static void sealing_init(struct sealing *w) {
    struct proto_buffer *all[] = { &w->genesis, &w->delegation, &w->entry[0], &w->entry[1],
                                   &w->row[0],  &w->row[1],     &w->document };
    memset(w, 0, sizeof *w);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        proto_buffer_init(all[i], 2 * PROTO_BLOB_BYTES_MAX);
}

static void sealing_release(struct sealing *w) {
    proto_buffer_release(&w->genesis);
    proto_buffer_release(&w->delegation);
    proto_buffer_release(&w->document);
    for (int i = 0; i < 2; i++) {
        proto_buffer_release(&w->entry[i]);
        proto_buffer_release(&w->row[i]);
    }
}

static int encode_signed(const struct keys *k, const char *purpose, const struct digest *run,
                         const struct proto_buffer *bytes, struct proto_buffer *out,
                         struct err *err) {
    struct msg_signed_entry e = { .bytes = { bytes->data, (uint32_t)bytes->length } };
    proto_sign(&k->root, purpose, run, 0, bytes->data, bytes->length, &e.signature);
    return proto_encode(out, RECORD_signed_entry, &e, err);
}

static int add_entry(struct sealing *w, const struct keys *k, uint64_t index, enum ledger_kind kind,
                     enum proto_record record, const void *body, struct err *err) {
    struct digest previous = {{0}};
    if (index) previous = digest_of(w->entry[index - 1].data, w->entry[index - 1].length);
    if (core_entry_encode(&w->entry[index], index, &previous, 0, kind, record, body, err)) return -1;
    if (encode_signed(k, "ledger", &w->run, &w->entry[index], &w->row[index], err)) return -1;
    w->writes[index] = (struct core_write){ .table = CORE_LEDGER, .key = index,
                                            .value = w->row[index].data,
                                            .value_length = (uint32_t)w->row[index].length };
    return 0;
}

/* What a plain folder does not have; said once, when the settings are read. */
static void warn_plain(const struct ckpt *c) {
    fprintf(stderr,
            "warning: %.200s is a plain Hugging Face folder: the run begins with its weights (%s), known by the\n"
            "digest of the state that they make. Not there: outer momentum (begins at zero), the samples that were\n"
            "spent (all of the corpus is fresh), a ledger, a signature.\n", ckpt_where(c), ckpt_weights_name(c));
}

/* The state in the chunks of this run. A checkpoint of a run with the same ones says it itself. */
static int root_of(const struct ckpt *c, const struct settings *s, struct digest *root, struct err *err) {
    const struct msg_genesis *g = ckpt_genesis(c);
    uint32_t chunk_elements = s->outer.chunk_elements;
    if (!g || !g->outer_count || g->outer->chunk_elements != chunk_elements)
        return ckpt_root(c, chunk_elements, root, err);
    *root = ckpt_facts(c)->state_root;
    return 0;
}

/* Why the samples of the run that wrote the checkpoint are not those of this one; NULL: they are. */
static const char *other_data(const struct msg_genesis *before, const struct settings *s,
                              const struct corpus_facts *corpus) {
    const struct msg_corpus *was = before->corpus;
    if (before->corpus_count != 1 || before->model_count != 1) return "it names no corpus";
    if (!digest_equal(&was->manifest_digest, &corpus->manifest_digest)) return "its corpus was another one";
    if (was->shuffle_seed != s->shuffle_seed) return "its corpus.shuffle_seed was another one";
    return before->model->sequence == s->model.sequence ? NULL : "its sequences had another length";
}

/* On the same corpus in the same order the data goes on where the checkpoint stands. */
static int take_cursor(const struct ckpt *c, const struct settings *s, const struct corpus_facts *corpus,
                       struct settings_genesis *g, struct err *err) {
    uint32_t count;
    const struct msg_range *spent = ckpt_spent(c, &count);
    g->other_data = other_data(ckpt_genesis(c), s, corpus);
    if (g->other_data) return 0;
    if (count > PROTO_INIT_SPENT_MAX)
        return err_set(err, ERR_FULL, "model.from: the checkpoint's spent samples lie in %u ranges, a run "
                       "begins with at most %u: take a later checkpoint", count, PROTO_INIT_SPENT_MAX);
    if (count) memcpy(g->spent, spent, count * sizeof *spent);
    g->genesis.init_spent = g->spent;
    g->genesis.init_spent_count = count;
    return 0;
}

/* Can the run begin with it? */
static int check_from(const struct settings *s, const struct ckpt *c, struct err *err) {
    const struct msg_model *m = ckpt_model(c);
    if (!proto_model_same_shapes(m, &s->model))
        return err_set(err, ERR_CONFIG,
                       "model.from: the checkpoint has %u layers of width %u, %u heads, %u kv_heads, ffn "
                       "%u, vocabulary %u; leave --preset and model.* out, or set them to that", m->layers,
                       m->width, m->heads, m->kv_heads, m->ffn, m->vocabulary);
    if (strlen(ckpt_where(c)) < sizeof s->from) return 0;
    return err_set(err, ERR_CONFIG, "model.from: the checkpoint's URL has %zu characters, %zu are the most",
                   strlen(ckpt_where(c)), sizeof s->from - 1);
}

/* The genesis names the checkpoint by its manifest, so that no other can take its place, and a plain folder by its
 * state. */
static int name_checkpoint(const struct ckpt *c, const struct settings *s, const struct corpus_facts *corpus,
                           struct settings_genesis *g, struct err *err) {
    if (root_of(c, s, &g->from.state_root, err)) return -1;
    g->from.url = proto_str(s->from);
    g->genesis.init_from = &g->from;
    g->genesis.init_from_count = 1;
    if (ckpt_is_plain(c)) return 0;
    const struct ckpt_facts *f = ckpt_facts(c);
    g->from.at_index = f->index;
    g->from.manifest = f->manifest;
    g->from.tokens_committed = f->tokens_committed;
    return take_cursor(c, s, corpus, g, err);
}

/* Of a plain folder, which stands nowhere in any data, it was said. */
static void tell_data(const struct settings_genesis *g) {
    uint64_t spent = 0;
    if (!g->genesis.init_spent && !g->other_data) return;
    for (uint32_t i = 0; i < g->genesis.init_spent_count; i++) spent += g->spent[i].count;
    if (g->other_data) fprintf(stderr, "the data begins anew, not where the checkpoint stood: %s\n",
                               g->other_data);
    else printf("data     goes on where the checkpoint stood: %" PRIu64 " of %" PRIu64 " samples are spent\n",
                spent, g->corpus.samples);
}

struct init {
    const char *given, *dir; /* as the person wrote it; absolute */
    char path[RUN_PATH_BYTES]; /* of run.yaml */
    struct settings settings;
    struct corpus_facts corpus;
    struct ckpt *from; /* what the run begins with, opened once; NULL: it begins from the seed */
    bool has_corpus, has_file, changed;
};

static int seal(struct store *store, const struct keys *k, struct init *in, struct digest *run, struct err *err) {
    struct sealing w;
    struct settings_genesis g;
    struct timespec now;
    int result = -1;
    sealing_init(&w);
    clock_gettime(CLOCK_REALTIME, &now);
    settings_to_genesis(&in->settings, &in->corpus, &g);
    g.genesis.root_key = k->root.key;
    g.genesis.created_ms = (uint64_t)now.tv_sec * 1000;
    if (in->from && name_checkpoint(in->from, &in->settings, &in->corpus, &g, err)) goto out;
    if (in->from) tell_data(&g);
    if (proto_encode(&w.genesis, RECORD_genesis, &g.genesis, err)) goto out;
    w.run = digest_of(w.genesis.data, w.genesis.length);
    struct msg_delegation delegation = { .run = w.run, .key = k->online.key, .number = 1 };
    if (add_entry(&w, k, 0, LEDGER_GENESIS, RECORD_genesis, &g.genesis, err) ||
        add_entry(&w, k, 1, LEDGER_DELEGATION, RECORD_delegation, &delegation, err))
        goto out;
    if (proto_encode(&w.delegation, RECORD_delegation, &delegation, err) ||
        encode_signed(k, "delegation", &w.run, &w.delegation, &w.document, err))
        goto out;
    struct proto_bytes documents[STORE_DOCUMENTS] = {
        [STORE_GENESIS] = { w.genesis.data, (uint32_t)w.genesis.length },
        [STORE_DELEGATION] = { w.document.data, (uint32_t)w.document.length },
    };
    result = store_seal(store, documents, w.writes, 2, err);
    *run = w.run;
out:
    sealing_release(&w);
    return result;
}

/* ---- sealing, once or anew ----------------------------------------------------------------------------- */

enum outcome { SEALED, SEALED_ANEW, UNCHANGED };

/* Is the run that the folder holds the one these settings describe? */
static int compare_sealed(const char *dir, const struct settings *s,
                          const struct corpus_facts *corpus, bool *same, char *what, size_t size,
                          struct digest *id, struct err *err) {
    struct run run;
    if (run_open(&run, dir, err)) return -1;
    *same = settings_same_sealed(s, &run.sealed, what, size);
    if (*same && !digest_equal(&corpus->manifest_digest, &run.genesis.corpus->manifest_digest)) {
        *same = false;
        snprintf(what, size, "the corpus is another one now");
    }
    *id = run.id;
    run_release(&run);
    return 0;
}

static int store_is_sealed(struct store *store, bool *sealed, struct err *err) {
    uint8_t *bytes = NULL;
    size_t length;
    struct err why;
    *sealed = store_get_document(store, STORE_GENESIS, &bytes, &length, &why) == 0;
    free(bytes);
    if (!*sealed && why.code != ERR_NOT_FOUND) return err_set(err, why.code, "%s", why.msg);
    return 0;
}

/* A node that had begun to join the run before must not hold to it. */
static void forget_joined_run(const char *dir) {
    char path[RUN_PATH_BYTES];
    if (run_path(dir, AGGREGATOR_FOLDER "/run.json", path, NULL) == 0) unlink(path);
}

/* Refuses where something would change that no longer may. Before anything is written. */
static int decide(struct store *store, const char *dir, const struct settings *s,
                  const struct corpus_facts *corpus, enum outcome *outcome, struct digest *run,
                  struct err *err) {
    char what[200];
    bool sealed = false, same = false, begun = false;
    if (store_is_sealed(store, &sealed, err)) return -1;
    if (sealed && compare_sealed(dir, s, corpus, &same, what, sizeof what, run, err)) return -1;
    *outcome = same ? UNCHANGED : sealed ? SEALED_ANEW : SEALED;
    if (same || !sealed) return 0;
    if (store_begun(store, &begun, err)) return -1;
    if (!begun) return 0;
    return err_set(err, ERR_REFUSED, "%s: members have joined, so the run's settings are fixed; make a "
                   "new run in another folder", what);
}

static int make_keys_and_seal(struct store *store, struct init *in, struct digest *run, struct err *err) {
    struct keys k;
    int result = -1;
    memset(&k, 0, sizeof k);
    if (load_or_make_key(in->dir, RUN_ROOT_KEY, &k.root, err) ||
        load_or_make_key(in->dir, RUN_ONLINE_KEY, &k.online, err))
        goto out;
    forget_joined_run(in->dir);
    result = seal(store, &k, in, run, err);
out:
    identity_release(&k.root);
    identity_release(&k.online);
    return result;
}

/* ---- what the person is told --------------------------------------------------------------------------- */

static void tell_unsealed(const char *given) {
    printf("%s/%s is written; look it through. The run is not sealed yet: it has no corpus. Next:\n"
           "  intellect-node data --out corpus --sequence N FILES   # N: model.sequence in run.yaml\n"
           "  intellect-coordinator init %s --corpus corpus/corpus.json\n",
           given, SETTINGS_FILE_NAME, given);
}

static void tell_sealed(const char *given, const struct settings *s, const struct corpus_facts *c,
                        enum outcome outcome, const struct digest *run) {
    static const char *const words[] = {
        [SEALED] = "sealed", [SEALED_ANEW] = "sealed anew", [UNCHANGED] = "unchanged" };
    char hex[DIGEST_HEX_BYTES];
    digest_hex(run, hex);
    printf("run      %s  %s (%s)\n", s->name, hex, words[outcome]);
    printf("model    %s, %" PRIu64 " parameters\n", s->preset, proto_model_elements(&s->model));
    printf("corpus   %" PRIu64 " samples of %u tokens, tokenizer %s\n", c->samples, c->sequence,
           c->tokenizer);
    if (outcome != UNCHANGED)
        fprintf(stderr, "%s/%s is the run's root key: move it to a safe place, serving does not need it\n",
                given, RUN_ROOT_KEY);
    fprintf(stderr, "next: intellect-coordinator serve %s; intellect-coordinator invite %s\n", given,
            given);
}

/* ---- the command ------------------------------------------------------------------------------------------ */

static int open_from(struct init *in, struct err *err) {
    struct settings *s = &in->settings;
    if (!*s->from) return 0;
    if (!(in->from = ckpt_open(s->from, NULL, err))) {
        err_prefix(err, "model.from");
        return -1;
    }
    settings_take_model(s, ckpt_model(in->from), in->has_corpus ? &in->corpus : NULL);
    return 0;
}

static int read_all(struct init *in, const struct init_options *o, struct err *err) {
    struct settings *s = &in->settings;
    if (run_path(in->dir, SETTINGS_FILE_NAME, in->path, err)) return -1;
    if (gather_settings(s, o, in->path, &in->has_file, err)) return -1;
    in->has_corpus = *s->corpus != '\0';
    in->changed = !in->has_file || o->corpus || o->preset || o->from || o->set_count;
    if (in->has_corpus && corpus_facts_open(s, in->dir, &in->corpus, err)) return -1;
    struct settings_genesis ignored;
    if (open_from(in, err) || settings_resolve(s, in->dir, in->has_corpus ? &in->corpus : NULL, err) ||
        run_check_store(s, err))
        return -1;
    if (!in->from) return 0;
    if (check_from(s, in->from, err)) return -1; /* before anything is written */
    if (ckpt_is_plain(in->from)) warn_plain(in->from);
    else if (in->has_corpus && take_cursor(in->from, s, &in->corpus, &ignored, err)) return -1;
    snprintf(s->from, sizeof s->from, "%s", ckpt_where(in->from)); /* not what is newest later */
    return 0;
}

/* From beside the corpus to the home of the node that writes checkpoints, which has no corpus. */
static int copy_tokenizer(const struct init *in, const char *home, struct err *err) {
    uint8_t *bytes;
    size_t n;
    if (!strcmp(in->corpus.tokenizer, "bytes")) return 0;
    if (corpus_file_read(&in->settings, AGGREGATOR_TOKENIZER, CKPT_TOKENIZER_JSON_BYTES_MAX, &bytes, &n, err)) return -1;
    struct ckpt_store *to = ckpt_store_open(home, false, err);
    int result = to ? to->ops->put(to, AGGREGATOR_TOKENIZER, bytes, n, NULL, err) : -1;
    if (to) to->ops->close(to);
    free(bytes);
    return result;
}

static int write_files(const struct init *in, struct err *err) {
    struct identity own;
    char home[RUN_PATH_BYTES];
    struct settings written = in->settings;
    /* Their defaults come from the folder, which may be moved later: so they become lines. */
    settings_mark_given(&written, written.name);
    settings_mark_given(&written, written.checkpoint_url);
    settings_mark_given(&written, written.preset);
    if (in->changed && write_settings(&written, in->path, in->has_file, err)) return -1;
    if (run_path(in->dir, AGGREGATOR_FOLDER, home, err)) return -1;
    if (mkdir(home, 0700) && errno != EEXIST) return err_set_errno(err, "make the folder %s", home);
    if (load_or_make_key(in->dir, AGGREGATOR_IDENTITY, &own, err)) return -1;
    identity_release(&own); /* made now, so that its key is known before it joins */
    return in->has_corpus ? copy_tokenizer(in, home, err) : 0;
}

static int init_sealed(struct init *in, struct err *err) {
    enum outcome outcome;
    struct digest run;
    struct store *store = store_open(in->dir, true, err);
    if (!store) return -1;
    int result = decide(store, in->dir, &in->settings, &in->corpus, &outcome, &run, err);
    if (result == 0) result = write_files(in, err);
    if (result == 0 && outcome != UNCHANGED)
        result = make_keys_and_seal(store, in, &run, err);
    store_close(store);
    if (result == 0) tell_sealed(in->given, &in->settings, &in->corpus, outcome, &run);
    return result;
}

static int init_locked(struct init *in, const struct init_options *o, struct err *err) {
    if (read_all(in, o, err)) return -1;
    if (in->has_corpus) return init_sealed(in, err);
    if (write_files(in, err)) return -1;
    tell_unsealed(in->given);
    return 0;
}

int coordinator_init(int argc, char **argv) {
    struct init_options o = { .command = argv[0] };
    struct command_line line = { help, options, take, &o };
    char dir[PATH_MAX];
    struct init in = { .dir = dir };
    struct err err;
    int code, lock;
    if (!command_line_parse(&line, argc, argv, &in.given, &code)) return code;
    if (make_folder(in.given, dir, &err) || store_lock(dir, &lock, &err)) return coordinator_failed(&err);
    int failed = init_locked(&in, &o, &err);
    ckpt_close(in.from);
    close(lock);
    return failed ? coordinator_failed(&err) : 0;
}
