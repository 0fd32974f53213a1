/* cpu_attention_bf16.c - the attention of cpu_attention_512.c in bf16, on processors with AVX512-BF16. */
#define CPU_512_BF16
#include "kernels/cpu_attention_512.c"
