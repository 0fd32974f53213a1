/* cpu_vocabulary.c - the CPU backend's cross-entropy where each rank has the logits of a part of the
 * vocabulary: what each row's part comes to, and, once all parts are known, loss and gradient. */
#include "kernels/bf16.h"
#include "kernels/cpu.h"

#include <assert.h>
#include <math.h>

#define STEP 4096 /* a large part: sums of so many in float, their sum in double */

WIDE static float row_max(const float *x, int n) {
    return cpu_max(x, n);
}

WIDE static float sum_exp(const float *x, float max, int n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += cpu_exp(x[i] - max);
    return sum;
}

WIDE static void scaled_exp(float *x, float max, float factor, int n) {
#pragma omp simd
    for (int i = 0; i < n; i++) x[i] = cpu_exp(x[i] - max) * factor;
}

WIDE static void narrow(uint16_t *out, const float *x, int n) {
#pragma omp simd
    for (int i = 0; i < n; i++) out[i] = bf16_nearest(x[i]);
}

static int first_of(const float *x, float max, int n) {
    for (int i = 0; i < n; i++)
        if (x[i] == max) return i;
    return 0;
}

void cpu_vocabulary_part(const struct kernels *k, struct kernels_part *part, const float *logits,
                         const int32_t *targets, int rows, int V) {
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT_EXP((size_t)rows * V))
    for (int r = 0; r < rows; r++) {
        const float *row = logits + (size_t)r * V;
        assert(targets[r] >= KERNELS_ELSEWHERE && targets[r] < V);
        double sum = 0.0;
        part[r] = (struct kernels_part){ .max = row_max(row, V) };
        part[r].target = targets[r] >= 0 ? row[targets[r]] : -INFINITY;
        part[r].largest = (float)first_of(row, part[r].max, V);
        for (int v = 0; v < V; v += STEP) sum += sum_exp(row + v, part[r].max, V - v < STEP ? V - v : STEP);
        part[r].sum = (float)sum;
    }
}

/* All parts of one row; `first` is the one that has the largest logit of all, the first of equals. */
struct whole {
    double lse, sum; /* sum: of exponentials, with `max` taken off */
    float max, target;
    int first;
};

static struct whole join(const struct kernels_part *part, int parts, int rows, int r) {
    struct whole w = { .max = part[r].max, .target = -INFINITY };
    for (int p = 1; p < parts; p++)
        if (part[(size_t)p * rows + r].max > w.max) {
            w.max = part[(size_t)p * rows + r].max;
            w.first = p;
        }
    for (int p = 0; p < parts; p++) {
        const struct kernels_part *x = &part[(size_t)p * rows + r];
        w.sum += x->sum * exp((double)x->max - w.max);
        if (x->target > w.target) w.target = x->target;
    }
    /* cppcheck-suppress invalidFunctionArg ; the largest logit alone makes the sum 1 */
    w.lse = log(w.sum) + w.max;
    return w;
}

/* Activations of row r: logits [V] as they come, rounded where they are bf16. */
static void store(const struct kernels *k, void *dlogits, const float *row, int r, int V) {
    size_t at = (size_t)r * V;
    if (k->act_bytes == 2) narrow((uint16_t *)dlogits + at, row, V);
    else if ((float *)dlogits + at != row) memcpy((float *)dlogits + at, row, (size_t)V * sizeof *row);
}

void cpu_vocabulary_loss(const struct kernels *k, float *loss, float *penalty, void *dlogits, float *logits,
                         const int32_t *targets, const struct kernels_part *part, int own, int parts,
                         const struct kernels_loss *how, int rows, int V) {
#pragma omp parallel for num_threads(cpu_of(k)->threads) if (CPU_WORTH_IT_EXP((size_t)rows * V))
    for (int r = 0; r < rows; r++) {
        float *row = logits + (size_t)r * V;
        if (targets[r] == -1) {
            loss[r] = penalty[r] = 0.0f;
            if (dlogits) memset((char *)dlogits + (size_t)r * V * k->act_bytes, 0, (size_t)V * k->act_bytes);
            continue;
        }
        struct whole w = join(part, parts, rows, r);
        loss[r] = (float)(w.lse - w.target);
        penalty[r] = (float)(how->z * w.lse * w.lse + (double)how->max_z * w.max * w.max);
        if (!dlogits) continue;
        scaled_exp(row, w.max, (float)(how->grad_scale / w.sum * (1.0 + 2.0 * how->z * w.lse)), V);
        if (targets[r] >= 0) row[targets[r]] -= how->grad_scale;
        if (own == w.first)
            row[(int)part[(size_t)own * rows + r].largest] += 2.0f * how->grad_scale * how->max_z * w.max;
        store(k, dlogits, row, r, V);
    }
}
