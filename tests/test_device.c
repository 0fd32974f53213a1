/* test_device.c - what --device means, what is computed on, and what a person reads where it cannot be. The GPU is
 * the emulator as a plugin, and the management library tests/cuda/nvml.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/kernels.h"
#include "node/device.h"
#include "node/doctor.h"
#include "node/nvml.h"
#include "node/trainer.h"

static const struct device cpu = { DEVICE_CPU, 0 }, gpu = { DEVICE_CUDA, 0 }, any = { DEVICE_AUTO, 0 };

/* BUILD/emulator/ of BUILD/tests/test_device. */
static const char *emulated(const char *file) {
    static char path[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", path, sizeof path - 64);
    assert_true(n > 0);
    path[n] = '\0';
    for (int i = 0; i < 2; i++) *strrchr(path, '/') = '\0';
    strcat(path, "/emulator/");
    return strcat(path, file);
}

static int take_emulator(void **state) {
    (void)state;
    return setenv("INTELLECT_CUDA_PLUGIN", emulated("libintellect-cuda.so"), 1);
}

static void only_what_names_a_device_is_taken(void **state) {
    (void)state;
    static const char *const wrong[] = { "", "gpu", "cpu0", "cuda:", "cuda:-1", "cuda:1x", "cuda:256", "cuda0",
                                         "cuda:99999999999999999999", "CUDA" };
    struct device d;
    struct err err;
    char name[DEVICE_NAME_BYTES];
    assert_int_equal(device_parse("auto", &d, &err), 0);
    assert_int_equal(d.kind, DEVICE_AUTO);
    assert_int_equal(device_parse("cpu", &d, &err), 0);
    assert_int_equal(d.kind, DEVICE_CPU);
    assert_int_equal(device_parse("cuda:255", &d, &err), 0);
    assert_int_equal(d.kind, DEVICE_CUDA);
    assert_int_equal(d.index, 255);
    device_name(d, name);
    assert_string_equal(name, "cuda:255");
    assert_int_equal(device_parse("cuda", &d, &err), 0);
    assert_int_equal(d.index, 0);
    assert_int_equal(device_of_rank(d, 3).index, 0);
    assert_int_equal(device_parse("cuda:each", &d, &err), 0);
    device_name(d, name);
    assert_string_equal(name, "cuda:each");
    assert_int_equal(device_of_rank(d, 3).index, 3);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        assert_int_equal(device_parse(wrong[i], &d, &err), -1);
        assert_int_equal(err.code, ERR_CONFIG);
        assert_non_null(strstr(err.msg, "auto, cpu, cuda, cuda:N"));
    }
}

/* A precision is the same way to keep weights on both. */
static void each_precision_is_the_same_on_both(void **state) {
    (void)state;
    struct err err;
    for (int precision = TRAINER_FP32; precision <= TRAINER_BF16_STOCHASTIC; precision++) {
        struct kernels *c = device_create(cpu, precision, 1, 1, NULL, &err);
        struct kernels *g = device_create(gpu, precision, 1, 1, NULL, &err);
        if (!c || !g) fail_msg("%s", err.msg);
        assert_string_equal(g->name, "cuda");
        assert_string_equal(c->name, "cpu");
        assert_int_equal(c->weight_bytes, g->weight_bytes);
        assert_int_equal(c->rest_bytes, g->rest_bytes);
        assert_int_equal(c->act_bytes, g->act_bytes);
        c->destroy(c);
        g->destroy(g);
    }
}

static void auto_takes_a_gpu_where_there_is_one_and_says_why_not(void **state) {
    (void)state;
    struct err err = { 0 }, why;
    struct kernels *k = device_create(any, TRAINER_FP32, 1, 1, &why, &err);
    assert_non_null(k);
    assert_string_equal(k->name, "cuda");
    assert_int_equal(why.code, ERR_NONE);
    k->destroy(k);

    k = device_create(any, TRAINER_FP32, 1, 2, &why, &err);
    assert_non_null(k);
    assert_string_equal(k->name, "cpu");
    assert_non_null(strstr(why.msg, "2 ranks"));
    k->destroy(k);

    setenv("INTELLECT_CUDA_PLUGIN", "/nowhere/plugin.so", 1);
    k = device_create(any, TRAINER_FP32, 1, 1, &why, &err);
    take_emulator(NULL);
    assert_non_null(k);
    assert_string_equal(k->name, "cpu");
    assert_non_null(strstr(why.msg, "/nowhere/plugin.so"));
    k->destroy(k);
}

