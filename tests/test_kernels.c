/* test_kernels.c - the backends against vectors saved from PyTorch, and the fast ones against the
 * reference on odd shapes; CUDA's on the emulator of tests/cuda, or on a GPU. Gradients against finite
 * differences are in test_gradients.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <endian.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu.h"
#include "kernels/plugin.h"
#include "tests/cuda/staged.h"

/* An fp32 sum of n terms in any order is off by about sqrt(n) * 2^-24 of its terms' size, here at
 * most 3e-6; the rest is room for values that cancel. A wrong term is off by 1e-2. */
#define TOLERANCE 2e-5

static void assert_close(const char *what, const float *got, const float *want, size_t n) {
    float largest = 1e-3f;
    for (size_t i = 0; i < n; i++) largest = fmaxf(largest, fabsf(want[i]));
    for (size_t i = 0; i < n; i++)
        if (!(fabs((double)got[i] - want[i]) <= TOLERANCE * largest))
            fail_msg("%s[%zu] is %.9g, should be %.9g", what, i, (double)got[i], (double)want[i]);
}

/* A tensor of n values, about normal with the given size; the caller frees it. */
static float *draw(size_t n, float std) {
    static uint64_t seed = 1;
    float *x = malloc((n ? n : 1) * sizeof *x);
    assert_non_null(x);
    outer_init_normal(x, seed++, 0, n, std);
    return x;
}

static float *copy_of(const float *x, size_t n) {
    return memcpy(malloc(n * sizeof *x), x, n * sizeof *x);
}

/* What a kernel must overwrite holds NaN before. */
static float *unwritten(size_t n) {
    float *x = malloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = NAN;
    return x;
}

static struct kernels *cpu_with(int threads) {
    struct err err;
    struct kernels *k = kernels_cpu_create(threads, &err);
    if (!k) fail_msg("%s", err.msg);
    return k;
}

/* The CUDA kernels: on a GPU where `make gpu` runs this, else on the emulator. */
static struct kernels *cuda(void) {
    struct err err;
    struct kernels *k = getenv("INTELLECT_TEST_GPU")
                            ? kernels_cuda_create(0, sizeof(float), 0, &err)
                            : intellect_cuda_create(KERNELS_PLUGIN_ABI, 0, sizeof(float), 0, &err);
    if (!k) fail_msg("%s", err.msg);
    return staged_create(k);
}

static void finish(struct kernels *k) {
    struct err err;
    if (k->check(k, &err) != 0) fail_msg("%s", err.msg);
    k->destroy(k);
}

/* ---- PyTorch's vectors, tests/reference/make_kernel_vectors.py ---- */

enum { VB = 2, VT = 7, VH = 4, VKV = 2, VD = 6, VC = 24, VF = 10, VV = 13, VROWS = VB * VT };
enum { VQKV = VROWS * (VH + 2 * VKV) * VD, VOUT = VROWS * VH * VD };

static float vector_values[20000];
static struct {
    char name[32];
    const float *values;
    uint32_t n;
} vectors[64];
static size_t vector_count;

static int read_vectors(void **state) {
    (void)state;
    char path[4096];
    const char *folder = getenv("REFERENCE"); /* as `make test-reference` says */
    snprintf(path, sizeof path, "%s/kernel_vectors.bin", folder ? folder : "tests/reference");
    FILE *f = fopen(path, "rb");
    uint32_t n;
    float *to = vector_values;
    if (!f) return -1; /* tests run from the root of the tree */
    while (vector_count < 64 && fread(vectors[vector_count].name, 32, 1, f) == 1) {
        if (fread(&n, 4, 1, f) != 1) return -1;
        n = le32toh(n);
        if (fread(to, 4, n, f) != n) return -1;
        vectors[vector_count].values = to;
        vectors[vector_count++].n = n;
        to += n;
    }
    fclose(f);
    return 0;
}

static const float *vector(const char *name, size_t n) {
    for (size_t i = 0; i < vector_count; i++)
        if (strcmp(vectors[i].name, name) == 0) {
            assert_int_equal(vectors[i].n, n);
            return vectors[i].values;
        }
    fail_msg("no vector %s", name);
    return NULL;
}

static void ints_of(int32_t *out, const char *name, size_t n) {
    const float *x = vector(name, n);
    for (size_t i = 0; i < n; i++) out[i] = (int32_t)x[i];
}

static void matmul_like_pytorch(const struct kernels *k) {
    const float *x = vector("matmul.x", VROWS * VC), *w = vector("matmul.w", VF * VC);
    const float *dout = vector("matmul.dout", VROWS * VF);
    float out[VROWS * VF], dx[VROWS * VC], dw[VF * VC];
    k->matmul_forward(k, out, x, w, VROWS, VC, VF);
    k->matmul_backward_input(k, dx, dout, w, VROWS, VC, VF);
    k->matmul_backward_weight(k, dw, dout, x, VROWS, VC, VF, KERNELS_SET);
    assert_close("matmul.out", out, vector("matmul.out", VROWS * VF), VROWS * VF);
    assert_close("matmul.dx", dx, vector("matmul.dx", VROWS * VC), VROWS * VC);
    assert_close("matmul.dw", dw, vector("matmul.dw", VF * VC), VF * VC);
}

static void embedding_like_pytorch(const struct kernels *k) {
    int32_t tokens[VROWS];
    float out[VROWS * VC], dw[VV * VC] = { 0 };
    ints_of(tokens, "embedding.tokens", VROWS);
    k->embedding_forward(k, out, tokens, vector("embedding.w", VV * VC), VROWS, VC, VV);
    k->embedding_backward(k, dw, vector("embedding.dout", VROWS * VC), tokens, VROWS, VC, VV);
    assert_close("embedding.out", out, vector("embedding.out", VROWS * VC), VROWS * VC);
    assert_close("embedding.dw", dw, vector("embedding.dw", VV * VC), VV * VC);
}

