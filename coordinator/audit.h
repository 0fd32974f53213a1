/* audit.h - does a ledger hold together? Beyond the chain (index, previous, signature, delegated
 * key; see proto.h) every commit is checked against all before it: each fragment's rounds count up, no
 * sample is spent twice, no more than there are, tokens add up, nobody takes part who was put out; what
 * a quarantine shows as proof is really signed by the member. */
#ifndef INTELLECT_COORDINATOR_AUDIT_H
#define INTELLECT_COORDINATOR_AUDIT_H

#include "proto/proto.h"

struct audit_member {
    uint32_t member;
    char name[PROTO_NAME_BYTES_MAX + 1];
    struct proto_key key;
    uint64_t tokens, rounds; /* of samples it spent; summed in */
    bool revoked;
    uint64_t quarantined; /* by this entry; 0: it is not */
};

struct audit_spend {
    uint64_t index, start, count; /* index: of the commit */
};

struct audit {
    struct ledger_chain chain;
    uint32_t sequence;       /* tokens of a sample, from the genesis */
    uint64_t samples;        /* of the corpus */
    uint32_t fragments;
    uint64_t entries, commits, checkpoints, quarantines, rewinds, tokens, samples_spent;
    uint64_t last_commit;    /* ledger index, 0 = none; of a rewind too */
    uint64_t rounds[PROTO_FRAGMENTS_MAX], base[PROTO_FRAGMENTS_MAX]; /* per fragment: commits, index of the last */
    struct audit_member *member;
    uint32_t member_count;
    uint8_t *spent;          /* one bit per sample */
    struct audit_spend *spends; /* all of them, for a rewind */
    uint64_t spend_count, spend_capacity;
};

void audit_init(struct audit *a, const struct digest *run);
void audit_release(struct audit *a);

/* Take the next entry. ERR_CORRUPT names the entry and its first fault; nothing may be taken after. */
int audit_take(struct audit *a, const struct msg_signed_entry *entry, struct err *err);

#endif
