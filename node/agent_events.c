/* agent_events.c - sync's surroundings: the events that reach it and the actions it asks for. */
#include "node/agent_internal.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

#include "node/timer.h"

static void perform(struct agent *a, const struct sync_action *act);

/* ---- what holds the loop up ------------------------------------------------------------------ */

#define LONG_TURN_MS 20
#define TOLD_MS 60000

static void note_turn(struct agent *a, const char *what, const struct timer_turn *turn) {
    if (turn->us <= a->longest.us) return;
    a->longest = *turn;
    a->longest_for = what;
}

static void tell_longest_turn(struct agent *a) {
    uint64_t now = timer_now_ms();
    if (a->longest.us < 1000 * LONG_TURN_MS || now - a->longest_told_ms < TOLD_MS) return;
    console_say(a->console, SYNC_DEBUG, "loop", "held up for %llu ms by %s, which worked for %llu ms of it",
                (unsigned long long)a->longest.us / 1000, a->longest_for,
                (unsigned long long)a->longest.worked_us / 1000);
    a->longest = (struct timer_turn){0};
    a->longest_told_ms = now;
}

static const char *name_of(const struct sync_event *ev) {
    switch (ev->type) {
    case SYNC_EV_MESSAGE: case SYNC_EV_PEER_MESSAGE: return proto_type_name(ev->frame.type);
    case SYNC_EV_WORK: return "work on a round";
    case SYNC_EV_TICK: return "the tick";
    case SYNC_EV_TRAINER_FROZEN: return "a contribution";
    case SYNC_EV_TRAINER_APPLIED: return "an applied result";
    default: return "another event";
    }
}

/* ---- sync ------------------------------------------------------------------------------------ */

/* One event in, its actions carried out. Nothing that is called from here calls back into here: the
 * modules around sync tell what follows from the loop. */
void agent_feed(struct agent *a, const struct sync_event *ev) {
    struct err err = {0};
    if (!a->sync || (a->leaving && ev->type != SYNC_EV_LEAVE)) return;
    assert(!a->stepping);
    struct timer_turn begun = timer_turn(), turn;
    a->stepping = true;
    sync_actions_clear(&a->actions);
    int rc = sync_step(a->sync, ev, timer_now_ms(), &a->actions, &err);
    for (uint32_t i = 0; !rc && i < a->actions.count; i++) perform(a, &a->actions.list[i]);
    a->stepping = false;
    turn = timer_turn_end(&begun);
    note_turn(a, name_of(ev), &turn);
    if (rc) {
        err_prefix(&err, "state");
        agent_fail(a, &err);
    } else if (a->cut) {
        a->cut = false;
        agent_feed(a, &(struct sync_event){ .type = SYNC_EV_DISCONNECTED });
    } else if (sync_has_work(a->sync)) {
        timer_set(a->work, 0);
    }
}

static void feed_type(struct agent *a, enum sync_event_type type) {
    agent_feed(a, &(struct sync_event){ .type = type });
}

/* A zero timer runs once per turn of the loop, after whatever came in: work neither delays messages
 * nor is starved by them. */
void agent_on_work(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    feed_type(arg, SYNC_EV_WORK);
}

static struct console_figures figures(const struct agent *a) {
    struct console_figures f = { .step = a->step,
                                 .loss = a->loss,
                                 .tokens_per_s = a->tokens_per_s,
                                 .data_share = a->data_share,
                                 .fragments = a->genesis.outer->fragments,
                                 .trains = a->keeper != NULL,
                                 .connected = uplink_is_up(a->uplink) };
    sync_look(a->sync, &f.view);
    f.view.peers = peers_count(a->peers);
    return f;
}

/* A person reads a line when every fragment has had its turn, a program one for each commit. */
static bool round_is_news(const struct agent *a, const struct console_figures *f) {
    if (f->view.state_index <= a->index_shown) return false;
    return a->options->log_json || f->view.round / f->fragments > a->round_shown;
}

static void round_applied(struct agent *a, struct console_figures f) {
    if (a->loss_count) f.loss = a->loss_sum / a->loss_count;
    a->loss_sum = a->loss_count = 0;
    a->index_shown = f.view.state_index;
    a->round_shown = f.view.round / f.fragments;
    console_round(a->console, &f);
}

