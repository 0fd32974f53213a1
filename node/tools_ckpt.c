/* tools_ckpt.c - inspect, verify and fetch; see tools_ckpt.h. */
#include "node/tools_ckpt.h"

#include <getopt.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ckpt/ckpt.h"
#include "node/progress.h"
#include "node/tools_args.h"
#include "proto/model.h"
#include "proto/proto.h"

struct tool_options {
    const char *name, *help;
    int operands;       /* how many arguments that are no options */
    char **operand;
    bool json, tensors;
    const char *run;
};

/* Returns -1 to go on, else the exit code. */
static int parse(int argc, char **argv, struct tool_options *o) {
    static const struct option options[] = { { "json", no_argument, NULL, 'j' },
                                             { "tensors", no_argument, NULL, 't' },
                                             { "run", required_argument, NULL, 'r' },
                                             { "help", no_argument, NULL, 'h' }, { 0 } };
    o->name = argv[0];
    o->operand = argv + argc; /* none so far */
    optind = 1;
    for (int c; (c = getopt_long(argc, argv, ":", options, NULL)) != -1;) {
        if (c == 'h') {
            fputs(o->help, stdout);
            return 0;
        }
        if (c == 'j')
            o->json = true;
        else if (c == 't')
            o->tensors = true;
        else if (c == 'r')
            o->run = optarg;
        else
            return args_unknown(o->name, argv);
    }
    o->operand = argv + optind;
    if (argc - optind == o->operands) return -1;
    return args_wrong(o->name, argc - optind < o->operands ? "an argument is missing"
                                                           : "too many arguments");
}

static const char *hex(const struct digest *d, char out[DIGEST_HEX_BYTES]) {
    digest_hex(d, out);
    return out;
}

/* ---- progress -------------------------------------------------------------------------------- */

/* What is shown while much is read. */
struct shown {
    struct progress bar;
    struct ckpt_progress now;
};

static bool show_progress(void *arg, const struct ckpt_progress *now) {
    struct shown *s = arg;
    s->now = *now;
    progress_show(&s->bar, now->done, now->total, now->read, now->object);
    return true;
}

/* ---- inspect --------------------------------------------------------------------------------- */

static const char inspect_help[] =
    "intellect-node inspect CHECKPOINT [--tensors] [--json]\n"
    "\n"
    "Say what a checkpoint is: network, run, ledger index, tokens, who signed; with --tensors also the\n"
    "shape of every tensor and size and digest of every object. CHECKPOINT is of a checkpoint, of a\n"
    "store of them (then its latest), or a plain Hugging Face Llama folder, and is a folder, or a URL:\n"
    "file:///FOLDER, s3://BUCKET/PREFIX?endpoint=https://HOST, https://HOST/PATH.\n"
    "Signatures are checked; `verify` checks the tensors too. For keys and settings of a store see\n"
    "docs/checkpoint.md.\n"
    "\n"
    "example: intellect-node inspect demo-run/checkpoints\n";

static json_t *model_object(const struct msg_model *m) {
    return json_pack("{sI si si si si si si si sb}", "parameters",
                     (json_int_t)proto_model_elements(m), "layers", (int)m->layers, "width",
                     (int)m->width, "heads", (int)m->heads, "kv_heads", (int)m->kv_heads, "ffn",
                     (int)m->ffn, "vocabulary", (int)m->vocabulary, "sequence", (int)m->sequence,
                     "tied", (int)m->tied);
}

static json_t *facts_object(const struct ckpt *c) {
    char run[DIGEST_HEX_BYTES], root[DIGEST_HEX_BYTES], head[DIGEST_HEX_BYTES];
    char manifest[DIGEST_HEX_BYTES], signer[DIGEST_HEX_BYTES], name[80];
    const struct ckpt_facts *f = ckpt_facts(c);
    struct digest key;
    memcpy(key.b, f->signer.b, sizeof key.b);
    proto_str_copy(ckpt_genesis(c)->name, name, sizeof name);
    return json_pack("{ss ss sI sI sI sI ss ss ss ss}", "name", name, "run", hex(&f->run, run),
                     "index", (json_int_t)f->index, "round", (json_int_t)f->round,
                     "tokens_committed", (json_int_t)f->tokens_committed, "term",
                     (json_int_t)f->term, "state_root", hex(&f->state_root, root), "ledger_head",
                     hex(&f->ledger_head, head), "manifest", hex(&f->manifest,
                                                                 manifest), "signer", hex(&key, signer));
}

