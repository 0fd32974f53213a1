/* home.h - the folder in which a node keeps what is its own:
 *
 *   identity.key    the Ed25519 identity, mode 0600; made here if missing, never sent anywhere
 *   run.json        the run this node belongs to: coordinator, member id, genesis, settings
 *   lock            held by the running agent; holds its process id
 *   state/          the state at the outer steps (disk.h)
 *   origin/         a checkpoint on its way from a store behind a network (origin.h); mostly not there
 *   inner.state     the trainer's moments (engine.h)
 *   tokenizer.json  that of the run, where it has one and this node writes checkpoints: `init` puts it there */
#ifndef INTELLECT_NODE_HOME_H
#define INTELLECT_NODE_HOME_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/proto.h"

#define HOME_PATH_BYTES 768
#define HOME_TOKENIZER "tokenizer.json"

/* What run.json holds. */
struct home_run {
    char host[PROTO_ADDRESS_BYTES_MAX + 1]; /* of the coordinator */
    uint16_t port;
    struct digest run;
    uint32_t member;         /* 0 = not enrolled yet */
    bool aggregate_only;
    char name[PROTO_NAME_BYTES_MAX + 1];
    char corpus[PROTO_URL_BYTES_MAX +
                1];          /* where this machine has the corpus; "" = where genesis says */
    uint8_t *genesis;        /* encoded msg_genesis, owned; NULL before the first WELCOME */
    uint32_t genesis_bytes;
};

struct home {
    char path[HOME_PATH_BYTES];
    int lock_fd;
    struct identity identity;
    bool identity_new;       /* made by this home_open */
};

/* The folder to use where a person named none: $INTELLECT_HOME, else ~/.local/share/intellect.
 * ERR_CONFIG: neither is known, or too long. */
int home_default(char out[HOME_PATH_BYTES], struct err *err);

/* Open `path`: make it with its parents (mode 0700) and lock it; load the identity or make one.
 * ERR_REFUSED: another agent uses it (msg names the process id), or the key file is readable by
 * others. ERR_IO, ERR_CORRUPT as they come. */
int home_open(struct home *h, const char *path, struct err *err);
void home_release(struct home *h); /* unlocks; wipes the key; a zeroed struct is fine */

/* PATH/name, cut short never: asserts that it fits (name at most 64 bytes). */
#define HOME_FILE_BYTES (HOME_PATH_BYTES + 68)
void home_file(const struct home *h, const char *name, char out[HOME_FILE_BYTES]);

/* Read or replace (atomically, durably) run.json. load: ERR_NOT_FOUND: this home has joined no run;
 * ERR_CORRUPT: msg names the key that is missing or wrong. */
int home_run_load(const struct home *h, struct home_run *out, struct err *err);
int home_run_save(const struct home *h, const struct home_run *run, struct err *err);
void home_run_release(struct home_run *run);

#endif
