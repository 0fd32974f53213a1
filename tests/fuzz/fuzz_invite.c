/* fuzz_invite.c - the line that a contributor pastes. What is taken must be written back as a line
 * that means the same. */
#include <stdlib.h>

#include "proto/proto.h"
#include "tests/fuzz/fuzz.h"

static void init(void) {
    struct err err;
    int failed = proto_init(&err);
    assert(!failed);
}

static bool take(const uint8_t *bytes, size_t length) {
    struct invite invite, again;
    struct err err = {0};
    char formatted[INVITE_BYTES_MAX], *line = malloc(length + 1);
    assert(line);
    memcpy(line, bytes, length);
    line[length] = '\0';
    memset(&invite, 0xa5, sizeof invite);
    int refused = invite_parse(line, &invite, &err);
    free(line);
    if (refused) {
        assert(err.code == ERR_CONFIG && *err.msg);
        return false;
    }
    assert(memchr(invite.host, '\0', sizeof invite.host) && *invite.host && invite.port);
    int failed = invite_format(&invite, formatted, &err) || invite_parse(formatted, &again, &err);
    assert(!failed);
    assert(!strcmp(again.host, invite.host) && again.port == invite.port);
    assert(digest_equal(&again.run, &invite.run) && digest_equal(&again.secret, &invite.secret));
    return true;
}

static void samples(const struct fuzz_sink *out) {
    static const char *const hosts[] = {"host.example.org", "127.0.0.1", "::1", "fe80::1%eth0"};
    static const char *const words[] = {"intellect://", "[::1]", ":65535/", "#", "00000000", "ffffffff"};
    for (size_t i = 0; i < sizeof hosts / sizeof *hosts; i++) {
        char line[INVITE_BYTES_MAX], name[] = "host-0";
        struct invite invite = {.port = 7171, .run = digest_of("run", 3), .secret = digest_of("s", 1)};
        struct err err;
        strcpy(invite.host, hosts[i]);
        int failed = invite_format(&invite, line, &err);
        assert(!failed);
        name[5] = (char)('0' + i);
        out->sample(out->arg, name, line, strlen(line));
    }
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) out->word(out->arg, words[i]);
}

const struct fuzz_target fuzz_invite = {"invite", init, take, samples};
