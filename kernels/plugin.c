/* plugin.c - loads the CUDA backend at run time, so that programs need neither CUDA nor a GPU to start.
 *
 * The plugin needs libraries of CUDA's, which are not ours to ship (cuBLASLt alone has 500 MB). They are taken from
 * where the loader looks (LD_LIBRARY_PATH, the plugin's own folder, ldconfig's), else from the first of `folders`
 * that has them. cuDNN and NCCL are looked for as well. */
#include "kernels/plugin.h"

#include <dlfcn.h>
#include <glob.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A toolkit, then Python's nvidia-* wheels: of the environment that is active, of the user, of the system. */
static const char *const folders[] = {
    "$CUDA_HOME/lib64", "$CUDA_PATH/lib64", "/usr/local/cuda/lib64", "/usr/local/cuda-*/lib64", "/opt/cuda/lib64",
    "$VIRTUAL_ENV/lib/python3*/site-packages/nvidia/*/lib", "$CONDA_PREFIX/lib",
    "$CONDA_PREFIX/lib/python3*/site-packages/nvidia/*/lib", "$HOME/.local/lib/python3*/site-packages/nvidia/*/lib",
    "/usr/local/lib/python3*/*-packages/nvidia/*/lib", "/usr/lib/python3*/*-packages/nvidia/*/lib",
    "/opt/*/lib/python3*/site-packages/nvidia/*/lib",
};
#define LIBRARIES_MAX 8 /* that the plugin may lack */
static const char *const welcome[] = { "libcudnn.so.9", "libnccl.so.2" }; /* it does without, more slowly */

/* The pattern for `library` in a folder; false where the folder begins with a variable that is not set. */
static int pattern_of(const char *folder, const char *library, char out[PATH_MAX]) {
    char variable[32] = "";
    const char *rest = *folder == '$' ? strchr(folder, '/') : folder, *value = "";
    if (rest != folder) {
        snprintf(variable, sizeof variable, "%.*s", (int)(rest - folder - 1), folder + 1);
        value = getenv(variable);
        if (!value || *value != '/') return 0;
    }
    return snprintf(out, PATH_MAX, "%s%s/%s", value, rest, library) < PATH_MAX;
}

/* For good: once it is there, whoever needs it finds it by its name. */
static int load_library(const char *library) {
    char pattern[PATH_MAX];
    int found = 0;
    for (size_t i = 0; i < sizeof folders / sizeof *folders && !found; i++) {
        glob_t g;
        if (!pattern_of(folders[i], library, pattern) || glob(pattern, 0, NULL, &g)) continue;
        for (size_t j = g.gl_pathc; j > 0 && !found; j--) /* of several versions the newest, by name */
            found = dlopen(g.gl_pathv[j - 1], RTLD_NOW | RTLD_LOCAL) != NULL;
        globfree(&g);
    }
    return found;
}

/* As dlopen(), and what the loader lacks is looked for: it says "libcublasLt.so.13: cannot open ...". */
static void *load_plugin(const char *path, char why[200]) {
    void *plugin = NULL;
    for (int i = 0; i <= LIBRARIES_MAX; i++) {
        if ((plugin = dlopen(path, RTLD_NOW | RTLD_LOCAL))) break;
        snprintf(why, 200, "%s", dlerror());
        char library[64];
        size_t n = strcspn(why, ": ");
        if (n >= sizeof library || strncmp(why, "lib", 3) != 0 || !strncmp(why, path, n)) break;
        snprintf(library, sizeof library, "%.*s", (int)n, why);
        if (load_library(library)) continue;
        snprintf(why, 200, "%s is missing: install a CUDA toolkit, or Python's nvidia-cublas of the same CUDA; or "
                 "name its folder in LD_LIBRARY_PATH", library);
        break;
    }
    return plugin;
}

/* Beside the program, or in ../lib of its folder; else wherever the loader looks. INTELLECT_CUDA_PLUGIN names
 * another file. */
static void *open_plugin(const char *named, struct err *err) {
    char self[PATH_MAX], path[PATH_MAX + 64], why[200] = "";
    static const char *const places[] = { "", "../lib/" };
    void *plugin = NULL;
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    int there = named != NULL; /* a file that does not load is said, and no other taken */
    if (named) plugin = load_plugin(named, why);
    if (n > 0) {
        self[n] = '\0';
        *(strrchr(self, '/') + 1) = '\0';
        for (size_t i = 0; i < sizeof places / sizeof *places && !there; i++) {
            snprintf(path, sizeof path, "%s%s%s", self, places[i], KERNELS_PLUGIN_FILE);
            there = access(path, F_OK) == 0;
            if (there) plugin = load_plugin(path, why);
        }
    }
    if (!there) plugin = load_plugin(KERNELS_PLUGIN_FILE, why);
    if (!plugin) err_set(err, ERR_UNSUPPORTED, "the CUDA backend does not load: %s", why);
    for (size_t i = 0; plugin && !named && i < sizeof welcome / sizeof *welcome; i++)
        if (!dlopen(welcome[i], RTLD_NOW | RTLD_LOCAL)) load_library(welcome[i]);
    return plugin;
}

struct kernels *kernels_cuda_create(int device, size_t weight_bytes, size_t rest_bytes, struct err *err) {
    kernels_plugin_create *create;
    const char *named = getenv("INTELLECT_CUDA_PLUGIN");
    if (named && !*named) named = NULL;
    /* Asked first, because the plugin's libraries take a while to load. */
    if (!named && !dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL)) {
        err_set(err, ERR_NOT_FOUND, "there is no CUDA device: no NVIDIA driver is installed (%.100s)", dlerror());
        return NULL;
    }
    void *plugin = open_plugin(named, err); /* for good: a table's code is in it */
    if (!plugin) return NULL;
    *(void **)&create = dlsym(plugin, KERNELS_PLUGIN_ENTRY);
    if (create) return create(KERNELS_PLUGIN_ABI, device, weight_bytes, rest_bytes, err);
    err_set(err, ERR_UNSUPPORTED, "the CUDA plugin has no " KERNELS_PLUGIN_ENTRY "(): take it and the program from one "
                                  "release");
    return NULL;
}