void agent_on_tick(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct agent *a = arg;
    agent_feed(a, &(struct sync_event){ .type = SYNC_EV_TICK,
                                        .beats = a->keeper ? segment_beats(keeper_segment(a->keeper)) : 0 });
    if (a->leaving) return;
    tell_longest_turn(a);
    struct console_figures f = figures(a);
    if (f.view.chunks_missing == 0) origin_rest(a->origin);
    if (round_is_news(a, &f)) round_applied(a, f);
    console_live(a->console, &f);
}

/* ---- what sync wants ------------------------------------------------------------------------- */

static void on_bye_action(struct agent *a, const struct sync_action *act) {
    if (act->final && act->code == ERR_NONE) {
        console_say(a->console, SYNC_INFO, "bye", "the coordinator says: %s", act->text);
        a->said_goodbye = true;
        agent_leave(a);
    } else if (act->final) {
        struct err why;
        err_set(&why, act->code, "the coordinator says: %s", act->text);
        a->said_goodbye = true;
        agent_fail(a, &why);
    } else {
        console_say(a->console, SYNC_WARNING, "bye", "the coordinator says: %s; trying again",
                    act->text);
    }
}

static void tell_trainer(struct agent *a, uint32_t type, const struct sync_action *act) {
    if (!a->keeper || !a->trainer_up) return; /* sync was told that it is down */
    keeper_send(a->keeper, &(struct segment_message){
                               .type = type, .start = act->start, .count = act->count,
                               .fragment = act->fragment, .wait = act->wait,
                               .tokens = act->tokens, .contributors = act->contributors,
                               .steps = act->steps });
}

static void perform_roster(struct agent *a, const struct sync_action *act) {
    struct err err = {0};
    if (peers_set_roster(a->peers, act->msg, &err))
        console_say(a->console, SYNC_WARNING, "roster", "%s", err.msg);
}

static void perform_signed(struct agent *a, const struct sync_action *act) {
    const struct msg_checkpoint_signed *m = act->msg;
    checkpoint_signed(a->checkpoint, m->index, act->term, &m->signature, uplink_welcome(a->uplink));
}

static void perform(struct agent *a, const struct sync_action *act) {
    switch (act->type) {
    case SYNC_ACT_SEND:
        uplink_send(a->uplink, act->message, act->term, act->session, act->plan, act->msg);
        break;
    case SYNC_ACT_DISCONNECT:
        a->cut = uplink_is_up(a->uplink);
        uplink_redial(a->uplink);
        break;
    case SYNC_ACT_PEER_DIAL: peers_dial(a->peers, act->peer, act->host, act->port); break;
    case SYNC_ACT_PEER_SEND:
        peers_send(a->peers, act->peer, act->message, act->term, act->session, act->plan, act->msg);
        break;
    case SYNC_ACT_PEER_CLOSE: peers_close(a->peers, act->peer); break;
    case SYNC_ACT_ROSTER: perform_roster(a, act); break;
    case SYNC_ACT_TRAINER_SAMPLES: tell_trainer(a, SEGMENT_SAMPLES, act); break;
    case SYNC_ACT_TRAINER_FREEZE: tell_trainer(a, SEGMENT_FREEZE, act); break;
    case SYNC_ACT_TRAINER_APPLY: tell_trainer(a, SEGMENT_APPLY, act); break;
    case SYNC_ACT_TRAINER_RESET: tell_trainer(a, SEGMENT_RESET, act); break;
    case SYNC_ACT_TRAINER_CONTINUE: tell_trainer(a, SEGMENT_CONTINUE, act); break;
    case SYNC_ACT_TRAINER_MOMENTS_EXPORT: tell_trainer(a, SEGMENT_MOMENTS_EXPORT, act); break;
    case SYNC_ACT_TRAINER_MOMENTS_IMPORT: tell_trainer(a, SEGMENT_MOMENTS_IMPORT, act); break;
    case SYNC_ACT_CHECKPOINT_BEGIN:
        checkpoint_begin(a->checkpoint, a->sync,
                         (struct proto_bytes){ a->run.genesis, a->run.genesis_bytes }, act->msg);
        break;
    case SYNC_ACT_CHECKPOINT_SIGNED: perform_signed(a, act); break;
    case SYNC_ACT_CHECKPOINT_PART_DONE: checkpoint_settle(a->checkpoint, act->msg); break;
    case SYNC_ACT_CHECKPOINT_ALONE: checkpoint_alone(a->checkpoint); break;
    case SYNC_ACT_CHECKPOINT_KEEP: carrier_keep(a->carrier, a->sync, act->msg); break;
    case SYNC_ACT_CHECKPOINT_PART: carrier_part(a->carrier, act->msg); break;
    case SYNC_ACT_BYE: on_bye_action(a, act); break;
    case SYNC_ACT_LOG: console_say(a->console, act->level, "sync", "%s", act->text); break;
    }
}

