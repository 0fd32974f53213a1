/* agent.c - a node's life: opens its home, finds its run, becomes a member, leaves in order. What
 * happens in between is in agent_events.c; see agent.h. */
#include "node/agent_internal.h"

#include <malloc.h>
#include <signal.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "node/timer.h"
#include "proto/model.h"

/* ---- becoming a member ----------------------------------------------------------------------- */

/* sync asks members while there is no checkpoint to be had here; the person reads why, once. */
static int load_state(void *arg, const struct msg_checkpoint *from, uint64_t first, size_t n,
                      float *anchor, float *momentum, struct err *err) {
    struct agent *a = arg;
    if (!origin_load(a->origin, from, first, n, anchor, momentum, err)) return 0;
    if (strcmp(a->origin_said, err->msg) && err->code == ERR_TIMEOUT)
        console_say(a->console, SYNC_INFO, "state", "%s", err->msg);
    else if (strcmp(a->origin_said, err->msg))
        console_say(a->console, SYNC_WARNING, "state", "%s; asking other members", err->msg);
    snprintf(a->origin_said, sizeof a->origin_said, "%s", err->msg);
    return -1;
}

static int check_fragments(const struct msg_genesis *g, struct err *err) {
    const struct msg_outer *o = g->outer;
    if (o->fragments == 0) return err_set(err, ERR_CORRUPT, "outer: no fragments");
    uint8_t *fragment_of = calloc(PROTO_CHUNKS_MAX, 1);
    if (!fragment_of) return err_set(err, ERR_MEMORY, "no memory for a table of fragments");
    int rc = proto_model_fragments(g->model, o->chunk_elements, o->fragments, fragment_of, err);
    free(fragment_of);
    return rc;
}

/* The genesis is what the invite names, but whoever made it may have been wrong. */
static int check_genesis(const struct msg_genesis *g, struct err *err) {
    if (g->model_count != 1 || g->inner_count != 1 || g->outer_count != 1 || g->corpus_count != 1)
        return err_set(err, ERR_CORRUPT, "lacks model, inner, outer or corpus");
    if (proto_model_check(g->model, err) || proto_inner_check(g->inner, err)) return -1;
    const struct msg_outer *o = g->outer;
    if (o->chunk_elements == 0 || o->silence_ms_max == 0 || o->heartbeat_ms == 0)
        return err_set(err, ERR_CORRUPT, "outer: chunk_elements, silence or heartbeat is zero");
    if (proto_model_elements(g->model) / o->chunk_elements >= PROTO_CHUNKS_MAX)
        return err_set(err, ERR_CORRUPT, "outer: more than %u chunks", PROTO_CHUNKS_MAX);
    return check_fragments(g, err);
}

static int take_genesis(struct agent *a, struct err *err) {
    if (proto_decode(a->run.genesis, a->run.genesis_bytes, RECORD_genesis, &a->genesis, err) ||
        check_genesis(&a->genesis, err)) {
        err_prefix(err, "genesis of the run");
        return -1;
    }
    a->elements = proto_model_elements(a->genesis.model);
    return 0;
}

static void corpus_of(const struct agent *a, char *out, size_t size) {
    if (a->corpus[0])
        snprintf(out, size, "%s", a->corpus);
    else
        proto_str_copy(a->genesis.corpus->manifest_url, out, size);
}

static int set_up_trainer(struct agent *a, struct err *err) {
    char state[HOME_FILE_BYTES];
    struct segment_setup setup = { .elements = a->elements,
                                   .chunk_elements = a->genesis.outer->chunk_elements,
                                   .genesis = { a->run.genesis, a->run.genesis_bytes },
                                   .threads = a->options->threads, .tp = a->options->tp,
                                   .dp = a->options->dp, .shard = a->options->shard,
                                   .device = a->options->device,
                                   .precision = a->options->precision,
                                   .activation_bytes = a->options->activation_bytes,
                                   .offload = a->options->offload,
                                   .nice = a->options->nice };
    home_file(&a->home, "inner.state", state);
    snprintf(setup.inner_state, sizeof setup.inner_state, "%s", state);
    corpus_of(a, setup.corpus, sizeof setup.corpus);
    a->keeper =
        keeper_create(a->base, &setup, a->genesis.outer->silence_ms_max, &agent_keeper_ops, a, err);
    if (!a->keeper) return -1;
    sync_set_slot(a->sync, segment_in(keeper_segment(a->keeper)),
                  segment_ops(keeper_segment(a->keeper)));
    return 0;
}

