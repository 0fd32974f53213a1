/* reference_bf16.c - the specification with activations and weights in bf16: what reference.c computes in
 * double, rounded to bf16 once wherever an activation is stored. */
#define REFERENCE_BF16
#include "kernels/reference.c"