static json_t *tensor_list(const struct ckpt *c) {
    json_t *list = json_array();
    for (uint32_t i = 0; i < proto_model_tensor_count(ckpt_model(c)); i++) {
        struct proto_tensor t;
        json_t *shape = json_array();
        proto_model_tensor(ckpt_model(c), i, &t);
        for (int d = 0; d < t.dims; d++) json_array_append_new(shape, json_integer((json_int_t)t.shape[d]));
        json_array_append_new(list, json_pack("{ss so}", "name", t.name, "shape", shape));
    }
    return list;
}

static json_t *object_list(const struct ckpt *c) {
    json_t *list = json_array();
    for (uint32_t i = 0; i < ckpt_object_count(c); i++) {
        uint64_t bytes;
        struct digest d;
        char text[DIGEST_HEX_BYTES];
        const char *name = ckpt_object(c, i, &bytes, &d);
        json_array_append_new(list,
                              json_pack("{ss sI ss}", "name", name, "bytes", (json_int_t)bytes, "blake2b",
                                              hex(&d, text)));
    }
    return list;
}

static void print_json(json_t *object) {
    char *text = json_dumps(object, JSON_INDENT(2));
    if (text) puts(text);
    free(text);
    json_decref(object);
}

/* An element a line. */
static void print_list(const char *key, const json_t *list) {
    size_t i;
    json_t *item;
    printf("%s:\n", key);
    json_array_foreach((json_t *)list, i, item) {
        char *text = json_dumps(json_object_get(item, "shape"), JSON_ENCODE_ANY | JSON_COMPACT);
        if (text) printf("  %-56s %s\n", json_string_value(json_object_get(item, "name")), text);
        else printf("  %-56s %" JSON_INTEGER_FORMAT " bytes, %s\n",
                    json_string_value(json_object_get(item, "name")),
                    json_integer_value(json_object_get(item, "bytes")),
                    json_string_value(json_object_get(item, "blake2b")));
        free(text);
    }
}

/* The same facts for people: one "key  value" a line. */
static void print_lines(const json_t *object) {
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)object, key, value) {
        if (json_is_object(value))
            print_lines(value);
        else if (json_is_array(value))
            print_list(key, value);
        else if (json_is_string(value))
            printf("%-18s %s\n", key, json_string_value(value));
        else if (json_is_boolean(value))
            printf("%-18s %s\n", key, json_is_true(value) ? "yes" : "no");
        else
            printf("%-18s %" JSON_INTEGER_FORMAT "\n", key, json_integer_value(value));
    }
}

int tool_inspect(int argc, char **argv) {
    struct tool_options o = { .operands = 1, .help = inspect_help };
    struct err err = {0};
    int rc = parse(argc, argv, &o);
    if (rc >= 0) return rc;
    struct ckpt *c = ckpt_open(o.operand[0], NULL, &err);
    if (!c) return args_failed(o.name, &err);
    json_t *object = json_pack("{ss ss ss so}", "where", ckpt_where(c), "tokenizer",
                               ckpt_tokenizer(c)[0] ? ckpt_tokenizer(c) : "unknown", "weights",
                               ckpt_weights_name(c), "model", model_object(ckpt_model(c)));
    if (!ckpt_is_plain(c)) json_object_set_new(object, "checkpoint", facts_object(c));
    if (o.tensors) json_object_set_new(object, "tensors", tensor_list(c));
    if (o.tensors) json_object_set_new(object, "objects", object_list(c));
    ckpt_close(c);
    if (o.json) {
        print_json(object);
    } else {
        print_lines(object);
        json_decref(object);
    }
    return 0;
}

/* ---- verify ---------------------------------------------------------------------------------- */

static const char verify_help[] =
    "intellect-node verify CHECKPOINT [--run DIGEST] [--json]\n"
    "\n"
    "Check everything that can be checked: digests of all files, signatures from the run's root key\n"
    "down, the chain of the ledger, and that the tensors are the state the members agreed on. With\n"
    "--run the checkpoint must also belong to that run. CHECKPOINT is a folder or URL as for `inspect`.\n"
    "Reads everything, once.\n"
    "\n"
    "example: intellect-node verify demo-run/checkpoints/step-000000000042\n";

