/* identity.c - Ed25519 identities, the file they live in, and signatures. */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "proto/proto.h"

/* The one line of the file: this word, a space, the seed in hexadecimal, a newline. */
#define IDENTITY_WORD "intellect-identity-1"
#define IDENTITY_SEED_BYTES 32u
#define IDENTITY_LINE_BYTES (sizeof IDENTITY_WORD + 2 * IDENTITY_SEED_BYTES + 1)

void identity_create(struct identity *id) { crypto_sign_keypair(id->key.b, id->secret); }

void identity_from_seed(struct identity *id, const uint8_t seed[32]) {
    crypto_sign_seed_keypair(id->key.b, id->secret, seed);
}

void identity_release(struct identity *id) { sodium_memzero(id, sizeof *id); }

static int write_all(int fd, const char *bytes, size_t length) {
    while (length) {
        ssize_t n = write(fd, bytes, length);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return -1;
        bytes += n;
        length -= (size_t)n;
    }
    return 0;
}

static int write_private_file(const char *path, const char *line, size_t length, struct err *err) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0) return err_set_errno(err, "create %s", path);
    int failed = fchmod(fd, 0600) || write_all(fd, line, length) || fsync(fd);
    if (failed) err_set_errno(err, "write %s", path);
    close(fd);
    return failed ? -1 : 0;
}

