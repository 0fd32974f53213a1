/* The network: canonical order and checks (proto/model.h), forward and backward (node/model.h)
 * against finite differences and against Hugging Face's LlamaForCausalLM (tests/reference). */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include <glob.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"
#include "node/layout.h"
#include "node/model.h"
#include "proto/model.h"

static struct msg_model tiny(uint8_t tied) {
    return (struct msg_model){ .layers = 2, .width = 12, .heads = 2, .kv_heads = 1, .ffn = 10,
                               .vocabulary = 11, .sequence = 6, .rope_theta = 100, .norm_eps = 1e-5,
                               .tied = tied };
}

/* ---- canonical order --------------------------------------------------------------------------- */

/* Fragments and checkpoints address elements by these offsets: no gap, no overlap, every preset. */
static void tensors_tile_the_vector_in_order(void **state) {
    (void)state;
    const char *names[] = { "debug", "10m", "150m", "1b", "8b", "10b" };
    for (size_t p = 0; p < 6; p++) {
        struct msg_model m;
        uint64_t next = 0;
        assert_int_equal(proto_model_preset(names[p], &m, NULL), 0);
        assert_int_equal(proto_model_check(&m, NULL), 0);
        for (uint32_t i = 0; i < proto_model_tensor_count(&m); i++) {
            struct proto_tensor t, found;
            proto_model_tensor(&m, i, &t);
            assert_int_equal(t.offset, next);
            assert_int_equal(t.count, t.shape[0] * t.shape[1]);
            assert_int_equal(proto_model_tensor_at(&m, t.offset), i);
            assert_int_equal(proto_model_tensor_at(&m, t.offset + t.count - 1), i);
            assert_int_equal(proto_model_tensor_find(&m, t.name, &found, NULL), 0);
            assert_int_equal(found.offset, t.offset);
            next += t.count;
        }
        assert_int_equal(next, proto_model_elements(&m));
    }
}

/* Every program deals the chunks alike: whole layers go round, what is left evens the parts out. */
static void fragments_are_layers_in_turn_and_of_like_size(void **state) {
    static uint8_t of[65536];
    struct msg_model m;
    struct err err;
    (void)state;
    assert_int_equal(proto_model_preset("10b", &m, NULL), 0);
    uint32_t chunk = 1u << 20, chunks = (uint32_t)((proto_model_elements(&m) - 1) / chunk + 1);
    assert_int_equal(proto_model_fragments(&m, chunk, 8, of, NULL), 0);
    uint32_t in[8] = {0}, smallest = UINT32_MAX, largest = 0;
    for (uint32_t c = 0; c < chunks; c++) {
        struct proto_tensor t;
        proto_model_tensor(&m, proto_model_tensor_at(&m, (uint64_t)c * chunk), &t);
        if (t.role <= MODEL_DOWN) assert_int_equal(of[c], t.layer % 8);
        in[of[c]]++;
    }
    for (int f = 0; f < 8; f++) {
        if (in[f] < smallest) smallest = in[f];
        if (in[f] > largest) largest = in[f];
    }
    assert_true(largest - smallest <= chunks / 50);
    assert_int_equal(proto_model_preset("debug", &m, NULL), 0);
    assert_int_equal(proto_model_fragments(&m, 1u << 20, 4, of, &err), -1);
    assert_non_null(strstr(err.msg, "would be empty"));
    assert_int_equal(proto_model_fragments(&m, 4096, 7, of, NULL), 0); /* more than layers: strided */
    for (uint32_t c = 0; c < 200; c++) assert_int_equal(of[c], c % 7);
}

/* The reference run's size, and Llama 3 8B's as published: 8,030,261,248. */
static void presets_have_their_sizes(void **state) {
    (void)state;
    struct msg_model m;
    assert_int_equal(proto_model_preset("8b", &m, NULL), 0);
    assert_int_equal(proto_model_elements(&m), 8030261248u);
    assert_int_equal(proto_model_preset("1b", &m, NULL), 0);
    assert_int_equal(proto_model_elements(&m), 1235814400u);
    assert_int_equal(proto_model_preset("10b", &m, NULL), 0);
    assert_in_range(proto_model_elements(&m), 10000000000u, 10300000000u);
    assert_int_equal(proto_model_preset("debug", &m, NULL), 0);
    assert_in_range(proto_model_elements(&m), 1000000, 1300000);
}

