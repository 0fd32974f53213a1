/* s3_config.c - an s3:// URL, and what this machine's environment and files say beside it. */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ckpt/s3.h"

#define FILE_BYTES_MAX (64u << 10)

static const char grammar[] = "allowed is s3://BUCKET/PREFIX?endpoint=https://HOST&region=NAME&style=path|host, "
                              "all but BUCKET optional";

/* ---- the URL --------------------------------------------------------------------------------------- */

static int wrong(const char *what, size_t n, const char *why, struct err *err) {
    return err_set(err, ERR_CONFIG, "s3: \"%.*s\" %s; %s", n < 40 ? (int)n : 40, what, why, grammar);
}

static bool copy(const char *from, size_t n, char *out, size_t size) {
    if (n >= size) return false;
    memcpy(out, from, n);
    out[n] = 0;
    return true;
}

static bool all_of(const char *text, const char *more) {
    for (; *text; text++)
        if (!isalnum((unsigned char)*text) && !strchr(more, *text)) return false;
    return true;
}

/* "http://host:port" or https, and nothing after it. */
static int take_endpoint(const char *text, size_t n, struct s3_config *c, struct err *err) {
    while (n > 0 && text[n - 1] == '/') n--;
    size_t scheme = n > 8 && !strncmp(text, "https://", 8) ? 8
                  : n > 7 && !strncmp(text, "http://", 7)  ? 7 : 0;
    if (!scheme || !copy(text, n, c->endpoint, sizeof c->endpoint) || !all_of(c->endpoint + scheme, ".-:[]_"))
        return wrong(text, n, "cannot be an endpoint", err);
    return 0;
}

static int take_region(const char *text, size_t n, struct s3_config *c, struct err *err) {
    if (n > 0 && copy(text, n, c->region, sizeof c->region) && all_of(c->region, "-_")) return 0;
    return wrong(text, n, "cannot be a region", err);
}

/* *style: 'p', 'h', or 0 where it is not said. */
static int take_setting(const char *text, size_t n, struct s3_config *c, char *style, struct err *err) {
    if (n > 9 && !strncmp(text, "endpoint=", 9)) return take_endpoint(text + 9, n - 9, c, err);
    if (n > 7 && !strncmp(text, "region=", 7)) return take_region(text + 7, n - 7, c, err);
    if ((n == 10 && !strncmp(text, "style=path", n)) || (n == 10 && !strncmp(text, "style=host", n))) {
        *style = text[6];
        return 0;
    }
    return wrong(text, n, "is no setting of the store", err);
}

static int parse(const char *url, struct s3_config *c, char *style, struct err *err) {
    *c = (struct s3_config){0};
    if (strncmp(url, "s3://", 5) != 0) return wrong(url, strlen(url), "is no s3 URL", err);
    url += 5;
    size_t path = strcspn(url, "?"), bucket = strcspn(url, "/?");
    if (memchr(url, '@', path))
        return err_set(err, ERR_CONFIG,
                       "s3: a key does not belong into a URL, which others read; put it into "
                       "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a file: INTELLECT_S3_KEY_FILE");
    if (bucket < 3 || !copy(url, bucket, c->bucket, sizeof c->bucket) || !all_of(c->bucket, ".-_") ||
        strstr(c->bucket, "..") || c->bucket[0] == '.')
        return wrong(url, bucket, "cannot be a bucket", err);
    size_t end = path, begin = bucket;
    while (begin < end && url[begin] == '/') begin++;
    while (end > begin && url[end - 1] == '/') end--;
    if (!copy(url + begin, end - begin, c->prefix, sizeof c->prefix) ||
        (*c->prefix && !ckpt_name_valid(c->prefix)))
        return wrong(url + begin, end - begin, "cannot be a prefix: A-Z a-z 0-9 . _ - and /", err);
    if (!copy(url + path, strlen(url + path), c->query, sizeof c->query))
        return wrong(url + path, strlen(url + path), "is too long", err);
    for (const char *p = c->query; *p;) { /* *p is '?' or '&' */
        size_t n = strcspn(++p, "&");
        if (take_setting(p, n, c, style, err)) return -1;
        p += n;
    }
    return 0;
}

int s3_url_parse(const char *url, struct s3_config *out, struct err *err) {
    char style = 0;
    return parse(url, out, &style, err);
}

/* ---- files ------------------------------------------------------------------------------------------ */

/* The next line without blanks at its ends; *from moves behind it. False at the end. */
static bool next_line(const char **from, char *out, size_t size) {
    const char *p = *from, *end = p + strcspn(p, "\n");
    if (!*p) return false;
    *from = *end ? end + 1 : end;
    while (p < end && isspace((unsigned char)*p)) p++;
    while (end > p && isspace((unsigned char)end[-1])) end--;
    if (!copy(p, (size_t)(end - p), out, size)) out[0] = 0;
    return true;
}

/* "[default]", and "[profile NAME]" as the configuration file has it. */
static bool is_section(const char *line, const char *section) {
    size_t n = strlen(line), s = strlen(section);
    if (n < 2 || line[n - 1] != ']') return false;
    line++, n -= 2;
    if (n > 8 && !strncmp(line, "profile ", 8)) line += 8, n -= 8;
    return n == s && !strncmp(line, section, s);
}

bool s3_ini_value(const char *text, const char *section, const char *key, char *out, size_t size) {
    char line[4096];
    bool inside = !strcmp(section, "default"), found = false;
    while (next_line(&text, line, sizeof line)) {
        if (*line == '[') inside = is_section(line, section);
        char *equals = strchr(line, '=');
        if (!inside || *line == '#' || *line == ';' || *line == '[' || !equals) continue;
        char *end = equals, *value = equals + 1;
        while (end > line && isspace((unsigned char)end[-1])) end--;
        while (isspace((unsigned char)*value)) value++;
        if ((size_t)(end - line) == strlen(key) && !strncmp(line, key, strlen(key)))
            found = copy(value, strlen(value), out, size);
    }
    return found;
}

