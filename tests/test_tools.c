/* The commands around a model, called as the command line calls them: exit code and output. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "node/tools.h"

#define FOLDER "tests/reference/llama-hf" /* made by Hugging Face, see make_model_vectors.py */

static char folder[] = "/tmp/intellect-test-tools-XXXXXX";
static char output[16384]; /* stdout and stderr of the last tool */

static const char *in_folder(const char *name) {
    static char path[4][256];
    static int next;
    char *p = path[next++ % 4];
    snprintf(p, sizeof path[0], "%s/%s", folder, name);
    return p;
}

static void write_text(const char *name, size_t n, char (*letter)(size_t i)) {
    FILE *f = fopen(in_folder(name), "wb");
    assert_non_null(f);
    for (size_t i = 0; i < n; i++) fputc(letter(i), f);
    fclose(f);
}

static char scattered(size_t i) { /* text() in make_model_vectors.py */
    return (char)(97 + (i * i + 3 * i) % 26);
}

static char periodic(size_t i) {
    return "aabb"[i % 4];
}

static int make_folder(void **state) {
    (void)state;
    if (!mkdtemp(folder)) return -1;
    write_text("scattered.txt", 1000, scattered);
    write_text("periodic.txt", 12000, periodic);
    return 0;
}

static int remove_folder(void **state) {
    (void)state;
    char command[300];
    snprintf(command, sizeof command, "rm -r '%s'", folder);
    return system(command) != 0;
}

/* Call a tool with everything it prints going to `output`. */
static int call(int (*tool)(int, char **), ...) {
    char *argv[24];
    int argc = 0;
    va_list ap;
    va_start(ap, tool);
    while (argc < 23 && (argv[argc] = va_arg(ap, char *))) argc++;
    va_end(ap);
    argv[argc] = NULL;
    FILE *f = tmpfile();
    fflush(NULL);
    int out = dup(1), err = dup(2);
    dup2(fileno(f), 1);
    dup2(fileno(f), 2);
    int rc = tool(argc, argv);
    fflush(NULL);
    dup2(out, 1);
    dup2(err, 2);
    close(out);
    close(err);
    rewind(f);
    output[fread(output, 1, sizeof output - 1, f)] = '\0';
    fclose(f);
    return rc;
}

static double number(const char *key) {
    json_t *o = json_loads(output, 0, NULL);
    if (!o) fail_msg("not one JSON object: %s", output);
    double value = json_number_value(json_object_get(o, key));
    json_decref(o);
    return value;
}

/* ---- eval -------------------------------------------------------------------------------------- */

/* What a user compares with other programs: the loss that Hugging Face's own code computes. */
static void eval_agrees_with_hugging_face(void **state) {
    (void)state;
    json_t *expected = json_load_file(FOLDER "/expected.json", 0, NULL);
    if (!expected) fail_msg("%s is missing: run from the repository's root", FOLDER);
    assert_int_equal(call(tool_eval, "eval", FOLDER, "--text", in_folder("scattered.txt"), "--json", NULL), 0);
    assert_true(fabs(number("loss") - json_number_value(json_object_get(expected, "loss"))) < 1e-5);
    assert_true(number("tokens") == json_number_value(json_object_get(expected, "tokens")));
    assert_true(fabs(number("perplexity") - exp(number("loss"))) < 1e-3);
    assert_true(fabs(number("bits_per_byte") - number("loss") / log(2)) < 1e-6); /* a token is a byte */
    assert_true(number("sequence") == 32);
    json_decref(expected);
}

static void eval_takes_a_corpus_heldout_slice(void **state) {
    (void)state;
    assert_int_equal(call(tool_data, "data", "--out", in_folder("half"), "--heldout", "0.5", "--sequence", "32",
                          in_folder("scattered.txt"), NULL), 0);
    assert_int_equal(call(tool_eval, "eval", FOLDER, "--corpus", in_folder("half"), "--json", NULL), 0);
    assert_true(number("tokens") == 499 / 32 * 32);
}

