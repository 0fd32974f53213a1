/* test_carrier.c - parts of a checkpoint that another member writes: their bytes are those of the state that
 * was kept, whatever it became since, or nothing is sent. A store on loopback takes and gives them. */
#include "tests/sync_rounds.h"

#include <arpa/inet.h>
#include <event2/event.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <unistd.h>

#include "ckpt/ckpt.h"
#include "node/carrier.h"

#define BYTES_MAX 65536

/* ---- a store ---------------------------------------------------------------------------------- */

static struct {
    int listener, port;
    pthread_t thread;
    atomic_int puts;
    pthread_mutex_t mutex; /* held while a request is answered */
    uint8_t object[BYTES_MAX]; /* what was put, and what is given */
    size_t bytes;
} store;

/* One request, whole; the body of a PUT is the object from then on. */
static void answer(int fd) {
    static char in[BYTES_MAX + 4096];
    char head[200];
    size_t n = 0, body = 0;
    for (ssize_t k; n < sizeof in - 1 && (k = recv(fd, in + n, sizeof in - 1 - n, 0)) > 0;) {
        in[n += (size_t)k] = 0;
        const char *end = strstr(in, "\r\n\r\n"), *length = strstr(in, "Content-Length:");
        if (end && !body && strstr(in, "Expect: 100-continue"))
            send(fd, "HTTP/1.1 100 Continue\r\n\r\n", 25, MSG_NOSIGNAL);
        body = end ? (size_t)(end + 4 - in) : 0;
        if (body && n >= body + (length && length < end ? strtoull(length + 15, NULL, 10) : 0)) break;
    }
    bool put = !strncmp(in, "PUT ", 4);
    if (put) {
        store.bytes = n - body;
        memcpy(store.object, in + body, store.bytes);
        atomic_fetch_add(&store.puts, 1);
    }
    snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\nContent-Length: %zu\r\nConnection: close\r\n\r\n",
             put ? 0 : store.bytes);
    send(fd, head, strlen(head), MSG_NOSIGNAL);
    if (!put) send(fd, store.object, store.bytes, MSG_NOSIGNAL);
    close(fd);
}

static void *serve(void *arg) {
    (void)arg;
    for (int fd; (fd = accept(store.listener, NULL, NULL)) >= 0;) {
        pthread_mutex_lock(&store.mutex);
        answer(fd);
        pthread_mutex_unlock(&store.mutex);
    }
    return NULL;
}

static void store_start(void) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof a;
    pthread_mutex_init(&store.mutex, NULL);
    store.listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(store.listener, (struct sockaddr *)&a, sizeof a), 0);
    assert_int_equal(listen(store.listener, 16), 0);
    assert_int_equal(getsockname(store.listener, (struct sockaddr *)&a, &length), 0);
    store.port = ntohs(a.sin_port);
    assert_int_equal(pthread_create(&store.thread, NULL, serve, NULL), 0);
}

/* What is given from now on. */
static void store_set(const uint8_t *bytes, size_t n, size_t flip) {
    pthread_mutex_lock(&store.mutex);
    memcpy(store.object, bytes, n);
    if (flip) store.object[flip] ^= 4;
    store.bytes = n;
    pthread_mutex_unlock(&store.mutex);
}

static bool store_has(const uint8_t *bytes, size_t n) {
    pthread_mutex_lock(&store.mutex);
    bool same = store.bytes == n && !memcmp(store.object, bytes, n);
    pthread_mutex_unlock(&store.mutex);
    return same;
}

static void store_end(void) {
    shutdown(store.listener, SHUT_RDWR);
    pthread_join(store.thread, NULL);
    close(store.listener);
}

/* ---- a member, whose state changes ------------------------------------------------------------ */

struct test {
    struct rig *rig;
    struct event_base *base;
    struct carrier *carrier;
    float anchor[ELEMENTS], momentum[ELEMENTS]; /* when it was kept */
    int answers, done;
    char why[300];
};

static void take_answer(void *arg, const struct msg_checkpoint_part_done *done) {
    struct test *t = arg;
    t->answers++;
    t->done = done->done;
    proto_str_copy(done->text, t->why, sizeof t->why);
}

static void before_change(void *arg, uint32_t chunk) {
    carrier_before_change(((struct test *)arg)->carrier, chunk);
}

/* port: of the run's store. */
static void begin_at(struct test *t, struct rig *r, int port, bool bf16, uint64_t chunks) {
    struct msg_range range = {0, chunks};
    struct msg_checkpoint_keep keep = {.index = 0, .bf16 = bf16, .chunks = &range, .chunks_count = 1};
    *t = (struct test){.rig = r, .base = event_base_new()};
    char url[96];
    snprintf(url, sizeof url, "s3://bucket/run?endpoint=http://127.0.0.1:%d", port);
    t->carrier = carrier_create(t->base, &r->model, ELEMENTS, CHUNK, proto_str(url), "/tmp", take_answer, t);
    assert_non_null(t->carrier);
    three_members(r);
    sync_set_before_change(r->node[2].sync, before_change, t);
    memcpy(t->anchor, sync_anchor(r->node[2].sync), sizeof t->anchor);
    memcpy(t->momentum, sync_momentum(r->node[2].sync), sizeof t->momentum);
    carrier_keep(t->carrier, r->node[2].sync, &keep);
}

