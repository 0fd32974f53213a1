/* signatures.c - Ed25519 took half of the simulator's time, and nobody in it forges: here whoever has the
 * public key can sign. A signature still fits one message, key, purpose, run and term only. These stand
 * before the library's own. */
#include <sodium.h>
#include <string.h>

int crypto_sign_detached(unsigned char *signature, unsigned long long *length,
                         const unsigned char *message, unsigned long long message_length,
                         const unsigned char *secret) {
    const unsigned char *key = secret + crypto_sign_SECRETKEYBYTES - crypto_sign_PUBLICKEYBYTES;
    crypto_generichash(signature, crypto_sign_BYTES, message, message_length, key,
                       crypto_sign_PUBLICKEYBYTES);
    if (length) *length = crypto_sign_BYTES;
    return 0;
}

int crypto_sign_verify_detached(const unsigned char *signature, const unsigned char *message,
                                unsigned long long message_length, const unsigned char *key) {
    unsigned char right[crypto_sign_BYTES];
    crypto_generichash(right, sizeof right, message, message_length, key, crypto_sign_PUBLICKEYBYTES);
    return memcmp(right, signature, sizeof right) ? -1 : 0;
}