static void rmsnorm_like_pytorch(const struct kernels *k) {
    const float *x = vector("rmsnorm.x", VROWS * VC), *w = vector("rmsnorm.w", VC);
    float out[VROWS * VC], rstd[VROWS], dx[VROWS * VC] = { 0 }, dw[VC] = { 0 };
    k->rmsnorm_forward(k, out, rstd, x, w, 1e-5f, VROWS, VC);
    k->rmsnorm_backward(k, dx, dw, vector("rmsnorm.dout", VROWS * VC), x, w, rstd, VROWS, VC);
    assert_close("rmsnorm.out", out, vector("rmsnorm.out", VROWS * VC), VROWS * VC);
    assert_close("rmsnorm.dx", dx, vector("rmsnorm.dx", VROWS * VC), VROWS * VC);
    assert_close("rmsnorm.dw", dw, vector("rmsnorm.dw", VC), VC);
}

/* Rotary embedding and attention as one chain, as the network runs them. */
static void attention_like_pytorch(const struct kernels *k) {
    float cosine[VT * VD / 2], sine[VT * VD / 2], qkv[VQKV], out[VOUT], lse[VB * VH * VT],
        dqkv[VQKV];
    kernels_rope_tables(cosine, sine, VT, VD, &(struct kernels_rope){ .theta = 500000.0 });
    memcpy(qkv, vector("attention.qkv", VQKV), sizeof qkv);
    k->rope_forward(k, qkv, cosine, sine, NULL, VB, VT, VH, VKV, VD);
    k->attention_forward(k, out, lse, qkv, NULL, VB, VT, VH, VKV, VD);
    k->attention_backward(k, dqkv, vector("attention.dout", VOUT), qkv, out, lse, NULL, VB, VT, VH,
                          VKV, VD);
    k->rope_backward(k, dqkv, cosine, sine, NULL, VB, VT, VH, VKV, VD);
    assert_close("attention.rotated", qkv, vector("attention.rotated", VQKV), VQKV);
    assert_close("attention.out", out, vector("attention.out", VOUT), VOUT);
    assert_close("attention.lse", lse, vector("attention.lse", VB * VH * VT), VB * VH * VT);
    assert_close("attention.dqkv", dqkv, vector("attention.dqkv", VQKV), VQKV);
}

static void swiglu_like_pytorch(const struct kernels *k) {
    const float *gate_up = vector("swiglu.gate_up", VROWS * 2 * VF);
    float out[VROWS * VF], dgate_up[VROWS * 2 * VF];
    k->swiglu_forward(k, out, gate_up, VROWS, VF);
    k->swiglu_backward(k, dgate_up, vector("swiglu.dout", VROWS * VF), gate_up, VROWS, VF);
    assert_close("swiglu.out", out, vector("swiglu.out", VROWS * VF), VROWS * VF);
    assert_close("swiglu.dgate_up", dgate_up, vector("swiglu.dgate_up", VROWS * 2 * VF),
                 VROWS * 2 * VF);
}

static void cross_entropy_like_pytorch(const struct kernels *k) {
    int32_t targets[VROWS];
    float logits[VROWS * VV], loss[VROWS], penalty[VROWS];
    struct kernels_loss how = { .grad_scale = 1.0f / (VROWS - 2) }; /* two are ignored */
    ints_of(targets, "cross_entropy.targets", VROWS);
    memcpy(logits, vector("cross_entropy.logits", VROWS * VV), sizeof logits);
    k->cross_entropy(k, loss, penalty, logits, logits, targets, &how, VROWS, VV);
    assert_close("cross_entropy.loss", loss, vector("cross_entropy.loss", VROWS), VROWS);
    assert_close("cross_entropy.dlogits", logits, vector("cross_entropy.dlogits", VROWS * VV),
                 VROWS * VV);
}

/* Three steps, with the clip factor folded in: gradients twice too large, halved. */
static void adamw_like_pytorch(const struct kernels *k) {
    float param[40], grad[40], m[40] = { 0 }, v[40] = { 0 };
    memcpy(param, vector("adamw.param", 40), sizeof param);
    for (int step = 0; step < 3; step++) {
        char name[32];
        snprintf(name, sizeof name, "adamw.grad%d", step);
        for (int i = 0; i < 40; i++) grad[i] = 2.0f * vector(name, 40)[i];
        struct kernels_adamw a = { .lr = 0.01f,
                                   .beta1 = 0.9f,
                                   .beta2 = 0.95f,
                                   .eps = 1e-8f,
                                   .weight_decay = 0.1f,
                                   .grad_scale = 0.5f,
                                   .m_correction = (float)(1.0 - pow(0.9, step + 1)),
                                   .v_correction = (float)(1.0 - pow(0.95, step + 1)) };
        k->adamw(k, param, NULL, grad, m, v, 40, &a);
    }
    assert_close("adamw.after", param, vector("adamw.after", 40), 40);
    assert_close("adamw.m", m, vector("adamw.m", 40), 40);
    assert_close("adamw.v", v, vector("adamw.v", 40), 40);
}

static void all_kernels_like_pytorch(const struct kernels *k) {
    matmul_like_pytorch(k);
    embedding_like_pytorch(k);
    rmsnorm_like_pytorch(k);
    attention_like_pytorch(k);
    swiglu_like_pytorch(k);
    cross_entropy_like_pytorch(k);
    adamw_like_pytorch(k);
}

static void reference_agrees_with_pytorch(void **state) {
    (void)state;
    all_kernels_like_pytorch(kernels_reference());
}

static void cpu_backend_agrees_with_pytorch(void **state) {
    (void)state;
    struct kernels *k = cpu_with(2);
    all_kernels_like_pytorch(k);
    finish(k);
}

/* The outer optimizer is "Nesterov as PyTorch writes it"; what bits it gives is test_outer.c's. */
static void outer_nesterov_agrees_with_pytorch(void **state) {
    (void)state;
    float anchor[40], momentum[40] = { 0 };
    memcpy(anchor, vector("nesterov.anchor", 40), sizeof anchor);
    for (int step = 0; step < 3; step++) {
        char name[32];
        snprintf(name, sizeof name, "nesterov.mean%d", step);
        outer_nesterov(anchor, momentum, vector(name, 40), 40, 0.7f, 0.9f);
    }
    assert_close("nesterov.after", anchor, vector("nesterov.after", 40), 40);
    assert_close("nesterov.momentum", momentum, vector("nesterov.momentum", 40), 40);
}