static void names_are_hugging_faces(void **state) {
    (void)state;
    struct msg_model m = tiny(0);
    struct proto_tensor t;
    proto_model_tensor(&m, 0, &t);
    assert_string_equal(t.name, "model.embed_tokens.weight");
    proto_model_tensor(&m, 1 + 9 + MODEL_K, &t);
    assert_string_equal(t.name, "model.layers.1.self_attn.k_proj.weight");
    assert_int_equal(t.shape[0], 6);
    assert_int_equal(t.shape[1], 12);
    proto_model_tensor(&m, proto_model_tensor_count(&m) - 1, &t);
    assert_string_equal(t.name, "lm_head.weight");
    struct err err;
    assert_int_equal(proto_model_tensor_find(&m, "model.bias", &t, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
}

/* A person writes these numbers: each mistake must be named, not crash later. */
static void impossible_networks_are_refused(void **state) {
    (void)state;
    const struct { size_t offset; uint32_t value; const char *key; } wrong[] = {
        { offsetof(struct msg_model, layers), 0, "layers" },
        { offsetof(struct msg_model, heads), 5, "heads" },
        { offsetof(struct msg_model, heads), 12, "odd" },
        { offsetof(struct msg_model, kv_heads), 3, "kv_heads" },
        { offsetof(struct msg_model, vocabulary), 1u << 21, "vocabulary" },
        { offsetof(struct msg_model, rope_original), 8192, "rope_original" },
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        struct msg_model m = tiny(0);
        struct err err = { 0 };
        memcpy((char *)&m + wrong[i].offset, &wrong[i].value, sizeof wrong[i].value);
        assert_int_equal(proto_model_check(&m, &err), -1);
        assert_int_equal(err.code, ERR_CONFIG);
        assert_non_null(strstr(err.msg, wrong[i].key));
    }
    struct msg_model m;
    struct err err = { 0 };
    assert_int_equal(proto_model_preset("7b", &m, &err), -1);
    assert_non_null(strstr(err.msg, "150m"));
}

/* ---- initial values ---------------------------------------------------------------------------- */

/* Every machine derives the initial anchor by itself, in chunks of its own choosing. */
static void initial_values_do_not_depend_on_the_ranges_asked_for(void **state) {
    (void)state;
    struct msg_model m = tiny(0);
    size_t n = (size_t)proto_model_elements(&m);
    float *whole = malloc(n * sizeof *whole), *parts = malloc(n * sizeof *parts);
    model_init_elements(&m, 0.02f, 7, 0, n, whole);
    for (size_t first = 0; first < n; first += 37)
        model_init_elements(&m, 0.02f, 7, first, n - first < 37 ? n - first : 37, parts + first);
    assert_memory_equal(whole, parts, n * sizeof *whole);
    struct proto_tensor norm;
    assert_int_equal(proto_model_tensor_find(&m, "model.norm.weight", &norm, NULL), 0);
    assert_true(whole[norm.offset] == 1.0f && whole[norm.offset + 11] == 1.0f);
    assert_true(fabsf(whole[0]) < 0.2f && whole[0] != whole[1]);
    free(whole);
    free(parts);
}

/* ---- gradients --------------------------------------------------------------------------------- */

static void fill_tokens(int32_t *tokens, size_t n, uint32_t vocabulary) {
    for (size_t i = 0; i < n; i++) tokens[i] = (int32_t)((i * 7 + i * i * 3 + 5) % vocabulary);
}

static double loss_at(struct model *model, const float *params, const int32_t *tokens) {
    struct model_loss loss;
    assert_int_equal(model_loss(model, params, tokens, 2, 6, &loss, NULL), 0);
    return loss.nats + loss.penalty;
}

/* Along one random direction per tensor: (loss(p + hu) - loss(p - hu)) / 2h = gradient . u. */
static void check_tensor(struct model *model, float *params, const float *grads,
                         const struct proto_tensor *t, const int32_t *tokens) {
    float *u = malloc(t->count * sizeof *u), *saved = malloc(t->count * sizeof *saved);
    const float h = 4e-3f;
    double expected = 0;
    outer_init_normal(u, 99, t->offset, (size_t)t->count, 1.0f);
    memcpy(saved, params + t->offset, t->count * sizeof *saved);
    for (size_t i = 0; i < t->count; i++) expected += (double)grads[t->offset + i] * u[i];
    for (size_t i = 0; i < t->count; i++) params[t->offset + i] = saved[i] + h * u[i];
    double up = loss_at(model, params, tokens);
    for (size_t i = 0; i < t->count; i++) params[t->offset + i] = saved[i] - h * u[i];
    double down = loss_at(model, params, tokens);
    memcpy(params + t->offset, saved, t->count * sizeof *saved);
    double found = (up - down) / (2 * h);
    if (fabs(found - expected) > 0.01 * fabs(expected) + 0.02)
        fail_msg("%s: finite difference %g, gradient %g", t->name, found, expected);
    free(u);
    free(saved);
}

static void gradients_match_finite_differences(void **state) {
    (void)state;
    for (uint8_t tied = 0; tied <= 1; tied++) {
        struct msg_model m = tiny(tied);
        size_t n = (size_t)proto_model_elements(&m);
        float *params = malloc(n * sizeof *params), *grads = malloc(n * sizeof *grads);
        int32_t tokens[2 * 7];
        struct model_loss loss;
        fill_tokens(tokens, 14, m.vocabulary);
        model_init_elements(&m, 0.3f, 3, 0, n, params);
        struct model *model = model_create(&m, kernels_reference(), 2, 6, 1, NULL);
        assert_non_null(model);
        if (tied) /* with documents; token 4 stands in the middle of either sequence */
            model_set_objective(model, &(struct model_objective){ .document_end = 4, .z = 0.01f });
        memset(grads, 0x7f, n * sizeof *grads); /* KERNELS_SET must leave nothing of this */
        assert_int_equal(model_backward(model, params, grads, tokens, 2, 6, 1.0f, KERNELS_SET, &loss,
                                        NULL), 0);
        assert_true(fabs(loss.nats + loss.penalty - loss_at(model, params, tokens)) < 1e-9);
        for (uint32_t i = 0; i < proto_model_tensor_count(&m); i++) {
            struct proto_tensor t;
            proto_model_tensor(&m, i, &t);
            check_tensor(model, params, grads, &t, tokens);
        }
        model_destroy(model);
        free(params);
        free(grads);
    }
}

/* Micro-batches: the gradient of two samples is the sum of those of each. */
static void gradients_of_micro_batches_add_up(void **state) {
    (void)state;
    struct msg_model m = tiny(1);
    size_t n = (size_t)proto_model_elements(&m);
    float *params = malloc(n * sizeof *params), *once = malloc(n * sizeof *once), *twice = malloc(n * sizeof *twice);
    int32_t tokens[2 * 7];
    struct model_loss both, first, second;
    fill_tokens(tokens, 14, m.vocabulary);
    model_init_elements(&m, 0.3f, 3, 0, n, params);
    struct model *model = model_create(&m, kernels_reference(), 2, 6, 1, NULL);
    assert_int_equal(model_backward(model, params, once, tokens, 2, 6, 0.1f, KERNELS_SET, &both, NULL), 0);
    assert_int_equal(model_backward(model, params, twice, tokens, 1, 6, 0.1f, KERNELS_SET, &first, NULL), 0);
    assert_int_equal(model_backward(model, params, twice, tokens + 7, 1, 6, 0.1f, KERNELS_ADD, &second,
                                    NULL), 0);
    assert_true(fabs(both.nats - first.nats - second.nats) < 1e-5);
    for (size_t i = 0; i < n; i++)
        if (fabsf(once[i] - twice[i]) > 1e-5f) fail_msg("element %zu: %g, %g", i, (double)once[i], (double)twice[i]);
    model_destroy(model);
    free(params);
    free(once);
    free(twice);
}

/* What is not kept is computed again by the same kernels from the same inputs: no bit may differ, in either
 * precision, with documents and without. And each step takes less memory than the one before. */
static void computing_again_changes_no_bit(void **state) {
    (void)state;
    struct msg_model m = tiny(1);
    size_t n = (size_t)proto_model_elements(&m);
    float *init = malloc(n * sizeof *init), *grads[2] = { malloc(n * sizeof(float)), malloc(n * sizeof(float)) };
    int32_t tokens[2 * 7];
    fill_tokens(tokens, 14, m.vocabulary);
    model_init_elements(&m, 0.3f, 3, 0, n, init);
    struct kernels *backend[] = { kernels_cpu_create(2, NULL), kernels_cpu_bf16_create(2, 0, NULL) };
    for (int i = 0; i < 4; i++) {
        const struct kernels *k = backend[i / 2];
        void *params = k->alloc(k, n * 4, NULL);
        uint16_t *rest = k->rest_bytes ? k->alloc(k, n * 2, NULL) : NULL;
        struct model_loss loss[2];
        size_t bytes = SIZE_MAX;
        struct layout alone;
        layout_init(&alone, &m, 1, 0, 1, 0);
        k->weights_in(k, params, rest, init, n);
        for (enum model_training t = MODEL_TRAINS; t <= MODEL_AGAIN_LAYER; t++) {
            int which = t > MODEL_TRAINS;
            struct model *model = model_create(&m, k, 2, 6, t, NULL);
            assert_non_null(model);
            model_set_objective(model, &(struct model_objective){ .document_end = i % 2 ? 4 : -1 });
            assert_int_equal(model_backward(model, params, grads[which], tokens, 2, 6, 0.1f, KERNELS_SET,
                                            &loss[which], NULL), 0);
            if (which) assert_memory_equal(grads[0], grads[1], n * sizeof(float));
            assert_true(loss[0].nats == loss[which].nats);
            assert_true(model_arena_bytes(&alone, k, 2, 6, t) < bytes);
            bytes = model_arena_bytes(&alone, k, 2, 6, t);
            model_destroy(model);
        }
        k->free(k, params), k->free(k, rest);
    }
    for (int i = 0; i < 2; i++) free(grads[i]), backend[i]->destroy(backend[i]);
    free(init);
}

/* ---- against PyTorch --------------------------------------------------------------------------- */

/* REFERENCE names another folder of vectors, as `make test-reference` does. */
static const char *reference_folder(void) {
    const char *folder = getenv("REFERENCE");
    return folder ? folder : "tests/reference";
}

struct vectors {
    struct msg_model m;
    struct model_objective objective;
    int batch;
    int32_t *tokens;
    double loss, penalty, error;
    size_t n, logits_n;
    float *params, *grads, *logits;
};

static void read_floats(FILE *f, float **out, size_t n) {
    assert_non_null(*out = malloc(n * sizeof **out));
    assert_int_equal(fread(*out, sizeof **out, n, f), n);
}

static double number_of(const json_t *o, const char *key) {
    const json_t *v = json_object_get(o, key);
    if (!json_is_number(v)) fail_msg("the vectors have no \"%s\"", key);
    return json_number_value(v);
}

static void header_read(struct vectors *v, const json_t *o) {
    const struct { const char *key; uint32_t *to; } whole[] = {
        { "layers", &v->m.layers }, { "width", &v->m.width }, { "heads", &v->m.heads },
        { "kv_heads", &v->m.kv_heads }, { "ffn", &v->m.ffn }, { "vocabulary", &v->m.vocabulary },
        { "sequence", &v->m.sequence }, { "rope_original", &v->m.rope_original },
    };
    const struct { const char *key; double *to; } real[] = {
        { "rope_theta", &v->m.rope_theta }, { "norm_eps", &v->m.norm_eps }, { "rope_factor", &v->m.rope_factor },
        { "rope_low_factor", &v->m.rope_low_factor }, { "rope_high_factor", &v->m.rope_high_factor },
        { "loss", &v->loss }, { "penalty", &v->penalty }, { "error", &v->error },
    };
    for (size_t i = 0; i < sizeof whole / sizeof *whole; i++) *whole[i].to = (uint32_t)number_of(o, whole[i].key);
    for (size_t i = 0; i < sizeof real / sizeof *real; i++) *real[i].to = number_of(o, real[i].key);
    v->m.tied = (uint8_t)number_of(o, "tied");
    v->m.rope_type = (uint8_t)number_of(o, "rope_type");
    v->batch = (int)number_of(o, "batch");
    v->objective = (struct model_objective){ .document_end = (int32_t)number_of(o, "document_end"),
                                             .z = (float)number_of(o, "z"), .max_z = (float)number_of(o, "max_z") };
    const json_t *tokens = json_object_get(o, "tokens");
    assert_int_equal(json_array_size(tokens), (size_t)v->batch * (v->m.sequence + 1));
    assert_non_null(v->tokens = malloc(json_array_size(tokens) * sizeof *v->tokens));
    for (size_t i = 0; i < json_array_size(tokens); i++)
        v->tokens[i] = (int32_t)json_integer_value(json_array_get(tokens, i));
}

static void vectors_read(struct vectors *v, const char *path) {
    static char line[1 << 16];
    struct err err;
    FILE *f = fopen(path, "rb");
    if (!f) fail_msg("%s is missing: run from the repository's root", path);
    assert_non_null(fgets(line, sizeof line, f));
    json_t *o = json_loads(line, 0, NULL);
    memset(v, 0, sizeof *v);
    header_read(v, o);
    json_decref(o);
    if (proto_model_check(&v->m, &err)) fail_msg("%s: %s", path, err.msg);
    v->n = (size_t)proto_model_elements(&v->m);
    v->logits_n = (size_t)v->batch * v->m.sequence * v->m.vocabulary;
    read_floats(f, &v->params, v->n);
    read_floats(f, &v->grads, v->n);
    read_floats(f, &v->logits, v->logits_n);
    assert_int_equal(fgetc(f), EOF);
    fclose(f);
}

static void vectors_release(struct vectors *v) {
    free(v->tokens);
    free(v->params);
    free(v->grads);
    free(v->logits);
}

/* Both sides compute in fp32; 1e-5 of the largest value is about 100 roundings. Where PyTorch's own
 * are worth more, as far again from the truth as it is. */
static void assert_close(const struct vectors *v, const char *what, const float *found, const float *expected,
                         size_t n) {
    double tolerance = (1e-5 + 3 * v->error) * (double)outer_absmax(expected, n);
    for (size_t i = 0; i < n; i++)
        if (!(fabs((double)found[i] - (double)expected[i]) <= tolerance))
            fail_msg("%s %zu: %g, PyTorch has %g", what, i, (double)found[i], (double)expected[i]);
}

/* Logits at every position; the tokens after it are replaced, to show that nothing looks ahead.
 * model_logits() knows no documents, so each is given alone. */
static void check_logits(const struct kernels *k, const struct vectors *v, const float *params) {
    size_t T = v->m.sequence, V = v->m.vocabulary;
    float *found = malloc(v->logits_n * sizeof *found);
    int32_t *tokens = calloc(T, sizeof *tokens);
    struct model *model = model_create(&v->m, k, 1, (int)T, 0, NULL);
    for (size_t b = 0; b < (size_t)v->batch; b++)
        for (size_t t = 0, first = 0; t < T; t++) {
            const int32_t *row = v->tokens + b * (T + 1);
            memset(tokens, 0, T * sizeof *tokens);
            memcpy(tokens, row + first, (t + 1 - first) * sizeof *tokens);
            assert_int_equal(model_logits(model, params, tokens, (int)(T - first), (int)(t - first),
                                          found + (b * T + t) * V, NULL), 0);
            if (row[t] == v->objective.document_end) first = t + 1;
        }
    assert_close(v, "logit", found, v->logits, v->logits_n);
    model_destroy(model);
    free(found);
    free(tokens);
}

static void check_vectors(const struct kernels *k, const char *path) {
    struct vectors v;
    vectors_read(&v, path);
    int T = (int)v.m.sequence;
    struct model_loss loss;
    float *params = k->alloc(k, v.n * sizeof(float), NULL), *grads = k->alloc(k, v.n * sizeof(float), NULL);
    float *found = malloc(v.n * sizeof *found);
    k->copy_in(k, params, v.params, v.n * sizeof(float));
    check_logits(k, &v, params);
    struct model *model = model_create(&v.m, k, v.batch, T, 1, NULL);
    model_set_objective(model, &v.objective);
    size_t counted = model_targets(model, v.tokens, v.batch, T);
    double targets = counted ? (double)counted : 1;
    assert_int_equal(model_backward(model, params, grads, v.tokens, v.batch, T, (float)(1 / targets), KERNELS_SET,
                                    &loss, NULL), 0);
    if (fabs(loss.nats / targets - v.loss) > (1e-5 + 3 * v.error) * (1 + v.loss))
        fail_msg("%s: loss %.9g, PyTorch has %.9g", path, loss.nats / targets, v.loss);
    if (fabs(loss.penalty / targets - v.penalty) > (1e-5 + 3 * v.error) * (1 + v.penalty))
        fail_msg("%s: penalty %.9g, PyTorch has %.9g", path, loss.penalty / targets, v.penalty);
    k->copy_out(k, found, grads, v.n * sizeof *found);
    for (uint32_t i = 0; i < proto_model_tensor_count(&v.m); i++) {
        struct proto_tensor t;
        proto_model_tensor(&v.m, i, &t);
        assert_close(&v, t.name, found + t.offset, v.grads + t.offset, (size_t)t.count);
    }
    model_destroy(model);
    k->free(k, params);
    k->free(k, grads);
    free(found);
    vectors_release(&v);
}

/* Every network of the folder: tied and untied heads, grouped queries, scaled rotary embeddings,
 * documents within a sequence, z-loss and max-z loss. */
static void check_all_vectors(const struct kernels *k) {
    char pattern[4096];
    glob_t found;
    snprintf(pattern, sizeof pattern, "%s/llama-*.bin", reference_folder());
    assert_int_equal(glob(pattern, 0, NULL, &found), 0);
    assert_true(found.gl_pathc >= 5);
    for (size_t i = 0; i < found.gl_pathc; i++) {
        check_vectors(k, found.gl_pathv[i]);
        if (getenv("REFERENCE")) print_message("%s: %s\n", k->name, found.gl_pathv[i]);
    }
    globfree(&found);
}

static void network_is_hugging_faces_llama(void **state) {
    (void)state;
    check_all_vectors(kernels_reference());
}

static void network_is_hugging_faces_llama_on_the_fast_backend(void **state) {
    (void)state;
    struct kernels *k = kernels_cpu_create(2, NULL);
    assert_non_null(k);
    check_all_vectors(k);
    k->destroy(k);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tensors_tile_the_vector_in_order),
        cmocka_unit_test(fragments_are_layers_in_turn_and_of_like_size),
        cmocka_unit_test(presets_have_their_sizes),
        cmocka_unit_test(names_are_hugging_faces),
        cmocka_unit_test(impossible_networks_are_refused),
        cmocka_unit_test(initial_values_do_not_depend_on_the_ranges_asked_for),
        cmocka_unit_test(gradients_match_finite_differences),
        cmocka_unit_test(gradients_of_micro_batches_add_up),
        cmocka_unit_test(computing_again_changes_no_bit),
        cmocka_unit_test(network_is_hugging_faces_llama),
        cmocka_unit_test(network_is_hugging_faces_llama_on_the_fast_backend),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
