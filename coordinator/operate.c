/* operate.c - orders of the operator; see operate.h. */
#include "coordinator/operate.h"

#include <sodium.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "coordinator/control.h"

/* ---- from a request to an event -------------------------------------------------------------- */

static const struct kind {
    const char *what, *done;
    enum core_event_type type;
    bool about_member;
} kinds[] = {
    { "pause", "paused: no leases and no new plans; rounds in work are finished", CORE_EV_PAUSE, false },
    { "resume", "resumed", CORE_EV_RESUME, false },
    { "revoke", "is revoked for good: its key leaves the roster", CORE_EV_REVOKE, true },
    { "release", "is out of quarantine", CORE_EV_RELEASE, true },
};

static const struct kind *find_kind(const char *what) {
    for (size_t i = 0; what && i < sizeof kinds / sizeof *kinds; i++)
        if (!strcmp(what, kinds[i].what)) return &kinds[i];
    return NULL;
}

static int no_such_member(const struct core *core, const char *name, struct err *err) {
    char list[120] = "";
    for (uint32_t i = 0; i < core_member_count(core) && strlen(list) < 80; i++) {
        struct core_member_view m;
        core_member_look(core, i, 0, &m);
        snprintf(list + strlen(list), sizeof list - strlen(list), "%s%u (%.20s)", i ? ", " : "",
                 m.member, m.name);
    }
    return err_set(err, ERR_NOT_FOUND, "no member is called '%.40s'; there are %s%s", name,
                   *list ? list : "none",
                   strlen(list) >= 80 ? ", ... (intellect-coordinator status lists all)" : "");
}

/* By id, or by a name that only one member has. */
static int find_member(const struct core *core, const char *name, struct core_member_view *out,
                       struct err *err) {
    char *end;
    unsigned long id = strtoul(name, &end, 10);
    bool is_id = *name && !*end, found = false;
    for (uint32_t i = 0; i < core_member_count(core); i++) {
        struct core_member_view m;
        core_member_look(core, i, 0, &m);
        if (is_id ? m.member != id : strcmp(m.name, name) != 0) continue;
        if (found)
            return err_set(err, ERR_REFUSED, "several members are called '%.40s': give the number",
                           name);
        *out = m;
        found = true;
    }
    return found ? 0 : no_such_member(core, name, err);
}

static int check_state(const struct core *core, const struct kind *kind,
                       const struct core_member_view *m, struct err *err) {
    struct core_view v;
    core_look(core, 0, &v);
    if (v.behind)
        return err_set(err, ERR_REFUSED,
                       "members may still show newer entries than this store has; try again in some seconds");
    if (kind->type == CORE_EV_REVOKE && m->revoked)
        return err_set(err, ERR_REFUSED, "member %u (%s) is revoked already", m->member, m->name);
    if (kind->type == CORE_EV_REVOKE && m->own) /* it could never come back, nor another in its place */
        return err_set(err, ERR_REFUSED, "member %u (%s) is this coordinator's own node: to do without it, "
                       "`serve --no-aggregator`", m->member, m->name);
    if (kind->type == CORE_EV_RELEASE && !m->quarantined)
        return err_set(err, ERR_REFUSED, "member %u (%s) is not in quarantine", m->member, m->name);
    return 0;
}

/* It becomes an entry of the ledger, which the core takes for granted that it can write. */
static int check_reason(const char *reason, struct err *err) {
    size_t length = reason ? strlen(reason) : 0;
    if (length > PROTO_TEXT_BYTES_MAX)
        return err_set(err, ERR_CONFIG, "the reason has %zu bytes; allowed are %d", length, PROTO_TEXT_BYTES_MAX);
    if (!reason || proto_text_is_clean((const uint8_t *)reason, length)) return 0;
    return err_set(err, ERR_CONFIG, "the reason must be one line of UTF-8 without control characters");
}

