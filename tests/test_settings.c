/* test_settings.c - what a person gets wrong in run.yaml is named, with its line and what is allowed. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "coordinator/run.h"
#include "proto/address.h"
#include "proto/settings.h"
#include "proto/model.h"

static const struct corpus_facts corpus = { "bytes", 256, 128, 20000, {{1}} };

static int parse(struct settings *s, const char *text, struct err *err) {
    settings_init(s);
    return settings_parse(s, "/some/where/run.yaml", text, strlen(text), err);
}

/* The message for a text that must be refused. */
static const char *refusal(const char *text) {
    static struct err err;
    struct settings s;
    err.msg[0] = '\0';
    if (parse(&s, text, &err) == 0) fail_msg("taken: %s", text);
    assert_int_equal(err.code, ERR_CONFIG);
    return err.msg;
}

static void assert_starts(const char *text, const char *with) {
    if (strncmp(text, with, strlen(with)) != 0) fail_msg("\"%s\" does not start \"%s\"", text, with);
}

static void an_unknown_key_is_named_with_its_line_and_the_allowed_ones(void **state) {
    (void)state;
    const char *says = refusal("run:\n  name: x\nouter:\n  # a comment\n  quorums: 3\n");
    assert_starts(says, "run.yaml line 5: unknown key outer.quorums; allowed in outer: mode, inner_steps, ");
    assert_non_null(strstr(says, "quorum, grace_seconds"));
    assert_string_equal(refusal("\nmodle:\n  layers: 4\n"),
                        "run.yaml line 2: unknown section 'modle'; allowed are run, model, corpus, "
                        "inner, outer, checkpoint, serve");
}

static void a_wrong_type_is_named_with_its_line_and_what_is_allowed(void **state) {
    (void)state;
    assert_string_equal(refusal("outer:\n  quorum: two\n"),
                        "run.yaml line 2: outer.quorum is 'two'; allowed are whole numbers from 1 to 1024");
    assert_string_equal(refusal("outer: {quorum: \"2\"}\n"),
                        "run.yaml line 1: outer.quorum is \"2\"; allowed are whole numbers from 1 to 1024");
    assert_string_equal(refusal("outer:\n  quorum: 3.5\n"),
                        "run.yaml line 2: outer.quorum is '3.5'; allowed are whole numbers from 1 to 1024");
    assert_string_equal(refusal("outer:\n  quorum:\n    - 1\n"),
                        "run.yaml line 2: outer.quorum is a list; allowed are whole numbers from 1 to 1024");
    assert_string_equal(refusal("outer:\n  quorum:\n"),
                        "run.yaml line 2: outer.quorum is ''; allowed are whole numbers from 1 to 1024");
    assert_string_equal(refusal("model:\n  tied: maybe\n"),
                        "run.yaml line 2: model.tied is 'maybe'; allowed are true and false");
    assert_string_equal(refusal("outer:\n  result_codec: int7\n"),
                        "run.yaml line 2: outer.result_codec is 'int7'; allowed are fp32, int8 and fp4");
    assert_string_equal(refusal("checkpoint:\n  weights: fp16\n"),
                        "run.yaml line 2: checkpoint.weights is 'fp16'; allowed are fp32 and bf16");
    assert_string_equal(refusal("inner:\n  lr: fast\n"),
                        "run.yaml line 2: inner.lr is 'fast'; allowed are numbers over 0 up to 10");
    assert_string_equal(refusal("outer:\n  round_seconds: 10s\n"),
                        "run.yaml line 2: outer.round_seconds is '10s'; allowed are seconds from 0.05 to 86400");
    assert_string_equal(refusal("outer: 3\n"),
                        "run.yaml line 1: section 'outer' has no keys; write them below it, indented");
}

/* Text goes into the genesis, so what a message cannot hold is refused here, by name, and not later
 * by the encoder; and a run.yaml that was saved with it could not be loaded again. */
