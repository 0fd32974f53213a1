/* err.h - the one error type. The world failing (a member gone, a disk full, hostile bytes) is a
 * `struct err`; our own mistakes are `assert`, in release builds too. A function that can fail
 * returns 0 or -1 (or NULL) and takes `struct err *err` last; on success it leaves *err alone. */
#ifndef INTELLECT_ERR_H
#define INTELLECT_ERR_H

/* A code exists only where some caller acts differently because of it. */
enum err_code {
    ERR_NONE = 0,
    ERR_IO,          /* a system call failed; msg has the path and strerror */
    ERR_FULL,        /* no space: disk, quota or a named maximum; free some and try again */
    ERR_TRUNCATED,   /* fewer bytes than announced */
    ERR_CORRUPT,     /* bytes are there and wrong: digest, signature, structure */
    ERR_PROTOCOL,    /* a peer broke docs/protocol.md; the connection ends */
    ERR_REFUSED,     /* a peer or a rule said no: revoked, used invite, not in the roster */
    ERR_STALE,       /* right form, older term, plan, session or round than the current one */
    ERR_TIMEOUT,     /* nothing came in time; trying again may help */
    ERR_CONFIG,      /* what a person wrote is wrong; msg names the key or flag and what is allowed */
    ERR_NOT_FOUND,
    ERR_UNSUPPORTED, /* this build, machine or model lacks what was asked for */
    ERR_MEMORY
};

struct err {
    enum err_code code;
    char msg[248]; /* one line: the object, the numbers, what to do */
};

/* Fill *err (which may be NULL) and return -1, so that `return err_set(...)` is the idiom. The macro
 * lets compilers and analysers see that the value is always -1. */
int err_set(struct err *err, enum err_code code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
#define err_set(...) (__extension__({ (void)err_set(__VA_ARGS__); -1; }))

/* As err_set(), with ": " and strerror(errno) appended; ENOSPC and EDQUOT become ERR_FULL, ENOENT
 * ERR_NOT_FOUND, everything else ERR_IO. */
int err_set_errno(struct err *err, const char *format, ...) __attribute__((format(printf, 2, 3)));
#define err_set_errno(...) (__extension__({ (void)err_set_errno(__VA_ARGS__); -1; }))

/* Put "prefix: " before the message, as an error travels up; cut at the end where it gets too long. */
void err_prefix(struct err *err, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
