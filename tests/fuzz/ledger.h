/* ledger.h - a small valid ledger with its keys, for the two ledger targets. */
#ifndef INTELLECT_TESTS_FUZZ_LEDGER_H
#define INTELLECT_TESTS_FUZZ_LEDGER_H

#include "proto/proto.h"

#define LEDGER_ENTRIES 12
#define FORK 4
#define FORK_ENTRIES 3

enum ledger_signer {
    SIGNER_ROOT,
    SIGNER_ONLINE,
    SIGNER_ONLINE2,
    SIGNER_MEMBER1,
    SIGNER_MEMBER2,
    SIGNERS
};

/* Genesis, a delegation to ONLINE, two enrolments, a commit, a delegation to ONLINE2, a checkpoint,
 * quarantine of member 2 and its end, its revocation, a rewind to the checkpoint, a new delegation to
 * ONLINE that retires its first. Made once, never freed. */
struct fuzz_ledger {
    struct identity signer[SIGNERS];
    struct digest run;
    struct proto_buffer bytes[LEDGER_ENTRIES];
    struct msg_signed_entry entry[LEDGER_ENTRIES]; /* point into bytes */
    /* Another history, signed as well: the same up to FORK, then enrolments. */
    struct proto_buffer fork_bytes[FORK_ENTRIES];
    struct msg_signed_entry fork[FORK_ENTRIES]; /* index FORK on */
};
const struct fuzz_ledger *fuzz_ledger(void);

void fuzz_sign(const struct fuzz_ledger *l, enum ledger_signer signer, uint64_t term,
               struct msg_signed_entry *e);

#endif