static void begin(struct test *t, struct rig *r, bool bf16, uint64_t chunks) {
    begin_at(t, r, store.port, bf16, chunks);
}

static void end(struct test *t) {
    sync_set_before_change(t->rig->node[2].sync, NULL, NULL);
    carrier_destroy(t->carrier);
    event_base_free(t->base);
}

static void a_commit_changes_it(struct test *t) {
    struct rig *r = t->rig;
    round_of_three(r, STEPS * BATCH);
    assert_memory_not_equal(sync_anchor(r->node[2].sync), t->anchor, sizeof t->anchor);
    assert_memory_not_equal(sync_momentum(r->node[2].sync), t->momentum, sizeof t->momentum);
}

/* The whole of a file as it was; returns its bytes. */
static size_t expected(const struct test *t, const char *name, bool bf16, uint8_t *out) {
    struct err err = {0};
    struct ckpt_piece p;
    struct ckpt_image *im = ckpt_image_create(&t->rig->model, bf16 ? CKPT_BF16 : CKPT_FP32, 0, &err);
    size_t n = BYTES_MAX;
    while (n && ckpt_image_find(im, name, 0, n, &p, &err)) n--; /* the longest part there is */
    assert_true(n > ELEMENTS);
    ckpt_image_fill(im, &p, 0, ELEMENTS, p.momentum ? t->momentum : t->anchor, out);
    ckpt_image_destroy(im);
    return n;
}

/* Ask for a part with this content at a path of the server, and wait for the answer. */
static void ask_at(struct test *t, const char *path, const char *name, bool check, const uint8_t *bytes, size_t n) {
    char url[96];
    int before = t->answers;
    struct msg_checkpoint_part part = {.part = 3, .check = check, .object = proto_str(name), .bytes = (uint32_t)n};
    snprintf(url, sizeof url, "http://127.0.0.1:%d/%s?signed", store.port, path);
    part.url = proto_str(url);
    EVP_Digest(bytes, n, part.sha256.b, NULL, EVP_sha256(), NULL);
    carrier_part(t->carrier, &part);
    assert_int_equal(t->answers, before); /* never from within the call */
    while (t->answers == before) event_base_loop(t->base, EVLOOP_ONCE);
}

static void ask(struct test *t, const char *name, bool check, const uint8_t *bytes, size_t n) {
    ask_at(t, "bucket/run/x", name, check, bytes, n);
}

static const char *const files[] = {"model-00001-of-00001.safetensors", "momentum-00001-of-00001.safetensors",
                                    "anchor-00001-of-00001.safetensors"};

/* The bytes are those of the checkpoint's index, before and after a commit has changed every chunk. */
static void a_part_is_of_the_state_that_was_kept(void **state) {
    for (int bf16 = 0; bf16 < 2; bf16++) {
        struct test t;
        uint8_t bytes[BYTES_MAX];
        if (bf16) rig_teardown(state), rig_setup(state);
        begin(&t, *state, bf16, CHUNKS);
        for (int changed = 0; changed < 2; changed++) {
            for (int i = 0; i < 2 + bf16; i++) {
                size_t n = expected(&t, files[i], bf16, bytes);
                store_set(bytes, 0, 0);
                ask(&t, files[i], false, bytes, n);
                if (!t.done) fail_msg("%s: %s", files[i], t.why);
                assert_true(store_has(bytes, n));
            }
            if (!changed) a_commit_changes_it(&t);
        }
        end(&t);
    }
}

static void what_is_not_kept_is_not_sent(void **state) {
    struct test t;
    uint8_t bytes[BYTES_MAX];
    int puts = store.puts;
    begin(&t, *state, false, 2);
    size_t n = expected(&t, files[0], false, bytes);
    ask(&t, files[0], false, bytes, n);
    assert_false(t.done);
    assert_non_null(strstr(t.why, "chunk 2 is not kept"));
    bytes[n - 1] ^= 1; /* another digest than that of the state here */
    struct msg_range all = {0, CHUNKS};
    carrier_keep(t.carrier, t.rig->node[2].sync, &(struct msg_checkpoint_keep){.chunks = &all,
                                                                               .chunks_count = 1});
    ask(&t, files[0], false, bytes, n);
    assert_false(t.done);
    assert_non_null(strstr(t.why, "SHA-256"));
    ask(&t, "ledger.bin", false, bytes, n);
    assert_false(t.done);
    carrier_keep(t.carrier, t.rig->node[2].sync, &(struct msg_checkpoint_keep){0}); /* over */
    bytes[n - 1] ^= 1;
    ask(&t, files[0], false, bytes, n);
    assert_false(t.done);
    assert_non_null(strstr(t.why, "not kept"));
    assert_int_equal(store.puts, puts);
    end(&t);
}

