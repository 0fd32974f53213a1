/* status.c - the core's view as JSON, and that JSON as text. */
#include "coordinator/status.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

static const char *const phase_name[] = {
    [PHASE_CATCHING_UP] = "catching up", [PHASE_IDLE] = "idle", [PHASE_TRAINING] = "training",
    [PHASE_WAITING] = "waiting", [PHASE_APPLYING] = "applying",
};

static const char *phase_of(const struct core_member_view *m) {
    size_t phases = sizeof phase_name / sizeof *phase_name;
    if (m->revoked) return "revoked";
    if (m->quarantined) return "quarantine";
    if (!m->live) return "away";
    return m->phase < phases ? phase_name[m->phase] : "unknown";
}

/* JSON has no NaN and no infinity; whoever has not reported a loss has none. */
static json_t *number(double value) {
    return isfinite(value) ? json_real(value) : json_null();
}

static json_t *hex_key(const struct proto_key *key) {
    struct digest d;
    char hex[DIGEST_HEX_BYTES];
    memcpy(d.b, key->b, sizeof d.b);
    digest_hex(&d, hex);
    return json_string(hex);
}

static json_t *hex_digest(const struct digest *d) {
    char hex[DIGEST_HEX_BYTES];
    digest_hex(d, hex);
    return json_string(hex);
}

static json_t *member_json(const struct core_member_view *m) {
    return json_pack(
        "{si ss so sb sb sb sb sb sb ss sI so so sI sI si sf sf}", "member", (int)m->member, "name",
        m->name, "key", hex_key(&m->key), "aggregate_only", m->aggregate_only, "trains", m->trains,
        "live", m->live, "revoked", m->revoked, "quarantined", m->quarantined, "ready", m->ready,
        "phase", phase_of(m), "step",
        (json_int_t)m->step, "loss", number(m->loss), "tokens_per_s", number(m->tokens_per_s),
        "tokens_committed", (json_int_t)m->tokens_committed, "state_index",
        (json_int_t)m->state_index, "trainer_restarts", (int)m->trainer_restarts, "silent_seconds",
        m->live ? (double)m->silent_ms / 1000 : 0.0, "uplink", m->uplink);
}

static json_t *fragments_json(const struct core *c, uint32_t count) {
    json_t *list = json_array();
    for (uint32_t i = 0; i < count; i++) {
        struct core_fragment_view f;
        core_fragment_look(c, i, &f);
        json_array_append_new(
            list, json_pack("{sI sI sI si si si ss}", "round", (json_int_t)f.round, "base_index",
                            (json_int_t)f.base_index, "plan", (json_int_t)f.plan, "ready", (int)f.ready,
                            "contributors", (int)f.contributors, "shards", (int)f.shards, "phase",
                            f.phase));
    }
    return list;
}

json_t *status_json(const struct core *c, uint64_t now_ms, const struct run *run, bool serving) {
    struct core_view v;
    core_look(c, now_ms, &v);
    json_t *members = json_array();
    for (uint32_t i = 0; i < core_member_count(c); i++) {
        struct core_member_view m;
        core_member_look(c, i, now_ms, &m);
        json_array_append_new(members, member_json(&m));
    }
    return json_pack(
        "{so ss sb ss sI sI sI so sI sI so sI sI sI sI sI sI sI si si si si si si si so so}", "run",
        hex_digest(&run->id), "name", run->sealed.name, "serving", serving, "phase",
        serving ? v.phase : "not serving", "term", (json_int_t)v.term, "round", (json_int_t)v.round,
        "head_index", (json_int_t)v.head_index, "head_digest", hex_digest(&v.head_digest),
        "settled_index", (json_int_t)v.settled_index, "state_root_index",
        (json_int_t)v.state_root_index, "state_root", hex_digest(&v.state_root), "commits",
        (json_int_t)v.commits, "plan", (json_int_t)v.plan, "tokens_committed",
        (json_int_t)v.tokens_committed, "tokens_total", (json_int_t)v.tokens_total, "samples_total",
        (json_int_t)run->genesis.corpus->samples, "samples_spent", (json_int_t)v.samples_spent,
        "samples_free", (json_int_t)v.samples_free, "members_live", (int)v.members_live,
        "root_mismatches", (int)v.root_mismatches, "plans_made", (int)v.plans_made, "handovers",
        (int)v.handovers, "audits", (int)v.audits, "audits_failed", (int)v.audits_failed,
        "quarantines", (int)v.quarantines, "fragments", fragments_json(c, v.fragments), "members",
        members);
}

