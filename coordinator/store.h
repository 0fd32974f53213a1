/* store.h - what a coordinator remembers: the tables of enum core_table, the term, and the few
 * documents a run consists of. Today it is one SQLite file (store.c); everything else only sees
 * this header, so that a PostgreSQL store can stand beside it.
 *
 * Durable means durable: when store_commit() or store_raise_term() returned 0, what it wrote
 * survives the death of the process and of the machine. Other processes (`invite`, `status`,
 * `ledger`) may open the same store at any time; they wait for each other for at most
 * STORE_BUSY_MS_MAX.
 *
 * The term fences coordinators: whoever serves raises it first, and every store_commit() is
 * conditional on it. A coordinator that was replaced while it slept gets ERR_STALE and must end
 * without sending anything more. */
#ifndef INTELLECT_COORDINATOR_STORE_H
#define INTELLECT_COORDINATOR_STORE_H

#include "coordinator/core.h"

#define STORE_FILE_NAME "store.sqlite"
#define STORE_BUSY_MS_MAX 5000

struct store;

/* The documents; written by `init`, the delegation again by `rotate`. */
enum store_document {
    STORE_GENESIS,    /* encoded msg_genesis; its digest is the run */
    STORE_DELEGATION, /* msg_signed_entry of the encoded msg_delegation, as WELCOME shows it */
    STORE_DOCUMENTS
};

/* Open DIR/store.sqlite.
 *
 * create  make an empty store where there is none; otherwise that is ERR_NOT_FOUND.
 *
 * Returns the store, closed with store_close(), or NULL: ERR_NOT_FOUND, ERR_IO, ERR_CORRUPT (not
 * SQLite, or damaged), ERR_UNSUPPORTED (written by a newer version; msg has both numbers). */
struct store *store_open(const char *dir, bool create, struct err *err);
void store_close(struct store *s); /* NULL is fine */

/* ---- reading --------------------------------------------------------------------------------- */

/* The value of one row. *value is malloc()ed, the caller frees it. ERR_NOT_FOUND: no such row. */
int store_get(struct store *s, enum core_table table, uint64_t key, uint8_t **value,
              size_t *length, struct err *err);
int store_get_document(struct store *s, enum store_document which, uint8_t **value, size_t *length,
                       struct err *err);

/* Call visit for every row with key in [first, last], in key order. value is valid until visit
 * returns; a visit that returns nonzero ends the walk, which then returns that number. All rows
 * come from one snapshot. */
typedef int store_visit(void *arg, uint64_t key, const uint8_t *value, size_t length,
                        struct err *err);
int store_each(struct store *s, enum core_table table, uint64_t first, uint64_t last,
               store_visit *visit, void *arg, struct err *err);

/* Every page and index of the file; a minute for some gigabytes. ERR_CORRUPT says what is wrong. */
int store_check(struct store *s, struct err *err);

/* ---- writing --------------------------------------------------------------------------------- */

/* The highest term anybody served under; 0 before the first. */
int store_term(struct store *s, uint64_t *term, struct err *err);
/* Before anything else a coordinator does: more than the highest so far, durable on return; 1 at first, then by
 * steps of 1 to 1000, so that a store put back to an older day uses no term again. */
int store_raise_term(struct store *s, uint64_t *term, struct err *err);

/* All writes in one transaction, if the store's term still is `term`. Values are stored as they
 * are; the ledger's are msg_signed_entry encodings, and an index is never written twice.
 * ERR_STALE: another coordinator took over; ERR_CORRUPT: a ledger index that exists; ERR_FULL and
 * ERR_IO: nothing was written. */
int store_commit(struct store *s, uint64_t term, const struct core_write *writes, uint32_t count,
                 struct err *err);

/* Likewise, and the document goes with them: a new delegation in the ledger and in WELCOME at once. */
int store_commit_document(struct store *s, uint64_t term, const struct core_write *writes, uint32_t count,
                          enum store_document which, struct proto_bytes document, struct err *err);

/* Has anybody enrolled: does the ledger hold more than genesis and delegations? */
int store_begun(struct store *s, bool *begun, struct err *err);

/* Throw away every table and document, put these in their place and set the term to 0, in one
 * transaction: `init` seals a run. documents: [STORE_DOCUMENTS]. ERR_REFUSED once store_begun(). */
int store_seal(struct store *s, const struct proto_bytes *documents, const struct core_write *writes,
               uint32_t count, struct err *err);

/* ---- invites --------------------------------------------------------------------------------- */

/* The id under which the invite with this secret's digest is kept. */
uint64_t store_invite_id(const struct digest *secret_digest);

/* Draw a secret, and the record of an invite with it. expires_ms: Unix time. */
void store_invite_make(uint32_t uses, uint64_t expires_ms, bool aggregate_only,
                       struct digest *secret, struct msg_invite_record *record);
/* Add an invite, whatever the term: `invite` is not the coordinator. */
int store_invite_add(struct store *s, const struct msg_invite_record *record, struct err *err);

/* What the store knows about the invite with this secret; *out is filled in whether it is found or
 * not. now_ms: Unix time. 0, or -1 with ERR_IO or ERR_CORRUPT. */
int store_invite_find(struct store *s, const struct digest *secret, uint64_t now_ms,
                      struct core_invite *out, struct err *err);

/* ---- one coordinator per folder ---------------------------------------------------------------- */

/* Take DIR/serve.lock until the process ends or closes *fd. ERR_REFUSED names the process that
 * has it. The lock is of the kernel's (flock): it goes with its process, however that ends. */
#define STORE_LOCK_NAME "serve.lock"
int store_lock(const char *dir, int *fd, struct err *err);

#endif
