/* store.h - where the objects of checkpoints lie: one table of functions, so that a folder, a bucket
 * of S3 and a read-only web server look alike. Names and bytes; nothing here knows what a checkpoint is.
 *
 * An object has a name ("step-000000000042/config.json": components of A-Z a-z 0-9 . _ - that do
 * not begin with a dot, joined by '/', at most CKPT_NAME_BYTES_MAX in all) and appears whole or
 * not at all: a reader never sees half of one. Functions refuse other names with ERR_REFUSED.
 *
 * Calls may come from any thread. Each is complete by itself: after it returned 0, what it did
 * survives a power failure, except where it says otherwise. */
#ifndef INTELLECT_CKPT_STORE_H
#define INTELLECT_CKPT_STORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/err.h"

#define CKPT_NAME_BYTES_MAX 255
#define CKPT_VERSION_BYTES_MAX 95

struct ckpt_object {
    char name[CKPT_NAME_BYTES_MAX + 1];
    uint64_t bytes;
    int64_t modified_s;                       /* seconds since 1970, by the store's clock */
    char version[CKPT_VERSION_BYTES_MAX + 1]; /* changes whenever the object is replaced */
    bool unfinished;                          /* an upload begun and not completed (list only) */
};

/* A part of an object on its way, or there: bytes [offset, offset + bytes), and what others need for it. */
#define CKPT_PART_URL_BYTES_MAX 4095
struct ckpt_part {
    uint64_t offset, bytes;
    uint8_t sha256[32]; /* of these bytes */
    char url[CKPT_PART_URL_BYTES_MAX + 1];
};

struct ckpt_store;
struct ckpt_upload; /* an object on its way: invisible to readers until complete */

struct ckpt_store_ops {
    /* Bytes [offset, offset + n) of an object into out. ERR_NOT_FOUND, or ERR_TRUNCATED when the
     * object ends before. */
    int (*get)(struct ckpt_store *s, const char *name, uint64_t offset, void *out, size_t n,
               struct err *err);

    /* What get would find. ERR_NOT_FOUND. */
    int (*stat)(struct ckpt_store *s, const char *name, struct ckpt_object *out, struct err *err);

    /* Put a whole object of n bytes. version: NULL replaces whatever is there, CKPT_ABSENT only
     * where there is nothing, a version from stat only where that is what is there; otherwise
     * ERR_STALE and nothing changes. */
    int (*put)(struct ckpt_store *s, const char *name, const void *bytes, size_t n,
               const char *version, struct err *err);

    /* Begin an object of exactly `bytes` bytes, which are reserved where the store can do that:
     * ERR_FULL comes here rather than halfway. NULL on failure. */
    struct ckpt_upload *(*upload_begin)(struct ckpt_store *s, const char *name, uint64_t bytes,
                                        struct err *err);
    /* Any piece, in any order; pieces may not overlap. Not durable before complete. May be called
     * in one thread while another calls upload_sync on the same upload. Never waits for a network. */
    int (*upload_put)(struct ckpt_upload *u, uint64_t offset, const void *bytes, size_t n,
                      struct err *err);
    /* Push what was put so far towards the disk, which may take long: not for an event loop. Where there is
     * upload_behind, the first call alone counts: from then on, and not before, what is put goes over the
     * network as it comes, and no call waits for that. */
    int (*upload_sync)(struct ckpt_upload *u, struct err *err);
    /* Bytes that could be sent and are not yet; 0 once that has failed. NULL where upload_sync says it. */
    uint64_t (*upload_behind)(struct ckpt_upload *u);
    /* Make the object visible, where none of that name is: ERR_STALE otherwise. Takes long. */
    int (*upload_complete)(struct ckpt_upload *u, struct err *err);
    /* Free u; what was not completed is removed. NULL is fine. */
    void (*upload_destroy)(struct ckpt_upload *u);

