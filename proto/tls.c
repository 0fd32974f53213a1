/* tls.c - one SSL_CTX for both ends: mutual TLS 1.3 between self-signed Ed25519 certificates.
 *
 * A certificate is only the envelope in which TLS carries a raw public key: names, dates and
 * extensions in it are never looked at. Whether the key is welcome is for the caller. */
#include "proto/tls.h"

#include <errno.h>
#include <openssl/err.h>
#include <openssl/x509.h>
#include <string.h>

#include "proto/stream.h"

#define CIPHERS "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
#define CERTIFICATES_BYTES_MAX 4096 /* ours has about 260 */

static const unsigned char alpn[] = "\x0bintellect/1"; /* length, then name */
#define ALPN_BYTES (sizeof alpn - 1)

bool tls_error(struct err *err, const char *call, const char *file, int line) {
    const char *reason = ERR_reason_error_string(ERR_peek_error());
    err_set(err, ERR_UNSUPPORTED, "%s: %s (%s:%d)", call, reason ? reason : "failed", file, line);
    ERR_clear_error();
    return true;
}

/* ---- the certificate --------------------------------------------------------------------------
 */

static bool fill_certificate(X509 *x, EVP_PKEY *key, struct err *err) {
    X509_NAME *name = X509_get_subject_name(x);
    const unsigned char *text = (const unsigned char *)"intellect";
    return !(
        SSL_FAILED(X509_set_version(x, X509_VERSION_3), err) ||
        SSL_FAILED(ASN1_INTEGER_set(X509_get_serialNumber(x), 1), err) ||
        SSL_FAILED(ASN1_TIME_set_string(X509_getm_notBefore(x), "20000101000000Z"), err) ||
        SSL_FAILED(ASN1_TIME_set_string(X509_getm_notAfter(x), "99991231235959Z"), err) ||
        SSL_FAILED(X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, text, -1, -1, 0), err) ||
        SSL_FAILED(X509_set_issuer_name(x, name), err) ||
        SSL_FAILED(X509_set_pubkey(x, key), err) || SSL_FAILED(X509_sign(x, key, NULL), err));
}

static int use_identity(SSL_CTX *ctx, const struct identity *id, struct err *err) {
    /* The first 32 bytes of libsodium's secret are the seed, which is what OpenSSL calls it. */
    EVP_PKEY *key = EVP_PKEY_new_raw_private_key(EVP_PKEY_ED25519, NULL, id->secret, 32);
    X509 *x = X509_new();
    int result = -1;
    if (SSL_FAILED(key && x, err) || !fill_certificate(x, key, err)) goto out;
    if (SSL_FAILED(SSL_CTX_use_certificate(ctx, x) == 1, err)) goto out;
    if (SSL_FAILED(SSL_CTX_use_PrivateKey(ctx, key) == 1, err)) goto out;
    result = 0;
out:
    X509_free(x);
    EVP_PKEY_free(key);
    return result;
}

/* ---- what we accept of a peer -------------------------------------------------------------------
 */

/* Takes the place of chain verification. That the peer owns the key is proved by TLS itself. */
static int check_certificate(X509_STORE_CTX *store, void *arg) {
    (void)arg;
    X509 *leaf = X509_STORE_CTX_get0_cert(store);
    EVP_PKEY *key = leaf ? X509_get0_pubkey(leaf) : NULL;
    bool ok = key && sk_X509_num(X509_STORE_CTX_get0_untrusted(store)) == 1 &&
              EVP_PKEY_is_a(key, "ED25519") && X509_verify(leaf, key) == 1;
    ERR_clear_error();
    if (!ok) X509_STORE_CTX_set_error(store, X509_V_ERR_APPLICATION_VERIFICATION);
    return ok;
}

static int select_alpn(SSL *ssl, const unsigned char **out, unsigned char *out_length,
                       const unsigned char *in, unsigned in_length, void *arg) {
    (void)ssl, (void)arg;
    unsigned char *chosen = NULL;
    if (SSL_select_next_proto(&chosen, out_length, alpn, ALPN_BYTES, in, in_length) !=
        OPENSSL_NPN_NEGOTIATED)
        return SSL_TLSEXT_ERR_ALERT_FATAL;
    *out = chosen;
    return SSL_TLSEXT_ERR_OK;
}