/* So that the new name is there after a power cut. */
static void sync_folder_of(const char *path) {
    char *folder = strdup(path);
    if (!folder) return;
    char *slash = strrchr(folder, '/');
    if (slash) slash[slash == folder] = '\0';
    int fd = open(slash ? folder : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
    free(folder);
}

int identity_save(const struct identity *id, const char *path, struct err *err) {
    char line[IDENTITY_LINE_BYTES + 1] = IDENTITY_WORD " ";
    char temporary[4096];
    int result = -1;
    if (snprintf(temporary, sizeof temporary, "%s.new", path) >= (int)sizeof temporary)
        return err_set(err, ERR_CONFIG, "the path of the identity is too long");
    sodium_bin2hex(line + sizeof IDENTITY_WORD, sizeof line - sizeof IDENTITY_WORD, id->secret,
                   IDENTITY_SEED_BYTES);
    line[IDENTITY_LINE_BYTES - 1] = '\n';
    if (write_private_file(temporary, line, IDENTITY_LINE_BYTES, err)) goto out;
    /* link, not rename: an identity that is already there must never be replaced. */
    if (link(temporary, path)) {
        err_set_errno(err, "save the identity as %s", path);
        goto out;
    }
    result = 0;
out:
    unlink(temporary);
    sync_folder_of(path);
    sodium_memzero(line, sizeof line);
    return result;
}

static int check_private(int fd, const char *path, struct err *err) {
    struct stat st;
    if (fstat(fd, &st)) return err_set_errno(err, "stat %s", path);
    if (!S_ISREG(st.st_mode)) return err_set(err, ERR_CORRUPT, "%s is not a regular file", path);
    if (st.st_mode & 077)
        return err_set(
            err, ERR_REFUSED,
            "%s holds a private key and has mode %04o: others may reach it; chmod 600 it", path,
            (unsigned)(st.st_mode & 07777));
    return 0;
}

int identity_load(struct identity *id, const char *path, struct err *err) {
    char line[IDENTITY_LINE_BYTES + 1]; /* one more than it may have */
    uint8_t seed[IDENTITY_SEED_BYTES];
    int result = -1;
    int fd =
        open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO in its place must not hang us */
    if (fd < 0) return err_set_errno(err, "open %s", path);
    if (check_private(fd, path, err)) goto out;
    ssize_t got = read(fd, line, sizeof line);
    if (got < 0) {
        err_set_errno(err, "read %s", path);
        goto out;
    }
    if (got != (ssize_t)IDENTITY_LINE_BYTES ||
        memcmp(line, IDENTITY_WORD " ", sizeof IDENTITY_WORD) != 0 ||
        line[IDENTITY_LINE_BYTES - 1] != '\n' ||
        sodium_hex2bin(seed, sizeof seed, line + sizeof IDENTITY_WORD, 2 * sizeof seed, NULL, NULL,
                       NULL)) {
        err_set(err, ERR_CORRUPT,
                "%s is not an identity: one line, \"%s\" and %u hexadecimal digits", path,
                IDENTITY_WORD, 2 * IDENTITY_SEED_BYTES);
        goto out;
    }
    identity_from_seed(id, seed);
    result = 0;
out:
    sodium_memzero(line, sizeof line);
    sodium_memzero(seed, sizeof seed);
    close(fd);
    return result;
}

/* ---- signatures
 * ------------------------------------------------------------------------------------ */

#define SIGNED_PREFIX "intellect/1 "

/* What is really signed. Ed25519 reads its message twice, so it has to lie in one piece; the caller
 * frees it. Out of memory ends the process: half a signature helps nobody. */
static uint8_t *signed_bytes(const char *purpose, const struct digest *run, uint64_t term,
                             const void *bytes, size_t length, size_t *total) {
    size_t prefix = sizeof SIGNED_PREFIX - 1, purpose_bytes = strlen(purpose) + 1;
    *total = prefix + purpose_bytes + sizeof run->b + 8 + length;
    uint8_t *all = malloc(*total);
    assert(all && "out of memory for a signature");
    uint8_t *p = all;
    p = (uint8_t *)memcpy(p, SIGNED_PREFIX, prefix) + prefix;
    p = (uint8_t *)memcpy(p, purpose, purpose_bytes) + purpose_bytes;
    p = (uint8_t *)memcpy(p, run->b, sizeof run->b) + sizeof run->b;
    for (int i = 0; i < 8; i++) *p++ = (uint8_t)(term >> (8 * i));
    if (length) memcpy(p, bytes, length);
    return all;
}

void proto_sign(const struct identity *id, const char *purpose, const struct digest *run,
                uint64_t term, const void *bytes, size_t length, struct proto_sig *out) {
    size_t total;
    uint8_t *all = signed_bytes(purpose, run, term, bytes, length, &total);
    crypto_sign_detached(out->b, NULL, all, total, id->secret);
    free(all);
}

bool proto_verify(const struct proto_key *key, const char *purpose, const struct digest *run,
                  uint64_t term, const void *bytes, size_t length, const struct proto_sig *sig) {
    size_t total;
    uint8_t *all = signed_bytes(purpose, run, term, bytes, length, &total);
    bool ok = crypto_sign_verify_detached(sig->b, all, total, key->b) == 0;
    free(all);
    return ok;
}

int proto_record_sign(const struct identity *id, const char *purpose, const struct digest *run,
                      uint64_t term, enum proto_record which, const void *record,
                      struct proto_sig *out, struct err *err) {
    struct proto_buffer b;
    proto_buffer_init(&b, proto_record_bytes_max(which));
    int rc = proto_encode(&b, which, record, err);
    if (!rc) {
        memset(b.data + b.length - sizeof *out, 0, sizeof *out);
        proto_sign(id, purpose, run, term, b.data, b.length, out);
    }
    proto_buffer_release(&b);
    return rc;
}

bool proto_record_verify(const struct proto_key *key, const char *purpose, const struct digest *run,
                         uint64_t term, const uint8_t *bytes, size_t length) {
    struct proto_sig sig;
    uint8_t *blank = length > sizeof sig ? malloc(length) : NULL;
    if (!blank) return false;
    memcpy(blank, bytes, length);
    memcpy(&sig, bytes + length - sizeof sig, sizeof sig);
    memset(blank + length - sizeof sig, 0, sizeof sig);
    bool ok = proto_verify(key, purpose, run, term, blank, length, &sig);
    free(blank);
    return ok;
}
