/* sync.c - the member's machine from outside: create, the switch over events, actions, what is said
 * to the coordinator apart from rounds, looking in. The rules are docs/flow.md; who does what is
 * listed in sync_internal.h. */
#include <assert.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "node/sync_internal.h"
#include "proto/model.h"

#ifdef SIM_FAULTS
enum sync_fault sync_fault = SYNC_FAULT_NONE;
#endif

/* ---- actions ---------------------------------------------------------------------------- */

static int action_record(const struct sync_action *a) {
    return a->type == SYNC_ACT_ROSTER ? RECORD_roster_body : proto_record_of_type(a->message);
}

/* The bytes that a message is all about, where they lie in memory that stays: they are not copied. */
static struct proto_bytes *bulk_of(uint8_t message, void *msg) {
    if (message == MSG_CHUNK) return &((struct msg_chunk *)msg)->data;
    if (message == MSG_RESULT) return &((struct msg_result *)msg)->data;
    return NULL;
}

void sync_actions_clear(struct sync_actions *a) {
    for (uint32_t i = 0; i < a->count; i++) {
        if (!a->list[i].msg) continue;
        struct proto_bytes *bulk = bulk_of(a->list[i].message, a->list[i].msg);
        if (bulk) *bulk = (struct proto_bytes){0};
        proto_copy_release((enum proto_record)action_record(&a->list[i]), a->list[i].msg);
        free(a->list[i].msg);
    }
    a->count = 0;
}

void sync_actions_release(struct sync_actions *a) {
    sync_actions_clear(a);
    free(a->list);
    *a = (struct sync_actions){0};
}

static void out_of_memory(struct sync *s, size_t bytes) {
    if (!s->failure.code) err_set(&s->failure, ERR_MEMORY, "no memory (%zu bytes)", bytes);
}

/* Actions of this step may still point to it; a tick comes after all of them were carried out. */
void sync_free_later(struct sync *s, void *p) {
    if (!p) return;
    if (sync_grow(s, &s->grave, s->grave_count, &s->grave_capacity, sizeof *s->grave)) free(p);
    else s->grave[s->grave_count++] = p;
}

static void empty_grave(struct sync *s) {
    while (s->grave_count) free(s->grave[--s->grave_count]);
}

void *sync_alloc(struct sync *s, size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size);
    if (!p) out_of_memory(s, count * size);
    return p;
}

int sync_grow(struct sync *s, void *list, uint32_t count, uint32_t *capacity, size_t size) {
    if (count < *capacity) return 0;
    uint32_t more = *capacity ? 2 * *capacity : 16;
    void *old, *p;
    memcpy(&old, list, sizeof old);
    p = realloc(old, more * size);
    if (!p) {
        out_of_memory(s, more * size);
        return -1;
    }
    memcpy(list, &p, sizeof p);
    *capacity = more;
    return 0; /* cppcheck-suppress memleak ; the caller's list owns p now */
}

struct sync_action *sync_act(struct sync *s, enum sync_action_type type) {
    struct sync_actions *out = s->out;
    if (!out || sync_grow(s, &out->list, out->count, &out->capacity, sizeof *out->list))
        return NULL;
    struct sync_action *a = &out->list[out->count++];
    *a = (struct sync_action){.type = type, .term = s->term, .session = s->session};
    return a;
}

void sync_log(struct sync *s, enum sync_level level, const char *format, ...) {
    struct sync_action *a = sync_act(s, SYNC_ACT_LOG);
    va_list args;
    if (!a) return;
    a->level = level;
    va_start(args, format);
    vsnprintf(a->text, sizeof a->text, format, args);
    va_end(args);
}

/* The action owns a copy of msg, but for the bulk of it. */
static void attach(struct sync *s, struct sync_action *a, enum proto_record which, void *msg) {
    struct proto_bytes *bulk = a->type == SYNC_ACT_ROSTER ? NULL : bulk_of(a->message, msg), data;
    if (bulk) {
        data = *bulk;
        *bulk = (struct proto_bytes){0};
    }
    a->msg = sync_alloc(s, 1, proto_record_size(which));
    if (a->msg && proto_copy(which, msg, a->msg, &s->failure)) {
        free(a->msg);
        a->msg = NULL;
    }
    if (!bulk) return;
    *bulk = data;
    if (!a->msg) return;
    bulk = bulk_of(a->message, a->msg);
    free((void *)(uintptr_t)bulk->data); /* a copy of nothing is a byte */
    *bulk = data;
}

