/* console.h - what an agent tells its person. On a terminal one live line, redrawn in place, with
 * events as lines above it; elsewhere one dated line per event and per round; or JSON lines. */
#ifndef INTELLECT_NODE_CONSOLE_H
#define INTELLECT_NODE_CONSOLE_H

#include <stdbool.h>
#include <stdint.h>

#include "node/sync.h"

struct console;

/* json: JSON lines on stdout, whatever it is. least: events below this level are not shown. Returns
 * NULL when there is no memory. */
struct console *console_create(bool json, enum sync_level least);
void console_destroy(struct console *c); /* wipes the live line; NULL is fine */

/* An event. In JSON it is {"time","event":name,"level","text"}. */
void console_say(struct console *c, enum sync_level level, const char *name, const char *format,
                 ...) __attribute__((format(printf, 4, 5)));

/* What the live line and the round's line show. */
struct console_figures {
    struct sync_view view;  /* its round counts the commits of all fragments */
    uint32_t fragments;     /* of the run: a round for people is one commit of each */
    uint64_t step;          /* inner steps of this node's trainer */
    double loss, tokens_per_s;
    double data_share;      /* of the trainer's time: waiting for the corpus */
    bool trains, connected;
};
/* Redraw the live line; nothing elsewhere. */
void console_live(struct console *c, const struct console_figures *f);
/* Commits were applied: one more of each fragment (lines), or any (JSON). In JSON "round" counts the
 * commits of all "fragments". */
void console_round(struct console *c, const struct console_figures *f);

#endif
