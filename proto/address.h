/* address.h - HOST:PORT as people write it, and under which address others reach this machine. */
#ifndef INTELLECT_PROTO_ADDRESS_H
#define INTELLECT_PROTO_ADDRESS_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/proto.h"

struct address {
    char host[PROTO_ADDRESS_BYTES_MAX + 1]; /* without brackets */
    uint16_t port;
};

/* "HOST:PORT" or "[IPv6]:PORT"; with port_optional also "HOST" (port 0). Nothing is looked up.
 * ERR_CONFIG says what is wrong. */
int address_split(const char *text, bool port_optional, struct address *out, struct err *err);

/* "HOST:PORT", with brackets around an IPv6 literal. */
#define ADDRESS_TEXT_BYTES (PROTO_ADDRESS_BYTES_MAX + 16)
void address_format(const struct address *a, char out[ADDRESS_TEXT_BYTES]);

/* 0.0.0.0 and ::, which are every address of this machine; 127.x.x.x, ::1 and localhost. */
bool address_is_any(const char *host);
bool address_is_loopback(const char *host);

/* Under which address others reach what listens on `listen`: what `stated` says, as far as it says
 * something ("" or HOST or HOST:PORT, from serve.address); else listen's own host; where that is
 * every address, this machine's first one that is not loopback, and 127.0.0.1 where there is none. */
int address_for_others(const struct address *listen, const char *stated, struct address *out,
                       struct err *err);

#endif
