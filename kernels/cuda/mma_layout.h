/* mma_layout.h - private to kernels/cuda/: which elements of a product a lane of the warp has, as the PTX ISA
 * says of mma.m16n8k16 with floating point types, "Matrix Fragments". Apart, so that a test in C can hold it
 * to that. */
#ifndef INTELLECT_KERNELS_CUDA_MMA_LAYOUT_H
#define INTELLECT_KERNELS_CUDA_MMA_LAYOUT_H

#ifdef __CUDACC__
#define MMA_INLINE __host__ __device__ static inline
#else
#define MMA_INLINE static inline
#endif

/* Element i of a lane's: of 8 of A [16,16], of 4 of B [16,8], of 4 of C [16,8]. */
MMA_INLINE int mma_a_row(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
MMA_INLINE int mma_a_column(int lane, int i) { return lane % 4 * 2 + i % 2 + i / 4 * 8; }
MMA_INLINE int mma_b_row(int lane, int i) { return lane % 4 * 2 + i % 2 + i / 2 * 8; }
MMA_INLINE int mma_b_column(int lane) { return lane / 4; }
MMA_INLINE int mma_c_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
MMA_INLINE int mma_c_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

#endif
