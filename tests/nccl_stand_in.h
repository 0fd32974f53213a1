/* nccl_stand_in.h - for tests of ranks that speak through NCCL: the stand-in of tests/cuda/nccl.c. Included once by each. */
#ifndef INTELLECT_TESTS_NCCL_STAND_IN_H
#define INTELLECT_TESTS_NCCL_STAND_IN_H

#include <dlfcn.h>
#include <string.h>
#include <unistd.h>

/* From BUILD, where this program is BUILD/tests/NAME; found by its name from then on. -1: it is not there. */
static inline int load_nccl_stand_in(void) {
    char path[4096];
    ssize_t n = readlink("/proc/self/exe", path, sizeof path - 64);
    if (n < 0) return -1;
    path[n] = '\0';
    for (int i = 0; i < 2; i++) *strrchr(path, '/') = '\0';
    return dlopen(strcat(path, "/emulator/libnccl.so.2"), RTLD_NOW) ? 0 : -1;
}

#endif