static void act_message(struct sync *s, enum sync_action_type type, enum proto_type message,
                        uint64_t plan, const void *msg) {
    struct sync_action *a = sync_act(s, type);
    if (!a) return;
    a->message = (uint8_t)message;
    a->plan = plan;
    /* Not written to in the end: only its bulk is away for as long as it is copied. */
    attach(s, a, (enum proto_record)proto_record_of_type((uint8_t)message), (void *)(uintptr_t)msg);
}

void sync_send(struct sync *s, enum proto_type type, uint64_t plan, const void *msg) {
    if (s->connected && (s->welcomed || type == MSG_HELLO || type == MSG_LEDGER))
        act_message(s, SYNC_ACT_SEND, type, plan, msg);
}

void sync_send_peer(struct sync *s, uint32_t peer, enum proto_type type, uint64_t term,
                    uint64_t plan, const void *msg) {
    act_message(s, SYNC_ACT_PEER_SEND, type, plan, msg);
    if (s->failure.code) return;
    struct sync_action *a = &s->out->list[s->out->count - 1];
    a->peer = peer;
    a->term = term;
}

void sync_act_roster(struct sync *s, const struct msg_roster_body *roster) {
    struct sync_action *a = sync_act(s, SYNC_ACT_ROSTER);
    if (a) attach(s, a, RECORD_roster_body, (void *)(uintptr_t)roster);
}

/* ---- the connection --------------------------------------------------------------------- */

int sync_save_meta(struct sync *s) {
    uint8_t bytes[16] = "ITLMETA1";
    memcpy(bytes + 8, &s->term_max, 8);
    return s->disk.put(s->disk.arg, "meta", bytes, sizeof bytes, &s->failure);
}

static int load_meta(struct sync *s) {
    uint8_t *bytes;
    size_t length;
    struct err err = {0};
    if (s->disk.get(s->disk.arg, "meta", &bytes, &length, &err)) {
        if (err.code == ERR_NOT_FOUND) return 0;
        s->failure = err;
        return -1;
    }
    bool ok = length == 16 && !memcmp(bytes, "ITLMETA1", 8);
    if (ok) memcpy(&s->term_max, bytes + 8, 8);
    free(bytes);
    return ok ? 0 : err_set(&s->failure, ERR_CORRUPT, "the file 'meta' is not what was written");
}

static void checkpoint_forget_next(struct sync *s) {
    if (s->checkpoint.next_waits) proto_copy_release(RECORD_checkpoint_write, &s->checkpoint.next);
    s->checkpoint.next_waits = false;
}

static void forget_connection(struct sync *s) {
    s->connected = s->welcomed = s->synced = false;
    s->session = 0;
    s->leases.known = s->leases.asked = false;
    s->state.told = false;
    checkpoint_forget_next(s); /* it is asked for again, or a newer one */
    if (s->checkpoint.open) sync_act(s, SYNC_ACT_CHECKPOINT_ALONE);
    for (uint32_t f = 0; f < s->fragment_count; f++) s->contribution[f].announced = false;
}

void sync_disconnect(struct sync *s, const char *why) {
    sync_log(s, SYNC_WARNING, "leaving the connection to the coordinator: %s", why);
    sync_act(s, SYNC_ACT_DISCONNECT);
    forget_connection(s);
}

/* Durable before anything is done under the new term. */
static int raise_term(struct sync *s, uint64_t term) {
    s->term = term;
    for (uint32_t f = 0; f < s->fragment_count; f++) /* their coordinator is gone */
        if (s->plan[f].active && s->plan[f].term < term) plan_release(s, f);
    if (term <= s->term_max) return 0;
    s->term_max = term;
    return sync_save_meta(s);
}

static int on_connected(struct sync *s, const struct sync_event *ev) {
    uint64_t term = ev->frame.term ? ev->frame.term : s->term_max;
    forget_connection(s);
    s->connected = true;
    s->heard_ms = s->beat_ms = s->now;
    /* Of an older term it may be a coordinator with an older store, which learns of it from our HELLO. It
     * gets no further: its HELLO_ACK ends the connection. */
    if (term >= s->term_max && raise_term(s, term)) return -1;
    struct msg_hello hello = {
        .software = proto_str("intellect-node"),
        .instance = s->config.instance,
        .trains = s->config.trains,
        .port = s->config.port,
        .head_index = s->ledger.count ? s->ledger.count - 1 : 0,
        .head_digest = s->ledger.chain.head,
        .term_max = s->term_max,
        .has_state = s->state.whole,
    };
    if (s->state.whole) {
        hello.state_index = s->state.index;
        hello.state_root = s->state.root;
    }
    sync_send(s, MSG_HELLO, 0, &hello);
    s->state.told = s->state.whole;
    s->state.told_index = s->state.index;
    for (uint32_t i = 0; i < SYNC_COMMITS_KEPT; i++) s->ledger.commits[i].unavailable = false;
    return 0;
}

