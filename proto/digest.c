/* digest.c - BLAKE2b-256 digests and the digest tree over chunks. */
#include <assert.h>
#include <pthread.h>
#include <sodium.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#include "proto/proto.h"

_Static_assert(sizeof(crypto_generichash_state) <= sizeof(struct digest_stream),
               "digest_stream must hold libsodium's state");

static crypto_generichash_state *state_of(struct digest_stream *s) {
    return (crypto_generichash_state *)(void *)s;
}

void digest_stream_init(struct digest_stream *s) {
    crypto_generichash_init(state_of(s), NULL, 0, PROTO_DIGEST_BYTES);
}

void digest_stream_update(struct digest_stream *s, const void *bytes, size_t length) {
    crypto_generichash_update(state_of(s), bytes, length);
}

struct digest digest_stream_final(struct digest_stream *s) {
    struct digest d;
    crypto_generichash_final(state_of(s), d.b, sizeof d.b);
    return d;
}

struct digest digest_of(const void *bytes, size_t length) {
    struct digest d;
    crypto_generichash(d.b, sizeof d.b, bytes, length, NULL, 0);
    return d;
}

/* In constant time, because invite secrets are compared with it. */
bool digest_equal(const struct digest *a, const struct digest *b) {
    return sodium_memcmp(a->b, b->b, sizeof a->b) == 0;
}

bool digest_is_zero(const struct digest *d) { return sodium_is_zero(d->b, sizeof d->b); }

void digest_hex(const struct digest *d, char *out) {
    sodium_bin2hex(out, DIGEST_HEX_BYTES, d->b, sizeof d->b);
}

int digest_parse(const char *hex, struct digest *out, struct err *err) {
    size_t length = strlen(hex), got = 0;
    struct digest d;
    if (length != DIGEST_HEX_BYTES - 1)
        return err_set(err, ERR_CONFIG, "a digest has %d hexadecimal digits, this has %zu",
                       DIGEST_HEX_BYTES - 1, length);
    if (sodium_hex2bin(d.b, sizeof d.b, hex, length, NULL, &got, NULL) || got != sizeof d.b)
        return err_set(err, ERR_CONFIG, "\"%s\" is not a digest: hexadecimal digits only", hex);
    *out = d;
    return 0;
}

/* ---- the digest tree ----------------------------------------------------------------------------
 */

void digest_leaf_begin(struct digest_stream *s, uint64_t index) {
    uint8_t head[9] = {0};
    for (int i = 0; i < 8; i++) head[1 + i] = (uint8_t)(index >> (8 * i));
    digest_stream_init(s);
    digest_stream_update(s, head, sizeof head);
}

struct digest digest_leaf2(uint64_t index, const void *a, size_t a_length, const void *b,
                           size_t b_length) {
    struct digest_stream s;
    digest_leaf_begin(&s, index);
    digest_stream_update(&s, a, a_length);
    digest_stream_update(&s, b, b_length);
    return digest_stream_final(&s);
}

struct digest digest_leaf(uint64_t index, const void *bytes, size_t length) {
    return digest_leaf2(index, bytes, length, NULL, 0);
}

struct leaves {
    struct digest_piece *piece;
    size_t count;
    atomic_size_t next; /* the first piece that nobody has taken */
};

static void *take_pieces(void *arg) {
    struct leaves *l = arg;
    for (size_t i; (i = atomic_fetch_add(&l->next, 1)) < l->count;) {
        struct digest_piece *p = &l->piece[i];
        p->leaf = digest_leaf2(p->index, p->a, p->a_length, p->b, p->b_length);
    }
    return NULL;
}

static size_t threads_worth(const struct digest_piece *piece, size_t count, size_t threads) {
    long cores = threads ? (long)threads : sysconf(_SC_NPROCESSORS_ONLN);
    size_t most = cores > 1 ? (size_t)cores : 1, bytes = 0;
    for (size_t i = 0; i < count; i++) bytes += piece[i].a_length + piece[i].b_length;
    if (most > DIGEST_THREADS_MAX) most = DIGEST_THREADS_MAX;
    if (most > count) most = count;
    return most > bytes / DIGEST_THREAD_BYTES_MIN ? bytes / DIGEST_THREAD_BYTES_MIN : most;
}

/* Threads of its own, begun and ended here: a team of OpenMP's spins after its work unless the whole
 * process says otherwise (half as much CPU again, beside a trainer that wants it), and does not
 * survive a fork. To begin one takes some 20 us, to digest DIGEST_THREAD_BYTES_MIN half a
 * millisecond. */
void digest_leaves(struct digest_piece *piece, size_t count, size_t threads) {
    struct leaves l = {.piece = piece, .count = count};
    pthread_t helper[DIGEST_THREADS_MAX];
    size_t helpers = 0, worth = threads_worth(piece, count, threads);
    while (helpers + 1 < worth && !pthread_create(&helper[helpers], NULL, take_pieces, &l))
        helpers++;
    take_pieces(&l);
    while (helpers) pthread_join(helper[--helpers], NULL);
}

static struct digest node_of(const struct digest *left, const struct digest *right) {
    uint8_t joined[1 + 2 * PROTO_DIGEST_BYTES] = {1};
    memcpy(joined + 1, left->b, PROTO_DIGEST_BYTES);
    memcpy(joined + 1 + PROTO_DIGEST_BYTES, right->b, PROTO_DIGEST_BYTES);
    return digest_of(joined, sizeof joined);
}

/* A binary counter of finished subtrees: after leaf i, one subtree per set bit of i + 1, widest
 * first. Folding what is left from the right gives the shape in which an odd node moves up. */
struct digest digest_tree_root(const struct msg_digest_item *leaves, size_t count) {
    struct digest pending[8 * sizeof count];
    struct digest root = {{0}};
    size_t depth = 0;
    for (size_t i = 0; i < count; i++) {
        struct digest d = leaves[i].digest;
        for (size_t bits = i; bits & 1; bits >>= 1) d = node_of(&pending[--depth], &d);
        pending[depth++] = d;
    }
    if (depth) root = pending[--depth];
    while (depth) {
        depth--;
        root = node_of(&pending[depth], &root);
    }
    return root;
}

size_t digest_tree_path(const struct msg_digest_item *leaves, size_t count, size_t index,
                        struct msg_digest_item path[DIGEST_PATH_MAX]) {
    assert(index < count && (uint64_t)count <= UINT64_C(1) << DIGEST_PATH_MAX);
    size_t length = 0;
    for (unsigned level = 0; (count - 1) >> level; level++) {
        size_t width = (size_t)1 << level;
        size_t start = ((index >> level) ^ 1) << level;
        if (start >= count) continue; /* no sibling: the node moves up */
        size_t leaves_under = count - start < width ? count - start : width;
        path[length++].digest = digest_tree_root(leaves + start, leaves_under);
    }
    return length;
}

bool digest_tree_verify(const struct digest *root, const struct digest *leaf, size_t index,
                        size_t count, const struct msg_digest_item *path, size_t path_count) {
    if (index >= count) return false;
    struct digest d = *leaf;
    size_t used = 0;
    for (; count > 1; index >>= 1, count = count / 2 + count % 2) {
        if ((index ^ 1) >= count) continue;
        if (used == path_count) return false;
        const struct digest *sibling = &path[used++].digest;
        d = index & 1 ? node_of(sibling, &d) : node_of(&d, sibling);
    }
    return used == path_count && digest_equal(&d, root);
}
