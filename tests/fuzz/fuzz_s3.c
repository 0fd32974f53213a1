/* fuzz_s3.c - what a store's server and a person write: XML of lists and errors, an s3:// URL, a file
 * of keys. The first byte says which. */
#include <stdio.h>
#include <stdlib.h>

#include "ckpt/s3.h"
#include "tests/fuzz/fuzz.h"

static void init(void) {
    struct err err;
    int failed = proto_init(&err);
    assert(!failed);
}

static bool take_list(const char *xml, size_t length) {
    const char *end = xml + length, *item, *p = xml;
    bool any = false;
    size_t n;
    while ((p = s3_xml_next(p, end, "Contents", &item, &n))) {
        char key[64], size[32], when[32];
        assert(item >= xml && item + n <= end && p <= end);
        if (s3_xml_text(item, item + n, "Key", key, sizeof key)) assert(memchr(key, '\0', sizeof key));
        if (s3_xml_text(item, item + n, "Size", size, sizeof size)) assert(memchr(size, '\0', sizeof size));
        if (s3_xml_text(item, item + n, "LastModified", when, sizeof when)) s3_time(when);
        any = true;
    }
    return any;
}

/* Whatever a server says, it becomes one line. */
static bool take_error(char *xml, size_t length) {
    static const long statuses[] = {200, 301, 403, 404, 412, 416, 500, 503, 507};
    const struct s3_config config = {.bucket = "bucket", .endpoint = "https://host", .region = "r", .key = "K"};
    struct http_answer a = {.text = xml, .text_bytes = length, .date_s = -1};
    char code[64];
    s3_code(&a, code);
    for (const char *p = code; *p; p++) assert(*p >= ' ' && *p <= '~');
    s3_passes(&a);
    for (size_t i = 0; i < sizeof statuses / sizeof *statuses; i++) {
        struct err err = {0};
        a.status = statuses[i];
        int failed = s3_refusal(&config, &a, "GET", "name", &err);
        assert(failed && err.code && *err.msg);
    }
    return *code;
}

static bool take_url(const char *url) {
    struct s3_config c;
    struct err err = {0};
    memset(&c, 0xa5, sizeof c);
    if (s3_url_parse(url, &c, &err)) {
        assert(err.code == ERR_CONFIG && *err.msg);
        return false;
    }
    assert(strlen(c.bucket) >= 3 && !strpbrk(c.bucket, "/@?&# \r\n") && !*c.key && !*c.secret);
    assert(!*c.prefix || ckpt_name_valid(c.prefix));
    assert(!*c.endpoint || !strpbrk(c.endpoint, "@?&# \r\n"));
    assert(!strpbrk(c.region, "/@?&# \r\n"));
    return true;
}

static bool take(const uint8_t *bytes, size_t length) {
    char *text = calloc(1, length + 1), out[48];
    assert(text);
    if (length > 1) memcpy(text, bytes + 1, length - 1);
    size_t n = length > 1 ? length - 1 : 0;
    bool valid = false;
    switch (length ? bytes[0] % 4 : 3) {
    case 0: valid = take_list(text, n); break;
    case 1: valid = take_error(text, n); break;
    case 2: valid = take_url(text); break;
    case 3:
        valid = s3_ini_value(text, "default", "aws_access_key_id", out, sizeof out);
        if (valid) assert(memchr(out, '\0', sizeof out));
        s3_ini_value(text, "work", "region", out, sizeof out);
        break;
    }
    free(text);
    return valid;
}

static void samples(const struct fuzz_sink *out) {
    static const struct { const char *name, *bytes; } all[] = {
        {"list", "0<ListBucketResult><Contents><Key>a&amp;b</Key><LastModified>2026-11-28T16:00:00.000Z</LastModified>"
                 "<Size>12</Size></Contents><Contents><Key>c</Key></Contents></ListBucketResult>"},
        {"error", "1<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-3</Region></Error>"},
        {"url", "2s3://weights/runs/a?region=auto&endpoint=http://10.0.0.1:7480/&style=path"},
        {"short-url", "2s3://weights"},
        {"keys", "3# mine\n[work]\nregion = x\n[default]\naws_access_key_id = AK\naws_secret_access_key=s/+=\n"},
    };
    static const char *const words[] = {"<Contents>", "</Contents>", "<Key>", "</Key>", "<Code>", "</Code>", "<Error>", "&amp;",
                                        "s3://", "endpoint=https://", "region=", "style=host", "[default]", "[profile ",
                                        "aws_access_key_id", "SignatureDoesNotMatch", "NoSuchBucket"};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        out->sample(out->arg, all[i].name, all[i].bytes, strlen(all[i].bytes));
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) out->word(out->arg, words[i]);
}

const struct fuzz_target fuzz_s3 = {"s3", init, take, samples};