static void on_disconnected(struct sync *s) {
    if (s->connected) sync_log(s, SYNC_INFO, "the coordinator is gone; going on with what we have");
    forget_connection(s);
}

static void checkpoint_resume(struct sync *s);

/* Called when HELLO_ACK or ledger entries came. */
static void check_synced(struct sync *s) {
    if (!s->welcomed || s->synced || s->ledger.count == 0 || s->ledger.count - 1 < s->ack_head)
        return;
    s->synced = true;
    for (uint32_t f = 0; f < s->fragment_count; f++) contribution_announce(s, f);
    checkpoint_resume(s);
}

static int on_hello_ack(struct sync *s, const struct msg_hello_ack *msg) {
    s->session = msg->session;
    s->ack_head = msg->head_index;
    s->settled = msg->settled_index;
    s->tokens_committed = msg->tokens_committed;
    s->welcomed = true;
    catchup_set_donors(s, msg->donors, msg->donors_count, true);
    results_settle(s);
    return 0;
}

static void on_heartbeat_ack(struct sync *s, const struct msg_heartbeat_ack *msg) {
    s->settled = msg->settled_index;
    s->tokens_committed = msg->tokens_committed;
    s->members_live = msg->members_live;
    results_settle(s);
}

static void on_bye(struct sync *s, const struct msg_bye *msg) {
    struct sync_action *a = sync_act(s, SYNC_ACT_BYE);
    if (!a) return;
    a->code = (enum err_code)msg->code;
    a->final = msg->final;
    proto_str_copy(msg->reason, a->text, sizeof a->text);
}

/* ---- heartbeats ------------------------------------------------------------------------- */

static bool is_training(const struct sync *s) {
    const struct trainer *t = &s->trainer;
    return t->state == TRAINER_TRAINING && !t->need_reset && !t->standing && leases_queued(s);
}

static enum member_phase phase_of(struct sync *s) {
    if (catchup_busy(s)) return PHASE_CATCHING_UP;
    if (is_training(s) && !s->trainer.slot_busy) return PHASE_TRAINING;
    if (apply_has_work(s)) return PHASE_APPLYING;
    if (!state_current(s) || s->trainer.standing) return PHASE_WAITING;
    return PHASE_IDLE;
}

static void say_heartbeat(struct sync *s) {
    const struct trainer *t = &s->trainer;
    struct msg_rate rates[PROTO_RATES_MAX];
    struct msg_heartbeat beat = {
        .progress = s->progress,
        .step = t->steps, /* the trainer's own count, as its person sees it: over its lives where its moments were kept */
        .phase = (uint8_t)phase_of(s),
        .loss = isfinite(t->loss) ? t->loss : 0,
        .tokens_per_s = isfinite(t->tokens_per_s) ? t->tokens_per_s : 0,
        .trainer_restarts = t->lives ? t->lives - 1 : 0,
        .state_index = s->state.whole ? s->state.index : 0,
        .rates = rates,
        .rates_count = peer_rates(s, rates),
    };
    sync_send(s, MSG_HEARTBEAT, 0, &beat);
    s->beat_ms = s->now;
}

/* Was this process itself stopped for a while? Then what others sent is still unread, and nobody's
 * silence means anything. */
static void forgive_silence(struct sync *s) {
    s->heard_ms = s->now;
    for (uint32_t f = 0; f < s->fragment_count; f++)
        for (uint32_t i = 0; s->plan[f].active && i < s->plan[f].msg.contributors_count; i++)
            s->plan[f].inbound[i].heard_ms = s->now;
}

static void on_tick(struct sync *s, uint64_t beats) {
    uint64_t gap = s->now - s->tick_ms;
    s->progress += beats != s->trainer.beats;
    s->trainer.beats = beats;
    if (gap > s->outer->silence_ms_max / 2) forgive_silence(s);
    else trainer_spend(s, gap);
    s->tick_ms = s->now;
    if (s->connected && s->now - s->heard_ms > s->outer->silence_ms_max)
        sync_disconnect(s, "it has been silent for too long");
    if (s->welcomed && s->now - s->beat_ms >= s->outer->heartbeat_ms) say_heartbeat(s);
    reduce_judge(s);
}

