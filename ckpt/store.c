/* store.c - which kind of store a URL means, and what names an object can have. */
#include "ckpt/internal.h"

#include <string.h>

#include "ckpt/s3.h"

static bool name_char(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
           c == '.' || c == '_' || c == '-';
}

bool ckpt_name_valid(const char *name) {
    size_t n = strlen(name);
    if (n == 0 || n > CKPT_NAME_BYTES_MAX || name[n - 1] == '/') return false;
    for (size_t i = 0; i < n; i++) {
        bool first = i == 0 || name[i - 1] == '/';
        if (first && (name[i] == '.' || name[i] == '/')) return false;
        if (!name_char(name[i]) && name[i] != '/') return false;
    }
    return true;
}

static bool begins(const char *url, const char *scheme) { return !strncmp(url, scheme, strlen(scheme)); }

struct ckpt_store *ckpt_store_open(const char *url, bool create, struct err *err) {
    if (*url && !strstr(url, "://")) return store_file_open(url, create, err);
    if (begins(url, "file:///")) return store_file_open(url + 7, create, err);
    if (begins(url, "s3://")) return store_s3_open(url, err);
    if (begins(url, "https://") || begins(url, "http://")) return store_http_open(url, err);
    err_set(err, ERR_CONFIG, "store \"%.100s\": allowed are a path, file:///ABSOLUTE/FOLDER, s3://BUCKET/PREFIX, and "
            "to read from https://HOST/PATH", url);
    return NULL;
}

bool ckpt_store_remote(const char *url) { return strstr(url, "://") && !begins(url, "file://"); }

int ckpt_store_writable(const char *url, struct err *err) {
    struct s3_config ignored;
    if (begins(url, "s3://")) return s3_url_parse(url, &ignored, err);
    if (begins(url, "file:///")) return 0;
    return err_set(err, ERR_CONFIG, "'%.100s': allowed are file:///FOLDER and s3://BUCKET/PREFIX", url);
}
