/* test_s3.c - the stores behind a network, without one: URLs, keys, what servers say in words, which
 * failures pass; and requests against a server in this process that answers by a script. */
#define _GNU_SOURCE /* strcasestr */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <arpa/inet.h>
#include <cmocka.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "ckpt/s3.h"

static char folder[] = "/tmp/test-s3-XXXXXX";

static const char *variables[] = {
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "INTELLECT_S3_KEY_FILE",
    "INTELLECT_STORE_TRIES", "INTELLECT_STORE_STALL_S", "INTELLECT_STORE_STREAMS", "INTELLECT_STORE_PART_MIB",
    "INTELLECT_STORE_UP_MBIT", "INTELLECT_STORE_DOWN_MBIT", "INTELLECT_STORE_SPOOL"};

/* Nothing of the machine that the tests run on. */
static int clean(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof variables / sizeof *variables; i++) unsetenv(variables[i]);
    setenv("HOME", folder, 1);
    return 0;
}

static const char *write_file(const char *name, const char *text) {
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "w");
    fputs(text, f);
    fclose(f);
    return path;
}

/* ---- signed URLs ------------------------------------------------------------------------------------ */

/* The example in AWS' manual, "Authenticating Requests: Using Query Parameters". */
static void a_url_is_signed_as_in_the_manual(void **state) {
    (void)state;
    struct s3_config c = {.bucket = "examplebucket", .endpoint = "https://s3.amazonaws.com",
                          .region = "us-east-1",
                          .key = "AKIAIOSFODNN7EXAMPLE", .secret = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"};
    struct s3_presign p = {.method = HTTP_GET, .name = "test.txt", .expires_s = 86400};
    char url[2048];
    struct err err = {0};
    if (s3_presign(&c, &p, 1369353600, url, sizeof url, &err)) fail_msg("%s", err.msg);
    assert_string_equal(url, "https://examplebucket.s3.amazonaws.com/test.txt?X-Amz-Algorithm=AWS4-HMAC-SHA256"
                             "&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20130524%2Fus-east-1%2Fs3%2Faws4_request"
                             "&X-Amz-Date=20130524T000000Z&X-Amz-Expires=86400&X-Amz-SignedHeaders=host"
                             "&X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404");
    assert_null(strstr(url, c.secret));
    /* The port that goes without saying is in no Host header. */
    char other[2048];
    snprintf(c.endpoint, sizeof c.endpoint, "https://s3.amazonaws.com:443");
    assert_int_equal(s3_presign(&c, &p, 1369353600, other, sizeof other, &err), 0);
    assert_string_equal(strstr(other, "Signature="), strstr(url, "Signature="));
    assert_int_equal(s3_presign(&c, &p, 1369353600, other, strlen(url), &err), -1);
    assert_int_equal(err.code, ERR_CONFIG);
    c.key[0] = 0;
    assert_int_equal(s3_presign(&c, &p, 1369353600, other, sizeof other, &err), -1);
    assert_int_equal(err.code, ERR_REFUSED);
}

/* ---- URLs ------------------------------------------------------------------------------------------- */

static void a_url_says_bucket_prefix_and_settings(void **state) {
    (void)state;
    struct s3_config c;
    struct err err = {0};
    assert_int_equal(s3_url_parse("s3://weights/runs/a", &c, &err), 0);
    assert_string_equal(c.bucket, "weights");
    assert_string_equal(c.prefix, "runs/a");
    assert_string_equal(c.endpoint, "");
    assert_int_equal(s3_url_parse("s3://weights//", &c, &err), 0);
    assert_string_equal(c.prefix, "");
    assert_int_equal(s3_url_parse("s3://w.x-1/a/?region=auto&endpoint=http://10.0.0.1:7480/&style=host", &c, &err), 0);
    assert_string_equal(c.bucket, "w.x-1");
    assert_string_equal(c.prefix, "a");
    assert_string_equal(c.region, "auto");
    assert_string_equal(c.endpoint, "http://10.0.0.1:7480");
    assert_string_equal(c.query, "?region=auto&endpoint=http://10.0.0.1:7480/&style=host");
}

static void a_url_that_means_nothing_is_refused(void **state) {
    (void)state;
    static const char *const bad[] = {
        "s3:/b/c", "s3://", "s3:///p", "s3://ab", "s3://../x", "s3://a/../b", "s3://buck et/x", "s3://bucket/a b",
        "s3://bucket/.hidden", "s3://bucket/x?", "s3://bucket/x?region=", "s3://bucket/x?region=a&", "s3://bucket/x?size=3",
        "s3://bucket/x?style=both", "s3://bucket/x?endpoint=ftp://h", "s3://bucket/x?endpoint=https://",
        "s3://bucket/x?endpoint=https://h/path", "s3://bucket/x?endpoint=https://u:p@h",
        "s3://bucket/x?endpoint=http://h\r\nHost: x", "s3://bucket/x?region=a\r\nb"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct s3_config c;
        struct err err = {0};
        if (!s3_url_parse(bad[i], &c, &err)) fail_msg("%s was taken", bad[i]);
        assert_int_equal(err.code, ERR_CONFIG);
        assert_int_equal(ckpt_store_writable(bad[i], &err), -1);
    }
}

/* A key in a URL would go into the genesis, and to everybody; nor may the refusal repeat it. */
static void a_key_in_a_url_is_refused_and_not_repeated(void **state) {
    (void)state;
    struct s3_config c;
    struct err err = {0};
    assert_int_equal(s3_url_parse("s3://AKIDX:sesame@bucket/x", &c, &err), -1);
    assert_null(strstr(err.msg, "sesame"));
    assert_non_null(strstr(err.msg, "AWS_SECRET_ACCESS_KEY"));
    struct ckpt_store *s = ckpt_store_open("https://user:sesame@host/x", false, &err);
    assert_null(s);
    assert_null(strstr(err.msg, "sesame"));
}

static void the_settings_of_a_url_stay_behind_the_names(void **state) {
    (void)state;
    char url[PROTO_URL_BYTES_MAX + 1], back[PROTO_URL_BYTES_MAX + 1];
    static const char *const pairs[][2] = {
        {"s3://b/p/?region=x", "s3://b/p/step-000000000042?region=x"},
        {"s3://bucket", "s3://bucket/step-000000000042"},
        {"file:///a/b?c", "file:///a/b?c/step-000000000042"},
        {"https://host/p?sig=1/2", "https://host/p/step-000000000042?sig=1/2"}};
    for (size_t i = 0; i < 4; i++) {
        assert_int_equal(ckpt_url(pairs[i][0], 42, url, NULL), 0);
        assert_string_equal(url, pairs[i][1]);
        ckpt_store_url(url, 42, back);
        assert_int_equal(ckpt_url(back, 42, url, NULL), 0);
        assert_string_equal(url, pairs[i][1]);
        ckpt_store_url(url, 41, back); /* another checkpoint's is no part of it */
        assert_string_equal(url, back);
    }
}

/* Over plain http whoever is on the way could change a plain model folder, which has no signature. */
static void plain_http_is_for_this_machine(void **state) {
    (void)state;
    struct err err = {0};
    static const char *const here[] = {"http://127.0.0.1:80/x", "http://localhost/x", "http://[::1]:8/x", "https://any/x"};
    static const char *const there[] = {"http://example.org/x", "http://127.example.org/x", "http://localhost.evil/x",
                                        "http://127.0.0.1@evil/x", "http://10.0.0.1/x"};
    for (size_t i = 0; i < 4; i++) {
        struct ckpt_store *s = ckpt_store_open(here[i], false, &err);
        if (!s) fail_msg("%s: %s", here[i], err.msg);
        s->ops->close(s);
    }
    for (size_t i = 0; i < 5; i++) {
        if (ckpt_store_open(there[i], false, &err)) fail_msg("%s was taken", there[i]);
        assert_int_equal(err.code, ERR_CONFIG);
    }
}

/* ---- where the store is, and the key ---------------------------------------------------------------- */

static void load(const char *url, struct s3_config *c) {
    struct err err = {0};
    if (s3_config_load(url, c, &err)) fail_msg("%s", err.msg);
}

static void what_a_url_leaves_open_the_machine_says(void **state) {
    (void)state;
    struct s3_config c;
    load("s3://bucket/x", &c);
    assert_string_equal(c.endpoint, "https://s3.us-east-1.amazonaws.com");
    assert_false(c.path_style);
    assert_string_equal(c.key, "");
    load("s3://dotted.bucket/x", &c); /* no certificate is good for two labels */
    assert_true(c.path_style);
    setenv("AWS_REGION", "eu-west-3", 1);
    load("s3://bucket/x", &c);
    assert_string_equal(c.endpoint, "https://s3.eu-west-3.amazonaws.com");
    setenv("AWS_CONFIG_FILE", write_file("config", "[default]\nregion = from-file\nendpoint_url = https://file.example\n"
                                         "[profile work]\nregion=work-1\n"), 1);
    load("s3://bucket/x", &c);
    assert_string_equal(c.region, "eu-west-3");
    assert_string_equal(c.endpoint, "https://file.example");
    assert_true(c.path_style);
    unsetenv("AWS_REGION");
    load("s3://bucket/x", &c);
    assert_string_equal(c.region, "from-file");
    setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9000", 1);
    load("s3://bucket/x?region=here&style=host", &c);
    assert_string_equal(c.endpoint, "http://127.0.0.1:9000");
    assert_string_equal(c.region, "here");
    assert_true(c.loopback && !c.path_style);
}

static void a_key_comes_from_file_environment_or_shared_file(void **state) {
    (void)state;
    struct s3_config c;
    struct err err = {0};
    setenv("AWS_SHARED_CREDENTIALS_FILE",
           write_file("credentials", "# mine\n[default]\naws_access_key_id = AKD\naws_secret_access_key=sd/+=\n\n"
                      "[work]\n aws_access_key_id=AKW\n\taws_secret_access_key =  sw \naws_session_token = tw\n"), 1);
    load("s3://bucket/x", &c);
    assert_string_equal(c.key, "AKD");
    assert_string_equal(c.secret, "sd/+=");
    assert_non_null(strstr(c.source, "credentials [default]"));
    setenv("AWS_PROFILE", "work", 1);
    load("s3://bucket/x", &c);
    assert_string_equal(c.key, "AKW");
    assert_string_equal(c.secret, "sw");
    assert_string_equal(c.token, "tw");
    setenv("AWS_PROFILE", "absent", 1);
    assert_int_equal(s3_config_load("s3://bucket/x", &c, &err), -1);
    assert_non_null(strstr(err.msg, "[absent]"));
    unsetenv("AWS_PROFILE");
    setenv("AWS_ACCESS_KEY_ID", "AKE", 1);
    assert_int_equal(s3_config_load("s3://bucket/x", &c, &err), -1); /* half a key */
    assert_int_equal(err.code, ERR_CONFIG);
    setenv("AWS_SECRET_ACCESS_KEY", "se", 1);
    load("s3://bucket/x", &c);
    assert_string_equal(c.key, "AKE");
    assert_string_equal(c.source, "the environment");
    setenv("INTELLECT_S3_KEY_FILE", write_file("key", "aws_access_key_id=AKF\naws_secret_access_key=sf\n"), 1);
    load("s3://bucket/x", &c);
    assert_string_equal(c.key, "AKF");
    setenv("INTELLECT_S3_KEY_FILE", "/no/such/file", 1);
    assert_int_equal(s3_config_load("s3://bucket/x", &c, &err), -1);
    assert_int_equal(err.code, ERR_CONFIG);
    assert_non_null(strstr(err.msg, "/no/such/file"));
}

/* ---- what servers write ----------------------------------------------------------------------------- */

static bool text(const char *xml, const char *tag, char *out, size_t size) {
    return s3_xml_text(xml, xml + strlen(xml), tag, out, size);
}

static void xml_is_read_within_its_bounds(void **state) {
    (void)state;
    char out[16];
    const char *content;
    size_t n;
    assert_true(text("<a><Key>x&amp;y&quot;</Key></a>", "Key", out, sizeof out));
    assert_string_equal(out, "x&y\"");
    assert_true(text("<Key></Key>", "Key", out, sizeof out));
    assert_string_equal(out, "");
    assert_false(text("<Key>0123456789abcdef</Key>", "Key", out, sizeof out)); /* one too long */
    assert_true(text("<Key>0123456789abcde</Key>", "Key", out, sizeof out));
    assert_false(text("<Key>x", "Key", out, sizeof out));
    assert_false(text("</Key><Key>", "Key", out, sizeof out));
    assert_false(text("", "Key", out, sizeof out));
    const char *two = "<C><Key>1</Key></C><C><Key>2</Key></C>", *end = two + strlen(two);
    const char *p = s3_xml_next(two, end, "C", &content, &n);
    assert_true(s3_xml_text(content, content + n, "Key", out, sizeof out) && !strcmp(out, "1"));
    assert_false(s3_xml_text(content, content + n, "Other", out, sizeof out));
    p = s3_xml_next(p, end, "C", &content, &n);
    assert_true(s3_xml_text(content, content + n, "Key", out, sizeof out) && !strcmp(out, "2"));
    assert_null(s3_xml_next(p, end, "C", &content, &n));
    assert_int_equal(s3_time("2026-11-28T16:00:00.123Z"), 1795881600);
    assert_int_equal(s3_time("yesterday"), -1);
}

/* Cut and changed anywhere, a list is read without reading beyond it; the sanitizers watch. */
static void broken_xml_is_harmless(void **state) {
    (void)state;
    static const char good[] = "<R><Contents><Key>a&amp;b</Key><Size>12</Size></Contents><Contents><Key>c</Key>"
                               "</Contents><IsTruncated>true</IsTruncated><Error><Code>X</Code></Error></R>";
    uint32_t x = 1;
    for (int i = 0; i < 20000; i++) {
        size_t n = sizeof good - 1 - (size_t)(i % 3 ? 0 : (x >> 3) % (sizeof good - 1));
        char *xml = malloc(n + 1), out[8]; /* exactly as long as it is */
        memcpy(xml, good, n);
        for (int hits = i % 4; hits > 0 && n; hits--) {
            x = x * 1664525 + 1013904223;
            xml[(x >> 8) % n] = (char)(x & 1 ? "<>/&;K"[(x >> 4) % 6] : (int)(x >> 24));
        }
        const char *content;
        size_t length;
        for (const char *p = xml; (p = s3_xml_next(p, xml + n, "Contents", &content, &length));) {
            assert_true(content >= xml && content + length <= xml + n && p <= xml + n);
            s3_xml_text(content, content + length, "Key", out, sizeof out);
        }
        free(xml);
    }
}

struct refusal {
    long status;
    const char *code;
    enum err_code expected;
    const char *word;
};

static int refuse(const struct s3_config *c, long status, const char *code, const char *more, struct err *err) {
    char xml[512];
    snprintf(xml, sizeof xml, "<?xml version=\"1.0\"?>\n<Error><Code>%s</Code>%s</Error>", code, more);
    struct http_answer a = {.status = status, .text = xml, .text_bytes = *code ? strlen(xml) : 0, .tries = 3,
                            .date_s = time(NULL) - 1000};
    if (!*code) xml[0] = 0;
    return s3_refusal(c, &a, "PUT", "runs/a/latest", err);
}

/* Wrong key, wrong secret, wrong bucket, wrong clock, no space: each needs something else done. */
static void every_refusal_says_what_to_do(void **state) {
    (void)state;
    static const struct refusal all[] = {
        {403, "SignatureDoesNotMatch", ERR_REFUSED, "wrong secret key"},
        {403, "InvalidAccessKeyId", ERR_REFUSED, "access key AKX (from a test) is not known"},
        {403, "RequestTimeTooSkewed", ERR_CONFIG, "1000 s ahead"},
        {403, "AccessDenied", ERR_REFUSED, "no right"},
        {403, "", ERR_REFUSED, "no right"},
        {400, "ExpiredToken", ERR_REFUSED, "session token"},
        {403, "ExpiredToken", ERR_REFUSED, "session token"},
        {404, "NoSuchBucket", ERR_CONFIG, "no bucket weights at https://s3.example"},
        {404, "NoSuchKey", ERR_NOT_FOUND, "s3://weights/runs/a/latest"},
        {404, "", ERR_NOT_FOUND, "not there"},
        {412, "PreconditionFailed", ERR_STALE, "first"},
        {416, "InvalidRange", ERR_TRUNCATED, "range"},
        {403, "QuotaExceeded", ERR_FULL, "quota"},
        {507, "", ERR_FULL, "full"},
        {507, "XMinioStorageFull", ERR_FULL, "XMinioStorageFull"},
        {400, "XAmzContentSHA256Mismatch", ERR_CORRUPT, "changed on their way"},
        {503, "SlowDown", ERR_TIMEOUT, "503 SlowDown (tried 3 times)"},
        {500, "InternalError", ERR_TIMEOUT, "500"},
        {501, "NotImplemented", ERR_UNSUPPORTED, "cannot"},
        {400, "InvalidArgument", ERR_IO, "400 InvalidArgument"},
    };
    struct s3_config c = {.bucket = "weights", .endpoint = "https://s3.example", .region = "r1", .key = "AKX",
                          .source = "a test"};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        struct err err = {0};
        assert_int_equal(refuse(&c, all[i].status, all[i].code, "", &err), -1);
        if (err.code != all[i].expected || !strstr(err.msg, all[i].word))
            fail_msg("%ld %s: code %d: %s", all[i].status, all[i].code, err.code, err.msg);
    }
    struct err err = {0};
    refuse(&c, 301, "PermanentRedirect", "<Region>eu-west-3</Region>", &err);
    assert_non_null(strstr(err.msg, "in region eu-west-3, not in r1"));
    c.key[0] = 0;
    refuse(&c, 403, "AccessDenied", "", &err);
    assert_non_null(strstr(err.msg, "there is no key here"));
}