static void text_that_no_message_holds_is_refused(void **state) {
    struct settings s;
    struct err err = {0};
    (void)state;
    assert_starts(refusal("run:\n  name: \"a\\x85b\"\n"), "run.yaml line 2: run.name is \"");
    settings_init(&s);
    assert_int_equal(settings_set(&s, "run.name=\xff\xfe", &err), -1);
    assert_non_null(strstr(err.msg, "allowed are 1 to 64 bytes of UTF-8 without control characters"));
    assert_int_equal(settings_set(&s, "run.name=Gr\xc3\xbc\xc3\x9f", &err), 0);
}

/* libyaml takes 3 s for 40,000 brackets and four times as long for twice as many. */
static void brackets_by_the_thousand_are_refused_at_once(void **state) {
    char text[SETTINGS_BYTES_MAX];
    (void)state;
    memset(text, '[', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    assert_starts(refusal(text), "/some/where/run.yaml: lists or sections more than 8 deep");
}

/* C's own number parsers take all of these; a training run would end as nonsense much later. */
static void numbers_that_c_would_take_are_refused(void **state) {
    static const char *const values[] = { "nan", "inf", "0x10", "1e999", "-1", "1.5z", "1,5", "1e" };
    char text[64];
    (void)state;
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        snprintf(text, sizeof text, "inner:\n  weight_decay: %s\n", values[i]);
        assert_starts(refusal(text), "run.yaml line 2: inner.weight_decay is '");
    }
    assert_starts(refusal("inner:\n  batch: 99999999999999999999999\n"), "run.yaml line 2: inner.batch");
    assert_starts(refusal("inner:\n  batch: 0\n"), "run.yaml line 2: inner.batch is '0'");
}

static void what_is_no_yaml_is_named_with_its_line(void **state) {
    (void)state;
    assert_starts(refusal("run:\n  name: x\n\touter: 3\n"), "run.yaml line 3: not YAML: ");
    assert_starts(refusal("run: [\n"), "run.yaml line 2: not YAML: ");
    assert_starts(refusal("- a\n"), "run.yaml line 1: expected sections: run, model");
    assert_starts(refusal("outer:\n  quorum: 1\n  quorum: 2\n"),
                  "run.yaml line 3: outer.quorum stands here a second time");
    assert_starts(refusal("? [1, 2]\n: 3\n"), "run.yaml line 1: the name of a section is not");
}

static void the_command_line_is_checked_like_the_file(void **state) {
    struct settings s;
    struct err err;
    (void)state;
    settings_init(&s);
    assert_int_equal(settings_set(&s, "outer.quorum=3", &err), 0);
    assert_int_equal(s.outer.quorum, 3);
    assert_int_equal(settings_set(&s, "outer.quorum=x", &err), -1);
    assert_string_equal(err.msg, "--set: outer.quorum is 'x'; allowed are whole numbers from 1 to 1024");
    assert_int_equal(settings_set(&s, "quorum=3", &err), -1);
    assert_string_equal(err.msg, "--set: 'quorum=3' is not SECTION.KEY=VALUE, like outer.quorum=3");
    assert_int_equal(settings_set(&s, "outer.quorum", &err), -1);
    assert_int_equal(settings_set(&s, "outer.nothing=3", &err), -1);
    assert_starts(err.msg, "--set: unknown key outer.nothing");
}

static void resolved(struct settings *s, const char *text) {
    struct err err;
    if (parse(s, text, &err) || settings_resolve(s, "/runs/first", &corpus, &err) || run_check_store(s, &err))
        fail_msg("%s", err.msg);
}

static void an_empty_file_means_every_default(void **state) {
    struct settings s;
    struct msg_model debug;
    struct err err;
    (void)state;
    resolved(&s, "");
    assert_int_equal(proto_model_preset("debug", &debug, &err), 0);
    assert_memory_equal(&s.model, &debug, sizeof debug);
    assert_string_equal(s.name, "first");
    assert_string_equal(s.checkpoint_url, "file:///runs/first/checkpoints");
    assert_int_equal(s.checkpoint_bf16, 0);
    assert_int_equal(s.inner.total_tokens, 20000 * 128);
    assert_int_equal(s.outer.fragments, 1);
    resolved(&s, "outer:\nmodel:\n"); /* sections without keys */
}