/* ---- the CPU backend against the reference ----
 * Shapes are odd on purpose: one row, one column, not a multiple of a vector or of a block, more
 * threads than work. */

static const struct kernels *ref;

static void compare_matmul(const struct kernels *k, int rows, int C, int OC) {
    size_t nx = (size_t)rows * C, nw = (size_t)OC * C, no = (size_t)rows * OC;
    float *x = draw(nx, 1), *w = draw(nw, 1), *dout = draw(no, 1);
    float *got = unwritten(no), *want = unwritten(no);
    k->matmul_forward(k, got, x, w, rows, C, OC);
    ref->matmul_forward(ref, want, x, w, rows, C, OC);
    assert_close("matmul out", got, want, no);
    float *dx = unwritten(nx), *dx_want = unwritten(nx);
    k->matmul_backward_input(k, dx, dout, w, rows, C, OC);
    ref->matmul_backward_input(ref, dx_want, dout, w, rows, C, OC);
    assert_close("matmul dx", dx, dx_want, nx);
    for (int add = 0; add <= 1; add++) {
        float *dw = add ? draw(nw, 1) : unwritten(nw), *dw_want = copy_of(dw, nw);
        enum kernels_write write = add ? KERNELS_ADD : KERNELS_SET;
        k->matmul_backward_weight(k, dw, dout, x, rows, C, OC, write);
        ref->matmul_backward_weight(ref, dw_want, dout, x, rows, C, OC, write);
        assert_close("matmul dw", dw, dw_want, nw);
        free(dw), free(dw_want);
    }
    free(dx), free(dx_want);
    free(x), free(w), free(dout), free(got), free(want);
}

static void compare_embedding(const struct kernels *k, int rows, int C, int V) {
    size_t n = (size_t)rows * C, nw = (size_t)V * C;
    int32_t *tokens = malloc((size_t)rows * sizeof *tokens);
    for (int r = 0; r < rows; r++) tokens[r] = (int32_t)((unsigned)r * 2654435761u % (unsigned)V);
    float *w = draw(nw, 1), *dout = draw(n, 1), *got = unwritten(n), *want = unwritten(n);
    float *dw = draw(nw, 1), *dw_want = copy_of(dw, nw);
    k->embedding_forward(k, got, tokens, w, rows, C, V);
    ref->embedding_forward(ref, want, tokens, w, rows, C, V);
    assert_memory_equal(got, want, n * sizeof *got);
    k->embedding_backward(k, dw, dout, tokens, rows, C, V);
    ref->embedding_backward(ref, dw_want, dout, tokens, rows, C, V);
    assert_memory_equal(dw, dw_want, nw * sizeof *dw); /* rows in order, so the same bits */
    free(tokens), free(w), free(dout), free(got), free(want), free(dw), free(dw_want);
}

static void compare_rmsnorm(const struct kernels *k, int rows, int C) {
    size_t n = (size_t)rows * C;
    float *x = draw(n, 3), *w = draw(C, 1), *dout = draw(n, 1), *out = unwritten(n);
    float *out_want = unwritten(n), *rstd = unwritten(rows), *rstd_want = unwritten(rows);
    float *dx = draw(n, 1), *dx_want = copy_of(dx, n), *dw = draw(C, 1), *dw_want = copy_of(dw, C);
    k->rmsnorm_forward(k, out, rstd, x, w, 1e-5f, rows, C);
    ref->rmsnorm_forward(ref, out_want, rstd_want, x, w, 1e-5f, rows, C);
    k->rmsnorm_backward(k, dx, dw, dout, x, w, rstd, rows, C);
    ref->rmsnorm_backward(ref, dx_want, dw_want, dout, x, w, rstd_want, rows, C);
    assert_close("rmsnorm out", out, out_want, n);
    assert_close("rmsnorm rstd", rstd, rstd_want, rows);
    assert_close("rmsnorm dx", dx, dx_want, n);
    assert_close("rmsnorm dw", dw, dw_want, C);
    free(x), free(w), free(dout), free(out), free(out_want), free(rstd), free(rstd_want);
    free(dx), free(dx_want), free(dw), free(dw_want);
}

/* Documents of 1, 2, 3, ... tokens, or one document: NULL. */
static int32_t *draw_starts(int documents, int B, int T) {
    if (!documents) return NULL;
    int32_t *start = malloc((size_t)B * T * sizeof *start);
    for (int b = 0; b < B; b++)
        for (int t = 0, first = 0, length = 1 + b; t < T; t++) {
            if (t - first == length) first = t, length += 1 + length / 3;
            start[(size_t)b * T + t] = first;
        }
    return start;
}

static void compare_rope(const struct kernels *k, int documents, int B, int T, int H, int KV, int D) {
    int32_t *start = draw_starts(documents, B, T);
    size_t n = (size_t)B * T * (H + 2 * KV) * D, angles = (size_t)T * D / 2;
    float *qkv = draw(n, 1), *want = copy_of(qkv, n);
    float *cosine = unwritten(angles), *sine = unwritten(angles);
    kernels_rope_tables(cosine, sine, T, D, &(struct kernels_rope){ .theta = 10000.0 });
    k->rope_forward(k, qkv, cosine, sine, start, B, T, H, KV, D);
    ref->rope_forward(ref, want, cosine, sine, start, B, T, H, KV, D);
    assert_close("rope forward", qkv, want, n);
    k->rope_backward(k, qkv, cosine, sine, start, B, T, H, KV, D);
    ref->rope_backward(ref, want, cosine, sine, start, B, T, H, KV, D);
    assert_close("rope backward", qkv, want, n);
    free(qkv), free(want), free(cosine), free(sine), free(start);
}

