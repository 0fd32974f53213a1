/* cmd_checkpoints.c - `intellect-coordinator checkpoints`: what the run's store holds, and what of it stays. */
#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ckpt/ckpt.h"
#include "coordinator/commands.h"
#include "coordinator/run.h"

#define STALE_HOURS 24

static const char help[] =
    "intellect-coordinator checkpoints DIR list [--json]\n"
    "intellect-coordinator checkpoints DIR pin INDEX\n"
    "intellect-coordinator checkpoints DIR unpin INDEX\n"
    "intellect-coordinator checkpoints DIR prune --last N [--every K] [--stale-hours H]\n"
    "                                                [--dry-run] [--json]\n"
    "\n"
    "list   the checkpoints in checkpoint.url, newest first: ledger index, size, and what keeps them.\n"
    "pin    keep the one of this ledger index until it is unpinned, whatever prune is told.\n"
    "prune  remove checkpoints, each as a whole. Stays what is pinned, what `latest` names, and:\n"
    "\n"
    "  --last N         the N newest\n"
    "  --every K        of each K ledger indices the oldest, too; the same ones every time\n"
    "  --stale-hours H  what a crashed writer left goes when nothing in it has changed for H hours\n"
    "                   (default 24; half-done uploads among it; 0 only where nobody writes)\n"
    "  --dry-run        only say what would go\n"
    "  --json           of list too: one JSON object a line\n"
    "\n"
    "All work while the run is served. A bucket's key is taken from where `serve` has it.\n"
    "\n"
    "example: intellect-coordinator checkpoints myrun list\n"
    "example: intellect-coordinator checkpoints myrun pin 4200\n"
    "example: intellect-coordinator checkpoints myrun prune --last 3 --every 10000 --dry-run\n";

struct options {
    struct ckpt_retention how;
    bool dry_run, json;
};

enum { LAST = 256, EVERY, STALE, DRY_RUN, JSON };
static const struct option options[] = {
    { "last", required_argument, NULL, LAST },
    { "every", required_argument, NULL, EVERY },
    { "stale-hours", required_argument, NULL, STALE },
    { "dry-run", no_argument, NULL, DRY_RUN },
    { "json", no_argument, NULL, JSON },
    { 0 },
};

static int number(const char *what, const char *text, uint64_t min, uint64_t max, uint64_t *out) {
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    *out = value;
    if (*text >= '0' && *text <= '9' && !*end && !errno && value >= min && value <= max) return 0;
    return coordinator_misused("checkpoints",
                               "%s is '%.40s'; allowed are whole numbers from %" PRIu64 " to %" PRIu64,
                               what, text, min, max);
}

static int take(void *arg, int option, const char *value) {
    struct options *o = arg;
    uint64_t n = 0;
    int code = option == LAST    ? number("--last", value, 1, UINT32_MAX, &n)
             : option == EVERY ? number("--every", value, 1, INT64_MAX, &n)
             : option == STALE ? number("--stale-hours", value, 0, 1000000, &n) : 0;
    if (option == LAST) o->how.last = (uint32_t)n;
    if (option == EVERY) o->how.every = n;
    if (option == STALE) o->how.stale_s = (int64_t)n * 3600;
    if (option == DRY_RUN) o->dry_run = true;
    if (option == JSON) o->json = true;
    return code;
}

/* ---- what is shown ---------------------------------------------------------------------------------- */

static void show(const struct ckpt_entry *e, const char *what, bool json) {
    char when[32];
    struct tm tm;
    time_t t = (time_t)e->modified_s;
    strftime(when, sizeof when, "%Y-%m-%d %H:%M:%S", gmtime_r(&t, &tm));
    if (json) {
        json_t *o = json_pack("{sI ss sI sI sb sb sb ss}", "index", (json_int_t)e->index, "folder",
                              e->prefix, "bytes",
                              (json_int_t)e->bytes, "modified", (json_int_t)e->modified_s, "complete", (int)e->complete,
                              "latest", (int)e->latest, "pinned", (int)e->pinned, "what", what);
        json_dumpf(o, stdout, JSON_COMPACT);
        putchar('\n');
        json_decref(o);
    } else {
        printf("%12" PRIu64 "  %10.1f MB  %s  %s%s%s%s\n", e->index, (double)e->bytes / 1e6, when, what,
               e->complete ? "" : " unfinished", e->latest ? " latest" : "", e->pinned ? " pinned" : "");
    }
}

static void show_removed(void *arg,
                         const struct ckpt_entry *e) { show(e, "removed", ((struct options *)arg)->json); }

