/* console.c - live line, plain lines or JSON lines on stdout; see console.h. */
#include "node/console.h"

#include <jansson.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "node/timer.h"

#define LINE_BYTES 512
#define REDRAW_MS 100
#define DATA_SHARE_SHOWN 0.01 /* of the time; less is no news */

struct console {
    bool json, live;      /* live: stdout is a terminal and not JSON */
    enum sync_level least;
    bool drawn;           /* the live line stands on the screen */
    uint64_t drawn_at_ms;
    char line[LINE_BYTES];
};

struct console *console_create(bool json, enum sync_level least) {
    struct console *c = calloc(1, sizeof *c);
    if (!c) return NULL;
    c->json = json;
    c->least = least;
    c->live = !json && least <= SYNC_INFO && isatty(STDOUT_FILENO);
    setvbuf(stdout, NULL, _IOLBF, 0);
    return c;
}

static void wipe(struct console *c) {
    if (c->drawn) fputs("\r\033[K", stdout);
    c->drawn = false;
}

void console_destroy(struct console *c) {
    if (!c) return;
    wipe(c);
    fflush(stdout);
    free(c);
}

/* ---- lines ----------------------------------------------------------------------------------- */

static const char *level_name(enum sync_level level) {
    static const char *name[] = { "debug", "info", "warning", "error" };
    return name[level];
}

static void date(char *out, size_t size) {
    struct timespec now;
    struct tm utc;
    char seconds[32];
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    strftime(seconds, sizeof seconds, "%Y-%m-%dT%H:%M:%S", &utc);
    snprintf(out, size, "%s.%03ldZ", seconds, now.tv_nsec / 1000000);
}

/* Takes over `object`. */
static void print_json(json_t *object) {
    char when[64];
    date(when, sizeof when);
    if (object) json_object_set_new(object, "time", json_string(when));
    char *text = object ? json_dumps(object, JSON_COMPACT | JSON_PRESERVE_ORDER) : NULL;
    if (text) puts(text);
    free(text);
    json_decref(object);
}

static void print_line(struct console *c, enum sync_level level, const char *text) {
    char when[64];
    date(when, sizeof when);
    when[19] = 0; /* milliseconds are for programs */
    if (c->drawn) fputs("\r\033[K", stdout);
    const char *mark = level >= SYNC_WARNING ? level_name(level) : "";
    printf("%s %s%s%s\n", c->live ? when + 11 : when, mark, *mark ? ": " : "", text);
    if (c->drawn) fputs(c->line, stdout);
    fflush(stdout);
}

void console_say(struct console *c, enum sync_level level, const char *name, const char *format,
                 ...) {
    char text[1024];
    va_list args;
    if (level < c->least) return;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (c->json)
        print_json(
            json_pack("{ss ss ss}", "event", name, "level", level_name(level), "text", text));
    else
        print_line(c, level, text);
}

/* ---- figures --------------------------------------------------------------------------------- */

/* 1234567 as "1.23M": four significant places say enough on one line. */
static const char *short_number(double x, char out[16]) {
    static const char unit[] = { 0, 'k', 'M', 'G', 'T' };
    size_t u = 0;
    while (x >= 1000 && u + 1 < sizeof unit) x /= 1000, u++;
    snprintf(out, 16, "%.*f%s", u == 0 ? 0 : x < 10 ? 2 : x < 100 ? 1 : 0, x,
             (char[2]){ unit[u], 0 });
    return out;
}