static void compare_attention(const struct kernels *k, int documents, int B, int T, int H, int KV, int D) {
    int32_t *start = draw_starts(documents, B, T);
    size_t n = (size_t)B * T * (H + 2 * KV) * D, no = (size_t)B * T * H * D, nl = (size_t)B * H * T;
    float *qkv = draw(n, 2), *dout = draw(no, 1);
    float *out = unwritten(no), *out_want = unwritten(no), *lse = unwritten(nl);
    float *lse_want = unwritten(nl), *dqkv = unwritten(n), *dqkv_want = unwritten(n);
    k->attention_forward(k, out, lse, qkv, start, B, T, H, KV, D);
    ref->attention_forward(ref, out_want, lse_want, qkv, start, B, T, H, KV, D);
    k->attention_backward(k, dqkv, dout, qkv, out, lse, start, B, T, H, KV, D);
    ref->attention_backward(ref, dqkv_want, dout, qkv, out_want, lse_want, start, B, T, H, KV, D);
    assert_close("attention out", out, out_want, no);
    assert_close("attention lse", lse, lse_want, nl);
    assert_close("attention dqkv", dqkv, dqkv_want, n);
    free(qkv), free(dout), free(out), free(out_want), free(lse), free(lse_want);
    free(dqkv), free(dqkv_want), free(start);
}

static void compare_swiglu(const struct kernels *k, int rows, int F) {
    size_t n = (size_t)rows * F;
    float *gate_up = draw(2 * n, 8), *dout = draw(n, 1), *out = unwritten(n), *want = unwritten(n);
    float *dgate_up = unwritten(2 * n), *dwant = unwritten(2 * n);
    gate_up[0] = -200.0f; /* where exp() over- and underflows */
    k->swiglu_forward(k, out, gate_up, rows, F);
    ref->swiglu_forward(ref, want, gate_up, rows, F);
    k->swiglu_backward(k, dgate_up, dout, gate_up, rows, F);
    ref->swiglu_backward(ref, dwant, dout, gate_up, rows, F);
    assert_close("swiglu out", out, want, n);
    assert_close("swiglu dgate_up", dgate_up, dwant, 2 * n);
    k->swiglu_backward(k, gate_up, dout, gate_up, rows, F);
    assert_memory_equal(gate_up, dgate_up, 2 * n * sizeof *gate_up);
    free(gate_up), free(dout), free(out), free(want), free(dgate_up), free(dwant);
}

static void compare_cross_entropy(const struct kernels *k, int rows, int V, float std, float z, float max_z) {
    size_t n = (size_t)rows * V;
    int32_t *targets = malloc((size_t)rows * sizeof *targets);
    for (int r = 0; r < rows; r++) targets[r] = r % 5 == 4 ? -1 : (r * 17 + V - 1) % V;
    float *logits = draw(n, std), *want = copy_of(logits, n);
    float *loss = unwritten(rows), *loss_want = unwritten(rows);
    float *penalty = unwritten(rows), *penalty_want = unwritten(rows);
    struct kernels_loss how = { .grad_scale = 0.25f, .z = z, .max_z = max_z };
    float *scratch = copy_of(logits, n), *loss_alone = unwritten(rows);
    k->cross_entropy(k, loss_alone, penalty, NULL, scratch, targets, &how, rows, V); /* no gradient */
    k->cross_entropy(k, loss, penalty, logits, logits, targets, &how, rows, V);
    ref->cross_entropy(ref, loss_want, penalty_want, want, want, targets, &how, rows, V);
    assert_memory_equal(loss, loss_alone, (size_t)rows * sizeof *loss);
    free(scratch), free(loss_alone);
    assert_close("cross_entropy loss", loss, loss_want, rows);
    assert_close("cross_entropy penalty", penalty, penalty_want, rows);
    assert_close("cross_entropy dlogits", logits, want, n);
    free(targets), free(logits), free(want), free(loss), free(loss_want), free(penalty), free(penalty_want);
}

/* The vocabulary in parts, each with its own logits, must come to what cross_entropy makes of the whole. */
static void compare_vocabulary(const struct kernels *k, int rows, int V, int parts, float std,
                               const struct kernels_loss *how) {
    size_t n = (size_t)rows * V, own = n / parts;
    int W = V / parts;
    int32_t *targets = malloc((size_t)rows * sizeof *targets), *local = malloc((size_t)rows * sizeof *local);
    for (int r = 0; r < rows; r++) targets[r] = r % 5 == 4 ? -1 : (r * 17 + V - 1) % V;
    float *want = draw(n, std), *loss_want = unwritten(rows), *penalty_want = unwritten(rows);
    want[V / 2] = want[V - 1] = 5 * std; /* the same largest in two parts: the first has its gradient */
    float *piece = malloc(n * sizeof *piece), *loss = unwritten(rows), *penalty = unwritten(rows);
    struct kernels_part *part = malloc((size_t)parts * rows * sizeof *part);
    for (int p = 0; p < parts; p++)
        for (int r = 0; r < rows; r++)
            memcpy(piece + p * own + (size_t)r * W, want + (size_t)r * V + p * W, (size_t)W * sizeof *piece);
    ref->cross_entropy(ref, loss_want, penalty_want, want, want, targets, how, rows, V);
    for (int pass = 0; pass < 2; pass++)
        for (int p = 0; p < parts; p++) {
            for (int r = 0; r < rows; r++)
                local[r] = targets[r] < 0 ? -1 : targets[r] / W == p ? targets[r] % W : KERNELS_ELSEWHERE;
            if (pass == 0) k->vocabulary_part(k, part + (size_t)p * rows, piece + p * own, local, rows, W);
            else k->vocabulary_loss(k, loss, penalty, piece + p * own, piece + p * own, local, part, p, parts, how, rows,
                                    W);
            if (pass == 1) assert_close("vocabulary loss", loss, loss_want, rows);
            if (pass == 1) assert_close("vocabulary penalty", penalty, penalty_want, rows);
        }
    float *got = malloc(n * sizeof *got);
    for (int p = 0; p < parts; p++)
        for (int r = 0; r < rows; r++)
            memcpy(got + (size_t)r * V + p * W, piece + p * own + (size_t)r * W, (size_t)W * sizeof *got);
    assert_close("vocabulary dlogits", got, want, n);
    free(targets), free(local), free(want), free(loss_want), free(penalty_want), free(piece), free(loss);
    free(penalty), free(part), free(got);
}