/* ---- trainer, members, checkpoints: what they say becomes events ----------------------------- */

/* A corpus that a trainer could open is worth remembering. */
static void keep_corpus(struct agent *a) {
    struct err err = {0};
    if (!strcmp(a->run.corpus, a->corpus)) return;
    snprintf(a->run.corpus, sizeof a->run.corpus, "%s", a->corpus);
    if (home_run_save(&a->home, &a->run, &err))
        console_say(a->console, SYNC_WARNING, "home", "--corpus is not remembered: %s", err.msg);
}

static void on_trainer_up(struct agent *a, const struct segment_message *m) {
    a->trainer_up = true;
    keep_corpus(a);
    console_say(a->console, SYNC_INFO, "trainer", "the trainer is ready (%s): %s",
                m->steps ? "with the moments of its last life" : "starting with fresh moments", m->text);
    agent_feed(a, &(struct sync_event){ .type = SYNC_EV_TRAINER_UP, .steps = m->steps });
}

static void on_trainer_step(struct agent *a, const struct segment_message *m) {
    a->step = m->steps;
    a->loss = m->loss;
    a->data_share = m->data_share;
    a->loss_sum += m->loss;
    a->loss_count++;
    a->tokens_per_s += (m->tokens_per_s - a->tokens_per_s) * (a->tokens_per_s > 0 ? 0.2 : 1);
    agent_feed(a, &(struct sync_event){ .type = SYNC_EV_TRAINER_STEP, .samples = m->samples,
                                  .steps = m->steps, .loss = m->loss,
                                  .tokens_per_s = m->tokens_per_s });
}

static void on_trainer_message(void *arg, const struct segment_message *m) {
    struct agent *a = arg;
    switch (m->type) {
    case SEGMENT_UP: on_trainer_up(a, m); break;
    case SEGMENT_STEP: on_trainer_step(a, m); break;
    case SEGMENT_FROZEN:
        agent_feed(a, &(struct sync_event){
                    .type = SYNC_EV_TRAINER_FROZEN, .fragment = m->fragment,
                    .samples = m->samples, .steps = m->steps, .loss = a->loss,
                    .tokens_per_s = a->tokens_per_s,
                    .local = segment_out(keeper_segment(a->keeper), SEGMENT_OUT_PARAMETERS) });
        break;
    case SEGMENT_APPLIED: feed_type(a, SYNC_EV_TRAINER_APPLIED); break;
    case SEGMENT_MOMENTS:
        agent_feed(a, &(struct sync_event){
                    .type = SYNC_EV_TRAINER_MOMENTS, .steps = m->steps,
                    .local = segment_out(keeper_segment(a->keeper), SEGMENT_OUT_MOMENTS) });
        break;
    case SEGMENT_DEVICE_FAILED:
        console_say(a->console, SYNC_WARNING, "trainer", "the device failed: %s", m->text);
        break;
    case SEGMENT_NOTE: console_say(a->console, SYNC_WARNING, "trainer", "%s", m->text); break;
    default: break; /* SEGMENT_FAILED is the keeper's */
    }
}

static void on_trainer_start(void *arg, pid_t pid) {
    struct agent *a = arg;
    console_say(a->console, SYNC_INFO, "trainer", "trainer process %ld started", (long)pid);
}

static void on_trainer_end(void *arg, const char *why, uint32_t wait_ms) {
    struct agent *a = arg;
    if (a->leaving) {
        a->trainer_gone = true;
        console_say(a->console, SYNC_INFO, "trainer", "the trainer has ended");
        timer_set(a->end, AGENT_GOODBYE_MS);
        return;
    }
    console_say(a->console, SYNC_WARNING, "trainer", "the trainer ended (%s)%s", why,
                wait_ms ? "; starting it again" : "");
    if (a->trainer_up) feed_type(a, SYNC_EV_TRAINER_DOWN);
    a->trainer_up = false;
}

