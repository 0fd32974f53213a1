/* server_own_node.c - the aggregate-only node beside us is a member like any other: it joins with an
 * invite when it has not yet, or when we now listen elsewhere; otherwise it goes on. */
#include <assert.h>
#include <jansson.h>
#include <string.h>

#include "coordinator/server_internal.h"

#define INVITE_MS (10 * 60 * 1000)

static bool is_member(const struct server *s) {
    char path[RUN_PATH_BYTES];
    struct identity own;
    struct core_member_view m;
    bool enrolled = false;
    if (run_path(s->run->dir, AGGREGATOR_IDENTITY, path, NULL) || identity_load(&own, path, NULL))
        return false;
    for (uint32_t i = 0; i < core_member_count(s->core) && !enrolled; i++) {
        core_member_look(s->core, i, server_now_ms(), &m);
        enrolled = !memcmp(&m.key, &own.key, sizeof own.key);
    }
    identity_release(&own);
    return enrolled;
}

/* Where it dials us; where we listen on every address, that is this machine's loopback. */
static void address_for_own(const struct server *s, struct address *out) {
    *out = s->listen;
    if (address_is_any(out->host))
        strcpy(out->host, strchr(out->host, ':') ? "::1" : "127.0.0.1");
}

/* Does its home say where we are now (node/home.h, run.json)? */
static bool knows_us(const struct server *s, const struct address *us) {
    char path[RUN_PATH_BYTES];
    if (run_path(s->run->dir, AGGREGATOR_FOLDER "/run.json", path, NULL)) return false;
    json_t *home = json_load_file(path, 0, NULL);
    const char *host = json_string_value(json_object_get(home, "host"));
    bool knows = host && !strcmp(host, us->host) &&
                 json_integer_value(json_object_get(home, "port")) == us->port;
    json_decref(home);
    return knows;
}

static int invite_own_node(void *arg, char *line, size_t size, struct err *err) {
    struct server *s = arg;
    struct address us;
    struct invite invite = { .run = s->run->id };
    struct msg_invite_record record;
    assert(size >= INVITE_BYTES_MAX);
    address_for_own(s, &us);
    *line = '\0';
    if (is_member(s) && knows_us(s, &us)) return 0;
    memcpy(invite.host, us.host, sizeof invite.host);
    invite.port = us.port;
    store_invite_make(1, server_unix_ms() + INVITE_MS, true, &invite.secret, &record);
    if (store_invite_add(s->run->store, &record, err)) return -1;
    return invite_format(&invite, line, err);
}

int server_start_own_node(struct server *s, struct err *err) {
    static const struct aggregator_ops ops = { invite_own_node };
    char program[RUN_PATH_BYTES], home[RUN_PATH_BYTES];
    if (aggregator_find_program(program, sizeof program, err)) return -1;
    if (run_path(s->run->dir, AGGREGATOR_FOLDER, home, err)) return -1;
    s->aggregator = aggregator_create(s->base, program, home,
                                      (uint16_t)s->config->settings->aggregator_port, &ops, s, err);
    return s->aggregator ? 0 : -1;
}