int operate_event(const struct core *core, const json_t *request, struct core_event *ev, char *text,
                  size_t size, struct err *err) {
    const char *what = json_string_value(json_object_get(request, "do"));
    const char *member = json_string_value(json_object_get(request, "member"));
    const char *reason = json_string_value(json_object_get(request, "reason"));
    const struct kind *kind = find_kind(what);
    struct core_member_view m = { 0 };
    if (!kind) return err_set(err, ERR_CONFIG, "unknown order '%.40s'", what ? what : "");
    if (check_reason(reason, err)) return -1;
    *ev = (struct core_event){ .type = kind->type, .text = reason ? reason : "the operator's word" };
    if (!kind->about_member) {
        snprintf(text, size, "%s", kind->done);
        return 0;
    }
    if (find_member(core, member ? member : "", &m, err) || check_state(core, kind, &m, err)) return -1;
    ev->member = m.member;
    snprintf(text, size, "member %u (%s) %s", m.member, m.name, kind->done);
    return 0;
}

/* ---- nobody serves: do it ourselves ----------------------------------------------------------- */

static uint64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static int step(const struct run *run, const struct run_keys *keys, struct core *core, uint64_t term,
                const struct core_event *ev, struct err *err) {
    struct core_actions actions = { 0 };
    int result = 0;
    core_step(core, ev, now_ms(), &actions);
    for (uint32_t i = 0; i < actions.count && !result; i++)
        if (actions.list[i].type == CORE_ACT_PERSIST)
            result = run_persist(run, keys, term, &actions.list[i], err);
    core_actions_release(&actions);
    return result;
}

static int do_it_here(struct run *run, const json_t *request, char *text, size_t size,
                      struct err *err) {
    struct core_event start = { .type = CORE_EV_START }, ev;
    struct run_keys keys;
    struct core *core = NULL;
    int lock, result = -1;
    if (store_lock(run->dir, &lock, err)) return -1;
    if (run_keys_load(&keys, run, err)) goto unlock;
    core = run_core(run, err);
    if (!core || operate_event(core, request, &ev, text, size, err)) goto out;
    if (store_raise_term(run->store, &start.term, err)) goto out;
    randombytes_buf(&start.seed, sizeof start.seed);
    result = step(run, &keys, core, start.term, &start, err) ||
                     step(run, &keys, core, start.term, &ev, err)
                 ? -1
                 : 0;
out:
    core_destroy(core);
    run_keys_release(&keys);
unlock:
    close(lock);
    return result;
}

/* ---- one way or the other ---------------------------------------------------------------------- */

/* True if the serving process answered, with its verdict in *result. */
static bool ask_serving(const struct run *run, const json_t *request, char *text, size_t size,
                        int *result, struct err *err) {
    struct err why;
    json_t *answer = control_ask(run->dir, request, &why);
    if (!answer && why.code == ERR_NOT_FOUND) return false;
    const char *error = json_string_value(json_object_get(answer, "error"));
    const char *done = json_string_value(json_object_get(answer, "done"));
    *result = answer && done ? 0
              : answer       ? err_set(err, ERR_REFUSED, "%s", error ? error : "no answer to that")
                             : err_set(err, why.code, "%s", why.msg);
    if (done) snprintf(text, size, "%s", done);
    json_decref(answer);
    return true;
}

int operate(const char *dir, const struct order *o, char *text, size_t size, struct err *err) {
    struct run run;
    int result = -1;
    if (check_reason(o->reason, err) || run_open(&run, dir, err)) return -1;
    json_t *request = json_pack("{ss ss* ss*}", "do", o->what, "member", o->member, "reason", o->reason);
    if (!request)
        err_set(err, ERR_CONFIG, "member and reason must be UTF-8");
    else if (!ask_serving(&run, request, text, size, &result, err))
        result = do_it_here(&run, request, text, size, err);
    json_decref(request);
    run_release(&run);
    return result;
}