/* A run of debug has too few outer steps for the momentum of the long ones; what is given counts. */
static void the_outer_rate_is_the_presets(void **state) {
    struct settings s;
    (void)state;
    resolved(&s, "");
    assert_true(s.outer.lr == 1 && s.outer.momentum == 0);
    resolved(&s, "model: {preset: 10m, sequence: 128}\n");
    assert_true(s.outer.lr == 0.7f && s.outer.momentum == 0.9f);
    resolved(&s, "outer: {momentum: 0.5}\n");
    assert_true(s.outer.lr == 1 && s.outer.momentum == 0.5f);
}

/* A method by its name is a set of defaults, which what is given replaces. */
static void a_mode_is_a_set_of_defaults(void **state) {
    struct settings s;
    (void)state;
    resolved(&s, "outer:\n  mode: streaming\n");
    assert_int_equal(s.outer.fragments, 4);
    assert_int_equal(s.outer.overlap, 5);
    assert_true(s.outer.alpha == 0.5f);
    resolved(&s, "outer:\n  mode: intellect1\n  alpha: 0.25\n");
    assert_int_equal(s.outer.fragments, 1);
    assert_int_equal(s.outer.overlap, 0);
    assert_int_equal(s.outer.quorum, PROTO_MEMBERS_MAX);
    assert_true(s.outer.alpha == 0.25f);
}

/* A default that depends on another setting must follow it. */
static void defaults_follow_what_was_given(void **state) {
    struct settings s;
    (void)state;
    resolved(&s, "inner:\n  total_tokens: 1000000\nouter:\n  silence_seconds: 4\n  round_seconds: 0.5\n");
    assert_int_equal(s.inner.decay_tokens, 200000);
    assert_int_equal(s.outer.heartbeat_ms, 500);
    assert_int_equal(s.outer.round_ms, 500);
}

static void settings_that_contradict_each_other_are_refused(void **state) {
    static const struct { const char *text, *says; } cases[] = {
        { "outer: {heartbeat_seconds: 3, silence_seconds: 5}", "outer.silence_seconds is 5, under three" },
        { "outer: {mode: fast}", "outer.mode is 'fast'; allowed are decoupled, streaming" },
        { "outer: {fragments: 64}", "outer.fragments: fragment 5 of 64 would be empty" },
        { "outer: {lease_samples: 1}", "outer.lease_samples 1 is less than inner.batch" },
        { "outer: {chunk_elements: 5000}", "outer.chunk_elements is 5000; allowed are multiples of 4096" },
        { "model: {preset: 8b, sequence: 128}\nouter: {chunk_elements: 4096}", "outer.chunk_elements 4096 cuts" },
        { "model: {preset: huge}", "model.preset: model preset 'huge' is none of: debug" },
        { "model: {heads: 3, kv_heads: 2}", "model.heads" },
        { "model: {heads: 7, kv_heads: 7}", "model.width" },
        { "inner: {total_tokens: 100, decay_tokens: 101}", "inner.decay_tokens 101" },
        { "inner: {batch: 30000}", "the corpus has 20000 samples, fewer than one batch" },
        { "model: {vocabulary: 100}", "the corpus' tokenizer 'bytes' has 256 tokens" },
        { "model: {sequence: 64}", "the corpus has samples of 128 tokens, model.sequence is 64" },
        { "serve: {listen: nowhere}", "serve.listen: 'nowhere' has no port" },
        { "checkpoint: {url: \"ftp://x\"}", "checkpoint.url: 'ftp://x': allowed are file:///FOLDER and s3://" },
        { "checkpoint: {url: \"https://host/x\"}", "checkpoint.url: 'https://host/x': allowed are" },
        { "checkpoint: {url: \"s3://x\"}", "checkpoint.url: s3: \"x\" cannot be a bucket" },
        { "checkpoint: {url: \"s3://key:secret@bucket/x\"}", "checkpoint.url: s3: a key does not belong into a URL" },
    };
    struct settings s;
    struct err err;
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (parse(&s, cases[i].text, &err)) fail_msg("%s", err.msg);
        if (!settings_resolve(&s, "/runs/first", &corpus, &err) && !run_check_store(&s, &err)) fail_msg("taken: %s", cases[i].text);
        assert_int_equal(err.code, ERR_CONFIG);
        assert_starts(err.msg, cases[i].says);
    }
}