static void what_cannot_be_had_is_named(void **state) {
    (void)state;
    struct err err;
    assert_null(device_create((struct device){ DEVICE_CUDA, 1 }, TRAINER_FP32, 1, 1, NULL, &err));
    assert_int_equal(err.code, ERR_CONFIG);
    assert_non_null(strstr(err.msg, "no CUDA device 1; 1 are here"));

    setenv("EMULATOR_DRIVER", "12040", 1);
    assert_null(device_create(gpu, TRAINER_FP32, 1, 1, NULL, &err));
    assert_int_equal(err.code, ERR_UNSUPPORTED);
    assert_non_null(strstr(err.msg, "driver is for CUDA 12.4, this plugin for CUDA 13.0"));
    setenv("EMULATOR_DRIVER", "0", 1);
    assert_null(device_create(gpu, TRAINER_FP32, 1, 1, NULL, &err));
    unsetenv("EMULATOR_DRIVER");
    assert_int_equal(err.code, ERR_NOT_FOUND);
    assert_non_null(strstr(err.msg, "no NVIDIA driver"));

    setenv("EMULATOR_CAPABILITY", "7", 1);
    assert_null(device_create(gpu, TRAINER_FP32, 1, 1, NULL, &err));
    unsetenv("EMULATOR_CAPABILITY");
    assert_non_null(strstr(err.msg, "compute capability 7.0, 8.0 is the least"));
}

/* A library is taken from a wheel's folder where the loader has none of it. */
static void what_the_plugin_lacks_is_found_in_wheels(void **state) {
    (void)state;
    struct err err;
    char folder[] = "/tmp/intellect-wheels-XXXXXX", command[4 * PATH_MAX];
    assert_non_null(mkdtemp(folder));
    snprintf(command, sizeof command,
             "cd %s && mkdir -p env/lib/python3.11/site-packages/nvidia/cu13/lib && "
             "echo 'int intellect_cuda_create(void); int needed(void); int intellect_cuda_create(void) { return needed(); }' >a.c && "
             "echo 'int needed(void); int needed(void) { return 0; }' >b.c && "
             "${CC:-cc} -shared -fPIC -Wl,-soname,libneeded.so.7 -o env/lib/python3.11/site-packages/nvidia/cu13/lib/libneeded.so.7 b.c && "
             "${CC:-cc} -shared -fPIC -o plugin.so a.c -Wl,--no-as-needed env/lib/python3.11/site-packages/nvidia/cu13/lib/libneeded.so.7",
             folder);
    if (system(command)) fail_msg("no compiler to make a library with");
    snprintf(command, sizeof command, "%s/plugin.so", folder);
    setenv("INTELLECT_CUDA_PLUGIN", command, 1);
    assert_null(kernels_cuda_create(0, 4, 0, &err));
    assert_non_null(strstr(err.msg, "libneeded.so.7 is missing: install a CUDA toolkit"));
    snprintf(command, sizeof command, "%s/env", folder);
    setenv("VIRTUAL_ENV", command, 1);
    err.msg[0] = '\0';
    assert_null(kernels_cuda_create(0, 4, 0, &err)); /* its create says NULL, and nothing of a library */
    assert_string_equal(err.msg, "");
    unsetenv("VIRTUAL_ENV");
    take_emulator(NULL);
    snprintf(command, sizeof command, "rm -r %s", folder);
    assert_int_equal(system(command), 0);
}