/* ---- checkpoints ------------------------------------------------------------------------ */

static void checkpoint_say_done(struct sync *s, uint64_t index, bool written,
                                struct digest manifest, const char *text) {
    struct msg_checkpoint_done done = {
        .index = index, .written = written, .manifest = manifest, .text = proto_str(text)};
    sync_send(s, MSG_CHECKPOINT_DONE, 0, &done);
}

static void checkpoint_begin(struct sync *s, const struct msg_checkpoint_write *msg) {
    bool here = s->state.whole && s->state.index == msg->index &&
                digest_equal(&s->state.root, &msg->root);
    if (!here) {
        checkpoint_say_done(s, msg->index, false, (struct digest){{0}}, "the state has moved on");
        return;
    }
    act_message(s, SYNC_ACT_CHECKPOINT_BEGIN, MSG_CHECKPOINT_WRITE, 0, msg);
    s->checkpoint.open = true;
    s->checkpoint.index = msg->index;
}

/* Asked again for what is being written, as the coordinator does after each lost connection, it says nothing:
 * the end will be said when it is there. Another one waits for that end: a run's last one must not fail because
 * the one before takes long. */
static void on_checkpoint_write(struct sync *s, const struct msg_checkpoint_write *msg) {
    checkpoint_forget_next(s);
    if (!s->checkpoint.open)
        checkpoint_begin(s, msg);
    else if (s->checkpoint.index != msg->index)
        s->checkpoint.next_waits = !proto_copy(RECORD_checkpoint_write, msg, &s->checkpoint.next, &s->failure);
}

static void checkpoint_begin_next(struct sync *s) {
    if (!s->checkpoint.next_waits) return;
    checkpoint_begin(s, &s->checkpoint.next);
    checkpoint_forget_next(s);
}

static void checkpoint_ask_signature(struct sync *s) {
    struct msg_checkpoint_sign sign = {
        .index = s->checkpoint.index,
        .manifest = {s->checkpoint.manifest, s->checkpoint.manifest_length}};
    sync_send(s, MSG_CHECKPOINT_SIGN, 0, &sign);
}

static void checkpoint_forget_manifest(struct sync *s) {
    free(s->checkpoint.manifest);
    s->checkpoint.manifest = NULL;
}

/* The agent's writer, should it be at it, ends with the next one that is begun. */
void sync_checkpoint_undone(struct sync *s, uint64_t at_index) {
    if (s->checkpoint.index <= at_index) return;
    s->checkpoint.open = s->checkpoint.unsaid = false;
    checkpoint_forget_manifest(s);
}

/* What the last connection may have lost is said again. */
static void checkpoint_resume(struct sync *s) {
    if (s->checkpoint.manifest) checkpoint_ask_signature(s);
    if (!s->checkpoint.unsaid) return;
    s->checkpoint.unsaid = false;
    checkpoint_say_done(s, s->checkpoint.index, s->checkpoint.ok, s->checkpoint.digest,
                        s->checkpoint.text);
}

static void on_checkpoint(struct sync *s, const struct sync_event *ev) {
    if (!s->checkpoint.open) return;
    checkpoint_forget_manifest(s);
    if (!ev->done) {
        s->checkpoint.manifest = sync_alloc(s, ev->manifest.length, 1);
        if (!s->checkpoint.manifest) return;
        memcpy(s->checkpoint.manifest, ev->manifest.data, ev->manifest.length);
        s->checkpoint.manifest_length = ev->manifest.length;
        if (s->synced) checkpoint_ask_signature(s);
        return;
    }
    s->checkpoint.open = false;
    s->checkpoint.unsaid = true;
    s->checkpoint.ok = ev->ok;
    s->checkpoint.digest = ev->manifest_digest;
    snprintf(s->checkpoint.text, sizeof s->checkpoint.text, "%s", ev->text ? ev->text : "");
    if (s->synced) checkpoint_resume(s);
    checkpoint_begin_next(s);
}

static void on_checkpoint_signed(struct sync *s, const struct msg_checkpoint_signed *msg) {
    if (!s->checkpoint.manifest || msg->index != s->checkpoint.index) return;
    checkpoint_forget_manifest(s);
    act_message(s, SYNC_ACT_CHECKPOINT_SIGNED, MSG_CHECKPOINT_SIGNED, 0, msg);
}

/* Parts that others send of what we write, and that we send of what another writes, are the agent's: the
 * bytes are those of the state at that index, which it keeps. */
