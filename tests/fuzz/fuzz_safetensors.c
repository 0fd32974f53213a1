/* fuzz_safetensors.c - the header of a safetensors file. A header that is taken accounts for every
 * byte of its file, as the reader maps tensors by it.
 *
 * Input: bytes that the file's data is said to have (4), then the start of the file. */
#include <stdlib.h>

#include "ckpt/internal.h"
#include "tests/fuzz/fuzz.h"

static void init(void) {
    struct err err;
    int failed = proto_init(&err);
    assert(!failed);
}

static uint64_t dtype_bytes(enum safetensors_dtype dtype) {
    return dtype == SAFETENSORS_F32 ? 4 : 2;
}

static void check_tensor(const struct safetensors *s, uint32_t i, uint64_t data, uint64_t file_bytes) {
    const struct safetensors_tensor *t = &s->tensor[i];
    uint64_t elements = 1;
    assert(safetensors_find(s, t->name) == t); /* so names are ascending and each is there once */
    assert(i == 0 || strcmp(s->tensor[i - 1].name, t->name) < 0);
    assert(t->offset >= data && t->offset <= file_bytes && t->bytes <= file_bytes - t->offset);
    assert(t->dims <= SAFETENSORS_DIMS_MAX);
    for (uint32_t d = 0; d < t->dims; d++) assert(!__builtin_mul_overflow(elements, t->shape[d], &elements));
    if (t->dtype != SAFETENSORS_OTHER) assert(t->bytes == elements * dtype_bytes(t->dtype));
}

static void check(const struct safetensors *s, size_t header, uint64_t file_bytes) {
    uint64_t data = 8 + (uint64_t)header, total = data;
    for (uint32_t i = 0; i < s->count; i++) {
        check_tensor(s, i, data, file_bytes);
        total += s->tensor[i].bytes;
    }
    assert(total == file_bytes);
}

static bool take(const uint8_t *bytes, size_t length) {
    struct fuzz_input in = {bytes, length};
    struct safetensors s;
    struct err err = {0};
    size_t header, data = fuzz_le(&in, 4);
    if (in.left < 8) return false;
    uint64_t file_bytes = in.left + (uint64_t)data;
    if (safetensors_header_length(in.at, file_bytes, "file", &header, &err)) {
        assert(err.code == ERR_CORRUPT || err.code == ERR_TRUNCATED);
        return false;
    }
    if (header > in.left - 8) return false; /* the reader could not have read it either */
    file_bytes = 8 + (uint64_t)header + data;
    if (safetensors_parse(in.at + 8, header, file_bytes, "file", &s, &err)) {
        assert(err.code == ERR_CORRUPT && *err.msg && !s.tensor);
        return false;
    }
    check(&s, header, file_bytes);
    safetensors_release(&s);
    return true;
}

static void put(const struct fuzz_sink *out, const char *name, uint32_t data, const uint8_t *file,
                size_t length) {
    uint8_t *b = malloc(length + 4);
    assert(b);
    for (int i = 0; i < 4; i++) b[i] = (uint8_t)(data >> 8 * i);
    memcpy(b + 4, file, length);
    out->sample(out->arg, name, b, length + 4);
    free(b);
}

static void put_header(const struct fuzz_sink *out, const char *name, uint32_t data, const char *json) {
    size_t length = strlen(json);
    uint8_t file[512] = {(uint8_t)length};
    assert(length < 256);
    memcpy(file + 8, json, length + 1);
    put(out, name, data, file, 8 + length);
}

static void samples(const struct fuzz_sink *out) {
    static const struct msg_model model = {.layers = 1, .width = 8, .heads = 2, .kv_heads = 1, .ffn = 16,
                                           .vocabulary = 16, .sequence = 8, .rope_theta = 1e4, .norm_eps = 1e-5};
    static const char *const words[] = {
        "\"dtype\":", "\"shape\":[", "\"data_offsets\":[0,", "\"__metadata__\":{", "\"F32\"", "\"F16\"", "\"BF16\"",
        "\"F64\"", "\"I64\"", "\"BOOL\"", "\"F8_E4M3\"", "9223372036854775807", "4294967296", "-1", "1.0", "]}",
        "\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}", "\\u0000"};
    struct ckpt_blob blob;
    struct err err;
    uint32_t tensors = proto_model_tensor_count(&model);
    int failed = safetensors_format(&model, 0, tensors, SAFETENSORS_F32, &blob, &err);
    assert(!failed);
    put(out, "model", (uint32_t)proto_model_elements(&model) * 4, blob.data, blob.length);
    free(blob.data);
    put_header(out, "none", 0, "{}");
    put_header(out, "two", 10, "{\"b\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[6,10]},"
                               "\"a\":{\"dtype\":\"BF16\",\"shape\":[3,1],\"data_offsets\":[0,6]}}");
    put_header(out, "empty", 1, "{\"a\":{\"dtype\":\"F16\",\"shape\":[0],\"data_offsets\":[0,0]},\"b\":{\"dtype\":"
                                "\"BOOL\",\"shape\":[1],\"data_offsets\":[0,1]},\"__metadata__\":{\"x\":\"y\"}}");
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) out->word(out->arg, words[i]);
}

const struct fuzz_target fuzz_safetensors = {"safetensors", init, take, samples};
