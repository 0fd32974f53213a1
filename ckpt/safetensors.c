/* safetensors.c - the header of a safetensors file, read from hostile bytes and written; and the
 * two narrow float formats. Which tensors a model has is for the callers.
 *
 * The format allows no gap, no overlap and nothing after the last tensor, so a header that passed
 * accounts for every byte of its file. */
#include "ckpt/internal.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tensors are read as they lie in the file");

static const struct {
    const char *name;
    uint32_t bytes;
    enum safetensors_dtype dtype;
} dtypes[] = {
    {"F32", 4, SAFETENSORS_F32},       {"F16", 2, SAFETENSORS_F16},
    {"BF16", 2, SAFETENSORS_BF16},     {"F64", 8, SAFETENSORS_OTHER},
    {"I64", 8, SAFETENSORS_OTHER},     {"I32", 4, SAFETENSORS_OTHER},
    {"I16", 2, SAFETENSORS_OTHER},     {"I8", 1, SAFETENSORS_OTHER},
    {"U64", 8, SAFETENSORS_OTHER},     {"U32", 4, SAFETENSORS_OTHER},
    {"U16", 2, SAFETENSORS_OTHER},     {"U8", 1, SAFETENSORS_OTHER},
    {"BOOL", 1, SAFETENSORS_OTHER},    {"F8_E4M3", 1, SAFETENSORS_OTHER},
    {"F8_E5M2", 1, SAFETENSORS_OTHER},
};

int safetensors_header_length(const uint8_t first[8], uint64_t file_bytes, const char *what,
                              size_t *length, struct err *err) {
    uint64_t n = 0;
    for (int i = 7; i >= 0; i--) n = n << 8 | first[i];
    if (n > CKPT_HEADER_BYTES_MAX)
        return err_set(err, ERR_CORRUPT, "%s: header of %" PRIu64 " bytes, at most %u are accepted",
                       what, n, CKPT_HEADER_BYTES_MAX);
    if (file_bytes < 8 || n > file_bytes - 8)
        return err_set(err, ERR_TRUNCATED, "%s: header of %" PRIu64 " bytes in a file of %" PRIu64,
                       what, n, file_bytes);
    *length = (size_t)n;
    return 0;
}

/* A list of whole numbers, at most `max`; -1 when it is anything else. */
static int read_numbers(const json_t *list, uint64_t *out, uint32_t max, uint32_t *count) {
    size_t i;
    json_t *v;
    if (!json_is_array(list) || json_array_size(list) > max) return -1;
    json_array_foreach(list, i, v) {
        if (!json_is_integer(v) || json_integer_value(v) < 0) return -1;
        out[i] = (uint64_t)json_integer_value(v);
    }
    *count = (uint32_t)json_array_size(list);
    return 0;
}

/* Bytes of a tensor of this dtype and shape; -1 when the dtype is unknown or they overflow. */
static int tensor_bytes(struct safetensors_tensor *t, const char *dtype, uint64_t *bytes) {
    size_t d = 0;
    while (d < sizeof dtypes / sizeof *dtypes && strcmp(dtypes[d].name, dtype) != 0) d++;
    if (d == sizeof dtypes / sizeof *dtypes) return -1;
    t->dtype = dtypes[d].dtype;
    *bytes = dtypes[d].bytes;
    for (uint32_t i = 0; i < t->dims; i++)
        if (__builtin_mul_overflow(*bytes, t->shape[i], bytes)) return -1;
    return 0;
}

