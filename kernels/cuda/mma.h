/* mma.h - private to kernels/cuda/: products of bf16 on tensor cores, a warp's 16 x 8 of fp32 += 16 x 16
 * times 16 x 8, how its operands come from tiles in shared memory, for which all lanes of the warp call, and how
 * the tiles come there.
 *
 * What of a product a lane has is in mma_layout.h. Of two in a register the first is the lower half. */
#ifndef INTELLECT_KERNELS_CUDA_MMA_H
#define INTELLECT_KERNELS_CUDA_MMA_H

#include "kernels/cuda/cuda.h"
#include "kernels/cuda/mma_layout.h"

#ifdef __CUDACC__
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Four matrices of 8 x 8: lanes 8i to 8i + 7 hand in the rows of matrix i, of 16 bytes each; a lane gets, of
 * each, of row lane / 4 the elements lane % 4 * 2 and the next; transposed: of that column those rows. */
template <bool TRANSPOSED> __device__ inline void ldmatrix(uint32_t (&to)[4], const uint16_t *row) {
    unsigned at = (unsigned)__cvta_generic_to_shared(row);
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(at)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(at)
                     : "memory");
}
#else
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    uint32_t mine[6] = { a[0], a[1], a[2], a[3], b0, b1 };
    emulator_mma(c, mine);
}
template <bool TRANSPOSED> inline void ldmatrix(uint32_t (&to)[4], const uint16_t *row) {
    CHECK_ALIGNED(row, 16);
    emulator_ldmatrix(to, row, TRANSPOSED);
}
#endif

/* ---- tiles on their way ------------------------------------------------------------------------------- */

/* cp.async: 16 bytes from global to shared memory past the registers, both aligned to 16; zeroes, and nothing is
 * read, where they are not `there`. What the calling thread began is there for itself after tiles_wait(), for others
 * after a barrier behind that. */
#ifdef __CUDACC__
__device__ inline void tile_begin(uint16_t *to, const uint16_t *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"((unsigned)__cvta_generic_to_shared(to)), "l"(__cvta_generic_to_global(from)),
                   "r"(there ? 16 : 0)
                 : "memory");
}
__device__ inline void tiles_wait(void) { asm volatile("cp.async.wait_all;" : : : "memory"); }
#else
inline void tile_begin(uint16_t *to, const uint16_t *from, bool there) {
    CHECK_ALIGNED(to, 16);
    CHECK_ALIGNED(from, 16);
    emulator_copy(to, there ? from : NULL, 16);
}
inline void tiles_wait(void) { emulator_copies_wait(); }
#endif

/* ---- operands from tiles whose rows are `apart` elements apart, aligned to 16 bytes -------------------- */

/* A: the 16 x 16 at `tile`. */
__device__ inline void mma_take_a(uint32_t (&a)[4], const uint16_t *tile, int apart) {
    int lane = (int)threadIdx.x % CUDA_WARP;
    ldmatrix<false>(a, tile + lane % 16 * apart + lane / 16 * 8);
}

/* Two B side by side, 16 x 16, of which the tile has the transposed: its rows are B's columns. b[0], b[1] are
 * the first's. */
__device__ inline void mma_take_b_of_rows(uint32_t (&b)[4], const uint16_t *tile, int apart) {
    int lane = (int)threadIdx.x % CUDA_WARP;
    ldmatrix<false>(b, tile + (lane / 16 * 8 + lane % 8) * apart + lane / 8 % 2 * 8);
}

/* The same of the 16 x 16 at `tile` itself. */
__device__ inline void mma_take_b(uint32_t (&b)[4], const uint16_t *tile, int apart) {
    int lane = (int)threadIdx.x % CUDA_WARP;
    ldmatrix<true>(b, tile + (lane / 8 % 2 * 8 + lane % 8) * apart + lane / 16 * 8);
}

__device__ inline uint32_t mma_pair(float first, float second) {
    return (uint32_t)bf16_nearest(first) | (uint32_t)bf16_nearest(second) << 16;
}

/* A of two C side by side, rounded: a lane has what it needs. */
__device__ inline void mma_a_of(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = mma_pair(left[0], left[1]);
    a[1] = mma_pair(left[2], left[3]);
    a[2] = mma_pair(right[0], right[1]);
    a[3] = mma_pair(right[2], right[3]);
}

#endif
