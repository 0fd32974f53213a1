/* log.h - the coordinator's log: one line per event on stderr, for people or as JSON. */
#ifndef INTELLECT_COORDINATOR_LOG_H
#define INTELLECT_COORDINATOR_LOG_H

#include <stdbool.h>

#include "coordinator/core.h"

/* JSON lines: {"time":"2026-11-22T14:03:01.123Z","level":"info","text":"..."}; otherwise
 * "2026-11-22T14:03:01.123Z info    text". Control characters in text become '?'. */
void log_open(bool json);
void log_line(enum core_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
