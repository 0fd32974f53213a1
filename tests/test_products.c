/* test_products.c - which algorithm of cuBLASLt's a product is by: the fastest of those that it names, kept on disk, so that
 * the next start takes the same. matmul.cu runs on the emulator's cuBLASLt (tests/cuda/cublaslt.h). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include "kernels/plugin.h"
#include "tests/cuda/cublaslt.h"

static char folder[64];

static struct kernels *start(void) {
    struct err err;
    struct kernels *k = intellect_cuda_create(KERNELS_PLUGIN_ABI, 0, sizeof(float), 0, &err);
    if (!k) fail_msg("%s", err.msg);
    emulator_products.heuristics = 0;
    emulator_products.last = -1;
    return k;
}

static void finish(struct kernels *k) {
    struct err err;
    if (k->check(k, &err)) fail_msg("%s", err.msg);
    k->destroy(k);
}

/* x * w^T with x[rows,2] and w[3,2]; returns by which algorithm. */
static int multiply(const struct kernels *k, int rows) {
    static const float x[] = { 1, 2, 3, 4, 5, 6, 7, 8 }, w[] = { 1, 0, 0, 1, 1, 1 };
    struct err err;
    float out[12] = { 0 };
    float *d_x = k->alloc(k, sizeof x, &err), *d_w = k->alloc(k, sizeof w, &err), *d_out = k->alloc(k, sizeof out, &err);
    k->copy_in(k, d_x, x, sizeof x);
    k->copy_in(k, d_w, w, sizeof w);
    k->matmul_forward(k, d_out, d_x, d_w, rows, 2, 3);
    k->copy_out(k, out, d_out, (size_t)rows * 3 * sizeof *out);
    for (int r = 0; r < rows; r++) {
        assert_true(out[r * 3] == x[r * 2] && out[r * 3 + 1] == x[r * 2 + 1]);
        assert_true(out[r * 3 + 2] == x[r * 2] + x[r * 2 + 1]);
    }
    k->free(k, d_x);
    k->free(k, d_w);
    k->free(k, d_out);
    return emulator_products.last;
}