static void what_passes_is_tried_again(void **state) {
    (void)state;
    static const long passes[] = {408, 429, 500, 502, 503, 504}, stays[] = {200, 206, 301, 400, 403, 404, 412, 416, 501, 507};
    for (size_t i = 0; i < 6; i++) assert_true(http_status_passes(passes[i]));
    for (size_t i = 0; i < 10; i++) assert_false(http_status_passes(stays[i]));
    struct http_answer a = {.text = (char[]){"<Error><Code>RequestTimeout</Code></Error>"}};
    a.text_bytes = strlen(a.text);
    assert_true(s3_passes(&a));
    a.text = (char[]){"<Error><Code>NoSuchKey</Code></Error>"};
    a.text_bytes = strlen(a.text);
    assert_false(s3_passes(&a));
}

/* Many members whose store was away come back over a time, not all at once. */
static void pauses_grow_and_differ(void **state) {
    (void)state;
    for (uint32_t try = 1, most = HTTP_PAUSE_MS; try < 40; try++) {
        assert_int_equal(http_pause_ms(try, 0, 0), most / 2);
        assert_int_equal(http_pause_ms(try, 0, most / 2), most);
        assert_true(http_pause_ms(try, 0, UINT32_MAX) <= most);
        most = 2 * most < HTTP_PAUSE_MS_MAX ? 2 * most : HTTP_PAUSE_MS_MAX;
    }
    assert_true(http_pause_ms(1, 7, 999) >= 7000);           /* what the server asks for */
    assert_true(http_pause_ms(1, UINT64_MAX, 0) <= 121000);  /* within reason */
}

