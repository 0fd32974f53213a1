/* run.h - the folder of a run, as every command opens it:
 *
 *   run.yaml          the settings (settings.h)
 *   store.sqlite      what the coordinator remembers (store.h); genesis and ledger among it
 *   root.key          the run's root key; `init` needs it, nothing else: to be kept elsewhere
 *   online.key        the coordinator's own, which the root key delegates to
 *   aggregator/       home of the aggregate-only node (aggregator.h)
 *   checkpoints/      where checkpoints go unless checkpoint.url says otherwise
 *   serve.lock        held by the serving process
 *   control.sock      where it answers `status` and `invite` */
#ifndef INTELLECT_COORDINATOR_RUN_H
#define INTELLECT_COORDINATOR_RUN_H

#include "coordinator/core.h"
#include "proto/settings.h"
#include "coordinator/store.h"

#define RUN_PATH_BYTES 4096
#define RUN_ROOT_KEY "root.key"
#define RUN_ONLINE_KEY "online.key"
#define RUN_NEXT_KEY "online.key.next" /* while `rotate` is at work */

struct run {
    char dir[RUN_PATH_BYTES];   /* absolute */
    struct store *store;
    uint8_t *genesis_bytes;
    size_t genesis_length;
    struct digest id;           /* of genesis_bytes */
    struct msg_genesis genesis;
    struct settings sealed;     /* what genesis was made from */
};

/* Open a sealed run. ERR_NOT_FOUND (no such folder, or not a run's: says what to do), ERR_CORRUPT. */
int run_open(struct run *r, const char *dir, struct err *err);
void run_release(struct run *r); /* a zeroed struct is fine */

/* "DIR/name" in out[RUN_PATH_BYTES]. ERR_CONFIG: too long. */
int run_path(const char *dir, const char *name, char *out, struct err *err);

/* run.yaml as it is now, resolved. ERR_CONFIG: it does not read, or a sealed setting is another than
 * in the run (msg names it). */
int run_settings(const struct run *r, struct settings *out, struct err *err);

/* Can checkpoints go to settings' URL? 0, or -1 with ERR_CONFIG. */
int run_check_store(const struct settings *s, struct err *err);

/* A new core with everything the store holds, not started yet. */
struct core *run_core(const struct run *r, struct err *err);

/* The coordinator's own key, and the root key's word for it, as WELCOME shows it. */
struct run_keys {
    struct identity online;
    uint8_t *delegation_bytes;
    struct msg_signed_entry delegation; /* borrows from delegation_bytes */
};
/* ERR_NOT_FOUND, ERR_REFUSED (the root key did not delegate to online.key), ERR_CORRUPT. */
int run_keys_load(struct run_keys *k, const struct run *r, struct err *err);
void run_keys_release(struct run_keys *k); /* a zeroed struct is fine */

/* One entry at the end of the ledger, written while nobody serves: `entry` names kind, record and body; the
 * term is raised for it; signed by `signer`. rows: further writes of the same transaction; document: a new
 * delegation for WELCOME, or NULL. *index receives its place. ERR_CORRUPT: the ledger does not hold. */
struct run_entry {
    enum ledger_kind kind;
    enum proto_record record;
    const void *body;
};
int run_append(const struct run *r, const struct identity *signer, const struct run_entry *entry,
               const struct core_write *rows, uint32_t row_count, const struct proto_bytes *document,
               uint64_t *index, struct err *err);

/* The ledger's chain up to its end, every entry checked. */
int run_chain(const struct run *r, struct ledger_chain *chain, struct err *err);

/* Carry out a CORE_ACT_PERSIST: ledger entries are signed with the online key on their way, unless they
 * were taken over with their signatures. The writes of `a` are changed. Errors of store_commit(). */
int run_persist(const struct run *r, const struct run_keys *k, uint64_t term, struct core_action *a,
                struct err *err);

#endif