static void a_vocabulary_in_parts_gives_the_loss_of_the_whole(void **state) {
    (void)state;
    struct err err = { 0 };
    struct kernels *cpu = kernels_cpu_create(2, &err);
    struct kernels *device = cuda();
    const struct kernels *all[] = { kernels_reference(), cpu, device };
    const struct kernels_loss how = { .grad_scale = 0.25f, .z = 1e-2f, .max_z = 2e-2f };
    for (int i = 0; i < 3; i++)
        for (int parts = 1; parts <= 8; parts *= 2) {
            compare_vocabulary(all[i], 9, 48, parts, 4.0f, &how);
            compare_vocabulary(all[i], 7, 40000, parts, 30.0f, &how);
        }
    finish(cpu);
    finish(device);
}

/* A word of another part: a row of zeroes, and no gradient. */
static void a_token_of_another_part_is_a_row_of_zeroes(void **state) {
    (void)state;
    struct err err = { 0 };
    struct kernels *cpu = kernels_cpu_create(1, &err), *bf16 = kernels_cpu_bf16_create(1, 0, &err);
    struct kernels *device = cuda();
    const struct kernels *all[] = { kernels_reference(), cpu, bf16, device };
    const int32_t tokens[] = { 1, KERNELS_ELSEWHERE, 0 };
    const float dout[6] = { 1, 2, 4, 8, 16, 32 }, host[4] = { 1, 2, 3, 4 };
    for (int i = 0; i < 4; i++) {
        float w[4], out[6], dw[4] = { 0 };
        uint16_t rest[4];
        all[i]->weights_in(all[i], w, all[i]->rest_bytes ? rest : NULL, host, 4);
        all[i]->embedding_forward(all[i], out, tokens, w, 3, 2, 2);
        all[i]->embedding_backward(all[i], dw, dout, tokens, 3, 2, 2);
        assert_memory_equal(out, ((float[]){ 3, 4, 0, 0, 1, 2 }), sizeof out);
        assert_memory_equal(dw, ((float[]){ 16, 32, 1, 2 }), sizeof dw);
    }
    finish(cpu);
    finish(bf16);
    finish(device);
}

static void compare_elementwise(const struct kernels *k, size_t n) {
    float *a = draw(n, 1), *b = draw(n, 1), *out = copy_of(a, n), *v = draw(n, 1);
    k->add(k, out, out, b, n); /* in place */
    k->round(k, out, out, n); /* nothing, in fp32 */
    for (size_t i = 0; i < n; i++) assert_true(out[i] == a[i] + b[i]);
    k->round(k, v, b, n);
    assert_memory_equal(v, b, n * sizeof *v);
    for (size_t i = 0; i < n; i++) v[i] *= v[i];
    struct kernels_adamw step = { .lr = 0.01f,
                                  .beta1 = 0.9f,
                                  .beta2 = 0.95f,
                                  .eps = 1e-8f,
                                  .weight_decay = 0.1f,
                                  .m_correction = 0.19f,
                                  .v_correction = 0.0975f,
                                  .grad_scale = 0.5f };
    float *p = copy_of(out, n), *m = copy_of(b, n), *v_want = copy_of(v, n),
          *m_want = copy_of(b, n);
    k->adamw(k, p, NULL, a, m, v, n, &step);
    ref->adamw(ref, out, NULL, a, m_want, v_want, n, &step);
    assert_close("adamw param", p, out, n);
    assert_close("adamw m", m, m_want, n);
    assert_close("adamw v", v, v_want, n);
    const struct kernels_descent d = { .step = 0.3f, .keep = 0.9f };
    k->descend(k, p, NULL, a, n, &d);
    ref->descend(ref, out, NULL, a, n, &d);
    assert_close("descend", p, out, n);
    k->combine(k, p, 0.7f, p, -2, b, n); /* in place */
    ref->combine(ref, out, 0.7f, out, -2, b, n);
    assert_close("combine", p, out, n);
    double got = k->sum_squares(k, a, n), want = ref->sum_squares(ref, a, n);
    assert_true(fabs(got - want) <= 1e-12 * want);
    free(a), free(b), free(out), free(v), free(p), free(m), free(v_want), free(m_want);
}

/* Sizes from 1 to 1e-8 side by side, some of them zero. */
static float *moments(size_t n, enum kernels_state how) {
    float *x = draw(n, 1);
    for (size_t i = 0; i < n; i++) {
        x[i] *= i % 13 == 5 ? 0 : powf(10, -(float)(i % 9));
        if (how == KERNELS_STATE_ROOT8) x[i] *= x[i];
    }
    return x;
}

/* The same bytes from every backend, to nearest and not; and what was saved goes back as it was. */
static void compare_states(const struct kernels *k, size_t n) {
    for (enum kernels_state how = KERNELS_STATE_BF16; how <= KERNELS_STATE_ROOT8; how++) {
        size_t bytes = kernels_state_bytes(how, n);
        float *x = moments(n, how), *got = unwritten(n), *want = unwritten(n);
        uint8_t *a = calloc(bytes, 1), *b = calloc(bytes, 1);
        for (uint64_t seed = 0; seed < 3; seed++) {
            k->state_in(k, a, how, x, n, seed, 77);
            ref->state_in(ref, b, how, x, n, seed, 77);
            assert_memory_equal(a, b, bytes);
            k->state_out(k, got, a, how, n);
            ref->state_out(ref, want, b, how, n);
            assert_memory_equal(got, want, n * sizeof *got);
            k->state_in(k, a, how, got, n, 0, 0); /* perhaps in another unit */
            k->state_out(k, got, a, how, n);
            assert_memory_equal(got, want, n * sizeof *got);
        }
        free(x), free(got), free(want), free(a), free(b);
    }
}