static void limits_are_checked(void **state) {
    (void)state;
    struct http_limits l;
    struct err err = {0};
    assert_int_equal(http_limits_load(&l, &err), 0);
    assert_int_equal(l.tries, 10);
    assert_int_equal(l.up_bytes_s, 0);
    setenv("INTELLECT_STORE_UP_MBIT", "80", 1);
    assert_int_equal(http_limits_load(&l, &err), 0);
    assert_int_equal(l.up_bytes_s, 10000000);
    static const char *const bad[] = {"0", "-1", "many", "4 ", "99999999999999999999", "101"};
    for (size_t i = 0; i < 6; i++) {
        setenv("INTELLECT_STORE_TRIES", bad[i], 1);
        assert_int_equal(http_limits_load(&l, &err), -1);
        assert_non_null(strstr(err.msg, "INTELLECT_STORE_TRIES"));
        assert_non_null(strstr(err.msg, "1 to 100"));
    }
}

static void parts_stay_under_ten_thousand(void **state) {
    (void)state;
    const uint64_t mib = 1 << 20;
    assert_int_equal(s3_part_bytes(1, 8), 8 * mib);
    assert_int_equal(s3_part_bytes(80000 * mib, 8), 8 * mib);
    assert_int_equal(s3_part_bytes(80000 * mib + 1, 8), 9 * mib);
    assert_int_equal(s3_part_bytes(5000000000000u, 5), 477 * mib);
}

