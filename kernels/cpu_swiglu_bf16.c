/* cpu_swiglu_bf16.c - the SwiGLU of cpu_swiglu_512.c in bf16, on processors with AVX512-BF16. */
#define CPU_512_BF16
#include "kernels/cpu_swiglu_512.c"
