/* plugin.h - what the program and libintellect-cuda.so say to each other. */
#ifndef INTELLECT_KERNELS_PLUGIN_H
#define INTELLECT_KERNELS_PLUGIN_H

#include "kernels/kernels.h"

#include <stddef.h>
#include <stdint.h>

/* Of struct kernels and of what its entries take. Counts up with each change of either. */
#define KERNELS_PLUGIN_ABI 6u
#define KERNELS_PLUGIN_FILE "libintellect-cuda.so"
#define KERNELS_PLUGIN_ENTRY "intellect_cuda_create"

/* The one function that the plugin exports. Returns NULL: ERR_UNSUPPORTED (another interface, driver too old,
 * device too old), ERR_NOT_FOUND (no device), ERR_CONFIG (no such device), ERR_MEMORY. */
typedef struct kernels *kernels_plugin_create(uint32_t abi, int device, size_t weight_bytes, size_t rest_bytes,
                                              struct err *err);
#ifdef __cplusplus
extern "C"
#endif
kernels_plugin_create intellect_cuda_create;

#endif