static int set_up_sync(struct agent *a, struct err *err) {
    char state[HOME_FILE_BYTES], origin[HOME_FILE_BYTES], tokenizer[HOME_FILE_BYTES];
    home_file(&a->home, "state", state);
    home_file(&a->home, "origin", origin);
    home_file(&a->home, HOME_TOKENIZER, tokenizer);
    if (disk_open(state, &a->disk, err)) return -1;
    if (!(a->origin = origin_create(&a->genesis, a->run.aggregate_only ? origin : NULL)))
        return err_set(err, ERR_MEMORY, "no memory for an origin");
    uint64_t instance;
    randombytes_buf(&instance, sizeof instance);
    struct sync_config config = { .genesis = &a->genesis, .run = a->run.run,
                                  .identity = &a->home.identity, .instance = instance,
                                  .member = a->run.member,
                                  .trains = !a->run.aggregate_only, .port = a->port,
                                  .elements = a->elements, .load = load_state,
                                  .load_arg = a, .disk = a->disk };
    if (!(a->sync = sync_create(&config, timer_now_ms(), err))) return -1;
    a->peers = peers_create(a->base, a->ctx, a->run.member, &agent_peers_ops, a, err);
    if (!a->peers) return -1;
    a->checkpoint = checkpoint_create(a->base, a->elements, a->genesis.outer->chunk_elements, tokenizer,
                                      &agent_checkpoint_ops, a);
    if (!a->checkpoint) return err_set(err, ERR_MEMORY, "no memory for checkpoints");
    a->carrier = carrier_create(a->base, a->genesis.model, a->elements, a->genesis.outer->chunk_elements,
                                a->genesis.checkpoint_url, a->home.path, agent_on_part_done, a);
    if (!a->carrier) return err_set(err, ERR_MEMORY, "no memory for parts of checkpoints");
    sync_set_before_change(a->sync, agent_before_change, a);
    return 0;
}

static void say_what_it_is(struct agent *a) {
    char hex[DIGEST_HEX_BYTES], name[80], corpus[PROTO_URL_BYTES_MAX + 1], device[DEVICE_NAME_BYTES];
    struct sync_view v;
    digest_hex(&a->run.run, hex);
    proto_str_copy(a->genesis.name, name, sizeof name);
    corpus_of(a, corpus, sizeof corpus);
    device_name(a->options->device, device);
    sync_look(a->sync, &v);
    console_say(a->console, SYNC_INFO, "run", "run \"%s\" (%.16s...), %.2f million parameters",
                name, hex, (double)a->elements / 1e6);
    console_say(a->console, SYNC_INFO, "state",
                "member %u; own state: round %llu, ledger index %llu", a->run.member,
                (unsigned long long)(v.round / a->genesis.outer->fragments), (unsigned long long)v.state_index);
    if (a->run.aggregate_only)
        console_say(a->console, SYNC_INFO, "device", "holds the state and sums; does not train");
    else if (a->options->threads)
        console_say(a->console, SYNC_INFO, "device",
                    "trains on %s, %d thread%s, nice %d, corpus %s", device, a->options->threads,
                    a->options->threads == 1 ? "" : "s", a->options->nice, corpus);
    else
        console_say(a->console, SYNC_INFO, "device", "trains on %s, all cores, nice %d, corpus %s",
                    device, a->options->nice, corpus);
    a->index_shown = v.state_index;
    a->round_shown = v.round / a->genesis.outer->fragments;
}

static int set_up(struct agent *a, struct err *err) {
    struct timeval tick = { .tv_usec = SYNC_TICK_MS * 1000 };
    if (set_up_sync(a, err)) return -1;
    if (!a->run.aggregate_only && set_up_trainer(a, err)) return -1;
    uplink_set_silence(a->uplink, a->genesis.outer->silence_ms_max);
    a->is_member = true;
    say_what_it_is(a);
    event_add(a->tick, &tick);
    return 0;
}

