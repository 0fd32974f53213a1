/* fuzz_entry.c - one ledger entry of any content, signed for real, so that what stands behind the
 * signature is reached: by the chain that every member follows, and by the audit of `ledger verify`.
 *
 * Input: how many entries of a valid ledger come before it, who signs it, the entry. Where none
 * comes before it, the run is named after whatever genesis it carries. */
#include <stdio.h>
#include <stdlib.h>

#include "coordinator/audit.h"
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/ledger.h"
#include "tests/fuzz/records.h"

static const struct fuzz_ledger *ledger;
static struct audit before[LEDGER_ENTRIES + 1]; /* each number of entries */

static void *copy_bytes(const void *from, size_t bytes) {
    void *to = from ? malloc(bytes) : NULL;
    assert(!from == !to);
    return from ? memcpy(to, from, bytes) : NULL;
}

/* A deep copy: an audit's arrays grow with what it takes. */
static struct audit copy_of(const struct audit *a) {
    struct audit copy = *a;
    copy.member = copy_bytes(a->member, a->member_count * sizeof *a->member);
    copy.spent = copy_bytes(a->spent, a->samples / 8 + 1);
    return copy;
}

static void init(void) {
    struct err err = {0};
    int failed = proto_init(&err);
    ledger = fuzz_ledger();
    audit_init(&before[0], &ledger->run);
    for (uint32_t i = 0; i < LEDGER_ENTRIES; i++) {
        before[i + 1] = copy_of(&before[i]);
        failed |= audit_take(&before[i + 1], &ledger->entry[i], &err);
    }
    assert(!failed);
}

/* Name the run after the genesis at hand; the root key it names is the one that signs here. */
static void adopt_genesis(struct audit *a, const struct msg_entry *e) {
    if (e->index == 0) ledger_chain_init(&a->chain, &(struct digest){0});
    a->chain.run = digest_of(e->body.data, e->body.length);
}

static void check_taken(const struct ledger_chain *was, const struct ledger_chain *is,
                        const struct msg_signed_entry *e, unsigned signer) {
    struct digest head = LEDGER_DIGEST(e);
    assert(signer != SIGNER_STRANGER && is->next_index == was->next_index + 1);
    assert(digest_equal(&is->head, &head) && is->term >= was->term);
    assert(is->online_count <= LEDGER_ONLINE_KEYS_MAX);
}

static bool take(const uint8_t *bytes, size_t length) {
    struct fuzz_input in = {bytes, length};
    uint32_t at = fuzz_u8(&in) % (LEDGER_ENTRIES + 1);
    enum ledger_signer signer = (enum ledger_signer)(fuzz_u8(&in) % SIGNERS);
    struct msg_signed_entry e = {.bytes = {in.at, (uint32_t)in.left}};
    struct msg_entry decoded;
    struct err err = {0};
    struct audit a = copy_of(&before[at]);
    uint64_t term = 0;
    if (!proto_decode(in.at, in.left, RECORD_entry, &decoded, NULL)) {
        term = decoded.term;
        if (at == 0) adopt_genesis(&a, &decoded);
    }
    proto_sign(&ledger->signer[signer], "ledger", &a.chain.run, term, in.at, in.left, &e.signature);
    struct ledger_chain chain = a.chain, was = a.chain;
    int refused = ledger_chain_take(&chain, &e, &decoded, &err);
    if (refused) {
        assert(err.code && !memcmp(&chain, &was, sizeof chain) && !decoded.body.data);
    } else {
        check_taken(&was, &chain, &e, signer);
        proto_decoded_release(RECORD_entry, &decoded);
    }
    bool passed = !audit_take(&a, &e, &err);
    assert(!(refused && passed));
    audit_release(&a);
    return passed;
}

static void samples(const struct fuzz_sink *out) {
    static const uint8_t signer[LEDGER_ENTRIES] = {SIGNER_ROOT, SIGNER_ROOT, SIGNER_ONLINE, SIGNER_ONLINE,
                                                   SIGNER_ONLINE, SIGNER_ROOT, SIGNER_ONLINE2, SIGNER_ONLINE};
    for (uint8_t i = 0; i < LEDGER_ENTRIES; i++) {
        char name[] = "entry-0";
        uint8_t head[2] = {i, signer[i]};
        struct proto_buffer b;
        name[6] = (char)('0' + i);
        proto_buffer_init(&b, 1u << 16);
        proto_buffer_append(&b, head, 2);
        proto_buffer_append(&b, ledger->bytes[i].data, ledger->bytes[i].length);
        out->sample(out->arg, name, b.data, b.length);
        proto_buffer_release(&b);
    }
}

const struct fuzz_target fuzz_entry = {"entry", init, take, samples};
