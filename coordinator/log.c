/* log.c - see log.h. The one piece of state is the format, set once by main. */
#include "coordinator/log.h"

#include <jansson.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static bool as_json;

void log_open(bool json) {
    as_json = json;
    setvbuf(stderr, NULL, _IOLBF, 0);
}

static void format_time(char *out, size_t size) {
    struct timespec now;
    struct tm utc;
    char seconds[24];
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    strftime(seconds, sizeof seconds, "%Y-%m-%dT%H:%M:%S", &utc);
    snprintf(out, size, "%s.%03ldZ", seconds, now.tv_nsec / 1000000);
}

static void print_json(const char *time, const char *level, const char *text) {
    json_t *line = json_pack("{ss ss ss}", "time", time, "level", level, "text", text);
    char *encoded = line ? json_dumps(line, JSON_COMPACT) : NULL;
    if (encoded) fprintf(stderr, "%s\n", encoded);
    free(encoded);
    json_decref(line);
}

void log_line(enum core_level level, const char *format, ...) {
    static const char *const name[] = { [CORE_INFO] = "info", [CORE_WARNING] = "warning",
                                        [CORE_ERROR] = "error" };
    char time_text[40], text[1024];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    for (char *c = text; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f) *c = '?';
    format_time(time_text, sizeof time_text);
    if (as_json) print_json(time_text, name[level], text);
    else fprintf(stderr, "%s %-7s %s\n", time_text, name[level], text);
}
