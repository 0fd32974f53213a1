/* choices.h - private to kernels/cuda/: which of cuBLASLt's algorithms won for a shape, kept on disk, so that
 * the same machine takes the same one at its next start: it need not be timed again, and the numbers stay
 * what they were.
 *
 * One text file for each version of cuBLASLt and name of a device, in $INTELLECT_CACHE (else
 * $XDG_CACHE_HOME/intellect,
 * ~/.cache/intellect; with none of these nothing is kept): `products-VERSION-DEVICE.txt`. Its first line
 * names both, then a line a shape, the last line is the CRC-32 of what is before. It is written to another
 * name and renamed; of two processes that write at once both keep what they chose, and for a shape that both
 * timed, the first. */
#ifndef INTELLECT_KERNELS_CUDA_CHOICES_H
#define INTELLECT_KERNELS_CUDA_CHOICES_H

#include <stddef.h>
#include <stdint.h>

#define CHOICES_MAX 1024 /* shapes of a file; those beyond are timed at each start */
#define CHOICES_WORDS 8  /* of a cublasLtMatmulAlgo_t, which may be stored for the same version */

/* All integers, so that two are equal where their bytes are. */
struct choice_key {
    int32_t m, n, k, transposed_a, transposed_b; /* cuBLASLt's m x n = op(a) * op(b), k between */
    int32_t bf16, wide; /* operands: bf16, else fp32; the result is fp32 in any case */
    int32_t alignment;                           /* of all three in bytes, at most 16 */
};

struct choices;

/* device: as the driver names it. why[160]: "" or why a file that was there is ignored. NULL: no memory. */
struct choices *choices_open(size_t version, const char *device, char why[160]);
void choices_close(struct choices *c);

/* True, and the algorithm, where the shape has one. */
int choices_find(const struct choices *c, const struct choice_key *key, uint64_t algorithm[CHOICES_WORDS]);

/* Keep what won; where another process was first, its choice comes back in `algorithm`. refused: what was
 * kept before and does not run, or NULL: that is replaced. A disk that cannot be written is nobody's error:
 * it is timed again. */
void choices_keep(struct choices *c, const struct choice_key *key, uint64_t algorithm[CHOICES_WORDS],
                  const uint64_t *refused, float us);

#endif