static void describe(const struct console_figures *f, bool live, char *out, size_t size) {
    char rate[16], tokens[16];
    const struct sync_view *v = &f->view;
    int n = snprintf(out, size, "round %llu", (unsigned long long)(v->round / f->fragments));
    if (f->trains && f->step) n += snprintf(out + n, size - (size_t)n, " | step %llu", (unsigned long long)f->step);
    if (f->trains && f->loss > 0)
        n += snprintf(out + n, size - (size_t)n, " | loss %.4f | %s tokens/s", f->loss,
                      short_number(f->tokens_per_s, rate));
    if (f->trains && f->data_share >= DATA_SHARE_SHOWN)
        n += snprintf(out + n, size - (size_t)n, ", %.0f %% waiting for data", 100 * f->data_share);
    if (live) n += snprintf(out + n, size - (size_t)n, " | %s", v->phase);
    if (live && v->chunks_missing)
        n += snprintf(out + n, size - (size_t)n, " (%u chunks to fetch)", v->chunks_missing);
    if (!f->connected) n += snprintf(out + n, size - (size_t)n, " | coordinator out of reach");
    n += snprintf(out + n, size - (size_t)n, " | %s%s by all", short_number((double)v->tokens_committed, tokens),
                  live ? "" : " tokens");
    if (v->members_live) /* not known before the coordinator's first answer */
        n += snprintf(out + n, size - (size_t)n, " | %u member%s", v->members_live, v->members_live == 1 ? "" : "s");
    snprintf(out + n, size - (size_t)n, ", %u peer%s", v->peers, v->peers == 1 ? "" : "s");
}

static size_t width(void) {
    struct winsize w;
    return ioctl(STDOUT_FILENO, TIOCGWINSZ, &w) || w.ws_col < 20 ? 80 : w.ws_col;
}

void console_live(struct console *c, const struct console_figures *f) {
    char line[LINE_BYTES];
    uint64_t now = timer_now_ms();
    if (!c->live || (c->drawn && now - c->drawn_at_ms < REDRAW_MS)) return;
    describe(f, true, line, sizeof line);
    if (width() <= strlen(line)) line[width() - 1] = 0; /* a second row could not be redrawn */
    if (c->drawn && !strcmp(line, c->line)) return;
    memcpy(c->line, line, sizeof line);
    printf("\r\033[K%s", c->line);
    fflush(stdout);
    c->drawn = true;
    c->drawn_at_ms = now;
}

static json_t *account_object(const struct sync_account *a) {
    return json_pack("{sI sI sI sI sI sI sI sI sI sI sI}", "trained", (json_int_t)a->trained, "unfrozen",
                     (json_int_t)a->unfrozen, "lost_trainer", (json_int_t)a->lost[SYNC_LOSS_TRAINER],
                     "lost_leases", (json_int_t)a->lost[SYNC_LOSS_LEASES], "lost_refused",
                     (json_int_t)a->lost[SYNC_LOSS_REFUSED], "lost_orphan",
                     (json_int_t)a->lost[SYNC_LOSS_ORPHAN], "lost_state",
                     (json_int_t)a->lost[SYNC_LOSS_STATE], "working_ms", (json_int_t)a->working_ms,
                     "no_data_ms", (json_int_t)a->no_data_ms, "no_state_ms",
                     (json_int_t)a->no_state_ms, "standing_ms", (json_int_t)a->standing_ms);
}

static json_t *round_object(const struct console_figures *f) {
    char root[DIGEST_HEX_BYTES];
    const struct sync_view *v = &f->view;
    digest_hex(&v->state_root, root);
    return json_pack("{ss sI si sI sf sf sf sI ss sI si si sI sI sI sI sI so}", "event", "round", "round",
                     (json_int_t)v->round, "fragments", (int)f->fragments, "step",
                     (json_int_t)f->step, "loss", f->loss, "tokens_per_s", f->tokens_per_s, "data_share",
                     f->data_share, "state_index", (json_int_t)v->state_index,
                     "state_root", root, "tokens_committed", (json_int_t)v->tokens_committed,
                     "members_live", (int)v->members_live, "peers", (int)v->peers, "term",
                     (json_int_t)v->term, "summed", (json_int_t)v->contributions_summed,
                     "bytes_to_peers", (json_int_t)v->bytes_to_peers, "bytes_from_peers",
                     (json_int_t)v->bytes_from_peers, "uncommitted",
                     (json_int_t)v->samples_uncommitted, "samples", account_object(&v->account));
}

void console_round(struct console *c, const struct console_figures *f) {
    char line[LINE_BYTES];
    if (c->least > SYNC_INFO) return;
    if (c->json) {
        print_json(round_object(f));
        return;
    }
    describe(f, false, line, sizeof line);
    print_line(c, SYNC_INFO, line);
}