static void on_checkpoint_keep(struct sync *s, const struct msg_checkpoint_keep *msg) {
    struct checkpoint_keep *k = &s->checkpoint.keep;
    k->waits = msg->chunks_count > 0;
    k->msg = *msg;
    k->msg.chunks = k->chunks;
    for (uint32_t i = 0; i < msg->chunks_count; i++) k->chunks[i] = msg->chunks[i];
    if (!k->waits) act_message(s, SYNC_ACT_CHECKPOINT_KEEP, MSG_CHECKPOINT_KEEP, 0, msg);
}

/* The state it is about is here, before anything of it changes; or never will be. */
static void checkpoint_keep_pump(struct sync *s) {
    struct checkpoint_keep *k = &s->checkpoint.keep;
    if (!k->waits || !s->state.whole || s->state.index < k->msg.index) return;
    k->waits = false;
    if (s->state.index == k->msg.index && digest_equal(&s->state.root, &k->msg.root))
        act_message(s, SYNC_ACT_CHECKPOINT_KEEP, MSG_CHECKPOINT_KEEP, 0, &k->msg);
}

static void on_checkpoint_part_done(struct sync *s, const struct msg_checkpoint_part_done *msg) {
    if (s->checkpoint.open && msg->index == s->checkpoint.index)
        act_message(s, SYNC_ACT_CHECKPOINT_PART_DONE, MSG_CHECKPOINT_PART_DONE, 0, msg);
}

static void on_part(struct sync *s, const struct sync_event *ev) {
    enum proto_type type = ev->type == SYNC_EV_CHECKPOINT_OFFER ? MSG_CHECKPOINT_PART
        : MSG_CHECKPOINT_PART_DONE;
    if (s->synced) sync_send(s, type, 0, ev->msg);
    else if (type == MSG_CHECKPOINT_PART) sync_act(s, SYNC_ACT_CHECKPOINT_ALONE);
}

/* ---- messages of the coordinator -------------------------------------------------------- */

/* May this frame be acted on? It belongs to this connection's term and session. */
static bool frame_is_current(struct sync *s, const struct frame *f) {
    if (!s->connected) return false;
    s->heard_ms = s->now;
    if (f->term < s->term_max) {
        if (f->type == MSG_LEDGER_GET || f->type == MSG_BYE) return true;
        if (f->type == MSG_HELLO_ACK) sync_disconnect(s, "its term is older than one we have seen");
        sync_log(s, SYNC_DEBUG, "%s of term %llu ignored", proto_type_name(f->type),
                 (unsigned long long)f->term);
        return false;
    }
    if (f->type == MSG_HELLO_ACK || f->type == MSG_BYE || f->type == MSG_LEDGER_GET) return true;
    return s->welcomed && (f->session == 0 || f->session == s->session);
}

static int on_message(struct sync *s, const struct frame *f, const void *msg) {
    if (!frame_is_current(s, f)) return 0;
    if (f->term > s->term && raise_term(s, f->term)) return -1;
    switch (f->type) {
    case MSG_HELLO_ACK: return on_hello_ack(s, msg);
    case MSG_LEDGER: return ledger_on_entries(s, msg);
    case MSG_ROSTER: ledger_on_roster(s, f, msg); return 0;
    case MSG_HEARTBEAT_ACK: on_heartbeat_ack(s, msg); return 0;
    case MSG_LEASES: leases_on_list(s, msg); return 0;
    case MSG_PLAN: return plan_on_plan(s, f, msg);
    case MSG_DROP: return plan_on_drop(s, f, msg);
    case MSG_AUDIT: return audit_on_audit(s, f, msg);
    case MSG_HOLDERS: apply_on_holders(s, msg); return 0;
    case MSG_ROOT: catchup_on_root(s, msg); return 0;
    case MSG_RESET: return contribution_on_reset(s, msg);
    case MSG_RESYNC: return catchup_on_resync(s, msg);
    case MSG_DUE: trainer_on_due(s, msg); return 0;
    case MSG_STATE_LEAVES_GET: catchup_on_leaves_get(s, msg); return 0;
    case MSG_LEDGER_GET: ledger_on_get(s, msg); return 0;
    case MSG_CHECKPOINT_WRITE: on_checkpoint_write(s, msg); return 0;
    case MSG_CHECKPOINT_SIGNED: on_checkpoint_signed(s, msg); return 0;
    case MSG_CHECKPOINT_KEEP: on_checkpoint_keep(s, msg); return 0;
    case MSG_CHECKPOINT_PART: act_message(s, SYNC_ACT_CHECKPOINT_PART, MSG_CHECKPOINT_PART, 0, msg); return 0;
    case MSG_CHECKPOINT_PART_DONE: on_checkpoint_part_done(s, msg); return 0;
    case MSG_BYE: on_bye(s, msg); return 0;
    default:
        sync_log(s, SYNC_DEBUG, "%s from the coordinator ignored", proto_type_name(f->type));
        return 0;
    }
}