static void eval_names_what_is_too_short_or_too_long(void **state) {
    (void)state;
    write_text("short.txt", 20, periodic);
    assert_int_equal(call(tool_eval, "eval", FOLDER, "--text", in_folder("short.txt"), NULL), 1);
    assert_non_null(strstr(output, "20 tokens"));
    assert_non_null(strstr(output, "needs 33"));
    assert_int_equal(call(tool_eval, "eval", FOLDER, "--text", in_folder("short.txt"), "--sequence", "33", NULL), 1);
    assert_non_null(strstr(output, "32"));
    assert_int_equal(call(tool_eval, "eval", FOLDER, "--text", in_folder("none.txt"), NULL), 1);
    assert_int_equal(call(tool_eval, "eval", in_folder("none"), "--text", in_folder("short.txt"), NULL), 1);
}

/* ---- generate ---------------------------------------------------------------------------------- */

static void generate(const char *seed, const char *temperature, char *out) {
    assert_int_equal(call(tool_generate, "generate", FOLDER, "--prompt", "once", "--tokens", "40", "--seed", seed,
                          "--temperature", temperature, NULL), 0);
    strcpy(out, output);
}

/* The fewest tokens that have a share P of the probability: with none of it the likeliest, with all of it
 * as ever. */
static void top_p_leaves_the_likeliest(void **state) {
    (void)state;
    static char likeliest[sizeof output], drawn[sizeof output];
    static const char *const shares[] = { "0", "1", "0.5" };
    generate("1", "0", likeliest);
    generate("1", "0.8", drawn);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(call(tool_generate, "generate", FOLDER, "--prompt", "once", "--tokens", "40", "--seed", "1",
                              "--temperature", "0.8", "--top-p", shares[i], NULL), 0);
        if (i == 0) assert_string_equal(output, likeliest);
        if (i == 1) assert_string_equal(output, drawn);
        if (i == 2) assert_string_not_equal(output, likeliest);
    }
    assert_int_equal(call(tool_generate, "generate", FOLDER, "--prompt", "once", "--top-p", "1.5", NULL), 2);
}

static void the_same_seed_gives_the_same_text(void **state) {
    (void)state;
    static char a[sizeof output], b[sizeof output];
    generate("1", "0.8", a);
    generate("1", "0.8", b);
    assert_string_equal(a, b);
    generate("2", "0.8", b);
    assert_string_not_equal(a, b);
    generate("1", "0", a);
    generate("2", "0", b);
    assert_string_equal(a, b); /* the likeliest token is not drawn */
    assert_memory_equal(a, "once", 4);
}

/* ---- data and bigram --------------------------------------------------------------------------- */

static void order_two_knows_a_period_that_order_one_does_not(void **state) {
    (void)state;
    assert_int_equal(call(tool_data, "data", "--out", in_folder("corpus"), "--json", in_folder("periodic.txt"), NULL), 0);
    assert_true(number("samples") == (11760 - 1) / 128);
    assert_int_equal(call(tool_bigram, "bigram", in_folder("corpus"), "--json", NULL), 0);
    assert_true(number("loss") < 0.02);
    assert_true(fabs(number("loss_order_1") - log(2)) < 0.02);
    assert_true(fabs(number("loss_order_0") - log(2)) < 0.02);
}

/* The numbers are test_plan.c's. */
static void plan_adds_up_and_refuses_what_does_not_fit(void **state) {
    (void)state;
    assert_int_equal(call(tool_plan, "plan", "--model", "10m", "--precision", "bf16", "--memory", "8", "--json",
                          NULL), 0);
    json_t *o = json_loads(output, 0, NULL);
    assert_non_null(o);
    json_int_t sum = 0, parameters = json_integer_value(json_object_get(o, "parameters"));
    static const char *const part[] = { "weights", "gradients", "optimizer", "activations", "scratch" };
    for (size_t i = 0; i < 5; i++) sum += json_integer_value(json_object_get(o, part[i]));
    assert_int_equal(sum, json_integer_value(json_object_get(o, "all")));
    assert_int_equal(json_integer_value(json_object_get(o, "optimizer")), 8 * parameters);
    json_decref(o);
    assert_int_equal(call(tool_plan, "plan", "--model", "10b", "--memory", "80", NULL), 1);
    assert_non_null(strstr(output, "there are 80.0"));
    assert_int_equal(call(tool_plan, "plan", "--model", "7b", NULL), 1);
    assert_non_null(strstr(output, "150m"));
}

