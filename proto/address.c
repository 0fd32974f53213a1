/* address.c - see address.h. */
#include "proto/address.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int address_split(const char *text, bool port_optional, struct address *out, struct err *err) {
    bool literal6 = *text == '[';
    const char *start = text + literal6;
    size_t length = strcspn(start, literal6 ? "]" : ":");
    memset(out, 0, sizeof *out);
    if (length == 0 || length > PROTO_ADDRESS_BYTES_MAX || (literal6 && start[length] != ']'))
        return err_set(err, ERR_CONFIG, "'%.80s' has no host; write HOST:PORT or [IPv6]:PORT", text);
    memcpy(out->host, start, length);
    const char *rest = start + length + literal6;
    if (!*rest && port_optional) return 0;
    size_t digits = *rest == ':' ? strspn(rest + 1, "0123456789") : 0;
    unsigned long port = digits && digits < 6 ? strtoul(rest + 1, NULL, 10) : 65536;
    if (port > 65535 || rest[1 + digits])
        return err_set(err, ERR_CONFIG, "'%.80s' has no port from 0 to 65535; write HOST:PORT or "
                       "[IPv6]:PORT", text);
    out->port = (uint16_t)port;
    return 0;
}

void address_format(const struct address *a, char out[ADDRESS_TEXT_BYTES]) {
    bool literal6 = strchr(a->host, ':') != NULL;
    snprintf(out, ADDRESS_TEXT_BYTES, "%s%s%s:%u", literal6 ? "[" : "", a->host, literal6 ? "]" : "",
             (unsigned)a->port);
}

bool address_is_any(const char *host) {
    struct in_addr v4;
    struct in6_addr v6;
    if (inet_pton(AF_INET, host, &v4) == 1) return v4.s_addr == INADDR_ANY;
    return inet_pton(AF_INET6, host, &v6) == 1 && IN6_IS_ADDR_UNSPECIFIED(&v6);
}

bool address_is_loopback(const char *host) {
    struct in_addr v4;
    struct in6_addr v6;
    if (inet_pton(AF_INET, host, &v4) == 1) return ntohl(v4.s_addr) >> 24 == 127;
    if (inet_pton(AF_INET6, host, &v6) != 1) return !strcmp(host, "localhost");
    return IN6_IS_ADDR_LOOPBACK(&v6) || (IN6_IS_ADDR_V4MAPPED(&v6) && v6.s6_addr[12] == 127);
}

static void first_of_machine(char host[PROTO_ADDRESS_BYTES_MAX + 1]) {
    struct ifaddrs *list = NULL;
    strcpy(host, "127.0.0.1");
    if (getifaddrs(&list)) return;
    for (struct ifaddrs *i = list; i; i = i->ifa_next) {
        if (!i->ifa_addr || i->ifa_addr->sa_family != AF_INET) continue;
        if ((i->ifa_flags & IFF_LOOPBACK) || !(i->ifa_flags & IFF_UP)) continue;
        const struct sockaddr_in *v4 = (const struct sockaddr_in *)(const void *)i->ifa_addr;
        inet_ntop(AF_INET, &v4->sin_addr, host, PROTO_ADDRESS_BYTES_MAX + 1);
        break;
    }
    freeifaddrs(list);
}

int address_for_others(const struct address *listen, const char *stated, struct address *out,
                       struct err *err) {
    if (*stated) {
        if (address_split(stated, true, out, err)) return -1;
        if (!out->port) out->port = listen->port;
        return 0;
    }
    *out = *listen;
    if (address_is_any(listen->host)) first_of_machine(out->host);
    return 0;
}