/* ---- one step --------------------------------------------------------------------------- */

static void on_leave(struct sync *s) {
    struct msg_leave leave = {.reason = proto_str("its owner asked")};
    sync_send(s, MSG_LEAVE, 0, &leave);
    s->left = true;
}

static int do_work(struct sync *s) {
    if (contribution_has_work(s)) return contribution_work(s);
    if (trainer_has_work(s)) return trainer_work(s);
    if (reduce_has_work(s)) return reduce_work(s);
    if (apply_has_work(s)) return apply_work(s);
    if (catchup_has_work(s)) return catchup_work(s);
    return 0;
}

static int dispatch(struct sync *s, const struct sync_event *ev) {
    switch (ev->type) {
    case SYNC_EV_CONNECTED: return on_connected(s, ev);
    case SYNC_EV_MESSAGE: return on_message(s, &ev->frame, ev->msg);
    case SYNC_EV_DISCONNECTED: on_disconnected(s); return 0;
    case SYNC_EV_PEER_OPEN:
    case SYNC_EV_PEER_MESSAGE:
    case SYNC_EV_PEER_CLOSED:
    case SYNC_EV_PEER_DRAINED: return peer_on_event(s, ev);
    case SYNC_EV_WORK: return do_work(s);
    case SYNC_EV_TICK: on_tick(s, ev->beats); return 0;
    case SYNC_EV_TRAINER_UP: return trainer_on_up(s, ev);
    case SYNC_EV_TRAINER_STEP: trainer_on_step(s, ev); return 0;
    case SYNC_EV_TRAINER_FROZEN: return trainer_on_frozen(s, ev);
    case SYNC_EV_TRAINER_APPLIED: trainer_on_applied(s); return 0;
    case SYNC_EV_TRAINER_MOMENTS: trainer_on_moments(s, ev); return 0;
    case SYNC_EV_TRAINER_DOWN: trainer_on_down(s); return 0;
    case SYNC_EV_CHECKPOINT: on_checkpoint(s, ev); return 0;
    case SYNC_EV_CHECKPOINT_OFFER:
    case SYNC_EV_CHECKPOINT_PART: on_part(s, ev); return 0;
    case SYNC_EV_LEAVE: on_leave(s); return 0;
    }
    return 0;
}

/* Whatever became possible through the event is begun. */
static int pump(struct sync *s) {
    check_synced(s);
    checkpoint_keep_pump(s);
    apply_pump(s);
    catchup_pump(s);
    trainer_pump(s);
    contribution_pump(s);
    if (reduce_pump(s)) return -1;
    peer_pump(s);
    return 0;
}

int sync_step(struct sync *s, const struct sync_event *ev, uint64_t now_ms,
              struct sync_actions *out, struct err *err) {
    if (s->left) return 0;
    s->now = now_ms;
    s->out = out;
    if (ev->type == SYNC_EV_TICK) empty_grave(s);
    if (!s->failure.code && dispatch(s, ev) == 0 && !s->left) pump(s);
    s->out = NULL;
    if (!s->failure.code) return 0;
    if (err) *err = s->failure;
    return -1;
}

bool sync_has_work(const struct sync *cs) {
    struct sync *s = (struct sync *)(uintptr_t)cs; /* the questions change nothing */
    return !s->left && !s->failure.code &&
           (contribution_has_work(s) || trainer_has_work(s) || reduce_has_work(s) ||
            apply_has_work(s) || catchup_has_work(s));
}

/* ---- create ----------------------------------------------------------------------------- */

