/* The decoder: what it keeps of a sequence gives the logits that reading all of it again gives. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "node/decoder.h"
#include "node/model.h"
#include "proto/model.h"

#define T 150 /* more than are read at a time */

static struct msg_model networks[] = {
    { .layers = 2,
      .width = 32,
      .heads = 4,
      .kv_heads = 2,
      .ffn = 40,
      .vocabulary = 61,
      .sequence = T,
      .rope_theta = 1e4,
      .norm_eps = 1e-5 },
    { .layers = 3,
      .width = 48,
      .heads = 6,
      .kv_heads = 6,
      .ffn = 24,
      .vocabulary = 29,
      .sequence = T,
      .rope_theta = 500,
      .norm_eps = 1e-6,
      .tied = 1,
      .rope_type = ROPE_LINEAR,
      .rope_factor = 3 },
    { .layers = 1,
      .width = 64,
      .heads = 4,
      .kv_heads = 1,
      .ffn = 64,
      .vocabulary = 97,
      .sequence = T,
      .rope_theta = 5e5,
      .norm_eps = 1e-5,
      .rope_type = ROPE_LLAMA3,
      .rope_factor = 8,
      .rope_low_factor = 1,
      .rope_high_factor = 4,
      .rope_original = 40 },
};

struct rig {
    const struct msg_model *m;
    const struct kernels *k;
    void *params;
    int32_t tokens[T];
    float expected[T][128];
};

static int looked_at(int position) {
    return position < 3 || position % 10 == 9;
}

/* Large weights: attention must not be nearly even, or a wrong look back would not show. */
static void rig_fill(struct rig *r, const struct msg_model *m, const struct kernels *k) {
    struct err err = { 0 };
    size_t n = (size_t)proto_model_elements(m);
    assert_int_equal(proto_model_check(m, &err), 0);
    float *host = malloc(n * sizeof *host);
    model_init_elements(m, 0.3f, 7, 0, n, host);
    *r = (struct rig){ .m = m, .k = k, .params = k->alloc(k, n * k->weight_bytes, NULL) };
    k->weights_in(k, r->params, NULL, host, n);
    free(host);
    for (int t = 0; t < T; t++) r->tokens[t] = (int32_t)((unsigned)(t * t * 31 + t * 7 + 3) % m->vocabulary);
    struct model *model = model_create(m, k, 1, T, 0, NULL);
    for (int t = 0; t < T; t++)
        if (looked_at(t))
            assert_int_equal(model_logits(model, r->params, r->tokens, T, t, r->expected[t], &err), 0);
    model_destroy(model);
}

static void assert_logits(const struct rig *r, int position, const float *found) {
    float largest = 0;
    if (!looked_at(position)) return;
    for (uint32_t i = 0; i < r->m->vocabulary; i++) largest = fmaxf(largest, fabsf(r->expected[position][i]));
    for (uint32_t i = 0; i < r->m->vocabulary; i++)
        if (!(fabsf(found[i] - r->expected[position][i]) <= 2e-5f * largest))
            fail_msg("%s: logit %u after token %d is %g, all of it read again gives %g", r->k->name, i,
                     position, (double)found[i], (double)r->expected[position][i]);
}

/* In pieces of `step`, then, after forgetting, all at once. */
static void check(const struct kernels *k, const struct msg_model *m, int step) {
    struct rig r;
    struct err err = { 0 };
    float logits[128];
    rig_fill(&r, m, k);
    struct decoder *d = decoder_create(m, k, r.params, T, &err);
    if (!d) fail_msg("%s", err.msg);
    for (int at = 0, n; at < T; at += n) {
        n = T - at < step ? T - at : step;
        assert_int_equal(decoder_read(d, r.tokens + at, n, logits, &err), 0);
        assert_int_equal(decoder_count(d), at + n);
        assert_logits(&r, at + n - 1, logits);
    }
    decoder_forget(d);
    assert_int_equal(decoder_count(d), 0);
    assert_int_equal(decoder_read(d, r.tokens, T, logits, &err), 0);
    assert_logits(&r, T - 1, logits);
    decoder_destroy(d);
    k->free(k, r.params);
}

static void what_is_kept_gives_the_same_logits(void **state) {
    (void)state;
    struct kernels *fast = kernels_cpu_create(2, NULL);
    for (size_t i = 0; i < sizeof networks / sizeof *networks; i++) {
        check(fast, &networks[i], 1);
        check(fast, &networks[i], 70);
    }
    check(kernels_reference(), &networks[2], 10);
    fast->destroy(fast);
}

int main(void) {
    const struct CMUnitTest tests[] = { cmocka_unit_test(what_is_kept_gives_the_same_logits) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