/* ---- the coordinator ------------------------------------------------------------------------- */

static int on_welcome(void *arg, const struct uplink_welcome *w, struct err *err) {
    struct agent *a = arg;
    if (a->run.genesis) return 0;
    if (!(a->run.genesis = malloc(w->genesis_bytes.length)))
        return err_set(err, ERR_MEMORY, "no memory for a genesis");
    memcpy(a->run.genesis, w->genesis_bytes.data, w->genesis_bytes.length);
    a->run.genesis_bytes = w->genesis_bytes.length;
    return take_genesis(a, err); /* before the invite is used up */
}

static int on_enrolled(void *arg, uint32_t member, struct err *err) {
    struct agent *a = arg;
    if (member == 0) return err_set(err, ERR_PROTOCOL, "the coordinator gave member id 0");
    a->run.member = member;
    console_say(a->console, SYNC_INFO, "enrolled", "enrolled as member %u \"%s\"", member,
                a->run.name);
    return home_run_save(&a->home, &a->run, err) ? -1 : set_up(a, err);
}

static void on_up(void *arg) {
    struct agent *a = arg;
    console_say(a->console, SYNC_INFO, "connected", "connected to %s:%u", a->run.host, a->run.port);
    agent_feed(a, &(struct sync_event){ .type = SYNC_EV_CONNECTED,
                                  .frame = uplink_welcome(a->uplink)->frame });
}

static void on_message(void *arg, const struct frame *f, const void *msg) {
    agent_feed(arg, &(struct sync_event){ .type = SYNC_EV_MESSAGE, .frame = *f, .msg = msg });
}

static void on_down(void *arg, const char *why) {
    struct agent *a = arg;
    if (!a->leaving)
        console_say(a->console, SYNC_WARNING, "disconnected",
                    "lost the coordinator (%s); going on without, trying again", why);
    agent_feed(a, &(struct sync_event){ .type = SYNC_EV_DISCONNECTED });
}

static void on_refused(void *arg, const struct err *why, bool final) {
    struct agent *a = arg;
    if (final)
        agent_fail(a, why);
    else
        console_say(a->console, SYNC_WARNING, "refused", "%s; trying again", why->msg);
}

static void on_trouble(void *arg, const char *text) {
    struct agent *a = arg;
    console_say(a->console, SYNC_WARNING, "trouble", "%s", text);
}

static const struct uplink_ops uplink_callbacks = {
    .on_welcome = on_welcome, .on_enrolled = on_enrolled, .on_up = on_up, .on_message = on_message,
    .on_down = on_down, .on_refused = on_refused, .on_trouble = on_trouble
};

/* ---- the end --------------------------------------------------------------------------------- */

static void on_end(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    struct agent *a = arg;
    if (a->trainer_gone) event_base_loopbreak(a->base);
}

/* In order: the last messages are sent, the trainer saves its moments and ends, then the loop ends.
 * May be called from within an event's actions, so it only sets things in motion. */
void agent_leave(struct agent *a) {
    if (a->leaving) return;
    a->leaving = true;
    timer_set(a->end, 0);
    if (a->tick) event_del(a->tick);
    if (!a->stepping && a->uplink && uplink_is_up(a->uplink) && !a->said_goodbye)
        agent_feed(a, &(struct sync_event){ .type = SYNC_EV_LEAVE });
    if (a->uplink) uplink_stop(a->uplink);
    if (a->keeper && keeper_stop(a->keeper)) {
        console_say(a->console, SYNC_INFO, "leaving",
                    "waiting for the trainer to save its moments");
        return;
    }
    a->trainer_gone = true;
    timer_set(a->end, AGENT_GOODBYE_MS);
}

/* End with an error; the first one counts. */
void agent_fail(struct agent *a, const struct err *why) {
    if (a->failed.code == ERR_NONE) a->failed = *why;
    agent_leave(a);
}

static void on_signal(evutil_socket_t number, short what, void *arg) {
    (void)what;
    struct agent *a = arg;
    if (a->signals_seen++) {
        console_destroy(a->console);
        _exit(128 + (int)number); /* the trainer ends with us */
    }
    console_say(a->console, SYNC_INFO, "leaving",
                "leaving in order (once more quits at once; `run` goes on from here)");
    agent_leave(a);
}

