/* A model written as a plain Hugging Face folder: whole or not at all, and what was there until then stays. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "ckpt/ckpt.h"
#include "proto/model.h"
#include "proto/proto.h"

static char folder[64], dir[96];
static struct msg_model model = { .layers = 3, .width = 16, .heads = 2, .kv_heads = 1, .ffn = 32,
                                  .vocabulary = 64, .sequence = 16, .rope_theta = 1e4, .norm_eps = 1e-5 };
static size_t elements;

/* What a reader gives: *base, and the element's number in the low bits of the mantissa. */
static int give(void *base, uint64_t first, size_t n, float *out, struct err *err) {
    (void)err;
    for (size_t i = 0; i < n; i++) out[i] = *(float *)base + (float)(first + i) / 65536;
    return 0;
}

static int give_up(void *arg, uint64_t first, size_t n, float *out, struct err *err) {
    (void)arg, (void)first, (void)n, (void)out;
    return err_set(err, ERR_CORRUPT, "the reader gives up");
}

static struct ckpt_folder what(float *base) {
    return (struct ckpt_folder){ .model = &model, .init_std = 0.02f, .tokenizer = "bpe-0123", .read = give,
                                 .arg = base, .tokenizer_json = proto_str("{}") };
}

/* The folder holds this vector, rounded where it is bf16. */
static void assert_holds(float base, const char *weights) {
    struct err err = { 0 };
    float *got = malloc(elements * sizeof *got), *want = malloc(elements * sizeof *want);
    struct ckpt *c = ckpt_open(dir, NULL, &err);
    if (!c || ckpt_read(c, CKPT_WEIGHTS, 0, elements, got, &err)) fail_msg("%s", err.msg);
    give(&base, 0, elements, want, NULL);
    assert_true(ckpt_is_plain(c));
    assert_string_equal(ckpt_weights_name(c), weights);
    assert_string_equal(ckpt_tokenizer(c), "bpe-0123");
    assert_true(proto_model_equal(ckpt_model(c), &model));
    for (size_t i = 0; i < elements; i++) {
        float off = got[i] > want[i] ? got[i] - want[i] : want[i] - got[i];
        if (off > (strcmp(weights, "bf16") ? 0 : want[i] / 256)) fail_msg("element %zu: %g", i, (double)got[i]);
    }
    ckpt_close(c);
    free(got);
    free(want);
}

static void it_reads_back_and_is_replaced_whole(void **state) {
    (void)state;
    struct err err = { 0 };
    float one = 1, two = 2;
    struct ckpt_folder f = what(&one);
    char path[160];
    f.shard_bytes = elements * 4 / 3; /* several files */
    if (ckpt_folder_write(&f, dir, &err)) fail_msg("%s", err.msg);
    assert_holds(1, "fp32");
    f = what(&two);
    f.weights = CKPT_BF16;
    if (ckpt_folder_write(&f, dir, &err)) fail_msg("%s", err.msg);
    assert_holds(2, "bf16");
    snprintf(path, sizeof path, "%s/model-00002-of-00003.safetensors", dir);
    assert_int_not_equal(access(path, F_OK), 0); /* nothing of the one before */
    snprintf(path, sizeof path, "%s/tokenizer.json", dir);
    assert_int_equal(access(path, F_OK), 0);
}

static void what_fails_leaves_what_was_there(void **state) {
    (void)state;
    struct err err = { 0 };
    float one = 1;
    char made[128];
    struct ckpt_folder f = what(&one);
    if (ckpt_folder_write(&f, dir, &err)) fail_msg("%s", err.msg);
    f.read = give_up;
    assert_int_equal(ckpt_folder_write(&f, dir, &err), -1);
    assert_string_equal(err.msg, "the reader gives up");
    assert_holds(1, "fp32");
    snprintf(made, sizeof made, "%s.new", dir);
    assert_int_not_equal(access(made, F_OK), 0);
}

/* One that was killed while it wrote. */
static void leftovers_are_no_hindrance(void **state) {
    (void)state;
    struct err err = { 0 };
    float one = 1;
    char made[256];
    struct ckpt_folder f = what(&one);
    snprintf(made, sizeof made, "mkdir -p %s.new && echo x > %s.new/config.json", dir, dir);
    assert_int_equal(system(made), 0);
    if (ckpt_folder_write(&f, dir, &err)) fail_msg("%s", err.msg);
    assert_holds(1, "fp32");
}

static int set_up(void **state) {
    (void)state;
    snprintf(folder, sizeof folder, "/tmp/test-folder-XXXXXX");
    if (proto_init(NULL) || !mkdtemp(folder)) return -1;
    snprintf(dir, sizeof dir, "%s/model", folder);
    elements = (size_t)proto_model_elements(&model);
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    return system(command);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(it_reads_back_and_is_replaced_whole, set_up, tear_down),
        cmocka_unit_test_setup_teardown(what_fails_leaves_what_was_there, set_up, tear_down),
        cmocka_unit_test_setup_teardown(leftovers_are_no_hindrance, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
