/* What docs/protocol.md says of numbers is what the product computes: its vectors, and the fragments.
 * tests/protocol/ computes the same from the page alone. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/kernels.h"
#include "node/data.h"
#include "proto/model.h"
#include "proto/proto.h"

#define N 600
static float x[N], y[N], dx[N], dy[N], d4[N], mean[N], both[2 * N], residual[N];
static uint8_t ex[2 * N], ey[2 * N], e4[2 * N], emean[2 * N];
static char document[1 << 18];

static void read_document(void) {
    FILE *f = fopen("docs/protocol.md", "r");
    if (!f) fail_msg("docs/protocol.md: run the tests from the repository's root");
    document[fread(document, 1, sizeof document - 1, f)] = '\0';
    fclose(f);
}

/* The row as it must stand there is printed where it does not. */
static void expect(const char *name, const void *bytes, size_t length) {
    struct digest d = digest_of(bytes, length);
    char hex[DIGEST_HEX_BYTES], row[160];
    digest_hex(&d, hex);
    snprintf(row, sizeof row, "\n| %s | `%s` |\n", name, hex);
    if (!strstr(document, row)) fail_msg("docs/protocol.md lacks the row%s", row);
}

static void encode(uint8_t *bytes, float *decoded, const float *values) {
    size_t length = outer_encoded_bytes(OUTER_INT8, N);
    assert_int_equal(outer_encode(bytes, values, N, OUTER_INT8, NULL), 0);
    assert_int_equal(outer_decode(decoded, bytes, length, N, OUTER_INT8, NULL), 0);
}

/* Whoever writes a member from the page must be able to find out that he got the arithmetic right
 * before he meets one. */
static void the_vectors_are_what_we_compute(void **state) {
    (void)state;
    size_t length = outer_encoded_bytes(OUTER_INT8, N);
    int64_t sum[N] = {0};
    outer_init_normal(x, 7, 0, N, 0.02f);
    outer_init_normal(y, 8, 0, N, 0.02f);
    encode(ex, dx, x);
    encode(ey, dy, y);
    expect("x", x, sizeof x);
    expect("INT8(x)", ex, length);
    assert_int_equal(outer_residual(residual, x, ex, length, N, OUTER_INT8, NULL), 0);
    expect("residual of x", residual, sizeof residual);
    assert_int_equal(outer_encode(e4, x, N, OUTER_FP4, NULL), 0);
    assert_int_equal(outer_decode(d4, e4, outer_encoded_bytes(OUTER_FP4, N), N, OUTER_FP4, NULL), 0);
    expect("FP4(x)", e4, outer_encoded_bytes(OUTER_FP4, N));
    expect("decoded FP4(x)", d4, sizeof d4);
    double norm2 = outer_norm2(dx, 300) + outer_norm2(dx + 300, 300);
    expect("sum of squares", &norm2, sizeof norm2);
    assert_int_equal(outer_accumulate(sum, ex, length, N, OUTER_INT8, 3, 1, 40, NULL), 0);
    assert_int_equal(outer_accumulate(sum, ey, length, N, OUTER_INT8, 5, 0.5f, 40, NULL), 0);
    expect("sum", sum, sizeof sum);
    outer_mean(mean, sum, N, 8, 40);
    encode(emean, mean, mean);
    expect("INT8(mean)", emean, length);
    outer_nesterov(y, x, mean, N, 0.7f, 0.9f);
    memcpy(both, y, sizeof y);
    memcpy(both + N, x, sizeof x);
    expect("applied", both, sizeof both);
    uint64_t order[1000];
    for (uint64_t i = 0; i < 1000; i++) order[i] = data_permute(3, 1000, i);
    expect("permutation", order, sizeof order);
}

static void the_fragments_are_dealt_as_it_says(void **state) {
    (void)state;
    struct msg_model m;
    uint8_t fragment[256];
    assert_int_equal(proto_model_preset("10m", &m, NULL), 0);
    uint32_t chunks = (uint32_t)((proto_model_elements(&m) - 1) / 65536 + 1);
    assert_true(chunks <= sizeof fragment);
    assert_int_equal(proto_model_fragments(&m, 65536, 5, fragment, NULL), 0);
    expect("fragments", fragment, chunks);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_vectors_are_what_we_compute),
        cmocka_unit_test(the_fragments_are_dealt_as_it_says),
    };
    read_document();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
