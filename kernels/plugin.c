/* plugin.c - loads the CUDA backend at run time, so that programs need neither CUDA nor a GPU to start. */
#include "kernels/plugin.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Beside the program, or in ../lib of its folder; else wherever the loader looks. INTELLECT_CUDA_PLUGIN names
 * another file. */
static void *open_plugin(struct err *err) {
    char self[PATH_MAX], path[PATH_MAX + 64];
    static const char *const places[] = { "", "../lib/" };
    const char *named = getenv("INTELLECT_CUDA_PLUGIN");
    void *plugin = NULL;
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    int there = named != NULL; /* a file that does not load is said, and no other taken */
    if (named) plugin = dlopen(named, RTLD_NOW | RTLD_LOCAL);
    if (n > 0) {
        self[n] = '\0';
        *(strrchr(self, '/') + 1) = '\0';
        for (size_t i = 0; i < sizeof places / sizeof *places && !there; i++) {
            snprintf(path, sizeof path, "%s%s%s", self, places[i], KERNELS_PLUGIN_FILE);
            there = access(path, F_OK) == 0;
            if (there) plugin = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        }
    }
    if (!there) plugin = dlopen(KERNELS_PLUGIN_FILE, RTLD_NOW | RTLD_LOCAL);
    if (!plugin) err_set(err, ERR_UNSUPPORTED, "the CUDA backend does not load: %.180s", dlerror());
    return plugin;
}

struct kernels *kernels_cuda_create(int device, size_t weight_bytes, size_t rest_bytes, struct err *err) {
    kernels_plugin_create *create;
    void *plugin = open_plugin(err); /* for good: a table's code is in it */
    if (!plugin) return NULL;
    *(void **)&create = dlsym(plugin, KERNELS_PLUGIN_ENTRY);
    if (create) return create(KERNELS_PLUGIN_ABI, device, weight_bytes, rest_bytes, err);
    err_set(err, ERR_UNSUPPORTED, "the CUDA plugin has no " KERNELS_PLUGIN_ENTRY "(): take it and the program from one "
                                  "release");
    return NULL;
}