/* ---- a server that answers by a script -------------------------------------------------------------- */

#define RESET "reset"  /* close with data unread: the client sees a reset */
#define STALL "stall"  /* say nothing until the client leaves */

struct script {
    int listener, port;
    const char *const *answer; /* one a connection; the last one again and again */
    uint32_t asked;            /* connections so far; under no lock: read when the requests are over */
    char request[8][2048];     /* the first bytes of each */
    pthread_t thread;
};

static void answer_one(struct script *s, int fd) {
    const char *answer = s->answer[0];
    for (uint32_t i = 0; i < s->asked && s->answer[i + 1]; i++) answer = s->answer[i + 1];
    char *head = s->request[s->asked < 8 ? s->asked : 7];
    s->asked++;
    ssize_t n = recv(fd, head, sizeof s->request[0] - 1, 0);
    head[n > 0 ? n : 0] = 0;
    if (!strcmp(answer, RESET)) {
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &(struct linger){1, 0}, sizeof(struct linger));
    } else if (!strcmp(answer, STALL)) {
        while (recv(fd, (char[64]){0}, 64, 0) > 0) continue;
    } else {
        send(fd, answer, strlen(answer), MSG_NOSIGNAL);
        shutdown(fd, SHUT_WR);
        while (recv(fd, (char[4096]){0}, 4096, 0) > 0) continue;
    }
    close(fd);
}

static void *serve(void *arg) {
    struct script *s = arg;
    for (int fd; (fd = accept(s->listener, NULL, NULL)) >= 0;) answer_one(s, fd);
    return NULL;
}