static int parse_tensor(const char *name, const json_t *json, uint64_t data, uint64_t data_bytes,
                        const char *what, struct safetensors_tensor *t, struct err *err) {
    const char *dtype = json_string_value(json_object_get(json, "dtype"));
    uint64_t at[2] = {0}, expected;
    uint32_t two = 0;
    if (!dtype)
        return err_set(err, ERR_CORRUPT, "%s: tensor %.80s: no dtype", what, name);
    if (read_numbers(json_object_get(json, "shape"), t->shape, SAFETENSORS_DIMS_MAX, &t->dims))
        return err_set(err, ERR_CORRUPT, "%s: tensor %.80s: shape must be at most %d whole numbers",
                       what, name, SAFETENSORS_DIMS_MAX);
    if (read_numbers(json_object_get(json, "data_offsets"), at, 2, &two) || two != 2)
        return err_set(err, ERR_CORRUPT, "%s: tensor %.80s: data_offsets must be two whole numbers",
                       what, name);
    if (at[0] > at[1] || at[1] > data_bytes)
        return err_set(err, ERR_CORRUPT,
                       "%s: tensor %.80s: bytes %" PRIu64 " to %" PRIu64 " of data of %" PRIu64,
                       what, name, at[0], at[1], data_bytes);
    if (tensor_bytes(t, dtype, &expected))
        return err_set(err, ERR_CORRUPT, "%s: tensor %.80s: dtype %.16s unknown, or shape too large",
                       what, name, dtype);
    if (at[1] - at[0] != expected)
        return err_set(err, ERR_CORRUPT,
                       "%s: tensor %.80s: %" PRIu64 " bytes, shape and dtype make %" PRIu64, what,
                       name, at[1] - at[0], expected);
    t->offset = data + at[0];
    t->bytes = expected;
    t->name = strdup(name);
    return t->name ? 0 : err_set(err, ERR_MEMORY, "%s: out of memory", what);
}

static int by_offset(const void *a, const void *b) {
    const struct safetensors_tensor *x = a, *y = b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes); /* empty ones first */
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const struct safetensors_tensor *)a)->name,
                  ((const struct safetensors_tensor *)b)->name);
}

/* Every byte from the header to the end of the file belongs to exactly one tensor. */
static int check_cover(struct safetensors *s, uint64_t data, uint64_t file_bytes, const char *what,
                       struct err *err) {
    uint64_t end = data;
    qsort(s->tensor, s->count, sizeof *s->tensor, by_offset);
    for (uint32_t i = 0; i < s->count; end += s->tensor[i++].bytes)
        if (s->tensor[i].offset != end)
            return err_set(err, ERR_CORRUPT, "%s: tensor %.80s %s: begins at byte %" PRIu64
                           ", the one before ends at %" PRIu64, what, s->tensor[i].name,
                           s->tensor[i].offset < end ? "overlaps" : "leaves a gap",
                           s->tensor[i].offset, end);
    if (end == file_bytes) return 0;
    return err_set(err, ERR_CORRUPT, "%s: tensors end at byte %" PRIu64 ", the file at %" PRIu64,
                   what, end, file_bytes);
}

int safetensors_parse(const uint8_t *header, size_t length, uint64_t file_bytes, const char *what,
                      struct safetensors *out, struct err *err) {
    uint64_t data = 8 + (uint64_t)length;
    const char *name;
    json_t *value;
    int r = -1;
    *out = (struct safetensors){0};
    assert(data <= file_bytes);
    if (length == 0 || header[0] != '{')
        return err_set(err, ERR_CORRUPT, "%s: not a safetensors file", what);
    json_t *json = json_read(&(struct ckpt_blob){(uint8_t *)(uintptr_t)header, length}, what, err);
    if (!json) return -1;
    out->tensor = calloc(json_object_size(json) + 1, sizeof *out->tensor);
    if (!out->tensor) {
        err_set(err, ERR_MEMORY, "%s: out of memory for %zu tensors", what, json_object_size(json));
        goto out;
    }
    json_object_foreach(json, name, value) {
        if (!strcmp(name, "__metadata__")) continue;
        if (parse_tensor(name, value, data, file_bytes - data, what, &out->tensor[out->count], err))
            goto out;
        out->count++;
    }
    r = check_cover(out, data, file_bytes, what, err);
    qsort(out->tensor, out->count, sizeof *out->tensor, by_name);
out:
    json_decref(json);
    if (r) safetensors_release(out);
    return r;
}

void safetensors_release(struct safetensors *s) {
    for (uint32_t i = 0; i < s->count; i++) free(s->tensor[i].name);
    free(s->tensor);
    *s = (struct safetensors){0};
}