/* ---- the beginning --------------------------------------------------------------------------- */

#define NO_RUN_YET "%s has joined no run yet: intellect-node join INVITE, or give another --home"

static int take_run(struct agent *a, struct err *err) {
    const struct agent_options *o = a->options;
    const struct invite *invite = o->invite;
    struct err none = {0};
    bool known = !home_run_load(&a->home, &a->run, &none);
    if (!known && none.code != ERR_NOT_FOUND) {
        *err = none;
        return -1;
    }
    if (!invite && !known)
        return err_set(err, ERR_CONFIG, NO_RUN_YET, a->home.path);
    if (invite && known && !digest_equal(&invite->run, &a->run.run))
        return err_set(err, ERR_CONFIG, "%s belongs to another run: give another --home",
                       a->home.path);
    if (invite && known && o->aggregate_only != a->run.aggregate_only)
        return err_set(err, ERR_CONFIG, "%s has joined %s --aggregate-only: give another --home",
                       a->home.path, a->run.aggregate_only ? "with" : "without");
    if (!invite) return 0;
    snprintf(a->run.host, sizeof a->run.host, "%s", invite->host);
    a->run.port = invite->port;
    a->run.run = invite->run;
    a->run.aggregate_only = o->aggregate_only;
    return 0;
}

/* Cuts at a character, not in the middle of one: the name travels as UTF-8. */
static void take_name(struct agent *a) {
    char host[PROTO_NAME_BYTES_MAX + 1] = "node";
    gethostname(host, sizeof host - 1);
    if (a->options->name)
        snprintf(a->run.name, sizeof a->run.name, "%s", a->options->name);
    else if (!a->run.name[0])
        snprintf(a->run.name, sizeof a->run.name, "%s", host);
}

static int take_corpus(struct agent *a, struct err *err) {
    const char *corpus = a->options->corpus;
    snprintf(a->corpus, sizeof a->corpus, "%s", a->run.corpus);
    if (!corpus) return 0;
    char *whole = strstr(corpus, "://") ? strdup(corpus) : realpath(corpus, NULL);
    if (!whole) return err_set_errno(err, "--corpus %s", corpus);
    int n = snprintf(a->corpus, sizeof a->corpus, "%s", whole);
    free(whole);
    if ((size_t)n >= sizeof a->corpus)
        return err_set(err, ERR_CONFIG, "--corpus: the path is too long");
    return 0;
}

static void on_accept(void *arg, int fd) {
    struct agent *a = arg;
    if (a->peers && !a->leaving)
        peers_accept(a->peers, fd);
    else
        close(fd);
}

static int listen_for_members(struct agent *a, struct err *err) {
    if (a->options->listen_port < 0) return 0;
    struct err no_v6 = {0};
    a->port = (uint16_t)a->options->listen_port;
    a->listener = listener_create(a->base, "::", &a->port, on_accept, a, &no_v6);
    if (!a->listener) {
        a->port = (uint16_t)a->options->listen_port;
        a->listener = listener_create(a->base, "0.0.0.0", &a->port, on_accept, a, err);
    }
    return a->listener ? 0 : -1;
}

static int make_events(struct agent *a, struct err *err) {
    static const int numbers[] = { SIGINT, SIGTERM, SIGHUP };
    a->base = event_base_new();
    if (!a->base) return err_set(err, ERR_MEMORY, "no memory for an event loop");
    a->tick = event_new(a->base, -1, EV_PERSIST, agent_on_tick, a);
    a->work = evtimer_new(a->base, agent_on_work, a);
    a->end = evtimer_new(a->base, on_end, a);
    if (!a->tick || !a->work || !a->end) return err_set(err, ERR_MEMORY, "no memory for events");
    for (int i = 0; i < 3; i++) {
        if (numbers[i] == SIGHUP && signal(SIGHUP, SIG_IGN) == SIG_IGN) continue; /* nohup */
        a->signals[i] = evsignal_new(a->base, numbers[i], on_signal, a);
        if (!a->signals[i] || event_add(a->signals[i], NULL))
            return err_set(err, ERR_MEMORY, "no memory for signals");
    }
    return 0;
}