static void script_start(struct script *s, const char *const *answers) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof a;
    *s = (struct script){.listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), .answer = answers};
    assert_int_equal(bind(s->listener, (struct sockaddr *)&a, sizeof a), 0);
    assert_int_equal(listen(s->listener, 16), 0);
    assert_int_equal(getsockname(s->listener, (struct sockaddr *)&a, &length), 0);
    s->port = ntohs(a.sin_port);
    assert_int_equal(pthread_create(&s->thread, NULL, serve, s), 0);
}

static void script_end(struct script *s) {
    shutdown(s->listener, SHUT_RDWR);
    pthread_join(s->thread, NULL);
    close(s->listener);
}

static struct ckpt_store *open_s3(const struct script *s) {
    char url[128];
    struct err err = {0};
    setenv("AWS_ACCESS_KEY_ID", "AKX", 1);
    setenv("AWS_SECRET_ACCESS_KEY", "sesame", 1);
    snprintf(url, sizeof url, "s3://bucket/p?endpoint=http://127.0.0.1:%d", s->port);
    struct ckpt_store *store = ckpt_store_open(url, false, &err);
    if (!store) fail_msg("%s", err.msg);
    return store;
}

#define OK(headers, body) "HTTP/1.1 200 OK\r\nConnection: close\r\n" headers "\r\n" body
#define PARTIAL(length, range, body) \
    "HTTP/1.1 206 Partial Content\r\nConnection: close\r\nContent-Length: " length "\r\nContent-Range: bytes " range "\r\n\r\n" body
#define STATUS(status, body) "HTTP/1.1 " status "\r\nConnection: close\r\n\r\n" body
#define FULL PARTIAL("4", "0-3/4", "data")

/* Whatever happened on the way, the bytes are the right ones in the end. */
static void a_read_gets_through(void **state) {
    (void)state;
    static const char *const first[] = {
        RESET, STATUS("503 Slow Down", "<Error><Code>SlowDown</Code></Error>"), STATUS("429 Too Many", ""),
        PARTIAL("4", "0-3/4", "da"),  /* cut */
        PARTIAL("2", "0-1/4", "da"),  /* an honest part of what was asked for, and not the end of the object */
        STATUS("500 Oh", ""), STATUS("400 Bad", "<Error><Code>RequestTimeout</Code></Error>"), ""};
    for (size_t i = 0; i < sizeof first / sizeof *first; i++) {
        const char *answers[] = {first[i], FULL, NULL};
        struct script s;
        struct err err = {0};
        char data[4];
        script_start(&s, answers);
        struct ckpt_store *store = open_s3(&s);
        if (store->ops->get(store, "x", 0, data, 4, &err)) fail_msg("answer %zu: %s", i, err.msg);
        assert_memory_equal(data, "data", 4);
        store->ops->close(store);
        script_end(&s);
        assert_int_equal(s.asked, 2);
        assert_non_null(strstr(s.request[0], "GET /bucket/p/x HTTP/1.1"));
        assert_non_null(strcasestr(s.request[0], "Range: bytes=0-3"));
        assert_non_null(strstr(s.request[0], "Authorization: AWS4-HMAC-SHA256 Credential=AKX/"));
        assert_null(strstr(s.request[0], "sesame"));
    }
}

/* An ETag cut in half is no version to compare with. */
static void an_answer_cut_in_its_head_is_none(void **state) {
    (void)state;
    static const char *const answers[] = {"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nETag: \"ab",
                                          OK("Content-Length: 4\r\nETag: \"abc\"\r\n", ""), NULL};
    struct script s;
    struct err err = {0};
    struct ckpt_object o;
    script_start(&s, answers);
    struct ckpt_store *store = open_s3(&s);
    if (store->ops->stat(store, "x", &o, &err)) fail_msg("%s", err.msg);
    assert_string_equal(o.version, "\"abc\"");
    store->ops->close(store);
    script_end(&s);
}

/* Nothing comes any more, and the connection stands: found by the stall detector. */
static void a_stalled_read_is_tried_again(void **state) {
    (void)state;
    static const char *const answers[] = {STALL, FULL, NULL};
    struct script s;
    struct err err = {0};
    char data[4];
    setenv("INTELLECT_STORE_STALL_S", "1", 1);
    script_start(&s, answers);
    struct ckpt_store *store = open_s3(&s);
    if (store->ops->get(store, "x", 0, data, 4, &err)) fail_msg("%s", err.msg);
    store->ops->close(store);
    script_end(&s);
    assert_int_equal(s.asked, 2);
}

static void tries_come_to_an_end(void **state) {
    (void)state;
    static const char *const away[] = {STATUS("503 Slow Down", "<Error><Code>SlowDown</Code></Error>"), NULL};
    static const char *const cut[] = {RESET, NULL};
    static const char *const no[] = {STATUS("403 No", "<Error><Code>AccessDenied</Code></Error>"), NULL};
    struct err err = {0};
    char data[4];
    setenv("INTELLECT_STORE_TRIES", "3", 1);
    for (int i = 0; i < 3; i++) {
        struct script s;
        script_start(&s, i == 0 ? away : i == 1 ? cut : no);
        struct ckpt_store *store = open_s3(&s);
        assert_int_equal(store->ops->get(store, "x", 0, data, 4, &err), -1);
        assert_int_equal(err.code, i == 2 ? ERR_REFUSED : ERR_TIMEOUT);
        assert_non_null(strstr(err.msg, i == 0 ? "503 SlowDown (tried 3 times)" : i == 1 ? "(tried 3 times)" : "AccessDenied"));
        store->ops->close(store);
        script_end(&s);
        assert_int_equal(s.asked, i == 2 ? 1 : 3); /* what does not pass is not asked again */
    }
}

