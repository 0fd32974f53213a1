/* test_sdpa.c - the graphs of attention that kernels/cuda/sdpa.c asks cuDNN for. cuDNN checks each operation and the
 * graph as a whole when it is finalised, which takes no GPU; what its engines make of them `make gpu` shows. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>

#include "kernels/cuda/sdpa.h"

/* Where the loader or, as kernels/plugin.c does, the toolkit has it. */
static int is_here(void) {
    if (!dlopen("libcudnn.so.9", RTLD_NOW)) dlopen("/usr/local/cuda/lib64/libcudnn.so.9", RTLD_NOW);
    struct sdpa_shape s = { 1, 128, 2, 2, 64 };
    struct sdpa_counts c;
    struct err err;
    if (!sdpa_try_graph(&s, 0, &c, &err) || err.code != ERR_NOT_FOUND) return 1;
    print_message("skipped: there is no cuDNN (%s)\n", err.msg);
    return 0;
}

/* What an engine knows a graph by: that of cudnn-frontend has as many operations. */
static void graphs_are_finalised_and_have_the_form_that_engines_know(void **state) {
    (void)state;
    static const struct sdpa_shape shapes[] = {
        { 1, 8192, 32, 8, 128 }, { 4, 1024, 16, 16, 64 }, { 3, 384, 6, 2, 32 }, { 1, 77, 4, 1, 256 },
        { 2, 4096, 8, 1, 128 },  { 1, 8192, 4, 1, 128 },
    };
    if (!is_here()) skip();
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct sdpa_counts c;
        struct err err;
        int grouped = shapes[i].H != shapes[i].KV;
        if (sdpa_try_graph(&shapes[i], 0, &c, &err)) fail_msg("forward, shape %zu: %s", i, err.msg);
        assert_int_equal(c.pointwise, 10);
        assert_int_equal(c.products, 2);
        assert_int_equal(c.reductions, 2);
        assert_int_equal(c.reshapes, 0);
        assert_int_equal(c.tensors, 19);
        if (sdpa_try_graph(&shapes[i], 1, &c, &err)) fail_msg("backward, shape %zu: %s", i, err.msg);
        assert_int_equal(c.pointwise, 12);
        assert_int_equal(c.products, 5);
        assert_int_equal(c.reductions, grouped ? 3 : 1);
        assert_int_equal(c.reshapes, 3);
        assert_int_equal(c.tensors, grouped ? 32 : 30);
    }
}

/* Without a device cuDNN does not start, and what is not to be had is said. */
static void without_a_device_it_says_why(void **state) {
    (void)state;
    struct err err = { 0 };
    struct sdpa *s = sdpa_create(NULL, &err);
    if (!s) assert_true(err.msg[0] != '\0' && (err.code == ERR_NOT_FOUND || err.code == ERR_UNSUPPORTED));
    else assert_true(sdpa_version(s) >= 90000);
    sdpa_destroy(s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(graphs_are_finalised_and_have_the_form_that_engines_know),
        cmocka_unit_test(without_a_device_it_says_why),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