static int check_config(const struct sync_config *c, struct err *err) {
    const struct msg_genesis *g = c->genesis;
    if (g->model_count != 1 || g->inner_count != 1 || g->outer_count != 1 || g->corpus_count != 1)
        return err_set(err, ERR_CORRUPT, "the genesis lacks model, inner, outer or corpus");
    const struct msg_outer *o = g->outer;
    if (o->chunk_elements == 0 || o->heartbeat_ms == 0 || o->silence_ms_max == 0 ||
        g->inner->batch == 0)
        return err_set(err, ERR_CONFIG,
                       "chunk_elements, heartbeat_ms, silence_ms_max and batch must be positive");
    if (outer_encoded_bytes((enum outer_codec)o->contribution_codec, 1) == 0 ||
        outer_encoded_bytes((enum outer_codec)o->result_codec, 1) == 0)
        return err_set(err, ERR_UNSUPPORTED, "this build has no codec %u or %u",
                       o->contribution_codec, o->result_codec);
    if (o->fragments == 0 || o->fragments > PROTO_FRAGMENTS_MAX)
        return err_set(err, ERR_CONFIG, "%u fragments, allowed are 1 to %u", o->fragments,
                       PROTO_FRAGMENTS_MAX);
    if ((c->elements - 1) / o->chunk_elements >= PROTO_CHUNKS_MAX)
        return err_set(err, ERR_CONFIG, "%llu elements in chunks of %u are more than %u chunks",
                       (unsigned long long)c->elements, o->chunk_elements, PROTO_CHUNKS_MAX);
    return 0;
}

/* owner: [chunk_count], zeroed; one fragment is the whole vector whatever the model. */
static int find_owners(struct sync *s, uint8_t *owner) {
    if (s->fragment_count == 1) return 0;
    if (proto_model_elements(s->genesis.model) != s->config.elements)
        return err_set(&s->failure, ERR_CONFIG, "the model has %llu elements, not %llu",
                       (unsigned long long)proto_model_elements(s->genesis.model),
                       (unsigned long long)s->config.elements);
    return proto_model_fragments(s->genesis.model, s->chunk_elements, s->fragment_count, owner,
                                 &s->failure);
}

/* Which chunk is in which fragment, and where there. */
static int deal_chunks(struct sync *s) {
    uint8_t *owner = sync_alloc(s, s->chunk_count, 1);
    int rc = owner ? find_owners(s, owner) : -1;
    for (uint32_t c = 0; rc == 0 && c < s->chunk_count; c++) s->fragment[owner[c]].count++;
    for (uint32_t f = 0; rc == 0 && f < s->fragment_count; f++) {
        s->fragment[f].chunk = sync_alloc(s, s->fragment[f].count, sizeof *s->fragment[f].chunk);
        s->fragment[f].count = 0;
        if (!s->fragment[f].chunk) rc = -1;
    }
    for (uint32_t c = 0; rc == 0 && c < s->chunk_count; c++) {
        struct fragment *f = &s->fragment[owner[c]];
        s->place[c] = (struct place){owner[c], f->count};
        f->chunk[f->count++] = c;
        f->elements += chunk_elements(s, c);
    }
    free(owner);
    return rc;
}

static int set_sizes(struct sync *s) {
    s->outer = s->genesis.outer;
    s->inner = s->genesis.inner;
    s->chunk_elements = s->outer->chunk_elements;
    s->chunk_count = (uint32_t)((s->config.elements - 1) / s->chunk_elements) + 1;
    s->codec = (enum outer_codec)s->outer->contribution_codec;
    s->fragment_count = s->outer->fragments;
    s->fragment = sync_alloc(s, s->fragment_count, sizeof *s->fragment);
    s->place = sync_alloc(s, s->chunk_count, sizeof *s->place);
    s->contribution = sync_alloc(s, s->fragment_count, sizeof *s->contribution);
    s->plan = sync_alloc(s, s->fragment_count, sizeof *s->plan);
    s->scratch = sync_alloc(s, s->chunk_elements, sizeof *s->scratch);
    s->scratch2 = sync_alloc(s, s->chunk_elements, sizeof *s->scratch2);
    return s->failure.code ? -1 : deal_chunks(s);
}

static int load(struct sync *s) {
    if (proto_copy(RECORD_genesis, s->config.genesis, &s->genesis, &s->failure)) return -1;
    s->config.genesis = &s->genesis;
    if (set_sizes(s) || load_meta(s)) return -1;
    s->term = s->term_max;
    if (ledger_load(s) || state_open(s) || contribution_open(s)) return -1;
    apply_resolve(s); /* it may have died between the last chunk and this */
    return s->failure.code ? -1 : 0;
}

struct sync *sync_create(const struct sync_config *config, uint64_t now_ms, struct err *err) {
    const uint32_t one = 1;
    assert(*(const uint8_t *)&one == 1); /* fp32 travels little-endian and is not turned round */
    assert(config->elements > 0 && config->load);
    if (check_config(config, err)) return NULL;
    struct sync *s = calloc(1, sizeof *s);
    if (!s) {
        err_set(err, ERR_MEMORY, "no memory for the machine");
        return NULL;
    }
    s->config = *config;
    s->disk = config->disk;
    s->now = s->tick_ms = now_ms;
    s->trainer.life = 1;
    if (load(s)) {
        if (err) *err = s->failure;
        sync_destroy(s);
        return NULL;
    }
    return s;
}