/* What init writes must say the same as what it was given: with the '#'s as they are, and with all
 * of them taken away. U+2028 is a line break to YAML, and was folded to a space. */
static void the_written_file_reads_back_as_the_same_settings(void **state) {
    struct settings before, after;
    struct err err;
    char path[] = "/tmp/test_settings.XXXXXX", what[200];
    (void)state;
    resolved(&before, "run: {name: \"a \\\"quoted\\\" \\\\ name, \\u2028 \\ufeff \\uffff\"}\ninner: {lr: 0.00123456789}\n"
                      "outer: {lr: 0.1, round_seconds: 0.25}\nmodel: {tied: false}\n");
    close(mkstemp(path));
    assert_int_equal(settings_save(&before, path, &err), 0);
    settings_init(&after);
    if (settings_load(&after, path, &err)) fail_msg("%s", err.msg);
    assert_memory_equal(after.given, before.given, sizeof after.given);
    assert_int_equal(settings_resolve(&after, "/runs/first", &corpus, &err), 0);
    if (!settings_same_sealed(&after, &before, what, sizeof what)) fail_msg("%s", what);

    memset(before.given, 1, sizeof before.given); /* beyond the table they mean nothing */
    snprintf(before.address, sizeof before.address, "host.example");
    strcpy(before.corpus, "/c/corpus.json");
    assert_int_equal(settings_save(&before, path, &err), 0);
    settings_init(&after);
    if (settings_load(&after, path, &err)) fail_msg("%s", err.msg);
    if (!settings_same_sealed(&after, &before, what, sizeof what)) fail_msg("%s", what);
    assert_string_equal(after.listen, before.listen);
    unlink(path);
}

/* 0 is a value that somebody may want, not only a default that is not known yet. */
static void a_zero_that_was_given_is_written_as_zero(void **state) {
    struct settings before, after;
    struct err err;
    char path[] = "/tmp/test_settings.XXXXXX";
    (void)state;
    resolved(&before, "inner: {decay_tokens: 0, warmup_tokens: 0}\n");
    close(mkstemp(path));
    assert_int_equal(settings_save(&before, path, &err), 0);
    settings_init(&after);
    if (settings_load(&after, path, &err)) fail_msg("%s", err.msg);
    assert_true(settings_given(&after, &after.inner.decay_tokens));
    assert_int_equal(after.inner.decay_tokens, 0);
    unlink(path);
}

static void a_changed_sealed_setting_is_named_and_a_free_one_is_not(void **state) {
    struct settings file, sealed;
    char what[200] = "";
    (void)state;
    resolved(&sealed, "");
    resolved(&file, "serve: {listen: \"1.2.3.4:5\"}\n");
    assert_true(settings_same_sealed(&file, &sealed, what, sizeof what));
    resolved(&file, "outer: {grace_seconds: 7.5}\n");
    assert_false(settings_same_sealed(&file, &sealed, what, sizeof what));
    assert_string_equal(what, "outer.grace_seconds is 7.5 in run.yaml, but 30 in the sealed run");
}

/* Every sealed setting must survive the way through the genesis, or `serve` would never start. */
static void the_genesis_holds_every_sealed_setting(void **state) {
    struct settings s, back;
    struct settings_genesis g;
    struct msg_genesis decoded;
    struct proto_buffer b;
    struct err err;
    char what[200];
    (void)state;
    resolved(&s, "inner: {lr: 0.001}\nouter: {alpha: 0.25, clip_factor: 2.5}\nmodel: {init_std: 0.013}\n");
    strcpy(s.corpus, "file:///c/corpus.json");
    settings_to_genesis(&s, &corpus, &g);
    proto_buffer_init(&b, PROTO_BLOB_BYTES_MAX);
    assert_int_equal(proto_encode(&b, RECORD_genesis, &g.genesis, &err), 0);
    assert_int_equal(proto_decode(b.data, b.length, RECORD_genesis, &decoded, &err), 0);
    assert_int_equal(settings_from_genesis(&back, &decoded, &err), 0);
    if (!settings_same_sealed(&s, &back, what, sizeof what)) fail_msg("%s", what);
    assert_int_equal(decoded.corpus->samples, corpus.samples);
    proto_decoded_release(RECORD_genesis, &decoded);
    proto_buffer_release(&b);
}

