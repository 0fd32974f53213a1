/* tls.h - OpenSSL settings and error texts of the channel; internal to proto/. */
#ifndef INTELLECT_TLS_H
#define INTELLECT_TLS_H

#include <openssl/ssl.h>

#include "proto/proto.h"

/* True when an OpenSSL call failed; then `err` has its text, OpenSSL's explanation and the line. */
#define SSL_FAILED(ok, err) (!(ok) && tls_error(err, #ok, __FILE__, __LINE__))
bool tls_error(struct err *err, const char *call, const char *file, int line);

/* TLS 1.3 only, both sides show a self-signed Ed25519 certificate and prove its key, no sessions
 * are resumed, ALPN "intellect/1". The caller frees it with SSL_CTX_free(). */
SSL_CTX *tls_context_create(const struct identity *id, struct err *err);

/* After the handshake: the key the peer proved. ERR_PROTOCOL when it did not agree on the ALPN. */
int tls_peer_key(SSL *ssl, struct proto_key *out, struct err *err);

/* Put into words why a connection failed: `code` is OpenSSL's first error (0 = none), `saved_errno`
 * that of the socket. */
void tls_explain(unsigned long code, int saved_errno, bool shaking, struct err *err);
/* The other side spoke plain HTTP. */
bool tls_code_is_http(unsigned long code);

#endif
