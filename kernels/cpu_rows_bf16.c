/* cpu_rows_bf16.c - the kernels of cpu_rows.c with activations and weights in bf16: computed in fp32, rounded
 * once where an activation is stored. */
#define CPU_ROWS_BF16
#include "kernels/cpu_rows.c"
