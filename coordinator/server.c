/* server.c - from start to stop; see server_internal.h for what lies where. */
#include "coordinator/server.h"

#include <math.h>
#include <signal.h>
#include <sodium.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "coordinator/operate.h"
#include "coordinator/server_internal.h"
#include "coordinator/status.h"

/* Input first, then time: after a pause of our own, what waited in the sockets is read before the
 * core may judge anybody's silence. libevent runs a lower priority only when none above is due. */
enum { PRIORITY_SIGNAL, PRIORITY_INPUT, PRIORITY_TICK, PRIORITIES };

#define STOP_MS_MAX 10000   /* for the node beside us to end in order */
#define REFUSED_REPORT_TICKS 100
#define TERM_TICKS 10
#define OTHER_DESCRIPTORS 64 /* store, pipes, the loop, connections that are being refused */

uint64_t server_now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

uint64_t server_unix_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

void server_fail(struct server *s, const struct err *why) {
    if (s->failure.code) return;
    s->failure = *why;
    log_line(CORE_ERROR, "%s: stopping", why->msg);
    event_base_loopbreak(s->base);
}

/* ---- one line per round -------------------------------------------------------------------------- */

/* Mean of what the members that train say, or NaN. */
static double mean_loss(const struct core *c, uint64_t now_ms) {
    double sum = 0;
    int n = 0;
    for (uint32_t i = 0; i < core_member_count(c); i++) {
        struct core_member_view m;
        core_member_look(c, i, now_ms, &m);
        if (!m.live || !m.trains || m.step == 0 || !isfinite(m.loss)) continue;
        sum += m.loss;
        n++;
    }
    return n ? sum / n : NAN;
}

static void report_round(struct server *s, const struct core_view *v, uint64_t now_ms) {
    struct round_clock *k = &s->clock;
    double seconds = (double)(now_ms - k->since_ms) / 1000;
    log_line(CORE_INFO,
             "round %llu committed: %u members live, %.0f tokens/s, loss %.4f, train %.1f s, reduce "
             "%.1f s, %llu of %llu tokens, ledger entry %llu",
             (unsigned long long)v->round - 1, v->members_live,
             seconds > 0 ? (double)(v->tokens_committed - k->tokens) / seconds : 0.0,
             mean_loss(s->core, now_ms), (double)k->train_ms / 1000, (double)k->reduce_ms / 1000,
             (unsigned long long)v->tokens_committed, (unsigned long long)v->tokens_total,
             (unsigned long long)v->head_index);
}

static void watch_rounds(struct server *s, uint64_t now_ms) {
    struct round_clock *k = &s->clock;
    struct core_view v;
    core_look(s->core, now_ms, &v);
    uint64_t passed = now_ms - k->at_ms;
    if (k->at_ms && !strcmp(v.phase, "train")) k->train_ms += passed;
    if (k->at_ms && !strcmp(v.phase, "reduce")) k->reduce_ms += passed;
    if (k->at_ms && v.commits == k->commits) {
        k->at_ms = now_ms;
        return;
    }
    if (k->at_ms) report_round(s, &v, now_ms);
    *k = (struct round_clock){ .commits = v.commits, .tokens = v.tokens_committed,
                               .since_ms = now_ms, .at_ms = now_ms };
}

/* ---- status ---------------------------------------------------------------------------------------- */

static json_t *answer_order(struct server *s, const json_t *request) {
    struct core_event ev;
    struct err err;
    char text[512];
    if (operate_event(s->core, request, &ev, text, sizeof text, &err))
        return json_pack("{ss}", "error", err.msg);
    log_line(CORE_INFO, "operator: %s", text);
    server_step(s, &ev);
    return s->failure.code ? json_pack("{ss}", "error", s->failure.msg) : json_pack("{ss}", "done", text);
}

/* A request without an order asks for the status. */
static json_t *answer(void *arg, const json_t *request) {
    struct server *s = arg;
    if (json_object_get(request, "do")) return answer_order(s, request);
    char listen[ADDRESS_TEXT_BYTES], others[ADDRESS_TEXT_BYTES];
    json_t *status = status_json(s->core, server_now_ms(), s->run, true);
    address_format(&s->listen, listen);
    address_format(&s->others, others);
    json_object_set_new(status, "listen", json_string(listen));
    json_object_set_new(status, "address", json_string(others));
    json_object_set_new(status, "pid", json_integer(getpid()));
    return status;
}

/* ---- stopping ------------------------------------------------------------------------------------------ */

static void on_patience_over(evutil_socket_t fd, short what, void *arg) {
    struct server *s = arg;
    (void)fd;
    (void)what;
    if (s->aggregator && !aggregator_gone(s->aggregator))
        log_line(CORE_WARNING, "the aggregate-only node does not end, so it is killed");
    event_base_loopbreak(s->base);
}