void sync_destroy(struct sync *s) {
    if (!s) return;
    peer_release(s);
    catchup_release(s);
    apply_release(s);
    for (uint32_t f = 0; s->plan && f < s->fragment_count; f++) plan_release(s, f);
    results_release(s);
    reduce_release(s);
    empty_grave(s);
    free(s->grave);
    contribution_release(s);
    state_release(s);
    ledger_release(s);
    checkpoint_forget_next(s);
    checkpoint_forget_manifest(s);
    for (uint32_t f = 0; s->fragment && f < s->fragment_count; f++) free(s->fragment[f].chunk);
    free(s->fragment);
    free(s->place);
    free(s->plan);
    free(s->scratch);
    free(s->scratch2);
    proto_copy_release(RECORD_genesis, &s->genesis);
    free(s);
}

void sync_set_slot(struct sync *s, float *slot, uint8_t *ops) {
    s->trainer.slot = slot;
    s->trainer.ops = ops;
}

void sync_set_before_change(struct sync *s, void (*hook)(void *arg, uint32_t chunk), void *arg) {
    s->before_change = hook;
    s->before_change_arg = arg;
}

/* ---- looking in ------------------------------------------------------------------------- */

static const struct plan *newest_plan(const struct sync *s) {
    const struct plan *best = NULL;
    for (uint32_t f = 0; f < s->fragment_count; f++)
        if (s->plan[f].active && (!best || s->plan[f].number > best->number)) best = &s->plan[f];
    return best;
}

static bool has_frozen(const struct sync *s) {
    for (uint32_t f = 0; f < s->fragment_count; f++)
        if (s->contribution[f].frozen) return true;
    return false;
}

static const char *phase_name(struct sync *s) {
    const struct trainer *t = &s->trainer;
    if (catchup_busy(s)) return "catching up";
    if (!s->welcomed && s->term == 0) return "connecting";
    if (is_training(s) && s->outer->overlap) return "training";
    if (!state_current(s)) return "applying";
    if (newest_plan(s)) return "reducing";
    if (t->standing && !has_frozen(s)) return "freezing";
    if (has_frozen(s)) return "waiting";
    if (!s->config.trains) return "idle";
    if (t->state != TRAINER_TRAINING || t->need_reset) return "starting the trainer";
    return t->freezing ? "freezing" : is_training(s) ? "training" : "waiting for data";
}

void sync_look(const struct sync *cs, struct sync_view *out) {
    struct sync *s = (struct sync *)(uintptr_t)cs;
    const struct plan *plan = newest_plan(s);
    *out = (struct sync_view){
        .term = s->term,
        .session = s->session,
        .head_index = s->ledger.count ? s->ledger.count - 1 : 0,
        .state_index = s->state.whole ? s->state.index : 0,
        .round = s->ledger.commit_count,
        .plan = plan ? plan->number : 0,
        .tokens_committed = s->tokens_committed,
        .settled_index = s->settled,
        .phase = phase_name(s),
        .chunk_count = s->chunk_count,
        .chunks_missing = s->state.missing,
        .members_live = s->members_live,
        .bytes_to_peers = s->bytes_to_peers,
        .bytes_from_peers = s->bytes_from_peers,
        .contributions_summed = s->summed,
        .contributions_refused = s->refused,
        .samples_uncommitted = leases_used(s),
        .account = s->account,
    };
    out->account.unfrozen = leases_unfrozen(s);
    if (s->state.whole) out->state_root = s->state.root;
    for (uint32_t i = 0; i < s->peer_count; i++) out->peers += s->peers[i]->open;
}

const float *sync_anchor(const struct sync *s) { return s->state.anchor; }
const float *sync_momentum(const struct sync *s) { return s->state.momentum; }
uint64_t sync_chunk_version(const struct sync *s, uint32_t chunk) {
    assert(chunk < s->chunk_count);
    return s->state.version[chunk];
}
uint32_t sync_ledger_count(const struct sync *s) { return s->ledger.count; }
const struct msg_signed_entry *sync_ledger_entry(const struct sync *s, uint32_t i) {
    assert(i < s->ledger.count);
    return &s->ledger.entries[i];
}
