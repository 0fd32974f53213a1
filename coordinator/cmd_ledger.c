/* cmd_ledger.c - `intellect-coordinator ledger verify` and `ledger show`. */
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/audit.h"
#include "coordinator/commands.h"
#include "coordinator/run.h"

static const char help[] =
    "intellect-coordinator ledger verify DIR [--json]\n"
    "intellect-coordinator ledger show DIR [--json]\n"
    "\n"
    "verify checks the whole chain: every entry follows the one before it and is signed by a key that\n"
    "the run's root key delegates to; no sample is spent twice; tokens add up. It prints who\n"
    "contributed what. Exit code 1 and the first fault when something is wrong.\n"
    "show prints every entry.\n"
    "\n"
    "  --json   verify: one JSON object; show: one JSON object a line\n"
    "\n"
    "example: intellect-coordinator ledger verify myrun\n";

enum { JSON = 256 };
static const struct option options[] = { { "json", no_argument, NULL, JSON }, { 0 } };

static int take(void *arg, int option, const char *value) {
    (void)option;
    (void)value;
    *(bool *)arg = true;
    return 0;
}

/* ---- verify ---------------------------------------------------------------------------------------- */

static int take_row(void *arg, uint64_t key, const uint8_t *value, size_t length, struct err *err) {
    struct audit *a = arg;
    struct msg_signed_entry e = {0};
    struct err why;
    if (key != a->entries)
        return err_set(err, ERR_CORRUPT, "ledger entry %" PRIu64 " is missing", a->entries);
    int result = proto_decode(value, length, RECORD_signed_entry, &e, &why);
    if (result) err_set(err, ERR_CORRUPT, "ledger entry %" PRIu64 ": %s", key, why.msg);
    else result = audit_take(a, &e, err);
    proto_decoded_release(RECORD_signed_entry, &e);
    return result;
}

static json_t *verdict_json(const struct audit *a) {
    char head[DIGEST_HEX_BYTES], run[DIGEST_HEX_BYTES];
    json_t *members = json_array();
    digest_hex(&a->chain.head, head);
    digest_hex(&a->chain.run, run);
    for (uint32_t i = 0; i < a->member_count; i++)
        json_array_append_new(
            members, json_pack("{si ss sI sI}", "member", (int)a->member[i].member, "name",
                               a->member[i].name, "tokens", (json_int_t)a->member[i].tokens, "rounds",
                               (json_int_t)a->member[i].rounds));
    return json_pack("{sb ss ss sI sI sI sI sI sI so}", "ok", 1, "run", run, "head_digest", head,
                     "entries", (json_int_t)a->entries, "commits", (json_int_t)a->commits,
                     "checkpoints", (json_int_t)a->checkpoints, "tokens_committed",
                     (json_int_t)a->tokens, "samples_spent", (json_int_t)a->samples_spent,
                     "samples_total", (json_int_t)a->samples, "members", members);
}

static void print_verdict(const struct audit *a) {
    char head[DIGEST_HEX_BYTES];
    digest_hex(&a->chain.head, head);
    printf("%" PRIu64 " entries, chain and signatures hold, head %s\n", a->entries, head);
    printf("%" PRIu64 " commits, %" PRIu64 " checkpoints, %" PRIu64 " tokens\n", a->commits,
           a->checkpoints, a->tokens);
    printf("%" PRIu64 " of %" PRIu64 " samples spent, each once\n", a->samples_spent, a->samples);
    for (uint32_t i = 0; i < a->member_count; i++)
        printf("  %4u  %-20.20s  %12" PRIu64 " tokens in %" PRIu64 " rounds\n", a->member[i].member,
               a->member[i].name, a->member[i].tokens, a->member[i].rounds);
}

