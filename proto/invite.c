/* invite.c - the one line that a contributor is given: "intellect://HOST:PORT/RUN#SECRET". */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/proto.h"

#define INVITE_SCHEME "intellect://"

/* What a host name or an address literal may consist of; keeps a pasted line from smuggling in
 * blanks, quotes or terminal codes. */
static bool host_is_plain(const char *host, size_t length) {
    static const char allowed[] =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_:%";
    return length > 0 && length <= PROTO_ADDRESS_BYTES_MAX && strspn(host, allowed) >= length;
}

int invite_format(const struct invite *invite, char out[INVITE_BYTES_MAX], struct err *err) {
    char run[DIGEST_HEX_BYTES], secret[DIGEST_HEX_BYTES];
    if (!host_is_plain(invite->host, strlen(invite->host)))
        return err_set(err, ERR_CONFIG, "invite: \"%s\" is not a host name or address",
                       invite->host);
    if (invite->port == 0)
        return err_set(err, ERR_CONFIG, "invite: port 0, allowed are 1 to 65535");
    digest_hex(&invite->run, run);
    digest_hex(&invite->secret, secret);
    bool literal6 = strchr(invite->host, ':') != NULL;
    int length =
        snprintf(out, INVITE_BYTES_MAX, INVITE_SCHEME "%s%s%s:%u/%s#%s", literal6 ? "[" : "",
                 invite->host, literal6 ? "]" : "", (unsigned)invite->port, run, secret);
    return length < INVITE_BYTES_MAX
               ? 0
               : err_set(err, ERR_CONFIG, "invite: the host name is too long");
}

/* Take HOST or [HOST] from *at up to the colon before the port. */
static int parse_host(const char **at, struct invite *out, struct err *err) {
    bool literal6 = **at == '[';
    const char *start = *at + literal6;
    const char *end = start + strcspn(start, literal6 ? "]" : ":/#");
    size_t length = (size_t)(end - start);
    if (!host_is_plain(start, length))
        return err_set(err, ERR_CONFIG,
                       "invite: no host name or address after \"" INVITE_SCHEME "\"");
    if (literal6 && *end++ != ']')
        return err_set(err, ERR_CONFIG, "invite: the address has a '[' and no ']'");
    if (*end != ':') return err_set(err, ERR_CONFIG, "invite: no \":PORT\" after the host");
    memcpy(out->host, start, length);
    out->host[length] = '\0';
    *at = end + 1;
    return 0;
}

static int parse_port(const char **at, struct invite *out, struct err *err) {
    size_t digits = strspn(*at, "0123456789");
    unsigned long port = digits && digits <= 5 ? strtoul(*at, NULL, 10) : 0;
    if (port == 0 || port > 65535)
        return err_set(err, ERR_CONFIG, "invite: port \"%.*s\", allowed are 1 to 65535",
                       digits < 12 ? (int)digits : 12, *at);
    out->port = (uint16_t)port;
    *at += digits;
    return 0;
}

static int parse_digest(const char **at, const char *what, struct digest *out, struct err *err) {
    char hex[DIGEST_HEX_BYTES] = "";
    size_t length = strspn(*at, "0123456789abcdefABCDEF");
    if (length != DIGEST_HEX_BYTES - 1)
        return err_set(
            err, ERR_CONFIG,
            "invite: the %s has %zu hexadecimal digits, needed are %d; is the line whole?", what,
            length, DIGEST_HEX_BYTES - 1);
    memcpy(hex, *at, length);
    *at += length;
    return digest_parse(hex, out, err);
}

static int parse_char(const char **at, char c, const char *before, struct err *err) {
    if (**at != c)
        return err_set(err, ERR_CONFIG, "invite: no '%c' before the %s; is the line whole?", c,
                       before);
    ++*at;
    return 0;
}

int invite_parse(const char *line, struct invite *out, struct err *err) {
    struct invite got = {0};
    const char *at = line + strspn(line, " \t\r\n");
    if (strncmp(at, INVITE_SCHEME, sizeof INVITE_SCHEME - 1) != 0)
        return err_set(err, ERR_CONFIG,
                       "an invite starts with \"" INVITE_SCHEME "\", this does not");
    at += sizeof INVITE_SCHEME - 1;
    if (parse_host(&at, &got, err) || parse_port(&at, &got, err)) return -1;
    if (parse_char(&at, '/', "run name", err) || parse_digest(&at, "run name", &got.run, err))
        return -1;
    if (parse_char(&at, '#', "secret", err) || parse_digest(&at, "secret", &got.secret, err))
        return -1;
    at += strspn(at, " \t\r\n");
    if (*at)
        return err_set(err, ERR_CONFIG, "invite: %zu unexpected characters after the secret",
                       strlen(at));
    *out = got;
    return 0;
}
