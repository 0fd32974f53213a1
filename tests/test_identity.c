/* test_identity.c - digests, keys, signatures, invites: what others name and prove by. */
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/proto_rig.h"

/* ---- digests ---------------------------------------------------------------------------------- */

/* Other implementations must get the same names for the same bytes: RFC 7693's function with 32
 * bytes out, checked against `b2sum -l 256`. */
static void digest_is_blake2b_256(void **state) {
    (void)state;
    struct digest d = digest_of("abc", 3);
    assert_hex(d.b, 32, "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319");
    struct digest_stream s;
    digest_stream_init(&s);
    digest_stream_update(&s, "a", 1);
    digest_stream_update(&s, "bc", 2);
    struct digest e = digest_stream_final(&s);
    assert_true(digest_equal(&d, &e));
    assert_false(digest_is_zero(&d));
}

static void digest_text_goes_both_ways(void **state) {
    (void)state;
    char hex[DIGEST_HEX_BYTES];
    struct digest d = digest_of("abc", 3), e;
    struct err none = {0};
    digest_hex(&d, hex);
    assert_int_equal(digest_parse(hex, &e, &none), 0);
    assert_true(digest_equal(&d, &e));
    assert_refused(digest_parse("abcd", &e, err), ERR_CONFIG, "64 hexadecimal digits, this has 4");
    hex[10] = 'g';
    assert_refused(digest_parse(hex, &e, err), ERR_CONFIG, "hexadecimal digits only");
}

static struct digest node(const struct digest *a, const struct digest *b) {
    uint8_t joined[65] = {1};
    memcpy(joined + 1, a->b, 32);
    memcpy(joined + 33, b->b, 32);
    return digest_of(joined, sizeof joined);
}

/* The tree as proto.h words it, level by level; digest.c folds subtrees instead. */
static struct digest root_by_levels(const struct msg_digest_item *leaves, size_t count) {
    struct digest level[70];
    for (size_t i = 0; i < count; i++) level[i] = leaves[i].digest;
    while (count > 1) {
        size_t n = 0;
        for (size_t i = 0; i < count; i += 2)
            level[n++] = i + 1 < count ? node(&level[i], &level[i + 1]) : level[i];
        count = n;
    }
    return level[0];
}

/* Path verification is what lets a joiner take a chunk from anyone, so every leaf of every shape
 * must verify and nothing else may. */
static void tree_paths_of_all_sizes_verify(void **state) {
    (void)state;
    struct msg_digest_item leaves[70], path[DIGEST_PATH_MAX];
    for (size_t i = 0; i < 70; i++) leaves[i].digest = digest_leaf(i, &i, sizeof i);
    for (size_t count = 1; count <= 70; count++) {
        struct digest root = digest_tree_root(leaves, count),
                      by_levels = root_by_levels(leaves, count);
        assert_true(digest_equal(&root, &by_levels));
        for (size_t i = 0; i < count; i++) {
            const struct digest *leaf = &leaves[i].digest, *other = &leaves[(i + 1) % 70].digest;
            size_t n = digest_tree_path(leaves, count, i, path);
            assert_true(digest_tree_verify(&root, leaf, i, count, path, n));
            assert_false(digest_tree_verify(&root, other, i, count, path, n));
            if (count > 1) {
                assert_false(digest_tree_verify(&root, leaf, i ^ 1, count, path, n));
                assert_false(digest_tree_verify(&root, leaf, i, count, path, n - 1));
            }
            assert_false(digest_tree_verify(&root, leaf, i, count, path, n + 1));
            assert_false(digest_tree_verify(&root, leaf, i + count, count, path, n));
        }
    }
    struct digest empty = digest_tree_root(NULL, 0);
    assert_true(digest_is_zero(&empty));
    assert_false(digest_tree_verify(&empty, &leaves[0].digest, 0, 0, NULL, 0));
}

/* The index in the leaf keeps equal chunks from being exchanged, and the first byte keeps a leaf
 * from passing as a node. */
static void leaves_are_bound_to_their_place(void **state) {
    (void)state;
    struct digest a = digest_leaf(1, "xyz", 3), b = digest_leaf(2, "xyz", 3);
    struct digest pieces = digest_leaf2(1, "x", 1, "yz", 2);
    assert_false(digest_equal(&a, &b));
    assert_true(digest_equal(&a, &pieces));
    struct digest by_hand = digest_of("\0\1\0\0\0\0\0\0\0xyz", 12);
    assert_true(digest_equal(&a, &by_hand));
}

/* Pieces of all lengths, with more threads than cores, and with fewer pieces than threads: each gets
 * the leaf that it gets alone, whoever computes it. */