    /* Others, who have no key, send the parts of this upload, and read them again. All of it is NULL where
     * the store has no URLs for that. upload_share, before the first put: how many parts there are, or 0
     * where the object is too small to be shared, or URLs would not be safe, and all stays as it was. Then
     * upload_sync sends nothing; upload_complete asks the store which parts are there and sends the rest. */
    uint32_t (*upload_share)(struct ckpt_upload *u);
    /* Are all its bytes put? */
    bool (*upload_whole)(struct ckpt_upload *u, uint32_t part);
    /* A URL that takes a whole part's bytes by PUT, and no others; it is of no use once the upload is
     * complete. Reads the part and waits for the network. */
    int (*upload_offer)(struct ckpt_upload *u, uint32_t part, struct ckpt_part *out, struct err *err);
    /* Send a whole part ourselves, beside everything else; and: is it sent, or has that failed (then
     * upload_complete says why)? */
    int (*upload_send)(struct ckpt_upload *u, uint32_t part, struct err *err);
    bool (*upload_sent)(struct ckpt_upload *u, uint32_t part);
    /* One that gives them by GET, after upload_complete. */
    int (*upload_check)(struct ckpt_upload *u, uint32_t part, struct ckpt_part *out, struct err *err);
    /* What was put, from the own disk, until upload_release: after upload_complete, it gives that space back. */
    int (*upload_read)(struct ckpt_upload *u, uint64_t offset, void *out, size_t n, struct err *err);
    int (*upload_release)(struct ckpt_upload *u, struct err *err);

    /* Call visit for every object whose name begins with prefix ("" = all), in no order, and for
     * every unfinished upload. visit returns -1, with err filled, to stop. */
    int (*list)(struct ckpt_store *s, const char *prefix,
                int (*visit)(void *arg, const struct ckpt_object *o, struct err *err), void *arg,
                struct err *err);

    /* Remove an object or unfinished upload by the name that list gave. Nothing there is fine. */
    int (*remove)(struct ckpt_store *s, const char *name, struct err *err);

    /* End what is waiting for a network, in any thread, with ERR_REFUSED, and refuse what comes later:
     * the store can only be closed after that. NULL where nothing waits for one. */
    void (*cancel)(struct ckpt_store *s);

    void (*close)(struct ckpt_store *s);
};
#define CKPT_ABSENT ""

/* A store begins with this; its own fields follow. */
struct ckpt_store {
    const struct ckpt_store_ops *ops;
    char url[1025];     /* without a final '/'; names are appended with one */
    char query[513];    /* what follows the names in a URL: "?endpoint=..."; or "" */
    bool remote;        /* every call but upload_begin and upload_put waits for a network */
    uint32_t streams;   /* so many gets at a time are worth it; 0 and 1: one */
    size_t block_bytes; /* of so many bytes each; 0: any */
};

/* Open the store at a URL. No network is asked before the first call.
 *
 *   file:///ABSOLUTE/DIR   a folder; so is a path without "://"
 *   s3://BUCKET/PREFIX     see ckpt/s3.h for settings in the URL and beside it
 *   https://HOST/PATH      read only; http:// on this machine alone
 *
 * create  make the folder (and its parents) where it is missing; otherwise ERR_NOT_FOUND. A bucket
 *         is never made.
 * Returns the store, closed with s->ops->close(s), or NULL: ERR_CONFIG (scheme unknown, a malformed
 * URL or setting; msg says what is allowed), ERR_NOT_FOUND, ERR_IO. */
struct ckpt_store *ckpt_store_open(const char *url, bool create, struct err *err);

/* Is what this URL names behind a network? */
bool ckpt_store_remote(const char *url);

/* Can checkpoints be written to a store of this URL? Looks at the URL alone. ERR_CONFIG: no, and why. */
int ckpt_store_writable(const char *url, struct err *err);

/* Is this a name an object can have? */
bool ckpt_name_valid(const char *name);

#endif