static void compare_on_odd_shapes(struct kernels *k) {
    static const int shape[][3] = { { 1, 1, 1 }, { 1, 64, 3 }, { 37, 19, 1 }, { 129, 65, 130 },
                                    { 140, 1, 200 },   { 1030, 20, 30 } };
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++) {
        const int *s = shape[i];
        compare_matmul(k, s[0], s[1], s[2]);
        compare_embedding(k, s[0], s[1], s[2]);
        compare_rmsnorm(k, s[0], s[1]);
        compare_swiglu(k, s[0], s[1]);
        compare_cross_entropy(k, s[0], s[2], 4.0f, 0, 0);
        compare_cross_entropy(k, s[0], s[2], 4.0f, 1e-2f, 0);
        compare_cross_entropy(k, s[0], s[2], 4.0f, 0, 2e-2f);
        compare_elementwise(k, (size_t)s[0] * s[1] * s[2]);
        size_t n = (size_t)s[0] * s[1] * s[2];
        compare_states(k, n < 20011 ? n : 20011); /* more than two slices; the emulator takes its time */
    }
    finish(k);
}

static void cpu_backend_agrees_with_the_reference_on_odd_shapes(void **state) {
    (void)state;
    for (int threads = 1; threads <= 4; threads++) {
        struct kernels *k = cpu_with(threads);
        cpu_of(k)->plain = threads == 4; /* without AVX-512 */
        compare_on_odd_shapes(k);
    }
}

static void cuda_backend_agrees_with_the_reference_on_odd_shapes(void **state) {
    (void)state;
    compare_on_odd_shapes(cuda());
}

/* One token; a group of one and of all heads; one below, at and one above the block of 64 queries;
 * a short sequence after a long one, which reuses a scratch that is larger than it needs. */
static void compare_attention_on_odd_shapes(struct kernels *k) {
    static const int shape[][5] = { { 1, 1, 1, 1, 2 },   { 2, 63, 4, 2, 6 },   { 1, 64, 2, 2, 16 },
                                    { 3, 65, 3, 1, 10 }, { 1, 130, 4, 2, 32 }, { 2, 5, 6, 3, 4 },
                                    { 3, 150, 4, 2, 16 } };
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++) {
        const int *s = shape[i];
        for (int documents = 0; documents <= 1; documents++) {
            compare_attention(k, documents, s[0], s[1], s[2], s[3], s[4]);
            compare_rope(k, documents, s[0], s[1], s[2], s[3], s[4]);
        }
    }
    finish(k);
}

static void cpu_attention_agrees_with_the_reference_on_odd_shapes(void **state) {
    (void)state;
    for (int i = 0; i < 4; i++) {
        struct kernels *k = cpu_with(i % 2 ? 3 : 1); /* the last shape is worth threads */
        cpu_of(k)->plain = i / 2;          /* without AVX-512 */
        compare_attention_on_odd_shapes(k);
    }
}

/* Heads of more than 64 and of more than 128 values have kernels of their own. */
static void cuda_attention_agrees_with_the_reference_on_odd_shapes(void **state) {
    (void)state;
    compare_attention_on_odd_shapes(cuda());
    struct kernels *k = cuda();
    compare_attention(k, 1, 1, 40, 2, 1, 66);
    compare_attention(k, 0, 1, 33, 2, 1, 128);
    compare_attention(k, 1, 1, 40, 1, 1, 130);
    compare_attention(k, 0, 1, 33, 1, 1, 256);
    finish(k);
}

/* A document in the middle of a sequence gives the bits that it gives alone; on the CPU backend,
 * which then cuts its blocks of queries elsewhere, what is near them (above). */
static void a_document_is_computed_as_if_it_stood_alone(void **state) {
    (void)state;
    enum { T = 12, H = 4, KV = 2, D = 6, AT = 5, N = 4, ROW = (H + 2 * KV) * D };
    static const int32_t start[T] = { 0, 0, 0, 0, 0, 5, 5, 5, 5, 9, 9, 9 };
    float *qkv = draw(T * ROW, 2), *alone = copy_of(qkv + AT * ROW, N * ROW);
    float *dout = draw(T * H * D, 1), *cosine = unwritten(T * D / 2), *sine = unwritten(T * D / 2);
    float out[T * H * D], lse[H * T], dqkv[T * ROW], alone_out[N * H * D], alone_lse[H * N], alone_dqkv[N * ROW];
    kernels_rope_tables(cosine, sine, T, D, &(struct kernels_rope){ .theta = 100 });
    ref->rope_forward(ref, qkv, cosine, sine, start, 1, T, H, KV, D);
    ref->rope_forward(ref, alone, cosine, sine, NULL, 1, N, H, KV, D);
    ref->attention_forward(ref, out, lse, qkv, start, 1, T, H, KV, D);
    ref->attention_forward(ref, alone_out, alone_lse, alone, NULL, 1, N, H, KV, D);
    ref->attention_backward(ref, dqkv, dout, qkv, out, lse, start, 1, T, H, KV, D);
    ref->attention_backward(ref, alone_dqkv, dout + AT * H * D, alone, alone_out, alone_lse, NULL, 1, N, H, KV, D);
    assert_memory_equal(qkv + AT * ROW, alone, N * ROW * sizeof *qkv);
    assert_memory_equal(out + AT * H * D, alone_out, sizeof alone_out);
    assert_memory_equal(dqkv + AT * ROW, alone_dqkv, sizeof alone_dqkv);
    free(qkv), free(alone), free(dout), free(cosine), free(sine);
}

/* The backend's own exponential, seen through silu(gate) * 1: a few units in the last place over
 * the whole range, which a tolerance relative to the largest element would not show. */
static void exponential_is_accurate_everywhere(void **state) {
    (void)state;
    struct kernels *k = cpu_with(1);
    for (int i = 0; i < 80000; i++) {
        float gate_up[2] = { (float)(i / 2) * 0.004f - 80.0f, 1.0f }, got, want;
        cpu_of(k)->plain = i % 2;
        k->swiglu_forward(k, &got, gate_up, 1, 1);
        ref->swiglu_forward(ref, &want, gate_up, 1, 1);
        assert_true(fabsf(got - want) <= 5e-7f * fabsf(want));
    }
    finish(k);
}