int tls_peer_key(SSL *ssl, struct proto_key *out, struct err *err) {
    const unsigned char *name = NULL;
    unsigned length = 0;
    SSL_get0_alpn_selected(ssl, &name, &length);
    if (length != ALPN_BYTES - 1 || memcmp(name, alpn + 1, length) != 0)
        return err_set(err, ERR_PROTOCOL, "TLS: the peer does not speak \"%s\" (ALPN)", alpn + 1);
    X509 *leaf = SSL_get0_peer_certificate(ssl);
    EVP_PKEY *key = leaf ? X509_get0_pubkey(leaf) : NULL;
    size_t key_bytes = sizeof out->b;
    if (!key || EVP_PKEY_get_raw_public_key(key, out->b, &key_bytes) != 1 ||
        key_bytes != sizeof out->b)
        return err_set(err, ERR_PROTOCOL, "TLS: the peer has no Ed25519 key");
    return 0;
}

/* ---- the context
 * --------------------------------------------------------------------------------- */

static int configure(SSL_CTX *ctx, const struct identity *id, struct err *err) {
    SSL_CTX_set_options(ctx, SSL_OP_NO_TICKET | SSL_OP_NO_COMPRESSION | SSL_OP_NO_RENEGOTIATION);
    SSL_CTX_set_session_cache_mode(ctx, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_mode(ctx, SSL_MODE_RELEASE_BUFFERS); /* an idle connection keeps none */
    SSL_CTX_set_read_ahead(ctx, 1);                  /* else two system calls for each record */
    SSL_CTX_set_default_read_buffer_len(ctx, STREAM_READ_BYTES);
    SSL_CTX_set_max_cert_list(ctx, CERTIFICATES_BYTES_MAX);
    SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    SSL_CTX_set_cert_verify_callback(ctx, check_certificate, NULL);
    SSL_CTX_set_alpn_select_cb(ctx, select_alpn, NULL);
    if (SSL_FAILED(SSL_CTX_set_min_proto_version(ctx, TLS1_3_VERSION) == 1, err)) return -1;
    if (SSL_FAILED(SSL_CTX_set_max_proto_version(ctx, TLS1_3_VERSION) == 1, err)) return -1;
    if (SSL_FAILED(SSL_CTX_set_ciphersuites(ctx, CIPHERS) == 1, err)) return -1;
    if (SSL_FAILED(SSL_CTX_set_num_tickets(ctx, 0) == 1, err)) return -1;
    if (SSL_FAILED(SSL_CTX_set1_sigalgs_list(ctx, "ed25519") == 1, err)) return -1;
    if (SSL_FAILED(SSL_CTX_set_alpn_protos(ctx, alpn, ALPN_BYTES) == 0, err)) return -1;
    return use_identity(ctx, id, err);
}

SSL_CTX *tls_context_create(const struct identity *id, struct err *err) {
    SSL_CTX *ctx = SSL_CTX_new(TLS_method());
    if (SSL_FAILED(ctx != NULL, err)) return NULL;
    if (configure(ctx, id, err)) {
        SSL_CTX_free(ctx);
        return NULL;
    }
    return ctx;
}

/* ---- errors
 * -------------------------------------------------------------------------------------- */

bool tls_code_is_http(unsigned long code) {
    int reason = ERR_GET_REASON(code);
    return ERR_GET_LIB(code) == ERR_LIB_SSL &&
           (reason == SSL_R_HTTP_REQUEST || reason == SSL_R_HTTPS_PROXY_REQUEST);
}

void tls_explain(unsigned long code, int saved_errno, bool shaking, struct err *err) {
    const char *phase = shaking ? " during the TLS handshake" : "";
    bool of_ssl = ERR_GET_LIB(code) == ERR_LIB_SSL;
    int reason = ERR_GET_REASON(code);
    const char *text = ERR_reason_error_string(code);
    if (tls_code_is_http(code))
        err_set(err, ERR_PROTOCOL, "plain HTTP on the TLS port");
    else if (of_ssl && reason == SSL_R_UNEXPECTED_EOF_WHILE_READING)
        err_set(err, ERR_IO, "connection lost%s (no TLS close)", phase);
    else if (of_ssl && reason == SSL_R_CERTIFICATE_VERIFY_FAILED)
        err_set(err, ERR_REFUSED, "TLS: the peer's certificate is not one self-signed Ed25519 one");
    else if (of_ssl && reason >= SSL_AD_REASON_OFFSET)
        err_set(err, ERR_REFUSED, "TLS: the peer refused%s: %s", phase, text ? text : "alert");
    else if (of_ssl && shaking && reason == SSL_R_WRONG_VERSION_NUMBER)
        err_set(err, ERR_PROTOCOL, "TLS: the other side does not speak TLS");
    else if (code && text)
        err_set(err, ERR_PROTOCOL, "TLS: %s%s", text, phase);
    else if (saved_errno)
        err_set(err, ERR_IO, "connection lost%s: %s", phase, strerror(saved_errno));
    else
        err_set(err, ERR_IO, "connection lost%s", phase);
}