static void on_trainer_give_up(void *arg, const struct err *why) {
    struct agent *a = arg;
    a->trainer_gone = true;
    agent_fail(a, why);
}

const struct keeper_ops agent_keeper_ops = {
    .on_message = on_trainer_message, .on_start = on_trainer_start, .on_end = on_trainer_end,
    .on_give_up = on_trainer_give_up
};

static void on_peer_open(void *arg, uint32_t member) {
    agent_feed(arg, &(struct sync_event){ .type = SYNC_EV_PEER_OPEN, .peer = member });
}
static void on_peer_message(void *arg, uint32_t member, const struct frame *f, const void *msg) {
    agent_feed(arg, &(struct sync_event){ .type = SYNC_EV_PEER_MESSAGE, .peer = member, .frame = *f,
                                    .msg = msg });
}
static void on_peer_close(void *arg, uint32_t member, const char *why) {
    struct agent *a = arg;
    console_say(a->console, SYNC_DEBUG, "peer", "member %u: %s", member, why);
    agent_feed(a, &(struct sync_event){ .type = SYNC_EV_PEER_CLOSED, .peer = member });
}
static void on_peer_drained(void *arg, uint32_t member) {
    agent_feed(arg, &(struct sync_event){ .type = SYNC_EV_PEER_DRAINED, .peer = member });
}
static void on_peer_complaint(void *arg, const char *text) {
    struct agent *a = arg;
    console_say(a->console, SYNC_WARNING, "peer", "%s", text);
}

const struct peers_ops agent_peers_ops = { .on_open = on_peer_open,
                                           .on_message = on_peer_message,
                                           .on_close = on_peer_close,
                                           .on_drained = on_peer_drained,
                                           .on_complaint = on_peer_complaint };

static void on_checkpoint_turn(void *arg, const struct timer_turn *turn) {
    note_turn(arg, "a checkpoint", turn);
}

static void on_manifest(void *arg, const void *manifest, size_t length) {
    agent_feed(arg, &(struct sync_event){
                  .type = SYNC_EV_CHECKPOINT, .manifest = { manifest, (uint32_t)length },
                  .manifest_digest = digest_of(manifest, length) });
}
static void on_checkpoint_done(void *arg, bool ok, const struct digest *manifest,
                               const char *text) {
    struct agent *a = arg;
    console_say(a->console, ok ? SYNC_INFO : SYNC_WARNING, "checkpoint",
                ok ? "checkpoint written: %s" : "checkpoint not written: %s", text);
    agent_feed(a, &(struct sync_event){ .type = SYNC_EV_CHECKPOINT, .done = true, .ok = ok,
                                  .manifest_digest = *manifest, .text = text });
}

static void on_note(void *arg, uint64_t index, const struct ckpt_note *n, uint32_t chunk) {
    bool looked = n->kind == CKPT_NOTE_LOOKED;
    struct msg_checkpoint_part_done done = { .index = index, .part = n->number, .check = 1, .done = 1 };
    struct msg_checkpoint_part part = { .index = index, .part = n->number, .chunk = chunk,
                                        .check = n->kind == CKPT_NOTE_CHECK, .object = proto_str(n->object),
                                        .offset = n->part.offset, .bytes = (uint32_t)n->part.bytes,
                                        .url = proto_str(n->part.url) };
    memcpy(part.sha256.b, n->part.sha256, sizeof part.sha256.b);
    agent_feed(arg, &(struct sync_event){ .type = looked ? SYNC_EV_CHECKPOINT_PART : SYNC_EV_CHECKPOINT_OFFER,
                                          .msg = looked ? (const void *)&done : &part });
}

void agent_on_part_done(void *agent, const struct msg_checkpoint_part_done *done) {
    agent_feed(agent, &(struct sync_event){ .type = SYNC_EV_CHECKPOINT_PART, .msg = done });
}

void agent_before_change(void *agent, uint32_t chunk) {
    struct agent *a = agent;
    checkpoint_before_change(a->checkpoint, chunk);
    carrier_before_change(a->carrier, chunk);
}

const struct checkpoint_ops agent_checkpoint_ops = { .on_manifest = on_manifest, .on_note = on_note,
                                                     .on_turn = on_checkpoint_turn, .on_done = on_checkpoint_done };