static void leaves_at_once_are_the_leaves_one_by_one(void **state) {
    (void)state;
    enum { PIECES = 40, LENGTH = 6 << 20 };
    static uint8_t bytes[LENGTH];
    struct digest_piece piece[PIECES];
    for (size_t i = 0; i < LENGTH; i++) bytes[i] = (uint8_t)(i * i >> 8);
    for (size_t threads = 0; threads <= 20; threads += 5)
        for (size_t count = 0; count <= PIECES; count += count < 4 ? 1 : 12) {
            size_t length = LENGTH / 4 / (count + 1);
            for (size_t i = 0; i < count; i++)
                piece[i] = (struct digest_piece){
                    .index = 1000 + i, .a = bytes + i * length, .a_length = length,
                    .b = i % 3 ? bytes + 7 * i : NULL, .b_length = i % 3 ? i * 1000 : 0};
            digest_leaves(piece, count, threads);
            for (size_t i = 0; i < count; i++) {
                const struct digest_piece *p = &piece[i];
                struct digest want = digest_leaf2(p->index, p->a, p->a_length, p->b, p->b_length);
                assert_true(digest_equal(&p->leaf, &want));
            }
        }
}

/* ---- identities ------------------------------------------------------------------------------- */

static char folder[] = "/tmp/test-proto-XXXXXX";
static char identity_path[64];

static int make_folder(void **state) {
    (void)state;
    struct err err;
    fill_junk();
    if (proto_init(&err) || !mkdtemp(folder)) return -1;
    snprintf(identity_path, sizeof identity_path, "%s/identity", folder);
    return 0;
}
static int remove_folder(void **state) {
    (void)state;
    unlink(identity_path);
    return rmdir(folder);
}

