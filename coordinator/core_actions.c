/* core_actions.c - the list of actions: how each is put on it, what it owns, how it is freed. */
#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

/* Without memory a coordinator can keep no promise; its restart loses nothing. */
void *core_grow(void *list, uint64_t count, uint64_t *capacity, size_t size) {
    if (count < *capacity) return list;
    *capacity = *capacity ? 2 * *capacity : 16;
    list = realloc(list, (size_t)*capacity * size);
    assert(list);
    return list;
}

void *core_grow32(void *list, uint32_t count, uint32_t *capacity, size_t size) {
    uint64_t wide = *capacity;
    list = core_grow(list, count, &wide, size);
    *capacity = (uint32_t)wide;
    return list;
}

static void action_release(struct core_action *a) {
    if (a->msg) {
        proto_copy_release((enum proto_record)proto_record_of_type(a->message), a->msg);
        free(a->msg);
    }
    for (uint32_t i = 0; i < a->write_count; i++) free(a->writes[i].value);
    free(a->writes);
}

void core_actions_clear(struct core_actions *a) {
    for (uint32_t i = 0; i < a->count; i++) action_release(&a->list[i]);
    a->count = 0;
}

void core_actions_release(struct core_actions *a) {
    core_actions_clear(a);
    free(a->list);
    *a = (struct core_actions){0};
}

/* The pointer is good until the next one is emitted. */
struct core_action *core_emit(struct core_actions *out, enum core_action_type type) {
    out->list = core_grow32(out->list, out->count, &out->capacity, sizeof *out->list);
    struct core_action *a = &out->list[out->count++];
    memset(a, 0, sizeof *a);
    a->type = type;
    return a;
}

/* ---- transactions --------------------------------------------------------------------------- */

void batch_put_bytes(struct batch *b, enum core_table table, uint64_t key, uint8_t *owned,
                     size_t length) {
    b->writes = core_grow32(b->writes, b->count, &b->capacity, sizeof *b->writes);
    b->writes[b->count++] = (struct core_write){
        .table = table, .key = key, .value = owned, .value_length = (uint32_t)length};
}

void batch_put(struct batch *b, enum core_table table, uint64_t key, enum proto_record which,
               const void *record) {
    struct proto_buffer bytes;
    proto_buffer_init(&bytes, PROTO_BLOB_BYTES_MAX);
    int failed = proto_encode(&bytes, which, record, NULL);
    assert(!failed);
    batch_put_bytes(b, table, key, bytes.data, bytes.length);
}

void batch_put_meta(struct batch *b, enum core_meta key, uint64_t value) {
    uint8_t *bytes = malloc(8);
    assert(bytes);
    for (int i = 0; i < 8; i++) bytes[i] = (uint8_t)(value >> (8 * i));
    batch_put_bytes(b, CORE_META, key, bytes, 8);
}

void batch_delete(struct batch *b, enum core_table table, uint64_t key) {
    batch_put_bytes(b, table, key, NULL, 0);
}

void core_emit_persist(struct core_actions *out, struct batch *b) {
    if (b->count) {
        struct core_action *a = core_emit(out, CORE_ACT_PERSIST);
        a->writes = b->writes;
        a->write_count = b->count;
    } else {
        free(b->writes);
    }
    *b = (struct batch){0};
}

/* ---- messages ------------------------------------------------------------------------------- */

static void *copy_of(enum proto_record which, const void *msg) {
    void *copy = calloc(1, proto_record_size(which));
    assert(copy);
    int failed = proto_copy(which, msg, copy, NULL);
    assert(!failed);
    return copy;
}

void core_send_conn(struct core_actions *out, uint64_t conn, uint64_t session, enum proto_type type,
                    uint64_t plan, const void *msg) {
    void *copy = copy_of((enum proto_record)proto_record_of_type((uint8_t)type), msg);
    struct core_action *a = core_emit(out, CORE_ACT_SEND);
    a->conn = conn;
    a->message = (uint8_t)type;
    a->session = session;
    a->plan = plan;
    a->msg = copy;
}

void core_send(struct core_actions *out, const struct member *m, enum proto_type type,
               uint64_t plan, const void *msg) {
    if (m->conn) core_send_conn(out, m->conn, m->session, type, plan, msg);
}

void core_send_ledger(struct core_actions *out, const struct member *m, uint64_t from) {
    if (!m->conn) return;
    struct core_action *a = core_emit(out, CORE_ACT_SEND_LEDGER);
    a->conn = m->conn;
    a->session = m->session;
    a->from = from;
}

void core_emit_sign(struct core_actions *out, const struct member *m,
                    const struct msg_checkpoint_sign *msg) {
    void *copy = copy_of(RECORD_checkpoint_sign, msg);
    struct core_action *a = core_emit(out, CORE_ACT_SIGN);
    a->conn = m->conn;
    a->session = m->session;
    a->message = MSG_CHECKPOINT_SIGN;
    a->msg = copy;
}

/* ---- words ---------------------------------------------------------------------------------- */

/* Cut between characters where it is too long: a BYE carries it as UTF-8. */
static void set_text(struct core_action *a, const char *format, va_list ap) {
    int length = vsnprintf(a->text, sizeof a->text, format, ap);
    if (length < (int)sizeof a->text) return;
    size_t end = sizeof a->text - 1;
    while (end && ((unsigned char)a->text[end - 1] & 0xc0) == 0x80) end--;
    if (end && (unsigned char)a->text[end - 1] >= 0xc0) end--;
    a->text[end] = '\0';
}

void core_log(struct core_actions *out, enum core_level level, const char *format, ...) {
    struct core_action *a = core_emit(out, CORE_ACT_LOG);
    a->level = level;
    va_list ap;
    va_start(ap, format);
    set_text(a, format, ap);
    va_end(ap);
}

void core_complain(struct core *c, struct core_actions *out, enum core_level level,
                   const char *format, ...) {
    if (c->complaints++ >= CORE_COMPLAINTS_PER_TICK_MAX) return;
    struct core_action *a = core_emit(out, CORE_ACT_LOG);
    a->level = level;
    va_list ap;
    va_start(ap, format);
    set_text(a, format, ap);
    va_end(ap);
}

/* Whoever breaks the protocol is named, wherever it is noticed. */
static void name_culprit(struct core *c, struct core_actions *out, const struct conn *k, const char *why) {
    if (k && k->member && k->hello)
        core_complain(c, out, CORE_WARNING, WHO ": %.160s; closed", WHO_OF(k->member), why);
    else if (k)
        core_complain(c, out, CORE_WARNING, "connection from %s: %.160s; closed", k->host, why);
}

void core_close(struct core *c, struct core_actions *out, uint64_t conn, enum err_code code,
                bool final, const char *format, ...) {
    const struct conn *k = core_conn(c, conn);
    struct core_action *a = core_emit(out, CORE_ACT_CLOSE);
    a->conn = conn;
    a->code = code;
    a->final = final;
    if (k && k->member && k->hello) a->session = k->member->session;
    va_list ap;
    va_start(ap, format);
    set_text(a, format, ap);
    va_end(ap);
    if (code == ERR_PROTOCOL) {
        char why[sizeof a->text];
        memcpy(why, a->text, sizeof why);
        name_culprit(c, out, k, why); /* `a` may have moved */
    }
    core_forget_conn(c, conn);
}
