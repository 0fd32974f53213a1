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
#include "coordinator/settings.h"
#include "coordinator/store.h"

#define RUN_PATH_BYTES 4096
#define RUN_ROOT_KEY "root.key"
#define RUN_ONLINE_KEY "online.key"

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

/* Carry out a CORE_ACT_PERSIST: ledger entries are signed with the online key on their way, unless they
 * were taken over with their signatures. The writes of `a` are changed. Errors of store_commit(). */
int run_persist(const struct run *r, const struct run_keys *k, uint64_t term, struct core_action *a,
                struct err *err);

#endif
