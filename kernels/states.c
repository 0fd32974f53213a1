/* states.c - how much room moments take; states.h has what is in it. */
#include "kernels/kernels.h"

size_t kernels_state_bytes(enum kernels_state how, size_t n) {
    size_t blocks = (n + KERNELS_STATE_BLOCK - 1) / KERNELS_STATE_BLOCK;
    return how == KERNELS_STATE_FP32 ? n * sizeof(float)
         : how == KERNELS_STATE_BF16 ? n * sizeof(uint16_t) : n + blocks * sizeof(float);
}