static int list(struct ckpt_store *store, const struct options *o, struct err *err) {
    struct ckpt_entry *e;
    uint32_t count;
    if (ckpt_list(store, &e, &count, err)) return -1;
    for (uint32_t i = 0; i < count; i++) show(&e[i], "", o->json);
    if (!count && !o->json) printf("no checkpoints in %s\n", store->url);
    free(e);
    return 0;
}

static int prune_dry(struct ckpt_store *store, const struct options *o, struct err *err) {
    struct ckpt_entry *e;
    uint32_t count;
    if (ckpt_list(store, &e, &count, err)) return -1;
    ckpt_retain(&o->how, time(NULL), e, count);
    for (uint32_t i = 0; i < count; i++) show(&e[i], e[i].kept ? "stays" : "would go", o->json);
    free(e);
    return 0;
}

/* ---- the command ------------------------------------------------------------------------------------ */

struct order {
    const char *verb;
    uint64_t index; /* pin, unpin */
};

/* "DIR VERB [INDEX]" become "DIR", which is what command_line_parse knows. 0, or the exit code. */
static int take_words(int *argc, char **argv, struct order *order) {
    static const char *const verbs[] = {"list", "pin", "unpin", "prune"};
    if (*argc < 2 || argv[1][0] == '-') return 0; /* --help, or nothing at all */
    for (size_t i = 0; *argc > 2 && i < sizeof verbs / sizeof *verbs; i++)
        if (!strcmp(argv[2], verbs[i])) order->verb = verbs[i];
    if (!order->verb) return coordinator_misused("checkpoints",
                                                 "say what to do: DIR list, pin, unpin or prune");
    int words = 1;
    if (strstr(order->verb, "pin")) {
        if (*argc < 4) return coordinator_misused("checkpoints",
                                                  "which one: a ledger index, as list shows it");
        if (number("the ledger index", argv[3], 0, INT64_MAX, &order->index)) return 2;
        words = 2;
    }
    memmove(&argv[2], &argv[2 + words], (size_t)(*argc - 2 - words + 1) * sizeof *argv);
    *argc -= words;
    return 0;
}

static int no_such_checkpoint(const struct order *order, struct err *err) {
    return err_set(err, ERR_NOT_FOUND, "there is no checkpoint %" PRIu64 "; list shows them", order->index);
}

static int carry_out(const struct order *order, struct options *o, struct ckpt_store *store,
                     struct err *err) {
    if (!strcmp(order->verb, "list")) return list(store, o, err);
    if (strcmp(order->verb, "prune") != 0) {
        bool pin = !strcmp(order->verb, "pin");
        if (ckpt_pin(store, order->index, pin, err))
            return err->code == ERR_NOT_FOUND ? no_such_checkpoint(order, err) : -1;
        printf("checkpoint %" PRIu64 " is %s\n", order->index, pin ? "pinned" : "not pinned");
        return 0;
    }
    return o->dry_run ? prune_dry(store, o, err) : ckpt_prune(store, &o->how, show_removed, o, err);
}

int coordinator_checkpoints(int argc, char **argv) {
    struct options o = { .how.stale_s = STALE_HOURS * 3600 };
    struct order order = { 0 };
    struct command_line line = { help, options, take, &o };
    struct run run = { 0 };
    struct err err;
    const char *dir;
    char url[PROTO_URL_BYTES_MAX + 1];
    int code = take_words(&argc, argv, &order);
    if (code || !command_line_parse(&line, argc, argv, &dir, &code)) return code;
    if (!order.verb) return coordinator_misused("checkpoints",
                                                "say what to do: DIR list, pin, unpin or prune");
    if (!strcmp(order.verb, "prune") && !o.how.last)
        return coordinator_misused("checkpoints", "say how many of the newest stay: --last N");
    if (run_open(&run, dir, &err)) return coordinator_failed(&err);
    proto_str_copy(run.genesis.checkpoint_url, url, sizeof url);
    struct ckpt_store *store = ckpt_store_open(url, false, &err);
    bool none = !store && err.code == ERR_NOT_FOUND; /* a folder comes with the first one */
    if (none && strstr(order.verb, "pin")) none = false, no_such_checkpoint(&order, &err);
    if (none && !o.json) printf("no checkpoints in %s\n", url);
    int failed = store ? carry_out(&order, &o, store, &err) : !none;
    if (store) store->ops->close(store);
    run_release(&run);
    return failed ? coordinator_failed(&err) : 0;
}
