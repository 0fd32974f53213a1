/* audit.h - does a ledger hold together? Beyond the chain (index, previous, signature, delegated
 * key; see proto.h) every commit is checked against all before it: rounds count up, no sample is
 * spent twice, no more than there are, and tokens add up. */
#ifndef INTELLECT_COORDINATOR_AUDIT_H
#define INTELLECT_COORDINATOR_AUDIT_H

#include "proto/proto.h"

struct audit_member {
    uint32_t member;
    char name[PROTO_NAME_BYTES_MAX + 1];
    struct proto_key key;
    uint64_t tokens, rounds; /* summed in */
};

struct audit {
    struct ledger_chain chain;
    uint32_t sequence;       /* tokens of a sample, from the genesis */
    uint64_t samples;        /* of the corpus */
    uint64_t entries, commits, checkpoints, tokens, samples_spent;
    uint64_t last_commit;    /* ledger index, 0 = none */
    struct audit_member *member;
    uint32_t member_count;
    uint8_t *spent;          /* one bit per sample */
};

void audit_init(struct audit *a, const struct digest *run);
void audit_release(struct audit *a);

/* Take the next entry. ERR_CORRUPT names the entry and its first fault; nothing may be taken after. */
int audit_take(struct audit *a, const struct msg_signed_entry *entry, struct err *err);

#endif