/* NULL without an error where the file is not there and need not be. */
static char *read_file(const char *path, bool needed, struct err *err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        if (needed || errno != ENOENT) {
            err_set_errno(err, "%.150s", path);
            if (err) err->code = ERR_CONFIG;
        }
        return NULL;
    }
    char *text = calloc(1, FILE_BYTES_MAX + 1);
    ssize_t n = text ? read(fd, text, FILE_BYTES_MAX) : -1;
    close(fd);
    if (n >= 0 && n < (ssize_t)FILE_BYTES_MAX) return text;
    err_set(err, ERR_CONFIG, "%.150s: does not read as a file of keys", path);
    free(text);
    return NULL;
}

/* A file of AWS' tools: the variable, or below the home. */
static void aws_path(const char *variable, const char *name, char out[4096]) {
    const char *given = getenv(variable), *home = getenv("HOME");
    if (given && *given) snprintf(out, 4096, "%s", given);
    else snprintf(out, 4096, "%s/.aws/%s", home ? home : "", name);
}

/* ---- who we are ------------------------------------------------------------------------------------- */

static int take_key(struct s3_config *c, const char *key, const char *secret, const char *token,
                    const char *source, struct err *err) {
    snprintf(c->source, sizeof c->source, "%s", source);
    if (*key && *secret && copy(key, strlen(key), c->key, sizeof c->key) &&
        copy(secret, strlen(secret), c->secret, sizeof c->secret) &&
        copy(token, strlen(token), c->token, sizeof c->token) && all_of(key, "-_.+/=:@") &&
        !strpbrk(token, "\r\n"))
        return 0;
    c->key[0] = 0;
    return err_set(err, ERR_CONFIG, "%.120s: %s", source,
                   !*secret ? "an access key without its secret key"
                   : !*key  ? "a secret key without its access key" : "this is no access key");
}

static int key_from_file(struct s3_config *c, const char *path, const char *section, bool needed,
                         struct err *err) {
    char key[129] = "", secret[129] = "", token[2049] = "", source[257];
    struct err e = {0};
    char *text = read_file(path, needed, &e);
    if (!text && !e.code) return 0;
    if (!text) {
        if (err) *err = e;
        return -1;
    }
    bool any = s3_ini_value(text, section, "aws_access_key_id", key, sizeof key);
    any |= s3_ini_value(text, section, "aws_secret_access_key", secret, sizeof secret);
    s3_ini_value(text, section, "aws_session_token", token, sizeof token);
    memset(text, 0, FILE_BYTES_MAX);
    free(text);
    snprintf(source, sizeof source, "%.180s [%.60s]", path, section);
    if (any) return take_key(c, key, secret, token, source, err);
    if (!needed) return 0;
    return err_set(err, ERR_CONFIG, "%.150s: no aws_access_key_id and aws_secret_access_key of [%.40s]",
                   path, section);
}

static const char *env(const char *name) {
    const char *v = getenv(name);
    return v ? v : "";
}

static int load_key(struct s3_config *c, const char *profile, struct err *err) {
    char path[4096];
    const char *file = env("INTELLECT_S3_KEY_FILE"), *key = env("AWS_ACCESS_KEY_ID");
    const char *secret = env("AWS_SECRET_ACCESS_KEY");
    if (*file) return key_from_file(c, file, "default", true, err);
    if (*key || *secret) return take_key(c, key, secret, env("AWS_SESSION_TOKEN"), "the environment", err);
    aws_path("AWS_SHARED_CREDENTIALS_FILE", "credentials", path);
    return key_from_file(c, path, profile, *env("AWS_PROFILE") || *env("AWS_SHARED_CREDENTIALS_FILE"), err);
}

static const char *first_of(const char *a, const char *b, const char *c) { return *a ? a : *b ? b : c; }

int s3_config_load(const char *url, struct s3_config *out, struct err *err) {
    char path[4096], region[64] = "", endpoint[257] = "", style = 0;
    const char *profile = first_of(env("AWS_PROFILE"), "default", "");
    struct err e = {0};
    if (parse(url, out, &style, err) || load_key(out, profile, err)) return -1;
    aws_path("AWS_CONFIG_FILE", "config", path);
    char *text = read_file(path, false, &e);
    if (!text && e.code) {
        if (err) *err = e;
        return -1;
    }
    if (text) {
        s3_ini_value(text, profile, "region", region, sizeof region);
        s3_ini_value(text, profile, "endpoint_url", endpoint, sizeof endpoint);
        free(text);
    }
    const char *r = *out->region ? out->region : first_of(env("AWS_REGION"), env("AWS_DEFAULT_REGION"),
                                                          region);
    if (!*out->region && take_region(*r ? r : "us-east-1", *r ? strlen(r) : 9, out, err)) return -1;
    const char *given = first_of(env("AWS_ENDPOINT_URL_S3"), env("AWS_ENDPOINT_URL"), endpoint);
    if (!*out->endpoint && *given && take_endpoint(given, strlen(given), out, err)) return -1;
    if (!*out->endpoint) snprintf(out->endpoint, sizeof out->endpoint, "https://s3.%s.amazonaws.com",
                                  out->region);
    const char *host = strstr(out->endpoint, "//") + 2;
    size_t n = strcspn(host, ":");
    bool aws = n > 14 && !strncmp(host + n - 14, ".amazonaws.com", 14);
    out->path_style = style ? style == 'p' : !aws || strchr(out->bucket, '.');
    out->loopback = http_loopback(host);
    return 0;
}