static int verify(const struct run *run, bool json, struct err *err) {
    struct audit a;
    audit_init(&a, &run->id);
    int result = store_check(run->store, err);
    if (result == 0)
        result = store_each(run->store, CORE_LEDGER, 0, UINT64_MAX, take_row, &a, err);
    if (result == 0 && json) {
        json_t *verdict = verdict_json(&a);
        json_dumpf(verdict, stdout, JSON_INDENT(2));
        putchar('\n');
        json_decref(verdict);
    } else if (result == 0) {
        print_verdict(&a);
    } else if (json) {
        json_t *verdict = json_pack("{sb ss sI}", "ok", 0, "fault", err->msg, "entries",
                                    (json_int_t)a.entries);
        json_dumpf(verdict, stdout, JSON_INDENT(2));
        putchar('\n');
        json_decref(verdict);
    }
    audit_release(&a);
    return result;
}

/* ---- show ------------------------------------------------------------------------------------------- */

static json_t *hex(const uint8_t bytes[32]) {
    struct digest d;
    char text[DIGEST_HEX_BYTES];
    memcpy(d.b, bytes, sizeof d.b);
    digest_hex(&d, text);
    return json_string(text);
}

static json_t *string_of(struct proto_bytes s) {
    return json_stringn((const char *)s.data, s.length);
}

static json_t *contributors_of(const struct msg_commit *c) {
    json_t *list = json_array();
    for (uint32_t i = 0; i < c->contributors_count; i++)
        json_array_append_new(
            list, json_pack("{si si sI}", "member", (int)c->contributors[i].member, "weight",
                            (int)c->contributors[i].weight, "tokens",
                            (json_int_t)c->contributors[i].tokens));
    return list;
}

/* Samples as [start, count]. */
static void add_spent(json_t *list, uint64_t start, uint64_t count) {
    json_array_append_new(list, json_pack("[II]", (json_int_t)start, (json_int_t)count));
}

static json_t *spent_before(const struct msg_genesis *g) {
    json_t *list = json_array();
    for (uint32_t i = 0; i < g->init_spent_count; i++)
        add_spent(list, g->init_spent[i].start, g->init_spent[i].count);
    return list;
}

static json_t *spent_by(const struct msg_commit *c) {
    json_t *list = json_array();
    for (uint32_t i = 0; i < c->spent_count; i++) add_spent(list, c->spent[i].start, c->spent[i].count);
    return list;
}

static json_t *body_json(uint8_t kind, const union ledger_body *b) {
    switch (kind) {
    case LEDGER_GENESIS:
        return json_pack("{so so so}", "name", string_of(b->genesis.name), "root_key",
                         hex(b->genesis.root_key.b), "spent", spent_before(&b->genesis));
    case LEDGER_DELEGATION:
        return json_pack("{so si si}", "key", hex(b->delegation.key.b), "number",
                         (int)b->delegation.number, "retires", (int)b->delegation.retires);
    case LEDGER_ENROLMENT:
        return json_pack("{si so so sb}", "member", (int)b->enrolment.member, "name",
                         string_of(b->enrolment.name), "key", hex(b->enrolment.key.b),
                         "aggregate_only", b->enrolment.aggregate_only);
    case LEDGER_REVOCATION:
        return json_pack("{si so}", "member", (int)b->revocation.member, "reason",
                         string_of(b->revocation.reason));
    case LEDGER_COMMIT:
        return json_pack("{si sI sI sI sI sf si so so so}", "fragment", (int)b->commit.fragment, "round",
                         (json_int_t)b->commit.round, "plan", (json_int_t)b->commit.plan, "tokens",
                         (json_int_t)b->commit.tokens, "tokens_committed",
                         (json_int_t)b->commit.tokens_committed, "lr", (double)b->commit.lr, "shards",
                         (int)b->commit.shards_count, "result_root", hex(b->commit.result_root.b),
                         "contributors", contributors_of(&b->commit), "spent", spent_by(&b->commit));
    case LEDGER_QUARANTINE:
        return json_pack("{si sb so ss}", "member", (int)b->quarantine.member, "lifted",
                         b->quarantine.lifted, "reason", string_of(b->quarantine.reason), "proof",
                         b->quarantine.lifted ? "" : proto_type_name(b->quarantine.kind));
    case LEDGER_REWIND:
        return json_pack("{sI so}", "at_index",
                         (json_int_t)(b->rewind.to_count ? b->rewind.to->at_index : 0), "reason",
                         string_of(b->rewind.reason));
    default:
        return json_pack("{sI so sI so}", "at_index", (json_int_t)b->checkpoint.at_index, "url",
                         string_of(b->checkpoint.url), "tokens_committed",
                         (json_int_t)b->checkpoint.tokens_committed, "manifest",
                         hex(b->checkpoint.manifest.b));
    }
}

