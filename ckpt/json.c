/* json.c - jansson with our errors. What JSON means is decided by the callers. */
#include "ckpt/internal.h"

#include <sodium.h>
#include <stdlib.h>
#include <string.h>

json_t *json_read(const struct ckpt_blob *blob, const char *what, struct err *err) {
    json_error_t e;
    json_t *json = json_loadb((const char *)blob->data, blob->length, JSON_REJECT_DUPLICATES, &e);
    if (!json) {
        err_set(err, ERR_CORRUPT, "%s: not JSON: %.100s (line %d, column %d)", what, e.text, e.line,
                e.column);
    } else if (!json_is_object(json)) {
        err_set(err, ERR_CORRUPT, "%s: a JSON object is expected", what);
        json_decref(json);
        json = NULL;
    }
    return json;
}

int json_write(json_t *json, size_t flags, struct ckpt_blob *out, struct err *err) {
    char *text = json ? json_dumps(json, flags) : NULL;
    json_decref(json);
    if (!text) return err_set(err, ERR_MEMORY, "out of memory while JSON was written");
    *out = (struct ckpt_blob){(uint8_t *)text, strlen(text)};
    return 0;
}

int json_u64(const json_t *object, const char *key, const char *what, uint64_t *out,
             struct err *err) {
    const json_t *v = json_object_get(object, key);
    if (!json_is_integer(v) || json_integer_value(v) < 0)
        return err_set(err, ERR_CORRUPT, "%s: \"%s\" must be a whole number", what, key);
    *out = (uint64_t)json_integer_value(v);
    return 0;
}

const char *json_text(const json_t *object, const char *key, const char *what, struct err *err) {
    const char *text = json_string_value(json_object_get(object, key));
    if (!text) err_set(err, ERR_CORRUPT, "%s: \"%s\" must be a string", what, key);
    return text;
}

int json_hex(const json_t *object, const char *key, const char *what, void *out, size_t n,
             struct err *err) {
    size_t got = 0;
    const char *text = json_text(object, key, what, err);
    if (!text) return -1;
    if (strlen(text) != 2 * n || sodium_hex2bin(out, n, text, 2 * n, NULL, &got, NULL) || got != n)
        return err_set(err, ERR_CORRUPT, "%s: \"%s\" must be %zu hexadecimal digits", what, key, 2 * n);
    return 0;
}

json_t *json_hex_new(const void *bytes, size_t n) {
    char *text = malloc(2 * n + 1);
    if (!text) return NULL;
    sodium_bin2hex(text, 2 * n + 1, bytes, n);
    json_t *json = json_string(text);
    free(text);
    return json;
}
