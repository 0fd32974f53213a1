/* init.c - what a process must do once before it uses anything of proto.h. */
#include <openssl/ssl.h>
#include <signal.h>
#include <sodium.h>

#include "proto/proto.h"

int proto_init(struct err *err) {
    if (sodium_init() < 0)
        return err_set(err, ERR_UNSUPPORTED, "libsodium does not start on this machine");
    if (OPENSSL_init_ssl(0, NULL) != 1)
        return err_set(err, ERR_UNSUPPORTED, "OpenSSL does not start on this machine");
    /* A peer that vanishes shows up as a failed write, never as a signal. */
    signal(SIGPIPE, SIG_IGN);
    return 0;
}