static json_t *entry_json(const struct msg_signed_entry *signed_entry, struct err *err) {
    struct msg_entry e = {0};
    union ledger_body body;
    json_t *object = NULL;
    if (proto_decode(signed_entry->bytes.data, signed_entry->bytes.length, RECORD_entry, &e, err) == 0) {
        if (ledger_body_decode(&e, &body, err) == 0) {
            struct digest digest = LEDGER_DIGEST(signed_entry);
            object = json_pack("{sI sI ss so so}", "index", (json_int_t)e.index, "term",
                               (json_int_t)e.term, "kind", ledger_kind_name(e.kind), "digest",
                               hex(digest.b), "body", body_json(e.kind, &body));
        }
        ledger_body_release(&e, &body);
    }
    proto_decoded_release(RECORD_entry, &e);
    return object;
}

static void print_entry(const json_t *e) {
    const json_t *body = json_object_get(e, "body");
    const char *digest = json_string_value(json_object_get(e, "digest"));
    char *text = json_dumps(body, JSON_PRESERVE_ORDER | JSON_ENSURE_ASCII);
    printf("%6" PRId64 "  term %-3" PRId64 "  %.16s  %-10s  %s\n",
           (int64_t)json_integer_value(json_object_get(e, "index")),
           (int64_t)json_integer_value(json_object_get(e, "term")), digest,
           json_string_value(json_object_get(e, "kind")), text ? text : "");
    free(text);
}

static int show_row(void *arg, uint64_t key, const uint8_t *value, size_t length, struct err *err) {
    struct msg_signed_entry e = {0};
    struct err why;
    json_t *object = NULL;
    if (proto_decode(value, length, RECORD_signed_entry, &e, &why) == 0) object = entry_json(&e, &why);
    proto_decoded_release(RECORD_signed_entry, &e);
    if (!object) return err_set(err, ERR_CORRUPT, "ledger entry %" PRIu64 ": %s", key, why.msg);
    if (*(bool *)arg) {
        json_dumpf(object, stdout, JSON_COMPACT | JSON_PRESERVE_ORDER);
        putchar('\n');
    } else {
        print_entry(object);
    }
    json_decref(object);
    return 0;
}

/* ---- both ------------------------------------------------------------------------------------------- */

int coordinator_ledger(int argc, char **argv) {
    bool json = false;
    struct command_line line = { help, options, take, &json };
    struct run run;
    struct err err;
    const char *dir, *what = argc > 1 ? argv[1] : "";
    int code;
    bool shows = !strcmp(what, "show");
    if (strcmp(what, "--help") && !shows && strcmp(what, "verify"))
        return coordinator_misused("ledger", "say what to do: verify or show");
    int skip = *what != '-';
    argv[skip] = argv[0];
    if (!command_line_parse(&line, argc - skip, argv + skip, &dir, &code)) return code;
    if (run_open(&run, dir, &err)) return coordinator_failed(&err);
    int failed = shows ? store_each(run.store, CORE_LEDGER, 0, UINT64_MAX, show_row, &json, &err)
                       : verify(&run, json, &err);
    run_release(&run);
    return failed ? coordinator_failed(&err) : 0;
}