/* ---- the corpus' manifest ------------------------------------------------------------------------ */

static const char *facts_refusal(const char *json) {
    static struct err err;
    struct corpus_facts facts;
    char path[] = "/tmp/test_corpus.XXXXXX";
    int fd = mkstemp(path);
    assert_int_equal(write(fd, json, strlen(json)), strlen(json));
    close(fd);
    int result = corpus_facts_read(&facts, path, &err);
    unlink(path);
    if (result == 0) fail_msg("taken: %s", json);
    assert_int_equal(err.code, ERR_CONFIG);
    return err.msg;
}

static void a_manifest_that_is_none_is_refused_with_what_is_wrong(void **state) {
    (void)state;
    assert_non_null(strstr(facts_refusal("{"), "is not JSON, line 1"));
    assert_non_null(strstr(facts_refusal("{\"format\":1}"), "\"vocabulary\" is not a whole number"));
    assert_non_null(strstr(facts_refusal("{\"format\":2,\"vocabulary\":256,\"sequence\":8,\"samples\":9,"
                                         "\"tokenizer\":\"bytes\"}"), "has format 2"));
    assert_non_null(strstr(facts_refusal("{\"format\":1,\"vocabulary\":256,\"sequence\":8,\"samples\":0,"
                                         "\"tokenizer\":\"bytes\"}"), "\"samples\" is not"));
    assert_non_null(strstr(facts_refusal("{\"format\":1,\"vocabulary\":256,\"sequence\":8,\"samples\":9}"),
                           "\"tokenizer\" is not a name"));
}

/* ---- addresses ------------------------------------------------------------------------------------- */

static void addresses_are_taken_apart(void **state) {
    struct address a;
    struct err err;
    char text[ADDRESS_TEXT_BYTES];
    (void)state;
    assert_int_equal(address_split("[::1]:80", false, &a, &err), 0);
    assert_string_equal(a.host, "::1");
    assert_int_equal(a.port, 80);
    address_format(&a, text);
    assert_string_equal(text, "[::1]:80");
    assert_int_equal(address_split("host", true, &a, &err), 0);
    static const char *const bad[] = { "host", ":80", "host:", "host:65536", "host:8x", "[::1", "" };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (!address_split(bad[i], false, &a, &err)) fail_msg("taken: %s", bad[i]);
    assert_true(address_is_any("0.0.0.0") && address_is_any("::") && !address_is_any("1.2.3.4"));
    assert_true(address_is_loopback("127.9.9.9") && address_is_loopback("::ffff:127.0.0.1"));
    assert_false(address_is_loopback("10.0.0.1"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_unknown_key_is_named_with_its_line_and_the_allowed_ones),
        cmocka_unit_test(a_wrong_type_is_named_with_its_line_and_what_is_allowed),
        cmocka_unit_test(text_that_no_message_holds_is_refused),
        cmocka_unit_test(brackets_by_the_thousand_are_refused_at_once),
        cmocka_unit_test(numbers_that_c_would_take_are_refused),
        cmocka_unit_test(what_is_no_yaml_is_named_with_its_line),
        cmocka_unit_test(the_command_line_is_checked_like_the_file),
        cmocka_unit_test(an_empty_file_means_every_default),
        cmocka_unit_test(the_outer_rate_is_the_presets),
        cmocka_unit_test(a_mode_is_a_set_of_defaults),
        cmocka_unit_test(defaults_follow_what_was_given),
        cmocka_unit_test(settings_that_contradict_each_other_are_refused),
        cmocka_unit_test(the_written_file_reads_back_as_the_same_settings),
        cmocka_unit_test(a_zero_that_was_given_is_written_as_zero),
        cmocka_unit_test(a_changed_sealed_setting_is_named_and_a_free_one_is_not),
        cmocka_unit_test(the_genesis_holds_every_sealed_setting),
        cmocka_unit_test(a_manifest_that_is_none_is_refused_with_what_is_wrong),
        cmocka_unit_test(addresses_are_taken_apart),
    };
    struct err err;
    if (proto_init(&err)) return 1;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