static void say_what_comes(struct agent *a) {
    console_say(a->console, SYNC_INFO, "start", "coordinator %s:%u; identity and state in %s",
                a->run.host, a->run.port, a->home.path);
    if (a->port)
        console_say(a->console, SYNC_INFO, "start",
                    "other members may connect to port %u; Ctrl-C leaves in order", a->port);
    else
        console_say(a->console, SYNC_INFO, "start",
                    "connects to others, listens on no port; Ctrl-C leaves in order");
}

static int start(struct agent *a, struct err *err) {
    const struct agent_options *o = a->options;
    if (take_run(a, err) || take_corpus(a, err)) return -1;
    take_name(a);
    if (a->run.genesis && take_genesis(a, err)) return -1;
    if (make_events(a, err)) return -1;
    if (!(a->ctx = channel_context_create(&a->home.identity, err))) return -1;
    if (listen_for_members(a, err)) return -1;
    a->uplink = uplink_create(a->base, a->ctx, a->run.host, a->run.port, &a->run.run,
                              &uplink_callbacks, a, err);
    if (!a->uplink) return -1;
    say_what_comes(a);
    if (a->run.member) return home_run_save(&a->home, &a->run, err) ? -1 : set_up(a, err);
    if (!o->invite)
        return err_set(err, ERR_CONFIG, "%s was never enrolled: intellect-node join INVITE",
                       a->home.path);
    uplink_set_enrol(a->uplink, &o->invite->secret, a->run.name, a->run.aggregate_only);
    return 0;
}

static void free_event(struct event *ev) {
    if (ev) event_free(ev);
}

static void tear_down(struct agent *a) {
    keeper_destroy(a->keeper);
    checkpoint_destroy(a->checkpoint);
    carrier_destroy(a->carrier);
    peers_destroy(a->peers);
    uplink_destroy(a->uplink);
    if (a->sync) sync_destroy(a->sync);
    sync_actions_release(&a->actions);
    origin_destroy(a->origin);
    disk_close(&a->disk);
    if (a->listener) listener_destroy(a->listener);
    channel_context_destroy(a->ctx);
    free_event(a->tick);
    free_event(a->work);
    free_event(a->end);
    for (int i = 0; i < 3; i++) free_event(a->signals[i]);
    if (a->base) event_base_free(a->base);
    proto_decoded_release(RECORD_genesis, &a->genesis);
    home_run_release(&a->run);
    home_release(&a->home);
    console_destroy(a->console);
}

void agent_keep_memory(void) {
#ifdef M_MMAP_THRESHOLD
    mallopt(M_MMAP_THRESHOLD, AGENT_SPARE_BYTES);
    mallopt(M_TRIM_THRESHOLD, AGENT_SPARE_BYTES);
#endif
}

int agent_run(const struct agent_options *options, struct err *err) {
    char path[HOME_PATH_BYTES];
    agent_keep_memory();
    struct agent *a = calloc(1, sizeof *a);
    if (!a) return err_set(err, ERR_MEMORY, "no memory for an agent");
    a->options = options;
    a->console = console_create(options->log_json, options->quiet     ? SYNC_WARNING
                                                   : options->verbose ? SYNC_DEBUG
                                                                      : SYNC_INFO);
    int rc = !a->console ? err_set(err, ERR_MEMORY, "no memory for an agent") : 0;
    if (!rc && !options->home) rc = home_default(path, err);
    const char *home = options->home ? options->home : path;
    if (!rc && !options->invite && access(home, F_OK)) /* `run` makes no folder that nobody asked for */
        rc = err_set(err, ERR_CONFIG, NO_RUN_YET, home);
    if (!rc) rc = home_open(&a->home, home, err);
    if (!rc) rc = start(a, err);
    if (!rc) {
        event_base_dispatch(a->base);
        if (a->failed.code != ERR_NONE) {
            *err = a->failed;
            rc = -1;
        } else {
            console_say(a->console, SYNC_INFO, "end", "left in order");
        }
    }
    tear_down(a);
    free(a);
    return rc;
}