/* ---- for people --------------------------------------------------------------------------------- */

static int64_t whole(const json_t *object, const char *key) {
    return json_integer_value(json_object_get(object, key));
}
static const char *text(const json_t *object, const char *key) {
    const char *value = json_string_value(json_object_get(object, key));
    return value ? value : "";
}
static double real(const json_t *object, const char *key) {
    return json_number_value(json_object_get(object, key)); /* 0 for null */
}
static bool truth(const json_t *object, const char *key) {
    return json_is_true(json_object_get(object, key));
}

/* A figure that is not known, such as the loss of who does not train, is a dash. */
static void print_real(double value, int width, int digits, FILE *out) {
    if (value > 0) fprintf(out, "  %*.*f", width, digits, value);
    else fprintf(out, "  %*s", width, "-");
}

static void print_member(const json_t *m, FILE *out) {
    fprintf(out, "  %4" PRId64 "  %-20.20s  %-11s  %9" PRId64, whole(m, "member"), text(m, "name"),
            text(m, "phase"), whole(m, "step"));
    print_real(real(m, "loss"), 7, 4, out);
    print_real(truth(m, "live") ? real(m, "tokens_per_s") : 0, 9, 0, out);
    fprintf(out, "  %12" PRId64, whole(m, "tokens_committed"));
    print_real(real(m, "uplink") / 1e6, 7, 1, out);
    fprintf(out, "%s%s\n", truth(m, "ready") ? "  ready" : "",
            truth(m, "aggregate_only") ? "  aggregates only" : "");
}

/* One line: where each fragment is. */
static void print_fragments(const json_t *list, FILE *out) {
    if (json_array_size(list) < 2) return;
    fprintf(out, "parts    ");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *f = json_array_get(list, i);
        fprintf(out, "%s%zu: %s %" PRId64, i ? ", " : "", i, text(f, "phase"), whole(f, "round"));
    }
    fprintf(out, "\n");
}

void status_print(const json_t *s, FILE *out) {
    const json_t *members = json_object_get(s, "members");
    double total = real(s, "tokens_total");
    fprintf(out, "run      %s  %s\n", text(s, "name"), text(s, "run"));
    fprintf(out, "phase    %s, term %" PRId64 "\n", text(s, "phase"), whole(s, "term"));
    fprintf(out, "round    %" PRId64 ", ledger entry %" PRId64 ", settled up to %" PRId64 "\n",
            whole(s, "round"), whole(s, "head_index"), whole(s, "settled_index"));
    fprintf(out, "tokens   %" PRId64 " of %" PRId64 " (%.1f %%)\n", whole(s, "tokens_committed"),
            whole(s, "tokens_total"), total > 0 ? 100 * real(s, "tokens_committed") / total : 0.0);
    fprintf(out, "samples  %" PRId64 " of %" PRId64 " spent, %" PRId64 " not handed out\n",
            whole(s, "samples_spent"), whole(s, "samples_total"), whole(s, "samples_free"));
    if (truth(s, "serving")) fprintf(out, "state    %.16s at ledger entry %" PRId64 ", %" PRId64
                                     " roots differed\n", text(s, "state_root"),
                                     whole(s, "state_root_index"), whole(s, "root_mismatches"));
    print_fragments(json_object_get(s, "fragments"), out);
    if (truth(s, "serving"))
        fprintf(out, "audits   %" PRId64 " chunks summed again, %" PRId64 " wrong; %" PRId64
                " members put into quarantine\n", whole(s, "audits"), whole(s, "audits_failed"),
                whole(s, "quarantines"));
    fprintf(out, "members  %zu, %" PRId64 " live\n", json_array_size(members), whole(s, "members_live"));
    if (!json_array_size(members)) return;
    fprintf(out, "  %4s  %-20s  %-11s  %9s  %7s  %9s  %12s  %7s\n", "id", "name", "phase", "step", "loss",
            "tokens/s", "tokens", "up MB/s");
    for (size_t i = 0; i < json_array_size(members); i++)
        print_member(json_array_get(members, i), out);
}