static void stop(struct server *s, const char *why) {
    struct core_event ev = { .type = CORE_EV_STOP };
    struct timeval patience = { .tv_sec = STOP_MS_MAX / 1000 };
    log_line(CORE_INFO, "stopping: %s; once more to quit at once", why);
    s->stopping = true;
    listener_destroy(s->listener);
    s->listener = NULL;
    server_step(s, &ev);
    if (s->aggregator) aggregator_stop(s->aggregator);
    event_add(s->patience, &patience);
}

static void on_signal(evutil_socket_t number, short what, void *arg) {
    struct server *s = arg;
    (void)what;
    if (s->stopping) {
        signal((int)number, SIG_DFL);
        raise((int)number);
        return;
    }
    stop(s, number == SIGINT ? "interrupted" : number == SIGHUP ? "the terminal is gone" : "terminated");
}

static void close_connections(struct server *s) {
    for (uint32_t i = 0; i < SERVER_CONNECTIONS_MAX; i++)
        if (s->conns[i].id) {
            if (s->conns[i].place) gate_leave(s->conns[i].place);
            channel_close(s->conns[i].channel, false);
            s->conns[i].id = 0;
        }
}

/* Take away all that keeps the loop going; it then ends by itself when the good-byes are sent, which
 * channels give a second. */
static void go_when_done(struct server *s) {
    struct event *events[] = { s->tick, s->patience, s->on_int, s->on_term, s->on_hup };
    if (!s->stopping || (s->aggregator && !aggregator_gone(s->aggregator))) return;
    for (size_t i = 0; i < sizeof events / sizeof *events; i++)
        if (events[i]) event_del(events[i]);
    close_connections(s);
    aggregator_destroy(s->aggregator);
    s->aggregator = NULL;
    control_destroy(s->control);
    s->control = NULL;
}

/* ---- the loop -------------------------------------------------------------------------------------------- */

/* One that only looks has nothing to write, and would not learn otherwise that another one took over: its
 * members would stay with it. */
static void check_term(struct server *s) {
    uint64_t term;
    struct err err;
    if (s->ticks % TERM_TICKS) return;
    if (store_term(s->run->store, &term, &err) == 0) {
        if (term == s->term) return;
        err_set(&err, ERR_STALE,
                "another coordinator took this run over: the store is at term %llu, we are of %llu",
                (unsigned long long)term, (unsigned long long)s->term);
    }
    server_fail(s, &err);
}

static void on_tick(evutil_socket_t fd, short what, void *arg) {
    struct server *s = arg;
    struct core_event ev = { .type = CORE_EV_TICK };
    (void)fd;
    (void)what;
    server_step(s, &ev);
    if (s->failure.code) return;
    watch_rounds(s, server_now_ms());
    if (++s->ticks % REFUSED_REPORT_TICKS == 0) server_report_refused(s);
    check_term(s);
    go_when_done(s);
}

static int make_event(struct event **event, struct event *made, int priority,
                      const struct timeval *every, struct err *err) {
    *event = made;
    if (!made || event_priority_set(made, priority) || (every && event_add(made, every)))
        return err_set(err, ERR_MEMORY, "no memory for an event");
    return 0;
}

static int make_loop(struct server *s, struct err *err) {
    static const struct timeval tick = { .tv_usec = CORE_TICK_MS * 1000 };
    s->base = event_base_new();
    if (!s->base || event_base_priority_init(s->base, PRIORITIES))
        return err_set(err, ERR_MEMORY, "no memory for an event loop");
    if (make_event(&s->tick, event_new(s->base, -1, EV_PERSIST, on_tick, s), PRIORITY_TICK, &tick,
                   err))
        return -1;
    if (make_event(&s->patience, evtimer_new(s->base, on_patience_over, s), PRIORITY_TICK, NULL,
                   err))
        return -1;
    if (make_event(&s->on_int, evsignal_new(s->base, SIGINT, on_signal, s), PRIORITY_SIGNAL, NULL,
                   err) ||
        make_event(&s->on_term, evsignal_new(s->base, SIGTERM, on_signal, s), PRIORITY_SIGNAL,
                   NULL, err))
        return -1;
    if (event_add(s->on_int, NULL) || event_add(s->on_term, NULL))
        return err_set(err, ERR_MEMORY, "no memory for an event");
    if (signal(SIGHUP, SIG_IGN) == SIG_IGN) return 0; /* nohup: a terminal that goes is nothing to us */
    if (make_event(&s->on_hup, evsignal_new(s->base, SIGHUP, on_signal, s), PRIORITY_SIGNAL, NULL, err)) return -1;
    if (event_add(s->on_hup, NULL)) return err_set(err, ERR_MEMORY, "no memory for an event");
    return 0;
}