/* Clamps and Newton's step in the exponential must neither hide a number that is none nor make one: a step would
 * go on with it, or stop a healthy run. */
static void swiglu_passes_on_what_is_no_number_and_makes_none(void **state) {
    (void)state;
    static const float gate[] = { -1e6f, -1e4f, -88.5f, 1e4f, 3e38f };
    struct kernels *k = cpu_with(1);
    for (int plain = 0; plain <= 1; plain++) {
        float none[2] = { NAN, 1.0f }, out, dgate_up[2], dout = 1.0f;
        cpu_of(k)->plain = plain;
        k->swiglu_forward(k, &out, none, 1, 1);
        k->swiglu_backward(k, dgate_up, &dout, none, 1, 1);
        assert_true(isnan(out) && isnan(dgate_up[0]) && isnan(dgate_up[1]));
        for (size_t i = 0; i < sizeof gate / sizeof *gate; i++) {
            float gate_up[2] = { gate[i], 1.0f };
            k->swiglu_forward(k, &out, gate_up, 1, 1);
            k->swiglu_backward(k, dgate_up, &dout, gate_up, 1, 1);
            assert_true(gate[i] > 0 ? out == gate[i] : fabsf(out) < 1e-30f);
            assert_true(isfinite(dgate_up[0]) && isfinite(dgate_up[1]));
        }
    }
    finish(k);
}

/* Sizes at which the backend really starts threads (elements from some 400,000, exponentials
 * 50,000). */
static void cpu_backend_agrees_with_the_reference_on_large_shapes(void **state) {
    (void)state;
    struct kernels *k = cpu_with(2);
    compare_embedding(k, 3000, 150, 11);
    compare_rmsnorm(k, 3001, 150);
    compare_rope(k, 0, 2, 1500, 3, 1, 34);
    compare_swiglu(k, 301, 333);
    compare_cross_entropy(k, 9, 50021, 4.0f, 1e-4f, 2e-4f);
    compare_cross_entropy(k, 9, 50021, 1000.0f, 0, 0); /* a diverged model: exp() must not overflow */
    compare_elementwise(k, 500001);
    finish(k);
}

/* A second moment with beta2 0.999 loses a thousandth a step, a hundredth of the distance between two
 * codes: it must be lost on average. Bounds: six standard errors of the mean of 4096 roundings. */
static void moments_are_rounded_without_a_bias(void **state) {
    (void)state;
    enum { N = KERNELS_STATE_BLOCK, TIMES = 4096 };
    struct kernels *k = cpu_with(1);
    for (enum kernels_state how = KERNELS_STATE_BF16; how <= KERNELS_STATE_ROOT8; how++) {
        float *x = moments(N, how), *back = unwritten(N), most = 0;
        uint8_t *kept = calloc(kernels_state_bytes(how, N), 1);
        double sum[N] = { 0 };
        for (int i = 0; i < N; i++) most = fmaxf(most, fabsf(x[i]));
        for (uint64_t seed = 1; seed <= TIMES; seed++) {
            k->state_in(k, kept, how, x, N, seed, 0);
            k->state_out(k, back, kept, how, N);
            for (int i = 0; i < N; i++) sum[i] += (double)back[i];
        }
        static const double apart[] = { 0, 1.0 / 128, 1.0 / 16, 1.0 / 7 }; /* neighbours, of their size */
        double coarse = apart[how], least = how == KERNELS_STATE_SIGNED8 ? most / 992.0
                                            : how == KERNELS_STATE_ROOT8 ? 31.0 * most / pow(253952, 2) : 0;
        for (int i = 0; i < N; i++) {
            double step = fmax(fabs((double)x[i]) * coarse, least);
            if (!(fabs(sum[i] / TIMES - (double)x[i]) <= 6 * step / 2 / sqrt(TIMES)))
                fail_msg("kept as %d, %g is %g on average", how, (double)x[i], sum[i] / TIMES);
        }
        free(x), free(back), free(kept);
    }
    finish(k);
}

/* Rows whose number is no multiple of the parts that they are summed in, enough for threads. */
static void a_norms_gradient_has_the_same_bits_for_every_thread_count(void **state) {
    (void)state;
    enum { ROWS = 4099, C = 130, N = ROWS * C };
    struct kernels *backend[] = { cpu_with(1), cpu_with(3) };
    float *x = draw(N, 1), *dout = draw(N, 1), *w = draw(C, 1), *out = unwritten(N), *rstd = unwritten(ROWS);
    float *dx[2], dw[2][C] = { { 0 } };
    for (int i = 0; i < 2; i++) {
        const struct kernels *k = backend[i];
        dx[i] = copy_of(dout, N);
        k->rmsnorm_forward(k, out, rstd, x, w, 1e-5f, ROWS, C);
        k->rmsnorm_backward(k, dx[i], dw[i], dout, x, w, rstd, ROWS, C);
        finish(backend[i]);
    }
    assert_memory_equal(dx[0], dx[1], N * sizeof(float));
    assert_memory_equal(dw[0], dw[1], sizeof dw[0]);
    free(x), free(dout), free(w), free(out), free(rstd), free(dx[0]), free(dx[1]);
}

/* Gradient clipping must not depend on how many cores a member has. */
static void sum_of_squares_has_the_same_bits_for_every_thread_count(void **state) {
    (void)state;
    size_t n = 1000003;
    float *x = draw(n, 1);
    struct kernels *one = cpu_with(1), *three = cpu_with(3);
    double a = one->sum_squares(one, x, n), b = three->sum_squares(three, x, n);
    assert_memory_equal(&a, &b, sizeof a);
    finish(one);
    finish(three);
    free(x);
}

