/* memory.h - what the emulator has given as device memory, in pieces of EMULATOR_SHARED_LEAST and more, for tests. */
#ifndef INTELLECT_TESTS_CUDA_MEMORY_H
#define INTELLECT_TESTS_CUDA_MEMORY_H

#include <stddef.h>

extern struct emulator_memory {
    size_t live, most; /* bytes: now; at most so far */
} emulator_memory;

#endif