static int open_sockets(struct server *s, struct err *err) {
    const struct settings *set = s->config->settings;
    const char *listen = s->config->listen ? s->config->listen : set->listen;
    struct gate_limits limits = { set->strangers_max, set->connects_per_minute };
    if (address_split(listen, false, &s->listen, err)) return -1;
    if (!(s->gate = gate_create(&limits, err))) return -1;
    s->tls = channel_context_create(&s->keys.online, err);
    if (!s->tls) return -1;
    channel_context_set_timeouts(s->tls, CHANNEL_HANDSHAKE_MS_MAX, (int)set->stranger_seconds * 1000);
    s->listener = listener_create(s->base, s->listen.host, &s->listen.port, server_on_accept, s, err);
    if (!s->listener) {
        struct err why = *err;
        return err_set(err, why.code, "%.170s; choose another address or port with --listen HOST:PORT", why.msg);
    }
    if (address_for_others(&s->listen, set->address, &s->others, err)) return -1;
    s->control = control_create(s->base, s->run->dir, answer, s, err);
    return s->control ? 0 : -1;
}

/* Raise the term and start the core; hold_ms as in core.h. */
static int start_core(struct server *s, uint64_t hold_ms, struct err *err) {
    struct core_event ev = { .type = CORE_EV_START, .hold_ms = hold_ms };
    do {
        if (store_raise_term(s->run->store, &s->term, err)) return -1;
    } while (s->term <= s->restart_above);
    s->restart_above = 0;
    core_set_bf16(s->core, s->config->settings->checkpoint_bf16);
    ev.term = s->term;
    randombytes_buf(&ev.seed, sizeof ev.seed);
    server_step(s, &ev);
    return 0;
}

void server_begin_again(struct server *s) {
    struct err err = {0};
    log_line(CORE_WARNING, "going on from a newer ledger than this store had, above term %llu",
             (unsigned long long)s->restart_above);
    close_connections(s);
    core_destroy(s->core);
    s->core = run_core(s->run, &err);
    if (!s->core || start_core(s, s->run->genesis.outer->silence_ms_max, &err)) server_fail(s, &err);
}

/* Every connection is a descriptor, and the usual soft limit is 1024. */
static void raise_descriptors(void) {
    struct rlimit r;
    if (getrlimit(RLIMIT_NOFILE, &r)) return;
    r.rlim_cur = r.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &r)) getrlimit(RLIMIT_NOFILE, &r);
    uint64_t room = r.rlim_cur > OTHER_DESCRIPTORS ? r.rlim_cur - OTHER_DESCRIPTORS : 0;
    bool enough = room >= SERVER_CONNECTIONS_MAX;
    log_line(enough ? CORE_INFO : CORE_WARNING, "room for %llu connections%s",
             (unsigned long long)(enough ? SERVER_CONNECTIONS_MAX : room),
             enough ? "" : ": the hard limit of open files is low (ulimit -Hn)");
}

static int begin(struct server *s, struct err *err) {
    char listen[ADDRESS_TEXT_BYTES], others[ADDRESS_TEXT_BYTES], run[DIGEST_HEX_BYTES];
    address_format(&s->listen, listen);
    address_format(&s->others, others);
    digest_hex(&s->run->id, run);
    log_line(CORE_INFO, "serving run %s (%.16s) on %s, known to others as %s", s->run->sealed.name, run,
             listen, others);
    raise_descriptors();
    if (start_core(s, 0, err)) return -1;
    return s->config->aggregator && !s->failure.code ? server_start_own_node(s, err) : 0;
}

static void end_everything(struct server *s) {
    aggregator_destroy(s->aggregator);
    close_connections(s);
    control_destroy(s->control);
    listener_destroy(s->listener);
    channel_context_destroy(s->tls);
    gate_destroy(s->gate);
    struct event *events[] = { s->tick, s->patience, s->on_int, s->on_term, s->on_hup };
    for (size_t i = 0; i < sizeof events / sizeof *events; i++)
        if (events[i]) event_free(events[i]);
    if (s->base) event_base_free(s->base);
    core_actions_release(&s->actions);
    core_destroy(s->core);
    run_keys_release(&s->keys);
}

int server_run(const struct server_config *config, struct err *err) {
    int lock = -1, result = -1;
    if (store_lock(config->run->dir, &lock, err)) return -1;
    struct server *s = calloc(1, sizeof *s);
    if (!s) {
        err_set(err, ERR_MEMORY, "no memory for a server");
        goto unlock;
    }
    s->config = config;
    s->run = config->run;
    if (store_check(s->run->store, err) || run_keys_load(&s->keys, s->run, err)) goto out;
    s->core = run_core(s->run, err);
    if (!s->core || make_loop(s, err) || open_sockets(s, err) || begin(s, err)) goto out;
    if (!s->failure.code) event_base_dispatch(s->base);
    result = s->failure.code ? err_set(err, s->failure.code, "%s", s->failure.msg) : 0;
    if (result == 0) log_line(CORE_INFO, "stopped");
out:
    end_everything(s);
    free(s);
unlock:
    close(lock);
    return result;
}