const struct safetensors_tensor *safetensors_find(const struct safetensors *s, const char *name) {
    struct safetensors_tensor key = {.name = (char *)(uintptr_t)name};
    return s->count ? bsearch(&key, s->tensor, s->count, sizeof key, by_name) : NULL;
}

/* ---- writing ----------------------------------------------------------------------------------- */

size_t safetensors_width(enum safetensors_dtype dtype) {
    return dtype == SAFETENSORS_F32 ? 4 : dtype == SAFETENSORS_OTHER ? 0 : 2;
}

static json_t *format_tensor(const struct proto_tensor *t, enum safetensors_dtype dtype, uint64_t first) {
    json_t *shape = t->dims == 1 ? json_pack("[I]", (json_int_t)t->shape[0])
                                 : json_pack("[II]", (json_int_t)t->shape[0], (json_int_t)t->shape[1]);
    uint64_t at = (t->offset - first) * safetensors_width(dtype);
    return json_pack("{ss so s[II]}", "dtype", dtype == SAFETENSORS_BF16 ? "BF16" : "F32", "shape", shape,
                     "data_offsets", (json_int_t)at, (json_int_t)(at + t->count * safetensors_width(dtype)));
}

int safetensors_format(const struct msg_model *m, uint32_t first, uint32_t end, enum safetensors_dtype dtype,
                       struct ckpt_blob *out, struct err *err) {
    assert(dtype == SAFETENSORS_F32 || dtype == SAFETENSORS_BF16);
    struct proto_tensor t;
    struct ckpt_blob text;
    json_t *json = json_pack("{s{ss}}", "__metadata__", "format", "pt");
    proto_model_tensor(m, first, &t);
    for (uint64_t start = t.offset; json && first < end; first++) {
        proto_model_tensor(m, first, &t);
        if (!json_object_set_new(json, t.name, format_tensor(&t, dtype, start))) continue;
        json_decref(json);
        json = NULL;
    }
    if (json_write(json, JSON_COMPACT, &text, err)) return -1;
    size_t total = (8 + text.length + 63) / 64 * 64;
    out->data = realloc(text.data, total);
    if (!out->data) {
        free(text.data);
        return err_set(err, ERR_MEMORY, "out of memory for a header of %zu bytes", total);
    }
    out->length = total;
    memmove(out->data + 8, out->data, text.length);
    memset(out->data + 8 + text.length, ' ', total - 8 - text.length);
    for (int i = 0; i < 8; i++) out->data[i] = (uint8_t)((uint64_t)(total - 8) >> 8 * i);
    return 0;
}

/* ---- narrow floats ----------------------------------------------------------------------------- */

void safetensors_narrow(const float *in, uint16_t *out, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t x;
        memcpy(&x, in + i, 4);
        bool nan = (x & 0x7fffffff) > 0x7f800000;
        out[i] = (uint16_t)(nan ? x >> 16 | 0x40 : (x + 0x7fff + (x >> 16 & 1)) >> 16);
    }
}

/* IEEE 754 binary16 to binary32, exact. */
static uint32_t widen_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 31) return sign | 0x7f800000 | fraction << 13;
    if (exponent) return sign | (exponent + 112) << 23 | fraction << 13;
    if (!fraction) return sign;
    int shift = __builtin_clz(fraction) - 21; /* subnormal: move the leading one to bit 10 */
    return sign | (uint32_t)(113 - shift) << 23 | (fraction << shift & 1023) << 13;
}

void safetensors_widen(enum safetensors_dtype dtype, float *out, size_t n) {
    const uint8_t *in = (const uint8_t *)out + 2 * n;
    for (size_t i = 0; i < n; i++) { /* out[i] never reaches past what was read */
        uint16_t h;
        memcpy(&h, in + 2 * i, 2);
        uint32_t wide = dtype == SAFETENSORS_BF16 ? (uint32_t)h << 16 : widen_f16(h);
        memcpy(out + i, &wide, 4);
    }
}
