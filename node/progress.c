/* progress.c - one line while a tool works; see progress.h. */
#include "node/progress.h"

#include <inttypes.h>
#include <stdio.h>
#include <unistd.h>

#include "node/timer.h"

#define SHOW_EVERY_MS 200

double progress_seconds(const struct progress *p) {
    uint64_t now_ms = timer_now_ms();
    return p->begun_ms && now_ms > p->begun_ms ? (double)(now_ms - p->begun_ms) / 1000 : 0.001;
}

void progress_show(struct progress *p, uint64_t done, uint64_t total, uint64_t read, const char *what) {
    uint64_t at = timer_now_ms();
    if (!p->begun_ms) p->begun_ms = at;
    if (at - p->shown_ms < SHOW_EVERY_MS || !total || !isatty(STDERR_FILENO)) return;
    p->shown_ms = at;
    double rate = (double)read / progress_seconds(p);
    fprintf(stderr, "\r\033[K%3.0f %%  %.1f of %.1f MB", 100.0 * (double)done / (double)total,
            (double)done / 1e6, (double)total / 1e6);
    if (rate > 0) {
        uint64_t left = (uint64_t)((double)(total - done) / rate);
        fprintf(stderr, "  %.1f MB/s  %" PRIu64 ":%02" PRIu64 ":%02" PRIu64 " left", rate / 1e6, left / 3600,
                left / 60 % 60, left % 60);
    }
    fprintf(stderr, "  %.40s", what);
}

void progress_end(void) {
    if (isatty(STDERR_FILENO)) fputs("\r\033[K", stderr);
}
