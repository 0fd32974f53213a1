/* staged.h - a backend whose tensors are host memory, over one whose tensors are a device's: each call copies
 * its operands there and its results back. So the tests of kernels run the same on both. */
#ifndef INTELLECT_TESTS_CUDA_STAGED_H
#define INTELLECT_TESTS_CUDA_STAGED_H

#include "kernels/kernels.h"

/* Takes `device` over; end with destroy. Aborts where there is no memory. */
struct kernels *staged_create(struct kernels *device);

#endif
