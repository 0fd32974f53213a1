/* memory.h - what the emulator tells tests: of memory, in pieces of EMULATOR_SHARED_LEAST and more, and of
 * products. */
#ifndef INTELLECT_TESTS_CUDA_MEMORY_H
#define INTELLECT_TESTS_CUDA_MEMORY_H

#include <stddef.h>

extern struct emulator_memory {
    size_t live, most; /* bytes: now; at most so far */
} emulator_memory;

extern unsigned emulator_mma_count; /* of lanes, kernels/cuda/mma.h */

#endif