/* A server may send anything; not more than there is room for, and not from elsewhere in the object. */
static void more_than_was_asked_for_is_refused(void **state) {
    (void)state;
    static const char *const more[] = {PARTIAL("9", "0-8/9", "too much!"), NULL};
    static const char *const whole[] = {OK("Content-Length: 9\r\n", "0123456789"), NULL};
    struct script s;
    struct err err = {0};
    char data[5] = "....";
    script_start(&s, more);
    struct ckpt_store *store = open_s3(&s);
    assert_int_equal(store->ops->get(store, "x", 0, data, 4, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    store->ops->close(store);
    script_end(&s);
    script_start(&s, whole); /* knows no ranges: good for the beginning alone */
    store = open_s3(&s);
    assert_int_equal(store->ops->get(store, "x", 0, data, 4, &err), 0);
    assert_string_equal(data, "0123");
    assert_int_equal(store->ops->get(store, "x", 2, data, 4, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    store->ops->close(store);
    script_end(&s);
}

#define ABSENT STATUS("404 Not Found", "")
#define NO_KEY STATUS("404 Not Found", "<Error><Code>NoSuchKey</Code></Error>")
#define CONFLICT STATUS("412 Precondition Failed", "<Error><Code>PreconditionFailed</Code></Error>")

/* The answer to our put was lost; the next try meets our own object. That is a success, and the object
 * of another writer is not. */
static void a_put_whose_answer_was_lost_is_known_again(void **state) {
    (void)state;
    for (int ours = 0; ours < 2; ours++) {
        const char *answers[] = {ABSENT, NO_KEY, RESET, CONFLICT, OK("Content-Length: 4\r\n", ""),
                                 ours ? FULL : PARTIAL("4", "0-3/4", "evil"), NULL};
        struct script s;
        struct err err = {0};
        script_start(&s, answers);
        struct ckpt_store *store = open_s3(&s);
        int r = store->ops->put(store, "claim", "data", 4, CKPT_ABSENT, &err);
        assert_int_equal(r, ours ? 0 : -1);
        if (!ours) assert_int_equal(err.code, ERR_STALE);
        store->ops->close(store);
        script_end(&s);
        assert_int_equal(s.asked, 6);
        assert_non_null(strstr(s.request[2], "If-None-Match: *"));
        assert_non_null(strstr(s.request[2], /* the SHA-256 of "data": the server checks it */
                               "x-amz-content-sha256: 3a6eb0790f39ac87c94f3856b2dd2c5d110e6811602261a9a923d3bb23adc8b7"));
    }
}

/* Whoever closes a store does not wait for the pauses between tries. */
static void a_cancelled_store_gives_up_soon(void **state) {
    (void)state;
    static const char *const answers[] = {STALL, NULL};
    struct script s;
    struct err err = {0};
    char data[4];
    script_start(&s, answers);
    struct ckpt_store *store = open_s3(&s);
    store->ops->cancel(store);
    assert_int_equal(store->ops->get(store, "x", 0, data, 4, &err), -1);
    assert_int_equal(err.code, ERR_REFUSED);
    store->ops->close(store);
    script_end(&s);
    assert_int_equal(s.asked, 0);
}

/* A web server: names behind the URL, settings behind them, nothing but reading. */
static void a_web_server_is_read_from(void **state) {
    (void)state;
    static const char *const answers[] = {STATUS("405 No HEAD", ""), PARTIAL("1", "0-0/4", "d"), FULL,
                                          STATUS("404 Not Found", ""), NULL};
    struct script s;
    struct err err = {0};
    struct ckpt_object o;
    char url[128], data[4];
    script_start(&s, answers);
    snprintf(url, sizeof url, "http://127.0.0.1:%d/run/?token=1", s.port);
    struct ckpt_store *store = ckpt_store_open(url, false, &err);
    if (!store) fail_msg("%s", err.msg);
    assert_int_equal(store->ops->stat(store, "latest", &o, &err), 0);
    assert_int_equal(o.bytes, 4);
    assert_int_equal(store->ops->get(store, "latest", 0, data, 4, &err), 0);
    assert_int_equal(store->ops->stat(store, "nothing", &o, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
    assert_int_equal(store->ops->put(store, "x", "x", 1, NULL, &err), -1);
    assert_int_equal(err.code, ERR_UNSUPPORTED);
    assert_null(store->ops->upload_begin(store, "x", 1, &err));
    assert_int_equal(store->ops->remove(store, "x", &err), -1);
    store->ops->close(store);
    script_end(&s);
    assert_non_null(strstr(s.request[2], "GET /run/latest?token=1 HTTP/1.1"));
    assert_null(strstr(s.request[2], "Authorization"));
}

/* A checkpoint that cannot be looked for is not one that is not there, and no plain folder either. */
static void a_store_that_is_away_is_not_an_empty_one(void **state) {
    (void)state;
    static const char *const answers[] = {STATUS("503 Slow Down", ""), NULL};
    struct script s;
    struct err err = {0};
    char url[128];
    setenv("INTELLECT_STORE_TRIES", "1", 1);
    script_start(&s, answers);
    snprintf(url, sizeof url, "s3://bucket/p?endpoint=http://127.0.0.1:%d", s.port);
    assert_null(ckpt_open(url, NULL, &err));
    assert_int_equal(err.code, ERR_TIMEOUT);
    assert_non_null(strstr(err.msg, "503"));
    script_end(&s);
}

/* ---- a server that takes one object in parts ---------------------------------------------------------- */

#define PART_BYTES (5u << 20)
#define OBJECT_BYTES (3 * PART_BYTES + 12345)

struct bucket {
    int listener, port;
    pthread_t thread;
    uint8_t *object;      /* what was put so far; to be read when it has stopped */
    atomic_uint puts[4];  /* of each part */
    uint32_t refuse;      /* parts, as bits, whose first try is answered by 503 */
    atomic_bool complete, aborted;
};

static size_t content_length(const char *head, const char *end) {
    const char *at = strcasestr(head, "\r\nContent-Length:");
    return at && at < end ? strtoull(at + 17, NULL, 10) : 0;
}

/* The head of a request, and what came of its body with it. */
static size_t read_head(int fd, char *head, size_t size, const char **body) {
    size_t n = 0;
    *body = NULL;
    for (ssize_t k; !*body && n < size - 1 && (k = recv(fd, head + n, size - 1 - n, 0)) > 0;) {
        head[n += (size_t)k] = 0;
        if ((*body = strstr(head, "\r\n\r\n"))) *body += 4;
    }
    return n;
}

static const char *take_part(struct bucket *b, int fd, const char *head, const char *body, size_t n) {
    const char *number = strstr(head, "partNumber=");
    uint32_t i = number ? (uint32_t)strtoul(number + 11, NULL, 10) - 1 : 4;
    size_t bytes = content_length(head, body);
    if (i >= 4 || bytes > PART_BYTES || n > bytes) return STATUS("400 Bad Request", "");
    uint8_t *to = b->object + i * PART_BYTES;
    memset(to, 0xee, bytes);
    memcpy(to, body, n);
    if (strcasestr(head, "100-continue")) send(fd, "HTTP/1.1 100 Continue\r\n\r\n", 25, MSG_NOSIGNAL);
    for (ssize_t k; n < bytes && (k = recv(fd, to + n, bytes - n, 0)) > 0;) n += (size_t)k;
    bool refused = !b->puts[i]++ && b->refuse >> i & 1;
    return refused ? STATUS("503 Slow Down", "") : OK("ETag: \"e\"\r\nContent-Length: 0\r\n", "");
}

static void answer_request(struct bucket *b, int fd) {
    char head[16384];
    const char *body, *answer = ABSENT;
    size_t n = read_head(fd, head, sizeof head, &body);
    if (!body) return;
    if (!strncmp(head, "PUT ", 4)) answer = take_part(b, fd, head, body, n - (size_t)(body - head));
    else if (!strncmp(head, "POST ", 5) && strstr(head, "?uploads"))
        answer = OK("", "<R><UploadId>u</UploadId></R>");
    else if (!strncmp(head, "POST ", 5) || !strncmp(head, "DELETE ", 7)) {
        atomic_store(*head == 'P' ? &b->complete : &b->aborted, true);
        answer = OK("Content-Length: 0\r\n", "");
    }
    send(fd, answer, strlen(answer), MSG_NOSIGNAL);
    shutdown(fd, SHUT_WR);
    while (recv(fd, head, sizeof head, 0) > 0) continue;
}

static void *serve_bucket(void *arg) {
    struct bucket *b = arg;
    for (int fd; (fd = accept(b->listener, NULL, NULL)) >= 0; close(fd)) answer_request(b, fd);
    return NULL;
}

static struct ckpt_store *bucket_start(struct bucket *b, uint32_t refuse, uint32_t memory_parts) {
    struct script s;
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof a;
    *b = (struct bucket){.listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0),
                         .object = calloc(4, PART_BYTES), .refuse = refuse};
    assert_int_equal(bind(b->listener, (struct sockaddr *)&a, sizeof a), 0);
    assert_int_equal(listen(b->listener, 16), 0);
    assert_int_equal(getsockname(b->listener, (struct sockaddr *)&a, &length), 0);
    s.port = ntohs(a.sin_port);
    assert_int_equal(pthread_create(&b->thread, NULL, serve_bucket, b), 0);
    setenv("INTELLECT_STORE_PART_MIB", "5", 1);
    setenv("INTELLECT_STORE_SPOOL", folder, 1);
    struct ckpt_store *store = open_s3(&s);
    ((struct s3_store *)store)->memory_parts = memory_parts;
    return store;
}

static void bucket_stop(struct bucket *b, struct ckpt_store *store) {
    store->ops->close(store);
    shutdown(b->listener, SHUT_RDWR);
    pthread_join(b->thread, NULL);
    close(b->listener);
}

static uint8_t *random_object(void) {
    uint8_t *bytes = malloc(OBJECT_BYTES);
    uint64_t x = 88172645463325252u;
    for (size_t i = 0; i < OBJECT_BYTES; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        bytes[i] = (uint8_t)x;
    }
    return bytes;
}

/* All in pieces that no part is a multiple of, every second one first. */
static int put_object(struct ckpt_store *store, struct ckpt_upload *u, const uint8_t *bytes,
                      struct err *err) {
    const size_t piece = 700001, pieces = (OBJECT_BYTES + piece - 1) / piece;
    int r = store->ops->upload_sync(u, err);
    for (size_t i = 0; !r && i < pieces; i++) {
        size_t k = i < (pieces + 1) / 2 ? 2 * i : 2 * (i - (pieces + 1) / 2) + 1, at = k * piece;
        size_t n = OBJECT_BYTES - at < piece ? OBJECT_BYTES - at : piece;
        r = store->ops->upload_put(u, at, bytes + at, n, err);
    }
    return r || store->ops->upload_complete(u, err) ? -1 : 0;
}

/* Whether a part waits in memory or in the spool, what arrives are its bytes, at the first try or later. */
static void parts_wait_in_memory_or_in_the_spool(void **state) {
    (void)state;
    uint8_t *bytes = random_object();
    const uint32_t memory_parts[] = {0, 1, 2, 8};
    for (size_t k = 0; k < sizeof memory_parts / sizeof *memory_parts; k++) {
        struct bucket b;
        struct err err = {0};
        struct ckpt_store *store = bucket_start(&b, 0x5, memory_parts[k]);
        struct ckpt_upload *u = store->ops->upload_begin(store, "tensors", OBJECT_BYTES, &err);
        if (!u || put_object(store, u, bytes, &err)) fail_msg("%u: %s", memory_parts[k], err.msg);
        assert_int_equal(store->ops->upload_behind(u), 0);
        store->ops->upload_destroy(u);
        assert_null(((struct s3_store *)store)->sender);
        assert_true(b.complete && !b.aborted);
        for (int i = 0; i < 4; i++) assert_int_equal(b.puts[i], 1 + (0x5 >> i & 1));
        bucket_stop(&b, store);
        assert_memory_equal(b.object, bytes, OBJECT_BYTES);
        free(b.object);
    }
    free(bytes);
}

/* A disk that takes nothing: of no matter where memory suffices, and else said by what it is. */
static void the_disk_is_for_what_memory_does_not_hold(void **state) {
    (void)state;
    uint8_t *bytes = random_object();
    struct rlimit before, none;
    getrlimit(RLIMIT_FSIZE, &before);
    none = (struct rlimit){0, before.rlim_max};
    signal(SIGXFSZ, SIG_IGN);
    for (int fits = 0; fits < 2; fits++) {
        struct bucket b;
        struct err err = {0};
        struct ckpt_store *store = bucket_start(&b, 0, fits ? 4 : 1);
        struct ckpt_upload *u = store->ops->upload_begin(store, "tensors", OBJECT_BYTES, &err);
        if (!u) fail_msg("%s", err.msg);
        setrlimit(RLIMIT_FSIZE, &none);
        int r = put_object(store, u, bytes, &err);
        setrlimit(RLIMIT_FSIZE, &before);
        assert_int_equal(r, fits ? 0 : -1);
        if (!fits) assert_non_null(strstr(err.msg, "INTELLECT_STORE_SPOOL"));
        store->ops->upload_destroy(u);
        assert_true(b.complete == fits);
        bucket_stop(&b, store);
        if (fits) assert_memory_equal(b.object, bytes, OBJECT_BYTES);
        free(b.object);
    }
    free(bytes);
}

/* Whoever has a choice waits while much is behind: what is put and not sent, but not what is in no whole part
 * yet, which would be waited for without end. Where sending failed nothing is, and the next put says so. */
static void what_is_behind_is_what_can_be_sent(void **state) {
    (void)state;
    uint8_t *bytes = random_object();
    struct bucket b;
    struct err err = {0};
    setenv("INTELLECT_STORE_TRIES", "1", 1);
    struct ckpt_store *store = bucket_start(&b, 0x2, 8);
    struct ckpt_upload *u = store->ops->upload_begin(store, "tensors", OBJECT_BYTES, &err);
    if (!u || store->ops->upload_put(u, 0, bytes, PART_BYTES + 9, &err)) fail_msg("%s", err.msg);
    assert_int_equal(store->ops->upload_behind(u), PART_BYTES); /* nothing is sent before the first sync */
    assert_int_equal(b.puts[0], 0);
    assert_int_equal(store->ops->upload_sync(u, &err), 0);
    while (store->ops->upload_behind(u)) usleep(1000);
    assert_int_equal(b.puts[0], 1);
    const size_t rest = PART_BYTES + 9;
    assert_int_equal(store->ops->upload_put(u, rest, bytes + rest, 2 * PART_BYTES - rest, &err), 0);
    while (store->ops->upload_behind(u)) usleep(1000); /* its one try is refused */
    assert_int_equal(store->ops->upload_put(u, 2 * PART_BYTES, bytes, 1, &err), -1);
    assert_int_equal(err.code, ERR_TIMEOUT);
    store->ops->upload_destroy(u);
    assert_true(b.aborted && !b.complete);
    bucket_stop(&b, store);
    free(b.object);
    free(bytes);
}

int main(void) {
#define CLEAN(f) cmocka_unit_test_setup(f, clean)
    const struct CMUnitTest tests[] = {
        CLEAN(a_url_is_signed_as_in_the_manual),
        CLEAN(a_url_says_bucket_prefix_and_settings),
        CLEAN(a_url_that_means_nothing_is_refused),
        CLEAN(a_key_in_a_url_is_refused_and_not_repeated),
        CLEAN(the_settings_of_a_url_stay_behind_the_names),
        CLEAN(plain_http_is_for_this_machine),
        CLEAN(what_a_url_leaves_open_the_machine_says),
        CLEAN(a_key_comes_from_file_environment_or_shared_file),
        CLEAN(xml_is_read_within_its_bounds),
        CLEAN(broken_xml_is_harmless),
        CLEAN(every_refusal_says_what_to_do),
        CLEAN(what_passes_is_tried_again),
        CLEAN(pauses_grow_and_differ),
        CLEAN(limits_are_checked),
        CLEAN(parts_stay_under_ten_thousand),
        CLEAN(a_read_gets_through),
        CLEAN(an_answer_cut_in_its_head_is_none),
        CLEAN(a_stalled_read_is_tried_again),
        CLEAN(tries_come_to_an_end),
        CLEAN(more_than_was_asked_for_is_refused),
        CLEAN(a_put_whose_answer_was_lost_is_known_again),
        CLEAN(a_cancelled_store_gives_up_soon),
        CLEAN(a_web_server_is_read_from),
        CLEAN(a_store_that_is_away_is_not_an_empty_one),
        CLEAN(parts_wait_in_memory_or_in_the_spool),
        CLEAN(the_disk_is_for_what_memory_does_not_hold),
        CLEAN(what_is_behind_is_what_can_be_sent),
    };
    if (!mkdtemp(folder)) return 1;
    proto_init(NULL);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    char command[64];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    return system(command) || failed;
}