/* Somebody else's part, which need not be kept here. */
static void a_look_finds_other_bytes(void **state) {
    struct test t;
    uint8_t bytes[4096];
    begin(&t, *state, false, 1);
    memset(bytes, 7, sizeof bytes);
    store_set(bytes, sizeof bytes, 0);
    ask(&t, files[0], true, bytes, sizeof bytes);
    if (!t.done) fail_msg("%s", t.why);
    store_set(bytes, sizeof bytes, 4000);
    ask(&t, files[0], true, bytes, sizeof bytes);
    assert_false(t.done);
    assert_non_null(strstr(t.why, "SHA-256"));
    store_set(bytes, 100, 0);
    ask(&t, files[0], true, bytes, sizeof bytes);
    assert_false(t.done);
    end(&t);
}

/* Nobody makes this machine ask other servers, or other places of this one, for anything. */
static void only_the_runs_store_is_asked(void **state) {
    static const char *const elsewhere[] = {"other/run/x", "bucket/running/x", "bucket/run", "x"};
    struct test t;
    uint8_t bytes[64] = {0};
    begin(&t, *state, false, 1);
    store_set(bytes, sizeof bytes, 0);
    for (size_t i = 0; i < sizeof elsewhere / sizeof *elsewhere; i++) {
        ask_at(&t, elsewhere[i], files[0], true, bytes, sizeof bytes);
        assert_false(t.done);
        assert_non_null(strstr(t.why, "not in the run's store"));
    }
    ask(&t, files[0], true, bytes, sizeof bytes);
    assert_true(t.done);
    end(&t);
}

/* Where the URL of the store names no endpoint. */
static void amazons_hosts_are_known(void **state) {
    (void)state;
    static const struct {
        const char *url;
        bool fine;
    } cases[] = {
        {"https://s3.eu-west-1.amazonaws.com/bucket/run/x?a", true},
        {"https://bucket.s3.us-east-1.amazonaws.com/run/x", true},
        {"https://s3.eu-west-1.amazonaws.com/other/run/x", false},
        {"https://other.s3.us-east-1.amazonaws.com/run/x", false},
        {"http://s3.eu-west-1.amazonaws.com/bucket/run/x", false},
        {"https://s3.evil.com/bucket/run/x?.amazonaws.com/", false},
        {"https://s3.evil.com/.amazonaws.com/bucket/run/x", false},
        {"https://192.168.1.1/bucket/run/x", false},
        {"https://u@s3.amazonaws.com/bucket/run/x", false},
        {"https://", false},
    };
    struct err err = {0};
    struct ckpt_courier *c = ckpt_courier_create("s3://bucket/run", &err);
    assert_non_null(c);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (ckpt_courier_follows(c, cases[i].url) != cases[i].fine) fail_msg("%s", cases[i].url);
    ckpt_courier_destroy(c);
}

/* Its thread waits for a store that says nothing; who ends the node does not. */
static void it_ends_while_a_part_is_under_way(void **state) {
    struct test t;
    uint8_t bytes[BYTES_MAX];
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof a;
    int mute = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    char url[96];
    assert_int_equal(bind(mute, (struct sockaddr *)&a, sizeof a), 0);
    assert_int_equal(listen(mute, 4), 0);
    assert_int_equal(getsockname(mute, (struct sockaddr *)&a, &length), 0);
    begin_at(&t, *state, ntohs(a.sin_port), false, CHUNKS);
    size_t n = expected(&t, files[0], false, bytes);
    struct msg_checkpoint_part part = {.object = proto_str(files[0]), .bytes = (uint32_t)n};
    snprintf(url, sizeof url, "http://127.0.0.1:%d/bucket/run/x", ntohs(a.sin_port));
    part.url = proto_str(url);
    EVP_Digest(bytes, n, part.sha256.b, NULL, EVP_sha256(), NULL);
    carrier_part(t.carrier, &part);
    carrier_part(t.carrier, &part);
    int fd = -1;
    for (int i = 0; i < CHUNKS + 2; i++) event_base_loop(t.base, EVLOOP_ONCE | EVLOOP_NONBLOCK);
    fd = accept(mute, NULL, NULL); /* it is there, and hears nothing */
    end(&t);
    assert_int_equal(t.answers, 0);
    close(fd);
    close(mute);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_part_is_of_the_state_that_was_kept, rig_setup, rig_teardown),
        cmocka_unit_test_setup_teardown(what_is_not_kept_is_not_sent, rig_setup, rig_teardown),
        cmocka_unit_test_setup_teardown(a_look_finds_other_bytes, rig_setup, rig_teardown),
        cmocka_unit_test_setup_teardown(only_the_runs_store_is_asked, rig_setup, rig_teardown),
        cmocka_unit_test(amazons_hosts_are_known),
        cmocka_unit_test_setup_teardown(it_ends_while_a_part_is_under_way, rig_setup, rig_teardown),
    };
    setenv("INTELLECT_STORE_STALL_S", "1", 1);
    store_start();
    int result = cmocka_run_group_tests(tests, NULL, NULL);
    store_end();
    return result;
}
