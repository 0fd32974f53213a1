/* cmd_rewind.c - `intellect-coordinator rewind`: back to a checkpoint, by an entry of the ledger. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ckpt/ckpt.h"
#include "coordinator/commands.h"
#include "coordinator/run.h"

static const char help[] =
    "intellect-coordinator rewind DIR --to INDEX [--reason TEXT]\n"
    "\n"
    "Undo every outer step after a checkpoint: for a state that nobody can rebuild, or a run that went\n"
    "wrong. Nobody may serve meanwhile. The ledger keeps what was undone and gets one entry that says so;\n"
    "samples spent since are handed out again, members fetch the checkpoint's state by themselves.\n"
    "\n"
    "  --to INDEX     ledger index of a checkpoint, as `checkpoints DIR list` shows it\n"
    "  --reason TEXT  goes into the ledger, which everybody reads\n"
    "\n"
    "The checkpoint must still be there: it is opened and its signatures and sizes are checked first. A\n"
    "bucket's key is taken from where `serve` has it.\n"
    "\n"
    "example: intellect-coordinator rewind myrun --to 412 --reason 'loss diverged after 430'\n";

struct rewind_options {
    const char *command, *reason;
    uint64_t to;
    bool given;
};
enum { TO = 256, REASON };
static const struct option options[] = {
    { "to", required_argument, NULL, TO },
    { "reason", required_argument, NULL, REASON },
    { 0 },
};

static int take(void *arg, int option, const char *value) {
    struct rewind_options *o = arg;
    char *end;
    if (option == REASON) {
        o->reason = value;
        return 0;
    }
    o->to = strtoull(value, &end, 10);
    o->given = true;
    if (*value >= '0' && *value <= '9' && !*end) return 0;
    coordinator_misused(o->command, "--to is '%.40s'; allowed are ledger indices", value);
    return -1;
}

/* ---- looking for the checkpoint, and at what may be undone -------------------------------------- */

struct search {
    uint64_t wanted;
    bool found, undone; /* undone: a rewind since went back behind it */
    struct msg_checkpoint checkpoint; /* deep copy */
    char list[120];
};

static void note(struct search *s, const struct msg_checkpoint *c, struct err *err) {
    size_t used = strlen(s->list);
    if (used < sizeof s->list - 24)
        snprintf(s->list + used, sizeof s->list - used, "%s%llu", used ? ", " : "",
                 (unsigned long long)c->at_index);
    if (c->at_index != s->wanted) return;
    if (s->found) proto_copy_release(RECORD_checkpoint, &s->checkpoint);
    s->found = proto_copy(RECORD_checkpoint, c, &s->checkpoint, err) == 0;
    s->undone = false;
}

static int look_at_entry(struct search *s, const struct msg_entry *e, struct err *err) {
    struct msg_checkpoint c = {0};
    struct msg_rewind r = {0};
    int result = 0;
    if (e->kind == LEDGER_CHECKPOINT) {
        result = proto_decode(e->body.data, e->body.length, RECORD_checkpoint, &c, err);
        if (!result) note(s, &c, err);
        proto_decoded_release(RECORD_checkpoint, &c);
    } else if (e->kind == LEDGER_REWIND) {
        result = proto_decode(e->body.data, e->body.length, RECORD_rewind, &r, err);
        if (!result && r.to_count && r.to->at_index < s->wanted) s->undone = true;
        proto_decoded_release(RECORD_rewind, &r);
    }
    return result;
}

static int look(void *arg, uint64_t key, const uint8_t *value, size_t length, struct err *err) {
    struct msg_signed_entry signed_entry = {0};
    struct msg_entry e = {0};
    (void)key;
    int result = proto_decode(value, length, RECORD_signed_entry, &signed_entry, err);
    if (!result)
        result = proto_decode(signed_entry.bytes.data, signed_entry.bytes.length, RECORD_entry, &e, err);
    if (!result) result = look_at_entry(arg, &e, err);
    proto_decoded_release(RECORD_entry, &e);
    proto_decoded_release(RECORD_signed_entry, &signed_entry);
    return result;
}