/* Follow the entries from the genesis to the checkpoint's index. */
static int verify_ledger(struct ckpt *c, struct err *err) {
    const struct msg_signed_entry *entries;
    uint32_t count;
    struct ledger_chain chain;
    if (ckpt_ledger(c, &entries, &count, err)) return -1;
    ledger_chain_init(&chain, &ckpt_facts(c)->run);
    for (uint32_t i = 0; i < count; i++) {
        struct msg_entry entry;
        if (ledger_chain_take(&chain, &entries[i], &entry, err)) {
            err_prefix(err, "ledger entry %u of %u", i, count);
            return -1;
        }
        proto_decoded_release(RECORD_entry, &entry);
    }
    if (digest_equal(&chain.head, &ckpt_facts(c)->ledger_head)) return 0;
    return err_set(err, ERR_CORRUPT, "the ledger does not end in the head that the manifest names");
}

static int verify(struct ckpt *c, struct err *err) {
    struct shown p = {0};
    int rc = ckpt_verify(c, show_progress, &p, err) || verify_ledger(c, err) ? -1 : 0;
    progress_end();
    return rc;
}

int tool_verify(int argc, char **argv) {
    struct tool_options o = { .operands = 1, .help = verify_help };
    struct err err = {0};
    struct digest run;
    char root[DIGEST_HEX_BYTES];
    int rc = parse(argc, argv, &o);
    if (rc >= 0) return rc;
    if (o.run && digest_parse(o.run, &run, &err)) return args_wrong(o.name, err.msg);
    struct ckpt *c = ckpt_open(o.operand[0], o.run ? &run : NULL, &err);
    if (!c) return args_failed(o.name, &err);
    if (ckpt_is_plain(c)) {
        ckpt_close(c);
        err_set(&err, ERR_NOT_FOUND, "a plain Hugging Face folder has no digests to check");
        return args_failed(o.name, &err);
    }
    if (verify(c, &err)) {
        rc = args_failed(o.name, &err);
    } else {
        rc = 0;
        if (o.json)
            print_json(facts_object(c));
        else
            printf("%s is whole: ledger index %" PRIu64 ", state root %s\n", ckpt_where(c),
                   ckpt_facts(c)->index, hex(&ckpt_facts(c)->state_root, root));
    }
    ckpt_close(c);
    return rc;
}

/* ---- fetch ----------------------------------------------------------------------------------- */

static const char fetch_help[] =
    "intellect-node fetch URL DIR [--run DIGEST] [--json]\n"
    "\n"
    "Fetch a checkpoint, or the latest of a store, into the folder DIR: several requests at a time, each\n"
    "object checked against its digest in the signed manifest, which is put last. When it was\n"
    "interrupted, the same command goes on where it was. URL is as for `inspect`; a store's `latest` may\n"
    "move meanwhile: then name the checkpoint itself. A plain Hugging Face folder is fetched too, but has\n"
    "nothing to check it against.\n"
    "\n"
    "  --run DIGEST  refuse a checkpoint of another run\n"
    "\n"
    "example: intellect-node fetch https://example.org/run/step-000000000042 step-42\n"
    "example: INTELLECT_STORE_DOWN_MBIT=200 intellect-node fetch s3://weights/run run\n";

int tool_fetch(int argc, char **argv) {
    struct tool_options o = { .operands = 2, .help = fetch_help };
    struct err err = {0};
    struct digest run;
    struct shown p = {0};
    int rc = parse(argc, argv, &o);
    if (rc >= 0) return rc;
    if (o.run && digest_parse(o.run, &run, &err)) return args_wrong(o.name, err.msg);
    struct ckpt *c = ckpt_open(o.operand[0], o.run ? &run : NULL, &err);
    if (!c) return args_failed(o.name, &err);
    if (ckpt_is_plain(c))
        fprintf(stderr, "%s: %s has no manifest: what comes cannot be checked\n", o.name, ckpt_where(c));
    rc = ckpt_fetch(c, o.operand[1], show_progress, &p, &err) ? args_failed(o.name, &err) : 0;
    progress_end();
    double took = progress_seconds(&p.bar);
    if (rc && p.now.read)
        fprintf(stderr, "%s: %.1f MB lie in %s; the same command goes on from there\n", o.name,
                (double)p.now.done / 1e6, o.operand[1]);
    else if (!rc && o.json)
        print_json(json_pack("{ss ss sI sI sf}", "where", ckpt_where(c), "folder", o.operand[1], "bytes",
                             (json_int_t)p.now.total, "fetched", (json_int_t)p.now.read, "seconds", took));
    else if (!rc)
        printf("%s is %s: %.1f MB, of which %.1f MB came now, %.1f MB/s\n", o.operand[1], ckpt_where(c),
               (double)p.now.total / 1e6, (double)p.now.read / 1e6, (double)p.now.read / 1e6 / took);
    ckpt_close(c);
    return rc;
}
