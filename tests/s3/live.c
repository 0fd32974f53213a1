/* live.c - the S3 store against a real server. tests/integration/s3.sh starts one and runs this with
 * AWS_ACCESS_KEY_ID and so on set:
 *
 *   s3_live ENDPOINT BUCKET [FULL_BUCKET]   FULL_BUCKET: one whose quota is used up. S3_LIVE_NO_KEYS: it
 *                                           takes any key */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "ckpt/s3.h"

#define PART (5u << 20)

static const char *endpoint, *bucket, *full_bucket;

/* libcurl signs with the time it gets from here. */
static time_t clock_off;
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    time_t t = now.tv_sec + clock_off;
    if (out) *out = t;
    return t;
}

static const char *url_of(const char *which, const char *prefix) {
    static char url[512];
    snprintf(url, sizeof url, "s3://%s/%s?endpoint=%s", which, prefix, endpoint);
    return url;
}

static struct ckpt_store *open_store(const char *prefix) {
    struct err err = {0};
    struct ckpt_store *s = ckpt_store_open(url_of(bucket, prefix), true, &err);
    if (!s) fail_msg("%s", err.msg);
    return s;
}

#define must(call)                                                                                   \
    do {                                                                                             \
        if (call) fail_msg("%s", err.msg);                                                           \
    } while (0)