static void identity_survives_its_file(void **state) {
    (void)state;
    struct identity id, loaded;
    struct stat st;
    struct err none = {0};
    unlink(identity_path);
    identity_create(&id);
    assert_int_equal(identity_save(&id, identity_path, &none), 0);
    assert_int_equal(stat(identity_path, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0600);
    assert_int_equal(identity_load(&loaded, identity_path, &none), 0);
    assert_memory_equal(&id, &loaded, sizeof id);
    /* A second node started in the same folder by mistake must not take the first one's name. */
    assert_refused(identity_save(&id, identity_path, err), ERR_IO, "File exists");
}

static void identity_others_may_read_is_refused(void **state) {
    (void)state;
    struct identity id;
    struct err none = {0};
    unlink(identity_path);
    identity_create(&id);
    assert_int_equal(identity_save(&id, identity_path, &none), 0);
    for (mode_t extra = 1; extra <= 040; extra *= 2) {
        chmod(identity_path, 0600 | extra);
        assert_refused(identity_load(&id, identity_path, err), ERR_REFUSED, "chmod 600");
    }
    chmod(identity_path, 0400);
    assert_int_equal(identity_load(&id, identity_path, &none), 0);
}

static void write_file(const char *text, size_t length) {
    unlink(identity_path);
    int fd = open(identity_path, O_WRONLY | O_CREAT, 0600);
    assert_int_equal(write(fd, text, length), length);
    close(fd);
}

static void identity_file_must_be_whole(void **state) {
    (void)state;
    struct identity id;
    char line[] =
        "intellect-identity-1 00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\n";
    struct err none = {0};
    write_file(line, sizeof line - 1);
    assert_int_equal(identity_load(&id, identity_path, &none), 0);
    for (size_t n = 0; n < sizeof line - 1; n++) {
        write_file(line, n);
        assert_refused(identity_load(&id, identity_path, err), ERR_CORRUPT, "is not an identity");
    }
    write_file(line, sizeof line); /* one byte more */
    assert_refused(identity_load(&id, identity_path, err), ERR_CORRUPT, "is not an identity");
    line[30] = 'x';
    write_file(line, sizeof line - 1);
    assert_refused(identity_load(&id, identity_path, err), ERR_CORRUPT, "is not an identity");
    unlink(identity_path);
    assert_refused(identity_load(&id, identity_path, err), ERR_NOT_FOUND, identity_path);
    mkdir(identity_path, 0700);
    assert_refused(identity_load(&id, identity_path, err), ERR_CORRUPT, "not a regular file");
    rmdir(identity_path);
}

/* Anything signed for one purpose, run or term must be worthless in every other. */
static void signature_covers_purpose_run_term_and_bytes(void **state) {
    (void)state;
    struct identity id, other;
    struct digest run = digest_of("run", 3), run2 = digest_of("run2", 4);
    struct proto_sig sig;
    uint8_t seed[32] = {7};
    identity_from_seed(&id, seed);
    identity_create(&other);
    proto_sign(&id, "ledger", &run, 3, "bytes", 5, &sig);
    assert_true(proto_verify(&id.key, "ledger", &run, 3, "bytes", 5, &sig));
    assert_false(proto_verify(&other.key, "ledger", &run, 3, "bytes", 5, &sig));
    assert_false(proto_verify(&id.key, "roster", &run, 3, "bytes", 5, &sig));
    assert_false(proto_verify(&id.key, "ledger", &run2, 3, "bytes", 5, &sig));
    assert_false(proto_verify(&id.key, "ledger", &run, 4, "bytes", 5, &sig));
    assert_false(proto_verify(&id.key, "ledger", &run, 3, "bytez", 5, &sig));
    assert_false(proto_verify(&id.key, "ledger", &run, 3, "bytes", 4, &sig));
    sig.b[5] ^= 1;
    assert_false(proto_verify(&id.key, "ledger", &run, 3, "bytes", 5, &sig));
}

/* ---- invites ---------------------------------------------------------------------------------- */

#define HEX32 "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

static void invite_goes_both_ways(void **state) {
    (void)state;
    static const char *const hosts[] = {"run.example.org", "203.0.113.7", "2001:db8::7",
                                        "fe80::1%eth0"};
    struct err err = {0};
    for (size_t i = 0; i < 4; i++) {
        struct invite in = {.port = 7400, .run = digest_of("r", 1), .secret = digest_of("s", 1)},
                      out;
        char line[INVITE_BYTES_MAX], pasted[INVITE_BYTES_MAX + 8];
        strcpy(in.host, hosts[i]);
        assert_int_equal(invite_format(&in, line, &err), 0);
        snprintf(pasted, sizeof pasted, "  %s \r\n", line); /* as people paste it */
        assert_int_equal(invite_parse(pasted, &out, &err), 0);
        assert_string_equal(in.host, out.host);
        assert_int_equal(in.port, out.port);
        assert_true(digest_equal(&in.run, &out.run) && digest_equal(&in.secret, &out.secret));
    }
    struct invite v6;
    assert_int_equal(invite_parse("intellect://[::1]:1/" HEX32 "#" HEX32, &v6, &err), 0);
    assert_string_equal(v6.host, "::1");
}

/* An invite is typed and pasted by people: each mistake gets its own sentence. */
static void wrong_invites_say_what_is_wrong(void **state) {
    (void)state;
    static const char *const wrong[][2] = {
        {"", "starts with \"intellect://\""},
        {"https://a:1/" HEX32 "#" HEX32, "starts with \"intellect://\""},
        {"intellect://", "no host name"},
        {"intellect://:7400/" HEX32 "#" HEX32, "no host name"},
        {"intellect://a b:7400/" HEX32 "#" HEX32, "no host name"},
        {"intellect://a/" HEX32 "#" HEX32, "no \":PORT\""},
        {"intellect://[::1/" HEX32 "#" HEX32, "no host name"},
        {"intellect://a:/" HEX32 "#" HEX32, "port \"\", allowed are 1 to 65535"},
        {"intellect://a:0/" HEX32 "#" HEX32, "port \"0\", allowed"},
        {"intellect://a:65536/" HEX32 "#" HEX32, "port \"65536\", allowed"},
        {"intellect://a:99999999999999999999/" HEX32 "#" HEX32, "allowed are 1 to 65535"},
        {"intellect://a:74x0/" HEX32 "#" HEX32, "no '/' before the run name"},
        {"intellect://a:7400", "no '/' before the run name"},
        {"intellect://a:7400/0011#" HEX32, "run name has 4 hexadecimal digits"},
        {"intellect://a:7400/" HEX32, "no '#' before the secret"},
        {"intellect://a:7400/" HEX32 "#0011", "secret has 4 hexadecimal digits, needed are 64"},
        {"intellect://a:7400/" HEX32 "#" HEX32 "0", "secret has 65 hexadecimal digits"},
        {"intellect://a:7400/" HEX32 "#" HEX32 " x", "1 unexpected characters after the secret"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        struct invite out;
        assert_refused(invite_parse(wrong[i][0], &out, err), ERR_CONFIG, wrong[i][1]);
    }
    struct invite bad = {.host = "a\nb", .port = 1};
    char line[INVITE_BYTES_MAX];
    assert_refused(invite_format(&bad, line, err), ERR_CONFIG, "not a host name");
    strcpy(bad.host, "a");
    bad.port = 0;
    assert_refused(invite_format(&bad, line, err), ERR_CONFIG, "port 0");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(digest_is_blake2b_256),
        cmocka_unit_test(digest_text_goes_both_ways),
        cmocka_unit_test(tree_paths_of_all_sizes_verify),
        cmocka_unit_test(leaves_are_bound_to_their_place),
        cmocka_unit_test(leaves_at_once_are_the_leaves_one_by_one),
        cmocka_unit_test(identity_survives_its_file),
        cmocka_unit_test(identity_others_may_read_is_refused),
        cmocka_unit_test(identity_file_must_be_whole),
        cmocka_unit_test(signature_covers_purpose_run_term_and_bytes),
        cmocka_unit_test(invite_goes_both_ways),
        cmocka_unit_test(wrong_invites_say_what_is_wrong),
    };
    return cmocka_run_group_tests_name("identity", tests, make_folder, remove_folder);
}
