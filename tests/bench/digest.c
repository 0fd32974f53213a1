/* digest.c - BLAKE2b and the digest tree, beside OpenSSL's BLAKE2b and the bare digests. */
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#include "proto/proto.h"
#include "tests/bench/bench.h"

#define DIGEST_ELEMENTS (16 * CHUNK)

struct digesting {
    float *anchor, *momentum;
    struct msg_digest_item *leaf;
};

static int run_digest(void *arg, struct err *err) {
    struct digesting *d = arg;
    (void)err;
    for (size_t i = 0; i < DIGEST_ELEMENTS; i += CHUNK) {
        d->leaf[0].digest = digest_of(d->anchor + i, CHUNK * 4);
        d->leaf[1].digest = digest_of(d->momentum + i, CHUNK * 4);
    }
    return 0;
}

static int run_openssl_blake2(void *arg, struct err *err) {
    struct digesting *d = arg;
    uint8_t out[EVP_MAX_MD_SIZE];
    for (size_t i = 0; i < DIGEST_ELEMENTS; i += CHUNK)
        if (!EVP_Digest(d->anchor + i, CHUNK * 4, out, NULL, EVP_blake2b512(), NULL) ||
            !EVP_Digest(d->momentum + i, CHUNK * 4, out, NULL, EVP_blake2b512(), NULL))
            return err_set(err, ERR_UNSUPPORTED, "OpenSSL has no BLAKE2b");
    return 0;
}

static int run_state_tree(void *arg, struct err *err) {
    struct digesting *d = arg;
    (void)err;
    for (size_t i = 0; i < DIGEST_ELEMENTS / CHUNK; i++)
        d->leaf[i].digest = digest_leaf2(i, d->anchor + i * CHUNK, CHUNK * 4,
                                         d->momentum + i * CHUNK, CHUNK * 4);
    d->leaf[0].digest = digest_tree_root(d->leaf, DIGEST_ELEMENTS / CHUNK);
    return 0;
}

static int run_root(void *arg, struct err *err) {
    struct digesting *d = arg;
    (void)err;
    d->leaf[0].digest = digest_tree_root(d->leaf, LEAVES);
    return 0;
}

/* What the tree cannot do without: one digest of two digests and a byte for each inner node. */
static int run_nodes(void *arg, struct err *err) {
    struct digesting *d = arg;
    uint8_t node[65];
    (void)err;
    for (size_t i = 0; i + 1 < LEAVES; i++) {
        memcpy(node, d->leaf[i].digest.b, sizeof node - 33);
        d->leaf[i].digest = digest_of(node, sizeof node);
    }
    return 0;
}

int bench_digest(struct bench *b, int unused, struct err *err) {
    struct digesting d = {take_memory(DIGEST_ELEMENTS * 4), take_memory(DIGEST_ELEMENTS * 4),
                          take_memory(LEAVES * sizeof *d.leaf)};
    struct task task[] = {{run_digest, &d, NULL}, {run_openssl_blake2, &d, NULL},
                          {run_state_tree, &d, NULL}, {run_root, &d, NULL}, {run_nodes, &d, NULL}};
    double bytes = 2 * DIGEST_ELEMENTS * 4;
    struct series s[5];
    (void)unused;
    if (time_on_core(task, s, 5, 1.5, err)) return -1;
    row_rate(b, "BLAKE2b-256, one core", "GB/s", bytes / GB, &s[0], "OpenSSL's BLAKE2b", bytes / GB,
             &s[1]);
    row_rate(b, "digest tree over anchor and momentum, one core", "GB/s", bytes / GB, &s[2],
             "BLAKE2b of the same", bytes / GB, &s[0]);
    row_rate(b, "digest tree, root of 65536 leaves, one core", "M leaves/s", LEAVES / 1e6, &s[3],
             "its nodes' digests", LEAVES / 1e6, &s[4]);
    free(d.anchor);
    free(d.momentum);
    free(d.leaf);
    return 0;
}