static void the_management_library_tells_of_gpus_and_who_holds_them(void **state) {
    (void)state;
    struct nvml *n = malloc(sizeof *n);
    struct err err;
    char holders[160], want[64];
    assert_non_null(n);
    assert_int_equal(nvml_read(n, &err), -1); /* as it was started */
    assert_int_equal(err.code, ERR_UNSUPPORTED);
    assert_non_null(strstr(err.msg, "Driver Not Loaded"));
    setenv("FAKE_NVML", "", 1);
    snprintf(want, sizeof want, "%d", (int)getpid());
    setenv("FAKE_NVML_PID", want, 1);
    assert_int_equal(nvml_read(n, &err), 0);
    assert_string_equal(n->driver, "580.65.06");
    assert_int_equal(n->cuda, 13000);
    assert_int_equal(n->count, 2);
    assert_string_equal(n->device[0].name, "NVIDIA H100 80GB HBM3");
    assert_int_equal(n->device[0].nvlinks, 3);
    assert_int_equal(n->device[1].pcie_lanes, 4);
    assert_string_equal(n->path[0][1], "PCIe switches");
    assert_true(nvml_holders(n, holders, sizeof holders));
    snprintf(want, sizeof want, "process %d (test_device, 9216 MB), process 4194305 (not", (int)getpid());
    assert_memory_equal(holders, want, strlen(want));
    assert_true(nvml_holders(n, holders, 50)); /* what does not fit is left out whole */
    assert_null(strstr(holders, "4194305"));
    struct err full = { ERR_MEMORY, "no room" };
    device_name_holders(NULL, &full);
    assert_non_null(strstr(full.msg, "no room; memory is held by process"));
    free(n);
}

/* The loader looks at LD_LIBRARY_PATH when a program starts, and never again. */
static void start_again_with_the_fake_library(char **argv) {
    char folder[PATH_MAX], self[PATH_MAX] = "";
    snprintf(folder, sizeof folder, "%s", emulated(""));
    if (readlink("/proc/self/exe", self, sizeof self - 1) < 0) return;
    setenv("LD_LIBRARY_PATH", folder, 1);
    setenv("FAKE_NVML", "broken", 1);
    execv(self, argv);
}

/* What a card is judged by must not be another one's that has a name within its own. */
static void cards_are_known_by_their_whole_names(void **state) {
    (void)state;
    static const struct {
        const char *device, *card;
    } of[] = {
        { "CUDA 13.0, NVIDIA H100 80GB HBM3 (9.0, 81078 MB), bf16", "H100" }, { "NVIDIA H100 PCIe", "H100 PCIe" },
        { "NVIDIA H200", "H200" }, { "NVIDIA GH200 480GB", "GH200" }, { "NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB" },
        { "NVIDIA A100-SXM4-80GB", "A100" }, { "NVIDIA A10G", "A10G" }, { "NVIDIA A10", "A10" }, { "NVIDIA L4", "L4" },
        { "NVIDIA L40S", "L40S" }, { "NVIDIA GeForce RTX 4090", "RTX 4090" }, { "NVIDIA RTX A4000", NULL },
        { "NVIDIA RTX A6000", "RTX A6000" }, { "NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada" },
        { "Tesla V100", NULL }, { "", NULL },
    };
    for (size_t i = 0; i < sizeof of / sizeof *of; i++) {
        const struct doctor_card *c = doctor_card(of[i].device);
        if (!c || !of[i].card) assert_true(!c && !of[i].card);
        else assert_string_equal(c->name, of[i].card);
    }
}

int main(int argc, char **argv) {
    (void)argc;
    if (!getenv("FAKE_NVML")) start_again_with_the_fake_library(argv);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(only_what_names_a_device_is_taken),
        cmocka_unit_test(each_precision_is_the_same_on_both),
        cmocka_unit_test(auto_takes_a_gpu_where_there_is_one_and_says_why_not),
        cmocka_unit_test(what_cannot_be_had_is_named),
        cmocka_unit_test(what_the_plugin_lacks_is_found_in_wheels),
        cmocka_unit_test(cards_are_known_by_their_whole_names),
        cmocka_unit_test(the_management_library_tells_of_gpus_and_who_holds_them),
    };
    return cmocka_run_group_tests(tests, take_emulator, NULL);
}