static const char *in_folder(const char *name) {
    static char path[400];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static const char file_name[] = "products-130100-emulated-on-a-CPU.txt";

static size_t read_kept(char out[8192]) {
    FILE *f = fopen(in_folder(file_name), "r");
    size_t n = f ? fread(out, 1, 8191, f) : 0;
    if (f) fclose(f);
    out[n] = '\0';
    return n;
}

static void write_kept(const char *text, size_t n) {
    FILE *f = fopen(in_folder(file_name), "w");
    assert_non_null(f);
    assert_int_equal(fwrite(text, 1, n, f), n);
    fclose(f);
}

static int fresh_folder(void **state) {
    (void)state;
    strcpy(folder, "/tmp/test_products.XXXXXX");
    assert_non_null(mkdtemp(folder));
    emulator_products = (struct emulator_products){ .fastest = 0, .version = 130100 };
    return setenv("INTELLECT_CACHE", folder, 1);
}

static int remove_folder(void **state) {
    (void)state;
    DIR *d = opendir(folder);
    for (struct dirent *e; d && (e = readdir(d));) unlink(in_folder(e->d_name));
    if (d) closedir(d);
    return rmdir(folder);
}

static void the_fastest_is_taken_and_asked_for_once(void **state) {
    (void)state;
    for (int fastest = 0; fastest < EMULATOR_ALGORITHMS - 1; fastest++) {
        emulator_products.fastest = fastest;
        unlink(in_folder(file_name));
        struct kernels *k = start();
        assert_int_equal(multiply(k, 2), fastest);
        assert_int_equal(multiply(k, 2), fastest);
        assert_int_equal(emulator_products.heuristics, 1);
        finish(k);
    }
}

/* What would be faster today would give other bits than yesterday. */
static void the_next_start_takes_what_the_first_one_took(void **state) {
    (void)state;
    char kept[8192];
    emulator_products.fastest = 2;
    struct kernels *k = start();
    multiply(k, 2);
    multiply(k, 3);
    finish(k);
    assert_true(read_kept(kept) > 0);
    assert_memory_equal(kept, "intellect products 1 cuBLASLt 130100 emulated-on-a-CPU\n3 2 2 1 0 0 0 16 ", 72);
    emulator_products.fastest = 1;
    k = start();
    assert_null(strstr(k->description, "ignored"));
    assert_int_equal(multiply(k, 2), 2);
    assert_int_equal(multiply(k, 3), 2);
    assert_int_equal(emulator_products.heuristics, 0);
    assert_int_equal(multiply(k, 4), 1); /* a shape that is new */
    finish(k);
    /* Nothing else is left lying about. */
    struct stat st;
    char other[80];
    snprintf(other, sizeof other, "%s.%d", file_name, (int)getpid());
    assert_int_equal(stat(in_folder(other), &st), -1);
}

/* Every byte of the file damaged in turn, and every shorter file: never another algorithm than was kept, unless all of
 * it is ignored, and then it is said. */
static void a_damaged_file_is_ignored_whole(void **state) {
    (void)state;
    char kept[8192], damaged[8192];
    emulator_products.fastest = 2;
    struct kernels *k = start();
    multiply(k, 2);
    finish(k);
    size_t n = read_kept(kept);
    emulator_products.fastest = 1;
    for (size_t i = 0; i < 2 * n; i++) {
        memcpy(damaged, kept, n);
        if (i < n) damaged[i] ^= 1;
        write_kept(damaged, i < n ? n : i - n);
        k = start();
        if (!strstr(k->description, "ignored: products-130100-emulated-on-a-CPU.txt is "))
            fail_msg("byte %zu of %zu: %s", i, n, k->description);
        assert_int_equal(multiply(k, 2), 1);
        finish(k);
    }
    /* What was chosen instead is kept. */
    k = start();
    assert_null(strstr(k->description, "ignored"));
    emulator_products.fastest = 0;
    assert_int_equal(multiply(k, 2), 1);
    finish(k);
}

/* Under this file's name, but of another library: as when somebody copied a home to another machine. */
static void a_file_of_another_library_or_device_is_ignored(void **state) {
    (void)state;
    emulator_products.version = 130099;
    emulator_products.fastest = 2;
    struct kernels *k = start();
    multiply(k, 2);
    finish(k);
    char from[400];
    strcpy(from, in_folder("products-130099-emulated-on-a-CPU.txt"));
    assert_int_equal(rename(from, in_folder(file_name)), 0);
    emulator_products.version = 130100;
    emulator_products.fastest = 1;
    k = start();
    assert_non_null(strstr(k->description, "is of another library or device: cuBLASLt 130099 emulated-on-a-CPU"));
    assert_int_equal(multiply(k, 2), 1);
    finish(k);
    setenv("EMULATOR_NAME", "another", 1);
    emulator_products.fastest = 0;
    k = start();
    assert_int_equal(multiply(k, 2), 0);
    finish(k);
    unsetenv("EMULATOR_NAME");
}

/* One that the file names and that does not run, the CRC notwithstanding. */
static void an_algorithm_that_is_refused_is_replaced(void **state) {
    (void)state;
    char kept[8192];
    struct kernels *k = start();
    multiply(k, 2);
    finish(k);
    read_kept(kept);
    char *shape = strstr(kept, "\n3 2 2 1 0 0 0 16 ");
    assert_non_null(shape);
    memcpy(shape, "\n3 3 2 1 0 0 0 16 ", 18); /* its algorithm belongs to two rows, not three */
    char *end = strstr(kept, "crc32 ");
    sprintf(end, "crc32 %08lx\n", crc32(0, (const Bytef *)kept, (uInt)(end - kept)));
    write_kept(kept, strlen(kept));
    emulator_products.fastest = 3;
    k = start();
    assert_null(strstr(k->description, "ignored"));
    assert_int_equal(multiply(k, 3), 3);
    finish(k);
    emulator_products.fastest = 1;
    k = start();
    assert_int_equal(multiply(k, 3), 3);
    assert_int_equal(emulator_products.heuristics, 0);
    finish(k);
}

/* Two trainers of a machine that start at once: nothing that either chose is lost, and they agree afterwards. */
static void two_processes_keep_what_both_chose(void **state) {
    (void)state;
    struct kernels *a = start(), *b = start();
    emulator_products.fastest = 1;
    assert_int_equal(multiply(a, 2), 1);
    assert_int_equal(multiply(a, 3), 1);
    emulator_products.fastest = 2;
    assert_int_equal(multiply(b, 2), 1); /* the other was first */
    assert_int_equal(multiply(b, 4), 2);
    finish(a);
    finish(b);
    emulator_products.fastest = 0;
    a = start();
    assert_int_equal(multiply(a, 2), 1);
    assert_int_equal(multiply(a, 3), 1);
    assert_int_equal(multiply(a, 4), 2);
    finish(a);
}

static void without_a_folder_it_is_timed_at_each_start(void **state) {
    (void)state;
    setenv("INTELLECT_CACHE", "/proc/nowhere", 1);
    for (int fastest = 1; fastest < 3; fastest++) {
        emulator_products.fastest = fastest;
        struct kernels *k = start();
        assert_null(strstr(k->description, "ignored"));
        assert_int_equal(multiply(k, 2), fastest);
        finish(k);
    }
}

/* The first call may add to something that must not be lost. */
static void a_sum_is_tried_beside_what_it_adds_to(void **state) {
    (void)state;
    static const float dout[] = { 1, 2, 3, 4, 5, 6 }, x[] = { 1, 1, 1, 1 };
    float dw[6] = { 100, 100, 100, 100, 100, 100 };
    struct err err;
    emulator_products.fastest = 2;
    struct kernels *k = start();
    float *d_dout = k->alloc(k, sizeof dout, &err), *d_x = k->alloc(k, sizeof x, &err), *d_dw = k->alloc(k, sizeof dw, &err);
    k->copy_in(k, d_dout, dout, sizeof dout);
    k->copy_in(k, d_x, x, sizeof x);
    k->copy_in(k, d_dw, dw, sizeof dw);
    k->matmul_backward_weight(k, d_dw, d_dout, d_x, 2, 2, 3, KERNELS_ADD);
    assert_int_equal(emulator_products.last, 2);
    k->matmul_backward_weight(k, d_dw, d_dout, d_x, 2, 2, 3, KERNELS_ADD);
    k->copy_out(k, dw, d_dw, sizeof dw);
    for (int o = 0; o < 3; o++)
        for (int c = 0; c < 2; c++) assert_true(dw[o * 2 + c] == 100 + 2 * (dout[o] + dout[3 + o]));
    k->matmul_backward_weight(k, d_dw, d_dout, d_x, 2, 2, 3, KERNELS_SET);
    k->copy_out(k, dw, d_dw, sizeof dw);
    assert_true(dw[0] == 1 + 4);
    k->free(k, d_dout);
    k->free(k, d_x);
    k->free(k, d_dw);
    finish(k);
}

/* A tensor may begin anywhere in the arena: an algorithm that loads 16 bytes at once would fault. */
static void operands_out_of_line_get_algorithms_of_their_own(void **state) {
    (void)state;
    struct err err;
    struct kernels *k = start();
    char *arena = k->alloc(k, 4096, &err);
    for (size_t at = 4; at <= 64; at *= 2) {
        float *x = (float *)(void *)(arena + at), *w = (float *)(void *)(arena + 1024), *out = (float *)(void *)(arena + 2048);
        k->matmul_forward(k, out, x, w, 2, 2, 3);
    }
    assert_int_equal(emulator_products.misaligned, 0);
    assert_int_equal(emulator_products.heuristics, 3); /* 4, 8, and 16 and more */
    k->free(k, arena);
    finish(k);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(the_fastest_is_taken_and_asked_for_once, fresh_folder, remove_folder),
        cmocka_unit_test_setup_teardown(the_next_start_takes_what_the_first_one_took, fresh_folder, remove_folder),
        cmocka_unit_test_setup_teardown(a_damaged_file_is_ignored_whole, fresh_folder, remove_folder),
        cmocka_unit_test_setup_teardown(a_file_of_another_library_or_device_is_ignored, fresh_folder, remove_folder),
        cmocka_unit_test_setup_teardown(an_algorithm_that_is_refused_is_replaced, fresh_folder, remove_folder),
        cmocka_unit_test_setup_teardown(two_processes_keep_what_both_chose, fresh_folder, remove_folder),
        cmocka_unit_test_setup_teardown(without_a_folder_it_is_timed_at_each_start, fresh_folder, remove_folder),
        cmocka_unit_test_setup_teardown(a_sum_is_tried_beside_what_it_adds_to, fresh_folder, remove_folder),
        cmocka_unit_test_setup_teardown(operands_out_of_line_get_algorithms_of_their_own, fresh_folder, remove_folder),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
