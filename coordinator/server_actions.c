/* server_actions.c - carries the core's actions out, in order. A promise is on disk before the next
 * action begins; when that fails, nothing more is said. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/server_internal.h"

/* Frames have a limit, and a batch may be followed by many more. */
#define LEDGER_BATCH_BYTES (1u << 20)

/* ---- SEND ------------------------------------------------------------------------------------------ */

/* A message that cannot be queued closes its channel by itself; only our own mistakes are logged. */
static void queue(struct server *s, struct connection *c, uint8_t type, uint64_t session,
                  uint64_t plan, const void *msg) {
    struct err err;
    if (channel_send(c->channel, type, s->term, session, plan, msg, &err) == 0) return;
    log_line(CORE_WARNING, "%s was not sent: %s", proto_type_name(type), err.msg);
}

static void send_message(struct server *s, struct connection *c, struct core_action *a) {
    if (a->message == MSG_ROSTER) {
        struct msg_roster *roster = a->msg;
        proto_sign(&s->keys.online, "roster", &s->run->id, s->term, roster->body.data,
                   roster->body.length, &roster->signature);
    }
    queue(s, c, a->message, a->session, a->plan, a->msg);
}

static void sign_checkpoint(struct server *s, struct connection *c, const struct core_action *a) {
    const struct msg_checkpoint_sign *asked = a->msg;
    struct msg_checkpoint_signed answer = { .index = asked->index };
    proto_sign(&s->keys.online, "manifest", &s->run->id, s->term, asked->manifest.data,
               asked->manifest.length, &answer.signature);
    queue(s, c, MSG_CHECKPOINT_SIGNED, a->session, 0, &answer);
}

/* ---- SEND_LEDGER ------------------------------------------------------------------------------------- */

struct batch {
    struct server *s;
    uint64_t conn, session;
    struct msg_signed_entry entries[PROTO_LEDGER_BATCH_MAX];
    uint8_t *rows[PROTO_LEDGER_BATCH_MAX]; /* what the entries point into */
    uint32_t count;
    size_t bytes;
};

static void batch_send(struct batch *b) {
    struct connection *c = server_connection(b->s, b->conn);
    struct msg_ledger ledger = { .entries = b->entries, .entries_count = b->count };
    if (b->count && c) queue(b->s, c, MSG_LEDGER, b->session, 0, &ledger);
    for (uint32_t i = 0; i < b->count; i++) free(b->rows[i]);
    b->count = 0;
    b->bytes = 0;
}

static int batch_add(void *arg, uint64_t key, const uint8_t *value, size_t length,
                     struct err *err) {
    struct batch *b = arg;
    (void)key;
    if (b->count == PROTO_LEDGER_BATCH_MAX || b->bytes + length > LEDGER_BATCH_BYTES) batch_send(b);
    uint8_t *row = malloc(length);
    if (!row) return err_set(err, ERR_MEMORY, "no memory to send the ledger");
    memcpy(row, value, length);
    if (proto_decode(row, length, RECORD_signed_entry, &b->entries[b->count], err)) {
        free(row);
        return -1;
    }
    b->rows[b->count++] = row;
    b->bytes += length;
    return 0;
}

static int send_ledger(struct server *s, const struct core_action *a, struct err *err) {
    struct batch *b = calloc(1, sizeof *b);
    if (!b) return err_set(err, ERR_MEMORY, "no memory to send the ledger");
    b->s = s;
    b->conn = a->conn;
    b->session = a->session;
    int result = store_each(s->run->store, CORE_LEDGER, a->from, UINT64_MAX, batch_add, b, err);
    batch_send(b);
    free(b);
    return result;
}

/* ---- all of them ------------------------------------------------------------------------------------- */

static void say_bye(struct server *s, struct connection *c, const struct core_action *a) {
    struct msg_bye bye = {
        .code = (uint8_t)a->code, .final = a->final, .reason = proto_str(a->text) };
    queue(s, c, MSG_BYE, a->session, 0, &bye);
    server_connection_close(c);
}

/* What a stranger did wrong is written as far as there is room for it. */
static void write_line(struct server *s, const struct core_action *a) {
    if (s->stranger_speaks && a->level == CORE_WARNING) server_tell(s, false, a->text);
    else log_line(a->level, "%s", a->text);
}

static int carry_out(struct server *s, struct core_action *a, struct err *err) {
    struct connection *c = server_connection(s, a->conn); /* it may have gone meanwhile */
    switch (a->type) {
    case CORE_ACT_PERSIST: return run_persist(s->run, &s->keys, s->term, a, err);
    case CORE_ACT_RESTART: s->restart_above = a->term; return 0;
    case CORE_ACT_FAIL: return err_set(err, a->code, "%s", a->text);
    case CORE_ACT_LOG: write_line(s, a); return 0;
    case CORE_ACT_SEND_LEDGER: return c ? send_ledger(s, a, err) : 0;
    case CORE_ACT_SEND: if (c) send_message(s, c, a); return 0;
    case CORE_ACT_SIGN: if (c) sign_checkpoint(s, c, a); return 0;
    case CORE_ACT_KNOWN: if (c) server_connection_known(c); return 0;
    case CORE_ACT_LISTEN: if (c) channel_set_frame_bytes_max(c->channel, PROTO_CONTROL_BYTES_MAX); return 0;
    case CORE_ACT_CLOSE: if (c) say_bye(s, c, a); return 0;
    }
    assert(!"an action the server does not know");
    return 0;
}

void server_step(struct server *s, const struct core_event *ev) {
    struct err err;
    if (s->failure.code) return;
    core_step(s->core, ev, server_now_ms(), &s->actions);
    for (uint32_t i = 0; i < s->actions.count; i++)
        if (carry_out(s, &s->actions.list[i], &err)) {
            server_fail(s, &err);
            break;
        }
    core_actions_clear(&s->actions);
    if (s->restart_above && !s->failure.code) server_begin_again(s);
}
