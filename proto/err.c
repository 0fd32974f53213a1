/* err.c - fills `struct err`; see err.h. */
#include "proto/err.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int(err_set)(struct err *err, enum err_code code, const char *format, ...) {
    if (!err) return -1;
    va_list ap;
    va_start(ap, format);
    vsnprintf(err->msg, sizeof err->msg, format, ap);
    va_end(ap);
    err->code = code;
    return -1;
}

int(err_set_errno)(struct err *err, const char *format, ...) {
    int saved = errno;
    if (!err) return -1;
    va_list ap;
    va_start(ap, format);
    int used = vsnprintf(err->msg, sizeof err->msg, format, ap);
    va_end(ap);
    if (used < 0) used = 0;
    if ((size_t)used < sizeof err->msg)
        snprintf(err->msg + used, sizeof err->msg - (size_t)used, ": %s", strerror(saved));
    err->code = saved == ENOSPC || saved == EDQUOT ? ERR_FULL
              : saved == ENOENT                    ? ERR_NOT_FOUND
                                                   : ERR_IO;
    return -1;
}

void err_prefix(struct err *err, const char *format, ...) {
    if (!err) return;
    char joined[2 * sizeof err->msg];
    va_list ap;
    va_start(ap, format);
    int used = vsnprintf(joined, sizeof err->msg, format, ap);
    va_end(ap);
    if (used < 0) used = 0;
    if ((size_t)used >= sizeof err->msg) used = (int)sizeof err->msg - 1;
    snprintf(joined + used, sizeof joined - (size_t)used, ": %s", err->msg);
    memcpy(err->msg, joined, sizeof err->msg);
    err->msg[sizeof err->msg - 1] = '\0';
}