/* On eight cards of 80 GB the smallest model needs no sharing, 10b some; on two of 24 it does not fit, and
 * is told what would; a mesh that cannot be is refused before anything is weighed. */
static void plan_finds_a_mesh_or_says_why_there_is_none(void **state) {
    (void)state;
    assert_int_equal(call(tool_plan, "plan", "--model", "1b", "--precision", "bf16", "--devices", "8x80",
                          NULL), 0);
    assert_non_null(strstr(output, "--tp 1 --dp 8 --shard none"));
    assert_int_equal(call(tool_plan, "plan", "--model", "10b", "--precision", "bf16", "--batch", "64",
                          "--devices",
                          "8x80GB", "--json", NULL), 0);
    json_t *o = json_loads(output, 0, NULL);
    assert_non_null(o);
    assert_string_equal(json_string_value(json_object_get(o, "shard")), "gradients");
    assert_true(json_integer_value(json_object_get(o, "all")) < 80000000000);
    json_decref(o);
    assert_int_equal(call(tool_plan, "plan", "--model", "10b", "--precision", "bf16", "--devices", "2x24",
                          NULL), 1);
    assert_non_null(strstr(output, "no mesh of 2 devices fits"));
    assert_non_null(strstr(output, "--states 8bit"));
    assert_int_equal(call(tool_plan, "plan", "--model", "10m", "--tp", "3", "--memory", "80", NULL), 1);
    assert_non_null(strstr(output, "3 tensor-parallel ranks cannot share"));
    assert_int_equal(call(tool_plan, "plan", "--model", "10m", "--devices", "4x80", "--tp", "4", "--dp", "2",
                          NULL), 1);
    assert_non_null(strstr(output, "takes 8 devices, there are 4"));
    assert_int_equal(call(tool_plan, "plan", "--model", "10m", "--dp", "4", "--batch", "3", NULL), 1);
    assert_non_null(strstr(output, "a batch of 3 samples"));
    assert_int_equal(call(tool_plan, "plan", "--model", "10m", "--devices", "many", NULL), 2);
    assert_non_null(strstr(output, "as in 8x80"));
}

static void wrong_use_is_two_and_teaches(void **state) {
    (void)state;
    int (*tools[])(int, char **) = { tool_data, tool_bigram, tool_eval, tool_generate, tool_plan };
    for (size_t i = 0; i < sizeof tools / sizeof *tools; i++) {
        assert_int_equal(call(tools[i], "tool", NULL), 2);
        assert_non_null(strstr(output, "--help"));
        assert_int_equal(call(tools[i], "tool", "--nonsense", NULL), 2);
        assert_int_equal(call(tools[i], "tool", "--help", NULL), 0);
        assert_true(strlen(output) > 200);
    }
    assert_int_equal(call(tool_data, "data", "--out", "x", "--sequence", "-1", "y", NULL), 2);
    assert_non_null(strstr(output, "--sequence is '-1'"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(eval_agrees_with_hugging_face),
        cmocka_unit_test(eval_takes_a_corpus_heldout_slice),
        cmocka_unit_test(eval_names_what_is_too_short_or_too_long),
        cmocka_unit_test(top_p_leaves_the_likeliest),
        cmocka_unit_test(the_same_seed_gives_the_same_text),
        cmocka_unit_test(order_two_knows_a_period_that_order_one_does_not),
        cmocka_unit_test(plan_adds_up_and_refuses_what_does_not_fit),
        cmocka_unit_test(plan_finds_a_mesh_or_says_why_there_is_none),
        cmocka_unit_test(wrong_use_is_two_and_teaches),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