static int find_checkpoint(const struct run *run, struct search *s, struct err *err) {
    if (store_each(run->store, CORE_LEDGER, 0, UINT64_MAX, look, s, err)) return -1;
    if (s->found && !s->undone) return 0;
    if (s->found)
        return err_set(err, ERR_REFUSED, "the state at %llu was itself undone by a later rewind",
                       (unsigned long long)s->wanted);
    return err_set(err, ERR_NOT_FOUND, "no checkpoint of the state at %llu; there are %s",
                   (unsigned long long)s->wanted, *s->list ? s->list : "none at all");
}

/* A rewind cannot be taken back, and members need the checkpoint: one that was pruned would end the run. */
static int check_there(const struct run *run, const struct msg_checkpoint *c, struct err *err) {
    char url[PROTO_URL_BYTES_MAX + 1];
    proto_str_copy(c->url, url, sizeof url);
    struct ckpt *there = ckpt_open(url, &run->id, err);
    int result = !there ? -1
                 : digest_equal(&ckpt_facts(there)->manifest, &c->manifest)
                     ? 0
                     : err_set(err, ERR_CORRUPT, "%.150s is another one than the ledger says", url);
    if (result) err_prefix(err, "the checkpoint of the state at %llu", (unsigned long long)c->at_index);
    ckpt_close(there);
    return result;
}

/* ---- leases: all are void ------------------------------------------------------------------------- */

struct rows {
    struct core_write *list;
    uint32_t count, capacity;
};

static int void_lease(void *arg, uint64_t key, const uint8_t *value, size_t length, struct err *err) {
    struct rows *r = arg;
    (void)value;
    (void)length;
    if (r->count == r->capacity) {
        uint32_t more = r->capacity ? 2 * r->capacity : 64;
        struct core_write *grown = realloc(r->list, more * sizeof *grown);
        if (!grown) return err_set(err, ERR_MEMORY, "no memory for %u leases", more);
        r->list = grown;
        r->capacity = more;
    }
    r->list[r->count++] = (struct core_write){ .table = CORE_LEASE, .key = key };
    return 0;
}

static int rewind_run(const struct run *run, const struct rewind_options *o, uint64_t *index,
                      struct err *err) {
    struct search s = { .wanted = o->to };
    struct rows rows = { 0 };
    struct run_keys keys;
    int result = find_checkpoint(run, &s, err);
    if (!result) result = check_there(run, &s.checkpoint, err);
    if (!result) result = store_each(run->store, CORE_LEASE, 0, UINT64_MAX, void_lease, &rows, err);
    if (!result) result = run_keys_load(&keys, run, err);
    if (!result) {
        struct msg_rewind body = { .to = &s.checkpoint, .to_count = 1,
                                   .reason = proto_str(o->reason ? o->reason : "the operator's word") };
        struct run_entry entry = { LEDGER_REWIND, RECORD_rewind, &body };
        result = run_append(run, &keys.online, &entry, rows.list, rows.count, NULL, index, err);
        run_keys_release(&keys);
    }
    if (s.found) proto_copy_release(RECORD_checkpoint, &s.checkpoint);
    free(rows.list);
    return result;
}

int coordinator_rewind(int argc, char **argv) {
    struct rewind_options o = { .command = argv[0] };
    struct command_line line = { help, options, take, &o };
    struct run run;
    struct err err;
    const char *dir;
    uint64_t index = 0;
    int code, lock;
    if (!command_line_parse(&line, argc, argv, &dir, &code)) return code;
    if (!o.given) return coordinator_misused(argv[0], "say to which checkpoint: --to INDEX");
    if (o.reason && strlen(o.reason) > PROTO_TEXT_BYTES_MAX)
        return coordinator_misused(argv[0], "--reason has %zu bytes; allowed are %d", strlen(o.reason),
                                   PROTO_TEXT_BYTES_MAX);
    if (run_open(&run, dir, &err)) return coordinator_failed(&err);
    int failed = store_lock(run.dir, &lock, &err);
    if (!failed) {
        failed = rewind_run(&run, &o, &index, &err);
        close(lock);
    }
    run_release(&run);
    if (failed) return coordinator_failed(&err);
    printf("ledger entry %llu goes back to the state at %llu; serve the run to go on\n",
           (unsigned long long)index, (unsigned long long)o.to);
    return 0;
}
