/* wide.h - private to kernels/: compile a loop for several vector widths and pick one at start.
 * The binary stays portable. Widths never change a result of outer.c: its loops are elementwise or
 * sum in lanes written out by hand, and -ffp-contract=off forbids a fused multiply-add at any
 * width. clang 14 lacks the attribute; sanitizers cannot run the resolver, which comes before they
 * start. tests/bitexact/ defines WIDE itself, to run each width wherever it likes. */
#ifndef INTELLECT_KERNELS_WIDE_H
#define INTELLECT_KERNELS_WIDE_H

#if defined(WIDE)
#elif defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) &&   \
    !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define WIDE __attribute__((noinline, target_clones("default", "avx2", "avx512f")))
#else
#define WIDE __attribute__((noinline))
#endif

#endif