#define must_fail(call, expected, word)                                                              \
    do {                                                                                             \
        if (!(call)) fail_msg("%s: did not fail", #call);                                            \
        if (err.code != (expected) || !strstr(err.msg, word)) fail_msg("%s: code %d: %s", #call, err.code, err.msg); \
    } while (0)

static uint8_t *random_bytes(size_t n) {
    uint8_t *b = malloc(n);
    uint64_t x = 88172645463325252u;
    for (size_t i = 0; i < n; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        b[i] = (uint8_t)x;
    }
    return b;
}

/* What `latest` and the claim of a writer rely on. */
static void conditions_hold(void **state) {
    (void)state;
    struct err err = {0};
    struct ckpt_object o, p;
    char now[8];
    struct ckpt_store *s = open_store("conditions");
    must(s->ops->remove(s, "latest", &err));
    must_fail(s->ops->stat(s, "latest", &o, &err), ERR_NOT_FOUND, "not there");
    must(s->ops->put(s, "latest", "one", 3, CKPT_ABSENT, &err));
    must_fail(s->ops->put(s, "latest", "two", 3, CKPT_ABSENT, &err), ERR_STALE, "first");
    must(s->ops->stat(s, "latest", &o, &err));
    assert_int_equal(o.bytes, 3);
    assert_true(o.modified_s > 1600000000);
    must(s->ops->put(s, "latest", "two", 3, o.version, &err));
    must_fail(s->ops->put(s, "latest", "six", 3, o.version, &err), ERR_STALE, "changed");
    must(s->ops->stat(s, "latest", &p, &err));
    must(s->ops->put(s, "latest", "four", 4, p.version, &err));
    must(s->ops->get(s, "latest", 0, now, 4, &err));
    assert_memory_equal(now, "four", 4);
    must(s->ops->put(s, "latest", "", 0, NULL, &err));
    must(s->ops->stat(s, "latest", &o, &err));
    assert_int_equal(o.bytes, 0);
    must(s->ops->get(s, "latest", 0, now, 0, &err));
    must(s->ops->remove(s, "latest", &err));
    must(s->ops->remove(s, "latest", &err));
    must_fail(s->ops->get(s, "latest", 0, now, 1, &err), ERR_NOT_FOUND, "latest");
    s->ops->close(s);
}

#define WRITERS 4
struct writer {
    struct ckpt_store *store;
    char text[2];
    int r;
    struct err err;
    pthread_t thread;
};

static void *put_claim(void *arg) {
    struct writer *w = arg;
    w->r = w->store->ops->put(w->store, "claim", w->text, 1, CKPT_ABSENT, &w->err);
    return NULL;
}

/* Several at one moment: the look before the put does not help there, the server's condition does. */
static void one_of_several_writers_wins(void **state) {
    (void)state;
    for (int round = 0; round < 5; round++) {
        struct err err = {0};
        struct ckpt_store *s = open_store("race");
        struct writer w[WRITERS];
        int winner = -1;
        char now;
        must(s->ops->remove(s, "claim", &err));
        for (int i = 0; i < WRITERS; i++) {
            w[i] = (struct writer){.store = s, .text = {(char)('a' + i)}};
            assert_int_equal(pthread_create(&w[i].thread, NULL, put_claim, &w[i]), 0);
        }
        for (int i = 0; i < WRITERS; i++) {
            pthread_join(w[i].thread, NULL);
            if (w[i].r && w[i].err.code != ERR_STALE) fail_msg("%s", w[i].err.msg);
            if (!w[i].r && winner >= 0) fail_msg("two writers put the same object");
            if (!w[i].r) winner = i;
        }
        assert_true(winner >= 0);
        must(s->ops->get(s, "claim", 0, &now, 1, &err));
        assert_int_equal(now, w[winner].text[0]);
        s->ops->close(s);
    }
}

static int count_object(void *arg, const struct ckpt_object *o, struct err *err) {
    (void)err;
    ((uint32_t *)arg)[o->unfinished]++;
    return 0;
}

static void count(struct ckpt_store *s, const char *prefix, uint32_t out[2]) {
    struct err err = {0};
    out[0] = out[1] = 0;
    must(s->ops->list(s, prefix, count_object, out, &err));
}

/* Ours is there, and where answers get lost perhaps others that nobody knows of: how many of these? */
static uint32_t beside_ours(struct ckpt_store *s, const char *prefix) {
    uint32_t there[2];
    count(s, prefix, there);
    assert_int_equal(there[0], 0); /* nobody sees half of it */
    assert_true(there[1] == 1 || (there[1] > 1 && !full_bucket));
    return there[1] - 1;
}

static void put_pieces(struct ckpt_store *s, struct ckpt_upload *u, const uint8_t *bytes, size_t n, size_t piece) {
    struct err err = {0};
    size_t pieces = (n + piece - 1) / piece;
    for (size_t i = 0; i < pieces; i++) { /* each once, far from in order */
        size_t at = i * 7919 % pieces * piece, length = n - at < piece ? n - at : piece;
        must(s->ops->upload_put(u, at, bytes + at, length, &err));
        if (i == pieces / 2) must(s->ops->upload_sync(u, &err));
    }
}

/* Chunks come in the order in which commits change them; parts have their own borders. */
/* What was put is in the store, as parts of something unfinished. */
static void send_all(struct ckpt_store *s, struct ckpt_upload *u) {
    struct err err = {0};
    must(s->ops->upload_sync(u, &err));
    while (s->ops->upload_behind(u)) usleep(1000);
}

static void an_upload_in_pieces_is_the_object(void **state) {
    (void)state;
    const size_t n = 3 * PART + 12345;
    uint32_t there[2];
    struct err err = {0};
    struct ckpt_store *s = open_store("pieces");
    uint8_t *bytes = random_bytes(n), *got = calloc(1, n);
    must(object_remove_all(s, "step-1", &err));
    struct ckpt_upload *u = s->ops->upload_begin(s, "step-1/tensors", n, &err);
    assert_non_null(u);
    put_pieces(s, u, bytes, n, 100000);
    send_all(s, u);
    uint32_t others = beside_ours(s, "step-1/");
    must(s->ops->upload_complete(u, &err));
    s->ops->upload_destroy(u);
    count(s, "step-1/", there);
    assert_int_equal(there[0], 1);
    assert_int_equal(there[1], others);
    must(object_get(s, "step-1/tensors", 0, got, n, &err));
    assert_memory_equal(got, bytes, n);
    must(s->ops->get(s, "step-1/tensors", PART - 10, got, 20, &err));
    assert_memory_equal(got, bytes + PART - 10, 20);
    must_fail(s->ops->get(s, "step-1/tensors", n - 10, got, 20, &err), ERR_TRUNCATED, "ends");
    must_fail(s->ops->get(s, "step-1/tensors", n + 10, got, 20, &err), ERR_TRUNCATED, "ends");
    free(bytes);
    free(got);
    s->ops->close(s);
}

/* Where the way to the server is neither within this machine nor TLS, parts go with their digest: 0.0.0.0 is
 * this machine, and does not look like it. */
static void parts_are_digested_where_the_way_is_open(void **state) {
    (void)state;
    const size_t n = 2 * PART + 4321;
    struct err err = {0};
    const char *known = endpoint, *port = strrchr(endpoint, ':');
    char open[128];
    uint8_t *bytes = random_bytes(n), *got = calloc(1, n);
    snprintf(open, sizeof open, "http://0.0.0.0%s", port);
    endpoint = open;
    struct ckpt_store *s = open_store("open");
    endpoint = known;
    assert_false(s3_is_sheltered((struct s3_store *)s));
    must(s->ops->remove(s, "tensors", &err));
    struct ckpt_upload *u = s->ops->upload_begin(s, "tensors", n, &err);
    assert_int_equal(s->ops->upload_share(u), 0);
    put_pieces(s, u, bytes, n, 100000);
    must(s->ops->upload_complete(u, &err));
    s->ops->upload_destroy(u);
    must(object_get(s, "tensors", 0, got, n, &err));
    assert_memory_equal(got, bytes, n);
    free(bytes);
    free(got);
    s->ops->close(s);
}

static int read_half(void *arg, uint64_t at, void *out, size_t n, struct err *err) {
    (void)arg;
    memset(out, 0, n);
    return at < PART / 2 ? 0 : err_set(err, ERR_IO, "the disk is gone");
}

/* Nothing of it is there then, and it is not tried again. */
static void a_body_that_cannot_be_read_ends_the_request(void **state) {
    (void)state;
    struct err err = {0};
    struct ckpt_object o;
    struct http_answer a;
    struct ckpt_store *s = open_store("unread");
    struct s3_call c = {.method = HTTP_PUT, .name = "x", .body_bytes = PART, .body_read = read_half};
    must_fail(s3_call((struct s3_store *)s, &c, &a, &err), ERR_IO, "the disk is gone");
    must_fail(s->ops->stat(s, "x", &o, &err), ERR_NOT_FOUND, "not there");
    s->ops->close(s);
}

/* A second writer of the same object finds out; the first one's bytes stay. */
static void an_upload_never_replaces_an_object(void **state) {
    (void)state;
    for (size_t n = 1000; n <= PART + 1000; n += PART) { /* whole, and in parts */
        struct err err = {0};
        char now[5];
        struct ckpt_store *s = open_store("twice");
        uint8_t *bytes = random_bytes(n);
        must(s->ops->put(s, "a/tensors", "first", 5, NULL, &err));
        struct ckpt_upload *u = s->ops->upload_begin(s, "a/tensors", n, &err);
        must(s->ops->upload_put(u, 0, bytes, n, &err));
        must_fail(s->ops->upload_complete(u, &err), ERR_STALE, "first");
        s->ops->upload_destroy(u);
        must(s->ops->get(s, "a/tensors", 0, now, 5, &err));
        assert_memory_equal(now, "first", 5);
        free(bytes);
        s->ops->close(s);
    }
}

/* Parts of what was given up cost money until they are removed. */
static void what_is_given_up_is_gone(void **state) {
    (void)state;
    uint32_t there[2];
    struct err err = {0};
    struct ckpt_store *s = open_store("given-up");
    uint8_t *bytes = random_bytes(2 * PART);
    struct ckpt_upload *u = s->ops->upload_begin(s, "b/tensors", 2 * PART, &err);
    must(s->ops->upload_put(u, 0, bytes, PART, &err));
    send_all(s, u);
    uint32_t others = beside_ours(s, "b/");
    s->ops->upload_destroy(u);
    count(s, "b/", there);
    assert_int_equal(there[0], 0);
    assert_int_equal(there[1], others);

    /* One whose process died, found by a later prune. */
    u = s->ops->upload_begin(s, "b/tensors", 2 * PART, &err);
    must(s->ops->upload_put(u, 0, bytes, PART, &err));
    send_all(s, u);
    s->ops->cancel(s);
    s->ops->upload_destroy(u);
    s->ops->close(s);
    s = open_store("given-up");
    count(s, "b/", there);
    assert_true(there[1] > others);
    must(object_remove_all(s, "b", &err));
    count(s, "b/", there);
    assert_int_equal(there[0] + there[1], 0);
    free(bytes);
    s->ops->close(s);
}

/* ---- parts that others send ---------------------------------------------------------------------- */

#define SHARED_BYTES (2 * PART + 777)
#define OBJECT "shared/tensors"

/* An upload of three parts, all put, none sent. */
static struct ckpt_upload *begin_shared(struct ckpt_store *s, const uint8_t *bytes) {
    struct err err = {0};
    must(object_remove_all(s, "shared", &err));
    struct ckpt_upload *u = s->ops->upload_begin(s, OBJECT, SHARED_BYTES, &err);
    if (!u) fail_msg("%s", err.msg);
    assert_int_equal(s->ops->upload_share(u), 3);
    must(s->ops->upload_put(u, 0, bytes, SHARED_BYTES, &err));
    must(s->ops->upload_sync(u, &err));
    return u;
}

static void is_the_object(struct ckpt_store *s, const uint8_t *bytes) {
    struct err err = {0};
    struct ckpt_object o;
    uint8_t *got = calloc(1, SHARED_BYTES);
    must(s->ops->stat(s, OBJECT, &o, &err));
    assert_int_equal(o.bytes, SHARED_BYTES);
    must(object_get(s, OBJECT, 0, got, SHARED_BYTES, &err));
    assert_memory_equal(got, bytes, SHARED_BYTES);
    free(got);
}

/* As a member makes it, from the URL in the genesis. */
static struct ckpt_courier *courier_of(const struct ckpt_store *s) {
    struct err err = {0};
    char url[sizeof s->url + sizeof s->query];
    snprintf(url, sizeof url, "%s%s", s->url, s->query);
    struct ckpt_courier *c = ckpt_courier_create(url, &err);
    if (!c) fail_msg("%s", err.msg);
    return c;
}

/* Members send two of three parts, the third nobody: the object is whole, and each of them can be read again. */
static void parts_that_others_sent_make_the_object(void **state) {
    (void)state;
    struct err err = {0};
    struct ckpt_part part;
    struct ckpt_store *s = open_store("parts");
    struct ckpt_courier *c = courier_of(s);
    uint8_t *bytes = random_bytes(SHARED_BYTES), *room = malloc(PART);
    struct ckpt_upload *u = begin_shared(s, bytes);
    for (uint32_t i = 0; i < 3; i += 2) {
        must(s->ops->upload_offer(u, i, &part, &err));
        assert_int_equal(part.offset, i * PART);
        must(ckpt_part_matches(&part, bytes + part.offset, &err));
        must(ckpt_courier_send(c, &part, bytes + part.offset, &err));
        must(ckpt_courier_send(c, &part, bytes + part.offset, &err)); /* an answer was lost */
    }
    must(s->ops->upload_complete(u, &err));
    is_the_object(s, bytes);
    for (uint32_t i = 0; i < 3; i++) {
        struct err wrong = {0};
        must(s->ops->upload_check(u, i, &part, &err));
        must(ckpt_courier_check(c, &part, room, &err));
        assert_memory_equal(room, bytes + part.offset, part.bytes);
        part.sha256[5] ^= 1;
        assert_int_equal(ckpt_courier_check(c, &part, room, &wrong), -1);
        assert_int_equal(wrong.code, ERR_CORRUPT);
    }
    s->ops->upload_destroy(u);
    ckpt_courier_destroy(c);
    free(bytes);
    free(room);
    s->ops->close(s);
}

/* A URL is good for one part of one upload, and for its very bytes; once the upload is complete, for
 * nothing. */
static void a_url_takes_the_bytes_it_was_made_for_and_no_others(void **state) {
    (void)state;
    struct err err = {0};
    struct ckpt_part part, bad;
    if (!full_bucket) skip(); /* between us and the server is something that fails of itself */
    struct ckpt_store *s = open_store("bound");
    struct ckpt_courier *c = courier_of(s);
    uint8_t *bytes = random_bytes(SHARED_BYTES), *other = random_bytes(SHARED_BYTES);
    other[100] ^= 1;
    struct ckpt_upload *u = begin_shared(s, bytes);
    must(s->ops->upload_offer(u, 0, &part, &err));
    must_fail(ckpt_courier_send(c, &part, other, &err), err.code, "the store answers 4"); /* other bytes */
    bad = part;
    EVP_Digest(other, (size_t)bad.bytes, bad.sha256, NULL, EVP_sha256(), NULL);
    must_fail(ckpt_courier_send(c, &bad, other, &err), ERR_REFUSED, "403"); /* and their own digest */
    bad = part;
    bad.bytes--;
    must_fail(ckpt_courier_send(c, &bad, bytes, &err), ERR_REFUSED, "403"); /* fewer of them */
    bad = part;
    *strstr(bad.url, "partNumber=1") = 'q';
    must_fail(ckpt_courier_send(c, &bad, bytes, &err), ERR_REFUSED, "403");
    bad = part;
    strstr(bad.url, "partNumber=1")[11] = '2'; /* another part */
    must_fail(ckpt_courier_send(c, &bad, bytes, &err), ERR_REFUSED, "403");
    clock_off = -2 * 3600; /* one that was signed two hours ago, for one */
    must(s->ops->upload_offer(u, 0, &bad, &err));
    clock_off = 0;
    must_fail(ckpt_courier_send(c, &bad, bytes, &err), ERR_REFUSED, "403");
    must(ckpt_courier_send(c, &part, bytes, &err));
    must(s->ops->upload_complete(u, &err));
    is_the_object(s, bytes);
    /* Who has kept its URL. */
    must_fail(ckpt_courier_send(c, &part, bytes, &err), ERR_REFUSED, "404");
    must_fail(ckpt_courier_send(c, &part, other, &err), err.code, "the store answers 4");
    strstr(part.url, "partNumber=")[11] = '9';
    must_fail(ckpt_courier_send(c, &part, other, &err), err.code, "the store answers 4");
    is_the_object(s, bytes);
    s->ops->upload_destroy(u);
    ckpt_courier_destroy(c);
    free(bytes);
    free(other);
    s->ops->close(s);
}

/* A part that we could not send ends the upload with its reason; it is not waited for. */
static void a_part_that_cannot_be_sent_ends_the_upload(void **state) {
    (void)state;
    struct err err = {0};
    if (!full_bucket) skip();
    struct ckpt_store *s = ckpt_store_open(url_of(full_bucket, "p"), true, &err);
    uint8_t *bytes = random_bytes(SHARED_BYTES);
    struct ckpt_upload *u = begin_shared(s, bytes);
    must(s->ops->upload_send(u, 0, &err));
    while (!s->ops->upload_sent(u, 0)) usleep(1000);
    must_fail(s->ops->upload_complete(u, &err), ERR_FULL, "used up");
    s->ops->upload_destroy(u);
    free(bytes);
    s->ops->close(s);
}

/* A list has pages of a thousand. */
static void a_long_list_is_whole(void **state) {
    (void)state;
    uint32_t there[2];
    struct err err = {0};
    struct ckpt_store *s = open_store("many");
    count(s, "", there);
    for (int i = 0; i < 1005 && there[0] < 1005; i++) {
        char name[64];
        snprintf(name, sizeof name, "folder-%d/object", i);
        must(s->ops->put(s, name, "x", 1, NULL, &err));
    }
    count(s, "", there);
    assert_int_equal(there[0], 1005);
    count(s, "folder-100/", there);
    assert_int_equal(there[0], 1);
    s->ops->close(s);
    s = open_store("man"); /* whose prefix "many" begins with */
    count(s, "", there);
    assert_int_equal(there[0], 0);
    s->ops->close(s);
}

static void expect_refusal(const char *url, enum err_code code, const char *word) {
    struct err err = {0};
    struct ckpt_object o;
    struct ckpt_store *s = ckpt_store_open(url, true, &err);
    if (!s) fail_msg("%s", err.msg);
    must_fail(s->ops->stat(s, "x", &o, &err), code, word); /* HEAD has no body to say why */
    must_fail(s->ops->put(s, "x", "x", 1, NULL, &err), code, word);
    s->ops->close(s);
}

/* The four mistakes of a first evening with a store. */
static void mistakes_are_told_apart(void **state) {
    (void)state;
    if (getenv("S3_LIVE_NO_KEYS")) skip(); /* a server that takes any */
    char *key = strdup(getenv("AWS_ACCESS_KEY_ID")), *secret = strdup(getenv("AWS_SECRET_ACCESS_KEY"));
    setenv("AWS_SECRET_ACCESS_KEY", "wrong", 1);
    expect_refusal(url_of(bucket, "p"), ERR_REFUSED, "wrong secret key");
    setenv("AWS_SECRET_ACCESS_KEY", secret, 1);
    setenv("AWS_ACCESS_KEY_ID", "nobody", 1);
    expect_refusal(url_of(bucket, "p"), ERR_REFUSED, "access key nobody (from the environment) is not known");
    unsetenv("AWS_ACCESS_KEY_ID");
    unsetenv("AWS_SECRET_ACCESS_KEY");
    expect_refusal(url_of(bucket, "p"), ERR_REFUSED, "no key here");
    setenv("AWS_ACCESS_KEY_ID", key, 1);
    setenv("AWS_SECRET_ACCESS_KEY", secret, 1);
    expect_refusal(url_of("no-such-bucket", "p"), ERR_CONFIG, "no bucket no-such-bucket");
    clock_off = -3600;
    expect_refusal(url_of(bucket, "p"), ERR_CONFIG, "s behind that of the store");
    clock_off = 3600;
    expect_refusal(url_of(bucket, "p"), ERR_CONFIG, "s ahead of that of the store");
    clock_off = 0;
    free(key);
    free(secret);
}

static void a_full_store_says_so(void **state) {
    (void)state;
    struct err err = {0};
    if (!full_bucket) skip();
    struct ckpt_store *s = ckpt_store_open(url_of(full_bucket, "p"), true, &err);
    must_fail(s->ops->put(s, "x", "0123456789", 10, NULL, &err), ERR_FULL, "used up");
    s->ops->close(s);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(conditions_hold),
        cmocka_unit_test(one_of_several_writers_wins),
        cmocka_unit_test(an_upload_in_pieces_is_the_object),
        cmocka_unit_test(parts_are_digested_where_the_way_is_open),
        cmocka_unit_test(a_body_that_cannot_be_read_ends_the_request),
        cmocka_unit_test(an_upload_never_replaces_an_object),
        cmocka_unit_test(what_is_given_up_is_gone),
        cmocka_unit_test(parts_that_others_sent_make_the_object),
        cmocka_unit_test(a_url_takes_the_bytes_it_was_made_for_and_no_others),
        cmocka_unit_test(a_part_that_cannot_be_sent_ends_the_upload),
        cmocka_unit_test(a_long_list_is_whole),
        cmocka_unit_test(mistakes_are_told_apart),
        cmocka_unit_test(a_full_store_says_so),
    };
    if (argc < 3) return 2;
    endpoint = argv[1];
    bucket = argv[2];
    full_bucket = argc > 3 ? argv[3] : NULL;
    setenv("INTELLECT_STORE_PART_MIB", "5", 0);
    proto_init(NULL);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