/* A lost gradient must show in the norm, whichever element it hides in. */
static void sum_of_squares_is_not_finite_when_an_element_is_not(void **state) {
    (void)state;
    struct kernels *k = cpu_with(1);
    float *x = draw(1000, 1);
    static const float bad[] = { NAN, INFINITY, -INFINITY };
    for (int i = 0; i < 3; i++) {
        float kept = x[997];
        x[997] = bad[i];
        assert_false(isfinite(k->sum_squares(k, x, 1000)));
        assert_false(isfinite(ref->sum_squares(ref, x, 1000)));
        x[997] = kept;
    }
    assert_true(isfinite(k->sum_squares(k, x, 1000)));
    finish(k);
    free(x);
}

/* A NaN in the network must reach the loss and not be hidden by a maximum or a clamp. */
static void a_nan_logit_gives_a_nan_loss(void **state) {
    (void)state;
    struct kernels *k = cpu_with(1);
    for (int at = 0; at < 40; at++) {
        float *logits = draw(40, 1), loss, penalty;
        logits[at] = NAN;
        k->cross_entropy(k, &loss, &penalty, logits, logits, &(int32_t){ 7 },
                         &(struct kernels_loss){ .grad_scale = 1 }, 1, 40);
        assert_true(isnan(loss));
        free(logits);
    }
    finish(k);
}

static void memory_is_zeroed_and_aligned_and_a_refusal_is_an_error(void **state) {
    (void)state;
    const struct kernels *k = ref;
    struct err err = { 0 };
    float *x = k->alloc(k, 100 * sizeof *x, &err), host[100], back[100];
    assert_non_null(x);
    assert_int_equal((uintptr_t)x % 64, 0);
    for (int i = 0; i < 100; i++) {
        assert_true(x[i] == 0.0f);
        host[i] = (float)i;
    }
    k->copy_in(k, x, host, sizeof host);
    k->copy_out(k, back, x, sizeof back);
    assert_memory_equal(host, back, sizeof host);
    k->zero(k, x, sizeof host);
    assert_true(x[99] == 0.0f);
    k->free(k, x);
    k->free(k, NULL);
    assert_null(k->alloc(k, SIZE_MAX, &err));
    assert_int_equal(err.code, ERR_MEMORY);
}

static void whole_numbers(float *x, size_t n, int most) {
    for (size_t i = 0; i < n; i++) x[i] = (float)((int)(i * 2654435761u >> 8) % (2 * most + 1) - most);
}

/* Sums of whole numbers under 2^24 are exact in any order; but not where a library takes fewer bits of each factor, as
 * TF32 does of those over 2^11. */
static void compare_whole_numbers(struct kernels *k, int rows, int C, int OC) {
    size_t nx = (size_t)rows * C, nw = (size_t)OC * C, no = (size_t)rows * OC;
    float *x = malloc(nx * sizeof *x), *w = malloc(nw * sizeof *w), *d = malloc(no * sizeof *d);
    whole_numbers(x, nx, 4095);
    whole_numbers(w, nw, 3);
    whole_numbers(d, no, 3);
    for (int what = 0; what < 3; what++) {
        size_t n = what == 0 ? no : what == 1 ? nx : nw;
        float *got = unwritten(n), *want = unwritten(n);
        for (int i = 0; i < 2; i++) {
            const struct kernels *b = i ? ref : k;
            float *to = i ? want : got;
            if (what == 0) b->matmul_forward(b, to, x, w, rows, C, OC);
            if (what == 1) b->matmul_backward_input(b, to, d, w, rows, C, OC);
            if (what == 2) b->matmul_backward_weight(b, to, d, x, rows, C, OC, KERNELS_SET);
        }
        assert_memory_equal(got, want, n * sizeof *got);
        free(got), free(want);
    }
    free(x), free(w), free(d);
}

static void products_of_whole_numbers_are_exact(void **state) {
    (void)state;
    static const int shapes[][3] = { { 1, 1, 1 }, { 33, 65, 17 }, { 128, 256, 64 }, { 7, 300, 129 }, { 64, 8, 200 },
                                     { 257, 96, 31 } };
    for (int backend = 0; backend < 2; backend++) {
        struct kernels *k = backend ? cuda() : cpu_with(2);
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
            compare_whole_numbers(k, shapes[i][0], shapes[i][1], shapes[i][2]);
        finish(k);
    }
}

int main(void) {
    ref = kernels_reference();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reference_agrees_with_pytorch),
        cmocka_unit_test(cpu_backend_agrees_with_pytorch),
        cmocka_unit_test(outer_nesterov_agrees_with_pytorch),
        cmocka_unit_test(cpu_backend_agrees_with_the_reference_on_odd_shapes),
        cmocka_unit_test(cpu_attention_agrees_with_the_reference_on_odd_shapes),
        cmocka_unit_test(cuda_backend_agrees_with_the_reference_on_odd_shapes),
        cmocka_unit_test(cuda_attention_agrees_with_the_reference_on_odd_shapes),
        cmocka_unit_test(a_document_is_computed_as_if_it_stood_alone),
        cmocka_unit_test(products_of_whole_numbers_are_exact),
        cmocka_unit_test(exponential_is_accurate_everywhere),
        cmocka_unit_test(cpu_backend_agrees_with_the_reference_on_large_shapes),
        cmocka_unit_test(moments_are_rounded_without_a_bias),
        cmocka_unit_test(swiglu_passes_on_what_is_no_number_and_makes_none),
        cmocka_unit_test(a_norms_gradient_has_the_same_bits_for_every_thread_count),
        cmocka_unit_test(sum_of_squares_has_the_same_bits_for_every_thread_count),
        cmocka_unit_test(sum_of_squares_is_not_finite_when_an_element_is_not),
        cmocka_unit_test(a_nan_logit_gives_a_nan_loss),
        cmocka_unit_test(a_vocabulary_in_parts_gives_the_loss_of_the_whole),
        cmocka_unit_test(a_token_of_another_part_is_a_row_of_zeroes),
        cmocka_unit_test(memory_is_zeroed_and_aligned_and_a_refusal_is_an_error),
    };
    return cmocka_run_group_tests(tests, read_vectors, NULL);
}
